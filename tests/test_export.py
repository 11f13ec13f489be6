"""Exported networks: the same maps from torch, ONNX Runtime and OpenVINO, in pipelines, folders and commands."""

import csv
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, ClassifierGuidedPipeline, FixedPointGANPipeline, load_pipeline
from cxr_diffusers.cli import main
from cxr_diffusers.fingerprints import fingerprint
from cxr_diffusers.inference.export import (
    TOLERANCE,
    cached_net,
    check_net,
    export_pipeline,
    with_backend,
)
from cxr_diffusers.models.exported_net import ExportedNet, open_openvino
from cxr_diffusers.precision import has_fast_bfloat16, use_dtype
from helpers import rows_of, toy_classifier, toy_generator, toy_unet

FAST = {"num_inference_steps": 20, "noise_level": 300}
FORMATS = ("onnx", "openvino")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for the whole file: an export takes seconds, and all tests ask for the same networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["CXR_DIFFUSERS_CACHE"]) / "exports"


def small_pipeline(**changes):
    unet = toy_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pipeline = CFGAnomalyPipeline(unet, DDIMScheduler(clip_sample=False), ["healthy", "effusion"], **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_images(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 16)).astype(np.uint8)) for _ in range(n)]


def maps(pipeline, n=3, **kwargs):
    return pipeline(make_images(n), output_type="np", **kwargs).anomaly_map


@pytest.mark.parametrize("format", FORMATS)
def test_an_exported_unet_gives_the_same_maps_whatever_the_batch_and_the_scheduler(format):
    pipeline = small_pipeline()
    exported = with_backend(pipeline, format)
    assert isinstance(exported.unet, ExportedNet) and not list(exported.unet.parameters())
    for n in (1, 3):
        expected = maps(pipeline, n, **FAST, guidance_scale=2)
        assert expected.max() > 0.1
        np.testing.assert_allclose(maps(exported, n, **FAST, guidance_scale=2), expected, atol=1e-4)
    for each in (pipeline, exported):
        each.scheduler = DPMSolverMultistepScheduler.from_config(each.scheduler.config)
    np.testing.assert_allclose(maps(exported, **FAST), maps(pipeline, **FAST), atol=1e-4)


def test_an_exported_generator_gives_the_same_maps():
    pipeline = FixedPointGANPipeline(toy_generator())
    expected = maps(pipeline, 3)
    assert expected.max() > 0.1
    use_dtype(pipeline, "bfloat16")
    assert abs(maps(pipeline, 3) - expected).max() > 1e-3
    np.testing.assert_allclose(maps(with_backend(pipeline, "onnx"), 3), expected, atol=1e-4)  # float32 nonetheless


def test_backends_are_compared_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import backends

    FixedPointGANPipeline(toy_generator()).save_pretrained(tmp_path / "model")
    backends.main(["--model", str(tmp_path / "model"), "--batch_size", "2", "--repeat", "2"])
    rows = rows_of(capsys.readouterr().out)
    names = [(row[0], row[1]) for row in rows]
    expected = ["torch", "onnx", "openvino", *(["torch, bfloat16"] if has_fast_bfloat16("cpu") else [])]
    assert names == [(name, n) for n in ("1", "2") for name in expected]
    assert [row[3] for row in rows if row[0] == "torch"] == ["1.00", "1.00"]
    assert all(float(row[2]) > 0 and float(row[4]) < (0.1 if "bfloat16" in row[0] else 1e-4) for row in rows)


def test_an_export_is_made_once_for_each_network(cache):
    with_backend(small_pipeline(), "onnx")
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*/net.*")}
    with_backend(small_pipeline(settings={"guidance_scale": 1.0}), "onnx")  # the same network in another pipeline
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*/net.*")} == before and before
    assert not list(cache.glob(".*"))


def test_fingerprints_differ_between_backends_and_weights():
    pipeline = small_pipeline()
    prints = {fingerprint(with_backend(pipeline, name), {}, 0) for name in ("torch", *FORMATS)}
    assert len(prints) == 3
    again = with_backend(small_pipeline(), "onnx")
    assert fingerprint(again, {}, 0) in prints
    again.unet.register_to_config(weights="others")
    assert fingerprint(again, {}, 0) not in prints


def test_an_exported_folder_opens_like_any_other_without_weights_and_without_this_package(
    tmp_path, caplog, monkeypatch
):
    pipeline = small_pipeline(settings={"guidance_scale": 2.0}, map_threshold=0.1)
    export_pipeline(pipeline, tmp_path / "model", "onnx")
    assert not list((tmp_path / "model").rglob("*.safetensors"))
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        opened = load_pipeline(tmp_path / "model")
    assert "Expected types" not in caplog.text
    assert (opened.config.map_threshold, opened.settings()["guidance_scale"]) == (0.1, 2.0)
    expected = maps(pipeline, **FAST)
    np.testing.assert_allclose(maps(opened, **FAST), expected, atol=1e-4)
    assert with_backend(opened, "onnx") is opened
    with pytest.raises(ValueError, match="expected the backend onnx, .* got torch"):
        with_backend(opened, "torch")

    portable = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert not type(portable.unet).__module__.startswith("cxr_diffusers.")  # the folder's own code, not ours
    assert not type(portable).__module__.startswith("cxr_diffusers.")
    np.testing.assert_allclose(maps(portable, **FAST), expected, atol=1e-4)


