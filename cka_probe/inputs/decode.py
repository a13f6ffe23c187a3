"""One file, PIL image or dataset item -> one float tensor: the protocol before any resize."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cka_probe.errors import one_line

__all__ = [
    "SKIP",
    "ImageError",
    "as_channels",
    "decode_image",
    "fetch",
    "float_images",
    "from_item",
    "from_pil",
    "readable_formats",
]

# What Pillow lists but does not draw: EPS runs Ghostscript, the others are stubs without pixels.
_UNDRAWN = frozenset({"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"})
# Formats whose first bytes tell them apart: files are read as one of these whatever their ending.
_SIGNED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SKIP = "use skip_bad=True (--skip-bad) to go on without such files"
_INTEGER = "convert them, x.float() / 255, and give mean= and std= if the network wants them"
_WANTED = (
    "return a PIL image, a uint8 (h, w, 3) array or a float (c, h, w) tensor, first in a tuple"
)


class ImageError(ValueError):
    """One image that cannot be read; `skip_bad` leaves it out, anything else is fatal."""


@contextlib.contextmanager
def _quiet_pil() -> Iterator[None]:
    """PIL warns of huge images, odd EXIF and palettes; under `-W error` that would stop a run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _unreadable(label: str, error: BaseException) -> ImageError:
    """The error that names the image, the reason and a hint.

    Args:
        label: the image's name in messages: a relative path or an index.
        error: the exception that reading it raised.

    Returns:
        The error to raise.
    """
    return ImageError(f"cannot read image: {label!r}: {one_line(error)}; {SKIP}")


@contextlib.contextmanager
def _reading(label: str) -> Iterator[None]:
    """Turn what PIL raises for a file it cannot decode into an `ImageError` naming `label`."""
    try:
        with _quiet_pil():
            yield
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, zlib.error, struct.error, KeyError, ...
        raise _unreadable(label, error) from error


def readable_formats() -> dict[str, str]:
    """Endings of image files -> formats, as the installed Pillow and its plugins read them."""
    Image.init()
    return {
        ending: format
        for ending, format in Image.registered_extensions().items()
        if (format in Image.OPEN and format not in _UNDRAWN) or format == "MPO"  # a JPEG inside
    }


def decode_image(path: Path, label: str) -> Tensor:
    """Decode one file: EXIF rotation, RGB, float32; the first frame of an animation.

    16-bit RGB is read at 8 bits, which is all that Pillow offers; colour profiles are not applied.

    Args:
        path: the file; its content, not its extension, decides its format.
        label: its name in messages.

    Returns:
        (3, h, w) float32 in 0..1.

    Raises:
        ImageError: the file is missing, truncated, no image, or larger than Pillow's safety limit
            (`2 * PIL.Image.MAX_IMAGE_PIXELS`).
    """
    # Other formats by their ending alone: some have no signature, and broken files would pass.
    formats = {*_SIGNED, readable_formats().get(path.suffix.lower(), "JPEG")} & Image.OPEN.keys()
    with _reading(label), Image.open(path, formats=sorted(formats)) as image:
        return _pixels(image)


def from_pil(image: Image.Image, label: str) -> Tensor:
    """Decode a PIL image as `decode_image` decodes the same file.

    Args:
        image: an image of any mode.
        label: its name in messages.

    Returns:
        (3, h, w) float32 in 0..1.

    Raises:
        ImageError: its pixels cannot be read.
    """
    with _reading(label):
        return _pixels(image)


