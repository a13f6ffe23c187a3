"""What importing a room costs: the slow libraries stay out until something needs them."""

import subprocess
import sys

import pytest

SLOW = ("torchvision", "timm", "matplotlib", "pandas", "scipy.stats", "seaborn", "torch._dynamo")


@pytest.mark.parametrize(
    "modules",
    [
        "cka_probe.inputs.batches, cka_probe.inputs.glyphs",
        "cka_probe.activations.macs, cka_probe.activations.meta",
        "cka_probe.models.load, cka_probe.probing.metadata",
        "msun.data.labelled",
    ],
)
def test_a_room_imports_no_slow_library(modules):
    code = f"import sys, {modules}; print([m for m in {SLOW!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
