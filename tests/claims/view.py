"""One answer, token by token, under the features of an SAE: a page that needs nothing else.

    python -m tests.claims.view                      the embedded source under out/tiny/sae
    python -m tests.claims.view --source MODEL --sae DIR_OR_HUB_ID --prompt TEXT

OUT/view.html says of each feature that is active in the text where it is, how strongly, where else
in other text, and which tokens it promotes.

B batch, T time, D width, F latents, F' latents on the page, C chunks, M codes that are not 0.
"""

import json
from pathlib import Path

import torch

import resa
import train
from data.files import TINY, check, relative, write_text
from data.flags import (
    SEED, choose_device, experiment_parser, front_door, open_experiment, parse_experiment, real,
    whole)
from data.formats import load_any
from data.rows import read_problems
from model import collect, load_model, load_tokenizer

# ---- What is on the page -----------------------------------------------------------------------

@torch.no_grad()
def view_data(model, tokenizer, sae, ids, n_prompt, chunks, top=32, n_examples=4):
    """What view.html shows of the answer ids[n_prompt:], as JSON; sae.meta says where it reads.

    chunks (C,T)  the text that examples come from
    top           the strongest so many features of each token are kept, and only these described"""
    text = torch.tensor(ids, device=chunks.device)                                # (T,)
    x = resa.activations(model, text[None], sae.meta["layer"], sae.meta["site"])  # (1,T,D)
    token, latent, value = active_codes(sae, x)                                   # (M,) each
    check(len(token), "no feature is active in this text: there is nothing to show")
    kept, _ = strongest(token, value, top)
    shown, feature = latent[kept].unique(return_inverse=True)                     # (F',), (M,)
    position, code, times = examples(model, sae, chunks, shown, n_examples)
    # Each word is sent once; these three lists say which of them stands where.
    words = [text, chunks.flatten(), promoted(model, sae.W_dec[shown]).flatten()]
    used, word = torch.cat(words).unique(return_inverse=True)
    text, corpus, promotes = word.split([len(part) for part in words])
    lists = {"text": text, "corpus": corpus, "promotes": promotes, "latents": shown,
             "kept": token[kept].bincount(minlength=len(text)), "feature": feature,
             "value": value[kept].double().round(decimals=4),
             "times": times, "example": position.flatten(),
             "code": code.flatten().double().round(decimals=4)}
    return {"layer": sae.meta["layer"], "site": sae.meta["site"], "variant": sae.variant,
            "n_latents": sae.n_latents, "n_prompt": n_prompt, "seq_len": chunks.shape[1],
            "words": [tokenizer.decode([i], skip_special=False) or f"[{i}]" for i in used.tolist()],
            **{name: numbers.tolist() for name, numbers in lists.items()}}

@torch.no_grad()
def active_codes(sae, x):
    """x (B,T,D) -> (M,) each: token of B T, latent, value of every code that is not 0.
    At an attention sink no latent counts as active."""
    keep, found = (~resa.is_sink(x, sae.meta.get("sink_norm"))).flatten().nonzero()[:, 0], []
    for some in keep.split(256):         # dense codes of 65,536 latents: 64 MB at a time
        z = sae.encode(x.flatten(0, 1)[some].float())                             # (256,F)
        token, latent = z.nonzero(as_tuple=True)
        found.append((some[token], latent, z[token, latent]))
    return [torch.cat(parts) for parts in zip(*found)]

def strongest(group, value, n):
    """group, value (M,) -> indices of the n largest values by size of each group, their ranks."""
    order = value.abs().argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    first = torch.searchsorted(group[order], group[order])       # where its group begins
    rank = torch.arange(len(order), device=group.device) - first
    return order[rank < n], rank[rank < n]

def promoted(model, atoms):
    """atoms (F',D) -> (F',10): the tokens whose logits each raises most, by the logit lens.
    That is the final norm's weight, then lm_head; what later blocks make of an atom is left out."""
    atoms = atoms.to(model.lm_head.weight.dtype) * model.model.norm.weight        # (F',D)
    return torch.cat([model.lm_head(some).topk(10).indices for some in atoms.split(256)])

