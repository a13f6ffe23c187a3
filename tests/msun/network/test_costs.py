"""What the subnets at each cut cost, against the networks that `build` makes."""

import math

import numpy as np
import pytest
from torch import nn

import msun
from cka_probe.models.embedded import glyphnet
from msun.cutting.cuts import example_images, find_cuts
from msun.network.costs import subnet_costs
from msun.network.shape_probe import ShapeProbe


class Net(nn.Module):
    """A convolution that runs twice, and a wall: maps below 4 x 4 are refused by `c`."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, 2, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 2, 4)
        self.fc = nn.Linear(2, 5)

    def forward(self, x):
        return self.fc(self.c(self.b(self.b(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_subnets_cost_what_build_makes(preset):
    scales = [16, 32, 64]
    model = glyphnet()
    cuts = find_cuts(model, example_images(model, 64))
    table = subnet_costs(model, cuts, scales, preset=preset)
    assert table.index.tolist() == [cut.name for cut in cuts]
    assert table["parameters"].tolist() == [cut.parameters for cut in cuts]
    stem = model.stem[0]  # 3 x 3 on the map of the reference
    hand = stem.weight.numel() * (64 // stem.stride[0]) ** 2
    assert table["gmacs_64"]["stem"] * 1e9 == pytest.approx(hand, rel=1e-12)
    for at in ("stem", "layer1.0", "layer2", "layer3.0"):
        net = msun.build(model, at, scales, preset=preset)
        for side in scales:
            seen = ShapeProbe(net.subnet(side)).run((1, 3, side, side))
            assert table[f"gmacs_{side}"][at] * 1e9 == pytest.approx(seen.macs, rel=1e-12)
    plain = {at: ShapeProbe(msun.cut(model, at)[0]).run((1, 3, 16, 16)).macs for at in table.index}
    more = [table["gmacs_16"][at] * 1e9 > 1.5 * macs for at, macs in plain.items()]
    assert any(more), "no stride was taken out"


def test_a_scale_that_a_subnet_cannot_take_has_no_cost():
    model = Net()
    table = subnet_costs(model, find_cuts(model, example_images(model, 16)), [2, 16])
    assert math.isnan(table["gmacs_2"]["c"])
    assert np.isfinite(table["gmacs_16"]).all()
