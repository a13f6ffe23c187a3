"""The experiment on scales in known numbers: intervals, regrets, verdicts, tiers."""

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.usefixtures("at_the_root")


def test_intervals_and_holm_against_scipy():
    from experiments.scales.stats import holm, interval

    rng = np.random.default_rng(0)
    diffs = rng.normal(0.01, 0.02, 5)
    got = interval(diffs, [0.0] * 5, 1000)
    want = stats.ttest_1samp(diffs, 0)
    assert (got.low, got.high) == pytest.approx(tuple(want.confidence_interval(0.95)))
    assert got.p == pytest.approx(want.pvalue)

    image = rng.choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.7, 0.2])
    got = interval([image.mean()], [image.var(ddof=1)], 400)
    want = stats.ttest_1samp(image, 0)
    assert (got.low, got.high) == pytest.approx(tuple(want.confidence_interval(0.95)))

    both = interval(diffs, [0.1] * 5, 400)  # images add to what the seeds say
    assert both.high - both.low > (1.96 * 2) * (0.1 / 400 + np.var(diffs, ddof=1) / 5) ** 0.5
    assert interval([0.0, 0.0], [0.0, 0.0], 9) == (0, 0, 0, 1, 2)

    ps = [0.01, 0.04, 0.03, 0.005]
    assert holm(ps) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_intervals_cover():
    from experiments.scales.stats import interval

    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):  # images that all seeds share, and seeds
        shared = rng.normal(0, 1, 200)
        seeds = [shared + rng.normal(0, 1, 200) + rng.normal(0, 0.1) for _ in range(3)]
        got = interval([x.mean() for x in seeds], [x.var(ddof=1) for x in seeds], 200)
        hits += got.low <= 0 <= got.high
    assert hits >= 0.93 * 400


def test_regret_is_measured_on_the_seeds_that_did_not_choose():
    import pandas as pd

    from experiments.scales.split import regrets

    top1 = {0: {"stem": 70.0, "layer1": 72.0}, 1: {"stem": 71.0, "layer1": 70.5}}
    cuts = pd.DataFrame([
        {"task": "t", "net": "n", "seed": s, "cut": c, "top1": x}
        for s, row in top1.items() for c, x in row.items()
    ])  # fmt: skip
    said = pd.DataFrame([
        {"task": "t", "net": "n", "seed": s, "rule": "r", "layer": c, "score": x, "place": p}
        for s in (0, 1) for c, x, p in (("stem", 0.9, 1), ("layer1", 0.8, 2))
    ])  # fmt: skip
    table = regrets(cuts.assign(net="residual"), said.assign(net="residual")).set_index("rule")
    row = table.loc["r"]
    # seed 0: seed 1 prefers the stem, as the rule does; seed 1: seed 0 prefers layer1
    assert row["regret"] == pytest.approx((0.0 + (70.5 - 71.0)) / 2)
    assert table.loc["always stem", "regret"] == row["regret"]
    assert table.loc["always layer1", "regret"] == pytest.approx(((70.0 - 72.0) + 0.0) / 2)
    assert "always layer2" not in table.index  # not trained


def test_a_cut_that_few_seeds_have_does_not_hide_the_others():
    import pandas as pd

    from experiments.scales.split import regrets

    rows = [("layer1", s, 90.0 + s) for s in range(3)] + [("layer2", s, 91.0) for s in range(3)]
    cuts = pd.DataFrame([
        {"task": "t", "net": "residual", "seed": s, "cut": c, "top1": x}
        for c, s, x in [*rows, ("stem", 0, 99.0)]
    ])  # fmt: skip
    said = pd.DataFrame(columns=["task", "net", "seed", "rule", "layer", "score", "place"])
    table = regrets(cuts, said).set_index("rule")
    assert table["seeds"].tolist() == [3, 3]
    assert list(table.index) == ["always layer1", "always layer2"]


def _pairs(cut, arm, other, diff):
    """Differences in points at two sizes and in the mean, of two seeds that agree."""
    return [
        {"task": "glyphs", "net": "residual", "cut": cut, "budget": 1.0, "seed": s, "arm": arm,
         "other": other, "view": v, "n": 10_000, "diff": diff / 100, "image_var": 1e-4}
        for s in (0, 1) for v in ("8", "56", "mean")
    ]  # fmt: skip


