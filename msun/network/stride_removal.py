"""Remove strides from a head, so that the map of a small image keeps a larger grid.

A step is the set of strided modules that reduce the same grid: a convolution and its shortcut, or
parallel branches. Its stride is removed from all of them at once. Later layers can be dilated, so
that the pixels of the old grid keep their values (the "a trous" algorithm, Holschneider et al.
1989).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from cka_probe.activations.meta import meta_copy
from msun.cutting.halves import Part
from msun.network.shallow_copy import replace_module, shallow, shallow_part
from msun.network.shape_probe import ShapeProbe

__all__ = [
    "Leaf",
    "Removal",
    "Step",
    "remove_strides",
    "same_form",
    "steps",
    "trace_strides",
    "with_stride",
]

_M = TypeVar("_M", bound=nn.Module)
_MOST_PADDING = 16  # more than any kernel of use lacks
# Forwards of torch itself, whose output size is known; subclasses (timm) may pad on their own.
_STOCK = {nn.Conv2d.forward, nn.MaxPool2d.forward, nn.AvgPool2d.forward}


class Leaf(NamedTuple):
    """One run of a module in a head.

    Attributes:
        path: path of the module.
        jump: distance in image pixels between neighbours of its input map.
        stride: factor by which it reduces that map; 1 for most.
        shape: shape of its input.
        padded: whether that input was padded by a step of its own (F.pad, nn.ZeroPad2d).
    """

    path: str
    jump: int
    stride: int
    shape: tuple[int, ...]
    padded: bool = False


class Step(NamedTuple):
    """The modules that reduce one grid.

    Attributes:
        jump: distance in image pixels between neighbours of that grid.
        stride: factor by which the grid is reduced.
        paths: paths of the modules.
    """

    jump: int
    stride: int
    paths: tuple[str, ...]


class Removal(NamedTuple):
    """A head with strides removed.

    Attributes:
        head: the new head.
        grid: grid of its map for an image of the scale, (rows, columns).
        changes: module path -> (old stride, new stride).
    """

    head: Part
    grid: tuple[int, int]
    changes: dict[str, tuple[int, int]]


def trace_strides(head: Part, probe: ShapeProbe, shape: tuple[int, ...]) -> list[Leaf]:
    """Run a head on its probe, and record stride and input of each module.

    Args:
        head: the head.
        probe: the probe of the head.
        shape: shape of a valid input, (n, c, h, w).

    Returns:
        The runs of modules, in order of execution.
    """
    recorder = _Recorder(probe.module, head.cut_graphs[False])
    with torch.no_grad():
        recorder.run(torch.zeros(shape, dtype=probe.dtype, device=probe.device))
    return recorder.leaves


class _Recorder(fx.Interpreter):
    """Runs a graph and multiplies strides along it."""

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
            stride = _reduction(module, taken, out)
            shape, padded = tuple(taken.shape), self._pads(given[0])
            self.leaves.append(Leaf(str(n.target), jump, stride, shape, padded))
            jump *= stride
        self.jumps[n] = jump
        return out

    def _pads(self, n: fx.Node) -> bool:
        """Whether a node is a padding."""
        if n.op == "call_module":
            return type(self.fetch_attr(str(n.target))).__module__ == "torch.nn.modules.padding"
        return n.op == "call_function" and getattr(n.target, "__name__", "") == "pad"


def _reduction(module: nn.Module, taken: Tensor, out: Any) -> int:
    """The factor by which a module reduces a map through strides that can be changed; else 1."""
    inside = [part for part in module.modules() if stride_of(part) > 1]
    if not inside or not isinstance(out, Tensor) or out.ndim != 4 or taken.ndim != 4:
        return 1
    if inside == [module]:
        return stride_of(module)
    return max(1, round(taken.shape[-1] / out.shape[-1]))


def stride_of(module: nn.Module) -> int:
    """The stride of a convolution, pooling or blur; 1 for other modules and upsampling."""
    stride = getattr(module, "stride", 1)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1
    return max((side for side in _pair(stride) if isinstance(side, int)), default=1)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def steps(leaves: list[Leaf]) -> list[Step]:
    """The steps of a head, in order of execution.

    Args:
        leaves: result of `trace_strides`.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for leaf in leaves:
        if leaf.stride > 1:
            found.setdefault((leaf.jump, leaf.stride), []).append(leaf.path)
    return [Step(*key, tuple(dict.fromkeys(found[key]))) for key in sorted(found)]


def with_stride(module: _M, stride: int, dilation: int = 1, most: int | None = None) -> _M:
    """A shallow copy of a module with another stride and dilation.

    Its output has the side ceil(input / stride). Padding grows only at the right and the bottom, so
    that the pixels of the old grid keep their values. They may differ near these two borders if the
    old layer ignored pixels there (no padding).

    Args:
        module: a convolution, a pooling, or a container of them; left unchanged.
        stride: the new stride.
        dilation: factor by which the input map became finer.
        most: the most padding to add at the right and the bottom; None for as much as it takes.

    Raises:
        ValueError: a module that cannot be dilated.
    """
    copied = shallow(module)
    made: Any = copied  # without a type: the attributes below depend on the class
    if module._modules and not is_parametrized(module):
        if dilation > 1:
            raise ValueError(
                f"a layer cannot be dilated: {type(module).__name__}: choose start 'copied'"
            )
        for name, child in module._modules.items():
            if child is not None and any(stride_of(part) > 1 for part in child.modules()):
                made._modules[name] = with_stride(child, stride, most=most)
        return copied
    kernel, padding = getattr(module, "kernel_size", None), getattr(module, "padding", None)
    changed = stride_of(module) != stride
    if changed:
        made.stride = same_form(made.stride, stride)
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
        return copied
    extra = (0, 0)
    if changed:
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            made.ceil_mode = False
        shape = _pair(kernel), _pair(getattr(made, "dilation", 1)), _pair(made.padding)
        # a window of dilated width (k - 1) d + 1 gives ceil(side / stride) if 2 p reaches (k - 1) d
        short = [max(0, (k - 1) * d - 2 * p) for k, d, p in zip(*shape, strict=True)]
        if any(short) and _falls_short(made, stride):
            limit = max(short) if most is None else most
            extra = (min(short[0], limit), min(short[1], limit))
    before = (0, 0)
    if dilation > 1 and isinstance(module, nn.MaxPool2d):  # torch limits its padding to kernel / 2
        before, made.padding = _pair(made.padding), 0
    if any(extra) or any(before):
        made.register_forward_pre_hook(_Pad(before, extra, made))
    return copied


