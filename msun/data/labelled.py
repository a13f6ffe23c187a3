"""Labelled images in: a folder of class folders, the glyphs, a dataset or a pair of tensors."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from cka_probe.inputs import decode, glyphs
from cka_probe.inputs.batches import digest, order
from cka_probe.inputs.views import seeded
from cka_probe.models.load import IMAGENET

__all__ = ["Labelled", "open_labelled"]

_SOURCES = "give a folder of class folders, 'glyphs', a Dataset with a length, or two tensors"
_ITEM = "return (image, label), or a mapping with 'image' and 'label'"
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_GLYPHS = {"train": 20000, "test": 10000}


class Labelled(ABC):
    """Numbered images with labels.

    Attributes:
        name: Base name, class name or "tensor 8x3x32x32"; never an absolute path.
        classes: Names of the classes; a label is a place in it.
        is_pixels: True: RGB in 0..1, to be normalised. False: tensors, used as they are.
        mean: Channel means to normalise with where nothing else is stated; None for tensors.
        std: Channel standard deviations, likewise.
    """

    name: str
    classes: tuple[str, ...]
    is_pixels: bool

    @property
    def mean(self) -> tuple[float, ...] | None:
        """ImageNet's for pixels, none for tensors."""
        return tuple(IMAGENET["mean"]) if self.is_pixels else None

    @property
    def std(self) -> tuple[float, ...] | None:
        """ImageNet's for pixels, none for tensors."""
        return tuple(IMAGENET["std"]) if self.is_pixels else None

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Image `i` as (c, h, w) float32, and its label.

        Args:
            i: Which, 0 to len - 1.
            epoch: Random transforms inside a dataset draw from (seed, image, epoch).

        Raises:
            ImageError: It cannot be read.
            ValueError: Its label is none of the classes.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 that changes with the images and labels, so that a resumed run notices."""

    def stacked(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Several images at once where they lie in memory in one size, else None.

        Args:
            rows: Which images, b of them.

        Returns:
            (images (b, c, h, w) float32, labels (b,) int64), equal to what `load` gives.
        """
        return None

    def _checked(self, label: Any, name: str) -> int:
        """The label as an int; refuses what is no place in `classes`."""
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if isinstance(label, float | str) or not 0 <= number < len(self.classes):
            text = f"{label!r:.40} of item {name!r} in {self.name!r}"
            raise ValueError(f"bad label: {text}: give 0 to {len(self.classes) - 1}")
        return number


