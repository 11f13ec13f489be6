"""VinDr-CXR in its own layout: DICOM files, three readers an image, a consensus for the test split."""

import numpy as np
import pandas as pd
import pytest

from cxr_diffusers import build_dataset, load_table, load_vindr, load_vindr_pcxr
from cxr_diffusers.data import prepare
from cxr_diffusers.data.vindr import read_labels, vote
from helpers import write_dicom

FINDINGS = ["Aortic enlargement", "Cardiomegaly", "Pleural effusion", "No finding"]
# image -> what each of its readers saw
SEEN = {
    "healthy": [["No finding"]] * 3,
    "effusion": [["Pleural effusion"], ["Pleural effusion", "Cardiomegaly"], ["No finding"]],
    "heart": [["Cardiomegaly"], ["Cardiomegaly"], ["Pleural effusion"]],
    "disputed": [["Pleural effusion"], ["Cardiomegaly"], ["Aortic enlargement"]],
}
CONSENSUS = {"t0": ["No finding"], "t1": ["Pleural effusion", "Cardiomegaly"]}


def box_of(finding, reader):
    return [10.0 * FINDINGS.index(finding) + reader, 4.0, 10.0 * FINDINGS.index(finding) + reader + 8, 24.0]


@pytest.fixture
def vindr(tmp_path):
    root = tmp_path / "vindr-cxr"
    for split, names in (("train", SEEN), ("test", CONSENSUS)):
        (root / split).mkdir(parents=True)
        for i, name in enumerate(names):
            pixels = (np.arange(40 * 48).reshape(40, 48) + 40 * i).astype(np.uint16)
            photometric = "MONOCHROME1" if i == 1 else "MONOCHROME2"
            write_dicom(root / split / f"{name}.dicom", pixels, 12, photometric, PatientID="")
    (root / "annotations").mkdir()
    labels, boxes = [], []
    for name, readers in SEEN.items():
        for i, seen in enumerate(readers):
            labels.append({"image_id": name, "rad_ID": f"R{i}", **{f: int(f in seen) for f in FINDINGS}})
            for f in seen:
                corners = [None] * 4 if f == "No finding" else box_of(f, i)
                boxes.append([name, f"R{i}", f, *corners])
    corners = ["x_min", "y_min", "x_max", "y_max"]
    pd.DataFrame(labels).to_csv(root / "annotations" / "image_labels_train.csv", index=False)
    table = pd.DataFrame(boxes, columns=["image_id", "rad_id", "class_name", *corners])
    table.to_csv(root / "annotations" / "annotations_train.csv", index=False)
    labels = [{"image_id": name, **{f: int(f in seen) for f in FINDINGS}} for name, seen in CONSENSUS.items()]
    pd.DataFrame(labels).to_csv(root / "annotations" / "image_labels_test.csv", index=False)
    boxes = [[name, f, *box_of(f, 0)] for name, seen in CONSENSUS.items() for f in seen if f != "No finding"]
    table = pd.DataFrame(boxes, columns=["image_id", "class_name", *corners])
    table.to_csv(root / "annotations" / "annotations_test.csv", index=False)
    return root


def names(dataset):
    return dict(zip(dataset["patient"][:], dataset["label"][:], strict=True))


def test_a_prior_gets_both_splits_merged_and_no_labels(vindr):
    dataset = build_dataset("vindr", root=vindr, splits=["train", "test"])
    assert set(names(dataset)) == {*SEEN, *CONSENSUS} and set(dataset["label"][:]) == {0}
    assert dataset.features["label"].names == ["radiograph"]
    row = dataset[dataset["patient"][:].index("effusion")]
    assert row["image"].mode == "I;16" and row["image"].size == (48, 40)
    assert np.asarray(row["image"])[0, 0] > np.asarray(row["image"])[-1, -1], "MONOCHROME1 is turned over"
    for csv in (vindr / "annotations").glob("*.csv"):
        csv.unlink()
    assert len(load_vindr(vindr)) == len(SEEN), "no table is needed"


def test_two_of_three_readers_decide_and_a_consensus_decides_alone(vindr):
    dataset = load_vindr(vindr, splits=["train", "test"], classes=["pleural effusion"])
    assert names(dataset) == {"healthy": 0, "effusion": 1, "t0": 0, "t1": 1}
    assert dataset.features["label"].names == ["healthy", "pleural effusion"]
    with_others = load_vindr(vindr, classes=["Pleural effusion"], other=True)
    assert names(with_others) == {"healthy": 0, "effusion": 1, "heart": 2}
    one_will_do = load_vindr(vindr, classes=["Pleural effusion"], votes=1)
    assert names(one_will_do) == {"healthy": 0, "effusion": 1, "heart": 1, "disputed": 1}
    assert names(load_vindr(vindr, classes=["Cardiomegaly", "Pleural effusion"], votes=1))["effusion"] == 1
    voted = vote(read_labels(vindr, "train"))
    assert not voted.loc["disputed"].any()


