import logging
import pickle
import sys
import urllib.error
import urllib.request
import warnings

import pytest
import timm
import torch
from networks import refused, same, write_net
from torch import nn
from torchvision import models as torchvision_models

from cka_probe.models.load import load_model, parse_model_args


@pytest.fixture
def net(tmp_path):
    return write_net(tmp_path)


def test_random_weights_are_those_of_the_seed_and_the_global_state_stays():
    torch.manual_seed(4)
    want = torchvision_models.squeezenet1_1().state_dict()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    loaded = load_model("squeezenet1_1", "none", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(loaded.model, want)
    assert not same(load_model("squeezenet1_1", "none", seed=5).model, want)
    assert not loaded.model.training
    assert (loaded.name, loaded.weights, loaded.sha256) == ("squeezenet1_1", "none", None)
    assert (loaded.mean, loaded.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (loaded.preprocessing, loaded.input_size) == ("torchvision weights", 224)


@pytest.mark.parametrize(
    ("name", "mean", "size"),
    [
        ("inception_v3", 0.485, 299),
        ("googlenet", 0.485, 224),
        ("ssdlite320_mobilenet_v3_large", 0.0, None),  # normalises by itself
        ("lraspp_mobilenet_v3_large", 0.485, None),
    ],
)
def test_odd_torchvision_networks_build_without_warnings_or_network(monkeypatch, name, mean, size):
    def no_network(*args, **kwargs):
        raise AssertionError("weights are fetched")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(name, "none")
    assert (loaded.mean[0], loaded.input_size) == (mean, size)


def test_timm_brings_its_own_configuration():
    loaded = load_model("timm:vit_tiny_patch16_224", "none", model_args={"num_classes": 3})
    assert (loaded.name, loaded.input_size) == ("timm:vit_tiny_patch16_224", 224)
    assert (loaded.mean, loaded.preprocessing) == ((0.5, 0.5, 0.5), "timm cfg")
    assert loaded.model.num_classes == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet19", "'resnet18'"),
        ("mobilenetv2_100", "did you mean 'timm:mobilenetv2_100'?"),
        ("timm:mobilenetv2_10", "'timm:mobilenetv2_100'"),
        ("qqqqqq", "give a torchvision name, timm:NAME, glyphnet or path/to/file.py:callable"),
        ("net.py", "path/to/file.py:callable"),
        ("", "path/to/file.py:callable"),
    ],
)
def test_an_unknown_model_gets_near_names(name, hint):
    text = refused(name, "none")
    assert text.startswith(f"unknown model: {name!r}: ")
    assert hint in text


def test_without_timm_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    text = refused("timm:resnet18", "none")
    assert text == "timm is not installed: 'timm:resnet18': pip install timm"
    assert "'resnet18'" in refused("resnet19", "none")


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
def test_arguments_that_the_builder_refuses(name):
    text = refused(name, "none", model_args={"foo": 1})
    assert text.startswith(f"cannot build the model: {name!r}: TypeError (")
    assert "'foo'" in text
    assert text.endswith("check --model and --model-arg")


def test_default_weights_without_a_network_offer_the_other_two(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert refused("squeezenet1_1") == (
        "cannot get the default weights: 'squeezenet1_1': name or service not known; "
        "give --weights FILE, or none for random ones"
    )


def test_hub_errors_of_timm_are_one_line_and_its_loggers_are_quiet(monkeypatch, caplog):
    class HubError(Exception):
        pass

    def no_network(name, *, pretrained, **kwargs):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise HubError("cannot find the file:\nCheck your connection.")

    monkeypatch.setattr(timm, "create_model", no_network)
    text = refused("timm:resnet18")
    assert "HubError (cannot find the file, Check your connection)" in text
    assert "give --weights FILE" in text
    assert not caplog.records
    logging.getLogger("x").warning("heard again")
    assert len(caplog.records) == 1


def test_default_weights_are_named_and_asked_for(monkeypatch):
    asked = {}

    def fetch(self, *args, **kwargs):
        asked[self.name] = kwargs
        return torchvision_models.squeezenet1_1().state_dict()

    enum = torchvision_models.SqueezeNet1_1_Weights
    monkeypatch.setattr(enum, "get_state_dict", fetch)
    assert load_model("squeezenet1_1").weights == "DEFAULT:IMAGENET1K_V1"
    assert list(asked) == ["IMAGENET1K_V1"]


def test_a_callable_is_built_with_its_arguments(net):
    loaded = load_model(net, "none", model_args={"width": 6}, seed=1)
    assert loaded.model[0].out_channels == 6
    assert (loaded.name, loaded.weights) == ("net.py:make", "none")
    assert (loaded.preprocessing, loaded.input_size) == ("ImageNet", None)
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert not loaded.model.training
    assert load_model(net).weights == "DEFAULT:as built"
    assert same(load_model(net, seed=1).model, load_model(net, seed=1).model.state_dict())


def test_a_network_that_stands_in_the_file_will_do(net):
    assert isinstance(load_model(net.replace("make", "ready")).model, nn.Linear)


def test_minus_infinity_may_stand_in_a_buffer_and_classes_can_be_pickled(net):
    model = load_model(net.replace("make", "Net")).model
    assert torch.equal(pickle.loads(pickle.dumps(model)).mask, model.mask)


def test_twins_with_siblings_of_one_name_do_not_mix(tmp_path):
    for version, width in (("old", 3), ("new", 5)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "parts.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / version / "net.py").write_text(
            "from torch import nn\nimport parts\n"
            "def make():\n    import parts as late\n    return nn.Linear(late.WIDTH, parts.WIDTH)\n"
        )
    paths, modules = list(sys.path), set(sys.modules)
    for version, width in (("old", 3), ("new", 5)):
        model = load_model(str(tmp_path / version / "net.py") + ":make").model
        assert model.weight.shape == (width, width)
    assert sys.path == paths
    assert "parts" not in sys.modules
    assert all(name.startswith("_model_") for name in set(sys.modules) - modules)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def make(:", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("raise RuntimeError('a: b')", "RuntimeError (a, b)"),
        ("import sys; sys.exit(2)", "SystemExit (2)"),
    ],
)
def test_a_file_that_cannot_be_imported_leaves_nothing_behind(tmp_path, source, reason):
    (tmp_path / "net.py").write_text(source)
    paths, modules = list(sys.path), set(sys.modules)
    text = refused(str(tmp_path / "net.py") + ":make")
    assert text.startswith("cannot import model file: 'net.py': ")
    assert reason in text
    assert (sys.path, set(sys.modules)) == (paths, modules)


