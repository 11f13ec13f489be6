import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from cxr_diffusers import LungSegmenter
from cxr_diffusers.evaluation import compare, evaluate, summary_table
from cxr_diffusers.evaluation.controls import grey_image, grey_images, image_controls, lung_gates
from cxr_diffusers.evaluation.counterfactuals import diseased_and_healthy
from cxr_diffusers.evaluation.grid import at_centres, shrink_mask
from cxr_diffusers.evaluation.masks import smooth_map
from cxr_diffusers.evaluation.metrics import box_mask, hit, pixel_average_precision
from cxr_diffusers.evaluation.report import report
from cxr_diffusers.evaluation.truth import describe_row
from cxr_diffusers.pipelines import AnomalyOutput, CFGAnomalyPipeline
from cxr_diffusers.pipelines.cxr_images import prepare_image, restore_map
from helpers import BrightSpots, spot_chest, spot_rows, toy_unet

FAST = {"num_inference_steps": 4, "noise_level": 500, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    return CFGAnomalyPipeline(unet.eval(), DDIMScheduler(clip_sample=False), class_names=["healthy", "spot"])


def quick(pipeline, dataset, **options):
    options = {"n_bootstrap": 50, "progress": False} | options
    return evaluate(pipeline, dataset, **options)


def value(result, name, number):
    return result.summary["rows"][name][number]["value"]


def test_a_perfect_detector_scores_1_and_beats_every_control():
    result = quick(BrightSpots(), spot_rows(), healthy=spot_rows(4, spot=False), n_bootstrap=200)
    for number in ("pixel_ap", "pixel_auroc", "best_dice", "hit_rate", "image_auroc", "dice", "aupro"):
        assert value(result, "method", number) == pytest.approx(1, abs=0.02), number
    assert len(result.summary["differences"]) == 6
    for name, difference in result.summary["differences"].items():
        assert difference["pixel_ap"]["low"] > 0, name


def test_an_inverted_detector_scores_0():
    result = quick(BrightSpots(inverted=True), spot_rows())
    assert value(result, "method", "pixel_auroc") == pytest.approx(0, abs=0.01)
    assert value(result, "method", "hit_rate") == 0
    assert result.summary["differences"]["method - chance"]["pixel_ap"]["high"] < 0


def test_metrics_are_computed_at_the_images_own_resolution(pipeline):
    dataset = spot_rows(5, height=40, width=24)
    result = quick(pipeline, dataset, call_kwargs=FAST, batch_size=2)
    output = pipeline([row["image"] for row in dataset], output_type="np", **FAST)
    maps = [restore_map(m, 40, 24, "pad") for m in output.anomaly_map]
    truths = [np.asarray(row["mask"]) > 0 for row in dataset]
    assert value(result, "method", "pixel_ap") == pytest.approx(pixel_average_precision(maps, truths), abs=1e-4)
    table = result.per_image
    assert table.pixel_ap.tolist() == pytest.approx(
        [pixel_average_precision(m, t) for m, t in zip(maps, truths, strict=True)], abs=1e-4
    )
    assert table.hit.tolist() == [hit(m, t) for m, t in zip(maps, truths, strict=True)]
    assert table.score.tolist() == pytest.approx(output.anomaly_score.tolist(), abs=1e-5)
    assert table.prevalence.tolist() == pytest.approx([48 / (40 * 24)] * 5)


@pytest.mark.parametrize("score", ["map", "combined"])
def test_scores_are_those_of_a_call_whatever_the_batch(pipeline, score):
    """The class evidence has noise, which is the same in `detect` and in `evaluate`, and for every image."""
    dataset, call = spot_rows(5), {**FAST, "score": score, "negative_label": 1}
    expected = [float(pipeline(row["image"], output_type="np", **call).anomaly_score[0]) for row in dataset]
    for batch_size in (2, 5):
        result = quick(pipeline, dataset, call_kwargs=call, batch_size=batch_size)
        assert result.per_image.score.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_large_image_is_measured_at_the_centres_of_a_coarser_grid(tmp_path, pipeline):
    dataset = spot_rows(5, height=80, width=48) + spot_rows(2, height=20, width=16, spot=False)
    dataset[0] |= {"mask": None, "boxes": [[10, 7, 21, 30]]}
    options = dict(call_kwargs=FAST, batch_size=2, resolution=24)
    result = quick(pipeline, dataset, output_dir=tmp_path, **options)
    output = pipeline([row["image"] for row in dataset], output_type="np", **FAST)
    maps = [restore_map(m, 40, 24, "pad") for m in output.anomaly_map[:5]]
    truths = [box_mask([[5, 3.5, 10.5, 15]], 40, 24)]
    truths += [np.asarray(row["mask"])[1::2, 1::2] > 0 for row in dataset[1:5]]
    table = result.per_image
    assert table.pixel_ap[:5].tolist() == pytest.approx(
        [pixel_average_precision(m, t) for m, t in zip(maps, truths, strict=True)], abs=1e-4
    )
    assert table.hit[:5].tolist() == [hit(m, t) for m, t in zip(maps, truths, strict=True)]
    assert table.prevalence[:5].tolist() == [t.mean() for t in truths]
    assert table.score.tolist() == pytest.approx(output.anomaly_score.tolist(), abs=1e-5)  # of the whole image
    assert result.summary["n_shrunk"] == 5 and result.summary["settings"]["resolution"] == 24
    text = (tmp_path / "summary.md").read_text()
    assert "- resolution: 5 images with a shorter side of more than 24 pixels were measured at 24" in text
    everything = quick(pipeline, dataset, **options | {"resolution": 0})
    assert everything.summary["n_shrunk"] == 0 and everything.per_image.prevalence[0] == 21 * 30 / (80 * 48)
    assert "resolution" not in report(everything.summary)
    assert quick(pipeline, dataset, **options | {"resolution": 48}).per_image.pixel_ap[:5].tolist() == pytest.approx(
        everything.per_image.pixel_ap[:5].tolist(), abs=1e-9
    )


def test_on_a_coarser_grid_smooth_maps_have_nearly_the_same_metrics():
    dataset, size = [], 256
    y, x = np.mgrid[:size, :size] / size
    rng = np.random.default_rng(0)
    for i in range(6):
        lesion = (x - rng.uniform(0.2, 0.8)) ** 2 + (y - rng.uniform(0.2, 0.8)) ** 2
        noise = smooth_map(rng.random((size, size)), 8)
        image = np.exp(-lesion / 0.02) + 3 * (noise - noise.min())
        image = Image.fromarray((255 * image / image.max()).astype(np.uint8))
        mask = Image.fromarray(255 * (lesion < 0.01).astype(np.uint8))
        dataset.append({"image": image, "mask": mask, "label": 1, "patient": f"p{i}", "path": f"{i}.png"})
    full, coarse = (quick(BrightSpots(), dataset, resolution=side).summary["rows"] for side in (0, 128))
    for name in ("method", "mean map", "location prior", "|x - blurred x|"):
        for metric in ("pixel_ap", "pixel_auroc", "aupro", "best_dice"):
            a, b = (rows[name][metric]["value"] for rows in (full, coarse))
            assert a == pytest.approx(b, abs=0.01), (name, metric)


def test_the_coarser_grid_has_the_lesions_of_every_aspect_where_they_are():
    class OwnSquare(BrightSpots):
        def __init__(self, aspect):
            self.config = {"aspect": aspect}

        def __call__(self, image, output_type="np"):
            prepared = prepare_image(image, 64, scaling="dtype", aspect=self.config["aspect"], data_range=(0, 1))
            array = prepared.permute(0, 2, 3, 1).numpy()
            return AnomalyOutput(array, array, array[..., 0], array.max((1, 2, 3)))

    dataset = []
    for i in range(4):
        image, mask = np.full((2, 80, 72), 40, np.uint8)
        y, x = 24 + 4 * i, 24 + 2 * i
        image[y : y + 16, x : x + 16], mask[:] = 200, 0
        mask[y : y + 16, x : x + 16] = 255
        dataset.append({"image": Image.fromarray(image), "mask": Image.fromarray(mask), "label": 1, "patient": f"p{i}"})
    for aspect in ("pad", "edge", "crop", "squash", "keep"):
        full, coarse = (quick(OwnSquare(aspect), dataset, resolution=side) for side in (0, 36))
        assert value(full, "method", "pixel_ap") > 0.95, aspect
        assert value(coarse, "method", "pixel_ap") > 0.95, aspect
        assert value(coarse, "method", "hit_rate") == 1


def test_a_coarser_grid_neither_loses_nor_breaks_a_region():
    mask = np.zeros((320, 300), bool)
    mask[100:140, 100:150] = True  # large: as at the centres
    mask[8, 20:25] = True  # a line between the centres
    mask[200, 50:250] = True  # a rim of one pixel, broken by the centres
    mask[201:260, 50] = True
    mask[300, 280] = True
    small = shrink_mask(mask, 128, 120)
    regions = [ndimage.label(m, np.ones((3, 3)))[1] for m in (mask, small)]
    assert regions == [4, 4]
    assert (small[40:56, 40:60] == at_centres(mask, 128, 120)[40:56, 40:60]).all()
    assert small[3, 8:10].all() and small[120, 112]
    assert not shrink_mask(np.zeros((320, 300), bool), 128, 120).any()
    speckles = np.random.default_rng(0).random((320, 300)) < 0.01
    numbered, n = ndimage.label(speckles, np.ones((3, 3)))
    y, x = speckles.nonzero()
    touched = shrink_mask(speckles, 128, 120)[y * 128 // 320, x * 120 // 300]
    assert n > 500 and ndimage.maximum(touched, numbered[y, x], np.arange(1, n + 1)).all()


def test_a_lesion_between_the_centres_of_a_coarser_grid_is_not_lost():
    dataset = spot_rows(2, height=64, width=64)
    mask = np.zeros((64, 64), np.uint8)
    mask[8, 20:25] = 255  # a line of one pixel; the grid's centres are in rows 2, 6, 10, ...
    dataset[0]["mask"] = Image.fromarray(mask)
    result = quick(BrightSpots(), dataset, resolution=16)
    assert result.summary["n_with_region"] == 2
    assert result.per_image.prevalence[0] == 2 / 16**2


def test_arrays_have_the_image_controls_of_the_image():
    image = spot_chest(0, height=40, width=30)[0]
    array = np.asarray(image)
    for other in (array, array[..., None], np.stack([array] * 3, axis=-1).astype(np.float64)):
        assert grey_image(other, 20, 15) == pytest.approx(grey_image(image, 20, 15), abs=0.01)
        assert grey_image(other, 40, 30) == pytest.approx(grey_image(image, 40, 30), abs=1e-6)


def test_chance_is_the_share_of_positive_pixels():
    result = quick(BrightSpots(), spot_rows())
    share = 48 / 32**2
    assert value(result, "chance", "pixel_ap") == pytest.approx(share)
    assert value(result, "chance", "hit_rate") == pytest.approx(share)
    assert value(result, "chance", "pixel_auroc") == 0.5
    assert value(result, "random map", "pixel_ap") == pytest.approx(share, abs=0.02)


def test_the_location_prior_is_computed_from_other_patients():
    alone = [{**row, "patient": "one"} for row in spot_rows()]
    assert value(quick(BrightSpots(), alone), "location prior", "pixel_ap") == pytest.approx(48 / 32**2)
    same_spot = [{**spot_rows(1)[0], "patient": f"p{i}"} for i in range(4)]
    assert value(quick(BrightSpots(), same_spot), "location prior", "pixel_ap") > 0.9


class LeftHalf(LungSegmenter):
    """The lungs are the left quarter of the image; `field` makes a gate of it and its mirror image."""

    def _logits(self, images):
        left = torch.arange(self.config.sample_size) < self.config.sample_size // 4
        logits = torch.where(left, 20.0, -20.0).expand(len(images), 2, self.config.sample_size, -1)
        return logits.clone()


def lungs():
    return LeftHalf(sample_size=32, block_out_channels=(4,), norm_num_groups=2)


def test_controls_with_the_lung_gate_are_rows_with_paired_differences_for_every_method():
    methods = {"bright": BrightSpots(), "dark": BrightSpots(inverted=True)}
    options = dict(healthy=spot_rows(3, spot=False), n_bootstrap=50, progress=False)
    summary = compare(methods, spot_rows(), lung_segmenter=lungs(), **options).summary
    shared = ["lung gate", "brightness x gate", "mirror x gate", "location prior x gate"]
    for method, other in (("bright", "dark"), ("dark", "bright")):
        for control in [*shared, f"mean map of {method} x gate"]:
            difference = summary["differences"][f"{method} - {control}"]["pixel_ap"]
            rows = summary["rows"]
            gap = rows[method]["pixel_ap"]["value"] - rows[control]["pixel_ap"]["value"]
            assert difference["value"] == pytest.approx(gap) and difference["low"] <= difference["high"]
        assert f"{method} - mean map of {other} x gate" not in summary["differences"]
    assert {"brightness x gate", "mirror x gate", "lung gate"} <= set(summary["rows"])
    assert np.isfinite(summary["rows"]["mirror x gate"]["image_auroc"]["value"])
    assert not [name for name in compare(methods, spot_rows(), **options).summary["rows"] if name.endswith("x gate")]


def test_gated_controls_are_the_image_its_mirror_difference_and_the_gate():
    image = np.zeros((64, 64), np.float32)
    image[20:30, 4:12] = 1  # inside the gate, brighter than the other side
    image[:, 28:36] = 1  # in the middle, outside the gate
    grey = grey_images([{"image": Image.fromarray((image * 255).astype(np.uint8))}], [{"height": 64, "width": 64}])
    gates = lung_gates(lungs(), grey)
    maps = {name: list(sequence)[0] for name, sequence in image_controls(grey, gates, 0.0).items()}
    gate = maps["lung gate"]
    assert gate[:, :12].min() > 0.9 and gate[:, -12:].min() > 0.9 and gate[:, 30:34].max() < 0.1
    blurred = smooth_map(image, 2.0)
    assert maps["brightness x gate"] == pytest.approx(blurred * gate, abs=1e-5)
    one_sided = smooth_map(np.maximum(image - image[:, ::-1], 0), 2.0)
    assert maps["mirror x gate"] == pytest.approx(one_sided * gate, abs=1e-5)
    assert maps["mirror x gate"][:, 32:].max() < 0.01 < maps["mirror x gate"][25, 8]
    assert image_controls(grey, None, 0.0).keys() == {"|x - blurred x|"}


def test_a_lung_segmenter_of_another_type_is_refused():
    with pytest.raises(ValueError, match="expected a LungSegmenter as `lung_segmenter`, got 'lungs'"):
        quick(BrightSpots(), spot_rows(2), lung_segmenter="lungs")


def test_a_method_that_ignores_the_image_does_not_beat_its_mean_map():
    class Blind(BrightSpots):
        def __call__(self, image, output_type="np"):
            output = super().__call__(image)
            maps = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (len(image), 32, 1))
            return AnomalyOutput(output.image, output.counterfactual, maps, output.anomaly_score)

    difference = quick(Blind(), spot_rows()).summary["differences"]["method - mean map"]
    assert difference["pixel_ap"]["value"] == pytest.approx(0, abs=0.02)


def test_boxes_are_regions_and_images_without_truth_count_for_image_metrics_only():
    dataset = spot_rows(4)
    for row in dataset:
        row["boxes"] = [[4, 4, 8, 6]]
        row["mask"] = None
    dataset[0]["boxes"] = None
    result = quick(BrightSpots(), dataset + spot_rows(2, spot=False))
    assert result.summary["n_images"] == 6 and result.summary["n_with_region"] == 3
    assert result.per_image.prevalence.dropna().tolist() == pytest.approx([48 / 32**2] * 3)
    assert result.summary["undefined"]["pixel_ap"] == 3
    assert value(result, "method", "image_auroc") == 1


def test_an_image_labelled_healthy_with_a_true_region_is_neither_healthy_nor_diseased(tmp_path):
    """A label from a report and a radiologist's box contradict each other."""
    dataset, healthy = [*spot_rows(4), *spot_rows(3, spot=False)], spot_rows(4, spot=False)
    expected = quick(BrightSpots(), dataset, healthy=healthy)
    wrong = {**spot_rows(1)[0], "label": 0, "path": "wrong.png", "patient": "w"}
    empty = {**healthy[0], "mask": Image.new("L", (32, 32)), "patient": "e"}
    boxed = {**healthy[1], "boxes": [[4, 4, 8, 6]], "path": "boxed.png"}
    result = quick(BrightSpots(), [*dataset, wrong], healthy=[*healthy, empty, boxed, wrong], output_dir=tmp_path)
    assert result.summary["n_with_region"] == expected.summary["n_with_region"] + 1
    assert result.summary["n_contradicted"] == 1 and expected.summary["n_contradicted"] == 0
    assert value(result, "method", "image_auroc") == value(expected, "method", "image_auroc") == 1
    assert set(result.summary["failed"]) == {"boxed.png", "wrong.png"} and result.summary["n_healthy"] == 5
    text = (tmp_path / "summary.md").read_text()
    assert "- labels: 1 images labelled healthy have a true region; they count for the pixels, not" in text
    assert "patients), and 5 healthy images beside them. Brackets" in text
    assert "labels:" not in report(expected.summary)
    rows = [describe_row(row, "", (), 1024) for row in [*dataset, wrong, {**wrong, "label": -1}]]
    diseased, sound = diseased_and_healthy(rows, len(rows))
    assert diseased.tolist() == [True] * 4 + [False] * 4 + [True]
    assert sound.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_the_threshold_comes_from_healthy_images_else_from_the_pipeline(pipeline):
    healthy = spot_rows(4, spot=False)
    result = quick(BrightSpots(), spot_rows(), healthy=healthy, quantile=0.9)
    flat = np.concatenate([np.asarray(row["image"]).ravel() for row in healthy]) / 255
    threshold = result.summary["settings"]["threshold"]["method"]
    assert threshold == pytest.approx(np.quantile(flat, 0.9), abs=1e-4)
    assert f"- threshold: {threshold:.4g} (0.9 quantile of healthy maps)" in report(result.summary)
    assert quick(BrightSpots(), spot_rows()).summary["settings"]["threshold"]["method"] is None
    assert np.isnan(value(quick(BrightSpots(), spot_rows()), "method", "dice"))
    stored = CFGAnomalyPipeline(**pipeline.components, map_threshold=0.25, settings=FAST)
    assert quick(stored, spot_rows(), call_kwargs=FAST).summary["settings"]["threshold"]["method"] == 0.25
    other = quick(stored, spot_rows(), call_kwargs={"smoothing": 2.0})
    assert other.summary["settings"]["threshold"]["method"] is None, "measured with other settings"


def test_controls_mark_as_many_pixels_as_the_method():
    result = quick(BrightSpots(), spot_rows(), healthy=spot_rows(4, spot=False))
    # the method marks about 5 %, all of it right; a random map of that size overlaps by chance
    assert value(result, "random map", "dice") == pytest.approx(48 / 32**2, abs=0.06)
    assert value(result, "centre prior", "iou") > 0 and np.isnan(value(result, "chance", "dice"))


def test_a_run_writes_its_tables_and_images(tmp_path, pipeline):
    result = quick(pipeline, spot_rows(), healthy=spot_rows(3, spot=False), output_dir=tmp_path, call_kwargs=FAST)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "per_image.csv",
        "summary.json",
        "summary.md",
        "contact_sheet.png",
        "precision_recall.png",
        "roc.png",
        "maps",
    }
    table = pd.read_csv(tmp_path / "per_image.csv")
    assert len(table) == 9 and table.part.tolist() == ["dataset"] * 6 + ["healthy"] * 3
    assert {"path", "patient", "label", "view", "score", "pixel_ap", "dice", "iou", "hit", "prevalence"} <= set(table)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n_patients"] == 3 and summary["seconds_per_image"]["method"] > 0
    assert summary["rows"]["method"]["pixel_ap"] == result.summary["rows"]["method"]["pixel_ap"]
    assert summary["method"] == summary["rows"]["method"] and summary["rows"]["chance"]["dice"]["value"] is None
    assert "| method | 0." in (tmp_path / "summary.md").read_text()
    assert summary_table(summary) == summary_table(result)


