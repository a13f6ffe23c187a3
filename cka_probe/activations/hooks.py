"""Hooks as a context manager: one forward, every tapped output reduced and handed on at once."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cka_probe.activations.axes import Axes, AxisTracker, channel_axes
from cka_probe.activations.layers import (
    ROOT,
    Layers,
    Selection,
    module_paths,
    select_layers,
    unwrap,
)
from cka_probe.activations.outputs import has_time_first, leaves, usable
from cka_probe.activations.reduce import Reducer, get_reducer
from cka_probe.rng import eval_mode, preserved_rng

__all__ = ["Collector", "Sink", "Tap", "failing_module"]


class Tap(NamedTuple):
    """One output of one call of one module."""

    path: str  # "" is the network itself
    field: str  # "" for a plain tensor; else "1", "out", "hidden.0"
    call: int  # 0, 1, ... within one forward


Sink = Callable[[Tap, Tensor], None]


class Collector:
    """Collects the outputs of layers by forward hooks; use it as a context manager.

    Inside the `with` the network is in eval mode, and every selected module has one more hook,
    after the user's own. On exit, also after an error, the hooks are removed, and each module's
    training flag and the global random state are restored. `requires_grad` is never changed.

    What does not work: a module that is not called through `__call__` never fires and is named in
    `unreached`, and so is a child whose parent uses its weights alone (out_proj in
    nn.MultiheadAttention). Outputs of recurrent and attention modules with `batch_first=False` are
    turned to batch first; anything else must put the batch in its first axis. An output whose
    first axis is something else and happens to be as long as the batch cannot be told apart, save
    in a network that holds such a module, where (t, n, c) with t = n is skipped.

    Args:
        model: the network; DataParallel and torch.compile wrappers are taken off.
        layers: as in `select_layers`.
        reduce: as in `get_reducer`.
        layout: "channels_first" or "channels_last", for all outputs that have positions; None to
            follow it through the network's operators in the first run of each input size.

    Attributes:
        labels: tap -> "path", "path:field", "path#call" or "path:field#call", in execution order;
            "#call" where the module fires several times in a forward. Filled by the first run;
            taps that only a later input size has come after. Labels are layer names again.
        shapes: tap -> shape of the output without n, in the last run.
        channels: tap -> the axes of the output (n, ...) that hold its channels, in the last run.
        skipped: "path" or "path:field" -> why that output is no (n, ...) float tensor.
        unreached: selected modules that no run has reached; filled by the first run.
        fault: what was raised while an output was tapped in the last run, by the reducer, the sink
            or the collector; None where nothing was, or where the network itself failed.

    Raises:
        ValueError, TypeError: as `unwrap`, `select_layers` and `get_reducer` raise.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        reduce: str | Reducer = "flatten",
        layout: str | None = None,
    ):
        self._layout = layout
        self.model = unwrap(model)
        self._reduce = get_reducer(reduce)
        self._modules, _ = module_paths(self.model)
        self._time_first = has_time_first(self.model)
        self._wanted: dict[str, list[Selection]] = {}
        for selection in select_layers(self.model, layers):
            self._wanted.setdefault(selection.path, []).append(selection)
        self.labels: dict[Tap, str] = {}
        self.shapes: dict[Tap, tuple[int, ...]] = {}
        self.channels: dict[Tap, Axes] = {}
        self.skipped: dict[str, str] = {}
        self.unreached: list[str] = []
        self.fault: Exception | None = None
        self._reached: set[str] = set()
        self._expected: dict[Hashable, dict[Tap, Axes]] = {}  # input size -> taps of its first run
        self._stack: ExitStack | None = None
        self._run: _Run | None = None

    def __enter__(self) -> Collector:
        if self._stack is not None:
            raise RuntimeError("collector entered twice: the same object: use a second Collector")
        with ExitStack() as stack:
            stack.enter_context(preserved_rng())
            stack.enter_context(eval_mode(self.model))
            for path in self._wanted:
                hook = self._modules[path].register_forward_hook(self._hook(path))
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def run(self, x: Any, sink: Sink) -> Any:
        """One forward without gradients; `sink` gets each tapped output when it is put out.

        `sink` must copy what it keeps: the features may share memory with the activation, which
        an in-place layer is free to overwrite after `sink` has returned. Autocast around the run
        reaches the network, not the reducer and the sink.

        Args:
            x: what the network is called with: a tensor (n, ...), a list of n images (c, h, w),
                or a tuple or dict of tensors (n, ...) for a network that takes that.
            sink: called with the tap and its features (n, d), in execution order. Float16,
                bfloat16 and float64 are not converted.

        Returns:
            What the network returned.

        Raises:
            RuntimeError: outside of the `with`.
            ValueError: a layer's outputs differ from those of the first run of this input size;
                or a field or a call that was asked for is in no module's output.
            Exception: what the network, the reducer or `sink` raised; the latter two with the
                layer added to the message.
        """
        if self._stack is None:
            raise RuntimeError("collector not entered: run: write `with Collector(...) as c:`")
        images, size = _batch(x)
        expected = self._expected.get(size)
        run = _Run(images, sink, expected)
        self._run, self.fault = run, None
        self.shapes, self.channels = run.shapes, run.channels
        if expected is None and self._layout is None:
            run.tracker = AxisTracker([v for _, v in leaves(x) if isinstance(v, Tensor)])
        try:
            with torch.no_grad(), run.tracker or nullcontext():
                output = self.model(x)
        finally:
            self._run = None
        self._finish_run(run)
        if expected is None:
            self._expected[size] = run.channels
        elif missing := expected.keys() - run.shapes.keys():
            raise _unsteady(self.labels[min(missing)])
        return output

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            run = self._run
            if run is None:
                return  # the caller's own forward, not ours
            call = run.calls[path]
            run.calls[path] += 1
            parts = list(leaves(output)) or [("", output)]  # an empty output is one to name
            run.fields[path].update(field for field, _ in parts)
            try:
                self._take(run, module, Tap(path, "", call), parts)
            except Exception as error:
                self.fault = error
                raise

        return hook

    def _take(self, run: _Run, module: nn.Module, at: Tap, parts: list[tuple[str, Any]]) -> None:
        """Hand on the fields of one output that were asked for."""
        for field, value in parts:
            if not any(_asks_for(selection, field, at.call) for selection in self._wanted[at.path]):
                continue
            tensor, reason = usable(value, run.images, module, field, self._time_first)
            if tensor is None:
                self.skipped.setdefault(_label(at.path, field), reason)
            else:
                tap = at._replace(field=field)
                if run.expected is None:
                    known = run.tracker.axes(value) if run.tracker is not None else None
                    axes = channel_axes(tensor, known, module, self._layout)
                else:  # a tap that the first run had not is refused
                    axes = run.expected.get(tap, ())
                self._emit(run, tap, tensor, axes)

    def _emit(self, run: _Run, tap: Tap, tensor: Tensor, axes: Axes) -> None:
        name = self.labels.get(tap) or _label(tap.path, tap.field, tap.call or None)
        if tap in run.shapes:
            raise ValueError(f"two outputs of one name: layer {name!r}: probe its block instead")
        if run.expected is not None and tap not in run.expected:
            raise _unsteady(name)
        run.shapes[tap], run.channels[tap] = tuple(tensor.shape[1:]), axes
        try:
            with _without_autocast(tensor), _inactive(run.tracker):
                run.sink(tap, self._reduce(tensor, axes))
        except Exception as error:
            named = _with_layer(error, name)
            if named is error:
                raise
            raise named from error

    def _finish_run(self, run: _Run) -> None:
        """After a forward, label new taps and list modules that were not reached."""
        for tap in run.shapes:
            call = tap.call if run.calls[tap.path] > 1 else None
            self.labels.setdefault(tap, _label(tap.path, tap.field, call))
        self._reached |= set(run.calls)
        self.unreached = [path or ROOT for path in self._wanted if path not in self._reached]
        asked: dict[tuple[str | None, int | None], list[Selection]] = {}
        for path in run.calls:
            for selection in self._wanted[path]:
                asked.setdefault((selection.field, selection.call), []).append(selection)
        for selections in asked.values():
            idle = [s for s in selections if not run.answers(s)]
            labels = [_label(s.path, s.field or "", s.call) for s in idle]
            if len(idle) == len(selections):
                raise ValueError(f"no such output: {labels[0]!r}: {run.offer(idle[0].path)}")
            for label in labels:
                self.skipped.setdefault(label, "the module has no such output")


