"""The steps of `msun demo` on embedded images: probe, suggest, build, train, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cka_probe.inputs import glyphs
from cka_probe.models.embedded import glyphnet
from cka_probe.probing.api import probe
from cka_probe.report import Report
from msun.cutting.cuts import find_cuts
from msun.evaluation.accuracy import compare
from msun.evaluation.calibration import calibrate, recalibrated
from msun.network import checkpoint
from msun.network.builder import build
from msun.network.costs import subnet_costs
from msun.splitting.choice import SplitChoice
from msun.splitting.suggest import suggest_split
from msun.training.config import TrainConfig
from msun.training.size_sampling import step_macs
from msun.training.trainer import train

__all__ = ["SCALES", "SIDES", "Demo", "demo"]

SCALES = (16, 32, 64)
SIDES = (12, 16, 20, 24, 32, 40, 48, 64)
_PROBED = 1000  # images of the training split: the test images choose nothing
_DRAWN = 160 * len(glyphs.CLASSES)  # training images
_SPEC = {"name": "glyphnet", "model_args": {}, "classes": list(glyphs.CLASSES)}


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        report: CKA of every layer at every scale, enlarged back to 64 px.
        choice: the cut that the default rule suggests, with its reasons.
        evaluation: columns arm, size_px, top1, gmacs and those of `evaluate`, a row per arm and
            size.
        steps: training steps, by arm.
        gmacs: forward GMACs of all training images, by arm.
    """

    report: Report
    choice: SplitChoice
    evaluation: pd.DataFrame
    steps: dict[str, int]
    gmacs: dict[str, float]


def demo(
    out: Path,
    *,
    steps: int = 250,
    images: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> Demo:
    """Probe the embedded network, cut it where the report suggests, train both, measure both.

    The MSUN (`lean`) and the same backbone at 64 px alone start from the embedded weights, see the
    same images and are trained for equal MACs: the single-scale network gets more steps. Statistics
    for sizes that were not trained are re-estimated on training images. The single-scale network is
    measured natively, upsampled, and with statistics re-estimated for every size.

    Args:
        out: folder for model.pt (the MSUN) and the working files; it exists.
        steps: training steps of the MSUN.
        images: number of test images.
        batch_size: images per training step.
        seed: seed of images, order and training.
        say: a function that takes a line of text as each step begins.
        progress: show progress bars.

    Returns:
        The results.
    """
    say(f"1 probe: a network trained on characters of 64 px, at {_listed(SCALES)} px")
    probed = glyphs.tensor("train", _PROBED, seed)[0]
    report = probe(glyphnet(), probed, SCALES, resize="restore", seed=seed, progress=progress)
    cuts = find_cuts(glyphnet(), probed[:2])
    choice = suggest_split(report, cuts, costs=subnet_costs(glyphnet(), cuts, SCALES))
    say(f"2 suggest: {choice.headline}. {choice.why}")
    at = choice.layer if choice.layer is not None else "stem"
    arms = {
        "lean": build(glyphnet(), at, SCALES, spec=_SPEC),
        "single": build(glyphnet(), at, SCALES[-1:], spec=_SPEC),
    }
    cost = {arm: step_macs(net) for arm, net in arms.items()}
    taken = {arm: round(steps * cost["lean"] / macs) for arm, macs in cost.items()}
    for k, (arm, net) in enumerate(arms.items(), start=3):
        sides = _listed(net.scales)
        say(f"{k} train {arm} at {sides} px: {taken[arm]} steps of {batch_size} images")
        config = TrainConfig(
            out=out / f"train-{arm}", max_steps=taken[arm], batch_size=batch_size, lr=0.03,
            n_images=_DRAWN, seed=seed,
            val_share=0.02, overwrite=True, progress=progress,
        )  # fmt: skip
        train(net, "glyphs", config)
    drawn: dict[str, Any] = {"split": "train", "seed": seed, "progress": progress}
    calibrate(arms["lean"], "glyphs", SIDES, **drawn)
    checkpoint.save(arms["lean"], out / "model.pt")
    say(f"5 evaluate on {images} test images at {_listed(SIDES)} px")
    single = arms["single"]
    measured = {
        "lean": arms["lean"],
        "single": single,
        "single, upsampled": (single, {"feed": "upsampled"}),
        "single, BN re-estimated": recalibrated(single, "glyphs", SIDES[:-1], **drawn),
    }
    table = compare(
        measured, "glyphs", SIDES, n_images=images, seed=seed, latency=False, progress=progress
    )
    spent = {arm: taken[arm] * batch_size * macs / 1e9 for arm, macs in cost.items()}
    return Demo(report, choice, table, taken, spent)


def _listed(sides: tuple[int, ...]) -> str:
    return ", ".join(map(str, sides))
