"""What distinguishes one multi-scale network from another: a few choices, and the two presets.

Sizes are integers and the choices are made on their squares, so that no rounding decides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cka_probe.inputs import views

__all__ = ["POLICIES", "Policy", "check_scales", "fed", "merge_grid", "policy_of"]
__all__ += ["RAW_TAU"]
__all__ += ["is_native", "route", "served"]

Grid = tuple[int, int]
# Below it the raw constraint counts as 0; the value that the paper's authors took for ResNet-50.
RAW_TAU = 0.01


@dataclass(frozen=True)
class Policy:
    """The choices; every field may be exchanged for another of its values.

    Attributes:
        subnets: "own", each scale has a copy of the head with its own weights, or "shared", the
            head itself with other strides.
        merge: the grid that the trunk runs at: "full", always the reference scale's; "follow",
            half of that for inputs up to 4/7 of the reference side, else the input's own; or
            "native", always the input's own, so that no stride is taken out: with shared subnets
            and private norms that is RS-Net (Wang et al. 2020).
        norm: batch norms that several scales use: one "shared" by all, or one "private" to each.
        routing: "ceil", the smallest scale that is not below the input, else the largest; "nearest"
            in log ratio, ties to the larger; or "up", as "ceil" up to the last scale below the
            reference, and the nearer of these two above it: an image loses nothing by being
            enlarged, and a small scale's subnet costs about what another's does.
        inputs: "scale", an image is resized to the scale that serves it, in its aspect, since sizes
            between the scales are not what the subnets learned; "native", it is fed as it is; or
            "small", resized where a scale below the reference serves it, else fed as it is. An
            image that is enlarged costs what its scale costs; resizes are antialiased.
        strides: which strided steps of a head a small subnet loses, its "last" ones or its "first";
            the latter keeps every pixel for longer and costs more. One and the same where all go.
            A stride of 3 or 7 has no divisor and goes whole, and one that goes early can give a
            grid that is finer than wanted up to the cut: a scale near the reference can then cost
            more than it, up to 1.2 times (AlexNet cut after features.11, 124 and 224 px).
        antialias: whether maps are shrunk to the merge grid with antialiasing.
        constraint: what training pulls together by default: "raw" or "normalised" features.
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
        """The same policy with other choices; those that are None stay.

        Args:
            choices: values by field name.

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
        preset: its name.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if preset not in POLICIES:
        raise ValueError(f"unknown preset: {preset!r}: choose {' or '.join(map(repr, POLICIES))}")
    return POLICIES[preset]


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The trained sides in pixels, ascending; raises as `cka_probe.inputs.views.check_scales`."""
    if not isinstance(scales, str) and not list(scales):
        raise ValueError("no scales: none: give sides in pixels, such as 32,128,224")
    return tuple(sorted(views.check_scales(scales)))


def route(scales: Sequence[int], h: int, w: int, routing: str) -> int:
    """The scale whose subnet serves an image; its side is sqrt(h w).

    Args:
        scales: ascending sides in pixels.
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


def served(scales: Sequence[int], routing: str) -> dict[int, tuple[int, int]]:
    """The lowest and highest side that each scale serves, from the smallest scale to the largest.

    Args:
        scales: ascending sides in pixels.
        routing: as in `Policy`.
    """
    found: dict[int, tuple[int, int]] = {}
    for side in range(scales[0], scales[-1] + 1):
        scale = route(scales, side, side, routing)
        found[scale] = (found.get(scale, (side, side))[0], side)
    return found


def is_native(policy: Policy, scale: int, reference: int) -> bool:
    """Whether a subnet gets images as they are.

    Args:
        policy: the choices.
        scale: whose subnet.
        reference: the largest scale.
    """
    return policy.inputs == "native" or (policy.inputs == "small" and scale == reference)


def fed(policy: Policy, h: int, w: int, scale: int, reference: int) -> Grid:
    """The size at which a subnet gets an image.

    Args:
        policy: the choices.
        h: height of the image in pixels.
        w: width in pixels.
        scale: the scale whose subnet serves it.
        reference: the largest scale.
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
    """The grid that an image's map is brought to, before it is rounded to what the tail takes.

    Args:
        policy: the choices.
        h: height of the image in pixels.
        w: width in pixels.
        scale: the scale whose subnet serves it.
        reference: the largest scale.
        full: the grid of a square image at the reference scale.
        native: what the reference subnet would give for the image.

    Returns:
        (rows, columns), in the image's aspect.
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
