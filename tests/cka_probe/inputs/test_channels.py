"""Networks of one channel on image files: converted in the library and at the shell."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import msun
from cka_probe import probe
from cka_probe.cli.main import main as cka_probe_main
from cka_probe.inputs.source import Files
from cka_probe.models.load import load_model
from cka_probe.models.preprocessing import channel_constants, input_channels
from msun.cli.main import main as msun_main

NETS = """
from torch import nn
def net(channels=1, classes=2):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classes of grey and of coloured files, and a file with networks."""
    root = tmp_path_factory.mktemp("channels")
    (root / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for kind, shape in (("grey", (16, 16)), ("colour", (16, 16, 3))):
        for name in ("cat", "dog"):
            (root / kind / name).mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / kind / name / f"{k}.png")
    return root


def net(channels, place):
    return load_model(f"{place / 'nets.py'}:net", model_args={"channels": channels}).model


def test_what_a_network_takes_is_what_its_first_convolution_takes(place):
    assert [input_channels(net(c, place)) for c in (1, 3, 4)] == [1, 3, 4]
    assert input_channels(nn.Linear(3, 3)) is None
    grey, colour = channel_constants(net(1, place)), channel_constants(net(3, place))
    assert grey["mean"] == pytest.approx([np.mean(colour["mean"])])
    assert grey["std"] == pytest.approx([np.mean(colour["std"])])


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_pixels_become_luma(place, kind):
    source = Files(place / kind, None, 0)
    colour = source.load(0)
    source.use_channels(1)
    grey = source.load(0)
    with Image.open(place / kind / source.ids[0]) as image:
        expected = np.asarray(image.convert("L")) / 255
    assert colour.shape == (3, 16, 16)
    assert grey.shape == (1, 16, 16)
    assert np.abs(grey[0].numpy() - expected).max() < 1 / 255
    source.use_channels(3)
    assert torch.equal(source.load(0), colour)


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_the_library_converts(place, kind, tmp_path):
    model, folder = net(1, place), place / kind
    report = probe(model, folder, [8, 16], batch_size=8, progress=False)
    assert np.isfinite(report.cka).any()
    built = msun.build(model, "0", [8, 16])
    config = msun.TrainConfig(out=tmp_path / "out", epochs=1, batch_size=8, val_share=0.0,
                              augment="none", progress=False)  # fmt: skip
    path = msun.train(built, folder, config)
    again = msun.load(path, backbone=model)
    assert len(again.spec["mean"]) == 1
    assert len(msun.evaluate(again, folder, [8, 16], progress=False, latency=False)) == 2
    msun.calibrate(again, folder, [8, 16], n_images=8, progress=False)


def test_the_shell_converts(place, tmp_path, capsys):
    model, data = f"{place / 'nets.py'}:net", str(place / "grey")
    probe_words = ["run", "--model", model, "--weights", "none", "--data", data, "--scales", "8,16",
                   "--batch-size", "8", "--out", str(tmp_path / "probe"), "--quiet"]  # fmt: skip
    assert cka_probe_main(probe_words) == 0, capsys.readouterr().err
    words = ["--model", model, "--weights", "none", "--at", "0", "--scales", "8,16", "--data", data]
    train_words = ["train", *words, "--epochs", "1", "--batch-size", "8", "--quiet", "--out",
                   str(tmp_path / "run")]  # fmt: skip
    assert msun_main(train_words) == 0, capsys.readouterr().err
    eval_words = [
        "eval", str(tmp_path / "run" / "model.pt"), "--model", model, "--data", data, "--sizes",
        "8,16", "--no-latency", "--quiet", "--out", str(tmp_path / "eval"),
    ]  # fmt: skip
    assert msun_main(eval_words) == 0, capsys.readouterr().err


def test_other_numbers_are_refused_in_one_line(place, tmp_path):
    words = "wrong number of channels: 3 where the network takes 4"
    with pytest.raises(ValueError, match=words) as caught:
        probe(net(4, place), place / "grey", [8, 16], batch_size=8, progress=False)
    assert "\n" not in str(caught.value)
    constants = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="mean and std do not fit the images: 3 for 1 channels"):
        probe(net(1, place), place / "grey", [8, 16], batch_size=8, progress=False, **constants)
