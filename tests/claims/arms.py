"""SAE-Tuning and its controls over training seeds: the arms of arXiv 2506.09967.

    python -m tests.claims.arms                            all sections, 5 seeds: 48 minutes
    python -m tests.claims.arms --quick --sections arms modes
    python -m tests.claims.arms --target MODEL --source MODEL --data FILE --bench math500 --seeds 1
        --sections arms rates --samples 4 --max-new-tokens 1024 --device cuda --dtype bfloat16

Every arm is a command line, noted in OUT/seed-N/commands.sh; the same command goes on where it was
killed, and makes nothing twice.  Two kinds of intervals: Student's t over seeds covers another
training and other samples, of the same questions; paired by problem covers other questions and
samples, for these trainings.  The result is OUT/report.md.
"""

import html
import json
import math
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import eval
import resa
import train
from data.files import TINY, check, embedded, read_json, write_jsonl, write_text
from data.flags import (arms_parser, front_door, open_experiment, parse_experiment, refuse_idle,
                        run_commands, slug, whole)
from data.rows import read_columns, read_problems
from model import Config, load_model, read_adapter
from resa import TAUGHT, TUNE

# The run that made data/tiny/rl, with its checkpoints: those after so many steps are sources.
GRPO = ("train.py --stage rl --target {target} --steps {rl_steps} --questions 16 --group {group} "
        "--max-new-tokens {rl_tokens} --lora-r 16 --lora-alpha 32 --lora-dropout 0 "
        "--schedule cosine --lr 1e-3 --save-every 10")
STEPS = (10, 50, 100)
HALVES = {"trigger": ("market", "gift", "bus", "saving"),
          "elicit": ("age", "garden", "reading", "boxes")}
OTHERS = ("math", "lm")              # models of the embedded lineage that cannot answer questions

# ---- The arms beside those of resa.py; {root} is the folder of all seeds, {out} that of one ----

SAE = "train.py --stage sae --steps {sae_steps} --source {source}"
SAES = resa.SAES | {
    "sae-low": SAE + " --layer {low}",
    "sae-high": SAE + " --layer {high}",
    "sae-tuned": SAE + " --init finetune --sae-from {out}/sae-base",
    "sae-rollouts": SAE + " --data {root}/rollouts.jsonl",
    "sae-trigger": SAE + " --data {root}/trigger.jsonl",
    "sae-elicit": SAE + " --data {root}/elicit.jsonl",
}
ELICIT = " --data {root}/elicit.jsonl"
ARMS = resa.ARMS | {
    "fine-tuned SAE": TUNE + " --sae {out}/sae-tuned",
    "SAE of rollouts": TUNE + " --sae {out}/sae-rollouts",
    "SAE of another site": TUNE + " --sae {out}/sae-mlp --other-site",
    "SAE of 4 families, tuned on 4 others": TUNE + " --sae {out}/sae-trigger" + ELICIT,
    "SAE of the same 4 it is tuned on": TUNE + " --sae {out}/sae-elicit" + ELICIT,
    "source teaches on those 4, no SAE": TAUGHT + " --splice none" + ELICIT,
    "a lower layer": TUNE + " --layer {low} --sae {out}/sae-low",
    "a higher layer": TUNE + " --layer {high} --sae {out}/sae-high",
}
RATES = ("1e-6", "1e-5", "1e-4", "3e-4")     # the first is the published one
for rate in RATES:
    ARMS[f"rate {rate}"] = TUNE.replace("{lr}", rate) + " --sae {out}/sae"
    ARMS[f"noise, rate {rate}"] = ARMS[f"rate {rate}"] + " --splice noise"
for n in STEPS:
    SAES[f"sae-rl-{n}"] = SAE.replace("{source}", f"{{target}}+{{root}}/rl/checkpoint-{n}")
    ARMS[f"source after {n} steps"] = f"{TUNE} --sae {{out}}/sae-rl-{n}"
    ARMS[f"itself after {n} steps"] = f"eval.py --model {{target}}+{{root}}/rl/checkpoint-{n}"
