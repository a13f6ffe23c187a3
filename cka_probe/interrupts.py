"""Ctrl-C while a command line is still loading: one line and status 130, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = {"cka-probe": "cka-probe", "cka_probe": "cka-probe", "msun": "msun"}


@contextmanager
def told() -> Iterator[None]:
    """What is imported inside takes seconds; a program that is not ours gets the interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        ours = _ours(sys.orig_argv)
        if ours is None:
            raise
        sys.stderr.write(f"{ours}: interrupted: Ctrl-C: nothing was saved, run again\n")
        raise SystemExit(130) from None


def _ours(words: list[str]) -> str | None:
    """Which program a process is: `python -m cka_probe`, or a script that is installed."""
    for k, word in enumerate(words[1:], 1):
        if not word.startswith("-"):
            known = words[k - 1] == "-m" or "/" in word
            return _NAMES.get(Path(word).name) if known else None
    return None
