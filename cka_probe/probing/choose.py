"""Which estimator a run gets, and why: `auto`, and what `exact` will take, before the start."""

from collections.abc import Sequence
from dataclasses import dataclass

from cka_probe.engine.kernels import Kernel
from cka_probe.engine.memory import (
    exact_bytes,
    minibatch_bytes,
    readable,
    sketch_bytes,
)
from cka_probe.engine.projection import BLOCKS
from cka_probe.engine.sketch import MIN_SIZE, choose_size, own_error

AUTO = "auto"
OVERHEAD = 16 * 2**20  # of a run beside its estimator: hooks, tables, fingerprints
LARGEST_SKETCH = 2048
_DISK_RATE = 400e6  # bytes a second of a plain disk, written once and read once
_GEMM_RATE = 40e9  # multiply-adds a second of one core


@dataclass(frozen=True)
class Choice:
    """An estimator, the reason in one line, its memory budget and k where it is `sketch`."""

    estimator: str
    why: str
    memory: int
    size: int | None = None


def choose_estimator(
    widths: Sequence[int] | None,
    *,
    n: int,
    batch: int,
    kernel: Kernel,
    memory: int,
    size: int | None = None,
) -> Choice:
    """Take the estimator with the smallest expected distance from `exact` that fits the budget.

    `exact` has none. `minibatch` and `sketch` were measured against it on trained networks
    (experiments/sketch_accuracy.py): `minibatch` by its batch, `sketch` by its k.

    Args:
        widths: features of every entry; None where they are not known before the start.
        n: images.
        batch: images per batch.
        kernel: `sketch` is for the linear one.
        memory: bytes.
        size: k, if the user fixed it.

    Raises:
        ValueError: nothing fits the budget.
    """
    budget = max(memory - OVERHEAD, 0)
    if widths is None:
        why = "sizes are not known before the start: memory that does not grow with images"
        return Choice("minibatch", why, memory)
    sizes, rbf = [(width, 4) for width in widths], kernel.needs_bandwidth
    whole = exact_bytes(n, sizes)
    if whole <= budget:
        return Choice("exact", f"{readable(whole)} fit in {readable(budget)}", memory)
    too_much = f"exact wants {readable(whole)} of {readable(budget)}"
    small = minibatch_bytes(len(widths), batch, rbf=rbf)
    k = _sketch_that_fits(sizes, n, batch, budget, size, None)
    asked = size is not None
    if (
        kernel.name == "linear"
        and k
        and (asked or small > budget or own_error(k) < batch_error(batch))
    ):
        takes = readable(sketch_bytes(n, sizes, k, batch))
        why = f"{too_much}; sketch of {k} takes {takes}, standard error about {own_error(k):.3f}"
        return Choice("sketch", why, memory, k)
    if small > budget:
        raise ValueError(
            f"memory budget too small: {readable(memory)}: give {readable(small + OVERHEAD)}, or "
            f"use fewer than {len(widths)} layers x views, or smaller batches than {batch}"
        )
    why = (
        f"{too_much}; batches of {batch} take {readable(small)}, "
        f"within about {batch_error(batch):.3f} of exact"
    )
    return Choice("minibatch", why, memory)


def usable(memory: int) -> int:
    """What a budget leaves to the estimator."""
    return max(memory // 2, memory - OVERHEAD)


def _sketch_that_fits(
    sizes: list[tuple[int, int]], n: int, batch: int, budget: int,
    size: int | None, precision: float | None,
) -> int:  # fmt: skip
    """The k that was asked for, or the largest that fits; 0 where none does."""
    fixed = size is not None or precision is not None
    k = choose_size(size, precision) if fixed else LARGEST_SKETCH
    while k >= MIN_SIZE and sketch_bytes(n, sizes, k, batch) > budget:
        if fixed:
            return 0
        k = k // 2 // BLOCKS * BLOCKS
    return k if k >= MIN_SIZE else 0


def batch_error(batch: int) -> float:
    """How far `minibatch` was from `exact`, root mean square, by its batch (800 images)."""
    return float(0.135 / batch**0.89)


def check_exact_fits(widths: Sequence[int], n: int, memory: int) -> None:
    """Refuse `exact` where its features do not fit the memory budget.

    Raises:
        ValueError: they do not.
    """
    need, have = exact_bytes(n, [(width, 4) for width in widths]), usable(memory)
    if need > have:
        raise ValueError(
            f"exact does not fit in memory: {readable(need)} of {readable(have)}: use minibatch or "
            "sketch, or raise memory (--memory)"
        )
