"""Save and load a multi-scale network: plain types and tensors, read with `weights_only`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cka_probe.activations.layers import unwrap
from cka_probe.errors import one_line
from cka_probe.io import load_torch, plain, save_torch
from cka_probe.models.load import LoadedModel, load_model
from cka_probe.models.weights import check_values
from msun.network.builder import build, fingerprint
from msun.network.classifier import replace_classifier
from msun.network.model import MSUN
from msun.network.policy import POLICIES, Policy, sorted_scales

__all__ = ["FORMAT", "describe", "load", "load_into", "read", "save"]

FORMAT = 1  # a reader refuses newer formats
_KIND = "msun"
_KEYS = {"at", "scales", "preset", "policy", "spec", "backbone", "fingerprint", "subnets", "start"}


def describe(model: MSUN) -> dict[str, Any]:
    """The description of a network that a checkpoint holds, in plain values.

    Args:
        model: the network.

    Returns:
        Cut, scales, policy, spec and origin, by name.
    """
    return {
        "at": model.at,
        "scales": list(model.scales),
        "preset": model.preset,
        "policy": asdict(model.policy),
        "spec": model.spec,
        "backbone": model.origin.backbone,
        "fingerprint": model.origin.fingerprint,
        "subnets": model.origin.subnets,
        "start": model.origin.start,
    }


def save(model: MSUN, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> Path:
    """Write a network to a file, atomically.

    Args:
        model: the network.
        path: path of the file, in an existing folder.
        extra: further plain values and tensors to store.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "kind": _KIND,
        "format": FORMAT,
        "network": plain(describe(model), "network"),
        "state": {key: x.detach().cpu() for key, x in model.state_dict().items()},
        "extra": dict(extra or {}),
    }
    save_torch(path, content)
    return Path(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, without building the network.

    Args:
        path: path of the file.

    Returns:
        "network" (see `describe`), "state" (tensors by name) and "extra".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another kind of file, or a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}: check the path")
    try:
        content = load_torch(path)
    except ValueError as error:
        reason = "another kind of file, or damaged"
        raise ValueError(f"cannot read the checkpoint: {path}, {reason}: save it again") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ValueError(f"no checkpoint of a multi-scale network: {path}: give one of `msun`")
    if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
        raise ValueError(f"checkpoint of a newer format: {path}: update msun")
    network, state = content.get("network"), content.get("state")
    whole = (
        isinstance(network, dict)
        and network.keys() >= _KEYS
        and isinstance(network["spec"], dict)
        and isinstance(state, dict)
    )
    if not whole or not all(isinstance(x, Tensor) for x in state.values()):  # type: ignore[union-attr]
        raise ValueError(f"checkpoint is incomplete: {path}: save it again")
    return content


def load(
    path: str | os.PathLike[str],
    *,
    backbone: nn.Module | LoadedModel | None = None,
    at: str | None = None,
    scales: Sequence[int] | None = None,
    trust: bool = False,
) -> MSUN:
    """Build the network of a checkpoint and load its weights.

    Args:
        path: path of the file.
        backbone: the backbone that the network was built from; None to rebuild it by its name.
        at: the expected cut; None for any.
        scales: the expected scales, sides in pixels; None for any.
        trust: whether the checkpoint may choose code to run (a Python file that builds the
            backbone) or files to fetch (pretrained weights). Names of torchvision, timm and this
            project need no trust.

    Returns:
        The network, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, a checkpoint of another backbone, cut or scales, or one
            that needs `trust`.
    """
    content = read(path)
    network = content["network"]
    _expect(path, network, at=at, scales=scales)
    if backbone is None:
        if not trust:
            _refuse_foreign_code(path, network["spec"])
        backbone = _rebuilt(path, network["spec"])
    inner = unwrap(backbone.model if isinstance(backbone, LoadedModel) else backbone)
    if fingerprint(inner) != network["fingerprint"]:
        other = backbone.name if isinstance(backbone, LoadedModel) else type(inner).__name__
        made = network["spec"].get("name") or network["backbone"]
        raise ValueError(
            f"checkpoint for another backbone: {path} was built around {made!r}, not {other!r}: "
            "give that backbone, with the same number of classes"
        )
    policy = _policy(path, network)
    preset = network["preset"] if network["preset"] in POLICIES else "lean"
    model = build(
        backbone,
        network["at"],
        network["scales"],
        preset=preset,
        policy=policy,
        start=network["start"],
        spec=network["spec"],
    )
    _fill(model, content["state"], path)
    model.preset = network["preset"]
    return model.eval()


