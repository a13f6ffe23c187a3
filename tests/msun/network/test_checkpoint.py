"""A network goes into a file and comes back the same, or is refused by name."""

import pickle
import random

import pytest
import torch
import torchvision
from torch import nn

import msun
from cka_probe.models.embedded import glyphnet
from cka_probe.models.load import load_model
from msun.network import checkpoint
from msun.network.norms import recalibrate
from msun.network.policy import POLICIES, Policy


def noise(n, side, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def network(**choices):
    """Not as it was built: every parameter moved, one further size re-estimated."""
    net = msun.build(load_model("glyphnet"), "layer1", (16, 32, 64), **choices)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    recalibrate(net, [noise(4, 24) * 2], 24)
    return net.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    net = network()
    return net, checkpoint.save(net, tmp_path_factory.mktemp("net") / "net.pt", {"step": 7})


@torch.no_grad()
def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for side in (16, 24, 32, 40, 64):
        assert torch.equal(a(noise(2, side)), b(noise(2, side)))
    assert (a.scales, a.at, a.preset, a.policy, a.spec, a.origin) == (
        b.scales, b.at, b.preset, b.policy, b.spec, b.origin,
    )  # fmt: skip
    assert a.calibrated == b.calibrated == ((24, 24),)


@pytest.mark.parametrize(
    "choices",
    [
        {}, {"preset": "paper"}, {"subnets": "shared"}, {"start": "dilated", "merge": "full"},
        {"policy": Policy(routing="ceil", antialias=False), "norm": "shared"},
    ],
    ids=str,
)  # fmt: skip
def test_it_comes_back_the_same(tmp_path, choices):
    net = network(**choices)
    path = checkpoint.save(net, tmp_path / "net.pt")
    assert_same(msun.load(path), net)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]


def test_a_bare_backbone_is_asked_for(tmp_path):
    model = glyphnet()
    path = msun.save(msun.build(model, "layer1", (16, 64)), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"^checkpoint of a bare network: .*: give backbone="):
        msun.load(path)
    net = msun.load(path, backbone=glyphnet(trained=False), at="layer1", scales=[64, 16])
    with torch.no_grad():
        assert torch.equal(net(noise(2, 64)), model(noise(2, 64)))
    assert not net.training


def test_the_papers_subnets_come_back(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    net = msun.build(model, "features.9", (32, 128, 224), preset="paper")
    path = msun.save(net, tmp_path / "net.pt")
    back = msun.load(path, backbone=model)
    assert back.origin == net.origin
    with torch.no_grad():
        assert torch.equal(back(noise(1, 32)), net(noise(1, 32)))


def test_plain_types_only(saved):
    content = torch.load(saved[1], weights_only=True)
    assert content["extra"] == {"step": 7}
    assert content["network"]["scales"] == [16, 32, 64]
    assert all(isinstance(x, torch.Tensor) for x in content["state"].values())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"at": "layer2"}, r"^checkpoint for another cut: .*'layer1', not 'layer2': "),
        ({"scales": [16, 64]}, r"^checkpoint for other scales: .* has 16,32,64, not 16,64: "),
        (
            {"backbone": nn.Linear(2, 2)},
            r"^checkpoint for another backbone: .*'glyphnet', not 'Lin",
        ),
    ],
)
def test_another_network_is_refused_by_name(saved, words, text):
    with pytest.raises(ValueError, match=text) as caught:
        msun.load(saved[1], **words)
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_is_another_backbone(saved):
    model = glyphnet()
    model.fc = nn.Linear(64, 10)
    with pytest.raises(ValueError, match=r"^checkpoint for another backbone: "):
        msun.load(saved[1], backbone=model)


def test_loading_into_a_network_that_is_there(saved):
    net, path = saved
    other = msun.build(load_model("glyphnet"), "layer1", (16, 32, 64))
    assert checkpoint.load_into(other, path) == {"step": 7}
    assert_same(other.eval(), net)
    for built, text in (
        ({"merge": "full"}, "^checkpoint for another policy: "),
        ({"at": "layer2"}, "^checkpoint for another cut: "),
        ({"scales": (16, 64)}, "^checkpoint for other scales: "),
        ({"start": "dilated"}, "^checkpoint for another start: "),
    ):
        at, scales = built.pop("at", "layer1"), built.pop("scales", (16, 32, 64))
        stranger = msun.build(load_model("glyphnet"), at, scales, **built)
        before = {k: v.clone() for k, v in stranger.state_dict().items()}
        with pytest.raises(ValueError, match=text):
            checkpoint.load_into(stranger, path)
        assert all(torch.equal(v, before[k]) for k, v in stranger.state_dict().items())


def test_a_file_of_another_version(saved, tmp_path):
    net, _ = saved
    made = msun.build(load_model("glyphnet"), "layer1", (16, 32, 64), policy=Policy())
    checkpoint.save(made, tmp_path / "old.pt")
    content = torch.load(tmp_path / "old.pt", weights_only=True)
    policy = content["network"]["policy"]
    old = {k: v for k, v in policy.items() if k not in ("inputs", "strides")}
    content["network"]["policy"] = old
    torch.save(content, tmp_path / "old.pt")
    assert msun.load(tmp_path / "old.pt").policy == Policy()
    checkpoint.load_into(made, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"^checkpoint for another policy: "):
        checkpoint.load_into(net, tmp_path / "old.pt")
    for fields in ({"depth": 3}, {"inputs": "huge"}):
        content["network"]["policy"] = {**old, **fields}
        torch.save(content, tmp_path / "new.pt")
        with pytest.raises(ValueError, match=r"^checkpoint of another policy: .*: update msun"):
            msun.load(tmp_path / "new.pt")