def test_the_design_is_judged_at_every_cut_and_half_the_batch_beside_the_whole():
    import pandas as pd

    from experiments.scales import tables

    lean, d3 = "lean+small, served", "d3+small, served"
    pairs = pd.DataFrame([
        *_pairs("layer1", lean, d3, 0.5), *_pairs("layer2", lean, d3, 1.2),
        *_pairs("layer2", lean, "a", -0.2), *_pairs("layer2", lean + " @16", lean, 0.3),
    ])  # fmt: skip
    runs = pd.DataFrame([
        {"task": "glyphs", "net": "residual", "cut": cut, "budget": 1.0, "seed": 0, "split": "test",
         "arm": arm, "view": v, "top1": 0.9, "mmacs": macs}
        for cut, arm, macs in (
            ("layer1", lean, 1.0), ("layer2", lean, 1.5), ("layer1", "paper", 2.0)
        )
        for v in ("8", "56")
    ])  # fmt: skip
    cuts = ("stem", "layer1", "layer2")
    table = tables.verdicts(runs, pairs, "glyphs", "residual", cuts).set_index("criterion")
    point = table.loc["mean over sizes at least +1.0 over d3+small, served"]
    assert [text.split(":")[0] for text in point] == ["no", "yes"]
    assert list(table.columns) == ["layer1", "layer2"]
    macs = table.loc["mean MACs at most 0.65 of paper's"]
    assert macs.tolist() == ["yes: 0.500", "no: 0.750"]
    full = table.loc["within 0.5 of (a) at 56 px, equal MACs"]
    assert full.tolist()[0] == ""
    assert full.tolist()[1].startswith("yes: -0.20 ")
    (row,) = tables.halved(pairs).to_dict("records")
    assert (row["cut"], row["arm"], row["other"]) == ("layer2", lean + " @16", lean)
    assert row["smallest size"].startswith("+0.30 ")


def test_a_tier_reads_as_the_first_and_mixes_with_none():
    import pandas as pd

    from experiments.scales.arms import ARMS, HALF
    from experiments.scales.tiers import TIERS, under

    names = [("lean", 1.0), ("lean @16", 1.0), ("lean", 4.0), ("paper", 1.0), ("single", 2.0)]
    runs = pd.DataFrame([
        {"run": name, "arm": f"{name.removesuffix(HALF)}, served{HALF * name.endswith(HALF)}",
         "budget": budget, "top1": k} for k, (name, budget) in enumerate(names)
    ])  # fmt: skip
    found = {ending: under(runs, tier) for ending, tier in TIERS.items()}
    assert {e: t["top1"].tolist() for e, t in found.items()} == {
        "": [0, 3], "-half": [1], "-long": [2]
    }  # fmt: skip
    for table in found.values():
        assert set(table["arm"]) <= {"lean, served", "paper, served"}
        assert set(table["budget"]) == {1.0}
    pairs = pd.DataFrame([
        {"budget": 1.0, "arm": arm, "other": other}
        for arm, other in (("lean", "d3"), ("lean @16", "d3 @16"), ("lean @16", "lean"))
    ])  # fmt: skip
    assert len(under(pairs, TIERS[""])) == len(under(pairs, TIERS["-half"])) == 1
    half, whole = ARMS["lean+small" + HALF], ARMS["lean+small"]
    assert (2 * half.batch, half.choices) == (whole.batch, whole.choices)
    assert half.rate_of in ARMS


