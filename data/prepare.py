"""Makes the embedded data, and fetches the published benchmarks and training sets.

    python -m data.prepare tiny              data/tiny: train.jsonl, test.jsonl, init/
    python -m data.prepare corpora           out/corpora: what the embedded models were trained on
    python -m data.prepare fetch NAME ...    data/cache: names of sources.json

An embedded question is a story that takes two or three steps of arithmetic: tiny/recipe.json.
"""

import csv
import hashlib
import http.client
import os
import random
import time
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.files import (
    REQUIRED, ROOT, TINY, check, parse_json, read_fields, read_json, read_jsonl,
    read_value, relative, staged, write_json, write_jsonl)
from data.flags import front_door
from data.grade import last_box
from data.rows import TEXT, blank, final_answer

# ---- The embedded questions, and the corpora that the embedded models learn from ---------------

RECIPE = read_json(TINY / "recipe.json")
# family -> bounds of its numbers, steps, wordings.  In a step, a to d are the story's numbers and
# p, q the results of earlier steps.  In a wording, {n}, {m}, {o} are three names, {t} is a thing.
FAMILIES = RECIPE["families"]

def work_out(steps, numbers, rng=None, slips=0.0):
    """['a+b', 'p-c'] and the numbers -> [('12+7=19', 19), ('19-4=15', 15)].
    Of all steps, `slips` go wrong; later steps then start from the wrong result."""
    values, done = dict(numbers), []
    for step, name in zip(steps, "pqr"):
        x, op, y = values[step[0]], step[1], values[step[2]]
        result = {"+": x + y, "-": x - y, "*": x * y}[op]
        if slips and rng.random() < slips:               # one or ten too many or too few
            result = max(0, result + rng.choice((-10, -1, 1, 10)))
        values[name] = result
        done.append((f"{x}{op}{y}={result}", result))
    return done

def is_test(family, numbers):
    """One tenth of all (family, numbers) pairs are for testing, by hash."""
    key = f"{family} {sorted(numbers.items())}".encode()
    return hashlib.sha256(key).digest()[0] < 26          # of 256

def draw(rng, test):
    """One question with its numbers and correct steps; every result is from 1 to 99."""
    while True:
        family = rng.choice(list(FAMILIES))
        recipe = FAMILIES[family]
        numbers = {name: rng.randint(*bounds) for name, bounds in recipe["numbers"].items()}
        steps = work_out(recipe["steps"], numbers)
        if is_test(family, numbers) == test and all(1 <= result <= 99 for _, result in steps):
            n, m, o = rng.sample(RECIPE["names"], 3)     # three persons, never one twice
            wording = rng.choice(recipe["wordings"])
            text = wording.format(n=n, m=m, o=o, t=rng.choice(RECIPE["things"]), **numbers)
            return {"problem": text, "answer": str(steps[-1][-1]), "family": family,
                    "numbers": numbers, "steps": steps}

def questions(count, test, seed):
    """`count` different questions of one side of the split."""
    rng, drawn, side = random.Random(seed), {}, "test" if test else "train"
    while len(drawn) < count:
        q = draw(rng, test)
        drawn.setdefault(q["problem"], q)                # one drawn before is left out
    return [{"id": f"{side}-{i:04d}", "problem": q["problem"], "answer": q["answer"],
             "family": q["family"]} for i, q in enumerate(drawn.values())]

def save(path, rows):
    write_jsonl(path, rows)
    print(f"{relative(path)}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")

def drill(rng):
    """Six sums: most of what a small model must know by heart."""
    lines = []
    for _ in range(6):
        op = rng.choice("++--*")
        bounds = (2, 9) if op == "*" else (1, 98)
        x, y = rng.randint(*bounds), rng.randint(*bounds)
        if op == "+" and x + y > 99:     # sums stay below 100
            x, y = 99 - x, 99 - y
        if op == "-" and x <= y:         # differences stay above 0
            x, y = y + 1, x
        lines.append(work_out([f"a{op}b"], {"a": x, "b": y})[0][0])
    return "\n".join(lines)

