"""The channels of an output: followed through operators, never guessed from its shape."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe import probe
from cka_probe.activations.hooks import Collector

timm = pytest.importorskip("timm")

MAP = (4, 3, 16, 16)


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


def conv(channels=6, **kwargs):
    return nn.Conv2d(3, channels, 1, **kwargs)


def attention(x: Tensor, qkv: nn.Module) -> Tensor:
    """Plain attention over tokens (n, t, c), with 2 heads; (n, heads, t, d) comes out."""
    n, t, c = x.shape
    q, k, v = qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def windows(x: Tensor, linear: nn.Module) -> Tensor:
    """Windows of 4 x 4 of a map (n, h, w, c), a linear layer, and back, as Swin does."""
    n, h, w, c = x.shape
    x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    x = linear(x).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
    return torch.roll(x.reshape(n, h, w, c), (1, 1), (1, 2))


TO_LAST = torchvision.ops.Permute([0, 2, 3, 1])
TO_FIRST = torchvision.ops.Permute([0, 3, 1, 2])
TOKENS = Fn(lambda x, c: c(x).flatten(2).transpose(1, 2), conv(16, stride=4))

# name -> (network, input shape, channel axes of its output)
CASES = {
    "convolution, c == h != w": (conv(16), (4, 3, 16, 8), (1,)),
    "pooling": (nn.Sequential(conv(8), nn.MaxPool2d(2)), (4, 3, 16, 8), (1,)),
    "batch norm": (nn.Sequential(conv(16), nn.BatchNorm2d(16)), (4, 3, 16, 8), (1,)),
    "group norm": (nn.Sequential(conv(16), nn.GroupNorm(4, 16)), (4, 3, 16, 8), (1,)),
    "instance norm": (nn.Sequential(conv(16), nn.InstanceNorm2d(16)), (4, 3, 16, 8), (1,)),
    "images themselves": (nn.Identity(), (4, 16, 16, 8), (1,)),
    "residual of a gate": (Fn(lambda x, c, g: c(x) * g(c(x).mean((2, 3), keepdim=True)),
                              conv(16), nn.Conv2d(16, 16, 1)), (4, 3, 16, 8), (1,)),
    "interpolation": (Fn(lambda x, c: F.interpolate(c(x), size=(16, 8)), conv(16)), MAP, (1,)),
    "pixel shuffle": (nn.Sequential(conv(64), nn.PixelShuffle(2)), (4, 3, 8, 4), (1,)),
    "transposed convolution": (nn.ConvTranspose2d(3, 16, 2, 2), (4, 3, 8, 4), (1,)),
    "channels last by a Permute": (nn.Sequential(conv(), TO_LAST), (4, 3, 16, 8), (3,)),
    "linear on a map": (nn.Sequential(conv(), TO_LAST, nn.Linear(6, 5)), (4, 3, 16, 8), (3,)),
    "layer norm on a map": (nn.Sequential(conv(), TO_LAST, nn.LayerNorm(6)), MAP, (3,)),
    "ConvNeXt: there and back": (
        nn.Sequential(conv(16), TO_LAST, nn.LayerNorm(16), nn.Linear(16, 16), TO_FIRST),
        (4, 3, 16, 8), (1,)),
    "LayerNorm2d, a channels-first subclass": (
        nn.Sequential(conv(16), timm.layers.LayerNorm2d(16)), (4, 3, 16, 8), (1,)),
    "windows": (nn.Sequential(conv(8), TO_LAST, Fn(windows, nn.Linear(8, 8))), MAP, (3,)),
    "tokens": (TOKENS, (4, 3, 16, 16), (2,)),
    "tokens with a class token": (
        Fn(lambda x, t: torch.cat([torch.zeros(len(x), 1, 16), t(x)], 1), TOKENS), MAP, (2,)),
    "tokens as a map again": (
        Fn(lambda x, t: t(x).transpose(1, 2).reshape(len(x), 16, 4, 4), TOKENS), MAP, (1,)),
    "mixing of tokens": (
        Fn(lambda x, t, f: t(x) + f(t(x).mT).mT, TOKENS, nn.Linear(16, 16)), MAP, (2,)),
    "heads": (Fn(lambda x, t, f: attention(t(x), f), TOKENS, nn.Linear(16, 48)), MAP, (1, 3)),
    "fused attention": (
        Fn(lambda x, t: F.scaled_dot_product_attention(
            *3 * [t(x).unflatten(2, (2, 8)).transpose(1, 2)]), TOKENS), MAP, (1, 3)),
    "merged heads": (
        Fn(lambda x, t, f: attention(t(x), f).transpose(1, 2).flatten(2), TOKENS,
           nn.Linear(16, 48)), MAP, (2,)),
    "transformer layer": (
        nn.Sequential(TOKENS, nn.TransformerEncoderLayer(16, 2, batch_first=True)), MAP, (2,)),
    "convolution of a signal": (nn.Conv1d(3, 6, 3), (4, 3, 20), (1,)),
    "pooled signal": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.MaxPool1d(2)), (4, 3, 20), (1,)),
    "batch norm of a signal": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
                               (4, 3, 20), (1,)),
    "video": (nn.Sequential(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU()),
              (4, 3, 5, 8, 8), (1,)),
    "video, channels last": (
        nn.Sequential(nn.Conv3d(3, 6, 3), torchvision.ops.Permute([0, 2, 3, 4, 1])),
        (4, 3, 5, 8, 8), (4,)),
    "given tokens": (nn.Identity(), (4, 7, 6), (2,)),
    "a map of unknown making": (
        Fn(lambda x: torch.zeros(len(x), 6, 6, 3).index_put((torch.arange(4),), x.flatten()[0])),
        MAP, (1,)),
}  # fmt: skip


def collect(net, x, layers="(model)", **options):
    found = {}
    with Collector(net, layers, **options) as collector:
        collector.run(x, lambda tap, features: found.update({collector_label(tap): features}))
        channels = {collector_label(tap): axes for tap, axes in collector.channels.items()}
    return found, channels


def collector_label(tap):
    return tap.path or "(model)"


@pytest.mark.parametrize("name", CASES)
def test_mean_averages_the_positions_of_each_kind_of_module(name):
    net, shape, axes = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, channels = collect(net, x, reduce="mean")
    assert channels == {"(model)": axes}
    with torch.no_grad():
        output = net.eval()(x).double().numpy()
    output = np.moveaxis(output, axes, range(1, 1 + len(axes)))
    expected = output.reshape(4, np.prod(output.shape[1 : 1 + len(axes)]), -1).mean(2)
    np.testing.assert_allclose(found["(model)"].numpy(), expected, atol=1e-5)


SQUARE, LONG = (2, 3, 64, 64), (2, 3, 64, 32)
# network -> {layer: channel axes}; blocks of both layouts in one network, and maps that are no
# square, so that nothing but the operators can tell
NETWORKS = {
    "swin_t": (torchvision.models.swin_t, LONG, {"features.0": 3, "features.1.0": 3, "norm": 3}),
    "convnext_tiny": (torchvision.models.convnext_tiny, LONG, {"features.1.0": 1, "features.6": 1}),
    "vit_b_32": (torchvision.models.vit_b_32, (2, 3, 224, 224),
                 {"conv_proj": 1, "encoder.layers.encoder_layer_0": 2}),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto"), LONG, {"stages.1": 1}),
    "timm swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=(64, 32)),
                  LONG, {"layers.0.blocks.0": 3, "layers.1": 3}),
    "timm pvt_v2_b0": (lambda: timm.create_model("pvt_v2_b0"), LONG,
                       {"patch_embed": 3, "stages.1.blocks.0": 2, "stages.1": 1}),
    "timm mixer": (lambda: timm.create_model("mixer_s32_224"), (2, 3, 224, 224), {"blocks.0": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_layout_of_published_blocks(name):
    make, shape, expected = NETWORKS[name]
    _, channels = collect(make(), torch.randn(shape), list(expected), reduce="mean")
    assert channels == {layer: (axis,) for layer, axis in expected.items()}


def test_maps_as_deep_as_high_are_channels_first():
    """The reproducer: resnet18's maxpool on 256 x 128 puts out (64, 64, 32)."""
    net = torchvision.models.resnet18().eval()
    x = torch.randn(16, 3, 256, 128)
    report = probe(net, x, None, layers=["maxpool", "layer1"], reduce="mean", batch_size=8,
                   progress=False)  # fmt: skip
    views = report.meta["layers"]["maxpool"]["views"]
    assert [view["grid"] for view in views.values()] == [[64, 32]]
    found, _ = collect(net, x, "maxpool", reduce="mean")
    with torch.no_grad():
        maps = net.maxpool(net.relu(net.bn1(net.conv1(x)))).double()
    np.testing.assert_allclose(found["maxpool"].numpy(), maps.mean((2, 3)).numpy(), atol=1e-6)


