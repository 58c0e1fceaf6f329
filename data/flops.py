"""FLOPs per token of each stage, by the shapes of its matrix products; and what a GPU made of them.

B batch, T time, D width, V vocabulary.
"""

import torch
from torch import nn

def block_flops(model, T, start=0, stop=None, learns=False):
    """FLOPs of blocks start .. stop-1 in rows of T: forward; if it learns, backward and adapters.
    A weight takes 2 forward, 2 backward for its input, 2 if it is trained.  Causal attention takes
    2 T D forward, 2.5 times that backward.  Norms and softmax are left out."""
    config, n = model.config, 0
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0
    for block in model.model.layers[start:stop]:
        n += 2 * T * config.num_attention_heads * config.head_dim * (3.5 if learns else 1)
        for name, p in block.named_parameters():
            if p.dim() > 1 and (learns or "lora_" not in name):
                used = share if ".experts." in name else 1        # of an expert's weights
                n += 2 * p.numel() * used * (2 + p.requires_grad if learns else 1)
    return n

def training_flops(stage, args, model, sae=None):
    """FLOPs of training, and in --stage rl of sampling.  Without AuxK and the g of gsae."""
    T = args.max_new_tokens if stage == "rl" else args.seq_len
    D = model.config.hidden_size
    head, encoder, sparse = 2 * D * model.config.vocab_size, 0, 0
    saes = sae if isinstance(sae, nn.ModuleList) else [sae] * (sae is not None)
    for one in saes:
        encoder += 2 * D * one.n_latents
        sparse += 2 * D * getattr(one, "k", one.n_latents)       # z has K active latents alone
    if stage == "sae":                   # decodes, then makes four gradients
        stop = max(one.layer for one in saes) + 1
        return block_flops(model, T, 0, stop) + encoder + 5 * sparse
    if stage != "tune":                  # the backward pass makes the logits again
        n = block_flops(model, T, learns=True) + head * (4 if stage == "pretrain" else 3)
        passes = 1 + (args.beta > 0) if stage == "rl" else 0     # samples; the KL to the base
        return n + passes * (block_flops(model, T) + head)
    grad, below = args.sae_grad == "on", 0           # blocks that no gradient reaches
    if sae is not None and not grad and args.site == "resid":
        below = args.layer + 1
    n = block_flops(model, T) + block_flops(model, T, below, learns=True) + 3 * head
    if args.teacher == "source":         # else these run once for both, see resa.shares_prefix
        n += block_flops(model, T, 0, below)
    return n + encoder + sparse * (1 + 2 * grad)

# Dense bf16 FLOPs in a second, of data sheets, by what is in the card's name
PEAKS = {"A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "H100": 989e12, "H200": 989e12,
         "B200": 2250e12}

def on_gpu(device, flops):
    """{"gb": most memory held} and, of a known card, {"mfu": these FLOPs a second by its peak}."""
    card = torch.cuda.get_device_name(device)
    mfu = {"mfu": flops / peak for name, peak in PEAKS.items() if name in card}
    return mfu | {"gb": torch.cuda.max_memory_allocated(device) / 1e9}
