"""Train the demo's network on glyphs at 64 px and measure its accuracy by size.

    python experiments/train_glyphnet.py

Writes cka_probe/models/assets/glyphnet.safetensors (float16) and results/glyphnet_accuracy.csv.
About ten minutes on two cores. The last epoch's weights are kept; nothing is chosen on the test
images.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from cka_probe.inputs import glyphs
from cka_probe.models.embedded import WEIGHTS, GlyphNet, glyphnet

HERE = Path(__file__).resolve().parent
SIDES = (8, 12, 16, 24, 32, 48, 64)


def train(n: int, epochs: int, batch: int, seed: int) -> GlyphNet:
    """SGD with momentum, one cycle, label smoothing."""
    torch.manual_seed(seed)
    images, labels = glyphs.tensor("train", n, seed)
    model = GlyphNet().train()
    steps = n // batch
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=steps * epochs)
    for epoch in range(epochs):
        order, total, began = torch.randperm(n), 0.0, time.perf_counter()
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, side: int) -> float:
    """Top-1 in percent of images resized once, antialiased, and fed at that size."""
    hits = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        if side != x.shape[-1]:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        hits += int((model(x).argmax(1) == y).sum())
    return 100 * hits / len(labels)


def main() -> None:
    """Train, save, load again, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12400)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.images, args.epochs, args.batch, args.seed)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    path = HERE.parent / "cka_probe" / "models" / "assets" / WEIGHTS
    path.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    images, labels = glyphs.tensor("test", 10000, 0)
    rows = [(side, round(accuracy(glyphnet(), images, labels, side), 2)) for side in SIDES]
    (HERE / "results").mkdir(exist_ok=True)
    with (HERE / "results" / "glyphnet_accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("side_px", "top1_percent"))
        writer.writerows(rows)
    for side, top1 in rows:
        print(f"{side:3} px: {top1:.1f} %")


if __name__ == "__main__":
    main()
