"""The command `msun train`: its files, its words, and one line for each error."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import NET

from msun.cli import main as cli
from msun.cli import train as cli_train
from msun.network import checkpoint
from msun.training.config import TrainConfig
from msun.training.step import TrainingStep


@pytest.fixture
def words(tmp_path):
    """A command line that works; the data are 16 plain pictures of each of three colours."""
    (tmp_path / "net.py").write_text(NET)
    for k in range(48):
        name, colour = (("red", (200, 9, 9)), ("lime", (9, 200, 9)), ("blue", (9, 9, 200)))[k % 3]
        path = tmp_path / "data" / "train" / name / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = tuple(max(0, c - k) for c in colour)
        Image.new("RGB", (20, 18), shade).save(path)
    return [
        "train", "--model", f"{tmp_path / 'net.py'}:net", "--at", "2", "--scales", "8,16",
        "--data", str(tmp_path / "data" / "train"), "--out", str(tmp_path / "out"),
        "--batch-size", "8", "--epochs", "6",
    ]  # fmt: skip


def refused(capsys, *argv):
    assert cli.main(argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("msun: ")
    assert error.count(": ") == 3, error
    return error


def test_it_trains_and_says_so(capsys, words, tmp_path):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("top-1 on the images that were kept back: ")
    assert lines[0].endswith(" % at 16 px")
    assert lines[1] == f"wrote {tmp_path / 'out'}/: model.pt, metrics.csv, config.json"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["classes"] == ["blue", "lime", "red"]
    assert config["mean"] == pytest.approx([0.485, 0.456, 0.406])
    model = checkpoint.load(tmp_path / "out" / "model.pt", trust=True)
    assert model.spec["classes"] == ["blue", "lime", "red"]
    mean, std = (torch.tensor(model.spec[k]).view(3, 1, 1) for k in ("mean", "std"))
    red = (torch.tensor([0.7, 0.02, 0.02]).view(3, 1, 1).expand(3, 16, 16) - mean) / std
    assert model(red[None]).argmax().item() == 2


def test_words_reach_the_recipe(words):
    more = [
        "--max-steps", "7", "--lr", "0.3", "--constraint", "cka", "--distill", "--ema", "0.99",
        "--amp", "bf16", "--clip", "1", "--tau", "0.2", "--no-norm-decay", "--crop-area", "0.5,0.9",
        "--flip", "off", "--rows", "4,0,2", "--seed", "3", "--save-every", "5", "--mean",
        "0.5,0.5,0.5", "--std", "1,1,1", "--images", "40", "--resume", "--device", "cpu",
    ]  # fmt: skip
    config = cli_train.train_config(cli.build_parser().parse_args([*words, *more]))
    want = {
        "max_steps": 7, "lr": 0.3, "constraint": "cka", "distill": 1.0, "ema": 0.99, "amp": "bf16",
        "clip": 1.0, "tau": 0.2, "decay_norms": False, "crop_area": [0.5, 0.9], "flip": False,
        "rows": [4, 0, 2], "seed": 3, "save_every_s": 5.0, "mean": [0.5] * 3, "std": [1.0] * 3,
        "n_images": 40, "resume": True, "device": "cpu", "epochs": 6, "batch_size": 8,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in want} == want


def test_words_that_are_left_out_keep_the_defaults(words):
    config = cli_train.train_config(cli.build_parser().parse_args(words))
    default = TrainConfig(out=config.out, epochs=6, batch_size=8, device=config.device)
    assert config == default


def test_resume_overwrite_and_a_split(capsys, words, tmp_path):
    data = words.index("--data") + 1
    split = [*words[:data], str(tmp_path / "data"), *words[data + 1 :], "--split", "train"]
    assert cli.main([*split, "--max-steps", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    error = refused(capsys, *split, "--max-steps", "2")
    assert error.startswith("msun: a run is there already: ")
    assert cli.main([*split, "--max-steps", "2", "--resume"]) == 0
    capsys.readouterr()
    error = refused(capsys, *split, "--max-steps", "3", "--resume")
    assert "finished run of another run: max_steps was 2, is 3: " in error
    assert cli.main([*split, "--max-steps", "3", "--overwrite"]) == 0


def test_auto_takes_what_suggest_would(capsys, tmp_path):
    words = ["train", "--model", "glyphnet", "--at", "auto", "--scales", "16,32", "--data",
             "glyphs", "--images", "70", "--max-steps", "1", "--batch-size", "8", "--out",
             str(tmp_path / "out")]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["run"]["model"]["at"] == split["layer"]
    assert out.splitlines()[0] != ""
    assert cli.main([*words, "--resume"]) == 0, "the probe is not repeated"
    assert len(capsys.readouterr().out.splitlines()) == 2
    words[-1] = str(tmp_path / "cheap")
    assert cli.main([*words, "--growth", "0.05"]) == 0
    assert "costs=" not in capsys.readouterr().out, "a shell has no subnet_costs"
    cheap = json.loads((tmp_path / "cheap" / "split.json").read_text())
    assert cheap["growth"] == 0.05
    assert cheap["ranking"][0]["score"] < 0.05 < split["ranking"][0]["score"]


def test_ctrl_c_names_what_goes_on(capsys, tmp_path, monkeypatch):
    """With the cut that was chosen before, which is written down."""
    words = ["train", "--model", "glyphnet", "--at", "auto", "--scales", "16,32", "--data",
             "glyphs", "--images", "70", "--max-steps", "4", "--batch-size", "8", "--out",
             str(tmp_path / "out"), "--quiet"]  # fmt: skip
    descend = TrainingStep.run

    def interrupted(self, *args):
        if self.step == 2:
            raise KeyboardInterrupt
        return descend(self, *args)

    monkeypatch.setattr(TrainingStep, "run", interrupted)
    assert cli.main([*words, "--save-every", "0"]) == 130
    said = capsys.readouterr().err
    assert said == "msun: interrupted: Ctrl-C: run again with --resume to continue\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"state.pt", "split.json"}
    monkeypatch.setattr(TrainingStep, "run", descend)
    assert cli.main([*words, "--resume"]) == 0
    assert (tmp_path / "out" / "split.json").exists()
    (tmp_path / "out" / "split.json").write_text("as it was")
    assert cli.main(words) == 2  # a run is there already
    assert (tmp_path / "out" / "split.json").read_text() == "as it was"
    capsys.readouterr()
    words[words.index("--out") + 1] = str(tmp_path / "other")
    monkeypatch.setattr(TrainingStep, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(words) == 130
    assert capsys.readouterr().err == "msun: interrupted: Ctrl-C: nothing was saved, run again\n"
    assert not (tmp_path / "other").exists()


def test_a_file_that_is_no_image_is_told_with_a_way_out_that_there_is(capsys, words, tmp_path):
    data = Path(words[words.index("--data") + 1])
    sorted(data.rglob("*.png"))[0].write_bytes(b"no image")
    error = refused(capsys, *words)
    assert "cannot read image" in error
    assert error.endswith("repair the file or remove it\n")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--rows", "0,1"], "rows do not fit the classes: 2 rows for 3 classes of "),
        (["--rows", "a,b"], "no list of whole numbers for --rows: 'a,b': "),
        (["--model-arg", "classes=5"],
         "outputs do not fit the classes: 5 outputs for 3 classes of 'train': "),
        (["--growth", "0"], "growth out of range: 0.0: "),
        (["--flip", "maybe"], "bad --flip: 'maybe': "),
        (["--crop-area", "1,x"], "no list of numbers for --crop-area: '1,x': "),
        (["--lr", "-1"], "bad lr: -1.0: "),
        (["--constraint", "soft"], "unknown constraint: 'soft': "),
        (["--amp", "int8"], "unknown amp: 'int8': "),
        (["--split", "dev"], "no such split: 'dev' in "),
        (["--device", "foo"], "cannot use device: 'foo', "),
        (["--data", "glyphs", "--images", "0"], "too few images: 0 of 'glyphs': "),
        (["--resume", "--overwrite"], "resume and overwrite: both are on: "),
        (["--scales", "16", "--at", "auto"], "one scale has nothing to be compared with: 16: "),
        (["--data", "nowhere"], "no such folder: 'nowhere': "),
        (["--batch-size", "99"], "too few training images: 43 of 48, for batches of 99: "),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(capsys, words, tmp_path, more, text):
    assert f"msun: {text}" in refused(capsys, *words, *more)
    assert not (tmp_path / "out").exists()
