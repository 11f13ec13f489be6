"""RSNA Pneumonia, SIIM-ACR, ChestX-Det and CheXmask: boxes and masks lie on the pixels that they mark."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cxr_diffusers import (
    build_dataset,
    load_chestx_det,
    load_chexmask,
    load_packed,
    load_rsna,
    load_siim,
    prepare,
    publish_dataset,
)
from cxr_diffusers.data import open_dataset
from cxr_diffusers.data.packing import pack
from cxr_diffusers.data.run_lengths import decode_runs, mask_image
from helpers import chexpert_row, save_image, write_dicom

ROOT = Path(__file__).parent.parent


def letter(height, width):
    """(height, width) booleans: a region that equals none of its mirror images, nor its transpose."""
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 8 : width // 2] = True
    mask[height // 2 : 3 * height // 4, width // 8 : width // 4] = True
    return mask


def runs_of(pixels, first, relative):
    """The run lengths of a list of booleans, counted one pixel after the other."""
    numbers, end, start = [], 0, None
    for i, inside in enumerate([*pixels, False]):
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            numbers += [start - end if relative else start + first, i - start]
            start, end = None, i
    return " ".join(map(str, numbers))


def by_name(dataset, column):
    return {Path(row["path"]).stem: row[column] for row in dataset}


# run lengths


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("first", "relative"), [(0, True), (0, False), (1, False)])
def test_run_lengths_give_back_the_mask_they_were_made_of(order, first, relative):
    mask = letter(12, 20)
    mask[-1, -1] = mask[0, 0] = True
    text = runs_of(mask.ravel(order), first, relative)
    decoded = decode_runs(text, 12, 20, where="x", order=order, first=first, relative=relative)
    np.testing.assert_array_equal(decoded, mask)
    assert not decode_runs(" -1", 12, 20, where="x").any() and not decode_runs("", 12, 20, where="x").any()


@pytest.mark.parametrize(
    "text", ["3", "1 2 3", "a b", "-5 2", "0 241", "240 1", "99999999999999999999 1", "9223372036854775807 9", "1 2.5"]
)
def test_wrong_run_lengths_are_refused_with_their_place(text):
    with pytest.raises(ValueError, match="t.csv, line 3: "):
        decode_runs(text, 12, 20, where="t.csv, line 3")


def test_a_mask_is_resized_to_its_image_but_not_to_another_shape():
    image = mask_image(letter(16, 32), (16, 8), "x")
    np.testing.assert_array_equal(np.asarray(image) > 0, letter(8, 16))
    with pytest.raises(ValueError, match="x: expected an image of the shape of its mask"):
        mask_image(letter(16, 32), (32, 32), "x")


# RSNA Pneumonia

SIDE = 64  # of the images here; the download's have 1024, in which boxes count
OPACITIES = {"op-1": [(160, 96, 320, 480), (640, 400, 160, 240)], "op-2": [(32, 800, 96, 64)]}  # x, y, width, height
CLASSES = {
    "op-1": "Lung Opacity",
    "op-2": "Lung Opacity",
    "well-1": "Normal",
    "well-2": "Normal",
    "ill": "No Lung Opacity / Not Normal",
}
NIH = {
    "op-1": "00000005_000.png",
    "op-2": "00000007_003.png",
    "well-1": "00000005_001.png",
    "well-2": "00000008_000.png",
    "ill": "00000009_000.png",
}


@pytest.fixture
def rsna(tmp_path):
    root = tmp_path / "rsna-pneumonia-detection-challenge"
    (root / "stage_2_train_images").mkdir(parents=True)
    labels, details = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for name, label in CLASSES.items():
        pixels = np.full((SIDE, SIDE), 20, np.uint8)
        for x, y, w, h in OPACITIES.get(name, []):
            pixels[y // 16 : (y + h) // 16, x // 16 : (x + w) // 16] = 200
            labels.append(f"{name},{x}.0,{y}.0,{w}.0,{h}.0,1")
            details.append(f"{name},{label}")
        if name not in OPACITIES:
            labels.append(f"{name},,,,,0")
            details.append(f"{name},{label}")
        view = "AP" if name in ("op-1", "ill") else "PA"
        write_dicom(root / "stage_2_train_images" / f"{name}.dcm", pixels, 8, PatientID=name, ViewPosition=view)
    (root / "stage_2_train_labels.csv").write_text("\n".join(labels) + "\n")
    (root / "stage_2_detailed_class_info.csv").write_text("\n".join(details) + "\n")
    return root


def test_rsna_boxes_lie_on_the_opacities_and_several_rows_are_one_image(rsna):
    dataset = load_rsna(rsna)
    assert by_name(dataset, "label") == {"op-1": 1, "op-2": 1, "well-1": 0, "well-2": 0}
    assert dataset.features["label"].names == ["healthy", "lung opacity"]
    assert by_name(dataset, "view") == {"op-1": "AP", "op-2": "PA", "well-1": "PA", "well-2": "PA"}
    for row in dataset:
        inside = np.zeros((SIDE, SIDE), bool)
        for x, y, w, h in row["boxes"]:
            assert (x, y, w, h) == tuple(map(int, (x, y, w, h)))
            inside[int(y) : int(y + h), int(x) : int(x + w)] = True
        np.testing.assert_array_equal(inside, np.asarray(row["image"]) > 100, err_msg=row["path"])
    assert len(by_name(dataset, "boxes")["op-1"]) == 2
    others = load_rsna(rsna, other=True)
    assert by_name(others, "label")["ill"] == 2 and others.features["label"].names[-1] == "other finding"
    assert set(by_name(load_rsna(rsna, views=["PA"]), "label")) == {"op-2", "well-1", "well-2"}


def test_rsna_boxes_of_a_full_size_image_are_the_rows(rsna):
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024)).astype(np.uint8)
    write_dicom(rsna / "stage_2_train_images" / "op-2.dcm", pixels, 8)
    assert by_name(load_rsna(rsna), "boxes")["op-2"] == [list(OPACITIES["op-2"][0])]


def test_rsna_patients_are_those_of_the_nih_images_where_the_mapping_is_there(rsna):
    assert by_name(load_rsna(rsna), "patient")["op-1"] == "op-1", "without the mapping an image is its own patient"
    entries = [{"subset_img_id": name, "img_id": image, "orig_labels": []} for name, image in NIH.items()]
    mapping = rsna / "pneumonia-challenge-dataset-mappings_2018.json"
    mapping.write_text(json.dumps(entries))
    patients = by_name(load_rsna(rsna), "patient")
    assert patients == {"op-1": "nih00005", "op-2": "nih00007", "well-1": "nih00005", "well-2": "nih00008"}
    for seed in range(4):
        sides = [rsna_patients(rsna, part=part, holdout=0.5, holdout_seed=seed) for part in ("train", "holdout")]
        assert not set(sides[0]) & set(sides[1]) and sorted(sides[0] + sides[1]) == sorted(patients.values())
    mapping.rename(rsna.parent / "elsewhere.json")
    assert by_name(load_rsna(rsna, mapping=rsna.parent / "elsewhere.json"), "patient") == patients
    (rsna.parent / "elsewhere.json").write_text(json.dumps(entries[1:]))
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: image 'op-1' is not in .*elsewhere\.json"):
        load_rsna(rsna, mapping=rsna.parent / "elsewhere.json")
    (rsna.parent / "elsewhere.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="a list of objects with subset_img_id"):
        load_rsna(rsna, mapping=rsna.parent / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_rsna(rsna, mapping="nowhere.json")


def rsna_patients(root, **options):
    """Patient of each row; [] where the holdout leaves none."""
    try:
        return load_rsna(root, **options)["patient"][:]
    except ValueError as error:
        assert "the data set is empty" in str(error)
        return []


def test_rsna_images_are_decoded_on_access_and_missing_ones_are_named(rsna):
    dataset = load_rsna(rsna)
    gone = rsna / "stage_2_train_images" / "well-1.dcm"
    gone.unlink()
    assert len(dataset["label"][:]) == 4
    with pytest.raises(FileNotFoundError, match=r"well-1\.dcm"):
        dataset[2]["image"]
    for options in ({}, {"views": ["PA"]}):
        with pytest.raises(FileNotFoundError, match=r"stage_2_train_labels\.csv, line 5: no image .*well-1\.dcm"):
            load_rsna(rsna, **options)
        assert "well-1" not in by_name(load_rsna(rsna, skip_missing=True, **options), "label")


@pytest.mark.parametrize(
    ("table", "old", "new", "match"),
    [
        ("train_labels", "patientId", "patient", "expected column 'patientId'"),
        ("train_labels", "480.0,1", "480.0,2", "line 2: expected 0 or 1 in column 'Target', got '2'"),
        ("train_labels", "240.0,1", "240.0,0", "line 3: expected the Target of the image's other rows"),
        ("train_labels", "well-1,,,,,0", "well-1,,,,,1", "line 5: expected a box where Target is 1"),
        ("train_labels", "well-1,,,,,0", "well-1,1,1,5,5,0", "line 5: expected a box where Target is 1"),
        ("train_labels", "160.0,96.0", "nan,96.0", r"line 2: expected a box"),
        ("train_labels", "160.0,96.0", "900,96.0", r"line 2: the box .* reaches beyond its image"),
        ("train_labels", "op-2", "../op-2", "line 4: expected a path inside"),
        ("train_labels", "op-2", "new", "line 4: image 'new' has no row"),
        ("detailed_class_info", "well-1,Normal", "well-1,Norma", "line 5: expected Normal, Lung Opacity or"),
        (
            "detailed_class_info",
            "well-1,Normal",
            "well-1,Lung Opacity",
            "Target 0 contradicts the class 'Lung Opacity'",
        ),
        ("detailed_class_info", "op-1,Lung Opacity", "op-1,Normal", "line 3: expected one class an image"),
    ],
)
def test_rsna_a_wrong_cell_names_its_row(rsna, table, old, new, match):
    path = rsna / f"stage_2_{table}.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=match):
        load_rsna(rsna)


def test_rsna_small_copies_keep_labels_views_and_boxes(rsna, tmp_path):
    pack(load_rsna(rsna), tmp_path / "rsna.parquet", size=32)
    packed = load_packed(tmp_path / "rsna.parquet")
    assert by_name(packed, "label") == by_name(load_rsna(rsna), "label")
    assert by_name(packed, "view") == by_name(load_rsna(rsna), "view") and packed[0]["image"].size == (32, 32)
    prepare(rsna, tmp_path / "small", size=32, num_workers=1)
    for table in rsna.glob("*.csv"):
        shutil.copy(table, tmp_path / "small")
    boxes = by_name(load_rsna(tmp_path / "small"), "boxes")
    assert boxes["op-1"] == [[x / 32, y / 32, w / 32, h / 32] for x, y, w, h in OPACITIES["op-1"]]


def test_dicom_files_are_not_uploaded_as_they_are(rsna):
    with pytest.raises(ValueError, match="image"):
        publish_dataset(load_rsna(rsna), "me/rsna", license="other", private=True)


def test_rsna_missing_tables_are_named(rsna):
    (rsna / "stage_2_detailed_class_info.csv").unlink()
    with pytest.raises(FileNotFoundError, match="stage_2_detailed_class_info.csv"):
        load_rsna(rsna)
    with pytest.raises(ValueError, match="unknown key 'split'"):
        build_dataset("rsna", root=rsna, split="train")


# SIIM-ACR Pneumothorax

PNEUMOTHORAX = "1.2.276.0.7230010.3.1.4.8323329.{}.1517875252.443873"


@pytest.fixture
def siim(tmp_path):
    root = tmp_path / "siim"
    rows = ["ImageId, EncodedPixels"]
    for i in range(4):
        name = PNEUMOTHORAX.format(i)
        folder = root / "dicom-images-train" / name.replace(".1.4.", ".1.2.") / name.replace(".1.4.", ".1.3.")
        folder.mkdir(parents=True)
        pixels = np.full((1024, 1024), 30 + i, np.uint8)
        if i < 2:
            pixels[letter(1024, 1024)] = 220
        pixels[0, 0] = 0
        write_dicom(folder / f"{name}.dcm", pixels, 8, PatientID=f"patient-{i // 2}", ViewPosition="PA" if i else "AP")
    top, bottom = letter(1024, 1024), letter(1024, 1024)
    top[512:], bottom[:512] = False, False
    for mask in (top, bottom):  # two rows of one image
        rows.append(f"{PNEUMOTHORAX.format(0)}, {relative_columns(mask)}")
    rows.append(f"{PNEUMOTHORAX.format(1)}, {relative_columns(letter(1024, 1024))}")
    rows.append(f"{PNEUMOTHORAX.format(2)}, -1")
    (root / "train-rle.csv").write_text("\n".join(rows) + "\n")  # the fourth image has no row
    return root


def relative_columns(mask):
    return runs_of(mask.T.ravel().tolist(), 0, relative=True)


def test_siim_masks_lie_on_the_pneumothoraces_and_rows_are_united(siim):
    dataset = load_siim(siim)
    assert dataset["label"][:] == [1, 1, 0]
    assert dataset.features["label"].names == ["no pneumothorax", "pneumothorax"], "class 0 need not be healthy"
    assert dataset["patient"][:] == ["patient-0", "patient-0", "patient-1"] and dataset["view"][:] == ["AP", "PA", "PA"]
    for row in list(dataset)[:2]:
        np.testing.assert_array_equal(np.asarray(row["mask"]) > 0, np.asarray(row["image"]) > 100)
    assert dataset[2]["mask"] is None
    assert load_siim(siim, views=["PA"])["label"][:] == [1, 0]
    options = dict(holdout=0.5, holdout_seed=1)
    aside, rest = load_siim(siim, part="holdout", **options), load_siim(siim, **options)
    assert {len(aside), len(rest)} == {1, 2} and not set(aside["patient"]) & set(rest["patient"])


def test_siim_copies_of_another_size_get_smaller_masks(siim, tmp_path):
    root = tmp_path / "small"
    (root / "images").mkdir(parents=True)
    for path in siim.rglob("*.dcm"):
        PIL.Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "images" / f"{path.stem}.png")
    (root / "stage_2_train.csv").write_bytes((siim / "train-rle.csv").read_bytes())
    dataset = load_siim(root)
    np.testing.assert_array_equal(np.asarray(dataset[0]["mask"]) > 0, letter(64, 64))
    assert dataset["patient"][0] == PNEUMOTHORAX.format(0)


def test_siim_what_is_missing_or_wrong_is_named(siim, tmp_path):
    with pytest.raises(FileNotFoundError, match="train-rle.csv or stage_2_train.csv"):
        load_siim(tmp_path)
    [image] = siim.rglob(f"{PNEUMOTHORAX.format(1)}.dcm")
    whole = image.read_bytes()
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-rle\.csv, line 4: no image .*329\.1\."):
        load_siim(siim)
    assert load_siim(siim, skip_missing=True)["label"][:] == [1, 0]
    image.write_bytes(whole)
    table = siim / "train-rle.csv"
    text = table.read_text()
    for old, new, match in [
        (" EncodedPixels", " Pixels", "expected column 'EncodedPixels'"),
        (" -1", " 5", "line 5: expected run lengths as pairs"),
        (" -1", " 1048570 9", "line 5: its run lengths do not fit a mask of 1024 x 1024"),
        (f"{PNEUMOTHORAX.format(2)}, -1", f"{PNEUMOTHORAX.format(1)}, -1", "line 5: expected a mask in all rows"),
        (f"{PNEUMOTHORAX.format(2)}, -1", "a/b, -1", "line 5: expected the name of an image"),
    ]:
        assert old in text
        table.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=match):
            load_siim(siim)


# ChestX-Det


def polygon_of(x, y):
    """The outline of an L of 1024 px, its corner at (x, y): 300 high, 200 wide, 100 thick."""
    return [[x, y], [x + 99, y], [x + 99, y + 199], [x + 199, y + 199], [x + 199, y + 299], [x, y + 299]]


def inside_of(x, y):
    mask = np.zeros((1024, 1024), bool)
    mask[y : y + 300, x : x + 100] = True
    mask[y + 199 : y + 300, x : x + 200] = True
    return mask


PLACES = {
    "36302.png": {"Effusion": (100, 600), "Nodule": (700, 150)},
    "36346.png": {"Mass": (400, 40)},
    "36199.png": {},
}


@pytest.fixture
def chestx_det(tmp_path):
    root = tmp_path / "ChestX-Det"
    (root / "train_data").mkdir(parents=True)
    entries = []
    for name, findings in PLACES.items():
        pixels = np.full((1024, 1024), 10, np.uint8)
        for place in findings.values():
            pixels[inside_of(*place)] = 200
        pixels[0, 0] = 0
        PIL.Image.fromarray(pixels).save(root / "train_data" / name)
        boxes = [[x, y, x + 200, y + 300] for x, y in findings.values()]
        polygons = [polygon_of(*place) for place in findings.values()]
        entries.append({"file_name": name, "syms": list(findings), "boxes": boxes, "polygons": polygons})
    (root / "ChestX_Det_train.json").write_text(json.dumps(entries))
    return root


def test_chestx_det_masks_and_boxes_lie_on_the_findings(chestx_det):
    dataset = load_chestx_det(chestx_det)
    assert by_name(dataset, "label") == {"36302": 1, "36346": 1, "36199": 0}
    assert dataset.features["label"].names == ["healthy", "abnormal"] and dataset["patient"][0] == "36302"
    for row in dataset:
        marked = np.zeros((1024, 1024), bool) if row["mask"] is None else np.asarray(row["mask"]) > 0
        np.testing.assert_array_equal(marked, np.asarray(row["image"]) > 100)
    assert by_name(dataset, "boxes")["36302"] == [[100, 600, 200, 300], [700, 150, 200, 300]]
    assert by_name(dataset, "boxes")["36199"] == []


def test_chestx_det_regions_are_those_of_the_named_findings(chestx_det):
    dataset = load_chestx_det(chestx_det, classes=["nodule", "Pleural Effusion"], other=True)
    assert by_name(dataset, "label") == {"36302": 1, "36346": 3, "36199": 0}
    assert dataset.features["label"].names == ["healthy", "nodule", "pleural effusion", "other finding"]
    only = load_chestx_det(chestx_det, classes=["Nodule"])
    assert by_name(only, "label") == {"36302": 1, "36199": 0}
    np.testing.assert_array_equal(np.asarray(only[0]["mask"]) > 0, inside_of(*PLACES["36302.png"]["Nodule"]))
    assert by_name(only, "boxes")["36302"] == [[700, 150, 200, 300]]


def test_chestx_det_smaller_copies_get_smaller_regions(chestx_det):
    for path in (chestx_det / "train_data").glob("*.png"):
        PIL.Image.open(path).resize((256, 256)).save(path)
    row = load_chestx_det(chestx_det)[0]
    assert row["boxes"] == [[25, 150, 50, 75], [175, 37.5, 50, 75]]
    expected = inside_of(100, 600) | inside_of(700, 150)
    assert (np.asarray(row["mask"]) > 0).mean() == pytest.approx(expected.mean(), rel=0.05)
    assert ((np.asarray(row["mask"]) > 0) & expected[::4, ::4]).sum() > 0.98 * expected[::4, ::4].sum()


def test_chestx_det_what_is_missing_is_named(chestx_det):
    with pytest.raises(FileNotFoundError, match="ChestX_Det_test.json"):
        load_chestx_det(chestx_det, split="test")
    with pytest.raises(ValueError, match="train or test, got 'valid'"):
        load_chestx_det(chestx_det, split="valid")
    with pytest.raises(ValueError, match="unknown class 'Edema'.*Pneumothorax"):
        load_chestx_det(chestx_det, classes=["Edema"])
    with pytest.raises(ValueError, match="expected `classes` beside `other`, got none"):
        load_chestx_det(chestx_det, other=True)
    (chestx_det / "train_data").rename(chestx_det / "train")
    assert len(load_chestx_det(chestx_det)) == 3
    (chestx_det / "train" / "36346.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ChestX_Det_train\.json, entry 2: no image .*36346\.png"):
        load_chestx_det(chestx_det)
    assert len(load_chestx_det(chestx_det, skip_missing=True)) == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"syms": ["Effusion"]}, "expected a box x1, y1, x2, y2 and a polygon for each of 1 findings"),
        ({"syms": ["Effusion", "Edema"]}, "unknown class 'Edema'"),
        ({"boxes": [[1, 2, 3], [1, 2, 3, 4]]}, "expected a box x1, y1, x2, y2"),
        ({"boxes": [[9, 2, 3, 4], [1, 2, 3, 4]]}, "expected a box x, y, w, h"),
        ({"boxes": [[900, 2, 1300, 40], [1, 2, 3, 4]]}, "reaches beyond its image"),
        ({"polygons": [[[1, 2, 3]], []]}, r"polygons \[\[x, y\]"),
        ({"polygons": [[[1, float("nan")]], []]}, "finite"),
        ({"boxes": 3}, "expected file_name, syms"),
        ({"file_name": "../36302.png"}, "expected a path inside"),
        ({"file_name": "36346.png"}, "expected one entry an image"),
    ],
)
def test_chestx_det_a_wrong_entry_is_named(chestx_det, change, match):
    path = chestx_det / "ChestX_Det_train.json"
    entries = json.loads(path.read_text())
    entries[0] |= change
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"entry [12].*{match}"):
        load_chestx_det(chestx_det)
    for text in ("{}", "[1, 2", "[[]]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"train\.json"):
            load_chestx_det(chestx_det)


# CheXmask

NIH_TABLE = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
HEADER = "Image Index,Dice RCA (Max),Dice RCA (Mean),Landmarks,Left Lung,Right Lung,Heart,Height,Width"


def organs(height, width):
    """{organ: (height, width) booleans}: the right lung is on the left of the image, and shorter."""
    masks = {name: np.zeros((height, width), bool) for name in ("Right Lung", "Left Lung", "Heart")}
    masks["Right Lung"][height // 8 : 5 * height // 8, width // 8 : 3 * width // 8] = True
    masks["Left Lung"][height // 8 : 7 * height // 8, 5 * width // 8 : 7 * width // 8] = True
    masks["Heart"][5 * height // 8 : 7 * height // 8, width // 2 : 6 * width // 8] = True
    return masks


def write_chexmask(path, rows, header=HEADER):
    lines = [header]
    for name, quality, height, width in rows:
        runs = {organ: runs_of(mask.ravel().tolist(), 1, False) for organ, mask in organs(height, width).items()}
        cells = [name, quality, quality, '"[[1, 2], [3, 4]]"', runs["Left Lung"], runs["Right Lung"], runs["Heart"]]
        lines.append(",".join(map(str, [*cells, height, width])))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def nih(tmp_path):
    """Four images, 128 px, of ChestX-ray14 in its own layout, and CheXmask's table beside it."""
    root = tmp_path / "nih"
    (root / "images_001" / "images").mkdir(parents=True)
    lines = [NIH_TABLE]
    for i in range(4):
        masks, pixels = organs(128, 128), np.full((128, 128), 150 + i, np.uint8)
        pixels[masks["Right Lung"] | masks["Left Lung"]] = 40
        PIL.Image.fromarray(pixels).save(root / "images_001" / "images" / f"0000000{i}_000.png")
        lines.append(f"0000000{i}_000.png,{'No Finding' if i % 2 else 'Effusion'},0,{i},50,F,PA")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    names = [f"0000000{i}_000.png" for i in range(3)]
    rows = [(name, quality, 128, 128) for name, quality in zip(names, (0.9, 0.8, 0.6), strict=True)]
    write_chexmask(tmp_path / "ChestX-Ray8.csv", [("99999999_000.png", 0.9, 64, 64), *rows])
    return root


