"""Several processes that share one job, as torchrun starts them; one process is the rule.

Processes come at different times to where they meet, and that may take minutes: so they wait for
each other at the store that started them (`link`), and enter a collective only when all are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cka_probe.distributed.heartbeat import Link, LostRankError

__all__ = ["Ranks", "may_speak", "own_device", "started"]

_TRANSFER = timedelta(seconds=30)  # of a collective that all have come to
_PIECE = 2**22  # numbers of a collective: 32 MiB of float64
_uses = 0  # groups that this process has joined: each has its own keys in the store
_base: Any = None  # the store itself, once joined
_speaks: bool | None = None  # after a failure in a group: whether this process was the first


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes:
        rank: 0 to size - 1; rank 0 alone writes and prints.
        size: How many.
    """

    rank: int = 0
    size: int = 1
    _link: Link | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of one device and dtype over the processes, in place, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        sizes = [x.numel() for x in tensors]
        for x, total in zip(tensors, flat.split(sizes), strict=True):  # type: ignore[no-untyped-call]
            x.copy_(total.view_as(x))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.size > 1:
            for x in tensors:
                dist.broadcast(x, 0)

    def wait(self) -> None:
        """Go on when every process has come here.

        Raises:
            LostRankError: one of them never will.
        """
        if self._link is not None:
            self._link.meet()
        elif self.size > 1:
            dist.barrier()

    def look(self) -> None:
        """Between two meetings: end with an error where another process died or failed.

        Raises:
            LostRankError: so it is.
        """
        if self._link is not None:
            self._link.look()

    def call(self, rank: int, number: int) -> None:
        """Rank 0: it is `rank`'s turn to send. That rank: wait for it; `number` counts the turns.

        Raises:
            LostRankError: a process died.
        """
        if self._link is None or rank == 0:
            return
        if self.first:
            self._link.store.set(f"turn/{rank}/{number}", "")
        elif self.rank == rank:
            self._link.await_key(f"turn/{rank}/{number}")

    def total(self, x: Tensor) -> None:
        """Add a contiguous CPU tensor over the processes, in place, in pieces.

        Raises:
            LostRankError: a process died.
        """
        if self.size > 1:
            self.wait()
            with _transfer():
                for piece in torch.split(x.view(-1), _PIECE):
                    dist.all_reduce(piece)

    def gather(self, value: Any) -> list[Any]:
        """Small values of all processes, by rank, on rank 0; an empty list on the others.

        Raises:
            LostRankError: a process died.
        """
        if self.size == 1:
            return [value]
        self.wait()
        found: list[Any] | None = [None] * self.size if self.first else None
        with _transfer():
            dist.gather_object(value, found, 0)
        return found or []

    def agree(self, value: Any) -> Any:
        """The value of rank 0, on every process.

        Raises:
            LostRankError: a process died.
        """
        if self.size == 1:
            return value
        self.wait()
        box = [value]
        with _transfer():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def send(self, x: Tensor) -> None:
        """Give a tensor to rank 0, which asks for it by `receive` in the same order."""
        with _transfer():
            dist.send(_raw(x.detach().cpu().contiguous()), 0)

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor of another process, on the CPU."""
        x = torch.empty(tuple(shape), dtype=dtype)
        with _transfer():
            dist.recv(_raw(x), source)
        return x


def _raw(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


@contextmanager
def _transfer() -> Iterator[None]:
    """What a collective raises when a process dies within it."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).replace(": ", ", ")
        raise LostRankError(
            f"another process was lost: {reason:.80}: see what it said, then add --resume"
        ) from error


def own_device(device: torch.device) -> torch.device:
    """The device of this process: a bare "cuda" becomes the one that torchrun numbered."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def launched() -> bool:
    """Whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_speak() -> bool:
    """Whether this process is the first of the job to report a failure: the others stay silent.

    Before they have joined, and where no launcher holds a store, rank 0 alone speaks: what fails
    so early is what all were asked for.
    """
    if not launched():
        return True
    if _speaks is not None:
        return _speaks
    if _base is None and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
        return os.environ.get("RANK", "0") == "0"
    try:
        store = _base or next(rendezvous("env://", timeout=timedelta(seconds=5)))[0]
        return int(store.add("cka_probe/failures", 1)) == 1
    except (RuntimeError, ValueError, OSError):
        return True


@contextmanager
def started(device: torch.device, *, timeout: timedelta | None = _TRANSFER) -> Iterator[Ranks]:
    """Join the other processes: a group that exists already, or the one that torchrun describes.

    Args:
        device: Where this process computes. The CPU takes gloo; CUDA takes nccl for what lies
            there, and gloo for what lies on the CPU.
        timeout: Of a collective; None for torch's own.

    Yields:
        Which process this is. A group that was made here is taken down afterwards; after an
        error the others are told when they next wait, and torchrun ends them.

    Raises:
        LostRankError: the others do not come.
    """
    global _uses, _base, _speaks
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _uses += 1
    with _transfer():
        store, rank, size = next(rendezvous("env://"))
        _base = store
        link = Link(PrefixStore(f"cka_probe/{_uses}", store), rank, size)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore(f"cka_probe/{_uses}/group", store),
            rank=rank, world_size=size, timeout=timeout,
        )  # fmt: skip
    try:
        yield Ranks(rank, size, link)
    except BaseException as error:
        if not getattr(error, "told", False):
            _speaks = link.claim()
        link.leave(failed=True)
        raise
    else:
        link.leave(failed=False)
    finally:  # also after an error: a group that is left over aborts the process as it ends
        with suppress(RuntimeError):
            dist.destroy_process_group()
