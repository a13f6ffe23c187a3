"""Processes that share a run: equal to one process, whoever has how many batches; deaths end it."""

import shutil

import numpy as np
import pytest
from processes import call, damaged_folder, run_jobs

from cka_probe import Report

SAME = {
    "linear": {},
    "rbf": {"kernel": "rbf"},
    "rbf-early": {
        "kernel": "rbf",
        "images": 288,
        "batch_size": 16,
    },  # known before the end
    "exact": {"estimator": "exact"},
    "workers": {"workers": 1},
    "exact-rbf": {"estimator": "exact", "kernel": "rbf"},
    "sketch": {"estimator": "sketch", "sketch_size": 64},
    "three-batches": {"batch_size": 16},
    "three-batches-exact": {"batch_size": 16, "estimator": "exact"},
    "auto": {"estimator": "auto"},  # what is free differs from process to process
    "bad-images": {"images": "FOLDER", "skip_bad": True},
    "bad-images-sketch": {"images": "FOLDER", "skip_bad": True, "estimator": "sketch"},
}
PAIRS = [(name, 2) for name in SAME]
TWO = ("rbf-early", "exact-rbf", "auto", "workers")  # two processes are enough
PAIRS += [(name, 4) for name in SAME if name not in TWO]
DEATHS = {
    "dies-in-a-batch": {"faults": [[1, "kill", 5, 0]]},
    "dies-as-all-wait": {"faults": [[1, "kill", 5, 0], [0, "sleep", 7, 1.0]]},
    "first-dies": {"faults": [[0, "kill", 5, 0]]},
    "dies-saving": {"faults": [[0, "save kill", 2, 0]], "save_every_s": 0.0},
    "dies-exact": {"faults": [[1, "kill", 5, 0]], "probe": {"estimator": "exact"}},
}
OTHERS = {
    "fails": {"faults": [[1, "fail", 5, 0]], "ends_fully": True},
    "slow": {"faults": [[1, "sleep", 5, 3.0]]},  # longer than silence is allowed to last
    "other-network": {"of_rank": {"1": {"extra": 1.0}}},
    "other-option": {"of_rank": {"1": {"seed": 1}}},
    "interval": {"save_every_s": 0.0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def cases(place):
    """The options of SAME, with a folder of which the first batch and the eighth image are bad."""
    folder = damaged_folder(place / "photos", 22, [0, 1, 2, 7])
    return {
        name: {**options, "images": str(folder)} if options.get("images") == "FOLDER" else options
        for name, options in SAME.items()
    }


@pytest.fixture(scope="module")
def done(place, cases):
    """All jobs of this file, run by one interpreter: name -> (folder, statuses, seconds)."""
    jobs = {f"{name}-{n}": {"size": n, "probe": cases[name]} for name, n in PAIRS}
    for name, job in {**DEATHS, **OTHERS}.items():
        jobs[name] = {"size": 3, "probe": {}, **job}
        for kept in ("dies-saving", "interval"):
            if name == kept:
                jobs[name]["probe"] = {"out": str(place / f"{name}-out")}
    for name, job in jobs.items():
        job["out"] = str(place / name)
    told = run_jobs(list(jobs.values()), place)
    return {
        name: (place / name, one["statuses"], one["seconds"])
        for name, one in zip(jobs, told, strict=True)
    }


@pytest.fixture(scope="module")
def alone():
    """The report of one process, made once."""
    made = {}

    def get(name, options):
        if name not in made:
            made[name] = call(options)
        return made[name]

    return get


@pytest.mark.filterwarnings("ignore::cka_probe.DegenerateWarning")
@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_several_processes_equal_one(done, alone, cases, name, size):
    folder, statuses, _ = done[f"{name}-{size}"]
    assert statuses == [0] * size, [p.read_text() for p in folder.glob("*.txt")]
    want = alone(name, cases[name])
    limit = 1e-9 if want.meta["estimator"] == "minibatch" else 1e-6
    for rank in range(size):
        got = Report.load(folder / f"{rank}.npz")
        np.testing.assert_allclose(got.cka, want.cka, rtol=0, atol=limit)
        np.testing.assert_allclose(got.stderr, want.stderr, rtol=0, atol=limit)
        for meta in (want.meta, got.meta):
            meta["versions"].pop("timm", None)  # named where it was imported, as here by others
        if "sketch" in want.meta:  # sums of another order, in float32
            errors = (np.array(meta.pop("sketch")["stderr"], float) for meta in (
                {**want.meta}, got.meta))  # fmt: skip
            np.testing.assert_allclose(*errors, rtol=0, atol=1e-4)
        differ = {k for k in want.meta if want.meta[k] != got.meta.get(k, want.meta[k])}
        assert differ <= {"seconds", "processes", "estimator_why"}
        assert got.meta["processes"] == size


def test_the_cases_are_what_they_say(alone, cases):
    assert alone("rbf-early", cases["rbf-early"]).meta["n_images"] > 256 > 42
    bad = alone("bad-images", cases["bad-images"]).meta
    assert len(bad["left_out"]) == 8  # two batches of four, with three readable images or fewer
    assert bad["n_images"] == 14


@pytest.mark.parametrize("name", DEATHS)
def test_a_process_that_dies_ends_the_others(done, name):
    folder, statuses, seconds = done[name]
    victim = DEATHS[name]["faults"][0][0]
    assert statuses[victim] == -9
    assert [status for rank, status in enumerate(statuses) if rank != victim] == [1, 1]
    assert seconds < 30
    for rank in {0, 1, 2} - {victim}:
        text = (folder / f"{rank}.txt").read_text()
        assert text.startswith("LostRankError: "), text
        assert text.count(": ") >= 3, text


def test_an_error_of_one_ends_the_others_which_leave_it_to_speak(done):
    folder, statuses, seconds = done["fails"]
    assert statuses == [1, 1, 1]
    assert "bad luck" in (folder / "1.txt").read_text()
    for rank in (0, 2):
        assert "LostRankError: another process was lost" in (folder / f"{rank}.txt").read_text()
    assert seconds < 40


def test_a_slow_process_is_waited_for(done, alone):
    folder, statuses, seconds = done["slow"]
    assert statuses == [0, 0, 0], [p.read_text() for p in folder.glob("*.txt")]
    assert seconds > 3
    assert np.abs(Report.load(folder / "0.npz").cka - alone("linear", {}).cka).max() < 1e-9


def test_meeting_after_every_round_changes_nothing(done, alone, place):
    folder, statuses, _ = done["interval"]
    assert statuses == [0, 0, 0]
    assert np.abs(Report.load(folder / "0.npz").cka - alone("linear", {}).cka).max() < 1e-9
    assert [path.name for path in (place / "interval-out").iterdir()] == ["report.npz"]


@pytest.mark.parametrize(("name", "what"), [("other-network", "views.16.model"),
                                            ("other-option", "seed")])  # fmt: skip
def test_processes_that_differ_are_refused(done, name, what):
    folder, statuses, _ = done[name]
    assert statuses == [1, 1, 1]
    text = (folder / "0.txt").read_text()
    assert text.startswith(f"ValueError: processes differ: {what}"), text
    assert "on rank 1" in text


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_shared_run_is_resumed_by_any_number(done, place, alone, size, tmp_path):
    assert done["dies-saving"][1][0] == -9
    out = tmp_path / "out"
    shutil.copytree(place / "dies-saving-out", out)
    assert (out / "state.npz").exists()
    if size == 1:
        report = call({}, out=out, resume=True)
    else:
        job = {"size": 2, "probe": {"out": str(out), "resume": True}, "out": str(tmp_path / "two")}
        job["say"] = True
        assert run_jobs([job], tmp_path)[0]["statuses"] == [0, 0]
        report = Report.load(out / "report.npz")
        said = (tmp_path / "two" / "0.said").read_text()
        start = report.meta["resumed_from_batch"]
        assert said.splitlines()[-1] == f"resumed from batch {start} of 10"
        assert not (tmp_path / "two" / "1.said").read_text()
    assert report.meta["resumed_from_batch"] == 3
    assert np.abs(report.cka - alone("linear", {}).cka).max() < 1e-9
