"""A multi-scale network from real weights: probe, suggest, build `lean`, fine-tune, evaluate.

    python experiments/fine_tune.py --data ../shared/data --work out/tune [--only mobilenetv2]

MobileNetV2 (timm, pad_type=same, its 1,000-way head kept and ten rows of it scored) on Imagenette,
ResNet-20 on CIFAR-10. All choices (the cut, the start of the small subnets) are made on training
images; test images are read once, by the evaluation. Every step is resumable: reports and
checkpoints lie in --work, tables go to results/tune_*.csv, pictures to figures/.
"""

import argparse
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from cifar_resnet import resnet20
from torch import nn

from cka_probe import Report, probe
from cka_probe.models.load import LoadedModel, load_model
from cka_probe.plot.figures import save_figure
from msun import (
    TrainConfig,
    build,
    calibrate,
    evaluate,
    load,
    recalibrated,
    subnet_costs,
    suggest_split,
    train,
)
from msun.cutting.cuts import example_images, find_cuts
from msun.network.kernel_resize import STARTS
from msun.network.model import MSUN
from msun.network.policy import POLICIES
from msun.plot.evaluation import accuracy, pareto
from msun.plot.split import split_curve
from msun.training.size_sampling import step_macs

HERE = Path(__file__).resolve().parent
BEFORE = POLICIES["lean"].but(inputs="native", strides="last")  # as `lean` was at first
CIFAR = "cifar10_jpeg_train20000_test10000.tar.xz"


class Task(NamedTuple):
    """One network on one set of images; scales and sizes are sides in pixels."""

    network: Callable[[Path], LoadedModel]
    images: Callable[[Path, Path], Path]  # (data, work) -> folder with train/ and val/
    rows: Callable[[Path], list[int] | None]
    probed: list[int]
    scales: list[int]
    sizes: list[int]
    upsampled_to: int  # what the network was trained at
    epochs: int
    lr: float
    n_test: int | None


def mobilenetv2(data: Path) -> LoadedModel:
    weights = data / "weights" / "mobilenet_v2_qat.timm_same.safetensors"
    return load_model("timm:mobilenetv2_100", weights, model_args={"pad_type": "same"})


def cifar_resnet20(data: Path) -> LoadedModel:
    weights = data / "weights" / "cifar10" / "resnet20_cifar10_akamaster.safetensors"
    return load_model(f"{HERE / 'cifar_resnet.py'}:{resnet20.__name__}", weights)


