"""Default layers that cannot fire: what stands in for them, and what is named."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import msun
from cka_probe import probe
from cka_probe.activations.layers import default_layers
from cka_probe.cli.main import main

QUIET = {"batch_size": 8, "progress": False}


def images(side=32, n=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


class Reaching(nn.Module):
    """A block called by `.forward`, a Sequential too, and a holder without a forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.block = BasicBlock(4, 4)
        self.holder = nn.Module()
        self.holder.conv, self.holder.act = nn.Conv2d(4, 4, 3), nn.ReLU()
        self.table = nn.ModuleDict({"last": nn.Conv2d(4, 5, 1)})

    def forward(self, x):
        x = self.block.forward(self.stem.forward(x))
        return self.table["last"](self.holder.act(self.holder.conv(x)))


def test_a_graph_of_a_network_has_the_layers_of_the_network():
    model = torchvision.models.resnet18(num_classes=4).eval()
    graph = create_feature_extractor(model, {"layer1": "a", "layer4": "b"})
    assert len(default_layers(model)) == 9
    whole = probe(model, images(), None, **QUIET)
    report = probe(graph, images(), None, **QUIET)
    assert report.layers == [  # the second call of a block's ReLU is the output of the block
        "maxpool", *(f"{layer}.relu#1" for layer in whole.layers[1:])
    ]  # fmt: skip
    np.testing.assert_allclose(report.cka, whole.cka, atol=1e-7)


def test_holders_and_blocks_called_by_forward_have_a_stand_in():
    report = probe(Reaching(), images(), None, **QUIET)
    assert report.layers == ["stem.1", "block.relu#1", "holder.act", "table.last"]
    assert report.meta["unreached"] == []


def test_an_msun_shows_its_trunk_at_every_size():
    net = msun.build(torchvision.models.resnet18(num_classes=4), "layer1", [16, 32]).eval()
    report = probe(net, images(), [16, 32], **QUIET)
    trunk = [f"tail.layer{k}.{j}.relu#1" for k in (2, 3, 4) for j in (0, 1)]
    for side, other in (("16", "32"), ("32", "16")):
        found = report.layers_of(side)
        assert [name for name in found if name.startswith("tail.")] == trunk
        assert f"subnets.{side}.layer1.1.relu#1" in found
        assert not any(name.startswith(f"subnets.{other}") for name in found)
    assert np.isfinite(report.between("16", "32").loc[trunk, trunk].to_numpy()).all()
    with pytest.warns(UserWarning, match="^layers never reached: subnets.16."):
        probe(net, images(), None, **QUIET)  # its subnet of 16 px has nothing to do


def test_a_default_layer_without_features_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.unused = BasicBlock(4, 4)
            self.odd = nn.Conv1d(30, 30, 1)

        def forward(self, x):
            x = self.first(x)
            return self.odd(x.flatten(0, 1)).unflatten(0, (-1, 4))  # first axis 4 n

    with pytest.warns(UserWarning, match="^layers ") as caught:
        report = probe(Net(), images(), None, **QUIET)
    texts = sorted(str(one.message) for one in caught if "groups" not in str(one.message))
    assert texts[0] == (
        "layers left out, as they put out no features: odd (first axis is 32, not the batch of 8)"
    )
    assert texts[1] == "layers never reached: unused"
    assert report.layers == ["first"]


def test_no_layer_at_all_says_why():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(torch.cat([x, x]))

    words = r"no layer has features: conv \(first axis is 16, not the batch of 8\): choose others"
    for layers in (None, "conv"):
        with pytest.raises(ValueError, match=words):
            probe(Doubled(), images(), None, layers=layers, **QUIET)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.idle = nn.Identity()
    net.forward = net[0].forward
    with pytest.raises(ValueError, match=r"no layer has features: idle \(never called\)"):
        probe(net, images(), None, layers="idle", **QUIET)


def test_what_makes_weights_stands_in_for_nothing():
    """A parametrisation is called inside a block that is not, yet puts out no features."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.block = nn.Module()
            self.block.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))

        def forward(self, x):
            return nn.functional.conv2d(self.first(x), self.block.conv.weight)

    with pytest.warns(UserWarning, match=r"^layers never reached: block$"):
        assert probe(Net(), images(), None, **QUIET).layers == ["first"]


def test_a_network_that_needs_data_keeps_its_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = BasicBlock(3, 3), BasicBlock(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) if float(x.sum()) > -1e9 else x  # not on the meta device

    assert probe(Net(), images(), None, **QUIET).layers == ["a", "b"]


def test_the_list_at_the_shell_stars_what_is_tapped(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torchvision\n"
        "from torchvision.models.feature_extraction import create_feature_extractor\n"
        "def make():\n"
        "    net = torchvision.models.resnet18(num_classes=4)\n"
        "    return create_feature_extractor(net, ['layer2'])\n"
    )
    assert main(["layers", "--model", f"{tmp_path / 'net.py'}:make", "--size", "32"]) == 0
    starred = [line.split()[1] for line in capsys.readouterr().out.splitlines()
               if line.startswith("*")]  # fmt: skip
    assert starred == ["maxpool", *(f"layer{k}.{j}.relu#1" for k in (1, 2) for j in (0, 1))]
