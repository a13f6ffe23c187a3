"""Rows of features that arrive batch by batch and leave as one (n, d) tensor."""

import torch
from torch import Tensor


class Rows:
    """The features of one entry, in the order of the batches' indices.

    With the number of images known the rows go into one block of memory, taken once: nothing is
    copied at the end, and the peak is what is kept.

    Args:
        n_images: rows to make room for; None keeps the batches apart.
    """

    def __init__(self, n_images: int | None = None) -> None:
        self.n_images = n_images
        self.parts: list[tuple[int, Tensor]] = []
        self._block: Tensor | None = None
        self._used = 0

    def append(self, index: int, x: Tensor) -> None:
        """Keep a copy of rows (b, d) of batch `index`."""
        if self.n_images is None:
            self.parts.append((index, x.detach().clone()))
            return
        if self._block is None:
            shape = (max(self.n_images, len(x)), x.shape[1])
            self._block = torch.empty(shape, dtype=x.dtype, device=x.device)
        end = self._used + len(x)
        if end > len(self._block) or self._block.dtype != x.dtype:
            self.parts.append((index, x.detach().clone()))
            return
        self._block[self._used : end] = x.detach()
        self.parts.append((index, self._block[self._used : end]))
        self._used = end

    def name_last(self, index: int) -> None:
        """Give the batch that came last its index."""
        self.parts[-1] = (index, self.parts[-1][1])

    def extend(self, other: "Rows") -> None:
        """Take the batches of another, over other images of the same run."""
        self.parts.extend(other.parts)

    def __len__(self) -> int:
        """Images so far."""
        return sum(len(x) for _, x in self.parts)

    @property
    def bytes_per_row(self) -> int:
        """What one image takes."""
        x = self.parts[0][1]
        return int(x.shape[1] * x.element_size())

    def take(self) -> Tensor:
        """All rows (n, d), batches by index; this object lets go of them."""
        in_order = all(a[0] < b[0] for a, b in zip(self.parts, self.parts[1:], strict=False))
        whole = self._block is not None and self._used == len(self)
        parts, block = sorted(self.parts, key=lambda part: part[0]), self._block
        self.parts, self._block = [], None
        if whole and in_order and block is not None:
            return block[: self._used]
        return torch.cat([x for _, x in parts]) if len(parts) > 1 else parts[0][1]
