"""Calibration of a model on validation images, and warnings of images that are unlike them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, ClassifierGuidedPipeline, GradCAMPipeline, load_phantom, load_pipeline
from cxr_diffusers.cli import main
from cxr_diffusers.data.rows import rows_with_region
from cxr_diffusers.evaluation.masks import healthy_threshold
from cxr_diffusers.hub.loading import DEFAULT, default_checkpoint
from cxr_diffusers.inference.calibration import (
    LOWEST,
    QUANTILES,
    UNFINISHED,
    calibrate_model,
    calibrate_trained,
    compute_once,
)
from cxr_diffusers.inference.out_of_distribution import (
    ERRORS_FILE,
    UNLIKE,
    ReferenceErrors,
    denoising_errors,
    keep_errors,
    kept_errors,
    unlikeness_warnings,
)
from cxr_diffusers.inference.reference_scores import ReferenceScores, kept_scores, measure_scores
from helpers import TEN_STEPS, toy_classifier, toy_resnet, toy_unet


def phantoms(label, n=12, seed=1):
    dataset = load_phantom(n=2 * n, size=16, seed=seed)
    return dataset.select([i for i, row_label in enumerate(dataset["label"]) if row_label == label])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a toy diffusion model with two views, not calibrated."""
    unet, folder = toy_unet(num_class_embeds=7), tmp_path_factory.mktemp("saved") / "model"
    pipeline = CFGAnomalyPipeline(unet, DDIMScheduler(clip_sample=False), ["healthy", "ill"], views=["PA", "AP"])
    pipeline.register_to_config(settings=TEN_STEPS)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def once(saved, tmp_path_factory):
    """A copy that was calibrated on 12 healthy and 12 diseased phantoms, and the result."""
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("calibrated") / "model"))
    return folder, calibrate_model(
        folder, phantoms(0), "12 phantoms", diseased=phantoms(1), quantile=0.9, progress=False
    )


