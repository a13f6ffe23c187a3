"""What every estimator of CKA shares: the protocol, its answer, and the rule on entries.

An estimator takes the features of one entry at a time (`update`), ends each batch (`end_batch`) and
returns CKA (`compute`). Estimators of different batches of one run are merged (`merge`), in one
process or several; what they hold goes into a file as plain arrays (`state_dict`). Saving, resuming
and several processes use this protocol alone.
"""

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.engine.hsic import Array

__all__ = [
    "BANDWIDTH_IMAGES",
    "EXACT_GROUPS",
    "Estimator",
    "Result",
    "State",
    "check_entries",
    "finish",
]

EXACT_GROUPS = 20  # groups of images for the jackknife of `exact` and `sketch`
BANDWIDTH_IMAGES = 256  # the first so many images of a run fix the RBF bandwidth

# Arrays and plain values by name, and "keys", the entries: what a file without pickle can hold.
State = dict[str, Any]
Self = TypeVar("Self", bound="Estimator")


class Result(NamedTuple):
    """What an estimator computes, entries in the order of `keys`.

    Attributes:
        keys: the m entries.
        cka: (m, m) float64.
        stderr: (m, m) float64 standard errors.
        groups: number of jackknife groups behind `stderr`; intervals use Student's t with
            groups - 1 degrees of freedom.
        constant: (m,) entries whose CKA is nan because their features are constant.
        coincident: (m,) entries whose RBF CKA is nan because more than half of the pairs of images
            are equal up to rounding, so that their median distance is no bandwidth.
        vanishing: (m,) entries whose CKA is nan because no similarity is left above rounding (for
            `sketch`: above its own error).
        sketch_stderr: (m, m) the part of `stderr` that the random projection makes; None for other
            estimators.
    """

    keys: list[Any]
    cka: Array
    stderr: Array
    groups: int
    constant: NDArray[np.bool_]
    coincident: NDArray[np.bool_]
    vanishing: NDArray[np.bool_]
    sketch_stderr: Array | None = None


class Estimator(Protocol):
    """CKA between m entries over a stream of batches."""

    name: str

    @property
    def keys(self) -> list[Any]:
        """The entries, in the order of the first batch; empty before it has ended."""

    @property
    def ready(self) -> bool:
        """Whether all that the first batches fix (the RBF bandwidths) is known."""

    def update(self, key: Hashable, features: Tensor) -> None:
        """Take the features (b, d) of one entry in the open batch."""

    def end_batch(self, index: int) -> None:
        """End batch `index`; every entry of the first batch must have come again."""

    def compute(self) -> Result:
        """CKA and standard errors of all pairs of entries."""

    def new_shard(self: Self) -> Self:
        """An empty estimator for other batches of the same run, with what is fixed already."""

    def merge(self: Self, other: Self) -> None:
        """Add what an estimator of other batches of the same run holds; that one is used up."""

    def state_dict(self) -> State:
        """All that it holds between two batches, as arrays on the CPU and plain values."""

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned, into a fresh estimator of the same options."""


def check_entries(known: Collection[Hashable], found: Collection[Hashable], index: int) -> None:
    """Raise ValueError unless a batch has the entries of the first one."""
    if known and set(found) != set(known):
        odd = sorted(map(str, set(found) ^ set(known)))
        raise ValueError(
            f"entries differ between batches: {odd[0]!r} in batch {index}: "
            "probe a layer that fires in every forward"
        )


def finish(
    keys: list[Any],
    cka: Array,
    stderr: Array,
    groups: int,
    constant: NDArray[np.bool_],
    sketch_stderr: Array | None = None,
    *,
    coincident: NDArray[np.bool_] | None = None,
) -> Result:
    """A Result: the diagonal has no error, and a cell that is nan has no standard error."""
    own = np.diagonal(cka)
    i = np.arange(len(keys))
    bars = []
    for bar in (stderr, sketch_stderr):
        if bar is not None:
            bar = np.where(np.isnan(cka), np.nan, bar)
            bar[i, i] = np.where(np.isnan(own), np.nan, 0.0)
        bars.append(bar)
    if coincident is None:
        coincident = np.zeros_like(constant)
    vanishing = np.isnan(own) & ~constant & ~coincident
    return Result(keys, cka, np.asarray(bars[0]), groups, constant, coincident, vanishing, bars[1])
