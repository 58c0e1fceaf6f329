"""Tunable experts (MoTE, arXiv 2502.11096): the experts of a mixture that a behaviour uses.

    python -m tests.claims.experts [--quick] [--tokens last]        the embedded mixture
    python -m tests.claims.experts --model SPEC --data FILE --held FILE --behaviour REGEX

Experts chosen more often on questions whose answers show the behaviour are switched off, or forced
on; beside them the null sample, random experts of the same layers and about the same usage.
Results: OUT/table.txt, and in OUT/eval the answers, in files named by the experts edited.

P prompts, T tokens, L layers with experts, E experts in each, K experts of a token, R permutations.
"""

import re
from argparse import Namespace
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

import eval
from data.files import check, read_problems, write_text
from data.flags import experiment_parser, front_door, parse_experiment, slug, whole
from model import at_least_fp32, choose_device, load_model, load_tokenizer

# ---- Experts: whom a behaviour uses, off and on ------------------------------------------------

def routers(model):
    """{layer: the router of block `layer`}.  ValueError: the model has no experts."""
    blocks = enumerate(model.model.layers)
    found = {layer: block.mlp.gate for layer, block in blocks if hasattr(block.mlp, "experts")}
    check(found, "this model has no experts: a Qwen2-MoE is needed")
    return found

@torch.no_grad()
def expert_use(model, prompts, start=0):
    """fTRI, the read-out of MoTE: how often a token chooses each expert -> rates (P,L,E).

    prompts  lists of ids;  start  their tokens from here on count: 0 all, -1 the last"""
    def count(router, inputs, choice):                   # choice: weights and experts, (T,K) each
        used = F.one_hot(choice[1][start:], len(router.weight))                   # (T,K,E)
        rates.append(used.sum((0, 1)) / len(used))                                # (E,)
    rates, gates, device = [], routers(model), model.lm_head.weight.device
    with ExitStack() as stack:
        for gate in gates.values():
            stack.enter_context(gate.register_forward_hook(count))
        for ids in prompts:
            model.run(torch.tensor([ids], device=device))                         # (1,T)
    return torch.stack(rates).view(len(prompts), len(gates), -1).cpu()

def distinctive(rates, target, permutations=1000, seed=0):
    """rates (P,L,E), target prompts (P,) bool -> how distinctive experts are: score, p (L,E) each.

    Score: mean rate over target prompts less that over the rest.  p: the chance that any of all
    experts scores as high under shuffled labels.
    Resa: MoTE compares counts, which grow with the length of a prompt."""
    rng, labels = torch.Generator().manual_seed(seed), [target]
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
    gates, edits = routers(model), {}                    # edits {router: its experts}
    for layer in {layer for layer, _ in experts}:
        own, gate = [e for at, e in experts if at == layer], gates[layer]
        assert mode == "off" or len(own) <= gate.top_k, "a token uses fewer"
        edits[gate] = torch.tensor(own, device=gate.weight.device)

    def reroute(router, inputs, choice):
        weight, expert = choice                                                   # (N,K) each
        if mode == "off":
            gone = torch.isin(expert, edits[router])                              # (N,K)
            kept = weight.masked_fill(gone, 0)                                    # (N,K)
            share = weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-9)
            # A token that uses none keeps its bits; one that loses all has nothing left.
            return torch.where(gone.any(-1, keepdim=True), kept * share, weight), expert
        logits = at_least_fp32(F.linear(*inputs, router.weight)).log_softmax(-1)  # (N,E)
        logits[:, edits[router]] = logits.amax(-1, keepdim=True) + 0.01
        weight, expert = router.choose(logits)
        return weight.to(choice[0].dtype), expert
    with ExitStack() as stack:
        for gate in edits:
            stack.enter_context(gate.register_forward_hook(reroute))
        yield

# ---- The study: classes by the answers, experts by the classes, edits on other questions -------

def answers(study, which, name, mode="", experts=(), seed=0):
    """Graded answers to --data or --held under an edit, each with whether it "shows" it."""
    args, label = study.args, "+".join([slug(name), *(f"{layer}.{e}" for layer, e in experts)])
    path = eval.samples_path(args.out, getattr(args, which), label)      # each edit has its own
    with experts_edited(study.model, experts, mode):
        rows = eval.evaluate(study.model, study.tokenizer, study.problems[which], path, slots=128,
                             label=label, seed=args.seed + seed, fresh=args.fresh,
                             max_new_tokens=args.max_new_tokens)
    return [row | {"shows": bool(re.search(args.behaviour, row["completion"]))} for row in rows]

def classes(rows, which):
    """Answers -> which of them show the behaviour, (P,) bool.  ValueError: all are alike."""
    target = torch.tensor([row["shows"] for row in rows])
    check(0 < target.sum() < len(target), f"{target.sum()} of {len(target)} answers to --{which} "
          "show the behaviour: there must be some that do and some that do not")
    return target

