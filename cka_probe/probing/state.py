"""The saved state of an interrupted run: what its batches came to, which they are, of which run.

A state is whole or absent (written beside, then renamed) and belongs to one run: what could change
a number is in its fingerprint, and a difference is refused by name. It holds batches 0 .. k - 1,
whoever made them: a run of N processes is continued by any number.
"""

import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cka_probe.activations.hooks import Tap
from cka_probe.engine.device import device_for_sums
from cka_probe.engine.hsic import Array
from cka_probe.engine.memory import readable
from cka_probe.engine.minibatch import Exact, Minibatch, Sketch
from cka_probe.io import load_npz, plain, save_npz
from cka_probe.probing.row_file import ROWS, RowFile

__all__ = ["ROWS", "SAVE_EVERY_S", "STATE", "Saver", "differences", "refuse_other"]
__all__ += [
    "saved_options",
]

STATE = "state.npz"
SAVE_EVERY_S = float(os.environ.get("CKA_PROBE_SAVE_EVERY_S", "20"))
_SHARE = 20  # saving may take a 20th of the time
_FORMAT = 2
_SUMS = ("hsic", "floor", "varied", "weight")
_FILE = ("extent", "batches", "kinds", "widths")
_SKETCH = ("origin", "offset", "kept")
_AGAIN = "run without --resume and with --overwrite"

Bad = list[tuple[int, list[str], list[str]]]  # batch: left out, unreadable and readable


