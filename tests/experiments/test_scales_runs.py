"""What the experiment on scales runs, and in which budget it chooses its rates."""

import pytest

pytestmark = pytest.mark.usefixtures("at_the_root")


def test_a_rate_is_chosen_inside_its_grid_or_the_grid_grows():
    from experiments.scales.arms import ARMS
    from experiments.scales.manifest import WIDER, rate_runs, rates

    def asked(known):
        return [run.lr for run in rate_runs("glyphs", "residual", "g", 0.25, known)]

    low, mid, high = rates(ARMS["g"])
    assert asked({}) == [low, mid, high]
    assert asked({low: 0.1, high: 0.3}) == [mid]
    assert asked({low: 0.1, mid: 0.3, high: 0.2}) == []
    known = {low: 0.3, mid: 0.2, high: 0.1}
    for k in range(WIDER):
        (lr,) = asked(known)
        assert lr == pytest.approx(low / 2 ** (k + 1))
        known[lr] = 0.4 + k / 10
    assert asked(known) == []  # grown enough: the page names it
    assert asked({low: 0.1, mid: 0.2, high: 0.3}) == [2 * high]


def test_later_tiers_tune_their_leading_arms_with_all_that_they_have():
    from experiments.scales.manifest import LONG, rate_runs, tuning

    assert tuning("lean+small") == tuning("d3") == ("g", 0.25)
    assert tuning("paper") == ("paper", 0.5)
    assert tuning("lean+small @16") == ("lean+small @16", 1.0)
    assert tuning("g @16") == ("g @16", 0.25)
    assert tuning("lean+small", LONG) == tuning("lean+small", 4 * LONG) == ("lean+small", LONG)
    assert tuning("line small", LONG) == ("single", LONG)
    assert tuning("paper", LONG) == ("paper", 0.5)
    assert tuning("d3+small", net="depthwise") == ("d3+small", 1.0)
    assert tuning("d1", net="depthwise") == ("g", 0.25)
    asked = rate_runs("cifar10", "residual", *tuning("d3+small", LONG), {})
    assert {(run.arm, run.budget, run.tested) for run in asked} == {("d3+small", LONG, False)}
    assert [run.lr for run in asked] == [0.025, 0.05]

    def then(known):
        return [run.lr for run in rate_runs("cifar10", "residual", "d3+small", LONG, known)]

    assert then({0.00625: 0.5, 0.025: 0.7, 0.05: 0.6}) == []  # as it was tried below the grid
    assert then({0.025: 0.6, 0.05: 0.7}) == [0.1]


def test_every_comparison_names_arms_and_no_run_comes_twice():
    from experiments.scales.arms import ARMS, PAIRS, READINGS
    from experiments.scales.manifest import manifest
    from experiments.scales.tables import LABELS

    assert {label for pair in PAIRS for label in pair} <= set(LABELS)
    assert {how for arm in ARMS.values() for how in arm.readings.values()} <= set(READINGS)
    keys = [run.key for run in manifest()]
    assert len(keys) == len(set(keys))


def test_the_manifest_holds_what_the_protocol_asks():
    from experiments.scales.manifest import CUT, CUTS, DESIGN, manifest

    runs = [run for run in manifest() if run.budget == 1 and run.lr is None]

    def seeds(task, net, arm, cut=CUT):
        where = (task, net, arm, cut)
        return {run.seed for run in runs if (run.task, run.net, run.arm, run.cut) == where}

    arms = ("single", "c1", "c2", "d1", "d2", "d3", "g", "paper", "lean", DESIGN, "own+small",
            "c2+small", "own, full", "paper, free", "line small", "line middle")  # fmt: skip
    for net in ("residual", "depthwise"):
        assert all(0 in seeds("glyphs", net, arm) for arm in arms)
    leading = (DESIGN, "d3+small", "g+small", "single", "c2", "paper")
    assert all(len(seeds("glyphs", "residual", arm)) >= 5 for arm in leading)
    rest = ("c1", "d1", "d2", "d3", "g", "own+small", "c2+small")
    assert all(len(seeds("glyphs", "residual", arm)) >= 3 for arm in rest)
    for net, task in (("residual", "cifar10"), ("depthwise", "glyphs"), ("residual", "glyphs")):
        assert all(len(seeds(task, net, arm)) >= 3 for arm in leading)
        assert all(len(seeds(task, net, DESIGN, cut)) >= 3 for cut in CUTS[net])
