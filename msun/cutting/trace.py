"""A network's forward as torch.fx graphs, in training and in eval mode.

A graph is recorded, never run, except by `observe`, which runs the eval one on an example.
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
from torch.nn.parameter import is_lazy
from torchvision.models.feature_extraction import NodePathTracer

from cka_probe.errors import one_line

__all__ = ["Trace", "attached", "trace", "unchanged"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Trace(NamedTuple):
    """One mode of a network.

    Attributes:
        graph: what the forward does, in order of execution.
        outputs: module path -> the value that it put out in its last run.
        places: value -> the module in whose forward it was computed.
        constants: tensors that the forward itself makes, under the names that the graph gives.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    places: dict[fx.Node, str]
    constants: dict[str, Tensor]


class _State(fx.Proxy):
    """Stands for a parameter or buffer while a forward is recorded."""

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
    """Torchvision's tracer with timm's leaves, which also notes what each module puts out."""

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
        """As torchvision does, but the sizes of a parameter or buffer are numbers."""
        proxy: fx.Proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "get_attr" and target in self.states:
            return _State(proxy.node, self, self.states[target])
        return proxy

    def create_arg(self, a: Any) -> Any:
        """As fx does, but dicts of a kind of their own stay that: OrderedDict, ModelOutput."""
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
        return module_qualname  # a unique name for each node is not needed, and is quadratic


def trace(model: nn.Module) -> dict[bool, Trace]:
    """Record both modes of a network.

    A module whose forward fx cannot follow (control flow on data) is kept whole.

    Args:
        model: the network; afterwards as it was, its training flags included.

    Returns:
        {True: in training mode, False: in eval mode}.

    Raises:
        ValueError: a hook on a module that is looked into, which no graph can keep; or a forward
            that cannot be followed outside all submodules; or lazy modules that never ran.
    """
    if any(map(is_lazy, model.parameters())):
        name = type(model).__name__
        raise ValueError(f"parameters have no shape yet: {name}: run it on images once")
    opaque: set[str] = set()
    buffers = True
    _refuse_hooks(model, _Tracer(opaque, buffers))
    while True:
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
                        f"torch.fx cannot follow this network: {name}, {one_line(error)}: put the "
                        "part that looks at data into a module of its own"
                    ) from error
                break
            traces[mode] = Trace(graph, tracer.outputs, tracer.node_to_qualname, constants)
            known |= constants
        if len(traces) == 2:
            return traces


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Every module's attributes are put back on exit: training flags, caches, what fx adds."""
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
    """The graph's constants stand on the network, where fx looks for them."""
    vars(model).update(constants)
    try:
        yield
    finally:
        for name in constants:
            vars(model).pop(name, None)


def _refuse_hooks(model: nn.Module, tracer: _Tracer) -> None:
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
