"""The arms: how each is built from the same backbone, how it is trained, how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from experiments.scales.nets import backbone
from experiments.scales.pretrained import load_pretrained
from experiments.scales.tasks import Task
from msun import MSUN, build
from msun.network.policy import policy_of

__all__ = ["ARMS", "BATCH", "HALF", "PAIRS", "READINGS", "TUNED", "Arm", "made", "plain_net"]

BATCH = 32  # images a step, each at all scales of an arm
HALF = " @16"  # ends the names of arms and readings with half of that
_STOCK = {"subnets": "shared", "merge": "native"}  # the backbone itself, at every size


@dataclass(frozen=True)
class Arm:
    """One way of training one network.

    Attributes:
        about: in words.
        choices: of `msun.network.policy.Policy`, in place of the preset's; images are fed as they
            are where nothing is said.
        preset: of `msun.build`.
        scales: "all", "largest", or one side in pixels.
        enlarge: small images first: "no", "lean" (to `Task.least`) or "full".
        constraint: of the training; None is the policy's.
        distill: weight of ensemble distillation.
        between: share of the steps in which a scale learns the sizes that are resized to it.
        rate_of: the arm whose learning rate it takes: its family is tuned as one.
        readings: label -> how the trained network is measured (see `READINGS`); the first decides
            what is chosen on validation.
        paces: the arm whose number of steps it takes, instead of equal MACs.
        batch: images a step.
    """

    about: str
    choices: Mapping[str, str] = field(default_factory=dict)
    preset: str = "lean"
    scales: str | int = "all"
    enlarge: str = "no"
    constraint: str | None = "none"
    distill: float = 0.0
    between: float = 0.0
    rate_of: str = ""
    readings: Mapping[str, str] = field(default_factory=dict)
    paces: str = ""
    batch: int = BATCH


def _private(label: str, *, fed: bool = False) -> dict[str, str]:
    """Readings of a network with batch norms of its own for each scale."""
    more = {f"{label}, fed": "fed"} if fed else {}
    return {label: "calibrated", **more, f"{label}, served": "served"}


def _between(label: str) -> dict[str, str]:
    """Readings of a network that has learned the sizes that are resized to its scales."""
    return {label: "fed", f"{label}, served": "served"}


# How a trained network is measured:
#   plain         as it is; sizes between the scales use the statistics of the nearest
#   calibrated    statistics re-estimated for sizes that were not trained
#   recalibrated  statistics re-estimated for every size
#   fed           an image is resized to the scale that serves it, and has its statistics
#   served        fed, and statistics re-estimated for every size before it is resized
#   upsampled     images enlarged to the reference
#   upsampled, recalibrated; fed, recalibrated    both
READINGS = ("plain", "calibrated", "recalibrated", "fed", "fed, recalibrated", "served",
            "upsampled", "upsampled, recalibrated")  # fmt: skip

ARMS: dict[str, Arm] = {
    "single": Arm(
        "one scale, the largest", scales="largest", rate_of="single",
        readings={"a": "upsampled", "a+bn": "upsampled, recalibrated", "b": "plain",
                  "b+bn": "recalibrated"},
    ),
    "single, lean's steps": Arm(
        "(a) at equal epochs", scales="largest", rate_of="single", paces="lean+small",
        readings={"a=epochs": "upsampled"},
    ),
    "c1": Arm(
        "multi-scale, all enlarged to full", {**_STOCK, "norm": "shared"}, enlarge="full",
        rate_of="c2", readings={"c1+bn": "recalibrated", "c1": "plain"},
    ),
    "c2": Arm(
        "multi-scale native, shared BN", {**_STOCK, "norm": "shared"}, rate_of="c2",
        readings={"c3": "recalibrated", "c3, fed": "fed, recalibrated", "c2": "plain",
                  "c3, served": "served"},
    ),
    "c2, enlarged": Arm(
        "multi-scale, small images enlarged to lean's MACs, shared BN",
        {**_STOCK, "norm": "shared"}, enlarge="lean", rate_of="c2",
        readings={"c3, enlarged": "recalibrated", "c3, enlarged, served": "served"},
    ),
    "d1": Arm("private BN", {**_STOCK, "norm": "private"}, rate_of="g",
              readings=_private("d1")),
    "d2": Arm("private BN + distillation", {**_STOCK, "norm": "private"}, distill=1.0,
              rate_of="g", readings=_private("d2")),
    "d3": Arm("private BN, small images enlarged to lean's MACs", {**_STOCK, "norm": "private"},
              enlarge="lean", rate_of="g", readings=_private("d3", fed=True)),
    "d3+kd": Arm("d3 + distillation", {**_STOCK, "norm": "private"}, enlarge="lean", distill=1.0,
                 rate_of="g", readings=_private("d3+kd")),
    "g": Arm("private BN, one head whose stride follows the scale", {"subnets": "shared"},
             rate_of="g", readings=_private("g", fed=True)),
    "g+kd": Arm("g + distillation", {"subnets": "shared"}, distill=1.0, rate_of="g",
                readings=_private("g+kd")),
    "d3+between": Arm(
        "d3, each scale learns the sizes that are resized to it",
        {**_STOCK, "norm": "private", "inputs": "scale"},
        enlarge="lean", between=0.5, rate_of="g", readings=_between("d3+between"),
    ),
    "g+between": Arm(
        "g, each scale learns the sizes that are resized to it",
        {"subnets": "shared", "inputs": "scale"},
        between=0.5, rate_of="g", readings=_between("g+between"),
    ),
    "lean+between": Arm(
        "lean, each scale learns the sizes that are resized to it", {"inputs": "scale"},
        constraint=None, between=0.5, rate_of="g", readings=_between("lean+between"),
    ),
    "lean+small": Arm(
        "lean+between, but the reference learns and gets its sizes as they are",
        {"inputs": "small", "strides": "first"}, constraint=None, between=0.5, rate_of="g",
        readings={"lean+small, served": "recalibrated"},
    ),
    "lean+last": Arm(
        "lean+small, but small subnets lose their last strides first: another network only where "
        "the cut lies behind more strides than go", {"inputs": "small", "strides": "last"},
        constraint=None, between=0.5, rate_of="g", readings={"lean+last, served": "recalibrated"},
    ),
    "lean+native": Arm(
        "lean+between, but every scale learns and gets its sizes as they are",
        constraint=None, between=0.5, rate_of="g",
        readings={"lean+native, served": "recalibrated"},
    ),
    "g+small": Arm(
        "g+between, as lean+small", {"subnets": "shared", "inputs": "small"}, between=0.5,
        rate_of="g", readings={"g+small, served": "recalibrated"},
    ),
    "d3+small": Arm(
        "d3+between, as lean+small", {**_STOCK, "norm": "private", "inputs": "small"},
        enlarge="lean", between=0.5, rate_of="g",
        readings={"d3+small, served": "recalibrated"},
    ),
    "lean+up": Arm(
        "lean+small, but only the reference's images are ever shrunk",
        {"inputs": "small", "routing": "up"}, constraint=None, between=0.5, rate_of="g",
        readings={"lean+up, served": "recalibrated"},
    ),
    "d3+up": Arm(
        "d3+between, as lean+up",
        {**_STOCK, "norm": "private", "inputs": "small", "routing": "up"}, enlarge="lean",
        between=0.5, rate_of="g", readings={"d3+up, served": "recalibrated"},
    ),
    "d3+always": Arm(
        "d3+between in every step", {**_STOCK, "norm": "private", "inputs": "scale"},
        enlarge="lean", between=1.0, rate_of="g", readings=_between("d3+always"),
    ),
    "own+small": Arm(
        "lean+small without its constraint", {"inputs": "small", "strides": "first"},
        between=0.5, rate_of="g",
        readings={"own+small, served": "recalibrated"},
    ),
    "lean+small+kd": Arm(
        "lean+small + distillation", {"inputs": "small", "strides": "first"},
        constraint=None, between=0.5, distill=1.0, rate_of="g",
        readings={"lean+small+kd, served": "recalibrated"},
    ),
    "lean+always": Arm(
        "lean+between in every step", {"inputs": "scale"}, constraint=None, between=1.0,
        rate_of="g",
        readings=_between("lean+always"),
    ),
    "c2+small": Arm(
        "c2, as lean+small", {**_STOCK, "norm": "shared", "inputs": "small"}, between=0.5,
        rate_of="c2", readings={"c3+small, served": "recalibrated"},
    ),
    "own": Arm("lean without its constraint", rate_of="g", readings=_private("own")),
    "lean": Arm("MSUN lean", constraint=None, rate_of="g", readings=_private("lean", fed=True)),
    "own+kd": Arm("lean, distillation instead of the constraint", distill=1.0, rate_of="g",
                  readings=_private("own+kd")),
    "lean+kd": Arm("MSUN lean + distillation", constraint=None, distill=1.0, rate_of="g",
                   readings=_private("lean+kd")),
    "own, shared bn": Arm("own subnets, one BN in the trunk", {"norm": "shared"}, rate_of="g",
                          readings={"own, shared bn+bn": "recalibrated",
                                    "own, shared bn": "plain"}),
    "own, full": Arm("own subnets, private BN, trunk always at the full grid", {"merge": "full"},
                     rate_of="paper", readings=_private("own, full")),
    "paper, free": Arm("MSUN paper without its constraint", preset="paper", rate_of="paper",
                       readings={"paper, free+bn": "recalibrated", "paper, free": "plain"}),
    "paper": Arm("MSUN paper", preset="paper", constraint=None, rate_of="paper",
                 readings={"paper": "plain", "paper+bn": "recalibrated",
                           "paper, fed": "fed", "paper+bn, fed": "fed, recalibrated",
                           "paper, served": "served"}),
    "line small": Arm("a network for the smallest scale alone, enlarged as d3", scales=0,
                      enlarge="lean", rate_of="single", readings={"line small": "plain"}),
    "line middle": Arm("a network for the middle scale alone", scales=1, enlarge="lean",
                       rate_of="single", readings={"line middle": "plain"}),
}  # fmt: skip


TUNED = ("lean+small", "d3+small", "g+small")  # each has a rate of its own, with half the batch
_AS = {"lean+up": "lean+small", "d3+up": "d3+small"}  # and these have that of the like one


def _halved(name: str) -> Arm:
    """An arm with twice the steps of half the images; its rate is tuned anew."""
    arm = ARMS[name]
    return replace(
        arm, about=f"{arm.about}, batches of {BATCH // 2}", batch=BATCH // 2,
        rate_of=(name if name in TUNED else _AS.get(name, arm.rate_of)) + HALF,
        paces=arm.paces and arm.paces + HALF,
        readings={label + HALF: how for label, how in arm.readings.items()},
    )  # fmt: skip


ARMS |= {
    name + HALF: _halved(name)
    for name in ("single", "single, lean's steps", "c2", "g", "g+small", "d3+small", "lean+small",
                 "paper", "lean+up", "d3+up")
}  # fmt: skip

# The comparisons that are made, arm - other, on the same images by the same seed.
_PLAIN = ("a", "a+bn", "a=epochs", "c1+bn", "line small", "line middle")
_ASKED: dict[str, tuple[str, ...]] = {
    "lean": ("paper", "paper+bn", "c3", "c3, enlarged", "d1", "d2", "d3", "g", "own", *_PLAIN),
    "lean, fed": ("lean", "paper, fed", "paper+bn, fed", "c3, fed", "d3, fed", "g, fed"),
    "lean, served": ("lean", "lean, fed", "paper, served", "c3, served", "c3, enlarged, served",
                     "d1, served", "d2, served", "d3, served", "g, served", "own, served"),
    "lean+between": ("lean, fed", "lean+always", "g+between", "d3+between"),
    "lean+small, served": (
        "lean", "lean, served", "lean+between, served", "lean+native, served", "lean+up, served",
        "own+small, served", "g+small, served", "d3+small, served", "c3+small, served",
        "d3+up, served",
        "d3", "d1", "d2", "c3", "c3, enlarged", "g", "d1, served", "d2, served", "d3, served",
        "g, served", "c3, served", "c3, enlarged, served", "paper", "paper+bn", "paper, served",
        *_PLAIN,
    ),
    "lean+between, served": ("lean, served", "lean+between", "lean+always, served",
                             "g+between, served", "d3+between, served"),
    "lean+always, served": ("d3+always, served",),
    "lean+up, served": ("d3+up, served", "d3+small, served", "g+small, served"),
    "d3+up, served": ("d3+small, served",),
    "lean+small+kd, served": ("lean+small, served",),
    "g+small, served": ("d3+small, served", "c3+small, served"),
    "d3+small, served": ("d3, served", "d3+between, served", "c3+small, served", "a", "a+bn"),
    "c3+small, served": ("c3, served",),
    "lean+kd, served": ("lean, served", "g+kd, served", "d3+kd, served", "own+kd, served"),
    "own, served": ("g, served", "own, full, served"),
    "own": ("own, shared bn+bn", "g", "d1"),
    "own+kd, served": ("own, served",),
    "g": ("d1", "d3", "c3", "paper"),
    "g, fed": ("g",),
    "g, served": ("g, fed", "d1, served", "d3, served", "c3, served"),
    "g+kd, served": ("g, served",),
    "d3, fed": ("d3",),
    "d3, served": ("d3, fed", "d1, served", "c3, enlarged, served"),
    "d3": ("d1", "c3, enlarged"),
    "d3+kd, served": ("d3, served",),
    "d2, served": ("d1, served",),
    "d2": ("d1",),
    "d1": ("c3",),
    "d1, served": ("d1", "c3, served"),
    "c3": ("c2", "c1+bn"),
    "c3, fed": ("c3",),
    "c3, served": ("c3", "c3, fed"),
    "paper, fed": ("paper",),
    "paper, served": ("paper, fed", "own, full, served"),
    "paper+bn": ("paper", "paper, free+bn", "own, full"),
    "a+bn": ("a",),
}  # fmt: skip
_HALVED = {label for arm in ARMS.values() for label in arm.readings if label.endswith(HALF)}
_RIVALS = ("d3+small, served", "g+small, served", "d3, served", "c3, enlarged, served", "a")
_PAIRS = {(arm, other) for arm, others in _ASKED.items() for other in others}
PAIRS = frozenset(
    _PAIRS
    | {(a + HALF, b + HALF) for a, b in _PAIRS if {a + HALF, b + HALF} <= _HALVED}
    | {(label, label.removesuffix(HALF)) for label in _HALVED}
    | {("lean+small, served" + HALF, rival) for rival in _RIVALS}
    | {(f"lean+{how}, served" + HALF, "d3+up, served") for how in ("small", "up")}
)


def made(arm: Arm, task: Task, net: str, *, at: str, seed: int, enlarge: str | None = None,
         inputs: str | None = None, data: Path | None = None) -> MSUN:  # fmt: skip
    """The untrained network of an arm; the backbone's weights follow from the seed alone.

    Args:
        arm: which.
        task: gives scales, channels and classes.
        net: the backbone's name.
        at: the cut.
        seed: of the weights.
        enlarge: in place of the arm's own.
        inputs: in place of the policy's own.
        data: folder with weights/, which a network that has published ones then gets.
    """
    plain = plain_net(arm, task, net, seed=seed, enlarge=enlarge)
    if data is not None and net == "mobilenetv2":
        load_pretrained(plain, data)
    policy = policy_of(arm.preset).but(**{"inputs": "native", **arm.choices}).but(inputs=inputs)
    return build(plain, at, trained(arm, task), preset=arm.preset, policy=policy)


def plain_net(
    arm: Arm, task: Task, net: str, *, seed: int, enlarge: str | None = None
) -> nn.Sequential:
    """The backbone of an arm, untrained."""
    least = {"no": 0, "lean": task.least, "full": task.reference}[enlarge or arm.enlarge]
    plain = backbone(
        net, channels=task.channels, classes=task.classes, reference=task.reference,
        strides=task.strides, least=least, seed=seed,
    )  # fmt: skip
    return plain.to(memory_format=torch.channels_last)  # faster on a CPU


def trained(arm: Arm, task: Task) -> tuple[int, ...]:
    """The sides that an arm is trained at, in pixels."""
    if arm.scales == "all":
        return task.scales
    return (task.reference,) if arm.scales == "largest" else (task.scales[int(arm.scales)],)
