import numpy as np
import pytest
import torch

from cka_probe.kernels import (
    KERNELS,
    SMALL_N,
    Kernel,
    NonFiniteFeaturesError,
    batch_block,
    centre,
    centre_full,
    get_kernel,
    median_bandwidth,
    register_kernel,
)


@pytest.mark.parametrize("take", [centre, centre_full])
@pytest.mark.parametrize("n", [8, 100])
def test_constant_features_are_seen_in_spite_of_rounding(take, n):
    for value in (0.1, 1e4 / 3, -7e-9, 0.0):
        assert take(torch.full((n, 33), value)).constant
    almost = torch.full((n, 33), 0.1)
    almost[3, 5] += 1e-3
    assert not take(almost).constant


@pytest.mark.parametrize("take", [centre, centre_full])
@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_non_finite_features_raise_and_say_which(take, bad, word):
    x = torch.randn(40, 10)
    x[7, 3] = bad
    with pytest.raises(NonFiniteFeaturesError, match=f"{word} in 1 of 400"):
        take(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e15, 1e30])
def test_centring_is_right_at_any_scale(scale):
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * scale
    centred = centre(x)
    expected = x.double() - x.double().mean(0)
    error = (centred.x.double() * centred.scale - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


def test_mean_over_chunks_is_the_mean():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    out = centre_full(x)
    expected = x.double() - x.double().mean(0)
    assert (out.x.double() * out.scale - expected).abs().max() < 1e-3
    assert (out.x.double().mean(0) * out.scale).abs().max() < 1e-3


def test_median_bandwidth_is_the_median_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(9, 4))
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    expected = 0.5 * np.sqrt(np.median(d2[np.triu_indices(9, 1)]))
    assert median_bandwidth([torch.as_tensor(d2)], 0.5) == pytest.approx(expected, rel=1e-12)


def test_autocast_and_tf32_do_not_reach_the_gram():
    from cka_probe.estimators import Minibatch

    x, y = torch.randn(2, 64, 500, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        estimator = Minibatch(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            estimator.put("x", x)
            estimator.put("y", y)
            estimator.close_batch(0)
        results.append(estimator.result().cka[0, 1])
    assert results[0] == results[1]


def test_a_callable_is_a_kernel():
    from cka_probe import cka

    def cubic(a, b):
        return (a @ b.T) ** 3

    x, y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    import oracle

    k, g = ((z @ z.T).numpy() ** 3 for z in (xc, yc))
    expected = oracle.hsic1(k, g) / np.sqrt(oracle.hsic1(k, k) * oracle.hsic1(g, g))
    assert cka(x, y, kernel=cubic) == pytest.approx(expected, abs=1e-9)


def test_registry():
    with pytest.raises(ValueError, match="unknown kernel: 'cosine': known kernels are linear, rbf"):
        get_kernel("cosine")
    with pytest.raises(ValueError, match="taken: 'rbf'"):
        register_kernel(KERNELS["rbf"])
    mine = Kernel("mine", KERNELS["linear"].base, KERNELS["linear"].finish)
    try:
        register_kernel(mine)
        assert get_kernel("mine") is mine
    finally:
        KERNELS.pop("mine")


@pytest.mark.parametrize("name", ["linear", "rbf"])
@pytest.mark.parametrize("shape", [(8, 5), (16, 70_000), (64, 8192 * 2 + 3), (64, 300)])
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1.0, 1e4), (1e-12, 1e-9), (1e17, 0.0)])
def test_a_block_made_tile_by_tile(name, shape, scale, mean):
    """Some of these are one tile, some several, some too small or large for float32 products."""
    kernel = get_kernel(name)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale + mean
    block, eps = batch_block(x, kernel)
    wide = x.double()
    wide = wide - wide.mean(0)
    truth = wide @ wide.T
    if name == "rbf":
        own = truth.diagonal()
        truth = own[:, None] + own[None] - 2 * truth
    else:  # a mean that is off by a constant is removed later: compare what survives centring
        block, truth = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (block, truth))
    assert eps == torch.finfo(torch.float64 if shape[0] < SMALL_N else torch.float32).eps
    assert (block - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("at", [0, 69_999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_in_any_tile_is_found(at, value):
    x = torch.randn(64, 70_000)
    x[3, at] = value
    with pytest.raises(NonFiniteFeaturesError, match="1 of 4480000 values"):
        batch_block(x, get_kernel("linear"))


@pytest.mark.parametrize("x", [torch.zeros(64, 70_000), torch.full((64, 70_000), 0.1)])
def test_constant_tiles(x):
    block, eps = batch_block(x, get_kernel("linear"))
    assert (eps, block.abs().sum()) == (0.0, 0.0)


def test_a_callable_of_the_user_gets_features_in_their_own_scale():
    x = torch.randn(40, 9) * 1e-12
    mine = get_kernel(lambda a, b: (a @ b.T).abs())
    wide = x.double() - x.double().mean(0)
    truth = (wide @ wide.T).abs()
    assert (batch_block(x, mine)[0] - truth).abs().max() <= 1e-5 * truth.max()
