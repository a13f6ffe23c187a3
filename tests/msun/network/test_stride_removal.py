"""Taking strides out: whole steps, the grids that come of it, and the pixels that must not move."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import msun
from msun.network.functional_layers import Convolve, with_functional_modules
from msun.network.kernel_resize import centred, resample_first, resampled
from msun.network.shallow_copy import copy_path, replace_module, shallow_part
from msun.network.shape_probe import ShapeProbe
from msun.network.stride_removal import remove_strides, steps, trace_strides, with_stride

SIDE = 64


def noise(n, side, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=g, dtype=dtype)


class Block(nn.Module):
    """A convolution and its shortcut reduce the same grid; a pooling in a parallel branch too."""

    def __init__(self, c, pool):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 2, 1)
        self.short = nn.Sequential(nn.Conv2d(c, c, 1, 2), nn.BatchNorm2d(c))
        self.pool = pool
        self.mix = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.mix(F.relu(self.conv(x) + self.short(x) + self.pool(x)))


def network(*head):
    torch.manual_seed(0)
    top = [nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(nn.Sequential(*head), *top).double().eval()


def head_of(*layers):
    return msun.cut(network(*layers), "0", noise(2, SIDE))[0]


def taken(head, side, wanted, **options):
    return remove_strides(head, side, (wanted, wanted), known=(1, 3, SIDE, SIDE), **options)


STEM = nn.Conv2d(3, 4, 7, 2, 3)


def stem():
    return [copy.deepcopy(STEM), nn.MaxPool2d(3, 2, 1), Block(4, nn.MaxPool2d(2))]


def test_a_step_is_all_that_reduces_one_grid():
    head = head_of(*stem())
    leaves = trace_strides(head, ShapeProbe(head, (1, 3, SIDE, SIDE)), (1, 3, SIDE, SIDE))
    found = [(step.jump, step.stride, set(step.paths)) for step in steps(leaves)]
    assert found == [
        (1, 2, {"0.0"}),
        (2, 2, {"0.1"}),
        (4, 2, {"0.2.conv", "0.2.short.0", "0.2.pool"}),
    ]


@pytest.mark.parametrize(("wanted", "gone"), [(2, 0), (3, 1), (4, 1), (5, 2), (16, 3), (99, 3)])
def test_the_last_step_goes_first_until_the_grid_is_met(wanted, gone):
    head = head_of(*stem())
    before = copy.deepcopy(head)
    result = taken(head, 16, wanted)
    assert result.grid == (2 * 2**gone,) * 2
    names = ["0.2.conv", "0.2.short.0", "0.2.pool"], ["0.1"], ["0.0"]
    assert set(result.changes) == {path for step in names[:gone] for path in step}
    with torch.no_grad():
        assert result.head(noise(1, 16)).shape[-2:] == result.grid
        assert torch.equal(head(noise(1, 40)), before(noise(1, 40)))  # left as it was


@pytest.mark.parametrize(("wanted", "gone"), [(2, 0), (3, 1), (4, 1), (5, 2), (16, 3)])
def test_or_the_first_step_goes_first(wanted, gone):
    result = taken(head_of(*stem()), 16, wanted, first=True)
    assert result.grid == (2 * 2**gone,) * 2
    names = ["0.0"], ["0.1"], ["0.2.conv", "0.2.short.0", "0.2.pool"]
    assert set(result.changes) == {path for step in names[:gone] for path in step}


@pytest.mark.parametrize("first", [False, True])
def test_tiny_maps_lose_several_steps_at_once(first):
    strided = [nn.Conv2d(3 + (k > 0), 4, 3, 2, 1) for k in range(5)]  # 8 px: 4, 2, 1, 1, 1
    result = taken(head_of(nn.Sequential(*strided)), 8, 2, first=first)
    assert result.grid == (2, 2)
    assert [path[-1] for path in result.changes] == (list("012") if first else list("234"))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 3, 2),
        nn.Conv2d(3, 4, 7, 4, 2), nn.Conv2d(3, 4, 3, 2, 2, dilation=2),
        nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"), nn.Conv2d(3, 4, (3, 2), (2, 2), (1, 0)),
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(4, 4), nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("side", [16, 19])
def test_a_stride_taken_out_keeps_the_grid_and_its_pixels(layer, side):
    layer, x = layer.double(), noise(2, side)
    old, same = layer(x), with_stride(layer, 1)(x)
    assert same.shape[-2:] == x.shape[-2:]
    s = layer.stride[0] if isinstance(layer.stride, tuple) else layer.stride
    kept = same[:, :, ::s, ::s][:, :, : side // s - 1, : side // s - 1]  # whole windows only
    torch.testing.assert_close(
        kept, old[:, :, : kept.shape[2], : kept.shape[3]], rtol=0, atol=1e-12
    )
    if s == 4:
        assert with_stride(layer, 2)(x).shape[-1] == (side + 1) // 2


def test_a_stride_of_4_becomes_2_where_that_suffices():
    head = head_of(nn.Conv2d(3, 4, 4, 4))
    assert taken(head, 16, 7).grid == (8, 8)
    assert taken(head, 16, 7).changes == {"0.0": (4, 2)}
    assert taken(head, 16, 9).grid == (16, 16)


CONV = nn.Conv2d
DILATED = {
    "residual": lambda: stem(),
    "patches": lambda: [CONV(3, 4, 4, 4), CONV(4, 4, 2, 2), CONV(4, 4, 7, padding=3)],
    "pools": lambda: [CONV(3, 4, 3, padding=1), nn.MaxPool2d(2), CONV(4, 4, 3, padding=1),
                      nn.MaxPool2d(2), CONV(4, 4, 3, 1, 2, dilation=2)],
    "circular": lambda: [CONV(3, 4, 3, 2, 1), CONV(4, 4, 3, padding=1, padding_mode="circular")],
    "pooled twice": lambda: [CONV(3, 4, 3, 2, 1), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2, 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", DILATED)
@torch.no_grad()
def test_dilated_every_old_pixel_keeps_its_value(name):
    head = head_of(*DILATED[name]())
    x = noise(2, 32)
    old = head(x)
    for factor in (2, 4):
        new = taken(head, 32, old.shape[-1] * factor, dilated=True).head(x)
        steps_out = new.shape[-1] // old.shape[-1]
        assert steps_out >= 2
        kept = new[:, :, ::steps_out, ::steps_out]
        torch.testing.assert_close(kept, old, rtol=0, atol=1e-12)
    plain = taken(head, 32, old.shape[-1] * 4).head(x)
    moved = (plain[:, :, ::steps_out, ::steps_out] - old).abs().max()
    assert moved > 1e-3, "without dilation they move: the law tells something"


def test_what_cannot_be_dilated_is_named():
    head = head_of(nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(3, 1, 1))
    with pytest.raises(ValueError, match="a layer cannot be dilated: AvgPool2d: choose start"):
        taken(head, 16, 16, dilated=True)
    assert taken(head, 16, 16).grid == (16, 16)


class Functions(nn.Module):
    """Pools and a blur as function calls, one of them fed by a stored kernel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), 3, stride=2, padding=1)
        x = F.avg_pool2d(x, 2)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.blur, stride=2, groups=4)


