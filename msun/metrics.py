"""Accuracy with intervals, ranks of the true class, random sides, and stored predictions.

Accuracies are from 0 to 1.
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
_FORMAT = 1  # of the .npz file; a reader refuses newer formats


def true_class_rank(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of the true class among the scores, and the predicted class.

    For equal scores, the lower class number comes first. So a network with equal scores for all
    classes is right for one class, not for all.

    Args:
        logits: (n, classes) finite scores.
        labels: (n,) true classes.

    Returns:
        (rank (n,) int64, 0 if the true class is first; predicted class (n,) int64).

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
    """The confidence interval of a binomial proportion (Wilson 1927, equation 1).

    Args:
        correct: number of successes.
        n: number of trials; 0 gives nan.
        level: coverage, in (0, 1).

    Returns:
        (low, high); low is exactly 0 without successes, high exactly 1 without failures.

    Raises:
        ValueError: impossible counts, or a level outside (0, 1).
    """
    from scipy.stats import binomtest  # imported here, since it takes a second

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
        classes: number of classes; with fewer than 5, top-5 is nan.

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
    """Random sides for n images, uniform in the logarithm.

    Args:
        n: number of images; a longer draw begins with a shorter one.
        low: smallest side in pixels.
        high: largest side in pixels.
        seed: seed of the draw.

    Returns:
        (n,) sides in whole pixels, low to high.
    """
    u = np.random.default_rng([seed, low, high]).random(n)
    # s = low ((high + 1) / low)^u, rounded down: side s has the weight log((s + 1) / s)
    sides = np.floor(np.exp(math.log(low) + u * math.log((high + 1) / low)))
    return np.clip(sides, low, high).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a network for each image at each size, in the order of the data.

    Row i is the same image for all networks that were evaluated on the same data.

    Attributes:
        view: (m,) names of the columns, "32" for 32 px, "mixed" for a side drawn for each image.
        label: (n,) true classes.
        predicted: (n, m) predicted classes.
        rank: (n, m) ranks of the true class, from `true_class_rank`; top-1 is rank == 0.
        side_px: (n, m) sides in pixels.
    """

    view: NDArray[np.str_]
    label: Ints
    predicted: Ints
    rank: Ints
    side_px: Ints

    def correct(self, view: str | int) -> NDArray[np.bool_]:
        """Whether the prediction is correct, for each image at one size.

        Args:
            view: name of the column: 32 or "32", or "mixed".

        Returns:
            (n,) booleans.

        Raises:
            ValueError: a size that was not evaluated.
        """
        place = np.flatnonzero(self.view == str(view))
        if not len(place):
            known = ", ".join(self.view)
            raise ValueError(f"no such size in the predictions: {view}: choose from {known}")
        right: NDArray[np.bool_] = self.rank[:, place[0]] == 0
        return right

    def beside(self, other: Predictions) -> Predictions:
        """The columns of both.

        Args:
            other: predictions for the same images.
        """
        pairs = {n: (getattr(self, n), getattr(other, n)) for n in ("view", *_BY_VIEW)}
        joined: dict[str, Any] = {n: np.concatenate(pair, axis=-1) for n, pair in pairs.items()}
        return Predictions(label=self.label, **joined)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, atomically.

        Args:
            path: path of the file, in an existing folder.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        small = {name: getattr(self, name).astype(np.int32) for name in _NUMBERS}
        save_npz(path, {"view": self.view, **small}, {}, version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read a file of `save`.

        Args:
            path: path of the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or a newer format.
        """
        stored, _ = load_npz(path, ("view", *_NUMBERS), version=_FORMAT, what="predictions file")
        whole = {name: stored[name].astype(np.int64) for name in _NUMBERS}
        return cls(view=stored["view"].astype(np.str_), **whole)


_BY_VIEW = ("predicted", "rank", "side_px")
_NUMBERS = ("label", *_BY_VIEW)
