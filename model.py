"""Qwen2 and Qwen2-MoE as Hugging Face defines them: config, blocks, checkpoints, tokenizer, sampling.

    model, tok = load_model("data/tiny/distill"), load_tokenizer("data/tiny/distill")
    generate(model, [tok.encode(tok.chat([{"role": "user", "content": "..."}]))], max_new_tokens=96)

A model is named by a spec:  PATH_OR_HUB_ID[@REVISION][#SUBFOLDER][+ADAPTER[*FACTOR] ...]  or  random:CONFIG.json[@SEED]
FACTOR multiplies the adapter's own scale, alpha / r: BASE+ADAPTER*0.5 goes half the way, a negative one goes back.
Architecture: Qwen2 (arXiv 2407.10671) = pre-norm decoder, grouped-query attention with biases on q, k, v,
rotary positions (arXiv 2104.09864), SwiGLU, RMSNorm; in Qwen2-MoE a block has many small MLPs, of which each
token uses a few.  Parameter names are those of the checkpoints, so that loading is an identity map (but for the
experts, which are stacked).  R1-Distill-Qwen models (arXiv 2501.12948) are this architecture.

Letters in shape comments: B batch rows, T tokens, D width, H query heads, G key/value heads, C head width,
V vocabulary, S slots of the sampler, L cached length, N = B*T tokens, E experts, K experts a token, M their width.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import InitVar, asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


# ----------------------------------------------------------------------------------------------------------
# config.json: every field is used, known to be harmless, or refused by name
# ----------------------------------------------------------------------------------------------------------

# Fields that do not change what the forward pass computes.  Sliding-window sizes matter only with
# use_sliding_window, which is refused below; published Qwen2 configs carry the sizes all the same.
HARMLESS = """architectures transformers_version torch_dtype dtype use_cache initializer_range
    _name_or_path _attn_implementation_autoset return_dict sliding_window max_window_layers qkv_bias
    max_position_embeddings model_type hidden_act rope_theta rope_scaling rope_parameters layer_types
    output_router_logits router_aux_loss_coef""".split()
# Fields that only Qwen2-MoE has; the first four are sizes that it cannot be without.
MOE_FIELDS = """num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
    decoder_sparse_step norm_topk_prob mlp_only_layers""".split()


@dataclass
class Config:
    """A Qwen2 or Qwen2-MoE architecture; names and defaults are those of Hugging Face's configurations."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0              # 0: as many as query heads
    head_dim: int = 0                         # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    num_experts: int = 0                      # 0: dense Qwen2, and nothing below matters
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0            # width of one expert
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False              # whether the weights of the chosen experts are made to sum to 1
    decoder_sparse_step: int = 1
    mlp_only_layers: list = field(default_factory=list)
    where: InitVar[str] = "config.json"                        # what errors should name

    def __post_init__(self, where):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{where}: {self.num_attention_heads} query heads cannot share "
                             f"{self.num_key_value_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"{where}: head_dim {self.head_dim} is odd; rotary positions need pairs")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"{where}: num_experts_per_tok {self.num_experts_per_tok} of {self.num_experts} experts")

    def is_sparse(self, layer):
        """Whether block `layer`, counted from 0, has experts; both conditions, as Hugging Face computes it."""
        return (self.num_experts > 0 and layer not in self.mlp_only_layers
                and (layer + 1) % self.decoder_sparse_step == 0)

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """The Config of a parsed config.json.  ValueError names the field that is missing or not understood."""
        refuse_unsupported(raw, where)
        ours = set(cls.__dataclass_fields__) - {"where"}
        known = {k: v for k, v in raw.items() if k in ours and v is not None}
        theta = (raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta")
        known["rope_theta"] = 1e4 if theta is None else theta
        known["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += MOE_FIELDS[:4] if raw.get("model_type") == "qwen2_moe" else []
        for name in sizes + ["num_key_value_heads", "head_dim", "decoder_sparse_step"]:
            if (name in sizes or name in known) and (type(known.get(name)) is not int or known[name] < 1):
                raise ValueError(f"{where}: {name!r} should be a positive integer, it is {raw.get(name)!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            if name in known and (type(known[name]) not in (int, float) or not known[name] > 0):
                raise ValueError(f"{where}: {name!r} should be a positive number, it is {known[name]!r}")
        for name in ("tie_word_embeddings", "norm_topk_prob"):
            if not isinstance(known.get(name, False), bool):
                raise ValueError(f"{where}: {name!r} should be true or false, it is {raw[name]!r}")
        only = known.get("mlp_only_layers", [])
        if not isinstance(only, list) or not all(type(layer) is int for layer in only):
            raise ValueError(f"{where}: 'mlp_only_layers' should be a list of blocks, it is {only!r}")
        if not isinstance(known["dtype"], str) or known["dtype"] not in DTYPES:
            raise ValueError(f"{where}: torch_dtype {known['dtype']!r} is not one of {', '.join(DTYPES)}")
        return cls(**known, where=where)

    @classmethod
    def from_pretrained(cls, spec):
        """The Config of a model spec (a directory, a hub id, or random:CONFIG.json)."""
        path = config_path(spec)
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self):
        """The config.json that `transformers` reads."""
        own = {k: v for k, v in asdict(self).items() if v is not None}
        own["torch_dtype"] = own.pop("dtype")          # the name that old and new releases both read
        kind, name = ("qwen2_moe", "Qwen2Moe") if self.num_experts else ("qwen2", "Qwen2")
        own = {k: v for k, v in own.items() if self.num_experts or k not in MOE_FIELDS}
        return {"architectures": [f"{name}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
                "use_sliding_window": False} | own


def refuse_unsupported(raw, where):
    """ValueError if config.json asks for anything this file does not compute."""
    kind = raw.get("model_type", "qwen2")
    if kind not in ("qwen2", "qwen2_moe"):
        raise ValueError(f"{where}: model_type {kind!r} is not supported, only 'qwen2' and 'qwen2_moe'")
    if not raw.get("qkv_bias", True):
        raise ValueError(f"{where}: qkv_bias = {raw['qkv_bias']!r} is not supported, q, k and v have one")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"{where}: {name} should be an object, it is {raw[name]!r}")
        rope = (raw.get(name) or {}).get("rope_type", (raw.get(name) or {}).get("type", "default"))
        if rope != "default":
            raise ValueError(f"{where}: {name} of type {rope!r} is not supported; it would change every position")
    if any(layer != "full_attention" for layer in raw.get("layer_types") or []):
        raise ValueError(f"{where}: layer_types other than 'full_attention' are not supported")
    known = {*Config.__dataclass_fields__, *HARMLESS} - set(MOE_FIELDS if kind == "qwen2" else ())
    for name, value in raw.items():      # whatever is left may be present as long as it is switched off
        if name not in known and value:
            raise ValueError(f"{where}: field {name!r} = {value!r} is not understood, so it is not ignored either")


# ----------------------------------------------------------------------------------------------------------
# Blocks, leaf to root
# ----------------------------------------------------------------------------------------------------------

def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        # Hugging Face squares and averages in fp32 and multiplies by the weight after the cast back.
        y = at_least_fp32(x)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_table(config, positions):
    """positions (B,T) int -> cos, sin (B,1,T,C), fp32: angle of pair i at position t is t / theta^(2i/C)."""
    C = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, C, 2, device=positions.device).float() / C)   # (C/2,)
    angle = positions[:, None, :, None].float() * inv_freq                                             # (B,1,T,C/2)
    angle = torch.cat((angle, angle), dim=-1)                                                          # (B,1,T,C)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates the pairs (i, i + C/2) of x (B,H,T,C); in fp32, since bf16 angles lose whole positions."""
    y = at_least_fp32(x)
    left, right = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.G, self.C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.H * self.C)
        self.k_proj = nn.Linear(config.hidden_size, self.G * self.C)
        self.v_proj = nn.Linear(config.hidden_size, self.G * self.C)
        self.o_proj = nn.Linear(self.H * self.C, config.hidden_size, bias=False)

    def forward(self, x, rope, mask, cache, layer):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.C).transpose(1, 2)                    # (B,H|G,T,C)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.put(layer, k, v)                                            # (B,G,L,C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.H != self.G)              # (B,H,T,C)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.C))


