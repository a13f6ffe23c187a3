"""Words that no command can use, what an earlier run left, provenance of the embedded images."""

import sys
from pathlib import Path

import pytest
from shell import furnish, refused, words

from cka_probe import Report
from cka_probe.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize(
    "more",
    [
        ("--layers", ""),
        ("--weights", ""),
        ("--device", " "),
        ("--memory", ""),
        ("--reference", ""),
    ],
)
def test_an_empty_value_is_refused_by_name(place, tmp_path, capsys, more):
    error = refused(capsys, words(place, tmp_path / "o", *more), tmp_path / "o")
    assert error.startswith(f"cka-probe: empty value: {more[0]}")


@pytest.mark.parametrize("option", ["--data", "--out", "--model"])
def test_an_empty_path_is_refused_by_name(place, tmp_path, capsys, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = words(place, tmp_path / "o")
    argv[argv.index(option) + 1] = ""
    assert f"empty value: {option}" in refused(capsys, argv, tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["0", "-3"])
def test_layers_of_no_size(place, capsys, size):
    argv = ["layers", "--model", f"{place / 'nets.py'}:tiny", "--size", size]
    assert f"bad size: {size}: " in refused(capsys, argv)


@pytest.mark.parametrize("count", ["0", "3", "-1"])
def test_a_demo_of_too_few_images(tmp_path, capsys, count):
    argv = ["demo", "--images", count, "--out", str(tmp_path / "o")]
    assert f"too few images: {count}: " in refused(capsys, argv, tmp_path / "o")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seed", "9" * 23), f"seed out of range: {'9' * 23}: "),
        (("--reference", "99999999"), "scale too large: 99999999: "),
    ],
)
def test_numbers_beyond_what_can_be(place, tmp_path, capsys, more, says):
    assert says in refused(capsys, words(place, tmp_path / "o", *more), tmp_path / "o")


def test_plot_says_what_it_cannot_use(place, tmp_path, capsys):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet")) == 0
    capsys.readouterr()
    argv = ["plot", str(out / "report.npz"), "--out", str(tmp_path / "p.png")]
    for kind in ("heatmap", "curve"):
        error = refused(capsys, [*argv, "--kind", kind, "--against", "16"])
        assert "--against is for a grid: '16' with --kind " in error
    assert main([*argv, "--kind", "grid", "--view", "8", "--against", "16"]) == 0
    capsys.readouterr()
    nowhere = [*argv[:-1], str(tmp_path / "nodir" / "p.png")]
    error = refused(capsys, nowhere)
    assert "no such folder: " in error
    assert "nodir: make it first" in error
    error = refused(capsys, ["plot", str(out), *argv[2:]])
    assert error == f"cka-probe: a folder, no report: {out}: give the file in it\n"


def test_overwriting_leaves_nothing_of_the_run_before(place, tmp_path):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet")) == 0
    (out / "notes.txt").write_text("mine")
    more = ("--quiet", "--overwrite")
    assert main(words(place, out, "--size", "16", *more, command="compare")) == 0
    ours = {"report.npz", "cka.csv", "report.html"}
    assert {p.name for p in out.iterdir()} == {*ours, "grid.png", "notes.txt"}
    assert main(words(place, out, *more)) == 0
    assert {p.name for p in out.iterdir()} == {*ours, "heatmap.png", "curve.png", "notes.txt"}


def test_the_demo_says_what_it_is_made_of(tmp_path):
    assert main(["demo", "--images", "64", "--out", str(tmp_path / "o")]) == 0
    meta = Report.load(tmp_path / "o" / "report.npz").meta
    assert meta["run"]["images"]["name"] == "cka_probe.inputs.glyphs, split test, seed 0, first 64"
    assert "64 images of cka_probe.inputs.glyphs" in (tmp_path / "o" / "report.html").read_text()
    assert {"cka_probe", "torch", "python", "torchvision", "pillow", "numpy"} <= set(
        meta["versions"]
    )
    assert ("timm" in meta["versions"]) == ("timm" in sys.modules)


@pytest.mark.parametrize("command", ["demo", "layers", "plot", "run"])
def test_ctrl_c_offers_resume_only_where_there_is_something(
    place, tmp_path, capsys, monkeypatch, command
):
    def stop(*args, **options):
        raise KeyboardInterrupt

    for name in ("probing.api.probe", "models.load.load_model", "report.Report.load"):
        monkeypatch.setattr(f"cka_probe.{name}", stop)
    out = tmp_path / "o"
    argv = {
        "demo": ["demo", "--images", "64", "--out", str(out)],
        "layers": ["layers", "--model", "resnet18"],
        "plot": ["plot", "r.npz", "--out", str(tmp_path / "p.png")],
        "run": words(place, out),
    }[command]
    assert main(argv) == 130
    error = capsys.readouterr().err
    assert error == "cka-probe: interrupted: Ctrl-C: nothing was saved, run again\n"
    if command in ("demo", "run"):
        out.mkdir()
        (out / "state.npz").write_bytes(b"")
        assert main([*argv, *(["--resume"] if command == "run" else [])]) == 130
        assert ("--resume" in capsys.readouterr().err) == (command == "run")


def test_a_demo_leaves_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")

    def stop(*args, **options):
        assert not list((tmp_path / "o").glob("state*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("cka_probe.cli.demo.write_report", stop)
    assert main(["demo", "--images", "256", "--out", str(tmp_path / "o")]) == 130
    assert not (tmp_path / "o").exists()
