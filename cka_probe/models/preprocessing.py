"""How images are normalised for a network."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["IMAGENET", "channel_constants", "for_channels", "input_channels", "stated_constants"]

# Channel means and standard deviations of ImageNet's training images, RGB in 0..1: what networks
# of torchvision and timm were trained with unless they say otherwise.
IMAGENET: Mapping[str, tuple[float, ...]] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def stated_constants(model: Any) -> dict[str, tuple[float, ...]]:
    """Mean and std that a network states about itself (timm's `pretrained_cfg`), or {}.

    Args:
        model: a network, without its wrapper.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg.get("mean") or not cfg.get("std"):
        return {}
    constants = {key: tuple(map(float, cfg[key])) for key in ("mean", "std")}
    return for_channels(constants, input_channels(model))


def channel_constants(model: Any) -> dict[str, tuple[float, ...]]:
    """Mean and std for a network's images: what it states, else ImageNet's.

    Args:
        model: a network, without its wrapper.
    """
    return for_channels({**IMAGENET, **stated_constants(model)}, input_channels(model))


def input_channels(model: Any) -> int | None:
    """Channels of the images that a network takes; None where nothing says so.

    That is what its first convolution takes, in the order of registration, else timm's
    configuration.

    Args:
        model: a network, without its wrapper.
    """
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, nn.Conv2d):
            return int(part.in_channels)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    return int(size[0]) if size else None


def for_channels(
    constants: Mapping[str, tuple[float, ...]], channels: int | None
) -> dict[str, tuple[float, ...]]:
    """Mean and std for so many channels: those of RGB are averaged for one channel of grey.

    Args:
        constants: "mean" and "std", and perhaps more.
        channels: of the images; None for as many as there are.
    """
    made = dict(constants)
    for key in ("mean", "std"):
        values = made.get(key)
        if channels == 1 and values is not None and len(values) == 3:
            made[key] = (sum(values) / 3,)
    return made
