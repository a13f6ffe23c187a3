"""The transform of a view: centre square, resize, restore, normalise. All resizing is here.

A view never changes the tensor that it is given: all views of an image share one decoded copy.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cka_probe.errors import one_line
from cka_probe.rng import seeded

__all__ = [
    "NATIVE",
    "Transform",
    "View",
    "apply_view",
    "check_range",
    "check_reference",
    "check_scales",
    "parse_scales",
    "resize",
    "scale_transforms",
    "stack",
    "view_transforms",
]

Transform = Callable[[Tensor], Tensor]
NATIVE = "native"
_LARGEST_PX = 16384  # an image of 3 GiB
_SIDES = "give sides in pixels, such as 32,64,128,224"


@dataclass(frozen=True)
class View:
    """The transform of one view, as a value: it can be compared, printed and sent to workers.

    Attributes:
        side_px: side of the centre square after the resize; None leaves the image as it is.
        restore_px: side of a second resize, back up; None stops at `side_px`.
        antialias: whether to widen the filter when shrinking, in every resize.
        mean: channel means, subtracted at the end; None normalises nothing.
        std: channel standard deviations, divided by at the end.
    """

    side_px: int | None = None
    restore_px: int | None = None
    antialias: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            given = "mean" if self.std is None else "std"
            raise ValueError(f"half a normalisation: only {given} is given: give mean and std")
        if self.mean is None or self.std is None:
            return
        object.__setattr__(self, "mean", _channels("mean", self.mean))
        object.__setattr__(self, "std", _channels("std", self.std))
        if len(self.mean) != len(self.std):
            counts = f"{len(self.mean)} means, {len(self.std)} stds"
            raise ValueError(f"mean and std differ in length: {counts}: give one per channel")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std is not positive: {self.std}: give one number above 0 a channel")

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image, or several of one size at once.

        Args:
            image: (c, h, w) or (n, c, h, w), float; 0..1 where it was decoded from pixels.

        Returns:
            (..., c, side, side), or (..., c, h, w) if the view has no size. The same tensor, not a
            copy, if there is nothing to do.
        """
        for side_px in (self.side_px, self.restore_px):
            if side_px is not None:
                image = resize(_centre_square(image), side_px, self.antialias)
        if self.mean is None or self.std is None:
            return image
        if len(self.mean) not in (1, image.shape[-3]):
            counts = f"{len(self.mean)} for {image.shape[-3]} channels"
            raise ValueError(f"mean and std do not fit the images: {counts}: give one per channel")
        mean = torch.tensor(self.mean, dtype=image.dtype).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype).view(-1, 1, 1)
        return (image - mean).div_(std)


def check_range(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image: Tensor | None,
) -> None:
    """Refuse a mean and std of another range than the images': of 0..255 for pixels of 0..1.

    Args:
        mean: channel means; None where nothing is normalised.
        std: channel standard deviations.
        image: an image (c, h, w) before the transform; None for pixels, which are 0..1.

    Raises:
        ValueError: the ranges differ, as far as means and this image tell.
    """
    if mean is None or std is None:
        return
    low, high = (0.0, 1.0) if image is None else (float(image.min()), float(image.max()))
    # Means of numbers in 0..1 lie there. Their stds are below 0.5 and those of bytes above 20; 10
    # leaves a freely chosen divisor its room.
    of_bytes = max(mean) > 1 or max(std) > 10
    shown = f"mean {max(mean):g}, std {max(std):g}"
    if of_bytes and low >= 0 and high <= 1:
        hint = "divide both by 255"
        raise ValueError(f"mean and std are not of 0..1: {shown}, images of 0..1: {hint}")
    # 2: numbers of 0..1 may have been sharpened or brightened a little beyond 1
    if not of_bytes and low >= 0 and high > 2:
        hint = "divide the images by their white level (255), or multiply both by it"
        raise ValueError(f"images are not of 0..1: up to {high:g}, {shown}: {hint}")


def _channels(what: str, values: Any) -> tuple[float, ...]:
    """Finite numbers, one a channel."""
    try:
        out = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        out = ()
    if not out or not all(abs(value) < float("inf") for value in out):
        raise ValueError(f"{what} is no list of numbers: {values!r}: give one number per channel")
    return out


