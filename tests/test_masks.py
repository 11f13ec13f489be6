import numpy as np
import pytest
from scipy import ndimage

from cxr_diffusers.evaluation.masks import drop_small, healthy_threshold, pixel_quantiles, smooth_map, threshold_map


@pytest.fixture
def anomaly_map():
    return ndimage.gaussian_filter(np.random.default_rng(0).random((64, 64)), 2)


@pytest.mark.parametrize("sigma", [0, 1.5])
@pytest.mark.parametrize("min_area", [0, 30])
def test_a_higher_threshold_never_adds_a_pixel(anomaly_map, sigma, min_area):
    masks = [threshold_map(anomaly_map, t, sigma, min_area) for t in np.quantile(anomaly_map, [0.5, 0.7, 0.9, 0.99])]
    assert masks[0].any()
    for lower, higher in zip(masks, masks[1:], strict=False):
        assert not (higher & ~lower).any() and higher.sum() < lower.sum()


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_a_map_of_zeros_has_an_empty_mask(threshold):
    assert not threshold_map(np.zeros((16, 16)), threshold, sigma=2, min_area=3).any()


def test_a_threshold_of_the_maximum_leaves_nothing(anomaly_map):
    assert not threshold_map(anomaly_map, anomaly_map.max()).any()


def test_the_maximum_is_the_last_pixel_to_be_marked(anomaly_map):
    mask = threshold_map(anomaly_map, np.sort(anomaly_map.ravel())[-2])
    assert mask.sum() == 1 and mask.ravel()[anomaly_map.argmax()]


def test_components_under_the_area_are_removed_and_no_other():
    mask = np.zeros((20, 20), bool)
    mask[2:5, 2:5] = True  # 9 pixels
    mask[10, 10] = mask[11, 11] = True  # 2, touching at a corner
    assert drop_small(mask, 2).sum() == 11
    assert drop_small(mask, 3).sum() == 9 and drop_small(mask, 9).sum() == 9
    assert not drop_small(mask, 10).any()


def test_smoothing_preserves_the_sum_and_treats_each_map_alone():
    maps = np.zeros((2, 41, 41), np.float32)
    maps[0, 20, 20] = 1
    smooth = smooth_map(maps, 2)
    assert smooth[0].sum() == pytest.approx(1, abs=1e-4) and smooth[0].max() < 0.05 and not smooth[1].any()
    assert smooth_map(maps, 0) is maps


def test_the_healthy_threshold_marks_the_chosen_share_of_healthy_pixels(anomaly_map):
    healthy = [anomaly_map, anomaly_map[:30] * 1.1]
    threshold = healthy_threshold(healthy, quantile=0.95)
    marked = sum(threshold_map(m, threshold).sum() for m in healthy)
    assert marked / sum(m.size for m in healthy) == pytest.approx(0.05, abs=0.001)


def test_the_healthy_threshold_does_not_depend_on_the_test_image(anomaly_map):
    # nearly all of another healthy image is below it; Otsu's threshold or min-max would split it in two
    threshold = healthy_threshold(anomaly_map[None], quantile=0.99)
    assert threshold_map(np.roll(anomaly_map, 7, axis=0), threshold).mean() == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(size=(50, 40)),
        lambda rng: np.round(rng.random((30, 31)), 1),  # ties
        lambda rng: rng.random((20, 20)) * 1e-3 - 5e-4,
        lambda rng: np.where(rng.random((9, 9)) < 0.9, 0.0, -0.0),
    ],
)
def test_quantiles_of_maps_read_one_by_one_are_those_of_all_their_pixels(draw):
    maps = [draw(np.random.default_rng(i)).astype(np.float32) for i in range(5)] + [np.full((3, 3), 0.25, np.float32)]
    quantiles = [0.5, 0, 0.013, 0.95, 0.951, 0.999, 1]  # in any order
    expected = np.quantile(np.concatenate([m.ravel() for m in maps]).astype(np.float64), quantiles)
    assert pixel_quantiles(maps, quantiles) == pytest.approx(expected.tolist(), abs=1e-15)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: healthy_threshold([]), "at least one healthy image"),
        (lambda: healthy_threshold([np.zeros((4, 4))], quantile=99), "between 0 and 1, got 99"),
        (lambda: healthy_threshold([np.full((4, 4), np.nan)]), "finite"),
        (lambda: threshold_map(np.zeros((1, 4, 4)), 0.5), r"\(H, W\) map, got shape \(1, 4, 4\)"),
        (lambda: threshold_map(np.zeros((4, 4)), float("nan")), "got nan"),
        (lambda: smooth_map(np.zeros((4, 4)), -1), "0 or more, got -1"),
        (lambda: drop_small(np.zeros((4, 4), bool), -1), "0 or more, got -1"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
