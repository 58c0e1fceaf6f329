"""What SAEs miss: the error in two parts, linear in the activation and not (arXiv 2410.14670).

    python -m tests.claims.errors                  SAEs of four widths, three seeds: minutes
    python -m tests.claims.errors --source MODEL --sae DIR_OR_HUB_ID[#HOOKPOINT] --data FILE

    x = x_hat + e,  e = e_lin + e_nl        e_lin = line(x): least squares of e on x, with a bias

Results: OUT/table.txt, a row for each number, a column for each width; OUT/numbers.json, by seed.

N tokens, n chunks of T, D width, F latents, P and Q columns.
"""

from argparse import Namespace

import torch

import eval
import train
from data.files import check, embedded, write_json, write_text
from data.flags import (
    command_lines, derive, experiment_parser, front_door, open_experiment, parse_experiment, real,
    refuse_idle, run_commands, whole)
from data.formats import load_any
from model import Config, load_model, load_tokenizer
from resa import activations, is_sink
from sae import check_site, metrics

# ---- The error in parts ------------------------------------------------------------------------

@torch.no_grad()
def fit_affine(u, y, ridge=1e-6):
    """Least squares of y (N,Q) on u (N,P) with a bias, in fp64 -> a function (M,P) -> (M,Q).
    ridge: added to the covariance of u, in units of its mean diagonal."""
    u, y = u.double(), y.double()
    du, dy = u - u.mean(0), y - y.mean(0)                                         # (N,P), (N,Q)
    cov = du.T @ du                                                               # (P,P)
    cov.diagonal().add_(ridge * cov.diagonal().mean())
    matrix = torch.linalg.pinv(cov, hermitian=True) @ (du.T @ dy)                 # (P,Q)
    bias = y.mean(0) - u.mean(0) @ matrix                                         # (Q,)
    return lambda u: (u.double() @ matrix + bias).to(u.dtype)

def linear_r2(u, y, n_fit):
    """Fraction of the variance of y (N,Q) that is affine in u (N,P), pooled over columns.
    Fitted on the first n_fit rows, measured on the others."""
    u, y = u.double(), y.double()
    left, y = y[n_fit:] - fit_affine(u[:n_fit], y[:n_fit])(u[n_fit:]), y[n_fit:]  # (N-n_fit,Q)
    total = (y - y.mean(0)).pow(2).sum(0).sum()          # over rows, then over columns
    return float(1 - left.pow(2).sum(0).sum() / total.clamp_min(torch.finfo(y.dtype).tiny))

@torch.no_grad()
def decompose_error(x, x_hat, n_fit):
    """Activations and reconstructions (N,D), without sinks -> line, {label: number}.

    The line is fitted on the first n_fit rows and measured on the others.  Rows are in the order
    of the text: neighbours are alike.  Read R2 with FVU: shrinkage is linear, so a dead SAE has an
    R2 of 1.  e_nl is an upper bound: it also holds what noise hides from the line."""
    check(x.shape[1] < n_fit < len(x) - 1, f"{n_fit} tokens to fit a line on: give more text")
    x, e = x.double(), x.double() - x_hat.double()                                # (N,D) each
    line, rows = fit_affine(x[:n_fit], e[:n_fit]), slice(n_fit, None)
    variance = (x[rows] - x[rows].mean(0)).pow(2).sum()
    square, norm = e.pow(2).sum(1, keepdim=True), x.norm(dim=1, keepdim=True)     # (N,1) each
    return line, {
        "FVU of e": float(e[rows].pow(2).sum() / variance),
        "FVU of e_nl": float((e[rows] - line(x[rows])).pow(2).sum() / variance),
        "R2 of e from x": linear_r2(x, e, n_fit),
        "R2 of |e|^2 from x": linear_r2(x, square, n_fit),
        "R2 of |e|^2 from |x| alone": linear_r2(torch.cat([norm, norm**2], 1), square, n_fit)}

# ---- One study: the SAEs of one seed, on held-out text -----------------------------------------

TRAIN = ("train.py --stage sae --source {source} --seq-len {seq_len} --steps {steps} --batch 4 "
         "--lr {lr} --schedule linear --layer {layer} --site {site}")

def train_saes(args, seed):
    """One SAE for each width -> their directories."""
    commands = {f"sae-{width}-{seed}": f"{TRAIN} --latents {width}" for width in args.widths}
    run_commands(commands, Namespace(**vars(args) | {"seed": seed}), f"seed {seed}")
    return [f"{args.out}/{name}" for name in commands]

