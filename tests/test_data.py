"""Loaders: labels are what the file says, patients stay on one side, errors name the row."""

import json
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

from cxr_diffusers.data import (
    LOADERS,
    build_dataset,
    load_chexpert,
    load_folder,
    load_hub,
    load_nih,
    load_phantom,
    load_table,
)
from cxr_diffusers.data.chexpert import SPLITS, clean_paths, key_of, label_rows
from cxr_diffusers.data.rows import columns_to_dataset, to_dataset
from cxr_diffusers.data.selection import lottery, select_rows
from cxr_diffusers.data.tables import path_of
from cxr_diffusers.training.tensors import TensorImages
from helpers import HEADER, SHARED, chexpert_rows, needs_shared, save_image, write_chexpert, write_dicom


@pytest.fixture
def chexpert(tmp_path):
    return write_chexpert(tmp_path)


def test_every_loader_is_opened_by_its_name():
    assert set(LOADERS) == {
        "brats",
        "chestx_det",
        "chexlocalize",
        "chexmask",
        "chexpert",
        "folder",
        "hub",
        "mimic_cxr",
        "nih",
        "packed",
        "padchest",
        "phantom",
        "rsna",
        "siim",
        "table",
        "vindr",
        "vindr_pcxr",
    }
    assert len(build_dataset("phantom", n=3, size=16)) == 3


@pytest.mark.parametrize(
    "name, kwargs, match",
    [
        ("chexpretty", {}, "unknown data set 'chexpretty'.*chexpert, folder"),
        ("phantom", {"number": 3}, "unknown key 'number'.*diseased_fraction"),
        ("chexpert", {}, "give 'root'"),
    ],
)
def test_an_error_for_an_unknown_name_or_keyword_lists_the_valid_ones(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        build_dataset(name, **kwargs)


def test_chexpert_labels_match_the_csv(chexpert):
    dataset = load_chexpert(chexpert, other=True)
    assert dataset.features["label"].names == ["healthy", "pleural effusion", "other finding"]
    assert sorted(dataset["label"]) == [0] * 8 + [1] * 4 + [2] * 4
    for row in dataset:
        kind = int(row["patient"].removeprefix("patient")) % 6
        assert row["label"] == {0: 0, 5: 0, 1: 1, 2: 2}[kind]
        assert "frontal" in row["path"] and row["image"].mode == "L"
        assert row["view"] == ["AP", "PA", ""][int(row["patient"][-5:]) % 3]


def test_chexpert_uncertain_rows_follow_the_policy(chexpert):
    counts = {u: len(load_chexpert(chexpert, uncertain=u)) for u in ("ignore", "positive", "negative")}
    assert counts == {"ignore": 12, "positive": 16, "negative": 12}
    table = pd.DataFrame(
        {
            "No Finding": [1.0, 1.0, np.nan, 1.0],
            "Edema": [-1.0, 1.0, -1.0, np.nan],
            "Fracture": [np.nan, np.nan, 1.0, 0],
        }
    )
    expected = {"ignore": [-1, 1, -1, 0], "positive": [1, 1, 1, 0], "negative": [0, 1, 2, 0]}
    for uncertain, labels in expected.items():
        assert label_rows(table, ["Edema"], other=True, uncertain=uncertain).tolist() == labels
    with pytest.raises(ValueError, match="ignore, positive or negative"):
        load_chexpert(chexpert, uncertain="maybe")


def test_chexpert_other_findings_without_a_column_count_but_devices_and_doubts_do_not():
    blank = {"No Finding": np.nan, "Edema": np.nan, "Fracture": np.nan, "Support Devices": np.nan}
    table = pd.DataFrame(
        [blank, blank | {"Support Devices": 1.0}, blank | {"Fracture": -1.0}, blank | {"Fracture": 1.0}]
    )
    assert label_rows(table, ["Edema"], other=True).tolist() == [2, -1, -1, 2]


def test_chexpert_the_first_named_disease_wins_and_case_does_not_matter(chexpert):
    dataset = load_chexpert(chexpert, classes=("edema", "pleural effusion"))
    assert dataset.features["label"].names == ["healthy", "edema", "pleural effusion"]
    assert sorted(set(dataset["label"])) == [0, 1]  # every effusion has an edema here


def test_chexpert_is_found_under_any_name_and_from_its_parent(tmp_path):
    write_chexpert(tmp_path, name="my copy", csv_name="CheXpert-v1.0")
    assert load_chexpert(tmp_path / "my copy")["path"][:] == load_chexpert(tmp_path)["path"][:]
    write_chexpert(tmp_path, name="second")
    with pytest.raises(ValueError, match="several data sets.*my copy.*second"):
        load_chexpert(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"valid.csv.*train.csv"):
        load_chexpert(tmp_path / "second", split="valid")


def test_chexpert_batches_of_the_full_download_are_understood(tmp_path):
    csv = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)" / "train.csv"
    csv.parent.mkdir()
    rows = chexpert_rows("CheXpert-v1.0")
    pd.DataFrame(rows, columns=HEADER).to_csv(csv, index=False)
    for i, row in enumerate(rows):
        save_image(tmp_path / f"CheXpert-v1.0 batch {2 + i // 24} (train {1 + i // 24})" / row["Path"].split("/", 2)[2])
    assert len(load_chexpert(tmp_path)) == 12


