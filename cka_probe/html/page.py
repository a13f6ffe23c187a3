"""A report as one self-contained HTML page: no network, and readable without JavaScript.

Numbers are rounded: to three decimals in a cell, to four in the tooltip and the table. The values
of all pairs are packed as integers, which the page's own script unpacks. Markup, style and script
are files in `assets/`.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from cka_probe.html.cells import NUMBERED, TINY, cells_html, colours_css, key_html, number
from cka_probe.html.curve import curve_html
from cka_probe.html.provenance import provenance_lines
from cka_probe.io import replacing
from cka_probe.summary import (
    LEVEL,
    Cell,
    caveats,
    details,
    headline,
    missing_cells,
    read_cells,
    same_layers,
)

if TYPE_CHECKING:
    from cka_probe.report import Report

__all__ = ["LIMIT_BYTES", "render_page", "save_page"]

LIMIT_BYTES = 2_000_000
_STATIC_CELLS = 1600  # largest grid that is written as HTML, for readers without JavaScript
_MOST_PAIRS = 700_000  # more pairs do not fit the limit even when compressed
_NAN = 2**32 - 1  # the packed integer that stands for nan
_NOTES = {"all": "", "reference": " Too many pairs for one file of 2 MB: here are those with view "
          "{}; report.npz and cka.csv hold all.", "none": ""}  # fmt: skip


def render_page(report: Report) -> str:
    """One self-contained HTML page: summary, heatmap, curve, grid of two views, table, provenance.

    Where the views' layers differ (two networks), there is no heatmap and no curve, and the table
    names the most alike layer. A page is kept under 2 MB: of a larger report (some 850 layers x
    views) the grid holds only pairs with the reference view, beyond some 1,600 none, and the page
    says so. Without a grid, 7,000 layers x views fit.

    Args:
        report: the report to show.

    Returns:
        The HTML. All names in it are escaped, and its content security policy forbids it to load
        or send anything.
    """
    text, m = "", len(report)
    own = int((report.view == report.reference).sum())
    counts = {"all": m * (m + 1) // 2, "reference": m * own, "none": 0}
    for kept in counts:
        if counts[kept] > _MOST_PAIRS:
            continue
        text = _page(report, kept)
        if len(text.encode()) <= LIMIT_BYTES:
            break
    return text


def save_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page of a report to a file, whole or not at all.

    Raises:
        OSError: where the folder does not exist or cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(render_page(report), encoding="utf-8", newline="\n")


def _page(report: Report, kept: str) -> str:
    """The page with `kept` pairs in its grid: "all", "reference" (pairs with it) or "none"."""
    cells, same = read_cells(report), same_layers(report)
    model, data = _title(report)
    sections = [_heatmap(report), _curve(report)] if same else []
    sections += [_grid(report, kept), _table(report, cells, same=same)]
    parts = {
        "title": escape(f"{model}: CKA" if model else "CKA report"),
        "css": _asset("page.css") + colours_css(),
        "heading": escape(model or "CKA report"),
        "subtitle": escape(_subtitle(report, data)),
        "headline": escape(headline(report)),
        "details": "".join(f"<p class=detail>{escape(line)}</p>\n" for line in details(report)),
        "caveats": "".join(f"<p class=caveat>{escape(line)}</p>\n" for line in caveats(report)),
        "sections": "\n".join(sections),
        "provenance": "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n"
            for name, value in provenance_lines(report)
        ),
        "data": _json(report, kept),
        "pairs": _pairs(report, kept),
        "js": _asset("page.js"),
    }
    filled = re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], _asset("page.html"))
    return filled.encode("utf-8", "replace").decode()  # lone surrogates of odd file names


def _asset(name: str) -> str:
    assets = resources.files("cka_probe.html").joinpath("assets")
    return assets.joinpath(name).read_text(encoding="utf-8")


def _title(report: Report) -> tuple[str, str]:
    """(names of the networks, name of the data), as far as meta holds them."""
    models = [value for key, value in report.meta.items() if key.split()[0:1] == ["model"]]
    names = [str(model["name"]) for model in models if isinstance(model, dict) and "name" in model]
    run = report.meta.get("run")
    data = run.get("images") if isinstance(run, dict) else None
    return " and ".join(dict.fromkeys(names)), (
        str(data.get("name", "")) if isinstance(data, dict) else ""
    )


def _subtitle(report: Report, data: str) -> str:
    """One line: the measure, the images, how many layers and views."""
    meta = report.meta
    kernel = {"linear": "Linear", "rbf": "RBF"}.get(str(meta.get("kernel")), "")
    n = f"{meta['n_images']:,} images" if isinstance(meta.get("n_images"), int) else ""
    images = " of ".join(part for part in (n, data) if part)
    views, layers = len(report.views), len(report.layers)
    size = f"{layers} layer{'s' * (layers != 1)} in {views} view{'s' * (views != 1)}"
    against = f"against view {report.reference}" if views > 1 else ""
    return " · ".join(part for part in (f"{kernel} CKA".strip(), images, size, against) if part)


def _heatmap(report: Report) -> str:
    frames = [report.against(what=what, level=LEVEL) for what in ("cka", "low", "high")]
    missing, label = missing_cells(report), "CKA of each layer in each view"
    table = cells_html(frames, "heatmap", label, report.reference, missing)
    return f"""<section id="heat"><h2>Layers by views</h2>
