"""The small copy of a data set: same rows, same anatomy, nothing lost in silence."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from cxr_diffusers.data import load_chexpert, load_folder, load_nih, prepare, read_image
from cxr_diffusers.data.images import equalize, fit_image
from helpers import HEADER, SHARED, chexpert_row, needs_shared, save_image, write_chexpert, write_dicom

NAME = "CheXpert-v1.0-small"


def written(folder):
    """{path: (content, time of writing)} of every image of a copy."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.suffix in (".png", ".jpg")}


def test_the_copy_of_chexpert_gives_the_same_rows_as_its_source(tmp_path):
    source = write_chexpert(tmp_path / "in", NAME)
    summary = prepare(source, tmp_path / "small", size=16, num_workers=1)
    assert (summary["images"], summary["written"], summary["skipped"]) == (48, 48, 0)
    options = {"other": True, "per_class": 2, "seed": 5, "holdout": 0.3, "uncertain": "positive"}
    ours, theirs = load_chexpert(tmp_path / "small", **options), load_chexpert(source, **options)
    for column in ("label", "patient", "view"):
        assert ours[column][:] == theirs[column][:]
    assert {row["image"].size for row in ours} == {(16, 16)}
    assert pd.read_csv(tmp_path / "small" / "train.csv")["Path"][0].startswith("small/train/patient00000")


def test_broken_and_missing_images_are_skipped_counted_and_named(tmp_path):
    source = write_chexpert(tmp_path, NAME)
    broken = source / "train/patient00000/study1/view1_frontal.jpg"
    broken.write_bytes(b"broken")
    (source / "train/patient00001/study1/view1_frontal.jpg").unlink()
    summary = prepare(source, tmp_path / "small", size=16, num_workers=1)
    assert summary["reasons"] == {"missing file": 1, "broken image": 1} and summary["images"] == 46
    skipped = pd.read_csv(tmp_path / "small" / "skipped.csv")
    assert str(broken) in set(skipped["file"]) and "line 4" in skipped["reason"][0]
    paths = pd.read_csv(tmp_path / "small" / "train.csv")["Path"]
    assert len(paths) == 46 and all((tmp_path / path).is_file() for path in paths)
    assert json.loads((tmp_path / "small" / "prepare_summary.json").read_text()) == summary
    assert len(load_chexpert(tmp_path / "small")) == len(load_chexpert(source, check_files=False)) - 2


def test_a_stopped_run_goes_on_and_leaves_finished_images_alone(tmp_path):
    source = write_chexpert(tmp_path, NAME)
    prepare(source, tmp_path / "small", size=16, num_workers=1)
    before = written(tmp_path / "small")
    gone = sorted(before)[::5]
    for path in gone:
        path.unlink()
    summary = prepare(source, tmp_path / "small", size=16, num_workers=1)
    after = written(tmp_path / "small")
    assert (summary["written"], summary["kept"]) == (len(gone), len(before) - len(gone))
    assert all(after[path] == before[path] for path in before if path not in gone)
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    assert not list((tmp_path / "small").rglob("*.tmp"))


def test_other_settings_need_another_folder_or_a_word(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    with pytest.raises(ValueError, match="size: 16, now 32"):
        prepare(tmp_path / "in", tmp_path / "out", size=32)
    assert read_image(tmp_path / "out" / "a.png").size == (16, 16)
    prepare(tmp_path / "in", tmp_path / "out", size=32, overwrite=True)
    assert read_image(tmp_path / "out" / "a.png").size == (32, 32)


@pytest.mark.parametrize("aspect", ["pad", "edge", "crop", "squash"])
def test_boxes_land_on_the_same_anatomy(tmp_path, aspect):
    pixels = np.zeros((60, 100), np.uint8)
    pixels[20:40, 45:65] = 255
    source = tmp_path / NAME / "train/patient00001/study1/view1_frontal.png"
    source.parent.mkdir(parents=True)
    PIL.Image.fromarray(pixels).save(source)
    row = chexpert_row(f"{NAME}/train/patient00001/study1/view1_frontal.png", **{"Pleural Effusion": 1.0})
    pd.DataFrame([row], columns=HEADER).to_csv(tmp_path / NAME / "train.csv", index=False)
    (tmp_path / "boxes.csv").write_text(f"file,label,x,y,w,h,reader\n{row['Path']},Effusion,45,20,20,20,100\n")
    prepare(tmp_path / NAME, tmp_path / "out" / "small", size=48, aspect=aspect)
    prepared = load_chexpert(tmp_path / "out" / "small")[0]
    ys, xs = np.nonzero(np.asarray(prepared["image"]) > 127)
    x, y, w, h = prepared["boxes"][0]
    assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x, y, x + w, y + h], atol=1.01)


