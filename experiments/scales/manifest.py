"""What is to be run, in the order of what it decides."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from experiments.scales.arms import ARMS, BATCH, HALF, TUNED, Arm
from experiments.scales.tasks import TASKS

__all__ = ["CUT", "Run", "larger", "manifest", "moving", "rate_runs", "rates", "tuning",
           "unread"]  # fmt: skip

CUT = "layer1"  # stem and first stage, as the paper cuts ResNet-50
RATE_BUDGET = 0.25
WIDER = 2  # how often a grid may grow at an end that is its best value
DESIGN = "lean+small"  # what `lean` has become
HEADLINE = (DESIGN, "d3+small", "single", "g+small", "paper", "c2", "d3", "lean")
LEADING = (DESIGN, "d3+small", "single", "g+small", "c2", "paper")
LONG, FLAT = 4.0, 16.0  # budgets at which CIFAR-10 is tried again; the second for one network
FACTORS = ("d1", "own+small", "c2, enlarged", "c2+small", "g", "d2", "c1", "own", "own, full",
           "own, shared bn", "paper, free", "single, lean's steps", "lean+small+kd")  # fmt: skip
TRIALS = ("lean+native", "lean+up", "d3+up", "lean+between", "d3+between", "g+between",
          "lean+always", "d3+always")  # fmt: skip
LINE = ("line small", "line middle")
ON_CIFAR = ("d1", "g", "single, lean's steps", *LINE)
PLACES = (("glyphs", "residual"), ("glyphs", "depthwise"), ("cifar10", "residual"))
CUTS = {
    "residual": ("stem", "layer1", "layer2", "layer3"),
    "depthwise": ("stem", "layer1", "layer2", "layer3"),
    "mobilenetv2": ("layer1", "layer3"),
}
LARGER = ("imagenette", "mobilenetv2")  # task and network of the larger tier


@dataclass(frozen=True)
class Run:
    """One training, and all that is read from it.

    Attributes:
        task: "glyphs", "cifar10" or "imagenette".
        net: "residual", "depthwise" or "mobilenetv2".
        arm: a name in `ARMS`.
        seed: of weights, order and crops.
        budget: training MACs, in those of `Task.unit` images through the single-scale network.
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


def rates(arm: Arm, task: str = "glyphs") -> tuple[float, ...]:
    """The learning rates among which an arm's is chosen.

    In proportion to the batch, and over the number of scales: the loss is a sum over them.
    """
    share = arm.batch / BATCH / (3 if arm.scales == "all" else 1)
    return tuple(round(lr * share, 5) for lr in TASKS[task].rates)


def tuning(arm: str, budget: float = 1.0, net: str = "residual") -> tuple[str, float]:
    """The arm that is tuned in an arm's place, and the budget of the runs that choose the rate.

    A rate chosen in a quarter of the budget is not that of the whole, let alone of four times as
    much: `paper` does not leave chance in a quarter; with half the batch it chose .05 for `lean`,
    where the whole budget prefers .025 by 0.7 points; on CIFAR-10 it chose .00625, where four times
    the budget prefers .025 by 1.3. So where there was time the leading arms are tuned each on its
    own, with the whole budget: everywhere but in the first tier of the residual backbone, and with
    a quarter of it in the larger tier.

    Args:
        arm: which.
        budget: of the run that wants a rate.
        net: likewise.
    """
    family = ARMS[arm].rate_of
    if net == LARGER[1]:
        return arm, RATE_BUDGET
    if budget >= LONG:
        for name in (arm, family):
            if name in LEADING[:5]:
                return name, LONG
    if net == "depthwise" and arm in TUNED:
        return arm, 1.0
    if family.endswith(HALF) and family.removesuffix(HALF) in TUNED:
        return family, 1.0
    return family, 0.5 if family.removesuffix(HALF) == "paper" else RATE_BUDGET


def rate_runs(
    task: str, net: str, family: str, budget: float, known: Mapping[float, float]
) -> list[Run]:
    """The runs that are still to be made to choose a family's learning rate on validation.

    Args:
        task: of the runs.
        net: likewise.
        family: arm that is tuned for all that take its rate.
        budget: of the runs.
        known: accuracy by learning rate, so far.

    Returns:
        Those of the grid (at four times the budget its two lower values); then, where the best
        value is an end of it, the one beyond; empty where the best lies inside or the grid has
        grown enough.
    """
    grid = rates(ARMS[family], task)[: 2 if budget >= LONG else 3]
    wanted = [lr for lr in grid if lr not in known]
    if not wanted:
        tried, best = sorted(known), max(known, key=lambda lr: known[lr])
        if best == tried[0] and sum(lr < grid[0] for lr in tried) < WIDER:
            wanted = [round(best / 2, 5)]
        elif best == tried[-1] and sum(lr > grid[-1] for lr in tried) < WIDER:
            wanted = [round(best * 2, 5)]
    return [Run(task, net, family, 0, budget, lr=lr, tested=False) for lr in wanted]


def larger() -> list[Run]:
    """The larger tier: a network with ImageNet weights, for a machine with a GPU."""
    found = []
    for seed in range(3):
        found += [Run(*LARGER, arm, seed) for arm in LEADING]
        found += [Run(*LARGER, DESIGN, seed, cut=cut) for cut in CUTS[LARGER[1]][1:]]
    return found


