"""Pass@1: prompts -> samples -> grades -> a table with error bars.

    python eval.py --bench tiny                                  the tuned model on the embedded questions
    python eval.py --bench tiny --model MODEL MODEL+ADAPTER      several models, paired with the first
    python eval.py --bench aime24,amc23 --model MODEL            published ones, fetched on first use; all: every one
    python eval.py --bench my.jsonl --model MODEL --samples 4    any JSONL of problem/answer
    torchrun --nproc-per-node 2 eval.py ...                      shares the problems, for the same samples
    python eval.py --regrade out/tiny/eval/tiny/LABEL.jsonl      grades again what is on disk, without a model
    python eval.py show out/tiny/eval/tiny/LABEL.jsonl --wrong   samples, to be read

Pass@1 is the mean over problems of the mean over samples; sampling defaults as published (arXiv 2506.09967).
Resa: one sample a problem and no interval; --samples 1, the default, is that number, here with its interval.

Letters in shape comments: P problems, R resamples.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.grade import extract_answer, grade, grade_resa, same_answer      # noqa: F401
from model import check_sampling, load_model, load_tokenizer, staged, stream
from resa import PRESETS, front_door, open_run, parse_flags, read_problems, relative, think_prefix


# ----------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------

# The instructions of the released code (arXiv 2506.09967; GPQA's are those of simple-evals), to the letter, as scores
# depend on them.  They go into the user's turn of the model's own chat template; there is no system prompt.
MATHS_PROMPT = ("Solve the following math problem efficiently and clearly.  The last line of your response should be "
                r"of the following format: 'Therefore, the final answer is: $\boxed{ANSWER}$. I hope it is correct' "
                "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
                "step by step before answering.\n\n{problem}")
CHOICE_PROMPT = ("Answer the following multiple choice question. The last line of your response should be of the "
                 "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by "
                 "step before answering.\n\n{problem}")
PUBLISHED = dict.fromkeys("aime24 aime25 amc23 math500 minerva gpqa olympiadbench".split(), MATHS_PROMPT)
PUBLISHED["gpqa"] = CHOICE_PROMPT
BENCHES = {"tiny": "{problem}"} | PUBLISHED              # name -> prompt


def read_bench(name):
    """A --bench value, a name in BENCHES or a file of problem/answer (or GPQA's .csv) -> (problems, source).

    ValueError: no such name, or a bad file.  OSError: it could not be fetched.
    """
    from data import prepare
    if name in PUBLISHED:
        return prepare.benchmark(name)
    path = Path(__file__).parent / "data" / "tiny" / "test.jsonl" if name == "tiny" else Path(name)
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise ValueError(f"--bench {name}: known names are {', '.join(BENCHES)}, all; or give a file: path.jsonl")
    problems = prepare.read_gpqa(path) if path.suffix == ".csv" else read_problems(path)
    return problems, relative(path)


GRADERS = {"resa": grade_resa}


def mark(row, grader="resa"):
    """A sample with its grade.  It needs nothing but the row: re-grading from disk is grading at run time."""
    answer, right = GRADERS[grader](row["gold"], think_prefix(row["prompt"]) + row["completion"])
    return row | {"extracted": answer, "correct": right}


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


def student(df, z=1.959964):
    """The 97.5 % quantile of Student's t, by its expansion about the normal one (Fisher and Cornish 1960).

    With 1 and 2 degrees of freedom, where that is too far off, by the closed form."""
    if df <= 2:
        p = math.erf(z / 2**0.5)
        return math.tan(math.pi / 2 * p) if df == 1 else p * (2 / (1 - p * p)) ** 0.5
    terms = [(z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160]
    return z + sum(term / df**i for i, term in enumerate(terms, start=1))


def spread(c, n):
    """c right of n samples, both (P,) -> (within, between), the two parts of the variance of a problem's rate c/n.

    within   mean variance that sampling adds, E[p(1-p)/n], unbiased; None where no problem has two samples
    between  variance of the true rates p: what would be left of the noise with samples without end
    """
    p, several = c / n, n > 1
    if not several.any():
        return None, None
    within = (p * (1 - p) / np.maximum(n - 1, 1))[several].mean()
    return float(within), float(max(p.var(ddof=min(1, len(p) - 1)) - within, 0))


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

    Fewer than ten problems' worth of right or of wrong answers: Wilson with the number of trials that has the
    variance seen, and t for the normal quantile.  The bootstrap is too narrow there: of Pass@1 0.05, 40 problems x 8
    samples, it covers 88 to 97 %, this 91 to 97 % (problems unlike to alike; 1,000 simulations each).
    Known weakness: what rests on one or two problems, 0.05 of 30 unlike ones x 32, is covered in 87 %.
    """
    c, n = np.asarray(c), np.asarray(n)
    p, P, rng = c / n, len(n), np.random.default_rng(seed)
    mean = p.mean()
    if n.max() == 1 or p.max() == 0 or p.min() == 1:
        return *wilson(p.sum(), P), "Wilson"
    within, between = spread(c, n)
    if P * min(mean, 1 - mean) < 10:
        size = mean * (1 - mean) / max((within + between) / P, mean * (1 - mean) / n.sum())
        return *wilson(mean * size, size, student(max(P - 1, 1))), "Wilson, effective trials"
    p = np.clip(mean + (p - mean) * (between / max(p.var(), 1e-12)) ** 0.5, 0, 1)
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


def majority(rows):
    """majority@k: the share of problems whose most frequent answer is right; of tied answers one is drawn.

    Right answers are one, however they are written; a sample without an answer does not vote.
    """
    votes = defaultdict(Counter)
    for row in rows:
        answer = True if row["correct"] else row["extracted"] and "".join(row["extracted"].split())
        votes[row["id"]][answer] += answer is not None
    first = [[answer for answer, n in count.items() if n == max(count.values()) > 0] for count in votes.values()]
    return float(np.mean([tied.count(True) / max(len(tied), 1) for tied in first]))


def summarize(rows):
    """One model's samples -> its entry in summary.json: Pass@1 with interval, lengths, failures, settings."""
    c, n = np.array(list(rates(rows).values())).T                         # (P,), (P,)
    low, high, method = interval(c, n)
    (within, between), P = spread(c, n), len(n)
    k, each = int(n.min()), len(rows) / P                                 # uneven only in an interrupted file
    more = {f"pass@{k}": float(np.mean([pass_at_k(*nc, k) for nc in zip(n, c)])),
            f"majority@{k}": majority(rows)} if k > 1 else {}
    share = lambda flags: float(np.mean(list(flags)))
    return {"problems": P, "samples": int(each) if each == int(each) else each,
            "pass@1": share(c / n), "interval": [low, high], "method": method,
            "error": {"samples": within and (within / P) ** 0.5, "problems": between and (between / P) ** 0.5},
            **more, "tokens": share(row["tokens"] for row in rows),
            "truncated": share(row["finish"] == "length" for row in rows),
            "no_answer": share(row["extracted"] is None for row in rows),
            "settings": rows[0]["settings"] | {"seed": rows[0]["seed"][0]}}


POWER = (1.959964 + 0.841621) ** 2      # a difference of as many squared standard errors is seen four times in five


def needed(d, within, k):
    """What would resolve the mean of per-problem differences d (P,), seen with k samples, at 80 % power.

    -> {"samples": a problem, with these problems; None if no number would do, or k is 1 and cannot tell,
        "problems": such problems, with k samples each; None if there is no difference at all}
    """
    P, variance = len(d), float(d.var(ddof=min(1, len(d) - 1)))
    largest = float(d.mean()) ** 2 / POWER               # the variance of the mean at which it would be seen
    if largest == 0:
        return {"samples": None, "problems": None}
    room = P * largest - max(variance - within, 0) if within is not None else 0
    return {"samples": max(1, math.ceil(within * k / room)) if room > 0 else None,
            "problems": max(1, math.ceil(variance / largest))}


def paired(rows, first):
    """Two models on the same problems -> {"difference": rows - first, "interval", "p", "needed"}; else ValueError."""
    ours, theirs = rates(rows), rates(first)
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise ValueError(f"models are compared problem by problem, but {len(odd)} problems have samples of "
                         f"one model only (the first is {odd[0]!r}): give the same problems to both")
    (c, n), (c1, n1) = (np.array([side[key] for key in ours]).T for side in (ours, theirs))      # (P,) each
    d, parts = c / n - c1 / n1, [spread(c, n)[0], spread(c1, n1)[0]]
    mean, low, high, p = paired_difference(d)
    within = None if None in parts else sum(parts)
    return {"difference": mean, "interval": [low, high], "p": p,
            "needed": needed(d, within, (n.mean() + n1.mean()) / 2)}


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


def world():
    """(number of this process, how many there are) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def files_of(path):
    """The samples of one model: path, and path.0, path.1, ... of processes that have not finished."""
    found = [file for file in path.parent.glob("*") if file.name.removeprefix(f"{path.name}.").isdigit()]
    return [file for file in [path, *sorted(found)] if file.exists()]


def resume(path, plan):
    """What an earlier run of the same plan left in files_of(path) -> {(id, sample): row}; torn ends are cut off.

    plan {(id, sample): what is known beforehand}.  ValueError if a file holds anything else: samples of
    mixed settings would give a number that belongs to none of them.
    """
    done = {}
    for file in files_of(path):
        done |= accept(file, plan)
        if world()[0] == 0:
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return done


def accept(path, plan):
    """The samples of one file, if all of them are of this plan."""
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
    return done


def fingerprint(model):
    """12 hex digits that change with the weights: samples of an earlier training must not pass for new."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        few = p.detach().flatten()[::max(1, p.numel() // 256)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def begin(path, plan, fresh):
    """-> the samples that are already there, the same in every process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh and world()[0] == 0:
        for file in files_of(path):
            file.unlink()
    wait_for_all()
    done = resume(path, plan)
    if done and world()[0] == 0:
        print(f"{path}: {len(done)} of {len(plan)} samples are already there", file=sys.stderr)
    wait_for_all()                                       # nobody writes before everybody has read
    return done


def my_share(plan, done):
    """The rows this process has to sample: whole problems, so that a prompt is read once for all its samples."""
    rank, processes = world()
    missing = [row for key, row in plan.items() if key not in done]
    mine = set(list(dict.fromkeys(row["id"] for row in missing))[rank::processes])
    return [row for row in missing if row["id"] in mine]


def finish(path, plan, done, grader):
    """Writes the samples in the order of the plan -> the rows; the files of single processes go."""
    if world()[1] > 1:
        wait_for_all()
        done = resume(path, plan)
        wait_for_all()
    rows = [mark(done[key], grader) for key in plan]     # old ones too: the grader may have changed since
    if world()[0] == 0:
        with staged(path.parent) as temporary:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (temporary / path.name).write_text(text, encoding="utf-8")
        for file in files_of(path)[1:]:
            file.unlink()
    return rows


def stream_within(model, requests, *, max_new_tokens, **sampling):
    """stream(), where a completion also ends with the model's positions; a prompt that fills them all gets none."""
    left = [model.config.max_position_embeddings - len(ids) for ids, _ in requests]
    fits = [i for i, room in enumerate(left) if room > 0]
    yield from ((i, [], "length") for i, room in enumerate(left) if room <= 0)
    longest = min(max_new_tokens, max(left, default=0))
    for j, ids, why in stream(model, [requests[i] for i in fits], max_new_tokens=longest, **sampling) if fits else ():
        i = fits[j]
        yield (i, ids, why) if len(ids) <= left[i] else (i, ids[:left[i]], "length")


def generate_rows(model, tokenizer, planned, ids_of, bar, *, right, done, grader, **sampling):
    """Samples the planned rows and yields each, graded, as it ends; the bar shows Pass@1 so far."""
    tokens, start = 0, time.monotonic()
    requests = [(ids_of[row["prompt"]], tuple(row["seed"])) for row in planned]
    for i, ids, why in stream_within(model, requests, stop_ids=tokenizer.eos_ids, **sampling):
        text = tokenizer.decode(ids[:-1] if why == "stop" else ids)
        row = mark(planned[i] | {"completion": text, "tokens": len(ids), "finish": why}, grader)
        right, done, tokens = right + row["correct"], done + 1, tokens + len(ids)
        rate = tokens / max(time.monotonic() - start, 1e-9)
        bar.set_postfix({"Pass@1": f"{right / done:.3f}", "tok/s": f"{rate:.0f}"}, refresh=False)
        bar.update()
        yield row


def make_plan(model, tokenizer, problems, samples, seed, settings, prompt="{problem}", system=""):
    """-> {(id, sample): row, complete but for the completion} by problem and sample, {prompt: its ids}."""
    plan, ids_of = {}, {}
    first = [{"role": "system", "content": system}] if system else []
    for i, problem in enumerate(problems):
        asked = prompt.replace("{problem}", problem["problem"])      # not format(): problems are full of braces
        text = tokenizer.chat([*first, {"role": "user", "content": asked}])
        # The begin token is the template's.  Resa: the published runs let the tokenizer put a second one before it.
        ids_of[text] = tokenizer.encode(text)
        for j in range(samples):
            plan[problem["id"], j] = {"id": problem["id"], "sample": j, "seed": [seed, i, j],
                                      "prompt": text, "gold": problem["answer"], "settings": settings}
    left = [model.config.max_position_embeddings - len(ids) for ids in ids_of.values()]
    if max(left) < 1:
        raise ValueError(f"this model has {model.config.max_position_embeddings} positions, and the shortest prompt "
                         f"fills them all")
    if min(left) < settings["max_new_tokens"] and world()[0] == 0:
        print(f"{settings['label']}: the model's {model.config.max_position_embeddings} positions leave room for "
              f"{max(min(left), 0)} to {max(left)} new tokens; {sum(n < 1 for n in left)} of {len(left)} prompts "
              "fill them all, so that nothing is generated", file=sys.stderr)
    return plan, ids_of


def evaluate(model, tokenizer, problems, path, *, samples=1, temperature=0.6, top_p=0.95, top_k=0,
             max_new_tokens=32768, seed=0, slots=64, label="", fresh=False, grader="resa", prompt="{problem}",
             system=""):
    """Samples every problem, grades, writes path (.jsonl) -> its rows, sorted by problem and sample.

    A sample depends on its problem, its seed (seed, row, sample) and the settings, not on batch, order or the
    number of processes: an interrupted run generates what is missing and leaves the same bytes, and a finished
    one can be given more samples.  Under torchrun every process calls this, and each samples its share.
    ValueError: path holds other settings, weights or problems (fresh=True deletes it instead).
    """
    path, weight, was_training = Path(path), next(model.parameters()), model.training
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    check_sampling([], **sampling)
    settings = {"label": label, **sampling, "weights": fingerprint(model), "device": weight.device.type,
                "dtype": str(weight.dtype).removeprefix("torch.")}
    plan, ids_of = make_plan(model, tokenizer, problems, samples, seed, settings, prompt, system)
    done = begin(path, plan, fresh)
    right, missing = sum(mark(row, grader)["correct"] for row in done.values()), my_share(plan, done)
    (rank, processes), total = world(), len(done) + len(missing)
    model.eval()                                         # an adapter in training has dropout
    with open(path if processes == 1 else f"{path}.{rank}", "a", encoding="utf-8") as file, torch.no_grad(), tqdm(
            desc=label or "eval", total=total, initial=len(done), unit="sample", disable=rank > 0 or None) as bar:
        for row in generate_rows(model, tokenizer, missing, ids_of, bar, right=right, done=len(done), grader=grader,
                                 slots=slots, **sampling):
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["id"], row["sample"]] = row
    model.train(was_training)
    return finish(path, plan, done, grader)