@torch.no_grad()
def test_functions_become_layers_whose_stride_can_go():
    head = head_of(Functions())
    x = noise(2, 32)
    made = with_functional_modules(head)
    for mode in (True, False):
        made.train(mode), head.train(mode)
        assert torch.equal(made(x), head(x))
    assert isinstance(made.functional_2, Convolve)
    assert not hasattr(head, "functional_0")
    assert made.state_dict().keys() == head.state_dict().keys()
    assert [taken(made, 32, w).grid[0] for w in (4, 8, 16, 32)] == [4, 8, 16, 32]
    assert torch.equal(made(x), head(x))
    assert with_functional_modules(head_of(nn.Conv2d(3, 4, 3))) is not None


def test_functions_with_settings_from_data_stay():
    class Sized(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x, x.shape[2] // 8)

    head = head_of(nn.Conv2d(3, 4, 1), Sized())
    assert with_functional_modules(head) is head


def test_a_step_that_cannot_go_stays_and_the_one_before_goes():
    class Halves(nn.Module):
        """Adds what a strided layer and a slicing give: the stride alone cannot go."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x):
            return self.conv(x) + x[:, :, ::2, ::2]

    result = taken(head_of(nn.Conv2d(3, 4, 3, 2, 1), Halves()), 16, 16)
    assert result.changes == {"0.0": (2, 1)}
    assert result.grid == (8, 8)


def test_an_image_that_no_surgery_helps():
    head = head_of(nn.Conv2d(3, 4, 9))
    with pytest.raises(ValueError, match=r"^the head cannot take images of this scale: 4 x 4, "):
        taken(head, 4, 16)


def test_a_shallow_copy_shares_parameters_and_keeps_its_own_strides():
    head = head_of(*stem())
    other = taken(head, 16, 16).head
    assert {id(p) for p in other.parameters()} == {id(p) for p in head.parameters()}
    pair = copy.deepcopy(nn.ModuleList([head, other])).float()
    x = noise(1, 16, dtype=torch.float32)
    assert pair[0](x).shape[-1] == 2
    assert pair[1](x).shape[-1] == 16
    with torch.no_grad():
        for p in pair[0].parameters():
            p.zero_()
    assert pair[1](x).abs().max() == 0
    assert other(noise(1, 16)).abs().max() > 0


def test_replacing_a_module_in_a_shallow_copy_leaves_the_head_alone():
    head = head_of(*stem())
    made = shallow_part(head)
    replace_module(made, "0.2.conv", nn.Identity())
    assert isinstance(head.get_submodule("0.2.conv"), nn.Conv2d)
    copy_path(made, "0.0").stride = (9, 9)
    assert head.get_submodule("0.0").stride == (2, 2)
    assert made.get_submodule("0.0").weight is head.get_submodule("0.0").weight


def test_resampling_is_the_pseudo_inverse():
    w = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    new = resampled(w, (3, 3))
    # B column by column, and the normal equations by a plain solver
    columns = [
        F.interpolate(
            torch.eye(49, dtype=torch.float64)[k].view(1, 1, 7, 7), (3, 3), mode="bilinear",
            antialias=True,
        ).flatten()
        for k in range(49)
    ]  # fmt: skip
    b = torch.stack(columns, 1)  # (9, 49)
    wanted = torch.linalg.lstsq(b.T, w.flatten(2).transpose(0, 2).reshape(49, -1)).solution
    wanted = wanted.reshape(9, 3, 2).permute(2, 1, 0).reshape(2, 3, 3, 3)
    torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resampled(w, (7, 7)), w, rtol=1e-9, atol=1e-9)


def test_a_kernel_around_its_middle():
    w = torch.arange(49.0).view(1, 1, 7, 7)
    assert torch.equal(centred(w, (3, 3)), w[..., 2:5, 2:5])
    assert torch.equal(centred(centred(w, (9, 9)), (7, 7)), w)
    assert centred(w, (9, 9)).sum() == w.sum()


def test_the_first_kernel_is_resampled_in_its_own_size():
    head = head_of(*stem())
    made = copy.deepcopy(head)
    old = head.get_submodule("0.0").weight
    assert resample_first(made, 0.5) == "0.0"
    new = made.get_submodule("0.0").weight
    assert new.shape == old.shape
    torch.testing.assert_close(new[..., 2:5, 2:5], resampled(old, (3, 3)))
    outside = new.detach().clone()
    outside[..., 2:5, 2:5] = 0
    assert not outside.any()
    assert torch.equal(head.get_submodule("0.0").weight, old)
    assert resample_first(head_of(nn.Conv2d(3, 4, 1)), 0.5) == ""


class Doubled(nn.Module):
    """A parametrisation of the user's."""

    def forward(self, weight):
        return 2 * weight


def doubled(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("preset", ["lean", "paper"])
@pytest.mark.parametrize("change", [
    nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm, doubled,
    pruned,
])  # fmt: skip
def test_a_subnet_of_parametrised_layers_is_that_of_plain_ones(change, preset):
    def built(change):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 4, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)]
        top = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
        model = nn.Sequential(*map(change, layers), *top).eval()
        return model, msun.build(model, "1", [16, 32, 64], preset=preset).eval()

    (_, plain), (model, net) = built(lambda layer: layer), built(change)
    for side in net.scales:
        assert net.macs(side) == plain.macs(side) <= net.macs(64)
        assert net._planner.plan(side, side)[:3] == plain._planner.plan(side, side)[:3]
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(net(x), model(x))
        assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)


