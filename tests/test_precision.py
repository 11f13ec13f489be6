"""Networks that compute in bfloat16: the same maps to a thousandth, the same weights and fingerprints."""

import copy
import pickle
from inspect import signature

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_diffusers import load_pipeline
from cxr_diffusers.cli import main
from cxr_diffusers.fingerprints import fingerprint, weights_digest
from cxr_diffusers.hub.loading import CHECKPOINTS
from cxr_diffusers.precision import cpu_has_bfloat16, has_fast_bfloat16, use_dtype

STEPS = {"num_inference_steps": 10, "noise_level": 300, "score": "map", "view": "PA"}
MODELS = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
SAMPLE = sorted((CHECKPOINTS.parent / "samples").glob("*.png"))[0]


def test_bfloat16_is_fast_on_a_cpu_only_where_it_has_the_instructions():
    assert has_fast_bfloat16("cpu") == cpu_has_bfloat16()
    assert not has_fast_bfloat16("meta")


@pytest.mark.parametrize("name", [name for name in MODELS if "segmenter" not in name and "grad_cam" not in name])
def test_a_pipeline_in_bfloat16_gives_the_map_of_float32(name):
    pipeline = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    call = {key: value for key, value in STEPS.items() if key in signature(pipeline.__call__).parameters}
    image = Image.open(SAMPLE)
    before = fingerprint(pipeline, call, 0), weights_digest(pipeline)
    expected = pipeline(image, output_type="np", **call)
    low = use_dtype(pipeline, "bfloat16")(image, output_type="np", **call)
    assert low.anomaly_map.dtype == np.float32
    assert not np.array_equal(low.anomaly_map, expected.anomaly_map), "expected a computation in bfloat16"
    scale = max(expected.anomaly_map.max(), 1e-3)
    assert np.abs(low.anomaly_map - expected.anomaly_map).max() < 0.06 * scale
    assert (fingerprint(pipeline, call, 0), weights_digest(pipeline)) == before
    again = use_dtype(pipeline, "float32")(image, output_type="np", **call)
    assert np.abs(again.anomaly_map - expected.anomaly_map).max() < 1e-3 * scale, "weights lie in another order"


def test_a_saved_pipeline_does_not_tell_where_it_was_loaded_from(tmp_path):
    load_pipeline("cxr_fixed_point_gan_128").save_pretrained(tmp_path / "saved")
    configs = list((tmp_path / "saved").rglob("*.json"))
    assert len(configs) > 2 and not any(str(CHECKPOINTS) in path.read_text() for path in configs)


def test_a_pipeline_in_bfloat16_is_saved_as_it_was(tmp_path):
    pipeline = use_dtype(load_pipeline("cxr_fixed_point_gan_128"), "bfloat16")
    pipeline.save_pretrained(tmp_path / "saved")
    assert weights_digest(load_pipeline(tmp_path / "saved")) == weights_digest(load_pipeline("cxr_fixed_point_gan_128"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_computes_with_its_own_weights(dtype, clone):
    network = use_dtype(load_pipeline("cxr_fixed_point_gan_128"), dtype).generator
    twin = clone(network)
    images, labels = torch.zeros(1, 1, 128, 128), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        before = network(images, labels).sample
        assert torch.equal(twin(images, labels).sample, before)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(images, labels).sample, before)
        assert torch.equal(network(images, labels).sample, before)


@pytest.mark.parametrize(("dtype", "message"), [("int8", "auto, float32"), ("float16", "CUDA device")])
def test_other_number_formats_are_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        use_dtype(load_pipeline("cxr_fixed_point_gan_128"), dtype)


def test_auto_is_bfloat16_where_the_cpu_has_it():
    network = use_dtype(load_pipeline("cxr_fixed_point_gan_128")).generator
    assert (network.forward is not network._plain_forward) == cpu_has_bfloat16()


def test_the_command_line_computes_in_the_format_that_it_is_given(tmp_path):
    for dtype in ("float32", "bfloat16"):
        options = ["--model", "cxr_fixed_point_gan_128", "--dtype", dtype, "--map-format", "npy"]
        assert main(["detect", str(SAMPLE), "--out", str(tmp_path / dtype), *options]) == 0
    maps = [np.load(next((tmp_path / dtype / "maps").glob("*.npy"))) for dtype in ("float32", "bfloat16")]
    assert not np.array_equal(*maps)
    assert torch.allclose(*map(torch.from_numpy, maps), atol=0.05 * maps[0].max())
