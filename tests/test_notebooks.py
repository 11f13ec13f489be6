import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from cxr_diffusers import load_phantom

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.fixture
def toy_size(monkeypatch, tmp_path, pipeline):
    """The same notebooks with few steps, a toy model and synthetic chests, in a kernel that sees this checkout."""
    pipeline.register_to_config(settings={"num_inference_steps": 4})
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(load_phantom(2, size=32)["image"][:]):
        image.save(tmp_path / "images" / f"{i}.png")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    for name, value in {
        "CXR_NOTEBOOK_STEPS": "4",
        "CXR_NOTEBOOK_CHESTS": "4",
        "CXR_NOTEBOOK_MODEL": tmp_path / "model",
        "CXR_NOTEBOOK_IMAGES": tmp_path / "images",
        "TMPDIR": tmp_path,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_every_notebook_is_found():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, toy_size):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.pop("execution_count", None)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    images = [o for cell in code for o in cell.outputs if {"image/jpeg", "image/png"} & set(o.get("data", {}))]
    assert len(images) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 300_000