class SelfPadded(nn.Module):
    """The same network with its padding in the layers, by a function, or by modules."""

    def __init__(self, how, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.pads = how, kernel // 2
        inside = self.pads if how == "inside" else 0
        self.a, self.b = (nn.Conv2d(c, 8, kernel, 2, inside) for c in (3, 8))
        self.pool = nn.MaxPool2d(3, 2, 1 if how == "inside" else 0)
        self.zero, self.one = nn.ZeroPad2d(self.pads), nn.ZeroPad2d(1)
        self.c = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x):
        function = {
            "inside": lambda x, n: x,
            "function": lambda x, n: nn.functional.pad(x, (n, n, n, n)),
            "module": lambda x, n: self.one(x) if n == 1 else self.zero(x),
            "reflect": lambda x, n: nn.functional.pad(x, (n,) * 4, mode="reflect"),
        }[self.how]
        x = self.a(function(x, self.pads)).relu()
        x = self.b(function(self.pool(function(x, 1)), self.pads)).relu()
        return self.c(x).mean((2, 3))


@pytest.mark.parametrize("how", ["function", "module", "reflect"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("preset", ["lean", "paper"])
def test_padding_outside_of_the_layers_makes_no_map_larger(how, kernel, preset):
    nets = [
        msun.build(SelfPadded(one, kernel).eval(), "b", [32, 64], preset=preset)
        for one in ("inside", how)
    ]
    for side in (32, 64):
        inside, outside = (net._planner.plan(side, side) for net in nets)
        assert outside[:3] == inside[:3]
        assert outside.macs == inside.macs <= nets[1].macs(64)
