"""One self-contained HTML page about a demo: text, figures and a table."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from cka_probe.io import replacing

__all__ = ["save_page"]

_STYLE = """
:root { --paper: #fff; --ink: #1b1d21; --soft: #5a616b; --rule: #e3e6ea; color-scheme: light dark }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e7e9ec; --soft: #a0a8b2; --rule: #2c3036 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 52rem; padding: 2rem 1.2rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 0 }
p { max-width: 44rem } .soft { color: var(--soft); font-size: .92rem }
img { max-width: 100%; background: #fff; border-radius: 6px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem;
  overflow-wrap: normal } th { vertical-align: bottom }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def save_page(
    path: str | os.PathLike[str],
    title: str,
    lead: Sequence[str],
    pictures: Mapping[str, tuple[Path, str]],
    table: pd.DataFrame,
    notes: Sequence[str],
) -> None:
    """Write a page that needs nothing but itself, whole or not at all.

    Args:
        path: the .html file.
        title: the headline.
        lead: paragraphs under it.
        pictures: {heading: (PNG file, text for those who cannot see it)}.
        table: the table; the caller rounds its numbers.
        notes: small paragraphs at the end.

    Raises:
        OSError: a picture cannot be read, or the page not written.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for text in lead)]
    for heading, (file, text) in pictures.items():
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts.append(f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">')
    rows = table.to_html(index=False, border=0, na_rep="")
    parts.append(f'<h2>Numbers</h2><div class="scroll">{rows}</div>')
    parts += [f'<p class="soft">{escape(text)}</p>' for text in notes]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )
    with replacing(path) as temporary:
        Path(temporary).write_text(page, encoding="utf-8", newline="\n")
