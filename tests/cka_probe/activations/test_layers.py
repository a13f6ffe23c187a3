"""Layer selection by every way of asking, and the default blocks of real architectures."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cka_probe.activations.layers import (
    ROOT,
    Selection,
    default_layers,
    module_paths,
    select_layers,
    unwrap,
)


class Block(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    """A small ResNet of functional ReLUs, with a shared module and a module under two names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), Block())
        self.layer2.add_module("again", self.layer1[0])
        self.fc = nn.Linear(4, 2)
        self.stem = self.conv1

    def forward(self, x):
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


def paths(model: nn.Module, layers) -> list[str]:
    return [selection.path for selection in select_layers(model, layers)]


@pytest.fixture(scope="module")
def net():
    return Net()


def walk(module: nn.Module, prefix: str = ""):
    """Every name by plain recursion, shared modules as often as they are named."""
    yield prefix, module
    for name, child in module._modules.items():
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def test_every_name_leads_to_its_module_and_every_module_has_one_path(net):
    modules, names = module_paths(net)
    for name, module in walk(net):
        assert modules[names[name]] is module
    assert len({id(module) for module in modules.values()}) == len(modules)
    assert names["stem"] == "conv1"
    assert names["layer2.again.bn1"] == "layer1.0.bn1"
    for name in names:
        if name:
            assert select_layers(net, name) == [Selection(names[name])]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("conv1", ["conv1"]),
        ("stem", ["conv1"]),
        (["layer2.0", "conv1", "layer2.0"], ["conv1", "layer2.0"]),
        ("layer1.*", ["layer1.0", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2",
                      "layer1.1", "layer1.1.conv1", "layer1.1.bn1", "layer1.1.conv2"]),
        ("l*1.bn?", ["layer1.1.bn1", "layer2.1.bn1"]),
        ("layer[12].1", ["layer1.1", "layer2.1"]),
        ("layer2.again*1", ["layer1.0.conv1", "layer1.0.bn1"]),
        (r"re:layer\d\.\d", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        (r"re:bn1", ["bn1"]),
        (nn.BatchNorm2d, ["bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer2.1.bn1"]),
        ([nn.Linear, Block], ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"]),
        (lambda name, module: "2" in name and isinstance(module, Block), ["layer2.0", "layer2.1"]),
        ({"fc": 1}, ["fc"]),
        (iter(["fc", "bn1"]), ["bn1", "fc"]),
        ("", [""]),
        (ROOT, [""]),
        ([ROOT, "fc"], ["", "fc"]),
    ],
)  # fmt: skip
def test_ways_of_asking(net, layers, expected):
    assert paths(net, layers) == expected


def test_star_is_everything_but_the_network_itself(net):
    everything = [name for name, _ in net.named_modules() if name]
    assert paths(net, "*") == everything
    assert paths(net, "re:.*") == everything
    assert paths(net, nn.Module) == everything
    assert paths(net, lambda name, module: True) == everything


def test_a_module_of_the_network(net):
    assert paths(net, net.layer2[1].bn1) == ["layer2.1.bn1"]
    assert paths(net, [net.stem, net]) == ["", "conv1"]
    assert paths(net, net.layer1) == ["layer1"]  # a Sequential is one module, not a list of them
    with pytest.raises(ValueError, match=r"^no layer matches: Conv2d: the network has modules of"):
        select_layers(net, nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("fc:out", [Selection("fc", "out")]),
        ("fc:a.b", [Selection("fc", "a.b")]),
        ("fc#2", [Selection("fc", None, 2)]),
        ("fc:1#0", [Selection("fc", "1", 0)]),
        ("layer?:1", [Selection("layer1", "1"), Selection("layer2", "1")]),
        ("layer2.again#1", [Selection("layer1.0", None, 1)]),
        (["fc:1", "fc:0"], [Selection("fc", "0"), Selection("fc", "1")]),
        (["fc:1", "fc"], [Selection("fc")]),
        (["fc#1", "fc#0"], [Selection("fc", None, 0), Selection("fc", None, 1)]),
        ("(model):out", [Selection("", "out")]),
    ],
)
def test_suffixes(net, layers, expected):
    assert select_layers(net, layers) == expected