def images_of(root):
    return {"name": "nih", "root": str(root), "split": "all"}


def test_chexmask_masks_lie_on_the_lungs_of_the_images_they_are_joined_to(nih, tmp_path):
    dataset = load_chexmask(tmp_path / "ChestX-Ray8.csv", images_of(nih))
    assert [Path(path).name for path in dataset["path"]] == ["00000000_000.png", "00000001_000.png"], "0.6 is too low"
    assert dataset["label"][:] == [1, 0] and dataset["view"][:] == ["PA", "PA"]
    for row in dataset:
        np.testing.assert_array_equal(np.asarray(row["mask"]) > 0, np.asarray(row["image"]) < 100)
    assert len(load_chexmask(tmp_path / "ChestX-Ray8.csv", images_of(nih), min_quality=0)) == 3
    heart = load_chexmask(tmp_path / "ChestX-Ray8.csv", images_of(nih), organs=["Heart"])
    np.testing.assert_array_equal(np.asarray(heart[1]["mask"]) > 0, organs(128, 128)["Heart"])
    line = f"chexmask:csv={tmp_path / 'ChestX-Ray8.csv'},images={{name: nih, root: {nih}, split: all, classes: []}}"
    assert open_dataset(line)["label"][:] == [0]


def test_chexmask_images_may_be_smaller_than_their_masks_but_not_of_another_shape(nih, tmp_path):
    table = write_chexmask(tmp_path / "t.csv", [("00000000_000.png", 0.9, 256, 256)])
    [row] = load_chexmask(table, images_of(nih))
    np.testing.assert_array_equal(np.asarray(row["mask"]) > 0, np.asarray(row["image"]) < 100)
    write_chexmask(table, [("00000000_000.png", 0.9, 256, 128)])
    with pytest.raises(ValueError, match=r"t\.csv, line 2: expected an image of the shape of its mask"):
        load_chexmask(table, images_of(nih))


