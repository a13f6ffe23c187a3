"""Batch norms by scale and by size, against plain ones and float64 sums."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from msun.network import norms
from msun.network.norms import (
    SizedNorm,
    calibrated_sizes,
    install,
    recalibrate,
    select,
    sized_norms,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def used(norm):
    """A batch norm with statistics that are not the initial ones."""
    for k in range(3):
        norm.train()(noise(4, norm.num_features, 5, 5, seed=k) * 2 + 1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm.eval()


def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    for m in (net[1], net[4]):
        used(m)
    return net.eval()


@pytest.mark.parametrize("scales", [None, (8, 16)])
def test_before_training_it_is_the_norm_that_it_was(scales):
    plain = used(nn.BatchNorm2d(6))
    sized, x = SizedNorm(copy.deepcopy(plain), scales), noise(3, 6, 4, 7)
    assert torch.equal(sized(x), plain(x))
    for scale in (8, 16):
        sized.active = (scale, (scale, scale))
        assert torch.equal(sized(x), plain(x))
    sized.train(), plain.train()
    assert torch.equal(sized(x), plain(x))
    assert torch.equal(sized.norm.running_mean, plain.running_mean)


def test_training_at_one_scale_moves_its_norm_alone():
    sized = SizedNorm(nn.BatchNorm2d(6), (8, 16)).train()
    before = copy.deepcopy(sized.state_dict())
    select(sized, 8, (8, 8))
    sized(noise(4, 6, 3, 3)).square().sum().backward()
    changed = {key for key, x in sized.state_dict().items() if not torch.equal(x, before[key])}
    assert changed == {
        f"norms.8.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert sized.norms["16"].weight.grad is None
    select(sized, 12, (12, 12))
    with pytest.raises(ValueError, match=r"^no batch norm for this scale: 12 px: it has 8, 16"):
        sized(noise(4, 6, 3, 3))


def test_pooled_statistics_are_exact():
    net = nn.Sequential(nn.BatchNorm2d(3))
    install(net)
    batches = [noise(n, 3, 6, 5, seed=n) * 3 + 100 for n in (2, 7, 1)]  # a mean far from 0
    assert recalibrate(net, batches, (6, 5)) == (10, 1)
    x = np.concatenate([b.numpy() for b in batches]).astype(np.float64)
    np.testing.assert_allclose(net[0].mean_6x5.numpy(), x.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(net[0].var_6x5.numpy(), x.var((0, 2, 3), ddof=1), rtol=1e-5)


def test_one_batch_gives_what_training_with_momentum_1_keeps():
    plain, x = small(), noise(5, 3, 13, 13)
    net = copy.deepcopy(plain)
    install(net)
    recalibrate(net, [x], 13)
    for m in (plain[1], plain[4]):
        m.momentum = 1.0
    plain.train()(x)
    plain.eval()
    select(net, 13, (13, 13))
    torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-5)


def test_they_are_used_at_exactly_that_size_in_eval_mode():
    net = small()
    plain = copy.deepcopy(net)
    install(net)
    recalibrate(net, [noise(5, 3, 13, 13) * 4], 13)
    assert calibrated_sizes(net) == ((13, 13),)
    a, b = noise(2, 3, 13, 13), noise(2, 3, 13, 14)
    select(net, 8, (13, 13))
    assert not torch.allclose(net(a), plain(a))
    select(net, 8, (13, 14))
    assert torch.equal(net(b), plain(b))
    select(net, 8, (13, 13))
    assert torch.equal(net.train()(a), plain.train()(a))


def test_they_are_in_the_state_dict_and_come_back():
    net, fresh = small(), small()
    install(net, (8, 16)), install(fresh, (8, 16))
    select(net, 8, (13, 13)), select(fresh, 8, (13, 13))
    recalibrate(net, [noise(5, 3, 13, 13) * 4], 13)
    recalibrate(fresh, [noise(5, 3, 20, 20)], 20)  # gone after loading: not in the state
    fresh.load_state_dict(net.state_dict())
    assert calibrated_sizes(fresh) == ((13, 13),)
    x = noise(2, 3, 13, 13)
    assert torch.equal(fresh(x), net(x))
    assert fresh.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_modes_and_old_statistics_survive_a_failure():
    net = small().train()
    net[0].eval()
    install(net)
    modes = [m.training for m in net.modules()]
    recalibrate(net, [noise(5, 3, 13, 13)], 13)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^images of another size: 12 x 13, not 13 x 13: "):
        recalibrate(net, [noise(5, 3, 13, 13) * 9, noise(5, 3, 12, 13)], 13)
    with pytest.raises(ValueError, match=r"^no images to re-estimate on: 13 x 13: "):
        recalibrate(net, [], (13, 13))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    assert not any(norm.moments for norm in sized_norms(net))


def test_recalibrating_leaves_the_trained_statistics_alone():
    net = small()
    install(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    recalibrate(net, [noise(5, 3, 13, 13)], 13)
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_norm_that_stands_twice_stays_one():
    shared = nn.BatchNorm2d(3)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    install(net)
    assert net["a"][0] is net["b"]
    count = len(sized_norms(net))
    install(net)
    assert len(sized_norms(net)) == count == 1


def test_norms_with_an_activation_and_those_without_statistics():
    timm = pytest.importorskip("timm")
    act = used(timm.layers.BatchNormAct2d(4))
    plain, x = copy.deepcopy(act), noise(2, 4, 9, 9)
    net = nn.Sequential(act, nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4))
    install(net, (8, 16))
    assert [type(m) for m in net] == [SizedNorm, nn.BatchNorm2d, nn.InstanceNorm2d]
    assert torch.equal(net[0](x), plain(x))
    recalibrate(net, [x * 3], 9)
    select(net, 8, (9, 9))
    y = net[0](x)
    assert y.min() == 0  # the activation is still there
    plain.running_mean, plain.running_var = net[0].mean_9x9, net[0].var_9x9
    assert torch.equal(y, plain(x))


def test_vectors_and_a_single_value_per_channel():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    install(net)
    assert recalibrate(net, [noise(1, 3, 1, 1)], 1) == (1, 1)
    select(net, 1, (1, 1))
    assert torch.isfinite(net.eval()(noise(1, 3, 1, 1))).all()


def test_a_network_without_batch_norm_has_none():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    install(net, (8, 16))
    assert recalibrate(net, [noise(2, 3, 9, 9)], 9) == (2, 0)
    assert norms.calibrated_sizes(net) == ()
