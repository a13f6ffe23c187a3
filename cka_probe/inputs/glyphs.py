"""The embedded images: 62 characters drawn from the text faces that matplotlib ships.

A class is told by thin strokes (serifs, bars, the tail of a Q), so what separates the classes goes
as the picture shrinks: at 64 px every class can be told from every other, at 8 px many cannot.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

__all__ = ["CLASSES", "TEST_FACES", "TRAIN_FACES", "Glyphs", "draw", "tensor"]

CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")

# A character map is no proof: LastResortHE, cmex10 and cmsy10 claim all 62 and draw boxes and
# brackets. These were looked at, one by one.
TRAIN_FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)
_UNSEEN_FACES = (
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneralBol.ttf",
    "cmti10.ttf",
)
TEST_FACES = TRAIN_FACES + _UNSEEN_FACES
_SPLITS = {"train": (0, TRAIN_FACES), "test": (1, TEST_FACES)}

# A class never uses the faces in which it is another class: I and l are one plain bar there, O is
# as narrow as the 0 of other faces, l has the flag of a 1.
_BARS = tuple(f for f in TEST_FACES if f.startswith(("DejaVuSans.", "DejaVuSans-", "cmss")))
_NARROW = tuple(f for f in TEST_FACES if f.startswith(("DejaVuSansMono", "cmtt")))
_AVOID = {"I": _BARS, "l": (*_BARS, "STIXGeneral.ttf"), "O": _NARROW}

_MASTER_PX = 128  # side of the pre-rendered pictures
_CAP_PX = 48  # height of an H in them, in every face: 24 px of 64
_CHUNK = 256  # images warped at once; a result does not depend on it
_DRAWS = 12  # uniform numbers an image takes before its noise


@lru_cache(maxsize=len(TEST_FACES))
def _masters(face: str) -> Tensor:
    """All characters of a face, once, large: (62, 128, 128) uint8, ink 255, on one base line."""
    import matplotlib  # only its font files are used, and only where characters are drawn

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", face)
    if not path.is_file():
        raise ValueError(
            f"matplotlib came without one of its fonts: {face!r}: reinstall matplotlib"
        )
    layout = ImageFont.Layout.BASIC
    cap_px = -ImageFont.truetype(str(path), 1000, layout_engine=layout).getbbox("H", anchor="ls")[1]
    font = ImageFont.truetype(str(path), round(1000 * _CAP_PX / cap_px), layout_engine=layout)
    pictures = []
    for character in CLASSES:
        picture = Image.new("L", (_MASTER_PX, _MASTER_PX))
        left, _, right, _ = font.getbbox(character, anchor="ls")
        corner = ((_MASTER_PX - left - right) / 2, (_MASTER_PX + _CAP_PX) / 2)
        ImageDraw.Draw(picture).text(corner, character, fill=255, font=font, anchor="ls")
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures))


def _faces_of(label: int, split: str) -> list[str]:
    """The faces that a class is drawn from in this split."""
    return [face for face in _SPLITS[split][1] if face not in _AVOID.get(CLASSES[label], ())]


def _randomness(
    split: int, seed: int, index: int, pixels: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """What is random in an image, from its own name: (12,) in 0..1, (pixels,) normal."""
    generator = np.random.default_rng([seed, split, index])
    return generator.random(_DRAWS), generator.standard_normal(pixels, dtype=np.float32)


def _check(split: str, n: int, seed: int, size_px: int) -> None:
    if split not in _SPLITS:
        raise ValueError(f"unknown split: {split!r}: use one of {', '.join(map(repr, _SPLITS))}")
    if n < 1:
        raise ValueError(f"too few images: {n}: ask for at least 1")
    if seed < 0:
        raise ValueError(f"a seed cannot be negative: {seed}: use 0 or more")
    if not 4 <= size_px <= _MASTER_PX:
        raise ValueError(f"size out of range: {size_px} px: use 4 to {_MASTER_PX}")


def draw(
    indices: range | list[int], split: str = "train", *, size_px: int = 64, seed: int = 0
) -> Tensor:
    """Grey pictures of the images with these indices; image k is of class k mod 62.

    Each image is a character (an H is 24 px of 64 high) moved by at most 5 px, turned by at most
    10 degrees, sheared by at most 0.15 and scaled by 0.92 to 1.08 (not more: an enlarged c is a C),
    dark on light or the reverse, with a contrast of 0.35 to 0.9 that fades across the picture,
    uneven light and noise.

    Args:
        indices: which images; they alone, with split and seed, decide what is drawn.
        split: "train" or "test".
        size_px: side of the pictures; drawn antialiased at this size, not shrunk from another.
        seed: another seed gives other images.

    Returns:
        (n, size_px, size_px) uint8.

    Raises:
        ValueError: for an unknown split, a negative seed or a size outside 4 to 128 px.
    """
    _check(split, 1, seed, size_px)
    pictures = torch.empty(len(indices), size_px, size_px, dtype=torch.uint8)
    for start in range(0, len(indices), _CHUNK):
        chunk = indices[start : start + _CHUNK]
        pictures[start : start + len(chunk)] = _draw_chunk(chunk, split, size_px, seed)
    return pictures


def _draw_chunk(indices: range | list[int], split: str, side: int, seed: int) -> Tensor:
    number = _SPLITS[split][0]
    uniform, normal = zip(
        *(_randomness(number, seed, i, side * side) for i in indices), strict=True
    )
    u = torch.from_numpy(np.stack(uniform, axis=1))  # (12, n) float64
    noise = torch.from_numpy(np.stack(normal)).view(-1, side, side)
    ink = []
    for index, share in zip(indices, u[0].tolist(), strict=True):
        choice = _faces_of(index % len(CLASSES), split)
        ink.append(_masters(choice[int(share * len(choice))])[index % len(CLASSES)])
    mask = _warp(torch.stack(ink).float() / 255, u[1:6], side)  # (n, s, s)

    contrast = 0.35 + 0.55 * u[6]
    low = (1 - contrast) * u[7]
    sign = torch.where(u[8] < 0.5, 1.0, -1.0)
    ground = torch.where(sign > 0, low, low + contrast)
    x = torch.linspace(-1, 1, side, dtype=torch.float64)
    way = _each(2 * torch.pi * u[9])
    ramp = torch.cos(way) * x + torch.sin(way) * x[:, None]  # (n, s, s)
    stroke = _each(sign * contrast) * (1 + 0.25 * ramp) * mask
    grey = _each(ground) + stroke + _each(0.16 * (u[10] - 0.5)) * ramp
    grey += _each(0.02 + 0.06 * u[11]) * noise
    return (grey.clamp(0, 1) * 255).round().to(torch.uint8)


def _each(values: Tensor) -> Tensor:
    """One number an image, (n,) -> (n, 1, 1)."""
    return values[:, None, None]


def _warp(ink: Tensor, u: Tensor, side: int) -> Tensor:
    """Large characters (n, 128, 128) moved, turned, sheared, scaled: (n, side, side) in 0..1.

    Sampled on a grid at least as fine as the masters, then averaged over squares: antialiased.
    """
    moved = (2 * u - 1) * torch.tensor([[10 / 64], [10 / 64], [np.pi / 18], [0.15], [0.08]])
    dx, dy, turn, shear, grow = moved.float()
    cos, sin = torch.cos(turn) / (1 + grow), torch.sin(turn) / (1 + grow)
    # From output to input coordinates, both in -1..1: shear after the inverse turn.
    rows = [cos + shear * sin, -sin + shear * cos, -dx, sin, cos, -dy]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)  # (n, 2, 3)
    fine = -(-_MASTER_PX // side)  # rounded up
    shape = [len(ink), 1, side * fine, side * fine]
    grid = functional.affine_grid(theta, shape, align_corners=False)
    warped = functional.grid_sample(ink[:, None], grid, align_corners=False)
    return functional.avg_pool2d(warped, fine)[:, 0]


def _normalise(pictures: Tensor) -> Tensor:
    """Grey (..., s, s) uint8 -> three equal channels (..., 3, s, s), 0..255 mapped to -1..1."""
    values = pictures.unsqueeze(-3).float() / 127.5 - 1
    return values.expand(*values.shape[:-3], 3, *values.shape[-2:])


def tensor(
    split: str = "train", n: int = 20000, seed: int = 0, *, size_px: int = 64
) -> tuple[Tensor, Tensor]:
    """The first n images of a split at once: the same values as `Glyphs`, many times faster.

    Args:
        split: "train" or "test".
        n: number of images; the classes differ by at most one image.
        seed: another seed gives other images.
        size_px: side of the images.

    Returns:
        (images (n, 3, s, s) float32 in -1..1, labels (n,) int64). The three channels are equal and
        share their memory (20,000 images take 0.33 GB): `clone` before writing into them.

    Raises:
        ValueError: for an unknown split, n < 1, a negative seed or a size outside 4 to 128 px.
    """
    _check(split, n, seed, size_px)
    pictures = draw(range(n), split, size_px=size_px, seed=seed)
    return _normalise(pictures), torch.arange(n) % len(CLASSES)


class Glyphs(Dataset[tuple[Tensor, int]]):
    """Images of characters with labels, drawn when asked for.

    An image depends on (split, seed, index) alone: not on the order of access, the worker or the
    global random state, of which none is read or moved. It is a pure function of its name on one
    machine; another FreeType or NumPy may move single pixels. The splits share no image. "test"
    also draws from four faces that "train" never uses (`TEST_FACES` without `TRAIN_FACES`:
    DejaVuSansMono-Bold, DejaVuSerif-Italic, STIXGeneralBol, cmti10), about a fifth of its images.

    Args:
        split: "train" or "test".
        n: number of images; index k is of class k mod 62, so the classes are balanced.
        size_px: side of the images.
        seed: another seed gives other images.

    Raises:
        ValueError: for an unknown split, n < 1, a negative seed or a size outside 4 to 128 px.

    Example:
        >>> image, label = Glyphs("test", n=100)[27]
        >>> image.shape, CLASSES[label]
        (torch.Size([3, 64, 64]), 'b')
    """

    def __init__(self, split: str = "train", n: int = 20000, size_px: int = 64, seed: int = 0):
        _check(split, n, seed, size_px)
        self.split, self.n, self.size_px, self.seed = split, n, size_px, seed
        self.classes = CLASSES

    def __len__(self) -> int:
        """Return the number of images."""
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image (3, s, s) float32 in -1..1, its three channels equal, and its label."""
        if not -self.n <= index < self.n:
            raise IndexError(f"no such image: {index}: there are {self.n}")
        index = int(index) % self.n
        picture = draw([index], self.split, size_px=self.size_px, seed=self.seed)[0]
        return _normalise(picture).contiguous(), index % len(CLASSES)
