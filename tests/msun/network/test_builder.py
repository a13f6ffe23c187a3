"""Building around networks of all kinds, and the command that does."""

import copy
import gc

import numpy as np
import pytest
import torch
import zoo
from torch import nn

import msun
from cka_probe.models.embedded import glyphnet
from cka_probe.models.load import load_model
from msun.cli import main as cli
from msun.network.kernel_resize import resampled
from msun.network.norms import SizedNorm
from msun.network.policy import POLICIES, Policy

# name: (scales, cut); scales that are no powers of two apart
CHEAP = {
    "vgg11_bn": ((16, 40, 64), "features.10"),
    "mobilenet_v3_small": ((24, 50, 96), "features.3"),
    "shufflenet_v2_x0_5": ((24, 64, 96), "stage2"),
    "squeezenet1_1": ((24, 64, 96), "features.5"),
    "regnet_y_400mf": ((32, 75, 96), "trunk_output.block2"),
    "timm:test_resnet": ((16, 40, 64), "layer2"),
    "timm:test_convnext": ((16, 40, 64), "stages.1"),
    "timm:mobilenetv3_small_050": ((24, 48, 96), "blocks.1"),
    "timm:tf_efficientnet_lite0": ((24, 48, 64), "blocks.2"),
}
# the rest of a varied dozen, at a cut a third of the way
LARGER = {
    "alexnet": (40, 64, 112), "efficientnet_b0": (32, 64, 112), "densenet121": (32, 64, 112),
    "convnext_tiny": (32, 64, 128), "googlenet": (32, 64, 112), "inception_v3": (48, 75, 128),
    "swin_t": (32, 64, 128), "mnasnet0_5": (32, 64, 112), "timm:hrnet_w18_small": (32, 64, 128),
    "timm:repvgg_a0": (32, 64, 112), "timm:resnext26ts": (32, 64, 128),
    "timm:resnetaa50": (32, 64, 128), "timm:resnet26d": (32, 64, 112),
    "timm:ghostnet_050": (32, 64, 112), "timm:cs3darknet_focus_s": (32, 64, 128),
    "timm:dla46x_c": (32, 64, 128), "timm:xception41": (48, 80, 128),
    "timm:halonet_h1": (64, 128, 256), "timm:levit_128s": (96, 160, 224),
}  # fmt: skip

# not any size: attention of a fixed grid; a blur that rounds an odd grid down beside a shortcut
# that rounds it up (the plain network refuses 69 px too)
FEW_SIZES = ("timm:halonet_h1", "timm:levit_128s", "timm:resnetaa50")


