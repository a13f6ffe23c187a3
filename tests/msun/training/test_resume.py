"""A run that is killed, at any moment and any number of times, ends as one that was left alone."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import SCALES, backbone, images, network, options, run, same, weights

from msun.network import checkpoint
from msun.network.builder import build
from msun.network.policy import POLICIES
from msun.training.trainer import train

ROOT = Path(__file__).resolve().parents[3]

# One interpreter, and a fork for each run: a child kills itself at its moment.
SCRIPT = """
import json, os, signal, sys
import torch

torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from msun.network import checkpoint
from msun.training import step as training_step
from msun.training import state as train_state
import training

first = training.network()  # one for all: a child's changes are its own
training.network = lambda *args, **kwargs: first


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner, name, count, *, before=False, half=False):
    whole, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and half:
            torch.save = lambda content, file: (file.write(b"PK half"), file.flush(), die())
        if calls[0] == count and before:
            die()
        out = whole(*args, **kwargs)
        if calls[0] == count:
            die()
        return out

    setattr(owner, name, wrapped)


PLACES = {{
    "step": (training_step.TrainingStep, "run"),
    "save": (train_state, "save_state"),
    "metrics": (train_state, "write_metrics"),
    "config": (train_state, "write_config"),
    "model": (checkpoint, "save"),
}}
for out, place, count, how, options in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        try:
            after(*PLACES[place], count, **{{how: True}} if how else {{}})
            training.run(out, **options)
        finally:
            os._exit(9)
    status = os.waitpid(pid, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""

# A run has 3 epochs of 5 steps.
MOMENTS = [
    ("config", 1, "", {}),
    ("step", 1, "", {}),
    ("step", 4, "", {"save_every_s": 0.0}),
    ("step", 7, "", {"save_every_s": 3600.0}),
    ("step", 12, "before", {"save_every_s": 0.0}),
    ("save", 3, "half", {"save_every_s": 0.0}),
    ("save", 1, "half", {"save_every_s": 3600.0}),
    ("save", 8, "", {"save_every_s": 0.0}),
    ("metrics", 2, "", {}),
    ("metrics", 3, "", {}),
    ("save", 3, "", {"save_every_s": 3600.0}),
    ("model", 1, "before", {}),
    ("model", 1, "half", {}),
    ("model", 1, "", {}),
]


def kill(jobs):
    script = SCRIPT.format(here=str(ROOT / "tests" / "helpers"))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(jobs)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(jobs), done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One folder for each moment, as the killed run left it."""
    folders = [tmp_path_factory.mktemp("killed") / "out" for _ in MOMENTS]
    kill([(str(out), *moment) for out, moment in zip(folders, MOMENTS, strict=True)])
    return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was left alone: weights, metrics without the seconds."""
    model, path = run(tmp_path_factory.mktemp("whole") / "out")
    return weights(model), numbers(path.parent)


def numbers(out):
    rows = [line.rsplit(",", 1) for line in (out / "metrics.csv").read_text().splitlines()]
    assert rows[0][1] == "seconds"
    return [row[0] for row in rows]


@pytest.mark.parametrize("k", range(len(MOMENTS)), ids=lambda k: "-".join(map(str, MOMENTS[k][:3])))
def test_a_killed_run_ends_as_if_left_alone(killed, whole, k):
    out = killed[k]
    before = {path.name for path in out.iterdir()}
    assert ("model.pt" in before) == (MOMENTS[k][:3] == ("model", 1, ""))
    model, path = run(out, resume=True)
    assert same(weights(model), whole[0])
    assert same(checkpoint.read(path)["state"], whole[0])
    assert numbers(out) == whole[1]
    left = {path.name for path in out.iterdir()}
    assert left - {"state.pt"} == {"model.pt", "metrics.csv", "config.json"}
    assert ("state.pt" in left) == ("model.pt" in before)


def test_killed_again_and_again(tmp_path, whole):
    out = tmp_path / "out"
    jobs = [(str(out), "step", 3, "", {"save_every_s": 0.0, "resume": True})] * 4
    kill(jobs)  # each falls back by the step that was not saved: 2 steps further
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 8
    model, _ = run(out, resume=True)
    assert same(weights(model), whole[0])
    assert numbers(out) == whole[1]


def test_the_options_of_saving_change_nothing(tmp_path, whole):
    model, _ = run(tmp_path / "out", save_every_s=0.0, workers=2)
    assert same(weights(model), whole[0])


def test_a_run_in_one_shard_or_with_fp16_resumes_too(tmp_path):
    for k, more in enumerate(({"shards": 2}, {"amp": "bf16"}, {"max_steps": 9}, {"ema": None})):
        model, _ = run(tmp_path / f"whole{k}", **more)
        out = tmp_path / f"cut{k}"
        interrupt(out, 7, **more)
        again, _ = run(out, resume=True, **more)
        assert same(weights(again), weights(model)), more


def interrupt(out, step, **more):
    """Stop a run by an exception after a step that was saved."""
    from msun.training.step import TrainingStep

    whole = TrainingStep.run

    def stopping(self, *args):
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(out, save_every_s=0.0, **more)
    assert (out / "state.pt").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "out"
    interrupt(out, 6)
    return out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.06}, r"lr was 0\.05, is 0\.06"),
        ({"seed": 1}, "(data|seed) was "),
        ({"epochs": 4}, "epochs was 3, is 4"),
        ({"max_steps": 9}, "max_steps was None, is 9"),
        ({"constraint": "raw"}, "constraint was 'normalised', is 'raw'"),
        ({"flip": True}, "flip was None, is True"),
        ({"shards": 2}, "shards was 1, is 2"),
        ({"scales": (8, 12, 16)}, r"(model\.sha256|scales) was "),
        ({"preset": "paper"}, "(between|constraint|model) was "),
        ({"data": images(seed=1)}, r"data\.sha256 was "),
        ({"data": images(n=52)}, r"data\.images was 48, is 52"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_by_name(interrupted, changes, named):
    with pytest.raises(ValueError, match=f"^saved state of another run: {named}"):
        run(interrupted, resume=True, **changes)


def test_another_start_is_refused(interrupted):
    model = network()
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"saved state of another run: model\.sha256 was "):
        train(model, images(), options(interrupted, resume=True))


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"inputs": "scale"}, r"policy\.inputs was 'small', is 'scale'"),
        ({"routing": "up"}, r"policy\.routing was 'nearest', is 'up'"),
        ({"antialias": False}, r"policy\.antialias was True, is False"),
    ],
)
def test_another_policy_is_refused_though_its_modules_are_the_same(interrupted, choices, named):
    model = build(backbone(), "stem", SCALES, policy=POLICIES["lean"].but(**choices))
    with pytest.raises(ValueError, match=f"^saved state of another run: {named}"):
        train(model, images(), options(interrupted, resume=True))


