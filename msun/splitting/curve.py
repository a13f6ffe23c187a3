"""CKA along the layers, the verdict of a rule on it, and tests whether a difference is chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cka_probe.intervals import student_t

__all__ = ["LEVEL", "Curve", "Floats", "Verdict", "chance_doubts", "describe", "within_chance"]

# Coverage of the intervals; a flat curve is called clear with a probability of 1 - LEVEL at most.
LEVEL = 0.95

Floats: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, eq=False)
class Curve:
    """CKA of each layer between a small scale and the reference, in order of execution.

    Attributes:
        layers: (m,) names of layers; a valid cut has its outermost name.
        is_cut: (m,) whether the network can be cut after the layer.
        cka: (m,) CKA values, without nan.
        stderr: (m,) standard errors; nan if the report has none.
        low: (m,) lower ends of the 95 % intervals; nan without standard errors.
        high: (m,) upper ends of the intervals.
        groups: number of image groups of the standard errors; t has groups - 1 degrees of freedom.
        delta: tolerance of recovery: CKA within delta of the later maximum counts as recovered.
        unbiased: whether the CKA estimator is unbiased.
        parameters: (m,) number of parameters before each cut; nan for other layers, or if unknown.
        whole: number of parameters before the last valid cut of the network, on the curve or not:
            its feature extractor; None for the maximum of `parameters`.
        scales: number of sizes in the report, with the reference, and so of subnets.
        growth: limit of the parameters that further subnets add, as a share of `whole`.
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
        """Indices of the valid cuts."""
        return [int(k) for k in np.flatnonzero(self.is_cut)]

    @property
    def upper(self) -> Floats:
        """Upper ends of the intervals; the value itself without an interval."""
        return np.where(np.isnan(self.high), self.cka, self.high)

    def at(self, k: int) -> str:
        """A layer with its CKA, as text."""
        return f"{self.layers[k]} ({self.cka[k]:.3f})"

    def apart(self, k: int, j: int) -> float:
        """CKA at k minus CKA at j, in standard errors of the difference; nan without them.

        The standard error is the root of the sum of both variances, since a report has no
        covariances. Errors of layers are mostly positively correlated, because the images are the
        same. Then the result is too small; with negative correlation it is too large.
        """
        return _ratio(float(self.cka[k] - self.cka[j]), self.stderr[k], self.stderr[j])


@dataclass(frozen=True, eq=False)
class Verdict:
    """The verdict of a rule on a curve.

    Attributes:
        order: indices of the cuts that may be chosen, best first; empty if there are none.
        scores: (m,) scores of the layers; nan for layers that the rule does not score.
        stderr: (m,) standard errors of the scores.
        why: the reason in words.
        doubts: reasons against a clear split; empty if it is clear.
        dip: index of the dip; None for rules without one, or if the curve only falls.
        target: the CKA that a cut must reach; None for rules without one.
        by_cka: whether the rule uses CKA, so that uncertain CKA makes the verdict uncertain.
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
        """Score at k minus score at j in standard errors, as `Curve.apart`."""
        return _ratio(float(self.scores[k] - self.scores[j]), self.stderr[k], self.stderr[j])


def describe(curve: Curve, k: int) -> str:
    """A layer with its CKA and interval, as text."""
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
    """The number of standard errors that one of `tests` differences exceeds by chance in 5 %."""
    return student_t(groups, 1 - (1 - LEVEL) / tests)  # Bonferroni correction


def within_chance(apart: float, groups: int, tests: int) -> bool:
    """Whether a difference may be chance; False if its standard error is unknown."""
    return apart <= _needed(groups, tests)


def chance_doubts(curve: Curve, k: int, j: int, tests: int, what: str) -> list[str]:
    """A doubt if CKA at k may exceed CKA at j by chance only; else an empty list."""
    apart = curve.apart(k, j)
    if not within_chance(apart, curve.groups, tests):
        return []
    needed = _needed(curve.groups, tests)
    return [f"{what} may be chance, {apart:.1f} standard errors of the {needed:.1f} that would "
            f"rule it out with {curve.groups} groups of images"]  # fmt: skip
