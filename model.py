"""Qwen2 and Qwen2-MoE as Hugging Face defines them: model, files, adapters, tokenizer, sampling.

    model, tokenizer = load_model("data/tiny/distill"), load_tokenizer("data/tiny/distill")
    prompt = tokenizer.chat([{"role": "user", "content": "..."}])
    ids = generate(model, [tokenizer.encode(prompt)], max_new_tokens=96)[0][0]

A model is named by a spec:
    PATH_OR_HUB_ID[@REVISION][#SUBFOLDER][+ADAPTER[*FACTOR] ...]    adapters are put on when loading
    random:CONFIG.json[@SEED]                                       seeded random weights
FACTOR multiplies an adapter's own scale, alpha / r: 0.5 goes half of the way, -1 goes back.

Qwen2 (arXiv 2407.10671) is a pre-norm decoder: grouped-query attention with biases on q, k and v,
rotary positions (arXiv 2104.09864), SwiGLU, RMSNorm.  A block of Qwen2-MoE has many small MLPs, of
which a token uses a few.  Parameter names are those of the checkpoints.

B batch, T time, D width, V vocabulary, H query heads, G key/value heads, C head width, L cached
positions, S rows of the sampler, N tokens (B*T), E experts, K of them used by a token, M hidden
width of an MLP, r rank of an adapter.
"""

import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.adapters import note_base, read_adapter
from data.files import (
    FLOATS, REQUIRED, check, check_finite, check_tensors, locate, open_tensors, read_fields,
    read_json, read_value, refuse_unknown, say_once, staged, write_json)
from data.tokenizer import Tokenizer, think_prefix       # noqa: F401  (for importers)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

def at_least_fp32(x):
    """x in fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()

# ---- Config: every field of config.json is used, known to be harmless, or refused by name ------

SIZE, HEADS = (int, 1, 2**20, REQUIRED), (int, 1, 2**12, None)
TOKEN_ID, TOKEN_IDS = (int, None, None, None), ((int, [int]), None, None, None)
DTYPE, DEFAULT = (tuple(DTYPES), None, None, None), (("default",), None, None, None)
POSITIVE = (int, float), 1e-30, 1e30

DENSE_FIELDS = {                             # names, order and defaults of Hugging Face
    "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": SIZE,
    "num_hidden_layers": (int, 1, 512, REQUIRED), "num_attention_heads": (*HEADS[:3], REQUIRED),
    "num_key_value_heads": HEADS, "head_dim": HEADS,
    "rms_norm_eps": (*POSITIVE, 1e-6), "rope_theta": (*POSITIVE, 1e4),
    "max_position_embeddings": (int, 1, None, 32768),    # kept, not used: angles are computed
    "tie_word_embeddings": (bool, None, None, False),    # head and embedding are one matrix
    "bos_token_id": TOKEN_ID, "eos_token_id": TOKEN_IDS, "pad_token_id": TOKEN_ID,
    "dtype": DTYPE,                      # of the checkpoint's weights
}
MOE_FIELDS = {
    "num_experts": (int, 1, 2**12, REQUIRED), "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE, "shared_expert_intermediate_size": SIZE,
    "norm_topk_prob": (bool, None, None, False),         # the weights of a token's experts sum to 1
    "decoder_sparse_step": (int, 1, None, 1),            # every so many blocks one has experts,
    "mlp_only_layers": ([int], None, 512, ()),          # except these
}
OTHER_FIELDS = {                             # choices of which we compute one, and older names
    "model_type": (("qwen2", "qwen2_moe"), None, None, "qwen2"),
    "hidden_act": (("silu",), None, None, None), "qkv_bias": ((True,), None, None, None),
    "layer_types": ([("full_attention",)], None, None, None),
    "rope_scaling": (dict, None, None, {}), "rope_parameters": (dict, None, None, {}),
    "torch_dtype": DTYPE,                    # dtype, before transformers 5
}
# Another type changes every position
ROPE_FIELDS = {"rope_theta": (*POSITIVE, None), "rope_type": DEFAULT, "type": DEFAULT}
ROPE_IDLE = ["factor", ".*_factor", "original_max_position_embeddings", "beta_.*"]  # of other types
# Not used, or only with another field, which is refused
HARMLESS = """architectures transformers_version use_cache initializer_range return_dict
    _name_or_path _attn_implementation_autoset sliding_window max_window_layers
    output_router_logits router_aux_loss_coef""".split()
class Config:
    """A Qwen2 or Qwen2-MoE architecture: the fields of the tables above are its attributes."""
    num_experts = 0                          # dense, unless given

    def __init__(self, **fields):
        table = DENSE_FIELDS | MOE_FIELDS
        assert fields.keys() <= table.keys(), fields
        defaults = {name: row[3] for name, row in table.items() if row[3] is not REQUIRED}
        vars(self).update(defaults | fields)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.dtype = self.dtype or "float32"
        self.mlp_only_layers = list(self.mlp_only_layers)

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """The Config of a parsed config.json.  ValueError names what is missing or unsupported."""
        other = read_fields(raw, OTHER_FIELDS, where)
        ours = DENSE_FIELDS | (MOE_FIELDS if other["model_type"] == "qwen2_moe" else {})
        found = read_fields(raw, ours, where)
        check(not raw.get("quantization_config"), f"{where}: quantization_config; save it in bf16")
        refuse_unknown(raw, {*ours, *OTHER_FIELDS, *HARMLESS}, where)
        rope = other["rope_parameters"] | other["rope_scaling"]
        refuse_unknown(rope, ROPE_FIELDS, f"{where}: rope_parameters or rope_scaling", ROPE_IDLE)
        rope = read_fields(rope, ROPE_FIELDS, f"{where}: rope_parameters or rope_scaling")
        found["rope_theta"] = rope["rope_theta"] or found["rope_theta"]
        found["dtype"] = found["dtype"] or other["torch_dtype"]
        config = cls(**found)
        H, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        check(H % G == 0, f"{where}: {H} query heads cannot share {G} key/value heads")
        check(C > 0 == C % 2, f"{where}: head_dim {C} is odd or 0; rotary positions need pairs")
        E, K = config.num_experts, found.get("num_experts_per_tok", 0)
        check(K <= E, f"{where}: num_experts_per_tok {K} of {E} experts")
        return config

    @classmethod
    def from_pretrained(cls, spec):
        """The Config of a model spec."""
        path = config_path(spec)
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self):
        """The config.json that `transformers` reads."""
        kind, family = ("qwen2_moe", "Qwen2Moe") if self.num_experts else ("qwen2", "Qwen2")
        ours = DENSE_FIELDS | (MOE_FIELDS if self.num_experts else {})
        own = {name: getattr(self, name) for name in ours if getattr(self, name) is not None}
        own["torch_dtype"] = own.pop("dtype")            # old and new releases read this name
        return {"architectures": [f"{family}ForCausalLM"], "model_type": kind,
                "hidden_act": "silu", "use_sliding_window": False} | own

    def is_sparse(self, layer):
        """Whether block `layer`, counted from 0, has experts: Hugging Face's two conditions."""
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

