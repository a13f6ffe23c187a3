"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil
import warnings

import pytest

import cka_probe
import msun

ROOMS = [
    f"{package.__name__}.{found.name}"
    for package in (cka_probe, msun)
    for found in pkgutil.iter_modules(package.__path__)
    if found.name not in ("__main__", "assets")
]
# public functions whose docstrings show a call
SHOWN = {
    "cka_probe.features": ("cka", "cka_matrix", "permutation_test"),
    "cka_probe.hsic": ("cka_loss",),
    "cka_probe.probe": ("probe",),
    "msun.cut": ("cut_points", "cut"),
    "msun.build": ("build",),
    "msun.split": ("suggest_split",),
}


@pytest.mark.parametrize("name", ROOMS)
def test_examples(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(("room", "names"), SHOWN.items())
def test_public_functions_show_a_call(room, names):
    tests = doctest.DocTestFinder().find(importlib.import_module(room))
    shown = {t.name.rsplit(".", 1)[-1] for t in tests if t.examples}
    assert set(names) <= shown
