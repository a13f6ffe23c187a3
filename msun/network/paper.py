"""The hand-made subnets of the paper: four torchvision backbones at 32, 128 and 224 px.

Liu, Zhu, Liu 2024, arXiv 2403.18294. Structure, parameters and costs are those of the authors'
experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.models import densenet, mobilenetv2, resnet, vgg

from msun.cutting.halves import Part
from msun.network.kernel_resize import centred, resampled
from msun.network.policy import RAW_TAU
from msun.network.shallow_copy import copy_path, replace_module, shallow_part
from msun.network.stride_removal import same_form

__all__ = ["SCALES", "PaperDesign", "paper_design", "paper_subnet"]

SCALES = (32, 128, 224)


class Kernel(NamedTuple):
    """Replace a convolution: other kernel size and padding, stride 1."""

    size: int
    padding: int


class Stride(NamedTuple):
    """Keep the layer, with another stride."""

    size: int


Change = Kernel | Stride | None  # None removes the layer


def _describe(change: Change) -> str:
    """A change in words."""
    if change is None:
        return "left out"
    side = change.size
    return f"{side} x {side} stride 1" if isinstance(change, Kernel) else f"stride {side}"


class PaperDesign(NamedTuple):
    """The small and the middle subnet of one backbone.

    Attributes:
        name: name of the backbone.
        at: path of the module after which the paper cuts.
        small: changes at 32 px, by module path.
        middle: changes at 128 px, by module path.
        tau: threshold of the raw constraint; smaller parts count as 0.
    """

    name: str
    at: str
    small: Mapping[str, Change]
    middle: Mapping[str, Change]
    tau: float = RAW_TAU

    def at_scale(self, scale: int) -> Mapping[str, Change]:
        """The changes at a scale, by module path."""
        return {32: self.small, 128: self.middle}.get(scale, {})

    def describe(self, scale: int) -> str:
        """The changes at a scale in words."""
        return ", ".join(
            f"{path} {_describe(change)}" for path, change in self.at_scale(scale).items()
        )


_RESNET = PaperDesign(
    "resnet50", "layer1", {"conv1": Kernel(3, 2), "maxpool": None}, {"conv1": Kernel(5, 2)}
)
_DENSENET = PaperDesign(
    "densenet121",
    "features.transition1",
    {"features.conv0": Kernel(3, 2), "features.pool0": None},
    {"features.conv0": Kernel(5, 2)},
    tau=0.001,
)
_VGG = PaperDesign(
    "vgg16_bn",
    "features.23",
    {"features.6": Stride(1), "features.13": Stride(1), "features.23": Stride(1)},
    {"features.23": Stride(1)},
    tau=0.001,
)
_MOBILENET = PaperDesign(
    "mobilenet_v2",
    "features.9",
    {
        "features.0.0": Kernel(1, 0),
        "features.2.conv.1.0": Stride(1),
        "features.4.conv.1.0": Stride(1),
    },
    {"features.0.0": Kernel(3, 1)},
)


_KNOWN: tuple[tuple[type[nn.Module], Callable[[], nn.Module], PaperDesign], ...] = (
    (resnet.ResNet, torchvision.models.resnet50, _RESNET),
    (densenet.DenseNet, torchvision.models.densenet121, _DENSENET),
    (vgg.VGG, torchvision.models.vgg16_bn, _VGG),
    (mobilenetv2.MobileNetV2, torchvision.models.mobilenet_v2, _MOBILENET),
)


def paper_design(
    model: nn.Module, names: Collection[str], scales: Sequence[int]
) -> tuple[PaperDesign | None, str]:
    """The paper's subnets for a network, if it is one of the four backbones, cut as in the paper.

    Args:
        model: the backbone, with any number of classes.
        names: all names of the cut.
        scales: trained sides in pixels, ascending.

    Returns:
        (design, ""), or (None, the reason why there is none).
    """
    for kind, make, design in _KNOWN:
        if type(model) is not kind:
            continue
        with torch.device("meta"):
            stock = make()
        if _layers(model) != _layers(stock):
            continue
        if design.at not in names:
            return None, f"the paper cuts {design.name} after {design.at!r}"
        if tuple(scales) != SCALES:
            return None, f"the paper trains at {', '.join(map(str, SCALES))} px"
        return design, ""
    return None, "the paper has no subnets for this backbone"


def _layers(model: nn.Module) -> dict[str, str]:
    """Path -> printed form of the leaf modules, without classifier and dropout."""
    return {
        path: repr(module)
        for path, module in model.named_modules()
        if not module._modules and not isinstance(module, nn.Linear | nn.Dropout)
    }


def paper_subnet(design: PaperDesign, head: Part, scale: int, *, resample: bool) -> Part:
    """The paper's subnet of a scale, which shares unchanged modules with the head.

    Args:
        design: the changes.
        head: the head of the backbone; left unchanged.
        scale: 32, 128 or 224 px; no changes at 224.
        resample: whether kernels of another size start as the resampled old kernel; else they start
            as its centre.
    """
    made = shallow_part(head)
    for path, change in design.at_scale(scale).items():
        old: Any = head.get_submodule(path)
        if change is None:
            replace_module(made, path, nn.Identity())
        elif isinstance(change, Kernel):
            replace_module(made, path, _convolution(old, change, resample))
        else:
            pool: Any = copy_path(made, path)
            pool.stride = same_form(old.stride, change.size)
    return made


def _convolution(old: Any, kernel: Kernel, resample: bool) -> nn.Conv2d:
    """A convolution at stride 1 whose kernel is resized from that of another."""
    size = (kernel.size, kernel.size)
    weight = old.weight
    new = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        size,
        padding=kernel.padding,
        bias=False,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        new.weight.copy_((resampled if resample else centred)(weight, size))
    new.weight.requires_grad_(weight.requires_grad)
    new.train(old.training)
    return new
