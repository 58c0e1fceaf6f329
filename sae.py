"""Sparse autoencoders (SAEs): fourteen variants, one loss, one training step, metrics, files.

    python train.py --stage sae --variant topk      trains one; help lists variants and settings

    sae = build("topk", d_in=1536, n_latents=65536, k=32)
    init_b_dec(sae, x)                              x (N,D): the first activations
    parts = train_step(sae, make_optimizer(sae, "adam"), [x])
    x_hat, z = sae.reconstruct(x)

The rows of W_dec, called atoms, are a dictionary; the code z says how much of each atom is in x.
Variants differ in how they get from pre to few codes, and in what they add to the loss:
    pre = (x - b_dec) W_enc^T + b_enc    z = select(pre)    x_hat = z W_dec + b_dec    e = x - x_hat

Read `plain_topk`, `SAE`, `TopK` in this order, then any other variant alone.
Dimensions: N tokens, D width (d_in), F latents (n_latents), K active latents of a token (k),
M selected pairs of a token and a latent.
"""

import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as fn

from data.files import (REQUIRED, base_name, check, check_tensors, locate, one_line,
                        open_tensors, read_fields, read_json, read_value, staged)

CHUNK = 2**26      # entries of pre held at a time where tokens do not compete: 256 MB in fp32

# ---- TopK in plain form ------------------------------------------------------------------------