def test_a_folder_is_only_overwritten_on_request_and_keeps_its_card(tmp_path):
    small_pipeline().save_pretrained(tmp_path / "torch")
    (tmp_path / "torch" / "README.md").write_text("a card with ![x](example.png)")
    for name in ("example.png", "other.png"):
        make_images(1)[0].save(tmp_path / "torch" / name)
    command = ["export", str(tmp_path / "torch"), str(tmp_path / "out")]
    assert main(command) == 0
    beside = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "example.png", "model_index.json"} < beside and "other.png" not in beside
    (tmp_path / "out" / "mark").touch()
    assert main(command) == 2 and (tmp_path / "out" / "mark").exists()
    assert main([*command, "--overwrite", "--format", "openvino"]) == 0
    assert not (tmp_path / "out" / "mark").exists() and (tmp_path / "out" / "unet" / "net.bin").is_file()


def test_an_export_replaces_neither_its_own_model_nor_other_folders(tmp_path, monkeypatch):
    small_pipeline().save_pretrained(tmp_path / "torch")
    (tmp_path / "home").mkdir()
    for path in (tmp_path / "home" / "thesis.txt", tmp_path / "file"):
        path.write_text("mine")
    monkeypatch.chdir(tmp_path)
    model = load_pipeline("torch")
    for output, why in (
        (tmp_path / "torch", "weights would be lost"),
        ("home", "no pipeline"),
        ("file", "no pipeline"),
    ):
        with pytest.raises(FileExistsError, match=why):
            export_pipeline(model, output, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists() and (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "torch" / "unet").glob("*.safetensors"))


def test_pipelines_that_need_gradients_are_not_exported():
    guided = ClassifierGuidedPipeline(toy_unet(), toy_classifier(), DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="CFGAnomalyPipeline or FixedPointGANPipeline.*guidance needs gradients"):
        with_backend(guided, "onnx")
    assert with_backend(guided, "torch") is guided
    with pytest.raises(ValueError, match="a backend of torch, onnx, openvino, got 'tensorrt'"):
        with_backend(small_pipeline(), "tensorrt")
    exported = with_backend(small_pipeline(), "onnx").unet
    with pytest.raises(ValueError, match="gradient"):
        exported(torch.zeros(1, 1, 16, 16, requires_grad=True), 5, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\(B, 1, 16, 16\).*got \(1, 1, 8, 8\)"):
        exported(torch.zeros(1, 1, 8, 8), 5, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="timestep and class_labels"):
        exported(torch.zeros(1, 1, 16, 16), 5)


def test_a_missing_package_is_named_before_a_model_is_opened(tmp_path, monkeypatch, capsys):
    exported = with_backend(small_pipeline(), "onnx").unet
    other = toy_unet(seed=7)  # not in the cache
    for name in ("onnxscript", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    calls = (
        lambda: cached_net(other, ["sample", "timestep", "class_labels"], "onnx"),
        lambda: open_openvino(tmp_path / "net.xml"),
        lambda: exported.open_net(exported.folder),
    )
    for call in calls:
        with pytest.raises(ImportError, match=r"pip install 'cxr_diffusers\[export\]'"):
            call()
    for format, packages in (("onnx", "onnxscript, onnxruntime"), ("openvino", "onnxscript, openvino")):
        assert main(["export", "no/such/model", str(tmp_path / "out"), "--format", format]) == 2
        assert f"exporting to {format} needs {packages}: pip install" in capsys.readouterr().err


def test_an_export_with_another_output_is_refused():
    """What a wrong export would look like: that of another network."""
    net, inputs = small_pipeline().unet, ["sample", "timestep", "class_labels"]
    exported = with_backend(small_pipeline(), "onnx").unet
    check_net(net, exported, inputs)
    net.conv_out.bias.data += 2 * TOLERANCE
    with pytest.raises(ValueError, match="equal to 0.0001, got a difference of 2"):
        check_net(net, exported, inputs)


def test_detect_and_evaluate_take_a_backend(tmp_path, capsys):
    small_pipeline().save_pretrained(tmp_path / "torch")
    for name in ("healthy", "diseased"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, image in enumerate(make_images(2)):
            image.save(tmp_path / "data" / name / f"{i}.png")
    settings = ["--model", str(tmp_path / "torch"), "--num-inference-steps", "20", "--noise-level", "300"]
    settings += ["--dtype", "float32"]  # as an exported network computes
    maps = {}
    for backend in ("torch", "onnx"):
        out = tmp_path / backend / "out"
        images = str(tmp_path / "data" / "healthy")
        command = ["detect", images, "--out", str(out), "--map-format", "npy", *settings, "--backend", backend]
        assert main(command) == 0
        maps[backend] = [np.load(path) for path in sorted((out / "maps").iterdir())]
        with open(out / "results.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == 2
    assert main([*command[:-1], "torch"]) == 2 and "weights" in capsys.readouterr().err  # not mixed in one folder
    np.testing.assert_allclose(maps["onnx"], maps["torch"], atol=1e-4)
    command = ["evaluate", str(tmp_path / "data"), "--out", str(tmp_path / "report"), "--bootstrap", "5", *settings]
    assert main([*command, "--backend", "onnx"]) == 0
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["n_images"] == 4
    assert main([*command, "--backend", "onnx", "--device", "cuda"]) == 2
    assert "--device cpu with --backend onnx" in capsys.readouterr().err
