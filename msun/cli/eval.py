"""`msun eval`: networks at many sizes: a table, a CSV and two pictures."""

from __future__ import annotations

import argparse
import math
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import (
    MODEL_HELP,
    WEIGHTS_HELP,
    add_compute,
    add_model_arg,
    add_pixel_constants,
    seed,
    whole_numbers,
)
from cka_probe.cli.output import file_backend, output_folder, staged
from msun.cli.options import load

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from cka_probe.models.load import LoadedModel
    from msun.network.model import MSUN

__all__ = ["add", "execute"]

TABLE, PICTURES = "evaluation.csv", {"accuracy": "accuracy.png", "pareto": "pareto.png"}
PREDICTIONS, CALIBRATED = "predictions", "calibrated"


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
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
    word("--trust", action="store_true", help="let a checkpoint run the Python file, or fetch the "
         "weights, that it names for its backbone (any code may be in it)")  # fmt: skip
    add_model_arg(parser)
    word("--data", required=True, metavar="DIR", help="folder of class folders, or `glyphs`")
    word("--split", metavar="S", help="sub-folder that holds the class folders; glyphs: test "
         "(default) or train")  # fmt: skip
    word("--sizes", required=True, metavar="32,64,224", help="sides in pixels")
    word("--feed", default="native", metavar="native|upsampled", help="upsampled resizes to the "
         "size, then to the reference (default native)")  # fmt: skip
    word("--reference", type=int, metavar="S", help="default: the checkpoint's own, the network's "
         "input size, else the largest size")  # fmt: skip
    word(
        "--rows",
        type=whole_numbers,
        metavar="0,217,...",
        help="outputs that stand for the classes, in their order",
    )
    word("--at", metavar="LAYER", help="the layer whose output CKA compares; default: the "
         "map that the trunk gets, or the input of the classifier")  # fmt: skip
    word("--arm", metavar="NAME", action="append", help="a name in table and pictures, one for "
         "each network")  # fmt: skip
    word("--mixed", action="store_true", help="add images of mixed sizes, drawn log-uniformly")
    word("--calibrate", metavar="DIR", help="training images (or `glyphs`) to re-estimate batch "
         "norm statistics on, for each size; checkpoints with them go to --out")  # fmt: skip
    word("--calibrate-images", type=int, default=200, metavar="N", help="how many (default 200)")
    word("--images", type=int, metavar="N", help="random subset of N images (default: all)")
    word("--batch-size", type=int, default=64, metavar="B", help="images per batch (default 64)")
    add_pixel_constants(parser)
    word("--predictions", action="store_true", help="also write predictions.npz, an entry for "
         "every image and size")  # fmt: skip
    word("--no-latency", action="store_true", help="do not time the network")
    word("--no-cka", action="store_true", help="do not compare features")
    word("--seed", type=seed, default=0, metavar="S", help="seeds everything (default 0)")
    add_compute(parser)
    word("--overwrite", action="store_true", help="replace an existing evaluation in --out")
    word("--quiet", action="store_true", help="no progress bar, no table")
    word("--out", required=True, metavar="DIR", help="folder for the results")
    parser.set_defaults(call=execute)


