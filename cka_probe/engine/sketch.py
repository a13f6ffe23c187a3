"""The `sketch` estimator: exact CKA of a random projection, k numbers of every layer and image."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.batch_gram import FiniteCheck, device_for_sums, on_accelerator
from cka_probe.engine.centring import NonFiniteFeaturesError, centre_full, check_finite
from cka_probe.engine.estimator import EXACT_GROUPS, Result, State, check_entries, finish
from cka_probe.engine.exact import Rows, load_rows, rows_state
from cka_probe.engine.hsic import check_n
from cka_probe.engine.kernels import Block, Kernel, get_kernel
from cka_probe.engine.projection import BLOCKS, Projection
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
        n_batches: ignored, so that estimators are interchangeable.
        kernel: "linear" only: distances between sketches are biased, and so is exp of them.
        bandwidth: ignored.
        unbiased: True only.
        size: k, rounded up to a multiple of 8; None for 512.
        seed: seed of the matrices.
        n_images: images in the run, so that memory is taken once; None if it is not known.
        groups: groups of images for the sampling error.

    Raises:
        ValueError: another kernel, or a size below 32.
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
        seed: int = 0,
        n_images: int | None = None,
        groups: int = EXACT_GROUPS,
    ) -> None:
        del bandwidth
        self.n_batches = n_batches
        check_linear(get_kernel(kernel))
        if not unbiased:
            raise ValueError("biased sketch: unbiased=False: use estimator='exact'")
        self.size = sketch_size(size)
        self.seed, self.n_images, self.groups = seed, n_images, groups
        self.rows: dict[Any, Rows] = {}
        self.origin: dict[Hashable, Tensor] = {}  # (k,) float64, what the rows are relative to
        self.offset: dict[Hashable, Tensor] = {}  # sum over images of |batch mean|^2, 0-d float64
        self.kept: dict[Hashable, bool] = {}  # whether it has no more than k features: no sketch
        self._projections: dict[Hashable, Projection | None] = {}
        self._open: dict[Hashable, tuple[Tensor, Tensor, Tensor]] = {}
        self._finite = FiniteCheck()

    @property
    def keys(self) -> list[Any]:
        """The entries, in the order of the first batch."""
        return list(self.rows)

    @property
    def ready(self) -> bool:
        """True: no batch fixes anything for the others."""
        return True

    def update(self, key: Hashable, features: Tensor) -> None:
        """Project features (b, d) of one entry; k numbers an image are kept.

        The batch's mean is removed before the projection and its own projection, in float64, added
        back when the batch ends: a large offset of the features costs no digits.

        Raises:
            NonFiniteFeaturesError: NaN or Inf (on an accelerator, when the batch ends).
        """
        x = features.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        mean = x.mean(0)
        at_once = not on_accelerator(x)
        if at_once and not bool(torch.isfinite(mean).all()):
            check_finite(x)
            raise NonFiniteFeaturesError("values too large for sums in their dtype")
        if key not in self._projections:
            wide = x.shape[1] > self.size
            self._projections[key] = (
                Projection(self.seed, key, x.shape[1], self.size) if wide else None
            )
            self.kept[key] = not wide
        projection = self._projections[key]
        y, start = (x - mean, _double(mean)) if projection is None else projection(x, mean)
        if not at_once:
            self._finite.update(key, y)
        elif not bool(torch.isfinite(y).all()):
            check_finite(x)
            raise NonFiniteFeaturesError("values too large for sums in their dtype")
        self._open[key] = y, start, len(x) * torch.linalg.vector_norm(_double(mean)).square()

    def end_batch(self, index: int) -> None:
        """Keep the open batch under its index; batches may come in any order.

        Raises:
            ValueError: the entries are not those of the first batch.
            NonFiniteFeaturesError: NaN or Inf, found on an accelerator.
        """
        batch, self._open = self._open, {}
        self._finite.check()
        check_entries(self.rows, batch, index)
        for key, (y, start, offset) in batch.items():
            origin = self.origin.setdefault(key, start)
            y.add_((start - origin.to(start.device)).to(y.dtype).to(y.device))
            self.rows.setdefault(key, Rows(self.n_images)).append(index, y)
            known = self.offset.get(key, torch.zeros_like(offset))
            self.offset[key] = offset + known.to(offset.device)

    def new_shard(self) -> Sketch:
        """An empty estimator for other batches of the same run."""
        return Sketch(size=self.size, seed=self.seed, groups=self.groups)

    def merge(self, other: Sketch) -> None:
        """Take the sketches of an estimator over other batches of the same run.

        Raises:
            ValueError: another seed or size, or other entries.
        """
        if (self.seed, self.size) != (other.seed, other.size):
            raise ValueError("sketches of another run: seed or size differ: merge equal runs")
        if other.rows:
            check_entries(self.rows, other.rows, -1)
        for key, rows in other.rows.items():
            origin = self.origin.setdefault(key, other.origin[key])
            shift = other.origin[key] - origin.to(other.origin[key].device)
            own = self.rows.setdefault(key, Rows(self.n_images))
            for index, y in rows.parts:
                own.append(index, y + shift.to(y.dtype).to(y.device))
            known = self.offset.get(key, torch.zeros_like(other.offset[key]))
            self.offset[key] = other.offset[key] + known.to(other.offset[key].device)
            self.kept[key] = other.kept[key]
        other.rows = {}

    def compute(self) -> Result:
        """CKA; sampling and sketch error added in quadrature; what is degenerate.

        The sketches are freed as they are used: call it once.
        """
        keys = self.keys
        n = len(self.rows[keys[0]])
        check_n(n)
        features, constant, eps = [], [], []
        for key in keys:
            rows = self.rows.pop(key).take()
            eps.append(torch.finfo(rows.dtype).eps)
            centred = centre_full(rows)
            blocks = 1 if self.kept[key] else BLOCKS
            # a sketch sums the squared norm once a block
            spread = float(torch.linalg.vector_norm(centred.x.double())) / math.sqrt(blocks)
            # constant up to rounding, 8 eps of the norm with its offset, as in `centre_full`
            norm = math.hypot(spread, math.sqrt(float(self.offset[key])) / centred.scale)
            flat = centred.constant or spread <= 8 * eps[-1] * norm
            features.append(centred.x.zero_() if flat else centred.x)
            constant.append(flat)
        kept = [self.kept[key] for key in keys]
        sums = SketchSums(features, kept, min(self.groups, n // 4))
        cka, sampling, own = sketched_result(sums, np.array(eps))
        stderr = np.hypot(sampling, own)
        return finish(keys, cka, stderr, sums.groups, np.array(constant), own)

    def state_dict(self) -> State:
        """The sketches of all batches, and what they are relative to."""
        state = rows_state(self.rows)
        for e, key in enumerate(self.rows):
            state[f"origin {e}"] = self.origin[key].cpu().numpy()
        state["offset"] = np.array([float(self.offset[key]) for key in self.rows])
        state["kept"] = np.array([self.kept[key] for key in self.rows], dtype=bool)
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`, on the CPU."""
        self.rows = load_rows(state, self.n_images)
        for e, key in enumerate(self.rows):
            self.origin[key] = torch.from_numpy(np.array(state[f"origin {e}"]))
            self.offset[key] = torch.tensor(float(state["offset"][e]), dtype=torch.float64)
            self.kept[key] = bool(state["kept"][e])


def _double(x: Tensor) -> Tensor:
    return x.to(device_for_sums(x.device)).double()


def check_linear(kernel: Kernel) -> None:
    """Raise ValueError unless the kernel is the linear one."""
    if kernel.name != "linear":
        raise ValueError(
            f"sketch takes the linear kernel only: {kernel.name!r}: use estimator 'minibatch', or "
            "'exact' with reduce 'mean'"
        )


def sketch_size(size: int | None) -> int:
    """K from what the user asked for, or 512: a multiple of 8.

    At k = 128, 512 and 2048 the standard error of the sketch itself was 0.030, 0.011 and 0.0042 on
    whole maps of MobileNetV2 and a CIFAR ResNet-20, 800 images (experiments/sketch_accuracy.py).
    Features of more directions need more.

    Raises:
        ValueError: fewer than 32.
    """
    k = SKETCH_SIZE if size is None else int(size)
    if k < MIN_SIZE:
        raise ValueError(f"sketch too small: {size}: give at least {MIN_SIZE}, usually 512")
    return -(-k // BLOCKS) * BLOCKS
