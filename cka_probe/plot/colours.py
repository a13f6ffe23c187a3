"""Colours that pictures and the page share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["black_reads_better"]


def black_reads_better(rgb: ArrayLike) -> NDArray[np.bool_]:
    """Whether black text reads better than white on a colour.

    By the relative luminance L of WCAG 2: contrast with black, (L + .05) / .05, exceeds contrast
    with white, 1.05 / (L + .05), where L > sqrt(1.05 * .05) - .05.

    Args:
        rgb: (..., 3) sRGB, in 0..1.

    Returns:
        (...) bool.
    """
    channels = np.asarray(rgb, dtype=np.float64)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance: NDArray[Any] = linear @ [0.2126, 0.7152, 0.0722]
    return np.asarray(luminance > np.sqrt(1.05 * 0.05) - 0.05)
