"""How good the counterfactuals are: believed healthy, near to healthy pictures, and unchanged elsewhere."""

import numpy as np

from . import metrics
from .controls import BLURRED, ITSELF, SPLIT
from .feature_distances import frechet_distance, kernel_distance_of
from .judge import HEALTHY, is_its_own_judge, look
from .lazy import Lazy
from .masks import smooth_map

KEPT = ("psnr_outside", "ssim_outside")
BLUR = 0.05  # sigma, of the side: what is gone with it is the evidence, not the disease
SPLITS = 20  # halves of one set differ by chance: a mean over several


def counterfactual_level(methods, rows, healthy_rows, per_image, *, judge=None, n_bootstrap, seed, progress=False):
    """The section "counterfactuals" of summary.json.

        psnr_outside, ssim_outside   of counterfactual and picture, outside the true region, over the pictures with one
        flip_rate                    of the diseased pictures that the judge calls diseased (its most probable class is
                                     not 0), the share whose counterfactual it calls healthy
        p_healthy_moved              probability of class 0, counterfactual - picture: mean over the diseased pictures
        p_healthy_moved_healthy      likewise over the healthy pictures, where it should not move
        kid, fid                     of the diseased pictures' counterfactuals to the healthy pictures, over the judge's
                                     features

    Diseased are the pictures of the data set with a label other than 0, or with a region where no label is known;
    healthy are those of label 0 or, if the data set has none, `healthy_rows`.

    Args:
        methods: `Method`s with their answers.
        rows, healthy_rows: what `describe` says of the data set and of the healthy pictures.
        per_image: the table of all methods; with a judge it gains p_healthy, p_healthy_counterfactual and flipped.
        judge: see `judge.open_judge`; None: only what was kept outside the true region.

    Returns:
        a dict with `rows` {name: {number: {value, low, high, undefined}}}, `not_measured` {method: why} and, with a
        judge, its classes, how many pictures of each kind there are and it calls diseased, and its own AUROC on them.
    """
    everything = [*rows, *healthy_rows]
    weights = metrics.patient_weights([row["group"] for row in everything], n_bootstrap, seed)
    section = {"rows": {}, "not_measured": {}}
    judged = {}
    for method in methods:
        answers = joined(method.answers, method.healthy_answers)
        if unchanged(answers):
            section["not_measured"][method.name] = "it has no counterfactual"
            continue
        section["rows"][method.name] = kept(per_image[per_image.method == method.name], rows, weights)
        if judge is not None and is_its_own_judge(method.pipeline, judge):
            section["not_measured"][method.name] = "the judge is its own classifier"
        elif judge is not None:
            judged[method.name] = answers
    if not judged:
        return section
    return {**section, **judge_all(judged, section["rows"], everything, len(rows), per_image, judge, weights, progress)}


def joined(first, second):
    """Two sequences as one, none of it in memory."""
    return Lazy(len(first) + len(second), lambda i: first[i] if i < len(first) else second[i - len(first)])


def pictures_of(answers, key):
    return Lazy(len(answers), lambda i: answers[i][key].astype(np.float32))


def unchanged(answers):
    """Whether every counterfactual is the picture itself, as that of a method that makes none."""
    return all(np.array_equal(answer["image"], answer["counterfactual"]) for answer in answers)


def kept(table, rows, weights):
    """The means of PSNR and SSIM outside the true region, over the pictures that have one."""
    table = table[table.part == "dataset"]
    has_region = np.array([row["truth"] is not None and bool(row["truth"].any()) for row in rows])
    found = {}
    for name in KEPT:
        values = np.where(has_region, table[name].to_numpy(np.float64), np.nan)
        found[name] = interval(metrics.mean_of(values), weights[:, : len(rows)])
    return found


