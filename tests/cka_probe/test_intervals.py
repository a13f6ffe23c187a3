"""Intervals by Student's t, against scipy's own distribution."""

import math

import pytest
from scipy import stats

from cka_probe.intervals import check_level, student_interval, student_t


def test_student_interval_equals_scipy():
    low, high = student_interval(0.8, 0.02, 9)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 8, loc=0.8, scale=0.02))
    assert all(map(math.isnan, student_interval(0.8, 0.02, 1)))


@pytest.mark.parametrize("groups", [2, 4, 20])
def test_student_t_is_the_two_sided_quantile(groups):
    assert student_t(groups, 0.9) == pytest.approx(stats.t.ppf(0.95, groups - 1), rel=1e-12)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match=r"^level out of range: .*: use a share between 0 and 1"):
        check_level(level)
