"""Whatever holds the images, numbered: folders, datasets and tensors, a subset, a fingerprint."""

import hashlib
import itertools
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from cka_probe.inputs import decode
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.views import seeded
from cka_probe.io import digest

__all__ = ["FEW", "MIN_IMAGES", "Named", "Source", "open_images", "order"]

MIN_IMAGES = 4  # unbiased HSIC divides by n (n - 3)
FEW = f"CKA needs at least {MIN_IMAGES}"
_SAMPLE = 16  # items of a dataset that its fingerprint reads
_SOURCES = "give a folder, a Dataset with a length, or an (n, c, h, w) float tensor"


class Named(NamedTuple):
    """Images with a name of their own, which a report tells instead of "tensor 8x3x32x32"."""

    name: str
    images: Any


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
        """Over relative paths and all bytes: some 50 us a file, where decoding takes 1 ms or more.

        A file that cannot be read counts as such.
        """
        sha = hashlib.sha256()
        for name in self.ids:
            content = b""
            with suppress(OSError):
                content = hashlib.sha256((self._root / name).read_bytes()).digest()
            sha.update(content + os.fsencode(name) + b"\0")
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
        self._kept: dict[int, Tensor] = {}  # read before the run, and used once
        for i in range(len(self)):
            with suppress(ImageError):
                self._kept[i], self.is_pixels = self._read(i)
                break
        else:
            raise ValueError(f"no image can be read: {len(self)} in {name}: check the dataset")

    def _read(self, i: int) -> tuple[Tensor, bool]:
        if isinstance(self._dataset, Tensor):  # checked as a whole, and nothing random inside
            return self._dataset[self._pick[i]], False
        with seeded(self._seed, self.ids[i]):
            return decode.read_item(self._dataset, self._pick[i], self.ids[i])

    def load(self, i: int) -> Tensor:
        """Read one item: (c, h, w) float, in its own dtype."""
        if i in self._kept:
            return self._kept.pop(i)
        image, is_pixels = self._read(i)
        if is_pixels != self.is_pixels:
            kinds = ("a float tensor", "pixels")
            found = f"{self.ids[i]!r} is {kinds[is_pixels]}, the first {kinds[self.is_pixels]}"
            raise TypeError(f"items of two kinds: {found}: return one kind")
        return image

    def fingerprint(self) -> str:
        """Over name, indices and a sample: a change to other items of a dataset goes unnoticed.

        The sample is 16 items spread over the set by the seed, the first and the last among them,
        each read once for this and the run. A tensor's is everything, which costs no decoding.
        """
        sha = hashlib.sha256(f"{self.name} {self.ids}".encode())
        if isinstance(self._dataset, Tensor):
            for k in self._pick:
                sha.update(digest(self._dataset[k]).encode())
            return sha.hexdigest()
        for i in _sample(len(self), self._seed):
            seen = "unreadable"
            with suppress(ImageError):
                self._kept[i] = self.load(i)
                seen = digest(self._kept[i])
            sha.update(f" {i} {seen}".encode())
        return sha.hexdigest()


def _sample(n: int, seed: int) -> list[int]:
    """Up to 16 of n places: the first, the last, and one in each of 14 equal parts between."""
    if n <= _SAMPLE:
        return list(range(n))
    draw = random.Random(seed)
    edges = [1 + k * (n - 2) // (_SAMPLE - 2) for k in range(_SAMPLE - 1)]
    return [0, *(draw.randrange(a, b) for a, b in itertools.pairwise(edges)), n - 1]


def open_images(images: Any, *, n_images: int | None = None, seed: int = 0) -> Source:
    """Open whatever holds the images.

    Args:
        images: A folder, nested or flat; a torchvision dataset or anything else with `len` and
            integer indices; or an (n, c, h, w) float tensor; `Named` gives these a name.
        n_images: A seeded random subset of so many; a larger one with the same seed contains it.
            None takes all.
        seed: For the subset, and for random transforms inside a dataset.

    Returns:
        The source. Datasets are asked for their first item at once, to learn what it is.

    Raises:
        TypeError: Not something that holds images, or integer tensors.
        ValueError: A missing, empty or too small source, or more images asked for than there are.
    """
    if isinstance(images, Named):
        source = open_images(images.images, n_images=n_images, seed=seed)
        source.name = images.name
        return source
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
        raise ValueError(f"too few images: {n} in {what!r}: {FEW}")
    if wanted < MIN_IMAGES:
        raise ValueError(f"n_images is too small: {wanted}: {FEW}")
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
