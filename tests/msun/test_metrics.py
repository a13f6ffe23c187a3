"""Ranks against sorting, the coverage of intervals, drawn sizes against their law."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from msun.metrics import (
    Predictions,
    accuracy,
    drawn_sides,
    true_class_rank,
    wilson_interval,
)


def test_ranks_equal_those_of_sorting():
    torch.manual_seed(0)
    logits = torch.randint(0, 6, (200, 9)).float()  # many ties
    labels = torch.randint(0, 9, (200,))
    rank, predicted = true_class_rank(logits, labels)
    for row, label, place, first in zip(logits.tolist(), labels.tolist(), rank, predicted,
                                        strict=True):  # fmt: skip
        order = sorted(range(9), key=lambda k: (-row[k], k))
        assert order.index(label) == place
        assert order[0] == first


def test_a_network_that_says_nothing_is_right_by_chance():
    rank, predicted = true_class_rank(torch.zeros(60, 6), torch.arange(60) % 6)
    assert (rank == 0).float().mean() == pytest.approx(1 / 6)
    assert predicted.tolist() == [0] * 60


@pytest.mark.parametrize("n", [1, 50, 10000])
def test_ends_of_wilson_are_exact(n):
    assert wilson_interval(0, n)[0] == 0
    assert wilson_interval(n, n)[1] == 1


def test_wilson_covers():
    for p in (0.05, 0.5, 0.9):
        k = np.arange(201)
        chance = stats.binom.pmf(k, 200, p)
        hit = [low <= p <= high for low, high in (wilson_interval(int(c), 200) for c in k)]
        assert 0.93 < chance[hit].sum() < 0.97


@pytest.mark.parametrize("bad", [(-1, 5), (6, 5)])
def test_impossible_counts(bad):
    with pytest.raises(ValueError, match="impossible count"):
        wilson_interval(*bad)


@pytest.mark.parametrize("level", [0, 1, -1, 95, math.nan])
def test_impossible_levels(level):
    with pytest.raises(ValueError, match="level out of range"):
        wilson_interval(1, 2, level)


def test_nothing_counted_is_nan():
    assert all(map(math.isnan, wilson_interval(0, 0)))
    assert math.isnan(accuracy(np.zeros(0, dtype=np.int64), 10)["top1"])


def test_accuracy_counts():
    ranks = np.array([0, 0, 4, 5, 9, 0])
    found = accuracy(ranks, 10)
    assert (found["n"], found["top1"], found["top5"]) == (6, 0.5, 4 / 6)
    assert (found["top1_low"], found["top1_high"]) == wilson_interval(3, 6)
    assert (found["top5_low"], found["top5_high"]) == wilson_interval(4, 6)
    few = accuracy(np.array([0, 3, 1]), 4)
    assert few["top1"] == 1 / 3
    assert all(math.isnan(few[name]) for name in ("top5", "top5_low", "top5_high"))
    assert accuracy(np.array([4, 0]), 5)["top5"] == 1


def test_drawn_sides_are_log_uniform():
    sides = drawn_sides(40000, 8, 64, seed=3)
    assert sides.dtype == np.int64
    assert (sides.min(), sides.max()) == (8, 64)
    counted = np.bincount(sides, minlength=65)[8:]
    expected = 40000 * np.log(np.arange(9, 66) / np.arange(8, 65)) / np.log(65 / 8)
    assert stats.chisquare(counted, expected).pvalue > 1e-3
    assert np.array_equal(drawn_sides(40000, 8, 64, 3), sides)
    assert np.array_equal(drawn_sides(100, 8, 64, 3), sides[:100])
    assert not np.array_equal(drawn_sides(100, 8, 64, 4), sides[:100])
    assert set(drawn_sides(50, 32, 32, 0)) == {32}


def test_predictions_come_back_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    shape = (7, 2)
    made = Predictions(
        view=np.array(["8", "mixed"]),
        label=rng.integers(0, 5, 7),
        predicted=rng.integers(0, 5, shape),
        rank=rng.integers(0, 5, shape),
        side_px=rng.integers(8, 16, shape),
    )
    made.save(tmp_path / "p.npz")
    read = Predictions.load(tmp_path / "p.npz")
    for name in ("view", "label", "predicted", "rank", "side_px"):
        assert np.array_equal(getattr(made, name), getattr(read, name)), name
    assert np.array_equal(read.correct(8), made.rank[:, 0] == 0)
    assert np.array_equal(read.correct("mixed"), made.rank[:, 1] == 0)
    with pytest.raises(ValueError, match="no such size in the predictions: 9: choose from 8,"):
        read.correct(9)
    with pytest.raises(FileNotFoundError, match="no such predictions file"):
        Predictions.load(tmp_path / "q.npz")
