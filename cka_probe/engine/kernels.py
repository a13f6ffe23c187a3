"""From features to Gram matrices: centring, linear and RBF kernels, the bandwidth rule.

Columns are centred before the Gram matrix, which changes no CKA and keeps float32 honest: with a
feature mean of 1e4 an uncentred float32 Gram holds nothing but the mean. Grams are taken in float32
(float64 for float64 features and for small sets), everything after them in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.gemm import matmul_t
from cka_probe.engine.own_kernel import checked

SMALL_N = 32  # below this the Gram is taken in float64: it costs nothing and conditioning is worst
_CHUNK_ROWS = 1024  # fixed, so that a float64 mean does not depend on how features were batched
_CHUNK_NUMBERS = 2**22  # and wide features take fewer rows at a time, by their width alone
_SPLIT_N = 64  # from here on a quarter of a batch's Gram is mirrored, not multiplied
_TILE_BYTES = 2**22  # of a batch's columns, centred while they are in the cache
_SAFE_TRACE = (1e-18, 1e30)  # squared norms that float32 products hold without loss

Block = Callable[[Tensor, Tensor], Tensor]


class Kernel(NamedTuple):
    """A kernel, split so that one pass serves a bandwidth that is only known later.

    `base(a, b)` maps centred features (p, d), (q, d) to a (p, q) block in float64;
    `finish(block, sigma)` makes the Gram block of it. `needs_bandwidth` says whether sigma counts;
    `quadratic` that scaling the features by c scales `base` by c^2; `of_gram`, where there is one,
    makes the block of one batch with itself, (n, n), of its centred linear Gram, in place.
    """

    name: str
    base: Block
    finish: Callable[[Tensor, float], Tensor]
    needs_bandwidth: bool = False
    quadratic: bool = True
    of_gram: Callable[[Tensor], Tensor] | None = None


class Centred(NamedTuple):
    """Features (n, d) with column means removed and scaled by a power of two.

    `constant`: the layer gives the same output for every image, up to rounding:
    ||x - mean|| <= 8 eps ||x||. `scale`: what `x` was divided by; 1.0 on the fast path.
    """

    x: Tensor
    scale: float
    constant: bool


class NonFiniteFeaturesError(ValueError):
    """Features that hold NaN or Inf; `key` is their entry where the message does not name it."""

    def __init__(self, message: str, *, key: Any = None) -> None:
        super().__init__(message)
        self.key = key


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast and TF32 off: mixed precision is for the model, never for a Gram matrix."""
    if device.type != "cuda":
        if not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield
        return
    matmul = torch.backends.cuda.matmul
    # torch from 2.9 on refuses to tell the old setting where the new one was used
    name, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else (
        "allow_tf32", False
    )  # fmt: skip
    before = getattr(matmul, name)
    setattr(matmul, name, off)
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


def work_dtype(x: Tensor, n: int) -> torch.dtype:
    """The dtype in which the Gram of `n` rows of `x` is taken."""
    if x.dtype == torch.float64 or (n < SMALL_N and x.device.type != "mps"):
        return torch.float64
    return torch.float32


def feature_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of features: float32's for all that is coarser, whatever their Gram is in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def centre(x: Tensor) -> Centred:
    """Centre the columns of one batch of features.

    The fast path is one float32 mean and one subtraction (an error of the mean is a constant
    offset, which U-centring removes); constant, tiny, huge and non-finite features take a second,
    slower look.

    Args:
        x: (n, d) features of any float dtype, on any device.

    Returns:
        The centred features, in the dtype that their Gram is taken in.

    Raises:
        NonFiniteFeaturesError: a value is NaN or Inf.
    """
    wide = x.to(work_dtype(x, x.shape[0]))
    mean = wide.mean(0)
    out = wide - mean
    squares = float(torch.linalg.vector_norm(out).double().square())
    eps = feature_eps(x.dtype)
    raw = squares + x.shape[0] * float(torch.linalg.vector_norm(mean.double()).square())
    low, high = _SAFE_TRACE
    # 16 eps: twice the limit of `centre_full`, so that the float64 mean decides the close calls
    if low < squares < high and squares > (16 * eps) ** 2 * raw:
        return Centred(out, 1.0, False)
    return centre_full(x)


