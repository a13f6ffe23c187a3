"""`cka-probe run`: one network at several input sizes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import (
    add_model,
    add_probe_input,
    data_source,
    device_of,
    load_network,
    network_meta,
    pixel_constants,
)
from cka_probe.cli.output import (
    OUTPUTS,
    announcer,
    output_folder,
    print_comparison,
    print_left_out,
    write_report,
)
from cka_probe.cli.program import JOINED

if TYPE_CHECKING:
    from cka_probe.distributed.ranks import Ranks

__all__ = ["add", "add_estimator", "execute", "shared_options"]


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "run",
        help="one network, several input sizes",
        description="Feed every image at every scale, compare every layer at every scale with "
        "every other by CKA, and write DIR/report.npz, cka.csv, heatmap.png, curve.png and "
        "report.html.",
        epilog="Example: cka-probe run --model resnet18 --data photos --scales 32,64,128,224 "
        "--out results",
    )
    add_model(parser)
    word = parser.add_argument
    word("--scales", required=True, metavar="32,64,224", help="sides in pixels")
    word("--reference", metavar="S", help="the scale to compare with; default: the largest")
    word("--resize", default="native", metavar="native|restore",
         help="native (default) feeds s x s; restore resizes to s and back up")  # fmt: skip
    word("--no-antialias", action="store_true",
         help="resize without antialiasing (repeats the MSUN paper)")  # fmt: skip
    add_probe_input(parser)
    add_estimator(parser)
    word("--out", required=True, metavar="DIR", help="folder for the results")
    parser.set_defaults(call=execute, processes=JOINED)


def add_estimator(parser: argparse.ArgumentParser) -> None:
    """Add --kernel, --bandwidth, --reduce, --layout, --estimator, --memory, --sketch and --amp."""
    group = parser.add_argument_group("kernel and estimator")
    word = group.add_argument
    word("--kernel", default="linear", metavar="K", help="linear (default) or rbf")
    word("--bandwidth", type=float, metavar="F", help="rbf sigma / median distance (default 1)")
    word("--reduce", default="flatten", metavar="R",
         help="flatten (default), mean, grid=K or tokens: how a map becomes features")  # fmt: skip
    word("--layout", metavar="L", help="where outputs hold their channels: channels_first or "
         "channels_last; default: followed through the network")  # fmt: skip
    word("--estimator", default="minibatch", metavar="E", help="minibatch (default; memory does "
         "not grow with images), exact (keeps all features in memory), sketch (keeps K numbers a "
         "layer and image) or auto (the closest to exact that fits --memory)")  # fmt: skip
    word("--memory", metavar="4GiB", help="budget of exact and auto, with its unit; default: what "
         "is free, or for auto half of it")  # fmt: skip
    word("--sketch", type=int, metavar="K", help="numbers a layer and image (default 512)")
    word("--amp", action="store_true", help="autocast the network to bfloat16")


def shared_options(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Keywords of `ProbeOptions` that `run` and `compare` have in common.

    Args:
        args: the parsed command line.
        folder: the output folder.
    """
    import torch

    return {
        "layers": args.layers,
        "kernel": args.kernel,
        "bandwidth": args.bandwidth,
        "reduce": args.reduce,
        "layout": args.layout,
        "estimator": args.estimator,
        "memory": args.memory,
        "sketch_size": args.sketch,
        "n_images": args.images,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "device": device_of(args) if args.device or torch.cuda.is_available() else None,
        "amp": args.amp,
        "workers": args.workers,
        "skip_bad": args.skip_bad,
        "resume": args.resume,
        "out": folder,
    }


def execute(args: argparse.Namespace, ranks: Ranks) -> None:
    """Probe, then write the report and its pictures.

    Args:
        args: the parsed command line.
        ranks: the processes that share the run.
    """
    from cka_probe.inputs.views import parse_scales
    from cka_probe.probing.options import ProbeOptions
    from cka_probe.probing.run import Run
    from cka_probe.summary import describe

    talks, pictures = ranks.first and not args.quiet, ("heatmap", "curve")
    scales = parse_scales(args.scales)
    with output_folder(
        args.out, OUTPUTS, overwrite=args.overwrite, resume=args.resume, first=ranks.first
    ) as folder:
        loaded = load_network(args, args.model, args.weights)
        options = ProbeOptions(
            scales=scales,
            reference=args.reference,
            resize=args.resize,
            antialias=not args.no_antialias,
            **pixel_constants(args, loaded),
            **shared_options(args, folder),
        )
        say = announcer(loaded.name) if talks else None
        probe_run = Run(loaded.model, data_source(args.data), options, ranks=ranks, say=say)
        report = probe_run.report(progress=not args.quiet)
        meta = {**report.meta, "model": network_meta(loaded, args)}
        report = dataclasses.replace(report, meta=meta)
        if ranks.first:
            write_report(report, folder, pictures)
            print_left_out(report)
    if talks:
        print_comparison(report)
        print(describe(report))
        print(f"wrote {folder}/: report.npz, cka.csv, heatmap.png, curve.png, report.html")
