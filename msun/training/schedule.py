"""The learning-rate schedule, and the parameter groups of the optimiser."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = ["learning_rate", "parameter_groups"]


def learning_rate(step: int, total: int, warmup: int, lr: float) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov & Hutter 2017).

    Args:
        step: number of the step, from 0.
        total: number of steps of the run.
        warmup: number of warm-up steps; the last one has the highest rate.
        lr: the highest rate.

    Returns:
        The learning rate.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_norms: bool
) -> list[dict[str, Any]]:
    """Parameter groups for SGD, without frozen parameters.

    Args:
        model: the network.
        weight_decay: weight decay of matrices and kernels.
        decay_norms: whether vectors (biases, weights of norms) decay too.

    Returns:
        Groups as `torch.optim.SGD` takes them.

    Raises:
        ValueError: every parameter is frozen.
    """
    free = [p for p in model.parameters() if p.requires_grad]
    if not free:
        raise ValueError("nothing to train: every parameter is frozen: unfreeze some")
    if decay_norms:
        return [{"params": free, "weight_decay": weight_decay}]
    kinds = {True: [p for p in free if p.ndim > 1], False: [p for p in free if p.ndim <= 1]}
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in kinds.items()
        if params
    ]
