"""Tunable experts (MoTE, arXiv 2502.11096): the experts of a mixture that a behaviour uses.

    python -m tests.claims.experts [--quick] [--tokens last]        the embedded mixture
    python -m tests.claims.experts --model SPEC --data FILE --held FILE --behaviour REGEX

Experts chosen more often on questions whose answers show the behaviour are switched off, or forced
on; the control is random experts of the same layers and about the same usage, switched off.
Results: OUT/table.txt, and in OUT/eval the answers, in files named by the experts edited.

P prompts, T tokens, L layers of E experts, K experts of a token, R permutations.
"""

import re
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F

import eval
from data.files import check, embedded, write_text
from data.flags import (
    choose_device, experiment_parser, front_door, needs, open_experiment, parse_experiment, slug,
    whole)
from data.rows import read_columns, read_problems
from model import at_least_fp32, load_model, load_tokenizer

# ---- Experts: whom a behaviour uses, off and on ------------------------------------------------

def routers(model):
    """{layer: the router of block `layer`}.  ValueError: the model has no experts."""
    found = {layer: block.mlp.gate for layer, block in enumerate(model.model.layers)
             if hasattr(block.mlp, "experts")}
    check(found, "this model has no experts: a Qwen2-MoE is needed")
    return found

@torch.no_grad()
def expert_use(model, prompts, start=0):
    """Prompts [P][T] -> how often their tokens from `start` on choose each expert, (P,L,E)."""
    def count(router, inputs, choice):                   # choice: weights and experts, (T,K) each
        used = F.one_hot(choice[1][start:], len(router.weight))                   # (T,K,E)
        rates.append(used.sum((0, 1)) / len(used))                                # (E,)
    rates, gates = [], routers(model)
    with ExitStack() as stack:
        for gate in gates.values():
            stack.enter_context(gate.register_forward_hook(count))
        for ids in prompts:
            model.run(torch.tensor([ids], device=model.lm_head.weight.device))    # (1,T)
    return torch.stack(rates).view(len(prompts), len(gates), -1).cpu()

def distinctive(rates, target, permutations=1000):
    """rates (P,L,E), target prompts (P,) bool -> score, mean rate over these less that over the
    rest, and p, the chance that any expert scores as high under shuffled labels: (L,E) each.
    Resa: MoTE compares counts, which grow with the length of a prompt."""
    rng, labels = torch.Generator().manual_seed(0), [target]
    for _ in range(permutations):
        labels.append(target[torch.randperm(len(target), generator=rng)])
    labels = torch.stack(labels).double()                                         # (1+R,P)
    weight = labels / target.sum() - (1 - labels) / (~target).sum()               # (1+R,P)
    scores = weight @ rates.flatten(1).double()                                   # (1+R,L*E)
    p = eval.permutation_p(scores[0], scores[1:].amax(1))        # against the highest of all
    return scores[0].view(rates.shape[1:]).float(), torch.tensor(p).view(rates.shape[1:])

def null_sample(chosen, usage, rng, nearest=4):
    """For each (layer, expert) another of its layer, of the `nearest` in usage {layer: (E,)}."""
    drawn = []
    for layer, e in chosen:
        order = (usage[layer] - usage[layer][e]).abs().argsort().tolist()
        others = [(layer, o) for o in order if (layer, o) not in chosen + drawn][:nearest]
        if others:                       # else the layer is used up, and the sample is smaller
            drawn.append(others[int(torch.randint(len(others), (), generator=rng))])
    return drawn

@contextmanager
def experts_edited(model, experts, mode):
    """Inside, for every token, experts [(layer, expert), ..] are
    "off"  of weight 0; the token's other experts share what they had, nearest to MoTE
    "on"   chosen: log-probability 0.01 above the highest (SteerMoE, arXiv 2509.09660)"""
    def reroute(own, router, inputs, choice):
        weight, expert = choice                                                   # (N,K) each
        if mode == "off":
            gone = torch.isin(expert, own)                                        # (N,K)
            kept = weight.masked_fill(gone, 0)                                    # (N,K)
            share = weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-9)
            # A token that uses none keeps its bits; one that loses all has nothing left.
            return torch.where(gone.any(-1, keepdim=True), kept * share, weight), expert
        logits = at_least_fp32(F.linear(*inputs, router.weight)).log_softmax(-1)  # (N,E)
        logits[:, own] = logits.amax(-1, keepdim=True) + 0.01
        weight, expert = router.choose(logits)
        return weight.to(choice[0].dtype), expert
    with ExitStack() as stack:
        for layer in {layer for layer, _ in experts}:
            gate, device = routers(model)[layer], model.lm_head.weight.device
            own = torch.tensor([e for at, e in experts if at == layer], device=device)
            stack.enter_context(gate.register_forward_hook(partial(reroute, own)))
        yield

# ---- The study: classes by the answers, experts by the classes, edits on other questions -------

