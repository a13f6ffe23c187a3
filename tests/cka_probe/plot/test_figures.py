import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cka_probe.plot import figures as plot
from cka_probe.report import Report

LONG = [
    f"blocks.{i}.{j}.attn.{end}" for i in range(5) for j in range(10) for end in ("a", "q" * 25)
]


def make(layers=5, views=("32", "64", "224"), lost=(), groups=8, shift=0.0):
    """A report of random values in which some layers are nan."""
    names = [f"layer{k}" for k in range(layers)] if isinstance(layers, int) else list(layers)
    entries = list(itertools.product(views, names))
    rng = np.random.default_rng(0)
    m = len(entries)
    cka, stderr = rng.uniform(0, 1, (m, m)) + shift, rng.uniform(0.001, 0.05, (m, m))
    cka, stderr = (cka + cka.T) / 2, (stderr + stderr.T) / 2
    np.fill_diagonal(cka, 1)
    for k, (_, layer) in enumerate(entries):
        if layer in lost:
            cka[k] = cka[:, k] = stderr[k] = stderr[:, k] = np.nan
    view, layer = zip(*entries, strict=True)
    return Report(cka, stderr, view, layer, {"groups": groups, "reference": views[-1]})


@pytest.fixture(autouse=True)
def no_figure_is_left():
    plt.close("all")
    yield
    plt.close("all")


def figure(width_in=8, height_in=6):
    made = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(made)
    return made


def axes(width_in=8, height_in=6):
    return figure(width_in, height_in).add_subplot()


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def mesh(ax):
    (found,) = [c for c in ax.collections if isinstance(c, mpl.collections.QuadMesh)]
    return found


def draw_grid(report, ax=None):
    return plot.grid(report, report.views[0], report.views[-1], ax=ax)


KINDS = [plot.heatmap, plot.curve, draw_grid]


# ---- manners


@pytest.mark.parametrize("draw", KINDS)
def test_given_axes_are_used_and_pyplot_is_left_alone(draw, monkeypatch):
    mine, current = plt.subplots()
    for name in ("show", "savefig", "figure", "gca", "gcf", "subplots", "sca"):
        monkeypatch.setattr(plt, name, lambda *_, **__: pytest.fail("pyplot was called"))
    ax = axes()
    assert draw(make(), ax=ax) is ax
    monkeypatch.undo()
    assert plt.gcf() is mine
    assert plt.gca() is current
    assert not current.has_data()


@pytest.mark.parametrize("draw", KINDS)
def test_without_axes_a_new_figure_is_made(draw):
    mine = plt.figure()
    made = draw(make()).figure
    assert plt.get_fignums() == [mine.number, made.number]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plot.heatmap(make(), "7"), "unknown view: '7'"),
        (lambda: plot.curve(make(), "7"), "unknown view: '7'"),
        (lambda: plot.grid(make(), "32", "7"), "unknown view: '7'"),
        (lambda: plot.grid(make()), "name two of"),
        (lambda: plot.heatmap(make(), level=95), "level out of range"),
        (lambda: plot.curve(make(), level=95), "level out of range"),
    ],
)
def test_an_error_leaves_no_figure(call, match):
    with pytest.raises(ValueError, match=match):
        call()
    assert plt.get_fignums() == []


# ---- what is drawn


def test_heatmap_draws_the_table():
    report = make(lost=["layer3"], shift=-0.5)
    ax = plot.heatmap(report, "64")
    table = report.against("64")
    assert labels(ax.yaxis) == list(table.index)  # in execution order
    assert labels(ax.xaxis) == ["32", "64\n(reference)", "224"]
    assert ax.yaxis_inverted()
    np.testing.assert_array_equal(mesh(ax).get_array().filled(np.nan), table.to_numpy())
    assert mesh(ax).get_clim() == (0, 1)
    half = (report.against("64", "high") - table).to_numpy()
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(written) == table.size
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        text = written[column + 0.5, row + 0.5]
        assert text.split(" ")[0] == f"{value:.2f}"
        if half[row, column] > 0:
            assert float(text.split("±")[1]) == pytest.approx(half[row, column], abs=0.006)
    assert "95 %" in ax.get_title(loc="right")
    assert "64" in ax.figure.axes[1].get_ylabel()


