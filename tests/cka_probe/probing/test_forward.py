"""What goes wrong in a forward is told as what it is: the network, the images or the features."""

import pytest
import torch
from shell import furnish, refused, words
from torch import nn

from cka_probe import cka, probe

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x, y):
        return self.inner(x) + y


def said(model=None, images=IMAGES, error=ValueError, **options):
    """The one line of a probe that fails."""
    options = {"scales": [8, 16], "batch_size": 6, "progress": False, **options}
    with pytest.raises(error) as caught:
        probe(model or net(), images, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "cannot take view" not in text
    assert "restore" not in text
    assert text.count(": ") >= 2, text
    return text


def broken(x):
    raise RuntimeError("first: second")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "exact", "memory": 1000}, ["exact does not fit in memory: "]),
        ({"reduce": "tokens"}, ["reduce 'tokens' needs outputs (n, t, c): ", "layer '1'"]),
        ({"reduce": lambda x: x.sum()}, ["reducer returned a wrong shape: ", "layer '1'"]),
        ({"reduce": broken}, ["RuntimeError", "first", "second", "layer '1'", "correct the"]),
        ({"kernel": lambda x: x @ x.T}, ["kernel failed: ", "'<lambda>'", "(p, d), (q, d)"]),
        ({"kernel": lambda x, y: x.sum()}, ["kernel returned no block: ", "gave ()"]),
        ({"kernel": lambda x, y: 3}, ["kernel returned no block: ", "gave int"]),
        ({"kernel": lambda x, y: x @ y.T, "reduce": "grid=99"}, ["map smaller than the grid: "]),
    ],
)
@pytest.mark.parametrize("estimator", ["minibatch", "exact"])
def test_a_fault_of_reducer_kernel_or_estimator_is_told_as_itself(options, words, estimator):
    text = said(**{"estimator": estimator, **options})
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("kernel", [5, None, ["linear"]])
def test_a_kernel_that_is_no_kernel(kernel):
    assert said(kernel=kernel, error=TypeError).startswith("kernel is neither a name nor a func")
    with pytest.raises(TypeError, match="kernel is neither a name nor a function: "):
        cka(torch.randn(8, 2), torch.randn(8, 2), kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_and_network_of_two_dtypes(dtype):
    name = str(dtype).removeprefix("torch.")
    text = said(images=IMAGES.to(dtype))
    assert f"images are {name}, the network float32: view '8'" in text
    assert "x.float()" in text
    assert f"images are float32, the network {name}: " in said(net().to(dtype))


def test_images_of_other_channels():
    text = said(images=IMAGES[:, :1])
    assert "wrong number of channels: 1 where the network takes 3, view '8'" in text


def test_a_network_with_two_inputs():
    text = said(Two())
    assert "the network takes more than images: " in text
    assert "'y'" in text


def test_a_size_is_refused_with_a_way_out_that_there_is():
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    options = {"batch_size": 6, "progress": False}
    with pytest.raises(ValueError, match=r"cannot take view '8'.*resize='restore'"):
        probe(fixed, IMAGES, [8, 16], **options)
    with pytest.raises(ValueError, match=r"cannot take view '4'.*another reference"):
        probe(fixed, IMAGES, [4, 8], resize="restore", **options)
    views = {"small": (None, lambda x: x[:, :8, :8])}
    with pytest.raises(ValueError, match=r"cannot take view 'small'.*: give images of a size"):
        probe(fixed, IMAGES, views=views, **options)


class Attends(nn.Module):
    """Four pixels attend to each other, in one head of three numbers."""

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[:, None].contiguous()  # (n, 1, 4, 3)
        return nn.functional.scaled_dot_product_attention(x, x, x).flatten(1)


def test_attention_is_among_the_macs():
    """As on a GPU: torch's own count leaves out what attention is called on a CPU."""
    net, images = nn.Sequential(Attends(), nn.Linear(12, 5)), IMAGES[:, :, :2, :2]
    report = probe(net, images, batch_size=6, layers=["1"], progress=False)
    assert report.meta["view_macs"] == {"native": 2 * 4 * 4 * 3 + 12 * 5}


def test_compare_offers_no_restore(tmp_path, capsys):
    place = furnish(tmp_path)
    argv = words(place, tmp_path / "o", "--size", "8", "--quiet", command="compare", net="fixed")
    error = refused(capsys, argv, tmp_path / "o")
    assert "cannot take view 'a'" in error
    assert "--size" in error
    assert "restore" not in error
