"""The page's tables of coloured cells, their colours and the colour bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex, to_rgb

from cka_probe.plot.colours import black_reads_better
from cka_probe.summary import ellipsize

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["NUMBERED", "TINY", "cells_html", "colours_css", "key_html", "number"]

NUMBERED = 14  # most columns of a grid whose cells have space for numbers
_BLANK = '<td class="none"></td>'  # a view lacks the layer
TINY = 40  # more columns than that: every second label is left out


def cells_html(
    frames: Sequence[pd.DataFrame],
    name: str,
    label: str,
    reference: str = "",
    blank: NDArray[np.bool_] | None = None,
) -> str:
    """A table of coloured cells from the frames (cka, low, high); empty cells where `blank`."""
    values, low, high = (frame.to_numpy() for frame in frames)  # (rows, columns)
    rows, columns = (list(axis) for axis in (frames[0].index, frames[0].columns))
    numbered = name == "heatmap" or len(columns) <= NUMBERED
    heads = "".join(
        f'<th scope="col" {_named(view, 14 if numbered else 24)}</th>'.replace(
            "</th>", "<small>reference</small></th>" if view == reference else "</th>"
        )
        for view in columns
    )
    body = "\n".join(
        f'<tr><th scope="row" {_named(layer, 30)}</th>'
        + "".join(
            _BLANK
            if blank is not None and blank[r, c]
            else _cell(values[r, c], low[r, c], high[r, c], numbered=numbered)
            for c in range(len(columns))
        )
        for r, layer in enumerate(rows)
    )
    kind = "" if numbered else " small tiny" if len(columns) > TINY else " small"
    return (
        f'<table id="{name}" class="cells{kind}" style="--n:{len(columns)}" '
        f'aria-label="{escape(label)}"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _named(name: str, most: int) -> str:
    return f'data-n="{escape(name)}"><span>{escape(ellipsize(name, most))}</span>'


def _cell(value: float, low: float, high: float, *, numbered: bool) -> str:
    if math.isnan(value):
        return '<td class="nan">nan</td>'
    ends = "" if math.isnan(low) else f' data-i="{number(low)} to {number(high)}"'
    text = number(value, 3) if numbered else ""
    return f'<td class="b{_shade(value)}" data-c="{number(value)}"{ends}>{text}</td>'


def number(value: float, decimals: int = 4) -> str:
    """A number as the page shows it, "nan" included; never -0.000."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _shade(value: float) -> int:
    """The colour of a value, 0 to 100; below 0 and above 1 as there."""
    return round(100 * min(1.0, max(0.0, value)))


def key_html(values: NDArray[np.float64]) -> str:
    """The colour bar, with a note on values below 0 and nan if there are any."""
    low = "<span>below 0 has the colour of 0</span>" if (values < 0).any() else ""
    lost = '<span class="nan">nan</span><span>features that do not vary</span>'
    return f"""<p class="key"><span>0</span><i class="bar"></i><span>1</span>{low}
{lost if np.isnan(values).any() else ""}</p>"""


def colours_css() -> str:
    """CSS of the 101 colours of CKA 0 to 1 (viridis, the same in light and dark mode)."""
    shades = [to_hex(mpl.colormaps["viridis"](k / 100)) for k in range(101)]
    blacks = black_reads_better([to_rgb(shade) for shade in shades]).tolist()
    rules = [
        f".b{k}{{background:{shade};color:{'#000' if black else '#fff'}}}"
        for k, (shade, black) in enumerate(zip(shades, blacks, strict=True))
    ]
    return "".join([*rules, f".bar{{background:linear-gradient(90deg,{','.join(shades[::5])})}}"])
