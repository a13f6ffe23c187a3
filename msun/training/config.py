"""The options of a training run, and the comparison of a saved run with this one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from msun.network.policy import Policy
from msun.training.losses import CONSTRAINTS

__all__ = ["TrainConfig", "check_same_run"]

# Options that change no number of a finished run, so a resumed run may change them.
_FREE = ("out", "device", "workers", "save_every_s", "resume", "overwrite", "progress")
_AMP = (None, "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run.

    Attributes:
        out: folder for model.pt, metrics.csv, config.json and, until the end, state.pt.
        epochs: number of passes over the training images.
        max_steps: number of steps, instead of `epochs`; the schedule covers them.
        batch_size: number of images per step, over all processes, each at every scale. For equal
            cost, 16 instead of 32 gave `lean` 0.3 to 0.5 points (experiments/scales).
        lr: highest learning rate, after the warm-up.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        decay_norms: whether biases and the weights of norms decay too.
        warmup: share of the steps in which the rate rises linearly; then it falls as a cosine.
        label_smoothing: label smoothing of the cross-entropies.
        clip: highest length of the gradient; None for no clipping.
        constraint: "none", "raw", "normalised" or "cka"; None for that of the network's policy.
        constraint_weight: weight of the constraint in the loss.
        tau: threshold below which parts of the constraint count as 0; None for 0.01 with "raw"
            (0.001 with the paper's subnets of DenseNet-121 and VGG-16-BN), else 0.
        distill: weight of ensemble distillation; 0 for none.
        distill_after: share of the steps before distillation begins; None for the warm-up.
        ema: EMA decay per step, in [0, 1); in early steps (1 + step) / (10 + step) if smaller. The
            averaged weights are validated and saved. None for no EMA.
        amp: autocast to "bf16" or "fp16" (with loss scaling); None for float32.
        augment: "auto" or "none" (see `msun.data.crops.augmentation`).
        crop_area: lowest and highest share of the area of a crop; None for the default of the data.
        flip: whether to mirror; None for the default of the data.
        between: share of the steps in which a scale is trained with other sizes that are routed to
            it. A side is drawn from them, uniform in the logarithm. All crops of the batch are
            shrunk to it and then resized, antialiased, to the input size for such images. None is
            0.5 if the policy resizes images ("small", "scale") and there are several scales, else
            0. With 1, hardly any crop is as sharp as an image of the scale itself, which costs
            accuracy there until `msun.recalibrated`. Avoid it for channels-last networks on CUDA:
            cuDNN may compile kernels for each new side, seconds each (observed with depthwise
            convolutions and `amp`).
        val_share: share of the images that is held out and evaluated after each epoch.
        rows: outputs of the network that stand for the classes, in their order; None for all.
        n_images: size of a random subset; for glyphs, the number of images drawn.
        mean: channel means for pixels; None for those of the network, else of ImageNet.
        std: channel standard deviations, likewise.
        shards: number of parts of a batch that batch norm normalises separately; None for one per
            process. Running statistics are those of the first part.
        seed: seed of the subset, the split, the order, the crops and dropout.
        device: device to train on; None for that of the network.
        workers: number of processes that decode images.
        save_every_s: seconds between saved states within an epoch; one is saved after each epoch.
        resume: whether to continue from a saved state, if there is one.
        overwrite: whether to replace a finished or interrupted run in `out`.
        progress: whether to show a progress bar.
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
        """The options that can change a result, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise if a saved run differs from this one; the message names the first difference.

    Options that the version of the saved run did not have count with their behaviour of that time.

    Args:
        saved: description of the saved run, by name.
        wanted: description of this run, in the types that JSON returns.
        what: "saved state" or "finished run", for the message.

    Raises:
        ValueError: the runs differ.
    """
    saved = _with_defaults(saved, wanted)
    for name in sorted({*saved, *wanted}):
        was, now = saved.get(name), wanted.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            key = next(k for k in sorted({*was, *now}) if was.get(k) != now.get(k))
            name, was, now = f"{name}.{key}", was.get(key), now.get(key)
        raise ValueError(
            f"{what} of another run: {name} was {_short(was)}, is {_short(now)}: run as before, or "
            "with overwrite (--overwrite) and without resume"
        )


def _with_defaults(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a run by an earlier version, completed by options that it did not have.

    Missing fields of a policy get their defaults. A missing policy is taken from this run.
    """
    policy = saved.get("policy", wanted.get("policy"))
    completed = {"between": 0.0, **saved}  # earlier versions trained at the scales only
    if policy is None:
        return completed
    return {**completed, "policy": {**asdict(Policy()), **policy}}


def _short(value: Any) -> str:
    """A value as text of at most 40 characters, without ": ", which separates error parts."""
    text = repr(value).replace(": ", "=")
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
