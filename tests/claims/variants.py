"""Every SAE variant beside the others: on a model's activations, and where the truth is known.

    python -m tests.claims.variants [--only recover] [--variants topk gba] [--seeds 1]

compare   same activations, same budget -> OUT/compare.txt; commands are noted in OUT/commands.sh
recover   activations made of a known dictionary: which of its directions does an SAE find?
          There is no model; SAEs are trained here, one after the other -> OUT/recover.txt
N tokens, D width, F latents, n true directions.
"""

import math
from argparse import Namespace
from itertools import product

import torch
from torch.nn import functional as fn
from tqdm import tqdm

import eval
import train
from data.files import read_json, write_text
from data.flags import (
    experiment_parser, front_door, parse_experiment, refuse_idle, run_commands, slug, whole)
from model import choose_device
from sae import VARIANTS, build, init_b_dec, make_optimizer, metrics

# ---- Compare: one training for each variant and seed, by train.py ------------------------------

TRAIN = "train.py --stage sae --source {source} --steps {steps} --batch {batch} --latents {latents}"
# Stands for k: chosen so that L0 comes near 16 at the defaults, by no other number.
PENALTY = {"relu": " --set l1=0.35", "gated": " --set l1=0.6"}

# Column -> (name in the summary, format); the columns of SPREAD also show least .. most.
COMPARED = {
    "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f"), "dead": ("dead", ".1%"),
    "cosine": ("cosine", ".3f"), "CE": ("ce_sae", ".3f"), "KL": ("kl", ".3f"),
    "recovered": ("recovered_mean", ".1%"), "s": ("seconds", ".0f")}
SPREAD = ("fvu", "recovered_mean", "at_9")
COMPARE_NOTE = """\
{steps} steps x {tokens:,.0f} tokens, F {latents}, k {k} where it can be set; {seeds} seeds: means,
and least .. most.  Compare rows of similar L0.  {held:,} held-out tokens.  CE, KL: nats per token
with the SAE; CE of the model alone: {ce:.3f}.  recovered: fraction of the damage of mean ablation
that the SAE undoes.  s: seconds of one training."""

def command(variant):
    """The command line that trains a variant."""
    words = f"{TRAIN} --variant {variant}"
    words += " --k {k}" if "k" in VARIANTS[variant].defaults else PENALTY.get(variant, "")
    if variant != "itda":                # it has no learning rate; 0: the optimizer's own rule
        words += " --lr 0 --schedule constant"
    return words

def compare(args):
    """-> {variant: [summary of a seed]}, and the note for the table."""
    for seed in range(args.seeds):
        commands = {f"{name}-{seed}": command(name) for name in args.variants}
        own = Namespace(**vars(args) | {"seed": seed})
        run_commands(commands, own, f"seed {seed}")
    found = {name: [] for name in args.variants}
    for name, seed in product(args.variants, range(args.seeds)):
        found[name].append(read_json(f"{args.out}/{slug(f'{name}-{seed}')}/summary.json"))
    summary = found[args.variants[0]][0]
    return found, COMPARE_NOTE.format(**vars(args), tokens=summary["tokens"] / summary["steps"],
                                      held=summary["n_tokens"], ce=summary["ce"])

# ---- Recover: synthetic activations, whose dictionary is known ---------------------------------

# n true directions in D dimensions; size and k of the SAE (11.5 are active on average); training.
TOY = dict(n=128, width=42, latents=256, k=12, tokens=512, lr=2e-3)
RECOVERED = {
    "mean max cosine": ("mmcs", ".3f"), "found at .8": ("at_8", ".1%"),
    "found at .9": ("at_9", ".1%"), "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f")}
RECOVER_NOTE = """\
{n} directions in {width} dimensions, 3 or 20 of them active, unit norm (arXiv 2506.14002); {steps}
steps x {tokens} tokens, F {latents}, k {k} where it can be set, Adam at {lr}; {seeds} seeds: means,
and least .. most.  found at .9: directions to which some atom has a cosine above 0.9."""

