"""Every comparison in one table: an arm a row, a column where it was made."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.scales.manifest import CUT, DESIGN, LONG
from experiments.scales.tables import accuracy
from experiments.scales.tiers import TIERS, under

__all__ = ["glance"]

ARMS = {  # in words -> (reading, cut)
    "`lean`, cut after layer1": (f"{DESIGN}, served", CUT),
    "`lean`, cut after layer2": (f"{DESIGN}, served", "layer2"),
    "`lean`, cut after layer3": (f"{DESIGN}, served", "layer3"),
    "private BN, small images enlarged (d3)": ("d3+small, served", CUT),
    "private BN, stride by scale (g)": ("g+small, served", CUT),
    "shared BN, small images enlarged (c3, enlarged)": ("c3, enlarged, served", CUT),
    "shared BN, images as they are (c3)": ("c3, served", CUT),
    "`paper`, re-estimated": ("paper, served", CUT),
    "one scale, enlarged (a)": ("a", CUT),
    "the same, re-estimated (a+bn)": ("a+bn", CUT),
}
TERMS = {"": "", "-half": ", half the batch", "-long": f", budget x{LONG:g}"}


def glance(runs: pd.DataFrame, arms: Mapping[str, tuple[str, str]] = ARMS) -> pd.DataFrame:
    """Top-1 in per cent / MMACs an image / seeds; the first two in the mean over the sizes.

    Args:
        runs: the ledger's.
        arms: in words -> (reading, cut).
    """
    columns: dict[str, dict[str, str]] = {}
    for ending, tier in TIERS.items():
        of_tier = under(runs, tier)
        for words, (label, cut) in arms.items():
            table = accuracy(of_tier, cut=cut)
            mine = table[(table["arm"] == label) & (table["view"] == "mean")]
            for (task, net), part in mine.groupby(["task", "net"], sort=False):
                top1, macs = part[["top1", "mmacs"]].mean()
                cell = f"{top1:.1f} / {macs:.2f} / {part['seed'].nunique()}"
                columns.setdefault(f"{task}, {net}{TERMS[ending]}", {})[words] = cell
    table = pd.DataFrame(columns).reindex(list(arms))
    table = table[sorted(table.columns, key=lambda name: (not name.startswith("glyphs"), name))]
    return table.dropna(how="all").fillna("").rename_axis("").reset_index()
