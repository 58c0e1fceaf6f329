"""Sparse autoencoders: the variants, their loss, the training step, the metrics and the files.

    python train.py --stage sae          trains one on a model's activations, writes out/tiny/sae
    python resa.py                       trains one, splices it, tunes through it, evaluates

TopK (arXiv 2406.04093), as SAE-Tuning uses it (arXiv 2506.09967, eq. 3-5).  Rows of W_dec, of unit
norm, are the dictionary:

    z     = TopK( ReLU( (x - b_dec) W_enc' + b_enc ) )
    x_hat = z W_dec + b_dec                                   e = x - x_hat
    loss  = sum e^2 / sum (x - mean x)^2  +  aux_coef AuxK    the first term is the FVU of the micro-batch

Dimensions: N tokens, D width (d_in), F latents (n_latents), K active (k).
"""
import difflib
import json
import math
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


def wide(t):
    """At least fp32: sums, norms and thresholds are never taken in half precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def nearest(name, names):
    """The one of `names` spelled most like `name`, for error messages."""
    return difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)[0]


# ----------------------------------------------------------------------------------------------------------
# Variants: how codes are chosen
# ----------------------------------------------------------------------------------------------------------

class Variant(NamedTuple):
    sparsify: Callable  # (sae, pre (..., F)) -> z (..., F)
    hyper: dict         # name -> default; every name becomes an attribute of the SAE


def keep_top(acts, k):
    """(..., F) -> (..., F): the k largest of each row stay where they are (k even on ties), the rest is 0."""
    values, index = acts.topk(k, dim=-1, sorted=False)        # (..., K)
    return torch.zeros_like(acts).scatter_(-1, index, values)


def topk(sae, pre):
    """ReLU first, so that a latent selected at zero carries no gradient: at most k latents fire."""
    return keep_top(pre.relu(), sae.k)


VARIANTS = {
    # aux_coef 0: no AuxK, as published.  k_aux None: d_in // 2.  dead_after: tokens.  seed: of the init.
    "topk": Variant(topk, dict(k=32, aux_coef=0.0, k_aux=None, multi_topk=False, dead_after=10**7, seed=0)),
}


# ----------------------------------------------------------------------------------------------------------
# The SAE: encode, decode, loss
# ----------------------------------------------------------------------------------------------------------

class SAE(nn.Module):
    """Made by `build` or `load_sae`. `meta` says where it belongs (site, layer, model, dtype, data, ...)."""

    def __init__(self, variant, d_in, n_latents, hyper):
        super().__init__()
        self.variant, self.d_in, self.n_latents, self.meta = variant, d_in, n_latents, {}
        for name, value in hyper.items():
            setattr(self, name, value)
        self.W_enc = nn.Parameter(torch.empty(n_latents, d_in))
        self.b_enc = nn.Parameter(torch.empty(n_latents))
        self.W_dec = nn.Parameter(torch.empty(n_latents, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(n_latents, dtype=torch.int64))

    @property
    def hyper(self):
        return {name: getattr(self, name) for name in VARIANTS[self.variant].hyper}

    @property
    def dead(self):
        """(F,) bool: latents that have not fired for more than `dead_after` training tokens."""
        return self.tokens_since_fired > self.dead_after

    def preacts(self, x):
        """(..., D) -> (..., F): before ReLU and selection, in the weights' dtype. The input is left alone."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"the SAE reads width {self.d_in}, the activations have {x.shape[-1]}")
        return nn.functional.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x):
        """(..., D) -> (..., F): the codes at inference, dense, in the weights' dtype."""
        return VARIANTS[self.variant].sparsify(self, self.preacts(x))

    def decode(self, z):
        """(..., F) -> (..., D)"""
        return z @ self.W_dec + self.b_dec

    def forward(self, x):
        """(..., D) -> (..., D): the reconstruction, in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)

    def loss(self, x):
        """(..., D) -> (total, parts): the training loss of one micro-batch of at least two tokens.

        parts are detached and stay on the device: fvu, l0 (active latents a token), aux (unweighted),
        multi (with multi_topk) and fired (F,) bool."""
        x = x.reshape(-1, x.shape[-1])                                     # (N, D)
        if len(x) < 2:
            raise ValueError("a micro-batch needs at least 2 tokens: the FVU divides by its variance")
        pre = self.preacts(x)                                              # (N, F)
        z = VARIANTS[self.variant].sparsify(self, pre)                     # (N, F)
        x = wide(x)
        variance = (x - x.mean(0)).pow(2).sum()
        e = x - wide(self.decode(z))                                       # (N, D)
        total = fvu = e.pow(2).sum() / variance
        fired = z != 0                                                     # (N, F)
        parts = {"fvu": fvu, "l0": fired.sum(-1).float().mean(), "aux": torch.zeros_like(fvu)}
        if self.aux_coef:
            parts["aux"] = self.aux_k(pre, e.detach())
            total = total + self.aux_coef * parts["aux"]
        if self.multi_topk:  # a second, wider code keeps the dictionary usable when k changes later
            wider = keep_top(pre.relu(), 4 * self.k)
            parts["multi"] = (x - wide(self.decode(wider))).pow(2).sum() / variance
            total = total + parts["multi"] / 8
        return total, {**{name: part.detach() for name, part in parts.items()}, "fired": fired.any(0)}

    def aux_k(self, pre, e):
        """(N, F), detached residual (N, D) -> scalar: AuxK (arXiv 2406.04093), how badly the dead explain e.

        The top k_aux dead latents rebuild e, without b_dec, which e no longer contains. Divided by the
        variance of e as in that paper's code (sparsify divides by the variance of x), times
        min(n_dead / k_aux, 1) as in sparsify, so that a few dead latents do not shout."""
        z = keep_top(pre.relu() * self.dead, self.k_aux)                   # (N, F), zeros where few are dead
        e_hat = wide(z @ self.W_dec)                                       # (N, D)
        variance = (e - e.mean(0)).pow(2).sum()
        ratio = (e - e_hat).pow(2).sum() / variance.clamp_min(torch.finfo(e.dtype).tiny)
        few = (self.dead.to(e.dtype).sum() / self.k_aux).clamp(max=1)
        return few * torch.where(variance > 0, ratio, 0.0)  # an exact fit leaves nothing to explain

    @torch.no_grad()
    def project_grad_(self):
        """Removes from each decoder row's gradient what only changes its length, which is held at 1."""
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)        # (F, 1)
        self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def unit_rows_(self):
        """Decoder rows to unit norm. `train_step` keeps them there; call it once on a loaded SAE to tune."""
        self.W_dec.copy_(nn.functional.normalize(wide(self.W_dec), dim=1))


