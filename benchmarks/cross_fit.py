"""Choose a row of a plan on one half of the patients and report it on the other half, both ways.

    cxr-diffusers evaluate --config method root=DATA --on implants boxes --out results_method
    python benchmarks/cross_fit.py --results results_method --data implants boxes
    python benchmarks/cross_fit.py --results results_method --data boxes effusion --metric image_auroc

A setting that is the best of many on some images is less good on others. Here each half of the patients gets the row
that was best on the other half, so the figures of the column "cross-fitted" are of images that had no part in the
choice. The program reads `per_image.csv` of each data set: nothing is computed again. The best row has the highest sum
of the metric over the data sets; a patient is in the same half in all of them. Brackets are 95 % bootstrap intervals
over patients, given the choice.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from machine import markdown

from cxr_diffusers.evaluation import metrics

METRICS = {  # name -> the column of per_image.csv
    "pixel_ap": "pixel_ap",  # the mean over images
    "hit_rate": "hit",
    "image_auroc": "score",  # label 0 against the others
}


def main(arguments=None):
    options = parser().parse_args(arguments)
    tables = {name: read(options.results / name / "per_image.csv", options.metric) for name in options.data}
    rows = options.rows or list(next(iter(tables.values())).scores)
    patients = np.unique(np.concatenate([table.groups for table in tables.values()]))
    lines, choices = [], []
    for seed in range(options.splits):
        first = set(np.random.default_rng(seed).permutation(patients)[: len(patients) // 2])
        halves = {name: np.array([group in first for group in table.groups]) for name, table in tables.items()}
        chosen = {side: choose(tables, halves, side, rows) for side in (True, False)}
        choices += chosen.values()
        lines.append({name: cross_fitted(table, halves[name], chosen) for name, table in tables.items()})
        if seed == 0:
            print(f"First split: chosen on one half {chosen[True]}, on the other {chosen[False]}.\n")
    header = ["", "cross-fitted", *rows, f"cross-fitted - {rows[0]}"]
    print(markdown(header, [table_row(name, tables[name], [line[name] for line in lines], rows) for name in tables]))
    counts = ", ".join(f"{name} {count}" for name, count in Counter(choices).most_common())
    print(f"\nChosen in {options.splits} splits, two halves each: {counts}.")


class Table:
    """`per_image.csv` of one data set: the patient of each image, and its values under each row of the plan.

    Attributes:
        groups: (N,) patients.
        labels: (N,) for image_auroc; None: the metric is a mean over images.
        scores: {row of the plan: (N,) values}.
    """

    def __init__(self, groups, labels, scores):
        self.groups, self.labels, self.scores = groups, labels, scores

    def statistic(self, row, chosen):
        """`statistic(weights)` of one row, over the images `chosen`: (R, N) counts -> (R,)."""
        values = self.scores[row]
        if self.labels is None:
            return metrics.mean_of(np.where(chosen, values, np.nan))
        return lambda weights: metrics.measure_images(values[chosen], self.labels[chosen], weights[:, chosen])["auroc"]


def read(path, metric):
    """`Table` of a file that `evaluate` wrote."""
    table = pd.read_csv(path)
    table = table[table.label.notna() if metric == "image_auroc" else table.part == "dataset"].copy()
    table["patient"] = table.patient.where(table.patient.notna(), table.path)
    wide = table.pivot(index=["part", "path", "patient", "label"], columns="method", values=METRICS[metric])
    wide = wide[list(dict.fromkeys(table.method))].dropna()
    labels = wide.index.get_level_values("label").to_numpy() if metric == "image_auroc" else None
    return Table(wide.index.get_level_values("patient").to_numpy(str), labels, {n: wide[n].to_numpy() for n in wide})


def choose(tables, halves, side, rows):
    """The row with the highest sum of the metric over the data sets, on the patients of one half."""

    def total(row):
        one = {name: np.ones((1, len(table.groups))) for name, table in tables.items()}
        return sum(table.statistic(row, halves[name] == side)(one[name])[0] for name, table in tables.items())

    return max(rows, key=total)


def cross_fitted(table, half, chosen):
    """`statistic(weights)`: each half under the row that was chosen on the other one; of AUROCs the mean of both."""
    if table.labels is None:
        return metrics.mean_of(np.where(half, table.scores[chosen[False]], table.scores[chosen[True]]))
    parts = [table.statistic(chosen[not side], half == side) for side in (True, False)]
    return lambda weights: sum(part(weights) for part in parts) / 2


def table_row(name, table, statistics, rows):
    """Cells of one data set: the mean over the splits, every row on all images, and the paired difference."""
    weights = metrics.patient_weights(table.groups)
    everyone = np.ones(len(table.groups), bool)

    def mean(w):
        return sum(statistic(w) for statistic in statistics) / len(statistics)

    plain = [table.statistic(row, everyone) for row in rows]
    cells = [interval(metrics.interval_of(statistic, weights)) for statistic in (mean, *plain)]
    difference = metrics.interval_of(lambda w: mean(w) - plain[0](w), weights)
    return [name, *cells, interval(difference, "+")]


def interval(result, sign=""):
    return f"{result.value:{sign}.3f} [{result.low:{sign}.3f}, {result.high:{sign}.3f}]"


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="the output folder of evaluate")
    parser.add_argument("--data", nargs="+", required=True, help="data sets of the plan")
    parser.add_argument("--rows", nargs="+", help="rows of the plan to choose from (default: all)")
    parser.add_argument("--metric", choices=METRICS, default="pixel_ap")
    parser.add_argument("--splits", type=int, default=10, help="random halves to average over")
    return parser


if __name__ == "__main__":
    main()