# ---- Attention, with its norm and rotary positions ---------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        # Hugging Face averages in fp32 and multiplies by the weight after the cast back.
        y = F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=self.eps)          # (B,T,D)
        return self.weight * y.to(x.dtype)

def rope_table(config, positions):
    """positions (B,T) -> cos, sin (B,1,T,C), fp32, of t / theta^(2i/C) for pair i at position t.
    The left half of sin is negative, as `rotate` needs it."""
    C = config.head_dim
    exponent = torch.arange(0, C, 2, device=positions.device).float() / C     # (C/2,)
    angle = positions[:, None, :, None].float() * (1.0 / config.rope_theta ** exponent)
    cos, sin = angle.cos(), angle.sin()                                       # (B,1,T,C/2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)      # (B,1,T,C)

def rotate(x, cos, sin):
    """Rotates the pairs (i, i + C/2) of x (B,H,T,C), in fp32: bf16 would blur whole positions."""
    y = at_least_fp32(x)
    partner = y.roll(y.shape[-1] // 2, dims=-1)          # (B,H,T,C) the other one of each pair
    return (y * cos + partner * sin).to(x.dtype)

class Attention(nn.Module):
    """Grouped-query attention: H query heads share G heads of keys and values."""

    def __init__(self, config):
        super().__init__()
        D, self.C = config.hidden_size, config.head_dim
        self.H, self.G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.H * self.C)
        self.k_proj = nn.Linear(D, self.G * self.C)
        self.v_proj = nn.Linear(D, self.G * self.C)
        self.o_proj = nn.Linear(self.H * self.C, D, bias=False)  # q, k, v have biases

    def forward(self, x, rope, mask=None, memory=None):
        """x (B,T,D) -> (B,T,D).  mask (B,1,T,L), true where to attend; None: causal.
        memory  of a Cache: where keys and values go and, if there is a mask, come from."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.C).transpose(1, 2)         # (B,H,T,C)
        k = self.k_proj(x).view(B, T, self.G, self.C).transpose(1, 2)         # (B,G,T,C)
        v = self.v_proj(x).view(B, T, self.G, self.C).transpose(1, 2)         # (B,G,T,C)
        q, k = rotate(q, *rope), rotate(k, *rope)        # v carries no position
        if memory is not None:
            keys, values, rows, positions = memory
            keys[rows, :, positions] = k.transpose(1, 2)                      # (B,T,G,C)
            values[rows, :, positions] = v.transpose(1, 2)
            k, v = (k, v) if mask is None else (keys, values)                 # (B,G,L,C)
        if T == 1:       # the heads of a group share its keys: they can be the time of one head
            q = q.reshape(B, self.G, self.H // self.G, self.C)
        if T == 1 and mask is not None and q.dtype.itemsize >= 4:    # on a CPU faster than SDPA
            p = (q @ k.mT * self.C**-0.5).masked_fill(~mask, -math.inf).softmax(-1)
            y = p @ v                                                         # (B,G,H/G,C)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                enable_gqa=q.shape[1] != self.G)                              # (B,H,T,C)
        y = y.reshape(B, self.H, T, self.C).transpose(1, 2)                   # (B,T,H,C)
        return self.o_proj(y.reshape(B, T, self.H * self.C))                  # (B,T,D)

# ---- Feed-forward: dense MLP, mixture of experts -----------------------------------------------

class MLP(nn.Module):
    def __init__(self, D, M):
        super().__init__()
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))    # D -> M -> D

class Router(nn.Module):
    """Which K of the E experts a token uses, and with what weights."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x):
        return self.choose(F.linear(x, self.weight))

    def choose(self, logits):
        """logits (N,E) -> weights (N,K) in their dtype, experts (N,K) int64, heaviest first."""
        p = at_least_fp32(logits).softmax(-1)            # over all E, also those not chosen
        weight, expert = p.topk(self.top_k)              # (N,K) each
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight.to(logits.dtype), expert

