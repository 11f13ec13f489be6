"""The web page: reading of uploads, analysis, rendering and comparison with healthy images."""

import base64
import json
import re
import socket
import struct
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from cxr_diffusers import (
    CFGAnomalyPipeline,
    FixedPointGANPipeline,
    GradCAMPipeline,
    LungSegmenter,
    load_phantom,
    read_image,
)
from cxr_diffusers.cli import main
from cxr_diffusers.demo import rendering
from cxr_diffusers.demo.analysis import Step, Stopped, analyse, stream
from cxr_diffusers.demo.serve import open_models
from cxr_diffusers.demo.uploads import Upload, read_upload
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import DIGESTS, weights_digest
from cxr_diffusers.hub.loading import read_index
from cxr_diffusers.inference.reference_scores import (
    ReferenceScores,
    cached_scores,
    keep_scores,
    kept_scores,
    measure_scores,
)
from cxr_diffusers.inference.regions import ZONES
from cxr_diffusers.pipelines.cxr_images import restore_map
from helpers import TEN_STEPS, chest, picture_of, toy_generator, toy_resnet, write_dicom

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toy(pipeline):
    pipeline.register_to_config(settings=TEN_STEPS, map_threshold=0.02)
    return pipeline


@pytest.fixture
def upload():
    return Upload(Image.fromarray(chest()), "chest <1>.png", [])


# --- uploads