def test_a_name_that_looks_like_a_suffix_is_a_name_first():
    odd = nn.ModuleDict({"a": nn.ReLU(), "a:1": nn.ReLU(), "a#0": nn.ReLU(), "b[1]": nn.ReLU()})
    assert paths(odd, ["a:1", "a#0", "b[1]"]) == ["a:1", "a#0", "b[1]"]
    assert select_layers(odd, "a#1") == [Selection("a", None, 1)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer9.*", r"unknown layer: 'layer9\.\*': did you mean 'layer[12]\.[01]'"),
        ("layr1.0.bn1", r"unknown layer: 'layr1\.0\.bn1': did you mean 'layer1\.0\.bn1'"),
        (["conv1", "bn9"], r"unknown layer: 'bn9': did you mean .*'bn1'"),
        ("zzzz", r"unknown layer: 'zzzz': the network has 'conv1', 'bn1', 'layer1', "),
        ("layer1.7:out", r"unknown layer: 'layer1\.7:out': did you mean 'layer1\.[01]"),
        ("re:layer", r"unknown layer: 're:layer': did you mean 'layer"),
        ("re:lay(er", r"bad pattern: 're:lay\(er': .*"),
        ("CONV1", r"unknown layer: 'CONV1': "),
        ([], r"no layers: \[\]: "),
        ((), r"no layers: \[\]: "),
        (nn.Conv3d, r"no layer matches: Conv3d: the network has modules of BatchNorm2d, Block, "),
        (lambda name, module: False, r"no layer matches: <lambda>: the network has modules of "),
    ],
)
def test_what_matches_nothing_is_an_error_with_near_names(net, layers, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        select_layers(net, layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [3, [3], int, [None], 2.5])
def test_no_way_to_name_a_layer(net, layers):
    with pytest.raises(TypeError, match=r"^no way to name a layer: \w+: use "):
        select_layers(net, layers)


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match=r"^no network: str: give an nn\.Module"):
        unwrap("resnet18")


def test_wrappers_are_taken_off(net):
    wrapped = nn.DataParallel(net)
    assert unwrap(wrapped) is net
    assert paths(wrapped, "layer1.0") == ["layer1.0"]
    with pytest.raises(TypeError, match=r"^hooks do not fire .*: '0', a DataParallel: give"):
        select_layers(nn.Sequential(wrapped), "*")


def test_a_compiled_network_is_taken_out_of_its_wrapper(net):
    OptimizedModule = type("OptimizedModule", (nn.Module,), {})  # as torch.compile makes it
    wrapped = OptimizedModule()
    wrapped._orig_mod = net
    assert unwrap(wrapped) is net
    whole = Net()
    whole.layer1._compiled_call_impl = lambda x: x  # as `.compile()` leaves it
    with pytest.raises(TypeError, match=r"^hooks do not fire .*: 'layer1', a Sequential"):
        unwrap(whole)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_and_its_inside_is_not_offered():
    script = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match=r"^hooks do not fire .*: '\(model\)', a TopLevelTraced"):
        select_layers(script)
    around = nn.Sequential(nn.Conv2d(3, 3, 1), script)
    assert paths(around, "*") == ["0", "1"]


def test_parametrizations_are_not_offered():
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU())
    assert paths(model, "*") == ["0", "1"]
    assert default_layers(model) == ["1"]


def test_none_is_the_default(net):
    assert paths(net, None) == default_layers(net)
    assert default_layers(net) == ["bn1", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def spelled(text: str) -> list[str]:
    """Names apart by spaces; "a.{1,2}" is "a.1 a.2", and {0-3} counts."""
    found = []
    for word in text.split():
        stem, _, rest = word.partition("{")
        parts = rest.removesuffix("}").split(",")
        if match := re.fullmatch(r"(\d+)-(\d+)", parts[0]):
            parts = [str(number) for number in range(int(match[1]), int(match[2]) + 1)]
        found += [stem + part for part in parts]
    return found


RESNET50 = spelled("maxpool layer1.{0-2} layer2.{0-3} layer3.{0-5} layer4.{0-2}")
EXPECTED = {
    "resnet50": RESNET50,
    "vgg16_bn": spelled("features.{2,6,9,13,16,19,23,26,29,33,36,39,43}"),
    "alexnet": spelled("features.{2,5,7,9,12}"),
    "mobilenet_v2": spelled("features.{0-18}"),
    "mobilenet_v3_small": spelled("features.{0-12}"),
    "densenet121": spelled(
        "features.{pool0,denseblock1,transition1,denseblock2,transition2,denseblock3,transition3,"
        "denseblock4,norm5}"
    ),
    "squeezenet1_1": spelled("features.{2,3,4,6,7,9,10,11,12}"),
    "googlenet": spelled("conv{1-3} inception{3a,3b,4a,4b,4c,4d,4e,5a,5b}"),
    "inception_v3": spelled(
        "Conv2d_{1a_3x3,2a_3x3,2b_3x3,3b_1x1,4a_3x3} Mixed_{5b,5c,5d,6a,6b,6c,6d,6e,7a,7b,7c}"
    ),
    "vit_b_32": spelled("conv_proj encoder.layers.encoder_layer_{0-11} encoder.ln"),
    "swin_t": spelled(
        "features.0 features.1.{0-1} features.2 features.3.{0-1} features.4 features.5.{0-5} "
        "features.6 features.7.{0-1} norm"
    ),
    "convnext_tiny": spelled(
        "features.0 features.1.{0-2} features.2 features.3.{0-2} features.4 features.5.{0-8} "
        "features.6 features.7.{0-2}"
    ),
    "deeplabv3_resnet50": [f"backbone.{n}" for n in RESNET50] + spelled("classifier.{0,3,4}"),
    "deeplabv3_mobilenet_v3_large": spelled("backbone.{0-16} classifier.{0,3,4}"),
}


def on_meta(name: str) -> nn.Module:
    more = {"weights_backbone": None} if "lab" in name else {}
    if name in ("googlenet", "inception_v3"):
        more["init_weights"] = False
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **more)


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of_torchvision(name):
    assert default_layers(on_meta(name)) == EXPECTED[name]


