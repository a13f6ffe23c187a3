"""MACs of a network, and the table of its layers: parameters, output shapes."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cka_probe.activations.hooks import Collector, Tap


class MacCounter(TorchDispatchMode):
    """Multiply-accumulates of the forwards inside, of every operator that holds matrix products.

    Convolutions, matrix products, attention and recurrent layers count, fused or not: the same
    network costs the same on every path that torch takes. Elementwise products, interpolation
    and pooling do not count. What the hooks compute goes through `outside` and does not either,
    so that only the network is counted.

    Attributes:
        uncounted: operators that may hold products and have no formula; their MACs are missing.
    """

    def __init__(self, *, active: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._active = active
        self._macs = 0
        self._counting = active
        self.uncounted: set[str] = set()

    def __enter__(self) -> "MacCounter":
        return super().__enter__() if self._active else self  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        if self._active:
            super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and add what its formula says."""
        out = func(*args, **(kwargs or {}))
        if self._counting:
            self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if str(packet).startswith("aten.") and str(packet).endswith("_"):  # in place: addmm_
            packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
        name = str(packet)  # "aten.addmm"
        if (own := _own_formula(name)) is not None:
            names = [argument.name for argument in func._schema.arguments]
            self._macs += own({**dict(zip(names, args, strict=False)), **kwargs}, out)
        elif (formula := flop_registry.get(packet)) is not None:
            self._macs += int(formula(*args, **kwargs, out_val=out)) // 2  # 2 flops a MAC
        elif _PRODUCTS.search(name.rpartition(".")[2]) or not _KNOWN.match(name):
            self.uncounted.add(name)

    def outside(self, call: Any, *args: Any) -> None:
        """Run `call(*args)` without counting it."""
        before, self._counting = self._counting, False
        try:
            call(*args)
        finally:
            self._counting = before

    def macs(self) -> int:
        """MACs so far."""
        return self._macs

    def warn_uncounted(self) -> None:
        """Warn by name of operators whose MACs are missing."""
        if self.uncounted:
            warnings.warn(
                f"MACs not counted: {', '.join(sorted(self.uncounted))}: the true MACs are higher; "
                "add those of these operators by hand",
                UserWarning,
                stacklevel=2,
            )


# Names of operators that hold products, in case torch or a backend has one without a formula.
_PRODUCTS = re.compile(
    r"mm(_|$)|mv$|conv(?!ert)|linear|matmul|attention|transformer|rnn|lstm|gru|dot$|cdist"
    "|euclidean_dist|einsum"
)
# Operators of torch and torchvision hold none otherwise; those of other libraries are not known.
# `_thnn_fused_*` are the elementwise parts of recurrent cells, `upsample_*` interpolate; the others
# choose a kernel or order weights.
_KNOWN = re.compile("aten|prims?|torchvision|profiler|_c10d_functional|c10d|inductor|higher_order")
_NONE = re.compile(
    r"aten\.(_thnn_fused_|_?upsample_|_fused_sdp_choice|.*flatten_weight|.*reorder_)"
)


def _own_formula(name: str) -> Callable[[dict[str, Any], Any], int] | None:
    """MACs of an operator that torch's own table lacks, from its arguments and its result."""
    if _NONE.match(name):
        return lambda given, out: 0
    if name.startswith("aten._scaled_dot_product_") and "backward" not in name:
        return _scaled_dot_product
    return _FORMULAS.get(name)


def _scaled_dot_product(given: dict[str, Any], out: Any) -> int:
    """Scores (..., t, s) of queries (..., t, d), and their products with values (..., s, e).

    Keys and values may have fewer heads than the queries, which share them.
    """
    query, value = given["query"], given["value"]
    rows = query.numel() // query.shape[-1]
    return int(rows * value.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _lengths(x: Tensor) -> list[int]:
    """The tokens of each item of (n, t, c), which a nested tensor holds in different numbers."""
    if x.is_nested:
        return [part.shape[0] for part in x.unbind()]
    return [x.shape[1]] * x.shape[0]


def _attention(query: Tensor, key: Tensor, width: int) -> int:
    """Projections of queries, keys, values and outputs (width x width each), and two products."""
    pairs = zip(_lengths(query), _lengths(key), strict=True)
    return sum(2 * (t + s) * width**2 + 2 * t * s * width for t, s in pairs)


def _encoder_layer(given: dict[str, Any], out: Any) -> int:
    x, wide = given["src"], given["ffn_weight_1"].numel() + given["ffn_weight_2"].numel()
    return _attention(x, x, given["embed_dim"]) + int(sum(_lengths(x)) * wide)


def _recurrent(weights: Iterable[Tensor], x: Tensor) -> int:
    """Every matrix of weights once a step: (t, n, c), (n, t, c) or, packed, (steps, c)."""
    return sum(w.numel() for w in weights if w.ndim > 1) * (x.numel() // x.shape[-1])


_FORMULAS: dict[str, Callable[[dict[str, Any], Any], int]] = {
    "aten._native_multi_head_attention": lambda given, out: _attention(
        given["query"], given["key"], given["embed_dim"]
    ),
    "aten._transformer_encoder_layer_fwd": _encoder_layer,
    "aten.mkldnn_rnn_layer": lambda given, out: _recurrent(
        (given["weight0"], given["weight1"]), given["input"]
    ),
    "aten._cudnn_rnn": lambda given, out: _recurrent(given["weight"], given["input"]),
    "aten.miopen_rnn": lambda given, out: _recurrent(given["weight"], given["input"]),
    # an output of a convolution costs the weights of one filter
    "torchvision.deform_conv2d": lambda given, out: out.numel() * given["weight"][0].numel(),
    "aten.cudnn_convolution_relu": lambda given, out: out.numel() * given["weight"][0].numel(),
    "aten.cudnn_convolution_add_relu": lambda given, out: out.numel() * given["weight"][0].numel(),
    "aten.mkldnn_convolution": lambda given, out: out.numel() * given["weight"][0].numel(),
    # nn.Bilinear: (n, 1, a, 1), (1, out, a, b), (n, 1, 1, b) summed over a and b
    "aten._trilinear": lambda given, out: out.numel() * given["i2"][0].numel(),
    "aten._addmm_activation": lambda given, out: out.numel() * given["mat1"].shape[1],
    "aten._int_mm": lambda given, out: out.numel() * given["self"].shape[1],
    "aten.addbmm": lambda given, out: given["batch1"].numel() * given["batch2"].shape[2],
    "aten.linear": lambda given, out: out.numel() * given["weight"].shape[-1],
    "aten.mv": lambda given, out: given["self"].numel(),
    "aten.addmv": lambda given, out: given["mat"].numel(),
    "aten.dot": lambda given, out: given["self"].numel(),
    "aten.vdot": lambda given, out: given["self"].numel(),
}


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
