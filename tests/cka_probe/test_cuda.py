"""What users do with a GPU, held against the CPU; skips where there is none."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from processes import Net, call, images
from shell import furnish, words
from torch import nn

from cka_probe import cka, cka_loss, cka_matrix, permutation_test, probe
from cka_probe.cli.main import main
from cka_probe.engine.exact import Exact
from cka_probe.engine.minibatch import Minibatch
from cka_probe.engine.sketch import Sketch

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float32_convolutions"),
]
ESTIMATORS = ("minibatch", "exact", "sketch")


def own(a, b):
    return (a @ b.T / a.shape[1]).tanh()


def apart(a, b):
    """The largest difference of two reports, in CKA and in error bars."""
    assert a.layers == b.layers
    return max(np.abs(a.cka - b.cka).max(), np.abs(a.stderr - b.stderr).max())


@pytest.mark.parametrize("resize", ["native", "restore"])
@pytest.mark.parametrize("batch_size", [8, 32])  # Grams in float64, and in float32
@pytest.mark.parametrize("kernel", ["linear", "rbf", own], ids=["linear", "rbf", "own"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_probe_equals_that_of_the_cpu(estimator, kernel, batch_size, resize):
    if estimator == "sketch" and kernel != "linear":
        pytest.skip("sketch is linear")
    options = {"estimator": estimator, "kernel": kernel, "batch_size": batch_size, "images": 96,
               "resize": resize}  # fmt: skip
    want, got = call(options), call(options, device="cuda")
    assert apart(want, got) < 1e-5
    assert want.meta["view_macs"] == got.meta["view_macs"]
    assert np.isfinite(got.stderr).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_is_near_float32(estimator):
    options = {"estimator": estimator, "images": 64, "batch_size": 16, "device": "cuda"}
    assert 0 < apart(call(options), call(options, amp=True)) < 0.03


@pytest.mark.parametrize("reduce", ["flatten", "mean", "grid=2"])
def test_reducers(reduce):
    options = {"layers": ["stem", "block"], "reduce": reduce}
    assert apart(call(options), call(options, device="cuda")) < 1e-5


def related(n=64, d=2000):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g) + 3
    return x, x[:, :500] + torch.randn(n, 500, generator=g)


@contextmanager
def tf32(new):
    """As a user turns it on: by torch's older call, or by the one from 2.9 on."""
    matmul = torch.backends.cuda.matmul
    if new:
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if new:
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)


def filled(estimator):
    """The result of an estimator that got two batches of two entries."""
    for index, part in enumerate((slice(0, 32), slice(32, 64))):
        for key, x in zip("xy", related(), strict=True):
            estimator.update(key, x[part].to(CUDA))
        estimator.end_batch(index)
    return estimator.compute().cka[0, 1]


def on_cuda(function, **options):
    return function(*(x.to(CUDA) for x in related()), **options)


GRAMS = {
    "minibatch": lambda: filled(Minibatch(2)),
    "minibatch, rbf": lambda: filled(Minibatch(2, kernel="rbf")),
    "exact": lambda: filled(Exact()),
    "sketch": lambda: filled(Sketch(size=512)),
    "sketch, over images": lambda: filled(Sketch(size=48)),
    "cka": lambda: on_cuda(cka),
    "cka, rbf": lambda: on_cuda(cka, kernel="rbf"),
    "loss": lambda: float(on_cuda(cka_loss)),
    "loss, rbf": lambda: float(on_cuda(cka_loss, kernel="rbf")),
    "permutations": lambda: on_cuda(permutation_test, n=9),
}


@pytest.mark.parametrize("new", [False, True], ids=["older call", "newer call"])
@pytest.mark.parametrize("ask", GRAMS.values(), ids=GRAMS)
def test_tf32_changes_no_gram(ask, new):
    if new and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    x = related()[0].to(CUDA)
    product, plain = x @ x.T, ask()
    with tf32(new):
        if torch.cuda.get_device_capability() >= (8, 0):
            assert not torch.equal(x @ x.T, product), "TF32 is not on"
        assert ask() == plain
        assert not torch.equal(x @ x.T, product) or torch.cuda.get_device_capability() < (8, 0)
    assert torch.equal(x @ x.T, product)


def test_features_at_hand():
    x, y = related()
    for kernel in ("linear", "rbf"):
        for unbiased in (True, False):
            how = {"kernel": kernel, "unbiased": unbiased}
            want = cka(x, y, **how)
            for a, b in ((x.to(CUDA), y.to(CUDA)), (x.to(CUDA), y), (x, y.to(CUDA))):
                assert cka(a, b, **how) == pytest.approx(want, abs=1e-6)
        want = cka_matrix({"x": x, "y": y}, kernel=kernel)
        got = cka_matrix({"x": x.to(CUDA), "y": y.to(CUDA)}, kernel=kernel)
        assert apart(want, got) < 1e-6
        want = permutation_test(x, y, n=99, kernel=kernel)
        for a, b in ((x.to(CUDA), y.to(CUDA)), (x.to(CUDA), y)):
            got = permutation_test(a, b, n=99, kernel=kernel)
            assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_and_its_gradients(kernel, dtype):
    found = []
    for home in (torch.device("cpu"), CUDA):
        x, y = (z.to(home, dtype).requires_grad_() for z in related())
        with torch.autocast(home.type, torch.bfloat16):  # which reaches no Gram
            loss = cka_loss(x, y, kernel=kernel)
        loss.backward()
        assert x.grad.device.type == home.type
        found.append((float(loss.detach()), x.grad.cpu().double(), y.grad.cpu().double()))
    (want, *grads), (got, *others) = found
    assert got == pytest.approx(want, abs=1e-5)
    limit = 0.02 if dtype == torch.bfloat16 else 1e-4  # a gradient comes in the dtype of its input
    for a, b in zip(grads, others, strict=True):
        assert (a - b).norm() <= limit * a.norm()


