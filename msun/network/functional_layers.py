"""Turn functional poolings and convolutions of a head into modules, whose stride can change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from msun.cutting.halves import Part
from msun.network.shallow_copy import replace_module, shallow_part

__all__ = ["with_functional_modules"]

# Names of the arguments of each function, in their order.
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    torch.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    F.avg_pool2d: (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
    ),
    F.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
}  # fmt: skip


class Convolve(nn.Module):
    """A convolution whose kernel is an input, not a parameter.

    Args:
        stride: stride, as in `torch.nn.functional.conv2d`.
        padding: padding, likewise.
        dilation: dilation, likewise.
        groups: number of groups, likewise.
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
    """A head whose functional poolings and convolutions with fixed settings are modules.

    Both modes must call the same functions in the same order; otherwise nothing is replaced.

    Args:
        head: the head; left unchanged.

    Returns:
        A shallow copy with modules functional_0, functional_1, ...; or `head` itself.
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
                replace_module(made, name, _layer(node.target, call).train(head.training))
            node.args = (node.args[0], *call.get("given", ())) if node.args else node.args
            node.op, node.target, node.kwargs = "call_module", name, {}
        graphs[mode].lint()
    made.record(graphs)
    return made


def _call(node: fx.Node) -> dict[str, Any] | None:
    """The settings of a call; None for other functions, or settings that depend on the input."""
    if node.op != "call_function" or node.target not in _ARGUMENTS or not node.args:
        return None
    names = _ARGUMENTS[node.target]
    settings = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if set(settings) - set(names):
        return None
    given = [settings.pop(name) for name in ("weight", "bias") if name in settings]
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
