"""A model by name and its weights -> a network in eval mode, ready for images.

Names: "resnet18" (torchvision), "timm:mobilenetv2_100", "net.py:make" (a callable in a file),
"glyphnet" (the embedded one).
"""

import ast
import contextlib
import difflib
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cka_probe.errors import one_line
from cka_probe.models.embedded import glyphnet
from cka_probe.models.preprocessing import IMAGENET, for_channels, input_channels
from cka_probe.models.weights import OTHER_MODEL, check_finite, fit, read_weights
from cka_probe.rng import preserved_rng

__all__ = ["LoadedModel", "load_model", "parse_model_args"]

EMBEDDED = "glyphnet"
_Built = tuple[nn.Module, str, str, Mapping[str, Any], str]  # network, name, tag, cfg, its origin
_OTHER_WEIGHTS = "give --weights FILE, or none for random ones"
_SPECS = "give a torchvision name, timm:NAME, glyphnet or path/to/file.py:callable"


@dataclass(frozen=True)
class LoadedModel:
    """A network with what its images need and where its weights come from.

    Attributes:
        model: In eval mode, on the CPU.
        name: "resnet18", "timm:mobilenetv2_100", "glyphnet" or "net.py:make"; no folder.
        mean: Channel means that its images are normalised with, for RGB in 0..1.
        std: Channel standard deviations.
        preprocessing: Where mean and std come from: "torchvision weights", "timm cfg",
            "weights file" (its safetensors metadata), "the embedded images" or "ImageNet".
        input_size: Side in pixels of the images it was made for; None where that is unknown.
        weights: "DEFAULT:IMAGENET1K_V1", "DEFAULT:as built", "none" or a file's base name.
        sha256: Of the weights file; None without one.
        classes: number of outputs of a classifier that replaced the loaded one; None if none did.
    """

    model: nn.Module
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: str
    input_size: int | None
    weights: str
    sha256: str | None
    classes: int | None = None