def test_a_folder_keeps_its_tree_its_masks_and_its_boxes(tmp_path):
    pixels = np.zeros((40, 80), np.uint8)
    pixels[10:30, 20:40] = 200
    for folder in ("in/diseased", "in/masks/diseased", "in/healthy"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("diseased/a.png", "diseased/b.png", "diseased/b_mask.png", "masks/diseased/a.png"):
        PIL.Image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in/diseased/b.txt").write_text("20 10 20 20\n")
    write_dicom(tmp_path / "in/healthy/1.2.840.7", pixels.astype(np.uint16) * 10, 12)
    (tmp_path / "in/boxes.csv").write_text("file,x,y,w,h\ndiseased/a.png,20,10,20,20\n")
    summary = prepare(tmp_path / "in", tmp_path / "out", size=40)
    assert summary["images"] == 5 and (tmp_path / "out/healthy/1.2.840.7.png").is_file()
    rows = list(load_folder(tmp_path / "out"))
    assert [row["label"] for row in rows] == [1, 1, 0] and rows[2]["image"].mode == "I;16"
    for row in rows[:2]:
        image, mask = np.asarray(row["image"]), np.asarray(row["mask"])
        assert set(np.unique(mask)) == {0, 255}
        assert (mask > 0).sum() == 100 and image[mask > 0].mean() > 190 and image[mask == 0].mean() < 10
        ys, xs = np.nonzero(mask)
        assert row["boxes"] == [[xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]]


def test_nih_keeps_its_tables_and_moves_its_boxes(tmp_path):
    root = tmp_path / "nih"
    save_image(root / "images_001" / "images" / "00000001_000.png", size=(64, 64))
    header = "Image Index,Finding Labels,Patient ID,View Position"
    (root / "Data_Entry_2017.csv").write_text(
        f"{header}\n00000001_000.png,Effusion,1,PA\n00000002_000.png,Effusion,2,PA\n"
    )
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000002_000.png\n")
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Effusion,8,16,24,32,,,\n"
    )
    summary = prepare(root, tmp_path / "out", size=16, image_format="jpg")
    assert summary["reasons"] == {"missing file": 1}
    dataset = load_nih(tmp_path / "out")
    assert dataset["boxes"][:] == [[[2, 4, 6, 8]]] and dataset["patient"][:] == ["nih00001"]
    assert dataset[0]["image"].size == (16, 16)


def test_equalisation_comes_before_the_resize(tmp_path):
    pixels = (np.random.default_rng(0).beta(2, 8, (64, 64)) * 255).astype(np.uint8)
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", size=16, equalize=True)
    expected = fit_image(equalize(PIL.Image.fromarray(pixels)), 16)
    assert np.array_equal(np.asarray(read_image(tmp_path / "out" / "a.png")), np.asarray(expected))


@pytest.mark.parametrize("image_format, mode", [("png", "I;16"), ("jpg", "L")])
def test_16_bit_stay_16_bit_in_png_and_become_8_in_jpg(tmp_path, image_format, mode):
    pixels = np.full((20, 20), 51400, np.uint16)
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", size=16, image_format=image_format)
    image = read_image(tmp_path / "out" / f"a.{image_format}")
    assert image.mode == mode and image.getpixel((5, 5)) == (51400 if mode == "I;16" else 200)


