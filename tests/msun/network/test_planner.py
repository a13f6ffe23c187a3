"""What a subnet is fed: sizes that it takes, in the image's aspect, shrunk with antialiasing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msun
from cka_probe.models.embedded import glyphnet
from msun.network.policy import Policy


class Multiples(nn.Module):
    """Takes sides in multiples of 8 only: it shrinks, enlarges and adds."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 4, 4)
        self.last, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        x = self.last(x + F.interpolate(self.down(x), scale_factor=4))
        return self.fc(x.mean((2, 3)))


def network(**choices):
    torch.manual_seed(0)
    backbone = Multiples().eval()
    backbone.default_cfg = {"input_size": (3, 64, 64)}
    return msun.build(backbone, "last", (32, 64), policy=Policy(**choices))


def noise(n, side, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_inputs_resized_to_the_scale_that_serves_them():
    net, native, small = (
        msun.build(glyphnet(), "layer1", (16, 32, 64), inputs=how)
        for how in ("scale", "native", "small")
    )
    for side, scale in ((12, 16), (20, 16), (24, 32), (40, 32), (50, 64), (64, 64), (90, 64)):
        x = noise(2, side)
        fed = F.interpolate(x, (scale, scale), mode="bilinear", antialias=side > scale)
        fed = x if side == scale else fed
        assert torch.equal(net(x), native(fed))
        assert net.macs(side) == native.macs(scale)
        assert net.plan(side) == native.plan(scale)
        lean = native if scale == 64 else net
        assert torch.equal(small(x), lean(x))
        assert small.plan(side) == lean.plan(side)
    assert net.plan(20, 45) == native.plan(21, 48, scale=32)  # the aspect is kept
    assert torch.equal(net.step(noise(2, 32), 32)[0], native.step(noise(2, 32), 32)[0])
    images = [noise(1, 20)[0], noise(1, 64)[0], noise(1, 20, seed=1)[0]]
    alone = torch.cat([net(image[None]) for image in images])
    assert torch.allclose(net(images), alone, atol=1e-5)
    msun.calibrate(net, (noise(8, 64), torch.zeros(8, dtype=torch.int64)), [20, 32], progress=False)
    assert net.calibrated == ((20, 20), (32, 32))  # by what the image was, not by what is fed
    assert not torch.equal(net(noise(2, 20)), alone[[0, 2]])


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["small", "scale"])
def test_images_of_any_aspect_are_rounded_to_what_a_subnet_takes(inputs):
    net, native = network(inputs=inputs), network()
    for h, w, fed in ((24, 40, (24, 40)), (48, 32, (40, 24)), (32, 64, None), (20, 20, (32, 32))):
        x = torch.rand(1, 3, h, w)
        scale = net.route(h, w)
        assert scale == 32 or fed is None
        if fed is None and inputs == "small":
            assert torch.equal(net(x), native(x))
            continue
        assert net(x).shape == (1, 5), "a forward finds out by itself"
        found = net._planner.fed(h, w, scale)
        assert all(side % 8 == 0 for side in found)
        assert fed is None or found == fed
        assert 0.7 < found[0] * found[1] / scale**2 < 1.4
        assert net.plan(h, w) == native.plan(*found, scale=scale)


def test_what_cannot_be_taken_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"cannot take this size: 33 x 33, .*to 32 x 32 px$"):
        network().plan(33, 33)
    with pytest.raises(ValueError, match=r"^the 64 px subnet cannot take this size: 60 x 60, "):
        network(inputs="small").plan(60, 60)  # fed as it is, so taken or refused as it is
    assert network(inputs="scale").plan(60, 60).scale == 64
    parts = nn.Conv2d(3, 6, 3, 2, 1), nn.LayerNorm((6, 32, 32)), nn.Conv2d(6, 6, 1)
    square = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    square.default_cfg = {"input_size": (3, 64, 64)}
    net = msun.build(square, "2", (32, 64), policy=Policy(inputs="scale"))
    assert net.plan(20, 20).scale == 32
    with pytest.raises(
        ValueError, match=r"^the 32 px subnet cannot take this size: 20 x 40 fed at 23 x 45, "
    ):
        net.plan(20, 40)


@torch.no_grad()
def test_inputs_are_shrunk_with_antialiasing_whatever_maps_are():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 45, 45)
    small = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    for antialias in (True, False):
        net = network(inputs="small", antialias=antialias)
        assert net.route(45, 45) == 32
        assert torch.equal(net(x), net(small))
