"""Training with sizes between the scales: how often, from which ranges, and at what cost."""

from __future__ import annotations

import math

from msun.network.model import MSUN
from msun.network.policy import is_native, served_sides

__all__ = ["resolve_between", "side_ranges", "step_macs"]

_DEFAULT = 0.5  # with 1, hardly any crop would be as sharp as an image of the scale itself


def resolve_between(net: MSUN, between: float | None = None) -> float:
    """Resolve `TrainConfig.between`: the share of steps with sizes between the scales.

    Args:
        net: the network.
        between: the option; None for the default.

    Returns:
        The option; by default 0.5 for networks that resize images between their scales, else 0.
    """
    if between is not None:
        return between
    return _DEFAULT if net.policy.inputs != "native" and len(net.scales) > 1 else 0.0


def side_ranges(net: MSUN) -> dict[int, tuple[int, int]]:
    """The range of sides from which training draws, for each scale.

    It is the range that is routed to the scale. If the subnet gets images without resizing and
    cannot take every side (a network that needs multiples of 32), it is the scale alone.

    Args:
        net: the network.

    Returns:
        {scale: (lowest, highest side)} in pixels.
    """
    found = served_sides(net.scales, net.policy.routing)
    for scale, (low, high) in found.items():
        native = is_native(net.policy, scale, net.reference)
        if native and not all(_takes(net, side, scale) for side in range(low, high + 1)):
            found[scale] = (scale, scale)
    return found


def _takes(net: MSUN, side: int, scale: int) -> bool:
    """Whether the subnet of a scale takes images of a side."""
    try:
        net.plan(side, scale=scale)
    except ValueError:
        return False
    return True


def step_macs(net: MSUN, between: float | None = None) -> float:
    """Expected forward MACs for one image in one training step, at all scales.

    Args:
        net: the network.
        between: the option `TrainConfig.between`; None for the default.

    Returns:
        Multiply-accumulates, the mean over drawn sides.
    """
    often, total = resolve_between(net, between), float(sum(net.macs(side) for side in net.scales))
    for scale, (low, high) in (side_ranges(net) if often else {}).items():
        if is_native(net.policy, scale, net.reference):
            # a side s is drawn uniform in the logarithm and rounded down (`msun.data.crops`), so it
            # has the weight log((s + 1) / s)
            chance = [math.log((side + 1) / side) for side in range(low, high + 1)]
            costs = [net.plan(side, scale=scale).macs for side in range(low, high + 1)]
            drawn = sum(p * macs for p, macs in zip(chance, costs, strict=True)) / sum(chance)
            total += often * (drawn - net.plan(scale, scale=scale).macs)
    return total
