"""What a report is made of, checked: names, and square tables of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROUNDING", "names", "square"]

ROUNDING = 1e-9  # asymmetry and distance of the diagonal from 1 that count as rounding


def names(values: Any, what: str) -> NDArray[np.str_]:
    """Names as an array of text (m,), refusing anything that is not text."""
    found = list(values)
    if not all(isinstance(name, str) for name in found) or isinstance(values, str):
        raise TypeError(f"{what} holds more than text: {values!r:.60}: give one name an entry")
    return np.array(found, dtype=np.str_)


def square(values: Any, m: int, what: str) -> NDArray[np.float64]:
    """Numbers as a symmetric (m, m) float64 array of its own."""
    try:
        table = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{what} holds more than numbers: {values!r:.60}: give an array") from None
    if table.shape != (m, m):
        raise ValueError(f"{what} does not fit {m} entries: shape {table.shape}: give ({m}, {m})")
    if np.isinf(table).any():
        raise ValueError(f"{what} is infinite: {np.argwhere(np.isinf(table))[0]}: use nan or less")
    even = np.isclose(table, table.T, rtol=0, atol=ROUNDING, equal_nan=True)
    if not even.all():
        cell = tuple(np.argwhere(~even)[0].tolist())
        raise ValueError(f"{what} is not symmetric: at {cell}: give (x + x.T) / 2")
    middle: NDArray[np.float64] = (table + table.T) / 2
    return middle
