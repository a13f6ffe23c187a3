"""Labelled images: a folder of class folders, the glyphs, a dataset or a pair of tensors.

Images come from `cka_probe.inputs.source`; here are labels and classes.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cka_probe.inputs import decode, glyphs
from cka_probe.inputs.folders import is_left_behind, list_folder
from cka_probe.inputs.source import Files, Items, check_numbered, stacked_name, subset
from cka_probe.models.preprocessing import IMAGENET, for_channels
from msun.data.labels import class_index, number_of_classes, shown

__all__ = ["Labelled", "open_labelled"]

_SOURCES = "give a folder of class folders, 'glyphs', a Dataset with a length, or two tensors"
_ITEM = "return (image, label), or a mapping with 'image' and 'label'"
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_GLYPHS = {"train": 20000, "test": 10000}


class Labelled(ABC):
    """Numbered images with labels.

    Attributes:
        name: base name, class name or "tensor 8x3x32x32"; never an absolute path.
        classes: names of the classes; a label is an index into it.
        is_pixels: True for RGB in 0..1, to be normalised; False for tensors, used as they are.
        mean: channel means to normalise with if nothing else is stated; None for tensors.
        std: channel standard deviations, likewise.
        skipped: which files of a folder were not read, in one line; empty where all were.
    """

    name: str
    classes: tuple[str, ...]
    is_pixels: bool
    skipped: str = ""

    @property
    def mean(self) -> tuple[float, ...] | None:
        """ImageNet's for pixels, none for tensors."""
        return for_channels(IMAGENET, self.channels)["mean"] if self.is_pixels else None

    @property
    def std(self) -> tuple[float, ...] | None:
        """ImageNet's for pixels, none for tensors."""
        return for_channels(IMAGENET, self.channels)["std"] if self.is_pixels else None

    @property
    def channels(self) -> int:
        """Channels of its pixels."""
        return 3

    def use_channels(self, channels: int | None) -> None:
        """Convert pixels from now on to the channels that a network takes.

        Args:
            channels: 1 for grey, all others for RGB.
        """
        del channels  # tensors are used as they are

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Image `i` as (c, h, w) float32, and its label.

        Args:
            i: which image, 0 to len - 1.
            epoch: random transforms inside a dataset draw from (seed, image, epoch).

        Raises:
            ImageError: it cannot be read.
            ValueError: its label is none of the classes.
        """

    @abstractmethod
    def fingerprint(self, *, progress: bool = False) -> str:
        """A SHA-256 that changes with images and labels, so that a resumed run notices.

        Args:
            progress: whether to show a progress bar where files are read.
        """

    def stacked(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Several images at once if they are in memory in one size, else None.

        Args:
            rows: which images, b of them.

        Returns:
            (images (b, c, h, w) float32, labels (b,) int64), equal to what `load` returns.
        """
        return None

    def _checked(self, label: Any, name: str) -> int:
        """The label as an int; refuses what is no index into `classes`."""
        number = class_index(label, name, self.name)
        if not 0 <= number < len(self.classes):
            text = f"{shown(label)} of item {name!r} in {self.name!r}"
            raise ValueError(f"bad label: {text}: give 0 to {len(self.classes) - 1}")
        return number


class _Folder(Labelled):
    """Image files in one sub-folder per class, classes in alphabetical order.

    A class folder without images is a class as well, so that the labels of two splits agree.
    """

    is_pixels = True

    def __init__(self, root: Path, split: str | None, n_images: int | None, seed: int) -> None:
        root = root if split is None else _split_folder(root, split)
        self._files = Files(root, n_images, seed, least=1)
        self.name, self.skipped = self._files.name, self._files.skipped
        folders = [e.name for e in root.iterdir() if e.is_dir() and not is_left_behind(e.name)]
        self.classes = tuple(sorted(folders))
        if loose := [name for name in list_folder(root).images if "/" not in name]:
            text = f"{loose[0]!r} in {str(root)!r}"
            raise ValueError(f"image outside any class: {text}: {_SOURCES}")
        if {name.lower() for name in self.classes} <= _SPLIT_NAMES:
            found = ", ".join(self.classes)
            hint = f"give {root / self.classes[0]}, or a split"
            raise ValueError(f"folder of splits, not of classes: {found}: {hint}")
        place = {name: k for k, name in enumerate(self.classes)}
        self._labels = [place[name.partition("/")[0]] for name in self._files.ids]

    @property
    def channels(self) -> int:
        """Channels of the decoded images."""
        return self._files.channels

    def use_channels(self, channels: int | None) -> None:
        """Decode to 1 or 3 channels."""
        self._files.use_channels(channels)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Decode one file: (3, h, w) float32 in 0..1, and its class."""
        try:
            return self._files.load(i), self._labels[i]
        except decode.ImageError as error:  # every image counts here: none can be passed over
            text = str(error).removesuffix(f"; {decode.SKIP}")
            raise decode.ImageError(f"{text}; repair the file or remove it") from error

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over classes, relative paths and all bytes."""
        files = self._files.fingerprint(progress=progress)
        text = f"{self.classes!r} {files}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split."""
    if not (root / split).is_dir():
        text = f"{split!r} in {str(root)!r}"
        raise ValueError(f"no such split: {text}: make a folder of that name, or name no split")
    return root / split