def _centre_square(image: Tensor) -> Tensor:
    """(..., h, w) -> (..., s, s), s = min(h, w), rounded as torchvision's centre crop rounds."""
    height, width = image.shape[-2:]
    side_px = min(height, width)
    top, left = round((height - side_px) / 2), round((width - side_px) / 2)
    return image[..., top : top + side_px, left : left + side_px]


def resize(images: Tensor, size_px: int | Sequence[int], antialias: bool = True) -> Tensor:
    """Bilinear resize; the identity if the images have the size already.

    float16 and bfloat16 images are resized in float32 and rounded once.

    Args:
        images: (c, h, w) or (n, c, h, w), float.
        size_px: the new side, or (h, w).
        antialias: whether to widen the filter when shrinking.

    Returns:
        (..., c, h', w') of the same dtype.
    """
    size = [size_px, size_px] if isinstance(size_px, int) else list(size_px)
    if list(images.shape[-2:]) == size:
        return images
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    four = wide if wide.ndim == 4 else wide[None]  # (n, c, h, w)
    try:
        out = F.interpolate(four, size, mode="bilinear", align_corners=False, antialias=antialias)
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        raise ValueError(f"no memory for an image: {size} pixels: give a smaller scale") from error
    return (out if wide.ndim == 4 else out[0]).to(images.dtype)


def apply_view(transform: Transform, image: Tensor, seed: int, label: str, view: str) -> Tensor:
    """One view of one image; a user's transform gets a copy and its own random numbers.

    Args:
        transform: one of `scale_transforms`, or any callable.
        image: (c, h, w) float; it is not changed.
        seed: random transforms draw from (seed, label, view), whatever the order of the images.
        label: the image's name in messages.
        view: the view's name.

    Returns:
        The network's input for this image; (c, h, w) as a rule.

    Raises:
        TypeError: the transform returned no tensor.
        ValueError: the transform raised.
    """
    if isinstance(transform, View):
        return transform(image)
    try:
        with seeded(seed, label, view):
            out = transform(image.clone())
    except MemoryError:
        raise
    except Exception as error:
        text = f"view {view!r} failed: image {label!r}, {one_line(error)}: check its transform"
        raise ValueError(text) from error
    if not isinstance(out, Tensor):
        kind = type(out).__name__
        raise TypeError(f"view {view!r} gives no tensor: {kind}: end its transform in a tensor")
    return out.detach()


def stack(view: str, images: list[Tensor], ids: list[str]) -> Tensor:
    """Put the images of one view into one batch.

    Args:
        view: the view's name.
        images: b images, (c, h, w) each.
        ids: their names in messages.

    Returns:
        (b, c, h, w).

    Raises:
        ValueError: they differ in size.
    """
    for image, label in zip(images, ids, strict=True):
        if image.shape != images[0].shape:
            first, other = tuple(images[0].shape), tuple(image.shape)
            both = f"{ids[0]!r} {first} and {label!r} {other} in view {view!r}"
            hint = "resize them in the view's transform, or give scales= instead of views="
            raise ValueError(f"images of different sizes: {both}: {hint}")
    return torch.stack(images)


def scale_transforms(
    scales: Iterable[int] | None,
    *,
    reference: int | str | None = None,
    resize: Literal["native", "restore"] | str = "native",
    antialias: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Transform]:
    """One transform per scale, named by it.

    Args:
        scales: sides in pixels; None is one view "native", the images as they are, uncropped.
        reference: one of the scales; None is the largest. Only `restore` needs it.
        resize: "native" feeds s x s; "restore" resizes to s and back up to the reference.
        antialias: whether to widen the filter when shrinking, in every resize.
        mean: channel means to normalise with; None for images that are used as they are.
        std: channel standard deviations.

    Returns:
        {view name: transform of one (c, h, w) float image}, in the order of `scales`.

    Raises:
        TypeError: scales that are no whole numbers.
        ValueError: bad scales, a reference that is none of them, an unknown `resize`, or `restore`
            with a scale above the reference.
    """
    if resize not in ("native", "restore"):
        raise ValueError(f"unknown resize: {resize!r}: choose 'native' or 'restore'")
    means = None if mean is None else _channels("mean", mean)
    stds = None if std is None else _channels("std", std)
    if scales is None:
        if resize == "restore":
            raise ValueError("restore without scales: None: give scales= to resize down to")
        return {NATIVE: View(mean=means, std=stds)}
    sides = check_scales(scales)
    top = max(sides) if reference is None else check_reference(reference, sides)
    if resize == "restore" and max(sides) > top:
        bad = f"{max(sides)} above {top}"
        raise ValueError(f"restore only goes up: {bad}: take the largest scale as the reference")
    back = top if resize == "restore" else None
    return {str(s): View(s, back, antialias, means, stds) for s in sides}


