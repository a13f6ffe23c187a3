"""The jobs of bench_probe.py: who competes on what, and the truth in float64.

Every library gets the same numbers through its documented interface: the same network in eval mode
and without gradients, the same layers, batches of the same images. On another `device` than the CPU
a job takes bench_card.py's truth.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cka_probe
from cka_probe.inputs.batches import order

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
Call = Callable[[], Any]  # -> (m, m) matrix of CKA, or None for the bare forwards


class Job(NamedTuple):
    """Contenders by name, what their ratios are to, and the truth of the matrix."""

    calls: dict[str, Call]
    against: tuple[str, ...]
    truth: Callable[[], np.ndarray]
    once: tuple[str, ...] = ()  # too slow for turns: timed once
    given: tuple[Any, ...] = ()  # what the truth is of


def loader(images: Tensor, batch: int) -> DataLoader[Any]:
    labels = torch.zeros(len(images), dtype=torch.long)
    return DataLoader(TensorDataset(images, labels), batch)


def bare(model: nn.Module, images: list[Tensor], batch: int, device: str = "cpu") -> None:
    with torch.inference_mode():
        for view in images:
            for part in view.split(batch):
                model(part.to(device))


def by_pytorch_cka(
    model: nn.Module, layers: list[str], images: Tensor, batch: int, device: str = "cpu"
) -> Tensor:
    lib = importlib.import_module("cka")
    how = {"layers": layers, "device": device, "progress": False}
    (matrix,) = lib.compute_cka(model, model, loader(images, batch), **how)
    return matrix


def by_torch_cka(
    model: nn.Module, layers: list[str], views: list[Tensor], batch: int, device: str = "cpu"
) -> Tensor:
    """Every pair of views, each a comparison of its own: it compares two inputs at a time.

    It ends with an AssertionError where a cell is nan, as here, after all of its work: the time
    counts, the nan stays.
    """
    lib, m = importlib.import_module("torch_cka"), len(layers)
    out = torch.ones(len(views) * m, len(views) * m)
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        for i in range(len(views)):
            for j in range(i + 1):
                run = lib.CKA(model, model, "a", "b", layers, layers, device=device)
                with contextlib.suppress(AssertionError):
                    run.compare(loader(views[i], batch), loader(views[j], batch))
                cells = run.hsic_matrix
                out[i * m : (i + 1) * m, j * m : (j + 1) * m] = cells
                out[j * m : (j + 1) * m, i * m : (i + 1) * m] = cells.T
    return out


def sizes(images: Tensor, sides: list[int]) -> list[Tensor]:
    how = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return [functional.interpolate(images, (s, s), **how) for s in sides]


def outputs(
    model: nn.Module,
    layers: list[str],
    views: list[Tensor],
    batch: int,
    keep: Callable[[Tensor], Any],
    device: str = "cpu",
) -> Iterator[tuple[int, list[Any]]]:
    """Batch by batch: its size, and `keep` of every layer's output as it is put out, by view."""
    modules, kept = dict(model.named_modules()), dict[str, Any]()
    hooks = [
        modules[name].register_forward_hook(
            lambda _m, _x, out, name=name: kept.__setitem__(name, keep(out.flatten(1)))
        )
        for name in layers
    ]
    for parts in zip(*(view.split(batch) for view in views), strict=True):
        found = []
        for part in parts:
            with torch.inference_mode():
                model(part.to(device))
            found += [kept[name] for name in layers]
        yield len(parts[0]), found
    for hook in hooks:
        hook.remove()


def truth_of(model: nn.Module, layers: list[str], views: list[Tensor], batch: int) -> np.ndarray:
    """Float64 Grams of outputs, HSIC by Song's three terms, batches weighted by size."""
    oracle = importlib.import_module("oracle")

    def gram(out: Tensor) -> Any:
        return oracle.shifted(oracle.gram(out))

    total: Any = 0.0
    for size, grams in outputs(model, layers, views, batch, gram):
        pairs = [[oracle.hsic1(a, b) if i >= j else 0.0 for j, b in enumerate(grams)]
                 for i, a in enumerate(grams)]  # fmt: skip
        total = total + size * np.array(pairs)
    total = np.tril(total) + np.tril(total, -1).T
    scale = np.sqrt(np.diag(total))
    return np.asarray(total / scale[:, None] / scale[None])


