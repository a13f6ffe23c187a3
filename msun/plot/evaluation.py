"""Figures of an evaluation: accuracy by image size, accuracy by cost.

Each function draws into `ax` and returns it; none shows or saves (use
`cka_probe.plot.save_figure`). An arm has the same colour and marker in both figures.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from cka_probe.plot.figures import MARKERS, axes_for
from cka_probe.plot.labels import FONT, root_figure, unique_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = ["accuracy", "pareto"]

_METRICS = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}
_SIZE_IN = (5.4, 3.8)  # without the legend
_DISTINCT = 10  # colours in the colour-blind palette


def accuracy(frame: pd.DataFrame, *, metric: str = "top1", ax: Axes | None = None) -> Axes:
    """Accuracy by image size: a line with a 95 % interval band for each arm.

    Args:
        frame: what `evaluate` or `compare` returned, or several of them concatenated, with a column
            "arm". Rows of mixed sizes are left out: they have no place on the axis.
        metric: "top1" or "top5".
        ax: the axes to draw into; None makes a figure.

    Returns:
        The axes, with a logarithmic axis of sizes.

    Raises:
        ValueError: a missing column, a size that an arm has twice, or nothing to draw.
    """
    arms = _arms(frame, metric)
    ax = axes_for(ax, _figure_in(arms))
    for k, (name, rows) in enumerate(arms.items()):
        rows = rows[rows["size_px"].notna()].sort_values("size_px")
        x = rows["size_px"].to_numpy(dtype=float)
        y, low, high = _percent(rows, metric)
        style = _style(k, len(arms))
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if len(x) == 1:  # a band of one size has no width
            ax.vlines(x, low, high, color=style["color"], alpha=0.5)
        ax.plot(x, y, markersize=4, linewidth=1.3, label=_label(name), **style)
    sizes = sorted({int(s) for rows in arms.values() for s in rows["size_px"].dropna()})
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.06, sizes[-1] * 1.06)
    _finish(ax, arms, metric, "95 % interval")
    ax.set_xlabel("image side (px)")
    _ticks(ax, sizes)
    return ax


def pareto(frame: pd.DataFrame, *, metric: str = "top1", ax: Axes | None = None) -> Axes:
    """Accuracy by cost: a point for each size, joined in order of size, for each arm.

    The smallest and the largest size are written beside their points. The large hollow marker is
    the mean over the arm's sizes, the cross its images of mixed sizes if they were measured. Bars
    are 95 % intervals. Cost is the multiply-accumulates (MACs) of a forward of the images as fed.

    Args:
        frame: as for `accuracy`, with a column "gmacs".
        metric: "top1" or "top5".
        ax: the axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: as `accuracy`, or no cost in the frame.
    """
    arms = _arms(frame, metric, "gmacs")
    ax = axes_for(ax, _figure_in(arms))
    costs = np.concatenate([rows["gmacs"].to_numpy(dtype=float) for rows in arms.values()])
    if not np.isfinite(costs).any():
        raise ValueError(f"no costs to draw: {len(costs)} rows without gmacs: evaluate again")
    small = np.nanmax(costs) < 0.1
    named: list[tuple[int, float, float, Any]] = []
    for k, (name, rows) in enumerate(arms.items()):
        style = _style(k, len(arms))
        bars: dict[str, Any] = {"color": style["color"], "linestyle": "none", "elinewidth": 0.9}
        for mixed in (False, True):
            part = rows[rows["size_px"].isna() == mixed].sort_values("size_px")
            if part.empty:
                continue
            x = part["gmacs"].to_numpy(dtype=float) * (1000 if small else 1)
            y, low, high = _percent(part, metric)
            if not np.isnan(low).all():
                ax.errorbar(x, y, [y - low, high - y], alpha=0.5, **bars)
            if mixed:
                ax.plot(x, y, marker="x", markersize=8, markeredgewidth=1.8, linestyle="none",
                        color=style["color"])  # fmt: skip
                continue
            ax.plot(x, y, markersize=4, linewidth=1.1, label=_label(name), **style)
            if len(x) > 1:
                ax.plot(x.mean(), y.mean(), marker=style["marker"], markersize=11,
                        markerfacecolor="none", markeredgewidth=1.6, linestyle="none",
                        color=style["color"])  # fmt: skip
            ends = ((int(part["size_px"].iloc[i]), x[i], y[i]) for i in {0, len(x) - 1})
            named += [(size, a, b, style["color"]) for size, a, b in ends]
    spread = costs[np.isfinite(costs) & (costs > 0)]
    if len(spread) and spread.max() > 8 * spread.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.tick_params(axis="x", which="minor", length=3.5)  # as the others, so that names align
        if spread.max() < 80 * spread.min():
            ax.xaxis.set_minor_formatter(
                lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
            )
    several = any(rows["size_px"].notna().sum() > 1 for rows in arms.values())
    key = ["o mean of sizes"] * several + ["x mixed"] * bool(frame["size_px"].isna().any())
    _finish(ax, arms, metric, ", ".join(key) or "95 % interval")
    ax.set_xlabel("MMACs per image" if small else "GMACs per image")
    _name_sizes(ax, named)
    return ax


def _name_sizes(ax: Axes, named: list[tuple[int, float, float, Any]]) -> None:
    """Write sizes beside their points, except those that would overlap another."""
    root_figure(ax).draw_without_rendering()
    point, taken = root_figure(ax).dpi / 72, list[tuple[float, float]]()
    for size, x, y, colour in named:
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        right, up = (float(v) / point for v in ax.transData.transform((x, y)))
        if all(abs(right - a) > 2.4 * FONT or abs(up - b) > FONT for a, b in taken):
            taken.append((right, up))
            bottom, top = ax.get_ylim()
            low = y < bottom + 0.05 * (top - bottom)
            ax.annotate(f"{size}", (x, y), xytext=(4, 4 if low else -9), textcoords="offset points",
                        fontsize=FONT - 2, color=colour)  # fmt: skip


def _arms(frame: pd.DataFrame, metric: str, *more: str) -> dict[str, pd.DataFrame]:
    """The rows of each arm, arms in order of appearance."""
    if metric not in _METRICS:
        raise ValueError(f"unknown metric: {metric!r}: choose {' or '.join(map(repr, _METRICS))}")
    missing = [name for name in ("size_px", metric, *more) if name not in frame]
    if missing:
        raise ValueError(f"no such column: {missing[0]!r}: give what msun.evaluate returned")
    if frame.empty or (not more and frame["size_px"].isna().all()):
        raise ValueError(f"no sizes to draw: {len(frame)} rows: evaluate at one size or more")
    if "arm" not in frame:
        return {"": frame}
    arms = {str(name): rows for name, rows in frame.groupby("arm", sort=False)}
    for name, rows in arms.items():
        if (twice := rows["size_px"].duplicated()).any():
            size = rows["size_px"][twice].iloc[0]
            text = f"{size} px of arm {name!r}"
            raise ValueError(f"a size stands twice: {text}: take the mean over seeds first")
    return arms


def _percent(rows: pd.DataFrame, metric: str) -> tuple[Any, Any, Any]:
    """Value, low and high in percent; low and high are nan where the frame has none."""
    y = rows[metric].to_numpy(dtype=float) * 100
    ends = [f"{metric}_low", f"{metric}_high"]
    low, high = (
        rows[name].to_numpy(dtype=float) * 100 if name in rows else np.full(len(y), np.nan)
        for name in ends
    )
    return y, np.minimum(low, y), np.maximum(high, y)  # a wide one may round past the value


def _style(k: int, arms: int) -> dict[str, Any]:
    """Colour and marker of the k-th arm."""
    few = arms <= _DISTINCT
    palette = sns.color_palette("colorblind", arms) if few else sns.husl_palette(arms, l=0.5)
    return {"color": palette[k], "marker": MARKERS[k % len(MARKERS)]}


def _label(name: str) -> str:
    """An arm's name in the legend; matplotlib hides those that begin with "_"."""
    text = unique_labels([name], 40)[0]
    return " " * text.startswith("_") + text