def plain_topk(sae, x):
    """TopK (arXiv 2406.04093), the SAE of SAE-Tuning (arXiv 2506.09967, eq. 3-5), as on paper.
    x (N,D) -> FVU, which is the training loss; x_hat (N,D); z (N,F).
    The class `TopK` computes the same, loss and gradients, without a dense z."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc                  # (N,F)
    value, latent = pre.topk(sae.k, dim=-1)                          # (N,K), the largest
    z = torch.zeros_like(pre).scatter(-1, latent, value.relu())      # (N,F)
    x_hat = z @ sae.W_dec + sae.b_dec                                # (N,D)
    fvu = (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()    # 0: perfect, 1: the mean
    return fvu, x_hat, z

# ---- What all variants share: encode, decode, loss ---------------------------------------------

@dataclass
class Batch:
    """A micro-batch on its way through an SAE; each method of a variant reads what it needs."""
    x: torch.Tensor                      # (N,D) normalized, in the dtype of the weights
    shift: object = 0.0                  # the activation itself is x * scale + shift
    scale: object = 1.0
    train: bool = False                  # select as in training, or as at inference
    progress: float = 1.0                # fraction of training completed, 0 to 1
    g: torch.Tensor | None = None        # (N,D) gradient of the model's loss by the activation
    position: torch.Tensor | None = None      # (N,) int64: number of each token in the data set
    pre: torch.Tensor | None = None      # (N,F) before selection, where a variant keeps all of it
    z: object = None                     # (N,F) codes, dense or `Codes`
    e: torch.Tensor | None = None        # (N,D) x - x_hat
    count: torch.Tensor | None = None    # (F,) on how many tokens each latent fires
    denominator: object = 1.0            # what squared errors are divided by
    cache: dict = field(default_factory=dict)      # what `codes` leaves for `extra`, by name

BASE = dict(normalize="none", dead_after=10**7, seed=0)
AUX = dict(aux_coef=0.0, k_aux=None)

class SAE(nn.Module):
    """What all variants share; made by `build` or `load_sae`.
    A variant has `codes`: Batch -> z (N,F), dense or `Codes`, of training or inference as b.train
    says.  It may override `extra` (loss terms) and `observe` (state that has no gradient).
    hyper    {name: value} of the variant's settings; each is an attribute, too
    meta     where the SAE belongs: site, layer, model, data, sink_norm, ...
    layer    the block that it is being trained or measured on; None: neither
    Tensors  W_enc (F,D), b_enc (F,), W_dec (F,D), b_dec (D,), and what a variant adds, in fp32 or
             fp64: sae.to(torch.bfloat16) is not supported, `batch` refuses such weights"""
    variant = ""             # its name in VARIANTS
    defaults = {}            # name -> default of every setting
    error_unit = "token"     # loss: sum e^2 by variance ("fvu"), by N ("token"), by N D ("entry")
    per_token = True         # in training, the code of a token depends on that token alone
    unit_rows = True         # atoms are kept at norm 1
    betas = (0.9, 0.999)     # of Adam
    clip = math.inf          # largest norm of the gradient
    signed = False           # codes may be negative
    centred = True           # b_dec starts at the mean of the activations
    needs_gradient = False   # training needs g
    encoder_names = ("W_enc", "b_enc")      # what scales with the code of a latent

    def __init__(self, d_in, n_latents, hyper):
        super().__init__()
        self.d_in, self.n_latents, self.meta, self.layer = d_in, n_latents, {}, None
        for name, value in hyper.items():
            setattr(self, name, value)
        self.add_tensors()
        if self.normalize == "scale":
            self.register_buffer("input_scale", torch.ones(()))
        self.add_counters(tokens_since_fired=torch.zeros(n_latents, dtype=torch.int64))

    def add_counters(self, **tensors):
        """Buffers that only training reads: they are in checkpoints, not in the SAE's files."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def add_tensors(self):
        self.W_enc = nn.Parameter(torch.empty(self.n_latents, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.W_dec = nn.Parameter(torch.empty(self.n_latents, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))

    def init_weights(self, rng):
        """As sparsify: encoder as nn.Linear, decoder its copy with rows of norm 1, biases zero."""
        self.W_enc.uniform_(-self.d_in**-0.5, self.d_in**-0.5, generator=rng)
        self.W_dec.copy_(fn.normalize(self.W_enc, dim=1))

    @property
    def hyper(self):
        return {name: getattr(self, name) for name in self.defaults}

    def batch(self, x, g=None, position=None, progress=1.0, train=False):
        """x (..., D) -> Batch in the dtype of the weights; g and position are laid out like x.
        ValueError: another width, weights below fp32, on a CPU also NaN or infinite activations."""
        dtype = self.W_dec.dtype
        check(dtype.itemsize >= 4, f"an SAE computes in fp32 or fp64, its weights are {dtype}")
        check(x.shape[-1] == self.d_in,
              f"the SAE reads width {self.d_in}, the activations have {x.shape[-1]}")
        x = x.reshape(-1, self.d_in).to(dtype)                           # (N,D)
        if x.device.type == "cpu":       # on a GPU, looking would mean waiting; the log looks there
            check(x.isfinite().all(), "the activations hold NaN or infinite values: "
                                      "leave those tokens out, or raise --dtype")
        g = None if g is None else g.reshape(x.shape).to(dtype)
        position = None if position is None else position.reshape(len(x))
        return Batch(*self.normalized(x), train, progress, g, position)

    def normalized(self, x):
        """x (N,D) -> normalized x, shift, scale, where x is normalized x * scale + shift.
        By `normalize`:  none, as it is;  scale, times a constant that makes the mean of ||x||^2 1;
        unit, x / ||x||;  token, (x - mean over D) / standard deviation over D."""
        if self.normalize == "scale":
            return x * self.input_scale, 0.0, 1 / self.input_scale
        if self.normalize == "unit":
            return fn.normalize(x, dim=1), 0.0, x.norm(dim=1, keepdim=True)
        if self.normalize == "token":
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)      # (N,1)
            return (x - mean) / (std + 1e-5), mean, std
        return x, 0.0, 1.0

    def preacts(self, x):
        """Normalized x (N,D) -> (N,F), before selection."""
        return fn.linear(x - self.b_dec, self.W_enc, self.b_enc)         # (N,F)

    def decode_normalized(self, z):
        """z (N,F) -> x_hat (N,D) as `preacts` reads x.  Fewer columns, dense: the first latents."""
        product = z.times(self.W_dec) if isinstance(z, Codes) else z @ self.W_dec[:z.shape[-1]]
        return product + self.b_dec                                      # (N,D)

    def encode(self, x):
        """x (..., D) -> z (..., F) at inference, dense, in the dtype of the weights."""
        return dense(self.codes(self.batch(x))).view(*x.shape[:-1], self.n_latents)

    def decode(self, z, x=None):
        """z (..., F) -> x_hat (..., D).  normalize "unit" and "token" need x: z lacks its scale."""
        check(x is not None or self.normalize in ("none", "scale"), f"normalize={self.normalize!r} "
              "scales each token by itself: decode(z, x) needs the activations")
        x = self.b_dec if x is None else x.to(self.W_dec.dtype)      # None: scale of any x will do
        _, shift, scale = self.normalized(x.reshape(-1, self.d_in))
        x_hat = self.decode_normalized(z.reshape(-1, z.shape[-1])) * scale + shift      # (N,D)
        return x_hat.view(*z.shape[:-1], self.d_in)

    def reconstruct(self, x):
        """x (..., D) -> x_hat of that shape and dtype, z (N,F) dense or `Codes`: at inference."""
        b = self.batch(x)
        z = self.codes(b)                                                # (N,F)
        x_hat = self.decode_normalized(z) * b.scale + b.shift            # (N,D)
        return x_hat.to(x.dtype).view(x.shape), z

    def forward(self, x):
        return self.reconstruct(x)[0]

    def loss(self, x, g=None, position=None, progress=1.0):
        """x (..., D) -> (total, parts): the training loss of a micro-batch of 2 tokens or more.
        parts, detached: fvu, l0, each further term before its weight, fired (F,) bool."""
        return self.batch_loss(self.batch(x, g, position, progress, train=True))

    def batch_loss(self, b):
        """As `loss`, from a Batch, in which z and e stay."""
        check(len(b.x) >= 2, "a micro-batch needs at least 2 tokens: "
                             "the FVU divides by their variance")
        b.z = self.codes(b)                                              # (N,F)
        b.e = b.x - self.decode_normalized(b.z)                          # (N,D)
        b.count, variance = counts(b.z), (b.x - b.x.mean(0)).pow(2).sum()
        b.denominator = {"fvu": variance, "token": len(b.x), "entry": b.x.numel()}[self.error_unit]
        total = self.recon_loss(b)
        parts = {"fvu": b.e.pow(2).sum() / variance, "l0": b.count.sum().float() / len(b.x)}
        for name, (weight, term) in (self.extra(b) | self.aux_loss(b)).items():
            total, parts[name] = total + weight * term, term
        parts = {name: part.detach() for name, part in parts.items()}
        return total, parts | {"fired": b.count > 0}

    def recon_loss(self, b):
        return b.e.pow(2).sum() / b.denominator

    def error(self, b, x_hat):
        """Squared error of some reconstruction (N,D), in the unit of the loss."""
        return (b.x - x_hat).pow(2).sum() / b.denominator

    def extra(self, b):
        """Batch -> {name: (weight, value)}: loss terms beside the reconstruction."""
        return {}

    def observe(self, b):
        """Without a gradient, after each backward pass.  Here: counts who fires."""
        self.tokens_since_fired.add_(len(b.x)).masked_fill_(b.count > 0, 0)

    def ramp(self, b):
        """The weight of a penalty: rises from 0 to 1 over the first `warmup` of training."""
        return min(1.0, b.progress / self.warmup) if self.warmup else 1.0

    @property
    def dead(self):
        """(F,) bool: latents that have not fired for more than `dead_after` training tokens."""
        return self.tokens_since_fired > self.dead_after

    def choose_aux(self, b):
        """Sorted flat indices of each token's k_aux strongest dead latents, of all if fewer."""
        if "dead" not in b.cache:      # waits for the device: cheaper than ranking nobody
            b.cache["dead"] = self.dead.nonzero()[:, 0]
        dead = b.cache["dead"]
        if not len(dead):
            return dead
        score = b.pre[:, dead].abs() if self.signed else b.pre[:, dead]
        best = score.topk(min(self.k_aux, len(dead)), dim=-1, sorted=False).indices
        return flat_indices(dead[best.sort().values], self.n_latents)

    def aux_loss(self, b):
        """AuxK (arXiv 2406.04093): how well dead latents explain the error -> {"aux": ...} or {}.
            e_hat = z_dead W_dec        aux = sum (e - e_hat)^2 / sum (e - mean e)^2
        e is detached.  Divided by the variance of e as in that paper's code (sparsify: of x), times
        min(n_dead / k_aux, 1) as in sparsify."""
        if not getattr(self, "aux_coef", 0):
            return {}
        if "aux" not in b.cache:      # pre is dense and has a graph; `Chosen` has done this before
            index = self.choose_aux(b)
            b.cache["aux"] = Codes(b.pre.flatten()[index].relu(), index, b.pre.shape)
        z, e = b.cache["aux"], b.e.detach()
        if not len(z.value):
            return {"aux": (self.aux_coef, e.new_zeros(()))}
        variance = (e - e.mean(0)).pow(2).sum()
        left = (e - z.times(self.W_dec)).pow(2).sum()      # e_hat = z W_dec: without b_dec
        ratio = left / variance.clamp_min(torch.finfo(e.dtype).tiny)
        ratio = torch.where(variance > 0, ratio, 0.0)      # an exact fit leaves nothing to explain
        return {"aux": (self.aux_coef, min(1.0, len(z.value) / len(b.x) / self.k_aux) * ratio)}

    @torch.no_grad()
    def constrain_(self):
        """After each optimizer step: back onto the constraints.  Here: atoms to norm 1."""
        if self.unit_rows:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def project_grad_(self):
        """Removes from each atom's gradient the part that only changes its norm."""
        along = torch.einsum("fd,fd->f", self.W_dec.grad, self.W_dec)    # (F,)
        self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def fold_rows_(self):
        """Atoms to norm 1, their norm into the encoder: x_hat stays, unless latents are ranked."""
        norm = self.W_dec.norm(dim=1)                                    # (F,)
        norm = torch.where(norm > 0, norm, 1.0)      # an atom of zeros stays one
        for name in self.encoder_names:
            tensor = getattr(self, name)
            tensor.mul_(norm[:, None] if tensor.dim() == 2 else norm)
        self.W_dec.div_(norm[:, None])

# ---- Sparse codes: the fast path ---------------------------------------------------------------

class Codes(NamedTuple):
    """An (N,F) matrix with M entries, sorted by flat index n F + i.  Some values may be 0."""
    value: torch.Tensor           # (M,)
    flat_index: torch.Tensor      # (M,) int64
    shape: tuple                  # (N,F)

    def transpose(self):
        rows, columns = self.shape
        row, column = self.flat_index // columns, self.flat_index % columns
        order = column.int().sort(stable=True).indices      # (M,): stable, so that rows ascend
        return Codes(self.value[order], (column * rows + row)[order], (columns, rows))

    def times(self, matrix):
        """(N,F) @ (F,D) -> (N,D), reading only the rows of `matrix` that are needed."""
        rows, columns = self.shape
        first = torch.arange(rows, device=self.flat_index.device) * columns
        offsets = torch.searchsorted(self.flat_index, first)             # (N,): where rows begin
        product = fn.embedding_bag(self.flat_index % columns, matrix.detach(), offsets, mode="sum",
                                   per_sample_weights=self.value)
        if not matrix.requires_grad:     # a frozen SAE, or a gradient
            return product
        return Product.apply(product, matrix, self.value.detach(), self.flat_index, self.shape)

class Product(torch.autograd.Function):
    """Returns `product`, which is z W, (N,F) @ (F,D); its backward pass adds the gradient of W,
    z^T d(z W).  embedding_bag would make that, too, pair by pair: this takes half the time."""

    @staticmethod
    def forward(ctx, product, W, value, flat_index, shape):
        ctx.save_for_backward(value, flat_index)
        ctx.shape = shape
        return product.view_as(product)

    @staticmethod
    def backward(ctx, grad):
        z = Codes(*ctx.saved_tensors, ctx.shape)                         # (N,F)
        return grad, z.transpose().times(grad), None, None, None

def dense(z):
    if not isinstance(z, Codes):
        return z
    full = z.value.new_zeros(z.shape[0] * z.shape[1])
    return full.index_put((z.flat_index,), z.value).view(z.shape)        # (N,F)

def counts(z):
    """Codes (N,F), dense ones also (..., F) -> (F,) fp64: on how many tokens each latent fires."""
    if not isinstance(z, Codes):
        return (z != 0).flatten(0, -2).sum(0).double()
    fired, columns = (z.value != 0).to(torch.float64), z.shape[1]
    return fired.new_zeros(columns).index_add_(0, z.flat_index % columns, fired)

class Selected(torch.autograd.Function):
    """Selected entries of pre = x W^T + b; their backward pass touches selected latents alone.
        d W[i] = sum over n that selected i of d pre[n,i] x[n]     d x[n] = sum_i d pre[n,i] W[i]
    Exact for any selection, also AuxK's (sparsify's fused encoder drops that part)."""

    @staticmethod
    def forward(ctx, x, W, b, value, flat_index):
        ctx.save_for_backward(x, W, flat_index)
        return value.clone()                                             # (M,)

    @staticmethod
    def backward(ctx, grad):
        x, W, flat_index = ctx.saved_tensors
        d_pre = Codes(grad, flat_index, (len(x), len(W)))                # (N,F)
        d_b = grad.new_zeros(len(W)).index_add_(0, flat_index % len(W), grad)      # (F,)
        d_x = d_pre.times(W) if ctx.needs_input_grad[0] else None        # (N,D)
        return d_x, d_pre.transpose().times(x), d_b, None, None

def flat_indices(latents, n_latents):
    """Latents of each token (N,k) -> flat indices n F + i."""
    first = torch.arange(len(latents), device=latents.device)[:, None] * n_latents
    return (latents + first).flatten()                                   # (N k,)

def largest_per_token(score, k):
    """score (N,F) -> sorted flat indices of the k largest of each token, exactly k even on ties."""
    F = score.shape[1]
    size = math.gcd(F, 2 ** int(math.log2(F / k) / 2))      # near sqrt(F / k): fewest candidates
    latents = grouped_topk(score, k, size) if size >= 8 else score.topk(k, sorted=False).indices
    return flat_indices(latents.sort().values, F)

def grouped_topk(score, k, size):
    """score (N,F) -> the k largest latents of each token (N,k), from one pass over long rows.
    Latents are put into groups of `size`, every (F/size)th into one.  The k groups of the largest
    maxima hold the k largest latents, so `topk`, which reads a row several times, ranks few."""
    score = score.unflatten(1, (size, -1))                               # (N,size,F/size)
    group = score.amax(1).topk(k, sorted=False).indices                  # (N,k)
    members = score.gather(2, group[:, None].expand(-1, size, -1))       # (N,size,k)
    best = members.flatten(1).topk(k, sorted=False).indices              # (N,k)
    return best // k * score.shape[2] + group.gather(1, best % k)

def largest(score, n):
    """score (M,) -> indices of the n largest, exactly n even on ties.  (`topk` alone is slow.)"""
    block = len(score) // max(1, 4 * n)
    if block < 2:
        return score.topk(n, sorted=False).indices
    maxima = score[:len(score) // block * block].view(-1, block).amax(1)
    bound = maxima.topk(n, sorted=False).values.amin()      # n scores or more reach this
    left = (score < bound).logical_not_().nonzero()[:, 0]      # NaN stays in, to be seen
    return left[score[left].topk(n, sorted=False).indices]

class Chosen(SAE):
    """The TopK family: `choose` takes a batch with pre -> the flat indices (M,) to keep, sorted.
    Codes are ReLU(pre) there, or pre where `signed`.  pre (N,F) is made some tokens at a time,
    without a graph: autograd sees the selected entries alone."""
    defaults = BASE | AUX | dict(k=32)
    error_unit = "fvu"

    def codes(self, b):
        selections, rows = {"z": self.choose}, max(1, CHUNK // self.n_latents)
        if b.train and self.aux_coef:
            selections["aux"] = self.choose_aux
        if b.train and not self.per_token:      # tokens compete: all of them at once
            rows = len(b.x)
        found = {name: [] for name in selections}
        with torch.no_grad():
            for start in range(0, max(1, len(b.x)), rows):      # no tokens: one empty part
                part = Batch(b.x[start:start + rows], train=b.train, cache=b.cache)
                part.g = None if b.g is None else b.g[start:start + rows]
                part.pre = self.preacts(part.x)                          # (rows,F)
                for name, choose in selections.items():
                    index = choose(part)                                 # (M,)
                    value = part.pre.flatten()[index]                    # (M,)
                    found[name].append((value, index + start * self.n_latents))
        for name, pairs in found.items():
            value, index = map(torch.cat, zip(*pairs))                   # (M,)
            value = Selected.apply(b.x - self.b_dec, self.W_enc, self.b_enc, value, index)
            value = value if self.signed else value.relu()
            b.cache[name] = Codes(value, index, (len(b.x), self.n_latents))
        return b.cache["z"]

class TopK(Chosen):
    """TopK (arXiv 2406.04093), as SAE-Tuning uses it (arXiv 2506.09967, eq. 3-5).
        z = TopK(ReLU(pre)), the k largest of each token         loss = FVU + aux_coef AuxK
    In training and at inference.  Ranks pre and rectifies after: same codes, no pass over (N,F)."""

    def choose(self, b):
        return largest_per_token(b.pre, self.k)

# ---- The other variants that select: how many latents, and by which score ----------------------

class BatchTopK(Chosen):
    """BatchTopK (arXiv 2412.06410): k latents a token on average, more where a token needs more.
        training:  the k N largest of the micro-batch       inference:  z = pre 1[pre > threshold]
    threshold: running mean of each batch's smallest active value, 1 % a step.  It depends on N."""
    per_token = False

    def add_tensors(self):
        super().add_tensors()
        self.register_buffer("threshold", torch.zeros(()))      # until trained: ReLU at inference

    def choose(self, b):
        if not b.train:
            return (b.pre > self.threshold).flatten().nonzero()[:, 0]
        return largest(b.pre.flatten(), int(self.k * len(b.pre))).sort().values

    def smallest_active(self, z):
        """Codes -> the smallest |z| above 0, inf if there is none."""
        return torch.where(z.value.abs() > 0, z.value.abs(), math.inf).amin()

    def observe(self, b):
        super().observe(b)
        low = self.smallest_active(b.z)
        mean = torch.where(self.threshold == 0, low, self.threshold.lerp(low, 0.01))
        self.threshold.copy_(torch.where(low < math.inf, mean, self.threshold))

    @torch.no_grad()
    def calibrate(self, batches):
        """Once trained: threshold = mean over batches (N,D) of the smallest active value (ours)."""
        codes = [self.codes(self.batch(x, train=True)) for x in batches]
        low = torch.stack([self.smallest_active(z) for z in codes])      # (batches,) or (..., F)
        active = low < math.inf      # a latent need not fire in every batch
        self.threshold.copy_(torch.where(active, low, 0).sum(0) / active.sum(0).clamp(min=1))

class Matryoshka(BatchTopK):
    """Matryoshka BatchTopK (arXiv 2503.17547): the first latents must also reconstruct alone.
        loss = sum over levels of ||x - z[:, :m] W_dec[:m] - b_dec||^2 + AuxK,   m_1 < .. < m_G = F
    levels: shares of F.  weighting: "sum", the paper's;  "mean" over G + 1 levels, the empty one
    included, the authors' code."""
    defaults = BatchTopK.defaults | dict(levels=[1/32, 1/16, 1/8, 1/4, 17/32], weighting="sum")

    def widths(self):
        """[m_1, .., m_G]."""
        shares = torch.tensor(self.levels).double().cumsum(0) / sum(self.levels)
        return sorted({max(1, round(end)) for end in (shares * self.n_latents).tolist()})

    def recon_loss(self, b):
        latent, widths = b.z.flat_index % self.n_latents, self.widths()
        x_hat, low = self.b_dec, 0
        total = self.error(b, x_hat) if self.weighting == "mean" else 0.0
        for high in widths:      # each group is decoded once and added to those before it
            group = b.z.value * ((latent >= low) & (latent < high))      # (M,)
            x_hat, low = x_hat + b.z._replace(value=group).times(self.W_dec), high
            total = total + self.error(b, x_hat)
        return total / (len(widths) + 1) if self.weighting == "mean" else total

class MutualChoice(BatchTopK):
    """Mutual Choice (arXiv 2411.02124): BatchTopK found independently, with AuxK on.
    That paper's aux_zipf_loss, which it defines only by its aim, is AuxK here.  The inference
    threshold, which it does not define either, is BatchTopK's."""
    defaults = BatchTopK.defaults | dict(aux_coef=1 / 32)

class FeatureChoice(BatchTopK):
    """Feature Choice (arXiv 2411.02124): each latent i selects its m_i tokens; none is ever idle.
        training:   latent i keeps the m_i largest of its column,  sum_i m_i = k N
        inference:  z = pre 1[pre > threshold_i], thresholds as in BatchTopK
    m_i = k N / F, that paper's even budget; the first latents take what is left.  Threshold: ours.
    """

    def add_tensors(self):
        super().add_tensors()
        self.threshold = torch.zeros(self.n_latents)

    def choose(self, b):
        if not b.train:
            return super().choose(b)
        total = int(self.k * len(b.pre))
        check(total >= self.n_latents, f"feature_choice: {len(b.pre)} tokens x k={self.k} leave "
              f"some of {self.n_latents} latents without: raise --micro-batch, or lower --latents")
        least, more = divmod(total, self.n_latents)      # the first `more` latents keep one more
        tokens = b.pre.T.topk(least + (more > 0), dim=1).indices         # (F,most), best first
        latent = torch.arange(self.n_latents, device=tokens.device)[:, None]
        index = tokens * self.n_latents + latent                         # (F,most)
        kept = [index[:, :least].flatten(), index[:more, least:].flatten()]
        return torch.cat(kept).sort().values                             # (k N,)

    def smallest_active(self, z):
        low = torch.full_like(self.threshold, math.inf)                  # (F,)
        size = torch.where(z.value > 0, z.value, math.inf).to(low.dtype)
        return low.scatter_reduce_(0, z.flat_index % self.n_latents, size, "amin")

class AbsTopK(Chosen):
    """AbsTopK (arXiv 2510.00404): the k largest |pre| of each token, signs kept.
    An atom serves two directions: F signed latents can do what 2 F of TopK can.  Per token and with
    b_enc as in the paper; its code takes the k N largest of a batch, without b_enc."""
    signed = True

    def choose(self, b):
        return largest_per_token(b.pre.abs(), self.k)

class GSAE(TopK):
    """g-SAE (arXiv 2411.10397): prefers latents whose atoms move the model's loss.
        score = ReLU(pre) (1 + beta a)     a[n,i] = |W_dec[i] . g[n]|     g = d(model's loss) / dx
        training: ReLU(pre) at the k largest scores of each token     inference: TopK, without g
    No gradient flows through a.  Ours: the score's form, next-token cross-entropy as the loss, g in
    units of its mean norm over a micro-batch, and inference without g."""
    defaults = TopK.defaults | dict(beta=1.0)
    needs_gradient = True

    def choose(self, b):
        if not b.train:
            return super().choose(b)
        check(b.g is not None, "gsae: training needs the gradient of the model's loss (g)")
        a = (b.g @ self.W_dec.T).abs()                                   # (N,F)
        return largest_per_token(b.pre.relu() * (1 + self.beta * a), self.k)

class TopAFA(Chosen):
    """top-AFA (arXiv 2503.24277): as many latents as make the code as long as the input.
        q = (ReLU(pre) ||w||)^2, falling
        keep the first j, for which |sqrt(q_1 + .. + q_j) - ||x - b_dec||| is least
        loss = mean e^2 + afa mean_n (||z|| - ||x||)^2
    No b_enc.  The authors' code ends the sum with 1e8, which large activations exceed; here j < F.
    L0 is not controlled: in the authors' runs it ends above D."""
    defaults = BASE | AUX | dict(normalize="token", afa=1 / 32)
    error_unit = "entry"     # mean e^2
    betas = (0.9, 0.99)

    def add_tensors(self):
        super().add_tensors()
        self.b_enc.requires_grad_(False)

    def choose(self, b):
        cap = max(1, self.n_latents - 1)
        size, latents = (b.pre.relu() * self.W_dec.norm(dim=1)).topk(cap, dim=1)       # (N,cap)
        goal = (b.x - self.b_dec).norm(dim=1, keepdim=True)                            # (N,1)
        last = (size.pow(2).cumsum(1).sqrt() - goal).abs().argmin(1, keepdim=True)
        keep = torch.arange(cap, device=latents.device) <= last                        # (N,cap)
        return flat_indices(latents, self.n_latents)[keep.flatten()].sort().values

    def extra(self, b):
        token, square = b.z.flat_index // self.n_latents, b.z.value.pow(2)
        square = square.new_zeros(len(b.x)).index_add(0, token, square)                # (N,)
        norm = square.clamp_min(1e-30).sqrt()
        return {"afa": (self.afa, (norm - b.x.norm(dim=1)).pow(2).mean())}

class VSAE(Chosen):
    """TopK-vSAE (arXiv 2509.22994): codes are means of Gaussians, drawn to the standard one.
        mu = ReLU(pre)    z = the k largest |mu + noise|    loss = mean_n ||e||^2 + beta KL
        KL = mean_n 1/2 sum_i mu^2, over all F latents, ramped up
    sample="none" (the authors' code, all published results): no noise, an L2 penalty;  "unit" (the
    text): noise of size 1.  At inference z is mu.  Ours: atoms have norm 1, or long ones undo beta;
    b_dec is subtracted; the KL clamps no mu."""
    defaults = Chosen.defaults | dict(warmup=0.1, normalize="scale", beta=0.01, sample="none")
    error_unit = "token"     # mean_n ||e||^2

    def codes(self, b):
        b.pre = self.preacts(b.x)      # dense, with its graph: the KL reads all of it
        z = b.pre.relu()
        if b.train and self.sample == "unit":
            z = z + torch.randn_like(z)
        index = largest_per_token(z.detach().abs(), self.k)              # (N k,)
        return Codes(z.flatten()[index], index, z.shape)

    def extra(self, b):
        kl = 0.5 * b.pre.relu().pow(2).sum(-1).mean()
        return {"kl": (self.beta * self.ramp(b), kl)}

# ---- Variants with a penalty: z is dense, and a term of the loss makes it sparse ---------------

class ReLU(SAE):
    """ReLU with an L1 penalty: the first SAEs (arXiv 2309.08600; transformer-circuits.pub 2023).
        z = ReLU(pre)         loss = mean_n ||e||^2 + l1 sum_i z_i ||w_i||
    rows="unit": atoms have norm 1;  "free": any norm, folded into the encoder at the end
    (transformer-circuits.pub/2024/april-update).  l1 ramps up; with ||x||^2 = 1 on average it
    shrinks the code of a lone atom by l1 / 2.  AuxK instead of resampling revives dead latents."""
    defaults = BASE | AUX | dict(normalize="scale", l1=0.05, rows="unit", warmup=0.1)

    @property
    def unit_rows(self):
        return self.rows == "unit"

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return b.pre.relu()                                              # (N,F)

    def extra(self, b):
        norm = 1.0 if self.unit_rows else self.W_dec.norm(dim=1)         # (F,)
        return {"l1": (self.l1 * self.ramp(b), (b.z * norm).sum(-1).mean())}

class Gated(SAE):
    """Gated SAE (arXiv 2404.16014): one encoder says whether a latent fires, a copy how strongly.
        gate = 1[pre > 0]       z = gate ReLU(exp(r_mag) (x - b_dec) W_enc^T + b_mag)
        loss = mean_n ||e||^2 + l1 sum_i ReLU(pre)_i + mean_n ||x - (ReLU(pre) W_dec' + b_dec')||^2
    W_dec' and b_dec' are detached: the last term trains the gate alone, whose bias is b_enc.
    Equals JumpReLU of that magnitude with threshold b_mag - exp(r_mag) b_enc."""
    defaults = BASE | AUX | dict(normalize="scale", l1=0.05, warmup=0.1)
    betas = (0.0, 0.999)
    encoder_names = ("W_enc", "b_enc", "b_mag")

    def add_tensors(self):
        super().add_tensors()
        self.r_mag = nn.Parameter(torch.zeros(self.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(self.n_latents))

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return (b.pre > 0) * (self.r_mag.exp() * (b.pre - self.b_enc) + self.b_mag).relu()

    def extra(self, b):
        gate = b.pre.relu()
        x_hat = gate @ self.W_dec.detach() + self.b_dec.detach()         # (N,D)
        return {"l1": (self.l1 * self.ramp(b), gate.sum(-1).mean()),
                "gate": (1.0, self.error(b, x_hat))}

class JumpReLU(SAE):
    """JumpReLU (arXiv 2407.14435; Gemma Scope, 2408.05147): a learned threshold for each latent.
        z = pre step        step = 1[pre > theta]        loss = mean_n ||e||^2 + coef (L0 / k - 1)^2
        dz / dtheta = -theta / bandwidth near            near = 1[|pre - theta| < bandwidth / 2]
        dstep / dtheta = -1 / bandwidth near             dz / dpre = step
    The penalty, which ramps up, is dictionary_learning's; the paper's is coef L0.  The gradient is
    clipped at norm 1, as there: the penalty starts near (F / 2k)^2, whose trace in Adam's second
    moment would hold thresholds back for long.  The threshold is learned, not its logarithm.
    bandwidth 0.001, the paper's, suits ||x||^2 ~ 1 and billions of tokens."""
    defaults = BASE | AUX | dict(k=32, normalize="scale", coef=1.0, bandwidth=0.001,
                                 threshold_init=0.001, warmup=0.1)
    betas = (0.0, 0.999)
    clip = 1.0
    encoder_names = ("W_enc", "b_enc", "threshold")

    def add_tensors(self):
        super().add_tensors()
        self.threshold = nn.Parameter(torch.full((self.n_latents,), self.threshold_init))

    def codes(self, b):
        b.pre, theta = self.preacts(b.x), self.threshold.detach()
        step, near = b.pre > theta, (b.pre - theta).abs() < self.bandwidth / 2       # (N,F)
        zero = theta - self.threshold      # (F,): its gradient by the threshold is -1
        b.cache["step"] = step + near * (zero / self.bandwidth)
        return b.pre * step + near * (zero / self.bandwidth * theta)

    def extra(self, b):
        l0 = b.cache["step"].sum(-1).mean()
        return {"l0_penalty": (self.coef * self.ramp(b), (l0 / self.k - 1) ** 2)}

    def constrain_(self):
        super().constrain_()
        self.threshold.data.clamp_(min=0)

# ---- Variants with a state of their own: controlled biases, a collected dictionary -------------

class GBA(SAE):
    """Group bias adaptation (arXiv 2506.14002): biases keep each group below a firing frequency.
        ||x|| = 1     u = W_dec (x - b_dec)     pre = u + b_enc     z = scale_out u 1[pre > 0]
        every adapt_tokens tokens; f_i: frequency of latent i on them, r_i: its largest pre above 0
            f_i > p of its group:   b_i <- max(b_i - gamma r_i, -1)
            f_i < 1e-6:             b_i <- min(b_i + gamma (mean r of its firing group), 0)
    p, a ceiling, falls geometrically over `groups`, by p_ratio in all, so that it sums to k active
    latents (p_max > 0 sets the first instead).  adapt_tokens=None: 3 firings at the lowest p.  20
    adaptations make a dense start sparse; the paper's gamma 0.01 and 25,600 tokens suit runs of
    1e8.  The JumpReLU, unit rows and inputs, init, scale_out >= 0, defaults, p by k are ours."""
    defaults = BASE | dict(k=32, normalize="unit", groups=10, p_max=0.0, p_ratio=100.0,
                           gamma=0.05, adapt_tokens=None)

    def add_tensors(self):
        self.W_dec = nn.Parameter(torch.empty(self.n_latents, self.d_in))      # W_enc, too
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.scale_out = nn.Parameter(torch.ones(self.n_latents))
        self.register_buffer("b_enc", torch.zeros(self.n_latents))             # gets no gradient
        self.add_counters(fired=torch.zeros(self.n_latents, dtype=torch.int64),
                          peak=torch.zeros(self.n_latents),                    # largest pre
                          tokens=torch.zeros((), dtype=torch.int64))      # since an adaptation
        if not self.adapt_tokens:
            self.adapt_tokens = math.ceil(3 / max(1e-18, float(self.ceilings()[-1])))

    def init_weights(self, rng):
        self.W_dec.copy_(fn.normalize(torch.randn(self.W_dec.shape, generator=rng), dim=1))

    @property
    def W_enc(self):
        return self.W_dec

    def group(self):
        """(F,) int64: the group of each latent; sizes differ by at most 1."""
        latent = torch.arange(self.n_latents, device=self.b_enc.device)
        return latent * self.groups // self.n_latents

    def ceilings(self):
        """(groups,) fp64: p of each group."""
        p = self.p_ratio ** -torch.linspace(0, 1, self.groups, dtype=torch.float64)
        size = torch.bincount(self.group().cpu(), minlength=self.groups)      # (groups,)
        return p * (self.p_max or min(1.0, self.k / float((p * size).sum())))

    def codes(self, b):
        b.pre = self.preacts(b.x)
        return self.scale_out * (b.pre - self.b_enc) * (b.pre > 0)

    def observe(self, b):
        super().observe(b)
        self.fired += (b.pre > 0).sum(0)
        torch.maximum(self.peak, b.pre.amax(0), out=self.peak)
        self.tokens += len(b.x)

    def constrain_(self):
        super().constrain_()
        self.scale_out.data.clamp_(min=0)         # codes are not signed
        if self.tokens >= self.adapt_tokens:      # never between the micro-batches of a step
            self.adapt()

    @torch.no_grad()
    def adapt(self):
        group, frequency = self.group(), self.fired / self.tokens        # (F,)
        sums = self.peak.new_zeros(2, self.groups)      # of peaks, of latents that fired
        sums.index_add_(1, group, torch.stack([self.peak, (self.peak > 0).to(sums)]))
        lift = (sums[0] / sums[1].clamp(min=1))[group]                   # (F,): mean peak
        lowered = (self.b_enc - self.gamma * self.peak).clamp(min=-1)
        b = torch.where(frequency > self.ceilings().to(frequency)[group], lowered, self.b_enc)
        raised = (b + self.gamma * lift).clamp(max=0)
        self.b_enc.copy_(torch.where(frequency < 1e-6, raised, b))
        for buffer in (self.fired, self.peak, self.tokens):
            buffer.zero_()

class ITDA(SAE):
    """ITDA (arXiv 2505.17769): the dictionary is a set of activations, collected in one pass.
        encode: matching pursuit.  r = x; k times:  i = argmax |W_dec r|,  c = W_dec[i] r,
                z_i += c,  r -= c W_dec[i]
        learn:  x becomes an atom, x / ||x||, if cos(x, x_hat) < cosine, until F are there
    cosine is the paper's tau as 1 - tau D / 2.  The first D atoms are distinct rows, most frequent
    first.  label[i], the position of atom i in the data, compares dictionaries over one text.  No
    gradients; no centring, as published.  Atoms beyond n_atoms are 0."""
    defaults = BASE | dict(k=40, cosine=0.8)
    error_unit = "fvu"
    signed = True
    centred = False

    def add_tensors(self):
        self.register_buffer("W_dec", torch.zeros(self.n_latents, self.d_in))
        self.register_buffer("label", torch.full((self.n_latents,), -1))
        self.register_buffer("n_atoms", torch.zeros((), dtype=torch.int64))
        self.add_counters(tokens=torch.zeros((), dtype=torch.int64))      # seen so far
        self.b_dec = nn.Parameter(torch.zeros(self.d_in), requires_grad=False)

    def init_weights(self, rng):
        pass

    @torch.no_grad()
    def codes(self, b):
        atoms = self.W_dec[:max(1, int(self.n_atoms))]
        token = torch.arange(len(b.x), device=b.x.device)
        r, z = b.x.clone(), b.x.new_zeros(len(b.x), self.n_latents)      # (N,D), (N,F)
        for _ in range(self.k):
            dots = r @ atoms.T                                           # (N,n_atoms)
            i = dots.abs().argmax(1)                                     # (N,)
            c = dots[token, i]
            z[token, i] += c
            r -= c[:, None] * atoms[i]
        index = z.flatten().nonzero()[:, 0]                              # (M,)
        return Codes(z.flatten()[index], index, z.shape)

    def observe(self, b):
        position = b.position
        if position is None:
            position = torch.arange(len(b.x), device=b.x.device) + self.tokens
        self.tokens += len(b.x)
        if self.n_atoms < min(self.d_in, self.n_latents):
            first = self.most_frequent(b.x)[:self.d_in - int(self.n_atoms)]
            self.add_atoms(b.x[first], position[first])
            b.z = self.codes(b)      # what the new atoms explain needs no atom of its own
            b.e, b.count = b.x - self.decode_normalized(b.z), counts(b.z)
        super().observe(b)
        # Nothing is encoded again in between: near twins of one batch all become atoms.
        new = fn.cosine_similarity(b.x, b.x - b.e, dim=1) < self.cosine  # (N,)
        self.add_atoms(b.x[new], position[new])

    def most_frequent(self, x):
        """x (N,D) -> where each distinct row first stands, most frequent first, ties by place."""
        _, index, count = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
        token = torch.arange(len(x)).to(index)
        first = torch.full_like(count, len(x)).scatter_reduce_(0, index, token, "amin")
        first, order = first.sort()
        return first[count[order].argsort(descending=True, stable=True)]

    def add_atoms(self, x, position):
        """Rows x (M,D) as atoms, as many as there is room for; rows of zeros are left out."""
        old, keep = int(self.n_atoms), x.norm(dim=1) > 0
        x, position = x[keep][:self.n_latents - old], position[keep][:self.n_latents - old]
        self.W_dec[old:old + len(x)] = fn.normalize(x, dim=1)
        self.label[old:old + len(x)] = position                          # (M,)
        self.n_atoms += len(x)

    def constrain_(self):
        pass

VARIANTS = dict(
    relu=ReLU, gated=Gated, jumprelu=JumpReLU, topk=TopK, batchtopk=BatchTopK,
    matryoshka=Matryoshka, mutual_choice=MutualChoice, feature_choice=FeatureChoice,
    abstopk=AbsTopK, gsae=GSAE, topafa=TopAFA, vsae=VSAE, gba=GBA, itda=ITDA)
for name, cls in VARIANTS.items():
    cls.variant = name

# ---- Settings, building ------------------------------------------------------------------------

# Setting: (type or words, lowest, highest), for `read_fields`; the default is the variant's own.
SETTINGS = {
    # All variants
    "normalize": (("none", "scale", "unit", "token"), None, None),
    "dead_after": (int, 1, None), "seed": (int, 0, None),
    # AuxK: weight, latents a token (None: half of D)
    "aux_coef": (float, 0, None), "k_aux": (int, 1, None),
    # Active latents a token; fraction of training over which penalties rise to their weight
    "k": (int, 1, None), "warmup": (float, 0, 1),
    # Matryoshka
    "levels": ([float], 1, None), "weighting": (("sum", "mean"), None, None),
    # g-SAE and vSAE, top-AFA
    "beta": (float, 0, None), "sample": (("none", "unit"), None, None), "afa": (float, 0, None),
    # ReLU and Gated, JumpReLU
    "l1": (float, 0, None), "rows": (("unit", "free"), None, None),
    "coef": (float, 0, None), "bandwidth": (float, 1e-12, None), "threshold_init": (float, 0, None),
    # GBA, ITDA
    "groups": (int, 1, None), "p_max": (float, 0, 1), "p_ratio": (float, 1, None),
    "gamma": (float, 0, 1), "adapt_tokens": (int, 1, None), "cosine": (float, -1, 1)}

def resolve_hyper(variant, d_in, n_latents, given, where=""):
    """Defaults of a variant, overridden by `given`; ValueError names what SETTINGS refuses."""
    check(variant in VARIANTS, f"no variant {variant!r}, only {', '.join(VARIANTS)}")
    defaults, where = VARIANTS[variant].defaults, where or variant
    for name, value in given.items():
        check(name in defaults, f"{where}: no setting {name!r}, only {', '.join(defaults)}")
        check(value is not None or defaults[name] is None, f"{where}: {name}=None is no number")
    read_value(d_in, int, 1, None, f"{where}: d_in")
    read_value(n_latents, int, 1, None, f"{where}: n_latents")
    table = {name: (*SETTINGS[name], default) for name, default in defaults.items()}
    hyper = read_fields(given, table, where)
    if "k_aux" in hyper and hyper["k_aux"] is None:      # arXiv 2406.04093, appendix B.1
        hyper["k_aux"] = max(1, min(d_in // 2, n_latents))
    for name in ("k", "k_aux", "groups"):
        check((hyper.get(name) or 1) <= n_latents,
              f"{where}: {name}={hyper.get(name)} is above n_latents={n_latents}")
    check(all(share > 0 for share in hyper.get("levels", [])), f"{where}: levels are not above 0")
    return hyper

def build(variant, d_in, n_latents, **hyper):
    """A fresh SAE in fp32 on the CPU, for `init_b_dec`.  hyper: see its variant's `defaults`."""
    hyper = resolve_hyper(variant, d_in, n_latents, hyper)
    sae = VARIANTS[variant](d_in, n_latents, hyper)
    with torch.no_grad():
        sae.init_weights(torch.Generator().manual_seed(sae.seed))
    return sae

@torch.no_grad()
def init_b_dec(sae, x):
    """From the first activations x (..., D): the input scale, if any, and b_dec, their mean."""
    x = x.reshape(-1, x.shape[-1]).to(sae.W_dec.dtype)                   # (N,D)
    square = x.pow(2).sum(1).mean()                                      # of no tokens it is NaN
    check(0 < square < math.inf, "no SAE can start from these activations: "
                                 "there are none, all are 0, or some not finite")
    if sae.normalize == "scale":
        sae.input_scale.copy_(square.rsqrt())
    if sae.centred:
        sae.b_dec.copy_(sae.batch(x).x.mean(0))

# ---- Optimizers, the training step -------------------------------------------------------------

BASE_LR = {"signum": 5e-3, "adam": 2e-4}

def default_lr(name, n_latents):
    """The base rate holds at 2^14 latents and falls with their square root, as in sparsify.
    At 65,536 latents signum's is 2.5e-3: what the published code runs; its text says 2.5e-4."""
    return BASE_LR[name] / math.sqrt(n_latents / 2**14)

class Signum(torch.optim.Optimizer):
    """Sign descent in a schedule-free average (arXiv 2405.15682): the published runs' optimizer.
        y = (1 - b) z + b x       the parameters of the SAE: the gradient is taken here
        z <- z - lr sign(g)
        x <- running mean of z    what is evaluated and saved: see `averaged`
    Only z is stored.  x is read back from y and z: normalizing atoms moves it, as published."""

    def __init__(self, saes, lr, momentum=0.95):
        super().__init__(saes.parameters(), dict(lr=lr, momentum=momentum, steps=0))
        # `averaged` puts their weights back onto their constraints
        self.saes = saes if isinstance(saes, nn.ModuleList) else [saes]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            ys = [y for y in group["params"] if y.grad is not None]      # others are fixed
            for y in ys:
                if "z" not in self.state[y]:
                    self.state[y]["z"] = y.clone()
            if ys:      # _foreach_: one launch for all tensors, which must not be none
                lr, c = group["lr"], 1 / (group["steps"] + 1)
                zs = [self.state[y]["z"] for y in ys]
                signs = torch._foreach_sign([y.grad for y in ys])
                torch._foreach_lerp_(ys, zs, c)
                torch._foreach_add_(ys, signs, alpha=-lr * (1 - group["momentum"] * (1 - c)))
                torch._foreach_add_(zs, signs, alpha=-lr)
            group["steps"] += 1

    @contextmanager
    def averaged(self):
        """Inside, the SAE holds x, its weights to evaluate and save; afterwards y, to the bit.
        Resa: the released code saves x with atoms of any norm."""
        group, = self.param_groups
        training = {y: y.detach().clone() for y in group["params"]}
        try:
            for y in group["params"]:
                z = self.state[y].get("z", y)      # before the first step x is y
                y.data.lerp_(z.data, 1 - 1 / group["momentum"])
            if group["steps"]:                     # without a step: as loaded
                for sae in self.saes:
                    sae.constrain_()
            yield
        finally:
            for y, before in training.items():
                y.data.copy_(before)

def make_optimizer(sae, name, lr=None):
    """Of an SAE, or a ModuleList.  name: "signum" or "adam"; lr None means `default_lr`."""
    check(name in BASE_LR, f"no optimizer {name!r}, only {', '.join(BASE_LR)}")
    first = sae[0] if isinstance(sae, nn.ModuleList) else sae
    lr = default_lr(name, first.n_latents) if lr is None else lr
    check(0 < lr < math.inf, f"lr={lr!r} must be a positive number")
    if name == "signum":
        return Signum(sae, lr)
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=first.betas, fused=True)

@contextmanager
def tf32_products(on):
    """Inside, fp32 matrix products on CUDA round their inputs to TF32, 10 bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

def train_step(sae, optimizer, xs, progress=1.0, tf32=False, average=None):
    """One step of any variant on micro-batches, averaged with equal weight -> parts.
    sae       or a ModuleList of SAEs: xs is then a list for each, and so are the parts
    xs        list of x (N_i, D), or of (x, g, position) as `SAE.loss` takes them
    progress  fraction of training completed, 0 to 1
    tf32      see `tf32_products`: for loss and gradients
    average   called before the optimizer acts, where processes share the batch
    parts     those of `SAE.loss`, averaged over xs (fired: in any of them), and "loss"
    """
    several = isinstance(sae, nn.ModuleList)
    saes, of_each = (sae, xs) if several else ([sae], [xs])
    optimizer.zero_grad()
    parts = [accumulate(one, own, progress, tf32) for one, own in zip(saes, of_each)]
    if average:
        average()
    for one in saes:
        if one.unit_rows and one.W_dec.requires_grad:
            one.project_grad_()
        if one.clip < math.inf:
            nn.utils.clip_grad_norm_(one.parameters(), one.clip)
    optimizer.step()
    for one in saes:
        one.constrain_()
    return parts if several else parts[0]

def accumulate(sae, xs, progress, tf32):
    """Adds the gradient of the mean loss over micro-batches xs, and observes them -> parts.
    For TopK, nothing here waits for the device unless there is AuxK."""
    seen, means = [], {}
    if aux := getattr(sae, "aux_coef", 0):      # who is dead is one thing for all micro-batches
        dead = sae.dead.nonzero()[:, 0]
    for x in xs:
        inputs = x if isinstance(x, tuple) else (x,)
        b = sae.batch(*inputs, progress=progress, train=True)
        if aux:
            b.cache["dead"] = dead
        with tf32_products(tf32):
            total, parts = sae.batch_loss(b)
            if total.requires_grad:      # a collected dictionary has no gradient
                (total / len(xs)).backward()
        with torch.no_grad():
            sae.observe(b)
        seen.append({"loss": total.detach(), **parts})
    for name in seen[0]:
        values = torch.stack([parts[name] for parts in seen])            # (len(xs), ...)
        means[name] = values.any(0) if name == "fired" else values.mean(0)
    return means

# ---- Metrics -----------------------------------------------------------------------------------

class Metrics:
    """Sums in fp64 over all tokens shown to `update`, however they are cut into batches."""

    def __init__(self):
        self.n_tokens, self.sums, self.sum_x, self.count = 0, 0, 0, 0

    @torch.no_grad()
    def update(self, x, x_hat, z):
        """x, x_hat (..., D), z (..., F) or `Codes`, without the tokens that should not count."""
        x, x_hat = (t.reshape(-1, t.shape[-1]).double() for t in (x, x_hat))      # (N,D)
        tiny = torch.finfo(torch.float64).tiny      # a token of zeros: 0, or a visible absurdity
        ee, xx, hh = ((t * t).sum(1) for t in (x - x_hat, x, x_hat))              # (N,)
        cosine = (x * x_hat).sum(1) / (xx * hh).sqrt().clamp_min(tiny)
        self.sums = self.sums + torch.stack([ee, xx, cosine]).sum(1)     # (3,)
        self.sum_x = self.sum_x + x.sum(0)                               # (D,)
        self.count = self.count + counts(z)                              # (F,)
        self.n_tokens += len(x)

    def result(self):
        """{name: number}.  ValueError when no tokens were shown.
        fvu    sum e^2 / sum (x - mean x)^2, over the whole set: the mean has 1, a perfect fit 0
        cosine of x and x_hat, not centred: mean over tokens
        l0     active latents of a token;  density (F,): fraction of tokens a latent fires on
        dead   fraction of latents that never fired on these n_tokens"""
        check(self.n_tokens, "no tokens to measure the SAE on")
        n, (ee, xx, cosine) = self.n_tokens, self.sums
        variance = xx - self.sum_x.pow(2).sum() / n
        return {"fvu": float(ee / variance), "l0": float(self.count.sum()) / n,
                "cosine": float(cosine) / n, "density": self.count / n,
                "dead": float((self.count == 0).double().mean()), "n_tokens": n}

@torch.no_grad()
def metrics(sae, x, batch=4096):
    """x (..., D) -> `Metrics.result`, `batch` tokens at a time."""
    total = Metrics()
    for part in x.reshape(-1, x.shape[-1]).split(batch):
        total.update(part, *sae.reconstruct(part))
    return total.result()

# ---- Files: sparsify's layout, with more fields.  Those of other projects: data/formats.py -----

LAYOUT = {                               # cfg.json, which also holds the settings of the variant
    "d_in": (int, 1, None, REQUIRED), "expansion_factor": (int, 0, None, 0),
    "num_latents": (int, 0, None, 0),    # 0, as in older files: d_in * expansion_factor
    "activation": (str, None, None, "topk"), "variant": (tuple(VARIANTS), None, None, "topk"),
    "meta": (dict, None, None, None),
    "over": (("token",), None, None, "token")      # of AbsTopK, once: "batch" computes otherwise
} | dict.fromkeys(("skip_connection", "transcode", "signed"), ((False,), None, None, False))
META = {"layer": (int, 0, None, None), "site": (str, None, None, None),
        "model": (str, None, None, None), "sink_norm": (float, 0, None, None)}

def sparsify_names(variant, normalize):
    """-> (activation, {our name: name in the file}).  Where sparsify would compute something else:
    an activation that it refuses, and our names, for its older versions ignore the activation."""
    if variant in ("topk", "gsae") and normalize == "none":
        return "topk", {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    return f"{variant}/{normalize}", {}                    # no name that sparsify knows

def save_sae(sae, directory):
    """Writes cfg.json and sae.safetensors.  sparsify itself loads TopK and g-SAE, unscaled."""
    activation, names = sparsify_names(sae.variant, sae.normalize)
    cfg = {"activation": activation, "expansion_factor": max(1, sae.n_latents // sae.d_in),
           "normalize_decoder": True, "num_latents": sae.n_latents, "multi_topk": False,
           "skip_connection": False, "transcode": False, "d_in": sae.d_in,
           "variant": sae.variant, **sae.hyper, "meta": sae.meta}
    tensors = {names.get(name, name): tensor for name, tensor in sae.state_dict().items()}
    write_sae(directory, "sae.safetensors", cfg, tensors)

def write_sae(directory, weights, cfg, tensors):
    """Writes cfg.json and `weights`, whole or not at all.  ValueError beside another's cfg.json."""
    directory = Path(directory)
    check((directory / weights).exists() or not (directory / "cfg.json").exists(),
          f"{directory}: its cfg.json belongs to other weights; name another directory")
    with staged(directory) as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            check(tensor.isfinite().all(), f"{directory} was not written: {name} is not finite")
        save_file(tensors, temporary / weights)
        (temporary / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")

def load_sae(directory_or_hub_id, hookpoint=None):
    """Our layout or sparsify's -> an SAE on the CPU, in at least fp32; errors name the file.
    hookpoint: the subfolder that holds it; DIRECTORY_OR_HUB_ID#HOOKPOINT means the same."""
    spec = f"{directory_or_hub_id}#{hookpoint}" if hookpoint else str(directory_or_hub_id)
    config = locate(spec) / "cfg.json"
    cfg = read_json(config)
    fields = read_fields(cfg, LAYOUT, config)
    variant, activation, d_in = fields["variant"], fields["activation"], fields["d_in"]
    known = VARIANTS[variant].defaults
    if "k" in known:                     # our default need not be what it was trained with
        read_fields(cfg, {"k": (int, 1, None, REQUIRED)}, config)
    hyper = {name: cfg[name] for name in known if name in cfg}
    wanted, names = sparsify_names(variant, (known | hyper)["normalize"])
    check(activation == wanted, f"{config}: activation {activation!r} should be {wanted!r}")
    n_latents = fields["num_latents"] or d_in * fields["expansion_factor"]      # F
    weights = config.with_name("sae.safetensors")
    idle = ["threshold"] if variant == "abstopk" else []      # its older files have one
    sae = read_sae(weights, variant, d_in, n_latents, hyper, names, idle)
    sae.meta = complete_meta(fields["meta"] or {}, spec)
    return sae

def complete_meta(meta, spec):
    """Checked; a folder's name, like layers.12.mlp, gives the layer and site it lacks."""
    read_fields(meta, META, f"{spec}: meta")
    place = find_place(re.split("[/#]", spec.rstrip("/"))[-1])
    return meta | {name: value for name, value in place.items() if meta.get(name) is None}

def check_site(sae, layer, site, other=False):
    """ValueError if the SAE was trained elsewhere, unless `other` places are allowed: it would
    reconstruct nothing."""
    for name, used in (("site", site), ("layer", layer)):
        trained, remedy = sae.meta.get(name), "--other-site allows that"
        if name == "layer" or trained in ("resid", "mlp"):
            remedy = f"pass --{name} {trained}, or --other-site"
        # Resa: the released `pretrained` arm used one so; --other-site restores that.
        check(other or trained in (None, used),
              f"the SAE was trained at {name} {trained}, not at {used}: {remedy}")

def introduce(sae, used):
    """Says which SAE this is, and whether it is of another model than `used`, or does not say."""
    trained, note = sae.meta.get("model"), ""
    if trained is None:
        note = f"; its files do not say of which model: it is used in {used}, as asked"
    elif base_name(trained) != base_name(used):
        note = f"; of another model: it is used in {used}, as asked"
    known = {name: value for name, value in sae.meta.items() if value is not None}
    place = f"layer {known.get('layer', 'unknown')}, site {known.get('site', 'unknown')}"
    if "unknown" in place:
        note += "; where they do not say, it is used at the layer and site of the settings"
    print(one_line(f"SAE of {trained or 'a model'}, {place}: {sae.variant}, "
                   f"{sae.n_latents:,} latents{note}"), file=sys.stderr)

# Modules of Hugging Face models, which name sparsify's folders, and hooks of TransformerLens; then
# what dictionary_learning writes.  Vision towers and encoders have layers, too, but not ours.
MODULE = (r"(?:(?:base_model|model|language_model|transformer|gpt_neox|decoder)\.)*"
          r"(?:layers|h|blocks)\.(?P<layer>\d{1,9})(?:\.(?P<site>.+))?")
SUBMODULE = (r"(?P<site>resid_pre|resid_post|resid_out|mlp_out|attention_out|attn_out)"
             r"_layer_?(?P<layer>\d{1,9})")
SITES = {None: "resid", "hook_resid_post": "resid", "hook_out": "resid", "resid_post": "resid",
         "resid_out": "resid", "mlp": "mlp", "hook_mlp_out": "mlp", "mlp.hook_out": "mlp",
         "mlp_out": "mlp"}

def find_place(name):
    """Another library's name of a place in a model -> {"layer": .., "site": ..}, {} if none known.
    A site that we do not have keeps its name: layers.3.self_attn is site self_attn of layer 3."""
    match = re.fullmatch(MODULE, name) or re.fullmatch(SUBMODULE, name)
    if not match:
        return {}
    layer, site = int(match["layer"]), match["site"]
    if site in ("hook_resid_pre", "hook_in", "resid_pre") and layer > 0:
        return {"layer": layer - 1, "site": "resid"}      # what enters a block left the one before
    return {"layer": layer, "site": SITES.get(site, site)}

@torch.no_grad()
def read_sae(weights, variant, d_in, n_latents, hyper, names, ignored=()):
    """An SAE with the tensors of a file.  Sizes are checked before memory is taken for them.
    names    {our name: name in the file, and .T behind it where it is stored transposed}
    ignored  names in the file that codes do not depend on"""
    hyper = resolve_hyper(variant, d_in, n_latents, hyper, f"{weights.parent}: {variant}")
    with open_tensors([weights]) as found:
        found = {name: part for name, part in found.items() if name not in ignored}
        check(2 * d_in * n_latents <= weights.stat().st_size,      # 2 bytes a number at least
              f"{weights}: too small for n_latents={n_latents}, d_in={d_in}")
        sae = VARIANTS[variant](d_in, n_latents, hyper)    # in fp32
        if "F64" in [part.get_dtype() for part in found.values() if part.get_shape()]:
            sae.double()                                   # a lone number does not decide
        targets = {}                     # name in the file -> the SAE's own tensor
        for ours, tensor in sae.state_dict().items():
            name = names.get(ours, ours)
            targets[name.removesuffix(".T")] = tensor.T if name.endswith(".T") else tensor
        check_tensors(found, targets, weights)             # from the header: reads no tensor
        for name, target in targets.items():
            dtypes = "F64 F32 F16 BF16" if target.is_floating_point() else "I64 I32"
            dtype = found[name].get_dtype()
            check(dtype in dtypes.split(), f"{weights}: {name!r} has dtype {dtype}")
            tensor = found[name][...]
            check(tensor.isfinite().all(), f"{weights}: {name!r} holds NaN or infinite values")
            target.copy_(tensor)                           # widened to its dtype
    check(0 <= getattr(sae, "n_atoms", 0) <= n_latents, f"{weights}: n_atoms is out of range")
    check(getattr(sae, "input_scale", 1) > 0, f"{weights}: input_scale is not above 0")
    return sae
