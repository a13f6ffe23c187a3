"""Guards around a network: its mode and the global random state are as before afterwards."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["eval_mode", "preserved_rng", "seeded"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode that it was in.

    Args:
        model: the network. A module that overrides `train` has it called (it may merge weights, or
            keep a norm frozen); a module in eval mode beside others in training mode stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in flags):
            model.eval()
        yield
    finally:
        try:  # an overridden `train` is called: it may merge weights, or keep a norm frozen
            for module, training in flags:
                own = getattr(module.train, "__func__", None) is not nn.Module.train
                if module.training != training and own:
                    module.train(training)
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global random state on exit: that of torch, numpy (legacy) and `random`.

    The state of CUDA devices is restored, too, unless the block itself initialises CUDA.
    """
    cpu, plain = torch.get_rng_state(), random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002  # other people's global state
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    cuda = torch.cuda.get_rng_state_all() if is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(plain)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def seeded(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers of torch and `random` follow from `key` inside and are as before afterwards.

    NumPy's global numbers are neither seeded nor restored.

    Args:
        key: anything with a stable `repr`: the seed, the image, the view.
        device: a CUDA device whose numbers follow from `key`, too; None for the CPU alone.
    """
    digest = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).digest()
    number = int.from_bytes(digest[:7], "big")  # 56 bits: what every generator takes as a seed
    before, python_before = torch.get_rng_state(), random.getstate()
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        try:
            torch.default_generator.manual_seed(number)
            random.seed(number)
            if cuda:
                torch.cuda.manual_seed(number)
            yield
        finally:
            torch.set_rng_state(before)
            random.setstate(python_before)
