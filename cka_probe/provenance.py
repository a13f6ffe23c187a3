"""What a report must say to be repeated: fingerprints, versions, sizes and costs of the layers."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cka_probe.collect import Collector, Tap
from cka_probe.reduce import layout


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of the structure (its printed form) and of every parameter and buffer."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    try:
        own = version("cka-probe")
    except PackageNotFoundError:
        own = "source"
    return {"cka_probe": own, "torch": torch.__version__, "python": platform.python_version()}


class MacCounter:
    """Multiply-accumulates of the forwards inside, by torch's flop counter (2 flops a MAC).

    Convolutions, matrix products and attention count. What the hooks compute is taken off again
    (`outside`), so that only the network is counted.
    """

    def __init__(self, *, active: bool = True) -> None:
        self._counter = FlopCounterMode(display=False) if active else None
        self._excess = 0

    def __enter__(self) -> "MacCounter":
        if self._counter is not None:
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(*exc)  # type: ignore[no-untyped-call]

    def outside(self, call: Any, *args: Any) -> None:
        """Run `call(*args)` without counting it."""
        before = self._counter.get_total_flops() if self._counter is not None else 0
        call(*args)
        if self._counter is not None:
            self._excess += self._counter.get_total_flops() - before

    def macs(self) -> int:
        """MACs so far."""
        if self._counter is None:
            return 0
        return int(self._counter.get_total_flops() - self._excess) // 2


def layer_table(
    collectors: Mapping[str, Collector], models: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Per layer: its parameters, and per view the output's shape, grid and channels.

    Args:
        collectors: view -> the collector after a run; `shapes` are those of its last run, so
            call this once per view and merge (`merge_tables`).
        models: view -> the network.
    """
    table: dict[str, Any] = {}
    for view, collector in collectors.items():
        modules = dict(models[view].named_modules(remove_duplicate=False))
        for tap, label in collector.labels.items():
            if tap not in collector.shapes:
                continue
            shape = collector.shapes[tap]
            channels, grid = layout(shape)
            row = table.setdefault(label, {"parameters": _parameters(modules, tap), "views": {}})
            row["views"][view] = {
                "shape": list(shape),
                "grid": list(grid) if grid else None,
                "channels": channels,
            }
    return table


def merge_tables(tables: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One table from those of several views."""
    merged: dict[str, Any] = {}
    for table in tables:
        for label, row in table.items():
            merged.setdefault(label, {"parameters": row["parameters"], "views": {}})
            merged[label]["views"].update(row["views"])
    return merged


def _parameters(modules: Mapping[str, nn.Module], tap: Tap) -> int:
    module = modules.get(tap.path)
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
