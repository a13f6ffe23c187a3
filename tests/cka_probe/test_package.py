"""The two packages as a user imports them: light, lazy, and with nothing but public names."""

import subprocess
import sys

import pytest

import cka_probe
import msun


def fresh(code):
    """What an interpreter of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_packages_loads_no_library():
    code = "import sys, cka_probe, msun; print({m for m in ('torch', 'numpy') if m in sys.modules})"
    assert fresh(code) == "set()"


@pytest.mark.parametrize("package", [cka_probe, msun])
def test_dir_names_what_is_public_and_all_of_it_is_there(package):
    assert dir(package) == sorted(package.__all__)
    assert fresh(f"import {package.__name__} as p; print(all(hasattr(p, n) for n in dir(p)))") == (
        "True"
    )


def test_plot_is_reached_without_an_import_of_its_own():
    assert fresh("import cka_probe; print(cka_probe.plot.heatmap.__name__)") == "heatmap"
    assert fresh("import msun; print(msun.plot.accuracy.__name__)") == "accuracy"


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert cka_probe.__version__ == version("cka-probe")


@pytest.mark.parametrize("package", [cka_probe, msun])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'x'"):
        _ = package.x
