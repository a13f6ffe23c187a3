"""The engine against the float64 oracle, over sizes, widths, counts, offsets, scales and dtypes."""

import numpy as np
import oracle
import pytest
import torch

from cka_probe.engine.exact import Exact
from cka_probe.engine.minibatch import Minibatch

LINEAR, RBF = 1e-6, 1e-5


def draw(n, d, m, *, seed=0, mean=0.0, scale=1.0, dtype=torch.float32):
    """m entries (n, d) that share four latent directions, so that CKA is neither 0 nor 1."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 4, generator=g)
    out = []
    for _ in range(m):
        x = z @ torch.randn(4, d, generator=g) * 0.5 + torch.randn(n, d, generator=g)
        x = (x + mean * torch.randn(d, generator=g).sign()) * scale
        out.append(x.to(dtype))
    return out


def exact(features, **options):
    estimator = Exact(bandwidth_images=None, **options)
    for i, x in enumerate(features):
        estimator.update(i, x)
    estimator.end_batch(0)
    return estimator.compute().cka


def minibatch(features, size, **options):
    n = len(features[0])
    starts = list(range(0, n - n % size or n, size))
    stops = [*starts[1:], n]
    estimator = Minibatch(len(starts), **options)
    for b, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for i, x in enumerate(features):
            estimator.update(i, x[start:stop])
        estimator.end_batch(b)
    entries = [
        [x[a:b].double().numpy() for a, b in zip(starts, stops, strict=True)] for x in features
    ]
    return estimator.compute().cka, entries


def wide(features):
    return [x.double().numpy() for x in features]


SHAPES = [
    (16, 3, 1), (4, 1, 5), (4, 20000, 5), (5, 3, 20), (7, 500, 5), (31, 17, 5), (32, 17, 5),
    (33, 20000, 2), (64, 1, 5), (64, 2000, 20), (200, 300, 50), (500, 10, 5),
    (1024, 64, 5), (2048, 256, 2),
]  # fmt: skip


@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_exact_linear_equals_oracle(n, d, m, mean, threads):
    features = draw(n, d, m, mean=mean)
    assert np.abs(exact(features) - oracle.cka_matrix(wide(features))).max() <= LINEAR


@pytest.mark.parametrize(("n", "d", "m"), [s for s in SHAPES if s[0] * s[1] < 100_000])
def test_exact_rbf_equals_oracle(n, d, m):
    features = draw(n, d, m, mean=3.0)
    expected = oracle.cka_matrix(wide(features), "rbf")
    assert np.abs(exact(features, kernel="rbf") - expected).max() <= RBF


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "m"), [(4096, 20000, 2), (4096, 64, 5), (4096, 1, 2), (1024, 64, 50)]
)
def test_exact_equals_oracle_on_large_sets(n, d, m):
    features = draw(n, d, m, mean=1e4)
    assert np.abs(exact(features) - oracle.cka_matrix(wide(features))).max() <= LINEAR


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e8, 1e20])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_scale_and_offset(kernel, scale, mean):
    features = draw(96, 40, 3, mean=mean, scale=scale)
    limit = LINEAR if kernel == "linear" else RBF
    assert (
        np.abs(exact(features, kernel=kernel) - oracle.cka_matrix(wide(features), kernel)).max()
        <= limit
    )
    ours, entries = minibatch(features, 24)
    assert np.abs(ours - oracle.cka_minibatch_matrix(entries)).max() <= LINEAR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_other_dtypes_on_their_rounded_values(dtype, mean):
    features = draw(80, 300, 3, mean=mean, dtype=dtype)
    assert np.abs(exact(features) - oracle.cka_matrix(wide(features))).max() <= LINEAR
    assert (
        np.abs(exact(features, kernel="rbf") - oracle.cka_matrix(wide(features), "rbf")).max()
        <= RBF
    )


@pytest.mark.parametrize(("n", "size"), [(64, 64), (64, 8), (66, 16), (71, 16), (130, 64), (40, 4)])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_minibatch_equals_oracle(n, size, kernel, threads):
    features = draw(n, 50, 4, mean=10.0)
    estimator_cka, entries = minibatch(features, size, kernel=kernel)
    if kernel == "linear":
        expected = oracle.cka_minibatch_matrix(entries)
        assert np.abs(estimator_cka - expected).max() <= LINEAR
        return
    distances = [
        np.concatenate([pairs(batch) for batch in entry]) for entry in entries
    ]  # within-batch median of the first 256 images, here all of them
    sums = np.zeros((4, 4))
    for b in range(len(entries[0])):
        grams = []
        for entry, d2 in zip(entries, distances, strict=True):
            x = entry[b]
            sq = ((x[:, None] - x[None]) ** 2).sum(-1)
            grams.append(oracle.shifted(np.exp(-sq / (2 * np.median(d2)))))
        sums += len(grams[0]) * np.array([[oracle.hsic1(k, q) for q in grams] for k in grams])
    own = np.sqrt(np.diag(sums))
    assert np.abs(estimator_cka - sums / own / own[:, None]).max() <= RBF


def pairs(x):
    """Squared distances of the pairs i < j."""
    return ((x[:, None] - x[None]) ** 2).sum(-1)[np.triu_indices(len(x), k=1)]


@pytest.mark.parametrize("unbiased", [True, False])
def test_biased_and_unbiased(unbiased):
    features = draw(60, 2000, 3)
    expected = oracle.cka_matrix(wide(features), unbiased=unbiased)
    assert np.abs(exact(features, unbiased=unbiased) - expected).max() <= LINEAR


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_exact_does_not_depend_on_batching(kernel):
    features = draw(203, 70, 3, mean=1e4)
    whole = Exact(kernel=kernel)
    parts = Exact(kernel=kernel)
    for i, x in enumerate(features):
        whole.update(i, x)
    whole.end_batch(0)
    bounds = [0, 4, 50, 51 + 60, 203]
    for b in reversed(range(4)):  # and not on the order in which batches arrive
        for i, x in enumerate(features):
            parts.update(i, x[bounds[b] : bounds[b + 1]])
        parts.end_batch(b)
    one, other = whole.compute(), parts.compute()
    assert np.abs(one.cka - other.cka).max() <= 1e-9
    assert np.abs(one.stderr - other.stderr).max() <= 1e-9


def test_negative_values_are_kept():
    g = torch.Generator().manual_seed(3)
    values = [
        exact([torch.randn(12, 40, generator=g), torch.randn(12, 40, generator=g)])[0, 1]
        for _ in range(40)
    ]
    assert min(values) < -0.01
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
