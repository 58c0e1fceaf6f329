"""What SAEs miss: the error in two parts, linear in the activation and not (arXiv 2410.14670).

    python -m tests.claims.errors                  SAEs of four widths, three seeds: minutes
    python -m tests.claims.errors --source MODEL --sae DIR_OR_HUB_ID[#HOOKPOINT] --data FILE

    x = x_hat + e,  e = e_lin + e_nl        e_lin = line(x): least squares of e on x, with a bias

Results: OUT/table.txt, a row for each number, a column for each width; OUT/numbers.json, by seed;
OUT/commands.sh, how the SAEs were trained.

N tokens, n chunks of T, D width, F latents, P and Q columns, W dictionaries of different widths.
"""

from argparse import Namespace

import torch

import eval
import train
from data.files import check, write_json, write_text
from data.flags import (command_lines, experiment_parser, front_door, parse_experiment, real,
                        refuse_idle, run_commands, whole)
from data.formats import load_any
from model import load_model, load_tokenizer
from resa import activations, is_sink
from sae import metrics

# ---- The error in parts ------------------------------------------------------------------------

@torch.no_grad()
def fit_affine(u, y, ridge=1e-6):
    """Least squares of y (N,Q) on u (N,P) with a bias, in fp64 -> a function (M,P) -> (M,Q).

    ridge: added to the covariance of u, in units of its mean diagonal.  0: the smallest solution.
    """
    u, y = u.double(), y.double()
    du, dy = u - u.mean(0), y - y.mean(0)
    cov = du.T @ du                                                               # (P,P)
    cov.diagonal().add_(ridge * cov.diagonal().mean())
    matrix = torch.linalg.pinv(cov, hermitian=True) @ (du.T @ dy)                 # (P,Q)
    bias = y.mean(0) - u.mean(0) @ matrix                                         # (Q,)

    def line(u):
        return (u.double() @ matrix + bias).to(u.dtype)
    return line

def r2(y, y_hat):
    """(N,Q) twice -> fraction of the variance of y explained: pooled, and the mean over columns."""
    left, total = (y - y_hat).pow(2).sum(0), (y - y.mean(0)).pow(2).sum(0)        # (Q,)
    tiny = torch.finfo(y.dtype).tiny
    by_column = 1 - left / total.clamp_min(tiny)
    return float(1 - left.sum() / total.sum().clamp_min(tiny)), float(by_column.mean())

def linear_r2(u, y, n_fit, ridge=1e-6):
    """Pooled R2 of y (N,Q) or (N,) from u (N,P): fitted on n_fit rows, measured on the others."""
    u, y = u.double(), y.double().view(len(y), -1)
    return r2(y[n_fit:], fit_affine(u[:n_fit], y[:n_fit], ridge)(u[n_fit:]))[0]

@torch.no_grad()
def decompose_error(x, x_hat, n_fit=None, ridge=1e-6):
    """Activations and reconstructions (N,D), without sinks -> line, {label: number}.

    n_fit  the line is fitted on the first n_fit rows, by default half, and measured on the others
           ("in-sample": on the same).  Rows are in the order of the text: neighbours are alike.
    Read R2 with FVU: shrinkage is linear, so a dead SAE has an R2 of 1.  e_nl is an upper bound: it
    also holds what noise hides from the line.  ValueError: shapes differ, or too few rows."""
    check(x.shape == x_hat.shape and x.dim() == 2, f"activations {tuple(x.shape)} and "
          f"reconstructions {tuple(x_hat.shape)} must both be (N,D)")
    (n, d), n_fit = x.shape, len(x) // 2 if n_fit is None else n_fit
    check(d < n_fit < n - 1, f"{n_fit} of {n} tokens to fit a line on, in {d} dimensions: from "
          f"{d + 1} to {n - 2} are needed; give more text")
    x, e, found = x.double(), x.double() - x_hat.double(), {}
    line = fit_affine(x[:n_fit], e[:n_fit], ridge)
    for where, rows in (("", slice(n_fit, None)), (", in-sample", slice(n_fit))):
        e_lin, variance = line(x[rows]), (x[rows] - x[rows].mean(0)).pow(2).sum()
        found[f"FVU of e{where}"] = float(e[rows].pow(2).sum() / variance)
        found[f"FVU of e_nl{where}"] = float((e[rows] - e_lin).pow(2).sum() / variance)
        pooled, mean = r2(e[rows], e_lin)
        found[f"R2 of e from x{where}"] = pooled
        found[f"R2 of e from x, mean over dimensions{where}"] = mean
    square, norm = e.pow(2).sum(1), x.norm(dim=1)                                 # (N,)
    found["R2 of |e|^2 from x"] = linear_r2(x, square, n_fit, ridge)
    sizes = torch.stack([norm, norm**2], 1)                                       # (N,2)
    found["R2 of |e|^2 from |x| alone"] = linear_r2(sizes, square, n_fit, ridge)
    return line, found

