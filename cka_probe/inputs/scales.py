"""Scales as a user gives them: sides of square views, in pixels."""

import re
from collections.abc import Iterable

__all__ = ["check_reference", "check_scales", "parse_scales"]

_LARGEST_PX = 16384  # an image of 3 GiB
_SIDES = "give sides in pixels, such as 32,64,128,224"


def parse_scales(text: str) -> list[int]:
    """Read the scales of a command line.

    Args:
        text: "32,64,128,224"; blanks around a number are fine.

    Returns:
        Sides in pixels, in the order given.

    Raises:
        ValueError: Not a number, not positive, given twice, or nothing there.
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
    """Refuse scales that name no view.

    Args:
        scales: Sides in pixels.

    Returns:
        The same as a list of plain ints.

    Raises:
        TypeError: Not a collection of whole numbers.
        ValueError: Empty, not positive, or a duplicate.
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
            raise ValueError(f"scale given twice: {side_px}: name each view once")
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
