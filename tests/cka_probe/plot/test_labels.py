import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from cka_probe.plot.labels import annotate, labels_width_in, row_height_in, unique_labels


def test_short_names_stay():
    assert unique_labels(["layer1.0", "a" * 36]) == ["layer1.0", "a" * 36]


def test_long_names_lose_their_middle():
    (name,) = unique_labels(["blocks.3.12.attn.qkv_proj.dropout.and.more"])
    assert len(name) == 36
    assert name.startswith("blocks.3.12.attn")
    assert name.endswith("out.and.more")
    assert "…" in name


def test_no_two_names_become_one():
    names = [f"{'x' * 100}{middle}{'y' * 100}" for middle in "abcdef"]
    assert len(set(unique_labels(names))) == 6
    assert max(map(len, unique_labels(names))) < 206
    assert unique_labels(["same", "same"]) == ["same", "same"]


def test_dollars_are_no_formula():
    assert unique_labels(["a$x$"]) == [r"a\$x\$"]


def test_room_grows_with_names_and_rows():
    assert (
        labels_width_in(["a"])
        < labels_width_in(["a" * 20])
        < labels_width_in(["a" * 36])
        == labels_width_in(["a" * 360])
    )
    heights = [rows * row_height_in(rows) for rows in range(1, 1000)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[-1] < 30  # inches
    assert row_height_in(100) * 72 > 11  # points: a line of 9 point type


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.874, 0.0149, "0.87 ±.01"),
        (0.874, 0.0041, "0.874 ±.004"),
        (0.874, 0.0001, "0.874 ±.001"),
        (0.1, 1.234, "0.10 ±1.23"),
        (-0.126, 0.5, "-0.13 ±.50"),
        (-0.001, np.nan, "0.00"),
        (1.0, 0.0, "1.00"),
        (np.nan, np.nan, "nan"),
        (0.9975, 0.0003, "0.998 ±.001"),
        (0.9997, 0.0001, "0.999 ±.001"),
        (0.9999, 0.0002, "1.000 ±.001"),  # the interval reaches 1
        (0.998, 0.01, "1.00 ±.01"),
        (0.9999999, 1e-9, "1.000 ±.001"),
        (0.9975, np.nan, "0.998"),
        (0.99996, np.nan, "0.999"),
        (1 - 1e-12, np.nan, "1.00"),
        (1.0, np.nan, "1.00"),
    ],
)
def test_numbers(value, half, text):
    ax = Figure(figsize=(6, 2)).add_subplot()
    values, halves = np.array([[value, 0.5]]), np.array([[half, 0.1]])
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), vmin=0, vmax=1)
    assert annotate(ax, mesh, values, halves)
    assert ax.texts[0].get_text() == text


def test_numbers_that_do_not_fit_are_left_out():
    for width_in, texts in ((4, ["0.50 ±.10"] * 6), (1.5, ["0.50"] * 6), (0.6, [])):
        ax = Figure(figsize=(width_in, 3)).add_axes((0, 0, 1, 1))
        values, half = np.full((2, 3), 0.5), np.full((2, 3), 0.1)
        mesh = ax.pcolormesh(values, vmin=0, vmax=1)
        assert annotate(ax, mesh, values, half) == (width_in == 4)
        assert [text.get_text() for text in ax.texts] == texts


def test_no_printed_interval_excludes_the_value_nor_says_1_where_1_is_ruled_out():
    rng = np.random.default_rng(0)
    values = 1 - 10 ** rng.uniform(-5, 0, (30, 30))
    halves = 10 ** rng.uniform(-5, -1, (30, 30))
    ax = Figure(figsize=(60, 20)).add_axes((0, 0, 1, 1))
    assert annotate(ax, ax.pcolormesh(values, vmin=0, vmax=1), values, halves)
    for text, value, half in zip(ax.texts, values.flat, halves.flat, strict=True):
        told, part = map(float, text.get_text().split(" ±"))
        assert abs(told - value) <= part + 1e-12, (text, value, half)
        assert told < 1 or value + half >= 1, (text, value, half)