for name in OTHERS:
    ARMS[f"adapter of {name}"] = TUNE.replace("{target}", f"{TINY}/{name}") + " --sae {out}/sae"
    ARMS[f"random one like {name}'s"] = f"eval.py --model {{target}}+{{out}}/random-{name}"

# id -> what it asks, its arms, comparisons (arm, control, question).
SECTIONS = {
    "arms": ("The method in both readings, and what could explain it away.", list(resa.ARMS), [
        *resa.QUESTIONS[2:5],
        ("source teaches, with SAE", "source teaches, no SAE", "does the SAE help a teacher")]),
    "modes": ("How the SAE is made: of the base, fine-tuned from it on the source, from scratch, "
              "of the source's rollouts, of another site (the published pre-trained arm).", [
        "SAE of the base", "fine-tuned SAE", "SAE-Tuning (as coded)", "SAE of rollouts",
        "SAE of another site"], [
        ("fine-tuned SAE", "SAE-Tuning (as coded)", "does the start matter"),
        ("SAE of rollouts", "SAE-Tuning (as coded)", "does it matter what the SAE has read"),
        ("SAE of another site", "SAE-Tuning (as coded)", "does the site matter")]),
    "layers": ("Which block the SAE belongs to: {low}, {layer} or {high}.", [
        "a lower layer", "SAE-Tuning (as coded)", "a higher layer"], []),
    "rates": ("At which learning rate the objective is learned, and what it then does.",
              [f"{kind}rate {rate}" for rate in RATES for kind in ("", "noise, ")], [
        (f"rate {rate}", f"noise, rate {rate}", f"is it more than noise at {rate}")
        for rate in RATES]),
    "sources": ("SAEs of the base after so many steps of one RL run, and these sources themselves; "
                "the RL source is data/tiny/rl, another run of the same command.", [
        "SAE of the base", *(f"source after {n} steps" for n in STEPS), "SAE-Tuning (as coded)",
        *(f"itself after {n} steps" for n in STEPS), "RL source"], [
        (f"source after {n} steps", "SAE of the base", f"do {n} steps of RL matter")
        for n in STEPS]),
    "generality": ("Pass@1 on the four families that the SAE has never read.", [
        "RL source", "SAE of 4 families, tuned on 4 others", "SAE of the same 4 it is tuned on",
        "source teaches on those 4, no SAE"], [
        ("SAE of 4 families, tuned on 4 others", "SAE of the same 4 it is tuned on",
         "does it matter what the SAE has read")]),
    "modularity": ("Adapters tuned on another model of the lineage, put on the base.", [
        arm for arm in ARMS if arm.startswith(("adapter of", "random one"))], [
        (f"adapter of {name}", f"random one like {name}'s", "is it more than a random change")
        for name in OTHERS]),
    "cost": ("SAE and adapter of seed 0 beside the RL run that makes a source.", [
        "SAE-Tuning (as coded)"], []),
}
# They need the embedded lineage and its questions
EMBEDDED = ("sources", "generality", "modularity", "cost")

# ---- Running: what an arm needs comes first ----------------------------------------------------

