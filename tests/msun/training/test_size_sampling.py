"""How often sizes between the scales are drawn, and what a step of training costs with them."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from training import SCALES as TWO
from training import run, same, weights

import msun
from cka_probe.inputs.views import resize
from cka_probe.models.embedded import glyphnet
from msun.data.crops import Augment, Crops
from msun.data.labelled import open_labelled
from msun.network.policy import is_native, served_sides
from msun.training.size_sampling import resolve_between, side_ranges, step_macs

SCALES = (16, 32, 64)


def net(inputs, scales=SCALES):
    return msun.build(glyphnet(), "layer1", scales, inputs=inputs)


def test_half_where_images_are_resized_and_none_elsewhere():
    for inputs, usual in (("small", 0.5), ("scale", 0.5), ("native", 0.0)):
        assert resolve_between(net(inputs)) == usual
        assert resolve_between(net(inputs), 0.0) == 0.0
        assert resolve_between(net(inputs), 1.0) == 1.0
    assert resolve_between(net("small", (64,))) == 0.0
    assert resolve_between(msun.build(glyphnet(), "layer1", SCALES, preset="paper")) == 0.0


@pytest.mark.parametrize("inputs", ["native", "small", "scale"])
@pytest.mark.parametrize("often", [0.5, 1.0])
def test_macs_of_a_step_are_those_of_the_sizes_drawn(inputs, often):
    own = net(inputs)
    data = open_labelled((torch.rand(3000, 3, 4, 4), torch.zeros(3000, dtype=torch.int64)))
    native = tuple(s for s in SCALES if is_native(own.policy, s, own.reference))
    whole = Augment(area=(1, 1), ratio=(1, 1), flip=False)
    ranges = tuple(served_sides(SCALES, own.policy.routing).values())
    crops = Crops(data, SCALES, whole, None, None, 0, ranges, often, native)
    costs = {}

    def cost(scale, side):
        if (scale, side) not in costs:
            costs[scale, side] = own.plan(side, scale=scale).macs
        return costs[scale, side]

    drawn = [
        sum(cost(s, x.shape[-1]) for s, x in looks.items())
        for looks, _ in crops.batches([[k] for k in range(3000)])
    ]
    assert np.mean(drawn) == pytest.approx(step_macs(own, often), rel=0.01)
    assert step_macs(own, 0.0) == sum(map(own.macs, SCALES))
    if inputs == "scale":
        assert set(drawn) == {step_macs(own, often)}
    else:
        assert step_macs(own, often) != step_macs(own, 0.0)


def test_each_scale_also_learns_the_sizes_that_it_serves(tmp_path, monkeypatch):
    seen = []

    def crops(*args):
        seen.append(args)
        return Crops(*args)

    monkeypatch.setattr(sys.modules["msun.training.trainer"], "Crops", crops)
    plain, _ = run(tmp_path / "plain", epochs=3, between=0.0)
    half, _ = run(tmp_path / "half", epochs=3)
    other, _ = run(tmp_path / "other", epochs=3, between=1.0)
    run(tmp_path / "paper", preset="paper", max_steps=2)
    ranges = tuple(served_sides(TWO, plain.policy.routing).values())
    assert [args[6:] for args in seen if args[2] is not None] == [
        ((), 0.0, TWO[-1:]), (ranges, 0.5, TWO[-1:]), (ranges, 1.0, TWO[-1:]),
        ((), 0.0, TWO),
    ]  # fmt: skip
    assert not same(weights(plain), weights(half))
    assert not same(weights(half), weights(other))
    with pytest.raises(ValueError, match=r"^bad between: 1.5: give a share"):
        run(tmp_path / "bad", between=1.5)


@pytest.mark.parametrize("often", [0.0, 1.0])
def test_images_without_crops_are_shrunk_as_well(often):
    own = net("small")
    data = open_labelled((torch.rand(60, 3, 64, 80), torch.zeros(60, dtype=torch.int64)))
    native = tuple(s for s in SCALES if is_native(own.policy, s, own.reference))
    crops = Crops(
        data, SCALES, None, None, None, 0, tuple(side_ranges(own).values()), often, native
    )
    seen = {scale: set() for scale in SCALES}
    for looks, _ in crops.batches([[k] for k in range(60)]):
        for scale, x in looks.items():
            seen[scale].add(x.shape[-1])
    assert seen[16] == {16}
    assert seen[32] == {32}
    low, high = side_ranges(own)[64]
    assert seen[64] == {64} if not often else min(seen[64]) == low and len(seen[64]) > 10
    assert max(seen[64]) <= high
    sides = set()
    for row in range(30):
        looks, _ = next(crops.batches([[row]]))
        square = data.load(row)[0][None, :, :, 8:72]
        fits = [
            side for side in range(side_ranges(own)[32][0], 33)
            if torch.allclose(looks[32], resize(resize(square, side), 32), atol=1e-6)
        ]  # fmt: skip
        assert len(fits) == 1
        sides |= set(fits)
    assert sides == {32} if not often else len(sides) > 4


def test_a_network_that_wants_multiples_learns_its_own_side_alone(tmp_path):
    parts = [
        nn.Conv2d(3, 3, 1), nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ]  # fmt: skip
    model = nn.Sequential(*parts)
    model.default_cfg = {"input_size": (3, 16, 16)}
    net = msun.build(model, "3", (8, 16))
    net.plan(12, scale=16)
    with pytest.raises(ValueError, match="cannot take this size"):
        net.plan(13, scale=16)
    assert side_ranges(net) == {8: (8, 11), 16: (16, 16)}
    assert step_macs(net, 1.0) == step_macs(net, 0.0)
    assert side_ranges(build_native()) == {16: (16, 22), 32: (23, 45), 64: (46, 64)}
    images = torch.rand(16, 3, 16, 16), torch.arange(16) % 4
    how = {"epochs": 3, "batch_size": 8, "val_share": 0.0, "progress": False}
    msun.train(net, images, msun.TrainConfig(out=tmp_path / "out", **how))


def build_native():
    return msun.build(glyphnet(), "layer1", SCALES, inputs="native")
