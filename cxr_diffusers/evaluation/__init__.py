"""Any pipeline on any data set: one table, beside the controls that a map has to beat."""

from .comparison import Evaluation, compare, evaluate
from .report import summary_table

__all__ = ["Evaluation", "compare", "evaluate", "summary_table"]
