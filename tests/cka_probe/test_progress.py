"""The bar knows a terminal, a notebook's kernel and a log apart."""

import io
import sys
from types import SimpleNamespace

import pytest

from cka_probe.progress import progress_bar


def shell(kernel):
    return SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel))


@pytest.mark.parametrize(
    ("modules", "delay"),
    [
        ({"ipykernel": SimpleNamespace()}, 10.0),  # imported, but no notebook
        ({"IPython": SimpleNamespace(get_ipython=lambda: None)}, 10.0),
        ({"IPython": shell(None)}, 10.0),  # IPython in a terminal whose stderr is a file
        ({"IPython": shell(object())}, 0),
    ],
)
def test_a_notebook_is_known_by_its_kernel(monkeypatch, modules, delay):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(3, desc="probe", unit="image") as bar:
        assert bar.delay == delay


def test_nothing_is_shown_where_not_wanted(capsys):
    with progress_bar(3, desc="probe", unit="image", show=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