class _Stacked(Labelled):
    """Images of one size in memory: a pair of tensors."""

    is_pixels = False

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str] | None, name: str
    ) -> None:
        self.name = name
        self._images, self._labels = images, labels.to(torch.int64)
        count = number_of_classes(int(self._labels.max()), name)
        self.classes = tuple(map(str, range(count)) if classes is None else classes)
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

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over every value."""
        sha = hashlib.sha256(f"{self._images.dtype} {tuple(self._images.shape)}".encode())
        for start in range(0, len(self), 1024):
            part = self._images[start : start + 1024]
            sha.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        sha.update(repr((self.classes, self._labels.tolist())).encode())
        return sha.hexdigest()


class _Glyphs(_Stacked):
    """The embedded characters, drawn once and kept as grey bytes: 4 KiB an image."""

    _channels = 3

    def use_channels(self, channels: int | None) -> None:
        """One channel, or three that are equal."""
        self._channels = 1 if channels == 1 else 3

    def __init__(self, split: str, n: int, seed: int) -> None:
        labels = torch.arange(n) % len(glyphs.CLASSES)
        grey = glyphs.draw(range(n), split, seed=seed)
        super().__init__(grey[:, None], labels, glyphs.CLASSES, f"glyphs {split}")

    def _float(self, images: Tensor) -> Tensor:
        """Grey (b, 1, s, s) uint8 -> (b, c, s, s) in -1..1, the channels sharing their memory."""
        return images.float().div_(127.5).sub_(1).expand(-1, self._channels, -1, -1)


class _Items(Labelled):
    """A map-style dataset of (image, label), torchvision's or any other."""

    def __init__(self, dataset: Any, n_images: int | None, seed: int) -> None:
        self._source = Items(dataset, type(dataset).__name__, n_images, seed, least=1)
        self.name, self.is_pixels = self._source.name, self._source.is_pixels
        first = self._source.ids[0]
        label = self._label(self._source.peek(0), first)
        known, names = _known_labels(dataset), _class_names(dataset)
        if names is None and known is None:  # nothing states them: every item is read once
            indices = range(len(dataset))
            known = [self._label(decode.fetch(dataset, k, str(k)), str(k)) for k in indices]
        numbers = []
        changed = getattr(dataset, "target_transform", None) is not None  # after they are stated
        if known is not None and (names is None or not changed):
            # before the first step, not in the middle of an epoch
            numbers = [class_index(one, str(k), self.name) for k, one in enumerate(known)]
        if names is None:
            names = tuple(map(str, range(number_of_classes(max(numbers), self.name))))
        self.classes = names
        self._checked(label, first)
        self._stated = f"{names} {known}"

    @property
    def channels(self) -> int:
        """Channels of its pixels."""
        return self._source.channels

    def use_channels(self, channels: int | None) -> None:
        """Convert pixels to 1 or 3 channels."""
        self._source.use_channels(channels)

    def __len__(self) -> int:
        return len(self._source)

    def _label(self, item: Any, name: str) -> Any:
        """The label of an item."""
        if isinstance(item, Mapping) and "label" in item:
            return item["label"]
        if isinstance(item, tuple | list) and len(item) > 1:
            return item[1]
        kind = type(item).__name__
        raise TypeError(f"item without a label: {name!r} of {self.name} is {kind}: {_ITEM}")

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """Read one item: (c, h, w) float32 and its label."""
        item, name = self._source.item(i, epoch), self._source.ids[i]
        return self._source.image(i, item).float(), self._checked(self._label(item, name), name)

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over name, indices, what labels are stated, and a sample of 16 images."""
        images = self._source.fingerprint(progress=progress)
        return hashlib.sha256(f"{images} {self._stated}".encode()).hexdigest()


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


def open_labelled(
    data: Any, *, split: str | None = None, n_images: int | None = None, seed: int = 0
) -> Labelled:
    """Open labelled images.

    Args:
        data: a folder with a sub-folder per class; "glyphs"; a torchvision dataset or any other of
            (image, label) with a length; a pair (images (n, c, h, w) float, labels (n,)); or what
            this function returned before, which is returned as it is.
        split: "train" (default) or "test" of the glyphs; of a folder, the sub-folder that holds the
            class folders, by default none. Datasets and tensors have no splits.
        n_images: size of a seeded random subset; None takes all. Of the glyphs, how many to draw:
            by default 20,000 to train, 10,000 to test.
        seed: seed of the subset, of the drawing of glyphs and of random transforms in a dataset.

    Returns:
        The images. A dataset is asked for its first item, and for every item if it neither names
        its classes nor states its labels.

    Raises:
        TypeError: something that holds no labelled images.
        ValueError: a missing or empty source, an unknown split, a label out of range, or a subset
            larger than the source.
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
    if isinstance(data, Tensor):
        raise TypeError(f"no labelled images: {type(data).__name__}: {_SOURCES}")
    check_numbered(data, "no labelled images", _SOURCES)
    return _Items(data, n_images, seed)


def _pair(images: Tensor, labels: Any, n_images: int | None, seed: int) -> Labelled:
    """Two tensors as a labelled set."""
    name = stacked_name(images)
    if not isinstance(labels, Tensor):
        every = list(labels) if hasattr(labels, "__len__") else [labels]
        numbers = [class_index(one, str(k), name) for k, one in enumerate(every)]
        mask = any(isinstance(one, bool) for one in every)  # of which images, more likely
        labels = torch.tensor(numbers, dtype=torch.bool if mask else torch.int64)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not whole:
        found = f"{labels.dtype} {tuple(labels.shape)} for {len(images)} images"
        raise ValueError(f"labels do not fit the images: {found}: give one integer per image")
    rows = torch.tensor(subset(len(images), n_images, seed, name, least=1))
    if len(rows) < len(images):  # the classes are those of the whole
        classes = tuple(map(str, range(number_of_classes(int(labels.max()), name))))
        return _Stacked(images.detach().cpu()[rows], labels.cpu()[rows], classes, name)
    return _Stacked(images.detach().as_subclass(Tensor).cpu(), labels.cpu(), None, name)