STAGES_OF_FOUR = "stages.0 stages.1 stages.1.downsample stages.2 stages.3 stages.3.blocks.1"
TIMM = {  # among the blocks are these, and these are not
    "resnet50": (spelled("act1 maxpool layer1.{0-2} layer4.2"), ["layer1", "fc", "global_pool"]),
    "mobilenetv2_100": (spelled("bn1 blocks.0.0 blocks.3.{0-3} bn2"), ["blocks.0", "conv_stem"]),
    "vit_tiny_patch16_224": (spelled("patch_embed blocks.{0-11} norm"), ["blocks"]),
    "regnety_002": (spelled("stem s1 s2 s3 s3.b{1-4} s4 s4.b{1-7}"), ["s1.b1"]),
    "convnext_atto": (spelled(f"stem {STAGES_OF_FOUR}"), ["head"]),
    "swin_tiny_patch4_window7_224": (spelled("patch_embed layers.0.blocks.{0-1} norm"), ["head"]),
    "densenet121": (spelled("features.pool0 features.denseblock1 features.norm5"), ["features"]),
    "efficientnet_b0": (spelled("bn1 blocks.0.0 blocks.6.0 bn2"), ["blocks.0", "classifier"]),
}


@pytest.mark.parametrize("name", TIMM)
def test_blocks_and_stages_of_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    found, (among, absent) = default_layers(model), TIMM[name]
    assert set(among) <= set(found)
    assert not set(found) & set(absent)
    modules = dict(model.named_modules())
    for info in model.feature_info:  # every stage is there, or the last block of it
        stage = modules[info["module"]]
        same = {id(stage)}
        while type(stage) is nn.Sequential:
            stage = stage[-1]
            same.add(id(stage))
        assert same & {id(modules[path]) for path in found}, info


class Nothing(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 2), [""]),
        (Nothing(), [""]),
        (nn.Sequential(nn.Linear(3, 2)), ["0"]),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 2), nn.ReLU())), ["1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), ["2"]),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), ["1", "3"]),
        (nn.ModuleDict({"fc": nn.Linear(3, 2)}), ["fc"]),
        (nn.ModuleDict({"fc": nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))}),
         ["fc.1"]),
        (nn.Sequential(nn.LayerNorm(3), nn.ReLU()), ["1"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["0"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(), nn.LSTM(4, 5)), ["1", "3"]),
        (nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU()), ["1"]),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), ["0"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_small_networks_are_never_left_without_a_layer(model, expected):
    assert default_layers(model) == expected


def test_a_shared_module_is_a_tap_under_its_first_path_only():
    shared = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model = nn.Sequential(shared, Block(), shared)
    assert default_layers(model) == ["0", "1"]


HUGE = ("16gf", "32gf", "128gf")  # RegNets are built on the CPU
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if not n.endswith(HUGE)])
def test_every_torchvision_classifier_has_blocks_and_no_head(name):
    try:
        model = on_meta(name)
    except NotImplementedError:  # RegNet computes its widths with tensors
        model = torchvision.models.get_model(name, weights=None)
    found = default_layers(model)
    assert 5 <= len(found) <= 90
    assert not [
        name for name in found if re.match(r"(avgpool|head|fc|classifier|aux)", name.lower())
    ]
