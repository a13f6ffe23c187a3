"""How a network is trained, as one value; the learning rate; which weights decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from msun.network.policy import Policy
from msun.training.losses import CONSTRAINTS

__all__ = ["TrainConfig", "groups", "rate", "refuse_other"]

# What says where and how, and changes no number of a finished run.
_FREE = ("out", "device", "workers", "save_every_s", "resume", "overwrite", "progress")
_AMP = (None, "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """All choices of a training run.

    Attributes:
        out: Folder for model.pt, metrics.csv, config.json and, until the end, state.pt.
        epochs: Passes over the training images.
        max_steps: Stop after so many steps instead; the schedule spans them.
        batch_size: Images a step, over all processes together; each is seen at every scale. For
            equal cost, 16 in place of 32 gave `lean` 0.3 to 0.5 points (experiments/scales).
        lr: Highest learning rate, after the warm-up.
        momentum: Of SGD.
        weight_decay: Of SGD, on every weight.
        decay_norms: Whether biases and the weights of norms decay too.
        warmup: Share of the steps in which the rate rises linearly; then it falls as a cosine.
        label_smoothing: Of the cross-entropies.
        clip: Highest norm of the gradient; None does not clip.
        constraint: "none", "raw", "normalised" or "cka"; None is what the network's policy says.
        constraint_weight: What its sum is multiplied by.
        tau: Parts of the constraint below it count as 0; None is 0.01 for "raw" (0.001 with the
            paper's subnets of DenseNet-121 and VGG-16-BN), else 0.
        distill: Weight of ensemble distillation; 0 does without.
        distill_after: Share of the steps before it begins; None is the warm-up.
        ema: Decay of the running mean of weights and statistics, which is then what is measured
            and kept; early on, (1 + step) / (10 + step) where that is smaller. None keeps none.
        amp: Autocast to "bf16" or "fp16" (with loss scaling); None computes in float32.
        augment: "auto" or "none" (see `msun.data.crops.augmentation`).
        crop_area: Lowest and highest share of the area of a crop; None is by the data.
        flip: Whether to mirror; None is by the data.
        between: Share of the steps in which a scale learns the sizes that it serves: a side is
            drawn from them, uniform in the logarithm, and all crops of the batch are shrunk to it
            and then resized, antialiased, to what the network feeds such images at. None: half,
            where the policy resizes any ("small", "scale") and there are several scales, else 0.
            With 1 hardly any crop is as sharp as an image of the scale itself, which costs
            accuracy there until `msun.recalibrated`. On a CUDA card do not train a channels-last
            network so: cuDNN may compile kernels for each new side, seconds each (seen with
            depthwise convolutions and `amp`).
        val_share: Share of the images that is kept from training and measured after each epoch.
        rows: Outputs of the head that stand for the classes, in their order; None is all.
        n_images: A seeded random subset; of the glyphs, how many are drawn.
        mean: Channel means for pixels; None is what the network or else ImageNet says.
        std: Channel standard deviations, likewise.
        shards: Parts of a batch that batch norm sees apart; None is one for each process. Running
            statistics are those of the first part.
        seed: Of the subset, the split, the order, the crops and dropout.
        device: Where; None is where the network is.
        workers: Processes that decode images.
        save_every_s: Seconds between saved states within an epoch; one is saved after each.
        resume: Go on from the saved state, if there is one.
        overwrite: Replace a finished or interrupted run in `out`.
        progress: Show a progress bar.
    """

    out: str | Path
    epochs: int = 30
    max_steps: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True
    warmup: float = 0.05
    label_smoothing: float = 0.1
    clip: float | None = None
    constraint: str | None = None
    constraint_weight: float = 1.0
    tau: float | None = None
    distill: float = 0.0
    distill_after: float | None = None
    ema: float | None = None
    amp: str | None = None
    augment: str = "auto"
    crop_area: Sequence[float] | None = None
    flip: bool | None = None
    between: float | None = None
    val_share: float = 0.1
    rows: Sequence[int] | None = None
    n_images: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    shards: int | None = None
    seed: int = 0
    device: str | None = None
    workers: int = 0
    save_every_s: float = 60.0
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        whole = ("epochs", "max_steps", "batch_size", "shards")
        above = ("lr", "clip")
        least = ("weight_decay", "constraint_weight", "tau", "distill", "seed", "workers")
        shares = ("momentum", "warmup", "label_smoothing", "distill_after", "ema", "val_share")
        for names, good, what in (
            (whole, lambda x: isinstance(x, int) and x >= 1, "a whole number of 1 or more"),
            (above, lambda x: 0 < x < math.inf, "a number above 0"),
            (least, lambda x: 0 <= x < math.inf, "a number of 0 or more"),
            (shares, lambda x: 0 <= x < 1, "a share, 0 <= share < 1"),
            (("between",), lambda x: 0 <= x <= 1, "a share, 0 <= share <= 1"),
        ):
            for name in names:
                value = getattr(self, name)
                number = isinstance(value, Real) and not isinstance(value, bool)
                if value is not None and not (number and good(value)):
                    raise ValueError(f"bad {name}: {value!r}: give {what}")
        if self.constraint is not None and self.constraint not in CONSTRAINTS:
            known = ", ".join(CONSTRAINTS)
            raise ValueError(f"unknown constraint: {self.constraint!r}: choose {known}")
        if self.amp not in _AMP:
            raise ValueError(f"unknown amp: {self.amp!r}: choose 'bf16' or 'fp16', or None")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite: both are on: choose one")
        if (self.mean is None) != (self.std is None):
            given = "mean" if self.std is None else "std"
            raise ValueError(f"half a normalisation: only {given} is given: give mean and std")

    def options(self) -> dict[str, Any]:
        """What could change a number, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}


