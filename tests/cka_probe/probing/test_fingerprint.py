"""What a resumed run is known by: a changed option is another text, an equal one the same."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from cka_probe import probe
from cka_probe.probing.fingerprint import described

ROOT = Path(__file__).resolve().parents[3]
FACTOR = 2


def closing(value):
    return lambda x: x * value


def defaulting(value):
    def scaled(x, by=value):
        return x * by

    return scaled


class Callable:
    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return x * self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return x * self.value

    def method(self, x):
        return x * self.value


DIFFERENT = [
    [lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, lambda x: -x, lambda x: abs(x)],
    [lambda x: (lambda y: y + 1)(x), lambda x: (lambda y: y + 2)(x)],
    [lambda x: x in {"a", "b"}, lambda x: x in {"a", "c"}],
    [closing(1), closing(2)],
    [closing(torch.zeros(3)), closing(torch.ones(3)), closing(np.zeros(3)), closing(np.ones(3))],
    [closing(closing(1)), closing(closing(2))],
    [defaulting(1), defaulting(2)],
    [Callable(1), Callable(2), Callable("1")],
    [Callable([1]), Callable([2]), Callable({"a": 1}), Callable({"a": 2})],
    [Slotted(1), Slotted(2)],
    [Slotted(1).method, Slotted(2).method],
    [functools.partial(max, 1), functools.partial(max, 2), functools.partial(min, 1)],
    [functools.partial(max, key=closing(1)), functools.partial(max, key=closing(2))],
    [v2.GaussianBlur(3, 1.0), v2.GaussianBlur(3, 2.0), v2.GaussianBlur(5, 1.0)],
    [v2.Lambda(closing(1)), v2.Lambda(closing(2))],
    [nn.Conv2d, nn.Linear, "nn.Conv2d"],
    [["a", lambda x: 1], ["a", lambda x: 2]],
]


@pytest.mark.parametrize("values", DIFFERENT)
def test_what_differs_is_told_apart(values):
    found = [repr(described(value)) for value in values]
    assert len(set(found)) == len(found), found
    assert found == [repr(described(value)) for value in values]
    assert "0x" not in "".join(found)


def test_equal_values_are_equal():
    for make in (closing, defaulting, Callable, Slotted):
        assert described(make(1)) == described(make(1))
    assert described(v2.GaussianBlur(3, 1.0)) == described(v2.GaussianBlur(3, 1.0))
    assert described({"b", "a"}) == ["a", "b"]
    assert described(None) is None
    assert described(["stem", 1, 2.5, True]) == ["stem", 1, 2.5, True]


def test_a_global_that_a_function_reads_counts(monkeypatch):
    def scaled(x):
        return x * FACTOR

    before = described(scaled)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert described(scaled) != before


def test_things_that_hold_themselves_end():
    odd = Callable(1)
    odd.value = [odd]
    described(odd)

    def again(x):
        return again(x)

    described(again)


def test_another_process_says_the_same():
    """String hashes and addresses differ there."""
    code = (
        "import sys; sys.path[:0] = ['tests/cka_probe/probing']; from test_fingerprint import *\n"
        "print([described(value) for values in DIFFERENT for value in values])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("kernel", {"kernel": lambda a, b: a @ b.T}, {"kernel": lambda a, b: (a @ b.T) ** 3}),
        ("reduce", {"reduce": lambda x: x.flatten(1)}, {"reduce": lambda x: -x.flatten(1)[:, :9]}),
        ("layers", {"layers": lambda n, m: n == "0"}, {"layers": lambda n, m: n == "1"}),
        (
            "views",
            {"scales": None, "views": {"a": (None, None), "b": (None, lambda x: x * 1)}},
            {"scales": None, "views": {"a": (None, None), "b": (None, lambda x: x**2)}},
        ),
    ],
)
def test_a_finished_run_with_another_function_is_refused_by_name(tmp_path, name, one, two):
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(16, 3, 8, 8)
    options = {"scales": [6, 8], "batch_size": 8, "out": tmp_path, "progress": False}
    report = probe(net, images, **{**options, **one})
    assert probe(net, images, resume=True, **{**options, **one}) == report
    with pytest.raises(ValueError, match=rf"another run: {name}"):
        probe(net, images, resume=True, **{**options, **two})


def test_a_finished_run_of_other_images_is_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    items = [torch.rand(3, 8, 8) for _ in range(16)]
    options = {"scales": [6, 8], "batch_size": 8, "out": tmp_path, "progress": False}
    report = probe(net, items, **options)
    assert probe(net, items, resume=True, **options) == report
    items[9] = items[9] + 1
    with pytest.raises(ValueError, match="another run: images"):
        probe(net, items, resume=True, **options)
