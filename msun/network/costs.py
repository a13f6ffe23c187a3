"""Costs of the subnets of a preset, for each cut and scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

import pandas as pd
from torch import nn

from cka_probe.activations.layers import unwrap
from msun.cutting.cuts import Cut, example_images, heads
from msun.cutting.halves import Part
from msun.network.builder import map_axes, small_subnets
from msun.network.functional_layers import with_functional_modules
from msun.network.policy import policy_of, sorted_scales
from msun.network.shape_probe import ShapeProbe

__all__ = ["subnet_costs"]


def subnet_costs(
    model: nn.Module, cuts: Iterable[Cut], scales: Sequence[int], *, preset: str = "lean"
) -> pd.DataFrame:
    """Parameters and MACs of the subnets that `build` would make at each cut.

    Subnets of smaller scales have fewer strides, so they cost more than the layers of the network
    at that size. MACs are counted on the meta device, without data, where the network can run
    there. The paper's hand-made subnets are not considered.

    Args:
        model: the network; left unchanged.
        cuts: cuts of the network, from `find_cuts`.
        scales: sides in pixels; the largest is the reference.
        preset: name of the policy, which sets how many strides are removed.

    Returns:
        One row per cut, in the given order: parameters of one subnet, and gmacs_S for each scale S
        (1e9 multiply-accumulates per image); nan for a scale that the subnet cannot take.

    Raises:
        ValueError: bad scales, an unknown preset, or a reference that the network cannot take.
    """
    cuts, model, sides = list(cuts), unwrap(model), sorted_scales(scales)
    policy = policy_of(preset).but(subnets="shared")  # same costs, without copies
    example = example_images(model, sides[-1])
    columns: dict[str, list[float]] = {"parameters": [float(cut.parameters) for cut in cuts]}
    columns |= {f"gmacs_{side}": [] for side in sides}
    for _, head in heads(model, [cut.name for cut in cuts], example):
        assert isinstance(head, Part)
        own = with_functional_modules(head)
        axes, known = map_axes(own, example), (1, *example.shape[1:])
        like = ShapeProbe(own, known)
        for side in sides:
            macs = math.nan
            with suppress(ValueError):
                pair = tuple(sorted({side, sides[-1]}))
                made, _ = small_subnets(own, pair, policy, None, "copied", example, axes)
                result = ShapeProbe(made[side], like=like).run((1, known[1], side, side))
                macs = math.nan if result.fault else result.macs / 1e9
            columns[f"gmacs_{side}"].append(macs)
    frame: pd.DataFrame = pd.DataFrame(
        columns, index=pd.Index([cut.name for cut in cuts], name="layer")
    )
    return frame
