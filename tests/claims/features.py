"""Reasoning features, and what single latents do to the answers (arXiv 2506.09967, section 5).

    python -m tests.claims.features [--quick] [--layers 3]

The published rule: a latent active at <think> and </think> of a prompt and at no other token is a
reasoning feature.  Latents of the rule, those that first-order attribution ranks highest, and for
each a random one of about its firing rate, the null sample, are ablated one at a time, while the
model answers.  Results: OUT/table.txt, OUT/numbers.json; how SAEs were trained: OUT/commands.sh.

B batch, T time, D width, F latents, V vocabulary, P prompts, R permutations.
"""

import math
from argparse import Namespace
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import eval
import resa
import train
from data.files import check, write_json, write_text
from data.flags import (
    SEED, choose_device, experiment_parser, front_door, open_experiment, parse_experiment,
    run_commands, whole)
from data.formats import load_any
from data.rows import read_columns, read_problems
from model import Config, load_model, load_tokenizer, think_prefix
from sae import dense

# Always fresh SAEs; batch, rate and optimizer are the preset's.
SAE = "train.py --stage sae --init scratch --sae-from= --source {source} --steps {steps} --layer "

# ---- Which latents: by the published rule, by attribution, at random ---------------------------

@torch.no_grad()
def reasoning_features(model, sae, prompt_ids, open_id, close_id):
    """Latents active (z != 0, no sink) at every <think> and </think> and at no other token."""
    ids = torch.tensor([prompt_ids], device=model.lm_head.weight.device)          # (1,T)
    x = resa.activations(model, ids, sae.meta["layer"], sae.meta["site"])         # (1,T,D)
    on = (sae.encode(x)[0] != 0) & ~resa.is_sink(x, sae.meta.get("sink_norm")).T  # (T,F)
    tags = (ids[0] == open_id) | (ids[0] == close_id)                             # (T,)
    return (on[tags].all(0) & ~on[~tags].any(0)).nonzero()[:, 0].tolist()

def attribute(model, sae, documents, close_id):
    """documents [(prompt ids, answer ids)] -> rate, attribution of each latent, (F,) both.
    rate         fraction of tokens where it fires
    attribution  mean over documents of |sum over tokens of z_f W_dec[f] . g|: what ablation does,
                 to first order, to the log odds of thinking, log (1 - p) / p, p = p(</think>)
                 after the prompt; g is their gradient by the activation"""
    tokens, totals, place = 0, torch.zeros(2, sae.n_latents), (sae.meta["layer"], sae.meta["site"])
    for prompt, answer in documents:
        ids = torch.tensor([prompt + answer], device=model.lm_head.weight.device)  # (1,T)
        x = resa.activations(model, ids, *place).requires_grad_()                 # (1,T,D)
        with resa.hooked(model, *place, lambda _: x):    # the same values, as a leaf
            h = model.run(ids)                                                    # (1,T,D)
        logits = model.head(h[0, len(prompt) - 1]).float()                        # (V,)
        others = logits.clone()                                                   # (V,)
        others[close_id] = -math.inf         # log (1 - p) / p = logsumexp of others - its logit
        g, = torch.autograd.grad(others.logsumexp(0) - logits[close_id], x)       # (1,T,D)
        x = x.detach()
        b = sae.batch(x)
        z = dense(sae.codes(b)) * ~resa.is_sink(x, sae.meta.get("sink_norm")).T   # (T,F)
        effect = (z * ((g[0].to(z.dtype) * b.scale) @ sae.W_dec.T)).sum(0).abs()  # (F,)
        totals = totals + torch.stack([(z != 0).sum(0), effect]).cpu()            # (2,F)
        tokens += len(z)
    return totals[0] / tokens, totals[1] / len(documents)

