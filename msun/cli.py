"""The command line: `msun cuts`.

Every error is one line on stderr: what is wrong, the value, the way out. Exit status 2 for bad
input, 130 for Ctrl-C, 1 for anything else.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from cka_probe.cli import MODEL_HELP, _joined, _Parser
from cka_probe.cli_commands import version_line
from cka_probe.cli_output import explain
from cka_probe.models import load_model, parse_model_args
from msun.cut import example_images, find_cuts

PROG = "msun"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog=PROG,
        description="One network for images of any size: where to cut it.",
        epilog="Start with: msun cuts --model resnet18",
    )
    parser.add_argument("--version", action="version", version=version_line())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
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
    return parser


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; those of the process where None.

    Returns:
        The exit status: 0, 1, 2 or 130.
    """
    parser = build_parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv, parser))
            args.call(args)
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted: Ctrl-C: run again", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _fail(explain(error), 2)
    except Exception as error:
        kind = type(error).__name__
        return _fail(f"unexpected {kind}: {error}: set MSUN_DEBUG=1 for the traceback", 1)
    return 0


def _fail(message: str, status: int) -> int:
    if os.environ.get("MSUN_DEBUG"):
        raise
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
