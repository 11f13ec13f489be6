import json
import os
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from diffusers import DDIMScheduler
from nbclient import NotebookClient

from cxr_diffusers import (
    CFGAnomalyPipeline,
    ClassifierGuidedPipeline,
    FixedPointGANPipeline,
    GradCAMPipeline,
    LungSegmenter,
    default_checkpoint,
    load_phantom,
)
from helpers import toy_classifier, toy_generator, toy_resnet, toy_unet

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CLASSES = ["healthy", "pleural effusion"]
SHIPPED = {  # the models that the notebooks name, at toy size
    "cxr_cfg_128": lambda: CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), CLASSES),
    "cxr_classifier_128": lambda: ClassifierGuidedPipeline(
        toy_unet(), toy_classifier(), DDIMScheduler(clip_sample=False), class_names=CLASSES
    ),
    "cxr_fixed_point_gan_128": lambda: FixedPointGANPipeline(toy_generator(), CLASSES),
    "cxr_grad_cam_128": lambda: GradCAMPipeline(toy_resnet(), class_names=CLASSES, sample_size=16),
}
SMALL = dict(block_out_channels=[8, 16, 16], norm_num_groups=4, attn_norm_num_groups=4, attention_head_dim=8)


@pytest.fixture
def toy_size(monkeypatch, tmp_path):
    """A folder to run the notebooks in: toy models with the names and the settings of those that are shipped, a small
    recipe, few steps and synthetic chests."""
    folder = tmp_path / "notebooks"
    for name, make in SHIPPED.items():
        pipeline = make()
        settings = json.loads((Path(default_checkpoint(name)) / "model_index.json").read_text())["settings"]
        if "num_inference_steps" in settings:
            settings["num_inference_steps"] = 4
        pipeline.register_modules(lung_segmenter=LungSegmenter(16, block_out_channels=(4, 8), norm_num_groups=2))
        pipeline.register_to_config(settings=settings)
        pipeline.save_pretrained(folder / name)
    (tmp_path / "training").symlink_to(REPOSITORY / "training")
    recipe = yaml.safe_load((REPOSITORY / "configs" / "phantom_cfg_32.yaml").read_text())
    recipe["unet"].update(SMALL)
    recipe["pipeline"]["num_inference_steps"] = 10
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "phantom_cfg_32.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(load_phantom(2, size=32)["image"][:]):
        image.save(tmp_path / "images" / f"{i}.png")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    for name, value in {
        "CXR_NOTEBOOK_STEPS": "4",
        "CXR_NOTEBOOK_CHESTS": "4",
        "CXR_NOTEBOOK_MODEL": folder / "cxr_cfg_128",
        "CXR_NOTEBOOK_IMAGES": tmp_path / "images",
        "TMPDIR": tmp_path,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }.items():
        monkeypatch.setenv(name, str(value))
    return folder


def test_every_notebook_is_found():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


def test_the_models_that_a_notebook_names_are_shipped():
    cells = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    named = set(re.findall(r'"(cxr_\w+)"', "\n".join(cells)))
    assert named == set(SHIPPED)
    for name in named:
        assert default_checkpoint(name)


def test_the_notebooks_run_from_top_to_bottom(toy_size):
    """All in one kernel, which imports the libraries once; the names of one notebook are deleted before the next."""
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    cells = []
    for notebook in notebooks:
        cells += [nbformat.v4.new_code_cell("%reset -sf"), *notebook.cells]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
        if cell.cell_type == "code":
            cell.execution_count = None
    together = nbformat.v4.new_notebook(cells=cells, metadata=notebooks[0].metadata)
    NotebookClient(together, timeout=300, resources={"metadata": {"path": toy_size}}).execute()
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for notebook in notebooks:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        images = [output for output in outputs if {"image/jpeg", "image/png"} & set(output.get("data", {}))]
        assert len(images) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 300_000
