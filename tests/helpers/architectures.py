"""What is checked of every architecture, and the table of it in docs/architectures.md.

`python tests/helpers/architectures.py rows.json` writes the table, in about ten minutes on one
core; the rows that are in the file already are not made again.
"""

import gc
import json
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import oracle
import torch
import zoo
from cut_laws import assert_law, assert_law_in_training, noise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import msun
from cka_probe import probe
from cka_probe.activations.layers import default_layers

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
IMAGES, BATCH = 8, 4
COMMAND, PACKAGES = (
    "python tests/helpers/architectures.py rows.json",
    ("torch", "torchvision", "timm"),
)

# A two-scale probe that is not finite, and why.
NOT_FINITE = {
    "timm:convmixer_768_32": "nan in its later half: with random weights images differ there by "
    "less than float32 rounds",
}
# No valid cut: why, and what the message says.
UNCUT = {
    "timm:crossvit_tiny_240": (
        "two branches of tokens, both of which read the image",
        "later steps also need the input",
    ),
    "timm:gemma4_vit_167m": (
        "tokens throughout: a linear layer on patches is the first",
        "no module returns a 4-D map",
    ),
    "timm:naflexvit_base_patch16_parfac_gap": (
        "tokens throughout: a linear layer on patches is the first",
        "the first of 24 4-D outputs, later steps also need",
    ),
}
COLUMNS = (
    "network", "layers", "from … to", "input", "takes", "cuts", "cut after", "remarks",
)  # fmt: skip


def images(side: int) -> Tensor:
    """Smooth random pictures (8, 3, side, side)."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(IMAGES, 3, 8, 8, generator=g)
    return F.interpolate(coarse, (side, side), mode="bicubic")


def examine(name: str) -> dict[str, str]:
    """Everything that is checked of one architecture: a row of the table."""
    model = zoo.build(name).eval()
    return {"network": name, **examine_probe(name, model), **examine_cuts(name, model)}


def examine_probe(name: str, model: nn.Module) -> dict[str, str]:
    """Probe it at two sizes; compare two of its taps with cloned outputs.

    Returns:
        The columns of the table that the probe fills.

    Raises:
        AssertionError: no layers, a tap that is off by more than 1e-5, or values that are not
            finite and not listed.
    """
    side = zoo.input_size(name)
    small, x = zoo.second_size(name), images(side)
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
    tapped = {tap for view in report.views for tap in map(plain, report.layers_of(view))}
    named = {*report.meta["unreached"], *map(plain, report.meta["skipped"])}
    for path in default_layers(model):
        inside = any(tap.startswith(f"{path}.") for tap in tapped)
        assert path in tapped | named or inside, f"{name}: {path} is neither tapped nor named"
    compare_with_clones(model, x, report, [layers[0], layers[-1]], side)
    finite = bool(np.isfinite(report.cka).all())
    assert finite == (name not in NOT_FINITE), f"{name}: finite is {finite}"
    remarks = [NOT_FINITE.get(name, ""), zoo.remark(name)]
    if report.meta["unreached"]:
        remarks.append(f"not reached in eval mode: {', '.join(report.meta['unreached'])}")
    if report.meta["skipped"]:
        remarks.append(f"not tapped: {shortened(report.meta['skipped'])}")
    return {
        "layers": str(len(layers)),
        "from … to": span(layers),
        "input": f"{small}, {side}",
        "takes": taken,
        "remarks": "; ".join(filter(None, remarks)),
    }


@torch.no_grad()
def examine_cuts(name: str, model: nn.Module) -> dict[str, str]:
    """Cut it after the first, a middle and the last valid module, and compare with the whole.

    To the bit: in eval mode, at a second size too where it takes one, and in training mode.

    Returns:
        The columns of the table on cuts: their number, and where they lie or why there are none.

    Raises:
        AssertionError: the halves compute something else, or the reason is not the listed one.
    """
    side = zoo.input_size(name)
    x = [noise(2, side)]
    try:
        cuts = msun.cut_points(model, x[0])
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        why, said = UNCUT[name]
        assert refusal.startswith("no valid cut: "), refusal
        assert said in refusal, refusal
        return {"cuts": "none", "cut after": why}
    assert name not in UNCUT
    assert len(set(cuts)) == len(cuts)
    outputs = [model(x[0])]
    try:  # a second, smaller size, where the network takes one, and then as the example
        other = noise(2, zoo.second_size(name))
        outputs = [model(other), *outputs]
        x = [other, *x]
    except (RuntimeError, AssertionError, ValueError):
        pass
    assert all(bool(v.isfinite().all()) for v in tree_flatten(outputs)[0])
    middle = cuts[len(cuts) // 2]
    for at in dict.fromkeys((cuts[0], middle, cuts[-1])):
        head, tail = assert_law(model, at, *x, outputs=outputs)
        if at == middle:
            trained = noise(2, zoo.TRAINS[name]) if name in zoo.TRAINS else x[-1]
            assert_law_in_training(model, head, tail, trained)
    return {"cuts": str(len(cuts)), "cut after": span(cuts)}


def span(names: list[str]) -> str:
    """The first and the last of several names."""
    return f"{names[0]} … {names[-1]}" if len(names) > 1 else names[0]


def shortened(names: Iterable[str]) -> str:
    """All of a few names; of many the first and their number."""
    first, *rest = names
    return ", ".join((first, *rest)) if len(rest) < 4 else f"{first} and {len(rest)} more"


def without_rounding(x: Tensor) -> np.ndarray:
    """Features (n, d) in float64; 0 where all images have the same but for float32's rounding."""
    wide = x.double().numpy()
    spread = np.linalg.norm(wide - wide.mean(0))
    return wide if spread > 8 * torch.finfo(x.dtype).eps * np.linalg.norm(wide) else 0 * wide


