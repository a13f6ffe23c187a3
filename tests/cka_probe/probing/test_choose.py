"""Memory: what `auto` picks, that a run keeps to its budget, and `exact` from disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cka_probe.engine.spool import Spool
from processes import call
from torch import nn

from cka_probe import probe
from cka_probe.engine.exact import Exact
from cka_probe.engine.kernels import get_kernel
from cka_probe.engine.sketch import own_error
from cka_probe.probing.choose import batch_error, choose

ROOT = Path(__file__).resolve().parents[3]
PEAK = ROOT / "tests" / "helpers" / "peak.py"
MIB = 2**20
SMALL = {"n": 200, "side": 32, "width": 16, "layers": 6, "batch_size": 32}


def measured(estimator, **ask):
    """Peak memory and more of a process of its own (see peak.py)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(PEAK), json.dumps({"estimator": estimator, **ask})],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def pick(memory, *, kernel="linear", widths=(16384,) * 8, n=800, batch=8, **more):
    return choose(widths, n=n, batch=batch, kernel=get_kernel(kernel), memory=memory, **more)


def test_auto_takes_what_comes_closest_and_fits():
    assert pick(2**34).estimator == "exact"
    middle = pick(200 * MIB)
    assert middle.estimator == "sketch"
    assert own_error(middle.size) < batch_error(8)
    assert pick(20 * MIB).estimator == "minibatch"
    assert pick(200 * MIB, batch=64).estimator == "minibatch"  # closer than any sketch
    assert pick(200 * MIB, kernel="rbf").estimator == "minibatch"
    assert pick(200 * MIB, batch=64, size=256).size == 256  # asked for
    assert pick(200 * MIB, batch=64, precision=0.02).estimator == "sketch"
    assert choose(None, n=9, batch=8, kernel=get_kernel("rbf"), memory=9).estimator == "minibatch"
    for choice in (middle, pick(2**34)):
        assert "MiB" in choice.why or "GiB" in choice.why
    with pytest.raises(ValueError, match=r"memory budget too small: 1\.0 MiB: give"):
        pick(MIB)


def test_peak_memory_keeps_to_the_budget():
    """Above that of the bare forwards, whatever is picked, in memory and on disk."""
    bare = measured(None, **SMALL)["peak"]
    held = None
    for estimator, budget in (("auto", 250), ("exact", 40)):
        run = measured(estimator, memory=budget * MIB, **SMALL)
        assert run["peak"] - bare < budget * MIB, (estimator, budget, run)
        held = run["estimator"] if held is None else held
        if estimator == "auto":
            assert run["estimator"] in run["said"][0]
            assert run["estimator_why"] in run["said"][0]
        else:
            assert "of disk" in run["said"][0] or "go to disk" in run["said"][0]
    assert held == "exact"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    """50,000 images: `minibatch` as few do, `sketch` near m n k."""
    ask = {"side": 8, "width": 16, "layers": 10, "batch_size": 64}
    few, many = (measured("minibatch", n=n, **ask)["peak"] for n in (2000, 50_000))
    assert many - few < 24 * MIB
    sketched = measured("sketch", n=50_000, sketch_size=128, **ask)["peak"]
    kept = 10 * 50_000 * 128 * 4
    assert kept * 0.8 < sketched - many < 1.6 * kept + 100 * MIB


def features(n, widths, mean=0.0):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 4, generator=g)
    return [
        z @ torch.randn(4, d, generator=g) + torch.randn(n, d, generator=g) + mean for d in widths
    ]