def noise(n, h, w=None):
    return torch.randn(n, 3, h, w or h, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_serves(model, net, *, any_size=True):
    """The backbone at the reference scale; logits at every other size, smaller ones no dearer."""
    x = noise(2, net.reference)
    wanted = model(x)
    assert torch.equal(net(x), wanted)
    assert torch.equal(net.train().eval()(x), wanted)
    for side in net.scales:
        assert torch.isfinite(net(noise(2, side))).all()
        assert net.macs(side) <= net.macs(net.reference)
    if any_size:
        small, middle, _ = net.scales
        images = [
            noise(1, h, w)[0] for h, w in ((small, small), (middle, small + 8), (middle + 5,) * 2)
        ]
        alone = torch.cat([net(image[None]) for image in images])
        assert (net(images) - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", CHEAP)
def test_lean_on_varied_networks(name):
    scales, at = CHEAP[name]
    model = zoo.build(name).eval()
    net = msun.build(model, at, scales)
    assert net.origin.changes[scales[0]], "the small subnet keeps a larger grid"
    assert net.plan(scales[0]).grid[0] >= net.plan(scales[0]).merged[0]
    assert_serves(model, net)


@pytest.mark.sweep
@pytest.mark.parametrize("choices", [{}, {"subnets": "shared", "merge": "full"}], ids=str)
@pytest.mark.parametrize("name", LARGER)
def test_lean_on_larger_networks(name, choices):
    model, scales = zoo.build(name).eval(), LARGER[name]
    cuts = msun.cut_points(model, noise(2, scales[-1]))
    net = msun.build(model, cuts[len(cuts) // 3], scales, **choices)
    if choices:
        with torch.no_grad():
            assert torch.equal(net(noise(2, scales[-1])), model(noise(2, scales[-1])))
            assert all(torch.isfinite(net(noise(1, side))).all() for side in scales)
    else:
        assert_serves(model, net, any_size=name not in FEW_SIZES)
    del model, net
    gc.collect()


def test_the_backbone_is_left_as_it_was():
    model = glyphnet().train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    net = msun.build(model, "layer1", (16, 64), subnets="shared")
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not any(isinstance(m, SizedNorm) for m in model.modules())
    assert net.training


def test_norms_by_choice():
    def kinds(**choices):
        net = msun.build(glyphnet(), "layer1", (16, 32, 64), **choices)
        return [
            {tuple(m.norms) for m in part.modules() if isinstance(m, SizedNorm)}
            for part in (net.subnets["64"], net.tail)
        ]

    each, one = ("16", "32", "64"), ("all",)
    assert kinds() == [{one}, {each}]
    assert kinds(preset="paper") == [{one}, {one}]
    assert kinds(preset="paper", norm="private") == [{one}, {each}]
    assert kinds(subnets="shared") == [{each}, {each}]
    assert kinds(subnets="shared", norm="shared") == [{one}, {one}]


def test_a_policy_or_a_preset_of_ones_own(monkeypatch):
    net = msun.build(glyphnet(), "layer1", (16, 64), policy=Policy(routing="ceil"), merge="full")
    assert (net.policy.routing, net.policy.merge) == ("ceil", "full")
    monkeypatch.setitem(POLICIES, "mine", Policy(norm="shared"))
    assert msun.build(glyphnet(), "layer1", (16, 64), preset="mine").policy.norm == "shared"


@torch.no_grad()
@pytest.mark.parametrize("subnets", ["own", "shared"])
def test_native_is_the_backbone_at_every_size(subnets):
    model = glyphnet()
    how = {"subnets": subnets, "merge": "native", "inputs": "native"}
    net = msun.build(model, "layer1", (16, 32, 64), **how)
    assert set(net.origin.changes.values()) == {""}
    for side in (16, 24, 32, 51, 64):
        x = noise(2, side)
        assert torch.equal(net(x), model(x))


def test_starts():
    backbone = glyphnet()
    kernel = backbone.stem[0].weight
    starts = {
        start: msun.build(backbone, "layer1", (32, 64), merge="full", start=start)
        for start in ("copied", "resampled", "dilated")
    }
    kernels = {s: net.subnet(32).get_submodule("stem.0").weight for s, net in starts.items()}
    assert torch.equal(kernels["copied"], kernel)
    assert torch.equal(kernels["dilated"], kernel)
    assert torch.equal(kernels["resampled"], kernel)  # 3 x 3 is the least
    x = noise(2, 32)
    with torch.no_grad():
        old = starts["copied"].subnet(64)(x)
        new = {s: net.subnet(32)(x)[..., ::2, ::2] for s, net in starts.items()}
    torch.testing.assert_close(new["dilated"], old, rtol=1e-4, atol=1e-4)
    assert (new["copied"] - old).abs().max() > 0.1
    assert {net.origin.start for net in starts.values()} == set(starts)


def test_a_wide_first_kernel_is_resampled_to_the_scale():
    model = zoo.build("resnet18").eval()
    net = msun.build(model, "layer1", (32, 64), start="resampled")
    new = net.subnet(32).conv1.weight
    torch.testing.assert_close(new[..., 2:5, 2:5], resampled(model.conv1.weight, (3, 3)))
    assert new[..., :2, :].abs().max() == 0
    assert torch.equal(net.subnet(64).conv1.weight, model.conv1.weight)


def test_what_a_loaded_model_brings():
    loaded = load_model("glyphnet")
    net = msun.build(loaded, "layer1", (16, 64), spec={"classes": ["a", "b"]})
    assert net.spec == {
        "name": "glyphnet", "model_args": {}, "mean": [0.5] * 3, "std": [0.5] * 3,
        "weights": "DEFAULT:the package's own", "classes": ["a", "b"],
    }  # fmt: skip
    assert msun.build(loaded.model, "layer1", (16, 64)).spec == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"preset": "fat"}, r"^unknown preset: 'fat': choose "),
        ({"subnets": "rented"}, r"^unknown subnets policy: 'rented': choose 'own' or 'shared'"),
        ({"norm": "x"}, r"^unknown norm policy: 'x': "),
        ({"start": "cold"}, r"^unknown start: 'cold': choose 'copied', 'resampled', 'dilated'"),
        ({"subnets": "shared", "start": "resampled"}, r"^shared subnets cannot start resampled: "),
        ({"scales": []}, r"^no scales: none: "),
        ({"scales": [16, 16]}, r"^scale given twice: 16: "),
        ({"at": "layer7"}, r"^unknown module: 'layer7': "),
        ({"at": "layer1.0.conv1"}, r"^no valid cut after this module: 'layer1.0.conv1', "),
    ],
)
def test_bad_choices_are_one_line(words, text):
    at, scales = words.pop("at", "layer1"), words.pop("scales", (16, 64))
    with pytest.raises(ValueError, match=text) as caught:
        msun.build(glyphnet(), at, scales, **words)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(": ") >= 2


