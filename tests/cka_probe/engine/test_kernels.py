import numpy as np
import oracle
import pytest
import torch
from torch import nn

from cka_probe import DegenerateWarning, cka, cka_loss, cka_matrix, permutation_test, probe
from cka_probe.engine import products
from cka_probe.engine.batch_gram import gram_of_batch
from cka_probe.engine.centring import NonFiniteFeaturesError, centre_full
from cka_probe.engine.hsic import centre_gram
from cka_probe.engine.kernels import get_kernel, median_bandwidth


@pytest.mark.parametrize("n", [8, 100])
def test_constant_features_are_seen_in_spite_of_rounding(n):
    for value in (0.1, 1e4 / 3, -7e-9, 0.0):
        assert centre_full(torch.full((n, 33), value)).constant
    almost = torch.full((n, 33), 0.1)
    almost[3, 5] += 1e-3
    assert not centre_full(almost).constant


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_non_finite_features_raise_and_say_which(bad, word):
    x = torch.randn(40, 10)
    x[7, 3] = bad
    with pytest.raises(NonFiniteFeaturesError, match=f"{word} in 1 of 400"):
        centre_full(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e15, 1e30])
def test_centring_is_right_at_any_scale(scale):
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * scale
    centred = centre_full(x)
    expected = x.double() - x.double().mean(0)
    error = (centred.x.double() * centred.scale - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


def test_mean_over_chunks_is_the_mean():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    out = centre_full(x)
    expected = x.double() - x.double().mean(0)
    assert (out.x.double() * out.scale - expected).abs().max() < 1e-3
    assert (out.x.double().mean(0) * out.scale).abs().max() < 1e-3


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(64, 5000), (65, 40000), (33, 9), (130, 70000)])
def test_batch_gram_is_the_gram_of_centred_features_by_either_library(onednn, shape, monkeypatch):
    if not onednn:
        monkeypatch.setattr(products, "_onednn", lambda: None)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 3
    centred = x.double() - x.double().mean(0)
    block = gram_of_batch(x, get_kernel("linear")).block
    expected = centred @ centred.T  # up to an offset a column, which centring the Gram takes away
    assert (centre_gram(block) - expected).abs().max() < 3e-6 * expected.trace() / len(x)
    assert (block - block.T).abs().max() < 1e-6 * block.abs().max()


def test_the_product_keeps_its_gradient_and_its_dtype():
    a, b = torch.randn(64, 2000, requires_grad=True), torch.randn(64, 2000)
    assert products.matmul_t(a, b).requires_grad
    with torch.no_grad():
        assert products.matmul_t(a.double(), b.double()).dtype == torch.float64
        assert torch.allclose(products.matmul_t(a, b), a @ b.T, atol=1e-3)


def test_the_upper_half_is_enough_for_the_median():
    x = torch.randn(37, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d2 = torch.cdist(x, x).square()
    parts = [d2[top : top + 10, top:] for top in range(0, 37, 10)]
    assert median_bandwidth(parts, 1.0, 0) == median_bandwidth([d2], 1.0, 0)


def test_median_bandwidth_is_the_median_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(9, 4))
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    expected = 0.5 * np.sqrt(np.median(d2[np.triu_indices(9, 1)]))
    assert median_bandwidth([torch.as_tensor(d2)], 0.5, 0) == pytest.approx(expected, rel=1e-12)