def test_a_damaged_file_is_named(saved, tmp_path):
    whole = saved[1].read_bytes()
    rng = random.Random(0)
    for k in range(12):
        path = tmp_path / f"{k}.pt"
        path.write_bytes(whole[: rng.randrange(len(whole))] if k else b"")
        with pytest.raises(
            ValueError, match=rf"^cannot read the checkpoint: .*{k}\.pt, "
        ) as caught:
            msun.load(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.pt"
    with pytest.raises(FileNotFoundError, match=r"^no such checkpoint: .*other\.pt: "):
        msun.load(path)
    for content, text in (
        ({"weight": torch.zeros(2)}, "^no checkpoint of a multi-scale network: .*other.pt: "),
        ([1, 2], "^no checkpoint of a multi-scale network: "),
        ({"kind": "msun", "format": 99}, "^checkpoint of a newer format: "),
        ({"kind": "msun", "format": 1}, "^checkpoint is incomplete: "),
        ({"kind": "msun", "format": 1, "network": {}, "state": {}}, "^checkpoint is incomplete: "),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=text):
            msun.load(path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


def test_nothing_in_a_file_is_run(tmp_path):
    path = tmp_path / "trap.pt"
    torch.save({"kind": "msun", "format": 1, "network": Trap()}, path)
    with pytest.raises(ValueError, match=r"^cannot read the checkpoint"):
        msun.load(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"^cannot read the checkpoint"):
        msun.load(path)


def test_weights_of_another_shape_do_not_fit(saved, tmp_path):
    content = torch.load(saved[1], weights_only=True)
    content["state"]["tail.fc.weight"] = torch.zeros(3, 3)
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"^checkpoint does not fit the network: .*net\.pt, ") as e:
        msun.load(tmp_path / "net.pt")
    assert "\n" not in str(e.value)


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved[0], path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_preset_that_is_not_registered_here(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(POLICIES, "mine", Policy(routing="ceil"))
        net = network(preset="mine")
    path = checkpoint.save(net, tmp_path / "net.pt")
    assert_same(msun.load(path), net)


@pytest.mark.parametrize(
    "other",
    [{"stride": 1}, {"dilation": 2, "padding": 2}, {"padding": 0}, {"act": nn.Sigmoid}],
    ids=str,
)
def test_another_backbone_of_the_same_shapes_is_refused(tmp_path, other):
    def around(act=nn.ReLU, **conv):
        first = nn.Conv2d(3, 4, 3, **{"stride": 2, "padding": 1, **conv})
        return nn.Sequential(first, act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    path = checkpoint.save(msun.build(around(), "1", (16, 32)), tmp_path / "net.pt")
    assert msun.load(path, backbone=around()).at == "1"
    with pytest.raises(ValueError, match="checkpoint for another backbone"):
        msun.load(path, backbone=around(**other))


def test_padding_of_timm_is_told_apart(tmp_path):
    timm = pytest.importorskip("timm")
    name = "mobilenetv3_small_050"
    net = msun.build(timm.create_model(name, pad_type="same"), "blocks.1", (48, 96))
    path = checkpoint.save(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="checkpoint for another backbone"):
        msun.load(path, backbone=timm.create_model(name))


def renamed(path, saved, **spec):
    """The saved network with another description of its backbone."""
    content = torch.load(saved[1], weights_only=True)
    content["network"]["spec"].update(spec)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["{}/net.py:make", "timm:hf-hub:some/net", "timm:local-dir:{}"])
def test_code_that_a_checkpoint_names_needs_trust(saved, tmp_path, name):
    made = "from cka_probe.models.embedded import glyphnet as make\n"
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{made}")
    name = name.format(tmp_path)
    path = renamed(tmp_path / "net.pt", saved, name=name, model_args={})
    with pytest.raises(ValueError, match=r"^checkpoint names code to run: .*trust=True") as caught:
        msun.load(path)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    msun.load(path, backbone=glyphnet())
    assert not (tmp_path / "ran").exists()
    if name.endswith(":make"):
        msun.load(path, trust=True)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"weights": "DEFAULT"}),
        ("fcn_resnet50", {"weights_backbone": "DEFAULT"}),
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"pretrained_cfg": {"url": "https://example.org/w.pt"}}),
        ("timm:resnet18", {"checkpoint_path": "w.pt"}),
    ],
    ids=str,
)
def test_weights_that_a_checkpoint_names_need_trust(saved, tmp_path, monkeypatch, name, args):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("a model was built"))
    path = renamed(tmp_path / "net.pt", saved, name=name, model_args=args)
    (key,) = args
    with pytest.raises(ValueError, match=rf"^checkpoint names weights to fetch: {key}=.*trust="):
        msun.load(path)


def test_arguments_that_fetch_nothing_need_no_trust(tmp_path):
    args = {"weights": None, "num_classes": 4}
    model = torchvision.models.squeezenet1_1(**args).eval()
    spec = {"name": "squeezenet1_1", "model_args": args}
    net = msun.build(model, "features.4", (32, 64), spec=spec)
    back = msun.load(msun.save(net, tmp_path / "net.pt"))
    with torch.no_grad():
        assert torch.equal(back(noise(1, 32)), net(noise(1, 32)))


def test_codes_in_a_checkpoint_are_no_weights(saved, tmp_path):
    content = torch.load(saved[1], weights_only=True)
    key = next(key for key, x in content["state"].items() if x.ndim == 4)
    content["state"][key] = (content["state"][key] * 100).to(torch.int8)
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=rf"^weights are no plain numbers: {key!r} of .*int8"):
        msun.load(tmp_path / "net.pt")
