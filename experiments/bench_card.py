"""The jobs of bench_probe.py on a GPU: those of bench_jobs.py, in sizes that keep one busy.

512 small images take an H100 a few milliseconds, less than hashing a network's weights takes, so
there are more images here, and batches are larger. Images lie in the host's memory for everybody
and go to the card batch by batch; features at hand lie on the card. `cka-probe` is the whole of
`probe`: it also hashes network and images, and looks at each image apart, resizing it on the CPU.
`cka-probe, batches given` gets what `bare` gets, so that the difference is hooks, Gram matrices
and sums alone. Convolutions are in TF32, torch's default, for everybody and for the truth, which
takes the rest in float64 on the card (held against tests/helpers/oracle.py by
tests/experiments/test_bench_card.py).
torch-cka, which compares two scales at a time, would take minutes and is left out unless asked for
(`--without none`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_jobs import (
    Job,
    eight_scales,
    features,
    outputs,
    resnet18,
    resnet50_blocks,
    resnet50_convs,
    twenty,
)
from torch import Tensor, nn

from cka_probe.activations.hooks import Collector
from cka_probe.engine.minibatch import Minibatch

WIDE = [64, 128, 256, 512, 1024, 2048]
LEAST = 4  # images: fewer have no unbiased HSIC


def card_jobs(device: str, share: int = 1) -> dict[str, Callable[[], Job]]:
    """The jobs by name; `share` divides their images and batches, to try them on a CPU."""

    def network(make: Callable[..., Job], n: int, batch: int) -> Callable[[], Job]:
        return partial(_network, make, n // share, max(LEAST, batch // share), device)

    def at_hand(n: int, widths: list[int], kernel: str = "linear") -> Callable[[], Job]:
        return partial(_features, n // share, widths, kernel, device)

    k = share
    return {
        f"resnet18@64, 18 layers, {4096 // k} images": network(resnet18, 4096, 256),
        f"resnet50@224, 17 blocks, {512 // k} images": network(resnet50_blocks, 512, 64),
        f"resnet50@64, 53 convolutions, {2048 // k} images": network(resnet50_convs, 2048, 256),
        f"8 scales x 17 blocks, {512 // k} images": network(eight_scales, 512, 128),
        f"features, n = {2048 // k}, 20 layers": at_hand(2048, twenty()),
        f"features, n = {10000 // k}, 6 layers": at_hand(10000, WIDE),
        f"rbf features, n = {2048 // k}, 20 layers": at_hand(2048, twenty(), "rbf"),
    }


def _network(make: Callable[..., Job], n: int, batch: int, device: str) -> Job:
    """The job of bench_jobs.py, one contender more, its truth on the card."""
    job = make(n, batch, device)
    theirs = {**job.calls}
    calls = {who: theirs.pop(who) for who in ("bare", "cka-probe")}
    calls["cka-probe, batches given"] = lambda: _engine(*job.given, device)
    return job._replace(calls={**calls, **theirs}, truth=lambda: _truth(*job.given, device))


def _features(n: int, widths: list[int], kernel: str, device: str) -> Job:
    job = features(n, widths, kernel, device)
    return job._replace(truth=lambda: _truth_of_features(*job.given))


def _engine(
    model: nn.Module, layers: list[str], views: list[Tensor], batch: int, device: str
) -> np.ndarray:
    """Hooks and sums, on the batches of `bare`."""
    estimator = Minibatch(-(-len(views[0]) // batch))
    with Collector(model, layers) as collector:
        for index, parts in enumerate(zip(*(view.split(batch) for view in views), strict=True)):
            for view, part in enumerate(parts):
                collector.run(
                    part.to(device), lambda tap, x, view=view: estimator.update((view, tap), x)
                )
            estimator.end_batch(index)
    return np.asarray(estimator.compute().cka)


def _truth(
    model: nn.Module, layers: list[str], views: list[Tensor], batch: int, device: str
) -> np.ndarray:
    """Grams of every output as it is put out, HSIC of batches weighted by their size."""
    total: Any = 0.0
    for size, grams in outputs(model, layers, views, batch, _gram, device):
        total = total + size * _song(torch.stack(grams))
    return _ratio(total)


def _truth_of_features(kept: list[Tensor], kernel: str) -> np.ndarray:
    return _ratio(_song(torch.stack([_gram(x, kernel) for x in kept])))


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
