"""Exact HSIC of all pairs of entries in bounded memory: Song's three sums, tile by tile.

The (n, n) Grams are never held: a tile of rows of every entry is taken, multiplied, and added to
float64 sums kept per group of images. The HSICs with a group left out follow from the same sums,
so error bars cost no second pass.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.centring import centre_full, feature_eps
from cka_probe.engine.hsic import Array, hsic_from_sums, jackknife, normalise, rounding_floor
from cka_probe.engine.kernels import KERNELS, Kernel, median_bandwidth
from cka_probe.engine.memory import TILE_BYTES
from cka_probe.engine.products import (
    distances,
    full_precision,
    product,
    squared_distances,
    squared_norms,
)

_CACHE_BYTES = 2**24  # float64 numbers of one tile of every entry, while they are summed
_BANDWIDTH_ROWS = 256  # of distances at a time, and no fewer than an eighth
_LEVEL_IMAGES = 256  # whose mean similarity is taken off a kernel of the user's
LINEAR = KERNELS["linear"]
_SUM_EPS = 64 * float(np.finfo(np.float64).eps)  # what Song's sums lose of the largest of them


class FeatureBlocks:
    """Tiles straight from m features (n, d).

    Args:
        features: m tensors (n, d); emptied as they are centred, to halve the peak.
        kernel: how blocks are made.
    """

    def __init__(self, features: list[Tensor], kernel: Kernel) -> None:
        self.n, self.m, self.kernel = features[0].shape[0], len(features), kernel
        self.home = features[0].device if features[0].device.type == "cuda" else torch.device("cpu")
        self.x: list[Tensor] = []
        self.eps: list[float] = []
        constant = []
        for i in range(self.m):
            centred = centre_full(features[i])
            self.eps.append(feature_eps(features[i].dtype))
            features[i] = torch.empty(0)
            # CKA does not depend on the scale, except through a user's own kernel
            self.x.append(centred.x if kernel.quadratic else centred.x * centred.scale)
            constant.append(centred.constant)
        self.constant = np.array(constant)
        squares = kernel.base is squared_distances
        self._norms = [squared_norms(x) for x in self.x] if squares else []

    def base(self, i: int, rows: slice, columns: slice) -> Tensor:
        """The kernel's `base` (float64) of entry i for these rows and columns."""
        a, b = self.x[i][rows], self.x[i][columns]
        if not self._norms:
            return self.kernel.base(a, b)
        return distances(product(a, b), self._norms[i][rows], self._norms[i][columns])

    def diagonal(self, i: int) -> Tensor:
        """(n,) float64, of the linear Gram of entry i."""
        return squared_norms(self.x[i])


