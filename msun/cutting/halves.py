"""The two halves of a cut network: modules that run one side of its recorded graphs each."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from msun.cutting.dataflow import KINDS, Flow, read_attribute, source

__all__ = ["Part", "share", "split_graph"]


class Part(nn.Module):
    """One side of a cut network: its modules, under their own paths, and a forward for each mode.

    `train()` and `eval()` switch between the two recorded forwards. It can be copied and pickled;
    its recorded forwards travel as graphs and are compiled again.

    Attributes:
        cut_graphs: the recorded forward in training (True) and in eval mode (False).
        needs_sizes: whether a tail needs further sizes besides the map (see `msun.cut`).
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
            share(self, model, path)
        for path in sorted(tensors & constants.keys()):
            self.register_buffer(path, constants[path], persistent=False)
        self.record(graphs)
        self.training = model.training

    def record(self, graphs: dict[bool, fx.Graph]) -> None:
        """Use these graphs as the forwards in training mode (True) and eval mode (False)."""
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
        """Run the recorded forward of the current mode."""
        return self._forwards[self.training](self, x, *sizes)


def share(part: Part, model: nn.Module, path: str) -> None:
    """Register a module or tensor of the network in a part too, under the same path.

    Args:
        part: one half; changed in place.
        model: the network that was cut.
        path: path of the module, parameter or buffer.
    """
    *parents, name = path.split(".")
    here: nn.Module = part
    source = model
    for parent in parents:
        source = source.get_submodule(parent)
        if parent not in here._modules:
            here.add_module(parent, _Container(source.training))
        here = here.get_submodule(parent)
        if here is source:
            return  # inside a module that the part has as a whole
    value = getattr(source, name)
    if isinstance(value, nn.Module | nn.Parameter):
        setattr(here, name, value)
    else:
        kept = name in source._buffers and name not in source._non_persistent_buffers_set
        here.register_buffer(name, value, persistent=kept)


class _Container(nn.Module):
    """Placeholder for a container of the network, so that paths stay the same."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training


class _Index(NamedTuple):
    """Number of a node, in a graph that is written as a list."""

    node: int


def _to_list(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as a flat list of steps: pickling linked nodes would recurse once per step."""
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
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(resolved(value.start), resolved(value.stop), resolved(value.step))
        return value

    for op, target, args, kwargs, name in steps:
        nodes.append(graph.create_node(op, target, resolved(args), resolved(kwargs), name))
    return graph


def _compiled(graph: fx.Graph) -> Any:
    """The graph as a Python function, forward(self, x)."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<cut network>", "exec"), scope)
    return scope["forward"]


def split_graph(
    flow: Flow, node: fx.Node, *, batch_first: bool, copies: bool
) -> tuple[fx.Graph, fx.Graph]:
    """Split the graph of one mode after a value.

    Args:
        flow: data flow of the graph.
        node: the value that crosses the cut; `flow.can_cut(node)` must hold.
        batch_first: whether the first axis of the values in the head is the batch axis, so that
            the tail can read the number of images from the map.
        copies: whether the tail works on a copy of the map, because it would overwrite it.

    Returns:
        (graph of the head, graph of the tail).
    """
    k = flow.place[node]
    inside, after = flow.nodes[: k + 1], flow.nodes[k + 1 :]
    wanted, wanted_before = flow.wanted(after), flow.wanted(inside)
    read = flow.reads(node)
    carried = [n for n in read if read_attribute(n) not in KINDS]
    if batch_first:
        carried = [n for n in carried if not _reads_number(n, wanted)]
    sources = list(dict.fromkeys(source(n) for n in carried))

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
            shape = tail.call_function(operator.getitem, (sizes, sources.index(source(n))))
            copy[n] = _read_shape(tail, n, shape)
        elif n in wanted:
            copy[n] = tail.node_copy(n, (lambda _: z) if n in read else copy.__getitem__)
    return head, tail


def _index(node: fx.Node) -> Any:
    """The axis that `x.size(axis)` reads; None for all."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")


def _reads_number(node: fx.Node, wanted: set[fx.Node]) -> bool:
    """Whether a step reads only the length of the first axis, the number of images."""
    if read_attribute(node) == "size" and _index(node) is not None:
        return bool(_index(node) == 0)
    if read_attribute(node) in ("size", "shape"):
        users = [user for user in node.users if user in wanted]
        return all(u.target is operator.getitem and u.args[1] == 0 for u in users)
    return False


def _read_shape(graph: fx.Graph, node: fx.Node, shape: fx.Node) -> fx.Node:
    """A node that computes from a shape what `node` reads from the tensor."""
    what = read_attribute(node)
    if what in ("numel", "nelement"):
        return graph.call_function(math.prod, (shape,))
    if what in ("dim", "ndim", "ndimension"):
        return graph.call_function(len, (shape,))
    index = _index(node) if what == "size" else None
    return shape if index is None else graph.call_function(operator.getitem, (shape, index))


def _with_sizes(z: Tensor, shapes: list[torch.Size]) -> Tensor:
    """Store the shapes as `z.cut_sizes`, with None for the number of images: z has it."""
    n = z.shape[:1]
    carried = tuple((None, *shape[1:]) if shape[:1] == n else tuple(shape) for shape in shapes)
    z.cut_sizes = carried  # type: ignore[attr-defined]
    return z


def _sizes(z: Tensor, sizes: Any) -> tuple[torch.Size, ...]:
    """The given shapes, or else `z.cut_sizes`, with the number of images filled in."""
    sizes = getattr(z, "cut_sizes", None) if sizes is None else sizes
    if sizes is None:
        raise ValueError(
            f"the tail needs sizes that this map does not carry: {tuple(z.shape)}: call "
            "tail(z, sizes) with the head(x).cut_sizes of an image that gives this grid"
        )
    n = z.shape[0]
    return tuple(torch.Size(n if side is None else side for side in shape) for shape in sizes)
