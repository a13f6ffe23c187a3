"""Networks that are not dense, not materialised or keep results: run, or refused in one line."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import msun
from cka_probe import probe
from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import detached_copy, meta_copy

QUIET = {"batch_size": 8, "progress": False}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class Keeping(nn.Module):
    """Keeps its last maps on itself, in a list and in a dictionary."""

    def __init__(self):
        super().__init__()
        self.net, self.last, self.all = plain(), None, {}
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x):
        y = self.net(x)
        self.last, self.all["y"] = y, [y, (y * 2,)]
        self.mean = y.mean(0)  # a buffer that is a result
        return y


def each(change):
    net = plain()
    for part in list(net):
        if isinstance(part, nn.Conv2d):
            change(part)
    return net


def keeping():
    net = Keeping()
    net(images())
    return net


def with_buffer(x):
    net = plain()
    net[0].register_buffer("adjacency", x)
    return net


def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


KINDS = {
    "weight_norm": lambda: each(weight_norm),
    "spectral_norm": lambda: each(spectral_norm),
    "old weight_norm": lambda: each(nn.utils.weight_norm),
    "pruned": lambda: each(lambda part: prune.l1_unstructured(part, "weight", 0.5)),
    "keeping": keeping,
    "sparse": lambda: with_buffer(torch.eye(50).to_sparse()),
    "sparse CSR": lambda: with_buffer(torch.eye(50).to_sparse_csr()),
    "compiled": lambda: torch.compile(plain()),
}


@pytest.mark.filterwarnings("ignore")  # of torch: old weight_norm, sparse tensors in files
@pytest.mark.parametrize("kind", KINDS)
def test_odd_networks_are_probed_cut_built_trained_and_evaluated(kind, tmp_path):
    model, x = KINDS[kind](), images()
    before = {k: v.clone() for k, v in unwrap(model).state_dict().items()}
    report = probe(model, x, [16, 32], **QUIET)
    assert report.layers
    report = probe(None, x, None, views={"a": (model, None), "b": (plain(), None)}, **QUIET)
    assert report.between("a", "a").notna().any(axis=None)
    cuts = msun.cut_points(model, x[:2])
    at = next(name for name in cuts if name.endswith("3"))
    net = msun.build(model, at, [16, 32])
    with torch.no_grad():
        expected = unwrap(model).eval()(x[:2])
        torch.testing.assert_close(net.eval()(x[:2]), expected, rtol=1e-5, atol=1e-5)
    data = (x, torch.arange(16) % 10)
    config = msun.TrainConfig(out=tmp_path / "out", epochs=1, batch_size=8, val_share=0.0,
                              augment="none", progress=False)  # fmt: skip
    path = msun.train(net, data, config)
    again = msun.load(path, backbone=model)
    with torch.no_grad():
        torch.testing.assert_close(again(x[:2]), net.eval()(x[:2]))
    frame = msun.evaluate(again, data, [16, 32], progress=False, latency=False)
    assert len(frame) == 2
    if kind not in ("keeping", "spectral_norm"):  # what a forward changes by itself
        assert all(torch.equal(v.to_dense(), before[k].to_dense())
                   for k, v in unwrap(model).state_dict().items())  # fmt: skip


def lazy():
    net = plain()
    net[4] = nn.LazyConv2d(16, 3, padding=1)
    return net


def half_meta():
    net = plain()
    net[4] = net[4].to("meta")
    return net


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lazy, "^parameters have no shape yet: '4.weight' is lazy: run the network once"),
        (half_meta, "^parameters have no data: '4.weight' is on the meta device: model.to_empty"),
    ],
)
def test_networks_without_values_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        probe(make(), images(), None, **QUIET)
    with pytest.raises(ValueError, match=words):
        probe(None, images(), None, views={"a": (make(), None)}, **QUIET)
    data = (images(), torch.arange(16) % 10)
    with pytest.raises(ValueError, match=words):
        msun.evaluate(make(), data, [32], progress=False, cka=False, latency=False)


def test_an_exported_graph_is_refused_in_one_line():
    graph = torch.export.export(plain().eval(), (images()[:2],)).module()
    words = r"^hooks do not fire in an exported graph: GraphModule, .*: give the nn.Module that it"
    for call in (
        lambda: probe(graph, images(), None, **QUIET),
        lambda: msun.cut_points(graph),
        lambda: msun.build(graph, "0", [16, 32]),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    assert unwrap(torch.fx.symbolic_trace(plain()))  # this one calls its modules


def test_copies_come_without_the_graph_of_what_was_kept():
    net = keeping()
    copied = detached_copy(net)
    assert torch.equal(copied.last, net.last)
    assert copied.last.grad_fn is None
    assert copied.all["y"][1][0].grad_fn is None
    assert net.last.grad_fn is not None
    assert torch.equal(copied(images()), net(images()))
    assert meta_copy(net).last.device.type == "meta"
    net.held = type("Held", (), {})()
    net.held.y = net.last * 1
    with pytest.raises(ValueError, match=r"^network cannot be copied: Keeping keeps a tensor with"):
        detached_copy(net)
