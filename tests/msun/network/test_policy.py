"""Which subnet serves a size, and on what grid the trunk runs."""

import math
from decimal import Decimal, getcontext

import pytest

from msun.network.policy import (
    POLICIES,
    Policy,
    fed_size,
    is_native,
    merge_grid,
    policy_of,
    route,
    served_sides,
    sorted_scales,
)

PAPER = (32, 128, 224)


def test_the_papers_routing_at_its_13_sizes():
    routed = {s: route(PAPER, s, s, "ceil") for s in range(32, 225, 16)}
    assert [s for s, to in routed.items() if to == 32] == [32]
    assert [s for s, to in routed.items() if to == 128] == [48, 64, 80, 96, 112, 128]
    assert [s for s, to in routed.items() if to == 224] == [144, 160, 176, 192, 208, 224]
    assert route(PAPER, 1000, 1000, "ceil") == 224
    assert route(PAPER, 1, 1, "ceil") == 32


def test_nearest_in_log_ratio_against_fifty_digits():
    getcontext().prec = 50
    for scales in (PAPER, (8, 16, 32), (7, 11, 13, 90), (64,)):
        for h in range(1, 260, 7):
            for w in (h, h + 3, 5 * h):
                side = (Decimal(h) * Decimal(w)).ln() / 2
                gaps = [(abs(side - Decimal(s).ln()), -s) for s in scales]
                near = [s for gap, s in gaps if abs(gap - min(gaps)[0]) < Decimal("1e-40")]
                assert route(scales, h, w, "nearest") == max(-s for s in near)


def test_ties_go_to_the_larger():
    assert route(PAPER, 64, 64, "nearest") == 128  # sqrt(32 * 128)
    assert route(PAPER, 63, 65, "nearest") == 32
    assert route((50, 200), 100, 100, "nearest") == 200


def test_what_each_scale_serves():
    assert served_sides((8, 32, 56), "nearest") == {8: (8, 15), 32: (16, 42), 56: (43, 56)}
    assert served_sides((8, 32, 56), "ceil") == {8: (8, 8), 32: (9, 32), 56: (33, 56)}
    assert served_sides((8, 32, 56), "up") == {8: (8, 8), 32: (9, 42), 56: (43, 56)}
    for routing in ("ceil", "up"):
        assert served_sides((64,), routing) == {64: (64, 64)}
    assert [route((32, 128, 224), s, s, "up") for s in (32, 33, 128, 169, 170, 400)] == [
        32, 128, 128, 128, 224, 224,
    ]  # fmt: skip
    assert route((32, 128, 224), 16, 65, "up") == 128  # by the area


def test_a_size_is_its_geometric_mean():
    assert route(PAPER, 128, 128, "ceil") == route(PAPER, 64, 256, "ceil") == 128
    assert route(PAPER, 64, 257, "ceil") == 224


def grid(policy, h, w=None, scale=32, full=(56, 56)):
    w = h if w is None else w
    native = (math.ceil(h / 4), math.ceil(w / 4))
    return merge_grid(policy, h, w, scale=scale, reference=224, full=full, native=lambda: native)


def test_the_paper_always_runs_its_trunk_on_the_full_grid():
    paper = POLICIES["paper"]
    assert {grid(paper, s, scale=route(PAPER, s, s, "ceil")) for s in range(8, 400, 8)} == {
        (56, 56)
    }
    assert grid(paper, 100, 400) == (28, 112)


def test_lean_follows_the_input():
    lean = POLICIES["lean"]
    assert [grid(lean, s) for s in (8, 64, 128)] == [(28, 28)] * 3
    assert grid(lean, 129) == (33, 33)  # above 4/7 of 224: its own
    assert grid(lean, 176) == (44, 44)
    assert grid(lean, 64, scale=224) == (16, 16)  # never for the reference scale
    assert grid(lean, 128, full=(7, 7)) == (4, 4)  # halves are rounded up
    assert grid(lean, 64, 16) == (56, 14)


def test_native_takes_every_image_on_its_own_grid():
    native = Policy(merge="native")
    assert [grid(native, s) for s in (8, 64, 128, 224)] == [(2, 2), (16, 16), (32, 32), (56, 56)]
    assert grid(native, 64, 16) == (16, 4)


def test_what_a_subnet_gets():
    for inputs, got in {
        "native": [(20, 20), (50, 50), (20, 45)],
        "small": [(32, 32), (50, 50), (21, 48)],
        "scale": [(32, 32), (64, 64), (21, 48)],
    }.items():
        how = Policy(inputs=inputs)
        sizes = [(20, 20, 32), (50, 50, 64), (20, 45, 32)]
        assert [fed_size(how, h, w, scale, 64) for h, w, scale in sizes] == got
        assert [is_native(how, scale, 64) for scale in (32, 64)] == [
            inputs == "native", inputs != "scale",
        ]  # fmt: skip


def test_a_grid_never_vanishes():
    assert min(grid(POLICIES["paper"], 1, 100000)) == 1


def test_presets_and_their_choices():
    lean, paper = policy_of("lean"), policy_of("paper")
    assert (lean.merge, lean.norm, lean.routing, lean.antialias) == (
        "follow", "private", "nearest", True,
    )  # fmt: skip
    assert (paper.merge, paper.norm, paper.routing, paper.antialias, paper.constraint) == (
        "full", "shared", "ceil", False, "raw",
    )  # fmt: skip
    assert (lean.inputs, paper.inputs) == ("small", "native")
    assert (lean.strides, paper.strides) == ("first", "last")
    assert lean.but(norm=None, merge="full") == policy_of("lean").but(merge="full")
    with pytest.raises(ValueError, match=r"^unknown merge policy: 'half': choose 'full' or"):
        lean.but(merge="half")
    with pytest.raises(ValueError, match=r"^unknown preset: 'x': choose 'paper' or 'lean'"):
        policy_of("x")


def test_scales_are_sorted_and_checked():
    assert sorted_scales([224, 32, 128]) == PAPER
    for bad, text in (
        ([], "no scales: none: give"), ([8, 8], "scale given twice: 8: "), ([0, 8], "scale: 0: ")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            sorted_scales(bad)
    for bad in ([8.5], ["8"], [True]):
        with pytest.raises(TypeError, match=r"^bad scale: "):
            sorted_scales(bad)
