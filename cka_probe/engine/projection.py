"""Random projections of features that are unbiased for inner products, in independent blocks.

A dense Gaussian matrix for d = 800,000 features and k = 512 numbers is 1.6 GB and costs 2 k flops a
feature. Each block here is a count-sketch instead (Charikar, Chen & Farach-Colton 2002; as a
projection of Gram matrices Weinberger et al. 2009): every feature goes, with a random sign, into
one of k / q buckets. E[Sx . Sy] = x . y, and as two features share a bucket with probability of at
most q / k, the covariances of the projected inner products are at most those of a dense matrix of
random signs with k / q columns, at 1 / (k / q) of its cost. Nothing is held between batches.
"""

import hashlib
from collections.abc import Hashable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKS = 8  # q, independent blocks of the projection
_SEGMENT = 4096  # features projected at a time: a batch of 64 then stays in a core's cache

_Draw = tuple[Tensor, Tensor]  # tile order (q, slots) and signs (q, slots, L) of a segment


class Projection:
    """S: (b, d) -> (b, q, k / q), one draw for one entry.

    A segment of features is cut into tiles of L features, and the buckets into rows of L. A random
    order sends each tile to a slot, and the slot says which row of buckets the tile meets and by
    how many places it is turned: tiles of different segments collide with probability q / k,
    features of one tile never.

    The draw comes from a counter-based generator (Philox), keyed by seed and entry with the
    segment as counter, so that a segment is drawn again whenever it is needed and two entries
    share nothing.

    Args:
        seed: of the run.
        key: the entry; its printed form counts.
        width: d.
        size: k, a multiple of `blocks`.
        blocks: q.
    """

    def __init__(
        self, seed: int, key: Hashable, width: int, size: int, blocks: int = BLOCKS
    ) -> None:
        digest = hashlib.sha256(f"{seed}|{key!r}".encode()).digest()
        self.key = int.from_bytes(digest[:16], "little")
        self.width, self.blocks, self.buckets = width, blocks, size // blocks
        c = self.buckets
        self.tile = max(
            t for t in range(1, c + 1) if c % t == 0 and (t == 1 or t * c <= 2 * _SEGMENT)
        )
        self.slots = c * max(1, -(-_SEGMENT // (c * self.tile)))
        self.segment = self.slots * self.tile
        self._kept: list[_Draw] = []

    def _draw(self, number: int, device: torch.device) -> _Draw:
        bits = np.random.Generator(np.random.Philox(key=self.key, counter=number << 64))
        order = bits.random((self.blocks, self.slots)).argsort(1)
        packed = np.frombuffer(bits.bytes(-(-self.blocks * self.segment // 8)), dtype=np.uint8)
        signs = np.unpackbits(packed, count=self.blocks * self.segment).astype(np.int8) * 2 - 1
        shape = (self.blocks, self.slots, self.tile)
        return torch.from_numpy(order).to(device), torch.from_numpy(signs).view(shape).to(device)

    def _draws(self, device: torch.device) -> Iterator[_Draw]:
        """The segments in turn; an accelerator keeps them, q bytes a feature."""
        count = -(-self.width // self.segment)
        if device.type == "cpu":
            yield from (self._draw(number, device) for number in range(count))
            return
        if not self._kept:
            self._kept = [self._draw(number, device) for number in range(count)]
        yield from self._kept

    def __call__(self, x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Project rows less their origin, and the origin itself.

        Args:
            x: (b, d) float32 or float64.
            origin: (d,) what is taken off every row first, so that a large offset costs no digits.

        Returns:
            S(x - origin), (b, k) in the dtype of x, and S(origin), (k,) float64; MPS: on the CPU.
        """
        shape = (self.slots, self.tile)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        z = x.new_zeros(self.blocks, len(x), *shape)
        start = torch.zeros(self.blocks, *shape, dtype=wide, device=x.device)
        tiles = x.new_empty(len(x), *shape)
        for number, (order, signs) in enumerate(self._draws(x.device)):
            columns = slice(number * self.segment, (number + 1) * self.segment)
            rows, one, signs = x[:, columns] - origin[columns], origin[columns], signs.to(x.dtype)
            if rows.shape[1] < self.segment:
                short = (0, self.segment - rows.shape[1])
                rows, one = F.pad(rows, short), F.pad(one, short)
            rows = rows.view(len(x), *shape)
            for block in range(self.blocks):
                torch.index_select(rows, 1, order[block], out=tiles)
                z[block].addcmul_(tiles, signs[block])
            start += (one.view(shape)[order] * signs).to(wide)  # a sign loses no digit
        origin = self._fold(start[:, None])[0]
        return self._fold(z), (origin.cpu() if x.device.type == "mps" else origin).double()

    def _fold(self, z: Tensor) -> Tensor:
        """Turn every slot by its number and add: (q, b, slots, L) -> (b, q * buckets)."""
        q, b, _, c = z.shape
        z = z.view(q, b, -1, self.buckets // c, c, c).sum(2).flatten(3)  # (q, b, row, turn * L)
        turn = torch.arange(c, device=z.device)[:, None]
        source = turn * c + (torch.arange(c, device=z.device) - turn) % c  # (turn, L)
        folded = z[..., source.flatten()].view(q, b, -1, c, c).sum(-2)  # (q, b, row, L)
        out: Tensor = folded.flatten(2).transpose(0, 1).flatten(1)
        return out
