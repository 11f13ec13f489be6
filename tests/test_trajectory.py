"""The recorded trajectory: its frames are the pipeline's latents, its clean images the scheduler's predictions."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image, ImageSequence

from cxr_diffusers import CFGAnomalyPipeline, ClassifierGuidedPipeline, FixedPointGANPipeline, GradCAMPipeline
from cxr_diffusers.cli import main
from cxr_diffusers.inference.detection import detect
from cxr_diffusers.inference.trajectory import Trajectory
from cxr_diffusers.pipelines import pipeline_cfg_anomaly
from cxr_diffusers.pipelines.cxr_inversion import decode_step
from helpers import toy_classifier, toy_generator, toy_resnet, toy_unet

ROOT = Path(__file__).parent.parent
FAST = {"num_inference_steps": 20, "noise_level": 300}
LEVELS = [0, 50, 100, 150, 200, 250, 200, 150, 100, 50, 0, 0]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 255, (20, 16)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


def run(pipeline, images, **kwargs):
    trajectory = Trajectory(**kwargs)
    output = pipeline(images, output_type="pt", callback_on_step_end=trajectory, **FAST)
    return trajectory, output


@pytest.fixture
def predictions(monkeypatch):
    """The x_0 that the scheduler computes in each decoding step, as they come."""
    predictions = []

    def listen(scheduler, timesteps, i, output, x):
        predictions.append(scheduler.step(output, timesteps[i], x).pred_original_sample)
        return decode_step(scheduler, timesteps, i, output, x)

    monkeypatch.setattr(pipeline_cfg_anomaly, "decode_step", listen)
    return predictions


def test_frames_run_up_to_the_noise_level_and_down_to_the_counterfactual(pipeline, images):
    trajectory, output = run(pipeline, images)
    assert [frame.level for frame in trajectory.frames] == LEVELS
    assert [frame.direction for frame in trajectory.frames] == ["inversion"] * 6 + ["decoding"] * 6
    last = (trajectory.frames[-1].latents.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(last, output.counterfactual)
    first = (trajectory.frames[0].latents + 1) / 2
    assert (first - output.image).abs().max() < 0.2 < (trajectory.frames[5].latents - output.image).std()


def test_recording_does_not_change_the_output(pipeline, images):
    _, recorded = run(pipeline, images)
    torch.testing.assert_close(recorded.anomaly_map, pipeline(images, output_type="pt", **FAST).anomaly_map)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_clean_images_equal_the_schedulers_predictions(unet, images, prediction_type, spacing, predictions):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, timestep_spacing=spacing)
    trajectory, _ = run(CFGAnomalyPipeline(unet, scheduler), images)
    decoding = [frame for frame in trajectory.frames if frame.direction == "decoding"]
    assert len(decoding) == len(predictions) > 4
    for frame, expected in zip(decoding, predictions, strict=True):
        torch.testing.assert_close(frame.predicted, expected, atol=2e-4, rtol=2e-4)


def test_clean_images_of_inversion_give_back_its_steps(pipeline, images):
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, with the noise that the network says there."""
    seen, predict = [], pipeline.predict
    pipeline.predict = lambda x, t, labels: seen.append(predict(x, t, labels)) or seen[-1]
    trajectory, _ = run(pipeline, images)
    for frame, noise in list(zip(trajectory.frames, seen, strict=False))[1:6]:
        expected = (frame.latents - (1 - frame.alpha) ** 0.5 * noise) / frame.alpha**0.5
        torch.testing.assert_close(frame.predicted, expected, atol=2e-4, rtol=2e-4)


def test_several_noise_levels_have_one_inversion_and_a_decoding_each(pipeline, images, predictions):
    trajectory = Trajectory()
    call = {"num_inference_steps": 10, "noise_level": [500, 300], "output_type": "pt"}
    output = pipeline(images, callback_on_step_end=trajectory, **call)
    decoding = [frame for frame in trajectory.frames if frame.direction == "decoding"]
    assert [frame.level for frame in decoding] == [100, 0, 0, 300, 200, 100, 0, 0] and len(trajectory.frames) == 13
    for frame, expected in zip(decoding, predictions, strict=True):
        torch.testing.assert_close(frame.predicted, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close((trajectory.frames[-1].latents.clamp(-1, 1) + 1) / 2, output.counterfactual)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(clip_sample=True), DPMSolverMultistepScheduler()],
    ids=["clipped", "another scheduler"],
)
def test_no_clean_image_is_invented_for_other_schedulers(unet, images, scheduler):
    trajectory, _ = run(CFGAnomalyPipeline(unet, scheduler), images)
    assert len(trajectory.frames) >= 10 and all(frame.predicted is None for frame in trajectory.frames)
    assert trajectory.film()[0].width < 300, "the latents alone"


def test_a_last_step_without_change_keeps_the_previous_clean_image(unet, images):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    trajectory, _ = run(CFGAnomalyPipeline(unet, scheduler), images)
    assert trajectory.frames[-1].predicted is trajectory.frames[-2].predicted is not None


