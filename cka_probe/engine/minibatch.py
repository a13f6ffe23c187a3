"""Estimators of CKA between m entries over a stream of batches.

An estimator takes features one entry at a time (`put`), closes each batch (`close_batch`), and
answers with `result`. What it keeps between batches is float64 sums of fixed shape (`Minibatch`),
the features themselves (`Exact`), or k numbers in their place (`Sketch`).
"""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.bandwidth import check_bandwidth, counted, median_bandwidth
from cka_probe.engine.device import Measured, device_block, on_accelerator, refuse, refuse_all
from cka_probe.engine.estimator import (
    BANDWIDTH_IMAGES,
    EXACT_GROUPS,
    Estimator,
    Result,
    check_entries,
    finish,
)
from cka_probe.engine.exact import Exact
from cka_probe.engine.hsic import check_n, hsic_pairs, jackknife, normalise, rounding_floor
from cka_probe.engine.kernels import (
    Block,
    Kernel,
    batch_block,
    full_precision,
    get_kernel,
)
from cka_probe.engine.sketch import Sketch

__all__ = ["ESTIMATORS", "EXACT_GROUPS", "Estimator", "Exact", "Minibatch", "Result", "Sketch"]

MAX_GROUPS = 32

_Blocks = dict[Hashable, tuple[Tensor, float] | Measured]


