"""Every architecture that users bring, and the table that says so."""

import gc
from importlib.util import find_spec

import pytest
import torch
import torchvision
import zoo
from architectures import UNCUT, examine, examine_cuts, examine_probe, names, read_table

ROWS = read_table()
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")


@pytest.fixture(scope="module")
def network(request):
    """One architecture, for the tests that follow each other on it."""
    gc.disable()  # a quarter of the time goes into looking for garbage among the graphs' nodes
    yield request.param, zoo.build(request.param).eval()
    gc.enable()
    gc.collect()


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # of the networks, while they are built and traced
@pytest.mark.parametrize("network", names(), indirect=True, ids=str)
class TestEveryArchitecture:
    def test_probe(self, network):
        found = examine_probe(*network)
        assert {key: ROWS[network[0]][key] for key in found} == found

    def test_cuts(self, network):
        found = examine_cuts(*network)
        assert {key: ROWS[network[0]][key] for key in found} == found


def test_the_table_holds_every_network():
    assert len(set(names())) == len(names())
    assert set(names()) <= set(ROWS)
    assert all(int(row["layers"]) > 0 for row in ROWS.values())
    uncut = {name: row["cut after"] for name, row in ROWS.items() if row["cuts"] == "none"}
    assert uncut == {name: why for name, (why, _) in UNCUT.items()}
    assert all(int(row["cuts"]) > 0 for name, row in ROWS.items() if name not in uncut)


@needs_timm
def test_one_model_of_each_timm_module():
    import timm

    assert len(zoo.TIMM) == 98
    known = set(timm.list_models())
    for module, name in zoo.TIMM.items():
        assert name not in known or name in timm.list_models(module=module)
    modules = {m for m in timm.list_modules() if timm.list_models(module=m)}
    assert modules & set(zoo.TIMM) == {m for m in modules if zoo.TIMM.get(m) in known}


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_two_of_them_by_default(name):
    assert examine(name) == ROWS[name]


def test_quick_weights_are_spread_as_the_slow_ones():
    quick = zoo.build("resnet50")
    torch.manual_seed(0)
    slow = torchvision.models.resnet50()
    for (name, a), b in zip(quick.named_parameters(), slow.parameters(), strict=True):
        a, b = a.detach(), b.detach()
        if a.numel() < zoo.Tiled.FEW:
            continue
        assert abs(float(a.std() / b.std()) - 1) < 0.03, name
        assert abs(float(a.mean())) < 0.05 * float(b.std()), name
        assert not torch.equal(a, b), name
        if a.numel() > 2 * zoo.Tiled.LENGTH:
            rows = a.flatten(1)[:, :64].contiguous()
            assert len(torch.unique(rows, dim=0)) == len(a), name


def test_quick_weights_leave_the_global_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = zoo.build("squeezenet1_1"), zoo.build("squeezenet1_1")
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
