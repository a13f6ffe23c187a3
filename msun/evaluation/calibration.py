"""Re-estimate batch norm statistics for further sizes, on training images.

Re-estimated statistics: Yu et al. 2019 (slimmable networks), Yang et al. 2020 (MutualNet).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import detached_copy
from cka_probe.inputs.batches import order
from cka_probe.inputs.views import check_scales
from cka_probe.models.load import LoadedModel
from cka_probe.models.preprocessing import input_channels
from cka_probe.probing.forward import device_of, move_to
from cka_probe.progress import progress_bar
from cka_probe.rng import preserved_rng
from msun.data.crops import Crops
from msun.data.labelled import Labelled, open_labelled
from msun.evaluation.inputs import resolve_mean_std
from msun.network.model import MSUN
from msun.network.norms import install, recalibrate, select, sized_norms

__all__ = ["calibrate", "recalibrated"]

Network = TypeVar("Network", bound="nn.Module | LoadedModel")


def calibrate(
    model: MSUN,
    data: Any,
    sizes: Sequence[int],
    *,
    n_images: int = 200,
    batch_size: int = 64,
    split: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: Any = None,
    workers: int = 0,
    progress: bool = True,
) -> MSUN:
    """Re-estimate the batch norm statistics of subnets and trunk for further sizes, in place.

    Images of these sizes are then normalised with the new statistics. Weights, biases and the
    statistics of other sizes stay, and `msun.save` saves all of them. A trained size with "private"
    norms has its own statistics and is skipped, unless other sizes use the same norms
    (`Policy.inputs`, `TrainConfig.between`): then new statistics help.

    Args:
        model: the network; changed in place.
        data: training images, as for `open_labelled`; labels are not used. Test images would bias
            the test.
        sizes: sides of square images in pixels; for other shapes, `msun.norms.recalibrate` takes
            batches of one (h, w).
        n_images: number of random images; all if there are fewer.
        batch_size: highest number of images per batch; batches are of equal size, since each is
            normalised with its own statistics.
        split: split of the data, as in `open_labelled`.
        mean: channel means for pixels; None for those of the network, else of ImageNet.
        std: channel standard deviations.
        seed: seed of the choice of images.
        device: device to run on; None for that of the network.
        workers: number of processes that decode images.
        progress: whether to show a progress bar.

    Returns:
        The same network.

    Raises:
        ImageError: an image that cannot be read, by name.
        TypeError: a network that is not an MSUN.
        ValueError: no batch norm to re-estimate, a size that the network cannot take, or bad
            options.
    """
    if not isinstance(model, MSUN):
        kind = type(model).__name__
        raise TypeError(f"not an MSUN: {kind}: use msun.recalibrated, or build one")
    sides = check_scales(sizes)
    mixed = model.policy.inputs != "native" or bool((model.spec or {}).get("between"))
    if model.policy.norm == "private" and not (mixed and len(model.scales) > 1):
        sides = [side for side in sides if side not in model.scales]
    images = _Images(model, data, n_images, batch_size, split, mean, std, seed, workers)
    _estimate(model, sides, images, device, progress)
    return model


def recalibrated(
    model: Network,
    data: Any,
    sizes: Sequence[int],
    *,
    n_images: int = 200,
    batch_size: int = 64,
    split: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: Any = None,
    workers: int = 0,
    progress: bool = True,
) -> Network:
    """A copy of any network with batch norm statistics re-estimated for each size.

    The copy normalises images of these sizes with their own statistics, and others as before.
    Modules keep their paths. Any network can have this without training, so it is the baseline for
    a multi-scale network.

    Args:
        model: any network, or a result of `load_model`.
        data: training images, as for `calibrate`.
        sizes: sides in pixels.
        n_images: number of random images.
        batch_size: highest number of images per batch.
        split: split of the data, as in `open_labelled`.
        mean: channel means for pixels.
        std: channel standard deviations.
        seed: seed of the choice of images.
        device: device to run on; None for that of the network.
        workers: number of processes that decode images.
        progress: whether to show a progress bar.

    Returns:
        The copy, in the type of `model`: a network or a loaded model.

    Raises:
        ImageError: an image that cannot be read, by name.
        ValueError: as for `calibrate`.
    """
    plain = unwrap(model.model if isinstance(model, LoadedModel) else model)
    images = _Images(model, data, n_images, batch_size, split, mean, std, seed, workers)
    copied = detached_copy(plain)
    if not isinstance(copied, MSUN):
        install(copied)
        if _select_by_size not in copied._forward_pre_hooks.values():
            copied.register_forward_pre_hook(_select_by_size)
    _estimate(copied, check_scales(sizes), images, device, progress)
    if isinstance(model, LoadedModel):
        return dataclasses.replace(model, model=copied)
    return copied  # type: ignore[return-value]


def _select_by_size(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: select the statistics for the size of the images."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
        h, w = args[0].shape[-2:]
        select(module, 0, (int(h), int(w)))


class _Images:
    """Random training images in batches of equal size, at any side."""

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        data: Any,
        n_images: int,
        batch_size: int,
        split: str | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        seed: int,
        workers: int,
    ) -> None:
        for what, count in (("n_images", n_images), ("batch_size", batch_size)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"bad {what}: {count!r}: give a whole number of 1 or more")
        drawn = n_images if isinstance(data, str) and data == "glyphs" else None
        source: Labelled = open_labelled(data, split=split, n_images=drawn, seed=seed)
        net = model.model if isinstance(model, LoadedModel) else model
        source.use_channels(input_channels(unwrap(net)))
        chosen = order(len(source), seed)[:n_images]
        parts = np.array_split(chosen, math.ceil(len(chosen) / batch_size))
        self.rows = [part.tolist() for part in parts]
        self.source, self.workers = source, workers
        self.mean, self.std = resolve_mean_std(mean, std, model, source)

    def at(
        self, side: int, device: torch.device, dtype: torch.dtype
    ) -> Generator[Tensor, None, None]:
        """The batches at one side, (b, c, side, side)."""
        crops = Crops(self.source, (side,), None, self.mean, self.std)
        with closing(crops.batches(self.rows, workers=self.workers)) as stream:
            for views, _ in stream:
                yield views[side].to(device, dtype)


def _estimate(
    model: nn.Module, sides: list[int], images: _Images, target: Any, progress: bool
) -> None:
    """Re-estimate the statistics for each side."""
    if not sized_norms(model):
        text = type(model).__name__
        raise ValueError(f"no batch norm to re-estimate: {text}: evaluate it without calibration")
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floats, torch.float32)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        move_to(model, target, stack)
        bar = stack.enter_context(
            progress_bar(len(sides), desc="calibrate", unit="size", show=progress)
        )
        for side in sides:
            with closing(images.at(side, device_of(model), dtype)) as batches:
                recalibrate(model, batches, side)
            bar.update()
        bar.leave = True