class Experts(nn.Module):
    """E MLPs in two stacked tensors.  Each runs once, on all tokens that chose it."""

    def __init__(self, config):
        super().__init__()
        E, M, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * M, D))  # the gate's M rows first
        self.down_proj = nn.Parameter(torch.empty(E, D, M))

    def forward(self, x, weight, expert):
        """x (N,D), weight and expert (N,K) from the router -> (N,D)."""
        N, K = expert.shape
        chosen = expert.flatten()                        # (N*K,) pair i belongs to token i // K
        order = chosen.argsort(stable=True)              # the pairs, grouped by expert
        counts = chosen.bincount(minlength=len(self.down_proj)).tolist()
        groups = x[order // K].split(counts)             # E tensors (tokens of the expert,D)
        out = []
        for rows, gate_up, down in zip(groups, self.gate_up_proj.unbind(), self.down_proj.unbind()):
            if len(rows):
                gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)           # (rows,M) each
                out.append(F.linear(F.silu(gate) * up, down))                 # (rows,D)
        y = torch.cat(out)[order.argsort()]              # (N*K,D) back in the order of the tokens
        return (y.view(N, K, -1) * weight[..., None]).sum(1)

class MoE(nn.Module):
    """Mixture of experts: those that the router chose, and a gated one that all tokens share."""

    def __init__(self, config):
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x):
        rows = x.flatten(0, -2)                          # (N,D)
        shared = self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        weight, expert = self.gate(rows)                 # (N,K) each
        return (self.experts(rows, weight, expert) + shared).view(x.shape)

# ---- Blocks and the whole model ----------------------------------------------------------------

class Block(nn.Module):
    """A decoder layer.  Hook sites: its output is `resid`, the output of its MLP is `mlp`."""

    def __init__(self, config, layer):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if config.is_sparse(layer) else MLP(D, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)

    def forward(self, h, rope, mask=None, memory=None):
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, memory)   # (B,T,D)
        return h + self.mlp(self.post_attention_layernorm(h))

class Transformer(nn.Module):
    """Qwen2ForCausalLM or Qwen2MoeForCausalLM: ids (B,T) int64 -> logits (B,T,V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.source = None       # the directory it was loaded from, whose tokenizer a save copies
        self.checkpointing = False       # True: blocks run again in the backward pass, less memory
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids):
        return self.head(self.run(ids))

    def head(self, h):
        """h (B,T,D), the output of the last block -> logits (B,T,V)."""
        return self.lm_head(self.model.norm(h))          # blocks do not end in a norm

    def run(self, x, start=0, stop=None, cache=None):
        """Blocks start .. stop-1, by default all -> hidden states (B,T,D) after the last one run.
        x      ids (B,T) if start is 0, else the hidden states (B,T,D) that block `start` would see
        cache  a Cache after `seek`: x continues the tokens in it
        stop spares an SAE the blocks above; start lets teacher and student share the lower ones."""
        h = self.model.embed_tokens(x) if start == 0 else x                   # (B,T,D)
        positions, mask = torch.arange(h.shape[1], device=h.device)[None], None           # (1,T)
        if cache is not None:
            positions, mask = cache.positions, cache.mask                     # (B,T), (B,1,T,L)
        rope = rope_table(self.config, positions)        # once for all blocks
        for i in range(len(self.model.layers))[start:stop]:
            block, memory = self.model.layers[i], None if cache is None else cache.memory(i)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, rope, mask, memory, use_reentrant=False)
            else:
                h = block(h, rope, mask, memory)
        return h

    def compile_blocks(self):
        """torch.compile for each block.  Hooks on a block still run; on modules in it, see resa."""
        for block in self.model.layers:
            block.forward = torch.compile(block.forward)
        return self

@torch.no_grad()
def init_weights(model, seed=0, std=0.02):
    """Hugging Face's initialisation, in place: normal(0, std) matrices, zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.fill_(1.0 if "norm" in name else 0.0)
    return model

# ---- Files: specs, checkpoints -----------------------------------------------------------------

