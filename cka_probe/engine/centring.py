"""Centring the columns of features, and what is wrong with features that cannot be centred.

Columns are centred before the Gram matrix, which changes no CKA and keeps float32 accurate: with a
feature mean of 1e4 an uncentred float32 Gram holds nothing but the mean. Grams are taken in float32
(float64 for float64 features and for small sets), everything after them in float64.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SAFE_TRACE",
    "Centred",
    "NonFiniteFeaturesError",
    "centre_full",
    "check_finite",
    "feature_eps",
    "work_dtype",
]

SMALL_N = 32  # below this the Gram is taken in float64: it costs nothing and conditioning is worst
_CHUNK_ROWS = 1024  # fixed, so that a float64 mean does not depend on how features were batched
_CHUNK_NUMBERS = 2**22  # wide features take fewer rows at a time, by their width alone
SAFE_TRACE = (1e-18, 1e30)  # sums of squares between which float32 products lose nothing


class Centred(NamedTuple):
    """Features (n, d) with column means removed and scaled by a power of two.

    `constant`: the layer has the same output for every image, up to rounding:
    ||x - mean|| <= 8 eps ||x||. `scale`: what `x` was divided by; 1.0 on the fast path.
    """

    x: Tensor
    scale: float
    constant: bool


class NonFiniteFeaturesError(ValueError):
    """Features that hold NaN or Inf; `key` names their entry if the message does not."""

    def __init__(self, message: str, *, key: Any = None) -> None:
        super().__init__(message)
        self.key = key


def work_dtype(x: Tensor, n: int) -> torch.dtype:
    """The dtype in which the Gram of `n` rows of `x` is taken."""
    if x.dtype == torch.float64 or (n < SMALL_N and x.device.type != "mps"):
        return torch.float64
    return torch.float32


def feature_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of features: float32's for all that is coarser, whatever their Gram is in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def centre_full(x: Tensor) -> Centred:
    """Centre the columns with a float64 mean over fixed chunks of rows, whatever the magnitude.

    Args:
        x: (n, d) features of any float dtype.

    Returns:
        Centred features scaled to a largest magnitude in [1, 2) by a power of two (exact);
        zeros where the features are constant.

    Raises:
        NonFiniteFeaturesError: a value is NaN or Inf.
    """
    n = x.shape[0]
    dtype = work_dtype(x, n)
    eps = feature_eps(x.dtype)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    total = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    chunk = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // max(1, x.shape[1])))
    for rows in torch.split(x, chunk):
        total += rows.to(wide).sum(0)
    mean = total / n
    if not bool(torch.isfinite(mean).all()):
        raise NonFiniteFeaturesError(_describe(x))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for target, rows in zip(torch.split(out, chunk), torch.split(x, chunk), strict=True):
        target.copy_(rows.to(wide) - mean)
    largest = float(out.abs().max()) if out.numel() else 0.0
    if not np.isfinite(largest):
        raise NonFiniteFeaturesError(_describe(x))
    if largest == 0.0:
        return Centred(out, 1.0, True)
    scale = float(2.0 ** np.floor(np.log2(largest)))
    out /= scale
    centred = float(torch.linalg.vector_norm(out).double())
    offset = float(torch.linalg.vector_norm((mean / scale).double())) * n**0.5
    if centred <= 8 * eps * (centred**2 + offset**2) ** 0.5:
        return Centred(out.zero_(), 1.0, True)
    return Centred(out, scale, False)


def check_finite(x: Tensor) -> None:
    """Raise NonFiniteFeaturesError if a value is NaN or Inf; one pass if none is."""
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise NonFiniteFeaturesError(_describe(x))


def _describe(x: Tensor) -> str:
    bad = int((~torch.isfinite(x)).sum())
    if bad == 0:
        return "values too large for float64 sums"
    kind = "NaN" if bool(torch.isnan(x).any()) else "Inf"
    return f"{kind} in {bad} of {x.numel()} values"