def _figure_in(arms: dict[str, pd.DataFrame]) -> tuple[float, float]:
    """Width and height in inches of a figure with space for the legend beside the axes."""
    longest = max(len(unique_labels([name], 40)[0]) for name in arms)
    rows_in = 0.2 * len(arms) + 1.2
    return _SIZE_IN[0] + (0.6 + longest * FONT * 0.6 / 72 if longest else 0), max(
        _SIZE_IN[1], rows_in
    )


def _finish(ax: Axes, arms: dict[str, pd.DataFrame], metric: str, key: str) -> None:
    """The accuracy axis, its grid and the legend."""
    values = [v for rows in arms.values() for v in _percent(rows, metric)]
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    if len(known):
        least, most = float(known.min()), float(known.max())
        step = 10 if most - least > 20 else 5 if most - least > 8 else 1
        bottom = max(0.0, math.floor((least - step / 10) / step) * step)
        bottom = bottom or -1.5  # a mark at 0 is seen whole
        ax.set_ylim(bottom, min(101.0, math.ceil((most + step / 10) / step) * step))
    ax.set_ylabel(_METRICS[metric])
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    sns.despine(ax=ax)
    if list(arms) == [""]:
        ax.set_title(key, fontsize=FONT, loc="right")
        return
    ax.legend(
        title=f"arm\n({key})",
        fontsize=FONT,
        title_fontsize=FONT,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
    )


def _ticks(ax: Axes, sizes: Sequence[int]) -> None:
    """Label the sizes that were measured, as many as there is space for, the ends first."""
    root_figure(ax).draw_without_rendering()  # the legend takes its room
    box, point = ax.get_window_extent(), root_figure(ax).dpi / 72
    left, right = map(math.log, ax.get_xlim())
    room = box.width / point / (right - left)  # points for a factor of e
    places = {s: (math.log(s) - left) * room for s in sizes}
    wide = {s: (len(str(s)) + 1) * 0.6 * FONT for s in sizes}
    named: list[int] = []
    for size in (sizes[0], sizes[-1], *sizes[1:-1]):
        if all(abs(places[size] - places[s]) > (wide[size] + wide[s]) / 2 for s in named):
            named.append(size)
    ax.xaxis.set_major_locator(FixedLocator(sorted(named)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    rest = [s for s in sizes if s not in named]
    ax.xaxis.set_minor_locator(FixedLocator(rest) if rest else NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
