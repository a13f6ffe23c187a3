"""Features that have no CKA, or next to none: one answer, whatever their number and their dtype."""

import math

import numpy as np
import oracle
import pytest
import torch

from cka_probe import DegenerateWarning, cka, cka_loss, cka_matrix, permutation_test
from cka_probe.engine.exact import Exact
from cka_probe.engine.kernels import get_kernel
from cka_probe.engine.minibatch import Minibatch
from cka_probe.engine.tiled import TiledSums


def speckled(n):
    """A dead layer: 0.1 everywhere, but for one rounding step (n, 50)."""
    step = np.random.default_rng(0).integers(0, 2, (n, 50)).astype(np.float32)
    return np.float32(0.1) + np.float32(7.45e-9) * step


@pytest.mark.parametrize("n", [8, 31, 32, 64])
def test_constant_up_to_the_rounding_of_the_features_not_of_their_gram(n):
    x, y = speckled(n), np.random.default_rng(1).normal(size=(n, 6)).astype(np.float32)
    assert len(np.unique(x)) == 2
    for one, other in ((x, y), (x, x)):
        with pytest.warns(DegenerateWarning, match="constant"):
            assert math.isnan(cka(one, other))
    with pytest.warns(DegenerateWarning, match="constant"):  # the same numbers, and so the same
        assert math.isnan(cka(torch.tensor(x).half(), y))
    assert math.isnan(float(cka_loss(torch.tensor(x), torch.tensor(y))))
    for batch in (Minibatch(1), Exact()):
        batch.update("dead", torch.tensor(x))
        batch.update("live", torch.tensor(y))
        batch.end_batch(0)
        assert batch.compute().constant.tolist() == [True, False]
    wide = x.astype(np.float64)  # as float64 the steps are no rounding
    assert cka(wide, wide) == pytest.approx(1, abs=1e-12)


def flat(n, scales):
    """Images that all are equally unlike each other, up to their norms: HSIC_1(x, x) is 0."""
    return np.diag(np.linspace(1, scales, n))


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("n", [5, 7, 8, 9, 16, 31, 33, 64])
def test_no_similarity_even_to_itself_is_nan_by_every_way(n, scales):
    x = flat(n, scales)
    live = np.random.default_rng(0).normal(size=(n, 4))
    for dtype in (np.float64, np.float32):
        own = x.astype(dtype)
        with pytest.warns(DegenerateWarning, match="no similarity above rounding"):
            assert math.isnan(cka(own, own))
        with pytest.warns(DegenerateWarning):
            between = cka_matrix({"flat": own, "live": live}).between()
        assert np.isnan(between.loc["flat"]).all()
        assert between.loc["live", "live"] == 1
        assert math.isnan(float(cka_loss(torch.tensor(own), torch.tensor(own))))
        with pytest.warns(DegenerateWarning):
            assert all(map(math.isnan, permutation_test(own, live, n=9)))


def test_what_little_is_left_keeps_its_digits():
    rng = np.random.default_rng(0)
    x, y = (np.eye(64) + 1e-8 * rng.normal(size=(64, 64)) for _ in range(2))
    for scale in (np.ones(64), np.linspace(1, 3, 64)):
        one, other = x * scale, y * scale
        truth = oracle.cka(*(exact_centred(z) for z in (one, other)))
        assert cka(one, other) == pytest.approx(truth, rel=1e-6)
        loss = cka_loss(torch.tensor(one), torch.tensor(other))
        assert float(loss) == pytest.approx(truth, rel=1e-6)


def exact_centred(x):
    """An object whose Gram, by the oracle's definition, is U-centred in extended precision."""
    z = x.astype(np.longdouble)
    z = z - z.mean(0, keepdims=True)
    return U(z @ z.T)


class U(np.ndarray):
    """Marks a Gram that needs no kernel."""

    def __new__(cls, gram):
        n = len(gram)
        k = gram - np.diag(np.diag(gram))
        rows, total = k.sum(1), k.sum()
        k = k - (rows[:, None] + rows[None]) / (n - 2) + total / ((n - 1) * (n - 2))
        k = k - np.diag(np.diag(k))
        return k.astype(np.float64).view(cls)


@pytest.fixture(autouse=True)
def _grams_as_they_are(monkeypatch):
    """The oracle takes a Gram that was centred in extended precision as it is."""
    gram = oracle.gram
    monkeypatch.setattr(oracle, "gram", lambda x, *a, **k: np.asarray(x) if isinstance(x, U)
                        else gram(x, *a, **k))  # fmt: skip


@pytest.mark.parametrize("unbiased", [True, False])
def test_taking_row_means_off_changes_nothing_else(unbiased):
    """Song's sums of a linear Gram, with groups left out, against U-centred Grams of the rest."""
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(40, d)) * rng.gamma(1, size=(40, 1)) for d in (3, 60)]
    from cka_probe.engine.tiled import FeatureBlocks

    kernel = get_kernel("linear")
    sources = [FeatureBlocks([torch.tensor(x) for x in features], kernel)]
    for source in sources:
        sums = TiledSums(source, kernel, groups=5, unbiased=unbiased, tile_bytes=8 * 2 * 40 * 3)
        for group in (None, 0, 3):
            keep = np.ones(40, bool)
            if group is not None:
                start, stop = sums.bounds[group]
                keep[start:stop] = False
            found, _ = sums.hsic(group)
            found = found[0, 1] / math.sqrt(found[0, 0] * found[1, 1])
            grams = [oracle.gram(x)[np.ix_(keep, keep)] for x in features]
            way = oracle.hsic1 if unbiased else oracle.hsic0
            a, b = grams
            assert found == pytest.approx(
                way(a, b) / math.sqrt(way(a, a) * way(b, b)), abs=1e-10)  # fmt: skip


def test_a_kernel_of_ones_own_keeps_its_digits_too():
    def nearly_one(a, b):
        return 1 + 1e-7 * torch.tanh(a @ b.T)

    def bare(a, b):
        return torch.tanh(a @ b.T)

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(30, 5)) for _ in range(2))
    assert cka(x, y, kernel=nearly_one) == pytest.approx(cka(x, y, kernel=bare), rel=1e-6)
    for unbiased in (True, False):
        loss = cka_loss(torch.tensor(x), torch.tensor(y), kernel=bare, unbiased=unbiased)
        assert float(loss) == pytest.approx(cka(x, y, kernel=bare, unbiased=unbiased), rel=1e-9)


def test_a_kernel_of_products_that_is_no_linear_one():
    from cka_probe.engine.kernels import Kernel
    from cka_probe.engine.products import product

    def finished(block, sigma):
        return (block + 1e9) ** 2

    mine = Kernel("poly", product, finished, quadratic=False)
    x, y = (np.random.default_rng(k).normal(size=(30, 5)) for k in (0, 1))
    same = cka(x, y, kernel=lambda a, b: (a @ b.T + 1e9) ** 2)
    assert cka(x, y, kernel=mine) == pytest.approx(same, rel=1e-3)


def test_a_loss_on_a_kernel_of_ones_own_has_a_gradient_and_is_told_by_name():
    def cosine(a, b):
        return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T

    x, y = (torch.randn(8, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: cka_loss(a, b, kernel=cosine), (x, y))
    with pytest.raises(ValueError, match="kernel failed: 'broken'"):
        cka_loss(x, y, kernel=broken)


def broken(a, b):
    raise RuntimeError("no")
