"""Evaluate a network at many image sizes: accuracy, cost, latency, and CKA to the reference."""

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

from cka_probe.activations.layers import unwrap
from cka_probe.activations.meta import check_loaded
from cka_probe.engine.minibatch import Minibatch
from cka_probe.inputs.batches import MIN_IMAGES, order, plan
from cka_probe.inputs.views import check_scales, resize
from cka_probe.intervals import student_interval
from cka_probe.models.load import LoadedModel
from cka_probe.models.preprocessing import input_channels
from cka_probe.progress import progress_bar
from msun.data.classes import class_rows
from msun.data.crops import Crops
from msun.data.labelled import Labelled
from msun.evaluation.inputs import (
    Feed,
    network_spec,
    open_tests,
    reference_side,
    resolve_feed,
    resolve_mean_std,
)
from msun.evaluation.measure import EvalNetwork, end_batch, update_features
from msun.metrics import Predictions, accuracy, drawn_sides, true_class_rank

__all__ = ["compare", "evaluate"]

MIXED = "mixed"  # name of the row of mixed sizes
LATENCY_BATCHES = (1, 64)  # one image, and a usual batch


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
    """Evaluate a network at sizes that it was trained at, and at others.

    Each image is decoded once. Its centre square is resized to each size, antialiased and bilinear,
    so that all sizes show the same images. Memory grows by two numbers per image and size only. The
    network is left unchanged.

    Args:
        model: an MSUN, any network from images to scores (n, classes), or a result of `load_model`.
        data: a folder of class folders, "glyphs", a dataset of (image, label), or two tensors.
        sizes: sides in pixels.
        feed: inputs of the network: "native", images at their size; "upsampled", images resized to
            their size and then to the reference; or a callable from side to input side.
        rows: outputs that stand for the classes of the data, in their order; others are ignored.
            None for all, or for the outputs that the description of the network gives to them.
        reference: side for the comparison by CKA, and for "upsampled"; None for that of an MSUN,
            the input size of a loaded model, else the largest size.
        at: path of the module whose output CKA compares; None for the input of the trunk of an
            MSUN, or of the last linear layer of another network.
        mixed: whether to add a row of mixed sizes: the side of each image is drawn log-uniformly
            from the smallest to the largest size. Each image is decoded once more for it.
        cka: whether to compare features with those at the reference.
        latency: whether to time the network on noise, with the resize inside an MSUN.
        arm: value of a first column "arm"; None for no such column.
        predictions: path of an .npz file for the `Predictions`; None to write none.
        split: split of the data, as in `open_labelled`; None for the test split of glyphs.
        n_images: size of a random subset; for glyphs, the number of images drawn.
        batch_size: images per batch, 4 or more; also the batches of CKA.
        seed: seed of the subset, the order and the mixed sizes.
        mean: channel means for pixels; None for those of the network, else of ImageNet. Tensors are
            normalised only if it is given.
        std: channel standard deviations.
        device: device to run on; None for that of the network.
        workers: number of processes that decode images.
        progress: whether to show progress bars.

    Returns:
        One row per size, in the given order, with the columns

        - size_px; fed_px, the input side (an MSUN may resize it again, see `Policy.inputs`); n
        - top1, top5: accuracy from 0 to 1, each with _low and _high, the 95 % Wilson interval; top5
          is nan for fewer than 5 classes
        - gmacs: MACs for one image; params_m: parameters in millions
        - latency_ms_1, latency_ms_64: median milliseconds for a batch of 1 and of 64
        - cka: unbiased minibatch CKA of the features with those at the reference, with cka_low and
          cka_high (95 %); nan if features do not vary, with fewer than 4 images, and the interval
          for a single batch

        The mixed row has no size_px; its fed_px and gmacs are means. `attrs` names the features.

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
    if isinstance(net, nn.Module):
        check_loaded(net)
    network = EvalNetwork(net, at=at, features=cka, device=device)
    source = open_tests(data, split, n_images, seed)
    source.use_channels(input_channels(unwrap(net)))
    top = reference_side(model, sides) if reference is None else check_scales([reference])[0]
    crops = Crops(source, (), None, *resolve_mean_std(mean, std, model, source))
    job = _Evaluation(network, source, sides, top, resolve_feed(feed, top), rows, batch_size, seed,
                      workers, crops, progress)  # fmt: skip
    with network:
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
    frame.attrs = {"reference_px": top, "features": network.where}
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
    """Evaluate several networks, or one with several options, on the same images.

    Args:
        models: name of an arm -> network, or (network, options of this arm): {"plain, upsampled":
            (net, {"feed": "upsampled"}), "lean": msun}.
        data: labelled images, as for `evaluate`; opened once.
        sizes: sides in pixels.
        split: split of the data, as for `evaluate`.
        n_images: size of a random subset.
        seed: seed of the subset, the order and the mixed sizes.
        options: options of `evaluate` for all arms.

    Returns:
        The tables of `evaluate`, concatenated, with a first column "arm".

    Raises:
        ValueError: no arms, or as for `evaluate`.
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
class _Evaluation:
    """One call of `evaluate`: resolved options, and the rows of the result."""

    network: EvalNetwork
    source: Labelled
    sides: list[int]
    reference: int
    feed: Feed
    given_rows: Sequence[int] | None
    batch_size: int
    seed: int
    workers: int
    crops: Crops
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
            self.network.features = False

    def every_size(self) -> Predictions:
        """All images at all sizes, in one pass."""
        n, m = len(self.source), len(self.sides)
        found = _empty_predictions([str(side) for side in self.sides], n)
        found.side_px[:] = self.sides
        shown = [*self.sides, self.reference] if self.network.features else self.sides
        shown = list(dict.fromkeys(shown))  # with the reference, for CKA
        estimator = Minibatch(len(self.batches)) if self.network.features else None
        stream = self._crops(shown).batches(self.batches, workers=self.workers)
        with closing(stream), self._bar() as bar:
            for index, (views, labels) in enumerate(stream):
                rows = self.batches[index]
                found.label[rows] = labels.numpy()
                for k, side in enumerate(shown):
                    logits, features = self._forward(views[side], side)
                    if k < m:
                        self._score(found, k, logits, labels, rows)
                    if estimator is not None:
                        update_features(estimator, side, features, self.network.name)
                if estimator is not None:
                    end_batch(estimator, index, self.network.name)
                bar.update(len(rows))
            bar.leave = True
        self.cka = None if estimator is None else estimator.compute()
        return found

    def mixed(self) -> Predictions:
        """Each image at a side drawn for it."""
        n = len(self.source)
        drawn = drawn_sides(n, min(self.sides), max(self.sides), self.seed)
        more = _empty_predictions([MIXED], n)
        more.side_px[:, 0] = drawn
        features, self.network.features = self.network.features, False
        with self._bar(MIXED) as bar:
            for side in map(int, np.unique(drawn)):
                mine = np.flatnonzero(drawn == side).tolist()
                parts = [mine[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
                parts = [part for part in parts if part]
                stream = self._crops([side]).batches(parts, workers=self.workers)
                with closing(stream):
                    for rows, (views, labels) in zip(parts, stream, strict=True):
                        logits, _ = self._forward(views[side], side)
                        more.label[rows] = labels.numpy()
                        self._score(more, 0, logits, labels, rows)
                        bar.update(len(rows))
            bar.leave = True
        self.network.features = features
        return more

    def row(self, found: Predictions, k: int) -> dict[str, Any]:
        """The row of column k, without costs and latencies."""
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
        """Write multiply-accumulates and parameters into the rows."""
        for row, sides in zip(table, side_px.T, strict=True):
            known, counts = np.unique(sides, return_counts=True)
            fed = [self.feed(int(side)) for side in known]
            macs = [self.network.macs(self.channels, side) for side in fed]
            row["gmacs"] = float(np.average(macs, weights=counts)) / 1e9
            row["params_m"] = self.network.parameters / 1e6
            if row["size_px"] is None:
                row["fed_px"] = float(np.average(fed, weights=counts))

    def latencies(self, table: list[dict[str, Any]]) -> None:
        """Write latencies into the rows; an input side of several sizes is timed once."""
        sides = sorted({row["fed_px"] for row in table if row["size_px"] is not None})
        plain = EvalNetwork(self.network.model, features=False, device=self.network.target)
        with plain, progress_bar(len(sides), desc="time", unit="side", show=self.progress) as bar:
            for side in sides:
                for b in LATENCY_BATCHES:
                    took = plain.latency_ms((b, self.channels, side, side))
                    for row in table:
                        if row["size_px"] is not None and row["fed_px"] == side:
                            row[f"latency_ms_{b}"] = took
                bar.update()
            bar.leave = True

    def _crops(self, sides: Sequence[int]) -> Crops:
        """The centre squares of the images at some sides."""
        crops = self.crops
        return Crops(crops.data, tuple(sides), None, crops.mean, crops.std, crops.seed)

    def _forward(self, x: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        """Scores and features of images at a side, resized to the input side."""
        self.channels = x.shape[1]
        return self.network(resize(x, self.feed(side)), side)

    def _score(
        self, found: Predictions, k: int, logits: Tensor, labels: Tensor, rows: list[int]
    ) -> None:
        """Write ranks and predictions of one batch into column k."""
        if not self.classes:
            spec = network_spec(self.network.model)
            self.rows = class_rows(self.given_rows, logits.shape[1], self.source, spec)
            self.classes = logits.shape[1] if self.rows is None else len(self.rows)
        if self.rows is not None:
            logits = logits[:, self.rows]
        if not bool(torch.isfinite(logits).all()):
            bad = rows[int((~torch.isfinite(logits)).any(1).nonzero()[0, 0])]
            where = f"image {bad} of {self.source.name!r} at {found.side_px[bad, k]} px"
            if not bool(torch.isfinite(self.source.load(bad)[0]).all()):
                raise ValueError(f"image is not finite: {where}: mend it, or leave it out")
            raise ValueError(
                f"scores are not finite: {self.network.name}, {where}: check the weights of the "
                "network and the mean and std of its inputs"
            )
        rank, predicted = true_class_rank(logits, labels)
        found.rank[rows, k], found.predicted[rows, k] = rank.numpy(), predicted.numpy()

    def _bar(self, what: str = "evaluate") -> Any:
        return progress_bar(len(self.source), desc=what, unit="image", show=self.progress)


def _empty_predictions(views: list[str], n: int) -> Predictions:
    """Predictions of n images, all zero, to be filled."""
    small = [np.zeros((n, len(views)), dtype=np.int64) for _ in range(3)]
    return Predictions(np.array(views), np.zeros(n, dtype=np.int64), *small)
