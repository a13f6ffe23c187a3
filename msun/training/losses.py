"""What is added to the cross-entropies: the scale-invariant constraint and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from cka_probe.functional import cka_loss
from cka_probe.inputs.views import resize
from msun.network.policy import RAW_TAU

__all__ = ["CONSTRAINTS", "constraint", "constraint_pairs", "ensemble_distillation"]

CONSTRAINTS = ("none", "raw", "normalised", "cka")


def constraint_pairs(
    zs: Mapping[int, Tensor], kind: str = "normalised", *, tau: float | None = None
) -> dict[tuple[int, int], Tensor]:
    """How far the merged features of the same images are apart, scale by scale.

    "raw" (Liu, Zhu, Liu 2024): the mean squared difference for every pair of scales,
    with a gradient to both. "normalised": the largest scale teaches and gets no gradient; every
    image's features are scaled to length 1, so that small features do not satisfy it; the squared
    distance, 0 to 4, is the mean over images. "cka": 1 - unbiased CKA with the largest scale,
    which gets no gradient; it ignores rotations, and needs four images.

    Args:
        zs: {side in px: (n, c, h, w)}; of two grids the larger is resized, antialiased, to the
            smaller.
        kind: One of `CONSTRAINTS`.
        tau: A part below it counts as 0; None is 0.01 for "raw", else 0.

    Returns:
        {(smaller, larger side): 0-d tensor}; empty for "none" and for one scale.

    Raises:
        ValueError: An unknown kind, or features that do not pair.
    """
    if kind not in CONSTRAINTS:
        raise ValueError(f"unknown constraint: {kind!r}: choose {', '.join(CONSTRAINTS)}")
    if kind == "none":
        return {}
    sides = sorted(zs)
    if kind == "raw":
        pairs, least = list(combinations(sides, 2)), RAW_TAU if tau is None else tau
    else:
        pairs, least = [(side, sides[-1]) for side in sides[:-1]], tau or 0.0
    parts = {}
    for pair in pairs:
        a, b = zs[pair[0]], zs[pair[1]]
        value = _PARTS[kind](*_on_one_grid(a, b if kind == "raw" else b.detach()))
        # written so that nan stays nan: it must stop the run, not vanish
        parts[pair] = torch.where(value < least, torch.zeros_like(value), value)
    return parts


def constraint(
    zs: Mapping[int, Tensor], kind: str = "normalised", *, tau: float | None = None
) -> Tensor:
    """The sum of `constraint_pairs`, 0-d; 0 where there are none."""
    parts = constraint_pairs(zs, kind, tau=tau).values()
    zero = next(iter(zs.values())).new_zeros((), dtype=torch.float32)
    return torch.stack([part.to(zero.dtype) for part in parts]).sum() if parts else zero


def ensemble_distillation(logits: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Each scale learns from the mean of all (Wang et al. 2020, RS-Net, with equal weights).

    Args:
        logits: {side in px: (n, classes)}.

    Returns:
        {side: Kullback-Leibler divergence from the softmax of the mean logits, which get no
        gradient, in nats, mean over images}; empty for one scale.
    """
    if len(logits) < 2:
        return {}
    teacher = torch.stack([x.detach().float() for x in logits.values()]).mean(0)
    target = F.log_softmax(teacher, dim=1)
    return {
        side: F.kl_div(F.log_softmax(x.float(), 1), target, reduction="batchmean", log_target=True)
        for side, x in logits.items()
    }


def _on_one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or better, each axis of the larger grid shrunk to the smaller one."""
    if a.ndim != 4 or b.ndim != 4 or a.shape[:2] != b.shape[:2]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features do not pair: {shapes}: give (n, c, h, w) of the same images")
    grid = [min(x, y) for x, y in zip(a.shape[2:], b.shape[2:], strict=True)]
    with torch.autocast(a.device.type, enabled=False):
        wide = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
        one, two = (resize(x, grid) for x in wide)
    return one, two


def _raw(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b)


def _normalised(a: Tensor, b: Tensor) -> Tensor:
    unit = (F.normalize(x.flatten(1), dim=1) for x in (a, b))  # (n, c*h*w)
    one, two = unit
    return (one - two).square().sum(1).mean()


def _cka(a: Tensor, b: Tensor) -> Tensor:
    return 1 - cka_loss(a.flatten(1), b.flatten(1))


_PARTS = {"raw": _raw, "normalised": _normalised, "cka": _cka}
