"""The rule that counts parameters: how deep a cut can be paid."""

import functools

import numpy as np
import pytest
import torchvision
from split_curves import RESTORED, curve, names, report

from msun import find_cuts, suggest_split
from msun.cutting.cuts import Cut, example_images
from msun.splitting.rules import get_rule

judge = get_rule("affordable")[1]


def with_parameters(counts, **options):
    counts = np.asarray(counts, dtype=float)
    return curve(np.linspace(0.9, 0.2, len(counts)), parameters=counts, **options)


def known(counts):
    return [Cut(name, (name,), (), n) for name, n in zip(names(len(counts)), counts, strict=True)]


def test_the_deepest_within_the_limit_on_random_networks():
    generator = np.random.default_rng(0)
    for _ in range(200):
        m = int(generator.integers(1, 20))
        counts = np.cumsum(generator.integers(0, 1000, m)) + 1.0
        is_cut = generator.random(m) < 0.7
        if not is_cut.any():
            continue
        scales, growth = int(generator.integers(2, 6)), float(generator.choice([0.1, 0.5, 2.0]))
        c = with_parameters(counts, is_cut=is_cut, scales=scales, growth=growth)
        verdict = judge(c)
        cuts = np.flatnonzero(is_cut)
        added = (scales - 1) * counts[cuts] / counts[cuts[-1]]
        paid = cuts[added < growth]
        assert sorted(verdict.order) == cuts.tolist()
        assert verdict.order[0] == (paid[-1] if len(paid) else cuts[0])
        assert bool(verdict.doubts) == (len(paid) == 0)
        np.testing.assert_allclose(verdict.scores[cuts], added)
        assert np.isnan(np.delete(verdict.scores, cuts)).all()


def test_more_scales_cost_more_and_the_limit_is_the_users():
    counts = [1, 10, 20, 40, 100]
    assert [judge(with_parameters(counts, scales=s)).order[0] for s in (2, 3, 4, 6)] == [3, 3, 2, 1]
    assert [judge(with_parameters(counts, growth=g)).order[0] for g in (0.05, 0.2, 1, 2)] == [
        0,
        1,
        3,
        4,
    ]


def test_reasons_name_what_is_added():
    choice = suggest_split(
        report(RESTORED[:4]), known([5, 20, 60, 100]), rule="affordable", growth=0.5
    )
    assert (choice.layer, choice.runner_up, choice.clear) == ("features.1", "features.0", True)
    assert "features.1, where 2 subnets add 20 %; features.2 would add 60 %" in choice.why
    assert choice.ranking["score"].tolist() == [0.2, 0.05, 0.6, 1.0]
    assert choice.rivalry == "Runner-up: features.0, score 0.050 against 0.200."
    dear = suggest_split(report(RESTORED[:2]), known([90, 100]), rule="affordable", growth=0.5)
    assert (dear.layer, dear.clear) == ("features.0", False)
    assert "After every cut subnets add 50 % of the features' parameters or more" in dear.why
    wide = suggest_split(
        report(RESTORED[:4]), known([5, 20, 60, 100]), rule="affordable", growth=1.1
    )
    assert wide.layer == "features.3"
    usual = suggest_split(report(RESTORED[:4]), known([5, 20, 60, 100]), rule="affordable")
    assert usual.layer == "features.2"  # two scales: the last cut would be two networks


def test_cuts_off_the_curve_count_for_the_whole_and_are_named():
    five = known([5, 20, 60, 90, 100])
    part = suggest_split(report(RESTORED[:2]), five, rule="affordable")
    assert (part.layer, part.score, part.clear) == ("features.1", 0.2, True)
    assert part.cautions[-1].endswith("not on the curve: features.2, features.3.")
    whole = suggest_split(report(RESTORED[:5]), five, rule="affordable")
    assert whole.layer == "features.3"
    assert not any("Deeper" in text for text in whole.cautions)
    values = RESTORED[:5].copy()
    values[3] = np.nan  # as of a layer that gives zeros
    gap = suggest_split(report(values), five, rule="affordable")
    assert (gap.layer, gap.score) == ("features.2", 0.6)
    assert gap.cautions[-1].endswith("not on the curve: features.3.")
    lone = suggest_split(report(RESTORED[:1]), known([5, 100]), rule="affordable")
    assert (lone.layer, lone.clear, lone.score) == ("features.0", True, 0.05)


def test_uncertain_cka_makes_no_doubt_of_it():
    how = {"rule": "affordable"}
    for told in (report(RESTORED[:4], np.nan), report(RESTORED[:4], 0.002, unbiased=False)):
        assert suggest_split(told, known([5, 20, 60, 100]), **how).clear


def test_it_is_the_default_where_parameters_are_known():
    counted = known([5, 20, 60, 100])
    assert suggest_split(report(RESTORED[:4]), counted).rule == "affordable"
    assert suggest_split(report(RESTORED[:4]), names(4)).rule == "recovery"
    one = [counted[0], *names(4)[1:]]
    assert suggest_split(report(RESTORED[:4]), one).rule == "recovery"


def test_unknown_parameters_and_bad_limits():
    with pytest.raises(ValueError, match=r"^parameters before the cuts are not known: cuts by"):
        suggest_split(report(RESTORED), names(19), rule="affordable")
    for growth in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^growth out of range: "):
            suggest_split(report(RESTORED), names(19), growth=growth)
    for growth in ("1", None, True):
        with pytest.raises(ValueError, match=r"^growth is no number: "):
            suggest_split(report(RESTORED), names(19), growth=growth)


@functools.cache
def cuts_of(name):
    net = torchvision.models.get_model(name, weights=None).eval()
    return find_cuts(net, example_images(net))


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer4"), ("resnet50", "layer4"), ("vgg11_bn", "features.14")]
)
def test_real_networks(name, layer):
    cuts = cuts_of(name)
    labels = [cut.name for cut in cuts]
    counts = {cut.name: cut.parameters for cut in cuts}
    told = report(np.linspace(0.9, 0.5, len(labels)), labels=labels)
    choice = suggest_split(told, cuts, rule="affordable")
    most = max(counts.values())
    assert counts[choice.layer] < most
    deeper = [n for n in labels if counts[n] > counts[choice.layer]]
    assert all(counts[n] == most for n in deeper)
    assert choice.layer.startswith(layer.split(".")[0])
