"""How the processes of a job hear of each other: through the store that started them.

Each says there every few seconds that it lives. A process that died, or failed, ends the wait of
the others with an error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["Link", "LostRankError"]

BEAT_S = 3.0  # how often a process says that it lives
SILENCE_S = 25.0  # after which it is taken for dead
PARTING_S = 3.0  # that the process which holds the store waits for the others to leave


class LostRankError(RuntimeError):
    """Another process of the job died or failed; `told` where that one says why."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


@contextmanager
def _reachable() -> Iterator[None]:
    """What the store raises when the process that holds it has ended."""
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        raise LostRankError(
            "the store of the job was lost: its first process or the launcher has ended: "
            "run again with --resume"
        ) from error


class Link:
    """A process's tie to the others through the store: it beats, waits and reports failure.

    Args:
        store: A torch.distributed store, with a prefix of its own for this job.
        rank: Of this process, 0 to size - 1.
        size: How many processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.met = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._over = threading.Event()
        store.set(f"beat/{rank}", "0")
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):  # the store has gone: the others hear that too
            while not self._over.wait(BEAT_S):
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))

    def meet(self) -> None:
        """Wait until all have come here.

        Raises:
            LostRankError: one of them never will, as of `await_key`.
        """
        self.met += 1
        key = f"meet/{self.met}"
        with _reachable():
            if self.store.add(key, 1) == self.size:
                self.store.set(f"{key}/go", "")
        self.await_key(f"{key}/go")
        if self.rank == 0 and self.met > 2:  # all have left the meeting before the last
            with _reachable():
                self.store.delete_key(f"meet/{self.met - 2}")
                self.store.delete_key(f"meet/{self.met - 2}/go")

    def await_key(self, key: str) -> None:
        """Wait until somebody sets a key in the store.

        Raises:
            LostRankError: a process died or failed, or the store is gone.
        """
        pause = 0.001
        with _reachable():
            while not self.store.check([key]):
                self._hear(0.0)
                time.sleep(pause)
                pause = min(1.5 * pause, 0.1)

    def look(self) -> None:
        """As `await_key`, without waiting, every few seconds at most."""
        with _reachable():
            self._hear(BEAT_S)

    def _hear(self, every: float) -> None:
        """Whether somebody failed; rank 0 hears all beats, the others hear rank 0's."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        if self.store.check(["failed"]):
            raise LostRankError("another process failed: it says why: run again", told=True)
        if now - self._looked < BEAT_S:
            return
        self._looked = now
        for rank in range(1, self.size) if self.rank == 0 else [0]:
            beat = self.store.get(f"beat/{rank}")
            last, since = self._heard.get(rank, (b"", now))
            if beat != last:
                self._heard[rank] = beat, now
            elif now - since > SILENCE_S:
                raise LostRankError(
                    f"process lost: rank {rank} of {self.size} has been silent for "
                    f"{now - since:.0f} s: see its own output, then run again with --resume"
                )

    def claim(self) -> bool:
        """Whether this process is the first that fails of itself."""
        try:
            return int(self.store.add("failures", 1)) == 1
        except RuntimeError:  # the store has gone with the process that held it
            return True

    def leave(self, *, failed: bool) -> None:
        """Stop beating; the process that holds the store goes last, so that all can hear of it."""
        self._over.set()
        with suppress(RuntimeError):
            if failed:
                self.store.set("failed", "")
            left = self.store.add("left", 1)
            until = time.monotonic() + PARTING_S
            held_here = self.rank == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
            while held_here and left < self.size and time.monotonic() < until:
                time.sleep(0.02)
                left = self.store.add("left", 0)
