"""How far `sketch` and `minibatch` are from `exact` on trained networks, whole maps, 800 images.

    python experiments/sketch_accuracy.py --data ../shared/data --work out/sketch

One pass of MobileNetV2 (64 and 128 px) and of a CIFAR ResNet-20 (16 and 32 px) feeds `exact` and a
`sketch` of every size and seed; a pass for each batch size feeds `minibatch`. Writes
results/sketch_accuracy.csv: root mean square distance from `exact` over the cells, the error bar
that the sketch states for itself (root mean square), and the share of cells in which `exact` lies
within the 95 % interval of the sketch's own error and of the report's.
"""

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from cifar_resnet import resnet20
from safetensors.torch import load_file
from scale_sensitivity import cifar_test
from scipy.stats import t

from cka_probe.engine.exact import Exact
from cka_probe.engine.minibatch import Minibatch
from cka_probe.engine.sketch import Sketch
from cka_probe.inputs.batches import iterate_batches, open_images, plan
from cka_probe.inputs.views import scale_transforms
from cka_probe.models.load import load_model
from cka_probe.probing.forward import Forwards
from cka_probe.progress import progress_bar

HERE = Path(__file__).resolve().parent
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Fan:
    """Features to several estimators at once."""

    def __init__(self, estimators):
        self.estimators = estimators

    def update(self, key, x):
        for estimator in self.estimators.values():
            estimator.update(key, x)

    def end_batch(self, index):
        for estimator in self.estimators.values():
            estimator.end_batch(index)


def mobilenet(data, work):
    weights = data / "weights" / "mobilenet_v2_qat.timm_same.safetensors"
    model = load_model("timm:mobilenetv2_100", weights, model_args={"pad_type": "same"}).model
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model, data / "images" / "imagenette224" / "val", (64, 128), half


def cifar(data, work):
    model = resnet20()
    model.load_state_dict(
        load_file(data / "weights" / "cifar10" / "resnet20_cifar10_akamaster.safetensors")
    )
    return model, cifar_test(data, work), (16, 32), IMAGENET


def feed(model, source, sides, norm, batch_size, estimators):
    """Every image at every side through the network, into all estimators: their results."""
    views = scale_transforms(sides, reference=max(sides), resize="native", antialias=True, **norm)
    with ExitStack() as stack:
        forwards = Forwards(dict.fromkeys(views, model), Fan(estimators), stack)
        bar = stack.enter_context(progress_bar(len(source), desc="probe", unit="image"))
        for batch in iterate_batches(source, views, batch_size=batch_size, seed=0):
            forwards.run_batch(batch, bar)
            forwards.end_batch(batch.index)
    return {name: estimator.compute() for name, estimator in estimators.items()}


def rows(network, exact, results):
    upper = np.triu_indices(len(exact.cka), 1)
    for (kind, size, seed), result in results.items():
        gap = (result.cka - exact.cka)[upper]
        row = {"network": network, "estimator": kind, "size": size, "seed": seed}
        row |= {"cells": int(np.isfinite(gap).sum()), "nan": int(np.isnan(gap).sum())}
        row["distance"] = f"{np.sqrt(np.nanmean(gap**2)):.5f}"
        row["bias"] = f"{np.nanmean(gap):.5f}"
        row["largest"] = f"{np.nanmax(np.abs(gap)):.5f}"
        row["sampling_error"] = f"{np.sqrt(np.nanmean(exact.stderr[upper] ** 2)):.5f}"
        if result.sketch_stderr is not None:
            own = result.sketch_stderr[upper]
            row["own_error"] = f"{np.sqrt(np.nanmean(own**2)):.5f}"
            for name, bar, groups in (
                ("within_own", own, 8),
                ("within_stated", result.stderr[upper], result.groups),
            ):
                half = t.ppf(0.975, groups - 1) * bar
                row[name] = f"{np.nanmean((np.abs(gap) <= half + 1e-6)[np.isfinite(gap)]):.4f}"
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--sizes", default="128,512,2048")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batches", default="8,64")
    parser.add_argument("--networks", default="mobilenetv2,resnet20")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sketch_accuracy.csv")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.work.mkdir(parents=True, exist_ok=True)
    found = []
    for name, make in {"mobilenetv2": mobilenet, "resnet20": cifar}.items():
        if name not in args.networks.split(","):
            continue
        model, folder, sides, norm = make(args.data, args.work)
        source = open_images(folder, n_images=args.images, seed=0)
        n = len(source)
        estimators = {("exact", 0, 0): Exact()}
        for size in map(int, args.sizes.split(",")):
            for seed in range(args.seeds):
                estimators["sketch", size, seed] = Sketch(size=size, seed=seed, n_images=n)
        results = feed(model, source, sides, norm, 64, estimators)
        exact = results.pop(("exact", 0, 0))
        for b in map(int, filter(None, args.batches.split(","))):
            one = {("minibatch", b, 0): Minibatch(len(plan(n, b)))}
            results |= feed(model, source, sides, norm, b, one)
        found += rows(name, exact, results)
        fields = list(dict.fromkeys(key for row in found for key in row))
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
