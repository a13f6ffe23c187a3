"""Several processes that share one job, as torchrun starts them; one process is the rule.

A process that dies ends the job: torchrun stops the others, and without torchrun their next
collective fails. A process that hangs ends it when the group's timeout is over.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

__all__ = ["LostRankError", "Ranks", "launched", "may_speak", "own_device", "started"]

TIMEOUT = timedelta(minutes=30)  # of a collective: longer than any round of forwards
_GRACE_S = 2.0  # in which a process that failed of itself speaks before those that lost it
_groups = itertools.count()  # groups that this process has joined: each has its own keys


class LostRankError(RuntimeError):
    """Another process of the job died, failed or hangs."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes:
        rank: 0 to size - 1; rank 0 alone writes and prints.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of one device and dtype over the processes, in place, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        with _collective():
            dist.all_reduce(flat)
        sizes = [x.numel() for x in tensors]
        for x, total in zip(tensors, flat.split(sizes), strict=True):  # type: ignore[no-untyped-call]
            x.copy_(total.view_as(x))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.size > 1:
            with _collective():
                for x in tensors:
                    dist.broadcast(x, 0)

    def wait(self) -> None:
        """Return when every process has called it.

        Raises:
            LostRankError: one of them died, or does not come within the timeout.
        """
        if self.size > 1:
            with _collective():
                # not monitored_barrier, which writes lines of its own to stderr
                dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, by rank, on rank 0; an empty list on the others.

        Raises:
            LostRankError: a process died.
        """
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        with _collective():
            dist.gather_object(value, found, 0)
        return found or []

    def agree(self, value: Any) -> Any:
        """The value of rank 0, on every process.

        Raises:
            LostRankError: a process died.
        """
        if self.size == 1:
            return value
        box = [value]
        with _collective():
            dist.broadcast_object_list(box, 0)
        return box[0]


@contextmanager
def _collective() -> Iterator[None]:
    """Turn what a collective raises when a process is lost into a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).replace(": ", ", ")
        raise LostRankError(
            f"another process was lost: {reason:.80}: read the error of that process, then run "
            "again with --resume"
        ) from error


def own_device(device: torch.device) -> torch.device:
    """The device of this process: a bare "cuda" becomes the one that torchrun numbered."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def launched() -> bool:
    """Whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_speak(error: BaseException | None = None) -> bool:
    """Whether this process is the first of the job to report a failure: the others stay silent.

    Args:
        error: the failure. A process that failed of itself has claimed its turn already, in
            `started`; one that lost another process waits a little, so that the other is first.
    """
    if not launched():
        return True
    claimed = getattr(error, "speaks", None)
    if claimed is not None:
        return bool(claimed)
    if isinstance(error, LostRankError):
        time.sleep(_GRACE_S)
    return _claim()


def _claim() -> bool:
    """Whether no other process has claimed to report the failure of the job before."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("RANK", "0") == "0"  # no store outlives a process: rank 0 speaks
    try:
        store = next(rendezvous("env://", timeout=timedelta(seconds=5)))[0]
        return int(store.add("cka_probe/failures", 1)) == 1
    except (RuntimeError, ValueError, OSError):
        return True  # the launcher has gone: nobody else can speak


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes: a group that exists already, or the one that torchrun describes.

    Args:
        device: the device of this process. The CPU takes gloo; CUDA takes nccl for tensors there
            and gloo for tensors on the CPU.

    Yields:
        Which process this is. A group that was made here is destroyed afterwards.

    Raises:
        LostRankError: the other processes do not come.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _collective():
        store, rank, size = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore(f"cka_probe/{next(_groups)}", store),
            rank=rank, world_size=size, timeout=TIMEOUT,
        )  # fmt: skip
    try:
        yield Ranks(rank, size)
    except BaseException as error:
        if not isinstance(error, LostRankError):
            error.speaks = _claim()  # type: ignore[attr-defined]  # before the others notice
        raise
    finally:  # also after an error: a group that is left over aborts the process as it ends
        with suppress(RuntimeError):
            dist.destroy_process_group()
