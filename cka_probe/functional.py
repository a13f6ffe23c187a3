"""CKA of features at hand: no network, no hooks."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cka_probe.engine.centring import NonFiniteFeaturesError, centre_full, feature_eps
from cka_probe.engine.estimator import EXACT_GROUPS, Result
from cka_probe.engine.exact import Exact
from cka_probe.engine.hsic import check_n, hsic_pairs, rounding_floor, u_centre
from cka_probe.engine.kernels import (
    Block,
    check_bandwidth,
    checked_kernel,
    coincident,
    get_kernel,
    median_bandwidth,
)
from cka_probe.engine.products import full_precision
from cka_probe.errors import first_names
from cka_probe.features import Features, as_features, check_plain, check_rows
from cka_probe.progress import progress_bar
from cka_probe.report import Report

VIEW = "features"


class DegenerateWarning(UserWarning):
    """An entry has no CKA: its features are constant, or nothing is left above rounding."""


def cka(
    x: Features,
    y: Features,
    *,
    kernel: str | Block = "linear",
    unbiased: bool = True,
    bandwidth: float = 1.0,
) -> float:
    """CKA between two representations of the same n images.

    Kornblith et al. 2019, equation 3; with `unbiased`, on HSIC_1 of Song et al. 2012, whose
    expectation is 0 for independent features whatever their width. A negative value means no
    more similarity than chance. Sums are in float64; nothing is added to a denominator.

    Args:
        x: (n, p) features, tensor or array, any float dtype, n >= 4.
        y: (n, q) features of the same images in the same order.
        kernel: "linear", "rbf", or a callable on centred features (p, d), (q, d).
        unbiased: HSIC_1, or the biased HSIC_0, which nears 1 for any features with d >> n.
        bandwidth: RBF sigma as a multiple of the median distance.

    Returns:
        CKA; nan, with a `DegenerateWarning`, where a side is constant.

    Raises:
        ValueError: unequal n, n < 4, not 2-D, NaN or Inf, masked values, frames whose rows are
            named differently, unknown kernel.
        TypeError: no real numbers, sparse, quantised or meta tensors.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> round(cka(x, 3.0 * x[:, ::-1] + 7.0), 6)
    1.0
    """
    result = _exact({"x": x, "y": y}, kernel, unbiased, bandwidth, error_bars=False)
    return float(result.cka[0, 1])


def cka_matrix(
    features: Mapping[str, Features],
    *,
    kernel: str | Block = "linear",
    unbiased: bool = True,
    bandwidth: float = 1.0,
    seed: int = 0,
) -> Report:
    """CKA of every pair of named features, with error bars: `report.between()` is the matrix.

    The estimator is `exact`. The images are put in 20 random groups (`seed`) for the delete-a-group
    jackknife, so features that are sorted by class need no shuffling first.

    Args:
        features: name -> (n, d) tensor or array, any float dtype; the same n images throughout.
        kernel: as in `cka`.
        unbiased: as in `cka`.
        bandwidth: RBF sigma as a multiple of the median distance over all pairs of images.
        seed: of the groups behind the error bars; CKA does not depend on it.

    Returns:
        A Report with one view, "features", and one layer per name.

    Raises:
        ValueError: unequal n, n < 4, not 2-D, NaN or Inf, unknown kernel, no features.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> report = cka_matrix({"all": x, "half": x[:, :4], "turned": -2.0 * x[:, ::-1]})
    >>> [round(value, 2) for value in report.between().loc["all"]]
    [1.0, 0.63, 1.0]
    """
    if not features:
        raise ValueError("no features: {}: give at least one name and its (n, d) features")
    result = _exact(features, kernel, unbiased, bandwidth, seed)
    names = [str(k) for k in result.keys]
    n = len(next(iter(features.values())))
    meta = {
        "estimator": "exact",
        "kernel": get_kernel(kernel).name,
        "bandwidth": bandwidth,
        "unbiased": unbiased,
        "groups": result.groups,
        "n_images": int(n),
        "seed": seed,
        "reference": VIEW,
    }
    return Report(
        cka=result.cka,
        stderr=result.stderr,
        view=np.array([VIEW] * len(names)),
        layer=np.array(names),
        meta=meta,
    )


def cka_loss(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str | Block = "linear",
    bandwidth: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """Differentiable CKA of one batch, 1 for equal representations: minimise 1 minus it.

    Kornblith et al. 2019, equation 3, on HSIC_1 (Song et al. 2012). The RBF bandwidth is
    `bandwidth` times the median distance and takes part in the gradient. Float16 and bfloat16
    features are raised to float32 (float64 features stay), sums are in float64. Degenerate
    features (constant, or fewer directions than HSIC_1 can see) give nan, as in `cka`. Its value is
    free of TF32; its gradient follows torch's setting, as the network's does.

    Args:
        x: (n, p) features, n >= 4.
        y: (n, q) features of the same n images.
        kernel: "linear", "rbf", or a differentiable callable on centred features (p, d), (q, d).
        bandwidth: RBF sigma as a multiple of the median distance.
        unbiased: HSIC_1, or the biased HSIC_0.

    Returns:
        0-d float64 tensor with a gradient to `x` and `y`.

    Raises:
        ValueError: unequal n, fewer than 4 images, not 2-D, an unknown kernel, or a bandwidth that
            is not above 0.

    >>> x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    >>> round(float(cka_loss(x, 2.0 * x + 1.0)), 4)
    1.0
    """
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor):
            kind = type(z).__name__
            raise TypeError(f"features are no tensor: {name!r} is {kind}: give tensors, or use cka")
        check_plain(name, z)
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"features do not pair: {shapes}: give (n, p) and (n, q), the same images")
    check_n(x.shape[0])
    check_bandwidth(bandwidth)
    if not callable(kernel) and kernel not in ("linear", "rbf"):
        raise ValueError(
            f"unknown kernel: {kernel!r}: cka_loss takes 'linear', 'rbf' or a function of features"
        )
    grams = torch.stack([_soft_gram(z, kernel, bandwidth) for z in (x, y)])  # (2, n, n)
    n = grams.shape[-1]
    eps = torch.tensor([torch.finfo(z.dtype).eps for z in (x, y)], device=grams.device)
    eps = eps.double().clamp(max=torch.finfo(torch.float32).eps)
    trace = torch.diagonal(grams.detach(), dim1=-2, dim2=-1).sum(-1)
    floor = rounding_floor(trace, eps, n, unbiased=unbiased)
    h = hsic_pairs(grams, unbiased=unbiased)
    norm = torch.diagonal(h)
    safe = torch.where(norm > floor, norm, torch.full_like(norm, float("nan")))
    return h[0, 1] / safe.prod().sqrt()


def _soft_gram(z: Tensor, kernel: str | Block, bandwidth: float) -> Tensor:
    with full_precision(z.device):
        eps = feature_eps(z.dtype)
        z = z if z.dtype == torch.float64 else z.double() if callable(kernel) else z.float()
        z, first = _unit_scale(z)  # no norm of it over- or underflows
        limit = 8 * eps * torch.linalg.vector_norm(z.detach())
        z = z - z.mean(0)
        if bool(torch.linalg.vector_norm(z.detach()) <= limit):
            z = z * 0  # constant up to rounding: every HSIC is 0, the CKA nan
        if callable(kernel):  # its values may depend on the scale
            z = z * first
            return checked_kernel(kernel, getattr(kernel, "__name__", type(kernel).__name__))(z, z)
        z, _ = _unit_scale(z)  # of centred features: CKA does not change
        g = (z @ z.T).double()
        if kernel == "linear":
            return g
        q = z.double().square().sum(1)
        d2 = (q[:, None] + q[None, :] - 2 * g).clamp(min=0)
        i, j = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
        ranked = d2[i, j].sort().values
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        if coincident(middle.detach(), ranked.detach().mean(), eps):
            middle = middle * float("nan")  # no bandwidth
        return torch.exp(-d2 / (2 * bandwidth**2 * middle))


def _unit_scale(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features over a power of two, so that the largest lies in 0.5 to 1; and that power."""
    largest = z.detach().abs().max()
    # frexp reads the exponent of subnormal numbers, too; of 0, NaN and Inf it gives 0
    exponent = torch.frexp(largest).exponent
    # in two steps, as 2**-exponent of a subnormal number is above the largest float32
    half = torch.div(exponent, 2, rounding_mode="floor")
    one, two = (torch.exp2(e.to(z.dtype)) for e in (half, exponent - half))
    return z / one / two, one * two


