"""The tables and images of an evaluation: Markdown, and the files of `output_dir`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import precision_recall_figure, roc_figure
from ..files import save_png, write_file
from ..visualization import contact_sheet, to_grey
from .controls import CHANCE, RANDOM, Maps
from .tables import and_healthy
from .truth import Row

if TYPE_CHECKING:
    from .comparison import Evaluation

COLUMNS = {  # of the table: {metric of the summary: heading}
    "pixel_ap": "pixel AP",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "best_dice": "best Dice",
    "dice": "Dice",
    "iou": "IoU",
    "hit_rate": "hit rate",
    "pixel_sensitivity": "pixel sensitivity",
    "pixel_specificity": "pixel specificity",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_sensitivity": "image sensitivity",
    "image_specificity": "image specificity",
}
COUNTERFACTUALS = {  # of the second table, likewise
    "flip_rate": "flip rate",
    "p_healthy_moved": "p(healthy) moved, diseased",
    "p_healthy_moved_healthy": "p(healthy) moved, healthy",
    "kid": "KID",
    "fid": "FID",
    "psnr_outside": "PSNR outside (dB)",
    "ssim_outside": "SSIM outside",
}
SHEET_ROWS = 8
IMAGES = ("contact_sheet.png", "precision_recall.png", "roc.png")


def summary_table(result: Evaluation | dict[str, Any], columns: Mapping[str, str] = COLUMNS) -> str:
    """Markdown: a row for each method and control, "value [low, high]" with 95 % intervals, then paired differences.

    Args:
        result: an `Evaluation`, or its `summary` as read back from summary.json.
        columns: {metric: heading}.
    """
    summary = result if isinstance(result, dict) else result.summary
    measured = {k: v for k, v in columns.items() if any(k in numbers for numbers in summary["rows"].values())}
    if not any(is_number(interval["value"]) for numbers in summary["rows"].values() for interval in numbers.values()):
        return (
            "No map or score can be measured: no image has a true region (a mask or boxes), and there are not both "
            "healthy and diseased images.\n"
        )
    parts = [markdown("", summary["rows"], measured)]
    if summary["differences"]:
        parts.append("Paired differences, same replicates; an interval without 0 is a difference.\n")
        parts.append(markdown("difference", summary["differences"], measured, sign="+"))
    for view, part in summary.get("image_level_by_view", {}).items():
        image_columns = {k: v for k, v in measured.items() if k.startswith("image_")}
        parts.append(
            f"Scores among view {view} alone: {part['n_images']} images, {part['n_healthy']} of them healthy\n"
        )
        parts.append(markdown("", part["rows"], image_columns))
    for name, stratum in summary["strata"].items():
        parts.append(f"{name}: {stratum['n_images']} images of {stratum['n_patients']} patients\n")
        pixel_columns = {k: v for k, v in measured.items() if not k.startswith("image_")}
        parts.append(markdown("", stratum["rows"], pixel_columns))
        # does the method see anything at all in these images? summary.json has the other differences
        to_chance = {k: v for k, v in stratum.get("differences", {}).items() if k.endswith(f" - {CHANCE}")}
        if to_chance:
            parts.append(markdown("difference", to_chance, pixel_columns, sign="+"))
    return "\n".join(parts)


def counterfactual_table(result: Evaluation | dict[str, Any], columns: Mapping[str, str] = COUNTERFACTUALS) -> str:
    """Markdown: quality of the counterfactuals, a row for each method and control, and the methods not measured.

    Arguments as in `summary_table`; "" where there is neither a counterfactual nor a judge.
    """
    summary = result if isinstance(result, dict) else result.summary
    section = summary.get("counterfactuals") or {"rows": {}, "not_measured": {}}
    measured = {k: v for k, v in columns.items() if any(k in numbers for numbers in section["rows"].values())}
    lines = [markdown("counterfactuals", section["rows"], measured)] if measured else []
    if "judge_auroc" in section:
        called = each(section["n_called_diseased"], "{}")
        own = each(section["judge_auroc"], "{:.3f}")
        lines.append(
            f"Judge: {summary['settings']['judge']}. Of {section['n_diseased']} diseased images it calls diseased: "
            f"{called}. Its own AUROC, these against {section['n_healthy']} healthy images, as the methods return "
            f"them: {own}. KID and FID are computed from its features, against the same healthy images; they are not "
            f"comparable with those of another network.\n"
        )
    if section["not_measured"] and summary["settings"].get("judge"):
        lines.append(
            "Not judged: " + "; ".join(f"{k}, {reason}" for k, reason in section["not_measured"].items()) + ".\n"
        )
    return "\n".join(lines)


def markdown(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], sign: str = "") -> str:
    """A Markdown table: {name: {metric: interval}}, a column for each of {metric: heading}."""
    lines = [f"| {corner} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, numbers in rows.items():
        cells = [cell(numbers.get(column), sign) for column in columns]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(interval: Mapping[str, Any] | None, sign: str = "") -> str:
    """ "value [low, high]", or a dash where the value is not defined."""
    if interval is None or not is_number(interval["value"]):
        return "–"
    value = f"{interval['value']:{sign}.3f}"
    if not is_number(interval["low"]):
        return value
    return f"{value} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def each(numbers: Mapping[str, Any], form: str) -> str:
    """{method: number} as text: the number where all have the same, else each with its method."""
    texts = {name: form.format(value) if is_number(value) else "–" for name, value in numbers.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({name})" for name, text in texts.items())


def is_number(value: Any) -> bool:
    """Whether a value is defined: neither None nor NaN."""
    return value is not None and bool(np.isfinite(value))


def report(summary: dict[str, Any]) -> str:
    """The text of summary.md: images, tables, settings, and the numbers of undefined values."""
    settings = summary["settings"]
    thresholds = each(settings["threshold"], "{:.4g}")
    undefined = ", ".join(f"{column} {n}" for column, n in summary["undefined"].items()) or "none"
    lines = [
        f"# {', '.join(settings['methods'])}",
        "",
        f"{summary['n_images']} images of {summary['n_patients']} patients, {summary['n_with_region']} with a true "
        f"region ({summary['n_patients_with_region']} patients){and_healthy(summary)}. "
        f"Brackets: 95 % bootstrap intervals over patients, {settings['n_bootstrap']} replicates.",
        "",
        summary_table(summary),
        counterfactual_table(summary),
        f"- seconds per image: {', '.join(f'{n} {s:.3g}' for n, s in summary['seconds_per_image'].items())}",
        f"- threshold: {thresholds} ({settings['threshold_from']}); controls mark equally many pixels",
        *contradicted(summary),
        *coarser(summary),
        f"- smoothing: {settings['smoothing']} of the shorter side; seed {settings['seed']}",
        f"- undefined values, in rows of per_image.csv: {undefined}",
        *left_out(summary["failed"]),
        "",
    ]
    return "\n".join(lines)


def contradicted(summary: Mapping[str, Any]) -> list[str]:
    """[a line of summary.md] about images labelled healthy that have a true region; [] if there are none."""
    n = summary["n_contradicted"]
    line = f"- labels: {n} images labelled healthy have a true region; they count for the pixels, not for the scores"
    return [line] if n else []


def coarser(summary: Mapping[str, Any]) -> list[str]:
    """[a line of summary.md] about images that were not measured at their full size; [] if all were."""
    n, side = summary["n_shrunk"], summary["settings"]["resolution"]
    line = f"- resolution: {n} images with a shorter side of more than {side} pixels were measured at {side}"
    return [line] if n else []


def left_out(failed: Mapping[str, str]) -> list[str]:
    """[a line of summary.md] that names the images that were left out; [] if there are none."""
    if not failed:
        return []
    names = list(failed)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    reasons = "images that cannot be read, of a single value, or healthy with a true region"
    return [f"- left out, {reasons}: {len(names)} ({', '.join(names[:5])}{more})"]


def write(result: Evaluation, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all files of `output_dir` but the maps.

    Args:
        result: an `Evaluation`.
        folder: `output_dir`. Without a true region there are no `IMAGES`; those of an earlier run are deleted.
        rows: of the contact sheet, see `sheet_rows`.
    """
    summary = result.summary
    write_file(folder / "per_image.csv", result.per_image.to_csv(index=False).encode())
    write_file(folder / "summary.json", json.dumps(plain(summary), indent=2, allow_nan=False).encode())
    write_file(folder / "summary.md", report(summary).encode())
    for name in IMAGES if not rows else ():
        (folder / name).unlink(missing_ok=True)
    if rows:
        title = f"{len(rows)} of {summary['n_patients_with_region']} patients, evenly over the data set"
        save_png(contact_sheet(rows, list(rows[0]["maps"]), title=title), folder / "contact_sheet.png")
        title = f"pixels of {summary['n_with_region']} images"
        curves = {name: ranking for name, ranking in result.rankings.items() if name not in (CHANCE, RANDOM)}
        save_png(precision_recall_figure(curves, title=title), folder / "precision_recall.png")
        save_png(roc_figure(curves, title=title), folder / "roc.png")


def sheet_rows(images: Any, rows: Sequence[Row], maps: Mapping[str, Maps]) -> list[dict[str, Any]]:
    """Rows of the contact sheet: the first image of eight patients, evenly over the data set and not by success.

    Args:
        images: rows of the data set that have a true region.
        rows: `describe_row` of the same images.
        maps: {method: maps} of the same images.
    """
    firsts = sorted({row["group"]: i for i, row in reversed(list(enumerate(rows)))}.values())
    evenly = np.linspace(0, len(firsts) - 1, min(SHEET_ROWS, len(firsts))).round().astype(int)
    return [
        {
            "image": to_grey(images[i]["image"]).resize((rows[i]["width"], rows[i]["height"])),
            "mask": rows[i]["truth"].mask(),
            "maps": {name: maps_of_method[i] for name, maps_of_method in maps.items()},
            "title": rows[i]["patient"],
        }
        for i in (firsts[k] for k in evenly)
    ]


def plain(value: Any) -> Any:
    """A value in JSON's types; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.integer, np.floating)):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)
