"""What a graph's values depend on, and the two modules that a graph is parted into."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from msun.cutting.trace import Trace

__all__ = ["Flow", "Part", "hold", "part"]

_SIZE = {"shape", "size", "dim", "ndim", "ndimension", "numel", "nelement"}
_KIND = {"dtype", "device", "layout", "is_cuda", "is_floating_point", "is_complex", "get_device"}
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli}


class Flow:
    """Which values of a graph hold image content, and what each later step still needs.

    A value that depends on the input by its sizes alone (a shape, an attention mask made for it)
    is no content: it is computed again where it is needed.

    Args:
        model: the network.
        traced: one of its modes.
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
        """The steps after `node` that read sizes or kinds of values before it."""
        k = self.place[node]
        before = {n for n in self.nodes[:k] if self.content[n]}
        wanted = self.wanted(self.nodes[k + 1 :])
        return [n for n in self.nodes if n in wanted and _reading(n) and _source(n) in before]

    def wanted(self, steps: list[fx.Node]) -> set[fx.Node]:
        """Of these steps, those that compute content or check; and what feeds them without any."""
        checks = {n for n in steps if n.op == "call_function" and n.is_impure()}
        found = checks | {n for n in steps if self.content[n]}
        rest = list(found)
        while rest:
            new = {a for a in rest.pop().all_input_nodes if not self.content[a]} - found
            found |= new
            rest += new
        return found

    def _needs(self, user: fx.Node) -> int:
        """Where a user needs content: nowhere if it only reads sizes."""
        return -1 if _reading(user) else self.place[user]

    def _states(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Parameter or buffer -> from where to where the graph needs it."""
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
        """Whether `node` is all that what follows it needs."""
        k = self.place[node]
        alone = self.content[node] and self._alive[k] == 1 and self._shared[k] == 0
        return alone and self.follows(node)

    def follows(self, node: fx.Node) -> bool:
        """Whether anything is computed from `node`."""
        return self.place[node] < self.last[node] and {u.op for u in node.users} != {"output"}

    def also_needed(self, node: fx.Node) -> list[fx.Node]:
        """The other values, up to `node`, that steps after it need."""
        k = self.place[node]
        before = self.nodes[: k + 1]
        return [n for n in before if self.content[n] and n is not node and self.last[n] > k]

    def on_both_sides(self, node: fx.Node) -> list[str]:
        """The parameters and buffers that are needed both up to `node` and after it."""
        k = self.place[node]
        return [name for name, (a, b) in self.states.items() if a <= k < b]


def _what(node: fx.Node) -> Any:
    """The method that a step calls, or the attribute that it reads."""
    if node.op == "call_method":
        return node.target
    return node.args[1] if node.target is getattr else None


def _source(node: fx.Node) -> fx.Node:
    """The tensor off which a step reads."""
    return node.all_input_nodes[0]


def _reading(node: fx.Node) -> bool:
    """Whether a step reads a tensor's sizes or kind, not its content."""
    return _what(node) in _SIZE | _KIND


def _covered(spans: Iterable[tuple[int, int]], length: int) -> list[int]:
    """How many spans [a, b) hold each place."""
    steps = [0] * (length + 1)
    for a, b in spans:
        if a < b:
            steps[a] += 1
            steps[b] -= 1
    return list(accumulate(steps))


def _state(model: nn.Module, node: fx.Node) -> list[Tensor]:
    """What a step holds: its parameters, and the buffers of a module."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    if node.op == "get_attr" and hasattr(model, str(node.target).partition(".")[0]):
        value = operator.attrgetter(str(node.target))(model)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


class Part(nn.Module):
    """One side of a cut network: its modules, under their own paths, and a forward for each mode.

    `train()` and `eval()` switch between the two recorded forwards. It can be copied and pickled;
    its recorded forwards travel as graphs and are compiled again.

    Attributes:
        cut_graphs: the recorded forward in training (True) and in eval mode (False).
        needs_sizes: whether a tail wants sizes beside the map (see `msun.cut`).
    """

    def __init__(
        self, model: nn.Module, graphs: dict[bool, fx.Graph], constants: dict[str, Tensor]
    ) -> None:
        super().__init__()
        steps = [node for graph in graphs.values() for node in graph.nodes]
        self.needs_sizes = any(n.op == "placeholder" and n.target == "sizes" for n in steps)
        modules = {str(node.target) for node in steps if node.op == "call_module"}
        tensors = {str(node.target) for node in steps if node.op == "get_attr"}
        for path in (*sorted(modules), *sorted(tensors - constants.keys())):
            hold(self, model, path)
        for path in sorted(tensors & constants.keys()):
            self.register_buffer(path, constants[path], persistent=False)
        self.record(graphs)
        self.training = model.training

    def record(self, graphs: dict[bool, fx.Graph]) -> None:
        """Take these graphs as the forwards in training (True) and in eval mode (False)."""
        self.cut_graphs = graphs
        self._forwards = {mode: _compiled(graph) for mode, graph in graphs.items()}

    def __getstate__(self) -> dict[str, Any]:
        """The state with the graphs as lists; the compiled forwards cannot be pickled."""
        state = {name: value for name, value in vars(self).items() if name != "_forwards"}
        return {**state, "cut_graphs": {m: _to_list(g) for m, g in self.cut_graphs.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, build the graphs and compile the forwards again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.record({mode: _from_list(steps) for mode, steps in state["cut_graphs"].items()})

    def forward(self, x: Tensor, *sizes: Any) -> Any:
        """The recorded forward of the mode it is in."""
        return self._forwards[self.training](self, x, *sizes)


def hold(part: Part, model: nn.Module, path: str) -> None:
    """Let a part take in a module or tensor of the network, shared with it, under its path."""
    *parents, name = path.split(".")
    here: nn.Module = part
    source = model
    for parent in parents:
        source = source.get_submodule(parent)
        if parent not in here._modules:
            here.add_module(parent, _Holder(source.training))
        here = here.get_submodule(parent)
        if here is source:
            return  # inside a module that is held whole
    value = getattr(source, name)
    if isinstance(value, nn.Module | nn.Parameter):
        setattr(here, name, value)
    else:
        kept = name in source._buffers and name not in source._non_persistent_buffers_set
        here.register_buffer(name, value, persistent=kept)


class _Holder(nn.Module):
    """Stands where the network had a container."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training


class _Index(NamedTuple):
    """Stands for a node of a graph that is written as a list."""

    node: int


def _to_list(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as a flat list of steps: a pickled graph of nodes recurses as deep as it is long."""
    place = {node: k for k, node in enumerate(graph.nodes)}

    def indexed(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: _Index(place[node]))

    return [(n.op, n.target, indexed(n.args), indexed(n.kwargs), n.name) for n in graph.nodes]


def _from_list(steps: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph that `_to_list` wrote."""
    graph, nodes = fx.Graph(), list[fx.Node]()

    def resolved(value: Any) -> Any:
        if isinstance(value, _Index):
            return nodes[value.node]
        if isinstance(value, tuple | list):
            return (
                type(value)(map(resolved, value))
                if type(value) in (tuple, list)
                else [*map(resolved, value)]
            )
        if isinstance(value, dict):
            return {key: resolved(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(resolved(value.start), resolved(value.stop), resolved(value.step))
        return value

    for op, target, args, kwargs, name in steps:
        nodes.append(graph.create_node(op, target, resolved(args), resolved(kwargs), name))
    return graph


def _compiled(graph: fx.Graph) -> Any:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<cut network>", "exec"), scope)
    return scope["forward"]


def part(
    flow: Flow, node: fx.Node, *, batch_first: bool, copies: bool
) -> tuple[fx.Graph, fx.Graph]:
    """Part one mode's graph after a value.

    Args:
        flow: the graph.
        node: where `flow.can_cut`.
        batch_first: whether the first axis of the head's values is that of the images, so that
            the map's own tells their number.
        copies: whether the tail would overwrite the map, and so works on a copy.

    Returns:
        (head, tail).
    """
    k = flow.place[node]
    inside, after = flow.nodes[: k + 1], flow.nodes[k + 1 :]
    wanted, wanted_before = flow.wanted(after), flow.wanted(inside)
    read = flow.reads(node)
    carried = [n for n in read if _what(n) not in _KIND]
    if batch_first:
        carried = [n for n in carried if not _reads_number(n, wanted)]
    sources = list(dict.fromkeys(_source(n) for n in carried))

    head = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    shapes = {}
    for n in inside:
        if n in wanted_before:
            copy[n] = head.node_copy(n, copy.__getitem__)
            if n in sources:
                shapes[n] = head.call_function(getattr, (copy[n], "shape"))
    z = copy[node]
    if sources:
        z = head.call_function(_with_sizes, (z, [shapes[n] for n in sources]))
    head.output(z)

    tail = fx.Graph()
    z = tail.placeholder("z")
    sizes = z
    if sources:
        sizes = tail.placeholder("sizes", default_value=None)
        sizes = tail.call_function(_sizes, (z, sizes))
    copy = {node: tail.call_method("clone", (z,)) if copies else z}
    for n in flow.nodes:
        if n in carried:
            shape = tail.call_function(operator.getitem, (sizes, sources.index(_source(n))))
            copy[n] = _read_shape(tail, n, shape)
        elif n in wanted:
            copy[n] = tail.node_copy(n, (lambda _: z) if n in read else copy.__getitem__)
    return head, tail


def _index(node: fx.Node) -> Any:
    """Which axis `x.size(axis)` reads; None for all."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")


def _reads_number(node: fx.Node, wanted: set[fx.Node]) -> bool:
    """Whether only the length of the first axis is read."""
    if _what(node) == "size" and _index(node) is not None:
        return bool(_index(node) == 0)
    if _what(node) in ("size", "shape"):
        users = [user for user in node.users if user in wanted]
        return all(u.target is operator.getitem and u.args[1] == 0 for u in users)
    return False


def _read_shape(graph: fx.Graph, node: fx.Node, shape: fx.Node) -> fx.Node:
    """What `node` reads off a tensor, from its shape alone."""
    what = _what(node)
    if what in ("numel", "nelement"):
        return graph.call_function(math.prod, (shape,))
    if what in ("dim", "ndim", "ndimension"):
        return graph.call_function(len, (shape,))
    index = _index(node) if what == "size" else None
    return shape if index is None else graph.call_function(operator.getitem, (shape, index))


def _with_sizes(z: Tensor, shapes: list[torch.Size]) -> Tensor:
    """Hang the shapes on the map, without the number of images, which the map itself tells."""
    n = z.shape[:1]
    carried = tuple((None, *shape[1:]) if shape[:1] == n else tuple(shape) for shape in shapes)
    z.cut_sizes = carried  # type: ignore[attr-defined]
    return z


def _sizes(z: Tensor, sizes: Any) -> tuple[torch.Size, ...]:
    """The shapes that hang on the map, or those given."""
    sizes = getattr(z, "cut_sizes", None) if sizes is None else sizes
    if sizes is None:
        raise ValueError(
            f"the tail needs sizes that this map does not carry: {tuple(z.shape)}: call "
            "tail(z, sizes) with the head(x).cut_sizes of an image that gives this grid"
        )
    n = z.shape[0]
    return tuple(torch.Size(n if side is None else side for side in shape) for shape in sizes)
