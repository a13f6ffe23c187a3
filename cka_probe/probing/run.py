"""One run of `probe`: views and estimator are resolved, the loop runs once, a Report comes out."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.activations.firing import default_selections, module_calls
from cka_probe.activations.hooks import Tap
from cka_probe.activations.layers import Layers, unwrap
from cka_probe.activations.macs import merge_tables
from cka_probe.activations.meta import check_loaded
from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.kernels import get_kernel
from cka_probe.engine.memory import free_memory, readable
from cka_probe.functional import nan_reasons, warn_degenerate
from cka_probe.inputs.batches import Source, open_images, plan
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.views import (
    NATIVE,
    Transform,
    View,
    apply_view,
    check_range,
    scale_transforms,
    view_transforms,
)
from cka_probe.io import plain
from cka_probe.models.preprocessing import channel_constants, input_channels
from cka_probe.probing.choose import AUTO, ESTIMATORS, Choice, check_exact_fits, choose_estimator
from cka_probe.probing.forecast import Estimate, estimate, estimator_bytes, seconds_on_this_cpu
from cka_probe.probing.forward import device_of
from cka_probe.probing.loop import Loop
from cka_probe.probing.metadata import estimator_meta, repeated_options, run_fingerprint
from cka_probe.probing.options import ProbeOptions, check_network
from cka_probe.probing.state import STATE, differences, refuse_other, saved_options
from cka_probe.provenance import versions
from cka_probe.report import Report

__all__ = ["REPORT", "Run", "refuse_interrupted"]

REPORT = "report.npz"


class Run:
    """One call of `probe`.

    Args:
        model: the network; None where every view brings its own.
        images: as in `probe`.
        options: the validated options.
        ranks: the processes that share the run; None for this process alone.
        say: a function that takes the lines of text to announce; None says nothing. Rank 0 alone
            speaks.

    Raises:
        TypeError: `model` is no network.
        ValueError: images, views or a memory budget that cannot be used; an interrupted run is in
            the output folder and `resume` is not set.
    """

    def __init__(
        self,
        model: nn.Module | None,
        images: Any,
        options: ProbeOptions,
        *,
        ranks: Ranks | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if model is not None:
            check_network("model", model)
        self.options, self.ranks = options, ranks or Ranks()
        self.say = say if self.ranks.first else None
        self.folder = None if options.out is None else Path(options.out)
        if self.folder is not None and self.ranks.first and not options.resume:
            refuse_interrupted(self.folder)
        self.source: Source = open_images(images, n_images=options.n_images, seed=options.seed)
        self.plan = plan(len(self.source), options.batch_size)
        self.models, self.transforms, self.reference = _resolve_views(model, options, self.source)
        # every rank has its own free memory: the choice of rank 0 holds
        for net in self.models.values():
            check_loaded(net)
        counts = {input_channels(unwrap(net)) for net in self.models.values()}
        if len(counts) == 1:  # else the transforms of the views convert
            self.source.use_channels(*counts)
        self._check_ranges()
        self.choice: Choice = self.ranks.agree(self._choose())
        self.fingerprint = run_fingerprint(
            options, self.models, self.transforms, self.reference, self.source, self.choice
        )

    def report(self, *, progress: bool) -> Report:
        """The finished report where there is one to resume, else that of a run; on every process.

        Args:
            progress: whether rank 0 shows a progress bar.

        Raises:
            ValueError: the processes have different options or data; as `probe` says.
            LostRankError: another process died or failed.
        """
        self._check_same_on_all_ranks()
        if self.folder is not None:  # a saved state or report is compared with later runs
            content = self.source.fingerprint(progress=progress) if self.ranks.first else None
            images = {"name": self.source.name, "sha256": self.ranks.agree(content)}
            self.fingerprint = {**self.fingerprint, "images": images}
        done = self.ranks.agree(self._finished() if self.ranks.first else None)
        if done is None:
            done = self.ranks.agree(self._execute(progress=progress))
        assert isinstance(done, Report)
        return done

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """View -> (c, h, w) of the first image that can be read."""
        first = self._first_image()
        if first is None:
            return None
        label, image = first
        return {
            view: tuple(apply_view(transform, image, self.options.seed, label, view).shape)
            for view, transform in self.transforms.items()
        }

    @cached_property
    def forecast(self) -> Estimate | None:
        """Sizes and costs, from shapes alone."""
        if self.shapes is None:
            return None
        return estimate(
            {view: unwrap(model) for view, model in self.models.items()},
            self.shapes,
            batch_size=self.options.batch_size,
            layers=self.layers,
            reduce=self.options.reduce,
            layout=self.options.layout,
        )

    @cached_property
    def layers(self) -> dict[str, Layers]:
        """View -> the layers to tap: the user's, else the default ones that fire."""
        if self.options.layers is not None:
            return dict.fromkeys(self.models, self.options.layers)
        runs: dict[int, list[list[str]]] = {}
        for view, model in self.models.items():
            calls = module_calls(unwrap(model), self.shapes[view]) if self.shapes else None
            if calls is not None:
                runs.setdefault(id(model), []).append(calls)
        return {
            view: default_selections(model, runs[id(model)]) if id(model) in runs else None
            for view, model in self.models.items()
        }

    def _check_ranges(self) -> None:
        """Compare each view's mean and std with the range of the images."""
        views = [view for view in self.transforms.values() if isinstance(view, View)]
        image = None
        if not self.source.is_pixels:
            first = self._first_image() if any(view.mean for view in views) else None
            if first is None:
                return
            _, image = first
        for view in views:
            check_range(view.mean, view.std, image)

    def _first_image(self) -> tuple[str, Tensor] | None:
        """Name and pixels of the first image that can be read, which is kept for the run."""
        for i in range(len(self.source)):
            with suppress(ImageError):
                return self.source.ids[i], self.source.preview(i)
        return None

    def _choose(self) -> Choice:
        """The estimator that the user named, or for "auto" the one that fits the budget."""
        options, n = self.options, len(self.source)
        if options.estimator != AUTO:
            choice = Choice(options.estimator, "", self._budget(), options.sketch_width)
            if choice.estimator == "exact" and self.forecast is not None:
                check_exact_fits(self.forecast.widths, n, choice.memory)
            return choice
        if options.resume and self.folder is not None:  # a resumed run keeps its estimator
            if (self.folder / REPORT).exists():
                done = Report.load(self.folder / REPORT).meta
                size = done.get("sketch", {}).get("size")
                name = str(done.get("estimator", "minibatch"))
                return Choice(name, "as the finished run", options.memory_bytes or 0, size)
            if (self.folder / STATE).exists():
                saved = saved_options(self.folder)
                name, size = saved.get("estimator", "minibatch"), saved.get("sketch_size")
                return Choice(str(name), "as the saved state", self._budget(), size)
        return choose_estimator(
            self.forecast.widths if self.forecast else None,
            n=n,
            batch=options.batch_size,
            kernel=get_kernel(options.kernel),
            memory=self._budget(share=2),  # half of what is free: the forwards need some too
            size=options.sketch_size,
        )

    def _budget(self, share: int = 1) -> int:
        """Bytes to use: the user's, else a share of what is free where the features will be."""
        if self.options.memory_bytes is not None:
            return self.options.memory_bytes
        devices = [device_of(net) for net in self.models.values()]
        if self.options.device is not None:
            with suppress(RuntimeError):  # a bad device is refused by name when it is used
                devices = [torch.device(self.options.device)]
        return free_memory(devices, share)

    def _announce(self) -> None:
        """Say what will be done and what it takes, once layers and devices are known to be good."""
        if self.say is None:
            return
        n, options = len(self.source), self.options
        self.say(f"{n} images of {self.source.name}, views {', '.join(self.transforms)}")
        if self.source.skipped:
            self.say(f"files left out: {self.source.skipped}")
        if options.estimator == AUTO:
            self.say(f"auto: {self.choice.estimator}, as {self.choice.why}")
        cost = self.forecast
        if cost is None:
            self.say("no estimate: the network cannot be called without data")
            return
        memory = cost.batch_bytes + estimator_bytes(
            self.choice.estimator,
            cost.widths,
            n_images=n,
            batch_size=options.batch_size,
            sketch_size=self.choice.size or options.sketch_width,
            rbf=get_kernel(options.kernel).needs_bandwidth,
        )
        time_needed = ""
        if all(device_of(model).type == "cpu" for model in self.models.values()):
            seconds = seconds_on_this_cpu(cost.gmacs * n)
            text = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
            time_needed = f", about {text} on this CPU (within a factor of three)"
        self.say(
            f"estimate: {cost.gmacs:.2f} GMACs an image, {len(cost.widths)} layers x views"
            f"{time_needed}, {readable(memory)} of memory"
        )

    def _finished(self) -> Report | None:
        """The finished report of the same run, where the user resumes it after its end."""
        if not self.options.resume or self.folder is None or not (self.folder / REPORT).exists():
            return None
        report = Report.load(self.folder / REPORT)
        refuse_other(report.meta.get("run", {}), self.fingerprint, "finished report")
        return report

    def _check_same_on_all_ranks(self) -> None:
        ours = plain(self.fingerprint)
        for rank, theirs in enumerate(self.ranks.gather(ours)):
            for name, value, own in differences(theirs, ours):
                raise ValueError(
                    f"processes differ: {name} is {value!r:.40} on rank {rank}, {own!r:.40} on "
                    "rank 0: give all the same"
                )

    def _execute(self, *, progress: bool) -> Report | None:
        """Run every forward, then make the report on rank 0; None on the others."""
        n, options = len(self.source), self.options
        more: dict[str, Any] = {} if self.choice.estimator == "minibatch" else {"n_images": n}
        if self.choice.estimator == "sketch":
            more |= {"seed": options.seed, "size": self.choice.size}
        estimator = ESTIMATORS[self.choice.estimator](
            len(self.plan),
            kernel=get_kernel(options.kernel),
            bandwidth=self.fingerprint["bandwidth"],
            **more,
        )
        loop = Loop(
            estimator, self.source, self.plan, options=self.fingerprint, folder=self.folder,
            ranks=self.ranks,
        )  # fmt: skip
        began = time.perf_counter()
        results = loop.run(
            self.models, self.transforms, options, progress=progress, say=self.say,
            announce=self._announce, layers=self.layers,
        )  # fmt: skip
        if not self.ranks.first:
            return None
        result = loop.estimator.compute()
        keys: list[tuple[str, Tap]] = result.keys
        labels = [results.labels[view][tap] for view, tap in keys]
        views = [view for view, _ in keys]
        entries = [f"layer {a!r} in view {b!r}" for b, a in zip(views, labels, strict=True)]
        warn_degenerate(result, entries)
        meta = {
            **repeated_options(self.fingerprint),
            "n_images": n - len(loop.left_out),
            "groups": result.groups,
            "unbiased": True,
            "run": self.fingerprint,
            "left_out": loop.left_out,
            "files_left_out": self.source.skipped,
            "left_out_readable": loop.too_few,
            "unreached": results.unreached,
            "nan": nan_reasons(result, entries),
            "skipped": results.skipped,
            "layers": merge_tables(results.tables.values()),
            "view_macs": results.macs,
            "versions": versions(),
            "processes": self.ranks.size,
            "seconds": round(time.perf_counter() - began, 3),
            **estimator_meta(options, self.choice, result),
        }
        if options.resume:
            meta["resumed_from_batch"] = loop.start
        report = Report(
            cka=result.cka,
            stderr=result.stderr,
            view=np.array(views),
            layer=np.array(labels),
            meta=meta,
        )
        if self.folder is not None:
            report.save(self.folder / REPORT)
            loop.saver.clear()
        return report


