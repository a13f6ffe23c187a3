"""The backbones: two are small enough for a CPU, in the proportions of their large relatives.

A 56 px image meets a stride of 4 before the first block, as 224 px meet ResNet-50's, and every
number of pixels here is a quarter of the paper's: 8, 32, 56 for its 32, 128, 224.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from experiments.scales.pretrained import mobilenetv2

__all__ = ["BACKBONES", "UpTo", "backbone"]


def _conv(inside: int, out: int, side: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, out, side, stride, padding=side // 2, groups=groups, bias=False)


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv(out, out, 3), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(_conv(inside, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) -> (n, out, h / stride, w / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Inverted(nn.Module):
    """Expand, filter each channel, project (Sandler et al. 2018, table 1)."""

    def __init__(self, inside: int, out: int, stride: int = 1, factor: int = 4) -> None:
        super().__init__()
        wide = inside * factor
        self.expand = nn.Sequential(_conv(inside, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depthwise = nn.Sequential(
            _conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.project = nn.Sequential(_conv(wide, out, 1), nn.BatchNorm2d(out))
        self.adds = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) -> (n, out, h / stride, w / stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def _stem(channels: int, out: int, strides: tuple[int, int]) -> nn.Sequential:
    """A convolution and a max-pool, each with its stride; a stride of 1 leaves the pool out."""
    parts = [_conv(channels, out, 3, strides[0]), nn.BatchNorm2d(out), nn.ReLU()]
    if strides[1] > 1:
        parts.append(nn.MaxPool2d(3, strides[1], padding=1))
    return nn.Sequential(*parts)


def _top(inside: int, classes: int) -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(),
            "fc": nn.Linear(inside, classes)}  # fmt: skip


def residual(channels: int, classes: int, strides: tuple[int, int]) -> OrderedDict[str, nn.Module]:
    """Stem and three blocks of 16, 32 and 64 channels: 81 thousand parameters, 62 classes."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(channels, 16, strides))
    parts["layer1"] = Residual(16, 16)
    parts["layer2"] = Residual(16, 32, 2)
    parts["layer3"] = Residual(32, 64, 2)
    parts.update(_top(64, classes))
    return parts


def depthwise(channels: int, classes: int, strides: tuple[int, int]) -> OrderedDict[str, nn.Module]:
    """Stem and six inverted bottlenecks of 16, 24 and 48 channels."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(channels, 16, strides))
    parts["layer1"] = nn.Sequential(Inverted(16, 16), Inverted(16, 16))
    parts["layer2"] = nn.Sequential(Inverted(16, 24, 2), Inverted(24, 24))
    parts["layer3"] = nn.Sequential(Inverted(24, 48, 2), Inverted(48, 48))
    parts.update(_top(48, classes))
    return parts


BACKBONES = {"residual": residual, "depthwise": depthwise, "mobilenetv2": mobilenetv2}


@fx.wrap
def enlarged(x: Tensor, least: int) -> Tensor:
    """Square images of at least so many pixels a side, bilinear; larger ones as they are."""
    if x.shape[-1] >= least:
        return x
    return F.interpolate(x, (least, least), mode="bilinear", align_corners=False)


class UpTo(nn.Module):
    """Small images are enlarged before the network sees them."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, s, s) -> (n, c, max(s, least), max(s, least))."""
        return enlarged(x, self.least)


def backbone(
    name: str, *, channels: int, classes: int, reference: int, strides: tuple[int, int],
    least: int = 0, seed: int = 0,
) -> nn.Sequential:  # fmt: skip
    """A network with random weights.

    Args:
        name: "residual", "depthwise" or "mobilenetv2".
        channels: of the images.
        classes: how many.
        reference: side of the images that it is made for, in pixels.
        strides: of the stem's convolution and its pool.
        least: smaller images are enlarged to this side first; 0 does not.
        seed: of the weights; the same for every arm.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = BACKBONES[name](channels, classes, strides)
    if least:
        parts = OrderedDict({"enlarge": UpTo(least), **parts})
    net = nn.Sequential(parts)
    net.default_cfg = {"input_size": (channels, reference, reference)}  # type: ignore[assignment]
    return net
