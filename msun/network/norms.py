"""Batch norms that know sizes: one per trained scale, and statistics for further sizes.

Private batch norm per input size: Wang et al. 2020 (RS-Net). Re-estimated statistics: Yu et al.
2019 (slimmable networks), Yang et al. 2020 (MutualNet).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from cka_probe.rng import eval_mode

__all__ = ["SizedNorm", "calibrated_sizes", "install", "recalibrate", "select"]
__all__ += ["set_aside", "sized_norms"]

Size = tuple[int, int]
_BUFFER = re.compile(r"(mean|var)_(\d+)x(\d+)$")


class SizedNorm(nn.Module):
    """A batch norm for several scales: copies of it by scale, or one that all of them share.

    In eval mode an image of a size (h, w) for which statistics were re-estimated is normalised
    with those, and with weight and bias of the active scale. The statistics are buffers, so that
    a state dict holds them.

    Args:
        norm: any batch norm, a subclass with an activation in it included; becomes part of this.
        scales: each gets a copy; None for one norm for all.
    """

    def __init__(self, norm: nn.Module, scales: Sequence[int] | None = None) -> None:
        super().__init__()
        keys = [_SHARED] if scales is None else [str(scale) for scale in scales]
        self.norms = nn.ModuleDict({keys[-1]: norm})
        for key in keys[:-1]:
            self.norms[key] = copy.deepcopy(norm)
        self.norms = nn.ModuleDict({key: self.norms[key] for key in keys})
        self.sizes: set[Size] = set()
        self.active: tuple[int, Size] | None = None
        self.gathered: _Moments | None = None
        self.train(norm.training)

    def forward(self, x: Tensor) -> Any:
        """(n, c, ...) -> the same shape, by the norm of the active scale."""
        norm, size = self.norm, self.active[1] if self.active else (0, 0)
        if self.gathered is not None:
            mean, var = self.gathered.add(x)
        elif not self.training and size in self.sizes:
            mean, var = (getattr(self, name) for name in _names(size))
        else:
            return norm(x)
        return functional_call(norm, {"running_mean": mean, "running_var": var}, (x,))

    @property
    def norm(self) -> nn.Module:
        """The norm of the active scale; before any is chosen, the last."""
        if _SHARED in self.norms:
            return self.norms[_SHARED]
        key = str(self.active[0]) if self.active else list(self.norms)[-1]
        if key not in self.norms:
            known = ", ".join(self.norms)
            raise ValueError(f"no batch norm for this scale: {key} px: it has {known}")
        return self.norms[key]

    def store(self, size: Size, mean: Tensor, var: Tensor) -> None:
        """Keep statistics for images of a size.

        Args:
            size: (h, w) in pixels.
            mean: per channel, (c,).
            var: per channel, (c,).
        """
        like: Any = self.norm.running_mean
        for name, value in zip(_names(size), (mean, var), strict=True):
            self.register_buffer(name, value.detach().to(like.device, like.dtype).clone())
        self.sizes.add(size)

    def forget(self, size: Size) -> None:
        """Drop the statistics for images of a size."""
        for name in _names(size):
            delattr(self, name)
        self.sizes.remove(size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """The statistics of further sizes become those of the state dict, no more and no less."""
        keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        found = [match for key in keys if (match := _BUFFER.match(key))]
        sizes = {(int(match[2]), int(match[3])) for match in found}
        for size in self.sizes - sizes:
            self.forget(size)
        like: Any = next(iter(self.norms.values())).running_mean
        for size in sizes - self.sizes:
            self.store(size, torch.zeros_like(like), torch.ones_like(like))
        super()._load_from_state_dict(state_dict, prefix, *args)


_SHARED = "all"


def _names(size: Size) -> tuple[str, str]:
    """The buffers of a size."""
    return f"mean_{size[0]}x{size[1]}", f"var_{size[0]}x{size[1]}"


class _Moments:
    """Exact mean and variance per channel of all that passes (Chan et al. 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in (n, c, ...); the batch's own mean and variance, as training normalises."""
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

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, as running statistics are kept; (c,) each."""
        mean, squares = torch.as_tensor(self.mean), torch.as_tensor(self.squares)
        return mean, squares / max(self.count - 1, 1)


def install(module: nn.Module, scales: Sequence[int] | None = None) -> None:
    """Put a `SizedNorm` around every batch norm with running statistics, at any depth.

    A norm that stands at several paths, or is used several times, stays one.

    Args:
        module: changed in place.
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
    """All sized norms inside, in order of their paths."""
    return [part for part in module.modules() if isinstance(part, SizedNorm)]


def select(module: nn.Module | Iterable[SizedNorm], scale: int, size: Size) -> None:
    """Let every sized norm inside work for images of a size, with the norm of a scale.

    Args:
        module: a network, or its sized norms.
        scale: a trained side in pixels.
        size: (h, w) in pixels.
    """
    for norm in sized_norms(module) if isinstance(module, nn.Module) else module:
        norm.active = (scale, size)


def calibrated_sizes(module: nn.Module) -> tuple[Size, ...]:
    """The sizes (h, w) for which statistics were re-estimated, ascending."""
    return tuple(sorted({size for norm in sized_norms(module) for size in norm.sizes}))


@contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """The statistics for further sizes are gone inside, and back afterwards.

    Args:
        module: a network with sized norms.
    """
    kept = [
        (norm, size, *(getattr(norm, name) for name in _names(size)))
        for norm in sized_norms(module)
        for size in sorted(norm.sizes)
    ]
    for norm, size, *_ in kept:
        norm.forget(size)
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

    In one pass every batch is normalised by its own statistics, as in training; what is kept is
    the exact mean and unbiased variance per channel over all batches. All else is in eval mode
    meanwhile. Statistics of that size which were there are replaced, if the pass succeeds.

    Args:
        model: a network with `SizedNorm` inside, called on each batch.
        batches: images (n, c, h, w), normalised as the network wants them.
        size: (h, w) in pixels; a side for square ones.

    Returns:
        (images, norms re-estimated); a network without batch norm has 0 of these.

    Raises:
        ValueError: no batches, or images of another size.
    """
    wanted = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    norms = sized_norms(model)
    n = 0
    with eval_mode(model), _gathering(norms):
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
        seen = [(norm, norm.gathered) for norm in norms if norm.gathered and norm.gathered.count]
    for norm, moments in seen:
        norm.store(wanted, *moments.result())
    return n, len(seen)


@contextmanager
def _gathering(norms: list[SizedNorm]) -> Iterator[None]:
    try:
        for norm in norms:
            norm.gathered = _Moments()
        yield
    finally:
        for norm in norms:
            norm.gathered = None
