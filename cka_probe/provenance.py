"""What a result came from: a network by its SHA-256, the versions of the libraries."""

import hashlib
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

__all__ = ["model_sha256", "versions"]


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of the structure (its printed form), every parameter and every buffer.

    Args:
        model: the network without its wrapper (DataParallel, torch.compile), which changes names.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on: name -> version."""
    try:
        own = version("cka-probe")
    except PackageNotFoundError:
        own = "source"
    found = {"cka_probe": own, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("torchvision", "pillow", "numpy", *(["timm"] if "timm" in sys.modules else [])):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
