"""Which layers move when images shrink: three trained networks on real photographs.

    python experiments/scale_sensitivity.py --data ../shared/data --work out/scales

Runs `cka-probe run` for every network, way of resizing and reduction that is not done yet (an
interrupted run resumes), then writes results/scale_*.csv and figures/scale_*.png beside this file.
"""

import argparse
import sys
import tarfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from cka_probe import Report
from cka_probe.cli.main import main as cka_probe
from cka_probe.plot import figures as plots

HERE = Path(__file__).resolve().parent
SIDES, SMALL_SIDES = "32,64,96,128,160,192,224", "8,12,16,20,24,28,32"
RESTORED = {SIDES: "32,64,128,224", SMALL_SIDES: SMALL_SIDES}
NETWORKS = {
    "mobilenetv2": [
        "--model", "timm:mobilenetv2_100", "--model-arg", "pad_type=same",
        "--weights", "weights/mobilenet_v2_qat.timm_same.safetensors",
        "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5",
        "--data", "images/imagenette224/val", "--scales", SIDES,
    ],
    "squeezenet": [
        "--model", "squeezenet1_1",
        "--weights", "weights/squeezenet1_1_onnxzoo.torchvision.safetensors",
        "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
        "--data", "images/imagenette224/val", "--scales", SIDES,
    ],
    "resnet20": [
        "--model", f"{HERE / 'cifar_resnet.py'}:resnet20",
        "--weights", "weights/cifar10/resnet20_cifar10_akamaster.safetensors",
        "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
        "--data", "CIFAR", "--scales", SMALL_SIDES,
    ],
}  # fmt: skip
ARMS = [(resize, reduce) for resize in ("native", "restore") for reduce in ("flatten", "mean")]


def cifar_test(data: Path, work: Path, per_class: int = 200) -> Path:
    """The first `per_class` test images of each class, unpacked once."""
    target = work / "cifar10_test"
    if target.is_dir():
        return target
    partial = work / "cifar10_test.part"
    counts: dict[str, int] = {}
    with tarfile.open(data / "images" / "cifar10_jpeg_train20000_test10000.tar.xz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            parts = Path(member.name).parts
            if not member.isfile() or "test" not in parts:
                continue
            label = parts[-2]
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= per_class:
                path = partial / label / parts[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                path.write_bytes(source.read())
    partial.rename(target)
    return target


def run(name: str, resize: str, reduce: str, data: Path, work: Path) -> Report:
    """One run, or the report of it that is there."""
    out = work / f"{name}_{resize}_{reduce}"
    if not (out / "report.npz").exists():
        words = list(NETWORKS[name])
        for flag in ("--weights", "--data"):
            place = words.index(flag) + 1
            given = words[place]
            words[place] = str(cifar_test(data, work) if given == "CIFAR" else data / given)
        if resize == "restore":  # every view costs a forward at full size: fewer of them
            words[words.index("--scales") + 1] = RESTORED[words[words.index("--scales") + 1]]
        words += ["--resize", resize, "--reduce", reduce, "--resume", "--out", str(out)]
        status = cka_probe(["run", *words])
        if status:
            sys.exit(status)
    return Report.load(out / "report.npz")


def save(report: Report, stem: str) -> None:
    """A small CSV (the same layer against the reference) and two pictures."""
    frames = {what: report.against(what=what) for what in ("cka", "stderr", "low", "high")}
    table = frames["cka"].stack().rename("cka").to_frame()
    for what in ("stderr", "low", "high"):
        table[what] = frames[what].stack()
    table.index.names = ["layer", "side_px"]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "figures").mkdir(exist_ok=True)
    table.round(5).to_csv(HERE / "results" / f"{stem}.csv")
    plots.save_figure(plots.curve(report), HERE / "figures" / f"{stem}_curve.png", dpi=90)
    plots.save_figure(plots.heatmap(report), HERE / "figures" / f"{stem}_heatmap.png", dpi=90)
    plt.close("all")


def main() -> None:
    """All runs that are not done, then all tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the full reports")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    mpl.use("Agg")
    for name in args.only:
        for resize, reduce in ARMS:
            save(run(name, resize, reduce, args.data, args.work), f"scale_{name}_{resize}_{reduce}")


if __name__ == "__main__":
    main()
