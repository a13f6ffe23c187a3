"""Reducers: the output (n, ...) of a layer -> a feature matrix (n, d)."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cka_probe.activations.axes import Axes, channels_to_front

__all__ = ["REDUCERS", "Reducer", "get_reducer", "reducer_name"]

Reducer = Callable[[Tensor], Tensor]
AxesReducer = Callable[..., Tensor]  # (x, axes=None): `axes` hold the channels of x


def _wide(x: Tensor) -> Tensor:
    """Float16 and bfloat16 as float32, in which the pooled sums are taken; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _shape(x: Tensor) -> str:
    return f"({', '.join(str(side) for side in x.shape)})"


def flatten(x: Tensor, axes: Axes | None = None) -> Tensor:
    """Every number of the output is a feature: (n, ...) -> (n, d); a view where it can be."""
    return x.flatten(1)  # (n, d)


def mean(x: Tensor, axes: Axes | None = None) -> Tensor:
    """The mean over positions, which are all axes but the images' and the channels': -> (n, c).

    (n, c, l) of a 1-D convolution, (n, c, h, w) and (n, c, t, h, w) are averaged over all axes
    after c; tokens (n, t, c) over t; channels last, (n, h, w, c), over h and w; heads
    (n, heads, t, d) over t, with heads * d channels; (n, d) is unchanged. Half precision is
    summed, and comes out, in float32.

    Args:
        x: the output, (n, ...).
        axes: its channel axes; None: the last of (n, t, c), axis 1 of maps.
    """
    if x.ndim == 2:
        return x
    axes = axes or ((2,) if x.ndim == 3 else (1,))
    if x.ndim == 3 and axes == (2,):
        return _wide(x).mean(1)  # (n, t, c) -> (n, c)
    return _wide(channels_to_front(x, axes)).flatten(2).mean(2)  # (n, c, positions) -> (n, c)


def tokens(x: Tensor, axes: Axes | None = None) -> Tensor:
    """The mean over tokens, (n, t, c) -> (n, c), for outputs that must be tokens.

    Args:
        x: the output; whoever says "tokens" says that its last axis holds the channels.
        axes: not used.

    Raises:
        ValueError: the output has not three axes.
    """
    if x.ndim != 3:
        raise ValueError(
            f"reduce 'tokens' needs outputs (n, t, c): {_shape(x)}: use 'mean' or 'flatten'"
        )
    return mean(x)


def _grid(side: int) -> AxesReducer:
    """Average pooling to side x side positions, then flattened: (n, c, h, w) -> (n, c*K*K)."""

    def grid(x: Tensor, axes: Axes | None = None) -> Tensor:
        if x.ndim == 2:
            return x
        if x.ndim != 4 or len(axes or (1,)) > 1:
            raise ValueError(
                f"reduce 'grid={side}' needs maps (n, c, h, w): {_shape(x)}: use 'mean'"
            )
        x = channels_to_front(x, axes or (1,))
        height, width = x.shape[2:]
        if min(height, width) < side:
            raise ValueError(
                f"map smaller than the grid: {height}x{width} under 'grid={side}': "
                f"use 'grid={min(height, width)}' or less, or 'mean'"
            )
        return F.adaptive_avg_pool2d(_wide(x), side).flatten(1)  # (n, c*K*K)

    return grid


REDUCERS: dict[str, AxesReducer] = {"flatten": flatten, "mean": mean, "tokens": tokens}


def reducer_name(spec: str | Reducer) -> str:
    """How a report names the reducer: the text itself, or the callable's own name."""
    if isinstance(spec, str):
        return spec
    return str(getattr(spec, "__name__", type(spec).__name__))


def get_reducer(spec: str | Reducer) -> AxesReducer:
    """Look a reducer up, or check one that was given.

    Outputs of (n, d) pass through all but `tokens` unchanged.

    Args:
        spec: a name in REDUCERS, "grid=K" with K >= 1 positions a side, or a callable that turns
            an output (n, ...) into features (n, d).

    Returns:
        A function (n, ...) -> (n, d), whose second argument says which axes hold the channels. A
        callable's result is checked at every call; it is not told the axes.

    Raises:
        ValueError: the name is not known, or K is not a positive integer.
        TypeError: neither text nor callable.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise TypeError(
                f"reduce is neither a name nor a callable: {type(spec).__name__}: "
                f"use {_known()} or a function (n, ...) -> (n, d)"
            )
        return _checked(spec)
    if spec in REDUCERS:
        return REDUCERS[spec]
    if re.fullmatch(r"grid=0*[1-9][0-9]{0,5}", spec):
        return _grid(int(spec[5:]))
    if spec.split("=")[0] == "grid":
        raise ValueError(f"bad grid: {spec!r}: give a positive integer, as in 'grid=4'")
    raise ValueError(f"unknown reducer: {spec!r}: use {_known()}")


def _known() -> str:
    return ", ".join([*(repr(name) for name in sorted(REDUCERS)), "'grid=K'"])


def _checked(function: Reducer) -> AxesReducer:
    """A caller's own reducer, whose result must be (n, d)."""

    def reduce(x: Tensor, axes: Axes | None = None) -> Tensor:
        features = function(x)
        name = reducer_name(function)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"reducer returned no tensor: {name!r} gave {type(features).__name__}: "
                "return features (n, d)"
            )
        if features.ndim != 2 or features.shape[0] != x.shape[0]:
            raise ValueError(
                f"reducer returned a wrong shape: {name!r} gave {_shape(features)} for "
                f"{_shape(x)}: return features (n, d)"
            )
        return features

    return reduce
