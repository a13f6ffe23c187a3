"""Products of rows, norms and distances, in full precision.

`matmul_t` takes the faster of the two libraries that torch has on a CPU. torch.mm calls MKL, which
runs on AVX2 on processors of other makers; oneDNN, which runs the convolutions, uses AVX-512 there
and is twice as fast (`experiments/results/bench_gemm.csv`). Torch offers it for dense float32 only
by the operator of compiled networks, which is not public: it is tried once, and if it is absent or
its answer differs, torch.mm does everything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "distances",
    "full_precision",
    "matmul_t",
    "product",
    "squared_distances",
    "squared_norms",
]

_FEW = 2**16  # multiplications below which a call costs more than it saves


def matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """The product a b' in the dtype of its factors; no gradient where they are float32 on a CPU.

    Args:
        a: (p, d).
        b: (q, d), of the same dtype on the same device.

    Returns:
        (p, q).
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and not torch.is_grad_enabled():
        linear = _onednn()
        if linear is not None and a.shape[0] * b.shape[0] * a.shape[1] > _FEW:
            return linear(a, b)
    return a @ b.T


@cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of oneDNN, or None where this torch has none that can be trusted."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default

        def linear(a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = operator(a, b, None, "none", [], "")
            return out

        a, b = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3) - 2
        return linear if torch.equal(linear(a, b), a @ b.T) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


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
    # torch from 2.9 on raises when the old setting is read after the new one was set
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (p, q) of rows in float64, taken in the dtype of the rows; MPS: on the CPU."""
    g = matmul_t(a, b)  # (p, q)
    return g.cpu().double() if g.device.type == "mps" else g.double()


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
