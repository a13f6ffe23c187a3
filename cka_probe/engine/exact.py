"""The `exact` estimator: HSIC over the whole set, from features in memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.batch_gram import FiniteCheck
from cka_probe.engine.estimator import (
    BANDWIDTH_IMAGES,
    EXACT_GROUPS,
    Result,
    State,
    check_entries,
    finish,
)
from cka_probe.engine.hsic import check_n
from cka_probe.engine.kernels import Block, Kernel, check_bandwidth, get_kernel
from cka_probe.engine.tiled import FeatureBlocks, TiledSums, tiled_result

__all__ = ["Exact", "Rows"]


class Rows:
    """The rows of one entry, batch by batch, in the order of the batches' indices in the end.

    With the number of images known the rows go into one block of memory, taken once: nothing is
    copied at the end, and the peak is what is kept.

    Args:
        n_images: rows to make room for; None keeps the batches apart.
    """

    def __init__(self, n_images: int | None = None) -> None:
        self.n_images = n_images
        self.parts: list[tuple[int, Tensor]] = []
        self._block: Tensor | None = None
        self._used = 0

    def append(self, index: int, x: Tensor) -> None:
        """Keep a copy of the rows (b, d) of batch `index`."""
        if self.n_images is None:
            self.parts.append((index, x.detach().clone()))
            return
        if self._block is None:
            shape = (max(self.n_images, len(x)), x.shape[1])
            self._block = torch.empty(shape, dtype=x.dtype, device=x.device)
        end = self._used + len(x)
        if end > len(self._block) or self._block.dtype != x.dtype:
            self.parts.append((index, x.detach().clone()))
            return
        self._block[self._used : end] = x.detach()
        self.parts.append((index, self._block[self._used : end]))
        self._used = end

    def __len__(self) -> int:
        """Images so far."""
        return sum(len(x) for _, x in self.parts)

    def take(self) -> Tensor:
        """All rows (n, d), batches by index; this object lets go of them."""
        in_order = all(a[0] < b[0] for a, b in zip(self.parts, self.parts[1:], strict=False))
        whole = self._block is not None and self._used == len(self)
        parts, block = sorted(self.parts, key=lambda part: part[0]), self._block
        self.parts, self._block = [], None
        if whole and in_order and block is not None:
            return block[: self._used]
        home = parts[-1][1].device  # a saved state puts its rows on the CPU
        return torch.cat([x.to(home) for _, x in parts]) if len(parts) > 1 else parts[0][1]


def rows_state(rows: dict[Any, Rows]) -> State:
    """The rows of every entry as arrays: "keys", "batches", "sizes", "dtypes", "rows 0", ..."""
    keys = list(rows)
    parts = rows[keys[0]].parts if keys else []
    state: State = {
        "keys": keys,
        "batches": np.array([index for index, _ in parts], dtype=np.int64),
        "sizes": np.array([len(x) for _, x in parts], dtype=np.int64),
        "dtypes": [str(rows[key].parts[0][1].dtype).removeprefix("torch.") for key in keys],
    }
    for e, key in enumerate(keys):
        whole = torch.cat([x.detach().cpu() for _, x in rows[key].parts])
        # NumPy has no bfloat16; float32 holds every value of it and of float16
        state[f"rows {e}"] = (whole if whole.dtype == torch.float64 else whole.float()).numpy()
    return state


def load_rows(state: State, n_images: int | None) -> dict[Any, Rows]:
    """The rows that `rows_state` wrote.

    Raises:
        ValueError: arrays that do not belong together.
    """
    rows: dict[Any, Rows] = {}
    sizes = state["sizes"].tolist()
    for e, (key, dtype) in enumerate(zip(state["keys"], state["dtypes"], strict=True)):
        whole = torch.from_numpy(state[f"rows {e}"]).to(getattr(torch, dtype))
        if len(whole) != sum(sizes) or len(sizes) != len(state["batches"]):
            raise ValueError(f"rows of another number of images: entry {e}")
        rows[key] = Rows(n_images)
        for index, part in zip(state["batches"].tolist(), whole.split(sizes), strict=True):  # type: ignore[no-untyped-call]
            rows[key].append(index, part)
    return rows


class Exact:
    """HSIC over the whole set: features are kept, Grams are taken tile by tile at the end.

    On given features the result does not depend on how they were batched: the mean is a float64
    mean of the full set and the tiles are fixed. Memory: n x (sum of widths) for the features. The
    RBF bandwidth is the median over all pairs of the first 256 images (`bandwidth_images`).

    Args:
        n_batches: ignored, so that estimators are interchangeable.
        kernel: a name in KERNELS or a callable on centred features (p, d), (q, d).
        bandwidth: RBF sigma as a multiple of the median distance.
        unbiased: HSIC_1 (Song et al. 2012), or the biased HSIC_0 (Gretton et al. 2005).
        bandwidth_images: images whose pairs fix the bandwidth; None for all.
        groups: groups of images for the jackknife; at most a quarter of the images; 1 for no error
            bars.
        n_images: images in the run, so that memory is taken once; None if it is not known.
    """

    name = "exact"

    def __init__(
        self,
        n_batches: int = 1,
        *,
        kernel: str | Kernel | Block = "linear",
        bandwidth: float = 1.0,
        unbiased: bool = True,
        bandwidth_images: int | None = BANDWIDTH_IMAGES,
        groups: int = EXACT_GROUPS,
        n_images: int | None = None,
    ) -> None:
        self.n_batches = n_batches
        check_bandwidth(bandwidth)
        self.kernel = get_kernel(kernel)
        self.bandwidth, self.unbiased = bandwidth, unbiased
        self.bandwidth_images, self.groups, self.n_images = bandwidth_images, groups, n_images
        self.rows: dict[Any, Rows] = {}
        self._open: dict[Hashable, Tensor] = {}
        self._finite = FiniteCheck()

    @property
    def keys(self) -> list[Any]:
        """The entries, in the order of the first batch."""
        return list(self.rows)

    @property
    def ready(self) -> bool:
        """True: no batch fixes anything for the others."""
        return True

    def update(self, key: Hashable, features: Tensor) -> None:
        """Keep a copy of features (b, d) of one entry, in their dtype, where they are.

        Raises:
            NonFiniteFeaturesError: NaN or Inf (on an accelerator, when the batch ends).
        """
        self._finite.update(key, features)
        self._open[key] = features.detach().clone()

    def end_batch(self, index: int) -> None:
        """Keep the open batch under its index; batches may come in any order.

        Raises:
            ValueError: the entries are not those of the first batch.
            NonFiniteFeaturesError: NaN or Inf, found on an accelerator.
        """
        batch, self._open = self._open, {}
        self._finite.check()
        check_entries(self.rows, batch, index)
        for key in list(batch):
            self.rows.setdefault(key, Rows(self.n_images)).append(index, batch.pop(key))

    def new_shard(self) -> Exact:
        """An empty estimator for other batches of the same run."""
        return Exact(
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            unbiased=self.unbiased,
            bandwidth_images=self.bandwidth_images,
            groups=self.groups,
        )

    def merge(self, other: Exact) -> None:
        """Take the features of an estimator over other batches of the same run.

        Raises:
            ValueError: other entries.
        """
        if other.rows:
            check_entries(self.rows, other.rows, -1)
        for key, rows in other.rows.items():
            own = self.rows.setdefault(key, Rows(self.n_images))
            for index, x in rows.parts:
                own.append(index, x)
        other.rows = {}

    def compute(self) -> Result:
        """CKA, standard errors (delete-a-group jackknife) and what is degenerate.

        The features are freed as they are used: call it once.
        """
        keys = self.keys
        check_n(len(self.rows[keys[0]]))
        source = FeatureBlocks([self.rows.pop(key).take() for key in keys], self.kernel)
        sums = TiledSums(
            source,
            self.kernel,
            groups=min(self.groups, source.n // 4),
            bandwidth=self.bandwidth,
            bandwidth_images=self.bandwidth_images,
            unbiased=self.unbiased,
        )
        cka, stderr, groups = tiled_result(sums)
        return finish(
            keys, cka, stderr, groups, sums.constant,
            coincident=(np.array(sums.sigma) == 0.0) & ~sums.constant,
        )  # fmt: skip

    def state_dict(self) -> State:
        """The features of all batches."""
        return rows_state(self.rows)

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`, on the CPU."""
        self.rows = load_rows(state, self.n_images)