@dataclasses.dataclass
class _Run:
    """The state of one forward, dropped after it."""

    images: int
    sink: Sink
    expected: dict[Tap, Axes] | None
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    shapes: dict[Tap, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    channels: dict[Tap, Axes] = dataclasses.field(default_factory=dict)
    tracker: AxisTracker | None = None
    fields: defaultdict[str, set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))

    def answers(self, selection: Selection) -> bool:
        calls = range(self.calls[selection.path]) if selection.call is None else [selection.call]
        return any(
            _asks_for(selection, field, call)
            for field in self.fields[selection.path]
            for call in calls
            if call < self.calls[selection.path]
        )

    def offer(self, path: str) -> str:
        fields = ", ".join(repr(field) for field in sorted(self.fields[path]) if field)
        fired = f"it fired {self.calls[path]} times in one forward"
        return f"{fired}, with outputs {fields}" if fields else f"{fired}, with one tensor"


def _asks_for(selection: Selection, field: str, call: int) -> bool:
    inside = selection.field is None or f"{field}.".startswith(f"{selection.field}.")
    return inside and selection.call in (None, call)


def _label(path: str, field: str, call: int | None = None) -> str:
    label = f"{path or ROOT}:{field}" if field else path or ROOT
    return label if call is None else f"{label}#{call}"


