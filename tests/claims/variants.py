"""Every SAE variant beside the others: on a model's activations, and where the truth is known.

    python -m tests.claims.variants [--only recover] [--variants topk gba] [--seeds 1]

compare   same activations, same budget -> OUT/compare.txt
recover   activations of a known dictionary: which directions are found? -> OUT/recover.txt
N tokens, D width, F latents, n true directions.
"""

import math
from argparse import Namespace
from functools import partial

import torch
from torch.nn import functional as fn
from tqdm import tqdm

import eval
import train
from data.files import read_json, write_text
from data.flags import (
    choose_device, experiment_parser, front_door, open_experiment, parse_experiment, refuse_idle,
    run_commands, slug, whole)
from sae import VARIANTS, build, init_b_dec, make_optimizer, metrics

# ---- Compare: one training for each variant and seed, by train.py ------------------------------

TRAIN = "train.py --stage sae --source {source} --steps {steps} --batch 16 --latents 1024"
# Stands for k: chosen so that L0 comes near 16 at the defaults, by no other number.
PENALTY = {"relu": " --set l1=0.35", "gated": " --set l1=0.6"}

# Column -> (name in the summary, format); the columns of SPREAD also show least .. most.
COMPARED = {
    "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f"), "dead": ("dead", ".1%"),
    "cosine": ("cosine", ".3f"), "CE": ("ce_sae", ".3f"), "KL": ("kl", ".3f"),
    "recovered": ("recovered_mean", ".1%"), "s": ("seconds", ".0f")}
SPREAD = ("fvu", "recovered_mean", "at_9")
COMPARE_NOTE = """\
{steps} steps x {tokens:,.0f} tokens, F 1024, k 16 where it can be set; {seeds} seeds: mean, and
least .. most.  Compare rows of similar L0.  CE, KL: nats per token on {held:,} held-out tokens; CE
of the model alone: {ce:.3f}.  recovered: of the damage of mean ablation.  s: of one training."""

def command(variant):
    words = f"{TRAIN} --variant {variant}"
    words += " --k 16" if "k" in VARIANTS[variant].defaults else PENALTY.get(variant, "")
    if variant != "itda":                # it has no learning rate; 0: the optimizer's own rule
        words += " --lr 0 --schedule constant"
    return words

def compare(args):
    """-> {variant: [summary of a seed]}, and the note for the table."""
    found = {name: [] for name in args.variants}
    for args.seed in range(args.seeds):
        arms = {name: f"{name}-{args.seed}" for name in args.variants}
        run_commands({arms[name]: command(name) for name in arms}, args, f"seed {args.seed}")
        for name, arm in arms.items():
            found[name].append(read_json(f"{args.out}/{slug(arm)}/summary.json"))
    one = found[args.variants[0]][0]
    return found, COMPARE_NOTE.format(**vars(args), tokens=one["tokens"] / one["steps"],
                                      held=one["n_tokens"], ce=one["ce"])

# ---- Recover: synthetic activations, whose dictionary is known ---------------------------------

# n true directions in D dimensions; size and k of the SAE (11.5 are active on average); training.
TOY = dict(n=128, width=42, latents=256, k=12, tokens=512, lr=2e-3)
RECOVERED = {
    "mean max cosine": ("mmcs", ".3f"), "found at .8": ("at_8", ".1%"),
    "found at .9": ("at_9", ".1%"), "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f")}
RECOVER_NOTE = """\
{n} directions in {width} dimensions, 3 or 20 of them active, unit norm (arXiv 2506.14002); {steps}
steps x {tokens} tokens, F {latents}, k {k} where it can be set, Adam at {lr}; {seeds} seeds: mean,
least .. most.  found at .9: directions to which some atom has a cosine above 0.9, of either sign
where codes are signed."""

def recover(args):
    """-> {variant: [what one training found]}, and the note for the table."""
    torch.set_num_threads(1)             # fastest for tensors this small
    device, found = choose_device(args.device or None), {}
    for name in tqdm(args.variants, desc="recover", unit="SAE", disable=None):
        found[name] = [recover_one(name, seed, args.steps, device) for seed in range(args.seeds)]
    return found, RECOVER_NOTE.format(**TOY, steps=args.steps, seeds=args.seeds)

