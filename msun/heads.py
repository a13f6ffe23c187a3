"""What the part of a network before each cut costs, as it stands, at several input sizes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from cka_probe.collect import Collector, Tap
from cka_probe.layers import unwrap
from cka_probe.provenance import MacCounter
from msun.costs import meta_copy
from msun.cut import Cut, example_images

__all__ = ["head_costs"]

_Counts = tuple[dict[str, int], Counter[str]]  # MACs up to the last run of a module, and its runs


def head_costs(model: nn.Module, cuts: Iterable[Cut], sides: Sequence[int]) -> pd.DataFrame:
    """Parameters and MACs of everything before each cut.

    One forward a size on a copy without data (with data where the network needs some). The numbers
    are those of the network's own layers with their own strides; a subnet that keeps its map large
    costs more, up to the square of the strides taken out.

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
