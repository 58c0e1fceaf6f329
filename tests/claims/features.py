"""Reasoning features, and what single latents do to the answers (arXiv 2506.09967, section 5).

    python -m tests.claims.features [--quick] [--layers 1]       blocks of the embedded base
    python -m tests.claims.features --preset resa-still-v3 --bench math500 --sae DIR_OR_HUB_ID

The published rule: a latent active at <think> and </think> of a prompt and at no other token is a
reasoning feature.  Does it matter?  Latents of the rule, and those that first-order attribution
ranks highest, are ablated, then boosted, one at a time, while the model answers questions; and so
is their null sample, random latents of about their firing rates.  Results: OUT/table.txt,
OUT/numbers.json; how SAEs were trained: OUT/commands.sh.

B batch, T time, D width, F latents, V vocabulary, N = B T tokens, P prompts, R permutations.
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
from data.files import check, read_problems, write_json, write_text
from data.flags import (
    experiment_parser, front_door, parse_experiment, refuse_idle, run_commands, whole)
from data.formats import load_any
from model import choose_device, load_model, load_tokenizer, think_prefix
from sae import dense

# Always fresh SAEs; batch, rate and optimizer are the preset's.
SAE = "train.py --stage sae --init scratch --sae-from= --source {source} --steps {steps} --layer "
MEASURES = {"Pass@1": "correct", "thinks": "thinks"}         # a name, its field in a sample
CHANGES = ["ablate: Pass@1", "ablate: thinks", "boost: Pass@1", "boost: thinks"]

# ---- Which latents: by the published rule, by attribution, at random ---------------------------

@torch.no_grad()
def reasoning_features(model, sae, prompt_ids, open_id, close_id):
    """Latents active (z != 0) at every <think> and </think> of a prompt and at no other token."""
    ids = torch.tensor([prompt_ids], device=model.lm_head.weight.device)          # (1,T)
    x = resa.activations(model, ids, sae.meta["layer"], sae.meta["site"])         # (1,T,D)
    # At an attention sink no latent counts as active.
    on = (sae.encode(x)[0] != 0) & ~resa.is_sink(x, sae.meta.get("sink_norm")).T  # (T,F)
    tags = (ids[0] == open_id) | (ids[0] == close_id)                             # (T,)
    return (on[tags].all(0) & ~on[~tags].any(0)).nonzero()[:, 0].tolist()

def attribute(model, sae, documents, close_id):
    """documents [(prompt ids, answer ids)] -> rate, typical, attribution of each latent, (F,) each.

    rate, typical  fraction of tokens where it fires, and its mean value there
    attribution    mean over documents of |sum over tokens of z_f W_dec[f] . g|: what ablation does,
                   to first order, to the log odds of thinking, log (1 - p) / p, p = p(</think>)
                   after the prompt; g is their gradient by the activation"""
    tokens, totals, place = 0, torch.zeros(3, sae.n_latents), (sae.meta["layer"], sae.meta["site"])
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
        totals = totals + torch.stack([(z != 0).sum(0), z.sum(0), effect]).cpu()  # (3,F)
        tokens += len(z)
    fired, value, effect = totals                                                 # (F,) each
    return fired / tokens, value / fired.clamp(min=1), effect / len(documents)

def choose_latents(rate, attribution, rule, args):
    """rate, attribution (F,), latents of the rule -> {latent: [names of its groups]}.

    "ranked": the --top by attribution.  "rule": the first --top of the rule.  "null": for each of
    these, one at random of the 10 others that fire at the nearest rates."""
    chosen, rng = {}, np.random.default_rng(args.seed)
    order = attribution.argsort(descending=True, stable=True)[:args.top].tolist()
    ranked = [latent for latent in order if attribution[latent] > 0]      # it fires, and matters
    for group, latents in (("ranked", ranked), ("rule", rule[:args.top])):
        for latent in latents:
            chosen.setdefault(latent, []).append(group)      # a latent may be in both
    for latent in list(chosen):
        nearest = (rate - rate[latent]).abs().argsort(stable=True).tolist()       # F of them
        others = [f for f in nearest if f not in chosen and rate[f] > 0][:10]
        for null in rng.permutation(others)[:1].tolist():    # none, where no other latent fires
            chosen[null] = ["null"]
    return chosen

# ---- Their effects: one latent changed at every token, while the model answers -----------------

def steered(sae, latent, boost=None):
    """A function x -> x - z_f W_dec[f], f the latent; with a boost, x -> x + boost W_dec[f]."""
    def change(x):
        b = sae.batch(x)                     # x (B,T,D) keeps all that the SAE misses
        z = -dense(sae.codes(b))[:, latent] if boost is None else b.x.new_full((len(b.x),), boost)
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
    """Graded answers to problems: rows of eval.py, with "thinks": is there text before </think>?"""
    sampling = dict(max_new_tokens=args.max_new_tokens, temperature=0.6, top_p=0.95)  # as eval.py
    settings, rows = sampling | {"label": "features"}, []
    plan, ids_of = eval.make_plan(study.model, study.tokenizer, problems, 1, args.seed,
                                  settings, eval.BENCHES.get(args.bench, "{problem}"))
    for row in eval.generate_rows(study.model, study.tokenizer, [*plan.values()], ids_of,
                                  slots=128, **sampling):
        text = think_prefix(row["prompt"]) + row["completion"]
        thought = text.partition("<think>")[2].partition("</think>")[0]       # between the tags
        rows.append(row | {"thinks": bool(thought.strip())})
    return rows

def difference(rows, base):
    """Rows of `ask` -> {measure: [rows - base, low, high]}, paired by question: an effect."""
    found, plain = {}, {row["id"]: row for row in base}
    for name, field in MEASURES.items():
        change = [row[field] - plain[row["id"]][field] for row in rows]           # -1, 0 or 1
        found[name] = [*eval.paired_difference(change)[:3]]
    return found

def effects(study, sae, rule, args):
    """What single latents do to the answers, those of the rule and others.

    -> [{"latent", "chosen", "rate", "typical", "attribution", and for each of CHANGES its effect}]
    """
    rate, typical, attribution = attribute(study.model, sae, study.documents, study.tags[1])
    latents = []
    for latent, chosen in choose_latents(rate, attribution, rule, args).items():
        row = {"latent": latent, "chosen": chosen, "rate": float(rate[latent]),
               "typical": float(typical[latent]), "attribution": float(attribution[latent])}
        for how, boost in (("ablate", None), ("boost", row["typical"])):
            change = steered(sae, latent, boost)
            with resa.splice(study.model, change, sae.meta["layer"], sae.meta["site"]):
                found = difference(ask(study, study.bench, args), study.base)
            row |= {f"{how}: {name}": effect for name, effect in found.items()}
        latents.append(row)
    return latents

# ---- What the numbers say ----------------------------------------------------------------------

NOTE = """\
The model alone: Pass@1 {correct:.3f}, thinks {thinks:.3f}, the share of answers with text before
</think>; {n} held-out questions x 1.  Effects: differences, paired by question, 95 % intervals.
No latent touched, </think> forbidden as the first token: Pass@1 {forced[0]}, thinks {forced[1]}.
ablate: z W_dec is taken out where the latent fires.  boost: its mean value is added everywhere.
ranked: by attribution to the odds of thinking.  rule: active at both tags of a prompt only.
null: random latents of about their firing rates.  ranked - null: mean sizes of the effects, p by
permutation, not corrected for the number of comparisons."""

def permutation_gap(a, b, draws=10_000):
    """Two lists of numbers -> mean of a - mean of b, and p of that, two-sided, by permutation."""
    values, size = np.array([*a, *b], dtype=float), len(a)                        # (n,)
    shuffled = np.random.default_rng(0).permuted(np.tile(values, (draws, 1)), axis=1)
    rows = np.vstack([values, shuffled])                                          # (1+R,n)
    gap = rows[:, :size].mean(1) - rows[:, size:].mean(1)                         # (1+R,)
    return float(gap[0]), float(eval.permutation_p(abs(gap[0]), np.abs(gap[1:])))

def against_null(latents, group):
    """Sizes of a group's effects less the null's -> [(gap, p) of each of CHANGES]; [] if few."""
    found = []
    for change in CHANGES:
        sizes, null = ([abs(row[change][0]) for row in latents if name in row["chosen"]]
                       for name in (group, "null"))
        if sizes and len(null) > 1:
            found.append(permutation_gap(sizes, null))
    return found

def report(found, study):
    """{SAE: result} -> a table for each SAE, and what they say."""
    parts, cases = [], {"ranked": [], "rule": []}
    for spec, result in found.items():
        times, n, lines = result["rule"].values(), result["prompts"], []
        for row in result["latents"]:
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[change]) for change in CHANGES]
            lines.append([row["latent"], " ".join(row["chosen"]), f"{row['rate']:.1%}",
                          f"{row['attribution']:.3f}", *cells])
        for group, some in cases.items():
            gaps = against_null(result["latents"], group)
            some += gaps
            if gaps:
                cells = [f"{gap:+.3f}, p {p:.4f}" for gap, p in gaps]
                lines.append(["", f"{group} - null", "", "", *cells])
        parts += [f"{spec}: by the rule {sum(times) / n:.1f} latents a prompt, {len(times)} in at "
                  f"least one of {n}, {sum(t == n for t in times)} in all.",
                  eval.table(lines, ["latent", "chosen", "fires", "attribution", *CHANGES]), ""]
    for group, some in cases.items():
        larger = [gap > 0 for gap, p in some if p < 0.05]        # of those that differ at all
        parts.append(f"The {group} against the null: larger effects in {sum(larger)}, smaller in "
                     f"{len(larger) - sum(larger)} of {len(some)} cases (p < 0.05).")
    share = {name: np.mean([row[name] for row in study.base]) for name in MEASURES.values()}
    forced = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*study.forced[name]) for name in MEASURES]
    return "\n".join([*parts, "", NOTE.format(n=len(study.bench), forced=forced, **share)])

# ---- The command -------------------------------------------------------------------------------

def open_sae(spec, model):
    """An SAE of any layout, beside the model; its file says the layer and the site."""
    sae, width = load_any(spec).requires_grad_(False), model.config.hidden_size
    check(sae.d_in == width, f"{spec}: the SAE is {sae.d_in} wide, the model {width}")
    layer, site = sae.meta.get("layer"), sae.meta.get("site")
    check(None not in (layer, site), f"{spec}: does not say its layer and its site")
    resa.site_module(model, layer, site)     # ValueError: the model has no such place
    return sae.to(model.lm_head.weight.device)

def train_saes(args, count):
    """One SAE for each of --layers, by default of all `count` -> their directories."""
    layers = args.layers or range(count)
    run_commands({f"sae {layer}": f"{SAE}{layer}" for layer in layers}, args, "SAEs")
    return [f"{args.out}/sae-{layer}" for layer in layers]

def open_study(args):
    """-> Namespace: model, tokenizer; data, bench: questions; as ids: prompts of the rule, tags."""
    data, (bench, _) = read_problems(train.data_file(args.data)), eval.read_bench(args.bench)
    tokenizer = load_tokenizer(args.target)
    texts = [train.as_text(row, tokenizer, "chat") for row in bench[:20]]   # not the published one
    prompts = [tokenizer.encode(text) for text in texts]                          # [P][T]
    tags = [tokenizer.fast.token_to_id(tag) for tag in ("<think>", "</think>")]
    check(None not in tags, f"<think> and </think> are not tokens of {args.target}")
    model = load_model(args.target, args.dtype or "float32", choose_device(args.device))
    return Namespace(model=model, tokenizer=tokenizer, data=data[:args.questions],
                     bench=bench[:args.questions], prompts=prompts, tags=tags)

def answer_alone(study, args):
    """Adds answers of the model as it is, to --bench (base) and to --data (documents), and the

    effect of no latent, but of forbidding </think> as first token (forced)."""
    study.documents = []
    for row in ask(study, study.data, args):
        start = "" if think_prefix(row["prompt"]) else "<think>\n"      # then </think>, or not
        texts = row["prompt"] + start, row["completion"].removeprefix(start)
        study.documents.append([study.tokenizer.encode(text) for text in texts])
    study.base = ask(study, study.bench, args)
    with never_first(study.model, study.tags[1]):
        study.forced = difference(ask(study, study.bench, args), study.base)

def main(argv):
    parser = experiment_parser("python -m tests.claims.features", __doc__.split("\n")[0],
                               "source", "target", "data", "bench", "dtype")
    add = parser.add_argument
    # What is studied
    add("--sae", nargs="+", default=[], help="DIR_OR_HUB_ID[#HOOKPOINT] ...; else trained here")
    add("--layers", nargs="+", type=whole(0), default=[], help="blocks, from 0; by default all")
    add("--steps", type=whole(1), default=100, help="optimizer steps of an SAE")
    # How
    add("--seed", type=whole(0), default=0, help="of SAEs, answers and null samples")
    add("--questions", type=whole(1), default=300, help="of --bench and of --data, the first ones")
    add("--top", type=whole(1), default=5, help="latents of a layer by attribution, by the rule")
    add("--max-new-tokens", type=whole(1), default=2048, help="of an answer")
    args = parse_experiment(parser, argv, dict(questions=20, steps=4, top=1), "features")
    if args.sae:
        refuse_idle(args, "source steps workers layers", "--sae, which says what to study")
    study, found = open_study(args), {}
    specs = args.sae or train_saes(args, len(study.model.model.layers))
    saes = {spec: open_sae(spec, study.model) for spec in specs}         # mistakes end here
    answer_alone(study, args)
    for spec, sae in tqdm(saes.items(), "SAEs", disable=None):
        times = Counter()                        # {latent: number of prompts}
        for ids in study.prompts:
            times.update(reasoning_features(study.model, sae, ids, *study.tags))
        rule = dict(times.most_common())
        found[spec] = {"prompts": len(study.prompts), "rule": rule,
                       "latents": effects(study, sae, list(rule), args)}
    text = report(found, study)
    write_text(f"{args.out}/table.txt", text + "\n")
    write_json(f"{args.out}/numbers.json", {"forced": study.forced, "saes": found})
    print(f"{text}\n\n{args.out}")

if __name__ == "__main__":
    front_door(main)
