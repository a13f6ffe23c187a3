"""What a probe costs: time against the bare forwards and against the libraries in use, with errors.

    pip install -e '.[bench]'
    python experiments/bench_probe.py [JOB ...] [--repeats 7] [--threads 1,2]

Contenders of a job take turns within one process, so that a busy machine slows all of them alike;
a row gives the ratio of the best times of all turns, by the clock and by CPU seconds (the steadier
one where the cores are shared), the peak memory of one call above that of its inputs (in a process
of its own), and the largest error of the matrix against float64 (tests/oracle.py). Ratios are
written to results/bench_probe.csv after each job. Random weights and noise images: nothing here
depends on values. `bare` is the forward passes alone under `inference_mode`.
"""

import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cka_probe
from cka_probe.images import order

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
RESULTS = HERE / "results" / "bench_probe.csv"
FIELDS = ("job", "threads", "contender", "against", "clock_ratio", "cpu_ratio", "peak_mib",
          "max_error", "repeats", "torch")  # fmt: skip
Call = Callable[[], Any]  # -> (m, m) matrix of CKA, or None for the bare forwards


class Job(NamedTuple):
    """Contenders by name, what their ratios are to, and the truth of the matrix."""

    calls: dict[str, Call]
    against: tuple[str, ...]
    truth: Callable[[], np.ndarray]
    once: tuple[str, ...] = ()  # too slow for turns: timed once


def loader(images: Tensor, batch: int) -> DataLoader[Any]:
    labels = torch.zeros(len(images), dtype=torch.long)
    return DataLoader(TensorDataset(images, labels), batch)


def bare(model: nn.Module, images: list[Tensor], batch: int) -> None:
    with torch.inference_mode():
        for view in images:
            for part in view.split(batch):
                model(part)


def by_pytorch_cka(model: nn.Module, layers: list[str], images: Tensor, batch: int) -> Tensor:
    lib = importlib.import_module("cka")
    how = {"layers": layers, "device": "cpu", "progress": False}
    (matrix,) = lib.compute_cka(model, model, loader(images, batch), **how)
    return matrix


def by_torch_cka(model: nn.Module, layers: list[str], views: list[Tensor], batch: int) -> Tensor:
    """Every pair of views, each a comparison of its own: it compares two inputs at a time."""
    lib, m = importlib.import_module("torch_cka"), len(layers)
    out = torch.ones(len(views) * m, len(views) * m)
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        for i in range(len(views)):
            for j in range(i + 1):
                run = lib.CKA(model, model, "a", "b", layers, layers, device="cpu")
                run.compare(loader(views[i], batch), loader(views[j], batch))
                cells = run.export()["CKA"]
                out[i * m : (i + 1) * m, j * m : (j + 1) * m] = cells
                out[j * m : (j + 1) * m, i * m : (i + 1) * m] = cells.T
    return out


def sizes(images: Tensor, sides: list[int]) -> list[Tensor]:
    how = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return [functional.interpolate(images, (s, s), **how) for s in sides]


def truth_of(model: nn.Module, layers: list[str], views: list[Tensor], batch: int) -> np.ndarray:
    """Float64 Grams of cloned outputs, HSIC by Song's three terms, batches weighted by size."""
    oracle = importlib.import_module("oracle")
    modules, kept = dict(model.named_modules()), dict[str, Tensor]()
    hooks = [
        modules[name].register_forward_hook(
            lambda _m, _x, out, name=name: kept.__setitem__(name, out.clone())
        )
        for name in layers
    ]
    total: Any = 0.0
    for parts in zip(*(view.split(batch) for view in views), strict=True):
        grams = []
        for part in parts:
            with torch.inference_mode():
                model(part)
            grams += [oracle.shifted(oracle.gram(kept[name].flatten(1))) for name in layers]
        pairs = [[oracle.hsic1(a, b) if i >= j else 0.0 for j, b in enumerate(grams)]
                 for i, a in enumerate(grams)]  # fmt: skip
        total = total + len(parts[0]) * np.array(pairs)
    for hook in hooks:
        hook.remove()
    total = np.tril(total) + np.tril(total, -1).T
    scale = np.sqrt(np.diag(total))
    return np.asarray(total / scale[:, None] / scale[None])


def network_job(model: nn.Module, layers: list[str], n: int, side: int, batch: int) -> Job:
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    ordered = images[order(n, 0)]  # the others' batches hold the same images as ours
    model.eval()

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, [ordered], batch),
            "cka-probe": ours,
            "pytorch-cka": lambda: by_pytorch_cka(model, layers, ordered, batch),
        },
        ("bare", "pytorch-cka"),
        lambda: truth_of(model, layers, [ordered], batch),
    )


def resnet18() -> Job:
    model = torchvision.models.resnet18()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "down" not in n]
    return network_job(model, [*convs, "fc"], 512, 64, 64)


def blocks(model: nn.Module) -> list[str]:
    return ["maxpool", *(n for n, m in model.named_modules() if type(m).__name__ == "Bottleneck")]


def resnet50_blocks() -> Job:
    model = torchvision.models.resnet50()
    return network_job(model, blocks(model), 64, 224, 32)


def resnet50_convs() -> Job:
    model = torchvision.models.resnet50()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return network_job(model, convs, 256, 64, 64)


def eight_scales() -> Job:
    model = torchvision.models.resnet50().eval()
    sides, layers, batch = [32, 40, 48, 56, 64, 72, 80, 96], blocks(model), 64
    images = torch.randn(256, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    views = sizes(images[order(256, 0)], sides)

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, sides, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, views, batch),
            "cka-probe": ours,
            "torch-cka": lambda: by_torch_cka(model, layers, views, batch),
        },
        ("bare", "torch-cka"),
        lambda: truth_of(model, layers, views, batch),
        once=("torch-cka",),
    )


