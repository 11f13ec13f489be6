"""Synthetic chests with a known pleural effusion and its exact mask: for tests, demonstrations and first runs."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
from datasets import Dataset
from tqdm.auto import tqdm

from .rows import to_dataset

CLASS_NAMES = ("healthy", "pleural effusion")
VISIBLE = 6 / 255  # a change of brightness that counts as visible: the threshold of the implants' masks too


class Chest(NamedTuple):
    """image: (size, size) uint8; healthy: the same chest without fluid, likewise; mask: (size, size) bool."""

    image: np.ndarray
    healthy: np.ndarray
    mask: np.ndarray


def load_phantom(n: int = 200, *, size: int = 64, seed: int = 0, diseased_fraction: float = 0.5) -> Dataset:
    """`n` synthetic chests -> data set; chest i is the same whatever `n` is.

    Args:
        size: side of the images in pixels.
        diseased_fraction: share with an effusion, spread evenly.

    Returns:
        `datasets.Dataset` with columns image, label (healthy, pleural effusion), patient, view, path, mask (all black
        for healthy chests).

    Raises:
        ValueError: an option that is not as said above.
    """
    if n < 1 or size < 16 or not 0 <= diseased_fraction <= 1:
        raise ValueError(f"expected n >= 1, size >= 16, fraction in [0, 1], got {n}, {size}, {diseased_fraction}")
    rows = []
    for i in tqdm(range(n), desc="drawing chests", unit="image", delay=2):
        label = int(math.floor(round((i + 1) * diseased_fraction, 9)) - math.floor(round(i * diseased_fraction, 9)))
        fluid = draw_effusion(np.random.default_rng([seed, i, 1])) if label else None
        chest = draw_chest(np.random.default_rng([seed, i, 0]), size, fluid)
        rows.append(
            {
                "image": PIL.Image.fromarray(chest.image),
                "mask": PIL.Image.fromarray(chest.mask.astype(np.uint8) * 255),
                "label": label,
                "patient": f"phantom{seed}-{i:06d}",
                "view": "PA",
                "path": f"phantom/seed{seed}/{i:06d}",
            }
        )
    return to_dataset(rows, CLASS_NAMES)


def draw_effusion(rng: np.random.Generator) -> dict[str, float]:
    """A random effusion: {"right" | "left": amount}, amounts in (0, 1], from a blunted angle to half a lung."""
    sides = [("right",), ("left",), ("right", "left")][rng.choice(3, p=(0.4, 0.4, 0.2))]
    return {side: float(rng.beta(1.3, 1.8)) * 0.9 + 0.1 for side in sides}


def draw_chest(rng: np.random.Generator, size: int, effusion: Mapping[str, float] | None = None) -> Chest:
    """One synthetic frontal radiograph.

    Args:
        rng: numpy Generator; the same state draws the same chest, with fluid or without.
        size: side in pixels.
        effusion: None, or {"right" | "left": amount in (0, 1]}, sides of the *patient*: right is left in the image.

    Returns:
        `Chest`; its mask is where image and healthy differ visibly.
    """
    anatomy = _draw_anatomy(rng)
    x, y = _grid(size, anatomy)
    lungs = {side: _lung(x, y, anatomy, side) for side in ("right", "left")}
    bones = _bones(rng, size, anatomy)
    texture = _texture(rng, x, y, size, anatomy)
    noise = rng.standard_normal((size, size), np.float32) * anatomy["noise"]
    tissue, air = _tissue_and_air(x, y, anatomy, lungs, texture)
    healthy = image = _expose(tissue - air, bones, noise, x, y, anatomy)
    if effusion:
        fluid = sum(_fluid(x, y, anatomy, side, amount) for side, amount in effusion.items()).clip(0, 1)
        # fluid takes the place of air, so it adds little where there was little: in front of heart and belly
        image = _expose(tissue - air + fluid * 1.12 * air.clip(0, None), bones, noise, x, y, anatomy)
    mask = _smooth(np.abs(image - healthy), size / 170) > VISIBLE
    image, healthy = ((values * 255).round().astype(np.uint8) for values in (image, healthy))
    return Chest(image, healthy, mask)


def _draw_anatomy(rng):
    """Random measures of one person, in units of half the image's side."""
    u = rng.uniform
    return {
        "turn": u(-0.05, 0.05),
        "shift_x": u(-0.05, 0.05),
        "shift_y": u(-0.05, 0.05),
        "zoom": u(0.92, 1.08),
        "width": u(0.70, 0.80),  # of the rib cage, from the midline
        "apex": u(-0.80, -0.70),
        "base": u(0.46, 0.62),  # height of the right dome
        "left_lower": u(0.03, 0.10),  # the left dome is lower
        "dome": u(0.14, 0.26),
        "angle": u(0.20, 0.32),  # depth of the costophrenic angle below the dome
        "mediastinum": u(0.11, 0.16),
        "heart": u(0.36, 0.50),  # half the length of its long axis
        "heart_x": u(0.10, 0.17),
        "knob": u(0.08, 0.11),
        "fat": u(0.0, 0.12),
        "aeration": u(0.16, 0.30),
        "hilum": u(0.10, 0.22),
        "bones": u(0.13, 0.22),
        "ribs": u(0.165, 0.195),  # distance from rib to rib
        "slope": u(0.10, 0.24),
        "bubble": u(0.0, 1.0) if rng.random() < 0.6 else 0.0,
        "gamma": u(0.85, 1.25),
        "black": u(0.0, 0.04),
        "white": u(0.88, 1.0),
        "noise": u(0.006, 0.018),
        "marker": rng.random() < 0.5,
    }


