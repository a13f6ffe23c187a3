import warnings

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from scipy import sparse

from cka_probe import DegenerateWarning, cka, cka_loss, cka_matrix, permutation_test


def pair(n=60, p=12, q=9, shared=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, shared, generator=g)
    noise = [torch.randn(n, d, generator=g) for d in (p, q)]
    return [z @ torch.randn(shared, d, generator=g) + e for d, e in zip((p, q), noise, strict=True)]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_equals_the_oracle(kernel, unbiased):
    x, y = pair()
    expected = oracle.cka(x.double().numpy(), y.double().numpy(), kernel, unbiased)
    assert cka(x, y, kernel=kernel, unbiased=unbiased) == pytest.approx(expected, abs=1e-7)


def test_rbf_bandwidth_is_a_fraction_of_the_median():
    x, y = (z.double().numpy() for z in pair())
    for fraction in (0.3, 2.0):
        expected = oracle.cka(x, y, "rbf", True, fraction)
        assert cka(x, y, kernel="rbf", bandwidth=fraction) == pytest.approx(expected, abs=1e-9)


def test_invariances():
    x, y = (z.double() for z in pair())
    value = cka(x, y)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    order = torch.randperm(60)
    for other in (x @ rotation, 1e-6 * x, x + 100 * torch.randn(12), -x):
        assert cka(other, y) == pytest.approx(value, abs=1e-9)
        assert cka(other.numpy(), y.numpy(), kernel="rbf") == pytest.approx(
            cka(x, y, kernel="rbf"), abs=1e-9
        )
    assert cka(x[order], y[order]) == pytest.approx(value, abs=1e-9)
    assert cka(y, x) == pytest.approx(value, abs=1e-12)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    x, y = (z.to(dtype) for z in pair())
    expected = oracle.cka(x.double().numpy(), y.double().numpy())
    assert cka(x, y) == pytest.approx(expected, abs=1e-6)


def test_constant_input_is_nan_with_its_name():
    x, y = pair()
    for constant in (torch.full((60, 5), 0.1), torch.zeros(60, 5)):
        with pytest.warns(DegenerateWarning, match="constant features: 'x'"):
            assert np.isnan(cka(constant, y))
    with pytest.warns(DegenerateWarning, match="no similarity above rounding.*'y'"):
        assert np.isnan(cka(x, torch.eye(60)))


def test_other_degenerate_input():
    x, y = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # four images have a value, and no error bar to warn of
        assert np.isfinite(cka(x[:4], y[:4]))
    for n in (0, 1, 3):
        with pytest.raises(ValueError, match=f"too few images: {n}"):
            cka(x[:n], y[:n])
    with pytest.raises(ValueError, match="unequal numbers of images: 'x' has 60, 'y' has 59"):
        cka(x, y[:59])
    for bad in (float("nan"), float("inf")):
        z = y.clone()
        z[3, 2] = bad
        with pytest.raises(ValueError, match="non-finite features: 'y'"):
            cka(x, z)
    with pytest.raises(ValueError, match=r"not \(n, d\): 'x' has shape \(60, 3, 4\)"):
        cka(x.view(60, 3, 4), y)
    with pytest.raises(ValueError, match="unknown kernel"):
        cka(x, y, kernel="cosine")


def test_matrix_is_labelled_and_has_error_bars():
    x, y = pair(100)
    report = cka_matrix({"first": x, "second": y.numpy(), "third": x + y[:, :1]})
    table = report.between()
    assert list(table.index) == list(table.columns) == ["first", "second", "third"]
    assert table.loc["first", "second"] == pytest.approx(cka(x, y), abs=1e-9)
    low, high = report.interval()
    assert low[0, 1] < report.cka[0, 1] < high[0, 1]
    assert report.meta["groups"] == 20
    assert (np.diag(report.cka) == 1).all()


