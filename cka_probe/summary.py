"""A report in words: a headline, the counts behind it, and caveats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.report import Report, same_layers

__all__ = [
    "LEVEL",
    "MAX_NAMES",
    "MIN_GROUPS",
    "Cell",
    "caveats",
    "describe",
    "details",
    "ellipsize",
    "few_groups",
    "headline",
    "join_names",
    "missing_cells",
    "read_cells",
    "same_layers",
]

LEVEL = 0.95  # coverage of every interval here
MAX_NAMES = 12  # names in a list before "and N more"
MIN_GROUPS = 8  # below it Student's t is so wide, and the jackknife so noisy, that bars mislead
_HIGH = 0.9  # the CKA that the counts of `details` are about


class Cell(NamedTuple):
    """One value of a report, between two entries, with its interval (nan where there is none)."""

    view: str
    layer: str
    other_view: str
    other_layer: str
    cka: float
    stderr: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"CKA {_three(self.cka)}"
        ends = f"{_three(self.low)} to {_three(self.high)}"
        return f"CKA {_three(self.cka)}, {100 * LEVEL:g} % interval {ends}"

    @property
    def first(self) -> str:
        """The first entry: "LAYER in view VIEW"."""
        return f"{self.layer} in view {self.view}"

    @property
    def second(self) -> str:
        """The second entry: "LAYER in view VIEW"."""
        return f"{self.other_layer} in view {self.other_view}"


def missing_cells(report: Report, view: str | None = None) -> NDArray[np.bool_]:
    """(layers, views) bool: where `report.against(view)` lacks the layer in one of its views."""
    layers_of = {name: set(report.layers_of(name)) for name in report.views}
    own = layers_of[report.reference if view is None else view]
    rows = [
        [layer not in own & layers_of[name] for name in report.views] for layer in report.layers
    ]
    return np.array(rows)


def read_cells(report: Report) -> list[Cell]:
    """The values that the summary is about.

    Each layer in each view against the same layer in the reference view, layer by layer. Where the
    views' layers differ (see `same_layers`): all pairs of a layer of another view with a layer of
    the reference view. In a report of one view: all pairs.
    """
    low, high = report.interval(LEVEL)
    at = {entry: k for k, entry in enumerate(zip(report.view, report.layer, strict=True))}
    own = [at[report.reference, layer] for layer in report.layers_of(report.reference)]
    others = [at[v, x] for x in report.layers for v in report.views if (v, x) in at]
    others = [k for k in others if k not in set(own)]
    if same_layers(report):
        pairs = [
            (k, at[report.reference, report.layer[k]])
            for k in others
            if (report.reference, report.layer[k]) in at
        ]
    else:
        pairs = [(k, j) for k in others for j in own]
        pairs = pairs or [(k, j) for k in own for j in own if j < k]
    return [
        Cell(
            str(report.view[k]),
            str(report.layer[k]),
            str(report.view[j]),
            str(report.layer[j]),
            *(float(values[k, j]) for values in (report.cka, report.stderr, low, high)),
        )
        for k, j in pairs
    ]


def describe(report: Report) -> str:
    """The headline, the details and a warning of few groups, a line each."""
    return "\n".join([headline(report), *details(report), *few_groups(report)])


def headline(report: Report) -> str:
    """What the numbers show in one sentence of at most 20 words (names not counted).

    The layer that changes most, where, and its CKA. Where the views have no layers in common: the
    most alike pair.
    """
    valid = [cell for cell in read_cells(report) if not math.isnan(cell.cka)]
    if not valid:
        return "There is no value to read: the report has no pair of layers that both vary."
    if not same_layers(report):
        most = max(valid, key=lambda cell: cell.cka)
        if len(valid) == 1:
            return f"{most.first} and {most.second} have a CKA of {_three(most.cka)}."
        return (
            f"Most alike of {len(valid)} pairs of layers: {most.first} and {most.second}, "
            f"with a CKA of {_three(most.cka)}."
        )
    least = min(valid, key=lambda cell: cell.cka)
    if _three(least.cka) == "1.000":
        return f"No layer changes: the lowest CKA with view {report.reference} is 1.000."
    where, reference = _place(least.view), _place(report.reference)
    return (
        f"{where[:1].upper()}{where[1:]}, {least.layer} changes most: its CKA with itself "
        f"{reference} is {_three(least.cka)}."
    )


def details(report: Report) -> list[str]:
    """Up to three lines behind the headline: the extreme with its interval, counts, odd values."""
    cells = read_cells(report)
    valid = [cell for cell in cells if not math.isnan(cell.cka)]
    if not valid:
        return []
    lines = [_lowest(valid) if same_layers(report) else _extremes(valid)]
    known = [cell for cell in valid if not math.isnan(cell.low)]
    if known and same_layers(report):
        above, below = (sum(f(c) for c in known) for f in (_is_above, _is_below))
        lines.append(
            f"Of {len(known)} values, by their intervals: {above} above {_HIGH}, {below} below, "
            f"{len(known) - above - below} undecided."
        )
    odd = []
    if negative := sum(cell.cka < 0 for cell in valid):
        odd.append(f"{negative} below 0: unbiased estimates of a CKA near 0.")
    if lost := len(cells) - len(valid):
        reasons = "; ".join(report.meta.get("nan") or ()) or "features constant up to rounding"
        odd.append(f"{lost} of {len(cells)} values are nan: {reasons}.")
    return lines + ([" ".join(odd)] if odd else [])


def few_groups(report: Report) -> list[str]:
    """One line if the intervals rest on too few groups of images, or on none; else no line."""
    groups = int(report.meta.get("groups") or 0)
    if groups >= MIN_GROUPS:
        return []
    if groups < 2:
        return ["There are no intervals: fewer than 2 groups of images. Differences may be chance."]
    return [
        f"Only {groups} groups of images: the intervals are unreliable. Use {MIN_GROUPS} groups or "
        "more: more images, or smaller batches."
    ]


def caveats(report: Report) -> list[str]:
    """What the numbers cannot show, a sentence or two a line."""
    n = report.meta.get("n_images")
    images = f"these {n} images" if n else "these images"
    return [
        *few_groups(report),
        f"CKA compares how a layer arranges {images}, mainly along the directions in which its "
        "features vary most.",
        "It cannot show whether the network still works: measure accuracy for that.",
        "The intervals describe other images of this kind, not other data or another training run. "
        "Each holds by itself: about one in twenty misses.",
    ]


def ellipsize(name: str, limit: int = 30) -> str:
    """A name with its middle left out if it is longer than `limit` characters."""
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2]}…{name[-(limit // 2) :]}"


def join_names(values: Any) -> str:
    """Names in a row, "a, b and c", or the first and how many more; a mapping: name (value)."""
    if isinstance(values, Mapping):
        values = [f"{name} ({value})" for name, value in values.items()]
    names = [str(value) for value in values or []]
    if len(names) > MAX_NAMES:
        return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _three(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: never -0.000


def _is_above(cell: Cell) -> bool:
    return cell.low > _HIGH


def _is_below(cell: Cell) -> bool:
    return cell.high < _HIGH


def _place(view: str) -> str:
    """Where a layer was recorded: a view that is named by a number is a size."""
    return f"at {view} px" if view.isdecimal() else f"in view {view}"


def _lowest(cells: Sequence[Cell]) -> str:
    """The lowest value, and whether its interval sets it apart from the others."""
    least = min(cells, key=lambda cell: cell.cka)
    line = f"Lowest: {least.first} ({least})"
    if math.isnan(least.high) or len(cells) == 1:
        return f"{line}."
    # A value without an interval of its own overlaps if it lies in the interval of the lowest.
    overlap = sum(
        (cell.cka if math.isnan(cell.low) else cell.low) <= least.high
        for cell in cells
        if cell is not least
    )
    if not overlap:
        return f"{line}; no other interval overlaps."
    return f"{line}; {overlap} other interval{'s overlap' if overlap > 1 else ' overlaps'}."


def _extremes(cells: Sequence[Cell]) -> str:
    """The most and the least alike pair of layers."""
    most, least = (pick(cells, key=lambda cell: cell.cka) for pick in (max, min))
    if len(cells) == 1:
        return f"One pair: {most.first} and {most.second} ({most})."
    return (
        f"Most alike: {most.first} and {most.second} ({most}). "
        f"Least alike: {least.first} and {least.second} ({least})."
    )
