"""A run's log.jsonl -> one picture of how each loss fell."""

import json
from pathlib import Path

import numpy as np

from .visualization import line_styles

COLUMNS = 4


def loss_curves(logs, *, parts=60, title=None):
    """One panel a loss term, one line a run; each point is the mean of the steps of a `parts`-th of the longest run.

    Args:
        logs: {name: path of a log.jsonl}. Every value but `step` and `lr` is a term; a step may lack some.
        parts: points along a line, at most.

    Returns:
        matplotlib `Figure`, for `visualization.save_png`.

    Raises:
        ValueError: nothing has been logged yet.
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


def means(lines, term, window):
    """[{"step": ..., term: ...}] -> (steps, means): of each `window` of steps, those that have the term."""
    steps, values = np.array([[line["step"], line[term]] for line in lines if term in line]).reshape(-1, 2).T
    groups = ((steps - 1) // window).astype(int)
    kept = np.unique(groups)
    return tuple(np.array([part[groups == group].mean() for group in kept]) for part in (steps, values))
