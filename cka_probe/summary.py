"""A report in words: what its numbers show, and what CKA cannot show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.report import Report, same_layers

__all__ = ["LEVEL", "NAMED", "Cell", "absent", "cannot", "read_cells", "same_layers"]
__all__ += ["lead", "listed", "remarks", "shortened", "shows"]

LEVEL = 0.95  # of every interval here
_MARK = 0.9  # the similarity that intervals are held against
NAMED = 12  # names in a list before "and N more"


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
    def one(self) -> str:
        """The first entry in words."""
        return f"{self.layer} in view {self.view}"

    @property
    def other(self) -> str:
        """The second entry in words."""
        return f"{self.other_layer} in view {self.other_view}"


def absent(report: Report, view: str | None = None) -> NDArray[np.bool_]:
    """Where `report.against(view)` has no value to show: one of the two views lacks the layer."""
    held = {name: set(report.layers_of(name)) for name in report.views}
    own = held[report.reference if view is None else view]
    rows = [[layer not in own & held[name] for name in report.views] for layer in report.layers]
    return np.array(rows)


def read_cells(report: Report) -> list[Cell]:
    """The values that are read.

    Layers held against themselves in the reference, layer by layer; where the views' layers differ
    (see `same_layers`), all pairs of a layer of another view with one of the reference; in a single
    view all pairs.
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


def shows(report: Report) -> str:
    """What the numbers show: the one sentence of `lead`, then `remarks`, a line each."""
    return "\n".join([lead(report), *remarks(report)])


def lead(report: Report) -> str:
    """What the numbers show in one plain sentence: which layers move most, where, to what value.

    Layers whose intervals reach into that of the lowest value are named with it. Where the views
    have no layers in common: the most alike pair.
    """
    valid = [cell for cell in read_cells(report) if not math.isnan(cell.cka)]
    if not valid:
        return "There is no value to read: the report has no pair of layers that both vary."
    if not same_layers(report):
        most = max(valid, key=lambda cell: cell.cka)
        count = f"Of {len(valid)} pairs of layers, " if len(valid) > 1 else ""
        pair = f"{most.one} and {most.other}"
        alike = "are the most alike, with" if count else "have"
        return f"{count}{pair} {alike} a CKA of {_three(most.cka)}."
    least = min(valid, key=lambda cell: cell.cka)
    if _three(least.cka) == "1.000":
        return f"No layer moves: the lowest CKA with view {report.reference} is 1.000."
    names = [least.layer, *(c.layer for c in _rivals(valid, least) if c.view == least.view)]
    what = f"{listed(names)} move" if len(names) > 1 else f"{least.layer} moves"
    own = f"the CKA of {least.layer}" if len(names) > 1 else "its CKA"
    if len(names) > 3:
        what = f"{len(names)} layers, {least.layer} among them, move"
    there, here = _place(least.view), _place(report.reference)
    there = there[:1].upper() + there[1:]
    return f"{there}, {what} most: {own} with itself {here} is {_three(least.cka)}."


def remarks(report: Report) -> list[str]:
    """What else the numbers show, in sentences that say no more than the intervals allow.

    Held against the reference: whether the intervals settle which value is the least, and for which
    layers a CKA of 0.9 is ruled out. Where the views have no layers in common: the most and the
    least alike pair. Then what a negative value, nan or the lack of intervals means.
    """
    cells = read_cells(report)
    valid = [cell for cell in cells if not math.isnan(cell.cka)]
    if not valid:
        return []
    told = _least(report, valid) if same_layers(report) else _extremes(report, valid)
    if all(math.isnan(cell.low) for cell in valid):
        told.append("There are no error bars (fewer than two groups of images), so differences "
                    "between values may be chance.")  # fmt: skip
    elif same_layers(report):
        told.append(" ".join(_ruled_out(report, valid)))
    if any(cell.cka < 0 for cell in valid):
        told.append(
            "A true CKA is never below 0: the debiased estimate of one near 0 falls on both sides."
        )
    if len(valid) < len(cells):
        lost = len(cells) - len(valid)
        told.append(
            f"{lost} of {len(cells)} values are nan: features that do not vary above rounding."
        )
    return told


