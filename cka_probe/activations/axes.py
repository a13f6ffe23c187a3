"""Which axes of an output hold its channels, followed through the operators that made it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["LAYOUTS", "Axes", "AxisTracker", "channel_axes", "channels_to_front"]

Axes = tuple[int, ...]  # axes of (n, ...) that hold channels; never 0, which holds the images
LAYOUTS = ("channels_first", "channels_last")

# Operators that define which axis holds channels, whatever they read: axis 1.
_FIRST = re.compile(
    "(mkldnn_|cudnn_)?convolution|conv_.*|deform_conv2d|_?native_batch_norm.*|cudnn_batch_norm|"
    "batch_norm.*|native_group_norm|grid_sampler.*|cudnn_grid_sampler|col2im"
)
# The same, the last axis: products with a matrix of weights, rows of a table, recurrent layers.
_LAST = re.compile(
    "embedding|.*lstm.*|.*gru.*|.*rnn.*|_transformer_encoder_layer_fwd|"
    "_native_multi_head_attention|_trilinear"
)
_ATTENTION = re.compile("_?scaled_dot_product_.*")
_PRODUCTS = re.compile("mm|addmm|_addmm_activation|bmm|baddbmm")
_VIEWS = re.compile("view|_unsafe_view|reshape|_reshape_alias|unflatten|flatten")
_MOVES = re.compile("permute|transpose|t")
# Reductions over `dim`, an int or a list, with or without `keepdim`.
_REDUCTIONS = re.compile(
    "mean|sum|amax|amin|max|min|var|std|prod|logsumexp|linalg_vector_norm|norm|any|all|argmax|median"
)


def channel_axes(x: Tensor, known: Axes | None, module: nn.Module, layout: str | None) -> Axes:
    """The channel axes of an output (n, ...).

    In this order: the user's layout; the operators that made the output; `output_fmt` of the
    module, which timm sets ("NHWC"); channels first. An output (n, t, c) of which nothing is known
    is read as tokens.

    Args:
        x: the output, (n, ...).
        known: what `AxisTracker` found; None for nothing.
        module: the module that returned the output.
        layout: "channels_first", "channels_last" or None.

    Returns:
        Axes of `x`, in order: (1,) for (n, c, h, w), (3,) for (n, h, w, c), (1, 3) for heads
        (n, heads, t, d).
    """
    last = (x.ndim - 1,)
    if x.ndim == 2:
        return last
    if layout is not None:
        return (1,) if layout == "channels_first" else last
    if known and len(known) < x.ndim - 1:  # all axes: no positions, so nothing is known
        return known
    if str(getattr(module, "output_fmt", "")).endswith(("NHWC", "NLC")):
        return last
    return last if x.ndim == 3 else (1,)


def channels_to_front(x: Tensor, axes: Axes) -> Tensor:
    """(n, ...) -> (n, c, positions...), a view where one axis holds the channels."""
    if axes == (1,):
        return x
    x = x.movedim(axes, tuple(range(1, len(axes) + 1)))
    return x.flatten(1, len(axes)) if len(axes) > 1 else x


class AxisTracker(TorchDispatchMode):
    """Follows, within a `with`, which axes of each tensor hold channels.

    Convolutions, batch and group norms put channels in axis 1; linear layers, attention, recurrent
    layers and embeddings in the last. Permutations move the axes, views split and merge them, and
    every other operator hands on those of its first argument that has the rank of its result: a
    residual sum has the layout of its stream. Numbers are not touched.

    Args:
        inputs: the network's inputs; those of four axes and more are images, channels first.

    Attributes:
        active: False while what runs is not the network.
    """

    def __init__(self, inputs: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active = True
        # Axis 0 among them: channels were merged with the images, as (n * heads, t, d).
        self._axes: Any = WeakTensorKeyDictionary()
        for x in inputs:
            if x.ndim >= 4:
                self._axes[x] = frozenset({1})

    def axes(self, x: Tensor) -> Axes | None:
        """The channel axes of a tensor; None where they are not known."""
        found = self._axes.get(x, frozenset()) - {0}
        return tuple(sorted(found)) or None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note the channel axes of its results."""
        before = [(t, tuple(t.shape)) for t in _tensors(args)]  # in-place operators change shapes
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.removesuffix("_")
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        for tensor in _tensors(out) if self.active else ():
            try:
                found = self._find(name, before, given, tensor)
            except (IndexError, KeyError, TypeError, ValueError):
                found = frozenset()  # an operator with arguments of an unforeseen form: not known
            if found:
                self._axes[tensor] = found
            else:
                self._axes.pop(tensor, None)
        return out

    def _find(
        self, name: str, before: list[tuple[Tensor, tuple[int, ...]]], given: Any, out: Tensor
    ) -> frozenset[int]:
        if _FIRST.fullmatch(name):
            return frozenset({1})
        if _LAST.fullmatch(name):
            return frozenset({out.ndim - 1})
        read: list[tuple[frozenset[int], tuple[int, ...]]]
        read = [(self._axes.get(t, frozenset()), shape) for t, shape in before]
        if not read:
            return frozenset()
        axes, shape = read[0]
        if _PRODUCTS.fullmatch(name):
            return _product(read[-2][0], read[-1][0], out.ndim)
        if _ATTENTION.fullmatch(name):  # (n, heads, t, d) like the values, the third argument
            return read[2][0] or frozenset({out.ndim - 1})
        if name == "native_layer_norm":
            return axes or frozenset({out.ndim - 1})
        if _VIEWS.fullmatch(name):
            return _regrouped(axes, shape, tuple(out.shape))
        if _MOVES.fullmatch(name):
            order = _order(name, given, len(shape))
            return frozenset(order.index(axis) for axis in axes)
        if name in ("select", "unbind", "unsqueeze", "stack"):
            dim = int(given.get("dim", 0)) % max(out.ndim, len(shape))
            if name in ("unsqueeze", "stack"):
                axes = next((found for found, _ in read if found), axes)
                return frozenset(axis + (axis >= dim) for axis in axes)
            return _without(axes, {dim})
        if name == "squeeze":
            dims = given.get("dim", [i for i, side in enumerate(shape) if side == 1])
            dims = [dims] if isinstance(dims, int) else dims
            return _without(axes, {d % len(shape) for d in dims if shape[d] == 1})
        if _REDUCTIONS.fullmatch(name) and out.ndim < len(shape):
            dims = given.get("dim") or ()
            dims = [dims] if isinstance(dims, int) else dims
            return _without(axes, {d % len(shape) for d in dims})
        if name in ("expand", "repeat"):
            return frozenset(axis + out.ndim - len(shape) for axis in axes)
        same = [(found, s) for found, s in read if found and len(s) == out.ndim]
        same.sort(key=lambda one: one[1] != tuple(out.shape))  # a gate (n, c, 1, 1) comes last
        return same[0][0] if same else frozenset()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _without(axes: frozenset[int], gone: set[int]) -> frozenset[int]:
    """The axes after some are removed from the tensor."""
    return frozenset(axis - sum(d < axis for d in gone) for axis in axes if axis not in gone)


