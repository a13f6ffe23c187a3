"""Images in, paired batches out: every view of an image stands in the same batch, at the same row.

Sources are folders, datasets and tensors. Order, subset and random transforms depend on the seed
alone, never on workers, and the global random state is left as it was.
"""

import hashlib
import os
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cka_probe import decode
from cka_probe.decode import ImageError, one_line
from cka_probe.views import Transform, look, seeded, stack

__all__ = ["MIN_IMAGES", "Batch", "ImageError", "Source", "batches", "open_images", "order", "plan"]

MIN_IMAGES = 4  # unbiased HSIC divides by n (n - 3)
_FEW = f"CKA needs at least {MIN_IMAGES}"
_SOURCES = "give a folder, a Dataset with a length, or an (n, c, h, w) float tensor"


class Source(ABC):
    """Numbered images: what the rest of the package sees of a folder, a dataset or a tensor.

    Attributes:
        name: Base name, class name or "tensor 8x3x32x32"; never an absolute path.
        ids: How messages name each image: a relative POSIX path, or its index as text.
        is_pixels: True: RGB in 0..1, to be normalised. False: tensors, used as they are.
    """

    name: str
    ids: list[str]
    is_pixels: bool

    def __len__(self) -> int:
        """How many images."""
        return len(self.ids)

    @abstractmethod
    def load(self, i: int) -> Tensor:
        """Image `i` as (c, h, w) float; raises `ImageError` where it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 that changes with the images, so that a resumed run notices."""


class _Folder(Source):
    """Image files under one folder, sorted by relative POSIX path."""

    is_pixels = True

    def __init__(self, root: Path, n_images: int | None, seed: int) -> None:
        ids = decode.image_files(root)
        self._root = root
        self.name = (root if root.name not in ("", "..") else root.resolve()).name or root.anchor
        self.ids = [ids[k] for k in _subset(len(ids), n_images, seed, str(root))]

    def load(self, i: int) -> Tensor:
        """Decode one file: (3, h, w) float32 in 0..1."""
        return decode.decode(self._root / self.ids[i], self.ids[i])

    def fingerprint(self) -> str:
        """Over relative paths and file sizes; -1 for a file that has gone."""
        sha = hashlib.sha256()
        for name in self.ids:
            size = -1
            with suppress(OSError):
                size = (self._root / name).stat().st_size
            sha.update(f"{size}\0".encode() + os.fsencode(name) + b"\0")
        return sha.hexdigest()


class _Items(Source):
    """A map-style dataset, or a tensor as one; random transforms inside draw from (seed, id)."""

    def __init__(self, dataset: Any, name: str, n_images: int | None, seed: int) -> None:
        self.name, self._dataset, self._seed = name, dataset, seed
        try:
            n = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(f"dataset without a length: {name}: {_SOURCES}") from error
        self._pick = _subset(n, n_images, seed, name)
        self.ids = [str(k) for k in self._pick]
        self._first: dict[int, Tensor] = {}  # read to learn what the items are, and used once
        for i in range(len(self)):
            with suppress(ImageError):
                self._first[i], self.is_pixels = self._read(i)
                break
        else:
            raise ValueError(f"no image can be read: {len(self)} in {name}: check the dataset")
        self._seen = digest(self._first[i])

    def _read(self, i: int) -> tuple[Tensor, bool]:
        if isinstance(self._dataset, Tensor):  # checked as a whole, and nothing random inside
            return self._dataset[self._pick[i]], False
        with seeded(self._seed, self.ids[i]):
            return decode.read_item(self._dataset, self._pick[i], self.ids[i])

    def load(self, i: int) -> Tensor:
        """Read one item: (c, h, w) float, in its own dtype."""
        if i in self._first:
            return self._first.pop(i)
        image, is_pixels = self._read(i)
        if is_pixels != self.is_pixels:
            kinds = ("a float tensor", "pixels")
            found = f"{self.ids[i]!r} is {kinds[is_pixels]}, the first {kinds[self.is_pixels]}"
            raise TypeError(f"items of two kinds: {found}: return one kind")
        return image

    def fingerprint(self) -> str:
        """Over name, indices and the first image; a tensor's over all, which costs no decoding."""
        text = f"{self.name} {self.ids} {self._seen}"
        if isinstance(self._dataset, Tensor):
            text += "".join(digest(self._dataset[k]) for k in self._pick)
        return hashlib.sha256(text.encode()).hexdigest()


