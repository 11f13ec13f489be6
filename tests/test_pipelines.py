"""The contract that every anomaly pipeline keeps, and the laws of inversion and guidance."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.pipelines.cxr_anomaly import difference_map, score_map, smooth_map
from cxr_diffusers.pipelines.cxr_images import frame, prepare_image, restore_map
from cxr_diffusers.pipelines.cxr_inversion import (
    decode_step,
    invert,
    move,
    noise_from_output,
    output_from_noise,
    timesteps_below,
)
from helpers import toy_unet

FAST = dict(num_inference_steps=10, noise_level=300)


def test_a_tuple_is_the_output_in_order(pipeline, images):
    output = pipeline(images, output_type="pt", **FAST)
    for a, b in zip(output.to_tuple(), pipeline(images, output_type="pt", return_dict=False, **FAST), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_is_its_images_one_by_one(pipeline, images):
    batch = pipeline(images, output_type="pt", **FAST).anomaly_map
    single = [pipeline(x, output_type="pt", **FAST).anomaly_map for x in images]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)


def test_a_saved_pipeline_gives_the_same_map_from_its_class(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = CFGAnomalyPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.class_names == ["healthy", "pleural effusion"] and tuple(again.config.data_range) == (-1, 1)
    expected = pipeline(images, output_type="pt", **FAST).anomaly_map
    torch.testing.assert_close(again(images, output_type="pt", **FAST).anomaly_map, expected)


def test_a_folder_with_code_is_not_run_without_consent(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_the_index_has_lists_for_components_only(pipeline, tmp_path):
    """diffusers takes a list that begins with a string for [library, class] and refuses to download what it lacks."""
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    lists = [k for k, v in index.items() if isinstance(v, list) and isinstance(v[0], str)]
    assert sorted(lists) == ["_class_name", "scheduler", "unet"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_guidance_inversion_and_decoding_undo_each_other(images, prediction_type):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    pipeline = CFGAnomalyPipeline(toy_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    x, errors = images * 2 - 1, []
    for steps, refinements in ((20, 0), (80, 0), (80, 2)):
        span = dict(noise_level=300, num_inference_steps=steps)
        latents = pipeline.invert(x, num_refinements=refinements, **span)
        again = pipeline.decode(latents, guidance_scale=-1, **span)
        errors.append((again - x).abs().mean().item())
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] < 1e-3, errors


def test_inversion_is_exact_when_the_noise_does_not_depend_on_the_image(scheduler, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    timesteps = timesteps_below(scheduler, 500, 50)
    x = latents = invert(lambda x, t: noise, images, timesteps, scheduler)
    alpha = scheduler.alphas_cumprod[timesteps[0]]
    # the closed form: every step keeps x_0 and the noise
    torch.testing.assert_close(latents, alpha**0.5 * images + (1 - alpha) ** 0.5 * noise, atol=1e-5, rtol=0)
    for t in timesteps:
        x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(x, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_averaging_the_noise_of_two_steps_makes_the_inversion_more_accurate(images, prediction_type):
    """Pixels from a normal distribution: the noise and the solution of the differential equation are known."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing")
    alphas, variance, x = scheduler.alphas_cumprod, 0.5, images * 2 - 1

    def predict(x, t):
        noise = (1 - alphas[t]) ** 0.5 * x / (alphas[t] * variance + 1 - alphas[t])
        return output_from_noise(noise, x, alphas[t], prediction_type)

    for steps in (15, 30):
        timesteps = timesteps_below(scheduler, 700, steps)
        exact = x * ((alphas[timesteps[0]] * variance + 1 - alphas[timesteps[0]]) / variance) ** 0.5
        plain, averaged = (invert(predict, x, timesteps, scheduler, averaged=a) - exact for a in (False, True))
        assert averaged.abs().mean() < 0.75 * plain.abs().mean()


def test_the_inversion_of_a_call_is_averaged_on_request(pipeline, images):
    plain, again, averaged = (
        pipeline(images, output_type="pt", **FAST, **call).counterfactual
        for call in ({}, {"inversion": "plain"}, {"inversion": "averaged"})
    )
    torch.testing.assert_close(plain, again)
    assert 1e-5 < (plain - averaged).abs().mean() < 0.1
    x = pipeline.invert(images * 2 - 1, averaged=True, **FAST)
    expected = pipeline.decode(x, guidance_scale=4.0, **FAST).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(averaged, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`inversion` plain or averaged, got 'twice'"):
        pipeline(images, inversion="twice", **FAST)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [15, 20])
