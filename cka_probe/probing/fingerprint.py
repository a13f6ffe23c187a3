"""A user's value as text that changes with it: how a resumed run notices a changed option."""

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from cka_probe.io import digest

__all__ = ["described"]

_DEPTH = 8  # of attributes within attributes, so that a large object graph ends
_SHOWN = 12  # hex digits of a hash behind a name: 48 bits


def described(value: Any) -> Any:
    """A value as JSON that differs where the value does, and never by an address.

    A function is its module and qualified name, with its defaults and what its closure holds; a
    partial is its function and arguments; any other object is its class and its attributes.

    Not noticed: an edited body of a function or method, two lambdas on the same line of a scope
    (they have one qualified name), and a changed global variable that a function reads. The text is
    the same under every version of Python.

    Args:
        value: an option of a run: text, numbers, lists of them, types, functions, objects.

    Returns:
        None, bool, int, float or text as they are; lists for lists, tuples and sets; else text.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((described(item) for item in value), key=repr)
    if isinstance(value, type):
        return value.__qualname__
    if dataclasses.is_dataclass(value) and all(map(_plain, vars(value).values())):
        return repr(value)
    text = "\n".join(_lines(value, ()))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} #{hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]}"


def _plain(value: Any) -> bool:
    """Whether repr says all about a value."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _lines(value: Any, above: tuple[int, ...]) -> Iterable[str]:
    """The state of a value, line by line; `above`: ids of the objects that it is a part of."""
    if _plain(value):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield digest(value)
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        yield f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}"
    elif id(value) in above or len(above) > _DEPTH:
        yield type(value).__qualname__
    else:
        yield type(value).__qualname__
        for part in _parts(value):
            yield from [part] if isinstance(part, _Line) else _lines(part, (*above, id(value)))


class _Line(str):
    """Text that is a line as it stands."""


def _parts(value: Any) -> Iterable[Any]:
    """What a function or an object is made of."""
    if isinstance(value, types.FunctionType):
        yield _Line(f"{value.__module__} {value.__qualname__}")
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                yield None
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, Mapping):
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, set | frozenset):  # in an order that no hash seed changes
        yield from map(_Line, sorted("\n".join(_lines(item, ())) for item in value))
    else:
        own = getattr(value, "__dict__", {})
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own = own | {name: getattr(value, name) for name in slots if hasattr(value, name)}
        yield _Line("" if own else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)))  # no address
        yield from (part for item in own.items() for part in item)
