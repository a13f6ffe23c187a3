"""A trained network gets a classifier for other classes; the rest stays as it was."""

import re

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import msun
from cka_probe.models.load import load_model
from msun.cli.main import main
from msun.cutting.cuts import example_images

NETS = {
    "resnet18": "fc", "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3",
    "vgg11_bn": "classifier.6", "densenet121": "classifier", "googlenet": "fc",
    "timm:mobilenetv3_small_050": "classifier", "timm:test_resnet": "fc",
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_only_the_last_layer_is_new(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = load_model(name, "none").model
    made = msun.replace_classifier(model, 7)
    own, new = model.state_dict(), made.state_dict()
    assert own.keys() == new.keys()
    changed = {key.rpartition(".")[0] for key in own if not torch.equal(own[key], new[key])}
    assert changed == {NETS[name]}
    assert made.training == model.training
    with torch.no_grad():
        x = example_images(model, 96)
        assert made(x).shape == (2, 7)
        assert model(x).shape == (2, 1000)


def test_the_seed_draws_it_and_the_global_state_is_left():
    model = torchvision.models.resnet18()
    state = torch.get_rng_state()
    one, again, other = (msun.replace_classifier(model, 3, seed=s).fc.weight for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_refused_where_there_is_none():
    tokens = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"^no classifier to replace: Sequential does not end"):
        msun.replace_classifier(tokens, 3)
    with pytest.raises(ValueError, match=r"^bad number of classes: 0: "):
        msun.replace_classifier(tokens, 0)


@pytest.fixture
def place(tmp_path):
    """Weights with 1,000 classes, and a folder of 3 classes."""
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for k in range(3):
        (tmp_path / "data" / f"class{k}").mkdir(parents=True)
        for i in range(6):
            level = 80 * k + i
            image = Image.new("RGB", (40, 40), (level, 255 - level, level))
            image.save(tmp_path / "data" / f"class{k}" / f"{i}.png")
    return tmp_path


def test_the_commands_of_the_readme_fit_a_folder_of_ones_own(place, capsys):
    words = [
        "train", "--model", "squeezenet1_1", "--weights", str(place / "w.pt"), "--at", "features.4",
        "--scales", "24,40", "--data", str(place / "data"), "--out", str(place / "run"),
        "--epochs", "1", "--batch-size", "6",
    ]  # fmt: skip
    assert main(words) == 2
    said = capsys.readouterr().err
    (way,) = re.findall(r"--classes \d+", said)
    assert main([*words, *way.split()]) == 0
    net = msun.load(place / "run" / "model.pt")
    assert net.num_classes == 3
    assert net.spec["new_head"] == 3
    trained = torch.load(place / "w.pt", weights_only=True)["features.0.weight"]
    assert not torch.equal(net.subnets["40"].state_dict()["features.0.weight"], trained)
    rows = ["eval", str(place / "run" / "model.pt"), "--data", str(place / "data")]
    assert main([*rows, "--sizes", "24,40", "--out", str(place / "eval")]) == 0
