"""Multi-scale networks: where to cut a CNN, one built on the cut, trained and measured by size.

After Liu, Zhu, Liu, "Multi-scale Unified Network for Image Classification" (2024). Names are
loaded when they are first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msun.cutting.cuts import cut as cut
    from msun.cutting.cuts import cut_points as cut_points
    from msun.cutting.cuts import find_cuts as find_cuts
    from msun.evaluation.accuracy import compare as compare
    from msun.evaluation.accuracy import evaluate as evaluate
    from msun.evaluation.calibration import calibrate as calibrate
    from msun.evaluation.calibration import recalibrated as recalibrated
    from msun.metrics import Predictions as Predictions
    from msun.network.builder import build as build
    from msun.network.checkpoint import load as load
    from msun.network.checkpoint import save as save
    from msun.network.classifier import replace_classifier as replace_classifier
    from msun.network.costs import subnet_costs as subnet_costs
    from msun.network.model import MSUN as MSUN
    from msun.splitting.choice import SplitChoice as SplitChoice
    from msun.splitting.rules import SPLIT_RULES as SPLIT_RULES
    from msun.splitting.suggest import suggest_split as suggest_split
    from msun.training.config import TrainConfig as TrainConfig
    from msun.training.trainer import train as train

# public name -> the module that defines it
_HOMES = {
    "MSUN": "msun.network.model",
    "Predictions": "msun.metrics",
    "SPLIT_RULES": "msun.splitting.rules",
    "SplitChoice": "msun.splitting.choice",
    "TrainConfig": "msun.training.config",
    "build": "msun.network.builder",
    "calibrate": "msun.evaluation.calibration",
    "compare": "msun.evaluation.accuracy",
    "cut": "msun.cutting.cuts",
    "cut_points": "msun.cutting.cuts",
    "evaluate": "msun.evaluation.accuracy",
    "find_cuts": "msun.cutting.cuts",
    "load": "msun.network.checkpoint",
    "replace_classifier": "msun.network.classifier",
    "recalibrated": "msun.evaluation.calibration",
    "save": "msun.network.checkpoint",
    "subnet_costs": "msun.network.costs",
    "suggest_split": "msun.splitting.suggest",
    "train": "msun.training.trainer",
}
_MODULES = {"losses": "msun.training.losses", "norms": "msun.network.norms", "plot": "msun.plot"}
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
    "load",
    "losses",
    "plot",
    "recalibrated",
    "replace_classifier",
    "save",
    "subnet_costs",
    "suggest_split",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, and no module that happens to be loaded."""
    return sorted(__all__)
