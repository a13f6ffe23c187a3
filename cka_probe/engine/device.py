"""Features on an accelerator: measured without waiting for it.

Asking an accelerator for a number (`float`, `bool`, `.item()`) stops the queue that keeps it busy.
Here every decision (finite, constant, too large) is itself a number on the device, and the host
asks for all of a batch at once. The CPU takes `kernels.batch_block`, which is faster there, and MPS
does too: it has no float64, so its sums are on the CPU.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cka_probe.engine.kernels import (
    Kernel,
    NonFiniteFeaturesError,
    check_finite,
    feature_eps,
    product,
    work_dtype,
)

__all__ = ["Measured", "Watch", "device_block", "device_for_sums", "on_accelerator"]
__all__ += ["refuse", "refuse_all"]


class Measured(NamedTuple):
    """A kernel block and what is to be asked about it, all on the device, float64.

    `block`: (n, n), zero where the features are constant. `eps`: 0-d, `feature_eps`; 0 where
    constant. `largest`: 0-d, the largest magnitude; not finite where a feature is not.
    """

    block: Tensor
    eps: Tensor
    largest: Tensor


def on_accelerator(x: Tensor) -> bool:
    """Whether waiting for a number about `x` would stop a queue."""
    return x.device.type not in ("cpu", "mps")


def device_for_sums(device: torch.device) -> torch.device:
    """Where float64 sums of features on `device` are: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def device_block(x: Tensor, kernel: Kernel) -> Measured:
    """What `kernels.batch_block` gives, without a word to the host.

    Args:
        x: (n, d) features of any float dtype.
        kernel: as `get_kernel` gives it.

    Returns:
        The block and what is to be asked about it.
    """
    n, eps = x.shape[0], feature_eps(x.dtype)
    x = x.to(work_dtype(x, n))
    largest = _largest(x)
    exponent = torch.frexp(largest.clamp(min=torch.finfo(x.dtype).tiny)).exponent
    scale = torch.exp2(exponent.double())  # in float64, so that it is a power of two when rounded
    x = x / scale.to(x.dtype)  # below 1: no square overflows
    mean = x.mean(0)
    out = x - mean
    rest = out.mean(0)
    out -= rest
    offset = n * torch.linalg.vector_norm(mean.double() + rest.double()).square()
    if kernel.of_gram is not None:
        gram = product(out, out)
        squares = gram.trace()
        block = kernel.of_gram(gram)
    else:
        squares = torch.linalg.vector_norm(out).double().square()
        own = out if kernel.quadratic else out * scale.to(x.dtype)
        block = kernel.base(own, own)
    if kernel.quadratic:
        block = block * scale.square()
    constant = squares <= (8 * eps) ** 2 * (squares + offset)
    block = torch.where(constant, torch.zeros_like(block), block)
    return Measured(block, torch.where(constant, 0.0, eps).double(), largest.double())


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude, 0-d; NaN or Inf where one is there."""
    largest: Tensor = torch.linalg.vector_norm(x.detach(), float("inf"))
    return largest


def refuse(largest: float, key: Hashable) -> None:
    """Raise NonFiniteFeaturesError for what `largest` says of an entry."""
    if largest - largest != 0:
        kind = "Inf" if largest == abs(largest) else "NaN"
        raise NonFiniteFeaturesError(f"{kind} among the values", key=key)


class Watch:
    """NaN and Inf are found at once on the CPU, and once a batch on an accelerator."""

    def __init__(self) -> None:
        self._largest: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, x: Tensor) -> None:
        """Look at the features of an entry.

        Raises:
            NonFiniteFeaturesError: on the CPU.
        """
        if on_accelerator(x):
            self._largest[key] = _largest(x).double()
        else:
            check_finite(x)

    def settle(self) -> None:
        """Ask the accelerator about all entries since the last time.

        Raises:
            NonFiniteFeaturesError: with the entry as its `key`.
        """
        found, self._largest = self._largest, {}
        refuse_all(found)


def refuse_all(largest: Mapping[Hashable, Tensor]) -> None:
    """`refuse` for many entries, asked at once."""
    if largest:
        home = next(iter(largest.values())).device
        values = torch.stack([x.to(home) for x in largest.values()]).tolist()
        for key, value in zip(largest, values, strict=True):
            refuse(value, key)