class MLP(nn.Module):
    def __init__(self, D, M):
        super().__init__()
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which K of the E experts a token uses, and with what weight."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x):
        return self.choose(F.linear(x, self.weight))

    def choose(self, logits):
        """logits (N,E) -> weights (N,K) in their dtype, experts (N,K) int64, the heaviest first."""
        weight, expert = at_least_fp32(logits).softmax(-1).topk(self.top_k)         # softmax over all E, then K of it
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight.to(logits.dtype), expert


class Experts(nn.Module):
    """E MLPs, stacked.  Each runs once, on all the tokens that chose it."""

    def __init__(self, config):
        super().__init__()
        E, M, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * M, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, M))

    def forward(self, x, weight, expert):
        N, K = expert.shape
        order = expert.flatten().argsort(stable=True)                                # (N*K,) pairs, by expert
        groups = x[order // K].split(expert.flatten().bincount(minlength=len(self.down_proj)).tolist())
        out = []
        for rows, gate_up, down in zip(groups, self.gate_up_proj.unbind(), self.down_proj.unbind()):
            if len(rows):
                gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)                  # (rows,M) each
                out.append(F.linear(F.silu(gate) * up, down))
        y = torch.cat(out)[order.argsort()].view(N, K, -1)                           # (N,K,D) back in place
        return (y * weight[..., None]).sum(1)