def test_images_of_an_earlier_run_are_not_left_beside_new_tables(tmp_path):
    quick(BrightSpots(), spot_rows(), output_dir=tmp_path)
    assert (tmp_path / "contact_sheet.png").exists()
    quick(BrightSpots(), [{**row, "mask": None} for row in spot_rows()], output_dir=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"per_image.csv", "summary.json", "summary.md", "maps"}


def test_images_of_a_single_value_are_left_out_counted_and_named(tmp_path, caplog):
    flat = Image.new("L", (32, 32), 7)
    dataset, healthy = spot_rows(), spot_rows(4, spot=False)
    expected = quick(BrightSpots(), dataset, healthy=healthy)
    with_flat = [dataset[0], {**dataset[1], "image": flat, "path": "a/flat.png"}, *dataset[1:]]
    flat_healthy = [*healthy, {**healthy[0], "image": flat, "path": "b/flat.png"}]
    result = quick(BrightSpots(), with_flat, healthy=flat_healthy, output_dir=tmp_path)
    assert set(result.summary["failed"]) == {"a/flat.png", "b/flat.png"} and result.summary["n_failed"] == 2
    assert "one value" in result.summary["failed"]["a/flat.png"] and "a/flat.png" in caplog.text
    assert json.dumps(result.summary["rows"]) == json.dumps(expected.summary["rows"])  # NaN equals NaN
    assert result.per_image.path.tolist() == expected.per_image.path.tolist()
    text = (tmp_path / "summary.md").read_text()
    assert "single value, or healthy with a true region: 2 (a/flat.png, b/flat.png)" in text
    assert expected.summary["failed"] == {} and expected.summary["n_failed"] == 0


