"""Layer selection: by name, glob, pattern, type or callable; by default the network's blocks."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

__all__ = [
    "ROOT",
    "Selection",
    "default_layers",
    "module_paths",
    "select_layers",
    "unwrap",
]

ROOT = "(model)"  # how the network itself, whose path is "", is written and labelled
# With fewer blocks than this, blocks of blocks (stages, encoders) are walked into: a curve over
# fewer than 6 layers hardly shows where a network changes.
FEW = 6
# The names that the common libraries give to what stands after the blocks (torchvision: fc,
# classifier, avgpool; timm: head, head_dist, global_pool; others: logits, last_linear, gap).
HEADS = re.compile(r"(?i)fc|heads?|head_dist|classif\w*|logits?|last_linear|gap|(avg|global)_?pool")
# Side branches and position tables: they are no step on the way from the input to the logits.
PASSED = re.compile(r"(?i)aux\w*|pre_logits|(rel_)?pos_?(emb|enc)\w*|rope\w*")  # whatever is in it
STOPS = re.compile("Adaptive|Global|Flatten")  # these types end a segment

One: TypeAlias = "str | Selection | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]"
Layers: TypeAlias = "One | Iterable[One] | None"


class Selection(NamedTuple):
    """A module to tap, and which of its outputs: None stands for all fields, all calls."""

    path: str
    field: str | None = None
    call: int | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel or torch.compile.

    Raises:
        TypeError: not a module; or hooks would not fire: a TorchScript network, or a network of
            which a part is one of these wrappers or was compiled in place.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        raise TypeError(f"no network: {type(model).__name__}: give an nn.Module")
    if _is_exported(model):
        raise TypeError(
            f"hooks do not fire in an exported graph: {type(model).__name__}, whose layers became "
            "operators: give the nn.Module that it was exported from"
        )
    for path, module in model.named_modules():
        scripted = module is model and isinstance(module, torch.jit.ScriptModule)
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if scripted or compiled or _wrapped(module) is not None:
            raise TypeError(
                f"hooks do not fire in this module: {path or ROOT!r}, a {type(module).__name__}: "
                "give the plain nn.Module, neither scripted, compiled nor wrapped"
            )
    return model


def _is_exported(model: nn.Module) -> bool:
    """Whether it comes from `torch.export`: a graph of operators, which calls no module."""
    if not isinstance(model, torch.fx.GraphModule):
        return False
    operators = any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    return operators and not called - {"_guards_fn"}


def _wrapped(module: nn.Module) -> nn.Module | None:
    inner: Any = None
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    elif type(module).__name__ == "OptimizedModule":  # torch.compile(model)
        inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def module_paths(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every module once, and every name that leads to one.

    Args:
        model: the network, as `unwrap` gives it.

    Returns:
        (modules, names): path -> module in registration order, a shared module under its first
        path only, "" the network itself; and any name -> that first path, so that the other
        names of a shared module are found. Left out: what is inside a TorchScript part, where
        no hook fires, and parametrizations, which put out weights.
    """
    modules = dict(model.named_modules())
    scripts = [f"{p}." for p, m in modules.items() if isinstance(m, torch.jit.ScriptModule)]
    weights = [f"{p}.parametrizations".strip(".") for p, m in modules.items() if is_parametrized(m)]
    hidden = (*scripts, *weights)
    first = {id(m): path for path, m in modules.items() if not path.startswith(hidden)}
    every = model.named_modules(remove_duplicate=False)
    names = {name: first[id(module)] for name, module in every if id(module) in first}
    return {path: modules[path] for path in first.values()}, names


def select_layers(model: nn.Module, layers: Layers = None) -> list[Selection]:
    """The modules that `layers` asks for.

    Args:
        model: the network.
        layers: one of these, or several in a list: a name; a glob, whose `*` crosses dots; "re:"
            and a pattern that matches the whole name; a module type; a module of the network; a
            callable (name, module) -> bool; None for `default_layers`. A name or glob may end in
            ":field" (index of a tuple, key of a dict, field of a dataclass; "a.b" for nested
            ones) or "#call" (0, 1, ... within one forward) or both, to keep just that output.
            Only the name "(model)", or "", selects the network itself.

    Returns:
        Selections in registration order, each module under its first path.

    Raises:
        ValueError: something matches nothing (the message lists near names), or the list is
            empty, or a pattern is not a regular expression.
        TypeError: something is none of the above.
    """
    model = unwrap(model)
    modules, names = module_paths(model)
    if layers is None:
        return [Selection(path) for path in default_layers(model)]
    several = isinstance(layers, Iterable) and not isinstance(
        layers, str | type | nn.Module | Selection
    )
    wanted: list[Any] = list(cast("Iterable[Any]", layers)) if several else [layers]
    if not wanted:
        raise ValueError("no layers: []: give names, globs, types, or None for the blocks")
    found = {selection for one in wanted for selection in _select(one, modules, names)}
    whole = {s.path for s in found if s == Selection(s.path)}
    kept = [s for s in found if s.path not in whole or s == Selection(s.path)]
    order = {path: place for place, path in enumerate(modules)}
    return sorted(kept, key=lambda s: (order[s.path], str(s.field), str(s.call)))


