"""For each image size: the subnet, the grid of the trunk, and the cost of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from msun.cutting.halves import Part
from msun.network.policy import Policy, fed_size, merge_grid, route
from msun.network.shape_probe import ProbeResult, ShapeProbe

__all__ = ["Grid", "Plan", "Planner"]

Grid = tuple[int, int]


class Plan(NamedTuple):
    """Subnet, grids and cost for images of one size.

    Attributes:
        scale: scale of the subnet, in pixels.
        grid: grid of the subnet's map, (rows, columns).
        merged: merge grid, on which the trunk runs.
        macs: multiply-accumulates of subnet and trunk for one image.
    """

    scale: int
    grid: Grid
    merged: Grid
    macs: int


class _Cache(dict[Any, Any]):
    """Shapes and costs by size; not copied or pickled, since they can be computed again."""

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()


class Planner:
    """Computes shapes and costs on the meta device, once per size.

    Args:
        head: function from a scale to its subnet.
        tail: the trunk.
        scales: trained sides in pixels, ascending.
        stock: scales whose subnets have the same strides as that of the reference.
        policy: the policy of the network.
        channels: number of image channels.
        axes: axes of rows and columns in the map.
    """

    def __init__(
        self,
        head: Callable[[int], Part],
        tail: Part,
        *,
        scales: tuple[int, ...],
        stock: Collection[int],
        policy: Policy,
        channels: int,
        axes: tuple[int, int],
    ) -> None:
        self.head, self.tail = head, tail
        self.scales, self.stock, self.policy = scales, set(stock), policy
        self.channels, self.axes = channels, axes
        self._memo = _Cache()

    @property
    def reference(self) -> int:
        """The largest scale."""
        return self.scales[-1]

    def plan(self, h: int, w: int, scale: int | None = None) -> Plan:
        """Subnet, grids and cost for an image of a size.

        Args:
            h: height in pixels.
            w: width in pixels.
            scale: scale of the subnet; None to route by the size.

        Raises:
            ValueError: a size that the subnet cannot take.
        """
        scale = route(self.scales, h, w, self.policy.routing) if scale is None else scale
        given = self.fed(h, w, scale)
        result = self._subnet_shapes(scale, *given)
        if result.fault:
            as_fed = "" if given == (h, w) else f" fed at {given[0]} x {given[1]}"
            raise ValueError(
                f"the {scale} px subnet cannot take this size: {h} x {w}{as_fed}, {result.fault}: "
                f"resize the images to {scale} x {scale} px"
            )
        h, w = given
        grid = self.grid(result.shape)
        merged = self.merged(h, w, scale, grid)
        return Plan(scale, grid, merged, result.macs + self.tail_shapes(merged).macs)

    def fed(self, h: int, w: int, scale: int, *, known: bool = False) -> Grid:
        """The input size of a subnet for an image; a resized image is rounded to a valid size.

        Args:
            h: height of the image in pixels.
            w: width in pixels.
            scale: scale of the subnet.
            known: whether to use only sizes that were checked before, without a new check.
        """
        wanted = fed_size(self.policy, h, w, scale, self.reference)
        key = ("fed", wanted, scale)
        if wanted == (h, w) or (known and key not in self._memo):
            return wanted
        if key not in self._memo:
            # networks ask for multiples of their total stride, mostly a power of 2 up to 64
            tried = [wanted, *(_fitting(wanted, d) for d in (2, 4, 8, 16, 32, 64))]
            good = (g for g in tried if not self._subnet_shapes(scale, *g).fault)
            self._memo[key] = next(good, wanted)
        given: Grid = self._memo[key]
        return given

    def merged(self, h: int, w: int, scale: int, grid: Grid) -> Grid:
        """The merge grid, on which the trunk runs.

        Args:
            h: height of the input of the subnet in pixels.
            w: width in pixels.
            scale: scale of the subnet.
            grid: grid of its map.
        """
        key = ("merged", h, w, scale)
        if key not in self._memo:
            wanted = merge_grid(
                self.policy,
                h,
                w,
                scale=scale,
                reference=self.reference,
                full=self.full(),
                native=lambda: grid if scale in self.stock else self._native(h, w),
            )
            self._memo[key] = self._rounded(wanted)
        merged: Grid = self._memo[key]
        return merged

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Rows and columns of a map."""
        return shape[self.axes[0]], shape[self.axes[1]]

    def full(self) -> Grid:
        """The grid of a square image at the reference scale."""
        return self.grid(self._reference_map())

    def sizes(self, grid: Grid) -> Any:
        """The further sizes for a tail that needs them, for a map of the reference on a grid."""
        if not self.tail.needs_sizes:
            return None
        full, side = self.full(), self.reference
        h, w = (max(1, round(g * side / f)) for g, f in zip(grid, full, strict=True))
        return self._subnet_shapes(side, h, w).sizes

    def tail_shapes(self, grid: Grid) -> ProbeResult:
        """Output shape and cost of the trunk for a map on a grid."""
        if "tail" not in self._memo:
            full = self.full()
            self._memo["tail"] = ShapeProbe(self.tail, self._map(full), self.sizes(full))
        probe: ShapeProbe = self._memo["tail"]
        return probe.run(self._map(grid), self.sizes(grid))

    def _subnet_shapes(self, scale: int, h: int, w: int) -> ProbeResult:
        key = ("head", scale)
        if key not in self._memo:
            known = (1, self.channels, self.reference, self.reference)
            if scale == self.reference:
                self._memo[key] = ShapeProbe(self.head(scale), known)
            else:
                self._subnet_shapes(self.reference, *known[2:])
                like = self._memo["head", self.reference]
                self._memo[key] = ShapeProbe(self.head(scale), like=like)
        probe: ShapeProbe = self._memo[key]
        return probe.run((1, self.channels, h, w))

    def _reference_map(self) -> tuple[int, ...]:
        return self._subnet_shapes(self.reference, self.reference, self.reference).shape

    def _map(self, grid: Grid) -> tuple[int, ...]:
        """The shape of one map on a grid."""
        shape = list(self._reference_map())
        shape[self.axes[0]], shape[self.axes[1]] = grid
        return tuple(shape)

    def _native(self, h: int, w: int) -> Grid:
        """The grid of the reference subnet; if it cannot take the size, in proportion to it."""
        result = self._subnet_shapes(self.reference, h, w)
        if not result.fault:
            return self.grid(result.shape)
        rows, columns = self.full()
        return max(1, rows * h // self.reference), max(1, columns * w // self.reference)

    def _rounded(self, grid: Grid) -> Grid:
        """The nearest grid that the trunk takes: as given, in multiples up to 32, or larger."""
        if min(grid) >= 3 and self._takes_any():
            return grid
        larger = range(1, max(self.full()) - min(grid) + 1)
        multiples = [[max(d, d * int(g / d + 0.5)) for g in grid] for d in (1, 2, 4, 8, 16, 32)]
        tried = [(rows, columns) for rows, columns in multiples]
        tried += [(grid[0] + k, grid[1] + k) for k in larger]
        return next((g for g in tried if not self.tail_shapes(g).fault), self.full())

    def _takes_any(self) -> bool:
        """Whether the trunk takes small odd grids; then no other grid from 3 on is checked."""
        return not any(self.tail_shapes(odd).fault for odd in ((3, 5), (11, 13)))


def _fitting(size: Grid, d: int) -> Grid:
    """The nearest size in multiples of d; a change of aspect counts twice a change of area."""
    sides = [{max(d, side // d * d), -(-side // d) * d} for side in size]

    def distance(one: Grid) -> float:
        rows, columns = (math.log(a / b) for a, b in zip(one, size, strict=True))
        return abs(rows - columns) + abs(rows + columns) / 2

    return min(((rows, columns) for rows in sides[0] for columns in sides[1]), key=distance)
