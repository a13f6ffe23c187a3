"""What every estimator shares: the protocol, its answer, and the rule that entries never change."""

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from cka_probe.engine.hsic import Array

EXACT_GROUPS = 20
BANDWIDTH_IMAGES = 256


class Result(NamedTuple):
    """What an estimator answers, entries in the order of `keys`.

    `cka`, `stderr`: (m, m) float64. `constant`, `vanishing`: (m,) bool, entries whose CKA is nan
    because the features are constant, or because no similarity is left above rounding (or, for
    `sketch`, above its own error). `groups`: jackknife groups behind `stderr`; intervals use
    Student's t with groups - 1. `sketch_stderr`: (m, m) the part of `stderr` that the random
    projection makes, None where there is none.
    """

    keys: list[Hashable]
    cka: Array
    stderr: Array
    groups: int
    constant: np.ndarray[Any, np.dtype[np.bool_]]
    vanishing: np.ndarray[Any, np.dtype[np.bool_]]
    sketch_stderr: Array | None = None


class Estimator(Protocol):
    """What `probe` asks of an estimator."""

    name: str

    def put(self, key: Hashable, x: Tensor) -> None:
        """Take the features (b, d) of one entry in the open batch."""

    def close_batch(self, index: int) -> None:
        """End batch `index`; every entry of the first batch must have come again."""

    def result(self) -> Result:
        """CKA and standard errors of all pairs of entries."""


def check_entries(known: Collection[Hashable], found: Collection[Hashable], index: int) -> None:
    """Raise ValueError unless a batch has the entries of the first one."""
    if known and set(found) != set(known):
        odd = sorted(map(str, set(found) ^ set(known)))
        raise ValueError(
            f"entries differ between batches: {odd[0]!r} in batch {index}: "
            "probe a layer that fires in every forward"
        )


def finish(
    keys: list[Hashable],
    cka: Array,
    stderr: Array,
    groups: int,
    constant: np.ndarray[Any, np.dtype[np.bool_]],
    sketch_stderr: Array | None = None,
) -> Result:
    """A Result: the diagonal has no error, nan cells have no error bar either."""
    own = np.diagonal(cka)
    i = np.arange(len(keys))
    bars = []
    for bar in (stderr, sketch_stderr):
        if bar is not None:
            bar = np.where(np.isnan(cka), np.nan, bar)
            bar[i, i] = np.where(np.isnan(own), np.nan, 0.0)
        bars.append(bar)
    vanishing = np.isnan(own) & ~constant
    return Result(keys, cka, np.asarray(bars[0]), groups, constant, vanishing, bars[1])