def test_negative_values_have_the_colour_of_0_and_keep_their_number():
    ax = plot.heatmap(make(shift=-2.0))
    texts = [text.get_text() for text in ax.texts if "1.00" not in text.get_text()[:4]]
    assert all(text.startswith("-") for text in texts)
    assert len(texts) == 10
    ax.figure.canvas.draw()
    colours = {tuple(colour) for colour in mesh(ax).get_facecolor()}
    assert colours == {mpl.colormaps["viridis"](0.0), mpl.colormaps["viridis"](1.0)}


def test_nan_looks_like_no_value():
    ax = plot.heatmap(make(lost=["layer1", "layer3"]))
    assert sum(text.get_text() == "nan" for text in ax.texts) == 6
    rows = sorted(patch.get_y() for patch in ax.patches)
    assert rows == [1, 1, 1, 3, 3, 3]
    ramp = mpl.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]
    for patch in ax.patches:
        assert patch.get_hatch()
        assert np.abs(ramp - patch.get_facecolor()[:3]).max(axis=1).min() > 0.3


def test_text_contrasts_with_its_cell():
    ax = plot.heatmap(make(10, [str(k) for k in range(6)]))
    ax.figure.canvas.draw()

    def luminance(colour):
        rgb = np.asarray(mpl.colors.to_rgb(colour))
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        return linear @ [0.2126, 0.7152, 0.0722]

    for text, cell in zip(ax.texts, mesh(ax).get_facecolor(), strict=True):
        one, two = sorted([luminance(text.get_color()), luminance(cell[:3])])
        assert (two + 0.05) / (one + 0.05) > 4.5  # WCAG 2, AA


def test_grid_draws_the_table_in_squares():
    report = make()
    ax = plot.grid(report, "32", "64")
    table = report.between("32", "64")
    np.testing.assert_array_equal(mesh(ax).get_array(), table.to_numpy())
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer in 32", "layer in 64")
    assert labels(ax.yaxis) == labels(ax.xaxis) == list(table.index)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts[1.5, 0.5] == f"{table.iloc[0, 1]:.2f}"
    ax.figure.canvas.draw()
    box = ax.get_window_extent()
    assert box.width == pytest.approx(box.height, rel=1e-3)


def test_curve_draws_lines_and_bands():
    report = make(lost=["layer2"])
    ax = plot.curve(report, level=0.8)
    table, low, high = (report.against(None, what, level=0.8) for what in ("cka", "low", "high"))
    *lines, reference = ax.lines
    bands = [c for c in ax.collections if isinstance(c, mpl.collections.PolyCollection)]
    for name, line, band in zip(["32", "64"], lines, bands, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), table[name])  # nan: a gap
        assert line.get_label() == name
        corners = {tuple(point) for path in band.get_paths() for point in path.vertices.round(9)}
        for k in (0, 1, 3, 4):
            assert {(k, round(low[name].iloc[k], 9)), (k, round(high[name].iloc[k], 9))} <= corners
        assert not any(x == 2 for x, _ in corners)
    assert set(reference.get_ydata()) == {1}
    assert labels(ax.xaxis) == list(table.index)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["32", "64", "224 (reference)"]
    assert "80 %" in ax.get_legend().get_title().get_text()
    assert len({line.get_color() for line in ax.lines}) == 3
    assert len({line.get_marker() for line in lines}) == 2


def test_a_layer_between_gaps_keeps_its_interval():
    report = make(lost=["layer0", "layer2"])
    ax = plot.curve(report)
    (bars, _) = [c for c in ax.collections if isinstance(c, mpl.collections.LineCollection)]
    (path,) = bars.get_paths()
    low, high = (report.against(None, what).loc["layer1", "32"] for what in ("low", "high"))
    np.testing.assert_allclose(path.vertices, [[1, low], [1, high]])


def test_curve_shows_all_of_a_negative_line():
    report = make(shift=-0.8)
    assert plot.curve(report).get_ylim()[0] < report.against(None, "low").min().min()
    assert plot.curve(make(shift=1.0)).get_ylim()[0] == 0


def test_curve_without_intervals_and_with_odd_names():
    ax = plot.curve(make(views=("_a", "$b$", "c"), groups=1))
    texts = [text.get_text().strip() for text in ax.get_legend().get_texts()]
    assert texts == ["_a", r"\$b\$", "c (reference)"]
    assert "interval" not in ax.get_legend().get_title().get_text()


