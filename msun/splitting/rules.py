"""Split rules: each takes a curve and ranks the cuts; and their registry."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from msun.splitting.curve import Curve, Floats, Verdict, chance_doubts, describe, within_chance

__all__ = ["SPLIT_RULES", "Rule", "get_rule"]

# Sums of a few float64 numbers of size 1 err by less; a cut on the limit must not depend on it.
_ROUNDING = 1e-12

Rule: TypeAlias = "Callable[[Curve], Verdict | Sequence[float] | Floats]"


def first_dip(values: Floats) -> int:
    """Index of the first interior local minimum; 0 if there is none.

    Equal neighbours count as one point: a flat part is a minimum if the curve falls before it and
    rises after it.
    """
    falling = False
    floor = 0
    for k in range(1, len(values)):
        if values[k] < values[k - 1]:
            falling, floor = True, k
        elif values[k] > values[k - 1] and falling:
            return floor
    return 0


def recovery(curve: Curve) -> Verdict:
    """The first cut after the early dip at which CKA has recovered.

    It is meant for the `restore` curve of the smallest scale, with unbiased CKA. Such curves are an
    inverted U: early layers differ, CKA recovers, then differences accumulate. The dip is the
    first interior local minimum, or the first layer if there is none. The split is the first cut
    after it whose upper interval end reaches the later maximum minus delta. Layers that are no
    cuts count for the dip and the maximum. A wide interval reaches the target early, so more images
    can only move the cut towards later layers. The rule is a hypothesis: no experiment shows that
    its cut trains best.

    Returns:
        A verdict whose scores are CKA. Cuts that reach the target come first, in order of
        execution, then the others by their distance from it. It is unclear if no cut reaches the
        target, if the rise from the dip to the later maximum may be chance (t at 5 %, Bonferroni
        over the other layers), or if the cut may be as low as the dip.
    """
    values, dip = curve.cka, first_dip(curve.cka)
    after = [k for k in curve.cuts if k > dip]
    scores = np.full(len(values), np.nan)
    scores[after] = values[after]
    if len(values) == 1:
        lone = f"the curve has one layer, {curve.at(0)}"
        return Verdict((), scores, curve.stderr, lone, ("no valid cut lies after a dip",), 0)
    top = dip + 1 + int(np.argmax(values[dip + 1 :]))
    target = float(values[top]) - curve.delta
    margin = curve.upper - target
    reach = [k for k in after if margin[k] >= -_ROUNDING]
    order = (*reach, *sorted(set(after) - set(reach), key=lambda k: -margin[k]))
    doubts = chance_doubts(curve, top, dip, len(values) - 1, "the rise from the dip")
    if dip:
        why = f"CKA falls to {curve.at(dip)} and recovers to {curve.at(top)}"
    elif values[top] > values[0]:
        why = f"CKA rises from {curve.at(0)} on, without a dip, to {curve.at(top)}"
    else:
        why, doubts = f"CKA never rises: {curve.at(0)} is its highest", ["there is no recovery"]
    found = dip if values[top] > values[dip] else None
    if not after:
        where = f"no valid cut lies after the dip at {curve.layers[dip]}"
        return Verdict((), scores, curve.stderr, why, (where, *doubts), found, target)
    if not reach:
        doubts.insert(0, f"no cut after the dip recovers to {target:.3f}")
        why += f"; the cut nearest to that minus {curve.delta:g} is {describe(curve, order[0])}"
        return Verdict(order, scores, curve.stderr, why, tuple(doubts), found, target)
    chosen = order[0]
    reaches = "which" if math.isnan(curve.high[chosen]) else "whose interval"
    why += (
        f"; {describe(curve, chosen)} is the first valid cut after that {reaches} reaches "
        f"{target:.3f}, the later maximum minus {curve.delta:g}"
    )
    if before := [k for k in after if k < chosen]:
        why += f"; the cut before it, {curve.layers[before[-1]]}, reaches "
        why += f"{curve.upper[before[-1]]:.3f}"
    if not doubts and within_chance(curve.apart(chosen, dip), curve.groups, 1):
        doubts.append(f"{curve.layers[chosen]} itself may be as low as the dip")
    return Verdict(order, scores, curve.stderr, why, tuple(doubts), found, target)


def largest_recovery(curve: Curve) -> Verdict:
    """The cut at which CKA rises most from the cut before it.

    Layers that are no cuts do not count. The first cut cannot be chosen.

    Returns:
        A verdict whose scores are the rises. It is unclear if the largest rise may be chance (t at
        5 %, Bonferroni over all rises), or does not differ clearly from the second largest.
    """
    cuts = curve.cuts
    scores, stderr = np.full((2, len(curve.cka)), np.nan)
    for before, k in pairwise(cuts):
        scores[k] = curve.cka[k] - curve.cka[before]
        stderr[k] = math.hypot(curve.stderr[k], curve.stderr[before])
    order = tuple(sorted(cuts[1:], key=lambda k: -scores[k]))
    if not order:
        lone = f"there {'is one valid cut' if cuts else 'are no valid cuts'} on the curve"
        return Verdict((), scores, stderr, lone, ("no two cuts to compare",))
    best = order[0]
    before = cuts[cuts.index(best) - 1]
    steepest = f"{curve.at(before)} to {describe(curve, best)}"
    why = f"from one cut to the next CKA rises most from {steepest}"
    if scores[best] <= 0:
        why = f"CKA never rises from one cut to the next; it falls least to {curve.at(best)}"
        return Verdict(order, scores, stderr, why, ("CKA never rises",))
    doubts = chance_doubts(curve, best, before, len(order), "the largest rise")
    if len(order) > 1 and not doubts:
        gap = Verdict(order, scores, stderr, why).apart(best, order[1])
        if within_chance(gap, curve.groups, 1):
            doubts.append(f"the rise to {curve.layers[order[1]]} may be as large")
    return Verdict(order, scores, stderr, why, tuple(doubts))


def affordable(curve: Curve) -> Verdict:
    """The deepest affordable cut: further subnets add less than `growth` of the parameters.

    It does not use CKA. In the experiments that tested the rules (docs/splits.md), deeper cuts were
    better while small subnets keep every pixel. The paper's figures for ResNet-50 agree. A deeper
    cut costs parameters, since each scale has its own copy of the layers before it. The limit is a
    choice, not a measurement.

    Returns:
        A verdict whose scores are the growth: parameters of the further subnets over those before
        the last valid cut (`Curve.whole`). Cuts within the limit come first, deepest first, then
        the others, cheapest first. Scores have no standard errors. The verdict is unclear only if
        no cut is within the limit.

    Raises:
        ValueError: the number of parameters before the cuts is unknown.
    """
    before = curve.parameters
    cuts = curve.cuts
    if before is None or np.isnan(before[cuts]).any():
        raise ValueError(
            "parameters before the cuts are not known: cuts by name: give find_cuts(model), "
            "or use another rule"
        )
    whole = max(float(before[cuts].max()) if curve.whole is None else curve.whole, 1.0)
    scores = np.full(len(curve.cka), np.nan)
    scores[cuts] = (curve.scales - 1) * before[cuts] / whole
    paid = [k for k in reversed(cuts) if scores[k] < curve.growth - _ROUNDING]
    order = (*paid, *(k for k in cuts if k not in paid))
    best, limit = order[0], f"{100 * curve.growth:g} %"
    adds = f"{curve.layers[best]}, where {curve.scales} subnets add {100 * scores[best]:.3g} %"
    nothing = np.full(len(scores), np.nan)
    if not paid:
        why = f"after every cut subnets add {limit} of the features' parameters or more; the least "
        why += f"after {adds}"
        return Verdict(
            order, scores, nothing, why, (f"no cut adds less than {limit}",), by_cka=False
        )
    why = f"the deepest valid cut after which subnets add less than {limit} of the features' "
    why += f"parameters is {adds}"
    if len(order) > len(paid):
        after = next(k for k in cuts if k > best)
        why += f"; {curve.layers[after]} would add {100 * scores[after]:.3g} %"
    return Verdict(order, scores, nothing, why, by_cka=False)


SPLIT_RULES: dict[str, Rule] = {
    "affordable": affordable,
    "recovery": recovery,
    "largest_recovery": largest_recovery,
}


def get_rule(rule: str | Rule) -> tuple[str, Callable[[Curve], Verdict]]:
    """The name of a rule, and a function from a curve to its verdict.

    Args:
        rule: name of a rule, or a callable on a `Curve` that returns a `Verdict` or (m,) scores.

    Returns:
        (name, function).

    Raises:
        TypeError: neither a name nor a callable.
        ValueError: an unknown name; when called, scores that do not fit the curve.
    """
    if isinstance(rule, str):
        if rule not in SPLIT_RULES:
            near = difflib.get_close_matches(rule, SPLIT_RULES, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown rule: {rule!r}: {hint}known are {', '.join(SPLIT_RULES)}")
        name, rule = rule, SPLIT_RULES[rule]
    elif callable(rule):
        name = getattr(rule, "__name__", type(rule).__name__)
    else:
        raise TypeError(f"no rule: {rule!r:.60}: give a name or a callable on a Curve")
    return name, lambda curve: _verdict(name, rule(curve), curve)


def _verdict(name: str, result: Verdict | Iterable[float], curve: Curve) -> Verdict:
    """Validate the result of a rule; scores become a verdict."""
    if isinstance(result, Verdict):
        if alien := set(result.order) - set(curve.cuts):
            raise ValueError(f"rule {name!r} chose what is no cut: {alien}: choose from curve.cuts")
        return result
    try:
        scores = np.array(result, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"rule {name!r} gave no numbers: {result!r:.60}: return a Verdict, or scores by layer"
        ) from None
    if scores.shape != curve.cka.shape:
        hint = f"return {len(curve.cka)} scores, one per layer"
        raise ValueError(f"rule {name!r} gave scores of the shape {scores.shape}: {hint}")
    order = tuple(
        sorted((k for k in curve.cuts if not np.isnan(scores[k])), key=lambda k: -scores[k])
    )
    doubts = (f"scores of {name} have no standard errors",)
    doubts = doubts if order else (f"{name} scores no cut",)
    best = f"{curve.layers[order[0]]} highest, {scores[order[0]]:.3g}" if order else "no cut"
    why = f"the rule {name} scores {best}"
    return Verdict(order, scores, np.full(len(scores), np.nan), why, doubts)
