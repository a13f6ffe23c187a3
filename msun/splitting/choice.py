"""The suggested cut with its reasons and the ranking of all cuts; as text, HTML and JSON."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cka_probe.io import plain, replacing
from msun.splitting.curve import Curve

__all__ = ["SplitChoice"]


@dataclass(frozen=True, eq=False, repr=False)
class SplitChoice:
    """A suggested cut, with reasons.

    Attributes:
        layer: path of the module to cut after; None if the rule found no cut.
        score: score of that cut by the rule; nan without a layer.
        clear: False if the data do not decide between cuts; `why` then begins with "No clear
            split".
        why: the reasons in words, with doubts and cautions.
        runner_up: the second cut of the ranking; None if there is none.
        apart: score of the layer minus that of the runner-up, in standard errors of the difference;
            nan if they are unknown. Approximate, since reports have no covariances (`Curve.apart`).
        ranking: all cuts on the curve, best first; cuts that the rule excludes come last, with
            score nan. Columns: layer, tapped (its name in the report), cka, stderr, low, high,
            score, apart (difference from the chosen cut, as above), channels and grid (of the map
            that crosses the cut at the reference), parameters (before the cut) and the columns of
            `costs`; nan where unknown.
        doubts: reasons against a clear split.
        cautions: limits of the report to keep in mind.
        unprobed: cuts that are not in the report, in order of execution.
        curve: the curve that the rule judged.
        dip: index of the dip on the curve; None for rules without one.
        target: the CKA that a cut must reach; None for rules without one.
        rule: name of the rule.
        view: the view of the curve.
        reference: the view that it is compared with.
        by_cka: whether the rule uses CKA.
    """

    layer: str | None
    score: float
    clear: bool
    why: str
    runner_up: str | None
    apart: float
    ranking: pd.DataFrame
    doubts: tuple[str, ...]
    cautions: tuple[str, ...]
    unprobed: tuple[str, ...]
    curve: Curve
    dip: int | None
    target: float | None
    rule: str
    view: str
    reference: str
    by_cka: bool = True

    def __repr__(self) -> str:
        return f"<SplitChoice {self.headline}>"

    def _repr_html_(self) -> str:
        reasons = "".join(f"<p>{html.escape(text)}</p>" for text in (self.why, self.rivalry))
        forms = {"parameters": "{:,.0f}", "channels": "{:.0f}"}
        forms |= {str(x): "{:.3g}" for x in self.ranking if str(x).startswith("gmacs_")}
        table = self.ranking.to_html(
            index=False,
            na_rep="",
            float_format="{:.3f}".format,
            formatters={name: _or_blank(form) for name, form in forms.items()},
        )
        return f"<p><b>{html.escape(self.headline)}</b></p>{reasons}{table}"

    @property
    def headline(self) -> str:
        """The result in a few words."""
        if self.layer is None:
            return "no clear split: no cut to offer"
        return f"cut after {self.layer}" if self.clear else f"no clear split; at best {self.layer}"

    @property
    def rivalry(self) -> str:
        """The runner-up and its distance, in words."""
        if self.runner_up is None:
            return "There is no other candidate."
        score = float(self.ranking["score"].iloc[1])
        text = f"Runner-up: {self.runner_up}, score {score:.3f} against {self.score:.3f}"
        if not self.by_cka:
            return f"{text}."
        if math.isnan(self.apart):
            return f"{text}; without standard errors, the difference may be chance."
        return f"{text}, {abs(self.apart):.1f} standard errors apart."

    def to_json(self) -> str:
        """All fields as JSON text; nan becomes null."""
        content = {
            name: getattr(self, name)
            for name in ("layer", "score", "clear", "why", "runner_up", "apart", "rule", "view")
        }
        content |= {
            "reference": self.reference,
            "delta": self.curve.delta,
            "growth": self.curve.growth,
            "dip": None if self.dip is None else self.curve.layers[self.dip],
            "target": self.target,
            "doubts": self.doubts,
            "cautions": self.cautions,
            "unprobed": self.unprobed,
            "ranking": self.ranking.to_dict("records"),
            "curve": [
                {"layer": name, "cut": bool(cut), "cka": value, "low": low, "high": high}
                for name, cut, value, low, high in zip(
                    self.curve.layers,
                    self.curve.is_cut,
                    *(x.tolist() for x in (self.curve.cka, self.curve.low, self.curve.high)),
                    strict=True,
                )
            ],
        }
        return json.dumps(plain(content, "choice"), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, atomically.

        Args:
            path: path of the file, in an existing folder.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


def _or_blank(form: str) -> Callable[[Any], str]:
    """A formatter that leaves nan blank."""
    return lambda value: "" if math.isnan(value) else form.format(value)
