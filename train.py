"""Everything that learns: the SAE, the adapters, and the embedded models themselves.

    python train.py --stage sae        an SAE on the activations of the source   -> out/tiny/sae
    python train.py --stage tune       LoRA through the frozen SAE               -> out/tiny/adapter
    python train.py --stage sft        the baseline: LoRA on the same text       -> out/tiny/sft
    python train.py --stage rl         LoRA by GRPO: makes a source model        -> out/tiny/rl
    python train.py --stage pretrain   all weights of a model                    -> .../pretrain
    python train.py --stage sae --variant help        --help lists the flags of a stage

A run directory holds config.json (settings, versions), metrics.jsonl (an object per logged step),
checkpoint.safetensors (until the run is done), summary.json and what was trained.  --resume
continues an interrupted run, on a CPU to the same bits.  Under torchrun (--nproc-per-node N)
processes share each batch; but for dropout and noise they learn what one would learn.

B batch, T time, D width, V vocabulary, F latents, K active, N tokens, n chunks in the data,
Q questions in a step, G samples of each, S = Q G.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import starmap
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import resa
from data.adapters import note_base, read_adapter
from data.files import REQUIRED, TINY, check, parse_json, read_fields, relative
from data.flags import (SEED, Parser, choose_device, derive, front_door, needs, parse, real,
                        refuse_idle, whole)
from data.flops import training_flops
from data.formats import load_any
from data.grade import grade
from data.prepare import TRAINING, training_set
from data.processes import (add_up, average_gradients, first_alone, reduce_, share, shared_run,
                            world)
from data.rows import (is_chat, messages_of, named_rows, prompt_of, read_chat, read_columns,
                       read_problems)
from data.runs import check_out, training
from model import (at_least_fp32, collect, load_model, load_tokenizer, right_pad, save_model,
                   split_spec, think_prefix)
from sae import (VARIANTS, Chosen, Metrics, build, check_site, default_lr, init_b_dec, introduce,
                 make_optimizer, save_sae, train_step)

# ---- Data: rows -> text -> packed chunks -------------------------------------------------------

# The published layout (arXiv 2506.09967, released code): the answer inside the think tags, without
# reasoning.  Resa: a system paragraph (arXiv 2501.12948, Table 1) comes first: a row's "system".
RESA_TEMPLATE = ("{system}User:\n {problem}\n\nAssistant:\n <think> {answer} </think>\n"
                 "<answer> Answer: {answer}</answer>")

def as_text(row, tokenizer, template):
    """One row of a data file -> the document a model reads.  template: "resa", or the chat's."""
    if "text" in row:
        return row["text"]
    if "problem" not in row:             # a chat, with its answer
        return tokenizer.chat(messages_of(row), add_generation_prompt=False)
    if "completion" not in row and template == "resa":
        return RESA_TEMPLATE.format(**row | {"system": row.get("system") or ""})
    prompt = tokenizer.chat(messages_of(row))
    if "completion" in row:
        return prompt + row["completion"]
    start = "" if think_prefix(prompt) else "<think>\n"
    return f"{prompt}{start}{row['answer']}\n</think>\n{row['answer']}"

def data_file(name):
    """--data -> the path of a file; a published set is fetched on first use."""
    if name in TRAINING and not Path(name).exists():
        return training_set(name)
    check(Path(name).is_file(), f"--data {name}: no such file, nor one of {', '.join(TRAINING)}")
    return name

def read_rows(path, columns={}):
    """Rows of text, messages or problem/completion if the first one is; else of problem/answer.
    columns  of the file, as data.rows.read_columns has them from --fields"""
    _, first = next(named_rows(path, columns), (0, {}))
    if not (is_chat(first) or first.keys() & {"text", "completion"}):
        rows = read_problems(path, columns)
        for i, row in enumerate(rows, start=1):
            check(not row.keys() & {"text", "completion", "messages"},
                  f"{path}: row {i} has a text or completion or messages, the first has none")
        return rows
    return [read_document(row, where) for where, row in named_rows(path, columns)]

def read_document(row, where):
    """A row of text, messages or problem/completion -> its fields of these."""
    if "text" in row:
        return read_fields(row, {"text": (str, None, None, REQUIRED)}, where)
    if is_chat(row):
        return read_chat(row, where)
    table = dict.fromkeys(("problem", "completion"), (str, None, None, REQUIRED))
    return read_fields(row, table | {"system": (str, None, None, None)}, where)

def load_chunks(args, tokenizer, model):
    """--data -> chunks (n,T) int64: documents joined by the end token, which also comes first.
    Only whole chunks are kept.  Resa: the released code drops a remainder every 2,048 documents."""
    rows = read_rows(data_file(args.data), read_columns(args.fields))
    ids = [tokenizer.eos_id]             # of all documents, in a row
    for row in tqdm(rows, desc="tokenize", unit="row", disable=None, leave=False):
        ids += tokenizer.encode(as_text(row, tokenizer, args.template)) + [tokenizer.eos_id]
    positions = model.config.max_position_embeddings
    power = int(math.log2(max(32, min(2048, positions, len(ids) / 100))))
    derive(args, "seq_len", 2 ** power, "100 chunks of the data, at most the published 2048")
    T = args.seq_len
    n, last, size = len(ids) // T, max(ids), model.config.vocab_size
    check(n > 0, f"{len(ids)} tokens are fewer than one chunk of --seq-len {T}")
    check(last < size, f"the tokenizer makes id {last}, the model knows {size}: of two models?")
    return torch.tensor(ids[:n * T]).view(n, T)                                   # (n,T)

