"""The experiment on scales in small: it stops, goes on, counts its MACs and draws from its CSVs."""

import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from msun.descent import Descent


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath))


def bench(folder, results="results"):
    from experiments.scales.execute import Bench
    from experiments.scales.ledger import Ledger
    from experiments.scales.tasks import TASKS, small

    tasks = {"glyphs": small(TASKS["glyphs"], (128, 64, 64), (44, 50, 56))}
    return Bench(folder, Ledger(folder / results), tasks, unit=256, say=lambda text: None)


def short(arm, lr=0.1):
    from experiments.scales.manifest import Run

    return Run("glyphs", "residual", arm, 0, lr=lr)


def test_a_killed_run_goes_on_and_everything_is_drawn_from_the_tables(tmp_path, monkeypatch):
    from experiments.scales.draw import draw

    whole = bench(tmp_path / "whole")
    for arm in ("lean", "lean+small", "single"):
        whole.execute(short(arm))

    killed, descend = bench(tmp_path / "killed"), Descent.descend

    def until_the_second_epoch(self, *args):
        if self.step == 5:
            raise KeyboardInterrupt
        return descend(self, *args)

    monkeypatch.setattr(Descent, "descend", until_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        killed.execute(short("single"))
    assert killed.ledger.done() == set()
    monkeypatch.setattr(Descent, "descend", descend)
    killed.execute(short("single"))
    a, b = (x.ledger.read("runs").query("run == 'single'") for x in (killed, whole))
    assert a["top1"].tolist() == b["top1"].tolist()
    weights = [
        torch.load(x.work / "runs" / short("single").key / "model.pt", weights_only=True)["state"]
        for x in (killed, whole)
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())

    shutil.rmtree(tmp_path / "whole" / "runs")  # the tables are enough from here on
    before = whole.ledger.path("runs").read_text()
    whole.execute(short("lean"))
    assert whole.ledger.path("runs").read_text() == before
    page = tmp_path / "README.md"
    names = ("main glyphs-residual", "verdict glyphs-residual")
    page.write_text("".join(f"<!-- {n} -->\nold\n<!-- end {n} -->\n" for n in names))
    for _ in range(2):  # what is drawn twice is the same
        draw(whole.ledger, tmp_path)
        text = page.read_text()
        assert "old" not in text
        assert "| lean | " in text
        assert "| lean+small, served | " in text
        assert "within 0.5 of (a) at 56 px" in text
    drawn = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"glyphs-residual-accuracy.png", "glyphs-residual-pareto.png"} <= drawn


def test_every_arm_gets_the_same_macs_counted_on_its_forwards():
    from experiments.scales.arms import ARMS, made
    from experiments.scales.execute import steps_of
    from experiments.scales.manifest import UNIT, Run
    from experiments.scales.tasks import TASKS

    task = TASKS["glyphs"]
    spent = {}
    for name in (
        "single",
        "lean",
        "paper",
        "c1",
        "d3",
        "line small",
        "single, lean's steps",
        "lean @16",
        "paper @16",
    ):
        arm = ARMS[name]
        net = made(arm, task, "residual", at="layer1", seed=0).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for side in net.scales:
                net.step(torch.zeros(1, 1, side, side), side)
        run = Run("glyphs", "residual", name, 0)
        spent[name] = steps_of(run, task) * arm.batch * counter.get_total_flops() / 2
    equal = [macs for name, macs in spent.items() if not ARMS[name].paces]
    assert max(equal) / min(equal) < 1.001
    assert equal[0] == pytest.approx(UNIT * 2.64e6, rel=1e-3)
    assert spent["single, lean's steps"] < 0.7 * spent["single"]


def test_macs_of_a_step_on_drawn_sizes_are_those_of_the_draws():
    from experiments.scales.arms import ARMS, made
    from experiments.scales.tasks import TASKS
    from msun.between import step_macs
    from msun.crops import Augment, Crops
    from msun.data import open_labelled
    from msun.policy import is_native, served

    data = open_labelled((torch.rand(2000, 1, 8, 8), torch.zeros(2000, dtype=torch.int64)))
    whole = Augment(area=(1, 1), ratio=(1, 1), flip=False)
    for name in ("lean+small", "lean+native", "d3+small", "lean+between"):
        net = made(ARMS[name], TASKS["glyphs"], "residual", at="layer1", seed=0)
        ranges = tuple(served(net.scales, net.policy.routing).values())
        native = tuple(s for s in net.scales if is_native(net.policy, s, net.reference))
        crops = Crops(data, net.scales, whole, None, None, 0, ranges, 0.5, native)
        drawn = [
            sum(net.plan(x.shape[-1], scale=s).macs for s, x in looks.items())
            for looks, _ in crops.batches([[k] for k in range(2000)])
        ]
        assert np.mean(drawn) == pytest.approx(step_macs(net, 0.5), rel=0.01)
        if not native:
            assert len(set(drawn)) == 1


