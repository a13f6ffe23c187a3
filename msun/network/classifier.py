"""The classifier of a network, its last layer: find it, and replace it for other classes."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import detached_copy
from cka_probe.errors import one_line
from cka_probe.models.load import LoadedModel
from cka_probe.rng import eval_mode, preserved_rng
from msun.cutting.cuts import example_images
from msun.network.shape_probe import first_tensor

__all__ = ["last_layer", "replace_classifier"]

Network = TypeVar("Network", bound="nn.Module | LoadedModel")


def replace_classifier(model: Network, classes: int, *, seed: int = 0) -> Network:
    """A copy of a network with a new last layer, for another number of classes.

    The last layer is the linear layer or 1 x 1 convolution that runs last and has as many outputs
    as the network. Where the logits are a mean over several such layers (the distilled networks of
    timm), all of them are new. A layer of another class than torch's, or with a parametrisation,
    keeps both. Auxiliary classifiers of training mode stay as they are.

    Args:
        model: a network that returns logits (n, outputs), or a result of `load_model`.
        classes: number of outputs of the copy, at least 1.
        seed: seed of the new weights. torch's own layers draw them as always; other classes by
            their `reset_parameters`, and where they have none, each new row is a random old one.

    Returns:
        The same kind as `model`: a network, or a loaded model that records the number of classes,
        so that a checkpoint can rebuild the backbone.

    Raises:
        ValueError: fewer than one class, a network that does not end in such a layer, or one that
            fails with the new layer.
    """
    if classes < 1:
        raise ValueError(f"bad number of classes: {classes}: give 1 or more")
    if isinstance(model, LoadedModel):
        inner = replace_classifier(unwrap(model.model), classes, seed=seed)
        return dataclasses.replace(model, model=inner, classes=classes)
    images = example_images(model)
    paths, outputs = _classifiers(model, images)
    fault = ""
    for chosen in dict.fromkeys([paths[-1:], paths]):  # one, then all that have as many outputs
        made = detached_copy(model)
        for k, path in enumerate(chosen):
            parent, _, name = path.rpartition(".")
            new = _resized(made.get_submodule(path), outputs, classes, seed + k)
            setattr(made.get_submodule(parent), name, new)
        if isinstance(getattr(made, "num_classes", None), int):
            made.num_classes = classes  # type: ignore[assignment]  # timm and torchvision read it
        fault = _fault(made, images, classes)
        if not fault:
            return made
    raise ValueError(
        f"classifier cannot be replaced: {', '.join(paths)} of {type(model).__name__}, with which "
        f"{fault}: replace it yourself, in the network's own code"
    )


def _fault(model: nn.Module, images: torch.Tensor, classes: int) -> str:
    """What goes wrong when a network with new classifiers is run; empty where nothing does."""
    try:
        with torch.no_grad(), preserved_rng(), eval_mode(model):
            out = first_tensor(model(images))
    except Exception as error:  # whatever a forward raises on another number of classes
        return f"its forward fails, {one_line(error)}"
    shape = None if out is None else tuple(out.shape)
    return "" if shape == (len(images), classes) else f"it returns {shape}"


def _resized(old: nn.Module, outputs: int, classes: int, seed: int) -> nn.Module:
    """A layer of the same class, settings and parametrisation with another number of outputs."""
    with preserved_rng():
        torch.default_generator.manual_seed(seed)
        if type(old) in (nn.Linear, nn.Conv2d) and not old._forward_pre_hooks:
            weight = old.get_parameter("weight")
            return _like(old, classes).to(weight.device, weight.dtype).train(old.training)
        new = detached_copy(old)
        rows = torch.randint(outputs, (classes,))
        for part in new.modules():
            for key, p in part._parameters.items():
                if p is not None and p.ndim and p.shape[0] == outputs:
                    picked = p.detach()[rows.to(p.device)].clone()
                    part._parameters[key] = nn.Parameter(picked, p.requires_grad)
            for key, b in part._buffers.items():
                if b is not None and b.ndim and b.shape[0] == outputs:
                    part._buffers[key] = b[rows.to(b.device)].clone()
            for name in ("out_features", "out_channels", "num_classes"):
                if getattr(part, name, None) == outputs:
                    setattr(part, name, classes)
        reset = getattr(new, "reset_parameters", None)
        if callable(reset) and not new._forward_pre_hooks and not is_parametrized(new):
            reset()
    return new


def _like(old: nn.Module, classes: int) -> nn.Module:
    """A layer of the same kind with another number of outputs."""
    bias = getattr(old, "bias", None) is not None
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias)
    assert isinstance(old, nn.Conv2d)
    return nn.Conv2d(old.in_channels, classes, 1, bias=bias)


def last_layer(model: nn.Module, x: torch.Tensor) -> tuple[str, Any]:
    """Run a network and find the linear layer or convolution that runs last.

    Args:
        model: the network.
        x: images (n, c, h, w).

    Returns:
        (path of the layer, "" if the network has none; output of the network).
    """
    ran: list[str] = []
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                hook = module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
                stack.callback(hook.remove)
        out = model(x)
    return (ran[-1] if ran else ""), out


def _classifiers(model: nn.Module, images: torch.Tensor) -> tuple[tuple[str, ...], int]:
    """The layers that ran and have as many outputs as the network, and that number."""
    ran: list[str] = []
    with ExitStack() as stack, torch.no_grad(), preserved_rng(), eval_mode(model):
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                hook = module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
                stack.callback(hook.remove)
        out = first_tensor(model(images))
    outputs = out.shape[1] if out is not None and out.ndim == 2 else -1
    found = [path for path in dict.fromkeys(ran) if _gives(model.get_submodule(path), outputs)]
    if found and ran[-1] in found:
        return tuple(found), outputs
    name = type(model).__name__
    raise ValueError(
        f"no classifier to replace: {name} does not end in a linear layer or 1 x 1 convolution "
        "that gives its logits: use a network whose number of outputs fits the classes"
    )


def _gives(layer: nn.Module, outputs: int) -> bool:
    """Whether a layer has so many outputs and looks at one position."""
    pointwise = tuple(getattr(layer, "kernel_size", (1, 1))) == (1, 1)
    found = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return pointwise and getattr(layer, "groups", 1) == 1 and found == outputs
