"""`cka-probe demo`: the embedded network on the embedded images."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import data_source, seed
from cka_probe.cli.output import OUTPUTS, output_folder, print_comparison, write_report
from cka_probe.cli.program import JOINED

if TYPE_CHECKING:
    from cka_probe.distributed.ranks import Ranks

__all__ = ["add", "execute"]

SIDES_PX = (8, 12, 16, 24, 32, 48, 64)


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "demo",
        help="the main job on embedded images, in under a minute",
        description="Probe a small network that this project trained on drawn characters, at 8 to "
        "64 px; no other data is needed. Writes what `run` writes.",
    )
    word = parser.add_argument
    word("--images", type=int, default=1000, metavar="N", help="test images (default 1000)")
    word("--seed", type=seed, default=0, metavar="S", help="order of the images (default 0)")
    word("--overwrite", action="store_true", help="replace an existing result in --out")
    word("--out", required=True, metavar="DIR", help="folder for the results")
    parser.set_defaults(call=execute, processes=JOINED)


def execute(args: argparse.Namespace, ranks: Ranks) -> None:
    """Probe the embedded network, then write the report and its pictures.

    Args:
        args: the parsed command line.
        ranks: the processes that share the run.
    """
    from cka_probe.inputs.source import FEW, MIN_IMAGES
    from cka_probe.models.embedded import glyphnet
    from cka_probe.probing.api import probe
    from cka_probe.summary import describe

    if args.images < MIN_IMAGES:
        raise ValueError(f"too few images: {args.images}: {FEW}")
    with output_folder(args.out, OUTPUTS, overwrite=args.overwrite, first=ranks.first) as folder:
        if ranks.first:
            sides = ", ".join(map(str, SIDES_PX))
            print(
                f"a small residual network, trained on characters of 64 px, and {args.images} new "
                f"ones at {sides} px",
                flush=True,
            )
        images = data_source("glyphs", args.images)
        report = probe(glyphnet(), images, SIDES_PX, seed=args.seed, ranks=ranks)
        if not ranks.first:
            return
        about = {"name": "cka_probe.models.embedded", "weights": "the package's own"}
        report = dataclasses.replace(report, meta={**report.meta, "model": about})
        write_report(report, folder, ("heatmap", "curve"))
    print_comparison(report)
    print(describe(report))
    print(f"wrote {folder}/: report.npz, cka.csv, heatmap.png, curve.png, report.html")
