"""The same comparison under other terms of training: smaller batches, a larger budget."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from experiments.scales.arms import HALF
from experiments.scales.manifest import LONG

__all__ = ["TIERS", "Tier", "under"]


class Tier(NamedTuple):
    """Terms under which arms are held against each other.

    Attributes:
        budget: training MACs, in those of the first tier.
        suffix: of the names of its arms and readings.
    """

    budget: float = 1.0
    suffix: str = ""


# by what the names of its tables and figures end with
TIERS = {"": Tier(), "-half": Tier(suffix=HALF), "-long": Tier(budget=LONG)}


def under(frame: pd.DataFrame, tier: Tier) -> pd.DataFrame:
    """The rows of a tier, as if they were the first's: budget 1, names without the suffix.

    Args:
        frame: a table of the ledger with "budget" and "arm", "other" or "run".
        tier: which.
    """
    out = frame[frame["budget"] == tier.budget].copy()
    for column in [c for c in ("run", "arm", "other") if c in out]:
        names = out[column].astype(str)
        out = out[names.str.endswith(HALF) == bool(tier.suffix)]
        out[column] = out[column].astype(str).str.removesuffix(HALF)
    return out.assign(budget=1.0)
