"""The laws of blur: its adjoint, its delta, its unit sum; and every way to name a kernel."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from cxr_diffusers.deblurring.degradations import (
    add_noise,
    blur,
    blur_adjoint,
    degrade,
    disk_kernel,
    gaussian_kernel,
    linear_motion_kernel,
    load_kernel,
    make_kernel,
    motion_kernel,
)
from cxr_diffusers.deblurring.kernel_estimation import calibrate, estimate_blur, estimate_kernel
from cxr_diffusers.pipelines.cxr_deconvolution import (
    canvas_size,
    check_kernel,
    data_step,
    extend,
    fast_length,
    image_masks,
    masked_data_step,
    middle,
    transfer_function,
)

KERNELS = {
    "motion, small": motion_kernel(10, 0.5, 0),
    "motion, large": motion_kernel(61, 0.5, 3),
    "motion, odd": motion_kernel(9, 1.0, 1),
    "linear": linear_motion_kernel(7, 30),
    "gaussian": gaussian_kernel(1.5),
    "gaussian, oblong": gaussian_kernel(2.5, 0.8, 40),
    "disk": disk_kernel(2.5),
}
BOUNDARIES = ["reflect", "replicate", "wrap"]


def image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernels_sum_to_one_and_are_nowhere_negative(kernel):
    assert kernel.dtype == np.float32 and kernel.min() >= 0 and abs(kernel.sum() - 1) < 1e-5
    assert (kernel > 0).sum() > 1, "it blurs"
    check_kernel(kernel)


@pytest.mark.parametrize("size", [2, 5, 10, 25, 53])
def test_small_motion_kernels_are_not_empty_whatever_pillow_draws(size):
    for seed in range(5):
        kernel = motion_kernel(size, 0.5, seed)
        assert kernel.shape == (size, size) and np.isfinite(kernel).all() and abs(kernel.sum() - 1) < 1e-5


def test_a_seed_is_a_kernel_and_intensity_shakes():
    assert np.array_equal(motion_kernel(25, 0.5, 7), motion_kernel(25, 0.5, 7))
    assert not np.array_equal(motion_kernel(25, 0.5, 7), motion_kernel(25, 0.5, 8))
    calm, wild = (np.mean([(motion_kernel(31, i, s) > 0).sum() for s in range(20)]) for i in (0.1, 1.0))
    assert wild > 1.2 * calm


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("kernel", [KERNELS["motion, small"], KERNELS["linear"], gaussian_kernel(1)])
def test_the_adjoint_is_the_adjoint(kernel, boundary):
    x, y = image(2, 1, 24, 20), image(2, 1, 24, 20, seed=1)
    left = (blur(x, kernel, boundary) * y).sum()
    right = (x * blur_adjoint(y, kernel, boundary)).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("delta", [linear_motion_kernel(1), disk_kernel(0.3), gaussian_kernel(0.01)])
def test_a_delta_changes_nothing_and_a_flat_image_stays_flat(delta, boundary):
    x = image(1, 1, 16, 16)
    torch.testing.assert_close(blur(x, delta, boundary), x)
    flat = torch.full((16, 16), 0.3)
    torch.testing.assert_close(blur(flat, KERNELS["motion, small"], boundary), flat)


@pytest.mark.parametrize("kernel", [KERNELS["motion, small"], KERNELS["linear"], np.float32([[0.5, 0.25], [0.25, 0]])])
def test_blur_is_convolution_as_scipy_and_fourier_have_it(kernel):
    x = image(20, 24)
    expected = ndimage.convolve(x.numpy(), kernel.astype(float), mode="wrap")
    np.testing.assert_allclose(blur(x, kernel, "wrap"), expected, atol=1e-7)
    otf = transfer_function(torch.from_numpy(kernel)[None], 20, 24)[0, 0]
    np.testing.assert_allclose(torch.fft.ifft2(otf * torch.fft.fft2(x)).real, expected, atol=1e-6)
    if kernel.shape[0] % 2 and kernel.shape[1] % 2:  # of even sides, scipy's mirror is another one
        mirrored = ndimage.convolve(x.numpy(), kernel.astype(float), mode="mirror")
        np.testing.assert_allclose(blur(x, kernel, "reflect"), mirrored, atol=1e-7)


def test_kernels_have_the_width_they_are_named_for():
    def spread(kernel):
        y, x = np.indices(kernel.shape)
        mean = [(kernel * v).sum() for v in (x, y)]
        assert np.allclose(mean, [kernel.shape[1] // 2, kernel.shape[0] // 2], atol=0.05)
        return [(kernel * (v - m) ** 2).sum() for v, m in zip((x, y), mean, strict=True)]

    assert np.allclose(spread(gaussian_kernel(2)), 4, rtol=0.01)
    assert np.allclose(spread(disk_kernel(4)), 4, rtol=0.05)  # r^2 / 4
    x, y = spread(linear_motion_kernel(12))
    assert y == 0 and x == pytest.approx(12, rel=0.02)  # l^2 / 12
    x, y = spread(linear_motion_kernel(12, 90))
    assert x == 0 and y == pytest.approx(12, rel=0.02)
    x, y = spread(gaussian_kernel(3, 1, 90))
    assert x == pytest.approx(1, rel=0.02) and y == pytest.approx(9, rel=0.02)
    kernel = linear_motion_kernel(9, 45)
    assert kernel[0, -1] > 0 and kernel[0, 0] == 0, "counter-clockwise: up to the right"


def test_a_kernel_comes_from_a_file(tmp_path):
    kernel = KERNELS["motion, small"]
    np.save(tmp_path / "k.npy", 7 * kernel)
    np.testing.assert_allclose(load_kernel(tmp_path / "k.npy"), kernel, rtol=1e-5)
    Image.fromarray((kernel / kernel.max() * 255).round().astype(np.uint8)).save(tmp_path / "k.png")
    result = make_kernel(f"file:path={tmp_path / 'k.png'}")
    assert abs(result.sum() - 1) < 1e-5 and np.abs(result - kernel).max() < 2e-3
    np.save(tmp_path / "bad.npy", np.zeros((3, 3)))
    with pytest.raises(ValueError, match="bad.npy.*not all 0"):
        load_kernel(tmp_path / "bad.npy")
    with pytest.raises(FileNotFoundError):
        load_kernel(tmp_path / "nowhere.npy")


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("motion:size=12,intensity=0.3,seed=5", motion_kernel(12, 0.3, 5)),
        ("motion", motion_kernel()),
        ("linear:length=9,angle=30", linear_motion_kernel(9, 30)),
        ("gaussian:sigma=1.5", gaussian_kernel(1.5)),
        ("disk:radius=2", disk_kernel(2)),
    ],
)
def test_a_kernel_has_a_name(text, kernel):
    assert np.array_equal(make_kernel(text), kernel)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("box:size=3", "motion, linear, gaussian, disk, file"),
        ("gaussian", "give 'sigma'"),
        ("gaussian:width=3", "unknown key 'width'.*sigma"),
        ("gaussian:sigma=wide", "a number for 'sigma'"),
        ("gaussian:sigma=1,sigma=2", "expected 'sigma' once, got it twice"),
        ("gaussian:sigma=0", "greater than 0"),
        ("motion:size=1", "2 or more"),
        ("motion:size=10.5", "whole pixels"),
        ("motion:intensity=2", "from 0 to 1"),
        ("linear:length=0.5", "1 pixel or more"),
    ],
)
def test_an_invalid_kernel_is_refused_with_the_valid_values(text, match):
    with pytest.raises(ValueError, match=match):
        make_kernel(text)


def test_blur_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="boundary.*zero"):
        blur(image(8, 8), gaussian_kernel(0.3), "zero")
    with pytest.raises(ValueError, match="at most 8 x 8"):
        blur(image(8, 8), motion_kernel(10))


def test_noise_has_its_standard_deviation_and_its_seed():
    x = torch.zeros(1, 1, 100, 100)
    noise = add_noise(x, 0.1, torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(0.1, rel=0.03) and abs(noise.mean().item()) < 0.003
    assert torch.equal(noise, degrade(x, disk_kernel(1), 0.1, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="0 or more"):
        add_noise(x, -1)


@pytest.mark.parametrize("rho", [1e-6, 0.01, 1.0])
def test_the_data_step_solves_its_normal_equations(rho):
    kernel = KERNELS["motion, small"]
    x0, y = image(1, 1, 24, 24), image(1, 1, 24, 24, seed=1)
    otf = transfer_function(torch.from_numpy(kernel)[None].double(), 24, 24)
    z = data_step(x0, y, otf, rho)
    residual = blur_adjoint(blur(z, kernel, "wrap") - y, kernel, "wrap") + rho * (z - x0)
    assert residual.abs().max() < 1e-6


def test_the_data_step_weighs_prior_and_image_by_the_noise():
    kernel = KERNELS["gaussian"]
    x0, y = image(1, 1, 24, 24), image(1, 1, 24, 24, seed=1)
    otf = transfer_function(torch.from_numpy(kernel)[None].double(), 24, 24)
    torch.testing.assert_close(data_step(x0, y, otf, 1e12), x0)
    sharp = data_step(x0, blur(x0, kernel, "wrap"), otf, 0.1)
    torch.testing.assert_close(sharp, x0, atol=1e-5, rtol=0)
    assert (blur(data_step(x0, y, otf, 1e-9), kernel, "wrap") - y).abs().mean() < (
        blur(x0, kernel, "wrap") - y
    ).abs().mean()


def test_with_all_pixels_measured_conjugate_gradients_reach_the_closed_form():
    kernel = torch.from_numpy(KERNELS["motion, small"])[None].double()
    x0, y = image(2, 1, 24, 24), image(2, 1, 24, 24, seed=1)
    otf, rho = transfer_function(kernel, 24, 24), torch.tensor([0.05, 2.0]).reshape(2, 1, 1, 1)
    solution = masked_data_step(x0, y, otf, rho, torch.tensor(True), iterations=60)
    torch.testing.assert_close(solution, data_step(x0, y, otf, rho), atol=1e-6, rtol=0)
    unchanged = masked_data_step(x0, blur(x0, kernel[0], "wrap"), otf, rho, torch.tensor(True))
    torch.testing.assert_close(unchanged, x0, atol=1e-6, rtol=0)


def test_pixels_outside_the_image_do_not_influence_the_data_step():
    kernel = torch.from_numpy(KERNELS["motion, small"])[None].double()
    x0, y = image(1, 1, 24, 24), image(1, 1, 24, 24, seed=1)
    measured, otf = image_masks([(10, 12)], 24, 24), transfer_function(kernel, 24, 24)
    assert measured.sum() == 120 and middle(measured, 10, 12).all()
    other = torch.where(measured, y, 0)
    x, from_other = (masked_data_step(x0, measurement, otf, 0.01, measured, 200) for measurement in (y, other))
    torch.testing.assert_close(x, from_other)
    residual = blur_adjoint(measured * (blur(x, kernel[0], "wrap") - y), kernel[0], "wrap") + 0.01 * (x - x0)
    assert residual.abs().max() < 1e-6


@pytest.mark.parametrize("width", [20, 21])
def test_the_data_step_is_that_of_the_full_fourier_transform(width):
    """Half of the frequencies are transformed: an even and an odd width have a different last frequency."""
    kernel = torch.from_numpy(KERNELS["motion, small"])[None].double()
    x0, y, otf = image(1, 1, 18, width), image(1, 1, 18, width, seed=1), transfer_function(kernel, 18, width)
    full = otf.conj() * torch.fft.fft2(y) + 0.1 * torch.fft.fft2(x0)
    full = torch.fft.ifft2(full / (otf.abs() ** 2 + 0.1)).real
    torch.testing.assert_close(data_step(x0, y, otf, 0.1), full, atol=1e-12, rtol=0)
    iterated = masked_data_step(x0, y, otf, 0.1, torch.tensor(True), iterations=80)
    torch.testing.assert_close(iterated, full, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("length", "multiple", "expected"), [(278, 2, 280), (278, 8, 280), (1046, 8, 1056), (7, 7, 7)])
def test_canvas_sides_have_small_prime_factors(length, multiple, expected):
    assert fast_length(length, multiple) == expected


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (5, 40)])
def test_an_extended_image_repeats_without_a_seam_and_is_its_own_middle(size):
    smooth = torch.outer(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]))[None]
    canvas = canvas_size(*size, margin=7, multiple=8)
    assert all(c % 8 == 0 and c >= s + 14 for c, s in zip(canvas, size, strict=True))
    wide = extend(smooth, *canvas)
    assert wide.shape == (1, *canvas) and torch.equal(middle(wide, *size), smooth)
    steps = [(wide - wide.roll(1, axis)).abs().max() for axis in (1, 2)]
    inside = max((smooth.diff(dim=axis)).abs().max() for axis in (1, 2))
    # without the margin the image would meet its other side with a step of 1
    assert max(steps) < max(0.35, 2 * inside)
    assert torch.equal(extend(smooth, *size), smooth)


@pytest.mark.parametrize(
    ("kernel", "match"),
    [
        (np.ones((3, 3)), "sums to 1"),
        (np.float32([[1.5, -0.5]]), "negative"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.ones(3) / 3, r"\(h, w\) or \(B, h, w\)"),
    ],
)
def test_an_invalid_kernel_array_is_refused(kernel, match):
    with pytest.raises(ValueError, match=match):
        check_kernel(kernel)


def step_edges(size=96):
    """Black and white quarters: edges of full height both ways."""
    x = np.zeros((size, size))
    x[: size // 2, size // 2 :] = x[size // 2 :, : size // 2] = 1
    return x


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_the_width_of_a_gaussian_blur_is_found_on_edges_of_full_height(sigma):
    """Where the height of the edges is known; radiographs are in docs/deblurring.md."""
    blurred = ndimage.gaussian_filter(step_edges(), sigma)
    result = estimate_blur(blurred, edge_height=1 / (2 * np.pi) ** 0.5)
    assert result.sigma == result.minor == pytest.approx(sigma, rel=0.25)
    assert estimate_blur(blurred * 40 + 3, edge_height=1 / (2 * np.pi) ** 0.5).sigma == pytest.approx(result.sigma)
    assert calibrate([step_edges()]) == pytest.approx(0.36, abs=0.06)


def test_the_direction_of_a_blur_is_found_and_none_is_made_up():
    edges = np.hypot(*np.mgrid[-48:48, -48:48]) < 30  # a disk has edges in all directions
    kernel = torch.from_numpy(gaussian_kernel(3, 1, 60))
    blurred = blur(torch.from_numpy(edges.astype(np.float32)), kernel).numpy()
    result = estimate_blur(blurred, edge_height=1 / (2 * np.pi) ** 0.5)
    assert result.angle == pytest.approx(60, abs=10) and result.sigma > 2 * result.minor
    check_kernel(estimate_kernel(blurred))
    round_one = estimate_blur(ndimage.gaussian_filter(edges.astype(float), 2))
    assert round_one.sigma == round_one.minor


def test_the_estimate_stays_within_what_it_can_tell():
    assert estimate_blur(step_edges(), 0.1).sigma == 0.3
    assert estimate_blur(np.zeros((16, 16))).sigma == 4.0
    with pytest.raises(ValueError, match="8 x 8"):
        estimate_blur(np.zeros((4, 4)))
