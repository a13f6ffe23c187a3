"""One network under measurement: its scores and features, what it costs, how long it takes."""

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
from msun.network.model import MSUN
from msun.network.shape_probe import ShapeProbe, parameter_count

__all__ = ["Measured", "close_features", "put_features"]

_RUNS = 15  # of a latency, at most
_LEAST_RUNS = 3
_BUDGET_S = 0.5  # of a latency; no more runs are begun after it
_MATRICES = (nn.Linear, nn.Conv2d)


class Measured:
    """A network in a `with`: in eval mode, without gradients, with one hook for its features.

    Afterwards, however the `with` ends, the hook is gone and each module's training flag, the
    device and the global random state are as they were.

    Args:
        model: an MSUN, or any network from images (n, c, h, w) to scores (n, classes).
        at: the module whose output is taken as features. None: the map that an MSUN's trunk gets;
            what goes into the last linear layer or convolution that runs of any other network.
        features: whether features are wanted at all.
        device: where to run; None for where the network is.

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
        """Where the network is."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters, and so of what it is fed."""
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    @property
    def where(self) -> str:
        """What the features are, in words; known after the first forward."""
        if not self.features:
            return "none"
        if self.at is not None:
            return f"output of {self.at!r}"
        if isinstance(self.model, MSUN):
            return f"the map that the trunk gets, after {self.model.at!r}"
        return f"input of {self._path!r}" if self._path is not None else "none"

    def __enter__(self) -> Measured:
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
            x: what is fed, (n, c, h, w).
            side_px: the size that the images had, for messages.

        Returns:
            (scores (n, outputs), on the CPU; features (n, d), or None where none are wanted).

        Raises:
            TypeError: the network gives no scores.
            ValueError: it cannot take the size, or there are no features to take.
        """
        x = x.to(self.device, self.dtype)
        self._kept = None
        fed = "" if x.shape[-1] == side_px else f", fed at {x.shape[-1]} px"
        place = f"{self.name} at {side_px} px{fed}"
        try:
            if self.features and self._path is None and not isinstance(self.model, MSUN):
                self._find_classifier(x)
            out = self.model(x)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory: {place}: use a smaller batch_size") from error
        except Exception as error:  # whatever a network raises on a size that it cannot take
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
            raise ValueError(f"no features: {self.at or ROOT!r} of {place} put out none: name "
                             "another module, or do without CKA")  # fmt: skip
        return out.float().cpu(), kept

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(args[0] if args else None)

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._keep(out)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            self._kept = value.flatten(1).clone()  # (n, d); a later layer may write into it

    def _find_classifier(self, x: Tensor) -> None:
        """Hook what goes into the last linear layer or convolution of a forward."""
        ran: list[str] = []
        with ExitStack() as stack:
            for path, module in self._modules.items():
                if isinstance(module, _MATRICES):
                    hook = module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
                    stack.callback(hook.remove)
            self.model(x[:1])
        if ran:
            self._path = ran[-1]
            module = self._modules[ran[-1]]
            self._stack.callback(module.register_forward_pre_hook(self._before).remove)

    def macs(self, channels: int, side_px: int) -> float:
        """Multiply-accumulates of convolutions and matrix products for one square image.

        Args:
            channels: of the image.
            side_px: what is fed.

        Returns:
            The number; nan where it cannot be counted.
        """
        if isinstance(self.model, MSUN):
            return self.model.macs(side_px)
        shape = (1, channels, side_px, side_px)
        if self._probe is None:
            self._probe = ShapeProbe(self.model, shape)
        result = self._probe.run(shape)
        return float("nan") if result.fault else result.macs

    def latency_ms(self, shape: tuple[int, ...]) -> float:
        """How long one forward takes here and now: the median of 3 to 15 runs after one more.

        It is a fact about this machine, its threads and what else it does at the time.

        Args:
            shape: of the batch, (n, c, h, w); the images are noise.

        Returns:
            Milliseconds a batch.
        """
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x, took = noise.to(self.device, self.dtype), list[float]()
        for _ in range(_RUNS + 1):
            start = time.perf_counter()
            self.model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            took.append((time.perf_counter() - start) * 1000)
            if len(took) > _LEAST_RUNS and sum(took) > 1000 * _BUDGET_S:
                break
        return statistics.median(took[1:])


def put_features(estimator: Minibatch, side: int, features: Tensor | None, name: str) -> None:
    """Hand the features of a batch at one side over, where there are any.

    Raises:
        ValueError: they are not finite; on the CPU.
    """
    if features is None:
        return
    try:
        estimator.update(side, features)
    except NonFiniteFeaturesError as error:
        raise _not_finite(name, side, error) from None


def close_features(estimator: Minibatch, index: int, name: str) -> None:
    """End a batch; an accelerator tells only then what was not finite in it.

    Raises:
        ValueError: features are not finite.
    """
    try:
        estimator.end_batch(index)
    except NonFiniteFeaturesError as error:
        raise _not_finite(name, error.key, error) from None


def _not_finite(name: str, side: int, error: Exception) -> ValueError:
    way = "mend the network's weights, or its input's normalisation"
    return ValueError(f"features are not finite: {name} at {side} px, {error}: {way}")