def choose_latents(rate, attribution, rule, args):
    """rate, attribution (F,), latents of the rule -> {latent: [names of its groups]}.
    "ranked": the --top by attribution.  "rule": the first --top of the rule.  "null": for each of
    these, one at random of the 10 others that fire at the nearest rates."""
    chosen, rng = {}, np.random.default_rng(args.seed)
    ranked = attribution.argsort(descending=True, stable=True).tolist()           # F of them
    for group, latents in (("ranked", ranked), ("rule", rule)):
        for latent in latents[:args.top]:
            chosen.setdefault(latent, []).append(group)      # a latent may be in both
    for latent in list(chosen):
        nearest = (rate - rate[latent]).abs().argsort(stable=True).tolist()       # F of them
        others = [f for f in nearest if f not in chosen and rate[f] > 0][:10]
        for null in rng.permutation(others)[:1].tolist():    # none, where no other latent fires
            chosen[null] = ["null"]
    return chosen

# ---- Their effects: one latent ablated wherever it fires, while the model answers --------------

def ablated(sae, latent):
    """A function x -> x - z_f W_dec[f], f the latent."""
    def change(x):
        b = sae.batch(x)                     # x (B,T,D) keeps all that the SAE misses
        z = -dense(sae.codes(b))[:, latent]  # (N,), N = B T
        return x + (z[:, None] * sae.W_dec[latent] * b.scale).to(x.dtype).view_as(x)
    change.meta = sae.meta                   # where resa.insert finds what a sink is
    return change

def never_first(model, token):
    """A context: inside it no answer begins with this token."""
    def forbid(module, inputs, logits):
        if logits.dim() == 2:                # (P,V) after prompts; later steps have (.,1,V)
            logits[:, token] = -math.inf
    return model.lm_head.register_forward_hook(forbid)

@torch.no_grad()
def ask(study, problems, args):
    """One graded answer to each problem: {id: row of eval.py}."""
    who, asked = (study.model, study.tokenizer), eval.bench_prompt(args.bench)
    sampling = dict(max_new_tokens=args.max_new_tokens, temperature=0.6, top_p=0.95)  # as eval.py
    settings = sampling | {"label": "features"}
    plan, ids_of = eval.make_plan(*who, problems, 1, args.seed, settings, asked)
    rows = eval.generate_rows(*who, [*plan.values()], ids_of, slots=128, **sampling)
    return {row["id"]: row for row in rows}

def effect(study, args):
    """What a change of the model does to Pass@1: [difference, low, high], paired by question."""
    rows = ask(study, study.bench, args)
    change = [row["correct"] - study.base[i]["correct"] for i, row in rows.items()]  # -1, 0 or 1
    return [*eval.paired_difference(change)[:3]]

def measure(study, sae, args):
    """-> {"rule": {latent: number of prompts}, "latents": [what each is, and the effect of it]}."""
    times, latents = Counter(), []
    for ids in study.prompts:
        times.update(reasoning_features(study.model, sae, ids, *study.tags))
    rule = dict(times.most_common())
    rate, attribution = attribute(study.model, sae, study.documents, study.tags[1])
    for latent, groups in choose_latents(rate, attribution, [*rule], args).items():
        with resa.splice(study.model, ablated(sae, latent), sae.meta["layer"], sae.meta["site"]):
            found = effect(study, args)
        latents.append({"latent": latent, "groups": groups, "rate": float(rate[latent]),
                        "attribution": float(attribution[latent]), "effect": found})
    return {"rule": rule, "latents": latents}

# ---- What the numbers say ----------------------------------------------------------------------

NOTE = """\
The model alone: Pass@1 {alone:.3f} on {n} held-out questions.  No latent touched, </think>
forbidden as the first token: {forced}.
Effects: differences from the model alone, paired by question, 95 % intervals.  p: of their sizes,
by permutation, not corrected for the number of comparisons."""

def permutation_gap(a, b, draws=10_000):
    """Two lists of numbers -> mean of a - mean of b, and p of that, two-sided, by permutation."""
    values, size = np.array([*a, *b], dtype=float), len(a)                        # (n,)
    shuffled = np.random.default_rng(0).permuted(np.tile(values, (draws, 1)), axis=1)
    rows = np.vstack([values, shuffled])                                          # (1+R,n)
    gap = rows[:, :size].mean(1) - rows[:, size:].mean(1)                         # (1+R,)
    return float(gap[0]), float(eval.permutation_p(abs(gap[0]), np.abs(gap[1:])))

