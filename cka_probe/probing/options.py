"""What `probe` was asked, made plain: natural mistakes get an error that names them."""

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cka_probe.inputs.scales import check_scales

__all__ = ["made_plain"]

_SEEDS = 2**63


def made_plain(model: Any, scales: Any, ask: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Check the arguments of one call whose mistakes would be told by Python or torch.

    Args:
        model: a network, or None.
        scales: as `probe` takes them; a generator is used up once, here.
        ask: the keywords of `probe`.

    Returns:
        (scales as a list or None, the keywords with whole numbers as ints and each view as a
        (network or None, transform or None)).

    Raises:
        TypeError: what is something else than it should be.
        ValueError: a bandwidth or a seed that no run can take; `out` is a file.
    """
    if model is not None:
        _network("model", model)
    scales = None if scales is None else check_scales(scales)
    plain = {**ask, "seed": _whole("seed", ask["seed"])}
    plain["batch_size"] = _whole("batch_size", ask["batch_size"])
    if ask["n_images"] is not None:
        plain["n_images"] = _whole("n_images", ask["n_images"])
    if not -_SEEDS <= plain["seed"] < _SEEDS:
        raise ValueError(f"seed out of range: {plain['seed']}: give a whole number below 2**63")
    if ask["bandwidth"] is not None:
        plain["bandwidth"] = _number("bandwidth", ask["bandwidth"])
    if ask["views"] is not None:
        plain["views"] = _views(ask["views"])
    if ask["out"] is not None and Path(ask["out"]).is_file():
        raise ValueError(f"output is not a folder: {ask['out']}: give a folder as out")
    return scales, plain


def _network(what: str, model: Any) -> None:
    """Refuse what is no network."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        way_out = f"load it, cka_probe.models.load.load_model({model!r}).model"
    elif callable(model):
        model = getattr(model, "__qualname__", type(model).__name__)
        way_out = "call it, and give the nn.Module that it makes"
    else:
        way_out = "give an nn.Module"
    raise TypeError(f"{what} is no network: {model!r:.60}: {way_out}")


def _whole(name: str, value: Any) -> int:
    """A whole number as an int."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is no whole number: {value!r:.60}: give one such as {_SUCH[name]}")


_SUCH = {"seed": 0, "batch_size": 64, "n_images": 800}


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is no number: {value!r:.60}: give one such as 1.0") from None


def _views(views: Any) -> dict[str, tuple[nn.Module | None, Any]]:
    """Each view as (network or None, transform or None); a bare network has no transform."""
    if not isinstance(views, Mapping):
        kind = type(views).__name__
        raise TypeError(f"views are no dict: {kind}: give {{name: (network, transform)}}")
    plain = dict[str, tuple[nn.Module | None, Any]]()
    for name, given in views.items():
        if not isinstance(name, str):
            raise TypeError(f"view is not named by text: {name!r:.60}: name it {str(name)!r:.60}")
        if isinstance(given, nn.Module):
            given = (given, None)
        if not isinstance(given, tuple | list) or len(given) != 2:
            kind = type(given).__name__
            way_out = "give (network or None, transform or None)"
            raise TypeError(f"view {name!r} is no pair: {kind}: {way_out}")
        if given[0] is not None:
            _network(f"view {name!r}", given[0])
        plain[name] = (given[0], given[1])
    return plain