def _grid(size, a):
    """Coordinates x (to the right of the image) and y (down), -1..1, turned, shifted and zoomed with the person."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis - a["shift_x"], axis - a["shift_y"])
    cos, sin = math.cos(a["turn"]) / a["zoom"], math.sin(a["turn"]) / a["zoom"]
    return cos * x + sin * y, -sin * x + cos * y


def _step(distance, softness):
    """0 far below zero, 1 far above, over about `softness` units."""
    return 0.5 * (1 + np.tanh(distance / softness))


def _side_x(x, side):
    """Distance from the midline, positive on that side: the patient's right is left in the image."""
    return -x if side == "right" else x


def _wall(y, a):
    """Inner half width of the rib cage at height y."""
    down = ((y - a["apex"]) / (0.35 - a["apex"])).clip(0, 1)
    return a["width"] * (0.40 + 0.60 * np.sqrt(1 - (1 - down) ** 2)) - 0.04 * ((y - 0.35).clip(0, None)) ** 2


def _dome(s, a, side):
    """Height of the diaphragm at distance s from the midline: highest in the middle, falling to the wall."""
    top = a["base"] + (a["left_lower"] if side == "left" else 0.0)
    t = (s / a["width"]).clip(0, 1.2)
    medial = a["dome"] * 0.5 * ((0.45 - t).clip(0, None) / 0.45) ** 2
    lateral = a["angle"] * 1.15 * ((t - 0.45).clip(0, None) / 0.55) ** 2.6
    return top + medial + lateral


def _medial(y, a, side):
    """Distance from the midline where the lung begins."""
    return a["mediastinum"] + 0.05 * ((-0.35 - y).clip(0, None)) + (0.03 if side == "right" else 0.0)


def _lung(x, y, a, side):
    """How much of each pixel is lung, 0..1, before the heart is put in front of it."""
    s = _side_x(x, side)
    inside = _step(_wall(y, a) - s, 0.025) * _step(s - _medial(y, a, side), 0.03)
    return inside * _step(_dome(s, a, side) - y, 0.018) * _step(y - a["apex"] - 0.25 * (s - 0.32) ** 2, 0.03)


def _heart(x, y, a):
    """Heart, great vessels and aortic knob, 0..1: two thirds of the heart lie on the patient's left."""
    tilt, base = 0.66, a["base"]
    hx, hy = x - a["heart_x"], y - (base - 0.19)
    along, across = math.cos(tilt) * hx + math.sin(tilt) * hy, -math.sin(tilt) * hx + math.cos(tilt) * hy
    ventricle = 1 - np.hypot(along / a["heart"], across / (0.68 * a["heart"]))
    atrium = 1 - np.hypot((x + 0.05) / (0.26 * a["heart"] + 0.08), (y - (base - 0.24)) / 0.30)
    # the left border runs from the knob over the pulmonary trunk down to the ventricle
    trunk = 1 - np.hypot((x - 0.06) / (a["mediastinum"] + 0.06), (y - (base - 0.52)) / 0.36)
    knob = 1 - np.hypot((x - a["mediastinum"] + 0.02) / a["knob"], (y + 0.32) / (1.3 * a["knob"]))
    together = sum(np.exp(7.0 * part.clip(-1.5, 0.3)) for part in (ventricle, atrium, trunk))  # a smooth union
    return np.maximum(_step(np.log(together) / 7.0 - 0.06, 0.10), 0.75 * _step(knob, 0.20))