def _select(one: Any, modules: dict[str, nn.Module], names: dict[str, str]) -> list[Selection]:
    if isinstance(one, Selection):
        return [one]
    if isinstance(one, str):
        return _by_text(one, names)
    inner = {path: module for path, module in modules.items() if path}
    shown = getattr(one, "__name__", type(one).__name__)
    if isinstance(one, type) and issubclass(one, nn.Module):
        paths = [path for path, module in inner.items() if isinstance(module, one)]
    elif isinstance(one, nn.Module):
        paths = [path for path, module in modules.items() if module is one]
    elif callable(one) and not isinstance(one, type):
        paths = [path for path, module in inner.items() if one(path, module)]
    else:
        raise TypeError(f"no way to name a layer: {shown}: use a name, glob, type or callable")
    if not paths:
        kinds = ", ".join(sorted({type(module).__name__ for module in inner.values()})[:8])
        raise ValueError(f"no layer matches: {shown}: the network has modules of {kinds or 'none'}")
    return [Selection(path) for path in paths]


def _by_text(text: str, names: dict[str, str]) -> list[Selection]:
    if text in names:
        return [Selection(names[text])]
    suffixed = re.fullmatch(r"(.+?)(?::([^:#]+))?(?:#([0-9]+))?", text, re.DOTALL)
    name, field, call = suffixed.groups() if suffixed else (text, None, None)
    known = [other for other in names if other]
    if text.startswith("re:"):
        name, field, call = text, None, None
        try:
            matches = [other for other in known if re.fullmatch(text[3:], other)]
        except re.error as error:
            raise ValueError(f"bad pattern: {text!r}: {error}") from None
    elif name in names:
        matches = [name]
    elif name == ROOT:
        matches = [""]
    else:
        matches = [other for other in known if fnmatch.fnmatchcase(other, name)]
    if not matches:
        raise ValueError(f"unknown layer: {text!r}: {_near(text, known)}")
    number = None if call is None else int(call)
    return [Selection(names[match], field, number) for match in matches]


