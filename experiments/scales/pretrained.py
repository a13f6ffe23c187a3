"""The larger tier's network and images: MobileNetV2 with ImageNet weights, Imagenette at 224 px."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["imagenette", "load_pretrained", "mobilenetv2"]

WEIGHTS = Path("weights") / "mobilenet_v2_qat.timm_same.safetensors"
IMAGES = Path("images") / "imagenette224"
NAMES = Path("images") / "imagenet_classes.json"
# timm's blocks of each; maps have a quarter of the side in layer1, a sixteenth in layer3
STAGES = {"layer1": (0, 2), "layer2": (2, 3), "layer3": (3, 5), "layer4": (5, 7)}


def mobilenetv2(
    channels: int, classes: int, strides: tuple[int, int]
) -> OrderedDict[str, nn.Module]:
    """timm's MobileNetV2 (padding "same") in five stages, after each of which it can be cut.

    Args:
        channels: of the images; the weights are for 3.
        classes: how many.
        strides: of stem and first stage; they are what they are, (2, 2).
    """
    import timm

    if channels != 3 or strides != (2, 2):
        raise ValueError(f"not MobileNetV2: {channels} channels, strides {strides}: 3, (2, 2)")
    net = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=classes)
    return OrderedDict(
        stem=nn.Sequential(net.conv_stem, net.bn1),
        **{name: nn.Sequential(*net.blocks[a:b]) for name, (a, b) in STAGES.items()},
        top=nn.Sequential(net.conv_head, net.bn2),
        pool=net.global_pool,
        fc=net.classifier,
    )


def load_pretrained(net: nn.Sequential, data: Path | None) -> None:
    """Put the published weights into a network of `mobilenetv2`'s parts, in place.

    Of its last layer, the rows of Imagenette's classes.

    Args:
        net: with these parts, perhaps among others.
        data: folder with weights/ and images/.

    Raises:
        FileNotFoundError: no images, whose folders name the classes.
        ValueError: the weights are not there, or another network's.
    """
    from safetensors.torch import load_file

    if data is None or not (data / WEIGHTS).is_file():
        raise ValueError(f"no weights: {data and data / WEIGHTS}: name the folder (--data)")
    state = {k: v.float() for k, v in load_file(data / WEIGHTS).items()}
    rows = [row for _, row in _classes(data)]
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _renamed(key)
        named[name] = value[rows] if name.startswith("fc.") else value
    missing, unexpected = net.load_state_dict(named, strict=False)
    lacking = [name for name in missing if not name.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise ValueError(f"weights do not fit: {(lacking or unexpected)[0]!r}: other weights?")


def _renamed(key: str) -> str:
    """timm's name of a weight -> the name in the stages."""
    first, _, rest = key.partition(".")
    parts = {"conv_stem": "stem.0", "bn1": "stem.1", "conv_head": "top.0", "bn2": "top.1",
             "classifier": "fc"}  # fmt: skip
    if first in parts:
        return f"{parts[first]}.{rest}"
    number, _, rest = rest.partition(".")
    stage, start = next((name, a) for name, (a, b) in STAGES.items() if a <= int(number) < b)
    return f"{stage}.{int(number) - start}.{rest}"


def _classes(data: Path) -> list[tuple[str, int]]:
    """The folders of Imagenette in order, each with its row among ImageNet's classes."""
    known: Mapping[str, tuple[int, str]] = json.loads((data / NAMES).read_text())
    folders = sorted(path.name for path in (data / IMAGES / "train").iterdir() if path.is_dir())
    return [(name, int(known[name][0])) for name in folders]


def imagenette(
    split: str, data: Path | None, counts: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Images of a split as bytes, (n, 3, 224, 224), and their labels.

    Args:
        split: "train", "val" (both from the folder to train on) or "test" (the one to validate on).
        data: folder with images/.
        counts: images of (train, val, test).

    Raises:
        ValueError: the images are not there.
    """
    if data is None or not (data / IMAGES).is_dir():
        raise ValueError(f"no images: {data and data / IMAGES}: name the folder (--data)")
    classes = _classes(data)
    n_train, n_val, n_test = (n // len(classes) for n in counts)
    first, count = {"train": (0, n_train), "val": (n_train, n_val), "test": (0, n_test)}[split]
    folder = data / IMAGES / ("val" if split == "test" else "train")
    images, labels = [], []
    for label, (name, _) in enumerate(classes):
        for path in sorted((folder / name).iterdir())[first : first + count]:
            images.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