def test_decoding_goes_from_each_timestep_to_the_next(images, spacing, steps):
    """With a constant noise every step keeps x_0, so that an update to any other timestep would be seen."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    timesteps, alphas = timesteps_below(scheduler, 700, steps), scheduler.alphas_cumprod
    x = alphas[timesteps[0]] ** 0.5 * images + (1 - alphas[timesteps[0]]) ** 0.5 * noise
    for i in range(len(timesteps)):
        alpha = alphas[timesteps[i]]
        torch.testing.assert_close(x, alpha**0.5 * images + (1 - alpha) ** 0.5 * noise, atol=1e-5, rtol=0)
        x = decode_step(scheduler, timesteps, i, noise, x)
    torch.testing.assert_close(x, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_between_guided_steps_the_last_difference_is_reused(images, prediction_type):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    pipeline = CFGAnomalyPipeline(toy_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.unet.register_forward_hook(lambda net, args, output: seen.append(len(args[0])))
    x, span = images * 2 - 1, dict(num_inference_steps=10, noise_level=500, guidance_scale=2.0, negative_label=1)
    every, by_hand = pipeline.decode(x, guidance_every=1, **span), x
    assert seen == [2 * len(x)] * 5
    seen.clear()
    decoded = pipeline.decode(x, guidance_every=2, **span)
    assert seen == [2 * len(x), len(x)] * 2 + [2 * len(x)]
    assert 1e-5 < (decoded - every).abs().mean() < 0.2
    timesteps = timesteps_below(scheduler, 500, 10)
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            alpha = scheduler.alphas_cumprod[t]
            outputs = [pipeline.predict(by_hand, t, torch.full((len(x),), k)) for k in (0, 1)]
            noises = [noise_from_output(output, by_hand, alpha, prediction_type) for output in outputs]
            if i % 2 == 0:
                difference = noises[0] - noises[1]
            guided = output_from_noise(noises[0] + 2.0 * difference, by_hand, alpha, prediction_type)
            by_hand = scheduler.step(guided, t, by_hand).prev_sample
    torch.testing.assert_close(decoded, by_hand, atol=1e-4, rtol=0)
    seen.clear()
    pipeline.decode(x, guidance_every=3, **{**span, "guidance_scale": 0.0})
    assert seen == [len(x)] * 5, "without guidance there is one label and nothing to reuse"
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"`guidance_every` of 1 or more steps, got {every}"):
            pipeline(images, **FAST, guidance_every=every)


def test_all_prediction_types_give_the_same_noise(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    alpha = 0.3
    x = alpha**0.5 * images + (1 - alpha) ** 0.5 * noise
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * images
    for prediction_type, output in (("epsilon", noise), ("v_prediction", velocity), ("sample", images)):
        torch.testing.assert_close(noise_from_output(output, x, alpha, prediction_type), noise, atol=1e-5, rtol=0)


def test_the_ddim_update_equals_the_schedulers(scheduler, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(50)
    alphas = scheduler.alphas_cumprod
    ours = move(images, noise, alphas[400], alphas[380])
    torch.testing.assert_close(ours, scheduler.step(noise, 400, images).prev_sample, atol=1e-6, rtol=0)


def test_noise_level_is_a_timestep_whatever_the_number_of_steps(scheduler):
    for steps in (10, 50, 200, 1000):
        timesteps = timesteps_below(scheduler, 500, steps)
        assert len(timesteps) == steps // 2 and timesteps[0] < 500 <= timesteps[0] + 1000 // steps


def test_guidance_follows_ho_and_salimans(unet, scheduler, images):
    """One step by hand: (1 + w) cond - w null."""
    pipeline = CFGAnomalyPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    span = dict(noise_level=50, num_inference_steps=10)
    with torch.no_grad():
        decoded = pipeline.decode(images, 0, guidance_scale=3.0, negative_label=1, **span)
        cond, negative = (unet(images, 0, class_labels=torch.tensor([k, k])).sample for k in (0, 1))
        alpha = scheduler.alphas_cumprod[0]
        by_hand = (images - (1 - alpha) ** 0.5 * (4 * cond - 3 * negative)) / alpha**0.5
    torch.testing.assert_close(decoded, by_hand, atol=1e-5, rtol=0)


def test_guidance_of_minus_one_ignores_the_target(pipeline, images):
    a, b = (
        pipeline(images, guidance_scale=-1, target_label=k, output_type="pt", **FAST).counterfactual for k in (0, 1)
    )
    torch.testing.assert_close(a, b)
    c = pipeline(images, guidance_scale=0, output_type="pt", **FAST).counterfactual
    assert (a - c).abs().max() > 1e-3


def test_labels_can_be_names(pipeline, images):
    kwargs = dict(output_type="pt", **FAST)
    by_name = pipeline(images, target_label="healthy", negative_label="pleural effusion", source_label="null", **kwargs)
    by_id = pipeline(images, target_label=0, negative_label=1, source_label=2, **kwargs)
    torch.testing.assert_close(by_name.anomaly_map, by_id.anomaly_map)


def test_the_checkpoints_settings_hold_unless_the_caller_overrides_them(unet, scheduler, images):
    own = CFGAnomalyPipeline(unet, scheduler, settings=dict(guidance_scale=0.5, **FAST))
    plain = CFGAnomalyPipeline(unet, scheduler)
    for p in (own, plain):
        p.set_progress_bar_config(disable=True)
    expected = plain(images, guidance_scale=0.5, output_type="pt", **FAST).anomaly_map
    torch.testing.assert_close(own(images, output_type="pt").anomaly_map, expected)
    assert (own(images, output_type="pt", guidance_scale=3).anomaly_map - expected).abs().max() > 1e-3
    assert plain.settings()["noise_level"] == 500 and plain.settings()["guidance_scale"] == 4


def test_learned_variance_is_split_off(scheduler, images):
    unet = toy_unet(out_channels=2)
    plain = toy_unet()
    plain.load_state_dict({k: v[:1] if k.startswith("conv_out") else v for k, v in unet.state_dict().items()})
    maps = []
    for model in (unet, plain):
        pipeline = CFGAnomalyPipeline(model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        maps.append(pipeline(images, output_type="pt", **FAST).anomaly_map)
    torch.testing.assert_close(*maps)


def test_four_channels_make_one_map(scheduler):
    pipeline = CFGAnomalyPipeline(toy_unet(in_channels=4, out_channels=4), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(torch.rand(2, 4, 16, 16), output_type="pt", **FAST)
    assert output.counterfactual.shape == (2, 4, 16, 16) and output.anomaly_map.shape == (2, 16, 16)


@pytest.mark.parametrize("other", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
def test_deterministic_solvers_are_drop_in(pipeline, images, other):
    kwargs = dict(noise_level=300, num_inference_steps=200, guidance_scale=0, output_type="pt")
    expected = pipeline(images, **kwargs).counterfactual
    pipeline.scheduler = other.from_config(pipeline.scheduler.config)
    assert (pipeline(images, **kwargs).counterfactual - expected).abs().mean() < 0.01


@pytest.mark.parametrize("other", [DDPMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_cannot_decode_these_latents_is_refused(pipeline, images, other):
    pipeline.scheduler = other.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipeline(images, **FAST)
    pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match="deterministic"):
        pipeline(images, **FAST)


def test_the_callback_sees_every_step_and_may_change_the_latents(pipeline, images):
    steps = []

    def watch(pipe, i, t, kwargs):
        steps.append((i, int(t)))
        return {"latents": kwargs["latents"] * 0} if i == 5 else {}

    output = pipeline(images, callback_on_step_end=watch, output_type="pt", **FAST)
    assert [i for i, _ in steps] == list(range(6))
    assert [t for _, t in steps] == [0, 100, 200, 200, 100, 0]
    assert (output.counterfactual == 0.5).all()


def test_half_precision_gives_nearly_the_same_map(unet, scheduler, images):
    maps = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = CFGAnomalyPipeline(unet.to(dtype), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        maps.append(pipeline(images, output_type="pt", guidance_scale=1, **FAST).anomaly_map)
    assert maps[1].dtype == torch.float32
    assert 0 < (maps[0] - maps[1]).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(target_label=2), "target_label"),
        (dict(target_label="null"), "target_label"),
        (dict(negative_label="pneumonia"), "pneumonia"),
        (dict(noise_level=0), "noise_level"),
        (dict(noise_level=1001), "noise_level"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(direction="up"), "direction"),
        (dict(guidance_scale=float("nan")), "guidance_scale"),
        (dict(noise_level=300.5), "noise_level"),
        (dict(num_inference_steps="50"), "num_inference_steps"),
        (dict(output_type="latent"), "output_type"),
        (dict(callback_on_step_end_tensor_inputs=["unet"]), "tensor_inputs"),
    ],
)
def test_an_invalid_argument_is_refused_with_the_expected_value(pipeline, images, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline(images, **{**FAST, **wrong})


def test_a_path_is_refused_as_an_image(pipeline):
    with pytest.raises(TypeError, match="got str"):
        pipeline("chest.png")


def test_without_a_null_label_every_embedding_is_a_class(scheduler, images):
    """As in models that were trained without dropping labels."""
    pipeline = CFGAnomalyPipeline(toy_unet(), scheduler, ["a", "b", "c"], has_null_label=False)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(images, target_label="c", source_label="a", guidance_scale=0, output_type="pt", **FAST)
    assert output.anomaly_map.max() > 0 and pipeline.null_label is None
    pipeline(images, target_label="c", source_label="a", negative_label="b", guidance_scale=2, **FAST)
    with pytest.raises(ValueError, match="source_label"):
        pipeline(images, guidance_scale=0, **FAST)
    with pytest.raises(ValueError, match="negative_label"):
        pipeline(images, source_label="a", guidance_scale=2, **FAST)


def test_a_model_without_classes_is_refused(scheduler):
    with pytest.raises(ValueError, match="class embeddings"):
        CFGAnomalyPipeline(toy_unet(num_class_embeds=None), scheduler)
    with pytest.raises(ValueError, match="2 class names"):
        CFGAnomalyPipeline(toy_unet(), scheduler, ["healthy"])
    with pytest.raises(ValueError, match="guidance"):
        CFGAnomalyPipeline(toy_unet(), scheduler, settings={"guidance": 4})


# images in, maps out


@pytest.mark.parametrize("aspect", ["pad", "edge", "crop", "squash", "keep"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (16, 16), (9, 23)])
def test_a_restored_map_lies_on_the_image(aspect, shape):
    ramp = np.add.outer(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1])).astype(np.float32) / 2
    x = prepare_image(ramp, 32, scaling="dtype", aspect=aspect, data_range=(0, 1))
    assert x.shape == (1, 1, 32, 32)
    back = restore_map(x[0, 0], *shape, aspect)
    assert back.shape == shape
    visible = back > 0 if aspect in ("crop", "keep") else np.ones(shape, bool)
    assert visible.mean() > 0.39
    assert np.abs(back - ramp)[visible].max() < 0.06


def test_a_circle_stays_a_circle_unless_it_is_squashed():
    y, x = np.mgrid[:60, :90]
    disc = ((y - 30) ** 2 + (x - 45) ** 2 < 15**2).astype(np.uint8) * 255

    def sides(aspect):
        bright = prepare_image(disc, 30, aspect=aspect)[0, 0] > 0
        return int(bright.any(dim=1).sum()), int(bright.any(dim=0).sum())

    assert sides("pad") == (10, 10) and sides("crop") == (14, 14)
    assert sides("squash") == (14, 10)


def test_bars_are_as_dark_as_the_darkest_pixel():
    x = prepare_image(np.linspace(100, 200, 8 * 16).reshape(8, 16).astype(np.uint8), 16, aspect="pad")
    top, left, height, width = frame(8, 16, 16, "pad")
    assert (top, left, height, width) == (4, 0, 8, 16)
    assert (x[0, 0, :4] == -1).all() and (x[0, 0, 12:] == -1).all() and x.max() == 1


@pytest.mark.parametrize("scaling", ["minmax", "dtype"])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_keep_their_greys_in_a_model_of_three_channels(mode, scaling):
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    deep = Image.fromarray(ramp if mode == "F" else (ramp * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    assert deep.mode == mode
    one, three = (prepare_image(deep, 32, scaling, num_channels=n) for n in (1, 3))
    assert three.shape == (1, 3, 32, 32)
    assert (three == one).all()


def test_shrinking_is_the_mean_of_the_area():
    array = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    expected = array.reshape(16, 4, 16, 4).mean((1, 3)) / 255
    x = prepare_image(array, 16, scaling="dtype", data_range=(0, 1))
    np.testing.assert_allclose(x[0, 0], expected, atol=1e-6)


def test_an_image_is_the_same_in_all_types():
    eight = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    eight[0, 0], eight[0, 1] = 0, 255
    sixteen = eight.astype(np.uint16) * 257
    unit = eight.astype(np.float32) / 255
    same = [
        eight,
        eight[..., None],
        sixteen,
        unit,
        unit * 2 - 1,
        torch.from_numpy(eight),
        torch.from_numpy(unit)[None],
        Image.fromarray(eight),
        Image.fromarray(sixteen),
        Image.fromarray(np.stack([eight] * 3, -1)),
        Image.fromarray(eight).convert("RGBA"),
    ]
    for scaling in ("minmax", "dtype"):
        x = prepare_image(same, 16, scaling=scaling)
        assert len(x) == len(same)
        assert (x - x[:1]).abs().max() < 1e-5


def test_integers_beyond_16_bits_are_refused_where_they_would_be_white():
    deep = np.linspace(0, 1_000_000, 32 * 32).reshape(32, 32).astype(np.int32)
    for image in (deep, Image.fromarray(deep), torch.from_numpy(deep)):
        with pytest.raises(
            ValueError, match="integer images from 0 to 65535, got 0 to 1000000: use `scaling='minmax'`"
        ):
            prepare_image(image, 32, scaling="dtype")
        assert prepare_image(image, 32, scaling="minmax").mean() == pytest.approx(0, abs=0.01)


def test_minmax_removes_the_exposure_and_dtype_keeps_it():
    dark = (np.random.default_rng(0).random((16, 16)) * 0.3 + 0.2).astype(np.float32)
    assert prepare_image(dark, 16).min() == -1 and prepare_image(dark, 16).max() == 1
    np.testing.assert_allclose(prepare_image(dark, 16, "dtype", data_range=(0, 1))[0, 0], dark, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 3, 4, 5, 6)), torch.zeros(5, 4, 4), np.full((4, 4), np.nan), [], np.zeros((4, 4, 7), np.uint8)],
)
def test_invalid_images_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        prepare_image(wrong, 16)


def test_float_images_out_of_range_are_refused_with_dtype_scaling():
    with pytest.raises(ValueError, match="from 0 to 255"):
        prepare_image(np.array([[0.0, 255.0]]), 16, scaling="dtype")


def test_maps_have_one_scale():
    a, b = torch.full((1, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), 1.0)
    assert (difference_map(a, b) == 1).all() and (difference_map(a, a) == 0).all()
    assert (difference_map(a * 0, b, (0.0, 1.0)) == 1).all()


def test_bright_and_dark_are_the_two_halves_of_the_difference():
    a, b = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    both, bright, dark = (difference_map(a, b, direction=d) for d in ("both", "bright", "dark"))
    torch.testing.assert_close(both, bright + dark)
    assert (bright * dark == 0).all() and (difference_map(b, a, direction="dark") == bright).all()


def test_smoothing_keeps_the_mean_and_lowers_the_peak():
    maps = torch.zeros(1, 32, 32)
    maps[0, 16, 16] = 1
    smooth = smooth_map(maps, 2.0)
    torch.testing.assert_close(smooth.sum(), maps.sum())
    assert smooth.max() < 0.1 and smooth.argmax() == maps.argmax()
    assert smooth_map(maps, 0) is maps


def test_the_score_is_the_mean_of_the_highest_pixels():
    maps = torch.arange(400).reshape(1, 20, 20) / 400
    assert score_map(maps, fraction=0.05).item() == pytest.approx(maps.flatten()[-20:].mean().item())
