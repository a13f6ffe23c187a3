"""Poolings and convolutions that a head calls as functions become layers, whose stride can go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from msun.cutting.dataflow import Part
from msun.network.shallow_copy import put, shallow_part

__all__ = ["with_functional_modules"]

_WORDS: dict[Any, tuple[str, ...]] = {
    F.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    torch.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    F.avg_pool2d: (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
    ),
    F.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
}  # fmt: skip


class Convolve(nn.Module):
    """A convolution that is given its kernel with the map.

    Args:
        stride: as for `torch.nn.functional.conv2d`, and so the rest.
        padding: see there.
        dilation: see there.
        groups: see there.
    """

    def __init__(
        self, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, c, h, w) -> (n, c', h', w')."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def with_functional_modules(head: Part) -> Part:
    """A twin whose functional poolings and convolutions with fixed settings are layers.

    Both modes must call the same ones in the same order; else the head comes back as it is.

    Args:
        head: left as it is.
    """
    graphs = {mode: fx.Graph() for mode in head.cut_graphs}
    for mode, graph in graphs.items():
        graph.output(graph.graph_copy(head.cut_graphs[mode], {}))
    calls = {mode: [(n, _call(n)) for n in graph.nodes] for mode, graph in graphs.items()}
    found = {mode: [(n, call) for n, call in each if call] for mode, each in calls.items()}
    kinds = [[(n.target, str(call)) for n, call in each] for each in found.values()]
    if not kinds[0] or any(kind != kinds[0] for kind in kinds):
        return head
    made = shallow_part(head)
    for mode, each in found.items():
        for k, (node, call) in enumerate(each):
            assert call is not None
            name = f"functional_{k}"
            if name not in made._modules:
                put(made, name, _layer(node.target, call).train(head.training))
            node.args = (node.args[0], *call.get("given", ())) if node.args else node.args
            node.op, node.target, node.kwargs = "call_module", name, {}
        graphs[mode].lint()
    made.record(graphs)
    return made


def _call(node: fx.Node) -> dict[str, Any] | None:
    """The settings of a call; None where it is none of these, or they are not fixed."""
    if node.op != "call_function" or node.target not in _WORDS or not node.args:
        return None
    words = _WORDS[node.target]
    settings = {**dict(zip(words, node.args[1:], strict=False)), **node.kwargs}
    if set(settings) - set(words):
        return None
    given = [settings.pop(word) for word in ("weight", "bias") if word in settings]
    if any(isinstance(a, fx.Node) for value in settings.values() for a in _flat(value)):
        return None
    return {**settings, "given": tuple(given)} if given else settings


def _flat(value: Any) -> list[Any]:
    return [a for v in value for a in _flat(v)] if isinstance(value, tuple | list) else [value]


def _layer(target: Any, call: dict[str, Any]) -> nn.Module:
    settings = {key: value for key, value in call.items() if key != "given"}
    if target in (F.conv2d, torch.conv2d):
        return Convolve(**settings)
    return (nn.AvgPool2d if target is F.avg_pool2d else nn.MaxPool2d)(**settings)
