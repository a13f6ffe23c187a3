"""How images are normalised for a network."""

from collections.abc import Mapping
from typing import Any

__all__ = ["IMAGENET", "channel_constants", "stated_constants"]

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
    return {key: tuple(map(float, cfg[key])) for key in ("mean", "std")}


def channel_constants(model: Any) -> dict[str, tuple[float, ...]]:
    """Mean and std for a network's images: what it states, else ImageNet's.

    Args:
        model: a network, without its wrapper.
    """
    return {**IMAGENET, **stated_constants(model)}