def same_form(old: Any, stride: int) -> Any:
    """A stride in the form of the old one: a number, or one number per axis."""
    return type(old)([stride] * len(old)) if isinstance(old, tuple | list) else stride


def _falls_short(module: nn.Module, stride: int) -> bool:
    """Whether a convolution or pooling gives less than ceil(side / stride) without more padding."""
    if type(module).forward in _STOCK:
        return True
    side = 64 * stride  # larger than the window of any usual layer
    made = meta_copy(module)
    channels: Any = getattr(module, "in_channels", 4)
    try:
        out = made(torch.zeros(1, channels, side, side, device="meta"))
    except (RuntimeError, TypeError, ValueError):
        return True
    return bool(out.shape[-1] < side // stride)


class _Pad:
    """Forward pre-hook that pads the input of a layer, more at the bottom and right."""

    part_of_layer = True  # `meta_copy` keeps such hooks

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
    """Remove strides step by step, until the grid of a small image reaches the wanted one.

    A stride of 4 becomes 2 if that is enough; a prime stride (3 or 7) becomes 1, which may give a
    larger grid than wanted. A step stays if the head fails without its stride, or if the grid does
    not grow even together with the next steps.

    Args:
        head: the head; left unchanged, and the new one shares its parameters.
        side: side of the small images in pixels.
        wanted: wanted grid, (rows, columns).
        known: shape of a valid input of the head, (n, c, h, w).
        axes: axes of rows and columns in its map.
        dilated: whether to dilate later layers, so that the pixels of the old grid keep their
            values.
        first: whether to begin with the first step, which keeps every pixel for longer and costs
            more; else with the last.

    Returns:
        The new head, its grid and the changed strides.

    Raises:
        ValueError: a side that the head cannot take, or a module that cannot be dilated.
    """
    probe = ShapeProbe(head, known)
    leaves = trace_strides(head, probe, known)
    image = (*known[:2], side, side)
    channels = _channels(probe.run(known).shape, axes)

    def grid_of(of: Part) -> tuple[tuple[int, int], str]:
        result = ShapeProbe(of, like=probe).run(image)
        shape = result.shape
        if result.fault or len(shape) != 4 or _channels(shape, axes) != channels:
            return (0, 0), result.fault or "another map"
        return (shape[axes[0]], shape[axes[1]]), ""

    padded = {leaf.path for leaf in leaves if leaf.padded and leaf.stride > 1}
    best, strides = shallow_part(head), dict[tuple[int, int], int]()
    paddings = dict[str, int]()
    grid, fault = grid_of(best)
    every = steps(leaves)
    # Strides whose removal had no effect alone: on tiny maps sides are rounded up, and only several
    # together enlarge the grid.
    pending = dict[tuple[int, int], int]()
    for step in every if first else reversed(every):
        for stride in _smaller(step.stride):
            if grid[0] >= wanted[0] and grid[1] >= wanted[1]:
                break
            for more in ({}, pending) if pending else ({},):
                tried = {**strides, **more, step[:2]: stride}
                attempt = _changed(head, leaves, every, tried, paddings, dilated=dilated)
                finer, _ = grid_of(attempt)
                if finer[0] * finer[1] > grid[0] * grid[1]:
                    best, strides, grid = attempt, tried, finer
                    pending = {}
                    # Where the head pads by itself, more padding would make the map too large.
                    own = padded & {path for s in every if s[:2] in tried for path in s.paths}
                    for most in range(_MOST_PADDING) if own - paddings.keys() else ():
                        less = {**dict.fromkeys(own, most), **paddings}
                        attempt = _changed(head, leaves, every, tried, less, dilated=dilated)
                        found, _ = grid_of(attempt)
                        if all(f >= min(w, g) for f, w, g in zip(found, wanted, grid, strict=True)):
                            best, grid, paddings = attempt, found, less
                            break
                    break
            else:
                if finer[0]:
                    pending[step[:2]] = stride
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
    paddings: Mapping[str, int],
    *,
    dilated: bool,
) -> Part:
    """A shallow copy of a head with other strides, and the most padding, at some steps."""
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
                f"the old pixels cannot be kept: {leaf.path!r} still has a stride after a "
                "removed one: choose start 'copied'"
            )
        if leaf.path in new or _has_kernel(module):
            replace_module(
                made, leaf.path, with_stride(module, stride, finer, paddings.get(leaf.path))
            )
    return made


def _has_kernel(module: nn.Module) -> bool:
    """Whether a module has a convolution or pooling with a kernel above 1 x 1."""
    kernels = (getattr(part, "kernel_size", 1) for part in module.modules())
    return any(set(_pair(kernel)) - {1} for kernel in kernels)
