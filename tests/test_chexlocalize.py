"""CheXlocalize's files and its protocol, on files in its format made here with pycocotools."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools import mask as coco

from cxr_diffusers import load_chexlocalize
from cxr_diffusers.cli import main
from cxr_diffusers.data import open_dataset
from cxr_diffusers.data.chexlocalize import DEVICES, TASKS, cxr_id, decode, encode, read_segmentations, run_lengths
from cxr_diffusers.evaluation import chexlocalize as protocol
from cxr_diffusers.evaluation import evaluate, evaluate_chexlocalize
from cxr_diffusers.evaluation.chexlocalize import ANY, THRESHOLDS, open_split
from cxr_diffusers.pipelines import AnomalyOutput
from cxr_diffusers.pipelines.cxr_anomaly import score_map
from cxr_diffusers.pipelines.cxr_images import prepare_image

EFFUSION, EDEMA = "Pleural Effusion", "Edema"


class Bright:
    """A detector without weights: bright pixels are abnormal."""

    def __call__(self, image, output_type="np"):
        prepared = prepare_image(image, 48, scaling="dtype", data_range=(0, 1))
        maps, pixels = prepared[:, 0], prepared.permute(0, 2, 3, 1).numpy()
        return AnomalyOutput(pixels, pixels, maps.numpy(), score_map(maps).numpy())


def release(folder, split, patients, height=40, width=48, views=("view1_frontal",)):
    """A folder and a JSON as they are released. One patient in three has no segmentation at all.

    The lesion is a ramp of light; edema is all of it, effusion its bright end, so each has its own best threshold.
    """
    rng = np.random.default_rng(len(patients))
    segmentations = {}
    for k, patient in enumerate(patients):
        for view in views:
            image = rng.integers(20, 50, (height, width)).astype(np.uint8)
            masks = {task: np.zeros((height, width), bool) for task in TASKS}
            if k % 3 != 2:
                task, light, first = (EFFUSION, 130, 7) if k % 2 else (EDEMA, 240, 0)
                y, x = rng.integers(2, height - 14), rng.integers(2, width - 14)
                masks[task][y : y + 10, x + first : x + 12] = True
                masks[DEVICES][:2] = True
                image[y : y + 9, x : x + 12] = light * np.linspace(0.25, 1, 12) + rng.integers(0, 15, (9, 12))
                segmentations[f"{patient}_study1_{view}"] = {
                    task: {
                        "size": list(mask.shape),
                        "counts": coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode(),
                    }
                    for task, mask in masks.items()
                }
            path = folder / "CheXpert" / split / patient / "study1" / f"{view}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    file = folder / f"gt_segmentations_{split}.json"
    file.write_text(json.dumps(segmentations))
    return folder / "CheXpert" / split, file


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    test = release(folder, "test", [f"patient6{i:04d}" for i in range(12)])
    return test, release(folder, "val", [f"patient7{i:04d}" for i in range(9)])


@pytest.fixture(scope="module")
def evaluated(released, tmp_path_factory):
    """(summary, output folder) of a run with thresholds from the validation split."""
    test, validation = (open_split(*split) for split in released)
    out = tmp_path_factory.mktemp("evaluated")
    return evaluate_chexlocalize({"bright": Bright()}, test, validation, output_dir=out, progress=False), out


def by_hand(images, segmentations, task, threshold, full):
    """IoU as defined in the paper, one image at a time, with Python's sets of pixels."""
    values = []
    for name in sorted(images if full else segmentations):
        pixels = images[name].astype(float) / 255
        stretched = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        marked = set(zip(*np.where(stretched > threshold), strict=True))
        truth = (
            set(zip(*np.where(coco.decode(segmentations[name][task])), strict=True)) if name in segmentations else set()
        )
        defined = marked | truth if full else marked and truth
        values.append(len(marked & truth) / len(marked | truth) if defined else np.nan)
    return np.array(values)


def test_the_id_of_an_image_follows_from_its_path():
    assert cxr_id("/data/CheXpert/test/patient64741/study1/view1_frontal.jpg") == "patient64741_study1_view1_frontal"