def test_runs_of_earlier_versions_go_on(tmp_path):
    """They knew neither sizes between the scales nor all of today's choices."""
    how = {"preset": "paper", "max_steps": 4, "between": None}
    whole, _ = run(tmp_path / "whole", **how)
    interrupt(tmp_path / "cut", 2, **how)
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    told = json.loads(state["run"])
    for run_of in (told, config["run"]):
        assert run_of["between"] == 0.0
        del run_of["between"], run_of["policy"]
    state["run"] = json.dumps(told)
    torch.save(state, tmp_path / "cut" / "state.pt")
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    model, path = run(tmp_path / "cut", resume=True, **how)
    assert same(weights(model), weights(whole))
    kept = torch.load(path, weights_only=True)
    del kept["network"]["policy"]["inputs"], kept["network"]["policy"]["strides"]
    torch.save(kept, tmp_path / "whole" / "model.pt")
    again, _ = run(tmp_path / "whole", resume=True, **how)
    assert same(weights(again), weights(whole))
    with pytest.raises(
        ValueError, match=r"^finished run of another run: between was 0\.0, is 0\.5"
    ):
        run(tmp_path / "whole", resume=True, **{**how, "between": 0.5})


def test_where_and_how_may_change(interrupted, whole, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(interrupted, out)
    model, _ = run(out, resume=True, workers=1, save_every_s=9.0, device="cpu")
    assert same(weights(model), whole[0])


def test_without_resume_what_is_there_is_refused(interrupted, tmp_path):
    with pytest.raises(ValueError, match=r"^a run is there already: .*state.pt: resume "):
        run(interrupted)
    _, path = run(tmp_path / "out", max_steps=2)
    with pytest.raises(ValueError, match=r"^a run is there already: .*model.pt: resume "):
        run(tmp_path / "out", max_steps=2)
    stamp = path.stat().st_mtime_ns
    model, again = run(tmp_path / "out", max_steps=2, overwrite=True)
    assert again.stat().st_mtime_ns > stamp
    assert same(checkpoint.read(again)["state"], weights(model))


def test_a_finished_run_returns_at_once(tmp_path, monkeypatch):
    model, path = run(tmp_path / "out", max_steps=2)
    stamp = path.stat().st_mtime_ns
    monkeypatch.setattr("msun.training.step.TrainingStep.run", None)
    again, there = run(tmp_path / "out", max_steps=2, resume=True)
    assert there == path
    assert path.stat().st_mtime_ns == stamp
    assert same(weights(again), weights(model))
    assert again.spec == model.spec != {}  # mean, std and classes, which `evaluate` asks for
    with pytest.raises(ValueError, match=r"^finished run of another run: lr was "):
        run(tmp_path / "out", max_steps=2, resume=True, lr=0.01)


@pytest.mark.parametrize("content", [b"", b"PK half", b"\x80\x02}q\x00."])
def test_damaged_states_are_named(interrupted, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    whole = (interrupted / "state.pt").read_bytes()
    (out / "state.pt").write_bytes(content + (whole[6:-2000] if content == b"" else b""))
    with pytest.raises(ValueError, match=r"^saved state cut short or damaged: .*state.pt: "):
        run(out, resume=True)


def test_overwrite_begins_anew(interrupted, tmp_path, whole):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    model, _ = run(out, overwrite=True)
    assert same(weights(model), whole[0])
    with pytest.raises(ValueError, match="resume and overwrite: both are on: "):
        replace(options(out), resume=True, overwrite=True)


def test_flipped_bits_of_a_state_are_noticed(interrupted, tmp_path):
    """In the weights, where torch reads them as other weights."""
    out = tmp_path / "out"
    out.mkdir()
    flipped = bytearray((interrupted / "state.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (out / "state.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"^saved state cut short or damaged: .*state.pt: "):
        run(out, resume=True)


def test_a_full_disk_ends_a_run_and_its_last_state_stays(interrupted, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    good = (out / "state.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # files cannot grow any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            run(out, resume=True, save_every_s=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename.endswith("state.pt")
    assert (out / "state.pt").read_bytes() == good
    model, _ = run(out, resume=True)
    assert same(weights(model), whole[0])
