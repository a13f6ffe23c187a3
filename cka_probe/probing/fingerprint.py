"""What a value is, as text that changes with it: how a resumed run notices that it was changed."""

import dataclasses
import dis
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

_DEPTH = 8  # of attributes within attributes
_SHOWN = 12  # hex digits of a hash behind a name


def described(value: Any) -> Any:
    """A value as JSON that differs where the value does, and never by an address.

    A function is its name and a hash of its code: instructions, constants, names, defaults, what
    its closure holds, and the globals that it reads; functions among those only where they stand
    in the same module. Any other object is its class and a hash of its attributes. Code of a
    library, of methods and of C is known by its name alone, so a change there goes unnoticed.

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
    text = "\n".join(_lines(value, (), ""))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} #{hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]}"


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _lines(value: Any, above: tuple[int, ...], home: str) -> Iterable[str]:
    """Everything that makes a value what it is; `above`: what it is a part of; `home`: module."""
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
        yield from _parts(value, (*above, id(value)), home)


def _parts(value: Any, above: tuple[int, ...], home: str) -> Iterable[str]:
    yield type(value).__qualname__
    parts: Iterable[Any]
    if isinstance(value, types.FunctionType):
        module = str(value.__module__)
        yield f"{module} {value.__qualname__}"
        if home and module != home:
            return  # of another module: by name
        home = module
        parts = [*_code(value.__code__), value.__defaults__, value.__kwdefaults__, *_reads(value)]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, set | frozenset):
        parts = sorted("\n".join(_lines(item, above, home)) for item in value)
    else:
        own = getattr(value, "__dict__", {})
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own = own | {name: getattr(value, name) for name in slots if hasattr(value, name)}
        yield "" if own else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
        parts = [part for item in own.items() for part in item]
    for part in parts:
        yield from _lines(part, above, home)


def _code(code: types.CodeType) -> list[Any]:
    """The parts of a code object, those of functions inside it included; no file, no line."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    parts: list[Any] = [code.co_code.hex(), code.co_names, code.co_varnames, code.co_flags]
    for part in code.co_consts:
        known = isinstance(part, frozenset | bytes | complex) or part is ...
        parts.append(sorted(map(repr, part)) if isinstance(part, frozenset) else
                     repr(part) if known else part if _plain(part) else "")  # fmt: skip
    return parts + [piece for part in inner for piece in _code(part)]


def _reads(function: types.FunctionType) -> list[Any]:
    """What a function takes from outside: its closure, and the globals that its code names."""
    read = []
    for cell in function.__closure__ or ():
        try:
            read.append(cell.cell_contents)
        except ValueError:  # not filled yet
            read.append(None)
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL}
    known = function.__globals__
    return read + [part for name in sorted(names & known.keys()) for part in (name, known[name])]


_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