class _Folder(Labelled):
    """Image files under one sub-folder per class, classes in alphabetical order.

    A class folder without images is a class all the same, so that the labels of two splits agree.
    """

    is_pixels = True

    def __init__(self, root: Path, split: str | None, n_images: int | None, seed: int) -> None:
        if split is not None:
            root = _split_folder(root, split)
        ids = decode.image_files(root)
        self._root = root
        self.name = (root if root.name not in ("", "..") else root.resolve()).name or root.anchor
        folders = [e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith(".")]
        self.classes = tuple(sorted(folders))
        if loose := [name for name in ids if "/" not in name]:
            text = f"{loose[0]!r} in {str(root)!r}"
            raise ValueError(f"image outside any class: {text}: {_SOURCES}")
        if {name.lower() for name in self.classes} <= _SPLIT_NAMES:
            found = ", ".join(self.classes)
            way = f"give {root / self.classes[0]}, or a split"
            raise ValueError(f"folder of splits, not of classes: {found}: {way}")
        self._ids = [ids[k] for k in _subset(len(ids), n_images, seed, str(root))]
        place = {name: k for k, name in enumerate(self.classes)}
        self._labels = [place[name.partition("/")[0]] for name in self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Decode one file: (3, h, w) float32 in 0..1, and its class."""
        try:
            return decode.decode(self._root / self._ids[i], self._ids[i]), self._labels[i]
        except decode.ImageError as error:  # every image counts here: none can be passed over
            text = str(error).removesuffix(f"; {decode.SKIP}")
            raise decode.ImageError(f"{text}; mend the file or remove it") from error

    def fingerprint(self) -> str:
        """Over classes, relative paths and file sizes; -1 for a file that has gone."""
        sha = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for name in self._ids:
            size = -1
            with suppress(OSError):
                size = (self._root / name).stat().st_size
            sha.update(f"{size}\0".encode() + os.fsencode(name) + b"\0")
        return sha.hexdigest()


def _split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split."""
    if not (root / split).is_dir():
        text = f"{split!r} in {str(root)!r}"
        raise ValueError(f"no such split: {text}: make a folder of that name, or name no split")
    return root / split


class _Stacked(Labelled):
    """Images of one size that lie in memory: a pair of tensors."""

    is_pixels = False

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str] | None, name: str
    ) -> None:
        self.name = name
        self._images, self._labels = images, labels.to(torch.int64)
        count = int(self._labels.max()) + 1
        self.classes = tuple(classes or map(str, range(count)))
        for k in ((self._labels < 0) | (self._labels >= len(self.classes))).nonzero()[:1, 0]:
            self._checked(self._labels[k].item(), str(int(k)))

    def __len__(self) -> int:
        return len(self._labels)

    def _float(self, images: Tensor) -> Tensor:
        return images.float()

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """One image (c, h, w) float32 and its label."""
        return self._float(self._images[i : i + 1])[0], int(self._labels[i])

    def stacked(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several images at once, (b, c, h, w) float32."""
        picked = torch.as_tensor(rows, dtype=torch.int64)
        return self._float(self._images[picked]), self._labels[picked]

    def fingerprint(self) -> str:
        """Over every value."""
        sha = hashlib.sha256(f"{self._images.dtype} {tuple(self._images.shape)}".encode())
        for start in range(0, len(self), 1024):
            part = self._images[start : start + 1024]
            sha.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        sha.update(repr((self.classes, self._labels.tolist())).encode())
        return sha.hexdigest()


class _Glyphs(_Stacked):
    """The embedded characters, drawn once and kept as grey bytes: 4 KiB an image."""

    def __init__(self, split: str, n: int, seed: int) -> None:
        labels = torch.arange(n) % len(glyphs.CLASSES)
        grey = glyphs.draw(range(n), split, seed=seed)
        super().__init__(grey[:, None], labels, glyphs.CLASSES, f"glyphs {split}")

    def _float(self, images: Tensor) -> Tensor:
        """Grey (b, 1, s, s) uint8 -> (b, 3, s, s) in -1..1, the channels sharing their memory."""
        return images.float().div_(127.5).sub_(1).expand(-1, 3, -1, -1)


class _Items(Labelled):
    """A map-style dataset of (image, label), torchvision's or any other."""

    def __init__(self, dataset: Any, n_images: int | None, seed: int) -> None:
        self.name, self._dataset, self._seed = type(dataset).__name__, dataset, seed
        try:
            n = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(f"dataset without a length: {self.name}: {_SOURCES}") from error
        self._pick = _subset(n, n_images, seed, self.name)
        first, label, self.is_pixels = self._read(0, 0)
        known = _known_labels(dataset)
        names = _class_names(dataset)
        if names is None:
            if known is None:  # nothing states them: every item is asked once
                known = [self._label(decode.fetch(dataset, k, str(k)), str(k)) for k in range(n)]
            names = tuple(map(str, range(max(map(int, known)) + 1)))
        self.classes = names
        self._checked(label, str(self._pick[0]))
        self._seen = f"{self.name} {self._pick} {names} {known} {digest(first)} {label}"

    def __len__(self) -> int:
        return len(self._pick)

    def _label(self, item: Any, name: str) -> Any:
        """The label of an item."""
        if isinstance(item, Mapping) and "label" in item:
            return item["label"]
        if isinstance(item, tuple | list) and len(item) > 1:
            return item[1]
        kind = type(item).__name__
        raise TypeError(f"item without a label: {name!r} of {self.name} is {kind}: {_ITEM}")

    def _read(self, i: int, epoch: int) -> tuple[Tensor, Any, bool]:
        """One item: image, label, whether the image came as pixels."""
        k = self._pick[i]
        with seeded(self._seed, str(k), epoch):
            item = decode.fetch(self._dataset, k, str(k))
        image, is_pixels = decode.from_item(item, str(k))
        return image.float(), self._label(item, str(k)), is_pixels

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Read one item: (c, h, w) float32 and its label."""
        image, label, is_pixels = self._read(i, epoch)
        if is_pixels != self.is_pixels:
            kinds = ("a float tensor", "pixels")
            found = f"{self._pick[i]} is {kinds[is_pixels]}, the first {kinds[self.is_pixels]}"
            raise TypeError(f"items of two kinds: {found}: return one kind")
        return image, self._checked(label, str(self._pick[i]))

    def fingerprint(self) -> str:
        """Over name, indices, what labels are stated, and the first image."""
        return hashlib.sha256(self._seen.encode()).hexdigest()


def _known_labels(dataset: Any) -> list[Any] | None:
    """The labels that a dataset states without reading its images, as torchvision's do."""
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None:  # torch.utils.data.Subset
        whole = _known_labels(inner)
        return None if whole is None else [whole[int(k)] for k in indices]
    tensors = getattr(dataset, "tensors", None)  # TensorDataset
    labels = tensors[1] if isinstance(tensors, tuple) and len(tensors) > 1 else None
    for name in ("targets", "labels", "_labels"):
        labels = getattr(dataset, name, None) if labels is None else labels
    if labels is None or not hasattr(labels, "__len__") or len(labels) != len(dataset):
        return None
    return list(labels.tolist() if hasattr(labels, "tolist") else labels)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The classes that a dataset, or the one that it is a part of, names."""
    names = getattr(dataset, "classes", None)
    if names is None and hasattr(dataset, "indices"):
        return _class_names(getattr(dataset, "dataset", None))
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        return None
    return tuple(map(str, names))


def _subset(n: int, n_images: int | None, seed: int, what: str) -> list[int]:
    """Which of n images to take, ascending; a larger subset contains a smaller one."""
    wanted = n if n_images is None else n_images
    if n < 1 or wanted < 1:
        raise ValueError(f"too few images: {min(n, wanted)} of {what!r}: give at least 1")
    if wanted > n:
        counts = f"{wanted} of the {n} in {what!r}"
        raise ValueError(f"more images asked for than there are: {counts}: ask for at most {n}")
    return sorted(order(n, seed)[:wanted])


def open_labelled(
    data: Any, *, split: str | None = None, n_images: int | None = None, seed: int = 0
) -> Labelled:
    """Open whatever holds labelled images.

    Args:
        data: A folder with a sub-folder per class; "glyphs"; a torchvision dataset or any other of
            (image, label) with a length; a pair (images (n, c, h, w) float, labels (n,)); or what
            this function returned before, which comes back as it is.
        split: Of the glyphs, "train" (default) or "test"; of a folder, the sub-folder that holds
            the class folders, by default none. Datasets and tensors have no splits.
        n_images: A seeded random subset of so many; None takes all. Of the glyphs, how many to
            draw: by default 20,000 to train, 10,000 to test.
        seed: For the subset, for the drawing of glyphs and for random transforms in a dataset.

    Returns:
        The images. A dataset is asked for its first item, and for every item where it neither
        names its classes nor states its labels.

    Raises:
        TypeError: Not something that holds labelled images.
        ValueError: A missing or empty source, an unknown split, a label out of range, or more
            images asked for than there are.
    """
    if isinstance(data, Labelled):
        return data
    if isinstance(data, str) and data == "glyphs":
        chosen = split or "train"
        n = n_images if n_images is not None else _GLYPHS.get(chosen, 1)
        if n < 1:
            raise ValueError(f"too few images: {n} of 'glyphs': give at least 1")
        return _Glyphs(chosen, n, seed)
    if isinstance(data, str | os.PathLike):
        return _Folder(Path(data).expanduser(), split, n_images, seed)
    if split is not None:
        raise ValueError(f"split of something without splits: {split!r}: pass the part itself")
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        return _pair(data[0], data[1], n_images, seed)
    streams = isinstance(data, IterableDataset | Mapping | Tensor)
    if streams or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(f"no labelled images: {type(data).__name__}: {_SOURCES}")
    return _Items(data, n_images, seed)


def _pair(images: Tensor, labels: Any, n_images: int | None, seed: int) -> Labelled:
    """Two tensors as a labelled set."""
    name = f"tensor {'x'.join(map(str, images.shape))}"
    decode.float_images(images, name, "(n, c, h, w)")
    labels = torch.as_tensor(labels)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not whole:
        found = f"{labels.dtype} {tuple(labels.shape)} for {len(images)} images"
        raise ValueError(f"labels do not fit the images: {found}: give one integer per image")
    rows = torch.tensor(_subset(len(images), n_images, seed, name))
    if len(rows) < len(images):  # the classes are those of the whole
        classes = tuple(map(str, range(int(labels.max()) + 1)))
        return _Stacked(images.detach().cpu()[rows], labels.cpu()[rows], classes, name)
    return _Stacked(images.detach().as_subclass(Tensor).cpu(), labels.cpu(), None, name)
