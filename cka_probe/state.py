"""The saved state of an interrupted run: sums, which batches are in them, and of which run.

A state file is whole or absent (written beside, then renamed) and belongs to one run: what could
change a number is in its fingerprint, and a difference is refused by name.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cka_probe.collect import Tap
from cka_probe.estimators import Minibatch
from cka_probe.files import load_npz, save_npz

STATE = "state.npz"
SAVE_EVERY_S = 20.0
_FORMAT = 1
_ARRAYS = ("hsic", "floor", "varied", "weight")


def save_state(
    folder: Path, estimator: Minibatch, next_batch: int, run: dict[str, Any], bad: list[str]
) -> None:
    """Write the sums over batches 0 .. next_batch - 1 of the run described by `run`.

    Raises:
        OSError: the folder cannot be written.
    """
    meta = {
        "run": run,
        "next_batch": next_batch,
        "bad": bad,
        "keys": [[key[0], *key[1]] for key in estimator.keys],
        "sigma": [estimator.sigma.get(key) for key in estimator.keys],
    }
    arrays = {name: getattr(estimator, name) for name in _ARRAYS}
    save_npz(folder / STATE, arrays, meta, version=_FORMAT)


def load_state(
    folder: Path, estimator: Minibatch, run: dict[str, Any]
) -> tuple[int, list[str]] | None:
    """Put saved sums into a fresh estimator.

    Returns:
        (first batch that is still to do, images that could not be read so far), or None where
        there is no saved state.

    Raises:
        ValueError: the file is damaged, or belongs to another run; the message names what differs.
    """
    path = folder / STATE
    if not path.exists():
        return None
    arrays, meta = load_npz(path, _ARRAYS, version=_FORMAT, what="saved state")
    saved = meta["run"]
    wanted = json.loads(json.dumps(run))
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"saved state of another run: {name} was {_short(saved.get(name))}, "
                f"is {_short(wanted.get(name))}: run without --resume and with --overwrite, "
                "or as before"
            )
    estimator.keys = [(view, Tap(path, field, call)) for view, path, field, call in meta["keys"]]
    for name in _ARRAYS:
        setattr(estimator, name, np.array(arrays[name], dtype=np.float64))
    estimator.sigma = {
        key: sigma
        for key, sigma in zip(estimator.keys, meta["sigma"], strict=True)
        if sigma is not None
    }
    return int(meta["next_batch"]), list(meta["bad"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
