"""Losses besides the cross-entropies: the scale-invariant constraint and distillation."""

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
    """Distance between the features of the same images at different scales, for each pair.

    - "raw" (Liu, Zhu, Liu 2024): the mean squared difference for every pair of scales, with a
      gradient to both.
    - "normalised": the squared distance, 0 to 4, to the largest scale, which gets no gradient;
      mean over images. The features of each image are scaled to length 1, so that small features
      do not reduce it.
    - "cka": 1 - unbiased CKA with the largest scale, which gets no gradient. It is invariant to
      rotations and needs four images.

    Args:
        zs: {side in px: features (n, c, h, w)}; the larger of two grids is resized to the smaller,
            antialiased.
        kind: one of `CONSTRAINTS`.
        tau: threshold below which a part counts as 0; None for 0.01 with "raw", else 0.

    Returns:
        {(smaller, larger side): 0-d tensor}; empty for "none" and for one scale.

    Raises:
        ValueError: an unknown kind, or features of different shapes.
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
        # nan < least is False, so nan stays nan and stops the run
        parts[pair] = torch.where(value < least, torch.zeros_like(value), value)
    return parts


def constraint(
    zs: Mapping[int, Tensor], kind: str = "normalised", *, tau: float | None = None
) -> Tensor:
    """The sum of `constraint_pairs` as a 0-d tensor; 0 without pairs.

    Args:
        zs: as for `constraint_pairs`.
        kind: one of `CONSTRAINTS`.
        tau: threshold below which a part counts as 0.
    """
    parts = constraint_pairs(zs, kind, tau=tau).values()
    zero = next(iter(zs.values())).new_zeros((), dtype=torch.float32)
    return torch.stack([part.to(zero.dtype) for part in parts]).sum() if parts else zero


def ensemble_distillation(logits: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Distillation from the mean logits of all scales to each scale (Wang et al. 2020, RS-Net).

    All scales have equal weights in the mean.

    Args:
        logits: {side in px: logits (n, classes)}.

    Returns:
        {side: Kullback-Leibler divergence from the softmax of the mean logits, in nats, mean over
        images}; empty for one scale. The mean logits get no gradient.
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
    """Both in float32 or float64, each axis shrunk to the smaller of the two grids."""
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
