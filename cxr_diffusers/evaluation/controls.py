"""Maps that do not know the answer: what a method has to beat. All are (H, W) of the picture."""

import numpy as np
import torch
from PIL import Image

from ..pipelines.cxr_anomaly import score_map
from .answers import soften
from .lazy import Lazy
from .masks import smooth_map

CHANCE, RANDOM, CENTRE = "chance", "random map", "centre prior"
OTHERS_TRUTH, EDGES, MEAN = "others' truth", "|x - blurred x|", "mean map"
# of the counterfactuals
ITSELF, BLURRED, SPLIT = "the picture itself", "the picture, blurred", "healthy, split in two"
GRID = 256  # side of the frame in which pictures of different sizes are averaged


def controls(methods, rows, edges, seed, smoothing):
    """{name: maps} of every control; see `evaluate`.

    Args:
        methods: {name: maps} of the methods.
        rows: what `describe` says of the same images, all with a true region.
        edges: their `edge_maps`.
    """
    others = truth_of_others(rows)
    found = {
        CHANCE: in_every(rows, always(np.zeros((GRID, GRID), np.float32))),
        RANDOM: Lazy(len(rows), lambda i: noise(rows[i], [seed, i], smoothing)),
        CENTRE: in_every(rows, always(centre_prior())),
    }
    for name, maps in methods.items():
        found[mean_map_of(name, methods)] = in_every(rows, always(mean_map(maps)))
    found[OTHERS_TRUTH] = in_every(rows, lambda i: others(rows[i]["group"]))
    found[EDGES] = edges
    return found


def is_control(name):
    taken = (CHANCE, RANDOM, CENTRE, OTHERS_TRUTH, EDGES, ITSELF, BLURRED, SPLIT)
    return name in taken or name.startswith(MEAN)


def mean_map_of(name, methods):
    """What the mean map of a method is called."""
    return MEAN if len(methods) == 1 else f"{MEAN} of {name}"


def in_every(rows, in_frame):
    """The map `in_frame(i)` of the common frame, in each picture's own size."""
    return Lazy(len(rows), lambda i: resample(in_frame(i), rows[i]["height"], rows[i]["width"]))


def always(in_frame):
    return lambda i: in_frame


def noise(row, seed, smoothing):
    return soften(np.random.default_rng(seed).random((row["height"], row["width"]), dtype=np.float32), smoothing)


def centre_prior():
    """A Gaussian in the middle of the frame, sigma a quarter of each side."""
    x = np.linspace(-2, 2, GRID, dtype=np.float32) ** 2  # in sigmas
    return np.exp(-(x[:, None] + x) / 2)


def mean_map(maps):
    return sum((resample(m, GRID, GRID) for m in maps), np.zeros((GRID, GRID), np.float32)) / max(len(maps), 1)


def truth_of_others(rows):
    """`function(group)`: the mean true region of all other patients' images, smoothed; 0 if there are none."""
    sums, counts = {}, {}
    for row in rows:
        truth = resample(row["truth"].astype(np.float32), GRID, GRID)
        sums[row["group"]] = sums.get(row["group"], 0) + truth
        counts[row["group"]] = counts.get(row["group"], 0) + 1
    total = sum(sums.values(), np.zeros((GRID, GRID), np.float32))
    # smoothed by 4 % of the side: few lesions make a patchy prior, and a patchy one is too easy to beat
    return lambda group: smooth_map((total - sums[group]) / max(len(rows) - counts[group], 1), 0.04 * GRID)


def edge_maps(dataset, smoothing):
    """|x - blurred x| of each picture: what a map scores by finding detail, without a model."""

    def edges(i):
        image = dataset[i]["image"]
        if isinstance(image, np.ndarray):  # of several channels, all of one weight
            picture = image.mean(axis=-1, dtype=np.float32)
        else:
            picture = np.asarray(image.convert("F" if image.mode[0] in "IF" else "L"), np.float32)
        picture = (picture - picture.min()) / max(np.ptp(picture), 1e-12)
        return soften(np.abs(picture - smooth_map(picture, 0.05 * min(picture.shape))), smoothing)

    return Lazy(len(dataset), edges)


def resample(array, height, width):
    """(h, w) float32 -> (height, width) float32: bilinear, averaging where it shrinks."""
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def picture_score(anomaly_map):
    """A picture's score by the pipelines' own rule, for a map without a pipeline."""
    return float(score_map(torch.from_numpy(anomaly_map)[None])[0])
