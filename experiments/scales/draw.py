"""Every table and figure, from the ledger alone; the tables also go into the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from experiments.scales import tables
from experiments.scales.ledger import Ledger
from experiments.scales.split import by_cut, regrets

__all__ = ["draw"]

LINES = {  # arm -> (colour, mark, in words); Okabe and Ito's colours, told apart by the mark too
    "a": ("#999999", "o", "(a) one scale, enlarged"),
    "b": ("#cccccc", "v", "(b) one scale, native"),
    "c3": ("#56b4e9", "s", "(c3) multi-scale, BN re-estimated"),
    "d1": ("#009e73", "^", "(d1) private BN"),
    "d3": ("#e69f00", "D", "(d3) private BN, small enlarged"),
    "g": ("#cc79a7", "P", "(g) one head, stride by scale"),
    "paper": ("#000000", "X", "(e) MSUN paper"),
    "lean": ("#d55e00", "*", "(f) MSUN lean"),
    "line": ("#0072b2", "_", "one network per size"),
}
RIVALS = ("a", "a+bn", "c1+bn", "c3", "c3, enlarged", "d1", "d2", "d3", "g", "own", "paper",
          "paper+bn")  # fmt: skip


def draw(ledger: Ledger, page: Path) -> None:
    """Write tables to the ledger's folder, figures beside it, and both into README.md.

    Args:
        ledger: what has run.
        page: folder of README.md and figures/.
    """
    mpl.use("Agg")
    runs, trainings = ledger.read("runs"), ledger.read("trainings")
    diffs = tables.differences(ledger.read("pairs"))
    ledger.rewrite("differences", diffs.round(4))
    blocks: dict[str, str] = {}
    figures = page / "figures"
    figures.mkdir(exist_ok=True)
    tested = tables.accuracy(runs)
    for (task, net), mine in tested.groupby(["task", "net"], sort=False):
        name = f"{task}-{net}"
        main = tables.main_table(runs, trainings, task, net)
        blocks[f"main {name}"] = markdown(main.reset_index())
        asked = diffs["arm"].drop_duplicates()
        blocks[f"lean {name}"] = markdown(tables.pair_table(diffs, task, net, ("lean",)))
        others = tuple(arm for arm in asked if arm != "lean")
        blocks[f"factors {name}"] = markdown(tables.pair_table(diffs, task, net, others))
        blocks[f"verdict {name}"] = markdown(tables.verdict(runs, diffs, task, net))
        save(by_size(mine), figures / f"{name}-accuracy.png")
        save(pareto(mine), figures / f"{name}-pareto.png")
        if len(against(diffs, task, net)):
            save(forest(diffs, task, net), figures / f"{name}-lean.png")
    blocks["flat"] = markdown(tables.flatness(runs))
    blocks["rates"] = markdown(tables.rates_table(runs))
    cuts = by_cut(runs, trainings)
    wide = cuts.pivot_table(index=["task", "net", "cut"], values=["top1", "mmacs", "params"])
    blocks["cuts"] = markdown(wide.round(3).reset_index() if len(cuts) else cuts)
    blocks["regret"] = markdown(regrets(cuts, ledger.read("splits")))
    fill(page / "README.md", blocks)


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


def by_size(table: pd.DataFrame) -> Axes:
    """Accuracy by size, a line an arm, mean over the seeds; the reference line as bars."""
    _, ax = plt.subplots(figsize=(6.4, 4.2))
    sizes = table[table["view"].str.isdecimal()].assign(side=lambda t: t["view"].astype(int))
    means = sizes.groupby(["arm", "side"], as_index=False)["top1"].mean()
    for arm, (colour, mark, words) in LINES.items():
        if arm == "line":
            top = means["side"].max()
            own = means["arm"].isin(["line small", "line middle"]) | (
                (means["arm"] == "a") & (means["side"] == top)
            )
            rows, line = means[own], "none"
        else:
            rows, line = means[means["arm"] == arm], "-"
        if rows.empty:
            continue
        ax.plot(rows["side"], rows["top1"], color=colour, marker=mark, linestyle=line, label=words,
                markersize=14 if arm == "line" else 6, linewidth=1.4)  # fmt: skip
    ax.set_xscale("log")
    ticks = sorted(means["side"].unique())
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticklabels([str(t) for t in ticks], fontsize=8)
    ax.set(xlabel="size of the image (px)", ylabel="top-1 accuracy (%)")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def pareto(table: pd.DataFrame) -> Axes:
    """Mean accuracy over the sizes against mean MACs; the front as a line."""
    _, ax = plt.subplots(figsize=(6.4, 4.2))
    means = table[table["view"] == "mean"].groupby("arm")[["mmacs", "top1"]].mean()
    means = means.sort_values(["mmacs", "top1"], ascending=[True, False])
    front = means[means["top1"] > means["top1"].shift(fill_value=-1).cummax()]
    ax.step(front["mmacs"], front["top1"], where="post", color="#bbbbbb", linewidth=1, zorder=0)
    for arm, row in means.iterrows():
        colour, mark, _ = LINES.get(str(arm), ("#666666", ".", ""))
        ax.plot(row["mmacs"], row["top1"], color=colour, marker=mark, markersize=8)
    texts = sorted(means.iterrows(), key=lambda item: item[1]["top1"])
    placed: list[tuple[float, float]] = []
    low, high = means["top1"].min(), means["top1"].max()
    step = (high - low) / 22
    for arm, row in texts:  # labels of one column stand above each other
        y = float(row["top1"])
        near = [t for x, t in placed if abs(x - row["mmacs"]) < 0.25]
        y = max([y, *(t + step for t in near)])
        placed.append((row["mmacs"], y))
        ax.annotate(str(arm), (row["mmacs"], row["top1"]), (row["mmacs"] + 0.03, y),
                    textcoords="data", fontsize=8, va="center")  # fmt: skip
    ax.set(xlabel="MMACs an image, mean over the sizes", ylabel="top-1 (%), mean over the sizes")
    ax.margins(x=0.12)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def against(diffs: pd.DataFrame, task: str, net: str) -> pd.DataFrame:
    """Lean minus its rivals, by view."""
    rows = diffs[(diffs["task"] == task) & (diffs["net"] == net) & (diffs["arm"] == "lean")]
    return rows[rows["other"].isin(RIVALS)]


def forest(diffs: pd.DataFrame, task: str, net: str) -> Axes:
    """Lean minus each rival, in points with 95 % intervals: mean over the sizes, and the ends."""
    rows = against(diffs, task, net)
    sides = sorted({int(v) for v in rows["view"] if v.isdecimal()})
    views = {"mean": "mean over sizes", str(sides[0]): f"{sides[0]} px",
             str(sides[-1]): f"{sides[-1]} px"}  # fmt: skip
    others = [o for o in reversed(RIVALS) if o in set(rows["other"])]
    _, axes = plt.subplots(1, 3, figsize=(8.6, 0.6 + 0.32 * len(others)), sharey=True)
    for ax, (view, words) in zip(axes, views.items(), strict=True):
        at = rows[rows["view"] == view].set_index("other")
        for y, other in enumerate(others):
            if other not in at.index:
                continue
            row = at.loc[other]
            clear = row["low"] > 0 or row["high"] < 0
            colour = "#d55e00" if clear else "#888888"
            ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
            ax.plot(row["diff"], y, "o", color=colour, markersize=5)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=2)
        ax.set_title(words, fontsize=9)
        ax.grid(alpha=0.25, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(others)), others)
    axes[1].set_xlabel("lean minus the other arm (points)")
    return axes[0]
