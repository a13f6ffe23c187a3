"""What was suggested: the cut, the reasons, the ranking; as text, as HTML and as JSON."""

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
    """Where to cut, and why.

    Attributes:
        layer: the cut lies after it; None where the rule has no cut to offer.
        score: what the rule went by, there; nan without a layer.
        clear: False where the data do not settle it; `why` then begins with "No clear split".
        why: the reasons in words, what speaks against them and what to be careful about.
        runner_up: the second in the ranking; None where there is none.
        apart: score of the layer less that of the runner-up, in standard errors of the difference;
            nan where they are unknown. Approximate: reports keep no covariances (`Curve.apart`).
        ranking: all cuts on the curve, best first; those that could not be chosen come last, with
            the score nan. Columns layer, tapped (its name in the report), cka, stderr, low, high,
            score, apart (from the chosen one, as above), channels and grid (of the map that
            crosses the cut at the reference), parameters (before the cut) and those of `costs`;
            nan where unknown.
        doubts: what speaks against a clear split.
        cautions: what to know when reading it.
        unprobed: cuts that the report does not hold, in order of execution.
        curve: what the rule saw.
        dip: place of the dip on the curve, where the rule looks for one.
        target: the CKA to be reached, likewise.
        rule: its name.
        view: of the curve.
        reference: the view that it is held against.
        by_cka: whether the rule goes by CKA at all.
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
        said = "".join(f"<p>{html.escape(text)}</p>" for text in (self.why, self.rivalry))
        forms = {"parameters": "{:,.0f}", "channels": "{:.0f}"}
        forms |= {str(x): "{:.3g}" for x in self.ranking if str(x).startswith("gmacs_")}
        table = self.ranking.to_html(
            index=False,
            na_rep="",
            float_format="{:.3f}".format,
            formatters={name: _or_blank(form) for name, form in forms.items()},
        )
        return f"<p><b>{html.escape(self.headline)}</b></p>{said}{table}"

    @property
    def headline(self) -> str:
        """The answer in a few words."""
        if self.layer is None:
            return "no clear split: no cut to offer"
        return f"cut after {self.layer}" if self.clear else f"no clear split; at best {self.layer}"

    @property
    def rivalry(self) -> str:
        """The runner-up and how far apart, in words."""
        if self.runner_up is None:
            return "No other cut was in question."
        score = float(self.ranking["score"].iloc[1])
        said = f"Runner-up: {self.runner_up}, score {score:.3f} against {self.score:.3f}"
        if not self.by_cka:
            return f"{said}."
        if math.isnan(self.apart):
            return f"{said}; without standard errors that says nothing."
        return f"{said}, {abs(self.apart):.1f} standard errors apart."

    def to_json(self) -> str:
        """Everything but the curve's picture, as JSON text; nan is null."""
        told = {
            name: getattr(self, name)
            for name in ("layer", "score", "clear", "why", "runner_up", "apart", "rule", "view")
        }
        told |= {
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
        return json.dumps(plain(told, "choice"), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` whole or not at all.

        Raises:
            OSError: where the folder does not exist or cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


def _or_blank(form: str) -> Callable[[Any], str]:
    return lambda value: "" if math.isnan(value) else form.format(value)
