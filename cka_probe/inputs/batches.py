"""Paired batches: every view of an image is in the same batch, at the same row.

Order, subset and random transforms depend on the seed alone, never on workers, and the global
random state is left as it was.
"""

import signal
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cka_probe.errors import RunFailedError, one_line
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.source import FEW, MIN_IMAGES, Source, open_images, order
from cka_probe.inputs.views import Transform, apply_view, stack
from cka_probe.io import digest

__all__ = [
    "MIN_IMAGES",
    "Batch",
    "ImageError",
    "Source",
    "digest",
    "from_workers",
    "iterate_batches",
    "open_images",
    "order",
    "plan",
]


def plan(n: int, batch_size: int) -> list[slice]:
    """Cut n images into batches; a tail of fewer than 4 joins the batch before it.

    Args:
        n: number of images.
        batch_size: images per batch.

    Returns:
        One slice of the order per batch, each of 4 images or more.

    Raises:
        ValueError: fewer than 4 images, or batches of fewer than 4.
    """
    for what, count in (("too few images", n), ("batch_size is too small", batch_size)):
        if count < MIN_IMAGES:
            raise ValueError(f"{what}: {count}: {FEW}")
    starts = list(range(0, n, batch_size))
    if n - starts[-1] < MIN_IMAGES:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]


@dataclass(frozen=True)
class Batch:
    """All views of the same images, row by row.

    If `skip_bad` leaves fewer than 4 readable images, `views` and `ids` are empty and the readable
    ones are named in `left_out`: moving them would change the batches that follow.

    Attributes:
        index: index in the plan; batch k holds `order[plan[k]]`.
        ids: names of the images, b of them.
        views: {view name: (b, c, h, w)}.
        bad: images that could not be read.
        left_out: readable images of a batch that was dropped.
    """

    index: int
    ids: list[str]
    views: dict[str, Tensor]
    bad: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """Batch k by number: the unit of work of a worker."""

    source: Source
    transforms: dict[str, Transform]
    seed: int
    skip_bad: bool
    rows: list[list[int]]

    def build(self, k: int) -> Batch:
        """Decode each image once, apply every view to it, stack."""
        views: dict[str, list[Tensor]] = {view: [] for view in self.transforms}
        ids, bad = list[str](), list[str]()
        for i in self.rows[k]:
            label = self.source.ids[i]
            try:
                image = self.source.load(i)
            except ImageError:
                if not self.skip_bad:
                    raise
                bad.append(label)
                continue
            ids.append(label)
            for view, transform in self.transforms.items():
                views[view].append(apply_view(transform, image, self.seed, label, view))
        if len(ids) < MIN_IMAGES:
            return Batch(k, [], {}, bad, ids)
        return Batch(k, ids, {view: stack(view, views[view], ids) for view in views}, bad)

    def __getitem__(self, k: int) -> Batch | Exception:
        """In a worker: our errors travel as values, without a traceback in their message."""
        try:
            return self.build(k)
        except (TypeError, ValueError) as error:
            kinds = (ImageError, TypeError, ValueError)
            return next(kind for kind in kinds if isinstance(error, kind))(str(error))


def iterate_batches(
    source: Source,
    transforms: Mapping[str, Transform],
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    skip_bad: bool = False,
    start: int = 0,
    stop: int | None = None,
    step: int = 1,
) -> Generator[Batch, None, None]:
    """Yield batches start, start + step, ... of the plan; the same values whatever `workers` is.

    Args:
        source: the images, from `open_images`.
        transforms: {view name: transform}, from `scale_transforms` or `view_transforms`.
        batch_size: images per batch, 4 or more.
        seed: seed of the order, and of random transforms: they draw from (seed, image, view).
        workers: number of processes that decode; 0 decodes in this one.
        skip_bad: whether to leave out images that cannot be read, instead of stopping.
        start: first batch; rank r of N takes start=r, step=N.
        stop: the batch to stop before; None goes to the end.
        step: distance between batches.

    Returns:
        A generator of `Batch`; close it if you leave early, which ends the workers.

    Raises:
        ImageError: an image cannot be read and `skip_bad` is off.
        RuntimeError: workers died, or the transforms cannot be sent to them.
        TypeError: a transform returned no tensor.
        ValueError: too few images, bad numbers, or images of different sizes in one view.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"bad number of workers: {workers!r}: give 0 or more")
    shuffled = order(len(source), seed)
    rows = [shuffled[part] for part in plan(len(source), batch_size)]
    work = _Batches(source, dict(transforms), seed, skip_bad, rows)
    chosen = range(len(rows))[start:stop:step]
    return from_workers(work, chosen, workers) if workers else (work.build(k) for k in chosen)


def from_workers(work: Dataset[Any], chosen: range, workers: int) -> Generator[Any, None, None]:
    """work[k] for each chosen k, in that order, from other processes; errors come as values."""
    processes: Any = None
    try:
        with warnings.catch_warnings():  # fork beside threads, more workers than cores: as asked
            warnings.simplefilter("ignore")
            processes = iter(
                DataLoader(
                    work,
                    batch_size=None,
                    sampler=chosen,
                    num_workers=workers,
                    worker_init_fn=_ignore_interrupts,
                    generator=torch.Generator().manual_seed(0),  # else it draws from the global
                )
            )
        for batch in processes:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except (RuntimeError, AttributeError, PicklingError, OSError) as error:  # died, or unsendable
        text = f"{workers}: {one_line(error)}; use fewer, or workers=0 (--workers 0)"
        raise RunFailedError(f"image workers failed: {text}") from error
    finally:
        if processes is not None:
            processes._shutdown_workers()


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the parent, which ends its workers; they print nothing of their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
