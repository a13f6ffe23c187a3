"""What a layer put out becomes a matrix: (n, ...) -> (n, d), at once and without copies kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "REDUCERS",
    "Reducer",
    "get_reducer",
    "has_time_first",
    "layout",
    "leaves",
    "reducer_name",
    "usable",
]

Reducer = Callable[[Tensor], Tensor]


def layout(shape: Sequence[int]) -> tuple[int, tuple[int, ...] | None]:
    """Channels and grid of one image's output, by the rule that `mean` and `grid=K` follow.

    A map is channels first, (c, h, w), unless the two axes before the last are equal and differ
    from the last: (h, w, c) with h == w != c, as Swin puts out. The rule is about square maps. A
    map of h != w is therefore always read as channels first, and so is one with h == w == c; pass
    a callable as the reducer where that is wrong. Three axes and more: (c, t, h, w) the same way.

    Args:
        shape: the output's shape without its first axis n: (d,), (t, c), (c, h, w) or (h, w, c).

    Returns:
        (channels, grid): the grid is (h, w), or (t, h, w), and None for (d,) and (t, c).
    """
    if len(shape) < 3:
        return shape[-1], None
    if shape[-3] == shape[-2] != shape[-1]:
        return shape[-1], tuple(shape[:-1])
    return shape[0], tuple(shape[1:])


def _channels_first(x: Tensor) -> Tensor:
    """(n, h, w, c) -> (n, c, h, w) where `layout` says so; a view."""
    _, grid = layout(x.shape[1:])
    return x if grid is None or grid == x.shape[2:] else x.movedim(-1, 1)


def _wide(x: Tensor) -> Tensor:
    """Float16 and bfloat16 as float32, in which the pooled sums are taken; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _shape(x: Tensor) -> str:
    return f"({', '.join(str(side) for side in x.shape)})"


def flatten(x: Tensor) -> Tensor:
    """Every number of the output is a feature: (n, ...) -> (n, d); a view where it can be."""
    return x.flatten(1)  # (n, d)


def mean(x: Tensor) -> Tensor:
    """The mean over positions: maps -> (n, c), tokens (n, t, c) -> (n, c), (n, d) unchanged.

    Half precision is summed, and comes out, in float32. `layout` says which axis is c.
    """
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return _wide(x).mean(1)  # (n, t, c) -> (n, c)
    return _wide(_channels_first(x)).flatten(2).mean(2)  # (n, c, h, w) -> (n, c)


def tokens(x: Tensor) -> Tensor:
    """The mean over tokens, (n, t, c) -> (n, c), for outputs that must be tokens.

    Raises:
        ValueError: the output has not three axes.
    """
    if x.ndim != 3:
        raise ValueError(
            f"reduce 'tokens' needs outputs (n, t, c): {_shape(x)}: use 'mean' or 'flatten'"
        )
    return mean(x)


def _grid(side: int) -> Reducer:
    """Average pooling to side x side positions, then flattened: (n, c, h, w) -> (n, c*K*K)."""

    def grid(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x
        if x.ndim != 4:
            raise ValueError(
                f"reduce 'grid={side}' needs maps (n, c, h, w): {_shape(x)}: use 'mean'"
            )
        x = _channels_first(x)
        height, width = x.shape[2:]
        if min(height, width) < side:
            raise ValueError(
                f"map smaller than the grid: {height}x{width} under 'grid={side}': "
                f"use 'grid={min(height, width)}' or less, or 'mean'"
            )
        return F.adaptive_avg_pool2d(_wide(x), side).flatten(1)  # (n, c*K*K)

    return grid


REDUCERS: dict[str, Reducer] = {"flatten": flatten, "mean": mean, "tokens": tokens}


def reducer_name(spec: str | Reducer) -> str:
    """How a report names the reducer: the text itself, or the callable's own name."""
    if isinstance(spec, str):
        return spec
    return str(getattr(spec, "__name__", type(spec).__name__))


def get_reducer(spec: str | Reducer) -> Reducer:
    """Look a reducer up, or check one that was given.

    Outputs of (n, d) pass through all but `tokens` unchanged.

    Args:
        spec: a name in REDUCERS, "grid=K" with K >= 1 positions a side, or a callable that turns
            an output (n, ...) into features (n, d).

    Returns:
        A function (n, ...) -> (n, d). A callable's result is checked at every call.

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


def _checked(function: Reducer) -> Reducer:
    """A caller's own reducer, whose result must be (n, d)."""

    def reduce(x: Tensor) -> Tensor:
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


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What an output holds, and where: field "" for what is no container, else "1", "out", "a.b".

    Tuples and lists are known by index, dicts by key, named tuples and dataclasses by field. None
    is left out, so a module that puts out None has no leaves.
    """
    parts: Any
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        if value is not None:
            yield prefix, value
        return
    for name, part in parts:
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def usable(
    value: Any, images: int, module: nn.Module, field: str, time_first: bool
) -> tuple[Tensor | None, str]:
    """One leaf of an output as (n, ...), or the reason why it cannot be had so.

    Args:
        value: the leaf.
        images: n.
        module: what put it out. Recurrent and attention modules with `batch_first=False` say so,
            and their outputs are turned.
        field: where in the output it stands.
        time_first: whether such a module is in the network, as `has_time_first` says; another
            module's (t, n, c) with t = n is then refused: which axis is the batch is not known.

    Returns:
        (tensor, ""), detached and perhaps a view, or (None, reason).
    """
    if not isinstance(value, Tensor):
        return None, f"output is {type(value).__name__}, not a tensor"
    if value.is_nested or value.layout != torch.strided:
        return None, "output is a nested or sparse tensor"
    if not value.is_floating_point():
        return None, f"output is {str(value.dtype).removeprefix('torch.')}, not floating point"
    value = value.detach()
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        state = isinstance(module, nn.RNNBase) and field != "0"  # (layers, n, d) in any case
        if state and value.ndim < 3:
            return None, "state of a sequence without a batch"
        if value.ndim == 3 and (state or (field == "0" and not module.batch_first)):
            value = value.transpose(0, 1)  # (t, n, d) -> (n, t, d)
    elif time_first and value.ndim == 3 and value.shape[0] == value.shape[1] == images:
        return None, f"axes 0 and 1 are both {images} and either may be the batch"
    if value.ndim < 2:
        return None, f"output has {value.ndim} axes, fewer than 2"
    if value.shape[0] != images:
        return None, f"first axis is {value.shape[0]}, not the batch of {images}"
    if value.numel() == 0:
        return None, "output is empty"
    return value, ""


def has_time_first(module: nn.Module) -> bool:
    """Whether it is, or holds, a module with `batch_first=False`."""
    return any(getattr(part, "batch_first", True) is False for part in module.modules())
