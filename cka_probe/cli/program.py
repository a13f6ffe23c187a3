"""`run_cli`: one command of either program, with its exit code, and one line per error or warning.

Exit codes: 0; 2 for bad input, 130 for Ctrl-C, 1 for anything else. Nothing here imports torch
before a command runs, so that `--help` is fast.
"""

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from cka_probe.errors import explain, printable

__all__ = ["FIRST", "JOINED", "OWN", "Parser", "UsageError", "run_cli"]

# What a command does where torchrun started several processes (`set_defaults(processes=...)`). A
# command that says nothing is refused there.
JOINED = "joined"  # `run_cli` joins them: call(args, ranks)
OWN = "own"  # the command joins them itself: call(args)
FIRST = "first"  # rank 0 runs it alone, the others end at once: call(args)


class UsageError(ValueError):
    """A command line that cannot be read."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line: what is wrong: the value: a hint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes every word that begins with "-" for an option, unless it matches this. With
        # any "-x" a value, `--scales -4,8` reaches the message about scales.
        self._negative_number_matcher = re.compile(r"^-[^-]")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as one line, without the usage block."""
        # "argument --mean: no list of numbers: 'x': hint" -> "no list of numbers for --mean: 'x':
        # hint"; where the problem names the option already, only the first words go
        found = re.match(r"argument --([\w-]+): ([^:]+)(: .*)", message, flags=re.DOTALL)
        if found:
            name, problem, rest = found.groups()
            message = problem + ("" if name in problem else f" for --{name}") + rest
        hint = "" if message.count(": ") > 1 else f": see {self.prog} --help"
        raise UsageError(message + hint)


def run_cli(program: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run the command that a command line names.

    Args:
        program: the name that begins every line on stderr.
        parser: a `Parser` whose commands set the defaults `call` and, where several processes may
            run them, `processes`.
        argv: the words after the program's name; those of this process where None.

    Returns:
        The exit code: 0, 1, 2 or 130.
    """
    texts: list[str] = []

    def collect(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):  # others are for developers
            texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = collect
        try:
            args = parser.parse_args(argv)
            _refuse_empty_values(args)
            first = _call(args)
        except SystemExit as stop:  # --help, --version
            return int(stop.code or 0)
        except KeyboardInterrupt as stop:
            hint = str(stop) or "nothing was saved, run again"
            return _fail(program, f"interrupted: Ctrl-C: {hint}", 130)
        except BrokenPipeError:  # the reader of stdout has gone: write the rest to nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            debug = f"{program.upper().replace('-', '_')}_DEBUG"
            if os.environ.get(debug):
                raise
            return _report_error(program, error, debug)
    for text in dict.fromkeys(texts) if first else ():
        print(f"{program}: warning: {printable(text)}", file=sys.stderr)
    return 0


def _report_error(program: str, error: Exception, debug: str) -> int:
    if isinstance(error, ValueError | TypeError | OSError):
        return _fail(program, explain(error), 2, error)
    from cka_probe.distributed.ranks import LostRankError
    from cka_probe.errors import RunFailedError

    if isinstance(error, LostRankError | RunFailedError):
        return _fail(program, str(error), 1, error)
    kind = type(error).__name__
    return _fail(program, f"unexpected {kind}: {error}: set {debug}=1 for the traceback", 1, error)


def _call(args: argparse.Namespace) -> bool:
    """Run the command; whether this process is the one that prints."""
    processes = getattr(args, "processes", None)
    if not _launched():
        if processes == JOINED:
            from cka_probe.distributed.ranks import Ranks

            args.call(args, Ranks())
        else:
            args.call(args)
        return True
    first = os.environ.get("RANK", "0") == "0"
    if processes is None:
        raise ValueError(
            f"one process only: {args.command} in {os.environ['WORLD_SIZE']} processes: start it "
            "without torchrun"
        )
    if processes == JOINED:
        from cka_probe.cli.options import device_of
        from cka_probe.distributed.ranks import started

        signal.signal(signal.SIGTERM, _raise_lost)
        with started(device_of(args)) as ranks:
            args.call(args, ranks)
        return bool(ranks.first)
    if processes == OWN or first:
        args.call(args)
    return first


def _launched() -> bool:
    """Whether torchrun has started several processes (`distributed.ranks.launched`, sans torch)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _raise_lost(number: int, frame: object) -> NoReturn:
    """Turn the SIGTERM of torchrun into an exception, so that the output folder is cleaned up."""
    from cka_probe.distributed.ranks import LostRankError

    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise LostRankError(
        "ended by its launcher: SIGTERM, as when another process has died: read the error of that "
        "process, then run again with --resume"
    )


def _refuse_empty_values(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(word, str) and not word.strip() for word in values):
            option = name if name == "report" else f"--{name.replace('_', '-')}"
            raise UsageError(f"empty value: {option} '': give one, or leave the option out")


def _fail(program: str, message: str, status: int, error: BaseException | None = None) -> int:
    """Print an error, once for all processes that share a run."""
    if _launched():
        from cka_probe.distributed.ranks import may_speak

        # This process ends anyway: torchrun's SIGTERM, which comes as soon as another has died,
        # must not interrupt the report of the failure.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not may_speak(error):
            return status
    print(f"{program}: {printable(message)}", file=sys.stderr)
    return status
