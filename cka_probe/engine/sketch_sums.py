"""HSIC of sketched entries, with groups of images and blocks of the sketch left out.

K^_b = Y_b Y_b^T is the Gram matrix of one block, K^ their mean; both are unbiased for K. HSIC is
bilinear, so HSIC(K^, L^) is unbiased where the entries drew their own matrices, and HSIC(K, K) is
the mean of HSIC(K^_b, K^_c) over unequal blocks (the blocks are independent; a block with itself
is biased). All come from Song's three sums (Song et al. 2012, equation 5).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.hsic import Array, jackknife, normalise, rounding_floor, song
from cka_probe.engine.memory import SKETCH_WORK_BYTES, over_images
from cka_probe.engine.products import full_precision
from cka_probe.engine.projection import BLOCKS


@dataclass
class _Sums:
    """Sums over i != j of K_ij L_ij; index 0 of `total` and `own` is everything, g + 1 lacks g."""

    total: Tensor  # (G + 1, m, m) K^ with L^
    own: Tensor  # (G + 1, m) sum over b of K^_b with itself
    cross: Tensor  # (q, m, m) K^_b with L^
    same: Tensor  # (q, m, m) K^_b with L^_b


class SketchSums:
    """HSICs of m sketched entries over n images.

    Two ways give the same sums. Over images: tiles of the (n, n) Grams, n^2 (m k + 17 m^2). Over
    features: products Y_x^T Y_y, n (m k)^2. The cheaper one is taken.

    Args:
        features: m tensors (n, k_e), columns centred.
        kept: entries that are no sketch but the features themselves: every block is the whole.
        groups: G, contiguous groups of images for the jackknife.
        way: "images", "features" or None for the cheaper.
    """

    def __init__(
        self, features: list[Tensor], kept: list[bool], groups: int, way: str | None = None
    ) -> None:
        self.y, self.kept, self.q = features, kept, BLOCKS
        self.m, self.n, self.groups = len(features), len(features[0]), max(groups, 1)
        bounds = np.linspace(0, self.n, self.groups + 1).round().astype(int)
        self.bounds = [(int(a), int(b)) for a, b in pairwise(bounds)]
        self.home = features[0].device if features[0].device.type == "cuda" else torch.device("cpu")
        self.rows = self._zeros(self.m, self.n, self.groups)  # row sums of K^ over group h
        self.block_rows = self._zeros(self.m, self.q, self.n)
        self.diagonal = self._zeros(self.m, self.q, self.n)
        self.own_rows = self._zeros(2, self.groups + 1, self.m)  # sum_b |r_b|^2, sum_b (1'r_b)^2
        if way is None:
            width = sum(y.shape[1] for y in features)
            way = "images" if over_images(self.n, width, self.m) else "features"
        with torch.no_grad(), full_precision(self.home):
            for e in range(self.m):
                self._row_sums(e)
            self.sums = self._over_images() if way == "images" else self._over_features()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.home)

    def _blocks(self, e: int, rows: slice) -> Tensor:
        """Rows of entry e by block: (q, r, k_e / q), or (1, r, k_e) where it was kept."""
        y = self.y[e][rows].to(self.home)
        return y[None] if self.kept[e] else y.view(len(y), self.q, -1).transpose(0, 1)

    def _without(self, g: int) -> Tensor:
        """The images outside group g; all of them for -1."""
        keep = torch.ones(self.n, dtype=torch.bool, device=self.home)
        if g >= 0:
            keep[slice(*self.bounds[g])] = False
        return keep

    def _row_sums(self, e: int) -> None:
        """Row sums of every block's Gram without its diagonal, by group of columns."""
        spans = [slice(*ends) for ends in self.bounds]
        columns = [self._blocks(e, span).sum(1, dtype=torch.float64) for span in spans]
        of_group = torch.stack(columns, -1)  # (q, k, G)
        left = self._zeros(self.q, self.groups + 1)  # 1'r_b, everything and without each group
        for g, span in enumerate(spans):
            y = self._blocks(e, span).double()
            square, sums = y.square().sum(2), y @ of_group  # (q, r), (q, r, G)
            sums[:, :, g] -= square
            r = sums.sum(2)
            self.diagonal[e, :, span], self.block_rows[e, :, span] = square, r
            self.rows[e, span] = sums.mean(0)
            without = torch.cat([r[:, :, None], r[:, :, None] - sums], 2)  # (q, r, G + 1)
            without[:, :, g + 1] = 0
            self.own_rows[0, :, e] += without.square().sum(1).expand(self.q, -1).sum(0)
            left += without.sum(1)
        self.own_rows[1, :, e] = left.square().sum(0)

    def _empty(self) -> _Sums:
        g, m, q = self.groups, self.m, self.q
        return _Sums(
            self._zeros(g + 1, m, m), self._zeros(g + 1, m),
            self._zeros(q, m, m), self._zeros(q, m, m),
        )  # fmt: skip

    def _over_images(self) -> _Sums:
        """Tiles of the upper triangle of the Grams; the mirror tile counts twice."""
        out, g_all, m = self._empty(), self.groups, self.m
        touching = [self._zeros(g_all, m, m), self._zeros(g_all, m)]  # i or j in g
        for g, (start, stop) in enumerate(self.bounds):
            for h in range(g, g_all):
                left, right = self.bounds[h]
                step = max(1, SKETCH_WORK_BYTES // (8 * m * (self.q + 2) * max(right - left, 1)))
                for top in range(start, stop, step):
                    rows, columns = slice(top, min(top + step, stop)), slice(left, right)
                    v = torch.stack([self._tile(e, rows, columns) for e in range(m)])  # (m, q, rc)
                    total, twice = v.mean(1), 1 if g == h else 2
                    product, own = total @ total.T, v.square().sum((1, 2))
                    out.total[0] += twice * product
                    out.own[0] += twice * own
                    for k in {g, h}:
                        touching[0][k] += twice * product
                        touching[1][k] += twice * own
                    v = v.transpose(0, 1)
                    out.cross += twice * (v @ total.T)
                    out.same += twice * (v @ v.transpose(1, 2))
        out.total[1:] = out.total[0] - touching[0]
        out.own[1:] = out.own[0] - touching[1]
        return out

    def _tile(self, e: int, rows: slice, columns: slice) -> Tensor:
        """Block Grams of entry e, (q, r * c) float64, zero on the diagonal."""
        k = (self._blocks(e, rows) @ self._blocks(e, columns).transpose(1, 2)).double()
        if rows.start < columns.stop and columns.start < rows.stop:
            torch.diagonal(k, offset=rows.start - columns.start, dim1=1, dim2=2).zero_()
        return k.flatten(1).expand(self.q, -1)

    def _over_features(self) -> _Sums:
        """|Y_x^T Y_y|^2 by pairs of blocks, less what the diagonals of the Grams hold."""
        out = self._empty()
        for x in range(self.m):
            for y in range(x, self.m):
                table = self._table(x, y)  # (G + 1, q, q)
                if x == y:
                    out.own[:, x] = torch.diagonal(table, dim1=1, dim2=2).sum(1)
                by_x, by_y = table[0].mean(1), table[0].mean(0)
                for a, b, row in ((x, y, by_x), (y, x, by_y)):
                    out.total[:, a, b] = table.mean((1, 2))
                    out.cross[:, a, b] = row
                    out.same[:, a, b] = torch.diagonal(table[0])
        return out

    def _table(self, x: int, y: int) -> Tensor:
        """Sums over i != j of K^_b,ij L^_c,ij, (G + 1, q, q)."""
        wide, deep = (1 if self.kept[e] else self.q for e in (x, y))  # blocks
        step = self.y[y].shape[1] // deep  # columns of a block
        per = max(1, SKETCH_WORK_BYTES // (8 * self.groups * self.y[x].shape[1] * step))
        parts = []
        for first in range(0, deep, per):
            columns = slice(first * step, min(first + per, deep) * step)
            by_group = [
                self.y[x][top:end].to(self.home).double().T
                @ self.y[y][top:end, columns].to(self.home).double()
                for top, end in self.bounds
            ]
            whole = torch.stack(by_group).sum(0)  # (k, k')
            sums = [whole, *(whole - part for part in by_group)]
            parts.append(
                torch.stack([
                    c.square_().view(wide, len(c) // wide, -1, step).sum((1, 3)) for c in sums
                ])
            )  # fmt: skip
        table = torch.cat(parts, 2).expand(-1, self.q, self.q).clone()
        own = torch.stack(
            [self.diagonal[x][:, a:b] @ self.diagonal[y][:, a:b].T for a, b in self.bounds]
        )
        table -= own.sum(0)
        table[1:] += own
        return table

    def hsic(self, g: int = -1) -> tuple[Array, Array]:
        """HSIC of all pairs (m, m) and sum_b HSIC(K^_b, K^_b) (m,), without group g (-1: with)."""
        keep = self._without(g)
        n = int(keep.sum())
        r = self.rows.sum(2) - (self.rows[:, :, g] if g >= 0 else 0)
        r = r[:, keep]
        s = r.sum(1)
        total = song(self.sums.total[g + 1], r @ r.T, torch.outer(s, s), n)
        own = song(self.sums.own[g + 1], self.own_rows[0, g + 1], self.own_rows[1, g + 1], n)
        return total.cpu().numpy(), own.cpu().numpy()

    def by_block(self) -> tuple[Array, Array]:
        """HSIC(K^_b, L^) and HSIC(K^_b, L^_b), each (q, m, m)."""
        r = self.block_rows.transpose(0, 1)  # (q, m, n)
        s = r.sum(2)  # (q, m)
        mean, mean_s = r.mean(0), s.mean(0)
        cross = song(self.sums.cross, r @ mean.T, s[:, :, None] * mean_s, self.n)
        same = song(self.sums.same, r @ r.transpose(1, 2), s[:, :, None] * s[:, None], self.n)
        return cross.cpu().numpy(), same.cpu().numpy()


def unbiased_norms(total: Array, own: Array, q: int) -> Array:
    """HSIC (..., m, m) whose diagonal comes from unequal blocks only."""
    total = total.copy()
    i = np.arange(total.shape[-1])
    total[..., i, i] = (q * q * total[..., i, i] - own) / (q * (q - 1))
    return total


def sketched_result(sums: SketchSums, eps: Array) -> tuple[Array, Array, Array]:
    """CKA (m, m), its sampling error, and the sketch's own error: jackknives over images, blocks.

    Args:
        sums: of centred sketches.
        eps: (m,) machine epsilon of the features.

    Returns:
        (cka, sampling, sketch), each (m, m) float64; sampling is nan with fewer than 2 groups.
    """
    q = sums.q
    trace = sums.diagonal.mean(1).sum(1).cpu()
    floor = rounding_floor(trace, torch.from_numpy(eps), sums.n).numpy()
    total, own = sums.hsic()
    cka = normalise(unbiased_norms(total, own, q), floor)
    sampling = np.full(cka.shape, np.nan)
    if sums.groups > 1:
        left = [unbiased_norms(*sums.hsic(g), q) for g in range(sums.groups)]
        sizes = np.array([stop - start for start, stop in sums.bounds], dtype=np.float64)
        sampling = jackknife(cka, normalise(np.stack(left), floor), sizes)
    cross, same = sums.by_block()
    i = np.arange(sums.m)
    fewer = q * q * total - q * (cross + np.swapaxes(cross, 1, 2)) + same  # (q, m, m)
    unequal = q * q * total[i, i] - own - 2 * (q * cross[:, i, i] - same[:, i, i])
    fewer /= (q - 1) ** 2
    fewer[:, i, i] = unequal / ((q - 1) * (q - 2))
    sketch = jackknife(cka, normalise(fewer, floor), np.ones(q))
    return cka, sampling, sketch
