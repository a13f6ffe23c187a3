"""The rows that `exact` and `sketch` have so far, on disk beside the saved state.

Batches are appended and never rewritten, so that saving costs what came since the last time. What
is in the file, and its checksum, is told by the state: whatever lies behind that is not counted.
"""

import os
import zlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.rows import Rows

ROWS = "state.rows"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_READ = 2**24  # bytes at a time


class RowFile:
    """An append-only file of the batches of every entry.

    Args:
        folder: where it lies.

    Attributes:
        size: bytes that count. crc: their CRC-32.
        batches: (index, images) of each, in order. kinds: per batch, the dtype of every entry.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self.size, self.crc = 0, 0
        self.batches: list[tuple[int, int]] = []
        self.kinds: list[list[int]] = []
        self.widths: list[int] = []

    def append(self, rows: dict[Hashable, Rows]) -> None:
        """Write the batches that are not in the file yet, of all entries, and wait for the disk.

        Raises:
            OSError: the disk is full.
        """
        entries = list(rows.values())
        done = len(self.batches)
        ready = [[part for part in one.parts[done:] if part[0] >= 0] for one in entries]
        self.widths = [one.parts[0][1].shape[1] for one in entries]
        size, crc = self.size, self.crc
        with self.path.open("r+b" if done else "wb") as file:
            file.seek(size)
            for parts in zip(*ready, strict=True):
                for _, x in parts:
                    raw = memoryview(_raw(x.detach().cpu().contiguous())).cast("B")
                    size += file.write(raw)
                    crc = zlib.crc32(raw, crc)
            file.flush()
            os.fsync(file.fileno())
        for parts in zip(*ready, strict=True):
            self.batches.append((parts[0][0], len(parts[0][1])))
            self.kinds.append([_DTYPES.index(x.dtype) for _, x in parts])
        self.size, self.crc = size, crc

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """What the state must hold to read the file again."""
        return {
            "extent": np.array([self.size, self.crc], dtype=np.int64),
            "batches": np.array(self.batches, dtype=np.int64).reshape(-1, 2),
            "kinds": np.array(self.kinds, dtype=np.int64),
            "widths": np.array(self.widths, dtype=np.int64),
        }

    def read(self, arrays: dict[str, Any]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (index, rows of every entry) of each batch; the file is checked first.

        Raises:
            ValueError: it is not what the state says.
        """
        size, crc = (int(x) for x in arrays["extent"])
        if not self.path.exists() or self.path.stat().st_size < size or self._sum(size) != crc:
            raise ValueError(f"saved state cut short or damaged: {self.path}")
        self.size, self.crc = size, crc
        self.batches = [(int(i), int(n)) for i, n in arrays["batches"]]
        self.kinds = [[int(k) for k in row] for row in arrays["kinds"]]
        self.widths = [int(width) for width in arrays["widths"]]
        with self.path.open("rb") as file:
            for (index, n), kinds in zip(self.batches, self.kinds, strict=True):
                yield (
                    index,
                    [
                        _next(file, (n, width), _DTYPES[kind])
                        for width, kind in zip(self.widths, kinds, strict=True)
                    ],
                )

    def _sum(self, size: int) -> int:
        crc, left = 0, size
        with self.path.open("rb") as file:
            while left:
                part = file.read(min(left, _READ))
                crc, left = zlib.crc32(part, crc), left - len(part)
        return crc


def _raw(x: Tensor) -> Any:
    return x.view(-1).view(torch.uint8).numpy()


def _next(file: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    x = torch.empty(tuple(shape), dtype=dtype)
    file.readinto(memoryview(_raw(x)).cast("B"))
    return x
