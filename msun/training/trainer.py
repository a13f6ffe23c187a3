"""Train a multi-scale network: the same crop at every scale in every step."""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cka_probe.activations.macs import model_sha256, versions
from cka_probe.distributed.ranks import Ranks, own_device, started
from cka_probe.errors import one_line
from cka_probe.inputs.batches import order
from cka_probe.io import plain, remove_partial_files
from cka_probe.progress import progress_bar
from msun.data.crops import Crops, augmentation, shuffled
from msun.data.labelled import open_labelled
from msun.metrics import true_class_rank
from msun.network import checkpoint, norms
from msun.network.model import MSUN
from msun.network.policy import is_native
from msun.training import state as train_state
from msun.training.config import TrainConfig, refuse_other
from msun.training.size_sampling import ranges, share
from msun.training.state import CONFIG, METRICS, MODEL, STATE
from msun.training.step import DivergedError, TrainingStep, default_tau

__all__ = ["TrainConfig", "train"]


def train(model: MSUN, data: Any, config: TrainConfig) -> Path:
    """Train a network at all its scales at once.

    Each step takes the same crops at every scale, and descends on the sum over the scales of the
    cross-entropy, plus the scale-invariant constraint, plus distillation from the mean of all
    scales' logits (Liu, Zhu, Liu 2024; Wang et al. 2020 for the last). A network with one scale
    is trained plainly. On the CPU a run that was killed and resumed ends with the weights of an
    uninterrupted one, bit for bit. Under torchrun the processes share each batch; batch norm
    sees each process's part alone. Statistics that were re-estimated for further sizes are
    dropped: they belong to other weights.

    Args:
        model: From `msun.build`; trained in place, in the mode it was in afterwards.
        data: Labelled training images: whatever `msun.data.labelled.open_labelled` takes.
        config: All choices.

    Returns:
        The checkpoint, config.out / "model.pt", beside metrics.csv and config.json.

    Raises:
        OSError: The folder cannot be written.
        ValueError: Bad input, a run that is there already, a saved state of another run; or a
            loss or gradient that is not finite, with its step and the last saved state.
    """
    device = _device(model, config.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with started(device) as ranks:
            run = _Run(model.to(device), data, config, device, ranks)
            if not run.prepared():
                run.execute()
            return run.out / MODEL
    finally:
        for module, mode in modes:
            module.training = mode


def _device(model: MSUN, asked: str | None) -> torch.device:
    """Where to train; the network is put there."""
    if asked is None:
        return own_device(next(model.parameters()).device)
    try:
        device = own_device(torch.device(asked))
        model.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        text = f"cannot use device: {asked!r}, {one_line(error)}"
        raise ValueError(f"{text}: leave device (--device) out") from None
    return device


class _Run:
    """One call of `train`: what was asked, made ready, then executed once."""

    def __init__(
        self, model: MSUN, data: Any, config: TrainConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self.model, self.config, self.device, self.ranks = model, config, device, ranks
        self.out = Path(config.out).expanduser()
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"output is not a folder: {self.out}: choose another out (--out)")
        self.data = open_labelled(data, n_images=config.n_images, seed=config.seed)
        every = order(len(self.data), config.seed)
        kept = math.ceil(config.val_share * len(every))
        self.val, self.train = sorted(every[:kept]), sorted(every[kept:])
        shards = config.shards or ranks.size
        self.per_epoch = self._steps_an_epoch(shards)
        self.total = config.max_steps or config.epochs * self.per_epoch
        self._crops()
        rows = self._head()
        kind = config.constraint or model.policy.constraint
        with norms.without_calibration(model):  # they are dropped with the first step
            sha256 = model_sha256(model)
        self.run = plain(
            {
                **config.options(),
                **({"tau": default_tau(model, kind)} if config.tau is None else {}),
                "model": {"sha256": sha256, "at": model.at, "preset": model.preset},
                "policy": asdict(model.policy),
                "scales": list(model.scales),
                "data": {
                    "name": self.data.name,
                    "images": len(self.data),
                    "sha256": self.data.fingerprint(),
                },
                "constraint": kind,
                "between": self.between,
                "shards": shards,
                "rows": rows,
            }
        )
        self.descent = TrainingStep(
            model, config, total=self.total, kind=kind, rows=rows, shards=shards, ranks=ranks,
            device=device,
        )  # fmt: skip
        self.table: list[dict[str, Any]] = []
        self.seconds, self.saved_step, self.made = 0.0, 0, list[Path]()

    def _steps_an_epoch(self, shards: int) -> int:
        """Whole batches only."""
        batch, n = self.config.batch_size, len(self.train)
        if shards % self.ranks.size or batch % shards:
            counts = f"{batch} images, {shards} shards, {self.ranks.size} processes"
            way = "let each divide the one before"
            raise ValueError(f"batch cannot be shared out: {counts}: {way}")
        if n < batch:
            text = f"{n} of {len(self.data)}, for batches of {batch}"
            raise ValueError(f"too few training images: {text}: lower batch_size or val_share")
        return n // batch

    def _crops(self) -> None:
        """What is done to images: pixels are normalised as asked, as the network wants, or so."""
        config, data, spec = self.config, self.data, self.model.spec or {}
        mean, std = config.mean, config.std
        if mean is None and data.is_pixels:
            mean, std = spec.get("mean") or data.mean, spec.get("std") or data.std
        self.mean = None if mean is None else tuple(map(float, mean))
        self.std = None if std is None else tuple(map(float, std))
        self.augment = augmentation(config.augment, data, area=config.crop_area, flip=config.flip)
        scales = tuple(self.model.scales)
        policy = self.model.policy
        self.between = share(self.model, config.between)
        sides = ranges(self.model) if self.between else {}
        first = tuple(sides[scale] for scale in scales if sides)
        native = tuple(scale for scale in scales if is_native(policy, scale, scales[-1]))
        self.crops = Crops(data, scales, self.augment, self.mean, self.std, config.seed, first,
                           self.between, native)  # fmt: skip
        self.looks = Crops(data, scales, None, self.mean, self.std, config.seed)

    @torch.no_grad()
    def _head(self) -> list[int] | None:
        """The outputs that stand for the classes, after a look at what the network gives."""
        classes, rows = len(self.data.classes), self.config.rows
        images, _ = next(self.looks.batches([[0]]))
        self.model.eval()
        outputs = self.model(images[self.model.reference].to(self.device)).shape[-1]
        if rows is None:
            if outputs != classes:
                text = f"{outputs} outputs for the {classes} classes of {self.data.name!r}"
                hint = f"replace it (--classes {classes}, msun.replace_classifier), or name rows"
                raise ValueError(f"classifier does not fit the data: {text}: {hint}")
            return None
        chosen = [int(row) for row in rows]
        good = len(set(chosen)) == len(chosen) == classes and 0 <= min(chosen) <= max(chosen)
        if not good or max(chosen) >= outputs:
            text = f"{len(chosen)} rows of {outputs} outputs for {classes} classes"
            raise ValueError(f"bad rows: {text}: give one different output per class, from 0")
        return chosen

    def prepared(self) -> bool:
        """The folder made, the saved state taken up; True where the run had finished before."""
        config, out = self.config, self.out
        there = [name for name in (MODEL, STATE) if (out / name).exists()]
        if there and not (config.resume or config.overwrite):
            raise ValueError(
                f"a run is there already: {out / there[0]}: resume (--resume), overwrite "
                "(--overwrite), or choose another folder"
            )
        if config.resume and MODEL in there:
            refuse_other(train_state.read_config(out).get("run", {}), self.run, "finished run")
            checkpoint.load_into(self.model, out / MODEL)
            self.model.spec = dict(checkpoint.read(out / MODEL)["network"]["spec"])
            return True
        state = train_state.load_state(out, self.run) if config.resume else None
        for norm in norms.sized_norms(self.model):  # statistics of other weights
            for size in list(norm.sizes):
                norm.remove(size)
        if state is not None:
            self.descent.load(state)
            self.table, self.seconds = state["table"], state["seconds"]
            self.saved_step = self.descent.step
        self.ranks.broadcast([*self.model.parameters(), *self.model.buffers()])  # all have read
        if self.ranks.first:
            self.made = [path for path in (out, *out.parents) if not path.exists()]
            out.mkdir(parents=True, exist_ok=True)
            for name in () if config.resume else (MODEL, STATE, METRICS, CONFIG):
                (out / name).unlink(missing_ok=True)
            remove_partial_files(out)
            train_state.write_config(out, self._described())
        return False

    def _described(self) -> dict[str, Any]:
        """All that repeats the run."""
        return {
            "format": 1,
            "run": self.run,
            "policy": asdict(self.model.policy),
            "spec": dict(self.model.spec or {}),
            "classes": self.data.classes,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "steps": self.total,
            "augmentation": None if self.augment is None else asdict(self.augment),
            "mean": self.mean,
            "std": self.std,
            "device": self.device.type,
            "processes": self.ranks.size,
            "versions": versions(),
        }

    def execute(self) -> None:
        """Train to the end, and keep the result."""
        descent, show = self.descent, self.config.progress and self.ranks.first
        bar = progress_bar(self.total, desc="train", unit="step", initial=descent.step, show=show)
        with bar:
            try:
                while descent.step < self.total:
                    self._epoch(descent.step // self.per_epoch, bar)
            except DivergedError as error:
                raise ValueError(f"{error}: {self._way_out()}") from error
            finally:
                self._leave_nothing_vain()
            bar.leave = True
        if descent.average is not None:
            descent.average.apply()
        spec = {k: v for k, v in (self.model.spec or {}).items() if k != "between"}
        if self.mean is not None and self.std is not None:
            spec |= {"mean": list(self.mean), "std": list(self.std)}
        rows = self.run["rows"]
        spec |= {} if rows is None else {"rows": rows}  # `evaluate` reads it
        spec |= {"between": self.between} if self.between else {}  # `calibrate` reads it
        self.model.spec = {**spec, "classes": list(self.data.classes)}  # on every process
        if self.ranks.first:
            extra = {"rows": rows, "run": self.run}
            checkpoint.save(self.model, self.out / MODEL, extra=extra)
            (self.out / STATE).unlink(missing_ok=True)
        self.ranks.wait()

    def _leave_nothing_vain(self) -> None:
        """Where a run ends before anything was saved, the folder is as it was."""
        if self.ranks.first and self.descent.step < self.total and not self.saved_step:
            (self.out / CONFIG).unlink(missing_ok=True)
            for path in self.made:
                with suppress(OSError):  # somebody else put something there
                    path.rmdir()

    def _way_out(self) -> str:
        """What is left of a run that diverged."""
        way = "lower lr (--lr), or clip (--clip 1)"
        path = self.out / STATE
        if not path.exists():
            return f"nothing was saved yet; {way}"
        return f"the last good state, after {self.saved_step} steps, is {path}; {way}"

    def _epoch(self, epoch: int, bar: Any) -> None:
        """The steps of an epoch that are still to do, then validation, metrics and state."""
        config, descent = self.config, self.descent
        last = min(self.total, (epoch + 1) * self.per_epoch)
        todo, firsts = self._batches(epoch, descent.step - epoch * self.per_epoch)
        saved = began = time.perf_counter()
        self.model.train()
        stream = self.crops.batches(todo, epoch=epoch, workers=config.workers, firsts=firsts)
        with closing(stream):
            for images, labels in stream:
                loss = descent.run(images, labels)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{descent.lr:.3g}", refresh=False)
                bar.update()
                now = time.perf_counter()
                if descent.step < last and now - saved >= config.save_every_s:
                    self.seconds, began = self.seconds + now - began, now
                    self._save()
                    saved = time.perf_counter()
        top1 = self._validate()
        self.seconds += time.perf_counter() - began
        means = descent.clear()
        row = {"epoch": epoch + 1, "step": descent.step, "lr": descent.lr}
        row |= {name: means.get(name, math.nan) for name in self._parts()}
        self.table.append({**row, **top1, "seconds": round(self.seconds, 3)})
        self.seconds = 0.0
        if self.ranks.first:
            train_state.write_metrics(self.out, self.table)
        self._save()

    def _parts(self) -> list[str]:
        """The parts of the loss that metrics.csv names, also where some are not there yet."""
        scales, kind = self.model.scales, self.descent.kind
        pairs = [(a, b) for a in scales for b in scales if a < b and kind != "none"]
        names = ["loss", *(f"ce_{side}" for side in scales)]
        names += [f"constraint_{a}_{b}" for a, b in pairs if kind == "raw" or b == scales[-1]]
        distil = self.config.distill and len(scales) > 1
        return names + [f"distill_{side}" for side in scales if distil]

    def _batches(self, epoch: int, done: int) -> tuple[list[list[int]], list[int]]:
        """This process's images in each step of an epoch to do, and the first of all processes'."""
        size, own = self.config.batch_size, self.config.batch_size // self.ranks.size
        mixed = [self.train[k] for k in shuffled(len(self.train), self.config.seed, epoch)]
        steps = min(self.per_epoch, self.total - epoch * self.per_epoch)
        starts = [k * size for k in range(done, steps)]
        parts = [start + self.ranks.rank * own for start in starts]
        return [mixed[k : k + own] for k in parts], [mixed[k] for k in starts]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Top-1 at every scale on the images that were kept, as shares; the mean's, with EMA."""
        if not self.val:
            return {}
        scales, size = self.model.scales, self.config.batch_size
        own = self.val[self.ranks.rank :: self.ranks.size]
        batches = [own[k : k + size] for k in range(0, len(own), size)]
        hits = torch.zeros(len(scales), dtype=torch.int64, device=self.device)
        average, rows = self.descent.average, self.descent.rows
        with average.applied() if average is not None else nullcontext():
            self.ranks.broadcast(self.model.buffers())
            self.model.eval()
            with closing(self.looks.batches(batches, workers=self.config.workers)) as stream:
                for images, labels in stream:
                    for k, side in enumerate(scales):
                        logits = self.model(images[side].to(self.device))
                        logits = logits if rows is None else logits[:, rows]
                        hits[k] += (true_class_rank(logits, labels.to(self.device))[0] == 0).sum()
        self.ranks.sum([hits])
        shares = (hits.double() / len(self.val)).tolist()
        return {f"top1_{side}": share for side, share in zip(scales, shares, strict=True)}

    def _save(self) -> None:
        """The state, by the first process."""
        if self.ranks.first:
            more = {"table": self.table, "seconds": self.seconds}
            train_state.save_state(self.out, self.run, {**self.descent.state(), **more})
        self.saved_step = self.descent.step
