"""`msun cuts`: where a network can be cut in two."""

import argparse
from typing import Any

from cka_probe.cli.main import MODEL_HELP
from cka_probe.models.load import load_model, parse_model_args
from msun.cutting.cuts import example_images, find_cuts


def add(commands: Any) -> None:
    """Add the command's words to the parser."""
    cuts = commands.add_parser(
        "cuts",
        help="where a network can be cut in two",
        description="List the modules after which one map carries all that later layers need, in "
        "order of execution, with that map and the parameters before it.",
    )
    cuts.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    cuts.add_argument("--model-arg", metavar="KEY=VALUE", action="append", default=[],
                      help="passed to the model's constructor")  # fmt: skip
    cuts.add_argument("--size", type=int, metavar="S",
                      help="input side in pixels; default: its own, else 224")  # fmt: skip
    cuts.set_defaults(call=list_cuts)


def list_cuts(args: argparse.Namespace) -> None:
    """`msun cuts`."""
    if args.size is not None and args.size <= 0:
        raise ValueError(f"bad size: {args.size}: a side is at least 1 pixel")
    loaded = load_model(args.model, "none", model_args=parse_model_args(args.model_arg))
    images = example_images(loaded.model, args.size or loaded.input_size)
    found = find_cuts(loaded.model, images)
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    rows = [("cut after", "map per image", "parameters before")]
    for place in found:
        share = f"{place.parameters:,} ({place.parameters / max(total, 1):.1%})"
        rows.append((place.name, " x ".join(map(str, place.shape[1:])), share))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    count = f"{len(found)} {'cut' if len(found) == 1 else 'cuts'}"
    print(f"\n{loaded.name} at {images.shape[-1]} px: {count}, {total:,} parameters")
