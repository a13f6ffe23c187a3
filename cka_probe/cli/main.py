"""The command line: `cka-probe run | compare | layers | plot | demo`.

Every error is one line on stderr: what is wrong, the value, the way out. Exit status 2 for bad
input, 130 for Ctrl-C, 1 for anything else.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from cka_probe.cli import commands as cli_commands
from cka_probe.cli.checks import check_words
from cka_probe.distributed.heartbeat import LostRankError
from cka_probe.distributed.ranks import Ranks, launched, may_speak, started
from cka_probe.errors import explain
from cka_probe.probing.state import STATE

PROG = "cka-probe"

MODEL_HELP = "a torchvision name (resnet18), timm:NAME, path/to/file.py:callable, or glyphnet"
WEIGHTS_HELP = "DEFAULT (the library's own), none (random, by --seed), or a .safetensors/.pt file"


class UsageError(ValueError):
    """A command line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, no usage block."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see {self.prog} --help")


def _probe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder of images, or `glyphs` (embedded)")
    add("--layers", nargs="+", metavar="GLOB", help="layers to tap: names, globs, re:PATTERN; "
        "default: the network's own blocks (see `cka-probe layers`)")  # fmt: skip
    add("--kernel", default="linear", metavar="K", help="linear (default) or rbf")
    add("--bandwidth", type=float, metavar="F", help="rbf sigma / median distance (default 1)")
    add("--reduce", default="flatten", metavar="R",
        help="flatten (default), mean, grid=K or tokens: how a map becomes features")  # fmt: skip
    add("--estimator", default="minibatch", metavar="E", help="minibatch (default; memory does "
        "not grow with images), exact (keeps all features, on disk where memory is short), sketch "
        "(keeps K numbers a layer and image) or auto (what fits --memory)")  # fmt: skip
    add("--memory", metavar="4GiB", help="budget of exact and auto; default: what is free, or for "
        "auto half of it")  # fmt: skip
    add("--sketch", type=int, metavar="K", help="numbers a layer and image (default 512)")
    add("--precision", type=float, metavar="P", help="wanted standard error of the sketch, "
        "instead of --sketch, such as 0.03")  # fmt: skip
    add("--images", type=int, metavar="N", help="random subset of N images (default: all)")
    add("--batch-size", type=int, default=64, metavar="B", help="images per batch (default 64)")
    add("--mean", metavar="a,b,c", help="channel means to subtract; default: the weights' own")
    add("--std", metavar="a,b,c", help="channel standard deviations to divide by")
    add("--seed", type=int, default=0, metavar="S", help="seeds everything (default 0)")
    add("--device", metavar="D", help="cpu, cuda, mps (default: cuda where there is one)")
    add("--amp", action="store_true", help="autocast the network to bfloat16")
    add("--workers", type=int, default=0, metavar="W", help="processes that decode images")
    add("--skip-bad", action="store_true", help="leave out unreadable images and name them")
    add("--resume", action="store_true", help="continue an interrupted run in the same --out")
    add("--overwrite", action="store_true", help="replace an existing report in --out")
    add("--quiet", action="store_true", help="no estimate, no progress bar, no table")
    add("--out", required=True, metavar="DIR", help="folder for the results")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog=PROG,
        description="Layer by layer, how far a network's representation moves when its input "
        "changes size: CKA with error bars.",
        epilog="Start with: cka-probe demo --out demo",
    )
    parser.add_argument("--version", action="version", version=cli_commands.version_line())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="one network, several input sizes",
        description="Feed every image at every scale, compare every layer at every scale with "
        "every other by CKA, and write DIR/report.npz, cka.csv, heatmap.png, curve.png and "
        "report.html.",
        epilog="Example: cka-probe run --model resnet18 --data photos --scales 32,64,128,224 "
        "--out results",
    )
    run.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    run.add_argument("--weights", metavar="W", default="DEFAULT", help=WEIGHTS_HELP)
    run.add_argument("--model-arg", metavar="KEY=VALUE", action="append", default=[],
                     help="passed to the model's constructor, such as pad_type=same")  # fmt: skip
    run.add_argument("--scales", required=True, metavar="32,64,224", help="sides in pixels")
    run.add_argument("--reference", metavar="S", help="compared with; default: the largest scale")
    run.add_argument("--resize", default="native", metavar="native|restore",
                     help="native feeds s x s; restore resizes to s and back up")  # fmt: skip
    run.add_argument("--no-antialias", action="store_true",
                     help="resize without antialiasing (repeats the MSUN paper)")  # fmt: skip
    _probe_options(run)
    run.set_defaults(call=cli_commands.run)

    compare = commands.add_parser(
        "compare",
        help="two networks, or two checkpoints of one",
        description="Compare every layer of network A with every layer of network B on the same "
        'images: views "a" and "b".',
    )
    twice = "; twice, or once for two checkpoints"
    compare.add_argument(
        "--model", required=True, action="append", metavar="M", help=MODEL_HELP + twice
    )
    each = "; one for both, or one each"
    compare.add_argument("--weights", action="append", metavar="W", help=WEIGHTS_HELP + each)
    compare.add_argument("--model-arg", metavar="KEY=VALUE", action="append", default=[],
                         help="passed to both constructors")  # fmt: skip
    compare.add_argument("--size", type=int, default=224, metavar="S",
                         help="side in pixels (default 224)")  # fmt: skip
    _probe_options(compare)
    compare.set_defaults(call=cli_commands.compare)

    demo = commands.add_parser(
        "demo",
        help="the main job on embedded images, in under a minute",
        description="Probe a small network that this project trained on drawn characters, at 8 to "
        "64 px; no other data is needed. Writes what `run` writes.",
    )
    demo.add_argument("--images", type=int, default=1000, metavar="N", help="default 1000")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    demo.add_argument("--overwrite", action="store_true", help="replace an existing report")
    demo.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    demo.set_defaults(call=cli_commands.demo, resume=False)

    layers = commands.add_parser(
        "layers",
        help="what can be tapped",
        description="List every layer in execution order with its output shape; the network's "
        "own blocks, which are the default, carry a star.",
    )
    layers.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    layers.add_argument("--model-arg", metavar="KEY=VALUE", action="append", default=[],
                        help="passed to the model's constructor")  # fmt: skip
    layers.add_argument("--size", type=int, metavar="S", help="input side in pixels (default 224)")
    layers.set_defaults(call=cli_commands.layers)

    plot = commands.add_parser(
        "plot", help="a picture of a report", description="Draw a saved report.npz."
    )
    plot.add_argument("report", metavar="report.npz")
    plot.add_argument("--kind", default="heatmap", metavar="heatmap|curve|grid",
                      help="layers x views, a line per view, or layers x layers")  # fmt: skip
    plot.add_argument("--view", metavar="V", help="heatmap, curve: compare with this view "
                      "instead of the reference; grid: the view on the rows")  # fmt: skip
    plot.add_argument("--against", metavar="V", help="grid: the view on the columns")
    plot.add_argument("--out", required=True, metavar="FILE", help=".png, .pdf or .svg")
    plot.set_defaults(call=cli_commands.plot)
    return parser


