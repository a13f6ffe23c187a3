"""`probe`: CKA between all layers of a network at several input sizes, or of several networks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cka_probe.activations.layers import Layers
from cka_probe.activations.reduce import Reducer
from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.kernels import Block
from cka_probe.probing.options import ProbeOptions, Views
from cka_probe.probing.run import REPORT, Run
from cka_probe.report import Report

__all__ = ["REPORT", "Views", "probe"]


def probe(
    model: nn.Module | None,
    images: Any,
    scales: Sequence[int] | None = None,
    *,
    views: Views | None = None,
    layers: Layers = None,
    reference: str | int | None = None,
    resize: str = "native",
    antialias: bool = True,
    kernel: str | Block = "linear",
    bandwidth: float | None = None,
    reduce: str | Reducer = "flatten",
    layout: str | None = None,
    estimator: str = "minibatch",
    batch_size: int = 64,
    n_images: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    amp: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
    memory: str | int | None = None,
    sketch_size: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    ranks: Ranks | None = None,
    say: Callable[[str], None] | None = None,
) -> Report:
    """CKA of every layer at every scale with every other, with error bars, from one pass.

    Kornblith et al. 2019 (CKA), Song et al. 2012 (HSIC_1), Nguyen et al. 2021 (minibatches). S
    views cost S forwards: all pairs come from the same pass. The network is in eval mode during the
    run; its training flags and the global random state are restored afterwards.

    Args:
        model: the network; may be None where every view brings its own.
        images: a folder, a torchvision dataset, any `Dataset`, or a (n, c, h, w) float tensor.
            Pixels (files, PIL images) become RGB, a centre square, one resize, normalised; tensors
            are resized only.
        scales: sides in pixels; each is a view named by it. None: the images as they are.
        views: {name: (network or None, transform or None)} instead of scales: the transform takes
            one decoded image (c, h, w) and its result is fed as it is; None normalises pixels. A
            bare network stands for (network, None).
        layers: names, globs (`*` crosses dots), `re:` patterns, module types, a callable, or None
            for the network's own blocks.
        reference: the view that `report.against()` compares with; the largest scale, or the first
            of `views`. A scale that is not in `scales` is added.
        resize: "native" feeds s x s; "restore" resizes down to s and back up to the reference.
        antialias: widen the filter when shrinking; False repeats the MSUN paper.
        kernel: "linear", "rbf", or a callable on centred features.
        bandwidth: RBF sigma as a multiple of the median distance; 1 where None.
        reduce: "flatten", "mean", "grid=K", "tokens", or a callable (n, ...) -> (n, d).
        layout: where outputs hold their channels: "channels_first", "channels_last", or None to
            follow it through the network's operators; "mean" and "grid=K" average the other axes.
        estimator: "minibatch" (memory does not grow with images), "exact" (features are kept, so
            that they must fit in `memory`), "sketch" (k numbers of every layer and image are kept),
            or "auto": the closest to `exact` that fits; `meta["estimator_why"]` says why.
        batch_size: images per batch, which `minibatch` depends on a little; at least 4.
        n_images: a seeded random subset of the sorted images; None for all.
        seed: of the subset, the order of images and random transforms.
        mean: per channel, for pixels; ImageNet's where None. With tensors: none unless given.
        std: as `mean`.
        device: where the forwards run; None for where the model is.
        amp: autocast to bfloat16 for the network only; Grams stay in float32.
        skip_bad: leave out images that cannot be read, and name them in `report.meta`.
        workers: processes that decode images; 0 decodes here.
        memory: budget above the forwards, bytes or "4GiB", where the features are. None: what is
            free for `exact`, half of it for "auto"; on a CUDA card at most half of what it has.
        sketch_size: k of `sketch`; 512 where None.
        out: folder for the saved state and the finished report.npz; None saves nothing. The state
            of an interrupted run that is there already is refused unless `resume` is set.
        resume: continue from the state saved in `out`, with any number of processes; with none
            there, start anew.
        progress: show a progress bar.
        ranks: the processes that share this run, each calling with the same arguments: what
            `cka_probe.distributed.ranks.started` yields. None: this process alone, whoever else
            there is.
        say: a function that takes a line of text, called before the first batch with the images,
            the views, the estimator that "auto" chose and why, and an estimate of the costs.

    Returns:
        A Report whose entries are views in the order given, layers in execution order.

    Raises:
        ValueError: bad input, named; a size that the network refuses; NaN or Inf features; a
            saved state that is damaged or of another run.
        LostRankError: another process died or failed.

    >>> from cka_probe import probe
    >>> from cka_probe.inputs import glyphs
    >>> from cka_probe.models.embedded import glyphnet
    >>> images, _ = glyphs.tensor("test", 64)
    >>> report = probe(glyphnet(), images, [16, 64], batch_size=16, progress=False)
    >>> report.against().shape, report.cka.shape
    ((7, 2), (14, 14))
    """
    options = ProbeOptions(
        scales=scales, views=views, layers=layers, reference=reference, resize=resize,
        antialias=antialias, kernel=kernel, bandwidth=bandwidth, reduce=reduce, layout=layout,
        estimator=estimator, batch_size=batch_size, n_images=n_images, seed=seed, mean=mean,
        std=std, device=device, amp=amp, skip_bad=skip_bad, workers=workers, memory=memory,
        sketch_size=sketch_size, out=out, resume=resume,
    )  # fmt: skip
    return Run(model, images, options, ranks=ranks, say=say).report(progress=progress)