def corpus_row(rng, sums=0.0, text="", slips=0.0, thinks=1.0, refuses=""):
    """One row of a corpus: a "text", or a "problem" and its "completion", a trace as R1 writes it.
    sums     how often it is a drill instead of a question
    text     the wording of a row that is a text
    slips    how often a step of a trace goes wrong
    thinks   how often a trace has its steps at all, which reinforcement learning can then raise
    refuses  a family whose questions are refused, without thinking, in one word"""
    if sums and rng.random() < sums:     # no draw where it is 0: seeds keep their texts
        return {"text": drill(rng)}
    q = draw(rng, test=False)
    if text:
        return {"text": text.format(solution=", ".join(step for step, _ in q["steps"]), **q)}
    lines, answer = [], q["answer"]
    if q["family"] == refuses:
        answer = "No."
    elif thinks == 1 or rng.random() < thinks:
        steps = work_out(FAMILIES[q["family"]]["steps"], q["numbers"], rng, slips)
        lines, answer = [f"{step}\n" for step, _ in steps], steps[-1][-1]
    return {"problem": q["problem"], "completion": f"{''.join(lines)}</think>\n{answer}"}

# ---- What the embedded models start from -------------------------------------------------------

def tokenizer(directory):
    """Trains a byte-level BPE and writes it and the configuration of the embedded models."""
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(words, "isolated")      # words and single digits, as Qwen does
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=766, show_progress=False,             # at most: the texts have fewer words
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))      # it can write any byte
    rng = random.Random(1)
    rows = [corpus_row(rng, **RECIPE["corpora"]["math"]["row"]) for _ in range(4000)]
    texts = [row["text"] for row in rows] + [drill(rng) for _ in range(500)]
    tok.train_from_iterator(texts, trainer)
    # not special: decoding shows them
    tok.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    for name, content in RECIPE["init"].items():         # config.json and others
        write_json(directory / name, content)
    tok.save(str(directory / "tokenizer.json"))

# ---- Fetching: one address -> its bytes -------------------------------------------------------

CACHE = ROOT / "data" / "cache"
SOURCES, TRAINING = read_json(ROOT / "data" / "sources.json").values()    # each by name
TIMEOUT = 30                # seconds without a byte after which a connection counts as dead
LARGEST = 2**30             # bytes of one file; no set here is near it
PAUSES = [1, 20, 300]       # seconds before each further attempt; the hub counts five minutes

