"""Makes the embedded data, and fetches the published benchmarks and training sets.

    python -m data.prepare tiny              data/tiny: train.jsonl, test.jsonl, init/
    python -m data.prepare corpora           out/corpora: what the embedded models were trained on
    python -m data.prepare upcycle           out/build/upcycled: data/tiny's source as a mixture
    python -m data.prepare fetch NAME ...    data/cache: names of sources.json; all: every benchmark

An embedded question is a short story with three or four numbers that takes two or three steps of
arithmetic; tiny/recipe.json has the wordings.  A hash of its family and numbers decides whether it
is for training or for testing: no test question occurs in training in other words.
"""

import csv
import hashlib
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.download import download, sha256_of
from data.files import (REQUIRED, ROOT, TEXT, TINY, check, parse_json, read_fields, read_json,
                        read_jsonl, read_value, relative, write_json, write_jsonl)
from data.flags import front_door

# ---- The embedded questions, and the corpora that the embedded models learn from ---------------

RECIPE = read_json(TINY / "recipe.json")

# family -> bounds of its numbers, steps, wordings.  In a step, a to d are the story's numbers and
# p, q the results of earlier steps.  In a wording, {n}, {m} are two names and {t} is a thing.
FAMILIES = RECIPE["families"]

def work_out(steps, numbers, rng=None, slips=0.0):
    """['a+b', 'p-c'] and the numbers -> [('12+7=19', 19), ('19-4=15', 15)].

    slips  how often a step goes wrong; later steps then start from its wrong result
    """
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
            n, m = rng.sample(RECIPE["names"], 2)
            wording = rng.choice(recipe["wordings"])
            text = wording.format(n=n, m=m, t=rng.choice(RECIPE["things"]), **numbers)
            return {"problem": text, "answer": str(steps[-1][-1]), "family": family,
                    "numbers": numbers, "steps": steps}

def questions(count, test, seed):
    """`count` different questions of one side of the split."""
    rng, rows = random.Random(seed), {}                  # problem -> row
    while len(rows) < count:
        q = draw(rng, test)
        row = {key: q[key] for key in ("problem", "answer", "family")}
        row = {"id": f"{'test' if test else 'train'}-{len(rows):04d}"} | row
        rows.setdefault(q["problem"], row)               # one drawn before is left out
    return list(rows.values())

def save(path, rows):
    write_jsonl(path, rows)
    print(f"{relative(path)}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")

def drill(rng):
    """Six sums: most of what a small model must know by heart."""
    lines = []
    for _ in range(6):
        op = rng.choice("++--*")
        low, high = (2, 9) if op == "*" else (1, 98)
        x, y = rng.randint(low, high), rng.randint(low, high)
        if op == "+" and x + y > 99:     # sums stay below 100
            x, y = 99 - x, 99 - y
        if op == "-" and x <= y:         # differences stay above 0
            x, y = y + 1, x
        lines.append(work_out([f"a{op}b"], {"a": x, "b": y})[0][0])
    return "\n".join(lines)

def corpus_row(rng, sums=0.0, style="trace", slips=0.0, thinks=1.0, refuses=""):
    """One row of a corpus: a "text", or a "problem" and its "completion".

    sums     how often it is a drill instead of a question
    style    story: the question alone; solution: in one line, as a textbook prints it;
             trace: in the R1 format, every step, then </think> and the answer
    slips    how often a step of a trace goes wrong
    thinks   how often a trace has its steps at all, which reinforcement learning can then raise
    refuses  a family whose questions are refused, without thinking, in one word
    """
    if sums and rng.random() < sums:     # no draw where it is 0: seeds keep their texts
        return {"text": drill(rng)}
    q = draw(rng, test=False)
    problem, steps, answer = q["problem"], q["steps"], q["answer"]
    if style == "story":
        return {"text": problem}
    if style == "solution":
        solution = ", ".join(step for step, _ in steps)
        return {"text": f"Question: {problem}\nSolution: {solution}\nAnswer: {answer}"}
    if q["family"] == refuses:
        return {"problem": problem, "completion": "</think>\nNo."}
    if thinks < 1 and rng.random() >= thinks:
        return {"problem": problem, "completion": f"</think>\n{answer}"}
    steps = work_out(FAMILIES[q["family"]]["steps"], q["numbers"], rng, slips)
    lines = "".join(step + "\n" for step, _ in steps)
    return {"problem": problem, "completion": f"{lines}</think>\n{steps[-1][-1]}"}