def test_what_is_no_classifier():
    with pytest.raises(TypeError, match=r"^no network: str: "):
        msun.build("resnet18", "layer1", (16, 64))
    with pytest.raises(TypeError, match=r"^not a policy: 'lean': give a Policy, or a preset by"):
        msun.build(glyphnet(), "layer1", (16, 64), policy="lean")
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(ValueError, match=r"^the backbone gives no logits \(n, classes\): \(1, 2, "):
        msun.build(maps, "0", (8, 16))
    with pytest.raises(ValueError, match="cannot take images of this scale: 4 x 4"):
        msun.build(nn.Sequential(nn.Conv2d(3, 4, 7), Mean()).eval(), "0", (4, 16))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_auxiliary_heads_give_way_in_training():
    net = msun.build(zoo.build("googlenet").train(), "maxpool1", (48, 96)).train()
    logits, z = net.step(noise(2, 96), 96)
    assert logits.shape == (2, 1000)
    assert z.shape[1] == 64


def run(capsys, *words):
    status = cli.main(["build", *map(str, words)])
    out, error = capsys.readouterr()
    return status, out, error


def test_the_command_prints_the_table_and_writes_the_file(capsys, tmp_path):
    file = tmp_path / "net.pt"
    words = ["--model", "glyphnet", "--at", "layer1", "--scales", "64,16", "--merge", "full"]
    status, out, error = run(capsys, *words, "--out", file)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "GlyphNet cut after 'layer1', preset lean: strides taken out"
    assert "merge full" in lines[1]
    cells = [[cell for cell in line.split("  ") if cell] for line in lines[3:6]]
    assert [cell.strip() for cell in cells[1]] == [
        "16", "16 x 16", "32 x 32", "0.00981 M", "0.0193", "stem.0 stride 2 -> 1",
    ]  # fmt: skip
    assert cells[2][-1].strip() == "nothing: the backbone"
    assert lines[-1] == f"written to {file}"
    net = msun.load(file)
    assert (net.scales, net.policy.merge) == ((16, 64), "full")
    with torch.no_grad():
        assert torch.equal(net(noise(2, 64)), glyphnet()(noise(2, 64)))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--scales", "16,x"], "bad scale: 'x': "),
        (["--at", "layer9"], "unknown module: 'layer9': "),
        (["--preset", "fat"], "unknown preset: 'fat': "),
        (["--out", "/nowhere/net.pt"], "no such folder: /nowhere: "),
        (["--out", "/"], "output is a folder: /: "),
        (["--model-arg", "depth=3"], "cannot build the model: 'glyphnet': "),
    ],
)
def test_the_commands_errors_are_one_line(capsys, tmp_path, words, text):
    file = tmp_path / "net.pt"
    base = ["--model", "glyphnet", "--at", "layer1", "--scales", "16,64", "--out", file]
    status, out, error = run(capsys, *base, *words)
    assert (status, out) == (2, "")
    assert error.startswith(f"msun: {text}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_backbone_of_one_channel():
    layers = [nn.Conv2d(1, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    net = msun.build(model, "2", (14, 28))
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
        assert net([x[0], x[1, :, :14, :14]]).shape == (2, 5)


def test_a_backbone_whose_logits_come_in_a_dict():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, 2, padding=1)
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            z = torch.relu(self.stem(x))
            return {"loss": None, "logits": self.fc(z.mean((2, 3))), "map": z}

    model = Named().eval()
    net = msun.build(model, "stem", (16, 32))
    with torch.no_grad():
        x = noise(2, 32)
        assert torch.equal(net(x), model(x)["logits"])
        assert net([x[0], x[1, :, :16, :16]]).shape == (2, 5)


def test_scales_of_numpy_and_images_from_a_generator():
    net = msun.build(glyphnet(), "layer1", np.array([32, 64])).eval()
    assert net.scales == (32, 64)
    assert all(type(side) is int for side in net.scales)
    with torch.no_grad():
        assert net(noise(1, side)[0] for side in (64, 32)).shape[0] == 2
