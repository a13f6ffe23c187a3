import numpy as np
import oracle
import pytest
import torch

from cka_probe import cka_loss
from cka_probe.engine.hsic import (
    hsic_from_sums,
    hsic_pairs,
    jackknife,
    normalise,
    u_centre,
)


def grams(m, n, d=6, seed=0):
    x = torch.randn(m, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


def test_u_centred_rows_sum_to_zero():
    k = u_centre(grams(3, 9))
    assert k.sum(-1).abs().max() < 1e-12
    assert torch.diagonal(k, dim1=-2, dim2=-1).abs().max() == 0


@pytest.mark.parametrize("n", [4, 5, 40])
def test_all_pairs_in_one_product_equal_the_formulas(n):
    k = grams(5, n)
    for unbiased, slow in ((True, oracle.hsic1), (False, oracle.hsic0)):
        expected = [[slow(a, b) for b in k.numpy()] for a in k.numpy()]
        assert np.allclose(hsic_pairs(k, unbiased=unbiased).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_three_sums_equal_the_product(unbiased):
    k = grams(4, 20)
    kept = k * (1 - torch.eye(20)) if unbiased else k
    v = kept.flatten(1)
    h = hsic_from_sums(v @ v.T, kept.sum(-1), 20, unbiased=unbiased)
    assert torch.allclose(h, hsic_pairs(k, unbiased=unbiased), rtol=1e-10)


def test_fewer_than_four_images_raise():
    with pytest.raises(ValueError, match="too few images: 3"):
        hsic_pairs(grams(2, 3))


def test_normalise_has_no_epsilon_and_marks_what_vanishes():
    h = np.array([[4e-30, 2e-30, 0], [2e-30, 4e-30, 0], [0, 0, 1e-12]])
    cka = normalise(h, np.array([0.0, 0.0, 1e-11]))
    assert cka[0, 1] == pytest.approx(0.5)
    assert cka[0, 0] == 1.0
    assert np.isnan(cka[2]).all()


def test_jackknife_of_equal_groups_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(7, 3))
    theta = left.mean(0) + 0.01
    expected = np.sqrt(6 / 7 * ((left - left.mean(0)) ** 2).sum(0))
    assert np.allclose(jackknife(theta, left, np.full(7, 12.0)), expected)


def test_jackknife_of_unequal_groups_is_busings():
    rng = np.random.default_rng(1)
    x, sizes = rng.normal(size=60), [5, 20, 10, 25]
    groups = np.split(np.arange(60), np.cumsum(sizes)[:-1])

    def ratio(parts):
        i = np.concatenate(parts)
        return float((x[i] ** 2).mean() / np.abs(x[i]).mean())

    left = np.array([ratio(groups[:g] + groups[g + 1 :]) for g in range(4)])
    ours = jackknife(np.array(ratio(groups)), left, np.array(sizes, dtype=float))
    assert float(ours) == pytest.approx(oracle.jackknife_se(ratio, groups), rel=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_loss_is_cka_and_has_its_gradient(kernel, unbiased):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    value = cka_loss(x, y, kernel=kernel, unbiased=unbiased)
    expected = oracle.cka(x.detach().numpy(), y.detach().numpy(), kernel, unbiased)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-10)
    assert torch.autograd.gradcheck(
        lambda a, b: cka_loss(a, b, kernel=kernel, unbiased=unbiased), (x, y)
    )


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_loss_trains_in_low_precision(kernel):
    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.eye(20, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = 1 - cka_loss(x.relu() @ w, x, kernel=kernel)
    loss.backward()
    assert torch.isfinite(w.grad).all()
    assert w.grad.abs().max() > 0


def test_cka_loss_refuses_and_degenerates_as_cka():
    x = torch.randn(8, 3)
    assert torch.isnan(cka_loss(torch.full((8, 3), 0.1), x))
    assert torch.isnan(cka_loss(torch.eye(8), x))
    with pytest.raises(ValueError, match="do not pair"):
        cka_loss(x, x[:7])
    with pytest.raises(ValueError, match="too few images: 3"):
        cka_loss(x[:3], x[:3])
    with pytest.raises(ValueError, match="unknown kernel"):
        cka_loss(x, x, kernel="poly")
