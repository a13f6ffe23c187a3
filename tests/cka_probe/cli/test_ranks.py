"""The command line in several processes: one voice, one line for an error, nothing left behind."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import run_jobs
from shell import furnish, words

from cka_probe import Report
from cka_probe.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
FATAL = """

def fatal():
    import os, signal
    net, seen = tiny(), []
    def die(*args):
        seen.append(1)
        if os.environ.get("FATAL") and os.environ.get("RANK") == "1" and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    net.register_forward_hook(die)
    return net
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = furnish(tmp_path_factory.mktemp("cli"))
    with (root / "nets.py").open("a") as file:
        file.write(FATAL)
    return root


@pytest.fixture(scope="module")
def forked(place):
    """Several command lines in three processes: name -> (statuses, out by rank, err by rank)."""
    bad = place / "bad"
    shutil.copytree(place / "photos", bad)
    (bad / "0.png").write_bytes(b"no image")
    jobs = {
        "good": words(place, place / "good-out"),
        "demo": ["demo", "--images", "24", "--out", str(place / "demo-out")],
        "quiet": words(place, place / "quiet-out", "--quiet", "--skip-bad", "--workers", "1"),
        "usage": words(place, place / "none", "--nonsense"),
        "scales": words(place, place / "none", scales="8,0"),
        "memory": words(place, place / "none", "--memory", "none"),
        "image": words(place, place / "none"),
        "there": words(place, place / "good-out"),
        "layers": ["layers", "--model", f"{place / 'nets.py'}:tiny", "--size", "16"],
    }
    jobs["image"][4] = jobs["quiet"][4] = str(bad)
    told = run_jobs(
        [
            {"size": 3, "out": str(place / f"{name}-job"), "cli": argv}
            for name, argv in jobs.items()
        ],
        place,
    )

    def read(name, kind):
        return [(place / f"{name}-job" / f"{rank}.{kind}").read_text() for rank in range(3)]

    return {
        name: (one["statuses"], read(name, "out"), read(name, "err"))
        for name, one in zip(jobs, told, strict=True)
    }


@pytest.mark.parametrize("name", ["good", "demo", "layers"])
def test_rank_0_alone_prints(forked, name):
    statuses, out, err = forked[name]
    assert statuses == [0, 0, 0], err
    assert out[0]
    assert out[1:] == ["", ""]
    assert err[1:] == ["", ""]


def test_rank_0_alone_writes(forked, place):
    files = {"report.npz", "cka.csv", "heatmap.png", "curve.png", "report.html"}
    assert {path.name for path in (place / "good-out").iterdir()} == files
    assert {path.name for path in (place / "demo-out").iterdir()} == files


def test_quiet_says_what_was_left_out_once(forked):
    statuses, out, err = forked["quiet"]
    assert statuses == [0, 0, 0]
    assert out == ["", "", ""]
    assert [text.count("left out, unreadable: 0.png") for text in err] == [1, 0, 0]


@pytest.mark.parametrize(("name", "value", "status"), [
    ("usage", "--nonsense", 2), ("scales", "0", 2), ("memory", "none", 2),
    ("there", "good-out", 2), ("image", "0.png", 2),
])  # fmt: skip
def test_an_error_is_one_line_of_all_processes(forked, place, name, value, status):
    statuses, _, err = forked[name]
    assert set(statuses) <= {status, 1}
    assert status in statuses
    lines = [line for text in err for line in text.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("cka-probe: ")
    assert value in lines[0]
    assert not (place / "none").exists()


def torchrun(n, *argv, **environment):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         "-m", "cka_probe", *argv],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return done, time.monotonic() - began


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun_equals_one_process(place, tmp_path, n):
    argv = words(place, tmp_path / "many", "--estimator", "minibatch")
    done, _ = torchrun(n, *argv)
    if "SIGABRT" in done.stderr and not (tmp_path / "many").exists():
        # seen once, on a busy machine: a process aborted in torch's start, before it did anything
        done, _ = torchrun(n, *argv)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote ") == 1
    assert main(words(place, tmp_path / "one", "--quiet")) == 0
    one, many = (Report.load(tmp_path / name / "report.npz") for name in ("one", "many"))
    assert many.meta["processes"] == n
    assert np.abs(one.cka - many.cka).max() < 1e-9
    assert np.abs(one.stderr - many.stderr).max() < 1e-9


@pytest.mark.slow
def test_a_rank_that_dies_under_torchrun_ends_the_run(place, tmp_path):
    out = tmp_path / "out"
    argv = words(place, out, "--batch-size", "4", net="fatal")
    done, seconds = torchrun(3, *argv, FATAL="1")
    assert done.returncode != 0
    assert seconds < 100  # a minute, and the start of the processes on a busy machine
    own = [line for line in done.stderr.splitlines() if line.startswith("cka-probe: ")]
    assert len(own) == 1, done.stderr
    assert re.search(r"lost|ended by its launcher", own[0])
    assert not out.exists()


@pytest.mark.slow
def test_a_killed_torchrun_is_resumed_by_one_process(place, tmp_path, capsys):
    more = ("--batch-size", "4", "--estimator", "sketch", "--sketch", "32")
    argv = words(place, tmp_path / "two", *more, net="fatal")
    done, _ = torchrun(2, *argv, FATAL="1", CKA_PROBE_SAVE_EVERY_S="0")
    assert done.returncode != 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"state.npz"}
    assert main([*argv, "--resume"]) == 0
    assert "resumed from batch 2 of 5" in capsys.readouterr().out
    assert main(words(place, tmp_path / "one", *more, "--quiet", net="fatal")) == 0
    one, two = (Report.load(tmp_path / name / "report.npz") for name in ("one", "two"))
    assert two.meta["resumed_from_batch"] == 2
    assert np.abs(one.cka - two.cka).max() < 1e-9
