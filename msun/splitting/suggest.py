"""Suggest a cut from a CKA report and the valid cuts of a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Real

import numpy as np
import pandas as pd

from cka_probe.report import Report
from msun.cutting.cuts import Cut
from msun.splitting.choice import SplitChoice
from msun.splitting.curve import Curve, Verdict
from msun.splitting.rules import SPLIT_RULES, Rule, get_rule

__all__ = ["SPLIT_RULES", "check_options", "suggest_split"]

_NAMED = 6  # cuts in a list before "and N more"
_RUN = re.compile("#[0-9]+$")  # "layer#2": the second run of a module in one forward


def suggest_split(
    report: Report,
    cuts: Iterable[str | Cut],
    *,
    rule: str | Rule | None = None,
    view: str | int | None = None,
    delta: float = 0.05,
    growth: float = 1.0,
    costs: pd.DataFrame | None = None,
) -> SplitChoice:
    """Suggest the cut after which all scales share their layers, with reasons.

    The default rule is `affordable`, the deepest cut within a limit of parameters: in trained
    networks the rules that use CKA chose worse cuts (docs/splits.md). The choice contains the CKA
    curve in any case.

    The curve is CKA of each layer between one view and the reference. Layers that are no valid
    cuts belong to it but cannot be chosen; the choice lists valid cuts that were not probed. The
    rule `recovery` needs a `restore` report of unbiased CKA. With `native`, convolutions have
    another field of view, which lowers CKA by itself; `why` then says so.

    Args:
        report: a report of two views or more.
        cuts: the result of `find_cuts(model)` or `cut_points(model)`. The latter has one name per
            cut only: a block that was probed as "layer1.1" is then not known as the cut "layer1".
        rule: "affordable", "recovery", "largest_recovery", or a callable on a `Curve`. None is
            "affordable", or "recovery" if the cuts are names, without numbers of parameters.
        view: the view of the curve; None for the smallest scale, or the first view if views are
            no sizes.
        delta: tolerance of `recovery`, in CKA.
        growth: limit of `affordable`: parameters that the further subnets add, as a share of those
            before the last valid cut of the network. The sizes of the report count as the scales.
        costs: result of `subnet_costs`, for the MACs of each cut. A report has the cost of the
            whole network only.

    Returns:
        The choice. Besides the doubts of the rule, it is unclear if the report has no standard
        errors (fewer than 2 groups of images), if the intervals of all cuts overlap, or if CKA is
        biased.

    Raises:
        TypeError: cuts or a rule of a wrong type.
        ValueError: an unknown rule or view; a report of one view, without values, or without any of
            the cuts (of another network, perhaps); delta or growth out of range.

    >>> from cka_probe import probe
    >>> from cka_probe.inputs import glyphs
    >>> from cka_probe.models.embedded import glyphnet
    >>> from msun import find_cuts
    >>> images, _ = glyphs.tensor("train", 64)
    >>> how = {"resize": "restore", "batch_size": 16, "progress": False}
    >>> report = probe(glyphnet(), images, [16, 64], **how)
    >>> suggest_split(report, find_cuts(glyphnet(), images[:2])).layer
    'layer3.0'
    """
    check_options(rule, delta=delta, growth=growth)
    view = _view(report, view)
    known = _cuts(cuts)
    counted = all(cut.parameters >= 0 for cut in known)
    if rule is None:
        rule = "affordable" if counted else "recovery"
    name, judge = get_rule(rule)
    curve, tapped, empty = _curve(report, view, known, delta, growth)
    verdict = judge(curve)
    own = _doubts(curve) if verdict.by_cka else []
    doubts = tuple(dict.fromkeys([*own, *verdict.doubts]))
    on_curve = {curve.layers[k] for k in curve.cuts}
    unprobed = tuple(cut.name for cut in known if cut.name not in on_curve | empty)
    ranking = _ranking(report, curve, verdict, tapped, {c.name: c for c in known}, costs)
    cautions = _cautions(report, view, unprobed, sorted(empty - on_curve), costs is None)
    chosen, second = (*verdict.order[:2], None, None)[:2]
    if not verdict.by_cka and chosen is not None:
        cautions += _deeper(known, on_curve, curve, verdict, chosen)
    reasons = [f"No clear split: {'; '.join(doubts)}."] if doubts else []
    reasons += [f"{verdict.why[:1].upper()}{verdict.why[1:]}."] if verdict.why else []
    return SplitChoice(
        layer=None if chosen is None else curve.layers[chosen],
        score=math.nan if chosen is None else float(verdict.scores[chosen]),
        clear=not doubts,
        why=" ".join([*reasons, *cautions]),
        runner_up=None if second is None else curve.layers[second],
        apart=math.nan if second is None else float(ranking["apart"].iloc[1]),
        ranking=ranking,
        doubts=doubts,
        cautions=tuple(cautions),
        unprobed=unprobed,
        curve=curve,
        dip=verdict.dip,
        target=verdict.target,
        rule=name,
        by_cka=verdict.by_cka,
        view=view,
        reference=report.reference,
    )


def check_options(
    rule: str | Rule | None = None, *, delta: float = 0.0, growth: float = 1.0
) -> None:
    """Validate the options of `suggest_split`, before there is a report.

    Args:
        rule: name of a rule or a callable, as in `suggest_split`.
        delta: tolerance of `recovery`, in CKA.
        growth: limit of `affordable`.

    Raises:
        TypeError: a rule of a wrong type.
        ValueError: an unknown rule, or a number out of range.
    """
    for name, number in (("delta", delta), ("growth", growth)):
        if not isinstance(number, Real) or isinstance(number, bool):
            raise ValueError(f"{name} is no number: {number!r}: give one such as 0.5")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta out of range: {delta}: give a difference in CKA, 0 to 1")
    if not 0 < growth < math.inf:
        raise ValueError(f"growth out of range: {growth}: give a share above 0, such as 1")
    if rule is not None:
        get_rule(rule)


def _view(report: Report, view: str | int | None) -> str:
    """Resolve the view of the curve."""
    others = [name for name in report.views if name != report.reference]
    if not others:
        hint = "probe at two scales or more"
        raise ValueError(f"a report of one view has no curve: {report.views[0]!r}: {hint}")
    if view is None:
        sizes = all(name.isdecimal() for name in others)
        view = min(others, key=int) if sizes else others[0]
    if str(view) not in others:
        known = ", ".join(map(repr, others))
        odd = "the reference itself" if str(view) == report.reference else "unknown view"
        raise ValueError(f"{odd}: {str(view)!r}: use one of {known}")
    views = (report.meta.get("run") or {}).get("views") or {}
    networks = {(views.get(name) or {}).get("model") for name in (str(view), report.reference)}
    if len(networks) > 1:
        raise ValueError(f"two networks, not one at two scales: {str(view)!r} and "
                         f"{report.reference!r}: probe one with scales")  # fmt: skip
    return str(view)


def _cuts(cuts: Iterable[str | Cut]) -> list[Cut]:
    """The cuts as `Cut`; a cut given by name has -1 parameters."""
    if isinstance(cuts, str):
        raise TypeError(f"cuts are one text: {cuts!r:.60}: give a list, such as cut_points(model)")
    known = []
    for one in cuts:
        if isinstance(one, Cut):
            known.append(one)
        elif isinstance(one, str):
            known.append(Cut(one, (one,), (), -1))
        else:
            raise TypeError(f"no cut: {one!r:.60}: give what find_cuts or cut_points returned")
    return known


def _curve(
    report: Report, view: str, known: list[Cut], delta: float, growth: float
) -> tuple[Curve, list[str], set[str]]:
    """The curve, the names of its layers in the report, and the cuts without a value."""
    columns = {what: report.against(what=what)[view] for what in ("cka", "stderr", "low", "high")}
    layers = [str(name) for name in columns["cka"].dropna().index]
    if not layers:
        raise ValueError(
            f"no CKA value: no layer varies both in view {view!r} and in "
            f"{report.reference!r}: probe other layers"
        )
    by_name = {name: cut.name for cut in known for name in (*cut.names, cut.name)}
    paths = {_RUN.sub("", str(label)) for label in columns["cka"].index.difference(layers)}
    empty = {by_name[path] for path in paths & by_name.keys()}
    runs: dict[str, dict[str, str]] = {}  # cut -> its names in the report -> the label that counts
    for label in layers:
        path = _RUN.sub("", label)  # of several runs of a module, the last one replaces the others
        if path in by_name:
            runs.setdefault(by_name[path], {})[path] = label
    if not runs:
        few = ", ".join(map(repr, layers[:3]))
        raise ValueError(
            f"none of the network's {len(known)} cuts was probed: the report has {few} and such: "
            "probe with layers= set to cuts, or is it a report of another network?"
        )
    cut_of = {at.get(cut, [*at.values()][-1]): cut for cut, at in runs.items()}
    others = {label for at in runs.values() for label in at.values()} - cut_of.keys()
    tapped = [label for label in layers if label not in others]
    before = {cut.name: cut.parameters for cut in known if cut.parameters >= 0}
    whole = float(max(before.values())) if len(before) == len(known) else None
    sizes = [name for name in report.views if name.isdecimal()]
    numbers = {what: column[tapped].to_numpy(np.float64) for what, column in columns.items()}
    curve = Curve(
        layers=tuple(cut_of.get(label, label) for label in tapped),
        is_cut=np.array([label in cut_of for label in tapped]),
        groups=int(report.meta.get("groups") or 0),
        delta=delta,
        unbiased=report.meta.get("unbiased") is not False,
        parameters=np.array([before.get(cut_of.get(label, ""), np.nan) for label in tapped]),
        whole=whole,
        scales=max(2, len(sizes)),
        growth=growth,
        **numbers,
    )
    return curve, tapped, empty


def _doubts(curve: Curve) -> list[str]:
    """Reasons against a clear split that hold for every rule by CKA."""
    if not curve.unbiased:
        return ["CKA is biased, which raises wide layers most"]
    if np.isnan(curve.low[curve.is_cut]).any():
        return ["there are no standard errors (fewer than 2 groups of images), so any difference "
                "may be chance"]  # fmt: skip
    if len(curve.cuts) > 1 and curve.low[curve.is_cut].max() <= curve.high[curve.is_cut].min():
        return ["the intervals of all cuts overlap"]
    return []


def _cautions(
    report: Report, view: str, unprobed: tuple[str, ...], empty: list[str], no_costs: bool
) -> list[str]:
    """Limits of the report, in words."""
    texts = []
    if report.meta.get("resize") == "native" and view.isdecimal():
        texts.append(
            "The images were fed small (native): shared weights then see another field of view, "
            "which lowers CKA by itself: prefer a restore report."
        )
    if unprobed:
        named, more = ", ".join(unprobed[:_NAMED]), len(unprobed) - _NAMED
        named += f" and {more} more" if more > 0 else ""
        texts.append(f"Not probed, so not considered: {named}.")
    if empty:
        texts.append(f"Without a CKA value: {', '.join(empty)}.")
    if no_costs and (macs := report.meta.get("view_macs")):
        whole = float(macs.get(report.reference, math.nan)) / 1e9
        texts.append(
            f"The report has the cost of the whole network, {whole:.3g} GMACs in view "
            f"{report.reference}, not that of the part before a cut: give costs=subnet_costs(...)."
        )
    return texts


def _deeper(
    known: list[Cut], on_curve: set[str], curve: Curve, verdict: Verdict, chosen: int
) -> list[str]:
    """A note on cuts that are not on the curve, deeper than the chosen one and within the limit."""
    if curve.whole is None or verdict.doubts:
        return []
    limit = curve.growth * curve.whole / (curve.scales - 1)
    least = curve.parameters[chosen] if curve.parameters is not None else math.inf
    names = [c.name for c in known if c.name not in on_curve and least < c.parameters < limit]
    if not names:
        return []
    return [f"Deeper than {curve.layers[chosen]} and within the limit, but not on the curve: "
            f"{', '.join(names[-_NAMED:])}."]  # fmt: skip


def _ranking(
    report: Report,
    curve: Curve,
    verdict: Verdict,
    tapped: list[str],
    cuts: Mapping[str, Cut],
    costs: pd.DataFrame | None,
) -> pd.DataFrame:
    """The table `SplitChoice.ranking`."""
    order = [*verdict.order, *(k for k in curve.cuts if k not in verdict.order)]
    rows = []
    for k in order:
        held = k in verdict.order
        views = (report.meta.get("layers") or {}).get(tapped[k], {}).get("views", {})
        shape = views.get(report.reference) or {}
        grid = shape.get("grid")
        before = cuts[curve.layers[k]].parameters
        rows.append(
            {
                "layer": curve.layers[k],
                "tapped": tapped[k],
                "cka": curve.cka[k],
                "stderr": curve.stderr[k],
                "low": curve.low[k],
                "high": curve.high[k],
                "score": verdict.scores[k] if held else math.nan,
                "apart": verdict.apart(order[0], k) if held else math.nan,
                "channels": shape.get("channels", math.nan),
                "grid": " x ".join(map(str, grid)) if grid else "",
                "parameters": before if before >= 0 else math.nan,
            }
        )
    ranking: pd.DataFrame = pd.DataFrame(rows)
    if costs is not None:
        found = costs.reindex(ranking["layer"])
        for column in costs.columns:
            ranking[column] = found[column].to_numpy()
    return ranking
