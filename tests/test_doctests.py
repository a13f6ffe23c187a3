"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil
import warnings

import pytest

import cka_probe
import msun

ROOMS = [
    found.name
    for package in (cka_probe, msun)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not found.name.endswith("__main__")
]
# public functions whose docstrings show a call
SHOWN = {
    "cka_probe.functional": ("cka", "cka_loss", "cka_matrix", "permutation_test"),
    "cka_probe.probing.api": ("probe",),
    "msun.cutting.cuts": ("cut_points", "cut"),
    "msun.network.builder": ("build",),
    "msun.splitting.suggest": ("suggest_split",),
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
