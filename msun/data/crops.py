"""Batches of crops: the same random crop of an image, resized from the decoded image to each scale.

The random numbers depend on (seed, epoch, image) only, not on the batch, the workers or the global
random state. So a resumed run continues exactly.
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

_ORDER, _CROPS, _SIDES = 0, 1, 2  # numbers of independent random streams
_DRAWS = 5  # uniform numbers per image: area, ratio, top, left, flip


@dataclass(frozen=True)
class Augment:
    """Random resized crop (Szegedy et al. 2015) and mirroring.

    Attributes:
        area: area of the crop over that of the centre square, lowest and highest.
        ratio: width over height, lowest and highest; drawn uniformly in the logarithm.
        flip: whether to mirror images, with a probability of 0.5.
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
            u: uniform random numbers (5,), from 0 to 1.
            h: height of the image in pixels.
            w: width of the image in pixels.

        Returns:
            (top, left, height, width) in pixels; a crop larger than the image is shrunk to fit.
        """
        side = min(h, w)
        area = (self.area[0] + u[0] * (self.area[1] - self.area[0])) * side**2
        low, high = np.log(self.ratio)
        stretch = np.exp((low + u[1] * (high - low)) / 2)  # sqrt(width / height)
        high_px, wide_px = area**0.5 / stretch, area**0.5 * stretch
        fit = min(1.0, h / high_px, w / wide_px)
        height, width = (max(1, round(float(px * fit))) for px in (high_px, wide_px))
        return int(u[2] * (h - height + 1)), int(u[3] * (w - width + 1)), height, width

    def __call__(self, image: Tensor, u: NDArray[np.float64]) -> Tensor:
        """Crop and mirror one image, without resizing.

        Args:
            image: image (c, h, w).
            u: uniform random numbers (5,), from 0 to 1.
        """
        top, left, height, width = self.box(u, *image.shape[-2:])
        crop = image[..., top : top + height, left : left + width]
        return crop.flip(-1) if self.flip and u[4] < 0.5 else crop


PHOTOGRAPHS = Augment()
# For glyphs: a mirrored b is a d, an enlarged c a C.
TENSORS = Augment(area=(0.85, 1.0), ratio=(1.0, 1.0), flip=False)


def augmentation(
    kind: str, data: Labelled, *, area: Sequence[float] | None = None, flip: bool | None = None
) -> Augment | None:
    """Resolve the augmentation of training images.

    Args:
        kind: "auto", crops of 25 to 100 % of the area and mirroring for pixels, crops of 85 to
            100 % without mirroring for tensors; or "none", the centre square.
        data: the training images.
        area: lowest and highest share of the area; None for that of `kind`.
        flip: whether to mirror; None for that of `kind`.

    Returns:
        The augmentation; None for "none".

    Raises:
        ValueError: an unknown kind, bad shares, or crop options with "none".
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
    """The order of images in an epoch.

    Args:
        n: number of images.
        seed: seed of the run.
        epoch: number of the epoch, from 0.

    Returns:
        A permutation of 0 to n - 1.
    """
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(n)


