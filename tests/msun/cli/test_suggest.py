"""`msun suggest`: what it prints and writes, from a report and from scratch; one line an error."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe import Report, probe
from cka_probe.models.load import load_model
from msun.cli import main as cli

NET = """
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3, 2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

def deep():
    return nn.Sequential(*net(), nn.Linear(2, 2))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a network's file, images, and a report that was made from both."""
    folder = tmp_path_factory.mktemp("suggest")
    (folder / "net.py").write_text(NET)
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for k in range(40):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(folder / "photos" / f"{k}.png")
    loaded = load_model(f"{folder / 'net.py'}:net")
    options = {"layers": ["0", "1", "2", "3"], "batch_size": 8, "progress": False}
    report = probe(loaded.model, folder / "photos", [8, 16, 24], resize="restore", **options)
    report.save(folder / "report.npz")
    return folder


def run(capsys, *argv):
    assert cli.main(["suggest", *map(str, argv)]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def refused(capsys, *argv):
    assert cli.main(["suggest", *map(str, argv)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("msun: ")
    assert error.count(": ") == 3, error
    return error


def test_from_a_report(capsys, home, tmp_path):
    net = f"{home / 'net.py'}:net"
    out = run(capsys, home / "report.npz", "--model", net, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (tmp_path / "out" / "split.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["split.json", "split.png"]
    assert (told["view"], told["reference"]) == ("8", "24")
    assert told["why"] in out
    assert told["layer"] in out.splitlines()[1]
    assert "Not probed, so not considered: 4." in out
    rows = {row["layer"]: row for row in told["ranking"]}
    assert rows["1"]["parameters"] == 112
    assert rows["1"]["gmacs_16"] == pytest.approx(27 * 4 * 14 * 14 / 1e9)
    assert rows["0"]["grid"] == "22 x 22"
    table = [line.split() for line in out.splitlines() if line.split()[:1] and "x" in line.split()]
    assert sorted(line[0] for line in table) == sorted(rows)
    assert f"wrote {tmp_path / 'out'}/: split.json, split.png" in out


def test_rule_view_and_numbers_reach_it_and_nothing_is_written_unasked(capsys, home, monkeypatch):
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    words = ["report.npz", "--model", "net.py:net"]
    out = run(capsys, *words, "--rule", "largest_recovery", "--view", "16")
    report = Report.load(home / "report.npz")
    assert f"{report.against()['16']['2']:.3f}" in out
    wide = run(capsys, *words, "--rule", "recovery", "--delta", "1")
    assert "minus 1" in wide
    every = run(capsys, *words, "--growth", "9")
    said = "The deepest valid cut after which subnets add less than 900 % of the features'"
    assert said in every
    assert sorted(home.iterdir()) == before


def test_from_scratch_equals_probing_first(capsys, home, tmp_path):
    words = ["--model", f"{home / 'net.py'}:net", "--data", home / "photos", "--batch-size", "8"]
    words += ["--scales", "8,16,24", "--layers", "0", "1", "2", "3", "--out", tmp_path / "out"]
    run(capsys, *words, "--quiet")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["report.npz", "split.json", "split.png"]
    report = Report.load(tmp_path / "out" / "report.npz")
    assert report.meta["resize"] == "restore"
    assert report.meta["model"]["name"] == "net.py:net"
    first = (tmp_path / "out" / "split.json").read_text()
    out = run(capsys, tmp_path / "out" / "report.npz", *words[:2], "--out", tmp_path / "again")
    assert (tmp_path / "again" / "split.json").read_text() == first
    assert json.loads(first)["why"] in out
    error = refused(capsys, *words)
    assert "a result is there already" in error
    run(capsys, *words, "--overwrite", "--quiet", "--resize", "native", "--seed", "1")
    assert "another field of view" in (tmp_path / "out" / "split.json").read_text()


def test_bad_words_are_refused_before_anything_is_probed(capsys, home, tmp_path, monkeypatch):
    monkeypatch.setattr("cka_probe.probing.run.Run", None)
    words = ["--model", f"{home / 'net.py'}:net", "--data", home / "photos", "--out",
             tmp_path / "out", "--scales", "8,24"]  # fmt: skip
    for more in (
        ("--rule", "best"), ("--growth", "0"), ("--growth", "inf"), ("--delta", "2"),
        ("--view", "24"), ("--view", "9"),
    ):  # fmt: skip
        refused(capsys, *words, *more)
    assert not (tmp_path / "out").exists()


def test_the_embedded_case(capsys, tmp_path):
    words = ["--model", "glyphnet", "--data", "glyphs", "--scales", "16,64", "--images", "96"]
    assert cli.main(["suggest", *words, "--batch-size", "16", "--out", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()  # the progress bar is on stderr
    assert out.startswith("glyphnet: 96 images of cka_probe.inputs.glyphs, ")
    told = json.loads((tmp_path / "split.json").read_text())
    assert {row["layer"] for row in told["ranking"]} >= {"stem", "layer1", "layer2", "layer3"}
    assert told["clear"]
    assert told["rule"] == "affordable"
    assert f"cut after {told['layer']}" in out
    words += ["--overwrite", "--rule", "recovery", "--out", str(tmp_path)]
    assert cli.main(["suggest", *words, "--batch-size", "16"]) == 0
    out, _ = capsys.readouterr()
    told = json.loads((tmp_path / "split.json").read_text())
    assert not told["clear"]  # its curve only falls
    assert "no clear split" in out
    assert "CKA never rises" in told["why"]
    assert Report.load(tmp_path / "report.npz").meta["n_images"] == 96


def test_a_report_of_another_network_is_refused(capsys, home, tmp_path):
    saved = home / "report.npz"
    error = refused(capsys, saved, "--model", "glyphnet")
    assert "a report of another network: no layer '0': " in error
    error = refused(capsys, saved, "--model", f"{home / 'net.py'}:net", "--model-arg", "width=6")
    assert "layer '0' had 112 parameters and has 168 in net.py:net" in error
    report = Report.load(saved)
    named = Report(
        report.cka, report.stderr, report.view, report.layer,
        report.meta | {"model": {"name": "net.py:net"}},
    )  # fmt: skip
    named.save(tmp_path / "named.npz")
    run(capsys, tmp_path / "named.npz", "--model", f"{home / 'net.py'}:net")
    error = refused(capsys, tmp_path / "named.npz", "--model", f"{home / 'net.py'}:deep")
    assert "a report of another network: net.py:net, not net.py:deep: give --model" in error


def test_given_weights_must_be_those_of_the_report(capsys, home, tmp_path):
    loaded = load_model(f"{home / 'net.py'}:net")
    torch.save(loaded.model.state_dict(), tmp_path / "same.pt")
    words = [home / "report.npz", "--model", f"{home / 'net.py'}:net", "--weights"]
    run(capsys, *words, tmp_path / "same.pt")
    other = {k: v + 1 for k, v in loaded.model.state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    assert "a report of other weights: not other.pt: " in refused(
        capsys, *words, tmp_path / "other.pt"
    )


def test_errors_are_one_line(capsys, home, tmp_path):
    net, saved = f"{home / 'net.py'}:net", home / "report.npz"
    scratch = ["--model", net, "--data", home / "photos"]
    assert "no report, nor --data and --scales and --out: " in refused(capsys, "--model", net)
    assert "nor --out: " in refused(capsys, *scratch, "--scales", "8,16")
    both = refused(capsys, saved, *scratch)
    assert "a report and something to probe: " in both
    assert "no such report: " in refused(capsys, tmp_path / "absent.npz", "--model", net)
    assert "unknown rule: 'lowest': " in refused(capsys, saved, "--model", net, "--rule", "lowest")
    assert "unknown view: '9': " in refused(capsys, saved, "--model", net, "--view", "9")
    assert "delta out of range: -1.0: " in refused(capsys, saved, "--model", net, "--delta", "-1")
    out = ["--out", tmp_path / "out"]
    assert "one scale has nothing" in refused(capsys, *scratch, "--scales", "8", *out)
    alone = refused(capsys, *scratch, "--scales", "8,16", "--layers", "6", *out)
    assert "none of these layers is a cut: 1 layers: give --layers such as '0'" in alone
    file = tmp_path / "file"
    file.write_text("mine")
    assert "output is not a folder: " in refused(capsys, saved, "--model", net, "--out", file)
    assert file.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_what_fails_after_the_probe_costs_no_forward(capsys, home, tmp_path, monkeypatch):
    words = ["--model", f"{home / 'net.py'}:net", "--data", home / "photos", "--scales", "8,16"]
    words += ["--batch-size", "8", "--layers", "0", "2", "--quiet", "--out", tmp_path / "out"]

    def fail(*_):
        raise ValueError("no ink: 0: buy some")

    monkeypatch.setattr("cka_probe.plot.figures.save_figure", fail)
    assert "no ink: 0: buy some" in refused(capsys, *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.npz"]
    monkeypatch.undo()
    monkeypatch.setattr("cka_probe.probing.forward.Forwards.run_batch", None)  # not one
    with monkeypatch.context() as patch:
        patch.setattr("msun.splitting.choice.SplitChoice.save", fail)
        refused(capsys, *words, "--resume")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.npz"]
    run(capsys, *words, "--resume")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.npz", "split.json", "split.png"
    }  # fmt: skip


def test_a_split_is_not_overwritten_unasked(capsys, home, tmp_path):
    words = [home / "report.npz", "--model", f"{home / 'net.py'}:net", "--out", tmp_path]
    run(capsys, *words)
    (tmp_path / "split.json").write_text("mine")
    assert "a result is there already: " in refused(capsys, *words)
    assert (tmp_path / "split.json").read_text() == "mine"
    run(capsys, *words, "--overwrite")
    assert (tmp_path / "split.json").read_text() != "mine"
