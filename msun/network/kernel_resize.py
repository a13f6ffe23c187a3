"""What the small subnets start from: the head's weights, or its first kernel at a smaller scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msun.cutting.dataflow import Part
from msun.network.shallow_copy import copy_path

__all__ = ["STARTS", "centred", "resample_first", "resampled"]

STARTS = ("copied", "resampled", "dilated")


def resampled(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A kernel for smaller pixels: its answer to a shrunk patch is nearest to the old one's.

    The pseudo-inverse resize of Beyer et al. 2023 (FlexiViT), equation 3: with B the bilinear
    resize of patches, the least-squares solution of B^T w' = w.

    Args:
        weight: (out, in, h, w).
        size: (h', w').

    Returns:
        (out, in, h', w').
    """
    h, w = weight.shape[-2:]
    patches = torch.eye(h * w, dtype=torch.float64).view(h * w, 1, h, w)
    small = F.interpolate(patches, size, mode="bilinear", antialias=True, align_corners=False)
    resize = small.flatten(1).T  # (h' w', h w): B
    flat = weight.detach().cpu().double().flatten(2)  # (out, in, h w)
    new = flat @ torch.linalg.pinv(resize)  # (out, in, h' w')
    kernel: Tensor = new.unflatten(2, size).to(weight.device, weight.dtype)
    return kernel


def centred(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A kernel cut or zero-padded to another size around its middle.

    Args:
        weight: (out, in, h, w).
        size: (h', w').
    """
    pads = []
    for old, new in zip(reversed(weight.shape[-2:]), reversed(size), strict=True):
        before = (new - old) // 2 if new > old else -((old - new) // 2)
        pads += [before, new - old - before]
    return F.pad(weight.detach(), pads)


def resample_first(head: Part, ratio: float) -> str:
    """Resample the first convolution's kernel to a smaller pixel scale; zeros around keep its size.

    The new kernel spans as many pixels of the small image as the old one did of the large one, at
    least 3 where the old one had 3; it is then padded with zeros to the old size.

    Args:
        head: whose weights are its own.
        ratio: small side / reference side.

    Returns:
        The path of that convolution; "" where the head has none with a kernel above 1 x 1.
    """
    for node in head.cut_graphs[False].nodes:
        if node.op != "call_module":
            continue
        module = head.get_submodule(str(node.target))
        found = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
        if not found:
            continue
        path = ".".join(filter(None, (str(node.target), found[0])))
        first: Any = copy_path(head, path)
        weight: Tensor = first.weight
        old = (int(weight.shape[-2]), int(weight.shape[-1]))
        size = (_smaller(old[0], ratio), _smaller(old[1], ratio))
        if old == (1, 1):
            return ""
        if size != old:
            new = centred(resampled(weight, size), old)
            first._parameters = dict(first._parameters)
            first.weight = nn.Parameter(new, weight.requires_grad)
        return path
    return ""


def _smaller(side: int, ratio: float) -> int:
    """The side of a kernel on smaller pixels, even or odd as it was."""
    new = side - 2 * math.floor((side - side * ratio) / 2 + 0.5)
    return max(new, min(side, 3 if side % 2 else 2))
