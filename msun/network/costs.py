"""What lies before each cut costs at several sizes: as it stands, and as subnets of a preset."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import pandas as pd
import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import Collector, Tap
from cka_probe.activations.layers import unwrap
from cka_probe.activations.macs import MacCounter
from msun.cutting.cuts import Cut, example_images, heads
from msun.cutting.dataflow import Part
from msun.network.builder import map_axes, small_subnets
from msun.network.functional_layers import settled
from msun.network.policy import check_scales, policy_of
from msun.network.shape_probe import Shadow, meta_copy

__all__ = ["head_costs", "subnet_costs"]

_Counts = tuple[dict[str, int], Counter[str]]  # MACs up to the last run of a module, and its runs


def head_costs(model: nn.Module, cuts: Iterable[Cut], sides: Sequence[int]) -> pd.DataFrame:
    """Parameters and MACs of everything before each cut.

    One forward a size on a copy without data (with data where the network needs some). The numbers
    are those of the network's own layers with their own strides; what a subnet that keeps its map
    large costs, `subnet_costs` says.

    Args:
        model: the network that was cut; it is left as it is.
        cuts: what `find_cuts` gave.
        sides: of square inputs, in pixels.

    Returns:
        A row a cut, in the order given: parameters, and gmacs_S for each side S (convolutions and
        matrix products, 1e9 multiply-accumulates an image); nan where the network stops with an
        error before the cut is reached.

    Raises:
        ValueError: sides that are not positive.
    """
    cuts, model = list(cuts), unwrap(model)
    if bad := [side for side in sides if side < 1]:
        raise ValueError(f"bad size: {bad[0]}: a side is at least 1 pixel")
    channels, dtype = example_images(model).shape[1], example_images(model).dtype
    names = [cut.name for cut in cuts]
    shapes = {side: (1, channels, side, side) for side in sides}
    found, stopped = _counted(meta_copy(model), names, shapes, "meta", dtype)
    if stopped:  # at that size, or for want of data
        again = {side: shapes[side] for side in stopped}
        found |= _counted(copy.deepcopy(model).cpu(), names, again, "cpu", dtype)[0]
    most: Counter[str] = Counter()
    for _, runs in found.values():
        most |= runs
    columns: dict[str, list[float]] = {"parameters": [float(cut.parameters) for cut in cuts]}
    for side in sides:
        macs, runs = found[side]
        columns[f"gmacs_{side}"] = [
            macs[name] / 1e9 if 0 < runs[name] == most[name] else math.nan for name in names
        ]
    frame: pd.DataFrame = pd.DataFrame(columns, index=pd.Index(names, name="layer"))
    return frame


def subnet_costs(
    model: nn.Module, cuts: Iterable[Cut], scales: Sequence[int], *, preset: str = "lean"
) -> pd.DataFrame:
    """Parameters and MACs of the subnets that `build` would make at each cut.

    Those of the smaller scales have strides taken out, and so cost more than the network's own
    layers at that size (`head_costs`). Counted on copies without data, except for networks that
    need some. The paper's hand-made subnets are not among them.

    Args:
        model: the network that was cut; it is left as it is.
        cuts: what `find_cuts` gave.
        scales: sides in pixels; the largest is the reference.
        preset: whose policy says how large the maps of small images stay.

    Returns:
        A row a cut, in the order given: parameters of one subnet, and gmacs_S for each scale S (1e9
        multiply-accumulates an image); nan for a scale that the subnet cannot take.

    Raises:
        ValueError: bad scales, an unknown preset, or a reference that the network cannot take.
    """
    cuts, model, sides = list(cuts), unwrap(model), check_scales(scales)
    policy = policy_of(preset).but(subnets="shared")  # costs are the same, and nothing is copied
    example = example_images(model, sides[-1])
    columns: dict[str, list[float]] = {"parameters": [float(cut.parameters) for cut in cuts]}
    columns |= {f"gmacs_{side}": [] for side in sides}
    for _, head in heads(model, [cut.name for cut in cuts], example):
        assert isinstance(head, Part)
        own = settled(head)
        axes, known = map_axes(own, example), (1, *example.shape[1:])
        like = Shadow(own, known)
        for side in sides:
            macs = math.nan
            with suppress(ValueError):
                pair = tuple(sorted({side, sides[-1]}))
                made, _ = small_subnets(own, pair, policy, None, "copied", example, axes)
                seen = Shadow(made[side], like=like).see((1, known[1], side, side))
                macs = math.nan if seen.fault else seen.macs / 1e9
            columns[f"gmacs_{side}"].append(macs)
    frame: pd.DataFrame = pd.DataFrame(
        columns, index=pd.Index([cut.name for cut in cuts], name="layer")
    )
    return frame


def _counted(
    model: nn.Module,
    names: list[str],
    shapes: Mapping[int, tuple[int, ...]],
    device: str,
    dtype: torch.dtype,
) -> tuple[dict[int, _Counts], list[int]]:
    """For each side the MACs done when each module puts out; and the sides that ended in error."""
    found, stopped = {}, []
    with Collector(model, names) as collector:
        for side, shape in shapes.items():
            macs: dict[str, int] = {}
            runs: Counter[str] = Counter()
            found[side] = (macs, runs)
            counter = MacCounter()

            def sink(
                tap: Tap,
                _: Tensor,
                counter: MacCounter = counter,
                macs: dict[str, int] = macs,
                runs: Counter[str] = runs,
            ) -> None:
                macs[tap.path] = counter.macs()
                runs[tap.path] += 1

            x = torch.zeros(shape, dtype=dtype, device=device)
            try:
                with counter:
                    collector.run(x, sink)
            except Exception:  # what came before counts
                stopped.append(side)
    return found, stopped