# ----------------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------------

def resolve_hyper(variant, d_in, n_latents, given):
    """Defaults, then `given`, all checked. ValueError names the setting, its value and what it may be."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; the nearest is {nearest(variant, VARIANTS)!r}")
    defaults = VARIANTS[variant].hyper
    for name in given:
        if name not in defaults:
            raise ValueError(f"{variant} has no setting {name!r}; the nearest is {nearest(name, defaults)!r}")
    for name, value in (("d_in", d_in), ("n_latents", n_latents)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    hyper = {**defaults, **given}
    if hyper["k_aux"] is None:  # half the width: arXiv 2406.04093, appendix B.1
        hyper["k_aux"] = max(1, min(d_in // 2, n_latents))
    bounds = {"k": (1, n_latents // 4 if hyper["multi_topk"] else n_latents),  # Multi-TopK keeps 4 k
              "k_aux": (1, n_latents), "multi_topk": (False, True), "aux_coef": (0.0, 1e9),
              "dead_after": (1, 2**62), "seed": (0, 2**62)}
    for name, value in hyper.items():
        low, high = bounds[name]
        if isinstance(low, float) and type(value) is int:
            value = hyper[name] = float(value)
        if type(value) is not type(low) or not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be {type(low).__name__}, from {low} to {high}, "
                             f"for n_latents={n_latents} and multi_topk={hyper['multi_topk']}")
    return hyper


def build(variant, d_in, n_latents, **hyper):
    """A fresh SAE in fp32 on the CPU; `VARIANTS[variant].hyper` lists what `hyper` may hold.

    Initialised as sparsify does it: encoder as nn.Linear, decoder its copy with rows of unit norm (so
    encoder rows are parallel to them, about 0.58 long), biases zero; then see `init_b_dec`."""
    sae = SAE(variant, d_in, n_latents, resolve_hyper(variant, d_in, n_latents, hyper))
    rng = torch.Generator().manual_seed(sae.seed)
    with torch.no_grad():
        sae.W_enc.uniform_(-d_in**-0.5, d_in**-0.5, generator=rng)
        sae.W_dec.copy_(sae.W_enc)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.unit_rows_()
    return sae


@torch.no_grad()
def init_b_dec(sae, x):
    """Sets b_dec to the mean of x (..., D), so that the first codes describe what differs between tokens.

    Resa: does this on the first batch even when it fine-tunes; for its behaviour call it there too."""
    sae.b_dec.copy_(wide(x.reshape(-1, x.shape[-1])).mean(0))


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

    Only z is stored; x is read back from y and z, so a rescaled decoder row moves x with it, as in the
    published code."""

    def __init__(self, sae, lr, momentum=0.95):
        super().__init__(sae.parameters(), dict(lr=lr, momentum=momentum, steps=0))
        self.sae = sae

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for y in group["params"]:
                if "z" not in self.state[y]:
                    self.state[y]["z"] = y.clone()
                z, x = self.state[y]["z"], self.mean_of(y, group)
                z.add_(y.grad.sign(), alpha=-group["lr"])
                x.lerp_(z, 1 / (group["steps"] + 1))
                y.copy_(x.lerp_(z, 1 - group["momentum"]))
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
                self.sae.unit_rows_()
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
    return Signum(sae, lr) if name == "signum" else torch.optim.Adam(sae.parameters(), lr=lr)


