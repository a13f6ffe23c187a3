"""The tables that are kept: one row a reading and size, one a training, one a pair of arms.

The two longest lie in a folder each, a file a task, backbone and seed, so that none gets too large
to be kept with the code. They are the point from which a later session goes on: a run whose rows
are here is not run again.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from cka_probe.io import replacing

__all__ = ["RUNS", "Ledger", "machine"]

KEYS = ("task", "net", "cut", "budget", "seed", "lr", "run")
COLUMNS: dict[str, tuple[str, ...]] = {
    # one row a training
    "trainings": (*KEYS, "steps", "epochs", "train_gmacs", "params", "loss", "core_s", "key",
                  "machine"),
    # one row a reading and size; top1 a share, gmacs for one image
    "runs": (*KEYS, "arm", "split", "view", "n", "top1", "mmacs", "key"),
    # one row a pair of readings of one seed and a size: arm - other on the same images
    "pairs": ("task", "net", "cut", "budget", "seed", "arm", "other", "view", "n", "diff",
              "image_var"),
    # the same of test images that were not looked at before, for the runs that the verdict needs
    "unread": (*KEYS, "arm", "split", "view", "n", "top1", "mmacs", "key"),
    "unread-pairs": ("task", "net", "cut", "budget", "seed", "arm", "other", "view", "n", "diff",
                     "image_var"),
    # one row a network and pair of scales: CKA where they meet, cosine of gradients in the trunk
    "why": ("task", "net", "arm", "cut", "scale", "other", "cosine", "cka"),
    # one row an arm and trained size: milliseconds for a batch of 64, and the ratio to (a)
    "latency": ("task", "net", "arm", "size", "ms_64", "ratio"),
    # one row a rule and candidate cut, from a probe of the single-scale network
    "splits": ("task", "net", "seed", "rule", "layer", "cka", "score", "place", "clear"),
}  # fmt: skip
RUNS = "runs"
PARTED = (RUNS, "pairs")  # a folder of files
PART = ("task", "net", "seed")  # what they are told apart by


def machine(device: str) -> str:
    """What runs are made on: the card's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Ledger:
    """The CSV files of a folder; several processes may add to them.

    Args:
        folder: where they lie; made if need be.
        lock: the file by which processes take turns; None: in the folder.
    """

    def __init__(self, folder: Path, lock: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.turn = FileLock(lock or folder / ".lock")

    def paths(self, name: str) -> list[Path]:
        """The files of a table that there are, in order."""
        found = (self.folder / name).glob("*.csv") if name in PARTED else [self.path(name)]
        return sorted(path for path in found if path.exists())

    def path(self, name: str, row: Mapping[str, Any] | None = None) -> Path:
        """The file of a table in which a row belongs."""
        if name not in PARTED or row is None:
            return self.folder / f"{name}.csv"
        return self.folder / name / f"{'-'.join(str(row.get(c, '')) for c in PART)}.csv"

    def read(self, name: str) -> pd.DataFrame:
        """A table; empty where there is none yet."""
        frames = [pd.read_csv(path, dtype={"view": str}) for path in self.paths(name)]
        if not frames:
            return pd.DataFrame(columns=list(COLUMNS[name]))
        return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)

    def done(self) -> set[tuple[str, str]]:
        """What has rows: (key of the run, label of the reading)."""
        frame = self.read(RUNS)
        return set(zip(frame["key"], frame["arm"], strict=True))

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; those of one file all or none: it is replaced whole."""
        parts: dict[Path, list[Mapping[str, Any]]] = {}
        for row in rows:
            parts.setdefault(self.path(name, row), []).append(row)
        with self.turn:
            for path, part in parts.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append(path, COLUMNS[name], part)

    @staticmethod
    def _append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        old = path.read_text() if path.exists() else ""
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            file.write(old)
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if not old:
                writer.writeheader()
            writer.writerows(_short(rows))

    def rewrite(self, name: str, frame: pd.DataFrame) -> None:
        """Replace a table that is one file.

        Raises:
            ValueError: it is several.
        """
        if name in PARTED:
            raise ValueError(f"{name} is kept in several files: add to it, or delete rows there")
        with replacing(self.path(name)) as temporary:
            frame.to_csv(temporary, index=False, lineterminator="\n")


def _short(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Numbers with as many digits as they deserve."""
    return [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