def split_spec(spec):
    """'base@rev#sub+adapter*0.5' -> ('base@rev#sub', [('adapter', 0.5)]); a factor not given is 1.
    A path that exists is taken as it is, + and all.  ValueError: no adapter after +."""
    words, parts = str(spec).split("+"), []
    while words:
        joined = ["+".join(words[:n]) for n in range(len(words), 0, -1)]
        parts.append(next(filter(names_path, joined), words[0]))
        words = words[parts[-1].count("+") + 1:]
    adapters = []
    for part in parts[1:]:
        match = re.fullmatch(r"(.+?)(?:\*([-+]?\d{0,20}\.?\d{1,20}(?:e[-+]?\d)?))?", part)
        check(match, f"{spec}: no adapter is named after '+'")
        adapters.append((part, 1.0) if os.path.exists(part) else (match[1], float(match[2] or 1)))
    return parts[0], adapters

def names_path(part):
    """Whether a part of a spec names a path that is there: as a whole, or up to its #, * or @."""
    path = part.removeprefix("random:")
    heads = [path, path.replace("#", "/"), *(path.rpartition(mark)[0] for mark in "#*@")]
    return any(os.path.exists(head) for head in heads if "+" not in path[len(head):])

def config_path(spec):
    """Where the config.json of a spec is; its other files are beside it."""
    base, _ = split_spec(spec)
    if base.startswith("random:"):
        return Path(base.removeprefix("random:").split("@")[0])               # without the seed
    return locate(base) / "config.json"

def load_model(spec, dtype=None, device=None):
    """The Transformer that a spec names: in eval mode, without gradients, its adapters put on.
    dtype   a torch dtype or its name; None: the checkpoint's.  device: None is the CPU
    FileNotFoundError: nothing there.  ValueError names the field or tensor that does not fit."""
    base, adapters = split_spec(spec)
    config = Config.from_pretrained(base)
    config.dtype = str(dtype or config.dtype).removeprefix("torch.")
    check(config.dtype in DTYPES, f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    with torch.device("meta"):               # shapes without memory
        model = Transformer(config).to(DTYPES[config.dtype])
    device, size = torch.device(device or "cpu"), sum(p.nbytes for p in model.parameters())
    free = free_memory(device)
    check(size < free, f"{spec}: the weights take {size / 1e9:.3g} GB, free are {free / 1e9:.3g}")
    model.source = config_path(base).parent
    if base.startswith("random:"):
        seed = base.partition("@")[2] or "0"
        check(re.fullmatch(r"\d{1,18}", seed), f"{base}: the seed should be a whole number")
        init_weights(model.to_empty(device="cpu"), int(seed)).to(device)
    else:
        load_weights(model, model.source, device)        # checked, then filled
    model.tie()
    for path, factor in adapters:
        adapter = read_adapter(path)
        note_base(adapter, path, base)
        put_on(model, adapter, path, factor)
    return model.eval().requires_grad_(False)

def load_tokenizer(spec, template="chat"):
    """The Tokenizer of a model spec; adapters do not change it.  template "plain": no chats."""
    return Tokenizer(config_path(spec).parent, template == "plain")

@torch.no_grad()
def load_weights(model, directory, device):
    """Fills a model on the meta device from a checkpoint, one memory-mapped tensor at a time."""
    with open_tensors(weight_files(directory), FLOATS) as files:
        # Files of old hold the rotary frequencies too, which follow from rope_theta.
        found = {n: t for n, t in files.items() if not n.endswith("rotary_emb.inv_freq")}
        tied = found.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
        check_tensors(found, as_stored(model), directory)
        model.to_empty(device=device)                    # only now memory is taken
        model.tie()
        for name, view in as_stored(model).items():
            view.copy_(found[name][:])
            check_finite(view, f"{directory}: {name}, in {model.config.dtype},")
        same = tied is None or torch.equal(tied[:].to(model.lm_head.weight), model.lm_head.weight)
        check(same, f"{directory}: tie_word_embeddings, yet lm_head.weight is not the embedding")

def weight_files(directory):
    """The paths of a checkpoint's safetensors files: a single one, or those its index names."""
    names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if index.exists() and not (directory / names[0]).exists():       # in this order, as in HF
        found = read_fields(read_json(index), {"weight_map": (dict, 1, None, REQUIRED)}, index)
        files = list(found["weight_map"].values())
        names = sorted(set(read_value(files, [str], where=f"{index}: 'weight_map'")))
    for name in names:
        check(re.fullmatch(r"[^/\\]+\.safetensors", name),
              f"{index}: file name {name!r} leads out of the directory, or is of no safetensors")
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory / name}: no such file; a pickle is never loaded")
    return [directory / name for name in names]

def as_stored(model):
    """{name of a tensor in a file: view of the model}.  Files have three matrices an expert."""
    views = {}
    for name, p in model.named_parameters():             # a tied head is listed as the embedding
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            views[name] = p
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for e, matrix in enumerate(p):                   # (2M,D) or (D,M)
            for part, view in zip(parts, matrix.chunk(len(parts))):
                views[f"{stem}.{e}.{part}.weight"] = view
    return views

