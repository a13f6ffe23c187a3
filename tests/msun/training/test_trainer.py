"""Training: what a step does against a slow one by hand, and what a run writes."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import SCALES, backbone, images, network, options, run, same, weights

from msun import evaluate
from msun.network import checkpoint
from msun.network.norms import recalibrate
from msun.training.trainer import train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that learns."""
    data = images(240)
    out = tmp_path_factory.mktemp("train") / "new" / "out"
    model, path = run(out, data=data, epochs=12, dropout=0.0, lr=0.1)
    return model, path


def table(path):
    with (path.parent / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_at_every_scale(done):
    model, path = done
    last = table(path)[-1]
    x, y = images(200, seed=9)
    with torch.no_grad():
        for side in SCALES:
            looks = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            assert (model.eval()(looks).argmax(1) == y).float().mean() > 0.95
            assert float(last[f"top1_{side}"]) > 0.9


def test_metrics_have_a_row_an_epoch(done):
    rows = table(done[1])
    assert list(rows[0]) == [
        "epoch", "step", "lr", "loss", "ce_8", "ce_16", "constraint_8_16", "distill_8",
        "distill_16", "top1_8", "top1_16", "seconds",
    ]  # fmt: skip
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert [int(row["step"]) for row in rows] == [25 * k for k in range(1, 13)]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 1.5
    for row in rows[1:]:
        parts = [float(row[k]) for k in list(row)[4:7]]
        halves = [float(row[k]) / 2 for k in ("distill_8", "distill_16")]
        assert float(row["loss"]) == pytest.approx(sum(parts) + sum(halves), rel=1e-4)
        assert float(row["seconds"]) > 0


def test_the_checkpoint_is_the_network_and_config_repeats_the_run(done):
    model, path = done
    again = checkpoint.load(path, backbone=backbone(seed=5))
    assert same(weights(again), weights(model))
    config = json.loads((path.parent / "config.json").read_text())
    assert config["run"]["lr"] == 0.1
    assert config["run"]["scales"] == list(SCALES)
    assert (config["train_images"], config["val_images"], config["steps"]) == (201, 39, 300)
    assert config["classes"] == again.spec["classes"] == ["0", "1", "2", "3"]
    assert {path.name for path in path.parent.iterdir()} == {
        "model.pt", "metrics.csv", "config.json"
    }  # fmt: skip


def by_hand(model, x, y, steps, *, lr, decay, momentum=0.9, smoothing=0.1, rows=None, teach=True):
    """Steps on the whole batch, written out: no optimiser, no schedule, no groups."""
    speed = {}
    model.train()
    for step in range(steps):
        zs, logits = {}, {}
        for side in model.scales:
            looks = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            logits[side], zs[side] = model.step(looks, side)
        loss = 0
        for out in logits.values():
            out = out if rows is None else out[:, rows]
            log = out.log_softmax(1)
            target = torch.full_like(log, smoothing / log.shape[1])
            target[torch.arange(len(y)), y] += 1 - smoothing
            loss = loss - (target * log).sum(1).mean()
        teacher = zs[model.reference].detach()
        for side in model.scales[:-1] if teach else ():
            a, b = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in (zs[side], teacher))
            grid = [min(m, n) for m, n in zip(a.shape[2:], b.shape[2:], strict=True)]
            a, b = (F.interpolate(z, grid, mode="bilinear", antialias=True) for z in (a, b))
            a, b = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in (a, b))
            loss = loss + (a - b).square().flatten(1).sum(1).mean()
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(named.values()))
        now = lr * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            for (key, p), grad in zip(named.items(), grads, strict=True):
                speed[key] = momentum * speed.get(key, 0) + grad + decay * p
                p -= now * speed[key]
    return weights(model)


PLAIN = {
    "val_share": 0.0, "augment": "none", "warmup": 0.0, "ema": None, "distill": 0.0,
    "weight_decay": 0.01, "max_steps": 3, "between": 0.0,
}  # fmt: skip


