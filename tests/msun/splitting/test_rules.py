"""Rules: against slow oracles, on the curves of the paper's authors, and under simulated noise."""

import dataclasses
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from split_curves import AUTHORS, FED_SMALL, RESTORED, curve, names, report

from msun.splitting.rules import first_dip, get_rule
from msun.splitting.suggest import suggest_split

# --- slow oracles, written from the definitions alone


def oracle_recovery(c):
    v = list(c.cka)
    dips = [k for k in range(1, len(v) - 1) if v[k] < v[k - 1] and v[k] < v[k + 1]]
    dip = dips[0] if dips else 0
    goal = max(v[dip + 1 :]) - c.delta
    for k in range(dip + 1, len(v)):
        if c.is_cut[k] and c.high[k] >= goal:
            return k
    return None


def oracle_largest(c):
    cuts = [k for k in range(len(c.cka)) if c.is_cut[k]]
    rises = {b: c.cka[b] - c.cka[a] for a, b in pairwise(cuts)}
    return max(rises, key=rises.get) if rises else None


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        ("recovery", oracle_recovery),
        ("largest_recovery", oracle_largest),
    ],
)
def test_rules_agree_with_oracles_on_random_curves(rule, oracle):
    generator = np.random.default_rng(0)
    answers = Counter()
    for _ in range(500):
        m = int(generator.integers(2, 25))
        values = np.cumsum(generator.normal(0, 0.08, m)) + 0.8
        is_cut = generator.random(m) < 0.6
        half = generator.random(m) * 0.1
        c = curve(values, is_cut, half, delta=generator.choice([0, 0.05, 0.2]))
        verdict = get_rule(rule)[1](c)
        reach = [k for k in verdict.order if rule != "recovery" or c.high[k] >= verdict.target]
        assert (reach[0] if reach else None) == oracle(c)
        assert all(c.is_cut[k] for k in verdict.order)
        assert len(set(verdict.order)) == len(verdict.order)
        answers[bool(reach)] += 1
    assert min(answers[True], answers[False]) > 5  # both kinds were met


@pytest.mark.parametrize(
    ("values", "dip"),
    [
        ([3, 1, 2], 1),
        ([3, 2, 1], 0),
        ([1, 2, 3], 0),
        ([1, 3, 2], 0),
        ([3, 1, 1, 2], 1),  # a floor is one point, and its first layer stands for it
        ([3, 3, 1, 1], 0),  # nothing rises after it
        ([2, 2, 3, 1, 4], 3),
        ([5, 2, 4, 1, 3], 1),  # the first, not the lowest
        ([1], 0),
    ],
)
def test_the_dip_is_the_first_interior_local_minimum(values, dip):
    assert first_dip(np.array(values, dtype=float)) == dip


def test_recovery_on_the_authors_curves_agrees_with_one_cut_of_four():
    answers = {
        name: suggest_split(report(values, 1e-4), names(5)) for name, (values, _) in AUTHORS.items()
    }
    blocks = {name: int(choice.layer.split(".")[1]) + 1 for name, choice in answers.items()}
    assert blocks == {"resnet50": 2, "densenet121": 3, "vgg16": 2, "mobilenet_v2": 3}
    agree = [name for name, (_, block) in AUTHORS.items() if blocks[name] == block]
    assert agree == ["resnet50"]
    # where the curve has no dip inside, the first block is the dip
    assert {choice.dip for choice in answers.values()} == {0}
    assert all(choice.clear for choice in answers.values())
    # a near thing: 0.903 misses 0.905, which an interval of +-0.0021 reaches
    assert suggest_split(report(AUTHORS["densenet121"][0], 0.001), names(5)).layer == "features.1"


def test_rivals_on_the_authors_curves():
    for rule, blocks in (("largest_recovery", [2, 2, 2, 3]),):
        found = [
            suggest_split(report(values, 0.001), names(5), rule=rule).layer
            for values, _ in AUTHORS.values()
        ]
        assert [name and int(name.split(".")[1]) + 1 for name in found] == blocks