def refuse_interrupted(folder: Path) -> None:
    """Refuse to start anew over the saved state of an interrupted run.

    Args:
        folder: the output folder.

    Raises:
        ValueError: a saved state is there.
    """
    if (folder / STATE).exists():
        raise ValueError(
            f"an interrupted run is there: {folder / STATE}: continue it with resume=True "
            "(--resume), or delete that file (--overwrite) to start anew"
        )


def _resolve_views(
    model: nn.Module | None, options: ProbeOptions, source: Source
) -> tuple[dict[str, nn.Module], dict[str, Transform], str]:
    """View -> network, view -> transform, and the name of the reference view."""
    if options.views is not None:
        # `is None`: an empty nn.Sequential, the identity, is false and yet a network.
        models = {
            name: model if own is None else own for name, (own, _) in options.view_pairs.items()
        }
        absent = [name for name, given in models.items() if given is None]
        if absent or not models:
            raise ValueError(f"no network: view {(absent or [''])[0]!r}: give one, or model=")
        networks = {name: given for name, given in models.items() if given is not None}
        transforms: dict[str, Transform] = {}
        for name, (_, transform) in options.view_pairs.items():
            constants = _pixel_constants(networks[name], options, source)
            transforms |= view_transforms({name: transform}, **constants)
        first = next(iter(networks))
        return networks, transforms, first if options.reference is None else str(options.reference)
    if model is None:
        raise ValueError("no network: model=None: give one, or views={name: (model, ...)}")
    scales = None if options.scales is None else list(options.scales)
    transforms = scale_transforms(
        scales,
        reference=options.reference,
        resize=options.resize,
        antialias=options.antialias,
        **_pixel_constants(model, options, source),
    )
    reference = NATIVE
    if scales is not None:
        reference = str(max(scales) if options.reference is None else options.reference)
    return dict.fromkeys(transforms, model), transforms, reference


def _pixel_constants(model: nn.Module, options: ProbeOptions, source: Source) -> dict[str, Any]:
    """Mean and std per channel: the user's; for pixels else timm's own, else ImageNet's."""
    mean, std = options.mean, options.std
    if mean is None and std is None and source.is_pixels:
        return channel_constants(unwrap(model))
    return {"mean": mean, "std": std}
