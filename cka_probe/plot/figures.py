"""Figures of a report: heatmap, curve, grid.

Each function draws into `ax` and returns it; none shows or saves. Without `ax` it makes a figure
through pyplot, sized to the report, which a notebook displays by itself; with `ax` pyplot is not
touched. Give axes of a figure with `layout="constrained"`, so that labels have space.

Colours are colour-blind safe and fixed to CKA 0..1, so that two figures compare. A negative value
has the colour of 0 and keeps its number; nan is grey and hatched; the cell of a layer that a view
lacks is blank.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cka_probe.io import replacing
from cka_probe.plot.labels import (
    FONT,
    annotate,
    label_axes,
    labels_width_in,
    root_figure,
    row_height_in,
    unique_labels,
)
from cka_probe.summary import missing_cells, same_layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from cka_probe.report import Report

__all__ = ["as_html", "curve", "grid", "heatmap", "save_figure"]

_SUFFIXES = (".png", ".pdf", ".svg")
MARKERS = "osDv^PX*"
_made: WeakSet[Figure] = WeakSet()  # figures made here, which save_figure closes


def heatmap(
    report: Report,
    view: str | int | None = None,
    *,
    ax: Axes | None = None,
    level: float = 0.95,
    colorbar: bool = True,
) -> Axes:
    """Layers x views: CKA of each layer in each view with the same layer in one view.

    A cell also shows half the width of its confidence interval where there is space.

    Args:
        report: the report to draw.
        view: the view that the others are compared with; None is the report's reference.
        ax: the axes to draw into; None makes a figure that grows with the number of layers.
        level: coverage of the intervals, in (0, 1).
        colorbar: whether to draw a colour bar beside the axes.

    Returns:
        The axes, layers in execution order from top to bottom.

    Raises:
        ValueError: for an unknown view, or a level that is not between 0 and 1.
    """
    view = report.reference if view is None else str(view)
    table = report.against(view)
    half = (report.against(view, "high", level=level) - table).to_numpy()
    ax = axes_for(ax, _heatmap_size(table))
    missing = missing_cells(report, view)
    key = f"CKA with {unique_labels([view], 16)[0]}" if colorbar else None
    mesh = _mesh(ax, table, key, blank=missing)
    names = [
        "\n".join(wrap(name, 11, break_long_words=False)) for name in unique_labels(table.columns)
    ]
    names[list(table.columns).index(view)] += "\n(reference)"
    label_axes(ax, names, unique_labels(table.index))
    ax.set(xlabel="view", ylabel="layer")
    if len(table) > 30:
        ax.tick_params(top=True, labeltop=True)
    if annotate(ax, mesh, table.to_numpy(), half, blank=missing):
        ax.set_title(f"± half of the {100 * level:g} % interval", fontsize=FONT, loc="right")
    return ax


def grid(
    report: Report,
    view_a: str | int | None = None,
    view_b: str | int | None = None,
    *,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Layers x layers: CKA of each layer of one view with each layer of another.

    Args:
        report: the report to draw.
        view_a: view of the rows; as in `Report.between`, None works in a report of up to two views.
        view_b: view of the columns; None is the last view if `view_a` is None too, else `view_a`.
        ax: the axes to draw into; None makes a figure that grows with the number of layers.
        colorbar: whether to draw a colour bar beside the axes.

    Returns:
        The axes, with square cells, the first layers at the top left.

    Raises:
        ValueError: for an unknown view, or none named in a report of more than two.
    """
    table = report.between(view_a, view_b)
    ax = axes_for(ax, _grid_size(table))
    ax.set_aspect("equal")
    mesh = _mesh(ax, table, "CKA" if colorbar else None)
    label_axes(ax, unique_labels(table.columns), unique_labels(table.index))
    ax.set(
        xlabel=unique_labels([table.columns.name], 30)[0],
        ylabel=unique_labels([table.index.name], 30)[0],
    )
    annotate(ax, mesh, table.to_numpy(), np.zeros(table.shape))
    return ax


def curve(
    report: Report, view: str | int | None = None, *, ax: Axes | None = None, level: float = 0.95
) -> Axes:
    """CKA with one view along the layers: a line with an interval band for each other view.

    A value that is nan leaves a gap.

    Args:
        report: the report to draw.
        view: the view that the others are compared with, a dashed line at 1; None is the reference.
        ax: the axes to draw into; None makes a figure that grows with the number of layers.
        level: coverage of the bands, in (0, 1).

    Returns:
        The axes, layers in execution order from left to right, the legend to the right.

    Raises:
        ValueError: for an unknown view, or a level that is not between 0 and 1.
    """
    view = report.reference if view is None else str(view)
    table = report.against(view)
    low, high = (report.against(view, what, level=level) for what in ("low", "high"))
    layers = len(table)
    columns = math.ceil(len(table.columns) / 13)  # of the legend
    width_in = 0.6 + max(5.0, layers * row_height_in(layers)) + columns * 1.4
    ax = axes_for(ax, (width_in, 3.6 + labels_width_in(table.index)))
    others = [name for name in table.columns if name != view]
    labels = dict(zip(table.columns, unique_labels(table.columns), strict=True))
    x = np.arange(layers)
    for k, (name, colour) in enumerate(zip(others, _colours(others), strict=True)):
        y, lower, upper = (frame[name].to_numpy() for frame in (table, low, high))
        ax.fill_between(x, lower, upper, color=colour, alpha=0.2, linewidth=0)
        known = np.concatenate([[False], ~np.isnan(lower), [False]])
        alone = known[1:-1] & ~known[:-2] & ~known[2:]  # a band of one layer has no width
        ax.vlines(x[alone], lower[alone], upper[alone], color=colour, alpha=0.5)
        mark, size = MARKERS[k % len(MARKERS)], 4 if layers <= 40 else 2.5
        label = " " * labels[name].startswith("_") + labels[name]  # matplotlib hides "_name"
        ax.plot(x, y, color=colour, marker=mark, markersize=size, linewidth=1.3, label=label)
    ax.axhline(1, color="0.4", linestyle="--", linewidth=1, label=f"{labels[view]} (reference)")
    ax.set_xlim(-0.5, layers - 0.5)
    least = np.nanmin([0.0, *low.to_numpy().ravel(), *table.to_numpy().ravel()])
    ax.set_ylim(max(-1.0, least - 0.05 * (least < 0)), 1.03)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    sns.despine(ax=ax)
    bands = low[others].notna().to_numpy().any()
    title = f"view, with its\n{100 * level:g} % interval" if bands else "view"
    ax.legend(
        title=title,
        fontsize=FONT,
        title_fontsize=FONT,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        ncols=columns,
    )
    label_axes(ax, unique_labels(table.index), None)
    ax.set(xlabel="layer, in execution order", ylabel=f"CKA with {unique_labels([view], 16)[0]}")
    return ax


