"""Pictures of an evaluation: what is drawn equals the table, and no name falls out of the frame."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from cka_probe.plot.figures import save_figure
from msun.metrics import wilson_interval
from msun.plot import evaluation as plot

pytestmark = pytest.mark.usefixtures("agg")


@pytest.fixture(scope="module")
def agg():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


def made(arms, sizes, mixed=False, n=500, gmacs=4.0):
    rows = []
    for k, arm in enumerate(arms):
        for size in [*sizes, *[None] * mixed]:
            side = size or 50
            share = 0.95 - 0.6 * np.exp(-3 * side / max(sizes)) - 0.03 * k
            correct = int(share * n)
            low, high = wilson_interval(correct, n)
            rows.append({"arm": arm, "size_px": size, "top1": correct / n, "top1_low": low,
                         "top1_high": high, "top5": np.nan,
                         "gmacs": gmacs * (side / max(sizes)) ** 2 * (1 + 0.3 * k)})  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["size_px"] = frame["size_px"].astype("Int64")
    return frame


def lines(ax):
    """Label -> (x, y) of the labelled lines."""
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()
            if not line.get_label().startswith("_")}  # fmt: skip


def tick_labels(axis):
    """Those that are drawn: matplotlib also makes some outside the limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]


def ticks(ax):
    ax.figure.draw_without_rendering()
    return [label.get_text() for label in tick_labels(ax.xaxis)]


def test_the_lines_are_the_table():
    frame = made(["lean", "plain"], [16, 32, 64], mixed=True)
    ax = plot.accuracy(frame.sample(frac=1, random_state=0))
    for arm, points in lines(ax).items():
        rows = frame[(frame["arm"] == arm) & frame["size_px"].notna()]
        assert points[:, 0].tolist() == [16, 32, 64]
        assert points[:, 1] == pytest.approx(rows["top1"] * 100)
    bands = {tuple(band.get_facecolor()[0][:3]): band for band in ax.collections}
    for line in ax.get_lines():
        rows = frame[(frame["arm"] == line.get_label()) & frame["size_px"].notna()]
        corners = bands[tuple(mpl.colors.to_rgb(line.get_color()))].get_paths()[0].vertices
        for _, row in rows.iterrows():
            y = corners[np.isclose(corners[:, 0], row["size_px"])][:, 1]
            assert y.min() == pytest.approx(row["top1_low"] * 100)
            assert y.max() == pytest.approx(row["top1_high"] * 100)
    assert ax.get_xscale() == "log"
    assert ticks(ax) == ["16", "32", "64"]
    assert ax.get_ylabel() == "top-1 accuracy (%)"


def test_costs_are_the_table():
    frame = made(["lean", "plain"], [16, 32, 64], mixed=True)
    ax = plot.pareto(frame)
    assert ax.get_xlabel() == "GMACs per image"
    named = lines(ax)
    assert list(named) == ["lean", "plain"]
    for arm, points in named.items():
        rows = frame[frame["arm"] == arm]
        sized = rows[rows["size_px"].notna()]
        assert points == pytest.approx(np.stack([sized["gmacs"], sized["top1"] * 100], axis=1))
        marks = {m.get_marker(): m.get_xydata()[0] for m in ax.get_lines()
                 if len(m.get_xydata()) == 1 and m.get_marker() != "None"
                 and m.get_color() == next(k.get_color() for k in ax.get_lines()
                                           if k.get_label() == arm)}  # fmt: skip
        mixed = rows[rows["size_px"].isna()].iloc[0]
        assert marks.pop("x") == pytest.approx([mixed["gmacs"], mixed["top1"] * 100])
        ((_, mean),) = marks.items()
        assert mean == pytest.approx([sized["gmacs"].mean(), sized["top1"].mean() * 100])
    texts = [text.get_text() for text in ax.texts]
    assert set(texts) == {"16", "64"}