@pytest.fixture
def calibrated(once, tmp_path):
    return Path(shutil.copytree(once[0], tmp_path / "model"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def opened(folder):
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_calibrated_model_has_a_threshold_and_the_scores_of_the_images_by_view(once, saved):
    (model, result), healthy = once, phantoms(0)
    pipeline = opened(model)
    assert opened(saved).config.map_threshold is None
    output = pipeline(healthy["image"][:], output_type="np")
    assert result.map_threshold == pytest.approx(healthy_threshold(output.anomaly_map, 0.9), abs=1e-5)
    assert opened(model).config.map_threshold == result.map_threshold
    origin = json.loads((model / "model_index.json").read_text())["_map_threshold"]
    assert origin == {"quantile": 0.9, "images": 12, "data": "12 phantoms"}

    scores = kept_scores(model)
    assert scores == result.scores and scores.fits(pipeline, {}) and scores.data == "12 phantoms"
    assert scores.scores == pytest.approx(measure_scores(pipeline, healthy, "").scores, abs=2e-6)
    views = healthy["view"][:]
    assert {view: len(of_view) for view, of_view in scores.by_view.items()} == {v: views.count(v) for v in set(views)}
    assert sorted(sum(scores.by_view.values(), [])) == scores.scores
    assert not (model / UNFINISHED).exists()


def test_a_calibrated_model_has_quantiles_of_the_pixels_of_all_healthy_maps(once):
    model, result = once
    kept = kept_scores(model).map_quantiles
    maps = opened(model)(phantoms(0)["image"][:], output_type="np").anomaly_map
    assert [float(q) for q in kept] == list(QUANTILES) == sorted(QUANTILES)
    np.testing.assert_allclose(list(kept.values()), np.quantile(maps, QUANTILES).clip(LOWEST), atol=1e-5)
    assert kept["0.9"] == result.map_threshold < kept["0.9999"] and kept == result.scores.map_quantiles


def test_a_map_value_between_two_stored_quantiles_is_interpolated():
    scores = ReferenceScores("12 phantoms", {}, [], map_quantiles={"0.5": 0.1, "0.9": 0.3, "0.99": 0.8})
    assert [scores.map_value(q) for q in (0.5, 0.9, 0.99)] == [0.1, 0.3, 0.8]
    assert scores.map_value(0.6) == pytest.approx(0.15) and scores.map_value(0.945) == pytest.approx(0.55)
    for outside in (0.4, 0.999):
        message = f"expected a quantile from 0.5 to 0.99, .* measured on 12 phantoms, got {outside}"
        with pytest.raises(ValueError, match=message):
            scores.map_value(outside)


def test_a_score_is_compared_with_images_of_its_view():
    scores = ReferenceScores("", {}, [0.1, 0.2, 0.3, 0.4], by_view={"PA": [0.1, 0.2], "AP": [0.3, 0.4]})
    assert scores.share_below(0.25) == (2, 4) and scores.share_below(0.25, "lateral") == (2, 4)
    assert scores.share_below(0.25, "PA") == (2, 2) and scores.share_below(0.25, "AP") == (0, 2)


def test_the_threshold_is_of_the_image_without_its_bars(model):
    """A model sees a narrow image between two bars, which would make the quantile of its pixels lower."""
    pipeline = opened(model)
    narrow = phantoms(0, n=4).map(lambda row: {"image": row["image"].resize((8, 16))})
    result = calibrate_model(model, narrow, "narrow", quantile=0.5, progress=False)
    maps = pipeline(narrow["image"][:], output_type="np").anomaly_map
    assert result.map_threshold == pytest.approx(np.quantile(maps[:, :, 4:12], 0.5), abs=1e-5)
    assert abs(result.map_threshold - np.quantile(maps, 0.5)) > 1e-3


def test_an_interrupted_calibration_continues_and_changes_the_model_only_at_the_end(model, monkeypatch):
    healthy, before = phantoms(0, n=5), contents(model)
    calls, call = [], CFGAnomalyPipeline.__call__

    def call_twice(self, images, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(images))
        return call(self, images, **kwargs)

    monkeypatch.setattr(CFGAnomalyPipeline, "__call__", call_twice)
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(model, healthy, "phantoms", batch_size=2, progress=False)
    assert calls == [2, 2] and contents(model) == before

    monkeypatch.setattr(
        CFGAnomalyPipeline, "__call__", lambda *args, **kw: calls.append(len(args[1])) or call(*args, **kw)
    )
    calibrate_model(model, healthy, "phantoms", batch_size=2, progress=False)
    assert sum(calls) == 5, "no image twice"
    continued = contents(model)
    calibrate_model(model, healthy, "phantoms", batch_size=2, progress=False)
    assert contents(model) == continued


def test_results_of_other_weights_are_not_taken_for_those_of_this_model(model):
    rows, pipeline = phantoms(0, n=2), opened(model)
    seen = []

    def count(pipeline, images):
        seen.extend(images)
        return [{"errors": np.zeros(1)} for _ in images]

    run = dict(batch_size=8, progress=False)
    compute_once(model, rows, count, pipeline, "", **run)
    compute_once(model, rows, count, pipeline, "", **run)
    assert len(seen) == 2
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    compute_once(model, rows, count, pipeline, "", **run)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["USER/NAME", DEFAULT, "default", default_checkpoint()])
def test_a_model_of_the_hub_or_of_the_package_is_refused(name):
    with pytest.raises(ValueError, match="save a copy first"):
        calibrate_model(name, phantoms(0, n=2), "phantoms")


def test_wrong_images_and_quantiles_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="healthy images alone in phantoms, got 2 that are pleural effusion"):
        calibrate_model(model, phantoms(1, n=2), "phantoms")
    with pytest.raises(ValueError, match="at least one healthy image, got none in phantoms"):
        calibrate_model(model, phantoms(0, n=2).select([]), "phantoms")
    with pytest.raises(ValueError, match="quantile between 0 and 1, got 95"):
        calibrate_model(model, phantoms(0, n=2), "phantoms", quantile=95)
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        calibrate_model(tmp_path / "nothing", phantoms(0, n=2), "phantoms")


