"""Does a change of the code leave every number as it was? Dump results before and after, compare.

    PYTHONPATH=/path/to/old/checkout python experiments/same_numbers.py dump before.npz
    PYTHONPATH=/path/to/new/checkout python experiments/same_numbers.py dump after.npz
    python experiments/same_numbers.py compare before.npz after.npz

`dump` runs whichever `cka_probe` and `msun` are importable, on one CPU thread, with seeded weights
and embedded images: CKA of features at hand, reports of six networks, suggested splits, short
trainings with calibration and evaluation, and multi-scale networks on seven backbones with their
cuts, costs, weights and outputs. `compare` prints one table and exits with 1 unless names, counts
and weights (as SHA-256) are equal and no other number moved by more than 1e-12, relative to the
larger of 1 and the number. Take both dumps on one machine: another processor rounds differently.

Only the public API is used and no name that is internal to the packages is kept, so that a refactor
may rename; what is known to move is looked up under its new and its old name. Layers and cuts are
named as the backbones name them, and weights are kept in order, without names.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: with more threads sums have another order

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torchvision.utils import save_image

import cka_probe
import msun

try:
    from cka_probe.inputs import glyphs
    from cka_probe.models.embedded import glyphnet
except ImportError:  # before the modules moved into sub-packages
    from cka_probe.glyphnet import glyphnet

    from cka_probe import glyphs
new_classifier = getattr(msun, "replace_classifier", None) or msun.new_head

TOLERANCE = 1e-12
COLUMNS = ("size_px", "top1", "top5", "gmacs", "params_m", "cka", "cka_low", "cka_high")
VIT, CONVNEXT = "timm:vit_tiny_patch16_224", "timm:convnext_atto"
VIT_SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
PAPER = (32, 128, 224)  # the scales for which the preset "paper" has subnets made by hand


class Found(dict):
    """Arrays by "group: detail"; texts must be equal, numbers may differ by `TOLERANCE`."""

    def __setitem__(self, name, values):
        assert name not in self, name
        array = np.asarray(values.detach() if isinstance(values, torch.Tensor) else values)
        super().__setitem__(name, array if array.dtype.kind == "U" else array.astype(np.float64))


def words(values):
    """Anything that must be equal, as an array of texts."""
    return np.array([str(value) for value in values], dtype=str)


def hashes(model):
    """Type, shape and SHA-256 of every parameter and buffer, in order, without their names."""
    told = []
    for x in (x for x in model.state_dict().values() if isinstance(x, torch.Tensor)):
        bits = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        told.append((x.dtype, tuple(x.shape), hashlib.sha256(bits).hexdigest()))
    return words(told)


def columns(table):
    """What `evaluate` measured, without times."""
    known = [name for name in COLUMNS if name in table]
    return table[known].to_numpy(np.float64, na_value=np.nan)


def noise(*shape, seed=0):
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, *args, **options):
    """A network with random weights that are always the same, in eval mode.

    Norms start as 1 and 0, which would hide one that is lost or swapped: their weights are moved,
    and their statistics are those of noise.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make(*args, **options).train()
        for x in (x for x in model.parameters() if x.ndim == 1):
            x.add_(0.1 * torch.randn_like(x))
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 0.5
        for k in range(6):
            model(noise(8, 3, 64, 64, seed=k))
    return model.eval()


def network(name):
    """A backbone by name: the embedded one, one of timm, else one of torchvision; 62 classes."""
    if name == "glyphnet":
        return glyphnet()
    if name in (VIT, CONVNEXT):
        options = {**VIT_SHAPE, "dynamic_img_size": True} if name == VIT else {}
        return seeded(timm.create_model, name[5:], num_classes=62, **options)
    return seeded(torchvision.models.get_model, name, weights=None, num_classes=62)


def photos(folder):
    """64 image files in 4 class folders: coloured, not square, and of several sizes."""
    for k in range(64):
        path = folder / f"class{k % 4}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = noise(1, 3, 6, 8, seed=k) + noise(1, 3, 6, 8, seed=1000 + k % 4)
        save_image(nn.functional.interpolate(coarse, (60 + k % 9, 90 - k % 7)).sigmoid(), path)
    return folder


