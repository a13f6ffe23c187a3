"""SIGKILL at any moment: the run is resumed to what it would have been, and says from where."""

import errno
import json
import shutil

import numpy as np
import pytest
from processes import call, damaged_folder, run_jobs

from cka_probe.io import load_npz, save_npz
from cka_probe.probing import state

# A run has 10 batches, 20 forwards, 9 saves. (what, count): before the count-th, or after the
# -count-th; "half a file" is what np.savez or a plain write had made by then.
MOMENTS = [
    *(("forward", count) for count in (1, 3, 6, 8, 11, 12, 15, 17, 20)),
    *(("forward", count) for count in (-2, -9, -14, -20)),
    ("save", 2), ("save", -5), ("write", 9), ("bytes", 4), ("bytes", -6), ("sync", 7), ("sync", -8),
]  # fmt: skip
FEWER = [("forward", 6), ("forward", -20), ("save", 3), ("save", -4), ("sync", 7), ("sync", -8),
         ("bytes", -7)]  # fmt: skip
RBF = [("forward", 15), ("forward", -20)]  # before and after its bandwidth is known
KINDS = {
    "minibatch": ({}, MOMENTS),
    "rbf": ({"kernel": "rbf", "images": 320, "batch_size": 32}, RBF),
    "sketch": ({"estimator": "sketch", "sketch_size": 64}, FEWER),
    "exact": ({"estimator": "exact"}, FEWER),
    "bad-images": ({"images": "FOLDER", "skip_bad": True}, [("forward", 9), ("save", -3)]),
}
CASES = [(kind, *moment) for kind, (_, moments) in KINDS.items() for moment in moments]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def options(place):
    folder = damaged_folder(place / "photos", 40, [0, 1, 2, 7, 17, 23])
    return {
        kind: {**more, "images": str(folder)} if more.get("images") == "FOLDER" else more
        for kind, (more, _) in KINDS.items()
    }


@pytest.fixture(scope="module")
def killed(place, options):
    """The folder that each killed run left."""
    jobs = {
        (kind, what, count): {
            "size": 1, "out": str(place / f"{kind}-{what}-{count}-notes"), "save_every_s": 0.0,
            "probe": {**options[kind], "out": str(place / f"{kind}-{what}-{count}")},
            "faults": [[0, f"{what} kill", count, 0]],
        }
        for kind, what, count in CASES
    }  # fmt: skip
    told = run_jobs(list(jobs.values()), place)
    assert not [job for job, one in zip(jobs, told, strict=True) if one["statuses"] != [-9]]
    return {case: place / f"{case[0]}-{case[1]}-{case[2]}" for case in jobs}


@pytest.fixture(scope="module")
def whole(options):
    return {kind: call(more) for kind, more in options.items()}


def test_most_moments_fall_after_the_first_save(killed):
    saved = [(killed[("minibatch", *moment)] / "state.npz").exists() for moment in MOMENTS]
    assert len(MOMENTS) == 20
    assert sum(saved) >= 16


@pytest.mark.parametrize(("kind", "what", "count"), CASES)
def test_a_killed_run_is_resumed_to_the_same(killed, options, whole, kind, what, count, tmp_path):
    out, said = tmp_path / "out", []
    shutil.copytree(killed[kind, what, count], out)
    saved = (out / "state.npz").exists()
    report = call(options[kind], out=out, resume=True, say=said.append)
    limit = 1e-9
    np.testing.assert_allclose(report.cka, whole[kind].cka, rtol=0, atol=limit)
    np.testing.assert_allclose(report.stderr, whole[kind].stderr, rtol=0, atol=limit)
    assert report.meta["left_out"] == whole[kind].meta["left_out"]
    start = report.meta["resumed_from_batch"]
    assert (start > 0) == saved
    if what == "forward" and kind != "rbf":  # two forwards a batch: all but the open one is there
        done = (count - 1) // 2 if count > 0 else (-count + 1) // 2 - 1
        done -= kind == "exact"  # a forward of each view went into its forecast
        assert start == (done if kind != "bad-images" else 8)  # 0, 1, 4 and 5 were left out
    if saved:
        assert said[-1] == f"resumed from batch {start} of 10"
    else:
        assert said[-1].startswith("nothing to resume")
    assert [path.name for path in out.iterdir()] == ["report.npz"]


@pytest.fixture
def left(killed, options, tmp_path):
    """A state of `sketch`, and the options of its run."""
    shutil.copytree(killed["sketch", "forward", -20], tmp_path / "out")
    return tmp_path / "out", {**options["sketch"], "out": tmp_path / "out", "resume": True}


@pytest.mark.parametrize("how", ["cut", "empty", "one bit", "other content"])
def test_a_damaged_file_is_named(left, how):
    out, options = left
    path = out / "state.npz"
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    path.write_bytes({"cut": raw[:-50], "empty": b"", "one bit": bytes(flipped),
                      "other content": b"hello" * 100}[how])  # fmt: skip
    with pytest.raises(
        ValueError, match=r"saved state.*state\.npz: run without --resume"
    ) as caught:
        call(options)
    assert "\n" not in str(caught.value)


def test_without_a_state_the_run_starts_anew(left):
    out, options = left
    (out / "state.npz").unlink()
    assert call(options).meta["resumed_from_batch"] == 0


