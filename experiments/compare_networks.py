"""Two networks layer by layer, and one network on worse images: CIFAR ResNets of He et al. 2016.

    python experiments/compare_networks.py --data ../shared/data --work out/compare

Runs `cka-probe compare` on ResNet-20 and ResNet-56, then `probe` with views of our own (blur,
noise, contrast, crop) on ResNet-20, each for flattened maps and channel means; what is done is not
repeated, and an interrupted run resumes. Writes results/compare_*.csv and figures/compare_*.png
beside this file.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from scale_sensitivity import cifar_test
from torch import Tensor, nn
from torchvision.transforms import v2

from cka_probe import Report, probe
from cka_probe.cli.main import main as cka_probe
from cka_probe.inputs.batches import iterate_batches, open_images
from cka_probe.models.load import load_model
from cka_probe.plot import figures as plots

HERE = Path(__file__).resolve().parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = ("resnet20", "resnet56")
REDUCTIONS = ("flatten", "mean")


def noise(image: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.1 on pixels of 0..1; `probe` seeds it by image."""
    return (image + 0.1 * torch.randn_like(image)).clamp(0, 1)


# What is done to a decoded image, (3, 32, 32) in 0..1, before it is normalised.
CORRUPTIONS: dict[str, nn.Module] = {
    "sharp": nn.Identity(),
    "blur 1 px": v2.GaussianBlur(7, 1.0),
    "blur 2 px": v2.GaussianBlur(13, 2.0),
    "noise 0.1": v2.Lambda(noise),
    "contrast 0.5": v2.ColorJitter(contrast=(0.5, 0.5)),
    "crop 24 px": v2.CenterCrop(24),
}
TRANSFORMS = {
    name: v2.Compose([change, v2.Normalize(MEAN, STD)]) for name, change in CORRUPTIONS.items()
}


def spec(network: str) -> str:
    """The network as the command line names it."""
    return f"{HERE / 'cifar_resnet.py'}:{network}"


def weights(network: str, data: Path) -> Path:
    """Its trained weights."""
    return data / "weights" / "cifar10" / f"{network}_cifar10_akamaster.safetensors"


def compare(reduce: str, data: Path, images: Path, work: Path) -> Report:
    """`cka-probe compare` of the two networks, or the report of it that is there."""
    out = work / f"resnet20_resnet56_{reduce}"
    if not (out / "report.npz").exists():
        words = ["compare", "--data", str(images), "--size", "32", "--reduce", reduce, "--resume"]
        for network in NETWORKS:
            words += ["--model", spec(network), "--weights", str(weights(network, data))]
        words += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
        if status := cka_probe([*words, "--out", str(out)]):
            sys.exit(status)
    return Report.load(out / "report.npz")


def corrupted(reduce: str, data: Path, images: Path, work: Path) -> Report:
    """ResNet-20 on sharp and on worse images: a view each; resumes by itself."""
    model = load_model(spec("resnet20"), weights("resnet20", data)).model
    views = {name: (model, transform) for name, transform in TRANSFORMS.items()}
    layers = ["bn1", "layer?.?", "linear"]
    out = work / f"corruptions_{reduce}"
    return probe(None, images, views=views, layers=layers, reduce=reduce, out=out, resume=True)


@torch.no_grad()
def top1(models: Mapping[str, nn.Module], images: Path) -> pd.DataFrame:
    """Share of images whose folder a network names: sharp for both, and the rest for the first."""
    source = open_images(images)
    classes = sorted({Path(name).parts[0] for name in source.ids})
    first = next(iter(models))
    right = {(name, "sharp"): 0 for name in models} | {(first, view): 0 for view in TRANSFORMS}
    for batch in iterate_batches(source, TRANSFORMS, batch_size=100, seed=0):
        truth = torch.tensor([classes.index(Path(name).parts[0]) for name in batch.ids])
        for name, view in right:
            right[name, view] += int((models[name](batch.views[view]).argmax(1) == truth).sum())
    rows = [(name, view, count / len(source)) for (name, view), count in right.items()]
    return pd.DataFrame(rows, columns=["network", "view", "top1"])


def table(frames: Mapping[str, pd.DataFrame], names: list[str]) -> pd.DataFrame:
    """Layers x layers (or x views) of several values as one row for each cell."""
    long = pd.DataFrame({what: frame.stack() for what, frame in frames.items()})
    return long.rename_axis(names).round(4)


def main() -> None:
    """All runs that are not done, then all tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the full reports")
    args = parser.parse_args()
    mpl.use("Agg")
    results, figures = HERE / "results", HERE / "figures"
    for folder in (results, figures):
        folder.mkdir(exist_ok=True)
    images = cifar_test(args.data, args.work)
    what = ("cka", "low", "high")
    for reduce in REDUCTIONS:
        report = compare(reduce, args.data, images, args.work)
        frames = {name: report.between("a", "b", name) for name in what}
        stem = f"compare_resnet20_resnet56_{reduce}"
        table(frames, list(NETWORKS)).to_csv(results / f"{stem}.csv")
        ax = plots.grid(report, "a", "b")
        ax.set(ylabel="layer in ResNet-20", xlabel="layer in ResNet-56")
        plots.save_figure(ax, figures / f"{stem}.png", dpi=90)

        report = corrupted(reduce, args.data, images, args.work)
        frames = {name: report.against("sharp", name).drop(columns="sharp") for name in what}
        stem = f"compare_corruptions_{reduce}"
        table(frames, ["layer", "view"]).to_csv(results / f"{stem}.csv")
        plots.save_figure(plots.curve(report), figures / f"{stem}_curve.png", dpi=90)

    accuracy = args.work / "top1.csv"
    if not accuracy.exists():
        models = {name: load_model(spec(name), weights(name, args.data)).model for name in NETWORKS}
        top1(models, images).to_csv(accuracy, index=False)
    shutil.copyfile(accuracy, results / "compare_top1.csv")


if __name__ == "__main__":
    main()
