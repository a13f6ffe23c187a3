"""What a run that fails or is interrupted leaves behind, and what is said of what was left out."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from shell import furnish, words

from cka_probe import Report
from cka_probe.activations.hooks import Collector
from cka_probe.cli.main import main
from cka_probe.inputs.decode import ImageError
from cka_probe.probing import state


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("cli"))


def drawing_fails(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cka_probe.plot.figures.save_figure", fail)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_interruption_while_drawing_costs_no_forward(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        drawing_fails(patch, KeyboardInterrupt())
        assert main(words(place, out, "--quiet")) == 130
    assert "run again with --resume" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["report.npz"]
    with monkeypatch.context() as patch:
        patch.setattr("cka_probe.probing.forward.Forwards.run_batch", None)  # not one
        assert main(words(place, out, "--quiet", "--resume")) == 0
    assert len(files(out)) == 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_failure_while_drawing_costs_no_forward(
    place, tmp_path, monkeypatch, capsys, error, reason
):
    out = tmp_path / "deep" / "below" / "o"
    for more in ((), ("--overwrite", "--seed", "3")):
        argv = words(place, out, "--quiet", *more)
        before = files(out) if out.exists() else {}
        with monkeypatch.context() as patch:
            drawing_fails(patch, error)
            assert main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"cka-probe: {reason}: the report is complete, ")
        assert said.count("\n") == 1
        kept = files(out)
        assert kept.pop("report.npz") != before.pop("report.npz", None)
        assert kept == before  # the pictures of before, until --resume draws them anew
        with monkeypatch.context() as patch:
            patch.setattr("cka_probe.probing.forward.Forwards.run_batch", None)  # not one
            again = [word for word in argv if word != "--overwrite"]
            assert main([*again, "--resume"]) == 0
        assert len(files(out)) == 5


def test_a_worker_that_is_killed_is_not_the_networks_fault(place, tmp_path, monkeypatch, capsys):
    """torch raises it from a signal handler, as often as not in the middle of a forward."""
    out = tmp_path / "o"
    argv = words(place, out, "--quiet", "--batch-size", "4")
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    with monkeypatch.context() as patch:
        whole, calls = Collector.run, []

        def dies(self, x, sink):
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
            return whole(self, x, sink)

        patch.setattr(Collector, "run", dies)
        assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("cka-probe: image workers failed: ")
    assert "cannot take" not in said
    assert list(files(out)) == ["state.npz"]
    assert main([*argv, "--resume"]) == 0


def test_an_interruption_before_any_batch_offers_nothing(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet")) == 0
    before = files(out)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cka_probe.models.load.load_model", stop)
    assert main(words(place, out, "--quiet", "--overwrite", "--seed", "3")) == 130
    assert "nothing was saved" in capsys.readouterr().err
    assert files(out) == before


def test_bad_input_in_mid_run_leaves_no_state(place, tmp_path, monkeypatch, capsys):
    import shutil

    photos, out = tmp_path / "photos", tmp_path / "o"
    shutil.copytree(place / "photos", photos)
    argv = words(place, out, "--quiet", "--batch-size", "4")
    argv[argv.index("--data") + 1] = str(photos)
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    saved = []
    save = state.Saver.save
    monkeypatch.setattr(state.Saver, "save", lambda *a: saved.append(1) or save(*a))
    victim = photos / "sub" / "1.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:200])
    seeds = [k for k in range(8) if fails_late(argv, saved, k)]
    assert seeds  # some order has the bad image after a batch that was saved
    assert not out.exists()
    # but what an interrupted run saved before stays, whatever becomes of the next try
    victim.write_bytes(whole)

    def interrupted(*a):
        save(*a)
        raise KeyboardInterrupt

    monkeypatch.setattr(state.Saver, "save", interrupted)
    assert main(argv) == 130
    assert "state.npz" in files(out)
    assert main([*argv, "--resume", "--seed", "9"]) == 2
    assert "seed" in capsys.readouterr().err
    assert "state.npz" in files(out)
    wrong = [word if word != str(photos) else str(tmp_path / "nowhere") for word in argv]
    assert main(wrong) == 2  # --resume forgotten, and a slip
    assert "state.npz" in files(out)


def test_a_disk_that_does_not_answer_costs_no_state(place, tmp_path, monkeypatch):
    out = tmp_path / "o"
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    save = state.Saver.save

    def then_fail(*a):
        save(*a)
        error = ImageError("cannot read image: 'x': Input/output error")
        raise error from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(state.Saver, "save", then_fail)
    assert main(words(place, out, "--quiet", "--batch-size", "4")) == 2
    assert list(files(out)) == ["state.npz"]
    monkeypatch.setattr(state.Saver, "save", save)
    assert main(words(place, out, "--quiet", "--batch-size", "4", "--resume")) == 0


def fails_late(argv, saved, seed):
    saved.clear()
    assert main([*argv, "--seed", str(seed)]) == 2
    return bool(saved)


def test_images_that_could_be_read_are_not_called_unreadable(place, tmp_path, capsys):
    import shutil

    photos, out = tmp_path / "photos", tmp_path / "o"
    shutil.copytree(place / "photos", photos)
    (photos / "sub" / "1.png").write_bytes(b"no image")
    argv = words(place, out, "--quiet", "--skip-bad", "--batch-size", "4")
    argv[argv.index("--data") + 1] = str(photos)
    assert main(argv) == 0
    lost, few = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert lost == "cka-probe: left out, unreadable: sub/1.png"
    meta = Report.load(out / "report.npz").meta
    assert meta["n_images"] == 16
    assert len(meta["left_out"]) == 4
    assert "sub/1.png" not in meta["left_out_readable"]
    assert set(few.partition("batch: ")[2].split(", ")) == set(meta["left_out_readable"])
    assert len(meta["left_out_readable"]) == 3


def test_arguments_of_the_network_are_in_the_report(place, tmp_path):
    out = tmp_path / "o"
    assert main(words(place, out, "--quiet", "--model-arg", "slow=0.0")) == 0
    assert Report.load(out / "report.npz").meta["model"]["args"] == {"slow": 0.0}
    assert "slow" in json.dumps(Report.load(out / "report.npz").meta)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "-foo"], "-foo"),
        (["--model-arg", "-x=3"], "-x"),
        (["--scal", "-4,8"], "-4"),
        (["--batch-size", "-3"], "-3"),
    ],
)
def test_values_that_begin_with_a_dash_are_told(place, tmp_path, capsys, more, said):
    argv = words(place, tmp_path / "o")
    if more[0] == "--scal":
        at = argv.index("--scales")
        del argv[at : at + 2]
    assert main([*argv, *more]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error
    assert "expected" not in error


def test_an_out_that_begins_with_a_dash(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = words(place, "-a=b", "--quiet")
    assert main(argv) == 0
    assert (tmp_path / "-a=b" / "report.npz").exists()


def test_a_reference_needs_scales_and_buffers_that_are_not_saved_count():

    from cka_probe import probe
    from cka_probe.provenance import model_sha256

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    net.register_buffer("mask", torch.ones(3), persistent=False)
    images = torch.rand(8, 3, 2, 2)
    with pytest.raises(ValueError, match="reference without scales: 'foo'"):
        probe(net, images, reference="foo", progress=False)
    before = model_sha256(net)
    net.mask[0] = 2
    assert model_sha256(net) != before
    assert np.isfinite(probe(net, images, progress=False, layers=["1"], batch_size=4).cka).all()


@pytest.mark.skipif(os.name != "posix", reason="such names are not allowed")
def test_names_reach_the_terminal_without_escape_codes(place, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos", photos)
    broken = b"broken\xff.png".decode(errors="surrogateescape")
    for name in ("\x1b[31mred\n.png", "bell\x07\x9b2J.png", broken):
        (photos / name).write_bytes(b"no image")
    argv = words(place, tmp_path / "o", "--quiet", "--skip-bad")
    argv[argv.index("--data") + 1] = str(photos)
    assert main(argv) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "left out, unreadable" in line]
    for shown in (r"\x1b[31mred .png", r"bell\x07\x9b2J.png", r"broken\udcff.png"):
        assert shown in line
    assert all(c.isprintable() or c == "\n" for c in said)
    argv = [word for word in words(place, tmp_path / "p", "--quiet") if word != "--skip-bad"]
    argv[argv.index("--data") + 1] = str(photos)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(c.isprintable() or c == "\n" for c in said)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), MemoryError(), KeyboardInterrupt()]
)
def test_a_failure_while_drawing_deletes_no_file_of_the_users(place, tmp_path, monkeypatch, error):
    out = tmp_path / "o"
    out.mkdir()
    mine = {name: name.encode() for name in ("grid.png", "heatmap.png", "cka.csv", "notes.txt")}
    for name, content in mine.items():
        (out / name).write_bytes(content)
    drawing_fails(monkeypatch, error)
    assert main(words(place, out, "--quiet", "--overwrite")) in (1, 130)
    kept = files(out)
    assert kept.pop("report.npz")
    assert kept == mine