def test_recovery_on_the_nineteen_features_of_mobilenet():
    choice = suggest_split(report(RESTORED, 0.002), names(19))
    assert (choice.layer, choice.dip, choice.clear) == ("features.4", 2, True)
    assert choice.target == pytest.approx(0.815)
    assert "features.2 (0.625)" in choice.why
    assert "features.5 (0.865)" in choice.why
    fed = suggest_split(report(FED_SMALL, 0.002, resize="native"), names(10))
    assert (fed.layer, fed.dip) == ("features.4", 2)
    # wide intervals reach earlier: 0.779 + 2.09 * 0.02 > 0.815
    assert suggest_split(report(RESTORED, 0.02), names(19)).layer == "features.3"


def test_layers_that_are_no_cuts_shape_the_curve_but_are_not_chosen():
    cuts = ["features.1", "features.6", "features.12"]
    choice = suggest_split(report(RESTORED, 0.002), cuts)
    assert choice.layer == "features.6"
    assert choice.dip == 2
    assert choice.target == pytest.approx(0.815)  # of features.5
    assert choice.ranking["layer"].tolist() == ["features.6", "features.12", "features.1"]
    assert math.isnan(choice.ranking["score"].iloc[2])
    assert choice.runner_up == "features.12"


# --- how sure


def simulate(truth, noise, groups, generator, shared=0.0):
    """A curve drawn from group means with their standard errors, as a report would hold it.

    `shared` is the correlation of any two layers' errors, which are measured on the same images.
    """
    m = len(truth)
    common = generator.normal(size=(groups, 1)) * math.sqrt(shared)
    own = generator.normal(size=(groups, m)) * math.sqrt(1 - shared)
    draws = np.asarray(truth) + noise * math.sqrt(groups) * (common + own)  # (groups, m)
    stderr = draws.std(0, ddof=1) / math.sqrt(groups)
    half = stats.t.ppf(0.975, groups - 1) * stderr
    return dataclasses.replace(curve(draws.mean(0), half=half, groups=groups), stderr=stderr)


def judge(rule, drawn):
    return get_rule(rule)[1](drawn)


@pytest.mark.parametrize("rule", ["recovery", "largest_recovery"])
@pytest.mark.parametrize(("layers", "groups"), [(5, 10), (19, 6), (19, 40), (60, 20)])
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_a_flat_curve_is_called_clear_in_at_most_five_percent(rule, layers, groups, shared):
    generator = np.random.default_rng(layers + groups)
    draws, clear = 400, 0
    for _ in range(draws):
        clear += not judge(rule, simulate([0.7] * layers, 0.02, groups, generator, shared)).doubts
    assert clear <= stats.binom.ppf(0.999, draws, 0.05)


def test_a_curve_that_only_falls_is_never_clear():
    generator = np.random.default_rng(1)
    for _ in range(100):
        verdict = judge("recovery", simulate(np.linspace(0.99, 0.3, 12), 0.005, 20, generator))
        assert verdict.doubts == ("there is no recovery",)
    choice = suggest_split(report([0.9, 0.7, 0.5]), names(3))
    assert choice.why.startswith("No clear split: there is no recovery. CKA never rises: ")
    assert choice.dip is None


def test_a_dip_far_outside_the_noise_is_found_and_clear():
    generator = np.random.default_rng(2)
    found = Counter()
    for _ in range(300):
        verdict = judge("recovery", simulate(RESTORED, 0.004, 20, generator, shared=0.5))
        found[verdict.order[0], not verdict.doubts] += 1
    assert found[4, True] >= 285


def test_more_noise_makes_fewer_clear_splits():
    generator = np.random.default_rng(3)
    shares = []
    for noise in (0.01, 0.05, 0.2):
        drawn = [judge("recovery", simulate(RESTORED, noise, 12, generator)) for _ in range(100)]
        shares.append(np.mean([not verdict.doubts for verdict in drawn]))
    assert shares[0] > 0.95 > shares[1] > shares[2]
    assert shares[2] < 0.1


