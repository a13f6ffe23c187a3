"""`msun cuts`: where a network can be cut in two."""

import argparse
from typing import Any

from cka_probe.cli.options import MODEL_HELP, add_model_arg, load_network, side
from cka_probe.cli.output import table_lines

__all__ = ["add", "execute"]


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "cuts",
        help="where a network can be cut in two",
        description="List the modules after which one map carries all that later layers need, in "
        "order of execution, with that map and the parameters before it.",
    )
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    add_model_arg(parser)
    parser.add_argument("--size", type=side, metavar="S",
                        help="input side in pixels; default: its own, else 224")  # fmt: skip
    parser.set_defaults(call=execute)


def execute(args: argparse.Namespace) -> None:
    """Print the table of cuts."""
    from msun.cutting.cuts import example_images, find_cuts

    loaded = load_network(args, args.model, "none")
    images = example_images(loaded.model, args.size or loaded.input_size)
    found = find_cuts(loaded.model, images)
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    rows = [("cut after", "map per image", "parameters before")]
    for cut in found:
        share = f"{cut.parameters:,} ({cut.parameters / max(total, 1):.1%})"
        rows.append((cut.name, " x ".join(map(str, cut.shape[1:])), share))
    print("\n".join(table_lines(rows)))
    count = f"{len(found)} {'cut' if len(found) == 1 else 'cuts'}"
    print(f"\n{loaded.name} at {images.shape[-1]} px: {count}, {total:,} parameters")
