"""The `sketch` estimator: exact CKA of a random projection, k numbers of every layer and image."""

import math
import warnings
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.device import Watch, on_accelerator
from cka_probe.engine.estimator import EXACT_GROUPS, Result, check_entries, finish
from cka_probe.engine.hsic import Array, check_n
from cka_probe.engine.kernels import (
    Block,
    Kernel,
    NonFiniteFeaturesError,
    centre_full,
    check_finite,
    get_kernel,
)
from cka_probe.engine.projection import BLOCKS, Projection
from cka_probe.engine.rows import Rows
from cka_probe.engine.sketch_sums import SketchSums, sketched_result

SKETCH_SIZE = 512
MIN_SIZE = 32


class Sketch:
    """HSIC_1 over the whole set on a random projection taken when a layer puts out.

    Every entry draws its own matrix from (seed, entry): two entries that shared one would agree by
    the draw. The k numbers are q = 8 independent blocks; HSIC between entries comes from all pairs
    of blocks, that of an entry with itself from unequal blocks only, and both are unbiased. A layer
    of no more than k features is kept as it is and adds no error of its own. The estimate is that
    of `exact` plus the sketch's own noise, so a CKA may exceed 1; as a ratio of unbiased sums it is
    high by an order 1 / k (about 0.01 at k = 128). Memory: m n k float32.

    Args:
        n_batches: ignored; there so that estimators are interchangeable.
        kernel: "linear" only: distances between sketches are biased, and so is exp of them.
        bandwidth: ignored.
        unbiased: True only.
        size: k, rounded up to a multiple of 8; 512 where neither it nor a precision is given.
        precision: wanted standard error of the sketch itself; `size_for` turns it into k.
        seed: of the matrices.
        n_images: images in the run, so that memory is taken once; None where it is not known.
        groups: of images, for the sampling error.

    Raises:
        ValueError: another kernel, a size below 32, a precision that is not between 0 and 1.
    """

    name = "sketch"

    def __init__(
        self,
        n_batches: int = 1,
        *,
        kernel: str | Kernel | Block = "linear",
        bandwidth: float = 1.0,
        unbiased: bool = True,
        size: int | None = None,
        precision: float | None = None,
        seed: int = 0,
        n_images: int | None = None,
        groups: int = EXACT_GROUPS,
    ) -> None:
        del n_batches, bandwidth
        check_linear(get_kernel(kernel))
        if not unbiased:
            raise ValueError("biased sketch: unbiased=False: use estimator='exact'")
        self.size = choose_size(size, precision)
        self.precision = precision
        self.seed, self.n_images, self.groups = seed, n_images, groups
        self.rows: dict[Hashable, Rows] = {}
        self.origin: dict[Hashable, Tensor] = {}  # (k,) float64, what the rows are relative to
        self.offset: dict[Hashable, Tensor] = {}  # sum over images of |batch mean|^2
        self.eps: dict[Hashable, float] = {}
        self._projections: dict[Hashable, Projection | None] = {}
        self.kept: dict[Hashable, bool] = {}  # as it is: no more than k features
        self._open: dict[Hashable, list[Tensor]] = {}
        self._watch = Watch()

    def put(self, key: Hashable, x: Tensor) -> None:
        """Project features (b, d) of `key`; k numbers an image are kept.

        The batch's mean is taken off before the projection and its own projection, in float64, put
        back: a large offset of the features costs no digits.

        Raises:
            NonFiniteFeaturesError: NaN or Inf.
        """
        self._open[key] = self.piece(key, x)

    def piece(self, key: Hashable, x: Tensor) -> list[Tensor]:
        """What is kept of features (b, d): their sketch (b, k), what was taken off, and its size.

        Returns:
            y (b, k); the projection of the batch's mean, (k,) float64; b |mean|^2, 0-d float64.
        """
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        mean = x.mean(0)
        fast = not on_accelerator(x)
        if fast and not bool(torch.isfinite(mean).all()):
            check_finite(x)
            raise NonFiniteFeaturesError("values too large for sums in their dtype")
        if key not in self._projections:
            wide = x.shape[1] > self.size
            self._projections[key] = (
                Projection(self.seed, key, x.shape[1], self.size) if wide else None
            )
            self.kept[key] = not wide
        projection = self._projections[key]
        if projection is None:
            y, start = x - mean, _double(mean)
        else:
            y, start = projection(x, mean)
        if not fast:
            self._watch.put(key, y)
        elif not bool(torch.isfinite(y).all()):
            check_finite(x)
            raise NonFiniteFeaturesError("values too large for sums in their dtype")
        return [y, start, len(x) * torch.linalg.vector_norm(_double(mean)).square()]

    def absorb(self, key: Hashable, piece: list[Tensor]) -> None:
        """Keep what the estimator of another process made; it knows `kept` of the entry."""
        self._open[key] = piece

    def settle(self) -> None:
        """Look at the pieces of a batch.

        Raises:
            NonFiniteFeaturesError: NaN or Inf.
        """
        self._watch.settle()

    def close_batch(self, index: int) -> None:
        """File the open batch under its index; batches may come in any order."""
        batch, self._open = self._open, {}
        self._watch.settle()
        check_entries(self.rows, batch, index)
        for key, (y, start, offset) in batch.items():
            start = start - self.origin.setdefault(key, start)
            y.add_(start.to(y.dtype).to(y.device))
            self.rows.setdefault(key, Rows(self.n_images)).append(index, y)
            self.offset[key] = offset + self.offset.get(key, torch.zeros_like(offset))
            self.eps[key] = torch.finfo(y.dtype).eps

    def restore(
        self, keys: list[Hashable], widths: Array, origin: Array, offset: Array, kept: Array,
        home: torch.device,
    ) -> None:  # fmt: skip
        """Take up, on `home`, what rows that follow by `add_rows` are relative to."""
        starts = np.split(origin, np.cumsum(widths)[:-1])
        for key, start, size, whole in zip(keys, starts, offset, kept, strict=True):
            self.origin[key] = torch.tensor(start, dtype=torch.float64, device=home)
            self.offset[key] = torch.tensor(float(size), dtype=torch.float64, device=home)
            self.kept[key] = bool(whole)

    def add_rows(self, key: Hashable, index: int, y: Tensor) -> None:
        """Take rows that were kept before."""
        self.rows.setdefault(key, Rows(self.n_images)).append(index, y)
        self.eps[key] = torch.finfo(y.dtype).eps

    def merge(self, other: "Sketch") -> None:
        """Take the sketches of another estimator over other batches of the same run.

        Raises:
            ValueError: another seed or size, or other entries.
        """
        if (self.seed, self.size) != (other.seed, other.size):
            raise ValueError("sketches of another run: seed or size differ: merge equal runs")
        check_entries(self.rows, other.rows, -1)
        for key, rows in other.rows.items():
            shift = other.origin[key] - self.origin.setdefault(key, other.origin[key])
            for _, y in rows.parts:
                y.add_(shift.to(y.dtype).to(y.device))
            self.rows.setdefault(key, Rows()).extend(rows)
            self.offset[key] = self.offset.get(key, 0.0) + other.offset[key]
            self.eps[key] = other.eps[key]
            self.kept[key] = other.kept[key]

    def result(self) -> Result:
        """CKA; sampling and sketch error added in quadrature; what is degenerate.

        The sketches are let go as they are used: call it once.
        """
        keys = list(self.rows)
        n = len(self.rows[keys[0]])
        check_n(n)
        features, constant = [], []
        for key in keys:
            centred = centre_full(self.rows.pop(key).take())
            blocks = 1 if self.kept[key] else BLOCKS
            spread = float(torch.linalg.vector_norm(centred.x.double())) / math.sqrt(blocks)
            limit = (
                8
                * self.eps[key]
                * math.hypot(spread, math.sqrt(float(self.offset[key])) / centred.scale)
            )
            flat = centred.constant or spread <= limit
            features.append(centred.x.zero_() if flat else centred.x)
            constant.append(flat)
        kept = [self.kept[key] for key in keys]
        sums = SketchSums(features, kept, min(self.groups, n // 4))
        eps = np.array([self.eps[key] for key in keys])
        cka, sampling, own = sketched_result(sums, eps)
        self._check_precision(own)
        stderr = np.hypot(sampling, own)
        return finish(keys, cka, stderr, sums.groups, np.array(constant), own)

    def _check_precision(self, own: Array) -> None:
        """Warn where the sketch came out coarser than was asked for."""
        cells = own[~np.eye(len(own), dtype=bool) & np.isfinite(own)]
        reached = float(np.sqrt((cells**2).mean())) if cells.size else 0.0
        if self.precision is not None and reached > self.precision:
            more = -(-math.ceil(self.size * (reached / self.precision) ** 1.4) // BLOCKS) * BLOCKS
            warnings.warn(
                f"sketch coarser than asked: standard error {reached:.2g} for {self.precision}: "
                f"use a sketch size of {more}",
                UserWarning,
                stacklevel=4,
            )


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def check_linear(kernel: Kernel) -> None:
    """Raise ValueError unless the kernel is the linear one."""
    if kernel.name != "linear":
        raise ValueError(
            f"sketch takes the linear kernel only: {kernel.name!r}: use estimator 'minibatch', or "
            "'exact' with reduce 'mean'"
        )


def choose_size(size: Any, precision: Any) -> int:
    """K from what was asked: a size, a precision, or neither (512); a multiple of 8.

    Raises:
        ValueError: both given, or out of range.
    """
    if size is not None and precision is not None:
        raise ValueError(f"sketch size and precision: {size} and {precision}: give one of them")
    if precision is not None:
        return size_for(precision)
    k = SKETCH_SIZE if size is None else int(size)
    if k < MIN_SIZE:
        raise ValueError(f"sketch too small: {size}: give at least {MIN_SIZE}, usually 512")
    return -(-k // BLOCKS) * BLOCKS


def size_for(precision: float) -> int:
    """K for a wanted standard error of the sketch, by the rule of `own_error`."""
    if not 0 < precision < 1:
        raise ValueError(f"bad precision: {precision}: give a standard error such as 0.03")
    size = MIN_SIZE
    while own_error(size) > precision:
        size += BLOCKS * (1 + size // 512)
    return size


def own_error(size: int) -> float:
    """The standard error of a sketch of k numbers that two trained networks showed.

    MobileNetV2 and a CIFAR ResNet-20, whole maps, 800 images: 0.030, 0.011 and 0.0042 at k = 128,
    512 and 2048 (experiments/sketch_accuracy.py). Features of more directions need more.
    """
    return float(0.95 / size**0.71)
