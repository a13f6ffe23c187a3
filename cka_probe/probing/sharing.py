"""One estimator fed by several processes, which bring what they have where they meet.

Rank 0 keeps the estimator of the whole run; between two meetings every process keeps what its own
batches came to. `minibatch` adds float64 sums up; `exact` and `sketch` send their rows to rank 0,
batch by batch, in the order of the plan: what rank 0 then holds is what one process would hold.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.bandwidth import counted, median_bandwidth
from cka_probe.engine.device import device_for_sums
from cka_probe.engine.estimator import BANDWIDTH_IMAGES, check_entries
from cka_probe.engine.minibatch import Minibatch

__all__ = ["Shared", "share"]

HELD_BYTES = 2**28  # of rows, over all processes, at which they meet


class Shared:
    """One process: nothing to bring."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def put(self, key: Hashable, x: Tensor) -> None:
        """Take the features (b, d) of one entry in the open batch."""
        self.estimator.put(key, x)

    def close_batch(self, index: int) -> None:
        """End a batch of this process."""
        self.estimator.close_batch(index)

    def begin(self) -> None:
        """After a saved state was put into rank 0's estimator: tell the others what they need."""

    def meet(self, *, last: bool = False) -> None:
        """Bring what came since the last time; all processes call it after the same round."""

    def rounds(self, done: int) -> int:
        """How many rounds may pass until the next meeting, after `done` since the last one."""
        del done
        return 2**62


def share(estimator: Any, ranks: Ranks, home: torch.device) -> Shared:
    """The estimator of a run whose batches are shared out.

    Args:
        estimator: of the whole run, fresh; on ranks other than 0 it stays empty.
        ranks: who takes part.
        home: the device of this process.
    """
    if ranks.size == 1:
        return Shared(estimator)
    if isinstance(estimator, Minibatch):
        return _Sums(estimator, ranks)
    return _Pieces(estimator, ranks, home)


class _Sums(Shared):
    """Sums over this process's batches; all of them are added up where the processes meet."""

    def __init__(self, estimator: Minibatch, ranks: Ranks) -> None:
        super().__init__(estimator)
        self.ranks = ranks
        self.own = Minibatch(
            estimator.n_batches, kernel=estimator.kernel, bandwidth=estimator.bandwidth
        )
        self.own.holds = True
        self._agreed = False

    def put(self, key: Hashable, x: Tensor) -> None:
        self.own.put(key, x)

    def close_batch(self, index: int) -> None:
        self.own.close_batch(index)

    def begin(self) -> None:
        keys, sigma = self.ranks.agree((self.estimator.keys, self.estimator.sigma))
        if keys:
            self.own.begin(keys)
            self.own.sigma, self._agreed = sigma, True

    def rounds(self, done: int) -> int:
        waits = self.own.kernel.needs_bandwidth and not self.own.sigma
        return 1 if waits else super().rounds(done)

    def meet(self, *, last: bool = False) -> None:
        if not self._agreed:
            self._entries()
        if self.own.kernel.needs_bandwidth and not self.own.sigma:
            self._bandwidth(last)
        if not self._agreed:
            return
        whole = self.estimator
        for name in ("hsic", "floor", "varied", "weight"):
            sums = getattr(self.own, name)
            self.ranks.total(torch.from_numpy(sums))
            if self.ranks.first:
                setattr(whole, name, getattr(whole, name) + sums)
            sums[...] = 0

    def _entries(self) -> None:
        """The entries of the first process that had a batch; all must have the same."""
        found = [keys for keys in self.ranks.gather(self.own.keys) if keys]
        for keys in found[1:]:
            check_entries(found[0], keys, -1)
            if keys != found[0]:
                raise ValueError(
                    "entries differ between processes: their order: use the same network on all"
                )
        keys = self.ranks.agree(found[0] if found else [])
        if keys:
            self._agreed = True
            if not self.own.keys:
                self.own.begin(keys)
            if self.ranks.first:
                self.estimator.begin(keys)

    def _bandwidth(self, last: bool) -> None:
        """Once 256 images have come: their median within batches, wherever those were made."""
        ranks, own = self.ranks, self.own
        mine = [(index, len(blocks[own.keys[0]][0])) for index, blocks in own.waiting]
        chosen = counted((one for some in ranks.gather(mine) for one in some), BANDWIDTH_IMAGES)
        enough = sum(chosen.values()) == BANDWIDTH_IMAGES or (last and len(chosen) > 0)
        chosen = ranks.agree({k: n for k, n in chosen.items() if n > 1} if enough else {})
        if not chosen:
            return
        upper: list[list[Tensor]] = [
            [
                blocks[key][0][: chosen[index], : chosen[index]].contiguous()
                for index, blocks in own.waiting
                if index in chosen
            ]
            for key in own.keys
        ]
        shapes = ranks.gather([[tuple(x.shape) for x in some] for some in upper[:1]])
        for rank in range(1, ranks.size):
            ranks.call(rank, -1)
            if ranks.first:
                for some in upper:
                    for shape in shapes[rank][0]:
                        some.append(ranks.receive(rank, shape, torch.float64))
            elif ranks.rank == rank:
                for some in upper:
                    for x in some:
                        ranks.send(x)
        sigma = None
        if ranks.first:
            sigma = [median_bandwidth(some, own.bandwidth) for some in upper]
        sigma = ranks.agree(sigma)
        own.fix_bandwidth(sigma)
        self.estimator.sigma = dict(own.sigma)