def test_chexpert_plus_is_joined_with_its_labels(tmp_path):
    rows = [r for r in chexpert_rows("x") if "frontal" in r["Path"]]
    paths = [row["Path"].split("/", 1)[1] for row in rows]
    for path in paths:
        save_image((tmp_path / "PNG" / path).with_suffix(".png"))
    table = {"path_to_image": paths, "frontal_lateral": "Frontal", "ap_pa": [r["AP/PA"] for r in rows]}
    table |= {"deid_patient_id": [p.split("/")[1] for p in paths], "split": "train", "report": "two\nlines"}
    pd.DataFrame(table).to_csv(tmp_path / "df_chexpert_plus_240401.csv", index=False)
    with pytest.raises(FileNotFoundError, match="impression_fixed.json"):
        load_chexpert(tmp_path)
    lines = [{"path_to_image": p, **{k: r[k] or None for k in HEADER[5:]}} for p, r in zip(paths, rows, strict=True)]
    (tmp_path / "chexbert_labels").mkdir()
    (tmp_path / "chexbert_labels" / "impression_fixed.json").write_text("\n".join(map(json.dumps, reversed(lines))))
    plus = load_chexpert(tmp_path, other=True)
    classic = load_chexpert(write_chexpert(tmp_path), other=True)
    assert plus["label"][:] == classic["label"][:] and plus["patient"][:] == classic["patient"][:]