def cannot(report: Report) -> str:
    """What CKA cannot show, whatever the numbers are."""
    n = report.meta.get("n_images")
    images = f"these {n} images" if n else "these images"
    return (
        f"CKA compares how a layer arranges {images}, chiefly along the directions in which its "
        "features vary most. It cannot show whether the network still works: a layer with a high "
        "value may have lost a faint feature that later layers need, and one with a low value may "
        "serve them as well as before; accuracy has to be measured. The intervals tell how the "
        "values would scatter with other images of this kind, not with another network or other "
        "data, and each holds by itself: about one in twenty misses."
    )


def shortened(name: str, most: int = 30) -> str:
    """A name with its middle left out where it is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: (most - 1) // 2]}…{name[-(most // 2) :]}"


def _three(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _least(report: Report, cells: Sequence[Cell]) -> list[str]:
    """The layer least like itself, and whether the intervals settle that."""
    least = min(cells, key=lambda cell: cell.cka)
    told = f"Least like itself in view {report.reference} is {least.one} ({least})"
    if math.isnan(least.high) or len(cells) == 1:
        return [told + "."]
    rivals = _rivals(cells, least)
    if not rivals:
        return [told + "; the intervals of all others lie above its own."]
    if len(rivals) == 1:
        return [f"{told}, but the interval of {rivals[0].one} reaches into its own."]
    return [f"{told}, but the intervals of {len(rivals)} other values reach into its own, so "
            "which is lowest is open."]  # fmt: skip


def _rivals(cells: Sequence[Cell], least: Cell) -> list[Cell]:
    """The values whose intervals reach into that of the least; none where it has no interval."""
    return [
        cell
        for cell in cells
        if cell is not least and (cell.cka if math.isnan(cell.low) else cell.low) <= least.high
    ]


def _place(view: str) -> str:
    """Where a layer is looked at: a view that is named by a number is a size."""
    return f"at {view} px" if view.isdecimal() else f"in view {view}"


def _extremes(report: Report, cells: Sequence[Cell]) -> list[str]:
    most, least = (pick(cells, key=lambda cell: cell.cka) for pick in (max, min))
    if len(cells) == 1:
        return [f"There is one pair: {most.one} and {most.other} ({most})."]
    return [
        f"Of {len(cells)} pairs of layers, most alike are {most.one} and {most.other} ({most}), "
        f"least alike {least.one} and {least.other} ({least}); picked as extremes, both are "
        "likely to be a little exaggerated."
    ]


def _ruled_out(report: Report, cells: Sequence[Cell]) -> list[str]:
    """For which layers the interval excludes the mark, view by view."""
    below = [cell for cell in cells if cell.high < _MARK]
    views = [view for view in report.views if view != report.reference]
    said: dict[str, list[str]] = {}
    for view in views:
        here = [cell.layer for cell in below if cell.view == view]
        total = sum(cell.view == view for cell in cells)
        names = f"{listed(here)}" if len(here) <= 3 else f"{len(here)} of {total} layers"
        if total:
            every = "both" if total == 2 else f"all {total}"
            phrase = f"{every} layers" if len(here) == total > 1 else names or "no layer"
            said.setdefault(phrase, []).append(view)
    if len(said) > 8:
        said = {f"{len(below)} of {len(cells)} values": []}
    parts = [
        f"{what} in view{'s' * (len(where) > 1)} {listed(where)}" if where else what
        for what, where in said.items()
    ]
    above = sum(cell.low > _MARK for cell in cells)
    rest = len(cells) - above - len(below)
    told = [f"A CKA of {_MARK} is ruled out, the whole interval lying below it, for "
            f"{'; for '.join(parts)}."]  # fmt: skip
    undecided = f"does not decide for {rest} value{'s' * (rest > 1)}"
    if above:
        told.append(
            f"The interval lies wholly above {_MARK} for {above} other value{'s' * (above > 1)}"
            + (f" and {undecided}." if rest else ".")
        )
    elif rest:
        told.append(f"The interval {undecided}.")
    return told


def listed(values: Any) -> str:
    """Names in a row; of many the first few and how many more. A mapping: name (value)."""
    if isinstance(values, Mapping):
        values = [f"{name} ({value})" for name, value in values.items()]
    names = [str(value) for value in values or []]
    if len(names) > NAMED:
        return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
