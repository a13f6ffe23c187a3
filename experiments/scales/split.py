"""The split put to the test: what each rule would have cut, and what that costs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from cka_probe import probe
from experiments.scales.arms import plain_net
from experiments.scales.manifest import CUTS, DESIGN, Run
from experiments.scales.stats import interval
from experiments.scales.tables import accuracy
from experiments.scales.tasks import Held, Task
from msun import SPLIT_RULES, suggest_split
from msun.cutting.cuts import example_images, find_cuts

__all__ = ["by_cut", "choices", "picks", "regrets", "single_weights"]

PROBED = 1_000  # training images, shrunk to the smallest scale and enlarged again


def single_weights(checkpoint: Path) -> OrderedDict[str, torch.Tensor]:
    """The weights of a single-scale MSUN under the names that its backbone gives them."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state"]
    named: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, value in state.items():
        part, _, rest = key.partition(".")
        # "heads" was the name of the subnets in earlier checkpoints
        name = rest.partition(".")[2] if part in ("heads", "subnets") else rest
        named[name.replace(".norms.all.", ".")] = value
    return named


def choices(run: Run, task: Task, images: Held, checkpoint: Path) -> list[dict[str, Any]]:
    """What every rule says of a trained single-scale network, on training images.

    Args:
        run: of the arm "single".
        task: of the run.
        images: for training.
        checkpoint: of the trained network.

    Returns:
        A row a rule and candidate cut: rule, layer, score, place (1 is the rule's choice), clear.
    """
    net = plain_net(run.spec, task, run.net, seed=run.seed)
    net.load_state_dict(single_weights(checkpoint))
    net.to(images.images.device)
    cuts = find_cuts(net, example_images(net))
    shown = images.stacked(range(min(PROBED, len(images))))[0]
    report = probe(
        net, shown, list(task.scales), layers=[cut.name for cut in cuts], resize="restore",
        progress=False,
    )  # fmt: skip
    wanted = [cut for cut in cuts if set(cut.names) & set(CUTS[run.net])]
    rows = []
    for rule in SPLIT_RULES:
        choice = suggest_split(report, wanted, rule=rule)
        ranking = choice.ranking.set_index("layer")
        order = ranking.index.tolist()
        for cut in wanted:
            name = next(n for n in cut.names if n in CUTS[run.net])
            held = cut.name in order and not np.isnan(ranking.loc[cut.name, "score"])
            rows.append({
                "task": run.task, "net": run.net, "seed": run.seed, "rule": rule, "layer": name,
                "cka": float(ranking.loc[cut.name, "cka"]) if cut.name in order else np.nan,
                "score": float(ranking.loc[cut.name, "score"]) if held else np.nan,
                "place": 1 + order.index(cut.name) if held else 0, "clear": choice.clear,
            })  # fmt: skip
    return rows


def by_cut(runs: pd.DataFrame, trainings: pd.DataFrame) -> pd.DataFrame:
    """Top-1 of the design, mean over the sizes, at each candidate cut; a row a cut and seed."""
    frames = []
    for cut in dict.fromkeys(cut for cuts in CUTS.values() for cut in cuts):
        table = accuracy(runs, cut=cut)
        frames.append(
            table[(table["arm"] == f"{DESIGN}, served") & (table["view"] == "mean")].assign(cut=cut)
        )
    found = pd.concat(frames)
    lean = trainings[(trainings["run"] == DESIGN) & (trainings["budget"] == 1)]
    at = ["task", "net", "seed", "cut"]
    named = lean[[*at, "params"]].drop_duplicates(at)  # runs that chose a rate are of them, too
    found = found.merge(named, on=at)
    return found.drop(columns=["arm", "view"])


def picks(said: pd.DataFrame) -> pd.DataFrame:
    """CKA at the candidate cuts and which of them each rule takes, mean and list over seeds.

    Args:
        said: the ledger's "splits".
    """
    rows = []
    for (task, net, rule), told in said.groupby(["task", "net", "rule"], sort=False):
        chosen = told[told["place"] == 1]
        cka = told.groupby("layer", sort=False)["cka"].mean().round(3)
        rows.append({
            "task": task, "net": net, "rule": rule,
            "cuts": ", ".join(dict.fromkeys(chosen["layer"])) or "none",
            "clear": f"{int(chosen['clear'].sum())} of {told['seed'].nunique()}",
            **{f"CKA {layer}": value for layer, value in cka.items()},
        })  # fmt: skip
    return pd.DataFrame(rows)


def regrets(cuts: pd.DataFrame, said: pd.DataFrame) -> pd.DataFrame:
    """Points that each rule's cut loses, by seed against the cut that is best on other seeds.

    A maximum over noisy cuts is biased upward, so the best cut is found on the other seeds; with
    one seed there are no others, and the regret is the biased one. Rules that always take the same
    cut, whatever the network, stand beside those that look.

    Args:
        cuts: from `by_cut`.
        said: the ledger's "splits".
    """
    rows = []
    for (task, net), part in cuts.groupby(["task", "net"], sort=False):
        wide = part.pivot_table(index="seed", columns="cut", values="top1")
        wide = wide.dropna(axis=1, thresh=len(wide) // 2 + 1).dropna()  # cuts that most seeds have
        mine = said[(said["task"] == task) & (said["net"] == net)]
        for rule, told in [*mine.groupby("rule", sort=False), *_fixed(net, wide.index)]:
            picks = told[told["place"] == 1].set_index("seed")["layer"]
            if picks.empty or wide.empty or not set(picks) <= set(wide.columns):
                continue
            lost, orders = [], []
            for seed in wide.index:
                others = wide.drop(index=seed) if len(wide) > 1 else wide
                best = others.mean().idxmax()
                pick = picks.get(seed, picks.iloc[0])
                lost.append(float(wide.loc[seed, best] - wide.loc[seed, pick]))
                judged = seed if seed in picks.index else picks.index[0]
                own = told[told["seed"] == judged].set_index("layer")["score"].dropna()
                shared = [cut for cut in wide.columns if cut in own.index]
                if len(shared) > 2:
                    orders.append(stats.spearmanr(own[shared], wide.loc[seed, shared])[0])
            found = interval(lost, [0.0] * len(lost), 2)
            rows.append({
                "task": task, "net": net, "rule": rule, "cut": ", ".join(dict.fromkeys(picks)),
                "regret": round(found.diff, 2),
                "interval": f"[{found.low:.2f}, {found.high:.2f}]" if len(lost) > 1 else "",
                "rank correlation": round(float(np.mean(orders)), 2) if orders else np.nan,
                "seeds": len(wide),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _fixed(net: str, seeds: pd.Index) -> list[tuple[str, pd.DataFrame]]:
    """Rules that take the same cut at every seed; their score is the place of the cut."""
    places = {cut: float(k) for k, cut in enumerate(CUTS[net])}
    found = []
    for chosen in places:
        rows = [
            {"seed": seed, "layer": cut, "score": place, "place": 1 if cut == chosen else 2}
            for seed in seeds for cut, place in places.items()
        ]  # fmt: skip
        found.append((f"always {chosen}", pd.DataFrame(rows)))
    return found