def _tissue_and_air(x, y, a, lungs, texture):
    """(tissue, air): the thickness of soft tissue as if without air, 0..1, and the reduction of it by the air."""
    shoulder = 0.20 + 0.95 * _step(y + 0.80 + 0.10 * np.abs(x), 0.10)
    outline = _step(
        np.minimum(shoulder, a["width"] + 0.14 + a["fat"] + 0.30 * _step(-0.45 - y, 0.12)) - np.abs(x), 0.02
    )
    chest = 0.64 + 0.10 * (1 - (x / 0.9) ** 2).clip(0, 1) + 0.05 * y
    # air is thickest in the middle of each lung; the wall's own thickness shows at its side
    depth = (1 - 0.45 * ((np.abs(x) - 0.42) / 0.42) ** 2).clip(0.3, 1)
    heart = _heart(x, y, a)
    air = (lungs["right"] + lungs["left"]) * (depth * (0.74 - a["aeration"]) - texture) * (1 - 0.84 * heart)
    middle = 0.16 * (1 - _step(np.abs(x) - a["mediastinum"] + 0.02, 0.09))
    trachea = 0.10 * np.exp(-((x / 0.05) ** 2)) * _step(-0.24 - y, 0.08)
    stomach = (x - 0.36) / 0.17, (y - a["base"] - a["left_lower"] - 0.20) / 0.10
    bubble = 0.30 * a["bubble"] * _step(1 - np.hypot(*stomach), 0.25)
    belly = 0.10 * _step(y - a["base"] - 0.08, 0.12) * _step(a["width"] - np.abs(x), 0.10)
    tissue = chest + middle + 0.05 * heart + belly - trachea - bubble
    return outline * tissue.clip(0.03, 1.05), outline * air


def _fluid(x, y, a, side, amount):
    """Share of the air that fluid replaces, below a meniscus that is low medially and climbs the side wall."""
    s = _side_x(x, side)
    t = ((s - 0.12) / (a["width"] - 0.12)).clip(0, 1)
    lowest = a["base"] + (a["left_lower"] if side == "left" else 0.0) + a["angle"]
    level = lowest - 0.06 - 0.95 * amount
    border = level + (0.10 + 0.22 * amount) * (0.45 - t**2.2)
    cavity = _step(_wall(y, a) - s, 0.03) * _step(s - 0.06, 0.05) * _step(y - a["apex"], 0.05)
    # thin at its upper edge, where fluid only lines the wall
    depth = 1 - np.exp(-((y - border).clip(0, None)) / (0.05 + 0.04 * amount))
    lining = 0.45 * _step(t - 0.93, 0.03) * _step(y - border + 0.14, 0.06)
    return cavity * np.maximum(depth * _step(y - border, 0.012), lining).clip(0, 1) * 0.92


def _texture(rng, x, y, size, a):
    """Vessels that fan out from each hilum and fade towards the wall, and the grain of the lung: about 0..0.3."""
    canvas = PIL.Image.new("L", (2 * size, 2 * size))
    draw = PIL.ImageDraw.Draw(canvas)
    for sign in (-1, 1):
        for _ in range(26):
            angle = rng.uniform(-1.35, 1.45)
            length, bend = rng.uniform(0.25, 0.62), rng.normal() * 0.25
            start = np.array([sign * (a["mediastinum"] + 0.06), -0.02 + rng.uniform(-0.10, 0.14)])
            steps = np.linspace(0, 1, 7)
            turned = angle + bend * steps
            path = start + length * steps[:, None] * np.stack([sign * np.cos(turned), np.sin(turned)], 1)
            points = _to_pixels(path, 2 * size, a)
            for k in range(6):
                width = max(1, round(2 * size * 0.016 * (1 - 0.8 * k / 6)))
                draw.line([points[k], points[k + 1]], fill=int(230 * (1 - 0.75 * k / 6)), width=width)
    vessels = _reduce(canvas, size, blur=0.006)
    root = sum(
        np.exp(-(((x - sign * (a["mediastinum"] + 0.08)) / 0.10) ** 2) - ((y + 0.0) / 0.16) ** 2) for sign in (-1, 1)
    )
    grain = _smooth(rng.standard_normal((size, size), np.float32), size / 90)
    grain = grain / (grain.std() + 1e-9) * 0.012
    return a["hilum"] * (0.75 * vessels + 0.55 * root) + grain


