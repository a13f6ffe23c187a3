"""The learning rate, which weights decay, and the EMA of the weights."""

import itertools

import pytest
import torch
from torch import nn
from training import network, same, weights

from msun.training.ema import EMA
from msun.training.schedule import learning_rate, parameter_groups


def test_the_rate():
    lrs = [learning_rate(k, 100, 10, 0.4) for k in range(100)]
    assert lrs[:10] == pytest.approx([0.04 * (k + 1) for k in range(10)])
    assert lrs[10] == pytest.approx(0.4)
    assert lrs[55] == pytest.approx(0.2)
    assert 0 < lrs[99] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(lrs[10:]))
    assert learning_rate(0, 1, 0, 0.4) == 0.4


def test_norms_and_biases_may_be_spared_decay():
    model = network()
    whole = parameter_groups(model, 0.1, decay_norms=True)
    assert [group["weight_decay"] for group in whole] == [0.1]
    parts = parameter_groups(model, 0.1, decay_norms=False)
    assert [group["weight_decay"] for group in parts] == [0.1, 0.0]
    assert {p.ndim for p in parts[0]["params"]} == {2, 4}
    assert {p.ndim for p in parts[1]["params"]} == {1}
    assert sum(len(g["params"]) for g in parts) == len(list(model.parameters()))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: "):
        parameter_groups(model, 0.1, decay_norms=True)


def test_the_ema_is_that_of_the_weights():
    layer = nn.BatchNorm1d(2)
    ema = EMA(layer, 0.5)
    want = {k: x.double().clone() for k, x in layer.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            layer.weight += 1
            layer.running_var += step
            layer.num_batches_tracked += 1
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, x in layer.state_dict().items():
            want[key] = decay * want[key] + (1 - decay) * x if x.is_floating_point() else x.double()
    before = weights(layer)
    with ema.applied():
        inside = weights(layer)
    assert same(weights(layer), before)
    for key, x in want.items():
        torch.testing.assert_close(inside[key].double(), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert same(weights(layer), before)
