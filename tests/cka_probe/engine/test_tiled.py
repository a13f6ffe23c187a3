"""Tiles of Grams: whatever their size, the same sums; each block made once; a cache is enough."""

from collections import Counter

import numpy as np
import oracle
import pytest
import torch

from cka_probe.engine import tiled as tiles
from cka_probe.engine.hsic import normalise
from cka_probe.engine.kernels import get_kernel
from cka_probe.engine.tiled import FeatureBlocks, TiledSums, tiled_result

N, GROUPS = 83, 6


def features():
    g = torch.Generator().manual_seed(3)
    shared = torch.randn(N, 4, generator=g, dtype=torch.float64)
    return [
        shared @ torch.randn(4, d, generator=g, dtype=torch.float64)
        + torch.randn(N, d, generator=g, dtype=torch.float64)
        for d in (5, 11, 200)
    ]


class Counted(FeatureBlocks):
    """Remembers what was asked for."""

    def __init__(self, kernel):
        super().__init__(features(), kernel)
        self.asked = Counter()
        self.widest = 0

    def base(self, i, rows, columns):
        for row in range(rows.start, rows.stop):
            for column in range(columns.start, columns.stop):
                self.asked[i, row, column] += 1
        self.widest = max(self.widest, columns.stop - columns.start)
        return super().base(i, rows, columns)


def summed(kernel, **options):
    source = Counted(get_kernel(kernel))
    return TiledSums(source, source.kernel, groups=GROUPS, **options)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("cache", "tile"), [(1, 2**20), (8 * 3 * 7 * 20, 8 * 3 * 83 * 7), (1, 1)])
def test_small_tiles_give_the_sums_of_one(kernel, unbiased, cache, tile, monkeypatch):
    whole = summed(kernel, unbiased=unbiased)
    monkeypatch.setattr(tiles, "_CACHE_BYTES", cache)
    small = summed(kernel, unbiased=unbiased, tile_bytes=tile)
    assert len(small._chunks(0, 7)) > 1
    for name in ("a", "a_own", "rows", "trace"):
        ours, theirs = getattr(small, name), getattr(whole, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))
    cka, stderr, groups = tiled_result(small)
    assert groups == GROUPS
    np.testing.assert_allclose(stderr, tiled_result(whole)[1], rtol=1e-8)
    x = [z.numpy() for z in features()]
    for i in range(3):
        for j in range(i):
            expected = oracle.cka(x[i], x[j], kernel, unbiased)
            assert cka[i, j] == pytest.approx(expected, abs=1e-10)


def test_leaving_a_group_out_equals_never_having_had_it(monkeypatch):
    monkeypatch.setattr(tiles, "_CACHE_BYTES", 8 * 3 * 5 * 30)
    sums = summed("linear", tile_bytes=8 * 3 * 83 * 5)
    for g, (start, stop) in enumerate(sums.bounds):
        ours = normalise(*sums.hsic(g))
        x = [np.delete(z.numpy(), np.s_[start:stop], axis=0) for z in features()]
        for i in range(3):
            for j in range(i):
                assert ours[i, j] == pytest.approx(oracle.cka(x[i], x[j]), abs=1e-10)


def test_a_chunk_fits_the_cache_and_chunks_hold_each_group_once(monkeypatch):
    monkeypatch.setattr(tiles, "_CACHE_BYTES", 8 * 3 * 10 * 30)
    sums = summed("linear")
    for g in range(GROUPS):
        chunks = sums._chunks(g, 10)
        assert [h for a, b in chunks for h in range(a, b)] == list(range(g, GROUPS))
        for a, b in chunks:
            wide = sums.bounds[b - 1][1] - sums.bounds[a][0]
            assert wide <= 30 or b == a + 1
    assert max(b - a for a, b in sums._chunks(0, 10)) == 2  # 30 columns hold two groups of 14


def test_every_block_of_the_upper_half_is_made_once(monkeypatch):
    for cache in (1, 8 * 3 * 10 * 30, 2**24):
        monkeypatch.setattr(tiles, "_CACHE_BYTES", cache)
        source = summed("linear", tile_bytes=8 * 3 * 83 * 4).source
        assert set(source.asked.values()) == {1}
        bounds = np.linspace(0, N, GROUPS + 1).round().astype(int)
        group = np.searchsorted(bounds, np.arange(N), side="right")
        upper = {(i, r, c) for i in range(3) for r in range(N) for c in range(N)
                 if group[c] >= group[r]}  # fmt: skip
        assert set(source.asked) == upper