def judge_all(judged, found, rows, n_dataset, per_image, judge, weights, progress):
    """The judge's part of the section; its numbers are added to `found` and to `per_image`."""
    diseased, healthy = kinds(rows, n_dataset)
    groups = [row["group"] for row in rows]
    section = {
        "classes": getattr(judge, "class_names", []),
        "n_diseased": int(diseased.sum()),
        "n_healthy": int(healthy.sum()),
        "n_called_diseased": {},
        "judge_auroc": {},
    }
    for column in ("p_healthy", "p_healthy_counterfactual", "flipped"):
        per_image[column] = np.nan
    for position, (name, answers) in enumerate(judged.items()):
        pictures = pictures_of(answers, "image")
        before = look(judge, pictures, progress=progress, desc=f"judge, {name}")
        versions = {name: pictures_of(answers, "counterfactual")}
        if position == 0:  # of the first method's pictures, as all controls are
            versions |= {ITSELF: None, BLURRED: blurred(pictures)}
        for version, changed in versions.items():
            after = before if changed is None else look(judge, changed, pictures, progress=progress, desc=version)
            numbers = compare_calls(before, after, diseased, healthy, groups, weights)
            found.setdefault(version, {}).update(numbers["intervals"])
            if version == name:
                lines = per_image.index[per_image.method == name]
                per_image.loc[lines, "p_healthy"] = before[0][:, HEALTHY]
                per_image.loc[lines, "p_healthy_counterfactual"] = after[0][:, HEALTHY]
                per_image.loc[lines, "flipped"] = numbers["flipped"]
        if position == 0 and healthy.any():
            found[SPLIT] = split_in_two(before[1][healthy], [g for g, h in zip(groups, healthy, strict=True) if h])
        section["n_called_diseased"][name] = int((diseased & (before[0].argmax(1) != HEALTHY)).sum())
        section["judge_auroc"][name] = own_auroc(before[0], diseased, healthy)
    order = [*judged, *(name for name in found if name not in judged)]
    section["rows"] = {name: found[name] for name in order}
    return section


def blurred(pictures):
    return Lazy(len(pictures), lambda i: smooth_map(pictures[i], BLUR * min(pictures[i].shape)))


def kinds(rows, n_dataset):
    """Two (N,) masks: diseased pictures of the data set; its healthy ones or, without any, the healthy pictures."""
    in_dataset = np.arange(len(rows)) < n_dataset
    label = np.array([-1 if row["label"] is None else row["label"] for row in rows])
    marked = np.array([row["truth"] is not None and bool(row["truth"].any()) for row in rows])
    diseased = in_dataset & ((label > 0) | ((label == -1) & marked))
    own = in_dataset & (label == 0)
    return diseased, own if own.any() else ~in_dataset


def compare_calls(before, after, diseased, healthy, groups, weights):
    """What the judge said of the pictures and of their counterfactuals -> intervals, and (N,) flipped or NaN."""
    called = before[0].argmax(1) != HEALTHY
    flipped = np.where(called, after[0].argmax(1) == HEALTHY, np.nan)
    moved = after[0][:, HEALTHY] - before[0][:, HEALTHY]
    both = np.concatenate([after[1][diseased], before[1][healthy]])
    chosen = np.concatenate([np.flatnonzero(diseased), np.flatnonzero(healthy)])
    side = np.arange(len(chosen)) < diseased.sum()
    found = {
        "flip_rate": interval(metrics.mean_of(np.where(diseased, flipped, np.nan)), weights),
        "p_healthy_moved": interval(metrics.mean_of(np.where(diseased, moved, np.nan)), weights),
        "p_healthy_moved_healthy": interval(metrics.mean_of(np.where(healthy, moved, np.nan)), weights),
    }
    if side.any() and not side.all():
        distance = kernel_distance_of(both, side, ~side, [groups[i] for i in chosen])
        found["kid"] = interval(distance, weights[:, chosen])
        found["fid"] = plain_value(frechet_distance(both[side], both[~side]))
    return {"intervals": found, "flipped": np.where(diseased, flipped, np.nan)}


def split_in_two(features, groups):
    """Healthy against healthy: mean distances of random halves, split by patient. What no method can do better than."""
    patients, member = np.unique(groups, return_inverse=True)
    kids, fids = [], []
    for seed in range(SPLITS):
        first = np.random.default_rng(seed).permutation(len(patients)) < len(patients) // 2
        half = first[member]
        statistic = kernel_distance_of(features, half, ~half, groups)
        kids.append(statistic(np.ones((1, len(groups))))[0])
        fids.append(frechet_distance(features[half], features[~half]))
    return {"kid": plain_value(np.mean(kids)), "fid": plain_value(np.mean(fids))}


def own_auroc(probabilities, diseased, healthy):
    """Does the judge tell these pictures apart at all?"""
    known = diseased | healthy
    return metrics.image_auroc(1 - probabilities[known, HEALTHY], diseased[known])


def interval(statistic, weights):
    return metrics.interval_of(statistic, weights)._asdict()


def plain_value(value):
    """Without an interval: the FID of a bootstrap replicate, which has fewer pictures, is biased further."""
    return metrics.Interval(float(value), float("nan"), float("nan"), 0)._asdict()
