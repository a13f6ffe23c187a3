"""The tables that are kept: one row a reading and size, one a training, one a pair of arms.

They are the point from which a later session goes on: a run whose rows are here is not run again.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from cka_probe.files import replacing

__all__ = ["RUNS", "Ledger"]

KEYS = ("task", "net", "cut", "budget", "seed", "lr", "run")
COLUMNS: dict[str, tuple[str, ...]] = {
    # one row a training
    "trainings": (*KEYS, "steps", "epochs", "train_gmacs", "params", "loss", "core_s", "key"),
    # one row a reading and size; top1 a share, gmacs for one image
    "runs": (*KEYS, "arm", "split", "view", "n", "top1", "mmacs", "key"),
    # one row a pair of readings of one seed and a size: arm - other on the same images
    "pairs": ("task", "net", "cut", "budget", "seed", "arm", "other", "view", "n", "diff",
              "image_var"),
    # one row a network and pair of scales: CKA where they meet, cosine of gradients in the trunk
    "why": ("task", "net", "arm", "cut", "scale", "other", "cosine", "cka"),
    # one row an arm and trained size: milliseconds for a batch of 64, and the ratio to (a)
    "latency": ("task", "net", "arm", "size", "ms_64", "ratio"),
    # one row a rule and candidate cut, from a probe of the single-scale network
    "splits": ("task", "net", "seed", "rule", "layer", "cka", "score", "place", "clear"),
}  # fmt: skip
RUNS = "runs"


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

    def path(self, name: str) -> Path:
        """The file of a table."""
        return self.folder / f"{name}.csv"

    def read(self, name: str) -> pd.DataFrame:
        """A table; empty where there is none yet."""
        if not self.path(name).exists():
            return pd.DataFrame(columns=list(COLUMNS[name]))
        frame: pd.DataFrame = pd.read_csv(self.path(name), dtype={"view": str})
        return frame

    def done(self) -> set[tuple[str, str]]:
        """What has rows: (key of the run, label of the reading)."""
        frame = self.read("runs")
        return set(zip(frame["key"], frame["arm"], strict=True))

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, all or none: the file is replaced whole."""
        with self.turn:
            self._append(name, rows)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        old = self.path(name).read_text() if self.path(name).exists() else ""
        with replacing(self.path(name)) as temporary, temporary.open("w", newline="") as file:
            file.write(old)
            writer = csv.DictWriter(file, COLUMNS[name], lineterminator="\n")
            if not old:
                writer.writeheader()
            writer.writerows(_short(rows))

    def rewrite(self, name: str, frame: pd.DataFrame) -> None:
        """Replace a table."""
        with replacing(self.path(name)) as temporary:
            frame.to_csv(temporary, index=False, lineterminator="\n")


def _short(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Numbers with as many digits as they deserve."""
    return [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
