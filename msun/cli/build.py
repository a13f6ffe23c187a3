"""`msun build`: a multi-scale network from a backbone, a cut and the scales, in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import seed
from cka_probe.cli.output import table_lines
from msun.cli.options import add_model, load

if TYPE_CHECKING:
    from msun.network.model import MSUN

__all__ = ["add", "add_building", "build_network", "describe", "execute"]


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
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
    parser.add_argument("--seed", type=seed, default=0, metavar="S",
                        help="seeds random weights (default 0)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.set_defaults(call=execute)


def add_building(parser: argparse.ArgumentParser) -> None:
    """Add --scales, --preset, --subnets, --merge, --norm, --inputs and --start.

    Args:
        parser: the command's parser.
    """
    word = parser.add_argument
    word("--scales", required=True, metavar="S,S,...", help="sides in pixels; the largest is the "
         "one at which the network is the backbone")  # fmt: skip
    word("--preset", default="lean", metavar="P", help="paper or lean (default lean)")
    word("--subnets", metavar="own|shared", help="weights of the subnets; default: the preset's")
    word("--merge", metavar="full|follow|native", help="grid of the trunk; default: the preset's")
    word("--norm", metavar="shared|private", help="batch norms of the trunk; default: the preset's")
    word("--inputs", metavar="native|small|scale", help="images between the scales: as they are; "
         "resized to the scale that serves them, but for the largest; all resized; default: the "
         "preset's")  # fmt: skip
    word("--start", default="copied", metavar="S", help="initial weights of the small subnets: "
         "copied, resampled or dilated (default copied)")  # fmt: skip


def build_network(args: argparse.Namespace) -> MSUN:
    """The network that a command line describes.

    Args:
        args: the parsed command line, with the arguments of `add_model` and `add_building`, and at.
    """
    from cka_probe.inputs.views import parse_scales
    from cka_probe.models.load import parse_model_args
    from msun.network.builder import build

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


def execute(args: argparse.Namespace) -> None:
    """Build the network, save it and print what it is made of."""
    from msun.network.checkpoint import save

    out = Path(args.out)
    if not out.parent.is_dir():
        raise ValueError(f"no such folder: {out.parent}: make it, or choose another --out")
    if out.is_dir():
        raise ValueError(f"output is a folder: {out}: give the name of a file")
    if out.exists() and not args.overwrite:
        raise ValueError(
            f"a file is there already: {out}: add --overwrite, or choose another --out"
        )
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
    from msun.network.shape_probe import parameter_count

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
    policy = net.policy
    return [
        f"{net.origin.backbone} cut after {net.at!r}, preset {net.preset}: {net.origin.subnets}",
        f"subnets {policy.subnets}, merge {policy.merge}, norm {policy.norm}, routing "
        f"{policy.routing}, inputs {policy.inputs}, strides {policy.strides}, start "
        f"{net.origin.start}",
        "",
        *table_lines(rows),
        "",
        f"{_millions(parameter_count(net))} parameters, {_millions(parameter_count(net.tail))} "
        "of them in the trunk",
    ]


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _millions(count: int) -> str:
    """A number of parameters, to three digits where it is small."""
    return f"{count / 1e6:.3f} M" if count >= 1e5 else f"{count / 1e6:.3g} M"
