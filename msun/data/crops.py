"""The same random crop of an image at every scale, resized once from what was decoded.

What is random depends on (seed, epoch, image) alone: not on the batch, the workers or the global
random state, so that a run that was stopped goes on exactly.
"""

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cka_probe.inputs.batches import from_workers
from cka_probe.inputs.views import View, resize
from msun.data.labelled import Labelled

__all__ = ["Augment", "Crops", "augmentation", "shuffled"]

_ORDER, _CROPS, _SIDES = 0, 1, 2  # streams of random numbers
_DRAWS = 5  # uniform numbers an image takes: area, ratio, top, left, flip


@dataclass(frozen=True)
class Augment:
    """Random resized crop (Szegedy et al. 2015) and mirroring.

    Attributes:
        area: The crop's share of the largest square's area, lowest and highest.
        ratio: Its width over its height, lowest and highest; drawn uniformly in the logarithm.
        flip: Mirror every second image, at random.
    """

    area: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"bad crop area: {self.area}: give two shares, 0 < low <= high <= 1")
        low, high = self.ratio
        if not 0 < low <= high < float("inf"):
            raise ValueError(f"bad crop ratio: {self.ratio}: give two numbers, 0 < low <= high")

    def box(self, u: NDArray[np.float64], h: int, w: int) -> tuple[int, int, int, int]:
        """The crop of one image.

        Args:
            u: (5,) in 0..1.
            h: Height of the image.
            w: Width of the image.

        Returns:
            (top, left, height, width) in pixels; a crop that sticks out is shrunk until it fits.
        """
        side = min(h, w)
        area = (self.area[0] + u[0] * (self.area[1] - self.area[0])) * side**2
        low, high = np.log(self.ratio)
        stretch = np.exp((low + u[1] * (high - low)) / 2)
        high_px, wide_px = area**0.5 / stretch, area**0.5 * stretch
        fit = min(1.0, h / high_px, w / wide_px)
        height, width = (max(1, round(float(px * fit))) for px in (high_px, wide_px))
        return int(u[2] * (h - height + 1)), int(u[3] * (w - width + 1)), height, width

    def __call__(self, image: Tensor, u: NDArray[np.float64]) -> Tensor:
        """Crop and mirror one image (c, h, w) as the numbers `u` say; not resized."""
        top, left, height, width = self.box(u, *image.shape[-2:])
        crop = image[..., top : top + height, left : left + width]
        return crop.flip(-1) if self.flip and u[4] < 0.5 else crop


PHOTOGRAPHS = Augment()
TENSORS = Augment(area=(0.85, 1.0), ratio=(1.0, 1.0), flip=False)


def augmentation(
    kind: str, data: Labelled, *, area: Sequence[float] | None = None, flip: bool | None = None
) -> Augment | None:
    """Choose what is done to training images.

    Args:
        kind: "auto": crops of 25 to 100 % of the area and mirroring for pixels, crops of 85 to
            100 % without mirroring for tensors (glyphs: a mirrored b is a d, an enlarged c a C).
            "none": the centre square, always the same.
        data: The training images.
        area: Lowest and highest share of the area, instead.
        flip: Whether to mirror, instead.

    Returns:
        The augmentation, or None for none.

    Raises:
        ValueError: An unknown kind, bad shares, or options of a crop where there is none.
    """
    if kind not in ("auto", "none"):
        raise ValueError(f"unknown augmentation: {kind!r}: choose 'auto' or 'none'")
    if kind == "none":
        if area is not None or flip is not None:
            raise ValueError("crop options without crops: augment='none': leave one of them out")
        return None
    chosen = PHOTOGRAPHS if data.is_pixels else TENSORS
    if area is not None and len(area) != 2:
        raise ValueError(f"bad crop area: {tuple(area)}: give two shares, 0 < low <= high <= 1")
    return Augment(
        area=chosen.area if area is None else (float(area[0]), float(area[1])),
        ratio=chosen.ratio,
        flip=chosen.flip if flip is None else flip,
    )