class _Pieces(Shared):
    """Rows of this process's batches, until they are sent to rank 0."""

    def __init__(self, estimator: Any, ranks: Ranks, home: torch.device) -> None:
        super().__init__(estimator)
        self.ranks, self.home = ranks, home
        self._keys: list[Hashable] = []
        self._open: dict[Hashable, list[Tensor]] = {}
        self._held: list[tuple[int, dict[Hashable, list[Tensor]]]] = []
        self._sums = device_for_sums(home)
        self._turn, self._turns = 0, dict[int, int]()  # batches sent; on rank 0: by each
        self._rate = 0.0  # bytes a round, over all processes

    def put(self, key: Hashable, x: Tensor) -> None:
        self._open[key] = self.estimator.piece(key, x)

    def close_batch(self, index: int) -> None:
        batch, self._open = self._open, {}
        self.estimator.settle()
        check_entries(self._keys, batch, index)
        self._keys = self._keys or list(batch)
        self._held.append((index, batch))

    def rounds(self, done: int) -> int:
        return max(1, int(HELD_BYTES // max(1.0, self._rate / done)))

    def meet(self, *, last: bool = False) -> None:
        del last
        ranks, estimator = self.ranks, self.estimator
        kept = getattr(estimator, "kept", {})
        headers = ranks.gather(
            [
                (index, [(key, kept.get(key), [(x.shape, x.dtype) for x in piece])
                         for key, piece in batch.items()])
                for index, batch in self._held
            ]
        )  # fmt: skip
        if not ranks.first:
            for _, batch in self._held:
                self._turn += 1
                ranks.call(ranks.rank, self._turn)
                for piece in batch.values():
                    for x in piece:
                        ranks.send(x)
            self._held.clear()
            return
        own = dict(self._held)
        self._held = []
        self._rate = float(
            sum(
                shape.numel() * dtype.itemsize
                for some in headers for _, entries in some for _, _, parts in entries
                for shape, dtype in parts
            )
        )  # fmt: skip
        todo = [
            (index, rank, entries) for rank, some in enumerate(headers) for index, entries in some
        ]
        for index, rank, entries in sorted(todo, key=lambda one: one[0]):
            check_entries(self._keys, [key for key, _, _ in entries], index)
            self._keys = self._keys or [key for key, _, _ in entries]
            if rank:
                self._turns[rank] = self._turns.get(rank, 0) + 1
                ranks.call(rank, self._turns[rank])
            for key, as_it_is, parts in entries:
                if as_it_is is not None:
                    estimator.kept[key] = as_it_is
                if rank == 0:
                    piece = own[index].pop(key)
                else:
                    piece = [ranks.receive(rank, shape, dtype) for shape, dtype in parts]
                    piece = [piece[0].to(self.home), *(x.to(self._sums) for x in piece[1:])]
                estimator.absorb(key, piece)
            estimator.close_batch(index)
