"""What a run costs in several processes: the terms of the cost model in docs/scaling.md, measured.

    python experiments/scaling.py            # a few minutes; one thread a process, 1 and 2 of them

Writes results/scaling.csv, a row per measured term: what the model says and what was seen. Wall
times on a busy machine mean little: CPU seconds and bytes are what to look at.
"""

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from cka_probe import probe
from cka_probe.distributed import ranks
from cka_probe.engine.hsic import hsic_pairs
from cka_probe.engine.minibatch import Minibatch
from cka_probe.inputs import glyphs
from cka_probe.inputs.batches import open_images, order, plan
from cka_probe.probing import state
from cka_probe.probing.state import Saver

HERE = Path(__file__).resolve().parent
IMAGES, SCALES, BATCH, SKETCH = 512, [32, 48, 64], 64, 128
GROUPS = 32


def worker(out: str, estimator: str) -> None:
    """One process of a run: its bytes, CPU seconds and peak memory."""
    torch.set_num_threads(1)
    sent = {"all_reduce": 0, "send": 0}
    for name in sent:
        whole = getattr(dist, name)

        def counted(x, *args, name=name, whole=whole, **kwargs):
            sent[name] += x.numel() * x.element_size()
            return whole(x, *args, **kwargs)

        setattr(dist, name, counted)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    images = glyphs.tensor("test", IMAGES, 0)[0]
    more = {"sketch_size": SKETCH} if estimator == "sketch" else {}
    with ranks.started(torch.device("cpu")) as mine:
        began, before = time.perf_counter(), time.process_time()
        report = probe(model, images, SCALES, estimator=estimator, batch_size=BATCH,
                       progress=False, ranks=mine, **more)  # fmt: skip
        told = {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - before,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "entries": len(report.layer),
            **sent,
        }
        np.save(f"{out}.{mine.rank}.npy", report.cka)
    Path(f"{out}.{mine.rank}.json").write_text(json.dumps(told))


def launch(n: int, estimator: str, folder: Path) -> list[dict]:
    """Run `worker` in n processes."""
    out = folder / f"{estimator}-{n}-{time.monotonic_ns()}"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         __file__, "worker", str(out), estimator],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(n)]
    told[0]["cka"] = np.load(f"{out}.0.npy")
    return told


def reduce_rate(folder: Path) -> float:
    """Bytes a second of an all-reduce of two processes on this machine."""
    script = (
        "import time, torch, torch.distributed as d; d.init_process_group('gloo');"
        "x = torch.zeros(2**22, dtype=torch.float64); d.all_reduce(x); t = time.perf_counter();"
        "[d.all_reduce(x) for _ in range(5)]; t = (time.perf_counter() - t) / 5;"
        f"d.get_rank() or open(r'{folder}/rate', 'w').write(str(x.numel() * 8 / t));"
        "d.destroy_process_group()"
    )
    (folder / "rate.py").write_text(script)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(folder / "rate.py")],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return float((folder / "rate").read_text())


class Many(torch.utils.data.Dataset):
    """A million images, all alike."""

    def __len__(self):
        return 1_000_000

    def __getitem__(self, k):
        return torch.zeros(3, 8, 8)


def names() -> float:
    """Bytes a process keeps of each image: its name, its place in the order and in a batch."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = resident()
    source = open_images(Many())
    shuffled = order(len(source), 0)
    rows = [shuffled[part] for part in plan(len(source), BATCH)]
    return (resident() - before) / sum(map(len, rows))


def best(call, times: int = 3) -> float:
    """Least CPU seconds of some calls."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    rows: list[dict] = []

    def row(what: str, model: float | str, seen: float, unit: str, note: str = "") -> None:
        shown = f"{model:.4g}" if isinstance(model, float | int) else model
        rows.append({"what": what, "model": shown, "seen": f"{seen:.4g}", "unit": unit,
                     "note": note})  # fmt: skip
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for estimator in ("minibatch", "sketch"):
            runs = {n: [launch(n, estimator, folder) for _ in range(2)] for n in (1, 2)}
            one, two = (min(runs[n], key=lambda told: sum(r["cpu"] for r in told)) for n in (1, 2))
            m = one[0]["entries"]
            row(f"{estimator}: |CKA of 2 - CKA of 1|", 0,
                float(np.nanmax(np.abs(one[0]["cka"] - two[0]["cka"]))), "")  # fmt: skip
            row(f"{estimator}: CPU of 2 processes / CPU of 1", 1.0,
                sum(r["cpu"] for r in two) / one[0]["cpu"], "",
                f"{IMAGES} images, {m} entries, best of 2")  # fmt: skip
            fastest = [min(max(r["seconds"] for r in told) for told in runs[n]) for n in (1, 2)]
            row(f"{estimator}: wall of 2 / wall of 1", 0.5, fastest[1] / fastest[0], "",
                "on a shared machine of 2 cores")  # fmt: skip
            row(f"{estimator}: peak of rank 1 of 2 / of 1 process", "at most 1",
                two[1]["peak"] / one[0]["peak"], "")  # fmt: skip
            if estimator == "minibatch":
                met = 2  # after the first round, and at the end
                state_bytes = 8 * (groups_of(IMAGES) * (m * m + 2 * m + 1))
                row("minibatch: numbers all-reduced", met * state_bytes, two[0]["all_reduce"],
                    "bytes a process", "meetings x 8 G (m^2 + 2 m + 1)")  # fmt: skip
            else:
                batches = IMAGES // BATCH // 2
                width = BATCH * 4 * SKETCH + 8 * SKETCH + 8
                row("sketch: sent by rank 1", batches * m * width, two[1]["send"],
                    "bytes", "its batches x m (4 b k + 8 k + 8)")  # fmt: skip
        row("names of images", "", names(), "bytes an image and process", "a Dataset of a million")
        m = 800
        stack = torch.randn(m, BATCH, BATCH, dtype=torch.float64)
        stack = stack + stack.transpose(1, 2)
        taken = best(lambda: hsic_pairs(stack))
        rate = f"{2 * m * m * BATCH**2 / taken / 1e9:.0f} GFLOP/s in float64"
        row("minibatch: all pairs of a batch, m = 800, b = 64", "2 m^2 b^2 = 5.2 GFLOP",
            taken, "CPU s", rate)  # fmt: skip
        sums = Minibatch(1000)
        sums.begin([("view", (str(k), "", 0)) for k in range(m)])
        filled = np.random.default_rng(0).normal(size=sums.hsic.shape)
        sums.hsic += filled + filled.transpose(0, 2, 1)
        row("minibatch: state, m = 800", 8 * GROUPS * (m * m + 2 * m + 1),
            sums.hsic.nbytes + sums.floor.nbytes + sums.varied.nbytes + sums.weight.nbytes,
            "bytes")  # fmt: skip
        saver = Saver(folder, {}, 1000)
        taken = best(lambda: saver.save(sums, 1, []), 2)
        row("minibatch: saving it", "", taken, "CPU s", "compressed; at most a 20th of the time")
        row("minibatch: its file", "", (folder / state.STATE).stat().st_size, "bytes")
        row("all-reduce of 2 processes, gloo, one machine", "", reduce_rate(folder), "bytes/s",
            "32 MiB pieces")  # fmt: skip
    with (HERE / "results" / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def groups_of(n: int) -> int:
    """Groups of batches that n images make."""
    return min(GROUPS, n // BATCH)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
