"""Detection over folders: written files, resuming, broken files, other settings."""

import csv
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from cxr_diffusers import GradCAMPipeline
from cxr_diffusers.files import as_json, load_map
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.hub.loading import load_pipeline
from cxr_diffusers.inference import detection_folder
from cxr_diffusers.inference.detection import detect
from cxr_diffusers.inference.panels import (
    PANEL_SIZE,
    SMALLEST_PANEL,
    crisp_counterfactual,
    in_model_greys,
    panel_size,
)
from cxr_diffusers.inference.reference_scores import (
    SCORES_FILE,
    ReferenceScores,
    keep_scores,
    kept_scores,
    reference_scores,
)
from cxr_diffusers.inference.thresholds import describe_threshold
from cxr_diffusers.pipelines.cxr_images import restore_map
from helpers import FEW_STEPS, run_detect, toy_resnet, write_dicom


def make_image(seed, height=24, width=18, dtype=np.uint8):
    values = np.random.default_rng(seed).random((height // 3, width // 3))
    return Image.fromarray((np.kron(values, np.ones((3, 3))) * np.iinfo(dtype).max).astype(dtype))


@pytest.fixture
def folder(tmp_path):
    """Five radiographs of several kinds, two of them called `a`, one in a study of its own."""
    folder = tmp_path / "images"
    (folder / "study").mkdir(parents=True)
    make_image(0).save(folder / "a.png")
    make_image(1, 30, 30).save(folder / "a.jpg")
    make_image(2).save(folder / "study" / "a.tif")
    np.save(folder / "deep.npy", np.asarray(make_image(3, dtype=np.uint16)))
    write_dicom(folder / "1.2.840.10008.1", np.asarray(make_image(4, dtype=np.uint16)) // 16, 12)
    return folder


def table(out):
    with open(out / "results.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def settings_of(out):
    return json.loads((out / "settings.json").read_text())


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}


def test_every_image_gets_a_panel_a_map_and_a_row(pipeline, folder, tmp_path):
    out = tmp_path / "out"
    summary = run_detect(pipeline, [folder], out, batch_size=2)
    assert (summary["images"], summary["computed"], summary["failed"]) == (5, 5, {})
    rows = table(out)
    assert {"deep", "study__a", "1.2.840.10008.1", "a"} < set(rows) and len(rows) == 5
    scores = [float(row["anomaly_score"]) for row in rows.values()]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0
    for name, row in rows.items():
        anomaly_map = load_map(out / "maps" / f"{name}.png")
        assert anomaly_map.shape == (int(row["height"]), int(row["width"]))
        assert anomaly_map.max() == pytest.approx(float(row["map_max"]), abs=1e-5)
        assert row["abnormal_fraction"] == ""  # this model has no threshold
        with Image.open(out / f"{name}.png") as strip:
            assert strip.mode == "RGB" and 2 * SMALLEST_PANEL < strip.width < 3 * PANEL_SIZE
    assert summary["seconds_per_image"] == pytest.approx(
        np.mean([float(r["seconds"]) for r in rows.values()]), abs=1e-4
    )


def test_the_saved_map_equals_the_pipelines_map_at_the_inputs_resolution(pipeline, folder, tmp_path):
    run_detect(pipeline, [folder / "a.png"], tmp_path, map_format="npy")
    output = pipeline(make_image(0), output_type="np", **FEW_STEPS)
    expected = restore_map(output.anomaly_map[0], 24, 18, "pad")
    np.testing.assert_array_equal(np.load(tmp_path / "maps" / "a.npy"), expected)
    assert float(table(tmp_path)["a"]["anomaly_score"]) == pytest.approx(output.anomaly_score[0])


def test_a_second_run_computes_only_new_or_changed_files(pipeline, folder, tmp_path):
    out = folder / "out"  # inside the folder: its own images are no input
    run_detect(pipeline, [folder], out)
    before = times(out)
    summary = run_detect(pipeline, [folder], out)
    assert (summary["images"], summary["computed"], summary["seconds_per_image"]) == (5, 0, None)
    assert times(out) == before
    scores = table(out)
    make_image(7, 30, 18).save(folder / "a.png")
    make_image(8).save(folder / "a.bmp")  # a third of the name `a`, first in the folder's order
    assert run_detect(pipeline, [folder], out)["computed"] == 2
    now = table(out)
    changed = {name for name in now if scores.get(name) != now[name]}
    assert len(now) == 6 and len(changed) == 2
    assert {Path(now[name]["image"]).name for name in changed} == {"a.png", "a.bmp"}


@pytest.mark.parametrize("names", [("b", "b_crisp"), ("b_crisp", "b")])
def test_the_crisp_counterfactual_of_one_image_is_not_the_file_of_another(pipeline, tmp_path, names):
    for i, name in enumerate(names):
        make_image(i).save(tmp_path / f"{name}.png")
        run_detect(pipeline, [tmp_path / f"{name}.png"], tmp_path / "out", save_counterfactual=True)
    assert len(table(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out" / "counterfactuals").iterdir())) == 4


def test_results_of_two_folders_are_in_one_table(pipeline, folder, tmp_path):
    out = tmp_path / "out"
    run_detect(pipeline, [folder / "a.png"], out)
    run_detect(pipeline, [folder / "study"], out)
    assert {Path(row["image"]).name for row in table(out).values()} == {"a.png", "a.tif"}


def test_a_broken_file_is_reported_and_computed_once_it_is_repaired(pipeline, folder, tmp_path):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[:60])
    summary = run_detect(pipeline, [folder], tmp_path / "out")
    assert summary["computed"] == 4 and list(summary["failed"]) == [str(folder / "a.png")]
    assert "a.png" in (tmp_path / "out" / "failed.csv").read_text() and len(table(tmp_path / "out")) == 4
    (folder / "a.png").write_bytes(whole)
    summary = run_detect(pipeline, [folder], tmp_path / "out")
    assert summary["computed"] == 1 and not summary["failed"]
    assert len(table(tmp_path / "out")) == 5 and not (tmp_path / "out" / "failed.csv").exists()


def test_a_file_that_became_unreadable_loses_its_row(pipeline, folder, tmp_path):
    run_detect(pipeline, [folder / "a.png"], tmp_path)
    (folder / "a.png").write_bytes(b"not an image")
    assert list(run_detect(pipeline, [folder / "a.png"], tmp_path)["failed"]) == [str(folder / "a.png")]
    assert not (tmp_path / "results.csv").exists() and not times(tmp_path)


def test_nothing_is_left_of_the_image_that_an_unreadable_file_was_before(pipeline, folder, tmp_path):
    options = dict(save_masks=True, save_counterfactual=True, save_trajectory=True, save_boxes="coco", threshold=0.07)
    run_detect(pipeline, [folder / "a.png"], tmp_path / "out", **options)
    out = tmp_path / "out"
    assert len([path for path in out.rglob("a*") if path.is_file()]) == 7 and (out / "boxes.json").is_file()
    (folder / "a.png").write_bytes(b"not an image")
    run_detect(pipeline, [folder / "a.png"], out, **options)
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"settings.json", "failed.csv"}


def test_results_of_other_settings_are_not_mixed(pipeline, folder, tmp_path):
    run_detect(pipeline, [folder / "a.png"], tmp_path)
    with pytest.raises(FileExistsError, match="call: .*20.*, now .*30"):
        detect(pipeline, [folder], tmp_path, call_kwargs={**FEW_STEPS, "num_inference_steps": 30}, progress=False)
    pipeline.unet.conv_out.bias.data += 1
    with pytest.raises(FileExistsError, match="weights"):
        run_detect(pipeline, [folder], tmp_path)


def test_a_tuple_and_a_list_are_the_same_setting(pipeline, folder, tmp_path):
    out, call = tmp_path / "out", {**FEW_STEPS, "noise_level": (200, 300)}
    for computed in (1, 0):
        summary = detect(pipeline, [folder / "a.png"], out, call_kwargs=call, progress=False)
        assert summary["computed"] == computed


def test_a_refused_call_leaves_no_settings(pipeline, folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="direction"):
        detect(pipeline, [folder / "a.png"], out, call_kwargs={**FEW_STEPS, "direction": "up"}, progress=False)
    assert not (out / "settings.json").exists()
    assert run_detect(pipeline, [folder / "a.png"], out)["computed"] == 1
    assert json.loads((out / "settings.json").read_text())["call"] == FEW_STEPS


def test_missing_inputs_and_invalid_options_are_refused(pipeline, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for images, out, error, message in [
        (tmp_path / "nowhere", "out", FileNotFoundError, "no such file or folder: .*nowhere"),
        (tmp_path / "empty", "out", FileNotFoundError, "no png, .* image in .*empty"),
        (folder, "images", ValueError, "an output folder of its own"),
        (folder / "a.png", "images", ValueError, "an output folder of its own"),
    ]:
        with pytest.raises(error, match=message):
            run_detect(pipeline, [images], tmp_path / out)
    with pytest.raises(ValueError, match="png or npy, got 'tif'"):
        run_detect(pipeline, [folder], tmp_path / "out", map_format="tif")
    with pytest.raises(ValueError, match="expected `vmax` above 0, got 0"):
        run_detect(pipeline, [folder], tmp_path / "out", vmax=0)
    with pytest.raises(ValueError, match="expected a method with a counterfactual to save, got a GradCAMPipeline"):
        run_detect(GradCAMPipeline(toy_resnet(), sample_size=16), [folder], tmp_path / "out", save_counterfactual=True)


def test_a_threshold_gives_one_colour_scale_and_a_fraction(pipeline, folder, tmp_path):
    pipeline.register_to_config(map_threshold=0.05, settings=FEW_STEPS)
    run_detect(pipeline, [folder / "a.png"], tmp_path, save_counterfactual=True)
    anomaly_map = load_map(tmp_path / "maps" / "a.png")
    assert float(table(tmp_path)["a"]["abnormal_fraction"]) == pytest.approx(np.mean(anomaly_map > 0.05), abs=0.01)
    assert json.loads((tmp_path / "settings.json").read_text())["vmax"] == pytest.approx(0.15)
    with Image.open(tmp_path / "counterfactuals" / "a.png") as counterfactual:
        assert (counterfactual.mode, counterfactual.size) == ("L", (16, 16))
    # the threshold was measured with the model's own settings; those of the counterfactual alone may differ
    for setting, has_fraction in (
        ({"keep_below": 0.1}, True),
        ({"score": "change"}, True),
        ({"guidance_scale": 3.0}, False),
    ):
        out = tmp_path / next(iter(setting))
        detect(pipeline, [folder / "a.png"], out, call_kwargs={**FEW_STEPS, **setting}, progress=False)
        assert bool(table(out)["a"]["abnormal_fraction"]) == has_fraction
        assert json.loads((out / "settings.json").read_text())["vmax"] == pytest.approx(0.15)


@pytest.mark.parametrize(("side", "longest"), [(16, 320), (400, 400), (3000, 512)])
def test_a_panel_has_the_size_of_its_image_within_limits(side, longest):
    assert panel_size(Image.new("L", (10, side))) == panel_size(np.zeros((side, 10, 1), np.uint8)) == longest


@pytest.mark.parametrize("scaling", ["minmax", "dtype"])
def test_the_panel_shows_the_input_in_the_greys_of_the_model(scaling):
    """Exposure is stretched where the model stretches it; a marker of one bright pixel decides nothing."""
    array = np.tile(np.linspace(60, 120, 64).astype(np.uint8), (96, 1))
    array[0, 0] = 255
    grey = in_model_greys(Image.fromarray(array), 16, scaling, "pad")
    assert grey.shape == (512, 341)
    low, high = (0, 1) if scaling == "minmax" else (60 / 255, 120 / 255)
    middle = grey[200:, 40:-40]
    assert middle.min() == pytest.approx(low + 40 / 341 * (high - low), abs=0.07)
    assert middle.max() == pytest.approx(high - 40 / 341 * (high - low), abs=0.07)


def test_a_killed_run_resumes(pipeline, tmp_path):
    """kill -9 in the middle: finished images are not computed again, the rest is, and nothing half-written counts."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(6):
        make_image(i).save(images / f"{i}.png")
    settings = {"num_inference_steps": 150, "noise_level": 400}
    options = dict(call_kwargs=settings, progress=False)
    child = multiprocessing.get_context("fork").Process(
        target=detect, args=(pipeline, [images], out), kwargs={**options, "batch_size": 1}
    )
    child.start()
    while child.is_alive() and len(list((out / "rows").glob("*.json"))) < 2:
        time.sleep(0.02)
    child.kill()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    done = times(out)
    assert 2 <= len(done) < 6 and not (out / "results.csv").exists()
    summary = detect(pipeline, [images], out, **options)
    assert summary["computed"] == 6 - len([name for name in done if name.endswith(".json")])
    assert {name: when for name, when in times(out).items() if name in done} == done
    assert len(table(out)) == 6


def test_a_bad_name_or_link_fails_alone(pipeline, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    deep = images / ("胸" * 75) / ("片" * 75)
    deep.mkdir(parents=True)
    make_image(0).save(images / "good.png")
    make_image(1).save(images / "two\nlines.png")
    make_image(2).save(deep / "long.png")
    make_image(3).save(images / "plain.png")
    os.rename(images / "plain.png", os.fsencode(images) + b"/\xff.png")
    (images / "dangling.png").symlink_to("nowhere.png")
    (images / "loop.png").symlink_to("loop.png")
    summary = run_detect(pipeline, [images], out)
    assert {Path(path).name for path in summary["failed"]} == {"dangling.png", "loop.png"}
    assert summary["computed"] == 4 and len(table(out)) == 4
    with open(out / "failed.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert all((out / f"{name}.png").is_file() and "\n" not in name for name in table(out))
    assert run_detect(pipeline, [images], out)["computed"] == 0


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"\xff", b'{"name": "a"'])
def test_damaged_rows_and_settings_are_named_and_computed_again(pipeline, folder, tmp_path, caplog, content):
    out, images = tmp_path / "out", [folder / "a.png", folder / "deep.npy"]
    run_detect(pipeline, images, out)
    (out / "rows" / "a.json").write_bytes(content)
    assert run_detect(pipeline, images, out)["computed"] == 1 and len(table(out)) == 2
    assert str(out / "rows" / "a.json") in caplog.text
    if content != b"{}":  # settings that can be read are compared
        (out / "settings.json").write_bytes(content)
        assert run_detect(pipeline, images, out)["computed"] == 2
        assert str(out / "settings.json") in caplog.text
        assert run_detect(pipeline, images, out)["computed"] == 0


def test_a_source_replaced_while_it_is_computed_is_computed_again(pipeline, folder, tmp_path):
    class Replacing(type(pipeline)):
        def __call__(self, *args, **kwargs):
            make_image(9, 30, 30).save(folder / "a.png")
            return super().__call__(*args, **kwargs)

    slow = Replacing(**pipeline.components)
    slow.register_to_config(**{k: v for k, v in pipeline.config.items() if k in ("aspect", "scaling")})
    run_detect(slow, [folder / "a.png"], tmp_path / "out")
    assert table(tmp_path / "out")["a"]["height"] == "24"
    assert run_detect(slow, [folder / "a.png"], tmp_path / "out")["computed"] == 1
    assert table(tmp_path / "out")["a"]["height"] == "30"


def test_a_write_error_stops_the_run_and_the_same_call_resumes(pipeline, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "maps").write_text("a file where a folder must be: nothing can be written")
    with pytest.raises(OSError, match="maps"):
        run_detect(pipeline, [folder], out)
    (out / "maps").unlink()
    assert run_detect(pipeline, [folder], out)["computed"] == 5


def test_an_image_of_one_value_has_no_score_and_a_colour_photograph_a_warning(pipeline, folder, tmp_path):
    Image.new("L", (20, 20), 7).save(folder / "flat.png")
    colours = np.random.default_rng(0).integers(0, 255, (3, 3, 3), np.uint8)
    Image.fromarray(colours).resize((24, 24), Image.Resampling.NEAREST).save(folder / "photo.png")
    make_image(5).convert("RGB").save(folder / "grey_as_rgb.png")
    marked = make_image(6, 120, 90).convert("RGB")
    marked.paste((255, 200, 0), (10, 10, 40, 40))
    marked.save(folder / "marked.png")
    summary = run_detect(pipeline, [folder], tmp_path / "out")
    assert list(summary["failed"]) == [str(folder / "flat.png")]
    assert "one value" in summary["failed"][str(folder / "flat.png")]
    warnings = {Path(path).name: text for path, text in summary["warnings"].items()}
    assert warnings.keys() == {"photo.png", "marked.png"}
    assert warnings["photo.png"].startswith("a colour image") and warnings["marked.png"].startswith("some colour")


def test_a_given_threshold_determines_fraction_and_mask(pipeline, folder, tmp_path):
    with pytest.raises(ValueError, match="expected `threshold`"):
        run_detect(pipeline, [folder / "a.png"], tmp_path, save_masks=True)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        run_detect(pipeline, [folder / "a.png"], tmp_path, threshold=2)
    run_detect(pipeline, [folder / "a.png"], tmp_path, threshold=0.07, save_masks=True, save_panel=False)
    mask = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    anomaly_map = load_map(tmp_path / "maps" / "a.png")
    clear = abs(anomaly_map - 0.07) > 1e-4
    np.testing.assert_array_equal(mask[clear], 255 * (anomaly_map > 0.07)[clear])
    assert float(table(tmp_path)["a"]["abnormal_fraction"]) == pytest.approx((mask > 0).mean())
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(FileExistsError, match="map_threshold: 0.07, now 0.08"):
        run_detect(pipeline, [folder / "a.png"], tmp_path, threshold=0.08, save_masks=True, save_panel=False)


@pytest.fixture
def calibrated(pipeline, tmp_path):
    """A model whose folder has quantiles of healthy maps."""
    pipeline.register_to_config(settings=FEW_STEPS)
    pipeline.save_pretrained(tmp_path / "model")
    model = type(pipeline).from_pretrained(tmp_path / "model")
    model.set_progress_bar_config(disable=True)
    quantiles = {"0.5": 0.01, "0.9": 0.04, "0.99": 0.07}
    scores = ReferenceScores("toys", as_json(model.settings()), [0.1], weights_digest(model), map_quantiles=quantiles)
    keep_scores(scores, tmp_path / "model")
    return model


def test_a_quantile_of_healthy_images_is_a_threshold(calibrated, folder, tmp_path):
    images, outputs = [folder / "a.png", folder / "a.jpg"], dict(save_masks=True, save_boxes="yolo")
    for out, threshold in ("share", "healthy:0.945"), ("value", 0.055):
        run_detect(calibrated, images, tmp_path / out, threshold=threshold, **outputs)
    share, value = tmp_path / "share", tmp_path / "value"
    settings = settings_of(share)
    assert (settings["healthy_quantile"], settings["map_threshold"]) == (0.945, pytest.approx(0.055))
    assert settings["vmax"] == pytest.approx(0.165)
    assert settings_of(value)["healthy_quantile"] is None
    for name in table(share):
        for path in (f"masks/{name}.png", f"labels/{name}.txt"):
            assert (share / path).read_bytes() == (value / path).read_bytes()
        assert table(share)[name]["abnormal_fraction"] == table(value)[name]["abnormal_fraction"] not in ("", "0.0")
    assert (share / "a.png").read_bytes() != (value / "a.png").read_bytes()  # its title names the quantile
    assert describe_threshold(0.055, 0.945) == "0.055 (healthy 94.5% quantile)"
    assert run_detect(calibrated, images, share, threshold="healthy:0.945", **outputs)["computed"] == 0
    run_detect(calibrated, images[:1], tmp_path / "high", threshold=0.4)
    assert settings_of(tmp_path / "high")["vmax"] == 1, "a map has no higher values"
    with pytest.raises(FileExistsError, match=r"healthy_quantile: 0.945, now 0.9"):
        run_detect(calibrated, images, share, threshold="healthy:0.9", **outputs)
    # results of a version without quantiles are continued
    (value / "settings.json").write_text(
        json.dumps({k: v for k, v in settings_of(value).items() if "quantile" not in k})
    )
    assert run_detect(calibrated, images, value, threshold=0.055, **outputs)["computed"] == 0


def test_a_quantile_is_refused_where_it_was_not_measured(calibrated, folder, tmp_path):
    def refuse(message, threshold="healthy:0.9", **setting):
        with pytest.raises(ValueError, match=message):
            call = {**FEW_STEPS, **setting}
            detect(calibrated, [folder / "a.png"], tmp_path / "out", threshold=threshold, call_kwargs=call)
        assert not (tmp_path / "out").exists()

    refuse("expected a quantile from 0.5 to 0.99, .* got 0.999", "healthy:0.999")
    refuse("from 0 to 1 after `healthy:`, got 'healthy:-0.1'", "healthy:-0.1")
    refuse("expected `threshold` as a map value such as .*, got 'otsu'", "otsu")
    refuse(
        "expected the model's own settings for .*healthy:0.9.* got other settings: guidance_scale", guidance_scale=3.0
    )
    out, only_counterfactual = tmp_path / "own", {**FEW_STEPS, "keep_below": 0.1, "score": "change"}
    detect(
        calibrated, [folder / "a.png"], out, threshold="healthy:0.9", call_kwargs=only_counterfactual, progress=False
    )
    assert settings_of(out)["map_threshold"] == 0.04

    scores = kept_scores(tmp_path / "model")
    keep_scores(replace(scores, weights="of an earlier training"), tmp_path / "model")
    refuse("expected quantiles of healthy maps of the model's present weights .* run `cxr-diffusers calibrate MODEL")
    older = {k: v for k, v in vars(scores).items() if k != "map_quantiles"}
    (tmp_path / "model" / SCORES_FILE).write_text(json.dumps(older))  # of a version without quantiles
    for _ in range(2):
        refuse("expected a model with quantiles of healthy maps for .* got one without: run `cxr-diffusers calibrate")
        (tmp_path / "model" / SCORES_FILE).unlink(missing_ok=True)


def test_results_give_the_rank_among_the_models_healthy_scores(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    model = type(pipeline).from_pretrained(tmp_path / "model")
    score = float(model(make_image(0), output_type="np", **FEW_STEPS).anomaly_score[0])
    healthy = [score * share for share in (0.25, 0.5, 0.75, 1.5)]
    call = as_json(model.settings(**FEW_STEPS))
    keep_scores(ReferenceScores("four chests", call, healthy, weights_digest(model)), tmp_path / "model")
    run_detect(model, [folder / "a.png"], tmp_path / "out")
    row = table(tmp_path / "out")["a"]
    assert (float(row["healthy_percentile"]), float(row["p_value"]), row["healthy_images"]) == (75, 2 / 5, "4")
    assert list(row)[:6] == ["image", "name", "healthy_percentile", "p_value", "healthy_images", "anomaly_score"]
    detect(model, [folder / "a.png"], tmp_path / "other", call_kwargs={**FEW_STEPS, "noise_level": 200}, progress=False)
    assert table(tmp_path / "other")["a"]["p_value"] == ""  # other settings: other scores


def test_scores_that_the_stored_digits_cannot_tell_apart_are_equal(pipeline):
    """A classifier may give most healthy images a probability below the last digit."""
    dataset = Dataset.from_dict({"view": ["PA"] * 4})
    reference = reference_scores(pipeline, dataset, "healthy", [1e-7, 3e-7, 4e-7, 0.2])
    assert reference.share_below(2e-7) == (0, 4) and reference.p_value(2e-7) == 1
    assert reference.share_below(0.2 + 1e-8, "PA") == (3, 4) and reference.share_below(0.21) == (4, 4)


def test_a_headline_gives_the_rank_and_the_p_value_before_the_score():
    reference = ReferenceScores("37 chests", {}, [float(i) for i in range(37)])
    assert reference.headline(30.5) == "higher than 31 of 37 healthy images (p = .18)"
    assert reference.headline(-1) == "higher than 0 of 37 healthy images (p = 1)"


@pytest.mark.parametrize("box_format", ["coco", "yolo"])
def test_boxes_surround_the_pixels_above_the_threshold_and_are_kept_on_resuming(pipeline, folder, tmp_path, box_format):
    with pytest.raises(ValueError, match="for `save_boxes`, got neither"):
        run_detect(pipeline, [folder], tmp_path, save_boxes=box_format)
    with pytest.raises(ValueError, match="coco or yolo, got 'voc'"):
        run_detect(pipeline, [folder], tmp_path, save_boxes="voc", threshold=0.07)
    options = dict(save_boxes=box_format, threshold=0.07, save_masks=True, save_panel=False)
    run_detect(pipeline, [folder / "a.png"], tmp_path, **options)
    run_detect(pipeline, [folder / "a.png", folder / "a.jpg"], tmp_path, **options)
    rows = table(tmp_path)
    assert len(rows) == 2
    for name, row in rows.items():
        height, width = int(row["height"]), int(row["width"])
        if box_format == "yolo":
            lines = (tmp_path / "labels" / f"{name}.txt").read_text().splitlines()
            shares = np.array([line.split()[1:5] for line in lines], float).reshape(-1, 4) * ([width, height] * 2)
            boxes = np.concatenate([shares[:, :2] - shares[:, 2:] / 2, shares[:, 2:]], axis=1).round().astype(int)
        else:
            content = json.loads((tmp_path / "boxes.json").read_text())
            (image_id,) = [image["id"] for image in content["images"] if image["file_name"] == row["image"]]
            boxes = [box["bbox"] for box in content["annotations"] if box["image_id"] == image_id]
        covered = np.zeros((height, width), bool)
        for x, y, w, h in boxes:
            covered[y : y + h, x : x + w] = True
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{name}.png")) > 0
        assert mask.any() and not (mask & ~covered).any()
        assert {tuple(np.flatnonzero(mask.any(axis=axis))[[0, -1]]) for axis in (0, 1)} == {
            tuple(np.flatnonzero(covered.any(axis=axis))[[0, -1]]) for axis in (0, 1)
        }


def test_the_crisp_counterfactual_is_the_input_plus_the_enlarged_change():
    config = {"aspect": "pad", "scaling": "minmax"}
    rng = np.random.default_rng(0)
    source = Image.fromarray(np.kron(rng.integers(50, 90, (40, 30)), np.ones((3, 3))).astype(np.uint8))
    image = np.full((16, 16, 1), 0.5, np.float32)
    grey = in_model_greys(source, 16, "minmax", "pad", 120)
    np.testing.assert_array_equal(crisp_counterfactual(source, image, image, config), grey)
    changed = image.copy()
    changed[:8] -= 0.125
    changed[8:] += 0.125
    crisp = crisp_counterfactual(source, image, changed, config)
    assert crisp.shape == (120, 90)
    inside = (grey > 0.2) & (grey < 0.8)
    for rows, change in ((slice(0, 50), -0.125), (slice(70, 120), 0.125)):
        np.testing.assert_allclose((crisp - grey)[rows][inside[rows]], change, atol=1e-5)


def test_the_panel_of_a_method_without_counterfactual_has_none(pipeline, folder, tmp_path):
    """A copy of the input below the word "counterfactual" would say that nothing had to change."""
    classifier = GradCAMPipeline(toy_resnet(), sample_size=16, class_names=["healthy", "ill"])
    run_detect(pipeline, [folder / "a.png"], tmp_path / "three")
    detect(classifier, [folder / "a.png"], tmp_path / "two", progress=False)
    three, two = (Image.open(tmp_path / name / "a.png") for name in ("three", "two"))
    assert 0.6 * three.width < two.width < 0.72 * three.width


def test_the_title_of_two_panels_has_the_zone_and_the_fraction_in_a_second_line(folder, tmp_path, monkeypatch):
    """It was cut at the end of one line."""
    model = load_pipeline("cxr_pyramid_128")
    titles, draw = [], detection_folder.side_by_side
    monkeypatch.setattr(
        detection_folder, "side_by_side", lambda *panels, **kw: titles.append(kw["title"]) or draw(*panels, **kw)
    )
    detect(model, [folder / "a.png"], tmp_path / "out", progress=False)
    first, second = titles[0].split("\n")[:2]
    assert first.startswith("a    higher than") and re.fullmatch(r"score [\d.]+", first.split("    ")[-1])
    assert re.fullmatch(r"(largest part in the \w+ \w+ zone    )?[\d.]+% of the image above the threshold", second)


def test_a_panel_bears_the_name_in_the_table_and_warnings_in_a_line_of_their_own(pipeline, tmp_path, monkeypatch):
    """Images of CheXpert are all called view1_frontal.jpg; a long line is cut at its end, where the warnings were."""
    for patient in ("patient1", "patient2"):
        (tmp_path / "images" / patient).mkdir(parents=True)
    make_image(0).save(tmp_path / "images" / "patient1" / "view1_frontal.png")
    colour = np.random.default_rng(0).integers(0, 255, (24, 18, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "images" / "patient2" / "view1_frontal.png")
    titles, draw = [], detection_folder.side_by_side
    monkeypatch.setattr(
        detection_folder, "side_by_side", lambda *panels, **kw: titles.append(kw["title"]) or draw(*panels, **kw)
    )
    run_detect(pipeline, [tmp_path / "images"], tmp_path / "out")
    rows = table(tmp_path / "out")
    grey, coloured = (title.split("\n") for title in sorted(titles))
    assert [lines[0].split()[0] for lines in (grey, coloured)] == sorted(rows)
    assert (len(grey), coloured[1:]) == (1, [rows["patient2__view1_frontal"]["warnings"]])


def test_a_pipeline_with_a_lung_segmenter_fills_the_zone_columns(pipeline, folder, tmp_path, monkeypatch):
    from cxr_diffusers import CFGAnomalyPipeline, LungSegmenter

    run_detect(pipeline, [folder / "a.png"], tmp_path / "without")
    assert table(tmp_path / "without")["a"]["zone"] == ""
    torch.manual_seed(0)
    segmenter = LungSegmenter(sample_size=16, block_out_channels=(4, 4))
    with_lungs = CFGAnomalyPipeline(pipeline.unet, pipeline.scheduler, lung_segmenter=segmenter)
    titles, draw = [], detection_folder.side_by_side
    monkeypatch.setattr(
        detection_folder, "side_by_side", lambda *panels, **kw: titles.append(kw["title"]) or draw(*panels, **kw)
    )
    run_detect(with_lungs, [folder / "a.png"], tmp_path / "with", save_counterfactual=True)
    row = table(tmp_path / "with")["a"]
    assert row["zone"] and f"largest part in the {row['zone']} zone" in titles[0]
    assert 0 <= float(row["zone_share"]) <= 1 and 0 <= float(row["outside_lungs"]) <= 1
    with Image.open(tmp_path / "with" / "counterfactuals" / "a_crisp.png") as crisp:
        assert (crisp.mode, crisp.size) == ("L", (18, 24))
