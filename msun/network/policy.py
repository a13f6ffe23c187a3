"""The policy of a multi-scale network, the two presets, and the sizes that follow from it.

Routing compares integers (squares of sides), so that no rounding can change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cka_probe.inputs import views

__all__ = [
    "POLICIES",
    "RAW_TAU",
    "Policy",
    "fed_size",
    "is_native",
    "merge_grid",
    "policy_of",
    "route",
    "served_sides",
    "sorted_scales",
]

Grid = tuple[int, int]
# Threshold of the raw constraint, below which it counts as 0: the paper's value for ResNet-50.
RAW_TAU = 0.01


@dataclass(frozen=True)
class Policy:
    """The choices that define a multi-scale network.

    Attributes:
        subnets: weights of the subnets: "own", one copy of the head per scale, or "shared", the
            same weights with other strides.
        merge: the grid of the trunk: "full", always that of the reference; "follow", half of it for
            inputs up to 4/7 of the reference side, else the native grid; or "native", the grid of
            the unchanged head for the input, so that no stride is removed. Shared subnets with
            private norms and the native grid are RS-Net (Wang et al. 2020).
        norm: batch norms of shared layers: one "shared" by all scales, or one "private" to each.
        routing: the scale for an input: "ceil", the smallest scale that is not below it, else the
            largest; "nearest" in log ratio, ties to the larger; or "up", "ceil" up to the last
            scale below the reference, and "nearest" above it.
        inputs: the input size of a subnet: "native", images are not resized; "scale", images are
            resized to the scale that they are routed to, keeping their aspect, because subnets
            are trained at the scales; or "small", as "scale" below the reference and as "native"
            at it. Resizes are antialiased.
        strides: the strides that a small subnet loses first, the "last" or the "first" of the head.
            "first" keeps every pixel for longer and costs more. A prime stride (3 or 7) is removed
            as a whole, and early removal can give a finer grid than needed up to the cut. A scale
            near the reference can then cost up to 1.2 times as much as the reference (AlexNet cut
            after features.11, 124 and 224 px).
        antialias: whether maps that shrink to the merge grid are antialiased.
        constraint: the default scale-invariant constraint of training, as in `msun.losses`.
    """

    subnets: str = "own"
    merge: str = "follow"
    norm: str = "private"
    routing: str = "nearest"
    inputs: str = "native"
    strides: str = "last"
    antialias: bool = True
    constraint: str = "normalised"

    def __post_init__(self) -> None:
        for name, known in _VALUES.items():
            value = getattr(self, name)
            if value not in known:
                choice = " or ".join(map(repr, known))
                raise ValueError(f"unknown {name} policy: {value!r}: choose {choice}")

    def but(self, **choices: object) -> Policy:
        """A copy of the policy with some fields changed.

        Args:
            choices: new values by field name; None keeps the old value.

        Raises:
            ValueError: an unknown value.
        """
        given = {name: value for name, value in choices.items() if value is not None}
        return replace(self, **given)  # type: ignore[arg-type]


_VALUES: dict[str, tuple[object, ...]] = {
    "subnets": ("own", "shared"),
    "merge": ("full", "follow", "native"),
    "norm": ("shared", "private"),
    "routing": ("ceil", "nearest", "up"),
    "inputs": ("native", "small", "scale"),
    "strides": ("last", "first"),
    "antialias": (True, False),
    "constraint": ("none", "raw", "normalised", "cka"),
}

POLICIES: dict[str, Policy] = {
    # Liu, Zhu, Liu 2024, arXiv 2403.18294
    "paper": Policy(merge="full", norm="shared", routing="ceil", antialias=False, constraint="raw"),
    # `inputs` and `strides` were chosen in experiments/scales
    "lean": Policy(inputs="small", strides="first"),
}


def policy_of(preset: str) -> Policy:
    """The policy of a preset.

    Args:
        preset: name of the preset.

    Raises:
        ValueError: an unknown name; the message lists the known names.
    """
    if preset not in POLICIES:
        raise ValueError(f"unknown preset: {preset!r}: choose {' or '.join(map(repr, POLICIES))}")
    return POLICIES[preset]


def sorted_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Validate the scales of a network, and sort them.

    Args:
        scales: sides in pixels, in any order.

    Returns:
        The sides, ascending.

    Raises:
        TypeError, ValueError: as `cka_probe.inputs.views.check_scales`.
    """
    if not isinstance(scales, str) and not list(scales):
        raise ValueError("no scales: none: give sides in pixels, such as 32,128,224")
    return tuple(sorted(views.check_scales(scales)))


