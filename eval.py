"""Pass@1: prompts -> samples -> grades -> a table with error bars.

    python eval.py --bench tiny                               the tuned model, embedded questions
    python eval.py --bench tiny --model MODEL MODEL+ADAPTER   several models, paired with the first
    python eval.py --bench aime24,amc23 --model MODEL         published sets, fetched on first use
    python eval.py --bench my.jsonl --samples 4               any JSONL of problem and answer
    torchrun --nproc-per-node 2 eval.py ...                   processes share the problems
    python eval.py --regrade out/tiny/eval/tiny/LABEL.jsonl   grades what is on disk again
    python eval.py show out/tiny/eval/tiny/LABEL.jsonl        prints samples, to be read

Pass@1 is the mean over problems of the mean over samples; sampling defaults to the published
settings (arXiv 2506.09967).  Resa: there, one sample per problem and no interval; --samples 1, the
default, is that number, here with its interval.
"""
# Letters in shape comments: P problems.

import hashlib
import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import quote

import torch
from tqdm import tqdm

from data import prepare
from data.files import (
    REQUIRED, TINY, check, embedded, one_line, one_writer, parse_json, printable, read_fields,
    read_json, read_text, relative, shorten, write_json, write_text)
from data.flags import (
    SEED, Parser, choose_device, front_door, needs, open_run, parse, read_preset, real, refuse_idle,
    tell, whole)
from data.grade import extract_answer, grade, grade_answer       # noqa: F401  (for importers)
from data.processes import first_alone, shared_run, wait_for_all, world
from data.rows import messages_of, prompt_of, read_columns, read_problems
from data.stats import (                                         # noqa: F401  (for importers)
    bracketed, figure, interval, paired, paired_difference, pass_at_k, permutation_p, student,
    summarize, verdict, wilson)
from model import DTYPES, load_model, load_tokenizer, stream, think_prefix

# ---- Benchmarks --------------------------------------------------------------------------------

# The instructions of the released code (arXiv 2506.09967; GPQA's are those of simple-evals), to the
# letter, as scores depend on them.  They go into the user's turn; there is no system prompt.
MATHS_PROMPT = (
    "Solve the following math problem efficiently and clearly.  The last line of your response "
    r"should be of the following format: 'Therefore, the final answer is: $\boxed{ANSWER}$. I hope "
    "it is correct' (without quotes) where ANSWER is just the final number or expression that "
    "solves the problem. Think step by step before answering.\n\n{problem}")
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n{problem}")
PUBLISHED = dict.fromkeys(prepare.SOURCES, MATHS_PROMPT) | {"gpqa": CHOICE_PROMPT}
BENCHES = {"tiny": "{problem}"} | PUBLISHED      # name -> prompt
ALL = [name for name in PUBLISHED if name != "gsm8k"]       # of competitions and exams
MAX_NEW_TOKENS = 32768                           # per completion, as published

def read_bench(name, fields=""):
    """A --bench value: a name in BENCHES, or a file (GPQA's .csv too) -> (problems, source)."""
    if name in PUBLISHED:
        return prepare.benchmark(name)
    path = TINY / "test.jsonl" if name == "tiny" else Path(name)
    check(path.suffix in (".jsonl", ".json", ".csv"), f"--bench {name}: known names are "
          f"{', '.join(BENCHES)}, all; or give a file: path.jsonl")
    if path.suffix == ".csv":
        return prepare.read_gpqa(path), relative(path)
    return read_problems(path, read_columns(fields) if name != "tiny" else {}), relative(path)

def bench_prompt(name):
    """What the questions of a --bench value are asked with."""
    if name.endswith(".csv"):
        return CHOICE_PROMPT
    return BENCHES.get(name) or prompt_of(name)

def mark(row):
    """A sample with its grade.  Needs only the row: grading from disk is grading at run time."""
    answer, right = grade_answer(row["gold"], think_prefix(row["prompt"]) + row["completion"])
    return row | {"extracted": answer, "correct": right}

# ---- Evaluate: plan, resume, sample, grade, write ----------------------------------------------

