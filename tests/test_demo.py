"""The web page: what may be handed in, what is shown, and what stands beside a score."""

import base64
import json
import re
import socket
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from cxr_diffusers import FixedPointGANPipeline, GradCAMPipeline, load_phantom, read_image
from cxr_diffusers.cli import main
from cxr_diffusers.demo import answers
from cxr_diffusers.demo.serve import open_models
from cxr_diffusers.demo.uploads import Upload, read_upload
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import DIGESTS, weights_digest
from cxr_diffusers.inference.reference_scores import (
    ReferenceScores,
    cached_scores,
    keep_scores,
    kept_scores,
    measure_scores,
)
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


# --- what may be handed in


def test_radiographs_are_read_as_they_are(tmp_path):
    Image.fromarray(chest(kind=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([chest()] * 3, -1)).save(tmp_path / "grey.jpg", quality=95)
    write_dicom(tmp_path / "1.2.840.1", chest(kind=np.uint16) >> 4, 12)
    for name, mode in (("deep.png", "I;16"), ("grey.jpg", "L"), ("1.2.840.1", "I;16")):
        upload = read_upload(tmp_path / name)
        assert (upload.picture.mode, upload.picture.size, upload.name) == (mode, (50, 60), name)
        assert not upload.warnings
    np.testing.assert_array_equal(read_upload(tmp_path / "deep.png").picture, chest(kind=np.uint16))


def png_header(width, height):
    """A PNG that claims a size and has next to nothing in it: a bomb, if somebody decodes it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9))]
    chunks = [(kind + content, content) for kind, content in (*chunks, (b"IEND", b""))]
    packed = (struct.pack(">I", len(rest)) + whole + struct.pack(">I", zlib.crc32(whole)) for whole, rest in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_refused(folder):
    """{file name: what is said of it}; writes the files."""
    rng = np.random.default_rng(0)
    (folder / "text.png").write_text("no picture at all")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n")
    (folder / "page.html").write_text("<p>")
    (folder / "bomb.png").write_bytes(png_header(9000, 9000))
    (folder / "cut.png").write_bytes(png_header(400, 400))
    Image.fromarray(rng.integers(0, 255, (90, 90, 3)).astype(np.uint8)).save(folder / "photo.png")
    Image.new("L", (90, 90), 200).save(folder / "blank.png")
    Image.fromarray((rng.random((90, 90)) < 0.001).astype(np.uint8) * 255).save(folder / "dust.png")
    Image.fromarray(chest(20, 90)).save(folder / "small.png")
    Image.fromarray(chest(40, 400)).save(folder / "long.png")
    write_dicom(folder / "large.dcm", chest(kind=np.uint16), 16, Rows=30000, Columns=30000)
    write_dicom(folder / "deflated.dcm", chest(kind=np.uint16), 16, syntax=DeflatedExplicitVRLittleEndian)
    (folder / "nothing.dcm").write_bytes(b"\0" * 400)
    return {
        "text.png": "cannot be read as a picture",
        "script.png": "cannot be read as a picture",
        "page.html": "Expected a radiograph as png",
        "bomb.png": "9000 \u00d7 9000 pixels are more than the 40 megapixels",
        "cut.png": "cannot be read as a picture",
        "photo.png": "a colour picture",
        "blank.png": "is blank",
        "dust.png": "is blank",
        "small.png": "are too few",
        "long.png": "no radiograph of a chest",
        "large.dcm": "more than the 40 megapixels",
        "deflated.dcm": "compressed as a whole",
        "nothing.dcm": "without a picture",
    }


def test_what_is_no_radiograph_is_refused_in_a_sentence_that_names_the_file_and_no_folder(tmp_path):
    for name, message in write_refused(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            read_upload(tmp_path / name)
        said = str(refused.value)
        assert said.startswith(name) and str(tmp_path) not in said and len(said) < 300, said


def test_what_may_mislead_is_warned_of(tmp_path):
    tinted = np.stack([chest(), chest() * 0.9, chest() * 0.8], -1).astype(np.uint8)
    Image.fromarray(tinted).save(tmp_path / "tint.png")
    assert "some colour" in read_upload(tmp_path / "tint.png").warnings[0]
    deep = chest(kind=np.uint16)
    write_dicom(tmp_path / "lateral.dcm", deep, 16, ViewPosition="LL")
    write_dicom(tmp_path / "knee.dcm", deep, 16, Modality="MR", BodyPartExamined="KNEE")
    assert "LL" in " ".join(read_upload(tmp_path / "lateral.dcm").warnings)
    assert {"MR", "KNEE"} <= set(re.findall(r"[A-Z]{2,}", " ".join(read_upload(tmp_path / "knee.dcm").warnings)))


def test_the_limit_of_pixels_can_be_set(tmp_path):
    Image.fromarray(chest()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than the 0.002 megapixels"):
        read_upload(tmp_path / "a.png", max_megapixels=0.002)


# --- what is shown


def test_the_viewer_gets_the_pictures_and_the_map_to_the_last_bit(toy, upload):
    answer = answers.ask(toy, "toy", upload, {})
    data = json.loads(answers.viewer_data(answer))
    two = np.asarray(picture_of(base64.b64decode(data["map"].split(",")[1])), int)
    np.testing.assert_allclose((256 * two[..., 0] + two[..., 1]) / 65535, answer.small, atol=1 / 65535)
    shown = np.asarray(picture_of(base64.b64decode(data["input"].split(",")[1])))
    assert shown.shape == answer.small.shape == (640, 533) and (data["threshold"], data["vmax"]) == (0.02, 0.06)


def test_downloads_are_the_pipelines_own_at_the_pictures_resolution(toy, upload):
    answer = answers.ask(toy, "toy", upload, TEN_STEPS)
    output = toy(upload.picture, output_type="np", **TEN_STEPS)
    own = restore_map(output.anomaly_map[0], 60, 50)
    name, content = answers.map_file(answer)
    assert name == "chest__1__map.png"
    np.testing.assert_array_equal(np.asarray(picture_of(content)), (own * 65535).round().astype(np.uint16))
    name, content = answers.mask_file(answer, 1.5)
    np.testing.assert_array_equal(np.asarray(picture_of(content)) > 0, own > 0.03)
    assert "0.0300" in name and 0 < np.mean(own > 0.03) < 1
    assert picture_of(answers.picture_file(answer)[1]).width > 3 * 400
    assert picture_of(answers.film_file(answer)[1]).n_frames == 6
    assert answer.score == pytest.approx(float(output.anomaly_score[0]), abs=1e-6)


def test_progress_counts_real_steps_to_their_end(toy, upload):
    seen = []
    answers.ask(toy, "toy", upload, {"noise_level": 500}, lambda *step: seen.append(step))
    assert seen == [(i + 1, 10, "inversion" if i < 5 else "decoding") for i in range(10)]
    toy.register_to_config(settings={**TEN_STEPS, "noise_level": [200, 500]})
    answers.ask(toy, "toy", upload, {}, lambda *step: seen.append(step))
    assert seen[-1] == (12, 12, "decoding") and len(seen) == 22


def test_methods_of_one_step_have_no_film_and_grad_cam_no_counterfactual(upload):
    gan = answers.ask(FixedPointGANPipeline(toy_generator()), "gan", upload, {})
    cam = answers.ask(GradCAMPipeline(toy_resnet(), sample_size=32), "cam", upload, {})
    assert gan.counterfactual is not None and cam.counterfactual is None and answers.compared(cam) is None
    assert json.loads(answers.viewer_data(cam))["counterfactual"] is None
    for answer in (gan, cam):
        assert answer.trajectory is None and "one step" in answers.film_card(answer)
        with pytest.raises(ValueError, match="one step"):
            answers.film_file(answer)
    assert picture_of(answers.picture_file(cam)[1]).width < picture_of(answers.picture_file(gan)[1]).width


def test_a_score_is_compared_with_its_like_alone(toy, upload, tmp_path):
    answer = answers.ask(toy, "toy", upload, {})
    scores = [answer.score - 0.01, answer.score - 0.005, answer.score + 0.01]
    reference = ReferenceScores("3 <healthy> chests", as_json(toy.settings()), scores, weights_digest(toy))
    card = answers.score_card(answer, reference, reference.fits(toy, {}), "a mean")
    assert "<b>2 of 3</b>" in card and "3 &lt;healthy&gt; chests" in card and "svg+xml" in card
    assert reference.fits(toy, {"noise_level": 300}) and not reference.fits(toy, {"noise_level": 200})
    below, of = reference.share_below(answer.score)
    assert f"p = {(1 + of - below) / (1 + of):.2g}." in card and card.index("Higher than") < card.index('id="score"')
    other = answers.score_card(answer, reference, reference.fits(toy, {"noise_level": 200}), "a mean")
    assert "cannot be compared" in other and "2 of 3" not in other and "svg" not in other
    assert "--healthy" in answers.score_card(answer, None, False, "a mean")
    half = type(toy).from_pretrained(toy.save_pretrained(tmp_path) or tmp_path, dtype=torch.float64)
    assert reference.fits(half, {}), "precision is not another model"
    half.unet.conv_out.bias.data += 1e-3
    DIGESTS.clear()
    assert not reference.fits(half, {}), "other weights are"


def test_scores_below_zero_have_a_place_in_the_figure(toy, upload):
    answer = answers.ask(toy, "toy", upload, {"score": "evidence"})
    reference = ReferenceScores("3 chests", {}, [answer.score - 0.5, -0.2, 0.1])
    svg = base64.b64decode(answers.score_figure(answer.score, reference).partition(",")[2]).decode()
    dots = re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)"', svg)
    assert len(set(dots)) >= 3 and all(0 < float(x) < 360 for x in dots)


def test_a_file_name_is_text_and_nothing_else(toy):
    evil = Upload(Image.fromarray(chest()), "<img src=x onerror=alert(1)>.png", [])
    assert "<img src=x" not in answers.upload_card(evil)
    name, _ = answers.map_file(SimpleNamespace(name="../../etc/a b.png", own=lambda: np.zeros((2, 2))))
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
    toy.register_to_config(settings={**TEN_STEPS, "noise_level": 200})
    assert cached_scores(toy, dataset, "phantoms", cache_dir=tmp_path).call["noise_level"] == 200
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".npz")], "no picture is kept"


def test_the_page_measures_the_healthy_images_it_is_given_and_else_takes_those_kept(toy, tmp_path, monkeypatch):
    from cxr_diffusers.demo.serve import references

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = load_phantom(n=6, size=16, seed=1)
    healthy = dataset.select([i for i, label in enumerate(dataset["label"]) if label == 0])
    seen = []
    found = references({"toy": toy}, healthy, "phantoms")("toy", lambda i, n: seen.append((i, n)))
    assert found.data == "phantoms" and len(found.scores) == len(healthy) and seen[-1] == (len(healthy),) * 2
    assert list((tmp_path / "cache" / "cxr_diffusers" / "healthy_scores").iterdir())
    toy.save_pretrained(tmp_path / "toy")
    toy.register_to_config(_name_or_path=str(tmp_path / "toy"))
    assert references({"toy": toy})("toy") is None
    keep_scores(found, tmp_path / "toy")
    assert references({"toy": toy})("toy").scores == found.scores


def test_healthy_scores_are_of_healthy_images(toy):
    with pytest.raises(ValueError, match="healthy images alone in phantoms, got [1-9]"):
        measure_scores(toy, load_phantom(n=8, size=16, seed=0), "phantoms")
    with pytest.raises(ValueError, match="at least one healthy image"):
        measure_scores(toy, load_phantom(n=8, size=16, seed=0).select([]), "phantoms")


def test_the_shipped_models_carry_the_scores_of_37_healthy_radiographs():
    """Of their present settings and weights, as far as the radiographs are at hand."""
    from cxr_diffusers.demo.serve import open_models

    models = open_models()
    assert list(models)[0] == "cxr_cfg_64" and len(models) == 5
    sources = ROOT.parent / "shared" / "cxr" / "val_implants" / "sources"
    for pipeline in models.values():
        kept = kept_scores(pipeline.config["_name_or_path"])
        assert len(kept.scores) == 37 and kept.fits(pipeline, {}), "measure again: benchmarks/healthy_scores.py"
        if sources.is_dir():
            picture = read_image(sorted(sources.iterdir())[0])
            score = float(pipeline(picture).anomaly_score[0])
            assert min(abs(score - known) for known in kept.scores) < 1e-4


def test_the_script_that_keeps_them(toy, tmp_path, capsys, monkeypatch):
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
    keep_scores(ReferenceScores("x", {}, [1.0]), tmp_path)
    assert kept_scores(tmp_path).scores == [1.0] and kept_scores(tmp_path / "data") is None


# --- the page


def test_a_method_brings_its_own_settings_and_no_others(toy):
    page = pytest.importorskip("cxr_diffusers.demo.page")
    looks = {look["label"]: look for look in page.slider_looks(toy)}
    assert [name for name, look in looks.items() if look["visible"]] == ["Guidance scale", "Noise level", "Steps"]
    assert looks["Noise level"]["value"] == 300 and looks["Steps"]["minimum"] <= 10 <= looks["Steps"]["maximum"]
    assert page.call_of(toy, [2, 50, 400.0, 20.0]) == {
        "guidance_scale": 2.0,
        "noise_level": 400,
        "num_inference_steps": 20,
    }
    toy.register_to_config(settings={"num_inference_steps": 1000})
    assert [look["maximum"] for look in page.slider_looks(toy)][3] == 1000, "a checkpoint's own value is on its slider"
    toy.register_to_config(settings={"noise_level": [300, 500]})
    assert [look["visible"] for look in page.slider_looks(toy)] == [True, False, False, True]
    assert "noise_level" not in page.call_of(toy, [2, 50, 400, 20]), "several levels at once are left as they are"
    toy.register_to_config(settings={"guidance_scale": 4})
    assert page.call_of(toy, [4.5, 50, 400, 20])["guidance_scale"] == 4.5, "half a step is not cut off a whole number"
    gan = FixedPointGANPipeline(toy_generator())
    assert not page.has_sliders(gan) and page.call_of(gan, [1, 2, 3, 4]) == {}
    assert page.name_choices({"a": toy, "b": gan}) == {"Classifier-free guidance": "a", "Fixed-Point GAN": "b"}
    assert list(page.name_choices({"a": toy, "b": toy})) == [f"Classifier-free guidance: {x}" for x in "ab"]


def test_one_picture_runs_at_a_time_and_no_endpoint_is_offered_to_programs(toy):
    page = pytest.importorskip("cxr_diffusers.demo.page").build_page({"toy": toy}, lambda name, progress: None)
    events = list(page.fns.values())
    model = [event for event in events if event.fn is not None and event.fn.__name__ == "run"]
    assert [event.concurrency_limit for event in model] == [1] and all(event.queue for event in model)
    assert len(events) > 8 and {event.api_visibility for event in events} == {"private"}
    assert not page.analytics_enabled


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "cxr_diffusers.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert "pip install 'cxr_diffusers[demo]'" in capsys.readouterr().err


def test_the_threshold_goes_as_far_as_the_colours_and_says_whose_it_is(toy, upload):
    page = pytest.importorskip("cxr_diffusers.demo.page")
    answer = SimpleNamespace(vmax=0.06, threshold=0.02, own_threshold=True)
    assert page.threshold_span(answer, 2.5)["maximum"] == 3.0 and page.threshold_span(answer, 2.5)["value"] == 2.5
    answer = SimpleNamespace(vmax=1.0, threshold=0.82, own_threshold=True)
    assert (page.threshold_span(answer, 2.5)["maximum"], page.threshold_span(answer, 2.5)["value"]) == (1.2, 1)
    assert "model's own" in page.threshold_span(answer, 1)["info"]
    toy.register_to_config(map_threshold=None)
    answer = answers.ask(toy, "toy", upload, {})
    assert "has none" in page.threshold_span(answer, 1)["info"] and page.threshold_span(answer, 3)["maximum"] >= 2.95
    assert answer.vmax == pytest.approx(np.quantile(answer.square, 0.995), rel=1e-5)


def test_a_model_of_the_same_name_as_another_is_not_left_out_without_a_word(toy, tmp_path):
    for run in ("one", "two"):
        toy.save_pretrained(tmp_path / run / "final")
    with pytest.raises(ValueError, match="different names, got final twice"):
        open_models([tmp_path / "one" / "final", tmp_path / "two" / "final"], "cpu")
    assert list(open_models(["cxr_cfg_64", "default"], "cpu"))[0] == "cxr_cfg_64", "one model by two names is one"


def test_a_port_that_is_taken_is_said_before_any_model_is_opened(capsys):
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
