"""Text in figures: tick labels and cell values, sized to the space that they have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

from cka_probe.plot.colours import black_reads_better
from cka_probe.summary import ellipsize

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.backend_bases import RendererBase
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "FONT",
    "Fitted",
    "annotate",
    "label_axes",
    "labels_width_in",
    "root_figure",
    "row_height_in",
    "unique_labels",
]

FONT = 9.0  # points, the largest
_LEAST_FONT = 5.5  # points, the smallest that can be read in print
_COARSE = 0.0095  # half widths from here on round to .01 or more in two decimals; below, use three
_EM = 0.6  # width of a character in units of the font size: DejaVu Sans, mixed text


def row_height_in(rows: int) -> float:
    """Height of a row in inches: 0.27 for a few layers, 0.16 for a hundred, less for more."""
    return max(min(0.27, 11 / rows), min(0.16, 26 / rows))


def labels_width_in(names: Iterable[object]) -> float:
    """Width in inches of the longest name."""
    return max(len(name) for name in unique_labels(names)) * FONT * _EM / 72


def unique_labels(names: Iterable[object], limit: int = 36) -> list[str]:
    """Names as tick labels: long ones with an ellipsis, but no two made equal; "$" is escaped."""
    full = [str(name) for name in names]
    for most in range(limit, max(limit, *map(len, full)) + 1):
        short = [ellipsize(name, most) for name in full]
        if len(set(short)) == len(set(full)):
            break
    return [name.replace("$", r"\$") for name in short]


def label_axes(ax: Axes, columns: list[str], rows: list[str] | None) -> None:
    """Label columns, and rows if given, in a font that fits; every k-th label where there are many.

    Labels change the space that is left for the cells, so the layout is computed in between.
    """
    for final in (False, True):
        width, height = _cell(ax)
        _label(ax.xaxis, columns, width, 0.0 if rows is None else 0.5, across=True)
        if rows is not None:
            _label(ax.yaxis, rows, height, 0.5, across=False)
        if not final:
            root_figure(ax).draw_without_rendering()


def _label(axis: Axis, names: list[str], space: float, centre: float, *, across: bool) -> None:
    """Tick labels at the cells' centres: as large as the space (points) allows, else every k-th."""
    font = min(FONT, max(_LEAST_FONT, 0.8 * space))
    longest = max(len(line) for name in names for line in name.split("\n")) * _EM * font
    upright = across and longest > 0.95 * space
    lines = 1 + max(name.count("\n") for name in names) * upright
    step = math.ceil(1.15 * font * lines / space) if upright or not across else 1
    axis.set_ticks(np.arange(0, len(names), step) + centre, names[::step])
    axis.set_tick_params(labelsize=font, length=2, labelrotation=90 if upright else 0)


def root_figure(ax: Axes) -> Figure:
    """The figure of some axes; of axes in a subfigure, the figure around it."""
    return ax.figure.canvas.figure


class Fitted(Text):
    """Text in the centre of a cell, shrunk until it fits each time it is drawn.

    The cell's size is known only then: a layout engine, a resized window or a later panel changes
    it. Text that would be too small to read is not drawn. `longest` is the longest text of any
    cell, so that all cells get one font size.
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
    """Write the values into the cells of a mesh, in black or white, if they fit.

    Args:
        ax: the axes of the mesh.
        mesh: the coloured cells.
        values: (rows, columns).
        half: (rows, columns) half widths of the intervals; nan or 0 for none.
        blank: (rows, columns) True where nothing is written.

    Returns:
        Whether the half widths are written, too.
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
    bright = black_reads_better(colours)
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
    """A value rounded, but "1.00" only if it is 1 or its interval includes 1.

    A value less than 1e-6 below 1 counts as 1: features are float32.
    """
    below = value < 1 - 1e-6 and not value + half >= 1
    for k in range(decimals, 4):
        if not (below and round(value, k) >= 1):
            return f"{round(value, k) + 0.0:.{k}f}"  # no -0.00
    return "0.999"


def _short(part: float) -> str:
    """A half width in the fewest characters that differ from 0: .12, .03, .004."""
    return f"{part:.2f}".lstrip("0") if part >= _COARSE else f"{max(part, 0.001):.3f}".lstrip("0")


def _cell(ax: Axes) -> tuple[float, float]:
    """Width and height in points of a cell that is 1 wide and high in data coordinates."""
    box, point = ax.get_window_extent(), root_figure(ax).dpi / 72
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return box.width / point / abs(right - left), box.height / point / abs(top - bottom)


def _fit(text: str, cell: tuple[float, float]) -> float:
    """The font size (points) at which text fits a cell of (width, height) points."""
    return min(FONT, 0.72 * cell[1], 0.85 * cell[0] / (_EM * len(text)))