def test_what_is_wrong_with_a_callable_is_said(net, tmp_path):
    assert "it has make" in refused(net.replace("make", "maka"))
    assert refused(net.replace("make", "number"), error=TypeError) == (
        "no network: 'net.py:number' gave int: return an nn.Module"
    )
    text = refused(net.replace("make", "broken"))
    assert "'net.py:broken': RuntimeError (first, second third)" in text
    assert "foo" in refused(net, model_args={"foo": 1})
    assert refused(str(tmp_path / "no.py") + ":make").startswith("no such model file: ")


def test_a_model_file_and_its_errors_never_show_their_folder(net, tmp_path):
    assert str(tmp_path) not in refused(net, model_args={"foo": 1})
    assert str(tmp_path) not in load_model(net).name


def test_model_arguments_are_literals_or_text():
    pairs = ["pad_type=same", "channel_multiplier=0.25", "a=None", "b=[1, 2]", "c=x=y", "d="]
    assert parse_model_args(pairs) == {
        "pad_type": "same", "channel_multiplier": 0.25, "a": None, "b": [1, 2], "c": "x=y", "d": "",
    }  # fmt: skip
    assert parse_model_args([]) == {}


@pytest.mark.parametrize("pairs", [["a"], ["=3"], ["a-b=3"], ["1a=3"], ["a=1", "a=2"]])
def test_bad_model_arguments(pairs):
    with pytest.raises(ValueError, match=r"^bad model argument: '.*': write KEY=VALUE"):
        parse_model_args(pairs)


def test_the_embedded_network_by_name():
    from cka_probe.models.embedded import glyphnet

    loaded = load_model("glyphnet")
    assert (loaded.name, loaded.input_size, loaded.weights) == (
        "glyphnet", 64, "DEFAULT:the package's own",
    )  # fmt: skip
    trained = glyphnet().state_dict()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, trained[key])
    torch.manual_seed(5)
    expected = glyphnet(trained=False).state_dict()["fc.weight"]
    random = load_model("glyphnet", "none", seed=5)
    assert torch.equal(random.model.state_dict()["fc.weight"], expected)
    image = torch.rand(3, 4, 4)  # 0..1, as decoded; the glyphs lie in -1..1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.mean, loaded.std))
    torch.testing.assert_close((image - mean) / std, image * 2 - 1)


def test_a_wrong_name_in_a_file_is_offered_what_makes_networks_there(tmp_path):
    """Not what the file imports: those are no choices."""
    (tmp_path / "own.py").write_text(
        "from collections import OrderedDict\nfrom functools import partial, wraps\n"
        "from torch import nn\nfrom torch.nn import Linear\nfrom torchvision.models import vgg11\n"
        "class Nope2(nn.Module):\n    pass\nclass Plain:\n    pass\n"
        "def build():\n    return Nope2()\nready = nn.ReLU()\n"
    )
    with pytest.raises(ValueError, match="no such callable in the file: ") as caught:
        load_model(f"{tmp_path / 'own.py'}:zzz")
    assert str(caught.value).endswith(": it has Nope2, build, ready")