def evaluate(model, tokenizer, problems, path, *, samples=1, temperature=0.6, top_p=0.95, top_k=0,
             max_new_tokens=MAX_NEW_TOKENS, seed=0, slots=64, label="", fresh=False,
             prompt="{problem}", system=""):
    """Samples every problem, grades, writes path (.jsonl) -> its rows, by problem and sample.
    A sample depends on its problem, its seed (seed, row, sample) and the settings, not on batch,
    order or number of processes: an interrupted run generates what is missing and leaves the same
    bytes, and a finished one can be given more samples.  Under torchrun every process calls this.
    ValueError: path holds other settings, weights or problems (fresh=True deletes it instead)."""
    path, weight, was_training = Path(path), next(model.parameters()), model.training
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "top_k": top_k}
    settings = {"label": label, **sampling, "weights": fingerprint(model),
                "device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}
    plan, ids_of = make_plan(model, tokenizer, problems, samples, seed, settings, prompt, system)
    rank, processes = world()
    with one_writer(path.parent, path.name) if rank == 0 else nullcontext():
        done = gather(path, plan, fresh)
        missing = my_share(plan, done)
        if done:
            print(f"{path}: {len(done)} of {len(plan)} samples are already there", file=sys.stderr)
        # Every sample is on disk the moment it ends: kill -9 loses nothing else.
        model.eval()                                     # an adapter in training has dropout
        own = path if processes == 1 else Path(f"{path}.{rank}")     # no two write one file
        with open(own, "a", encoding="utf-8") as file, torch.no_grad():
            rows = generate_rows(model, tokenizer, missing, ids_of, slots=slots, **sampling)
            for row in tqdm(rows, label or "eval", len(done) + len(missing), initial=len(done),
                            unit="sample", disable=None):        # a bar on terminals
                file.write(json.dumps(row) + "\n")
                file.flush()
                check(own.exists(), f"{own}: deleted while it was written; start again")
        model.train(was_training)
        return list(gather(path, plan).values())         # written in the order of the plan

def fingerprint(model):
    """12 hex digits that change with the weights, so that old samples cannot pass for new ones."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        few = p.detach().flatten()[::max(1, p.numel() // 256)]   # some 256 values of each
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]

def make_plan(model, tokenizer, problems, samples, seed, settings, prompt="{problem}", system=""):
    """-> {(id, sample): row, complete but for the completion}, {prompt: its token ids}."""
    plan, ids_of = {}, {}
    for i, problem in enumerate(problems):              # i, not the id, is in the seed
        text = tokenizer.chat(messages_of(problem, prompt, system))
        # Resa: the published runs put a second begin token before the template's own.
        ids_of[text] = tokenizer.encode(text)
        for j in range(samples):                        # sample j has its own seed
            plan[problem["id"], j] = {
                "id": problem["id"], "sample": j, "seed": [seed, i, j], "prompt": text,
                "gold": problem["answer"], "settings": settings}
    positions = model.config.max_position_embeddings
    room = [max(positions - len(ids), 0) for ids in ids_of.values()]  # new tokens, per prompt
    check(max(room) > 0, f"the shortest prompt fills all {positions} positions of this model")
    if min(room) < settings["max_new_tokens"]:
        print(f"{settings['label']}: the model's {positions} positions leave room for {min(room)} "
              f"to {max(room)} new tokens; {room.count(0)} of {len(room)} prompts fill them all, "
              "so that nothing is generated", file=sys.stderr)
    return plan, ids_of

def generate_rows(model, tokenizer, planned, ids_of, *, max_new_tokens, **sampling):
    """Samples the planned rows and yields each, graded, as it ends.
    A completion also ends where the model's positions do; a prompt that fills them all gets none.
    """
    fits = []                                            # (row, new tokens it has room for)
    for row in planned:
        left = model.config.max_position_embeddings - len(ids_of[row["prompt"]])
        if left > 0:
            fits.append((row, left))
        else:
            yield mark(row | {"completion": "", "tokens": 0, "finish": "length"})
    # One limit serves the whole batch; each completion is then cut to its own room.
    limit = min(max_new_tokens, max((left for _, left in fits), default=1))
    requests = [(ids_of[row["prompt"]], tuple(row["seed"])) for row, _ in fits]
    for i, ids, why in stream(model, requests, stop_ids=tokenizer.eos_ids, max_new_tokens=limit,
                              **sampling):
        row, left = fits[i]
        if len(ids) > left:                             # the positions end here
            ids, why = ids[:left], "length"
        text = tokenizer.decode(ids[:-1] if why == "stop" else ids)  # without stop id
        yield mark(row | {"completion": text, "tokens": len(ids), "finish": why})

# ---- Samples on disk, shared by the processes of torchrun --------------------------------------

# name: (kind, low, high, default), as data.files.read_fields takes them
FIELDS = {name: (str, None, None, REQUIRED) for name in ("id", "prompt", "gold", "completion")}
FIELDS |= {"sample": (int, 0, 2**62, REQUIRED), "tokens": (int, 0, 2**62, REQUIRED),
           "seed": ([int], 3, 3, REQUIRED), "settings": (dict, None, None, REQUIRED),   # 3 ints
           "finish": (("stop", "length"), None, None, REQUIRED),
           "extracted": (str, None, None, None), "correct": (bool, None, None, None)}

def read_samples(path):
    """An evaluation .jsonl, finished or not -> its samples.  ValueError names a bad line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = {}
    lines = Path(path).read_bytes().split(b"\n")
    for n, line in enumerate(lines[:-1], start=1):       # a last one without newline was cut off
        row = parse_json(line, f"{path}:{n}")
        check(isinstance(row, dict), f"{path}:{n}: a JSON object was expected")
        read_fields(row, FIELDS, f"{path}:{n}: not a sample of eval.py")       # row stays whole
        key = row["id"], row["sample"]
        check(rows.get(key, row) == row,                 # the same again does no harm
              f"{path}:{n}: sample {key[1]} of problem {key[0]!r} is here twice, and differs")
        rows[key] = row
    return list(rows.values())

def gather(path, plan, fresh=False):
    """Samples on disk, checked against the plan, graded -> {(id, sample): row} in its order.
    path, and path.0, path.1, ... of processes, become one file without torn lines.
    ValueError if a file holds anything else: mixed settings give a number that belongs to none."""
    done = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    wait_for_all()                                       # until every process has written
    parts = sorted(path.parent.glob(f"{path.name}.[0-9]*"))
    for file in [path, *parts]:
        if file.exists() and not fresh:
            done |= accept(file, plan)
    done = {key: done[key] for key in plan if key in done}   # in its order
    wait_for_all()                                       # until every process has read
    if world()[0] == 0:
        write_text(path, "".join(json.dumps(row) + "\n" for row in done.values()))
        for file in parts:                              # their rows are in path now
            file.unlink()
    wait_for_all()                                       # nobody appends before this
    return done

def accept(path, plan):
    """The samples of one file, graded again, if all of them belong to the plan."""
    done, hint = {}, "--fresh starts it over, another --out keeps it"
    for row in read_samples(path):
        key = row["id"], row["sample"]
        check(key in plan,
              f"{path}: has sample {key[1]} of problem {key[0]!r}, not asked for; {hint}")
        old, new = row["settings"] | row, plan[key]["settings"] | plan[key]
        for name in [*plan[key]["settings"], "seed", "prompt"]:
            check(old.get(name) == new[name], f"{path}: was made with {name} "
                  f"{shorten(old.get(name))}, this run has {shorten(new[name])}; {hint}")
        done[key] = mark(row | {"gold": plan[key]["gold"]})      # a corrected gold counts at once
    return done

def my_share(plan, done):
    """The rows this process has to sample: whole problems, so that each prompt is read once."""
    rank, processes = world()
    missing = [row for key, row in plan.items() if key not in done]  # in the plan's order
    mine = set(list(dict.fromkeys(row["id"] for row in missing))[rank::processes])
    return [row for row in missing if row["id"] in mine]

# ---- Table -------------------------------------------------------------------------------------

HEADER = ["model", "Pass@1", "95% CI", "n", "SE samples", "SE problems", "majority", "diff",
          "95% CI", "p", "tokens", "truncated", "no answer"]

def table(rows, header):
    """Rows of cells -> aligned text, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    width, lines = [max(map(len, column)) for column in zip(*cells)], []
    for first, *rest in cells:
        line = "  ".join([first.ljust(width[0]), *map(str.rjust, rest, width[1:])])
        lines.append(line.rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

def report(results):
    """{label: rows} -> (table and verdicts withheld, {label: summary}), paired with the first."""
    summaries, lines, words, first = {}, [], [], next(iter(results))
    for label, rows in results.items():
        summary = summaries[label] = summarize(rows)     # and, but for the first, "paired"
        if label != first:
            pair = summary["paired"] = {"against": first} | paired(rows, results[first])
            if pair["withheld"]:
                words.append(f"{label} against {first}, no verdict: {pair['withheld']}.")
        lines.append(cells_of(label, summary))
    # A column that is empty in every line is left out.
    header, *lines = zip(*(column for column in zip(HEADER, *lines) if any(column[1:])))
    return "\n\n".join([table(lines, header), *words]), summaries

def cells_of(label, s):
    """A model's line of the table, from its summary s: a cell for each name in HEADER."""
    noise = []
    for x in (s["error"]["samples"], s["error"]["problems"], s.get(f"majority@{s['samples']}")):
        noise.append("" if x is None else f"{x:.3f}")
    against = ["", "", ""]                              # the first has nothing to compare with
    if "paired" in s:
        low, high = s["paired"]["interval"]
        against = [f"{s['paired']['difference']:+.3f}", f"[{low:+.3f}, {high:+.3f}]",
                   f"{s['paired']['p']:.4f}"]
    low, high = s["interval"]
    return [label, f"{s['pass@1']:.3f}", f"[{low:.3f}, {high:.3f}]",
            f"{s['problems']} x {s['samples']:.3g}", *noise, *against, f"{s['tokens']:.1f}",
            f"{s['truncated']:.1%}", f"{s['no_answer']:.1%}"]

# ---- Finished files: their names, grading them again, reading them -----------------------------

def label_of(spec):
    """A model spec or path as a file name, one to one: / becomes ~, what is unusual %XX."""
    spec = relative(spec)
    raw = os.fsencode(spec)                              # a path may hold bytes that are no text
    name = quote(raw, safe="/+@#=").replace("~", "%7E").replace("/", "~")   # ~ first: one to one
    if len(name) >= 150:                                 # file systems stop at 255 bytes
        name = f"{name[-120:]}-{hashlib.sha256(raw).hexdigest()[:12]}"
    return name

def samples_path(out, bench, spec):
    """Where the samples of a model on a benchmark are: OUT/eval/BENCH/LABEL.jsonl."""
    folder = label_of(re.sub(r"\.(jsonl|json|csv)$", "", bench))
    return Path(out) / "eval" / folder / f"{label_of(spec)}.jsonl"

def conclude(out, bench, asked, questions, note):
    """What an experiment found, printed and in OUT/BENCH.txt, with a figure in OUT/BENCH.svg.
    asked      {arm: the model spec that was asked}; every arm is paired with the first
    questions  [(arm, its control, question)], each answered in words"""
    rows = {name: read_samples(samples_path(out, bench, spec)) for name, spec in asked.items()}
    text, summaries = report(rows)
    text, words = text.split("\n\n")[0], []             # the table alone
    for arm, control, why in questions:
        pair = paired(rows[arm], rows[control])
        words.append(verdict(arm, control, why, pair["difference"], *pair["interval"],
                             pair["withheld"]))
    text = "\n\n".join([text, note, "\n".join(words)])
    points = [(name, s["pass@1"], *s["interval"]) for name, s in summaries.items()]
    write_text(f"{out}/{label_of(bench)}.txt", text + "\n")
    write_text(f"{out}/{label_of(bench)}.svg", figure(points, f"Pass@1 on {bench}"))
    print(f"\n{bench}\n\n{text}\n\n{out}: samples, adapters, table, figure, commands")

def regrade(paths):
    """Grades the samples in these files again -> {label: rows}; says how many grades changed."""
    results = {}
    for path in paths:
        old = read_samples(path)
        check(old, f"{path}: no sample in this file")
        rows = [mark(row) for row in old]               # nothing is written
        changed = sum(a.get("correct") != b["correct"] for a, b in zip(old, rows))
        print(f"{path}: {len(rows)} samples, {changed} of them graded differently in the file")
        label = Path(path).stem
        results[str(path) if label in results else label] = rows     # of two alike
    return results

def show(argv):
    """eval.py show FILE [--wrong] [--id ID]"""
    parser = Parser("eval.py show", "Prints samples of an evaluation file, to be read.", False)
    parser.add_argument("file", metavar="FILE", help="the .jsonl file of an evaluation")
    parser.add_argument("--wrong", action="store_true", help="only those that were graded wrong")
    parser.add_argument("--id", help="only those of this problem, at full length")
    args = parse(parser, argv)
    rows = [row if row.get("correct") is not None and "extracted" in row else mark(row)
            for row in read_samples(args.file)]          # a grade in the file stays
    picked = [row for row in rows
              if args.id in (None, row["id"]) and not (args.wrong and row["correct"])]
    check(picked, f"{args.file}: no such sample among its {len(rows)}")
    for row in picked:
        print(as_page(row, whole=args.id is not None), end="\n\n")
    right = sum(row["correct"] for row in picked)
    print(f"{len(picked)} of {len(rows)} samples, {right} of them right")

def as_page(row, whole):
    """A sample to be read.  The completion is indented, so that it cannot pass for our words."""
    lines = row["completion"].strip().splitlines()
    if len(lines) > 24 and not whole:                   # only the two ends of a long one
        lines[12:-12] = [f"[{len(lines) - 24} more lines: --id {row['id']}]"]
    word = "right" if row["correct"] else "WRONG"
    cut = ", then cut off" if row["finish"] == "length" else ""
    title = f"problem {row['id']}, sample {row['sample']}: {word}, {row['tokens']} tokens{cut}"
    return printable("\n".join([
        f"==== {title} ====", row["prompt"].strip(), "", *(f"  | {line}" for line in lines),
        "", f"extracted: {row['extracted']}", f"gold:      {row['gold']}"]))

# ---- Command line ------------------------------------------------------------------------------

def settings(argv):
    """The command line of an evaluation -> its settings, checked."""
    parser = Parser("eval.py", __doc__)
    parser.usage = "eval.py [--bench NAME] [flags] | eval.py show FILE | eval.py --regrade FILE ..."
    add = parser.add_argument_group("models and questions").add_argument
    add("--model", nargs="+", metavar="SPEC", help="each against the first; else what was tuned")
    add("--bench", default="tiny", help=f"{', '.join(BENCHES)}, FILE; with commas; all: published "
        "ones but gsm8k")
    add("--limit", type=whole(0), default=0, help="only the first so many questions; 0: all")
    add("--system", default="", help="a system prompt; published: none")
    add("--prompt-file", metavar="FILE", help="text with {problem} in it, instead of the "
        "published; files of your own are asked for an answer in a box")
    add("--fields", default="", help="columns of own files, as problem=question,answer=gold")
    add("--template", choices=("chat", "plain"), default="chat", help="plain: for models without")
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=whole(1), default=1, help="samples per problem")
    add("--temperature", type=real(0), default=0.6, help="0 is greedy")
    add("--greedy", action="store_true", help="temperature 0, one sample")
    add("--top-p", type=real(0, 1, above=True), default=0.95, help="probability of the tokens kept")
    add("--top-k", type=whole(0), default=0, help="likeliest tokens kept; 0: all")
    add("--max-new-tokens", type=whole(1), default=MAX_NEW_TOKENS, help="then it is truncated")
    add("--seed", type=SEED, default=0, help="a sample is seeded by (seed, problem, sample)")
    add = parser.add_argument_group("machine").add_argument
    add("--slots", type=whole(1), default=64, help="samples decoded at a time: speed and memory")
    add("--dtype", choices=DTYPES, help="of the weights; else the checkpoint's")
    add("--device", help="cpu, cuda or cuda:N; else cuda where there is one")
    add("--compile", action="store_true", help="torch.compile: slow start, fast steps")
    add = parser.add_argument_group("results").add_argument
    add("--out", help="run directory, samples go to OUT/eval/BENCH; else out/PRESET")
    add("--fresh", action="store_true", help="delete earlier samples instead of resuming")
    add("--regrade", nargs="+", metavar="FILE", help="only grade these again and print the table")
    args = parse(parser, argv, "eval")
    args.out = args.out or f"out/{args.preset}"
    check_flags(args)
    return args