def stopped(folder, estimator, device):
    """A run that is interrupted in its fourth batch."""
    net, forwards = Net(), [0]

    def stop(module, args):
        forwards[0] += 1
        if forwards[0] > 7:
            raise KeyboardInterrupt

    net.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ask(net, folder, estimator, device)
    assert (folder / "state.npz").exists()
    assert next(net.parameters()).device.type == "cpu"


def ask(net, folder, estimator, device, **more):
    options = {"layers": ["stem", "block", "head"], "batch_size": 4, "progress": False, **more}
    return probe(net, images(), [8, 16], out=folder, estimator=estimator, device=device, **options)


@pytest.mark.parametrize(("first", "then"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_goes_on_where_it_was_stopped(tmp_path, estimator, first, then):
    whole = ask(Net(), tmp_path / "whole", estimator, "cuda")
    stopped(tmp_path / "half", estimator, first)
    again = ask(Net(), tmp_path / "half", estimator, then, resume=True)
    assert again.meta["resumed_from_batch"] == 3
    assert apart(whole, again) < (1e-7 if first == then else 1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wherever_network_and_images_are(estimator):
    options = {"layers": ["stem", "head"], "batch_size": 8, "estimator": estimator,
               "progress": False}  # fmt: skip
    want = probe(Net(), images(), [8, 16], **options)
    for network, data, device in (
        ("cuda", "cpu", None), ("cpu", "cuda", None), ("cuda", "cuda", None),
        ("cpu", "cpu", "cuda"), ("cuda", "cpu", "cpu"), ("cpu", "cpu", torch.device("cuda:0")),
    ):  # fmt: skip
        net = Net().to(network)
        got = probe(net, images().to(data), [8, 16], device=device, **options)
        assert apart(want, got) < 1e-5
        assert {p.device.type for p in net.parameters()} == {network}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("homes", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_two_networks(homes, estimator):
    options = {"layers": ["stem", "head"], "batch_size": 8, "estimator": estimator,
               "progress": False}  # fmt: skip
    want, got = (
        probe(None, images(), views={"a": Net().to(a), "b": Net(0.5).to(b)}, **options)
        for a, b in (("cpu", "cpu"), homes)
    )
    assert apart(want, got) < 1e-5


def test_a_transform_may_use_the_card():
    """Its views are whole when a network on the CPU reads them."""
    data, options = images(), {"batch_size": 8, "progress": False}
    views = {"a": (None, lambda image: image.to(CUDA) * 2), "b": (None, lambda image: image * 2)}
    report = probe(Net(), data, views=views, **options)
    assert (np.diagonal(report.between("a", "b")) > 1 - 1e-6).all()


class Draws(nn.Module):
    """A layer that draws where it runs, and attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.tap = nn.Conv2d(3, 16, 4, 4), nn.Identity()

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
        return self.tap(x.flatten(1) + torch.rand(len(x), 1, device=x.device))


def test_random_numbers_of_the_card_are_as_before():
    torch.rand(1, device=CUDA)
    before = torch.cuda.get_rng_state()
    options = {"layers": ["tap"], "batch_size": 8, "progress": False}
    report = probe(Draws(), images(), [16], device="cuda", **options)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert report.meta["view_macs"] == probe(Draws(), images(), [16], **options).meta["view_macs"]


def peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_the_card_does_not_grow_with_the_images():
    def of(n, estimator):
        options = {"images": n, "batch_size": 16, "estimator": estimator, "device": "cuda"}
        return peak(lambda: call(options))

    of(64, "minibatch")  # workspaces of the libraries, once
    assert of(512, "minibatch") <= 1.02 * of(64, "minibatch")
    features = 4 * 448 * 6 * 16 * 16  # bytes of the stem alone, at the larger scale
    assert of(512, "exact") > of(64, "exact") + features


@pytest.mark.parametrize("options", [{"estimator": name} for name in ESTIMATORS]
                         + [{"kernel": "rbf"}])  # fmt: skip
def test_what_is_not_finite_is_named(options):
    data = images(12)
    data[torch.randperm(12, generator=torch.Generator().manual_seed(0))[5]] = 3e38
    with pytest.raises(
        ValueError, match=r"non-finite features: .*layer 'stem', view '16', batch 1: check"
    ):
        call({**options, "images": data, "scales": [16], "device": "cuda"})


def test_constant_features_have_no_cka():
    data = images(16)
    with pytest.warns(UserWarning, match="constant features"):
        report = call({"images": data * 0 + 1, "device": "cuda"})
    assert np.isnan(report.cka).all()


def test_the_command_line_takes_the_card_unless_told(tmp_path, capsys):
    furnish(tmp_path)
    used = {}
    for name, more in (
        ("default", []),
        ("cpu", ["--device", "cpu"]),
        ("cuda", ["--device", "cuda"]),
    ):
        argv = words(tmp_path, tmp_path / name, "--quiet", *more)
        used[name] = peak(lambda argv=argv: main(argv))
        assert (tmp_path / name / "report.npz").exists(), capsys.readouterr().err
    assert used["cpu"] == 0 < min(used["default"], used["cuda"])
