"""The page's curve: CKA along the layers as SVG that scales to any width without a script.

The drawing is 1000 x 1000 units scaled to its box, with strokes of constant width. The text is HTML
placed in per cent, so that it stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

from cka_probe.summary import LEVEL, ellipsize

if TYPE_CHECKING:
    from cka_probe.report import Report

__all__ = ["curve_html"]

_DESK, _PHONE = 42, 14  # slanted layer names that fit side by side on a desktop, on a phone
_ROW_PX = 22  # height of a row of the legend


# Okabe and Ito 2008, the colours that show on white and on black; sky blue and orange darkened.
_PLAIN = ("#0f7fc4", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#7f7f7f")


def curve_html(report: Report) -> str:
    """A line with a 95 % interval band for each view but the reference.

    A value that is nan leaves a gap. Each name of the legend stands at the end of its line.

    Args:
        report: a report whose views share their layers.

    Returns:
        HTML: the plot (`.plot`), the legend (`.legend`, buttons that the page's script handles) and
        the names of the layers.
    """
    table = report.against()
    ends = [report.against(what=what, level=LEVEL) for what in ("low", "high")]
    others = [view for view in table.columns if view != report.reference]
    values = table[others].to_numpy().T  # (views, layers)
    low, high = (frame[others].to_numpy().T for frame in ends)  # (views, layers)
    least = float(np.nanmin([0.0, *values.ravel(), *low.ravel()]))
    bottom = max(-1.0, math.floor(10 * least) / 10)
    top = float(np.nanmax([1.0, *values.ravel()])) + 0.03

    def y(value: float) -> float:
        return round(1000 * (top - value) / (top - bottom), 1)

    x = [round(1000 * (k + 0.5) / len(table), 1) for k in range(len(table))]
    ticks = np.arange(math.ceil(4 * bottom), 5) / 4
    rules = [f"M0 {y(tick)}H1000" for tick in ticks if tick != 1]
    drawn = [f'<path class="rule" d="{"".join(rules)}"/><path class="one" d="M0 {y(1)}H1000"/>']
    colours = [f"--l:{light};--d:{dark}" for light, dark in _colours(others)]
    for k, colour in enumerate(colours):
        bands = "".join(_band(x, *(list(map(y, ends)) for ends in (low[k], high[k]))))
        line = _line(x, list(map(y, values[k])))
        dots = "".join(
            f'<path class="dot" data-k="{j}" d="M{x[j]} {y(value)}h.01"/>'
            for j, value in enumerate(values[k])
            if not math.isnan(value)
        )
        drawn.append(
            f'<g class="s" data-s="{k}" style="{colour}"><path class="band" d="{bands}"/>'
            f'<path class="line" d="{line}"/>{dots}</g>'
        )
    height_px = max(320, _ROW_PX * (len(others) + 2))
    last = [next((v for v in row[::-1] if not math.isnan(v)), bottom) for row in values]
    places = _spread([y(1), *map(y, last)], 1000 * _ROW_PX / height_px)
    names = [
        f'<span class="ref" style="top:{places[0] / 10:.1f}%" title="{escape(report.reference)}">'
        f"{escape(ellipsize(report.reference, 14))}</span>",
        *(
            f'<button type="button" class="s" data-s="{k}" data-n="{escape(view)}" '
            f'title="{escape(view)}" aria-pressed="true" '
            f'style="top:{place / 10:.1f}%;{colour}">{escape(ellipsize(view, 14))}</button>'
            for k, (view, place, colour) in enumerate(zip(others, places[1:], colours, strict=True))
        ),
    ]
    scale = [f'<span class="y" style="top:{y(t) / 10:.1f}%">{t:g}</span>' for t in ticks]
    room = min(18, max(map(len, table.index)))
    wide = min(14, max(map(len, table.columns)))
    return (
        f'<div class="curve" style="--h:{height_px}px;--room:{room};--names:{wide}">'
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="group" '
        f'aria-label="CKA along the layers, a line for each view">{"".join(drawn)}</svg>'
        f"{''.join(scale)}{_axis(table.index.tolist(), x)}</div>"
        f'<div class="legend" role="group" aria-label="Views">{"".join(names)}</div></div>'
    )


def _axis(layers: Sequence[str], x: Sequence[float]) -> str:
    """Layer names below the axis, every k-th where there are many, fewer on a phone."""
    desk = math.ceil(len(layers) / _DESK)
    phone = desk * math.ceil(len(layers) / desk / _PHONE)
    return "".join(
        f'<span class="x{" desk" if k % phone else ""}" style="left:{x[k] / 10:.2f}%" '
        f'title="{escape(layers[k])}">{escape(ellipsize(layers[k], 18))}</span>'
        for k in range(0, len(layers), desk)
    )


def _line(x: Sequence[float], y: Sequence[float]) -> str:
    """An SVG path with gaps where y is nan."""
    steps = []
    for k, (across, down) in enumerate(zip(x, y, strict=True)):
        if not math.isnan(down):
            steps.append(f"{'L' if k and not math.isnan(y[k - 1]) else 'M'}{across} {down}")
    return "".join(steps)


def _band(x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """A closed path around each run of intervals; a run of one is a vertical line."""
    steps, k = [], 0
    while k < len(x):
        run = [j for j in takewhile(lambda j: not math.isnan(low[j]), range(k, len(x)))]
        if run:
            there = [f"{x[j]} {high[j]}" for j in run]
            back = [f"{x[j]} {low[j]}" for j in reversed(run)]
            steps.append(f"M{'L'.join(there + back)}Z")
        k += len(run) + 1
    return "".join(steps)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as needed to be `gap` apart and within 0..1000."""
    order = np.argsort(places, kind="stable")
    spread = [places[k] for k in order]
    for k in range(1, len(spread)):
        spread[k] = max(spread[k], spread[k - 1] + gap)
    ceiling = 1000.0
    for k in reversed(range(len(spread))):
        spread[k] = min(spread[k], ceiling)
        ceiling = spread[k] - gap
    return [spread[k] for k in np.argsort(order)]


def _colours(views: Sequence[str]) -> list[tuple[str, str]]:
    """For each view a colour on white and one on black; ordered by size where views are sizes."""
    try:
        rank = np.argsort(np.argsort([float(view) for view in views]))
    except ValueError:
        if len(views) <= len(_PLAIN):
            return [(_PLAIN[k], _PLAIN[k]) for k in range(len(views))]
        rank = np.arange(len(views))
    share = rank / max(1, len(views) - 1)
    viridis = mpl.colormaps["viridis"]
    return [(to_hex(viridis(0.75 * part)), to_hex(viridis(0.45 + 0.55 * part))) for part in share]
