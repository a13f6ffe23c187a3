"""What is checked of every architecture, and the table of it in docs/architectures.md.

`python tests/architectures.py rows.json` writes the table, in about a quarter of an hour; the rows
that are in the file already are not made again.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe import probe

TABLE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
IMAGES, BATCH = 8, 4

# A two-scale probe that is not finite, and why.
NOT_FINITE: dict[str, str] = {}


def images(side: int) -> Tensor:
    """Smooth random pictures (8, 3, side, side)."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(IMAGES, 3, 8, 8, generator=g)
    return F.interpolate(coarse, (side, side), mode="bicubic")


def examine(name: str) -> dict[str, str]:
    """Probe one architecture at two sizes; compare two of its taps with cloned outputs.

    Returns:
        A row of the table.

    Raises:
        AssertionError: no layers, a tap that is off by more than 1e-5, or values that are not
            finite and not listed.
    """
    model, side = zoo.build(name).eval(), zoo.input_size(name)
    small, x = smaller(side), images(side)
    options = {"batch_size": BATCH, "progress": False}
    taken = "any tried"
    try:
        report = probe(model, x, [small, side], **options)
    except ValueError as error:
        if "cannot take view" not in str(error):
            raise
        taken = f"{side} px only"
        report = probe(model, x, [small, side], resize="restore", **options)
    layers = report.layers_of(str(side))
    assert layers
    compare_with_clones(model, x, report, [layers[0], layers[-1]], side)
    finite = bool(np.isfinite(report.cka).all())
    assert finite == (name not in NOT_FINITE), f"{name}: finite is {finite}"
    shown = f"{layers[0]} … {layers[-1]}" if len(layers) > 1 else layers[0]
    remarks = [NOT_FINITE.get(name, "")]
    if report.meta["unreached"]:
        remarks.append(f"not reached in eval mode: {', '.join(report.meta['unreached'])}")
    if report.meta["skipped"]:
        remarks.append(f"not tapped: {', '.join(report.meta['skipped'])}")
    return {
        "network": name,
        "layers": str(len(layers)),
        "from … to": shown,
        "input": f"{small}, {side}",
        "takes": taken,
        "remarks": "; ".join(filter(None, remarks)),
    }


def smaller(side: int) -> int:
    """The second size: about three quarters, in steps of 32 where that is possible."""
    return max(32, side * 3 // 4 // 32 * 32) if side > 32 else side // 2


def compare_with_clones(
    model: nn.Module, x: Tensor, report: object, layers: list[str], side: int
) -> None:
    """CKA between two layers at the full size, by plain hooks that clone, and the oracle."""
    from cka_probe.images import order

    modules = dict(model.named_modules(remove_duplicate=False))
    kept: dict[str, list[np.ndarray]] = {}
    shuffled = x[order(IMAGES, 0)]
    for batch in shuffled.split(BATCH):
        seen: dict[str, list[Tensor]] = {}
        handles = [
            modules[path].register_forward_hook(
                lambda m, given, out, path=path, seen=seen: seen.setdefault(path, []).append(
                    clone(out)
                )
            )
            for path in {plain(label) for label in layers}
        ]
        with torch.no_grad():
            model(batch)
        for handle in handles:
            handle.remove()
        for label in layers:
            value = pick(seen[plain(label)], label)
            kept.setdefault(label, []).append(value.flatten(1).double().numpy())
    first, last = layers
    expected = oracle.cka_minibatch(kept[first], kept[last])
    found = report.between(str(side), str(side)).loc[first, last]  # type: ignore[attr-defined]
    assert abs(found - expected) <= 1e-5 or (np.isnan(found) and np.isnan(expected))


def clone(out: object) -> object:
    """A copy of an output, whatever holds it."""
    if isinstance(out, Tensor):
        return out.detach().clone()
    if isinstance(out, dict):
        return {key: clone(value) for key, value in out.items()}
    return [clone(value) for value in out] if isinstance(out, list | tuple) else out


def plain(label: str) -> str:
    """The module's path of a label."""
    return label.split(":")[0].split("#")[0]


def pick(calls: list[object], label: str) -> Tensor:
    """The output that a label names."""
    head, _, call = label.partition("#")
    out = calls[int(call or 0)]
    field = head.partition(":")[2]
    for part in field.split(".") if field else []:
        out = out[int(part)] if isinstance(out, list) else out[part]  # type: ignore[index]
    assert isinstance(out, Tensor)
    return out


def names() -> list[str]:
    """Every architecture of the sweep."""
    return [*zoo.torchvision_models(), *zoo.segmentation_models(), *zoo.timm_models()]


def write_table(rows: list[dict[str, str]]) -> None:
    """docs/architectures.md."""
    columns = list(rows[0])
    lines = [
        "# Architectures",
        "",
        "Made by `python tests/architectures.py rows.json`, checked by `pytest -m sweep`. Random",
        "weights, the smallest variant of each timm module. *Layers* are those tapped by default;",
        "*takes* says whether a second size was taken as it is (otherwise the two-scale probe ran",
        "with `resize='restore'`). Two taps of each equal the float64 oracle on cloned outputs to",
        "1e-5.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows),
    ]
    missing = [f"`{name}`" for name in names() if name not in {row["network"] for row in rows}]
    if missing:
        lines += ["", f"Not examined yet, {len(missing)} networks: {', '.join(missing)}."]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(cache: Path) -> None:
    """Examine what is not in the cache yet, name what fails, write the table."""
    torch.set_num_threads(1)
    rows = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    failed = []
    for name in names():
        if name in rows:
            continue
        began = time.perf_counter()
        try:
            rows[name] = examine(name)
            cache.write_text(json.dumps(rows), "utf-8")
        except Exception as error:
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        print(f"{time.perf_counter() - began:6.1f} s  {name}", flush=True)
    write_table([rows[name] for name in names() if name in rows])
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
