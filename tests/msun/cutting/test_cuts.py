"""Cutting a network: tail(head(x)) is model(x), to the bit, and both hold each parameter once."""

import copy
from collections import OrderedDict

import pytest
import torch
import zoo
from cut_laws import assert_law, assert_same, noise
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import msun
from msun.cutting.cuts import find_cuts

# A few of the sweep over all architectures. Name: (side, another side)
DIVERSE = {
    "resnet18": (64, 75), "mobilenet_v2": (64, 75), "squeezenet1_1": (64, 75),
    "googlenet": (64, 96), "shufflenet_v2_x0_5": (64, 75), "swin_t": (32, 48),
    "lraspp_mobilenet_v3_large": (64, 75), "deeplabv3_mobilenet_v3_large": (64, 75),
    "timm:test_convnext": (64, 96), "timm:ghostnet_050": (64, 75), "timm:test_vit": (160, None),
    "timm:levit_128s": (224, None),
}  # fmt: skip


@torch.no_grad()
def assert_training_law(model, at, x):
    """In training mode, dropout drawn alike, on copies: batch norms move."""
    cut = copy.deepcopy(model).train()
    head, tail = msun.cut(cut, at, x)
    for mode in (True, False):
        for net in (model, head, tail):
            net.train(mode)
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        assert_same(tail(head(x)), wanted)


