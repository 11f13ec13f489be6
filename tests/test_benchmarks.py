import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, DiffPIRDeblurPipeline, load_phantom
from helpers import rows_of, toy_unet

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """As when they are run as programs: their own folder is where they import from."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in (
        "cross_fit",
        "deblurring",
        "deblurring_detection",
        "detect",
        "evaluation",
        "gpu",
        "kernel_estimation",
        "machine",
        "method",
        "training_step",
    ):
        sys.modules.pop(name, None)


def test_the_cost_of_a_map_is_one_table(tmp_path, pipeline, capsys):
    import detect

    pipeline.register_to_config(settings={"num_inference_steps": 10, "guidance_scale": 2.0})
    pipeline.save_pretrained(tmp_path)
    detect.main(["--model", str(tmp_path), "--device", "cpu", "--original_steps", "20", "--batch_size", "2"])
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert [row[0].strip() for row in rows] == [
        "original procedure",
        "default",
        "default",
        "default, bfloat16",
        "default, channels_last",
    ]
    # of 20 steps 10 lie below level 500: 10 forwards there, 2 x 10 back; of 10 steps 5
    assert [(row[1], row[2]) for row in rows] == [("1", "30"), ("1", "15"), ("2", "15"), ("2", "15"), ("2", "15")]
    assert rows[0][4] == "1.000" and float(rows[3][5]) > float(rows[4][5])
    assert "threads" in text and "torch" in text


def test_the_cost_of_an_evaluation_is_compared_with_scikit_learn_and_another_version(capsys):
    import evaluation

    evaluation.main(["--images", "3", "--size", "48", "--bootstrap", "5", "--before", str(BENCHMARKS.parent)])
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows if len(row) == 4] == ["scikit-learn", "one sort"]
    versions = [row for row in rows if len(row) == 7]
    assert [row[0] for row in versions[-2:]] == ["this version", "before"] and versions[-1][4] == "1.00"
    assert all(float(row[5]) >= float(row[6]) > 0 for row in versions[-2:])


def test_a_coarser_grid_is_compared_with_every_pixel(monkeypatch):
    import evaluation

    monkeypatch.setattr(evaluation, "MODEL_SIZE", 24)  # maps without detail that the grid cannot hold
    sizes = ["--images", "3", "--size", "96", "--bootstrap", "5"]
    grid, every = (
        evaluation.evaluate_images(evaluation.parser().parse_args([*sizes, f"--resolution={n}"]))["rows"]
        for n in (48, 0)
    )
    row = rows_of(evaluation.grid_table(grid, every))[-1]
    assert all(0 < float(cell) < 0.05 for cell in row), row
    assert evaluation.grid_table(every, every).endswith("| 0e+00 | 0e+00 | 0e+00 | 0e+00 |")


def per_image_table(values, label=1):
    """What evaluate writes of images that have a patient each; `values`: {method: one a patient}."""
    rows = [
        {"method": name, "part": "dataset", "path": f"{i}.png", "patient": f"p{i}", "label": label}
        | {"pixel_ap": value, "score": value, "hit": 0.0}
        for name, column in values.items()
        for i, value in enumerate(column)
    ]
    return pd.DataFrame(rows)


def test_a_setting_is_reported_on_the_patients_it_was_not_chosen_on(tmp_path, capsys):
    import cross_fit

    first = set(np.random.default_rng(0).permutation([f"p{i}" for i in range(10)])[:5])
    in_first = np.array([f"p{i}" in first for i in range(10)])
    lucky = np.where(in_first, 0.9, 0.1)  # good where it is chosen, bad on the other half
    (tmp_path / "boxes").mkdir()
    path = tmp_path / "boxes" / "per_image.csv"
    per_image_table({"even": [0.4] * 10, "lucky": lucky}).to_csv(path, index=False)
    call = ["--results", str(tmp_path), "--data", "boxes", "--splits", "1"]
    cross_fit.main(call)
    printed = capsys.readouterr().out
    assert "chosen on one half lucky, on the other even" in printed
    cells = [float(cell.split(" [")[0]) for cell in rows_of(printed)[0][1:]]
    assert cells == [0.25, 0.4, 0.5, -0.15], "of 0.1 and 0.4, not the 0.5 of all patients"
    assert "lucky 1, even 1" in printed

    healthy, ill = np.linspace(0.1, 0.5, 10), np.linspace(0.3, 0.7, 10)
    tables = [per_image_table({"even": x, "worse": 1 - x}, label) for label, x in ((0, healthy), (1, ill))]
    tables[0]["path"] = "healthy/" + tables[0]["path"]
    unlabelled = tables[1].assign(label=None, path="unlabelled/" + tables[1].path, score=0.0)
    pd.concat([*tables, unlabelled]).to_csv(path, index=False)
    cross_fit.main([*call, "--metric", "image_auroc"])
    row = rows_of(capsys.readouterr().out)[0]
    parts = [[(a < b) + (a == b) / 2 for a in healthy[side] for b in ill[side]] for side in (in_first, ~in_first)]
    assert float(row[1].split(" [")[0]) == pytest.approx(np.mean([np.mean(part) for part in parts]), abs=6e-4)


def test_the_method_table_has_pixel_ap_and_cost_of_each_choice(tmp_path, pipeline, capsys):
    import cross_fit
    import method
    import yaml

    from cxr_diffusers.cli import main

    CFGAnomalyPipeline(**pipeline.components, settings={"num_inference_steps": 4}).save_pretrained(tmp_path / "model")
    own = {"model": str(tmp_path / "model")}
    methods = {
        "default": own,
        "two levels": {**own, "noise_level": [300, 500]},
        "unguided": {**own, "guidance_scale": 0.0},
    }
    methods["original"] = {**own, **CFGAnomalyPipeline.ORIGINAL_SETTINGS, "num_inference_steps": 10}
    phantoms = {"name": "phantom", "n": 6, "size": 32}
    data = {"implants": {"images": {**phantoms, "diseased_fraction": 1.0}}, "boxes": {"images": phantoms}}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"methods": methods, "data": data, "options": {"n_bootstrap": 9}}, sort_keys=False))
    assert main(["evaluate", "--config", str(plan), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    image = tmp_path / "cost.png"
    method.main(["--results", str(tmp_path / "out"), "--config", str(plan), "--figure", str(image)])
    printed, boxes = capsys.readouterr().out.split("boxes:")
    rows, others = rows_of(printed), rows_of(boxes)
    assert [row[0].strip() for row in rows[:4]] == list(methods) and rows[-1][0].strip() == "chance"
    assert [row[0].strip() for row in others] == [*methods, "location prior", "chance"]
    summary = json.loads((tmp_path / "out" / "boxes" / "summary.json").read_text())["rows"]["unguided"]
    assert others[2][4].startswith(f"{summary['image_auroc']['value']:.3f} [")
    # of 4 steps 2 lie below level 500 and 2 below 300; of 10 steps 5 below 500
    assert [int(row[-1]) for row in rows[:4]] == [2 + 4, 2 + 4 + 4, 2 + 2, 5 + 10]
    assert all("[" in row[2] for row in rows[1:4]) and rows[0][2].strip() == "–"
    assert Image.open(image).width > 300
    cross_fit.main(["--results", str(tmp_path / "out"), "--data", "implants", "boxes", "--splits", "2"])
    assert [row[0] for row in rows_of(capsys.readouterr().out)] == ["implants", "boxes"]


def test_the_cost_of_a_training_step_is_one_table(capsys):
    import training_step

    toy = ["unet.block_out_channels=[8, 8, 8]", "unet.attention_head_dim=8", "train.batch_size=2"]
    training_step.main(["--recipes", "phantom_cfg_32", "--steps", "3", *toy])
    rows = rows_of(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["in memory", "from files"]
    waiting = [float(row[-1].rstrip("% ")) for row in rows]
    assert 0 <= waiting[0] < waiting[1] < 100


@pytest.fixture
def radiographs(tmp_path):
    """A toy prior, and phantoms with a manifest, some of them with a mask."""
    DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), DDIMScheduler()).save_pretrained(tmp_path / "prior")
    (tmp_path / "val_implants").mkdir()
    rows = []
    for i, row in enumerate(load_phantom(6, size=48, diseased_fraction=1.0)):
        row["image"].save(tmp_path / f"{i}.png")
        row["image"].save(tmp_path / "val_implants" / f"{i}.png")
        row["mask"].save(tmp_path / "val_implants" / f"{i}_mask.png")
        rows.append({"file": f"{i}.png", "source": "nih_named", "patient_id": f"p{i}", "split": "tv"[i % 2]})
    table = pd.DataFrame(rows).replace({"split": {"t": "train", "v": "val"}})
    table.to_csv(tmp_path / "manifest.csv", index=False)
    table = table.assign(mask=[f"{i}_mask.png" for i in range(6)], view="", diseased="diseased")
    table.to_csv(tmp_path / "val_implants" / "val_implants.csv", index=False)
    return ["--data", str(tmp_path)]


def test_deblurring_is_compared_with_the_classics_in_one_table_a_blur(tmp_path, radiographs, capsys):
    import deblurring

    options = ["--model", str(tmp_path / "prior"), "--images", "3", "--steps", "2", "3", "--figure"]
    blurs = ["--blurs", "motion, size 10", "--variants", "zeta 1"]
    deblurring.main([*radiographs, *options, str(tmp_path / "sheet.png"), *blurs, "--device", "cpu"])
    text = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names.count("blurred") == names.count("DiffPIR, 3 steps") == 1
    assert sum(name.startswith("Wiener, balance") for name in names) == 1
    assert sum(name.startswith("Richardson-Lucy") for name in names) == 1 and "DiffPIR, 2 steps, zeta 1" in names
    assert Image.open(tmp_path / "sheet.png").width > 6 * 48


def test_the_estimated_blur_is_compared_with_the_true_one(radiographs, capsys):
    import kernel_estimation

    kernel_estimation.main([*radiographs, "--images", "3", "--calibration", "3", "--size", "32"])
    rows = rows_of(capsys.readouterr().out)
    assert [row[1].strip() for row in rows][:3] == ["0", "1.00, 1.00", "2.00, 2.00"] and len(rows) == 9
    sigma, minor, angle = kernel_estimation.shape_of(kernel_estimation.make_kernel("gaussian:sigma=3,minor=1,angle=30"))
    assert (sigma, minor, angle) == pytest.approx((3, 1, 30), rel=0.02)


def test_detection_is_measured_with_and_without_deblurring(tmp_path, pipeline, radiographs, capsys):
    import deblurring_detection

    pipeline.register_to_config(settings={"num_inference_steps": 4, "guidance_scale": 2.0})
    pipeline.save_pretrained(tmp_path / "detector")
    options = ["--model", str(tmp_path / "detector"), "--prior", str(tmp_path / "prior"), "--steps", "2"]
    deblurring_detection.main([*radiographs, *options, "--images", "3", "--bootstrap", "10", "--device", "cpu"])
    rows = rows_of(capsys.readouterr().out)
    assert [row[0].strip() for row in rows][:4] == list(deblurring_detection.NAMES)
    assert any("blurred, deblurred - blurred" in row[0] for row in rows)


# the program runs where little is installed; no time for what compiles
GPU_PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(["datasets", "pydicom", "sklearn", "simplejpeg", "torchvision", "onnxruntime"]))
import gpu
gpu.COMPILE_SECONDS = 1e9
sys.exit(gpu.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_gpu_is_measured_while_time_lasts(tmp_path):
    options = ["--device", "cpu", "--toy", "--seconds", "1e6", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    subprocess.run(
        [sys.executable, "-c", GPU_PROGRAM, *options], env=environment, check=True, capture_output=True, timeout=600
    )
    results = json.loads((tmp_path / "results.json").read_text())
    tables = results["tables"]
    assert all(tables.values()) and not results["failed"]
    assert len(results["skipped"]) > 5 and all("compile" in name for name in results["skipped"])
    assert {row["precision"] for row in tables["forward"]} == {"float32", "tf32", "bf16 autocast", "bf16 weights"}
    for row in tables["forward"]:
        rate = results["rates"]["bf16" if "bf16" in row["precision"] else row["precision"]]
        share = float(row["images a second"]) * results["gflop_an_image"] * 1e9 / rate
        assert float(row["of the card's rate"].rstrip("%")) / 100 == pytest.approx(share, abs=1e-3)
        assert (float(row["off by"]) > 1e-3) == ("bf16" in row["precision"]) and float(row["off by"]) < 0.05
    apart = {(row[""], row["precision"]): float(row["max. difference"]) for row in tables["agreement"]}
    assert apart["an anomaly map", "float32"] == 0 < apart["an anomaly map", "bf16 weights"] < 0.05
    text = (tmp_path / "table.md").read_text()
    assert "goal 60%" in text and "No time for" in text and not list(tmp_path.glob(".*"))


def test_a_compiled_forward_with_channelwise_norms_is_the_same_network(tmp_path):
    import gpu

    options = ["--device", "cpu", "--toy", "--out", str(tmp_path)]
    bench = gpu.Bench(gpu.parser().parse_args(options))
    variant = gpu.Variant("float32", 1, channels_last=True, compile="default", channelwise=True)
    ((section, row),) = bench.forward(variant)
    assert section == "forward" and 0 < float(row[6]) < 1e-5 and bench.compile_seconds != gpu.COMPILE_SECONDS
    norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight)
    x = 100 + torch.randn(2, 16, 8, 8)  # a mean far from zero must not cost digits
    torch.testing.assert_close(gpu.channelwise_group_norm(norm, x), norm(x), atol=1e-4, rtol=1e-4)
    assert gpu.channelwise_group_norm(norm, x.flatten(2).bfloat16()).dtype == torch.bfloat16


def test_the_bytes_of_norms_sums_and_joins_are_counted():
    import gpu

    def unet_of(levels):
        down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
        blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": [8] * levels}
        return UNet2DModel(**blocks, layers_per_block=1, norm_num_groups=4, attention_head_dim=8, num_class_embeds=2)

    # in activations of 8 channels; down 2 norms, middle 5, up 2 x (2 + 1), out 1; sums of 1, 2 and 2 blocks and of the
    # attention; 2 joins of 2 activations
    passes = 3 * (2 + 5 + 6 + 1) + 3 * (1 + 2 + 2 + 1) + 2 * 2 * 2
    assert gpu.bytes_outside_arithmetic(unet_of(1), (3, 16, 16)) == passes * 8 * 16 * 16 * 2
    # with a second level, three quarters smaller: there as before, without the middle at the first; the way down and up
    # adds 2 norms and a sum, 6 norms, 2 sums and 2 joins, and an enlargement
    first, second = 3 * (2 + 6 + 1) + 3 * (1 + 2) + 2 * 2 * 2 + 5 / 4, 3 * (2 + 5 + 6) + 3 * (1 + 2 + 2 + 1) + 2 * 2 * 2
    assert gpu.bytes_outside_arithmetic(unet_of(2), (3, 16, 16)) == (first + second / 4) * 8 * 16 * 16 * 2


def test_a_measurement_that_fails_costs_no_other(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu.Bench, "matrix_rate", lambda self, dtype: 1 / 0)
    assert gpu.main(["--device", "cpu", "--toy", "--only", "rates", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["tables"]["rates"]) == 1 and len(results["failed"]) == 3
    assert "ZeroDivisionError" in results["failed"][0]