def test_a_mask_is_read_and_written_as_pycocotools_does():
    mask = np.random.default_rng(0).random((9, 7)) < 0.4
    other = np.random.default_rng(1).random((9, 7)) < 0.4
    cell = encode(mask)
    assert json.loads(json.dumps(cell)) == cell and cell["size"] == [9, 7]
    assert (coco.decode(cell) == mask).all()
    assert (decode({EDEMA: cell, EFFUSION: encode(other)}, [EDEMA, EFFUSION]) == mask | other).all()
    # as the released files write "no segmentation" of 2320 x 2828 pixels
    assert not decode({EDEMA: {"size": [2320, 2828], "counts": "PVWX6"}}, [EDEMA]).any()
    assert not decode({EDEMA: cell}, [EFFUSION]).any() and decode({EDEMA: cell}, [EFFUSION]).shape == (9, 7)


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        mask = rng.random((300, 200)) < share
        lengths = run_lengths(encode(mask)["counts"])
        flat = mask.ravel("F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        expected = np.diff(np.r_[0, edges, flat.size])
        assert lengths.tolist() == ([0] if flat[0] else []) + expected.tolist()
    blocks = np.zeros((2320, 2828), bool)
    blocks[100:900, 500:2000] = True
    assert run_lengths(encode(blocks)["counts"]).sum() == blocks.size


@pytest.mark.parametrize("n", range(40))
def test_run_lengths_that_do_not_fill_their_mask_never_reach_pycocotools(tmp_path, n):
    """One character is put in, taken out or changed: the same mask's size, or an error at once."""
    rng = np.random.default_rng(n)
    cell = encode(rng.random((64, 48)) < 0.1)
    text, at = cell["counts"], rng.integers(len(cell["counts"]))
    letter = chr(rng.integers(33, 127))
    cell["counts"] = text[:at] + [letter, "", letter][n % 3] + text[at + n % 2 :]
    (tmp_path / "s.json").write_text(json.dumps({"patient1_study1_view1_frontal": {EDEMA: cell}}))
    try:
        entry = read_segmentations(tmp_path / "s.json")["patient1_study1_view1_frontal"]
    except ValueError as error:
        assert "s.json: 'patient1_study1_view1_frontal', 'Edema'" in str(error)
    else:
        assert decode(entry, [EDEMA]).shape == (64, 48)


@pytest.mark.parametrize(
    "cell, match",
    [
        ({"size": [64, 48], "counts": [64 * 48]}, "expected run lengths as a text"),
        ({"size": [64, 48], "counts": ""}, "expected run lengths as a text"),
        ({"size": [64, 48], "counts": "\u00e9"}, "text of run lengths is invalid"),
        ({"size": [64, 48], "counts": "oooooooooo0"}, "text of run lengths is invalid"),
        ({"size": [64, 48], "counts": "PP31"}, "do not fill 64 x 48 pixels"),
        ({"size": [64.0, 48], "counts": "PP3"}, "expected a size"),
        ({"size": "64", "counts": "PP3"}, "expected a size"),
        ({"size": [0, 48], "counts": "0"}, "expected 1 to"),
        ({"size": [60000, 60000], "counts": "0"}, "expected 1 to 50,000,000 pixels"),
    ],
)
def test_a_cell_that_is_no_mask_is_named(tmp_path, cell, match):
    entry = {EFFUSION: {"size": [64, 48], "counts": "PP3"}, EDEMA: cell}
    (tmp_path / "s.json").write_text(json.dumps({"patient1_study1_view1_frontal": entry}))
    with pytest.raises(ValueError, match=f"'Edema': .*{match}"):
        read_segmentations(tmp_path / "s.json")
    entry[EDEMA] = {"size": [48, 64], "counts": "PP3"}
    (tmp_path / "s.json").write_text(json.dumps({"patient1_study1_view1_frontal": entry}))
    with pytest.raises(ValueError, match=r"expected the size \[64, 48\] of the image's other masks"):
        read_segmentations(tmp_path / "s.json")


def test_masks_of_another_size_than_their_image_are_refused_before_they_are_decoded(tmp_path):
    root, file = release(tmp_path, "test", ["patient1"])
    Image.new("L", (9, 9)).save(root / "patient1" / "study1" / "view1_frontal.png")
    with pytest.raises(ValueError, match=r"its segmentation's size \[40, 48\], got \[9, 9\]: .*view1_frontal.png"):
        load_chexlocalize(root, file)


def test_the_data_set_has_the_union_of_the_tasks_as_its_mask(released):
    (root, file), _ = released
    content = json.loads(file.read_text())
    dataset = load_chexlocalize(root, file)
    assert len(dataset) == 12 and sum(row["mask"] is not None for row in dataset) == len(content) == 8
    for row in dataset:
        entry = content.get(cxr_id(row["path"]))
        if entry is None:
            assert row["label"] == -1 and row["mask"] is None  # not segmented, which does not mean healthy
        else:
            union = coco.decode(entry[EFFUSION]) | coco.decode(entry[EDEMA])  # without the device on the upper rim
            assert ((np.asarray(row["mask"]) > 0) == (union > 0)).all() and row["label"] == 1
    only = load_chexlocalize(root, file, tasks=["pleural effusion"])
    assert sum(only["label"][i] == 1 for i in range(12)) == 4
    assert only.features["label"].names == ["healthy", "pleural effusion"]


def test_images_and_masks_shrink_together(released):
    (root, file), _ = released
    whole, small = (load_chexlocalize(root, file, size=size) for size in (None, 24))
    for a, b in zip(whole, small, strict=True):
        assert a["image"].size == (48, 40) and b["image"].size == (24, 20)
        if b["mask"] is not None:
            assert b["mask"].size == (24, 20) and set(np.unique(b["mask"])) <= {0, 255}
            assert np.mean(np.asarray(b["mask"]) > 0) == pytest.approx(np.mean(np.asarray(a["mask"]) > 0), abs=0.03)
            y, x = np.unravel_index(np.argmax(b["image"]), (20, 24))  # the lesion is the brightest part
            assert np.asarray(b["mask"])[y, x]
    assert load_chexlocalize(root, file, size=4000)[0]["image"].size == (48, 40)


def test_a_folder_above_does_not_mix_the_splits(released, tmp_path):
    (root, file), _ = released
    assert load_chexlocalize(root.parent.parent, file)["path"] == load_chexlocalize(root, file)["path"]


def test_the_data_set_is_evaluated_as_any_other(released):
    (root, file), _ = released
    dataset = open_dataset(f"chexlocalize:root={root},segmentations={file},tasks=[Edema]")
    summary = evaluate(Bright(), dataset, n_bootstrap=20, progress=False).summary
    assert summary["n_images"] == 12 and summary["n_with_region"] == 4
    assert summary["rows"]["method"]["hit_rate"]["value"] == 1


def test_lateral_images_belong_to_the_protocol_but_may_be_left_out(tmp_path):
    split = release(tmp_path, "val", ["patient1", "patient2"], views=("view1_frontal", "view2_lateral"))
    assert len(open_split(*split).images) == 4 and len(open_split(*split).segmentations) == 4
    frontal = open_split(*split, frontal_only=True)
    assert len(frontal.images) == 2 and set(frontal.segmentations) == {
        f"patient{i}_study1_view1_frontal" for i in (1, 2)
    }
    assert len(load_chexlocalize(*split)) == 2 and len(load_chexlocalize(*split, frontal_only=False)) == 4


def test_iou_is_that_of_the_paper_on_both_slices(released, evaluated):
    (root, file), _ = released
    summary, out = evaluated
    segmentations = json.loads(file.read_text())
    images = {cxr_id(path): np.asarray(Image.open(path)) for path in root.rglob("*.png")}
    table = pd.read_csv(out / "per_image.csv").query("method == 'bright'")
    # the model's square is as wide as the images are, so the maps are the images
    for task in (EFFUSION, EDEMA):
        threshold = summary["thresholds"]["bright"][task]
        own = table[table.region == task]
        expected = by_hand(images, segmentations, task, threshold, full=False)
        assert own[own.covered].iou.to_numpy() == pytest.approx(expected, nan_ok=True, abs=1e-6)
        assert summary["rows"]["bright"][task]["miou"]["value"] == pytest.approx(np.nanmean(expected))
        assert np.isfinite(expected).sum() == summary["n_with"][task] == 4
        everything = by_hand(images, segmentations, task, threshold, full=True)
        assert own.iou_full.to_numpy() == pytest.approx(everything, nan_ok=True, abs=1e-6)
        assert summary["rows"]["bright"][task]["miou_full"]["value"] == pytest.approx(np.nanmean(everything))
    assert np.isnan(summary["rows"]["bright"]["Cardiomegaly"]["miou"]["value"])  # nobody has it


def test_a_threshold_is_the_best_of_the_validation_split_by_pathology(released, evaluated):
    _, (root, file) = released
    thresholds = evaluated[0]["thresholds"]["bright"]
    segmentations = json.loads(file.read_text())
    images = {cxr_id(path): np.asarray(Image.open(path)) for path in root.rglob("*.png")}
    for task in (EFFUSION, EDEMA):
        means = [np.nanmean(by_hand(images, segmentations, task, t, full=False)) for t in THRESHOLDS]
        assert thresholds[task] == THRESHOLDS[int(np.argmax(means))]
    assert thresholds[EFFUSION] > thresholds[EDEMA]
    assert THRESHOLDS == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert thresholds["Lung Lesion"] == thresholds[ANY]  # no image to choose by


def test_the_maximum_is_the_most_representative_point(released, evaluated):
    summary, out = evaluated
    content = json.loads(released[0][1].read_text())
    points = json.loads((out / "bright" / "points.json").read_text())
    hits = []
    for name, entry in content.items():
        column, row = points[name][EDEMA][0]
        if coco.decode(entry[EDEMA]).any():
            hits.append(coco.decode(entry[EDEMA])[row, column])
    assert summary["rows"]["bright"][EDEMA]["hit_rate"]["value"] == np.mean(hits) == 1
    assert summary["rows"]["centre prior"][EDEMA]["hit_rate"]["value"] < 1


def test_predictions_are_written_as_their_script_reads_them(released, evaluated):
    out = evaluated[1]
    segmentations = read_segmentations(out / "bright" / "segmentations.json")
    table = pd.read_csv(out / "per_image.csv").query("method == 'bright' and covered")
    content = json.loads(released[0][1].read_text())
    assert len(segmentations) == 12 and all(set(entry) == set(TASKS) for entry in segmentations.values())
    for task in (EFFUSION, EDEMA):
        for name, entry in content.items():
            marked, truth = coco.decode(segmentations[name][task]), coco.decode(entry[task])
            if truth.any():
                line = table[(table.region == task) & (table.cxr_id == name)]
                assert line.iou.item() == pytest.approx((marked & truth).sum() / (marked | truth).sum())


def test_the_interval_is_the_25th_and_the_975th_of_a_thousand_replicates():
    values = np.random.default_rng(0).random(30)
    values[::7] = np.nan
    interval = protocol.bootstrap(values, 1000)
    np.random.seed(0)  # as their script does it, with pandas
    frame = pd.DataFrame({"x": values})
    replicates = sorted(frame.iloc[np.random.choice(30, size=30, replace=True)]["x"].mean() for _ in range(1000))
    assert interval["low"] == pytest.approx(replicates[24]) and interval["high"] == pytest.approx(replicates[974])
    assert interval["bootstrap_mean"] == pytest.approx(np.mean(replicates))


def test_a_cutoff_empties_the_masks_of_healthy_images(evaluated):
    rows = evaluated[0]["rows"]["bright"]
    # every image without edema counts 0 until the score decides that nothing is marked there
    assert rows[EDEMA]["miou_full_cutoff"]["value"] > 1.5 * rows[EDEMA]["miou_full"]["value"]
    assert rows[EDEMA]["miou_full"]["value"] < rows[EDEMA]["miou"]["value"]


def test_otsu_takes_the_two_levels_apart_and_fills_holes():
    anomaly_map = np.full((20, 20), 0.1)
    anomaly_map[5:15, 5:15] = 0.8
    anomaly_map[9, 9] = 0.0  # a hole
    anomaly_map[1, 1] = 0.9  # a single pixel
    marked = protocol.binarise(protocol.stretch(anomaly_map), None)
    assert marked[5:15, 5:15].all() and marked.sum() == 100
    flat = protocol.stretch(np.full((4, 4), 0.3))
    assert not protocol.binarise(flat, None).any() and not protocol.binarise(flat, 0.2).any()


def test_one_command_writes_all_of_it(released, pipeline, tmp_path, capsys):
    (root, file), validation = released
    pipeline.save_pretrained(tmp_path / "model")
    command = [
        "chexlocalize",
        str(root),
        str(file),
        "--validation",
        *map(str, validation),
        "--out",
        str(tmp_path / "out"),
    ]
    quick = ["--num-inference-steps", "4", "--noise-level", "500", "--bootstrap", "10", "--batch-size", "12"]
    assert main([*command, "--model", str(tmp_path / "model"), *quick]) == 0
    output = capsys.readouterr().out
    assert "### method" in output and "### centre prior" in output and "| Pleural Effusion (4; 0." in output
    assert output.strip().splitlines()[0].startswith("12 images, 8 of them with segmentations")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"contact_sheet.png", "maps", "method", "per_image.csv", "summary.json", "summary.md"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]["method"][ANY]["miou"]["value"] >= 0


