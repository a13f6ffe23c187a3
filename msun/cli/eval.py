"""`msun eval`: networks at many sizes: a table, a CSV and two pictures."""

import argparse
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pandas as pd
import torch
from torch import nn

from cka_probe.cli.commands import _numbers
from cka_probe.cli.main import MODEL_HELP, WEIGHTS_HELP
from cka_probe.cli.output import backend
from cka_probe.inputs.scales import parse_scales
from cka_probe.models.load import LoadedModel
from cka_probe.plot.figures import save_figure
from msun.cli.options import load
from msun.evaluation.accuracy import compare
from msun.evaluation.calibration import calibrate, recalibrated
from msun.evaluation.classes import open_tests
from msun.network import checkpoint
from msun.network.model import MSUN
from msun.plot import evaluation as plots

TABLE, PICTURES = "evaluation.csv", {"accuracy": "accuracy.png", "pareto": "pareto.png"}
PREDICTIONS, CALIBRATED = "predictions", "calibrated"


def add(commands: Any) -> None:
    """Add the command's words to the parser."""
    parser = commands.add_parser(
        "eval",
        help="accuracy, cost and CKA at many sizes",
        description="Show every image at every size to one network or several, and write "
        "DIR/evaluation.csv, accuracy.png and pareto.png: top-1 and top-5 with 95 % intervals, "
        "multiply-accumulates, parameters, latency on this machine, and CKA of the features with "
        "those at the reference size.",
        epilog="Examples: msun eval runs/lean/model.pt --data photos/test --sizes 32,64,128,224 "
        "--out results · msun eval --model glyphnet --data glyphs --sizes 16,32,64 "
        "--feed upsampled --out plain",
    )
    word = parser.add_argument
    word("checkpoints", nargs="*", metavar="CHECKPOINT", help="what `msun train` or `msun build` "
         "wrote; several are compared")  # fmt: skip
    word("--model", metavar="M", help=f"a plain network instead: {MODEL_HELP}; with a checkpoint: "
         "its backbone, where the file has no name for it")  # fmt: skip
    word("--weights", metavar="W", default="DEFAULT", help=WEIGHTS_HELP)
    word("--model-arg", metavar="KEY=VALUE", action="append", default=[],
         help="passed to the model's constructor")  # fmt: skip
    word("--data", required=True, metavar="DIR", help="folder of class folders, or `glyphs`")
    word("--split", metavar="S", help="sub-folder that holds the class folders; glyphs: test "
         "(default) or train")  # fmt: skip
    word("--sizes", required=True, metavar="32,64,224", help="sides in pixels")
    word("--feed", default="native", metavar="native|upsampled", help="upsampled resizes to the "
         "size, then to the reference (default native)")  # fmt: skip
    word("--reference", type=int, metavar="S", help="default: the checkpoint's own, the network's "
         "input size, else the largest size")  # fmt: skip
    word("--rows", metavar="0,217,...", help="outputs that stand for the classes, in their order")
    word("--at", metavar="LAYER", help="whose output CKA compares; default: the map that the "
         "trunk gets, or what goes into the last linear layer")  # fmt: skip
    word("--arm", metavar="NAME", action="append", help="a name in table and pictures, one for "
         "each network")  # fmt: skip
    word("--mixed", action="store_true", help="add images of mixed sizes, drawn log-uniformly")
    word("--calibrate", metavar="DIR", help="training images (or `glyphs`) to re-estimate batch "
         "norm statistics on, for each size; checkpoints with them go to --out")  # fmt: skip
    word("--calibrate-images", type=int, default=200, metavar="N", help="how many (default 200)")
    word("--images", type=int, metavar="N", help="random subset of N images (default: all)")
    word("--batch-size", type=int, default=64, metavar="B", help="images a batch (default 64)")
    word("--mean", metavar="a,b,c", help="channel means to subtract; default: the network's own")
    word("--std", metavar="a,b,c", help="channel standard deviations to divide by")
    word("--predictions", action="store_true", help="also write predictions.npz, an entry for "
         "every image and size")  # fmt: skip
    word("--no-latency", action="store_true", help="do not time the network")
    word("--no-cka", action="store_true", help="do not compare features")
    word("--seed", type=int, default=0, metavar="S", help="seeds everything (default 0)")
    word("--device", metavar="D", help="cpu, cuda, mps (default: cuda where there is one)")
    word("--workers", type=int, default=0, metavar="W", help="processes that decode images")
    word("--overwrite", action="store_true", help="replace an existing evaluation in --out")
    word("--quiet", action="store_true", help="no progress bar, no table")
    word("--out", required=True, metavar="DIR", help="folder for the results")
    parser.set_defaults(call=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """`msun eval`."""
    sides = parse_scales(args.sizes)
    rows = None if args.rows is None else _whole(args.rows)
    with _folder(Path(args.out), overwrite=args.overwrite) as temporary:
        arms = _networks(args)
        device = args.device or ("cuda" if torch.cuda.is_available() else None)
        shared = {"batch_size": args.batch_size, "seed": args.seed, "device": device,
                  "workers": args.workers, "progress": not args.quiet}  # fmt: skip
        source = open_tests(args.data, args.split, args.images, args.seed)
        if args.calibrate is not None:
            _calibrate(args, arms, sides, shared, temporary)
        asked: dict[str, Any] = {
            name: (model, _normalisation(args)) for name, model in arms.items()
        }
        if args.predictions:
            for name, (_, own) in asked.items():
                own["predictions"] = temporary / _named(PREDICTIONS, name, asked, ".npz")
        frame = compare(
            asked,
            source,
            sides,
            feed=args.feed,
            rows=rows,
            reference=args.reference,
            at=args.at,
            mixed=args.mixed,
            cka=not args.no_cka,
            latency=not args.no_latency,
            **shared,
        )
        frame.to_csv(temporary / TABLE, index=False)
        with backend():
            save_figure(plots.accuracy(frame), temporary / PICTURES["accuracy"])
            save_figure(plots.pareto(frame), temporary / PICTURES["pareto"])
        written = sorted(path.name for path in temporary.iterdir())
    if not args.quiet:
        _tell(frame, len(source), source.name)
        print(f"wrote {args.out}/: {', '.join(written)}")


def _networks(args: argparse.Namespace) -> dict[str, MSUN | LoadedModel]:
    """What is measured, by the name of its arm."""
    if not args.checkpoints:
        if args.model is None:
            raise ValueError("nothing to measure: neither a checkpoint nor --model: give one")
        loaded = load(args)
        default = loaded.name + ", upsampled" * (args.feed == "upsampled")
        return dict(zip(_arms(args, [default]), [loaded], strict=True))
    backbone = load(args, "none").model if args.model is not None else None
    found = [_checkpoint(path, backbone) for path in args.checkpoints]
    paths = [Path(path) for path in args.checkpoints]
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):  # runs/lean/model.pt, runs/paper/model.pt
        stems = [path.resolve().parent.name or path.stem for path in paths]
    if len(paths) == 1:
        stems = [found[0].preset]
    return dict(zip(_arms(args, stems), found, strict=True))


