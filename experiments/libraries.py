"""The libraries people use now, and this one, on the same traps: who is right, who says so.

    pip install -e '.[bench]'
    python experiments/libraries.py

Every case has a truth from float64 numpy (tests/helpers/oracle.py) on the numbers that the library
gets.
torchlens computes the biased CKA and is held to that, the others to the unbiased one. Each is
called by its documented interface with its defaults; one that takes no features gets a network
whose layer "tap" gives them. Writes results/libraries.csv and prints the table as Markdown, with
the error behind each answer. One thread, fixed seeds, batches of 64, some minutes, nothing timed.
"""

import contextlib
import copy
import csv
import importlib.metadata
import io
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
oracle = importlib.import_module("oracle")
Cells = dict[tuple[str, str], float]  # (layer of network a, layer of network b) -> CKA
Truth = dict[str, float]  # "unbiased", "biased" -> CKA
ZERO, ONE, UNDEFINED = ({"unbiased": v, "biased": v} for v in (0.0, 1.0, math.nan))


class Half(nn.Module):
    """Images (n, d, 1, 1) -> their channels `part` as features (n, p), at `tap`."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part, self.tap = part, nn.Identity()

    def forward(self, images: Tensor) -> Any:
        return self.tap(images[:, self.part, 0, 0])


class Job(NamedTuple):
    """Layers `rows` of network a against `cols` of network b, over images in batches."""

    a: nn.Module
    b: nn.Module
    images: Tensor
    rows: list[str]
    cols: list[str]
    batch: int
    shuffle: bool = False

    def loader(self) -> DataLoader[Any]:  # the last batch as small as it comes, the default
        labels = torch.zeros(len(self.images), dtype=torch.long)
        return DataLoader(TensorDataset(self.images, labels), self.batch, shuffle=self.shuffle)


def tapped(x: Tensor, y: Tensor, batch: int, shuffle: bool = False) -> Job:
    """Features (n, p) and (n, q) as the taps of two networks over one set of images."""
    images, p = torch.cat([x, y], 1)[:, :, None, None], x.shape[1]
    return Job(Half(slice(p)), Half(slice(p, None)), images, ["tap"], ["tap"], batch, shuffle)


def label(matrix: Tensor, rows: list[str], cols: list[str]) -> Cells:
    return {(r, c): float(matrix[i, j]) for i, r in enumerate(rows) for j, c in enumerate(cols)}


def by_cka_probe(lib: Any, job: Job) -> Cells:  # it takes no loader: it shuffles, with a seed
    views = {"a": (job.a, None), "b": (job.b, None)}
    how = {"views": views, "batch_size": job.batch, "progress": False}
    layers = list(dict.fromkeys(job.rows + job.cols))
    table = lib.probe(None, job.images, layers=layers, **how).between("a", "b")
    return {(r, c): float(table.loc[r, c]) for r in job.rows for c in job.cols}


def by_pytorch_cka(lib: Any, job: Job) -> Cells:
    how = {"layers": job.rows, "model2_layers": job.cols, "device": "cpu", "progress": False}
    (matrix,) = lib.compute_cka(job.a, job.b, job.loader(), **how)
    return label(matrix, job.rows, job.cols)


def by_torch_cka(lib: Any, job: Job) -> Cells:
    layers = {"model1_layers": job.rows, "model2_layers": job.cols}
    run = lib.CKA(job.a, job.b, "a", "b", device="cpu", **layers)
    run.compare(job.loader())
    out = run.export()
    return label(out["CKA"], out["model1_layers"], out["model2_layers"])


def by_cka_pytorch(lib: Any, job: Job) -> Cells:
    how = {"device": torch.device("cpu"), "verbose": False}
    run = lib.CKACalculator(job.a, job.b, job.rows, job.cols, **how)
    passes = {"num_epochs": 1} if job.batch > 1024 else {}  # default: the same sums ten times
    matrix = run.calculate_cka_matrix(job.loader(), **passes)
    return label(matrix, run.hook_manager1.module_names, run.hook_manager2.module_names)


def by_torchlens(lib: Any, job: Job) -> Cells:
    sums = {(r, c): lib.stats.CKA() for r in job.rows for c in job.cols}
    for images, _ in job.loader():
        with torch.no_grad():
            a, b = (lib.trace(model, images).modules for model in (job.a, job.b))
        if len(images) == len(job.images):  # whole maps are too wide for running covariances
            return {(r, c): lib.stats.cka(a[r].out, b[c].out) for r, c in sums}
        for (r, c), total in sums.items():
            total.update(a[r].out, b[c].out)
    return {pair: total.result() for pair, total in sums.items()}


class Library:
    """One library behind two questions; `lib` is None where it is not installed."""

    def __init__(
        self, name: str, module: str, layers: Callable[[Any, Job], Cells],
        direct: Callable[[Any, Tensor, Tensor], Any] | None = None, kind: str = "unbiased",
    ) -> None:  # fmt: skip
        self.name, self.layers, self.direct, self.kind = name, layers, direct, kind
        self.lib, self.version = None, ""
        with contextlib.suppress(ImportError):
            self.lib = importlib.import_module(module)
            self.version = importlib.metadata.version(name)

    def networks(self, job: Job) -> Cells:
        return self.layers(self.lib, job)

    def features(self, x: Tensor, y: Tensor) -> float:
        if self.direct:
            return float(self.direct(self.lib, x, y))
        return self.networks(tapped(x, y, len(x)))["tap", "tap"]


LIBRARIES = (
    Library("cka-probe", "cka_probe", by_cka_probe, lambda lib, *xy: lib.cka(*xy)),
    Library("pytorch-cka", "cka", by_pytorch_cka, lambda lib, *xy: lib.cka_from_features(*xy)),
    Library("torch-cka", "torch_cka", by_torch_cka),
    Library("cka-pytorch", "cka_pytorch", by_cka_pytorch),
    Library("torchlens", "torchlens", by_torchlens, lambda lib, *xy: lib.stats.cka(*xy), "biased"),
)


class Case(NamedTuple):
    trap: str
    what: str
    truth: Truth
    ask: Callable[[Library], float | None]  # None: the answer has no row of that name


def truth_of(x: Tensor, y: Tensor) -> Truth:
    a, b = x.flatten(1).double().numpy(), y.flatten(1).double().numpy()
    return {kind: float(oracle.cka(a, b, unbiased=kind == "unbiased")) for kind in ZERO}


def related(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two Gaussian float32 feature arrays (n, d) that share half of their variance."""
    g = torch.Generator().manual_seed(seed)
    x, mix, own = (torch.randn(rows, d, generator=g) for rows in (n, d, n))
    return x, 0.7 * x @ mix / math.sqrt(d) + 0.7 * own


