"""Views of different networks: two layers that share a name are not one."""

import matplotlib as mpl
import numpy as np
import pytest
from pages import made

from cka_probe import plot
from cka_probe.page import page
from cka_probe.reading import absent
from cka_probe.report import Report


def cut(report, *entries):
    """The report without some entries."""
    pairs = list(zip(report.view.tolist(), report.layer.tolist(), strict=True))
    keep = [k for k, pair in enumerate(pairs) if pair not in entries]
    square = np.ix_(keep, keep)
    return Report(
        report.cka[square], report.stderr[square], report.view[keep], report.layer[keep],
        report.meta,
    )  # fmt: skip


def two():
    """Networks of 4 and 5 layers, of which "stem" is the one name they share."""
    entries = [("a", x) for x in ("stem", "p", "q", "r")]
    entries += [("b", x) for x in ("stem", "u", "v", "w", "x")]
    m = len(entries)
    cka = np.full((m, m), 0.5)
    cka[0, 4] = cka[4, 0] = 0.3
    cka[1, 6] = cka[6, 1] = 0.1
    np.fill_diagonal(cka, 1)
    return Report(
        cka, np.full((m, m), 0.01), *zip(*entries, strict=True), {"groups": 8, "reference": "a"}
    )


def test_the_summary_of_two_networks_is_of_pairs():
    said = two().summary()
    assert "itself" not in said
    assert "least alike are layer 'p' in view 'a' and 'v' in 'b', at 0.100" in said


@pytest.mark.parametrize("views", [("a", "b"), ("a", "b", "c")])
def test_a_notebook_shows_two_networks_as_a_grid(monkeypatch, views):
    drawn = []
    for name in ("heatmap", "grid"):
        draw = getattr(plot, name)
        spy = lambda *a, name=name, draw=draw, **k: (drawn.append((name, *a[1:])), draw(*a, **k))  # noqa: E731
        monkeypatch.setattr(plot, name, spy)
    report = two()
    if len(views) == 3:
        cka, more = np.eye(10), ["c"]
        cka[:9, :9] = report.cka
        report = Report(cka, np.zeros((10, 10)), [*report.view, *more], [*report.layer, "z"],
                        report.meta)  # fmt: skip
    assert "least alike" in report._repr_html_()
    assert drawn == [("grid",)] if len(views) == 2 else [("grid", "b", "a")]


def partly():
    """Three views of five layers; the first lacks one, another value is nan."""
    return cut(made(nan=[7]), ("32", "layer2.0"))


def test_absent_layers_are_told_from_nan():
    report = partly()
    assert absent(report).tolist() == [[False] * 3] * 3 + [[True, False, False]] + [[False] * 3]
    assert absent(report, "32")[3].all()


def test_an_absent_layer_is_blank_in_the_heatmap():
    report = partly()
    ax = plot.heatmap(report, ax=mpl.figure.Figure(figsize=(8, 6)).add_subplot())
    assert len(ax.texts) == 14
    assert sum(text.get_text() == "nan" for text in ax.texts) == len(ax.patches) == 1
    places = {(text.get_position()[1], text.get_position()[0]) for text in ax.texts}
    assert (3.5, 0.5) not in places


def test_an_absent_layer_is_blank_on_the_page():
    text = page(partly())
    start = text.index('<table id="heatmap"')
    heat = text[start : text.index("</table>", start)]
    (row,) = (line for line in heat.splitlines() if 'data-n="layer2.0"' in line)
    assert row.count('<td class="none"></td>') == 1
    assert heat.count('class="nan"') == 1
    whole = page(cut(made(), ("32", "layer2.0")))
    assert "features that do not vary" not in whole
