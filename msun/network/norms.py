"""Batch norms by image size: one norm per trained scale, and statistics for further sizes.

Private batch norm per input size: Wang et al. 2020 (RS-Net). Re-estimated statistics: Yu et al.
2019 (slimmable networks), Yang et al. 2020 (MutualNet).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from cka_probe.activations.meta import detached_copy
from cka_probe.rng import eval_mode

__all__ = [
    "SizedNorm",
    "calibrated_sizes",
    "install",
    "recalibrate",
    "select",
    "sized_norms",
    "without_calibration",
]

Size = tuple[int, int]
_BUFFER = re.compile(r"(mean|var)_(\d+)x(\d+)$")  # names of `_names`: "mean_32x48"


class SizedNorm(nn.Module):
    """A batch norm for several scales: one copy per scale, or one shared norm.

    Statistics can be re-estimated for further sizes (h, w). In eval mode, images of such a size are
    normalised with them, and with weight and bias of the active scale. They are buffers, so a state
    dict holds them.

    Args:
        norm: a batch norm, or a subclass with an activation; becomes part of this module.
        scales: trained sides in pixels, one copy each; None for one norm for all.
    """

    def __init__(self, norm: nn.Module, scales: Sequence[int] | None = None) -> None:
        super().__init__()
        keys = [_SHARED] if scales is None else [str(scale) for scale in scales]
        self.norms = nn.ModuleDict({keys[-1]: norm})
        for key in keys[:-1]:
            self.norms[key] = detached_copy(norm)
        self.norms = nn.ModuleDict({key: self.norms[key] for key in keys})
        self.sizes: set[Size] = set()
        self.active: tuple[int, Size] | None = None
        self.moments: _Moments | None = None
        self.train(norm.training)

    def forward(self, x: Tensor) -> Any:
        """Normalise (n, c, ...) with the norm of the active scale."""
        norm, size = self.norm, self.active[1] if self.active else (0, 0)
        if self.moments is not None:
            mean, var = self.moments.update(x)
        elif not self.training and size in self.sizes:
            mean, var = (getattr(self, name) for name in _names(size))
        else:
            return norm(x)
        return functional_call(norm, {"running_mean": mean, "running_var": var}, (x,))

    @property
    def norm(self) -> nn.Module:
        """The norm of the active scale; the last norm before a scale was selected."""
        if _SHARED in self.norms:
            return self.norms[_SHARED]
        key = str(self.active[0]) if self.active else list(self.norms)[-1]
        if key not in self.norms:
            known = ", ".join(self.norms)
            raise ValueError(f"no batch norm for this scale: {key} px: it has {known}")
        return self.norms[key]

    def store(self, size: Size, mean: Tensor, var: Tensor) -> None:
        """Store statistics for images of a size.

        Args:
            size: (h, w) in pixels.
            mean: mean of each channel, (c,).
            var: variance of each channel, (c,).
        """
        like: Any = self.norm.running_mean
        for name, value in zip(_names(size), (mean, var), strict=True):
            self.register_buffer(name, value.detach().to(like.device, like.dtype).clone())
        self.sizes.add(size)

    def remove(self, size: Size) -> None:
        """Remove the statistics for images of a size."""
        for name in _names(size):
            delattr(self, name)
        self.sizes.remove(size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load a state; afterwards the further sizes are exactly those of the state dict."""
        keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        found = [match for key in keys if (match := _BUFFER.match(key))]
        sizes = {(int(match[2]), int(match[3])) for match in found}
        for size in self.sizes - sizes:
            self.remove(size)
        like: Any = next(iter(self.norms.values())).running_mean
        for size in sizes - self.sizes:
            self.store(size, torch.zeros_like(like), torch.ones_like(like))
        super()._load_from_state_dict(state_dict, prefix, *args)


_SHARED = "all"  # key of the one norm that all scales share


def _names(size: Size) -> tuple[str, str]:
    """The names of the buffers of a size."""
    return f"mean_{size[0]}x{size[1]}", f"var_{size[0]}x{size[1]}"


