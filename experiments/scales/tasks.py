"""The sets of images: what is drawn or unpacked once, and held as bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cka_probe.inputs import glyphs
from cka_probe.io import replacing
from experiments.scales.pretrained import imagenette
from msun.data.labelled import Labelled

__all__ = ["TASKS", "Held", "Task", "held", "small"]

CIFAR = Path("images") / "cifar10_jpeg_train20000_test10000.tar.xz"


@dataclass(frozen=True)
class Task:
    """One set of images and how networks meet it; scales, sizes and sides are in pixels.

    Attributes:
        name: of the task.
        scales: trained sides, the last is the reference.
        sizes: sides that are tested.
        strides: of the stem's convolution and pool.
        least: to what side d3 enlarges, so that its mean MACs over the sizes are nearest to
            `lean`'s: within 1 % on glyphs, 12 % above on CIFAR-10.
        channels: of the images.
        classes: how many.
        images: (train, val, test); each split is its own, and `val` decides all that is chosen.
        area: lowest and highest share of a training crop.
        flip: whether training mirrors.
        unread: further test images, on which nobody looked at a result while the design changed.
        unit: images of the single-scale network that are a budget of 1.
        rates: learning rates that are tried, for one scale and a batch of 32.
    """

    name: str
    scales: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, int]
    least: int
    channels: int
    classes: int
    images: tuple[int, int, int]
    area: tuple[float, float]
    flip: bool
    unread: int = 0
    unit: int = 240_000
    rates: tuple[float, float, float] = (0.075, 0.15, 0.3)

    @property
    def reference(self) -> int:
        """The largest scale."""
        return self.scales[-1]


TASKS = {
    "glyphs": Task(
        "glyphs", (8, 32, 56), tuple(range(8, 57, 4)), (2, 2), 28, 1, 62, (20_000, 2_000, 10_000),
        (0.85, 1.0), False, 20_000,
    ),
    "cifar10": Task(
        "cifar10", (8, 18, 32), tuple(range(8, 33, 2)), (1, 2), 16, 3, 10, (18_000, 2_000, 10_000),
        (0.5, 1.0), True,
    ),
    "imagenette": Task(  # 20 epochs of a pretrained network
        "imagenette", (32, 128, 224), tuple(range(32, 225, 16)), (2, 2), 112, 3, 10,
        (2_000, 500, 800), (0.35, 1.0), True, unit=40_000, rates=(0.01, 0.03, 0.1),
    ),
}  # fmt: skip


def small(task: Task, images: tuple[int, int, int], sizes: Sequence[int]) -> Task:
    """The same task with fewer images and sizes: to try the harness."""
    return replace(task, images=images, sizes=tuple(sizes), unread=min(task.unread, images[2]))


class Held(Labelled):
    """Images of one size, kept as bytes; -1 to 1 when asked for, on the device where they lie."""

    is_pixels = False

    def __init__(self, images: Tensor, labels: Tensor, name: str, classes: int) -> None:
        self.images, self.labels, self.name = images, labels, name
        self.classes = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int, epoch: int = 0) -> tuple[Tensor, int]:
        """One image (c, h, w) and its label."""
        images, labels = self.stacked([i])
        return images[0], int(labels[0])

    def stacked(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several images (b, c, h, w) and their labels."""
        picked = torch.as_tensor(rows, dtype=torch.int64)
        return self.images[picked].float().div_(127.5).sub_(1), self.labels[picked]

    def fingerprint(self, *, progress: bool = False) -> str:
        """Over every value."""
        del progress
        sha = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for start in range(0, len(self), 1024):
            sha.update(self.images[start : start + 1024].cpu().numpy().tobytes())
        sha.update(repr(self.labels.tolist()).encode())
        return sha.hexdigest()


def held(task: Task, split: str, work: Path, data: Path | None = None, device: str = "cpu") -> Held:
    """The images of a split, from `work` where they were made before.

    Args:
        task: which.
        split: "train", "val", "test" or, where the task has more to test on, "unread".
        work: folder that keeps them.
        data: folder with images/, for CIFAR-10 and Imagenette.
        device: where the images are to lie; the labels stay with the CPU.

    Raises:
        ValueError: CIFAR-10 or Imagenette without a folder that holds it.
    """
    counts = "-".join(map(str, (*task.images, task.unread) if split == "unread" else task.images))
    path = work / "images" / f"{task.name}-{task.reference}-{counts}-{split}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.name == "imagenette":
            made = imagenette(split, data, task.images)
        else:
            made = _cifar(task, split, data) if task.name == "cifar10" else _drawn(task, split)
        with replacing(path) as temporary:
            torch.save(made, temporary)
    images, labels = torch.load(path, weights_only=True)
    return Held(images.to(device), labels, f"{task.name} {split}", task.classes)


def _drawn(task: Task, split: str) -> tuple[Tensor, Tensor]:
    """Glyphs; those to validate on follow those to train on, and share their faces."""
    n_train, n_val, n_test = task.images
    rows = {
        "train": range(n_train), "val": range(n_train, n_train + n_val), "test": range(n_test),
        "unread": range(n_test, n_test + task.unread),
    }[split]  # fmt: skip
    faces = "test" if split in ("test", "unread") else "train"
    images = glyphs.draw(rows, faces, size_px=task.reference)[:, None]
    return images, torch.tensor([k % task.classes for k in rows])


def _cifar(task: Task, split: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """CIFAR-10; of each training class, the first are for training, the next for validation."""
    archive = None if data is None else data / CIFAR
    if archive is None or not archive.is_file():
        raise ValueError(f"CIFAR-10 is not there: {archive}: name the folder of images/ (--data)")
    n_train, n_val, n_test = (n // task.classes for n in task.images)
    first, count = {"train": (0, n_train), "val": (n_train, n_val), "test": (0, n_test)}[split]
    files: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            wanted = ("test" in parts) == (split == "test")
            if member.isfile() and member.name.endswith(".jpg") and wanted:
                source = tar.extractfile(member)
                assert source is not None
                files.setdefault(parts[-2], []).append((parts[-1], source.read()))
    images, labels = [], []
    for label, name in enumerate(sorted(files)):
        for _, content in sorted(files[name])[first : first + count]:
            images.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