def rate(step: int, total: int, warmup: int, lr: float) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov & Hutter 2017).

    Args:
        step: Counted from 0.
        total: Steps of the run.
        warmup: Steps of warm-up; the last of them has the full rate.
        lr: The highest rate.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def groups(model: nn.Module, weight_decay: float, *, decay_norms: bool) -> list[dict[str, Any]]:
    """Parameter groups for SGD; frozen parameters are in none.

    Args:
        model: The network.
        weight_decay: Of matrices and kernels.
        decay_norms: False: vectors (biases, weights of norms) do not decay.

    Raises:
        ValueError: Every parameter is frozen.
    """
    free = [p for p in model.parameters() if p.requires_grad]
    if not free:
        raise ValueError("nothing to train: every parameter is frozen: unfreeze some")
    if decay_norms:
        return [{"params": free, "weight_decay": weight_decay}]
    kinds = {True: [p for p in free if p.ndim > 1], False: [p for p in free if p.ndim <= 1]}
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in kinds.items()
        if params
    ]


def refuse_other(saved: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Refuse what another run left, and name the first thing that differs.

    Args:
        saved: What the other run said of itself, by name.
        wanted: What this run says, as JSON would return it.
        what: "saved state" or "finished run".

    What an earlier version did not know counts as it was then: no sizes between the scales.

    Raises:
        ValueError: They differ.
    """
    saved = _as_now(saved, wanted)
    for name in sorted({*saved, *wanted}):
        was, now = saved.get(name), wanted.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            part = next(k for k in sorted({*was, *now}) if was.get(k) != now.get(k))
            name, was, now = f"{name}.{part}", was.get(part), now.get(part)
        raise ValueError(
            f"{what} of another run: {name} was {_short(was)}, is {_short(now)}: run as before, or "
            "with overwrite (--overwrite) and without resume"
        )


def _as_now(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version's run would say of itself, had it known today's choices.

    Those of a policy were then what its other fields say; where none is told at all, they are
    taken for the network's own.
    """
    policy = saved.get("policy", wanted.get("policy"))
    told = {"between": 0.0, **saved}
    return told if policy is None else {**told, "policy": {**asdict(Policy()), **policy}}


def _short(value: Any) -> str:
    text = repr(value).replace(": ", "=")
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
