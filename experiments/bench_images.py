"""What it costs to read images: decode once, resize to every size, hand the work to processes.

    python experiments/bench_images.py [--repeats 7]

A folder of 192 drawn JPEGs of 500 x 375 px (smooth noise, about 60 kB). `decode` is Pillow alone:
open, convert to RGB, take the pixels; ratios are to it, by CPU seconds of this process, or by the
clock where other processes work. `once a size` is what a loader per size costs: every image decoded
anew for each. -> results/bench_images.csv
"""

import argparse
import csv
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from cka_probe.inputs.batches import iterate_batches, open_images
from cka_probe.inputs.views import scale_transforms
from cka_probe.models.preprocessing import IMAGENET

RESULTS = Path(__file__).resolve().parent / "results" / "bench_images.csv"
SIZES = [32, 48, 64, 96, 128, 160, 192, 224]
COUNT = 192


def draw(folder: Path) -> None:
    for k in range(COUNT):
        generator = torch.Generator().manual_seed(k)
        coarse = torch.rand(1, 3, 48, 64, generator=generator)
        fine = torch.rand(1, 3, 188, 250, generator=generator)
        shape = (375, 500)
        how = {"mode": "bilinear", "align_corners": False}
        image = 0.8 * functional.interpolate(coarse, shape, **how)
        image = image + 0.2 * functional.interpolate(fine, shape, **how)
        pixels = (image[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{k:03d}.jpg", quality=90)


def decode(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            np.asarray(image.convert("RGB"))


def read(folder: Path, sizes: list[int], workers: int = 0) -> None:
    norm = {"mean": IMAGENET["mean"], "std": IMAGENET["std"]}
    views = scale_transforms(sizes, reference=max(sizes), resize="native", antialias=True, **norm)
    for _ in iterate_batches(open_images(folder), views, batch_size=32, seed=0, workers=workers):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder)
        calls: dict[str, Callable[[], None]] = {
            "decode": lambda: decode(folder),
            "one size, 224 px": lambda: read(folder, [224]),
            "8 sizes, 32 to 224 px": lambda: read(folder, SIZES),
            "8 sizes, once a size": lambda: [read(folder, [size]) for size in SIZES] and None,
            "8 sizes, 1 worker": lambda: read(folder, SIZES, 1),
            "8 sizes, 2 workers": lambda: read(folder, SIZES, 2),
        }
        best = {name: (math.inf, math.inf) for name in calls}
        for turn in range(args.repeats + 1):
            for name, call in calls.items():
                clock, cpu = time.perf_counter(), time.process_time()
                call()
                now = (time.perf_counter() - clock, time.process_time() - cpu)
                if turn:  # the first one warms up
                    best[name] = (min(best[name][0], now[0]), min(best[name][1], now[1]))
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["path", "clock_ratio", "cpu_ratio", "cpu_ms_an_image", "repeats", "torch"]
        writer.writerow(head)
        for name, (clock, cpu) in best.items():
            ratios = [clock / best["decode"][0], cpu / best["decode"][1]]
            row = [name, *(f"{r:.2f}" for r in ratios), f"{1000 * cpu / COUNT:.2f}"]
            if "worker" in name:
                row[2:] = ["", ""]  # the work is in other processes
            writer.writerow([*row, args.repeats, torch.__version__])
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
