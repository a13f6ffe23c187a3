"""The loop: batches through every view into one estimator; shared out, saved, resumed."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from torch import nn

from cka_probe.activations.layers import Layers
from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.estimator import Estimator
from cka_probe.inputs.batches import Batch, Source, iterate_batches
from cka_probe.inputs.views import Transform
from cka_probe.io import remove_partial_files
from cka_probe.probing.forward import ForwardResults, Forwards
from cka_probe.probing.options import ProbeOptions
from cka_probe.probing.sharing import SharedEstimator
from cka_probe.probing.state import Bad, Saver, save_every_s
from cka_probe.progress import progress_bar


class Loop:
    """All batches of a run, once.

    With N processes, round k is batches start + k N .. start + k N + N - 1, one a process. The
    processes sync after the first round and then about as often as the state is saved.

    Args:
        estimator: the estimator of the whole run, fresh.
        source: the images.
        plan: the batches, as `plan` cuts them.
        options: the run's fingerprint.
        folder: folder of the saved state; None saves nothing.
        ranks: the processes that share the run.

    Attributes:
        start: the first batch that was done here; those before were in the saved state.
        left_out: after `run`, names of images, on rank 0.
        too_few: the readable images among them, from batches with fewer than 4 readable ones.
    """

    def __init__(
        self, estimator: Estimator, source: Source, plan: list[slice], *, options: dict[str, Any],
        folder: Path | None, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.estimator, self.source, self.plan, self.ranks = estimator, source, plan, ranks
        self.shared = SharedEstimator(estimator, ranks)
        self.saver = Saver(folder if ranks.first else None, options)
        self.folder = folder
        self.start = 0
        self.bad: Bad = []
        self._new_bad: Bad = []
        self._images = 0  # of this process, since the last sync

    @property
    def left_out(self) -> list[str]:
        """Names of the images that were left out, in the order of the batches."""
        return [name for _, *both in sorted(self.bad) for names in both for name in names]

    @property
    def too_few(self) -> list[str]:
        """The readable images among them."""
        return [name for *_, readable in sorted(self.bad) for name in readable]

    def run(
        self, models: Mapping[str, nn.Module], transforms: Mapping[str, Transform],
        options: ProbeOptions, *, layers: Mapping[str, Layers], progress: bool,
        say: Callable[[str], None] | None, announce: Callable[[], None],
    ) -> ForwardResults:  # fmt: skip
        """Make every forward that is still to do.

        Returns:
            What the forwards showed about the networks.

        Raises:
            ValueError: a saved state that is damaged or of another run; no image can be read;
                what `Forwards` raises.
            LostRankError: another process died or failed.
        """
        with ExitStack() as stack:
            forwards = Forwards(
                models, self.shared, stack, layers=layers, reduce=options.reduce,
                layout=options.layout,
                device=options.device, amp=options.amp, hint=options.size_hint,
            )  # fmt: skip
            announce()  # layers and devices are known to be good
            self._prepare(resume=options.resume, say=say)
            bar = stack.enter_context(
                progress_bar(
                    len(self.source), desc="probe", unit="image",
                    initial=self._images_before(self.start),
                    show=progress and self.ranks.first,
                )
            )  # fmt: skip
            mine = range(self.start + self.ranks.rank, len(self.plan), self.ranks.size)
            stream: Iterator[Batch] = iter(())
            if mine:
                stream = stack.enter_context(
                    closing(
                        iterate_batches(
                            self.source, transforms, batch_size=options.batch_size,
                            seed=options.seed, workers=options.workers, skip_bad=options.skip_bad,
                            start=mine.start, step=mine.step,
                        )
                    )
                )  # fmt: skip
            self._run_rounds(forwards, stream, bar)
            bar.leave = True
            results = ForwardResults.merge(
                self.ranks.gather(forwards.results()) or [forwards.results()]
            )
        if self.ranks.first and not results.tables:
            raise ValueError(f"no readable images: {len(self.left_out)} left out: check the files")
        return results

    def _prepare(self, *, resume: bool, say: Callable[[str], None] | None) -> None:
        """Make the folder, and load the saved state if the run is resumed."""
        if self.folder is not None and self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder)
            if resume:
                self.start, self.bad = self.saver.load(self.estimator) or (0, [])
        self.start = self.ranks.agree(self.start)
        self.shared.begin()
        if resume and say is not None:
            count = len(self.plan)
            say(
                f"resumed from batch {self.start} of {count}"
                if self.start
                else f"nothing to resume: no saved state: starts from batch 0 of {count}"
            )

    def _run_rounds(self, forwards: Forwards, stream: Iterator[Batch], bar: Any) -> None:
        size, following, complete = self.ranks.size, self.start, True
        count = -(-(len(self.plan) - self.start) // size)
        due, synced, began = 1, 0, time.perf_counter()
        try:
            for k in range(1, count + 1):
                batch = next(stream, None)
                if batch is not None and batch.views:
                    forwards.run_batch(batch, bar)
                complete = False  # an interruption from here on leaves half a batch in the sums
                if batch is not None:
                    self._end_batch(forwards, batch, bar)
                following = min(len(self.plan), self.start + k * size)
                complete = True
                if size > 1 and k == due and k < count:
                    self._sync(bar)
                    due = k + self.ranks.agree(self._rounds_until_sync(k - synced, began))
                    synced, began = k, time.perf_counter()
                if following < len(self.plan) and (size == 1 or synced == k) and self.saver.due():
                    self.saver.save(self.estimator, following, self.bad)
            if size > 1:
                self._sync(bar)
        except KeyboardInterrupt:
            if complete and size == 1 and self.start < following < len(self.plan):
                self.saver.save(self.estimator, following, self.bad)
            raise

    def _end_batch(self, forwards: Forwards, batch: Batch, bar: Any) -> None:
        """End a batch in the estimator, and note the images that were left out."""
        if batch.views:
            forwards.end_batch(batch.index)
        bad = self.bad if self.ranks.size == 1 else self._new_bad
        bad.append((batch.index, batch.bad, batch.left_out))
        self._images += len(batch.ids)
        bar.update(len(batch.ids))

    def _sync(self, bar: Any) -> None:
        """Merge what all processes did since the last sync into rank 0's estimator."""
        done = self.ranks.gather((self._new_bad, self._images))
        self.shared.sync()
        for rank, (bad, images) in enumerate(done):
            self.bad += bad
            if rank:
                bar.update(images)
        self._new_bad, self._images = [], 0

    def _rounds_until_sync(self, done: int, began: float) -> int:
        """Rounds until the next sync: as many as fit between two saved states."""
        seconds = max(1e-6, (time.perf_counter() - began) / done)
        rounds = int(save_every_s() / seconds)
        return max(1, min(rounds, self.shared.rounds_until_sync(done)))

    def _images_before(self, batch: int) -> int:
        return sum(rows.stop - rows.start for rows in self.plan[:batch])
