"""Reports made up for the page, and what a reader should find on it."""

import numpy as np

from cka_probe.report import Report

LAYERS = ["stem", "layer1.0", "layer1.1", "layer2.0", "head"]
VIEWS = ["32", "64", "96"]
READ = """id => [...document.querySelectorAll(`#${id} tbody tr`)].map(row =>
  [...row.querySelectorAll("td")].map(cell =>
    [cell.textContent, cell.dataset.c ?? "", cell.dataset.i ?? ""]))"""


def made(layers=LAYERS, views=VIEWS, *, nan=(), groups=8, seed=0, spread=0.05, **meta):
    """A report of random numbers, some of them negative."""
    rng, m = np.random.default_rng(seed), len(layers) * len(views)
    cka, stderr = rng.uniform(-0.3, 1, (m, m)), rng.uniform(0, spread, (m, m))
    cka, stderr = ((a + a.T) / 2 for a in (cka, stderr))
    np.fill_diagonal(cka, 1)
    cka[list(nan)] = np.nan
    cka[:, list(nan)] = np.nan
    entries = [(view, layer) for view in views for layer in layers]
    return Report(cka, stderr, *zip(*entries, strict=True), {"groups": groups, **meta})


def text(value, decimals=4):
    return f"{round(float(value), decimals) + 0.0:.{decimals}f}"


def ends(low, high):
    return "" if np.isnan(low) else f"{text(low)} to {text(high)}"


def expected(report, take):
    """What READ should find: the three texts of each cell, from frames that take(what) gives."""
    cka, low, high = (take(what).to_numpy() for what in ("cka", "low", "high"))
    return [
        [
            ["nan", "", ""]
            if np.isnan(cka[r, c])
            else [text(cka[r, c], 3), text(cka[r, c]), ends(low[r, c], high[r, c])]
            for c in range(cka.shape[1])
        ]
        for r in range(cka.shape[0])
    ]


def focused(tab, what="getAttribute('aria-label')"):
    return tab.evaluate(f"document.activeElement.{what}")


def luminance(colour):
    channels = np.array(colour[:3]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