class Minibatch:
    """HSIC_1 summed over batches, then the ratio (Nguyen et al. 2021, equation 3).

    A batch weighs what it holds: HSIC = sum_b n_b HSIC_1(b) / sum_b n_b. Batches are folded into
    at most 32 groups by their index, so that merging, resuming and the jackknife are additions.
    Memory: m b^2 for the open batch and 32 m^2 for the sums, whatever the number of images.
    With the RBF kernel the squared distances of the first 256 images are held until the bandwidth
    is known (their within-batch median), so that no forward is spent on it.

    Args:
        n_batches: batches in the whole run, over all ranks.
        kernel: a name in KERNELS or a callable on centred features (p, d), (q, d).
        bandwidth: RBF sigma as a multiple of the median distance.
        unbiased: HSIC_1. The biased HSIC_0 is refused: averaged over batches it says that
            independent features are alike (0.94 for Gaussians at d = 512 and batches of 32).
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
        self._open: _Blocks = {}
        self.waiting: list[tuple[int, _Blocks]] = []
        self.holds = (
            False  # True: others have batches too, and `fix_bandwidth` is called from outside
        )
        self._images = 0
        self._closed = 0
        self.hsic = np.zeros((self.groups, 0, 0))  # (G, m, m) sums of n_b HSIC_1(b)
        self.floor = np.zeros(
            (self.groups, 0)
        )  # (G, m) what rounding alone could add to HSIC(x, x)
        self.varied = np.zeros((self.groups, 0))  # (G, m) batches in which the entry varied
        self.weight = np.zeros(self.groups)  # (G,) images

    def put(self, key: Hashable, x: Tensor) -> None:
        """Take features (b, d) of `key`; only their (b, b) block is kept.

        Raises:
            ValueError: fewer than 4 images.
            NonFiniteFeaturesError: NaN or Inf.
        """
        check_n(x.shape[0])
        with full_precision(x.device), torch.no_grad():
            block = device_block if on_accelerator(x) else batch_block
            self._open[key] = block(x, self.kernel)

    def close_batch(self, index: int) -> None:
        """Add the open batch to the sums of its group.

        Raises:
            ValueError: the entries are not those of the first batch.
        """
        blocks, self._open = self._open, {}
        if not self.keys:
            self.begin(list(blocks))
        check_entries(self.keys, blocks, index)
        self._closed += 1
        self._images += len(next(iter(blocks.values()))[0])
        if not self.kernel.needs_bandwidth or self.sigma:
            self._add(index, blocks)
            return
        refuse_all({k: one.largest for k, one in blocks.items() if isinstance(one, Measured)})
        self.waiting.append((index, blocks))
        enough = self._images >= BANDWIDTH_IMAGES or self._closed == self.n_batches
        if enough and not self.holds:
            self.fix_bandwidth()

    def begin(self, keys: list[Any]) -> None:
        """Make room for the sums of these entries."""
        m = len(keys)
        self.keys, self.hsic = keys, np.zeros((self.groups, m, m))
        self.floor, self.varied = np.zeros((self.groups, m)), np.zeros((self.groups, m))
        self.weight = np.zeros(self.groups)

    def fix_bandwidth(self, sigma: list[float] | None = None) -> None:
        """Take the bandwidths given, or those of the waiting batches, and add what waited."""
        if sigma is None:
            sigma = [median_bandwidth(self._first(key), self.bandwidth) for key in self.keys]
        self.sigma = dict(zip(self.keys, sigma, strict=True))
        waiting, self.waiting = self.waiting, []
        for index, blocks in waiting:
            self._add(index, blocks)

    def _first(self, key: Hashable) -> list[Tensor]:
        """Distances within the batches that wait, of the first 256 images."""
        sizes = [(index, len(blocks[key][0])) for index, blocks in self.waiting]
        count = counted(sizes, BANDWIDTH_IMAGES)
        cut = ((blocks[key][0], count.get(index, 0)) for index, blocks in self.waiting)
        return [block[:n, :n] for block, n in cut if n > 1]

    def _gram(self, key: Hashable, found: tuple[Tensor, float] | Measured) -> Tensor:
        """The Gram of one entry; zero where it is constant, or has no bandwidth."""
        block, sigma = found[0], self.sigma.get(key, 1.0)
        if sigma <= 0 or (not isinstance(found, Measured) and found[1] <= 0):
            return torch.zeros_like(block)
        gram = self.kernel.finish(block, sigma)
        return torch.where(found.eps > 0, gram, 0.0) if isinstance(found, Measured) else gram

    def _add(self, index: int, blocks: _Blocks) -> None:
        grams = [self._gram(key, blocks[key]) for key in self.keys]
        home = grams[0].device
        stack = torch.stack([g.to(home) for g in grams])  # (m, b, b)
        m, n = stack.shape[:2]
        trace = torch.diagonal(stack, dim1=-2, dim2=-1).sum(-1)
        told = [blocks[key] for key in self.keys]
        if any(isinstance(one, Measured) for one in told):
            zero = torch.zeros((), dtype=torch.float64, device=home)
            eps = torch.stack([torch.as_tensor(one[1], device=home).double() for one in told])
            largest = torch.stack(
                [one.largest.to(home) if isinstance(one, Measured) else zero for one in told]
            )
        else:
            eps = torch.tensor([one[1] for one in told], device=home).double()
            largest = eps
        hsic, floor = hsic_pairs(stack), rounding_floor(trace, eps, n)
        # all that the host wants of a batch, in one message
        sums = torch.cat([hsic.flatten(), floor, (trace > 0).double(), largest]).cpu().numpy()
        for key, value in zip(self.keys, sums[m * m + 2 * m :].tolist(), strict=True):
            refuse(value, key)
        group = index * self.groups // self.n_batches
        self.hsic[group] += n * sums[: m * m].reshape(m, m)
        self.floor[group] += n * sums[m * m : m * m + m]
        self.varied[group] += sums[m * m + m : m * m + 2 * m]
        self.weight[group] += n

    def merge(self, other: "Minibatch") -> None:
        """Add the sums of another estimator over other batches of the same run.

        Raises:
            ValueError: other entries or another number of batches.
        """
        if self.keys != other.keys or self.n_batches != other.n_batches:
            raise ValueError("sums of another run: entries or batches differ: merge equal runs")
        self.hsic = self.hsic + other.hsic
        self.floor, self.varied = self.floor + other.floor, self.varied + other.varied
        self.weight = self.weight + other.weight

    def result(self) -> Result:
        """CKA, standard errors (jackknife over groups of batches) and what is degenerate."""
        if self.waiting:
            self.fix_bandwidth()
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
        return finish(self.keys, cka, stderr, int(used.sum()), self.varied.sum(0) == 0)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "minibatch": Minibatch,
    "exact": Exact,
    "sketch": Sketch,
}
