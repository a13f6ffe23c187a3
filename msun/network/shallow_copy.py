"""Copies of a head that share its layers, so that some can be replaced in the copy alone."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from msun.cutting.halves import Part

__all__ = ["copy_path", "replace_module", "shallow", "shallow_part"]

_M = TypeVar("_M", bound=nn.Module)


def shallow(module: _M) -> _M:
    """A copy of a module that shares its parameters, buffers and submodules.

    The copy has its own attributes, table of submodules and forward pre-hooks.

    Args:
        module: the module; left unchanged.
    """
    made: _M = object.__new__(type(module))
    own = dict(vars(module))
    own["_modules"] = dict(module._modules)
    own["_forward_pre_hooks"] = module._forward_pre_hooks.copy()
    vars(made).update(own)
    return made


def shallow_part(head: Part) -> Part:
    """A shallow copy of a head, for `copy_path` and `replace_module`.

    Args:
        head: the head; left unchanged.
    """
    return shallow(head)


def copy_path(head: Part, path: str) -> nn.Module:
    """Replace a module and the containers around it by shallow copies.

    Args:
        head: a shallow copy of a head; changed in place.
        path: path of the module.

    Returns:
        The copy of the module.
    """
    here: nn.Module = head
    for name in path.split("."):
        copied = shallow(here.get_submodule(name))
        here._modules[name] = copied
        here = copied
    return here


def replace_module(head: Part, path: str, module: nn.Module) -> None:
    """Replace the module at a path.

    Args:
        head: a shallow copy of a head; changed in place.
        path: path of the module; its parent must exist.
        module: the new module.
    """
    parent, _, name = path.rpartition(".")
    here: nn.Module = copy_path(head, parent) if parent else head
    here._modules[name] = module
