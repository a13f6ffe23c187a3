"""Every architecture that users bring, and the table that says so."""

import pytest
from architectures import TABLE, examine, names

TEXT = TABLE.read_text(encoding="utf-8")
NAMES = [name for name in names() if f"| {name} |" in TEXT]


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # of the networks, while they are built and traced
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    row = examine(name)
    assert f"| {name} | {row['layers']} | {row['from … to']} |" in TEXT


def test_the_table_says_what_it_lacks():
    missing = [name for name in names() if name not in NAMES]
    assert len(NAMES) >= 90
    assert all(f"`{name}`" in TEXT for name in missing)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_two_of_them_by_default(name):
    examine(name)
