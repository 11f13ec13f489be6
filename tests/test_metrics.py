import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, roc_auc_score
from torchmetrics.functional import classification
from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torch_ssim

from cxr_diffusers.evaluation import metrics
from cxr_diffusers.evaluation.lazy import Lazy, stored
from cxr_diffusers.evaluation.metrics import (
    Ranking,
    SortedScores,
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
    measure_images,
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 1, 4, 300])
def test_one_sort_gives_the_metrics_of_scikit_learn(levels, dtype, rng):
    (anomaly_map,), (truth,) = images(rng, n=1, size=64, levels=levels)
    anomaly_map = anomaly_map.astype(dtype)
    ranked = SortedScores(anomaly_map, truth)
    flat = truth.ravel(), anomaly_map.ravel()
    assert ranked.average_precision() == pytest.approx(average_precision_score(*flat), abs=1e-12)
    assert ranked.auroc() == pytest.approx(roc_auc_score(*flat), abs=1e-12)
    for threshold in (0.3, float(anomaly_map[3, 4]), 2.0):
        mask = anomaly_map > threshold
        assert ranked.count_above(threshold) == ((mask & truth).sum(), mask.sum())
        assert ranked.dice(threshold) == pytest.approx(dice(mask, truth), abs=1e-12)
        assert ranked.iou(threshold) == pytest.approx(iou(mask, truth), abs=1e-12)
    assert ranked.hit() == truth[anomaly_map == anomaly_map.max()].mean()


@pytest.mark.parametrize("levels", [None, 4])
def test_metrics_agree_with_torchmetrics(levels, rng):
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
    """One threshold at a time, as the paper defines it."""
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
    # one of two regions at once; the other is marked together with the rest of the image, along the diagonal
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
    # scikit-image leaves out the rim that the window does not fit into; torchmetrics mirrors the image there
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
def test_an_undefined_metric_is_nan_and_not_0(value, rng):
    assert np.isnan(value(rng.random((8, 8)), np.zeros((8, 8), bool), np.ones((8, 8), bool)))


def test_shapes_that_differ_and_maps_that_are_not_finite_are_refused(rng):
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(4, 5\)"):
        pixel_average_precision(rng.random((4, 4)), np.ones((4, 5), bool))
    with pytest.raises(ValueError, match="finite"):
        hit(np.full((4, 4), np.nan), np.ones((4, 4), bool))


def test_a_box_covers_the_pixels_whose_centre_it_contains():
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
    lesion_map = lesion.astype(float)
    assert hit(lesion_map, box) == 1
    # a quarter of the box at once, the rest with the whole image
    assert pixel_average_precision(lesion_map, box) == pytest.approx(0.25 + 0.75 * share)
    assert pixel_average_precision(lesion_map, lesion) == 1
    # and a map of the box itself beats the map of the lesion, though it knows less
    assert pixel_average_precision(box.astype(float), box) == 1
    # a maximum beside the lesion but in the box is a hit as well
    assert hit(box_mask([[20, 20, 3, 3]], 64, 64).astype(float), box) == 1
    assert hit(box_mask([[30, 20, 3, 3]], 64, 64).astype(float), box) == 0


@pytest.mark.parametrize("box", [[1, 1, 0, 2], [1, 1, -3, 2], [9, 1, 2, 2], [1, 1, 2], [1, 1, np.nan, 2]])
def test_an_invalid_box_is_refused(box):
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
    assert exact.true_positives.shape[1] > 2 * 4096
    assert coarse.average_precision() == pytest.approx(exact.average_precision(), abs=1e-3)
    assert coarse.auroc() == pytest.approx(exact.auroc(), abs=1e-4)
    assert coarse.aupro() == pytest.approx(exact.aupro(), abs=1e-4)
    assert coarse.best_dice() == pytest.approx(exact.best_dice(), abs=1e-3)


@pytest.mark.parametrize("levels", [None, 7])
def test_replicates_are_those_of_scikit_learn_with_weights(levels, rng):
    maps, truths = images(rng, n=8, levels=levels)
    weights = patient_weights("aabcdefg", n=12, seed=1)
    values = Ranking(maps, truths, max_cuts=None).measure(weights)
    flat, true = np.stack(maps).ravel(), np.stack(truths).ravel()
    for row, ap, auroc in zip(weights, values["average_precision"], values["auroc"], strict=True):
        each = np.repeat(row, maps[0].size)
        assert ap == pytest.approx(average_precision_score(true, flat, sample_weight=each), abs=1e-12)
        assert auroc == pytest.approx(roc_auc_score(true, flat, sample_weight=each), abs=1e-12)


