"""The files of a training run: saved state, metrics, configuration, all written atomically.

The state has no random state: order, crops and dropout depend on (seed, epoch, step, image) only.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cka_probe.io import load_torch, plain, replacing, save_torch
from msun.training.config import check_same_run

__all__ = [
    "CONFIG",
    "METRICS",
    "MODEL",
    "STATE",
    "load_state",
    "read_config",
    "read_metrics",
    "save_state",
    "write_config",
    "write_metrics",
]

MODEL, STATE, METRICS, CONFIG = "model.pt", "state.pt", "metrics.csv", "config.json"
_FORMAT = 1  # of state.pt; a reader refuses newer formats


def save_state(folder: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run, atomically.

    Args:
        folder: folder of the run.
        run: description of the run, in plain types.
        state: tensors and plain types.

    Raises:
        OSError: the folder cannot be written.
    """
    save_torch(folder / STATE, {"format": _FORMAT, "run": json.dumps(run), **state})


def load_state(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the saved state of a run; nothing in the file is executed.

    Args:
        folder: folder of the run.
        run: description of the run; that of the saved run must be equal.

    Returns:
        The `state` of `save_state`, on the CPU; None if there is none.

    Raises:
        ValueError: a damaged file, a newer format, or the state of another run; the message names
            the difference.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = load_torch(path)
        form, saved = state.pop("format"), json.loads(state.pop("run"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = f"{path}: run with overwrite (--overwrite) and without resume"
        raise ValueError(f"saved state cut short or damaged: {text}") from error
    if form > _FORMAT:
        raise ValueError(f"saved state of a newer format: {form}: update msun")
    check_same_run(saved, run, "saved state")
    return state


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json.

    Args:
        folder: folder of the run.
        config: all options and versions needed to repeat the run.
    """
    with replacing(folder / CONFIG) as temporary:
        text = json.dumps(plain(dict(config)), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; {} if it is missing or unreadable.

    Args:
        folder: folder of the run.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.csv.

    Args:
        folder: folder of the run.
        rows: one mapping per epoch; the keys of the first are the columns.
    """
    with (
        replacing(folder / METRICS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Read metrics.csv.

    Args:
        folder: folder of the run.

    Returns:
        One mapping per epoch, values as text.
    """
    with (folder / METRICS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
