"""The jobs of bench_probe.py on a GPU: as bench_jobs.py, with sizes that keep one busy.

512 small images take an H100 a few milliseconds, less than hashing a network's weights takes, so
there are more images here, and batches are larger. Images lie in the host's memory for everybody
and go to the card batch by batch; features at hand lie on the card. `cka-probe` is the whole of
`probe`: it also hashes network and images, and looks at each image apart, resizing it on the CPU.
`cka-probe, batches given` gets what `bare` gets, so that the difference is hooks, Gram matrices
and sums alone. Convolutions are in TF32, torch's default, for everybody and for the truth, which
takes the rest in float64 on the card. torch-cka, which compares two scales at a time, would take
minutes and is left out unless asked for (`--without none`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from bench_jobs import Job, bare, blocks, by_pytorch_cka, by_torch_cka, sizes, twenty
from torch import Tensor, nn

import cka_probe
from cka_probe.collect import Collector
from cka_probe.estimators import Minibatch
from cka_probe.images import order

SIDES = [32, 40, 48, 56, 64, 72, 80, 96]
WIDE = [64, 128, 256, 512, 1024, 2048]


def card_jobs(device: str, share: int = 1) -> dict[str, Callable[[], Job]]:
    """The jobs by name; `share` divides their images and batches, to try them on a CPU."""
    k = share
    resnet18 = partial(_network, "resnet18", _layers18, 64, 4096 // k, 256 // k, device)
    blocks50 = partial(_network, "resnet50", blocks, 224, 512 // k, 64 // k, device)
    convs50 = partial(_network, "resnet50", _convolutions, 64, 2048 // k, 256 // k, device)
    scales = partial(_scales, 512 // k, 128 // k, device)
    return {
        f"resnet18@64, 18 layers, {4096 // k} images": resnet18,
        f"resnet50@224, 17 blocks, {512 // k} images": blocks50,
        f"resnet50@64, 53 convolutions, {2048 // k} images": convs50,
        f"8 scales x 17 blocks, {512 // k} images": scales,
        f"features, n = {2048 // k}, 20 layers": partial(_features, 2048 // k, twenty(), device),
        f"features, n = {10000 // k}, 6 layers": partial(_features, 10000 // k, WIDE, device),
        f"rbf features, n = {2048 // k}, 20 layers": partial(
            _features, 2048 // k, twenty(), device, "rbf"
        ),
    }


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _layers18(model: nn.Module) -> list[str]:
    return [*(name for name in _convolutions(model) if "down" not in name), "fc"]


def _engine(
    model: nn.Module, layers: list[str], views: list[Tensor], batch: int, device: str
) -> np.ndarray:
    """Hooks and sums, on the batches of `bare`."""
    estimator = Minibatch(-(-len(views[0]) // batch))
    with Collector(model, layers) as collector:
        for index, parts in enumerate(zip(*(view.split(batch) for view in views), strict=True)):
            for view, part in enumerate(parts):
                sink = lambda tap, x, view=view: estimator.put((view, tap), x)  # noqa: E731
                collector.run(part.to(device), sink)
            estimator.close_batch(index)
    return np.asarray(estimator.result().cka)


def _network(
    name: str, layers_of: Callable[[nn.Module], list[str]], side: int, n: int, batch: int,
    device: str,
) -> Job:  # fmt: skip
    model = getattr(torchvision.models, name)().eval().to(device)
    layers = layers_of(model)
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    ordered = images[order(n, 0)]  # the others' batches hold the same images as ours

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, [ordered], batch, device),
            "cka-probe": ours,
            "cka-probe, batches given": lambda: _engine(model, layers, [ordered], batch, device),
            "pytorch-cka": lambda: by_pytorch_cka(model, layers, ordered, batch, device),
        },
        ("bare", "pytorch-cka"),
        lambda: _truth(model, layers, [ordered], batch, device),
    )


def _scales(n: int, batch: int, device: str) -> Job:
    model = torchvision.models.resnet50().eval().to(device)
    layers = blocks(model)
    images = torch.randn(n, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    views = sizes(images[order(n, 0)], SIDES)

    def ours() -> np.ndarray:
        how = {"layers": layers, "batch_size": batch, "progress": False}
        return cka_probe.probe(model, images, SIDES, **how).cka

    return Job(
        {
            "bare": lambda: bare(model, views, batch, device),
            "cka-probe": ours,
            "cka-probe, batches given": lambda: _engine(model, layers, views, batch, device),
            "torch-cka": lambda: by_torch_cka(model, layers, views, batch, device),
        },
        ("bare", "torch-cka"),
        lambda: _truth(model, layers, views, batch, device),
        once=("torch-cka",),
    )


def _features(n: int, widths: list[int], device: str, kernel: str = "linear") -> Job:
    g = torch.Generator().manual_seed(0)
    shared, kept = torch.randn(n, 32, generator=g), dict[str, Tensor]()
    for k, d in enumerate(widths):
        x = shared @ torch.randn(32, d, generator=g) / 4 + torch.randn(n, d, generator=g)
        kept[f"layer {k}"] = x.to(device)

    def ours(kernel: str) -> np.ndarray:
        return cka_probe.cka_matrix(kept, kernel=kernel).cka

    def theirs() -> Any:
        return __import__("cka").cka_from_features(*[list(kept.values())] * 2)

    def truth() -> np.ndarray:
        grams = torch.stack([_gram(x, kernel) for x in kept.values()])
        return _ratio(_song(grams))

    calls = {"cka-probe": lambda: ours(kernel)}
    if kernel == "rbf":
        return Job({**calls, "linear": lambda: ours("linear")}, ("linear",), truth)
    return Job({**calls, "pytorch-cka": theirs}, ("pytorch-cka",), truth)


def _truth(
    model: nn.Module, layers: list[str], views: list[Tensor], batch: int, device: str
) -> np.ndarray:
    """Grams of every output as it is put out, HSIC of batches weighted by their size."""
    modules, grams = dict(model.named_modules()), list[Tensor]()
    hooks = [
        modules[name].register_forward_hook(lambda _m, _x, out: grams.append(_gram(out.flatten(1))))
        for name in layers
    ]
    total: Any = 0.0
    with torch.inference_mode():
        for parts in zip(*(view.split(batch) for view in views), strict=True):
            grams.clear()
            for part in parts:
                model(part.to(device))
            total = total + len(parts[0]) * _song(torch.stack(grams))
    for hook in hooks:
        hook.remove()
    return _ratio(total)


def _gram(x: Tensor, kernel: str = "linear") -> Tensor:
    """(n, n) float64, of centred features or of distances."""
    x = x.double()
    x = x - x.mean(0)
    g = x @ x.T
    if kernel == "linear":
        return g
    own = g.diagonal().clone()
    squares = (own[:, None] + own - 2 * g).clamp_(min=0)
    pairs = squares[tuple(torch.triu_indices(len(x), len(x), 1, device=x.device))].sort().values
    middle = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
    return torch.exp(-squares / (2 * middle))


def _song(k: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs of (m, n, n) Grams, (m, m): Song et al. 2012, equation 5."""
    n = k.shape[-1]
    trace = k.diagonal(dim1=1, dim2=2).sum(1)
    k = k - ((k.sum((1, 2)) - trace) / (n * (n - 1)))[:, None, None]  # keeps digits
    k.diagonal(dim1=1, dim2=2).zero_()
    rows, flat = k.sum(2), k.flatten(1)
    whole = rows.sum(1)
    first, second = flat @ flat.T, torch.outer(whole, whole) / ((n - 1) * (n - 2))
    return (first + second - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def _ratio(hsic: Tensor) -> np.ndarray:
    scale = hsic.diagonal().sqrt()
    return np.asarray((hsic / scale[:, None] / scale).cpu())
