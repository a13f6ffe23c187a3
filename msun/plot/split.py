"""Figure of a suggested split: the CKA curve, its dip, and the cut with its interval."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns

from cka_probe.plot.figures import axes_for
from cka_probe.plot.labels import FONT, label_axes, labels_width_in, row_height_in, unique_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from msun.splitting.choice import SplitChoice

__all__ = ["split_curve"]

_CURVE, _CUT, _DIP = sns.color_palette("colorblind")[0], "#c0392b", "0.25"


def split_curve(choice: SplitChoice, *, ax: Axes | None = None) -> Axes:
    """CKA along the layers with its 95 % interval band, the dip, the target, and the cut.

    Layers on grey, left of the red line, would be scale-specific. The red bar and band are the
    interval at the cut: a layer whose band lies within it does not differ measurably. Filled
    markers are valid cuts, hollow ones are not.

    Args:
        choice: what `suggest_split` returned.
        ax: the axes to draw into; None makes a figure that grows with the number of layers.

    Returns:
        The axes, layers in execution order from left to right, the legend to the right.
    """
    curve = choice.curve
    m = len(curve.layers)
    ax = axes_for(
        ax, (0.6 + max(5.0, m * row_height_in(m)) + 2.3, 3.8 + labels_width_in(curve.layers))
    )
    x, size = np.arange(m), 5 if m <= 40 else 3
    ax.fill_between(x, curve.low, curve.high, color=_CURVE, alpha=0.2, linewidth=0)
    label = f"view {unique_labels([choice.view], 16)[0]}, with its\n95 % interval"
    ax.plot(x, curve.cka, color=_CURVE, linewidth=1.3, label=label)
    for cut, fill, what in ((True, _CURVE, "valid cut"), (False, "white", "no valid cut")):
        here = curve.is_cut == cut
        if here.any():
            ax.plot(x[here], curve.cka[here], "o", color=_CURVE, markerfacecolor=fill,
                    markersize=size, label=what)  # fmt: skip
    if choice.dip is not None:
        ax.plot(choice.dip, curve.cka[choice.dip] - 0.035, "^", color=_DIP, markersize=8,
                label=f"dip, {unique_labels([curve.layers[choice.dip]], 20)[0]}")  # fmt: skip
    if choice.target is not None:
        start = -0.5 if choice.dip is None else choice.dip
        ax.hlines(choice.target, start, m - 0.5, color=_DIP, linestyle=":", linewidth=1.2,
                  label=f"target, {choice.target:.3f}")  # fmt: skip
    if choice.layer is not None:
        k = curve.layers.index(choice.layer)
        ax.axvspan(-0.5, k + 0.5, color="0.5", alpha=0.1, linewidth=0, label="before the cut")
        name = unique_labels([choice.layer], 20)[0]
        style = "-" if choice.clear else "--"
        ax.axvline(k + 0.5, color=_CUT, linestyle=style, linewidth=1.5, label=f"cut after {name}")
        ax.plot(k, curve.cka[k], "o", color=_CUT, markersize=size + 1, zorder=4)
        if not math.isnan(curve.low[k]):
            reach = [[curve.cka[k] - curve.low[k]], [curve.high[k] - curve.cka[k]]]
            ax.axhspan(curve.low[k], curve.high[k], color=_CUT, alpha=0.12, linewidth=0)
            ax.errorbar(k, curve.cka[k], reach, fmt="none", ecolor=_CUT, elinewidth=2, capsize=6,
                        capthick=2, zorder=3, label="its interval")  # fmt: skip
    ax.set_xlim(-0.5, m - 0.5)
    least = np.nanmin([0.0, *curve.low, *curve.cka])
    ax.set_ylim(max(-1.0, least - 0.08), 1.03)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    sns.despine(ax=ax)
    label_axes(ax, unique_labels(curve.layers), None)
    ax.set(
        xlabel="layer, in execution order",
        ylabel=f"CKA with {unique_labels([choice.reference], 16)[0]}",
    )
    ax.set_title(
        f"{choice.rule}: {unique_labels([choice.headline], 60)[0]}", fontsize=FONT, loc="left"
    )
    ax.legend(fontsize=FONT, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0,
              frameon=False)  # fmt: skip
    return ax