def check_flags(args):
    """ValueError for a flag that could not take effect.  Fills in what greedy decoding means."""
    if args.regrade:
        idle = " ".join(sorted(args.given - {"regrade"}))  # needs only its files
        refuse_idle(args, idle, "--regrade, which generates nothing")
    models = args.model or []
    check(len(set(models)) == len(models), "--model names the same model twice")
    if args.greedy or args.temperature == 0:            # samples would all be equal
        idle = "temperature " * (args.temperature > 0) + "top_p top_k"
        refuse_idle(args, idle + " samples" * (args.samples > 1), "greedy decoding")
        args.temperature, args.samples, args.top_p, args.top_k = 0.0, 1, 1.0, 0

def read_benches(args):
    """--bench -> {name: (problems, source, prompt)}."""
    names = ALL if args.bench == "all" else args.bench.split(",")
    names = [args.bench] if Path(args.bench).is_file() else names      # with a comma in its name
    folders = {samples_path("", name, "") for name in names}
    check(len(folders) == len(names), f"--bench {args.bench}: two of one name, one folder")
    own, benches = None, {}
    if args.prompt_file:
        own = read_text(args.prompt_file).strip()       # asks every benchmark
        check("{problem}" in own, f"{args.prompt_file}: there is no {{problem}} in it")
    for name in names:
        problems, source = read_bench(name, args.fields)
        benches[name] = problems[:args.limit or None], source, own or bench_prompt(name)
    return benches

