"""`msun suggest`: a cut with its reasons, from a saved report or from scratch."""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cka_probe.cli.commands import _about, _described, _images, _norm
from torch import nn

from cka_probe.activations.layers import ROOT, module_paths, select_layers
from cka_probe.activations.macs import model_sha256
from cka_probe.cli.output import backend, left_out, output_folder
from cka_probe.inputs.scales import parse_scales
from cka_probe.models.load import LoadedModel
from cka_probe.plot.figures import save_figure
from cka_probe.probing.api import REPORT, probe
from cka_probe.report import Report
from msun.cli.options import add_model, load
from msun.cutting.cuts import Cut, example_images, find_cuts
from msun.network.costs import subnet_costs
from msun.plot.split import split_curve
from msun.splitting.choice import SplitChoice
from msun.splitting.rules import SPLIT_RULES
from msun.splitting.suggest import check_options, suggest_split

JSON, PICTURE = "split.json", "split.png"


def add(commands: Any) -> None:
    """Add the command's words to the parser."""
    parser = commands.add_parser(
        "suggest",
        help="after which layer scale-specific ones should end",
        description="Read from a report which cut to take, or probe a network first. Prints the "
        "cut with its reasons, the runner-up, what each cut costs and the whole ranking; writes "
        "DIR/split.json and split.png, and DIR/report.npz where it probed.",
        epilog="Examples: msun suggest results/report.npz --model resnet18 · "
        "msun suggest --model glyphnet --data glyphs --scales 16,32,64 --out split",
    )
    word = parser.add_argument
    word("report", nargs="?", metavar="report.npz", help="what `cka-probe run` wrote, best with "
         "--resize restore; without it --data and --scales say what to probe")  # fmt: skip
    add_model(parser, weights=None)
    word("--rule", default="affordable", metavar="R", help=f"{', '.join(SPLIT_RULES)} "
         "(default affordable: the deepest cut within --growth)")  # fmt: skip
    word("--view", metavar="V", help="whose curve; default: the smallest scale")
    word("--delta", type=float, default=0.05, metavar="D",
         help="recovered is what comes this near to the later maximum (default 0.05)")  # fmt: skip
    word("--growth", type=float, default=1.0, metavar="G",
         help="subnets must add less than this share of what lies before the network's last cut, "
         "for --rule affordable (default 1: less than the features have)")  # fmt: skip
    word("--out", metavar="DIR", help="folder for split.json and split.png")
    probing = parser.add_argument_group("to probe first").add_argument
    probing("--data", metavar="DIR", help="folder of images, or `glyphs` (embedded)")
    probing("--scales", metavar="32,64,224", help="sides in pixels, the largest is the reference")
    probing("--resize", default="restore", metavar="restore|native",
            help="restore (default) resizes to s and back up; native feeds s x s")  # fmt: skip
    probing("--no-antialias", action="store_true", help="resize without antialiasing")
    probing("--layers", nargs="+", metavar="GLOB", help="layers to tap; default: the blocks")
    probing("--images", type=int, metavar="N", help="random subset of N images (default: all)")
    probing("--batch-size", type=int, default=64, metavar="B", help="images a batch (default 64)")
    probing("--mean", metavar="a,b,c", help="channel means to subtract; default: the weights' own")
    probing("--std", metavar="a,b,c", help="channel standard deviations to divide by")
    probing("--seed", type=int, default=0, metavar="S", help="seeds everything (default 0)")
    probing("--device", metavar="D", help="cpu, cuda, mps (default: cuda where there is one)")
    probing("--workers", type=int, default=0, metavar="W", help="processes that decode images")
    probing("--skip-bad", action="store_true", help="leave out unreadable images and name them")
    probing("--resume", action="store_true", help="continue an interrupted run in the same --out")
    probing("--overwrite", action="store_true", help="replace an existing report in --out")
    probing("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(call=suggest)


def suggest(args: argparse.Namespace) -> None:
    """`msun suggest`."""
    check_options(args.rule, delta=args.delta, growth=args.growth)
    if args.report is not None:
        if args.data is not None or args.scales is not None:
            way_out = "give one of them"
            raise ValueError(f"a report and something to probe: {args.report}: {way_out}")
        _from_report(args)
        return
    if args.data is None or args.scales is None or args.out is None:
        absent = [f"--{name}" for name in ("data", "scales", "out") if vars(args)[name] is None]
        raise ValueError(
            f"nothing to go by: no report, nor {' and '.join(absent)}: give a report.npz, or "
            "--data, --scales and --out to probe"
        )
    _from_scratch(args)


def _from_report(args: argparse.Namespace) -> None:
    report = Report.load(args.report)
    loaded = load(args, args.weights or "none")
    _check_network(report, loaded, weights_given=args.weights is not None)
    sides = sorted(int(view) for view in report.views if view.isdecimal())
    reference = int(report.reference) if report.reference.isdecimal() else None
    cuts = _find_cuts(loaded, reference)
    choice = _choose(args, report, loaded, cuts, sides)
    if args.out is None:
        _tell(choice, loaded)
        return
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is not a folder: {folder}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write(choice, folder)
    _tell(choice, loaded)
    print(f"wrote {folder}/: {JSON}, {PICTURE}")


def _from_scratch(args: argparse.Namespace) -> None:
    scales = parse_scales(args.scales)
    if len(scales) < 2:
        raise ValueError(f"one scale has nothing to be held against: {args.scales}: give two")
    smaller = [str(side) for side in scales if side < max(scales)]
    if args.view is not None and args.view not in smaller:
        raise ValueError(f"unknown view: {args.view!r}: use one of {', '.join(smaller)}")
    with output_folder(args) as folder:
        loaded = load(args, args.weights or "DEFAULT")
        cuts = _find_cuts(loaded, max(scales))
        _check_layers(loaded.model, args.layers, cuts)
        images = _images(args.data)
        if not args.quiet:
            print(f"{loaded.name}: probing at {', '.join(map(str, scales))} px", flush=True)
        report = probe(
            loaded.model,
            images,
            scales,
            layers=args.layers,
            resize=args.resize,
            antialias=not args.no_antialias,
            **_norm(args, loaded),
            batch_size=args.batch_size,
            n_images=args.images,
            seed=args.seed,
            device=args.device or ("cuda" if torch.cuda.is_available() else None),
            workers=args.workers,
            skip_bad=args.skip_bad,
            out=folder,
            resume=args.resume,
            progress=not args.quiet,
        )
        report = _described(report, {"model": _about(loaded, args)})
        choice = _choose(args, report, loaded, cuts, scales)
        report.save(folder / REPORT)
        _write(choice, folder)
    left_out(report)
    _tell(choice, loaded)
    print(f"wrote {folder}/: {REPORT}, {JSON}, {PICTURE}")


def _find_cuts(loaded: LoadedModel, side: int | None) -> list[Cut]:
    return find_cuts(loaded.model, example_images(loaded.model, side or loaded.input_size))


def _choose(
    args: argparse.Namespace, report: Report, loaded: LoadedModel, cuts: list[Cut], sides: list[int]
) -> SplitChoice:
    return suggest_split(
        report,
        cuts,
        rule=args.rule,
        view=args.view,
        delta=args.delta,
        growth=args.growth,
        costs=subnet_costs(loaded.model, cuts, sides) if sides else None,
    )


def _check_network(report: Report, loaded: LoadedModel, *, weights_given: bool) -> None:
    """A report of another network is refused: by its name, its layers or, if given, its weights."""
    name = (report.meta.get("model") or {}).get("name", loaded.name)
    if name != loaded.name:
        raise ValueError(f"a report of another network: {name}, not {loaded.name}: give --model "
                         f"{name}, or its own report")  # fmt: skip
    modules, names = module_paths(loaded.model)
    told = report.meta.get("layers") or {}
    for label in report.layers:
        path = re.sub(r"(:[^:#]+)?(#[0-9]+)?$", "", label)
        path = "" if path == ROOT else path
        if path not in names:
            way_out = f"give the --model that it was made with, not {loaded.name}"
            raise ValueError(f"a report of another network: no layer {label!r}: {way_out}")
        here = sum(p.numel() for p in modules[names[path]].parameters())
        there = told.get(label, {}).get("parameters", here)
        if here != there:
            raise ValueError(
                f"a report of another network: layer {label!r} had {there:,} parameters and has "
                f"{here:,} in {loaded.name}: give the --model and --model-arg it was made with"
            )
    views = (report.meta.get("run") or {}).get("views") or {}
    shas = {view["model"] for view in views.values()}
    if weights_given and shas and model_sha256(loaded.model) not in shas:
        raise ValueError(f"a report of other weights: not {loaded.weights}: leave out --weights, "
                         "or give the file it was made with")  # fmt: skip


def _check_layers(model: nn.Module, layers: list[str] | None, cuts: list[Cut]) -> None:
    """Before any forward: some of the layers to tap must be cuts."""
    paths = {selection.path for selection in select_layers(model, layers)}
    if not paths & {name for cut in cuts for name in cut.names}:
        few = ", ".join(repr(cut.name) for cut in cuts[:4])
        raise ValueError(f"none of these layers is a cut: {len(paths)} layers: give --layers such "
                         f"as {few}")  # fmt: skip


def _write(choice: SplitChoice, folder: Path) -> None:
    """Both files, or neither of them new."""
    present = [name for name in (JSON, PICTURE) if (folder / name).exists()]
    try:
        with backend():
            save_figure(split_curve(choice), folder / PICTURE)
        choice.save(folder / JSON)
    except BaseException:
        for name in {JSON, PICTURE} - set(present):
            (folder / name).unlink(missing_ok=True)
        raise


def _tell(choice: SplitChoice, loaded: LoadedModel) -> None:
    """Print the choice."""
    print(f"\n{loaded.name}: {choice.headline}")
    print(choice.why)
    print(choice.rivalry)
    if choice.layer is not None:
        print(_cost(choice, loaded))
    print()
    print(_table(choice.ranking).to_string(index=False))
    print()


def _cost(choice: SplitChoice, loaded: LoadedModel) -> str:
    row = choice.ranking.iloc[0]
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    share = f"{row['parameters'] / max(total, 1):.1%}"
    gmacs = [f"{_number(row[c], '.3g')} at {c[6:]} px" for c in _sides(choice.ranking)]
    return (
        f"Up to {choice.layer}: {row['parameters']:,.0f} parameters ({share}), which every scale "
        "with a subnet of its own has again; GMACs of the subnets that preset 'lean' makes: "
        f"{', '.join(gmacs)}."
    )


def _table(ranking: pd.DataFrame) -> pd.DataFrame:
    """The ranking as text, rounded."""
    columns = {"cut after": ranking["layer"].tolist()}
    columns |= {
        name: [_number(value, ".3f") for value in ranking[name]]
        for name in ("cka", "low", "high", "score")
    }
    columns["apart"] = [_number(abs(value), ".1f") for value in ranking["apart"]]
    columns["map"] = [
        f"{channels:.0f} x {grid}" if grid else "-"
        for channels, grid in zip(ranking["channels"], ranking["grid"], strict=True)
    ]
    columns["parameters"] = [f"{value:,.0f}" for value in ranking["parameters"]]
    columns |= {
        f"GMACs {name[6:]}": [_number(value, ".3g") for value in ranking[name]]
        for name in _sides(ranking)
    }
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def _sides(ranking: pd.DataFrame) -> list[str]:
    return [str(name) for name in ranking.columns if str(name).startswith("gmacs_")]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