def from_item(item: Any, label: str) -> tuple[Tensor, bool]:
    """Take the image out of what a dataset returned.

    Args:
        item: an image, a tuple or list that begins with one, or a mapping with the key "image".
            An image is a PIL image, a uint8 array (h, w) or (h, w, 1|3|4), or a float tensor
            (c, h, w).
        label: its name in messages.

    Returns:
        The image (c, h, w), and True if it came as pixels: RGB in 0..1, to be normalised.

    Raises:
        ImageError: the pixels of a PIL image cannot be read.
        TypeError: not an image, or a tensor of integers.
        ValueError: a tensor that is not (c, h, w).
    """
    if isinstance(item, Mapping):
        if "image" not in item:
            keys = ", ".join(repr(key) for key in item)
            raise TypeError(f"item without 'image': {label!r} has {keys or 'no keys'}: {_WANTED}")
        item = item["image"]
    elif isinstance(item, tuple | list) and len(item) > 0:
        item = item[0]
    if isinstance(item, Image.Image):
        return from_pil(item, label), True
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        if item.ndim == 3 and item.shape[2] == 1:
            item = item[:, :, 0]
        if item.size and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
            return from_pil(Image.fromarray(item), label), True
    if isinstance(item, Tensor):
        float_images(item, label, "(c, h, w)")
        return item.detach().as_subclass(Tensor).cpu(), False
    kind = type(item).__name__
    if isinstance(item, np.ndarray):
        kind = f"{item.dtype} array {item.shape}"
    raise TypeError(f"item is no image: {label!r} is {kind}: {_WANTED}")


def fetch(dataset: Any, index: int, label: str) -> Any:
    """Ask a dataset for one item; a file that it cannot read is an ImageError.

    Args:
        dataset: anything with integer indices.
        index: which item.
        label: its name in messages.

    Returns:
        What the dataset returned.

    Raises:
        ImageError: the dataset met a file that is missing or broken.
        ValueError: the dataset raised something else.
    """
    try:
        with _quiet_pil():
            return dataset[index]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(label, error) from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        name = type(dataset).__name__
        text = f"dataset {name} failed: item {label!r}, {one_line(error)}: check its __getitem__"
        raise ValueError(text) from error


def float_images(x: Tensor, label: str, shape: str) -> None:
    """Refuse a tensor that cannot be used as it is.

    Args:
        x: a tensor of images.
        label: its name in messages.
        shape: the axes that it must have, "(c, h, w)" or "(n, c, h, w)".

    Raises:
        TypeError: integer, boolean or complex values.
        ValueError: another number of axes, or an axis of length 0.
    """
    if not x.is_floating_point():
        raise TypeError(f"images are not float: {label!r} is {x.dtype}: {_INTEGER}")
    if x.ndim != shape.count(",") + 1 or 0 in x.shape:
        found = tuple(x.shape)
        raise ValueError(f"images of the wrong shape: {label!r} is {found}: give {shape}")


def _pixels(image: Image.Image) -> Tensor:
    """Load, rotate, convert: (3, h, w) float32 in 0..1."""
    image.load()  # first: it reads EXIF that follows the pixels, and turns TIFFs by itself
    with contextlib.suppress(Exception):  # Pillow raises on broken EXIF; the pixels are fine
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float32) / np.float32(65535))
    if image.mode in ("I", "F"):
        return _grey(_scaled(np.asarray(image), 65535 if image.mode == "I" else 1))
    if image.mode == "La":
        image = image.convert("LA")
    rgb = torch.from_numpy(np.array(image.convert("RGB")))  # (h, w, 3) uint8
    return rgb.permute(2, 0, 1).contiguous().float().div_(255)  # (3, h, w)


def as_channels(image: Tensor, channels: int) -> Tensor:
    """Pixels for a network of one channel or three.

    Args:
        image: (3, h, w), RGB.
        channels: 1 for luma (ITU-R 601, as Pillow converts to "L"), 3 for the image itself.

    Returns:
        (channels, h, w).
    """
    if channels != 1:
        return image
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)
    return (image * weights).sum(0, keepdim=True)


def _scaled(values: NDArray[Any], white: int) -> NDArray[np.float32]:
    """Divide by the white level; 32-bit files state none, and a guess for each would split a set.

    Args:
        values: (h, w).
        white: 65535 of integers, as Pillow scales 16-bit files to it; 1 of floats.
    """
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= white:
        return (values / white).astype(np.float32)
    hint = "divide the whole set by its white level, or save it as 8 or 16 bits"
    raise ValueError(f"32-bit values {low:g} to {high:g} lie outside 0..{white}; {hint}")


def _grey(values: NDArray[np.float32]) -> Tensor:
    """(h, w) in 0..1 -> (3, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(values)).expand(3, -1, -1).contiguous()
