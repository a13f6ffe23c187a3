"""A network at many sizes: accuracy with intervals, costs, latency, and CKA to the reference."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cka_probe.engine.minibatch import Minibatch
from cka_probe.inputs.batches import MIN_IMAGES, order, plan
from cka_probe.inputs.views import check_scales, resize
from cka_probe.intervals import student_interval
from cka_probe.models.load import LoadedModel
from cka_probe.progress import progress_bar
from msun.data.crops import Crops
from msun.data.labelled import Labelled
from msun.evaluation.classes import Feed, feeding, normalisation, open_tests, reference_of, rows_for
from msun.evaluation.measure import Measured, close_features, put_features
from msun.metrics import Predictions, accuracy, drawn_sides, true_class_rank

__all__ = ["compare", "evaluate"]

MIXED = "mixed"
LATENCY_BATCHES = (1, 64)


def evaluate(
    model: nn.Module | LoadedModel,
    data: Any,
    sizes: Sequence[int],
    *,
    feed: str | Feed = "native",
    rows: Sequence[int] | None = None,
    reference: int | None = None,
    at: str | None = None,
    mixed: bool = False,
    cka: bool = True,
    latency: bool = True,
    arm: str | None = None,
    predictions: str | os.PathLike[str] | None = None,
    split: str | None = None,
    n_images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: Any = None,
    workers: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure a network at sizes that it was trained on, and at others.

    Every image is decoded once; its centre square is resized once, antialiased and bilinear, to
    each size, so that all sizes show the same images. Memory does not grow with their number, but
    for two numbers an image and size. The network is left as it was.

    Args:
        model: an MSUN, any network from images to (n, classes), or what `load_model` gave.
        data: a folder of class folders, "glyphs", a dataset of (image, label), or two tensors.
        sizes: sides in pixels.
        feed: "native": images of s px are fed as they are. "upsampled": resized to s, then to the
            reference. Or a callable, side -> side that is fed.
        rows: outputs that stand for the classes of the data, in their order, where the network
            has others; only these are scored. None: all, or where a checkpoint names its classes,
            those of the data's names.
        reference: the side that CKA compares with and that "upsampled" feeds; None for an MSUN's
            own, a loaded model's input size, else the largest size.
        at: the module whose output CKA looks at; None: the map that an MSUN's trunk gets, or what
            goes into the last linear layer of any other network.
        mixed: add a row of images of mixed sizes, each drawn log-uniformly from the smallest to
            the largest (a whole number of pixels); every image is decoded once more for it.
        cka: compare features with those at the reference.
        latency: time the network alone, on noise of what is fed; an MSUN's own resize is in it.
        arm: a name for a first column "arm".
        predictions: also write the `Predictions` there, an .npz.
        split: as in `open_labelled`, but the glyphs are those to test on.
        n_images: a seeded random subset; of the glyphs, how many are drawn.
        batch_size: images a batch, 4 or more; it is CKA's batch too.
        seed: of the subset, the order and the mixed sizes.
        mean: channel means for pixels; None: the network's own, else ImageNet's. Tensors are used
            as they are unless it is given.
        std: channel standard deviations.
        device: where to run; None for where the network is.
        workers: processes that decode images.
        progress: show progress bars.

    Returns:
        One row a size, in the order given: size_px; fed_px, the side that the network was given (an
        MSUN may resize it again, see `Policy.inputs`); n; top1, top5, shares from 0 to 1, each with
        _low and _high, 95 % Wilson intervals (top-5 is nan for fewer than 5 classes); gmacs for one
        image, convolutions and linear layers; params_m, parameters in millions; latency_ms_1 and
        latency_ms_64, median milliseconds for a batch of 1 and of 64; cka, unbiased minibatch CKA
        of the features with those at the reference, with cka_low and cka_high (95 %, nan for a
        single batch; cka is nan where features do not vary or there are fewer than 4 images). The
        mixed row has no size_px, and means of fed_px and gmacs. `attrs` says what the features are.

    Raises:
        ImageError: an image that cannot be read, by name.
        TypeError: not a network, or one without scores.
        ValueError: a size that the network cannot take, scores that are not finite, classes that
            do not fit, or bad options.
    """
    sides = check_scales(sizes)
    if predictions is not None and not Path(predictions).absolute().parent.is_dir():
        raise ValueError(f"no folder for the predictions: {predictions}: make it first")
    net = model.model if isinstance(model, LoadedModel) else model
    own = Measured(net, at=at, features=cka, device=device)
    source = open_tests(data, split, n_images, seed)
    top = reference_of(model, sides) if reference is None else check_scales([reference])[0]
    looks = Crops(source, (), None, *normalisation(mean, std, model, source))
    job = _Job(own, source, sides, top, feeding(feed, top), rows, batch_size, seed, workers,
               looks, progress)  # fmt: skip
    with own:
        found = job.every_size()
        if mixed:
            found = found.beside(job.mixed())
    table = [job.row(found, k) for k in range(len(found.view))]
    job.costs(table, found.side_px)
    if latency:
        job.latencies(table)
    if predictions is not None:
        found.save(predictions)
    frame: pd.DataFrame = pd.DataFrame(table)
    if mixed:
        frame["size_px"] = frame["size_px"].astype("Int64")
    if arm is not None:
        frame.insert(0, "arm", arm)
    frame.attrs = {"reference_px": top, "features": own.where}
    return frame


