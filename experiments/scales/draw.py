"""Every table and figure, from the ledger alone; the tables also go into the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from experiments.scales import latency, tables, unread, why
from experiments.scales.glance import glance
from experiments.scales.ledger import Ledger
from experiments.scales.manifest import CUTS, LINE
from experiments.scales.split import by_cut, picks, regrets
from experiments.scales.tiers import TIERS, under

__all__ = ["draw"]

LINES = {  # arm -> (colour, mark, in words); Okabe and Ito's colours, told apart by the mark too
    "a": ("#999999", "o", "(a) one scale, enlarged"),
    "b": ("#cccccc", "v", "(b) one scale, native"),
    "c1": ("#aa9900", "<", "(c1) multi-scale, all enlarged"),
    "c3": ("#56b4e9", "s", "(c3) multi-scale, BN re-estimated"),
    "d1": ("#009e73", "^", "(d1) private BN"),
    "d3": ("#e69f00", "D", "(d3) private BN, small enlarged"),
    "g": ("#cc79a7", "P", "(g) one head, stride by scale"),
    "paper": ("#000000", "X", "(e) MSUN paper"),
    "lean": ("#d55e00", "*", "(f) MSUN lean"),
    "line": ("#0072b2", "_", "one network per size"),
}
PANELS = {  # how images between the scales are met -> the arms' suffix
    "fed as they are": "", "resized to the scale that serves them": ", served",
    "trained for that, but the largest": "+small, served",
}  # fmt: skip
FEW = 4  # readings below which a figure shows nothing
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30, 90)


def draw(ledger: Ledger, page: Path) -> None:
    """Write tables to the ledger's folder, figures beside it, and both into README.md.

    Args:
        ledger: what has run.
        page: folder of README.md and figures/.
    """
    mpl.use("Agg")
    runs, trainings, pairs = (ledger.read(name) for name in ("runs", "trainings", "pairs"))
    said = ledger.read("splits")
    blocks: dict[str, str] = {}
    figures = page / "figures"
    figures.mkdir(exist_ok=True)
    asked = []
    for ending, tier in TIERS.items():
        mine, costs, both = (under(frame, tier) for frame in (runs, trainings, pairs))
        diffs = tables.differences(both)
        asked.append(diffs.assign(tier=ending.strip("-")))
        for task, net in mine[["task", "net"]].drop_duplicates().itertuples(index=False):
            found = of_tier(mine, costs, diffs, task, net)
            found["verdict"] = markdown(tables.verdicts(mine, both, task, net, CUTS[net]))
            blocks |= {f"{name} {task}-{net}{ending}": text for name, text in found.items()}
            tested = tables.accuracy(mine)
            tested = tested[(tested["task"] == task) & (tested["net"] == net)]
            if tested["arm"].nunique() < FEW:
                continue
            name = f"{task}-{net}{ending}"
            save(by_size(tested), figures / f"{name}-accuracy.png")
            save(pareto(tested), figures / f"{name}-pareto.png")
            if len(rows := against(diffs, task, net)):
                save(forest(rows), figures / f"{name}-lean.png")
        blocks[f"depth{ending}"] = markdown(tables.by_cut(both, CUTS))
        cuts = by_cut(mine, costs)
        if len(cuts):
            at = ["task", "net", "cut"]
            wide = cuts.pivot_table(index=at, values=["top1", "mmacs", "params"])
            blocks[f"cuts{ending}"] = markdown(wide.round(3).reset_index())
            blocks[f"regret{ending}"] = markdown(regrets(cuts, said))
            save(by_depth(cuts, said), figures / f"cuts{ending}.png")
    full = [table for table in asked if len(table)] or asked[:1]
    ledger.rewrite("differences", pd.concat(full).round(4))
    blocks["glance"] = markdown(glance(runs))
    blocks["halved"] = markdown(tables.halved(pairs))
    blocks["unread"] = markdown(unread.table(pairs, ledger.read("unread-pairs")))
    blocks["flat"] = markdown(tables.flatness(runs))
    blocks["rates"] = markdown(tables.rates_table(runs))
    blocks["choices"] = markdown(picks(said))
    if len(seen := ledger.read("why")):
        blocks["why"] = markdown(why.table(seen))
    if len(times := ledger.read("latency")):
        blocks["latency"] = markdown(latency.table(times))
    fill(page / "README.md", blocks)


def of_tier(
    runs: pd.DataFrame, trainings: pd.DataFrame, diffs: pd.DataFrame, task: str, net: str
) -> dict[str, str]:
    """The tables of one task and backbone under one tier's terms, by the name of their block."""
    leans = ("lean", "lean, served", "lean+small, served")
    others = tuple(arm for arm in diffs["arm"].drop_duplicates() if arm not in leans)
    found = {
        "main": tables.main_table(runs, trainings, task, net).reset_index(),
        "lean": tables.pair_table(diffs, task, net, leans),
        "factors": tables.pair_table(diffs, task, net, others),
    }
    return {name: markdown(table) for name, table in found.items()}


