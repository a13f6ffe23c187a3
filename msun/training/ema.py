"""EMA: the exponential moving average of the weights of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """The exponential moving average of the parameters and buffers of a network.

    Args:
        model: the network; training must update its tensors in place.
        decay: EMA decay per step, in [0, 1); in step k at most (1 + k) / (10 + k), so that the
            initial weights do not dominate early steps.

    Attributes:
        values: averaged tensors by name.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._own = {k: x for k, x in model.state_dict().items() if isinstance(x, Tensor)}
        self.values = {k: x.detach().clone() for k, x in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after a step; integer buffers are copied.

        Args:
            step: number of the step, from 0.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(self._own[name], weight)
            else:
                value.copy_(self._own[name])

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Load saved values.

        Args:
            values: tensors by name, as in `values`.
        """
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the average into the network."""
        for name, value in self.values.items():
            self._own[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the average as the weights of the network while the context is open."""
        before = {name: value.clone() for name, value in self._own.items()}
        try:
            self.apply()
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self._own[name].copy_(value)
