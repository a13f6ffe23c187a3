"""Resize convolution kernels, for the initial weights of small subnets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msun.cutting.halves import Part
from msun.network.shallow_copy import copy_path

__all__ = ["STARTS", "centred", "resample_first", "resampled"]

STARTS = ("copied", "resampled", "dilated")


def resampled(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample a kernel so that it responds to a shrunk patch as the old one to the full patch.

    The pseudo-inverse resize of Beyer et al. 2023 (FlexiViT), equation 3: with B the bilinear
    resize of patches, the least-squares solution of B^T w' = w.

    Args:
        weight: kernel (out, in, h, w).
        size: new size (h', w').

    Returns:
        The new kernel, (out, in, h', w').
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
    """Crop or zero-pad a kernel around its centre.

    Args:
        weight: kernel (out, in, h, w).
        size: new size (h', w').

    Returns:
        The new kernel, (out, in, h', w').
    """
    pads = []
    for old, new in zip(reversed(weight.shape[-2:]), reversed(size), strict=True):
        before = (new - old) // 2 if new > old else -((old - new) // 2)
        pads += [before, new - old - before]
    return F.pad(weight.detach(), pads)


def resample_first(head: Part, ratio: float) -> str:
    """Resample the kernel of the first convolution of a head to a smaller pixel scale.

    The new kernel covers the same part of the scene: its side is the old one times the ratio, at
    least 3 for odd and 2 for even kernels. Zeros pad it to the old size.

    Args:
        head: a head with weights of its own; changed in place.
        ratio: small side / reference side.

    Returns:
        The path of that convolution; "" if there is none with a kernel above 1 x 1.
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
    """The side of a kernel times the ratio, at the same parity, so that the centre stays."""
    new = side - 2 * math.floor((side - side * ratio) / 2 + 0.5)
    return max(new, min(side, 3 if side % 2 else 2))