def markdown(frame: pd.DataFrame) -> str:
    """A table for the page."""
    if frame.empty:
        return "*Nothing has run yet.*"

    def cell(x: Any) -> str:
        if isinstance(x, float):
            return "" if pd.isna(x) else f"{x:g}"
        return str(x)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|---" * len(frame.columns) + "|"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Put each block between its two marks in a page; a block without marks stays away."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = re.escape(f"<!-- {name} -->"), re.escape(f"<!-- end {name} -->")
        text = re.sub(rf"({marks[0]}\n).*?({marks[1]})", lambda m, b=block: m[1] + b + "\n" + m[2],
                      text, flags=re.S)  # fmt: skip
    path.write_text(text, encoding="utf-8")


def save(ax: Axes, path: Path) -> None:
    """Write a figure and forget it."""
    assert ax.figure is not None
    ax.figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close("all")


def base(arm: str) -> str:
    """The arm of LINES that a reading belongs to."""
    return re.split(r"[+,=]", arm)[0]


def by_depth(cuts: pd.DataFrame, said: pd.DataFrame) -> Axes:
    """Accuracy by cut beside CKA at the cut, a panel a task and backbone; points are seeds."""
    groups = list(cuts.groupby(["task", "net"], sort=False))
    size = (3.4 * len(groups) + 0.6, 3.4)
    _, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for ax, ((task, net), part) in zip(axes[0], groups, strict=True):
        places = {cut: k for k, cut in enumerate(CUTS[str(net)])}
        mean = part.groupby("cut")["top1"].mean().rename(places).sort_index()
        ax.plot(mean.index, mean, color="#d55e00", marker="*", markersize=9)
        ax.plot(part["cut"].map(places), part["top1"], ".", color="#d55e00", alpha=0.5)
        ax.set_xticks(list(places.values()), list(places))
        ax.set_title(f"{task}, {net}", fontsize=10)
        ax.set_ylabel("top-1 (%), mean over the sizes", color="#d55e00", fontsize=9)
        mine = said[(said["task"] == task) & (said["net"] == net)]
        cka = mine.groupby("layer")["cka"].mean().rename(places).sort_index()
        other = ax.twinx()
        other.plot(cka.index, cka, color="#0072b2", marker="o", markersize=4)
        other.set_ylim(0, 1)
        other.set_ylabel("CKA, smallest scale with the largest", color="#0072b2", fontsize=9)
        ax.grid(alpha=0.25)
    axes[0][0].figure.tight_layout()
    return axes[0][0]


def by_size(table: pd.DataFrame) -> Axes:
    """Accuracy by size, a line an arm, a panel a way of serving sizes between the scales."""
    sizes = table[table["view"].str.isdecimal()].assign(side=lambda t: t["view"].astype(int))
    means = sizes.groupby(["arm", "side"], as_index=False)["top1"].mean()
    top = means["side"].max()
    own = means["arm"].isin(["line small", "line middle"])
    own |= (means["arm"] == "a") & (means["side"] == top)
    _, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for ax, (words, suffix) in zip(axes, PANELS.items(), strict=True):
        for arm, (colour, mark, _) in LINES.items():
            names = [arm + suffix, *([arm] if arm == "a" else [])]
            rows = means[own] if arm == "line" else means[means["arm"].isin(names)]
            ax.plot(rows["side"], rows["top1"], color=colour, marker=mark, linewidth=1.3,
                    linestyle="none" if arm == "line" else "-",
                    markersize=14 if arm == "line" else 5)  # fmt: skip
        ax.set_title(words, fontsize=10)
        ax.set_xticks(sorted(means["side"].unique()))
        ax.tick_params(labelsize=8)
        ax.set_xlabel("size of the image (px)")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1 accuracy (%)")
    drawn = {base(arm) for arm in means["arm"]}
    keys = [
        Line2D([], [], color=colour, marker=mark, label=words, linewidth=1.3)
        for arm, (colour, mark, words) in LINES.items()
        if arm in drawn or arm == "line"
    ]
    axes[2].legend(handles=keys, fontsize=8, frameon=False, loc="lower right")
    axes[2].figure.tight_layout()
    return axes[0]


