"""`msun build`: a multi-scale network from a backbone, a cut and the scales, in a file."""

import argparse
from pathlib import Path
from typing import Any

from cka_probe.inputs.scales import parse_scales
from cka_probe.models.load import parse_model_args
from msun.cli.options import add_model, load
from msun.network.builder import build
from msun.network.checkpoint import save
from msun.network.kernel_resize import STARTS
from msun.network.model import MSUN
from msun.network.policy import POLICIES
from msun.network.shape_probe import parameter_count

__all__ = ["add", "add_building", "build_network", "describe"]


def add(commands: Any) -> None:
    """Add the command's words to the parser."""
    parser = commands.add_parser(
        "build",
        help="make a multi-scale network around a backbone",
        description="Cut the backbone, give each smaller scale a subnet, and write the network to "
        "a file that `msun train`, `msun eval` and msun.load read.",
        epilog="Example: msun build --model resnet50 --at layer1 --scales 32,128,224 --out net.pt",
    )
    add_model(parser)
    parser.add_argument("--at", required=True, metavar="LAYER",
                        help="where the trunk begins: after it (see `msun cuts`)")  # fmt: skip
    add_building(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of random weights (default 0)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.set_defaults(call=build_file)


def add_building(parser: Any) -> None:
    """Add --scales, --preset, --subnets, --merge, --norm, --inputs and --start.

    Args:
        parser: of a command.
    """
    word = parser.add_argument
    word("--scales", required=True, metavar="S,S,...", help="sides in pixels; the largest is the "
         "one at which the network is the backbone")  # fmt: skip
    word("--preset", default="lean", metavar="P", help=f"{' or '.join(POLICIES)} (default lean)")
    word("--subnets", metavar="own|shared", help="weights of the subnets; default: the preset's")
    word("--merge", metavar="full|follow|native", help="grid of the trunk; default: the preset's")
    word("--norm", metavar="shared|private", help="batch norms of the trunk; default: the preset's")
    word("--inputs", metavar="native|small|scale", help="images between the scales: as they are; "
         "resized to the scale that serves them, but for the largest; all resized; default: the "
         "preset's")  # fmt: skip
    word("--start", default="copied", metavar="S",
         help=f"of the small subnets: {', '.join(STARTS)} (default copied)")  # fmt: skip


def build_network(args: argparse.Namespace) -> MSUN:
    """The network that a command line asks for.

    Args:
        args: with the words of `add_model`, `add_building`, and `at`.
    """
    scales = parse_scales(args.scales)
    loaded = load(args)
    return build(
        loaded,
        args.at,
        scales,
        preset=args.preset,
        subnets=args.subnets,
        merge=args.merge,
        norm=args.norm,
        inputs=args.inputs,
        start=args.start,
        spec={"name": args.model, "model_args": parse_model_args(args.model_arg)},
    )


def build_file(args: argparse.Namespace) -> None:
    """`msun build`."""
    out = Path(args.out)
    if not out.parent.is_dir():
        raise ValueError(f"no such folder: {out.parent}: make it, or choose another --out")
    if out.is_dir():
        raise ValueError(f"output is a folder: {out}: give the name of a file")
    net = build_network(args)
    save(net, out)
    for line in describe(net):
        print(line)
    print(f"\nwritten to {out}")


def describe(net: MSUN) -> list[str]:
    """A network as a table: a line for each scale.

    Args:
        net: the network.
    """
    rows = [("px", "subnet gives", "trunk runs at", "parameters", "GMACs", "what differs")]
    for side in net.scales:
        plan = net.plan(side, scale=side)
        rows.append(
            (
                str(side),
                _grid(plan.grid),
                _grid(plan.merged),
                _millions(parameter_count(net.subnet(side))),
                f"{plan.macs / 1e9:.3f}" if plan.macs >= 1e8 else f"{plan.macs / 1e9:.3g}",
                net.origin.changes[side] or "nothing: the backbone",
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    policy = net.policy
    return [
        f"{net.origin.backbone} cut after {net.at!r}, preset {net.preset}: {net.origin.subnets}",
        f"subnets {policy.subnets}, merge {policy.merge}, norm {policy.norm}, routing "
        f"{policy.routing}, inputs {policy.inputs}, strides {policy.strides}, start "
        f"{net.origin.start}",
        "",
        *lines,
        "",
        f"{_millions(parameter_count(net))} parameters, {_millions(parameter_count(net.tail))} "
        "of them in the trunk",
    ]


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _millions(count: int) -> str:
    """A number of parameters, to three digits where it is small."""
    return f"{count / 1e6:.3f} M" if count >= 1e5 else f"{count / 1e6:.3g} M"