def _unsteady(name: str) -> ValueError:
    return ValueError(
        f"outputs differ between batches of one input size: layer {name!r}: "
        "it depends on the data; probe its block, or other layers"
    )


def _batch(x: Any) -> tuple[int, Hashable]:
    """The number of images, and their size, which all batches of one view share."""
    tensors = [leaf for _, leaf in leaves(x) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise TypeError(f"no input tensor: {type(x).__name__}: give images (n, c, h, w)")
    if isinstance(x, list) and all(tensor.ndim == 3 for tensor in tensors):
        return len(tensors), tuple(tensor.shape for tensor in tensors)
    return tensors[0].shape[0], tuple(tensor.shape[1:] for tensor in tensors)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def _inactive(tracker: AxisTracker | None) -> Iterator[None]:
    """The reducer and the sink are not the network: their operators are not followed."""
    if tracker is None:
        yield
        return
    tracker.active = False
    try:
        yield
    finally:
        tracker.active = True


def _with_layer(error: Exception, name: str) -> Exception:
    """The same exception with the layer in its message, or a new one where that cannot be."""
    layer, text = f"layer {name!r}", str(error)
    if repr(name) in text:
        return error
    head, _, rest = text.partition(": ")
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}: {layer}"
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{head}: {layer}, {rest}" if rest else f"{text}: {layer}: while tapping it",)
    if layer in str(error):
        return error
    return RuntimeError(f"{type(error).__name__} while tapping: {layer}: {text}")


def failing_module(error: BaseException, model: nn.Module) -> str | None:
    """The module in which a forward failed: the deepest one on the exception's traceback.

    Args:
        error: an exception that a forward of `model` raised, with its traceback.
        model: the network, wrapped or not.

    Returns:
        Its path; "" for the network itself; None where no module of it is on the traceback.
    """
    paths = {id(module): path for path, module in unwrap(model).named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
