"""Student's t for intervals whose standard error is a jackknife's over groups."""

import math

from scipy.special import stdtrit

__all__ = ["check_level", "student_interval", "student_t"]


def check_level(level: float) -> None:
    """Raise ValueError unless a level is a coverage between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level out of range: {level}: use a share between 0 and 1, such as 0.95")


def student_t(groups: int, level: float) -> float:
    """Half the width of a two-sided interval in standard errors.

    Args:
        groups: number of jackknife groups; fewer than 2 give nan.
        level: coverage, in (0, 1).

    Returns:
        The (1 + level) / 2 quantile of Student's t with groups - 1 degrees of freedom: with 1.96 in
        its place intervals cover 85 % at 4 groups and 90 % at 8.
    """
    return float(stdtrit(groups - 1, (1 + level) / 2)) if groups >= 2 else math.nan


def student_interval(
    value: float, stderr: float, groups: int, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of an estimate with a jackknife standard error; nan with fewer than 2 groups."""
    half = student_t(groups, level) * stderr
    return value - half, value + half
