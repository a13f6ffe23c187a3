"""Run a recorded graph on an example: check its output, note shapes and in-place writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from cka_probe.errors import one_line
from cka_probe.rng import preserved_rng
from msun.cutting.trace import Trace, attached, unchanged

__all__ = ["ExampleRun", "has_inplace_dropout", "last_inside", "overwrites", "run_example"]

# fx returns lists and dicts of an output as its own immutable subclasses.
_PLAIN: dict[type, type] = {immutable_list: list, immutable_dict: dict}


class ExampleRun(NamedTuple):
    """What a run of the eval graph on an example showed.

    Attributes:
        shapes: value -> its shape, (n, ...); tensors only.
        same: value -> the earlier value that it is identical to, as after an identity or a dropout.
        overwritten: whether a later in-place operation changed the watched value.
    """

    shapes: dict[fx.Node, tuple[int, ...]]
    same: dict[fx.Node, fx.Node]
    overwritten: bool


def run_example(
    model: nn.Module, traced: Trace, x: Tensor, watch: fx.Node | None = None
) -> ExampleRun:
    """Run the eval graph on images, and compare its output with that of the network.

    Args:
        model: the network.
        traced: the trace of its eval mode.
        x: images (n, c, h, w).
        watch: a value; the result says whether it is overwritten.

    Raises:
        ValueError: the network cannot take x, or the graph gives another output.
    """
    with unchanged(model), attached(model, traced.constants), torch.no_grad():
        model.eval()
        try:
            with preserved_rng():
                wanted = model(x.clone())
        except Exception as error:
            raise ValueError(
                f"the network cannot take these images: {tuple(x.shape)}, {one_line(error)}: give "
                "another example"
            ) from error
        run = _Recorder(model, traced, watch)
        with preserved_rng():
            got = run.run(x.clone())
    if not _equal(wanted, got):
        raise ValueError(
            f"the recorded network computes something else: {type(model).__name__}: its forward "
            "must not depend on the type of its input or on Python's own state"
        )
    changed = watch in run.versions and run.versions[watch] != run.kept[0]._version
    return ExampleRun(run.shapes, run.same, changed)


def has_inplace_dropout(model: nn.Module, traced: Trace) -> bool:
    """Whether a network has a dropout that overwrites its input, which happens in training only.

    Args:
        model: the network.
        traced: the trace of its training mode.
    """
    drops = (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    calls = (node for node in traced.graph.nodes if node.op == "call_function")
    return any(drop.inplace for drop in drops) or any(node.kwargs.get("inplace") for node in calls)


def overwrites(model: nn.Module, traced: Trace, x: Tensor, watch: fx.Node) -> bool:
    """Whether an in-place operation overwrites a value of the training graph.

    The eval run cannot show it: there a dropout does nothing. Where the graph fails (a norm that
    gets one value per channel), the steps before the failure count.

    Args:
        model: the network; its buffers are left as they are.
        traced: the trace of its training mode.
        x: images (n, c, h, w).
        watch: the value.
    """
    clones: dict[int, Tensor] = {}
    run = _Recorder(model, traced, watch)
    with unchanged(model), attached(model, traced.constants), torch.no_grad():
        for module in model.modules():  # statistics are written to copies
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = clones.setdefault(id(buffer), buffer.clone())
        model.train()
        with preserved_rng(), suppress(Exception):
            run.run(x.clone())
    return watch in run.versions and run.versions[watch] != run.kept[0]._version


def last_inside(model: nn.Module, path: str, x: Tensor) -> set[str]:
    """The submodules of an untraced module whose last output is also the output of that module.

    Args:
        model: the network.
        path: path of a module that is one step of the graph.
        x: images (n, c, h, w).
    """
    finished: list[tuple[str, Any]] = []
    found: set[str] = set()

    def record(inner: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if inner != path:
                finished.append((inner, out))
                return
            outer = ""
            for name, value in reversed(finished):
                if value is not out or not name.startswith(outer):
                    break
                found.add(name)
                outer = f"{name}."
            finished.clear()

        return hook

    handles = [
        module.register_forward_hook(record(f"{path}.{name}" if name else path))
        for name, module in model.get_submodule(path).named_modules()
    ]
    try:
        with unchanged(model), preserved_rng(), torch.no_grad():
            model.eval()(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Recorder(fx.Interpreter):
    """Runs a graph and records shapes, identities and the version counters of tensors."""

    def __init__(self, model: nn.Module, traced: Trace, watch: fx.Node | None) -> None:
        super().__init__(model, graph=traced.graph)
        self.watch = watch
        self.kept: list[Tensor] = []
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.versions: dict[fx.Node | None, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            self.versions[n] = value._version
            if n is self.watch:
                self.kept.append(value)
            for a in n.all_input_nodes:
                if self.env[a] is value and self.versions[a] == value._version:
                    self.same[n] = self.same.get(a, a)
        return value


def _equal(a: Any, b: Any) -> bool:
    """Whether two outputs agree: tensors to the bit on the CPU, containers item by item."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        tolerance = 0.0 if a.is_cpu else 1e-3  # on a GPU two runs may use different kernels
        return same and (
            a.is_meta or torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        )
    kind_a, kind_b = (_PLAIN.get(type(value), type(value)) for value in (a, b))
    if kind_a is not kind_b:
        return False
    if isinstance(a, Mapping) and (list(a) != list(b) or not all(_equal(a[k], b[k]) for k in a)):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return not is_dataclass(a) or _equal(vars(a), vars(b))