def test_an_interrupted_run_resumes(tmp_path, pipeline):
    first = quick(pipeline, spot_rows(), output_dir=tmp_path, call_kwargs=FAST)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "maps").iterdir()}
    assert len(files) == 6
    lost = sorted(files)[2]
    lost.unlink()
    again = quick(pipeline, spot_rows(), output_dir=tmp_path, call_kwargs=FAST)
    new = {p: p.stat().st_mtime_ns for p in (tmp_path / "maps").iterdir()}
    assert set(new) == set(files) and [p for p in files if files[p] != new[p]] == [lost]
    drop = ["seconds"]
    pd.testing.assert_frame_equal(first.per_image.drop(columns=drop), again.per_image.drop(columns=drop), rtol=1e-4)


def test_other_settings_weights_or_images_have_maps_of_their_own(tmp_path, pipeline):
    def number_of_maps(p, dataset, **kwargs):
        quick(p, dataset, output_dir=tmp_path, call_kwargs={**FAST, **kwargs}, n_bootstrap=2)
        return len(list((tmp_path / "maps").iterdir()))

    assert number_of_maps(pipeline, spot_rows(2)) == 2
    assert number_of_maps(pipeline, spot_rows(2)) == 2
    assert number_of_maps(pipeline, spot_rows(2), guidance_scale=2.0) == 4
    other = UNet2DModel.from_config(pipeline.unet.config)
    assert number_of_maps(CFGAnomalyPipeline(other.eval(), pipeline.scheduler), spot_rows(2)) == 6
    changed = spot_rows(2)
    changed[0]["image"] = spot_chest(77)[0]  # the same path, another image
    assert number_of_maps(pipeline, changed) == 7
    for disk in ("/disk", "../disk"):  # the same image at another mount point is the same
        assert number_of_maps(pipeline, [{**spot_rows(1)[0], "path": f"{disk}/patient/study/view.png"}]) == 8


