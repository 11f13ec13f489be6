"""Overlays, panels and contact sheets of maps, each with its colour scale."""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLORMAP = "inferno"  # perceptually uniform, also when printed in grey
TRUTH = (0, 229, 255)  # cyan: occurs neither in the colour map nor in a radiograph
INK, PAPER, MUTED = (20, 20, 20), (255, 255, 255), (110, 110, 110)
GAP = 6  # pixels between panels


def overlay(
    image: Image.Image | np.ndarray, anomaly_map: np.ndarray, vmax: float = 1.0, opacity: float = 0.8
) -> Image.Image:
    """A radiograph covered by its anomaly map: the higher the map, the stronger the colour.

    Args:
        image: PIL image or array, see `to_grey`.
        anomaly_map: (H, W) in [0, 1], of the size of the image.
        vmax: the map value of the last colour; higher values have the same colour.
        opacity: of the last colour, 0 to 1.

    Returns:
        RGB PIL image of the same size.

    Raises:
        ValueError: different sizes, a `vmax` of 0 or less, an `opacity` outside [0, 1].
    """
    grey, anomaly_map = to_grey(image), np.asarray(anomaly_map, np.float32)
    if anomaly_map.shape != grey.size[::-1]:
        raise ValueError(f"expected a map of the image's size {grey.size[::-1]}, got {anomaly_map.shape}")
    if not vmax > 0:
        raise ValueError(f"expected a `vmax` greater than 0, got {vmax}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"expected an `opacity` from 0 to 1, got {opacity}")
    return Image.fromarray(_cover(np.asarray(grey), np.clip(anomaly_map / vmax, 0, 1), opacity))


def side_by_side(
    image: Image.Image | np.ndarray,
    counterfactual: Image.Image | np.ndarray | None,
    anomaly_map: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
    vmax: float | None = None,
    title: str | None = None,
    note: bool = True,
    panel_size: int = 320,
    opacity: float = 0.8,
) -> Image.Image:
    """Input | counterfactual, if any | overlay with its colour bar, in one image.

    Args:
        image, counterfactual: PIL images or arrays of one size, see `to_grey`; None: a method without counterfactual.
        anomaly_map: (H, W) in [0, 1], of that size.
        mask: (H, W) booleans, the true region, drawn as an outline; None: unknown.
        boxes: true boxes [x, y, w, h] in pixels of `image`; None: unknown.
        vmax: the map value of the last colour. None: the map's own 99.5 % quantile; a note in the image says so.
        title: one or more lines above.
        note: whether a text below explains outline and colour scale; False for all but the last of several panels.
        panel_size: longer side of a panel, in pixels.
        opacity: of the last colour.

    Returns:
        RGB PIL image.

    Raises:
        ValueError: a map or mask of another size than the image.
    """
    scale = "fixed colour scale"
    if vmax is None:
        vmax, scale = common_vmax([anomaly_map]), "colour scale of this image alone (its 99.5 % quantile)"
    cells = {"input": _panel(to_grey(image), panel_size, mask, boxes)}
    if counterfactual is not None:
        cells["counterfactual"] = _panel(to_grey(counterfactual), panel_size)
    cells["anomaly map"] = _panel(overlay(image, anomaly_map, vmax, opacity), panel_size, mask, boxes)
    has_truth = mask is not None or boxes is not None
    return _grid(
        [list(cells.values())],
        list(cells),
        None,
        {len(cells) - 1: vmax},
        title,
        _note(has_truth, scale) if note else "",
        panel_size,
        opacity,
    )


def validation_strip(
    images: Sequence,
    counterfactuals: Sequence,
    anomaly_maps: Sequence[np.ndarray],
    *,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Rows of input | counterfactual | overlay on one colour scale, to follow a training run.

    Args:
        images, counterfactuals: lists of PIL images or arrays, see `to_grey`.
        anomaly_maps: list of (H, W) in [0, 1].
        titles: a short text beside each row.
        title: a line above.
    """
    vmax, size, opacity = common_vmax(anomaly_maps), 128, 0.8
    cells = [
        [_panel(to_grey(x), size), _panel(to_grey(y), size), _panel(overlay(x, m, vmax, opacity), size)]
        for x, y, m in zip(images, counterfactuals, anomaly_maps, strict=True)
    ]
    note = "one colour scale for all rows (99.5 % quantile of these maps)"
    return _grid(cells, ["input", "counterfactual", "anomaly map"], titles, {2: vmax}, title, note, size, opacity)


def contact_sheet(
    rows: Sequence[Mapping],
    columns: Sequence[str],
    *,
    vmax: float | Mapping[str, float] | None = None,
    title: str | None = None,
    panel_size: int = 160,
    opacity: float = 0.8,
) -> Image.Image:
    """Rows = patients, columns = input, true region (if any row has one), and one overlay for each method.

    Args:
        rows: dicts of "image" (PIL image or array), "maps" {column: (H, W) map in [0, 1] or None} and, optionally,
            "mask" (H, W) booleans, "boxes" [[x, y, w, h], ...] and "title".
        columns: the names of the maps, left to right.
        vmax: the map value of the last colour, a number for all columns or {column: number}. None: `common_vmax` of the
            column over all rows. No row has a scale of its own.
        title, panel_size, opacity: as in `side_by_side`.

    Raises:
        ValueError: no row, a column without a map in any row, a `vmax` of another column, or a map or mask of another
            size than its image.
    """
    if not rows:
        raise ValueError("expected at least one row, got none")
    names = {name for row in rows for name in row["maps"]}
    if unknown := [name for name in columns if name not in names]:
        raise ValueError(f"expected columns among the maps {', '.join(sorted(names))}, got {unknown}")
    if unknown := sorted(set(vmax) - set(columns)) if isinstance(vmax, Mapping) else []:
        raise ValueError(f"expected `vmax` for some of the columns {', '.join(columns)}, got {unknown}")
    given = vmax if isinstance(vmax, Mapping) else {name: vmax for name in columns}
    has_truth = any(row.get("mask") is not None or row.get("boxes") is not None for row in rows)
    scales = {name: given.get(name) or common_vmax([row["maps"].get(name) for row in rows]) for name in columns}
    cells = []
    for row in rows:
        grey, truth = to_grey(row["image"]), (row.get("mask"), row.get("boxes"))
        line = [_panel(grey, panel_size)]
        if has_truth:
            line.append(_panel(grey, panel_size, *truth))
        for name in columns:
            anomaly_map = row["maps"].get(name)
            line.append(
                None
                if anomaly_map is None
                else _panel(overlay(grey, anomaly_map, scales[name], opacity), panel_size, *truth)
            )
        cells.append(line)
    first = 2 if has_truth else 1
    how = "fixed" if all(given.get(name) for name in columns) else "99.5 % quantile of its maps"
    scale = f"one colour scale a column ({how})" if columns else ""
    return _grid(
        cells,
        ["input", "truth"][:first] + list(columns),
        [row.get("title") or "" for row in rows],
        {first + i: scales[name] for i, name in enumerate(columns)},
        title,
        _note(has_truth, scale),
        panel_size,
        opacity,
    )


def common_vmax(maps: Sequence[np.ndarray | None], quantile: float = 0.995) -> float:
    """One colour scale for several maps: the quantile of all their pixels; 1 if that is 0.

    Args:
        maps: (H, W) arrays; None is skipped.
    """
    pixels = [np.asarray(m, np.float32).ravel() for m in maps if m is not None]
    value = float(np.quantile(np.concatenate(pixels), quantile)) if pixels else 0.0
    return value if value > 0 else 1.0


def to_grey(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert a PIL image or array for display -> PIL image of mode L.

    8-bit images and floats in [0, 1] keep their exposure; images of more bits are stretched from their darkest to their
    brightest value, as a viewer does. Arrays are (H, W) or (H, W, 1); an array (H, W, 4), the four sequences of an MRI
    slice, is averaged.
    """
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):
        return image.convert("L")
    array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    array = array.mean(axis=-1) if array.ndim == 3 and array.shape[-1] == 4 else array
    if array.ndim != 2:
        raise ValueError(f"expected a grey image (H, W), (H, W, 1) or (H, W, 4), got shape {array.shape}")
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    array = array.astype(np.float32)
    if np.issubdtype(np.asarray(image).dtype, np.integer) or array.min() < 0 or array.max() > 1:
        array = (array - array.min()) / max(np.ptp(array), 1e-12)
    return Image.fromarray((array * 255).round().astype(np.uint8))


def _cover(grey, level, opacity):
    """(H, W) uint8 grey, (H, W) level 0..1 -> (H, W, 3) uint8; where the level is 0, the grey stays as it is."""
    index = grey * np.uint16(256) + np.rint(level * 255).astype(np.uint8)
    return np.take(_covered(opacity), index, axis=0)  # five times as fast as brackets


@lru_cache(maxsize=8)  # a table of 192 KiB for each opacity
def _covered(opacity):
    """(65536, 3) uint8: at 256 * grey + level, the colour of each grey under each of 256 levels."""
    alpha = (opacity * np.linspace(0, 1, 256, dtype=np.float32) ** 0.8)[:, None]
    grey = np.arange(256, dtype=np.float32)[:, None, None]
    return (grey * (1 - alpha) + map_colours() * alpha).astype(np.uint8).reshape(-1, 3)


@cache
def map_colours() -> np.ndarray:
    """(256, 3) uint8: the colour scale of all maps, lowest value first."""
    import matplotlib

    return (matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


@cache
def _font(size):
    import matplotlib

    # part of matplotlib, with most letters that names of patients and methods may have
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _panel(image, size, mask=None, boxes=None):
    """An image scaled to a longer side of `size`, RGB, with the outline of the true region.

    Raises:
        ValueError: a mask of another size than the image.
    """
    if mask is not None and np.shape(mask) != image.size[::-1]:
        raise ValueError(f"expected a true region of the image's size {image.size[::-1]}, got {np.shape(mask)}")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    panel = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    line = max(1, round(size / 160))
    if mask is not None and np.any(mask):
        region = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255).resize((width, height))
        region = region.point(lambda v: 255 * (v > 127))
        grown = region.filter(ImageFilter.MaxFilter(2 * line + 1))
        # the line runs outside the region, so it hides none of it
        edge = Image.fromarray(np.asarray(grown) & ~np.asarray(region))
        panel.paste(TRUTH, mask=edge)
    for x, y, w, h in boxes if boxes is not None else ():
        ImageDraw.Draw(panel).rectangle(
            [x * scale, y * scale, (x + w) * scale, (y + h) * scale], outline=TRUTH, width=line
        )
    return panel


def _grid(cells, column_titles, row_titles, bars, title, note, size, opacity):
    """Panels in rows and columns with captions above, names at the left, colour bars under the columns in `bars`."""
    text = max(11, round(size / 18))
    widths = [max((row[i].width for row in cells if row[i]), default=size) for i in range(len(column_titles))]
    heights = [max(panel.height for panel in row if panel) for row in cells]
    rows, scales = tuple(row_titles or ()), tuple(bars.items())
    lines = title.split("\n") if title else []
    page, left, top = _frame(
        tuple(widths), tuple(heights), tuple(column_titles), rows, scales, len(lines), note, size, opacity
    )
    page, x = page.copy(), left
    for i, line in enumerate(lines):
        y = GAP + i * (text + GAP)
        write_words(ImageDraw.Draw(page), (left, y), line, text + 2, INK, page.width - left - GAP)
    for i, width in enumerate(widths):
        y = top
        for row, height in zip(cells, heights, strict=True):
            if row[i]:
                page.paste(row[i], (x + (width - row[i].width) // 2, y + (height - row[i].height) // 2))
            y += height + GAP
        x += width + GAP
    return page


@lru_cache(maxsize=4)  # the panels of a folder have mostly the same
def _frame(widths, heights, column_titles, row_titles, bars, title_lines, note, size, opacity):
    """(page with all but the title and the panels, left and top of the first panel)."""
    text = max(11, round(size / 18))
    left = GAP + (text + GAP if any(row_titles) else 0)
    top = GAP + (title_lines * (text + GAP) + GAP if title_lines else 0) + text + GAP
    bar = max(8, round(0.7 * text))
    first = bars[0][0] if bars else 0
    beside = sum(widths[:first]) + GAP * (first - 1)  # what the first colour bar leaves free at its left
    note_size = max(10, text - 2)
    is_below = bool(note) and _font(note_size).getlength(note) > beside
    foot = bar + (3 if is_below else 1) * text + 2 * GAP
    page = Image.new(
        "RGB", (left + sum(widths) + GAP * len(widths), top + sum(heights) + GAP * len(heights) + foot), PAPER
    )
    draw = ImageDraw.Draw(page)
    x, vmax_of = left, dict(bars)
    for i, (caption, width) in enumerate(zip(column_titles, widths, strict=True)):
        write_words(draw, (x + width / 2, top - GAP), caption, text, INK, width, anchor="ms")
        if i in vmax_of:
            _colour_bar(page, x, top + sum(heights) + GAP * len(heights), width, vmax_of[i], text, bar, opacity)
        x += width + GAP
    y = top
    for name, height in zip(row_titles, heights, strict=False):
        if name:
            _write_upright(page, name, (GAP, y), text, height)
        y += height + GAP
    if note:
        room = page.width - left - GAP if is_below else beside
        write_words(draw, (left, page.height - GAP), note, note_size, MUTED, room, anchor="ls")
    return page, left, top


def _colour_bar(page, x, y, width, vmax, text, height, opacity):
    """A horizontal scale from 0 to `vmax`, as it looks over middle grey, with three numbers under it."""
    level = np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))
    page.paste(Image.fromarray(_cover(np.full(level.shape, 128, np.uint8), level, opacity)), (x, y))
    draw = ImageDraw.Draw(page)
    for share, anchor in ((0, "lt"), (0.5, "mt"), (1, "rt")):
        label = f"{share * vmax:.2g}" if share < 1 else f"\u2265 {vmax:.2g}"
        write_words(draw, (x + share * (width - 1), y + height + 3), label, max(10, text - 2), INK, width, anchor)


def write_words(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    words: str,
    size: int,
    colour: tuple[int, int, int],
    width: float,
    anchor: str = "la",
) -> None:
    """Draw a text in a font that fits `width`; at 9 pixels, the text is cut instead and ends in dots."""
    while size > 9 and draw.textlength(words, _font(size)) > width:
        size -= 1
    if draw.textlength(words, _font(size)) > width:
        while words and draw.textlength(words + "...", _font(size)) > width:
            words = words[:-1]
        words += "..."
    draw.text(position, words, colour, _font(size), anchor)


def _write_upright(page, words, position, size, length):
    strip = Image.new("RGB", (length, size + GAP), PAPER)
    write_words(ImageDraw.Draw(strip), (length / 2, size // 2 + GAP // 2), words, size, INK, length, anchor="mm")
    page.paste(strip.rotate(90, expand=True), (position[0] - GAP // 2, position[1]))


def _note(has_truth, scale):
    return "; ".join(["cyan: true region"] * has_truth + [scale] * bool(scale))
