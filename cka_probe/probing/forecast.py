"""What a run will take, before it starts: shapes and MACs from a network without data.

The network is copied to torch's meta device and called there: shapes and costs come out, no number
is computed and no forward of the real network is spent.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.activations.hooks import Collector, Tap
from cka_probe.activations.macs import MacCounter
from cka_probe.engine.memory import exact_bytes, minibatch_bytes, sketch_bytes


@dataclass(frozen=True)
class Estimate:
    """A rough forecast.

    Attributes:
        gmacs: per image, all views together.
        entries: m, layers times views.
        seconds: forwards at the rate that a short convolution just ran at; within a factor of
            about three, as networks differ in how well they use a machine.
        memory: bytes above the networks themselves: a batch in every view, the largest
            activations, Grams, and what the estimator keeps.
        widths: features of every entry.
    """

    gmacs: float
    entries: int
    seconds: float
    memory: int
    widths: tuple[int, ...] = ()


def estimate(
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    n_images: int,
    batch_size: int,
    layers: Any = None,
    reduce: Any = "flatten",
    estimator: str = "minibatch",
    sketch_size: int = 512,
) -> Estimate | None:
    """Forecast time and memory of a probe; None where the network cannot be called without data.

    Args:
        models: view -> network.
        shapes: view -> (c, h, w) of one input.
        n_images: images in the run.
        batch_size: images per batch.
        layers: as in `probe`.
        reduce: as in `probe`.
        estimator: "minibatch", "exact" or "sketch".
        sketch_size: k, for "sketch".
    """
    macs = 0
    every: list[int] = []
    seen = [0]  # numbers in one image's output, of every module

    def look(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output.numel() // 2)

    try:
        for view, model in models.items():
            ghost = _ghost(model)
            widths: list[int] = []
            counter = MacCounter()

            def sink(tap: Tap, x: Tensor, widths: list[int] = widths) -> None:
                widths.append(x.shape[1])

            for module in ghost.modules():
                module.register_forward_hook(look)
            with Collector(ghost, layers, reduce=reduce) as collector, counter:
                collector.run(torch.empty(2, *shapes[view], device="meta"), sink)
            macs += counter.macs() // 2
            every += widths
    except Exception:  # any network, any failure: an estimate is a courtesy
        return None
    if not every:
        return None
    inputs = sum(torch.Size(shape).numel() for shape in shapes.values())
    held = 4 * batch_size * (inputs + 4 * max(seen))
    sizes = [(width, 4) for width in every]
    if estimator == "exact":
        held += exact_bytes(n_images, sizes)
    elif estimator == "sketch":
        held += sketch_bytes(n_images, sizes, sketch_size, batch_size)
    else:
        held += minibatch_bytes(len(every), batch_size)
    seconds = macs * n_images / _macs_per_second()
    return Estimate(macs / 1e9, len(every), seconds, held, tuple(every))


def _ghost(model: nn.Module) -> nn.Module:
    """A copy on the meta device, without the user's hooks."""
    ghost = copy.deepcopy(model).to("meta")
    for module in ghost.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return ghost


def _macs_per_second() -> float:
    """The rate of a 3 x 3 convolution with 64 channels on a 56 x 56 map, the best of three."""
    x, w = torch.zeros(8, 64, 56, 56), torch.zeros(64, 64, 3, 3)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        F.conv2d(x, w, padding=1)
        best = min(best, time.perf_counter() - began)
    return 8 * 56 * 56 * 64 * 64 * 9 / best / 2  # networks reach about half of it
