"""Sparse autoencoders: every variant of the literature, one loss, one training step, metrics and files.

    python train.py --stage sae --variant NAME      trains one on a model's activations, writes out/tiny/sae
    python train.py --stage sae --variant help      lists them
    python resa.py compare                          trains them all on the same activations, one table

All are the same machine.  Rows of W_dec, the atoms, are the dictionary; a code z says how much of each:

    pre   = (x - b_dec) W_enc' + b_enc          z = few of pre          x_hat = z W_dec + b_dec          e = x - x_hat

A variant says which few (`codes`), what else the loss holds (`extra`) and what it learns without a gradient
(`observe`).  Read `SAE` first, then any variant alone.  To read TopK, which SAE-Tuning uses (arXiv 2506.09967):
`Codes`, `SAE.study`, `Chosen`, `TopK`, `train_step`.

Dimensions: N tokens, D width (d_in), F latents (n_latents), K active (k), M chosen pairs of token and latent.
"""
import difflib
import json
import math
import os
import re
import shlex
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

CHUNK = 2**26  # entries of pre made at a time where nothing couples the rows: 256 MB in fp32


def wide(t):
    """At least fp32: sums, norms and thresholds are never taken in half precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def nearest(name, names):
    """The one of `names` spelled most like `name`, for error messages."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


# ----------------------------------------------------------------------------------------------------------
# Sparse codes: what makes the TopK family fast
# ----------------------------------------------------------------------------------------------------------

class Codes(NamedTuple):
    """An (N,F) matrix of few entries: value (M,) at flat places n F + i, ascending.  Some values may be 0."""
    value: torch.Tensor
    place: torch.Tensor
    shape: tuple

    def dense(self):
        z = self.value.new_zeros(self.shape[0] * self.shape[1])
        return z.index_put((self.place,), self.value).view(self.shape)                        # (N,F)

    def transpose(self):
        (rows, columns), row = self.shape, self.place // self.shape[1]
        place, order = ((self.place - row * columns) * rows + row).sort()
        return Codes(self.value[order], place, (columns, rows))

    def times(self, matrix):
        """(N,F) times (F,D) -> (N,D), reading only the rows of `matrix` that are needed."""
        rows, columns = self.shape
        starts = torch.searchsorted(self.place, torch.arange(rows, device=self.place.device) * columns)
        return nn.functional.embedding_bag(self.place % columns, matrix, starts, mode="sum",
                                           per_sample_weights=self.value.to(matrix.dtype))

    def counts(self):
        """(F,): how many tokens each latent fires on."""
        fired = (self.value != 0).to(torch.float64)
        return fired.new_zeros(self.shape[1]).index_add_(0, self.place % self.shape[1], fired)


def dense(z):
    return z.dense() if isinstance(z, Codes) else z