def test_many_steps_are_thinned_out_and_the_last_is_kept(pipeline, images):
    trajectory = Trajectory(max_frames=8)
    output = pipeline(
        images, output_type="pt", num_inference_steps=100, noise_level=500, callback_on_step_end=trajectory
    )
    levels = [frame.level for frame in trajectory.frames]
    assert 5 <= len(levels) <= 9 and max(levels) > 400
    last = (trajectory.frames[-1].latents.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(last, output.counterfactual)
    with pytest.raises(ValueError, match="`max_frames` of 2 or more, got 1"):
        Trajectory(max_frames=1)


def test_an_animation_has_every_step_and_repeats(pipeline, images, tmp_path):
    trajectory, _ = run(pipeline, images)
    for name in ("film.webp", "film.gif"):
        trajectory.save(tmp_path / name, index=1)
        with Image.open(tmp_path / name) as film:
            assert film.n_frames == len(LEVELS) and film.info["loop"] == 0
            times = [frame.copy().info["duration"] for frame in ImageSequence.Iterator(film)]
        assert times[0] == times[5] == times[-1] > times[1] > 0, (
            "it rests on the first, the noisiest and the last frame"
        )
    trajectory.save(tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > 8 * 128 and strip.height > 2 * 128
    trajectory.save(tmp_path / "small.png", panel_size=64)
    with Image.open(tmp_path / "small.png") as small:
        assert small.width < strip.width and small.height < strip.height
    assert trajectory.film(0)[3].tobytes() != trajectory.film(1)[3].tobytes(), "each image of a batch has its own"


def test_invalid_files_and_indices_are_refused(pipeline, images, tmp_path):
    with pytest.raises(ValueError, match="a recorded call, got none"):
        Trajectory().save(tmp_path / "film.webp")
    trajectory, _ = run(pipeline, images)
    with pytest.raises(ValueError, match=r"\.webp or \.gif .*got .*film.mp4"):
        trajectory.save(tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="below 2, the number of images in the batch, got 2"):
        trajectory.strip(index=2)


def test_detect_writes_an_animation_of_each_image_of_a_batch(pipeline, folder, tmp_path):
    detect(pipeline, [folder], tmp_path / "out", call_kwargs=FAST, progress=False, batch_size=2, save_trajectory=True)
    films = sorted((tmp_path / "out" / "trajectories").iterdir())
    assert [film.name for film in films] == ["0.webp", "1.webp", "2.webp"]
    alone = Trajectory()
    pipeline(Image.open(folder / "1.png"), callback_on_step_end=alone, **FAST)
    with Image.open(films[1]) as film:
        film.seek(len(LEVELS) - 1)
        last_frame = np.asarray(film.convert("RGB"), int)
    expected = np.asarray(alone.film()[-1], int)
    assert np.abs(last_frame - expected).mean() < 6, "WebP is lossy, but not as much as another image"
    others = Trajectory()
    pipeline(Image.open(folder / "0.png"), callback_on_step_end=others, **FAST)
    assert np.abs(last_frame - np.asarray(others.film()[-1], int)).mean() > 12


def test_detect_with_animations_resumes_and_refuses_other_settings(pipeline, folder, tmp_path):
    out = tmp_path / "out"
    options = dict(call_kwargs=FAST, progress=False)
    detect(pipeline, [folder], out, save_trajectory=True, **options)
    (out / "rows" / "1.json").unlink()
    (out / "trajectories" / "1.webp").unlink()
    assert detect(pipeline, [folder], out, save_trajectory=True, **options)["computed"] == 1
    assert (out / "trajectories" / "1.webp").is_file()
    with pytest.raises(FileExistsError, match="save_trajectory: True, now False"):
        detect(pipeline, [folder], out, **options)
    # a folder that was begun before there were films
    settings = json.loads((out / "settings.json").read_text())
    del settings["save_trajectory"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert detect(pipeline, [folder], out, **options)["computed"] == 0


def test_a_pipeline_without_steps_has_no_animation(folder, tmp_path, capsys):
    steps = ClassifierGuidedPipeline(toy_unet(), toy_classifier(), DDIMScheduler(clip_sample=False))
    detect(steps, [folder / "0.png"], tmp_path / "0", call_kwargs=FAST, progress=False, save_trajectory=True)
    assert (tmp_path / "0" / "trajectories" / "0.webp").is_file()
    for pipeline in (FixedPointGANPipeline(toy_generator()), GradCAMPipeline(toy_resnet(), sample_size=32)):
        out = tmp_path / type(pipeline).__name__
        with pytest.raises(ValueError, match=f"with denoising steps .* got a {out.name}"):
            detect(pipeline, [folder], out, progress=False, save_trajectory=True)
        assert not out.exists()
    command = ["detect", str(folder), "--out", str(out), "--model", "cxr_fixed_point_gan_128", "--save-trajectory"]
    assert main(command) == 2 and "with denoising steps" in capsys.readouterr().err


def test_the_examples_of_the_docs_run(pipeline, tmp_path, monkeypatch):
    """With a toy model in place of the shipped one."""
    plt.switch_backend("agg")
    pipeline.register_to_config(settings={"num_inference_steps": 20})
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "cxr_diffusers").symlink_to(ROOT / "cxr_diffusers")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trajectory.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    names: dict = {}
    for example in examples:
        assert example.count("default_checkpoint()") == 1
        exec(example.replace("default_checkpoint()", '"model"'), names)
    plt.close("all")
    with Image.open("film.webp") as film, Image.open("strip.png") as strip:
        assert film.n_frames == names["pipeline"].num_timesteps and strip.width > 1000
