"""Copies of networks on the meta device, which have shapes and no data."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["meta_copy"]


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
