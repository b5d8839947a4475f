"""How far two sets of feature vectors lie apart, by a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_mmd(x: Tensor, y: Tensor, degree: int = 3) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy under k(u, v) = (u . v / d + 1)^degree.

        mean over i != j of k(x_i, x_j)  +  mean over i != j of k(y_i, y_j)  -  2 mean over i, j of k(x_i, y_j)

    Gretton et al., "A Kernel Two-Sample Test", 2012, equation 3. With Inception's features and degree 3 this is KID
    (Binkowski et al., 2018, arXiv 1801.01401); degree 1 compares means alone. It may be negative where the sets are of
    one distribution.

    Args:
        x, y: ``[..., n, d]`` and ``[..., m, d]`` features of unit length, n and m at least 2; they are scaled to length
            sqrt(d), so that k is between 0 and 2^degree. The leading axes are compared each by itself.
        degree: of the polynomial.

    Returns:
        ``[...]`` float64: the three means cancel where the sets are alike.

    Raises:
        ValueError: a set of one vector, which has no pairs.
    """
    if min(x.shape[-2], y.shape[-2]) < 2:
        raise ValueError(f"sets of {x.shape[-2]} and {y.shape[-2]} vectors, of which one has no pairs")
    x, y = x.double(), y.double()
    return _pairs(x, degree) + _pairs(y, degree) - 2 * _kernel(x, y, degree).mean((-2, -1))


def _pairs(x: Tensor, degree: int) -> Tensor:
    """Mean of the kernel over pairs of different vectors of a set."""
    values, n = _kernel(x, x, degree), x.shape[-2]
    return (values.sum((-2, -1)) - torch.diagonal(values, dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def _kernel(x: Tensor, y: Tensor, degree: int) -> Tensor:
    return (x @ y.mT + 1) ** degree
