"""Views of different networks: two layers that share a name are not one."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from pages import made
from safetensors.torch import save_file
from scipy.special import stdtrit
from shell import furnish, words

from cka_probe.cli.main import main
from cka_probe.html.page import render_page
from cka_probe.models.load import load_model
from cka_probe.plot import figures as plot
from cka_probe.report import Report
from cka_probe.summary import missing_cells


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
    text = two().summary()
    assert "itself" not in text
    assert "Most alike of" in text


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
    assert "Most alike" in report._repr_html_()
    assert drawn == [("grid",)] if len(views) == 2 else [("grid", "b", "a")]


def partly():
    """Three views of five layers; the first lacks one, another value is nan."""
    return cut(made(nan=[7]), ("32", "layer2.0"))


def test_absent_layers_are_told_from_nan():
    report = partly()
    assert missing_cells(report).tolist() == [[False] * 3] * 3 + [[True, False, False]] + [
        [False] * 3
    ]
    assert missing_cells(report, "32")[3].all()


def test_an_absent_layer_is_blank_in_the_heatmap():
    report = partly()
    ax = plot.heatmap(report, ax=mpl.figure.Figure(figsize=(8, 6)).add_subplot())
    assert len(ax.texts) == 14
    assert sum(text.get_text() == "nan" for text in ax.texts) == len(ax.patches) == 1
    places = {(text.get_position()[1], text.get_position()[0]) for text in ax.texts}
    assert (3.5, 0.5) not in places


def test_an_absent_layer_is_blank_on_the_page():
    text = render_page(partly())
    start = text.index('<table id="heatmap"')
    heat = text[start : text.index("</table>", start)]
    (row,) = (line for line in heat.splitlines() if 'data-n="layer2.0"' in line)
    assert row.count('<td class="none"></td>') == 1
    assert heat.count('class="nan"') == 1
    whole = render_page(cut(made(), ("32", "layer2.0")))
    assert "features that do not vary" not in whole


WIDE = """

def wide():
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 6, 3), act=nn.ReLU(), body=nn.Conv2d(6, 6, 3), end=nn.Flatten(),
    ))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = furnish(tmp_path_factory.mktemp("two"))
    nets = (root / "nets.py").read_text()
    (root / "nets.py").write_text(f"from collections import OrderedDict\n{nets}{WIDE}")
    return root


def test_compare_networks_of_differing_layers(place, tmp_path):
    out = tmp_path / "o"
    argv = words(place, out, "--size", "16", "--quiet", "--layers", "*", command="compare")
    assert main([*argv[:3], "--model", f"{place / 'nets.py'}:wide", *argv[3:]]) == 0
    report = Report.load(out / "report.npz")
    a, b = (report.layers_of(view) for view in "ab")
    assert len(a) > len(b)
    assert {"stem", "act", "body", "end"} == set(b)
    assert not set(a) & set(b)
    table = pd.read_csv(out / "cka.csv", dtype={"layer_a": str, "layer_b": str})
    across = table[(table.view_a == "a") & (table.view_b == "b")]
    assert len(across) == len(a) * len(b)
    assert len(table) == len(report) * (len(report) + 1) // 2
    assert (across.low < across.cka).all()
    assert (across.cka < across.high).all()
    t = stdtrit(report.meta["groups"] - 1, 0.975)
    assert np.allclose(across.high - across.cka, t * across.stderr)
    for row in across.itertuples():
        assert report.between("a", "b").loc[row.layer_a, row.layer_b] == pytest.approx(row.cka)


def test_compare_a_network_with_its_fine_tuned_copy(place, tmp_path):
    """Layers before the first that moved are equal; from there on they are not."""
    model = load_model(f"{place / 'nets.py'}:tiny").model
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 3
    model[0].requires_grad_(False)
    model.eval()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(20):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    files = [f"--weights={tmp_path / name}.safetensors" for name in "ab"]
    out = tmp_path / "o"
    more = ("--size", "16", "--quiet", "--layers", "*", *files)
    assert main(words(place, out, *more, command="compare")) == 0
    report = Report.load(out / "report.npz")
    own = pd.Series(np.diag(report.between("a", "b")), index=report.layers_of("a"))
    assert np.allclose(own[["0", "1"]], 1, atol=1e-9)
    assert (own.drop(["0", "1"]) < 1 - 1e-6).all()
    shas = {view["model"] for view in report.meta["run"]["views"].values()}
    assert len(shas) == 2
