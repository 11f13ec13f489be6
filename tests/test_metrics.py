import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, roc_auc_score
from torchmetrics.functional import classification
from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torch_ssim

from cxr_diffusers.evaluation.metrics import (
    Ranking,
    aupro,
    best_dice,
    bootstrap_interval,
    box_mask,
    dice,
    hit,
    hit_rate,
    image_auroc,
    image_average_precision,
    interval_of,
    iou,
    mean_of,
    paired_difference_interval,
    patient_weights,
    pixel_auroc,
    pixel_average_precision,
    psnr,
    ssim,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def images(rng, n=6, size=20, levels=None, signal=0.5):
    """n maps and true masks; the map is higher inside the mask. `levels`: round to so many values, to have ties."""
    truths = [rng.random((size, size)) < 0.1 for _ in range(n)]
    maps = [rng.random((size, size)) + signal * t * rng.random() for t in truths]
    return [np.round(m * levels) / levels if levels else m for m in maps], truths


RANKED = {
    "pixel_average_precision": pixel_average_precision,
    "pixel_auroc": pixel_auroc,
    "aupro": aupro,
    "best_dice": lambda m, t: best_dice(m, t)[0],
    "hit": hit,
}


@pytest.mark.parametrize("metric", RANKED.values(), ids=RANKED)
def test_a_perfect_map_scores_1(metric, rng):
    truth = rng.random((32, 32)) < 0.1
    assert metric(truth.astype(float), truth) == pytest.approx(1)


@pytest.mark.parametrize("metric", [pixel_auroc, aupro, hit])
def test_an_inverted_map_scores_0(metric, rng):
    truth = rng.random((32, 32)) < 0.1
    assert metric(1.0 - truth, truth) == pytest.approx(0, abs=1e-12)


def test_an_inverted_map_has_the_lowest_average_precision_there_is():
    truth = np.zeros((10, 10), bool)
    truth[0] = True
    ranks = 1 - (truth + 0.001 * np.arange(100).reshape(10, 10))
    assert pixel_average_precision(ranks, truth) == pytest.approx(np.mean([k / (90 + k) for k in range(1, 11)]))


def test_a_random_map_scores_the_prevalence(rng):
    truth = rng.random((400, 400)) < 0.1
    noise = rng.random(truth.shape)
    assert pixel_average_precision(noise, truth) == pytest.approx(0.1, abs=0.01)
    assert pixel_auroc(noise, truth) == pytest.approx(0.5, abs=0.01)
    assert aupro(noise, truth) == pytest.approx(0.15, abs=0.02)  # the diagonal's area up to 0.3, divided by 0.3


def test_a_constant_map_scores_the_prevalence_exactly():
    truth = np.zeros((10, 10), bool)
    truth[:2] = True
    flat = np.full((10, 10), 0.3)
    assert pixel_average_precision(flat, truth) == pytest.approx(0.2)
    assert hit(flat, truth) == pytest.approx(0.2)
    assert pixel_auroc(flat, truth) == pytest.approx(0.5)
    assert best_dice(flat, truth)[0] == pytest.approx(2 * 0.2 / 1.2)


def test_lists_of_images_are_pooled_whatever_their_sizes(rng):
    maps = [rng.random((8, 9)), rng.random((5, 5))]
    truths = [rng.random((8, 9)) < 0.3, rng.random((5, 5)) < 0.3]
    flat, true = np.concatenate([m.ravel() for m in maps]), np.concatenate([t.ravel() for t in truths])
    assert pixel_average_precision(maps, truths) == pytest.approx(average_precision_score(true, flat), abs=1e-12)
    assert pixel_auroc(maps, truths) == pytest.approx(roc_auc_score(true, flat), abs=1e-12)


def test_image_metrics_take_any_label_but_0_as_abnormal():
    assert image_auroc([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 2]) == 1
    assert image_average_precision([0.4, 0.1, 0.3], [0, 0, 2]) == pytest.approx(0.5)


def test_dice_and_iou_agree_with_scikit_learn_and_with_each_other(rng):
    mask, truth = rng.random((20, 20)) < 0.4, rng.random((20, 20)) < 0.3
    j = jaccard_score(truth.ravel(), mask.ravel())
    assert iou(mask, truth) == pytest.approx(j)
    assert dice(mask, truth) == pytest.approx(2 * j / (1 + j))
    assert dice(mask, truth) == pytest.approx(f1_score(truth.ravel(), mask.ravel()))


@pytest.mark.parametrize("levels", [None, 4])
def test_torchmetrics_finds_the_same_numbers(levels, rng):
    maps, truths = images(rng, levels=levels)
    flat, true = torch.tensor(np.stack(maps)).float(), torch.tensor(np.stack(truths)).int()
    marked = flat > 0.7
    pooled = [(m > np.float32(0.7)).ravel() for m in flat.numpy()], [t.ravel() for t in truths]
    ranking = Ranking(list(flat.numpy()), truths, max_cuts=None)
    for ours, theirs in (
        (pixel_average_precision(list(flat.numpy()), truths), classification.binary_average_precision(flat, true)),
        (ranking.average_precision(), classification.binary_average_precision(flat, true)),
        (ranking.auroc(), classification.binary_auroc(flat, true)),
        (dice(*map(np.concatenate, pooled)), classification.binary_f1_score(marked.int(), true)),
        (iou(*map(np.concatenate, pooled)), classification.binary_jaccard_index(marked.int(), true)),
    ):
        assert ours == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.parametrize("levels", [None, 5])
def test_best_dice_is_the_best_of_all_thresholds(levels, rng):
    maps, truths = images(rng, levels=levels)
    pooled = np.stack(maps), np.stack(truths)
    value, threshold = best_dice(maps, truths)
    assert value == pytest.approx(max(dice(pooled[0] >= t, pooled[1]) for t in np.unique(pooled[0])))
    assert dice(pooled[0] >= threshold, pooled[1]) == pytest.approx(value)


def test_hit_rate_is_the_share_of_maxima_inside_the_region():
    truth = np.zeros((4, 4), bool)
    truth[1, 2] = True
    inside, outside = np.zeros((2, 4, 4))
    inside[1, 2], outside[3, 3] = 1, 1
    assert hit_rate([inside, outside, inside, inside], [truth] * 4) == 0.75
    assert hit_rate([inside, inside], [truth, np.zeros((4, 4), bool)]) == 1  # nothing to hit: left out


def brute_force_aupro(maps, truths, limit):
    """One threshold at a time, as the paper says it."""
    false_rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        false = sum((m >= threshold)[~t].sum() for m, t in zip(maps, truths, strict=True))
        shares = []
        for m, t in zip(maps, truths, strict=True):
            regions, n = ndimage.label(t, structure=np.ones((3, 3)))
            shares += [(m >= threshold)[regions == k].mean() for k in range(1, n + 1)]
        false_rates.append(false / sum((~t).sum() for t in truths))
        overlaps.append(np.mean(shares))
    x = np.unique(np.append(np.linspace(0, limit, 20001), [f for f in false_rates if f <= limit]))
    return np.trapezoid(np.interp(x, false_rates, overlaps), x) / limit


@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_aupro_is_the_area_under_the_overlap_curve(limit, rng):
    truths = [ndimage.binary_dilation(rng.random((16, 16)) < 0.02) for _ in range(3)]
    maps = [rng.random((16, 16)) + 0.5 * t for t in truths]
    assert aupro(maps, truths, limit) == pytest.approx(brute_force_aupro(maps, truths, limit), abs=1e-3)


def test_aupro_counts_regions_and_not_pixels():
    truth = np.zeros((40, 40), bool)
    truth[:10, :10] = truth[30, 30] = True
    large, small = np.zeros((2, 40, 40))
    large[:10, :10], small[30, 30] = 1, 1
    # one region of two at once; the other comes with the rest of the picture, along the diagonal
    assert aupro(large, truth) == pytest.approx(0.5 + 0.5 * 0.15)
    assert aupro(small, truth) == pytest.approx(0.5 + 0.5 * 0.15)


def test_image_similarities_are_those_of_scikit_image(rng):
    a, b = rng.random((2, 32, 32))
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
    expected = structural_similarity(a, b, data_range=1, gaussian_weights=True, use_sample_covariance=False)
    assert ssim(a, b) == pytest.approx(expected)
    tensors = [torch.tensor(x)[None, None] for x in (a, b)]
    assert psnr(a, b) == pytest.approx(torch_psnr(*tensors, data_range=1.0).item())
    _, local = torch_ssim(*tensors, data_range=1.0, sigma=1.5, return_full_image=True)
    # scikit-image, and so we, leave the rim out, over which the window reaches; torchmetrics mirrors the picture there
    assert ssim(a, b) == pytest.approx(local[..., 5:-5, 5:-5].mean().item(), abs=1e-6)
    assert ssim(a, a) == 1 and psnr(a, a) == float("inf")


def test_similarity_outside_a_region_ignores_the_region(rng):
    a = rng.random((40, 40))
    outside = np.zeros((40, 40), bool)
    outside[10:20, 10:20] = True
    changed = np.where(outside, 1 - a, a)
    assert ssim(a, changed) < 0.99 and psnr(a, changed) < 40
    assert ssim(a, changed, outside=outside) == pytest.approx(1) and psnr(a, changed, outside=outside) == float("inf")
    assert np.isnan(ssim(a, a, outside=np.ones((40, 40), bool))) and np.isnan(
        psnr(a, a, outside=np.ones((40, 40), bool))
    )


@pytest.mark.parametrize(
    "value",
    [
        lambda x, none, all_: pixel_average_precision(x, none),
        lambda x, none, all_: pixel_auroc(x, none),
        lambda x, none, all_: pixel_auroc(x, all_),
        lambda x, none, all_: best_dice(x, none)[0],
        lambda x, none, all_: dice(x > 0.5, none),
        lambda x, none, all_: iou(none, none),
        lambda x, none, all_: hit(x, none),
        lambda x, none, all_: hit_rate([x], [none]),
        lambda x, none, all_: aupro(x, none),
        lambda x, none, all_: aupro(x, all_),
        lambda x, none, all_: image_auroc([0.1, 0.2], [0, 0]),
        lambda x, none, all_: image_average_precision([0.1, 0.2], [0, 0]),
        lambda x, none, all_: Ranking([x], [none]).average_precision(),
        lambda x, none, all_: Ranking([x], [none]).best_dice(),
        lambda x, none, all_: Ranking([x], [all_]).auroc(),
    ],
)
def test_what_is_not_defined_is_nan_and_not_0(value, rng):
    assert np.isnan(value(rng.random((8, 8)), np.zeros((8, 8), bool), np.ones((8, 8), bool)))


def test_shapes_that_differ_and_maps_that_are_not_finite_are_refused(rng):
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(4, 5\)"):
        pixel_average_precision(rng.random((4, 4)), np.ones((4, 5), bool))
    with pytest.raises(ValueError, match="finite"):
        hit(np.full((4, 4), np.nan), np.ones((4, 4), bool))


def test_a_box_covers_the_pixels_whose_centre_it_holds():
    mask = box_mask([[1, 2, 3, 1]], height=5, width=6)
    assert mask[2, 1:4].all() and mask.sum() == 3
    assert box_mask([[0.4, 0.4, 1.2, 1.2]], 4, 4).sum() == 4  # centres at 0.5 and 1.5
    assert box_mask([[1.6, 1.6, 0.2, 0.2]], 4, 4)[1, 1] and box_mask([[1.6, 1.6, 0.2, 0.2]], 4, 4).sum() == 1
    assert box_mask([[1.7, 1.7, 0.4, 0.4]], 4, 4)[1, 1] and box_mask([[1.7, 1.7, 0.4, 0.4]], 4, 4).sum() == 1
    assert box_mask([[-2, -2, 4, 4], [3, 3, 9, 9]], 4, 4).sum() == 5
    assert not box_mask([], 4, 4).any()


def test_a_box_is_not_the_lesion_in_it():
    """The map is the lesion, exactly; against a box of four times its size it is not perfect, and cannot be."""
    box, lesion = box_mask([[8, 8, 16, 16]], 64, 64), box_mask([[8, 8, 8, 8]], 64, 64)
    share = box.mean()
    found = lesion.astype(float)
    assert hit(found, box) == 1
    # a quarter of the box at once, the rest with the whole picture
    assert pixel_average_precision(found, box) == pytest.approx(0.25 + 0.75 * share)
    assert pixel_average_precision(found, lesion) == 1
    # and a map of the box itself beats the map of the lesion, though it knows less
    assert pixel_average_precision(box.astype(float), box) == 1
    # what lies beside the lesion but in the box is a hit as well
    assert hit(box_mask([[20, 20, 3, 3]], 64, 64).astype(float), box) == 1
    assert hit(box_mask([[30, 20, 3, 3]], 64, 64).astype(float), box) == 0


@pytest.mark.parametrize("box", [[1, 1, 0, 2], [1, 1, -3, 2], [9, 1, 2, 2], [1, 1, 2], [1, 1, np.nan, 2]])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError, match="expected a box"):
        box_mask([box], 4, 4)


