"""Suggesting a split: which layer is which cut, rules of one's own, and the answer."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from split_curves import AUTHORS, RESTORED, names, report

import msun
from cka_probe import Report
from msun.cutting.cuts import Cut
from msun.splitting.curve import Curve, Verdict
from msun.splitting.rules import SPLIT_RULES
from msun.splitting.suggest import suggest_split

# --- what belongs to what


def cut_of(name, *others, parameters=10):
    return Cut(name, (name, *others), (2, 4, 8, 8), parameters)


def test_a_cut_is_known_by_all_its_names():
    layers = ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    r = report([0.9, 0.5, 0.8, 0.8, 0.6], labels=layers)
    cuts = [cut_of("stem"), cut_of("layer1", "layer1.1"), cut_of("layer2", "layer2.1")]
    choice = suggest_split(r, cuts, rule="recovery")
    assert choice.layer == "layer1"
    assert choice.ranking.set_index("layer")["tapped"]["layer1"] == "layer1.1"
    assert choice.curve.layers == ("stem", "layer1.0", "layer1", "layer2.0", "layer2")
    assert choice.curve.is_cut.tolist() == [True, False, True, False, True]
    assert choice.unprobed == ()
    # by one name only, what was probed under another is not known to be the cut
    named = suggest_split(r, [cut.name for cut in cuts])
    assert named.unprobed == ("layer1", "layer2")
    assert "Not probed, so not considered: layer1, layer2." in named.why


def test_a_cut_probed_twice_is_one_point():
    layers = ["a", "s.0", "s.1", "s", "b"]
    r = report([0.9, 0.5, 0.8, 0.8, 0.6], labels=layers)
    choice = suggest_split(r, [cut_of("a"), cut_of("s", "s.1"), cut_of("b")])
    assert choice.curve.layers == ("a", "s.0", "s", "b")
    assert choice.ranking.set_index("layer")["tapped"]["s"] == "s"


def test_a_cut_lies_after_the_last_run_of_its_module():
    layers = ["a", "relu#0", "relu#1", "relu#2", "b"]
    r = report([0.9, 0.5, 0.82, 0.8, 0.6], labels=layers)
    choice = suggest_split(r, ["a", "relu", "b"])
    assert choice.curve.layers == ("a", "relu#0", "relu#1", "relu", "b")
    assert choice.curve.is_cut.tolist() == [True, False, False, True, True]
    assert (choice.layer, choice.score) == ("relu", 0.8)


def test_cuts_that_were_not_probed_are_named():
    cuts = [*names(5), *names(9, "other")]
    choice = suggest_split(report(AUTHORS["vgg16"][0]), cuts)
    assert choice.unprobed == tuple(names(9, "other"))
    assert "other.0, other.1, other.2, other.3, other.4, other.5 and 3 more" in choice.why


def test_a_cut_without_a_value_is_named_and_not_chosen():
    values = list(RESTORED)
    values[4] = np.nan
    choice = suggest_split(report(values, 0.002), names(19))
    assert choice.layer == "features.5"
    assert "features.4" not in choice.unprobed
    assert "Without a CKA value: features.4." in choice.cautions
    with pytest.raises(ValueError, match=r"^no CKA value: "):
        suggest_split(report([np.nan, np.nan]), names(2))


def test_a_report_of_another_network_has_none_of_the_cuts():
    with pytest.raises(ValueError, match=r"^none of the network's 2 cuts was probed: "):
        suggest_split(report(RESTORED), ["layer1", "layer2"])


def test_views():
    r = report(AUTHORS["vgg16"][0], view="8")
    for view in (None, 8, "8"):
        assert suggest_split(r, names(5), view=view).view == "8"
    with pytest.raises(ValueError, match=r"^unknown view: '16': use one of '8'$"):
        suggest_split(r, names(5), view=16)
    with pytest.raises(ValueError, match=r"^the reference itself: '224': use one of '8'$"):
        suggest_split(r, names(5), view="224")
    single = Report(np.eye(2), np.zeros((2, 2)), ["64"] * 2, ["a", "b"], {})
    with pytest.raises(ValueError, match=r"^a report of one view has no curve: '64': probe at two"):
        suggest_split(single, ["a"])
    two = {"run": {"views": {"a": {"model": "1"}, "224": {"model": "2"}}}}
    with pytest.raises(ValueError, match=r"^two networks, not one at two scales: 'a' and '224': "):
        suggest_split(report([0.5, 0.6], view="a", **two), names(2))
    three = Report(
        np.eye(6), np.full((6, 6), 0.1), ["64", "8", "16"] * 2, list("aaabbb"), {"reference": "64"}
    )
    assert suggest_split(three, ["a", "b"]).view == "8"  # the smallest as a number, not as text


def test_a_native_report_carries_a_caution():
    native = suggest_split(report(RESTORED, resize="native"), names(19))
    assert "another field of view" in native.why
    assert native.clear
    assert "field of view" not in suggest_split(report(RESTORED), names(19)).why
    blurred = suggest_split(report(RESTORED, resize="native", view="blurred"), names(19))
    assert "field of view" not in blurred.why


# --- rules of one's own


def test_a_callable_is_a_rule():
    def shallow(c):
        assert isinstance(c, Curve)
        with pytest.raises(dataclasses.FrozenInstanceError):
            c.delta = 1
        return -np.arange(len(c.cka), dtype=float)

    choice = suggest_split(report(RESTORED), names(19)[3:], rule=shallow)
    assert (choice.layer, choice.runner_up, choice.rule) == ("features.3", "features.4", "shallow")
    assert choice.doubts == ("scores of shallow have no standard errors",)
    assert "without standard errors, the difference may be chance" in choice.rivalry
    picky = suggest_split(report(RESTORED), names(19), rule=lambda c: [np.nan] * 19)
    assert (picky.layer, picky.clear) == (None, False)
    given = Verdict((7, 5), np.arange(19.0), np.ones(19), "because")
    said = suggest_split(report(RESTORED), names(19), rule=lambda c: given)
    assert (said.layer, said.runner_up, said.why) == ("features.7", "features.5", "Because.")
    assert said.apart == pytest.approx(math.sqrt(2))
    assert said.clear


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        ("recover", ValueError, r"^unknown rule: 'recover': did you mean 'recovery'\? known are"),
        ("x", ValueError, r"known are affordable, recovery, largest_recovery$"),
        (3, TypeError, r"^no rule: 3: give a name or a callable"),
        (lambda c: [1.0], ValueError, r"gave scores of the shape \(1,\): return 19 scores"),
        (lambda c: "a", TypeError, r"gave no numbers: 'a': return"),
        (
            lambda c: Verdict((0,), np.zeros(19), np.zeros(19), ""),
            ValueError,
            r"chose what is no cut: \{0\}: choose from curve.cuts$",
        ),
    ],
)
def test_bad_rules(rule, error, match):
    with pytest.raises(error, match=match):
        suggest_split(report(RESTORED), names(19)[1:], rule=rule)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match=f"^delta out of range: {value}: "):
        suggest_split(report(RESTORED), names(19), delta=value)


def test_cuts_of_another_kind():
    with pytest.raises(TypeError, match=r"^cuts are one text: 'features.1': "):
        suggest_split(report(RESTORED), "features.1")
    with pytest.raises(TypeError, match=r"^no cut: 3: "):
        suggest_split(report(RESTORED), [3])


# --- the answer


def test_the_ranking_holds_numbers_maps_and_costs():
    views = {"224": {"shape": [8, 14, 14], "grid": [14, 14], "channels": 8}}
    meta = {"layers": {"features.1": {"parameters": 5, "views": views}}, "view_macs": {"224": 2e9}}
    r = report(AUTHORS["vgg16"][0], **meta)
    cuts = [cut_of(name, parameters=100 * k) for k, name in enumerate(names(5))]
    costs = pd.DataFrame(
        {"parameters": [7.0] * 5, "gmacs_32": np.arange(5.0)}, index=pd.Index(names(5)[::-1])
    )
    by_cka = {"rule": "recovery"}
    table = suggest_split(r, cuts, costs=costs, **by_cka).ranking.set_index("layer")
    assert table.index[0] == "features.1"
    assert table.loc["features.1", ["channels", "grid"]].tolist() == [8, "14 x 14"]
    assert table.loc["features.2", "grid"] == ""
    assert table["gmacs_32"].to_dict() == {f"features.{k}": 4.0 - k for k in range(5)}
    assert set(table["parameters"]) == {7.0}
    alone = suggest_split(r, cuts)
    assert alone.ranking.set_index("layer")["parameters"]["features.3"] == 300
    assert "whole network, 2 GMACs in view 224, not that of the part before a cut" in alone.why
    assert not [name for name in alone.ranking if name.startswith("gmacs")]
    assert suggest_split(r, names(5)).ranking["parameters"].isna().all()
    low, high = r.interval()
    assert table.loc["features.3", "low"] == low[3, 8]
    assert table.loc["features.3", "high"] == high[3, 8]


def test_json_holds_the_answer(tmp_path):
    choice = suggest_split(report(RESTORED, np.nan, groups=1), names(19)[::2])
    choice.save(tmp_path / "split.json")
    told = json.loads((tmp_path / "split.json").read_text())
    assert told["layer"] == choice.layer == "features.4"
    assert told["why"] == choice.why
    assert told["dip"] == "features.2"
    assert told["apart"] is None
    assert [row["layer"] for row in told["ranking"]] == choice.ranking["layer"].tolist()
    assert [row["cka"] for row in told["curve"]] == RESTORED
    assert [row["cut"] for row in told["curve"]] == [k % 2 == 0 for k in range(19)]
    assert told["curve"][0]["low"] is None
    with pytest.raises(OSError, match="absent"):
        choice.save(tmp_path / "absent" / "split.json")


def test_it_shows_itself():
    choice = suggest_split(
        report([0.9, 0.5, 0.8, 0.6], labels=["a", "b<i>", "c", "d"]), list("acd")
    )
    assert repr(choice) == "<SplitChoice cut after c>"
    page = choice._repr_html_()
    assert "<b>cut after c</b>" in page
    assert "b&lt;i&gt; (0.500)" in page
    assert "<i>" not in page
    assert page.count("<tr") == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.layer = "a"


def test_exported():
    assert msun.suggest_split is suggest_split
    assert msun.SPLIT_RULES is SPLIT_RULES
    assert msun.SplitChoice.__name__ == "SplitChoice"