def test_small_networks_are_in_mmacs():
    ax = plot.pareto(made(["a"], [16, 64], gmacs=0.012))
    assert ax.get_xlabel() == "MMACs per image"
    assert lines(ax)["a"][-1, 0] == pytest.approx(12)


def test_arms_keep_their_colours():
    frame = made(["a", "b", "c"], [16, 64])
    both = [{line.get_label(): line.get_color() for line in draw(frame).get_lines()}
            for draw in (plot.accuracy, plot.pareto)]  # fmt: skip
    assert all(both[0][arm] == both[1][arm] for arm in "abc")
    assert len(set(both[0].values())) == 3


CASES = {
    "one size": (["lean"], [64], False),
    "two sizes": (["lean", "paper"], [8, 64], True),
    "thirteen sizes, five arms": (
        ["lean", "paper", "single scale, upsampled", "_hidden $x^2$", "n" * 60],
        list(range(32, 225, 16)), True,
    ),
    "twelve arms": ([f"arm {k}" for k in range(12)], [16, 32, 64], True),
}  # fmt: skip


@pytest.mark.parametrize("draw", [plot.accuracy, plot.pareto])
@pytest.mark.parametrize("case", CASES)
def test_everything_is_inside_the_picture(draw, case, tmp_path):
    arms, sizes, mixed = CASES[case]
    ax = draw(made(arms, sizes, mixed))
    figure = ax.figure
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    texts = [*tick_labels(ax.xaxis), *tick_labels(ax.yaxis), ax.xaxis.label, ax.yaxis.label,
             *ax.get_legend().get_texts()]  # fmt: skip
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    assert len(ax.get_legend().get_texts()) == len(arms)
    shown = sorted((t.get_window_extent() for t in tick_labels(ax.xaxis)), key=lambda b: b.x0)
    for left, right in itertools.pairwise(shown):
        assert left.x1 <= right.x0 + 1, "names of sizes overlap"
    names = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for k, a in enumerate(names) for b in names[:k])
    save_figure(ax, tmp_path / "x.png", dpi=50)
    assert not plt.fignum_exists(figure.number)


def test_the_ends_are_always_named():
    names = ticks(plot.accuracy(made(["a"], list(range(32, 225, 16)))))
    assert names[0] == "32"
    assert names[-1] == "224"
    assert 4 < len(names) < 13


def test_axes_of_ones_own():
    figure = Figure(layout="constrained")
    ax = figure.add_subplot()
    before = plt.get_fignums()
    assert plot.accuracy(made(["a"], [8, 16]), ax=ax) is ax
    assert plot.pareto(made(["a"], [8, 16]), ax=figure.add_subplot()) is not ax
    assert plt.get_fignums() == before


def test_a_frame_without_arms_or_intervals():
    frame = made(["a"], [8, 16, 32]).drop(columns=["arm", "top1_low", "top1_high"])
    ax = plot.accuracy(frame)
    assert ax.get_legend() is None
    assert ax.get_lines()[0].get_ydata() == pytest.approx(frame["top1"] * 100)
    assert plot.pareto(frame).get_legend() is None
    frame["top5"] = frame["top1"]
    assert plot.accuracy(frame, metric="top5").get_ylabel() == "top-5 accuracy (%)"


@pytest.mark.parametrize("draw", [plot.accuracy, plot.pareto])
def test_faults_are_named(draw):
    frame = made(["a"], [8, 16])
    before = plt.get_fignums()
    for bad, match in [
        (frame.drop(columns="size_px"), "no such column: 'size_px': "),
        (frame.iloc[:0], "no sizes to draw: 0 rows: "),
        (pd.concat([frame, frame]), "a size stands twice: 8 px of arm 'a': "),
    ]:
        with pytest.raises(ValueError, match=match):
            draw(bad)
    with pytest.raises(ValueError, match="unknown metric: 'top2': "):
        draw(frame, metric="top2")
    assert plt.get_fignums() == before
    with pytest.raises(ValueError, match="no costs to draw: 2 rows without gmacs: "):
        plot.pareto(frame.assign(gmacs=np.nan))
