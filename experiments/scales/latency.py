"""How long an image takes in each arm's network: ratios to one network fed enlarged images."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.scales.arms import ARMS, made
from experiments.scales.manifest import CUT
from experiments.scales.tasks import TASKS

__all__ = ["TIMED", "timed"]

TIMED = {"a": "single", "c3": "c2", "d3+small": "d3+small", "g+small": "g+small",
         "lean+small": "lean+small", "paper": "paper"}  # fmt: skip
BATCH = 64
TURNS = 60


def timed(task_name: str, net: str, *, turns: int = TURNS) -> list[dict[str, Any]]:
    """Several turns, the arms in turn within each; one thread, untrained weights.

    Args:
        task_name: gives scales and sizes.
        net: the backbone.
        turns: how many.

    Returns:
        A row an arm and trained size: milliseconds for a batch, best turn, and the ratio to (a),
        which sees every image at the largest size: the median of the turns' own, since the machine
        is slower in some than in others. Resizing by the caller is not in it, that inside the
        network is.
    """
    task = TASKS[task_name]
    nets = {arm: made(ARMS[name], task, net, at=CUT, seed=0).eval() for arm, name in TIMED.items()}
    took: dict[tuple[str, int], list[float]] = {}
    for turn in range(turns + 1):
        for side in task.scales:
            for arm, model in nets.items():
                shown = task.reference if arm == "a" else side
                x = torch.zeros(BATCH, task.channels, shown, shown)
                began = time.perf_counter()
                with torch.inference_mode():
                    model(x)
                seconds = time.perf_counter() - began
                if turn:  # the first one warms up
                    took.setdefault((arm, side), []).append(seconds)
    return [
        {"task": task_name, "net": net, "arm": arm, "size": side,
         "ms_64": round(1e3 * min(mine), 3),
         "ratio": round(float(np.median(np.divide(mine, took["a", side]))), 3)}
        for (arm, side), mine in took.items()
    ]  # fmt: skip


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Ratios, an arm a row and a size a column."""
    wide = rows.pivot_table(
        index=["task", "net", "arm"], columns="size", values="ratio", sort=False
    )
    return wide.rename(columns=lambda side: f"{side} px").reset_index()