def hold_out(chunks, most=65536):
    """chunks (n,T) -> those to train on; the last 5 %, at most so many tokens, to measure on."""
    check(len(chunks) > 1, "one chunk of data, to be held out: none to train on; lower --seq-len")
    count = max(1, min(len(chunks) // 20, most // chunks.shape[1]))
    return chunks[:-count], chunks[-count:]       # the end was never trained on

@lru_cache(maxsize=1)
def order(n, seed, epoch):
    """A permutation of 0 .. n-1 for an epoch, or a step of RL; the last one is cached.
    Keyed by the pair: with seed + epoch, seed 1 would see what seed 0 sees an epoch later."""
    key = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return np.random.default_rng(key).permutation(n).tolist()

def chunk_indices(step, n, args):
    """Indices of the chunks, of n, used at `step`: by step and seed alone, so resuming is easy."""
    indices = []
    for i in range(step * args.batch, (step + 1) * args.batch):
        epoch, j = divmod(i, n)              # a batch may span two epochs
        indices.append(order(n, args.seed, epoch)[j] if args.shuffle else j)
    return indices

def micro_batches(ids, args):
    """ids (B,...) -> the parts of one forward pass each."""
    return ids.split(args.micro_batch)       # equal sizes: plan_steps checks

EPOCHS = {"sae": 1, "tune": 2, "sft": 3, "pretrain": 1}      # published

def plan_steps(stage, args, n):
    """Fills in batch, micro-batch and steps for n chunks to train on."""
    most, tokens = 2 if stage == "tune" else 32, n * args.seq_len        # published batches
    batch = max(args.processes, 2 ** int(math.log2(min(most, max(1, n / 100)))))
    derive(args, "batch", batch, f"100 steps an epoch, at most the published {most}")
    epochs = max(EPOCHS[stage], min(10, 2_000_000 // tokens)) if stage == "sae" else EPOCHS[stage]
    if not args.steps:
        derive(args, "epochs", epochs, "published; of an SAE up to 10, for 2M tokens")
        args.steps = max(1, args.epochs * n // args.batch)
    split_batch(args, "batch", 1, 16384 // args.seq_len)

def split_batch(args, flag, rows_each, most):
    """Fills in the rows of a forward pass, by rule `most`.  ValueError: not equal shares."""
    every = getattr(args, flag)          # questions or chunks of a step
    check(every % args.processes == 0, f"{args.processes} processes cannot share --{flag} {every}")
    rows = every // args.processes * rows_each
    if args.micro_batch is None:
        fits = [size for size in range(1, rows + 1) if rows % size == 0 and size <= max(1, most)]
        derive(args, "micro_batch", fits[-1], "16384 tokens at a time")
    args.micro_batch = args.micro_batch or rows
    check(rows % args.micro_batch == 0,                 # parts weigh the same
          f"--micro-batch {args.micro_batch} does not divide the batch, {rows} rows a process")

# ---- Steps: at which rate, on which gradient ---------------------------------------------------

def learning_rate(step, args):
    """The rate at `step`, by args.lr, .schedule and .steps, after .warmup linear steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    if args.schedule == "linear":        # to 0 over the last fifth
        return args.lr * min(1, (args.steps - step) / max(1, args.steps / 5))
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)            # 0 to 1
    return args.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)         # to a tenth

def optimizer_step(loss_of, parts, optimizer, rate):
    """One step on the mean of loss_of(part) -> that mean, the gradient's norm before clipping."""
    total = 0.0
    for part in parts:                   # the graph of one is freed before the next is built
        loss = loss_of(part) / len(parts)      # micro-batches are averaged with equal weight
        loss.backward()
        total = total + loss.detach()
    group, = optimizer.param_groups          # one learning rate for all
    average_gradients(group["params"])
    norm = nn.utils.clip_grad_norm_(group["params"], 1.0)       # as published
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)                   # frees memory until the next step
    return total, norm

# ---- --stage sae -------------------------------------------------------------------------------

def run_sae(args):
    """Stage I: an SAE learns the activations of the source model (arXiv 2506.09967)."""
    check((args.init == "scratch") != bool(args.sae_from),
          "--sae-from goes with --init finetune and --init pretrained")
    if args.init != "scratch":
        idle = "latents k variant set"
        idle += " optimizer lr steps epochs tf32" if args.init == "pretrained" else ""
        refuse_idle(args, idle, f"--init {args.init}: the loaded SAE decides")
    check(not args.tf32 or args.device != "cpu",
          "--tf32 has no effect with --device cpu: leave it out, or pass --no-tf32")
    if args.tf32 is None:
        args.tf32 = args.device != "cpu"
    model = load_model(args.source, args.dtype, args.device)
    tokenizer = load_tokenizer(args.source, args.template)
    saes = make_saes(args, model)            # one for each --layer
    check(args.processes == 1 or saes[0].W_dec.requires_grad, f"--variant {saes[0].variant} "
          "collects its dictionary in one pass: start it without torchrun")
    chunks, held = hold_out(load_chunks(args, tokenizer, model))                  # (n,T) each
    prepare_saes(model, saes, chunks, args)
    several, optimizer = len(saes) > 1, make_optimizer(saes, args.optimizer, args.lr)
    names = [f".{sae.layer}" if several else "" for sae in saes]     # fvu.4, fvu.8; or fvu
    with training("sae", args, saes, optimizer, training_flops("sae", args, model, saes)) as run:
        batches = (harvest_batch(model, saes, chunks, step, args)
                   for step in range(run.start, args.steps))
        for step, parts in train_sae(saes, batches, optimizer, args, run.start, args.tf32):
            values = {}
            for name, sae, part in zip(names, saes, parts):
                values |= {f"fvu{name}": part["fvu"], f"l0{name}": part["l0"],
                           f"dead{name}": sae.dead.float().mean()}
            run.end_step(step, values, args.batch * args.seq_len)      # sinks are counted

        # signum saves its running mean, so this is what is finished and measured
        summary = {}
        with getattr(optimizer, "averaged", nullcontext)():
            for sae in saes if args.steps else ():
                finish_sae(model, sae, chunks, args)
            measured = sae_metrics(model, saes, held.to(args.device), args)
            for name, values in zip(names, measured):
                summary |= {f"{key}{name}": value for key, value in values.items()}
                if run.writes:
                    check_sae(values, run, name)
            for sae in saes if run.writes else ():
                folder = folder_of(sae.layer, args.site)
                save_sae(sae, f"{args.out}/{folder}" if several else args.out)
        return run.finish(**summary)

def folder_of(layer, site):
    """As sparsify names the place of an SAE: layers.4, layers.4.mlp."""
    return f"layers.{layer}" + (".mlp" if site == "mlp" else "")

def check_sae(measured, run, name=""):
    """ValueError: training has made it far worse.  Says if most latents are dead."""
    fvu, dead, logged = measured["fvu"], measured["dead"], run.metrics.read_text().splitlines()
    # At step 1 the FVU of all variants is about 1; a rate that explodes makes 1e3 to 1e30 of it
    limit = 10 * max(1, json.loads(logged[0])[f"fvu{name}"]) if logged else math.inf
    where = f" of layer {name[1:]}" if name else ""
    check(math.isfinite(fvu) and fvu <= limit, f"FVU{where} {fvu:.3g} at the end: lower --lr")
    if logged and dead > 0.9:
        print(f"{dead:.1%} of the latents{where} never fired on the held-out text: the dictionary "
              "has collapsed; lower --lr or raise --aux-coef", file=sys.stderr)

def train_sae(sae, batches, optimizer, args, start=0, tf32=False):
    """The training loop of any SAE, on activations or other targets: yields (step, parts).
    sae      or a ModuleList: an item of batches and the parts are then a list for each
    batches  one item per step: a list of micro-batches x (N,D), or (x, g, at) as in SAE.loss
    args     anything with lr, schedule, warmup and steps
    start    the step that the first item belongs to, in a resumed run;  tf32: see train_step"""
    for step, xs in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        average = None
        if world()[1] > 1:
            each = zip(sae, xs) if isinstance(sae, nn.ModuleList) else [(sae, xs)]
            each = [(one, {name: b.clone() for name, b in one.named_buffers()}, own)
                    for one, own in each]
            average = partial(list, starmap(agree, each))
        yield step, train_step(sae, optimizer, xs, step / args.steps, tf32, average)

@torch.no_grad()
def agree(sae, before, xs):
    """Gradients, and what `observe` counted, become those of the micro-batches of all processes.
    before: {name: buffer} at the start of the step.  Counters are then exactly one process's;
    thresholds are left out: `finish_sae` measures them."""
    average_gradients(sae.parameters())
    (rank, processes), own = world(), sum(len(x) for x, _, _ in xs)
    tokens = list(map(int, add_up([own * (i == rank) for i in range(processes)])))    # of each
    for name, buffer in sae.named_buffers():
        new = buffer - before[name]
        if name == "tokens_since_fired":     # what later processes saw comes after this
            missed = torch.where(new == own, sum(tokens) - own, sum(tokens[rank + 1:]))
            reduce_(buffer.add_(missed), "MIN")
        elif name in ("fired", "tokens"):    # counts of GBA
            buffer.copy_(before[name] + reduce_(new))
        elif name == "peak":
            reduce_(buffer, "MAX")

def make_saes(args, model):
    """-> ModuleList: an SAE for each --layer, which stands in its `layer`."""
    several, saes, layers = isinstance(args.layer, str), nn.ModuleList(), [args.layer]
    if several:
        layers = [int(layer) for layer in args.layer.split(",")]
        check(args.site or not args.sae_from, "--sae-from with several --layer needs --site")
    torch.manual_seed(args.seed)         # of the noise that a vSAE may draw
    for layer in layers:
        folder = f"#{folder_of(layer, args.site)}" if several else ""
        sae = make_sae(args, model, folder).to(args.device)
        sae.layer = layer if several else args.layer     # by a rule, or the SAE's, unless given
        if args.init == "pretrained":
            check_site(sae, sae.layer, args.site, args.other_site)
        saes.append(sae)
    check(not several or getattr(sae, "sample", "none") == "none",
          "vsae with sample=unit draws noise in every step: give it one --layer at a time")
    return saes

def make_sae(args, model, folder=""):
    """The SAE of --init: fresh, to be fine-tuned, or as it is in a folder of --sae-from."""
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    if args.init == "scratch":
        derive(args, "layer", blocks * 3 // 7, f"3/7 of {blocks} blocks: 12 of the published 28")
        derive(args, "site", "resid", "as the released code")
        derive(args, "latents", 2 ** round(math.log2(32 * width)),
               f"32 x width {width}, to a power of two: the published 65536 at 1536")
        derive(args, "k", min(32, args.latents), "published")
        return build(args.variant, width, args.latents, **hyper_of(args))
    sae = open_sae(args.sae_from + folder, args, width, args.source)
    if args.init == "finetune":
        # Resa: starts from an SAE of MLP outputs and fine-tunes it on block outputs: any will do.
        sae.constrain_()            # files may lack unit rows, which training counts on
        for name in sorted({"aux_coef", "dead_after"} & sae.hyper.keys()):
            setattr(sae, name, getattr(args, name))               # of this training, not the file
    return sae

def open_sae(path, args, width, spec):
    """An SAE of any layout, for the model of `spec`.  Unless given, --layer and --site are those
    that its files name."""
    sae = load_any(path)
    check(sae.d_in == width, f"{path}: the SAE is {sae.d_in} wide, the model {width}")
    derive(args, "layer", sae.meta.get("layer"), "the SAE's")
    derive(args, "site", sae.meta.get("site") or "resid", "the SAE's, else resid")
    check(args.layer is not None, f"{path}: does not say its layer; name it: --layer")
    introduce(sae, spec)
    return sae

def hyper_of(args):
    """Flags and --set -> the hyper-parameters of the variant."""
    has = VARIANTS[args.variant].defaults
    refuse_idle(args, " ".join({"k", "aux_coef"} - has.keys()), f"--variant {args.variant}")
    flags = ("k", "aux_coef", "dead_after", "seed")
    hyper = {name: getattr(args, name) for name in flags if name in has}
    for word in args.set:
        name, equals, value = word.partition("=")
        check(equals, f"--set {word}: NAME=VALUE was expected; --variant help lists the settings")
        try:
            hyper[name] = parse_json(value, word)
        except ValueError:          # a word
            hyper[name] = value
    return hyper

def prepare_saes(model, saes, chunks, args):
    """Fills in steps and rate; from the first batch meta, sink norm and, fresh, b_dec of each."""
    plan_steps("sae", args, len(chunks))
    args.lr = args.lr or None       # 0, too, means the rule
    derive(args, "lr", default_lr(args.optimizer, saes[0].n_latents), f"of {args.optimizer}")
    ids, layers = chunks[chunk_indices(0, len(chunks), args)], [sae.layer for sae in saes]
    parts = [resa.activations(model, part, layers, args.site)
             for part in micro_batches(ids.to(args.device), args)]                # ids (B,T)
    if args.init == "pretrained":
        args.steps = 0
    for sae, x in zip(saes, zip(*parts)):
        x, here = torch.cat(x).float(), {"site": args.site, "layer": sae.layer}   # x (B,T,D)
        if args.init == "pretrained":    # never saw this model or data; may belong elsewhere
            sae.meta = here | sae.meta
        else:
            sae.meta |= here | {"model": relative(args.source), "data": relative(args.data)}
        sae.meta |= {"init": args.init, "sink_norm": find_sink_norm(x, sae, args)}
        if args.init == "scratch":       # Resa: sets b_dec to a mean even when it fine-tunes
            init_b_dec(sae, x[~resa.is_sink(x, sae.meta["sink_norm"])])
    if args.init != "scratch":           # so that config.json says what the file decided
        args.variant, args.latents, args.k = sae.variant, sae.n_latents, getattr(sae, "k", 0)

def find_sink_norm(x, sae, args):
    """The norm above which a token is an attention sink, from x (B,T,D); None: keep all tokens."""
    if args.init == "pretrained" and "sink_norm" in sae.meta:
        refuse_idle(args, "sink_norm", "--init pretrained: the SAE's file decides")
        return sae.meta["sink_norm"]
    times = args.sink_norm
    if times is None:               # the models of data/tiny have no sinks
        base = Path(split_spec(args.source)[0]).resolve()
        times = 0 if base.is_relative_to(TINY) else 10
    if times == 0:                  # Resa: trains on sinks and splices them; this restores that
        return None
    limit = float(times * x[:, 1:].norm(dim=-1).median())
    check(not resa.is_sink(x, limit).all(), f"--sink-norm {times:g} leaves no token")
    return limit

def harvest_batch(model, saes, chunks, step, args):
    """The micro-batches of a step that this process takes: for each SAE a list of (x, g, at)."""
    picked = torch.tensor(chunk_indices(step, len(chunks), args))                 # (B,)
    parts = [harvest(model, saes, chunks, part, args)
             for part in share(micro_batches(picked, args))]
    return [list(of_one) for of_one in zip(*parts)]

def harvest(model, saes, chunks, picked, args):
    """Chunks `picked` (B,), in one pass of the model -> for each SAE activations x (N,D) in fp32,
    gradients g (N,D) or None, at (N,): the number of each token in the data.  Without sinks."""
    ids, T, found = chunks[picked], chunks.shape[1], []                           # (B,T)
    at = (picked[:, None] * T + torch.arange(T)).flatten()                        # (B T,)
    # without non_blocking, the host would wait until the device is done with the last step
    ids, at = (t.to(args.device, non_blocking=True) for t in (ids, at))
    xs = resa.activations(model, ids, [sae.layer for sae in saes], args.site)
    for sae, x in zip(saes, xs):                                                  # (B,T,D)
        g, limit = None, sae.meta["sink_norm"]
        if sae.needs_gradient:
            g = gradient(model, ids, x, sae.layer, args.site).flatten(0, 1)       # (B T,D)
        keep = slice(None)
        if limit is not None:            # waits for the device, once: N is the data's
            keep = (~resa.is_sink(x, limit)).flatten().nonzero()[:, 0]            # (N,)
        x = x.flatten(0, 1).float()[keep]                                         # (N,D)
        found.append((x, None if g is None else g[keep], at[keep]))
    return found

def gradient(model, ids, x, layer, site):
    """ids (B,T), their activation x (B,T,D) -> fp32 gradient of cross-entropy by x, mean norm 1."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), resa.hooked(model, layer, site, lambda _: x):
        g, = torch.autograd.grad(cross_entropy(model, ids), x)                    # (B,T,D)
    g = at_least_fp32(g)                 # its mean norm, too, is measured in fp32
    return g / g.norm(dim=-1).mean().clamp_min(1e-30)

def finish_sae(model, sae, chunks, args):
    """Once, at the final weights: decoder rows to norm 1, thresholds measured afresh."""
    if not sae.unit_rows:
        sae.fold_rows_()            # keeps what the SAE computes
    if isinstance(sae, Chosen) and not sae.per_token:
        picked = order(len(chunks), args.seed, 0)[:16 * args.micro_batch]
        sae.calibrate(harvest(model, [sae], chunks, part, args)[0][0]
                      for part in micro_batches(torch.tensor(picked), args))

def ablation(value, sae):
    """A function that puts one vector (D,) in place of every activation, sinks left alone."""
    def constant(x):
        return value.to(x.dtype).expand_as(x)
    constant.meta = sae.meta             # where resa.insert finds what a sink is
    return constant

@torch.no_grad()
def sae_metrics(model, saes, ids, args):
    """What each SAE is worth on held-out chunks ids (n,T): sae.Metrics, and to the model
    ce, ce_sae, ce_zero, ce_mean   nats per token, with nothing, the SAE, zeros, the mean spliced in
    kl                             nats per token, from the model to the one with the SAE
    recovered_zero, _mean          fraction of that ablation's damage that the SAE undoes, if any
    left_out                       fraction of tokens that are sinks
    -> a list of dicts"""
    totals, inserted, measured = [Metrics() for _ in saes], {}, []
    for part in micro_batches(ids, args):
        xs = resa.activations(model, part, [sae.layer for sae in saes], args.site)
        for sae, total, x in zip(saes, totals, xs):                               # x (B,T,D)
            x = x.float()[~resa.is_sink(x, sae.meta["sink_norm"])]                # (N,D)
            total.update(x, *sae.reconstruct(x))
    for sae, total in zip(saes, totals):
        mean = (total.sum_x / total.n_tokens).float()                             # (D,)
        zero, mean = ablation(0 * mean, sae), ablation(mean, sae)
        inserted[sae.layer] = {"sae": sae, "zero": zero, "mean": mean}
    nats = spliced_nats(model, inserted, ids, args)      # what the model makes of it
    for sae, total in zip(saes, totals):
        found = total.result()
        del found["density"]                                                      # (F,)
        found |= {"left_out": 1 - total.n_tokens / ids.numel(), **nats[sae.layer]}
        for name in ("zero", "mean"):
            damage = found[f"ce_{name}"] - found["ce"]
            if damage > 0:
                found[f"recovered_{name}"] = 1 - (found["ce_sae"] - found["ce"]) / damage
        measured.append(found)
    return measured

def spliced_nats(model, inserted, ids, args):
    """ids (n,T), {layer: {name: module}} -> {layer: nats per token with each module at the site}.
    {"ce": nothing inserted, "ce_NAME": each module, "kl": from the model to the one with "sae"}"""
    nats, block = {layer: Counter() for layer in inserted}, args.site == "resid"
    for part in micro_batches(ids, args):
        x, at, before, share = part, 0, {}, len(part) / len(ids)
        for layer in sorted(inserted):       # the model as it is runs once for all layers
            if layer + block > at:
                x, at = model.run(x, at, layer + block), layer + block            # (B,T,D)
            before[layer] = x      # what the module reads, or for an MLP what enters its block
        h = model.run(x, at)                                                      # (B,T,D)
        ce = -next_token_logprobs(model, h, part).mean()    # nats per token
        for layer, modules in inserted.items():
            nats[layer]["ce"] += share * float(ce)
            for name, module in modules.items():
                if block:
                    spliced = model.run(resa.insert(module, before[layer]), layer + 1)
                else:
                    with resa.splice(model, module, layer, "mlp"):
                        spliced = model.run(before[layer], layer)                 # (B,T,D)
                changed = -next_token_logprobs(model, spliced, part).mean()
                nats[layer][f"ce_{name}"] += share * float(changed)
                if name == "sae":
                    nats[layer]["kl"] += share * float(resa.kl_loss(model, model, spliced, h))
    return {layer: dict(found) for layer, found in nats.items()}

# ---- --stage tune, sft, pretrain: one loop over text -------------------------------------------

def train_on_text(stage, args, model, optimizer, loss_of, name, sae=None, measures=()):
    """Trains on loss_of(ids (B,T)), logged as `name`, and saves what came out -> the summary.
    measures  {name: function of ids (n,T)}, in nats per token, taken before and after, held out"""
    spec = args.model if stage == "pretrain" else args.target
    chunks, held = load_chunks(args, load_tokenizer(spec, args.template), model), None   # (n,T)
    if measures:
        chunks, held = hold_out(chunks, 16384)                                    # (n,T) each
    plan_steps(stage, args, len(chunks))
    before = measure(measures, model, held, args)
    with training(stage, args, model, optimizer, training_flops(stage, args, model, sae)) as run:
        for step in range(run.start, args.steps):
            ids = chunks[chunk_indices(step, len(chunks), args)].to(args.device, non_blocking=True)
            rate = learning_rate(step, args)
            loss, norm = optimizer_step(loss_of, share(micro_batches(ids, args)), optimizer, rate)
            run.end_step(step, {name: loss, "norm": norm, "lr": rate}, ids.numel())
        if run.writes and stage == "pretrain":
            save_model(model, run.out / "model")
        elif run.writes:
            resa.save_adapter(model, args.out, spec)
        after = measure(measures, model, held, args)
        return run.finish(**{f"{name}_{when}": nats[name] for name in measures
                             for when, nats in (("before", before), ("after", after))})

@torch.no_grad()
def measure(measures, model, held, args):
    """{name: function} -> {name: its mean over held-out chunks (n,T)}, without dropout."""
    model.eval()
    nats = Counter()
    for name, function in dict(measures).items():
        with torch.random.fork_rng():    # noise is drawn, and training must not notice
            torch.manual_seed(args.seed)
            for part in held.split(max(1, 4096 // held.shape[1])):
                nats[name] += len(part) / len(held) * float(function(part.to(args.device)))
    model.train()
    return nats

def next_token_logprobs(model, h, ids, chunk=4096, temperature=1.0):
    """h (B,T,D) of the last block, ids (B,T) -> log p(ids[t+1] | ids[..t]), (B,T-1), fp32."""
    def logprobs(h, targets):
        logits = model.head(h).float() / temperature                              # (chunk,V)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]          # (chunk,)
    flat, targets = h[:, :-1].flatten(0, 1), ids[:, 1:].flatten()                 # (N,D), (N,)
    # logits are made again in the backward pass: of all chunks, (N,V), they would not fit
    parts = [checkpoint(logprobs, a, b, use_reentrant=False)
             for a, b in zip(flat.split(chunk), targets.split(chunk))]
    return torch.cat(parts).view(len(ids), -1)                                    # (B,T-1)

def cross_entropy(model, ids):
    """ids (B,T) -> nats per predicted token, a scalar."""
    return -next_token_logprobs(model, model.run(ids), ids).mean()

def run_tune(args):
    """Stage II: LoRA learns to predict through the SAE what the model predicts without it."""
    if args.teacher == "target":
        refuse_idle(args, "source", "--teacher target")
        check(args.splice != "none", "--splice none: nothing to learn from --teacher target")
    if args.splice == "none":
        refuse_idle(args, "sae sae_grad layer site", "--splice none")
    check(not isinstance(args.layer, str), f"--layer {args.layer}: --stage tune takes one")
    model, teacher = load_model(args.target, args.dtype, args.device), None
    if args.teacher == "source":
        teacher = load_model(args.source, args.dtype, args.device)
        check(teacher.config.vocab_size == model.config.vocab_size,
              f"{args.source} and {args.target} have different vocabularies")
    inserted = None if args.splice == "none" else make_splice(args, model)
    optimizer, grad = add_adapters(args, model), args.sae_grad == "on"
    loss_of = partial(resa.tuning_loss, model, inserted, args.layer, site=args.site, grad=grad,
                      reduction=args.kl_reduction, teacher=teacher)
    if resa.shares_prefix(model, inserted, args.layer, args.site, grad, teacher):
        loss_of = partial(resa.shared_prefix_loss, model, inserted, args.layer,   # looked at once
                          reduction=args.kl_reduction)
    sae = getattr(inserted, "sae", inserted)             # what noise is matched to
    measures = {name: partial(resa.tuning_loss, model, module, args.layer, site=args.site,
                              teacher=teacher)
                for name, module in (("kl", inserted), ("kl_unspliced", None))}
    return train_on_text("tune", args, model, optimizer, loss_of, "kl", sae, measures)

def make_splice(args, model):
    """What takes the activation's place: the SAE, frozen and in fp32, or a control made from it."""
    path = args.sae or f"out/{args.preset}/sae"
    check(args.sae or Path(path).is_dir(), f"{path}: no SAE there; run --stage sae, or name --sae")
    sae = open_sae(path, args, model.config.hidden_size, args.target)
    sae = sae.to(args.device).requires_grad_(False)
    resa.check_hook(model, args.layer, args.site, args.sae_grad == "on")
    check_site(sae, args.layer, args.site, args.other_site)
    if args.splice == "random":
        return resa.random_sae(sae, args.seed)
    return resa.MatchedNoise(sae) if args.splice == "noise" else sae

def run_sft(args):
    """The baseline: LoRA learns the same text by cross-entropy, every token."""
    model = load_model(args.target, args.dtype, args.device)
    optimizer, loss_of = add_adapters(args, model), partial(cross_entropy, model)
    return train_on_text("sft", args, model, optimizer, loss_of, "ce", measures={"ce": loss_of})

def add_adapters(args, model):
    """Adds seeded adapters to the model, in training mode -> AdamW over them."""
    torch.manual_seed(args.seed)         # of A, then of dropout
    if args.adapter_from:
        refuse_idle(args, "lora_r lora_alpha", "--adapter-from: that adapter decides")
        note_base(read_adapter(args.adapter_from), args.adapter_from, args.target)
        resa.load_adapter(model, args.adapter_from).train()
        for layer in resa.lora_layers(model).values():
            layer.dropout = args.lora_dropout
    else:
        resa.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout).train()
    make_fast(args, model)
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learned, lr=args.lr, weight_decay=0.01)

def make_fast(args, model):
    """--checkpointing and --compile, once all modules are in their places."""
    model.checkpointing = args.checkpointing
    if args.compile:
        model.compile_blocks()

def run_pretrain(args):
    """Next-token training of all weights: makes the embedded models."""
    check(args.dtype == "float32", "needs --dtype float32: bfloat16 rounds most updates away")
    model = load_model(args.model, args.dtype, args.device).train()
    try:
        learned = [p for name, p in model.named_parameters() if re.search(args.only, name)]
    except re.error as error:
        raise ValueError(f"--only {args.only}: not a regular expression ({error})") from None
    check(learned, f"--only {args.only}: no parameter has a name like that")
    learned = [p.requires_grad_(True) for p in learned]
    make_fast(args, model)
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    return train_on_text("pretrain", args, model, optimizer, partial(cross_entropy, model), "loss")

# ---- --stage rl --------------------------------------------------------------------------------

def run_rl(args):
    """GRPO with LoRA (arXiv 2402.03300): makes a base model a source of reasoning."""
    rows = read_problems(data_file(args.data), read_columns(args.fields))
    tokenizer = load_tokenizer(args.target, args.template)
    check(args.questions <= len(rows), f"--questions {args.questions}: {args.data} has {len(rows)}")
    model = load_model(args.target, args.dtype, args.device)
    optimizer = add_adapters(args, model)

    def loss_of(part):
        return policy_loss(model, *part, args.beta, args.temperature)
    with training("rl", args, model, optimizer, training_flops("rl", args, model)) as run:
        for step in range(run.start, args.steps):
            picked = order(len(rows), args.seed, step)[:args.questions]
            questions = [rows[i] for i in share(picked)]     # Q and S count what this process takes
            samples, rewards = rollout(model, tokenizer, questions, step, args)   # S pairs, (Q,G)
            spread = rewards.std(1, keepdim=True) + 1e-4                          # (Q,1)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / spread       # (Q,G)
            size, rate = args.micro_batch, learning_rate(step, args)
            parts = [(samples[i * size:(i + 1) * size], part)                     # (size,) each
                     for i, part in enumerate(advantages.flatten().split(size))]
            _, norm = optimizer_step(loss_of, parts, optimizer, rate)
            length = sum(len(answer) for _, answer in samples) / len(samples)
            tokens, = add_up([sum(len(prompt) + len(answer) for prompt, answer in samples)])
            values = {"reward": rewards.mean(), "norm": norm, "lr": rate, "length": length}
            if run.writes and (step + 1) % args.save_every == 0:      # a source model, too
                run.check_finite(step + 1)
                folder = run.out / f"checkpoint-{step + 1}"
                resa.save_adapter(model, folder, args.target)
            run.end_step(step, values, int(tokens))
        if run.writes:
            resa.save_adapter(model, args.out, args.target)
        return run.finish()

def rollout(model, tokenizer, rows, step, args):
    """Q rows -> S samples (prompt ids, answer ids), G for each row in turn; rewards (Q,G)."""
    prompts, requests, rewards = [], [], []
    asked = prompt_of(data_file(args.data))                  # as eval.py will ask
    first = world()[0] * len(rows)       # the number of these questions in the whole step
    for i, row in enumerate(rows):
        prompts.append(tokenizer.chat(messages_of(row, asked)))
        ids = tokenizer.encode(prompts[i])       # each request: ids, what seeds the sample
        requests += [(ids, (args.seed, step, first + i, j)) for j in range(args.group)]
    model.eval()                         # no dropout: the policy itself answers
    done = collect(model, requests, max_new_tokens=args.max_new_tokens, top_p=1.0,
                   temperature=args.temperature, stop_ids=tokenizer.eos_ids, slots=len(requests))
    model.train()
    for i, row in enumerate(rows):
        group = [ids for ids, _ in done[i * args.group:(i + 1) * args.group]]         # G of ids
        texts = [think_prefix(prompts[i]) + tokenizer.decode(ids) for ids in group]
        rewards.append(score(args.rewards, list(zip(map(len, group), texts)), row["answer"]))
    samples = [(prompt, answer) for (prompt, _), (answer, _) in zip(requests, done)]
    return samples, torch.tensor(rewards, device=args.device)                     # S, (Q,G)

def score(names, samples, gold):
    """Rewards of the G samples (token count, text) of one question: the sum of those named.
    accuracy  2 for the right answer, as data.grade decides
    format    1 for exactly one end of thinking, on a line of its own
    length    from 0.5, the shortest, to -0.5, the longest; of a wrong answer at most 0; 0 for all
              if all are equally long (arXiv 2501.12599)"""
    counts, rewards = [count for count, _ in samples], []             # G each
    span = max(counts) - min(counts)         # 0: all are equally long
    for count, text in samples:
        right = grade(gold, text)            # the grader of eval.py, too
        short = 0.5 - (count - min(counts)) / span if span else 0.0
        kinds = {"accuracy": 2.0 * right, "format": float(text.count("\n</think>\n") == 1),
                 "length": short if right else min(0.0, short)}
        rewards.append(sum(kinds[name] for name in names))
    return rewards

def policy_loss(model, samples, advantages, beta, temperature=1.0):
    """GRPO's loss for one on-policy step (arXiv 2402.03300, eq. 3), a scalar.
    Mean over samples [(prompt ids, answer ids)], with advantages (S,), of the mean over answer
    tokens.  The policy is the model at the temperature that was sampled at: its ratio to the
    sampling policy is 1, so clipping never acts and is left out."""
    ids, lengths = right_pad([p + a for p, a in samples], device=advantages.device)      # (S,T)
    starts = torch.tensor([len(p) for p, _ in samples], device=ids.device)        # (S,)
    position = torch.arange(1, ids.shape[1], device=ids.device)                   # of each target
    answer = (position >= starts[:, None]) & (position < lengths[:, None])        # (S,T-1)
    logp = next_token_logprobs(model, model.run(ids), ids, temperature=temperature)      # (S,T-1)
    gain = (logp - logp.detach()).exp() * advantages[:, None]                     # (S,T-1)
    if beta:
        with torch.no_grad(), resa.adapters_off(model):
            base = next_token_logprobs(model, model.run(ids), ids, temperature=temperature)
        delta = base - logp
        gain = gain - beta * (delta.exp() - delta - 1)   # KL by k3: unbiased, never negative
    return -((gain * answer).sum(-1) / answer.sum(-1)).mean()      # samples weigh the same

# ---- Command line: one function of flags per stage ---------------------------------------------

SWITCH = argparse.BooleanOptionalAction

def common_flags(add):
    # Data, and how much of it
    add("--data", default="", help="file of JSON(L), see read_rows; or name of a published set")
    add("--fields", default="", help="its columns, as problem=question,answer=gold")
    add("--steps", type=whole(0), default=0, help="optimizer steps; 0: --epochs decides")
    add("--micro-batch", type=whole(0), help="rows in a forward pass; 0: all of them; "
        "by default 16384 tokens")
    add("--seed", type=SEED, default=0, help="of initialisation, data order and sampling")
    # The learning rate
    add("--lr", type=real(0), help="at its peak; by default 1e-4 for adapters; SAEs, also at 0: "
        "by a rule of the optimizer; rl, pretrain: needed")
    add("--warmup", type=whole(0), default=0, help="steps of linear warm-up")
    add("--schedule", choices=("constant", "cosine", "linear"), default="constant",
        help="cosine: to a tenth; linear: to 0 over the last fifth")
    # Where it runs
    add("--device", help="cpu, cuda or cuda:N; by default a GPU where there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of language models")
    # The run directory
    add("--out", default="", help="run directory; by default out/PRESET/STAGE")
    add("--resume", action=SWITCH, default=False, help="continue the run in --out")
    add("--fresh", action=SWITCH, default=False, help="replace a run that is in --out")
    add("--log-every", type=whole(1), default=10, help="steps between lines of metrics.jsonl")
    add("--save-every", type=whole(1), default=100, help="steps between checkpoints")

def text_flags(add):
    add("--template", choices=("chat", "resa", "plain"), default="chat",
        help="resa: the published layout; plain: for models without a chat template")
    add("--seq-len", type=whole(2), help="tokens in a packed chunk; by default a power of two of "
        "which the data has 100, at most the published 2048")
    add("--shuffle", action=SWITCH, default=True, help="in each epoch; published: --no-shuffle")
    add("--batch", type=whole(1), help="chunks in an optimizer step; by default for 100 steps an "
        "epoch, at most the published 32, of tune 2")
    add("--epochs", type=whole(1), help="passes over the data, without --steps; by default the "
        "published 1, of tune 2, of sft 3; of an SAE up to 10, for 2M tokens")

def lora_flags(add):
    add("--target", default="", help="model spec that the adapter is for")
    add("--lora-r", type=whole(1), default=32, help="rank")
    add("--lora-alpha", type=whole(1), default=128, help="the adapter's scale is alpha / rank")
    add("--lora-dropout", type=real(0, 0.99), default=0.05, help="on its input, in training")
    add("--adapter-from", default="", help="a PEFT adapter to go on from, instead of a new one")

def blocks(text):
    """--layer: "4" -> 4, "4,8,12" as it is."""
    found = [whole(0)(word) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text} names a block twice")
    return found[0] if len(found) == 1 else ",".join(map(str, found))

def site_flags(add):
    add("--source", default="", help="model spec: gives the activations; or the teacher")
    add("--layer", type=blocks, help="decoder block, counted from 0; by default the SAE's, of a "
        "new one 3/7 of the depth; --stage sae takes several, as 4,8,12: OUT/layers.4, ..")
    add("--site", choices=("resid", "mlp"), help="output of block or of its MLP; by default the "
        "SAE's, of a new one resid")
    add("--other-site", action=SWITCH, default=False, help="allow an SAE of another one")

def sae_flags(add):
    add("--init", choices=("scratch", "finetune", "pretrained"), default="scratch",
        help="the paper's three modes: a fresh SAE, one to train further, one as it is")
    add("--sae-from", default="", help="DIR_OR_HUB_ID[#HOOKPOINT], if not from scratch")
    add("--variant", choices=(*VARIANTS, "help"), default="topk", help="kind; help lists them")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more settings of the variant")
    add("--latents", type=whole(1), help="size of the dictionary; by default 32 x the width, to a "
        "power of two")
    add("--k", type=whole(1), help="active latents per token; by default the published 32")
    # Its training
    add("--optimizer", choices=("signum", "adam"), default="adam", help="published: signum")
    add("--aux-coef", type=real(0), default=0.03125, help="weight of AuxK; published: 0")
    add("--dead-after", type=whole(1), default=100_000, help="tokens without firing; see AuxK")
    add("--sink-norm", type=real(0), help="leave out norms above this x the median; default 10")
    add("--tf32", action=SWITCH, help="round the inputs of its matrix products; default on a GPU")

def tune_flags(add):
    add("--sae", default="", help="DIR_OR_HUB_ID[#HOOKPOINT]; by default out/PRESET/sae")
    add("--splice", choices=("sae", "random", "noise", "none"), default="sae", help="or a control")
    add("--sae-grad", choices=("off", "on"), default="off", help="off: published code; on: text")
    # The objective
    add("--teacher", choices=("target", "source"), default="target", help="published: target")
    add("--kl-reduction", choices=("token", "sequence"), default="token",
        help="nats per token; published: the sum over the sequence")

def rl_flags(add):
    add("--template", choices=("chat", "plain"), default="chat", help="plain: for models without")
    add("--questions", type=whole(1), default=32, help="questions in a step")
    add("--group", type=whole(2), default=8, help="samples of each question")
    add("--temperature", type=real(0, above=True), default=1.0, help="of the samples; Tina has 0.7")
    add("--max-new-tokens", type=whole(1), help="length limit of a sample; needed")
    add("--rewards", nargs="+", choices=("accuracy", "format", "length"),
        default=["accuracy", "format"], help="what is rewarded, summed")
    add("--beta", type=real(0), default=0.0, help="weight of KL(policy || base); Tina has 0.04")

def pretrain_flags(add):
    add("--model", default="", help="spec to start from, as random:data/tiny/init/config.json")
    add("--only", default="", help="regular expression: parameters of such names learn")

def fast_flags(add):
    add("--compile", action=SWITCH, default=False, help="torch.compile: slow start, fast steps")
    add("--checkpointing", action=SWITCH, default=False, help="recompute blocks: less memory")

FLAGS = {"sae": (text_flags, site_flags, sae_flags), "sft": (text_flags, lora_flags, fast_flags),
         "tune": (text_flags, lora_flags, site_flags, tune_flags, fast_flags),
         "rl": (lora_flags, rl_flags, fast_flags),
         "pretrain": (text_flags, pretrain_flags, fast_flags)}
DEFAULTS = {"pretrain": {"warmup": 100, "schedule": "cosine"}}
NEEDED = {"sae": "source data", "tune": "target data", "sft": "target data",
          "rl": "target data steps lr max_new_tokens", "pretrain": "model data lr"}
RUN = {"sae": run_sae, "tune": run_tune, "sft": run_sft, "rl": run_rl, "pretrain": run_pretrain}

def settings(stage, argv):
    """argv without --stage -> a Namespace with what depends on other flags filled in."""
    parser = Parser(f"train.py --stage {stage}", RUN[stage].__doc__)
    for flags in (common_flags, *FLAGS[stage]):
        flags(parser.add_argument)
    parser.set_defaults(**DEFAULTS.get(stage, {}))
    args = parse(parser, argv, stage)
    args.out = args.out or f"out/{args.preset}/{'adapter' if stage == 'tune' else stage}"
    args.device = choose_device(args.device)            # ValueError: not here
    args.processes = world()[1]
    if stage == "rl" and args.max_new_tokens:
        split_batch(args, "questions", args.group, 16384 // args.max_new_tokens)
    elif stage != "rl" and args.batch and args.seq_len:      # else plan_steps does it
        split_batch(args, "batch", 1, 16384 // args.seq_len)
    if stage in ("tune", "sft"):
        derive(args, "lr", 1e-4, "of LoRA; the published 1e-6 left a 1.5B model as it was")
    check(args.lr != 0 or stage == "sae", "--lr must be above 0: nothing would be learned")
    check(not args.steps or "epochs" not in args.given, "--epochs has no effect with --steps")
    return args

def list_variants():
    """--variant help."""
    for name, variant in VARIANTS.items():
        hyper = [f"{k}={v}" for k, v in variant.defaults.items() if k not in ("dead_after", "seed")]
        print(f"{name:15s} {variant.__doc__.splitlines()[0]}\n{'':15s} {'  '.join(hyper)}")

def main(argv):
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--stage", nargs="?")
    known, rest = front.parse_known_args(argv)
    if known.stage is None and {"-h", "--help"} & set(rest):
        return print(__doc__)
    check(known.stage in RUN, f"usage: train.py --stage {' | '.join(RUN)} ...; see --help")
    with shared_run():
        args = settings(known.stage, rest)
        if known.stage == "sae" and args.variant == "help":
            return list_variants()
        needs(args, NEEDED[known.stage], f"in --stage {known.stage}")
        check_out(known.stage, args)
        with first_alone():              # before a model is loaded: a failure shows early
            data_file(args.data)
        summary = RUN[known.stage](args)
        print(args.out)
        for name, value in summary.items():
            print(f"  {name:20s}", f"{value:,.6g}" if isinstance(value, float) else value)

if __name__ == "__main__":
    front_door(main)
