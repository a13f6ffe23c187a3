"""Run one network for an evaluation: scores and features, cost and latency."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import failing_module
from cka_probe.activations.layers import ROOT, module_paths, unwrap
from cka_probe.engine.centring import NonFiniteFeaturesError
from cka_probe.engine.minibatch import Minibatch
from cka_probe.errors import one_line
from cka_probe.probing.forward import device_of, move_to
from cka_probe.rng import eval_mode, preserved_rng
from msun.network.classifier import last_layer
from msun.network.model import MSUN
from msun.network.shape_probe import ShapeProbe, parameter_count

__all__ = ["EvalNetwork", "end_batch", "update_features"]

# Latency is a median of 3 to 15 runs, which drops outliers. After 0.5 s no further run begins, so
# that slow networks do not take minutes.
_MAX_RUNS, _MIN_RUNS, _BUDGET_S = 15, 3, 0.5


class EvalNetwork:
    """A context in which a network is in eval mode, without gradients, with a hook for features.

    On exit, also after an error, the hook is removed, and training flags, device and global random
    state are restored.

    Args:
        model: an MSUN, or any network from images (n, c, h, w) to scores (n, classes).
        at: path of the module whose output is the features. None for the input of the trunk of an
            MSUN, or of the last linear layer or convolution that runs in another network.
        features: whether to record features.
        device: device to run on; None for that of the network.

    Raises:
        TypeError: not a network.
        ValueError: no such module, or a device that cannot be used.
    """

    def __init__(
        self, model: nn.Module, *, at: str | None = None, features: bool = True, device: Any = None
    ) -> None:
        self.model = unwrap(model)
        self.name = type(self.model).__name__
        self.at, self.features = at, features
        self.parameters = parameter_count(self.model)
        self._modules, names = module_paths(self.model)
        if at is not None and at not in names:
            few = ", ".join(repr(name) for name in list(names)[1:6])
            raise ValueError(f"no such module: {at!r} in {self.name}: it has {few}, ...")
        self._path = names[at] if at is not None else None
        self.target, self._stack = device, ExitStack()
        self._kept: Tensor | None = None
        self._probe: ShapeProbe | None = None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its parameters, and so of its inputs."""
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    @property
    def where(self) -> str:
        """A description of the features; known after the first forward."""
        if not self.features:
            return "none"
        if self.at is not None:
            return f"output of {self.at!r}"
        if isinstance(self.model, MSUN):
            return f"the map that the trunk gets, after {self.model.at!r}"
        return f"input of {self._path!r}" if self._path is not None else "none"

    def __enter__(self) -> EvalNetwork:
        with ExitStack() as stack:
            stack.enter_context(preserved_rng())
            move_to(self.model, self.target, stack)
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(torch.no_grad())
            if self.features and self._path is not None:
                module = self._modules[self._path]
                stack.callback(module.register_forward_hook(self._after).remove)
            elif self.features and isinstance(self.model, MSUN):
                stack.callback(self.model.tail.register_forward_pre_hook(self._before).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = None
        self._stack.close()

    def __call__(self, x: Tensor, side_px: int) -> tuple[Tensor, Tensor | None]:
        """Scores and features of a batch.

        Args:
            x: input images (n, c, h, w).
            side_px: side of the images before resizing, for messages.

        Returns:
            (scores (n, outputs), on the CPU; features (n, d), or None without features).

        Raises:
            TypeError: the output is not one tensor of scores.
            ValueError: a size that the network cannot take, or no features.
        """
        x = x.to(self.device, self.dtype)
        self._kept = None
        fed = "" if x.shape[-1] == side_px else f", fed at {x.shape[-1]} px"
        place = f"{self.name} at {side_px} px{fed}"
        try:
            if self.features and self._path is None and not isinstance(self.model, MSUN):
                self._hook_classifier(x)
            out = self.model(x)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory: {place}: use a smaller batch_size") from error
        except Exception as error:  # networks raise any type for a size that they cannot take
            where = failing_module(error, self.model)
            layer = f", in {where!r}" if where else ""
            raise ValueError(
                f"the network cannot take this size: {place}{layer}, "
                f"{one_line(error).replace(': ', ', ')}: leave it out, or feed another size"
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"no scores: {place} gave {what}: return one tensor (n, classes)")
        kept, self._kept = self._kept, None
        if self.features and kept is None:
            raise ValueError(f"no features: {self.at or ROOT!r} of {place} returned none: name "
                             "another module, or evaluate without CKA")  # fmt: skip
        return out.float().cpu(), kept

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(args[0] if args else None)

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._keep(out)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            self._kept = value.flatten(1).clone()  # (n, d); a later in-place layer may overwrite it

    def _hook_classifier(self, x: Tensor) -> None:
        """Hook the input of the last linear layer or convolution of a forward."""
        path, _ = last_layer(self.model, x[:1])
        if path:
            self._path = path
            module = self._modules[path]
            self._stack.callback(module.register_forward_pre_hook(self._before).remove)

    def macs(self, channels: int, side_px: int) -> float:
        """Multiply-accumulates of convolutions and matrix products for one square image.

        Args:
            channels: number of image channels.
            side_px: side of the input.

        Returns:
            The number; nan if it cannot be counted.
        """
        if isinstance(self.model, MSUN):
            return self.model.macs(side_px)
        shape = (1, channels, side_px, side_px)
        if self._probe is None:
            self._probe = ShapeProbe(self.model, shape)
        result = self._probe.run(shape)
        return float("nan") if result.fault else result.macs

    def latency_ms(self, shape: tuple[int, ...]) -> float:
        """Time one forward: the median of 3 to 15 runs after a warm-up run.

        The result depends on the machine, its threads and its load.

        Args:
            shape: shape of the batch, (n, c, h, w); the images are noise.

        Returns:
            Milliseconds per batch.
        """
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x, took = noise.to(self.device, self.dtype), list[float]()
        for _ in range(_MAX_RUNS + 1):
            start = time.perf_counter()
            self.model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            took.append((time.perf_counter() - start) * 1000)
            if len(took) > _MIN_RUNS and sum(took) > 1000 * _BUDGET_S:
                break
        return statistics.median(took[1:])


def update_features(estimator: Minibatch, side: int, features: Tensor | None, name: str) -> None:
    """Update an estimator with the features of a batch at one side.

    Args:
        estimator: the CKA estimator, with sides as keys.
        side: side of the images in pixels.
        features: features (n, d); None for nothing to do.
        name: name of the network, for messages.

    Raises:
        ValueError: features that are not finite; on the CPU.
    """
    if features is None:
        return
    try:
        estimator.update(side, features)
    except NonFiniteFeaturesError as error:
        raise _not_finite(name, side, error) from None


def end_batch(estimator: Minibatch, index: int, name: str) -> None:
    """End a batch of an estimator; on a GPU, features are checked only here.

    Args:
        estimator: the CKA estimator.
        index: number of the batch.
        name: name of the network, for messages.

    Raises:
        ValueError: features that are not finite.
    """
    try:
        estimator.end_batch(index)
    except NonFiniteFeaturesError as error:
        raise _not_finite(name, error.key, error) from None


def _not_finite(name: str, side: int, error: Exception) -> ValueError:
    hint = "check the weights of the network and the mean and std of its inputs"
    return ValueError(f"features are not finite: {name} at {side} px, {error}: {hint}")
