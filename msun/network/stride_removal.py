"""Taking the strides out of a head, so that a small image keeps a larger grid.

A step is all strided modules that reduce the same grid: a convolution and its shortcut, parallel
branches. It is taken out whole, last step first. What follows may be dilated, so that the pixels
of the old grid keep their values (Holschneider et al. 1989, the "a trous" algorithm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cka_probe.activations.meta import meta_copy
from msun.cutting.dataflow import Part
from msun.network.shallow_copy import put, shallow, shallow_part
from msun.network.shape_probe import ShapeProbe

__all__ = ["Leaf", "Removal", "Step", "like_old", "look", "remove_strides", "steps", "with_stride"]

_M = TypeVar("_M", bound=nn.Module)
_STOCK = {nn.Conv2d.forward, nn.MaxPool2d.forward, nn.AvgPool2d.forward}


class Leaf(NamedTuple):
    """A module that a head runs, seen at work.

    Attributes:
        path: where it stands in the head.
        jump: pixels of the image between neighbours of the map that it takes in.
        stride: by how much it thins that map; 1 for most.
        shape: of what it took in.
    """

    path: str
    jump: int
    stride: int
    shape: tuple[int, ...]


class Step(NamedTuple):
    """The modules that reduce one grid.

    Attributes:
        jump: pixels of the image between neighbours of that grid.
        stride: by how much it is thinned.
        paths: the modules.
    """

    jump: int
    stride: int
    paths: tuple[str, ...]


class Removal(NamedTuple):
    """A head with strides taken out.

    Attributes:
        head: the head.
        grid: what it gives for an image of the scale.
        changes: module path -> (old stride, new stride).
    """

    head: Part
    grid: tuple[int, int]
    changes: dict[str, tuple[int, int]]


def look(head: Part, shadow: ShapeProbe, shape: tuple[int, ...]) -> list[Leaf]:
    """What each module of a head does with an image, in order of execution.

    Args:
        head: the head.
        shadow: its copy without data.
        shape: of images that it takes, (n, c, h, w).
    """
    recorder = _Recorder(shadow.module, head.cut_graphs[False])
    with torch.no_grad():
        recorder.run(torch.zeros(shape, dtype=shadow.dtype, device=shadow.device))
    return recorder.leaves


class _Recorder(fx.Interpreter):
    def __init__(self, head: nn.Module, graph: fx.Graph) -> None:
        super().__init__(head, graph=graph)
        self.jumps: dict[fx.Node, int] = {}
        self.leaves: list[Leaf] = []

    def run_node(self, n: fx.Node) -> Any:
        given = [a for a in n.all_input_nodes if isinstance(self.env[a], Tensor)]
        taken = self.env[given[0]] if given else None
        out = super().run_node(n)
        jump = max((self.jumps[a] for a in n.all_input_nodes), default=1)
        if n.op == "call_module" and isinstance(taken, Tensor):
            module = self.fetch_attr(str(n.target))
            stride = _thinning(module, taken, out)
            self.leaves.append(Leaf(str(n.target), jump, stride, tuple(taken.shape)))
            jump *= stride
        self.jumps[n] = jump
        return out


def _thinning(module: nn.Module, taken: Tensor, out: Any) -> int:
    """By how much a module thins a map, where strides that can be changed do so; else 1."""
    inside = [part for part in module.modules() if stride_of(part) > 1]
    if not inside or not isinstance(out, Tensor) or out.ndim != 4 or taken.ndim != 4:
        return 1
    if inside == [module]:
        return stride_of(module)
    return max(1, round(taken.shape[-1] / out.shape[-1]))


def stride_of(module: nn.Module) -> int:
    """The stride of a convolution, a pooling or a blur; 1 for what has none, or enlarges."""
    stride = getattr(module, "stride", 1)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1
    return max((side for side in _pair(stride) if isinstance(side, int)), default=1)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def steps(leaves: list[Leaf]) -> list[Step]:
    """The steps of a head, in order of execution.

    Args:
        leaves: what `look` saw.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for leaf in leaves:
        if leaf.stride > 1:
            found.setdefault((leaf.jump, leaf.stride), []).append(leaf.path)
    return [Step(*key, tuple(dict.fromkeys(found[key]))) for key in sorted(found)]