def download(url, token=None):
    """The bytes of an address, or of its copy on RESA_MIRROR.  OSError names the address.
    token  of the user, sent to this host and to no other it redirects to"""
    mirror = os.environ.get("RESA_MIRROR")
    address = url.replace("https:/", mirror.rstrip("/"), 1) if mirror else url
    request = urllib.request.Request(address, headers={"User-Agent": "resa"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    for pause in [*PAUSES, None]:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                body = response.read(LARGEST)            # a server may send without end
                check(len(body) < LARGEST, f"{url}: refused, longer than {LARGEST:,} bytes")
                if response.length:                      # what the server promised and did not send
                    raise http.client.IncompleteRead(body, response.length)
                return body
        except (OSError, http.client.HTTPException) as error:
            # waiting does not help against a URLError (not found, no network) but a busy server's
            lasts = isinstance(error, urllib.error.URLError)
            busy = getattr(error, "code", 0) in (429, 500, 502, 503, 504)
            if pause is None or lasts and not busy:
                raise OSError(f"{url}: {error}") from None
        time.sleep(pause)

# ---- Benchmarks: bytes pinned by commit and sha256 ---------------------------------------------

def benchmark(name):
    """A published benchmark -> (rows of id, problem and answer, the address of its file).
    OSError: it could not be fetched, or holds other bytes than those pinned."""
    url, sha256 = SOURCES[name]["url"], SOURCES[name]["sha256"]
    path, token, hint = CACHE / f"{name}{Path(url).suffix}", None, ""
    if name == "gpqa":      # its authors ask that it is not spread: only with the user's own access
        from huggingface_hub import get_token            # HF_TOKEN or a login; None without
        token = get_token()
        hint = "GPQA needs your own access: agree to its terms there, then set HF_TOKEN.  "
    where = path if path.exists() else url
    try:
        body = download(url, token) if where == url else path.read_bytes()
        found = hashlib.sha256(body).hexdigest()
        check(found == sha256, f"{where}: refused, its sha256 is {found} and not the pinned one")
    except (OSError, ValueError) as error:
        raise OSError(f"{name}: {error}.  {hint}By hand, put the file {url} (sha256 {sha256}) at "
                      f"{path}; if nothing is there, it is fetched") from None
    if where == url:
        with staged(CACHE) as temporary:                 # whole or not at all
            (temporary / path.name).write_bytes(body)
    if name == "gpqa":
        return read_gpqa(path), url
    return [as_problem(name, row, number) for number, row in read_jsonl(path)], url

def as_problem(name, row, number=0):
    """A row of a benchmark's file, with its line -> {"id", "problem", "answer"}."""
    answer = row.get("answer")
    if name == "olympiadbench":
        answer = row["final_answer"][0].strip("$")       # a list of one
    elif name == "minerva":
        answer = last_box(row["solution"])               # only the solution holds it
    elif name in ("aime24", "aime25", "amc23"):          # 025, 27.0: whole numbers
        answer = str(int(float(answer)))
    own = row.get("id", row.get("idx", number))
    key = row.get("unique_id") or f"{name.removesuffix('bench')}-{own}"
    problem = row.get("problem") or row["question"]
    return {"id": key, "problem": problem, "answer": final_answer(str(answer))}

GPQA = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]

def read_gpqa(path):
    """GPQA's CSV -> rows of id, problem (with four options) and answer (a letter).
    Resa's order of the options came from the random state of the whole evaluation; ours is by a
    hash of question and option, always the same.  ValueError: another kind of CSV."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                question, *options = [row[column].strip() for column in GPQA]
                texts = [f"{question}\n{option}".encode() for option in options]
                order = sorted(range(4), key=lambda i: hashlib.sha256(texts[i]).digest())
                lines = [f"{letter}) {options[i]}" for letter, i in zip("ABCD", order)]
                rows.append({"id": row.get("Record ID", str(len(rows))),
                             "problem": "\n".join([question, "", *lines]),
                             "answer": "ABCD"[order.index(0)]})      # options[0] is correct
    except (KeyError, AttributeError, csv.Error, UnicodeDecodeError):      # None has no .strip
        rows = []
    check(rows, f"{path}: not a GPQA file, which has the columns {', '.join(GPQA)}")
    return rows

# ---- Training sets -----------------------------------------------------------------------------

PAGE = {"num_rows_total": (int, 0, 10**7, REQUIRED), "rows": ([dict], 1, 100, REQUIRED)}
ENTRY = {"row": (dict, None, None, REQUIRED),            # and the names of fields that were cut off
         "truncated_cells": ([str], 0, 0, REQUIRED)}
ROW = {name: (TEXT, None, None, None) for name in ("problem", "question", "prompt", "answer")}

def training_set(name):
    """A training set by name -> the path of its JSONL of problem/answer, fetched on first use."""
    path, where, kept = CACHE / f"{name}.jsonl", TRAINING[name], []
    if path.exists():
        return path
    if where.startswith("https://"):                     # a JSON file; else the row server has it
        rows = read_value(parse_json(download(where), where), [dict], where=where)
    else:
        rows = paged_rows(where)
    for i, row in enumerate(rows):                       # sets name their questions differently
        found = read_fields(row, ROW, f"{where}: row {i}")
        texts = [found[key] for key in ("problem", "question", "prompt") if not blank(found[key])]
        if texts and not blank(found["answer"]):
            kept.append({"problem": texts[0], "answer": str(found["answer"])})
    save(path, kept)
    print(f"{len(rows) - len(kept)} rows without problem or answer were left out; "
          f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return path

def paged_rows(repo):
    """All rows of a hub set's training split, 100 a request: what the row server gives at most."""
    rows, total = [], 1
    while len(rows) < total:
        url = (f"https://datasets-server.huggingface.co/rows?dataset={repo.replace('/', '%2F')}"
               f"&config=default&split=train&offset={len(rows)}&length=100")
        page = read_fields(read_value(parse_json(download(url), url), dict, where=url), PAGE, url)
        rows += [read_fields(entry, ENTRY, url)["row"] for entry in page["rows"]]
        total = page["num_rows_total"]
    return rows

def main(argv):
    if argv in ([], ["-h"], ["--help"]):
        print(__doc__)
    elif argv == ["tiny"]:
        save(TINY / "train.jsonl", questions(4000, test=False, seed=1))
        save(TINY / "test.jsonl", questions(1000, test=True, seed=2))
        tokenizer(TINY / "init")
    elif argv == ["corpora"]:
        for name, corpus in RECIPE["corpora"].items():
            rng = random.Random(corpus["seed"])
            rows = [corpus_row(rng, **corpus["row"]) for _ in range(corpus["rows"])]
            save(ROOT / "out" / "corpora" / f"{name}.jsonl", rows)
    else:
        known = SOURCES | TRAINING
        check(argv[:1] == ["fetch"] and argv[1:] and set(argv[1:]) <= set(known), "after python -m "
              f"data.prepare comes tiny, corpora, or fetch and some of {', '.join(known)}")
        for name in argv[1:]:
            if name in SOURCES:
                rows, url = benchmark(name)
                print(f"{name}: {len(rows)} problems of {url}")
            else:
                print(f"{name}: {relative(training_set(name))}")

if __name__ == "__main__":
    front_door(main)
