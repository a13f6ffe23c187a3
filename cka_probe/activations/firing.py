"""Which modules a forward calls, and what stands in for default layers that it does not call."""

import torch
from torch import nn

from cka_probe.activations.layers import Selection, default_layers, module_paths
from cka_probe.activations.meta import meta_copy
from cka_probe.rng import preserved_rng

__all__ = ["default_selections", "module_calls"]


def module_calls(model: nn.Module, shape: tuple[int, ...]) -> list[str] | None:
    """Which modules a forward calls, found on a copy without data.

    Args:
        model: the network, as `unwrap` gives it.
        shape: (c, h, w) of one input.

    Returns:
        Paths of modules as `module_paths` gives them ("" is the network), one for every call, in
        the order in which the calls ended; None where the network cannot be called without data.
    """
    calls: list[str] = []
    try:
        ghost = meta_copy(model).eval()
        for path, module in module_paths(ghost)[0].items():  # not those that make weights
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
        own = next((p.dtype for p in ghost.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), preserved_rng():
            ghost(torch.empty(2, *shape, dtype=own, device="meta"))
    except Exception:  # data-dependent code, operators without a meta kernel, other inputs
        return None
    return calls


def default_selections(model: nn.Module, runs: list[list[str]]) -> list[Selection]:
    """The default layers that fire: `default_layers`, with a stand-in for a block that does not.

    A block fires only if something calls it: not as a holder of layers that `forward` reaches into,
    not inside a graph that calls the layers of a block one by one, not by `block.forward(x)`. The
    last call of a module inside such a block stands in for it. That is its output where the block
    ends in a module; where it ends in a function (`F.relu(x + shortcut)`), it is the last step that
    is a module, under its own name.

    Args:
        model: the network.
        runs: for every size of its images, the paths of modules in the order in which their calls
            ended, as `module_calls` returns them.

    Returns:
        Selections in the order of `default_layers`. A block with nothing called inside stays, so
        that it is named as never reached; where that holds for all, every module that was called.
    """
    found: list[Selection] = []
    for path in default_layers(model):
        stand_ins = [one for calls in runs if (one := _stand_in(path, calls)) is not None]
        found += stand_ins or [Selection(path)]
    called = dict.fromkeys(path for calls in runs for path in calls)
    if not any(selection.path in called for selection in found):
        found = [Selection(path) for path in called if path] or [Selection("")]
    return list(dict.fromkeys(found))


def _stand_in(path: str, calls: list[str]) -> Selection | None:
    """A module that fires, else the last call inside it, if there is one."""
    if path in calls:
        return Selection(path)
    inside = [k for k, called in enumerate(calls) if called.startswith(f"{path}.")]
    if not inside:
        return None
    last = calls[inside[-1]]
    several = calls.count(last) > 1
    return Selection(last, None, calls[: inside[-1]].count(last) if several else None)
