"""`ProbeOptions`: what the user chose about a probe, validated once."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cka_probe.activations.axes import LAYOUTS
from cka_probe.activations.layers import Layers
from cka_probe.activations.reduce import Reducer
from cka_probe.engine.kernels import Block, check_bandwidth, get_kernel
from cka_probe.engine.memory import parse_memory
from cka_probe.engine.sketch import check_linear, sketch_size
from cka_probe.inputs.views import NATIVE, Transform, check_scales
from cka_probe.probing.choose import AUTO, ESTIMATORS

__all__ = ["ProbeOptions", "Views", "check_network"]

Views = Mapping[str, nn.Module | tuple[nn.Module | None, Transform | None]]

_SEEDS = 2**63  # torch's generators take a signed 64-bit seed
_EXAMPLES = {"seed": 0, "batch_size": 64, "n_images": 800}


@dataclass(frozen=True, eq=False)
class ProbeOptions:
    """All that a user can choose about a probe, apart from the network and the images.

    The attributes are the keywords of `probe`, which describes them. After validation `scales` is a
    list that holds the reference, `views` maps each name to a pair (network or None, transform or
    None), `out` is a Path, and whole numbers are ints.

    Raises:
        TypeError: a value of another type than the option takes.
        ValueError: a value that no run can take, or two options that exclude each other.
    """

    scales: Sequence[int] | None = None
    views: Views | None = None
    layers: Layers = None
    reference: str | int | None = None
    resize: str = "native"
    antialias: bool = True
    kernel: str | Block = "linear"
    bandwidth: float | None = None
    reduce: str | Reducer = "flatten"
    layout: str | None = None
    estimator: str = "minibatch"
    batch_size: int = 64
    n_images: int | None = None
    seed: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    device: str | torch.device | None = None
    amp: bool = False
    skip_bad: bool = False
    workers: int = 0
    memory: str | int | None = None
    sketch_size: int | None = None
    out: str | Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Validate every option that needs no image; give each its plain type."""
        plain: dict[str, Any] = {
            name: _whole(name, getattr(self, name))
            for name in ("seed", "batch_size", "n_images")
            if name != "n_images" or self.n_images is not None
        }
        if not -_SEEDS <= plain["seed"] < _SEEDS:
            raise ValueError(f"seed out of range: {plain['seed']}: give a whole number below 2**63")
        if self.scales is not None:
            plain["scales"] = self._with_reference(check_scales(self.scales))
        if self.views is not None:
            plain["views"] = _check_views(self.views)
        if self.layout not in (None, *LAYOUTS):
            raise ValueError(f"unknown layout: {self.layout!r:.60}: use {' or '.join(LAYOUTS)}")
        if self.bandwidth is not None:
            plain["bandwidth"] = _number("bandwidth", self.bandwidth)
            check_bandwidth(plain["bandwidth"])
        if self.out is not None:
            plain["out"] = Path(self.out)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._check_views_and_reference()
        self._check_estimator()
        self._check_out()

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget in bytes; None where the user gave none."""
        return parse_memory(self.memory)

    @property
    def sketch_width(self) -> int:
        """Numbers per layer and image that a sketch keeps (k)."""
        return sketch_size(self.sketch_size)

    @property
    def view_pairs(self) -> dict[str, tuple[nn.Module | None, Transform | None]]:
        """The views as (network or None, transform or None)."""
        return {name: given for name, given in (self.views or {}).items() if type(given) is tuple}

    @property
    def size_hint(self) -> str:
        """What the user can do about a size that the network refuses."""
        if self.scales is None:
            return "give images of a size that it takes (compare: --size)"
        if self.resize == "restore":
            return "choose another reference (--reference)"
        return "leave that size out, or use resize='restore' (--resize restore)"

    def _with_reference(self, scales: list[int]) -> list[int]:
        """The scales, and the reference among them where it is a side in pixels."""
        if self.reference is None or not str(self.reference).isdecimal():
            return scales
        (side,) = check_scales([int(self.reference)])
        return scales if side in scales else [*scales, side]

    def _check_views_and_reference(self) -> None:
        if self.views is not None and self.scales is not None:
            raise ValueError("scales and views: both given: a view brings its own transform")
        if self.views is None and self.scales is None and self.reference not in (None, NATIVE):
            raise ValueError(
                f"reference without scales: {self.reference!r}: give scales= that contain it, or "
                "leave it out"
            )
        if self.reference is not None and self.views and str(self.reference) not in self.views:
            known = ", ".join(self.views)
            raise ValueError(
                f"unknown reference view: {str(self.reference)!r}: known views are {known}"
            )

    def _check_estimator(self) -> None:
        kernel = get_kernel(self.kernel)
        if self.estimator not in (*ESTIMATORS, AUTO):
            known = ", ".join((*ESTIMATORS, AUTO))
            raise ValueError(f"unknown estimator: {self.estimator!r}: known ones are {known}")
        if self.estimator == "sketch":
            check_linear(kernel)
        _ = self.memory_bytes, self.sketch_width  # both raise where they cannot be read
        if self.sketch_size is not None and self.estimator not in ("sketch", AUTO):
            raise ValueError(
                f"a sketch size for another estimator: {self.estimator!r}: use 'sketch' or 'auto'"
            )

    def _check_out(self) -> None:
        if self.out is None:
            if self.resume:
                raise ValueError(
                    "resume without a folder: out=None: give out=, the folder of the saved state"
                )
        elif Path(self.out).is_file():
            raise ValueError(f"output is not a folder: {self.out}: give a folder as out")


def check_network(name: str, model: object) -> None:
    """Refuse an object that is not a network.

    Args:
        name: what the message calls it, such as "model" or "view 'a'".
        model: the object.

    Raises:
        TypeError: it is no `nn.Module`.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        hint = f"load it, cka_probe.models.load.load_model({model!r}).model"
    elif callable(model):
        model = getattr(model, "__qualname__", type(model).__name__)
        hint = "call it, and give the nn.Module that it makes"
    else:
        hint = "give an nn.Module"
    raise TypeError(f"{name} is no network: {model!r:.60}: {hint}")


def _whole(name: str, value: Any) -> int:
    """A whole number of any integer type as an int; True and False are none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is no whole number: {value!r:.60}: give one such as {_EXAMPLES[name]}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is no number: {value!r:.60}: give one such as 1.0") from None


def _check_views(views: object) -> dict[str, tuple[nn.Module | None, Transform | None]]:
    """Each view as a pair (network or None, transform or None); a bare network has no transform."""
    if not isinstance(views, Mapping):
        kind = type(views).__name__
        raise TypeError(f"views are no dict: {kind}: give {{name: (network, transform)}}")
    pairs: dict[str, tuple[nn.Module | None, Transform | None]] = {}
    for name, given in views.items():
        if not isinstance(name, str):
            raise TypeError(f"view is not named by text: {name!r:.60}: name it {str(name)!r:.60}")
        if isinstance(given, nn.Module):
            given = (given, None)
        if not isinstance(given, tuple | list) or len(given) != 2:
            kind = type(given).__name__
            hint = "give (network or None, transform or None)"
            raise TypeError(f"view {name!r} is no pair: {kind}: {hint}")
        if given[0] is not None:
            check_network(f"view {name!r}", given[0])
        pairs[name] = (given[0], given[1])
    return pairs
