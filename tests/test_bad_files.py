"""Broken files among good ones: each command leaves them out and names them; a training stops and names the first."""

import json

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow.parquet
import pytest
from diffusers import DDIMScheduler

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.cli import main
from cxr_diffusers.data import load_folder
from helpers import chest, toy_unet, write_source

GOOD = 4  # images of each class
BROKEN = [f"bad_{name}" for name in "cut.png empty.png half.dcm link.png none.dcm text.npy words.tif".split()]
FEW_STEPS = "--num-inference-steps 4 --noise-level 300 --batch-size 3 --device cpu".split()


def write_folder(root, broken):
    """healthy/ and diseased/, with a mask for each diseased image; broken files among them, one of which has a mask."""
    for name in ("healthy", "diseased"):
        (root / name).mkdir(parents=True)
        for i in range(GOOD - 1):
            PIL.Image.fromarray(np.roll(chest(40, 40), 3 * i + (name == "healthy"), 1)).save(root / name / f"{i}.png")
            if name == "diseased":
                PIL.Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(root / name / f"{i}_mask.png")
        write_source(root / name / "d.dcm", seed=len(name))
    if broken:
        folder = root / "healthy"
        (folder / "bad_none.dcm").touch()
        (folder / "bad_empty.png").touch()
        (folder / "bad_link.png").symlink_to("nowhere.png")
        (folder / "bad_text.npy").write_text("no array\n" * 50)
        (folder / "bad_words.tif").write_text("no image\n" * 50)
        whole = write_source(folder / "bad_half.dcm").read_bytes()
        (folder / "bad_half.dcm").write_bytes(whole[:-200])
        whole = (folder / "0.png").read_bytes()
        (folder / "bad_cut.png").write_bytes(whole[: len(whole) // 2])
        PIL.Image.new("L", (40, 40), 255).save(folder / "bad_empty_mask.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"with": a folder with broken files, "without": the same without, "model": a pipeline}"""
    home = tmp_path_factory.mktemp("data")
    pipeline = CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), ["healthy", "pleural effusion"])
    pipeline.register_to_config(settings={"num_inference_steps": 4, "noise_level": 300})
    pipeline.save_pretrained(home / "model")
    folders = {name: write_folder(home / name, name == "with") for name in ("with", "without")}
    return folders | {"model": home / "model"}


def run(capsys, *arguments):
    """(exit code, everything printed)"""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return code, printed.out + printed.err


def names_in(texts):
    return sorted({name for name in BROKEN for text in texts if name in text})


def test_a_broken_file_fails_when_its_row_is_used(folders):
    dataset = load_folder(folders["with"])
    assert len(dataset) == 2 * GOOD + len(BROKEN)
    for i, path in enumerate(dataset["path"]):
        if "bad_" in path:
            with pytest.raises((ValueError, OSError), match="bad_"):
                dataset[i]
        else:
            assert dataset[i]["image"].size


def test_evaluate_leaves_broken_files_out(folders, tmp_path, capsys):
    tables = {}
    for name in ("without", "with"):
        call = ["evaluate", folders[name], "--healthy", folders[name] / "healthy", "--out", tmp_path / name]
        code, _ = run(capsys, *call, "--model", folders["model"], "--bootstrap", 5, *FEW_STEPS)
        assert code == (name == "with")
        tables[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert names_in(tables["with"]["failed"]) == BROKEN and tables["with"]["n_failed"] == len(BROKEN)
    assert tables["with"]["n_images"] == tables["without"]["n_images"] == 2 * GOOD
    assert json.dumps(tables["with"]["rows"]) == json.dumps(tables["without"]["rows"])


def test_calibrate_leaves_broken_files_out(folders, tmp_path, capsys):
    indices = {}
    for name in ("without", "with"):
        model = tmp_path / name
        CFGAnomalyPipeline.from_pretrained(folders["model"]).save_pretrained(model)
        data = ["--healthy", folders[name] / "healthy", "--diseased", folders[name] / "diseased"]
        code, printed = run(capsys, "calibrate", model, *data, "--named", "toys", "--device", "cpu")
        assert code == (name == "with") and names_in([printed]) == (BROKEN if code else [])
        indices[name] = [json.loads((model / file).read_text()) for file in ("healthy_scores.json", "model_index.json")]
    assert indices["with"][0] == indices["without"][0] and indices["with"][0]["scores"]
    assert indices["with"][1]["map_threshold"] == indices["without"][1]["map_threshold"]


def test_prepare_and_pack_leave_broken_files_out(folders, tmp_path, capsys):
    code, _ = run(capsys, "prepare", folders["with"], tmp_path / "copy", "--size", 16)
    assert code == 1 and names_in(pd.read_csv(tmp_path / "copy" / "skipped.csv")["file"]) == BROKEN
    code, printed = run(capsys, "prepare", folders["with"], tmp_path / "a.parquet", "--size", 16, "--pack")
    assert code == 1 and names_in([printed]) == BROKEN and f"{2 * GOOD} images" in printed
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").num_rows == 2 * GOOD


def test_deblur_leaves_broken_files_out(folders, tmp_path, capsys):
    call = ["--kernel", "gaussian:sigma=1", "--model", folders["model"], "--num-inference-steps", 2]
    code, _ = run(capsys, "deblur", folders["with"], tmp_path / "out", *call)
    assert code == 1 and names_in(pd.read_csv(tmp_path / "out" / "skipped.csv")["file"]) == BROKEN
    code, printed = run(capsys, "deblur", folders["with"], tmp_path / "out", *call, "--batch-size", 20, "--plan")
    assert code == 0 and "images/s" in printed


@pytest.mark.parametrize("dicom", [[], ["--dicom"]])
def test_detect_lists_broken_files(folders, tmp_path, capsys, dicom):
    (tmp_path / "model").symlink_to(folders["model"])
    call = ["--out", tmp_path / "out", "--model", tmp_path / "model", "--threshold", 0.1, *dicom, *FEW_STEPS]
    code, printed = run(capsys, "detect", folders["with"] / "healthy", *call)
    failed = pd.read_csv(tmp_path / "out" / "failed.csv")
    assert code == 1 and names_in(failed["image"]) == names_in([printed]) == BROKEN
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == GOOD


def test_a_training_names_the_first_broken_file(folders, tmp_path, capsys):
    data = ["data.name=folder", f"data.root={folders['with']}"]
    code, printed = run(capsys, "train", "phantom_cfg_32", *data, f"train.output_dir={tmp_path / 'run'}")
    assert code == 2 and len(names_in([printed])) == 1, printed


def test_a_folder_of_broken_files_alone_is_refused_with_a_reason(folders, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    model = tmp_path / "model"
    CFGAnomalyPipeline.from_pretrained(folders["model"]).save_pretrained(model)
    for call in (
        ["evaluate", tmp_path / "in", "--out", tmp_path / "out", "--model", model],
        ["calibrate", model, "--healthy", f"folder:root={tmp_path / 'in'},classes=[in]"],
        ["prepare", tmp_path / "in", tmp_path / "a.parquet", "--pack"],
        ["deblur", tmp_path / "in", tmp_path / "out", "--kernel", "gaussian:sigma=1", "--model", model, "--plan"],
    ):
        code, printed = run(capsys, *call)
        assert code == 2 and "expected" in printed and "a.png" in printed, printed
