"""What `cut` and `cut_points` refuse: one line, what is wrong: the value: the way out."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msun


def noise(n=2, side=9, channels=3):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.never, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x, *, twice=False):
        x = self.stem(x)
        x = x + self.stages[1](F.relu(self.stages[0](x)))
        return self.fc((x * 2 if twice else x).mean((2, 3)))


def refusal(call, *args, error=ValueError):
    with pytest.raises(error) as caught:
        call(*args)
    text = str(caught.value)
    assert text.count(": ") == 2, text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("stage.0", "unknown module: 'stage.0': did you mean 'stages.0', 'stages.1', "),
        ("qqq", "unknown module: 'qqq': the network has 'stem', 'stages', 'never', 'fc'"),
        ("stages.0", "'stages.0', later steps also need the output of 'stem.1': cut after 'stem'"),
        (
            "stages",
            "'stages', it does not run in eval mode, or returns no tensor: cut after",
        ),
        ("never", "'never', it does not run in eval mode"),
        ("fc", r"'fc', its output for 2 images has the shape (2, 2), not (n, c, h, w): cut after"),
    ],
)
def test_no_cut_there(at, reason):
    assert reason in refusal(msun.cut, Residual(), at, noise())


def test_a_path_must_be_text():
    assert "no module path: int: " in refusal(msun.cut, Residual(), 3, error=TypeError)


def test_nothing_left_for_the_tail():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert msun.cut_points(model, noise()) == ["0"]
    assert "nothing is computed from it: cut after '0'" in refusal(msun.cut, model, "1", noise())


def test_nothing_before_the_cut():
    model = nn.Sequential(nn.Identity(), nn.Dropout(), nn.Conv2d(3, 4, 3), nn.Flatten())
    assert msun.cut_points(model, noise()) == ["2"]
    assert "returns the input unchanged" in refusal(msun.cut, model, "0", noise())


def test_a_parameter_on_both_sides():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            y = self.b(self.a(self.a(x) * self.scale))
            return (y * self.scale).mean((2, 3))

    text = refusal(msun.cut, Shared(), "b", noise())
    assert "'b', 'scale' is used before and after it: " in text
    tied = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)), nn.Flatten())
    tied[2].weight = tied[0].weight
    assert msun.cut_points(tied, noise()) == ["2"]
    assert "'0.weight' is used before and after" in refusal(msun.cut, tied, "1", noise())


def test_two_branches_all_the_way():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return (self.a(x) * self.b(x)).mean((2, 3))

    text = refusal(msun.cut_points, Branches(), noise())
    assert text.startswith("no valid cut: Branches, after 'a', the first of 2 4-D outputs, later ")
    assert "also need the input" in text
    assert ": this network has no valid cut" in refusal(msun.cut, Branches(), "a", noise())
    tokens = nn.Sequential(nn.Flatten(), nn.Linear(243, 2))
    assert "no module returns a 4-D map" in refusal(msun.cut_points, tokens, noise())


def test_an_output_without_the_image_in_it():
    class Table(nn.Module):
        def forward(self, n, h, w):
            return torch.ones(n, 4, h, w)

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 1), Table()

        def forward(self, x):
            n, _, h, w = x.shape
            return (self.conv(x) + self.table(n, h, w)).mean((2, 3))

    assert msun.cut_points(Added(), noise()) == ["conv"]
    text = refusal(msun.cut, Added(), "table", noise())
    assert "its output does not depend on the image" in text


def test_a_map_of_all_images_together():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(0, keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Mean(), nn.Flatten())
    for n in (1, 2):
        assert msun.cut_points(model, noise(n)) == ["0"]
        assert "has the shape (1, 4, 7, 7), not (n, c" in refusal(msun.cut, model, "1", noise(n))


def test_the_head_checks_what_the_network_checks():
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            torch._assert(x.shape[-1] % 2 == 0, "odd width")
            x = F.dropout(self.conv(x), training=True)  # as Monte Carlo dropout does
            return self.fc(x.mean((2, 3)))

    head, _ = msun.cut(Even(), "conv", noise(side=8))
    with pytest.raises(AssertionError, match="odd width"):
        head(noise(side=9))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_containers_are_named_and_do_not_fire(kind):
    model, fired = Residual(), []
    register = f"register_{kind}_hook"
    getattr(model.stages[0], register)(lambda *_: fired.append("leaf") and None)
    assert msun.cut_points(model, noise())
    fired.clear()
    handle = getattr(model.stem, register)(lambda *_: fired.append("container"))
    text = refusal(msun.cut_points, model, noise())
    assert text.startswith("a cut would lose the hooks of a container: 'stem', a Sequential: ")
    handle.remove()
    getattr(model, register)(lambda *_: fired.append("network"))
    assert "'(model)', a Residual" in refusal(msun.cut, model, "stem", noise())
    assert fired == []


def test_examples():
    model = Residual()
    assert "network cannot take these images: (2, 1, 9, 9)" in refusal(
        msun.cut_points, model, noise(channels=1)
    )
    assert "no batch of images: (3, 9, 9)" in refusal(msun.cut_points, model, noise()[0])
    assert msun.cut_points(model, noise(1)) == msun.cut_points(model)  # one image; none
    model.stem[0] = nn.Conv2d(1, 4, 3)
    model.default_cfg = {"input_size": (1, 16, 16)}
    assert msun.cut_points(model)[0] == "stem.0"


@dataclass
class Output(OrderedDict):
    """As those of Hugging Face."""

    logits: torch.Tensor
    more: object = None

    def __post_init__(self):
        self["logits"] = self.logits


@pytest.mark.parametrize(
    ("wrap", "other"),
    [
        (lambda y: Output(y), lambda y: Output(y * 2)),  # another value, of the same kind
        (lambda y: Output(y), lambda y: OrderedDict(logits=y)),
        (lambda y: Output(y, (y,)), lambda y: Output(y, (y, y))),
        (lambda y: {"a": y}, lambda y: {"b": y}),
        (lambda y: [y, 1], lambda y: (y, 1)),
        (lambda y: (y, y), lambda y: (y, y.sum(1))),
    ],
)
def test_outputs_are_compared_to_their_last_tensor(wrap, other):
    class Net(Residual):
        def forward(self, x):
            y = super().forward(x)
            return wrap(y) if isinstance(x, torch.Tensor) else self.recorded(y)

        def recorded(self, y):
            return wrap(y)

    assert msun.cut_points(Net().eval(), noise())[0] == "stem.0"
    Net.recorded = lambda self, y: other(y)
    assert "computes something else: Net: " in refusal(msun.cut_points, Net().eval(), noise())


def test_networks_that_cannot_be_recorded():
    class Root(Residual):
        def forward(self, x):
            return super().forward(x if x.mean() > 0 else -x)

    class Typed(Residual):
        def forward(self, x):
            return (
                super().forward(x)
                if isinstance(x, torch.Tensor)
                else self.fc(self.stem(x)[..., 0, 0])
            )

    model = Root()
    before = [vars(m).copy() for m in model.modules()]
    assert "torch.fx cannot trace this network: Root, symbolically traced" in refusal(
        msun.cut_points, model, noise()
    )
    assert [vars(m) for m in model.modules()] == before
    assert "recorded network computes something else: Typed: " in refusal(
        msun.cut_points, Typed(), noise()
    )
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten())
    assert "parameters have no shape yet: '0.weight' is lazy: " in refusal(
        msun.cut_points, lazy, noise()
    )
    assert "no network: str: " in refusal(msun.cut_points, "resnet18", error=TypeError)


def test_the_last_module_inside_one_that_is_kept_whole():
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_b0", num_classes=3).eval()
    x = noise(side=32)
    assert "bn1" in msun.cut_points(model, x)  # a norm with its activation, a leaf of timm's
    head, tail = msun.cut(model, "bn1.act", x)
    with torch.no_grad():
        assert torch.equal(head(x), model.bn1(model.conv_stem(x)))
        assert torch.equal(tail(head(x)), model(x))
    assert "'bn1.drop', it does not run" in refusal(msun.cut, model, "bn1.drop", x)
