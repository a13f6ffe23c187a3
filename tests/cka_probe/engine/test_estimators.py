import json
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from scipy import stats

from cka_probe.engine.exact import Exact
from cka_probe.engine.minibatch import Minibatch
from cka_probe.engine.sketch import Sketch


def features(n, m=3, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return [
        z @ torch.randn(3, d, generator=g, dtype=torch.float64)
        + 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64)
        for _ in range(m)
    ]


def fill(estimator, x, bounds, batches=None):
    for b in batches if batches is not None else range(len(bounds) - 1):
        for i, f in enumerate(x):
            estimator.update(i, f[bounds[b] : bounds[b + 1]])
        estimator.end_batch(b)
    return estimator


def test_merge_of_shards_is_the_whole():
    x, bounds = features(100), list(range(0, 101, 10))
    whole = fill(Minibatch(10), x, bounds).compute()
    even, odd = (
        fill(Minibatch(10), x, bounds, range(0, 10, 2)),
        fill(Minibatch(10), x, bounds, range(1, 10, 2)),
    )
    even.merge(odd)
    assert np.abs(even.compute().cka - whole.cka).max() < 1e-12
    assert np.abs(even.compute().stderr - whole.stderr).max() < 1e-12
    with pytest.raises(ValueError, match="sums of another run"):
        even.merge(Minibatch(11))


def test_exact_merge_is_the_whole():
    x, bounds = features(100), [0, 30, 60, 100]
    whole = fill(Exact(), x, bounds).compute()
    one, two = fill(Exact(), x, bounds, [0, 2]), fill(Exact(), x, bounds, [1])
    one.merge(two)
    assert np.abs(one.compute().cka - whole.cka).max() < 1e-12


@pytest.mark.parametrize("n", [100, 107])
def test_minibatch_error_bar_is_the_jackknife_over_batches(n):
    bounds = [*range(0, 100, 10), n]
    x = features(n, m=2)
    result = fill(Minibatch(10), x, bounds).compute()
    groups = [np.arange(bounds[b], bounds[b + 1]) for b in range(10)]

    def estimate(parts):
        return oracle.cka_minibatch(*[[f.numpy()[i] for i in parts] for f in x])

    assert result.groups == 10
    assert result.stderr[0, 1] == pytest.approx(oracle.jackknife_se(estimate, groups), rel=1e-9)