def recover_one(variant, seed, steps, device):
    """Trains one SAE on synthetic activations -> {name: number}."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)              # for variants that draw noise
    true = fn.normalize(torch.randn(TOY["n"], TOY["width"], generator=rng), dim=1)      # (n,D)
    own = {"k": TOY["k"]} if "k" in VARIANTS[variant].defaults else {}
    sae = build(variant, TOY["width"], TOY["latents"], seed=seed, **own).to(device)
    draw = partial(synthetic, true, rng, device)
    draws = (draw() for _ in range(steps))                                        # (N,D) each
    batches = ([(x, torch.zeros_like(x))] for x in draws)        # no gradient: gsae is TopK here
    init_b_dec(sae, draw(4096))
    optimizer = make_optimizer(sae, "adam", TOY["lr"])
    rate = Namespace(lr=TOY["lr"], schedule="linear", warmup=0, steps=steps)
    list(train.train_sae(sae, batches, optimizer, rate))       # a generator: list() runs it
    if not sae.per_token:                # tokens competed: their threshold is measured
        sae.calibrate(draw() for _ in range(16))
    atoms = fn.normalize(sae.W_dec.detach().cpu(), dim=1)                         # (F,D)
    cosine = true @ atoms.T                                                       # (n,F)
    if sae.signed:                       # an atom used with negative codes is its opposite
        cosine = cosine.abs()
    best = cosine.amax(1)                                                         # (n,)
    found = {f"at_{n}": float((best > n / 10).float().mean()) for n in (8, 9)}
    return metrics(sae, draw(8192)) | found | {"mmcs": float(best.mean())}

def synthetic(dictionary, rng, device, count=TOY["tokens"]):
    """True directions (n,D) -> unit activations (count,D): sums of 3 or of 20, at even odds."""
    n = len(dictionary)
    active = torch.where(torch.rand(count, 1, generator=rng) < 0.5, 3, 20)        # (N,1)
    rank = torch.rand(count, n, generator=rng).argsort(1).argsort(1)              # a random order
    return fn.normalize((rank < active).float() @ dictionary, dim=1).to(device)   # (N,D)

# ---- Tables, command line ----------------------------------------------------------------------

STUDIES = {"compare": (compare, COMPARED, 100), "recover": (recover, RECOVERED, 2000)}      # steps

def row(variant, runs, columns):
    """Means over seeds, for some columns also the range."""
    cells = [variant]
    for key, form in columns.values():
        values = [run.get(key, math.nan) for run in runs]      # none where ablation did no damage
        spread = f" {min(values):{form}} .. {max(values):{form}}" if key in SPREAD else ""
        cells.append(f"{sum(values) / len(values):{form}}{spread}")
    return cells

def main(argv):
    parser = experiment_parser(
        "python -m tests.claims.variants", __doc__, "source", "data", "dtype")
    add = parser.add_argument
    add("--only", choices=STUDIES, help="by default both")
    add("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="which SAEs")
    add("--seeds", type=whole(1), default=3, help="trainings of each: seeds 0, 1, ..")
    add("--steps", type=whole(0), default=0, help="optimizer steps; 0: 100 and 2,000")
    args = parse_experiment(parser, argv, dict(seeds=1, steps=4), "variants")
    if args.only == "recover":
        refuse_idle(args, "source data dtype", "--only recover: it has no model")
    open_experiment(args)
    for name in [args.only] if args.only else STUDIES:
        study, columns, steps = STUDIES[name]
        found, note = study(Namespace(**vars(args) | {"steps": args.steps or steps}))
        rows = [row(variant, runs, columns) for variant, runs in found.items()]
        text = f"{eval.table(rows, ['variant', *columns])}\n\n{note}\n"
        write_text(f"{args.out}/{name}.txt", text)
        print(f"{text}\n{args.out}/{name}.txt\n")

if __name__ == "__main__":
    front_door(main)