def pareto(table: pd.DataFrame) -> Axes:
    """Mean accuracy over the sizes against mean MACs; the front as a line.

    Filled: images as they are. Hollow: resized to the scale that serves them; large and hollow:
    trained for that, too, the largest scale apart.
    """
    _, ax = plt.subplots(figsize=(7.4, 5.4))
    means = table[table["view"] == "mean"].groupby("arm")[["mmacs", "top1"]].mean()
    trial = means.index.str.contains("fed|between|native|always|kd")
    means = means[~trial].sort_values(["mmacs", "top1"], ascending=[True, False])
    front = means[means["top1"] > means["top1"].shift(fill_value=-1).cummax()]
    ax.step(front["mmacs"], front["top1"], where="post", color="#bbbbbb", linewidth=1, zorder=0)
    for arm, row in means.iterrows():
        colour, mark, _ = LINES.get(base(str(arm)), ("#666666", ".", ""))
        hollow = "served" in str(arm)
        ax.plot(row["mmacs"], row["top1"], color=colour, marker=mark,
                markersize=10 if "small" in str(arm) else 7,
                markerfacecolor="white" if hollow else colour)  # fmt: skip
    wide, high = (float(np.ptp(means[c])) or 1.0 for c in ("mmacs", "top1"))
    ax.set_xlim(means["mmacs"].min() - 0.05 * wide, means["mmacs"].max() + 0.22 * wide)
    placed: list[tuple[float, float]] = []
    for arm, row in sorted(means.iterrows(), key=lambda item: item[1]["top1"]):
        x, y = float(row["mmacs"]), float(row["top1"])
        near = [at for other, at in placed if abs(other - x) < 0.2 * wide]
        y = max([y, *(at + high / 28 for at in near)])  # labels of one column stand in line
        placed.append((x, y))
        ax.text(x + 0.018 * wide, y, str(arm), fontsize=8, va="center")
    ax.set_ylim(top=max(at for _, at in placed) + high / 28)
    ax.set_yticks([tick for tick in ax.get_yticks() if ax.get_ylim()[0] <= tick <= 100])
    ax.set(xlabel="MMACs an image, mean over the sizes", ylabel="top-1 (%), mean over the sizes")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def against(diffs: pd.DataFrame, task: str, net: str) -> pd.DataFrame:
    """Lean minus others, by view, where both serve the sizes between the scales alike."""
    rows = diffs[(diffs["task"] == task) & (diffs["net"] == net)]
    rows = rows[rows["arm"].isin(["lean" + suffix for suffix in PANELS.values()])]
    rows = rows[~rows["other"].isin(LINE)]  # each has a size of its own
    plain = rows["other"].isin(["a", "a+bn", "a=epochs", "c1+bn"])
    alike = [
        ("served" in arm) == ("served" in other) and ("small" in arm) == ("small" in other)
        for arm, other in zip(rows["arm"], rows["other"], strict=True)
    ]
    return rows[plain | pd.Series(alike, index=rows.index, dtype=bool)]


def forest(rows: pd.DataFrame) -> Axes:
    """Lean minus each rival, in points with 95 % intervals: mean over the sizes, and the ends."""
    sides = sorted({int(v) for v in rows["view"] if v.isdecimal()})
    views = {"mean": "mean over sizes", str(sides[0]): f"{sides[0]} px",
             str(sides[-1]): f"{sides[-1]} px"}  # fmt: skip
    pairs = list(dict.fromkeys(zip(rows["arm"], rows["other"], strict=True)))
    pairs = sorted(pairs, key=lambda pair: list(PANELS.values()).index(pair[0][4:]))[::-1]
    _, axes = plt.subplots(1, 3, figsize=(10, 0.9 + 0.26 * len(pairs)), sharey=True)
    for ax, (view, words) in zip(axes, views.items(), strict=True):
        at = rows[rows["view"] == view].set_index(["arm", "other"])
        for y, pair in enumerate(pairs):
            if pair not in at.index:
                continue
            low, high, diff = at.loc[pair, ["low", "high", "diff"]]
            colour = "#d55e00" if low > 0 or high < 0 else "#888888"
            ax.plot([low, high], [y, y], color=colour, linewidth=2)
            ax.plot(diff, y, "o", color=colour, markersize=4)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(-60, 120)
        ax.xaxis.set_major_locator(FixedLocator(TICKS))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_title(words, fontsize=9)
        ax.grid(alpha=0.25, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[0].set_yticks(
        range(len(pairs)), [f"{arm}  \N{MINUS SIGN}  {other}" for arm, other in pairs]
    )
    axes[1].set_xlabel("difference in points; orange where the interval excludes 0")
    axes[0].figure.tight_layout()
    return axes[0]
