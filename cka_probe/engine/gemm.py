"""One product, a b', by the faster of the two libraries that torch has for it on a CPU.

torch.mm calls MKL, which runs on AVX2 on processors of other makers; oneDNN, which runs the
convolutions, uses AVX-512 there and is twice as fast (`experiments/results/bench_gemm.csv`). Torch
offers it for dense float32 only by the operator that compiled networks use, which is not public:
it is tried once, and where it is absent or answers otherwise, torch.mm does everything.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

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
