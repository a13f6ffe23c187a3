"""Resolve the inputs of an evaluation: images, sizes, and their preprocessing for a network."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from cka_probe.activations.layers import unwrap
from cka_probe.inputs.views import View, check_range
from cka_probe.models.load import LoadedModel
from cka_probe.models.preprocessing import stated_constants
from msun.data.labelled import Labelled, open_labelled
from msun.network.model import MSUN

__all__ = [
    "Feed",
    "network_spec",
    "open_tests",
    "reference_side",
    "resolve_feed",
    "resolve_mean_std",
]

Feed = Callable[[int], int]
Channels = tuple[float, ...] | None  # one value per channel


def network_spec(model: nn.Module | LoadedModel) -> Mapping[str, Any]:
    """The description of a network: mean, std, classes and so on; {} if there is none.

    Args:
        model: the network.
    """
    if isinstance(model, LoadedModel):
        return vars(model)
    return model.spec if isinstance(model, MSUN) else {}


def open_tests(data: Any, split: str | None, n_images: int | None, seed: int) -> Labelled:
    """Open test images: as `open_labelled`, but glyphs are by default those of the test split.

    Args:
        data: labelled images, as for `open_labelled`.
        split: name of the split; None for the default.
        n_images: size of a random subset; None for all.
        seed: seed of the subset.
    """
    if isinstance(data, Labelled) and (split is not None or n_images is not None):
        text = f"split {split!r}, n_images {n_images}"
        raise ValueError(f"images that are open already: {text}: give these to open_labelled")
    if isinstance(data, str) and data == "glyphs" and split is None:
        split = "test"
    return open_labelled(data, split=split, n_images=n_images, seed=seed)


def reference_side(model: nn.Module | LoadedModel, sides: Sequence[int]) -> int:
    """The default reference of an evaluation.

    Args:
        model: the network.
        sides: sides of the evaluation, in pixels.

    Returns:
        The reference of an MSUN, the input size of a loaded model, else the largest side.
    """
    if isinstance(model, MSUN):
        return model.reference
    return (model.input_size if isinstance(model, LoadedModel) else None) or max(sides)


def resolve_feed(feed: str | Feed, reference: int) -> Feed:
    """Resolve the option `feed` to a function from image side to input side.

    Args:
        feed: "native", "upsampled", or a callable from side to side in pixels.
        reference: input side of "upsampled".

    Returns:
        The function. It raises `ValueError` if the callable does not return a side.

    Raises:
        ValueError: an unknown name.
    """
    if not callable(feed):
        if feed not in ("native", "upsampled"):
            raise ValueError(f"unknown feed: {feed!r}: choose 'native' or 'upsampled'")
        return lambda side: side if feed == "native" else reference

    def checked(side: int) -> int:
        value = feed(side)
        whole = hasattr(value, "__index__") and not isinstance(value, bool)  # NumPy integers too
        if not whole or value < 1:
            raise ValueError(f"bad feed: {value!r} for {side} px: return a side in pixels")
        return operator.index(value)

    return checked


def resolve_mean_std(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    model: nn.Module | LoadedModel,
    source: Labelled,
) -> tuple[Channels, Channels]:
    """Resolve the channel means and standard deviations of the preprocessing.

    Args:
        mean: the option; None for the default.
        std: the option; None for the default.
        model: the network, which may have them in its description.
        source: the images; tensors are not normalised by default.

    Returns:
        (mean, std): the options; else, for pixels, those of the network, else of the data.

    Raises:
        ValueError: only one of both, or values that are no numbers.
    """
    if mean is None and std is None and source.is_pixels:
        stated = {} if isinstance(model, LoadedModel) else stated_constants(unwrap(model))
        spec = {**stated, **{name: value for name, value in network_spec(model).items() if value}}
        mean, std = spec.get("mean") or source.mean, spec.get("std") or source.std
    view = View(mean=None if mean is None else tuple(mean), std=None if std is None else tuple(std))
    if view.mean is not None:
        check_range(view.mean, view.std, None if source.is_pixels else source.load(0)[0])
    return view.mean, view.std