<p class="note">CKA of each layer in each view with the same layer in view
{escape(report.reference)}. 1: the images are arranged alike, up to rotation and scale.
0: nothing in common.<span class="js-only"> Point at a cell, or use the arrow keys, for its
{100 * LEVEL:g} % interval.</span></p>
{key_html(report.against().to_numpy()[~missing])}
<div class="scroll">{table}</div></section>"""


def _curve(report: Report) -> str:
    return f"""<section id="curves"><h2>Along the layers</h2>
<p class="note">CKA with the same layer in view {escape(report.reference)}, layers in execution
order; bands are {100 * LEVEL:g} % intervals.<span class="js-only"> A view's name switches its line
off and on.</span></p>
{curve_html(report)}</section>"""


def _grid(report: Report, kept: str) -> str:
    """The grid of two views; at first, the first other view against the reference."""
    views, reference = report.views, report.reference
    rows = next((view for view in views if view != reference), reference)
    columns = reference
    if len(views) == 2 and kept == "all":
        rows, columns = views  # as `Report.between` and the picture have them
    frames = [report.between(rows, columns, what, level=LEVEL) for what in ("cka", "low", "high")]
    label = f"CKA of each layer of view {rows} with each of view {columns}"
    table, missing = "", ""
    if kept == "none":
        missing = "Too many pairs for one file of 2 MB: report.npz and cka.csv hold them."
    elif frames[0].size <= _STATIC_CELLS:
        table = cells_html(frames, "grid", label)
    else:
        missing = '<noscript>This grid needs JavaScript.</noscript><table id="grid"></table>'
    choices = [
        f'<label>{name} <select id="{key}" autocomplete="off">'
        + "".join(
            f'<option value="{k}"{" selected" * (view == chosen)}>{escape(view)}</option>'
            for k, view in enumerate(views)
            if kept == "all" or key == "rows" or view == reference
        )
        + "</select></label>"
        for name, key, chosen in (("Rows", "rows", rows), ("columns", "columns", columns))
    ]
    chooser = f'<p class="js-only choose">{" ".join(choices)}</p>' if kept != "none" else ""
    note = _NOTES[kept].format(escape(reference))
    single = len(views) == 1
    return f"""<section id="pairwise"><h2>Layers by layers</h2>
