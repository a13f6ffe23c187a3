"""A report as figures; each function takes `ax=None` and returns the Axes."""

from cka_probe.plot.figures import curve, grid, heatmap, save_figure

__all__ = ["curve", "grid", "heatmap", "save_figure"]