def keep_report(found, group, report, folder):
    """What a report says, after a round trip through its file."""
    report.save(folder / "report.npz")
    report = cka_probe.Report.load(folder / "report.npz")
    found[f"{group}: cka"], found[f"{group}: stderr"] = report.cka, report.stderr
    found[f"{group}: interval"] = report.interval()
    found[f"{group}: entries"] = words(zip(report.view, report.layer, strict=True))
    found[f"{group}: groups"] = words([report.meta["groups"], report.meta["n_images"]])
    if "layers" in report.meta:  # those of `probe`
        rows = [report.meta["layers"][name] for name in report.layers]
        macs = [report.meta["view_macs"][view] for view in report.views]
        shapes = [[row["views"][view]["shape"] for view in report.views] for row in rows]
        found[f"{group}: costs"] = words([*macs, *(row["parameters"] for row in rows)])
        found[f"{group}: shapes"] = words(shapes)


def features(found, folder):
    """CKA of features at hand: values, error bars, gradients, a permutation test."""
    x = noise(60, 10).double()
    near = (100 + x[:, :4] + 0.5 * noise(60, 4, seed=3)).float()  # far from centred
    wide = x @ noise(10, 400, seed=1).double() + noise(60, 400, seed=2)
    for kernel, unbiased in (("linear", True), ("linear", False), ("rbf", True), ("rbf", False)):
        how, group = {"kernel": kernel, "bandwidth": 0.7}, f"features {kernel} {unbiased=}"
        y = noise(60, 8, seed=4) + 0.3 * x[:, :8]
        found[f"{group}: permutation test"] = cka_probe.permutation_test(x, y, 99, seed=3, **how)
        how["unbiased"] = unbiased
        report = cka_probe.cka_matrix({"x": x, "near": near, "wide": wide}, seed=2, **how)
        keep_report(found, group, report, folder)
        found[f"{group}: of two"] = cka_probe.cka(x, near, **how)
        a, b = x.clone().requires_grad_(), wide.float().requires_grad_()
        loss = cka_probe.cka_loss(a, b, **how)
        loss.backward()
        found[f"{group}: loss"] = loss
        found[f"{group}: gradients"] = torch.cat((a.grad.flatten(), b.grad.flatten()))


def probes(found, folder):
    """Reports: every estimator, both kernels, all reductions and both resizes, on six networks."""
    drawn, files = glyphs.tensor("test", 64)[0], photos(folder / "probed")
    reach = {"layers": ["conv1", "bn1", "relu", "layer1*", "fc"]}  # an in-place ReLU among them
    blocks, smooth = {"layers": r"re:blocks\.\d|norm"}, {"antialias": False}
    for name, images, scales, how, more in (
        ("glyphnet", drawn, [16, 32, 64], "minibatch linear flatten native", {}),
        ("glyphnet", drawn, [16, 64], "exact rbf flatten restore", {"bandwidth": 0.5}),
        ("glyphnet", drawn, [32, 64], "exact linear flatten native", {}),
        ("resnet18", drawn, [32, 64], "minibatch rbf grid=2 restore", reach),
        ("resnet18", files, [32, 48], "sketch linear flatten native", reach),
        ("mobilenet_v2", files, [32, 48], "exact linear mean native", {"n_images": 50}),
        ("squeezenet1_1", files, [32, 64], "minibatch linear flatten restore", smooth),
        (VIT, drawn, [32, 64], "minibatch linear tokens native", blocks),
        (VIT, drawn, [32, 48], "exact rbf mean restore", {}),
        (CONVNEXT, drawn, [32, 64], "sketch linear flatten restore", {}),
    ):
        names = ("estimator", "kernel", "reduce", "resize")
        options = {**dict(zip(names, how.split(), strict=True)), **more, "batch_size": 12}
        options |= {"sketch_size": 64} if options["estimator"] == "sketch" else {}
        report = cka_probe.probe(network(name), images, scales, seed=1, progress=False, **options)
        group = f"probe {name} {how}"
        keep_report(found, group, report, folder)
    views = {"trained": glyphnet(), "random": seeded(glyphnet, trained=False)}
    options = {"estimator": "exact", "kernel": "linear", "reduce": "flatten", "batch_size": 16}
    report = cka_probe.probe(None, drawn, views=views, seed=0, progress=False, **options)
    keep_report(found, "probe two networks", report, folder)


