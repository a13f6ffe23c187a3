"""Report: the CKA of all layers in all views, with standard errors, names and provenance."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cka_probe.intervals import check_level, student_t
from cka_probe.io import load_npz, plain, save_npz

__all__ = ["FORMAT", "Report", "same_layers"]

FORMAT = 1  # of the .npz; a reader refuses what is newer
_ARRAYS = ("cka", "stderr", "view", "layer")
_ROUNDING = 1e-9  # asymmetry and distance of the diagonal from 1 that count as rounding
_WHAT = ("cka", "stderr", "low", "high")


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """CKA between all entries, an entry being one layer in one view, with standard errors.

    Validated on creation: shapes, symmetry, a diagonal of 1 or nan, finite or nan, no entry twice.
    Asymmetry of rounding (up to 1e-9) is averaged out; the arrays are copied and read-only. Layers
    of one view are in execution order. CKA is that of Kornblith et al. 2019; a debiased value may
    be below 0 and is kept.

    Attributes:
        cka: (m, m) float64, symmetric; diagonal exactly 1, or nan where a layer is constant.
        stderr: (m, m) float64 standard errors, nan where there were fewer than 2 groups.
        view: (m,) name of each entry's view.
        layer: (m,) name of each entry's layer.
        meta: provenance, as JSON would return it: tuples become lists, nan and infinity null. Used
            here: "groups" (jackknife groups), "reference" (a view), "estimator", "kernel",
            "n_images"; all optional.

    Raises:
        TypeError: arrays that hold no numbers, names that are no text, meta that is no JSON.
        ValueError: any other of the conditions above fails.
    """

    cka: NDArray[np.float64]
    stderr: NDArray[np.float64]
    view: NDArray[np.str_]
    layer: NDArray[np.str_]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        view, layer = _names(self.view, "view"), _names(self.layer, "layer")
        if len(view) != len(layer) or not len(view):
            raise ValueError(f"views and layers unpaired: {len(view)}, {len(layer)}: pair them")
        entries = Counter(zip(view.tolist(), layer.tolist(), strict=True))
        twice, times = entries.most_common(1)[0]
        if times > 1:
            raise ValueError(f"an entry stands {times} times: {twice}: name each once")
        cka, stderr = _square(self.cka, len(view), "cka"), _square(self.stderr, len(view), "stderr")
        diagonal = cka.diagonal()
        odd = np.flatnonzero(np.abs(diagonal - 1) > _ROUNDING)  # nan is not odd
        if odd.size:
            entry, value = (str(view[odd[0]]), str(layer[odd[0]])), diagonal[odd[0]]
            raise ValueError(f"an entry's CKA with itself: {value} for {entry}: give 1 or nan")
        if (stderr < 0).any():
            raise ValueError(f"negative standard error: {np.nanmin(stderr)}: give 0, more or nan")
        cka[np.diag_indices_from(cka)] = np.where(np.isnan(diagonal), np.nan, 1.0)
        meta = plain(self.meta)
        if not isinstance(meta, dict):
            raise TypeError(f"meta is not a dict: {self.meta!r:.60}: give one, if need be empty")
        if not isinstance(meta.get("groups") or 0, int | float):
            raise TypeError(
                f"groups are no number: {meta['groups']!r:.60}: give how many there are"
            )
        for name, array in zip(_ARRAYS, (cka, stderr, view, layer), strict=True):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "meta", meta)
        if meta.get("reference") is not None:
            self._known(meta["reference"])

    def __eq__(self, other: object) -> bool:
        """Same numbers (nan equals nan), names and meta."""
        if not isinstance(other, Report):
            return NotImplemented
        same = self.meta == other.meta
        for name in _ARRAYS:
            numbers = name in ("cka", "stderr")
            same &= np.array_equal(getattr(self, name), getattr(other, name), equal_nan=numbers)
        return same

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        """Return m, the number of entries."""
        return len(self.view)

    def __repr__(self) -> str:
        return f"<Report of {len(self)} entries. {self.summary()}>"

    def _repr_html_(self) -> str:
        # Upwards, and only when a notebook asks: drawing needs matplotlib.
        from cka_probe.plot.figures import as_html

        return as_html(self)

    @property
    def views(self) -> list[str]:
        """The views, in order of first appearance."""
        return list(dict.fromkeys(self.view.tolist()))

    @property
    def layers(self) -> list[str]:
        """The layers of all views in execution order, each once.

        A layer that only a later view has is placed after its predecessor in that view.
        """
        merged: list[str] = []
        for view in self.views:
            names = self.layers_of(view)
            for k, name in enumerate(names):
                if name in merged:
                    continue
                later = (merged.index(other) for other in names[k + 1 :] if other in merged)
                before = merged.index(names[k - 1]) + 1 if k else min(later, default=len(merged))
                merged.insert(before, name)
        return merged

    def layers_of(self, view: str | int) -> list[str]:
        """The layers of one view, in execution order."""
        names: list[str] = self.layer[self.view == self._known(view)].tolist()
        return names

    @property
    def reference(self) -> str:
        """The view that others are compared with: `meta["reference"]`, else the last one."""
        return str(self.meta.get("reference") or self.views[-1])

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Confidence interval of every cell: cka -+ t * stderr, t with groups - 1 degrees.

        The ends are not clipped to 0..1; the diagonal is (1, 1) where CKA is 1.

        Args:
            level: coverage, between 0 and 1.

        Returns:
            (low, high), each (m, m); off the diagonal nan where the standard error is, and
            everywhere if meta names fewer than 2 groups or none.

        Raises:
            ValueError: for a level that is not between 0 and 1.
        """
        check_level(level)
        half = student_t(self.meta.get("groups") or 0, level) * self.stderr
        np.fill_diagonal(half, 0.0)
        return self.cka - half, self.cka + half

    def values(self, what: str = "cka", *, level: float = 0.95) -> NDArray[np.float64]:
        """One of the (m, m) tables by name: "cka", "stderr", or "low" or "high" of the interval."""
        if what not in _WHAT:
            raise ValueError(f"unknown value: {what!r}: use one of {', '.join(map(repr, _WHAT))}")
        if what in ("cka", "stderr"):
            return self.cka if what == "cka" else self.stderr
        return self.interval(level)[what == "high"]

    def against(
        self, view: str | int | None = None, what: str = "cka", *, level: float = 0.95
    ) -> pd.DataFrame:
        """Layers x views: CKA of each layer in each view with the same layer in one view.

        Args:
            view: that view, 224 for "224"; None is the reference (the last view if meta has none).
            what: "cka", "stderr", or "low" or "high" of the interval.
            level: coverage of the interval.

        Returns:
            Rows in execution order, columns in order of first appearance; nan where one of the two
            views lacks the layer.

        Raises:
            ValueError: for an unknown view or value.
        """
        view = self.reference if view is None else self._known(view)
        values, views, layers = self.values(what, level=level), self.views, self.layers
        where = self._where()
        table = np.full((len(layers), len(views)), np.nan)
        for (other, name), k in where.items():
            if (view, name) in where:
                table[layers.index(name), views.index(other)] = values[k, where[view, name]]
        rows, columns = pd.Index(layers, name="layer"), pd.Index(views, name="view")
        frame: pd.DataFrame = pd.DataFrame(table, index=rows, columns=columns)
        return frame

    def between(
        self,
        view_a: str | int | None = None,
        view_b: str | int | None = None,
        what: str = "cka",
        *,
        level: float = 0.95,
    ) -> pd.DataFrame:
        """Layers x layers: CKA of the layers of one view with the layers of another.

        Args:
            view_a: view of the rows. None, in a report of one or two views: the first.
            view_b: view of the columns. None: the last view if `view_a` is None too, else `view_a`.
            what: "cka", "stderr", or "low" or "high" of the interval.
            level: coverage of the interval.

        Returns:
            Layers in execution order; the axes are named "layer in VIEW".

        Raises:
            ValueError: for an unknown view or value, or none named in a report of many views.
        """
        if view_a is None and len(self.views) > 2:
            known = ", ".join(map(repr, self.views))
            raise ValueError(
                f"no views named: the report has {len(self.views)}: name two of {known}"
            )
        if view_b is None:
            view_b = self.views[-1] if view_a is None else view_a
        view_a = self._known(self.views[0] if view_a is None else view_a)
        view_b = self._known(view_b)
        rows = np.flatnonzero(self.view == view_a)
        columns = np.flatnonzero(self.view == view_b)
        frame: pd.DataFrame = pd.DataFrame(
            self.values(what, level=level)[np.ix_(rows, columns)],
            index=pd.Index(self.layer[rows].tolist(), name=f"layer in {view_a}"),
            columns=pd.Index(self.layer[columns].tolist(), name=f"layer in {view_b}"),
        )
        return frame

    def to_frame(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row for each unordered pair of entries, the pair of an entry with itself included.

        Returns:
            What cka.csv holds: m (m + 1) / 2 rows, the upper triangle row by row; columns view_a,
            layer_a, view_b, layer_b, cka, stderr, low, high.
        """
        a, b = np.triu_indices(len(self))
        columns: dict[str, Any] = {}
        for end, k in (("a", a), ("b", b)):
            columns |= {
                f"view_{end}": self.view[k].tolist(),
                f"layer_{end}": self.layer[k].tolist(),
            }
        columns |= {what: self.values(what, level=level)[a, b] for what in _WHAT}
        frame: pd.DataFrame = pd.DataFrame(columns)
        return frame

    def summary(self) -> str:
        """What was measured, in one sentence, and the headline of `cka_probe.summary`."""
        from cka_probe.summary import few_groups, headline  # upwards: they read a Report

        source = [f"{self.meta['estimator']} estimator"] if self.meta.get("estimator") else []
        source += [f"{self.meta['n_images']} images"] if self.meta.get("n_images") else []
        kernel = {"linear": "Linear ", "rbf": "RBF "}.get(str(self.meta.get("kernel")), "")
        measure = f"{kernel}CKA ({', '.join(source)})" if source else f"{kernel}CKA"
        layers, views = len(self.layers), len(self.views)
        size = f"{layers} layer{'s' * (layers > 1)} in {views} view{'s' * (views > 1)}"
        return " ".join([f"{measure} of {size}.", headline(self), *few_groups(self)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz, without pickle: cka, stderr, view, layer, meta (JSON text), format.

        The path is used as given, without a suffix added. The file is written whole or not at all.

        Raises:
            OSError: where the folder does not exist or cannot be written.
        """
        save_npz(path, {name: getattr(self, name) for name in _ARRAYS}, self.meta, version=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no report, is damaged, or of a newer format.
        """
        arrays, meta = load_npz(path, _ARRAYS, version=FORMAT)
        try:
            return cls(arrays["cka"], arrays["stderr"], arrays["view"], arrays["layer"], meta)
        except (TypeError, ValueError) as error:
            why = str(error).replace(": ", ", ")
            raise ValueError(f"no proper report: {os.fspath(path)}: {why}") from error

    def _known(self, view: str | int) -> str:
        """The view, if there is one of this name; a number is the name of a size."""
        known, view = self.views, str(view) if isinstance(view, int) else view
        if view not in known:
            raise ValueError(f"unknown view: {view!r}: use one of {', '.join(map(repr, known))}")
        return view

    def _where(self) -> dict[tuple[str, str], int]:
        """(view, layer) -> the entry's index."""
        pairs = zip(self.view.tolist(), self.layer.tolist(), strict=True)
        return {pair: k for k, pair in enumerate(pairs)}


def same_layers(report: Report) -> bool:
    """Whether the views have (nearly) the same layers, so that each is compared with itself.

    False for a single view, and for two networks whose layers differ: there only pairs of layers
    can be compared.
    """
    sets = {view: set(report.layers_of(view)) for view in report.views}
    own = sets.pop(report.reference)
    shared = sum(len(own & other) for other in sets.values())
    return bool(sets) and shared >= 0.9 * sum(len(own | other) for other in sets.values())


def _names(values: Any, what: str) -> NDArray[np.str_]:
    """Names as an array of text (m,), refusing anything that is not text."""
    found = list(values)
    if not all(isinstance(name, str) for name in found) or isinstance(values, str):
        raise TypeError(f"{what} holds more than text: {values!r:.60}: give one name an entry")
    return np.array(found, dtype=np.str_)


def _square(values: Any, m: int, what: str) -> NDArray[np.float64]:
    """Numbers as a symmetric (m, m) float64 array of its own."""
    try:
        table = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{what} holds more than numbers: {values!r:.60}: give an array") from None
    if table.shape != (m, m):
        raise ValueError(f"{what} does not fit {m} entries: shape {table.shape}: give ({m}, {m})")
    if np.isinf(table).any():
        raise ValueError(f"{what} is infinite: {np.argwhere(np.isinf(table))[0]}: use nan or less")
    even = np.isclose(table, table.T, rtol=0, atol=_ROUNDING, equal_nan=True)
    if not even.all():
        cell = tuple(np.argwhere(~even)[0].tolist())
        raise ValueError(f"{what} is not symmetric: at {cell}: give (x + x.T) / 2")
    middle: NDArray[np.float64] = (table + table.T) / 2
    return middle
