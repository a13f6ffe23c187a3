"""One run of `probe`: what was asked is made ready, the loop runs once, a Report comes out."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cka_probe.activations.hooks import Tap
from cka_probe.activations.macs import merge_tables, model_sha256, versions
from cka_probe.distributed.ranks import Ranks
from cka_probe.engine.bandwidth import check_bandwidth
from cka_probe.engine.kernels import Kernel, get_kernel
from cka_probe.engine.memory import free_memory, parse_memory
from cka_probe.engine.minibatch import ESTIMATORS, Result
from cka_probe.engine.projection import BLOCKS
from cka_probe.engine.sketch import check_linear, choose_size
from cka_probe.functional import warn_degenerate
from cka_probe.inputs.batches import Source, open_images, plan
from cka_probe.inputs.decode import ImageError
from cka_probe.inputs.views import NATIVE, Transform, look, scale_transforms, view_transforms
from cka_probe.io import plain
from cka_probe.models.load import IMAGENET
from cka_probe.probing.choose import AUTO, Choice, choose, spool_forecast, usable
from cka_probe.probing.fingerprint import described
from cka_probe.probing.forecast import Estimate, estimate
from cka_probe.probing.forward import device_of
from cka_probe.probing.loop import Loop
from cka_probe.probing.options import made_plain
from cka_probe.probing.state import STATE, differences, refuse_other, saved_options
from cka_probe.report import Report

REPORT = "report.npz"


class Run:
    """One call of `probe`: what was asked, made ready, then executed once."""

    def __init__(self, model: nn.Module | None, images: Any, scales: Any, **ask: Any) -> None:
        scales, ask = made_plain(model, scales, ask)
        self.ask = {**ask, "way_out": _way_out(scales, ask["resize"])}
        self.ranks: Ranks = ask.get("ranks") or Ranks()
        self.kernel = get_kernel(ask["kernel"])
        self.bandwidth = 1.0 if ask["bandwidth"] is None else ask["bandwidth"]
        check_bandwidth(self.bandwidth)
        if ask["estimator"] not in (*ESTIMATORS, AUTO):
            known = ", ".join((*ESTIMATORS, AUTO))
            raise ValueError(f"unknown estimator: {ask['estimator']!r}: known ones are {known}")
        self.memory = parse_memory(ask["memory"])
        sketched = ask["sketch_size"] is not None or ask["precision"] is not None
        size = choose_size(ask["sketch_size"], ask["precision"])
        if sketched and ask["estimator"] not in ("sketch", AUTO):
            raise ValueError(
                f"a sketch size for another estimator: {ask['estimator']!r}: use 'sketch' or 'auto'"
            )
        if ask["estimator"] == "sketch":
            check_linear(self.kernel)
        self.out = Path(ask["out"]) if ask["out"] is not None else None
        if ask["resume"] and self.out is None:
            raise ValueError("resume without a folder: out=None: give out=, where the state lies")
        self.source: Source = open_images(images, n_images=ask["n_images"], seed=ask["seed"])
        self.plan = plan(len(self.source), ask["batch_size"])
        self.models, self.transforms, self.reference = self._views(model, scales)
        self.choice = Choice(ask["estimator"], "", self._budget(), size)
        if ask["estimator"] == AUTO:
            self.choice = self._auto()
        self.choice = self.ranks.agree(self.choice)  # what is free differs
        self.options = self._options()

    def _views(
        self, model: nn.Module | None, scales: Any
    ) -> tuple[dict[str, nn.Module], dict[str, Transform], str]:
        ask = self.ask
        if ask["views"] is None:
            if model is None:
                raise ValueError("no network: model=None: give one, or views={name: (model, ...)}")
            if scales is None and ask["reference"] not in (None, NATIVE):
                raise ValueError(
                    f"reference without scales: {ask['reference']!r}: give scales=, among which it "
                    "is, or leave it out"
                )
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

    def _auto(self) -> Choice:
        """The estimator that fits the budget; that of the run which is being resumed."""
        ask = self.ask
        if ask["resume"] and self.out is not None:
            if (self.out / REPORT).exists():
                done = Report.load(self.out / REPORT).meta
                size = done.get("sketch", {}).get("size")
                name = str(done.get("estimator", "minibatch"))
                return Choice(name, "as the finished run", self.memory or 0, size)
            if (self.out / STATE).exists():
                saved = saved_options(self.out)
                name, size = saved.get("estimator", "minibatch"), saved.get("sketch_size")
                return Choice(str(name), "as the saved state", self._budget(), size)
        cost = self.forecast()
        return choose(
            cost.widths if cost else None, n=len(self.source), batch=ask["batch_size"],
            kernel=self.kernel, memory=self._budget(share=2), size=ask["sketch_size"],
            precision=ask["precision"],
        )  # fmt: skip

    def _budget(self, share: int = 1) -> int:
        """Bytes to use: as asked, else a share of what is free where the features will be."""
        if self.memory is not None:
            return self.memory
        asked, devices = self.ask["device"], [device_of(net) for net in self.models.values()]
        if asked is not None:
            with suppress(RuntimeError):  # a bad one is refused by name, when it is used
                devices = [torch.device(asked)]
        return free_memory(devices, share)

    def forecast(self) -> Estimate | None:
        """Sizes and costs, from the shapes of the first image that can be read."""
        for i in range(len(self.source)):
            try:
                image = self.source.load(i)
            except ImageError:
                continue
            label, seed = self.source.ids[i], self.ask["seed"]
            shapes = {
                view: tuple(look(transform, image, seed, label, view).shape)
                for view, transform in self.transforms.items()
            }
            return estimate(
                self.models, shapes, n_images=len(self.source), batch_size=self.ask["batch_size"],
                layers=self.ask["layers"], reduce=self.ask["reduce"],
            )  # fmt: skip
        return None

    def _announce(self, say: Callable[[str], None] | None) -> None:
        """Before the start: what `auto` took and why, what `exact` will put on disk."""
        if say is None:
            return
        if self.ask["estimator"] == AUTO:
            say(f"auto: {self.choice.estimator}, as {self.choice.why}")
        elif self.choice.estimator == "exact":
            cost = self.forecast()
            text = cost and spool_forecast(
                cost.widths, len(self.source), self.choice.memory, self.out
            )
            if text:
                say(text)

    def _estimator(self) -> Any:
        """A fresh estimator for this run."""
        name, more = self.choice.estimator, dict[str, Any]()
        if name == "exact":
            more = {"n_images": len(self.source), "folder": self.out}
            more["memory"] = usable(self.choice.memory)
        elif name == "sketch":
            precision = self.ask["precision"]
            more = {"n_images": len(self.source), "seed": self.ask["seed"], "precision": precision}
            more["size"] = self.choice.size if precision is None else None
        return ESTIMATORS[name](
            len(self.plan), kernel=self.kernel, bandwidth=self.bandwidth, **more
        )

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
                name: {"model": shas[id(m)], "transform": described(self.transforms[name])}
                for name, m in self.models.items()
            },
            "reference": self.reference,
            "images": {"name": self.source.name, "sha256": self.source.fingerprint()},
            "n_images": len(self.source),
            "layers": described(ask["layers"]),
            "resize": ask["resize"],
            "antialias": ask["antialias"],
            "kernel": _kernel_name(ask["kernel"], self.kernel),
            "bandwidth": self.bandwidth,
            "reduce": described(ask["reduce"]),
            "estimator": self.choice.estimator,
            **({"sketch_size": self.choice.size} if self.choice.estimator == "sketch" else {}),
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
        refuse_other(report.meta.get("run", {}), self.options, "finished report")
        return report

    def report(self, *, progress: bool, say: Callable[[str], None] | None = None) -> Report:
        """The finished report where there is one to resume, else that of a run; on every process.

        Raises:
            ValueError: the processes were not asked for the same; and as `probe` says.
            LostRankError: another process died or failed.
        """
        first = self.ranks.first
        self._same_everywhere()
        done = self.ranks.agree(self.finished() if first else None)
        if done is None:
            say = say if first else None
            done = self.ranks.agree(self._execute(progress=progress, say=say))
        assert isinstance(done, Report)
        return done

    def _same_everywhere(self) -> None:
        """Raise unless every process has the same fingerprint."""
        for rank, options in enumerate(self.ranks.gather(plain(self.options))):
            for name, theirs, ours in differences(options, plain(self.options)):
                raise ValueError(
                    f"processes differ: {name} is {theirs!r:.40} on rank {rank}, {ours!r:.40} on "
                    "rank 0: give all the same"
                )

    def _execute(self, *, progress: bool, say: Callable[[str], None] | None) -> Report | None:
        """Make every forward, then the report on rank 0; None on the others."""
        self._announce(say)
        loop = Loop(
            self._estimator(), self.source, self.plan, options=self.options, folder=self.out,
            ranks=self.ranks,
        )  # fmt: skip
        began = time.perf_counter()
        seen = loop.run(self.models, self.transforms, self.ask, progress=progress, say=say)
        if not self.ranks.first:
            return None
        result = loop.estimator.result()
        keys: list[tuple[str, Tap]] = result.keys
        labels = [seen.labels[view][tap] for view, tap in keys]
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
            "n_images": len(self.source) - len(loop.left_out),
            "groups": result.groups,
            "unbiased": True,
            "run": self.options,
            "left_out": loop.left_out,
            "left_out_readable": loop.too_few,
            "unreached": seen.unreached,
            "skipped": seen.skipped,
            "layers": merge_tables(seen.tables.values()),
            "view_macs": seen.macs,
            "versions": versions(),
            "processes": self.ranks.size,
            "seconds": round(time.perf_counter() - began, 3),
        }
        meta |= self._about(result)
        if self.ask["resume"]:
            meta["resumed_from_batch"] = loop.start
        report = Report(
            cka=result.cka,
            stderr=result.stderr,
            view=np.array([view for view, _ in keys]),
            layer=np.array(labels),
            meta=meta,
        )
        if self.out is not None:
            report.save(self.out / REPORT)
            loop.saver.clear()
        return report

    def _about(self, result: Result) -> dict[str, Any]:
        """What `auto` took and why; the size of the sketch and its own error in every cell."""
        about = dict[str, Any]()
        if self.ask["estimator"] == AUTO:
            about["estimator_why"] = self.choice.why
        if result.sketch_stderr is not None:
            rounded = [[float(f"{cell:.4g}") for cell in row] for row in result.sketch_stderr]
            about["sketch"] = {"size": self.choice.size, "blocks": BLOCKS, "stderr": rounded}
        return about


def _kernel_name(asked: Any, kernel: Kernel) -> str:
    """The name of a kernel of ours; a user's with a hash of its code."""
    if callable(asked):
        return str(described(asked))
    ours = kernel.base.__module__ == get_kernel.__module__
    return kernel.name if ours else f"{kernel.name} ({described(kernel.base)})"


def _way_out(scales: Any, resize: str) -> str:
    """What to do about a size that the network refuses."""
    if scales is None:
        return "give images of a size that it takes (compare: --size)"
    if resize == "restore":
        return "take another reference (--reference)"
    return "leave that size out, or use resize='restore' (--resize restore)"
