"""Multi-scale networks: where to cut a network, and the two halves."""

from msun.cut import cut, cut_points

__all__ = ["cut", "cut_points"]
