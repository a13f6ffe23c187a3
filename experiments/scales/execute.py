"""One run: trained, measured, written into the ledger."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from experiments.scales.arms import ARMS, PAIRS, made
from experiments.scales.ledger import Ledger, machine
from experiments.scales.manifest import CUT, Run, moving, rate_runs, tuning
from experiments.scales.split import choices
from experiments.scales.stats import paired
from experiments.scales.tasks import Held, Task, held
from msun import TrainConfig, calibrate, evaluate, recalibrated, train
from msun.metrics import Predictions
from msun.network.model import MSUN
from msun.network.policy import route
from msun.training.size_sampling import step_macs

__all__ = ["Bench", "steps_of"]

GROUP = ("task", "net", "cut", "budget", "seed")
RE_ESTIMATED_ON = 512  # training images, for the statistics of each size


def steps_of(run: Run, task: Task, *, unit: int | None = None) -> int:
    """Steps of a run: the MACs of `budget` x `unit` images through the single-scale network."""
    unit = task.unit if unit is None else unit
    single = step_macs(made(ARMS["single"], task, run.net, at=run.cut, seed=0))
    paced = ARMS[run.spec.paces] if run.spec.paces else run.spec
    own = step_macs(made(paced, task, run.net, at=run.cut, seed=0), paced.between)
    return max(1, round(run.budget * unit * single / (own * run.spec.batch)))


class Bench:
    """Where runs are executed.

    Args:
        work: folder for images, networks and predictions; may be lost between sessions.
        ledger: the tables that are kept.
        tasks: by name.
        data: folder with images/ for CIFAR-10 and Imagenette, weights/ for the latter.
        unit: images of the single-scale network that are a budget of 1; None: the task's.
        device: where networks and images lie; on a GPU training computes in bfloat16.
        say: told what happens.
    """

    def __init__(
        self,
        work: Path,
        ledger: Ledger,
        tasks: dict[str, Task],
        *,
        data: Path | None = None,
        unit: int | None = None,
        device: str = "cpu",
        say: Callable[[str], None] = print,
    ) -> None:
        self.work, self.ledger, self.tasks = work, ledger, tasks
        self.data, self.unit, self.device, self.say = data, unit, device, say
        self._held: dict[tuple[str, str], Held] = {}

    def images(self, task: Task, split: str) -> Held:
        """The images of a split, opened once."""
        if (task.name, split) not in self._held:
            self._held[task.name, split] = held(task, split, self.work, self.data, self.device)
        return self._held[task.name, split]

    def needs(self, run: Run) -> list[Run]:
        """What must run before, for its learning rate."""
        if run.lr is not None:
            return []
        return rate_runs(run.task, run.net, *self._family(run), self._tuned(run))

    def rate(self, run: Run) -> float:
        """The learning rate: the run's own, else the best of its family's on validation.

        Raises:
            ValueError: runs that choose it are missing.
        """
        if run.lr is not None:
            return run.lr
        if self.needs(run):
            missing = ", ".join(one.key for one in self.needs(run))
            raise ValueError(f"no learning rate yet: {self._family(run)[0]!r}: run first {missing}")
        known = self._tuned(run)
        return max(known, key=lambda lr: known[lr])

    def _family(self, run: Run) -> tuple[str, float]:
        return tuning(run.arm, run.budget, run.net)

    def _tuned(self, run: Run) -> dict[float, float]:
        """Learning rate -> mean accuracy over sizes on validation, of the run's family."""
        (family, budget), frame = self._family(run), self.ledger.read("runs")
        label = next(iter(ARMS[family].readings))
        mine = frame[
            (frame["task"] == run.task) & (frame["net"] == run.net) & (frame["run"] == family)
            & (frame["arm"] == label) & (frame["split"] == "val") & (frame["seed"] == 0)
            & (frame["budget"] == budget) & (frame["cut"] == CUT)
        ]  # fmt: skip
        return {float(lr): float(x) for lr, x in mine.groupby("lr")["top1"].mean().items()}

    def execute(self, run: Run) -> None:
        """Train, measure, write down what the ledger lacks; a kept network is not trained again."""
        labels = run.left(self.ledger.done())
        if not labels:
            return
        task, arm, lr = self.tasks[run.task], run.spec, self.rate(run)
        folder = self.work / "runs" / run.key
        steps = steps_of(run, task, unit=self.unit)
        began = time.process_time()
        images = self.images(task, "train")
        net, spent = self._network(run, images, steps, lr)
        splits = ("val", "test") if run.tested else ("val",)
        rows = self._measured(run, task, labels, net, folder, lr, splits)
        if run.key not in set(self.ledger.read("trainings")["key"]):
            row = {
                **_base(run, lr), "steps": steps, "epochs": steps * arm.batch / len(images),
                "train_gmacs": steps * arm.batch * step_macs(net, arm.between) / 1e9,
                "params": sum(p.numel() for p in net.parameters()), "loss": _loss(folder),
                "core_s": spent, "machine": machine(self.device),
            }  # fmt: skip
            self.ledger.add("trainings", [row])
        self.ledger.add("runs", rows)
        if run.tested:
            with self.ledger.turn:
                self.pair()
        if run.arm == "single" and run.tested and run.budget == 1:
            self.ledger.add("splits", choices(run, task, images, folder / "model.pt"))
        took = time.process_time() - began
        seen = [r["top1"] for r in rows if r["arm"] == labels[0]]
        self.say(f"{run.key}: {took:.0f} core s now, training took {spent:.0f}, "
                 f"mean {100 * float(np.mean(seen)):.2f}")  # fmt: skip

    def _network(self, run: Run, images: Held, steps: int, lr: float) -> tuple[MSUN, float]:
        """The trained network, and the core seconds of its training; made anew if need be."""
        net = self._made(run, data=self.data or Path())
        folder = self.work / "runs" / run.key
        # the run that chose this rate, where it had the whole budget, is the same training
        trial = self.work / "runs" / replace(run, lr=lr).key
        for kept in (folder, trial):
            spent = self._spent(kept, lr)
            if spent is not None:
                if kept != folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    for name in ("model.pt", "metrics.csv"):
                        shutil.copy2(kept / name, folder / name)
                net.load_state_dict(weights(folder / "model.pt"))
                return net, spent
        self.say(f"{run.key}: {steps} steps at lr {lr:g}")
        began = time.process_time()
        return self._trained(run, net, images, steps, lr), time.process_time() - began

    def _made(self, run: Run, **how: Any) -> MSUN:
        """The network of a run, untrained; `how` goes to `made`."""
        net = made(run.spec, self.tasks[run.task], run.net, at=run.cut, seed=run.seed, **how)
        if torch.device(self.device).type == "cuda":
            # cuDNN makes kernels of its own for each size of channels-last maps: seconds a size
            net = net.to(memory_format=torch.contiguous_format)
        return net.to(self.device)

    def _spent(self, folder: Path, lr: float) -> float | None:
        """Core seconds of a training that is in the ledger and whose network is here, else None."""
        frame = self.ledger.read("trainings")
        mine = frame[(frame["key"] == folder.name) & np.isclose(frame["lr"].astype(float), lr)]
        here = len(mine) > 0 and (folder / "model.pt").exists()
        return float(mine["core_s"].iloc[0]) if here else None

    def _trained(self, run: Run, net: MSUN, images: Held, steps: int, lr: float) -> MSUN:
        """The network after its training; at chance where that diverged at a rate on trial."""
        task, arm = self.tasks[run.task], run.spec
        config = TrainConfig(
            out=self.work / "runs" / run.key, max_steps=steps, batch_size=arm.batch, lr=lr,
            seed=run.seed, val_share=0.0, constraint=arm.constraint, distill=arm.distill,
            between=arm.between, clip=10.0, crop_area=task.area, flip=task.flip, resume=True,
            progress=False, amp="bf16" if torch.device(self.device).type == "cuda" else None,
        )  # fmt: skip
        try:
            train(net, images, config)
        except ValueError as error:
            if "diverged" not in str(error) or run.lr is None:
                raise
            self.say(f"{run.key}: {error}")
            return self._made(run, data=self.data or Path())
        return net

    def _measured(
        self, run: Run, task: Task, labels: list[str], net: MSUN, folder: Path, lr: float,
        splits: tuple[str, ...],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of these readings on these splits."""
        rows = []
        sizes = list(task.sizes) if run.spec.scales in ("all", "largest") else [net.reference]
        for label in labels:
            shown, feed = self._read(run, task, net, run.readings[label], sizes)
            for split in splits:
                path = predictions(folder, label, split)
                folder.mkdir(parents=True, exist_ok=True)
                frame = evaluate(
                    shown, self.images(task, split), sizes, cka=False, latency=False, feed=feed,
                    mixed=split != "val" and len(sizes) > 1, batch_size=256, progress=False,
                    predictions=path,
                )  # fmt: skip
                for _, row in frame.iterrows():
                    view = "mixed" if pd.isna(row["size_px"]) else str(int(row["size_px"]))
                    rows.append({
                        **_base(run, lr), "arm": label, "split": split, "view": view,
                        "n": int(row["n"]), "top1": float(row["top1"]),
                        "mmacs": float(row["gmacs"]) * 1e3,
                    })  # fmt: skip
        return rows

    def _read(
        self, run: Run, task: Task, net: MSUN, reading: str, sizes: list[int]
    ) -> tuple[nn.Module, str | Callable[[int], int]]:
        """The network as a reading sees it, and the side at which an image is fed."""
        how: dict[str, Any] = {"n_images": RE_ESTIMATED_ON, "batch_size": 256, "progress": False}
        images = self.images(task, "train")
        if reading.startswith("fed"):
            if reading.endswith("recalibrated"):
                net = recalibrated(net, images, net.scales, **how)
            return net, lambda side: route(net.scales, side, side, "nearest")
        shown: MSUN = net
        every = sizes
        if run.tested:  # mixed sizes are any whole number
            every = list(range(min(sizes), max(sizes) + 1))
        if reading == "served":
            shown = self._made(run, inputs="scale")
            shown.load_state_dict(net.state_dict())
            return recalibrated(shown, images, every, **how), "native"
        if reading.startswith("upsampled"):
            shown = self._made(run, enlarge="full")
            shown.load_state_dict(net.state_dict())
        if reading == "calibrated":
            shown = calibrate(shown, images, every, **how)
        elif reading.endswith("recalibrated"):
            shown = recalibrated(shown, images, every, **how)
        return shown, "native"

    def reread(self, run: Run) -> bool:
        """Measure a run's first reading on the images that were not looked at before, once.

        Returns:
            Whether the ledger has it now: not where the trained network is not here.
        """
        label = next(iter(run.readings))
        known = self.ledger.read("unread")
        if ((known["key"] == run.key) & (known["arm"] == label)).any():
            return True
        folder, trainings = self.work / "runs" / run.key, self.ledger.read("trainings")
        mine = trainings[trainings["key"] == run.key]
        if mine.empty or not (folder / "model.pt").exists():
            self.say(f"{run.key}: its network is not here")
            return False
        task, lr = self.tasks[run.task], float(mine["lr"].iloc[0])
        net = self._made(run)
        net.load_state_dict(weights(folder / "model.pt"))
        rows = self._measured(run, task, [label], net, folder, lr, ("unread",))
        self.ledger.add("unread", rows)
        with self.ledger.turn:
            self.pair("unread")
        self.say(f"{run.key}: read on {rows[0]['n']} images more")
        return True

    def pair(self, split: str = "test") -> None:
        """Compare what is comparable and not in the ledger yet, as far as predictions are here."""
        runs, pairs = {"test": ("runs", "pairs"), "unread": ("unread", "unread-pairs")}[split]
        frame, known = self.ledger.read(runs), self.ledger.read(pairs)
        frame = frame[frame["split"] == split]
        done = set(zip(*(known[c] for c in (*GROUP, "arm", "other")), strict=True))
        for group, mine in frame.groupby(list(GROUP)):
            task, net, _, budget, seed = group
            ours = dict(zip(mine["arm"], mine["key"], strict=True))
            # beside networks at the usual cut, where they have no subnets that it could move
            at = (frame["task"] == task) & (frame["net"] == net) & (frame["seed"] == seed)
            home = frame[at & (frame["budget"] == budget) & (frame["cut"] == CUT)]
            home = home[~home["run"].isin(moving())]
            others = {**dict(zip(home["arm"], home["key"], strict=True)), **ours}
            rows: list[dict[str, Any]] = []
            for arm, other in product(ours, others):
                if (arm, other) in PAIRS and (*group, arm, other) not in done:
                    a, b = (
                        predictions(self.work / "runs" / key, label, split)
                        for label, key in ((arm, ours[arm]), (other, others[other]))
                    )
                    if a.exists() and b.exists():
                        base = dict(zip(GROUP, group, strict=True))
                        base |= {"arm": arm, "other": other}
                        found = paired(Predictions.load(a), Predictions.load(b))
                        rows += [{**base, **row} for row in found]
            if rows:
                self.ledger.add(pairs, rows)


def predictions(folder: Path, label: str, split: str) -> Path:
    """Where a reading's predictions lie."""
    return folder / f"{label.replace(', ', '_').replace(' ', '-')}-{split}.npz"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state of a network that this experiment trained."""
    state: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)[
        "state"
    ]
    return state


def _base(run: Run, lr: float) -> dict[str, Any]:
    return {
        "task": run.task, "net": run.net, "cut": run.cut, "budget": run.budget, "seed": run.seed,
        "lr": lr, "run": run.arm, "key": run.key,
    }  # fmt: skip


def _loss(folder: Path) -> float:
    """Of the last epoch."""
    path = folder / "metrics.csv"
    if not path.exists():
        return float("nan")
    with path.open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["loss"])


torch.set_num_threads(1)
