"""Tables, boxes and masks that are wrong or belong to nothing: an error that names the row, never a loss in silence."""

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from cxr_diffusers.data import (
    load_brats,
    load_chexpert,
    load_folder,
    load_hub,
    load_nih,
    load_table,
    load_vindr,
    prepare,
    read_image,
)
from cxr_diffusers.data.boxes import check_box, image_size, parse_boxes, to_pixels
from cxr_diffusers.data.chexpert import label_rows as label_chexpert
from cxr_diffusers.data.nih import label_rows as label_nih
from cxr_diffusers.data.rows import rows_with_region
from cxr_diffusers.data.tables import numbers, path_of, read_csv
from cxr_diffusers.data.vindr import label_images as label_vindr
from helpers import HEADER, chexpert_row, save_image, write_chexpert

NAME = "CheXpert-v1.0-small"
BAD_BOXES = [
    "nan,1,2,3",
    "inf,1,2,3",
    "1,-inf,2,3",
    "-1,1,2,3",
    "1,1,0,3",
    "1,1,2,-3",
    "1,1,,3",
    "1,1,x,3",
    "1,1,1e50,3",
]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_a_box_has_four_finite_numbers_and_an_area(box):
    for bad in (box.split(","), box.split(",")[:3], [*box.split(","), 1]):
        with pytest.raises(ValueError, match=r"t\.csv, line 7: expected a box x, y, w, h"):
            check_box(bad, "t.csv, line 7")
    assert check_box(["1", 0, 2.5, "3e1"], "") == [1, 0, 2.5, 30]


def test_boxes_are_scaled_to_the_image_or_refused():
    assert to_pixels([600, 500, 300, 300], (1024, 1024), (512, 512), "a.png", "row") == [300, 250, 150, 150]
    assert to_pixels([600, 500, 300, 300], None, (1024, 1024), "a.png", "row") == [600, 500, 300, 300]
    with pytest.raises(ValueError, match=r"row: the box .* reaches beyond its image a\.png of 512 x 512"):
        to_pixels([100, 500, 300, 300], None, (512, 512), "a.png", "row")
    with pytest.raises(ValueError, match=r"row: .* do not fit a\.png of 512 x 400: it has another shape"):
        to_pixels([1, 1, 3, 3], (1024, 1024), (512, 400), "a.png", "row")


