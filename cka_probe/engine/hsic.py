"""HSIC and CKA as pure functions of Gram matrices.

Sources: Szekely & Rizzo 2014 (U-centring), Song et al. 2012 (unbiased HSIC_1), Kornblith et al.
2019 (CKA), Nguyen et al. 2021 (minibatch CKA), Busing et al. 1999 (jackknife of unequal groups).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
    # an RBF Gram lies close to its mean: without it the row sums below would cancel
    k -= (k.sum((-2, -1), keepdim=True) / (n * (n - 1))).expand_as(k)
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
    s = rows.sum(1)
    return song(a, rows @ rows.T, torch.outer(s, s), n, unbiased=unbiased)


def song(a: Tensor, r: Tensor, s: Tensor, n: int, *, unbiased: bool = True) -> Tensor:
    """HSIC of pairs of Grams K, L over n images (Song et al. 2012, equation 5).

    Args:
        a: sums over i, j of K_ij L_ij (i != j if unbiased), of any shape.
        r: sums over i of (row sum i of K) (row sum i of L).
        s: (sum of K) (sum of L).
        n: images.
        unbiased: HSIC_1, or the biased HSIC_0.
    """
    if unbiased:
        return (a - 2 / (n - 2) * r + s / ((n - 1) * (n - 2))) / (n * (n - 3))
    return (a - 2 / n * r + s / n**2) / (n - 1) ** 2


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