def test_boxes_are_those_of_the_findings_that_were_voted_for(vindr):
    dataset = load_vindr(vindr, splits=["train", "test"], boxes=True)
    boxes = dict(zip(dataset["patient"][:], dataset["boxes"][:], strict=True))
    assert boxes["effusion"] == [[20, 4, 8, 20], [21, 4, 8, 20]], "both readers', x y w h; not the lone cardiomegaly"
    assert boxes["healthy"] == boxes["disputed"] == boxes["t0"] == []
    assert len(boxes["t1"]) == 2
    named = load_vindr(vindr, splits=["test"], classes=["Cardiomegaly"], boxes=True)
    assert dict(zip(named["patient"][:], named["boxes"][:], strict=True))["t1"] == [[10, 4, 8, 20]]


def test_kaggles_single_table_serves_as_both(vindr, tmp_path):
    table = pd.read_csv(vindr / "annotations" / "annotations_train.csv")
    for csv in (vindr / "annotations").glob("*.csv"):
        csv.unlink()
    table.assign(class_id=0).to_csv(vindr / "train.csv", index=False)
    dataset = load_vindr(vindr, classes=["Pleural effusion"], boxes=True)
    assert names(dataset) == {"healthy": 0, "effusion": 1}
    assert [len(boxes) for boxes in dataset["boxes"][:]] == [2, 0]


def test_a_small_copy_gives_the_same_rows_with_its_boxes_moved(vindr, tmp_path):
    summary = prepare(vindr, tmp_path / "small", size=24)
    assert summary["images"] == 6 and not summary["skipped"]
    options = dict(splits=["train", "test"], classes=["Pleural effusion"], boxes=True)
    ours, theirs = load_vindr(tmp_path / "small", **options), load_vindr(vindr, **options)
    assert names(ours) == names(theirs) and {row["image"].size for row in ours} == {(24, 24)}
    for a, b in zip(ours["boxes"][:], theirs["boxes"][:], strict=True):
        for (x, y, w, h), (x0, y0, w0, h0) in zip(a, b, strict=True):
            assert np.allclose([x, y, w, h], [x0 / 2, y0 / 2 + 2, w0 / 2, h0 / 2], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"classes": ["Effusion"]}, ValueError, "unknown class 'Effusion'.*Pleural effusion"),
        ({"splits": ["valid"]}, ValueError, "train and test"),
        ({"splits": "train"}, ValueError, "a list"),
        ({"other": True}, ValueError, "expected `classes` beside `other`, got none"),
        ({"classes": ["Pleural effusion"], "votes": 0}, ValueError, "expected `votes` of 1 or more, got 0"),
        ({"root": "nowhere"}, FileNotFoundError, "IMAGE_ID.dicom"),
    ],
)
def test_missing_files_and_invalid_options_are_refused(vindr, options, error, match):
    with pytest.raises(error, match=match):
        load_vindr(**{"root": vindr, **options})


def test_an_image_without_labels_and_a_missing_table_are_told(vindr):
    csv = vindr / "annotations" / "image_labels_train.csv"
    table = pd.read_csv(csv)
    table[table["image_id"] != "heart"].to_csv(csv, index=False)
    with pytest.raises(ValueError, match="no labels of train image heart"):
        load_vindr(vindr, classes=["Cardiomegaly"])
    csv.unlink()
    with pytest.raises(FileNotFoundError, match="image_labels_train.csv"):
        load_vindr(vindr, classes=["Cardiomegaly"])


def test_rows_of_a_table_can_be_chosen_by_a_column(vindr, tmp_path):
    prepare(vindr, tmp_path / "small", size=8)
    pd.DataFrame({"file": ["train/heart.png", "test/t0.png", "gone.png"], "split": ["a", "b", "c"]}).to_csv(
        tmp_path / "small" / "list.csv", index=False
    )
    options = dict(label="radiograph", classes=["radiograph"], root=tmp_path / "small")
    dataset = load_table("list.csv", where={"split": "b"}, **options)
    assert [path.rsplit("/", 1)[1] for path in dataset["path"][:]] == ["t0.png"]
    assert len(load_table("list.csv", where={"split": ["a", "b"]}, **options)) == 2
    with pytest.raises(ValueError, match="'part'"):
        load_table("list.csv", where={"part": "b"}, **options)
    with pytest.raises(FileNotFoundError, match="line 4"):
        load_table("list.csv", **options)


