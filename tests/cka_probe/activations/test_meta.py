"""Copies on the meta device: shapes without data, and no copy of the data on the way."""

import copy

import torch
from torch import nn

from cka_probe.activations.meta import meta_copy
from cka_probe.probing.forecast import estimate


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


def test_a_copy_has_shapes_and_no_data():
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    ghost = meta_copy(model)
    assert {x.device.type for x in (*ghost.parameters(), *ghost.buffers())} == {"meta"}
    assert ghost(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 2, 4, 4)
    assert not ghost[0]._forward_hooks
    assert model[0]._forward_hooks
    assert {x.device.type for x in model.parameters()} == {"cpu"}


def test_an_estimate_copies_no_weights(monkeypatch):
    """A network as large as half of the memory must not be copied before it is estimated."""

    def refuse(*_):
        raise MemoryError("weights were copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    found = estimate({"v": network()}, {"v": (3, 8, 8)}, batch_size=4, layers=None,
                     reduce="flatten")  # fmt: skip
    assert found is not None
    assert found.widths == (4 * 36, 2 * 16)  # the default layers
    assert copy.copy(found) == found
