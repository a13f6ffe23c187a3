"""Features of the user, checked and as tensors."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Features", "as_features", "check_plain", "check_rows"]

Features: TypeAlias = Tensor | npt.NDArray[Any]


def as_features(name: str, x: Features) -> Tensor:
    """Features as a (n, d) float tensor.

    Raises:
        ValueError: not 2-D, or values that a mask hides. TypeError: not numbers.
    """
    if np.ma.is_masked(x):
        count = f"{int(np.ma.getmaskarray(np.ma.asarray(x)).sum())} values in {name!r}"
        raise ValueError(f"features are masked: {count}: leave those images out of every side")
    if isinstance(x, Tensor):
        check_plain(name, x)
        tensor = x.detach()
    else:
        try:
            array = np.asarray(x)
        except ValueError as error:  # lists of unequal lengths
            raise TypeError(f"features are no array: {name!r}: give (n, d) floats") from error
        if array.dtype.kind not in "fiubc":  # frames with text, scipy's sparse arrays
            found = f"{type(x).__name__} of {array.dtype}"
            raise TypeError(f"features are no numbers: {name!r} is {found}: give (n, d) floats")
        tensor = _from_array(array)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"features are not real numbers: {name!r} is {tensor.dtype}: give floats")
    if tensor.ndim != 2:
        raise ValueError(
            f"features are not (n, d): {name!r} has shape {tuple(tensor.shape)}: "
            "flatten or average all axes but the first"
        )
    if not tensor.is_floating_point():
        return tensor.double()
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()  # no sums in eight bits


def check_rows(features: Mapping[str, Features]) -> None:
    """Refuse frames whose rows are named differently: rows are compared by their place.

    Args:
        features: name -> features; only pandas objects name their rows.

    Raises:
        ValueError: two of them name other rows, or the same in another order.
    """
    first: tuple[str, Any] | None = None
    for name, x in features.items():
        index = getattr(x, "index", None)
        if index is None or not hasattr(index, "equals") or not hasattr(x, "iloc"):
            continue
        if first is None:
            first = name, index
        elif len(index) == len(first[1]) and not index.equals(first[1]):
            if index.inferred_type != first[1].inferred_type:
                continue  # file names here, mere numbers there: nothing to compare
            row = int(np.argmax(np.asarray(index != first[1])))
            hint = "give the rows in one order, or .to_numpy() if they are the same images"
            text = f"row {row} is '{first[1][row]}' in {first[0]!r}, '{index[row]}' in {name!r}"
            raise ValueError(f"rows are named differently: {text}: {hint}")


def check_plain(name: str, x: Tensor) -> None:
    """Refuse tensors without dense numbers.

    Raises:
        TypeError: sparse, quantised, or on the meta device.
    """
    if x.layout != torch.strided or x.is_meta or x.is_quantized:
        kind = "quantised" if x.is_quantized else "without data" if x.is_meta else x.layout
        raise TypeError(f"features are no plain tensor: {name!r} is {kind}: give dense floats")


def _from_array(x: npt.NDArray[Any]) -> Tensor:
    """A tensor of what torch can hold of an array: other byte orders and widths are converted."""
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        x = x.astype(np.float64)
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    if not x.flags.writeable or any(step < 0 for step in x.strides):
        x = x.copy()
    return torch.as_tensor(x)
