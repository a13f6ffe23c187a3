"""Paired differences, their intervals, and Holm's correction: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from msun.metrics import Predictions

__all__ = ["Interval", "holm", "interval", "paired"]


class Interval(NamedTuple):
    """A mean difference with its uncertainty; shares, arm minus other.

    Attributes:
        diff: mean over the seeds.
        low: of the interval.
        high: likewise.
        p: two-sided, of a difference of 0.
        seeds: how many; with 1 the interval knows the images alone.
    """

    diff: float
    low: float
    high: float
    p: float
    seeds: int


def paired(a: Predictions, b: Predictions) -> list[dict[str, Any]]:
    """Differences of two readings on the same test images, by size and for the mean over sizes.

    Returns:
        {"view", "n", "diff", "image_var"} each: the mean over images of (a right) - (b right), and
        its variance from image to image.
    """
    common = [view for view in a.view.tolist() if view in b.view.tolist()]
    apart = {v: a.correct(v).astype(float) - b.correct(v).astype(float) for v in common}
    sizes = [v for v in common if v != "mixed"]
    if len(sizes) > 1:
        apart["mean"] = np.mean([apart[v] for v in sizes], axis=0)
    return [
        {"view": v, "n": len(d), "diff": float(d.mean()), "image_var": float(d.var(ddof=1))}
        for v, d in apart.items()
    ]


def interval(
    diffs: Sequence[float], image_vars: Sequence[float], n: int, level: float = 0.95
) -> Interval:
    """Mean paired difference over seeds, for other seeds and other images.

    Two sources of chance are added: that between seeds, s^2 / S, and that of the test images, which
    all seeds share and more seeds do not lessen: the mean image variance / n, an upper bound, since
    it holds what differs from seed to seed as well. Student's t with the degrees of freedom of
    Welch (1947) and Satterthwaite (1946). One seed: the images alone, which is McNemar's variance.

    Args:
        diffs: one a seed.
        image_vars: variance of the difference from image to image, one a seed.
        n: test images.
        level: coverage.
    """
    seeds = len(diffs)
    mean = float(np.mean(diffs))
    images = float(np.mean(image_vars)) / n
    between = float(np.var(diffs, ddof=1)) / seeds if seeds > 1 else 0.0
    total = images + between
    if total == 0:
        return Interval(mean, mean, mean, float(mean == 0), seeds)
    free = float(n - 1)
    if seeds > 1:
        free = total**2 / (between**2 / (seeds - 1) + images**2 / (n - 1))
    half = float(stats.t.ppf((1 + level) / 2, free)) * total**0.5
    p = 2 * float(stats.t.sf(abs(mean) / total**0.5, free))
    return Interval(mean, mean - half, mean + half, p, seeds)


def holm(ps: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(ps)
    out, highest = [0.0] * len(ps), 0.0
    for rank, k in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[k]))
        out[k] = highest
    return out