def test_many_batches_fold_into_32_groups():
    x, bounds = features(400, m=2), list(range(0, 401, 4))
    result = fill(Minibatch(100), x, bounds).compute()
    assert result.groups == 32
    group_of = np.array([b * 32 // 100 for b in range(100)]).repeat(4)
    groups = [np.flatnonzero(group_of == g) for g in range(32)]

    def estimate(parts):
        i = np.concatenate(parts).reshape(-1, 4)
        return oracle.cka_minibatch(*[[f.numpy()[rows] for rows in i] for f in x])

    assert result.stderr[0, 1] == pytest.approx(oracle.jackknife_se(estimate, groups), rel=1e-8)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_exact_error_bar_is_the_jackknife_over_images(unbiased, kernel):
    n = 47
    x = features(n, m=2)
    sigmas = [np.sqrt(np.median(squared(f.numpy())[np.triu_indices(n, 1)])) for f in x]
    result = fill(Exact(unbiased=unbiased, kernel=kernel), x, [0, n]).compute()
    bounds = np.linspace(0, n, 11 + 1).round().astype(int)
    groups = [np.arange(a, b) for a, b in pairwise(bounds)]
    assert result.groups == 11

    def estimate(parts):
        i = np.concatenate(parts)
        hsic = oracle.hsic1 if unbiased else oracle.hsic0
        if kernel == "linear":
            k, g = ((f.numpy() - f.numpy().mean(0))[i] for f in x)
            k, g = k @ k.T, g @ g.T
        else:
            k, g = (
                np.exp(-squared(f.numpy()[i]) / (2 * s**2)) for f, s in zip(x, sigmas, strict=True)
            )
        return hsic(k, g) / np.sqrt(hsic(k, k) * hsic(g, g))

    assert result.cka[0, 1] == pytest.approx(estimate(groups), abs=1e-10)
    assert result.stderr[0, 1] == pytest.approx(oracle.jackknife_se(estimate, groups), rel=1e-7)


def squared(x):
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def population_cka(a, b):
    """CKA of z a + e, z b + e' with independent unit normal z, e, e'."""
    xx = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype)
    yy = b.T @ b + torch.eye(b.shape[1], dtype=a.dtype)
    return float(((a.T @ b) ** 2).sum() / (xx.norm() * yy.norm()))


@pytest.mark.parametrize("groups", [4, 8, 20])
@pytest.mark.parametrize("kind", ["minibatch", "exact"])
def test_intervals_cover(kind, groups):
    """95 % intervals hold the population's CKA in 90 to 98 % of 500 draws."""
    g = torch.Generator().manual_seed(groups)
    draw = {"generator": g, "dtype": torch.float64}
    a = torch.randn(4, 12, **draw)
    b = a + 0.7 * torch.randn(4, 12, **draw)
    truth, per, draws, hits = population_cka(a, b), {4: 48, 8: 32, 20: 12}[groups], 500, 0
    quantile = stats.t.ppf(0.975, groups - 1)
    for _ in range(draws):
        z = torch.randn(groups * per, 4, **draw)
        x = [z @ w + torch.randn(groups * per, 12, **draw) for w in (a, b)]
        estimator = Minibatch(groups) if kind == "minibatch" else Exact(groups=groups)
        step = per if kind == "minibatch" else groups * per
        result = fill(estimator, x, list(range(0, groups * per + 1, step))).compute()
        assert result.groups == groups
        hits += abs(result.cka[0, 1] - truth) <= quantile * result.stderr[0, 1]
    assert 0.90 <= hits / draws <= 0.98


def test_tail_batches_weigh_what_they_hold():
    x = features(68, m=2)
    result = fill(Minibatch(2), x, [0, 64, 68]).compute()
    expected = oracle.cka_minibatch(*[[f.numpy()[:64], f.numpy()[64:]] for f in x])
    assert result.cka[0, 1] == pytest.approx(expected, abs=1e-9)


def test_minibatch_memory_does_not_grow():
    estimator = Minibatch(1000)
    x = features(8, m=2)
    fill(estimator, x, [0, 8], [0])
    held = sum(a.nbytes for a in (estimator.hsic, estimator.floor, estimator.weight))
    for b in range(1, 50):
        for i, f in enumerate(x):
            estimator.update(i, f)
        estimator.end_batch(b)
    assert held == sum(a.nbytes for a in (estimator.hsic, estimator.floor, estimator.weight))
    assert not estimator._open
    assert not estimator.waiting


def test_constant_and_vanishing_entries_are_nan_and_named():
    x = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    entries = [x, torch.full((40, 5), 0.1), torch.eye(40)]
    for estimator in (Minibatch(1), Exact(), Exact(kernel="rbf"), Minibatch(1, kernel="rbf")):
        result = fill(estimator, entries, [0, 40]).compute()
        assert result.constant.tolist() == [False, True, False]
        assert result.vanishing.tolist() == [False, False, True]
        assert np.isnan(result.cka[1:]).all()
        assert result.cka[0, 0] == 1.0
        assert np.isnan(result.stderr[1:]).all()


def test_an_entry_that_is_constant_in_one_batch_only_still_counts():
    x, y = features(40, m=2)
    y = y.clone()
    y[:10] = 0.1
    result = fill(Minibatch(4), [x, y], [0, 10, 20, 30, 40]).compute()
    parts = [[f.numpy()[i : i + 10] for i in (10, 20, 30)] for f in (x, y)]
    hxy, hyy = (
        sum(oracle.hsic1(oracle.gram(p), oracle.gram(q)) for p, q in zip(u, parts[1], strict=True))
        for u in parts
    )
    hxx = sum(oracle.hsic1(*[oracle.gram(x.numpy()[i : i + 10])] * 2) for i in (0, 10, 20, 30))
    assert result.cka[0, 1] == pytest.approx(hxy / np.sqrt(hxx * hyy), abs=1e-9)
    assert not result.constant.any()


def test_refusals():
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match="too few images: 3"):
        Minibatch(1).update("x", x[:3])
    with pytest.raises(ValueError, match="biased minibatch CKA"):
        Minibatch(1, unbiased=False)
    for estimator in (Minibatch(2), Exact()):
        estimator.update("x", x)
        estimator.end_batch(0)
        estimator.update("y", x)
        with pytest.raises(ValueError, match="entries differ between batches"):
            estimator.end_batch(1)


def test_one_group_has_no_error_bar():
    result = fill(Minibatch(1), features(30), [0, 30]).compute()
    assert result.groups == 1
    assert np.isnan(result.stderr[0, 1])
    assert fill(Exact(), features(7), [0, 7]).compute().groups == 1
    assert fill(Exact(), features(16), [0, 16]).compute().groups == 4


