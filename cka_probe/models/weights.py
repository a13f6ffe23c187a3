"""A weights file -> tensors that fit a network, without running code that the file may hold."""

import ast
import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cka_probe.io import dense

__all__ = ["OTHER_MODEL", "Checkpoint", "check_finite", "check_values", "fit", "read_weights"]

OTHER_MODEL = "check --model and --model-arg"
_NESTED = ("state_dict", "model", "model_state_dict")
# Types that state the number itself. Narrower floats (float8, float4) come with a scale elsewhere.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")  # DataParallel, torch.compile


class Checkpoint(NamedTuple):
    """What a weights file holds.

    Attributes:
        name: base name of the file.
        sha256: of its bytes.
        state: tensors by key, wrappers' prefixes taken off.
        cfg: the preprocessing that it states; empty where it states none.
    """

    name: str
    sha256: str
    state: dict[str, Tensor]
    cfg: dict[str, Any]


def read_weights(path: Path) -> Checkpoint:
    """Read a weights file without running what it may hold.

    Args:
        path: .safetensors, or anything that `torch.load` reads with `weights_only`: a state dict,
            or one under "state_dict", "model", "model_state_dict".

    Raises:
        ValueError: no such file, no checkpoint, one that holds more than tensors, or none.
    """
    if not path.is_file():
        raise ValueError(f"no such weights file: {str(path)!r}: give a file, DEFAULT or none")
    cfg: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                content: Any = {key: tensors.get_tensor(key) for key in list(tensors.keys())}
                cfg = _preprocessing(tensors.metadata() or {})
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, UnpicklingError, EOFError, RuntimeError, ...
        if objects := re.search(r"GLOBAL ([\w.]+)", str(error)):
            text = f"{path.name!r} needs {objects[1]}: save model.state_dict() alone"
            raise ValueError(f"checkpoint holds more than tensors: {text}") from error
        way = "give a .safetensors file or one saved with torch.save(model.state_dict(), ...)"
        raise ValueError(f"not a checkpoint: {path.name!r}: {way}") from error
    sha = hashlib.sha256(path.read_bytes())
    return Checkpoint(path.name, sha.hexdigest(), _state_dict(content, path.name), cfg)


def _preprocessing(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The mean and std that a safetensors file states, "(0.5, 0.5, 0.5)"; empty without both."""
    with contextlib.suppress(KeyError, ValueError, SyntaxError, TypeError):
        return {k: tuple(map(float, ast.literal_eval(metadata[k]))) for k in ("mean", "std")}
    return {}


def _state_dict(content: Any, name: str) -> dict[str, Tensor]:
    """Find the state dict in what a file held, and take wrappers' prefixes off its keys."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = dict(content) if isinstance(content, Mapping) else {}
    tensors = {key: x for key, x in state.items() if isinstance(key, str) and isinstance(x, Tensor)}
    if not tensors:
        held = ", ".join(repr(key) for key in list(state)[:5]) or type(content).__name__
        way = f"save a state dict, plain or under one of {', '.join(_NESTED)}"
        raise ValueError(f"no weights in the checkpoint: {name!r} holds {held}: {way}")
    if all(_WRAPPED.match(key) for key in tensors):
        return {_WRAPPED.sub("", key): x for key, x in tensors.items()}
    return tensors


def fit(model: nn.Module, file: Checkpoint, name: str) -> None:
    """Load a file's weights into a network.

    Args:
        model: the network; missing counts of batches are no fault.
        file: what was read.
        name: the network's, for the message.

    Raises:
        ValueError: missing or unexpected keys, or other shapes, with the first of each; tensors
            that hold codes or no numbers.
    """
    own = {key: x for key, x in model.state_dict().items() if isinstance(x, Tensor)}
    new, counted = file.state, ".num_batches_tracked"  # eval does not count, old files do not
    missing = [key for key in own if key not in new and not key.endswith(counted)]
    unexpected = [key for key in new if key not in own]
    other = [key for key in own if key in new and own[key].shape != new[key].shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
    faults = [f"{len(keys)} keys {what} ({keys[0]!r})" for what, keys in kinds if keys]
    if other:
        shapes = f"{tuple(new[other[0]].shape)} for {tuple(own[other[0]].shape)}"
        faults[-1] = f"{faults[-1][:-1]}, {shapes})"
    if faults:
        text = f"{file.name!r} for {name!r} has {', '.join(faults)}: {OTHER_MODEL}"
        raise ValueError(f"weights do not fit: {text}")
    check_values(own, new, repr(file.name))
    model.load_state_dict(new, strict=False)


def check_values(own: Mapping[str, Tensor], new: Mapping[str, Tensor], label: str) -> None:
    """Refuse tensors that are no values of the network's: torch would cast them without a word.

    Args:
        own: the network's tensors by key.
        new: those of a file, of the same shapes.
        label: how the message names the file.

    Raises:
        ValueError: the first tensor that is quantised, integer or of 8 bits where the network has
            floats, sparse, without data (meta), or complex for real.
    """
    faults = {key: _fault(x, new[key]) for key, x in own.items() if key in new}
    found = [key for key, fault in faults.items() if fault]
    if found:
        text = f"{found[0]!r} of {label} is {faults[found[0]]} ({len(found)} of {len(new)} tensors)"
        hint = "save the weights as dense floats, before they are quantised"
        raise ValueError(f"weights are no plain numbers: {text}: {hint}")


def _fault(own: Tensor, new: Tensor) -> str:
    """What keeps a tensor from being loaded as the network's own; empty where nothing does."""
    if new.is_quantized and not own.is_quantized:
        return f"quantised, {new.dtype}"
    if new.layout not in (torch.strided, own.layout):
        return f"sparse, {new.layout}"
    if new.is_meta:
        return "on the meta device, without data"
    if own.dtype in _FLOATS:
        return "" if new.dtype in _FLOATS else f"{new.dtype} for {own.dtype}"

    def kind(x: Tensor) -> tuple[bool, ...]:
        return x.is_floating_point(), x.is_complex(), x.dtype == torch.bool

    return "" if kind(own) == kind(new) else f"{new.dtype} for {own.dtype}"


def check_finite(model: nn.Module, label: str) -> None:
    """Refuse NaN and infinity; -inf may stand in a buffer, as in attention masks.

    Args:
        model: the network.
        label: how the message names it and its weights.

    Raises:
        ValueError: the first tensor that holds one, and how many.
    """
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(x) or not x.is_floating_point():
            continue
        x = dense(x)
        bad = ~torch.isfinite(x) & ((x != -torch.inf) | isinstance(x, nn.Parameter))
        if bad.any():
            count = f"{int(bad.sum())} of {x.numel()} values in {name!r} of {label}"
            raise ValueError(f"weights are not finite: {count}: give other weights")