def load_into(model: MSUN, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the weights of a checkpoint into a network.

    Args:
        model: a network built like the saved one; changed in place.
        path: path of the file.

    Returns:
        The `extra` values of the checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, or a checkpoint of another network.
    """
    content = read(path)
    network = content["network"]
    _expect(path, network, at=model.at, scales=model.scales)
    own = describe(model)
    network = {**network, "policy": plain(asdict(_policy(path, network)))}
    for key, what in (("fingerprint", "backbone"), ("policy", "policy"), ("subnets", "subnets")):
        if network[key] != plain(own[key]):
            there, here = (d["backbone" if key == "fingerprint" else key] for d in (network, own))
            raise ValueError(
                f"checkpoint for another {what}: {path} has {there}, the network {here}: build "
                "the network like the checkpoint's"
            )
    if (network["start"] == "dilated") != (model.origin.start == "dilated"):
        raise ValueError(
            f"checkpoint for another start: {path} has {network['start']}, the network "
            f"{model.origin.start}: build the network like the checkpoint's"
        )
    _fill(model, content["state"], path)
    extra: dict[str, Any] = content.get("extra", {})
    return extra


def _expect(
    path: str | os.PathLike[str],
    network: Mapping[str, Any],
    *,
    at: str | None,
    scales: Sequence[int] | None,
) -> None:
    """Raise where the cut or the scales are not the expected ones."""
    if at is not None and at != network["at"]:
        raise ValueError(
            f"checkpoint for another cut: {path} was cut after {network['at']!r}, not {at!r}: "
            "give at= that cut"
        )
    if scales is not None and list(sorted_scales(scales)) != network["scales"]:
        there, here = (",".join(map(str, s)) for s in (network["scales"], sorted_scales(scales)))
        raise ValueError(
            f"checkpoint for other scales: {path} has {there}, not {here}: give scales= those"
        )


def _policy(path: str | os.PathLike[str], network: Mapping[str, Any]) -> Policy:
    """The policy; fields that an earlier version did not save keep their defaults."""
    try:
        return Policy(**network["policy"])
    except (TypeError, ValueError) as error:
        reason = one_line(error).replace(": ", ", ")
        raise ValueError(f"checkpoint of another policy: {path}, {reason}: update msun") from error


# The names that can only stand in a registry of builders: no folder, no file, no hub. All others
# make `load_model` run a Python file, or timm read a folder or a page of the Hugging Face hub.
_REGISTERED = re.compile(r"(timm:)?[\w.]+")
# Keywords of torchvision (weights, weights_backbone, pretrained) and timm (pretrained,
# pretrained_cfg, checkpoint_path, cache_dir) with which a builder fetches or reads a file.
_FETCHES = re.compile(r"pretrained|weights|checkpoint|url|file|_dir", re.IGNORECASE)


def _refuse_foreign_code(path: str | os.PathLike[str], spec: Mapping[str, Any]) -> None:
    """Refuse a backbone whose rebuilding runs code or fetches files that the checkpoint chose."""
    hint = "give backbone= (--model), or trust=True (--trust) if you know where it comes from"
    name, args = spec.get("name"), spec.get("model_args") or {}
    if name and not (isinstance(name, str) and _REGISTERED.fullmatch(name)):
        raise ValueError(f"checkpoint names code to run: {name!r:.200} of {path}: {hint}")
    # init_weights of torchvision's Inception and GoogLeNet draws random weights
    fetching = [
        f"{key}={value!r:.80}"
        for key, value in dict(args).items()
        if _FETCHES.search(str(key)) and key != "init_weights" and value not in (None, False)
    ]
    if fetching:
        raise ValueError(
            f"checkpoint names weights to fetch: {', '.join(fetching)} of {path}: {hint}"
        )


def _rebuilt(path: str | os.PathLike[str], spec: Mapping[str, Any]) -> LoadedModel:
    """The backbone by the name in the checkpoint, without weights."""
    if not spec.get("name"):
        raise ValueError(f"checkpoint of a bare network: {path} has no name: give backbone=")
    try:
        made = load_model(spec["name"], "none", model_args=spec.get("model_args"))
        return replace_classifier(made, spec["new_head"]) if spec.get("new_head") else made
    except (ValueError, TypeError) as error:
        name = spec["name"]
        reason = one_line(error)
        raise ValueError(
            f"cannot rebuild the backbone: {name!r} of {path}, {reason}: give backbone="
        ) from error


def _fill(model: MSUN, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load the tensors, with an error of one line."""
    own = {key: x for key, x in model.state_dict().items() if isinstance(x, Tensor)}
    check_values(own, state, repr(str(path)))
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint does not fit the network: {path}, {one_line(error)}: save it again"
        ) from error
