"""Controls that a method has to beat: maps made without knowing the disease.

Each has the size at which its image is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.cxr_anomaly import score_map
from .grid import measured_size
from .lazy import Lazy
from .masks import smooth_map
from .predictions import smooth_by_side
from .truth import Row

CHANCE, RANDOM, CENTRE = "chance", "random map", "centre prior"
LOCATION, EDGES, MEAN = "location prior", "|x - blurred x|", "mean map"
GATE, BRIGHTNESS, MIRROR = "lung gate", "brightness x gate", "mirror x gate"
GATED = " x gate"  # ends the name of a control that is multiplied by the lung gate
# controls of the counterfactuals; the names are keys of summary.json
UNCHANGED, BLURRED, SPLIT = "the input itself", "the input, blurred", "healthy, split in two"
GRID = 256  # side of the frame in which maps of images of different sizes are averaged
SIGMA = 2 / 64  # of the Gaussian over brightness and mirror difference, as a fraction of the shorter side
EDGE_SIGMA = 0.05  # of the blurred image of `EDGES`, likewise
LOCATION_SIGMA = 0.04  # of the side: few lesions make a patchy prior, which is too easy to beat

Maps = Lazy[np.ndarray]


def controls(
    methods: Mapping[str, Maps],
    rows: Sequence[Row],
    image_maps: Mapping[str, Maps],
    gates: np.ndarray | None,
    seed: int,
    smoothing: float,
) -> dict[str, Maps]:
    """{name: maps} of every control; see `compare`.

    Args:
        methods: {name: maps} of the methods.
        rows: of the same images, all with a true region.
        image_maps: {name: maps} of their `image_controls`.
        gates: their `lung_gates`, or None.
        seed: of the random map.
        smoothing: of the random map, as a fraction of the shorter side.
    """
    location_of = location_prior(rows)
    maps = {
        CHANCE: in_every(rows, always(np.zeros((GRID, GRID), np.float32))),
        RANDOM: Lazy(len(rows), lambda i: noise(rows[i], [seed, i], smoothing)),
        CENTRE: in_every(rows, always(centre_prior())),
    }
    for name, method_maps in methods.items():
        maps[mean_map_of(name, methods)] = in_every(rows, always(mean_map(method_maps)))
    maps[LOCATION] = in_every(rows, lambda i: location_of(rows[i]["group"]))
    if gates is not None:
        means = [name for name in maps if name.startswith(MEAN)]
        maps |= {name + GATED: gated(maps[name], gates) for name in [*means, LOCATION]}
    return maps | dict(image_maps)


def is_control(name: str) -> bool:
    """Whether a name belongs to a control, so that no method may have it."""
    names = (CHANCE, RANDOM, CENTRE, LOCATION, EDGES, GATE, BRIGHTNESS, MIRROR, UNCHANGED, BLURRED, SPLIT)
    return name in names or name == LOCATION + GATED or name.startswith(MEAN)


def mean_map_of(name: str, methods: Any) -> str:
    """The name of a method's mean map in the tables."""
    return MEAN if len(methods) == 1 else f"{MEAN} of {name}"


def in_every(rows: Sequence[Row], in_frame: Callable[[int], np.ndarray]) -> Maps:
    """The map `in_frame(i)` of the common frame, resampled to the size at which each image is measured."""
    return Lazy(len(rows), lambda i: resample(in_frame(i), rows[i]["height"], rows[i]["width"]))


def always(in_frame: np.ndarray) -> Callable[[int], np.ndarray]:
    """The same map for every image."""
    return lambda i: in_frame


def noise(row: Row, seed: Sequence[int], smoothing: float) -> np.ndarray:
    """(H, W) uniform noise, smoothed."""
    uniform = np.random.default_rng(seed).random((row["height"], row["width"]), dtype=np.float32)
    return smooth_by_side(uniform, smoothing)


def centre_prior() -> np.ndarray:
    """A Gaussian in the middle of the frame, sigma a quarter of each side."""
    x = np.linspace(-2, 2, GRID, dtype=np.float32) ** 2  # in sigmas
    return np.exp(-(x[:, None] + x) / 2)


def mean_map(maps: Maps) -> np.ndarray:
    """The mean of some maps in the common frame."""
    return sum((resample(m, GRID, GRID) for m in maps), np.zeros((GRID, GRID), np.float32)) / max(len(maps), 1)


