"""What a module returned: the tensors in it, whether they hold one row an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["has_time_first", "leaves", "usable"]


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
