"""Any pipeline on any data set: one table, beside the controls that a map has to beat."""

from .comparison import Evaluation, compare, evaluate
from .plan import load_plan, run_plan
from .report import summary_table

__all__ = ["Evaluation", "compare", "evaluate", "load_plan", "run_plan", "summary_table"]
