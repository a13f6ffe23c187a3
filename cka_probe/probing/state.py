"""The saved state of an interrupted run: the sums of its batches, their number, its fingerprint.

A state is whole or absent (written beside, then renamed) and belongs to one run: what could change
a number is in its fingerprint, and a difference is refused by name. It holds batches 0 .. k - 1,
whichever process made them: a run of N processes is continued by any number.
"""

import errno
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cka_probe.activations.hooks import Tap
from cka_probe.engine.estimator import Estimator
from cka_probe.io import load_npz, plain, save_npz

__all__ = [
    "STATE",
    "OtherRunError",
    "Saver",
    "differences",
    "refuse_other",
    "save_every_s",
    "saved_options",
]

STATE = "state.npz"
_SHARE = 20  # saving may take a 20th of the time
_RATE = 2e8  # bytes a second that are assumed before the first state is written
_FORMAT = 3
_HINT = "run without --resume and with --overwrite"

Bad = list[tuple[int, list[str], list[str]]]  # batch: left out, unreadable and readable


def save_every_s() -> float:
    """Seconds between saved states: 20, or `CKA_PROBE_SAVE_EVERY_S`.

    Raises:
        ValueError: the variable holds no number of seconds.
    """
    text = os.environ.get("CKA_PROBE_SAVE_EVERY_S", "20")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(
            f"bad CKA_PROBE_SAVE_EVERY_S: {text!r}: set it to a number of seconds, or unset it"
        )
    return seconds


class Saver:
    """Saves the state of one run at intervals.

    `minibatch` holds sums of a few MiB; `exact` and `sketch` hold rows of every image, so that a
    state may take long to write. It is written seldom enough to take a 20th of the time.

    Args:
        folder: folder of the run; None saves nothing.
        run: the run's fingerprint.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        self.folder, self.run = folder, plain(run)
        self._every_s = save_every_s()
        self._last, self._took = time.perf_counter(), 0.0

    def due(self) -> bool:
        """Whether it is time to save again."""
        since = time.perf_counter() - self._last
        return self.folder is not None and since >= max(self._every_s, _SHARE * self._took)

    def save(self, estimator: Estimator, next_batch: int, bad: Bad) -> None:
        """Write the sums or rows of batches 0 .. next_batch - 1.

        Raises:
            OSError: the folder cannot be written.
        """
        began = time.perf_counter()
        if self.folder is None or not estimator.keys:
            return
        state = estimator.state_dict()
        arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
        size = sum(array.nbytes for array in arrays.values())
        if not self._took and began - self._last < _SHARE * size / _RATE:
            self._took = size / _RATE  # it would take too long for now: ask again later
            return
        meta = {
            "keys": [[view, *tap] for view, tap in state["keys"]],
            "plain": {k: v for k, v in state.items() if k not in arrays and k != "keys"},
            "arrays": list(arrays),
            "run": self.run,
            "next_batch": next_batch,
            "bad": [list(one) for one in bad if one[1]],
        }
        try:
            save_npz(self.folder / STATE, arrays, meta, version=_FORMAT)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            warnings.warn(
                "no state is saved: the disk is full: the run cannot be resumed from here",
                stacklevel=3,
            )
            self.folder = None
        self._last = time.perf_counter()
        self._took = self._last - began

    def load(self, estimator: Estimator) -> tuple[int, Bad] | None:
        """Load a saved state into a fresh estimator.

        Returns:
            (first batch that is still to do, images left out so far), or None if there is none.

        Raises:
            ValueError: a file is damaged, of an earlier version, or of another run; the message
                names what differs.
        """
        if self.folder is None or not (self.folder / STATE).exists():
            return None
        path = self.folder / STATE
        try:
            meta = _read(path)
            refuse_other(meta["run"], self.run, "saved state")
            names = tuple(map(str, meta["arrays"]))
            arrays, _ = load_npz(path, names, version=_FORMAT, what="saved state")
            keys = [(view, Tap(at, field, call)) for view, at, field, call in meta["keys"]]
            estimator.load_state_dict({**meta["plain"], **arrays, "keys": keys})
            bad = [
                (int(index), list(map(str, lost)), list(map(str, few)))
                for index, lost, few in meta["bad"]
            ]
            return int(meta["next_batch"]), bad
        except OtherRunError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _damaged(path, error) from error

    def clear(self) -> None:
        """Remove the state."""
        if self.folder is not None:
            (self.folder / STATE).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The meta of a state of this version.

    Raises:
        ValueError: an earlier version.
    """
    _, meta = load_npz(path, (), version=_FORMAT, what="saved state")
    if "arrays" not in meta:
        raise OtherRunError(f"saved state of an earlier version: {path}: {_HINT}")
    return dict(meta)


def _damaged(path: Path, error: Exception) -> ValueError:
    text = str(error).removesuffix(": make it again")
    if not text.startswith("saved state") or str(path.parent) not in text:
        text = f"saved state cut short or damaged: {path}"
    return ValueError(f"{text}: {_HINT}")


class OtherRunError(ValueError):
    """A state or a report that belongs to another run."""


def saved_options(folder: Path) -> dict[str, Any]:
    """The fingerprint of the run whose state lies in a folder.

    Raises:
        ValueError: the state is damaged.
    """
    path = folder / STATE
    try:
        return dict(_read(path)["run"])
    except OtherRunError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def refuse_other(saved: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise unless two fingerprints are equal, naming what differs.

    Args:
        saved: of what lies there, as JSON.
        wanted: of this run.
        what: "saved state" or "finished report".

    Raises:
        ValueError: they differ.
    """
    for name, was, now in differences(saved, plain(wanted)):
        raise OtherRunError(
            f"{what} of another run: {name} was {_short(was)}, is {_short(now)}: {_HINT}, "
            "or as before"
        )


def differences(saved: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, was, is) of each difference; what stands for content is named by what it is."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted({*saved, *wanted}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(saved.get(key), wanted.get(key), inner)
    elif saved != wanted:
        parts = name.split(".")
        if parts[0] == "views" and parts[-1] == "model":
            name += " (the network or its weights)"
        elif parts == ["images", "sha256"]:
            name += " (the data set)"
        yield name, saved, wanted


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