def put_back(sae, line, linear):
    """A function of x: x_hat with one part of the error added, e_lin or e_nl.  For resa.splice."""
    def module(x):
        return sae(x) + line(x) if linear else x - line(x)
    module.meta = sae.meta               # says what a sink is
    return module

# ---- One study: the SAEs of one seed, on held-out text -----------------------------------------

TRAIN = ("train.py --stage sae --source {source} --k {k} --seq-len {seq_len} --steps {steps} "
         "--batch {batch} --lr {lr} --schedule linear --layer {layer} --site {site}")

def train_saes(args, seed):
    """One SAE for each width -> their directories."""
    commands = {}
    for width in sorted(set(args.widths)):
        commands[f"sae-{width}-{seed}"] = f"{TRAIN} --latents {width}"
    run_commands(commands, Namespace(**vars(args) | {"seed": seed}), f"seed {seed}")
    return [f"{args.out}/{name}" for name in commands]

def load_text(args):
    """-> settings of train.py, model, held-out chunks (n,T), up to 65,536 tokens."""
    argv = command_lines("study", TRAIN, args)[0][3:]    # what follows --stage sae
    t = train.settings("sae", argv)
    model, tokenizer = load_model(t.source, t.dtype, t.device), load_tokenizer(t.source)
    _, ids = train.hold_out(train.load_chunks(t, tokenizer, model))
    if args.held:
        ids = train.load_chunks(Namespace(**vars(t) | {"data": args.held}), tokenizer, model)
    return t, model, ids[:max(2, 65536 // args.seq_len)].to(t.device)

def study(specs, t, model, ids):
    """SAEs -> {"n_fit", "n_test", "left_out", "widths": {width: {label: number}}}."""
    x, half = torch.cat([activations(model, part, t.layer, t.site).float()
                         for part in train.micro_batches(ids, t)]), len(ids) // 2  # (n,T,D)
    limit = train.find_sink_norm(x[:t.batch], None, t)   # for all SAEs, however they were trained
    keep = ~is_sink(x, limit)                                                     # (n,T)
    x, n_fit, saes = x[keep], int(keep[:half].sum()), {}                          # (N,D)
    for spec in specs:
        sae = load_any(spec).to(x.device).requires_grad_(False)
        train.check_site(sae, t)
        check(sae.n_latents not in saes, f"--sae: two of {sae.n_latents} latents; give one")
        sae.meta["sink_norm"] = limit
        saes[sae.n_latents] = sae
    found = {}
    for width, sae in sorted(saes.items()):
        line, found[width] = study_one(sae, x, n_fit)
        found[width] |= spliced_parts(model, sae, line, ids[half:], t)
    return {"n_fit": n_fit, "n_test": len(x) - n_fit, "left_out": 1 - len(x) / ids.numel(),
            "widths": found}

@torch.no_grad()
def in_parts(function, x):
    """function(x) for x (N,D), 1,024 tokens at a time."""
    return torch.cat([function(part) for part in x.split(1024)])

def study_one(sae, x, n_fit):
    """What activations x (N,D) say of an SAE -> the line of its error, {label: number}."""
    x_hat, shown = in_parts(sae, x), metrics(sae, x[n_fit:], 1024)
    line, found = decompose_error(x, x_hat, n_fit)
    found = {"L0": shown["l0"], "latents that never fire": shown["dead"]} | found
    found["R2 of e_nl from x_hat"] = linear_r2(x_hat, x - x_hat - line(x), n_fit)
    return line, found

@torch.no_grad()
def spliced_parts(model, sae, line, ids, t):
    """Nats per token of ids (n,T) with x_hat at the site, and with a part of the error put back."""
    found = {}
    for name, module in {"x_hat": sae, "x_hat + e_lin": put_back(sae, line, True),
                         "x_hat + e_nl": put_back(sae, line, False)}.items():
        nats = train.spliced_nats(model, {"sae": module}, ids, t)
        found |= {"CE of the model": nats["ce"], f"CE with {name}": nats["ce_sae"],
                  f"KL with {name}": nats["kl"]}
    return found

# ---- Table, command line -----------------------------------------------------------------------

NOTE = """\
Lines are fitted on {n_fit:,} held-out tokens, ridge 1e-6; all is measured on {n_test:,} others.
{left_out:.1%} are sinks, left out.  R2: pooled over dimensions unless said.  |x| alone: and |x|^2.
CE, KL: nats per token.  Seeds: {seeds}; ± is half the distance from least to most."""

def error_table(found):
    """Rows are labels, columns widths: means over seeds, and half the distance least to most."""
    widths = found[0]["widths"]                          # {width: {label: number}}, of each seed
    rows = [[label] for label in next(iter(widths.values()))]
    for row in rows:
        for width in widths:
            values = [seed["widths"][width][row[0]] for seed in found]
            spread = f" ±{(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
            row.append(f"{sum(values) / len(values):.4f}{spread}")
    return eval.table(rows, ["", *(f"F {width:,}" for width in widths)])

def main(argv):
    parser = experiment_parser("python -m tests.claims.errors", __doc__.split("\n")[0],
                               "source", "data", "dtype")
    add = parser.add_argument
    add("--layer", type=whole(0), default=1, help="decoder block, counted from 0")
    add("--site", choices=("resid", "mlp"), default="resid", help="output of the block, its MLP")
    add("--held", default="", help="JSONL to measure on; by default the last 5 %% of --data")
    add("--sae", nargs="+", default=[], help="study these")
    # What is trained without --sae
    add("--widths", nargs="+", type=whole(1), default=[128, 256, 512, 1024], help="latents")
    add("--k", type=whole(1), default=16, help="active latents per token")
    add("--seeds", type=whole(1), default=3, help="trainings of each: seeds 0, 1, ..")
    add("--steps", type=whole(1), default=500, help="optimizer steps")
    add("--lr", type=real(0, above=True), default=5e-3, help="linear to 0 over the last fifth")
    add("--batch", type=whole(1), default=4, help="chunks in a step")
    add("--seq-len", type=whole(2), default=256, help="tokens in a chunk")
    args = parse_experiment(parser, argv, dict(seeds=1, steps=4), "errors")
    args.seed = 0                        # of `load_text`: the held-out text is always the same
    if args.sae:
        refuse_idle(args, "widths seeds workers", "--sae, which says what to study")
    if "data" in args.given and "held" not in args.given:      # a preset's goes with its own data
        args.held = ""
    args.seeds = 1 if args.sae else args.seeds
    specs = [args.sae or train_saes(args, seed) for seed in range(args.seeds)]
    (t, *text), found = load_text(args), []
    for seed, some in enumerate(specs):
        found.append(study(some, Namespace(**vars(t) | {"seed": seed}), *text))
    note = NOTE.format(**vars(args) | found[0])
    text = f"{error_table(found)}\n\n{note}"
    write_text(f"{args.out}/table.txt", text + "\n")
    write_json(f"{args.out}/numbers.json", found)
    print(f"{text}\n\n{args.out}")

if __name__ == "__main__":
    front_door(main)