def splits(found, folder):
    """Where a report says that a network should be cut."""
    images = glyphs.tensor("train", 96)[0]
    options = {"estimator": "minibatch", "resize": "restore", "kernel": "linear", "seed": 0}
    options |= {"reduce": "flatten", "batch_size": 12, "progress": False}
    for name, scales in (("glyphnet", [16, 32, 64]), ("resnet18", [32, 64])):
        model = network(name)
        cuts = msun.find_cuts(model, images[:2].clone())
        report = cka_probe.probe(model, images, scales, layers=[c.name for c in cuts], **options)
        for rule in ("affordable", "recovery", "largest_recovery"):
            choice, group = msun.suggest_split(report, cuts, rule=rule), f"split {name} {rule}"
            found[f"{group}: choice"] = words([choice.layer, choice.runner_up, choice.clear])
            found[f"{group}: order"] = words(choice.ranking["layer"])
            found[f"{group}: ranking"] = choice.ranking[["score", "cka", "parameters"]].to_numpy()


def trainings(found, folder):
    """Short trainings: final weights and checkpoint, then calibration and evaluation."""
    files, tensors = photos(folder / "trained"), (noise(48, 3, 64, 64), torch.arange(48) % 5)
    common = {"lr": 0.02, "batch_size": 16, "val_share": 0.1, "seed": 2, "progress": False}
    averaged = {"epochs": 2, "n_images": 124, "ema": 0.9, "distill": 0.5}
    raw = {"epochs": 1, "constraint": "raw", "tau": 0.001, "clip": 1.0, "decay_norms": False}
    for name, preset, at, scales, data, classes, more in (
        ("glyphnet", "lean", "layer2.0", (16, 32, 64), "glyphs", None, averaged),
        ("resnet18", "paper", "layer1", (32, 64), files, 4, raw),
        ("mobilenet_v2", "lean", "features.3", (32, 64), tensors, 5, {"constraint": "cka"}),
    ):
        backbone, group = network(name), f"train {name} {preset}"
        backbone = new_classifier(backbone, classes, seed=3) if classes else backbone
        net = msun.build(backbone, at, scales, preset=preset)
        options = {"out": folder / name, "epochs": 2, **common, **more}
        path = msun.train(net, data, msun.TrainConfig(**options))
        found[f"{group}: weights"] = hashes(net)
        found[f"{group}: checkpoint"] = hashes(msun.load(path, backbone=backbone))
        sizes = [scales[0] - 4, *scales, scales[-1] - 12]
        source = {"n_images": 48, "seed": 1, "batch_size": 16, "progress": False}
        msun.calibrate(net, data, sizes, **source)
        found[f"{group}: calibrated weights"] = hashes(net)
        for feed in ("native", "upsampled"):
            options = {"feed": feed, "mixed": feed == "native", "cka": True, "latency": False}
            table = msun.evaluate(net, data, sizes, **options, **source)
            found[f"{group}: evaluate {feed}"] = columns(table)


@torch.no_grad()
def networks(found, folder):
    """Cuts, both halves of one, and multi-scale networks of both presets."""
    for name, at, scales in (
        ("glyphnet", "layer2.0", (16, 32, 64)),
        ("resnet18", "layer2", (32, 64, 96)),
        ("resnet50", "layer1", PAPER),
        ("mobilenet_v2", "features.9", PAPER),
        ("densenet121", "features.transition1", PAPER),
        ("squeezenet1_1", "features.7", (64, 128)),
        (CONVNEXT, "stages.1", (32, 64, 128)),
    ):
        model, x, group = network(name), noise(2, 3, scales[-1], scales[-1]), f"cuts {name}"
        cuts = msun.find_cuts(model, x)
        found[f"{group}: names"] = words(msun.cut_points(model, x))
        found[f"{group}: details"] = words((c.names, c.shape, c.parameters) for c in cuts)
        head, tail = msun.cut(model, at, x)
        found[f"{group}: map"] = head(x).mean(dim=(2, 3), dtype=torch.float64)
        found[f"{group}: logits"] = tail(head(x))
        choices = [("lean", {}), ("paper", {})]
        if name == "glyphnet":  # the other choices that `build` has
            choices += [("lean", {"start": start}) for start in ("resampled", "dilated")]
            choices += [("lean", {"subnets": "shared"}), ("paper", {"merge": "native"})]
        for preset, more in choices:
            net = msun.build(model, at, scales, preset=preset, **more)
            built(found, " ".join(["build", name, preset, *more.values()]), net)


