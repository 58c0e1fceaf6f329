"""What an SAE misses: its error, linear in the activation and not (arXiv 2410.14670)."""

import math
from typing import NamedTuple

import torch

from sae import Codes, dense, wide


# ----------------------------------------------------------------------------------------------------------
# Error decomposition: what of e = x - x_hat is linear in x, and what that leaves (arXiv 2410.14670)
# ----------------------------------------------------------------------------------------------------------

class Affine(NamedTuple):
    """A fitted linear map, u (N,P) -> (N,Q), held in fp64."""
    matrix: torch.Tensor      # (P,Q)
    bias: torch.Tensor        # (Q,)

    def __call__(self, u):
        return (u.double() @ self.matrix + self.bias).to(u.dtype)


@torch.no_grad()
def fit_affine(u, y, ridge=1e-6):
    """Least squares of y (N,Q) on u (N,P) with a bias -> Affine.  Moments in fp64, about the means.

    ridge  added to the covariance of u, in units of its mean diagonal; 0: the smallest solution if there are several
    """
    u, y = u.double(), y.double()
    du, dy = u - u.mean(0), y - y.mean(0)
    cov = du.T @ du                                                                           # (P,P)
    cov.diagonal().add_(ridge * cov.diagonal().mean())
    matrix = torch.linalg.pinv(cov, hermitian=True) @ (du.T @ dy)
    return Affine(matrix, y.mean(0) - u.mean(0) @ matrix)


def r2(y, y_hat):
    """(N,Q) twice -> share of the variance of y that y_hat explains: pooled, and as a plain mean over columns."""
    left, total = (y - y_hat).pow(2).sum(0), (y - y.mean(0)).pow(2).sum(0)                    # (Q,)
    tiny = torch.finfo(y.dtype).tiny
    return float(1 - left.sum() / total.sum().clamp_min(tiny)), float((1 - left / total.clamp_min(tiny)).mean())


def linear_r2(u, y, n_fit, ridge=1e-6):
    """Pooled R2 of y, (N,Q) or (N,), from u (N,P): fitted on the first n_fit rows, measured on the others."""
    u, y = u.double(), y.double().view(len(y), -1)
    return r2(y[n_fit:], fit_affine(u[:n_fit], y[:n_fit], ridge)(u[n_fit:]))[0]


@torch.no_grad()
def decompose_error(x, x_hat, n_fit=None, ridge=1e-6):
    """Activations and reconstructions (N,D), sinks left out -> (line, numbers), with

        x = x_hat + e_lin + e_nl,     e_lin = line(x) = x B + b,     e_nl = x - x_hat - e_lin

    n_fit  line is fitted on the first n_fit rows, by default half, and measured on the others.  Rows in the order of
           the text, so that neighbours, which resemble each other, stay on one side.
    fvu, fvu_nl        of e and of e_nl.  Read both: shrinkage alone is linear, so that an R2 of 1 may mean a dead SAE
    r2, r2_dims        R2 of e from x, pooled, and the mean over dimensions, which the paper gives
    r2_norm, r2_norm_x R2 of ||e||^2 from x, and from ||x|| and its square alone: the baseline
    fvu_fit, fvu_nl_fit, r2_fit, r2_dims_fit       in-sample, too good by about D / n_fit
    ValueError: shapes differ, or too few rows.  e_nl also holds what noise hides from the line: it is an upper bound.
    """
    if x.shape != x_hat.shape or x.dim() != 2:
        raise ValueError(f"activations {tuple(x.shape)} and reconstructions {tuple(x_hat.shape)} must both be (N,D)")
    (n, d), n_fit = x.shape, len(x) // 2 if n_fit is None else n_fit
    if not d < n_fit < n - 1:
        raise ValueError(f"{n_fit} of {n} tokens to fit a line on, in {d} dimensions: from {d + 1} to {n - 2} are "
                         "needed; give more text")
    x, e = x.double(), x.double() - x_hat.double()
    line, m = fit_affine(x[:n_fit], e[:n_fit], ridge), {"n_fit": n_fit, "n_test": n - n_fit, "ridge": ridge}
    for name, rows in (("", slice(n_fit, None)), ("_fit", slice(n_fit))):
        X, E, E_lin = x[rows], e[rows], line(x[rows])
        variance = (X - X.mean(0)).pow(2).sum()
        m[f"fvu{name}"], m[f"fvu_nl{name}"] = (float(t.pow(2).sum() / variance) for t in (E, E - E_lin))
        m[f"r2{name}"], m[f"r2_dims{name}"] = r2(E, E_lin)
    size, norm = e.pow(2).sum(1), x.norm(dim=1)                                               # (N,)
    m["r2_norm"] = linear_r2(x, size, n_fit, ridge)
    m["r2_norm_x"] = linear_r2(torch.stack([norm, norm**2], 1), size, n_fit, ridge)
    return line, m


