"""A kernel of the user's own, whose failures and results are told by its name."""

from collections.abc import Callable

import torch
from torch import Tensor

Block = Callable[[Tensor, Tensor], Tensor]


def checked(kernel: Block, name: str) -> Block:
    """The kernel, whose result must be a (p, q) tensor; it is returned in float64.

    Args:
        kernel: maps centred features (p, d) and (q, d) to a (p, q) block.
        name: how messages name it.
    """

    def base(a: Tensor, b: Tensor) -> Tensor:
        try:
            block = kernel(a, b)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = f"{type(error).__name__} ({' '.join(str(error).split()).replace(': ', ', ')})"
            raise ValueError(
                f"kernel failed: {name!r}, {text}: give a function of features (p, d), (q, d)"
            ) from error
        shape = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
        if shape != (len(a), len(b)):
            raise ValueError(
                f"kernel returned no block: {name!r} gave {shape} for {tuple(a.shape)} and "
                f"{tuple(b.shape)}: return a tensor ({len(a)}, {len(b)})"
            )
        return block.double()

    return base