def route(scales: Sequence[int], h: int, w: int, routing: str) -> int:
    """The scale that an image is routed to, by its side sqrt(h w).

    Args:
        scales: sides in pixels, ascending.
        h: height in pixels.
        w: width in pixels.
        routing: "ceil", "nearest" or "up", as in `Policy`.
    """
    area = h * w
    if routing == "ceil":
        return next((s for s in scales if area <= s * s), scales[-1])
    if routing == "up":
        return next((s for s in scales[:-1] if area <= s * s), route(scales[-2:], h, w, "nearest"))
    # log(side / a) < log(b / side) exactly where side^2 < a b
    return next((a for a, b in pairwise(scales) if area < a * b), scales[-1])


def served_sides(scales: Sequence[int], routing: str) -> dict[int, tuple[int, int]]:
    """The range of image sides that are routed to each scale.

    Args:
        scales: sides in pixels, ascending.
        routing: "ceil", "nearest" or "up", as in `Policy`.

    Returns:
        {scale: (lowest, highest side)}, for sides from the smallest scale to the largest.
    """
    found: dict[int, tuple[int, int]] = {}
    for side in range(scales[0], scales[-1] + 1):
        scale = route(scales, side, side, routing)
        found[scale] = (found.get(scale, (side, side))[0], side)
    return found


def is_native(policy: Policy, scale: int, reference: int) -> bool:
    """Whether images of a scale are fed without resizing.

    Args:
        policy: the policy of the network.
        scale: scale of the subnet.
        reference: the largest scale.
    """
    return policy.inputs == "native" or (policy.inputs == "small" and scale == reference)


def fed_size(policy: Policy, h: int, w: int, scale: int, reference: int) -> Grid:
    """The input size of a subnet for an image.

    Args:
        policy: the policy of the network.
        h: height of the image in pixels.
        w: width in pixels.
        scale: scale of the subnet.
        reference: the largest scale.

    Returns:
        (h, w) in pixels.
    """
    return (h, w) if is_native(policy, scale, reference) else _shaped((scale, scale), h, w)


def merge_grid(
    policy: Policy,
    h: int,
    w: int,
    *,
    scale: int,
    reference: int,
    full: Grid,
    native: Callable[[], Grid],
) -> Grid:
    """The merge grid for an image, before it is rounded to a grid that the trunk takes.

    Args:
        policy: the policy of the network.
        h: height of the image in pixels.
        w: width in pixels.
        scale: scale of the subnet.
        reference: the largest scale.
        full: grid of a square image at the reference scale.
        native: function that returns the grid of the reference subnet for the image.

    Returns:
        (rows, columns), in the aspect of the image.
    """
    if policy.merge == "full":
        return _shaped(full, h, w)
    small = scale != reference and 49 * h * w <= 16 * reference**2  # sqrt(h w) <= 4/7 reference
    if policy.merge == "follow" and small:
        return _shaped((full[0] / 2, full[1] / 2), h, w)
    return native()


def _shaped(grid: tuple[float, float], h: int, w: int) -> Grid:
    """A grid of the same area in the aspect h : w; halves are rounded up."""
    stretch = math.sqrt(h / w)
    rows, columns = grid[0] * stretch, grid[1] / stretch
    return max(1, math.floor(rows + 0.5)), max(1, math.floor(columns + 0.5))
