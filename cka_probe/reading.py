"""A report in words: what its numbers show, what CKA cannot show, and how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.report import Report, same_layers

__all__ = ["LEVEL", "Cell", "absent", "cannot", "facts", "read_cells", "same_layers"]
__all__ += ["shortened", "shows"]

LEVEL = 0.95  # of every interval here
_MARK = 0.9  # the similarity that intervals are held against
_NAMED = 12  # names in a list before "and N more"
_READ = {  # meta that `facts` puts into lines of its own, or that other lines hold
    "estimator", "kernel", "bandwidth", "reduce", "reference", "n_images", "groups", "batch_size",
    "seed", "resize", "antialias", "unbiased", "run", "left_out", "unreached", "skipped", "layers",
    "view_macs", "versions", "seconds",
}  # fmt: skip


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
    """What the numbers show, in plain sentences that say no more than the intervals allow.

    Held against the reference: the layer least like itself, whether the intervals settle that it
    is the least, and for which layers a CKA of 0.9 is ruled out. Where the views have no layers in
    common: the most and the least alike pair.
    """
    cells = read_cells(report)
    valid = [cell for cell in cells if not math.isnan(cell.cka)]
    if not valid:
        return "There is no value to read: the report has no pair of layers that both vary."
    told = _least(report, valid) if same_layers(report) else _extremes(report, valid)
    if all(math.isnan(cell.low) for cell in valid):
        told.append("There are no error bars (fewer than two groups of images), so differences "
                    "between values may be chance.")  # fmt: skip
    elif same_layers(report):
        told += _ruled_out(report, valid)
    if any(cell.cka < 0 for cell in valid):
        told.append(
            "A true CKA is never below 0: the debiased estimate of one near 0 falls on both sides."
        )
    if len(valid) < len(cells):
        lost = len(cells) - len(valid)
        told.append(
            f"{lost} of {len(cells)} values are nan: features that do not vary above rounding."
        )
    return " ".join(told)


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


def facts(report: Report) -> list[tuple[str, str]]:
    """How the report was made: (name, value) lines for a reader, as far as its meta tells."""
    meta = report.meta
    run: dict[str, Any] = meta["run"] if isinstance(meta.get("run"), dict) else {}
    kernel = str(meta.get("kernel", ""))
    if kernel == "rbf" and meta.get("bandwidth") is not None:
        kernel += f", sigma {meta['bandwidth']:g} of the median distance"
    debiased = {"True": ", debiased", "False": ", biased"}.get(str(meta.get("unbiased")), "")
    groups = f"{meta['groups']} groups of images" if meta.get("groups") else ""
    method = f"jackknife over {groups}, Student's t" if groups else ""
    lines = [
        *((name, _told(value)) for name, value in meta.items() if name not in _READ),
        ("data", _told(run.get("images"))),
        ("images", str(meta.get("n_images", ""))),
        ("left out", _list(meta.get("left_out"))),
        ("views", _views(run.get("views"))),
        ("reference view", report.reference),
        ("resize", _resize(meta)),
        ("kernel", kernel),
        ("feature reduction", _told(meta.get("reduce"))),
        ("estimator", f"{meta.get('estimator', '')}{debiased}" if meta.get("estimator") else ""),
        ("batch size", _told(meta.get("batch_size"))),
        ("intervals", f"{100 * LEVEL:g} %, {method}" if method else "none"),
        ("seed", _told(meta.get("seed"))),
        ("mixed precision", "bfloat16" if run.get("amp") else ""),
        ("MACs per image", _macs(meta.get("view_macs"))),
        ("never reached", _list(meta.get("unreached"))),
        ("cannot be tapped", _list(meta.get("skipped"))),
        ("versions", _told(meta.get("versions"))),
        ("time taken", f"{meta['seconds']:g} s" if meta.get("seconds") else ""),
    ]
    return [(name.replace("_", " "), value) for name, value in lines if value]


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
    rivals = [
        cell
        for cell in cells
        if cell is not least and (cell.cka if math.isnan(cell.low) else cell.low) <= least.high
    ]
    if not rivals:
        return [told + "; the intervals of all others lie above its own."]
    if len(rivals) == 1:
        return [f"{told}, but the interval of {rivals[0].one} reaches into its own."]
    return [f"{told}, but the intervals of {len(rivals)} other values reach into its own, so "
            "which is lowest is open."]  # fmt: skip


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
        names = f"{_list(here)}" if len(here) <= 3 else f"{len(here)} of {total} layers"
        if total:
            every = "both" if total == 2 else f"all {total}"
            phrase = f"{every} layers" if len(here) == total > 1 else names or "no layer"
            said.setdefault(phrase, []).append(view)
    if len(said) > 8:
        said = {f"{len(below)} of {len(cells)} values": []}
    parts = [
        f"{what} in view{'s' * (len(where) > 1)} {_list(where)}" if where else what
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


def _list(values: Any) -> str:
    """Names in a row; of many the first few and how many more. A mapping: name (value)."""
    if isinstance(values, Mapping):
        values = [f"{name} ({value})" for name, value in values.items()]
    names = [str(value) for value in values or []]
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _told(value: Any) -> str:
    """Any value of meta in one line; 64 hex digits are a SHA-256, of which 12 are shown."""
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, Mapping):
        parts = ((name, _told(part)) for name, part in value.items())
        return ", ".join(
            part if name == "name" else f"{name.replace('_', ' ')} {part}"
            for name, part in parts
            if part
        )
    if isinstance(value, list):
        return " ".join(map(_told, value)) if len(value) <= _NAMED else _list(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    is_sha = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_sha else text


def _views(views: Any) -> str:
    """Each view's transform, and its network's SHA-256 (once where all share one)."""
    if not isinstance(views, dict):
        return ""
    shas = {name: _told(view.get("model")) for name, view in views.items()}
    one = len(set(shas.values())) == 1
    lines = [
        f"{name}: {_transform(view.get('transform'))}" + ("" if one else f", network {shas[name]}")
        for name, view in views.items()
    ]
    return "\n".join([*lines, *([f"network {next(iter(shas.values()))}"] if one else [])])


def _transform(transform: Any) -> str:
    """A transform's printed form; of our own only what is set."""
    inner = re.fullmatch(r"View\((.*)\)", _told(transform))
    if not inner:
        return _told(transform) or "as they are"
    parts = re.split(r", (?=\w+=)", inner[1])
    return ", ".join(part.replace("=", " ", 1) for part in parts if not part.endswith("=None"))


def _resize(meta: Mapping[str, Any]) -> str:
    if not meta.get("resize"):
        return ""
    return f"{meta['resize']}, {'' if meta.get('antialias', True) else 'not '}antialiased"


def _macs(macs: Any) -> str:
    """MACs of each view, in thousands, millions or billions."""
    if not isinstance(macs, Mapping):
        return ""
    told = []
    for view, count in macs.items():
        unit = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= u[0]), (1, ""))
        told.append(f"{view}: {count / unit[0]:.3g} {unit[1]}".rstrip())
    return " · ".join(told)