def test_without_standard_errors_nothing_is_clear():
    for told in ({"groups": 1}, {"groups": None}):
        choice = suggest_split(report(RESTORED, np.nan, **told), names(19))
        assert choice.layer == "features.4"
        assert choice.doubts == (
            "there are no standard errors (fewer than 2 groups of images), so any difference may "
            "be chance",
        )
        assert not choice.clear
        assert math.isnan(choice.apart)
        assert "no interval" in choice.why
    # standard errors without a number of groups give no intervals either
    assert not suggest_split(report(RESTORED, 0.001, groups=None), names(19)).clear


def test_two_groups_have_one_degree_of_freedom():
    choice = suggest_split(report(RESTORED, 0.01, groups=2), names(19))
    assert not choice.clear
    (doubt,) = [text for text in choice.doubts if "standard errors of the" in text]
    needed = stats.t.ppf(1 - 0.025 / 18, 1)
    assert doubt.endswith(f"of the {needed:.1f} that would rule it out with 2 groups of images")


def test_all_cuts_within_one_interval():
    c = report([0.9, 0.2, 0.7, 0.71, 0.70, 0.71], 0.01)
    choice = suggest_split(c, names(6)[2:])
    assert choice.doubts == ("the intervals of all cuts overlap",)
    assert choice.layer == "features.2"
    assert suggest_split(c, names(6)).clear


def test_no_valid_cut_after_the_dip():
    choice = suggest_split(report(RESTORED), ["features.0", "features.1"])
    assert choice.layer is None
    assert choice.runner_up is None
    assert math.isnan(choice.score)
    assert "no valid cut lies after the dip at features.2" in choice.doubts
    assert choice.headline == "no clear split: no cut to offer"
    assert choice.ranking["layer"].tolist() == ["features.0", "features.1"]
    alone = suggest_split(report([0.8]), names(1))
    assert (alone.layer, alone.clear) == (None, False)


def test_no_cut_that_comes_back_is_unclear_and_the_nearest_is_named():
    choice = suggest_split(report(RESTORED, 0.002), ["features.1", "features.12", "features.18"])
    assert choice.layer == "features.12"
    assert "no cut after the dip recovers to 0.815" in choice.doubts
    assert not choice.clear


def test_the_cut_may_be_as_low_as_the_dip():
    stderr = [0.001, 0.001, 0.002, 0.1, 0.001, 0.001]
    choice = suggest_split(report([0.99, 0.9, 0.6, 0.65, 0.85, 0.8], stderr), names(6))
    assert choice.layer == "features.3"  # its interval reaches high, but low too
    assert choice.doubts == ("features.3 itself may be as low as the dip",)


def test_standard_errors_apart():
    stderr = np.linspace(0.002, 0.004, 19)
    choice = suggest_split(report(RESTORED, stderr), names(19))
    assert (choice.layer, choice.runner_up) == ("features.4", "features.5")
    assert choice.apart == pytest.approx((0.861 - 0.865) / math.hypot(stderr[4], stderr[5]))
    largest = suggest_split(report(RESTORED, stderr), names(19), rule="largest_recovery")
    assert (largest.layer, largest.runner_up) == ("features.3", "features.4")
    assert largest.score == pytest.approx(0.779 - 0.625)
    rises = math.hypot(*stderr[[3, 2]]), math.hypot(*stderr[[4, 3]])
    assert largest.apart == pytest.approx((0.154 - 0.082) / math.hypot(*rises))
    assert f"{abs(largest.apart):.1f} standard errors apart" in largest.rivalry


def test_two_rises_alike_are_not_clear():
    choice = suggest_split(report([0.2, 0.5, 0.79, 0.7]), names(4), rule="largest_recovery")
    assert choice.doubts == ("the rise to features.2 may be as large",)
    falling = suggest_split(report([0.9, 0.8, 0.5]), names(3), rule="largest_recovery")
    assert (falling.layer, falling.doubts) == ("features.1", ("CKA never rises",))
    lone = suggest_split(report([0.9, 0.8, 0.5]), ["features.1"], rule="largest_recovery")
    assert (lone.layer, lone.doubts) == (None, ("no two cuts to compare",))


def test_biased_cka_is_unclear():
    biased = report(RESTORED, 0.002, unbiased=False)
    for rule in ("recovery", "largest_recovery"):
        choice = suggest_split(biased, names(19), rule=rule)
        assert not choice.clear
        assert "CKA is biased" in choice.why
