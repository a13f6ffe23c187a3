"""Kernels: linear, RBF with its bandwidth rule, and functions of the user."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.products import distances, product, squared_distances

__all__ = [
    "KERNELS",
    "Block",
    "Kernel",
    "check_bandwidth",
    "checked_kernel",
    "coincident",
    "get_kernel",
    "images_by_batch",
    "median_bandwidth",
]

Block = Callable[[Tensor, Tensor], Tensor]


class Kernel(NamedTuple):
    """A kernel, split so that one pass serves a bandwidth that is only known later.

    `base(a, b)` maps centred features (p, d), (q, d) to a (p, q) block in float64;
    `finish(block, sigma)` makes the Gram block of it. `needs_bandwidth` says whether sigma counts;
    `quadratic` that scaling the features by c scales `base` by c^2; `of_gram`, where there is one,
    makes the block of one batch with itself, (n, n), of its centred linear Gram, in place.
    """

    name: str
    base: Block
    finish: Callable[[Tensor, float], Tensor]
    needs_bandwidth: bool = False
    quadratic: bool = True
    of_gram: Callable[[Tensor], Tensor] | None = None


def _linear_finish(block: Tensor, sigma: float) -> Tensor:
    del sigma
    return block


def _distances_of_gram(g: Tensor) -> Tensor:
    """Squared Euclidean distances (n, n) from a Gram matrix, in its place."""
    own = g.diagonal().clone()
    return distances(g, own, own)


def _rbf_finish(block: Tensor, sigma: float) -> Tensor:
    return (block * (-0.5 / sigma**2)).exp_()


KERNELS: dict[str, Kernel] = {
    "linear": Kernel("linear", product, _linear_finish, of_gram=lambda gram: gram),
    "rbf": Kernel("rbf", squared_distances, _rbf_finish, True, of_gram=_distances_of_gram),
}


def get_kernel(kernel: str | Kernel | Block) -> Kernel:
    """The kernel of a name, or a user's callable as one.

    Args:
        kernel: a name in `KERNELS`, a `Kernel`, or a callable that maps centred features
            (p, d) and (q, d), in float64, to a (p, q) block of a symmetric kernel.

    Raises:
        TypeError: neither a name nor a callable.
        ValueError: an unknown name. A callable's result is checked at every call.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            known = ", ".join(sorted(KERNELS))
            raise ValueError(f"unknown kernel: {kernel!r}: known kernels are {known}")
        return KERNELS[kernel]
    name = getattr(kernel, "__name__", type(kernel).__name__)
    if not callable(kernel):
        raise TypeError(
            f"kernel is neither a name nor a function: {kernel!r:.60}: use 'linear', 'rbf' or a "
            "function of features (p, d), (q, d)"
        )
    return Kernel(name, checked_kernel(kernel, name), _linear_finish, quadratic=False)


def checked_kernel(kernel: Block, name: str) -> Block:
    """A function of the user as a kernel: its result is checked and returned in float64.

    Args:
        kernel: function of centred features (p, d) and (q, d) to a (p, q) block.
        name: its name in messages.
    """

    def base(a: Tensor, b: Tensor) -> Tensor:
        # Float64 whatever the features are and however many: torch.cdist, for one, takes distances
        # in float32 from a Gram where there are more than 25 rows, and loses half of the digits.
        if a.device.type != "mps":
            a, b = a.double(), b.double()
        try:
            block = kernel(a, b)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = f"{type(error).__name__} ({' '.join(str(error).split()).replace(': ', ', ')})"
            raise ValueError(
                f"kernel failed: {name!r}, {text}: give a function of features (p, d), (q, d)"
            ) from error
        shape = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
        if shape != (len(a), len(b)):
            raise ValueError(
                f"kernel returned no block: {name!r} gave {shape} for {tuple(a.shape)} and "
                f"{tuple(b.shape)}: return a tensor ({len(a)}, {len(b)})"
            )
        return block.double()

    return base


def check_bandwidth(fraction: float) -> None:
    """Raise ValueError unless a fraction of the median distance is a number above 0."""
    if not 0 < fraction < float("inf"):
        raise ValueError(f"bad bandwidth: {fraction}: give a fraction above 0, usually 1")


def images_by_batch(batches: Iterable[tuple[int, int]], images: int) -> dict[int, int]:
    """How many images of each batch count for the bandwidth: the first `images` of the run.

    Args:
        batches: (index, images) of each batch, in any order.
        images: number of images that count.

    Returns:
        {index: images}, for the batches of which any image counts.
    """
    found, left = dict[int, int](), images
    for index, n in sorted(batches):
        if left > 0:
            found[index] = min(n, left)
            left -= found[index]
    return found


# Distances come from Grams: |a|^2 + |b|^2 - 2 ab, whose rounding is some eps of the squared norms,
# and these are half of the mean squared distance. Of 64 images with 40 to 10^6 features, most of
# them equal, the median came to 0.6 eps of the mean at most; 16 leaves room for other libraries.
_COINCIDENT = 16


def coincident(middle: float | Tensor, mean: float | Tensor, eps: float) -> bool:
    """Whether the median squared distance is 0 up to rounding.

    Args:
        middle: the median squared distance of all pairs.
        mean: their mean.
        eps: machine epsilon of the features, as `feature_eps` gives it.
    """
    return bool(middle <= _COINCIDENT * eps * mean)


def median_bandwidth(squared_distances: list[Tensor], fraction: float, eps: float) -> float:
    """Sigma = fraction x sqrt(median over i < j of d^2) (Kornblith et al. 2019, section 4).

    Args:
        squared_distances: symmetric matrices (n, n), or their upper right parts: rows (r, c) that
            begin with their diagonal; only pairs within one of them count.
        fraction: multiple of the median distance.
        eps: machine epsilon of the features, as `feature_eps` gives it.

    Returns:
        Sigma, in the units of the features; 0.0 where more than half of the pairs coincide up to
        rounding: their median squared distance is at most 16 eps of the mean.
    """
    upper = []
    for d2 in squared_distances:
        rows, columns = d2.shape
        i, j = torch.triu_indices(rows, rows, offset=1, device=d2.device)
        upper += [d2[i, j].cpu().numpy(), d2[:, rows:columns].flatten().cpu().numpy()]
    pairs = np.concatenate(upper)
    half = len(pairs) // 2
    pairs.partition(half)  # a sixth of the time of np.median, which selects three places
    middle = pairs[half] if len(pairs) % 2 else (pairs[:half].max() + pairs[half]) / 2
    if coincident(middle, float(pairs.mean()), eps):
        return 0.0
    return float(fraction * np.sqrt(middle))