def _arms(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The names of the arms, all different."""
    names = args.arm or names
    count = max(1, len(args.checkpoints))
    if len(names) != count or len(set(names)) < count:
        text = f"{', '.join(names)} for {count} networks"
        raise ValueError(f"arms do not tell the networks apart: {text}: give --arm for each")
    return names


def _checkpoint(path: str, backbone: nn.Module | None) -> MSUN:
    """A network with what its training says of classes and normalisation."""
    model = checkpoint.load(path, backbone=backbone)
    extra = checkpoint.read(path).get("extra") or {}
    run = extra.get("run") or {}
    told = {"classes": extra.get("classes"), "rows": extra.get("rows"),
            "mean": run.get("mean"), "std": run.get("std")}  # fmt: skip
    model.spec |= {name: value for name, value in told.items() if value is not None}
    return model


def _calibrate(
    args: argparse.Namespace,
    arms: dict[str, MSUN | LoadedModel],
    sides: list[int],
    shared: dict[str, Any],
    folder: Path,
) -> None:
    """Re-estimate the statistics of every arm, and keep those of checkpoints."""
    if args.feed == "upsampled":
        raise ValueError("calibration for sizes that are not fed: --feed upsampled: use --feed "
                         "native, or leave out --calibrate")  # fmt: skip
    options = {"n_images": args.calibrate_images, **shared, **_normalisation(args)}
    for (name, model), path in zip_longest(list(arms.items()), args.checkpoints):
        if isinstance(model, MSUN):
            calibrate(model, args.calibrate, sides, **options)
            before = checkpoint.read(path).get("extra")
            checkpoint.save(model, folder / _named(CALIBRATED, name, arms, ".pt"), extra=before)
        else:
            arms[name] = recalibrated(model, args.calibrate, sides, **options)


def _named(what: str, arm: str, arms: dict[str, Any], suffix: str) -> str:
    """A file's name; where there are several arms, the place of the arm is in it."""
    return what + (f"-{list(arms).index(arm) + 1}" if len(arms) > 1 else "") + suffix


def _normalisation(args: argparse.Namespace) -> dict[str, Any]:
    """--mean and --std, if given."""
    given = {name: _numbers(f"--{name}", getattr(args, name)) for name in ("mean", "std")}
    return {name: values for name, values in given.items() if values is not None}


def _whole(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"bad --rows: {text!r}: write whole numbers like 0,217,482") from None


@contextmanager
def _folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder in --out, whose files move there on success; else all is as before."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output is not a folder: {out}: choose another --out")
    if (out / TABLE).exists() and not overwrite:
        raise ValueError(f"an evaluation is there already: {out / TABLE}: add --overwrite, or "
                         "choose another --out")  # fmt: skip
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(dir=out, prefix=".writing-"))
    try:
        yield temporary
        for path in temporary.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new and not any(out.iterdir()):
            out.rmdir()


