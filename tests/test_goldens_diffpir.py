"""DiffPIR's own numbers against ours; the original's bugs are played again here and only here.

`pytest tests/test_goldens_diffpir.py -s` prints the figures of docs/faithfulness.md.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_diffusers import DiffPIRDeblurPipeline
from cxr_diffusers.deblurring.degradations import blur, gaussian_kernel, motion_kernel, motion_path
from cxr_diffusers.guided_diffusion import convert_state_dict
from cxr_diffusers.pipelines.cxr_deconvolution import data_step, transfer_function
from cxr_diffusers.pipelines.pipeline_diffpir_deblur import NOISE_FLOOR

torch.set_num_threads(1)
HERE = Path(__file__).with_name("goldens")
SHARED = Path(__file__).parents[2] / "shared" / "goldens"
FILES = ("g5_kernels_datastep", "g5_loop_k10_n0p5_nfe20")


def golden(name):
    arrays = np.load(HERE / f"{name}.npz")
    return {key: arrays[key] if arrays[key].dtype.kind == "U" else torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="module")
def kernels():
    return golden(FILES[0])


@pytest.fixture(scope="module")
def loop():
    return golden(FILES[1])


@pytest.fixture(scope="module")
def pipeline(loop):
    flags = json.loads(str(loop["config"]))
    weights = {key.split("/", 1)[1]: value.float() for key, value in loop.items() if key.startswith("weights/")}
    flags = dict(num_heads=flags["num_heads"], image_size=flags["image_size"])
    unet, scheduler, _ = convert_state_dict(weights, **flags)
    pipeline = DiffPIRDeblurPipeline(unet, scheduler, scaling="dtype")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def difference(ours, theirs):
    return (torch.as_tensor(ours) - theirs).abs().max().item()


def report(what, value):
    print(f"\n{what}: {value:.1e}", end="")
    return value


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the full golden files are not in {SHARED}")
def test_the_small_files_are_the_originals_numbers():
    for name in FILES:
        full, small = np.load(SHARED / f"{name}.npz"), np.load(HERE / f"{name}.npz")
        keys = [key for key in small if key != "config" and not key.startswith("weights/")]
        assert len(keys) > 10 and all(np.array_equal(full[key], small[key]) for key in keys)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("size", [61, 25, 10])
def test_a_seed_means_the_same_motion_kernel_to_the_bit(kernels, size, index):
    """The original draws twice from np.random.seed(10 * index) and uses the second kernel; size 10 at Pillow <= 12."""
    random = np.random.RandomState(10 * index)
    first, second = motion_kernel(size, 0.5, random), motion_kernel(size, 0.5, random)
    assert np.array_equal(second, kernels[f"motion_k{size}_idx{index}"].numpy())
    assert np.array_equal(random.uniform(size=2), kernels[f"motion_k{size}_idx{index}_rand_after"].numpy())
    if (size, index) == (61, 0):
        assert np.array_equal(first, kernels["first_draw_k61_idx0"].numpy())


def test_the_trajectory_is_the_originals(kernels):
    random = np.random.RandomState(0)
    motion_path(10, 0.5, random)
    path = motion_path(10, 0.5, random)
    assert difference(np.stack([path.real, path.imag], axis=1), kernels["motion_k10_idx0_path"]) < 1e-12


def test_the_gaussian_is_the_originals_up_to_its_cut(kernels):
    """Theirs is cut off at 61 pixels (4.8 sigma here), ours at 4 sigma."""
    ours = torch.from_numpy(gaussian_kernel(kernels["gauss_k61_idx0_std"].item()))
    cut = (61 - len(ours)) // 2
    theirs = kernels["gauss_k61_idx0"][cut:-cut, cut:-cut]
    assert report("gaussian kernel, 6.3 pixels", difference(ours, theirs)) < 1e-6


@pytest.mark.parametrize("size", [25, 10])
def test_the_transfer_function_is_the_originals_also_for_even_sizes(kernels, size):
    otf = transfer_function(kernels[f"motion_k{size}_idx0"][None], 64, 64)
    assert difference(otf.real, kernels[f"data_k{size}_FB_real"]) < 1e-6
    assert difference(otf.imag, kernels[f"data_k{size}_FB_imag"]) < 1e-6


@pytest.mark.parametrize(("tau", "bound"), [(3.0, 2e-6), (0.05, 5e-6), (0.0001, 5e-4)])
@pytest.mark.parametrize("size", [25, 10])
def test_the_data_step_is_the_originals_but_for_its_cancellation(kernels, size, tau, bound):
    otf = transfer_function(kernels[f"motion_k{size}_idx0"][None], 64, 64)
    theirs = kernels[f"data_k{size}_tau{tau}_out"]
    ours = data_step(kernels["data_x"], kernels["data_y"], otf, tau)
    assert report(f"data step, size {size}, tau {tau:g}", difference(ours, theirs)) < bound
    exact = data_step(kernels["data_x"].double(), kernels["data_y"].double(), otf.to(torch.complex128), tau)
    assert difference(ours, exact) < 2e-5 and difference(theirs, exact) > 0.9 * difference(ours, exact)


def test_the_timesteps_and_penalties_are_the_originals(pipeline, loop):
    timesteps = pipeline.timesteps(20)
    assert timesteps == loop["model_t"].tolist()
    # the original's uniform sequence has one evaluation more, at t = 0, which it wastes
    theirs = [*range(0, 1000, 1000 // 20), 999]
    assert [*pipeline.timesteps(20, "uniform"), 0] == [999 - s for s in theirs]
    sigma_n = max(NOISE_FLOOR, loop["noise_level_img"].item())
    alphas = pipeline.scheduler.alphas_cumprod[timesteps[:-1]].double()
    ours = pipeline.penalty(alphas, sigma_n, loop["lambda_"].item())
    assert report("rho_t, relative", ((ours - loop["tau"]) / loop["tau"]).abs().max().item()) < 1e-4


def test_the_measurement_is_the_originals_circular_blur(loop):
    """uint8, truncated, and half a grey level of noise on it."""
    image = loop["img_H"].double()
    blurred = blur(image, loop["kernel"], boundary="wrap").floor() / 255
    noise = loop["y"] - blurred
    assert abs(noise.std().item() - loop["noise_level_img"].item()) < 2e-4 and abs(noise.mean().item()) < 2e-4


def cancelling_data_step(x0, y, otf, rho):
    """The original's algebra for `data_step`: the same in exact arithmetic, and not in float32 where rho is tiny."""
    right = otf.conj() * torch.fft.fft2(y) + torch.fft.fft2(rho * x0)
    return torch.fft.ifft2((right - otf.conj() * (otf * right / (otf.abs() ** 2 + rho))) / rho).real


