"""Inside trained networks: how alike the scales are where they meet, and if they pull apart."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.scales.arms import ARMS, BATCH, made
from experiments.scales.execute import RE_ESTIMATED_ON, weights
from experiments.scales.manifest import Run
from experiments.scales.tasks import Held, Task
from msun import evaluate, recalibrated
from msun.network.model import MSUN

__all__ = ["LOOKED_AT", "inside", "look", "table"]

LOOKED_AT = (("lean+small", "layer1"), ("lean+small", "layer3"), ("d3+small", "layer1"),
             ("g+small", "layer1"), ("c2", "layer1"))  # fmt: skip
BATCHES = 30


def inside(net: MSUN, train: Held, val: Held, *, batches: int = BATCHES) -> list[dict[str, Any]]:
    """Each pair of scales: CKA of what the trunk gets, and the cosine of their gradients in it.

    Args:
        net: trained.
        train: images whose gradients are taken, in training mode, batch by batch.
        val: images on which CKA with the largest scale is taken, statistics re-estimated.
        batches: of gradients, their cosines are averaged.

    Returns:
        A row a pair: "scale", "other", "cosine", and "cka" where the other is the largest.
    """
    how: dict[str, Any] = {"batch_size": 250, "progress": False}
    shown = recalibrated(net, train, net.scales, n_images=RE_ESTIMATED_ON, **how)
    frame = evaluate(shown, val, net.scales, latency=False, **how).set_index("size_px")
    shared = [p for p in net.tail.parameters() if p.requires_grad]
    pairs = list(combinations(net.scales, 2))
    cosines = dict.fromkeys(pairs, 0.0)
    net.train()
    for k in range(batches):
        x, y = train.stacked(range(BATCH * k, BATCH * (k + 1)))
        pulls = {s: _gradient(net, x, y, s, shared) for s in net.scales}
        for a, b in pairs:
            cosines[a, b] += float(F.cosine_similarity(pulls[a], pulls[b], dim=0)) / batches
    return [
        {"scale": a, "other": b, "cosine": cosines[a, b],
         "cka": float(frame.loc[a, "cka"]) if b == net.reference else float("nan")}
        for a, b in pairs
    ]  # fmt: skip


def _gradient(net: MSUN, x: Tensor, y: Tensor, side: int, shared: list[Any]) -> Tensor:
    """Of one scale's loss in what all scales share; what it does not reach has none."""
    small = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    loss = F.cross_entropy(net.step(small, side)[0], y)
    found = torch.autograd.grad(loss, shared, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
    return torch.cat([part.flatten() for part in parts])


def look(task: Task, net: str, train: Held, val: Held, runs: Path) -> pd.DataFrame:
    """The networks of seed 0 that are in the working folder.

    Args:
        task: of the runs.
        net: the backbone.
        train: images.
        val: images.
        runs: folder of the trained networks.
    """
    rows = []
    for arm, cut in LOOKED_AT:
        path = runs / Run(task.name, net, arm, 0, cut=cut).key / "model.pt"
        if path.exists():
            model = made(ARMS[arm], task, net, at=cut, seed=0)
            model.load_state_dict(weights(path))
            found = inside(model, train, val)
            rows += [{"task": task.name, "net": net, "arm": arm, "cut": cut, **r} for r in found]
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A network a row."""
    out = []
    for (task, net, arm, cut), part in rows.groupby(["task", "net", "arm", "cut"], sort=False):
        row = {"task": task, "net": net, "arm": arm, "cut": cut}
        for _, r in part.iterrows():
            if r["cka"] == r["cka"]:
                row[f"CKA {int(r['scale'])} with {int(r['other'])} px"] = round(r["cka"], 3)
        for _, r in part.iterrows():
            row[f"cosine {int(r['scale'])}, {int(r['other'])} px"] = round(r["cosine"], 3)
        out.append(row)
    return pd.DataFrame(out)