def report(found, study):
    """{SAE: what `measure` found} -> a table for each, with groups against the null, and NOTE."""
    parts, n = [], len(study.prompts)
    for name, result in found.items():
        times, lines, sizes = result["rule"].values(), [], {"ranked": [], "rule": [], "null": []}
        for row in result["latents"]:
            lines.append([row["latent"], " ".join(row["groups"]), f"{row['rate']:.1%}",
                          f"{row['attribution']:.3f}", eval.bracketed(*row["effect"], "+")])
            for group in row["groups"]:
                sizes[group].append(abs(row["effect"][0]))
        for group in ("ranked", "rule"):
            if sizes[group] and len(sizes["null"]) > 1:
                gap, p = permutation_gap(sizes[group], sizes["null"])
                lines.append(["", f"{group} - null", "", "", f"{gap:+.3f}, p {p:.4f}"])
        parts += [f"{name}: by the rule {sum(times) / n:.1f} latents a prompt, "
                  f"{sum(t == n for t in times)} in all of {n}.",
                  eval.table(lines, ["latent", "chosen", "fires", "attribution", "ablated"]), ""]
    alone = np.mean([row["correct"] for row in study.base.values()])
    forced = eval.bracketed(*study.forced, "+")
    return "\n".join([*parts, NOTE]).format(n=len(study.base), alone=alone, forced=forced)

# ---- The command -------------------------------------------------------------------------------

def open_study(args):
    """The model, and its answers as it is: to --data (documents), to --bench (base)."""
    data = read_problems(train.data_file(args.data), read_columns(args.fields))
    bench, _ = eval.read_bench(args.bench, args.fields)
    tokenizer = load_tokenizer(args.target)
    tags = [tokenizer.fast.token_to_id(tag) for tag in ("<think>", "</think>")]
    check(None not in tags, f"<think> and </think> are not tokens of {args.target}")
    model = load_model(args.target, args.dtype or "float32", choose_device(args.device))
    texts = [train.as_text(row, tokenizer, "chat") for row in bench[:20]]   # not the published one
    study = Namespace(model=model, tokenizer=tokenizer, tags=tags, bench=bench[:args.questions],
                      prompts=[tokenizer.encode(text) for text in texts], documents=[])
    for row in ask(study, data[:args.questions], args).values():
        start = "" if think_prefix(row["prompt"]) else "<think>\n"      # then </think>, or not
        pair = row["prompt"] + start, row["completion"].removeprefix(start)
        study.documents.append([tokenizer.encode(text) for text in pair])
    study.base = ask(study, study.bench, args)
    with never_first(model, tags[1]):
        study.forced = effect(study, args)
    return study

def main(argv):
    parser = experiment_parser("python -m tests.claims.features", __doc__.split("\n")[0],
                               "source", "target", "data", "bench", "dtype")
    add = parser.add_argument
    add("--layers", nargs="+", type=whole(0), help="blocks, from 0; by default all")
    add("--steps", type=whole(1), default=100, help="optimizer steps of an SAE")
    add("--seed", type=SEED, default=0, help="of SAEs, answers and null samples")
    add("--questions", type=whole(1), default=300, help="of --bench and of --data, the first ones")
    add("--top", type=whole(1), default=5, help="latents of a layer by attribution, by the rule")
    add("--max-new-tokens", type=whole(1), default=2048, help="of an answer")
    args = parse_experiment(parser, argv, dict(questions=20, steps=4, top=1), "features")
    eval.read_bench(args.bench, args.fields)     # a mistake shows before anything is trained
    layers = args.layers or range(Config.from_pretrained(args.target).num_hidden_layers)
    open_experiment(args)
    run_commands({f"sae {layer}": f"{SAE}{layer}" for layer in layers}, args, "SAEs")
    study, found = open_study(args), {}
    for layer in tqdm(layers, "effects", disable=None):
        sae = load_any(f"{args.out}/sae-{layer}").requires_grad_(False)
        found[f"sae-{layer}"] = measure(study, sae.to(study.model.lm_head.weight.device), args)
    text = report(found, study)
    write_text(f"{args.out}/table.txt", text + "\n")
    write_json(f"{args.out}/numbers.json", {"forced": study.forced, "saes": found})
    print(f"{text}\n\n{args.out}")

if __name__ == "__main__":
    front_door(main)
