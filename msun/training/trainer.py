"""Train a multi-scale network on the same crops at every scale."""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cka_probe.activations.meta import check_loaded
from cka_probe.distributed.ranks import Ranks, own_device, started
from cka_probe.errors import one_line
from cka_probe.inputs.batches import order
from cka_probe.inputs.views import check_range
from cka_probe.io import plain, remove_partial_files
from cka_probe.models.preprocessing import input_channels
from cka_probe.progress import progress_bar
from cka_probe.provenance import model_sha256, versions
from msun.data.classes import class_rows
from msun.data.crops import Crops, augmentation, shuffled
from msun.data.labelled import open_labelled
from msun.metrics import true_class_rank
from msun.network import checkpoint, norms
from msun.network.model import MSUN
from msun.network.policy import is_native
from msun.training import state as train_state
from msun.training.config import TrainConfig, check_same_run
from msun.training.size_sampling import resolve_between, side_ranges
from msun.training.state import CONFIG, METRICS, MODEL, STATE
from msun.training.step import DivergedError, TrainingStep, default_tau

__all__ = ["TrainConfig", "train"]


def train(model: MSUN, data: Any, config: TrainConfig) -> Path:
    """Train a network at all its scales.

    Each step takes the same crops at every scale. The loss is the sum of the cross-entropies of all
    scales, the scale-invariant constraint, and distillation from the mean logits of all scales
    (Liu, Zhu, Liu 2024; Wang et al. 2020 for distillation). A network with one scale is trained
    with the cross-entropy alone.

    On the CPU, a run that was killed and resumed ends with the same weights as an uninterrupted
    run, bit for bit. Under torchrun the processes share each batch, and batch norm normalises the
    part of each process separately. Statistics that were re-estimated for further sizes are
    removed, since they do not fit the new weights.

    Args:
        model: a network from `msun.build`; trained in place, and left in its mode.
        data: labelled training images, as for `msun.data.labelled.open_labelled`.
        config: options of the run.

    Returns:
        Path of the checkpoint, config.out / "model.pt"; metrics.csv and config.json are beside it.

    Raises:
        OSError: the folder cannot be written.
        ValueError: bad input, an existing run, a saved state of another run; or a loss or gradient
            that is not finite, with its step and the last saved state.
    """
    device = _device(model, config.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with started(device) as ranks:
            run = _Run(model.to(device), data, config, device, ranks)
            if not run.prepare():
                run.execute()
            return run.out / MODEL
    finally:
        for module, mode in modes:
            module.training = mode


def _device(model: MSUN, name: str | None) -> torch.device:
    """Resolve the device of training, and move the network to it."""
    if name is None:
        return own_device(next(model.parameters()).device)
    try:
        device = own_device(torch.device(name))
        model.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        text = f"cannot use device: {name!r}, {one_line(error)}"
        raise ValueError(f"{text}: leave device (--device) out") from None
    return device


class _Run:
    """One call of `train`: data, resolved options, output files and the loop over epochs."""

    def __init__(
        self, model: MSUN, data: Any, config: TrainConfig, device: torch.device, ranks: Ranks
    ) -> None:
        self.model, self.config, self.device, self.ranks = model, config, device, ranks
        check_loaded(model)
        self.out = Path(config.out).expanduser()
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"output is not a folder: {self.out}: choose another out (--out)")
        self.data = open_labelled(data, n_images=config.n_images, seed=config.seed)
        self.data.use_channels(input_channels(model))
        every = order(len(self.data), config.seed)
        kept = math.ceil(config.val_share * len(every))
        self.val, self.train = sorted(every[:kept]), sorted(every[kept:])
        shards = config.shards or ranks.size
        self.per_epoch = self._steps_per_epoch(shards)
        self.total = config.max_steps or config.epochs * self.per_epoch
        self._open_crops()
        rows = self._class_rows()
        kind = config.constraint or model.policy.constraint
        with norms.without_calibration(model):  # training removes them, so they are not hashed
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
                    "sha256": self._data_sha256(),
                },
                "constraint": kind,
                "between": self.between,
                "shards": shards,
                "rows": rows,
            }
        )
        self.training = TrainingStep(
            model, config, total=self.total, kind=kind, rows=rows, shards=shards, ranks=ranks,
            device=device,
        )  # fmt: skip
        self.table: list[dict[str, Any]] = []
        self.seconds, self.saved_step, self.created = 0.0, 0, list[Path]()

    def _data_sha256(self) -> str:
        """The fingerprint of the images, made once, on rank 0, with a progress bar."""
        first = self.ranks.first
        own = self.data.fingerprint(progress=self.config.progress) if first else ""
        return str(self.ranks.agree(own))

    def _steps_per_epoch(self, shards: int) -> int:
        """The number of whole batches in an epoch."""
        batch, n = self.config.batch_size, len(self.train)
        if shards % self.ranks.size or batch % shards:
            counts = f"{batch} images, {shards} shards, {self.ranks.size} processes"
            hint = "let each number divide the one before"
            raise ValueError(f"batch cannot be divided: {counts}: {hint}")
        if n < batch:
            text = f"{n} of {len(self.data)}, for batches of {batch}"
            raise ValueError(f"too few training images: {text}: lower batch_size or val_share")
        return n // batch

    def _open_crops(self) -> None:
        """Resolve preprocessing and augmentation, and open the crops of training and validation."""
        config, data, spec = self.config, self.data, self.model.spec or {}
        mean, std = config.mean, config.std
        if mean is None and data.is_pixels:
            mean, std = spec.get("mean") or data.mean, spec.get("std") or data.std
        self.mean = None if mean is None else tuple(map(float, mean))
        self.std = None if std is None else tuple(map(float, std))
        if self.mean is not None:
            check_range(self.mean, self.std, None if data.is_pixels else data.load(0)[0])
        self.augment = augmentation(config.augment, data, area=config.crop_area, flip=config.flip)
        scales = tuple(self.model.scales)
        policy = self.model.policy
        self.between = resolve_between(self.model, config.between)
        sides = side_ranges(self.model) if self.between else {}
        served = tuple(sides[scale] for scale in scales if sides)
        native = tuple(scale for scale in scales if is_native(policy, scale, scales[-1]))
        self.crops = Crops(data, scales, self.augment, self.mean, self.std, config.seed, served,
                           self.between, native)  # fmt: skip
        self.val_crops = Crops(data, scales, None, self.mean, self.std, config.seed)

    @torch.no_grad()
    def _class_rows(self) -> list[int] | None:
        """Resolve the outputs that stand for the classes, by a forward on one image."""
        images, _ = next(self.val_crops.batches([[0]]))
        self.model.eval()
        outputs = self.model(images[self.model.reference].to(self.device)).shape[-1]
        return class_rows(self.config.rows, outputs, self.data)

    def prepare(self) -> bool:
        """Create the folder and load the saved state; True if the run was finished before."""
        config, out = self.config, self.out
        existing = [name for name in (MODEL, STATE) if (out / name).exists()]
        if existing and not (config.resume or config.overwrite):
            raise ValueError(
                f"a run is there already: {out / existing[0]}: resume (--resume), overwrite "
                "(--overwrite), or choose another folder"
            )
        if config.resume and MODEL in existing:
            check_same_run(train_state.read_config(out).get("run", {}), self.run, "finished run")
            checkpoint.load_into(self.model, out / MODEL)
            self.model.spec = dict(checkpoint.read(out / MODEL)["network"]["spec"])
            return True
        state = train_state.load_state(out, self.run) if config.resume else None
        for norm in norms.sized_norms(self.model):  # they do not fit the new weights
            for size in list(norm.sizes):
                norm.remove(size)
        if state is not None:
            self.training.load(state)
            self.table, self.seconds = state["table"], state["seconds"]
            self.saved_step = self.training.step
        self.ranks.broadcast([*self.model.parameters(), *self.model.buffers()])
        if self.ranks.first:
            self.created = [path for path in (out, *out.parents) if not path.exists()]
            out.mkdir(parents=True, exist_ok=True)
            for name in () if config.resume else (MODEL, STATE, METRICS, CONFIG):
                (out / name).unlink(missing_ok=True)
            remove_partial_files(out)
            train_state.write_config(out, self._describe())
        return False

    def _describe(self) -> dict[str, Any]:
        """The content of config.json: all that is needed to repeat the run."""
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
        """Train to the end, and save the network."""
        training, show = self.training, self.config.progress and self.ranks.first
        bar = progress_bar(self.total, desc="train", unit="step", initial=training.step, show=show)
        with bar:
            try:
                while training.step < self.total:
                    self._epoch(training.step // self.per_epoch, bar)
            except DivergedError as error:
                raise ValueError(f"{error}: {self._bad_image() or self._hint()}") from error
            finally:
                self._remove_empty_folder()
            bar.leave = True
        if training.ema is not None:
            training.ema.apply()
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

    def _remove_empty_folder(self) -> None:
        """Remove the files and folders of a run that ended before its first saved state."""
        if self.ranks.first and self.training.step < self.total and not self.saved_step:
            (self.out / CONFIG).unlink(missing_ok=True)
            for path in self.created:
                with suppress(OSError):  # another program wrote a file there
                    path.rmdir()

    def _bad_image(self) -> str:
        """The training image that holds NaN or infinity, if one does."""
        if self.data.is_pixels:  # decoded from integers
            return ""
        for i in self.train:
            if not bool(torch.isfinite(self.data.load(i)[0]).all()):
                return f"image {i} of {self.data.name!r} is not finite, mend it or leave it out"
        return ""

    def _hint(self) -> str:
        """What to do after a run that diverged."""
        hint = "lower lr (--lr), or clip (--clip 1)"
        path = self.out / STATE
        if not path.exists():
            return f"nothing was saved yet; {hint}"
        return f"the last good state, after {self.saved_step} steps, is {path}; {hint}"

    def _epoch(self, epoch: int, bar: Any) -> None:
        """Run the remaining steps of an epoch, then validate and save metrics and state."""
        config, training = self.config, self.training
        last = min(self.total, (epoch + 1) * self.per_epoch)
        batches, firsts = self._batches(epoch, training.step - epoch * self.per_epoch)
        saved = began = time.perf_counter()
        self.model.train()
        stream = self.crops.batches(batches, epoch=epoch, workers=config.workers, firsts=firsts)
        with closing(stream):
            for images, labels in stream:
                loss = training.run(images, labels)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{training.lr:.3g}", refresh=False)
                bar.update()
                now = time.perf_counter()
                if training.step < last and now - saved >= config.save_every_s:
                    self.seconds, began = self.seconds + now - began, now
                    self._save()
                    saved = time.perf_counter()
        top1 = self._validate()
        self.seconds += time.perf_counter() - began
        means = training.pop_means()
        row = {"epoch": epoch + 1, "step": training.step, "lr": training.lr}
        row |= {name: means.get(name, math.nan) for name in self._loss_names()}
        self.table.append({**row, **top1, "seconds": round(self.seconds, 3)})
        self.seconds = 0.0
        if self.ranks.first:
            train_state.write_metrics(self.out, self.table)
        self._save()

    def _loss_names(self) -> list[str]:
        """The losses in metrics.csv, with those that begin in a later epoch."""
        scales, kind = self.model.scales, self.training.kind
        pairs = [(a, b) for a in scales for b in scales if a < b and kind != "none"]
        names = ["loss", *(f"ce_{side}" for side in scales)]
        names += [f"constraint_{a}_{b}" for a, b in pairs if kind == "raw" or b == scales[-1]]
        distil = self.config.distill and len(scales) > 1
        return names + [f"distill_{side}" for side in scales if distil]

    def _batches(self, epoch: int, done: int) -> tuple[list[list[int]], list[int]]:
        """This process's images in each remaining step of an epoch, and the first of each batch."""
        size, own = self.config.batch_size, self.config.batch_size // self.ranks.size
        mixed = [self.train[k] for k in shuffled(len(self.train), self.config.seed, epoch)]
        steps = min(self.per_epoch, self.total - epoch * self.per_epoch)
        starts = [k * size for k in range(done, steps)]
        parts = [start + self.ranks.rank * own for start in starts]
        return [mixed[k : k + own] for k in parts], [mixed[k] for k in starts]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Top-1 accuracy, 0 to 1, at every scale on the held-out images; of the EMA if any."""
        if not self.val:
            return {}
        scales, size = self.model.scales, self.config.batch_size
        own = self.val[self.ranks.rank :: self.ranks.size]
        batches = [own[k : k + size] for k in range(0, len(own), size)]
        hits = torch.zeros(len(scales), dtype=torch.int64, device=self.device)
        ema, rows = self.training.ema, self.training.rows
        with ema.applied() if ema is not None else nullcontext():
            self.ranks.broadcast(self.model.buffers())
            self.model.eval()
            with closing(self.val_crops.batches(batches, workers=self.config.workers)) as stream:
                for images, labels in stream:
                    for k, side in enumerate(scales):
                        logits = self.model(images[side].to(self.device))
                        logits = logits if rows is None else logits[:, rows]
                        hits[k] += (true_class_rank(logits, labels.to(self.device))[0] == 0).sum()
        self.ranks.sum([hits])
        shares = (hits.double() / len(self.val)).tolist()
        return {f"top1_{side}": share for side, share in zip(scales, shares, strict=True)}

    def _save(self) -> None:
        """Save the state; the first process writes it."""
        if self.ranks.first:
            more = {"table": self.table, "seconds": self.seconds}
            train_state.save_state(self.out, self.run, {**self.training.state(), **more})
        self.saved_step = self.training.step
