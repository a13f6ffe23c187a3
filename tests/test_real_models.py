"""Real weights on real photographs: accuracy tells a wrong loader, mean, resize or class order."""

import csv
import math
import tarfile
from pathlib import Path

import pytest
import torch

from cka_probe.images import batches, open_images
from cka_probe.models import load_model
from cka_probe.views import scale_transforms

pytestmark = pytest.mark.real_data

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SAME = {"pad_type": "same"}
V1 = """
from timm.models.efficientnet import _gen_mobilenet_v1

def make():
    return _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pad_type="same")
"""
IMAGENET = [  # name, file, arguments, mean, top-1 in % at 128 px (README of the data), images
    ("timm:mobilenetv2_100", "mobilenet_v2_qat.timm_same", SAME, 0.5, 61.1, 160),
    ("mobilenet_v2", "mobilenet_v2_tf2ptq.torchvision", {}, 0.5, 52.0, 40),
    ("squeezenet1_1", "squeezenet1_1_onnxzoo.torchvision", {}, 0.485, 44.3, 40),
    ("v1.py:make", "mobilenet_v1_0.25_128_qat.timm_same", {}, 0.5, 51.1, 160),
]


def accuracy(loaded, folder, side_px, n_images, label_of):
    source = open_images(folder, n_images=n_images)
    views = scale_transforms([side_px], mean=loaded.mean, std=loaded.std)
    hits = 0
    for batch in batches(source, views, batch_size=40, seed=0):
        with torch.no_grad():
            top = loaded.model(batch.views[str(side_px)]).argmax(1).tolist()
        hits += sum(a == label_of(name) for a, name in zip(top, batch.ids, strict=True))
    return hits / n_images


def check(found, percent, n_images):
    """Within 3.3 standard deviations of the binomial: one false alarm in a thousand."""
    p = percent / 100
    assert abs(found - p) < 3.3 * math.sqrt(p * (1 - p) / n_images)


@pytest.mark.parametrize(("name", "file", "args", "mean", "percent", "n"), IMAGENET)
def test_imagenet_weights_reach_their_accuracy_at_128_px(
    real_data, tmp_path, name, file, args, mean, percent, n
):
    (tmp_path / "v1.py").write_text(V1)
    name = name.replace("v1.py", str(tmp_path / "v1.py"))
    loaded = load_model(name, real_data / f"weights/{file}.safetensors", model_args=args)
    assert (loaded.mean[0], loaded.preprocessing) == (mean, "weights file")
    folder = real_data / "images/imagenette224"
    with (folder / "labels.csv").open() as stream:
        labels = {row["file"]: int(row["imagenet_label"]) for row in csv.DictReader(stream)}
    found = accuracy(loaded, folder / "val", 128, n, lambda name: labels[f"val/{name}"])
    check(found, percent, n)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_cifar_weights_fit_the_cifar_resnets(real_data, depth):
    (file,) = (real_data / "weights/cifar10").glob(f"resnet{depth}_*.safetensors")
    loaded = load_model(f"{EXPERIMENTS / 'cifar_resnet.py'}:resnet{depth}", file)
    assert loaded.name == f"cifar_resnet.py:resnet{depth}"
    assert loaded.model(torch.zeros(1, 3, 17, 17)).shape == (1, 10)


def test_cifar_resnet20_reaches_its_accuracy_on_400_test_images(real_data, tmp_path):
    (packed,) = (real_data / "images").glob("cifar10*.tar.xz")
    taken = {}
    with tarfile.open(packed, "r|xz") as archive:
        for member in archive:
            split, kind, _ = Path(member.name).parts if member.isfile() else ("", "", "")
            if split == "test" and taken.get(kind, 0) < 40:
                taken[kind] = taken.get(kind, 0) + 1
                content = archive.extractfile(member).read()
                path = tmp_path / kind / Path(member.name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            if len(taken) == 10 and min(taken.values()) == 40:
                break
    kinds = sorted(taken)
    (file,) = (real_data / "weights/cifar10").glob("resnet20_*.safetensors")
    loaded = load_model(f"{EXPERIMENTS / 'cifar_resnet.py'}:resnet20", file)
    found = accuracy(loaded, tmp_path, 32, 400, lambda name: kinds.index(name.split("/")[0]))
    check(found, 81.0, 400)