def as_html(report: Report) -> str:
    """What a notebook displays of a report: a figure inlined as PNG, and the summary.

    The figure is the heatmap, or the grid where the views' layers differ (two networks). pyplot is
    not touched, so that a notebook shows it once.
    """
    as_heatmap = same_layers(report)
    rows = next((view for view in report.views if view != report.reference), report.reference)
    pair = () if len(report.views) <= 2 else (rows, report.reference)
    size_in = _heatmap_size(report.against()) if as_heatmap else _grid_size(report.between(*pair))
    figure = Figure(figsize=size_in, layout="compressed")
    if as_heatmap:
        heatmap(report, ax=figure.add_subplot())
    else:
        grid(report, *pair, ax=figure.add_subplot())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = html.escape(report.summary())
    return f'<img style="max-width:100%" alt="{text}" src="{source}"><p>{text}</p>'


def save_figure(ax: Axes, path: str | os.PathLike[str], *, dpi: int = 160) -> None:
    """Write the figure of some axes, whole or not at all; close it if it was made here.

    Args:
        ax: any axes of the figure.
        path: the file, ending in .png, .pdf or .svg; an existing one is replaced.
        dpi: dots per inch of a PNG.

    Raises:
        ValueError: for another suffix.
        OSError: where the folder does not exist or cannot be written.
    """
    kind = Path(path).suffix.lower()
    if kind not in _SUFFIXES:
        raise ValueError(f"unknown picture format: {kind!r}: use one of {', '.join(_SUFFIXES)}")
    figure = root_figure(ax)
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(kind)
    steady: Any = {"svg.hashsalt": "cka_probe", "pdf.fonttype": 42}  # same report, same bytes
    try:
        with replacing(path) as temporary, mpl.rc_context(steady):
            box = None if figure in _made else "tight"
            figure.savefig(temporary, dpi=dpi, bbox_inches=box, metadata=undated)
    finally:
        if figure in _made:
            plt.close(figure)


def axes_for(ax: Axes | None, size_in: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure whose layout leaves space for the labels."""
    if ax is not None:
        return ax
    figure = plt.figure(figsize=size_in, layout="compressed")
    _made.add(figure)
    return figure.add_subplot()


def _heatmap_size(table: pd.DataFrame) -> tuple[float, float]:
    """Width and height in inches of a heatmap whose values can be read."""
    layers, views = table.shape
    column_in = 0.85 if views <= 12 else 0.5 if views <= 40 else 0.2
    height_in = max(2.6, 1.1 + layers * row_height_in(layers))
    return 1.2 + labels_width_in(table.index) + views * column_in, height_in


def _grid_size(table: pd.DataFrame) -> tuple[float, float]:
    """Width and height in inches of a grid, which has square cells."""
    most = max(table.shape)
    side_in = 0.36 if most <= 30 else row_height_in(most)
    width_in = max(3.0, 1.3 + labels_width_in(table.index) + table.shape[1] * side_in)
    return width_in, max(2.6, 0.5 + labels_width_in(table.columns) + table.shape[0] * side_in)


def _colours(views: list[str]) -> list[tuple[float, float, float]]:
    """A colour for each view: from dark to bright by size where views are sizes, else distinct."""
    try:
        rank = np.argsort(np.argsort([float(name) for name in views]))
    except ValueError:
        if len(views) <= 10:
            return list(sns.color_palette("colorblind", len(views)))
        rank = np.arange(len(views))
    colours = mpl.colormaps["viridis"](0.85 * rank / max(1, len(views) - 1))
    return [(r, g, b) for r, g, b, _ in colours]


def _mesh(
    ax: Axes, table: pd.DataFrame, key: str | None, blank: NDArray[np.bool_] | None = None
) -> QuadMesh:
    """Coloured cells, the first row at the top; nan is grey and hatched unless it is blank."""
    values = table.to_numpy()
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(values), cmap="viridis", vmin=0, vmax=1, rasterized=values.size > 10000
    )
    lost = np.isnan(values) if blank is None else np.isnan(values) & ~blank
    for row, column in np.argwhere(lost):
        cell = Rectangle((column, row), 1, 1, facecolor="0.88", edgecolor="0.6", linewidth=0)
        cell.set_hatch("////")
        ax.add_patch(cell)
    ax.set_xlim(0, values.shape[1])
    ax.set_ylim(values.shape[0], 0)
    if key is not None:
        share = min(1.0, 4 / root_figure(ax).get_figheight())
        bar = ax.figure.colorbar(
            mesh, ax=ax, label=key, pad=0.02, shrink=share, anchor=(0, 1), aspect=25
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=FONT)
    return mesh
