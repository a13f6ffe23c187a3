"""`msun train`: from a backbone, a cut and labelled images to a trained network."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from cka_probe.cli.commands import _images, _numbers
from cka_probe.inputs import glyphs
from cka_probe.inputs.scales import parse_scales
from cka_probe.probing.api import probe
from msun.cli.build import add_building, build_network
from msun.cli.options import add_model, load
from msun.cutting.cuts import example_images, find_cuts
from msun.data.labelled import open_labelled
from msun.network.costs import subnet_costs
from msun.splitting.choice import SplitChoice
from msun.splitting.suggest import check_options, suggest_split
from msun.training.config import TrainConfig
from msun.training.losses import CONSTRAINTS
from msun.training.state import CONFIG, METRICS, MODEL, STATE, read_config, read_metrics
from msun.training.trainer import train

AUTO, SPLIT = "auto", "split.json"
PROBED = 512  # images that --at auto looks at


def add(commands: Any) -> None:
    """Add the command's words to the parser."""
    parser = commands.add_parser(
        "train",
        help="build a multi-scale network and train it",
        description="Cut the backbone, build the network as `msun build` does, and train it with "
        "the same crops at every scale. Writes DIR/model.pt, metrics.csv (a row an epoch) and "
        "config.json; an interrupted run leaves state.pt, from which --resume goes on exactly.",
        epilog="Example: msun train --model glyphnet --weights none --at layer1 --scales 16,32,64 "
        "--data glyphs --out runs/lean · torchrun --nproc-per-node 4 -m msun train ... shares each "
        "batch among 4 processes",
    )
    add_model(parser)
    word = parser.add_argument
    word("--at", required=True, metavar="LAYER|auto", help="where the trunk begins: after it (see "
         f"`msun cuts`); auto probes {PROBED} of the images and takes what `msun suggest` "
         "would")  # fmt: skip
    word("--growth", type=float, default=1.0, metavar="G", help="what subnets of their own may "
         "add, for --at auto; as in `msun suggest` (default 1)")  # fmt: skip
    add_building(parser)
    word("--data", required=True, metavar="DIR", help="folder with a sub-folder per class, or "
         "`glyphs` (embedded)")  # fmt: skip
    word("--split", metavar="S", help="sub-folder of DIR that holds the class folders")
    word("--images", dest="n_images", type=int, metavar="N", help="random subset of N images; of "
         "the glyphs, how many to draw")  # fmt: skip
    word("--rows", metavar="0,217,...", help="outputs of the head that stand for the classes, in "
         "their order, where it has more")  # fmt: skip
    word("--mean", metavar="a,b,c", help="channel means to subtract; default: the weights' own")
    word("--std", metavar="a,b,c", help="channel standard deviations to divide by")
    word("--out", required=True, metavar="DIR", help="folder for the results")
    word("--resume", action="store_true", help="continue an interrupted run in the same --out")
    word("--overwrite", action="store_true", help="replace a run in --out")
    word("--device", metavar="D", help="cpu, cuda, mps (default: cuda where there is one)")
    word("--workers", type=int, metavar="W", help="processes that decode images")
    word("--save-every", dest="save_every_s", type=float, metavar="S",
         help=f"seconds between saved states (default {TrainConfig.save_every_s:g})")  # fmt: skip
    word("--quiet", action="store_true", help="no progress bar, no summary")
    _recipe(parser)
    parser.set_defaults(call=train_network)


def _recipe(parser: Any) -> None:
    """What is done in a step, and how often; all defaults are those of `TrainConfig`."""
    group = parser.add_argument_group("recipe")

    def word(name: str, metavar: str, text: str, kind: Any = float) -> None:
        default = getattr(TrainConfig, name)
        told = "" if default is None else f" (default {default:g})"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text + told
        )

    word("epochs", "N", "passes over the training images", int)
    word("max_steps", "N", "stop after N steps instead; the schedule spans them", int)
    word("batch_size", "B", "images a step", int)
    word("lr", "R", "highest learning rate")
    word("momentum", "M", "of SGD")
    word("weight_decay", "D", "of SGD")
    group.add_argument("--no-norm-decay", dest="decay_norms", action="store_false", default=None,
                       help="no weight decay on biases and norms")  # fmt: skip
    word("warmup", "SHARE", "of the steps, in which the rate rises")
    word("label_smoothing", "E", "of the cross-entropies")
    word("clip", "NORM", "highest norm of the gradient; default: none")
    group.add_argument("--constraint", metavar="|".join(CONSTRAINTS),
                       help="scale-invariant constraint; default: the preset's")  # fmt: skip
    word("constraint_weight", "W", "what it is multiplied by")
    word("tau", "T", "parts of the constraint below it count as 0; default: 0.01 for raw, else 0")
    group.add_argument("--distill", type=float, nargs="?", const=1.0, metavar="W",
                       help="learn from the mean of all scales' logits, with this weight "
                       "(1 where none is given)")  # fmt: skip
    word("distill_after", "SHARE", "of the steps; default: the warm-up")
    word("ema", "D", "keep the running mean of the weights, with this decay")
    group.add_argument("--amp", metavar="bf16|fp16", help="autocast")
    group.add_argument("--augment", metavar="auto|none", help="auto (default): random crops, and "
                       "mirroring for photographs; none: the centre square")  # fmt: skip
    group.add_argument("--crop-area", metavar="LOW,HIGH", help="share of the area of a crop; "
                       "default: 0.25,1 for files, 0.85,1 for tensors and glyphs")  # fmt: skip
    group.add_argument("--flip", metavar="on|off", help="mirror; default: on for files only")
    word(
        "between",
        "SHARE",
        "of the steps, in which a scale learns the sizes that it serves; "
        "default: 0.5 where --inputs resizes any",
    )
    word("val_share", "SHARE", "of the images that is measured after each epoch, not trained on")
    word("shards", "N", "parts of a batch that batch norm sees apart; default: one a process", int)
    word("seed", "S", "seeds everything", int)


