"""A network's forward as torch.fx graphs, in training and in eval mode.

Nothing runs here: `msun.cutting.verify` runs the recorded graph on an example.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer

from cka_probe.activations.meta import check_shaped
from cka_probe.errors import one_line

__all__ = ["Trace", "attached", "trace_graph", "unchanged"]

# Attributes of nn.Module that hold hooks; those of containers would be lost in a graph.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Trace(NamedTuple):
    """The recorded forward of one mode.

    Attributes:
        graph: the steps of the forward, in order of execution.
        outputs: module path -> the output of its last run.
        places: value -> path of the module in whose forward it was computed.
        constants: tensors that the forward creates, by their names in the graph.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    places: dict[fx.Node, str]
    constants: dict[str, Tensor]


class _State(fx.Proxy):
    """Proxy of a parameter or buffer: fx would record its sizes as steps; here they are numbers."""

    def __init__(self, node: fx.Node, tracer: _Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape = tensor.shape
        self.ndim = tensor.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]


class _Tracer(NodePathTracer):  # type: ignore[misc]
    """Torchvision's tracer with timm's leaf modules; it also records the output of each module."""

    def __init__(self, opaque: set[str], buffers: bool) -> None:
        timm = sys.modules.get("timm.layers")  # a timm network brings it
        super().__init__(
            autowrap_modules=(math, torchvision.ops),
            autowrap_functions=tuple(timm.get_notrace_functions()) if timm else (),
            leaf_modules=list(timm.get_notrace_modules()) if timm else [],
        )
        self.proxy_buffer_attributes = buffers
        self.opaque = opaque
        self.outputs: dict[str, fx.Node] = {}
        self.states: dict[Any, Tensor] = {}
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualname: str) -> bool:
        return module_qualname in self.opaque or bool(super().is_leaf_module(m, module_qualname))

    def create_args_for_root(self, root_fn: Any, *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        """One image tensor; other arguments keep their defaults."""
        self.states = dict([*self.root.named_parameters(), *self.root.named_buffers()])
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """As in torchvision, but a parameter or buffer becomes a proxy with known sizes."""
        proxy: fx.Proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "get_attr" and target in self.states:
            return _State(proxy.node, self, self.states[target])
        return proxy

    def create_arg(self, a: Any) -> Any:
        """As in fx, but subclasses of dict keep their class: OrderedDict, ModelOutput."""
        if type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, dict) and is_dataclass(a):
            given = {field.name: getattr(a, field.name) for field in fields(a) if field.init}
            return self.create_proxy("call_function", type(a), (), given).node
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        try:
            out = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        self.outputs.pop(path, None)
        if isinstance(out, fx.Proxy):
            self.outputs[path] = out.node
        return out

    def _get_node_qualname(self, module_qualname: str, node: fx.Node) -> str:
        return module_qualname  # torchvision makes it unique, in quadratic time; not needed here


def trace_graph(model: nn.Module) -> dict[bool, Trace]:
    """Record the forward of a network in both modes.

    A module whose forward fx cannot trace (control flow on data) stays one step of the graph.

    Args:
        model: the network; left as it is, with its training flags.

    Returns:
        {True: trace in training mode, False: trace in eval mode}.

    Raises:
        ValueError: a hook on a container, which a graph would lose; a forward that fx cannot
            trace; or lazy modules that never ran.
    """
    check_shaped(model)
    opaque: set[str] = set()
    buffers = True
    _refuse_hooks(model, _Tracer(opaque, buffers))
    while True:  # again, with one more module kept whole, until both modes can be recorded
        traces: dict[bool, Trace] = {}
        known: dict[str, Tensor] = {}
        for mode in (True, False):
            tracer = _Tracer(opaque, buffers)
            try:
                with unchanged(model), attached(model, known):
                    model.train(mode)
                    graph = tracer.trace(model)
                    constants = {
                        name: value
                        for name, value in vars(model).items()
                        if name.startswith("_tensor_constant") and name not in known
                    }
            except Exception as error:
                if tracer.failed and tracer.failed not in opaque:
                    opaque.add(tracer.failed)
                elif buffers:
                    buffers = False
                else:
                    name = type(model).__name__
                    raise ValueError(
                        f"torch.fx cannot trace this network: {name}, {one_line(error)}: move the "
                        "control flow that depends on data into a submodule"
                    ) from error
                break
            traces[mode] = Trace(graph, tracer.outputs, tracer.node_to_qualname, constants)
            known |= constants
        if len(traces) == 2:
            return traces


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules on exit: training flags, caches, additions of fx."""
    before = []
    for module in model.modules():
        inner = [(v, v.copy()) for v in vars(module).values() if isinstance(v, dict | list)]
        before.append((module, vars(module).copy(), inner))
    try:
        yield
    finally:
        for module, attributes, inner in before:
            vars(module).clear()
            vars(module).update(attributes)
            for value, content in inner:
                value.clear()
                value.update(content) if isinstance(value, dict) else value.extend(content)


@contextmanager
def attached(model: nn.Module, constants: dict[str, Tensor]) -> Iterator[None]:
    """Set the constants of a graph as attributes of the network, where fx reads them."""
    vars(model).update(constants)
    try:
        yield
    finally:
        for name in constants:
            vars(model).pop(name, None)


def _refuse_hooks(model: nn.Module, tracer: _Tracer) -> None:
    """Raise for a hook on a container: its forward becomes part of the graph, its hooks do not."""
    within: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(within):
            continue
        if path and tracer.is_leaf_module(module, path):
            within += (f"{path}.",)
        elif any(getattr(module, kind, None) for kind in _HOOKS):
            raise ValueError(
                f"a cut would lose the hooks of a container: {path or '(model)'!r}, a "
                f"{type(module).__name__}: remove them, or hook the modules inside it"
            )
