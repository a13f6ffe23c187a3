"""`cka-probe plot`: a figure of a saved report."""

import argparse
from typing import Any

from cka_probe.cli.output import file_backend
from cka_probe.cli.program import FIRST

__all__ = ["add", "execute"]

KINDS = ("heatmap", "curve", "grid")


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "plot", help="a figure of a report", description="Draw a saved report.npz."
    )
    word = parser.add_argument
    word("report", metavar="report.npz")
    word("--kind", default="heatmap", metavar="heatmap|curve|grid",
         help="layers x views (default), a line per view, or layers x layers")  # fmt: skip
    word("--view", metavar="V", help="heatmap, curve: compare with this view instead of the "
         "reference; grid: the view on the rows")  # fmt: skip
    word("--against", metavar="V", help="grid: the view on the columns")
    word("--out", required=True, metavar="FILE", help=".png, .pdf or .svg")
    parser.set_defaults(call=execute, processes=FIRST)


def execute(args: argparse.Namespace) -> None:
    """Draw the figure and save it."""
    from cka_probe.plot import figures
    from cka_probe.report import Report

    if args.kind not in KINDS:
        raise ValueError(f"unknown kind of figure: {args.kind!r}: choose {', '.join(KINDS)}")
    if args.against is not None and args.kind != "grid":
        raise ValueError(
            f"--against is for a grid: {args.against!r} with --kind {args.kind}: use --view"
        )
    report = Report.load(args.report)
    with file_backend():
        if args.kind == "grid":
            ax = figures.grid(report, args.view, args.against)
        else:
            draw = figures.heatmap if args.kind == "heatmap" else figures.curve
            ax = draw(report, args.view)
        figures.save_figure(ax, args.out)
    print(f"wrote {args.out}")