def fill(estimator, x, bounds, batches):
    for b in batches:
        for i, f in enumerate(x):
            estimator.update(i, f[bounds[b] : bounds[b + 1]])
        estimator.end_batch(b)
    return estimator


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("memory", [30_000_000, 2_500_000])  # Grams in memory, and in a file too
def test_exact_from_disk_is_exact(kernel, mean, memory):
    x, bounds = features(200, [20_000, 3000, 17], mean), [0, 75, 140, 200]
    held = fill(Exact(kernel=kernel), x, bounds, range(3)).compute()
    spooled = fill(Exact(kernel=kernel, n_images=200, memory=memory), x, bounds, [1, 2, 0])
    assert spooled.spool is not None
    result = spooled.compute()
    assert np.abs(result.cka - held.cka).max() < 1e-7
    assert np.abs(result.stderr - held.stderr).max() < 1e-7


def test_exact_from_disk_names_what_is_degenerate():
    x = [*features(40, [30_000, 30_000]), torch.full((40, 30_000), 0.1)]
    result = fill(Exact(n_images=40, memory=4_000_000), x, [0, 40], [0]).compute()
    assert result.constant.tolist() == [False, False, True]
    assert np.isnan(result.cka[2]).all()


def test_no_disk_and_no_known_kernel_are_refused(monkeypatch):
    x = features(40, [30_000])
    with pytest.raises(ValueError, match=r"exact does not fit in memory: .*'<lambda>' cannot"):
        Exact(kernel=lambda a, b: a @ b.T, n_images=40, memory=2_000_000).put("x", x[0])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match=r"exact does not fit in memory: .* of disk, 10 B free"):
        Exact(n_images=40, memory=2_000_000).put("x", x[0])


def test_a_spool_that_was_cut_short_is_said(tmp_path):
    spool = Spool(tmp_path, 64)
    spool.append("x", torch.randn(8, 100))
    spool.name_last("x", 0)
    assert spool.columns("x", 64).shape == (8, 36)
    assert not list(tmp_path.iterdir())  # the file has no name
    spool._file.truncate(100)
    with pytest.raises(OSError, match="cut short"):
        spool.columns("x", 64)


def test_auto_in_a_probe_says_why_and_resumes_as_it_was(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    images = torch.randn(30, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    said = []
    options = {"batch_size": 10, "estimator": "auto", "progress": False}
    report = probe(net, images, [8, 10], out=tmp_path, say=said.append, **options)
    assert report.meta["estimator"] == "exact"
    assert said == [f"auto: exact, as {report.meta['estimator_why']}"]
    exact = probe(net, images, [8, 10], **{**options, "estimator": "exact"})
    assert np.array_equal(report.cka, exact.cka)
    assert (
        probe(net, images, [8, 10], out=tmp_path, resume=True, memory="17MiB", **options) == report
    )


def test_a_card_gives_half_of_what_it_has_free(monkeypatch):
    from cka_probe.engine import memory
    from cka_probe.probing import run as probe_run

    card, other, host = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
    free = {card: 8_000, other: 5_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000)
    assert memory.free_memory([host]) == 20_000
    assert memory.free_memory([host, host], share=2) == 10_000
    assert memory.free_memory([card]) == memory.free_memory([card], share=2) == 5_000
    assert memory.free_memory([card], share=5) == 4_000
    assert memory.free_memory([host, card, other]) == 3_500
    # and a run asks about the devices that its features will be on
    asked = []
    monkeypatch.setattr(
        probe_run, "free_memory", lambda devices, share: asked.append((devices, share)) or 2**30
    )
    call({"images": 8})
    call({"images": 8, "estimator": "auto"})
    assert asked == [([host, host], 1), ([host, host], 1), ([host, host], 2)]
    for bad in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"cannot use device: '{bad}'"):
            call({"images": 8, "device": bad})
    assert asked[3:] == [([torch.device("cuda:99")], 1), ([host, host], 1)]
    call({"images": 8, "memory": "1GiB"})  # what the user says is not asked about
    assert len(asked) == 5


def test_a_card_that_is_not_there_is_no_limit():
    from cka_probe.engine import memory

    missing = torch.device("cuda:99")
    assert memory.free_memory([missing]) == pytest.approx(memory.free_memory([]), rel=0.2)