@dataclass(frozen=True)
class Crops:
    """Batches of labelled images, with each image at every scale.

    Attributes:
        data: the images.
        scales: sides in pixels.
        augment: the augmentation; None for the centre square.
        mean: channel means of the preprocessing; None for no normalisation.
        std: channel standard deviations.
        seed: seed of the crops.
        served: lowest and highest side that are routed to each scale. A side is drawn from them for
            a batch; if it is below the scale, the crops are shrunk to it and then enlarged. Empty
            for crops at the scales only.
        between: share of the batches with such a side, independently for each scale.
        native: scales whose crops stay at the drawn side, which may be above the scale.
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
        """Yield the batches; the values do not depend on `workers`.

        Close the generator to end the workers early (`contextlib.closing`).

        Args:
            rows: indices of the images of each batch.
            epoch: number of the epoch, which seeds the crops.
            workers: number of processes that decode; 0 for this process. Images in memory are
                always read in this process.
            firsts: index of the first image of each whole batch, which seeds the side, if `rows`
                are parts of batches; None for whole batches.

        Returns:
            A generator of ({scale: images (b, c, side, side)}, labels (b,)); the side is the scale,
            except for `native`.
        """
        drawn_by = [int(batch[0]) for batch in rows] if firsts is None else list(firsts)
        work = _Batches(self, [list(map(int, batch)) for batch in rows], epoch, drawn_by)
        every = range(len(rows))
        if workers and self.data.stacked([0]) is None:
            return from_workers(work, every, workers)
        return (work.build(k) for k in every)


class _Batches(Dataset[Any]):
    """Batches by number: the data set of the workers."""

    def __init__(self, crops: Crops, rows: list[list[int]], epoch: int, firsts: list[int]) -> None:
        self.crops, self.rows, self.epoch, self.firsts = crops, rows, epoch, firsts
        drawn = np.random.default_rng([crops.seed, epoch, _CROPS])
        self.normal = (crops.mean, crops.std)
        self.uniform = drawn.random((len(crops.data), _DRAWS))

    def build(self, k: int) -> tuple[dict[int, Tensor], Tensor]:
        """Load and crop each image once, and resize the crop to every scale.

        Args:
            k: number of the batch.

        Returns:
            ({scale: images (b, c, side, side)}, labels (b,)).
        """
        crops, rows = self.crops, self.rows[k]
        if (stacked := crops.data.stacked(rows)) is not None:
            images, labels = list(stacked[0]), stacked[1]
        else:
            loaded = [crops.data.load(i, self.epoch) for i in rows]
            images = [image for image, _ in loaded]
            labels = torch.tensor([label for _, label in loaded])
        channels = images[0].shape[0]
        # expanded grey images: one channel is resized, and expanded again below
        if crops.mean is None and all(image.stride(0) == 0 for image in images):
            images = [image[:1] for image in images]
        if crops.augment is not None:
            drawn = zip(rows, images, strict=True)
            images = [crops.augment(image, self.uniform[i]) for i, image in drawn]
        views = self._views(images, self._drawn_sides(self.firsts[k]))
        return {s: x.expand(-1, channels, -1, -1) for s, x in views.items()}, labels

    def _drawn_sides(self, row: int) -> dict[int, int]:
        """Scale -> drawn side of a batch, seeded by its first image; only scales that have one."""
        crops = self.crops
        generator = np.random.default_rng([crops.seed, self.epoch, _SIDES, row])
        drawn = {}
        for side, (low, high) in zip(crops.scales, crops.served, strict=False):
            u, whether = generator.random(2)
            if whether < crops.between:
                first = int(low * ((high + 1) / low) ** u)  # uniform in the logarithm, low to high
                drawn[side] = first if side in crops.native else min(side, first)
        return drawn

    def _views(self, images: list[Tensor], first: dict[int, int]) -> dict[int, Tensor]:
        """Crops (c, h, w), resized to every scale and normalised, in batches of one shape."""
        crops, groups = self.crops, defaultdict[tuple[int, ...], list[int]](list)
        for place, image in enumerate(images):
            groups[tuple(image.shape)].append(place)
        blocks = [torch.stack([images[k] for k in places]) for places in groups.values()]
        back = torch.tensor([k for places in groups.values() for k in places]).argsort()
        views = {}
        for side in crops.scales:
            whole = first.get(side, side) if side in crops.native else side
            if crops.augment is None:
                view = View(first.get(side, whole), whole, True, *self.normal)
                parts = [view(block) for block in blocks]
            else:
                finish = View(None, None, True, *self.normal)
                small = [resize(b, first[side]) if side in first else b for b in blocks]
                parts = [finish(resize(block, whole)) for block in small]
            views[side] = parts[0] if len(parts) == 1 else torch.cat(parts)[back]
        return views

    def __getitem__(self, k: int) -> tuple[dict[int, Tensor], Tensor] | Exception:
        """Batch k in a worker; errors are returned as values, since raising adds a traceback."""
        try:
            return self.build(k)
        except (TypeError, ValueError) as error:
            return type(error)(str(error))
