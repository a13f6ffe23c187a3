"""The outputs of a network that stand for the classes of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msun.data.labelled import Labelled

__all__ = ["class_rows"]


def class_rows(
    rows: Sequence[int] | None,
    outputs: int,
    data: Labelled,
    spec: Mapping[str, Any] | None = None,
) -> list[int] | None:
    """Resolve the outputs that stand for the classes of a data set, in the order of its classes.

    Args:
        rows: one output per class; None to find them.
        outputs: number of outputs of the network.
        data: the labelled images.
        spec: description of a trained network, which may have its class names ("classes") and
            their outputs ("rows"); None before training, when the numbers must be equal.

    Returns:
        The outputs; None for all of them. If the classes of the data are mere numbers, as with
        tensors, the last classes of a trained network may be missing in the data.

    Raises:
        ValueError: rows or outputs that do not fit the classes.
    """
    classes = data.classes
    if rows is not None:
        chosen = [int(row) for row in rows]
        if len(chosen) != len(classes) or len(set(chosen)) < len(chosen):
            text = f"{len(chosen)} rows for {len(classes)} classes of {data.name!r}"
            raise ValueError(f"rows do not fit the classes: {text}: give each class its own row")
        if bad := [row for row in chosen if not 0 <= row < outputs]:
            raise ValueError(f"no such output: row {bad[0]}: give 0 to {outputs - 1}")
        return chosen
    if spec is None:
        if outputs == len(classes):
            return None
        hint = f"replace the classifier (--classes {len(classes)}, msun.replace_classifier)"
        raise _misfit(outputs, data, f"{hint}, or give rows (--rows)")
    known = [str(name) for name in spec.get("classes") or ()]
    places = [int(row) for row in spec.get("rows") or range(len(known))]
    numbered = not data.is_pixels and list(classes) == _numbers(len(classes))
    if numbered and len(known) > len(classes) and known == _numbers(len(known)):
        classes = tuple(known)
    paired = len(places) == len(known) and (spec.get("rows") is not None or len(known) == outputs)
    if known and paired and set(classes) <= set(known) and max(places) < outputs:
        chosen = [places[known.index(name)] for name in classes]
        return None if chosen == list(range(outputs)) else chosen
    if outputs == len(classes) or (numbered and outputs > len(classes)):
        return None
    raise _misfit(outputs, data, "give rows (--rows), the outputs that stand for the classes")


def _misfit(outputs: int, data: Labelled, hint: str) -> ValueError:
    text = f"{outputs} outputs for {len(data.classes)} classes of {data.name!r}"
    return ValueError(f"outputs do not fit the classes: {text}: {hint}")


def _numbers(n: int) -> list[str]:
    """The names of numbered classes."""
    return [str(k) for k in range(n)]
