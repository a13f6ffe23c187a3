"""Which subnet serves an image, on what grid the trunk runs, and what both cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from msun.cutting.dataflow import Part
from msun.network.policy import Policy, fed, merge_grid, route
from msun.network.shape_probe import Seen, ShapeProbe

__all__ = ["Grid", "Plan", "Planner"]

Grid = tuple[int, int]


class Plan(NamedTuple):
    """How an image of one size is served.

    Attributes:
        scale: whose subnet.
        grid: what that gives, (rows, columns).
        merged: the grid that the trunk runs at.
        macs: multiply-accumulates of both for one image, convolutions and matrix products.
    """

    scale: int
    grid: Grid
    merged: Grid
    macs: int


class _Cache(dict[Any, Any]):
    """Shapes and costs by size; a copied or pickled network computes them again."""

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()


class Planner:
    """Finds out what sizes do on copies without data, each once.

    Args:
        head: gives the subnet of a scale.
        tail: the trunk.
        scales: trained sides in pixels, ascending.
        stock: those whose subnets have the strides of the reference's.
        policy: the choices.
        channels: of the images.
        axes: where rows and columns stand in the map.
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
        """How an image is served.

        Args:
            h: height in pixels.
            w: width in pixels.
            scale: whose subnet; None for the one that it is routed to.

        Raises:
            ValueError: a size that the subnet cannot take.
        """
        scale = route(self.scales, h, w, self.policy.routing) if scale is None else scale
        given = self.fed(h, w, scale)
        seen = self._subnet_shapes(scale, *given)
        if seen.fault:
            as_fed = "" if given == (h, w) else f" fed at {given[0]} x {given[1]}"
            raise ValueError(
                f"the {scale} px subnet cannot take this size: {h} x {w}{as_fed}, {seen.fault}: "
                f"resize the images to {scale} x {scale} px"
            )
        h, w = given
        grid = self.grid(seen.shape)
        merged = self.merged(h, w, scale, grid)
        return Plan(scale, grid, merged, seen.macs + self.tail_shapes(merged).macs)

    def fed(self, h: int, w: int, scale: int, *, known: bool = False) -> Grid:
        """The size at which a subnet gets an image; where it is resized, rounded to what it takes.

        Args:
            h: height of the image in pixels.
            w: width in pixels.
            scale: whose subnet serves it.
            known: round as far as that was found out before, and find out nothing.
        """
        wanted = fed(self.policy, h, w, scale, self.reference)
        key = ("fed", wanted, scale)
        if wanted == (h, w) or (known and key not in self._memo):
            return wanted
        if key not in self._memo:
            tried = [wanted, *(_fitting(wanted, d) for d in (2, 4, 8, 16, 32, 64))]
            good = (g for g in tried if not self._subnet_shapes(scale, *g).fault)
            self._memo[key] = next(good, wanted)
        given: Grid = self._memo[key]
        return given

    def merged(self, h: int, w: int, scale: int, grid: Grid) -> Grid:
        """The grid that the trunk runs at.

        Args:
            h: height of the image in pixels, as it is fed.
            w: width in pixels.
            scale: whose subnet serves it.
            grid: what that gave.
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
        """What a tail that needs sizes gets with the reference subnet's map of a grid."""
        if not self.tail.needs_sizes:
            return None
        full, side = self.full(), self.reference
        h, w = (max(1, round(g * side / f)) for g, f in zip(grid, full, strict=True))
        return self._subnet_shapes(side, h, w).sizes

    def tail_shapes(self, grid: Grid) -> Seen:
        """What the trunk does with a map of a grid."""
        if "tail" not in self._memo:
            full = self.full()
            self._memo["tail"] = ShapeProbe(self.tail, self._map(full), self.sizes(full))
        shadow: ShapeProbe = self._memo["tail"]
        return shadow.see(self._map(grid), self.sizes(grid))

    def _subnet_shapes(self, scale: int, h: int, w: int) -> Seen:
        key = ("head", scale)
        if key not in self._memo:
            known = (1, self.channels, self.reference, self.reference)
            if scale == self.reference:
                self._memo[key] = ShapeProbe(self.head(scale), known)
            else:
                self._subnet_shapes(self.reference, *known[2:])
                like = self._memo["head", self.reference]
                self._memo[key] = ShapeProbe(self.head(scale), like=like)
        shadow: ShapeProbe = self._memo[key]
        return shadow.see((1, self.channels, h, w))

    def _reference_map(self) -> tuple[int, ...]:
        return self._subnet_shapes(self.reference, self.reference, self.reference).shape

    def _map(self, grid: Grid) -> tuple[int, ...]:
        """The shape of one map on a grid."""
        shape = list(self._reference_map())
        shape[self.axes[0]], shape[self.axes[1]] = grid
        return tuple(shape)

    def _native(self, h: int, w: int) -> Grid:
        """What the reference subnet gives; in proportion where it cannot take the size."""
        seen = self._subnet_shapes(self.reference, h, w)
        if not seen.fault:
            return self.grid(seen.shape)
        rows, columns = self.full()
        return max(1, rows * h // self.reference), max(1, columns * w // self.reference)

    def _rounded(self, grid: Grid) -> Grid:
        """The nearest grid that the trunk takes: as it is, in even numbers, in fours, or larger."""
        if min(grid) >= 3 and self._takes_any():
            return grid
        larger = range(1, max(self.full()) - min(grid) + 1)
        multiples = [[max(d, d * int(g / d + 0.5)) for g in grid] for d in (1, 2, 4, 8, 16, 32)]
        tried = [(rows, columns) for rows, columns in multiples]
        tried += [(grid[0] + k, grid[1] + k) for k in larger]
        return next((g for g in tried if not self.tail_shapes(g).fault), self.full())

    def _takes_any(self) -> bool:
        """Whether the trunk takes small odd grids, and so need not be asked about others."""
        return not any(self.tail_shapes(odd).fault for odd in ((3, 5), (11, 13)))


def _fitting(size: Grid, d: int) -> Grid:
    """A size in multiples of a number: near in its aspect first, then in its area."""
    sides = [{max(d, side // d * d), -(-side // d) * d} for side in size]

    def off(one: Grid) -> float:
        rows, columns = (math.log(a / b) for a, b in zip(one, size, strict=True))
        return abs(rows - columns) + abs(rows + columns) / 2

    return min(((rows, columns) for rows in sides[0] for columns in sides[1]), key=off)