def test_chexpert_a_missing_image_names_its_row(chexpert):
    next(chexpert.glob("train/patient00001/study1/*frontal*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"train.csv, line 4.*patient00001/study1/view1_frontal.jpg"):
        load_chexpert(chexpert)
    assert len(load_chexpert(chexpert, check_files=False)) == 12


def test_chexpert_a_missing_column_names_those_that_are_there(chexpert):
    table = pd.read_csv(chexpert / "train.csv").drop(columns="No Finding")
    table.to_csv(chexpert / "train.csv", index=False)
    with pytest.raises(ValueError, match="expected column 'No Finding', got Path, Sex"):
        load_chexpert(chexpert)
    with pytest.raises(ValueError, match="unknown class 'Flu'.*Pleural Effusion"):
        load_chexpert(chexpert, classes=["Flu"])


def test_chexpert_views_can_be_chosen_and_unknown_ones_stay_by_default(chexpert):
    assert set(load_chexpert(chexpert)["view"]) == {"AP", "PA", ""}
    assert set(load_chexpert(chexpert, views=["PA", ""])["view"]) == {"PA", ""}
    assert len(load_chexpert(chexpert, frontal_only=False)) == 24
    with pytest.raises(ValueError, match="views"):
        load_chexpert(chexpert, views="PA")
    with pytest.raises(ValueError, match="expected CheXpert Plus for `report_section` 'findings', got .*train.csv"):
        load_chexpert(chexpert, report_section="findings")


def test_chexpert_boxes_reach_their_image(chexpert):
    (chexpert.parent / "boxes.csv").write_text(
        "file,label,x,y,w,h\nCheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Effusion,1,2,3,4.5\n"
    )
    boxes = {row["patient"]: row["boxes"] for row in load_chexpert(chexpert)}
    assert boxes.pop("patient00001") == [[1.0, 2.0, 3.0, 4.5]]
    assert all(box == [] for box in boxes.values())


def big_table(n=3000):
    rng = np.random.default_rng(0)
    patient = [f"p{i}" for i in rng.integers(0, n // 3, n)]
    return pd.DataFrame({"label": rng.integers(0, 3, n), "patient": patient, "key": [f"k{i}" for i in range(n)]})


def test_no_patient_is_on_both_sides_and_none_is_lost():
    table = big_table()
    parts = [select_rows(table, holdout=0.2, part=part) for part in ("train", "holdout")]
    assert not set(parts[0]["patient"]) & set(parts[1]["patient"])
    assert sorted([*parts[0].index, *parts[1].index]) == list(table.index)
    assert parts[1]["patient"].nunique() / table["patient"].nunique() == pytest.approx(0.2, abs=0.05)


def test_train_and_holdout_share_no_patient_whatever_else_differs():
    table = big_table()
    train = select_rows(table, holdout=0.2, per_class=100, seed=7)
    aside = select_rows(table[table["label"] > 0], holdout=0.2, part="holdout", seed=8)
    assert not set(train["patient"]) & set(aside["patient"])


def test_classes_are_drawn_by_the_seed_and_not_by_the_order_of_rows():
    table = big_table()
    drawn = select_rows(table, per_class=50, seed=1)
    assert drawn["label"].value_counts().to_dict() == {0: 50, 1: 50, 2: 50}
    shuffled = select_rows(table.sample(frac=1, random_state=0), per_class=50, seed=1)
    assert set(drawn["key"]) == set(shuffled["key"]) != set(select_rows(table, per_class=50, seed=2)["key"])
    assert drawn.index.is_monotonic_increasing


def test_one_row_a_patient():
    drawn = select_rows(big_table(), one_per_patient=True)
    assert drawn["patient"].is_unique and len(drawn) == big_table()["patient"].nunique()


def test_the_lottery_is_uniform_and_the_same_on_every_machine():
    numbers = [lottery(0, i) for i in range(2000)]
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.03)
    assert lottery(1911, "patient00001") == pytest.approx(LOTTERY_1911, abs=1e-12)


LOTTERY_1911 = 0.30246975514642915  # first 8 bytes of sha256("1911:patient00001") / 2**64


@pytest.mark.parametrize("option", [{"holdout": 1.5}, {"part": "test"}, {"part": "holdout"}, {"per_class": 0}])
def test_impossible_selections_are_refused(option):
    with pytest.raises(ValueError, match="expected|empty"):
        select_rows(big_table(30), **option)


def test_a_part_without_patients_is_named():
    table = big_table(4)
    patients = table["patient"].nunique()
    with pytest.raises(ValueError, match=f"holdout=1e-09 puts none of {patients} patients into part=holdout"):
        select_rows(table, holdout=1e-9, part="holdout")
    assert select_rows(table[:0], holdout=0.5, part="holdout").empty, "no rows to begin with: the caller's message"


def test_folders_name_the_classes(tmp_path):
    save_image(tmp_path / "healthy" / "a.png")
    save_image(tmp_path / "Diseased" / "p9" / "b.jpg")
    np.save(tmp_path / "healthy" / "c.npy", np.full((10, 12, 1), 9, np.uint8))
    write_dicom(tmp_path / "healthy" / "IM0001", np.full((10, 12), 9, np.uint16), 12)
    rows = {Path(row["path"]).name: row for row in load_folder(tmp_path)}
    assert {name: row["label"] for name, row in rows.items()} == {"a.png": 0, "b.jpg": 1, "c.npy": 0, "IM0001": 0}
    assert {name: row["patient"] for name, row in rows.items()} == {
        "a.png": "healthy/a",
        "b.jpg": "p9",
        "c.npy": "healthy/c",
        "IM0001": "p7",
    }
    assert rows["c.npy"]["image"].getpixel((0, 0)) == 9
    assert rows["IM0001"]["image"].mode == "I;16" and rows["IM0001"]["view"] == "PA"


def test_a_class_folder_itself_is_labelled_and_any_other_folder_is_not(tmp_path):
    save_image(tmp_path / "testing" / "diseased" / "a.png")
    assert load_folder(tmp_path / "testing" / "diseased")["label"][:] == [1]
    save_image(tmp_path / "inbox" / "p1" / "s1" / "a.png")
    dataset = load_folder(tmp_path / "inbox")
    assert dataset["label"][:] == [-1] and dataset["patient"][:] == ["p1"]


def test_folders_that_would_mix_splits_or_lose_images_are_refused(tmp_path):
    save_image(tmp_path / "training" / "healthy" / "a.png")
    save_image(tmp_path / "testing" / "healthy" / "a.png")
    with pytest.raises(ValueError, match="testing, training"):
        load_folder(tmp_path)
    stray = save_image(tmp_path / "training" / "odd" / "b.png")
    with pytest.raises(ValueError, match=str(stray)):
        load_folder(tmp_path / "training")
    with pytest.raises(NotADirectoryError):
        load_folder(tmp_path / "nowhere")


def test_masks_and_boxes_lie_beside_their_image(tmp_path):
    for name in "abc":
        save_image(tmp_path / "diseased" / f"{name}.png")
    PIL.Image.fromarray(np.eye(10, 12, dtype=np.uint8)).save(tmp_path / "diseased" / "a_mask.png")
    save_image(tmp_path / "masks" / "diseased" / "b.png", 255)
    (tmp_path / "diseased" / "c.txt").write_text("1 2 3 4\n5, 6, 7, 4\n")
    rows = list(load_folder(tmp_path))
    assert [row["patient"] for row in rows] == ["diseased/a", "diseased/b", "diseased/c"]
    assert np.array_equal(np.asarray(rows[0]["mask"]), np.eye(10, 12) * 255)
    assert np.asarray(rows[1]["mask"]).min() == 255 and rows[2]["mask"] is None
    assert [row["boxes"] for row in rows] == [[], [], [[1, 2, 3, 4], [5, 6, 7, 4]]]
    save_image(tmp_path / "masks" / "diseased" / "b.png", 255, size=(6, 5))
    with pytest.raises(ValueError, match=r"b.png.*12 x 10.*\(6, 5\)"):
        load_folder(tmp_path)
    save_image(tmp_path / "masks" / "diseased" / "b.png", 255)
    (tmp_path / "diseased" / "c.txt").write_text("0 0.5 0.5 0.1 0.1\n")  # YOLO's way
    with pytest.raises(ValueError, match="c.txt.*x y w h"):
        load_folder(tmp_path)


def test_patients_can_be_read_from_file_names(tmp_path):
    for name in ("007_a", "007_b", "008_a"):
        save_image(tmp_path / "healthy" / f"{name}.png")
    assert load_folder(tmp_path, patient_pattern=r"/(\d+)_")["patient"][:] == ["007", "007", "008"]
    with pytest.raises(ValueError, match="matches no group"):
        load_folder(tmp_path, patient_pattern=r"(x\d)")


def test_a_table_names_files_labels_and_patients(tmp_path):
    for name in "ab":
        save_image(tmp_path / "pictures" / f"{name}.png")
    save_image(tmp_path / "m.png", 255)
    csv = tmp_path / "t.csv"
    csv.write_text('f,m,who,pos,kind,box\npictures/a.png,m.png,007, pa,diseased,"1,2,3,4"\npictures/b.png,,008,,0,\n')
    columns = {"image": "f", "mask": "m", "patient": "who", "view": "pos", "boxes": "box"}
    rows = list(load_table(csv, label="kind", **columns))
    assert [(r["label"], r["patient"], r["view"], r["boxes"]) for r in rows] == [
        (1, "007", "PA", [[1, 2, 3, 4]]),
        (0, "008", "", []),
    ]
    assert rows[0]["mask"].size == (12, 10) and rows[1]["mask"] is None
    assert load_table(csv, image="f", label="healthy")["label"][:] == [0, 0]
    assert load_table(csv, image="f", label="healthy", keep=["kind", "who"])["who"][:] == ["007", "008"]
    with pytest.raises(ValueError, match="style"):
        load_table(csv, image="f", label="healthy", keep=["style"])


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({"image": "g"}, ValueError, "expected column 'g', got f, kind"),
        ({"label": "sort"}, ValueError, "'sort' is neither a column"),
        ({"label": "kind"}, ValueError, "line 2: expected a label of healthy, diseased.*'ill'"),
        ({"label": "healthy", "root": "elsewhere"}, FileNotFoundError, "line 2.*a.png"),
    ],
)
def test_an_invalid_table_is_refused_with_the_line(tmp_path, kwargs, error, match):
    save_image(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("f,kind\na.png,ill\n")
    with pytest.raises(error, match=match):
        load_table(tmp_path / "t.csv", **({"image": "f"} | kwargs))


@pytest.fixture
def nih(tmp_path):
    root = tmp_path / "nih"
    labels = ["No Finding", "Effusion|Mass", "Mass", "Hernia|Effusion", "No Finding", "Cardiomegaly"]
    names = [f"{i:08d}_000.png" for i in range(6)]
    for i, name in enumerate(names):
        save_image(root / f"images_{1 + i // 3:03d}" / "images" / name)
    table = {"Image Index": names, "Finding Labels": labels, "Follow-up #": 0, "Patient ID": [0, 1, 2, 3, 0, 5]}
    table |= {"Patient Age": 50, "Patient Gender": "F", "View Position": ["PA", "AP"] * 3}
    pd.DataFrame(table).to_csv(root / "Data_Entry_2017_v2020.csv", index=False)
    (root / "train_val_list.txt").write_text("\n".join(names[:5]))
    (root / "test_list.txt").write_text(names[5])
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    (root / "BBox_List_2017.csv").write_text(
        f"{header}\n{names[1]},Effusion,2.5,3,4,5,,,\n{names[1]},Mass,1,1,2,2,,,\n"
    )
    return root


def test_nih_labels_match_the_csv(nih):
    dataset = load_nih(nih, classes=("Pleural Effusion",), other=True)
    assert dataset.features["label"].names == ["healthy", "pleural effusion", "other finding"]
    assert dataset["label"][:] == [0, 1, 2, 1, 0]
    assert dataset["patient"][:] == ["nih00000", "nih00001", "nih00002", "nih00003", "nih00000"]
    assert dataset["view"][:] == ["PA", "AP", "PA", "AP", "PA"]
    assert dataset["boxes"][:] == [[], [[2.5, 3, 4, 5]], [], [], []]
    assert load_nih(nih, classes=("Mass", "Effusion"))["boxes"][1] == [[2.5, 3, 4, 5], [1, 1, 2, 2]]
    assert load_nih(nih, split="test", other=True)["label"][:] == [2]
    assert load_nih(nih, split="all", classes=("Mass", "Effusion"))["label"][:] == [0, 1, 1, 2, 0]


def test_an_nih_error_names_the_missing_file(nih):
    (nih / "images_001" / "images" / "00000001_000.png").unlink()
    with pytest.raises(FileNotFoundError, match="line 3.*00000001_000.png"):
        load_nih(nih)
    (nih / "test_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test_list.txt"):
        load_nih(nih, split="test")
    with pytest.raises(ValueError, match="unknown class 'Flu'"):
        load_nih(nih, classes=["Flu"])
    with pytest.raises(ValueError, match="expected `views` a list of 'PA', 'AP', '', got .'PA', 'ap'."):
        load_nih(nih, views=["PA", "ap"])


def test_hub_data_sets_are_checked_and_completed(tmp_path):
    phantoms = load_phantom(4, size=16).select_columns(["image", "label", "mask"])
    (tmp_path / "parquet").mkdir()
    phantoms.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    phantoms.save_to_disk(tmp_path / "saved")
    for folder in ("parquet", "saved"):
        dataset = load_hub(str(tmp_path / folder))
        assert dataset["label"][:] == phantoms["label"][:] and dataset[0]["image"].size == (16, 16)
        assert len(set(dataset["patient"])) == 4
    phantoms.cast_column("label", datasets.Value("int64")).save_to_disk(tmp_path / "ints")
    with pytest.raises(ValueError, match="'label' to be datasets.ClassLabel"):
        load_hub(str(tmp_path / "ints"))
    phantoms.remove_columns("label").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="expected column 'label', got image, mask"):
        load_hub(str(tmp_path / "none"))


def test_cached_and_uncached_tensors_equal_the_input_of_the_pipeline():
    from cxr_diffusers.pipelines.cxr_images import prepare_image

    phantoms = load_phantom(4, size=48)
    cached, lazy = (TensorImages(phantoms, 32, aspect="crop", cache_bytes=n) for n in (1 << 20, 0))
    assert cached.cache is not None and lazy.cache is None and len(cached) == 4
    for i in range(4):
        a, b = cached[i], lazy[i]
        expected = prepare_image(phantoms[i]["image"], 32, aspect="crop")[0]
        assert torch.equal(a["images"], b["images"]) and torch.equal(a["images"], expected)
        assert a["images"].shape == (1, 32, 32) and a["images"].dtype == torch.float32
        assert a["labels"].dtype == torch.int64 and a["labels"] == b["labels"] == phantoms[i]["label"]
    batch = next(iter(torch.utils.data.DataLoader(cached, batch_size=4)))
    assert batch["images"].shape == (4, 1, 32, 32) and batch["labels"].tolist() == phantoms["label"][:]


def test_a_broken_image_in_training_is_named(chexpert):
    broken = next(chexpert.glob("train/patient00000/study1/*frontal*"))
    broken.write_bytes(b"broken")
    with pytest.raises(ValueError, match=str(broken)):
        TensorImages(load_chexpert(chexpert), 16)


@needs_shared
def test_the_real_chexpert_layout_has_the_rows_of_its_tables():
    root = SHARED / "CheXpert-v1.0-small"
    loaded = {split: load_chexpert(root, split=split, other=True) for split in ("train", "valid")}
    for split, dataset in loaded.items():
        table = pd.read_csv(root / f"{split}.csv")
        frontal = table[table["Frontal/Lateral"] == "Frontal"]
        ill = frontal["Pleural Effusion"] == 1
        counts = np.bincount(dataset["label"][:])
        assert counts[1] == ill.sum() and counts[0] == ((frontal["No Finding"] == 1) & ~ill).sum() and len(counts) == 3
        assert len(load_chexpert(SHARED, split=split)) == counts[0] + counts[1]
    boxes = pd.read_csv(SHARED / "boxes.csv")["file"]
    assert sum(map(len, loaded["valid"]["boxes"])) == len(boxes[boxes.isin(boxed(loaded["valid"]))]) > 0
    assert not set(loaded["train"]["patient"]) & set(loaded["valid"]["patient"])
    for row in loaded["valid"].select([0, 100]):
        assert row["image"].mode == "L" and min(row["image"].size) == 256


def boxed(dataset):
    return {Path(path).relative_to(SHARED).as_posix() for path in dataset["path"]}


@needs_shared
def test_real_implants_are_paired_with_their_sources_by_patient():
    folder = SHARED / "val_implants"
    columns = {"patient": "patient_id", "view": "view"}
    implants = load_table(folder / "val_implants.csv", label="diseased", mask="mask", boxes="bbox_xywh", **columns)
    sources = load_table(folder / "val_sources.csv", image="source_copy", label="healthy", **columns)
    assert (len(implants), len(sources)) == (47, 37)
    assert set(implants["patient"]) == set(sources["patient"]) and len(set(sources["patient"])) == 35
    for row in implants.select(range(0, 47, 8)):
        ys, xs = np.nonzero(np.asarray(row["mask"]))
        x, y, w, h = row["boxes"][0]
        assert (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1) == (x, y, w, h)


@needs_shared
def test_real_dicom_files_show_a_dark_lung_on_each_side_of_a_bright_middle():
    dataset = load_folder(SHARED / "dicom")
    assert sorted(dataset["patient"]) == ["nih00002", "nih00129", "nih04387", "nih09047", "nih09211"]
    for row in dataset:  # one of them is stored as MONOCHROME1, one in 12 bits
        full = 255 if row["image"].mode == "L" else 65535
        picture = np.asarray(row["image"].resize((64, 64)), float) / full
        middle = picture[20:36, 29:35].mean()
        assert middle > picture[20:36, 14:22].mean() + 0.1, row["path"]
        assert middle > picture[20:36, 42:50].mean() + 0.1, row["path"]
    assert {row["image"].mode for row in dataset} == {"L", "I;16"}


@pytest.mark.parametrize(
    "path",
    [
        "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg",
        "train/patient00001/study1/view1_frontal.jpg",
        "valid/a",
        "a.jpg",
        "a",
        "x/a.b.c.png",
        "my data/train/patient 1/a b.png",
        "x\\train\\a.png",
        "./x/a.png",
        "x//a.png",
        " x/a.png ",
        "x/.a",
        "ü/é.png",
    ],
)
def test_a_clean_path_is_that_of_pathlib_and_its_key_begins_with_the_split_and_has_no_suffix(path):
    expected = path_of(path, "t.csv")
    assert clean_paths([path], [2], "t.csv") == [str(expected)]
    parts = expected.parts if expected.parts[0] in SPLITS else expected.parts[1:] or expected.parts
    assert key_of(str(expected)) == str(PurePosixPath(*parts).with_suffix(""))
    with pytest.raises(ValueError, match="t.csv, line 2: expected a path inside its folder"):
        clean_paths([f"../{path}"], [2], "t.csv")


def test_columns_make_the_same_data_set_as_rows(tmp_path):
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / name)
    np.save(tmp_path / "c.npy", np.full((8, 8), 9, np.uint8))
    for names in (["a.png", "b.png"], ["a.png", "c.npy"]):
        files = [str(tmp_path / name) for name in names]
        columns = {"image": files, "label": np.array([0, 1]), "patient": ["p", "q"], "view": ["PA", ""], "path": files}
        for boxes in (None, [[[1.0, 2.0, 3.0, 4.0]], []], [[], []]):
            columns |= {} if boxes is None else {"boxes": boxes}
            made = columns_to_dataset(columns, ["healthy", "diseased"])
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            expected = to_dataset(rows, ["healthy", "diseased"])
            assert made.features == expected.features and made.column_names == expected.column_names
            for a, b in zip(made, expected, strict=True):
                assert np.array_equal(a.pop("image"), b.pop("image")) and a == b
    with pytest.raises(ValueError, match="empty"):
        columns_to_dataset({name: [] for name in ("image", "label", "patient", "view", "path")}, ["healthy"])
    columns = {
        "image": files[:1],
        "label": [0],
        "patient": [""],
        "view": [""],
        "path": files[:1],
        "boxes": [[[0, 0, 0, 1]]],
    }
    with pytest.raises(ValueError, match="expected a box"):
        columns_to_dataset(columns, ["healthy"])
