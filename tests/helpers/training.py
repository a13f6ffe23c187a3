"""A small network with batch norm and dropout, and images that it can learn in a few steps."""

from collections import OrderedDict

import torch
from torch import nn

from msun.network.builder import build
from msun.training.config import TrainConfig
from msun.training.trainer import train

SCALES = (8, 16)


def backbone(*, classes=4, dropout=0.2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        stem = [nn.Conv2d(3, 6, 3, 2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
        body = [nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        parts = OrderedDict(
            stem=nn.Sequential(*stem),
            body=nn.Sequential(*body),
            drop=nn.Dropout(dropout),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(8, classes),
        )
        return nn.Sequential(parts)


def network(scales=SCALES, *, preset="lean", at="stem", **kwargs):
    return build(backbone(**kwargs), at, scales, preset=preset)


def images(n=48, *, classes=4, side=16, seed=0):
    """A stripe pattern and a colour for each class, and noise: (images, labels)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = 0.3 * torch.randn(n, 3, side, side, generator=generator)
    for k in range(classes):
        x[labels == k, k % 3] += 1.0 if k < 3 else -1.0
    return x, labels


def options(out, **changes):
    chosen = {
        "epochs": 3, "batch_size": 8, "lr": 0.05, "val_share": 0.16, "ema": 0.9, "distill": 0.5,
        "progress": False,
    }  # fmt: skip
    return TrainConfig(out=out, **(chosen | changes))


def run(out, *, scales=SCALES, preset="lean", data=None, dropout=0.2, **changes):
    """Train afresh; the network and the checkpoint's path."""
    model = network(scales, preset=preset, dropout=dropout)
    path = train(model, images() if data is None else data, options(out, **changes))
    return model, path


def weights(model):
    return {key: x.clone() for key, x in model.state_dict().items()}


def same(a, b):
    """Whether two state dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# a file with a network, for the command line
NET = """
import torch
from torch import nn

def net(classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""
