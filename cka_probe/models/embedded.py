"""A small residual network, trained by this project on the glyphs at 64 px; weights included.

Made by `python experiments/train_glyphnet.py`; its accuracy by size stands in
experiments/results/glyphnet_accuracy.csv.
"""

from collections import OrderedDict
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cka_probe.inputs.glyphs import CLASSES

WEIGHTS = "glyphnet.safetensors"


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2).

    Args:
        inside: channels in.
        out: channels out.
        stride: of the first convolution and of the 1 x 1 shortcut.
    """

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) -> (n, out, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class GlyphNet(nn.Sequential):
    """Stem (stride 2), two blocks each of 16, 32 and 64 channels, average pooling, 62 classes."""

    def __init__(self) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
        inside = 16
        for k, out in enumerate((16, 32, 64), start=1):
            stride = 1 if k == 1 else 2
            parts[f"layer{k}"] = nn.Sequential(Residual(inside, out, stride), Residual(out, out))
            inside = out
        parts["pool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["fc"] = nn.Linear(inside, len(CLASSES))
        super().__init__(parts)


def glyphnet(*, trained: bool = True) -> GlyphNet:
    """The network, in eval mode, with the weights that come with the package or random ones.

    Args:
        trained: load the weights (float16 in the file, float32 in the network).
    """
    model = GlyphNet()
    if trained:
        with as_file(files("cka_probe.models") / "assets" / WEIGHTS) as path:
            model.load_state_dict(load_file(path))
    return model.eval()