def feature_cases() -> list[Case]:
    def of(trap: str, what: str, x: Tensor, y: Tensor, truth: Truth | None = None) -> Case:
        return Case(trap, what, truth or truth_of(x, y), lambda lib: lib.features(x, y))

    x, y = related(256, 64, 0)
    many, c = related(4096, 64, 2)[0], torch.full((256, 64), 0.1)
    g = torch.Generator().manual_seed(1)
    wide = [torch.randn(128, 4096, generator=g) for _ in range(2)]
    draws = [[torch.randn(32, 512, generator=g) for _ in range(2)] for _ in range(100)]

    def mean(lib: Library) -> float:
        return fmean(lib.features(a, b) for a, b in draws)

    return [
        of("none", "256 images, 64 features of mean 0, std 1", x, y),
        of("not centred", "the same + 100", x + 100, y + 100),
        of("not centred", "the same + 10,000", x + 1e4, y + 1e4),
        of("small scale", "the same x 0.001", x * 1e-3, y * 1e-3),
        of("float16", "the same in float16", x.half(), y.half()),
        of("many images", "CKA(X, X), n = 2,048, d = 64", many[:2048], many[:2048], ONE),
        of("many images", "CKA(X, X), n = 4,096, d = 64", many, many, ONE),
        of("constant", "CKA(X, C), C = 0.1 throughout", x, c, UNDEFINED),
        of("constant", "CKA(C, C)", c, c, UNDEFINED),
        of("unrelated", "n = 128, d = 4,096", wide[0], wide[1], ZERO),
        Case("unrelated", "n = 32, d = 512, mean of 100 draws", ZERO, mean),
    ]


