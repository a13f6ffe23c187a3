"""The multi-scale network: a subnet for each scale, one trunk, and the routing of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msun.cutting.dataflow import Part
from msun.network.norms import SizedNorm, calibrated_sizes, select, sized_norms
from msun.network.planner import Grid, Plan, Planner
from msun.network.policy import Policy, route
from msun.network.shape_probe import first_tensor

__all__ = ["MSUN", "Origin", "resized"]


class Origin(NamedTuple):
    """Where a network comes from, in plain values: what a checkpoint must agree with.

    Attributes:
        backbone: its class.
        fingerprint: SHA-256 of its structure, see `msun.build.fingerprint`.
        subnets: "hand-made as in the paper: resnet50", or "strides taken out" and why.
        start: what the small subnets started from.
        changes: scale -> what differs from the backbone's head, as text; "" for nothing.
    """

    backbone: str
    fingerprint: str
    subnets: str
    start: str
    changes: dict[int, str]


class MSUN(nn.Module):
    """One network for images of any size (after Liu, Zhu, Liu 2024, arXiv 2403.18294).

    Made by `msun.build`. Each image goes through the subnet of one trained scale; the map z is
    brought to the grid that the policy names, and the trunk makes logits of it.

    Attributes:
        subnets: the subnets by side in pixels; the reference's alone if all share its weights.
        tail: the trunk, which all scales share.
        scales: trained sides in pixels, ascending.
        at: the module after which the backbone was cut.
        preset: the name of the preset that it was built from.
        policy: the choices.
        spec: plain: how to build the backbone again, {"name": "resnet18", "model_args": {}}, and
            what else is known of it (mean, std); {} where it was built from a bare module.
        origin: the backbone, and where the subnets come from.
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
        """Of the output for one image at the reference scale, (1, classes)."""
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
            ValueError: another side.
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
        """The map that the trunk gets.

        Args:
            x: images (n, c, h, w).
            scale: whose subnet; None for the one that they are routed to.

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
            self._planner.plan(*size, scale)  # says so where the size is at fault
            if given == (rounded := self._planner.fed(*size, scale)):
                raise
            given, z = rounded, subnet(resized(x, rounded, antialias=True))
        if scale != self.reference and hasattr(z, "cut_sizes"):
            del z.cut_sizes
        merged = self._planner.merged(*given, scale, self._planner.grid(tuple(z.shape)))
        return resized(z, merged, self.axes, antialias=self.policy.antialias)

    def step(self, x: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Both at once, for training: (logits, z).

        Args:
            x: images (n, c, h, w).
            scale: whose subnet and batch norms.
        """
        z = self.features(x, scale)
        return self._logits(z), z

    def forward(self, x: Tensor | Iterable[Tensor]) -> Tensor:
        """Logits, by the subnet that each image's size is routed to.

        Args:
            x: images (n, c, h, w), or a list of images (c, h, w) of any sizes, which are grouped
                by size; in training mode each group is a batch of its own.

        Returns:
            (n, classes), in the order given.

        Raises:
            TypeError: neither of both.
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
        """How an image is served.

        Args:
            h: height in pixels.
            w: width in pixels; None for a square.
            scale: whose subnet; None for the one that it is routed to.

        Raises:
            ValueError: a size that the subnet cannot take, or a scale that was not trained.
        """
        if scale is not None:
            self.subnet(scale)  # refuses other scales
        return self._planner.plan(h, h if w is None else w, scale)

    def train(self, mode: bool = True) -> MSUN:
        """As for any module; subnets that share the head's weights follow."""
        super().train(mode)
        for subnet in self._sharing.values():
            subnet.train(mode)
        return self

    def extra_repr(self) -> str:
        """What stands first when the network is printed."""
        return f"{self.preset} at {self.at!r} for {', '.join(map(str, self.scales))} px"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; the parameters of subnets were named "heads." by earlier versions."""
        old = f"{prefix}heads."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}subnets.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _select(self, scale: int, size: Grid) -> None:
        """Let the batch norms work for images of a size."""
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
        logits = first_tensor(out)  # then come those of auxiliary heads
        if logits is None:
            raise TypeError(f"no logits: the trunk gave {type(out).__name__}: return a tensor")
        return logits


def resized(z: Tensor, grid: Grid, axes: tuple[int, int] = (2, 3), *, antialias: bool) -> Tensor:
    """A map brought to a grid by one bilinear resize; the same tensor where it is on it.

    Args:
        z: maps with rows and columns at `axes`.
        grid: (rows, columns).
        axes: (2, 3), or (1, 2) for channels last.
        antialias: where it shrinks.
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
