"""The accelerator's path: equal to the CPU's, and it asks for nothing between two layers."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from processes import call, images
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cka_probe.engine import batch_gram as room
from cka_probe.engine import exact, sketch
from cka_probe.engine.batch_gram import gram_of_batch
from cka_probe.engine.centring import NonFiniteFeaturesError
from cka_probe.engine.hsic import u_centre
from cka_probe.engine.kernels import KERNELS, get_kernel
from cka_probe.engine.products import full_precision
from cka_probe.probing.choose import ESTIMATORS

FEATURES = {
    "plain": lambda g: torch.randn(40, 300, generator=g),
    "offset": lambda g: 1e4 + torch.randn(40, 300, generator=g),
    "tiny": lambda g: 1e-25 * torch.randn(40, 300, generator=g),
    "huge": lambda g: 1e25 * torch.randn(40, 300, generator=g),
    "one-feature": lambda g: torch.randn(40, 1, generator=g),
    "half": lambda g: torch.randn(40, 300, generator=g).half(),
    "bfloat16": lambda g: torch.randn(40, 300, generator=g).bfloat16(),
    "double": lambda g: torch.randn(40, 300, generator=g).double(),
    "few": lambda g: 1e4 + torch.randn(8, 300, generator=g),
    "repeated": lambda g: torch.full((40, 300), 0.1),
    "zero": lambda g: torch.zeros(40, 300),
    "nearly": lambda g: 1 + 1e-8 * torch.randn(40, 300, generator=g, dtype=torch.float64),
}


def pretend(monkeypatch):
    """The CPU takes the accelerator's path."""
    for module in (room, sketch):
        monkeypatch.setattr(module, "on_accelerator", lambda x: True)


@pytest.mark.parametrize(
    ("name", "kernel"), [*product(FEATURES, ("linear", "rbf")), ("plain", "own"), ("zero", "own")]
)
def test_block_equals_the_cpu_path(name, kernel, monkeypatch):
    x = FEATURES[name](torch.Generator().manual_seed(0))
    chosen = get_kernel((lambda a, b: (a @ b.T).tanh()) if kernel == "own" else kernel)
    want = gram_of_batch(x, chosen)
    pretend(monkeypatch)
    got = gram_of_batch(x, chosen)
    assert float(got.eps) == float(want.eps)
    assert got.block.dtype == torch.float64
    want, block = u_centre(want.block), u_centre(got.block)  # an error of the mean does not count
    scale = float(want.abs().max()) or 1.0
    assert float((block - want).abs().max()) <= 2e-6 * scale
    assert np.isfinite(float(got.largest))


@pytest.mark.parametrize(
    ("value", "kind"), [("nan", "NaN"), ("inf", "Inf"), ("-inf", "Inf"), ("1e300", None)]
)
def test_what_is_not_finite_is_named(value, kind, monkeypatch):
    pretend(monkeypatch)
    x = torch.ones(8, 3, dtype=torch.float64)
    x[2, 1] = float(value)
    largest = {"other": torch.tensor(1.0), "key": gram_of_batch(x, KERNELS["linear"]).largest}
    if kind is None:
        room.check_all_finite(largest)
        return
    with pytest.raises(NonFiniteFeaturesError, match=kind) as caught:
        room.check_all_finite(largest)
    assert caught.value.key == "key"


@pytest.mark.parametrize("estimator", ["minibatch", "rbf", "exact", "sketch"])
def test_non_finite_features_are_named_once_a_batch(accelerated, estimator):
    data = images(12)
    # finite itself, as an image with NaN would be named in place of the layer
    data[torch.randperm(12, generator=torch.Generator().manual_seed(0))[5]] = 3e38
    options = {"kernel": "rbf"} if estimator == "rbf" else {"estimator": estimator}
    with pytest.raises(
        ValueError, match=r"non-finite features: .*layer 'stem', view '16', batch 1: check"
    ):
        call({**options, "images": data, "scales": [16]})


