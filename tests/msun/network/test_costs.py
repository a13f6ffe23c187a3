"""What the part before a cut costs: against sums done by hand, and what `probe` records."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import msun
from cka_probe import probe
from cka_probe.models.glyphnet import glyphnet
from msun.cutting.cuts import example_images, find_cuts
from msun.network.costs import head_costs, subnet_costs
from msun.network.shape_probe import Shadow


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


def test_macs_and_parameters_by_hand():
    model = Net().train()
    cuts = find_cuts(model, example_images(model, 16))
    table = head_costs(model, cuts, [16, 12])
    assert table.index.tolist() == ["a", "b", "c"]
    assert model.training
    assert table["parameters"].tolist() == [108, 128, 258]
    for side, half in ((16, 8), (12, 6)):
        a = 4 * 27 * half**2
        b = a + 2 * 4 * 4 * half**2  # both runs
        c = b + 2 * 64 * (half - 3) ** 2
        assert table[f"gmacs_{side}"].to_numpy() * 1e9 == pytest.approx([a, b, c], rel=1e-12)


def test_a_size_that_stops_the_network_is_known_up_to_there():
    model = Net()
    cuts = find_cuts(model, example_images(model, 16))
    table = head_costs(model, cuts, [6, 16])
    assert np.isfinite(table["gmacs_6"][["a", "b"]]).all()
    assert math.isnan(table["gmacs_6"]["c"])
    assert np.isfinite(table["gmacs_16"]).all()
    with pytest.raises(ValueError, match=r"^bad size: 0: "):
        head_costs(model, cuts, [16, 0])


def test_a_stop_between_two_runs_is_not_taken_for_the_last():
    class Between(Net):
        def forward(self, x):
            return self.fc(self.b(self.c(self.b(self.a(x)))[:, [0, 1, 0, 1]]).mean((2, 3))[:, :2])

    model = Between()
    table = head_costs(model, find_cuts(model, example_images(model, 16)), [6, 16])
    assert math.isnan(table["gmacs_6"]["b"])  # it ran once, of two times
    assert np.isfinite(table["gmacs_6"]["a"])


def test_a_network_that_needs_data_is_counted_with_data():
    class Choosy(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() >= 0 else x * 3

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Choosy(), nn.Conv2d(4, 2, 1), nn.Flatten())
    cuts = find_cuts(model, example_images(model, 8))
    table = head_costs(model, cuts, [8])
    assert (table["gmacs_8"] * 1e9).tolist() == pytest.approx([27 * 4 * 36, 27 * 4 * 36, 116 * 36])


def test_the_whole_network_is_what_probe_recorded():
    model = glyphnet()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    report = probe(model, images, [16, 64], batch_size=4, progress=False)
    table = head_costs(model, find_cuts(model, example_images(model, 64)), [16, 64])
    fc = model.fc.in_features * model.fc.out_features
    for side in (16, 64):
        assert table[f"gmacs_{side}"]["pool"] * 1e9 == report.meta["view_macs"][str(side)] - fc
    assert table["gmacs_64"].is_monotonic_increasing
    assert table["parameters"].is_monotonic_increasing
    stem = sum(p.numel() for p in model.stem.parameters())
    assert table["parameters"]["stem"] == stem


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_subnets_cost_what_build_makes(preset):
    scales = [16, 32, 64]
    model = glyphnet()
    cuts = find_cuts(model, example_images(model, 64))
    table = subnet_costs(model, cuts, scales, preset=preset)
    assert table.index.tolist() == [cut.name for cut in cuts]
    native = head_costs(model, cuts, scales)
    assert table["parameters"].tolist() == native["parameters"].tolist()
    assert table["gmacs_64"].tolist() == pytest.approx(native["gmacs_64"].tolist(), rel=1e-12)
    for at in ("stem", "layer1.0", "layer2", "layer3.0"):
        net = msun.build(model, at, scales, preset=preset)
        for side in scales:
            seen = Shadow(net.subnet(side)).see((1, 3, side, side))
            assert table[f"gmacs_{side}"][at] * 1e9 == pytest.approx(seen.macs, rel=1e-12)
    assert (table["gmacs_16"] > 1.5 * native["gmacs_16"]).any(), "no stride was taken out"


def test_a_scale_that_a_subnet_cannot_take_has_no_cost():
    model = Net()
    table = subnet_costs(model, find_cuts(model, example_images(model, 16)), [2, 16])
    assert math.isnan(table["gmacs_2"]["c"])
    assert np.isfinite(table["gmacs_16"]).all()
