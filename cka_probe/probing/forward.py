"""Forwards of one batch through the networks of all views; their features go to the estimator."""

import re
import warnings
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import Collector, Tap, failing_module
from cka_probe.activations.layers import ROOT, Layers, unwrap
from cka_probe.activations.macs import MacCounter, layer_table
from cka_probe.engine.centring import NonFiniteFeaturesError
from cka_probe.errors import RunFailedError, first_names, one_line
from cka_probe.inputs.batches import Batch

_SHOWN = 10  # layers that a warning names


@dataclass(frozen=True)
class ForwardResults:
    """What the forwards showed about the networks, for the report's metadata.

    Attributes:
        tables: view -> `layer_table`.
        macs: view -> MACs per image.
        labels: view -> tap -> name of the layer.
        unreached: modules that no forward reached.
        skipped: output -> the reason why it has no features.
    """

    tables: dict[str, dict[str, Any]]
    macs: dict[str, int]
    labels: dict[str, dict[Tap, str]]
    unreached: list[str]
    skipped: dict[str, str]

    @staticmethod
    def merge(results: "list[ForwardResults]") -> "ForwardResults":
        """Merge the results of several processes; a process without a batch has none."""
        ran = [one for one in results if one.tables] or results[:1]
        return replace(
            ran[0],
            unreached=[p for p in ran[0].unreached if all(p in one.unreached for one in ran)],
            skipped={path: why for one in reversed(ran) for path, why in one.skipped.items()},
        )


class FeatureSink(Protocol):
    """Receives the features: an estimator, or one that several processes share."""

    def update(self, key: Hashable, features: Tensor) -> None:
        """Add the features (b, d) of one entry to the open batch."""

    def end_batch(self, index: int) -> None:
        """End batch `index`."""


class Forwards:
    """The networks with their hooks attached, for the length of a run.

    Args:
        models: view -> network; views may share one.
        estimator: the estimator, whose keys are (view, tap).
        stack: the exit stack that removes hooks and moves networks back.
        layers: view -> layers as in `select_layers`; views that share a network share them. None
            for the default ones.
        reduce: as in `get_reducer`.
        layout: as in `Collector`.
        device: the device of the forwards; None for where each network is.
        amp: autocast to bfloat16 for the networks.
        hint: the hint of the error about a size that a network refuses.

    Attributes:
        collectors: view -> its collector.
        tables: view -> `layer_table`, after the first batch.
        macs: view -> MACs per image, after the first batch.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        estimator: FeatureSink,
        stack: ExitStack,
        *,
        layers: Mapping[str, Layers] | None = None,
        reduce: Any = "flatten",
        layout: str | None = None,
        device: Any = None,
        amp: bool = False,
        hint: str = "give images of a size that it takes",
    ) -> None:
        self.models, self.estimator, self.amp = models, estimator, amp
        self.hint = hint
        self._batch: Batch | None = None  # the open one, to name its images
        self.tables: dict[str, dict[str, Any]] = {}
        self.macs: dict[str, int] = {}
        self.devices: dict[str, torch.device] = {}
        self.collectors: dict[str, Collector] = {}
        by_model: dict[int, Collector] = {}
        for view, model in models.items():
            if id(model) not in by_model:
                move_to(model, device, stack)
                collector = Collector(model, (layers or {}).get(view), reduce=reduce, layout=layout)
                by_model[id(model)] = stack.enter_context(collector)
            self.collectors[view] = by_model[id(model)]
            self.devices[view] = device_of(model)

    def run_batch(self, batch: Batch, bar: Any) -> None:
        """Run every view of one batch through its network.

        The first batch also fills `tables` and `macs`, and checks that layers were reached. The
        estimator's batch stays open until `end_batch`.

        Raises:
            ValueError: a network cannot take a size, or features are NaN or Inf; the message
                names the view and, where known, the layer.
        """
        first, self._batch = not self.tables, batch
        for view, x in batch.views.items():
            bar.set_postfix_str(f"view {view}", refresh=False)
            self._forward(view, x, batch.index, first)
        if first:
            self._check_reached()

    def end_batch(self, index: int) -> None:
        """End the batch in the estimator, which adds its sums to those of earlier batches.

        Raises:
            ValueError: an accelerator found NaN or Inf; the message names layer, view and batch.
        """
        try:
            self.estimator.end_batch(index)
            self._batch = None
        except NonFiniteFeaturesError as error:
            view, tap = error.key
            where = f"layer {self.collectors[view].labels[tap]!r}, view {view!r}, batch {index}"
            raise self._image_error(view) or _not_finite(error, where) from error

    def results(self) -> ForwardResults:
        """What the forwards showed so far."""
        collectors = self.collectors.values()
        return ForwardResults(
            tables=self.tables,
            macs=self.macs,
            labels={view: dict(c.labels) for view, c in self.collectors.items()},
            unreached=sorted({path for c in collectors for path in c.unreached}),
            skipped={path: why for c in collectors for path, why in c.skipped.items()},
        )

    def _forward(self, view: str, x: Tensor, index: int, first: bool) -> None:
        collector, device = self.collectors[view], self.devices[view]
        counter = MacCounter(active=first)

        def sink(tap: Tap, features: Tensor) -> None:
            counter.outside(self.estimator.update, (view, tap), features)

        # A copy to the CPU must be complete before it is read; one to an accelerator may overlap.
        x = x.to(device, non_blocking=device.type != "cpu")
        n = len(x)
        try:
            with counter, torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
                collector.run(x, sink)
        except Exception as error:
            where = f"view {view!r}, batch {index}"
            if isinstance(error, OSError):
                raise  # a full disk: no fault of the network
            if "DataLoader worker" in str(error):
                # torch raises it from a signal handler, wherever the main process happens to be
                hint = "start again (--resume goes on), with fewer workers"
                raise RunFailedError(f"image workers failed: {one_line(error)}: {hint}") from error
            if error is collector.fault:
                if _is_not_finite(error) and (of_image := self._image_error(view)) is not None:
                    raise of_image from error
                raise _tapping_error(error, where) from error
            raise _network_error(error, collector.model, x, where, self.hint) from error
        if first:
            self.macs[view] = counter.macs() // n
            counter.warn_uncounted()
            self.tables[view] = layer_table({view: collector}, {view: unwrap(self.models[view])})

    def _image_error(self, view: str) -> ValueError | None:
        """The error that names an image of the open batch which holds NaN or infinity."""
        if self._batch is None:
            return None
        for name, x in zip(self._batch.ids, self._batch.views[view], strict=True):
            bad = int((~torch.isfinite(x)).sum())
            if bad:
                kind = "NaN" if bool(torch.isnan(x).any()) else "infinity"
                return ValueError(
                    f"image is not finite: {name!r} has {kind} in {bad} of {x.numel()} values in "
                    f"view {view!r}: leave it out, or mend it or the view's transform"
                )
        return None

    def _check_reached(self) -> None:
        """After the first batch: warn of layers without features, and say why they have none."""
        collectors = {id(c): c for c in self.collectors.values()}.values()
        never = sorted({path for c in collectors for path in c.unreached})
        tapped = {tap.path for c in collectors for tap in c.labels}
        lost = {
            name: why
            for c in collectors
            for name, why in c.skipped.items()
            if name.partition(":")[0].replace(ROOT, "") not in tapped
        }
        reasons = [f"{name} ({why})" for name, why in lost.items()]
        if not any(collector.labels for collector in collectors):
            found = first_names([*(f"{path} (never called)" for path in never), *reasons], _SHOWN)
            raise ValueError(
                f"no layer has features: {found}: choose others; `cka-probe layers` lists them"
            )
        if never:
            text = f"layers never reached: {first_names(never, _SHOWN)}"
            warnings.warn(text, UserWarning, stacklevel=5)
        if reasons:
            text = f"layers left out, as they put out no features: {first_names(reasons, _SHOWN)}"
            warnings.warn(text, UserWarning, stacklevel=5)


def move_to(model: nn.Module, target: Any, stack: ExitStack) -> None:
    """Move a network to a device, if one is named; `stack` moves it back."""
    if target is None:
        return
    before = device_of(model)
    try:
        model.to(target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"cannot use device: {str(target)!r}, {one_line(error)}: leave device out"
        ) from None
    stack.callback(model.to, before)


def _is_not_finite(error: Exception) -> bool:
    """Whether NaN or infinity in the features is its cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NonFiniteFeaturesError):
        cause = cause.__cause__
    return cause is not None