def test_matrix_does_not_fear_sorted_images():
    """Sorted by class: contiguous groups would be the classes, and the error bar absurd."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, 6, generator=g)
    x = centres.repeat_interleave(30, 0) + torch.randn(300, 6, generator=g)
    y = x + torch.randn(300, 6, generator=g)
    shuffled = torch.randperm(300, generator=g)
    sorted_se = cka_matrix({"x": x, "y": y}).stderr[0, 1]
    shuffled_se = cka_matrix({"x": x[shuffled], "y": y[shuffled]}).stderr[0, 1]
    assert 0.5 < sorted_se / shuffled_se < 2


def test_matrix_warns_where_there_is_no_error_bar():
    x, y = pair(7)
    with pytest.warns(DegenerateWarning, match="no error bars"):
        assert np.isnan(cka_matrix({"x": x, "y": y}).stderr[0, 1])
    with pytest.raises(ValueError, match="no features"):
        cka_matrix({})


def test_permutation_test_tells_dependence_from_independence():
    x, y = pair(40)
    value, p = permutation_test(x, y, n=199)
    assert value == pytest.approx(cka(x, y))
    assert p == pytest.approx(1 / 200)
    g = torch.Generator().manual_seed(1)
    ps = [
        permutation_test(torch.randn(20, 5, generator=g), torch.randn(20, 5, generator=g), n=39)[1]
        for _ in range(60)
    ]
    assert np.mean(np.array(ps) <= 0.1) < 0.25  # uniform under independence
    assert 0.3 < np.mean(ps) < 0.7


def test_permutation_test_repeats_and_leaves_the_global_state():
    x, y = pair(20)
    state = torch.get_rng_state()
    assert permutation_test(x, y, n=50, seed=4) == permutation_test(x, y, n=50, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="too few permutations: 0"):
        permutation_test(x, y, n=0)
    with pytest.warns(DegenerateWarning):
        assert np.isnan(permutation_test(torch.zeros(20, 3), y)[1])


def test_ties_count_whatever_the_sign_of_the_observed_value():
    x, y = np.repeat([0.0, 1.0], 10)[:, None], np.tile([0.0, 1.0], 10)[:, None]
    value, p = permutation_test(x, y, n=99)
    assert value < 0  # as even as can be: no order of the images makes them less alike
    assert p == 1


def test_permutation_test_of_a_kernel_of_ones_own_is_of_the_cka_that_it_returns():
    def kernel(a, b):
        return torch.exp(-torch.cdist(a.double(), b.double()).square() / 2)

    rng = np.random.default_rng(0)
    x, y = (scale * rng.normal(size=(24, 5)) for scale in (0.3, 0.6))
    value, p = permutation_test(x, y, n=60, kernel=kernel, seed=4)
    assert value == cka(x, y, kernel=kernel)
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(24, generator=generator).numpy() for _ in range(60)]
    at_least = sum(cka(x, y[order], kernel=kernel) >= value - 1e-12 for order in orders)
    assert 0 < at_least < 60
    assert p == (1 + at_least) / 61


def test_arrays_that_torch_does_not_take_as_they_are():
    x, y = (z.double().numpy() for z in pair())
    value = cka(x, y)
    fixed = np.broadcast_to(x, x.shape)
    assert not fixed.flags.writeable
    swapped, wide = x.astype(">f8"), x.astype(np.longdouble)
    for same in (x[::-1][::-1], np.asfortranarray(x), swapped, fixed, wide):
        assert cka(same, y) == value
    assert cka(x[::-1], y[::-1]) == pytest.approx(value, abs=1e-12)
    eight = torch.tensor(x).to(torch.float8_e4m3fn)
    assert cka(eight, y) == cka(eight.float(), y)
    assert np.isfinite(cka((10 * x).astype(">i4"), y))


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_is_refused(bandwidth):
    x, y = pair()
    calls = (lambda: cka(x, y, kernel="rbf", bandwidth=bandwidth),
             lambda: cka_matrix({"x": x}, kernel="rbf", bandwidth=bandwidth),
             lambda: permutation_test(x, y, 3, kernel="rbf", bandwidth=bandwidth),
             lambda: cka_loss(x, y, kernel="rbf", bandwidth=bandwidth))  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"bad bandwidth: .*: give a fraction above 0"):
            call()


def test_rows_of_frames_are_compared_by_name_before_they_are_by_place():
    x = np.random.default_rng(0).normal(size=(12, 3))
    frame = pd.DataFrame(x, index=[f"{k}.png" for k in range(12)])
    shuffled = frame.iloc[::-1]
    words = r"^rows are named differently: row 0 is '0.png' in 'x', '11.png' in 'y': give the rows"
    for test in (cka, permutation_test, lambda x, y: cka_matrix({"x": x, "y": y})):
        with pytest.raises(ValueError, match=words):
            test(frame, shuffled)
    with pytest.raises(ValueError, match="row 0 is '5' in"):  # parts of one table
        cka(pd.DataFrame(x).iloc[5:11], pd.DataFrame(x).iloc[:6])
    assert cka(frame, frame * 2) == pytest.approx(1)
    assert cka(frame, pd.DataFrame(x)) == pytest.approx(1)  # mere numbers name nothing
    assert cka(frame.loc[shuffled.index], shuffled) == pytest.approx(1)


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        (lambda x: np.ma.array(x, mask=x > 1), ValueError, "masked: .* in 'x'"),
        (lambda x: sparse.csr_matrix(x), TypeError, "'x' is csr_matrix of object"),
        (lambda x: pd.DataFrame(x).assign(name="cat"), TypeError, "'x' is DataFrame of object"),
        (lambda x: torch.tensor(x).to_sparse(), TypeError, "'x' is torch.sparse_coo"),
        (lambda x: torch.tensor(x).to("meta"), TypeError, "'x' is without data"),
        (lambda x: [[1.0, 2.0], [3.0]], TypeError, "no array: 'x'"),
        (lambda x: None, TypeError, "'x' is NoneType"),
    ],
)
def test_what_holds_no_dense_numbers_is_refused(made, error, text):
    x = np.random.default_rng(0).normal(size=(12, 3))
    with pytest.raises(error, match=f"^features are .*{text}") as caught:
        cka(made(x), x)
    assert "\n" not in str(caught.value)
    assert cka(x.tolist(), np.ma.array(x, mask=False)) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["array", "sparse", "meta"])
def test_the_loss_takes_dense_tensors_alone(kind):
    x = torch.randn(8, 3)
    other = {"array": x.numpy(), "sparse": x.to_sparse(), "meta": x.to("meta")}[kind]
    with pytest.raises(TypeError, match=r"^features are no (plain )?tensor: 'y' is "):
        cka_loss(x, other)


@pytest.mark.parametrize("kernel", ["linear", "rbf", lambda a, b: a @ b.T])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-24, 1e-18, 1e17, 1e18, 1e30, 3e37])
@pytest.mark.parametrize("width", [3, 500])
def test_the_loss_is_right_at_any_scale_of_float32(kernel, scale, width):
    """The norm of features, or its square, may lie outside of what float32 holds."""
    x, y = pair(n=24, p=width)
    big = (x / x.abs().max() * scale).requires_grad_()
    value = cka_loss(big, y, kernel=kernel)
    name = kernel if isinstance(kernel, str) else "linear"
    expected = oracle.cka(big.detach().double().numpy(), y.double().numpy(), name)
    assert value.item() == pytest.approx(expected, abs=2e-6)
    value.backward()
    other = big.detach().double().requires_grad_()
    cka_loss(other, y.double(), kernel=kernel).backward()
    wanted = other.grad * scale  # CKA does not change with the scale: its gradient does
    if float(wanted.abs().max()) / scale < 3e38:
        torch.testing.assert_close(big.grad.double() * scale, wanted, rtol=1e-3, atol=1e-5)