def test_metrics_of_a_subset_are_those_of_a_ranking_of_the_subset(rng):
    maps, truths = images(rng, n=8)
    weights, inside = patient_weights(range(8), n=9), np.arange(8) % 3 > 0
    subset = [[x for x, ok in zip(xs, inside, strict=True) if ok] for xs in (maps, truths)]
    part = Ranking(maps, truths, max_cuts=None).measure(weights, inside=inside)
    alone = Ranking(*subset, max_cuts=None).measure(weights[:, inside])
    for name, values in alone.items():
        assert part[name] == pytest.approx(values, abs=1e-6 if name == "aupro" else 1e-12, nan_ok=True), name


def test_float32_moves_aupro_by_less_than_1e_6(rng):
    truths = [ndimage.binary_dilation(rng.random((96, 96)) < 0.01) for _ in range(12)]
    maps = [rng.random((96, 96)) + 0.3 * t for t in truths]
    ranking, weights = Ranking(maps, truths, max_cuts=None), patient_weights(range(12), 20)
    assert ranking.true_positives.dtype == ranking.marked.dtype == np.uint32  # exact counts
    rounded = ranking.aupro(weights)
    positives = np.unique(np.concatenate([m[t] for m, t in zip(maps, truths, strict=True)]))[::-1]
    ranking.overlap = np.stack([SortedScores(m, t).mass_above(positives)[2] for m, t in zip(maps, truths, strict=True)])
    assert ranking.overlap.dtype == np.float64
    assert 0 < np.abs(rounded - ranking.aupro(weights)).max() < 1e-6


def test_a_pooled_ranking_has_the_same_curve_and_values(rng):
    ranking = Ranking(*images(rng))
    pooled = ranking.pooled()
    for curve, expected in zip(pooled.curve(), ranking.curve(), strict=True):
        assert (curve == expected).all()
    for name, value in ranking.measure().items():
        assert pooled.measure()[name] == pytest.approx(value, abs=1e-12), name
    assert pooled.true_positives.shape[0] == 1 and pooled.prevalence == ranking.prevalence


@pytest.mark.parametrize("levels", [None, 5])
def test_image_metrics_of_replicates_are_those_of_scikit_learn_with_weights(levels, rng):
    scores, labels = rng.random(40), rng.integers(0, 3, 40)
    scores = np.round(scores * levels) / levels if levels else scores
    weights = patient_weights(range(40), n=9)
    values = measure_images(scores, labels, weights)
    for row, ap, auroc in zip(weights, values["average_precision"], values["auroc"], strict=True):
        assert ap == pytest.approx(average_precision_score(labels != 0, scores, sample_weight=row), abs=1e-12)
        assert auroc == pytest.approx(roc_auc_score(labels != 0, scores, sample_weight=row), abs=1e-12)
    undefined = measure_images(scores, np.zeros(40), weights)
    assert np.isnan(undefined["auroc"]).all() and np.isnan(undefined["average_precision"]).all()


def test_cuts_are_chosen_from_every_second_value_where_there_are_too_many(rng, monkeypatch):
    maps, truths = images(rng, n=8, size=128)
    every = Ranking(maps, truths, max_cuts=1000).average_precision()
    monkeypatch.setattr(metrics, "MAX_VALUES", 3000)
    cuts = metrics.choose_cuts(maps, truths, 1000)
    assert len(cuts) == 1000 and np.isin(cuts, np.concatenate([m[t] for m, t in zip(maps, truths, strict=True)])).all()
    assert Ranking(maps, truths, max_cuts=1000).average_precision() == pytest.approx(every, abs=2e-3)


def test_stored_maps_are_computed_once_and_leave_no_file(tmp_path):
    computed = []

    def anomaly_map(i):
        computed.append(i)
        return np.full((2 + i, 3), i, np.float32)

    maps, shapes = Lazy(3, anomaly_map), [(2, 3), (3, 3), (4, 3)]
    with stored(maps, shapes, tmp_path) as own:
        for _ in range(2):
            assert [m.shape for m in own] == shapes and [m.mean() for m in own] == [0, 1, 2]
    assert computed == [0, 1, 2] and not list(tmp_path.iterdir())
    with stored(maps, shapes, None) as own:
        assert own is maps


def test_maps_are_read_one_at_a_time():
    def anomaly_map(i):
        return np.random.default_rng(i).random((256, 256), dtype=np.float32)

    truth = np.zeros((256, 256), bool)
    truth[5:15, 5:15] = True
    n, size = 60, truth.size * 4
    tracemalloc.start()
    Ranking(Lazy(n, anomaly_map), [truth] * n, max_cuts=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * size < n * size


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


def test_a_mean_leaves_out_undefined_values():
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
