"""Ctrl-C, saved state and --resume, end to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shell import LISTENING, furnish, refused, words

from cka_probe import Report
from cka_probe.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("cli"))


def start(place, out, *more):
    """A run of 20 images in 5 batches that takes a few seconds, as a process of its own."""
    argv = words(place, out, "--model-arg", "slow=0.4", "--batch-size", "4", *more)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    return subprocess.Popen(
        [sys.executable, "-c", LISTENING, sys.executable, "-m", "cka_probe", *argv],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_ctrl_c_saves_and_resume_gives_the_same(place, tmp_path):
    out = tmp_path / "o"
    process = start(place, out)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("estimate"):
            break
    time.sleep(2.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("cka-probe: interrupted")
    assert [p.name for p in out.iterdir()] == ["state.npz"]
    assert main(words(place, out, "--model-arg", "slow=0.0", "--batch-size", "4", "--resume")) == 0
    report = Report.load(out / "report.npz")
    assert report.meta["resumed_from_batch"] >= 1
    assert not (out / "state.npz").exists()
    whole = tmp_path / "w"
    assert main(words(place, whole, "--quiet", "--batch-size", "4")) == 0
    assert np.abs(Report.load(whole / "report.npz").cka - report.cka).max() < 1e-9


def test_resume_refuses_another_run_by_name(place, tmp_path, capsys):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet", "--resume")) == 0  # nothing there: starts anew
    assert main(words(place, out, "--quiet", "--resume")) == 0  # finished: nothing to do
    capsys.readouterr()
    error = refused(capsys, words(place, out, "--quiet", "--resume", "--reduce", "mean"))
    assert "reduce" in error