def test_lateral_images_are_copied_unless_frontal_only(tmp_path):
    source = write_chexpert(tmp_path, NAME)
    assert prepare(source, tmp_path / "frontal", size=16, frontal_only=True, num_workers=1)["images"] == 24
    assert not list((tmp_path / "frontal").rglob("*lateral*"))
    table = pd.read_csv(source / "train.csv").drop(columns="Frontal/Lateral")
    table.to_csv(source / "train.csv", index=False)  # the names of the files tell the view
    assert prepare(source, tmp_path / "again", size=16, frontal_only=True, num_workers=1)["images"] == 24


def test_two_files_that_would_become_one_are_refused(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    save_image(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png would both become a.png"):
        prepare(tmp_path / "in", tmp_path / "out")


def test_invalid_arguments_are_refused_before_anything_is_written(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match="overwrite its source"):
        prepare(tmp_path / "in", tmp_path / "in")
    with pytest.raises(ValueError, match="aspect"):
        prepare(tmp_path / "in", tmp_path / "out", aspect="stretch")
    with pytest.raises(NotADirectoryError):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        prepare(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_write_the_same_files_as_one(tmp_path):
    source = write_chexpert(tmp_path, NAME)
    for workers in (1, 2):
        prepare(source, tmp_path / str(workers), size=16, num_workers=workers)
    one, two = ({p.relative_to(tmp_path / w): c for p, (c, _) in written(tmp_path / w).items()} for w in "12")
    assert one == two and len(one) == 48


@needs_shared
def test_real_boxes_scale_with_the_real_images(tmp_path):
    few = tmp_path / NAME
    (few / "train").mkdir(parents=True)
    (few / "valid").symlink_to(SHARED / NAME / "valid")
    boxed = set(pd.read_csv(SHARED / "boxes.csv")["file"])
    table = pd.read_csv(SHARED / NAME / "valid.csv")
    table[table["Path"].isin(boxed)].to_csv(few / "valid.csv", index=False)
    (tmp_path / "boxes.csv").write_text((SHARED / "boxes.csv").read_text())
    prepare(few, tmp_path / "small", size=64, num_workers=1)
    source, copy = (load_chexpert(Path(r), split="valid", other=True) for r in (few, tmp_path / "small"))
    assert list(map(len, copy["boxes"])) == list(map(len, source["boxes"])) and max(map(len, copy["boxes"])) > 0
    for a, b in zip(source, copy, strict=True):
        scale = 64 / max(a["image"].size)
        pad = [(64 - n * scale) / 2 for n in a["image"].size]
        for (x, y, w, h), moved in zip(a["boxes"], b["boxes"], strict=True):
            expected = [x * scale + pad[0], y * scale + pad[1], w * scale, h * scale]
            assert np.allclose(moved, expected, atol=1.0)


def test_fast_jpeg_decodes_less_and_is_another_setting(tmp_path):
    smooth = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10), np.uint8)).resize((640, 512))
    (tmp_path / "in").mkdir()
    smooth.save(tmp_path / "in" / "a.jpg", quality=95)
    assert read_image(tmp_path / "in" / "a.jpg", draft=64).size == (80, 64)
    assert read_image(tmp_path / "in" / "a.jpg", draft=513).size == (640, 512)
    for name, fast in (("exact", False), ("fast", True)):
        prepare(tmp_path / "in", tmp_path / name, size=32, fast_jpeg=fast)
    exact, fast = (np.asarray(read_image(tmp_path / name / "a.png"), float) for name in ("exact", "fast"))
    assert fast.shape == exact.shape and 0 < np.abs(fast - exact).max() and np.abs(fast - exact).mean() < 3
    with pytest.raises(ValueError, match="fast_jpeg: True, now False"):
        prepare(tmp_path / "in", tmp_path / "fast", size=32)


def test_a_copy_made_before_fast_jpeg_existed_is_continued(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    path = tmp_path / "out" / "prepare_settings.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fast_jpeg"}))
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["kept"] == 1


def test_the_benchmark_of_prepare_prints_one_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    spec = importlib.util.spec_from_file_location("prepare_benchmark", "benchmarks/prepare.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--images", "1", "--size", "64", "80", "--rows", "40"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and all(float(line[2]) > 0 for line in lines[2:])