def _tell(frame: pd.DataFrame, n: int, name: str) -> None:
    """Print the table."""
    shown: dict[str, list[str]] = {}
    if frame["arm"].nunique() > 1:
        shown["arm"] = frame["arm"].tolist()
    shown["px"] = ["mixed" if pd.isna(side) else str(side) for side in frame["size_px"]]
    if (frame["fed_px"] != frame["size_px"]).fillna(False).any():
        shown["fed px"] = [f"{value:.0f}" for value in frame["fed_px"]]
    for metric in ("top1", "top5"):
        ends = (frame[metric], frame[f"{metric}_low"], frame[f"{metric}_high"])
        if not frame[metric].isna().all():
            shown[f"top-{metric[-1]} %"] = [_share(*row) for row in zip(*ends, strict=True)]
    for column, title, form in (
        ("gmacs", "GMACs", ".4g"), ("params_m", "params M", ".3f"),
        ("latency_ms_1", "ms, batch 1", ".1f"), ("latency_ms_64", "ms, batch 64", ".1f"),
    ):  # fmt: skip
        if not frame[column].isna().all():
            shown[title] = [_number(value, form) for value in frame[column]]
    if not frame["cka"].isna().all():
        pairs = zip(frame["cka"], frame["cka_high"], strict=True)
        shown["CKA"] = [_with_half(value, high) for value, high in pairs]
    print(f"\n{n} images of {name}, 95 % intervals\n")
    print(pd.DataFrame(shown).to_string(index=False))
    print()


def _share(value: float, low: float, high: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%} ({low:.1%}–{high:.1%})".replace("%", "")


def _with_half(value: float, high: float) -> str:
    text = _number(value, ".3f")
    return text if math.isnan(high) or high <= value else f"{text} ±{high - value:.3f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