def with_stride(module: _M, stride: int, dilation: int = 1) -> _M:
    """A module with another stride, which then gives ceil(side / stride), and dilated.

    What is kept of the old grid keeps its values: padding grows at the right and at the bottom
    only. Near those two borders they may differ where the old layers left pixels out (no padding).
    Parameters are shared.

    Args:
        module: a convolution, a pooling, or a module with such inside.
        stride: the new one.
        dilation: by how much the map that it takes in has become finer.

    Raises:
        ValueError: a module that cannot be dilated.
    """
    twin_of = shallow(module)
    made: Any = twin_of  # its attributes are not those of every module
    if module._modules:
        if dilation > 1:
            raise ValueError(
                f"a layer cannot be dilated: {type(module).__name__}: choose start 'copied'"
            )
        for name, child in module._modules.items():
            if child is not None and any(stride_of(part) > 1 for part in child.modules()):
                made._modules[name] = with_stride(child, stride)
        return twin_of
    kernel, padding = getattr(module, "kernel_size", None), getattr(module, "padding", None)
    changed = stride_of(module) != stride
    if changed:
        made.stride = like_old(made.stride, stride)
    if dilation > 1 and kernel is not None and set(_pair(kernel)) != {1}:
        if not hasattr(module, "dilation"):
            raise ValueError(
                f"a layer cannot be dilated: {type(module).__name__}: choose start 'copied'"
            )
        made.dilation = tuple(d * dilation for d in _pair(made.dilation))
        if not isinstance(padding, str):
            made.padding = tuple(p * dilation for p in _pair(padding))
            if hasattr(module, "_reversed_padding_repeated_twice"):
                twice = [p for p in reversed(made.padding) for _ in range(2)]
                made._reversed_padding_repeated_twice = twice
    if kernel is None or padding is None or isinstance(padding, str):
        return twin_of
    extra = (0, 0)
    if changed:
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            made.ceil_mode = False
        shape = _pair(kernel), _pair(getattr(made, "dilation", 1)), _pair(made.padding)
        short = [max(0, (k - 1) * d - 2 * p) for k, d, p in zip(*shape, strict=True)]
        if any(short) and _falls_short(made, stride):
            extra = (short[0], short[1])
    before = (0, 0)
    if dilation > 1 and isinstance(module, nn.MaxPool2d):  # pads at most half of its kernel itself
        before, made.padding = _pair(made.padding), 0
    if any(extra) or any(before):
        made.register_forward_pre_hook(_Pad(before, extra, made))
    return twin_of


def like_old(old: Any, stride: int) -> Any:
    """A stride written as the old one is: a number, or one for each axis."""
    return type(old)([stride] * len(old)) if isinstance(old, tuple | list) else stride


