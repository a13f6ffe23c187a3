"""Tables from the ledger alone: accuracy, differences with intervals, the verdict."""

from __future__ import annotations

import pandas as pd

from experiments.scales.arms import ARMS, HALF, PAIRS
from experiments.scales.manifest import CUT, DESIGN, FLAT, LINE, LONG
from experiments.scales.stats import holm, interval

__all__ = ["LABELS", "accuracy", "differences", "flatness", "halved", "main_table", "rates_table",
           "verdicts"]  # fmt: skip

LABELS = tuple(dict.fromkeys(label for arm in ARMS.values() for label in arm.readings))
# what the MSUN must beat, in the order of how much it costs to have them
JUDGED = f"{DESIGN}, served"
RIVALS = ("c3, served", "c3, enlarged, served", "d1, served", "d2, served", "d3, served",
          "d3+small, served", "d3+up, served", "g, served", "g+small, served")  # fmt: skip
BESIDE = ("d3+small, served", "d3+up, served", "g+small, served", "c3, served", "a+bn")
GROUP = ["task", "net"]


def accuracy(runs: pd.DataFrame, *, cut: str = CUT, budget: float = 1.0) -> pd.DataFrame:
    """Top-1 in per cent on the test images, a row an arm, seed and view; with the mean over sizes.

    Args:
        runs: the ledger's.
        cut: of the runs.
        budget: likewise.
    """
    kept = runs[(runs["split"] == "test") & (runs["cut"] == cut) & (runs["budget"] == budget)]
    columns = [*GROUP, "arm", "seed", "view", "top1", "mmacs"]
    rows = kept[columns].copy()
    rows["top1"] *= 100
    sizes = rows[rows["view"] != "mixed"]
    means = sizes.groupby([*GROUP, "arm", "seed"], as_index=False)[["top1", "mmacs"]].mean()
    lone = sizes.groupby([*GROUP, "arm", "seed"])["view"].transform("size") == 1
    alone = set(sizes.loc[lone, "arm"])
    return pd.concat([rows, means[~means["arm"].isin(alone)].assign(view="mean")])


def main_table(runs: pd.DataFrame, trainings: pd.DataFrame, task: str, net: str) -> pd.DataFrame:
    """An arm a row: top-1 at some sizes, mean over sizes, mixed; cost; mean over the seeds."""
    table = accuracy(runs)
    table = table[(table["task"] == task) & (table["net"] == net)]
    if table.empty:
        return pd.DataFrame()
    wide = table.pivot_table(index="arm", columns="view", values="top1", aggfunc="mean")
    sizes = sorted(int(v) for v in wide.columns if v.isdecimal())
    shown = [str(sizes[k]) for k in sorted({0, 1, 3, 6, 9, len(sizes) - 1}) if k < len(sizes)]
    extra = [v for v in ("mean", "mixed") if v in wide]
    out = wide[shown + extra].rename(columns={v: f"{v} px" for v in shown}).round(2)
    macs = table[table["view"] == "mean"].groupby("arm")["mmacs"].mean()
    out["MMACs"] = macs.round(3)
    arm_of = {label: name for name, arm in ARMS.items() for label in arm.readings}
    full = trainings[(trainings["task"] == task) & (trainings["net"] == net)
                     & (trainings["budget"] == 1) & (trainings["cut"] == CUT)]  # fmt: skip
    known = full.groupby("run")[["params", "epochs"]].first()
    runs_of = pd.Series({label: arm_of[label] for label in out.index})
    out["params, k"] = (runs_of.map(known["params"]) / 1e3).round(1)
    out["epochs"] = runs_of.map(known["epochs"]).round(1)
    out["seeds"] = table.groupby("arm")["seed"].nunique()
    return out.reindex([label for label in LABELS if label in out.index])


def differences(pairs: pd.DataFrame, *, cut: str = CUT, budget: float = 1.0) -> pd.DataFrame:
    """All that was asked, arm - other in points: interval, p, and p by Holm over the sizes."""
    kept = pairs[(pairs["cut"] == cut) & (pairs["budget"] == budget)]
    rows = []
    for (task, net, arm, other, view), part in kept.groupby(
        [*GROUP, "arm", "other", "view"], sort=False
    ):
        if (arm, other) not in PAIRS:
            continue
        part = part.drop_duplicates("seed", keep="last")
        found = interval(part["diff"].tolist(), part["image_var"].tolist(), int(part["n"].min()))
        rows.append({
            "task": task, "net": net, "arm": arm, "other": other, "view": view,
            "diff": 100 * found.diff, "low": 100 * found.low, "high": 100 * found.high,
            "p": found.p, "seeds": found.seeds,
        })  # fmt: skip
    table = pd.DataFrame(rows, columns=[*GROUP, "arm", "other", "view", "diff", "low", "high", "p",
                                        "seeds"])  # fmt: skip
    table["p_holm"] = table["p"]
    at_a_size = table["view"].str.isdecimal()
    for _, part in table[at_a_size].groupby([*GROUP, "arm", "other"]):
        table.loc[part.index, "p_holm"] = holm(part["p"].tolist())
    return table