def sampling_of(args, name):
    """The settings of evaluate() for a benchmark.  A preset's length is for its own questions."""
    names = "samples temperature top_p top_k max_new_tokens seed slots fresh system"
    sampling = {name: getattr(args, name) for name in names.split()}
    own = name in read_preset(args.preset).get("bench", "").split(",") or embedded(name)
    if not own and "max_new_tokens" not in args.given:
        sampling["max_new_tokens"] = MAX_NEW_TOKENS
    return sampling

def foot(args, name, prompt, results):
    """How the questions of a table were asked; and whether too many answers were cut off."""
    most = sampling_of(args, name)["max_new_tokens"]
    asked = one_line(prompt.replace("{problem}", "PROBLEM"))
    asked = asked if len(asked) <= 80 else f"{asked[:60]} .. {asked[-15:]}"
    lines = [f"Asked ({args.template}): {asked}", f"At most {most:,} new tokens, temperature "
             f"{args.temperature}, top-p {args.top_p}, seed {args.seed}."]
    for label, rows in results.items():
        cut = [row for row in rows if row["finish"] == "length"]
        if len(cut) > len(rows) / 5:
            full = any(row["tokens"] < most for row in cut)
            why = "the model has no more positions" if full else "--max-new-tokens raises the limit"
            lines.append(f"{label}: {len(cut) / len(rows):.0%} of the answers were cut off: {why}.")
    return "\n".join(lines)