# ----------------------------------------------------------------------------------------------------------
# Table
# ----------------------------------------------------------------------------------------------------------

HEADER = ["model", "Pass@1", "95% CI", "n", "SE samples", "SE problems", "majority", "diff", "95% CI", "p", "tokens",
          "truncated", "no answer"]


def table(rows, header):
    """Rows of cells -> aligned text, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    width = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([first.ljust(width[0]), *map(str.rjust, rest, width[1:])]).rstrip()
             for first, *rest in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def report(results):
    """{label: rows} -> (table and what it cannot tell, {label: summary}); every model is paired with the first."""
    summaries, lines, words, first = {}, [], [], next(iter(results))
    for label, rows in results.items():
        s = summaries[label] = summarize(rows)
        against = ["", "", ""]
        if label != first:
            s["paired"] = {"against": first} | paired(rows, results[first])
            pair = s["paired"]
            against = [f"{pair['difference']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*pair["interval"]),
                       f"{pair['p']:.4f}"]
            words += unresolved(label, pair, s)
        number = lambda x: "" if x is None else f"{x:.3f}"
        lines.append([label, f"{s['pass@1']:.3f}", "[{:.3f}, {:.3f}]".format(*s["interval"]),
                      f"{s['problems']} x {s['samples']:.3g}", *map(number, s["error"].values()),
                      number(s.get(f"majority@{s['samples']}")), *against, f"{s['tokens']:.1f}",
                      f"{s['truncated']:.1%}", f"{s['no_answer']:.1%}"])
    filled = [i for i, name in enumerate(HEADER) if any(line[i] for line in lines)]
    pick = lambda line: [line[i] for i in filled]
    return "\n\n".join([table([pick(line) for line in lines], pick(HEADER)), *words]), summaries


def unresolved(label, pair, s):
    """[what it would take to tell two models apart, in words], or [] where their interval excludes 0."""
    low, high = pair["interval"]
    if low > 0 or high < 0 or not pair["difference"]:
        return []
    more, problems = pair["needed"].values()
    if more is not None:
        more = f"{more:,} samples of each of these problems, or "
    elif s["error"]["samples"] is not None:
        more = f"more than these {s['problems']} problems, however often sampled: "
    return [f"{label} against {pair['against']}: {pair['difference']:+.3f} could be noise.  To see a difference of "
            f"that size (80 % power) takes {more or ''}{problems:,} such problems x {s['samples']:.3g}."]


def label_of(spec):
    """A model spec or path as a file name, one to one: / becomes ~, what is unusual is percent-escaped."""
    spec = relative(spec)
    name = re.sub(r"[^A-Za-z0-9._+@#=/-]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), spec)
    name = name.replace("/", "~")
    # File systems stop at 255 bytes.
    return name if len(name) < 150 else f"{name[-120:]}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def bench_label(name):
    return label_of(re.sub(r"\.(jsonl|json|csv)$", "", name))


def save_summaries(directory, summaries):
    """Merges {label: summary} into directory/summary.json, which keeps the labels of earlier runs."""
    path = Path(directory) / "summary.json"
    try:
        merged = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | summaries
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not a JSON object; move it away and run again, samples are kept") from None
    with staged(directory) as temporary:
        (temporary / path.name).write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# Looking at answers
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Show:
    """Prints samples of an evaluation file, to be read: eval.py show FILE"""
    wrong: bool = False  # only those that were graded wrong
    id: str | None = None  # only those of this problem, with all of their reasoning


def show(argv):
    """`eval.py show FILE [--wrong] [--id ID]`"""
    if not argv or argv[0].startswith("-"):
        raise ValueError("eval.py show needs the .jsonl file of an evaluation: eval.py show FILE [--wrong] [--id ID]")
    args = parse_flags(Show, argv[1:], "eval.py show FILE")
    rows = [row if {"extracted", "correct"} <= row.keys() else mark(row) for row in read_samples(argv[0])]
    picked = [row for row in rows if args.id in (None, row["id"]) and not (args.wrong and row["correct"])]
    if not picked:
        raise ValueError(f"{argv[0]}: none of its {len(rows)} samples is " + ("wrong" if args.wrong else "there")
                         + (f" for problem {args.id!r}" if args.id is not None else ""))
    for row in picked:
        print(as_page(row, width=min(110, shutil.get_terminal_size().columns), whole=args.id is not None), end="\n\n")
    print(f"{len(picked)} of {len(rows)} samples, {sum(row['correct'] for row in picked)} of them right")


def as_page(row, width, whole):
    """One sample as text: prompt, reasoning (its ends, unless whole), answer, and what was compared with what."""
    thought, closed, answer = row["completion"].rpartition("</think>")
    if not closed:
        thought, answer = (answer, "") if think_prefix(row["prompt"]) else ("", answer)
    lines = wrap(thought, width - 4)
    if len(lines) > 24 and not whole:
        lines[12:-12] = [f"[{len(lines) - 24} more lines: --id {printable(row['id'])}]"]
    title = f"problem {row['id']}, sample {row['sample']}: {'right' if row['correct'] else 'WRONG'}, {row['tokens']} "
    title += "tokens, then cut off" if row["finish"] == "length" else "tokens"
    return "\n".join([f"{'=' * 4} {printable(title)} ".ljust(width, "="), *wrap(row["prompt"], width), "",
                      *(f"  | {line}" for line in lines), *([""] if lines else []), *wrap(answer, width), "",
                      f"extracted: {printable(str(row['extracted']))}", f"gold:      {printable(row['gold'])}"])


def printable(text):
    """Text without control characters: a completion must not be able to steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "\ufffd" for c in text)


