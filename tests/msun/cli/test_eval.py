"""`msun eval`: what it writes and prints, and one line for each error."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cka_probe.models.load import load_model
from msun import Predictions, build, evaluate, load, save
from msun.cli import main as cli

NET = """
import torch
from torch import nn

def net(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, padding=1), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )

def sick():
    class Sick(nn.Module):
        def forward(self, x):
            return x / 0
    return nn.Sequential(net(), Sick())

def interrupted():
    class Stop(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt
    return nn.Sequential(Stop())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photographs in three classes, to train and to test on; networks and checkpoints of them."""
    root = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    for k in range(36):
        folder = root / ("train", "test")[k % 2] / "abc"[k % 3]
        folder.mkdir(parents=True, exist_ok=True)
        grain = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((30, 26)).save(folder / f"{k}.png")
    (root / "net.py").write_text(NET)
    loaded = load_model(f"{root / 'net.py'}:net")
    for preset in ("lean", "paper"):
        (root / preset).mkdir()
        made = build(loaded.model, "2", [8, 16], preset=preset)
        extra = {"classes": ["a", "b", "c"], "rows": None, "run": {"mean": [0.2, 0.3, 0.4],
                                                                   "std": [1, 2, 3]}}  # fmt: skip
        save(made, root / preset / "model.pt", extra=extra)
    return root


def run(place, out, *more, checkpoints=("lean",), model=True, sizes="8,12,16"):
    words = ["eval", *(str(place / name / "model.pt") for name in checkpoints),
             *(("--model", f"{place / 'net.py'}:net") if model else ()),
             "--data", str(place / "test"), "--sizes", sizes, "--out", str(out),
             "--no-latency", *more]  # fmt: skip
    return cli.main(words)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


THREE = ["accuracy.png", "evaluation.csv", "pareto.png"]


def test_a_checkpoint(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--mixed", "--predictions", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert names(tmp_path / "out") == [*THREE, "predictions.npz"]
    frame = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    net = load(place / "lean" / "model.pt", backbone=load_model(f"{place / 'net.py'}:net"))
    wanted = evaluate(net, place / "test", [8, 12, 16], mixed=True, latency=False,
                      mean=(0.2, 0.3, 0.4), std=(1, 2, 3), progress=False)  # fmt: skip
    assert frame["arm"].tolist() == ["lean"] * 4
    assert frame["size_px"].tolist()[:3] == [8, 12, 16]
    assert frame["size_px"].isna().tolist() == [False] * 3 + [True]
    for column in ("top1", "top1_low", "gmacs", "params_m", "cka", "fed_px"):
        assert frame[column].to_numpy() == pytest.approx(
            wanted[column].to_numpy(dtype=float), nan_ok=True
        )
    kept = Predictions.load(tmp_path / "out" / "predictions.npz")
    assert (kept.correct(12).mean(), len(kept.label)) == (frame["top1"][1], 18)
    for name in ("accuracy.png", "pareto.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture).std() > 5


def test_the_table(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--mixed") == 0
    out, error = capsys.readouterr()
    assert error == ""
    lines = [line for line in out.splitlines() if line]
    assert lines[0] == "18 images of test, 95 % intervals"
    assert lines[1].split("  ")[0].strip() or lines[1].split()[0] == "px"
    frame = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    for line, (_, row) in zip(lines[2:6], frame.iterrows(), strict=True):
        first = "mixed" if pd.isna(row["size_px"]) else f"{row['size_px']:.0f}"
        share = (
            f"{100 * row['top1']:.1f} ({100 * row['top1_low']:.1f}–{100 * row['top1_high']:.1f})"
        )
        assert line.split()[0] == first
        assert share in line
    assert "top-5" not in lines[1]
    assert "fed px" not in lines[1]
    assert lines[-1].startswith(f"wrote {tmp_path / 'out'}/: accuracy.png, evaluation.csv, pareto")


def test_several_checkpoints_are_arms(place, tmp_path, capsys):
    both = ("lean", "paper")
    assert run(place, tmp_path / "a", checkpoints=both) == 0
    assert pd.read_csv(tmp_path / "a" / "evaluation.csv")["arm"].unique().tolist() == [*both]
    assert "  arm" in capsys.readouterr().out
    words = ("--arm", "ours", "--arm", "theirs", "--predictions", "--quiet")
    assert run(place, tmp_path / "b", *words, checkpoints=both) == 0
    assert pd.read_csv(tmp_path / "b" / "evaluation.csv")["arm"].unique().tolist() == [
        "ours", "theirs"
    ]  # fmt: skip
    assert names(tmp_path / "b") == [*THREE, "predictions-1.npz", "predictions-2.npz"]


def test_a_plain_network_upsampled(place, tmp_path, capsys):
    words = ("--feed", "upsampled", "--reference", "20", "--at", "3", "--images", "9", "--seed",
             "2", "--mean", "0,0,0", "--std", "1,1,1")  # fmt: skip
    assert run(place, tmp_path / "out", *words, checkpoints=()) == 0
    assert "fed px" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    assert frame["arm"].unique().tolist() == ["net.py:net, upsampled"]
    assert frame["fed_px"].tolist() == [20, 20, 20]
    wanted = evaluate(load_model(f"{place / 'net.py'}:net"), place / "test", [8, 12, 16],
                      feed="upsampled", reference=20, at="3", n_images=9, seed=2, latency=False,
                      mean=(0, 0, 0), std=(1, 1, 1), progress=False)  # fmt: skip
    assert frame["top1"].tolist() == wanted["top1"].tolist()
    assert frame["cka"].to_numpy() == pytest.approx(wanted["cka"].to_numpy())


def test_calibration_is_kept(place, tmp_path):
    train = str(place / "train")
    words = ("--calibrate", train, "--calibrate-images", "12", "--quiet")
    assert run(place, tmp_path / "a", *words) == 0
    assert names(tmp_path / "a") == ["accuracy.png", "calibrated.pt", "evaluation.csv",
                                     "pareto.png"]  # fmt: skip
    backbone = load_model(f"{place / 'net.py'}:net")
    net = load(tmp_path / "a" / "calibrated.pt", backbone=backbone)
    assert net.calibrated == ((8, 8), (12, 12), (16, 16))
    before = load(place / "lean" / "model.pt", backbone=backbone)
    x = torch.rand(4, 3, 12, 12)
    assert not torch.allclose(net(x), before(x))
    other = torch.rand(4, 3, 14, 14)
    assert torch.equal(net(other), before(other))
    again = ["eval", str(tmp_path / "a" / "calibrated.pt"), "--model", f"{place / 'net.py'}:net",
             "--data", str(place / "test"), "--sizes", "8,12,16", "--out", str(tmp_path / "b"),
             "--no-latency", "--quiet"]  # fmt: skip
    assert cli.main(again) == 0
    tables = [pd.read_csv(tmp_path / name / "evaluation.csv") for name in "ab"]
    assert tables[0]["cka"].tolist() == tables[1]["cka"].tolist()
    assert run(place, tmp_path / "c", *words, checkpoints=()) == 0
    assert names(tmp_path / "c") == THREE, "a plain network has no checkpoint"


def test_glyphs(tmp_path, capsys):
    words = ["eval", "--model", "glyphnet", "--data", "glyphs", "--images", "62", "--sizes",
             "32,64", "--out", str(tmp_path), "--no-cka"]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "62 images of glyphs test" in out
    assert "ms, batch 64" in out
    assert "CKA" not in out
    frame = pd.read_csv(tmp_path / "evaluation.csv")
    assert frame["top1"].tolist()[1] > 0.95
    assert frame["latency_ms_64"].notna().all()
    assert frame["cka"].isna().all()


def refused(capsys, code, out, status=2):
    assert code == status
    said, error = capsys.readouterr()
    assert said == ""
    assert error.count("\n") == 1, error
    assert error.startswith("msun: ")
    assert error.count(": ") == 3, error
    assert out is None or not out.exists()
    return error


def test_errors_are_one_line(place, tmp_path, capsys):
    out = tmp_path / "out"

    def bad(*more, **options):
        return refused(capsys, run(place, out, *more, **options), out)

    assert "nothing to measure" in bad(checkpoints=(), model=False)
    assert "no such checkpoint" in bad(checkpoints=("none",))
    assert "checkpoint of a bare network" in bad(model=False)
    assert "bad scale: -4" in bad(sizes="-4,8")
    assert "no list of whole numbers for --rows: 'a'" in bad("--rows", "a")
    assert "rows do not fit" in bad("--rows", "1,2")
    assert "unknown feed: 'up'" in bad("--feed", "up")
    assert "arm names do not fit" in bad("--arm", "a", "--arm", "b")
    assert "arm names do not fit" in bad(checkpoints=("lean", "lean"))
    assert "no such module: 'x'" in bad("--at", "x")
    assert "calibration for sizes that are not fed" in bad(
        "--feed", "upsampled", "--calibrate", str(place / "train")
    )
    assert "cannot use device" in bad("--device", "cuda:77")
    assert "half a normalisation" in bad("--mean", "0,0,0")
    assert "more images asked for" in bad("--images", "99")
    assert "batch_size is too small" in bad("--batch-size", "2")
    assert "outputs do not fit the classes" in bad("--model-arg", "classes=5", checkpoints=())
    sick = ["eval", "--model", f"{place / 'net.py'}:sick", "--data", str(place / "test"),
            "--sizes", "8", "--out", str(out)]  # fmt: skip
    assert "scores are not finite: Sequential, image " in refused(capsys, cli.main(sick), out)


def test_ctrl_c_leaves_nothing(place, tmp_path, capsys):
    words = ["eval", "--model", f"{place / 'net.py'}:interrupted", "--data", str(place / "test"),
             "--sizes", "8", "--out", str(tmp_path / "out"), "--no-cka"]  # fmt: skip
    refused(capsys, cli.main(words), tmp_path / "out", status=130)


def test_an_existing_evaluation_stays(place, tmp_path, capsys):
    assert run(place, tmp_path, "--quiet") == 0
    before = (tmp_path / "evaluation.csv").read_bytes()
    (tmp_path / "mine.txt").write_text("mine")
    assert "a result is there already" in refused(
        capsys, run(place, tmp_path, "--quiet", sizes="8,16"), None
    )
    failed = run(place, tmp_path, "--overwrite", "--rows", "1,2", sizes="8,16")
    assert "rows do not fit" in refused(capsys, failed, None)
    assert (tmp_path / "evaluation.csv").read_bytes() == before
    assert names(tmp_path) == ["accuracy.png", "evaluation.csv", "mine.txt", "pareto.png"]
    assert run(place, tmp_path, "--overwrite", "--quiet", sizes="8,16") == 0
    assert (tmp_path / "evaluation.csv").read_bytes() != before
    (tmp_path / "file").write_text("x")
    assert "output is not a folder" in refused(capsys, run(place, tmp_path / "file"), None)


def test_a_checkpoint_that_names_a_python_file_needs_trust(place, tmp_path, capsys):
    spec = {"name": f"{place / 'net.py'}:net", "model_args": {}}
    made = build(load_model(spec["name"]).model, "2", [8, 16], spec=spec)
    (place / "named").mkdir()
    save(made, place / "named" / "model.pt")
    words = {"checkpoints": ("named",), "model": False, "sizes": "8"}
    assert run(place, tmp_path / "out", **words) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("msun: checkpoint names code to run: ")
    assert "(--trust)" in error
    assert run(place, tmp_path / "out", "--trust", "--quiet", **words) == 0
