"""Several methods on several data sets, from a YAML file and from the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from cxr_diffusers import CFGAnomalyPipeline, GradCAMPipeline, LungSegmenter, load_phantom
from cxr_diffusers.cli import main
from cxr_diffusers.commands.evaluate import open_judge, open_lung_segmenter
from cxr_diffusers.evaluation import load_plan, run_plan
from cxr_diffusers.evaluation.plan import checked_call
from cxr_diffusers.pipelines.pipeline_cfg_anomaly import noise_levels
from helpers import toy_resnet

CONFIG = Path(__file__).parent.parent / "configs" / "plans" / "evaluate.yaml"
SEGMENTER = "cxr_lung_segmenter_64"
FAST = {"num_inference_steps": 4, "noise_level": 500}


@pytest.fixture
def models(pipeline, tmp_path):
    """Two folders: a CFG pipeline and Grad-CAM."""
    CFGAnomalyPipeline(**pipeline.components, settings=FAST).save_pretrained(tmp_path / "cfg")
    GradCAMPipeline(toy_resnet(), sample_size=16).save_pretrained(tmp_path / "cam")
    return tmp_path


def write_plan(folder, **changes):
    methods = {"ours": {"model": str(folder / "cfg"), **FAST}, "Grad-CAM": {"model": str(folder / "cam")}}
    phantoms = {"name": "phantom", "n": 6, "size": 32}
    data = {"a": {"images": {**phantoms, "seed": 0}}, "b": {"images": {**phantoms, "seed": 1}}}
    plan = {"methods": methods, "data": data, "options": {"n_bootstrap": 10}, **changes}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def test_one_command_makes_a_table_of_all_methods_for_each_data_set(models, capsys):
    path = write_plan(models, options={"n_bootstrap": 10, "judge": str(models / "cam")})
    out = models / "out"
    assert main(["evaluate", "--config", str(path), "data.b.images.n=8", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert (out / "summary.md").read_text() in output
    assert output.count("| ours |") == 4 and output.count("Not judged: Grad-CAM, it has no counterfactual.") == 2
    assert "## a\n" in output and "## b\n" in output and output.count("| ours - Grad-CAM |") == 2
    for name, images in (("a", 6), ("b", 8)):
        table = pd.read_csv(out / name / "per_image.csv")
        assert table.groupby("method").size().to_dict() == {"ours": images, "Grad-CAM": images}
        assert {"contact_sheet.png", "precision_recall.png", "summary.md"} <= {p.name for p in (out / name).iterdir()}


def test_a_plan_names_the_lung_segmenter_of_the_gated_controls(models, capsys):
    LungSegmenter(sample_size=32, block_out_channels=(4, 4), norm_num_groups=2).save_pretrained(models / "lungs")
    path = write_plan(models, options={"n_bootstrap": 10, "lung_segmenter": str(models / "lungs")})
    command = ["evaluate", "--config", str(path), "--only", "Grad-CAM", "--out", str(models / "out")]
    assert main(command) == 0
    output = capsys.readouterr().out
    for name in ("lung gate", "brightness x gate", "mirror x gate", "mean map x gate", "location prior x gate"):
        assert output.count(f"| {name} |") == output.count(f"| Grad-CAM - {name} |") == 2, name
    summary = json.loads((models / "out" / "b" / "summary.json").read_text())
    assert summary["settings"]["lung_segmenter"] == "lungs"


def test_a_plan_can_be_run_for_some_of_its_methods(models, capsys):
    path, out = write_plan(models), models / "out"
    assert main(["evaluate", "--config", str(path), "--only", "Grad-CAM", "--out", str(out)]) == 0
    assert set(pd.read_csv(out / "a" / "per_image.csv")["method"]) == {"Grad-CAM"}
    assert (
        main(["evaluate", "--config", str(path), "--only", "Grad-CAM", "--on", "b", "--out", str(models / "one")]) == 0
    )
    assert {p.name for p in (models / "one").iterdir() if p.is_dir()} == {"b", "maps"}
    assert main(["evaluate", "--config", str(path), "--on", "c", "--out", str(out)]) == 2
    assert "no data set c, expected some of a, b" in capsys.readouterr().err
    assert set(load_plan(path, skip=["ours"]).methods) == {"Grad-CAM"}
    assert main(["evaluate", "--config", str(path), "--skip", "LRP", "--out", str(out)]) == 2
    assert "no method LRP, expected some of ours, Grad-CAM" in capsys.readouterr().err
    assert main(["evaluate", "--config", str(path), "--only", "LRP", "--out", str(out)]) == 2
    assert "no method LRP, expected some of ours, Grad-CAM" in capsys.readouterr().err
    assert main(["evaluate", str(models), "--only", "ours", "--out", str(out)]) == 2
    assert "expected a plan (--config)" in capsys.readouterr().err


def test_an_image_in_several_data_sets_is_computed_once(models):
    path, out = write_plan(models), models / "out"
    overrides = ["data.b.images.seed=0", "data.b.images.n=7"]
    assert main(["evaluate", "--config", str(path), *overrides, "--out", str(out)]) == 0
    assert len(list((out / "maps").iterdir())) == 2 * 7, "two methods, and six of b's seven images are a's"
    assert not (out / "a" / "maps").exists()


def test_call_and_batch_size_of_a_plan_hold_for_all_its_methods(models, capsys):
    out = models / "out"
    options = {"n_bootstrap": 10, "batch_size": 2, "call_kwargs": {"target_label": 1}}
    command = ["evaluate", "--config", str(write_plan(models, options=options)), "--on", "a", "--out", str(out)]
    assert main(command) == 0
    methods = json.loads((out / "a" / "summary.json").read_text())["settings"]["methods"]
    assert {name: method["call_kwargs"] for name, method in methods.items()} == {
        "ours": {"target_label": 1, **FAST},
        "Grad-CAM": {"target_label": 1},
    }
    for override, message in (
        ("options.batch_size=0", "1 or more, got 0"),
        ("options.call_kwargs.noise_level=3", "Grad-CAM: a GradCAMPipeline has no noise_level"),
        ("methods.ours.output_type=pil", "ours: a CFGAnomalyPipeline has no output_type"),
    ):
        assert main([*command, override]) == 2
        assert message in capsys.readouterr().err


def test_a_method_given_twice_is_refused(models):
    path = write_plan(models)
    path.write_text(path.read_text().replace("Grad-CAM:", "ours:"))
    with pytest.raises(ValueError, match="expected YAML, got the key 'ours' twice"):
        load_plan(path)


def test_judge_and_lung_segmenter_use_the_device_of_the_command():
    options = SimpleNamespace(device="meta", trust_remote_code=False)
    for open_it in (lambda: open_judge(options, "cxr_grad_cam_128"), lambda: open_lung_segmenter(SEGMENTER, "meta")):
        with pytest.raises(ValueError, match="expected a device that PyTorch can use here, such as cpu, got 'meta'"):
            open_it()


def test_several_models_need_no_plan(models, capsys):
    for i, image in enumerate(load_phantom(n=2, size=32)["image"]):
        (models / "data").mkdir(exist_ok=True)
        image.save(models / "data" / f"{i}.png")
    command = ["evaluate", str(models / "data"), "--out", str(models / "out"), "--bootstrap", "5"]
    assert main([*command, "--model", str(models / "cfg"), "--judge", str(models / "cam")]) == 0
    assert "Judge: cam." in capsys.readouterr().out
    assert main([*command, "--model", str(models / "cfg"), str(models / "cam")]) == 0
    assert set(pd.read_csv(models / "out" / "per_image.csv")["method"]) == {"cfg", "cam"}
    capsys.readouterr()
    assert main([*command[:-1], "0", "--model", str(models / "cfg")]) == 2
    assert "expected --bootstrap of 1 or more, got 0" in capsys.readouterr().err
    assert main([*command, "--model", str(models / "cfg"), str(models / "cfg")]) == 2
    assert "different names" in capsys.readouterr().err
    assert main([*command, "--model", str(models / "cam"), "--guidance-scale", "3"]) == 2
    assert "GradCAMPipeline has no guidance_scale" in capsys.readouterr().err


def test_root_is_replaced_in_every_value():
    plan = load_plan(CONFIG, ["root=/data/cxr", "options.n_bootstrap=5"])
    assert plan.data["implants"].images["csv"] == "/data/cxr/val_implants/val_implants.csv"
    assert plan.data["boxes"].healthy["csv"] == "/data/cxr/val_implants/val_sources.csv"
    assert plan.options == {
        "n_bootstrap": 5,
        "seed": 0,
        "judge": "cxr_grad_cam_128",
        "lung_segmenter": "cxr_lung_segmenter_64",
    }
    assert len(plan.methods) >= 3


def test_every_row_of_the_ablation_is_a_different_valid_call(pipeline):
    methods = load_plan(CONFIG.with_name("method.yaml"), ["root=/data/cxr"]).methods
    assert methods["default"] == {"model": "default"} and methods["original"] == {
        "model": "default",
        **pipeline.ORIGINAL_SETTINGS,
    }
    settings_of_rows = []
    for name, method in methods.items():
        kwargs = {key: value for key, value in method.items() if key != "model"}
        checked_call(pipeline, kwargs, name)
        settings = pipeline.settings(**kwargs)
        names = ("num_inference_steps", "guidance_scale", "guidance_every", "evidence", "score")
        pipeline.check_inputs(noise_levels(settings["noise_level"]), *(settings[name] for name in names))
        settings_of_rows.append(kwargs)
    assert len(settings_of_rows) > 10 and all(settings_of_rows.count(kwargs) == 1 for kwargs in settings_of_rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(methods={"ours": {"folder": "x"}}), "methods.ours: expected a `model`"),
        (dict(methods={}), "at least one method"),
        (dict(data={"a": {"images": {}, "mask": 1}}), "data.a: unknown key 'mask'"),
        (dict(root="???"), "give root"),
        (dict(models={}), "unknown key 'models'"),
        (dict(options={"n_bootstrp": 5}), "options: expected some of batch_size, n_bootstrap, .*, got 'n_bootstrp'"),
        (dict(options={"output_dir": "x"}), "options: expected some of .*, got 'output_dir'"),
        (dict(options={"n_bootstrap": "many"}), "options: n_bootstrap.*int, got 'many'"),
        (dict(options={"judge": 3}), "options: judge: expected str .*, got 3"),
        (dict(options={"call_kwargs": 3}), "options: call_kwargs: expected dict .*, got 3"),
        (dict(data={"a": {"images": {"n": 6}}}), "data.a.images: expected the `name` of a loader, got {'n': 6}"),
    ],
)
def test_an_invalid_plan_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_plan(write_plan(tmp_path, **changes))


@pytest.mark.parametrize("override", ["options.seed=[1,", "data.a=[1, 2]", "data=3", "methods=text"])
def test_an_invalid_override_is_an_error_of_one_line(models, capsys, override):
    path = write_plan(models)
    assert main(["evaluate", "--config", str(path), override, "--out", str(models / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert "expected" in message and "Traceback" not in message and len(message.splitlines()) == 1, message


def test_a_section_that_is_no_mapping_is_an_error_of_one_line(models, capsys):
    path = write_plan(models, data={"a": 7})
    assert main(["evaluate", "--config", str(path), "--out", str(models / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert "data.a: expected keys and values, got 7" in message and len(message.splitlines()) == 1


def test_only_files_that_were_written_are_named(models, capsys):
    folder = models / "healthy"
    folder.mkdir()
    for i, image in enumerate(load_phantom(n=2, size=32)["image"]):
        image.save(folder / f"{i}.png")
    command = ["evaluate", str(folder), "--model", str(models / "cam"), "--bootstrap", "5", "--out"]
    assert main([*command, str(models / "out")]) == 0
    output = capsys.readouterr().out
    assert "summary.md" in output and "contact_sheet.png" not in output
    assert "No map or score can be measured: no image has a true region" in output and "|" not in output
    assert not (models / "out" / "contact_sheet.png").exists()


def test_a_plan_is_refused_before_a_model_is_opened(pipeline, tmp_path):
    nowhere = {"images": {"name": "folder", "root": str(tmp_path / "nowhere")}}
    plan = load_plan(write_plan(tmp_path, data={"a": nowhere}))
    opened = []
    with pytest.raises((ValueError, OSError), match="nowhere"):
        run_plan(plan, lambda model: opened.append(model) or pipeline, tmp_path / "out")
    assert not opened and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="ours: a CFGAnomalyPipeline has no explained_label"):
        checked_call(pipeline, {"explained_label": 1}, "ours")
