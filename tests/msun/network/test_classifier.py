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


class Cosine(nn.Linear):
    """A cosine classifier: a class of its own, with a parameter of its own."""

    def __init__(self, d, n):
        super().__init__(d, n, bias=False)
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x):
        normalize = nn.functional.normalize
        return self.scale * nn.functional.linear(normalize(x), normalize(self.weight))


class Prototypes(nn.Linear):
    """Without a way to draw its weights."""

    reset_parameters = None

    def __init__(self, d, n):
        nn.Module.__init__(self)
        self.in_features, self.out_features = d, n
        self.weight, self.bias = nn.Parameter(torch.randn(n, d)), None
        self.register_buffer("counts", torch.arange(n))


def ending_in(head):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    ).eval()  # fmt: skip


HEADS = {
    "cosine": lambda: Cosine(8, 10),
    "prototypes": lambda: Prototypes(8, 10),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 10)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 10)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(8, 10)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 10)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("classes", [3, 10, 17])
@pytest.mark.parametrize("kind", HEADS)
def test_a_classifier_of_another_kind_keeps_its_kind(kind, classes):
    model = ending_in(HEADS[kind]())
    made = msun.replace_classifier(model, classes)
    old, new = model[4], made[4]
    assert type(new).__name__ == type(old).__name__
    assert set(new.state_dict()) == set(old.state_dict())
    assert len(new._forward_pre_hooks) == len(old._forward_pre_hooks)
    assert (new.in_features, new.out_features) == (8, classes)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = made(x)
        assert out.shape == (2, classes)
        if kind == "cosine":
            assert float(out.abs().max()) <= 16.001
        if "spectral" in kind:
            made.train()
            for _ in range(100):  # the power iteration of the new rows converges
                made(x)
            assert float(torch.linalg.matrix_norm(new.weight, 2)) == pytest.approx(1, abs=0.05)
    assert model(x).shape == (2, 10)
    made.train()(x).sum().backward()
    assert made[0].weight.grad is not None


class TwoHeads(nn.Module):
    """As the distilled networks of timm: the mean of two classifiers."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(3, 10, 3), nn.Linear(10, 10)
        self.head, self.head_dist = nn.Linear(10, 10), nn.Linear(10, 10)
        self.num_classes = 10

    def forward(self, x):
        x = self.hidden(self.conv(x).mean((2, 3)))
        return (self.head(x) + self.head_dist(x)) / 2


@pytest.mark.parametrize("name", ["timm:levit_128s", "timm:deit_tiny_distilled_patch16_224"])
def test_both_classifiers_of_a_distilled_network_are_new(name):
    pytest.importorskip("timm")
    model = load_model(name, "none").model
    for classes in (1, 7):
        made = msun.replace_classifier(model, classes)
        with torch.no_grad():
            assert made.eval()(torch.randn(2, 3, 224, 224)).shape == (2, classes)
        assert made.num_classes == classes


def test_what_fails_with_a_new_classifier_is_refused():
    """Its hidden layer has as many outputs as there are classes: it would have to be new, too."""
    words = r"^classifier cannot be replaced: hidden, head, head_dist of TwoHeads, with which its "
    with pytest.raises(ValueError, match=words) as caught:
        msun.replace_classifier(TwoHeads(), 3)
    assert "\n" not in str(caught.value)
    net = ending_in(nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10)))
    with pytest.raises(ValueError, match=r"^classifier cannot be replaced: 4.0 of Sequential"):
        msun.replace_classifier(net, 3)
