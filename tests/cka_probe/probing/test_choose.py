"""Memory: what `auto` picks, and that a run keeps to its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import call
from torch import nn

from cka_probe import probe
from cka_probe.engine.kernels import get_kernel
from cka_probe.probing.choose import choose_estimator

ROOT = Path(__file__).resolve().parents[3]
PEAK = ROOT / "tests" / "helpers" / "peak.py"
MIB = 2**20
SMALL = {"n": 200, "side": 32, "width": 16, "layers": 6, "batch_size": 32}


def measured(estimator, **ask):
    """Peak memory and more of a process of its own (see peak.py)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # glibc gives back at once what is freed: the peak is that of the program, and not of what
        # the allocator happens to keep
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(PEAK), json.dumps({"estimator": estimator, **ask})],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def pick(memory, *, kernel="linear", widths=(16384,) * 8, n=800, batch=8, **more):
    return choose_estimator(
        widths, n=n, batch=batch, kernel=get_kernel(kernel), memory=memory, **more
    )


def test_auto_takes_exact_where_it_fits():
    assert pick(2**34).estimator == "exact"
    assert pick(200 * MIB).estimator == pick(20 * MIB).estimator == "minibatch"
    assert pick(200 * MIB, kernel="rbf").estimator == "minibatch"
    sketch = pick(200 * MIB, size=250)  # the user gave its size
    assert (sketch.estimator, sketch.size) == ("sketch", 256)
    assert pick(200 * MIB, size=250, kernel="rbf").estimator == "minibatch"
    unknown = choose_estimator(None, n=9, batch=8, kernel=get_kernel("rbf"), memory=9)
    assert unknown.estimator == "minibatch"
    for choice in (sketch, pick(200 * MIB), pick(2**34)):
        assert "MiB" in choice.why or "GiB" in choice.why
    with pytest.raises(ValueError, match=r"memory budget too small: 1\.0 MiB: give"):
        pick(MIB)


def test_exact_that_does_not_fit_is_refused_before_the_first_forward():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    ran = []
    net.register_forward_hook(lambda *_: ran.append(1))
    images = torch.randn(500, 3, 32, 32)
    options = {"estimator": "exact", "batch_size": 50, "progress": False}
    text = r"^exact does not fit in memory: [\d.]+ MiB of [\d.]+ MiB: use minibatch or sketch, or"
    with pytest.raises(ValueError, match=text):
        probe(net, images, None, memory="20MiB", **options)
    assert not ran
    probe(net, images[:50], None, memory="64MiB", **options)


def test_peak_memory_keeps_to_the_budget():
    """Above that of the bare forwards, whatever is picked."""
    bare = measured(None, **SMALL)["peak"]
    for budget, picked in ((250, "exact"), (40, "minibatch")):
        run = measured("auto", memory=budget * MIB, **SMALL)
        assert run["estimator"] == picked
        assert run["peak"] - bare < budget * MIB, (budget, run)
        (line,) = [line for line in run["said"] if line.startswith("auto: ")]
        assert run["estimator_why"] in line


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    """50,000 images: `minibatch` as few do, `sketch` near m n k."""
    ask = {"side": 8, "width": 16, "layers": 10, "batch_size": 64}
    few, many = (measured("minibatch", n=n, **ask)["peak"] for n in (2000, 50_000))
    assert many - few < 24 * MIB
    sketched = measured("sketch", n=50_000, sketch_size=128, **ask)["peak"]
    kept = 10 * 50_000 * 128 * 4
    assert kept * 0.8 < sketched - many < 1.6 * kept + 100 * MIB


def test_auto_in_a_probe_says_why_and_resumes_as_it_was(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    images = torch.randn(30, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    said = []
    options = {"batch_size": 10, "estimator": "auto", "progress": False}
    report = probe(net, images, [8, 10], out=tmp_path, say=said.append, **options)
    assert report.meta["estimator"] == "exact"
    assert f"auto: exact, as {report.meta['estimator_why']}" in said
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
    assert asked == [([host, host], 1), ([host, host], 2)]
    for bad in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"cannot use device: '{bad}'"):
            call({"images": 8, "device": bad})
    assert asked[2:] == [([torch.device("cuda:99")], 1), ([host, host], 1)]
    call({"images": 8, "memory": "1GiB"})  # what the user says is not asked about
    assert len(asked) == 4


def test_a_card_that_is_not_there_is_no_limit():
    from cka_probe.engine import memory

    missing = torch.device("cuda:99")
    assert memory.free_memory([missing]) == pytest.approx(memory.free_memory([]), rel=0.2)
