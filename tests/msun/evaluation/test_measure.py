"""What a measurement leaves behind, what it costs, and what it refuses, by name."""

import gc
import math
import time
import weakref

import pytest
import torch
from measured import QUIET, Tiny, photographs, tensors
from torch import nn
from torch.utils.data import Dataset

from cka_probe.inputs.batches import ImageError
from msun import build, evaluate
from msun.data.labelled import open_labelled
from msun.evaluation.measure import EvalNetwork


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photos"))


class Counted(Dataset):
    """Images that tell how often each was asked for, and how many live at once."""

    classes = ("a", "b", "c")

    def __init__(self, n):
        self.asked, self.n, self.alive, self.most = [], n, weakref.WeakSet(), 0
        self.targets = [k % 3 for k in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        self.asked.append(k)
        image = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(k))
        storage = image.untyped_storage()
        self.alive.add(storage)
        self.most = max(self.most, len(self.alive))
        return image, k % 3


def test_each_image_is_read_once_and_let_go():
    data = Counted(120)
    source = open_labelled(data)
    data.asked.clear()
    gc.collect()
    evaluate(Tiny(), source, [8, 12, 16, 20], batch_size=8, **QUIET)
    assert sorted(data.asked) == list(range(120))
    assert data.most <= 3 * 8


def flags(net):
    return [m.training for m in net.modules()]


def hooks(net):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("at", [None, "conv2"])
def test_the_network_is_as_it_was(bad, at):
    net = Tiny(classes=2 if bad else 3)
    net.train()
    net.bn1.eval()
    before, state = flags(net), {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    if bad:
        with pytest.raises(ValueError, match="outputs do not fit"):
            evaluate(net, tensors(8), [8, 16], at=at, progress=False)
    else:
        evaluate(net, tensors(8), [8, 16], at=at, progress=False)
    assert torch.equal(torch.rand(3), wanted)
    assert flags(net) == before
    assert sum(hooks(net)) == 0
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


class Fixed(nn.Module):
    """Takes 16 px only."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2 * 14 * 14, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class Sick(Tiny):
    """Says NaN of one image at one size."""

    def forward(self, x):
        out = super().forward(x)
        if x.shape[-1] == 8:
            out[x[:, 0, 0, 0] > 90] = math.nan
        return out


def test_faults_are_named(tmp_path):
    def refused(net, match, error=ValueError, data=None, sizes=(8, 16), **options):
        with pytest.raises(error, match=match) as caught:
            evaluate(net, data or tensors(8), sizes, **{**QUIET, **options})
        assert str(caught.value).count(": ") == 2, str(caught.value)
        assert "\n" not in str(caught.value)

    refused(Fixed(), r"the network cannot take this size: Fixed at 8 px, in 'fc', .*")
    refused(build(Fixed(), "conv", [16]), "the network cannot take this size: MSUN at 2 px",
            sizes=[2])  # fmt: skip
    images, labels = tensors(8)
    images[5] = 99.0
    refused(Sick(), "scores are not finite: Sick, image 5 of 'tensor 8x3x16x16' at 8 px",
            data=(images, labels))  # fmt: skip
    refused(nn.Flatten(0), "no scores: Flatten at 8 px gave", TypeError, cka=False)
    refused(nn.Conv2d(3, 3, 3), "no scores: Conv2d at 8 px gave", TypeError)
    refused(Tiny(), "no such module: 'conv9' in Tiny: it has 'conv1', 'bn1'", at="conv9")
    refused(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "no features: ")
    refused(Tiny(), "batch_size is too small: 3", batch_size=3)
    refused(Tiny(), "half a normalisation: only mean", mean=(0, 0, 0))
    units = (torch.rand(8, 3, 16, 16), labels)
    refused(Tiny(), "mean and std are not of 0..1: mean 120, std 60", mean=(120,) * 3,
            std=(60,) * 3, data=units)  # fmt: skip
    refused(Tiny(), "bad scale: 0", sizes=[0])
    refused(Tiny(), "images that are open already: split None, n_images 4",
            data=open_labelled(tensors(8)), n_images=4)  # fmt: skip
    refused("resnet18", "no network: str", TypeError)
    net = Tiny()
    net.conv2.weight.data.fill_(math.inf)
    refused(net, "scores are not finite")


@pytest.mark.parametrize("asked_late", [False, True])
def test_features_that_are_not_finite(asked_late, monkeypatch):
    """An accelerator is asked once a batch, and told of as the CPU is."""
    if asked_late:
        monkeypatch.setattr("cka_probe.engine.batch_gram.on_accelerator", lambda x: True)

    class Hidden(Tiny):
        def forward(self, x):
            out = super().forward(x)
            self.relu(torch.full((len(x), 4), math.inf))
            return out

    with pytest.raises(ValueError, match="features are not finite: Hidden at 8 px, "):
        evaluate(Hidden(), tensors(8), [8], at="relu", **QUIET)


def test_a_corrupt_image_is_named(photos, tmp_path):
    for name in "abc":
        (tmp_path / "set" / name).mkdir(parents=True)
        for path in (photos / name).iterdir():
            (tmp_path / "set" / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "set" / "b" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(ImageError, match=r"b/01\.png"):
        evaluate(Tiny(), tmp_path / "set", [8], predictions=tmp_path / "p", **QUIET)
    assert not (tmp_path / "p").exists()
    with pytest.raises(ValueError, match="no folder for the predictions: "):
        evaluate(Tiny(), photos, [8], predictions=tmp_path / "no" / "p", **QUIET)


def test_latency_is_measured():
    class Slow(Tiny):
        seen = ()

        def forward(self, x):
            time.sleep(0.02)
            self.seen = (*self.seen, tuple(x.shape))
            return super().forward(x)

    net = Slow()
    frame = evaluate(net, tensors(8), [8, 12, 16], feed="upsampled", progress=False)
    for name in ("latency_ms_1", "latency_ms_64"):
        assert (frame[name] >= 20).all()
        assert frame[name].nunique() == 1, "what is fed for several sizes is timed once"
    assert {shape for shape in net.seen if shape[0] == 64} == {(64, 3, 16, 16)}
    with EvalNetwork(net) as own:
        assert own.latency_ms((1, 3, 8, 8)) >= 20
    quiet = evaluate(net, tensors(8), [8], **QUIET)
    assert quiet[["latency_ms_1", "latency_ms_64"]].isna().all(axis=None)


def test_double_precision():
    frame = evaluate(Tiny().double(), tensors(8), [8], progress=False)
    assert frame["top1"].tolist() == evaluate(Tiny(), tensors(8), [8], **QUIET)["top1"].tolist()


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="cannot use device: 'cuda:99'"):
        evaluate(Tiny(), tensors(8), [8], device="cuda:99", **QUIET)


def test_features_are_a_copy():
    """A later in-place layer does not reach what was taken."""
    net = Tiny()
    with EvalNetwork(net, at="bn1") as own:
        _, features = own(torch.randn(2, 3, 8, 8), 8)
    assert (features < 0).any()