def load_text(args):
    """-> settings of train.py, model, held-out chunks (n,T), up to 65,536 tokens."""
    argv = command_lines("study", TRAIN, Namespace(**vars(args) | {"seed": 0}))[0][3:]
    t = train.settings("sae", argv)      # what follows --stage sae
    model, tokenizer = load_model(t.source, t.dtype, t.device), load_tokenizer(t.source)
    _, ids = train.hold_out(train.load_chunks(t, tokenizer, model))
    if args.held:
        held = Namespace(**vars(t) | {"data": args.held})
        held.fields = "" if embedded(args.held) else t.fields
        ids = train.load_chunks(held, tokenizer, model)
    return t, model, ids[:max(2, 65536 // args.seq_len)].to(t.device)

@torch.no_grad()
def study(specs, other, t, model, ids):
    """SAEs -> {"n_fit", "n_test", "left_out", "widths": {width: {label: number}}}.
    other: also those that were trained elsewhere."""
    x, half = torch.cat([activations(model, part, t.layer, t.site).float()
                         for part in train.micro_batches(ids, t)]), len(ids) // 2  # (n,T,D)
    limit = train.find_sink_norm(x[:t.batch], None, t)   # for all SAEs, however they were trained
    keep = ~is_sink(x, limit)                                                     # (n,T)
    x, n_fit, widths = x[keep], int(keep[:half].sum()), {}                        # (N,D)
    for spec in specs:
        sae = load_any(spec).to(x.device).requires_grad_(False)
        check_site(sae, t.layer, t.site, other)
        check(sae.n_latents not in widths, f"--sae: two of {sae.n_latents} latents; give one")
        sae.meta["sink_norm"] = limit
        line, found = decompose_error(x, torch.cat([*map(sae, x.split(1024))]), n_fit)
        found["L0"] = metrics(sae, x[n_fit:], 1024)["l0"]
        for name, module in {"x_hat": lambda x: sae(x),
                             "x_hat + e_lin": lambda x: sae(x) + line(x),
                             "x_hat + e_nl": lambda x: x - line(x)}.items():
            module.meta = sae.meta       # says what a sink is
            nats = train.spliced_nats(model, {t.layer: {"sae": module}}, ids[half:], t)[t.layer]
            found |= {"CE of the model": nats["ce"], f"CE with {name}": nats["ce_sae"],
                      f"KL with {name}": nats["kl"]}
        widths[sae.n_latents] = found    # {label: number}
    return {"n_fit": n_fit, "n_test": len(x) - n_fit, "left_out": 1 - len(x) / ids.numel(),
            "widths": widths}

# ---- Table, command line -----------------------------------------------------------------------

NOTE = """
Lines are fitted on {n_fit:,} held-out tokens, ridge 1e-6; all is measured on {n_test:,} others.
{left_out:.1%} are sinks, left out.  |x| alone: and |x|^2.  CE, KL: nats per token.
Means over seeds; ± is half the distance from least to most."""

def error_table(found):
    """Rows are labels, columns widths: means over seeds, and half the distance least to most."""
    widths = found[0]["widths"]                          # {width: {label: number}}, of each seed
    rows = [[label] for label in next(iter(widths.values()))]
    for row in rows:
        for width in widths:
            values = [seed["widths"][width][row[0]] for seed in found]
            spread = (max(values) - min(values)) / 2
            row.append(f"{sum(values) / len(values):.4f} ±{spread:.4f}")
    return eval.table(rows, ["", *(f"F {width:,}" for width in widths)])

def main(argv):
    parser = experiment_parser("python -m tests.claims.errors", __doc__.split("\n")[0],
                               "source", "data", "dtype")
    add = parser.add_argument
    add("--layer", type=whole(0), help="decoder block; by default the SAE's, of new ones 3/7 of "
        "the depth")
    add("--site", choices=("resid", "mlp"), help="output of block or of its MLP; by default the "
        "SAE's, of new ones resid")
    add("--other-site", action="store_true", help="allow SAEs of another one")
    add("--held", default="", help="JSONL to measure on; by default the last 5 %% of --data")
    add("--sae", nargs="+", default=[], help="study these, of different widths; else train some:")
    add("--widths", nargs="+", type=whole(1), default=[128, 256, 512, 1024], help="latents")
    add("--seeds", type=whole(1), default=3, help="trainings of each: seeds 0, 1, ..")
    add("--steps", type=whole(1), default=500, help="optimizer steps")
    add("--lr", type=real(0), default=0.005, help="learning rate of SAEs; 0: by a rule")
    add("--seq-len", type=whole(2), default=256, help="tokens in a chunk")
    args = parse_experiment(parser, argv, dict(seeds=1, steps=4), "errors")
    if "data" in args.given and "held" not in args.given:      # a preset's goes with its own data
        args.held = ""
    config = Config.from_pretrained(args.source)
    if args.sae:
        refuse_idle(args, "seeds widths steps lr", "--sae, for which nothing is trained")
        train.open_sae(args.sae[0], args, config.hidden_size, args.source)
    derive(args, "site", "resid", "as the released code")
    derive(args, "layer", config.num_hidden_layers * 3 // 7, "3/7 of the depth")
    open_experiment(args)
    specs = [args.sae] if args.sae else [train_saes(args, seed) for seed in range(args.seeds)]
    text = load_text(args)
    found = [study(some, args.other_site, *text) for some in specs]       # on the same text
    text = f"{error_table(found)}\n{NOTE.format(**found[0])}"
    write_text(f"{args.out}/table.txt", text + "\n")
    write_json(f"{args.out}/numbers.json", found)
    print(f"{text}\n\n{args.out}")

if __name__ == "__main__":
    front_door(main)