def find_experts(study, rows, target):
    """Answers to --data -> {(layer, expert): its numbers}, best first; usage {layer: (E,)}."""
    prompts = [study.tokenizer.encode(row["prompt"]) for row in rows]             # [P][T]
    start = {"prompt": 0, "last": -1}[study.args.tokens]
    rates = expert_use(study.model, prompts, start)                               # (P,L,E)
    numbers = [rates[target].mean(0), rates[~target].mean(0),
               *distinctive(rates, target, seed=study.args.seed)]                 # (L,E) each
    experts, layers = {}, list(routers(study.model))
    for i in numbers[2].flatten().argsort(descending=True).tolist():
        row, e = divmod(i, rates.shape[2])               # row: of the layers with experts
        experts[layers[row], e] = [f"{number[row, e]:.3f}" for number in numbers]
    return experts, dict(zip(layers, rates.mean(0)))     # usage (E,) each

def plan_edits(args, best, usage, config):
    """Yields (name, mode, [experts]): none; by count, top ones off, null samples off, top on."""
    rng, fits = torch.Generator().manual_seed(args.seed), []
    for layer, e in best:                # of a layer, no more can be on than a token uses
        if [at for at, _ in fits].count(layer) < config.num_experts_per_tok:
            fits.append((layer, e))
    yield "unedited", "", [()]
    for n in args.counts:
        yield f"top {n} off", "off", [best[:n]]
        yield f"null {n} off", "off", [null_sample(best[:n], usage, rng) for _ in range(args.draws)]
        yield f"top {n} on", "on", [fits[:n]]

def effect(rows, base, what):
    """Answers with and without an edit -> cells: share of those with `what`, and its change."""
    rows, base = ([row | {"correct": row[what]} for row in some] for some in (rows, base))
    found, pair = eval.summarize(rows), eval.paired(rows, base)
    return ["{:.3f} [{:.3f}, {:.3f}]".format(found["pass@1"], *found["interval"]),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(pair["difference"], *pair["interval"])]

NOTE = """\
Experts were found on {n} questions, of which {shown} show the behaviour: uses per token, over
tokens "{tokens}"; p: the chance that any of all experts scores as high under shuffled labels.
Edits were measured on others: {target} show the behaviour in a sample of their own (target).
null: {draws} random draws of the same layers and about the same usage, pooled; intervals cover
questions, not other draws.  Behaviour: {behaviour}"""

def settings(argv):
    parser = experiment_parser("python -m tests.claims.experts", __doc__.split("\n")[0],
                               "model", "data", "held", "dtype")
    add = parser.add_argument
    add("--behaviour", help="regular expression that is found in an answer that shows it")
    add("--questions", type=whole(2), default=1000, help="of --data and of --held, the first ones")
    add("--tokens", choices=("prompt", "last"), default="prompt", help="counted on these")
    add("--counts", type=whole(1), nargs="+", default=[1, 2, 5, 10], help="of experts to edit")
    add("--draws", type=whole(1), default=5, help="null samples for each count")
    add("--max-new-tokens", type=whole(1), default=96, help="length limit of an answer")
    add("--seed", type=whole(0), default=0, help="of answers, permutations and null samples")
    add("--fresh", action="store_true", help="delete earlier answers instead of resuming")
    args = parse_experiment(parser, argv, dict(questions=100, counts=[1], draws=1), "experts")
    check(args.model and args.data and args.held and args.behaviour,
          "--model, --data, --held and --behaviour are needed; preset tiny has all four")
    try:
        re.compile(args.behaviour)
    except re.error as error:
        raise ValueError(f"--behaviour: not a regular expression ({error})") from None
    return args

def main(argv):
    args = settings(argv)
    problems = {which: read_problems(getattr(args, which))[:args.questions]
                for which in ("data", "held")}
    study = Namespace(args=args, problems=problems, tokenizer=load_tokenizer(args.model),
                      model=load_model(args.model, args.dtype, choose_device(args.device)))
    rows = answers(study, "data", "find")
    shown = classes(rows, "data")                                                 # (P,)
    experts, usage = find_experts(study, rows, shown)
    # A sample of its own: by the answers that are measured, a class would be of one kind.
    held = classes(answers(study, "held", "classes", seed=1), "held").tolist()
    base, lines = None, []
    for name, mode, draws in plan_edits(args, list(experts), usage, study.model.config):
        rows = []                        # the draws of a null sample are pooled
        for edit in draws:
            rows += answers(study, "held", name, mode, edit)
        base = base or rows              # the first is unedited
        for side, hit in (("target", True), ("rest", False)):
            ours, first = ([row for row, own in zip(some, held * len(draws)) if own == hit]
                           for some in (rows, base))     # base is shorter: zip stops there
            cells = effect(ours, first, "shows") + effect(ours, first, "correct")
            lines.append([name, side, *cells])
    top = [[f"{layer}.{e}", *cells] for (layer, e), cells in experts.items()][:max(args.counts)]
    text = "\n\n".join([
        eval.table(top, ["layer.expert", "in target", "in the rest", "score", "p"]),
        eval.table(lines, ["experts", "questions", "show it", "change", "right", "change"]),
        NOTE.format(**vars(args), n=len(shown), shown=int(shown.sum()), target=sum(held))])
    write_text(f"{args.out}/table.txt", text + "\n")
    print(f"\n{text}\n\n{args.out}: answers and this table")

if __name__ == "__main__":
    front_door(main)