def network_job(
    model: nn.Module, layers: list[str], n: int, side: int, batch: int, device: str = "cpu"
) -> Job:
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    ordered = images[order(n, 0)]  # the others' batches hold the same images as ours
    model.eval().to(device)

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, [ordered], batch, device),
            "cka-probe": ours,
            "pytorch-cka": lambda: by_pytorch_cka(model, layers, ordered, batch, device),
        },
        ("bare", "pytorch-cka"),
        lambda: truth_of(model, layers, [ordered], batch),
        given=(model, layers, [ordered], batch),
    )


def resnet18(n: int = 512, batch: int = 64, device: str = "cpu") -> Job:
    model = torchvision.models.resnet18()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "down" not in n]
    return network_job(model, [*convs, "fc"], n, 64, batch, device)


def blocks(model: nn.Module) -> list[str]:
    return ["maxpool", *(n for n, m in model.named_modules() if type(m).__name__ == "Bottleneck")]


def resnet50_blocks(n: int = 64, batch: int = 32, device: str = "cpu") -> Job:
    model = torchvision.models.resnet50()
    return network_job(model, blocks(model), n, 224, batch, device)


def resnet50_convs(n: int = 512, batch: int = 64, device: str = "cpu") -> Job:
    model = torchvision.models.resnet50()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return network_job(model, convs, n, 64, batch, device)


def eight_scales(n: int = 256, batch: int = 64, device: str = "cpu") -> Job:
    model = torchvision.models.resnet50().eval().to(device)
    sides, layers = [32, 40, 48, 56, 64, 72, 80, 96], blocks(model)
    images = torch.randn(n, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    views = sizes(images[order(n, 0)], sides)

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, sides, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, views, batch, device),
            "cka-probe": ours,
            "torch-cka": lambda: by_torch_cka(model, layers, views, batch, device),
        },
        ("bare", "torch-cka"),
        lambda: truth_of(model, layers, views, batch),
        once=("torch-cka",),
        given=(model, layers, views, batch),
    )


def truth_of_features(features: list[Tensor], kernel: str) -> np.ndarray:
    """Float64 Grams, U-centred: their products are the unbiased HSIC but for a common factor."""
    oracle = importlib.import_module("oracle")
    grams = (oracle.shifted(oracle.gram(x, kernel)) for x in features)
    centred = [centre(k).ravel() for k in grams]  # in place: no second copy
    hsic = np.array([[a @ b for a in centred] for b in centred])
    scale = np.sqrt(np.diag(hsic))
    return np.asarray(hsic / scale[:, None] / scale[None])


def features(n: int, widths: list[int], kernel: str = "linear", device: str = "cpu") -> Job:
    g = torch.Generator().manual_seed(0)
    shared, kept = torch.randn(n, 32, generator=g), dict[str, Tensor]()
    for k, d in enumerate(widths):
        x = shared @ torch.randn(32, d, generator=g) / 4 + torch.randn(n, d, generator=g)
        kept[f"layer {k}"] = x.to(device)

    def ours(kernel: str) -> np.ndarray:
        return cka_probe.cka_matrix(kept, kernel=kernel).cka

    def theirs() -> Any:
        return importlib.import_module("cka").cka_from_features(*[list(kept.values())] * 2)

    calls: dict[str, Call] = {"cka-probe": lambda: ours(kernel)}
    other, call = ("linear", lambda: ours("linear")) if kernel == "rbf" else ("pytorch-cka", theirs)
    given = (list(kept.values()), kernel)
    return Job({**calls, other: call}, (other,), lambda: truth_of_features(*given), given=given)


def centre(k: np.ndarray) -> np.ndarray:
    """U-centring, in place of a float64 Gram (n, n) (Székely & Rizzo 2014)."""
    n = len(k)
    np.fill_diagonal(k, 0)
    rows = k.sum(0) / (n - 2)
    k -= rows[:, None]
    k -= rows[None]
    k += rows.sum() / (n - 1)
    np.fill_diagonal(k, 0)
    return k


def twenty() -> list[int]:
    return [round(64 * 64 ** (k / 19)) for k in range(20)]


JOBS: dict[str, Callable[[], Job]] = {
    "resnet18@64, 18 layers, 512 images": resnet18,
    "resnet50@224, 17 blocks, batch 32": resnet50_blocks,
    "resnet50@64, 53 convolutions": resnet50_convs,
    "8 scales x 17 blocks, 256 images": eight_scales,
    "features, n = 2048, 20 layers": lambda: features(2048, twenty()),
    "features, n = 10000, 6 layers": lambda: features(10000, [64, 128, 256, 512, 1024, 2048]),
    "rbf features, n = 2048, 20 layers": lambda: features(2048, twenty(), "rbf"),
}
