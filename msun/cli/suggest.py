"""`msun suggest`: a cut with its reasons, from a saved report or from a new probe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cka_probe.cli.options import add_probe_input, data_source, network_meta, pixel_constants
from cka_probe.cli.output import (
    REPORT,
    announcer,
    file_backend,
    output_folder,
    print_left_out,
    staged,
)
from msun.cli.options import add_model, load

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from cka_probe.models.load import LoadedModel
    from cka_probe.report import Report
    from msun.cutting.cuts import Cut
    from msun.splitting.choice import SplitChoice

__all__ = ["add", "execute"]

JSON, PICTURE = "split.json", "split.png"


def add(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "suggest",
        help="where to cut: how many layers each scale should have of its own",
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
    word("--rule", default="affordable", metavar="R", help="affordable (default: the deepest cut "
         "within --growth), recovery or largest_recovery")  # fmt: skip
    word("--view", metavar="V", help="the view whose curve is read; default: the smallest scale")
    word("--delta", type=float, default=0.05, metavar="D", help="CKA counts as recovered when it "
         "is this near to its later maximum (default 0.05)")  # fmt: skip
    word("--growth", type=float, default=1.0, metavar="G",
         help="subnets must add less than this share of the parameters before the network's last "
         "cut, for --rule affordable (default 1)")  # fmt: skip
    word("--out", metavar="DIR", help="folder for split.json and split.png")
    group = parser.add_argument_group("to probe first")
    group.add_argument("--scales", metavar="32,64,224",
                       help="sides in pixels, the largest is the reference")  # fmt: skip
    group.add_argument("--resize", default="restore", metavar="restore|native",
                       help="restore (default) resizes to s and back; native: s x s")  # fmt: skip
    group.add_argument("--no-antialias", action="store_true", help="resize without antialiasing")
    add_probe_input(group, required=False)
    parser.set_defaults(call=execute)


def execute(args: argparse.Namespace) -> None:
    """Suggest a cut from the report, or from a probe where there is none."""
    from msun.splitting.suggest import check_options

    check_options(args.rule, delta=args.delta, growth=args.growth)
    if args.report is not None:
        if args.data is not None or args.scales is not None:
            hint = "give one of them"
            raise ValueError(f"a report and something to probe: {args.report}: {hint}")
        _from_report(args)
        return
    absent = [f"--{name}" for name in ("data", "scales", "out") if vars(args)[name] is None]
    if absent:
        raise ValueError(
            f"nothing to suggest from: no report, nor {' and '.join(absent)}: give a report.npz, "
            "or --data, --scales and --out to probe"
        )
    _from_probe(args)


def _from_report(args: argparse.Namespace) -> None:
    from cka_probe.report import Report

    report = Report.load(args.report)
    loaded = load(args, args.weights or "none")
    _check_network(report, loaded, weights_given=args.weights is not None)
    sides = sorted(int(view) for view in report.views if view.isdecimal())
    reference = int(report.reference) if report.reference.isdecimal() else None
    cuts = _find_cuts(loaded, reference)
    choice = _choose(args, report, loaded, cuts, sides)
    if args.out is None:
        _print_choice(choice, loaded)
        return
    outputs = (JSON, PICTURE)
    with (
        output_folder(args.out, outputs, overwrite=args.overwrite) as folder,
        staged(folder) as temporary,
    ):
        _write(choice, temporary)
    _print_choice(choice, loaded)
    print(f"wrote {folder}/: {JSON}, {PICTURE}")


def _from_probe(args: argparse.Namespace) -> None:
    import torch

    from cka_probe.inputs.views import parse_scales
    from cka_probe.probing.options import ProbeOptions
    from cka_probe.probing.run import Run

    scales = parse_scales(args.scales)
    if len(scales) < 2:
        raise ValueError(f"one scale has nothing to be compared with: {args.scales}: give two")
    smaller = [str(side) for side in scales if side < max(scales)]
    if args.view is not None and args.view not in smaller:
        raise ValueError(f"unknown view: {args.view!r}: use one of {', '.join(smaller)}")
    outputs = (REPORT, JSON, PICTURE)
    with output_folder(args.out, outputs, overwrite=args.overwrite, resume=args.resume) as folder:
        loaded = load(args, args.weights or "DEFAULT")
        cuts = _find_cuts(loaded, max(scales))
        _check_layers(loaded.model, args.layers, cuts)
        options = ProbeOptions(
            scales=scales,
            layers=args.layers,
            resize=args.resize,
            antialias=not args.no_antialias,
            **pixel_constants(args, loaded),
            batch_size=args.batch_size,
            n_images=args.images,
            seed=args.seed,
            device=args.device or ("cuda" if torch.cuda.is_available() else None),
            workers=args.workers,
            skip_bad=args.skip_bad,
            out=folder,
            resume=args.resume,
        )
        say = None if args.quiet else announcer(loaded.name)
        probe_run = Run(loaded.model, data_source(args.data), options, say=say)
        report = probe_run.report(progress=not args.quiet)
        meta = {**report.meta, "model": network_meta(loaded, args)}
        report = dataclasses.replace(report, meta=meta)
        choice = _choose(args, report, loaded, cuts, scales)
        with staged(folder) as temporary:
            report.save(temporary / REPORT)
            _write(choice, temporary)
    print_left_out(report, "msun")
    _print_choice(choice, loaded)
    print(f"wrote {folder}/: {', '.join(outputs)}")


def _find_cuts(loaded: LoadedModel, side: int | None) -> list[Cut]:
    from msun.cutting.cuts import example_images, find_cuts

    return find_cuts(loaded.model, example_images(loaded.model, side or loaded.input_size))


def _choose(
    args: argparse.Namespace, report: Report, loaded: LoadedModel, cuts: list[Cut], sides: list[int]
) -> SplitChoice:
    from msun.network.costs import subnet_costs
    from msun.splitting.suggest import suggest_split

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
    """Refuse a report of another network: by its name, its layers or, if given, its weights."""
    from cka_probe.activations.layers import ROOT, module_paths
    from cka_probe.provenance import model_sha256

    name = (report.meta.get("model") or {}).get("name", loaded.name)
    if name != loaded.name:
        raise ValueError(f"a report of another network: {name}, not {loaded.name}: give --model "
                         f"{name}, or its own report")  # fmt: skip
    modules, names = module_paths(loaded.model)
    recorded = report.meta.get("layers") or {}
    for label in report.layers:
        # "layer1:out#2" is the third call of output "out" of the module layer1
        path = re.sub(r"(:[^:#]+)?(#[0-9]+)?$", "", label)
        path = "" if path == ROOT else path
        if path not in names:
            hint = f"give the --model that it was made with, not {loaded.name}"
            raise ValueError(f"a report of another network: no layer {label!r}: {hint}")
        here = sum(p.numel() for p in modules[names[path]].parameters())
        there = recorded.get(label, {}).get("parameters", here)
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
    from cka_probe.activations.layers import select_layers

    paths = {selection.path for selection in select_layers(model, layers)}
    if not paths & {name for cut in cuts for name in cut.names}:
        few = ", ".join(repr(cut.name) for cut in cuts[:4])
        raise ValueError(f"none of these layers is a cut: {len(paths)} layers: give --layers such "
                         f"as {few}")  # fmt: skip


def _write(choice: SplitChoice, folder: Path) -> None:
    from cka_probe.plot.figures import save_figure
    from msun.plot.split import split_curve

    with file_backend():
        save_figure(split_curve(choice), folder / PICTURE)
    choice.save(folder / JSON)


def _print_choice(choice: SplitChoice, loaded: LoadedModel) -> None:
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
    gmacs = [f"{_number(row[c], '.3g')} at {_side(c)} px" for c in _sides(choice.ranking)]
    return (
        f"Up to {choice.layer}: {row['parameters']:,.0f} parameters ({share}), which every scale "
        "with a subnet of its own has again; GMACs of the subnets that preset 'lean' makes: "
        f"{', '.join(gmacs)}."
    )


def _table(ranking: pd.DataFrame) -> pd.DataFrame:
    """The ranking as text, rounded."""
    import pandas as pd

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
        f"GMACs {_side(name)}": [_number(value, ".3g") for value in ranking[name]]
        for name in _sides(ranking)
    }
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def _sides(ranking: pd.DataFrame) -> list[str]:
    return [str(name) for name in ranking.columns if str(name).startswith("gmacs_")]


def _side(column: str) -> str:
    """The side in pixels of a column such as gmacs_64."""
    return column.removeprefix("gmacs_")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
