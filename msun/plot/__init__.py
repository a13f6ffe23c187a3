"""Evaluations and splits as figures; each function takes `ax=None` and returns the Axes."""

from msun.plot.evaluation import accuracy, pareto
from msun.plot.split import split_curve

__all__ = ["accuracy", "pareto", "split_curve"]
