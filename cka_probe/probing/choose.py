"""Which estimator a run uses, and why: "auto", and whether `exact` fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cka_probe.engine.estimator import Estimator
from cka_probe.engine.exact import Exact
from cka_probe.engine.kernels import Kernel
from cka_probe.engine.memory import exact_bytes, minibatch_bytes, readable, sketch_bytes
from cka_probe.engine.minibatch import Minibatch
from cka_probe.engine.sketch import Sketch, sketch_size

__all__ = ["AUTO", "ESTIMATORS", "Choice", "check_exact_fits", "choose_estimator"]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "minibatch": Minibatch,
    "exact": Exact,
    "sketch": Sketch,
}
AUTO = "auto"
OVERHEAD = 16 * 2**20  # bytes of a run beside its estimator: hooks, tables, fingerprints


@dataclass(frozen=True)
class Choice:
    """An estimator.

    Attributes:
        estimator: its name.
        why: the reason, in one line.
        memory: memory budget in bytes.
        size: k, for `sketch`.
    """

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
    """`exact` if it fits the memory budget; else `sketch` if its size is given, else `minibatch`.

    Args:
        widths: number of features of every entry; None if they are not known before the start.
        n: number of images.
        batch: images per batch.
        kernel: the kernel; `sketch` takes the linear one only.
        memory: memory budget in bytes.
        size: k of the sketch, if the user gave it.

    Raises:
        ValueError: nothing fits the budget.
    """
    if widths is None:
        why = "sizes are not known before the start: memory that does not grow with images"
        return Choice("minibatch", why, memory)
    budget, sizes = max(memory - OVERHEAD, 0), [(width, 4) for width in widths]
    whole = exact_bytes(n, sizes)
    if whole <= budget:
        return Choice("exact", f"{readable(whole)} fit in {readable(budget)}", memory)
    too_much = f"exact wants {readable(whole)} of {readable(budget)}"
    if size is not None and kernel.name == "linear":
        k = sketch_size(size)
        takes = sketch_bytes(n, sizes, k, batch)
        if takes <= budget:
            return Choice("sketch", f"{too_much}; sketch of {k} takes {readable(takes)}", memory, k)
    small = minibatch_bytes(len(widths), batch, rbf=kernel.needs_bandwidth)
    if small > budget:
        raise ValueError(
            f"memory budget too small: {readable(memory)}: give {readable(small + OVERHEAD)}, or "
            f"use fewer than {len(widths)} layers x views, or smaller batches than {batch}"
        )
    return Choice("minibatch", f"{too_much}; batches of {batch} take {readable(small)}", memory)


def check_exact_fits(widths: Sequence[int], n: int, memory: int) -> None:
    """Refuse `exact` if its features do not fit the memory budget.

    Args:
        widths: number of features of every entry.
        n: number of images.
        memory: memory budget in bytes.

    Raises:
        ValueError: they do not fit.
    """
    need = exact_bytes(n, [(width, 4) for width in widths])
    have = max(memory // 2, memory - OVERHEAD)
    if need > have:
        raise ValueError(
            f"exact does not fit in memory: {readable(need)} of {readable(have)}: use minibatch or "
            "sketch, or raise memory (--memory)"
        )