# ---- legibility


def extents(artists, figure):
    renderer = figure.canvas.get_renderer()
    return [a.get_window_extent(renderer) for a in artists if a.get_text() and a.get_visible()]


def ticks(ax):
    """The tick labels that are drawn."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        yield from (t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high)


def overlap(boxes):
    """The largest overlap of two boxes in pixels."""
    pairs = itertools.combinations(boxes, 2)
    return max(min(np.minimum(a.max, b.max) - np.maximum(a.min, b.min)) for a, b in pairs)


@pytest.mark.parametrize("draw", KINDS)
@pytest.mark.parametrize(
    ("layers", "views"),
    [
        (1, ["224"]),
        (5, ["32", "128", "224"]),
        (19, ["sharp", "gaussian blur of 3 px", "noise 0.1", "contrast 0.5"]),
        (LONG, ["28", "224"]),
        (6, [str(8 * k) for k in range(1, 31)]),
    ],
)
def test_names_are_readable_apart_and_inside(draw, layers, views):
    ax = draw(make(layers, views))
    whole = ax.figure
    whole.canvas.draw()
    names = [*ticks(ax), *(ax.get_legend().get_texts() if ax.get_legend() else ())]
    boxes = extents(names, whole)
    assert len(boxes) >= len(make(layers, views).layers)  # every layer has its name
    assert overlap(boxes) < 1
    others = [ax.xaxis.label, ax.yaxis.label, *(bar.yaxis.label for bar in whole.axes[1:])]
    for box in [*boxes, *extents(others, whole)]:
        assert min(box.min) > -1
        assert (box.max < whole.bbox.max + 1).all()
    assert min(text.get_fontsize() for text in names) >= 5.5
    assert (whole.get_size_inches() < 40).all()


@pytest.mark.parametrize("draw", KINDS)
def test_names_that_do_not_fit_small_axes_are_thinned(draw):
    ax = draw(make([f"blocks.{k}" for k in range(100)]), ax=axes(5, 4))
    ax.figure.canvas.draw()
    names = list(ticks(ax))
    assert overlap(extents(names, ax.figure)) < 1
    assert "blocks.0" in [name.get_text() for name in names]
    assert len(names) < 110


def test_numbers_are_promised_only_where_the_names_leave_room():
    ax = plot.heatmap(make(LONG[1:10:2], list("abcde")), ax=axes(5, 4))
    assert ax.get_title(loc="right") == ""
    ax = plot.heatmap(make(5, list("abcde")), ax=axes(6, 4))
    assert "interval" in ax.get_title(loc="right")


def test_figures_grow():
    low, middle, high = (plot.heatmap(make(k)).figure.get_figheight() for k in (10, 30, 60))
    assert low < middle < high


def test_numbers_stay_in_their_cells_when_later_panels_take_room():
    whole = figure(9, 4)
    first, second = whole.subplots(1, 2)
    plot.heatmap(report := make(9, list("abcde")), ax=first, colorbar=False)
    plot.curve(report, ax=second)
    whole.canvas.draw()
    cell = first.get_window_extent().width / 5
    assert len(first.texts) == 9 * 5
    for text in first.texts:
        assert text.get_window_extent(whole.canvas.get_renderer()).width < cell
    assert len(whole.axes) == 2


# ---- files


@pytest.mark.parametrize(
    ("kind", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")]
)
def test_save_figure(tmp_path, kind, start):
    paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
    for path in paths:
        plot.save_figure(plot.heatmap(make()), path)
    one, two = (path.read_bytes() for path in paths)
    assert one.startswith(start)
    assert one == two
    assert plt.get_fignums() == []
    assert sorted(tmp_path.iterdir()) == paths


def test_save_figure_keeps_figures_of_others(tmp_path):
    mine, ax = plt.subplots()
    plot.save_figure(plot.curve(make(), ax=ax), tmp_path / "a.png")
    assert plt.get_fignums() == [mine.number]


def test_save_figure_refuses_other_kinds(tmp_path):
    for name in ("a.bmp", "a", "a.npz"):
        with pytest.raises(ValueError, match=r"unknown picture format: .*: use one of \.png"):
            plot.save_figure(axes(), tmp_path / name)


def test_a_failing_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail(self, file, **_):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    ax = plot.heatmap(make())
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plot.save_figure(ax, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert plt.get_fignums() == []