def _order(name: str, given: Any, ndim: int) -> list[int]:
    """For each axis of the result of a permutation, the axis that it was."""
    if name == "permute":
        return [dim % ndim for dim in given["dims"]]
    order = list(range(ndim))
    a, b = (given["dim0"] % ndim, given["dim1"] % ndim) if name == "transpose" else (0, ndim - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _product(a: frozenset[int], b: frozenset[int], ndim: int) -> frozenset[int]:
    """Channels of a matrix product (..., i, k) @ (..., k, j): those of i and j that had them.

    Where neither has (a linear layer: k are channels, and the weights are not), j are new ones.
    """
    row, column = ndim - 2, ndim - 1
    kept = (a - {column}) | (b - {row})
    rest = kept - {row, column}
    if column in b:
        return rest | {column}
    return rest | ({row} if row in a else {column})


def _regrouped(axes: frozenset[int], old: Sequence[int], new: Sequence[int]) -> frozenset[int]:
    """Channel axes after a view: old axes are grouped with the new ones that they became.

    A group of channels alone stays channels, however it is split or merged; so do channels merged
    with the images, and split from them again. A merge with positions counts only where no other
    group has channels, and only with the channels inmost: (t, c) as one axis of features, not the
    (h, r) of a pixel shuffle.
    """
    pure: set[int] = set()
    mixed: set[int] = set()
    for a, b in _groups(old, new):
        wide = [axis for axis in a if old[axis] != 1] or a
        if len(a) == len(b) == 1:
            pure |= set(b) if a[0] in axes else set()
        elif set(wide) <= axes:
            pure |= {axis for axis in b if new[axis] != 1 and axis != 0}
        elif a[0] == 0 and set(wide) - {0} <= axes and wide[-1] != 0:
            pure.add(b[-1])
        elif wide[-1] in axes and b:
            mixed.add(b[-1])
    return frozenset(pure or mixed)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that hold the same numbers before and after."""
    if 0 in old:
        return
    i = j = 0
    while i < len(old) and j < len(new):
        a, b, p, q = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p, a, i = p * old[i], [*a, i], i + 1
            else:
                q, b, j = q * new[j], [*b, j], j + 1
        yield a, b
