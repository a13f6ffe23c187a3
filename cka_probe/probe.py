"""The loop: images through every view, features into one estimator, a Report out."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cka_probe import state
from cka_probe.collect import Tap
from cka_probe.estimators import ESTIMATORS, Exact, Minibatch
from cka_probe.features import warn_degenerate
from cka_probe.files import plain
from cka_probe.forwards import Forwards
from cka_probe.images import Source, batches, open_images, plan
from cka_probe.kernels import Block, get_kernel
from cka_probe.layers import Layers
from cka_probe.memory import check_features, parse_memory
from cka_probe.models import IMAGENET
from cka_probe.progress import progress_bar
from cka_probe.provenance import merge_tables, model_sha256, versions
from cka_probe.reduce import Reducer, reducer_name
from cka_probe.report import Report
from cka_probe.state import STATE, load_state, save_state
from cka_probe.views import NATIVE, Transform, scale_transforms, view_transforms

REPORT = "report.npz"

Views = Mapping[str, tuple[nn.Module | None, Transform | None]]


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
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """CKA of every layer at every scale with every other, with error bars, from one pass.

    Kornblith et al. 2019 (CKA), Song et al. 2012 (HSIC_1), Nguyen et al. 2021 (minibatches). S
    views cost S forwards: all pairs come from the same pass. The network is in eval mode meanwhile
    and as it was afterwards, like the global random state.

    Args:
        model: the network; may be None where every view brings its own.
        images: a folder, a torchvision dataset, any `Dataset`, or a (n, c, h, w) float tensor.
            Pixels (files, PIL images) become RGB, a centre square, one resize, normalised; tensors
            are resized only.
        scales: sides in pixels; each is a view named by it. None: the images as they are.
        views: {name: (network or None, transform or None)} instead of scales: the transform takes
            one decoded image (c, h, w) and its result is fed as it is; None normalises pixels.
        layers: names, globs (`*` crosses dots), `re:` patterns, module types, a callable, or None
            for the network's own blocks.
        reference: the view that `report.against()` compares with; the largest scale, or the first
            of `views`. A scale that is not in `scales` is added.
        resize: "native" feeds s x s; "restore" resizes down to s and back up to the reference.
        antialias: widen the filter when shrinking; False repeats the MSUN paper.
        kernel: "linear", "rbf", or a callable on centred features.
        bandwidth: RBF sigma as a multiple of the median distance; 1 where None.
        reduce: "flatten", "mean", "grid=K", "tokens", or a callable (n, ...) -> (n, d).
        estimator: "minibatch" (memory does not grow with images) or "exact" (features are kept).
        batch_size: images per batch, which `minibatch` depends on a little; at least 4.
        n_images: a seeded random subset of the sorted images; None for all.
        seed: of the subset, the order of images and random transforms.
        mean: per channel, for pixels; ImageNet's where None. With tensors: none unless given.
        std: as `mean`.
        device: where the forwards run; None for where the model is.
        amp: autocast to bfloat16 for the network only; Grams stay in float32.
        skip_bad: leave out images that cannot be read, and name them in `report.meta`.
        workers: processes that decode images; 0 decodes here.
        memory: budget for the features that `exact` keeps, bytes or "4GiB"; what is free if None.
        out: folder for the saved state and the finished report.npz; None saves nothing.
        resume: continue from the state saved in `out`; with none there, start anew.
        progress: show a progress bar.

    Returns:
        A Report whose entries are views in the order given, layers in execution order.

    Raises:
        ValueError: bad input, named; a size that the network refuses; NaN or Inf features; a
            saved state of another run.
    """
    run = _Run(
        model, images, scales, views=views, layers=layers, reference=reference, resize=resize,
        antialias=antialias, kernel=kernel, bandwidth=bandwidth, reduce=reduce,
        estimator=estimator, batch_size=batch_size, n_images=n_images, seed=seed, mean=mean,
        std=std, device=device, amp=amp, skip_bad=skip_bad, workers=workers, memory=memory,
        out=out, resume=resume,
    )  # fmt: skip
    return run.finished() or run.execute(progress=progress)


class _Run:
    """One call of `probe`: what was asked, made ready, then executed once."""

    def __init__(self, model: nn.Module | None, images: Any, scales: Any, **ask: Any) -> None:
        self.ask = ask
        self.kernel = get_kernel(ask["kernel"])
        self.bandwidth = 1.0 if ask["bandwidth"] is None else float(ask["bandwidth"])
        if not self.bandwidth > 0:
            raise ValueError(f"bad bandwidth: {self.bandwidth}: give a fraction above 0, usually 1")
        if ask["estimator"] not in ESTIMATORS:
            known = ", ".join(ESTIMATORS)
            raise ValueError(f"unknown estimator: {ask['estimator']!r}: known ones are {known}")
        self.memory = parse_memory(ask["memory"])
        self.out = Path(ask["out"]) if ask["out"] is not None else None
        if ask["resume"] and self.out is None:
            raise ValueError("resume without a folder: out=None: give out=, where the state lies")
        self.source: Source = open_images(images, n_images=ask["n_images"], seed=ask["seed"])
        self.plan = plan(len(self.source), ask["batch_size"])
        self.models, self.transforms, self.reference = self._views(model, scales)
        self.options = self._options()

    def _views(
        self, model: nn.Module | None, scales: Any
    ) -> tuple[dict[str, nn.Module], dict[str, Transform], str]:
        ask = self.ask
        if ask["views"] is None:
            if model is None:
                raise ValueError("no network: model=None: give one, or views={name: (model, ...)}")
            if scales is not None and str(ask["reference"]).isdecimal():
                scales = [*scales, *({int(ask["reference"])} - set(scales))]
            transforms = scale_transforms(
                scales,
                reference=ask["reference"],
                resize=ask["resize"],
                antialias=ask["antialias"],
                **self._norm(model),
            )
            reference = NATIVE if scales is None else str(ask["reference"] or max(scales))
            return dict.fromkeys(transforms, model), transforms, reference
        if scales is not None:
            raise ValueError("scales and views: both given: a view brings its own transform")
        models = {name: given or model for name, (given, _) in ask["views"].items()}
        absent = [name for name, given in models.items() if given is None]
        if absent or not models:
            raise ValueError(f"no network: view {(absent or [''])[0]!r}: give one, or model=")
        transforms = {}
        for name, (_, transform) in ask["views"].items():
            transforms |= view_transforms({name: transform}, **self._norm(models[name]))
        reference = str(ask["reference"] or next(iter(models)))
        if reference not in models:
            known = ", ".join(models)
            raise ValueError(f"unknown reference view: {reference!r}: known views are {known}")
        return {name: m for name, m in models.items() if m is not None}, transforms, reference

    def _norm(self, model: nn.Module | None) -> dict[str, Any]:
        """Mean and std: what was given; for pixels else timm's own, else ImageNet's."""
        mean, std = self.ask["mean"], self.ask["std"]
        if mean is None and std is None and self.source.is_pixels:
            cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
            cfg = cfg if isinstance(cfg, Mapping) else {}
            mean, std = ({**IMAGENET, **cfg}[key] for key in ("mean", "std"))
        return {"mean": mean, "std": std}

    def _options(self) -> dict[str, Any]:
        """What could change a number, as JSON: the run's fingerprint."""
        ask = self.ask
        shas = {id(m): model_sha256(m) for m in self.models.values()}
        return {
            "views": {
                name: {"model": shas[id(m)], "transform": repr_of(self.transforms[name])}
                for name, m in self.models.items()
            },
            "reference": self.reference,
            "images": {"name": self.source.name, "sha256": self.source.fingerprint()},
            "n_images": len(self.source),
            "layers": repr_of(ask["layers"]),
            "resize": ask["resize"],
            "antialias": ask["antialias"],
            "kernel": self.kernel.name,
            "bandwidth": self.bandwidth,
            "reduce": reducer_name(ask["reduce"]),
            "estimator": ask["estimator"],
            "batch_size": ask["batch_size"],
            "seed": ask["seed"],
            "amp": bool(ask["amp"]),
            "skip_bad": bool(ask["skip_bad"]),
        }

    def finished(self) -> Report | None:
        """The report of the same run, where it is being resumed after its end."""
        if not self.ask["resume"] or self.out is None or not (self.out / REPORT).exists():
            return None
        report = Report.load(self.out / REPORT)
        for name, value in plain(self.options).items():
            if report.meta.get("run", {}).get(name) != value:
                raise ValueError(
                    f"finished report of another run: {name} differs: run without --resume and "
                    "with --overwrite, or as before"
                )
        return report

    def execute(self, *, progress: bool) -> Report:
        """Make every forward, then the report."""
        ask = self.ask
        estimator = ESTIMATORS[ask["estimator"]](
            len(self.plan), kernel=self.kernel, bandwidth=self.bandwidth
        )
        start, bad = 0, list[str]()
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            if ask["resume"] and isinstance(estimator, Minibatch):
                start, bad = load_state(self.out, estimator, self.options) or (0, [])
        began = time.perf_counter()
        with ExitStack() as stack:
            work = Forwards(
                self.models, estimator, stack, layers=ask["layers"], reduce=ask["reduce"],
                device=ask["device"], amp=ask["amp"],
            )  # fmt: skip
            bar = stack.enter_context(
                progress_bar(
                    len(self.source), desc="probe", unit="image",
                    initial=self._images_before(start), show=progress,
                )
            )  # fmt: skip
            stream = stack.enter_context(
                closing(
                    batches(
                        self.source, self.transforms, batch_size=ask["batch_size"],
                        seed=ask["seed"], workers=ask["workers"], skip_bad=ask["skip_bad"],
                        start=start,
                    )
                )
            )  # fmt: skip
            saved = time.perf_counter()
            following = start
            try:
                for batch in stream:
                    bad += [*batch.bad, *batch.left_out]
                    if batch.views:
                        work.take(batch, bar)
                    if isinstance(estimator, Exact) and batch.index == start:
                        check_features(estimator, len(self.source), self.memory)
                    following = batch.index + 1
                    if time.perf_counter() - saved > state.SAVE_EVERY_S:
                        self._save(estimator, following, bad)
                        saved = time.perf_counter()
                bar.leave = True
            except KeyboardInterrupt:
                self._save(estimator, following, bad)
                raise
        if not work.tables:
            raise ValueError(f"no readable images: {len(bad)} left out: check the files")
        result = estimator.result()
        keys: list[tuple[str, Tap]] = result.keys
        labels = [work.collectors[view].labels[tap] for view, tap in keys]
        names = [
            f"layer {label!r} in view {view!r}"
            for (view, _), label in zip(keys, labels, strict=True)
        ]
        warn_degenerate(result, names)
        meta = {
            **{
                k: self.options[k] for k in ("reference", "kernel", "bandwidth", "reduce", "resize")
            },
            **{k: self.options[k] for k in ("estimator", "batch_size", "seed", "antialias")},
            "n_images": len(self.source) - len(bad),
            "groups": result.groups,
            "unbiased": True,
            "run": self.options,
            "left_out": bad,
            "unreached": sorted({p for c in work.collectors.values() for p in c.unreached}),
            "skipped": {p: why for c in work.collectors.values() for p, why in c.skipped.items()},
            "layers": merge_tables(work.tables.values()),
            "view_macs": work.macs,
            "versions": versions(),
            "seconds": round(time.perf_counter() - began, 3),
        }
        if start:
            meta["resumed_from_batch"] = start
        report = Report(
            cka=result.cka,
            stderr=result.stderr,
            view=np.array([view for view, _ in keys]),
            layer=np.array(labels),
            meta=meta,
        )
        if self.out is not None:
            report.save(self.out / REPORT)
            (self.out / STATE).unlink(missing_ok=True)
        return report

    def _images_before(self, batch: int) -> int:
        return sum(rows.stop - rows.start for rows in self.plan[:batch])

    def _save(self, estimator: Any, following: int, bad: list[str]) -> None:
        """Save the sums, unless there is nothing worth it (or `exact`, whose state is the set)."""
        worth = 0 < following < len(self.plan)
        if (
            self.out is not None
            and worth
            and isinstance(estimator, Minibatch)
            and not estimator.waiting
        ):
            save_state(self.out, estimator, following, self.options, bad)


def repr_of(value: Any) -> Any:
    """A value as stable text: callables by their name, never by their address."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set):
        return [repr_of(item) for item in value]
    if isinstance(value, type) or (callable(value) and " at 0x" in repr(value)):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
