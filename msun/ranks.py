"""Several processes that train one network, as torchrun starts them; one process is the rule."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "own_device", "started"]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes:
        rank: 0 to size - 1; rank 0 alone writes and prints.
        size: How many.
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
        """Go on when every process has come here."""
        if self.size > 1:
            dist.barrier()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: a bare "cuda" becomes the one that torchrun numbered."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes: a group that exists already, or the one that torchrun describes.

    Args:
        device: Where this process computes; it decides between nccl and gloo.

    Yields:
        Which process this is. A group that was made here is taken down on success; after an
        error the process ends, and torchrun ends the others.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()
    else:
        yield Ranks()