@pytest.mark.parametrize("levels", [None, 7])
def test_weighing_an_image_twice_is_having_it_twice(levels, rng):
    maps, truths = images(rng, levels=levels)
    ranking = Ranking(maps, truths, max_cuts=None)
    weights = np.array([[2, 0, 1, 3, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 5, 0]])
    for row, ap, auroc, pro, best in zip(
        weights,
        ranking.average_precision(weights),
        ranking.auroc(weights),
        ranking.aupro(weights),
        ranking.best_dice(weights),
        strict=True,
    ):
        repeated = [m for m, w in zip(maps, row, strict=True) for _ in range(w)]
        true = [t for t, w in zip(truths, row, strict=True) for _ in range(w)]
        flat, flat_true = np.stack(repeated).ravel(), np.stack(true).ravel()
        assert ap == pytest.approx(average_precision_score(flat_true, flat), abs=1e-12)
        assert auroc == pytest.approx(roc_auc_score(flat_true, flat), abs=1e-12)
        assert pro == pytest.approx(aupro(repeated, true), abs=1e-12)
        assert best == pytest.approx(best_dice(repeated, true)[0], abs=1e-12)


def test_fewer_cuts_are_close_enough(rng):
    maps, truths = images(rng, n=8, size=128)
    coarse, exact = Ranking(maps, truths, max_cuts=4096), Ranking(maps, truths, max_cuts=None)
    assert exact.found.shape[1] > 2 * 4096
    assert coarse.average_precision() == pytest.approx(exact.average_precision(), abs=1e-3)
    assert coarse.auroc() == pytest.approx(exact.auroc(), abs=1e-4)
    assert coarse.aupro() == pytest.approx(exact.aupro(), abs=1e-4)
    assert coarse.best_dice() == pytest.approx(exact.best_dice(), abs=1e-3)