def _near(text: str, known: list[str]) -> str:
    close = difflib.get_close_matches(text.removeprefix("re:"), known, n=4, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    top = [name for name in known if "." not in name][:8]
    return f"the network has {', '.join(map(repr, top))}" if top else f"it has only {ROOT!r}"


def default_layers(model: nn.Module) -> list[str]:
    """The network's own blocks, read from its modules alone, without a forward.

    - A *leaf* has no convolution or linear layer inside it; a layer with weights of two axes and
      more (convolution, linear, LSTM) is one itself. Sequential, ModuleList and ModuleDict are
      walked into. Any other module with such layers inside is a *block* and is tapped: a
      residual block, Fire, Inception, a transformer layer. So is a Sequential of leaves around
      one weighted layer (convolution, norm, activation), and a subclass of Sequential of leaves.
    - Leaves outside blocks form *segments*: a weighted layer, or a norm with parameters, and
      the norms, activations and poolings registered after it up to the next weighted layer or
      block. The last of them is tapped: the stem's maxpool in ResNet, 13 layers in VGG-16, the
      norm after the last block. Other leaves between blocks are not.
    - While there are fewer than 6 blocks of two weighted layers or more, blocks that hold a
      list of two or more such blocks, or nothing but such blocks of one class, are walked into
      instead: the encoder of a vision transformer, the stages of ConvNeXt and RegNet, the
      backbone of DeepLab. A dense block (its own kind of ModuleDict, of one class) is not.
    - Left out: heads (children named fc, head, classifier, avgpool and the like that hold no
      convolution larger than 1x1; a bare linear layer at the very end), aux... and pos_embed...
    - timm networks: the modules of `feature_info` are added, save a stage that puts out just what
      its last block, tapped too, puts out.
    - Where all that gives nothing, heads count, then all leaves with parameters, then the
      network itself ("").

    The rule knows the order of registration, not of execution: leaves declared away from where
    they are used can end a segment that they do not belong to. Name layers where that matters.

    Args:
        model: the network; it may be on the meta device.

    Returns:
        Module paths in registration order, never empty.
    """
    model = unwrap(model)
    modules, names = module_paths(model)
    paths = {id(module): path for path, module in modules.items()}
    found = _blocks(model, paths, heads=False) or _blocks(model, paths, heads=True)
    if not found:
        found = {p for p, m in modules.items() if p and _is_leaf(m) and list(m.parameters())}
    stages = {names[name] for name in _feature_names(model) if name in names}
    found |= {path for path in stages if type(modules[path]) is not nn.ModuleList}  # never called
    return [p for p in modules if p in found and not _repeats(modules[p], paths, found)] or [""]


def _repeats(module: nn.Module, paths: dict[int, str], found: set[str]) -> bool:
    """Whether a stage puts out what its last block, tapped too, puts out."""
    while type(module).forward is nn.Sequential.forward and (children := [*module.children()]):
        module = children[-1]
        if paths[id(module)] in found:
            return True
    return False


class _Item(NamedTuple):
    """One step of the walk over the modules, in registration order."""

    path: str
    module: nn.Module
    kind: str  # "leaf", "block", or "head", which is passed by
    ordered: bool  # in a Sequential, where registration is execution


def _blocks(model: nn.Module, paths: dict[int, str], *, heads: bool) -> set[str]:
    opened = {id(model)}
    while True:
        items = list(_walk(model, paths, opened, heads))
        blocks = [item.module for item in items if item.kind == "block"]
        holders = {id(module) for module in blocks if _holds_blocks(module)}
        if sum(_is_rich(module) for module in blocks) >= FEW or not holders:
            return _taps(items)
        opened |= holders


def _walk(
    parent: nn.Module, paths: dict[int, str], opened: set[int], heads: bool
) -> Iterator[_Item]:
    for name, child in parent.named_children():
        path = paths.get(id(child), "")
        if path != f"{paths[id(parent)]}.{name}".removeprefix("."):
            continue  # shared: it stands under its first path
        if not heads and _is_head(name, child):
            yield _Item(path, child, "head", False)
        elif id(child) in opened or _is_walked(child):
            yield from _walk(child, paths, opened, heads)
        else:
            kind = "leaf" if _is_leaf(child) else "block"
            yield _Item(path, child, kind, isinstance(parent, nn.Sequential))


def _taps(items: list[_Item]) -> set[str]:
    segments: list[list[_Item]] = []  # a block, or the leaves of a segment
    is_open = False
    for item in items:
        if item.kind == "block":
            segments.append([item])
            is_open = False
        elif item.kind == "head" or STOPS.search(type(item.module).__name__):
            is_open = False
        elif isinstance(item.module, nn.Identity | nn.modules.dropout._DropoutNd):
            continue
        elif _is_weighted(item.module) or (not is_open and list(item.module.parameters())):
            segments.append([item])
            is_open = True
        elif is_open and (item.ordered or _follows(item.module)):
            segments[-1].append(item)
    if len(segments) > 1 and isinstance(segments[-1][-1].module, nn.Linear):
        segments.pop()
    return {segment[-1].path for segment in segments}


def _is_weighted(module: nn.Module) -> bool:
    """Whether it is a convolution, a linear layer or the like: own weights of two axes or more."""
    if isinstance(module, ParametrizationList) or "Norm" in type(module).__name__:
        return False
    own = module.parameters(recurse=is_parametrized(module))
    return any(is_lazy(p) or p.ndim >= 2 for p in own)


def _weighted_inside(module: nn.Module) -> int:
    return sum(_is_weighted(part) for part in module.modules())


def _is_leaf(module: nn.Module) -> bool:
    if is_parametrized(module) or isinstance(module, nn.MultiheadAttention):
        return True
    return not any(_is_weighted(part) for part in module.modules() if part is not module)


def _is_list(module: nn.Module) -> bool:
    """Whether it is Sequential, ModuleList or ModuleDict, or a subclass with the same forward."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(isinstance(module, k) and type(module).forward is k.forward for k in lists)


def _is_walked(module: nn.Module) -> bool:
    if not _is_list(module):
        return False
    if not isinstance(module, nn.Sequential) or not all(map(_is_leaf, module.children())):
        return True
    return _weighted_inside(module) != 1 and type(module) is nn.Sequential


def _is_rich(module: nn.Module) -> bool:
    return not _is_list(module) and _weighted_inside(module) >= 2


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a stage or an encoder: a list of rich blocks is in it, or all that it is."""
    for part in module.modules():
        children = list(part.children())
        rich = [type(child) for child in children if _is_rich(child)]
        alike = len(rich) == len(children) and len(set(rich)) == 1
        own = alike != isinstance(part, nn.ModuleDict)
        if len(rich) > 1 and (own or (_is_list(part) and part is not module)):
            return True
    return False


def _is_head(name: str, module: nn.Module) -> bool:
    if PASSED.fullmatch(name):
        return True
    convolutions = [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    small = all(max(convolution.kernel_size) == 1 for convolution in convolutions)
    return small and HEADS.fullmatch(name) is not None


def _follows(module: nn.Module) -> bool:
    """Whether a leaf that is not in a Sequential belongs to the weighted layer before it."""
    name, home = type(module).__name__, type(module).__module__
    return "Norm" in name or "Pool" in name or "activation" in home


def _feature_names(model: nn.Module) -> list[str]:
    info: Any = getattr(model, "feature_info", None)  # timm: a list of dicts, or FeatureInfo
    info = info.get_dicts() if hasattr(info, "get_dicts") else info
    rows = info if isinstance(info, list | tuple) else []
    return [str(row["module"]) for row in rows if isinstance(row, dict) and row.get("module")]