def test_autocast_and_tf32_do_not_reach_the_gram():
    from cka_probe.engine.minibatch import Minibatch

    x, y = torch.randn(2, 64, 500, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        estimator = Minibatch(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            estimator.update("x", x)
            estimator.update("y", y)
            estimator.end_batch(0)
        results.append(estimator.compute().cka[0, 1])
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


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown kernel: 'cosine': known kernels are linear, rbf"):
        get_kernel("cosine")


@pytest.mark.parametrize("name", ["linear", "rbf"])
@pytest.mark.parametrize("shape", [(8, 5), (16, 70_000), (64, 8192 * 2 + 3), (64, 300)])
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1.0, 1e4), (1e-12, 1e-9), (1e17, 0.0)])
def test_a_block_made_tile_by_tile(name, shape, scale, mean):
    """Some of these are one tile, some several, some too small or large for float32 products."""
    kernel = get_kernel(name)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale + mean
    block, eps, _ = gram_of_batch(x, kernel)
    wide = x.double()
    wide = wide - wide.mean(0)
    truth = wide @ wide.T
    if name == "rbf":
        own = truth.diagonal()
        truth = own[:, None] + own[None] - 2 * truth
    else:  # a mean that is off by a constant is removed later: compare what survives centring
        block, truth = (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (block, truth))
    assert eps == torch.finfo(torch.float32).eps  # of the features, whatever the product is in
    assert (block - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("at", [0, 69_999])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_in_any_tile_is_found(at, value):
    x = torch.randn(64, 70_000)
    x[3, at] = value
    with pytest.raises(NonFiniteFeaturesError, match="1 of 4480000 values"):
        gram_of_batch(x, get_kernel("linear"))


@pytest.mark.parametrize("x", [torch.zeros(64, 70_000), torch.full((64, 70_000), 0.1)])
def test_constant_tiles(x):
    block, eps, _ = gram_of_batch(x, get_kernel("linear"))
    assert (eps, block.abs().sum()) == (0.0, 0.0)


def test_a_callable_of_the_user_gets_features_in_their_own_scale():
    x = torch.randn(40, 9) * 1e-12
    mine = get_kernel(lambda a, b: (a @ b.T).abs())
    wide = x.double() - x.double().mean(0)
    truth = (wide @ wide.T).abs()
    assert (gram_of_batch(x, mine).block - truth).abs().max() <= 1e-5 * truth.max()


def clusters(n, share, dtype=torch.float32, near=0.0, seed=0):
    """Features of which a share of the images coincide, up to `near`, in a random order."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, 40, generator=g, dtype=torch.float64)
    same = round(share * n)
    x[:same] = x[0] + near * torch.randn(same, 40, generator=g, dtype=torch.float64)
    return x[torch.randperm(n, generator=g)].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("n", [16, 40, 300])  # in float64, in float32, in several tiles
def test_a_median_distance_of_zero_up_to_rounding_is_no_bandwidth(n, dtype):
    same, other = clusters(n, 0.8, dtype), clusters(n, 0.3, dtype, seed=1)
    words = r"^more than half of the image pairs are equal up to rounding, so that RBF has no"
    for order in (slice(None), torch.randperm(n, generator=torch.Generator().manual_seed(2))):
        for pair in ((same[order], other[order]), (other[order], same[order])):
            with pytest.warns(DegenerateWarning, match=words):
                assert np.isnan(cka(*pair, kernel="rbf"))
            with pytest.warns(DegenerateWarning, match=words):
                assert np.isnan(permutation_test(*pair, 9, kernel="rbf")).all()
            assert torch.isnan(cka_loss(*pair, kernel="rbf"))
        with pytest.warns(DegenerateWarning, match=words):
            report = cka_matrix({"same": same[order], "other": other[order]}, kernel="rbf")
        assert np.isnan(report.cka).tolist() == [[True, True], [True, False]]
    assert cka(same, other) == pytest.approx(oracle.cka(same.numpy(), other.numpy()), abs=1e-6)


@pytest.mark.parametrize("estimator", ["minibatch", "exact"])
def test_a_probe_says_that_a_layer_has_no_bandwidth(estimator):
    images = torch.rand(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images[:40] = images[0]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    options = {"layers": ["0", "2"], "batch_size": 24, "progress": False, "estimator": estimator}
    with pytest.warns(DegenerateWarning, match="^more than half of the image pairs") as caught:
        report = probe(net, images, None, kernel="rbf", **options)
    assert not any("constant" in str(one.message) for one in caught)
    assert list(report.meta["nan"].values()) == [["layer '0' in view 'native'",
                                                  "layer '2' in view 'native'"]]  # fmt: skip
    assert np.isnan(report.cka).all()


@pytest.mark.parametrize("near", [1e-2, 1.0])
def test_near_copies_keep_their_bandwidth(near):
    """A median of a thousandth of the mean, say, is a bandwidth: it is what the rule says."""
    x, y = clusters(60, 0.8, near=near), clusters(60, 0.3, seed=1)
    expected = oracle.cka(x.numpy(), y.numpy(), "rbf")
    assert cka(x, y, kernel="rbf") == pytest.approx(expected, abs=2e-3 if near < 1 else 1e-6)
    assert float(cka_loss(x, y, kernel="rbf")) == pytest.approx(expected, abs=2e-3)


def laplacian(a, b):
    return torch.exp(-torch.cdist(a, b) / 6)


def cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


@pytest.mark.parametrize("n", [16, 64, 200])
@pytest.mark.parametrize("kernel", [laplacian, cubic])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_callable_kernels_get_float64_whatever_n(n, kernel, offset):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 30, generator=g) + offset
    y = x[:, :20] + 0.5 * torch.randn(n, 20, generator=g)
    grams = [kernel(z - z.mean(0), z - z.mean(0)).numpy() for z in (x.double(), y.double())]
    k, left = (oracle.shifted(gram) for gram in grams)
    expected = oracle.hsic1(k, left) / np.sqrt(oracle.hsic1(k, k) * oracle.hsic1(left, left))
    assert cka(x, y, kernel=kernel) == pytest.approx(expected, abs=1e-6)
    assert float(cka_loss(x, y, kernel=kernel)) == pytest.approx(expected, abs=1e-6)
    seen = set()

    def watching(a, b):
        seen.update((a.dtype, b.dtype))
        return kernel(a, b)

    gram_of_batch(x, get_kernel(watching))
    assert seen == {torch.float64}


@pytest.mark.parametrize("n", [16, 28, 64, 200])
def test_a_kernel_of_distances_keeps_its_digits_among_near_images(n):
    """Images a thousandth of the features' norm apart: float32 distances from a Gram are noise."""

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b) / 0.05)

    def exactly(x):
        apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return oracle.shifted(np.exp(-apart.numpy() / 0.05))

    g = torch.Generator().manual_seed(0)
    centres, kind = 10 * torch.randn(4, 20, generator=g), torch.arange(n) % 4
    near = torch.randn(n, 20, generator=g)
    x = centres[kind] + 0.01 * near
    y = centres[kind.flip(0)] + 0.01 * (near + torch.randn(n, 20, generator=g))
    k, left = exactly(x.double()), exactly(y.double())
    expected = oracle.hsic1(k, left) / np.sqrt(oracle.hsic1(k, k) * oracle.hsic1(left, left))
    assert cka(x, y, kernel=kernel) == pytest.approx(expected, abs=1e-6)
    assert float(cka_loss(x, y, kernel=kernel)) == pytest.approx(expected, abs=1e-6)