def close(a, b, rtol=1e-4):
    assert a.keys() == b.keys()
    for key, x in a.items():
        torch.testing.assert_close(
            x, b[key], rtol=rtol, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_three_steps_equal_those_written_out(tmp_path):
    x, y = images(24)
    got, _ = run(tmp_path / "out", data=(x, y), batch_size=24, dropout=0.0, **PLAIN)
    close(weights(got), by_hand(network(dropout=0.0), x, y, 3, lr=0.05, decay=0.01))


def test_one_scale_is_plain_training(tmp_path):
    """The baseline: the backbone itself, with cross-entropy alone."""
    x, y = images(24)
    model = network((16,), dropout=0.0)
    train(model, (x, y), options(tmp_path / "out", batch_size=24, **PLAIN))
    plain = backbone(dropout=0.0).train()
    speed = {}
    for step in range(3):
        loss = F.cross_entropy(plain(x), y, label_smoothing=0.1)
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for k, (p, grad) in enumerate(zip(plain.parameters(), grads, strict=True)):
                speed[k] = 0.9 * speed.get(k, 0) + grad + 0.01 * p
                p -= 0.05 * (1 + math.cos(math.pi * step / 3)) / 2 * speed[k]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    assert list(table(tmp_path / "out" / "model.pt")[0])[3:-1] == ["loss", "ce_16"]


def test_rows_of_a_larger_head(tmp_path):
    x, y = images(24)
    model = network(dropout=0.0, classes=9)
    train(model, (x, y), options(tmp_path / "out", batch_size=24, rows=[7, 0, 3, 5], **PLAIN))
    want = by_hand(network(dropout=0.0, classes=9), x, y, 3, lr=0.05, decay=0.01, rows=[7, 0, 3, 5])
    close(weights(model), want)
    assert checkpoint.read(tmp_path / "out" / "model.pt")["extra"]["rows"] == [7, 0, 3, 5]
    told = checkpoint.load(tmp_path / "out" / "model.pt", backbone=backbone(dropout=0.0, classes=9))
    how = {"latency": False, "cka": False, "progress": False}
    again = evaluate(told, (x, y), [16], **how)
    pd.testing.assert_frame_equal(again, evaluate(model, (x, y), [16], rows=[7, 0, 3, 5], **how))


def test_frozen_parameters_stay(tmp_path):
    model = network()
    for p in model.subnets.parameters():
        p.requires_grad_(False)
    before = weights(model)
    train(model, images(), options(tmp_path / "out", ema=None, max_steps=2))
    after = weights(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.endswith(("weight", "bias")) for key in changed if "subnets" in key)
    assert any(key.startswith("tail") for key in changed)


def test_shards_are_separate_batches_for_batch_norm(tmp_path):
    """One step on two shards: the mean of two gradients, statistics of the first shard."""
    x, y = images(24)
    more = PLAIN | {"max_steps": 1, "weight_decay": 0.0}
    got, _ = run(tmp_path / "out", data=(x, y), batch_size=24, dropout=0.0, shards=2, **more)
    from msun.data.crops import shuffled

    mixed = torch.from_numpy(shuffled(24, 0, 0))
    halves = [network(dropout=0.0) for _ in range(2)]
    start = weights(halves[0])
    for model, rows in zip(halves, mixed.chunk(2), strict=True):
        by_hand(model, x[rows], y[rows], 1, lr=0.05, decay=0.0)
    first, second = map(weights, halves)
    for key, value in weights(got).items():
        step = (first[key] + second[key]) / 2 if key in dict(got.named_parameters()) else first[key]
        torch.testing.assert_close(value, step, rtol=1e-4, atol=1e-6)
    assert not same(first, start)
    buffers = {key for key, _ in got.named_buffers() if "running_mean" in key}
    assert any(not torch.equal(first[key], second[key]) for key in buffers)


DDP = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from training import run
model, _ = run({out!r}, shards={n}, save_every_s=0.0)
(Path({out!r}).parent / f"spec-{{os.environ['RANK']}}.json").write_text(json.dumps(model.spec))
"""


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one_that_runs_all_shards(tmp_path, n):
    want, path = run(tmp_path / "one", shards=n)
    whole, _ = run(tmp_path / "whole", shards=1)
    assert not same(weights(want), weights(whole)), "shards must matter, or nothing is tested"
    script = tmp_path / "script.py"
    script.write_text(
        DDP.format(here=str(ROOT / "tests" / "helpers"), out=str(tmp_path / "two"), n=n)
    )
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}",
               "--standalone", str(script)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    got = checkpoint.read(tmp_path / "two" / "model.pt")["state"]
    close(got, weights(want), rtol=1e-5)
    lines = [table(tmp_path / name / "model.pt") for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        for key in set(a) - {"seconds"}:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), key
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["processes"] == n
    specs = [json.loads((tmp_path / f"spec-{rank}.json").read_text()) for rank in range(n)]
    assert specs == [json.loads(json.dumps(want.spec))] * n, "known on every process"
    assert config["run"] == json.loads((path.parent / "config.json").read_text())["run"]
    assert "step" not in done.stdout


def test_the_mean_is_what_is_measured_and_kept(tmp_path):
    last, _ = run(tmp_path / "last", ema=None)
    mean, path = run(tmp_path / "mean", ema=0.9)
    assert not same(weights(last), weights(mean))
    x, y = images()
    from cka_probe.inputs.batches import order

    val = sorted(order(48, 0)[:8])
    with torch.no_grad():
        share = (mean.eval()(x[val]).argmax(1) == y[val]).double().mean().item()
    assert float(table(path)[-1]["top1_16"]) == pytest.approx(share)


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    norms = []
    whole = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    run(tmp_path / "free", max_steps=4)
    free, norms[:] = list(norms), []
    run(tmp_path / "clipped", max_steps=4, clip=0.5)
    assert min(free) > 0.5
    assert max(norms) <= 0.5 * (1 + 1e-5)
    assert free[0] > 0.5 >= norms[0] > 0.49


@pytest.mark.parametrize("constraint", ["none", "raw", "cka"])
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_every_constraint_runs(tmp_path, constraint, amp):
    _, path = run(tmp_path / "out", max_steps=2, constraint=constraint, amp=amp)
    names = list(table(path)[0])
    assert ("constraint_8_16" in names) == (constraint != "none")
    assert json.loads((path.parent / "config.json").read_text())["run"]["constraint"] == constraint


def test_the_policy_names_the_constraint(tmp_path):
    _, path = run(tmp_path / "out", max_steps=2, preset="paper")
    assert json.loads((path.parent / "config.json").read_text())["run"]["constraint"] == "raw"


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path):
    seen = set()
    model = network()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, out: seen.add((m.training, out.dtype)))
    train(model, images(), options(tmp_path / "out", max_steps=2, amp="bf16"))
    assert (True, torch.bfloat16) in seen
    assert (False, torch.float32) in seen
    assert {x.dtype for x in model.parameters()} == {torch.float32}


def test_distillation_begins_after_the_warm_up(tmp_path):
    _, path = run(tmp_path / "out", warmup=0.4, epochs=3)  # 15 steps, 6 of them warm-up
    rows = table(path)
    assert rows[0]["distill_8"] == "nan"
    assert float(rows[1]["distill_8"]) > 0
    _, path = run(tmp_path / "other", warmup=0.4, distill_after=0.0)
    assert float(table(path)[0]["distill_8"]) > 0


def test_what_is_kept_as_it_was(tmp_path):
    model = network()
    model.subnets["8"].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    train(model, images(), options(tmp_path / "out", max_steps=2))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_stale_statistics_are_dropped(tmp_path):
    model = network()
    recalibrate(model, [torch.randn(8, 3, 12, 12)], 12)
    assert model.calibrated == ((12, 12),)
    train(model, images(), options(tmp_path / "out", max_steps=2))
    assert model.calibrated == ()


def test_z_is_taken_before_an_in_place_layer(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    from msun.network.builder import build

    model = build(net, "0", SCALES)
    x = torch.randn(8, 3, 16, 16)
    _, z = model.step(x, 16)
    assert (z < 0).any()
    train(model, images(), options(tmp_path / "out", max_steps=2))


def test_z_is_taken_before_a_dropout_that_writes_in_place(tmp_path):
    """It writes in training alone, where an eval run cannot see it."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1), nn.Dropout2d(0.5, inplace=True),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    from msun.network.builder import build

    before = [x.clone() for x in net.buffers()]
    model = build(net, "0", SCALES).train()
    assert all(map(torch.equal, net.buffers(), before))  # looked at in training, not changed
    for side in SCALES:
        logits, z = model.step(torch.randn(8, 3, side, side), side)
        assert (z != 0).all()
        again = model.tail(z)  # and it still drops
        assert not torch.equal(logits, again)
    train(model, images(), options(tmp_path / "out", max_steps=2))


def test_max_steps_stops_within_an_epoch(tmp_path):
    _, path = run(tmp_path / "out", max_steps=7)
    assert [row["step"] for row in table(path)] == ["5", "7"]
    assert float(table(path)[-1]["lr"]) < 0.01, "the schedule spans the steps"


def test_no_validation(tmp_path):
    _, path = run(tmp_path / "out", val_share=0.0, max_steps=2)
    assert not [name for name in table(path)[0] if name.startswith("top1")]
