"""Curves of CKA to suggest splits from: measured ones, and reports made of any."""

import math

import numpy as np

from cka_probe import Report
from msun.splitting.curve import Curve

# Blocks 1 to 5 of four networks as the paper's authors published them, 224 px against 224-32-224.
# block: after which the authors cut, by hand; the stem and each stage is a block.
AUTHORS = {
    "resnet50": ([0.523, 0.858, 0.836, 0.767, 0.395], 2),
    "densenet121": ([0.664, 0.903, 0.955, 0.871, 0.653], 2),
    "vgg16": ([0.683, 0.805, 0.771, 0.680, 0.670], 3),
    "mobilenet_v2": ([0.511, 0.634, 0.874, 0.892, 0.407], 4),
}
# The 19 features of MobileNetV2 on 384 photographs: resized to 32 and back, and fed at 32.
RESTORED = [
    0.997, 0.920, 0.625, 0.779, 0.861, 0.865, 0.851, 0.839, 0.828, 0.807, 0.797, 0.786, 0.763,
    0.727, 0.719, 0.677, 0.614, 0.486, 0.450,
]  # fmt: skip
FED_SMALL = [0.952, 0.755, 0.357, 0.418, 0.555, 0.581, 0.554, 0.228, 0.159, 0.033]


def names(m, word="features"):
    return [f"{word}.{k}" for k in range(m)]


def report(values, stderr=0.01, labels=None, *, view="32", groups=20, **meta):
    """Two views of the same layers, the curve as given; other cells are 0.3."""
    m = len(values)
    labels = labels or names(m)
    cka, errors = np.full((2 * m, 2 * m), 0.3), np.full((2 * m, 2 * m), 0.02)
    np.fill_diagonal(cka, 1.0)
    np.fill_diagonal(errors, 0.0)
    for k, (value, error) in enumerate(zip(values, np.broadcast_to(stderr, m), strict=True)):
        cka[k, m + k] = cka[m + k, k] = value
        errors[k, m + k] = errors[m + k, k] = error
        if math.isnan(value):
            cka[k, k] = np.nan
    told = {"groups": groups, "reference": "224", "resize": "restore", "unbiased": True, **meta}
    return Report(cka, errors, [view] * m + ["224"] * m, [*labels, *labels], told)


def curve(values, is_cut=None, half=0.02, **kwargs):
    values = np.asarray(values, dtype=float)
    m = len(values)
    half = np.broadcast_to(half, m)
    return Curve(
        tuple(names(m)),
        np.ones(m, bool) if is_cut is None else np.asarray(is_cut),
        values,
        half / 2.09,
        values - half,
        values + half,
        **{"groups": 20, **kwargs},
    )
