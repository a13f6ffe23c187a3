"""Image sources: folders, datasets and tensors as numbered images, with a subset and a fingerprint.

Both packages read images through here; what labels add is in `msun.data.labelled`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from cka_probe.errors import first_names
from cka_probe.inputs import decode
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.folders import list_folder
from cka_probe.io import digest
from cka_probe.progress import progress_bar
from cka_probe.rng import seeded

__all__ = [
    "FEW",
    "MIN_IMAGES",
    "Files",
    "Items",
    "Named",
    "Source",
    "check_numbered",
    "open_images",
    "order",
    "stacked_name",
]

MIN_IMAGES = 4  # unbiased HSIC divides by n (n - 3)
FEW = f"CKA needs at least {MIN_IMAGES}"
_SAMPLE = 16  # items of a dataset that its fingerprint reads
_SOURCES = "give a folder, a Dataset with a length, or an (n, c, h, w) float tensor"


class Named(NamedTuple):
    """Images with a name of their own, for the report, in place of "tensor 8x3x32x32"."""

    name: str
    images: Any


class Source(ABC):
    """Numbered images.

    Attributes:
        name: base name, class name or "tensor 8x3x32x32"; never an absolute path.
        ids: the name of each image in messages: a relative POSIX path, or its index as text.
        is_pixels: True for RGB in 0..1, to be normalised; False for tensors, used as they are.
        skipped: which files of a folder were not read, in one line; empty where all were.
        channels: of pixels: 3, or 1 for a network that takes grey images (see `use_channels`).
    """

    name: str
    ids: list[str]
    is_pixels: bool
    skipped: str = ""
    channels: int = 3

    def use_channels(self, channels: int | None) -> None:
        """Convert pixels from now on to the channels that a network takes.

        Args:
            channels: 1 for grey; 3, and all others, for RGB, which a network that takes another
                number refuses by itself.
        """
        self.channels = 1 if channels == 1 else 3

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    @abstractmethod
    def load(self, i: int, epoch: int | None = None) -> Tensor:
        """Image `i` as (c, h, w) float.

        Args:
            i: which image, 0 to len - 1.
            epoch: random transforms inside a dataset draw from (seed, image, epoch); None outside
                of training.

        Raises:
            ImageError: it cannot be read.
        """

    def preview(self, i: int) -> Tensor:
        """Image `i` before the run: what is read here is not read again."""
        return self.load(i)

    @abstractmethod
    def listing(self) -> str:
        """A cheap SHA-256 that changes with which images there are, and with their sizes."""

    @abstractmethod
    def fingerprint(self, *, progress: bool = False) -> str:
        """A SHA-256 that changes with the content of the images, so that a resumed run notices.

        Args:
            progress: whether to show a progress bar where files are read.
        """


class Files(Source):
    """Image files under one folder, sorted by relative POSIX path.

    Args:
        root: the folder.
        n_images: size of a seeded random subset; None takes all.
        seed: seed of the subset.
        least: the fewest images that will do.
    """

    is_pixels = True

    def __init__(
        self, root: Path, n_images: int | None, seed: int, least: int = MIN_IMAGES
    ) -> None:
        found = list_folder(root)
        ids, self.skipped = found.images, found.skipped()
        if unread := found.unread_images():
            names = first_names([repr(name) for name in unread], 1)
            warnings.warn(
                f"images left out: {names} in {str(root)!r}: Pillow does not read that "
                "kind here: convert them, or register a plugin such as pillow-heif",
                stacklevel=2,
            )
        self.root = root
        self.name = (root if root.name not in ("", "..") else root.resolve()).name or root.anchor
        self.ids = [ids[k] for k in subset(len(ids), n_images, seed, str(root), least)]

    def load(self, i: int, epoch: int | None = None) -> Tensor:
        """Decode one file: (3, h, w) float32 in 0..1."""
        del epoch  # nothing random here
        image = decode.decode_image(self.root / self.ids[i], self.ids[i])
        return decode.as_channels(image, self.channels)

    def listing(self) -> str:
        """Over relative paths and sizes; -1 for a file that has gone."""
        sha = hashlib.sha256()
        for name in self.ids:
            size = -1
            with suppress(OSError):
                size = (self.root / name).stat().st_size
            sha.update(f"{size}\0".encode() + os.fsencode(name) + b"\0")
        return sha.hexdigest()

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over relative paths and all bytes; a file that cannot be read counts as such.

        It takes some 50 us a file once the files are in the system's cache, where decoding one
        takes 1 ms or more.
        """
        sha = hashlib.sha256()
        with progress_bar(len(self), desc="hash", unit="file", show=progress) as bar:
            for name in self.ids:
                content = b""
                with suppress(OSError):
                    content = hashlib.sha256((self.root / name).read_bytes()).digest()
                sha.update(content + os.fsencode(name) + b"\0")
                bar.update()
        return sha.hexdigest()


