"""What a network would put out and cost at some size, found on a copy without data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cka_probe.activations.macs import MacCounter
from cka_probe.activations.meta import meta_copy
from cka_probe.errors import one_line
from cka_probe.rng import preserved_rng
from msun.network.norms import SizedNorm

__all__ = ["Seen", "ShapeProbe", "first_tensor", "meta_copy", "parameter_count"]


class Seen(NamedTuple):
    """One run without data.

    Attributes:
        shape: of the output, or of the first tensor in it; () where it holds none.
        macs: multiply-accumulates of convolutions and matrix products.
        sizes: the further sizes that a head hangs on its map; None for most.
        fault: why the input cannot be taken; "" where it can, and only then the rest counts.
    """

    shape: tuple[int, ...]
    macs: int
    sizes: Any
    fault: str


_NO_SHAPE = (
    _BatchNorm, SizedNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Mish, nn.ELU, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_KINDS = ("bare", "meta", "whole")


class ShapeProbe:
    """A network's copy on the meta device, in eval mode, that tells shapes and costs of inputs.

    Batch norms and activations are left out of it, as they change no shape and take most of the
    time. A network that looks at them stays whole, and one that needs data to run (control flow on
    values) is copied with its data and run on zeros, which takes longer.

    Args:
        module: the network; later changes to it do not show.
        known: shape of an input that it takes, (n, c, h, w), to find out whether it needs data.
        sizes: the second argument of a tail that needs sizes.
        like: a shadow of a similar network, which tells that instead.
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
        self.memo: dict[Any, Seen] = {}
        self.kind: str
        for kind in _KINDS if like is None else (like.kind,):
            self.kind, self.device = kind, torch.device("cpu" if kind == "whole" else "meta")
            copied = copy.deepcopy(module).cpu() if kind == "whole" else meta_copy(module)
            self.module = (_bare(copied) if kind == "bare" else copied).eval()
            self.memo.clear()
            if not known or not self.see(known, sizes).fault:
                break

    def see(self, shape: tuple[int, ...], sizes: Any = None) -> Seen:
        """What happens with an input.

        Args:
            shape: (n, c, h, w).
            sizes: the second argument of a tail that needs sizes.
        """
        key = (tuple(shape), sizes)
        if key not in self.memo:
            self.memo[key] = self._run(tuple(shape), sizes)
        return self.memo[key]

    @torch.no_grad()
    def _run(self, shape: tuple[int, ...], sizes: Any) -> Seen:
        x = torch.zeros(shape, dtype=self.dtype, device=self.device)
        counter = MacCounter()
        try:
            with preserved_rng(), counter:
                out = self.module(x) if sizes is None else self.module(x, sizes)
        except Exception as error:  # whatever a network raises on a size that it cannot take
            return Seen((), 0, None, one_line(error))
        tensor = first_tensor(out)
        carried = getattr(tensor, "cut_sizes", None)
        seen = () if tensor is None else tuple(tensor.shape)
        return Seen(seen, counter.macs(), carried, "" if seen and min(seen) > 0 else "empty output")


def _bare(module: nn.Module) -> nn.Module:
    """The module without its batch norms and activations, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _NO_SHAPE):
                parent._modules[name] = nn.Identity()
    return module


def parameter_count(module: nn.Module) -> int:
    """How many numbers are learnt, each counted once."""
    return sum(p.numel() for p in module.parameters())


def first_tensor(out: Any) -> Tensor | None:
    """The tensor that is the output, or the first one in it: logits, before auxiliary ones.

    Args:
        out: what a network gave: a tensor, or a tuple, list or mapping with such inside.
    """
    if isinstance(out, Tensor):
        return out
    parts = list(out.values()) if isinstance(out, Mapping) else out
    if not isinstance(parts, tuple | list):
        return None
    return next((t for part in parts if (t := first_tensor(part)) is not None), None)