class MoE(nn.Module):
    """Mixture of experts: those the router chose, and one that all tokens share, behind a gate of its own."""

    def __init__(self, config):
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x):
        rows = x.flatten(0, -2)                                                      # (N,D)
        shared = self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        return (self.experts(rows, *self.gate(rows)) + shared).view(x.shape)


class Block(nn.Module):
    """One decoder layer.  Its output is the hook site `resid`, the output of its MLP the hook site `mlp`."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if config.is_sparse(layer) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h, rope, mask, cache, layer):
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache, layer)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Qwen2ForCausalLM or Qwen2MoeForCausalLM: ids (B,T) int64 -> logits (B,T,V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.source = None            # directory it was loaded from: its tokenizer travels with a save

    def forward(self, ids, mask=None):
        return self.head(self.run(ids, mask=mask))

    def head(self, h):
        """h (B,T,D), the output of the last block -> logits (B,T,V)."""
        return self.lm_head(self.model.norm(h))

    def run(self, x, start=0, stop=None, mask=None, cache=None):
        """Blocks start .. stop-1 (all of them by default) -> hidden states (B,T,D) after the last one run.

        x      ids (B,T) when start is 0, else the hidden states (B,T,D) that block `start` would see
        mask   (B,T), nonzero at real tokens: padding may stand on either side; outputs there mean nothing
        cache  a Cache: x is what follows the cached tokens
        Stopping early and starting late is what lets an SAE see a layer without paying for those above
        it, and a teacher and a student share the blocks that they have in common.
        """
        layers = self.model.layers
        stop = len(layers) if stop is None else stop
        h = self.model.embed_tokens(x) if start == 0 else x                          # (B,T,D)
        B, T = h.shape[:2]
        positions = cache.positions if cache is not None else torch.arange(T, device=h.device).expand(B, T)
        attend = cache.mask if cache is not None else None
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            causal = torch.ones(T, T, dtype=torch.bool, device=h.device).tril()
            attend = causal & mask.bool()[:, None, None, :]                          # (B,1,T,T)
            attend = attend | torch.eye(T, dtype=torch.bool, device=h.device)        # no empty softmax at a pad
        rope = rope_table(self.config, positions)
        for i in range(start, stop):
            h = layers[i](h, rope, attend, cache, i)
        return h


@torch.no_grad()
def init_weights(model, seed=0, std=0.02):
    """Hugging Face's initialisation: normal(0, std) matrices, zero biases, unit norms; in place, seeded."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.fill_(1.0 if "norm" in name else 0.0)
    return model


# ----------------------------------------------------------------------------------------------------------
# Files: specs, checkpoints, PEFT adapters
# ----------------------------------------------------------------------------------------------------------

def read_json(path):
    """A parsed JSON object; ValueError or FileNotFoundError in one line that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, this is a {type(value).__name__}")
    return value


@contextlib.contextmanager
def staged(directory):
    """A temporary sibling to write in; its files move into `directory` only if the block ends well.

    Each file is renamed, never written in place, and .json comes last: whoever reads finds either the
    old files or the new ones, and a first save that was interrupted leaves nothing that would load.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda p: (p.suffix == ".json", p.name)):
            path.chmod(0o644)                        # save_file leaves 0600, unreadable to a colleague
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def split_spec(spec):
    """'base@rev#sub+adapter*0.5' -> ('base@rev#sub', [('adapter', 0.5), ...]).  An existing path is taken as it is.

    ValueError: what follows '*' is not a finite number.
    """
    spec = str(spec)
    if not spec or Path(spec).exists():
        return spec, []
    base, *adapters = spec.split("+")
    return base, [split_factor(adapter) for adapter in adapters]


def split_factor(adapter):
    """'adapter*0.5' -> ('adapter', 0.5); without a factor it is 1."""
    name, star, factor = adapter.rpartition("*")
    if not (name if star else adapter):
        raise ValueError(f"+{adapter}: no adapter is named after '+'")
    if not star or Path(adapter).exists():
        return adapter, 1.0
    try:
        if math.isfinite(float(factor)):
            return name, float(factor)
    except ValueError:
        pass
    raise ValueError(f"{adapter}: a finite number was expected after '*', not {factor!r}")