def shuffled(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n images in an epoch, a permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(n)


@dataclass(frozen=True)
class Crops:
    """Batches of one set of images, every image at every scale.

    Attributes:
        data: The images.
        scales: Sides in pixels.
        augment: None for the centre square.
        mean: Channel means to normalise with; None normalises nothing.
        std: Channel standard deviations.
        seed: Of the crops.
        served: For each scale the lowest and highest side that it serves: all crops of a batch are
            first shrunk to one drawn from them, where it is below the scale. Empty: no.
        between: In what share of the batches, scale by scale.
        native: Scales whose crops stay at the side drawn, which may then be above the scale.
    """

    data: Labelled
    scales: tuple[int, ...]
    augment: Augment | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    seed: int = 0
    served: tuple[tuple[int, int], ...] = ()
    between: float = 1.0
    native: tuple[int, ...] = ()

    def batches(
        self,
        rows: Sequence[Sequence[int]],
        *,
        epoch: int = 0,
        workers: int = 0,
        firsts: Sequence[int] | None = None,
    ) -> Generator[tuple[dict[int, Tensor], Tensor], None, None]:
        """Yield one batch after the other; the same values whatever `workers` is.

        Close the generator when leaving early (`contextlib.closing`): that ends the workers.

        Args:
            rows: Which images each batch holds.
            epoch: Another epoch draws other crops.
            workers: Processes that decode; 0 decodes here, as do images that lie in memory.
            firsts: Where each of `rows` is a part of a batch, the first image of the whole, by
                which sides are drawn; None for whole batches.

        Returns:
            A generator of ({scale: (b, c, side, side)}, labels (b,)); the side is the scale, but
            for those of `native`.
        """
        drawn_by = [int(batch[0]) for batch in rows] if firsts is None else list(firsts)
        work = _Batches(self, [list(map(int, batch)) for batch in rows], epoch, drawn_by)
        every = range(len(rows))
        if workers and self.data.stacked([0]) is None:
            return from_workers(work, every, workers)
        return (work.build(k) for k in every)


class _Batches(Dataset[Any]):
    """Batch k by number: the unit of work of a worker."""

    def __init__(self, crops: Crops, rows: list[list[int]], epoch: int, firsts: list[int]) -> None:
        self.crops, self.rows, self.epoch, self.firsts = crops, rows, epoch, firsts
        drawn = np.random.default_rng([crops.seed, epoch, _CROPS])
        self.normal = (crops.mean, crops.std)
        self.uniform = drawn.random((len(crops.data), _DRAWS))

    def build(self, k: int) -> tuple[dict[int, Tensor], Tensor]:
        """Load each image once, crop it once, resize the crop to every scale."""
        crops, rows = self.crops, self.rows[k]
        if (stacked := crops.data.stacked(rows)) is not None:
            images, labels = list(stacked[0]), stacked[1]
        else:
            loaded = [crops.data.load(i, self.epoch) for i in rows]
            images = [image for image, _ in loaded]
            labels = torch.tensor([label for _, label in loaded])
        channels = images[0].shape[0]
        if crops.mean is None and all(image.stride(0) == 0 for image in images):  # grey: once
            images = [image[:1] for image in images]
        if crops.augment is not None:
            drawn = zip(rows, images, strict=True)
            images = [crops.augment(image, self.uniform[i]) for i, image in drawn]
        looks = self._looks(images, self._first(self.firsts[k]))
        return {s: x.expand(-1, channels, -1, -1) for s, x in looks.items()}, labels

    def _first(self, row: int) -> dict[int, int]:
        """To what side the crops of a batch, known by its first image, shrink before a scale."""
        crops = self.crops
        generator = np.random.default_rng([crops.seed, self.epoch, _SIDES, row])
        drawn = {}
        for side, (low, high) in zip(crops.scales, crops.served, strict=False):
            u, whether = generator.random(2)
            if whether < crops.between:
                first = int(low * ((high + 1) / low) ** u)
                drawn[side] = first if side in crops.native else min(side, first)
        return drawn

    def _looks(self, images: list[Tensor], first: dict[int, int]) -> dict[int, Tensor]:
        """Images or crops (c, h, w) at every scale, normalised; those of one shape all at once."""
        crops, groups = self.crops, defaultdict[tuple[int, ...], list[int]](list)
        for place, image in enumerate(images):
            groups[tuple(image.shape)].append(place)
        blocks = [torch.stack([images[k] for k in places]) for places in groups.values()]
        back = torch.tensor([k for places in groups.values() for k in places]).argsort()
        looks = {}
        for side in crops.scales:
            whole = first.get(side, side) if side in crops.native else side
            if crops.augment is None:
                look = View(first.get(side, whole), whole, True, *self.normal)
                parts = [look(block) for block in blocks]
            else:
                finish = View(None, None, True, *self.normal)
                small = [resize(b, first[side]) if side in first else b for b in blocks]
                parts = [finish(resize(block, whole)) for block in small]
            looks[side] = parts[0] if len(parts) == 1 else torch.cat(parts)[back]
        return looks

    def __getitem__(self, k: int) -> tuple[dict[int, Tensor], Tensor] | Exception:
        """In a worker: our errors travel as values, without a traceback in their message."""
        try:
            return self.build(k)
        except (TypeError, ValueError) as error:
            return type(error)(str(error))
