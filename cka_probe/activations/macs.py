"""MACs of a network, and the table of its layers: parameters, output shapes."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cka_probe.activations.hooks import Collector, Tap


class MacCounter(TorchDispatchMode):
    """Multiply-accumulates of the forwards inside, by torch's flop formulas (2 flops a MAC).

    Convolutions, matrix products and attention count. What the hooks compute goes through
    `outside` and does not, so that only the network is counted.
    """

    def __init__(self, *, active: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._active = active
        self._flops = 0
        self._counting = active

    def __enter__(self) -> "MacCounter":
        return super().__enter__() if self._active else self  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        if self._active:
            super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and add what its formula says."""
        out = func(*args, **(kwargs or {}))
        formula = _formula(func._overloadpacket) if self._counting else None
        if formula is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def outside(self, call: Any, *args: Any) -> None:
        """Run `call(*args)` without counting it."""
        before, self._counting = self._counting, False
        try:
            call(*args)
        finally:
            self._counting = before

    def macs(self) -> int:
        """MACs so far."""
        return int(self._flops) // 2


def _formula(operator: Any) -> Any:
    """Torch's flop formula of an operator; attention on a CPU has none of its own."""
    aten = torch.ops.aten
    if operator is getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None):
        operator = aten._scaled_dot_product_flash_attention
    return flop_registry.get(operator)


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
            shape, axes = collector.shapes[tap], [a - 1 for a in collector.channels[tap]]
            sides = [side for a, side in enumerate(shape) if a not in axes]
            row = table.setdefault(label, {"parameters": _parameters(modules, tap), "views": {}})
            row["views"][view] = {
                "shape": list(shape),
                "grid": sides if len(shape) > 2 else None,
                "channels": math.prod(shape[a] for a in axes),
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
