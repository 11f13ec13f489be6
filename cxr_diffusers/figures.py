"""Curves, as matplotlib figures: losses, precision and recall, ROC."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = 4


def loss_curves(logs: Mapping[str, Path | str], *, parts: int = 60, title: str | None = None) -> Any:
    """Loss curves: one panel for each loss term, one line for each run.

    Args:
        logs: {name: path of a log.jsonl}. Every value except `step` and `lr` is a term; a step may lack some.
        parts: maximum number of points of a line; each is a mean over the same number of steps.

    Returns:
        matplotlib `Figure`, for `files.save_png`.

    Raises:
        ValueError: the logs hold no losses yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in logs.items()}
    terms = list(dict.fromkeys(key for lines in runs.values() for line in lines for key in line))
    terms = [term for term in terms if term not in ("step", "lr")]
    if not terms:
        raise ValueError(f"expected losses in {list(map(str, logs.values()))}, got none")
    window = max(1, max(line["step"] for lines in runs.values() for line in lines) // parts)
    rows = -(-len(terms) // COLUMNS)
    figure = Figure(figsize=(2.8 * COLUMNS, 2.1 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot's global state
    for i, term in enumerate(terms):
        axes = figure.add_subplot(rows, COLUMNS, i + 1)
        for (name, lines), style in zip(runs.items(), line_styles(), strict=False):
            axes.plot(*means(lines, term, window), label=name, **style)
        axes.set_title(term, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title or 'losses'} (unweighted terms; means of {window} steps)", fontsize=10)
    return figure


def means(lines: Sequence[Mapping], term: str, window: int) -> tuple[np.ndarray, np.ndarray]:
    """[{"step": ..., term: ...}] -> (steps, means) over `window` steps each; steps without the term are skipped."""
    steps, values = np.array([[line["step"], line[term]] for line in lines if term in line]).reshape(-1, 2).T
    groups = ((steps - 1) // window).astype(int)
    centres, averages = (
        np.array([part[groups == group].mean() for group in np.unique(groups)]) for part in (steps, values)
    )
    return centres, averages


def precision_recall_figure(rankings: Mapping[str, Any], *, title: str | None = None) -> Any:
    """Precision against recall, one curve for each method.

    Args:
        rankings: {name: `metrics.Ranking`}, all of the same images and masks.

    Returns:
        matplotlib `Figure`, for `save_png`; the legend gives the average precision. The dotted line is chance.
    """
    figure, axes = _axes("recall", "precision", title)
    for (name, ranking), style in zip(rankings.items(), line_styles(), strict=False):
        recall, precision, _ = ranking.curve()
        axes.step(recall, precision, where="pre", label=f"{name}  AP {ranking.average_precision():.3f}", **style)
    axes.axhline(ranking.prevalence, color="0.5", linestyle=":", label=f"chance  AP {ranking.prevalence:.3f}")
    axes.legend(frameon=False, fontsize=8)
    return figure


def roc_figure(rankings: Mapping[str, Any], *, title: str | None = None) -> Any:
    """True-positive rate against false-positive rate; arguments and result as in `precision_recall_figure`."""
    figure, axes = _axes("false-positive rate", "true-positive rate", title)
    for (name, ranking), style in zip(rankings.items(), line_styles(), strict=False):
        true, _, false = ranking.curve()
        label = f"{name}  AUROC {ranking.auroc():.3f}"
        axes.plot(np.r_[0, false, 1], np.r_[0, true, 1], label=label, **style)
    axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="chance  AUROC 0.500")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def line_figure(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    xlabel: str,
    *,
    ylabel: str = "",
    title: str | None = None,
    ylim: tuple[float, float] = (0, 1.02),
) -> Any:
    """Lines over a common axis, with a marker at each value.

    Args:
        x: N numbers.
        lines: {name: N numbers}.

    Returns:
        matplotlib `Figure`, for `save_png`.
    """
    figure, axes = _axes(xlabel, ylabel, title)
    axes.set(xlim=(min(x) - 0.02 * (max(x) - min(x) or 1), max(x) + 0.02 * (max(x) - min(x) or 1)), ylim=ylim)
    for (name, y), style in zip(lines.items(), line_styles(), strict=False):
        axes.plot(x, y, marker="o", markersize=3, label=name, **style)
    axes.legend(frameon=False, fontsize=8)
    return figure


def line_styles() -> Iterator[dict]:
    """Line styles in colours for colour-blind readers too (Okabe & Ito 2008), repeated with other dashes."""
    for dash in ("-", "--", "-.") * 100:
        for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"):
            yield {"color": colour, "linestyle": dash, "linewidth": 1.4}


def _axes(xlabel, ylabel, title):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot's global state
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1.02), xlabel=xlabel, ylabel=ylabel, title=title or "")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