def test_the_bandwidth_is_that_of_256_images_within_their_batches():
    x, y = (torch.randn(400, 7, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    y[256:] *= 9  # the third batch holds images 200 to 299
    whole = Minibatch(4, kernel="rbf")
    for b, rows in enumerate(torch.arange(400).split(100)):
        whole.update("x", x[rows])
        whole.update("y", y[rows])
        whole.end_batch(b)
    parts = [y[:100], y[100:200], y[200:256]]
    d = np.concatenate([np.asarray(torch.pdist(part.double())) for part in parts])
    assert whole.sigma["y"] == pytest.approx(np.median(d), rel=1e-6)


# --- the protocol: what saving, resuming and several processes use

KINDS = {
    "minibatch": lambda: Minibatch(8),
    "minibatch-rbf": lambda: Minibatch(8, kernel="rbf"),
    "minibatch-rbf-early": lambda: Minibatch(8, kernel="rbf"),
    "exact": Exact,
    "exact-rbf": lambda: Exact(kernel="rbf"),
    "exact-known-size": lambda: Exact(n_images=110),
    "sketch": lambda: Sketch(size=32),
}
UNEVEN = [0, 12, 20, 34, 50, 58, 74, 90, 110]


def drawn(kind):
    """Features and bounds of 8 uneven batches, "early" with 256 images before the last ones."""
    scale = 4 if kind.endswith("early") else 1
    bounds = [scale * b for b in UNEVEN]
    x = [f.float() for f in features(bounds[-1], d=200)]
    return [*x, torch.ones(bounds[-1], 7)], bounds  # and a constant entry


def through_a_file(estimator, fresh, folder):
    """`fresh`, with what an .npz without pickle kept of the state of `estimator`."""
    state = estimator.state_dict()
    arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
    np.savez(folder / "state.npz", **arrays, allow_pickle=False)
    plain = json.loads(json.dumps({k: v for k, v in state.items() if k not in arrays}))
    with np.load(folder / "state.npz", allow_pickle=False) as file:
        fresh.load_state_dict({**plain, **{k: file[k] for k in arrays}})
    return fresh


def assert_equal_results(got, want, atol=1e-12):
    assert got.keys == want.keys
    np.testing.assert_allclose(got.cka, want.cka, rtol=0, atol=atol)
    np.testing.assert_allclose(got.stderr, want.stderr, rtol=0, atol=atol)
    assert got.groups == want.groups
    assert got.constant.tolist() == want.constant.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shares", [((0, 2, 5), (1, 3, 4, 6, 7)), ((7,), (), (0, 1, 2, 3, 4, 5, 6))]
)
def test_merged_shards_are_the_whole(kind, shares, tmp_path):
    """Shards as processes have them: of other batches, sent as a state, merged by rank 0."""
    x, bounds = drawn(kind)
    want = fill(KINDS[kind](), x, bounds).compute()
    whole = KINDS[kind]()
    for share in shares:
        shard = fill(whole.new_shard(), x, bounds, share)
        if share:
            whole.merge(through_a_file(shard, whole.new_shard(), tmp_path))
    # a sketch is shifted to another origin in float32; all else is the same sums
    assert_equal_results(whole.compute(), want, 1e-6 if kind == "sketch" else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [1, 5])
def test_a_state_goes_on_as_if_it_had_never_ended(kind, done, tmp_path):
    x, bounds = drawn(kind)
    want = fill(KINDS[kind](), x, bounds).compute()
    first = fill(KINDS[kind](), x, bounds, range(done))
    again = fill(through_a_file(first, KINDS[kind](), tmp_path), x, bounds, range(done, 8))
    assert_equal_results(again.compute(), want, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_state_keeps_the_dtype_of_the_features(dtype, tmp_path):
    x, bounds = [f.to(dtype) for f in features(40)], [0, 20, 40]
    first = fill(Exact(), x, bounds, [0])
    again = fill(through_a_file(first, Exact(), tmp_path), x, bounds, [1])
    assert {rows.parts[0][1].dtype for rows in again.rows.values()} == {dtype}
    assert_equal_results(again.compute(), fill(Exact(), x, bounds).compute(), 0.0)


def test_the_bandwidth_of_shards_is_that_of_the_first_256_images():
    """Whoever had them, and in whatever order the shards come."""
    x, bounds = drawn("minibatch-rbf-early")
    whole = fill(Minibatch(8, kernel="rbf"), x, bounds)
    merged = Minibatch(8, kernel="rbf")
    assert not merged.ready
    for share in ((1, 4), (0, 3), (2, 5), (6, 7)):
        merged.merge(fill(merged.new_shard(), x, bounds, share))
    assert merged.ready
    assert merged.new_shard().sigma == merged.sigma
    assert merged.sigma == pytest.approx(whole.sigma, rel=1e-12)


@pytest.mark.parametrize("kind", ["minibatch", "exact", "sketch"])
def test_shards_with_other_entries_are_refused(kind):
    x, bounds = drawn(kind)
    one, two = KINDS[kind](), KINDS[kind]()
    fill(one, x, bounds, [0])
    fill(two, x[:2], bounds, [1])
    with pytest.raises(ValueError, match="entries"):
        one.merge(two)