def save_model(model, directory):
    """Writes a directory that `transformers` loads: weights, config, and the source's tokenizer."""
    state = as_stored(model)
    check(not any("lora_" in name for name in state),
          "the model has LoRA adapters attached: merge them, or save them as an adapter")
    model.config.dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")  # maybe cast since
    with staged(directory) as temporary:
        state = {name: view.detach().contiguous().cpu() for name, view in state.items()}
        for name, tensor in state.items():
            check_finite(tensor, f"{directory} was not written: {name}")
        save_file(state, temporary / "model.safetensors", {"format": "pt"})
        write_json(temporary / "config.json", model.config.to_dict())         # put in place last
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json"):
            if model.source is not None and (Path(model.source) / name).exists():
                shutil.copyfile(Path(model.source) / name, temporary / name)

# ---- PEFT adapters: check, put on; data/adapters.py reads them ----------------------------------

def check_adapter(model, adapter, where):
    """ValueError: an adapter is for layers that its config does not select, or lacks some that it
    does, or those of the model are of another size or not there."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    pairs = adapter["pairs"]
    for name, (A, B) in pairs.items():
        check(name in linears,
              f"{where}: the adapter changes {name}, which this model does not have")
        ours, theirs = tuple(linears[name].weight.shape), (B.shape[0], A.shape[1])
        check(theirs == ours, f"{where}: {name} of the adapter is {theirs}, the model's is {ours}")
    chosen = {n for n in (*linears, "model.embed_tokens") if re.fullmatch(adapter["selects"], n)}
    wrong = [f"{name} has no lora_A and lora_B" for name in sorted(chosen - pairs.keys())]
    wrong += [f"{name} has them, unselected" for name in sorted(pairs.keys() - chosen)]
    check(chosen and not wrong, f"{where}: the adapter is not what target_modules in its config "
          f"selects: {'; '.join(wrong[:3]) or 'no layer'}; {len(wrong)} in all")

def fold(weight, A, B, scale):
    """weight (out,in) + scale * B (out,r) A (r,in).  Summed in fp32: bf16 drops small updates."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    delta = B.to(weight.device, exact) @ A.to(weight.device, exact)  # (out,in)
    return (weight.to(exact) + scale * delta).to(weight.dtype)

def low_rank(x, A, B, scale=1.0):
    """x (...,in) -> scale * B A x (...,out), from A (r,in) and B (out,r) in the dtype of x: of all
    that is cast, they are the smallest.  Under fp16 in fp32: B may be too small for its range."""
    exact = torch.float32 if x.dtype == torch.float16 else x.dtype
    low = x.to(exact) @ A.to(exact).T * scale            # (...,r)
    return (low @ B.to(exact).T).to(x.dtype)             # (...,out)

class AdaptedLinear(nn.Linear):
    """A Linear of bf16 or fp16 and, beside it in fp32, what adapters add: W x + B A x.
    Folded into the weight, small changes would be rounded away: after 100 steps at a rate of 1e-6
    the change that bf16 keeps has a cosine of 0.49 with the one that was learned."""

    def __init__(self, base, A, B):
        nn.Module.__init__(self)         # not nn.Linear's, which would allocate another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        if isinstance(base, AdaptedLinear):              # of a spec with several adapters
            A, B = torch.cat([base.lora_A, A]), torch.cat([base.lora_B, B], dim=1)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + low_rank(x, self.lora_A, self.lora_B)

    def folded(self):
        """The weight (out,in) with B A in it, rounded to its dtype."""
        return fold(self.weight, self.lora_A, self.lora_B, 1.0)

def replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

@torch.no_grad()
def put_on(model, adapter, where="adapter", factor=1.0):
    """Adds an adapter, `factor` times, to the model.  ValueError names `where`: see check_adapter.
    Weights of fp32 take it in; those of half precision keep it beside them, see AdaptedLinear."""
    check_adapter(model, adapter, where)
    for name, (A, B) in adapter["pairs"].items():
        layer, scale = model.get_submodule(name), factor * adapter["scales"][name]
        if layer.weight.dtype.itemsize >= 4:
            layer.weight.copy_(fold(layer.weight, A, B, scale))
            check_finite(layer.weight, f"{where}: {name} with the adapter in it")
        else:
            check_finite(scale * B, f"{where}: {name}, scaled,")
            A, B = (side.to(layer.weight.device, torch.float32) for side in (A, B))
            replace(model, name, AdaptedLinear(layer, A, scale * B))

# ---- Sample: from logits to a token ------------------------------------------------------------

NOT_FINITE = "sampling: logits are NaN or infinite; are the weights too large for their dtype?"
BAD, UNDECIDED = -1, -2      # in the place of a token id

