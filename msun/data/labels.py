"""Labels as class indices."""

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["class_index", "number_of_classes", "shown"]

_SHOWN = 40  # characters of a label in a message
_MOST_CLASSES = 10**6  # numbered classes that are believed: labels are no hashes or dates


def class_index(label: Any, item: str, name: str) -> int:
    """A label as a whole number.

    Args:
        label: what a dataset gives as the label of an item.
        item: the item's name.
        name: the dataset's.

    Raises:
        ValueError: a word, several numbers (multi-hot rows, boxes), a mapping, a fraction, nothing.
    """
    value = label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label
    while isinstance(value, list) and len(value) == 1:  # a column, or a tensor of one number
        value = value[0]
    if isinstance(value, int):
        return int(value)  # a bool, too
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = f"{shown(value)} of item {item!r} in {name!r}"
    if isinstance(value, str):
        hint = "give the number of its class, and the names as the dataset's `classes`"
        raise ValueError(f"label is a word: {text}: {hint}")
    hint = "give one whole number per image, the index of its class"
    raise ValueError(f"label is no class: {text}: {hint}")


def shown(label: Any) -> str:
    """A label for a message, shortened."""
    text = " ".join(repr(label).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def number_of_classes(largest: int, name: str) -> int:
    """One more than the largest label, where that many classes can be meant."""
    if largest >= _MOST_CLASSES:
        raise ValueError(f"bad label: {largest} in {name!r}: give 0 to {_MOST_CLASSES - 1} at most")
    return max(largest, 0) + 1
