"""Text in pictures: names and numbers made to fit the room that they have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.backend_bases import RendererBase
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["FONT", "Fitted", "annotate", "room_in", "row_in", "settle", "shown", "whole"]

FONT = 9.0  # points, the largest
_LEAST_FONT = 5.5  # points, the smallest worth printing
_COARSE = 0.0095  # half an interval that two decimals tell; below it is told in three


def row_in(rows: int) -> float:
    """Height of a row in inches: 0.27 for a few layers, 0.16 for a hundred, then ever less."""
    return max(min(0.27, 11 / rows), min(0.16, 26 / rows))


def room_in(names: Iterable[object]) -> float:
    """Inches that the longest name takes."""
    return max(len(name) for name in shown(names)) * FONT * 0.6 / 72


def shown(names: Iterable[object], limit: int = 36) -> list[str]:
    """Names as drawn: the middle of long ones left out, but no two made equal; $ is no formula."""
    full = [str(name) for name in names]
    for most in range(limit, max(limit, *map(len, full)) + 1):
        short = [
            name if len(name) <= most else f"{name[: (most - 1) // 2]}…{name[-(most // 2) :]}"
            for name in full
        ]
        if len(set(short)) == len(set(full)):
            break
    return [name.replace("$", r"\$") for name in short]


def settle(ax: Axes, columns: list[str], rows: list[str] | None) -> None:
    """Name columns, and rows if there are any, in a font that fits them, at every k-th if need be.

    Names change the room that is left for the cells, so the layout is worked out in between.
    """
    for settled in (False, True):
        width, height = _cell(ax)
        _name(ax.xaxis, columns, width, 0.0 if rows is None else 0.5, across=True)
        if rows is not None:
            _name(ax.yaxis, rows, height, 0.5, across=False)
        if not settled:
            whole(ax).draw_without_rendering()


def _name(axis: Axis, names: list[str], room: float, middle: float, *, across: bool) -> None:
    """Tick labels at the cells' middles: as large as the room (points) allows, else every k-th."""
    font = min(FONT, max(_LEAST_FONT, 0.8 * room))
    longest = max(len(line) for name in names for line in name.split("\n")) * 0.6 * font
    upright = across and longest > 0.95 * room
    lines = 1 + max(name.count("\n") for name in names) * upright
    step = math.ceil(1.15 * font * lines / room) if upright or not across else 1
    axis.set_ticks(np.arange(0, len(names), step) + middle, names[::step])
    axis.set_tick_params(labelsize=font, length=2, labelrotation=90 if upright else 0)


def whole(ax: Axes) -> Figure:
    """The figure, also of axes in a subfigure."""
    return ax.figure.canvas.figure


class Fitted(Text):
    """Text in the middle of a cell, shrunk at each drawing until it fits; left out if too small.

    The room is known only then: a layout engine, a resized window or a later panel changes it.
    `longest` is the longest text in any cell, so that all get one size.
    """

    longest = ""

    def draw(self, renderer: RendererBase) -> None:
        """Draw in the font size that fits."""
        if not isinstance(self.axes, Axes):
            return
        size = _fit(self.longest, _cell(self.axes))
        self.set_fontsize(size)
        if size >= _LEAST_FONT - 1:
            super().draw(renderer)


def annotate(
    ax: Axes,
    mesh: QuadMesh,
    values: NDArray[np.float64],
    half: NDArray[np.float64],
    blank: NDArray[np.bool_] | None = None,
) -> bool:
    """Write values into the cells of a mesh where they fit, black or white; True if with ±half.

    Nothing is written where `blank` is True.
    """
    pairs = list(zip(values.ravel().tolist(), half.ravel().tolist(), strict=True))
    texts = [_value(value, part, 2) for value, part in pairs]
    longer = [
        f"{_value(value, part, 2 if part >= _COARSE else 3)} ±{_short(part)}" if part > 0 else text
        for (value, part), text in zip(pairs, texts, strict=True)
    ]
    wide = _fit(max(longer, key=len), _cell(ax)) > _LEAST_FONT + 1 and longer != texts
    texts = longer if wide else texts
    longest = max(texts, key=len)
    if _fit(longest, _cell(ax)) < _LEAST_FONT:
        return False
    colours = mesh.to_rgba(np.nan_to_num(values.ravel()))[:, :3]  # (cells, 3)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    bright = linear @ [0.2126, 0.7152, 0.0722] > 0.18  # WCAG 2: black reads better than white
    for k, (text, value) in enumerate(zip(texts, values.ravel(), strict=True)):
        row, column = divmod(k, values.shape[1])
        if blank is not None and blank[row, column]:
            continue
        style: dict[str, Any] = {"color": "black" if bright[k] else "white"}
        if np.isnan(value):
            style = {"color": "0.2", "bbox": {"boxstyle": "square,pad=0.1", "fc": "0.88", "lw": 0}}
        written = Fitted(column + 0.5, row + 0.5, text, ha="center", va="center_baseline")
        written.longest = longest
        written.set(in_layout=False, **style)
        ax.add_artist(written)
    return wide


def _value(value: float, half: float, decimals: int) -> str:
    """A value rounded, but 1 only where it is 1, or its interval reaches there.

    What is less than 1e-6 below 1 counts as 1: features are float32.
    """
    below = value < 1 - 1e-6 and not value + half >= 1
    for k in range(decimals, 4):
        if not (below and round(value, k) >= 1):
            return f"{round(value, k) + 0.0:.{k}f}"  # no -0.00
    return "0.999"


def _short(part: float) -> str:
    """Half an interval in as few characters as tell it from 0: .12, .03, .004."""
    return f"{part:.2f}".lstrip("0") if part >= _COARSE else f"{max(part, 0.001):.3f}".lstrip("0")


def _cell(ax: Axes) -> tuple[float, float]:
    """Width and height in points of a cell that is 1 wide and high in data coordinates."""
    box, point = ax.get_window_extent(), whole(ax).dpi / 72
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return box.width / point / abs(right - left), box.height / point / abs(top - bottom)


def _fit(text: str, cell: tuple[float, float]) -> float:
    """The font size (points) at which text fits a cell of (width, height) points."""
    return min(FONT, 0.72 * cell[1], 0.85 * cell[0] / (0.6 * len(text)))