def column(z, i):
    """Column i of codes (N,F) -> (N,)."""
    if not isinstance(z, Codes):
        return z[:, i]
    (rows, columns), mine = z.shape, z.place % z.shape[1] == i
    return z.value.new_zeros(rows).index_put((z.place[mine] // columns,), z.value[mine])


def counts(z):
    return z.counts() if isinstance(z, Codes) else (z != 0).sum(0).double()


class Selected(torch.autograd.Function):
    """The chosen entries of pre = x W' + b, whose backward pass touches only the chosen latents.

        d W[i] = sum over tokens that chose i of d pre[n,i] x[n]        d x[n] = sum over its latents of d pre W[i]

    Exact for any choice, AuxK's too (sparsify's fused encoder drops that part).  `plain` in the tests is the twin.
    """

    @staticmethod
    def forward(ctx, x, W, b, value, place):
        ctx.save_for_backward(x, W, place)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        x, W, place = ctx.saved_tensors
        codes = Codes(grad, place, (len(x), len(W)))
        d_b = grad.new_zeros(len(W)).index_add_(0, place % len(W), grad)
        d_x = codes.times(W) if ctx.needs_input_grad[0] else None                             # (N,D)
        return d_x, codes.transpose().times(x), d_b, None, None                               # (F,D), (F,)


# ----------------------------------------------------------------------------------------------------------
# What all variants share: scale, encode, decode, loss
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """One micro-batch on its way through an SAE.  Each hook of a variant gets all of it and takes what it needs."""
    x: torch.Tensor                      # (N,D) as the SAE reads it: scaled, in the dtype of the weights
    undo: tuple                          # (shift, scale): the activation itself is x * scale + shift
    train: bool = False                  # choose as in training, or as at inference
    progress: float = 1.0                # share of the training that is behind
    g: torch.Tensor | None = None        # (N,D) gradient of the model's loss by the activation
    at: torch.Tensor | None = None       # (N,) int64, where in the data set each token stands
    pre: torch.Tensor | None = None      # (N,F) before selection, where a variant needs all of it
    z: object = None                     # (N,F) the codes, dense or `Codes`
    e: torch.Tensor | None = None        # (N,D) x - x_hat
    unit: object = 1.0                   # what a squared error is divided by, see `SAE.recon`
    also: dict = field(default_factory=dict)      # name -> further Codes, chosen together with z

    def rows(self, start, stop):
        g = None if self.g is None else self.g[start:stop]
        return Batch(self.x[start:stop], (), self.train, self.progress, g)


AUX = dict(aux="dead", aux_coef=0.0, k_aux=None, tau=0.5)
BASE = dict(normalize="none", dead_after=10**7, seed=0)


class SAE(nn.Module):
    """Made by `build` or `load_sae`; each variant below is a subclass.

    meta     where it belongs: site, layer, model, data, sink_norm, ...
    hyper    the settings of the variant, by name; each is an attribute
    Tensors  W_enc (F,D), b_enc (F,), W_dec (F,D), b_dec (D,), and what a variant adds
    """
    variant = ""
    defaults = {}            # name -> default of every setting
    recon = "fvu"            # unit of the loss: fvu | sum (over D, mean over N) | mean (over N and D)
    per_token = True         # in training, a token's code depends on that token alone
    unit_rows = True         # atoms are held at unit norm
    betas = (0.9, 0.999)     # of Adam
    clip = math.inf          # of the gradient's norm
    signed = False           # codes may be negative
    centred = True           # b_dec starts at the centre of the activations
    needs_gradient = False   # of the model's loss, while training
    per_latent = ("W_enc", "b_enc")      # what takes over the length of an atom when that is set to 1

    def __init__(self, d_in, n_latents, hyper):
        super().__init__()
        self.d_in, self.n_latents, self.meta = d_in, n_latents, {}
        for name, value in hyper.items():
            setattr(self, name, value)
        self.allocate()
        if self.normalize == "scale":
            self.register_buffer("input_scale", torch.ones(()))
        # Only training reads these: they are in checkpoints, not in files.
        self.register_buffer("tokens_since_fired", torch.zeros(n_latents, dtype=torch.int64), persistent=False)
        self.register_buffer("density", torch.zeros(n_latents), persistent=False)
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64), persistent=False)

    def allocate(self):
        self.W_enc = nn.Parameter(torch.empty(self.n_latents, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.W_dec = nn.Parameter(torch.empty(self.n_latents, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))

    def init_weights(self, rng):
        """As sparsify: encoder as nn.Linear, decoder its copy with rows of unit norm, biases zero."""
        self.W_enc.uniform_(-self.d_in**-0.5, self.d_in**-0.5, generator=rng)
        self.W_dec.copy_(nn.functional.normalize(self.W_enc, dim=1))

    @property
    def hyper(self):
        return {name: getattr(self, name) for name in self.defaults}

    # -- scale, encode, decode -----------------------------------------------------------------------------

    def batch(self, x, g=None, at=None, progress=1.0, train=False):
        """(..., D) -> Batch.  g and at: laid out like x.  ValueError: another width, or (on a CPU) x not finite."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"the SAE reads width {self.d_in}, the activations have {x.shape[-1]}")
        x = x.reshape(-1, self.d_in)
        if x.device.type == "cpu" and not x.isfinite().all():  # on a GPU the wait would cost; the log looks there
            raise ValueError("the activations hold NaN or infinite values: leave those tokens out, or raise --dtype")
        g, at = None if g is None else g.reshape(x.shape), None if at is None else at.reshape(len(x))
        x, undo = self.scale(x)
        return Batch(x.to(self.W_dec.dtype), undo, train, progress, g, at)

    def scale(self, x):
        """(N,D) -> scaled (N,D), (shift, scale) to undo it; by `normalize`:

        none    x                        scale   one factor for all, so that the mean of ||x||^2 is 1
        unit    x / ||x||                token   (x - mean over D) / standard deviation over D"""
        if self.normalize == "none":
            return x, (0.0, 1.0)
        if self.normalize == "scale":
            return x * self.input_scale, (0.0, 1 / self.input_scale)
        if self.normalize == "unit":
            norm = wide(x).norm(dim=1, keepdim=True)                                          # (N,1)
            return nn.functional.normalize(wide(x), dim=1), (0.0, norm)
        mean, std = wide(x).mean(1, keepdim=True), wide(x).std(1, keepdim=True)
        return (x - mean) / (std + 1e-5), (mean, std)

    def preacts(self, x):
        """(..., D) scaled -> (..., F): before selection."""
        return nn.functional.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc)

    def rebuild(self, z):
        """Codes or (..., F) -> (..., D), scaled.  Fewer than F columns mean the first latents alone."""
        return (z.times(self.W_dec) if isinstance(z, Codes) else z @ self.W_dec[:z.shape[-1]]) + self.b_dec

    def encode(self, x):
        """(..., D) -> (..., F): the codes at inference, dense, in the weights' dtype."""
        return dense(self.codes(self.batch(x))).view(*x.shape[:-1], self.n_latents)

    def decode(self, z, x=None):
        """(..., F) -> (..., D).  Where each token has a scale of its own (normalize unit, token), x gives it."""
        if x is None and self.normalize in ("unit", "token"):
            raise ValueError(f"normalize={self.normalize!r} scales each token: decode(z, x) needs the activations")
        shift, factor = self.scale(self.b_dec[None] if x is None else x.reshape(-1, self.d_in))[1]
        x_hat = self.rebuild(z.reshape(-1, z.shape[-1])) * factor + shift
        return x_hat.view(*z.shape[:-1], self.d_in)

    def reconstruct(self, x):
        """(..., D) -> x_hat of that shape and dtype, z as (N,F) or `Codes`: at inference."""
        b = self.batch(x)
        z = self.codes(b)
        return (self.rebuild(z) * b.undo[1] + b.undo[0]).to(x.dtype).view(x.shape), z

    def forward(self, x):
        """(..., D) -> (..., D): the reconstruction, in the dtype of x."""
        return self.reconstruct(x)[0]

    # -- loss ----------------------------------------------------------------------------------------------

    def loss(self, x, g=None, at=None, progress=1.0):
        """(..., D) -> (total, parts): the training loss of one micro-batch of at least two tokens.

        parts are detached and stay on the device: fvu, l0 (active latents a token), each extra term before its
        weight, and fired (F,) bool."""
        return self.study(self.batch(x, g, at, progress, train=True))

    def study(self, b):
        if len(b.x) < 2:
            raise ValueError("a micro-batch needs at least 2 tokens: the FVU divides by its variance")
        b.z = self.codes(b)
        x = wide(b.x)
        b.e = x - wide(self.rebuild(b.z))                                                     # (N,D)
        variance, fired = (x - x.mean(0)).pow(2).sum(), counts(b.z)
        b.unit = {"fvu": variance, "sum": len(x), "mean": x.numel()}[self.recon]
        total, parts = self.recon_loss(b), {"fvu": b.e.pow(2).sum() / variance, "l0": fired.sum().float() / len(x)}
        for name, (weight, value) in (self.extra(b) | self.aux_loss(b)).items():
            total, parts[name] = total + weight * value, value
        return total, {**{name: part.detach() for name, part in parts.items()}, "fired": fired > 0}

    def error(self, b, x_hat):
        """(N,D) reconstruction -> its squared error in the unit of this variant's loss."""
        return (wide(b.x) - wide(x_hat)).pow(2).sum() / b.unit

    # -- what a variant may say ----------------------------------------------------------------------------

    def codes(self, b):
        """Batch -> z (N,F), dense or `Codes`: the sparsifier, of training or of inference as b.train says."""
        raise TypeError("SAE is what variants share; build one of VARIANTS")

    def recon_loss(self, b):
        return b.e.pow(2).sum() / b.unit

    def extra(self, b):
        """Batch -> {name: (weight, value)}: what the loss holds beside reconstruction."""
        return {}

    @torch.no_grad()
    def observe(self, b):
        """After the backward pass of each micro-batch: what is learned without a gradient.  Here: who fires."""
        fired = counts(b.z)                                                                   # (F,)
        self.density.lerp_((fired / len(b.x)).to(self.density), (1 / (self.observed + 1.0)).clamp(min=1e-3))
        self.tokens_since_fired.add_(len(b.x)).masked_fill_(fired > 0, 0)      # in tokens, never in steps
        self.observed += 1

    def ramp(self, b):
        """0 at the first step, 1 once the share `warmup` of the training is behind: for penalties and for k."""
        return min(1.0, b.progress / self.warmup) if self.warmup else 1.0

    @torch.no_grad()
    def settle_(self):
        """After the optimizer's step: back onto the constraints."""
        if self.unit_rows:
            self.unit_rows_()

    # -- latents that seldom fire --------------------------------------------------------------------------

    @property
    def dead(self):
        """(F,) bool: latents that have not fired for more than `dead_after` training tokens."""
        return self.tokens_since_fired > self.dead_after

    def rare(self):
        """(F,) bool: the dead, with aux="zipf" also those that fire less than `tau` times their Zipf share."""
        return self.dead | (self.density < self.tau * zipf(self.density)) if self.aux == "zipf" else self.dead

    def score(self, pre):
        """(N,F) -> (N,F): what is compared when few are chosen."""
        return pre.abs() if self.signed else pre

    def choose_rare(self, b):
        """The k_aux strongest rare latents of each token, or all where there are fewer: most often none."""
        rare = self.rare().nonzero()[:, 0]      # waits for the device: cheaper than to choose for nobody
        return places(rare[top(self.score(b.pre[:, rare]), min(self.k_aux, len(rare)))], self.n_latents)

    def rare_codes(self, b):
        """Where pre is dense and has a graph; the variants that choose have made theirs together with z."""
        place = self.choose_rare(b).sort().values
        return Codes(b.pre.flatten()[place].relu(), place, b.pre.shape)

    def aux_loss(self, b):
        """AuxK (arXiv 2406.04093): how badly the rare latents explain e, which is detached -> {"aux": ...} or {}.

            e_hat = z_rare W_dec,   aux = sum (e - e_hat)^2 / sum (e - mean e)^2

        Without b_dec, which e no longer contains.  Divided by the variance of e as in that paper's code (sparsify
        divides by the variance of x), times min(n_rare / k_aux, 1) as in sparsify, so that a few do not shout.

        aux="zipf" (aux_zipf_loss of arXiv 2411.02124): the rare are not only the dead.  That paper's abstract and
        reviews give its purpose; the definition of rare is ours.  tau = 0 is AuxK."""
        if not getattr(self, "aux_coef", 0):
            return {}
        z, e = b.also.get("aux") or self.rare_codes(b), b.e.detach()
        if not len(z.place):
            return {"aux": (self.aux_coef, e.new_zeros(()))}
        variance = (e - e.mean(0)).pow(2).sum()
        ratio = (e - wide(z.times(self.W_dec))).pow(2).sum() / variance.clamp_min(torch.finfo(e.dtype).tiny)
        few = min(1.0, len(z.place) / len(b.x) / self.k_aux)
        return {"aux": (self.aux_coef, few * torch.where(variance > 0, ratio, 0.0))}      # an exact fit: nothing left

    # -- unit norm -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def project_grad_(self):
        """Removes from each atom's gradient what only changes its length, which is held at 1."""
        along = torch.einsum("fd,fd->f", self.W_dec.grad, self.W_dec)                         # (F,)
        self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def unit_rows_(self):
        """Atoms to unit norm, as they are: the function changes. `settle_` keeps them there in training."""
        self.W_dec.div_(wide(self.W_dec).norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def fold_rows_(self):
        """Atoms to unit norm, their length into the encoder: the function stays where no atoms are ranked (relu,
        gated, jumprelu).  A zero atom stays zero."""
        length = wide(self.W_dec).norm(dim=1)                                                 # (F,)
        length = torch.where(length > 0, length, 1.0).to(self.W_dec.dtype)
        for name in self.per_latent:
            tensor = getattr(self, name)
            tensor.mul_(length[:, None] if tensor.dim() == 2 else length)
        self.W_dec.div_(length[:, None])


def zipf(density, head=0.001, tail=0.5):
    """(F,) -> (F,): the density that Zipf's law expects of each latent's rank.  The fit is ours.

    log d = c - a log rank, by least squares on ranks head F .. tail F: rare latents, the question, stay out."""
    d, order = density.sort(descending=True)
    rank = torch.arange(1, len(d) + 1, device=d.device, dtype=torch.float64)
    used = ((rank >= head * len(d)) & (rank <= tail * len(d)) & (d > 0)).double()
    x, y, n = rank.log(), d.double().clamp_min(1e-300).log(), used.sum().clamp_min(1)
    x0, y0 = (x * used).sum() / n, (y * used).sum() / n
    slope = ((x - x0) * (y - y0) * used).sum() / ((x - x0).pow(2) * used).sum().clamp_min(1e-300)
    expected = (y0 + slope * (x - x0)).exp() * (n > 1)      # no line goes through one point: expect nothing
    return torch.empty_like(d).scatter_(0, order, expected.to(d.dtype))


def top(score, k):
    """(N,F) -> (N,k): the latents with the k largest scores of each token, exactly k even on ties."""
    return score.topk(k, dim=-1, sorted=False).indices


def largest(score, n):
    """(M,) -> places of the n largest, exactly n even on ties: `topk`, which is slow where M is in the millions.

    Block maxima are entries too, so the n-th largest of them is a lower bound: what lies below it is out."""
    block = len(score) // max(1, 4 * n)
    if block < 2:
        return score.topk(n, sorted=False).indices
    low = score[:len(score) // block * block].view(-1, block).amax(1).topk(n, sorted=False).values.amin()
    place = (score < low).logical_not_().nonzero()[:, 0]      # a NaN stays in, so that the loss shows it
    return place[score[place].topk(n, sorted=False).indices]


def places(index, n_latents):
    """(N,k) latents of each token -> (N k,) flat places."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * n_latents).flatten()


# ----------------------------------------------------------------------------------------------------------
# Variants with a penalty: z is dense, and a term of the loss makes it sparse
# ----------------------------------------------------------------------------------------------------------

class ReLU(SAE):
    """ReLU and an L1 penalty: the first SAEs (arXiv 2309.08600; transformer-circuits.pub/2023/monosemantic-features).

        z = ReLU(pre)         loss = mean_n ||e||^2 + l1 sum_i z_i ||w_i||

    In training and at inference.  rows="unit": atoms held at norm 1.  rows="free": atoms of any length, paid for in
    the penalty, folded into the encoder at the end (transformer-circuits.pub/2024/april-update).  l1 ramps up from
    0.  Units: ||x||^2 is 1 on average; a fit of one atom shrinks its code by l1/2.  No resampling of dead latents:
    AuxK does that for every variant, and without touching the optimizer's state.
    """
    variant = "relu"
    defaults = BASE | AUX | dict(normalize="scale", l1=0.05, rows="unit", warmup=0.1)
    recon = "sum"

    @property
    def unit_rows(self):
        return self.rows == "unit"

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return b.pre.relu()

    def extra(self, b):
        length = 1.0 if self.unit_rows else wide(self.W_dec).norm(dim=1)                      # (F,)
        return {"l1": (self.l1 * self.ramp(b), (wide(b.z) * length).sum(-1).mean())}


class Gated(SAE):
    """Gated SAE (arXiv 2404.16014): one encoder decides whether a latent fires, a rescaled copy how strongly.

        gate = 1[pre > 0]     magnitude = ReLU( exp(r_mag) (x - b_dec) W_enc' + b_mag )     z = gate magnitude
        loss = mean_n ||e||^2 + l1 sum_i ReLU(pre)_i + mean_n ||x - (ReLU(pre) W_dec' + b_dec')||^2

    In training and at inference.  W_dec' and b_dec' are frozen copies: the last term trains the gate alone.  z equals
    JumpReLU of `magnitude` before its ReLU, with threshold b_mag - exp(r_mag) b_enc.  Here b_enc is the gate's bias.
    """
    variant = "gated"
    defaults = BASE | AUX | dict(normalize="scale", l1=0.05, warmup=0.1)
    recon = "sum"
    betas = (0.0, 0.999)
    per_latent = ("W_enc", "b_enc", "b_mag")

    def allocate(self):
        super().allocate()
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(self.n_latents)) for _ in range(2))

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return (b.pre > 0) * (self.r_mag.exp() * (b.pre - self.b_enc) + self.b_mag).relu()

    def extra(self, b):
        gate = b.pre.relu()
        frozen = gate @ self.W_dec.detach() + self.b_dec.detach()
        return {"l1": (self.l1 * self.ramp(b), wide(gate).sum(-1).mean()), "gate": (1.0, self.error(b, frozen))}


class JumpReLU(SAE):
    """JumpReLU SAE (arXiv 2407.14435; Gemma Scope, arXiv 2408.05147): a threshold for each latent, learned.

        z = pre 1[pre > threshold]        loss = mean_n ||e||^2 + penalty( L0 )

    penalty="target": coef (L0 / k - 1)^2 as in dictionary_learning; penalty="l0": coef L0 as in the paper.  Both ramp
    up.  Gradients are clipped at norm 1, as in the former: the penalty starts near (F / 2k)^2, and the second moment
    of Adam would hold the thresholds back for thousands of steps.  In training and at inference.  `Jump` and `Step`
    hold the pseudo-derivatives, taken at pre-activations.  The threshold itself is learned, not its logarithm, which
    under Adam would move by a share of itself a step; it is kept at 0 or above.  bandwidth 0.001 of the paper goes
    with ||x||^2 = 1 on average and billions of tokens.
    """
    variant = "jumprelu"
    defaults = BASE | AUX | dict(k=32, normalize="scale", penalty="target", coef=1.0, bandwidth=0.001,
                                 threshold_init=0.001, warmup=0.1)
    recon = "sum"
    betas = (0.0, 0.999)
    clip = 1.0
    per_latent = ("W_enc", "b_enc", "threshold")

    def allocate(self):
        super().allocate()
        self.threshold = nn.Parameter(torch.full((self.n_latents,), self.threshold_init))

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return Jump.apply(b.pre, self.threshold, self.bandwidth)

    def extra(self, b):
        l0 = Step.apply(b.pre, self.threshold, self.bandwidth).sum(-1).mean()
        value = (l0 / self.k - 1) ** 2 if self.penalty == "target" else l0
        return {"l0_penalty": (self.coef * self.ramp(b), value)}

    def settle_(self):
        super().settle_()
        self.threshold.data.clamp_(min=0)


class Jump(torch.autograd.Function):
    """pre 1[pre > theta]:  d/d pre = 1[pre > theta],   d/d theta = -theta / width 1[|pre - theta| < width / 2]."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        near = (pre - theta).abs() < ctx.width / 2
        return grad * (pre > theta), -(grad * near).sum(0) * theta / ctx.width, None


class Step(torch.autograd.Function):
    """1[pre > theta]:  d/d pre = 0,   d/d theta = -1 / width 1[|pre - theta| < width / 2]."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        near = (pre - theta).abs() < ctx.width / 2
        return None, -(grad * near).sum(0) / ctx.width, None


# ----------------------------------------------------------------------------------------------------------
# Variants that choose: z is `Codes`, and how few they are is given
# ----------------------------------------------------------------------------------------------------------

class Chosen(SAE):
    """The TopK family.  A variant says which places of pre are kept; values are ReLU(pre) there (pre, if signed)."""
    defaults = BASE | AUX | dict(k=32, k_start=None, warmup=0.1)

    def choose(self, b):
        """Batch with pre -> flat places (M,), in any order."""
        raise TypeError("Chosen is what the TopK family shares; build one of VARIANTS")

    def k_at(self, b):
        """k of this step: it falls from k_start, where one is set, as penalties ramp up elsewhere."""
        return self.k if self.k_start is None else round(self.k_start + (self.k - self.k_start) * self.ramp(b))

    def choices(self, b):
        return {"z": self.choose} | ({"aux": self.choose_rare} if b.train and self.aux_coef else {})

    def codes(self, b):
        """pre (rows,F) is made a chunk of rows at a time, without a graph: autograd sees what was chosen of it."""
        n, choices = len(b.x), self.choices(b)
        rows = n if b.train and not self.per_token else max(1, CHUNK // self.n_latents)
        found = {name: [] for name in choices}
        with torch.no_grad():
            for start in range(0, max(1, n), rows):      # no tokens make one chunk of none
                part = b.rows(start, start + rows)
                part.pre = self.preacts(part.x)
                for name, choose in choices.items():
                    place = choose(part).sort().values      # so that the codes of a token lie together
                    found[name].append((part.pre.flatten()[place], place + start * self.n_latents))
        b.also = {name: self.selected(b, *map(torch.cat, zip(*pairs))) for name, pairs in found.items()}
        return b.also["z"]

    def selected(self, b, value, place):
        value = Selected.apply(b.x - self.b_dec, self.W_enc, self.b_enc, value, place)
        return Codes(value if self.signed else value.relu(), place, (len(b.x), self.n_latents))


class TopK(Chosen):
    """TopK (arXiv 2406.04093), as SAE-Tuning uses it (arXiv 2506.09967, eq. 3-5).

        z = TopK(ReLU(pre)), the k largest of each token          loss = sum e^2 / sum (x - mean x)^2 + aux_coef AuxK

    In training and at inference.  Ranks pre and rectifies after: the same codes, without a pass over (N,F); a latent
    chosen at or below 0 does not fire and carries no gradient.  multi_topk adds 1/8 of the loss at 4 k, so that the
    dictionary stays usable when k is changed later.
    """
    variant = "topk"
    defaults = Chosen.defaults | dict(multi_topk=False)

    def choose(self, b):
        return places(top(b.pre, self.k_at(b)), self.n_latents)

    def choose_wider(self, b):
        return places(top(b.pre, 4 * self.k), self.n_latents)

    def choices(self, b):
        return super().choices(b) | ({"wider": self.choose_wider} if b.train and self.multi_topk else {})

    def extra(self, b):
        return {"multi": (1 / 8, self.error(b, self.rebuild(b.also["wider"])))} if self.multi_topk else {}


class BatchTopK(Chosen):
    """BatchTopK (arXiv 2412.06410): k a token on average, more where a token needs more.

        training:    the k N largest of the micro-batch         inference:   z = pre 1[pre > threshold]

    threshold is the mean over batches of the smallest chosen value above 0; it starts at the first batch's, follows
    at 1 % a step, and `calibrate` takes the mean afresh once training is over (that step is ours).  It depends on N.
    """
    variant = "batchtopk"
    per_token = False

    def allocate(self):
        super().allocate()
        self.register_buffer("threshold", torch.zeros(()))      # until trained: a plain ReLU at inference

    def choose(self, b):
        if not b.train:
            return (self.score(b.pre) > self.threshold).flatten().nonzero()[:, 0]
        return largest(self.score(b.pre).flatten(), int(self.k_at(b) * len(b.pre)))

    def lowest(self, z):
        """Codes -> the smallest chosen size above 0, inf if there is none."""
        size = z.value.abs()
        return torch.where(size > 0, size, math.inf).amin()

    @torch.no_grad()
    def observe(self, b):
        super().observe(b)
        self.follow(self.lowest(b.z), 0.01)

    def follow(self, low, rate):
        first = torch.where(self.threshold == 0, low, self.threshold.lerp(low, rate))
        self.threshold.copy_(torch.where(low < math.inf, first, self.threshold))

    @torch.no_grad()
    def calibrate(self, batches):
        """batches, each (N,D) -> the mean of `lowest`, at these weights, becomes the threshold."""
        low = torch.stack([self.lowest(self.codes(self.batch(x, train=True))) for x in batches])
        there = low < math.inf      # a mean of what there is: a latent need not fire in every batch
        self.threshold.copy_(torch.where(there, low, 0).sum(0) / there.sum(0).clamp(min=1))


class Matryoshka(BatchTopK):
    """Matryoshka BatchTopK (arXiv 2503.17547): the first latents must do alone, and again with the next ones.

        loss = sum over levels g of || x - z[:, :m_g] W_dec[:m_g] - b_dec ||^2 + aux_coef AuxK,    m_1 < .. < m_G = F

    Codes as BatchTopK over all latents.  levels: shares of F in each group.  weighting: "sum" as in the paper, "mean"
    over G + 1 levels with the empty one as in the authors' code, "squared" 1/G^2 as dictionary_learning ends up with.
    At inference decode(z[:, :m]) uses the first m.
    """
    variant = "matryoshka"
    defaults = BatchTopK.defaults | dict(levels=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32], weighting="sum")

    def widths(self):
        """m_1 .. m_G: cumulative, strictly rising, ending at F."""
        ends = torch.tensor(self.levels).double().cumsum(0) / sum(self.levels) * self.n_latents
        return sorted({max(1, round(end)) for end in ends.tolist()})

    def recon_loss(self, b):
        latent, low = b.z.place % self.n_latents, 0
        total, x_hat = 0.0, wide(self.b_dec)
        if self.weighting == "mean":
            total = self.error(b, x_hat)
        for high in self.widths():      # each group is decoded once, on top of those before it
            own = b.z._replace(value=b.z.value * ((latent >= low) & (latent < high)))
            x_hat, low = x_hat + wide(own.times(self.W_dec)), high
            total = total + self.error(b, x_hat)
        levels = len(self.widths())
        return total / {"sum": 1, "mean": levels + 1, "squared": levels**2}[self.weighting]


class MutualChoice(BatchTopK):
    """Mutual Choice (arXiv 2411.02124): the k N largest pairs of token and latent, whoever they belong to.

    The same codes as BatchTopK, found independently; what differs is the auxiliary loss, "zipf".  The inference
    threshold (BatchTopK's), the weight and the definition of aux_zipf are ours: the paper's text was not at hand.
    """
    variant = "mutual_choice"
    defaults = BatchTopK.defaults | dict(aux="zipf", aux_coef=1 / 32)


class FeatureChoice(BatchTopK):
    """Feature Choice (arXiv 2411.02124): each latent i chooses its m_i tokens, so that none is ever idle.

        training:   latent i keeps the m_i largest of its column,  sum_i m_i = k N
        inference:  z = pre 1[pre > threshold_i], a threshold for each latent as in BatchTopK

    budget="uniform": m_i = k N / F.  budget="zipf": m_i falls with the rank of how often i fired, as
    (rank + q)^-alpha, at least m_min, at most N; ranks are taken anew every `rerank` batches.  Formula and threshold
    are ours.  N must be at least F m_min / k: a latent can only choose among the tokens that are there.
    """
    variant = "feature_choice"
    defaults = BatchTopK.defaults | dict(budget="uniform", alpha=1.0, q=0.0, m_min=1, rerank=1000)

    def allocate(self):
        super().allocate()
        self.threshold = torch.zeros(self.n_latents)
        self.register_buffer("rank", torch.arange(self.n_latents), persistent=False)

    def budgets(self, n, k):
        """(F,) int64: sums to k n, each from m_min to n, falling with rank."""
        total = int(k * n)
        if total < self.m_min * self.n_latents:
            raise ValueError(f"feature_choice: {n} tokens x k={k} leave less than m_min={self.m_min} for each of "
                             f"{self.n_latents} latents; it needs {math.ceil(self.m_min * self.n_latents / k)} "
                             "tokens a micro-batch: raise --micro-batch, or lower --latents")
        alpha = self.alpha if self.budget == "zipf" else 0.0
        share = (torch.arange(1, self.n_latents + 1, dtype=torch.float64) + self.q) ** -alpha
        share = share.clamp_min(1e-300)      # a steep law ends in zeros, which no rest can be divided by
        by_rank = spread(total - self.m_min * self.n_latents, share, n - self.m_min) + self.m_min
        return by_rank.to(self.rank.device)[self.rank]

    def choose(self, b):
        if not b.train:
            return super().choose(b)
        m = self.budgets(len(b.pre), self.k_at(b))                                            # (F,)
        tokens = b.pre.T.topk(int(m.max()), dim=1).indices                                    # (F, max m), best first
        chosen = torch.arange(tokens.shape[1], device=m.device) < m[:, None]
        return (tokens * self.n_latents + torch.arange(self.n_latents, device=m.device)[:, None])[chosen]

    def lowest(self, z):
        low = torch.full_like(self.threshold, math.inf)
        size = torch.where(z.value > 0, z.value, math.inf).to(low.dtype)
        return low.scatter_reduce_(0, z.place % self.n_latents, size, "amin")

    @torch.no_grad()
    def observe(self, b):
        super().observe(b)
        if int(self.observed) % self.rerank == 0:      # never at each step: ranks that flap train nobody
            order = self.density.argsort(descending=True, stable=True)
            self.rank.scatter_(0, order, torch.arange(self.n_latents, device=order.device))


def spread(total, share, cap):
    """Whole numbers in proportion to share (F,), sorted falling, none above cap, that sum to total."""
    given = torch.zeros(len(share), dtype=torch.float64)
    while (left := total - given.sum()) > 1e-6:      # what a cap cuts off goes to the others
        open_ = given < cap
        given = (given + open_ * share * left / (open_ * share).sum()).clamp(max=cap)
    whole = (given + 1e-9).floor()
    order = (whole - given).argsort(stable=True)     # the largest remainders first; ties by rank
    whole[order[:total - int(whole.sum())]] += 1
    return whole.long()


class AbsTopK(BatchTopK):
    """AbsTopK (arXiv 2510.00404): the k largest by size, signs kept, so that one latent serves two opposites.

        over="token":  the k largest |pre| of each token, in training and at inference (the paper)
        over="batch":  the k N largest |pre| of the micro-batch (the released code); at inference |pre| > threshold,
                       which is ours

    F signed latents can do what 2 F of TopK can: compare it with both.  b_enc is the paper's; the code has none.
    """
    variant = "abstopk"
    defaults = BatchTopK.defaults | dict(over="token")
    signed = True

    @property
    def per_token(self):
        return self.over == "token"

    def choose(self, b):
        return places(top(b.pre.abs(), self.k_at(b)), self.n_latents) if self.per_token else super().choose(b)


class GSAE(TopK):
    """g-SAE (arXiv 2411.10397): prefers latents whose atoms move the model's loss.

        score = ReLU(pre) (1 + beta a),   a[n,i] = | W_dec[i] . g[n] |,   g = d(next-token loss of the model) / dx

        training: values ReLU(pre) at the k largest scores of each token         inference: TopK, without g

    No gradient flows through a or the ranking.  The score's form, cross-entropy as the loss, g in units of its mean
    norm over a micro-batch (raw gradients are tiny), and inference without g are ours.
    """
    variant = "gsae"
    defaults = TopK.defaults | dict(beta=1.0)

    @property
    def needs_gradient(self):
        return self.beta > 0

    def choose(self, b):
        if not b.train or not self.beta:
            return super().choose(b)
        if b.g is None:
            raise ValueError("gsae: training needs the gradient of the model's loss at each activation (g)")
        a = (b.g.to(self.W_dec.dtype) @ self.W_dec.T).abs()                                   # (N,F)
        return places(top(b.pre.relu() * (1 + self.beta * a), self.k_at(b)), self.n_latents)


class TopAFA(Chosen):
    """top-AFA (arXiv 2503.24277): as many latents as it takes for the code to be as long as the input.

        q = (ReLU(pre) ||w||)^2, falling;   keep the first j, whose | sqrt(q_1 + .. + q_j) - ||x - b_dec|| | is least
        loss = mean e^2 + afa mean_n ( ||z|| - ||x|| )^2

    In training and at inference; no encoder bias.  Every token is standardised first.  The authors' code marks the
    end of the sum with 1e8, which large activations exceed; here j is below F.  k_max, a cap on j, is ours.  L0 is
    not controlled: in the authors' runs it ends above D, more active atoms than dimensions.
    """
    variant = "topafa"
    defaults = BASE | AUX | dict(normalize="token", afa=1 / 32, k_max=None)
    recon = "mean"
    betas = (0.9, 0.99)

    def allocate(self):
        super().allocate()
        self.b_enc.requires_grad_(False)

    def choose(self, b):
        length, cap = wide(self.W_dec).norm(dim=1), self.k_max or max(1, self.n_latents - 1)
        size, index = (b.pre.relu() * length).topk(cap, dim=1)                                # (N,cap), falling
        missing = size.pow(2).cumsum(1).sqrt() - wide(b.x - self.b_dec).norm(dim=1, keepdim=True)
        keep = torch.arange(cap, device=index.device) <= missing.abs().argmin(1, keepdim=True)
        return places(index, self.n_latents)[keep.flatten()]

    def extra(self, b):
        row, square = b.z.place // self.n_latents, wide(b.z.value).pow(2)
        length = square.new_zeros(len(b.x)).index_add(0, row, square).clamp_min(1e-30).sqrt()                # (N,)
        return {"afa": (self.afa, (length - wide(b.x).norm(dim=1)).pow(2).mean())}


class VSAE(Chosen):
    """TopK-vSAE (arXiv 2509.22994): codes as means of a Gaussian, drawn to the standard one.

        mu = ReLU(pre)     z = mu + sigma noise, then its k largest |z|     loss = mean_n ||e||^2 + beta KL
        KL = mean_n 1/2 sum_i ( mu^2 + sigma^2 - 1 - log sigma^2 )          over all F latents, ramped up

    sample="none" (the released fixed-variance code, all its published results): no noise, sigma 1, so that the KL is
    an L2 penalty and nothing is variational;  "unit" (the text): sigma 1;  "learned": sigma from a second encoder.
    At inference z is mu.  The switch is ours.  Not as in the code: atoms have unit norm, without which a long atom
    would buy back what beta takes from its code; b_dec is subtracted first; mu is not clamped at 10 inside the KL.
    """
    variant = "vsae"
    defaults = Chosen.defaults | dict(normalize="scale", beta=0.01, sample="none")
    recon = "sum"

    def allocate(self):
        super().allocate()
        if self.sample == "learned":
            self.W_var = nn.Parameter(torch.empty(self.n_latents, self.d_in))
            self.b_var = nn.Parameter(torch.full((self.n_latents,), -2.0))

    def init_weights(self, rng):
        super().init_weights(rng)
        if self.sample == "learned":
            nn.init.kaiming_uniform_(self.W_var, a=0.01, generator=rng)

    def codes(self, b):
        b.pre = self.preacts(b.x)      # dense, with its graph: the KL reads all of it
        z = b.pre.relu()
        if b.train and self.sample != "none":
            b.also["log_var"] = self.log_var(b.x)
            z = z + (b.also["log_var"] / 2).exp() * torch.randn_like(z)
        place = places(top(z.detach().abs(), self.k_at(b)), self.n_latents).sort().values
        return Codes(z.flatten()[place], place, z.shape)

    def log_var(self, x):
        """(N,D) -> (N,F), or 0 where the variance is fixed at 1."""
        if self.sample != "learned":
            return x.new_zeros(())
        return nn.functional.linear(x - self.b_dec, self.W_var, self.b_var).clamp(-6, 2)

    def extra(self, b):
        mu, log_var = wide(b.pre).relu(), wide(b.also.get("log_var", b.x.new_zeros(())))
        kl = 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum(-1).mean()
        return {"kl": (self.beta * self.ramp(b), kl)}


# ----------------------------------------------------------------------------------------------------------
# Variants with a state of their own: a bias that is a controller, a dictionary that is found
# ----------------------------------------------------------------------------------------------------------

class GBA(SAE):
    """Group bias adaptation (arXiv 2506.14002): each group of latents is held below a frequency by its biases.

        u = W_dec (x - b_dec), ||x|| = 1     pre = u + b_enc     z = scale_out u 1[pre > 0]     loss = mean_n ||e||^2

        every `adapt_tokens` tokens, f_i being the share of them on which latent i fired, r_i its largest pre above 0:
            f_i > p of its group:    b_i <- max(b_i - gamma r_i, -1)
            f_i < 1e-6:              b_i <- min(b_i + gamma (mean of r over the group's latents that fired), 0)

    In training and at inference.  Encoder and decoder share their rows.  b_enc is never trained by gradient; p is a
    ceiling, not an aim.  p falls geometrically over `groups`, by p_ratio from first to last, scaled so that the
    ceilings sum to k active latents a token (p_max > 0 sets the first instead).  adapt_tokens None: as many as hold 3
    firings at the lowest ceiling.  Each adaptation takes b gamma of the way to -max u: 20 of them make a dense start
    sparse.  The paper's gamma 0.01 and 25600 tokens are for runs of 1e8.  The explicit JumpReLU, unit rows and
    inputs, the initialisation, scale_out >= 0, these defaults and the choice of p by k are ours.
    """
    variant = "gba"
    defaults = BASE | dict(k=32, normalize="unit", groups=10, p_max=0.0, p_ratio=100.0, gamma=0.05,
                           adapt_tokens=None)
    recon = "sum"

    def allocate(self):
        self.W_dec = nn.Parameter(torch.empty(self.n_latents, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.scale_out = nn.Parameter(torch.ones(self.n_latents))
        self.register_buffer("b_enc", torch.zeros(self.n_latents))
        for name, start in (("fired", torch.zeros(self.n_latents, dtype=torch.int64)),      # since the last
                            ("peak", torch.zeros(self.n_latents)),                          # adaptation
                            ("tokens", torch.zeros((), dtype=torch.int64))):
            self.register_buffer(name, start, persistent=False)
        self.adapt_tokens = self.adapt_tokens or math.ceil(3 / max(1e-18, float(self.ceilings()[-1])))

    def init_weights(self, rng):
        self.W_dec.copy_(nn.functional.normalize(torch.randn(self.W_dec.shape, generator=rng), dim=1))

    @property
    def W_enc(self):
        return self.W_dec

    def group(self):
        """(F,) int64: the group of each latent; sizes differ by at most 1."""
        return torch.arange(self.n_latents, device=self.b_enc.device) * self.groups // self.n_latents

    def ceilings(self):
        """(groups,): p of each group."""
        p = self.p_ratio ** -torch.linspace(0, 1, self.groups, dtype=torch.float64)
        size = torch.bincount(self.group().cpu(), minlength=self.groups)
        return p * (self.p_max or min(1.0, self.k / float((p * size).sum())))

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return self.scale_out * (b.pre - self.b_enc) * (b.pre > 0)

    @torch.no_grad()
    def observe(self, b):
        super().observe(b)
        self.fired += (b.pre > 0).sum(0)
        torch.maximum(self.peak, b.pre.amax(0), out=self.peak)
        self.tokens += len(b.x)

    def settle_(self):
        super().settle_()
        self.scale_out.data.clamp_(min=0)         # codes are not signed
        if self.tokens >= self.adapt_tokens:      # never between the micro-batches of a step
            self.adapt()

    @torch.no_grad()
    def adapt(self):
        group, share = self.group(), self.fired / self.tokens
        sums = self.peak.new_zeros(2, self.groups)
        sums.index_add_(1, group, torch.stack([self.peak, (self.peak > 0).to(sums)]))
        lift = (sums[0] / sums[1].clamp(min=1))[group]                                        # (F,); silent: 0
        ceiling = self.ceilings().to(share)[group]
        b = torch.where(share > ceiling, (self.b_enc - self.gamma * self.peak).clamp(min=-1), self.b_enc)
        self.b_enc.copy_(torch.where(share < 1e-6, (b + self.gamma * lift).clamp(max=0), b))
        for buffer in (self.fired, self.peak, self.tokens):
            buffer.zero_()


class ITDA(SAE):
    """ITDA (arXiv 2505.17769): the dictionary is a set of activations, collected in one pass; no gradients.

        encode: matching pursuit.  r = x; k times:  i = argmax |W_dec r|,  z_i += c = W_dec[i] r,  r -= c W_dec[i]
        learn:  every x with cos(x, x_hat) < cosine becomes an atom, x / ||x||, until F are there

    In training and at inference; codes are signed, at most k fire.  cosine is the paper's threshold tau, written as
    1 - tau D / 2.  Until D atoms are there, the distinct rows of a batch are taken, most frequent first.  label[i]
    says where in the data atom i stood: dictionaries of two models over the same text compare by `jaccard`.  There is
    no centring, as published; F is the most that may be kept, atoms beyond n_atoms are 0.
    """
    variant = "itda"
    defaults = BASE | dict(k=40, cosine=0.8)
    signed = True
    centred = False

    def allocate(self):
        self.register_buffer("W_dec", torch.zeros(self.n_latents, self.d_in))
        self.register_buffer("label", torch.full((self.n_latents,), -1))
        self.register_buffer("n_atoms", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64), persistent=False)      # shown so far
        self.b_dec = nn.Parameter(torch.zeros(self.d_in), requires_grad=False)

    def init_weights(self, rng):
        pass

    @torch.no_grad()
    def codes(self, b):
        found, rows = [], max(1, CHUNK // self.n_latents)
        atoms = self.W_dec[:max(1, int(self.n_atoms))]
        for start in range(0, max(1, len(b.x)), rows):
            r = b.x[start:start + rows].clone()                                               # left to explain
            z, every = r.new_zeros(len(r), self.n_latents), torch.arange(len(r), device=r.device)
            for _ in range(self.k):
                close = r @ atoms.T                                                           # (rows, n_atoms)
                i = close.abs().argmax(1)
                c = close[every, i]
                z[every, i] += c
                r -= c[:, None] * atoms[i]
            place = (z != 0).flatten().nonzero()[:, 0]
            found.append((z.flatten()[place], place + start * self.n_latents))
        return Codes(*map(torch.cat, zip(*found)), (len(b.x), self.n_latents))

    @torch.no_grad()
    def observe(self, b):
        at = torch.arange(len(b.x), device=b.x.device) + self.tokens if b.at is None else b.at
        self.tokens += len(b.x)
        if self.n_atoms < min(self.d_in, self.n_latents):
            often = self.most_frequent(b.x)[:self.d_in - int(self.n_atoms)]
            self.add(b.x[often], at[often])
            b.z = self.codes(b)      # what the new atoms explain needs none of its own
            b.e = wide(b.x) - wide(self.rebuild(b.z))
        super().observe(b)
        new = nn.functional.cosine_similarity(b.x, b.x - b.e, dim=1) < self.cosine            # (N,)
        self.add(b.x[new], at[new])      # not encoded again in between: near twins of one batch all enter

    def most_frequent(self, x):
        """(N,D) -> where each distinct row stands first, the most frequent rows first, then by place."""
        _, index, count = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
        first = torch.full_like(count, len(x)).scatter_reduce_(0, index, torch.arange(len(x)).to(index), "amin")
        first, order = first.sort()
        return first[count[order].argsort(descending=True, stable=True)]

    def add(self, x, at):
        """Rows (M,D) of the data as atoms, as many as there is room for; a row of zeros points nowhere."""
        there = int(self.n_atoms)
        keep = x.norm(dim=1) > 0
        x, at = x[keep][:self.n_latents - there], at[keep][:self.n_latents - there]
        self.W_dec[there:there + len(x)] = nn.functional.normalize(x, dim=1)
        self.label[there:there + len(x)] = at
        self.n_atoms += len(x)

    def settle_(self):
        pass


def jaccard(a, b):
    """Two ITDAs over the same text -> shared / all of their labels (arXiv 2505.17769), 0 .. 1; both empty: 0."""
    a, b = (set(sae.label[:int(sae.n_atoms)].tolist()) for sae in (a, b))
    return len(a & b) / max(1, len(a | b))


VARIANTS = {cls.variant: cls for cls in (ReLU, Gated, JumpReLU, TopK, BatchTopK, Matryoshka, MutualChoice,
                                         FeatureChoice, AbsTopK, GSAE, TopAFA, VSAE, GBA, ITDA)}


# ----------------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------------

INF = float("inf")
# What each setting may be: one of some words, or a number of this type from low to high.
LIMITS = {
    "normalize": ("none", "scale", "unit", "token"), "aux": ("dead", "zipf"), "rows": ("unit", "free"),
    "penalty": ("target", "l0"), "budget": ("uniform", "zipf"), "over": ("token", "batch"),
    "sample": ("none", "unit", "learned"), "weighting": ("sum", "mean", "squared"),
    "multi_topk": (False, True), "k": (1, "F"), "k_start": (1, "F"), "k_aux": (1, "F"), "k_max": (1, "F"),
    "groups": (1, "F"), "seed": (0, 2**62), "dead_after": (1, 2**62), "adapt_tokens": (1, 2**62), "m_min": (0, 2**62),
    "rerank": (1, 2**62), "aux_coef": (0.0, INF), "tau": (0.0, INF), "l1": (0.0, INF), "coef": (0.0, INF),
    "bandwidth": (1e-12, INF), "threshold_init": (0.0, INF), "warmup": (0.0, 1.0), "alpha": (0.0, INF),
    "q": (0.0, INF), "beta": (0.0, INF), "afa": (0.0, INF), "p_max": (0.0, 1.0), "p_ratio": (1.0, INF),
    "gamma": (0.0, 1.0), "cosine": (-1.0, 1.0)}


def resolve_hyper(variant, d_in, n_latents, given):
    """Defaults, then `given`, all checked. ValueError names the setting, its value and what it may be."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; the nearest is {nearest(variant, VARIANTS)!r}")
    defaults = VARIANTS[variant].defaults
    for name in given:
        if name not in defaults:
            raise ValueError(f"{variant} has no setting {name!r}; the nearest is {nearest(name, defaults)!r}")
    for name, value in (("d_in", d_in), ("n_latents", n_latents)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    hyper = {**defaults, **given}
    if hyper.get("k_aux", 0) is None:  # half the width: arXiv 2406.04093, appendix B.1
        hyper["k_aux"] = max(1, min(d_in // 2, n_latents))
    for name, value in hyper.items():
        if not (value is None and defaults[name] is None):
            hyper[name] = in_limits(name, value, n_latents)
    if hyper.get("multi_topk") and 4 * hyper["k"] > n_latents:
        raise ValueError(f"multi_topk keeps 4 k = {4 * hyper['k']} latents of n_latents={n_latents}: lower k")
    return hyper


def in_limits(name, value, n_latents):
    """The value, an int as a float where one is wanted. ValueError if it is not among LIMITS."""
    if name == "levels":
        numbers = isinstance(value, (list, tuple)) and all(type(v) in (int, float) and 0 < v < INF for v in value)
        if not numbers or not value:
            raise ValueError(f"levels={value!r} must be a list of shares above 0")
        return [float(v) for v in value]
    low, high = LIMITS[name][0], LIMITS[name][-1]
    if isinstance(low, str):
        if value not in LIMITS[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(LIMITS[name])}")
        return value
    high = n_latents if high == "F" else high
    if isinstance(low, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(low) or not low <= value <= high or value == INF:
        raise ValueError(f"{name}={value!r} must be {type(low).__name__}, from {low} to {high}, for "
                         f"n_latents={n_latents}")
    return value


def build(variant, d_in, n_latents, **hyper):
    """A fresh SAE in fp32 on the CPU; `VARIANTS[variant].defaults` lists what `hyper` may hold.

    Then show it some activations, once, by `init_b_dec`."""
    hyper = resolve_hyper(variant, d_in, n_latents, hyper)
    sae = VARIANTS[variant](d_in, n_latents, hyper)
    with torch.no_grad():
        sae.init_weights(torch.Generator().manual_seed(sae.seed))
    return sae


@torch.no_grad()
def init_b_dec(sae, x, how="mean"):
    """From the first activations x (..., D): the input scale where there is one, and the centre b_dec.

    how: "mean", or "median" for the geometric median, which a few huge tokens do not move.  So the first codes
    describe what differs between tokens.  Resa: does this on the first batch even when it fine-tunes."""
    x = wide(x.reshape(-1, x.shape[-1]))                                                      # (N,D)
    size = x.pow(2).sum(1).mean()
    if not 0 < size < math.inf:      # of no tokens it is NaN
        raise ValueError("no SAE can start from these activations: there are none, all are 0, or some not finite")
    if sae.normalize == "scale":
        sae.input_scale.copy_(size.rsqrt())
    if sae.centred:
        x = wide(sae.batch(x).x)
        sae.b_dec.copy_(x.mean(0) if how == "mean" else geometric_median(x))


def geometric_median(x, steps=50):
    """(N,D) -> (D,), the point with the least sum of distances, by Weiszfeld's iteration."""
    centre = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - centre).norm(dim=1).clamp_min(1e-9)
        centre = (weight / weight.sum()) @ x
    return centre


# ----------------------------------------------------------------------------------------------------------
# Optimisers
# ----------------------------------------------------------------------------------------------------------

BASE_LR = {"signum": 5e-3, "adam": 2e-4}


def default_lr(name, n_latents):
    """The base rate holds at 2^14 latents and falls with the square root of their number, as in sparsify.

    At 65,536 latents signum's is 2.5e-3: what the published code runs, though its text says 2.5e-4."""
    return BASE_LR[name] / math.sqrt(n_latents / 2**14)


class Signum(torch.optim.Optimizer):
    """Sign descent inside a schedule-free average (arXiv 2405.15682), the optimiser of the published runs.

        y = (1 - b) z + b x       the parameters of the SAE: here the gradient is taken
        z <- z - lr sign(g)
        x <- running mean of z    what is evaluated and saved: see `averaged`

    Only z is stored; the step is written in y and z alone, x is read back from them, so a rescaled decoder row
    moves x with it, as in the published code."""

    def __init__(self, sae, lr, momentum=0.95):
        super().__init__(sae.parameters(), dict(lr=lr, momentum=momentum, steps=0))
        self.sae = sae

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for y in group["params"]:
                if y.grad is None:      # held fixed
                    continue
                if "z" not in self.state[y]:
                    self.state[y]["z"] = y.clone()
                z, sign, c = self.state[y]["z"], y.grad.sign(), 1 / (group["steps"] + 1)
                y.lerp_(z, c).add_(sign, alpha=-group["lr"] * (1 - group["momentum"] * (1 - c)))
                z.add_(sign, alpha=-group["lr"])
            group["steps"] += 1

    def mean_of(self, y, group):
        """x, from y = z + b (x - z); before the first step it is y."""
        return torch.lerp(y, self.state[y].get("z", y), 1 - 1 / group["momentum"])

    @contextmanager
    def averaged(self, unit_rows=True):
        """Inside, the SAE holds x, its weights to evaluate and save; after, y again, to the bit.

        Resa: saves x with decoder rows of whatever length they have; unit_rows=False restores that."""
        kept = [(y, y.detach().clone(), group) for group in self.param_groups for y in group["params"]]
        try:
            with torch.no_grad():
                for y, _, group in kept:
                    y.copy_(self.mean_of(y, group))
            if unit_rows and self.param_groups[0]["steps"]:  # an SAE that took no step stays as loaded
                self.sae.settle_()
            yield
        finally:
            with torch.no_grad():
                for y, training, _ in kept:
                    y.copy_(training)


def make_optimizer(sae, name, lr=None):
    """name: "signum" or "adam"; lr None means `default_lr`."""
    if name not in BASE_LR:
        raise ValueError(f"unknown optimizer {name!r}; the nearest is {nearest(name, BASE_LR)!r}")
    lr = default_lr(name, sae.n_latents) if lr is None else lr
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} must be a positive number")
    if name == "signum":
        return Signum(sae, lr)
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=sae.betas, fused=True)      # one pass over each tensor


# ----------------------------------------------------------------------------------------------------------
# The training step
# ----------------------------------------------------------------------------------------------------------

def train_step(sae, optimizer, xs, progress=1.0):
    """One step of any variant on micro-batches xs, each weighing the same -> parts.

    xs: list of x (N_i, D), or of (x, g, at) as `SAE.loss` takes them.  progress: share of the training behind.
    parts: those of `SAE.loss`, averaged over xs (fired: any), and "loss".  For TopK nothing waits for the device
    unless there is AuxK, which asks who is dead."""
    optimizer.zero_grad()
    seen = []
    for x in xs:
        b = sae.batch(*(x if isinstance(x, tuple) else (x,)), progress=progress, train=True)
        total, parts = sae.study(b)
        if total.requires_grad:      # not for a dictionary that is collected
            (total / len(xs)).backward()
        sae.observe(b)
        seen.append({"loss": total.detach(), **parts})
    if sae.unit_rows and sae.W_dec.requires_grad:
        sae.project_grad_()
    if sae.clip < math.inf:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), sae.clip)
    optimizer.step()
    sae.settle_()
    parts = {name: torch.stack([p[name] for p in seen]) for name in seen[0]}      # (len(xs), ...)
    return {name: v.any(0) if name == "fired" else v.mean(0) for name, v in parts.items()}


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------

class Metrics:
    """Sums in fp64 over everything shown to `update`; `result` does not depend on how it was cut up."""

    def __init__(self):
        self.n_tokens, self.sums, self.sum_x, self.count = 0, 0, 0, 0

    @torch.no_grad()
    def update(self, x, x_hat, z):
        """(..., D), (..., D), (..., F) or `Codes`. Leave out tokens that should not count before calling."""
        x, x_hat = (t.reshape(-1, t.shape[-1]).double() for t in (x, x_hat))
        xx, hh, xh = (x * x).sum(1), (x_hat * x_hat).sum(1), (x * x_hat).sum(1)   # (N,)
        ee = (x - x_hat).pow(2).sum(1)
        tiny = torch.finfo(torch.float64).tiny  # a token of zeros contributes 0 or a visible absurdity
        cosine, l2_ratio = xh / (xx * hh).sqrt().clamp_min(tiny), (hh / xx.clamp_min(tiny)).sqrt()
        rows = torch.stack([ee, xx, ee / xx.clamp_min(tiny), cosine, l2_ratio])   # (5, N)
        self.sums, self.sum_x = self.sums + rows.sum(1), self.sum_x + x.sum(0)    # (5,), (D,)
        self.count = self.count + counts(z if isinstance(z, Codes) else z.reshape(-1, z.shape[-1]))          # (F,)
        self.n_tokens += len(x)

    def result(self):
        """fvu: squared error over squared distance from the mean of the whole set (mean predictor 1,
        perfect 0). nmse, cosine, l2_ratio = ||x_hat||/||x||: means over tokens, not centred. l0: active
        latents a token. density (F,): share of tokens a latent fires on. dead: share of latents that
        never fired on these n_tokens. ValueError when nothing was shown."""
        if self.n_tokens == 0:
            raise ValueError("no tokens to measure the SAE on")
        sse, sxx, *ratios = self.sums
        fvu = sse / (sxx - self.sum_x.pow(2).sum() / self.n_tokens)
        nmse, cosine, l2_ratio = (float(r) / self.n_tokens for r in ratios)
        return {"fvu": float(fvu), "nmse": nmse, "l0": float(self.count.sum()) / self.n_tokens,
                "cosine": cosine, "l2_ratio": l2_ratio, "dead": float((self.count == 0).double().mean()),
                "density": self.count.double() / self.n_tokens, "n_tokens": self.n_tokens}


@torch.no_grad()
def metrics(sae, x, batch=4096):
    """(..., D) -> dict of `Metrics.result`, `batch` tokens at a time."""
    total = Metrics()
    for part in x.reshape(-1, x.shape[-1]).split(batch):
        total.update(part, *sae.reconstruct(part))
    return total.result()


@torch.no_grad()
def afa(sae, x):
    """(..., D) -> how long the codes are, against how long they should be (arXiv 2503.24277).  x_hat, x: as scaled.

    Nearly orthogonal atoms give ||f|| ~ ||x||, with f = [z_i ||w_i||, ||b_dec||].  length_ratio: ||f|| / ||x||, mean
    over tokens; 1 is expected.  coherence: the largest | ||x_hat||^2 - ||f||^2 | / ((n - 1) ||f||^2) of any token, a
    lower bound on the largest |cosine| between two of the n atoms, b_dec among them.  coherence_active: with n the
    active atoms of the token, valid too and far tighter, which is ours.  So is x_hat: the authors' code has x there,
    which proves nothing unless it is rebuilt exactly."""
    b = sae.batch(x)
    z = dense(sae.codes(b))                                                                   # (N,F)
    bias = wide(sae.b_dec).norm()
    f2 = (wide(z) * wide(sae.W_dec).norm(dim=1)).pow(2).sum(1) + bias**2                      # (N,)
    gap = (wide(sae.rebuild(z)).pow(2).sum(1) - f2).abs() / f2.clamp_min(1e-30)
    all_, active = sae.n_latents + (bias > 0) - 1, (z != 0).sum(1) + (bias > 0) - 1
    return {"length_ratio": float((f2 / wide(b.x).pow(2).sum(1).clamp_min(1e-30)).sqrt().mean()),
            "coherence": float((gap / all_.clamp(min=1)).amax()),
            "coherence_active": float((gap / active.clamp(min=1)).amax())}


# ----------------------------------------------------------------------------------------------------------
# Files: the layouts, ours and theirs
# ----------------------------------------------------------------------------------------------------------

# Layout -> its configuration, its weights.  "sparsify" is ours too; OpenAI's, once converted, has the last names.
FILES = {"sparsify": ("cfg.json", "sae.safetensors"), "saelens": ("cfg.json", "sae_weights.safetensors"),
         "dictionary_learning": ("config.json", "ae.safetensors")}
SPARSIFY_KEYS = ["activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
                 "skip_connection", "transcode", "d_in", "signed"]

# Name of a tensor in the file -> our name, with .T where they store it transposed.
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
BARE = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
BIAS, LEVEL, K = {"b_dec": "b_dec"}, {"threshold": "threshold"}, {"k": "k"}

SAELENS = {      # architecture -> variant, tensors
    "standard": ("relu", BARE), "topk": ("topk", BARE), "jumprelu": ("jumprelu", BARE | LEVEL),
    "gated": ("gated", {"W_enc": "W_enc.T", "b_gate": "b_enc", "r_mag": "r_mag", "b_mag": "b_mag",
                        "W_dec": "W_dec", "b_dec": "b_dec"})}
TO_SAELENS = dict(relu="standard", gated="gated", jumprelu="jumprelu", topk="topk", gsae="topk", vsae="topk",
                  batchtopk="jumprelu", matryoshka="jumprelu", mutual_choice="jumprelu", feature_choice="jumprelu")
NORMS = {"none": "none", "token": "layer_norm", "scale": "expected_average_only_in"}      # normalize -> theirs
HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out"}                               # site -> theirs

DICTIONARY_LEARNING = {      # dict_class -> variant, tensors
    "AutoEncoder": ("relu", LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": ("gated", {"encoder.weight": "W_enc", "gate_bias": "b_enc", "r_mag": "r_mag",
                                   "mag_bias": "b_mag", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", LINEAR | BIAS | K), "BatchTopKSAE": ("batchtopk", LINEAR | BIAS | K | LEVEL),
    "JumpReluAutoEncoder": ("jumprelu", BARE | LEVEL), "MatryoshkaBatchTopKSAE": ("matryoshka", BARE | K | LEVEL)}
OPENAI = {"encoder.weight": "W_enc", "latent_bias": "b_enc", "decoder.weight": "W_dec.T", "pre_bias": "b_dec"}

# What a user may run to make safetensors of a pickle; KEEP: and of what OpenAI's says beside the tensors.
CONVERT = ("import json, sys, torch; from safetensors.torch import save_file; "
           "s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
           "t = {k: v.contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}; "
           "save_file(t, 'ae.safetensors')")
KEEP = ("; json.dump({'shape': s['encoder.weight'].shape, **{k: s[k] for k in s.keys() - t.keys()}}, "
        "open('config.json', 'x'))")


# ----------------------------------------------------------------------------------------------------------
# Files: writing
# ----------------------------------------------------------------------------------------------------------

def save_sae(sae, directory, layout="sparsify"):
    """Writes an SAE: any variant in the layout "sparsify", what SAELens v6 can compute in the layout "saelens".

    sparsify's own loader reads TopK, and g-SAE, which is TopK at inference, if inputs are not scaled; it refuses the
    others.  ValueError, and nothing is written, for what SAELens cannot express, or beside files of another layout.
    An interrupted save never leaves old settings beside new weights: both files are written under temporary names;
    then the old configuration goes, for without one a directory does not load; then both take their names."""
    writers, directory = {"sparsify": to_sparsify, "saelens": to_saelens}, Path(directory)
    if layout not in writers:
        raise ValueError(f"unknown layout {layout!r}; the nearest is {nearest(layout, writers)!r}")
    for other, (_, name) in FILES.items():
        if other != layout and (directory / name).exists():
            raise ValueError(f"{directory}: holds {name}, of the layout {other!r}; with {layout!r} beside it nobody "
                             "could tell which is meant: name another directory")
    cfg, tensors = writers[layout](sae)
    text = json.dumps(cfg, indent=2) + "\n"  # before any file is touched: meta may not be JSON
    directory.mkdir(parents=True, exist_ok=True)
    config, weights = (directory / name for name in FILES[layout])
    new_config, new_weights = (path.with_name(f"{path.name}.tmp") for path in (config, weights))
    save_file(tensors, new_weights)
    new_config.write_text(text, encoding="utf-8")
    config.unlink(missing_ok=True)
    os.replace(new_weights, weights)
    os.replace(new_config, config)


def as_sparsify(variant, normalize):
    """-> (activation, {our name: name there}).  What sparsify would compute otherwise gets an activation that its
    loader refuses, and keeps our names, in which older loaders, blind to activation, find no encoder."""
    if variant in ("topk", "gsae") and normalize == "none":
        return "topk", {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    return f"{variant}/{normalize}", {}


def to_sparsify(sae):
    activation, names = as_sparsify(sae.variant, sae.normalize)
    cfg = {"activation": activation, "expansion_factor": max(1, sae.n_latents // sae.d_in),
           "normalize_decoder": True, "num_latents": sae.n_latents, "skip_connection": False,
           "transcode": False, "d_in": sae.d_in, "variant": sae.variant, **sae.hyper, "meta": sae.meta}
    return cfg, {names.get(name, name): t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}


def to_saelens(sae):
    """The input scale goes into the weights, in fp32 at least; one threshold for all becomes one for each latent."""
    kind, norm = TO_SAELENS.get(sae.variant), NORMS.get(sae.normalize)
    if kind is None or norm is None:
        raise ValueError(f"SAELens cannot express {sae.variant} with normalize={sae.normalize!r}; the layout "
                         "'sparsify' holds everything")
    tensors, fold = {}, {}
    if sae.normalize == "scale":
        norm, s = "none", wide(sae.input_scale.detach().cpu())
        fold = {"W_enc": s, "W_dec": 1 / s, "b_dec": 1 / s}
    for key, place in SAELENS[kind][1].items():
        name = place.removesuffix(".T")
        t = getattr(sae, name).detach().cpu()
        t = wide(t) * fold.get(name, 1) if fold else t
        t = t.expand(sae.n_latents) if name == "threshold" else t
        tensors[key] = (t if name == place else t.T).contiguous()
    meta = {"training_architecture": sae.variant, **sae.meta, "sae_lens_version": "6.0.0"}
    if "model" in meta:
        meta["model_name"] = meta.pop("model")
    if "layer" in meta and "site" in meta:
        site = str(meta.pop("site"))
        meta["hook_name"] = f"blocks.{meta.pop('layer')}.{HOOKS.get(site, site)}"
    cfg = {"architecture": kind, "d_in": sae.d_in, "d_sae": sae.n_latents, "device": "cpu", "metadata": meta,
           "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."), "normalize_activations": norm,
           "apply_b_dec_to_input": True, "reshape_activations": "none"}
    return cfg | ({"k": sae.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}), tensors


# ----------------------------------------------------------------------------------------------------------
# Files: reading.  Whatever is read may be hostile
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """What a configuration says, before any tensor is read."""
    variant: str
    d_in: int
    n_latents: int
    hyper: dict
    meta: dict
    tensors: dict                     # name in the file -> our name, as in the tables above
    unread: tuple = ()                # names in the file that codes do not depend on
    scale: float | None = None        # the input scale, where it is not among the tensors
    centred: bool = True              # their encoder reads x - b_dec, as ours does
    folded: bool = False              # their codes are ours once the atoms' lengths are in the encoder

    def __post_init__(self):
        self.hyper = resolve_hyper(self.variant, self.d_in, self.n_latents, self.hyper)

    def miniature(self):
        """{our name: tensor} of such an SAE in which every length 2 stands for D, and 3 for F."""
        return VARIANTS[self.variant](2, 3, self.hyper).state_dict()


def load_sae(directory_or_hub_id, hookpoint=None):
    """An SAE from a directory or hub repository, on the CPU, in the dtype of its file (fp32 where biases are folded).

    Reads ours, sparsify's and SAELens's; of dictionary_learning's and OpenAI's (github.com/openai/sparse_autoencoder)
    a copy in safetensors, for a pickle is never loaded.  meta has site, layer and model as far as the file says them.
    hookpoint: the sub-directory that holds the SAE ("layers.12.mlp").  ValueError names the file and what is wrong
    with it; FileNotFoundError when there is none, or the hub cannot be reached."""
    folder, layout = find_folder(str(directory_or_hub_id), hookpoint)
    config, weights = (folder / name for name in FILES[layout])
    recipe = read_config(config, READ[layout])
    tensors = read_weights(weights, recipe, config.name)
    try:
        return assemble(recipe, tensors)
    except ValueError as err:
        raise ValueError(f"{weights}: {err}") from None


def find_folder(spec, hookpoint):
    """The directory with the SAE, `spec` or its sub-directory `hookpoint`, here or on the hub; and its layout."""
    if hookpoint and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", hookpoint):
        raise ValueError(f"hookpoint {hookpoint!r} must be a path inside {spec}, like layers.12.mlp")
    root = Path(spec) if Path(spec).is_dir() else fetch(spec, hookpoint)
    folder = root / (hookpoint or "")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"hookpoint {hookpoint!r} leads out of {spec}")
    layouts = [layout for layout, files in FILES.items() if all((folder / name).is_file() for name in files)]
    if len(layouts) == 1:
        return folder, layouts[0]
    if layouts:
        both = " and ".join(f"{layout} ({', '.join(FILES[layout])})" for layout in layouts)
        raise ValueError(f"{folder}: holds the files of {both}: keep those of one")
    if (folder / "cfg.json").is_file():
        raise FileNotFoundError(f"{folder / 'sae.safetensors'}: no such file, nor sae_weights.safetensors")
    found = sorted({path.parent.name for _, name in FILES.values() for path in root.glob(f"*/{name}")})
    if not found:
        refuse_pickle(folder)
    raise FileNotFoundError(f"{folder}: no cfg.json there; name a hookpoint of {spec} that has one, "
                            f"like {', '.join(found[:30] or ['layers.12.mlp'])}")


def refuse_pickle(folder):
    """ValueError with the way out, if all there is was written by dictionary_learning or OpenAI."""
    config = folder / "config.json"
    theirs = config.is_file() and "trainer" in read_object(config)
    names = sorted(path.name for path in folder.glob("*.pt")) or ["ae.pt"] * theirs
    if names:
        command = f'python -c "{CONVERT if theirs else CONVERT + KEEP}" {shlex.quote(names[0])}'
        raise ValueError(f"{folder}: {names[0]} is a pickle, which can run any code when it is loaded, so it is not; "
                         f"this makes safetensors of it, in that directory: {command}")


def fetch(repo, hookpoint):
    """The local copy of what a hub repository holds of an SAE, at `hookpoint` where one is given."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{repo}: no such directory, nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    names = ["activation_scaler.json", *(name for files in FILES.values() for name in files)]
    try:
        return Path(snapshot_download(repo, allow_patterns=[f"{hookpoint}/{n}" if hookpoint else n for n in names]))
    except Exception as err:  # whatever the network, the proxy or the hub may raise, the user needs one line
        raise FileNotFoundError(f"{repo}: no such directory, and the hub did not give it "
                                f"({type(err).__name__}); check the name, or go online once") from err


def read_object(path):
    """A JSON object, of which the parts that are looked into are objects too."""
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: not JSON ({err})") from None
    parts = ("meta", "metadata", "trainer")
    if not (isinstance(cfg, dict) and all(isinstance(cfg.get(part, {}), dict) for part in parts)):
        raise ValueError(f'{path}: the file, and its "meta", "metadata", "trainer", must each be a JSON object')
    return cfg


def read_config(path, read):
    """A configuration -> Recipe, by one of the functions below."""
    cfg = read_object(path)
    try:
        return read(cfg, path)
    except KeyError as err:
        raise ValueError(f"{path}: no {err}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as err:      # the last three: a value out of place
        raise ValueError(f"{path}: {err}") from None


def read_sparsify(cfg, path):
    """Ours and sparsify's."""
    for key in ("skip_connection", "transcode", "signed"):
        if cfg.get(key):
            raise ValueError(f"{key} is true; only plain autoencoders with codes >= 0 are read here")
    activation = cfg.get("activation", "topk")  # files from before there was a choice lack it
    variant, d_in, factor = cfg.get("variant", activation), cfg["d_in"], cfg.get("expansion_factor", 0)
    n_latents = cfg.get("num_latents") or (d_in * factor if type(d_in) is type(factor) is int else 0)
    known = VARIANTS[variant].defaults if variant in VARIANTS else {}
    hyper = {key: cfg[key] for key in known if key in cfg or key == "k"}
    recipe = Recipe(variant, d_in, n_latents, hyper, cfg.get("meta", {}), {})
    ours, names = as_sparsify(variant, recipe.hyper["normalize"])
    if activation != ours:
        raise ValueError(f"activation {activation!r} and variant {variant!r} contradict each other")
    unknown = sorted(set(cfg) - set(SPARSIFY_KEYS) - set(known) - {"variant", "meta"})
    if unknown:
        warnings.warn(f"{path}: ignored unknown keys {', '.join(unknown)}")
    recipe.tensors = {names.get(name, name): name for name in recipe.miniature()}
    return recipe


def read_saelens(cfg, path):
    """SAELens's."""
    cfg, norms = as_v6(cfg), {theirs: ours for ours, theirs in NORMS.items()}
    for key, read in (("architecture", SAELENS), ("normalize_activations", norms), ("activation_fn", ["relu"]),
                      ("reshape_activations", ["none"]), ("finetuning_scaling_factor", [False])):
        if cfg[key] not in read:
            raise ValueError(f"{key} {cfg[key]!r} is not read here, only {', '.join(map(str, read))}")
    kind, normalize, scale = cfg["architecture"], norms[cfg["normalize_activations"]], None
    if normalize == "scale":      # not yet in the weights: a file beside them says how much
        scaler = path.with_name("activation_scaler.json")
        scale = read_object(scaler)["scaling_factor"] if scaler.is_file() else None
        if type(scale) is not float:
            raise ValueError(f"normalize_activations {NORMS['scale']!r} needs a scaling_factor in {scaler.name}")
    own = {"topk": {"k": cfg["k"]}, "jumprelu": {"k": min(32, cfg["d_sae"])}, "standard": {"rows": "free"}}
    meta = {key: value for key, value in cfg["metadata"].items() if value is not None and key[:9] != "sae_lens_"}
    meta |= site_of(meta.pop("hook_name", None)) | ({"model": meta.pop("model_name")} if "model_name" in meta else {})
    return Recipe(SAELENS[kind][0], cfg["d_in"], cfg["d_sae"], {"normalize": normalize, **own.get(kind, {})}, meta,
                  SAELENS[kind][1], unread=("scaling_factor",), scale=scale, centred=cfg["apply_b_dec_to_input"],
                  folded=kind == "topk" and cfg["rescale_acts_by_decoder_norm"])


def as_v6(cfg):
    """Every setting of SAELens that counts.  Before v6 there was no "metadata", topk was an activation function."""
    there = {key: value for key, value in cfg.items() if value is not None}
    hook = there.get("hook_name", there.get("hook_point"))
    cfg = {"architecture": "standard", "k": None, "apply_b_dec_to_input": True, "normalize_activations": "none",
           "reshape_activations": "none", "rescale_acts_by_decoder_norm": False, "finetuning_scaling_factor": False,
           "activation_fn": there.get("activation_fn_str", "relu"),
           "metadata": {"hook_name": hook, "model_name": there.get("model_name")}} | there
    if cfg["activation_fn"] == "topk":
        cfg |= {"architecture": "topk", "activation_fn": "relu", "k": cfg["activation_fn_kwargs"]["k"]}
    if type(cfg["normalize_activations"]) is bool:
        cfg["normalize_activations"] = NORMS["scale" if cfg["normalize_activations"] else "none"]
    return cfg


def site_of(hook):
    """TransformerLens's name of a hook -> {"layer", "site"}, {} if it is in no block.  A site that is not ours keeps
    its name, so that it is never taken for one of ours."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(hook))
    if not match:
        return {}
    layer, name = int(match[1]), match[2]
    if name == "hook_resid_pre" and layer > 0:      # the input of a block is the output of the one before
        layer, name = layer - 1, "hook_resid_post"
    return {"layer": layer, "site": {theirs: ours for ours, theirs in HOOKS.items()}.get(name, name)}


def read_dictionary_learning(cfg, path):
    """dictionary_learning.  Its loader folds the atoms' lengths of AutoEncoder; two classes read x, not x - b_dec."""
    if "shape" in cfg:
        return read_openai(cfg)
    trainer = cfg["trainer"]
    kind, n_latents = trainer["dict_class"], trainer["dict_size"]
    if kind not in DICTIONARY_LEARNING:
        raise ValueError(f"dict_class {kind!r} is not read here, only {', '.join(DICTIONARY_LEARNING)}")
    variant, tensors = DICTIONARY_LEARNING[kind]
    hyper = {"normalize": "none"} | ({"rows": "free"} if kind == "AutoEncoderNew" else {})
    if "k" in VARIANTS[variant].defaults:
        hyper["k"] = min(32, n_latents) if variant == "jumprelu" else trainer["k"]
    if variant == "matryoshka":
        hyper["levels"] = trainer["group_sizes"]
    where = str(trainer.get("submodule_name"))
    site = next((site for site, hook in HOOKS.items() if where.startswith(hook.removeprefix("hook_"))), None)
    meta = {"layer": trainer.get("layer"), "site": site, "model": trainer.get("lm_name")}
    return Recipe(variant, trainer["activation_dim"], n_latents, hyper,
                  {key: value for key, value in meta.items() if value is not None}, tensors,
                  unread=("threshold", "group_sizes"), folded=kind == "AutoEncoder",
                  centred=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))


def read_openai(cfg):
    """What CONVERT keeps of OpenAI's: TopK standardises each token, ReLU does not."""
    n_latents, d_in = cfg["shape"]
    kind, state = cfg.get("activation", "ReLU"), cfg.get("activation_state_dict", {})
    if kind not in ("ReLU", "TopK") or state.get("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"activation {kind!r} with {state} is not read here, only ReLU, and TopK with ReLU")
    hyper = {"normalize": "token", "k": state["k"]} if kind == "TopK" else {"normalize": "none", "rows": "free"}
    return Recipe(kind.lower(), d_in, n_latents, hyper, {}, OPENAI,
                  unread=("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"))


READ = {"sparsify": read_sparsify, "saelens": read_saelens, "dictionary_learning": read_dictionary_learning}


def read_weights(path, recipe, config):
    """Weights -> {our name: tensor as ours}; the header is checked before any tensor is read."""
    table, small = recipe.tensors, recipe.miniature() | {"k": torch.tensor(0)}
    size = {2: recipe.d_in, 3: recipe.n_latents}
    try:
        with safe_open(path, framework="pt") as file:
            header = {key: file.get_slice(key) for key in file.keys()}
            missing = table.keys() - header.keys() - {"k"}      # which older files lack
            for key in sorted(missing | header.keys() - table.keys() - set(recipe.unread)):
                raise ValueError(f"{path}: tensor {key!r} is {'missing' if key in missing else 'not expected'}")
            names, dtypes = {key: table[key].removesuffix(".T") for key in table if key in header}, set()
            for key, name in names.items():
                shape, want = tuple(header[key].get_shape()), tuple(size[n] for n in small[name].shape)
                want = want if name == table[key] else want[::-1]
                if shape != want:
                    raise ValueError(f"{path}: tensor {key!r} has shape {shape}, {config} says {want}")
                dtype, floats = header[key].get_dtype(), small[name].is_floating_point()
                if dtype not in (("F64", "F32", "F16", "BF16") if floats else ("I64", "I32")):
                    raise ValueError(f"{path}: tensor {key!r} has dtype {dtype}")
                dtypes |= {dtype} if floats and name not in ("threshold", "input_scale") else set()
            if len(dtypes) > 1:
                raise ValueError(f"{path}: dtypes {sorted(dtypes)}, expected one for all weights and biases")
            tensors = {key: file.get_tensor(key) for key in names}
    except SafetensorError as err:
        raise ValueError(f"{path}: not a whole safetensors file ({err})") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {key!r} holds NaN or infinite values")
    return {name: tensors[key] if name == table[key] else tensors[key].T.contiguous() for key, name in names.items()}


@torch.no_grad()
def assemble(recipe, tensors):
    """Recipe and {our name: tensor} -> SAE; what the others compute differently goes into the weights."""
    sae = VARIANTS[recipe.variant](recipe.d_in, recipe.n_latents, recipe.hyper)
    sae.meta = recipe.meta
    if "k" in tensors and int(tensors.pop("k")) != sae.k:
        raise ValueError(f"its k is not {sae.k}, that of its configuration")
    if recipe.scale is not None:
        tensors["input_scale"] = torch.tensor(recipe.scale)
    if recipe.folded or not recipe.centred:      # never in half precision
        tensors = {name: wide(t) for name, t in tensors.items()}
    sae.load_state_dict(tensors, assign=True)
    if not recipe.centred:
        shift = sae.W_enc @ sae.b_dec                                                         # (F,)
        sae.b_enc += shift
        if sae.variant == "gated":
            sae.b_mag += sae.r_mag.exp() * shift
    if recipe.folded:
        sae.fold_rows_()
    if "threshold" in tensors:      # theirs rectify as well: below 0 it does nothing
        sae.threshold.clamp_(min=0)
    if sae.normalize == "scale" and not 0 < sae.input_scale < INF:
        raise ValueError(f"the input scale {float(sae.input_scale)} is not above 0")
    if not 0 <= getattr(sae, "n_atoms", 0) <= sae.n_latents:
        raise ValueError(f"n_atoms is {int(sae.n_atoms)}, there is room for {sae.n_latents}")
    return sae
