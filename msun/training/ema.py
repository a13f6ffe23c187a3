"""The running mean of a network's weights, which is often better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """The exponential running mean of a network's parameters and buffers.

    Args:
        model: The network; its tensors are updated in place by training.
        decay: Of the mean; in step k, the smaller of it and (1 + k) / (10 + k).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._own = {k: x for k, x in model.state_dict().items() if isinstance(x, Tensor)}
        self.values = {k: x.detach().clone() for k, x in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network as it is after a step (counted from 0); counts are copied."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(self._own[name], weight)
            else:
                value.copy_(self._own[name])

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from a saved mean."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Write the mean into the network."""
        for name, value in self.values.items():
            self._own[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The mean stands in the network meanwhile."""
        before = {name: value.clone() for name, value in self._own.items()}
        try:
            self.apply()
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self._own[name].copy_(value)