def view_transforms(
    transforms: Mapping[str, Transform | None],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Transform]:
    """The transforms of views that a user named.

    A callable sees the decoded image, (c, h, w) float, 0..1 for pixels, before any crop and before
    normalisation, and what it returns is fed to the network as it is. None is the image as it is,
    normalised where `mean` and `std` are given.

    Args:
        transforms: {view name: callable or None}.
        mean: channel means for the views without a transform.
        std: channel standard deviations.

    Returns:
        {view name: transform of one (c, h, w) float image}.

    Raises:
        TypeError: a transform that is neither None nor callable.
        ValueError: no views.
    """
    if not transforms:
        raise ValueError("no views: {}: name at least one")
    out: dict[str, Transform] = {}
    for name, transform in transforms.items():
        if transform is None:
            transform = View(
                mean=None if mean is None else _channels("mean", mean),
                std=None if std is None else _channels("std", std),
            )
        if not callable(transform):
            kind = type(transform).__name__
            raise TypeError(f"view {name!r} has no transform: {kind}: give a callable or None")
        out[name] = transform
    return out


def parse_scales(text: str) -> list[int]:
    """Read the scales of a command line.

    Args:
        text: "32,64,128,224"; blanks around a number are allowed.

    Returns:
        Sides in pixels, in the order given.

    Raises:
        ValueError: not a number, not positive, given twice, or no scale at all.
    """
    if not text.strip():
        raise ValueError(f"no scales: {text!r}: {_SIDES}")
    sides = []
    for part in text.split(","):
        if re.fullmatch(r"[+-]?[0-9]+", part.strip()) is None:
            raise ValueError(f"bad scale: {part.strip()!r}: {_SIDES}")
        sides.append(int(part))
    return check_scales(sides)


def check_scales(scales: Iterable[int]) -> list[int]:
    """The scales as plain ints; refuses those that name no view.

    Args:
        scales: sides in pixels.

    Raises:
        TypeError: not a collection of whole numbers.
        ValueError: empty, not positive, or a duplicate.
    """
    if isinstance(scales, str) or not isinstance(scales, Iterable):
        raise TypeError(f"scales is no list: {scales!r}: give a list such as [32, 64, 128, 224]")
    sides: list[int] = []
    for scale in scales:
        if isinstance(scale, bool) or not hasattr(scale, "__index__"):
            raise TypeError(f"bad scale: {scale!r}: {_SIDES}")
        side_px = int(scale)
        if side_px <= 0:
            raise ValueError(f"bad scale: {side_px}: a side is at least 1 pixel")
        if side_px > _LARGEST_PX:
            raise ValueError(f"scale too large: {side_px}: give at most {_LARGEST_PX} pixels")
        if side_px in sides:
            raise ValueError(f"scale given twice: {side_px}: give each side once")
        sides.append(side_px)
    if not sides:
        raise ValueError(f"no scales: {sides}: {_SIDES}, or None for the images as they are")
    return sides


def check_reference(reference: int | str, sides: list[int]) -> int:
    """The reference as one of the sides.

    Raises:
        ValueError: It is none of them.
    """
    if str(reference) not in {str(side) for side in sides}:
        known = ", ".join(str(side) for side in sides)
        raise ValueError(f"reference is not a scale: {str(reference)!r}: choose one of {known}")
    return int(reference)
