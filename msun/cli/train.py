"""`msun train`: from a backbone, a cut and labelled images to a trained network."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import (
    add_compute,
    add_pixel_constants,
    is_embedded,
    numbers,
    seed,
    whole_numbers,
)
from cka_probe.cli.program import OWN
from msun.cli.build import add_building, build_network
from msun.cli.options import add_model, load

if TYPE_CHECKING:
    from msun.splitting.choice import SplitChoice
    from msun.training.config import TrainConfig

__all__ = ["add", "execute", "train_config"]

AUTO, SPLIT = "auto", "split.json"
PROBED = 512  # images that --at auto probes: enough for error bars, a minute on a CPU


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "train",
        help="build a multi-scale network and train it",
        description="Cut the backbone, build the network as `msun build` does, and train it with "
        "the same crops at every scale. Writes DIR/model.pt, metrics.csv (a row an epoch) and "
        "config.json; an interrupted run leaves state.pt, from which --resume continues exactly.",
        epilog="Example: msun train --model glyphnet --weights none --at layer1 --scales 16,32,64 "
        "--data glyphs --out runs/lean · torchrun --nproc-per-node 4 -m msun train ... shares each "
        "batch among 4 processes",
    )
    add_model(parser)
    word = parser.add_argument
    word("--at", required=True, metavar="LAYER|auto", help="where the trunk begins: after it (see "
         f"`msun cuts`); auto probes {PROBED} of the images and takes what `msun suggest` "
         "would")  # fmt: skip
    word("--growth", type=float, default=1.0, metavar="G", help="share of parameters that subnets "
         "may add, for --at auto; as in `msun suggest` (default 1)")  # fmt: skip
    add_building(parser)
    word("--data", required=True, metavar="DIR", help="folder with a sub-folder per class, or "
         "`glyphs` (embedded)")  # fmt: skip
    word("--split", metavar="S", help="sub-folder of DIR that holds the class folders")
    word("--images", dest="n_images", type=int, metavar="N", help="random subset of N images; of "
         "the glyphs, how many to draw")  # fmt: skip
    word("--rows", type=whole_numbers, metavar="0,217,...", help="outputs of the classifier that "
         "stand for the classes, in their order, where it has more")  # fmt: skip
    add_pixel_constants(parser)
    add_compute(parser, workers=None)
    word("--out", required=True, metavar="DIR", help="folder for the results")
    word("--resume", action="store_true", help="continue an interrupted run in the same --out")
    word("--overwrite", action="store_true", help="replace a run in --out")
    word("--save-every", dest="save_every_s", type=float, metavar="S",
         help="seconds between saved states (default 60)")  # fmt: skip
    word("--quiet", action="store_true", help="no progress bar, no summary")
    _add_recipe(parser)
    parser.set_defaults(call=execute, processes=OWN)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `TrainConfig`, whose defaults hold where an option is left out.

    The defaults in the help are written out, so that `--help` imports no torch; a test holds them
    against `TrainConfig`.
    """
    word = parser.add_argument_group("recipe").add_argument
    word("--epochs", type=int, metavar="N", help="passes over the training images (default 30)")
    word("--max-steps", type=int, metavar="N",
         help="stop after N steps instead; the schedule spans them")  # fmt: skip
    word("--batch-size", type=int, metavar="B", help="images per step (default 64)")
    word("--lr", type=float, metavar="R", help="highest learning rate (default 0.1)")
    word("--momentum", type=float, metavar="M", help="momentum of SGD (default 0.9)")
    word("--weight-decay", type=float, metavar="D", help="weight decay of SGD (default 0.0001)")
    word("--no-norm-decay", dest="decay_norms", action="store_false", default=None,
         help="no weight decay on biases and norms")  # fmt: skip
    word("--warmup", type=float, metavar="SHARE",
         help="share of the steps in which the learning rate rises (default 0.05)")  # fmt: skip
    word("--label-smoothing", type=float, metavar="E",
         help="label smoothing of the cross-entropies (default 0.1)")  # fmt: skip
    word("--clip", type=float, metavar="NORM",
         help="highest norm of the gradient; default: no clipping")  # fmt: skip
    word("--constraint", metavar="none|raw|normalised|cka",
         help="scale-invariant constraint; default: the preset's")  # fmt: skip
    word("--constraint-weight", type=float, metavar="W",
         help="factor of the constraint in the loss (default 1)")  # fmt: skip
    word("--tau", type=float, metavar="T", help="threshold below which parts of the constraint "
         "count as 0; default: 0.01 for raw, else 0")  # fmt: skip
    word("--distill", type=float, nargs="?", const=1.0, metavar="W",
         help="weight of distillation from the mean of all scales' logits (default 0; 1 where no "
         "W is given)")  # fmt: skip
    word("--distill-after", type=float, metavar="SHARE",
         help="share of the steps before distillation; default: the warm-up")  # fmt: skip
    word("--ema", type=float, metavar="D",
         help="save the EMA of the weights, with this decay; default: no EMA")  # fmt: skip
    word("--amp", metavar="bf16|fp16", help="autocast; default: none")
    word("--augment", metavar="auto|none", help="auto (default): random crops, and mirroring for "
         "photographs; none: the centre square")  # fmt: skip
    word("--crop-area", type=numbers, metavar="LOW,HIGH", help="share of the image's area in a "
         "crop; default: 0.25,1 for files, 0.85,1 for tensors and glyphs")  # fmt: skip
    word("--flip", metavar="on|off", help="mirror; default: on for files only")
    word("--between", type=float, metavar="SHARE", help="share of the steps in which a scale "
         "trains on the sizes that it serves; default: 0.5 where --inputs resizes any")  # fmt: skip
    word("--val-share", type=float, metavar="SHARE", help="share of the images that is measured "
         "after each epoch and not trained on (default 0.1)")  # fmt: skip
    word("--shards", type=int, metavar="N",
         help="parts of a batch that batch norm sees apart; default: one a process")  # fmt: skip
    word("--seed", type=seed, metavar="S", help="seeds everything (default 0)")


