"""`cka-probe layers`: the layers of a network that can be tapped."""

import argparse
from typing import Any

from cka_probe.cli.options import MODEL_HELP, add_model_arg, load_network, side
from cka_probe.cli.output import table_lines
from cka_probe.cli.program import FIRST

__all__ = ["add", "execute"]


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "layers",
        help="layers that can be tapped",
        description="List every layer in execution order with its output shape; the network's own "
        "blocks, which are the default, carry a star.",
    )
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    add_model_arg(parser)
    parser.add_argument("--size", type=side, metavar="S",
                        help="input side in pixels; default: its own, else 224")  # fmt: skip
    parser.set_defaults(call=execute, processes=FIRST)


def execute(args: argparse.Namespace) -> None:
    """Print the table of layers."""
    import torch

    from cka_probe.activations.firing import default_selections
    from cka_probe.activations.hooks import Collector
    from cka_probe.activations.layers import Selection
    from cka_probe.errors import one_line

    loaded = load_network(args, args.model, "none")
    side = args.size or loaded.input_size or 224
    with Collector(loaded.model, lambda name, module: bool(name)) as collector:
        try:
            collector.run(torch.zeros(2, 3, side, side), lambda tap, x: None)
        except Exception as error:
            raise ValueError(
                f"the network cannot take {side} px: {one_line(error)}: give another --size"
            ) from error
    default = default_selections(loaded.model, [[tap.path for tap in collector.labels]])
    modules = dict(loaded.model.named_modules(remove_duplicate=False))
    rows = [("", "layer", "type", "output per image", "parameters")]
    for tap, label in collector.labels.items():
        module = modules[tap.path]
        shape = " x ".join(map(str, collector.shapes[tap]))
        count = sum(p.numel() for p in module.parameters())
        is_default = {Selection(tap.path), Selection(tap.path, None, tap.call)} & set(default)
        star = "*" if is_default else ""
        rows.append((star, label, type(module).__name__, shape, f"{count:,}"))
    print("\n".join(table_lines(rows)))
    for path, why in collector.skipped.items():
        print(f"cannot be tapped: {path}: {why}")
    if collector.unreached:
        print(f"never reached: {', '.join(collector.unreached)}")
    print(f"\n{loaded.name} at {side} px; * is tapped by default")