class Items(Source):
    """A map-style dataset, or a tensor as one; random transforms inside draw from (seed, id).

    Args:
        dataset: anything with `len` and integer indices.
        name: its name.
        n_images: size of a seeded random subset; None takes all.
        seed: seed of the subset and of random transforms.
        least: the fewest images that will do.

    Attributes:
        indices: the dataset's own index of each image.
    """

    def __init__(
        self, dataset: Any, name: str, n_images: int | None, seed: int, least: int = MIN_IMAGES
    ) -> None:
        self.name, self.dataset, self._seed = name, dataset, seed
        try:
            n = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(f"dataset without a length: {name}: {_SOURCES}") from error
        self.indices = subset(n, n_images, seed, name, least)
        self.ids = [str(k) for k in self.indices]
        self._kept: dict[int, Any] = {}  # items read before the run, each used once
        for i in range(len(self)):
            with suppress(ImageError):
                item = self.item(i)
                _, self.is_pixels = decode.from_item(item, self.ids[i])
                self._kept[i] = item
                break
        else:
            raise ValueError(f"no image can be read: {len(self)} in {name}: check the dataset")

    def item(self, i: int, epoch: int | None = None) -> Any:
        """What the dataset returns for image `i`, its random numbers seeded.

        Raises:
            ImageError: the dataset met a file that is missing or broken.
            ValueError: the dataset raised something else.
        """
        if epoch is None and i in self._kept:
            return self._kept.pop(i)
        if isinstance(self.dataset, Tensor):  # nothing random inside
            return self.dataset[self.indices[i]]
        key = (self._seed, self.ids[i], *(() if epoch is None else (epoch,)))
        with seeded(*key):
            return decode.fetch(self.dataset, self.indices[i], self.ids[i])

    def image(self, i: int, item: Any) -> Tensor:
        """The image in an item, (c, h, w) float, in its own dtype.

        Raises:
            TypeError: no image, or one of another kind than the first.
        """
        image, is_pixels = decode.from_item(item, self.ids[i])
        if is_pixels != self.is_pixels:
            kinds = ("a float tensor", "pixels")
            found = f"{self.ids[i]!r} is {kinds[is_pixels]}, the first {kinds[self.is_pixels]}"
            raise TypeError(f"items of two kinds: {found}: return one kind")
        return decode.as_channels(image, self.channels) if is_pixels else image

    def load(self, i: int, epoch: int | None = None) -> Tensor:
        """Read one item: (c, h, w) float, in its own dtype."""
        return self.image(i, self.item(i, epoch))

    def peek(self, i: int) -> Any:
        """An item before the run, which is kept for it."""
        item = self.item(i)
        self._kept[i] = item
        return item

    def preview(self, i: int) -> Tensor:
        """An image before the run; its item is kept for it."""
        return self.image(i, self.peek(i))

    def listing(self) -> str:
        """Over name and indices."""
        return hashlib.sha256(f"{self.name} {self.ids}".encode()).hexdigest()

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over name, indices and a sample: a change to other items of a dataset is not noticed.

        The sample is 16 items spread over the set by the seed, the first and the last among them,
        each read once for this and the run. Of a tensor everything counts.
        """
        del progress  # it takes as long as 16 images
        sha = hashlib.sha256(f"{self.name} {self.ids}".encode())
        if isinstance(self.dataset, Tensor):
            for k in self.indices:
                sha.update(digest(self.dataset[k]).encode())
            return sha.hexdigest()
        for i in _sample(len(self), self._seed):
            seen = "unreadable"
            with suppress(ImageError):
                seen = digest(self.preview(i))
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
    """Open a source of images.

    Args:
        images: a folder, nested or flat; a torchvision dataset or anything else with `len` and
            integer indices; an (n, c, h, w) float tensor; or one of these with a name (`Named`).
        n_images: size of a seeded random subset; a larger one with the same seed contains it. None
            takes all.
        seed: seed of the subset, and of random transforms inside a dataset.

    Returns:
        The source. Datasets are asked for their first item at once, to learn what it is.

    Raises:
        TypeError: something that holds no images, or integer tensors.
        ValueError: a missing, empty or too small source, or a subset larger than the source.
    """
    if isinstance(images, Named):
        source = open_images(images.images, n_images=n_images, seed=seed)
        source.name = images.name
        return source
    if isinstance(images, str | os.PathLike):
        return Files(Path(images).expanduser(), n_images, seed)
    if isinstance(images, Tensor):
        name = stacked_name(images)
        return Items(images.detach().as_subclass(Tensor).cpu(), name, n_images, seed)
    check_numbered(images, "images cannot be numbered", _SOURCES)
    return Items(images, type(images).__name__, n_images, seed)


def check_numbered(data: Any, what: str, hint: str) -> None:
    """Raise TypeError unless data is a map-style dataset."""
    streams = isinstance(data, IterableDataset | Mapping)
    if streams or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(f"{what}: {type(data).__name__}: {hint}")


def stacked_name(images: Tensor) -> str:
    """The name of a tensor of images, which is checked."""
    name = f"tensor {'x'.join(map(str, images.shape))}"
    decode.float_images(images, name, "(n, c, h, w)")
    return name


def subset(n: int, n_images: int | None, seed: int, what: str, least: int) -> Sequence[int]:
    """Which of n images to take, ascending; a larger subset contains a smaller one.

    Raises:
        ValueError: fewer than `least`, or more than there are.
    """
    wanted = n if n_images is None else n_images
    hint = FEW if least == MIN_IMAGES else f"give at least {least}"
    if n < least:
        raise ValueError(f"too few images: {n} in {what!r}: {hint}")
    if wanted < least:
        raise ValueError(f"n_images is too small: {wanted}: {hint}")
    if wanted > n:
        counts = f"{wanted} of the {n} in {what!r}"
        raise ValueError(f"more images asked for than there are: {counts}: ask for at most {n}")
    return sorted(order(n, seed)[:wanted])


def order(n: int, seed: int) -> list[int]:
    """The order in which images are visited: minibatch CKA of sorted classes is biased.

    Args:
        n: number of images.
        seed: seed of the shuffle.

    Returns:
        A permutation of 0..n-1.
    """
    return list(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())
