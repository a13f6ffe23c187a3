"""Copies of networks on the meta device, which have shapes and no data."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cka_probe.rng import preserved_rng

__all__ = ["check_loaded", "detached_copy", "meta_copy", "module_calls"]

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


def check_loaded(model: nn.Module) -> None:
    """Refuse a network without values: one that was never run or never loaded.

    Args:
        model: the network.

    Raises:
        ValueError: the first lazy parameter or buffer, or the first on the meta device.
    """
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(x):
            hint = "run the network once on images"
            raise ValueError(f"parameters have no shape yet: {name!r} is lazy: {hint}")
        if x.is_meta:
            hint = "model.to_empty(device='cpu'), then load its weights"
            raise ValueError(f"parameters have no data: {name!r} is on the meta device: {hint}")


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