def _bones(rng, size, a):
    """Ribs, clavicles, shoulder blades and spine, about 0..1, drawn twice as large and made smaller."""
    side = 2 * size
    layers = [PIL.Image.new("L", (side, side)) for _ in range(3)]
    ribs, front, rest = (PIL.ImageDraw.Draw(layer) for layer in layers)
    thick = side * 0.030
    for sign in (-1, 1):
        for k in range(10):
            top = a["apex"] + 0.02 + k * a["ribs"]
            reach = float(_wall(np.array(min(top + 0.10, 0.55)), a)) + 0.02
            _rib(ribs, side, a, sign, top, reach, a["slope"] * (0.6 + 0.10 * k), thick * (0.8 + 0.03 * k), 150)
            if 1 < k < 8:
                _front_rib(front, side, a, sign, top + 0.20, reach, a["slope"] + 0.22, thick * 1.1, 120)
        _clavicle(rest, side, a, sign, thick * 1.15, rng.uniform(-0.03, 0.03))
        blade = [
            (sign * (a["width"] + dx), dy) for dx, dy in ((-0.02, -0.62), (0.16, -0.55), (0.05, -0.05), (-0.10, -0.12))
        ]
        rest.polygon(_to_pixels(np.array(blade), side, a), fill=52)
    for k in range(14):
        top = -1.0 + k * 0.145
        body = np.array([(-0.075, top), (0.075, top), (0.085, top + 0.11), (-0.085, top + 0.11)])
        rest.polygon(_to_pixels(body, side, a), fill=105)
    back, front, rest = (_reduce(layer, size, blur=0.006) for layer in layers)
    return back + 0.6 * front + rest


def _rib(draw, side, a, sign, top, reach, slope, thick, fill):
    """A posterior rib: from the spine outwards, first up, then down along the wall."""
    t = np.linspace(0, 1, 15)
    path = np.stack(
        [sign * (0.05 + (reach - 0.05) * np.sin(t * 1.50)), top - 0.06 * np.sin(t * 3.1) + slope * t**2.4], 1
    )
    _tube(draw, _to_pixels(path, side, a), thick, fill)


def _front_rib(draw, side, a, sign, top, reach, slope, thick, fill):
    """An anterior rib: from the wall inwards and down, ending where its cartilage begins."""
    t = np.linspace(0, 1, 10)
    path = np.stack([sign * (reach - (reach - 0.30) * t**1.3), top + slope * np.sin(t * 1.45)], 1)
    _tube(draw, _to_pixels(path, side, a), thick, fill)


def _clavicle(draw, side, a, sign, thick, lift):
    t = np.linspace(0, 1, 12)
    path = np.stack([sign * (0.09 + 0.72 * t), a["apex"] + 0.17 - 0.13 * t - 0.035 * np.sin(t * 6.0) + lift], 1)
    _tube(draw, _to_pixels(path, side, a), thick, 175)


def _tube(draw, points, thick, fill):
    """A bone seen from the side: its cortex is brighter than its marrow."""
    draw.line(points, fill=fill, width=max(2, round(thick)), joint="curve")
    if thick >= 4:
        draw.line(points, fill=round(fill * 0.62), width=max(1, round(thick * 0.55)), joint="curve")


def _to_pixels(path, side, a):
    """(N, 2) points of the person -> list of pixel coordinates, the inverse of `_grid`."""
    cos, sin = math.cos(a["turn"]) * a["zoom"], math.sin(a["turn"]) * a["zoom"]
    x = cos * path[:, 0] - sin * path[:, 1] + a["shift_x"]
    y = sin * path[:, 0] + cos * path[:, 1] + a["shift_y"]
    return [((px + 1) / 2 * side, (py + 1) / 2 * side) for px, py in zip(x.tolist(), y.tolist(), strict=True)]


def _reduce(canvas, size, blur):
    """Drawing of twice the side -> (size, size) in 0..1, softened by `blur` of the side."""
    canvas = canvas.filter(PIL.ImageFilter.GaussianBlur(blur * canvas.width / 2))
    return np.asarray(canvas.resize((size, size), PIL.Image.Resampling.BOX), np.float32) / 255


def _smooth(array, sigma):
    """(H, W) -> (H, W): three box means, close to a Gaussian of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(array, sigma, mode="nearest")


def _expose(thick, bones, noise, x, y, a):
    """Thickness -> brightness in [0, 1]: what lies behind much tissue adds little, and less shows."""
    dense = thick + a["bones"] * bones * (thick > 0.1) * (1.25 - thick)
    value = (dense.clip(0, None) / 1.06).clip(0, 1) ** (1.25 * a["gamma"])
    value = a["black"] + (a["white"] - a["black"]) * value + noise * (0.4 + value)
    if a["marker"]:  # the L on the film says which side is left, and nothing about the chest
        stem = np.maximum(np.abs(x - 0.86) / 0.012, np.abs(y + 0.86) / 0.05)
        foot = np.maximum(np.abs(x - 0.88) / 0.03, np.abs(y + 0.82) / 0.012)
        value = np.maximum(value, 0.93 * _step(1 - np.minimum(stem, foot), 0.5))
    return value.clip(0, 1)
