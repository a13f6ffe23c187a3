"""What each command does, once its words are read."""

import argparse
import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cka_probe.activations.hooks import Collector
from cka_probe.activations.layers import default_layers
from cka_probe.cli.output import backend, left_out, output_folder, table, write, wrote
from cka_probe.distributed.ranks import own_device
from cka_probe.engine.memory import readable
from cka_probe.engine.sketch import choose_size
from cka_probe.errors import one_line
from cka_probe.inputs import glyphs
from cka_probe.inputs.batches import open_images
from cka_probe.inputs.scales import parse_scales
from cka_probe.inputs.source import FEW, MIN_IMAGES, Named
from cka_probe.inputs.views import scale_transforms
from cka_probe.models.glyphnet import glyphnet
from cka_probe.models.load import LoadedModel, load_model, parse_model_args
from cka_probe.plot import figures as plots
from cka_probe.probing.api import probe
from cka_probe.probing.choose import AUTO
from cka_probe.probing.forecast import estimate
from cka_probe.report import Report
from cka_probe.summary import describe

DEMO_SIDES = (8, 12, 16, 24, 32, 48, 64)
KINDS = ("heatmap", "curve", "grid")


def version_line() -> str:
    """The version of the distribution."""
    try:
        return f"cka-probe {version('cka-probe')}"
    except PackageNotFoundError:
        return "cka-probe (source tree)"


def run(args: argparse.Namespace) -> None:
    """`cka-probe run`."""
    scales = parse_scales(args.scales)
    with output_folder(args) as folder:
        model = _model(args, args.model, args.weights)
        images = _source(args.data)
        norm = _norm(args, model)
        if talks(args):
            reference = int(args.reference) if str(args.reference).isdecimal() else max(scales)
            sides = scales if reference in scales else [*scales, reference]
            shapes = {
                str(s): (3, *[s if args.resize == "native" else reference] * 2) for s in sides
            }
            _announce(args, dict.fromkeys(shapes, model.model), shapes, images, model.name)
        report = probe(
            model.model,
            images,
            scales,
            reference=args.reference,
            resize=args.resize,
            antialias=not args.no_antialias,
            **norm,
            **_options(args, folder),
        )
        report = _described(report, {"model": _about(model, args)})
        if args.ranks.first:
            write(report, folder, ("heatmap", "curve"))
            left_out(report)
    if talks(args):
        table(report)
        print(describe(report))
        wrote(folder, ("heatmap", "curve"))


def demo(args: argparse.Namespace) -> None:
    """`cka-probe demo`: the embedded network on the embedded images."""
    if args.images < MIN_IMAGES:
        raise ValueError(f"too few images: {args.images}: {FEW}")
    with output_folder(args) as folder:
        sides = ", ".join(map(str, DEMO_SIDES))
        if args.ranks.first:
            _say(
                f"a small residual network, trained on characters of 64 px, and {args.images} new "
                f"ones at {sides} px"
            )
        report = probe(
            glyphnet(),
            _glyphs(args.images),
            DEMO_SIDES,
            seed=args.seed,
            ranks=args.ranks,
        )
        about = {"model": {"name": "cka_probe.models.glyphnet", "weights": "the package's own"}}
        if not args.ranks.first:
            return
        write(_described(report, about), folder, ("heatmap", "curve"))
    table(report)
    print(describe(report))
    wrote(folder, ("heatmap", "curve"))


def compare(args: argparse.Namespace) -> None:
    """`cka-probe compare`."""
    names = [*args.model, *args.model] if len(args.model) == 1 else args.model
    weights = args.weights or ["DEFAULT"]
    weights = [*weights, *weights] if len(weights) == 1 else weights
    if len(names) != 2 or len(weights) != 2:
        raise ValueError(
            f"compare takes two networks: {len(args.model)} --model, {len(weights)} --weights: "
            "give --model A --model B, with one --weights for both or one each"
        )
    with output_folder(args) as folder:
        loaded = {
            view: _model(args, name, file)
            for view, name, file in zip("ab", names, weights, strict=True)
        }
        images = _source(args.data)
        views = {
            view: (one.model, scale_transforms([args.size], **_norm(args, one))[str(args.size)])
            for view, one in loaded.items()
        }
        shapes = dict.fromkeys(views, (3, args.size, args.size))
        if talks(args):
            ghosts = {view: one.model for view, one in loaded.items()}
            _announce(
                args, ghosts, shapes, images, " and ".join(one.name for one in loaded.values())
            )
        report = probe(None, images, views=views, **_options(args, folder))
        about = {f"model {view!r}": _about(one, args) for view, one in loaded.items()}
        report = _described(report, about)
        if args.ranks.first:
            write(report, folder, ("grid",))
            left_out(report)
    if talks(args):
        print(report.between("a", "b").round(3).to_string())
        wrote(folder, ("grid",))


