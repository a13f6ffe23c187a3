"""A report in words: no sentence says more than the intervals allow."""

import numpy as np
import pytest
from pages import made
from scipy.special import stdtrit

from cka_probe.html.provenance import facts
from cka_probe.report import Report
from cka_probe.summary import cannot, lead, read_cells, remarks, same_layers, shows

ABOVE = "The interval lies wholly above 0.9 for"
T = stdtrit(7, 0.975)  # 8 groups


def report(values, half=0.02, layers=("p", "q"), **meta):
    """Layers in view "s" held against view "r": these values, all intervals of one half width."""
    n = len(layers)
    cka = np.eye(2 * n)
    cka[n:, :n] = cka[:n, n:] = 0.5
    cka[range(n), range(n, 2 * n)] = cka[range(n, 2 * n), range(n)] = values
    stderr = np.full((2 * n, 2 * n), half / T)
    meta = {"groups": 8, "reference": "r", **meta}
    return Report(cka, stderr, ["s"] * n + ["r"] * n, [*layers, *layers], meta)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.3, 0.5], "; the intervals of all others lie above its own."),
        ([0.3, 0.33], ", but the interval of q in view s reaches into its own."),
    ],
)
def test_the_least_is_settled_or_not(values, said):
    least = "Least like itself in view r is p in view s (CKA 0.300, 95 % interval 0.280 to 0.320)"
    assert remarks(report(values))[0] == least + said


def sized(values, **more):
    """The same with sizes as views: 8 px held against 64 px."""
    one = report(values, **more)
    names = ["8" if view == "s" else "64" for view in one.view]
    return Report(one.cka, one.stderr, names, one.layer, {**one.meta, "reference": "64"})


FIVE = ["k", "l", "m", "n", "o"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (sized([0.3, 0.5]), "At 8 px, p moves most: its CKA with itself at 64 px is 0.300."),
        (report([0.3, 0.5]), "In view s, p moves most: its CKA with itself in view r is 0.300."),
        (
            sized([0.33, 0.3]),
            "At 8 px, q and p move most: the CKA of q with itself at 64 px is 0.300.",
        ),
        (
            sized([0.5, 0.51, 0.52, 0.9, 0.53], layers=FIVE),
            "At 8 px, 4 layers, k among them, move most: the CKA of k with itself at 64 px "
            "is 0.500.",
        ),
        (sized([-0.0001, 0.5]), "At 8 px, p moves most: its CKA with itself at 64 px is 0.000."),
        (
            report([0.3, 0.5], groups=1),
            "In view s, p moves most: its CKA with itself in view r is 0.300.",
        ),
        (sized([0.9999, 1.0]), "No layer moves: the lowest CKA with view 64 is 1.000."),
    ],
)
def test_the_lead_is_one_plain_sentence(told, said):
    assert lead(told) == said
    assert shows(told).splitlines() == [said, *remarks(told)]


def test_many_rivals():
    layers = [f"l{k}" for k in range(5)]
    told = shows(report([0.5, 0.51, 0.52, 0.9, 0.53], layers=layers))
    assert "but the intervals of 3 other values reach into its own, so which is lowest is" in told


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.3, 0.5], "for both layers in view s."),
        ([0.879, 0.95], f"for p in view s. {ABOVE} 1 other value."),
        ([0.879, 0.881], "for p in view s. The interval does not decide for 1 value."),
        (
            [0.95, 0.99],
            f"for no layer in view s. {ABOVE} 2 other values.",
        ),
        (
            [0.91, 0.95],
            f"for no layer in view s. {ABOVE} 1 other value and does not decide for 1 value.",
        ),
        ([0.89, 0.91], "for no layer in view s. The interval does not decide for 2 values."),
    ],
)
def test_what_is_ruled_out(values, said):
    told = shows(report(values))
    assert f"A CKA of 0.9 is ruled out, the whole interval lying below it, {said}" in told


def test_no_error_bars():
    told = shows(report([0.3, 0.5], groups=1))
    assert "Least like itself in view r is p in view s (CKA 0.300)." in told
    assert "no error bars" in told
    assert "ruled out" not in told


def test_negative_and_nan():
    told = shows(report([-0.2, np.nan]))
    assert "never below 0" in told
    assert "1 of 2 values are nan" in told
    assert "never below 0" not in shows(report([0.2, 0.3]))
    assert shows(report([np.nan, np.nan])).startswith("There is no value to read")
    assert remarks(report([np.nan, np.nan])) == []


def test_views_of_one_finding_are_told_together():
    whole = made(views=["8", "16", "24"], spread=0)
    cka = np.where(np.eye(15) == 1, 1, 0.4)
    told = shows(Report(cka, whole.stderr, whole.view, whole.layer, {**whole.meta, "groups": 8}))
    assert "for all 5 layers in views 8 and 16." in told


def test_two_networks_are_read_by_pairs():
    cka = np.eye(4)
    cka[:2, 2:] = [[0.2, 0.9], [0.6, 0.1]]
    cka = np.maximum(cka, cka.T)
    two = Report(cka, np.full((4, 4), 0.01 / T), ["a", "a", "b", "b"], list("pqxy"),
                 {"groups": 8, "reference": "a"})  # fmt: skip
    assert not same_layers(two)
    assert len(read_cells(two)) == 4
    assert lead(two) == (
        "Of 4 pairs of layers, y in view b and p in view a are the most alike, with a CKA of 0.900."
    )
    told = shows(two)
    assert "Of 4 pairs of layers, most alike are y in view b and p in view a (CKA 0.900" in told
    assert "least alike y in view b and q in view a (CKA 0.100" in told


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


def test_cannot():
    told = cannot(report([0.3, 0.5], n_images=192))
    assert "these 192 images" in told
    assert "cannot show whether the network still works" in told


def test_facts():
    run = {"views": {"s": {"model": "a" * 64, "transform": "View(side_px=32, mean=None)"},
                     "r": {"model": "a" * 64, "transform": None}},
           "images": {"name": "photos", "sha256": "0" * 64}}  # fmt: skip
    told = dict(facts(report(
        [0.3, 0.5], run=run, kernel="rbf", bandwidth=0.5, n_images=40, estimator="minibatch",
        unbiased=True, seed=0, left_out=[f"{k}.jpg" for k in range(20)], unreached=["aux"],
        view_macs={"s": 37_523_456, "r": 1.8e9}, model={"name": "net", "mean": [0.5, 0.25]},
        skipped={"lstm": "a tuple"}, amp_note=None,
    )))  # fmt: skip
    assert told["model"] == "net, mean 0.5 0.25"
    assert told["data"] == f"photos, sha256 {'0' * 12}…"
    assert told["views"] == f"s: side_px 32\nr: as they are\nnetwork {'a' * 12}…"
    assert told["kernel"] == "rbf, sigma 0.5 of the median distance"
    assert told["estimator"] == "minibatch, debiased"
    assert told["seed"] == "0"
    assert told["intervals"] == "95 %, jackknife over 8 groups of images, Student's t"
    assert told["MACs per image"] == "s: 37.5 M · r: 1.8 G"
    assert told["left out"].endswith("11.jpg and 8 more")
    assert told["never reached"] == "aux"
    assert told["cannot be tapped"] == "lstm (a tuple)"
    assert "mixed precision" not in told
    assert "amp note" not in told