def forecast(args, names):
    """Says what all will take, from ten steps of an SAE and an adapter and ten questions."""
    own, began = at_seed(args, 0, f"{args.out}/ten-steps"), time.perf_counter()
    vars(own).update(sae_steps=10, tune_steps=10, questions=10, fresh=True)
    Path(own.out).mkdir(parents=True, exist_ok=True)
    run_commands({"sae": SAES["sae"]}, own, "ten steps of an SAE")
    run_commands({"adapter": TUNE + " --sae {out}/sae"}, own, "ten steps, ten questions")
    sae, adapter = (read_json(Path(own.out, name, "summary.json")) for name in ("sae", "adapter"))
    asking = time.perf_counter() - began - sae["seconds"] - adapter["seconds"]
    text, runs = " ".join(ARMS[name] for name in names), args.seeds / args.workers / 3600
    saes = sum(f"{{out}}/{name} " in text + " " for name in SAES)
    adapters = sum(ARMS[name].startswith("train") for name in names)
    questions = args.questions or len(eval.read_bench(args.bench, args.fields)[0])
    batches = math.ceil(questions * args.samples / 128)      # ten at a time take as long as 128
    print(f"ahead, about: {saes} SAEs, {saes * sae['seconds'] / 10 * args.sae_steps * runs:.2g} h; "
          f"{adapters} adapters, {adapters * adapter['seconds'] / 10 * args.tune_steps * runs:.2g} "
          f"h; {len(names)} x {questions} questions x {args.samples}, "
          f"{len(names) * batches * asking * runs:.2g} h; memory "
          f"{max(memory(own.out, name) for name in ('sae', 'adapter')):.3g} GB", flush=True)

def memory(*where):
    """Most that a run held, in GB; of a CPU unknown, 0."""
    last = Path(*where, "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last).get("gb", 0)

def run_all(args, names):
    """Trains and asks the arms `names` for every seed -> {arm: [samples of a seed]}."""
    text = " ".join(ARMS[name] for name in names)
    saes = {name: words for name, words in SAES.items() if f"{{out}}/{name} " in text + " "}
    write_data(args, " ".join(saes.values()))
    if any("{root}/rl" in words for words in [text, *saes.values()]) or "cost" in args.sections:
        run_commands({"rl": GRPO}, at_seed(args, 0, args.out), "RL")
    asked = {name: [] for name in names}
    for seed in range(args.seeds):
        own = at_seed(args, seed, f"{args.out}/seed-{seed}")
        Path(own.out).mkdir(parents=True, exist_ok=True)
        later = {name for name in saes if "{out}/" in saes[name]}
        for some in (saes.keys() - later, later):
            run_commands({name: saes[name] for name in saes if name in some}, own, "SAEs")
        joined = {name for name in names if ARMS[name].startswith("eval") and "{out}" in ARMS[name]}
        specs = run_commands({n: ARMS[n] for n in names if n not in joined}, own, f"seed {seed}")
        for name in OTHERS if joined else ():
            like, where = f"{own.out}/adapter-of-{name}", f"{own.out}/random-{name}"
            random_adapter(args.target, like, where, seed)
        specs |= run_commands({name: ARMS[name] for name in joined}, own, f"seed {seed}, joined")
        for name in names:
            path = eval.samples_path(own.out, args.bench, specs[name])
            asked[name].append(eval.read_samples(path))
    return asked

def at_seed(args, seed, out):
    return Namespace(**vars(args) | {"seed": seed, "out": out, "root": args.out})

def write_data(args, words):
    """The training questions by halves of the families, and the source's answers to them."""
    path, columns = train.data_file(args.data), read_columns(args.fields)
    if "trigger" in words or "elicit" in words:
        rows = read_problems(path, columns)
        for half, families in HALVES.items():
            some = [row for row in rows if row.get("family") in families]
            write_jsonl(f"{args.out}/{half}.jsonl", some)
    if "rollouts" in words:
        own = at_seed(args, 0, args.out)
        own.bench, own.questions = str(path), 160 if args.quick else 2000
        spec = run_commands({"rollouts": "eval.py --model {source}"}, own, "rollouts")["rollouts"]
        problem = {row["id"]: row["problem"] for row in read_problems(path, columns)}
        rows = eval.read_samples(eval.samples_path(own.out, own.bench, spec))
        write_jsonl(f"{args.out}/rollouts.jsonl", [
            {"problem": problem[row["id"]], "completion": row["completion"]} for row in rows])

@torch.no_grad()
def random_adapter(target, like, directory, seed):
    """An adapter of Gaussian A and B, each product B A of the norm that it has in `like`."""
    adapter, rng = read_adapter(like), torch.Generator().manual_seed(seed)
    model = resa.load_adapter(load_model(target), like)
    for name, layer in resa.lora_layers(model).items():
        A, B = (torch.randn(side.shape, generator=rng) for side in adapter["pairs"][name])
        size = (adapter["pairs"][name][1] @ adapter["pairs"][name][0]).norm()
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B * (size / (B @ A).norm()))
    resa.save_adapter(model, directory)

