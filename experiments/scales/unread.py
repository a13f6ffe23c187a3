"""The verdict once more, on test images that nobody had looked at while the design changed."""

from __future__ import annotations

import pandas as pd

from experiments.scales.arms import HALF
from experiments.scales.tables import JUDGED, differences, told

__all__ = ["table"]

UP = "lean+up, served"
OTHERS = {  # arm -> held against; d3 at the batch that suits it better, too
    JUDGED: ("d3+small, served" + HALF, "d3+small, served", "d3+up, served" + HALF,
             "d3+up, served", "g+small, served" + HALF, UP + HALF, "a" + HALF, "a=epochs" + HALF),
    UP: ("d3+up, served" + HALF, "d3+up, served"),
}  # fmt: skip


def table(pairs: pd.DataFrame, unread: pd.DataFrame) -> pd.DataFrame:
    """A comparison and cut a row: mean over sizes, mixed sizes and the full size, on both sets.

    Args:
        pairs: the ledger's, on the images that were looked at before.
        unread: likewise, on those that were not.
    """
    rows = []
    for cut in unread["cut"].drop_duplicates().sort_values():
        both = [differences(frame, cut=cut) for frame in (pairs, unread)]
        for arm, others in OTHERS.items():
            for other in others:
                row: dict[str, object] = {"cut": cut, "arm": arm + HALF, "other": other}
                for words, found in zip(("", ", unread"), both, strict=True):
                    mine = found[(found["arm"] == arm + HALF) & (found["other"] == other)]
                    by = mine.set_index("view")
                    sizes = [int(v) for v in by.index if v.isdecimal()]
                    views = {"mean": "mean", "mixed": "mixed"}
                    views |= {f"{max(sizes)} px": str(max(sizes))} if sizes else {}
                    row |= {
                        name + words: told(by.loc[v]) for name, v in views.items() if v in by.index
                    }
                    row["seeds"] = int(mine["seeds"].max()) if len(mine) else 0
                rows.append(row)
    if not rows:
        return pd.DataFrame()
    found = pd.DataFrame(rows)
    order = [
        "cut",
        "arm",
        "other",
        *(c for c in found if "mean" in c),
        *(c for c in found if "mixed" in c),
    ]
    order += [c for c in found if c.endswith(("px", "px, unread"))]
    return found[[*order, "seeds"]].fillna("")