def manifest() -> list[Run]:
    """Every run that is tested, the most telling first; rates are chosen as they are needed."""
    return list(dict.fromkeys(_ordered()))


def _ordered() -> Iterator[Run]:
    """Glyphs, residual: all arms. Then what of it the other backbone and CIFAR-10 bear out."""
    for arm in (*HEADLINE, *TRIALS):
        yield Run("glyphs", "residual", arm, 0)
    for arm in ("single", *LINE):
        for budget in (1.0, 2.0):
            yield Run("glyphs", "residual", arm, 0, budget)
    for cut in ("layer2", "layer3"):
        yield Run("glyphs", "residual", "lean+last", 0, cut=cut)
    for task, net in PLACES:
        yield from _cuts(task, net, 0)
    for arm in HEADLINE:
        yield Run("cifar10", "residual", arm, 0)
    yield from _longer(0)
    for seed in (0, 1, 2):
        yield from _cuts("glyphs", "residual", seed)
        yield from _halves(seed)
        for arm in LEADING:
            yield Run("glyphs", "residual", arm, seed)
    for arm in FACTORS:
        yield Run("glyphs", "residual", arm, 0)
    for arm in HEADLINE:
        yield Run("glyphs", "depthwise", arm, 0)
    yield Run("cifar10", "residual", "single", 0, FLAT)
    for seed in (0, 1, 2):
        yield from _up(seed)
    for seed in (1, 2):
        for task, net in PLACES[1:]:
            yield from _cuts(task, net, seed)
            for arm in ("d3+small", "g+small", "c2"):
                yield Run(task, net, arm, seed)
    for arm in (*FACTORS[:7], *LINE):
        yield Run("glyphs", "depthwise", arm, 0)
    for seed in (1, 2):
        yield from _longer(seed)
        for arm in ("d3", *FACTORS[:7]):
            yield Run("glyphs", "residual", arm, seed)
    for seed in (3, 4):
        for arm in LEADING[:4]:
            yield Run("glyphs", "residual", arm, seed)
        yield from _halves(seed, LEADING[:4])
    for arm in ON_CIFAR:
        yield Run("cifar10", "residual", arm, 0)
    yield from _cuts("cifar10", "depthwise", 0)
    for arm in HEADLINE:
        yield Run("cifar10", "depthwise", arm, 0)
    for seed in (3, 4):
        for arm in LEADING[4:]:
            yield Run("glyphs", "residual", arm, seed)
    for arm in FACTORS[7:]:
        yield Run("glyphs", "depthwise", arm, 0)
    for seed in (1, 2):
        for arm in FACTORS:
            yield Run("glyphs", "residual", arm, seed)
        for arm in HEADLINE:
            yield Run("glyphs", "depthwise", arm, seed)
        for arm in (*HEADLINE, *ON_CIFAR):
            yield Run("cifar10", "residual", arm, seed)
        yield from _cuts("cifar10", "depthwise", seed)


@cache
def moving() -> frozenset[str]:
    """The arms that are trained at several cuts: compared at the same one, or not at all."""
    return frozenset(run.arm for run in manifest() if run.cut != CUT)


def unread() -> list[Run]:
    """The runs that the verdict stands on: read once more, on images not looked at before."""
    rivals = [f"{arm}{HALF}" for arm in ("d3+small", "single, lean's steps", "g+small", "single")]
    mine = [Run("glyphs", "residual", DESIGN + HALF, seed, cut=cut)
            for seed in range(5) for cut in CUTS["residual"][1:]]  # fmt: skip
    mine += [Run("glyphs", "residual", arm, seed) for arm in rivals for seed in range(5)]
    for seed in range(3):
        mine += [*_up(seed), Run("glyphs", "residual", "d3+small", seed)]
    return mine


def _longer(seed: int) -> Iterator[Run]:
    """CIFAR-10 at a budget four times as large, as far as it can be paid for."""
    arms = (*LEADING[:5], *LINE) if seed == 0 else LEADING[:5]
    for arm in arms:
        yield Run("cifar10", "residual", arm, seed, LONG)
    yield Run("cifar10", "residual", DESIGN, seed, LONG, "layer2")


def _halves(seed: int, arms: tuple[str, ...] = LEADING) -> Iterator[Run]:
    """The leading arms with batches of half the size, the design at its deeper cuts too."""
    for arm in arms:
        yield Run("glyphs", "residual", arm + HALF, seed)
    for cut in CUTS["residual"][1:] if seed else CUTS["residual"]:
        yield Run("glyphs", "residual", DESIGN + HALF, seed, cut=cut)
    yield Run("glyphs", "residual", "single, lean's steps" + HALF, seed)


def _up(seed: int) -> Iterator[Run]:
    """What mixed sizes, most of them small, ask: the design and its rival with no image shrunk."""
    yield Run("glyphs", "residual", "d3+up", seed)
    yield Run("glyphs", "residual", "d3+up" + HALF, seed)
    for cut in CUTS["residual"][1:]:
        yield Run("glyphs", "residual", "lean+up" + HALF, seed, cut=cut)


def _cuts(task: str, net: str, seed: int) -> Iterator[Run]:
    """What the study of the split needs of one seed."""
    yield Run(task, net, "single", seed)  # the network that a user probes
    for cut in CUTS[net]:
        yield Run(task, net, DESIGN, seed, cut=cut)