@torch.no_grad()
def examples(model, sae, chunks, shown, n):
    """chunks (C,T), latents (F',), ascending -> where each is strongest, codes there, (F',n) both,
    and on how many tokens it fires (F',).  Places count through all chunks; C T stands for none."""
    x = torch.cat([resa.activations(model, row, sae.meta["layer"], sae.meta["site"])
                   for row in chunks.split(1)])                                   # (C,T,D)
    token, latent, value = active_codes(sae, x)                                   # (M,) each
    which = torch.searchsorted(shown, latent).clamp(max=len(shown) - 1)
    known = shown[which] == latent
    token, which, value = token[known], which[known], value[known]
    best, rank = strongest(which, value, n)
    position = token.new_full((len(shown), n), chunks.numel())                    # (F',n)
    code = value.new_zeros(len(shown), n)                                         # (F',n)
    position[which[best], rank], code[which[best], rank] = token[best], value[best]
    return position, code, which.bincount(minlength=len(shown))

def write_page(path, data):
    """view.html with `data` in it as JSON.  ValueError: a number that is not finite."""
    # Tokens are a stranger's: without any < they cannot end the script element, and json escapes
    # all that is not ASCII, U+2028 included.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("%DATA%", text)
    write_text(path, page)

# ---- The command -------------------------------------------------------------------------------

def open_sae(spec, model):
    """An SAE of any layout, beside the model; its file says the layer and the site."""
    sae, width = load_any(spec).requires_grad_(False), model.config.hidden_size
    check(sae.d_in == width, f"{spec}: the SAE is {sae.d_in} wide, the model {width}")
    layer, site = sae.meta.get("layer"), sae.meta.get("site")
    check(None not in (layer, site), f"{spec}: does not say its layer and its site")
    resa.site_module(model, layer, site)     # ValueError: the model has no such place
    return sae.to(model.lm_head.weight.device)

def main(argv):
    parser = experiment_parser("python -m tests.claims.view", __doc__.split("\n")[0],
                               "source", "data", "dtype")
    add = parser.add_argument
    add("--sae", default="", help="DIR_OR_HUB_ID[#HOOKPOINT]; by default out/PRESET/sae")
    add("--prompt", default="", help="what the user asks; by default an embedded question")
    add("--max-new-tokens", type=whole(1), default=2048, help="of the answer")
    add("--temperature", type=real(0), default=0.6, help="0 is greedy")
    add("--seed", type=SEED, default=0, help="of the sample")
    add("--template", choices=("chat", "resa"), default="chat", help="as in train.py")
    add("--seq-len", type=whole(2), default=256, help="tokens in a chunk of --data")
    add("--chunks", type=whole(1), default=64, help="in which examples are looked for")
    args = parse_experiment(parser, argv, dict(max_new_tokens=32, chunks=2), "view")
    own = f"out/{args.preset}/sae"
    check(args.sae or Path(own).is_dir(), f"{own}: no SAE there; first run train.py --stage sae")
    model = load_model(args.source, args.dtype, choose_device(args.device))
    tokenizer, sae = load_tokenizer(args.source), open_sae(args.sae or own, model)
    chunks = train.load_chunks(args, tokenizer, model)[:args.chunks].to(sae.W_dec.device)  # (C,T)
    asked = args.prompt or read_problems(TINY / "test.jsonl")[0]["problem"]
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": asked}]))
    positions = model.config.max_position_embeddings
    check(len(prompt) < positions, f"the prompt fills all {positions} positions of the model")
    room = positions - len(prompt)
    # The sample of eval.py for its first problem with this seed.
    (answer, _), = collect(model, [(prompt, (args.seed, 0, 0))], temperature=args.temperature,
                           max_new_tokens=min(args.max_new_tokens, room),
                           stop_ids=tokenizer.eos_ids)
    data = view_data(model, tokenizer, sae, prompt + answer, len(prompt), chunks)
    data |= {"model": relative(args.source), "sae": relative(args.sae or own),
             "examples_from": relative(args.data)}
    open_experiment(args)
    write_page(f"{args.out}/view.html", data)
    print(f"{args.out}/view.html: {len(answer)} tokens of answer, {len(data['latents']):,} of "
          f"{sae.n_latents:,} features active")

if __name__ == "__main__":
    front_door(main)