def _joined(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Glue `--scales -4,8` into `--scales=-4,8`, so that odd values reach our own messages."""
    takes_value: dict[str, bool] = {}
    for sub in _parsers(parser):
        for action in sub._actions:
            for name in action.option_strings:
                takes_value[name] = action.nargs in (None, "+")

    def asked(word: str) -> bool | None:
        """Whether an option, in full or by its first letters, takes a value; None: no option."""
        name = word.partition("=")[0]
        if name in takes_value:
            return takes_value[name]
        long = [takes for known, takes in takes_value.items() if known.startswith(name)]
        return any(long) if name.startswith("--") and len(name) > 2 and long else None

    out: list[str] = []
    for word in argv:
        odd = word.startswith("-") and asked(word) is None
        if odd and out and "=" not in out[-1] and asked(out[-1]):
            out[-1] = f"{out[-1]}={word}"
        else:
            out.append(word)
    return out


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += list(action.choices.values())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; those of the process where None.

    Returns:
        The exit status: 0, 1, 2 or 130.
    """
    said: list[str] = []
    args: argparse.Namespace | None = None

    def collect(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            said.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = collect
        try:
            words = sys.argv[1:] if argv is None else argv
            parser = build_parser()
            args = parser.parse_args(_joined(words, parser))
            check_words(args)
            first = _call(args)
        except SystemExit as stop:  # --help, --version
            return int(stop.code or 0)
        except KeyboardInterrupt:
            return _fail(f"interrupted: Ctrl-C: {_way_on(args)}", 130)
        except LostRankError as error:
            return 1 if error.told else _fail(str(error), 1)  # who knows why has said so
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, TypeError, OSError) as error:
            _debug()
            return _fail(explain(error), 2)
        except Exception as error:
            _debug()
            kind = type(error).__name__
            return _fail(f"unexpected {kind}: {error}: set CKA_PROBE_DEBUG=1 for the traceback", 1)
    for text in dict.fromkeys(said) if first else ():
        print(f"{PROG}: warning: {' '.join(text.split())}", file=sys.stderr)
    return 0


def _call(args: argparse.Namespace) -> bool:
    """Run a command, shared out where it can be; whether this process is the first.

    A launcher ends the processes that are left when one has died: that is told as an error, so
    that the output folder is cleaned up on the way out.
    """
    if not launched():
        args.ranks = Ranks()
        args.call(args)
        return True
    signal.signal(signal.SIGTERM, _ended)
    if args.command not in ("run", "compare", "demo"):  # nothing to share
        if os.environ.get("RANK", "0") == "0":
            args.call(args)
        return os.environ.get("RANK", "0") == "0"
    with started(cli_commands.device_of(args)) as args.ranks:
        args.call(args)
    return bool(args.ranks.first)


def _ended(number: int, frame: object) -> NoReturn:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise LostRankError(
        "ended by its launcher: SIGTERM, as when another process has died: see what that one "
        "said, then run again with --resume"
    )


def _way_on(args: argparse.Namespace | None) -> str:
    """What can be done after an interruption: go on, or begin anew."""
    out = getattr(args, "out", None)
    resumes = getattr(args, "command", None) in ("run", "compare")
    kept = getattr(args, "kept", False) or (out is not None and (Path(out) / STATE).exists())
    if resumes and kept:
        return "run again with --resume to continue"
    return "nothing was saved, run again"


def _debug() -> None:
    if os.environ.get("CKA_PROBE_DEBUG"):
        raise


def _fail(message: str, status: int) -> int:
    """Say what went wrong, once for all processes that share a run."""
    if not may_speak():
        return status
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
