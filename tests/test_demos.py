"""Both demos, end to end on embedded input: their files, and what they say of themselves."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import msun
from cka_probe import Report
from cka_probe.cli.main import main as cka_probe_main
from cka_probe.inputs.glyphs import CLASSES
from cka_probe.summary import describe
from msun.cli import demo_run as room
from msun.cli.main import main as msun_main

CHANCE = 1 / len(CLASSES)
SHORT = ["--steps", "4", "--images", "124", "--quiet"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo of `msun` with hardly any training, on few images."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_PROBED", 200)
        patch.setattr(room, "_DRAWN", 620)
        assert msun_main(["demo", "--out", str(out), *SHORT]) == 0
    return out


def test_cka_probe_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cka_probe_main(["demo", "--out", str(out), "--images", "128"]) == 0
    assert {p.name for p in out.iterdir()} == {
        "report.npz", "cka.csv", "heatmap.png", "curve.png", "report.html",
    }  # fmt: skip
    report = Report.load(out / "report.npz")
    assert sorted(set(report.view), key=int) == ["8", "12", "16", "24", "32", "48", "64"]
    assert report.meta["reference"] == "64"
    assert np.isfinite(report.cka).all()
    text = capsys.readouterr().out
    assert describe(report) in text
    for layer in set(report.layer):
        assert layer in text


def test_msun_demo_writes_the_files_of_the_contract(short):
    assert {p.name for p in short.iterdir()} == {
        "report.npz", "report.html", "split.json", "split.png", "model.pt", "evaluation.csv",
        "evaluation.png", "pareto.png", "demo.html",
    }  # fmt: skip
    table = pd.read_csv(short / "evaluation.csv")
    assert {"arm", "size_px", "top1", "gmacs"} <= set(table)
    assert table.groupby("arm")["size_px"].apply(list).map(tuple).nunique() == 1
    assert {"lean", "single"} <= set(table["arm"])
    net = msun.load(short / "model.pt")
    split = json.loads((short / "split.json").read_text())
    assert net.at == split["layer"]
    assert list(net.scales) == [16, 32, 64]


def test_msun_demo_trains_both_arms_for_equal_macs(short):
    table = pd.read_csv(short / "evaluation.csv")
    net = msun.load(short / "model.pt").eval()
    lean = table[table["arm"] == "lean"].set_index("size_px")["gmacs"]
    for side in net.scales:
        assert lean[side] == pytest.approx(net.macs(side) / 1e9, rel=1e-3)
    single = table[table["arm"] == "single"].set_index("size_px")["gmacs"]
    assert lean[64] == pytest.approx(single[64], rel=1e-6)


def test_the_demo_model_serves_the_sizes_it_was_calibrated_for(short):
    net = msun.load(short / "model.pt").eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, 20, 20)).shape == (2, len(CLASSES))


def test_the_page_of_the_demo_stands_alone(short):
    page = (short / "demo.html").read_text("utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "What this does not show" in page


def test_a_second_demo_in_the_same_folder_is_refused(short, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in short.iterdir()}
    capsys.readouterr()
    assert msun_main(["demo", "--out", str(short), *SHORT]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in short.iterdir()}


@pytest.mark.slow
def test_the_whole_demo_says_what_the_readme_says(tmp_path):
    """Well above chance at every size, and above the single-scale network at the smallest."""
    out = tmp_path / "demo"
    assert msun_main(["demo", "--out", str(out), "--quiet"]) == 0
    table = pd.read_csv(out / "evaluation.csv").set_index(["arm", "size_px"])["top1"]
    assert table["lean"].min() > 10 * CHANCE
    smallest = table["lean"].index.min()
    for arm in ("single", "single, upsampled", "single, BN re-estimated"):
        assert table["lean", smallest] > table[arm, smallest]