def test_maps_of_a_pipeline_without_a_fingerprint_are_computed_anew(tmp_path):
    for inverted in (False, True):
        result = quick(BrightSpots(inverted), spot_rows(), output_dir=tmp_path)
        assert value(result, "method", "pixel_auroc") == pytest.approx(1 - inverted, abs=0.01)


def test_the_pipelines_progress_bar_keeps_its_settings(pipeline):
    pipeline.set_progress_bar_config(desc="mine")
    quick(pipeline, spot_rows(2), call_kwargs=FAST, n_bootstrap=2)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_views_and_other_columns_have_tables_of_their_own():
    dataset = spot_rows(6, view=lambda i: "AP" if i < 2 else "PA")
    for i, row in enumerate(dataset):
        row["style"] = "A" if i % 2 else "C"
    result = quick(BrightSpots(), dataset, strata=("style",))
    assert {k: v["n_images"] for k, v in result.summary["strata"].items()} == {
        "view = AP": 2,
        "view = PA": 4,
        "style = A": 3,
        "style = C": 3,
    }
    only = quick(BrightSpots(), [row for row in dataset if row["style"] == "A"])
    part = result.summary["strata"]["style = A"]["rows"]["method"]["pixel_ap"]["value"]
    assert part == pytest.approx(only.summary["rows"]["method"]["pixel_ap"]["value"], abs=1e-6)
    assert quick(BrightSpots(), spot_rows()).summary["strata"] == {}