def same_tokens(small, small_nl, large, n_fit):
    """Do two SAEs fail on the same tokens?  Norms (N,): of one's error, of its nonlinear part, of the other's error.

    -> R2 of the last from the first; the share of what that leaves which the nonlinear part explains on top.
    """
    alone = linear_r2(small[:, None], large, n_fit)
    both = linear_r2(torch.stack([small, small_nl], 1), large, n_fit)
    return alone, (both - alone) / (1 - alone) if alone < 1 else 0.0


def fit_floor(widths, fvu):
    """FVU (W,) at some widths -> (c, a, m) of  FVU = c + a F^-m,  all at least 0, by least squares; m on a grid.

    c is what no width would remove.  Three widths fit exactly, which is no evidence for the form.  The split (paper):
    absent = a F^-m, nonlinear = mean over widths of fvu_nl, linear = c - nonlinear, which may come out below 0.
    """
    F, y = (torch.as_tensor(t, dtype=torch.float64) for t in (widths, fvu))
    m = torch.logspace(-2, 1, 301, dtype=torch.float64)[:, None]
    f = (F / F.min()) ** -m                                                                   # (301,W)
    f0, y0 = f.mean(1, keepdim=True), y.mean()
    a = ((f - f0) * (y - y0)).sum(1, keepdim=True).clamp_min(0) / (f - f0).pow(2).sum(1, keepdim=True)
    a = torch.where(a * f0 <= y0, a, (f * y).sum(1, keepdim=True) / (f * f).sum(1, keepdim=True))      # else c < 0
    c = (y0 - a * f0).clamp_min(0)
    best = (y - c - a * f).pow(2).sum(1).argmin()
    return float(c[best]), float(a[best] * F.min() ** m[best]), float(m[best])


@torch.no_grad()
def gradient_pursuit(x, atoms, l0):
    """Codes >= 0 for x (N,D), less any bias, found without an encoder: at most l0 (N,) of atoms (F,D) -> Codes (N,F).

        r = x - z W;   the atom j with the largest W_j r, signed, joins;   z moves along the gradient of ||r||^2 on
        the atoms it has, as far as is best

    The paper takes the whole step, then cuts at 0, which may raise ||r||; here a step ends where a code reaches 0.
    """
    x, n = wide(x), len(x)
    slots = int(l0.max()) if n else 0
    index, z, r = x.new_zeros(n, slots, dtype=torch.int64), x.new_zeros(n, slots), x.clone()
    for c in range(slots):
        j = (r @ atoms.T.to(x)).argmax(1)                                                     # (N,)
        there = ((index == j[:, None]) & (z > 0)).any(1)
        index[:, c] = j
        chosen = atoms[index[:, :c + 1]].to(x)                                                # (N,c+1,D)
        active = z[:, :c + 1] > 0
        active[:, c] = ~there      # if it points the other way it has no room, and nothing moves
        grad = torch.einsum("ncd,nd->nc", chosen, r) * (active & (l0 > c)[:, None])
        q = torch.einsum("nc,ncd->nd", grad, chosen)
        step = (q * r).sum(1) / (q * q).sum(1).clamp_min(1e-30)                               # (N,)
        room = torch.where(grad < 0, z[:, :c + 1] / -grad, math.inf).amin(1)
        z[:, :c + 1] = (z[:, :c + 1] + torch.minimum(step, room)[:, None] * grad).clamp_min(0)
        r = x - torch.einsum("nc,ncd->nd", z[:, :c + 1], chosen)
    row, slot = z.nonzero(as_tuple=True)
    place, order = (row * len(atoms) + index[row, slot]).sort()
    return Codes(z[row, slot][order], place, (n, len(atoms)))


@torch.no_grad()
def pursue(sae, x):
    """(N,D) -> x_hat (N,D) by `gradient_pursuit` over the SAE's atoms, each token at the SAE's own L0."""
    b = sae.batch(x)
    z = gradient_pursuit(b.x - sae.b_dec, sae.W_dec, (dense(sae.codes(b)) != 0).sum(1))
    return (sae.rebuild(z) * b.undo[1] + b.undo[0]).to(x.dtype)
