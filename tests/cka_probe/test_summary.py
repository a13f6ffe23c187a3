"""A report in words: no sentence says more than the intervals allow, and none is long."""

import numpy as np
import pytest
from pages import made
from scipy.special import stdtrit

from cka_probe.html.page import render_page
from cka_probe.html.provenance import provenance_lines
from cka_probe.report import Report
from cka_probe.summary import (
    caveats,
    describe,
    details,
    few_groups,
    headline,
    read_cells,
    same_layers,
)

T = stdtrit(7, 0.975)  # 8 groups


def report(values, half=0.02, layers=("p", "q"), **meta):
    """Layers in views "s" and "r" with these values of CKA, all intervals of one half width."""
    n = len(layers)
    cka = np.eye(2 * n)
    cka[n:, :n] = cka[:n, n:] = 0.5
    cka[range(n), range(n, 2 * n)] = cka[range(n, 2 * n), range(n)] = values
    stderr = np.full((2 * n, 2 * n), half / T)
    meta = {"groups": 8, "reference": "r", **meta}
    return Report(cka, stderr, ["s"] * n + ["r"] * n, [*layers, *layers], meta)


def sized(values, **more):
    """The same with sizes as views: 8 px against 64 px."""
    one = report(values, **more)
    names = ["8" if view == "s" else "64" for view in one.view]
    return Report(one.cka, one.stderr, names, one.layer, {**one.meta, "reference": "64"})


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (sized([0.3, 0.5]), "At 8 px, p changes most: its CKA with itself at 64 px is 0.300."),
        (report([0.5, 0.3]), "In view s, q changes most: its CKA with itself in view r is 0.300."),
        (sized([-0.0001, 0.5]), "At 8 px, p changes most: its CKA with itself at 64 px is 0.000."),
        (
            report([0.3, 0.5], groups=1),
            "In view s, p changes most: its CKA with itself in view r is 0.300.",
        ),
        (sized([0.9999, 1.0]), "No layer changes: the lowest CKA with view 64 is 1.000."),
    ],
)
def test_the_headline_is_one_short_sentence(one, text):
    assert headline(one) == text
    assert len(text.split()) <= 20
    assert describe(one).splitlines()[0] == text
    assert describe(one).splitlines()[1:] == [*details(one), *few_groups(one)]


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ([0.3, 0.5, 0.5], "; no other interval overlaps."),
        ([0.3, 0.33, 0.5], "; 1 other interval overlaps."),
        ([0.3, 0.33, 0.34], "; 2 other intervals overlap."),
        ([0.3, 0.3401, 0.5], "; no other interval overlaps."),  # .320 is below .3201
    ],
)
def test_whether_the_lowest_value_stands_apart(values, end):
    first = details(report(values, layers="pqr"))[0]
    assert first == "Lowest: p in view s (CKA 0.300, 95 % interval 0.280 to 0.320)" + end


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([0.3, 0.5], "0 above 0.9, 2 below, 0 undecided."),
        ([0.879, 0.95], "1 above 0.9, 1 below, 0 undecided."),
        ([0.879, 0.881], "0 above 0.9, 1 below, 1 undecided."),
        ([0.91, 0.95], "1 above 0.9, 0 below, 1 undecided."),
    ],
)
def test_counts_follow_the_intervals(values, counts):
    assert details(report(values))[1] == f"Of 2 values, by their intervals: {counts}"


def test_without_intervals_there_are_no_counts():
    one = report([0.3, 0.5], groups=1)
    assert details(one) == ["Lowest: p in view s (CKA 0.300)."]
    assert few_groups(one)[0].startswith("There are no intervals")


@pytest.mark.parametrize(("groups", "lines"), [(2, 1), (7, 1), (8, 0), (20, 0)])
def test_few_groups_are_said_everywhere(groups, lines):
    one = report([0.3, 0.5], groups=groups)
    text = f"Only {groups} groups of images: the intervals are unreliable."
    assert len(few_groups(one)) == lines
    for place in (describe(one), one.summary(), " ".join(caveats(one)), render_page(one)):
        assert (text in place) == bool(lines)