@pytest.mark.parametrize("name", DIVERSE)
def test_law_on_diverse_networks(name):
    model = zoo.build(name).eval()
    side, other = DIVERSE[name]
    x = noise(2, side)
    images = [x] if other is None else [x, noise(1, other)]
    cuts = msun.cut_points(model, x)
    assert len(set(cuts)) == len(cuts)
    for at in {cuts[len(cuts) // 3], cuts[-1]}:
        assert_law(model, at, *images)
    assert_training_law(model, cuts[len(cuts) // 2], x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2, self.relu = (
            nn.Conv2d(c, c, 3, padding=1),
            nn.Conv2d(c, c, 1),
            nn.ReLU(True),
        )
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x):
        return self.relu(self.bn(self.conv2(self.relu(self.conv1(x)))) + x)


class Bones(nn.Module):
    """What networks do outside their layers: functions, parameters, buffers, constants, sizes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4))
        self.body = nn.Sequential(Block(4), nn.Identity(), Block(4))
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.full((4, 1, 1), 0.5))
        self.register_buffer("index", torch.tensor([1, 0, 3, 2]), persistent=False)
        self.fc = nn.Linear(4, 5)
        self.cache = {}

    def forward(self, x):
        n = x.size(0)
        self.cache[str(n)] = x  # as some timm networks do
        x = F.relu(self.stem(x), inplace=True)
        x = self.body(x * self.scale + torch.tensor(2.0))
        x = self.drop(x[:, self.index] + self.shift * self.index.numel())
        return self.fc(
            F.adaptive_avg_pool2d(x, 1).view(n, self.scale.shape[0]) * self.index.size(0)
        )


class Sizes(nn.Module):
    """A segmenter, whose output has the input's size; a mask made for a size, in both halves."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        image, w = x, x.shape[-1]
        x = self.a(x)
        columns = torch.arange(x.shape[3], device=x.device) / w
        x = self.b(x * columns) * columns
        out = F.interpolate(x, image.shape[-2:]) + image.dim()
        return OrderedDict(out=out, kind=F.relu(out))


def test_functions_parameters_buffers_and_constants():
    model = Bones().eval()
    x = noise(3, 21)
    assert msun.cut_points(model, x) == ["stem.0", "stem", "body.0", "body", "drop"]
    for at in ("stem.0", "stem", "body.0", "body", "body.2", "body.2.relu", "drop"):
        head, tail = assert_law(model, at, x, noise(1, 30))
        assert not tail.needs_sizes
        assert_training_law(copy.deepcopy(model), at, x)
    head, tail = msun.cut(model, "body.0", x)
    assert {"shift", "unused.weight", "fc.weight"} <= tail.state_dict().keys()
    assert "index" not in tail.state_dict()
    assert "scale" in head.state_dict()


def test_a_shared_module_keeps_all_its_names():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.early, self.late = nn.ModuleList([norm, norm]), nn.Sequential(norm[1])
            self.spare, self.unused = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList()
            self.unused.append(self.spare[0])

        def forward(self, x):
            x = self.a(x)
            for norm in self.early:
                x = norm(x)
            return self.b(self.late(x))

    model, x = Twins().eval(), noise(2, 9)
    assert msun.cut_points(model, x) == ["a", "late"]
    for at in ("a", "late"):
        head, tail = assert_law(model, at, x)
        both = {**tail.state_dict(keep_vars=True), **head.state_dict(keep_vars=True)}
        assert both["early.0.0.weight"] is both["early.1.0.weight"]
        twin = copy.deepcopy(tail)
        assert len([*twin.parameters()]) == len([*tail.parameters()])
        assert_same(twin(head(x)), model(x))


def test_container_and_last_child_are_one_cut_listed_once_outermost():
    model = Bones().eval()
    cuts = {found.name: found for found in find_cuts(model, noise(2, 21))}
    assert {"stem", "stem.1"} <= set(cuts["stem"].names)
    assert {"body", "body.2", "body.2.relu"} <= set(cuts["body"].names)
    assert {"body.0", "body.0.relu", "body.1"} <= set(cuts["body.0"].names)  # and an identity
    assert cuts["body"].shape == (2, 4, 10, 10)
    assert cuts["stem"].parameters == 3 * 4 * 9 + 4 + 8


def test_sizes_are_carried_with_the_map():
    model = Sizes().eval()
    x, odd = noise(2, 21), noise(3, 22)
    head, tail = assert_law(model, "a", x, odd)
    assert tail.needs_sizes
    assert type(tail(head(x))) is OrderedDict
    z = head(odd)
    with pytest.raises(
        ValueError, match=r"needs sizes .*: \(3, 4, 10, 10\): call tail\(z, sizes\)"
    ):
        tail(z + 0)
    assert_same(tail(z + 0, z.cut_sizes), model(odd))
    assert_same(tail(head(odd[:1]) + 0, z.cut_sizes), model(odd[:1]))  # as many as the map has


def test_windows_in_the_first_axis_are_not_taken_for_images():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            n, c, h, w = self.a(x).shape
            y = self.a(x).reshape(n * 4, c, h // 2, w // 2)
            k = y.shape[0]
            y = self.c(self.b(y).reshape(n, c, h, w))
            return y.mean((1, 2, 3)) * k

    model = Windows().eval()
    assert msun.cut_points(model, noise(2, 8)) == ["a", "c"]  # after the second run of a
    for at in ("a", "c"):
        assert_law(model, at, noise(2, 8), noise(3, 10))


def test_in_place_layers_after_the_cut_leave_the_map_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 2, 1))
    assert_law(model.eval(), "1", noise(2, 9), noise(2, 12))  # also checks that z is as it was
    head, tail = msun.cut(model, "1")
    z = head(noise(2, 9)).detach().requires_grad_()
    tail(z).sum().backward()  # a leaf, which ReLU(True) could not overwrite
    assert z.grad is not None


def test_an_operation_that_is_only_done_in_place_stays():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(True)

        def forward(self, x):
            x = self.a(x)
            self.relu(x)
            x.add_(1)
            return self.b(x).mean((2, 3))

    model = Silent().eval()
    for at in msun.cut_points(model, noise(2, 9)):
        assert_law(model, at, noise(2, 9))
    assert "b" in msun.cut_points(model, noise(2, 9))
    with pytest.raises(ValueError, match="nothing is computed from it: cut after 'a' or 'b'"):
        msun.cut(model, "relu", noise(2, 9))


def test_the_network_is_as_it_was_and_shares_its_modules():
    model = Bones().train()
    model.stem.eval()
    x = noise(2, 21)
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    head, tail = msun.cut(model, "stem", x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert_same(dict(model.state_dict()), before)
    assert model.cache == {}
    assert head.training
    assert not head.get_submodule("stem").training
    assert head.get_submodule("stem.0") is model.stem[0]
    wanted = model.eval()(x)
    head.eval(), tail.eval()
    assert_same(tail(head(x)), wanted)


def test_gradients_are_those_of_the_network():
    model = Bones().eval()
    x = noise(2, 21)
    head, tail = msun.cut(copy.deepcopy(model), "body.0", x)
    model(x).square().sum().backward()
    tail(head(x)).square().sum().backward()
    gradients = {k: p.grad for k, p in [*head.named_parameters(), *tail.named_parameters()]}
    for name, p in model.named_parameters():
        assert p.grad is None if gradients[name] is None else torch.equal(p.grad, gradients[name])


def test_a_copy_is_its_own():
    model = Bones().eval()
    x = noise(2, 21)
    head, _ = msun.cut(model, "body.0", x)
    twin, wanted = copy.deepcopy(head), head(x)
    assert_same(twin(x), wanted)
    with torch.no_grad():
        twin.get_submodule("stem.0").weight.zero_()
    assert_same(head(x), wanted)
    assert not torch.equal(twin(x), wanted)
    twin.train()
    assert head.training is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_and_leaf_hooks_survive(dtype):
    model = Bones().eval().to(dtype)
    fired = []
    model.fc.register_forward_hook(lambda m, x, out: fired.append(1) or out * 2)
    head, tail = assert_law(model, "body", noise(2, 21).to(dtype))
    fired.clear()
    assert tail(head(noise(2, 21).to(dtype))).dtype == dtype
    assert fired == [1]


def test_parametrized_layers_keep_their_parameters():
    model = Bones().eval()
    parametrizations.weight_norm(model.stem[0])
    parametrizations.spectral_norm(model.fc)
    for at in ("stem.0", "body"):
        assert_law(model, at, noise(2, 21))


def test_a_module_that_looks_at_data_is_kept_whole():
    class Choosy(nn.Module):
        def forward(self, x):
            return x * 2 if x.mean() > 0 else -x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Choosy(), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    assert msun.cut_points(model, noise(2, 9)) == ["0", "1", "2"]
    assert_law(model, "1", noise(2, 9), -noise(2, 9))


def test_auxiliary_heads_and_their_outputs_in_training_mode():
    model = zoo.build("googlenet").eval()
    x = noise(2, 64)
    assert msun.cut_points(model, x)[-1] == "inception4a"
    assert_training_law(model, "maxpool1", x)
    with pytest.raises(ValueError, match="training mode later steps also need the output of 'aux2"):
        msun.cut(model, "inception5a", x)


def test_looking_at_a_network_in_training_touches_nothing_of_it():
    """Neither buffers of one value for many, nor what a backward pass still needs."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True), nn.Flatten(),
        nn.Linear(4 * 36, 2),
    ).eval()  # fmt: skip
    net.register_buffer("wide", torch.zeros(1).expand(5))
    before = {k: x.clone() for k, x in net.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    loss = net(x).sum()
    _, tail = msun.cut(net, "1", x)
    loss.backward()
    assert all(torch.equal(x, before[k]) for k, x in net.state_dict().items())
    z = torch.ones(2, 4, 6, 6)
    tail.train()(z)
    assert (z == 1).all()