def digest(image: Tensor) -> str:
    """SHA-256 over dtype, shape and content."""
    sha = hashlib.sha256(f"{image.dtype} {tuple(image.shape)}".encode())
    sha.update(image.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def open_images(images: Any, *, n_images: int | None = None, seed: int = 0) -> Source:
    """Open whatever holds the images.

    Args:
        images: A folder, nested or flat; a torchvision dataset or anything else with `len` and
            integer indices; or an (n, c, h, w) float tensor.
        n_images: A seeded random subset of so many; a larger one with the same seed contains it.
            None takes all.
        seed: For the subset, and for random transforms inside a dataset.

    Returns:
        The source. Datasets are asked for their first item at once, to learn what it is.

    Raises:
        TypeError: Not something that holds images, or integer tensors.
        ValueError: A missing, empty or too small source, or more images asked for than there are.
    """
    if isinstance(images, str | os.PathLike):
        return _Folder(Path(images).expanduser(), n_images, seed)
    kind = type(images).__name__
    if isinstance(images, Tensor):
        kind = f"tensor {'x'.join(str(size) for size in images.shape)}"
        decode.float_images(images, kind, "(n, c, h, w)")
        return _Items(images.detach().as_subclass(Tensor).cpu(), kind, n_images, seed)
    streams = isinstance(images, IterableDataset | Mapping)
    if streams or not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
        raise TypeError(f"images cannot be numbered: {kind}: {_SOURCES}")
    return _Items(images, kind, n_images, seed)


def _subset(n: int, n_images: int | None, seed: int, what: str) -> list[int]:
    """Which of n images to take, ascending."""
    wanted = n if n_images is None else n_images
    if n < MIN_IMAGES:
        raise ValueError(f"too few images: {n} in {what!r}: {_FEW}")
    if wanted < MIN_IMAGES:
        raise ValueError(f"n_images is too small: {wanted}: {_FEW}")
    if wanted > n:
        counts = f"{wanted} of the {n} in {what!r}"
        raise ValueError(f"more images asked for than there are: {counts}: ask for at most {n}")
    return sorted(order(n, seed)[:wanted])


def order(n: int, seed: int) -> list[int]:
    """The order in which images are visited: minibatch CKA of sorted classes is biased.

    Args:
        n: How many images.
        seed: Of the shuffle.

    Returns:
        A permutation of 0..n-1.
    """
    return list(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())


def plan(n: int, batch_size: int) -> list[slice]:
    """Cut n images into batches; a tail of fewer than 4 joins the batch before it.

    Args:
        n: How many images.
        batch_size: Images a batch.

    Returns:
        One slice of the order per batch, each of 4 images or more.

    Raises:
        ValueError: Fewer than 4 images, or batches of fewer than 4.
    """
    for what, count in (("too few images", n), ("batch_size is too small", batch_size)):
        if count < MIN_IMAGES:
            raise ValueError(f"{what}: {count}: {_FEW}")
    starts = list(range(0, n, batch_size))
    if n - starts[-1] < MIN_IMAGES:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]


@dataclass(frozen=True)
class Batch:
    """All views of the same images, row by row.

    Where `skip_bad` leaves fewer than 4 readable images, `views` and `ids` are empty and the
    readable ones are named in `left_out`: moving them would change the batches that follow.

    Attributes:
        index: Place in the plan; batch k holds `order[plan[k]]`.
        ids: The images, b of them.
        views: {view name: (b, c, h, w)}.
        bad: Images that could not be read.
        left_out: Images that could be read, in a batch that was dropped.
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
        """Decode each image once, look at it through every view, stack."""
        looks: dict[str, list[Tensor]] = {view: [] for view in self.transforms}
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
                looks[view].append(look(transform, image, self.seed, label, view))
        if len(ids) < MIN_IMAGES:
            return Batch(k, [], {}, bad, ids)
        return Batch(k, ids, {view: stack(view, looks[view], ids) for view in looks}, bad)

    def __getitem__(self, k: int) -> Batch | Exception:
        """In a worker: our errors travel as values, without a traceback in their message."""
        try:
            return self.build(k)
        except (TypeError, ValueError) as error:
            kinds = (ImageError, TypeError, ValueError)
            return next(kind for kind in kinds if isinstance(error, kind))(str(error))


def batches(
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
        source: From `open_images`.
        transforms: {view name: transform}, from `scale_transforms` or `view_transforms`.
        batch_size: Images a batch, 4 or more.
        seed: Of the order, and of random transforms: they draw from (seed, image, view).
        workers: Processes that decode; 0 decodes here.
        skip_bad: Leave out images that cannot be read, and name them, instead of stopping.
        start: First batch; rank r of N takes start=r, step=N.
        stop: The batch to stop before; None goes to the end.
        step: Distance between batches.

    Returns:
        A generator of `Batch`; where you leave early, close it: that ends the workers.

    Raises:
        ImageError: An image cannot be read and `skip_bad` is off.
        RuntimeError: Workers died, or the transforms cannot be sent to them.
        TypeError: A transform returned no tensor.
        ValueError: Too few images, bad numbers, or images of different sizes in one view.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"bad number of workers: {workers!r}: give 0 or more")
    shuffled = order(len(source), seed)
    rows = [shuffled[part] for part in plan(len(source), batch_size)]
    work = _Batches(source, dict(transforms), seed, skip_bad, rows)
    chosen = range(len(rows))[start:stop:step]
    return from_workers(work, chosen, workers) if workers else (work.build(k) for k in chosen)


def from_workers(work: Dataset[Any], chosen: range, workers: int) -> Generator[Any, None, None]:
    """work[k] for each k chosen, in that order, made in other processes; errors come as values."""
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
        raise RuntimeError(f"image workers failed: {text}") from error
    finally:
        if processes is not None:
            processes._shutdown_workers()


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the parent, which ends its workers; they print nothing of their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
