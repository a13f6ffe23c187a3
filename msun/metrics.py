"""Scores as pure functions: ranks of the true class, intervals, drawn sizes; and predictions kept.

Accuracies are shares, 0 to 1.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.intervals import check_level
from cka_probe.io import load_npz, save_npz

__all__ = ["Predictions", "accuracy", "drawn_sides", "true_class_rank", "wilson_interval"]

Ints = NDArray[np.int64]
_FORMAT = 1  # of the .npz; a reader refuses what is newer


def true_class_rank(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of the true class among the scores, and the predicted class.

    Of equal scores the lower class number counts as the larger, so that a network with the same
    score for every class is right by chance and not always.

    Args:
        logits: (n, classes) finite scores.
        labels: (n,) the true classes.

    Returns:
        (rank (n,) int64, 0 where the true class is first; predicted (n,) int64).

    >>> true_class_rank(torch.tensor([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0]]), torch.tensor([2, 1]))
    (tensor([1, 1]), tensor([1, 0]))
    """
    own = logits.gather(1, labels[:, None])  # (n, 1)
    number = torch.arange(logits.shape[1], device=logits.device)
    before = (logits == own) & (number < labels[:, None])
    rank = ((logits > own) | before).sum(1)
    best = logits == logits.amax(1, keepdim=True)
    return rank, best.to(torch.uint8).argmax(1)


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of a share that was counted (Wilson 1927, equation 1).

    Args:
        correct: number of successes.
        n: number of trials; 0 gives nan.
        level: coverage, in (0, 1).

    Returns:
        (low, high); low is exactly 0 where none is correct, high exactly 1 where all are.

    Raises:
        ValueError: counts that cannot be, or a level that is no coverage.
    """
    from scipy.stats import binomtest  # here: it takes a second to load

    if not 0 <= correct <= n:
        raise ValueError(f"impossible count: {correct} of {n}: give 0 <= correct <= n")
    check_level(level)
    if n == 0:
        return math.nan, math.nan
    interval = binomtest(correct, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy(ranks: Ints, classes: int) -> dict[str, float]:
    """Top-1 and top-5 accuracy with 95 % Wilson intervals.

    Args:
        ranks: (n,) from `true_class_rank`.
        classes: how many there are; with fewer than 5, top-5 says nothing and is nan.

    Returns:
        {"n", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high"}.
    """
    n = len(ranks)
    found: dict[str, float] = {"n": n}
    for k in (1, 5):
        correct = int((ranks < k).sum())
        low, high = wilson_interval(correct, n)
        values = (correct / n if n else math.nan, low, high)
        if classes < k:
            values = (math.nan,) * 3
        found |= dict(zip((f"top{k}", f"top{k}_low", f"top{k}_high"), values, strict=True))
    return found


def drawn_sides(n: int, low: int, high: int, seed: int) -> Ints:
    """A side for each of n images, its logarithm uniform from the smallest to the largest.

    Args:
        n: how many images; a longer draw begins with a shorter one.
        low: the smallest side in pixels.
        high: the largest.
        seed: of the draw.

    Returns:
        (n,) whole sides in pixels, low to high.
    """
    u = np.random.default_rng([seed, low, high]).random(n)
    sides = np.floor(np.exp(math.log(low) + u * math.log((high + 1) / low)))
    return np.clip(sides, low, high).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network said of each image at each size, in the order of the data.

    Two networks that were shown the same images pair row by row.

    Attributes:
        view: (m,) names of the columns, "32" for 32 px, "mixed" for a size drawn for each image.
        label: (n,) true classes.
        predicted: (n, m) classes that stood first.
        rank: (n, m) places of the true class; top-1 is rank == 0, top-5 is rank < 5.
        side_px: (n, m) sides in pixels.
    """

    view: NDArray[np.str_]
    label: Ints
    predicted: Ints
    rank: Ints
    side_px: Ints

    def correct(self, view: str | int) -> NDArray[np.bool_]:
        """Which images were right at a size, (n,).

        Args:
            view: 32 or "32", or "mixed".

        Raises:
            ValueError: a size that was not measured.
        """
        place = np.flatnonzero(self.view == str(view))
        if not len(place):
            known = ", ".join(self.view)
            raise ValueError(f"no such size in the predictions: {view}: they hold {known}")
        right: NDArray[np.bool_] = self.rank[:, place[0]] == 0
        return right

    def beside(self, other: Predictions) -> Predictions:
        """The columns of both, for the same images."""
        pairs = {n: (getattr(self, n), getattr(other, n)) for n in ("view", *_BY_VIEW)}
        joined: dict[str, Any] = {n: np.concatenate(pair, axis=-1) for n, pair in pairs.items()}
        return Predictions(label=self.label, **joined)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz, whole or not at all.

        Raises:
            OSError: where the folder does not exist or cannot be written.
        """
        small = {name: getattr(self, name).astype(np.int32) for name in _NUMBERS}
        save_npz(path, {"view": self.view, **small}, {}, version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else.
        """
        stored, _ = load_npz(path, ("view", *_NUMBERS), version=_FORMAT, what="predictions file")
        whole = {name: stored[name].astype(np.int64) for name in _NUMBERS}
        return cls(view=stored["view"].astype(np.str_), **whole)


_BY_VIEW = ("predicted", "rank", "side_px")
_NUMBERS = ("label", *_BY_VIEW)
