"""The picture of a split: what is drawn where, and that it fits."""

import math
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from split_curves import RESTORED, names, report

from cka_probe.plot.figures import save_figure
from msun.plot.split import split_curve
from msun.splitting.suggest import suggest_split


@pytest.fixture(autouse=True)
def no_display():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    assert plt.get_fignums() == [], "a figure stayed open"


def drawn(choice):
    """Axes of a figure of our own, and what its legend names: {text: artist}."""
    ax = Figure(figsize=(9, 5), layout="constrained").add_subplot()
    assert split_curve(choice, ax=ax) is ax
    handles, labels = ax.get_legend_handles_labels()
    return ax, dict(zip(labels, handles, strict=True))


def test_curve_dip_target_and_cut_are_where_they_belong():
    choice = suggest_split(report(RESTORED, 0.002), names(19)[::2])
    ax, said = drawn(choice)
    (line,) = [x for label, x in said.items() if label.startswith("view 32")]
    assert line.get_ydata().tolist() == RESTORED
    assert said["valid cut"].get_xdata().tolist() == list(range(0, 19, 2))
    assert said["no valid cut"].get_xdata().tolist() == list(range(1, 19, 2))
    assert to_hex(said["no valid cut"].get_markerfacecolor()) == "#ffffff"
    assert list(said["dip, features.2"].get_xdata()) == [2]
    assert said["dip, features.2"].get_ydata()[0] < 0.625
    cut = said["cut after features.4"]
    assert list(cut.get_xdata()) == [4.5, 4.5]
    assert cut.get_linestyle() == "-"
    k = choice.curve.layers.index("features.4")
    ((low, high),) = said["its interval"].lines[2][0].get_segments()
    assert low.tolist() == pytest.approx([k, choice.curve.low[k]])
    assert high.tolist() == pytest.approx([k, choice.curve.high[k]])
    (target,) = said[f"target, {choice.target:.3f}"].get_segments()
    assert target[:, 1].tolist() == pytest.approx([choice.target] * 2)
    assert ax.get_title(loc="left") == "recovery: cut after features.4"
    assert [text.get_text() for text in ax.get_xticklabels()] == names(19)


def test_an_unclear_split_is_dashed_and_says_so():
    ax, said = drawn(suggest_split(report(RESTORED, np.nan, groups=1), names(19)))
    assert said["cut after features.4"].get_linestyle() == "--"
    assert "its interval" not in said
    assert "no valid cut" not in said
    assert ax.get_title(loc="left") == "recovery: no clear split; at best features.4"


def test_without_a_cut_none_is_drawn():
    ax, said = drawn(suggest_split(report(RESTORED), ["features.0"]))
    assert not [label for label in said if label.startswith("cut")]
    assert "dip, features.2" in said
    assert "no cut to offer" in ax.get_title(loc="left")
    _, said = drawn(suggest_split(report(RESTORED), names(19), rule="largest_recovery"))
    assert not [label for label in said if label.startswith(("dip", "to be reached"))]


def test_negative_values_are_in_sight():
    ax, _ = drawn(suggest_split(report([0.9, 0.1, 0.5, -0.1], 0.02), names(4)))
    assert ax.get_ylim()[0] < -0.1 - 2 * 0.02


@pytest.mark.parametrize("layers", [5, 20, 60])
def test_names_and_legend_stay_inside_and_apart(layers, tmp_path):
    values = 0.9 - 0.3 * np.exp(-((np.arange(layers) - layers / 5) ** 2))
    long = [f"stages.{k // 10}.blocks.{k % 10}.a_rather_long_name" for k in range(layers)]
    ax = split_curve(suggest_split(report(values, 0.01, long), long))
    figure = ax.figure
    figure.canvas.draw()
    frame, legend = figure.bbox, ax.get_legend().get_window_extent()
    labels = [text.get_window_extent() for text in ax.get_xticklabels() if text.get_text()]
    assert len(labels) == layers
    for box in [*labels, legend, ax.xaxis.label.get_window_extent()]:
        assert frame.x0 - 1 <= box.x0
        assert box.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= box.y0
        assert box.y1 <= frame.y1 + 1
    for box, following in pairwise(labels):
        assert box.x1 <= following.x0 + 1
    assert legend.x0 >= ax.get_window_extent().x1
    save_figure(ax, tmp_path / "split.png")
    assert (tmp_path / "split.png").stat().st_size > 10_000


def test_a_name_with_dollars_is_no_formula(tmp_path):
    labels = ["a$b$", "c$", "_d", "e"]
    choice = suggest_split(report([0.9, 0.5, 0.8, 0.7], labels=labels), labels)
    save_figure(split_curve(choice), tmp_path / "split.png")
    assert not math.isnan(choice.score)