def test_layout_is_kept_for_later_batches_and_found_anew_for_each_size():
    net = nn.Sequential(conv(16), TO_LAST)
    found = []
    with Collector(net, reduce="mean", layers="1") as collector:
        for shape in [(4, 3, 16, 8), (4, 3, 16, 8), (4, 3, 8, 16)]:
            collector.run(torch.randn(shape), lambda tap, features: found.append(features.shape))
    assert found == [(4, 16)] * 3


@pytest.mark.parametrize(("layout", "width"), [("channels_first", 16), ("channels_last", 8)])
def test_the_user_names_a_layout(layout, width):
    found, _ = collect(conv(16), torch.randn(4, 3, 16, 8), reduce="mean", layout=layout)
    assert found["(model)"].shape == (4, width)
    report = probe(conv(16), torch.randn(16, 3, 16, 8), None, layers="(model)", reduce="mean",
                   layout=layout, batch_size=8, progress=False)  # fmt: skip
    assert report.meta["run"]["layout"] == layout
    assert next(iter(report.meta["layers"]["(model)"]["views"].values()))["channels"] == width


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"^unknown layout: 'NHWC': use channels_first or"):
        probe(conv(), torch.randn(8, 3, 8, 8), None, layout="NHWC")


def test_output_fmt_of_timm_counts_where_the_operators_do_not_tell():
    net = CASES["a map of unknown making"][0]
    net.output_fmt = "NHWC"
    try:
        assert collect(net, torch.randn(MAP))[1] == {"(model)": (3,)}
    finally:
        del net.output_fmt


def test_following_changes_no_number():
    net = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    found, _ = collect(net, x)
    with torch.no_grad():
        assert torch.equal(found["(model)"], net(x))