def test_the_size_of_an_image_is_read_as_it_will_be_shown(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    PIL.Image.new("L", (12, 10)).save(tmp_path / "a.jpg", exif=exif)
    np.save(tmp_path / "a.npy", np.zeros((5, 7), np.uint8))
    assert image_size(tmp_path / "a.jpg") == (10, 12) and image_size(tmp_path / "a.npy") == (7, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_the_size_of_a_turned_image_is_that_of_its_pixels(tmp_path, suffix, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    PIL.Image.new("L", (12, 10)).save(path, exif=exif)
    assert image_size(path) == read_image(path).size == ((10, 12) if orientation > 4 else (12, 10))


def test_boxes_of_a_turned_tiff_are_copied_to_the_same_anatomy(tmp_path):
    pixels = np.zeros((40, 80), np.uint8)
    pixels[20:30, 60:80] = 200  # shown on its side: 40 wide, 80 high
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "in" / "a.tif", exif=exif)
    (tmp_path / "in" / "a.txt").write_text("10 60 10 20\n")
    prepare(tmp_path / "in", tmp_path / "out", size=80, num_workers=1)
    row = load_folder(tmp_path / "out")[0]
    ys, xs = np.nonzero(np.asarray(row["image"]))
    assert row["boxes"] == [[xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]]


@pytest.mark.parametrize(
    "content, match",
    [
        ("", "expected column 'file', got none"),
        ("a,b\n1,2\n", "expected column 'file', got a, b"),
        ("file,x\na,1,2\n", r"t\.csv, line 2: expected 2 cells, got 3"),
        ('file,x\n"a,1\nb,2\n', r"t\.csv, line \d: unexpected end of data"),
        ("file,x\na,1\n\n\udcff,2\n", r"t\.csv, line 4: expected names and texts in UTF-8"),
        ("file,\udcff\na,1\n", r"t\.csv: expected names and texts in UTF-8"),
        ("file,x\na,1\n\nb,two\n", r"t\.csv, line 4: expected a number in column 'x', got 'two'"),
    ],
)
def test_a_damaged_csv_is_refused_with_the_line(tmp_path, content, match):
    (tmp_path / "t.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=match):
        numbers(read_csv(tmp_path / "t.csv", ["file"]), "x", tmp_path / "t.csv")


def test_a_table_keeps_its_lines_and_blank_cells(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbffile, x,\n\na,1\n\n"b\nc",,,\nd.png,3,\n ,,\n')
    table = read_csv(tmp_path / "t.csv")
    assert table.index.tolist() == [3, 5, 7] and table.columns.tolist() == ["file", "x", "Unnamed: 2"]
    assert table["file"].tolist() == ["a", "b\nc", "d.png"] and np.isnan(numbers(table, "x", "t")[5])


@pytest.mark.parametrize(
    "cell", ["", "  ", ".", "..", "../a.png", "a/../../b.png", "a\\..\\..\\b.png", "/etc/a.png", "a\0.png"]
)
def test_a_cell_that_names_no_file_inside_is_refused(cell):
    with pytest.raises(ValueError, match="t.csv, line 2: expected"):
        path_of(cell, "t.csv, line 2")


# identities


def test_files_of_one_name_are_different_patients(tmp_path):
    for folder in ("healthy", "diseased"):
        for name in ("0000.png", "0001.png", "1.2.840.7", "1.2.840.8"):
            save_image((tmp_path / folder / name).with_name(name + ".png" * (not name.endswith("png"))))
    assert len(set(load_folder(tmp_path)["patient"])) == 8
    rows = [f"{folder}/{name},{folder}" for folder in ("healthy", "diseased") for name in ("0000.png", "0001.png")]
    (tmp_path / "t.csv").write_text("file,label\n" + "\n".join(rows))
    patients = load_table(tmp_path / "t.csv")["patient"][:]
    assert patients == ["healthy/0000", "healthy/0001", "diseased/0000", "diseased/0001"]
    (tmp_path / "t.csv").write_text("file,label,who\n" + "\n".join(f"{row}," for row in rows))
    assert load_table(tmp_path / "t.csv", patient="who")["patient"][:] == patients


def test_chexpert_rows_without_a_number_are_different_patients(tmp_path):
    rows = [chexpert_row(f"{NAME}/train/p{i}/view1_frontal.jpg", **{"No Finding": 1.0}) for i in range(6)]
    for row in rows:
        save_image(tmp_path / row["Path"])
    pd.DataFrame(rows, columns=HEADER).to_csv(tmp_path / NAME / "train.csv", index=False)
    assert len(load_chexpert(tmp_path / NAME, one_per_patient=True)) == 6
    parts = [load_chexpert(tmp_path / NAME, holdout=0.5, part=part) for part in ("train", "holdout")]
    assert [len(part) for part in parts] != [0, 6] and sum(map(len, parts)) == 6


def test_slices_of_one_name_are_different_patients(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for parent in "ab":
        for sequence in ("t1", "t1ce", "t2", "flair"):
            path = tmp_path / parent / "0" / f"{sequence}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4), np.float32), np.eye(4)), path)
    assert load_brats(tmp_path)["patient"][:] == ["a/0", "b/0"]


# folders


@pytest.fixture
def folder(tmp_path):
    for name in ("diseased/d0.png", "diseased/d1.png", "healthy/h0.png"):
        save_image(tmp_path / "in" / name, size=(40, 30))
    return tmp_path / "in"


def opened(folder, output):
    """By the loader and by way of a copy of the same size."""
    prepare(folder, output, size=40, num_workers=1)
    return load_folder(folder), load_folder(output)


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_boxes_are_found_with_either_slash(folder, tmp_path, slash):
    (folder / "boxes.csv").write_text(f"file,x,y,w,h\ndiseased{slash}d0.png,1,2,3,4\n")
    loaded, copied = opened(folder, tmp_path / "out")
    assert loaded["boxes"][:] == [[[1, 2, 3, 4]], [], []] and copied["boxes"][:] == [[[1, 7, 3, 4]], [], []]


def test_boxes_of_an_image_of_another_size_are_scaled(folder, tmp_path):
    (folder / "boxes.csv").write_text("file,x,y,w,h,image_w,image_h\ndiseased/d0.png,100,20,200,100,400,300\n")
    loaded, copied = opened(folder, tmp_path / "out")
    assert loaded["boxes"][:] == [[[10, 2, 20, 10]], [], []] and copied["boxes"][:] == [[[10, 7, 20, 10]], [], []]
    (folder / "boxes.csv").write_text("file,x,y,w,h,image_w,image_height\ndiseased/d0.png,10,2,20,10,400,300\n")
    with pytest.raises(
        ValueError, match="expected the columns image_w and image_h or width and height, .* got image_w"
    ):
        load_folder(folder)


@pytest.mark.parametrize(
    "row, match",
    [
        ("d0.png,1,2,3,4", "line 2: a box of 'd0.png', which is no image"),
        ("diseased/d9.png,1,2,3,4", "line 2: a box of 'diseased/d9.png'"),
        ("../in/diseased/d0.png,1,2,3,4", "line 2: expected a path inside"),
        (",1,2,3,4", "line 2: expected the name of a file"),
        ("diseased/d0.png,600,500,300,300", r"line 2: the box .* reaches beyond its image .*d0\.png of 40 x 30"),
        *[(f"diseased/d0.png,{box}", "line 2: expected a box") for box in BAD_BOXES],
    ],
)
def test_a_box_that_fits_no_image_names_its_row(folder, tmp_path, row, match):
    (folder / "boxes.csv").write_text(f"file,x,y,w,h\n{row}\n")
    for call in (lambda: load_folder(folder), lambda: prepare(folder, tmp_path / "out", size=16, num_workers=1)):
        with pytest.raises(ValueError, match=f"boxes.csv, {match}"):
            call()


def test_boxes_without_their_columns_name_them(folder):
    (folder / "boxes.csv").write_text("name,x,y,w,h\n")
    with pytest.raises(ValueError, match="expected column 'file', got name, x, y, w, h"):
        load_folder(folder)


@pytest.mark.parametrize("mask", ["masks/diseased/d0.png", "masks/diseased/d0_mask.png", "diseased/d0_mask.png"])
def test_a_mask_is_found_under_either_name(folder, tmp_path, mask):
    save_image(folder / mask, 255, size=(40, 30))
    for dataset in opened(folder, tmp_path / "out"):
        assert [row["mask"] is not None for row in dataset] == [True, False, False]


@pytest.mark.parametrize(
    "mask", ["masks/d0.png", "masks/diseased/d9.png", "masks/diseased/d0-mask.png", "diseased/d9_mask.png"]
)
def test_a_mask_of_no_image_is_named(folder, tmp_path, mask):
    save_image(folder / mask, 255, size=(40, 30))
    for call in (lambda: load_folder(folder), lambda: prepare(folder, tmp_path / "out", size=16)):
        with pytest.raises(ValueError, match=f"{mask}: a mask that belongs to no image"):
            call()


def test_a_text_with_boxes_of_no_image_is_named(folder):
    (folder / "healthy" / "readme.txt").write_text("what these images are")
    assert "boxes" not in load_folder(folder).column_names
    (folder / "healthy" / "h9.txt").write_text("1 2 3 4\n")
    with pytest.raises(ValueError, match="h9.txt: boxes that belong to no image"):
        load_folder(folder)


def test_a_broken_image_with_boxes_stays_one_broken_image(folder, tmp_path):
    (folder / "boxes.csv").write_text("file,x,y,w,h\ndiseased/d0.png,1,2,3,4\ndiseased/d1.png,1,2,3,4\n")
    (folder / "diseased" / "d0.png").write_bytes(b"broken")
    assert prepare(folder, tmp_path / "out", size=40)["failed"] == 1
    assert len(pd.read_csv(tmp_path / "out" / "boxes.csv")) == 1


# tables


@pytest.mark.parametrize(
    "row, match",
    [
        ("../a.png,healthy,", "line 2: expected a path inside"),
        ("a/../../a.png,healthy,", "line 2: expected a path inside"),
        (",healthy,", "line 2: expected the name of a file"),
        (f"{'x' * 5000}.png,healthy,", "line 2: no file"),
        ("a.png,ill,", "line 2: expected a label"),
        *[(f'a.png,healthy,"{box}"', "line 2.*expected") for box in BAD_BOXES],
        ('a.png,healthy,"600,500,300,300"', "line 2: the box"),
    ],
)
def test_a_table_with_a_wrong_cell_names_the_row(tmp_path, row, match):
    save_image(tmp_path / "t" / "a.png")
    save_image(tmp_path / "a.png")
    (tmp_path / "t" / "t.csv").write_text(f"file,label,box\n{row}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_table(tmp_path / "t" / "t.csv", boxes="box")


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "healthy" / "a\udcff.png"
    path.parent.mkdir()
    path.write_bytes(save_image(tmp_path / "b" / "b.png").read_bytes())
    with pytest.raises(ValueError, match=r"expected names and texts in UTF-8, got .*a\\udcff"):
        load_folder(tmp_path / "healthy")
    assert prepare(tmp_path / "healthy", tmp_path / "out", size=16)["images"] == 1


# CheXpert


def chexpert_with(tmp_path, **cells):
    root = write_chexpert(tmp_path)
    table = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    for name, value in cells.items():
        table.loc[1, name.replace("_", " ")] = value
    table.to_csv(root / "train.csv", index=False)
    return root


@pytest.mark.parametrize(
    "cells, match",
    [
        ({"Path": ""}, "line 3: expected the name of a file"),
        ({"Path": f"{NAME}/../secret/x.png"}, "line 3: expected a path inside"),
        ({"Path": f"{NAME}\\..\\..\\x.png"}, "line 3: expected a path inside"),
        ({"Path": "/etc/x.png"}, "line 3: expected a path inside"),
        ({"Edema": "yes"}, "line 3: expected a number in column 'Edema', got 'yes'"),
        ({"Edema": "7"}, "line 3: expected 1, 0, -1 or blank in 'Edema', got 7"),
        ({"Pleural_Effusion": "inf"}, "line 3: expected 1, 0, -1 or blank"),
    ],
)
def test_chexpert_a_wrong_cell_names_its_row(tmp_path, cells, match):
    root = chexpert_with(tmp_path, **cells)
    with pytest.raises(ValueError, match=f"train.csv, {match}"):
        load_chexpert(root)
    if "Path" in cells:
        with pytest.raises(ValueError, match=f"train.csv, {match}"):
            prepare(root, tmp_path / "out" / "copy", size=16, num_workers=1)
        assert not (tmp_path / "out").exists()


IMAGE = "train/patient00001/study1/view1_frontal"


@pytest.mark.parametrize("file", [f"{NAME}/{IMAGE}.jpg", f"{IMAGE}.png", f"{NAME}/{IMAGE}.jpg".replace("/", "\\")])
def test_chexpert_boxes_are_found_however_they_are_written(tmp_path, file):
    root = write_chexpert(tmp_path / "in")
    (root / "boxes.csv").write_text(f"file,x,y,w,h,image_w,image_h\n{file},2,4,6,8,24,20\n")
    prepare(root, tmp_path / "out", size=12, num_workers=1)
    loaded, copied = (
        dict(zip(d["patient"][:], d["boxes"][:], strict=True)) for d in map(load_chexpert, (root, tmp_path / "out"))
    )
    assert loaded["patient00001"] == [[1, 2, 3, 4]] and copied["patient00001"] == [[1, 3, 3, 4]]


@pytest.mark.parametrize(
    "row, match",
    [
        ("train/patient99999/study1/view1_frontal.jpg,1,2,3,4", "which is no image of"),
        ("view1_frontal.jpg,1,2,3,4", "which is no image of"),
        (f"{IMAGE}.jpg,60,50,30,30", "reaches beyond its image"),
        (f"{IMAGE}.jpg,1,2,3,4,5", "expected 5 cells, got 6"),
        *[(f"{IMAGE}.jpg,{box}", "expected a box") for box in BAD_BOXES],
    ],
)
def test_chexpert_boxes_that_fit_no_image_name_their_row(tmp_path, row, match):
    root = write_chexpert(tmp_path)
    (root / "boxes.csv").write_text(f"file,x,y,w,h\nvalid/patient1/study1/view1.jpg,1,2,3,4\n{row}\n")
    for call in (lambda: load_chexpert(root), lambda: prepare(root, tmp_path / "out", size=16, num_workers=1)):
        with pytest.raises(ValueError, match=f"boxes.csv, line 3: .*{match}"):
            call()


# ChestX-ray14


def write_nih(root, size, official=True, suffix=".png", boxes="00000001_000.png,Effusion,600,500,300,300,,,", last=","):
    for i in range(4):
        save_image(root / "images" / f"{i:08d}_000{suffix}", 50 * i, size=(size, size))
    extra = (",OriginalImage[Width,Height]", ",2682,2749") if official else ("", "")
    rows = [f"{i:08d}_000.png,{'Effusion' if i % 2 else 'No Finding'},{i},PA{extra[1]}," for i in range(4)]
    header = f"Image Index,Finding Labels,Patient ID,View Position{extra[0]}{last}"
    (root / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(f"{i:08d}_000.png" for i in range(4)))
    (root / "BBox_List_2017.csv").write_text(f"Image Index,Finding Label,Bbox [x,y,w,h],,,\n{boxes}\n\n")
    return root


@pytest.mark.parametrize("size", [64, 224, 512, 1024])
def test_official_boxes_are_scaled_to_copies_of_any_size(tmp_path, size):
    root = write_nih(tmp_path / "nih", size)
    expected = np.array([600, 500, 300, 300]) / 1024
    assert np.allclose(load_nih(root)["boxes"][1], expected * size)
    prepare(root, tmp_path / "small", size=32, num_workers=1)
    prepare(tmp_path / "small", tmp_path / "smaller", size=16, num_workers=1)
    (tmp_path / "smaller" / "prepare_settings.json").unlink()  # what they count in is not told by that file alone
    for name, side in (("small", 32), ("smaller", 16)):
        assert np.allclose(load_nih(tmp_path / name)["boxes"][1], expected * side)


def test_boxes_beside_another_table_count_in_their_image(tmp_path):
    root = write_nih(tmp_path / "nih", 64, official=False, boxes="00000001_000.png,Effusion,6,5,30,30,,,")
    assert load_nih(root)["boxes"][1] == [[6, 5, 30, 30]]
    write_nih(root, 64, official=False)
    for call in (load_nih, lambda root: prepare(root, tmp_path / "out", size=16, num_workers=1)):
        with pytest.raises(
            ValueError, match=r"BBox_List_2017.csv, line 2: the box .* beyond its image .*00000001_000.png"
        ):
            call(root)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpeg", ".JPG"])
@pytest.mark.parametrize("last", [",", ""])
def test_nih_tables_are_read_with_their_quirks(tmp_path, suffix, last):
    boxes = "images\\00000001_000.png,Infiltrate,6,5,3,3,,,\n00000001_000.png,Effusion,1,2,3,4"
    dataset = load_nih(write_nih(tmp_path, 1024, suffix=suffix, last=last, boxes=boxes))
    assert dataset["patient"][:] == [f"nih{i:05d}" for i in range(4)] and dataset["label"][:] == [0, 1, 0, 1]
    assert dataset["boxes"][:] == [[], [[1, 2, 3, 4]], [], []]
    assert load_nih(tmp_path, classes=["Infiltration", "Effusion"])["boxes"][1] == [[6, 5, 3, 3], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    "row, match",
    [
        ("00000009_000.png,Effusion,1,2,3,4,,,", "a box of '00000009_000.png', which is no image"),
        ("../00000001_000.png,Effusion,1,2,3,4,,,", "expected a path inside"),
        ("00000001_000.png,Effusio,1,2,3,4,,,", "unknown class 'Effusio'"),
        ("00000001_000.png,Effusion,1000,2,300,4,,,", "reaches beyond"),
        ("00000001_000.png,Effusion", "expected a box"),
        *[(f"00000001_000.png,Effusion,{box},,,", "expected a box") for box in BAD_BOXES],
    ],
)
def test_nih_boxes_that_fit_no_image_name_their_row(tmp_path, row, match):
    root = write_nih(tmp_path / "nih", 64, boxes=row)
    for call in (load_nih, lambda root: prepare(root, tmp_path / "out", size=16, num_workers=1)):
        with pytest.raises(ValueError, match=f"line 2: .*{match}"):
            call(root)


@pytest.mark.parametrize(
    "old, new, match",
    [
        ("00000001_000.png,", "../../00000001_000.png,", "line 3: expected a path inside"),
        ("00000001_000.png,", "sub/00000001_000.png,", "line 3: expected the name of a file"),
        ("00000001_000.png,", ",", "line 3: expected the name of a file"),
        ("Effusion,1,", "Effusion,one,", "line 3: expected a number in column 'Patient ID', got 'one'"),
        ("Effusion,1,", "Effusion,,", "line 3: expected a whole number"),
        ("Effusion,1,", "Effusion,inf,", "line 3: expected a whole number"),
    ],
)
def test_nih_a_wrong_cell_names_its_row(tmp_path, old, new, match):
    csv = write_nih(tmp_path / "nih", 64) / "Data_Entry_2017.csv"
    csv.write_text(csv.read_text().replace(old, new, 1))
    for call in (load_nih, lambda root: prepare(root, tmp_path / "out", size=16, num_workers=1)):
        with pytest.raises(ValueError, match=f"Data_Entry_2017.csv, {match}"):
            call(csv.parent)
    assert not (tmp_path / "out").exists()


# VinDr-CXR


def write_vindr(root, size=(48, 40), columns="", values="", row="a,R1,Effusion,10,4,18,24"):
    save_image(root / "train" / "a.png", size=size)
    save_image(root / "train" / "b.png", size=size)
    (root / "annotations").mkdir(exist_ok=True)
    header = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
    empty = f"b,R1,No finding,,,,{values}"
    (root / "annotations" / "annotations_train.csv").write_text(f"{header}{columns}\n{row}{values}\n{empty}\n")
    (root / "annotations" / "image_labels_train.csv").write_text(
        "image_id,rad_ID,Effusion,No finding\na,R1,1,0\nb,R1,0,1\n"
    )
    return root


def test_vindr_boxes_are_scaled_by_the_size_that_their_table_tells(tmp_path):
    root = write_vindr(tmp_path / "v", (24, 20), ",width,height", ",48,40")
    boxes = dict(zip(*(load_vindr(root, boxes=True)[name][:] for name in ("patient", "boxes")), strict=True))
    assert boxes == {"a": [[5, 2, 4, 10]], "b": []}
    prepare(root, tmp_path / "out", size=12, num_workers=1)
    (tmp_path / "out" / "prepare_settings.json").unlink()
    assert load_vindr(tmp_path / "out", boxes=True)["boxes"][0] == [[2.5, 2, 2, 5]]


def test_vindr_a_copy_of_unknown_scale_is_refused(tmp_path):
    root = write_vindr(tmp_path / "v")
    for call in (lambda: load_vindr(root, boxes=True), lambda: prepare(root, tmp_path / "out", size=12, num_workers=1)):
        with pytest.raises(ValueError, match=r"annotations_train.csv, line 2: .*a\.png is no DICOM original"):
            call()
    assert len(load_vindr(root, classes=["Effusion"])) == 2  # without boxes there is no question


@pytest.mark.parametrize(
    "row, match",
    [
        ("c,R1,Effusion,10,4,18,24", "a box of 'c', which is no image of train"),
        ("../a,R1,Effusion,10,4,18,24", "expected a path inside"),
        (",R1,Effusion,10,4,18,24", "expected the name of a file"),
        ("a,R1,Effusion,100,4,180,24", "reaches beyond its image"),
        ("a,R1,Effusion,18,4,10,24", "expected a box"),
        ("a,R1,Effusion,18,,20,24", "expected a box"),
        ("a,R1,Effusion,nan,nan,nan,nan", "expected a box"),
        ("a,R1,Effusion,-5,4,10,24", "expected a box"),
        ("a,R1,Effusion,x,4,10,24", "expected a number in column 'x_min', got 'x'"),
    ],
)
def test_vindr_boxes_that_fit_no_image_name_their_row(tmp_path, row, match):
    root = write_vindr(tmp_path / "v", columns=",width,height", values=",48,40", row=row)
    for call in (lambda: load_vindr(root, boxes=True), lambda: prepare(root, tmp_path / "out", size=12, num_workers=1)):
        with pytest.raises(ValueError, match=f"annotations_train.csv, line 2: .*{match}"):
            call()


def test_vindr_labels_are_zero_or_one_and_images_are_there_once(tmp_path):
    root = write_vindr(tmp_path / "v")
    labels = root / "annotations" / "image_labels_train.csv"
    labels.write_text(labels.read_text().replace("a,R1,1,0", "a,R1,yes,0"))
    with pytest.raises(ValueError, match="line 2: expected a number in column 'Effusion', got 'yes'"):
        load_vindr(root, classes=["Effusion"])
    save_image(root / "train" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png are the same image a"):
        load_vindr(root)


# the Hub


@pytest.mark.parametrize("box", [[float("nan"), 1, 2, 3], [1, 1, 0, 3], [-1, 1, 2, 3]])
def test_hub_boxes_are_checked_too(tmp_path, box):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["healthy", "diseased"])}
    features["boxes"] = datasets.List(datasets.List(datasets.Value("float32")))
    columns = {"image": [PIL.Image.new("L", (9, 9))] * 2, "label": [0, 1], "boxes": [[], [[1, 1, 2, 2], box]]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="row 1: expected a box"):
        load_hub(str(tmp_path / "d"))


def test_lists_of_boxes_are_checked_line_by_line():
    for bad in ("1 2 3", "1 2 3 4 5", "1 2 nan 4", "1 2 3 0", "a b c d"):
        with pytest.raises(ValueError, match=r"d\.txt.*expected.*x y w h|d\.txt.*x y w h.*expected"):
            parse_boxes(f"1 2 3 4\n{bad}", "d.txt")


@pytest.mark.parametrize("other", [False, True])
def test_a_row_that_says_no_finding_and_names_one_is_not_healthy(other):
    columns = {"No Finding": [1, 1, 1], "Edema": [0, 1, 0], "Pneumonia": [0, 0, 1], "Support Devices": [1, 0, 0]}
    chexpert = label_chexpert(pd.DataFrame(columns), ["Pneumonia"], other)
    nih = label_nih(["No Finding", "No Finding|Edema", "No Finding|Pneumonia"], ["Pneumonia"], other)
    voted = pd.DataFrame({"No finding": [1, 1, 1], "Edema": columns["Edema"], "Pneumonia": columns["Pneumonia"]}) > 0
    vindr = label_vindr(voted, ["Pneumonia"], other)
    for labels in (chexpert.tolist(), nih.tolist(), list(vindr.values())):
        assert labels == [0, 2 if other else -1, 1]


def test_an_image_in_several_rows_of_a_table_is_an_error(folder):
    csv = folder / "table.csv"
    csv.write_text('file,label,boxes\nhealthy/h0.png,healthy,\ndiseased/d0.png,diseased,"1,2,3,4"\n')
    assert len(load_table(csv, boxes="boxes")) == 2
    csv.write_text(csv.read_text() + '"./diseased/d0.png",healthy,"5,6,3,4"\n')
    with pytest.raises(ValueError, match=r"table\.csv, line 4: expected one row an image, got .* in line 3, too"):
        load_table(csv, boxes="boxes")


def test_an_image_in_several_rows_counts_once_and_has_one_label(tmp_path):
    root = write_chexpert(tmp_path)
    whole, lines = load_chexpert(root), (root / "train.csv").read_text().splitlines(keepends=True)
    (root / "train.csv").write_text("".join([*lines, lines[1]]))
    assert load_chexpert(root)["path"][:] == whole["path"][:]
    row = dict(zip(lines[0].strip().split(","), lines[1].strip().split(","), strict=True))
    row |= {"No Finding": "" if row["No Finding"] else "1.0", "Pleural Effusion": "1.0" if row["No Finding"] else ""}
    (root / "train.csv").write_text("".join([*lines, ",".join(row.values()) + "\n"]))
    with pytest.raises(ValueError, match="expected one label an image, got the classes . and . for train/patient"):
        load_chexpert(root)


def test_boxes_in_shares_of_the_sides_are_refused(folder, tmp_path):
    table = "file,x,y,w,h\ndiseased/d0.png,0.4,0.3,0.25,0.25\ndiseased/d1.png,0,0,1,1\n"
    (folder / "boxes.csv").write_text(table)
    match = r"boxes.csv: expected boxes x, y, w, h in pixels, got \[0.4, 0.3, 0.25, 0.25\]: shares of the image's sides"
    for call in (lambda: load_folder(folder), lambda: prepare(folder, tmp_path / "out", size=16)):
        with pytest.raises(ValueError, match=match):
            call()
    (folder / "boxes.csv").write_text(table + "diseased/d1.png,3,3,8,8\n")  # among boxes in pixels, one of one pixel
    assert len(load_folder(folder)[1]["boxes"]) == 2
    with pytest.raises(ValueError, match=r"row: expected boxes x, y, w, h in pixels, got \[0.5, 0.5, 0.2, 0.2\]"):
        parse_boxes("0.5 0.5 0.2 0.2\n0.1 0.1 0.2 0.2\n", "row")


def test_a_mask_saved_as_jpeg_keeps_its_size(folder, tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[8:20, 10:22] = 255
    PIL.Image.fromarray(mask).save(folder / "diseased" / "d0_mask.jpg", quality=75)
    for dataset in opened(folder, tmp_path / "out"):
        area = np.count_nonzero(np.asarray(dataset[0]["mask"]))
        assert area == pytest.approx(144, abs=6)


@pytest.mark.parametrize("top", [1, 2, 255])
def test_masks_of_the_hub_may_count_from_zero_to_one(tmp_path, top):
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9, 5:9] = top
    row = {"image": PIL.Image.fromarray(mask), "mask": PIL.Image.fromarray(mask), "label": 1}
    features = {"image": datasets.Image(), "mask": datasets.Image()}
    features["label"] = datasets.ClassLabel(names=["healthy", "diseased"])
    datasets.Dataset.from_list([row], features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    dataset = load_hub(tmp_path / "saved")
    assert rows_with_region(dataset, [0]) == [0]
    assert np.array_equal(np.asarray(dataset[0]["mask"]) > 127, mask > 0)
