"""One training step: losses at every scale, gradients over all shards, update of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cka_probe.distributed.ranks import Ranks
from cka_probe.io import dense
from cka_probe.rng import seeded
from msun.network.model import MSUN
from msun.training.config import TrainConfig
from msun.training.ema import EMA
from msun.training.losses import constraint_pairs, ensemble_distillation
from msun.training.schedule import learning_rate, parameter_groups

__all__ = ["DivergedError", "TrainingStep", "default_tau"]

# Loss scaling starts at 2**16 and halves after each skipped step; after 25 halvings in a row the
# scale cannot be the cause.
_MAX_SKIPPED = 25
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_tau(model: MSUN, kind: str) -> float | None:
    """The threshold of the constraint that the paper sets for this network; None for the default.

    Args:
        model: the network.
        kind: kind of the constraint.
    """
    return (model.spec or {}).get("tau") if kind == "raw" else None


class DivergedError(ValueError):
    """A loss, gradient or weight is not finite; a step leaves the weights unchanged."""


class TrainingStep:
    """A network with its optimiser, loss scaler, EMA and sums of the losses.

    Args:
        model: the network; trained in place, at all its scales.
        config: options of the run.
        total: number of steps of the run.
        kind: kind of the constraint.
        rows: outputs that stand for the classes; None for all.
        shards: number of parts of a batch, over all processes.
        ranks: the processes of the run.
        device: device of the network.

    Attributes:
        step: number of the next step, from 0.
        sums: sums of each loss and its number of steps, since the last `pop_means`.
        ema: the EMA of the weights, or None.
    """

    def __init__(
        self,
        model: MSUN,
        config: TrainConfig,
        *,
        total: int,
        kind: str,
        rows: list[int] | None,
        shards: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.model, self.config, self.ranks, self.device = model, config, ranks, device
        self.total, self.kind, self.rows, self.shards = total, kind, rows, shards
        self.tau = default_tau(model, kind) if config.tau is None else config.tau
        self.warmup = round(config.warmup * total)
        after = config.distill_after
        self.distill_from = self.warmup if after is None else round(after * total)
        decayed = parameter_groups(model, config.weight_decay, decay_norms=config.decay_norms)
        self.params: list[nn.Parameter] = [p for group in decayed for p in group["params"]]
        self.optimiser = torch.optim.SGD(decayed, lr=config.lr, momentum=config.momentum)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = None if config.ema is None else EMA(model, config.ema)
        self.step, self.skipped = 0, 0
        self.sums: dict[str, float] = defaultdict(float)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return learning_rate(max(0, self.step - 1), self.total, self.warmup, self.config.lr)

    def run(self, images: Mapping[int, Tensor], labels: Tensor) -> float:
        """Make one step.

        Args:
            images: {scale: (b, c, side, side)}, this process's part of the batch; the side is
                the scale, or another side that is routed to it (see `msun.data.crops`).
            labels: classes (b,).

        Returns:
            The loss, mean over all shards.

        Raises:
            DivergedError: a loss or the gradient is not finite.
        """
        lr = learning_rate(self.step, self.total, self.warmup, self.config.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad()
        names, values = self._backward(images, labels)
        grads = [p.grad for p in self.params if p.grad is not None]
        self.ranks.sum([*grads, values])
        self.scaler.unscale_(self.optimiser)
        losses = dict(zip(names, values.tolist(), strict=True))
        norm = nn.utils.get_total_norm(grads)
        self._check(losses, float(norm))
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.config.clip, norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        return float(losses["loss"])

    def _backward(self, images: Mapping[int, Tensor], labels: Tensor) -> tuple[list[str], Tensor]:
        """Add up the gradients of this process's shards, and return the names and means of losses.

        Batch norm normalises each shard separately. Its running statistics are those of the first
        shard, so that the result does not depend on the number of processes.
        """
        own = self.shards // self.ranks.size
        shards = {side: x.to(self.device).chunk(own) for side, x in images.items()}
        classes = labels.to(self.device).chunk(own)
        total: Tensor | None = None
        first: list[Tensor] = []
        for k in range(own):
            with seeded(self.config.seed, self.step, self.ranks.rank * own + k, device=self.device):
                losses = self._losses({side: x[k] for side, x in shards.items()}, classes[k])
                self.scaler.scale(losses["loss"] / self.shards).backward()  # type: ignore[no-untyped-call]
            values = torch.stack([x.detach().float() for x in losses.values()]) / self.shards
            total = values if total is None else total + values
            if k == 0 and own > 1:
                first = [x.clone() for x in self.model.buffers()]
        for now, kept in zip(self.model.buffers(), first, strict=False):
            now.copy_(kept)
        assert total is not None
        return list(losses), total

    def _losses(self, images: Mapping[int, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The total loss of one shard as "loss", and its parts by name."""
        config, dtype = self.config, _DTYPES.get(self.config.amp or "")
        zs: dict[int, Tensor] = {}
        logits: dict[int, Tensor] = {}
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            for side, x in images.items():
                out, z = self.model.step(x, side)
                zs[side] = z.movedim(self.model.axes, (2, 3))  # channels-last maps to (n, c, h, w)
                logits[side] = (out if self.rows is None else out[:, self.rows]).float()
        smooth = config.label_smoothing
        parts = {
            f"ce_{side}": F.cross_entropy(x, labels, label_smoothing=smooth)
            for side, x in logits.items()
        }
        loss = torch.stack(list(parts.values())).sum()
        for (a, b), value in constraint_pairs(zs, self.kind, tau=self.tau).items():
            parts[f"constraint_{a}_{b}"] = value
            loss = loss + config.constraint_weight * value.to(loss.dtype)
        if config.distill and self.step >= self.distill_from:
            for side, value in ensemble_distillation(logits).items():
                parts[f"distill_{side}"] = value
                loss = loss + config.distill * value
        return {"loss": loss, **parts}

    def _check(self, losses: Mapping[str, float], norm: float) -> None:
        """Add finite losses to the sums; raise for others, unless fp16 skips the step.

        Raises:
            DivergedError: the step and the losses that are not finite.
        """
        bad = [f"{name} {x}" for name, x in losses.items() if not math.isfinite(x)]
        bad += [] if math.isfinite(norm) else [f"norm of the gradient {norm}"]
        if not bad:
            self.skipped = 0
            for name, x in losses.items():
                self.sums[name] += x
                self.sums[f"steps {name}"] += 1
            return
        self.skipped += 1  # the scaler skips such a step, and halves its scale
        if self.config.amp != "fp16" or self.skipped > _MAX_SKIPPED:
            rest = [text for text in bad if not text.startswith("loss")] or bad
            raise DivergedError(f"training diverged: step {self.step}, {', '.join(rest)}")

    def pop_means(self) -> dict[str, float]:
        """The mean of each loss since the last call, by name; resets the sums."""
        names = [name for name in self.sums if not name.startswith("steps ")]
        means = {name: self.sums[name] / self.sums[f"steps {name}"] for name in names}
        self.sums.clear()
        return means

    def state(self) -> dict[str, Any]:
        """The state of model, optimiser, scaler and EMA, as tensors and plain types.

        Raises:
            DivergedError: weights or statistics are not finite.
        """
        for name, x in self.model.state_dict().items():
            x = dense(x)
            # some networks have -inf in an attention mask; nan and inf mean divergence
            if x.is_floating_point() and not bool((x.isfinite() | (x == -math.inf)).all()):
                raise DivergedError(f"training diverged: step {self.step}, {name} is not finite")
        return {
            "step": self.step,
            "skipped": self.skipped,
            "sums": dict(self.sums),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            # "average": the key in states of earlier versions
            "average": None if self.ema is None else self.ema.values,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a result of `state`.

        Args:
            state: the saved state.
        """
        self.step, self.skipped = state["step"], state["skipped"]
        self.sums = defaultdict(float, state["sums"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load(state["average"])
