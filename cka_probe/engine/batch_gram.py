"""The Gram matrix of one batch, on the CPU and on an accelerator.

On the CPU a batch is centred and multiplied column tile by column tile, while a tile is in the
cache. On an accelerator the host reads no value between two layers: each read (`float`, `bool`,
`.item()`) waits for the queue and leaves the device idle. So every decision there (finite,
constant, too large) is itself a number on the device, and the host reads all of a batch at once.
MPS takes the CPU's path: it has no float64, so its sums are on the CPU.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cka_probe.engine.centring import (
    SAFE_TRACE,
    NonFiniteFeaturesError,
    centre_full,
    check_finite,
    feature_eps,
    work_dtype,
)
from cka_probe.engine.kernels import Kernel
from cka_probe.engine.products import full_precision, matmul_t, product

__all__ = [
    "BatchGram",
    "FiniteCheck",
    "check_all_finite",
    "device_for_sums",
    "gram_of_batch",
    "on_accelerator",
]

_SPLIT_N = 64  # from here on a quarter of a batch's Gram is mirrored, not multiplied
_TILE_BYTES = 2**22  # of a batch's columns, centred while they are in the cache


class BatchGram(NamedTuple):
    """`kernel.base` of one batch with itself, and the numbers that decide about it.

    On an accelerator all three are on the device.

    Attributes:
        block: (n, n) float64, in the features' own scale; zero if the features are constant.
        eps: 0-d float64, `feature_eps`; 0 if the features are constant.
        largest: 0-d float64, the largest magnitude, not finite if a feature is not; 0 on the CPU,
            where features are checked at once.
    """

    block: Tensor
    eps: Tensor
    largest: Tensor


def gram_of_batch(x: Tensor, kernel: Kernel) -> BatchGram:
    """The kernel's block of one batch with itself.

    Args:
        x: (n, d) features of any float dtype, on any device.
        kernel: as `get_kernel` returns it.

    Raises:
        NonFiniteFeaturesError: a value is NaN or Inf (on an accelerator, `check_all_finite` says so
            later).
    """
    with full_precision(x.device), torch.no_grad():
        if on_accelerator(x):
            return _on_device(x, kernel)
        block, eps = _by_tiles(x, kernel)
        home = block.device
        return BatchGram(block, torch.tensor(eps, dtype=torch.float64, device=home),
                         torch.zeros((), dtype=torch.float64, device=home))  # fmt: skip


def on_accelerator(x: Tensor) -> bool:
    """Whether reading a value of `x` waits for a queue of kernels."""
    return x.device.type not in ("cpu", "mps")


def device_for_sums(device: torch.device) -> torch.device:
    """The device for float64 sums of features on `device`: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _by_tiles(x: Tensor, kernel: Kernel) -> tuple[Tensor, float]:
    """The block and `eps`, column tile by column tile.

    A tile is centred and multiplied while it is in the cache: centring whole maps first costs as
    much as their Gram. Tiles are added up in float64.

    Args:
        x: (n, d) features of any float dtype, on any device.
        kernel: as `get_kernel` gives it.

    Returns:
        `kernel.base` of the centred features, (n, n) float64, in their own scale, and their
        `feature_eps`; zeros and 0.0 where the features are constant.

    Raises:
        NonFiniteFeaturesError: a value is NaN or Inf.
    """
    n, d = x.shape
    dtype = work_dtype(x, n)
    eps = feature_eps(x.dtype)
    if kernel.of_gram is not None:
        width = max(1, _TILE_BYTES // (n * dtype.itemsize)) if x.device.type == "cpu" else d
        tiles = list(torch.split(x, width, 1)) if d > width else [x]
        room = torch.empty_like(tiles[0], dtype=dtype)
        share = torch.full((1, n), 1 / n, dtype=dtype, device=x.device)
        gram, offset = _empty_gram(n, x.device), 0.0
        for tile in tiles:
            tile = tile.to(dtype)
            mean = (share @ tile)[0]  # a product: half the time of mean(0)
            out = torch.sub(tile, mean, out=room) if tile.shape == room.shape else tile - mean
            _add_gram(gram, out)
            offset += float(torch.dot(mean, mean))
        half = _half(n, x.device)
        gram[:half, half:] = gram[half:, :half].T
        squares = float(gram.trace())
        low, high = SAFE_TRACE
        if low < squares < high and squares > (16 * eps) ** 2 * (squares + n * offset):
            return kernel.of_gram(gram), eps
    centred = centre_full(x)
    if centred.constant:
        home = "cpu" if x.device.type == "mps" else x.device
        return torch.zeros(n, n, dtype=torch.float64, device=home), 0.0
    if kernel.quadratic:
        return kernel.base(centred.x, centred.x).mul_(centred.scale**2), eps
    return kernel.base(centred.x * centred.scale, centred.x * centred.scale), eps


def _empty_gram(n: int, device: torch.device) -> Tensor:
    home = "cpu" if device.type == "mps" else device
    return torch.zeros(n, n, dtype=torch.float64, device=home)


def _half(n: int, device: torch.device) -> int:
    """Rows of the first block of a Gram of `n`: all, where two smaller products are no faster."""
    return n // 2 if n >= _SPLIT_N and device.type == "cpu" else n


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x x' to the float64 `gram`, save for its upper right quarter, which mirrors another."""
    half = _half(len(gram), x.device)
    for rows in (slice(0, half), slice(half, len(gram))):
        if rows.start < rows.stop:
            block = matmul_t(x[rows.start :], x[rows])
            gram[rows.start :, rows] += block.cpu() if x.device.type == "mps" else block


def _on_device(x: Tensor, kernel: Kernel) -> BatchGram:
    """The block without any question to the device."""
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
    return BatchGram(block, torch.where(constant, 0.0, eps).double(), largest.double())


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude, 0-d; NaN or Inf if there is one."""
    largest: Tensor = torch.linalg.vector_norm(x.detach(), float("inf"))
    return largest


def _refuse(largest: float, key: Hashable) -> None:
    """Raise NonFiniteFeaturesError if the largest magnitude of an entry is not finite."""
    if largest - largest != 0:  # NaN or Inf
        kind = "Inf" if largest == abs(largest) else "NaN"
        raise NonFiniteFeaturesError(f"{kind} among the values", key=key)


class FiniteCheck:
    """Finds NaN and Inf: at once on the CPU, once a batch on an accelerator."""

    def __init__(self) -> None:
        self._largest: dict[Hashable, Tensor] = {}

    def update(self, key: Hashable, x: Tensor) -> None:
        """Check the features of an entry, or note what is to be asked of the accelerator.

        Raises:
            NonFiniteFeaturesError: on the CPU.
        """
        if on_accelerator(x):
            self._largest[key] = _largest(x).double()
        else:
            check_finite(x)

    def check(self) -> None:
        """Ask the accelerator about all entries since the last call.

        Raises:
            NonFiniteFeaturesError: with the entry as its `key`.
        """
        found, self._largest = self._largest, {}
        check_all_finite(found)


def check_all_finite(largest: Mapping[Hashable, Tensor]) -> None:
    """Raise NonFiniteFeaturesError if a largest magnitude is not finite; one question for all."""
    if largest:
        home = next(iter(largest.values())).device
        values = torch.stack([x.to(home) for x in largest.values()]).tolist()
        for key, value in zip(largest, values, strict=True):
            _refuse(value, key)
