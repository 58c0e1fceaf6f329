"""Pass@1: prompts -> samples -> grades -> a table with error bars.

    python eval.py --bench tiny                                  the tuned model on the embedded questions
    python eval.py --bench tiny --model MODEL MODEL+ADAPTER      several models, paired with the first
    python eval.py --bench my.jsonl --model MODEL --samples 4    any JSONL of problem/answer
    python eval.py --regrade out/tiny/eval/tiny/LABEL.jsonl      grades again what is on disk, without a model

Pass@1 is the mean over problems of the mean over samples; sampling defaults as published (arXiv 2506.09967).
Resa: one sample a problem and no interval; --samples 1, the default, is that number, here with its interval.

Letters in shape comments: P problems, R resamples.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import check_sampling, load_model, load_tokenizer, staged, stream
from resa import PRESETS, front_door, open_run, parse_flags, read_problems, relative, think_prefix


# ----------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------

BENCHES = {"tiny": Path(__file__).parent / "data" / "tiny" / "test.jsonl"}
PUBLISHED = "aime24 aime25 amc23 math500 minerva gpqa olympiadbench".split()


def bench_path(name):
    """The file of a --bench value, a name in BENCHES or a .jsonl path.  ValueError if it is neither."""
    if name in BENCHES or name.endswith(".jsonl"):
        return Path(BENCHES.get(name, name))
    why = "its download is not in this version" if name in PUBLISHED else f"known names: {', '.join(BENCHES)}"
    raise ValueError(f"--bench {name}: {why}; any JSONL of problem/answer can be given: --bench path.jsonl")


# ----------------------------------------------------------------------------------------------------------
# Grader: extract, normalise, compare.  Completions are hostile input: work is bounded, nothing is evaluated
# ----------------------------------------------------------------------------------------------------------

TAIL = 100_000      # characters looked at, from the end
SHORT = 300         # characters of an answer that are still read as a number


def last_box(text):
    r"""Content of the last complete \boxed{}; "" if there are boxes, but open or empty; None without a box.

    One pass with a stack: searching forward from every \boxed{ is quadratic on ten thousand nested ones.
    """
    opened, closed, seen = [], [], False                 # starts of the groups still open, None for a plain {
    for token in re.finditer(r"\\(?:boxed|fbox) ?\{|\\.|[{}]", text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and text[start:token.start()].strip():
                closed.append((start, token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
            seen = seen or len(token[0]) > 1
    if closed:
        start, end = max(closed)                         # the last to open: of a box within a box, the inner
        return text[start:end]
    return "" if seen else None


def extract_answer(text):
    r"""The final answer of a completion, or None.

    After the last </think>: the last complete \boxed{}; else what follows "answer is" or "Answer:"; else all
    of it if that is one short line, as the embedded models write.  Thinking that never closed: no answer.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    text = text[-TAIL:].strip()
    box = last_box(text)
    if box is not None:
        return box.strip() or None
    said = re.findall(r"(?i)answer[ *]{0,4}(?:is\b|:)[ *:]{0,4}([^\n]{1,200})", text)
    if said:
        return re.split(r"\.\s", said[-1])[0].strip(" *") or None      # "... is 5. I hope it is correct"
    return text if 0 < len(text) <= 40 and len(text.split()) <= 3 and "\n" not in text else None


def squeeze(s):
    """Drops white space except one blank between two digits: "1 2" is not 12, and 2 1/2 is a mixed number."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(s.split()))


def normalise(answer):
    r"""One spelling for what differs in type-setting only: $, \, \text{}, 1,000, \frac12, a final dot."""
    if len(answer) > 10 * SHORT:
        return answer.strip()
    s = answer.replace("\u2212", "-").replace("{,}", ",").replace(r"\%", "%")
    s = re.sub(r"\\[,;:!]|\\?\$|\\(?:left|right)(?![a-z])", "", s).replace("\\ ", " ")
    s = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1", s)
    s = " ".join(s.split()).removesuffix(".")
    if re.fullmatch(r"[+-]?[0-9]{1,3}([, ][0-9]{3})+(\.[0-9]+)?", s):
        s = re.sub("[, ]", "", s)                        # before squeezing: "1, 234" is a list
    s = re.sub(r"\\[dtc]frac", r"\\frac", squeeze(s))
    # Blanks around a/b keep 2\frac{1}{2} a mixed number; after ^ or / the braces of \frac are parentheses.
    s = re.sub(r"(?<![\^/])\\frac ?([0-9]|\{-?[0-9.]+\}) ?([0-9]|\{-?[0-9.]+\})",
               lambda m: f" {m[1].strip('{}')}/{m[2].strip('{}')} ", s)
    return squeeze(s)


DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
NUMBER = re.compile(rf"([+-]?)(?:([0-9]+) )?({DECIMAL})(?:/([+-]?{DECIMAL}))?")


def number(s):
    """The exact value of 12, -1.5, 4e33, 3/4 or 2 1/2 as a Fraction; None for all else."""
    match = NUMBER.fullmatch(s) if len(s) <= SHORT else None
    if not match or (match[2] and not match[4]) or Fraction(match[4] or 1) == 0:
        return None
    value = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -value if match[1] == "-" else value


def same_answer(gold, answer):
    """Whether an extracted answer (or None) equals the gold one: as a string, else as an exact number."""
    if answer is None:
        return False
    gold, answer = normalise(gold), normalise(answer)
    return gold == answer or (number(gold) is not None and number(gold) == number(answer))


def grade(gold, text):
    """Whether a completion ends in the gold answer."""
    return same_answer(gold, extract_answer(text))


def mark(row):
    """A sample with its grade.  It needs nothing but the row: re-grading from disk is grading at run time."""
    answer = extract_answer(think_prefix(row["prompt"]) + row["completion"])
    return row | {"extracted": answer, "correct": same_answer(row["gold"], answer)}


# ----------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c,k)/C(n,k) (arXiv 2107.03374).

    Unbiased, unlike 1-(1-c/n)^k; as a product, since the binomials overflow.  ValueError unless c, k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def wilson(c, n, z=1.959964):
    """95 % score interval (low, high) of a rate, from c successes in n independent trials (Wilson 1927)."""
    middle, half = c + z * z / 2, z * (c * (n - c) / n + z * z / 4) ** 0.5
    return float(max(0, (middle - half) / (n + z * z))), float(min(1, (middle + half) / (n + z * z)))


def interval(c, n, resamples=4000, seed=0):
    """95 % interval of Pass@1 from c right of n samples, both (P,) -> (low, high, method).

    It covers a new draw of problems and of samples.  Several samples a problem: two-level bootstrap, problems
    with replacement, then their samples, a Binomial(n, p) draw.  The rates c/n already contain the noise of
    sampling, and drawing again on top would count it twice (98-99 % coverage where problems are alike): so
    they are first pulled towards their mean until their variance is the between-problem part alone.

    One sample a problem, greedy or at any temperature: Wilson.  Problem and sample are then drawn together,
    so each answer is one Bernoulli trial of rate E[p] whatever the spread of p, and Wilson is right for both
    sources of noise at once; what cannot be had from one sample is how they split.
    All right or all wrong: Wilson too, with P trials, as resampling equal values gives no width at all.
    Known weakness: with Pass@1 near 0.05 from few of 40 problems the bootstrap covers about 88 %, not 95 %.
    """
    c, n = np.asarray(c), np.asarray(n)
    p, P, rng = c / n, len(n), np.random.default_rng(seed)
    if n.max() == 1 or p.max() == 0 or p.min() == 1:
        return *wilson(p.sum(), P), "Wilson"
    within = (p * (1 - p) / np.maximum(n - 1, 1))[n > 1].mean()           # unbiased for E[p(1-p)/n]
    between = max(p.var(ddof=min(1, P - 1)) - within, 0)
    p = np.clip(p.mean() + (p - p.mean()) * (between / max(p.var(), 1e-12)) ** 0.5, 0, 1)
    pick = rng.integers(P, size=(resamples, P))                           # (R,P)
    means = (rng.binomial(n[pick], p[pick]) / n[pick]).mean(1)            # (R,)
    return *map(float, np.quantile(means, [0.025, 0.975])), "two-level bootstrap"


def paired_difference(d, resamples=4000, seed=0):
    """Per-problem differences d (P,) -> (mean, low, high, p).

    95 % interval by bootstrap over problems; p of the sign-flip test, 10,000 draws: under the null the two
    models can be swapped problem by problem, so each d keeps its size and takes either sign.
    """
    d, rng = np.asarray(d, dtype=float), np.random.default_rng(seed)
    means = d[rng.integers(len(d), size=(resamples, len(d)))].mean(1)     # (R,)
    low, high = map(float, np.quantile(means, [0.025, 0.975]))
    moved = d[d != 0]                                                     # a tie has no sign to flip
    flipped = [(rng.integers(2, size=(1000, len(moved))) * 2 - 1) @ moved for _ in range(10)]
    sums = np.abs([moved.sum(), *np.concatenate(flipped)])                # the one seen is one of them
    p = np.mean(sums >= sums[0] - 1e-9)
    return float(d.mean()), low, high, float(p)


def rates(rows):
    """Samples -> {problem id: (right, samples)}, in order of appearance."""
    right, total = Counter(), Counter()
    for row in rows:
        right[row["id"]] += row["correct"]
        total[row["id"]] += 1
    return {key: (right[key], total[key]) for key in total}


def summarize(rows):
    """One model's samples -> its entry in summary.json: Pass@1 with interval, lengths, failures, settings."""
    c, n = np.array(list(rates(rows).values())).T                         # (P,), (P,)
    low, high, method = interval(c, n)
    k, each = int(n.min()), len(rows) / len(n)                            # uneven only in an interrupted file
    more = {f"pass@{k}": float(np.mean([pass_at_k(*nc, k) for nc in zip(n, c)]))} if k > 1 else {}
    share = lambda flags: float(np.mean(list(flags)))
    return {"problems": len(n), "samples": int(each) if each == int(each) else each,
            "pass@1": share(c / n), "interval": [low, high], "method": method, **more,
            "tokens": share(row["tokens"] for row in rows),
            "truncated": share(row["finish"] == "length" for row in rows),
            "no_answer": share(row["extracted"] is None for row in rows),
            "settings": rows[0]["settings"] | {"seed": rows[0]["seed"][0]}}


def paired(rows, first):
    """Two models on the same problems -> {"difference" (rows - first), "interval", "p"}; else ValueError."""
    ours, theirs = rates(rows), rates(first)
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise ValueError(f"models are compared problem by problem, but {len(odd)} problems have samples of "
                         f"one model only (the first is {odd[0]!r}): give the same problems to both")
    d = [ours[key][0] / ours[key][1] - theirs[key][0] / theirs[key][1] for key in ours]
    mean, low, high, p = paired_difference(d)
    return {"difference": mean, "interval": [low, high], "p": p}


# ----------------------------------------------------------------------------------------------------------
# The run: every sample is on disk the moment it ends
# ----------------------------------------------------------------------------------------------------------

FIELDS = {"id": str, "sample": int, "seed": list, "prompt": str, "gold": str, "settings": dict,
          "completion": str, "tokens": int, "finish": str}


def read_samples(path):
    """An evaluation .jsonl, finished or interrupted -> its samples.  ValueError names a line that is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = {}
    whole = Path(path).read_bytes().split(b"\n")[:-1]    # a last line without its newline was cut off
    for n, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{n}: not JSON: {error}") from None
        for name, kind in FIELDS.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise ValueError(f'{path}:{n}: not a sample of eval.py, no "{name}" field ({kind.__name__})')
        if (row["id"], row["sample"]) in rows:
            raise ValueError(f"{path}:{n}: sample {row['sample']} of problem {row['id']!r} is here twice")
        rows[row["id"], row["sample"]] = row
    return list(rows.values())


def resume(path, plan):
    """What an earlier run of the same plan left in path -> {(id, sample): row}; a torn last line is cut off.

    plan {(id, sample): what is known beforehand}.  ValueError if the file holds anything else: samples of
    mixed settings would give a number that belongs to none of them.
    """
    if not path.exists():
        return {}
    done, hint = {}, "--fresh starts it over, another --out keeps it"
    known = lambda row: row["settings"] | {name: row[name] for name in ("seed", "prompt")}
    for row in read_samples(path):
        key = row["id"], row["sample"]
        if key not in plan:
            raise ValueError(f"{path}: has sample {key[1]} of problem {key[0]!r}, not asked for; {hint}")
        old, new = known(row), known(plan[key])
        for name in new:
            if old.get(name) != new[name]:
                was, now = repr(old.get(name))[:60], repr(new[name])[:60]
                raise ValueError(f"{path}: was made with {name} {was}, this run has {now}; {hint}")
        done[key] = row | {"gold": plan[key]["gold"]}    # a corrected answer in the benchmark counts at once
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    print(f"{path}: {len(done)} of {len(plan)} samples are already there", file=sys.stderr)
    return done


def fingerprint(model):
    """12 hex digits that change with the weights: samples of an earlier training must not pass for new."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        few = p.detach().flatten()[::max(1, p.numel() // 256)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def generate_rows(model, tokenizer, planned, ids_of, bar, *, right, done, **sampling):
    """Samples the planned rows and yields each, graded, as it ends; the bar shows Pass@1 so far."""
    tokens, start = 0, time.monotonic()
    requests = [(ids_of[row["prompt"]], tuple(row["seed"])) for row in planned]
    for i, ids, why in stream(model, requests, stop_ids=tokenizer.eos_ids, **sampling):
        text = tokenizer.decode(ids[:-1] if why == "stop" else ids)
        row = mark(planned[i] | {"completion": text, "tokens": len(ids), "finish": why})
        right, done, tokens = right + row["correct"], done + 1, tokens + len(ids)
        rate = tokens / max(time.monotonic() - start, 1e-9)
        bar.set_postfix({"Pass@1": f"{right / done:.3f}", "tok/s": f"{rate:.0f}"}, refresh=False)
        bar.update()
        yield row


def make_plan(model, tokenizer, problems, samples, seed, settings):
    """-> {(id, sample): row, complete but for the completion} by problem and sample, {prompt: its ids}."""
    plan, ids_of = {}, {}
    for i, problem in enumerate(problems):
        prompt = tokenizer.chat([{"role": "user", "content": problem["problem"]}])
        ids_of[prompt] = tokenizer.encode(prompt)
        for j in range(samples):
            plan[problem["id"], j] = {"id": problem["id"], "sample": j, "seed": [seed, i, j],
                                      "prompt": prompt, "gold": problem["answer"], "settings": settings}
    longest, room = max(map(len, ids_of.values())), model.config.max_position_embeddings
    if longest + settings["max_new_tokens"] > room:
        raise ValueError(f"--max-new-tokens is {settings['max_new_tokens']}, but with {room} positions and a "
                         f"prompt of {longest} tokens this model can generate {room - longest}")
    return plan, ids_of


def evaluate(model, tokenizer, problems, path, *, samples=1, temperature=0.6, top_p=0.95, top_k=0,
             max_new_tokens=32768, seed=0, slots=64, label="", fresh=False):
    """Samples every problem, grades, writes path (.jsonl) -> its rows, sorted by problem and sample.

    A sample depends on its problem, its seed (seed, row, sample) and the settings, not on batch or order: an
    interrupted run generates what is missing and leaves the same bytes, and a finished one can be given more
    samples.  ValueError: path holds other settings, weights or problems (fresh=True deletes it instead).
    """
    path, weight, was_training = Path(path), next(model.parameters()), model.training
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    check_sampling([], **sampling)
    settings = {"label": label, **sampling, "weights": fingerprint(model), "device": weight.device.type,
                "dtype": str(weight.dtype).removeprefix("torch.")}
    plan, ids_of = make_plan(model, tokenizer, problems, samples, seed, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    done = resume(path, plan)
    missing = [row for key, row in plan.items() if key not in done]
    model.eval()                                         # an adapter in training has dropout
    with open(path, "a", encoding="utf-8") as file, torch.no_grad(), tqdm(
            desc=label or "eval", total=len(plan), initial=len(done), unit="sample", disable=None) as bar:
        right = sum(mark(row)["correct"] for row in done.values())
        for row in generate_rows(model, tokenizer, missing, ids_of, bar, right=right, done=len(done),
                                 slots=slots, **sampling):
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["id"], row["sample"]] = row
    model.train(was_training)
    rows = [mark(done[key]) for key in plan]             # old ones too: the grader may have changed since
    with staged(path.parent) as temporary:
        (temporary / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


# ----------------------------------------------------------------------------------------------------------
# Table and command line
# ----------------------------------------------------------------------------------------------------------

HEADER = ["model", "Pass@1", "95% CI", "n", "diff", "95% CI", "p", "tokens", "truncated", "no answer"]


def table(rows, header):
    """Rows of cells -> aligned text, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    width = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([first.ljust(width[0]), *map(str.rjust, rest, width[1:])]).rstrip()
             for first, *rest in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def report(results):
    """{label: rows} -> (text of the table, {label: summary}); every model is paired with the first."""
    summaries, lines, first = {}, [], next(iter(results))
    for label, rows in results.items():
        s = summaries[label] = summarize(rows)
        against = ["", "", ""]
        if label != first:
            s["paired"] = {"against": first} | paired(rows, results[first])
            pair = s["paired"]
            against = [f"{pair['difference']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*pair["interval"]),
                       f"{pair['p']:.4f}"]
        lines.append([label, f"{s['pass@1']:.3f}", "[{:.3f}, {:.3f}]".format(*s["interval"]),
                      f"{s['problems']} x {s['samples']:.3g}", *against, f"{s['tokens']:.1f}",
                      f"{s['truncated']:.1%}", f"{s['no_answer']:.1%}"])
    return table(lines, HEADER), summaries


def label_of(spec):
    """A model spec or path as a file name, one to one: / becomes ~, what is unusual is percent-escaped."""
    spec = relative(spec)
    name = re.sub(r"[^A-Za-z0-9._+@#=/-]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), spec)
    name = name.replace("/", "~")
    # File systems stop at 255 bytes.
    return name if len(name) < 150 else f"{name[-120:]}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def save_summaries(directory, summaries):
    """Merges {label: summary} into directory/summary.json, which keeps the labels of earlier runs."""
    path = Path(directory) / "summary.json"
    try:
        merged = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | summaries
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not a JSON object; move it away and run again, samples are kept") from None
    with staged(directory) as temporary:
        (temporary / path.name).write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


@dataclass
class Eval:
    """Samples a benchmark, grades, prints Pass@1 with intervals; started again, it resumes where it was."""
    preset: str = "tiny"  # bundle of defaults
    model: list[str] = ()  # model specs, the others compared with the first; by default what tuning wrote
    bench: str = "tiny"  # names or .jsonl files of problem/answer, separated by commas
    samples: int = 1  # samples a problem
    temperature: float = 0.6  # 0 is greedy
    top_p: float = 0.95  # the likeliest tokens that together reach this probability
    top_k: int = 0  # the k likeliest tokens, 0 for all
    greedy: bool = False  # temperature 0, one sample a problem
    max_new_tokens: int = 32768  # a completion that gets there counts as truncated
    seed: int = 0  # a sample is seeded by this, the row of its problem and its own number
    limit: int = 0  # only the first so many problems, 0 for all
    slots: int = 64  # samples decoded at a time: speed and memory, not the result
    dtype: str | None = None  # float32 | bfloat16 | ...; by default the checkpoint's
    device: str | None = None  # cpu | cuda | ...; by default cuda where there is one
    out: str | None = None  # samples go to OUT/eval/BENCH/; by default out/PRESET
    fresh: bool = False  # delete earlier samples of these models instead of resuming
    regrade: list[str] = ()  # grade these .jsonl files again and print the table; nothing is written


def check(args):
    """ValueError for a value out of range, or a flag that could not take effect."""
    for name, least in {"samples": 1, "limit": 0, "slots": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, it should be at least {least}")
    check_sampling([], args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    if len(set(args.model)) < len(args.model):
        raise ValueError("--model names the same model twice")
    idle = set()
    if args.regrade:
        idle = args.given - {"regrade"}
    elif args.greedy or args.temperature == 0:
        idle = args.given & {"temperature", "samples", "top_p", "top_k"}
        idle -= {"temperature"} if args.temperature == 0 else set()
        idle -= {"samples"} if args.samples == 1 else set()
    if idle:
        where = "with --regrade, which generates nothing" if args.regrade else "in greedy decoding"
        raise ValueError(f"--{min(idle).replace('_', '-')} has no effect {where}")


def regrade(paths):
    """Grades the samples in these files again -> {label: rows}, and says how many grades have changed."""
    results = {}
    for path in paths:
        old = read_samples(path)
        if not old:
            raise ValueError(f"{path}: no sample in this file")
        rows = [mark(row) for row in old]
        changed = sum(a.get("correct") != b["correct"] for a, b in zip(old, rows))
        print(f"{path}: {len(rows)} samples, {changed} of them graded differently in the file")
        results[str(path) if Path(path).stem in results else Path(path).stem] = rows
    return results


def main(argv):
    args = parse_flags(Eval, argv, "eval.py")
    check(args)
    if args.regrade:
        print(report(regrade(args.regrade))[0])
        return
    sampling = {name: getattr(args, name) for name in
                "samples temperature top_p top_k max_new_tokens seed slots fresh".split()}
    if args.greedy or args.temperature == 0:
        sampling |= {"samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    # All files are read before the first model is loaded: a mistake shows at once.
    benches = {name: read_problems(bench_path(name))[:args.limit or None] for name in args.bench.split(",")}
    root, results = Path(args.out or f"out/{args.preset}") / "eval", {name: {} for name in benches}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tuned = f"out/{args.preset}/adapter"
    if not args.model and not Path(tuned).is_dir():
        raise FileNotFoundError(f"{tuned}: no adapter there yet; run train.py --stage tune, or name models by --model")
    for spec in args.model or [f"{PRESETS[args.preset]['target']}+{tuned}"]:
        model = load_model(spec, args.dtype, device)
        tokenizer, label = load_tokenizer(spec), label_of(spec)
        for name, problems in benches.items():
            path = root / label_of(name.removesuffix(".jsonl")) / f"{label}.jsonl"
            results[name][label] = evaluate(model, tokenizer, problems, path, label=label, **sampling)
    for name in benches:
        text, summaries = report(results[name])
        directory = root / label_of(name.removesuffix(".jsonl"))
        open_run(directory, args)
        save_summaries(directory, summaries)
        print(f"\n{name}, samples in {directory}\n\n{text}")


if __name__ == "__main__":
    front_door(main)