def test_a_healthy_image_with_a_true_region_is_left_out(model):
    """A label from a report and a radiologist's box contradict each other; an empty mask contradicts nothing."""
    healthy = phantoms(0, n=6)
    masks = [Image.fromarray(np.full((32, 32), 255 * (i == 4), np.uint8)) for i in range(6)]
    marked = healthy.map(lambda row, i: {**row, "mask": masks[i]}, with_indices=True, features=healthy.features)
    marked = marked.add_column("boxes", [[[1.0, 1.0, 4.0, 4.0]] if i == 2 else None for i in range(6)])
    assert rows_with_region(marked, range(6)) == [4]  # the empty mask of row 2 overrules its box
    marked = marked.map(lambda row, i: {**row, "mask": None if i == 2 else row["mask"]}, with_indices=True)
    assert rows_with_region(marked, range(6)) == [2, 4] and rows_with_region(marked, [0, 2]) == [2]
    result = calibrate_model(model, marked, "phantoms")
    assert len(result.scores.scores) == 4
    assert [text for text in result.failed.values() if "labelled healthy, but it has a true region" in text]
    assert len(result.failed) == 2
    calibrate_trained(model, marked, "phantoms")
    assert len(kept_scores(model).scores) == 4


def test_a_classifier_is_calibrated_too_without_denoising_errors(tmp_path):
    GradCAMPipeline(toy_resnet(), sample_size=32, class_names=["healthy", "ill"]).save_pretrained(tmp_path / "model")
    result = calibrate_model(tmp_path / "model", phantoms(0, n=4), "phantoms", progress=False)
    assert result.errors is None and not (tmp_path / "model" / ERRORS_FILE).exists()
    pipeline = opened(tmp_path / "model")
    assert pipeline.config.map_threshold == result.map_threshold >= 2e-5 and kept_scores(tmp_path / "model").fits(
        pipeline, {}
    )
    assert unlikeness_warnings(pipeline, [Image.new("L", (9, 9))]) == [[]]


# --- images unlike the training images