def test_sensitivity_and_specificity_are_those_at_the_healthy_thresholds():
    dataset = spot_rows(6) + spot_rows(4, spot=False)
    healthy = spot_rows(5, spot=False)
    result = quick(BrightSpots(), dataset, healthy=healthy, quantile=0.9)
    threshold = result.summary["settings"]["threshold"]["method"]
    pixels = np.stack([np.asarray(row["image"]) / 255 > threshold for row in dataset[:6]])
    truth = np.stack([np.asarray(row["mask"]) > 0 for row in dataset[:6]])
    assert value(result, "method", "pixel_sensitivity") == pytest.approx(pixels[truth].mean(), abs=1e-6)
    assert value(result, "method", "pixel_specificity") == pytest.approx(1 - pixels[~truth].mean(), abs=1e-6)
    scores = result.per_image.score[result.per_image.part == "dataset"].to_numpy()
    cut = np.quantile(result.per_image.score[result.per_image.part == "healthy"], 0.95)
    assert value(result, "method", "image_sensitivity") == (scores[:6] > cut).mean() == 1
    assert value(result, "method", "image_specificity") == pytest.approx((scores[6:] <= cut).mean())
    interval = result.summary["rows"]["method"]["pixel_sensitivity"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    without = quick(BrightSpots(), dataset).summary["rows"]["method"]
    assert "image_sensitivity" not in without and np.isnan(without["pixel_sensitivity"]["value"])


def test_strata_have_the_controls_with_their_intervals():
    dataset = [{**row, "size_class": "large" if i % 2 else "small"} for i, row in enumerate(spot_rows(6))]
    result = quick(BrightSpots(), dataset, strata=("size_class",), lung_segmenter=lungs())
    for part in result.summary["strata"].values():
        assert part["rows"].keys() == {name for name, row in result.summary["rows"].items() if "pixel_ap" in row}
        assert np.isfinite(part["rows"]["mirror x gate"]["pixel_ap"]["low"])
        paired = part["differences"]["method - chance"]["pixel_ap"]
        values = [part["rows"][name]["pixel_ap"] for name in ("method", "chance")]
        assert paired["value"] == pytest.approx(values[0]["value"] - values[1]["value"])
        assert 0 < paired["low"] <= paired["value"] <= paired["high"]
    text = summary_table(result)
    assert text.count("| method - chance |") == 3, "of all images, and of two strata"
    assert text.count("| method - lung gate |") == 1


def test_a_model_of_views_is_told_the_view_of_each_image_and_none_where_it_is_unknown(tmp_path):
    class Recorder(CFGAnomalyPipeline):
        views = []

        def __call__(self, image, view=None, **kwargs):
            Recorder.views.append(view)
            return super().__call__(image, view=view, **kwargs)

    def views_of_calls(views, row_views, **kwargs):
        Recorder.views = []
        unet = toy_unet(num_class_embeds=7 if views else 3)
        pipeline = Recorder(unet, DDIMScheduler(clip_sample=False), views=views, class_names=["healthy", "spot"])
        rows = [{**row, "view": view} for row, view in zip(spot_rows(len(row_views)), row_views, strict=True)]
        evaluate(pipeline, rows, output_dir=tmp_path, call_kwargs={**FAST, **kwargs}, n_bootstrap=2, progress=False)
        return Recorder.views

    assert views_of_calls(["PA", "AP"], ["AP", "", "PA", "LATERAL"]) == [["AP", None, "PA", None]]
    assert views_of_calls(["PA", "AP"], ["PA", "", "PA", "LATERAL"]) == [
        ["PA"]
    ]  # the other maps are reused: their views did not change
    assert views_of_calls(["PA", "AP"], ["AP", "PA"], view="AP") == ["AP"]
    assert views_of_calls(None, ["AP", "PA"]) == [None]


def test_scores_are_also_measured_among_the_images_of_each_view():
    """Most diseased images are AP, and AP images are brighter: the score over all images largely detects the view."""
    diseased = spot_rows(8, view=lambda i: "AP" if i < 6 else "PA")
    healthy = spot_rows(8, False, view=lambda i: "PA" if i < 6 else "AP")
    for row in diseased + healthy:
        row["image"] = row["image"].point(lambda grey, bright=60 * (row["view"] == "AP"): grey // 8 + bright)
    result = quick(BrightSpots(), diseased, healthy=healthy)
    parts = result.summary["image_level_by_view"]
    assert {view: (part["n_images"], part["n_healthy"]) for view, part in parts.items()} == {"AP": (8, 2), "PA": (8, 6)}
    table = result.per_image.assign(diseased=result.per_image["label"] != 0)
    for view, part in parts.items():
        of_view = table[table["view"] == view]
        expected = roc_auc_score(of_view["diseased"], of_view["score"])
        assert part["rows"]["method"]["image_auroc"]["value"] == pytest.approx(expected)
    overall = value(result, "method", "image_auroc")
    assert overall == pytest.approx(roc_auc_score(table["diseased"], table["score"]))
    assert all(part["rows"]["method"]["image_auroc"]["value"] != overall for part in parts.values())
    assert "Scores among view AP alone: 8 images, 2 of them healthy" in summary_table(result)
    assert (
        quick(BrightSpots(), spot_rows(), healthy=spot_rows(4, False)).summary["image_level_by_view"] == {}
    )  # one view


def test_methods_are_compared_in_one_table():
    methods = {"bright": BrightSpots(), "again": (BrightSpots(), {}), "dark": BrightSpots(inverted=True)}
    result = compare(methods, spot_rows(), healthy=spot_rows(3, spot=False), n_bootstrap=50, progress=False)
    same, worse = (result.summary["differences"][f"bright - {name}"]["pixel_ap"] for name in ("again", "dark"))
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    assert worse["low"] > 0.5
    assert "dark - mean map of dark" in result.summary["differences"]
    assert "dark - mean map of bright" not in result.summary["differences"]
    assert sorted(result.per_image.method.unique()) == ["again", "bright", "dark"] and len(result.per_image) == 27


def test_a_hugging_face_data_set_is_evaluated(pipeline):
    features = Features(
        {
            "image": ImageFeature(),
            "label": ClassLabel(names=["healthy", "spot"]),
            "patient": Value("string"),
            "view": Value("string"),
            "path": Value("string"),
            "boxes": ListFeature(ListFeature(Value("float32"))),
            "mask": ImageFeature(),
        }
    )
    lines = [{**row, "boxes": None} for row in spot_rows(3) + spot_rows(2, spot=False)]
    dataset = Dataset.from_list(lines, features=features)
    result = quick(pipeline, dataset, healthy=dataset.select([3, 4]), call_kwargs=FAST, smoothing=0.02)
    assert result.summary["n_with_region"] == 3 and result.summary["n_healthy"] == 2
    assert np.isfinite(value(result, "method", "image_auroc"))


def test_similarity_is_measured_outside_the_true_region():
    class Painter(BrightSpots):
        def __call__(self, image, output_type="np"):
            output = super().__call__(image)
            painted = np.where(output.image > 0.4, 0.2, output.image)
            return AnomalyOutput(output.image, painted, output.anomaly_map, output.anomaly_score)

    table = quick(Painter(), spot_rows(4)).per_image
    assert (table.ssim_outside > 0.999).all() and (table.psnr_outside > 60).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: dict(dataset=[]), "at least one row"),
        (lambda d: dict(dataset=d, name="chance"), r"not named as a control is, got \['chance'\]"),
        (lambda d: dict(dataset=d, strata=("colour",)), r"got \['colour'\]"),
        (lambda d: dict(dataset=d, resolution=-1), "a whole number of pixels, or 0 .* as `resolution`, got -1"),
        (lambda d: dict(dataset=d, resolution=True), "as `resolution`, got True"),
        (lambda d: dict(dataset=d, resolution=24.5), "as `resolution`, got 24.5"),
        (lambda d: dict(dataset=[{**r, "height": 1} for r in d], strata=("height",)), r"strata.*got \['height'\]"),
        (lambda d: dict(dataset=d, strata=("label",)), r"strata.*got \['label'\]"),
        (lambda d: dict(dataset=[{**r, "part": "chest"} for r in d], strata=("part",)), r"strata.*got \['part'\]"),
        (lambda d: dict(dataset=d, healthy=d), r"label 0.*got labels \[1\]"),
        (
            lambda d: dict(dataset=[{**d[0], "image": Image.new("L", (32, 32), 7)}]),
            "images with contrast, got 1 without: spot/0.png: expected an image with contrast",
        ),
        (
            lambda d: dict(dataset=[{**d[0], "mask": Image.new("L", (9, 9))}]),
            r"image's size \(32, 32\), got \(9, 9\)",
        ),
        (
            lambda d: dict(dataset=[{**d[0], "mask": d[0]["mask"].point(lambda v: v // 255)}]),
            "expected a mask of 0 and 255, got values up to 1: spot/0.png",
        ),
        (
            lambda d: dict(dataset=[{**d[0], "mask": d[0]["mask"].point(lambda v: v // 2)}]),
            "expected a mask of 0 and 255, got values up to 127: spot/0.png",
        ),
    ],
)
def test_invalid_data_sets_and_options_are_refused(change, message):
    options = change(spot_rows(2))
    with pytest.raises(ValueError, match=message):
        quick(BrightSpots(), options.pop("dataset"), **options)


def test_maps_of_another_shape_are_refused():
    class Wrong(BrightSpots):
        def __call__(self, image, output_type="np"):
            output = super().__call__(image)
            return AnomalyOutput(output.image, output.counterfactual, output.anomaly_map[0], output.anomaly_score)

    with pytest.raises(ValueError, match=r"expected 2 maps \(B, H, W\)"):
        quick(Wrong(), spot_rows(2))


def test_image_metrics_need_no_true_region():
    dataset = [{**row, "mask": None} for row in spot_rows(3)] + spot_rows(3, spot=False)
    result = quick(BrightSpots(), dataset)
    assert result.summary["n_with_region"] == 0 and value(result, "method", "image_auroc") == 1
    assert "pixel_ap" not in result.summary["rows"]["method"] and "| method |" in summary_table(result)


@pytest.mark.parametrize("label", [{"label": 0}, {"label": -1}, {}])
def test_healthy_images_are_healthy_with_or_without_a_label(label):
    dataset, healthy = spot_rows(3), [{"image": row["image"], **label} for row in spot_rows(4, spot=False)]
    result = quick(BrightSpots(), dataset, healthy=healthy)
    assert value(result, "method", "image_auroc") == 1
    assert set(result.per_image.label[result.per_image.part == "healthy"]) == {0}


def test_images_without_path_and_patient_are_patients_of_their_own_in_both_parts():
    flat = {"image": Image.new("L", (32, 32), 7)}
    dataset, healthy = (
        [{k: row[k] for k in ("image", "label", "mask")} for row in spot_rows(4, spot)] + [flat]
        for spot in (True, False)
    )
    summary = quick(BrightSpots(), dataset, healthy=healthy).summary
    assert summary["n_patients"] == summary["n_healthy_patients"] == 4 and summary["n_patients_in_both"] == 0
    assert summary["n_failed"] == 2 and set(summary["failed"]) == {"row 4", "healthy row 4"}


def test_a_patients_number_may_be_zero_or_missing():
    def patients(*numbers):
        rows = [{**row, "patient": number} for row, number in zip(spot_rows(len(numbers)), numbers, strict=True)]
        return quick(BrightSpots(), rows).summary["n_patients"]

    assert patients(0, 0, 0, 1) == patients("0", 0, "0", 1) == 2
    assert patients(float("nan"), float("nan"), None, "", "a") == 5


def test_a_stratum_of_one_patient_has_no_interval():
    dataset = [{**row, "sex": "F" if row["patient"] == "p0" else "M"} for row in spot_rows(8)]
    strata = quick(BrightSpots(inverted=True), dataset, strata=("sex",)).summary["strata"]
    assert strata["sex = F"]["n_patients"] == 1 and strata["sex = M"]["n_patients"] == 3
    for name, undefined in (("sex = F", True), ("sex = M", False)):
        for part, row in (("rows", "method"), ("differences", "method - centre prior")):
            interval = strata[name][part][row]["best_dice"]
            assert np.isfinite(interval["value"]) and np.isnan(interval["low"]) == undefined, (name, part)


def test_a_rate_over_one_patient_has_no_interval():
    dataset = spot_rows(2) + spot_rows(4, spot=False)
    rows = quick(BrightSpots(), dataset, healthy=spot_rows(6, spot=False)[4:]).summary["rows"]["method"]
    assert rows["image_sensitivity"]["value"] == 1 and np.isnan(rows["image_sensitivity"]["low"])
    assert np.isfinite(rows["image_specificity"]["low"])


def test_the_threshold_of_unsmoothed_maps_is_not_that_of_smoothed_ones(pipeline):
    stored = CFGAnomalyPipeline(**pipeline.components, map_threshold=0.25, settings=FAST)
    for smoothing, threshold in ((0.0, 0.25), (0.05, None)):
        result = quick(stored, spot_rows(2), smoothing=smoothing)
        assert result.summary["settings"]["threshold"]["method"] == threshold


def test_what_a_crop_cuts_away_does_not_count_as_preserved():
    class Half(BrightSpots):
        """Sees the centre square, and makes it darker."""

        config = {"aspect": "crop"}

        def __call__(self, image, output_type="np"):
            array = prepare_image(image, 32, scaling="dtype", aspect="crop", data_range=(0, 1)).permute(0, 2, 3, 1)
            array = array.numpy()
            return AnomalyOutput(array, array - 0.05, array[..., 0], array.max((1, 2, 3)))

    dataset = [{**row, "mask": None} for row in spot_rows(3, height=64, width=32)]
    table = quick(Half(), dataset).per_image
    assert table.psnr_outside.tolist() == pytest.approx([-20 * np.log10(0.05)] * 3, abs=0.1)
    whole = quick(Half(), [{**row, "mask": None} for row in spot_rows(3, height=32, width=32)]).per_image
    assert table.ssim_outside.mean() == pytest.approx(whole.ssim_outside.mean(), abs=0.05)


def test_an_image_that_is_kept_exactly_is_counted_as_without_psnr():
    class Painter(BrightSpots):
        def __call__(self, image, output_type="np"):
            output = super().__call__(image)
            changed = output.image.copy()
            changed[0] = 0.5 * changed[0]
            return AnomalyOutput(output.image, changed, output.anomaly_map, output.anomaly_score)

    result = quick(Painter(), spot_rows(4), batch_size=4)
    assert np.isinf(result.per_image.psnr_outside).sum() == result.summary["undefined"]["psnr_outside"] == 3
