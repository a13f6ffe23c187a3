"""What is to be run, in the order of what it decides."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from experiments.scales.arms import ARMS, Arm

__all__ = ["BATCH", "CUT", "RATES", "Run", "manifest", "rate_runs", "rates"]

BATCH = 32
CUT = "layer1"  # stem and first stage, as the paper cuts ResNet-50
UNIT = 240_000  # images of the single-scale network: a budget of 1, 12 epochs of 20,000
RATES = (0.075, 0.15, 0.3)  # over the number of scales: the loss is a sum over them
RATE_BUDGET = 0.25
HEADLINE = ("lean", "paper", "g", "d3", "c2", "single", "lean+between", "g+between",
            "d3+between", "c2+between", "line small", "line middle", "lean+kd")  # fmt: skip
FIRST = ("lean", "g", "d3", "paper", "lean+between", "d3+between", "g+between", "c2", "single",
         "own", "c2+between", "lean+kd", "d3+kd", "g+kd", "d1", "c2, enlarged", "own+kd",
         "d2", "paper, free", "c1", "own, full", "own, shared bn",
         "single, lean's steps", "lean+always")  # fmt: skip
LINE = ("line small", "line middle")
ON_CIFAR = ("lean", "g", "d3", "lean+between", "g+between", "paper", "c2", "d1", "single",
            "single, lean's steps", *LINE)  # fmt: skip
CUTS = {
    "residual": ("stem", "layer1", "layer2", "layer3"),
    "depthwise": ("stem", "layer1", "layer2", "layer3"),
}


@dataclass(frozen=True)
class Run:
    """One training, and all that is read from it.

    Attributes:
        task: "glyphs" or "cifar10".
        net: "residual" or "depthwise".
        arm: a name in `ARMS`.
        seed: of weights, order and crops.
        budget: training MACs, in those of 240,000 images through the single-scale network.
        cut: where the head ends.
        lr: of a run that chooses the rate; None takes the chosen one.
        tested: whether the test images are read, or those for validation alone.
    """

    task: str
    net: str
    arm: str
    seed: int
    budget: float = 1.0
    cut: str = CUT
    lr: float | None = None
    tested: bool = True

    @property
    def spec(self) -> Arm:
        """The arm itself."""
        return ARMS[self.arm]

    @property
    def readings(self) -> dict[str, str]:
        """What is read from it; a run that is not tested needs the first reading alone."""
        every = list(self.spec.readings.items())
        return dict(every if self.tested else every[:1])

    def left(self, done: Collection[tuple[str, str]]) -> list[str]:
        """The readings that are not in the ledger yet."""
        return [label for label in self.readings if (self.key, label) not in done]

    @property
    def key(self) -> str:
        """Names the run in the ledger and its folder."""
        arm = self.arm.replace(",", "").replace("'", "").replace(" ", "-")
        key = f"{self.task}_{self.net}_{arm}_s{self.seed}_b{self.budget:g}_{self.cut}"
        return key if self.lr is None else f"{key}_lr{self.lr:g}"


def rates(arm: Arm) -> tuple[float, ...]:
    """The learning rates among which an arm's is chosen."""
    return tuple(round(lr / (3 if arm.scales == "all" else 1), 3) for lr in RATES)


def rate_runs(task: str, net: str, family: str) -> list[Run]:
    """The short runs that choose a family's learning rate on validation."""
    grid = rates(ARMS[family])
    return [Run(task, net, family, 0, RATE_BUDGET, lr=lr, tested=False) for lr in grid]


def manifest() -> Iterator[Run]:
    """Every run, the most telling first; each is preceded by what its learning rate needs."""
    seen: set[Run] = set()
    for run in _ordered():
        needed = rate_runs(run.task, run.net, run.spec.rate_of)
        for one in (*needed, run):
            if one not in seen:
                seen.add(one)
                yield one


def _ordered() -> Iterator[Run]:
    for arm in FIRST:
        yield Run("glyphs", "residual", arm, 0)
    yield Run("glyphs", "residual", "single", 0, budget=2.0)
    for arm in LINE:
        yield Run("glyphs", "residual", arm, 0)
        yield Run("glyphs", "residual", arm, 0, budget=2.0)
    for seed in (1, 2):
        for arm in HEADLINE:
            yield Run("glyphs", "residual", arm, seed)
    for arm in (*FIRST, *LINE):
        yield Run("glyphs", "depthwise", arm, 0)
    for net in ("residual", "depthwise"):
        for cut in CUTS[net]:
            yield Run("glyphs", net, "lean", 0, cut=cut)
    for arm in ON_CIFAR:
        yield Run("cifar10", "residual", arm, 0)
    for seed in (1, 2):
        for net in ("residual", "depthwise"):
            for cut in CUTS[net]:
                yield Run("glyphs", net, "lean", seed, cut=cut)
    for seed in (1, 2):
        for arm in HEADLINE:
            yield Run("glyphs", "depthwise", arm, seed)
        for arm in ON_CIFAR:
            yield Run("cifar10", "residual", arm, seed)
    for cut in CUTS["residual"]:
        for seed in (0, 1, 2):
            yield Run("cifar10", "residual", "lean", seed, cut=cut)
    for arm in ON_CIFAR:
        yield Run("cifar10", "depthwise", arm, 0)
    for cut in CUTS["depthwise"]:
        for seed in (0, 1, 2):
            yield Run("cifar10", "depthwise", "lean", seed, cut=cut)
    for arm in FIRST:
        for seed in (1, 2):
            yield Run("glyphs", "residual", arm, seed)
    for seed in (3, 4):
        for arm in HEADLINE:
            yield Run("glyphs", "residual", arm, seed)