def permutation_test(
    x: Features,
    y: Features,
    n: int = 999,
    *,
    kernel: str | Block = "linear",
    bandwidth: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> tuple[float, float]:
    """Are two representations more alike than if their images were paired at random?

    The permutation test of independence (Gretton et al. 2008): CKA with the images of `y` in `n`
    random orders. HSIC(x, x) and HSIC(y, y) do not change, so only the numerator is taken anew.

    Args:
        x: (n_images, p) features.
        y: (n_images, q) features of the same images.
        n: permutations; the smallest p-value is 1 / (n + 1).
        kernel: as in `cka`.
        bandwidth: as in `cka`.
        seed: of the permutations; the global random state is not touched.
        progress: show a progress bar.

    Returns:
        (unbiased CKA, one-sided p-value); (nan, nan) for degenerate features.

    Raises:
        ValueError: as `cka`, or n < 1.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> permutation_test(x, x + 1.0, n=99)[1]
    0.01
    """
    if n < 1:
        raise ValueError(f"too few permutations: {n}: give n >= 1, usually 999")
    value = cka(x, y, kernel=kernel, bandwidth=bandwidth)
    if np.isnan(value):
        return value, float("nan")
    k, left = (_u_centred(name, z, kernel, bandwidth) for name, z in (("x", x), ("y", y)))
    left = left.to(k.device)
    # a tie in other order of summation is a tie: rounding is in proportion to the norms
    least = float((k * left).sum()) - 1e-12 * float(k.norm() * left.norm())
    generator = torch.Generator().manual_seed(seed)
    at_least = 0
    with progress_bar(n, desc="permutations", unit="permutation", show=progress) as bar:
        for _ in range(n):
            order = torch.randperm(len(k), generator=generator)
            at_least += int(float((k * left[order][:, order]).sum()) >= least)
            bar.update()
    return value, (1 + at_least) / (n + 1)


def _u_centred(name: str, z: Features, kernel: str | Block, bandwidth: float) -> Tensor:
    features = as_features(name, z)
    chosen, centred = get_kernel(kernel), centre_full(features)
    own = centred.x if chosen.quadratic else centred.x * centred.scale
    with torch.no_grad(), full_precision(own.device):
        block = chosen.base(own, own)
    eps = feature_eps(features.dtype)
    sigma = median_bandwidth([block], bandwidth, eps) if chosen.needs_bandwidth else 1.0
    return u_centre(chosen.finish(block, sigma))


def _exact(
    features: Mapping[str, Features],
    kernel: str | Block,
    unbiased: bool,
    bandwidth: float,
    seed: int = 0,
    *,
    error_bars: bool = True,
) -> Result:
    estimator = Exact(
        kernel=kernel,
        bandwidth=bandwidth,
        unbiased=unbiased,
        bandwidth_images=None,
        groups=EXACT_GROUPS if error_bars else 1,
    )
    check_rows(features)
    names = list(features)
    n, order = -1, torch.empty(0, dtype=torch.long)
    for name in names:
        x = as_features(name, features[name])
        if n < 0:
            n = x.shape[0]
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        if x.shape[0] != n:
            raise ValueError(
                f"unequal numbers of images: {names[0]!r} has {n}, {name!r} has {x.shape[0]}: "
                "give features of the same images"
            )
        try:
            estimator.update(name, x[order.to(x.device)])
        except NonFiniteFeaturesError as error:
            raise ValueError(
                f"non-finite features: {name!r} holds {error}: "
                "leave those images out or mend the network"
            ) from None
    estimator.end_batch(0)
    result = estimator.compute()
    warn_degenerate(result, [repr(name) for name in names], error_bars=error_bars)
    return result


def nan_reasons(result: Result, names: list[str]) -> dict[str, list[str]]:
    """Why entries have no CKA: reason -> their names; the reasons that occur alone."""
    level = "rounding" if result.sketch_stderr is None else "the sketch's own error"
    kinds = {
        "constant features": result.constant,
        "more than half of the image pairs are equal up to rounding, so that RBF has no "
        "bandwidth": result.coincident,
        f"no similarity above {level}, even to itself": result.vanishing,
    }
    found = {
        reason: [name for name, bad in zip(names, which, strict=True) if bad]
        for reason, which in kinds.items()
    }
    return {reason: hit for reason, hit in found.items() if hit}


def warn_degenerate(result: Result, names: list[str], *, error_bars: bool = True) -> None:
    """One DegenerateWarning for each kind of entry without a CKA, and one for absent error bars."""
    for reason, hit in nan_reasons(result, names).items():
        warnings.warn(
            f"{reason}: {first_names(hit, 5)}: their CKA is nan", DegenerateWarning, stacklevel=4
        )
    if error_bars and result.groups < 2:
        warnings.warn(
            f"no error bars: {result.groups} group of images: use 8 images or more for 'exact', "
            "two batches or more for 'minibatch'",
            DegenerateWarning,
            stacklevel=4,
        )
