"""HSIC and CKA as pure functions of Gram matrices.

Sources: Szekely & Rizzo 2014 (U-centring), Song et al. 2012 (unbiased HSIC_1), Kornblith et al.
2019 (CKA), Nguyen et al. 2021 (minibatch CKA), Busing et al. 1999 (jackknife of unequal groups).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cka_probe.engine.bandwidth import check_bandwidth
from cka_probe.engine.kernels import full_precision
from cka_probe.engine.own_kernel import Block, checked

Array = npt.NDArray[np.float64]
MIN_IMAGES = 4  # HSIC_1 divides by n (n - 3)


def u_centre(k: Tensor) -> Tensor:
    """U-centre Gram matrices (Szekely & Rizzo 2014, section 4).

    Args:
        k: (..., n, n) symmetric Grams with n >= 4; the diagonal does not count.

    Returns:
        (..., n, n) float64, zero diagonal, rows that sum to zero.

    Raises:
        ValueError: n < 4.
    """
    n = k.shape[-1]
    check_n(n)
    k = k.double().clone()
    diagonal = torch.diagonal(k, dim1=-2, dim2=-1)
    diagonal.zero_()
    k -= (k.sum((-2, -1), keepdim=True) / (n * (n - 1))).expand_as(k)  # keeps digits for RBF
    diagonal.zero_()
    rows = k.sum(-1)  # (..., n)
    total = rows.sum(-1)[..., None, None]
    k -= (rows[..., :, None] + rows[..., None, :]) / (n - 2)
    k += total / ((n - 1) * (n - 2))
    diagonal.zero_()
    return k


def centre_gram(k: Tensor) -> Tensor:
    """H K H with H = I - 11'/n: the centring of biased HSIC_0, (..., n, n) in float64."""
    k = k.double()
    k = k - k.mean(-1, keepdim=True)
    return k - k.mean(-2, keepdim=True)


def hsic_pairs(grams: Tensor, *, unbiased: bool = True) -> Tensor:
    """HSIC of every pair of m Gram matrices over the same n images, in one product.

    Args:
        grams: (m, n, n) symmetric Grams, n >= 4.
        unbiased: HSIC_1 (Song et al. 2012, equation 5) or the biased HSIC_0
            (Gretton et al. 2005, equation 9).

    Returns:
        (m, m) float64.
    """
    n = grams.shape[-1]
    check_n(n)
    v = (u_centre(grams) if unbiased else centre_gram(grams)).flatten(1)  # (m, n*n)
    return v @ v.T / (n * (n - 3) if unbiased else (n - 1) ** 2)


def hsic_from_sums(a: Tensor, rows: Tensor, n: int, *, unbiased: bool) -> Tensor:
    """HSIC from Song's three sums, for sets too large to hold every Gram.

    Args:
        a: (m, m) sums over i, j of K_ij L_ij (i != j where unbiased).
        rows: (m, n) row sums of the Grams (without the diagonal where unbiased).
        n: images.
        unbiased: as in `hsic_pairs`.

    Returns:
        (m, m) float64.
    """
    r = rows @ rows.T  # (m, m)
    s = rows.sum(1)
    if unbiased:
        h = a - 2 / (n - 2) * r + torch.outer(s, s) / ((n - 1) * (n - 2))
        return h / (n * (n - 3))
    return (a - 2 / n * r + torch.outer(s, s) / n**2) / (n - 1) ** 2


def normalise(hsic: Array, floor: Array) -> Array:
    """CKA from HSICs (Kornblith et al. 2019, equation 3), with one answer for degenerate entries.

    Args:
        hsic: (..., m, m).
        floor: (..., m), the level of HSIC(x, x) that rounding alone can make; an entry at or
            below it has no similarity to anything and is nan. There is no epsilon.

    Returns:
        (..., m, m), symmetric, diagonal exactly 1 or nan. Values of unbiased CKA may be negative.
    """
    hsic = (hsic + np.swapaxes(hsic, -1, -2)) / 2
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    norm = np.sqrt(np.where(own > floor, own, np.nan))
    cka = hsic / norm[..., :, None] / norm[..., None, :]
    i = np.arange(hsic.shape[-1])
    cka[..., i, i] = np.where(np.isnan(norm), np.nan, 1.0)
    return np.asarray(cka, dtype=np.float64)


def jackknife(theta: Array, left_out: Array, sizes: Array) -> Array:
    """Standard error by the delete-a-group jackknife for unequal groups (Busing et al. 1999).

    For equal groups it is the usual (G-1)/G sum_g (theta_-g - mean)^2.

    Args:
        theta: (...) estimate from all groups.
        left_out: (G, ...) estimates with group g left out, G >= 2.
        sizes: (G,) images in each group.

    Returns:
        (...) standard errors; nan where an estimate is nan or G < 2.
    """
    g = len(sizes)
    if g < 2:
        return np.full(theta.shape, np.nan)
    h = (sizes.sum() / sizes).reshape(-1, *[1] * theta.ndim)
    pseudo = h * theta - (h - 1) * left_out  # (G, ...)
    centre = g * theta - ((1 - 1 / h) * left_out).sum(0)
    return np.asarray(np.sqrt(((pseudo - centre) ** 2 / (h - 1)).mean(0)))


def rounding_floor(trace: Tensor, eps: Tensor | float, n: int, *, unbiased: bool = True) -> Tensor:
    """The HSIC(x, x) that rounding alone can make: Gram entries are off by 8 eps |x_i| |x_j|.

    Args:
        trace: (m,) traces of the centred Grams.
        eps: machine epsilon of the dtype that the Grams were taken in, (m,) or one for all.
        n: images.
        unbiased: whether the floor is for HSIC_1 or HSIC_0.

    Returns:
        (m,) float64.
    """
    return (8 * eps * trace.double()) ** 2 / (n * (n - 3) if unbiased else (n - 1) ** 2)


def check_n(n: int) -> None:
    """Raise ValueError unless there are the four images that HSIC_1 needs."""
    if n < MIN_IMAGES:
        raise ValueError(f"too few images: {n}: unbiased HSIC needs at least {MIN_IMAGES}")


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
        z = z if z.dtype == torch.float64 else z.float()
        limit = 8 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z.detach())
        z = z - z.mean(0)
        if bool(torch.linalg.vector_norm(z.detach()) <= limit):
            z = z * 0  # constant up to rounding: every HSIC is 0, the CKA nan
        if callable(kernel):  # its values may depend on the scale
            return checked(kernel, getattr(kernel, "__name__", type(kernel).__name__))(z, z)
        scale = z.detach().abs().max()
        z = z / torch.where(scale > 0, scale, torch.ones_like(scale))  # CKA does not change
        g = (z @ z.T).double()
        if kernel == "linear":
            return g
        q = z.double().square().sum(1)
        d2 = (q[:, None] + q[None, :] - 2 * g).clamp(min=0)
        i, j = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
        ranked = d2[i, j].sort().values
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        return torch.exp(-d2 / (2 * bandwidth**2 * middle))