def play(pipeline, g, step):
    """The original's loop with its noises: the last evaluation goes to waste, its answer is still noisy."""
    noises, alphas = g["noises"], pipeline.scheduler.alphas_cumprod
    y, timesteps = g["y"][None, None], g["model_t"].tolist()
    otf = transfer_function(g["kernel"][None], 32, 32)
    alpha = alphas[timesteps[0]]
    x = alpha**0.5 * (2 * y - 1) + (1 - alpha) ** 0.5 * noises[0]
    seen = []
    for i, t in enumerate(timesteps):
        alpha = alphas[t]
        seen.append(x)
        x0 = pipeline.denoise(x, t, alpha)
        if t == 0:
            continue
        x0 = 2 * step(x0 / 2 + 0.5, y, otf, g["tau"][i].float()) - 1
        x = pipeline.renoise(x, x0, alpha, alphas[timesteps[i + 1]], g["zeta"].item(), noises[2 + 2 * i])
    return x, seen


@torch.no_grad()
def test_each_step_is_the_originals_from_its_own_x(pipeline, loop):
    alphas, worst = pipeline.scheduler.alphas_cumprod, {"denoise": 0.0, "renoise": 0.0}
    for i, t in enumerate(loop["model_t"].tolist()):
        x = loop["x_in"][i]
        worst["denoise"] = max(worst["denoise"], difference(pipeline.denoise(x, t, alphas[t]), loop["x0_pred"][i]))
        if t:
            new_alpha, fresh = alphas[loop["model_t"][i + 1]], loop["noises"][2 + 2 * i]
            ours = pipeline.renoise(x, 2 * loop["data_out"][i] - 1, alphas[t], new_alpha, loop["zeta"].item(), fresh)
            worst["renoise"] = max(worst["renoise"], difference(ours, loop["x_in"][i + 1]))
    # at t = 999 the network's rounding is divided by sqrt(alpha) = 0.006
    assert report("denoising, 20 steps", worst["denoise"]) < 5e-4
    assert report("renoising, 19 steps", worst["renoise"]) < 2e-5


@torch.no_grad()
def test_the_whole_loop_is_the_originals(pipeline, loop):
    theirs = loop["final"]
    x, seen = play(pipeline, loop, cancelling_data_step)
    final = (x / 2 + 0.5).clamp(0, 1)
    assert report("whole loop, the original's algebra", difference(final, theirs.clamp(0, 1))) < 5e-4
    x, seen = play(pipeline, loop, data_step)
    final = (x / 2 + 0.5).clamp(0, 1)
    assert report("whole loop, the stable form", difference(final, theirs.clamp(0, 1))) < 6e-3
    on_the_way = max(difference(a, b) for a, b in zip(seen, loop["x_in"], strict=True))
    assert report("the same, on the way", on_the_way) > 0.1
    levels = ((final[0, 0] * 255).round() - loop["final_uint8"]).abs().max().item()
    assert report("the same, in grey levels", levels) <= 1


def psnr(image, loop):
    return -10 * torch.log10(((image - loop["img_H"] / 255) ** 2).mean()).item()


def test_our_pipeline_is_at_least_as_good_with_as_many_evaluations(pipeline, loop):
    given = dict(noise_std=loop["noise_level_img"].item(), num_inference_steps=20, boundary="wrap", output_type="pt")
    our_psnr = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        our_psnr.append(psnr(pipeline(loop["y"], loop["kernel"], generator=generator, **given).restored[0, 0], loop))
    theirs = psnr(loop["final_uint8"] / 255, loop)
    assert abs(theirs - loop["psnr"].item()) < 1e-3
    print(f"\nPSNR: theirs {theirs:.2f} dB, ours {min(our_psnr):.2f} to {max(our_psnr):.2f} dB over 5 seeds", end="")
    assert min(our_psnr) > theirs
