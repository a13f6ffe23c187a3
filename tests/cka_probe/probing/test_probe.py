"""The loop: laws, counts, and what is left behind."""

import random

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cka_probe import DegenerateWarning, Report, probe
from cka_probe.inputs.batches import order


class Net(nn.Module):
    """Takes any size; counts its forwards; has an in-place layer after each tap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        x = self.drop(self.block(self.act(self.stem(x))))
        return self.head(x.mean((2, 3)))


LAYERS = ["stem", "block", "head"]


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(42, 3, 4, 4, generator=g)
    return F.interpolate(coarse, 16, mode="bilinear") + 0.2 * torch.randn(
        42, 3, 16, 16, generator=g
    )


def by_hand(images, sides, batch, seed=0):
    """Features by plain code: {(view, layer): [batch features, ...]}."""
    net = Net().eval()
    shuffled = images[order(len(images), seed)]
    found = {}
    starts = list(range(0, len(images), batch))
    if len(images) - starts[-1] < 4:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(images)], strict=True):
        for side in sides:
            x = shuffled[start:stop]
            if side != 16:
                x = F.interpolate(
                    x, (side, side), mode="bilinear", antialias=True, align_corners=False
                )
            with torch.no_grad():
                stem = net.stem(x)
                block = F.relu(net.block[0](F.relu(stem)))
                head = net.head(block.mean((2, 3)))
            for layer, value in zip(LAYERS, (stem, block, head), strict=True):
                rows = found.setdefault((str(side), layer), [])
                rows.append(value.flatten(1).double().numpy())
    return found


@pytest.mark.parametrize("batch", [8, 13, 64])
def test_equals_plain_code_and_the_oracle(images, batch):
    report = probe(
        Net(), images, [8, 12, 16], layers=LAYERS, batch_size=batch, seed=3, progress=False
    ) if batch < 42 else _one_group(images, batch)  # fmt: skip
    found = by_hand(images, [8, 12, 16], batch, seed=3)
    entries = list(zip(report.view.tolist(), report.layer.tolist(), strict=True))
    assert entries == [(v, layer) for v in ("8", "12", "16") for layer in LAYERS]
    expected = oracle.cka_minibatch_matrix([found[entry] for entry in entries])
    assert np.abs(report.cka - expected).max() < 1e-6


def _one_group(images, batch):
    with pytest.warns(DegenerateWarning, match="no error bars"):
        return probe(
            Net(), images, [8, 12, 16], layers=LAYERS, batch_size=batch, seed=3, progress=False
        )


def test_exact_does_not_depend_on_the_batch_size(images):
    options = {"layers": LAYERS, "estimator": "exact", "progress": False}
    one, other = (probe(Net(), images, [8, 16], batch_size=b, **options) for b in (5, 17))
    assert np.abs(one.cka - other.cka).max() < 1e-5  # convolutions round by batch
    found = by_hand(images, [8, 16], 42)
    expected = oracle.cka_matrix([found[v, n][0] for v in ("8", "16") for n in LAYERS])
    assert np.abs(one.cka - expected).max() < 1e-5


def test_a_view_costs_its_forwards_and_no_more(images):
    net = Net()
    probe(net, images, [8, 12, 16], batch_size=10, progress=False)
    assert net.forwards == 3 * 4  # a tail of 2 joined the batch before it
    net.forwards = 0
    probe(net, images, [16], batch_size=10, kernel="rbf", progress=False)
    assert net.forwards == 4


def test_equal_views_are_equal(images):
    same = {"one": (None, lambda x: x), "two": (None, None)}
    report = probe(Net(), images, views=same, batch_size=8, progress=False)
    assert np.allclose(np.diag(report.between("one", "two")), 1, atol=1e-9)
    assert report.reference == "one"


def test_two_networks(images):
    other = Net()
    with torch.no_grad():
        other.block[0].weight += 0.5
    report = probe(
        None, images, views={"a": (Net(), None), "b": (other, None)}, layers=LAYERS, batch_size=8,
        progress=False,
    )  # fmt: skip
    table = report.between("a", "b")
    assert table.loc["stem", "stem"] == pytest.approx(1, abs=1e-9)
    assert table.loc["block", "block"] < 0.999


def test_the_identity_as_a_network_of_its_own(images):
    net = Net()  # an empty Sequential has length 0, so it is false
    views = {"pixels": (nn.Sequential(), None), "net": (net, None)}
    report = probe(net, images, views=views, layers=["(model)"], estimator="exact", progress=False)
    with torch.no_grad():
        expected = oracle.cka(images.flatten(1).numpy(), net.eval()(images).numpy())
    assert report.layer.tolist() == ["(model)", "(model)"]
    np.testing.assert_allclose(report.cka[0, 1], expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["minibatch", "exact"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_meta_says_how_it_was_made(images, estimator, kernel):
    report = probe(
        Net(), images, [8, 16], batch_size=8, estimator=estimator, kernel=kernel, progress=False
    )
    meta = report.meta
    assert meta["n_images"] == 42
    assert meta["reference"] == "16"
    assert meta["estimator"] == estimator
    assert meta["kernel"] == kernel
    assert meta["groups"] == (5 if estimator == "minibatch" else 10)
    macs = {"8": 64 * 27 * 6 + 9 * 54 * 8 + 40, "16": 256 * 27 * 6 + 49 * 54 * 8 + 40}
    assert meta["view_macs"] == macs  # the Grams taken in the hooks are not counted
    assert meta["layers"]["block"]["views"]["16"] == {
        "shape": [8, 7, 7], "grid": [7, 7], "channels": 8,
    }  # fmt: skip
    assert meta["layers"]["block"]["parameters"] == 6 * 8 * 9 + 8


def test_leaves_everything_as_it_was(images):
    net = Net().train()
    net.block.eval()
    net.stem.weight.requires_grad_(False)
    hooks = [len(m._forward_hooks) for m in net.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state()  # noqa: NPY002
    probe(net, images, [8, 16], batch_size=8, progress=False)
    after = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert net.training
    assert not net.block.training
    assert not net.stem.weight.requires_grad
    assert hooks == [len(m._forward_hooks) for m in net.modules()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_view_and_batch(images, bad):
    net = Net()
    with torch.no_grad():
        net.block[0].weight[0, 0, 0, 0] = bad
    for estimator in ("minibatch", "exact"):
        with pytest.raises(ValueError, match=r"non-finite features: .*'block'.*'8'") as caught:
            probe(
                net, images, [8, 16], layers=LAYERS, batch_size=8, estimator=estimator,
                progress=False,
            )  # fmt: skip
        assert "\n" not in str(caught.value)
        if estimator == "minibatch":
            assert "batch 0" in str(caught.value)


def test_constant_and_dead_layers_are_nan_and_named(images):
    net = Net()
    with torch.no_grad():
        net.stem.weight.zero_()
    with pytest.warns(DegenerateWarning, match="constant features: layer 'stem' in view '8'"):
        report = probe(net, images, [8, 16], layers=["stem"], batch_size=8, progress=False)
    assert np.isnan(report.cka).all()


def test_a_refused_size_names_view_and_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    x = torch.randn(12, 3, 16, 16)
    with pytest.raises(ValueError, match=r"cannot take view '8'.*layer '2'.*restore"):
        probe(net, x, [8, 16], batch_size=6, progress=False)
    report = probe(net, x, [8, 16], batch_size=6, resize="restore", progress=False)
    assert np.isfinite(report.cka).all()


def test_unreached_layers_are_named(images):
    net = Net()
    net.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="layers never reached: unused"):
        report = probe(net, images, [16], layers=["stem", "unused"], batch_size=8, progress=False)
    assert report.meta["unreached"] == ["unused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": None, "views": {}}, "no network|no views"),
        ({"views": {"a": (None, None)}}, "scales and views: both given"),
        ({"batch_size": 3}, "3"),
        ({"bandwidth": 0.0}, "bad bandwidth"),
        ({"resume": True}, "resume without a folder"),
        ({"estimator": "best"}, "unknown estimator: 'best': known ones are minibatch, exact"),
        ({"reference": "banana"}, "banana"),
        ({"reference": 0}, "bad scale: 0: "),
        ({"images": torch.randn(3, 3, 8, 8)}, "too few images: 3"),
        ({"images": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"layers": ["nothing.*"]}, "nothing"),
        ({"estimator": "exact", "memory": 1000}, "exact does not fit in memory"),
    ],
)
def test_refusals_come_before_the_first_forward_or_on_the_first_batch(images, options, message):
    net = Net()
    arguments = {"images": images, "scales": [8, 16], "batch_size": 8, "progress": False, **options}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        probe(net, **arguments)
    assert "\n" not in str(caught.value)
    assert net.forwards <= 2


def test_the_reference_joins_the_scales(images):
    report = probe(Net(), images, [8], reference=16, batch_size=8, progress=False)
    assert report.views == ["8", "16"]
    assert report.reference == "16"


def test_folders_and_tensors_of_the_same_pixels_agree(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for i, p in enumerate(pixels):
        Image.fromarray(p).save(tmp_path / f"{i:02}.png")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    tensor = (tensor - 0.4) / 0.3
    options = {"scales": [8, 16], "batch_size": 6, "progress": False}
    one = probe(Net(), tmp_path, mean=[0.4] * 3, std=[0.3] * 3, **options)
    other = probe(Net(), tensor, **options)
    assert np.abs(one.cka - other.cka).max() < 1e-5
    again = probe(Net(), tmp_path, mean=[0.4] * 3, std=[0.3] * 3, workers=2, **options)
    assert np.array_equal(again.cka, one.cka)


def test_amp_touches_the_network_only(images):
    plain = probe(Net(), images, [8, 16], layers=LAYERS, batch_size=8, progress=False)
    mixed = probe(Net(), images, [8, 16], layers=LAYERS, batch_size=8, amp=True, progress=False)
    error = np.abs(plain.cka - mixed.cka).max()
    assert 0 < error < 0.02


def test_the_seed_decides_order_and_subset(images):
    options = {"scales": [8, 16], "layers": LAYERS, "batch_size": 8, "progress": False}
    one, same, other = (probe(Net(), images, seed=s, n_images=30, **options) for s in (0, 0, 1))
    assert one.meta["n_images"] == 30
    assert np.array_equal(one.cka, same.cka)
    assert not np.array_equal(one.cka, other.cka)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_interrupted_run_resumes_to_the_same(images, tmp_path, monkeypatch, kernel, at):
    options = {"scales": [8, 16], "batch_size": 4, "kernel": kernel, "progress": False}
    whole = probe(Net(), images, **options)
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    monkeypatch.setattr("cka_probe.engine.minibatch.BANDWIDTH_IMAGES", 8)
    whole = probe(Net(), images, **options)
    net = Net()

    def die(module, args):
        if net.forwards >= 2 * at:
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        probe(net, images, out=tmp_path, **options)
    handle.remove()
    done = {p.name for p in tmp_path.iterdir()}
    assert done <= {"state.npz"}
    report = probe(Net(), images, out=tmp_path, resume=True, **options)
    assert np.abs(report.cka - whole.cka).max() < 1e-9
    assert np.abs(report.stderr - whole.stderr).max() < 1e-9
    assert report.meta.get("resumed_from_batch", 0) == (at if done else 0)
    assert [p.name for p in tmp_path.iterdir()] == ["report.npz"]
    assert probe(Net(), images, out=tmp_path, resume=True, **options) == report  # finished


def test_a_state_of_another_run_is_refused_by_name(images, tmp_path, monkeypatch):
    monkeypatch.setenv("CKA_PROBE_SAVE_EVERY_S", "0")
    options = {"scales": [8, 16], "batch_size": 4, "progress": False, "out": tmp_path}
    net = Net()
    handle = net.register_forward_pre_hook(
        lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt) if net.forwards > 7 else None
    )
    with pytest.raises(KeyboardInterrupt):
        probe(net, images, **options)
    handle.remove()
    changed = Net()
    with torch.no_grad():
        changed.head.bias += 1
    for case, name in (
        ({"model": changed}, "views"),
        ({"images": images + 1}, "images"),
        ({"seed": 1}, "seed"),
        ({"reduce": "mean"}, "reduce"),
        ({"batch_size": 5}, "batch_size"),
    ):
        arguments = {"model": Net(), "images": images, **options, **case}
        with pytest.raises(ValueError, match=f"saved state of another run: .*{name}"):
            probe(resume=True, **arguments)
    state = tmp_path / "state.npz"
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"state.* damaged.*state\.npz"):
        probe(Net(), images, resume=True, **options)


def test_report_is_saved_where_asked(images, tmp_path):
    report = probe(Net(), images, [8, 16], batch_size=8, out=tmp_path / "new", progress=False)
    assert Report.load(tmp_path / "new" / "report.npz") == report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("estimator", ["minibatch", "exact"])
def test_cuda_equals_cpu(images, estimator):
    options = {"layers": LAYERS, "batch_size": 8, "estimator": estimator, "progress": False}
    cpu = probe(Net(), images, [8, 16], **options)
    net = Net()
    gpu = probe(net, images, [8, 16], device="cuda", **options)
    assert next(net.parameters()).device.type == "cpu"
    assert np.abs(cpu.cka - gpu.cka).max() < 1e-4