def built(found, group, net):
    """A network as `build` made it: costs, weights, outputs, and what `evaluate` says."""
    small, top = net.scales[0], net.scales[-1]
    sizes = [*net.scales, small * 3 // 4, sum(net.scales[-2:]) // 2]
    costs = [sum(p.numel() for p in net.parameters()), *map(net.macs, sizes)]
    found[f"{group}: costs"] = words([*costs, net.macs(top, top - 16)])
    found[f"{group}: weights"] = hashes(net)
    for side in sizes:
        found[f"{group}: logits at {side}"] = net(noise(2, 3, side, side, seed=side))
    mixed = [noise(3, top - 8, top, seed=7), noise(3, small, small, seed=8)]
    found[f"{group}: logits of a list"] = net(mixed)
    data = (noise(8, 3, top, top, seed=9), torch.arange(8))
    options = {"rows": range(8), "cka": True, "latency": False, "batch_size": 4, "seed": 0}
    table = msun.evaluate(net, data, net.scales[:2], progress=False, **options)
    found[f"{group}: evaluate"] = columns(table)


def dump(path):
    """Compute everything and write it to one .npz, without pickle."""
    torch.set_num_threads(1)
    about = {"cka_probe": cka_probe.__file__, "msun": msun.__file__, "torch": torch.__version__}
    print(json.dumps(about), flush=True)
    began, found = time.perf_counter(), Found()
    with tempfile.TemporaryDirectory() as folder:
        for part in (features, probes, splits, trainings, networks):
            part(found, Path(folder))
            print(f"{part.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    with path.open("wb") as file:
        np.savez_compressed(file, **found, about=np.array(json.dumps(about)))


def read(path):
    """The arrays of a dump."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    print(f"{path}: {found.pop('about')}")
    return found


def difference(a, b):
    """The largest between two arrays of numbers (nan equals nan), or how many words differ."""
    if a is None or b is None or a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return np.inf
    if a.dtype.kind == "U":
        return int((a != b).sum())
    gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    return float(np.nan_to_num(gap / np.fmax(1, np.abs(a)), nan=np.inf).max(initial=0))


def compare(paths):
    """Print a row for each group and each detail that differs; return whether all is the same."""
    a, b = map(read, paths)
    rows, bad = {}, []  # a row: numbers, the largest difference, texts, how many differ
    for name in sorted({*a, *b}):
        gap, some = difference(a.get(name), b.get(name)), a[name] if name in a else b[name]
        text = some.dtype.kind == "U"
        for group in (name.split(": ")[0], "(all)"):
            row = rows.setdefault(group, [0, 0.0, 0, 0])
            row[2 * text] += some.size
            row[2 * text + 1] = row[3] + gap if text else max(row[1], gap)
        if gap > (0 if text else TOLERANCE):
            bad.append(f"{name}: differs: {'absent, a shape, or nan' if gap == np.inf else gap}")
    width = max(map(len, rows), default=0)
    print(f"{'what':{width}}     numbers  largest difference  names, weights  that differ")
    for group, (numbers, gap, texts, unequal) in sorted(rows.items()):
        print(f"{group:{width}}  {numbers:10,}  {gap:18.2g}  {texts:14,}  {unequal:11,}")
    print(*bad, f"{len(bad)} of {len({*a, *b})} results differ", sep="\n")
    return bool(a) and not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("dump", help="compute, and write a file").add_argument("out", type=Path)
    commands.add_parser("compare", help="compare two of them").add_argument("files", nargs=2)
    args = parser.parse_args()
    if args.command == "dump":
        dump(args.out)
    elif not compare(args.files):
        sys.exit(1)


if __name__ == "__main__":
    main()
