"""The command line: msun {cuts}; what each command does stands in its own room, cli_*.

Every error is one line on stderr: what is wrong, the value, the way out. Exit status 2 for bad
input, 130 for Ctrl-C, 1 for anything else.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cka_probe.cli.commands import version_line
from cka_probe.cli.main import _joined, _Parser
from cka_probe.distributed.heartbeat import LostRankError
from cka_probe.distributed.ranks import may_speak
from cka_probe.errors import explain
from cka_probe.probing.state import STATE as PROBED
from msun.cli import build as cli_build
from msun.cli import cuts as cli_cuts
from msun.cli import demo as cli_demo
from msun.cli import eval as cli_eval
from msun.cli import suggest as cli_suggest
from msun.cli import train as cli_train
from msun.training.state import STATE

PROG = "msun"
SAVED = {"train": (STATE,), "suggest": (PROBED,)}  # what an interrupted command goes on from
COMMANDS = (
    cli_cuts,
    cli_suggest,
    cli_build,
    cli_train,
    cli_eval,
    cli_demo,
)  # in the order of the work


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog=PROG,
        description="One network for images of any size: where to cut it, building, training and "
        "measuring it.",
        epilog="Start with: msun demo --out out/msun",
    )
    parser.add_argument("--version", action="version", version=version_line())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; those of the process where None.

    Returns:
        The exit status: 0, 1, 2 or 130.
    """
    parser, args = build_parser(), argparse.Namespace()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            words = _joined(sys.argv[1:] if argv is None else argv, parser)
            args = parser.parse_args(words, args)
            args.call(args)
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _fail(f"interrupted: Ctrl-C: {_way_on(args)}", 130)
    except LostRankError as error:
        return 1 if error.told else _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _fail(explain(error), 2)
    except Exception as error:
        kind = type(error).__name__
        return _fail(f"unexpected {kind}: {error}: set MSUN_DEBUG=1 for the traceback", 1)
    return 0


def _way_on(args: argparse.Namespace) -> str:
    """What can be done after an interruption: go on, or begin anew."""
    names = SAVED.get(getattr(args, "command", None) or "", ())
    out = getattr(args, "out", None)
    saved = any((Path(out).expanduser() / name).exists() for name in names if out is not None)
    if saved or getattr(args, "kept", False):
        return "run again with --resume to continue"
    return "run again"


def _fail(message: str, status: int) -> int:
    if os.environ.get("MSUN_DEBUG"):
        raise
    if not may_speak():  # of the processes that share a run, one says what went wrong
        return status
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
