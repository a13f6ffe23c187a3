"""An image that is not finite is named; the network is not blamed."""

import numpy as np
import pytest
import torch
from torch import nn

import msun
from cka_probe import probe

NET = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))  # fmt: skip


def images(bad, value, n=24):
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[bad, 1, 2, 3] = value
    return x


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (-float("inf"), "infinity")])
@pytest.mark.parametrize("options", [{}, {"estimator": "exact"}, {"layers": "2"},
                                     {"kernel": "rbf"}, {"reduce": "mean"}])  # fmt: skip
def test_a_probe_names_the_image(value, kind, options):
    words = rf"^image is not finite: '17' has {kind} in 1 of 768 values in view 'native': leave it"
    with pytest.raises(ValueError, match=words):
        probe(NET, images(17, value), None, batch_size=8, progress=False, **options)
    with pytest.raises(ValueError, match=r"^image is not finite: '17' .* in view '16'"):
        probe(NET, images(17, value), [16], batch_size=8, progress=False, **options)


def test_a_transform_that_spoils_an_image_is_named():
    def spoil(x):
        return x / x.abs().clamp(max=1).round() if float(x.sum()) > 30 else x

    views = {"plain": (None, None), "spoilt": (None, spoil)}
    with pytest.raises(ValueError, match=r"^image is not finite: '\d+' has .* in view 'spoilt'"):
        probe(NET, images(0, 0.0), None, views=views, batch_size=8, progress=False)


def test_a_network_that_makes_it_is_still_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with torch.no_grad():
        net[0].bias[0] = np.inf
    with pytest.raises(ValueError, match=r"^non-finite features: Inf .*layer '1', .*view 'native'"):
        probe(net, images(0, 0.0), None, batch_size=8, progress=False)


def test_training_and_evaluation_name_the_image(tmp_path):
    labels = torch.arange(24) % 4
    net = msun.build(NET, "0", [8, 16])
    words = r"^training diverged: .*: image 17 of 'tensor 24x3x16x16' is not finite, mend it"
    config = msun.TrainConfig(out=tmp_path / "out", epochs=1, batch_size=8, val_share=0.0,
                              augment="none", progress=False)  # fmt: skip
    with pytest.raises(ValueError, match=words):
        msun.train(net, (images(17, np.nan), labels), config)
    with pytest.raises(ValueError, match=r"^image is not finite: image 17 of .* px: mend it"):
        msun.evaluate(net, (images(17, np.nan), labels), [8, 16], progress=False, latency=False,
                      cka=False)  # fmt: skip
