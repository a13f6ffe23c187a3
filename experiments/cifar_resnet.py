"""CIFAR ResNets of He et al. 2016, section 4.2: three stages of 16, 32, 64 channels, 6n + 2 layers.

Shortcuts are of option A: where a stage begins, every second row and column is taken and channels
of zeros are added, so a shortcut has no parameters. Keys: conv1, bn1,
layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (n, c_in, h, w) -> (n, c_out, h/stride, w/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.extra = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        low, high = self.extra // 2, self.extra - self.extra // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, low, high))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """(n, 3, h, w) -> (n, classes); made for 32 x 32, any size of 4 or more works."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20(classes: int = 10) -> CifarResNet:
    """0.27 M parameters."""
    return CifarResNet(3, classes)


def resnet32(classes: int = 10) -> CifarResNet:
    """0.46 M parameters."""
    return CifarResNet(5, classes)


def resnet44(classes: int = 10) -> CifarResNet:
    """0.66 M parameters."""
    return CifarResNet(7, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """0.85 M parameters."""
    return CifarResNet(9, classes)
