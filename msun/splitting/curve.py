"""CKA along the layers as rules see it, what they say of it, and what may be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cka_probe.intervals import student_t

__all__ = ["LEVEL", "Curve", "Floats", "Verdict", "chance", "told", "within"]

LEVEL = 0.95  # of the intervals, and 1 - the chance of calling a flat curve clear

Floats: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, eq=False)
class Curve:
    """CKA of each layer at a small scale with itself at the reference, in execution order.

    Attributes:
        layers: (m,) names; a valid cut stands under its outermost name.
        is_cut: (m,) whether the network can be cut after this layer.
        cka: (m,) no nan.
        stderr: (m,) standard errors; nan where the report has none.
        low: (m,) lower ends of the 95 % intervals, nan without standard errors.
        high: (m,) upper ends.
        groups: of images behind the standard errors; t has groups - 1 degrees of freedom.
        delta: how far below the later maximum counts as recovered.
        unbiased: False where the report says that CKA is biased.
        parameters: (m,) how many lie before each cut; nan for other layers, and where unknown.
        whole: parameters before the network's last valid cut, on the curve or not: its features,
            without what classifies them; None for the most that any of `parameters` is.
        scales: sizes that the report holds, the reference among them: subnets there would be.
        growth: subnets of their own must add less than this share of `whole`.
    """

    layers: tuple[str, ...]
    is_cut: NDArray[np.bool_]
    cka: Floats
    stderr: Floats
    low: Floats
    high: Floats
    groups: int = 0
    delta: float = 0.05
    unbiased: bool = True
    parameters: Floats | None = None
    whole: float | None = None
    scales: int = 2
    growth: float = 1.0

    @property
    def cuts(self) -> list[int]:
        """Places of the valid cuts."""
        return [int(k) for k in np.flatnonzero(self.is_cut)]

    @property
    def upper(self) -> Floats:
        """Upper ends of the intervals; the value itself where there is none."""
        return np.where(np.isnan(self.high), self.cka, self.high)

    def at(self, k: int) -> str:
        """A layer with its value, in short."""
        return f"{self.layers[k]} ({self.cka[k]:.3f})"

    def apart(self, k: int, j: int) -> float:
        """CKA at k less CKA at j in standard errors of the difference; nan without them.

        The square root of the sum of both variances: a report keeps no covariances. All layers are
        measured on the same images and tend to err alike, so this mostly understates; it does not
        where they err in opposite directions.
        """
        return _ratio(float(self.cka[k] - self.cka[j]), self.stderr[k], self.stderr[j])


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule says of a curve.

    Attributes:
        order: places of the cuts that may be chosen, best first; empty where there is none.
        scores: (m,) what the rule goes by, nan where it has no opinion.
        stderr: (m,) of the scores, by which two are told apart.
        why: the reason in words.
        doubts: what speaks against a clear split; none where it is clear.
        dip: place of the dip, for rules that look for one; None on a curve that only falls.
        target: the CKA to be reached, likewise.
        by_cka: whether it goes by CKA, so that what makes CKA uncertain makes it so.
    """

    order: tuple[int, ...]
    scores: Floats
    stderr: Floats
    why: str
    doubts: tuple[str, ...] = ()
    dip: int | None = None
    target: float | None = None
    by_cka: bool = True

    def apart(self, k: int, j: int) -> float:
        """Score at k less score at j in standard errors, as `Curve.apart`."""
        return _ratio(float(self.scores[k] - self.scores[j]), self.stderr[k], self.stderr[j])


def told(curve: Curve, k: int) -> str:
    """A layer with its value and interval, in words."""
    if math.isnan(curve.low[k]):
        return f"{curve.layers[k]} (CKA {curve.cka[k]:.3f}, no interval)"
    ends = f"{curve.low[k]:.3f} to {curve.high[k]:.3f}"
    return f"{curve.layers[k]} (CKA {curve.cka[k]:.3f}, {100 * LEVEL:g} % interval {ends})"


def _ratio(difference: float, stderr: float, other: float) -> float:
    """A difference in standard errors; nan where they are unknown, infinite where they are 0."""
    both = math.hypot(stderr, other)
    if both == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / both


def _needed(groups: int, tests: int) -> float:
    """Standard errors that one of `tests` differences exceeds by chance in 5 % of cases at most."""
    return student_t(groups, 1 - (1 - LEVEL) / tests)  # Bonferroni


def within(apart: float, groups: int, tests: int) -> bool:
    """Whether a difference may be chance; False where that is not known."""
    return apart <= _needed(groups, tests)


def chance(curve: Curve, k: int, j: int, tests: int, what: str) -> list[str]:
    """The doubt that CKA at k is above that at j by chance only, if there is this doubt."""
    apart = curve.apart(k, j)
    if not within(apart, curve.groups, tests):
        return []
    needed = _needed(curve.groups, tests)
    return [f"{what} may be chance, {apart:.1f} standard errors of the {needed:.1f} that would "
            f"rule it out with {curve.groups} groups of images"]  # fmt: skip
