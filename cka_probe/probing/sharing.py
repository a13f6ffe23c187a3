"""One estimator fed by several processes, which sync from time to time.

Rank 0 holds the estimator of the whole run. Between two syncs every process feeds an estimator of
its own batches (a shard); at a sync rank 0 merges all shards, in the order of the ranks. What it
then holds is what one process would hold after the same batches.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.estimator import Estimator, State, check_entries

__all__ = ["SharedEstimator"]

HELD_BYTES = 2**28  # of shards, over all processes, at which they sync


class SharedEstimator:
    """The estimator of a run whose batches are shared out.

    Args:
        whole: the estimator of the whole run, fresh; on ranks other than 0 it stays empty.
        ranks: the processes.
    """

    def __init__(self, whole: Estimator, ranks: Ranks) -> None:
        self.whole, self.ranks = whole, ranks
        self._shard = whole if ranks.size == 1 else whole.new_shard()
        self._ready = whole.ready
        self._sent = 0.0  # bytes of the last sync

    def update(self, key: Hashable, features: Tensor) -> None:
        """Take the features (b, d) of one entry in the open batch of this process."""
        self._shard.update(key, features)

    def end_batch(self, index: int) -> None:
        """End a batch of this process."""
        self._shard.end_batch(index)

    def begin(self) -> None:
        """Give the other processes what a saved state has fixed, once rank 0 has loaded it."""
        if self.ranks.size > 1:
            self._renew()

    def sync(self) -> None:
        """Merge all shards into rank 0's estimator; all processes call it after the same round.

        Raises:
            ValueError: the processes have different entries.
        """
        if self.ranks.size == 1:
            return
        states = self.ranks.gather(self._shard.state_dict())
        for state in states:
            self._merge(state)
        self._sent = float(sum(map(_bytes, states)))
        self._renew()

    def rounds_until_sync(self, done: int) -> int:
        """How many rounds may pass until the next sync, after `done` since the last one."""
        if self.ranks.size == 1:
            return 2**62
        if not self._ready:
            return 1
        return max(1, int(HELD_BYTES // max(1.0, self._sent / done)))

    def _merge(self, state: State) -> None:
        keys = state["keys"]
        if not keys:  # a process without a batch
            return
        check_entries(self.whole.keys, keys, -1)
        if self.whole.keys and keys != self.whole.keys:
            raise ValueError(
                "entries differ between processes: their order: use the same network on all"
            )
        shard = self.whole.new_shard()
        shard.load_state_dict(state)
        self.whole.merge(shard)

    def _renew(self) -> None:
        """An empty shard, with what rank 0's estimator has fixed so far."""
        fresh = self.whole.new_shard().state_dict() if self.ranks.first else None
        state, self._ready = self.ranks.agree((fresh, self.whole.ready))
        self._shard = self.whole.new_shard()
        self._shard.load_state_dict(state)


def _bytes(state: State) -> int:
    return sum(getattr(value, "nbytes", 0) for value in state.values())
