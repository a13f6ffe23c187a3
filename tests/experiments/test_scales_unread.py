"""Further test images, on which nobody looked at a result while the design changed."""

import csv
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("at_the_root")


def test_they_are_other_images_of_the_same_faces(tmp_path, monkeypatch):
    from experiments.scales import tasks

    drawn = []
    draw = tasks.glyphs.draw
    monkeypatch.setattr(tasks.glyphs, "draw",
                        lambda rows, faces, **how: drawn.append((rows, faces)) or
                        draw(rows, faces, **how))  # fmt: skip
    task = tasks.small(tasks.TASKS["glyphs"], (62, 62, 62), (56,))
    assert task.unread == 62
    test, unread = (tasks.held(task, split, tmp_path) for split in ("test", "unread"))
    assert drawn == [(range(62), "test"), (range(62, 124), "test")]
    assert len(unread) == 62
    assert not (test.images == unread.images).flatten(1).all(1).any()
    assert test.labels.equal(torch.arange(62))
    assert sorted(unread.labels.tolist()) == test.labels.tolist()
    whole = tasks.TASKS["glyphs"]
    assert whole.images[2] + whole.unread == 30_000  # what the protocol asks


def test_a_network_reads_them_once_and_is_compared_there(tmp_path):
    from experiments.scales.__main__ import reread
    from experiments.scales.execute import Bench
    from experiments.scales.ledger import Ledger
    from experiments.scales.manifest import Run
    from experiments.scales.tasks import TASKS, small

    said = []
    tiny = {"glyphs": small(TASKS["glyphs"], (128, 64, 62), (44, 56))}
    bench = Bench(tmp_path, Ledger(tmp_path / "results"), tiny, unit=256, say=said.append)
    runs = [Run("glyphs", "residual", arm, 0, lr=0.1) for arm in ("lean+small", "single")]
    for run in runs:
        bench.execute(run)
    before = [path.read_text() for path in bench.ledger.paths("runs")]
    lost = Run("glyphs", "residual", "g+small", 0)
    reread(bench, [lost, *runs])
    assert said[-3] == f"{lost.key}: its network is not here"
    rows, pairs = bench.ledger.read("unread"), bench.ledger.read("unread-pairs")
    assert set(zip(rows["key"], rows["arm"], strict=True)) == {
        (runs[0].key, "lean+small, served"), (runs[1].key, "a")}  # fmt: skip
    assert set(rows["split"]) == {"unread"}
    assert set(rows["view"]) == {"44", "56", "mixed"}
    assert set(zip(pairs["arm"], pairs["other"], strict=True)) == {("lean+small, served", "a")}
    top1 = rows.set_index(["arm", "view"])["top1"]
    found = pairs.set_index("view")["diff"]
    assert found["56"] == pytest.approx(
        top1["lean+small, served", "56"] - top1["a", "56"], abs=1e-5
    )
    reread(bench, runs)  # once
    assert len(bench.ledger.read("unread")) == len(rows)
    assert len(bench.ledger.read("unread-pairs")) == len(pairs)
    assert [path.read_text() for path in bench.ledger.paths("runs")] == before


def test_the_verdict_is_read_with_all_its_seeds_and_rivals():
    from experiments.scales.manifest import manifest, unread

    runs = unread()
    assert len({run.key for run in runs}) == len(runs)
    assert {run.key for run in runs} <= {run.key for run in manifest()}
    for cut in ("layer1", "layer2", "layer3"):
        mine = {run.seed for run in runs if run.arm == "lean+small @16" and run.cut == cut}
        assert mine == set(range(5))
    for arm in ("d3+small @16", "g+small @16", "single @16", "single, lean's steps @16"):
        assert {run.seed for run in runs if run.arm == arm} == set(range(5))


def test_what_is_in_the_ledger_is_what_the_code_would_run_today():
    """An arm that is built otherwise than when it ran has another number of steps."""
    from experiments.scales.execute import steps_of
    from experiments.scales.manifest import Run
    from experiments.scales.tasks import TASKS

    with Path("experiments/scales/results/trainings.csv").open(newline="") as file:
        rows = {(r["task"], r["net"], r["run"], r["cut"], r["budget"]): int(r["steps"])
                for r in csv.DictReader(file)}  # fmt: skip
    assert len(rows) > 50
    for (task, net, arm, cut, budget), steps in rows.items():
        run = Run(task, net, arm, 0, float(budget), cut)
        assert steps_of(run, TASKS[task]) == steps, run.key


def test_both_sets_stand_side_by_side():
    import pandas as pd

    from experiments.scales.unread import table

    def pairs(diffs, other="d3+small, served @16"):
        at = {"task": "glyphs", "net": "residual", "cut": "layer2", "budget": 1.0, "n": 100,
              "arm": "lean+small, served @16", "other": other, "image_var": 0.0}  # fmt: skip
        return pd.DataFrame([{**at, "seed": seed, "view": view, "diff": diff}
                             for view in ("8", "56", "mean", "mixed")
                             for seed, diff in enumerate(diffs[view == "mixed"])])  # fmt: skip

    read = pairs(([0.01, 0.03], [0.02, 0.02]))
    new = pairs(([0.03, 0.03, 0.03], [-0.01, -0.01, -0.01]))
    found = table(read, new).set_index("other")
    row = found.loc["d3+small, served @16"]
    assert row["mean"].startswith("+2.00 [-10")  # t of one degree of freedom
    assert row["mean, unread"] == "+3.00 [+3.00, +3.00]"
    assert (row["mixed"], row["mixed, unread"]) == (
        "+2.00 [+2.00, +2.00]", "-1.00 [-1.00, -1.00]")  # fmt: skip
    assert row["56 px, unread"] == row["mean, unread"]
    assert row["seeds"] == 3
    assert (found.loc["g+small, served @16", ["mean", "mean, unread"]] == "").all()