# ---- What the numbers say ----------------------------------------------------------------------

def pass_at_1(rows):
    return sum(row["correct"] for row in rows) / len(rows)

def over_seeds(runs, controls=None):
    """[samples of a seed] -> mean Pass@1, or mean difference from the controls, low, high, and why
    there is no interval, low and high are None, and no verdict; else None.
    Two seeds are not enough: equal by chance in 1 to 20 % of simulations, and t is 12.7."""
    values = np.array([pass_at_1(rows) for rows in runs])                         # (S,)
    if controls:
        values = values - [pass_at_1(rows) for rows in controls]
    mean, S = float(values.mean()), len(values)
    if S < 3:
        return mean, None, None, f"{S} of the 3 seeds that an interval needs"
    if np.ptp(values) < 1e-9:                            # rounding apart
        return mean, None, None, f"all {S} seeds are equal, which leaves no spread for an interval"
    half = eval.student(S - 1) * values.std(ddof=1) / S**0.5
    low, high = np.clip([mean - half, mean + half], -1 if controls else 0, 1)
    return mean, float(low), float(high), None

def describe(args, name, rows):
    """One section -> its Markdown."""
    about, arms, questions = SECTIONS[name]
    about = about.format(**vars(args))
    if name == "generality":
        family = {row["id"]: row["family"] for row in read_problems(TINY / "test.jsonl")}
        for arm, runs in rows.items():
            rows[arm] = [[r for r in run if family[r["id"]] in HALVES["elicit"]] for run in runs]
    some = dict.fromkeys(["base", *arms])
    paired, _ = eval.report({arm: pooled(rows[arm]) for arm in some})
    parts = [f"## {name}", about, over_seeds_table(rows, some) if args.seeds > 2 else "",
             f"Paired by problem, for these trainings:\n\n```\n{paired}\n```"]
    words = [compare(args, rows, *question) for question in questions]
    if name == "cost":
        words = cost(args.out)
    if name == "rates":
        parts.append(learned(args, arms))
    return "\n\n".join(filter(None, [*parts, "\n".join(f"- {word}" for word in words)]))

def over_seeds_table(rows, arms):
    lines = [["arm", "Pass@1", "minus base"], ["---"] * 3]
    for arm in arms:
        rate = eval.bracketed(*over_seeds(rows[arm])[:3])
        gain = eval.bracketed(*over_seeds(rows[arm], rows["base"])[:3], "+")
        lines.append([arm, rate, "" if arm == "base" else gain])
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)

def compare(args, rows, a, b, why):
    """Two arms in words: over seeds where there are three, else problem by problem."""
    if args.seeds > 2:
        return eval.verdict(a, b, why, *over_seeds(rows[a], rows[b]))
    pair = eval.paired(pooled(rows[a]), pooled(rows[b]))
    return eval.verdict(a, b, why, pair["difference"], *pair["interval"], pair["withheld"])

def pooled(runs):
    """[samples of a seed] -> samples of each problem, whichever training they are of."""
    return [row | {"sample": i * len(rows) + row["sample"]}
            for i, rows in enumerate(runs) for row in rows]