def train_network(args: argparse.Namespace) -> None:
    """`msun train`."""
    first = int(os.environ.get("RANK", "0")) == 0
    talks = first and not args.quiet
    config = _config(args)
    check_options(growth=args.growth)
    data: Any = args.data
    choice = None
    if data != "glyphs" or Path(data).exists():
        data = open_labelled(Path(data), split=args.split, n_images=args.n_images, seed=args.seed)
    elif args.split not in (None, "train"):
        raise ValueError(f"glyphs to train on are the split 'train': {args.split!r}: leave it out")
    if args.at == AUTO:
        choice = _choose(args, config)
        if talks and choice is not None:
            print(f"{choice.headline}\n{choice.why}", flush=True)
    model = build_network(args)
    out = Path(config.out).expanduser()
    before = _stamps(out)
    try:
        path = train(model, data, config)
    finally:  # an interrupted run goes on with the cut that was chosen
        if choice is not None and first and _stamps(out) - before:
            choice.save(out / SPLIT)
    if talks:
        _tell(path)


def _stamps(out: Path) -> set[tuple[str, int]]:
    """What there is of a run, and when it was written."""
    there = (out / name for name in (MODEL, STATE))
    return {(path.name, path.stat().st_mtime_ns) for path in there if path.exists()}


def _config(args: argparse.Namespace) -> TrainConfig:
    """The words that were given; what was not keeps the default."""
    names = TrainConfig.__dataclass_fields__
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    args.seed = given.get("seed", TrainConfig.seed)
    if args.rows is not None:
        given["rows"] = _whole(args.rows)
    for name in ("mean", "std", "crop_area"):
        if name in given:
            given[name] = _numbers(f"--{name.replace('_', '-')}", given[name])
    if args.flip is not None:
        if args.flip not in ("on", "off"):
            raise ValueError(f"bad --flip: {args.flip!r}: write on or off")
        given["flip"] = args.flip == "on"
    given["progress"] = not args.quiet
    if args.device is None and torch.cuda.is_available():
        given["device"] = "cuda"
    return TrainConfig(**given)


def _whole(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"bad --rows: {text!r}: write whole numbers like 0,217,482") from None


def _choose(args: argparse.Namespace, config: TrainConfig) -> SplitChoice | None:
    """Put a layer in the place of auto: that of the run to be resumed, or what a probe suggests."""
    before = read_config(Path(args.out)).get("run", {}).get("model", {}).get("at")
    if args.resume and before is not None:
        args.at = before
        return None
    scales = parse_scales(args.scales)
    if len(scales) < 2:
        raise ValueError(f"one scale has nothing to be held against: {args.scales}: give --at")
    loaded = load(args)
    images = _images(args.data) if args.split is None else Path(args.data) / args.split
    embedded = isinstance(images, torch.Tensor)
    if embedded:
        images = glyphs.tensor("train", PROBED, args.seed)[0]
    report = probe(
        loaded.model,
        images,
        scales,
        resize="restore",
        n_images=None if embedded else _at_most(images),
        mean=None if embedded else config.mean or loaded.mean,
        std=None if embedded else config.std or loaded.std,
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
    args.at = choice.layer
    return choice


def _at_most(folder: Any) -> int:
    return min(PROBED, len(open_labelled(folder)))


def _tell(path: Path) -> None:
    """Print how it ended."""
    row = read_metrics(path.parent)[-1]
    tops = [(name[5:], float(row[name])) for name in row if name.startswith("top1_")]
    if tops:
        shown = ", ".join(f"{100 * share:.1f} % at {side} px" for side, share in tops)
        print(f"top-1 on the images that were kept back: {shown}")
    print(f"wrote {path.parent}/: {path.name}, {METRICS}, {CONFIG}")