def test_chexmask_joins_chexpert_by_patient_study_and_view(tmp_path):
    root = tmp_path / "CheXpert-v1.0-small"
    path = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    save_image(tmp_path / path, size=(16, 16))
    row = chexpert_row(path, **{"No Finding": 1.0})
    (root / "train.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    header = HEADER.replace("Image Index", "Path")
    names = [path, "CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg"]
    table = write_chexmask(tmp_path / "CheXpert.csv", [(name, 0.9, 64, 64) for name in names], header)
    [joined] = load_chexmask(table, {"name": "chexpert", "root": str(root)})
    np.testing.assert_array_equal(np.asarray(joined["mask"])[:, :6] > 0, organs(16, 16)["Right Lung"][:, :6])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"organs": ["Lung"]}, ValueError, "Right Lung, Left Lung, Heart, got"),
        ({"organs": "Heart"}, ValueError, "a list"),
        ({"images": "nih"}, ValueError, "expected `images` a data set"),
        ({"images": {"name": "nhi"}}, ValueError, "unknown data set 'nhi'"),
        ({"csv": "nowhere.csv"}, FileNotFoundError, r"nowhere\.csv"),
        ({"min_quality": 0.95}, ValueError, r"no mask of quality 0\.95 or more"),
    ],
)
def test_chexmask_wrong_options_are_refused(nih, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        load_chexmask(**{"csv": tmp_path / "ChestX-Ray8.csv", "images": images_of(nih), **options})


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("Image Index", "Image", "expected column 'Image Index'"),
        ("Right Lung", "Right", "expected column 'Right Lung'"),
        ("0.9,0.9", "0.9,good", r"line 3: expected a number in column 'Dice RCA \(Mean\)'"),
        ("128,128\n00000001", "128,-128\n00000001", "line 3: columns Height and Width: expected 1 to"),
        ("128,128\n00000001", "128,\n00000001", "line 3: columns Height and Width"),
        ("128,128\n00000001", "64,64\n00000001", "line 3: its run lengths do not fit a mask of 64 x 64"),
        ("\n00000001", "\n00000000", "line 4: expected one row an image"),
    ],
)
def test_chexmask_a_wrong_cell_names_its_row(nih, tmp_path, old, new, match):
    path = tmp_path / "ChestX-Ray8.csv"
    text = path.read_text().replace("99999999_000.png,0.9,0.9", "99999999_000.png,1,1")
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=match):
        load_chexmask(path, images_of(nih))


def test_the_lung_segmenter_trains_on_chexmask(nih, tmp_path):
    path = ROOT / "training" / "train_lung_segmenter.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    data = ["data.name=chexmask", f"data.csv={tmp_path / 'ChestX-Ray8.csv'}"]
    data += [f"data.images={{name: nih, root: {nih}, split: all}}"]
    small = ["segmenter.sample_size=32", "segmenter.block_out_channels=[4, 8]", "train.batch_size=2"]
    small += ["train.max_steps=1", "train.lr_warmup_steps=0", f"train.output_dir={tmp_path / 'run'}"]
    program.main([*data, *small])
    [line] = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 <= line["dice"] <= 1