def recover(args):
    """-> {variant: [what one training found]}, and the note for the table."""
    torch.set_num_threads(1)             # fastest for tensors this small
    device, found = choose_device(args.device or None), {name: [] for name in args.variants}
    pairs = [*product(args.variants, range(args.seeds))]
    for name, seed in tqdm(pairs, desc="recover", unit="SAE", disable=None):
        found[name].append(recover_one(name, seed, args.steps, device))
    return found, RECOVER_NOTE.format(**TOY, steps=args.steps, seeds=args.seeds)

def recover_one(variant, seed, steps, device):
    """Trains one SAE on synthetic activations -> {name: number}."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)              # for variants that draw noise
    true = fn.normalize(torch.randn(TOY["n"], TOY["width"], generator=rng), dim=1)      # (n,D)
    own = {"k": TOY["k"]} if "k" in VARIANTS[variant].defaults else {}
    sae = build(variant, TOY["width"], TOY["latents"], seed=seed, **own).to(device)

    def draw(count=TOY["tokens"]):
        return synthetic(true, count, rng).to(device)                             # (count,D)

    def batches():
        for _ in range(steps):
            x = draw()
            yield [(x, torch.zeros_like(x))]      # no model, no gradient: gsae is TopK here

    init_b_dec(sae, draw(4096))
    optimizer = make_optimizer(sae, "adam", TOY["lr"])
    rate = Namespace(lr=TOY["lr"], schedule="linear", warmup=0, steps=steps)
    list(train.train_sae(sae, batches(), optimizer, rate))       # a generator: list() runs it
    if not sae.per_token:                # tokens competed: their threshold is measured
        sae.calibrate(draw() for _ in range(16))
    atoms = fn.normalize(sae.W_dec.detach().cpu(), dim=1)                         # (F,D)
    best = (true @ atoms.T).amax(1)                                               # (n,), signed
    found = {f"at_{n}": float((best > n / 10).float().mean()) for n in (8, 9)}
    return metrics(sae, draw(8192)) | found | {"mmcs": float(best.mean())}

def synthetic(dictionary, count, rng):
    """True directions (n,D) -> unit activations (count,D): sums of 3 or of 20, at even odds."""
    n = len(dictionary)
    active = torch.where(torch.rand(count, 1, generator=rng) < 0.5, 3, 20)        # (N,1)
    rank = torch.rand(count, n, generator=rng).argsort(1).argsort(1)              # a random order
    return fn.normalize((rank < active).float() @ dictionary, dim=1)              # (N,D)

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
    parser = experiment_parser("python -m tests.claims.variants", __doc__.split("\n")[0],
                               "source", "data", "dtype")
    add = parser.add_argument
    add("--only", choices=STUDIES, help="by default both")
    add("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="which SAEs")
    add("--seeds", type=whole(1), default=3, help="trainings of each: seeds 0, 1, ..")
    add("--steps", type=whole(0), default=0, help="optimizer steps; 0: 100 and 2,000")
    # Of compare
    add("--batch", type=whole(1), default=16, help="chunks in a step")
    add("--latents", type=whole(1), default=1024, help="size of the dictionary")
    add("--k", type=whole(1), default=16, help="active latents per token, where it can be set")
    args = parse_experiment(parser, argv, dict(seeds=1, steps=4), "variants")
    if args.only == "recover":
        refuse_idle(args, "source data batch latents k dtype", "--only recover: it has no model")
    for name in [args.only] if args.only else STUDIES:
        study, columns, steps = STUDIES[name]
        found, note = study(Namespace(**vars(args) | {"steps": args.steps or steps}))
        rows = [row(variant, runs, columns) for variant, runs in found.items()]
        text = f"{eval.table(rows, ['variant', *columns])}\n\n{note}"
        write_text(f"{args.out}/{name}.txt", text + "\n")
        print(f"{text}\n\n{args.out}/{name}.txt\n")

if __name__ == "__main__":
    front_door(main)