def wrap(text, width):
    """Lines of at most `width` columns, the line breaks of the text kept."""
    return [piece for line in printable(text.strip()).split("\n") if text.strip()
            for piece in textwrap.wrap(line, max(width, 20)) or [""]]


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Eval:
    """Samples a benchmark, grades, prints Pass@1 with intervals; started again, it resumes where it was."""
    preset: str = "tiny"  # bundle of defaults
    model: list[str] = ()  # model specs, the others compared with the first; by default what tuning wrote
    bench: str = "tiny"  # of tiny, aime24, aime25, amc23, math500, minerva, gpqa, olympiadbench, FILE; commas; or all
    samples: int = 1  # samples a problem
    temperature: float = 0.6  # 0 is greedy
    top_p: float = 0.95  # the likeliest tokens that together reach this probability
    top_k: int = 0  # the k likeliest tokens, 0 for all
    greedy: bool = False  # temperature 0, one sample a problem
    max_new_tokens: int = 32768  # a completion that gets there counts as truncated
    system: str = ""  # a system prompt; published: none
    prompt_file: str | None = None  # text with {problem} in it, in place of the published instructions
    grader: Literal["resa", "lighteval", "math-verify"] = "resa"  # resa, or the published pipeline's, or the package
    seed: int = 0  # a sample is seeded by this, the row of its problem and its own number
    limit: int = 0  # only the first so many problems, 0 for all
    slots: int = 64  # samples decoded at a time: speed and memory, not the result
    dtype: str | None = None  # float32 | bfloat16 | ...; by default the checkpoint's
    device: str | None = None  # cpu | cuda | ...; by default cuda where there is one
    out: str | None = None  # samples go to OUT/eval/BENCH/; by default OUT is out/PRESET
    fresh: bool = False  # delete earlier samples of these models instead of resuming
    regrade: list[str] = ()  # grade these .jsonl files again and print the table; nothing is written


