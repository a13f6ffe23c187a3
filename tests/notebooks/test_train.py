"""Notebook 3, executed as it is shipped and on a network and folders of one's own."""

import pytest
from notebook_runs import MISSING, REPOSITORY, as_text, check_clean, execute, shown_by
from PIL import Image

import msun

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")
nbformat = pytest.importorskip("nbformat")
TRAIN = REPOSITORY / "notebooks" / "3-train-an-msun.ipynb"

YOURS = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    nn.Sequential(nn.Conv2d(4, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
)
at = "0"
scales = [16, 32]
train_images = "photos"
test_images = "photos"
steps = 3
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    return folder, execute(nbformat.read(TRAIN, as_version=4), folder)


def test_runs_without_a_word_on_stderr(executed):
    check_clean(executed[1])


def test_says_what_each_size_costs_and_serves_mixed_sizes(executed):
    shown = shown_by(executed[1])
    costs = as_text(shown["costs"]["text/html"])
    assert "6464(8,8)" not in costs  # the trunk's grid is that of the map after the split
    assert "6464(32,32)(32,32)26.660736" in costs
    assert shown["serve"]["text/plain"] == "(torch.Size([3, 62]), [64, 32, 16])"
    for picture in ("accuracy", "pareto"):
        assert "image/png" in shown[picture]


def test_the_checkpoint_keeps_what_was_calibrated(executed):
    folder = executed[0]
    from cka_probe.models.embedded import glyphnet

    net = msun.load(folder / "lean.pt", backbone=glyphnet())
    assert net.scales == (16, 32, 64)
    assert set(net.calibrated) == {(24, 24), (48, 48)}


def test_with_a_network_and_folders_of_ones_own(tmp_path):
    for k in range(60):
        folder = tmp_path / "photos" / ("dark" if k % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (10 + k, 20, 30) if k % 2 else (200, 220 - k, 230)).save(
            folder / f"{k}.png"
        )
    notebook = nbformat.read(TRAIN, as_version=4)
    for cell in notebook.cells:
        if cell.id == "choose":
            cell.source = YOURS
        if cell.id == "train":
            cell.source = cell.source.replace("n_images=1240, ", "")
    done = execute(notebook, tmp_path)
    check_clean(done)
    shown = shown_by(done)
    assert shown["serve"]["text/plain"] == "(torch.Size([3, 2]), [32, 32, 16])"