class TiledSums:
    """Sums over tiles of m Gram matrices (n, n).

    Args:
        source: where the tiles come from.
        kernel: how they are finished.
        groups: G, contiguous groups of images for the jackknife.
        bandwidth: RBF sigma as a multiple of the median distance.
        bandwidth_images: images whose pairs fix the bandwidth; None for all.
        unbiased: whether the diagonal is left out.
        tile_bytes: float64 numbers of one tile of every entry; about three times it is in use.

    Attributes:
        a: (G, m, m) sum over i in g, all j, of K_ij L_ij.
        a_own: (G, m, m) the same over i and j both in g.
        rows: (m, n, G) sum over j in g of K_ij.
        trace: (m,) traces. eps: (m,) epsilon of the Gram's dtype. constant: (m,) bool.
    """

    def __init__(
        self,
        source: FeatureBlocks,
        kernel: Kernel,
        *,
        groups: int,
        bandwidth: float = 1.0,
        bandwidth_images: int | None = None,
        unbiased: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        self.source = source
        self.n, self.m, self.groups = source.n, source.m, max(groups, 1)
        self.unbiased, self.tile_bytes = unbiased, tile_bytes
        self.kernel, self.home = kernel, source.home
        bounds = np.linspace(0, self.n, self.groups + 1).round().astype(int)
        self.bounds = [(int(a), int(b)) for a, b in pairwise(bounds)]
        self.constant = source.constant
        self.sigma = self._bandwidths(bandwidth, bandwidth_images)
        self.shift = [self._shift(i, bandwidth) for i in range(self.m)]
        self.eps = torch.tensor(source.eps, dtype=torch.float64)
        self.a = self._zeros(self.groups, self.m, self.m)
        self.a_own = self._zeros(self.groups, self.m, self.m)
        self.rows = self._zeros(self.m, self.n, self.groups)
        self.trace = torch.zeros(self.m, dtype=torch.float64)
        with torch.no_grad(), full_precision(self.home):
            self._run()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.home)

    def _bandwidths(self, fraction: float, images: int | None) -> list[float]:
        if not self.kernel.needs_bandwidth:
            return [1.0] * self.m
        sigma, first = [], slice(0, min(images or self.n, self.n))
        step = max(_BANDWIDTH_ROWS, -(-first.stop // 8))  # of the upper half, which is enough
        for i, constant in enumerate(self.constant):
            with torch.no_grad(), full_precision(self.home):
                d2 = [] if constant else [
                    self.source.base(i, slice(top, min(top + step, first.stop)),
                                     slice(top, first.stop))
                    for top in range(0, first.stop, step)
                ]  # fmt: skip
            sigma.append(median_bandwidth(d2, fraction, self.source.eps[i]) if d2 else 0.0)
        return sigma

    def _shift(self, i: int, fraction: float) -> Tensor | float:
        """U, (n,) or one for all: K_ij - u_i - u_j has the HSIC of K, and keeps its digits.

        Song's sums cancel where most of a Gram is row and column means. Of centred features those
        are known from the diagonal; an RBF Gram lies about its value at the median distance.
        """
        if self.constant[i]:
            return 0.0
        if self.kernel.needs_bandwidth:
            return float(np.exp(-0.5 / fraction**2)) / 2
        n = self.n
        with torch.no_grad(), full_precision(self.home):
            if self.kernel.base is not product or self.kernel.finish is not LINEAR.finish:
                first = slice(0, min(n, _LEVEL_IMAGES))
                block = self.kernel.finish(self.source.base(i, first, first), 1.0)
                apart = float(block.sum() - block.trace())
                return apart / (first.stop * (first.stop - 1)) / 2
            if not self.unbiased:  # the means of its rows are 0
                return 0.0
            own = self.source.diagonal(i).to(self.home)
            u: Tensor = own.sum() / (2 * (n - 1) * (n - 2)) - own / (n - 2)
        return u

    def _block(self, i: int, rows: slice, columns: slice, out: Tensor) -> None:
        """Gram block of entry i (float64), shifted; zero where the entry is degenerate."""
        if self.constant[i] or self.sigma[i] == 0.0:
            out.zero_()
            return
        block = self.kernel.finish(self.source.base(i, rows, columns), self.sigma[i])
        offset = rows.start - columns.start
        crossed = max(rows.start, columns.start) < min(rows.stop, columns.stop)
        if crossed:
            self.trace[i] += float(torch.diagonal(block, offset=offset).sum())
        shift = self.shift[i]
        if isinstance(shift, Tensor):
            torch.sub(block.to(self.home), shift[rows, None], out=out)
            out -= shift[columns]
        else:
            torch.sub(block.to(self.home), 2 * shift, out=out)
        if crossed and self.unbiased:
            torch.diagonal(out, offset=offset).zero_()

    def _run(self) -> None:
        for g, (start, stop) in enumerate(self.bounds):
            width = self.n - start
            step = max(1, min(stop - start, self.tile_bytes // (8 * self.m * width)))
            for top in range(start, stop, step):
                rows = slice(top, min(top + step, stop))
                self._add(g, rows)

    def _add(self, g: int, rows: slice) -> None:
        """Add the tiles of these rows, of group g, from its own columns on."""
        for first, last in self._chunks(g, rows.stop - rows.start):
            left, right = self.bounds[first][0], self.bounds[last - 1][1]
            shape = (self.m, rows.stop - rows.start, right - left)
            k = torch.empty(shape, dtype=torch.float64, device=self.home)
            for i in range(self.m):
                self._block(i, rows, slice(left, right), k[i])
            for h in range(first, last):
                start, stop = self.bounds[h]
                tile = k[:, :, start - left : stop - left]  # (m, r, c)
                v = tile.flatten(1)  # (m, r*c)
                product = v @ v.T
                self.a[g] += product
                self.rows[:, rows, h] += tile.sum(2)
                if h == g:
                    self.a_own[g] += product
                else:  # the mirror tile below the diagonal
                    self.a[h] += product
                    self.rows[:, start:stop, g] += tile.sum(1)

    def _chunks(self, g: int, rows: int) -> list[tuple[int, int]]:
        """Groups g.. in runs whose tiles fit a cache."""
        width = max(1, _CACHE_BYTES // (8 * self.m * rows))
        chunks, first = [], g
        for h in range(g, self.groups):
            if h > first and self.bounds[h][1] - self.bounds[first][0] > width:
                chunks.append((first, h))
                first = h
        return [*chunks, (first, self.groups)]

    def hsic(self, leave_out: int | None = None) -> tuple[Array, Array]:
        """HSIC of all pairs (m, m) and the rounding floor (m,), with a group left out or none."""
        a = self.a.sum(0)
        rows, n = self.rows.sum(2), self.n
        if leave_out is not None:
            start, stop = self.bounds[leave_out]
            a = a - 2 * self.a[leave_out] + self.a_own[leave_out]
            rows = rows - self.rows[:, :, leave_out]
            rows = torch.cat([rows[:, :start], rows[:, stop:]], 1)
            n = n - (stop - start)
        h = hsic_from_sums(a, rows, n, unbiased=self.unbiased).cpu().numpy()
        floor = rounding_floor(self.trace, self.eps, self.n, unbiased=self.unbiased).numpy()
        pairs = n * (n - 3) if self.unbiased else (n - 1) ** 2
        lost = _SUM_EPS * torch.diagonal(a).cpu().numpy() / pairs
        return h, np.maximum(floor, lost)


def tiled_result(sums: TiledSums) -> tuple[Array, Array, int]:
    """CKA (m, m), its standard errors (m, m) and the number of groups.

    Fewer than two groups (n < 8) have no error bar: nan.
    """
    cka = normalise(*sums.hsic())
    if sums.groups < 2:
        return cka, np.full(cka.shape, np.nan), sums.groups
    left = np.stack([normalise(*sums.hsic(g)) for g in range(sums.groups)])
    sizes = np.array([stop - start for start, stop in sums.bounds], dtype=np.float64)
    return cka, jackknife(cka, left, sizes), sums.groups