class _Moments:
    """Exact mean and variance per channel over several batches (Chan et al. 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch (n, c, ...); return its own mean and biased variance, as in training."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        var, mean = torch.var_mean(wide, axes, correction=0)
        count = x.numel() // x.shape[1]
        m, v = mean.detach().cpu().double(), var.detach().cpu().double()
        total = self.count + count
        apart = m - self.mean
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + v * count + apart**2 * (self.count * count / total)
        self.count = total
        return mean, var

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, (c,) each, as the running statistics of batch norm."""
        mean, squares = torch.as_tensor(self.mean), torch.as_tensor(self.squares)
        return mean, squares / max(self.count - 1, 1)


def install(module: nn.Module, scales: Sequence[int] | None = None) -> None:
    """Wrap every batch norm with running statistics in a `SizedNorm`, at any depth.

    A norm that is registered at several paths gets one wrapper.

    Args:
        module: a network; changed in place.
        scales: as for `SizedNorm`.
    """
    made: dict[nn.Module, SizedNorm] = {}
    for parent in list(module.modules()):
        if isinstance(parent, SizedNorm):
            made |= dict.fromkeys(parent.norms.values(), parent)
    for parent in list(module.modules()):
        if isinstance(parent, nn.ModuleDict) and any(p.norms is parent for p in made.values()):
            continue
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) and child.running_mean is not None:
                made[child] = made.get(child) or SizedNorm(child, scales)
                parent._modules[name] = made[child]


def sized_norms(module: nn.Module) -> list[SizedNorm]:
    """All sized norms of a network, in order of their paths."""
    return [part for part in module.modules() if isinstance(part, SizedNorm)]


def select(module: nn.Module | Iterable[SizedNorm], scale: int, size: Size) -> None:
    """Select scale and image size in every sized norm of a network.

    Args:
        module: a network, or its sized norms.
        scale: a trained side in pixels, whose norms are used.
        size: size of the images, (h, w) in pixels.
    """
    for norm in sized_norms(module) if isinstance(module, nn.Module) else module:
        norm.active = (scale, size)


def calibrated_sizes(module: nn.Module) -> tuple[Size, ...]:
    """The sizes (h, w) for which statistics were re-estimated, ascending."""
    return tuple(sorted({size for norm in sized_norms(module) for size in norm.sizes}))


@contextmanager
def without_calibration(module: nn.Module) -> Iterator[None]:
    """Remove the statistics for further sizes while the context is open.

    Args:
        module: a network with sized norms.
    """
    kept = [
        (norm, size, *(getattr(norm, name) for name in _names(size)))
        for norm in sized_norms(module)
        for size in sorted(norm.sizes)
    ]
    for norm, size, *_ in kept:
        norm.remove(size)
    try:
        yield
    finally:
        for norm, size, mean, var in kept:
            norm.store(size, mean, var)


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Tensor], size: int | tuple[int, int]
) -> tuple[int, int]:
    """Re-estimate the batch norm statistics for images of one size, on images of that size.

    One pass: each batch is normalised with its own statistics, as in training, and all other
    modules are in eval mode. The stored statistics are the exact mean and unbiased variance of each
    channel over all batches. If the pass fails, the old statistics stay.

    Args:
        model: a network with `SizedNorm` modules.
        batches: images (n, c, h, w), preprocessed for the network.
        size: size of the images, (h, w) in pixels; one number for squares.

    Returns:
        (number of images, number of norms re-estimated).

    Raises:
        ValueError: no batches, or images of another size.
    """
    wanted = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    norms = sized_norms(model)
    n = 0
    with eval_mode(model), _collecting_moments(norms):
        for batch in batches:
            if tuple(batch.shape[-2:]) != wanted:
                h, w = batch.shape[-2:]
                text = f"{h} x {w}, not {wanted[0]} x {wanted[1]}"
                raise ValueError(f"images of another size: {text}: resize them first")
            model(batch)
            n += len(batch)
        if not n:
            raise ValueError(
                f"no images to re-estimate on: {wanted[0]} x {wanted[1]}: give one batch or more"
            )
        ran = [(norm, norm.moments) for norm in norms if norm.moments and norm.moments.count]
    for norm, moments in ran:
        norm.store(wanted, *moments.compute())
    return n, len(ran)


@contextmanager
def _collecting_moments(norms: list[SizedNorm]) -> Iterator[None]:
    """Let the norms collect moments while the context is open."""
    try:
        for norm in norms:
            norm.moments = _Moments()
        yield
    finally:
        for norm in norms:
            norm.moments = None