def compare_with_clones(
    model: nn.Module, x: Tensor, report: object, layers: list[str], side: int
) -> None:
    """CKA between two layers at the full size, by plain hooks that clone, and the oracle."""
    from cka_probe.inputs.batches import order

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
            kept.setdefault(label, []).append(without_rounding(value.flatten(1)))
    first, last = layers
    flat = any(not np.any(kept[label]) for label in layers)
    expected = np.nan if flat else oracle.cka_minibatch(kept[first], kept[last])
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
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        "# Architectures",
        "",
        "All classification networks of torchvision, DeepLabV3, LR-ASPP, and the smallest variant",
        f"of each module of timm, with random weights. Made by `{COMMAND}`,",
        "checked by `pytest -m sweep`.",
        "",
        "*Layers* are those that `probe` taps by default, *from … to* the first and the last;",
        "*takes* says whether the second size of *input* was taken as it is (otherwise the",
        "two-scale probe ran with `resize='restore'`). The probe of all layers at both sizes is",
        "finite where no remark says otherwise, and two taps of each network equal the float64",
        "oracle on cloned outputs to 1e-5.",
        "",
        "*Cuts* is the number of modules that `msun.cut_points` gives, *cut after* the first and",
        "the last of them, or why there is none. At the first, the middle and the last",
        "`tail(head(x))` equals `model(x)` to the bit in eval mode, at the second size too where",
        "the network takes one, and at the middle one in training mode; head and tail together",
        "hold each parameter once.",
        "",
        f"{len(rows)} networks, {versions}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row[c].replace("|", "\\|") for c in COLUMNS) + " |" for row in rows),
    ]
    missing = [f"`{name}`" for name in names() if name not in {row["network"] for row in rows}]
    if missing:
        lines += ["", f"Not examined yet, {len(missing)} networks: {', '.join(missing)}."]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_table() -> dict[str, dict[str, str]]:
    """The rows of docs/architectures.md, by network."""
    lines = TABLE.read_text("utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = [dict(zip(COLUMNS, row, strict=False)) for row in cells[1:]]
    return {row["network"]: {**dict.fromkeys(COLUMNS, ""), **row} for row in rows}


def main(cache: Path) -> None:
    """Examine what is not in the cache yet, name what fails, write the table."""
    torch.set_num_threads(1)
    gc.disable()  # a quarter of the time goes into looking for garbage among the graphs' nodes
    rows = json.loads(cache.read_text("utf-8")) if cache.exists() else {}
    failed = []
    for name in names():
        if name in rows:
            continue
        began = time.process_time()
        try:
            rows[name] = examine(name)
            cache.write_text(json.dumps(rows), "utf-8")
        except Exception as error:
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        gc.collect()
        print(f"{time.process_time() - began:6.1f} core-s  {name}", flush=True)
    write_table([rows[name] for name in names() if name in rows])
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
