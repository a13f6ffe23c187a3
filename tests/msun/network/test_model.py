"""The network at work: the backbone at its reference scale, any size and any mixture of sizes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msun
from cka_probe.activations.macs import MacCounter
from cka_probe.models.embedded import glyphnet
from msun.network.model import MSUN, resized
from msun.network.norms import recalibrate, sized_norms

SCALES = (16, 32, 64)
CHOICES = [
    {"preset": "lean"},
    {"preset": "paper"},
    {"subnets": "shared"},
    {"subnets": "shared", "norm": "shared", "merge": "full"},
]


def noise(n, h, w=None, c=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, h, h if w is None else w, generator=g)


@pytest.fixture(scope="module")
def lean():
    return msun.build(glyphnet(), "layer1", SCALES)


class ChannelsLast(nn.Module):
    """Patches, then a map (n, h, w, c), as Swin has it; no batch norm."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        self.turn, self.norm = Turn(), nn.LayerNorm(6)
        self.mix, self.fc = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.turn(self.patch(x)))
        return self.fc(torch.relu(self.mix(x)).mean((1, 2)))


class Turn(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Halving(nn.Module):
    """A tail that wants multiples of 4: it shrinks, enlarges and adds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.down, self.fc = nn.Conv2d(4, 4, 4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + F.interpolate(self.down(x), scale_factor=4)
        return self.fc(x.mean((2, 3)))


class Sized(nn.Module):
    """Its tail asks how large the image was."""

    def __init__(self):
        super().__init__()
        self.stem, self.top = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        return F.interpolate(self.top(self.stem(x)), (h, w)).mean((2, 3)) * h


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@torch.no_grad()
def test_at_the_reference_scale_it_is_the_backbone_to_the_bit(choices):
    backbone = glyphnet()
    net = msun.build(backbone, "layer1", SCALES, **choices)
    x = noise(3, 64)
    assert torch.equal(net(x), backbone(x))
    assert torch.equal(net.train().eval()(x), backbone(x))
    assert torch.equal(copy.deepcopy(net)(x), backbone(x))
    assert torch.equal(net([*x]), backbone(x))
    backbone.train(), net.train()
    assert torch.equal(net(x), backbone(x))


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@torch.no_grad()
def test_mixed_sizes_are_as_one_by_one_in_order(choices):
    net = msun.build(glyphnet(), "layer1", SCALES, **choices)
    sizes = [(64, 64), (16, 16), (40, 25), (16, 16), (64, 64), (12, 70), (25, 40), (100, 90)]
    images = [noise(1, h, w, seed=k)[0] for k, (h, w) in enumerate(sizes)]
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    backwards = net(images[::-1]).flip(0)
    assert (backwards - alone).abs().max() <= 1e-4 * alone.abs().max()
    gaps = torch.cdist(alone, alone) + torch.eye(len(alone)) * 9
    assert gaps.min() > 1e-2  # no two are alike, so the order is told


@torch.no_grad()
def test_one_scale_is_the_plain_network_at_every_size():
    backbone = glyphnet()
    net = msun.build(backbone, "layer1", [64])
    for h, w in ((64, 64), (16, 16), (20, 90), (200, 130), (1, 1)):
        assert torch.equal(net(noise(2, h, w)), backbone(noise(2, h, w)))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in backbone.parameters())


@torch.no_grad()
def test_lean_equals_the_backbone_wherever_the_reference_serves(lean):
    backbone = glyphnet()
    for h, w in ((60, 60), (64, 80), (130, 90)):
        assert lean.route(h, w) == 64
        assert torch.equal(lean(noise(2, h, w)), backbone(noise(2, h, w)))


@torch.no_grad()
def test_what_the_trunk_gets(lean):
    for h, w, scale, merged in (
        (16, 16, 16, (16, 16)),
        (32, 32, 32, (16, 16)),
        (16, 36, 32, (11, 24)),
        (64, 64, 64, (32, 32)),
        (40, 40, 32, (16, 16)),  # as 32 px
        (48, 48, 64, (24, 24)),  # the reference takes it as it is
    ):
        plan = lean.plan(h, w)
        z = lean.features(noise(2, h, w))
        assert (plan.scale, plan.merged) == (scale, merged)
        assert z.shape == (2, 16, *merged)
        logits = lean(noise(2, h, w))
        both = lean.step(noise(2, h, w), plan.scale)
        assert torch.equal(both[0], logits)
        assert torch.equal(both[1], z)
    native = msun.build(glyphnet(), "layer1", SCALES, inputs="native")
    assert native.plan(40).merged == (20, 20)
    head = native.subnet(16)(noise(2, 24))
    wanted = F.interpolate(head, (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(native.features(noise(2, 24), 16), wanted)


@torch.no_grad()
def test_macs_are_those_of_a_real_forward():
    for net in (
        msun.build(glyphnet(), "layer1", SCALES),
        msun.build(glyphnet(), "stem", (20, 33, 64), subnets="shared", merge="full"),
        msun.build(seeded(ChannelsLast), "norm", (16, 32)),
    ):
        for h, w in ((16, 16), (33, 33), (64, 64), (20, 45)):
            with MacCounter() as counter:
                net(noise(1, h, w))
            assert net.macs(h, w) == counter.macs() > 0
        assert net.macs(32) == net.macs(32, 32)


@torch.no_grad()
def test_channels_last():
    backbone = seeded(ChannelsLast)
    net = msun.build(backbone, "norm", (16, 32))
    assert net.axes == (1, 2)
    assert net.calibrated == ()
    assert torch.equal(net(noise(2, 32)), backbone(noise(2, 32)))
    assert net.origin.changes == {16: "", 32: ""}
    net = msun.build(backbone, "norm", (16, 32), preset="paper")
    assert net.origin.changes[16] == "patch stride 4 -> 2"
    z = net.subnet(16)(noise(2, 20))
    assert z.shape == (2, 10, 10, 6)
    wanted = F.interpolate(z.permute(0, 3, 1, 2), (8, 8), mode="bilinear").permute(0, 2, 3, 1)
    assert torch.equal(net.features(noise(2, 20), 16), wanted)


@torch.no_grad()
def test_grids_are_rounded_to_what_the_trunk_takes():
    backbone = seeded(Halving)
    net = msun.build(backbone, "stem", (12, 32))
    assert torch.equal(net(noise(2, 32)), backbone(noise(2, 32)))
    grids = {(h, w): net.plan(h, w).merged for h, w in ((12, 12), (17, 17), (10, 24), (8, 30))}
    assert grids == {(12, 12): (8, 8), (17, 17): (8, 8), (10, 24): (4, 12), (8, 30): (4, 16)}
    for h, w in grids:
        assert torch.isfinite(net(noise(1, h, w))).all()
    assert net.plan(45, 27).merged == (24, 16)  # 23 x 14 by itself


@torch.no_grad()
def test_a_trunk_that_asks_for_the_image_size_gets_the_references():
    backbone = seeded(Sized)
    net = msun.build(backbone, "stem", (8, 32), merge="full")
    assert net.tail.needs_sizes
    assert torch.equal(net(noise(2, 32)), backbone(noise(2, 32)))
    z = net.features(noise(2, 8))
    assert torch.equal(net(noise(2, 8)), net.tail(z, ((None, 3, 32, 32),)))


def test_a_size_that_a_subnet_cannot_take_is_one_line():
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 7), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    net = msun.build(backbone, "1", (12, 32), inputs="native")
    for call in (net.plan, lambda h, w: net(noise(2, h, w)), lambda h, w: net([noise(1, h, w)[0]])):
        with pytest.raises(
            ValueError, match=r"^the 12 px subnet cannot take this size: 5 x 6, "
        ) as e:
            call(5, 6)
        assert "\n" not in str(e.value)
        assert str(e.value).endswith(": resize the images to 12 x 12 px")


def test_what_is_no_batch_of_images(lean):
    for x, text in (
        (noise(2, 16, c=1), r"^not a batch of images: \(2, 1, 16, 16\) for 3 channels: give"),
        (noise(2, 16)[0], "^not a batch of images"),
        ([], "^no images: an empty list"),
    ):
        with pytest.raises(ValueError, match=text):
            lean(x)
    for x in ([noise(1, 16)], [1]):
        with pytest.raises(TypeError, match=r"^not an image: item 0 is"):
            lean(x)
    with pytest.raises(ValueError, match=r"^not a trained scale: 20: choose one of 16, 32, 64"):
        lean.step(noise(2, 20), 20)


def test_an_error_that_is_not_the_sizes_is_passed_on(lean):
    net = copy.deepcopy(lean)

    def broken(*_):
        raise RuntimeError("out of something")

    net.subnets["64"].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of something"):
        net(noise(1, 64))


def test_gradients_stay_with_the_scale_that_was_trained():
    net = msun.build(glyphnet(), "layer1", SCALES).train()
    logits, z = net.step(noise(4, 16), 16)
    (logits.square().mean() + z.mean()).backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("subnets.32", "subnets.64")) for name in touched)
    assert {n for n in dict(net.named_parameters()) if n.startswith("subnets.16")} <= touched
    norms = {n for n in touched if ".norms." in n and n.startswith("tail")}
    assert norms
    assert all(".norms.16." in n for n in norms)
    assert "tail.fc.weight" in touched


def test_shared_subnets_train_one_set_of_weights():
    net = msun.build(glyphnet(), "layer1", SCALES, subnets="shared")
    plain = sum(p.numel() for p in glyphnet().parameters())
    norms = sum(2 * n.norms["64"].num_features for n in sized_norms(net))
    assert sum(p.numel() for p in net.parameters()) == plain + 2 * norms
    x = noise(2, 16)
    before = net(x)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name == "subnets.64.stem.0.weight":
                p.mul_(2)
    assert not torch.allclose(net(x), before)
    double = copy.deepcopy(net).double()
    assert torch.allclose(double(x.double()).float(), net(x), atol=1e-5)
    net.train()
    assert net.subnet(16).training
    net.eval()
    assert not net.subnet(16).training


def test_statistics_of_further_sizes_are_used_and_copied(lean):
    net = copy.deepcopy(lean)
    images, other = noise(8, 24) * 3, noise(2, 25)
    before = net(images), net(other)
    n, count = recalibrate(net, images.split(4), 24)
    assert n == 8
    assert count == len(sized_norms(net.subnet(32))) + len(sized_norms(net.tail))
    assert net.calibrated == ((24, 24),)
    assert not torch.allclose(net(images), before[0])
    assert torch.equal(net(other), before[1])
    assert torch.equal(copy.deepcopy(net)(images), net(images))
    assert lean.calibrated == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(lean, dtype):
    net = copy.deepcopy(lean).to(dtype)
    x = noise(2, 24).to(dtype)
    y = net(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    wanted = lean(noise(2, 24))
    assert (y.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_resizing_a_map():
    z = noise(2, 8, c=4)
    assert resized(z, (8, 8), antialias=True) is z
    shrunk = resized(z, (3, 3), antialias=True)
    plain = resized(z, (3, 3), antialias=False)
    assert torch.equal(plain, F.interpolate(z, (3, 3), mode="bilinear"))
    assert not torch.equal(plain, shrunk)
    flat = torch.full((1, 2, 9, 5), 3.0)
    torch.testing.assert_close(
        resized(flat, (4, 11), antialias=True), torch.full((1, 2, 4, 11), 3.0)
    )
    last = resized(z.permute(0, 2, 3, 1), (3, 3), (1, 2), antialias=True)
    assert torch.equal(last.permute(0, 3, 1, 2), shrunk)


def test_it_tells_what_it_is(lean):
    assert isinstance(lean, MSUN)
    assert (lean.scales, lean.reference, lean.at, lean.preset) == (SCALES, 64, "layer1", "lean")
    assert (lean.num_classes, lean.output_shape) == (62, (1, 62))
    assert "lean at 'layer1' for 16, 32, 64 px" in repr(lean)
    assert lean.origin.changes == {16: "stem.0 stride 2 -> 1", 32: "", 64: ""}
    assert lean.origin.subnets == "strides taken out"
