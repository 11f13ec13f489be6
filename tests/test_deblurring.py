"""A data set in, the same data set deblurred out; whoever is killed, nothing is lost and nothing done twice."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import DiffPIRDeblurPipeline, load_chexpert, load_folder, load_table, read_image
from cxr_diffusers.cli import main
from cxr_diffusers.deblurring.dataset import deblur, describe_plan, measure
from cxr_diffusers.deblurring.degradations import gaussian_kernel
from helpers import HEADER, chexpert_row, save_image, toy_unet, write_dicom

KERNEL = "gaussian:sigma=0.8"
FAST = {"num_inference_steps": 2}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def prior():
    pipeline = DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_noise(path, seed=0, size=(20, 18)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size[::-1]).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """healthy/ and diseased/, of two sizes, with a mask, boxes and tables."""
    root = tmp_path / "data"
    for i in range(5):
        save_noise(root / ("healthy" if i < 3 else "diseased") / f"{i}.png", i, (20, 18) if i % 2 else (24, 18))
    mask = np.zeros((18, 20), np.uint8)
    mask[5:9, 4:9] = 255
    Image.fromarray(mask).save(root / "diseased" / "3_mask.png")
    Image.fromarray(mask).save(root / "diseased" / "outline.png")  # a mask by its values alone
    (root / "healthy" / "1.txt").write_text("4 5 6 7\n")
    (root / "list.csv").write_text("file,note\nhealthy/0.png,a\ndiseased/3.png,3.png\n")
    return root


def pictures(root):
    return {p.relative_to(root).as_posix(): np.asarray(read_image(p)) for p in sorted(root.rglob("*.png"))}


def test_a_folder_keeps_its_tree_masks_boxes_and_tables(prior, folder, tmp_path):
    summary = deblur(prior, folder, tmp_path / "out", kernel=KERNEL, call_kwargs=FAST, progress=False)
    assert (summary["images"], summary["computed"], summary["kept"], summary["skipped"]) == (7, 5, 0, 0)
    before, after = pictures(folder), pictures(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == ("mask" in name or "outline" in name) and before[name].shape == after[name].shape
    ours, theirs = load_folder(tmp_path / "out"), load_folder(folder)
    assert ours["label"][:] == theirs["label"][:] and ours["boxes"][:] == theirs["boxes"][:]
    assert (tmp_path / "out" / "list.csv").read_text() == (folder / "list.csv").read_text()
    assert json.loads((tmp_path / "out" / "deblur_summary.json").read_text()) == summary


def test_chexpert_keeps_its_rows_and_boxes_and_bad_files_are_told(prior, tmp_path):
    source, rows = tmp_path / "CheXpert-v1.0-small", []
    for i in range(4):
        path = f"CheXpert-v1.0-small/train/patient0000{i}/study1/view1_frontal.jpg"
        rows.append(chexpert_row(path, **{"No Finding": 1.0}))
        save_image(tmp_path / path, 50 * i, (20, 18))
    (source / "train/patient00002/study1/view1_frontal.jpg").write_bytes(b"broken")
    pd.DataFrame(rows, columns=HEADER).to_csv(source / "train.csv", index=False)
    (source / "boxes.csv").write_text(f"file,x,y,w,h,reader\n{rows[0]['Path']},3,4,5,6,20\n")
    summary = deblur(prior, source, tmp_path / "out", kernel=KERNEL, call_kwargs=FAST, progress=False)
    assert summary["images"] == 3 and summary["reasons"] == {"broken image": 1}
    assert "patient00002" in (tmp_path / "out" / "skipped.csv").read_text()
    ours = load_chexpert(tmp_path / "out")
    assert ours["patient"][:] == ["patient00000", "patient00001", "patient00003"]
    assert ours["boxes"][0] == [[3, 4, 5, 6]] and ours[0]["image"].size == (20, 18)
    assert "reader\nout/train/patient00000/study1/view1_frontal.png,3,4,5,6,20" in (
        tmp_path / "out" / "boxes.csv"
    ).read_text().replace(".0", "")


def test_an_image_smaller_than_the_kernel_is_left_out_alone(prior, tmp_path):
    for i, size in enumerate([(20, 18), (5, 30), (20, 18)]):
        save_noise(tmp_path / "in" / f"{i}.png", i, size)
    summary = deblur(prior, tmp_path / "in", tmp_path / "out", kernel=KERNEL, call_kwargs=FAST, progress=False)
    assert summary["computed"] == 2 and summary["reasons"] == {"smaller than the kernel": 1}


def test_tables_follow_their_images_to_new_names_and_16_bits_stay(prior, tmp_path):
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    write_dicom(root / "a" / "1.2.840.7", pixels, 12)
    save_noise(root / "a" / "x.bmp")
    (root / "a" / "list.csv").write_text("file,label\n1.2.840.7,healthy\nx.bmp,healthy\n")
    deblur(prior, root, tmp_path / "out", kernel=KERNEL, call_kwargs=FAST, progress=False)
    dataset = load_table(tmp_path / "out" / "a" / "list.csv")
    assert [row["image"].mode for row in dataset] == ["I;16", "L"]
    deep = np.asarray(dataset[0]["image"])
    assert len(np.unique(deep % 257)) > 10, "not 8 bits in 16"


def test_an_image_comes_out_the_same_in_any_company(prior, folder, tmp_path):
    options = dict(kernel=KERNEL, call_kwargs=FAST, progress=False)
    deblur(prior, folder, tmp_path / "one", batch_size=1, **options)
    deblur(prior, folder, tmp_path / "many", batch_size=3, **options)
    deblur(prior, folder / "diseased", tmp_path / "part", **options)
    deblur(prior, folder, tmp_path / "other", seed=1, **options)
    one, many, other = (pictures(tmp_path / name) for name in ("one", "many", "other"))
    for name in one:
        assert np.abs(one[name].astype(int) - many[name]).max() <= 1
    assert np.abs(one["healthy/0.png"].astype(int) - other["healthy/0.png"]).max() > 1


def test_each_image_can_get_the_kernel_it_is_estimated_to_need(prior, folder, tmp_path):
    summary = deblur(prior, folder, tmp_path / "out", kernel="estimate", call_kwargs=FAST, progress=False)
    assert summary["computed"] == 5 and summary["settings"]["kernel"] == "estimate"


def run_slowly(source, output):
    """In a process of its own, until it is killed: one picture at a time."""
    torch.set_num_threads(1)
    pipeline = DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    deblur(
        pipeline, source, output, kernel=KERNEL, batch_size=1, call_kwargs={"num_inference_steps": 20}, progress=False
    )


def test_a_run_that_is_killed_goes_on_and_loses_and_repeats_nothing(prior, tmp_path):
    for i in range(12):
        save_noise(tmp_path / "in" / f"{i:02}.png", i)
    child = multiprocessing.get_context("fork").Process(target=run_slowly, args=(tmp_path / "in", tmp_path / "out"))
    child.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").glob("*.png")}
    assert 3 <= len(before) < 12 and all(read_image(p).size == (20, 18) for p in before)

    options = dict(kernel=KERNEL, batch_size=1, call_kwargs={"num_inference_steps": 20}, progress=False)
    summary = deblur(prior, tmp_path / "in", tmp_path / "out", **options)
    assert (summary["kept"], summary["computed"], summary["images"]) == (len(before), 12 - len(before), 12)
    assert all((p.read_bytes(), p.stat().st_mtime_ns) == kept for p, kept in before.items())
    deblur(prior, tmp_path / "in", tmp_path / "straight", **options)
    again, straight = pictures(tmp_path / "out"), pictures(tmp_path / "straight")
    assert again.keys() == straight.keys() and all(np.array_equal(again[k], straight[k]) for k in again)
    assert deblur(prior, tmp_path / "in", tmp_path / "out", **options)["computed"] == 0


def test_what_has_changed_in_the_source_changes_in_the_copy(prior, folder, tmp_path):
    options = dict(kernel=KERNEL, call_kwargs=FAST, progress=False)
    deblur(prior, folder, tmp_path / "out", **options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    save_noise(folder / "healthy" / "0.png", 77, (24, 18))
    save_image(folder / "diseased" / "3_mask.png", 255, (20, 18))
    (folder / "healthy" / "2.png").rename(folder / "diseased" / "2.png")  # its label was wrong
    (folder / "list.csv").write_text("file,note\nhealthy/0.png,corrected\n")
    summary = deblur(prior, folder, tmp_path / "out", **options)
    assert (summary["computed"], summary["kept"]) == (2, 4)
    deblur(prior, folder, tmp_path / "anew", **options)
    again, anew = pictures(tmp_path / "out"), pictures(tmp_path / "anew")
    assert again.keys() == anew.keys()
    assert all(np.abs(again[name].astype(int) - anew[name]).max() <= 1 for name in again)
    assert (tmp_path / "out" / "list.csv").read_text() == (folder / "list.csv").read_text()
    kept = [p for p, time in before.items() if p.exists() and p.stat().st_mtime_ns == time]
    assert len(kept) == 4
    (folder / "healthy" / "0.png").write_bytes(b"broken")
    assert deblur(prior, folder, tmp_path / "out", **options)["reasons"] == {"broken image": 1}
    assert not (tmp_path / "out" / "healthy" / "0.png").exists()


def test_a_folder_of_other_settings_is_not_gone_on_with(prior, folder, tmp_path):
    deblur(prior, folder, tmp_path / "out", kernel=KERNEL, call_kwargs=FAST, progress=False)
    with pytest.raises(ValueError, match="other settings.*kernel"):
        deblur(prior, folder, tmp_path / "out", kernel=gaussian_kernel(1.0), call_kwargs=FAST, progress=False)
    with pytest.raises(ValueError, match="num_inference_steps"):
        deblur(prior, folder, tmp_path / "out", kernel=KERNEL, call_kwargs={"num_inference_steps": 3}, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kernel": "box"}, ValueError, "motion, linear"),
        ({"image_format": "tif"}, ValueError, "png or jpg"),
        ({"batch_size": 0}, ValueError, "1 or more"),
        ({"source": "nowhere"}, NotADirectoryError, "nowhere"),
    ],
)
def test_impossible_requests_are_refused(prior, folder, tmp_path, change, error, match):
    options = {"source": folder, "kernel": KERNEL, **change}
    with pytest.raises(error, match=match):
        deblur(prior, options.pop("source"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="overwrite its source"):
        deblur(prior, folder, folder, kernel=KERNEL)


def test_a_plan_is_a_measurement_and_a_product(prior, folder):
    seconds, images = measure(prior, folder, kernel=KERNEL, call_kwargs=FAST, sample=3)
    assert seconds > 0 and images == 7
    assert describe_plan(224_316, 2.0) == "224,316 images: 0.5 images/s in 1 process, 5.2 days"
    assert describe_plan(1000, 0.5, 2) == "1,000 images: 4 images/s in 2 processes, 4.2 minutes"
    assert describe_plan(1, 0.5).endswith("0.5 seconds")


def test_the_command_deblurs_and_estimates_the_time(prior, folder, tmp_path, capsys):
    prior.save_pretrained(tmp_path / "prior")
    command = ["deblur", str(folder), str(tmp_path / "out"), "--model", str(tmp_path / "prior"), "--kernel", KERNEL]
    command += ["--num-inference-steps", "2", "--zeta", "0.5"]
    assert main([*command, "--plan", "224316"]) == 0
    assert "224,316 images" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "7 images: 5 computed, 0 already present, 0 skipped" in shown and "images/s" in shown
    assert main(command) == 0 and "0 computed, 7 already present" in capsys.readouterr().out
    assert main([*command[:-1], "0.7"]) == 2 and "zeta" in capsys.readouterr().err