def save_report(args, name, source, prompt, results):
    """The table of one benchmark, printed; its summaries, merged into those of earlier runs."""
    text, summaries = report(results)
    folder = samples_path(args.out, name, "").parent
    path = folder / "summary.json"
    new = {label: summary | {"data": source} for label, summary in summaries.items()}
    with one_writer(folder, path.name, wait=True):       # another model's may end at this moment
        open_run(folder, args)
        merged = read_json(path) if path.exists() else {}        # keep earlier labels
        write_json(path, merged | new)
    print(f"\n{name}, samples in {folder}\n\n{text}\n\n{foot(args, name, prompt, results)}")

def main(argv):
    if argv[:1] == ["show"]:
        return show(argv[1:])
    args = settings(argv)
    if args.regrade:
        return print(report(regrade(args.regrade))[0])
    with shared_run():
        args.device = choose_device(args.device)
        # All files are read before the first model is loaded: a mistake shows at once.
        with first_alone():
            benches = read_benches(args)
        results = {name: {} for name in benches}
        target = read_preset(args.preset).get("target")
        if not target:
            needs(args, "model", "in eval.py")
        adapter = f"out/{args.preset}/adapter"              # what tuning wrote
        check(args.model or Path(adapter).is_dir(), f"{adapter}: no adapter there; run train.py "
              "--stage tune, or name models: --model")
        tell(args, "eval")
        for spec in args.model or [f"{target}+{adapter}"]:
            model = load_model(spec, args.dtype, args.device)
            tokenizer = load_tokenizer(spec, args.template)
            if args.compile:
                model.compile_blocks()
            for name, (problems, _, prompt) in benches.items():
                results[name][label_of(spec)] = evaluate(
                    model, tokenizer, problems, samples_path(args.out, name, spec),
                    label=label_of(spec), prompt=prompt, **sampling_of(args, name))
        for name, (_, source, prompt) in benches.items():
            if world()[0] == 0:
                save_report(args, name, source, prompt, results[name])

if __name__ == "__main__":
    front_door(main)
