"""The command line end to end: real files in, exit status, stderr and files out."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shell import furnish, refused, words

from cka_probe import Report
from cka_probe.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("cli"))


def test_run_writes_its_five_files(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(place, out)) == 0
    said = capsys.readouterr()
    assert {p.name for p in out.iterdir()} == {
        "report.npz", "cka.csv", "heatmap.png", "curve.png", "report.html",
    }  # fmt: skip
    report = Report.load(out / "report.npz")
    assert report.views == ["8", "16"]
    assert report.meta["n_images"] == 20
    assert report.meta["groups"] == 4
    assert report.meta["model"]["name"]
    assert "GMACs" in said.out
    assert "estimate" in said.out
    assert str(place) not in (out / "report.html").read_text()  # no absolute path
    assert str(place) not in str(report.meta)
    with np.load(out / "report.npz") as arrays:
        assert {"cka", "stderr", "view", "layer", "meta", "format"} <= set(arrays.files)


def test_python_and_shell_agree(place, tmp_path):
    from cka_probe import probe
    from cka_probe.models.load import load_model

    out = tmp_path / "out"
    assert (
        main(words(place, out, "--quiet", "--device", "cpu", "--reduce", "mean", "--kernel", "rbf"))
        == 0
    )
    model = load_model(f"{place / 'nets.py'}:tiny").model
    report = probe(model, place / "photos", [8, 16], batch_size=5, reduce="mean", kernel="rbf")
    assert np.array_equal(Report.load(out / "report.npz").cka, report.cka, equal_nan=True)


def test_seed_seeds_random_weights(place, tmp_path):
    found = []
    for k, seed in enumerate("001"):
        out = tmp_path / str(k)
        argv = ["run", "--model", "squeezenet1_1", "--weights", "none", "--data",
                str(place / "photos"), "--scales", "32,40", "--quiet", "--seed", seed,
                "--layers", "features.3", "--out", str(out)]  # fmt: skip
        assert main(argv) == 0
        found.append(Report.load(out / "report.npz").cka[0, 1])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ("banana", "'banana'"),
        ("-4", "-4"),
        ("0", "0"),
        ("8,-4", "-4"),
        ("8,8", "8"),
        ("", "scales"),
    ],
)
def test_bad_scales(place, tmp_path, capsys, scales, says):
    assert says in refused(capsys, words(place, tmp_path / "o", scales=scales), tmp_path / "o")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--kernel", "poly"), "unknown kernel: 'poly': known kernels are linear, rbf"),
        (("--estimator", "guess"), "unknown estimator: 'guess'"),
        (("--reduce", "max"), "'max'"),
        (("--layers", "nonsense.*"), "'nonsense.*'"),
        (("--reference", "99x"), "99x"),
        (("--batch-size", "3"), "3"),
        (("--batch-size", "many"), "many"),
        (("--images", "3"), "3"),
        (("--images", "300"), "300"),
        (("--mean", "a,b,c", "--std", "1,1,1"), "no list of numbers for --mean: 'a,b,c'"),
        (("--resize", "stretch"), "unknown resize: 'stretch'"),
        (("--device", "banana"), "'banana'"),
        (("--memory", "lots"), "'lots'"),
        (("--estimator", "exact", "--memory", "1kB"), "exact does not fit in memory"),
        (("--bandwidth", "-1"), "bandwidth"),
        (("--model-arg", "colour=red"), "colour"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_bad_options(place, tmp_path, capsys, more, says):
    assert says in refused(capsys, words(place, tmp_path / "o", *more), tmp_path / "o")


def test_unknown_model_offers_near_names(place, tmp_path, capsys):
    argv = ["run", "--model", "resnet81", "--data", str(place / "photos"), "--scales", "8", "--out"]
    assert "resnet18" in refused(capsys, [*argv, str(tmp_path / "o")], tmp_path / "o")


def test_wrong_checkpoints(place, tmp_path, capsys):
    other, junk = tmp_path / "other.safetensors", tmp_path / "junk.pt"
    save_file({"somewhere.weight": torch.zeros(3)}, other)
    junk.write_bytes(b"this is no checkpoint")
    out = tmp_path / "o"
    assert "missing" in refused(capsys, words(place, out, "--weights", str(other)), out)
    assert "junk.pt" in refused(capsys, words(place, out, "--weights", str(junk)), out)
    gone = refused(capsys, words(place, out, "--weights", str(tmp_path / "gone.pt")), out)
    assert "gone.pt" in gone


def test_nan_weights(place, tmp_path, capsys):
    from cka_probe.models.load import load_model

    state = load_model(f"{place / 'nets.py'}:tiny").model.state_dict()
    state["2.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    out = tmp_path / "o"
    error = refused(capsys, words(place, out, "--weights", str(tmp_path / "nan.safetensors")), out)
    assert "2.weight" in error


@pytest.mark.parametrize("count", [None, 0, 3])
def test_missing_empty_and_too_small_folders(place, tmp_path, capsys, count):
    folder = tmp_path / "images"
    if count is not None:
        folder.mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")
    argv = words(place, tmp_path / "o")
    argv[argv.index("--data") + 1] = str(folder)
    error = refused(capsys, argv, tmp_path / "o")
    assert ("too few images: 3" if count else "images") in error


def test_corrupt_image_is_fatal_or_skipped_and_named(place, tmp_path, capsys):
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(place / "photos", folder)
    bad = folder / "sub" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    argv = words(place, tmp_path / "o", "--quiet")
    argv[argv.index("--data") + 1] = str(folder)
    assert "'sub/1.png'" in refused(capsys, argv, tmp_path / "o")
    assert main([*argv, "--skip-bad"]) == 0
    report = Report.load(tmp_path / "o" / "report.npz")
    assert "sub/1.png" in report.meta["left_out"]
    assert report.meta["n_images"] == 19
    assert "sub/1.png" in capsys.readouterr().err


def test_a_size_that_the_network_refuses(place, tmp_path, capsys):
    out = tmp_path / "o"
    error = refused(capsys, words(place, out, net="fixed"), out)
    assert "view '8'" in error
    assert "layer '3'" in error
    assert "restore" in error
    assert main(words(place, out, "--resize", "restore", "--quiet", net="fixed")) == 0
    assert Report.load(out / "report.npz").meta["resize"] == "restore"


def test_unwritable_output(place, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "not a folder" in refused(capsys, words(place, tmp_path / "file"))
    inside = refused(capsys, words(place, tmp_path / "file" / "deeper"))
    assert "Not a directory" in inside or "not a folder" in inside


def test_existing_report_is_kept_unless_overwritten(place, tmp_path, capsys):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet")) == 0
    before = (out / "report.npz").read_bytes()
    capsys.readouterr()
    assert "--overwrite" in refused(capsys, words(place, out, "--quiet"))
    assert (out / "report.npz").read_bytes() == before
    error = refused(capsys, words(place, out, "--quiet", "--overwrite", "--layers", "nope"))
    assert "nope" in error
    assert (out / "report.npz").read_bytes() == before  # a failed run takes nothing away
    assert main(words(place, out, "--quiet", "--overwrite", scales="10,16")) == 0
    assert Report.load(out / "report.npz").views == ["10", "16"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount")
def test_full_disk(place, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        assert main(words(place, disk / "o")) == 1  # the report fits, its pictures do not
        assert "no space left on device: the report is complete" in capsys.readouterr().err
        assert [path.name for path in (disk / "o").iterdir()] == ["report.npz"]
        assert np.isfinite(Report.load(disk / "o" / "report.npz").cka).any()
        shutil.rmtree(disk / "o")
        (disk / "filler").write_bytes(bytes(4096))
        error = refused(capsys, words(place, disk / "o"))
        assert "No space left" in error
        assert not (disk / "o").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_layers_lists_in_execution_order(place, capsys):
    assert main(["layers", "--model", f"{place / 'nets.py'}:tiny", "--size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] != []
    table = [re.split(r"\s{2,}", line) for line in lines]
    assert any("4 x 16 x 16" in line for line in lines)
    assert any(line.startswith("*") for line in lines)
    assert table[0][1:3] == ["layer", "type"]


@pytest.mark.parametrize("kind", ["heatmap", "curve", "grid"])
def test_plot(place, tmp_path, capsys, kind):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet")) == 0
    picture = tmp_path / "p.png"
    argv = ["plot", str(out / "report.npz"), "--kind", kind, "--out", str(picture)]
    assert main(argv) == 0
    with Image.open(picture) as image:
        assert image.size[0] > 200
    capsys.readouterr()
    assert "'banana'" in refused(capsys, [*argv, "--view", "banana"])
    assert "'.xyz'" in refused(capsys, [*argv[:-1], str(tmp_path / "p.xyz")])
    assert "pie" in refused(capsys, [*argv[:3], "pie", *argv[4:]])
    (tmp_path / "junk.npz").write_bytes(b"junk")
    assert "junk.npz" in refused(capsys, [argv[0], str(tmp_path / "junk.npz"), *argv[2:]])


def test_compare_two_checkpoints(place, tmp_path, capsys):
    from cka_probe.models.load import load_model

    model = load_model(f"{place / 'nets.py'}:tiny").model
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    files = [f"--weights={tmp_path / name}.safetensors" for name in "ab"]
    out = tmp_path / "o"
    assert main(words(place, out, "--size", "16", *files, command="compare")) == 0
    report = Report.load(out / "report.npz")
    table = report.between("a", "b")
    assert report.views == ["a", "b"]
    assert (np.diag(table) < 1).all()
    assert (out / "grid.png").exists()
    same = words(place, tmp_path / "s", "--size", "16", files[0], command="compare")
    assert main(same) == 0
    assert np.allclose(np.diag(Report.load(tmp_path / "s" / "report.npz").between("a", "b")), 1)
    capsys.readouterr()
    three = words(place, out, "--overwrite", *files, files[0], command="compare")
    assert "two networks" in refused(capsys, three)


def test_help_and_version_and_no_command(capsys):
    assert main(["--help"]) == 0
    assert "run" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    assert "--scales" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert "COMMAND" in refused(capsys, [])
