"""The `exact` estimator: HSIC over the whole set, from features in memory or spooled to a file."""

import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path

from torch import Tensor

from cka_probe.engine.bandwidth import check_bandwidth
from cka_probe.engine.device import Watch
from cka_probe.engine.estimator import (
    BANDWIDTH_IMAGES,
    EXACT_GROUPS,
    Result,
    check_entries,
    finish,
)
from cka_probe.engine.hsic import check_n
from cka_probe.engine.kernels import Block, Kernel, get_kernel
from cka_probe.engine.memory import TILE_BYTES, exact_bytes, readable, spool_bytes, spool_columns
from cka_probe.engine.rows import Rows
from cka_probe.engine.spool import GramBlocks, Spool
from cka_probe.engine.tiled import Blocks, FeatureBlocks, TiledSums, tiled_result


class Exact:
    """HSIC over the whole set: features are kept, Grams are taken tile by tile at the end.

    On given features the result does not depend on how they were batched: the mean is a float64
    mean of the full set and the tiles are fixed. Memory: n x (sum of widths) for the features;
    where that is more than `memory`, they are spooled to a temporary file as they come and every
    Gram is made from it once, tile by tile.
    The RBF bandwidth is the median over all pairs of the first 256 images (`bandwidth_images`).

    Args:
        n_batches: ignored; there so that estimators are interchangeable.
        kernel: a name in KERNELS or a callable on centred features (p, d), (q, d); a callable
            cannot be spooled.
        bandwidth: RBF sigma as a multiple of the median distance.
        unbiased: HSIC_1 (Song et al. 2012), or the biased HSIC_0 (Gretton et al. 2005).
        bandwidth_images: images whose pairs fix the bandwidth; None for all.
        groups: of images, for the jackknife; at most a quarter of the images; 1 for no error bars.
        n_images: images in the run, so that memory is taken once; None where it is not known.
        memory: bytes that may be used, checked with the first batch; None for no limit.
        folder: where to spool; None for the system's temporary folder.
    """

    name = "exact"

    def __init__(
        self,
        n_batches: int = 1,
        *,
        kernel: str | Kernel | Block = "linear",
        bandwidth: float = 1.0,
        unbiased: bool = True,
        bandwidth_images: int | None = BANDWIDTH_IMAGES,
        groups: int = EXACT_GROUPS,
        n_images: int | None = None,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        del n_batches
        check_bandwidth(bandwidth)
        self.groups = groups
        self.kernel = get_kernel(kernel)
        self.bandwidth = bandwidth
        self.unbiased = unbiased
        self.bandwidth_images = bandwidth_images
        self.n_images, self.memory, self.folder = n_images, memory, folder
        self.rows: dict[Hashable, Rows] = {}
        self.spool: Spool | None = None
        self._keys: list[Hashable] = []
        self._sizes: list[tuple[int, int]] = []
        self._open: dict[Hashable, Tensor] = {}
        self._watch = Watch()

    def piece(self, key: Hashable, x: Tensor) -> list[Tensor]:
        """A copy of what `absorb` would keep, for another process's estimator."""
        self._watch.put(key, x)
        return [x.detach().clone()]

    def absorb(self, key: Hashable, piece: list[Tensor]) -> None:
        """Keep what the estimator of another process made."""
        self.put(key, piece[0])

    def settle(self) -> None:
        """Look at the pieces of a batch.

        Raises:
            NonFiniteFeaturesError: NaN or Inf.
        """
        self._watch.settle()

    def put(self, key: Hashable, x: Tensor) -> None:
        """Keep a copy of features (b, d) of `key`, in their dtype, where they are.

        Raises:
            NonFiniteFeaturesError: NaN or Inf.
            ValueError: neither memory nor disk would hold the features of all images.
        """
        self._watch.put(key, x)
        first = not self._keys
        if first and self.memory is not None and self.n_images is not None:
            self._sizes.append((x.shape[1], x.element_size()))
            self._fit(self.memory, self.n_images)
        if self.spool is not None:
            self.spool.append(key, x)
        elif not first and self.n_images is not None:
            self.rows[key].append(-1, x)
        else:
            self._open[key] = x.detach().clone()
            return
        self._open[key] = x[:, :0].clone()

    def close_batch(self, index: int) -> None:
        """File the open batch under its index; batches may come in any order.

        Raises:
            ValueError: the entries are not those of the first batch.
        """
        batch, self._open = self._open, {}
        self._watch.settle()
        check_entries(self._keys, batch, index)
        first, self._keys = not self._keys, self._keys or list(batch)
        for key, x in batch.items():
            if self.spool is not None:
                self.spool.name_last(key, index)
            elif first or self.n_images is None:
                self.rows.setdefault(key, Rows(self.n_images)).append(index, x)
            else:
                self.rows[key].name_last(index)

    def _fit(self, memory: int, n: int) -> None:
        """With every entry of the first batch: hold the features, or spool them, or refuse."""
        need = exact_bytes(n, self._sizes, groups=self.groups)
        if need <= memory:
            return
        least, disk = spool_bytes(n, self._sizes, memory, groups=self.groups)
        folder = self.folder or Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        known = self.kernel.name in ("linear", "rbf")
        if least <= memory and disk < free and known:
            if self.spool is None:
                self.spool = Spool(folder, spool_columns(n, memory))
                for key in list(self._open):
                    self.spool.append(key, self._open[key])
                    self._open[key] = self._open[key][:, :0].clone()
            return
        why = f"{readable(least)} even with features on disk" if least > memory else (
            f"{readable(disk)} of disk, {readable(free)} free" if known
            else f"kernel {self.kernel.name!r} cannot be spooled"
        )  # fmt: skip
        raise ValueError(
            f"exact does not fit in memory: {readable(need)} wanted, {readable(memory)} to use, "
            f"{why}: use estimator 'minibatch', reduce 'mean', or fewer layers or images"
        )

    def merge(self, other: "Exact") -> None:
        """Take the features of another estimator over other batches of the same run.

        Raises:
            ValueError: one of them has spooled its features.
        """
        if self.spool is not None or other.spool is not None:
            raise ValueError("spooled features: exact: merge needs them in memory")
        for key, rows in other.rows.items():
            self.rows.setdefault(key, Rows()).extend(rows)
        self._keys = list(self.rows)

    def result(self) -> Result:
        """CKA, standard errors (delete-a-group jackknife) and what is degenerate.

        The features are let go as they are used: call it once.
        """
        keys = list(self._keys)
        tile_bytes = TILE_BYTES
        if self.memory is not None:
            tile_bytes = min(TILE_BYTES, max(2**16, self.memory // 16))
        source: Blocks
        if self.spool is not None:
            check_n(self.spool.images(keys[0]))
            assert self.memory is not None
            source = GramBlocks(self.spool, self.kernel, self.memory, self.folder)
            self.spool.close()
        else:
            check_n(len(self.rows[keys[0]]))
            source = FeatureBlocks([self.rows.pop(key).take() for key in keys], self.kernel)
        sums = TiledSums(
            source,
            self.kernel,
            groups=min(self.groups, source.n // 4),
            bandwidth=self.bandwidth,
            bandwidth_images=self.bandwidth_images,
            unbiased=self.unbiased,
            tile_bytes=tile_bytes,
        )
        cka, stderr, groups = tiled_result(sums)
        return finish(keys, cka, stderr, groups, sums.constant)
