"""The program `cka-probe`: its parser and its entry point."""

import argparse
import sys
from collections.abc import Sequence

from cka_probe.cli import compare, demo, layers, plot, run
from cka_probe.cli.program import Parser, run_cli

__all__ = ["build_parser", "main"]

PROG = "cka-probe"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    import cka_probe

    parser = Parser(
        prog=PROG,
        description="Layer by layer, how a network's representation changes when its input images "
        "come at other sizes: CKA with error bars.",
        epilog="Start with: cka-probe demo --out demo",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {cka_probe.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (run, compare, demo, layers, plot):
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