def test_maps_in_the_images_own_pixels_are_measured_too(released, evaluated, tmp_path):
    class Keep(Bright):
        """Its square is as wide as the images and higher: the same maps as with `pad`."""

        config = {"aspect": "keep"}

    test, validation = (open_split(*split) for split in released)
    evaluate_chexlocalize({"bright": Keep()}, test, validation, output_dir=tmp_path, progress=False)
    rows = [json.loads((out / "summary.json").read_text())["rows"]["bright"] for out in (tmp_path, evaluated[1])]
    assert rows[0] == rows[1]


def test_without_a_validation_split_the_threshold_is_otsus(released):
    summary = evaluate_chexlocalize({"bright": Bright()}, open_split(*released[0]), n_bootstrap=10, progress=False)
    assert summary["thresholds"]["bright"][EDEMA] is None
    assert summary["rows"]["bright"][EDEMA]["miou"]["value"] > 0.5
    assert np.isnan(summary["rows"]["bright"][EDEMA]["miou_full_cutoff"]["value"])


def test_splits_files_and_sizes_that_do_not_fit_are_refused(released, tmp_path):
    (root, file), _ = released
    with pytest.raises(ValueError, match="other patients in the validation split, got 12 in both"):
        evaluate_chexlocalize({"bright": Bright()}, open_split(root, file), open_split(root, file))
    with pytest.raises(ValueError, match="unknown task 'Cold', expected some of Airspace Opacity"):
        load_chexlocalize(root, file, tasks=["Cold"])
    with pytest.raises(ValueError, match="expected `size` of 8 pixels or more, got 0"):
        load_chexlocalize(root, file, size=0)
    with pytest.raises(ValueError, match="expected segmentations as CheXlocalize releases them"):
        read_segmentations(root / "patient60000" / "study1" / "view1_frontal.png")
    wrong = tmp_path / "annotations.json"
    wrong.write_text(json.dumps({"patient1_study1_view1_frontal": {"img_size": [2, 3], "Edema": [[[0, 0], [1, 1]]]}}))
    with pytest.raises(ValueError, match="expected segmentations as CheXlocalize releases them"):
        read_segmentations(wrong)
    other = release(tmp_path, "test", ["patient1"])
    with pytest.raises(FileNotFoundError, match="missing: 8, the first one patient60000/study1/view1_frontal"):
        load_chexlocalize(other[0], file)
    Image.new("L", (9, 9)).save(other[0] / "patient1" / "study1" / "view1_frontal.png")
    with pytest.raises(ValueError, match=r"its segmentation's size \[40, 48\], got \[9, 9\]"):
        evaluate_chexlocalize({"bright": Bright()}, open_split(*other), progress=False)


@pytest.mark.parametrize("names", [["a b", "a_b"], [".."], ["maps"]])
def test_no_method_writes_over_another_or_beside_the_output(names):
    with pytest.raises(ValueError, match="expected methods whose names are folders of their own"):
        evaluate_chexlocalize({name: Bright() for name in names}, None)


def test_without_pycocotools_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install 'cxr_diffusers\[chexlocalize\]'"):
        encode(np.ones((2, 2), bool))
