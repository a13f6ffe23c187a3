"""Sizes between the scales in training: how often they are drawn, and what a step then costs."""

from __future__ import annotations

import math

from msun.network.model import MSUN
from msun.network.policy import is_native, served_sides

__all__ = ["ranges", "share", "step_macs"]

_USUAL = 0.5


def share(net: MSUN, asked: float | None = None) -> float:
    """In what share of the steps a scale learns the sizes that it serves.

    Args:
        net: the network.
        asked: as in `TrainConfig.between`.

    Returns:
        What was asked; where nothing was, a half for networks that resize images between their
        scales, and 0 for others.
    """
    if asked is not None:
        return asked
    return _USUAL if net.policy.inputs != "native" and len(net.scales) > 1 else 0.0


def ranges(net: MSUN) -> dict[int, tuple[int, int]]:
    """The lowest and highest side that each scale learns where sizes between are drawn.

    Those that it serves. Where it gets them as they are and cannot take every one of them (a
    network that wants multiples of 32), it learns its own side alone.

    Args:
        net: the network.
    """
    found = served_sides(net.scales, net.policy.routing)
    for scale, (low, high) in found.items():
        native = is_native(net.policy, scale, net.reference)
        if native and not all(_takes(net, side, scale) for side in range(low, high + 1)):
            found[scale] = (scale, scale)
    return found


def _takes(net: MSUN, side: int, scale: int) -> bool:
    try:
        net.plan(side, scale=scale)
    except ValueError:
        return False
    return True


def step_macs(net: MSUN, asked: float | None = None) -> float:
    """Forward MACs of one image in one step of training, each scale once; expected, where drawn.

    Args:
        net: the network.
        asked: as in `TrainConfig.between`.
    """
    often, total = share(net, asked), float(sum(net.macs(side) for side in net.scales))
    for scale, (low, high) in (ranges(net) if often else {}).items():
        if is_native(net.policy, scale, net.reference):
            # a side is drawn uniform in the logarithm, rounded down (`msun.data.crops`)
            chance = [math.log((side + 1) / side) for side in range(low, high + 1)]
            costs = [net.plan(side, scale=scale).macs for side in range(low, high + 1)]
            drawn = sum(p * macs for p, macs in zip(chance, costs, strict=True)) / sum(chance)
            total += often * (drawn - net.plan(scale, scale=scale).macs)
    return total