def location_prior(rows: Sequence[Row]) -> Callable[[Any], np.ndarray]:
    """`function(group)`: the mean true region of all other patients' images, smoothed; 0 if there are none."""
    members: dict[Any, list[Row]] = {}
    for row in rows:
        members.setdefault(row["group"], []).append(row)

    def total(group: Any) -> np.ndarray:
        masks = (row["truth"].mask().astype(np.float32) for row in members[group])
        return sum((resample(mask, GRID, GRID) for mask in masks), np.zeros((GRID, GRID), np.float32))

    everyone = sum(map(total, members), np.zeros((GRID, GRID), np.float32))

    def prior(group: Any) -> np.ndarray:
        others = (everyone - total(group)) / max(len(rows) - len(members[group]), 1)
        return smooth_map(others, LOCATION_SIGMA * GRID)

    return prior


def image_controls(grey: Maps, gates: np.ndarray | None, smoothing: float) -> dict[str, Maps]:
    """{name: maps} of the controls that are computed from each image alone, without a model of disease.

    Args:
        grey: the `grey_images`.
        gates: their `lung_gates`, or None: then only |x - blurred x|.
        smoothing: of |x - blurred x|, as a fraction of the shorter side.
    """
    n = len(grey)
    maps = {EDGES: Lazy(n, lambda i: edge_map(grey[i], smoothing))}
    if gates is not None:
        maps[GATE] = Lazy(n, lambda i: resample(gates[i], *grey[i].shape))
        maps[BRIGHTNESS] = gated(Lazy(n, lambda i: smooth_small(grey[i], SIGMA)), gates)
        maps[MIRROR] = gated(Lazy(n, lambda i: smooth_small(grey[i], SIGMA, mirror_difference)), gates)
    return maps


def grey_images(dataset: Any, rows: Sequence[Row]) -> Maps:
    """The images of a data set at the size at which they are measured, see `grey_image`."""
    return Lazy(len(rows), lambda i: grey_image(dataset[i]["image"], rows[i]["height"], rows[i]["width"]))


def grey_image(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """A PIL image, (H, W) or (H, W, C) array -> (height, width) float32, stretched so that it reaches from 0 to 1.

    A larger image is shrunk first, by the mean of the area of each pixel.
    """
    if isinstance(image, np.ndarray):
        # channels have the same weight
        image = Image.fromarray(np.asarray(image if image.ndim == 2 else image.mean(axis=-1), np.float32))
    image = image.convert("F" if image.mode[0] in "IF" else "L")
    grey = np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32)
    return (grey - grey.min()) / max(np.ptp(grey), 1e-12)


def edge_map(image: np.ndarray, smoothing: float) -> np.ndarray:
    """|x - blurred x| of an (H, W) image: the score that detail alone reaches."""
    return smooth_by_side(np.abs(image - smooth_small(image, EDGE_SIGMA)), smoothing)


def mirror_difference(image: np.ndarray) -> np.ndarray:
    """How much brighter each pixel is than its left-right mirror image; 0 where it is darker."""
    return np.maximum(image - image[:, ::-1], 0)


def smooth_small(
    image: np.ndarray, sigma: float, function: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """The image, or `function(image)`, smoothed; computed with a shorter side of at most `GRID`.

    `sigma` is a fraction of the shorter side.
    """
    height, width = image.shape
    small = resample(image, *measured_size(height, width, GRID))
    return resample(smooth_map(function(small) if function else small, sigma * min(small.shape)), height, width)


@torch.no_grad()
def lung_gates(segmenter: Any, grey: Maps, batch_size: int = 32) -> np.ndarray | None:
    """The soft lung gate of each image at the network's own resolution, (N, S, S) float32 in [0, 1].

    Args:
        segmenter: a `LungSegmenter`; None: there are no gates, None is returned.
        grey: the `grey_images`.
        batch_size: images a forward.
    """
    if segmenter is None:
        return None
    size = segmenter.config.sample_size
    gates = np.zeros((len(grey), size, size), np.float32)
    for start in range(0, len(grey), batch_size):
        stop = min(start + batch_size, len(grey))
        batch = np.stack([resample(grey[i], size, size) for i in range(start, stop)])
        gates[start:stop] = segmenter.field(torch.from_numpy(batch)[:, None].to(segmenter.device)).cpu().numpy()
    return gates


def gated(maps: Maps, gates: np.ndarray) -> Maps:
    """Each map times the gate of its image."""
    return Lazy(len(maps), lambda i: gate_map(maps[i], gates[i]))


def gate_map(anomaly_map: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """(H, W) map times a gate of any size."""
    return anomaly_map * resample(gate, *anomaly_map.shape)


def resample(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) float32 -> (height, width) float32: bilinear, averaging where it shrinks."""
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def image_score(anomaly_map: np.ndarray) -> float:
    """An image's score by the pipelines' own rule, for a map without a pipeline."""
    return float(score_map(torch.tensor(anomaly_map)[None])[0])
