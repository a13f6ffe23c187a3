"""What both programs share: imports of --help, announcements, states, torchrun, warnings."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from shell import furnish, refused, words

from cka_probe import probe
from cka_probe.cli.main import main
from cka_probe.models.load import load_model
from cka_probe.probing import run as probe_run
from msun.cli import main as msun_cli
from msun.network.kernel_resize import STARTS
from msun.network.policy import POLICIES
from msun.training.config import TrainConfig
from msun.training.losses import CONSTRAINTS

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "torchvision", "seaborn", "scipy", "pandas", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize(
    ("program", "commands"),
    [
        ("cka_probe", ["run", "compare", "demo", "layers", "plot"]),
        ("msun", ["cuts", "suggest", "build", "train", "eval", "demo"]),
    ],
)
def test_help_imports_nothing_heavy(program, commands):
    code = (
        f"import sys; from {program}.cli.main import main\n"
        f"assert all(main(argv) == 0 for argv in (['--help'], ['--version'], *([c, '--help'] for c "
        f"in {commands})))\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert all(command in done.stdout for command in commands)


@pytest.mark.parametrize("more", [("--layers", "nope"), ("--device", "cuda:99")])
def test_nothing_is_announced_before_an_option_is_refused(place, tmp_path, capsys, more):
    assert main(words(place, tmp_path / "o", *more)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert more[1] in said.err


def test_the_images_are_opened_and_the_costs_estimated_once(place, tmp_path, capsys, monkeypatch):
    calls = []
    for name in ("open_images", "estimate"):
        original = getattr(probe_run, name)
        monkeypatch.setattr(
            probe_run, name,
            lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k),
        )  # fmt: skip
    assert main(words(place, tmp_path / "o", "--estimator", "auto")) == 0
    assert calls == ["open_images", "estimate"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(":tiny: 20 images of photos, views 8, 16")
    assert lines[1].startswith("auto: exact, as ")
    assert lines[2].startswith("estimate: ")


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_state_is_not_thrown_away_without_a_word(place, tmp_path, capsys, command):
    out = tmp_path / "o"
    out.mkdir()
    (out / "state.npz").write_bytes(b"mine")
    more = ("--quiet", *(("--size", "16") if command == "compare" else ()))
    argv = words(place, out, *more, command=command)
    error = refused(capsys, argv)
    assert "an interrupted run is there: " in error
    assert "--resume" in error
    assert "--overwrite" in error
    model = load_model(f"{place / 'nets.py'}:tiny").model
    with pytest.raises(ValueError, match=r"an interrupted run is there: .*resume=True .*delete"):
        probe(model, place / "photos", [8, 16], batch_size=5, out=out, progress=False)
    assert (out / "state.npz").read_bytes() == b"mine"
    assert main([*argv, "--overwrite"]) == 0
    assert not (out / "state.npz").exists()


def test_memory_needs_a_unit(place, tmp_path, capsys):
    error = refused(capsys, words(place, tmp_path / "o", "--memory", "10"), tmp_path / "o")
    assert "10" in error
    assert "unit" in error


def msun_refused(capsys, *argv):
    assert msun_cli.main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("command", ["cuts", "suggest", "build", "eval", "demo"])
def test_msun_runs_in_one_process_but_for_training(tmp_path, capsys, monkeypatch, command, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    argv = {
        "cuts": ["cuts", "--model", "glyphnet"],
        "suggest": ["suggest", "r.npz", "--model", "glyphnet"],
        "build": ["build", "--model", "glyphnet", "--at", "stem", "--scales", "16,64", "--out",
                  tmp_path / "o"],
        "eval": ["eval", "net.pt", "--data", "glyphs", "--sizes", "16", "--out", tmp_path / "o"],
        "demo": ["demo", "--out", tmp_path / "o"],
    }[command]  # fmt: skip
    error = msun_refused(capsys, *argv)
    text = f"msun: one process only: {command} in 2 processes: start it without torchrun\n"
    assert error == (text if rank == "0" else "")
    assert not (tmp_path / "o").exists()


def test_msun_shows_warnings_as_one_line_each(capsys, monkeypatch):
    from msun.cutting import cuts

    original = cuts.find_cuts

    def warns(*args):
        for _ in range(2):
            warnings.warn("layers are\nconstant: stem", UserWarning, stacklevel=1)
        return original(*args)

    monkeypatch.setattr(cuts, "find_cuts", warns)
    assert msun_cli.main(["cuts", "--model", "glyphnet"]) == 0
    assert capsys.readouterr().err == "msun: warning: layers are constant: stem\n"


def test_msun_build_replaces_no_file_unasked(tmp_path, capsys):
    file = tmp_path / "net.pt"
    file.write_bytes(b"mine")
    argv = ["build", "--model", "glyphnet", "--at", "stem", "--scales", "16,64", "--out", str(file)]
    assert "a file is there already: " in msun_refused(capsys, *argv)
    assert file.read_bytes() == b"mine"
    assert msun_cli.main([*argv, "--overwrite"]) == 0
    assert file.read_bytes() != b"mine"


def test_the_help_of_training_says_the_defaults_of_the_config(capsys):
    assert msun_cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "warmup", "seed",
                 "label_smoothing", "constraint_weight", "val_share", "save_every_s"):  # fmt: skip
        option = f" --{name.removesuffix('_s').replace('_', '-')} "
        told = text.rpartition(option)[2].partition(" --")[0]
        assert f"(default {getattr(TrainConfig, name):g})" in told, name
    assert f"metavar {'|'.join(CONSTRAINTS)}".removeprefix("metavar ") in text
    assert all(name in text for name in (*STARTS, *POLICIES))


def test_the_old_name_of_classes_is_refused_by_name(capsys):
    argv = ["cuts", "--model", "glyphnet", "--new-head", "3"]
    assert "--new-head" in msun_refused(capsys, *argv)


def test_lists_of_numbers_may_begin_with_a_dash(place, tmp_path, capsys):
    argv = words(place, tmp_path / "o", "--quiet", "--mean", "-1,0,1", "--std", "1,1,1")
    assert main(argv) == 0
    error = refused(capsys, words(place, tmp_path / "p", scales="-4,8"), tmp_path / "p")
    assert error.startswith("cka-probe: bad scale: -4: ")
    assert "bad scale: -4: " in msun_refused(
        capsys, "build", "--model", "glyphnet", "--at", "stem", "--scales", "-4,8", "--out",
        tmp_path / "net.pt",
    )  # fmt: skip