def compare(
    models: Mapping[str, Any],
    data: Any,
    sizes: Sequence[int],
    *,
    split: str | None = None,
    n_images: int | None = None,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Measure several networks, or one in several ways, on the same images.

    Args:
        models: arm -> network, or (network, options of its own): {"plain, upsampled": (net,
            {"feed": "upsampled"}), "lean": msun}.
        data: as for `evaluate`; opened once.
        sizes: sides in pixels.
        split: as for `evaluate`.
        n_images: likewise.
        seed: likewise.
        options: of `evaluate`, for all arms.

    Returns:
        The frames of `evaluate` under each other, with a first column "arm".

    Raises:
        ValueError: no arms, or as `evaluate`.
    """
    if not models:
        raise ValueError("nothing to compare: no arms: give {name: network}")
    for name in ("arm", "predictions"):
        if name in options:
            raise ValueError(f"one option for several arms: {name}: give it with the arm, "
                             "{name: (network, options)}")  # fmt: skip
    source = open_tests(data, split, n_images, seed)
    frames = []
    for name, what in models.items():
        net, more = what if isinstance(what, tuple) else (what, {})
        frames.append(evaluate(net, source, sizes, arm=name, **{"seed": seed, **options, **more}))
    return pd.concat(frames, ignore_index=True)


@dataclass
class _Job:
    """One call of `evaluate`."""

    own: Measured
    source: Labelled
    sides: list[int]
    reference: int
    feed: Feed
    asked_rows: Sequence[int] | None
    batch_size: int
    seed: int
    workers: int
    looks: Crops
    progress: bool
    channels: int = 0
    classes: int = 0
    cka: Any = None

    def __post_init__(self) -> None:
        self.rows: list[int] | None = None
        n = len(self.source)
        shuffled = order(n, self.seed)
        parts = plan(n, self.batch_size) if n >= MIN_IMAGES else [slice(0, n)]
        self.batches = [shuffled[part] for part in parts]
        if n < MIN_IMAGES:
            self.own.features = False

    def every_size(self) -> Predictions:
        """All images at all sizes, in one pass."""
        n, m = len(self.source), len(self.sides)
        found = _nothing([str(side) for side in self.sides], n)
        found.side_px[:] = self.sides
        shown = [*self.sides, self.reference] if self.own.features else self.sides
        shown = list(dict.fromkeys(shown))  # the reference is fed for CKA's sake if need be
        estimator = Minibatch(len(self.batches)) if self.own.features else None
        stream = self._looks(shown).batches(self.batches, workers=self.workers)
        with closing(stream), self._bar() as bar:
            for index, (views, labels) in enumerate(stream):
                rows = self.batches[index]
                found.label[rows] = labels.numpy()
                for k, side in enumerate(shown):
                    logits, features = self._forward(views[side], side)
                    if k < m:
                        self._score(found, k, logits, labels, rows)
                    if estimator is not None:
                        put_features(estimator, side, features, self.own.name)
                if estimator is not None:
                    close_features(estimator, index, self.own.name)
                bar.update(len(rows))
            bar.leave = True
        self.cka = None if estimator is None else estimator.compute()
        return found

    def mixed(self) -> Predictions:
        """Each image at a size drawn for it."""
        n = len(self.source)
        drawn = drawn_sides(n, min(self.sides), max(self.sides), self.seed)
        more = _nothing([MIXED], n)
        more.side_px[:, 0] = drawn
        features, self.own.features = self.own.features, False
        with self._bar(MIXED) as bar:
            for side in map(int, np.unique(drawn)):
                mine = np.flatnonzero(drawn == side).tolist()
                parts = [mine[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
                parts = [part for part in parts if part]
                stream = self._looks([side]).batches(parts, workers=self.workers)
                with closing(stream):
                    for rows, (views, labels) in zip(parts, stream, strict=True):
                        logits, _ = self._forward(views[side], side)
                        more.label[rows] = labels.numpy()
                        self._score(more, 0, logits, labels, rows)
                        bar.update(len(rows))
            bar.leave = True
        self.own.features = features
        return more

    def row(self, found: Predictions, k: int) -> dict[str, Any]:
        """What is known of column k, without costs."""
        drawn = found.view[k] == MIXED
        side = None if drawn else self.sides[k]
        row: dict[str, Any] = {
            "size_px": side,
            "fed_px": math.nan if side is None else self.feed(side),
        }
        row |= accuracy(found.rank[:, k], self.classes)
        row |= dict.fromkeys(("gmacs", "params_m"), math.nan)
        row |= {f"latency_ms_{n}": math.nan for n in LATENCY_BATCHES}
        row |= dict.fromkeys(("cka", "cka_low", "cka_high"), math.nan)
        if side is not None and self.cka is not None:
            i, j = (self.cka.keys.index(s) for s in (side, self.reference))
            value = float(self.cka.cka[i, j])
            ends = student_interval(value, float(self.cka.stderr[i, j]), self.cka.groups)
            row |= {"cka": value, "cka_low": ends[0], "cka_high": ends[1]}
        return row

    def costs(self, table: list[dict[str, Any]], side_px: Any) -> None:
        """Multiply-accumulates and parameters into the rows."""
        for row, sides in zip(table, side_px.T, strict=True):
            known, counts = np.unique(sides, return_counts=True)
            fed = [self.feed(int(side)) for side in known]
            macs = [self.own.macs(self.channels, side) for side in fed]
            row["gmacs"] = float(np.average(macs, weights=counts)) / 1e9
            row["params_m"] = self.own.parameters / 1e6
            if row["size_px"] is None:
                row["fed_px"] = float(np.average(fed, weights=counts))

    def latencies(self, table: list[dict[str, Any]]) -> None:
        """Latencies into the rows; a side that is fed for several sizes is timed once."""
        sides = sorted({row["fed_px"] for row in table if row["size_px"] is not None})
        plain = Measured(self.own.model, features=False, device=self.own.target)
        with plain, progress_bar(len(sides), desc="time", unit="side", show=self.progress) as bar:
            for side in sides:
                for b in LATENCY_BATCHES:
                    took = plain.latency_ms((b, self.channels, side, side))
                    for row in table:
                        if row["size_px"] is not None and row["fed_px"] == side:
                            row[f"latency_ms_{b}"] = took
                bar.update()
            bar.leave = True

    def _looks(self, sides: Sequence[int]) -> Crops:
        looks = self.looks
        return Crops(looks.data, tuple(sides), None, looks.mean, looks.std, looks.seed)

    def _forward(self, x: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        self.channels = x.shape[1]
        return self.own(resize(x, self.feed(side)), side)

    def _score(
        self, found: Predictions, k: int, logits: Tensor, labels: Tensor, rows: list[int]
    ) -> None:
        if not self.classes:
            self.rows = rows_for(self.asked_rows, logits.shape[1], self.source, self.own.model)
            self.classes = logits.shape[1] if self.rows is None else len(self.rows)
        if self.rows is not None:
            logits = logits[:, self.rows]
        if not bool(torch.isfinite(logits).all()):
            bad = rows[int((~torch.isfinite(logits)).any(1).nonzero()[0, 0])]
            where = f"image {bad} of {self.source.name!r} at {found.side_px[bad, k]} px"
            raise ValueError(
                f"scores are not finite: {self.own.name}, {where}: mend the network's weights, or "
                "its input's normalisation"
            )
        rank, predicted = true_class_rank(logits, labels)
        found.rank[rows, k], found.predicted[rows, k] = rank.numpy(), predicted.numpy()

    def _bar(self, what: str = "evaluate") -> Any:
        return progress_bar(len(self.source), desc=what, unit="image", show=self.progress)


def _nothing(views: list[str], n: int) -> Predictions:
    """Room for the predictions of n images."""
    small = [np.zeros((n, len(views)), dtype=np.int64) for _ in range(3)]
    return Predictions(np.array(views), np.zeros(n, dtype=np.int64), *small)