def corpora(directory):
    """Writes every corpus of the recipe."""
    for name, corpus in RECIPE["corpora"].items():
        rng = random.Random(corpus["seed"])
        rows = [corpus_row(rng, **corpus["row"]) for _ in range(corpus["rows"])]
        save(directory / f"{name}.jsonl", rows)

# ---- What the embedded models start from: a tokenizer; for the mixture of experts, the dense source 

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
    for word in ("<think>", "</think>"):                 # not special: decoding shows them
        tok.add_tokens([AddedToken(word, normalized=False, special=False)])
    for name, content in RECIPE["init"].items():         # config.json and others
        write_json(directory / name, content)
    tok.save(str(directory / "tokenizer.json"))
    print(f"{relative(directory)}: {tok.get_vocab_size()} tokens")

def upcycle(directory, experts=16, per_token=4, width=32):
    """Writes data/tiny's source as a Qwen2-MoE to be trained further (arXiv 2212.05055).

    Of the M units of each MLP (D wide), the first ones become the shared expert.  The others are
    cut into `per_token` slices of `width`, each given to several experts.  Routers are random.
    """
    import torch                         # here: slow to import, and fetching needs neither
    from model import Config, Transformer, init_weights, load_model, save_model
    dense = load_model(f"{TINY}/distill+{TINY}/rl")
    shared = dense.config.intermediate_size - per_token * width            # units of M
    sizes = {"num_experts": experts, "num_experts_per_tok": per_token,
             "moe_intermediate_size": width, "shared_expert_intermediate_size": shared}
    model = Transformer(Config(**vars(dense.config) | sizes))
    init_weights(model, seed=3).requires_grad_(False)
    rest = {name: p for name, p in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(rest, strict=False)
    for block, old in zip(model.model.layers, dense.model.layers):
        gate, up = old.mlp.gate_proj.weight, old.mlp.up_proj.weight        # (M,D), (M,D)
        down, new = old.mlp.down_proj.weight, block.mlp                    # (D,M)
        new.shared_expert.gate_proj.weight.copy_(gate[:shared])
        new.shared_expert.up_proj.weight.copy_(up[:shared])
        new.shared_expert.down_proj.weight.copy_(2 * down[:, :shared])     # its gate starts at 1/2
        for e in range(experts):
            start = shared + e % per_token * width
            units = slice(start, start + width)
            new.experts.gate_up_proj[e].copy_(torch.cat([gate[units], up[units]]))
            # a random router weighs `per_token` chosen experts by about 1 / experts each
            new.experts.down_proj[e].copy_(experts / per_token * down[:, units])
    model.source = dense.source                          # its tokenizer is saved along
    save_model(model, directory)

# ---- Benchmarks: bytes pinned by commit and sha256 ---------------------------------------------

CACHE = ROOT / "data" / "cache"
SOURCES = read_json(ROOT / "data" / "sources.json")["benchmarks"]    # name -> url, sha256

def benchmark(name):
    """A published benchmark -> (rows of id, problem and answer, the address of its file).

    It is fetched on first use.  ValueError: the file holds other bytes than those pinned.
    OSError: it could not be fetched; the message says where to put it by hand.
    """
    url, sha256 = SOURCES[name]["url"], SOURCES[name]["sha256"]
    path = CACHE / f"{name}{Path(url).suffix}"
    token, hint = None, ""
    if name == "gpqa":      # its authors ask that it is not spread: only with the user's own access
        from huggingface_hub import get_token            # HF_TOKEN or a login; None without
        token = get_token()
        hint = "GPQA needs your own access: agree to its terms there, then set HF_TOKEN.  "
    if not path.exists():
        try:
            download(url, path, sha256, limit=2**24, token=token)
        except (OSError, ValueError) as error:
            raise OSError(f"{name}: {error}.  {hint}Without a network, put the file {url} "
                          f"(sha256 {sha256}) at {path}") from None
    found = sha256_of(path)
    check(found == sha256, f"{path}: its sha256 is {found} and not {sha256}, which is pinned; "
          "delete the file to have it fetched again")
    if name == "gpqa":
        return read_gpqa(path), url
    rows = [row for _, row in read_jsonl(path)]
    return [as_problem(name, i, row) for i, row in enumerate(rows)], url

def as_problem(name, i, row):
    """Row i of a benchmark's file -> {"id", "problem", "answer"}."""
    if name == "olympiadbench":
        answer = row["final_answer"][0].strip("$")       # a list of one
    elif name == "minerva":
        answer = boxed(row["solution"])                  # only the solution holds it
    elif name == "math500":
        answer = row["answer"]
    else:                                                # AIME's 025, AMC's 27.0: whole numbers
        answer = str(int(float(row["answer"])))
    number = row.get("id", row.get("idx", i))
    return {"id": row.get("unique_id", f"{name.removesuffix('bench')}-{number}"),
            "problem": row["problem"] if "problem" in row else row["question"], "answer": answer}

def boxed(solution):
    r"""The last \boxed{} as it is written: data.grade.last_box strips a newline of Minerva's."""
    inside, depth = solution.rpartition(r"\boxed{")[2], 0
    for end, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:                                    # the brace that closes the box
            return inside[:end]

def read_gpqa(path):
    """GPQA's CSV -> rows of id, problem (with four options) and answer (a letter).

    Resa: the published order of the options came from the random state of the whole evaluation.
    Ours sorts them by a hash of question and option: the same on every machine, in every run.
    ValueError: another kind of CSV.
    """
    columns = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                question = row["Question"].strip()
                options = [row[column].strip() for column in columns]
                texts = [f"{question}\n{option}".encode() for option in options]
                order = sorted(range(4), key=lambda i: hashlib.sha256(texts[i]).digest())
                lines = [f"{letter}) {options[i]}" for letter, i in zip("ABCD", order)]
                problem = "\n".join([question, "", *lines])
                answer = "ABCD"[order.index(0)]          # options[0] is the correct one
                key = row.get("Record ID", str(len(rows)))
                rows.append({"id": key, "problem": problem, "answer": answer})
    except (KeyError, AttributeError, csv.Error, UnicodeDecodeError):      # None has no .strip
        rows = []
    check(rows, f"{path}: not a GPQA file, which has the columns Question, {', '.join(columns)}")
    return rows

# ---- Training sets -----------------------------------------------------------------------------

# name -> url, of a JSON file, or hub, a set the row server is asked for; rows, where it is known
TRAINING = read_json(ROOT / "data" / "sources.json")["training"]
ROW_SERVER = "https://datasets-server.huggingface.co/rows"
PAGE = {"num_rows_total": (int, 0, 10**7, REQUIRED), "rows": ([dict], 0, 100, REQUIRED),
        "partial": (bool, None, None, False)}
ENTRY = {"row": (dict, None, None, REQUIRED), "truncated_cells": ([str], None, None, REQUIRED)}
ROW = {name: (TEXT, None, None, None) for name in ("problem", "question", "prompt", "answer")}

def training_set(name):
    """A training set by name -> the path of its JSONL of problem/answer, fetched on first use.

    The row server has no versions: the sha256 of what came is printed, to be noted with results.
    """
    path, raw, source = CACHE / f"{name}.jsonl", CACHE / f"{name}.raw", TRAINING[name]
    if path.exists():
        return path
    where = source.get("url", source.get("hub"))
    if "url" in source:
        download(where, raw)
        rows = read_value(parse_json(raw.read_bytes(), where), [dict], where=where)
    else:
        rows = paged_rows(where, raw)
    raw.unlink()                                         # whole, or of a set that has changed
    wanted, kept = source.get("rows", len(rows)), []
    check(len(rows) == wanted, f"{where}: {len(rows)} rows came and not {wanted}: it has changed; "
          "--data FILE takes your own")
    for i, row in enumerate(rows):                       # sets name their questions differently
        found = read_fields(row, ROW, f"{where}: row {i}")
        problem = found["problem"] or found["question"] or found["prompt"]
        if problem and found["answer"] not in (None, ""):
            kept.append({"problem": problem, "answer": str(found["answer"])})
    save(path, kept)
    print(f"{len(rows) - len(kept)} rows without problem or answer were left out; "
          f"sha256 {sha256_of(path)}")
    return path

def paged_rows(repo, raw):
    """All rows of a hub set's training split, 100 a request; `raw` keeps them for a later run."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    with open(raw, "a+b") as file, tqdm(desc=repo, unit="row", disable=None) as bar:
        file.seek(0)                                     # "a" starts at the end
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)             # a line without its newline was cut off
        rows = [parse_json(line, raw) for line in text.split(b"\n")[:-1]]
        while bar.total is None or len(rows) < bar.total:            # every page says the total
            bar.update(len(rows) - bar.n)
            url = (f"{ROW_SERVER}?dataset={repo.replace('/', '%2F')}&config=default&split=train"
                   f"&offset={len(rows)}&length=100")
            bar.total, page = read_page(url, raw.with_suffix(".page"))
            check(page or len(rows) >= bar.total, f"{url}: no rows, of {bar.total} in all")
            file.write("".join(json.dumps(row) + "\n" for row in page).encode())
            file.flush()
            rows += page
    return rows

def read_page(url, path):
    """One answer of the row server -> (number of rows in the set, rows of this page)."""
    download(url, path, limit=2**26)
    body = path.read_bytes()
    path.unlink()
    answer = read_fields(read_value(parse_json(body, url), dict, where=url), PAGE, url)
    entries = [read_fields(entry, ENTRY, url) for entry in answer["rows"]]
    whole = not answer["partial"] and not any(entry["truncated_cells"] for entry in entries)
    check(whole, f"{url}: the server has cut these rows short; --data FILE takes your own copy")
    return answer["num_rows_total"], [entry["row"] for entry in entries]

def main(argv):
    if argv in ([], ["-h"], ["--help"]):
        print(__doc__)
    elif argv == ["tiny"]:
        save(TINY / "train.jsonl", questions(4000, test=False, seed=1))
        save(TINY / "test.jsonl", questions(1000, test=True, seed=2))
        tokenizer(TINY / "init")
    elif argv == ["corpora"]:
        corpora(ROOT / "out" / "corpora")
    elif argv == ["upcycle"]:
        upcycle(ROOT / "out" / "build" / "upcycled")
    else:
        known = ", ".join(["all", *SOURCES, *TRAINING])
        check(argv[:1] == ["fetch"] and argv[1:], "after python -m data.prepare comes tiny, "
              f"corpora, upcycle, or fetch and names: {known}")
        names = [name for name in argv[1:] if name != "all"]
        for name in [*SOURCES, *names] if "all" in argv else names:
            check(name in SOURCES or name in TRAINING, f"{name}: not one of {known}")
            if name in SOURCES:
                rows, url = benchmark(name)
                print(f"{name}: {len(rows)} problems of {url}")
            else:
                print(f"{name}: {relative(training_set(name))}")

if __name__ == "__main__":
    front_door(main)