def told(row: pd.Series) -> str:
    """A difference as text: +1.2 [0.4, 2.0]."""
    return f"{row['diff']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def pair_table(diffs: pd.DataFrame, task: str, net: str, arms: tuple[str, ...]) -> pd.DataFrame:
    """The comparisons of some arms: mean over sizes, mixed, and at how many sizes it is clear."""
    mine = diffs[(diffs["task"] == task) & (diffs["net"] == net) & diffs["arm"].isin(arms)]
    rows = []
    for (arm, other), part in mine.groupby(["arm", "other"], sort=False):
        by = part.set_index("view")
        sizes = part[part["view"].str.isdecimal()]
        clear = sizes[sizes["p_holm"] < 0.05]
        row = {"arm": arm, "other": other}
        row |= {v: told(by.loc[v]) if v in by.index else "" for v in ("mean", "mixed")}
        better, worse = clear[clear["diff"] > 0], clear[clear["diff"] < 0]
        row["better at"] = " ".join(better["view"])
        row["worse at"] = " ".join(worse["view"])
        rows.append({**row, "seeds": int(part["seeds"].max())})
    return pd.DataFrame(rows)


def by_cut(pairs: pd.DataFrame, cuts: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """The design cut at each place, minus networks at the usual cut: mean over sizes, mixed.

    And, where images are routed up, the design so fed.
    """
    rows = []
    for cut in dict.fromkeys(cut for places in cuts.values() for cut in places):
        found = differences(pairs, cut=cut)
        up = (found["arm"] == "lean+up, served") & (found["other"] == "d3+up, served")
        found = found[(found["arm"] == JUDGED) & found["other"].isin(BESIDE) | up]
        for (task, net, arm, other), part in found.groupby([*GROUP, "arm", "other"], sort=False):
            by = part.set_index("view")
            row = {"task": task, "net": net, "cut": cut, "arm": arm, "other": other}
            row |= {v: told(by.loc[v]) for v in ("mean", "mixed") if v in by.index}
            rows.append({**row, "seeds": int(part["seeds"].max())})
    table = pd.DataFrame(rows)
    return table.sort_values([*GROUP, "arm", "other"], kind="stable") if rows else table


def halved(pairs: pd.DataFrame) -> pd.DataFrame:
    """Half the batch against the whole: mean over sizes, and the ends."""
    ends = [pairs[column].astype(str).str.endswith(HALF) for column in ("arm", "other")]
    mine = pairs[ends[0] & ~ends[1]]
    rows = []
    for cut in mine["cut"].drop_duplicates():
        found = differences(mine, cut=cut)
        names = [*GROUP, "arm", "other"]
        for (task, net, arm, other), part in found.groupby(names, sort=False):
            by = part.set_index("view")
            sizes = sorted((v for v in by.index if v.isdecimal()), key=int)
            views = {"mean": "mean", "smallest size": sizes[0], "largest size": sizes[-1]}
            row = {"task": task, "net": net, "cut": cut, "arm": arm, "other": other}
            row |= {name: told(by.loc[v]) for name, v in views.items() if v in by.index}
            rows.append({**row, "seeds": int(part["seeds"].max())})
    return pd.DataFrame(rows)


def flatness(runs: pd.DataFrame) -> pd.DataFrame:
    """The reference line at one budget and at more: top-1 at each network's own size."""
    kept = runs[(runs["split"] == "test") & (runs["cut"] == CUT)]
    kept = kept[kept["run"].isin(["single", *LINE]) & kept["budget"].isin([1.0, 2.0, LONG, FLAT])]
    own = kept["arm"].isin(["a", *LINE]) & (kept["view"] != "mixed")
    kept = kept[own].copy()
    sides = kept["view"].astype(int)
    kept = kept[sides == sides.groupby([kept["key"]]).transform("max")]
    kept["top1"] = (100 * kept["top1"]).round(2)
    wide = kept.pivot_table(index=[*GROUP, "view"], columns="budget", values="top1")
    return wide.rename(columns={b: f"budget x{b:g}" for b in wide.columns}).reset_index()


def rates_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What is known of each learning rate: mean top-1 over sizes on validation.

    Seed 0 decided; where a rate has more seeds, their mean tells how far that one could be trusted.
    """
    names = [*GROUP, "run", "budget", "lr"]
    home = runs[(runs["split"] == "val") & (runs["cut"] == CUT)]
    trials = home[home["key"].str.contains("_lr")]
    # a run that was tested tells of its rate as well as one that was made for that
    kept = home.merge(trials[[*GROUP, "run", "budget", "arm"]].drop_duplicates())
    means = 100 * kept.groupby([*names, "seed"])["top1"].mean().unstack("seed")
    table = pd.DataFrame({"top1": means[0], "all seeds": means.mean(axis=1),
                          "seeds": means.notna().sum(axis=1)})  # fmt: skip
    return table[means[0].notna()].round(2).reset_index()


def verdicts(
    runs: pd.DataFrame, pairs: pd.DataFrame, task: str, net: str, cuts: tuple[str, ...]
) -> pd.DataFrame:
    """The number to beat, a line a criterion and a column a cut of the design; rivals at CUT."""
    columns = {}
    for cut in cuts:
        rows = verdict(runs, differences(pairs, cut=cut), task, net, cut)
        if len(rows):
            told = rows["met"] + ": " + rows["found"]
            columns[cut] = told.set_axis(rows["criterion"])
    return pd.DataFrame(columns).fillna("").rename_axis("criterion").reset_index()


def verdict(
    runs: pd.DataFrame, diffs: pd.DataFrame, task: str, net: str, cut: str = CUT
) -> pd.DataFrame:
    """The number to beat, line by line, as far as there are runs."""
    own, home = accuracy(runs, cut=cut), accuracy(runs)
    parts = [own[own["arm"] == JUDGED], home[home["arm"] != JUDGED]]
    table = pd.concat([part for part in parts if len(part)] or parts[:1])
    table = table[(table["task"] == task) & (table["net"] == net)]
    macs = table.groupby(["arm", "view"])["mmacs"].mean()
    mine = diffs[(diffs["task"] == task) & (diffs["net"] == net) & (diffs["arm"] == JUDGED)]
    by = {(r["other"], r["view"]): r for _, r in mine.iterrows()}
    rows: list[dict[str, str]] = []
    if {JUDGED, "paper"} <= set(macs.index.get_level_values("arm")):
        ratio = macs[JUDGED] / macs["paper"]
        at = ratio.drop(["mean", "mixed"], errors="ignore").idxmax()
        rows.append({"criterion": "never dearer than paper at any size",
                     "found": f"at most {ratio[at]:.2f} of paper's MACs (at {at} px)",
                     "met": _yes(ratio[at] <= 1)})  # fmt: skip
        rows.append({"criterion": "mean MACs at most 0.65 of paper's",
                     "found": f"{ratio['mean']:.3f}",
                     "met": _yes(ratio["mean"] <= 0.65)})  # fmt: skip
    for other in ("paper", "paper+bn", "paper, served"):
        at = [r for (o, v), r in by.items() if o == other and v.isdecimal()]
        if at:
            worst = min(at, key=lambda r: r["diff"])
            lost = [r for r in at if r["p_holm"] < 0.05 and r["diff"] < 0]
            rows.append({
                "criterion": f"not below {other} at any size",
                "found": f"worst at {worst['view']} px: {told(worst)}",
                "met": "no" if lost else "yes" if worst["diff"] >= 0 else "open",
            })  # fmt: skip
    for other in RIVALS:
        if (other, "mean") in by:
            row = by[other, "mean"]
            rows.append({"criterion": f"mean over sizes at least +1.0 over {other}",
                         "found": told(row), "met": _than(row, 1.0)})  # fmt: skip
    top = str(max((int(v) for _, v in by if v.isdecimal()), default=0))
    for other, words in (("a=epochs", "equal epochs"), ("a", "equal MACs")):
        if (other, top) in by:
            row = by[other, top]
            rows.append({"criterion": f"within 0.5 of (a) at {top} px, {words}",
                         "found": told(row), "met": _than(row, -0.5)})  # fmt: skip
    return pd.DataFrame(rows, columns=["criterion", "found", "met"])


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def _than(row: pd.Series, least: float) -> str:
    """Yes or no where the interval says so."""
    if row["low"] >= least:
        return "yes"
    return "no" if row["high"] < least else "open"