def test_the_reference_line_is_shown_at_its_own_size_and_every_budget():
    import pandas as pd

    from experiments.scales.tables import flatness

    rows = [("single", "a", 1, "8", 0.1), ("single", "a", 1, "56", 0.9),
            ("single", "a", 16, "8", 0.2), ("single", "a", 16, "56", 0.95),
            ("single", "b", 16, "56", 0.5), ("line small", "line small", 1, "8", 0.7),
            ("lean", "lean", 1, "56", 0.6)]  # fmt: skip
    runs = pd.DataFrame([
        {"task": "t", "net": "n", "cut": "layer1", "split": "test", "run": run, "arm": arm,
         "budget": float(budget), "view": view, "top1": top1, "key": f"{run} {budget}"}
        for run, arm, budget, view, top1 in rows
    ])  # fmt: skip
    got = flatness(runs).set_index("view")
    assert got.loc["56", ["budget x1", "budget x16"]].tolist() == [90.0, 95.0]
    assert got.loc["8", "budget x1"] == 70.0
    assert set(got.index) == {"8", "56"}
    assert np.isnan(got.loc["8", "budget x16"])


def test_a_glance_tells_tiers_cuts_and_seeds_apart():
    import pandas as pd

    from experiments.scales.glance import glance

    lean = "lean+small, served"
    said = [(lean, "layer1", 1, 0, 0.5), (lean, "layer1", 1, 1, 0.7), (lean, "layer2", 1, 0, 0.8),
            (f"{lean} @16", "layer1", 1, 0, 0.9), ("a", "layer1", 4, 0, 0.4)]  # fmt: skip
    runs = pd.DataFrame([
        {"task": "t", "net": "n", "cut": cut, "split": "test", "run": arm, "arm": arm, "seed": seed,
         "budget": float(budget), "view": view, "top1": top1 + shift, "mmacs": 2.0}
        for arm, cut, budget, seed, top1 in said for view, shift in (("8", -0.1), ("56", 0.1))
    ])  # fmt: skip
    got = glance(runs).set_index("")
    assert got.loc["`lean`, cut after layer1"].to_dict() == {
        "t, n": "60.0 / 2.00 / 2", "t, n, half the batch": "90.0 / 2.00 / 1",
        "t, n, budget x4": "",
    }  # fmt: skip
    assert got.loc["`lean`, cut after layer2", "t, n"] == "80.0 / 2.00 / 1"
    assert got.loc["one scale, enlarged (a)", "t, n, budget x4"] == "40.0 / 2.00 / 1"
    assert len(got) == 3


def test_rates_are_told_by_trials_and_by_the_tested_run_of_the_same_budget():
    import pandas as pd

    from experiments.scales.tables import rates_table

    rows = [("x_lr0.1", 0, 1, 0.1, "g", 0.6), ("x", 0, 1, 0.2, "g", 0.7),
            ("y", 1, 1, 0.2, "g", 0.3), ("z", 0, 4, 0.2, "g", 0.1),
            ("x", 0, 1, 0.2, "g, fed", 0.1)]  # fmt: skip
    runs = pd.DataFrame([
        {"task": "t", "net": "n", "cut": "layer1", "split": "val", "run": "g", "arm": arm,
         "seed": seed, "budget": float(budget), "lr": lr, "top1": top1 + shift, "key": key}
        for key, seed, budget, lr, arm, top1 in rows for shift in (-0.1, 0.1)
    ])  # fmt: skip
    got = rates_table(runs)[["lr", "top1", "all seeds", "seeds"]].to_numpy().tolist()
    assert got == [[0.1, 60.0, 60.0, 1], [0.2, 70.0, 50.0, 2]]


def test_accuracy_by_cut_counts_a_seed_once_however_many_rates_it_tried():
    import pandas as pd

    from experiments.scales.split import by_cut

    base = {"task": "t", "net": "n", "cut": "layer1", "budget": 1.0, "run": "lean+small"}
    runs = pd.DataFrame([
        {**base, "seed": seed, "arm": "lean+small, served", "split": "test", "view": view,
         "top1": top1, "mmacs": 1.0, "key": f"s{seed}"}
        for seed, top1 in ((0, 0.5), (1, 0.9)) for view in ("8", "56")
    ])  # fmt: skip
    trainings = pd.DataFrame([
        {**base, "seed": seed, "params": 9, "key": key}
        for seed, key in ((0, "s0"), (0, "s0_lr0.1"), (0, "s0_lr0.2"), (1, "s1"))
    ])  # fmt: skip
    assert sorted(by_cut(runs, trainings)["top1"]) == [50.0, 90.0]
