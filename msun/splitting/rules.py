"""Rules that read from a curve after which layer scale-specific ones should end; their registry."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from msun.splitting.curve import Curve, Floats, Verdict, chance, told, within

__all__ = ["SPLIT_RULES", "Rule", "get_rule"]

_ROUNDING = 1e-12

Rule: TypeAlias = "Callable[[Curve], Verdict | Sequence[float] | Floats]"


def first_dip(values: Floats) -> int:
    """Place of the first interior local minimum; 0 where there is none.

    Equal neighbours are one point: a floor is a minimum if the curve falls to it and rises after.
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
    """The first cut after the early dip at which CKA is back.

    Made for the `restore` curve of the smallest scale against the reference, unbiased. Such curves
    are an inverted U: layers that see pixels disagree, CKA recovers, then errors pile up. The dip
    is the first interior local minimum, the first layer where there is none; the split is the
    first cut after it whose upper interval end reaches the later maximum less delta. Layers that
    are no cuts count for the dip and the maximum. A wide interval reaches early: more images can
    only move the answer back. It is a hypothesis, not yet a result: nothing shows so far that the
    cut it picks trains best.

    Returns:
        Scores are CKA. First come the cuts that reach, in order of execution, then the others by
        how far they stay below. Unclear where no cut reaches, where the rise from the dip to the
        later maximum may be chance (t at 5 %, Bonferroni over the other layers), and where the cut
        itself may be as low as the dip.
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
    doubts = chance(curve, top, dip, len(values) - 1, "the rise from the dip")
    if dip:
        why = f"CKA falls to {curve.at(dip)} and recovers to {curve.at(top)}"
    elif values[top] > values[0]:
        why = f"CKA rises from {curve.at(0)} on, without a dip, to {curve.at(top)}"
    else:
        why, doubts = f"CKA never rises: {curve.at(0)} is its highest", ["there is no recovery"]
    seen = dip if values[top] > values[dip] else None
    if not after:
        where = f"no valid cut lies after the dip at {curve.layers[dip]}"
        return Verdict((), scores, curve.stderr, why, (where, *doubts), seen, target)
    if not reach:
        doubts.insert(0, f"no cut after the dip comes back to {target:.3f}")
        why += f"; nearest to that less {curve.delta:g} comes {told(curve, order[0])}"
        return Verdict(order, scores, curve.stderr, why, tuple(doubts), seen, target)
    chosen = order[0]
    reaches = "which" if math.isnan(curve.high[chosen]) else "whose interval"
    why += (
        f"; {told(curve, chosen)} is the first valid cut after that {reaches} reaches "
        f"{target:.3f}, the later maximum less {curve.delta:g}"
    )
    if before := [k for k in after if k < chosen]:
        why += f", where the cut before it, {curve.layers[before[-1]]}, ends at "
        why += f"{curve.upper[before[-1]]:.3f}"
    if not doubts and within(curve.apart(chosen, dip), curve.groups, 1):
        doubts.append(f"{curve.layers[chosen]} itself may be as low as the dip")
    return Verdict(order, scores, curve.stderr, why, tuple(doubts), seen, target)


def largest_recovery(curve: Curve) -> Verdict:
    """The cut at which CKA rises most above the cut before it.

    Layers that are no cuts do not count; the first cut has none before it and cannot be chosen.

    Returns:
        Scores are the rises, best first. Unclear where the largest may be chance (t at 5 %,
        Bonferroni over all rises) and where the second largest is not told apart from it.
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
    why = f"from one cut to the next CKA rises most from {curve.at(before)} to {told(curve, best)}"
    if scores[best] <= 0:
        why = f"CKA never rises from one cut to the next; it falls least to {curve.at(best)}"
        return Verdict(order, scores, stderr, why, ("CKA never rises",))
    doubts = chance(curve, best, before, len(order), "the largest rise")
    if len(order) > 1 and not doubts:
        gap = Verdict(order, scores, stderr, why).apart(best, order[1])
        if within(gap, curve.groups, 1):
            doubts.append(f"the rise to {curve.layers[order[1]]} may be as large")
    return Verdict(order, scores, stderr, why, tuple(doubts))


def affordable(curve: Curve) -> Verdict:
    """The deepest cut that can be paid: subnets add less than `growth` of the parameters.

    It does not go by CKA. In the experiments that put the rules to the test (docs/splits.md) a
    deeper cut was the better one as long as small subnets keep every pixel, and so it is in the
    paper's own figures for ResNet-50; what it costs are parameters, since every scale has a copy
    of what lies before it. The limit is a choice, not a measurement.

    Returns:
        Scores are the growth: parameters of the further subnets over those before the network's
        last valid cut (`Curve.whole`). First come the cuts within the limit, deepest first, then
        the others, cheapest first. Without standard errors, and unclear only where no cut is
        within the limit.

    Raises:
        ValueError: it is not known how many parameters lie before the cuts.
    """
    before = curve.parameters
    cuts = curve.cuts
    if before is None or np.isnan(before[cuts]).any():
        raise ValueError(
            "parameters before the cuts are not known: cuts by name: give find_cuts(model), or "
            "use another rule"
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
        why = f"after every cut subnets add {limit} of the features' parameters or more; least "
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
    """A rule and its name, by its name or as a callable whose scores are made a verdict.

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


def _verdict(name: str, said: Verdict | Iterable[float], curve: Curve) -> Verdict:
    """What a rule returned, checked; scores become a verdict."""
    if isinstance(said, Verdict):
        if alien := set(said.order) - set(curve.cuts):
            raise ValueError(f"rule {name!r} chose what is no cut: {alien}: take curve.cuts")
        return said
    try:
        scores = np.array(said, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"rule {name!r} gave no numbers: {said!r:.60}: return a Verdict or a score a layer"
        ) from None
    if scores.shape != curve.cka.shape:
        way_out = f"return {len(curve.cka)} scores, one a layer"
        raise ValueError(f"rule {name!r} gave scores of the shape {scores.shape}: {way_out}")
    order = tuple(
        sorted((k for k in curve.cuts if not np.isnan(scores[k])), key=lambda k: -scores[k])
    )
    doubts = (f"scores of {name} come without standard errors",)
    doubts = doubts if order else (f"{name} has no opinion of any cut",)
    best = f"{curve.layers[order[0]]} highest, {scores[order[0]]:.3g}" if order else "no cut"
    why = f"the rule {name} scores {best}"
    return Verdict(order, scores, np.full(len(scores), np.nan), why, doubts)
