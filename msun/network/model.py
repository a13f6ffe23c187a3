"""The multi-scale network: a subnet for each scale, one trunk, and the routing of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msun.cutting.halves import Part
from msun.network.norms import SizedNorm, calibrated_sizes, select, sized_norms
from msun.network.planner import Grid, Plan, Planner
from msun.network.policy import Policy, route
from msun.network.shape_probe import first_tensor

__all__ = ["MSUN", "Origin", "resized"]


class Origin(NamedTuple):
    """How a network was built, in plain values that checkpoints compare.

    Attributes:
        backbone: class name of the backbone.
        fingerprint: SHA-256 of its structure, see `msun.network.builder.fingerprint`.
        subnets: "hand-made as in the paper: resnet50", or "strides taken out", with the reason.
        start: initial weights of the small subnets.
        changes: scale -> changes from the head of the backbone, as text; "" for none.
    """

    backbone: str
    fingerprint: str
    subnets: str
    start: str
    changes: dict[int, str]


class MSUN(nn.Module):
    """One network for images of any size (after Liu, Zhu, Liu 2024, arXiv 2403.18294).

    `msun.build` builds it. Each image goes through the subnet of one trained scale. The resulting
    map z is resized to the merge grid of the policy, and the trunk computes the logits from it.

    Attributes:
        subnets: subnets by side in pixels; only that of the reference if all share its weights.
        tail: the trunk, which all scales share.
        scales: trained sides in pixels, ascending.
        at: path of the module after which the backbone was cut.
        preset: name of the preset.
        policy: the policy.
        spec: plain values that describe how to rebuild the backbone, {"name": "resnet18",
            "model_args": {}}, and its preprocessing (mean, std); {} for a bare module.
        origin: the backbone and the kind of subnets.
    """

    def __init__(
        self,
        subnets: Mapping[int, Part],
        tail: Part,
        *,
        at: str,
        preset: str,
        policy: Policy,
        spec: Mapping[str, Any],
        origin: Origin,
        channels: int,
        axes: tuple[int, int],
    ) -> None:
        super().__init__()
        self.scales = tuple(sorted(subnets))
        own = subnets if policy.subnets == "own" else {self.reference: subnets[self.reference]}
        self.subnets = nn.ModuleDict({str(s): own[s] for s in sorted(own)})
        self.tail = tail
        self.at, self.preset, self.policy = at, preset, policy
        self.spec, self.origin = dict(spec), origin
        self.channels, self.axes = channels, axes
        self._sharing = {s: subnets[s] for s in self.scales if s not in own}
        self._planner = Planner(
            self.subnet,
            tail,
            scales=self.scales,
            stock=[s for s in self.scales if not origin.changes[s]],
            policy=policy,
            channels=channels,
            axes=axes,
        )
        self._norms: list[SizedNorm] = []
        self.train(tail.training)

    @property
    def reference(self) -> int:
        """The largest trained side in pixels, at which the network is the backbone."""
        return self.scales[-1]

    @property
    def calibrated(self) -> tuple[Grid, ...]:
        """The sizes (h, w) for which batch norm statistics were re-estimated."""
        return calibrated_sizes(self)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output for one image at the reference scale, (1, classes)."""
        return self._planner.tail_shapes(self._planner.full()).shape

    @property
    def num_classes(self) -> int:
        """The number of logits per image."""
        return self.output_shape[1]

    def route(self, h: int, w: int) -> int:
        """The scale whose subnet serves an h x w image."""
        return route(self.scales, h, w, self.policy.routing)

    def subnet(self, scale: int) -> Part:
        """The subnet of a scale.

        Args:
            scale: a trained side in pixels.

        Raises:
            ValueError: a scale that was not trained.
        """
        if scale not in self.scales:
            known = ", ".join(map(str, self.scales))
            raise ValueError(f"not a trained scale: {scale}: choose one of {known}")
        if scale not in self._sharing:
            return self.subnets[str(scale)]  # type: ignore[return-value]
        made = self._sharing[scale]
        made.training = self.subnets[str(self.reference)].training
        return made

    def features(self, x: Tensor, scale: int | None = None) -> Tensor:
        """The input of the trunk: the map of the subnet, resized to the merge grid.

        Args:
            x: images (n, c, h, w).
            scale: scale of the subnet; None to route by the size of the images.

        Returns:
            z, (n, c', h', w') on the merge grid, or (n, h', w', c') in channels-last networks.

        Raises:
            ValueError: a size that the subnet cannot take, or a scale that was not trained.
        """
        size = self._size(x)
        scale = self.route(*size) if scale is None else scale
        subnet = self.subnet(scale)
        self._select(scale, size)
        given = self._planner.fed(*size, scale, known=True)
        try:
            z: Tensor = subnet(resized(x, given, antialias=True))
        except Exception:
            self._planner.plan(*size, scale)  # raises a clear error if the size is the cause
            if given == (rounded := self._planner.fed(*size, scale)):
                raise
            given, z = rounded, subnet(resized(x, rounded, antialias=True))
        if scale != self.reference and hasattr(z, "cut_sizes"):
            del z.cut_sizes
        merged = self._planner.merged(*given, scale, self._planner.grid(tuple(z.shape)))
        return resized(z, merged, self.axes, antialias=self.policy.antialias)

    def step(self, x: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Logits and map in one forward, for training.

        Args:
            x: images (n, c, h, w).
            scale: scale of the subnet and of the batch norms.

        Returns:
            (logits (n, classes), z as from `features`).
        """
        z = self.features(x, scale)
        return self._logits(z), z

    def forward(self, x: Tensor | Iterable[Tensor]) -> Tensor:
        """Logits; the size of each image selects its subnet.

        Args:
            x: images (n, c, h, w), or a list of images (c, h, w) of any sizes. Images of one size
                are one batch, also for batch norm in training mode.

        Returns:
            Logits (n, classes), in the given order.

        Raises:
            TypeError: neither a tensor nor a list of images.
            ValueError: an empty list, or a size that the subnet cannot take.
        """
        if isinstance(x, Tensor):
            return self._logits(self.features(x))
        x, groups = list(x), dict[tuple[int, ...], list[int]]()
        for k, image in enumerate(x):
            if not isinstance(image, Tensor) or image.ndim != 3:
                what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(f"not an image: item {k} is {what}: give tensors (c, h, w)")
            groups.setdefault(tuple(image.shape), []).append(k)
        if not groups:
            raise ValueError("no images: an empty list: give one or more")
        stacks = [torch.stack([x[k] for k in places]) for places in groups.values()]
        logits = [self._logits(self.features(stack)) for stack in stacks]
        order = torch.tensor([k for places in groups.values() for k in places])
        return torch.cat(logits)[torch.argsort(order).to(logits[0].device)]  # (n, classes)

    def macs(self, h: int, w: int | None = None) -> int:
        """Multiply-accumulates for one image: convolutions and matrix products.

        Args:
            h: height in pixels.
            w: width in pixels; None for a square.
        """
        return self.plan(h, w).macs

    def plan(self, h: int, w: int | None = None, *, scale: int | None = None) -> Plan:
        """Subnet, grids and cost for an image of a size.

        Args:
            h: height in pixels.
            w: width in pixels; None for a square.
            scale: scale of the subnet; None to route by the size.

        Raises:
            ValueError: a size that the subnet cannot take, or a scale that was not trained.
        """
        if scale is not None:
            self.subnet(scale)  # raises for an untrained scale
        return self._planner.plan(h, h if w is None else w, scale)

    def train(self, mode: bool = True) -> MSUN:
        """Set the mode, also of subnets that share weights and so are no registered submodules."""
        super().train(mode)
        for subnet in self._sharing.values():
            subnet.train(mode)
        return self

    def extra_repr(self) -> str:
        """Preset, cut and scales, for the printed network."""
        return f"{self.preset} at {self.at!r} for {', '.join(map(str, self.scales))} px"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a state; earlier versions named the parameters of subnets "heads."."""
        old = f"{prefix}heads."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}subnets.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _select(self, scale: int, size: Grid) -> None:
        """Select the batch norms and statistics for images of a size."""
        self._norms = self._norms or sized_norms(self)
        select(self._norms, scale, size)

    def _size(self, x: Tensor) -> Grid:
        if x.ndim != 4 or x.shape[1] != self.channels:
            shape = f"{tuple(x.shape)} for {self.channels} channels"
            raise ValueError(f"not a batch of images: {shape}: give (n, c, h, w)")
        return int(x.shape[2]), int(x.shape[3])

    def _logits(self, z: Tensor) -> Tensor:
        sizes = getattr(z, "cut_sizes", None)
        if self.tail.needs_sizes and sizes is None:
            sizes = self._planner.sizes(self._planner.grid(tuple(z.shape)))
        out = self.tail(z) if sizes is None else self.tail(z, sizes)
        logits = first_tensor(out)  # those of auxiliary classifiers come after
        if logits is None:
            raise TypeError(f"no logits: the trunk returned {type(out).__name__}: return a tensor")
        return logits


def resized(z: Tensor, grid: Grid, axes: tuple[int, int] = (2, 3), *, antialias: bool) -> Tensor:
    """Resize a map to a grid, bilinearly; the same tensor if it has that grid.

    Args:
        z: maps (n, c, h, w), or (n, h, w, c) for channels last.
        grid: (rows, columns).
        axes: axes of rows and columns, (2, 3), or (1, 2) for channels last.
        antialias: whether to antialias when the map shrinks.
    """
    before = z.shape[axes[0]], z.shape[axes[1]]
    if before == grid:
        return z
    shrinks = antialias and (before[0] > grid[0] or before[1] > grid[1])
    first = z if axes == (2, 3) else z.movedim(-1, 1)
    wide = first.float() if z.dtype in (torch.float16, torch.bfloat16) else first
    out = F.interpolate(wide, grid, mode="bilinear", align_corners=False, antialias=shrinks)
    out = out.to(z.dtype)
    return out if axes == (2, 3) else out.movedim(1, -1)