<p class="note">CKA of every layer of one view with every layer of
{"the same" if single else "another"}. Rows: view <b id="of-rows">{escape(rows)}</b>; columns: view
<b id="of-columns">{escape(columns)}</b>.{note}</p>
{chooser}{"" if same_layers(report) else key_html(frames[0].to_numpy())}
<div class="scroll">{table or missing}</div></section>"""


def _table(report: Report, cells: Sequence[Cell], *, same: bool) -> str:
    """A row for each layer in each view but the reference; where layers differ, the most alike."""
    if not same:
        best: dict[tuple[str, str], Cell] = {}
        turned = [Cell(c.other_view, c.other_layer, c.view, c.layer, *c[4:]) for c in cells]
        for cell in [*cells, *(turned if len(report.views) == 1 else [])]:
            known = best.setdefault((cell.view, cell.layer), cell)
            if cell.cka > known.cka or math.isnan(known.cka):
                best[cell.view, cell.layer] = cell
        cells = list(best.values())
    heads = ["layer", "view", *([] if same else ["most alike"]), "CKA", "low", "high", "std. error"]
    rows = []
    for cell in cells:
        texts = [cell.view, *([] if same else [cell.other_layer])]
        numbers = [number(value) for value in (cell.cka, cell.low, cell.high, cell.stderr)]
        rows.append(
            f"<tr><th scope=row>{escape(cell.layer)}"
            + "".join(f"<td>{escape(text)}" for text in texts)
            + "".join(f"<td class=n>{number}" for number in numbers)
            + "</tr>"
        )
    columns = "".join(
        f'<th scope="col"{" class=n" * (k >= len(heads) - 4)}><button type="button">{head}'
        "</button></th>"
        for k, head in enumerate(heads)
    )
    what = (
        f"CKA of each layer with itself in view {escape(report.reference)}"
        if same
        else f"CKA of each layer with the most alike one of view {escape(report.reference)}"
    )
    return f"""<section id="numbers"><h2>Numbers</h2>
<p class="note">{what}; low and high end the {100 * LEVEL:g} % interval.<span class="js-only">
Click a heading to sort.</span></p>
<p class="js-only choose"><label>Filter <input id="filter" type="search" autocomplete="off"
placeholder="layer or view"></label> <output id="count" aria-live="polite"></output></p>
<div class="scroll"><table id="table"><thead><tr>{columns}</tr></thead>
<tbody>{chr(10).join(rows)}</tbody></table></div></section>"""


def _json(report: Report, kept: str) -> str:
    """Names and entries for the script; "<" is escaped so that no name can end the element."""
    layers = {layer: k for k, layer in enumerate(report.layers)}
    views = {view: k for k, view in enumerate(report.views)}
    data: dict[str, Any] = {
        "views": list(views),
        "layers": list(layers),
        "view": [views[name] for name in report.view.tolist()],
        "layer": [layers[name] for name in report.layer.tolist()],
        "reference": views[report.reference],
        "kept": kept,
        "interval": f"{100 * LEVEL:g} % interval",
        "numbered": NUMBERED,
        "tiny": TINY,
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _pairs(report: Report, kept: str) -> str:
    """The pairs' values as base64 of deflated integers.

    Four uint32 for each pair: CKA in thousandths (zigzag: 0, -1, 1, -2, ...); the ten-thousandths
    beyond, plus 5; CKA - low in ten-thousandths; high - CKA beyond that, plus 1. So each number is
    its own decimal rounding; all ones is nan. The bytes stand plane by plane, which deflates best.
    Order: the upper triangle with the diagonal, row by row, or all entries x the reference's.
    """
    if kept == "none":
        return ""
    everything = np.arange(len(report))
    if kept == "all":
        index: Any = np.triu_indices(len(report))
    else:
        index = np.ix_(everything, everything[report.view == report.reference])
    x, low, high = (a[index].ravel() for a in (report.cka, *report.interval(LEVEL)))  # (p,)
    coarse, fine = np.rint(x * 1e3), np.rint(x * 1e4)
    below, above = fine - np.rint(low * 1e4), np.rint(high * 1e4) - fine
    zigzag = np.where(coarse < 0, -2 * coarse - 1, 2 * coarse)
    stack = np.stack([zigzag, fine - 10 * coarse + 5, below, above - below + 1])  # (4, p)
    packed = np.where(np.isnan(stack), _NAN, np.clip(stack, 0, _NAN - 1)).astype("<u4")
    planes = packed.view(np.uint8).reshape(4, -1, 4).transpose(0, 2, 1)  # (4, 4 bytes, p)
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode()