def test_an_image_of_another_kind_is_warned_of_and_a_further_phantom_is_not(calibrated):
    reference = kept_errors(calibrated)
    assert {name: part["n"] for name, part in reference.quantiles.items()} == {"healthy": 12, "diseased": 12}
    assert reference.threshold <= max(part["1"] for part in reference.quantiles.values())
    pipeline = opened(calibrated)
    further = [*phantoms(0, seed=9)["image"][:], *phantoms(1, seed=9)["image"][:]]
    warnings = unlikeness_warnings(pipeline, further)
    assert warnings.count([UNLIKE]) <= 8, "false alarms, of 24; so few images give a rough threshold"
    y, x = np.mgrid[:16, :16]
    stripes = Image.fromarray(((x + y) % 4 * 80).astype(np.uint8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    assert unlikeness_warnings(pipeline, [stripes, further[0], noise]) == [[UNLIKE], warnings[0], [UNLIKE]]


def test_errors_of_other_weights_or_of_no_calibration_warn_of_nothing(model, once):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    assert unlikeness_warnings(opened(model), [noise]) == [[]]
    pipeline = opened(once[0])
    assert unlikeness_warnings(pipeline, []) == [] and unlikeness_warnings(pipeline, [noise]) == [[UNLIKE]]
    pipeline = opened(once[0])
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    assert unlikeness_warnings(pipeline, [noise]) == [[]]


def test_fewer_images_than_a_covariance_needs_give_no_reference(model):
    features = np.random.default_rng(0).normal(size=(20, 4))
    assert ReferenceErrors.of(opened(model), "", features) is not None
    assert ReferenceErrors.of(opened(model), "", features[:19]) is None
    result = calibrate_model(model, phantoms(0, n=2), "phantoms", progress=False)
    assert result.errors is None and kept_errors(model) is None and kept_scores(model) is not None


def test_errors_do_not_depend_on_the_batch_and_hardly_on_bfloat16(model):
    pipeline, images = opened(model), phantoms(0, n=6)["image"][:]
    together = denoising_errors(pipeline, images)
    assert together.shape == (6, 4) and np.isfinite(together).all()
    assert np.concatenate([denoising_errors(pipeline, [image]) for image in images]) == pytest.approx(
        together, abs=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = denoising_errors(pipeline, images)
    assert 0 < np.abs(half - together).max() < 0.02


def test_an_image_is_denoised_under_the_null_label_of_each_view(model):
    pipeline, images = opened(model), phantoms(0, n=6)["image"][:]
    evaluations, forward = [], pipeline.unet.forward

    def count(x, t, class_labels):
        evaluations.append(class_labels.tolist())
        return forward(x, t, class_labels=class_labels)

    pipeline.unet.forward = count
    denoising_errors(pipeline, images)
    assert evaluations == [[4] * 6 + [5] * 6] * 3, "the null labels of two views, at three levels"


def test_a_guided_model_without_classes_in_its_unet_has_errors_too():
    unet, classifier = toy_unet(num_class_embeds=None), toy_classifier()
    pipeline = ClassifierGuidedPipeline(unet, classifier, DDIMScheduler(clip_sample=False))
    assert denoising_errors(pipeline, phantoms(0, n=2)["image"][:]).shape == (2, 4)


def test_the_distance_counts_features_by_their_spread(model):
    rng = np.random.default_rng(0)
    features = rng.normal(0, [1, 10], (1000, 2))
    reference = ReferenceErrors.of(opened(model), "", features)
    near, far = reference.distance(np.array([[0.0, 10.0], [10.0, 0.0]]))
    assert near == pytest.approx(1, rel=0.2) and far == pytest.approx(10, rel=0.2)
    new = reference.distance(rng.normal(0, [1, 10], (5000, 2)))
    assert 0.003 < np.mean(new > reference.threshold) < 0.03


# --- the command, the training, the results


def save_images(folder, dataset):
    folder.mkdir(parents=True)
    for i, image in enumerate(dataset["image"]):
        image.save(folder / f"{i}.png")
    return folder


def test_the_command_makes_a_model_ready_for_masks_and_warnings(model, tmp_path, capsys):
    healthy = save_images(tmp_path / "data" / "healthy", phantoms(0))
    diseased = save_images(tmp_path / "more" / "diseased", phantoms(1))
    images = save_images(tmp_path / "new", phantoms(0).select([0, 1]))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save(images / "noise.png")
    detect = ["detect", str(images), "--model", str(model), "--save-masks", "--out", str(tmp_path / "out")]
    assert main(detect) == 2 and "run `cxr-diffusers calibrate MODEL --healthy DATA`" in capsys.readouterr().err

    command = ["calibrate", str(model), "--healthy", f"folder:root={healthy.parent},classes=[healthy]"]
    assert main([*command, "--diseased", str(diseased.parent), "--named", "12 phantoms"]) == 0
    printed = capsys.readouterr().out
    threshold = opened(model).config.map_threshold
    assert f"map_threshold: {threshold:g} (95% of the pixels of 12 healthy images are below it)" in printed
    quantiles = kept_scores(model).map_quantiles
    assert f"pixels of healthy maps: {quantiles['0.5']:g} to {quantiles['0.9999']:g}, their quantiles 0.5 to" in printed
    assert "12 healthy and 12 diseased" in printed and kept_scores(model).data == "12 phantoms"

    assert main(detect) == 0
    assert f"1 x {UNLIKE}" in capsys.readouterr().out
    rows = {row["name"]: row for row in csv.DictReader(open(tmp_path / "out" / "results.csv"))}
    assert [rows[name]["warnings"] for name in ("0", "1", "noise")] == ["", "", UNLIKE]
    assert all(row["abnormal_fraction"] for row in rows.values())

    for threshold, out in (("healthy:0.99", "share"), (f"{quantiles['0.99']:g}", "value")):
        options = ["--no-panel", "--threshold", threshold, "--out", str(tmp_path / out)]
        assert main([*detect[:-2], *options]) == 0
    for name in rows:
        masks = [(tmp_path / out / "masks" / f"{name}.png").read_bytes() for out in ("share", "value", "out")]
        assert masks[0] == masks[1]
    assert masks[0] != masks[2], "the mask of the 99% quantile is that of the model's 95%"
    capsys.readouterr()
    missing = ["detect", "nowhere.png", "--model", str(tmp_path / "missing"), "--out", str(tmp_path / "refused")]
    for threshold in ("99%", "healthy", "healthy:", "healthy:99%", "healthy:1.5", "quantile:0.9", "0", "1.5", "nan"):
        assert main([*missing, "--threshold", threshold]) == 2
        error = capsys.readouterr().err
        assert "expected" in error and f"got '{threshold}'" in error and "missing" not in error
    assert not (tmp_path / "refused").exists()


def test_a_plain_folder_given_as_healthy_is_healthy(model, tmp_path, capsys):
    plain = save_images(tmp_path / "normal", phantoms(0, n=3))
    assert main(["calibrate", str(model), "--healthy", str(plain)]) == 0
    assert len(kept_scores(model).scores) == 3
    assert "warning: only 3 healthy images: threshold and p-values are coarse" in capsys.readouterr().err
    evaluate = ["evaluate", "phantom:n=4,size=32", "--model", str(model), "--healthy", str(plain), "--bootstrap", "5"]
    assert main([*evaluate, "--out", str(tmp_path / "out")]) == 0


def test_diseased_images_of_a_model_without_denoising_network_are_said_to_be_unused(tmp_path, capsys):
    GradCAMPipeline(toy_resnet(), sample_size=16).save_pretrained(tmp_path / "cam")
    images = [str(save_images(tmp_path / name, phantoms(0, n=2))) for name in ("normal", "ill")]
    assert main(["calibrate", str(tmp_path / "cam"), "--healthy", images[0], "--diseased", images[1]]) == 0
    assert "--diseased is not used, a GradCAMPipeline has no denoising network" in capsys.readouterr().err


def test_the_warning_is_written_into_the_panel(calibrated, tmp_path, monkeypatch):
    from cxr_diffusers.inference import detection_folder

    titles, draw = [], detection_folder.side_by_side
    monkeypatch.setattr(
        detection_folder, "side_by_side", lambda *panels, **kw: titles.append(kw["title"]) or draw(*panels, **kw)
    )
    images = save_images(tmp_path / "new", phantoms(0).select([0]))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save(images / "noise.png")
    assert main(["detect", str(images), "--model", str(calibrated), "--out", str(tmp_path / "out")]) == 0
    assert [UNLIKE in title for title in sorted(titles)] == [False, True]


def test_a_trained_model_and_its_best_one_are_calibrated_on_the_labelled_validation_images(model):
    opened(model).save_pretrained(model / "best")
    dataset = load_phantom(n=20, size=16, seed=1)
    assert calibrate_trained(model, dataset, "phantom") == [model, model / "best"]
    for folder in (model, model / "best"):
        count = dataset["label"][:].count(0)
        assert kept_scores(folder).data == f"{count} healthy validation images (phantom)"
        assert opened(folder).config.map_threshold > 0 and kept_errors(folder).quantiles["diseased"]["n"] == 20 - count
    assert calibrate_trained(model, phantoms(1), "phantom") == []


def test_the_errors_of_the_shipped_model_tell_a_photo_from_a_chest_as_far_as_radiographs_are_at_hand():
    pipeline = opened(default_checkpoint("cxr_cfg_128"))
    sources = Path(__file__).parents[2] / "shared" / "cxr" / "val_implants" / "sources"
    chests = [Image.open(path).convert("L") for path in sorted(sources.glob("*.png"))[:1]]
    expected = [[UNLIKE], *[[] for _ in chests]]
    assert unlikeness_warnings(pipeline, [Image.fromarray(skimage.data.camera()), *chests]) == expected


def test_the_file_of_errors_comes_back_as_it_was(model, tmp_path):
    reference = ReferenceErrors.of(opened(model), "x", np.random.default_rng(0).normal(size=(30, 4)))
    keep_errors(reference, tmp_path)
    assert kept_errors(tmp_path) == reference
