"""The command line `msun`: what it prints, and one line for each error."""

import subprocess
import sys

import pytest

from msun.cli import main as cli

NET = """
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

def tokens():
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 2))

def broken():
    class Broken(nn.Module):
        def forward(self, x):
            raise {error}
    return nn.Sequential(nn.Conv2d(3, 4, 3), Broken())
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET.replace("{error}", "KeyboardInterrupt"))
    return path


def refused(capsys, *argv, status=2):
    assert cli.main(argv) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("msun: ")
    assert error.count(": ") == 3, error
    assert "Traceback" not in error
    return error


def test_cuts_prints_the_table(capsys, file):
    words = ["cuts", "--model", f"{file}:net", "--model-arg", "width=6", "--size", "20"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "cut after"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:5]]
    assert cells == [
        ["0", "6 x 18 x 18", "168 (26.8%)"],
        ["1", "6 x 18 x 18", "168 (26.8%)"],
        ["2", "8 x 8 x 8", "608 (97.1%)"],
        ["3", "8 x 1 x 1", "608 (97.1%)"],
    ]
    assert lines[-1] == "net.py:net at 20 px: 4 cuts, 626 parameters"


def test_the_networks_own_size_is_the_default(capsys):
    pytest.importorskip("timm")
    assert cli.main(["cuts", "--model", "timm:test_resnet"]) == 0
    assert "at 160 px" in capsys.readouterr().out


def test_errors_are_one_line(capsys, file):
    assert "bad size: -3: " in refused(capsys, "cuts", "--model", "resnet18", "--size", "-3")
    assert "bad size: 0: " in refused(capsys, "cuts", "--model", "resnet18", "--size", "0")
    assert "unknown model: 'resnet81': " in refused(capsys, "cuts", "--model", "resnet81")
    small = refused(capsys, "cuts", "--model", f"{file}:net", "--size", "2")
    assert "cannot take these images: (2, 3, 2, 2)" in small
    assert "no valid cut: Sequential, " in refused(
        capsys, "cuts", "--model", f"{file}:tokens", "--size", "8"
    )
    assert "width" in refused(capsys, "cuts", "--model", f"{file}:net", "--model-arg", "width")


@pytest.mark.parametrize("words", [[], ["cuts"], ["cut"], ["cuts", "--model"], ["--model", "x"]])
def test_usage_errors_are_one_line(capsys, words):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("msun: ")
    assert error.count("\n") == 1
    assert "usage" not in error


def test_ctrl_c_is_130(capsys, file):
    refused(capsys, "cuts", "--model", f"{file}:broken", "--size", "9", status=130)


def test_the_unexpected_is_1(capsys, file, monkeypatch):
    def fail(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("msun.cutting.cuts.find_cuts", fail)
    words = ["cuts", "--model", f"{file}:net", "--size", "9"]
    assert "unexpected RuntimeError: first second: " in refused(capsys, *words, status=1)
    monkeypatch.setenv("MSUN_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(words)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "msun", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "cuts" in done.stdout