class Saver:
    """Saves the state of one run as it goes.

    `minibatch` saves its sums, whole each time; `sketch` and `exact` append their rows to a second
    file, state.rows. Not saved: `exact` whose features are spooled to disk already, `minibatch`
    with the RBF kernel before its bandwidth is known (256 images), and rows that would take more
    than half of the free disk, which is warned of.

    Args:
        folder: of the run; None saves nothing.
        run: its fingerprint.
        n_images: in the run.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any], n_images: int) -> None:
        self.folder, self.run, self.n_images = folder, plain(run), n_images
        self._rows = RowFile(folder) if folder is not None else None
        self._last, self._took = time.perf_counter(), 0.0

    def due(self) -> bool:
        """Whether it is time to save again."""
        since = time.perf_counter() - self._last
        return self.folder is not None and since >= max(SAVE_EVERY_S, _SHARE * self._took)

    def save(self, estimator: Any, next_batch: int, bad: Bad) -> None:
        """Write what batches 0 .. next_batch - 1 came to, where there is something to save.

        Raises:
            OSError: the folder cannot be written; a full disk ends only the saving of rows.
        """
        began = time.perf_counter()
        if self.folder is None or not self._worth(estimator):
            return
        try:
            meta, arrays = self._content(estimator, self.folder)
            meta |= {
                "run": self.run,
                "next_batch": next_batch,
                "bad": [list(b) for b in bad if b[1]],
            }
            save_npz(self.folder / STATE, arrays, meta, version=_FORMAT)
        except OSError as error:
            if isinstance(estimator, Minibatch) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._give_up("the disk is full")
        self._last = time.perf_counter()
        self._took = self._last - began

    def _worth(self, estimator: Any) -> bool:
        if isinstance(estimator, Minibatch):
            return bool(estimator.keys) and not estimator.waiting
        if not estimator.rows or self._rows is None or self.folder is None:
            return False
        if not self._rows.batches:
            rows = estimator.rows.values()
            need = self.n_images * sum(one.bytes_per_row for one in rows if one.parts)
            free = shutil.disk_usage(self.folder).free
            if need > free // 2:
                self._give_up(f"it would take {readable(need)} of {readable(free)} of disk")
                return False
        return True

    def _give_up(self, why: str) -> None:
        self.clear()
        self.folder = None
        warnings.warn(f"no state is saved: {why}: the run cannot be resumed", stacklevel=3)

    def _content(self, estimator: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
        if isinstance(estimator, Minibatch):
            keys = estimator.keys
            sigma = [estimator.sigma.get(key) for key in keys]
            arrays = {name: getattr(estimator, name) for name in _SUMS}
            return {"keys": _written(keys), "sigma": sigma}, arrays
        assert self._rows is not None
        if not self._rows.batches:
            (folder / STATE).unlink(missing_ok=True)  # of another run: its rows are overwritten
        self._rows.append(estimator.rows)
        arrays, keys = self._rows.arrays(), list(estimator.rows)
        if isinstance(estimator, Sketch):
            arrays["origin"] = np.concatenate([estimator.origin[key].cpu() for key in keys])
            arrays["offset"] = np.array([float(estimator.offset[key]) for key in keys])
            arrays["kept"] = np.array([estimator.kept[key] for key in keys])
        return {"keys": _written(keys)}, arrays

    def load(self, estimator: Any, home: torch.device) -> tuple[int, Bad] | None:
        """Put a saved state into a fresh estimator, rows of features on the device `home`.

        Returns:
            (first batch that is still to do, images left out so far), or None where there is none.

        Raises:
            ValueError: a file is damaged, or belongs to another run; the message names what
                differs.
        """
        if self.folder is None or not (self.folder / STATE).exists():
            return None
        path = self.folder / STATE
        names: tuple[str, ...] = _SUMS if isinstance(estimator, Minibatch) else _FILE
        names += _SKETCH if isinstance(estimator, Sketch) else ()
        try:
            arrays, meta = load_npz(path, (), version=_FORMAT, what="saved state")
            refuse_other(meta["run"], self.run, "saved state")
            arrays, meta = load_npz(path, names, version=_FORMAT, what="saved state")
            keys = [(view, Tap(at, field, call)) for view, at, field, call in meta["keys"]]
            self._fill(estimator, keys, arrays, meta, home)
            bad = [
                (int(index), list(map(str, lost)), [str(name) for some in few for name in some])
                for index, lost, *few in meta["bad"]  # earlier versions did not part them
            ]
            return int(meta["next_batch"]), bad
        except OtherRunError:
            raise
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _damaged(path, error) from error

    def _fill(
        self, estimator: Any, keys: list[Any], arrays: Any, meta: Any, home: torch.device
    ) -> None:
        if isinstance(estimator, Minibatch):
            estimator.begin(keys)
            for name in _SUMS:
                if arrays[name].shape != getattr(estimator, name).shape:
                    raise ValueError(f"sums of another shape: {name}")
                setattr(estimator, name, np.array(arrays[name], dtype=np.float64))
            pairs = zip(keys, meta["sigma"], strict=True)
            estimator.sigma = {key: sigma for key, sigma in pairs if sigma is not None}
            return
        assert self._rows is not None
        if isinstance(estimator, Sketch):
            own = device_for_sums(home)
            origin, offset, kept = (arrays[name] for name in _SKETCH)
            estimator.restore(keys, arrays["widths"], origin, offset, kept, own)
        for index, rows in self._rows.read(arrays):
            for key, x in zip(keys, rows, strict=True):
                if isinstance(estimator, Exact):
                    estimator.put(key, x.to(home))
                else:
                    estimator.add_rows(key, index, x.to(home))
            if isinstance(estimator, Exact):
                estimator.close_batch(index)

    def clear(self) -> None:
        """Remove the state."""
        if self.folder is not None:
            for name in (STATE, ROWS):
                (self.folder / name).unlink(missing_ok=True)


def _damaged(path: Path, error: Exception) -> ValueError:
    text = str(error).removesuffix(": make it again")
    if not text.startswith("saved state") or str(path.parent) not in text:
        text = f"saved state cut short or damaged: {path}"
    return ValueError(f"{text}: {_AGAIN}")


class OtherRunError(ValueError):
    """A state or a report that belongs to another run."""


def saved_options(folder: Path) -> dict[str, Any]:
    """The fingerprint of the run whose state lies in a folder.

    Raises:
        ValueError: the state is damaged.
    """
    path = folder / STATE
    try:
        return dict(load_npz(path, (), version=_FORMAT, what="saved state")[1]["run"])
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
            f"{what} of another run: {name} was {_short(was)}, is {_short(now)}: {_AGAIN}, "
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


def _written(keys: list[Any]) -> list[list[Any]]:
    return [[view, *tap] for view, tap in keys]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