def test_a_rate_is_chosen_inside_its_grid_or_the_grid_grows():
    from experiments.scales.arms import ARMS
    from experiments.scales.manifest import WIDER, rate_runs, rates

    def asked(known):
        return [run.lr for run in rate_runs("glyphs", "residual", "g", known)]

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


def test_two_processes_share_the_runs_and_neither_loses_a_row(tmp_path):
    import multiprocessing

    from experiments.scales.ledger import Ledger

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_add, [(str(tmp_path), k) for k in (0, 1)])
    frame = Ledger(tmp_path).read("runs")
    assert sorted(frame["key"]) == sorted(f"{k}-{i}" for k in (0, 1) for i in range(40))


def _add(folder, k):
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from experiments.scales.ledger import Ledger

    for i in range(40):
        Ledger(pathlib.Path(folder)).add("runs", [{"key": f"{k}-{i}", "view": "8"}])


def test_what_is_in_hand_elsewhere_is_left_alone_and_rates_come_first(tmp_path, monkeypatch):
    from filelock import FileLock

    from experiments.scales.__main__ import work_through
    from experiments.scales.manifest import Run

    here, done = bench(tmp_path), []
    monkeypatch.setattr(
        here, "execute", lambda run: (done.append(run.key), here.ledger.add("runs", _rows(run)))
    )
    runs = [Run("glyphs", "residual", arm, 0) for arm in ("single", "d3")]
    (tmp_path / "claims").mkdir()
    other = FileLock(tmp_path / "claims" / runs[0].key)
    monkeypatch.setattr("time.sleep", lambda s: other.release())  # ... and free then
    with other:
        work_through(here, runs, pause_s=0)
    assert done[-1] == runs[0].key
    assert done.index(runs[1].key) == len(done) - 2
    rates = [key for key in done if "_lr" in key]
    assert len(rates) == len(done) - 2 >= 6
    work_through(here, runs, pause_s=0)
    assert len(done) == len(rates) + 2
    (tmp_path / "stop").touch()
    work_through(here, [Run("glyphs", "residual", "c2", 0)], pause_s=0)
    assert len(done) == len(rates) + 2


def _rows(run):
    """Rows as of a run; the middle rate is best."""
    best = {0.05: 0.9, 0.15: 0.9}.get(run.lr, 0.5)
    return [
        {"task": run.task, "net": run.net, "run": run.arm, "seed": run.seed, "budget": run.budget,
         "lr": run.lr or 0.05, "split": "val", "view": "8", "arm": label, "top1": best,
         "key": run.key}
        for label in run.readings
    ]  # fmt: skip


def test_every_comparison_names_arms_and_no_run_comes_twice():
    from experiments.scales.arms import ARMS, PAIRS, READINGS
    from experiments.scales.manifest import manifest
    from experiments.scales.tables import LABELS

    assert {label for pair in PAIRS for label in pair} <= set(LABELS)
    assert {how for arm in ARMS.values() for how in arm.readings.values()} <= set(READINGS)
    keys = [run.key for run in manifest()]
    assert len(keys) == len(set(keys))


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


def test_latency_is_a_ratio_to_enlarging_everything():
    import pandas as pd

    from experiments.scales.latency import TIMED, table, timed

    rows = pd.DataFrame(timed("glyphs", "residual", turns=1))
    assert len(rows) == 3 * len(TIMED)
    own = rows[rows["arm"] == "a"]
    assert set(own["ratio"]) == {1.0}
    assert (rows["ms_64"] > 0).all()
    assert list(table(rows).columns) == ["task", "net", "arm", "8 px", "32 px", "56 px"]


def test_gradients_of_one_scale_twice_are_parallel(monkeypatch):
    from experiments.scales import why
    from experiments.scales.arms import ARMS, made
    from experiments.scales.tasks import TASKS, Held

    torch.manual_seed(0)
    images = Held(torch.randint(0, 256, (64, 1, 56, 56), dtype=torch.uint8),
                  torch.arange(64) % 62, "noise", 62)  # fmt: skip
    net = made(ARMS["c2"], TASKS["glyphs"], "residual", at="layer1", seed=0)
    rows = why.inside(net, images, images, batches=2)
    assert [(r["scale"], r["other"]) for r in rows] == [(8, 32), (8, 56), (32, 56)]
    assert all(-1 <= r["cosine"] <= 1 for r in rows)
    assert [r["cka"] == r["cka"] for r in rows] == [False, True, True]
    x, y = images.stacked(range(32))
    shared = list(net.tail.parameters())
    a, b = (why._gradient(net, x, y, 56, shared) for _ in range(2))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) == pytest.approx(1, abs=1e-5)
    assert len(a) == sum(p.numel() for p in shared)


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
