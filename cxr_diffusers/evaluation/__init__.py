"""Evaluation of any pipeline on any data set: one table, beside the controls that a map has to beat."""

from .chexlocalize import evaluate_chexlocalize
from .comparison import Evaluation, compare, evaluate
from .plan import load_plan, run_plan
from .report import counterfactual_table, summary_table

__all__ = [
    "Evaluation",
    "compare",
    "counterfactual_table",
    "evaluate",
    "evaluate_chexlocalize",
    "load_plan",
    "run_plan",
    "summary_table",
]
