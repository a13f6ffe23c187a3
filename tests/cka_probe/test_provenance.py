"""What a network is known by when a run is resumed: structure, values and code."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from cka_probe import probe
from cka_probe.provenance import model_sha256

CODE = """
import torch
from torch import nn
SCALE = 1.0

def squash(x):
    return x.tanh() * SCALE

class Base(nn.Module):
    def finish(self, x):
        return x + 1

class Net(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.finish(squash(self.conv(x)))  # a comment

class Other(nn.Module):
    pass
"""
EDITS = {
    "forward": ("squash(self.conv(x))", "squash(self.conv(x.relu()))"),
    "a function that it calls": ("x.tanh()", "x.sigmoid()"),
    "a constant": ("SCALE = 1.0", "SCALE = 2.0"),
    "a base class": ("x + 1", "x + 2"),
}


@pytest.fixture
def load(tmp_path):
    """Import a network from a file of this text."""
    names = []

    def loaded(text):
        name = f"own_net_{len(names)}"
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        return module.Net().eval()

    yield loaded
    for name in names:
        del sys.modules[name]


def test_the_code_of_a_network_belongs_to_its_fingerprint(load):
    before = model_sha256(load(CODE))
    assert model_sha256(load(CODE)) == before  # from another file, and a second time
    assert model_sha256(load(CODE.replace("    pass", "    x = 1"))) == before  # not its own code
    for old, new in EDITS.values():
        assert model_sha256(load(CODE.replace(old, new))) != before


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_is_not_resumed_with_another_forward(load, edit, tmp_path):
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 4, "layers": "conv", "progress": False, "out": tmp_path / "out"}
    report = probe(load(CODE), images, None, **options)
    again = probe(load(CODE), images, None, resume=True, **options)
    assert (again.cka == report.cka).all()
    with pytest.raises(ValueError, match=r"finished report of another run: .*the network or its"):
        probe(load(CODE.replace(*EDITS[edit])), images, None, resume=True, **options)


def test_addresses_and_names_of_the_file_do_not_count(load):
    """A tuple of functions shows addresses, which differ from process to process."""
    text = CODE.replace("SCALE = 1.0", "SCALE = 1.0\nSTEPS = (1, lambda x: x)").replace(
        "self.finish(", "STEPS[1](self.finish)("
    )
    named = text.replace("# a comment", "if __name__ and __file__ else x  # a comment")
    for one in (text, named):
        assert model_sha256(load(one)) == model_sha256(load(one))


def test_the_forward_of_one_object_counts():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    known = {model_sha256(net)}
    net[1].forward = lambda x: x.sigmoid()
    known.add(model_sha256(net))
    del net[1].forward
    assert len(known) == 2
    assert model_sha256(net) in known


def test_graphs_are_known_by_their_code():
    def traced(function):
        return torch.fx.symbolic_trace(function)

    assert model_sha256(traced(nn.ReLU())) == model_sha256(traced(nn.ReLU()))
    one, two = nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.ReLU(), nn.Tanh())
    one, two = traced(one), traced(two)
    (first, second) = [node for node in two.graph.nodes if node.op == "call_module"]
    first.target, second.target = second.target, first.target
    two.recompile()
    assert model_sha256(one) != model_sha256(two)


@pytest.mark.parametrize("sparse", [lambda x: x.to_sparse(), lambda x: x.to_sparse_csr()])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_buffers_are_hashed_by_their_numbers(sparse):
    def net(value):
        made = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
        nn.init.ones_(made[0].weight)
        made[0].register_buffer("adjacency", sparse(value * torch.eye(5)))
        return made

    assert model_sha256(net(1.0)) == model_sha256(net(1.0)) != model_sha256(net(2.0))