def features(n: int, widths: list[int], kernel: str = "linear") -> Job:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 32, generator=g)
    kept = {
        f"layer {k}": shared @ torch.randn(32, d, generator=g) / 4 + torch.randn(n, d, generator=g)
        for k, d in enumerate(widths)
    }

    def ours(kernel: str) -> np.ndarray:
        return cka_probe.cka_matrix(kept, kernel=kernel).cka

    def truth() -> np.ndarray:
        oracle = importlib.import_module("oracle")
        grams = (oracle.shifted(oracle.gram(x, kernel)) for x in kept.values())
        centred = np.stack([centre(k).ravel() for k in grams])
        hsic = centred @ centred.T
        scale = np.sqrt(np.diag(hsic))
        return np.asarray(hsic / scale[:, None] / scale[None])

    if kernel == "rbf":
        calls: dict[str, Call] = {
            "cka-probe": lambda: ours("rbf"),
            "linear": lambda: ours("linear"),
        }
        return Job(calls, ("linear",), truth)

    def theirs() -> Any:
        return importlib.import_module("cka").cka_from_features(*[list(kept.values())] * 2)

    calls = {"cka-probe": lambda: ours("linear"), "pytorch-cka": theirs}
    return Job(calls, ("pytorch-cka",), truth)


def centre(k: np.ndarray) -> np.ndarray:
    """U-centring, in place of a float64 Gram (n, n) (Székely & Rizzo 2014)."""
    n = len(k)
    np.fill_diagonal(k, 0)
    rows = k.sum(0) / (n - 2)
    k -= rows[:, None]
    k -= rows[None]
    k += rows.sum() / (n - 1)
    np.fill_diagonal(k, 0)
    return k


def twenty() -> list[int]:
    return [round(64 * 64 ** (k / 19)) for k in range(20)]


JOBS: dict[str, Callable[[], Job]] = {
    "resnet18@64, 18 layers, 512 images": resnet18,
    "resnet50@224, 17 blocks, batch 32": resnet50_blocks,
    "resnet50@64, 53 convolutions": resnet50_convs,
    "8 scales x 17 blocks, 256 images": eight_scales,
    "features, n = 2048, 20 layers": lambda: features(2048, twenty()),
    "features, n = 10000, 6 layers": lambda: features(10000, [64, 128, 256, 512, 1024, 2048]),
    "rbf features, n = 2048, 20 layers": lambda: features(2048, twenty(), "rbf"),
}


def timed(call: Call) -> tuple[float, float, Any]:
    clock, cpu = time.perf_counter(), time.process_time()
    out = call()
    return time.perf_counter() - clock, time.process_time() - cpu, out


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One job: warm-up, turns, ratios of minima."""
    torch.set_num_threads(threads)
    job = JOBS[name]()
    best: dict[str, list[float]] = {}
    matrices: dict[str, Any] = {}
    turns = dict.fromkeys(job.calls, repeats + 1) | dict.fromkeys(job.once, 1)
    for turn in range(repeats + 1):
        for who, call in job.calls.items():
            if turn >= turns[who]:
                continue
            clock, cpu, matrices[who] = timed(call)
            if turn or turns[who] == 1:  # the first turn warms up
                low = best.setdefault(who, [math.inf, math.inf])
                best[who] = [min(low[0], clock), min(low[1], cpu)]
    truth = job.truth()
    rows = []
    for who in job.calls:
        error = peak = ""
        if matrices[who] is not None and who != "linear":
            error = f"{np.abs(np.asarray(matrices[who], dtype=float) - truth).max():.1e}"
        if who != "linear":
            peak = f"{peak_mib(name, who, threads):.0f}"
        for other in job.against if who == "cka-probe" else ():
            ratio = [f"{a / b:.3f}" for a, b in zip(best[who], best[other], strict=True)]
            rows.append([who, other, *ratio, peak, error, turns[other] - (turns[other] > 1)])
        if who != "cka-probe":
            base = job.against[0]
            ratio = [f"{a / b:.3f}" for a, b in zip(best[who], best[base], strict=True)]
            rows.append([who, base, *ratio, peak, error, turns[who] - (turns[who] > 1)])
    return [dict(zip(FIELDS, [name, threads, *r, torch.__version__], strict=True)) for r in rows]


def peak_mib(name: str, who: str, threads: int) -> float:
    """Peak memory of one call above what the process held before it, in a process of its own."""
    words = [sys.executable, __file__, "--peak", json.dumps([name, who, threads])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(name: str, who: str, threads: int) -> None:
    torch.set_num_threads(threads)
    call = JOBS[name]().calls[who]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = peak_kib()
    call()
    print((peak_kib() - before) / 1024)


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="part of a name; all where none")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", default="1", help="such as 1,2")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        return print_peak(*json.loads(args.peak))
    chosen = [n for n in JOBS if not args.jobs or any(word in n for word in args.jobs)]
    for threads in map(int, args.threads.split(",")):
        for name in chosen:
            rows = measure(name, threads, args.repeats)
            keep = []
            if RESULTS.exists():
                with RESULTS.open(newline="") as file:
                    keep = [r for r in csv.DictReader(file)
                            if (r["job"], r["threads"]) != (name, str(threads))]  # fmt: skip
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows([*keep, *rows])
            for row in rows:
                print(" | ".join(str(row[field]) for field in FIELDS[:-1]), flush=True)
    return None


if __name__ == "__main__":
    main()