def locate(spec):
    """The local directory of PATH_OR_HUB_ID[@REVISION][#SUBFOLDER]; hub ids are fetched once and cached."""
    if Path(spec).is_dir():
        return Path(spec)
    match = re.fullmatch(r"([^@#]+)(?:@([^#]+))?(?:#(.+))?", spec)
    if not match:
        raise ValueError(f"{spec}: not of the form PATH_OR_HUB_ID[@REVISION][#SUBFOLDER]")
    name, revision, subfolder = match.groups()
    root = Path(name)
    if not root.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")) or len(root.parts) != 2:
            raise FileNotFoundError(f"{spec}: no such directory (and not a hub id of the form owner/name)")
        root = fetch(name, revision, subfolder)
    elif revision:
        raise ValueError(f"{spec}: a revision needs a hub id, {name} is a local directory")
    path = (root / (subfolder or ".")).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{spec}: the subfolder leads out of {root}")
    if not path.is_dir():
        raise FileNotFoundError(f"{spec}: no folder {subfolder!r} there")
    return path


def fetch(repo, revision=None, subfolder=None):
    """Downloads a hub repository (weights, json, templates; never a pickle); FileNotFoundError if it cannot."""
    from huggingface_hub import snapshot_download
    folder = f"{subfolder}/" if subfolder else ""
    patterns = [f"{folder}{p}" for p in ("*.json", "*.safetensors", "*.jinja")]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns,
                                      ignore_patterns=f"{folder}*/*"))      # '*' crosses '/': keep subfolders out
    except Exception as error:      # the hub client raises a dozen kinds; all of them mean the same here
        raise FileNotFoundError(f"{repo}: no local directory of that name, and the hub did not give it "
                                f"({type(error).__name__}); offline, download it and pass its path") from None


def config_path(spec):
    base, _ = split_spec(spec)
    if base.startswith("random:"):
        return Path(base.removeprefix("random:").split("@")[0])
    return locate(base) / "config.json"


def weight_files(directory):
    """The safetensors files of a checkpoint: single, or named by its sharded index."""
    index, names = directory / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists() and not (directory / "model.safetensors").exists():      # as transformers: a single file first
        places = read_json(index).get("weight_map")
        if not places or not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise ValueError(f"{index}: 'weight_map' should say which file holds which tensor")
        names = set(places.values())
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: file name {name!r} leads out of the directory")
        if not (directory / name).exists():
            pickles = [p.name for p in directory.glob("*.bin")]
            raise FileNotFoundError(f"{directory / name}: no such file" + (
                f" ({pickles[0]} is a pickle, which is never loaded: convert it to safetensors)" if pickles else ""))
    return [directory / name for name in sorted(names)]


