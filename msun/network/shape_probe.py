"""Output shape and cost of a network for an input size, computed on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cka_probe.activations.macs import MacCounter
from cka_probe.activations.meta import detached_copy, meta_copy
from cka_probe.errors import one_line
from cka_probe.rng import preserved_rng
from msun.network.norms import SizedNorm

__all__ = ["ProbeResult", "ShapeProbe", "first_tensor", "meta_copy", "parameter_count"]


class ProbeResult(NamedTuple):
    """Result of one run of a `ShapeProbe`.

    Attributes:
        shape: shape of the output, or of the first tensor in it; () if it holds none.
        macs: multiply-accumulates of convolutions and matrix products.
        sizes: `cut_sizes` of the output of a head; None for most.
        fault: reason why the network cannot take the input, "" if it can. With a fault the other
            fields are empty.
    """

    shape: tuple[int, ...]
    macs: int
    sizes: Any
    fault: str


# Modules that change neither shape nor cost.
_NO_SHAPE = (
    _BatchNorm, SizedNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Mish, nn.ELU, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
# Kinds of copy, cheapest first: on the meta device without norms and activations, on the meta
# device, and with data on the CPU.
_KINDS = ("bare", "meta", "whole")


class ShapeProbe:
    """Computes output shapes and costs with a copy of a network on the meta device, in eval mode.

    The copy has no batch norms and activations: they change no shape and take most of the time.
    They stay if the network fails without them. A network that needs data (control flow on values)
    is copied to the CPU and runs on zeros, which takes longer.

    Args:
        module: the network; later changes of it have no effect.
        known: shape of a valid input, (n, c, h, w), with which the kind of copy is chosen.
        sizes: second argument of a tail that needs sizes.
        like: the probe of a similar network, whose kind of copy is used instead.
    """

    def __init__(
        self,
        module: nn.Module,
        known: tuple[int, ...] = (),
        sizes: Any = None,
        *,
        like: ShapeProbe | None = None,
    ) -> None:
        floats = (p.dtype for p in module.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)
        self.memo: dict[Any, ProbeResult] = {}
        self.kind: str
        for kind in _KINDS if like is None else (like.kind,):
            self.kind, self.device = kind, torch.device("cpu" if kind == "whole" else "meta")
            copied = detached_copy(module).cpu() if kind == "whole" else meta_copy(module)
            self.module = (_bare(copied) if kind == "bare" else copied).eval()
            self.memo.clear()
            if not known or not self.run(known, sizes).fault:
                break

    def run(self, shape: tuple[int, ...], sizes: Any = None) -> ProbeResult:
        """Run the copy on an input of a shape, or return the earlier result.

        Args:
            shape: shape of the input, (n, c, h, w).
            sizes: second argument of a tail that needs sizes.
        """
        key = (tuple(shape), sizes)
        if key not in self.memo:
            self.memo[key] = self._forward(tuple(shape), sizes)
        return self.memo[key]

    @torch.no_grad()
    def _forward(self, shape: tuple[int, ...], sizes: Any) -> ProbeResult:
        x = torch.zeros(shape, dtype=self.dtype, device=self.device)
        counter = MacCounter()
        try:
            with preserved_rng(), counter:
                out = self.module(x) if sizes is None else self.module(x, sizes)
        except Exception as error:  # whatever a network raises on a size that it cannot take
            return ProbeResult((), 0, None, one_line(error))
        counter.warn_uncounted()
        tensor = first_tensor(out)
        carried = getattr(tensor, "cut_sizes", None)
        given = () if tensor is None else tuple(tensor.shape)
        fault = "" if given and min(given) > 0 else "empty output"
        return ProbeResult(given, counter.macs(), carried, fault)


def _bare(module: nn.Module) -> nn.Module:
    """Replace batch norms and activations by identities, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _NO_SHAPE):
                parent._modules[name] = nn.Identity()
    return module


def parameter_count(module: nn.Module) -> int:
    """The number of parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def first_tensor(out: Any) -> Tensor | None:
    """The first tensor in an output: the logits come before auxiliary ones.

    Args:
        out: output of a network: a tensor, or a nested tuple, list or mapping.

    Returns:
        The tensor; None if there is none.
    """
    if isinstance(out, Tensor):
        return out
    parts = list(out.values()) if isinstance(out, Mapping) else out
    if not isinstance(parts, tuple | list):
        return None
    return next((t for part in parts if (t := first_tensor(part)) is not None), None)