def test_a_state_of_an_earlier_version_is_refused_in_one_line(left):
    out, options = left
    arrays, meta = load_npz(out / "state.npz", (), version=3)
    old = {key: meta[key] for key in ("keys", "run", "next_batch", "bad")}
    save_npz(out / "state.npz", arrays, old, version=2)
    with pytest.raises(ValueError, match=r"^saved state of an earlier version: .*: run without"):
        call(options)


def test_a_report_is_no_state(left):
    out, options = left
    call({"estimator": "sketch", "sketch_size": 64}, out=out.parent / "other")
    shutil.copy(out.parent / "other" / "report.npz", out / "state.npz")
    with pytest.raises(ValueError, match=r"saved state.*state\.npz: run without --resume"):
        call(options)


@pytest.mark.parametrize("kind", ["minibatch", "sketch"])
def test_a_flipped_byte_changes_no_number(killed, options, whole, kind, tmp_path):
    """Anywhere in the state: it is refused in one line, or it did not matter."""
    source = killed[kind, "forward", -20]
    raw = (source / "state.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in sorted({*rng.integers(0, len(raw), 25), *range(len(raw) - 22, len(raw), 5)}):
        out = tmp_path / str(place)
        shutil.copytree(source, out)
        flipped = bytearray(raw)
        flipped[place] ^= 1 << int(rng.integers(8))
        (out / "state.npz").write_bytes(flipped)
        try:
            report = call(options[kind], out=out, resume=True)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("saved state")  # noqa: PT017
            assert "state.npz" in str(error)  # noqa: PT017
        else:
            assert np.abs(report.cka - whole[kind].cka).max() < 1e-9
    assert refused > 15


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1.0}, "views.*model .the network or its weights."),
        ({"images": 41}, "images"),
        ({"seed": 1}, "seed"),
        ({"sketch_size": 128}, "sketch_size"),
        ({"batch_size": 5}, "batch_size"),
        ({"scales": [8, 12, 16]}, "views.12"),
        ({"resize": "restore"}, "resize"),
        ({"layers": ["stem", "head"]}, "layers"),
        ({"reduce": "mean"}, "reduce"),
        ({"estimator": "exact", "sketch_size": None}, "estimator"),
        ({"skip_bad": True}, "skip_bad"),
    ],
)
def test_another_run_is_refused_by_name(left, change, named):
    _, options = left
    with pytest.raises(ValueError, match=rf"saved state of another run: {named}.* was .*, is .*: "):
        call({**options, **change})


def test_auto_takes_what_the_state_was_made_by(killed, tmp_path):
    shutil.copytree(killed["exact", "forward", -20], tmp_path / "out")
    report = call({"estimator": "auto"}, out=tmp_path / "out", resume=True)
    assert report.meta["estimator"] == "exact"
    assert report.meta["resumed_from_batch"] == 8


@pytest.mark.parametrize("estimator", ["minibatch", "exact"])
def test_a_full_disk_ends_the_saving_and_not_the_run(tmp_path, monkeypatch, estimator):
    whole = np.savez_compressed

    def full(file, **arrays):
        if "run" in json.loads(str(arrays["meta"])) and "arrays" in json.loads(str(arrays["meta"])):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, **arrays)

    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    monkeypatch.setattr(state, "_SHARE", 0)
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.warns(UserWarning, match="no state is saved: the disk is full"):
        report = call({"estimator": estimator}, out=tmp_path)
    assert report.meta["n_images"] == 42
    assert [path.name for path in tmp_path.iterdir()] == ["report.npz"]


@pytest.mark.parametrize("value", ["abc", "-1", "nan"])
def test_a_bad_saving_interval_is_refused_when_it_is_used(monkeypatch, value):
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", value)
    with pytest.raises(ValueError, match=rf"^bad CKA_PROBE_SAVE_EVERY_S: '{value}': set it to"):
        call({})


def test_saving_takes_a_20th_of_the_time(tmp_path, monkeypatch):
    """A state that takes long to write is written seldom; the first by an assumed rate."""
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    now = [100.0]
    monkeypatch.setattr(state.time, "perf_counter", lambda: now[0])
    saver = state.Saver(tmp_path, {})
    large = type("Large", (), {"keys": ["k"], "state_dict": lambda self: {
        "keys": [("v", ("p", "", 0))], "rows 0": np.zeros((1000, 50))}})()  # fmt: skip
    monkeypatch.setattr(state, "_RATE", 400_000.0)  # so that it takes a second
    assert saver.due()
    saver.save(large, 1, [])
    assert not list(tmp_path.iterdir())  # 0 s have gone, 20 are needed
    now[0] += 19
    assert not saver.due()
    now[0] += 2
    assert saver.due()
    saver.save(large, 1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_an_interruption_within_a_sum_saves_no_half_batch(tmp_path, monkeypatch):
    """Ctrl-C while a batch is being added: what was saved before it stands."""
    from cka_probe.engine.minibatch import Minibatch

    whole, calls = Minibatch.end_batch, [0]

    def interrupted(self, index):
        whole(self, index)
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt

    want = call({})
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    monkeypatch.setattr(state, "_SHARE", 0)
    monkeypatch.setattr(Minibatch, "end_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call({}, out=tmp_path)
    monkeypatch.undo()
    report = call({}, out=tmp_path, resume=True)
    assert report.meta["resumed_from_batch"] == 4
    assert np.abs(report.cka - want.cka).max() < 1e-9
