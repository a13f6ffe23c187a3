"""Copies of networks, without data (on the meta device) or with it, and what cannot be copied."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["check_loaded", "check_shaped", "detached_copy", "meta_copy"]

_M = TypeVar("_M", bound=nn.Module)


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
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="meta")  # dense where b is sparse
    for t in _results(module):
        memo[id(t)] = torch.empty_like(t, device="meta")
    return copy.deepcopy(module, memo)


def detached_copy(module: _M) -> _M:
    """A deep copy, also of a network that keeps results of a forward, which come without gradient.

    torch refuses to copy tensors that are results: the weight of `torch.nn.utils.weight_norm` and
    `prune`, and what a network has put on `self`.

    Args:
        module: the network, which is left as it is.

    Raises:
        ValueError: a result that was not found, such as one inside an object of the user's.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _results(module)}
    for b in module.buffers():
        if b.layout != torch.strided:  # deepcopy reads the storage, which these have not
            memo[id(b)] = b.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        raise ValueError(
            f"network cannot be copied: {type(module).__name__} keeps a tensor with a gradient: "
            "run it once under torch.no_grad(), or drop what it keeps"
        ) from error


def _results(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that autograd made and that modules keep, as attributes or in containers."""
    for part in module.modules():
        stack: list[Any] = [*vars(part).values(), *part._buffers.values()]
        while stack:
            value = stack.pop()
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value
            elif isinstance(value, dict):
                stack += value.values() if value is not part._modules else ()
            elif isinstance(value, list | tuple | set):
                stack += value


def check_shaped(model: nn.Module) -> None:
    """Refuse a network with lazy modules that never ran.

    Args:
        model: the network.

    Raises:
        ValueError: the first lazy parameter or buffer.
    """
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(x):
            hint = "run the network once on images"
            raise ValueError(f"parameters have no shape yet: {name!r} is lazy: {hint}")


def check_loaded(model: nn.Module) -> None:
    """Refuse a network without values: one that was never run or never loaded.

    Args:
        model: the network.

    Raises:
        ValueError: as `check_shaped`; or the first tensor on the meta device.
    """
    check_shaped(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_meta:
            hint = "model.to_empty(device='cpu'), then load its weights"
            raise ValueError(f"parameters have no data: {name!r} is on the meta device: {hint}")