def batch_block(x: Tensor, kernel: Kernel) -> tuple[Tensor, float]:
    """The kernel's block of one batch with itself, column tile by column tile.

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
        low, high = _SAFE_TRACE
        if low < squares < high and squares > (16 * eps) ** 2 * (squares + n * offset):
            return kernel.of_gram(gram), eps
    centred = centre_full(x) if kernel.of_gram is not None else centre(x)
    if centred.constant:
        home = "cpu" if x.device.type == "mps" else x.device
        return torch.zeros(n, n, dtype=torch.float64, device=home), 0.0
    if kernel.quadratic:
        return kernel.base(centred.x, centred.x).mul_(centred.scale**2), eps
    return kernel.base(centred.x * centred.scale, centred.x * centred.scale), eps


def centre_full(x: Tensor) -> Centred:
    """Centre the columns with a float64 mean over fixed chunks of rows, whatever the magnitude.

    Args:
        x: (n, d) features of any float dtype.

    Returns:
        Centred features scaled to a largest magnitude in [1, 2) by a power of two (exact);
        zeros where the features are constant.

    Raises:
        NonFiniteFeaturesError: a value is NaN or Inf.
    """
    n = x.shape[0]
    dtype = work_dtype(x, n)
    eps = feature_eps(x.dtype)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    total = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    chunk = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // max(1, x.shape[1])))
    for rows in torch.split(x, chunk):
        total += rows.to(wide).sum(0)
    mean = total / n
    if not bool(torch.isfinite(mean).all()):
        raise NonFiniteFeaturesError(_describe(x))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for target, rows in zip(torch.split(out, chunk), torch.split(x, chunk), strict=True):
        target.copy_(rows.to(wide) - mean)
    largest = float(out.abs().max()) if out.numel() else 0.0
    if not np.isfinite(largest):
        raise NonFiniteFeaturesError(_describe(x))
    if largest == 0.0:
        return Centred(out, 1.0, True)
    scale = float(2.0 ** np.floor(np.log2(largest)))
    out /= scale
    centred = float(torch.linalg.vector_norm(out).double())
    offset = float(torch.linalg.vector_norm((mean / scale).double())) * n**0.5
    if centred <= 8 * eps * (centred**2 + offset**2) ** 0.5:
        return Centred(out.zero_(), 1.0, True)
    return Centred(out, scale, False)


def check_finite(x: Tensor) -> None:
    """Raise NonFiniteFeaturesError where a value is NaN or Inf; one pass where none is."""
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise NonFiniteFeaturesError(_describe(x))


def _describe(x: Tensor) -> str:
    bad = int((~torch.isfinite(x)).sum())
    if bad == 0:
        return "values too large for float64 sums"
    kind = "NaN" if bool(torch.isnan(x).any()) else "Inf"
    return f"{kind} in {bad} of {x.numel()} values"


def product(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (p, q) of rows in float64, taken in the dtype of the rows; MPS: on the CPU."""
    g = matmul_t(a, b)  # (p, q)
    return g.cpu().double() if g.device.type == "mps" else g.double()


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


def _linear_finish(block: Tensor, sigma: float) -> Tensor:
    del sigma
    return block


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (p, q), in float64 from the product on."""
    return distances(product(a, b), squared_norms(a), squared_norms(b))


def squared_norms(x: Tensor) -> Tensor:
    """Squared norms of rows (p, d): (p,) in float64."""
    wide = x.cpu() if x.device.type == "mps" else x
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1, dtype=torch.float64)
    return norms.square_()


def distances(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (p, q) from products (p, q), in their place, and squared norms."""
    return product.mul_(-2).add_(a[:, None]).add_(b[None, :]).clamp_(min=0)


def _distances_of_gram(g: Tensor) -> Tensor:
    """Squared Euclidean distances (n, n) from a Gram matrix, in its place."""
    own = g.diagonal().clone()
    return distances(g, own, own)


def _rbf_finish(block: Tensor, sigma: float) -> Tensor:
    return (block * (-0.5 / sigma**2)).exp_()


KERNELS: dict[str, Kernel] = {
    "linear": Kernel("linear", product, _linear_finish, of_gram=lambda gram: gram),
    "rbf": Kernel("rbf", squared_distances, _rbf_finish, True, of_gram=_distances_of_gram),
}


def get_kernel(kernel: str | Kernel | Block) -> Kernel:
    """The kernel of a name, or a user's callable as one.

    Args:
        kernel: a name in `KERNELS`, a `Kernel`, or a callable that maps centred features
            (p, d) and (q, d) to a (p, q) block of a symmetric kernel.

    Raises:
        TypeError: neither a name nor a callable.
        ValueError: an unknown name. A callable's result is checked at every call.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            known = ", ".join(sorted(KERNELS))
            raise ValueError(f"unknown kernel: {kernel!r}: known kernels are {known}")
        return KERNELS[kernel]
    name = getattr(kernel, "__name__", type(kernel).__name__)
    if not callable(kernel):
        raise TypeError(
            f"kernel is neither a name nor a function: {kernel!r:.60}: use 'linear', 'rbf' or a "
            "function of features (p, d), (q, d)"
        )
    return Kernel(name, checked(kernel, name), _linear_finish, quadratic=False)


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel under its name.

    Raises:
        ValueError: the name is taken.
    """
    if kernel.name in KERNELS:
        raise ValueError(f"kernel name is taken: {kernel.name!r}: choose another name")
    KERNELS[kernel.name] = kernel
