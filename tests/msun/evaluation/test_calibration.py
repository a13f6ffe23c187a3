"""Re-estimated batch norm statistics against means and variances taken by hand in float64."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn

from cka_probe.inputs.batches import ImageError
from cka_probe.inputs.views import View
from cka_probe.models.load import LoadedModel
from msun import TrainConfig, build, calibrate, evaluate, load, recalibrated, save, train
from msun.data.labelled import open_labelled
from msun.network.norms import SizedNorm

QUIET = {"progress": False}


class Net(nn.Module):
    """conv, bn, relu | conv, bn, pool, fc."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, 2, padding=1), nn.BatchNorm2d(5)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(5, classes)
        with torch.no_grad():
            for norm in (self.bn1, self.bn2):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.flatten(self.pool(self.bn2(self.conv2(x)))))


def tensors(n=50, side=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, side, side, generator=generator)
    return images + 0.5 * torch.arange(n)[:, None, None, None] / n, torch.arange(n) % 3


def by_hand(net, batches, side):
    """(mean, var) of what enters each norm, over all images at once, in float64.

    A later norm sees what a batch's own statistics make of the earlier ones.
    """
    net = copy.deepcopy(net).double().train()
    seen = {"bn1": [], "bn2": []}
    for name, values in seen.items():
        module = getattr(net, name)
        module.register_forward_pre_hook(lambda _, args, values=values: values.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            net(torch.stack([View(side)(image) for image in batch]).double())
    out = {}
    for name, values in seen.items():
        flat = torch.cat(values).movedim(1, 0).flatten(1)  # (c, everything)
        out[name] = flat.mean(1), flat.var(1)
    return out


def batches_of(images, n, batch_size, seed):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    parts = torch.tensor_split(order, -(-n // batch_size))
    return [images[part] for part in parts]


def stored(net, name, side):
    norm = net.get_submodule(name)
    assert isinstance(norm, SizedNorm)
    return getattr(norm, f"mean_{side}x{side}"), getattr(norm, f"var_{side}x{side}")


@pytest.mark.parametrize(("n_images", "batch_size"), [(30, 64), (30, 8), (200, 16)])
def test_a_plain_networks_statistics_are_exact(n_images, batch_size):
    net, (images, labels) = Net(), tensors()
    twin = recalibrated(net, (images, labels), [9, 16], n_images=n_images, batch_size=batch_size,
                        seed=4, **QUIET)  # fmt: skip
    batches = batches_of(images, min(n_images, 50), batch_size, 4)
    for side in (9, 16):
        wanted = by_hand(net, batches, side)
        for name in ("bn1", "bn2"):
            for got, exact in zip(stored(twin, name, side), wanted[name], strict=True):
                assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_copy_uses_them_for_their_size_only():
    net, (images, labels) = Net().eval(), tensors()
    state = copy.deepcopy(net.state_dict())
    twin = recalibrated(net, (images, labels), [9], n_images=40, **QUIET)
    small = torch.stack([View(9)(image) for image in images])
    wanted = by_hand(net, batches_of(images, 40, 64, 0), 9)
    own = copy.deepcopy(net)
    for name in ("bn1", "bn2"):
        norm = getattr(own, name)
        norm.running_mean, norm.running_var = (value.float() for value in wanted[name])
    with torch.no_grad():
        assert torch.allclose(twin(small), own(small), atol=1e-5)
        assert not torch.allclose(twin(small), net(small), atol=1e-2)
        assert torch.equal(twin(images), net(images))
        again = copy.deepcopy(twin)
        assert torch.equal(again(small), twin(small))
        assert torch.equal(again(images), net(images))
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(isinstance(part, SizedNorm) for part in net.modules())
    assert twin.get_submodule("conv2").weight.shape == net.conv2.weight.shape


def test_recalibrating_again_adds_sizes():
    data = tensors()
    twin = recalibrated(recalibrated(Net(), data, [9], **QUIET), data, [12], **QUIET)
    assert twin.bn1.sizes == {(9, 9), (12, 12)}
    assert len(twin._forward_pre_hooks) == 1


def test_a_loaded_model_keeps_its_normalisation(tmp_path):
    loaded = LoadedModel(Net(), "net", (0.1, 0.2, 0.3), (1, 2, 3), "test", None, "none", None)
    for k in range(6):
        folder = tmp_path / "abc"[k % 3]
        folder.mkdir(exist_ok=True)
        Image.effect_noise((20, 20), 90).convert("RGB").save(folder / f"{k}.png")
    made = recalibrated(loaded, tmp_path, [8], **QUIET)
    assert (made.mean, made.name) == (loaded.mean, "net")
    source = open_labelled(tmp_path)
    view = View(8, mean=loaded.mean, std=loaded.std)
    x = torch.stack([view(source.load(k)[0]) for k in range(6)])
    with torch.no_grad():
        seen = loaded.model.conv1(x)
    mean, var = stored(made.model, "bn1", 8)
    assert torch.allclose(mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(var, seen.movedim(1, 0).flatten(1).var(1), rtol=1e-4)


@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_heads_and_trunk_of_an_msun(preset, tmp_path):
    images, labels = tensors()
    net = build(Net(), "relu", [8, 16], preset=preset)
    net.train()
    data = (images, labels)
    assert calibrate(net, data, [8, 12, 16], n_images=40, batch_size=40, **QUIET) is net
    shared = preset == "paper"
    assert net.calibrated == ((8, 8), (12, 12), (16, 16))
    native = build(Net(), "relu", [8, 16], preset=preset, inputs="native")
    calibrate(native, data, [8, 12, 16], n_images=8, **QUIET)  # private: passed over where trained
    assert native.calibrated == (((8, 8),) * shared + ((12, 12),) + ((16, 16),) * shared)
    assert all(part.training for part in net.modules() if isinstance(part, nn.Conv2d))
    net.eval()
    small = torch.stack([View(12)(image) for image in images])
    (batch,) = batches_of(images, 40, 40, 0)
    shown = torch.stack([View(12)(image) for image in batch])
    scale = net.route(12, 12)
    with torch.no_grad():
        head, seen = net.subnet(scale), []
        hook = head.get_submodule("conv1").register_forward_hook(lambda *a: seen.append(a[-1]))
        net.features(shown)
        hook.remove()
        mean, var = stored(head, "bn1", 12)
        assert torch.allclose(mean.double(), seen[0].double().mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(var.double(), seen[0].double().movedim(1, 0).flatten(1).var(1))
        z = net.features(shown)  # by the stored statistics: of one batch, so its own but for n - 1
        entering = net.tail.get_submodule("conv2")(z)
        mean, var = stored(net.tail, "bn2", 12)
        assert torch.allclose(mean, entering.mean((0, 2, 3)), atol=1e-3)
        assert torch.allclose(var, entering.movedim(1, 0).flatten(1).var(1), rtol=1e-2)
        save(net, tmp_path / "net.pt")
        again = load(tmp_path / "net.pt", backbone=Net())
        assert again.calibrated == net.calibrated
        assert torch.equal(again(small), net(small))
        plain = build(Net(), "relu", [8, 16], preset=preset).eval()
        assert not torch.allclose(plain(small), net(small), atol=1e-2)
        other = torch.stack([View(10)(image) for image in images])
        assert torch.equal(plain(other), net(other)), "another size is as before"


def test_trained_sizes_are_passed_over_only_where_nothing_else_was_learned(tmp_path):
    images, labels = tensors()
    lone = build(Net(), "relu", [16])
    before = {k: v.clone() for k, v in lone.state_dict().items()}
    calibrate(lone, (images, labels), [16], n_images=8, **QUIET)
    assert lone.calibrated == ()
    assert all(torch.equal(v, before[k]) for k, v in lone.state_dict().items())
    for between, known in ((0.0, ()), (1.0, ((8, 8), (16, 16)))):
        net = build(Net(), "relu", [8, 16], inputs="native")
        how = {"max_steps": 2, "batch_size": 8, "val_share": 0.0, "progress": False}
        train(
            net, (images, labels), TrainConfig(out=tmp_path / str(between), between=between, **how)
        )
        calibrate(net, (images, labels), [8, 16], n_images=8, **QUIET)
        assert net.calibrated == known


def test_it_makes_a_network_right_where_it_was_not():
    """A norm whose statistics are off answers at random; re-estimated, it is right again."""
    net = Net(classes=2).eval()
    images = torch.zeros(80, 3, 8, 8)
    labels = torch.arange(80) % 2
    images += labels[:, None, None, None] * 0.2 + 0.02 * torch.randn(80, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            net.train()
            net(images)
            net.eval()
        features = net.flatten(net.pool(net.bn2(net.conv2(net.relu(net.bn1(net.conv1(images)))))))
        apart = features[labels == 1].mean(0) - features[labels == 0].mean(0)
        middle = features.mean(0)
        net.fc.weight[:] = torch.stack([-apart, apart])
        net.fc.bias[:] = torch.stack([apart @ middle, -apart @ middle])
        net.bn1.running_mean += 3
        net.bn2.running_mean -= 3
    before = evaluate(net, (images, labels), [8], cka=False, latency=False, **QUIET)
    twin = recalibrated(net, (images, labels), [8], n_images=40, **QUIET)
    after = evaluate(twin, (images, labels), [8], cka=False, latency=False, **QUIET)
    assert before["top1"][0] < 0.7
    assert after["top1"][0] > 0.95
    assert after["gmacs"][0] == before["gmacs"][0]
    assert after["params_m"][0] == before["params_m"][0]


def test_faults_are_named(tmp_path):
    net, data = build(Net(), "relu", [8, 16]), tensors(8)
    for bad, match, error in [
        (lambda: calibrate(Net(), data, [8]), "not an MSUN: Net: ", TypeError),
        (lambda: calibrate(net, data, [0]), "bad scale: 0: ", ValueError),
        (lambda: calibrate(net, data, [12], n_images=0), "bad n_images: 0: ", ValueError),
        (lambda: calibrate(net, data, [12], batch_size=-1), "bad batch_size: -1: ", ValueError),
        (lambda: recalibrated(nn.Conv2d(3, 2, 3), data, [8]), "no batch norm to re-estimate: Conv",
         ValueError),
        (lambda: calibrate(net, data, [12], device="cuda:99"), "cannot use device", ValueError),
        (lambda: calibrate(net, tmp_path / "none", [12]), "none", ValueError),
    ]:  # fmt: skip
        with pytest.raises(error, match=match) as caught:
            bad()
        assert str(caught.value).count(": ") == 2, str(caught.value)
    assert net.calibrated == ()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(ImageError, match=r"a/x\.png"):
        calibrate(net, tmp_path, [12], **QUIET)
    assert net.calibrated == ()
    assert all(norm.moments is None for norm in net.modules() if isinstance(norm, SizedNorm))


def test_random_numbers_go_on_as_before():
    net, data = Net(), tensors(8)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    recalibrated(net, data, [8], **QUIET)
    assert torch.equal(torch.rand(2), wanted)