def execute(args: argparse.Namespace) -> None:
    """Measure every network at every size, then write and print the table."""
    import torch

    from cka_probe.inputs.views import parse_scales
    from cka_probe.plot.figures import save_figure
    from msun.evaluation.accuracy import compare
    from msun.evaluation.inputs import open_tests
    from msun.plot import evaluation as plots

    sides = parse_scales(args.sizes)
    outputs = (TABLE, *PICTURES.values())
    with (
        output_folder(args.out, outputs, overwrite=args.overwrite) as folder,
        staged(folder) as temporary,
    ):
        arms = _networks(args)
        device = args.device or ("cuda" if torch.cuda.is_available() else None)
        shared = {"batch_size": args.batch_size, "seed": args.seed, "device": device,
                  "workers": args.workers, "progress": not args.quiet}  # fmt: skip
        source = open_tests(args.data, args.split, args.images, args.seed)
        if args.calibrate is not None:
            _calibrate(args, arms, sides, shared, temporary)
        measured: dict[str, Any] = {
            name: (model, _pixel_constants(args)) for name, model in arms.items()
        }
        if args.predictions:
            for name, (_, own) in measured.items():
                own["predictions"] = temporary / _named(PREDICTIONS, name, measured, ".npz")
        frame = compare(
            measured,
            source,
            sides,
            feed=args.feed,
            rows=args.rows,
            reference=args.reference,
            at=args.at,
            mixed=args.mixed,
            cka=not args.no_cka,
            latency=not args.no_latency,
            **shared,
        )
        frame.to_csv(temporary / TABLE, index=False)
        with file_backend():
            save_figure(plots.accuracy(frame), temporary / PICTURES["accuracy"])
            save_figure(plots.pareto(frame), temporary / PICTURES["pareto"])
        written = sorted(path.name for path in temporary.iterdir())
    if not args.quiet:
        _print_table(frame, len(source), source.name)
        if source.skipped:
            print(f"files left out: {source.skipped}\n")
        print(f"wrote {args.out}/: {', '.join(written)}")


def _networks(args: argparse.Namespace) -> dict[str, MSUN | LoadedModel]:
    """The networks to measure, by the name of their arm."""
    if not args.checkpoints:
        if args.model is None:
            raise ValueError("nothing to measure: neither a checkpoint nor --model: give one")
        loaded = load(args)
        default = loaded.name + ", upsampled" * (args.feed == "upsampled")
        return dict(zip(_arms(args, [default]), [loaded], strict=True))
    backbone = load(args, "none").model if args.model is not None else None
    found = [_checkpoint(path, backbone, trust=args.trust) for path in args.checkpoints]
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
        raise ValueError(f"arm names do not fit the networks: {text}: give --arm for each")
    return names


def _checkpoint(path: str, backbone: nn.Module | None, *, trust: bool) -> MSUN:
    """A network with the classes and the normalisation of its training."""
    from msun.network import checkpoint

    model = checkpoint.load(path, backbone=backbone, trust=trust)
    extra = checkpoint.read(path).get("extra") or {}
    run = extra.get("run") or {}
    known = {"classes": extra.get("classes"), "rows": extra.get("rows"),
            "mean": run.get("mean"), "std": run.get("std")}  # fmt: skip
    model.spec |= {name: value for name, value in known.items() if value is not None}
    return model


def _calibrate(
    args: argparse.Namespace,
    arms: dict[str, MSUN | LoadedModel],
    sides: list[int],
    shared: dict[str, Any],
    folder: Path,
) -> None:
    """Re-estimate the batch norm statistics of every arm, and save those of checkpoints."""
    from msun.evaluation.calibration import calibrate, recalibrated
    from msun.network import checkpoint
    from msun.network.model import MSUN

    if args.feed == "upsampled":
        raise ValueError("calibration for sizes that are not fed: --feed upsampled: use --feed "
                         "native, or leave out --calibrate")  # fmt: skip
    options = {"n_images": args.calibrate_images, **shared, **_pixel_constants(args)}
    for (name, model), path in zip_longest(list(arms.items()), args.checkpoints):
        if isinstance(model, MSUN):
            calibrate(model, args.calibrate, sides, **options)
            before = checkpoint.read(path).get("extra")
            checkpoint.save(model, folder / _named(CALIBRATED, name, arms, ".pt"), extra=before)
        else:
            arms[name] = recalibrated(model, args.calibrate, sides, **options)


def _named(what: str, arm: str, arms: dict[str, Any], suffix: str) -> str:
    """A file's name; where there are several arms, with the number of the arm."""
    return what + (f"-{list(arms).index(arm) + 1}" if len(arms) > 1 else "") + suffix


def _pixel_constants(args: argparse.Namespace) -> dict[str, list[float]]:
    """--mean and --std, if given."""
    given = {"mean": args.mean, "std": args.std}
    return {name: values for name, values in given.items() if values is not None}


def _print_table(frame: pd.DataFrame, n: int, name: str) -> None:
    """Print the accuracies, costs and CKA, with their intervals."""
    import pandas as pd

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
