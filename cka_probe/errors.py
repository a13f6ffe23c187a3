"""Exceptions as one line of text: what is wrong: the value: a hint what to do."""

import errno
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

__all__ = ["RunFailedError", "explain", "first_names", "one_line", "printable"]


class RunFailedError(RuntimeError):
    """The machine failed, not the input: a killed process, a full disk. What was saved stays."""


def one_line(error: BaseException) -> str:
    """The reason of an exception as one line without ": " and without absolute paths.

    Args:
        error: the exception.

    Returns:
        "no such file or directory", "image file is truncated", "KeyError ('x')".
    """
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow reads"
    if isinstance(reason := getattr(error, "reason", None), OSError):  # URLError
        return one_line(reason)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    text = " ".join(str(error).split()).replace(": ", ", ").rstrip(".")
    if isinstance(error, OSError | ValueError | Image.DecompressionBombError):
        return text or type(error).__name__
    return f"{type(error).__name__} ({text})" if text else type(error).__name__


def first_names(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are: "a, b and 3 more".

    Args:
        names: any number.
        most: how many are shown.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """One line for a terminal: names of files may hold newlines, escape codes or broken bytes.

    Args:
        text: of any characters.

    Returns:
        The text with white space as single spaces, and what cannot be printed as its code.
    """
    plain = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


def explain(error: Exception) -> str:
    """An exception as one line: what is wrong: the value: a hint."""
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename2 or error.filename or "output"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space" if full else "check the path and its permissions"
        return f"{error.strerror}: {where}: {hint}, or choose another --out"
    return str(error)
