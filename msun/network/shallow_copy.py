"""A second head around the same layers, in which some are exchanged without harm to the first."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from msun.cutting.dataflow import Part

__all__ = ["copy_path", "put", "shallow", "shallow_part"]

_M = TypeVar("_M", bound=nn.Module)


def shallow(module: _M) -> _M:
    """A copy that shares parameters and buffers, for good, and the modules inside.

    Its attributes, what stands at its paths, and the hooks before its forward are its own.

    Args:
        module: left as it is.
    """
    made: _M = object.__new__(type(module))
    own = dict(vars(module))
    own["_modules"] = dict(module._modules)
    own["_forward_pre_hooks"] = module._forward_pre_hooks.copy()
    vars(made).update(own)
    return made


def shallow_part(head: Part) -> Part:
    """A second head around the same modules, for `put` and `branch`.

    Args:
        head: left as it is, whatever is put into its twin.
    """
    return shallow(head)


def copy_path(head: Part, path: str) -> nn.Module:
    """The module at a path, replaced by a shallow copy, as are the containers on the way.

    Args:
        head: a twin.
        path: where it stands.
    """
    here: nn.Module = head
    for name in path.split("."):
        copied = shallow(here.get_submodule(name))
        here._modules[name] = copied
        here = copied
    return here


def put(head: Part, path: str, module: nn.Module) -> None:
    """Let another module stand at a path.

    Args:
        head: a twin.
        path: its parent must be there.
        module: what is to stand there.
    """
    parent, _, name = path.rpartition(".")
    here: nn.Module = copy_path(head, parent) if parent else head
    here._modules[name] = module
