"""Natural mistakes in a call of `probe`, and around a report, are named; none is Python's own."""

import numpy as np
import pytest
import torch
from pages import made
from torch import nn

from cka_probe import Report, probe
from cka_probe.inputs.views import scale_transforms
from cka_probe.plot import figures as plot

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def build():
    return net()


def ask(model=None, scales=(6, 8), **options):
    options = {"batch_size": 8, "progress": False, **options}
    return probe(net() if model is None else model, IMAGES, scales, **options)


VIEWS = {"scales": None}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"model": "resnet18"},
            TypeError,
            "'resnet18': load it, cka_probe.models.load.load_model(",
        ),
        ({"model": build}, TypeError, "model is no network: 'build': call it"),
        ({"model": nn.ReLU}, TypeError, "model is no network: 'ReLU': call it"),
        ({"model": 5}, TypeError, "model is no network: 5: give an nn.Module"),
        ({"views": {1: (None, None)}, **VIEWS}, TypeError, "view is not named by text: 1: name"),
        ({"views": {"a": build}, **VIEWS}, TypeError, "view 'a' is no pair: function: give (net"),
        ({"views": {"a": (None,)}, **VIEWS}, TypeError, "view 'a' is no pair: tuple: "),
        ({"views": {"a": ("vgg", None)}, **VIEWS}, TypeError, "view 'a' is no network: 'vgg': "),
        ({"views": [net()], **VIEWS}, TypeError, "views are no dict: list: "),
        ({"batch_size": 8.0}, TypeError, "batch_size is no whole number: 8.0: "),
        ({"batch_size": None}, TypeError, "batch_size is no whole number: None: "),
        ({"batch_size": True}, TypeError, "batch_size is no whole number: True: "),
        ({"n_images": 5.5}, TypeError, "n_images is no whole number: 5.5: "),
        ({"seed": None}, TypeError, "seed is no whole number: None: "),
        ({"seed": 1.5}, TypeError, "seed is no whole number: 1.5: "),
        ({"seed": 10**23}, ValueError, f"seed out of range: {10**23}: "),
        ({"bandwidth": "x"}, TypeError, "bandwidth is no number: 'x': "),
        ({"mean": 0.5, "std": [1]}, ValueError, "mean is no list of numbers: 0.5: "),
        ({"mean": [0.5], "std": 1}, ValueError, "std is no list of numbers: 1: "),
        ({"mean": 0.5, "std": 1, "views": {"a": (None, None)}, **VIEWS}, ValueError, "mean is no"),
        ({"scales": 8, "reference": 8}, TypeError, "scales is no list: 8: "),
        ({"scales": [99_999_999]}, ValueError, "scale too large: 99999999: "),
    ],
)
def test_a_mistake_is_named(options, error, says):
    with pytest.raises(error) as caught:
        ask(**options)
    text = str(caught.value)
    assert says in text
    assert text.count(": ") >= 2
    assert "\n" not in text


def test_out_is_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output is not a folder: .*file: give a folder"):
        ask(out=tmp_path / "file")


def test_what_is_natural_is_taken():
    whole = ask()
    assert np.array_equal(ask(scales=(side for side in (6, 8)), reference=8).cka, whole.cka)
    assert np.array_equal(ask(batch_size=np.int64(8), seed=np.int64(0)).cka, whole.cka)
    pair = ask(scales=None, views={"a": net(), "b": (net(), None)})
    assert np.allclose(np.diag(pair.between("a", "b")), 1)


def test_no_memory_for_an_image_is_one_line(monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframe #0")

    monkeypatch.setattr("cka_probe.inputs.views.F.interpolate", full)
    with pytest.raises(ValueError, match=r"^no memory for an image: \[4, 4\] pixels: "):
        scale_transforms([4])["4"](torch.rand(3, 8, 8))


def test_views_may_be_numbers():
    report = made(reference="96")
    assert report.against(64).equals(report.against("64"))
    assert report.against(64, "low").equals(report.against("64", "low"))
    assert report.between(32, 96).equals(report.between("32", "96"))
    assert report.between(32).columns.name == "layer in 32"
    assert report.layers_of(32) == report.layers_of("32")
    with pytest.raises(ValueError, match="unknown view: '33'"):
        report.against(33)
    for draw, views in ((plot.heatmap, (32,)), (plot.curve, (32,)), (plot.grid, (32, 64))):
        ax = draw(report, *views)
        named = f"{ax.get_xlabel()} {ax.get_ylabel()} {[t.get_text() for t in ax.texts]}"
        assert "32" in named or ax.figure.axes[-1].get_ylabel() == "CKA with 32"
        plot.plt.close(ax.figure)


@pytest.mark.parametrize("groups", ["eight", [8], {"n": 8}])
def test_groups_are_a_number(groups):
    with pytest.raises(TypeError, match=r"groups are no number: .*: give how many"):
        made(groups=groups)


def test_a_folder_is_no_report(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"a folder, no report: .*: give the file in it"):
        Report.load(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"a folder, no file: .*: give the name of a file"):
        made().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nodir: make it first"):
        made().save(tmp_path / "nodir" / "r.npz")


@pytest.mark.parametrize("version", [0, -5])
def test_a_format_that_never_was(tmp_path, version):
    report, path = made(), tmp_path / "r.npz"
    report.save(path)
    with np.load(path) as arrays:
        content = {**arrays, "format": np.array(version)}
    np.savez(path, **content)
    with pytest.raises(ValueError, match=rf"report of no known format \({version}\): "):
        Report.load(path)