@pytest.fixture
def accelerated(monkeypatch):
    """The CPU takes the accelerator's path."""
    pretend(monkeypatch)
    assert exact.FiniteCheck is room.FiniteCheck


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("estimator", ["minibatch", "exact", "sketch"])
def test_a_whole_run_equals_the_cpu_path(monkeypatch, kernel, estimator):
    if (kernel, estimator) == ("rbf", "sketch"):
        return
    options = {"kernel": kernel, "estimator": estimator, "images": 20}
    want = call(options)
    pretend(monkeypatch)
    got = call(options)
    assert np.abs(want.cka - got.cka).max() < 1e-6
    assert np.abs(want.stderr - got.stderr).max() < 1e-6


class Questions(TorchDispatchMode):
    """Counts what stops an accelerator's queue: numbers asked for, copies to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        self.count += name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


class LoopOver(Exception):  # noqa: N818
    """Raised in the place of a result."""


def over(self):
    raise LoopOver


def asked_in_the_loop(estimator, layers, scales):
    """How many numbers the loop asks for."""
    made, asked = ESTIMATORS[estimator], Questions()
    with asked, pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "compute", over)
        with pytest.raises(LoopOver):
            call({"estimator": estimator, "images": 40, "layers": layers, "scales": scales})
    return asked.count


FEW, MANY = (["stem"], [16]), (["stem", "block", "head"], [8, 16])


@pytest.mark.parametrize("estimator", ["minibatch", "exact", "sketch"])
def test_the_loop_asks_nothing_between_layers(estimator, monkeypatch):
    """As many questions with three layers in two views as with one in one: those of a batch."""
    assert asked_in_the_loop(estimator, *FEW) < asked_in_the_loop(estimator, *MANY)  # the CPU
    pretend(monkeypatch)
    assert asked_in_the_loop(estimator, *FEW) == asked_in_the_loop(estimator, *MANY)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["minibatch", "exact", "sketch"])
def test_no_number_is_asked_of_a_cuda_tensor(kernel, estimator):
    """Fake CUDA tensors have no values: whatever asks for one stops, and so do mixed devices."""
    if (kernel, estimator) == ("rbf", "sketch"):
        return
    made = ESTIMATORS[estimator](10, kernel=kernel)
    with FakeTensorMode(), full_precision(torch.device("cuda")):
        for width in (40, 7000):
            for dtype in (torch.float32, torch.float16, torch.float64):
                x = torch.empty(64, width, device="cuda", dtype=dtype)
                made.update((width, dtype), x)
                if estimator == "minibatch":
                    block = made._open[width, dtype].block
                    assert (block.device.type, block.dtype) == ("cuda", torch.float64)
                else:
                    held = made._open[width, dtype]
                    parts = held if isinstance(held, tuple) else (held,)
                    assert {part.device.type for part in parts} == {"cuda"}


def test_products_of_cuda_are_not_tf32():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("high", "highest"):
            torch.set_float32_matmul_precision(setting)
            was = matmul.fp32_precision
            with full_precision(torch.device("cuda")):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == was
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("estimator", ["minibatch", "exact", "sketch"])
def test_cuda_asks_nothing_between_layers(estimator, monkeypatch):
    """As `torch.cuda.set_sync_debug_mode` sees it: the loop waits once a batch."""
    monkeypatch.setattr(ESTIMATORS[estimator], "compute", over)

    def waits(layers, batches):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with pytest.raises(LoopOver):
                    call({"estimator": estimator, "images": 8 * batches, "layers": layers,
                          "scales": [16], "batch_size": 8, "device": "cuda"})  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(one.message) for one in said)

    waits(FEW[0], 5)  # which starts CUDA
    few, many, longer = waits(FEW[0], 5), waits(MANY[0], 5), waits(MANY[0], 9)
    assert few == many
    assert longer - many == 4  # one for each batch more