def test_patients_are_drawn_and_their_images_come_along():
    weights = patient_weights(["a", "b", "a", "c"], n=50, seed=1)
    assert weights.shape == (50, 4) and (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 1


def test_the_interval_of_a_mean_is_that_of_the_textbook(rng):
    values = rng.normal(size=400)
    value, low, high, undefined = bootstrap_interval(mean_of(values), np.arange(400), n=2000)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean()) and undefined == 0
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)


def test_images_of_one_patient_are_not_counted_as_independent(rng):
    values = np.repeat(rng.normal(size=50), 8)
    by_image = bootstrap_interval(mean_of(values), np.arange(400))
    by_patient = bootstrap_interval(mean_of(values), np.arange(400) // 8)
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)


def test_the_interval_covers_as_often_as_it_says(rng):
    covered = 0
    for seed in range(200):
        patients = rng.normal(size=30)
        images = np.repeat(patients, 2) + 0.1 * rng.normal(size=60)
        interval = bootstrap_interval(mean_of(images), np.arange(60) // 2, n=400, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_holds_its_value_and_is_the_same_again(rng):
    maps, truths = images(rng)
    ranking = Ranking(maps, truths)
    interval = bootstrap_interval(ranking.average_precision, "aabbcd", n=200, seed=3)
    assert interval.low < interval.value < interval.high
    assert interval == bootstrap_interval(ranking.average_precision, list("aabbcd"), n=200, seed=3)


def test_a_paired_difference_is_sharper_than_two_intervals(rng):
    difficulty = rng.random(60)
    a, b = mean_of(difficulty + 0.05), mean_of(difficulty + 0.01 * rng.random(60))
    single, difference = bootstrap_interval(a, np.arange(60)), paired_difference_interval(a, b, np.arange(60))
    assert difference.low > 0 and difference.value == pytest.approx(0.045, abs=0.002)
    assert difference.high - difference.low < 0.1 * (single.high - single.low)
    assert paired_difference_interval(a, a, np.arange(60))[:3] == (0, 0, 0)


def test_replicates_without_a_value_are_counted(rng):
    truths = [np.zeros((6, 6), bool), np.zeros((6, 6), bool), rng.random((6, 6)) < 0.5]
    interval = bootstrap_interval(Ranking([rng.random((6, 6))] * 3, truths).average_precision, [0, 1, 2], n=1000)
    assert interval.undefined == pytest.approx(1000 * (2 / 3) ** 3, abs=60)  # the third image is not drawn
    assert np.isfinite(interval[:3]).all()


def test_one_patient_has_no_interval():
    value, low, high, _ = bootstrap_interval(mean_of([0.2, 0.4]), ["a", "a"])
    assert value == pytest.approx(0.3) and np.isnan(low) and np.isnan(high)


def test_a_mean_leaves_out_what_is_not_defined():
    assert mean_of([1, np.nan, 3])(np.array([[1, 1, 1], [0, 1, 0], [3, 5, 1]])) == pytest.approx(
        [2, np.nan, 1.5], nan_ok=True
    )


def test_a_thousand_replicates_of_47_images_take_seconds(rng):
    from time import process_time

    maps, truths = images(rng, n=47, size=64)
    start = process_time()
    ranking = Ranking(maps, truths)
    interval_of(ranking.average_precision, patient_weights(np.arange(47), 1000))
    assert process_time() - start < 10
