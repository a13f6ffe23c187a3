"""The program `msun`: its parser and its entry point."""

import argparse
import sys
from collections.abc import Sequence

from cka_probe.cli.program import Parser, run_cli
from msun.cli import build, cuts, demo, eval, suggest, train

__all__ = ["build_parser", "main"]

PROG = "msun"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    import cka_probe

    parser = Parser(
        prog=PROG,
        description="One network for images of any size: where to cut it, building, training and "
        "measuring it.",
        epilog="Start with: msun demo --out out/msun",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {cka_probe.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (cuts, suggest, build, train, eval, demo):  # in the order of the work
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; those of the process where None.

    Returns:
        The exit code: 0, 1, 2 or 130.
    """
    return run_cli(PROG, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