# ----------------------------------------------------------------------------------------------------------
# The training step
# ----------------------------------------------------------------------------------------------------------

def train_step(sae, optimizer, xs):
    """One step of any variant on micro-batches xs: list of (N_i, D), each weighing the same -> parts.

    parts: those of `SAE.loss`, averaged over xs (fired: any), and "loss". Nothing waits for the device."""
    optimizer.zero_grad()
    seen = []
    for x in xs:
        total, parts = sae.loss(x)
        (total / len(xs)).backward()
        seen.append({"loss": total.detach(), **parts})
    sae.project_grad_()
    optimizer.step()
    sae.unit_rows_()
    parts = {name: torch.stack([p[name] for p in seen]) for name in seen[0]}      # (len(xs), ...)
    parts = {name: v.any(0) if name == "fired" else v.mean(0) for name, v in parts.items()}
    tokens = sum(x.numel() // sae.d_in for x in xs)  # the counter is in tokens, never in steps
    sae.tokens_since_fired.add_(tokens).masked_fill_(parts["fired"], 0)
    return parts


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------

class Metrics:
    """Sums in fp64 over everything shown to `update`; `result` does not depend on how it was cut up."""

    def __init__(self):
        self.n_tokens, self.sums, self.sum_x, self.count = 0, 0, 0, 0

    @torch.no_grad()
    def update(self, x, x_hat, z):
        """(..., D), (..., D), (..., F). Leave out tokens that should not count before calling."""
        x, x_hat, z = (t.reshape(-1, t.shape[-1]) for t in (x, x_hat, z))
        x, x_hat = x.double(), x_hat.double()
        xx, hh, xh = (x * x).sum(1), (x_hat * x_hat).sum(1), (x * x_hat).sum(1)   # (N,)
        ee = (x - x_hat).pow(2).sum(1)
        tiny = torch.finfo(torch.float64).tiny  # a token of zeros contributes 0 or a visible absurdity
        cosine, l2_ratio = xh / (xx * hh).sqrt().clamp_min(tiny), (hh / xx.clamp_min(tiny)).sqrt()
        rows = torch.stack([ee, xx, ee / xx.clamp_min(tiny), cosine, l2_ratio])   # (5, N)
        self.sums, self.sum_x = self.sums + rows.sum(1), self.sum_x + x.sum(0)    # (5,), (D,)
        self.count = self.count + (z != 0).sum(0)                                 # (F,)
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
        z = sae.encode(part)
        total.update(part, sae.decode(z), z)
    return total.result()


# ----------------------------------------------------------------------------------------------------------
# Files: sparsify's layout
# ----------------------------------------------------------------------------------------------------------

TENSORS = {"encoder.weight": ("W_enc", "FD"), "encoder.bias": ("b_enc", "F"),  # name here, dimensions
           "W_dec": ("W_dec", "FD"), "b_dec": ("b_dec", "D")}
SPARSIFY_KEYS = ["activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
                 "skip_connection", "transcode", "d_in", "signed"]


def save_sae(sae, directory):
    """Writes cfg.json and sae.safetensors; sparsify's own loader reads them too and drops our extra keys.

    An interrupted save never leaves old settings beside new weights: both files are written under
    temporary names; then the old cfg.json goes, for without one a directory does not load; then both
    take their names."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    cfg = {"activation": sae.variant, "expansion_factor": max(1, sae.n_latents // sae.d_in),
           "normalize_decoder": True, "num_latents": sae.n_latents, "skip_connection": False,
           "transcode": False, "d_in": sae.d_in, "variant": sae.variant, **sae.hyper, "meta": sae.meta}
    text = json.dumps(cfg, indent=2) + "\n"  # before any file is touched: meta may not be JSON
    weights, config = directory / "sae.safetensors", directory / "cfg.json"
    new_weights, new_config = directory / "sae.safetensors.tmp", directory / "cfg.json.tmp"
    tensors = {key: getattr(sae, name).detach().cpu().contiguous() for key, (name, _) in TENSORS.items()}
    save_file(tensors, new_weights)
    new_config.write_text(text, encoding="utf-8")
    config.unlink(missing_ok=True)
    os.replace(new_weights, weights)
    os.replace(new_config, config)


def load_sae(directory_or_hub_id, hookpoint=None):
    """An SAE from a directory or hub repository in sparsify's layout, in the dtype of its file, on the CPU.

    hookpoint: the sub-directory that holds it ("layers.12.mlp"). ValueError names the file and what is
    wrong with it; FileNotFoundError when there is none, or the hub cannot be reached."""
    folder = find_folder(str(directory_or_hub_id), hookpoint)
    variant, d_in, n_latents, hyper, meta = read_config(folder / "cfg.json")
    weights = read_weights(folder / "sae.safetensors", {"D": d_in, "F": n_latents})
    sae = SAE(variant, d_in, n_latents, hyper)
    sae.meta = meta
    for key, (name, _) in TENSORS.items():
        setattr(sae, name, nn.Parameter(weights[key]))
    return sae


def find_folder(spec, hookpoint):
    """The directory with cfg.json: `spec`, or its sub-directory `hookpoint`, here or on the hub."""
    if hookpoint and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", hookpoint):
        raise ValueError(f"hookpoint {hookpoint!r} must be a path inside {spec}, like layers.12.mlp")
    root = Path(spec) if Path(spec).is_dir() else fetch(spec, hookpoint)
    folder = root / (hookpoint or "")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"hookpoint {hookpoint!r} leads out of {spec}")
    if not (folder / "cfg.json").is_file():
        found = sorted(path.parent.name for path in root.glob("*/cfg.json")) or ["layers.12.mlp"]
        raise FileNotFoundError(f"{folder}: no cfg.json there; name a hookpoint of {spec} that has one, "
                                f"like {', '.join(found[:30])}")
    return folder


def fetch(repo, hookpoint):
    """The local copy of a hub repository, of `hookpoint` alone where one is given."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{repo}: no such directory, nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    try:
        wanted = [f"{hookpoint}/*"] if hookpoint else ["cfg.json", "sae.safetensors"]
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as err:  # whatever the network, the proxy or the hub may raise, the user needs one line
        raise FileNotFoundError(f"{repo}: no such directory, and the hub did not give it "
                                f"({type(err).__name__}); check the name, or go online once") from err


def read_config(path):
    """cfg.json, ours or sparsify's -> (variant, d_in, n_latents, hyper, meta)."""
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: not JSON ({err})") from None
    if not isinstance(cfg, dict) or not isinstance(cfg.get("meta", {}), dict):
        raise ValueError(f"{path}: the file, and its \"meta\", must each be a JSON object")
    for key in ("skip_connection", "transcode", "signed"):
        if cfg.get(key):
            raise ValueError(f"{path}: {key} is true; only plain autoencoders with codes >= 0 are read here")
    activation = cfg.get("activation", "topk")  # files from before there was a choice lack it
    variant = cfg.get("variant", activation)
    if activation != variant:
        raise ValueError(f"{path}: activation {activation!r} and variant {variant!r} contradict each other")
    for key in ("d_in", "k"):
        if key not in cfg:
            raise ValueError(f"{path}: no {key!r}")
    try:
        n_latents = cfg.get("num_latents") or cfg["d_in"] * cfg.get("expansion_factor", 0)
        known = VARIANTS[variant].hyper if variant in VARIANTS else {}
        hyper = resolve_hyper(variant, cfg["d_in"], n_latents, {key: cfg[key] for key in known if key in cfg})
    except (ValueError, TypeError) as err:
        raise ValueError(f"{path}: {err}") from None
    unknown = sorted(set(cfg) - set(SPARSIFY_KEYS) - set(known) - {"variant", "meta"})
    if unknown:
        warnings.warn(f"{path}: ignored unknown keys {', '.join(unknown)}")
    return variant, cfg["d_in"], n_latents, hyper, cfg.get("meta", {})


def read_weights(path, size):
    """sae.safetensors, size {"D": .., "F": ..} -> {key: tensor}; the header is checked before any is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = {key: file.get_slice(key) for key in file.keys()}
            for key in sorted(TENSORS.keys() ^ header.keys()):
                fault = "not expected" if key in header else "missing"
                raise ValueError(f"{path}: tensor {key!r} is {fault}")
            for key, (_, dims) in TENSORS.items():
                shape, want = tuple(header[key].get_shape()), tuple(size[d] for d in dims)
                if shape != want:
                    raise ValueError(f"{path}: tensor {key!r} has shape {shape}, cfg.json says {want}")
            dtypes = {part.get_dtype() for part in header.values()}
            if len(dtypes) > 1 or not dtypes <= {"F64", "F32", "F16", "BF16"}:
                raise ValueError(f"{path}: dtypes {sorted(dtypes)}, expected one floating-point dtype")
            tensors = {key: file.get_tensor(key) for key in TENSORS}
    except SafetensorError as err:
        raise ValueError(f"{path}: not a whole safetensors file ({err})") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {key!r} holds NaN or infinite values")
    return tensors
