"""Every architecture that users bring, and the table that says so."""

import pytest
from architectures import TABLE, examine, names

NAMES = names()


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    row = examine(name)
    assert f"| {name} | {row['layers']} | {row['from … to']} |" in TABLE.read_text("utf-8")


def test_the_table_names_every_architecture():
    text = TABLE.read_text(encoding="utf-8")
    missing = [name for name in NAMES if f"| {name} |" not in text]
    assert not missing


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_two_of_them_by_default(name):
    examine(name)
