"""A tiny network, photographs of noise, and what one says of the other, one image at a time."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

from cka_probe.models.preprocessing import IMAGENET

QUIET = {"progress": False, "latency": False}


class Tiny(nn.Module):
    """Two convolutions with batch norm between, pooled: 3 classes."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, classes)
        self.bn1.running_mean.uniform_(-0.3, 0.3)
        self.bn1.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            self.fc.weight.mul_(20)

    def forward(self, x):
        x = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def macs_by_hand(side):
    half = (side + 1) // 2
    return side * side * 27 * 4 + half * half * 36 * 6 + 6 * 3


def photographs(root):
    """Twenty small photographs of different sizes in three classes."""
    rng = np.random.default_rng(0)
    for k in range(20):
        folder = root / "abc"[k % 3]
        folder.mkdir(exist_ok=True)
        grain = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((26 + k, 40 - k), Image.Resampling.BICUBIC).save(
            folder / f"{k:02d}.png"
        )
    return root


def slowly(net, photos, side, fed=None, mean=IMAGENET["mean"], std=IMAGENET["std"]):
    """(rank, predicted, label) of each file, one at a time, with torchvision's own transforms."""
    answers = []
    for label, name in enumerate("abc"):
        for path in sorted((photos / name).iterdir()):
            image = tv.to_dtype(tv.pil_to_tensor(Image.open(path)), torch.float32, scale=True)
            image = tv.center_crop(image, [min(image.shape[-2:])] * 2)
            image = tv.resize(image, [side, side], antialias=True)
            if fed is not None:
                image = tv.resize(image, [fed, fed], antialias=True)
            image = tv.normalize(image, list(mean), list(std))
            with torch.no_grad():
                scores = net.eval()(image[None])[0].tolist()
            ranked = sorted(range(len(scores)), key=lambda k: -scores[k])
            answers.append((ranked.index(label), ranked[0], label))
    return np.array(answers).T


def tensors(n=40, side=16, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=generator), torch.arange(n) % classes