@contextlib.contextmanager
def open_tensors(paths):
    """Memory-mapped safetensors files -> {name: lazy slice}; a damaged file is named in one line."""
    with contextlib.ExitStack() as stack:
        slices = {}
        for path in paths:
            try:
                handle = stack.enter_context(safe_open(str(path), framework="pt"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: no such file") from None
            except Exception as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
            slices |= {name: handle.get_slice(name) for name in handle.keys()}
        yield slices


def check_tensors(found, wanted, where):
    """ValueError naming every missing, extra or mis-shaped tensor; only headers are read, nothing is allocated."""
    wrong = [f"missing {n}" for n in wanted if n not in found] + [f"unexpected {n}" for n in found if n not in wanted]
    wrong += [f"{n} has shape {tuple(found[n].get_shape())}, the config needs {tuple(wanted[n].shape)}"
              for n in wanted if n in found and tuple(found[n].get_shape()) != tuple(wanted[n].shape)]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")


def load_model(spec, dtype=None, device=None):
    """The Transformer that a spec names, in eval mode, adapters merged.

    dtype  a torch dtype or its name; None keeps the checkpoint's.   device  None: the CPU
    FileNotFoundError: nothing there; ValueError: names the field or tensor that does not fit.
    """
    base, adapters = split_spec(spec)
    config = Config.from_pretrained(base)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
        if config.dtype not in DTYPES:
            raise ValueError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    with torch.device("meta"):                       # shapes without memory
        model = Transformer(config)
    if base.startswith("random:"):
        seed = base.partition("@")[2] or "0"
        if not seed.isdecimal():
            raise ValueError(f"{base}: the seed after '@' should be a whole number, it is {seed!r}")
        model = init_weights(model.to_empty(device="cpu").float(), int(seed)).to(device, DTYPES[config.dtype])
        model.source = config_path(base).parent
    else:
        model.source = locate(base)
        load_weights(model, model.source, DTYPES[config.dtype], device)
    if config.tie_word_embeddings:                   # replacing the meta parameters has cut the tie
        model.lm_head.weight = model.model.embed_tokens.weight
    for adapter, factor in adapters:
        merge_tensors(model, read_adapter(adapter), adapter, factor)
    return model.eval().requires_grad_(False)


def load_weights(model, directory, dtype, device=None):
    """Fills a meta-device model from a checkpoint directory: strict, memory-mapped, one tensor at a time."""
    parameters = list(model.named_parameters())      # a tied head appears once, as the embedding
    with open_tensors(weight_files(directory)) as found:
        found = {n: s for n, s in found.items() if not n.endswith("rotary_emb.inv_freq")}    # old, derivable
        tied = found.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
        stored = lambda name, p: {name: p} if name in found else unstacked(name, p)
        check_tensors(found, {n: view for name, p in parameters for n, view in stored(name, p).items()}, directory)
        for name, p in parameters:
            tensor = torch.empty(p.shape, dtype=dtype, device=device or "cpu")
            for n, view in stored(name, tensor).items():
                view.copy_(found[n][:])
            set_parameter(model, name, tensor)
        embedding = model.model.embed_tokens.weight
        if tied is not None and not torch.equal(tied[:].to(device=device, dtype=dtype), embedding):
            raise ValueError(f"{directory}: tie_word_embeddings is true, yet lm_head.weight is not the embedding")


def unstacked(name, p):
    """A parameter as published checkpoints hold it, {name: view}: three matrices an expert, all others as here.

    transformers writes experts like this and reads them like this or stacked; so do we.
    """
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith(".experts"):
        return {name: p}
    leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[leaf]
    return {f"{stem}.{e}.{n}.weight": view for e, one in enumerate(p)
            for n, view in zip(leaves, one.chunk(len(leaves)))}


def set_parameter(model, name, tensor):
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


def save_model(model, directory):
    """Writes a directory that `transformers` loads: config, weights, and the tokenizer it was loaded with."""
    state = model.state_dict()
    if any("lora_" in name for name in state):
        raise ValueError("the model has LoRA adapters attached: merge them, or save them as an adapter")
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.config.dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    with staged(directory) as temporary:
        state = {n: t.contiguous().cpu() for name, p in state.items() for n, t in unstacked(name, p).items()}
        save_file(state, temporary / "model.safetensors", {"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if model.source is not None and (Path(model.source) / name).exists():
                shutil.copyfile(Path(model.source) / name, temporary / name)


# What PEFT can put into adapter_config.json and we do not compute; each would silently change the result.
PEFT_REFUSED = """use_dora use_rslora fan_in_fan_out modules_to_save lora_bias rank_pattern alpha_pattern
    layer_replication trainable_token_indices target_parameters alora_invocation_tokens use_qalora use_bdlora
    velora_config monteclora_config kasa_config arrow_config""".split()


def read_adapter(spec):
    """A PEFT LoRA adapter -> {"r", "lora_alpha", "lora_dropout", "scale", "pairs": {module: (A (r,in), B (out,r))}}.

    Format: PEFT's adapter_config.json and adapter_model.safetensors; LoRA is arXiv 2106.09685.
    ValueError names what the adapter uses and this file does not implement.
    """
    directory = locate(spec)
    path = directory / "adapter_config.json"
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported, only 'LORA'")
    for name in PEFT_REFUSED:
        if raw.get(name):
            raise ValueError(f"{path}: {name} = {raw[name]!r} is not supported")
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(f"{path}: init_lora_weights = {raw['init_lora_weights']!r} is not supported: it moves the base")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {raw['bias']!r} is not supported, only 'none'")
    r, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{path}: needs a positive integer 'r' and a number 'lora_alpha', has {r!r} and {alpha!r}")
    pairs = {}
    with open_tensors([directory / "adapter_model.safetensors"]) as found:
        for name, slice_ in found.items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            shape = slice_.get_shape()
            if not match or len(shape) != 2 or shape["AB".index(match[2])] != r:
                raise ValueError(f"{directory}/adapter_model.safetensors: {name} of shape {shape} "
                                 f"is not a LoRA matrix of rank {r}")
            pairs.setdefault(match[1], {})[match[2]] = slice_[:]
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{directory}/adapter_model.safetensors: {module} has only lora_{''.join(pair)}")
    return {"r": r, "lora_alpha": alpha, "lora_dropout": raw.get("lora_dropout", 0.0), "scale": alpha / r,
            "pairs": {m: (p["A"], p["B"]) for m, p in pairs.items()}}


def check_adapter(model, adapter, where):
    """ValueError if an adapter names a linear layer this model does not have, or one of another size."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, (A, B) in adapter["pairs"].items():
        if name not in linears:
            raise ValueError(f"{where}: the adapter changes {name}, which this model does not have")
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise ValueError(f"{where}: the adapter changes lm_head, which is tied to the embedding here")
        shape = (linears[name].out_features, linears[name].in_features)
        if (B.shape[0], A.shape[1]) != shape:
            raise ValueError(f"{where}: {name} of the adapter is {(B.shape[0], A.shape[1])}, the model's is {shape}")


@torch.no_grad()
def merge_tensors(model, adapter, where="adapter", factor=1.0):
    """W <- W + factor * scale * B A for every pair, in place; summed in fp32, as bf16 would drop small updates."""
    check_adapter(model, adapter, where)
    for name, (A, B) in adapter["pairs"].items():
        weight = model.get_submodule(name).weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = factor * adapter["scale"] * (B.to(weight.device, exact) @ A.to(weight.device, exact))
        weight.copy_(weight.to(exact) + delta)


# ----------------------------------------------------------------------------------------------------------
# Tokenizer and chat format
# ----------------------------------------------------------------------------------------------------------

class Tokenizer:
    """tokenizer.json plus the checkpoint's own chat template and end tokens.

    encode adds nothing by itself (a chat string already carries its BOS); bos=True puts BOS in front.
    eos_ids is the union of what config, generation config and tokenizer config call the end: published
    base models disagree among the three, and a sampler that knows one of them never stops.
    """

    def __init__(self, directory):
        from tokenizers import Tokenizer as Fast
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file, so {directory} has no tokenizer")
        try:
            self.fast = Fast.from_file(str(path))
        except Exception as error:
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
        self.fast.no_truncation()       # a trainer's limits, left in the file, must not cut our text
        self.fast.no_padding()
        optional = {name: read_json(directory / f"{name}.json") if (directory / f"{name}.json").exists() else {}
                    for name in ("config", "generation_config", "tokenizer_config")}
        settings = optional["tokenizer_config"]
        self.special = {k: (v["content"] if isinstance(v, dict) else v) for k, v in settings.items()
                        if k.endswith("_token") and isinstance(v, (str, dict))}      # e.g. {"bos_token": "<s>"}
        self.template = settings.get("chat_template")
        if (directory / "chat_template.jinja").exists():
            self.template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(self.template, list):                                          # several, by name
            self.template = {t["name"]: t["template"] for t in self.template}.get("default")
        self.bos_id = self.fast.token_to_id(self.special.get("bos_token", ""))
        self.eos_ids = {self.fast.token_to_id(self.special.get("eos_token", ""))} - {None}
        for name in ("config", "generation_config"):
            ids = optional[name].get("eos_token_id")
            self.eos_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])

    @property
    def eos_id(self):
        """The end token that joins packed documents: the tokenizer's own, else the smallest known."""
        own = self.fast.token_to_id(self.special.get("eos_token", ""))
        if own is None and not self.eos_ids:
            raise ValueError("no end-of-text token in tokenizer_config, config or generation_config")
        return min(self.eos_ids) if own is None else own

    def encode(self, text, bos=False):
        """str -> list of ids."""
        ids = self.fast.encode(text, add_special_tokens=False).ids
        return [self.bos_id] + ids if bos and self.bos_id is not None else ids

    def decode(self, ids, skip_special=True):
        """ids -> str, without the special tokens."""
        return self.fast.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages, add_generation_prompt=True):
        """[{"role", "content"}, ...] -> the string the checkpoint was trained on, by its own template."""
        if not self.template:
            raise ValueError("this tokenizer has no chat_template; add chat_template.jinja to its directory")
        return render(self.template, messages=messages, tools=None, documents=None,
                      add_generation_prompt=add_generation_prompt, **self.special)


@lru_cache(maxsize=8)
def compiled(template):
    """A chat template comes with a checkpoint, from strangers: it runs in jinja2's immutable sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)
    env.globals["raise_exception"] = raise_exception
    return env.from_string(template)


def render(template, **values):
    try:
        return compiled(template).render(**values)
    except Exception as error:      # whatever a stranger's program may raise, it is the template's fault
        raise ValueError(f"chat template: {' '.join(str(error).split()) or type(error).__name__}") from None


def load_tokenizer(spec):
    """The Tokenizer of a model spec (adapters do not change it)."""
    return Tokenizer(config_path(spec).parent)


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of S rows, each with its own length, in one tensor pair per layer that grows by BUCKET.

    Attention reads up to the longest row in use, rounded up to BUCKET, not up to the longest row possible.
    """
    BUCKET = 64

    def __init__(self, model, rows):
        config, weight = model.config, model.lm_head.weight
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)               # (S,G,L,C)
        self.k = [weight.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.v = [weight.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.rows = torch.arange(rows, device=weight.device)[:, None]

    def seek(self, positions):
        """positions (S,T): where the next keys go; everything before them in a row is what it attends to."""
        self.positions = positions
        last = int(positions.max())
        L = -(-(last + 1) // self.BUCKET) * self.BUCKET
        grow = L - self.k[0].shape[2]
        if grow > 0:
            for side in (self.k, self.v):
                for i, old in enumerate(side):       # layer by layer, so that only one is held twice
                    side[i] = F.pad(old, (0, 0, 0, grow))
        self.used, self.mask, T = L, None, positions.shape[1]
        self.empty = T > 1 and last == T - 1         # a prompt from its start: causal among itself, without a mask
        if not self.empty:
            self.mask = (torch.arange(L, device=positions.device) <= positions[..., None])[:, None]      # (S,1,T,L)

    def put(self, layer, k, v):
        """Stores k, v (S,G,T,C) -> the keys and values (S,G,L,C) to attend to, these included."""
        for side, new in ((self.k, k), (self.v, v)):
            side[layer][self.rows, :, self.positions] = new.transpose(1, 2)
        return (k, v) if self.empty else (self.k[layer][:, :, :self.used], self.v[layer][:, :, :self.used])

    def take(self, rows, other, other_rows):
        """Rows of another cache (a prefilled prompt, maybe to several samples) become rows of this one."""
        L = other.used
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            for i in range(len(mine)):
                if mine[i].shape[2] < L:
                    mine[i] = F.pad(mine[i], (0, 0, 0, L - mine[i].shape[2]))
                mine[i][rows, :, :L] = theirs[i][other_rows, :, :L]

    def keep(self, rows):
        """Drops all rows but these: the tail of a run should not pay for slots that have ended."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]
        self.rows = self.rows[:len(rows)]


def sample(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    """logits (B,V), u (B,) uniform in [0,1) -> token ids (B,).  Temperature 0 is argmax.

    Inverse CDF over the sorted, truncated distribution: one number a token, so that the token of a row
    is a function of its own logits and its own u.  Top-p keeps the token that crosses p (arXiv 1904.09751)
    and is taken before top-k; transformers takes it after, which differs when both bind.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)        # a tiny temperature must not overflow
    p, ids = torch.softmax(logits / temperature, -1).sort(dim=-1, descending=True, stable=True)   # (B,V)
    keep = p.cumsum(-1) - p < top_p
    if top_k:
        keep[:, top_k:] = False
    cdf = (p * keep).cumsum(-1)
    pick = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)                              # (B,1)
    pick = torch.minimum(pick, keep.sum(-1, keepdim=True) - 1)       # rounding must not leave the kept set
    return ids.gather(-1, pick)[:, 0]


def right_pad(rows, fill=0, device=None):
    """Lists of ids -> ids (B,T) padded on the right, lengths (B,).  Causal attention never sees that side."""
    lengths = torch.tensor([len(r) for r in rows], device=device)
    ids = torch.tensor([r + [fill] * (int(lengths.max()) - len(r)) for r in rows], device=device)
    return ids, lengths


def prefill(model, prompts, cache, slots):
    """Fills cache rows `slots` with the prompts (equal ones run once) -> last logits (len(slots),V)."""
    device = model.lm_head.weight.device
    unique = {}                                                                      # prompt -> its row
    which = torch.tensor([unique.setdefault(tuple(p), len(unique)) for p in prompts], device=device)
    ids, lengths = right_pad([list(p) for p in unique], device=device)
    fresh = Cache(model, len(unique))
    fresh.seek(torch.arange(ids.shape[1], device=device).expand(len(unique), -1))
    h = model.run(ids, cache=fresh)                                                  # (P,T,D)
    last = h[torch.arange(len(unique), device=device), lengths - 1]                  # (P,D)
    cache.take(torch.tensor(slots, device=device), fresh, which)
    return model.head(last)[which]


def stream(model, requests, *, max_new_tokens, temperature=0.6, top_p=0.95, top_k=0, stop_ids=(), slots=64):
    """Samples every request and yields (request index, token ids, "stop" | "length") as each one ends.

    requests   [(prompt ids, seed key)]: the key, a tuple of ints >= 0, seeds that sample alone, so that
               its text does not depend on batch, order or resume.  Neighbours with equal prompts share a prefill
    token ids  what was generated, the stop token included
    A slot that ends is refilled from the queue while the others go on.
    ValueError: an empty prompt, or settings out of range.
    """
    check_sampling(requests, max_new_tokens, temperature, top_p, top_k, slots, model.config.vocab_size)
    device, stop_ids = model.lm_head.weight.device, set(stop_ids)
    queue = list(range(len(requests)))[::-1]
    S = min(slots, len(queue))
    cache, noise = Cache(model, S), torch.zeros(S, max_new_tokens, device=device)
    owner, out = [None] * S, [[] for _ in range(S)]             # request and tokens of each slot
    length, token = torch.zeros(S, dtype=torch.long, device=device), torch.zeros(S, dtype=torch.long, device=device)

    while queue or any(o is not None for o in owner):
        free = [s for s in range(S) if owner[s] is None]
        if queue and len(free) >= max(1, S // 8):               # a few at a time: one prefill serves them all
            new = free[:len(queue)]
            for s in new:
                owner[s], out[s] = queue.pop(), []
                if temperature:
                    u = np.random.default_rng(list(requests[owner[s]][1])).random(max_new_tokens, dtype=np.float32)
                    noise[s] = torch.from_numpy(u).to(device)
            prompts = [requests[owner[s]][0] for s in new]
            logits = prefill(model, prompts, cache, new)
            token[new] = sample(logits, noise[new, 0], temperature, top_p, top_k)
            length[new] = torch.tensor([len(p) for p in prompts], device=device)
            stepped = new
        else:
            if not queue and len(free) > S // 2:                # compact: the tail runs at its own size
                rows = [s for s in range(S) if owner[s] is not None]
                cache.keep(rows)
                owner, out, S = [owner[s] for s in rows], [out[s] for s in rows], len(rows)
                noise, length, token = noise[rows], length[rows], token[rows]
            stepped = [s for s in range(S) if owner[s] is not None]
            cache.seek(length[:, None])
            logits = model.head(model.run(token[:, None], cache=cache))[:, 0]        # (S,V)
            step = torch.tensor([min(len(o), max_new_tokens - 1) for o in out], device=device)
            token = sample(logits, noise.gather(1, step[:, None])[:, 0], temperature, top_p, top_k)
            length = length + 1
        drawn = token.tolist()                                  # the one wait for the device in a step
        for s in stepped:
            out[s].append(drawn[s])
            ended = drawn[s] in stop_ids
            if ended or len(out[s]) == max_new_tokens:
                yield owner[s], out[s], "stop" if ended else "length"
                owner[s], out[s], length[s] = None, [], 0       # an idle slot starts over


def check_sampling(requests, max_new_tokens, temperature, top_p, top_k, slots=1, vocab_size=math.inf):
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or not math.isfinite(temperature):
        raise ValueError(f"sampling: max_new_tokens {max_new_tokens} should be >= 1, temperature {temperature} >= 0, "
                         f"top_p {top_p} in (0, 1], top_k {top_k} >= 0")
    if slots < 1:
        raise ValueError(f"sampling: slots {slots} should be >= 1")
    for i, (prompt, key) in enumerate(requests):
        if len(prompt) == 0:
            raise ValueError(f"sampling: prompt {i} is empty")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"sampling: prompt {i} has token ids {min(prompt)} .. {max(prompt)}, the model knows "
                             f"0 .. {vocab_size - 1}: is the tokenizer another model's?")
        if min(key) < 0:
            raise ValueError(f"sampling: the seed {key} of prompt {i} should be >= 0")


@torch.no_grad()
def collect(model, requests, **settings):
    """All of `stream`, in the order of the requests -> [(token ids, finish reason)]."""
    done = {i: (ids, why) for i, ids, why in stream(model, requests, **settings)}
    return [done[i] for i in range(len(requests))]


def generate(model, prompts, max_new_tokens, temperature=0.6, top_p=0.95, top_k=0, samples=1, stop_ids=(), seed=0,
             slots=64):
    """prompts: lists of ids -> [prompt][sample] -> list of ids, the stop token included."""
    requests = [(p, (seed, i, j)) for i, p in enumerate(prompts) for j in range(samples)]
    flat = collect(model, requests, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                   top_k=top_k, stop_ids=stop_ids, slots=slots)
    return [[ids for ids, _ in flat[i * samples:(i + 1) * samples]] for i in range(len(prompts))]
