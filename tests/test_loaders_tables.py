"""MIMIC-CXR-JPG and PadChest: labels in large tables, each data set in the layout of its download."""

import csv
import gzip
import importlib.util
import json
import logging
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cxr_diffusers import build_dataset, load_mimic_cxr, load_padchest
from cxr_diffusers.cli import main
from cxr_diffusers.data import LOADERS, open_dataset
from cxr_diffusers.data.findings import class_id, match_names
from cxr_diffusers.data.padchest import parse_labels
from cxr_diffusers.data.tables import columns_of, read_csv
from cxr_diffusers.training.recipe import load_recipe
from helpers import save_image

ROOT = Path(__file__).parent.parent


def write_table(path, header, rows):
    """A CSV, packed if its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])


# MIMIC-CXR-JPG

LABELS = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
    "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
).split(",")
METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
).split(",")
# subject, study, its labels (None: no row in the table), [(dicom, view, split)]
STUDIES = [
    (
        10000032,
        50414267,
        {"No Finding": "1.0"},
        [("02aa804e-bde0afdd", "PA", "train"), ("174413ec", "LATERAL", "train")],
    ),
    (10000032, 53189527, {"Pleural Effusion": "1.0", "Edema": "0.0"}, [("2a2277a9", "AP", "train")]),
    (10000764, 57375967, {"Edema": "1.0", "Pleural Effusion": "0.0"}, [("096052b7", "AP", "train")]),
    (11000011, 51029426, {"Pleural Effusion": "-1.0"}, [("68b5c4b1", "PA", "train")]),
    (11000022, 52000001, {}, [("fffabebf", "", "train"), ("fffabec0", "AP", "train")]),
    (12000033, 53000001, None, [("ea030e7a", "PA", "train")]),
    (13000044, 54000001, {"No Finding": "1.0", "Support Devices": "1.0"}, [("d0b71acc", "AP", "test")]),
    (13000044, 54000002, {"Pneumonia": "1.0"}, [("d0b71acd", "PA", "test")]),
    (14000055, 55000001, {"Pneumonia": "1.0"}, [("aaaaaaaa", "PA", "validate")]),
]


@pytest.fixture
def mimic(tmp_path):
    root = tmp_path / "mimic-cxr-jpg"
    root.mkdir()
    images = [(subject, study, *image) for subject, study, _, images in STUDIES for image in images]
    for i, (subject, study, dicom, _, _) in enumerate(images):
        save_image(root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg", 20 * i)
    rows = [[d, p, s, "CHEST", v, 10, 12, 21800506, 213014.531, "", "", "Erect"] for p, s, d, v, _ in images]
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, rows)
    header = ["dicom_id", "study_id", "subject_id", "split"]
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", header, [[d, s, p, split] for p, s, d, _, split in images])
    rows = [[p, s, *(labels.get(name, "") for name in LABELS)] for p, s, labels, _ in STUDIES if labels is not None]
    write_table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *LABELS], rows)
    row = [10000032, 50414267, *("1.0" if name == "Cardiomegaly" else "" for name in LABELS)]
    write_table(root / "mimic-cxr-2.0.0-negbio.csv.gz", ["subject_id", "study_id", *LABELS], [row])
    return root


def names(dataset):
    return {Path(path).stem: label for path, label in zip(dataset["path"][:], dataset["label"][:], strict=True)}


def test_mimic_labels_are_those_of_the_study_and_views_those_of_the_image(mimic):
    dataset = load_mimic_cxr(mimic)
    assert names(dataset) == {"02aa804e-bde0afdd": 0, "2a2277a9": 1}
    assert dataset.features["label"].names == ["healthy", "pleural effusion"]
    assert dataset["patient"][:] == ["p10000032"] * 2 and dataset["view"][:] == ["PA", "AP"]
    assert dataset["path"][0] == str(mimic / "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg")
    assert [np.asarray(row["image"])[0, 0] for row in dataset] == [0, 40]
    # both findings of a study whose labels are all blank, and the edema, are other findings; no row: left out
    others = load_mimic_cxr(mimic, other=True)
    assert names(others) == {"02aa804e-bde0afdd": 0, "2a2277a9": 1, "096052b7": 2, "fffabec0": 2}
    all_views = load_mimic_cxr(mimic, other=True, frontal_only=False)
    assert names(all_views) == {**names(others), "174413ec": 0, "fffabebf": 2}
    assert dict(zip(names(all_views), all_views["view"][:], strict=True))["174413ec"] == ""
    assert names(load_mimic_cxr(mimic, views=["AP"])) == {"2a2277a9": 1}
    assert (
        "68b5c4b1" not in names(load_mimic_cxr(mimic))
        and names(load_mimic_cxr(mimic, uncertain="positive"))["68b5c4b1"]
    )


def test_mimic_splits_and_labellers_are_separate_tables(mimic):
    assert names(load_mimic_cxr(mimic, split="test", classes=["pneumonia"])) == {"d0b71acc": 0, "d0b71acd": 1}
    assert names(load_mimic_cxr(mimic, split="validate", classes=["Pneumonia"])) == {"aaaaaaaa": 1}
    assert len(load_mimic_cxr(mimic, split="all", classes=["Pneumonia"], other=True)) == 7
    negbio = load_mimic_cxr(mimic, labels="negbio", classes=["Cardiomegaly"])
    assert names(negbio) == {"02aa804e-bde0afdd": 1}
    # the radiologist's table has studies only, and another name for lung opacity
    header = ["study_id", *(name.replace("Lung Opacity", "Airspace Opacity") for name in LABELS)]
    row = [54000002, *("1.0" if name == "Lung Opacity" else "" for name in LABELS)]
    write_table(mimic / "mimic-cxr-2.1.0-test-set-labeled.csv", header, [row])
    dataset = load_mimic_cxr(mimic, split="test", labels="radiologist", classes=["Lung Opacity"])
    assert names(dataset) == {"d0b71acd": 1}


def test_mimic_patients_are_never_split_and_tables_may_be_unpacked(mimic):
    for path in mimic.glob("*.csv.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    options = dict(other=True, split="all", classes=["Pneumonia"], holdout=0.5)
    sides = set()
    for seed in range(6):
        aside = load_mimic_cxr(mimic, part="holdout", holdout_seed=seed, **options)
        rest = load_mimic_cxr(mimic, holdout_seed=seed, **options)
        assert not set(aside["patient"]) & set(rest["patient"]) and len(aside) + len(rest) == 7
        sides.add(len(aside))
    assert len(sides) > 1, "the seed decides who is set aside"
    assert len(load_mimic_cxr(mimic, one_per_patient=True)) == 1


def test_mimic_a_missing_image_is_named_or_left_out_on_request(mimic, caplog):
    gone = mimic / "files/p10/p10000032/s53189527/2a2277a9.jpg"
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv\.gz, line 4: no image .*2a2277a9\.jpg"):
        load_mimic_cxr(mimic)
    with caplog.at_level(logging.WARNING):
        assert names(load_mimic_cxr(mimic, skip_missing=True)) == {"02aa804e-bde0afdd": 0}
    assert "1 of 2 rows" in caplog.text and "2a2277a9" in caplog.text
    PIL.Image.new("L", (4, 4)).save(gone.with_suffix(".png"))  # a copy by `prepare`
    assert len(load_mimic_cxr(mimic)) == 2


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"classes": ["Mass"]}, ValueError, "unknown class 'Mass'.*Pneumonia"),
        ({"classes": "Edema"}, ValueError, "a list"),
        ({"split": "valid"}, ValueError, "train, validate, test or all, got 'valid'"),
        ({"labels": "chexbert"}, ValueError, "chexpert, negbio, radiologist, got 'chexbert'"),
        ({"labels": "radiologist"}, FileNotFoundError, r"test-set-labeled\.csv"),
        ({"views": "PA"}, ValueError, "a list"),
        ({"views": ["LATERAL"]}, ValueError, "'PA', 'AP', ''"),
        ({"views": ["PA", ""]}, ValueError, "expected `frontal_only` false with '' among `views`"),
        ({"root": "nowhere"}, FileNotFoundError, r"metadata\.csv"),
    ],
)
def test_mimic_wrong_options_are_refused(mimic, options, error, match):
    with pytest.raises(error, match=match):
        load_mimic_cxr(**{"root": mimic, **options})


@pytest.mark.parametrize(
    ("table", "old", "new", "match"),
    [
        ("metadata", "ViewPosition", "View", "expected column 'ViewPosition'"),
        ("metadata", "2a2277a9", "../2a2277a9", r"line 4: expected a path inside"),
        ("metadata", "2a2277a9", "x/2a2277a9", r"line 4: expected the name of a file"),
        ("metadata", "2a2277a9,10000032", "2a2277a9,x", "line 4: expected a number in column 'subject_id'"),
        (
            "metadata",
            "2a2277a9,10000032",
            "2a2277a9,",
            "line 4: expected a whole number in column 'subject_id', got ''",
        ),
        ("split", ",split", ",part", "expected column 'split'"),
        ("chexpert", "No Finding", "Nothing", "expected column 'No Finding'"),
        ("chexpert", "10000764,57375967", "10000032,50414267", "line 4: expected one row a study"),
        ("chexpert", "-1.0", "-2.0", "expected 1, 0, -1 or blank in 'Pleural Effusion', got -2"),
    ],
)
def test_mimic_a_wrong_cell_names_its_row(mimic, table, old, new, match):
    path = mimic / f"mimic-cxr-2.0.0-{table}.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(old.encode(), new.encode(), 1)))
    with pytest.raises(ValueError, match=match):
        load_mimic_cxr(mimic)


def test_a_packed_table_that_is_cut_short_is_named(mimic):
    path = mimic / "mimic-cxr-2.0.0-metadata.csv.gz"
    assert columns_of(path) == METADATA
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:40], b"dicom_id,subject_id\n"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"metadata\.csv\.gz, line \d"):
            load_mimic_cxr(mimic)


def test_rows_that_are_not_kept_leave_the_line_numbers_alone(tmp_path):
    write_table(tmp_path / "t.csv", ["a", "b"], [["x", 1], ["y", "two\nlines"], ["z", 3], ["z", 4]])
    table = read_csv(tmp_path / "t.csv", keep=lambda row: row["a"] == "z")
    assert table.index.tolist() == [5, 6] and table["b"].tolist() == ["3", "4"]


# PadChest

PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,PhotometricInterpretation_DICOM,Report,MethodLabel,Labels"
).split(",")
# image, folder, patient, projection, photometric interpretation, method, labels
IMAGES = [
    ("216840111366964012373310883942009152114636712_00-102-045.png", 0, "p1", "PA", 2, "Physician", "['normal']"),
    ("216840111366964012373310883942009152114636713.png", 0, "p1", "L", 2, "Physician", "['normal']"),
    ("a.png", 1, "p2", "PA", 1, "RNN_model", "['pleural effusion', 'Pacemaker ']"),
    ("b.png", 1, "p3", "AP_horizontal", 2, "Physician", "['loculated pleural effusion', 'COPD signs']"),
    ("c.png", 2, "p3", "AP", 2, "RNN_model", "['unchanged', 'pleural effusion']"),
    ("d.png", 2, "p4", "PA", 2, "Physician", "['unchanged']"),
    ("e.png", 2, "p4", "PA", 2, "Physician", "['exclude', 'pleural effusion']"),
    ("f.png", 2, "p5", "PA", 2, "RNN_model", ""),
    ("g.png", 2, "p6", "EXCLUDE", 2, "RNN_model", "['normal']"),
]


@pytest.fixture
def padchest(tmp_path):
    root = tmp_path / "padchest"
    rows = []
    for i, (image, folder, patient, projection, photometric, method, labels) in enumerate(IMAGES):
        (root / str(folder)).mkdir(parents=True, exist_ok=True)
        pixels = (1000 * i + np.arange(20 * 16).reshape(20, 16)).astype(np.uint16)
        PIL.Image.fromarray(pixels).save(root / str(folder) / image)
        row = [i, image, folder, 20140915, f"s{i}", patient, 1930.0, "F", "", projection, "Manual", "No"]
        rows.append([*row, f"MONOCHROME{photometric}", "sin hallazgos . \nnormal", method, labels])
    write_table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", PADCHEST, rows)
    return root


def test_padchest_labels_views_and_patients_are_those_of_the_table(padchest):
    dataset = load_padchest(padchest)
    healthy = Path(IMAGES[0][0]).stem
    assert names(dataset) == {healthy: 0, "a": 1, "c": 1}
    assert dataset["patient"][:] == ["p1", "p2", "p3"] and dataset["view"][:] == ["PA", "PA", "AP"]
    assert dataset.features["label"].names == ["healthy", "pleural effusion"]
    others = load_padchest(padchest, other=True)
    assert names(others) == {**names(dataset), "b": 2}
    assert names(load_padchest(padchest, classes=["copd SIGNS"])) == {healthy: 0, "b": 1}
    assert names(load_padchest(padchest, views=["AP"], other=True)) == {"b": 2, "c": 1}
    assert set(names(load_padchest(padchest, frontal_only=False))) == {*names(dataset), Path(IMAGES[1][0]).stem, "g"}
    assert names(load_padchest(padchest, physician_only=True, other=True)) == {healthy: 0, "b": 2}
    assert "g" in names(load_padchest(padchest, frontal_only=False, views=[""]))
    with pytest.raises(ValueError, match="expected `frontal_only` false with '' among `views`"):
        load_padchest(padchest, views=["PA", ""])


def test_padchest_patients_are_never_split(padchest):
    for seed in range(4):
        sides = []
        for part in ("train", "holdout"):
            try:
                options = dict(other=True, holdout=0.5, holdout_seed=seed, part=part)
                sides.append(load_padchest(padchest, **options)["patient"][:])
            except ValueError as error:
                assert "the data set is empty" in str(error)
                sides.append([])
        assert not set(sides[0]) & set(sides[1]) and sorted(sides[0] + sides[1]) == ["p1", "p2", "p3", "p3"]


def test_padchest_pixels_keep_16_bits_and_negatives_are_inverted(padchest):
    images = {Path(row["path"]).stem: row["image"] for row in load_padchest(padchest)}
    assert {image.mode for image in images.values()} == {"I;16"}
    np.testing.assert_array_equal(np.asarray(images["c"]), 4000 + np.arange(320).reshape(20, 16))
    np.testing.assert_array_equal(np.asarray(images["a"]), 2319 - np.arange(320).reshape(20, 16))


def test_images_are_decoded_on_access_and_survive_filtering_and_saving(padchest, tmp_path):
    dataset = load_padchest(padchest).filter(lambda label: label == 1, input_columns="label")
    dataset.save_to_disk(tmp_path / "saved")
    opened = type(dataset).load_from_disk(tmp_path / "saved")
    np.testing.assert_array_equal(np.asarray(opened[0]["image"]), np.asarray(dataset[0]["image"]))
    (padchest / "1" / "a.png").write_bytes(b"no image")
    assert dataset["label"][:] == [1, 1]
    with pytest.raises(ValueError, match=r"a\.png"):
        dataset[0]["image"]


def test_padchest_a_missing_image_is_named_and_other_places_are_searched(padchest):
    (padchest / "2" / "c.png").rename(padchest / "c.png")
    assert len(load_padchest(padchest)) == 3, "archives unpacked into one folder"
    (padchest / "c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"160K_01\.02\.19\.csv\.gz, line \d+: no image .*2/c\.png"):
        load_padchest(padchest)
    assert len(load_padchest(padchest, skip_missing=True)) == 2


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("Projection", "View", "expected column 'Projection'"),
        ("a.png", "../a.png", "expected a path inside"),
        ("a.png,1", "a.png,..", "expected a path inside"),
        (",p2,", ",,", "expected a patient"),
        ("\"['pleural effusion', 'Pacemaker ']\"", "pleural effusion", "expected a list of labels"),
        ("\"['pleural effusion', 'Pacemaker ']\"", "[1]", "expected a list of labels"),
    ],
)
def test_padchest_a_wrong_cell_names_its_row(padchest, old, new, match):
    [path] = padchest.glob("*.csv.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    assert old in text
    path.write_bytes(gzip.compress(text.replace(old, new, 1).encode()))
    with pytest.raises(ValueError, match=match):
        load_padchest(padchest)


def test_padchest_wrong_options_are_refused(padchest, tmp_path):
    with pytest.raises(ValueError, match="unknown class 'effusion', expected some of .*pleural effusion"):
        load_padchest(padchest, classes=["effusion"])
    with pytest.raises(FileNotFoundError, match="PADCHEST"):
        load_padchest(tmp_path)


def test_labels_are_a_list_of_texts():
    assert parse_labels("['COPD signs', ' pleural effusion', '']", "x") == ["copd signs", "pleural effusion"]
    assert parse_labels(" ", "x") == parse_labels("nan", "x") == parse_labels("[]", "x") == []
    for text in ("['a'", "('a',)", "['a', 3]", "__import__('os')", "[" * 500):
        with pytest.raises(ValueError, match="x: expected a list"):
            parse_labels(text, "x")


def test_the_first_named_finding_takes_precedence():
    assert match_names(["MASS", "effusion"], ["Mass", "Fluid"], {"effusion": "Fluid"}) == ["Mass", "Fluid"]
    options = dict(classes=["Mass", "Fluid"], healthy=False, other=True)
    assert class_id({"Fluid", "Mass"}, **options) == 1 and class_id({"Fluid"}, **options) == 2
    assert class_id({"Hernia"}, **options) == 3 and class_id({"Hernia"}, **{**options, "other": False}) == -1
    assert class_id(set(), **options) == -1 and class_id(set(), **{**options, "healthy": True}) == 0


# from the command line


def test_a_line_opens_a_data_set_with_nested_brackets(mimic):
    line = f"mimic_cxr:root={mimic},split=all,classes=[Pneumonia, Edema],views=[PA]"
    assert names(open_dataset(line)) == names(
        build_dataset("mimic_cxr", root=mimic, split="all", classes=["Pneumonia", "Edema"], views=["PA"])
    )


def test_evaluate_takes_the_data_set_by_its_name(mimic, pipeline, tmp_path, capsys):
    for path in mimic.rglob("*.jpg"):  # images of one value are refused
        PIL.Image.linear_gradient("L").resize((12, 10)).save(path)
    pipeline.save_pretrained(tmp_path / "model")
    data = f"mimic_cxr:root={mimic},split=all,classes=[Pneumonia],other=true"
    command = ["evaluate", data, "--out", str(tmp_path / "out"), "--bootstrap", "5", "--model", str(tmp_path / "model")]
    assert main([*command, "--num-inference-steps", "4", "--noise-level", "300"]) == 0
    assert "image" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_images"] == 7
    assert (
        main(["evaluate", "mimic_cxr:rot=/x", "--out", str(tmp_path / "no"), "--model", str(tmp_path / "model")]) == 2
    )
    assert "unknown key 'rot'" in capsys.readouterr().err


def test_a_recipe_trains_on_the_data_set_by_its_name(padchest, tmp_path):
    spec = importlib.util.spec_from_file_location("train_cfg", ROOT / "training" / "train_cfg.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    small = ["unet.block_out_channels=[8,16,16]", "unet.attention_head_dim=8", "unet.norm_num_groups=4"]
    small += ["unet.attn_norm_num_groups=4", "train.max_steps=1", "train.batch_size=2", "train.validation_images=2"]
    data = ["data.name=padchest", f"data.root={padchest}", "data.classes=[pleural effusion]"]
    run = tmp_path / "run"
    program.main([str(ROOT / "configs" / "phantom_cfg_32.yaml"), *data, *small, f"train.output_dir={run}"])
    assert json.loads((run / "model_index.json").read_text())["_class_name"][1] == "CFGAnomalyPipeline"


# the page of data sets

PAGE = (ROOT / "docs" / "datasets.md").read_text()


def shown_lines(program):
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    for line in blocks.splitlines():
        if line.startswith(program):
            yield shlex.split(line.partition("&&")[0], comments=True)[len(program.split()) :]


def keys_are_refused(call):
    """Whether a call fails because of a keyword; that /data is missing on this machine is no fault of the page."""
    try:
        call()
    except ValueError as error:
        return bool(re.search(r"unknown key|give '", str(error)))
    except OSError:
        return False
    return False


def test_every_line_of_the_page_has_keys_that_its_loader_knows():
    data_arguments = [
        line[0] for line in [*shown_lines("cxr-diffusers evaluate"), *shown_lines("cxr-diffusers prepare")]
    ]
    data_arguments = [data for data in data_arguments if ":" in data]
    assert {data.partition(":")[0] for data in data_arguments} == set(LOADERS) - {"hub", "packed", "phantom"}
    assert not [data for data in data_arguments if keys_are_refused(lambda data=data: open_dataset(data))]
    assert keys_are_refused(lambda: open_dataset("nih:rot=/data/nih"))
    count = 0
    for name, *overrides in shown_lines("cxr-diffusers train"):
        recipe = load_recipe(name, overrides)
        for keys in (recipe.data, recipe.data | getattr(recipe, "validation", {})):
            assert not keys_are_refused(lambda keys=keys: build_dataset(**keys)), (overrides, keys)
            if "images" in keys:
                assert not keys_are_refused(lambda keys=keys: build_dataset(**keys["images"])), keys
        count += 1
    assert count >= 12
    assert not [name for name in LOADERS if f"`{name}`" not in PAGE]
