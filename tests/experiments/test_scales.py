"""The experiment on scales in small: it stops, goes on, counts its MACs and draws from its CSVs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msun.training.step import TrainingStep

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("at_the_root")


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

    killed, descend = bench(tmp_path / "killed"), TrainingStep.run

    def until_the_second_epoch(self, *args):
        if self.step == 5:
            raise KeyboardInterrupt
        return descend(self, *args)

    monkeypatch.setattr(TrainingStep, "run", until_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        killed.execute(short("single"))
    assert killed.ledger.done() == set()
    monkeypatch.setattr(TrainingStep, "run", descend)
    killed.execute(short("single"))
    a, b = (x.ledger.read("runs").query("run == 'single'") for x in (killed, whole))
    assert a["top1"].tolist() == b["top1"].tolist()
    weights = [
        torch.load(x.work / "runs" / short("single").key / "model.pt", weights_only=True)["state"]
        for x in (killed, whole)
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())

    shutil.rmtree(tmp_path / "whole" / "runs")  # the tables are enough from here on
    before = [path.read_text() for path in whole.ledger.paths("runs")]
    whole.execute(short("lean"))
    assert [path.read_text() for path in whole.ledger.paths("runs")] == before
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
    from experiments.scales.manifest import Run
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
        "g @16",
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
    assert equal[0] == pytest.approx(task.unit * 2.64e6, rel=1e-3)
    assert spent["single, lean's steps"] < 0.7 * spent["single"]


def test_macs_of_a_step_on_drawn_sizes_are_those_of_the_draws():
    from experiments.scales.arms import ARMS, made
    from experiments.scales.tasks import TASKS
    from msun.data.crops import Augment, Crops
    from msun.data.labelled import open_labelled
    from msun.network.policy import is_native, served_sides
    from msun.training.size_sampling import step_macs

    data = open_labelled((torch.rand(2000, 1, 8, 8), torch.zeros(2000, dtype=torch.int64)))
    whole = Augment(area=(1, 1), ratio=(1, 1), flip=False)
    for name in ("lean+small", "lean+native", "d3+small", "lean+between"):
        net = made(ARMS[name], TASKS["glyphs"], "residual", at="layer1", seed=0)
        ranges = tuple(served_sides(net.scales, net.policy.routing).values())
        native = tuple(s for s in net.scales if is_native(net.policy, s, net.reference))
        crops = Crops(data, net.scales, whole, None, None, 0, ranges, 0.5, native)
        drawn = [
            sum(net.plan(x.shape[-1], scale=s).macs for s, x in looks.items())
            for looks, _ in crops.batches([[k] for k in range(2000)])
        ]
        assert np.mean(drawn) == pytest.approx(step_macs(net, 0.5), rel=0.01)
        if not native:
            assert len(set(drawn)) == 1


def test_a_network_that_chose_its_rate_is_not_trained_again(tmp_path, monkeypatch):
    from dataclasses import replace

    import experiments.scales.manifest as plan
    from experiments.scales.manifest import Run

    one = replace(plan.TASKS["glyphs"], rates=(0.3,))  # of three scales: .1, which is an end
    monkeypatch.setitem(plan.TASKS, "glyphs", one)
    monkeypatch.setattr(plan, "WIDER", 0)
    here, run = bench(tmp_path), Run("glyphs", "residual", "lean+small @16", 0, tested=False)
    (trial,) = here.needs(run)
    here.execute(trial)
    assert trial == replace(run, lr=0.05)
    monkeypatch.setattr("experiments.scales.execute.train", None)  # no training from here on
    here.execute(run)
    runs = here.ledger.read("runs").set_index("key")["top1"]
    assert runs[run.key].tolist() == runs[trial.key].tolist()
    spent = here.ledger.read("trainings").set_index("key")["core_s"]
    assert spent[run.key] == spent[trial.key]


def test_a_rate_is_read_off_runs_of_its_family_budget_seed_and_the_usual_cut(tmp_path):
    from dataclasses import replace

    from experiments.scales.manifest import LONG, Run

    here = bench(tmp_path)
    run = Run("cifar10", "residual", "lean+small", 0, LONG)
    said = [(replace(run, lr=0.025), 0.6), (replace(run, lr=0.0125), 0.5), (run, 0.7),
            (replace(run, cut="layer2", lr=0.1), 0.9), (replace(run, budget=1.0, lr=0.2), 0.9),
            (replace(run, seed=1, lr=0.3), 0.9), (replace(run, arm="g+small", lr=0.4), 0.9),
            (replace(run, net="depthwise", lr=0.5), 0.9)]  # fmt: skip
    for one, top1 in said:
        rows = [{**row, "top1": top1} for row in _rows(one)]  # without a rate it had .05
        here.ledger.add("runs", rows)
    assert here.needs(run)[0].lr == 0.1
    here.ledger.add("runs", [{**row, "top1": 0.6} for row in _rows(replace(run, lr=0.1))])
    assert here.rate(run) == here.rate(replace(run, seed=2, cut="layer2")) == 0.05


def test_two_processes_share_the_runs_and_neither_loses_a_row(tmp_path):
    from experiments.scales.ledger import Ledger

    code = (
        "import sys; from pathlib import Path; from experiments.scales.ledger import Ledger\n"
        "for i in range(40):\n"
        "    row = {'key': f'{sys.argv[2]}-{i}', 'view': '8'}\n"
        "    Ledger(Path(sys.argv[1])).add('runs', [row])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(k)], cwd=ROOT)
        for k in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    frame = Ledger(tmp_path).read("runs")
    assert sorted(frame["key"]) == sorted(f"{k}-{i}" for k in (0, 1) for i in range(40))


def test_long_tables_are_kept_in_files_that_stay_small(tmp_path):
    from experiments.scales.__main__ import HERE
    from experiments.scales.ledger import Ledger

    ledger = Ledger(tmp_path)
    rows = [{"task": t, "net": "residual", "seed": s, "key": f"{t}{s}", "arm": "a", "view": "8"}
            for s in (1, 0) for t in ("glyphs", "cifar10")]  # fmt: skip
    ledger.add("runs", rows[:3])
    ledger.add("runs", rows[3:])
    names = [path.name for path in ledger.paths("runs")]
    assert names == [f"{t}-residual-{s}.csv" for t in ("cifar10", "glyphs") for s in (0, 1)]
    assert ledger.done() == {(row["key"], "a") for row in rows}
    with pytest.raises(ValueError, match="several files"):
        ledger.rewrite("runs", ledger.read("runs"))
    kept = [path for path in HERE.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in kept) < 1_000_000
    assert len(Ledger(HERE / "results", tmp_path / "lock").paths("runs")) > 5


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
        {"task": run.task, "net": run.net, "cut": run.cut, "run": run.arm, "seed": run.seed,
         "budget": run.budget, "lr": run.lr or 0.05, "split": "val", "view": "8", "arm": label,
         "top1": best, "key": run.key}
        for label in run.readings
    ]  # fmt: skip


def test_a_run_at_another_cut_is_paired_with_rivals_of_its_budget_at_the_usual_one(tmp_path):
    from experiments.scales.execute import predictions
    from experiments.scales.manifest import Run
    from msun.metrics import Predictions

    here = bench(tmp_path)
    right = {("lean+small", "layer1", 1.0): 3, ("lean+small", "layer2", 1.0): 4,
             ("d3+small", "layer1", 1.0): 1, ("lean+small", "layer2", 4.0): 2,
             ("d3+small", "layer1", 4.0): 0, ("lean+small @16", "layer3", 1.0): 4}  # fmt: skip
    for (arm, cut, budget), hits in right.items():
        run = Run("glyphs", "residual", arm, 0, budget, cut)
        ((label, _),) = run.readings.items()
        at = {"task": run.task, "net": run.net, "cut": cut, "budget": budget, "seed": 0, "lr": 1.0}
        seen = {"arm": label, "split": "test", "view": "8", "n": 4, "top1": hits / 4, "mmacs": 1.0}
        here.ledger.add("runs", [{**at, **seen, "run": arm, "key": run.key}])
        rank = np.where(np.arange(4) < hits, 0, 1)[:, None]
        path = predictions(here.work / "runs" / run.key, label, "test")
        path.parent.mkdir(parents=True)
        Predictions(np.array(["8"]), np.zeros(4, int), rank, rank, np.full((4, 1), 8)).save(path)
    here.pair()
    pairs = here.ledger.read("pairs").query("view == '8'")
    assert pairs.set_index(["cut", "budget"])["diff"].to_dict() == {
        ("layer1", 1.0): 0.5, ("layer2", 1.0): 0.75, ("layer2", 4.0): 0.5,
        ("layer3", 1.0): 0.75,
    }  # fmt: skip
    # not with `lean` cut elsewhere, whichever of the two ran first
    assert set(pairs["other"]) == {"d3+small, served"}


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
