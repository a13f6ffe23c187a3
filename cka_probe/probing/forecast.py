"""Costs of a run before it starts: shapes and MACs from a copy of the network on the meta device.

A forward there yields shapes and operator counts but computes no number, so that no forward of the
real network is spent.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.activations.hooks import Collector, Tap
from cka_probe.activations.layers import Layers
from cka_probe.activations.macs import MacCounter
from cka_probe.activations.meta import meta_copy
from cka_probe.activations.reduce import Reducer
from cka_probe.engine.memory import exact_bytes, minibatch_bytes, sketch_bytes


@dataclass(frozen=True)
class Estimate:
    """A rough forecast of what a probe costs.

    Attributes:
        gmacs: GMACs per image, all views together.
        batch_bytes: bytes of one batch in every view and of the largest activations.
        widths: number of features of every entry (layer in a view).
    """

    gmacs: float
    batch_bytes: int
    widths: tuple[int, ...]


def estimate(
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    batch_size: int,
    layers: Mapping[str, Layers] | None = None,
    reduce: str | Reducer = "flatten",
    layout: str | None = None,
) -> Estimate | None:
    """Forecast the costs of a probe; None where the network cannot be called without data.

    Args:
        models: view -> network.
        shapes: view -> (c, h, w) of one input.
        batch_size: images per batch.
        layers: view -> layers as in `probe`; None for the default ones.
        reduce: as in `probe`.
        layout: as in `probe`.
    """
    macs = 0
    every: list[int] = []
    outputs = [0]  # numbers in one image's output, of every module

    def record(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.numel() // 2)

    try:
        for view, model in models.items():
            ghost = meta_copy(model)
            widths: list[int] = []
            counter = MacCounter()

            def sink(tap: Tap, x: Tensor, widths: list[int] = widths) -> None:
                widths.append(x.shape[1])

            for module in ghost.modules():
                module.register_forward_hook(record)
            with (
                Collector(
                    ghost, (layers or {}).get(view), reduce=reduce, layout=layout
                ) as collector,
                counter,
            ):
                # two images: batch norm in training mode refuses one
                collector.run(torch.empty(2, *shapes[view], device="meta"), sink)
            macs += counter.macs() // 2
            every += widths
    except Exception:  # an estimate is a courtesy: no failure of it may end a run
        return None
    if not every:
        return None
    inputs = sum(torch.Size(shape).numel() for shape in shapes.values())
    # 4 bytes a float32; four tensors as large as the largest output live at once in a block
    held = 4 * batch_size * (inputs + 4 * max(outputs))
    return Estimate(macs / 1e9, held, tuple(every))


def estimator_bytes(
    estimator: str,
    widths: Sequence[int],
    *,
    n_images: int,
    batch_size: int,
    sketch_size: int,
    rbf: bool,
) -> int:
    """Bytes that an estimator keeps.

    Args:
        estimator: "minibatch", "exact" or "sketch".
        widths: number of features of every entry.
        n_images: images in the run.
        batch_size: images per batch.
        sketch_size: numbers that a sketch keeps per entry and image.
        rbf: whether the kernel needs a bandwidth.
    """
    sizes = [(width, 4) for width in widths]  # (features, bytes of a float32)
    if estimator == "exact":
        return exact_bytes(n_images, sizes)
    if estimator == "sketch":
        return sketch_bytes(n_images, sizes, sketch_size, batch_size)
    return minibatch_bytes(len(widths), batch_size, rbf=rbf)


def seconds_on_this_cpu(gmacs: float) -> float:
    """Seconds that this CPU takes for so many GMACs, within a factor of about three.

    The rate is that of a 3 x 3 convolution with 64 channels on a 56 x 56 map, the best of three.
    """
    x, w = torch.zeros(2, 64, 56, 56), torch.zeros(64, 64, 3, 3)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        F.conv2d(x, w, padding=1)
        best = min(best, time.perf_counter() - began)
    rate = 2 * 56 * 56 * 64 * 64 * 9 / best / 2  # whole networks reach about half of it
    return gmacs * 1e9 / rate
