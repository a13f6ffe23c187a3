"""`cka-probe compare`: two networks, or two checkpoints of one, on the same images."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import (
    add_model,
    add_probe_input,
    data_source,
    load_network,
    network_meta,
    pixel_constants,
    side,
)
from cka_probe.cli.output import (
    OUTPUTS,
    announcer,
    output_folder,
    print_left_out,
    write_report,
)
from cka_probe.cli.program import JOINED
from cka_probe.cli.run import add_estimator, shared_options

if TYPE_CHECKING:
    from cka_probe.distributed.ranks import Ranks

__all__ = ["add", "execute"]


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "compare",
        help="two networks, or two checkpoints of one",
        description="Compare every layer of network A with every layer of network B on the same "
        'images: views "a" and "b". Writes DIR/report.npz, cka.csv, grid.png and report.html.',
    )
    add_model(parser, many=True)
    parser.add_argument("--size", type=side, default=224, metavar="S",
                        help="side in pixels (default 224)")  # fmt: skip
    add_probe_input(parser)
    add_estimator(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.set_defaults(call=execute, processes=JOINED)


def execute(args: argparse.Namespace, ranks: Ranks) -> None:
    """Probe both networks at one size, then write the report and its picture.

    Args:
        args: the parsed command line.
        ranks: the processes that share the run.
    """
    from cka_probe.inputs.views import scale_transforms
    from cka_probe.probing.options import ProbeOptions
    from cka_probe.probing.run import Run

    names = args.model * 2 if len(args.model) == 1 else args.model
    weights = args.weights or ["DEFAULT"]
    weights = weights * 2 if len(weights) == 1 else weights
    if len(names) != 2 or len(weights) != 2:
        raise ValueError(
            f"compare takes two networks: {len(args.model)} --model, {len(weights)} --weights: "
            "give --model A --model B, with one --weights for both or one each"
        )
    talks = ranks.first and not args.quiet
    with output_folder(
        args.out, OUTPUTS, overwrite=args.overwrite, resume=args.resume, first=ranks.first
    ) as folder:
        loaded = {
            view: load_network(args, name, file)
            for view, name, file in zip("ab", names, weights, strict=True)
        }
        views = {}
        for view, one in loaded.items():
            transforms = scale_transforms([args.size], **pixel_constants(args, one))
            views[view] = (one.model, transforms[str(args.size)])
        options = ProbeOptions(views=views, **shared_options(args, folder))
        say = announcer(" and ".join(one.name for one in loaded.values())) if talks else None
        probe_run = Run(None, data_source(args.data), options, ranks=ranks, say=say)
        report = probe_run.report(progress=not args.quiet)
        about = {f"model {view!r}": network_meta(one, args) for view, one in loaded.items()}
        report = dataclasses.replace(report, meta={**report.meta, **about})
        if ranks.first:
            write_report(report, folder, ("grid",))
            print_left_out(report)
    if talks:
        print(report.between("a", "b").round(3).to_string())
        print(f"wrote {folder}/: report.npz, cka.csv, grid.png, report.html")
