"""What `DiffPIRDeblurPipeline` promises, with the real classes at toy size."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, DiffPIRDeblurPipeline, SpaceToDepthUNet
from cxr_diffusers.deblurring.dataset import load_prior
from cxr_diffusers.deblurring.degradations import blur, gaussian_kernel, motion_kernel
from cxr_diffusers.hub.loading import load_unet
from cxr_diffusers.pipelines.cxr_tiles import blend
from helpers import TOY_UNET, toy_unet

KERNEL = gaussian_kernel(0.8)
FAST = dict(kernel=KERNEL, num_inference_steps=3, output_type="pt")


def prior(unet=None, scheduler=None, **config):
    pipeline = DiffPIRDeblurPipeline(unet or toy_unet(num_class_embeds=None), scheduler or DDIMScheduler(), **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def deblur():
    return prior()


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_shapes_and_ranges_are_those_of_the_documentation(deblur, images):
    output = deblur(images, **FAST)
    assert output.restored.shape == images.shape and torch.equal(output.image, images)
    assert 0 <= output.restored.min() and output.restored.max() <= 1
    restored, image = deblur(images, return_dict=False, generator=seeds(2), **FAST)
    assert torch.equal(image, images) and torch.equal(restored, deblur(images, generator=seeds(2), **FAST).restored)


def test_pil_np_and_pt_are_the_same_answer_in_the_depth_of_the_input(deblur, images):
    pt = deblur(images, generator=seeds(2), **FAST).restored
    array = deblur(images, generator=seeds(2), **{**FAST, "output_type": "np"}).restored
    np.testing.assert_array_equal(array[..., 0], pt[:, 0])
    grey = [Image.fromarray((x[0] * 255).round().byte().numpy()) for x in images]
    deep = [Image.fromarray(np.asarray(g) * np.uint16(257)) for g in grey]
    both = deblur([grey[0], deep[0]], generator=seeds(1) + seeds(1), **{**FAST, "output_type": "pil"}).restored
    assert [image.mode for image in both] == ["L", "I;16"]
    np.testing.assert_allclose(np.asarray(both[0]) / 255, np.asarray(both[1]) / 65535, atol=0.6 / 255)


def test_a_batch_is_its_images_one_by_one_with_a_generator_each(deblur, images):
    batch = deblur(images, generator=seeds(2), **FAST).restored
    single = [deblur(x, generator=seeds(1, i), **FAST).restored for i, x in enumerate(images)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)


def test_any_size_and_sizes_mixed(deblur):
    images = [torch.rand(1, h, w) for h, w in ((40, 21), (16, 16), (40, 21))]
    mixed = deblur(images, generator=seeds(3), **FAST).restored
    assert [tuple(x.shape) for x in mixed] == [(1, 40, 21), (1, 16, 16), (1, 40, 21)]
    alone = deblur(images[2], generator=seeds(1, 2), **FAST).restored[0]
    torch.testing.assert_close(mixed[2], alone, atol=5e-5, rtol=0)


def test_each_image_can_have_its_own_kernel(deblur, images):
    kernels = np.stack([motion_kernel(5, 0.5, 0), motion_kernel(5, 0.5, 1)])
    both = deblur(images, generator=seeds(2), **{**FAST, "kernel": kernels}).restored
    second = deblur(images[1], generator=seeds(1, 1), **{**FAST, "kernel": kernels[1]}).restored
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def test_the_answer_agrees_with_the_measurement_more_the_less_noise_is_said_to_be_in_it(deblur):
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    y = blur(x, KERNEL, "wrap")

    def misfit(noise_std):
        options = {**FAST, "noise_std": noise_std, "boundary": "wrap", "num_inference_steps": 10}
        restored = deblur(y, generator=seeds(1), **options).restored
        return (blur(restored, KERNEL, "wrap") - y).abs().mean().item()

    assert misfit(0.001) < 0.5 * misfit(0.1) < misfit(1.0)
    assert misfit(0.0) == misfit(0.001), "the floor"


def test_all_evaluations_count_and_no_more_are_made(deblur, images):
    calls = []
    hook = deblur.unet.register_forward_hook(lambda unet, inputs, output: calls.append(int(inputs[1])))
    deblur(images, **{**FAST, "num_inference_steps": 7})
    hook.remove()
    assert calls == deblur.timesteps(7) and calls[-1] == 0
    # the last one decides: without noise to put back, what it finds is the answer
    seen = {}
    options = dict(callback_on_step_end=lambda p, i, t, kwargs: seen.update({i: kwargs["latents"]}))
    answer = deblur(images, **FAST, boundary="wrap", **options).restored
    torch.testing.assert_close((seen[2] / 2 + 0.5).clamp(0, 1), answer, atol=1e-5, rtol=0)


def test_timesteps_go_down_from_the_last_and_are_as_many_as_asked_for(deblur):
    for spacing in ("quad", "uniform"):
        for steps in (1, 2, 20, 60, 501, 1000):
            timesteps = deblur.timesteps(steps, spacing)
            assert len(timesteps) == steps and timesteps[0] == 999 and min(timesteps) >= 0
            assert timesteps == sorted(timesteps, reverse=True)
    quad, uniform = deblur.timesteps(100), deblur.timesteps(100, "uniform")
    assert np.mean(quad) < np.mean(uniform), "quad asks most where the noise is low"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_of_the_scheduler_is_respected(prediction_type):
    """Of a network that knows the clean image, the denoising step finds it, whatever the prediction's kind."""
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    pipeline, alpha = prior(scheduler=scheduler), scheduler.alphas_cumprod[400]
    clean, noise = torch.rand(1, 1, 16, 16) * 2 - 1, torch.randn(1, 1, 16, 16)
    x = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
    pipeline.predict = lambda x, t: {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
    torch.testing.assert_close(pipeline.denoise(x, 400, alpha), clean, atol=1e-4, rtol=0)


def test_learned_variance_is_split_off(images):
    with_variance = toy_unet(num_class_embeds=None, out_channels=2)
    plain = toy_unet(num_class_embeds=None)
    weights = with_variance.state_dict()
    weights["conv_out.weight"], weights["conv_out.bias"] = (weights[f"conv_out.{k}"][:1] for k in ("weight", "bias"))
    plain.load_state_dict(weights)
    both = [prior(unet)(images, generator=seeds(2), **FAST).restored for unet in (with_variance, plain)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)


def test_a_class_conditional_unet_serves_with_its_null_label(unet, images, tmp_path):
    named = prior(unet, label=2)(images, generator=seeds(2), **FAST).restored
    torch.testing.assert_close(prior(unet)(images, generator=seeds(2), **FAST).restored, named)
    x = torch.randn(2, 1, 16, 16)
    assert (prior(unet, label=0).predict(x, 300) - prior(unet).predict(x, 300)).abs().max() > 1e-4
    # and is the same without classes, when its null label has gone into a bias
    CFGAnomalyPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    plain = load_unet(tmp_path, unconditional=True)
    assert plain.config.num_class_embeds is None
    torch.testing.assert_close(prior(plain)(images, generator=seeds(2), **FAST).restored, named, atol=5e-5, rtol=0)


def test_any_model_of_ours_is_opened_as_a_prior(unet, images, tmp_path):
    CFGAnomalyPipeline(unet, DDIMScheduler(), data_range=(0.0, 1.0), scaling="dtype").save_pretrained(tmp_path / "cfg")
    opened = load_prior(tmp_path / "cfg")
    assert opened.config.data_range == [0.0, 1.0] and opened.config.scaling == "dtype"
    prior(label=None).save_pretrained(tmp_path / "own")
    assert load_prior(tmp_path / "own").unet.config.num_class_embeds is None
    assert load_prior().unet.config.num_class_embeds == load_unet("default").config.num_class_embeds, (
        "the shipped model"
    )
    CFGAnomalyPipeline(unet, DDIMScheduler(), has_null_label=False).save_pretrained(tmp_path / "classes")
    for load in (load_prior, lambda name: load_unet(name, unconditional=True)):
        with pytest.raises(ValueError, match="null label, got .*classes, which has only classes"):
            load(tmp_path / "classes")
    assert load_unet(tmp_path / "classes").config.num_class_embeds


def test_the_range_of_the_model_does_not_matter(images):
    """A model of [0, 1] that denoises as one of [-1, 1] does gives its answer: penalties follow the range."""
    network = toy_unet(num_class_embeds=None)
    ours = prior(network, DDIMScheduler(prediction_type="sample"))
    theirs = prior(network, DDIMScheduler(prediction_type="sample"), data_range=(0.0, 1.0))
    alphas = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(ours.penalty(alphas, 0.01, 7.0), 4 * theirs.penalty(alphas, 0.01, 7.0))
    assert theirs(images, **FAST).restored.isfinite().all()


def test_exposure_is_kept(deblur, images):
    """Stretched for the prior, put back for the user: a dark image stays dark, by the same factor."""
    dim = images * 0.2 + 0.1
    options = {**FAST, "noise_std": 0.05}
    bright = deblur(images, generator=seeds(2), **options).restored
    dark = deblur(dim, generator=seeds(2), **{**options, "noise_std": 0.05 * 0.2}).restored
    inside = (bright > 0) & (bright < 1)
    torch.testing.assert_close(dark[inside], (bright * 0.2 + 0.1)[inside], atol=1e-4, rtol=0)
    flat = deblur(torch.full((1, 1, 16, 16), 0.4), **FAST).restored
    assert flat.isfinite().all() and abs(flat.mean() - 0.4) < 0.3


def smooth_scenes(count, size=96):
    """Images that go on beyond every border, Gaussian with a known spectrum; and that spectrum's exact prior."""
    frequency = torch.fft.fftfreq(size)
    power = 1 / (frequency[:, None] ** 2 + frequency[None] ** 2 + 1e-3) ** 1.5
    white = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    scenes = torch.fft.ifft2(power**0.5 * torch.fft.fft2(white)).real
    scale = 0.12 / scenes.std().item()
    return scenes * scale + 0.5, scale


def exact_noise(noisy, alpha, scale):
    """The noise that the best denoiser of `smooth_scenes` finds in (B, 1, H, W) at signal level `alpha`."""
    f = [torch.fft.fftfreq(side) for side in noisy.shape[-2:]]
    power = (2 * scale) ** 2 / (f[0][:, None] ** 2 + f[1][None] ** 2 + 1e-3) ** 1.5  # on the scale of [-1, 1]
    clean = torch.fft.ifft2(alpha**0.5 * power / (alpha * power + 1 - alpha) * torch.fft.fft2(noisy)).real
    return (noisy - alpha**0.5 * clean) / (1 - alpha) ** 0.5


@pytest.mark.parametrize("kernel", [motion_kernel(10, 0.5, 2), gaussian_kernel(1.5)], ids=["motion", "gaussian"])
def test_the_border_does_not_ring(kernel):
    """Images cut out of a larger blurred scene, as all are, with a prior that is exactly right."""
    scenes, scale = smooth_scenes(4)
    pipeline = prior(scaling="dtype")
    alphas = pipeline.scheduler.alphas_cumprod
    pipeline.predict = lambda x, t: exact_noise(x, alphas[t], scale)
    cut = (..., slice(16, 80), slice(16, 80))
    x = scenes[cut]
    y = blur(scenes, kernel, "wrap")[cut] + 0.002 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    edge = torch.ones(64, 64, dtype=bool)
    edge[8:-8, 8:-8] = False
    options = dict(num_inference_steps=20, output_type="pt", noise_std=0.002)

    def errors(boundary):
        restored = pipeline(y, kernel, boundary=boundary, generator=seeds(4), **options).restored
        return [((restored - x) ** 2)[:, 0, where].mean().sqrt().item() for where in (edge, ~edge)]

    at_edge, inside = errors("unknown")
    blurred_edge, blurred_inside = (((y - x) ** 2)[:, 0, where].mean().sqrt().item() for where in (edge, ~edge))
    print(f"\n{'':8} edge {at_edge:.4f} inside {inside:.4f}; blurred {blurred_edge:.4f} {blurred_inside:.4f}", end="")
    for boundary in ("extend", "wrap"):
        print(f"\n{boundary:8} edge {errors(boundary)[0]:.4f} inside {errors(boundary)[1]:.4f}", end="")
    assert at_edge < 2 * inside and at_edge < blurred_edge and inside < blurred_inside
    assert errors("extend")[0] > 1.5 * at_edge
    assert errors("wrap")[0] > 3 * at_edge


def test_tiles_cover_everything_and_show_no_seam():
    x = torch.rand(2, 1, 50, 37)
    shapes = []

    def identity(tiles):
        shapes.append(tuple(tiles.shape[1:]))
        return tiles

    torch.testing.assert_close(blend(x, 16, identity), x)
    assert set(shapes) == {(1, 16, 16)}
    torch.testing.assert_close(blend(x, 64, identity), x)
    ramp = blend(torch.zeros(1, 1, 50, 37), 16, lambda tiles: tiles + torch.arange(len(tiles))[:, None, None, None])
    assert ramp.diff(dim=-1).abs().max() < 0.5 * ramp.max(), "neighbours fade into each other"


def test_tiles_are_seen_one_by_one_by_the_network(deblur):
    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = deblur(x, generator=seeds(1), **FAST).restored
    tiled = deblur(x, tile_size=16, generator=seeds(1), **FAST).restored
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() > 1e-3
    large = deblur(x, tile_size=128, generator=seeds(1), **FAST).restored
    torch.testing.assert_close(large, whole, atol=3e-5, rtol=0)


def test_the_sides_of_a_canvas_are_multiples_of_the_networks_reduction():
    """A space-to-depth UNet halves its input once more than its levels do."""
    deblur = prior(SpaceToDepthUNet(**{**TOY_UNET, "sample_size": 32, "num_class_embeds": None}))
    assert deblur.reduction == 4
    restored = deblur(torch.rand(1, 1, 18, 21), generator=seeds(1), **FAST).restored
    assert restored.shape == (1, 1, 18, 21)


def test_a_callback_sees_every_step_and_may_change_the_latents(deblur, images):
    seen = []

    def callback(pipeline, i, t, kwargs):
        seen.append((i, t))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    output = deblur(images, callback_on_step_end=callback, **FAST)
    assert seen == list(enumerate(deblur.timesteps(3)))
    middle = (images.amin(dim=(1, 2, 3)) + images.amax(dim=(1, 2, 3))) / 2
    torch.testing.assert_close(output.restored, middle[:, None, None, None].expand_as(images))


def test_a_saved_folder_carries_its_code_and_opens_by_both_ways(deblur, images, tmp_path):
    deblur.save_pretrained(tmp_path)
    expected = deblur(images, generator=seeds(2), **FAST).restored
    for name in ("pipeline_diffpir_deblur", "cxr_deconvolution"):
        assert len(list(tmp_path.glob(f"{name}_*.py"))) == 1
    ours = DiffPIRDeblurPipeline.from_pretrained(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(ours) is DiffPIRDeblurPipeline and type(theirs).__module__.startswith("diffusers_modules")
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        torch.testing.assert_close(pipeline(images, generator=seeds(2), **FAST).restored, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kernel": np.ones((3, 3))}, "sums to 1"),
        ({"kernel": np.full((32, 32), 1 / 1024)}, "at most 16 x 16"),
        ({"kernel": np.full((3, 2, 2), 0.25)}, "one kernel or one for each of 2"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 20.5}, "from 1 to 1000"),
        ({"noise_std": 12.75}, "divide grey levels by 255"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"lambda_": 0}, "lambda_"),
        ({"zeta": 1.5}, "zeta"),
        ({"timestep_spacing": "cubic"}, "quad or uniform"),
        ({"boundary": "zero"}, "unknown, extend or wrap"),
        ({"tile_size": 15}, "divides by 2"),
        ({"generator": seeds(3)}, "one generator for each of the"),
        ({"output_type": "jpg"}, "pil, np or pt"),
        ({"callback_on_step_end_tensor_inputs": ["image"]}, "latents"),
    ],
)
def test_bad_input_is_refused_at_the_door(deblur, images, change, match):
    with pytest.raises(ValueError, match=match):
        deblur(images, **{**FAST, **change})


def test_bad_parts_are_refused_too(unet):
    with pytest.raises(ValueError, match="label"):
        prior(unet, label=3)
    with pytest.raises(ValueError, match="minmax or dtype"):
        prior(scaling="max")
    with pytest.raises(ValueError, match="divide by 2.*15 x 16"):
        prior()(torch.rand(1, 1, 15, 16), boundary="wrap", **FAST)
    with pytest.raises(TypeError, match="PIL image"):
        prior()("chest.png", **FAST)
