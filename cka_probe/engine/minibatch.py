"""The `minibatch` estimator: HSIC summed over batches, then the ratio."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.batch_gram import BatchGram, check_all_finite, gram_of_batch
from cka_probe.engine.estimator import BANDWIDTH_IMAGES, Result, State, check_entries, finish
from cka_probe.engine.hsic import check_n, hsic_pairs, jackknife, normalise, rounding_floor
from cka_probe.engine.kernels import (
    Block,
    Kernel,
    check_bandwidth,
    get_kernel,
    images_by_batch,
    median_bandwidth,
)

__all__ = ["Minibatch"]

MAX_GROUPS = 32  # more groups than that do not narrow an interval by Student's t
_SUMS = ("hsic", "floor", "varied", "weight")

_Grams = dict[Hashable, BatchGram]


class Minibatch:
    """HSIC_1 summed over batches, then the ratio (Nguyen et al. 2021, equation 3).

    A batch weighs as many images as it holds: HSIC = sum_b n_b HSIC_1(b) / sum_b n_b. Batches are
    folded into at most 32 groups by their index, so that merging, resuming and the jackknife are
    additions. Memory: m b^2 for the open batch and 32 m^2 for the sums, whatever the number of
    images. With the RBF kernel the squared distances of the first 256 images are held until the
    bandwidth is known (their median within batches), so that no forward is spent on it.

    Args:
        n_batches: batches in the whole run, over all processes.
        kernel: a name in KERNELS or a callable on centred features (p, d), (q, d).
        bandwidth: RBF sigma as a multiple of the median distance.
        unbiased: HSIC_1. The biased HSIC_0 is refused: averaged over batches it makes independent
            features alike (0.94 for Gaussians at d = 512 and batches of 32).

    Attributes:
        hsic: (G, m, m) sums of n_b HSIC_1(b).
        floor: (G, m) what rounding alone could add to HSIC(x, x).
        varied: (G, m) batches in which the entry varied.
        weight: (G,) images.
    """

    name = "minibatch"

    def __init__(
        self,
        n_batches: int,
        *,
        kernel: str | Kernel | Block = "linear",
        bandwidth: float = 1.0,
        unbiased: bool = True,
    ) -> None:
        if not unbiased:
            raise ValueError("biased minibatch CKA: unbiased=False: use estimator='exact'")
        check_bandwidth(bandwidth)
        self.kernel = get_kernel(kernel)
        self.bandwidth = bandwidth
        self.n_batches = n_batches
        self.groups = min(MAX_GROUPS, n_batches)
        self.keys: list[Any] = []
        self.sigma: dict[Hashable, float] = {}
        self.waiting: list[tuple[int, _Grams]] = []  # batches before the bandwidth is known
        self._open: _Grams = {}
        self._shard = False  # another estimator of the run fixes the bandwidth
        self._begin([])

    @property
    def ready(self) -> bool:
        """Whether the bandwidths are known, if the kernel has any."""
        return not self.kernel.needs_bandwidth or bool(self.sigma)

    def update(self, key: Hashable, features: Tensor) -> None:
        """Take features (b, d) of one entry; only their (b, b) Gram is kept.

        Raises:
            ValueError: fewer than 4 images.
            NonFiniteFeaturesError: NaN or Inf.
        """
        check_n(features.shape[0])
        self._open[key] = gram_of_batch(features, self.kernel)

    def end_batch(self, index: int) -> None:
        """Add the open batch to the sums of its group.

        Raises:
            ValueError: the entries are not those of the first batch.
            NonFiniteFeaturesError: NaN or Inf, found on an accelerator.
        """
        grams, self._open = self._open, {}
        if not self.keys:
            self._begin(list(grams))
        check_entries(self.keys, grams, index)
        if not self.kernel.needs_bandwidth or self.sigma:
            self._add(index, grams)
            return
        check_all_finite({key: one.largest for key, one in grams.items()})
        self.waiting.append((index, grams))
        self._try_bandwidth()

    def _begin(self, keys: list[Any]) -> None:
        """Zero sums for these entries."""
        m = len(keys)
        self.keys, self.hsic = keys, np.zeros((self.groups, m, m))
        self.floor, self.varied = np.zeros((self.groups, m)), np.zeros((self.groups, m))
        self.weight = np.zeros(self.groups)

    def _try_bandwidth(self, *, last: bool = False) -> None:
        """Fix the bandwidths once 256 images, or all of the run, have come; add what waited."""
        if self._shard or not self.waiting:
            return
        sizes = [(index, len(grams[self.keys[0]].block)) for index, grams in self.waiting]
        counts = images_by_batch(sizes, BANDWIDTH_IMAGES)
        all_here = len(self.waiting) == self.n_batches or last
        if sum(counts.values()) < BANDWIDTH_IMAGES and not all_here:
            return
        self.sigma = {key: self._median(key, counts) for key in self.keys}
        waiting, self.waiting = self.waiting, []
        for index, grams in waiting:
            self._add(index, grams)

    def _median(self, key: Hashable, counts: dict[int, int]) -> float:
        """The bandwidth from the distances within the waiting batches."""
        blocks = [
            grams[key].block[: counts[index], : counts[index]]
            for index, grams in sorted(self.waiting, key=lambda one: one[0])
            if counts.get(index, 0) > 1
        ]
        eps = max(float(grams[key].eps) for _, grams in self.waiting)
        return median_bandwidth(blocks, self.bandwidth, eps)

    def _add(self, index: int, grams: _Grams) -> None:
        found = [grams[key] for key in self.keys]
        home = found[0].block.device
        eps = torch.stack([one.eps.to(home) for one in found])  # (m,)
        sigma = [self.sigma.get(key, 1.0) for key in self.keys]
        # zero where an entry is constant, or has no bandwidth
        varies = eps > 0
        usable = varies & (torch.tensor(sigma, dtype=torch.float64, device=home) > 0)
        stack = torch.stack(
            [
                self.kernel.finish(one.block.to(home), s if s > 0 else 1.0)
                for one, s in zip(found, sigma, strict=True)
            ]
        )  # (m, b, b)
        stack = torch.where(usable[:, None, None], stack, 0.0)
        m, n = stack.shape[:2]
        trace = torch.diagonal(stack, dim1=-2, dim2=-1).sum(-1)
        hsic, floor = hsic_pairs(stack), rounding_floor(trace, eps, n)
        largest = torch.stack([one.largest.to(home) for one in found])
        # all that the host wants of a batch, in one message
        sums = torch.cat([hsic.flatten(), floor, varies.double(), largest]).cpu()
        check_all_finite(dict(zip(self.keys, sums[m * m + 2 * m :], strict=True)))
        numbers = sums.numpy()
        group = index * self.groups // self.n_batches
        self.hsic[group] += n * numbers[: m * m].reshape(m, m)
        self.floor[group] += n * numbers[m * m : m * m + m]
        self.varied[group] += numbers[m * m + m : m * m + 2 * m]
        self.weight[group] += n

    def new_shard(self) -> Minibatch:
        """An estimator for other batches of the same run, with its entries and bandwidths.

        It does not fix bandwidths: its first batches wait until they are merged.
        """
        shard = Minibatch(self.n_batches, kernel=self.kernel, bandwidth=self.bandwidth)
        shard._begin(list(self.keys))
        shard.sigma, shard._shard = dict(self.sigma), True
        return shard

    def merge(self, other: Minibatch) -> None:
        """Add the sums of an estimator over other batches of the same run.

        Raises:
            ValueError: other entries or another number of batches.
        """
        if not self.keys:
            self._begin(list(other.keys))
        if (other.keys and self.keys != other.keys) or self.n_batches != other.n_batches:
            raise ValueError("sums of another run: entries or batches differ: merge equal runs")
        if other.keys:
            for name in _SUMS:
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sigma = self.sigma or dict(other.sigma)
        if self.sigma:
            for index, grams in other.waiting:
                self._add(index, grams)
        else:
            self.waiting += other.waiting
        other.waiting = []
        self._try_bandwidth()

    def compute(self) -> Result:
        """CKA, standard errors (jackknife over groups of batches) and what is degenerate."""
        self._try_bandwidth(last=True)
        used = self.weight > 0
        hsic, floor, weight = self.hsic[used], self.floor[used], self.weight[used]
        total, w = hsic.sum(0), weight.sum()
        cka = normalise(total / w, floor.sum(0) / w)
        rest = (w - weight)[:, None]
        if len(weight) > 1:
            left = normalise(
                (total - hsic) / rest[..., None], np.maximum(floor.sum(0) - floor, 0) / rest
            )
            stderr = jackknife(cka, left, weight)
        else:
            stderr = np.full(cka.shape, np.nan)
        constant = self.varied.sum(0) == 0
        coincident = np.array([self.sigma.get(key) == 0.0 for key in self.keys], dtype=bool)
        return finish(
            self.keys, cka, stderr, int(used.sum()), constant, coincident=coincident & ~constant
        )

    def state_dict(self) -> State:
        """The sums, the bandwidths, and the batches that wait for them."""
        state: State = {"keys": list(self.keys), **{name: getattr(self, name) for name in _SUMS}}
        state["sigma"] = np.array([self.sigma[key] for key in self.keys if self.sigma])
        state["waiting"] = np.array([index for index, _ in self.waiting], dtype=np.int64)
        for index, grams in self.waiting:
            found = [grams[key] for key in self.keys]
            state[f"blocks {index}"] = torch.stack([one.block.cpu() for one in found]).numpy()
            state[f"eps {index}"] = torch.stack([one.eps.cpu() for one in found]).numpy()
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: sums of another shape, from a run with other batches or entries.
        """
        self._begin(list(state["keys"]))
        for name in _SUMS:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"sums of another shape: {name}")
            setattr(self, name, np.array(state[name], dtype=np.float64))
        if len(state["sigma"]):
            self.sigma = dict(zip(self.keys, map(float, state["sigma"]), strict=True))
        zero = torch.zeros((), dtype=torch.float64)
        for index in state["waiting"].tolist():
            blocks, eps = (torch.from_numpy(state[f"{name} {index}"]) for name in ("blocks", "eps"))
            found = (BatchGram(b, e, zero) for b, e in zip(blocks, eps, strict=True))
            self.waiting.append((index, dict(zip(self.keys, found, strict=True))))