def execute(args: argparse.Namespace) -> None:
    """Build the network, train it and print how it ended."""
    from msun.data.labelled import open_labelled
    from msun.splitting.suggest import check_options
    from msun.training.state import STATE
    from msun.training.trainer import train

    first = int(os.environ.get("RANK", "0")) == 0
    talks = first and not args.quiet
    config = train_config(args)
    args.seed = config.seed  # of random weights, too
    check_options(growth=args.growth)
    data: Any = args.data
    choice = None
    if not is_embedded(data):
        data = open_labelled(Path(data), split=args.split, n_images=args.n_images, seed=args.seed)
        if talks and data.skipped:
            print(f"files left out: {data.skipped}", flush=True)
    elif args.split not in (None, "train"):
        raise ValueError(f"glyphs to train on are the split 'train': {args.split!r}: leave it out")
    if args.at == AUTO:
        args.at, choice = _choose(args, config)
        if talks and choice is not None:
            print(f"{choice.headline}\n{choice.why}", flush=True)
    model = build_network(args)
    out = Path(config.out).expanduser()
    before = _timestamps(out)
    try:
        path = train(model, data, config)
    except KeyboardInterrupt:
        if (out / STATE).exists():
            raise KeyboardInterrupt("run again with --resume to continue") from None
        raise
    finally:  # a resumed run needs the cut that was chosen
        if choice is not None and first and _timestamps(out) - before:
            choice.save(out / SPLIT)
    if talks:
        _print_end(path)


def _timestamps(out: Path) -> set[tuple[str, int]]:
    """The files of a run that are there, each with its time of writing."""
    from msun.training.state import MODEL, STATE

    there = (out / name for name in (MODEL, STATE))
    return {(path.name, path.stat().st_mtime_ns) for path in there if path.exists()}


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The training options of a command line; those that were left out keep their defaults.

    Args:
        args: the parsed command line.
    """
    import torch

    from msun.training.config import TrainConfig

    names = TrainConfig.__dataclass_fields__
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.flip is not None:
        if args.flip not in ("on", "off"):
            raise ValueError(f"bad --flip: {args.flip!r}: write on or off")
        given["flip"] = args.flip == "on"
    given["progress"] = not args.quiet
    if args.device is None and torch.cuda.is_available():
        given["device"] = "cuda"
    return TrainConfig(**given)


def _choose(args: argparse.Namespace, config: TrainConfig) -> tuple[str, SplitChoice | None]:
    """The layer for --at auto: that of the run to be resumed, or what a probe suggests."""
    from cka_probe.inputs import glyphs
    from cka_probe.inputs.views import parse_scales
    from cka_probe.probing.api import probe
    from msun.cutting.cuts import example_images, find_cuts
    from msun.data.labelled import open_labelled
    from msun.network.costs import subnet_costs
    from msun.splitting.suggest import suggest_split
    from msun.training.state import read_config

    before = read_config(Path(args.out)).get("run", {}).get("model", {}).get("at")
    if args.resume and before is not None:
        return str(before), None
    scales = parse_scales(args.scales)
    if len(scales) < 2:
        raise ValueError(f"one scale has nothing to be compared with: {args.scales}: give --at")
    loaded = load(args)
    options: dict[str, Any] = {}
    images: Any
    if is_embedded(args.data):
        images = glyphs.tensor("train", PROBED, args.seed)[0]
    else:
        images = Path(args.data) if args.split is None else Path(args.data) / args.split
        options = {
            "n_images": min(PROBED, len(open_labelled(images))),
            "mean": config.mean or loaded.mean,
            "std": config.std or loaded.std,
        }
    report = probe(
        loaded.model,
        images,
        scales,
        resize="restore",
        **options,
        seed=args.seed,
        device=config.device,
        workers=config.workers,
        progress=config.progress,
    )
    cuts = find_cuts(loaded.model, example_images(loaded.model, max(scales)))
    costs = subnet_costs(loaded.model, cuts, scales)
    choice = suggest_split(report, cuts, growth=args.growth, costs=costs)
    if choice.layer is None:
        raise ValueError(f"no split found: {choice.why.replace(': ', ', ')}: give --at LAYER")
    return choice.layer, choice


def _print_end(path: Path) -> None:
    """Print the accuracies of the last epoch and the files that were written."""
    from msun.training.state import CONFIG, METRICS, read_metrics

    row = read_metrics(path.parent)[-1]
    tops = [(name[5:], float(row[name])) for name in row if name.startswith("top1_")]
    if tops:
        shown = ", ".join(f"{100 * share:.1f} % at {side} px" for side, share in tops)
        print(f"top-1 on the images that were kept back: {shown}")
    print(f"wrote {path.parent}/: {path.name}, {METRICS}, {CONFIG}")