def test_radiographs_are_read_as_they_are(tmp_path):
    Image.fromarray(chest(dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([chest()] * 3, -1)).save(tmp_path / "grey.jpg", quality=95)
    write_dicom(tmp_path / "1.2.840.1", chest(dtype=np.uint16) >> 4, 12)
    for name, mode in (("deep.png", "I;16"), ("grey.jpg", "L"), ("1.2.840.1", "I;16")):
        upload = read_upload(tmp_path / name)
        assert (upload.image.mode, upload.image.size, upload.name) == (mode, (50, 60), name)
        assert not upload.warnings
    np.testing.assert_array_equal(read_upload(tmp_path / "deep.png").image, chest(dtype=np.uint16))


def png_header(width, height):
    """A PNG whose header claims a size, with nearly no data: a decompression bomb."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9))]
    chunks = [(name + content, content) for name, content in (*chunks, (b"IEND", b""))]
    packed = (struct.pack(">I", len(rest)) + whole + struct.pack(">I", zlib.crc32(whole)) for whole, rest in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_refused(folder):
    """Write files that the page refuses; returns {file name: part of the reason}."""
    rng = np.random.default_rng(0)
    (folder / "text.png").write_text("no image at all")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n")
    (folder / "page.html").write_text("<p>")
    (folder / "bomb.png").write_bytes(png_header(9000, 9000))
    (folder / "cut.png").write_bytes(png_header(400, 400))
    Image.fromarray(rng.integers(0, 255, (90, 90, 3)).astype(np.uint8)).save(folder / "photo.png")
    Image.new("L", (90, 90), 200).save(folder / "blank.png")
    Image.fromarray((rng.random((90, 90)) < 0.001).astype(np.uint8) * 255).save(folder / "dust.png")
    Image.fromarray(chest(20, 90)).save(folder / "small.png")
    Image.fromarray(chest(40, 400)).save(folder / "long.png")
    write_dicom(folder / "large.dcm", chest(dtype=np.uint16), 16, Rows=30000, Columns=30000)
    write_dicom(folder / "deflated.dcm", chest(dtype=np.uint16), 16, syntax=DeflatedExplicitVRLittleEndian)
    (folder / "nothing.dcm").write_bytes(b"\0" * 400)
    for name in ("empty.dcm", "empty.png"):
        (folder / name).touch()
    return {
        "text.png": "cannot be read as an image",
        "script.png": "cannot be read as an image",
        "page.html": "Expected a radiograph as png",
        "bomb.png": "9000 \u00d7 9000 pixels are more than the limit of 40 megapixels",
        "cut.png": "cannot be read as an image",
        "photo.png": "a colour image",
        "blank.png": "got one value in all 8,100 pixels",
        "dust.png": "cannot be a radiograph: it has 2 grey values",
        "small.png": "are too few",
        "long.png": "too long for a chest",
        "large.dcm": "more than the limit of 40 megapixels",
        "deflated.dcm": "compressed as a whole",
        "nothing.dcm": "no DICOM file",
        "empty.dcm": "the file is empty",
        "empty.png": "the file is empty",
    }


def test_other_files_are_refused_with_a_reason_that_names_the_file_but_no_folder(tmp_path):
    for name, message in write_refused(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            read_upload(tmp_path / name)
        reason = str(refused.value)
        assert reason.startswith(name) and str(tmp_path) not in reason and len(reason) < 300, reason


def test_tinted_images_and_other_views_and_body_parts_get_a_warning(tmp_path):
    tinted = np.stack([chest(), chest() * 0.9, chest() * 0.8], -1).astype(np.uint8)
    Image.fromarray(tinted).save(tmp_path / "tint.png")
    assert "some colour" in read_upload(tmp_path / "tint.png").warnings[0]
    deep = chest(dtype=np.uint16)
    write_dicom(tmp_path / "lateral.dcm", deep, 16, ViewPosition="LL")
    write_dicom(tmp_path / "knee.dcm", deep, 16, Modality="MR", BodyPartExamined="KNEE")
    assert "LL" in " ".join(read_upload(tmp_path / "lateral.dcm").warnings)
    assert {"MR", "KNEE"} <= set(re.findall(r"[A-Z]{2,}", " ".join(read_upload(tmp_path / "knee.dcm").warnings)))


def test_the_pixel_limit_can_be_set(tmp_path):
    Image.fromarray(chest()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than the limit of 0.002 megapixels"):
        read_upload(tmp_path / "a.png", max_megapixels=0.002)


# --- analysis and rendering


def test_the_viewer_receives_the_images_and_the_map_in_16_bits(toy, upload):
    analysis = analyse(toy, "toy", upload, {})
    data = json.loads(rendering.viewer_data(analysis))
    two_bytes = np.asarray(picture_of(base64.b64decode(data["map"].split(",")[1])), int)
    values = (256 * two_bytes[..., 0] + two_bytes[..., 1]) / 65535
    np.testing.assert_allclose(values, analysis.display_map, atol=1 / 65535)
    image = np.asarray(picture_of(base64.b64decode(data["input"].split(",")[1])))
    assert image.shape == analysis.display_map.shape == (640, 533) and (data["threshold"], data["vmax"]) == (0.02, 0.06)


def test_downloads_are_the_maps_of_the_pipeline_at_the_resolution_of_the_upload(toy, upload):
    analysis = analyse(toy, "toy", upload, TEN_STEPS)
    output = toy(upload.image, output_type="np", **TEN_STEPS)
    own = restore_map(output.anomaly_map[0], 60, 50)
    name, content = rendering.map_file(analysis)
    assert name == "chest__1__map.png"
    np.testing.assert_array_equal(np.asarray(picture_of(content)), (own * 65535).round().astype(np.uint16))
    name, content = rendering.mask_file(analysis, 1.5)
    np.testing.assert_array_equal(np.asarray(picture_of(content)) > 0, own > 0.03)
    assert "0.0300" in name and 0 < np.mean(own > 0.03) < 1
    assert picture_of(rendering.panels_file(analysis)[1]).width > 3 * 400
    assert picture_of(rendering.film_file(analysis)[1]).n_frames == 6
    assert analysis.score == pytest.approx(float(output.anomaly_score[0]), abs=1e-6)


def test_progress_counts_real_steps_to_their_end(toy, upload):
    steps = []
    analyse(toy, "toy", upload, {"noise_level": 500}, steps.append)
    assert [(s.number, s.total, s.stage) for s in steps] == [
        (i + 1, 10, "inversion" if i < 5 else "decoding") for i in range(10)
    ]
    toy.register_to_config(settings={**TEN_STEPS, "noise_level": [200, 500]})
    analyse(toy, "toy", upload, {}, steps.append)
    assert (steps[-1].number, steps[-1].total, steps[-1].stage) == (12, 12, "decoding") and len(steps) == 22
    steps.clear()
    assert "Inpainting" not in rendering.film_card(analyse(toy, "toy", upload, {}))
    inpainted = analyse(toy, "toy", upload, {"inpaint": 0.1, "inpaint_steps": 10, "decode_until": 150}, steps.append)
    assert "<b>Inpainting</b> draws" in rendering.film_card(inpainted)
    assert (steps[-1].number, steps[-1].total, steps[-1].stage) == (len(steps), len(steps), "inpainting")
    assert "drawing the most suspicious part anew" in rendering.live_view(steps[-1])


def test_the_live_view_is_the_noisy_image_and_the_estimate_of_each_step(toy, upload):
    steps = []
    analysis = analyse(toy, "toy", upload, {}, steps.append)
    assert [len(step.panels) for step in steps] == [2] * 6
    for step, frame in zip(steps, analysis.trajectory.frames, strict=True):
        grey = frame.predicted[0, 0] if frame.predicted is not None else frame.latents[0, 0]
        expected = ((grey.clamp(-1, 1) + 1) / 2 * 255).round().numpy().astype(np.uint8)
        expected = np.asarray(Image.fromarray(expected).resize((320, 320), Image.Resampling.BICUBIC), int)
        assert np.abs(np.asarray(step.panels[1].convert("L"), int) - expected).max() <= 1
    page = rendering.live_view(steps[1])
    assert "Step 2 of 6: adding noise" in page and page.count("data:image/jpeg") == 2 and "width: 33%" in page
    steps.clear()
    analyse(toy, "toy", upload, {"num_inference_steps": 200, "noise_level": 300}, steps.append)
    with_panels = [step.number for step in steps if step.panels]
    assert len(steps) == 120 and with_panels == [*range(1, 121, 5), 120], "one in five, and the last one"


def test_closing_the_stream_stops_the_pipeline_and_the_next_run_waits_for_it(toy, upload):
    lock, calls, forward = threading.Lock(), [], toy.unet.forward
    toy.unet.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)

    def work(report, is_stopped, steps=1000):
        return analyse(toy, "toy", upload, {"num_inference_steps": steps, "noise_level": 900}, report, is_stopped)

    reports = stream(work, lock)
    assert next(reports).total == 1800
    reports.close()
    with lock:  # the thread has ended its step
        stopped_at = len(calls)
    assert 0 < stopped_at < 500
    reports = list(stream(lambda report, is_stopped: work(report, is_stopped, 10), lock))
    assert isinstance(reports[-2], Step) and reports[-1].score == work(lambda step: None, lambda: False, 10).score
    with pytest.raises(Stopped):
        analyse(toy, "toy", upload, {}, is_stopped=lambda: True)
    with pytest.raises(ValueError, match="noise_level"):
        list(stream(lambda report, is_stopped: analyse(toy, "toy", upload, {"noise_level": 0}), lock))
    assert not lock.locked()


def test_methods_of_one_step_have_no_film_and_grad_cam_no_counterfactual(upload):
    gan = analyse(FixedPointGANPipeline(toy_generator()), "gan", upload, {})
    cam = analyse(GradCAMPipeline(toy_resnet(), sample_size=32), "cam", upload, {})
    assert gan.counterfactual is not None and cam.counterfactual is None and rendering.before_and_after(cam) is None
    assert json.loads(rendering.viewer_data(cam))["counterfactual"] is None
    for analysis in (gan, cam):
        assert analysis.trajectory is None and "one step" in rendering.film_card(analysis)
        with pytest.raises(ValueError, match="one step"):
            rendering.film_file(analysis)
    assert picture_of(rendering.panels_file(cam)[1]).width < picture_of(rendering.panels_file(gan)[1]).width


def test_an_analysis_names_the_lung_zone_where_the_model_has_a_lung_segmenter(toy, upload):
    torch.manual_seed(0)
    segmenter = LungSegmenter(sample_size=16, block_out_channels=(4, 4))
    with_lungs = CFGAnomalyPipeline(toy.unet, toy.scheduler, settings=TEN_STEPS, lung_segmenter=segmenter)
    with_lungs.set_progress_bar_config(disable=True)
    assert analyse(with_lungs, "toy", upload, {}).zone in ZONES and analyse(toy, "toy", upload, {}).zone == ""


def test_the_threshold_of_a_model_holds_for_its_own_settings_only(toy, upload):
    own, other = analyse(toy, "toy", upload, {}), analyse(toy, "toy", upload, {"smoothing": 2.0})
    assert own.has_own_threshold and own.threshold == toy.config.map_threshold and not other.has_own_threshold
    for setting in {"keep_below": 0.01}, {"score": "change"}:
        assert analyse(toy, "toy", upload, setting).has_own_threshold, f"{setting} changes no map"


def test_a_score_is_compared_only_with_scores_of_the_same_model_and_settings(toy, upload, tmp_path):
    analysis = analyse(toy, "toy", upload, {})
    scores = [analysis.score - 0.01, analysis.score - 0.005, analysis.score + 0.01]
    reference = ReferenceScores("3 <healthy> chests", as_json(toy.settings()), scores, weights_digest(toy))
    headline = rendering.headline(analysis, reference, reference.fits(toy, {}), "a mean", ["An <odd> view."])
    assert "Higher than <b>2 of 3</b> healthy images (p = .5)" in headline and "An &lt;odd&gt; view." in headline
    assert headline.index("Higher than") < headline.index(f"{analysis.score:.3f}") < headline.index("a mean")
    assert "chest &lt;1&gt;.png" in headline and " zone." not in headline, "a model without a lung segmenter"
    in_a_zone = rendering.headline(replace(analysis, zone="left lower"), reference, True, "a mean", [])
    assert "Largest part of the map: left lower zone." in in_a_zone
    card = rendering.comparison_card(analysis, reference, True)
    assert "3 &lt;healthy&gt; chests" in card and "svg+xml" in card
    assert reference.fits(toy, {"noise_level": 300}) and not reference.fits(toy, {"noise_level": 200})
    assert reference.fits(toy, {"keep_below": 0.02}), "it changes no score"
    headline = rendering.headline(analysis, reference, reference.fits(toy, {"noise_level": 200}), "a mean", [])
    other = rendering.comparison_card(analysis, reference, False)
    assert "no comparison" in headline and "2 of 3" not in headline and "cannot be compared" in other
    assert "svg" not in other and "--healthy" in rendering.comparison_card(analysis, None, False)
    assert "No healthy images" in rendering.headline(analysis, None, False, "a mean", [])
    assert [rendering.short_number(p) for p in (1 / 38, 0.19, 1, 0.5)] == [".026", ".19", "1", ".5"]
    half = type(toy).from_pretrained(toy.save_pretrained(tmp_path) or tmp_path, dtype=torch.float64)
    assert reference.fits(half, {}), "precision is not another model"
    half.unet.conv_out.bias.data += 1e-3
    DIGESTS.clear()
    assert not reference.fits(half, {}), "other weights are"


def test_scores_below_zero_have_a_place_in_the_figure(toy, upload):
    analysis = analyse(toy, "toy", upload, {"score": "evidence"})
    reference = ReferenceScores("3 chests", {}, [analysis.score - 0.5, -0.2, 0.1])
    svg = base64.b64decode(rendering.score_figure(analysis.score, reference).partition(",")[2]).decode()
    dots = re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)"', svg)
    assert len(set(dots)) >= 3 and all(0 < float(x) < 360 for x in dots)


def test_a_file_name_is_escaped_on_the_page_and_safe_in_downloads(toy):
    evil = Upload(Image.fromarray(chest()), "<img src=x onerror=alert(1)>.png", [])
    assert "<img src=x" not in rendering.upload_card(evil)
    name, _ = rendering.map_file(SimpleNamespace(name="../../etc/a b.png", full_map=lambda: np.zeros((2, 2))))
    assert name == "_.._etc_a_b_map.png"


# --- scores of healthy images


def test_healthy_scores_are_measured_once_for_a_model_its_settings_and_the_images(toy, tmp_path):
    dataset = load_phantom(n=4, size=16, seed=1)
    dataset = dataset.filter(lambda row: row["label"] == 0, load_from_cache_file=False, keep_in_memory=True)
    calls, call = [], toy.unet.forward
    toy.unet.forward = lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs)
    first = cached_scores(toy, dataset, "phantoms", cache_dir=tmp_path)
    counted = len(calls)
    again = cached_scores(toy, dataset, "the same phantoms", cache_dir=tmp_path)
    assert counted == len(calls) > 0 and again.scores == first.scores and again.data == "the same phantoms"
    alone = [float(toy(row["image"]).anomaly_score[0]) for row in dataset]
    assert first.scores == pytest.approx(sorted(alone), abs=1e-5) and first.share_below(1) == (len(alone),) * 2
    views = dataset.remove_columns("view").add_column("view", ["AP"] * len(dataset))
    assert cached_scores(toy, views, "phantoms", cache_dir=tmp_path).by_view == {"AP": first.scores}
    toy.register_to_config(settings={**TEN_STEPS, "noise_level": 200})
    assert cached_scores(toy, dataset, "phantoms", cache_dir=tmp_path).call["noise_level"] == 200
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".npz")], "no image is stored"


def test_the_page_measures_given_healthy_images_or_loads_stored_scores(toy, tmp_path, monkeypatch):
    from cxr_diffusers.demo.serve import references

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = load_phantom(n=6, size=16, seed=1)
    healthy = dataset.select([i for i, label in enumerate(dataset["label"]) if label == 0])
    progress = []
    measured = references({"toy": toy}, healthy, "phantoms")("toy", lambda i, n: progress.append((i, n)))
    assert measured.data == "phantoms" and len(measured.scores) == len(healthy)
    assert progress[-1] == (len(healthy),) * 2
    assert list((tmp_path / "cache" / "cxr_diffusers" / "healthy_scores").iterdir())
    toy.save_pretrained(tmp_path / "toy")
    toy.register_to_config(_name_or_path=str(tmp_path / "toy"))
    assert references({"toy": toy})("toy") is None
    keep_scores(measured, tmp_path / "toy")
    assert references({"toy": toy})("toy").scores == measured.scores


def test_healthy_scores_refuse_diseased_images(toy):
    with pytest.raises(ValueError, match="healthy images alone in phantoms, got [1-9]"):
        measure_scores(toy, load_phantom(n=8, size=16, seed=0), "phantoms")
    with pytest.raises(ValueError, match="at least one healthy image"):
        measure_scores(toy, load_phantom(n=8, size=16, seed=0).select([]), "phantoms")


def test_the_shipped_models_carry_the_scores_of_37_healthy_radiographs():
    """Scores and map quantiles of the present settings and weights; one is measured again where the radiographs are."""
    from cxr_diffusers.demo.serve import open_models

    models = open_models()
    assert list(models)[0] == "cxr_cfg_128" and len(models) == 5
    sources = ROOT.parent / "shared" / "cxr" / "val_implants" / "sources"
    for pipeline in models.values():
        kept = kept_scores(pipeline.config["_name_or_path"])
        assert len(kept.scores) == 37 and kept.fits(pipeline, {}), "measure again: benchmarks/healthy_scores.py"
        origin = read_index(pipeline.config["_name_or_path"])["_map_threshold"]
        assert kept.map_value(origin["quantile"]) == pipeline.config.map_threshold
        values = list(kept.map_quantiles.values())
        assert values == sorted(values) and 0 < values[0] < values[-1] < 1 and "0.99" in kept.map_quantiles
        if sources.is_dir():
            image = read_image(sorted(sources.iterdir())[0])
            score = float(pipeline(image).anomaly_score[0])
            assert min(abs(score - stored) for stored in kept.scores) < 1e-4


def test_the_script_that_stores_healthy_scores(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import healthy_scores

    toy.save_pretrained(tmp_path / "model")
    for i in range(2):
        (tmp_path / "data" / "healthy").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(chest(), 7 * i, 1)).save(tmp_path / "data" / "healthy" / f"{i}.png")
    data = f"folder:root={tmp_path / 'data'},classes=[healthy]"
    healthy_scores.main([str(tmp_path / "model"), "--data", data, "--named", "two chests"])
    kept = kept_scores(tmp_path / "model")
    assert kept.data == "two chests" and len(kept.scores) == 2 and kept.fits(toy, {})
    assert f"| model | 2 | {kept.scores[0]:.4f} |" in capsys.readouterr().out
    assert 0 < kept.map_value(0.95) < kept.map_value(0.999)
    assert read_index(tmp_path / "model")["map_threshold"] == toy.config.map_threshold, "printed, not written"
    keep_scores(ReferenceScores("x", {}, [1.0]), tmp_path)
    assert kept_scores(tmp_path).scores == [1.0] and kept_scores(tmp_path / "data") is None


# --- the page


def test_a_method_has_only_its_own_settings(toy):
    page = pytest.importorskip("cxr_diffusers.demo.page")
    sliders = {options["label"]: options for options in page.slider_options(toy)}
    assert [name for name, options in sliders.items() if options["visible"]] == [
        "Guidance scale",
        "Noise level",
        "Steps",
    ]
    assert sliders["Noise level"]["value"] == 300
    assert sliders["Steps"]["minimum"] <= 10 <= sliders["Steps"]["maximum"]
    assert page.call_arguments(toy, [2, 50, 400.0, 20.0]) == {
        "guidance_scale": 2.0,
        "noise_level": 400,
        "num_inference_steps": 20,
    }
    toy.register_to_config(settings={"num_inference_steps": 1000})
    assert page.slider_options(toy)[3]["maximum"] == 1000, "the slider reaches the value of the checkpoint"
    toy.register_to_config(settings={"noise_level": [300, 500]})
    assert [options["visible"] for options in page.slider_options(toy)] == [True, False, False, True]
    assert "noise_level" not in page.call_arguments(toy, [2, 50, 400, 20]), "several levels at once have no slider"
    toy.register_to_config(settings={"guidance_scale": 4})
    assert page.call_arguments(toy, [4.5, 50, 400, 20])["guidance_scale"] == 4.5, "a whole number may become a fraction"
    gan = FixedPointGANPipeline(toy_generator())
    assert not page.has_sliders(gan) and page.call_arguments(gan, [1, 2, 3, 4]) == {}
    assert page.name_choices({"a": toy, "b": gan}) == {"Classifier-free guidance": "a", "Fixed-Point GAN": "b"}
    assert list(page.name_choices({"a": toy, "b": toy})) == [f"Classifier-free guidance: {x}" for x in "ab"]


def test_one_image_runs_at_a_time_and_no_endpoint_is_offered_to_programs(toy):
    page = pytest.importorskip("cxr_diffusers.demo.page").build_page({"toy": toy}, lambda name, progress: None)
    events = list(page.fns.values())
    functions = [(event, getattr(event.fn, "func", event.fn)) for event in events]  # of partial ones, the function
    model = [event for event, function in functions if getattr(function, "__name__", None) == "run"]
    assert [event.concurrency_limit for event in model] == [1] and all(event.queue for event in model)
    assert len(events) > 8 and {event.api_visibility for event in events} == {"private"}
    assert not page.analytics_enabled


def test_without_gradio_the_error_names_the_extra_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "cxr_diffusers.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert "pip install 'cxr_diffusers[demo]'" in capsys.readouterr().err


def test_the_threshold_slider_has_the_range_of_the_colour_scale_and_explains_1(toy, upload):
    page = pytest.importorskip("cxr_diffusers.demo.page")
    analysis = SimpleNamespace(vmax=0.06, threshold=0.02, has_own_threshold=True)
    assert page.factor_range(analysis, 2.5)["maximum"] == 3.0 and page.factor_range(analysis, 2.5)["value"] == 2.5
    analysis = SimpleNamespace(vmax=1.0, threshold=0.82, has_own_threshold=True)
    assert (page.factor_range(analysis, 2.5)["maximum"], page.factor_range(analysis, 2.5)["value"]) == (1.2, 1)
    assert "model's own" in page.factor_range(analysis, 1)["info"]
    toy.register_to_config(map_threshold=None)
    analysis = analyse(toy, "toy", upload, {})
    assert (
        "none was measured" in page.factor_range(analysis, 1)["info"]
        and page.factor_range(analysis, 3)["maximum"] >= 2.95
    )
    assert analysis.vmax == pytest.approx(np.quantile(analysis.square_map, 0.995), rel=1e-5)


def test_two_models_of_the_same_name_are_refused(toy, tmp_path):
    for run in ("one", "two"):
        toy.save_pretrained(tmp_path / run / "final")
    with pytest.raises(ValueError, match="different names, got final twice"):
        open_models([tmp_path / "one" / "final", tmp_path / "two" / "final"], "cpu")
    assert list(open_models(["cxr_cfg_128", "default"], "cpu"))[0] == "cxr_cfg_128", "the same model under two names"


def test_a_taken_port_is_reported_before_a_model_is_opened(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port), "--model", "nowhere"]) == 2
        assert f"cannot listen on port {port} of 127.0.0.1" in capsys.readouterr().err
    assert main(["demo", "--port", str(port), "--model", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["demo", "--port", "70000"]) == 2
    assert "cannot listen on port 70000" in capsys.readouterr().err
