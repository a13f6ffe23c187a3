"""The classifier of a network, its last layer: find it, and replace it for other classes."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import detached_copy
from cka_probe.models.load import LoadedModel
from cka_probe.rng import eval_mode, preserved_rng
from msun.cutting.cuts import example_images
from msun.network.shape_probe import first_tensor

__all__ = ["last_layer", "replace_classifier"]

Network = TypeVar("Network", bound="nn.Module | LoadedModel")


def replace_classifier(model: Network, classes: int, *, seed: int = 0) -> Network:
    """A copy of a network with a new last layer, for another number of classes.

    The last layer is the linear layer or 1 x 1 convolution that runs last and has as many outputs
    as the network. Auxiliary classifiers of training mode stay as they are.

    Args:
        model: a network that returns logits (n, outputs), or a result of `load_model`.
        classes: number of outputs of the copy, at least 1.
        seed: seed of the new weights, which are drawn as the layer's class draws them.

    Returns:
        The same kind as `model`: a network, or a loaded model that records the number of classes,
        so that a checkpoint can rebuild the backbone.

    Raises:
        ValueError: fewer than one class, or a network that does not end in such a layer.
    """
    if classes < 1:
        raise ValueError(f"bad number of classes: {classes}: give 1 or more")
    if isinstance(model, LoadedModel):
        inner = replace_classifier(unwrap(model.model), classes, seed=seed)
        return dataclasses.replace(model, model=inner, classes=classes)
    made = detached_copy(model)
    path = _classifier(made)
    old = made.get_submodule(path)
    with preserved_rng():
        torch.default_generator.manual_seed(seed)
        new = _like(old, classes)
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    new = new.to(weight.device, weight.dtype).train(old.training)
    parent, _, name = path.rpartition(".")
    setattr(made.get_submodule(parent), name, new)
    if isinstance(getattr(made, "num_classes", None), int):
        made.num_classes = classes  # type: ignore[assignment]  # timm and torchvision reshape by it
    return made


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


def _classifier(model: nn.Module) -> str:
    """The path of the layer whose outputs are the logits."""
    with torch.no_grad(), preserved_rng(), eval_mode(model):
        path, given = last_layer(model, example_images(model))
    out = first_tensor(given)
    if path and out is not None:
        last = model.get_submodule(path)
        outputs = getattr(last, "out_features", getattr(last, "out_channels", None))
        pointwise = tuple(getattr(last, "kernel_size", (1, 1))) == (1, 1)
        if pointwise and getattr(last, "groups", 1) == 1 and out.shape[1:] == (outputs,):
            return path
    name = type(model).__name__
    raise ValueError(
        f"no classifier to replace: {name} does not end in a linear layer or 1 x 1 convolution "
        "that gives its logits: use a network whose number of outputs fits the classes"
    )
