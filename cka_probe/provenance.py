"""What a result came from: a network by its SHA-256, the versions of the libraries."""

import hashlib
import inspect
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.io import dense

__all__ = ["model_sha256", "versions"]

# Their code is known by their versions, which a report states.
_LIBRARIES = frozenset({"cka_probe", "msun", "torch", "torchvision", "timm", "numpy"})


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of the structure (its printed form), the values and the code of a network.

    Values are every parameter and buffer. Code is the source of the user's own classes, of the
    functions and constants of their files that they name; the libraries are known by their
    versions. What has no source, as in a Python prompt, counts by its name. Not noticed: hooks, as
    most of them watch and change nothing.

    Args:
        model: the network without its wrapper (DataParallel, torch.compile), which changes names.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(
            dense(value.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
    for line in _code(model):
        digest.update(line.encode())
    return digest.hexdigest()


def _code(model: nn.Module) -> list[str]:
    """The source of all that computes the outputs and is not a library's."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        _add_source(type(module), found)
        own = vars(module).get("forward")
        _add_source(getattr(own, "__func__", own), found, path)
        if isinstance(module, torch.fx.GraphModule):
            found[f"graph {path}"] = str(module.code)
    return [f"{name}\n{text}" for name, text in sorted(found.items())]


def _add_source(one: Any, found: dict[str, str], where: str = "") -> None:
    """Add the source of a class or function, and of what it names in its module."""
    if not isinstance(one, type | FunctionType) or _is_library(one):
        return
    name = f"{where} {one.__qualname__}"  # a script's own module is sometimes `__main__`
    if name in found:
        return
    found[name] = ""
    with suppress(OSError, TypeError):  # defined where no file is
        found[name] = inspect.getsource(one)
    functions: list[FunctionType] = []
    if isinstance(one, FunctionType):
        functions = [one]
    else:
        for base in one.__mro__[1:]:
            _add_source(base, found)
        parts = (getattr(part, "__func__", part) for part in vars(one).values())
        functions = [part for part in parts if isinstance(part, FunctionType)]
    for function in functions:
        for word in _names(function.__code__):
            value = function.__globals__.get(word)
            if _is_constant(value) and not word.startswith("__"):  # not __name__ or __file__
                found[word] = repr(value)
            _add_source(value, found)


def _is_constant(value: Any) -> bool:
    """Whether repr says all about a value, and never an address."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, bool | int | float | str)


def _names(code: CodeType) -> set[str]:
    """The global names in a function and in the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_library(one: type | FunctionType) -> bool:
    root = str(one.__module__).partition(".")[0]
    return root in _LIBRARIES or root in sys.builtin_module_names or root in sys.stdlib_module_names


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on: name -> version."""
    try:
        own = version("cka-probe")
    except PackageNotFoundError:
        own = "source"
    found = {"cka_probe": own, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("torchvision", "pillow", "numpy", *(["timm"] if "timm" in sys.modules else [])):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