def _falls_short(module: nn.Module, stride: int) -> bool:
    """Whether a convolution or pooling gives less than ceil(side / stride) as it is."""
    if type(module).forward in _STOCK:
        return True
    side = 64 * stride
    made = meta_copy(module)
    channels: Any = getattr(module, "in_channels", 4)
    try:
        out = made(torch.zeros(1, channels, side, side, device="meta"))
    except (RuntimeError, TypeError, ValueError):
        return True
    return bool(out.shape[-1] < side // stride)


class _Pad:
    """Pads what a layer is about to take in, on all sides and more at the bottom and the right."""

    part_of_layer = True

    def __init__(self, all_round: tuple[int, int], extra: tuple[int, int], layer: Any) -> None:
        (y, x), (bottom, right) = all_round, extra
        self.sides = (x, x + right, y, y + bottom)
        self.value = float("-inf") if isinstance(layer, nn.MaxPool2d) else 0.0
        self.mode = "replicate" if isinstance(layer, nn.AvgPool2d) else "constant"

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = self.value if self.mode == "constant" else None
        return F.pad(args[0], self.sides, mode=self.mode, value=value), *args[1:]


def remove_strides(
    head: Part,
    side: int,
    wanted: tuple[int, int],
    *,
    known: tuple[int, ...],
    axes: tuple[int, int] = (2, 3),
    dilated: bool = False,
    first: bool = False,
) -> Removal:
    """Take steps out of a head, one by one, until a small image's grid meets a wanted one.

    The last one first, or the first. A stride of 4 becomes 2 where that suffices; one of 3 or 7
    has no divisor and becomes 1, which may overshoot. A step that cannot go (the head would not
    run, or gives no larger grid even with the next ones) stays, and the next in turn is tried.

    Args:
        head: left as it is; the new one shares its parameters.
        side: of the small images, in pixels.
        wanted: the grid to meet.
        known: shape of images that the head takes, (n, c, h, w).
        axes: where rows and columns stand in its map.
        dilated: dilate what follows, so that the old grid's pixels keep their values.
        first: take the first steps first, which keeps every pixel for longer and costs more.

    Raises:
        ValueError: images of that side cannot be taken, or a module that cannot be dilated.
    """
    shadow = ShapeProbe(head, known)
    leaves = look(head, shadow, known)
    image = (*known[:2], side, side)
    channels = _channels(shadow.see(known).shape, axes)

    def grid_of(of: Part) -> tuple[tuple[int, int], str]:
        seen = ShapeProbe(of, like=shadow).see(image)
        if seen.fault or len(seen.shape) != 4 or _channels(seen.shape, axes) != channels:
            return (0, 0), seen.fault or "another map"
        return (seen.shape[axes[0]], seen.shape[axes[1]]), ""

    best, strides = shallow_part(head), dict[tuple[int, int], int]()
    grid, fault = grid_of(best)
    every = steps(leaves)
    vain = dict[tuple[int, int], int]()  # of tiny maps: sides are rounded up, so one alone is none
    for step in every if first else reversed(every):
        for stride in _smaller(step.stride):
            if grid[0] >= wanted[0] and grid[1] >= wanted[1]:
                break
            for more in ({}, vain) if vain else ({},):
                tried = {**strides, **more, step[:2]: stride}
                attempt = _changed(head, leaves, every, tried, dilated=dilated)
                finer, _ = grid_of(attempt)
                if finer[0] * finer[1] > grid[0] * grid[1]:
                    best, strides, grid = attempt, tried, finer
                    vain = {}
                    break
            else:
                if finer[0]:
                    vain[step[:2]] = stride
    if not grid[0]:
        raise ValueError(
            f"the head cannot take images of this scale: {side} x {side}, {fault}: choose a "
            "larger smallest scale, or an earlier cut"
        )
    changes = {
        path: (step.stride, strides[step[:2]])
        for step in every
        for path in step.paths
        if step[:2] in strides
    }
    return Removal(best, grid, changes)


def _channels(shape: tuple[int, ...], axes: tuple[int, int]) -> list[int]:
    return [side for axis, side in enumerate(shape) if axis not in (0, *axes)]


def _smaller(stride: int) -> list[int]:
    """The divisors below a stride, largest first."""
    return [d for d in range(stride - 1, 0, -1) if stride % d == 0]


def _changed(
    head: Part,
    leaves: list[Leaf],
    every: list[Step],
    strides: Mapping[tuple[int, int], int],
    *,
    dilated: bool,
) -> Part:
    """A twin with other strides at some steps."""
    made = shallow_part(head)
    new = {path: strides[s[:2]] for s in every for path in s.paths if s[:2] in strides}
    for leaf in {leaf.path: leaf for leaf in leaves}.values():
        finer = 1
        for step in every:
            if dilated and step.jump < leaf.jump:
                finer = finer * step.stride // strides.get(step[:2], step.stride)
        if leaf.path not in new and finer == 1:
            continue
        module = head.get_submodule(leaf.path)
        stride = new.get(leaf.path, leaf.stride)
        if finer > 1 and stride > 1 and leaf.path not in new:
            raise ValueError(
                f"the old pixels cannot be kept: {leaf.path!r} still strides behind a step that "
                "was taken out: choose start 'copied'"
            )
        if leaf.path in new or _has_kernel(module):
            put(made, leaf.path, with_stride(module, stride, finer))
    return made


def _has_kernel(module: nn.Module) -> bool:
    """Whether a module looks at more than one pixel by a convolution or pooling."""
    kernels = (getattr(part, "kernel_size", 1) for part in module.modules())
    return any(set(_pair(kernel)) - {1} for kernel in kernels)