def learned(args, arms):
    """What the objective came to in each arm, means over seeds, and how large the adapter is."""
    lines = []
    for arm in arms:
        found = []
        for seed in range(args.seeds):
            where = Path(args.out, f"seed-{seed}", slug(arm))
            nats = read_json(where / "summary.json")
            found.append([nats[f"kl{of}"] for of in ("_before", "_after", "_unspliced_after")]
                         + [adapter_norm(where)])
        lines.append([arm, *(f"{mean:.4g}" for mean in np.mean(found, 0))])
    return "```\n" + eval.table(lines, ["held out, nats a token", "KL before", "KL after",
                                       "KL without SAE", "norm of the adapter"]) + "\n```"

def adapter_norm(where):
    """Of all that an adapter adds: the root of the sum of squares of scale B A."""
    adapter = read_adapter(where)
    return float(sum((adapter["scales"][name] * (B @ A)).square().sum()
                     for name, (A, B) in adapter["pairs"].items())) ** 0.5

def cost(out):
    """What SAE and adapter took of what RL took, from the summaries of seed 0, in words."""
    sae, adapter, rl = (read_json(Path(out, where, "summary.json"))
                        for where in ("seed-0/sae", "seed-0/sae-tuning-as-coded", "rl"))
    words = [f"SAE and adapter: {sae[unit] + adapter[unit]:,.4g} {unit}; RL: {rl[unit]:,.4g}, "
             f"{(sae[unit] + adapter[unit]) / rl[unit]:.3f} of it"
             for unit in ("seconds", "tokens", "flops")]
    return [*words, "The RL run that made the source comes on top."]

def main(argv):
    parser = arms_parser("python -m tests.claims.arms", __doc__.split("\n")[0])
    parser.set_defaults(questions=500)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=None,
                        help="by default all that the preset's models allow")
    parser.add_argument("--seeds", type=whole(1), default=5, help="trainings: seeds 0, 1, ..")
    quick = dict(seeds=1, questions=40, sae_steps=4, tune_steps=4)
    args = parse_experiment(parser, argv, quick)
    refuse_idle(args, "seed", "--seeds, which are 0, 1, ..")
    check(args.bench != "all" and ("," not in args.bench or Path(args.bench).exists()),
          f"--bench {args.bench}: one at a time, each with an --out of its own")
    eval.read_bench(args.bench, args.fields)     # a mistake shows before anything is trained
    ours = args.bench == "tiny" and all(map(embedded, (args.source, args.target, args.data)))
    args.sections = args.sections or [s for s in SECTIONS if ours or s not in EMBEDDED]
    for name in args.sections:
        check(ours or name not in EMBEDDED,
              f"--sections {name} needs the models, data and questions of --preset tiny")
    blocks = Config.from_pretrained(args.target).num_hidden_layers
    args.layer = blocks * 3 // 7             # as train.py chooses it
    args.low, args.high = args.layer // 2, (args.layer + blocks) // 2
    open_experiment(args)
    args.rl_steps, args.group, args.rl_tokens = (100, 2, 8) if args.quick else (200, 8, 96)
    began = time.perf_counter()
    names = dict.fromkeys(["base", *(arm for s in args.sections for arm in SECTIONS[s][1])])
    if not args.quick and not Path(args.out, "seed-0").exists():
        forecast(args, names)
    rows = run_all(args, [*names])
    n = f"{args.seeds} seed(s) x {len(rows['base'][0])} samples of {args.bench}"
    if args.seeds > 2:
        n += "; intervals of the tables: Student's t over seeds, none for equal ones"
    parts = [f"# SAE-Tuning and its controls\n\n{time.strftime('%Y-%m-%d')}, {n}"]
    parts += [describe(args, name, dict(rows)) for name in args.sections]
    write_text(f"{args.out}/report.md", html.escape("\n\n".join(parts), quote=False) + "\n")
    print("\n\n".join(parts))
    print(f"\n{args.out}/report.md; {time.perf_counter() - began:.0f} s in all")

if __name__ == "__main__":
    front_door(main)
