"""Arguments that several commands of both programs share, their types, and what they load.

Torch and the rest are imported inside the functions that need them, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cka_probe.models.load import LoadedModel

__all__ = [
    "add_compute",
    "add_model",
    "add_model_arg",
    "add_pixel_constants",
    "add_probe_input",
    "data_source",
    "device_of",
    "is_embedded",
    "load_network",
    "network_meta",
    "numbers",
    "pixel_constants",
    "positive",
    "seed",
    "side",
    "whole_numbers",
]

MODEL_HELP = "a torchvision name (resnet18), timm:NAME, path/to/file.py:callable, or glyphnet"
WEIGHTS_HELP = "DEFAULT (the library's own), none (random, by --seed), or a .safetensors/.pt file"


def numbers(text: str) -> list[float]:
    """The argparse type of "0.5,0.5,0.5"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"no list of numbers: {text!r}: give numbers such as 0.5,0.5,0.5"
        raise argparse.ArgumentTypeError(message) from None


def whole_numbers(text: str) -> list[int]:
    """The argparse type of "0,217,482"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"no list of whole numbers: {text!r}: give some such as 0,217,482"
        raise argparse.ArgumentTypeError(message) from None


def positive(
    text: str, problem: str = "bad value", hint: str = "give a whole number of 1 or more"
) -> int:
    """The argparse type of a whole number of 1 or more."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{problem}: {text}: {hint}")
    return int(text)


def side(text: str) -> int:
    """The argparse type of a side in pixels."""
    return positive(text, "bad size", "a side is at least 1 pixel")


def seed(text: str) -> int:
    """The argparse type of a seed: a whole number that torch's generators take."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"bad seed: {text!r}: give a whole number") from None
    if not -(2**63) <= value < 2**63:
        message = f"seed out of range: {text}: give a whole number below 2**63"
        raise argparse.ArgumentTypeError(message)
    return value


def add_model(
    parser: argparse.ArgumentParser, *, weights: str | None = "DEFAULT", many: bool = False
) -> None:
    """Add --model, --weights and --model-arg.

    Args:
        parser: the command's parser.
        weights: the default of --weights.
        many: whether --model and --weights may be given twice.
    """
    if many:
        twice, each = "; twice, or once for two checkpoints", "; one for both, or one each"
        parser.add_argument(
            "--model", required=True, action="append", metavar="M", help=MODEL_HELP + twice
        )
        parser.add_argument("--weights", action="append", metavar="W", help=WEIGHTS_HELP + each)
    else:
        parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
        parser.add_argument("--weights", metavar="W", default=weights, help=WEIGHTS_HELP)
    add_model_arg(parser)


def add_model_arg(parser: argparse.ArgumentParser) -> None:
    """Add --model-arg."""
    parser.add_argument(
        "--model-arg", metavar="KEY=VALUE", action="append", default=[],
        help="passed to the model's constructor, such as pad_type=same; may be repeated",
    )  # fmt: skip


def add_pixel_constants(parser: argparse._ActionsContainer) -> None:
    """Add --mean and --std."""
    parser.add_argument("--mean", type=numbers, metavar="a,b,c",
                        help="channel means to subtract; default: the weights' own")  # fmt: skip
    parser.add_argument("--std", type=numbers, metavar="a,b,c",
                        help="channel standard deviations to divide by")  # fmt: skip


def add_compute(parser: argparse._ActionsContainer, *, workers: int | None = 0) -> None:
    """Add --device and --workers.

    Args:
        parser: the command's parser, or a group of it.
        workers: the default of --workers.
    """
    parser.add_argument("--device", metavar="D",
                        help="cpu, cuda or mps (default: cuda where there is one)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=workers, metavar="W",
                        help="processes that decode images (default 0: none)")  # fmt: skip


def add_probe_input(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Add the arguments of images, layers and computing that every command that probes has.

    Args:
        parser: the command's parser, or a group of it.
        required: whether --data must be given.
    """
    add = parser.add_argument
    add("--data", required=required, metavar="DIR",
        help="folder of images, or `glyphs` (embedded)")  # fmt: skip
    add("--layers", nargs="+", metavar="GLOB", help="layers to tap: names, globs, re:PATTERN; "
        "default: the network's own blocks (see `cka-probe layers`)")  # fmt: skip
    add("--images", type=int, metavar="N", help="random subset of N images (default: all)")
    add("--batch-size", type=int, default=64, metavar="B", help="images per batch (default 64)")
    add_pixel_constants(parser)
    add("--seed", type=seed, default=0, metavar="S", help="seeds everything (default 0)")
    add_compute(parser)
    add("--skip-bad", action="store_true", help="leave out unreadable images and name them")
    add("--resume", action="store_true", help="continue an interrupted run in the same --out")
    add("--overwrite", action="store_true", help="replace an existing result in --out")
    add("--quiet", action="store_true", help="no estimate, no progress bar, no table")


def load_network(args: argparse.Namespace, spec: str, weights: str) -> LoadedModel:
    """The network that a --model and a --weights name.

    Args:
        args: the parsed command line, with model_arg and, for random weights, seed.
        spec: the value of --model.
        weights: the value of --weights.
    """
    from cka_probe.models.load import load_model, parse_model_args

    model_args = parse_model_args(args.model_arg)
    return load_model(spec, weights, model_args=model_args, seed=getattr(args, "seed", 0))


def network_meta(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """What a report records about a network: name, weights, constants, hash, constructor arguments.

    Args:
        loaded: the network.
        args: the parsed command line, with model_arg.
    """
    from cka_probe.models.load import parse_model_args

    meta: dict[str, Any] = {"name": loaded.name, "weights": loaded.weights}
    meta |= {"mean": loaded.mean, "std": loaded.std}
    if loaded.sha256:
        meta["sha256"] = loaded.sha256
    if args.model_arg:
        meta["args"] = parse_model_args(args.model_arg)
    return meta


def is_embedded(data: str) -> bool:
    """Whether --data means the embedded glyphs: "glyphs", and no folder of that name."""
    return data == "glyphs" and not Path(data).exists()


def data_source(data: str, n: int = 2000) -> Any:
    """The images that --data names: a folder, or `n` embedded glyphs under their own name."""
    if not is_embedded(data):
        return Path(data)
    from cka_probe.inputs import glyphs
    from cka_probe.inputs.source import Named

    name = f"cka_probe.inputs.glyphs, split test, seed 0, first {n}"
    return Named(name, glyphs.tensor("test", n, 0)[0])


def pixel_constants(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """Mean and std for `probe`: the user's, else the weights' own; glyphs are normalised already.

    Args:
        args: the parsed command line, with data, mean and std.
        loaded: the network.
    """
    if args.mean is not None or args.std is not None:
        return {"mean": args.mean, "std": args.std}
    return {} if is_embedded(args.data) else {"mean": loaded.mean, "std": loaded.std}


def device_of(args: argparse.Namespace) -> torch.device:
    """Where this process computes: --device, else CUDA where there is one.

    Raises:
        ValueError: torch does not know the device.
    """
    import torch

    from cka_probe.distributed.ranks import own_device
    from cka_probe.errors import one_line

    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return own_device(torch.device(getattr(args, "device", None) or default))
    except RuntimeError as error:
        raise ValueError(
            f"unknown device: {args.device!r}, {one_line(error)}: leave --device out"
        ) from None
