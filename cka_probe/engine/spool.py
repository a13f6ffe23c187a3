"""Features that do not fit in memory: kept in a file, Gram matrices made of it tile by tile.

The file has no name while it is open, so that nothing is left of it however the run ends. It is
read and written, not mapped: what the system caches of it is not this program's memory.
"""

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.kernels import (
    Kernel,
    centre_full,
    feature_eps,
    full_precision,
    product,
    squared_norms,
)


class Spool:
    """Rows of features of many entries in one temporary file, as column tiles of a batch.

    Args:
        folder: where the file is made; None for the system's temporary folder.
        columns: of a tile.
    """

    def __init__(self, folder: Path | None = None, columns: int = 16384) -> None:
        self._file: Any = None
        self.tile = columns
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with the object
        self._end = 0
        self.parts: dict[Hashable, list[tuple[int, int, int]]] = {}  # (batch, images, where)
        self.width: dict[Hashable, int] = {}
        self.dtype: dict[Hashable, torch.dtype] = {}

    def append(self, key: Hashable, x: Tensor) -> None:
        """Write rows (b, d) of a batch that `name_last` gives its index.

        Raises:
            OSError: the disk is full.
        """
        self.width[key], self.dtype[key] = x.shape[1], x.dtype
        self.parts.setdefault(key, []).append((-1, len(x), self._end))
        self._file.seek(self._end)
        for tile in torch.split(x.detach().cpu(), self.tile, 1):
            self._end += self._file.write(_bytes(tile.contiguous()))

    def name_last(self, key: Hashable, index: int) -> None:
        """Give the batch that was written last its index."""
        _, count, where = self.parts[key][-1]
        self.parts[key][-1] = (index, count, where)

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:
        self.close()

    def images(self, key: Hashable) -> int:
        """Rows of an entry so far."""
        return sum(count for _, count, _ in self.parts[key])

    def columns(self, key: Hashable, start: int) -> Tensor:
        """All rows of the tile that begins with column `start`, batches by index."""
        wide, dtype = min(self.tile, self.width[key] - start), self.dtype[key]
        out = torch.empty(self.images(key), wide, dtype=dtype)
        row = 0
        for _, count, where in sorted(self.parts[key]):
            self._file.seek(where + count * start * dtype.itemsize)
            target = _bytes(out[row : row + count])
            if self._file.readinto(target) != len(target):
                raise OSError("the temporary file of `exact` was cut short")
            row += count
        return out


def _bytes(x: Tensor) -> Any:
    raw: Any = x.view(torch.uint8).numpy()
    return memoryview(raw).cast("B")


class GramBlocks:
    """Tiles of Gram matrices that were made from a spool once, in memory or in a second file.

    Args:
        spool: the features.
        kernel: "linear" or "rbf".
        memory: bytes for the Gram matrices and the tiles that they are made of.
        folder: of the second file.
    """

    def __init__(self, spool: Spool, kernel: Kernel, memory: int, folder: Path | None) -> None:
        self._file: Any = None
        self._held: Tensor | None = None
        self.keys = list(spool.parts)
        self.n, self.m, self.home = spool.images(self.keys[0]), len(self.keys), torch.device("cpu")
        self._rbf = kernel.needs_bandwidth
        size = 8 * self.m * self.n**2
        if size <= memory // 4:
            self._held = torch.zeros(self.m, self.n, self.n, dtype=torch.float64)
        else:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.whole_rows = self._held is None
        self._norms = torch.zeros(self.m, self.n, dtype=torch.float64)
        constant, self.eps = [], []
        panel = self.n if self._held is not None else max(1, memory // (80 * self.n))
        with torch.no_grad(), full_precision(self.home):
            for i, key in enumerate(self.keys):
                self.eps.append(feature_eps(spool.dtype[key]))
                constant.append(self._make(i, spool, key, panel))
        self.constant = np.array(constant)

    def _make(self, i: int, spool: Spool, key: Hashable, panel: int) -> bool:
        """Fill the Gram of an entry, panel by panel of rows; whether the entry is constant."""
        spread = offset = 0.0
        for top in range(0, self.n, panel):
            rows = slice(top, min(top + panel, self.n))
            if self._held is not None:
                gram = self._held[i]
            else:
                gram = torch.zeros(rows.stop - top, self.n, dtype=torch.float64)
            for start in range(0, spool.width[key], spool.tile):
                x = spool.columns(key, start)
                centred = centre_full(x)
                if top == 0:
                    offset += self.n * float(x.mean(0, dtype=torch.float64).square().sum())
                    norms = squared_norms(centred.x).mul_(centred.scale**2)
                    self._norms[i] += norms
                    spread += float(norms.sum())
                if not centred.constant:
                    part = product(centred.x[rows], centred.x)
                    gram += part.mul_(centred.scale**2)
            if self._file is not None:
                self._file.seek(8 * self.n * (i * self.n + top))
                self._file.write(_bytes(gram))
        return spread <= (8 * self.eps[i]) ** 2 * (spread + offset)

    def diagonal(self, i: int) -> Tensor:
        """Of the Gram of entry i, as `base` gives it."""
        return self._norms[i] / max(float(self._norms[i].max()), 1e-300)

    def base(self, i: int, rows: slice, columns: slice) -> Tensor:
        """Gram entries, or squared distances for the RBF kernel, float64."""
        if self._held is not None:
            block = self._held[i, rows, columns].clone()
        else:
            whole = torch.empty(rows.stop - rows.start, self.n, dtype=torch.float64)
            self._file.seek(8 * self.n * (i * self.n + rows.start))
            self._file.readinto(_bytes(whole))
            block = whole[:, columns].clone()
        # the scale does not change CKA, but squares of large Grams must not overflow
        if not self._rbf:
            return block.div_(max(float(self._norms[i].max()), 1e-300))
        norms = self._norms[i]
        return block.mul_(-2).add_(norms[rows, None]).add_(norms[columns]).clamp_(min=0)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            self._file.close()