def check(args):
    """ValueError for a value out of range, or a flag that could not take effect."""
    for name, least in {"samples": 1, "limit": 0, "slots": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, it should be at least {least}")
    check_sampling([], args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    GRADERS[args.grader]("0", "0")      # a package that is missing should not be missed after the sampling
    if len(set(args.model)) < len(args.model):
        raise ValueError("--model names the same model twice")
    idle = set()
    if args.regrade:
        idle = args.given - {"regrade", "grader"}
    elif args.greedy or args.temperature == 0:
        idle = args.given & {"temperature", "samples", "top_p", "top_k"}
        idle -= {"temperature"} if args.temperature == 0 else set()
        idle -= {"samples"} if args.samples == 1 else set()
    if idle:
        where = "with --regrade, which generates nothing" if args.regrade else "in greedy decoding"
        raise ValueError(f"--{min(idle).replace('_', '-')} has no effect {where}")


def regrade(paths, grader="resa"):
    """Grades the samples in these files again -> {label: rows}, and says how many grades have changed."""
    results = {}
    for path in paths:
        old = read_samples(path)
        if not old:
            raise ValueError(f"{path}: no sample in this file")
        rows = [mark(row, grader) for row in old]
        changed = sum(a.get("correct") != b["correct"] for a, b in zip(old, rows))
        print(f"{path}: {len(rows)} samples, {changed} of them graded differently in the file")
        results[str(path) if Path(path).stem in results else Path(path).stem] = rows
    return results


def join_processes():
    """Under torchrun, meets the other processes; they exchange nothing but signals that they have come so far."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))      # one may finish days before another


def read_prompt(path):
    """--prompt-file -> its text.  ValueError without {problem} in it."""
    text = Path(path).read_text(encoding="utf-8")
    if "{problem}" not in text:
        raise ValueError(f"{path}: there is no {{problem}} in it, so it cannot ask anything")
    return text.strip()


def read_benches(args):
    """--bench -> {name: (problems, source, prompt)}.  The first process fetches, the others find the files there."""
    names = list(PUBLISHED) if args.bench == "all" else args.bench.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"--bench {args.bench}: the same one twice")
    if world()[0] > 0:
        wait_for_all()
    own = read_prompt(args.prompt_file) if args.prompt_file else None
    benches = {}
    for name in names:
        problems, source = read_bench(name)
        prompt = BENCHES.get(name, CHOICE_PROMPT if name.endswith(".csv") else "{problem}")
        benches[name] = problems[:args.limit or None], source, own or prompt
    if world()[0] == 0:
        wait_for_all()
    return benches


def sampling_of(args, name):
    """The settings of evaluate() for a benchmark.  The preset's length limit is made for its own questions."""
    names = "samples temperature top_p top_k max_new_tokens seed slots fresh grader system".split()
    sampling = {name: getattr(args, name) for name in names}
    if name in PUBLISHED and "max_new_tokens" not in args.given:
        sampling["max_new_tokens"] = Eval.max_new_tokens
    if args.greedy or args.temperature == 0:
        sampling |= {"samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    return sampling


def main(argv):
    if argv[:1] == ["show"]:
        return show(argv[1:])
    args = parse_flags(Eval, argv, "eval.py")
    check(args)
    if args.regrade:
        print(report(regrade(args.regrade, args.grader))[0])
        return
    join_processes()
    # All files are read before the first model is loaded: a mistake shows at once.
    benches, root = read_benches(args), Path(args.out or f"out/{args.preset}") / "eval"
    results, tuned = {name: {} for name in benches}, f"out/{args.preset}/adapter"
    if not args.model and not Path(tuned).is_dir():
        raise FileNotFoundError(f"{tuned}: no adapter there yet; run train.py --stage tune, or name models: --model")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    for spec in args.model or [f"{PRESETS[args.preset]['target']}+{tuned}"]:
        model = load_model(spec, args.dtype, device)
        tokenizer, label = load_tokenizer(spec), label_of(spec)
        for name, (problems, _, prompt) in benches.items():
            path = root / bench_label(name) / f"{label}.jsonl"
            results[name][label] = evaluate(model, tokenizer, problems, path, label=label, prompt=prompt,
                                            **sampling_of(args, name))
    for name, (_, source, _) in benches.items() if world()[0] == 0 else ():
        text, summaries = report(results[name])
        directory = root / bench_label(name)
        open_run(directory, args)
        more = {"data": source, "grader": args.grader}
        save_summaries(directory, {label: summary | more for label, summary in summaries.items()})
        print(f"\n{name}, samples in {directory}\n\n{text}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    front_door(main)
