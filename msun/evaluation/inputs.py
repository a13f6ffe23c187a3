"""What a network and a set of images must agree on: normalisation, classes, the largest size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from cka_probe.inputs.views import View
from cka_probe.models.load import LoadedModel
from msun.data.labelled import Labelled, open_labelled
from msun.network.model import MSUN

__all__ = ["Feed", "feeding", "normalisation", "open_tests", "reference_of", "rows_for"]

Feed = Callable[[int], int]
Channels = tuple[float, ...] | None


def _spec(model: nn.Module | LoadedModel) -> Mapping[str, Any]:
    """What a network says of itself."""
    if isinstance(model, LoadedModel):
        return vars(model)
    return model.spec if isinstance(model, MSUN) else {}


def open_tests(data: Any, split: str | None, n_images: int | None, seed: int) -> Labelled:
    """Open images to test on: as `open_labelled`, but the glyphs are those of the test split."""
    if isinstance(data, Labelled) and (split is not None or n_images is not None):
        text = f"split {split!r}, n_images {n_images}"
        raise ValueError(f"images that are open already: {text}: give these to open_labelled")
    if isinstance(data, str) and data == "glyphs" and split is None:
        split = "test"
    return open_labelled(data, split=split, n_images=n_images, seed=seed)


def reference_of(model: nn.Module | LoadedModel, sides: Sequence[int]) -> int:
    """The side at which a network is at home.

    Args:
        model: the network.
        sides: that it is shown, in pixels.

    Returns:
        An MSUN's own, a loaded model's input size, else the largest of the sides.
    """
    if isinstance(model, MSUN):
        return model.reference
    return (model.input_size if isinstance(model, LoadedModel) else None) or max(sides)


def feeding(feed: str | Feed, reference: int) -> Feed:
    """What is fed for images of a size.

    Args:
        feed: "native", "upsampled", or a callable, side -> side in pixels.
        reference: the side that "upsampled" feeds.

    Returns:
        A callable that raises `ValueError` where a callable gives no side.

    Raises:
        ValueError: an unknown name.
    """
    if not callable(feed):
        if feed not in ("native", "upsampled"):
            raise ValueError(f"unknown feed: {feed!r}: choose 'native' or 'upsampled'")
        return lambda side: side if feed == "native" else reference

    def checked(side: int) -> int:
        value = feed(side)
        whole = hasattr(value, "__index__") and not isinstance(value, bool)  # NumPy's too
        if not whole or value < 1:
            raise ValueError(f"bad feed: {value!r} for {side} px: return a side in pixels")
        return operator.index(value)

    return checked


def normalisation(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    model: nn.Module | LoadedModel,
    source: Labelled,
) -> tuple[Channels, Channels]:
    """Channel means and standard deviations for the images.

    Args:
        mean: what was asked for, or None.
        std: likewise.
        model: which may say what its images need.
        source: the images; those that come as tensors are used as they are.

    Returns:
        What was asked for; else for pixels what the network says, else the data.

    Raises:
        ValueError: only one of both, or no numbers.
    """
    if mean is None and std is None and source.is_pixels:
        spec = _spec(model)
        mean, std = spec.get("mean") or source.mean, spec.get("std") or source.std
    view = View(mean=None if mean is None else tuple(mean), std=None if std is None else tuple(std))
    return view.mean, view.std


def rows_for(
    asked: Sequence[int] | None, outputs: int, source: Labelled, model: nn.Module | LoadedModel
) -> list[int] | None:
    """The outputs that stand for the classes of the data.

    Args:
        asked: one for each class, in order; None finds them.
        outputs: how many the network has.
        source: the images.
        model: the network; if its `spec` names its classes, and the rows that stand for them,
            those of the data are looked up there.

    Returns:
        The outputs; None for all of them. Where the data's classes are mere numbers, as with
        tensors, the last ones need not occur.

    Raises:
        ValueError: they do not fit.
    """
    classes = source.classes
    if asked is not None:
        rows = [int(row) for row in asked]
        if len(rows) != len(classes) or len(set(rows)) < len(rows):
            text = f"{len(rows)} rows for {len(classes)} classes of {source.name!r}"
            raise ValueError(f"rows do not fit the classes: {text}: give each class its own row")
        if bad := [row for row in rows if not 0 <= row < outputs]:
            raise ValueError(f"no such output: row {bad[0]}: give 0 to {outputs - 1}")
        return rows
    spec = _spec(model)
    known = [str(name) for name in spec.get("classes") or ()]
    outs = [int(row) for row in spec.get("rows") or range(len(known))]
    numbered = not source.is_pixels and list(classes) == _numbers(len(classes))
    if numbered and len(known) > len(classes) and known == _numbers(len(known)):
        classes = tuple(known)
    paired = len(outs) == len(known) and (spec.get("rows") is not None or len(known) == outputs)
    if known and paired and set(classes) <= set(known) and max(outs) < outputs:
        rows = [outs[known.index(name)] for name in classes]
        return None if rows == list(range(outputs)) else rows
    if outputs == len(classes) or (numbered and outputs > len(classes)):
        return None
    text = f"{outputs} outputs for {len(classes)} classes of {source.name!r}"
    raise ValueError(
        f"outputs do not fit the classes: {text}: give rows (--rows), the outputs that stand for "
        "the classes"
    )


def _numbers(n: int) -> list[str]:
    """The names of classes that have none."""
    return [str(k) for k in range(n)]
