"""The constraint and distillation against slow float64 sums, and the laws that they obey."""

import numpy as np
import pytest
import torch

from cka_probe import cka
from msun.training.losses import constraint, constraint_pairs, ensemble_distillation


def maps(*sides, n=5, c=3, grid=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        s: torch.randn(n, c, grid, grid, generator=generator, requires_grad=True) for s in sides
    }


def test_raw_is_the_mean_squared_difference_of_every_pair():
    zs = maps(8, 16, 32)
    parts = constraint_pairs(zs, "raw")
    assert list(parts) == [(8, 16), (8, 32), (16, 32)]
    for (a, b), value in parts.items():
        one, two = (zs[s].detach().double().numpy() for s in (a, b))
        assert value.item() == pytest.approx(((one - two) ** 2).mean(), rel=1e-6)
    total = constraint(zs, "raw")
    assert total.item() == pytest.approx(sum(v.item() for v in parts.values()), rel=1e-6)
    total.backward()
    assert all(z.grad.abs().sum() > 0 for z in zs.values()), "no gradient is stopped"


def test_raw_below_tau_is_zero_and_pulls_no_more():
    z = torch.randn(4, 2, 3, 3)
    zs = {8: z.clone().requires_grad_(), 16: (z + 0.05).requires_grad_()}
    total = constraint(zs, "raw", tau=0.01)  # the difference is .0025
    assert total.item() == 0
    total.backward()
    assert zs[8].grad.abs().sum() == 0
    assert constraint(zs, "raw", tau=0.002).item() == pytest.approx(0.0025, rel=1e-3)
    assert constraint({8: zs[8], 16: zs[16] + 0.02}, "raw").item() == 0, "0.01 is the default"
    assert constraint({8: zs[8], 16: zs[16] + 0.2}, "raw").item() > 0.01


def test_normalised_has_one_teacher_and_ignores_the_size_of_features():
    zs = maps(8, 16, 32)
    parts = constraint_pairs(zs, "normalised")
    assert list(parts) == [(8, 32), (16, 32)]
    for (a, b), value in parts.items():
        one, two = (zs[s].detach().double().flatten(1).numpy() for s in (a, b))
        cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
        assert value.item() == pytest.approx((2 - 2 * cosine).mean(), rel=1e-5)
    constraint(zs, "normalised").backward()
    assert zs[32].grad is None or zs[32].grad.abs().sum() == 0, "the teacher learns nothing"
    assert zs[8].grad.abs().sum() > 0
    smaller = {s: z.detach() * (0.01 if s == 8 else 1) for s, z in zs.items()}
    assert constraint(smaller).item() == pytest.approx(constraint(zs).item(), rel=1e-5)
    assert constraint(smaller, "raw", tau=0) < constraint(zs, "raw", tau=0), "raw is fooled"


def test_cka_is_one_minus_that_of_the_other_package():
    zs = maps(8, 16, 32, n=9)
    for (a, b), value in constraint_pairs(zs, "cka").items():
        one, two = (zs[s].detach().flatten(1) for s in (a, b))
        assert value.item() == pytest.approx(1 - cka(one, two), abs=1e-5)
    constraint(zs, "cka").backward()
    assert zs[32].grad is None or zs[32].grad.abs().sum() == 0
    turned = zs[32].detach().flip(1) * 3 + 1  # channels exchanged: a rotation
    same = constraint({8: turned, 32: zs[32]}, "cka").item()
    assert same == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["raw", "normalised", "cka"])
def test_equal_features_cost_nothing_and_one_scale_has_no_constraint(kind):
    z = torch.randn(6, 3, 4, 4)
    assert constraint({8: z, 16: z.clone()}, kind).item() == pytest.approx(0, abs=1e-6)
    assert constraint_pairs({16: z}, kind) == {}
    assert constraint({16: z}, kind).item() == 0


def test_none_is_none():
    assert constraint_pairs(maps(8, 16), "none") == {}
    assert constraint(maps(8, 16), "none").item() == 0


@pytest.mark.parametrize("kind", ["raw", "normalised", "cka"])
def test_of_two_grids_the_larger_is_averaged_down(kind):
    coarse = torch.randn(6, 3, 4, 4)
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="nearest")
    zs = {8: coarse, 32: smooth}
    small = torch.nn.functional.interpolate(smooth, (4, 4), mode="bilinear", antialias=True)
    got, want = constraint(zs, kind, tau=0), constraint({8: coarse, 32: small}, kind, tau=0)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    other = constraint({8: smooth, 32: coarse}, kind, tau=0)
    assert other.item() == pytest.approx(want.item(), rel=1e-4)
    across = {8: torch.randn(6, 3, 4, 8), 32: torch.randn(6, 3, 8, 4)}
    assert constraint(across, kind, tau=0).isfinite()


@pytest.mark.parametrize("kind", ["raw", "normalised", "cka"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(kind, dtype):
    zs = {s: (z.detach() * 100).to(dtype) for s, z in maps(8, 16, grid=16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = constraint(zs, kind)
    want = constraint({s: z.double() for s, z in zs.items()}, kind)
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["raw", "normalised", "cka"])
def test_nan_stays_nan(kind):
    zs = {s: z.detach().clone() for s, z in maps(8, 16).items()}
    zs[8][0, 0, 0, 0] = float("nan")
    assert constraint(zs, kind, tau=0.5).isnan()


def test_what_is_refused():
    with pytest.raises(ValueError, match="unknown constraint: 'rough': choose none, raw"):
        constraint(maps(8), "rough")
    with pytest.raises(ValueError, match="features do not pair: "):
        constraint({8: torch.zeros(4, 3, 2, 2), 16: torch.zeros(4, 5, 2, 2)}, "raw")
    with pytest.raises(ValueError, match="features do not pair: "):
        constraint({8: torch.zeros(4, 3), 16: torch.zeros(4, 3)}, "raw")


def test_distillation_is_the_divergence_from_the_mean_of_the_logits():
    generator = torch.Generator().manual_seed(1)
    logits = {s: torch.randn(7, 4, generator=generator, requires_grad=True) for s in (8, 16, 32)}
    got = ensemble_distillation(logits)
    plain = {s: x.detach().double().numpy() for s, x in logits.items()}
    mean = sum(plain.values()) / 3

    def softmax(x):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p = softmax(mean)
    for side, x in plain.items():
        want = (p * (np.log(p) - np.log(softmax(x)))).sum(1).mean()
        assert got[side].item() == pytest.approx(want, rel=1e-5)
    got[8].backward()
    assert logits[8].grad.abs().sum() > 0
    assert logits[16].grad is None, "the teacher learns nothing"
    want = (torch.softmax(logits[8], 1) - torch.tensor(p)).detach() / 7
    np.testing.assert_allclose(logits[8].grad.numpy(), want.numpy(), atol=1e-6)


def test_distillation_of_equal_logits_or_one_scale():
    x = torch.randn(3, 4)
    assert ensemble_distillation({8: x}) == {}
    assert ensemble_distillation({8: x, 16: x})[8].item() == pytest.approx(0, abs=1e-6)
