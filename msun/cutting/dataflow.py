"""Data flow in a recorded graph: what each value depends on, and which later steps need it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from msun.cutting.trace import Trace

__all__ = ["KINDS", "Flow", "read_attribute", "source"]

# Methods and attributes that read the sizes of a tensor, ...
_SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "nelement"}
# ... or its kind: neither needs its values, so neither keeps a tensor alive across a cut.
KINDS = {"dtype", "device", "layout", "is_cuda", "is_floating_point", "is_complex", "get_device"}
# Random draws differ from run to run, so they count as content and are never computed twice.
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli}


class Flow:
    """Which values of a graph depend on the pixels, and which later steps need them.

    A value that depends only on the sizes of the input (a shape, an attention mask) is not content:
    either half can compute it again.

    Args:
        model: the network.
        traced: the graph of one mode.
    """

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.traced = traced
        self.nodes = list(traced.graph.nodes)
        self.place = {node: k for k, node in enumerate(self.nodes)}
        self.content: dict[fx.Node, bool] = {}
        for node in self.nodes:
            content = any(self.content[a] for a in node.all_input_nodes)
            made = node.op == "placeholder" or node.target in _DRAWS
            self.content[node] = made or (content and not _reading(node))
        self.content[self.nodes[-1]] = True
        self.last = {n: max(map(self._needs, n.users), default=-1) for n in self.nodes}
        spans = [(k, self.last[n]) for k, n in enumerate(self.nodes) if self.content[n]]
        self._alive = _covered(spans, len(self.nodes))
        self.states = self._states(model)
        self._shared = _covered(self.states.values(), len(self.nodes))

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The steps after `node` that read the size or kind of a value before it."""
        k = self.place[node]
        before = {n for n in self.nodes[:k] if self.content[n]}
        wanted = self.wanted(self.nodes[k + 1 :])
        return [n for n in self.nodes if n in wanted and _reading(n) and source(n) in before]

    def wanted(self, steps: list[fx.Node]) -> set[fx.Node]:
        """The steps that compute content or assert, and the content-free values that they use."""
        checks = {n for n in steps if n.op == "call_function" and n.is_impure()}
        found = checks | {n for n in steps if self.content[n]}
        rest = list(found)
        while rest:
            new = {a for a in rest.pop().all_input_nodes if not self.content[a]} - found
            found |= new
            rest += new
        return found

    def _needs(self, user: fx.Node) -> int:
        """The place at which a user needs the content; -1 if it only reads sizes."""
        return -1 if _reading(user) else self.place[user]

    def _states(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Path of a parameter or buffer -> first and last place at which the graph needs it."""
        used: dict[fx.Node, tuple[int, int]] = {}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        names = {id(tensor): name for name, tensor in tensors}
        spans: dict[str, tuple[int, int]] = {}
        for node in reversed(self.nodes):
            here = (self.place[node], self.place[node])
            ranges = [here] if self.content[node] else [used[user] for user in node.users] or [here]
            used[node] = min(a for a, _ in ranges), max(b for _, b in ranges)
            for tensor in _state(model, node):
                if (name := names.get(id(tensor))) is not None:
                    a, b = spans.get(name, used[node])
                    spans[name] = min(a, used[node][0]), max(b, used[node][1])
        return spans

    def can_cut(self, node: fx.Node) -> bool:
        """Whether the steps after `node` need no other content, parameter or buffer."""
        k = self.place[node]
        alone = self.content[node] and self._alive[k] == 1 and self._shared[k] == 0
        return alone and self.is_used(node)

    def is_used(self, node: fx.Node) -> bool:
        """Whether any step but the output uses `node`."""
        return self.place[node] < self.last[node] and {u.op for u in node.users} != {"output"}

    def also_needed(self, node: fx.Node) -> list[fx.Node]:
        """The values before `node` that steps after it need as well."""
        k = self.place[node]
        before = self.nodes[: k + 1]
        return [n for n in before if self.content[n] and n is not node and self.last[n] > k]

    def on_both_sides(self, node: fx.Node) -> list[str]:
        """The parameters and buffers that are needed both before and after `node`."""
        k = self.place[node]
        return [name for name, (a, b) in self.states.items() if a <= k < b]


def read_attribute(node: fx.Node) -> Any:
    """The name of the method that a step calls, or of the attribute that it reads."""
    if node.op == "call_method":
        return node.target
    return node.args[1] if node.target is getattr else None


def source(node: fx.Node) -> fx.Node:
    """The tensor from which a step reads."""
    return node.all_input_nodes[0]


def _reading(node: fx.Node) -> bool:
    """Whether a step reads the size or kind of a tensor, not its content."""
    return read_attribute(node) in _SIZES | KINDS


def _covered(spans: Iterable[tuple[int, int]], length: int) -> list[int]:
    """The number of spans [a, b) that cover each place, by the running sum of starts and ends."""
    steps = [0] * (length + 1)
    for a, b in spans:
        if a < b:
            steps[a] += 1
            steps[b] -= 1
    return list(accumulate(steps))


def _state(model: nn.Module, node: fx.Node) -> list[Tensor]:
    """The parameters that a step uses, and the buffers of a module."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    if node.op == "get_attr" and hasattr(model, str(node.target).partition(".")[0]):
        value = operator.attrgetter(str(node.target))(model)
        return [value] if isinstance(value, nn.Parameter) else []
    return []