def load_model(
    spec: str,
    weights: str | Path = "DEFAULT",
    *,
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Build a network and load its weights.

    Random weights are those that `torch.manual_seed(seed)` would give; the global random state is
    left as it was. A callable in a file that loads weights by itself does so under "none" too.

    Args:
        spec: A torchvision name, "timm:NAME", "glyphnet", or "path/to/file.py:callable", which can
            import from its folder.
        weights: "DEFAULT" (torchvision's and timm's own; a callable's as it built them), "none"
            (random), or a file: .safetensors, or anything that `torch.load` reads with
            `weights_only`: a state dict, or one under "state_dict", "model", "model_state_dict".
        model_args: Keywords for the builder.
        seed: Of random weights, also of those that the file or the defaults do not cover.

    Returns:
        The network in eval mode.

    Raises:
        TypeError: A callable that does not return an `nn.Module`.
        ValueError: Unknown model, bad arguments, weights that cannot be had, read or fitted, or
            that hold NaN or infinity.
    """
    kind, args = str(weights), dict(model_args or {})
    with _quiet(), preserved_rng():
        file = None if kind in ("DEFAULT", "none") else read_weights(Path(kind).expanduser())
        torch.default_generator.manual_seed(seed)
        if spec.startswith("timm:"):
            model, name, tag, cfg, origin = _from_timm(spec, kind == "DEFAULT", args)
        elif spec == EMBEDDED:
            model, name, tag, cfg, origin = _embedded(kind == "DEFAULT", args)
        elif spec.rpartition(":")[0].endswith(".py"):
            model, name, tag, cfg, origin = _from_file(spec, args)
        else:
            model, name, tag, cfg, origin = _from_torchvision(spec, kind == "DEFAULT", args)
    if file is not None:
        fit(model, file, name)
        cfg, origin = ({**cfg, **file.cfg}, "weights file") if file.cfg else (cfg, origin)
    loaded = file.name if file is not None else "none" if kind == "none" else tag
    check_finite(model, f"{name} with {loaded}")
    sides = tuple(cfg.get("input_size") or cfg.get("crop_size") or ())[-2:]
    used = for_channels({**IMAGENET, **cfg}, input_channels(model))
    return LoadedModel(
        model=model.eval(),
        name=name,
        mean=tuple(float(value) for value in used["mean"]),
        std=tuple(float(value) for value in used["std"]),
        preprocessing=origin if "mean" in cfg else "ImageNet",
        input_size=int(sides[-1]) if sides and sides[0] == sides[-1] else None,
        weights=loaded,
        sha256=None if file is None else file.sha256,
    )


def parse_model_args(pairs: Iterable[str]) -> dict[str, Any]:
    """Read KEY=VALUE words of a command line.

    Args:
        pairs: ["pad_type=same", "channel_multiplier=0.25"]; a value that is no literal is text.

    Returns:
        {"pad_type": "same", "channel_multiplier": 0.25}.

    Raises:
        ValueError: No "=", a key that is no name, or a key given twice.
    """
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier() or key in args:
            raise ValueError(f"bad model argument: {pair!r}: write KEY=VALUE, each KEY once")
        try:
            args[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            args[key] = text
    return args


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Builders warn of their own future and hubs of every retry; the one error is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _from_torchvision(name: str, default: bool, args: dict[str, Any]) -> _Built:
    """Any of torchvision's names; its default weights tell the preprocessing either way."""
    from torchvision import models as torchvision_models  # seconds: only where a name needs it

    try:
        build = torchvision_models.get_model_builder(name)
    except ValueError as error:
        raise _unknown(name) from error
    chosen = torchvision_models.get_model_weights(name).DEFAULT
    args.setdefault("weights", chosen if default else None)
    if not default and "weights_backbone" in inspect.signature(build).parameters:
        args.setdefault("weights_backbone", None)
    model = _build(build, args, name, default)
    transform = chosen.transforms()  # without a mean: the network normalises by itself
    cfg = {"mean": (0, 0, 0), "std": (1, 1, 1), **vars(transform)}
    return model, name.lower(), f"DEFAULT:{chosen.name}", cfg, "torchvision weights"


def _from_timm(spec: str, default: bool, args: dict[str, Any]) -> _Built:
    """Any of timm's names, with or without a tag."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm is not installed: {spec!r}: pip install timm") from error
    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        raise _unknown(spec)
    args = {"pretrained": default, **args}
    model = _build(lambda **kw: timm.create_model(name, **kw), args, spec, default)
    cfg = _timm_cfg(model)
    return model, spec, f"DEFAULT:{cfg.get('tag') or 'pretrained'}", cfg, "timm cfg"


def _embedded(default: bool, args: dict[str, Any]) -> _Built:
    """The network that this project trained on the glyphs, which are normalised as they come."""
    model = _build(glyphnet, {"trained": default, **args}, EMBEDDED, default)
    cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 64, 64)}
    return model, EMBEDDED, "DEFAULT:the package's own", cfg, "the embedded images"


def _timm_cfg(model: nn.Module) -> Mapping[str, Any]:
    """The configuration that timm hangs on its networks; empty for others."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) and {"mean", "std"} <= cfg.keys() else {}


def _from_file(spec: str, args: dict[str, Any]) -> _Built:
    """A callable of a Python file, or a network that stands there by name."""
    where, _, attribute = spec.rpartition(":")
    path = Path(where).expanduser().absolute()
    short = f"{path.name}:{attribute}"
    if not path.is_file():
        raise ValueError(f"no such model file: {where!r}: {_SPECS}")
    module = types.ModuleType(f"_model_{len(sys.modules)}_{path.stem}")
    module.__file__ = str(path)
    with _importable(path.parent):
        sys.modules[module.__name__] = module  # dataclasses and pickle look classes up there
        try:
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[module.__name__]
            text = f"cannot import model file: {path.name!r}: {one_line(error)}; run it in Python"
            raise ValueError(text) from error
        make = vars(module).get(attribute)
        if not callable(make):
            known = [key for key, value in vars(module).items() if _makes(value, module)]
            near = difflib.get_close_matches(attribute, known, 3, 0.5) or known[:5] or ["nothing"]
            raise ValueError(f"no such callable in the file: {short!r}: it has {', '.join(near)}")
        model = make if isinstance(make, nn.Module) else _build(make, args, short, False)
    return model, short, "DEFAULT:as built", _timm_cfg(model), "timm cfg"


def _makes(value: Any, module: types.ModuleType) -> bool:
    """Whether it may make a network, or is one: defined in the file, not imported into it."""
    if isinstance(value, nn.Module):
        return True
    own = getattr(value, "__module__", "") == module.__name__
    makes = inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, nn.Module))
    return own and makes


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put the folder first on the import path, for the length of the `with`.

    Its modules are then removed from sys.modules, so that another file of the same name can load.
    """
    before, paths = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
                del sys.modules[name]


def _build(make: Callable[..., Any], args: dict[str, Any], name: str, default: bool) -> nn.Module:
    """Call a builder; what goes wrong is the arguments or, with default weights, getting them."""
    try:
        model = make(**args)
    except (Exception, SystemExit) as error:
        if default and not isinstance(error, TypeError):
            text = f"cannot get the default weights: {name!r}: {one_line(error)}; {_OTHER_WEIGHTS}"
        else:
            text = f"cannot build the model: {name!r}: {one_line(error)}; {OTHER_MODEL}"
        raise ValueError(text) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"no network: {name!r} gave {type(model).__name__}: return an nn.Module")
    return model


def _unknown(spec: str) -> ValueError:
    """The error for a name that nobody knows, with near ones."""
    from torchvision import models as torchvision_models  # seconds: only where a name needs it

    known = [] if spec.startswith("timm:") else list(torchvision_models.list_models())
    with contextlib.suppress(ImportError):
        import timm

        known += [f"timm:{name}" for name in timm.list_models()]
    near = [f"timm:{spec}"] if f"timm:{spec}" in known else difflib.get_close_matches(spec, known)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else _SPECS
    return ValueError(f"unknown model: {spec!r}: {hint}")