def batch_cases() -> list[Case]:
    def once(lib: Library, x: Tensor, y: Tensor, shuffle: bool = False) -> float:
        return lib.networks(tapped(x, y, 64, shuffle))["tap", "tap"]

    def tail(n: int) -> Case:
        x, y = related(n, 64, 3)
        return Case("tail of 1 to 3", f"n = {n}", truth_of(x, y), lambda lib: once(lib, x, y))

    def spread(trap: str, n: int) -> Case:
        sets = [related(n, 64, 100 + i) for i in range(100)]
        truths = [truth_of(*z) for z in sets]

        def rms(lib: Library) -> float:
            off = [once(lib, *z) - t[lib.kind] for z, t in zip(sets, truths, strict=True)]
            return math.sqrt(fmean(e * e for e in off))

        return Case(trap, f"n = {n}, rms error against whole-set CKA, 100 draws", ZERO, rms)

    x, _ = related(256, 64, 4)
    shuffled = Case("shuffle=True", "CKA(X, X), n = 256", ONE, lambda lib: once(lib, x, x, True))
    return [*map(tail, (129, 130, 131)), spread("none", 128), spread("tail of 4", 132), shuffled]


def network_cases() -> list[Case]:
    """Traps in networks: random weights, 64 images of noise at 32 px, one batch."""
    torch.manual_seed(5)
    vgg = torchvision.models.vgg16_bn().features.eval()
    resnet50, resnet18 = (getattr(torchvision.models, k)().eval() for k in ("resnet50", "resnet18"))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(6))

    def of(trap: str, name: str, model: nn.Module, rows: list[str], col: str) -> list[Case]:
        given, after = dict[str, Tensor](), dict[str, Tensor]()  # as the layer gave it; at the end

        def keep(path: str, _: nn.Module, __: Any, out: Tensor) -> None:
            given[path], after[path] = out.clone(), out

        hooked = copy.deepcopy(model)
        for path in [*rows, col]:
            hooked.get_submodule(path).register_forward_hook(partial(keep, path))
        with torch.no_grad():
            hooked(images)

        def case(row: str) -> Case:
            def ask(lib: Library) -> float | None:
                fresh = copy.deepcopy(model)  # some leave their hooks on
                return lib.networks(Job(fresh, fresh, images, rows, [col], 64)).get((row, col))

            truth, late = (truth_of(k[row], k[col]) for k in (given, after))
            also = f"; after ReLU {late['unbiased']:.4g}" if truth != late else ""
            return Case(trap, f"{name}: CKA({row}, {col}){also}", truth, ask)

        return [case(row) for row in rows]

    return [
        *of("noise images", "resnet18", resnet18, ["layer1.0"], "layer4.1"),
        *of("in-place ReLU", "vgg16_bn.features", vgg, ["1"], "8"),
        *of("in-place ReLU", "resnet50", resnet50, ["bn1"], "layer1.0.bn3"),
        *of("parent + child", "resnet18", resnet18, ["layer4.0", "layer4.0.conv1"], "layer4.1"),
        *of("container", "resnet18", resnet18, ["layer1"], "conv1"),
    ]


def answer(case: Case, library: Library) -> list[str]:
    """What the library says or how it stops, the error, the message, and the warnings it gave."""
    torch.manual_seed(0)  # of shuffled loaders
    said, error, message = "no such row" if library.lib else "not installed", "", ""
    silence = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(record=True) as heard, silence[0], silence[1]:
        warnings.simplefilter("always")
        try:
            value = case.ask(library) if library.lib else None
            if value is not None:
                off = abs(value - case.truth[library.kind])
                said, error = f"{value:.9g}", "" if math.isnan(off) else f"{off:.1e}"
        except Exception as fault:
            said, message = type(fault).__name__, " ".join(str(fault).split())[:90]
    kinds = sorted({f"{w.category.__name__}: {str(w.message)[:60]}" for w in heard})
    return [said, error, message, " | ".join(kinds)]


def main() -> None:
    torch.set_num_threads(1)
    print("; ".join(f"{k.name} {k.version}" for k in LIBRARIES) + f"; torch {torch.__version__}\n")
    print(f"| trap | case | truth (biased) | {' | '.join(k.name for k in LIBRARIES)} |")
    print("|---" * (3 + len(LIBRARIES)) + "|")
    with (HERE / "results" / "libraries.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        about = ["trap", "case", "library", "version", "cka", "truth"]
        writer.writerow([*about, "answer", "abs_error", "message", "warnings"])
        for case in [*feature_cases(), *batch_cases(), *network_cases()]:
            cells = [case.trap, case.what, "{unbiased:.4g} ({biased:.4g})".format(**case.truth)]
            for library in LIBRARIES:
                got = answer(case, library)
                about = [case.trap, case.what, library.name, library.version, library.kind]
                writer.writerow([*about, f"{case.truth[library.kind]:.9g}", *got])
                with contextlib.suppress(ValueError):
                    got[0] = f"{float(got[0]):.4f}"
                cells.append(f"{got[0]} ({got[1]})" if got[1] else got[0])
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
