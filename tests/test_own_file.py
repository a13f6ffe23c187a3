"""The user's own file, `path/to/file.py:callable`: probed and cut as a network by name is."""

import sys

import numpy as np
import oracle
import pytest
import torch
from pictures import write

import msun
from cka_probe import Report, probe
from cka_probe.cli import main as cli
from cka_probe.models.load import load_model
from msun.cli import main as msun_cli

# Rows of a CNN's map as time steps.
READER = '''
import torch
from torch import nn

class Reader(nn.Module):
    """A line of text: CNN features, column by column, through an LSTM."""

    def __init__(self, width):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.Conv2d(width, width, 3, 2, padding=1), nn.ReLU(True),
        )
        self.lstm = nn.LSTM(width, 7, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(14, 10)

    def forward(self, x):
        steps = self.cnn(x).mean(2).transpose(1, 2)
        out, (hidden, _) = self.lstm(steps)
        return self.fc(out)

def make(width=6):
    return Reader(width)
'''

# Outputs as those of Hugging Face: an OrderedDict that is a dataclass, also inside the network.
FACE = """
from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
from torch import nn

class ModelOutput(OrderedDict):
    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        return tuple(self[key] for key in self)

@dataclass
class EncoderOutput(ModelOutput):
    last_hidden_state: torch.Tensor = None
    hidden_states: tuple = None

@dataclass
class ClassifierOutput(ModelOutput):
    loss: torch.Tensor = None
    logits: torch.Tensor = None
    hidden_states: tuple = None

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.act = nn.GELU()

    def forward(self, hidden_state):
        return hidden_state + self.b(self.act(self.a(hidden_state)))

class Encoder(nn.Module):
    def __init__(self, c, depth):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(depth))

    def forward(self, hidden_state, output_hidden_states=False, return_dict=True):
        kept = () if output_hidden_states else None
        for layer in self.layers:
            if output_hidden_states:
                kept = kept + (hidden_state,)
            hidden_state = layer(hidden_state)
        if not return_dict:
            return tuple(v for v in [hidden_state, kept] if v is not None)
        return EncoderOutput(last_hidden_state=hidden_state, hidden_states=kept)

class ForClassification(nn.Module):
    def __init__(self, c=4, depth=3):
        super().__init__()
        self.embedder = nn.Conv2d(3, c, 3, 2)
        self.encoder = Encoder(c, depth)
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(c, 10))

    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None):
        if pixel_values is None:
            raise ValueError("you have to give pixel_values")
        asked = bool(output_hidden_states)
        out = self.encoder(self.embedder(pixel_values), output_hidden_states=asked)
        logits = self.classifier(self.pooler(out[0]))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)

def make():
    return ForClassification()
"""
TAPPED = {
    "reader.py": ["cnn.2", "cnn.4", "lstm:0", "lstm:1.0", "lstm:1.1"],
    "face.py": ["embedder", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "reader.py").write_text(READER)
    (folder / "face.py").write_text(FACE)
    g = np.random.default_rng(0)
    for k, path in enumerate(sorted(write(folder / "photos", 12, (20, 20)).rglob("*.png"))):
        from PIL import Image

        Image.fromarray(g.integers(0, 256, (20 + k, 20, 3), dtype=np.uint8)).save(path)
    yield folder
    for name in [n for n in sys.modules if n.endswith(("_reader", "_face")) and n[0] == "_"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", TAPPED)
def test_run_and_layers(place, tmp_path, capsys, name):
    spec = f"{place / name}:make"
    assert cli.main(["layers", "--model", spec, "--size", "16"]) == 0
    said = capsys.readouterr().out
    assert all(label in said for label in TAPPED[name])
    words = ["run", "--model", spec, "--data", str(place / "photos"), "--scales", "12,16",
             "--batch-size", "6", "--quiet", "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(words) == 0
    report = Report.load(tmp_path / "out" / "report.npz")
    assert report.layers_of("16") == TAPPED[name]
    assert np.isfinite(report.cka).all()
    assert report.meta["model"]["name"] == f"{name}:make"
    assert str(place) not in str(report.meta)


def outputs(name, model, x):
    """What the labels name, by calling the parts."""
    with torch.no_grad():
        if name == "reader.py":
            first = model.cnn[:3](x)
            second = model.cnn[3:](first)
            out, (hidden, cell) = model.lstm(second.mean(2).transpose(1, 2))
            return [first, second, out, hidden.transpose(0, 1), cell.transpose(0, 1)]
        values = [model.embedder(x)]
        for layer in model.encoder.layers:
            values.append(layer(values[-1]))
        return values


@pytest.mark.parametrize("name", TAPPED)
def test_values_equal_the_oracle(place, name):
    model = load_model(f"{place / name}:make").model
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    report = probe(model, x, [16], estimator="exact", progress=False)
    values = [v.flatten(1).double().numpy() for v in outputs(name, model, x)]
    expected = [[oracle.cka(a, b) for b in values] for a in values]
    np.testing.assert_allclose(report.between("16", "16"), expected, atol=1e-5)


def test_fields_of_outputs(place):
    model = load_model(f"{place / 'face.py'}:make").model
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given = {"layers": ["encoder", "(model)"], "estimator": "exact", "progress": False}
    report = probe(model, x, [16], **given)
    assert report.layers_of("16") == ["encoder:last_hidden_state", "(model):logits"]
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
        values = [model.encoder.layers[-1](out.hidden_states[-1]), out.logits]
    expected = oracle.cka(*(v.flatten(1).double().numpy() for v in values))
    assert abs(report.between("16", "16").iloc[0, 1] - expected) < 1e-5


def test_arguments_of_the_callable(place, tmp_path):
    spec, photos = f"{place / 'reader.py'}:make", str(place / "photos")
    words = ["run", "--model", spec, "--model-arg", "width=9", "--data", photos, "--quiet",
             "--batch-size", "6", "--scales", "12,16", "--overwrite",
             "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(words) == 0
    report = Report.load(tmp_path / "report.npz")
    assert report.meta["layers"]["cnn.2"]["views"]["16"]["shape"] == [9, 16, 16]


CUTS = {
    "reader.py": ["cnn.0", "cnn.1", "cnn.2", "cnn.3", "cnn"],
    "face.py": ["embedder", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "pooler"],
}


@torch.no_grad()
@pytest.mark.parametrize("name", CUTS)
def test_cut(place, capsys, name):
    spec = f"{place / name}:make"
    model = load_model(spec).model
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert msun.cut_points(model, x) == CUTS[name]
    for at in CUTS[name]:
        head, tail = msun.cut(model, at, x)
        wanted, got = model(x), tail(head(x))
        assert type(got) is type(wanted)
        if name == "face.py":
            assert list(got) == list(wanted) == ["logits"]
            wanted, got = wanted.logits, got.logits
        assert torch.equal(wanted, got)
    assert msun_cli.main(["cuts", "--model", spec, "--size", "16"]) == 0
    said = capsys.readouterr().out
    assert all(at in said for at in CUTS[name])
