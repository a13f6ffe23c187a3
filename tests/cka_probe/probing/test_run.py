"""One run: options are frozen and complete, and a wrapper around the network changes nothing."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from cka_probe import probe
from cka_probe.probing.options import ProbeOptions

CONTEXT = {"model", "images", "progress", "ranks", "say"}  # of a call, not of what is computed


def test_options_are_the_keywords_of_probe_with_the_same_defaults():
    parameters = inspect.signature(probe).parameters
    fields = {field.name: field.default for field in dataclasses.fields(ProbeOptions)}
    assert fields == {k: p.default for k, p in parameters.items() if k not in CONTEXT}
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProbeOptions().seed = 1


def test_options_are_plain_after_validation():
    options = ProbeOptions(scales=(side for side in (8, 16)), reference="32", out="x")
    assert options.scales == [8, 16, 32]
    assert options.out.name == "x"
    net = nn.ReLU()
    assert ProbeOptions(views={"a": net, "b": [None, None]}).view_pairs == {
        "a": (net, None), "b": (None, None),
    }  # fmt: skip


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda n: torch.compile(n, backend="eager")])
def test_a_wrapped_network_is_the_same_run(tmp_path, wrap):
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(16, 3, 8, 8)
    options = {"scales": [6, 8], "batch_size": 8, "layers": ["0"], "out": tmp_path}
    options["progress"] = False
    report = probe(net, images, **options)
    assert probe(wrap(net), images, resume=True, **options) == report
    wrapped = probe(wrap(net), images, **options)
    assert wrapped.meta["run"] == report.meta["run"]
    assert wrapped.meta["layers"] == report.meta["layers"]
    assert wrapped.meta["layers"]["0"]["parameters"] == 112


def test_the_costs_are_announced_for_a_card_without_the_time_of_the_cpu(monkeypatch):
    from cka_probe.probing import run

    monkeypatch.setattr(run, "device_of", lambda model: torch.device("cuda"))
    said = []
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.rand(16, 3, 8, 8)
    probe(net, images, [6, 8], batch_size=8, memory="1GiB", progress=False, say=said.append)
    assert said[-1].startswith("estimate: ")
    assert "CPU" not in said[-1]