def _tapping_error(error: Exception, where: str) -> Exception:
    """The error of a reducer, a kernel or the estimator, with the view and the batch."""
    if _is_not_finite(error):
        return _not_finite(error, where)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return _out_of_memory(where)
    text = " ".join(str(error).split())
    if isinstance(error, TypeError | ValueError) and ": " in text:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        return kind(f"{text} ({where})")
    return ValueError(
        f"cannot take features: {one_line(error)}, {where}: correct the reducer or the kernel"
    )


def _network_error(
    error: Exception, model: nn.Module, x: Tensor, where: str, hint: str
) -> Exception:
    """The error of a network in one line, with the view and, where known, the layer."""
    text = " ".join(str(error).split())
    path = failing_module(error, model)
    if isinstance(error, ValueError) and ": " in text and path is None:
        return ValueError(f"{text} ({where})")  # the collector's, after the forward
    size = " x ".join(map(str, x.shape[1:]))
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return _out_of_memory(f"{where}, {size}")
    layer = f" in layer {path!r}" if path else ""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    if x.dtype != own and "type" in text.lower():
        images, network = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, own))
        return ValueError(
            f"images are {images}, the network {network}: {where}{layer}: convert one, x.float() "
            "or model.float()"
        )
    # torch's message of a convolution: "expected input[2, 1, 8, 8] to have 3 channels, but got 1"
    found = re.search(r"to have (\d+) channels, but got (\d+) channels", text)
    if found:
        return ValueError(
            f"wrong number of channels: {found[2]} where the network takes {found[1]}, "
            f"{where}{layer}: give images of {found[1]} channels"
        )
    if isinstance(error, TypeError) and "forward() missing" in text and not path:
        return ValueError(
            f"the network takes more than images: {one_line(error)}, {where}: wrap it in a module "
            "whose forward takes images alone"
        )
    return ValueError(f"the network cannot take {where}: {size}{layer}, {one_line(error)}: {hint}")


def _out_of_memory(where: str) -> ValueError:
    return ValueError(f"out of memory: {where}: use a smaller batch_size (--batch-size)")


def _not_finite(error: Exception, where: str) -> ValueError:
    return ValueError(
        f"non-finite features: {one_line(error)}, {where}: "
        "check the network's weights and the normalisation of its input"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's first parameter or buffer; the CPU where it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
