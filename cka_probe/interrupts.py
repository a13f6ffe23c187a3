"""Ctrl-C while a command line is still loading: one line and status 130, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = ("cka-probe", "cka_probe")


@contextmanager
def told() -> Iterator[None]:
    """What is imported inside takes seconds; a program that is not ours gets the interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        if not _is_ours(sys.orig_argv):
            raise
        sys.stderr.write("cka-probe: interrupted: Ctrl-C: nothing was saved, run again\n")
        raise SystemExit(130) from None


def _is_ours(words: list[str]) -> bool:
    """Whether a process is `python -m cka_probe`, or the script that is installed."""
    for k, word in enumerate(words[1:], 1):
        if not word.startswith("-"):
            return Path(word).name in _NAMES and (words[k - 1] == "-m" or "/" in word)
    return False
