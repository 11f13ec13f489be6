"""What an evaluation found, for people: Markdown, and the files of `output_dir`."""

import json

import numpy as np

from ..figures import precision_recall_figure, roc_figure
from ..files import save_png, write_file
from ..visualization import contact_sheet
from .controls import CHANCE, RANDOM

COLUMNS = {  # of the table: a number of the summary, its heading
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


def summary_table(result, columns=COLUMNS):
    """Markdown: a row per method and control, "value [low, high]" with 95 % intervals, then the paired differences.

    Args:
        result: an `Evaluation`, or its `summary` as read back from summary.json.
        columns: {number: heading}.
    """
    summary = result if isinstance(result, dict) else result.summary
    shown = {k: v for k, v in columns.items() if any(k in numbers for numbers in summary["rows"].values())}
    parts = [markdown("", summary["rows"], shown)]
    if summary["differences"]:
        parts.append("Paired differences, same replicates; an interval without 0 is a difference.\n")
        parts.append(markdown("difference", summary["differences"], shown, sign="+"))
    for view, part in summary.get("image_level_by_view", {}).items():
        image_columns = {k: v for k, v in shown.items() if k.startswith("image_")}
        parts.append(
            f"Scores among view {view} alone: {part['n_images']} images, {part['n_healthy']} of them healthy\n"
        )
        parts.append(markdown("", part["rows"], image_columns))
    for name, stratum in summary["strata"].items():
        parts.append(f"{name}: {stratum['n_images']} images of {stratum['n_patients']} patients\n")
        parts.append(markdown("", stratum["rows"], {k: v for k, v in shown.items() if not k.startswith("image_")}))
    return "\n".join(parts)


def counterfactual_table(result, columns=COUNTERFACTUALS):
    """Markdown: how good the counterfactuals are, a row per method and control, and what was not measured.

    Arguments as in `summary_table`; "" where there is neither a counterfactual nor a judge.
    """
    summary = result if isinstance(result, dict) else result.summary
    section = summary.get("counterfactuals") or {"rows": {}, "not_measured": {}}
    shown = {k: v for k, v in columns.items() if any(k in numbers for numbers in section["rows"].values())}
    lines = [markdown("counterfactuals", section["rows"], shown)] if shown else []
    if "judge_auroc" in section:
        called = each(section["n_called_diseased"], "{}")
        own = each(section["judge_auroc"], "{:.3f}")
        lines.append(
            f"Judge: {summary['settings']['judge']}. Of {section['n_diseased']} diseased pictures it calls diseased: "
            f"{called}. Its own AUROC, these against {section['n_healthy']} healthy pictures, as the methods see them: "
            f"{own}. KID and FID are over its features, against the same healthy pictures; they are not comparable "
            f"with those of another network.\n"
        )
    if section["not_measured"] and summary["settings"].get("judge"):
        lines.append("Not judged: " + "; ".join(f"{k}, {why}" for k, why in section["not_measured"].items()) + ".\n")
    return "\n".join(lines)


def markdown(corner, rows, columns, sign=""):
    lines = [f"| {corner} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, numbers in rows.items():
        cells = [cell(numbers.get(column), sign) for column in columns]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(interval, sign=""):
    if interval is None or not is_number(interval["value"]):
        return "–"
    value = f"{interval['value']:{sign}.3f}"
    if not is_number(interval["low"]):
        return value
    return f"{value} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def each(numbers, form):
    """{method: number} as text: the number where all have the same, else each with its method."""
    texts = {name: form.format(value) if is_number(value) else "–" for name, value in numbers.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({name})" for name, text in texts.items())


def is_number(value):
    return value is not None and np.isfinite(value)


def report(summary):
    """summary.md: what was measured on what, the table, and what was not defined."""
    settings = summary["settings"]
    undefined = ", ".join(f"{column} {n}" for column, n in summary["undefined"].items()) or "none"
    lines = [
        f"# {', '.join(settings['methods'])}",
        "",
        f"{summary['n_images']} images of {summary['n_patients']} patients, {summary['n_with_region']} with a true "
        f"region ({summary['n_patients_with_region']} patients); {summary['n_healthy']} healthy images "
        f"beside them. Brackets: 95 % bootstrap intervals over patients, {settings['n_bootstrap']} replicates.",
        "",
        summary_table(summary),
        counterfactual_table(summary),
        f"- seconds per image: {', '.join(f'{n} {s:.3g}' for n, s in summary['seconds_per_image'].items())}",
        f"- threshold: {settings['threshold']} ({settings['threshold_from']}); controls mark equally many pixels",
        f"- smoothing: {settings['smoothing']} of the shorter side; seed {settings['seed']}",
        f"- not defined, in lines of per_image.csv: {undefined}",
        "",
    ]
    return "\n".join(lines)


def write(result, folder, rows):
    """All files of `output_dir` but the maps; `rows` are those of the contact sheet."""
    summary = result.summary
    write_file(folder / "per_image.csv", result.per_image.to_csv(index=False).encode())
    write_file(folder / "summary.json", json.dumps(plain(summary), indent=2, allow_nan=False).encode())
    write_file(folder / "summary.md", report(summary).encode())
    if rows:
        title = f"{len(rows)} of {summary['n_patients_with_region']} patients, evenly over the data set"
        save_png(contact_sheet(rows, list(rows[0]["maps"]), title=title), folder / "contact_sheet.png")
        title = f"pixels of {summary['n_with_region']} images"
        curves = {name: ranking for name, ranking in result.rankings.items() if name not in (CHANCE, RANDOM)}
        save_png(precision_recall_figure(curves, title=title), folder / "precision_recall.png")
        save_png(roc_figure(curves, title=title), folder / "roc.png")


def sheet_rows(dataset, seen, found, methods):
    """Rows of the contact sheet: the first image of eight patients, evenly over the data set and not by success."""
    firsts = sorted({row["group"]: i for i, row in reversed(list(enumerate(seen)))}.values())
    evenly = np.linspace(0, len(firsts) - 1, min(SHEET_ROWS, len(firsts))).round().astype(int)
    return [
        {
            "image": dataset[found[i]]["image"],
            "mask": seen[i]["truth"],
            "maps": {method.name: method.maps[found[i]] for method in methods},
            "title": seen[i]["patient"],
        }
        for i in (firsts[k] for k in evenly)
    ]


def plain(value):
    """The same, in what JSON knows; numbers that are not defined become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.integer, np.floating)):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)