def plan_edits(counts, best, usage, top_k):
    """Yields (name, mode, [experts]): none; by count, top ones off, null samples off, top on."""
    rng = torch.Generator().manual_seed(0)
    fits = [(layer, e) for i, (layer, e) in enumerate(best)      # no more than a token uses
            if [at for at, _ in best[:i]].count(layer) < top_k]
    yield "unedited", "", [()]
    for n in counts:
        yield f"top {n} off", "off", [best[:n]]
        draws = [null_sample(best[:n], usage, rng) for _ in range(5)]
        fewer = f", {len(draws[0])} drawn" * (len(draws[0]) < len(best[:n]))
        yield f"null {n} off{fewer}", "off", draws       # named by what it controls, not its size
        yield f"top {n} on", "on", [fits[:n]]

def effect(rows, base):
    """Answers with and without an edit -> cells: share of right ones, and its change."""
    found, pair = eval.summarize(rows), eval.paired(rows, base)
    return [eval.bracketed(found["pass@1"], *found["interval"]),
            eval.bracketed(pair["difference"], *pair["interval"], "+")
            + " *" * bool(pair["withheld"])]

NOTE = """
Top experts (layer, expert), found on {} questions: {}; p of the first {:.3f}.
Measured on others; target: shows it in a sample of its own.  null: 5 draws, pooled.
*: too few questions differ, or carry it, for a verdict."""

def main(argv):
    parser = experiment_parser("python -m tests.claims.experts", __doc__.split("\n")[0],
                               "model", "data", "held", "dtype")
    add = parser.add_argument
    add("--behaviour", default="", help="regular expression, found in answers that show it")
    add("--questions", type=whole(2), default=1000, help="of --data and of --held, the first ones")
    add("--tokens", choices=("prompt", "last"), default="prompt", help="counted on these")
    add("--counts", type=whole(1), nargs="+", default=[1, 2, 5, 10], help="of experts to edit")
    add("--max-new-tokens", type=whole(1), default=96, help="length limit of an answer")
    args = parse_experiment(parser, argv, dict(questions=100, counts=[1]), "experts")
    try:
        re.compile(args.behaviour)
    except re.error as error:
        raise ValueError(f"--behaviour {args.behaviour}: no regular expression, {error}") from None
    needs(args, "held", "in experts")
    problems = {}
    for file in (args.data, args.held):
        columns = read_columns("" if embedded(file) else args.fields)
        problems[file] = read_problems(file, columns)[:args.questions]
    open_experiment(args)
    model = load_model(args.model, args.dtype, choose_device(args.device))
    layers, tokenizer = list(routers(model)), load_tokenizer(args.model)          # [L]

    def ask(file, name, mode="", experts=(), seed=0):    # each edit has a file of its own
        label = "+".join([slug(name), *(f"{layer}.{e}" for layer, e in experts)])
        path = eval.samples_path(args.out, file, label)
        with experts_edited(model, experts, mode):
            rows = eval.evaluate(model, tokenizer, problems[file], path, slots=128, label=label,
                                 prompt=eval.bench_prompt(file), seed=seed,
                                 max_new_tokens=args.max_new_tokens)
        return [row | {"shows": bool(re.search(args.behaviour, row["completion"]))} for row in rows]

    # Of --held a sample of its own: by the answers that are measured, a class is of one kind.
    found, own = ask(args.data, "find"), ask(args.held, "classes", seed=1)
    shown, target = (torch.tensor([row["shows"] for row in rows]) for rows in (found, own))
    for file, some in ((args.data, shown), (args.held, target)):                  # (P,)
        check(0 < some.sum() < len(some), f"{some.sum()} of {len(some)} answers to {file} "
              "show the behaviour: there must be some that do and some that do not")
    prompts = [tokenizer.encode(row["prompt"]) for row in found]                  # [P][T]
    rates = expert_use(model, prompts, {"prompt": 0, "last": -1}[args.tokens])    # (P,L,E)
    score, p = distinctive(rates, shown)                                          # (L,E) each
    order = score.flatten().argsort(descending=True).tolist()
    best = [(layers[i // score.shape[1]], i % score.shape[1]) for i in order]
    usage, top_k = dict(zip(layers, rates.mean(0))), model.config.num_experts_per_tok
    base, lines = [], []
    for name, mode, draws in plan_edits(args.counts, best, usage, top_k):
        rows = [row for edit in draws for row in ask(args.held, name, mode, edit)]
        base = base or rows              # the first is unedited
        for side, hit in (("target", True), ("rest", False)):
            pair = [[row for row, own in zip(some, target.tolist() * len(draws)) if own == hit]
                    for some in (rows, base)]            # base is shorter: zip stops there
            show = [[row | {"correct": row["shows"]} for row in some] for some in pair]
            lines.append([name, side, *effect(*show), *effect(*pair)])
    text = eval.table(lines, ["experts", "questions", "show it", "change", "right", "change"])
    text += "\n" + NOTE.format(len(shown), best[:max(args.counts)], p.min())
    write_text(f"{args.out}/table.txt", text + "\n")
    print(f"\n{text}\n\n{args.out}: answers and this table")

if __name__ == "__main__":
    front_door(main)