def test_dicom_files_are_decoded_on_access(vindr):
    dataset = load_vindr(vindr, classes=["Pleural effusion"])
    (vindr / "train" / "effusion.dicom").write_bytes(b"no image")
    assert sorted(dataset["label"][:]) == [0, 1]
    with pytest.raises(ValueError, match="effusion.dicom"):
        dataset[dataset["label"][:].index(1)]["image"]


# VinDr-PCXR: one radiologist an image, diseases in one table, local findings with boxes in the other

DISEASES = ["No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Pneumonia"]
# image -> its diseases, its local findings with corners
CHILDREN = {
    "well": (["No finding"], []),
    "pneumonia": (["Pneumonia"], [("Consolidation", (4, 8, 20, 30)), ("Other opacity", (30.5, 2, 44, 10.5))]),
    "bronchitis": (["Bronchitis"], [("Bronchial thickening", (10, 10, 20, 20))]),
    "heart": (["No finding"], [("Cardiomegaly", (12, 14, 40, 36))]),
}


@pytest.fixture
def pcxr(tmp_path):
    root = tmp_path / "vindr-pcxr"
    (root / "train").mkdir(parents=True)
    labels, boxes = (
        [["image_id", "rad_ID", *DISEASES]],
        [["image_id", "rad_ID", "class_name", "x_min", "y_min", "x_max", "y_max", "class_id"]],
    )
    for name, (diseases, findings) in CHILDREN.items():
        pixels = np.full((40, 48), 100, np.uint16)
        for _, (x0, y0, x1, y1) in findings:
            pixels[int(y0) : int(y1), int(x0) : int(x1)] = 3000
        write_dicom(root / "train" / f"{name}.dicom", pixels, 12, PatientID="")
        labels.append([name, "R1", *(float(disease in diseases) for disease in DISEASES)])
        boxes += [[name, "R1", finding, *corners, 3] for finding, corners in findings]
        boxes += [] if findings else [[name, "R1", "No finding", 0, 0, 1, 1, 36]]
    for name, rows in (("image_labels_train", labels), ("annotations_train", boxes)):
        pd.DataFrame(rows[1:], columns=rows[0]).to_csv(root / f"{name}.csv", index=False)
    return root


def test_pcxr_diseases_and_local_findings_are_classes(pcxr):
    dataset = load_vindr_pcxr(pcxr, classes=["pneumonia"])
    assert names(dataset) == {"well": 0, "pneumonia": 1}, "an image with a local finding is not healthy"
    assert dataset.features["label"].names == ["healthy", "pneumonia"]
    both = build_dataset("vindr_pcxr", root=pcxr, classes=["Cardiomegaly", "Pneumonia"], other=True)
    assert names(both) == {"well": 0, "heart": 1, "pneumonia": 2, "bronchitis": 3}
    assert names(load_vindr_pcxr(pcxr)) == dict.fromkeys(CHILDREN, 0)
    with pytest.raises(ValueError, match="unknown class 'No finding'.*Bronchitis.*Cardiomegaly"):
        load_vindr_pcxr(pcxr, classes=["No finding"])
    with pytest.raises(FileNotFoundError, match="test/IMAGE_ID.dicom"):
        load_vindr_pcxr(pcxr, splits=["train", "test"])


def test_pcxr_boxes_lie_on_the_local_findings(pcxr):
    dataset = load_vindr_pcxr(pcxr, classes=["Pneumonia"], other=True, boxes=True)
    boxes = dict(zip(dataset["patient"][:], dataset["boxes"][:], strict=True))
    assert boxes == {"well": [], "pneumonia": [[4, 8, 16, 22], [30.5, 2, 13.5, 8.5]]} | {
        "bronchitis": [[10, 10, 10, 10]],
        "heart": [[12, 14, 28, 22]],
    }, "a disease has no boxes of its own"
    [image] = [row["image"] for row in dataset if row["patient"] == "heart"]
    x, y, w, h = map(int, boxes["heart"][0])
    bright = np.asarray(image) > np.asarray(image).mean()
    assert bright[y : y + h, x : x + w].all() and bright.sum() == w * h
    named = load_vindr_pcxr(pcxr, classes=["Other opacity"], boxes=True)
    assert dict(zip(named["patient"][:], named["boxes"][:], strict=True))["pneumonia"] == [[30.5, 2, 13.5, 8.5]]


def test_pcxr_a_box_or_an_image_without_its_table_is_named(pcxr):
    csv = pcxr / "annotations_train.csv"
    csv.write_text(csv.read_text().replace("heart,", "nobody,"))
    with pytest.raises(ValueError, match=r"annotations_train\.csv, line \d: a box of 'nobody'"):
        load_vindr_pcxr(pcxr, boxes=True)
    csv.unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations_train\.csv"):
        load_vindr_pcxr(pcxr, classes=["Pneumonia"])
