"""Real weights and photographs, where they are at hand."""

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cka_probe import probe
from cka_probe.inputs.batches import order
from cka_probe.models.load import load_model

pytestmark = pytest.mark.real_data


def mobilenet(real_data):
    pytest.importorskip("timm")
    weights = real_data / "weights" / "mobilenet_v2_qat.timm_same.safetensors"
    return load_model("timm:mobilenetv2_100", weights, model_args={"pad_type": "same"}).model


def test_a_scaled_round_trip_equals_slow_float64_code(real_data, tmp_path):
    """224 against 224 -> 32 -> 224 on MobileNetV2, every tapped layer, by other code throughout."""
    files = sorted((real_data / "images" / "imagenette224" / "val").rglob("*.JPEG"))
    files = files or sorted((real_data / "images" / "imagenette224" / "val").rglob("*.jp*g"))
    chosen = files[:: len(files) // 24][:24]
    for k, path in enumerate(chosen):
        (tmp_path / f"{k:02}.jpg").write_bytes(path.read_bytes())
    model = mobilenet(real_data)
    report = probe(
        model, tmp_path, [32, 224], resize="restore", mean=[0.5] * 3, std=[0.5] * 3,
        batch_size=12, progress=False,
    )  # fmt: skip
    layers = report.layers
    assert len(layers) == 19

    pixels = [np.asarray(Image.open(tmp_path / f"{k:02}.jpg").convert("RGB")) for k in range(24)]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    assert x.shape == (24, 3, 224, 224)
    x = x[order(24, 0)]
    options = {"mode": "bilinear", "align_corners": False, "antialias": True}
    small = F.interpolate(F.interpolate(x, (32, 32), **options), (224, 224), **options)
    kept = {}
    modules = dict(model.named_modules())
    for view, images in (("32", small), ("224", x)):
        for start in (0, 12):
            handles = [
                modules[name].register_forward_hook(
                    lambda m, i, out, name=name, view=view: kept.setdefault(
                        (view, name), []
                    ).append(out.detach().clone().flatten(1).double().numpy())
                )
                for name in layers
            ]
            with torch.no_grad():
                model((images[start : start + 12] - 0.5) / 0.5)
            for handle in handles:
                handle.remove()
    for name in layers:
        expected = oracle.cka_minibatch(kept["32", name], kept["224", name])
        assert report.against().loc[name, "32"] == pytest.approx(expected, abs=1e-5), name


def test_the_papers_curve_has_its_dip_and_recovery(real_data):
    """An early dip, a recovery, a decline: what NUMERICS and the MSUN paper saw on real images."""
    report = probe(
        mobilenet(real_data), real_data / "images" / "imagenette224" / "val", [32, 224],
        mean=[0.5] * 3, std=[0.5] * 3, n_images=96, batch_size=32, progress=False,
    )  # fmt: skip
    curve = report.against()["32"].to_numpy()
    dip = int(curve[:6].argmin())
    assert curve[0] > 0.9
    assert 0 < dip < 6
    assert curve[dip + 1 : 12].max() > curve[dip] + 0.1
    assert curve[-1] < 0.2