def layers(args: argparse.Namespace) -> None:
    """`cka-probe layers`."""
    loaded = load_model(args.model, "none", model_args=parse_model_args(args.model_arg))
    side = args.size or loaded.input_size or 224
    own = set(default_layers(loaded.model))
    with Collector(loaded.model, lambda name, module: bool(name)) as collector:
        try:
            collector.run(torch.zeros(2, 3, side, side), lambda tap, x: None)
        except Exception as error:
            raise ValueError(
                f"the network cannot take {side} px: {one_line(error)}: give another --size"
            ) from error
    modules = dict(loaded.model.named_modules(remove_duplicate=False))
    rows = [("", "layer", "type", "output per image", "parameters")]
    for tap, label in collector.labels.items():
        module = modules[tap.path]
        shape = " x ".join(map(str, collector.shapes[tap]))
        count = sum(p.numel() for p in module.parameters())
        star = "*" if tap.path in own else ""
        rows.append((star, label, type(module).__name__, shape, f"{count:,}"))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    for path, why in collector.skipped.items():
        print(f"cannot be tapped: {path}: {why}")
    if collector.unreached:
        print(f"never reached: {', '.join(collector.unreached)}")
    print(f"\n{loaded.name} at {side} px; * is tapped by default")


def plot(args: argparse.Namespace) -> None:
    """`cka-probe plot`."""
    if args.kind not in KINDS:
        raise ValueError(f"unknown kind of picture: {args.kind!r}: choose {', '.join(KINDS)}")
    report = Report.load(args.report)
    with backend():
        if args.kind == "grid":
            ax = plots.grid(report, args.view, args.against)
        else:
            ax = (plots.heatmap if args.kind == "heatmap" else plots.curve)(report, args.view)
        plots.save_figure(ax, args.out)
    print(f"wrote {args.out}")


def _model(args: argparse.Namespace, spec: str, weights: str) -> LoadedModel:
    return load_model(spec, weights, model_args=parse_model_args(args.model_arg), seed=args.seed)


def _glyphs(n: int) -> Named:
    """Embedded images, with a name that says which."""
    return Named(
        f"cka_probe.inputs.glyphs, split test, seed 0, first {n}", glyphs.tensor("test", n, 0)[0]
    )


def _source(data: str) -> Any:
    """What is probed: a folder, or the embedded glyphs where there is no folder of that name."""
    return _glyphs(2000) if data == "glyphs" and not Path(data).exists() else Path(data)


def _images(data: str) -> Any:
    """The folder, or the embedded glyphs where there is no folder of that name."""
    if data == "glyphs" and not Path(data).exists():
        return glyphs.tensor("test", 2000, 0)[0]
    return Path(data)


def _norm(args: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """Mean and std for pixels: as given, else the weights' own; the glyphs are normalised."""
    if args.mean is None and args.std is None:
        embedded = args.data == "glyphs" and not Path("glyphs").exists()
        return {} if embedded else {"mean": model.mean, "std": model.std}
    return {"mean": _numbers("--mean", args.mean), "std": _numbers("--std", args.std)}


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        way_out = "give numbers such as 0.5,0.5,0.5"
        raise ValueError(f"{name} is no list of numbers: {text!r}: {way_out}") from None


def device_of(args: argparse.Namespace) -> torch.device:
    """Where this process computes: what was asked for, else CUDA where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return own_device(torch.device(getattr(args, "device", None) or default))
    except RuntimeError as error:
        raise ValueError(
            f"unknown device: {args.device!r}, {one_line(error)}: leave --device out"
        ) from None


def _options(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `run` and `compare` pass to `probe` alike."""
    device = device_of(args) if args.device or torch.cuda.is_available() else None
    return {
        "layers": args.layers,
        "kernel": args.kernel,
        "bandwidth": args.bandwidth,
        "reduce": args.reduce,
        "estimator": args.estimator,
        "memory": args.memory,
        "sketch_size": args.sketch,
        "precision": args.precision,
        "n_images": args.images,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "device": device,
        "amp": args.amp,
        "workers": args.workers,
        "skip_bad": args.skip_bad,
        "resume": args.resume,
        "ranks": args.ranks,
        "out": folder,
        "progress": not args.quiet,
        "say": None if args.quiet or not args.ranks.first else _say,
    }


def talks(args: argparse.Namespace) -> bool:
    """Whether this process says what it does."""
    return bool(args.ranks.first) and not args.quiet


def _say(text: str) -> None:
    print(text, flush=True)


def _announce(
    args: argparse.Namespace,
    models: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    images: Any,
    name: str,
) -> None:
    """Before the start: what will be done, and roughly what it takes."""
    source = open_images(images, n_images=args.images, seed=args.seed)
    n = len(source)
    print(f"{name}: {n} images of {source.name}, views {', '.join(shapes)}", flush=True)
    cost = estimate(
        models,
        shapes,
        n_images=n,
        batch_size=args.batch_size,
        layers=args.layers,
        reduce=args.reduce,
        estimator=args.estimator,
        sketch_size=choose_size(args.sketch, args.precision),
    )
    if cost is None:
        print("no estimate: the network cannot be called without data", flush=True)
        return
    minutes = f"{cost.seconds / 60:.0f} min" if cost.seconds > 90 else f"{cost.seconds:.0f} s"
    memory = "" if args.estimator == AUTO else f", {readable(cost.memory)} of memory"
    print(
        f"estimate: {cost.gmacs:.2f} GMACs an image, {cost.entries} layers x views, about "
        f"{minutes} on this CPU (within a factor of three){memory}",
        flush=True,
    )


def _about(model: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    about = {"name": model.name, "weights": model.weights, "mean": model.mean, "std": model.std}
    about |= {"sha256": model.sha256} if model.sha256 else {}
    return about | ({"args": parse_model_args(args.model_arg)} if args.model_arg else {})


def _described(report: Report, about: dict[str, Any]) -> Report:
    return dataclasses.replace(report, meta={**report.meta, **about})
