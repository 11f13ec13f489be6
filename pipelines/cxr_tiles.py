"""Overlapping tiles of an image, blended without seams."""

import math
from collections.abc import Callable

import torch


def blend(x: torch.Tensor, tile_size: int, function: Callable, tiles_at_once: int = 16) -> torch.Tensor:
    """Apply `function` to overlapping square tiles of (B, C, H, W); blend its results, faded towards a tile's edges.

    Neighbours overlap by at least a quarter of a tile; an image smaller than a tile is one tile.
    """
    height, width = x.shape[-2:]
    tops, lefts = (_starts(side, tile_size) for side in (height, width))
    h, w = min(tile_size, height), min(tile_size, width)
    places = [(top, left) for top in tops for left in lefts]
    window = (_fade(h)[:, None] * _fade(w)[None]).to(x)
    total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for first in range(0, len(places), tiles_at_once):
        group = places[first : first + tiles_at_once]
        tiles = torch.cat([x[..., top : top + h, left : left + w] for top, left in group])
        outputs = function(tiles).split(len(x))
        for (top, left), output in zip(group, outputs, strict=True):
            total[..., top : top + h, left : left + w] += window * output
            weight[..., top : top + h, left : left + w] += window
    return total / weight


def _starts(side, tile_size):
    if side <= tile_size:
        return [0]
    count = math.ceil((side - tile_size) / (0.75 * tile_size)) + 1
    return [round(i * (side - tile_size) / (count - 1)) for i in range(count)]


def _fade(size):
    """A window that is highest in the middle and never 0."""
    return 0.5 - 0.5 * torch.cos(2 * math.pi * (torch.arange(size) + 1) / (size + 1))
