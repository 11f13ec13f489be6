# One environment in .venv; every target makes it if it is missing. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test smoke slow style quality docs env clean

demo: $(STAMP)  ## detect on the synthetic sample chests with the shipped model
	$(BIN)/cxr-diffusers detect cxr_diffusers/samples --out demo
	@echo "panels:   demo/*.png    scores: demo/results.csv"
	@echo "yours:    $(BIN)/cxr-diffusers detect YOUR_IMAGES --out maps"

test: $(STAMP)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

smoke: $(STAMP)  ## about a minute: import, one detection, two training steps
	rm -rf build/smoke
	$(BIN)/python -c "import cxr_diffusers; print(cxr_diffusers.__version__)"
	$(BIN)/cxr-diffusers detect cxr_diffusers/samples/sample_1.png --out build/smoke/maps
	$(BIN)/python training/train_cfg.py configs/phantom_cfg_32.yaml train.max_steps=2 train.output_dir=build/smoke/run
	rm -rf build/smoke

slow: $(STAMP)  ## full-size checks, minutes each
	$(BIN)/python -m pytest -m slow

style: $(STAMP)  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)  ## check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the pages of docs/ and the API as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

env: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,quality,demo,dicom,export,docs]'
	touch $@

clean:
	rm -rf $(VENV) demo build site *.egg-info
