"""Multi-scale networks: where to cut a network, and the two halves."""

from cka_probe.interrupts import told

with told():
    from msun.build import build
    from msun.calibrate import calibrate, recalibrated
    from msun.checkpoint import load, save
    from msun.classifier import new_head
    from msun.cut import cut, cut_points, find_cuts
    from msun.evaluate import compare, evaluate
    from msun.heads import head_costs, subnet_costs
    from msun.model import MSUN
    from msun.scores import Predictions
    from msun.split import suggest_split
    from msun.split_choice import SplitChoice
    from msun.split_rules import SPLIT_RULES
    from msun.train import TrainConfig, train

__all__ = [
    "MSUN",
    "SPLIT_RULES",
    "Predictions",
    "SplitChoice",
    "TrainConfig",
    "build",
    "calibrate",
    "compare",
    "cut",
    "cut_points",
    "evaluate",
    "find_cuts",
    "head_costs",
    "load",
    "new_head",
    "recalibrated",
    "save",
    "subnet_costs",
    "suggest_split",
    "train",
]
