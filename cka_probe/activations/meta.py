"""Copies of networks on the meta device, which have shapes and no data."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from cka_probe.rng import preserved_rng

__all__ = ["meta_copy", "module_calls"]


def meta_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device: no memory for data.

    Hooks are not copied, except those with the attribute `part_of_layer`.

    Args:
        module: the network, which is left as it is.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        memo[id(part._forward_hooks)] = OrderedDict()
        kept = [(k, h) for k, h in part._forward_pre_hooks.items() if hasattr(h, "part_of_layer")]
        memo[id(part._forward_pre_hooks)] = OrderedDict(kept)
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)


def module_calls(model: nn.Module, shape: tuple[int, ...]) -> list[str] | None:
    """Which modules a forward calls, found on a copy without data.

    Args:
        model: the network, as `unwrap` gives it.
        shape: (c, h, w) of one input.

    Returns:
        First paths of modules ("" is the network) in the order in which their calls ended, one for
        every call; None where the network cannot be called without data.
    """
    calls: list[str] = []
    try:
        ghost = meta_copy(model).eval()
        for path, module in ghost.named_modules():
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
        own = next((p.dtype for p in ghost.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), preserved_rng():
            ghost(torch.empty(2, *shape, dtype=own, device="meta"))
    except Exception:  # data-dependent code, operators without a meta kernel, other inputs
        return None
    return calls
