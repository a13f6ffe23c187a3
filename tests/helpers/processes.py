"""Jobs that processes share, or die in: forked from one interpreter, so that imports are paid once.

`run_jobs` starts that interpreter. A job is {"size": processes, "out": folder, "probe": options,
"faults": what happens to whom}; each process leaves its report as RANK.npz, or what it raised as
RANK.txt, in `out`. With "cli", the words of a command line, it leaves RANK.out and RANK.err.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cka_probe import probe
from cka_probe.cli.main import main
from cka_probe.distributed import ranks
from cka_probe.probing import state

ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    """Takes any size; a layer that is small, one that is wide."""

    def __init__(self, extra=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            self.head.bias += extra

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def images(n=42):
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 3, 4, 4, generator=g)
    return F.interpolate(coarse, 16, mode="bilinear") + 0.2 * torch.randn(n, 3, 16, 16, generator=g)


def damaged_folder(folder, n, bad):
    """A folder of n images of which those at the places `bad` in the run's order are no images."""
    from cka_probe.inputs.batches import order

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    for place in bad:
        (folder / f"{order(n, 0)[place]:03}.png").write_bytes(b"no image")
    return folder


def call(options, **more):
    """The probe of a job."""
    options = {"batch_size": 4, "layers": ["stem", "block", "head"], **options, **more}
    data = options.pop("images", 42)
    data = images(data) if isinstance(data, int) else data
    net = Net(options.pop("extra", 0.0))
    return probe(net, data, options.pop("scales", [8, 16]), progress=False, **options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(faults, rank):
    """Make what is to happen happen: [rank, what, count, seconds]."""
    for whom, what, count, seconds in faults:
        if whom == rank:
            happen = {
                "kill": die,
                "fail": lambda: (_ for _ in ()).throw(ValueError("bad luck: 7: try again")),
                "sleep": lambda seconds=seconds: time.sleep(seconds),
            }
            place, _, fault = what.rpartition(" ")
            _after(*PLACES[place or "forward"], count, happen[fault])


def _after(owner, name, count, happen):
    """Before the `count`-th call; a negative one: after it; "half": when it has half written."""
    whole, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            happen()
        value = whole(*args, **kwargs)
        if calls[0] == -count:
            happen()
        return value

    setattr(owner, name, wrapped)


PLACES = {
    "forward": (Net, "forward"),
    "save": (state.Saver, "save"),
    "write": (state, "save_npz"),
    "bytes": (np, "savez_compressed"),
    "sync": (os, "fsync"),
}


def end(job, status):
    """As an interpreter ends, which takes seconds, where the job asks for it; else at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if job.get("ends_fully"):
        sys.exit(status)
    os._exit(status)


def work(job, rank):
    """What one process of a job does."""
    out = Path(job["out"])
    out.mkdir(exist_ok=True)
    os.environ["CKA_PROBE_SAVE_EVERY_S"] = str(job.get("save_every_s", 1e9))
    state._SHARE = 0
    ranks._GRACE_S = 0.2
    arrange(job.get("faults", []), rank)
    if "cli" in job:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(out / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
        status = main(job.get("of_rank", {}).get(str(rank), job["cli"]))
        end(job, status)
    try:
        options = {**job["probe"], **job.get("of_rank", {}).get(str(rank), {})}
        with ranks.started(torch.device("cpu")) as mine:
            said = []
            report = call(options, ranks=mine, say=said.append if job.get("say") else None)
        report.save(out / f"{rank}.npz")
        (out / f"{rank}.said").write_text("\n".join(said))
    except Exception as error:
        (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        end(job, 1)
    end(job, 0)


def fork(jobs):
    torch.set_num_threads(1)
    for job in jobs:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        began, pids = time.monotonic(), []
        for rank in range(job["size"]):
            pid = os.fork()
            if pid == 0:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(job["size"]), "MASTER_PORT": str(port),
                    "MASTER_ADDR": "localhost", "LOCAL_RANK": str(rank),
                }  # fmt: skip
                work(job, rank)
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses, "seconds": time.monotonic() - began}), flush=True)


def run_jobs(jobs, folder, timeout=300):
    """Start the interpreter that forks; {"statuses": exit codes by rank, "seconds"} of each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "jobs.json")],
        capture_output=True, text=True, check=False, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    fork(json.loads(Path(sys.argv[1]).read_text()))