def test_negative_and_nan():
    lines = details(report([-0.2, np.nan]))
    assert lines[-1] == (
        "1 below 0: unbiased estimates of a CKA near 0. "
        "1 of 2 values are nan: features constant up to rounding."
    )
    why = report([-0.2, np.nan])
    why.meta["nan"] = {"RBF has no bandwidth": ["layer '1'"]}
    assert details(why)[-1].endswith("1 of 2 values are nan: RBF has no bandwidth.")
    assert "below 0:" not in describe(report([0.2, 0.3]))
    assert headline(report([np.nan, np.nan])).startswith("There is no value to read")
    assert details(report([np.nan, np.nan])) == []


def test_two_networks_are_described_by_pairs():
    cka = np.eye(4)
    cka[:2, 2:] = [[0.2, 0.9], [0.6, 0.1]]
    cka = np.maximum(cka, cka.T)
    two = Report(cka, np.full((4, 4), 0.01 / T), ["a", "a", "b", "b"], list("pqxy"),
                 {"groups": 8, "reference": "a"})  # fmt: skip
    assert not same_layers(two)
    assert len(read_cells(two)) == 4
    assert headline(two) == (
        "Most alike of 4 pairs of layers: y in view b and p in view a, with a CKA of 0.900."
    )
    assert details(two) == [
        "Most alike: y in view b and p in view a (CKA 0.900, 95 % interval 0.890 to 0.910). "
        "Least alike: y in view b and q in view a (CKA 0.100, 95 % interval 0.090 to 0.110)."
    ]


def test_a_single_view_is_read_by_pairs():
    one = made(layers=["p", "q", "r"], views=["features"])
    assert not same_layers(one)
    pairs = {(cell.layer, cell.other_layer): cell.cka for cell in read_cells(one)}
    assert pairs == {
        ("q", "p"): one.cka[1, 0],
        ("r", "p"): one.cka[2, 0],
        ("r", "q"): one.cka[2, 1],
    }


def test_a_few_differing_layers_do_not_hide_the_rest():
    views, layers = ["s"] * 10 + ["r"] * 11, [*range(10), *range(11)]
    some = Report(np.eye(21), np.zeros((21, 21)), views, [str(k) for k in layers],
                  {"reference": "r"})  # fmt: skip
    assert same_layers(some)
    assert len(read_cells(some)) == 10


def test_caveats():
    lines = caveats(report([0.3, 0.5], n_images=192))
    assert "these 192 images" in lines[0]
    assert any("cannot show whether the network still works" in line for line in lines)
    assert all(len(part.split()) <= 20 for line in lines for part in line.split(". "))


def test_provenance_lines():
    run = {"views": {"s": {"model": "a" * 64, "transform": "View(side_px=32, mean=None)"},
                     "r": {"model": "a" * 64, "transform": None}},
           "images": {"name": "photos", "sha256": "0" * 64}}  # fmt: skip
    lines = dict(provenance_lines(report(
        [0.3, 0.5], run=run, kernel="rbf", bandwidth=0.5, n_images=40, estimator="minibatch",
        unbiased=True, seed=0, left_out=[f"{k}.jpg" for k in range(20)], unreached=["aux"],
        view_macs={"s": 37_523_456, "r": 1.8e9}, model={"name": "net", "mean": [0.5, 0.25]},
        skipped={"lstm": "a tuple"}, amp_note=None,
    )))  # fmt: skip
    assert lines["model"] == "net, mean 0.5 0.25"
    assert lines["data"] == f"photos, sha256 {'0' * 12}…"
    assert lines["views"] == f"s: side_px 32\nr: as they are\nnetwork {'a' * 12}…"
    assert lines["kernel"] == "rbf, sigma 0.5 of the median distance"
    assert lines["estimator"] == "minibatch, debiased"
    assert lines["seed"] == "0"
    assert lines["intervals"] == "95 %, jackknife over 8 groups of images, Student's t"
    assert lines["MACs per image"] == "s: 37.5 M · r: 1.8 G"
    assert lines["left out"].endswith("11.jpg and 8 more")
    assert lines["never reached"] == "aux"
    assert lines["cannot be tapped"] == "lstm (a tuple)"
    assert "mixed precision" not in lines
    assert "amp note" not in lines
