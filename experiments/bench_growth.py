"""How the cost of a probe grows, and its share of the matrix product that it cannot do without.

    python experiments/bench_growth.py [--repeats 7] [--threads 1]

**Growth.** The network's forward costs nothing here: every layer hands on ready-made maps, so what
is measured is the probe alone. One of images, layers, sizes, batch and width is doubled at a time
(512 images, 20 layers, one size, batches of 64, 8,192 numbers a map); the exponent is that of the
upper half of the points, by least squares on logarithms. -> results/bench_growth.csv,
figures/bench_growth.png

**Share of the matrix product.** The maps of real networks, as they arrive in the hooks: seconds for
their Grams with centring and float64 sums, against a plain `torch.mm` of the same maps with
themselves in the same turns. Above 1: faster than that product. -> results/bench_gemm.csv
"""

import argparse
import csv
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from bench_jobs import blocks
from torch import Tensor, nn

import cka_probe
from cka_probe.activations.hooks import Collector
from cka_probe.engine.batch_gram import gram_of_batch
from cka_probe.engine.kernels import get_kernel
from cka_probe.engine.products import matmul_t

HERE = Path(__file__).resolve().parent
BASE = {"images": 512, "layers": 20, "sizes": 1, "batch": 64, "width": 8192}
AXES = {
    "images": [64, 128, 256, 512, 1024, 2048, 4096],
    "layers": [5, 10, 20, 40, 80, 160, 320],
    "sizes": [1, 2, 4, 8, 16],
    "batch": [8, 16, 32, 64, 128, 256, 512],
    "width": [64, 256, 1024, 4096, 8192, 16384, 32768, 65536],
}


class Ready(nn.Module):
    """A network whose layers put out maps that are there already."""

    def __init__(self, layers: int, batch: int, width: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(layers))
        generator = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(batch, width, generator=generator) for _ in range(min(layers, 4))]

    def forward(self, x: Tensor) -> Tensor:
        for k, tap in enumerate(self.taps):
            tap(self.maps[k % len(self.maps)][: len(x)])
        return x


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each, in turns."""
    best = dict.fromkeys(calls, math.inf)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:  # the first one warms up
                best[name] = min(best[name], time.process_time() - began)
    return best


def growth(axis: str, values: list[int], repeats: int) -> list[float]:
    calls = {}
    for value in values:
        ask = BASE | {axis: value}
        model = Ready(ask["layers"], ask["batch"], ask["width"])
        images = torch.zeros(ask["images"], 3, 4, 4)
        layers = [f"taps.{k}" for k in range(ask["layers"])]
        views = {f"size {k}": (model, lambda x: x) for k in range(ask["sizes"])}
        how = {"layers": layers, "batch_size": ask["batch"], "views": views, "progress": False}
        calls[str(value)] = lambda images=images, how=how: cka_probe.probe(None, images, **how)
    return list(fastest(calls, repeats).values())


def exponent(values: list[int], seconds: list[float]) -> tuple[float, float]:
    """Slope and intercept of log seconds over log value, upper half of the points."""
    half = len(values) // 2
    slope, intercept = np.polyfit(np.log(values[half:]), np.log(seconds[half:]), 1)
    return float(slope), float(intercept)


def draw(rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, len(AXES), figsize=(15, 3.4), sharey=True, layout="tight")
    for ax, axis in zip(axes, AXES, strict=True):
        points = [row for row in rows if row["axis"] == axis]
        x, y = [row["value"] for row in points], [row["cpu_s"] for row in points]
        slope, intercept = exponent(x, y)
        ax.loglog(x, y, "o", color="C0")
        upper = np.array(x[len(x) // 2 :])
        ax.loglog(upper, np.exp(intercept) * upper**slope, color="C1")
        ax.axvline(BASE[axis], color="0.8", zorder=0)
        ax.set_xlabel(axis if axis != "width" else "numbers in a map")
        ax.set_title(f"exponent {slope:.2f}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds of the probe\nwithout the forwards")
    figure.savefig(HERE / "figures" / "bench_growth.png", dpi=110)


def maps_of(model: nn.Module, layers: list[str], batch: int, side: int) -> list[Tensor]:
    kept = list[Tensor]()
    with Collector(model.eval(), layers) as collector:
        collector.run(torch.randn(batch, 3, side, side), lambda _, x: kept.append(x.clone()))
    return kept


def convs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def gemm(repeats: int) -> list[dict[str, Any]]:
    small, large = torchvision.models.resnet18(), torchvision.models.resnet50()
    cases = {
        "resnet18@64, 18 layers, batch 64": lambda: maps_of(
            small, [*(n for n in convs(small) if "down" not in n), "fc"], 64, 64
        ),
        "resnet50@64, 53 convolutions, batch 64": lambda: maps_of(large, convs(large), 64, 64),
        "resnet50@224, 17 blocks, batch 32": lambda: maps_of(large, blocks(large), 32, 224),
        "one map of 8,192 numbers, batch 64": lambda: [torch.randn(64, 8192)],
        "one map of 8,192 numbers, batch 256": lambda: [torch.randn(256, 8192)],
    }
    linear, rows = get_kernel("linear"), []
    for name, make in cases.items():
        maps = make()
        with torch.no_grad():
            best = fastest(
                {
                    "torch_mm": lambda maps=maps: [x @ x.T for x in maps],
                    "onednn": lambda maps=maps: [matmul_t(x, x) for x in maps],
                    "probe": lambda maps=maps: [gram_of_batch(x, linear) for x in maps],
                },
                repeats,
            )
        gflop = sum(2 * len(x) ** 2 * x.shape[1] for x in maps) / 1e9
        rates = {f"{key}_gflops": f"{gflop / seconds:.0f}" for key, seconds in best.items()}
        share = f"{best['torch_mm'] / best['probe']:.2f}"
        rows.append({"maps": name, "gflop": f"{gflop:.2f}", **rates, "share_of_torch_mm": share})
    return rows


def write(name: str, rows: list[dict[str, Any]]) -> None:
    with (HERE / "results" / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    about = {"threads": args.threads, "repeats": args.repeats, "torch": torch.__version__}
    rows = [row | about for row in gemm(args.repeats)]
    write("bench_gemm.csv", rows)
    for row in rows:
        print(" | ".join(map(str, row.values())), flush=True)
    grown = list[dict[str, Any]]()
    for axis, values in AXES.items():
        seconds = growth(axis, values, args.repeats)
        slope = f"{exponent(values, seconds)[0]:.2f}"
        print(axis, slope, [f"{s:.4f}" for s in seconds], flush=True)
        for value, second in zip(values, seconds, strict=True):
            row = {"axis": axis, "value": value, "cpu_s": round(second, 5), "exponent": slope}
            grown.append(row | about)
    write("bench_growth.csv", grown)
    draw(grown)


if __name__ == "__main__":
    main()
