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


def closing(value):
    return lambda x: x * value


def defaulting(value):
    def scaled(x, by=value):
        return x * by

    return scaled


def power(n):
    return lambda a, b: (a @ b.T) ** n


def first(n):
    return lambda x: x.flatten(1)[:, :n]


def called(name):
    return lambda path, module: path == name


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
    [closing, defaulting, Slotted.method, max],
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
    [["a", closing], ["a", defaulting]],
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


def test_an_upgrade_of_python_changes_no_description():
    """Bytecode does change: a function is named, not hashed."""
    scaled = closing(2)
    before = described(scaled)
    code = scaled.__code__
    scaled.__code__ = code.replace(co_code=code.co_code + code.co_code[-2:])
    assert described(scaled) == before
    assert described(closing(3)) != before


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
        ("kernel", {"kernel": power(1)}, {"kernel": power(3)}),
        ("reduce", {"reduce": first(99)}, {"reduce": first(9)}),
        ("layers", {"layers": called("0")}, {"layers": called("1")}),
        (
            "views",
            {"scales": None, "views": {"a": (None, None), "b": (None, closing(1))}},
            {"scales": None, "views": {"a": (None, None), "b": (None, closing(2))}},
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