def sample(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    """logits (B,V), u (B,) uniform in [0,1) -> token ids (B,).  Temperature 0 is argmax.
    Inverse CDF of the sorted, truncated distribution: the token of a row depends on its own
    logits and its own u alone.  Top-p (arXiv 1904.09751) keeps the token that crosses p, and sees
    the whole distribution; in transformers it sees what top-k left, which differs when both bind.
    ValueError: a row whose largest logit is not finite."""
    ids = draw(logits, u, temperature, top_p, top_k)
    check(BAD not in ids, NOT_FINITE)
    rest = (ids == UNDECIDED).nonzero()[:, 0]            # rows of flat distributions
    ids[rest] = draw(logits[rest], u[rest], temperature, top_p, top_k, sort_all=True)
    return ids

def draw(logits, u, temperature, top_p, top_k, sort_all=False):
    """`sample` without a look at what comes out, for which a GPU would have to wait.
    Sorts only the likeliest tokens, unless `sort_all`.  Where the kept ones may not all be among
    them the row gets UNDECIDED; where its largest logit is not finite, BAD."""
    top, ids = logits.max(-1, keepdim=True)              # (B,1) each; NaN is the largest of all
    if temperature:
        p = (logits.float() - top.float()) / temperature     # a tiny one must not overflow
        p, order = likeliest(p.softmax(-1), sort_all or top_p == 1 and not top_k)    # (B,n) each
        keep = p.cumsum(-1) - p < top_p
        if top_k:
            keep[:, top_k:] = False
        cdf = (p * keep).cumsum(-1)                      # (B,n), not normalised
        rank = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # (B,1)
        last = keep.sum(-1, keepdim=True) - 1            # rounding must not lead out of the set
        ids = order.gather(-1, torch.minimum(rank, last).clamp(min=0))
        if p.shape[1] < logits.shape[1]:     # others may be as likely as the last of these
            ids = ids.masked_fill((keep & (p <= p[:, -1:])).any(-1, keepdim=True), UNDECIDED)
    return ids.where(top.isfinite(), BAD)[:, 0]

def likeliest(p, sort_all):
    """p (B,V) -> its largest n (B,n), largest first, and whose they are; of equals the first."""
    n = min(1024, p.shape[1] // 16)
    if sort_all or n == 0:
        return p.sort(dim=-1, descending=True, stable=True)
    some, order = p.topk(n)                              # (B,n) each; equals in any order
    order = order.sort(-1).values
    some, place = p.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return some, order.gather(-1, place)

def check_sampling(model, requests, max_new_tokens, temperature, top_p, top_k, slots):
    """ValueError: a setting out of range, or a prompt that the model cannot read."""
    check(min(max_new_tokens, slots) >= 1 and 0 <= temperature < math.inf and 0 < top_p <= 1
          and top_k >= 0, f"sampling: {max_new_tokens=}, {slots=}, {temperature=}, {top_p=} or "
          f"{top_k=} is out of range")
    V = model.config.vocab_size
    for i, (prompt, _) in enumerate(requests):
        check(len(prompt) and min(prompt) >= 0 and max(prompt) < V,
              f"sampling: prompt {i} is empty or has token ids outside 0 .. {V - 1}: "
              "is the tokenizer another model's?")

# ---- Generate: many requests through the few rows of a cache -----------------------------------

class Cache:
    """Keys and values of S rows, each row with its own length: one (2,S,G,L,C) per layer.
    Attention reads L rounded up to a BUCKET: up to the longest row in use, not to the longest
    possible.  Use: `seek`, then one pass of the model, whose blocks write to `memory`."""
    BUCKET = 64

    def __init__(self, model, rows):
        config, weight = model.config, model.lm_head.weight
        shape = (2, rows, config.num_key_value_heads, 0, config.head_dim)     # (2,S,G,L,C)
        self.kv = [weight.new_empty(shape) for _ in model.model.layers]
        self.rows = torch.arange(rows, device=weight.device)[:, None]         # (S,1)
        self.bucket = 512 if weight.is_cuda else self.BUCKET     # a graph for each

    def seek(self, positions, last):
        """Says where the next tokens go: positions (S,T), none above `last` but of idle rows."""
        T = positions.shape[1]
        self.used = self.length(last)
        self.positions = positions.clamp(max=self.used - 1)
        self.grow(self.used)
        self.mask = None
        if T == 1 or last >= T:              # not prompts alone, which are causal without a mask
            keys = torch.arange(self.used, device=positions.device)           # (L,)
            self.mask = (keys <= positions[..., None])[:, None]               # (S,1,T,L)

    def length(self, last):
        """How many positions are read if the last one is `last`."""
        return (last // self.bucket + 1) * self.bucket

    def grow(self, L):
        """Makes room for L positions; layer by layer, so that only one is held twice."""
        for layer, old in enumerate(self.kv):
            if old.shape[3] < L:
                self.kv[layer] = F.pad(old, (0, 0, 0, L - old.shape[3]))

    def memory(self, layer):
        """keys, values (S,G,L,C) of a layer, and where in them the next ones go."""
        keys, values = self.kv[layer][:, :, :, :self.used]
        return keys, values, self.rows, self.positions

    def take(self, rows, other, other_rows):
        """Copies rows of another cache, maybe one prompt to several samples, into rows here."""
        self.grow(other.used)
        for mine, theirs in zip(self.kv, other.kv):
            mine[:, rows, :, :other.used] = theirs[:, other_rows, :, :other.used]

def right_pad(rows, fill=0, device=None):
    """Lists of ids -> ids (B,T), lengths (B,).  Causal attention never looks to the right."""
    lengths = [len(row) for row in rows]
    ids = [row + [fill] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)

def prefill(model, prompts, cache, slots):
    """Runs prompts, equal ones once, into rows `slots` of a cache -> last logits (len(slots),V)."""
    device = model.lm_head.weight.device
    unique = {}                                          # prompt -> its row, of P
    which = [unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts]
    ids, lengths = right_pad([list(prompt) for prompt in unique], device=device)      # (P,T), (P,)
    fresh = Cache(model, len(unique))
    fresh.seek(torch.arange(ids.shape[1], device=device).expand_as(ids), ids.shape[1] - 1)
    h = model.run(ids, cache=fresh)                      # (P,T,D)
    last = h[torch.arange(len(ids), device=device), lengths - 1]              # (P,D)
    cache.take(slots, fresh, which)
    return model.head(last)[which]       # (len(slots),V)

class Decoder:
    """The S rows of the sampler on the device: their cache, and one step for all of them.
    ids        (S,1) the last token of each row, which is not in the cache yet
    positions  (S,1) where it stands
    drawn      (S,1) how many of its numbers u (S,n), one for each new token, are used up"""

    def __init__(self, model, rows, new_tokens, settings):
        self.model, self.settings, self.cache = model, settings, Cache(model, rows)
        device = model.lm_head.weight.device
        self.state = torch.zeros(3, rows, 1, dtype=torch.int64, device=device)
        self.ids, self.positions, self.drawn = self.state
        self.u = torch.zeros(rows, new_tokens, device=device)
        # A GPU takes several steps between two looks at what was drawn: each look waits for it.
        self.ahead = 8 if self.u.is_cuda else 1
        self.graph = {}
        # Hooks may do anything; how many tokens an expert has is for the host to know.
        special = model.config.num_experts or any(m._forward_hooks for m in model.modules())
        self.records = self.u.is_cuda and not special

    def start(self, slots, prompts, keys):
        """Puts prompts into rows `slots` -> the first new token of each.  keys: see `stream`."""
        for s, key in zip(slots, keys):
            u = np.random.default_rng(list(key)).random(self.u.shape[1], dtype=np.float32)
            self.u[s] = torch.from_numpy(u)
        logits = prefill(self.model, prompts, self.cache, slots)              # (len(slots),V)
        tokens = sample(logits, self.u[slots, 0], **self.settings)            # (len(slots),)
        lengths = torch.tensor([len(ids) for ids in prompts], device=tokens.device)
        self.state[:, slots, 0] = torch.stack([tokens, lengths, torch.ones_like(lengths)])
        return tokens.tolist()

    def steps(self, last):
        """A few steps -> tokens [step][row].  last: where the longest row's last token stands."""
        last += self.ahead - 1               # one length for all of them
        tokens = torch.stack([self.replay(last) for _ in range(self.ahead)]).tolist()
        if UNDECIDED in tokens[-1]:
            tokens.append(self.decide().tolist())
        return tokens

    def step(self, last):
        """Draws the next token of each row (S,) and moves on to it; where UNDECIDED, stays.
        A function of tensors of fixed shapes that looks at no value: a GPU can replay it."""
        self.cache.seek(self.positions, last)
        h = self.model.run(self.ids, cache=self.cache)                        # (S,1,D)
        self.logits = self.model.head(h)[:, 0]                                # (S,V)
        self.tokens = draw(self.logits, self.numbers(), **self.settings)
        return self.move(self.tokens)

    def decide(self):
        """The tokens of rows that stayed UNDECIDED; to the others this happens instead."""
        stuck = (self.tokens == UNDECIDED).nonzero()[:, 0]
        some = draw(self.logits[stuck], self.numbers()[stuck], **self.settings, sort_all=True)
        return self.move(torch.full_like(self.tokens, UNDECIDED).index_copy(0, stuck, some))

    def numbers(self):                       # (S,); a row beyond its last one is idle
        return self.u.gather(1, self.drawn.clamp(max=self.u.shape[1] - 1))[:, 0]

    def move(self, tokens):
        """Puts tokens (S,) in the place of the last ones, unless UNDECIDED -> tokens."""
        go = (tokens != UNDECIDED)[:, None]                                   # (S,1)
        self.ids.copy_(torch.where(go, tokens[:, None].clamp(min=0), self.ids))
        self.positions += go
        self.drawn += go
        return tokens

    def replay(self, last):
        """`step`, on CUDA as a graph: one launch for some 700 kernels, each shorter than its own.
        The first step of a length runs as it is, which lays out memory, the second is recorded."""
        if not self.records:
            return self.step(last)
        self.cache.grow(self.cache.length(last))
        shape = self.cache.length(last), self.cache.kv[0].data_ptr()
        if shape not in self.graph:          # another length, or the cache has moved
            self.graph = {shape: None}
            return self.step(last)
        if self.graph[shape] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):    # nothing runs in here
                self.graph[shape] = graph, self.step(last)
        graph, tokens = self.graph[shape]
        graph.replay()
        return tokens.clone()                # the next replay writes there

    def keep(self, rows):
        """A Decoder of these rows alone, to go on with."""
        smaller = Decoder(self.model, len(rows), self.u.shape[1], self.settings)
        smaller.cache.take(slice(None), self.cache, rows)
        smaller.state.copy_(self.state[:, rows])
        smaller.u.copy_(self.u[rows])
        return smaller

def stream(model, requests, *, max_new_tokens, temperature=0.6, top_p=0.95, top_k=0, stop_ids=(),
           slots=64):
    """Samples every request; yields (its index, token ids, "stop" | "length") as each one ends.
    requests   [(prompt ids, seed key)]: the key, a tuple of ints >= 0, seeds this request alone, so
               its text does not depend on batch, order or resume
    token ids  what was generated, the stop token included
    slots      how many run at once, or fewer if memory is short"""
    check_sampling(model, requests, max_new_tokens, temperature, top_p, top_k, slots)
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    left = dict(enumerate(requests))
    slots = rows_that_fit(model, requests, max_new_tokens, slots)
    while left:
        try:
            for index, ids, why in run_rows(model, left, max_new_tokens, settings, stop_ids, slots):
                yield index, ids, why
                del left[index]
        except torch.OutOfMemoryError:       # another process's, say; finished texts are kept
            if min(slots, len(left)) == 1:
                raise
            slots = min(slots, len(left)) // 2
            say_once(f"out of memory: going on with {slots} rows at a time")

def run_rows(model, left, max_new_tokens, settings, stop_ids, slots):
    """`stream`, of requests {index: (prompt, key)}, with rows that do fit."""
    # Popped from the end: the longest prompts first, so that those prefilled together are alike.
    waiting = sorted(left.items(), key=lambda request: len(request[1][0]))
    rows = [None] * min(slots, len(waiting))             # None: idle
    decoder = Decoder(model, len(rows), max_new_tokens, settings)
    while waiting or any(rows):
        free = [s for s, row in enumerate(rows) if row is None]
        if waiting and len(free) >= max(1, len(rows) // 8):      # one prefill for several requests
            picked = free[:len(waiting)]
            for s in picked:
                index, (prompt, key) = waiting.pop()
                rows[s] = SimpleNamespace(index=index, prompt=list(prompt), key=key, new=[])
            tokens = [decoder.start(picked, [rows[s].prompt for s in picked],
                                    [rows[s].key for s in picked])]
        else:
            if not waiting and len(free) > len(rows) // 2:       # the tail runs at its own size
                busy = [s for s, row in enumerate(rows) if row is not None]
                rows, decoder = [rows[s] for s in busy], decoder.keep(busy)
            picked = range(len(rows))                    # idle rows too: one batch
            tokens = decoder.steps(max(len(row.prompt + row.new) for row in rows if row) - 1)
        for step in tokens:
            for s, token in zip(picked, step):
                row = rows[s]
                if row is None or token == UNDECIDED:    # what comes after a stop is dropped
                    continue
                check(token != BAD, NOT_FINITE)
                row.new.append(token)
                stopped = token in stop_ids              # the stop token stays in the text
                if stopped or len(row.new) == max_new_tokens:
                    yield row.index, row.new, "stop" if stopped else "length"
                    rows[s] = None

def rows_that_fit(model, requests, max_new_tokens, slots):
    """`slots`, or as many rows as fit into memory if every one grows to its full length."""
    config, weight = model.config, model.lm_head.weight
    longest = max_new_tokens + max((len(prompt) for prompt, _ in requests), default=0)
    size = longest * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    size *= weight.dtype.itemsize            # bytes of a row
    fit = max(1, 0.8 * free_memory(weight.device) // size)   # 0.8: activations need some, too
    if fit < min(slots, len(requests)):
        say_once(f"{fit:.0f} of {slots} rows fit into memory: each of {longest:,} tokens may take "
                 f"{size / 1e9:.2g} GB")
    return int(min(slots, fit))

def free_memory(device):
    """Bytes that can still be allocated on a torch device; on a system that does not say, inf."""
    if device.type == "cuda":
        inside = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + inside
    system = Path("/proc/meminfo")
    if not system.exists():
        return math.inf
    return 1024 * int(re.search(r"MemAvailable: +(\d+)", system.read_text())[1])

@torch.no_grad()
def collect(model, requests, **settings):
    """All that `stream` yields, in the order of the requests -> [(token ids, finish reason)]."""
    done = {i: (ids, reason) for i, ids, reason in stream(model, requests, **settings)}
    return [done[i] for i in range(len(requests))]

def generate(model, prompts, max_new_tokens, temperature=0.6, top_p=0.95, top_k=0, samples=1,
             stop_ids=(), seed=0, slots=64):
    """prompts, lists of ids -> [prompt][sample] -> list of ids, the stop token included."""
    requests = []
    for i, prompt in enumerate(prompts):
        requests += [(prompt, (seed, i, j)) for j in range(samples)]
    done = collect(model, requests, max_new_tokens=max_new_tokens, temperature=temperature,
                   top_p=top_p, top_k=top_k, stop_ids=stop_ids, slots=slots)
    ids = [tokens for tokens, _ in done]
    return [ids[i * samples:(i + 1) * samples] for i in range(len(prompts))]
