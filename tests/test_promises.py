"""What README and the results say, against what is there."""

import csv
import re
from pathlib import Path

import pytest
import torch
import torchvision
from shell import furnish
from torch.nn import functional as F

import cka_probe
from cka_probe.inputs import glyphs
from cka_probe.models.embedded import WEIGHTS, glyphnet
from cka_probe.probing.choose import AUTO, ESTIMATORS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_five_lines_of_python_run_as_they_stand(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    make = torchvision.models.resnet18

    def random(weights):
        assert weights == "DEFAULT"
        return make(weights=None)  # no download

    monkeypatch.setattr(torchvision.models, "resnet18", random)
    with pytest.warns(cka_probe.DegenerateWarning, match="no error bars"):  # one batch of 20
        exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert all(f" {side}" in said.splitlines()[0] for side in (32, 64, 128, 224))
    assert "layer4" in said


def test_readme_names_every_estimator_and_no_other():
    start = README.index("| `minibatch`")
    rows = re.findall(r"^\| `(\w+)`", README[start : README.index("\n\n", start)], re.MULTILINE)
    assert set(rows) == {*ESTIMATORS, AUTO}


def test_the_networks_weights_are_small():
    path = Path(cka_probe.__file__).parent / "models" / "assets" / WEIGHTS
    assert path.stat().st_size < 500_000


def test_the_embedded_network_is_as_accurate_as_the_table_says():
    """Of other images than the table's 10,000: 620, each class ten times, at every size."""
    with (ROOT / "experiments" / "results" / "glyphnet_accuracy.csv").open() as file:
        table = {
            int(row["side_px"]): float(row["top1_percent"]) / 100 for row in csv.DictReader(file)
        }
    images, labels = glyphs.tensor("test", 620, 1)
    net, n = glyphnet(), len(labels)
    for side, told in table.items():
        x = images
        if side != images.shape[-1]:
            x = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        with torch.no_grad():
            found = float((net(x).argmax(1) == labels).double().mean())
        error = (told * (1 - told) * (1 / n + 1 / 10_000)) ** 0.5
        assert abs(found - told) < 4 * error, (side, found, told)
