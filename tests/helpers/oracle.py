"""Slow, obvious float64 numpy that shares no code with the package: what the engine must equal."""

import math

import numpy as np


def gram(x, kernel="linear", fraction=1.0, pairs=None):
    """Gram matrix of float64 features (n, d), by explicit centring (linear) or distances (rbf)."""
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0, keepdims=True)
    if kernel == "linear":
        return x @ x.T
    d2 = np.array([((x - row) ** 2).sum(axis=1) for row in x])
    first = d2[:pairs, :pairs]
    sigma = fraction * math.sqrt(np.median(first[np.triu_indices(len(first), k=1)]))
    return np.exp(-d2 / (2 * sigma**2))


def hsic1(k, g2):
    """Unbiased HSIC, the three terms of Song et al. 2012, equation 5."""
    n = len(k)
    k = k - np.diag(np.diag(k))
    g2 = g2 - np.diag(np.diag(g2))
    one = np.ones(n)
    first = np.trace(k @ g2) if n <= 64 else (k * g2.T).sum()
    second = (one @ k @ one) * (one @ g2 @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ (k @ (g2 @ one)))
    return (first + second - third) / (n * (n - 3))


def hsic0(k, g2):
    """Biased HSIC with the centring matrix written out (Gretton et al. 2005)."""
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ g2 @ h) / (n - 1) ** 2


def shifted(k):
    """A Gram with its off-diagonal mean taken off: HSIC is unchanged, float64 keeps its digits."""
    n = len(k)
    return k - (k.sum() - np.trace(k)) / (n * (n - 1))


def cka(x, y, kernel="linear", unbiased=True, fraction=1.0):
    """CKA of two feature arrays (n, p), (n, q)."""
    k, g2 = (shifted(gram(z, kernel, fraction)) for z in (x, y))
    hsic = hsic1 if unbiased else hsic0
    return hsic(k, g2) / math.sqrt(hsic(k, k) * hsic(g2, g2))


def cka_minibatch(batches_x, batches_y, kernel="linear", fraction=1.0):
    """CKA of lists of batches: HSIC weighted by what each batch holds, then the ratio."""
    top = xx = yy = 0.0
    for x, y in zip(batches_x, batches_y, strict=True):
        k, g2 = shifted(gram(x, kernel, fraction)), shifted(gram(y, kernel, fraction))
        top += len(x) * hsic1(k, g2)
        xx += len(x) * hsic1(k, k)
        yy += len(x) * hsic1(g2, g2)
    return top / math.sqrt(xx * yy)


def cka_minibatch_matrix(entries, kernel="linear"):
    """All pairs of m entries, each a list of batches."""
    return np.array([[cka_minibatch(x, y, kernel) for y in entries] for x in entries])


def cka_matrix(features, kernel="linear", unbiased=True):
    """All pairs of m feature arrays (n, d)."""
    grams = [shifted(gram(x, kernel)) for x in features]
    hsic = hsic1 if unbiased else hsic0
    own = [hsic(k, k) for k in grams]
    m = len(grams)
    out = np.ones((m, m))
    for i in range(m):
        for j in range(i):
            out[i, j] = out[j, i] = hsic(grams[i], grams[j]) / math.sqrt(own[i] * own[j])
    return out


def jackknife_se(estimate, groups):
    """Delete-a-group jackknife by its definition (Busing et al. 1999, equation 3), one number.

    `estimate(list of groups)` is called G + 1 times; `groups` is a list of index arrays.
    """
    n = sum(len(g) for g in groups)
    theta = estimate(groups)
    count = len(groups)
    left = [estimate(groups[:i] + groups[i + 1 :]) for i in range(count)]
    h = [n / len(g) for g in groups]
    theta_j = count * theta - sum((1 - 1 / hi) * t for hi, t in zip(h, left, strict=True))
    pseudo = [hi * theta - (hi - 1) * t for hi, t in zip(h, left, strict=True)]
    terms = [(p - theta_j) ** 2 / (hi - 1) for p, hi in zip(pseudo, h, strict=True)]
    return math.sqrt(sum(terms) / count)
