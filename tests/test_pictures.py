"""Images and notebook outputs are not older than the shipped models that drew them."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cxr_diffusers import default_checkpoint
from cxr_diffusers.fingerprints import checkpoint_digest
from cxr_diffusers.hub.loading import CHECKPOINTS

ROOT = Path(__file__).parent.parent
# images that no shipped model has drawn
OTHERS = {"deblurring.png", "phantoms.jpg"}
PICTURES = [p for p in sorted((ROOT / "docs" / "images").iterdir()) if p.name not in OTHERS]
PICTURES += sorted(CHECKPOINTS.glob("*/example.png"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def stale(stamp):
    """Names of the models of a stamp "NAME=DIGEST ..." whose weights or settings have changed since."""
    drawn_by = dict(re.findall(r"(\S+)=(\w+)", stamp))
    return [name for name, digest in drawn_by.items() if checkpoint_digest(default_checkpoint(name)) != digest]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_image_is_drawn_by_the_shipped_weights(path):
    with Image.open(path) as image:
        info = image.info.get("weights") or image.info.get("comment", b"").decode()
    assert "=" in info, "expected a stamp: python benchmarks/pictures.py stamp FILE MODEL..."
    assert not stale(info), "drawn by older weights: draw it again (benchmarks/pictures.py)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_of_a_notebook_are_of_the_shipped_weights(path):
    notebook = json.loads(path.read_text())
    if re.search(r"load_pipeline\(model\)|default_checkpoint\(\)", "".join(map(str, notebook["cells"]))):
        stamp = notebook["metadata"].get("weights", "")
        assert "=" in stamp, "expected a stamp: python benchmarks/notebooks.py"
        assert not stale(stamp), "outputs of older weights: python benchmarks/notebooks.py"


def test_a_digest_follows_the_weights_the_settings_the_threshold_and_the_scheduler(tmp_path):
    (tmp_path / "unet").mkdir()
    weights, index = tmp_path / "unet" / "model.safetensors", tmp_path / "model_index.json"
    digests = set()
    level = {"noise_level": 500}
    for content, settings, threshold in ((b"a", {}, None), (b"b", {}, None), (b"b", level, None), (b"b", level, 0.5)):
        weights.write_bytes(content)
        index.write_text(json.dumps({"settings": settings, "map_threshold": threshold, "class_names": None}))
        digests.add(checkpoint_digest(tmp_path))
    assert len(digests) == 4
    index.write_text(json.dumps({"settings": level, "map_threshold": 0.5, "class_names": {"0": "healthy"}}))
    assert checkpoint_digest(tmp_path) in digests, "class names change no picture"
    (tmp_path / "scheduler").mkdir()
    for spacing in ("leading", "trailing"):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"timestep_spacing": spacing}))
        digests.add(checkpoint_digest(tmp_path))
    assert len(digests) == 6