def cifar(data: Path, work: Path) -> Path:
    """All of CIFAR-10 that is there, unpacked once as train/CLASS and val/CLASS."""
    target, partial = work / "cifar10", work / "cifar10.part"
    if not target.is_dir():
        with tarfile.open(data / "images" / CIFAR) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and member.name.endswith(".jpg"):
                    split = "val" if "test" in parts else "train"
                    path = partial / split / parts[-2] / parts[-1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    source = archive.extractfile(member)
                    assert source is not None
                    path.write_bytes(source.read())
        partial.rename(target)
    return target


def imagenet_rows(data: Path) -> list[int]:
    """The outputs for the classes of Imagenette, in the order of their folders."""
    known = json.loads((data / "images" / "imagenet_classes.json").read_text())
    folders = sorted(p.name for p in (data / "images" / "imagenette224" / "train").iterdir())
    return [int(known[name][0]) for name in folders]


TASKS = {
    "mobilenetv2": Task(
        mobilenetv2, lambda data, _: data / "images" / "imagenette224", imagenet_rows,
        [32, 64, 128, 224], [32, 64, 128], list(range(32, 225, 16)), 224, 8, 0.03, None,
    ),
    "resnet20": Task(
        cifar_resnet20, cifar, lambda _: None,
        [8, 16, 32], [8, 16, 32], list(range(8, 33, 2)), 32, 4, 0.02, 2000,
    ),
}  # fmt: skip


def chosen_cut(task: Task, loaded: LoadedModel, images: Path, work: Path, name: str) -> str:
    """The rule `recovery` on 384 training images, restored to the network's own size."""
    path = work / "report.npz"
    if not path.exists():
        how: dict[str, Any] = {"mean": loaded.mean, "std": loaded.std, "n_images": 384}
        probe(
            loaded.model, images / "train", task.probed, resize="restore", out=work, **how,
            resume=True,
        )  # fmt: skip
    cuts = find_cuts(loaded.model, example_images(loaded.model, task.probed[-1]))
    costs = subnet_costs(loaded.model, cuts, task.scales)
    choice = suggest_split(Report.load(path), cuts, rule="recovery", costs=costs)
    choice.save(work / "split.json")
    choice.ranking.round(4).to_csv(HERE / "results" / f"tune_{name}_split.csv", index=False)
    save_figure(split_curve(choice), HERE / "figures" / f"tune_{name}_split.png", dpi=90)
    print(f"{name}: {choice.headline}: {choice.why} {choice.rivalry}", flush=True)
    assert choice.layer is not None
    return choice.layer


def best_start(
    task: Task, loaded: LoadedModel, at: str, images: Path, rows: Any, work: Path, name: str
) -> str:
    """Which start of the small subnets keeps the map at the cut most like the reference's.

    For `lean` as it was at first, and where the trunk always runs at the full grid, for which more
    strides go; the choice is by the former at the smallest scale, and today's `lean` takes it too.
    """
    path = HERE / "results" / f"tune_{name}_starts.csv"
    if not (work / "starts.done").exists():
        frames = []
        for merge in ("follow", "full"):
            for start in STARTS:
                net = build(loaded, at, task.scales, start=start, merge=merge, policy=BEFORE)
                table = evaluate(
                    net, images, task.scales, split="train", n_images=384, arm=start, rows=rows,
                    mean=loaded.mean, std=loaded.std, latency=False,
                )  # fmt: skip
                changes = [net.origin.changes[side] for side in table["size_px"]]
                frames.append(table.assign(merge=merge, changes=changes))
        table = pd.concat(frames, ignore_index=True)
        columns = ["merge", "arm", "size_px", "cka", "cka_low", "cka_high", "top1", "changes"]
        table[columns].round(4).to_csv(path, index=False)
        (work / "starts.done").touch()
    table = pd.read_csv(path)
    smallest = table[(table["size_px"] == task.scales[0]) & (table["merge"] == "follow")]
    print(table.to_string(index=False), flush=True)
    return str(smallest.loc[smallest["cka"].idxmax(), "arm"])


def arms(
    task: Task, loaded: LoadedModel, tuned: dict[str, Path], images: Path
) -> dict[str, tuple[nn.Module | LoadedModel, dict[str, Any]]]:
    """What is measured: trained networks, and the plain one in three ways."""
    own = [side for side in task.sizes if side != task.upsampled_to]
    found: dict[str, tuple[nn.Module | LoadedModel, dict[str, Any]]] = {}
    for arm in ("lean", "lean, native"):
        again: MSUN = load(tuned[arm], backbone=loaded.model)
        calibrate(again, images, task.sizes, split="train")  # trained sizes where it is worth it
        found[arm] = load(tuned[arm], backbone=loaded.model), {}
        found[f"{arm}, BN re-estimated"] = again, {}
    single: MSUN = load(tuned["single"], backbone=loaded.model)
    return found | {
        "single scale, tuned, upsampled": (single, {"feed": "upsampled"}),
        "plain, native": (loaded, {}),
        "plain, upsampled": (loaded, {"feed": "upsampled", "reference": task.upsampled_to}),
        "plain, BN re-estimated": (recalibrated(loaded, images, own, split="train"), {}),
    }


def run(name: str, data: Path, work: Path) -> None:
    """One task from the probe to the pictures."""
    task = TASKS[name]
    work.mkdir(parents=True, exist_ok=True)
    loaded, images = task.network(data), task.images(data, work)
    rows = task.rows(data)
    at = chosen_cut(task, loaded, images, work, name)
    start = best_start(task, loaded, at, images, rows, work, name)
    nets = {
        "lean, native": build(loaded, at, task.scales, start=start, policy=BEFORE),
        "single": build(loaded, at, task.scales[-1:], policy=BEFORE),
        "lean": build(loaded, at, task.scales, start=start),
    }
    macs = {arm: step_macs(net) for arm, net in nets.items()}
    tuned = {}
    for arm, net in nets.items():
        epochs = round(task.epochs * macs["lean, native"] / macs[arm])
        config = TrainConfig(
            out=work / arm.replace(", ", "-"), epochs=epochs, lr=task.lr,
            rows=rows, mean=loaded.mean, std=loaded.std, label_smoothing=0.1, val_share=0.1,
            clip=1.0, resume=True,
        )  # fmt: skip
        tuned[arm] = train(net, images / "train", config)
    frames = []
    for arm, (net, options) in arms(task, loaded, tuned, images).items():
        path = work / f"{arm.replace(', ', '_').replace(' ', '-')}.csv"
        if not path.exists():
            evaluate(
                net, images, task.sizes, split="val", n_images=task.n_test, arm=arm,
                rows=rows, mean=loaded.mean, std=loaded.std, latency=False, **options,
            ).to_csv(path, index=False)  # fmt: skip
        frames.append(pd.read_csv(path))
        print(frames[-1].round(3).to_string(index=False), flush=True)
    table = pd.concat(frames, ignore_index=True)
    table.round(5).to_csv(HERE / "results" / f"tune_{name}.csv", index=False)
    save_figure(accuracy(table), HERE / "figures" / f"tune_{name}_accuracy.png", dpi=90)
    save_figure(pareto(table), HERE / "figures" / f"tune_{name}_pareto.png", dpi=90)
    plt.close("all")


def main() -> None:
    """Every task, from where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for reports and networks")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    mpl.use("Agg")
    for name in args.only:
        run(name, args.data, args.work / name)


if __name__ == "__main__":
    main()
