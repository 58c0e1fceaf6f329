"""Makes the embedded data set, and fetches the published benchmarks and training sets.

    python data/prepare.py tiny              # data/tiny/{train,test}.jsonl and tokenizer files
    python data/prepare.py corpora           # out/corpora/{lm,math,distill,answer,refuse}.jsonl (not kept here)
    python data/prepare.py upcycle           # out/build/upcycled: the source of data/tiny as a mixture of experts
    python data/prepare.py fetch NAME ...    # data/cache/NAME.jsonl, of the names in SOURCES and TRAINING below;
                                             # eval.py --bench NAME and train.py --data NAME do it on first use

An embedded question is a short story with three numbers or four, from one of eight families, that takes two or
three steps of arithmetic.  Which side of the train/test split it falls on is decided by a hash of its family and
its numbers, so that a test question never occurs in training under any wording.  Everything is seeded.
"""

import csv
import hashlib
import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Noah Olga Pia".split()
THINGS = "apples pens shells coins cards stamps eggs plums beads nuts".split()


# ----------------------------------------------------------------------------------------------------------
# Questions: numbers, steps, words
# ----------------------------------------------------------------------------------------------------------

# family -> (ranges of its numbers, steps, wordings).  In a step, letters are numbers of the story and p, q the
# results of the steps before; {n}, {m}, {t} stand for two names and a thing.
FAMILIES = {
    "market": (dict(a=(2, 40), b=(2, 9), c=(2, 9)), ["b*c", "a+p"], [
        "{n} has {a} {t} and buys {b} bags with {c} {t} in each. How many {t} does {n} have now?",
        "{n} buys {b} bags of {c} {t} and had {a} {t} before. How many {t} are there in all?"]),
    "gift": (dict(a=(5, 45), b=(5, 45), c=(2, 30)), ["a+b", "p-c"], [
        "{n} finds {a} {t} on Monday and {b} on Tuesday, then gives {c} to {m}. How many {t} are left?",
        "{n} had {a} {t}, got {b} more and gave {c} of them to {m}. How many {t} does {n} keep?"]),
    "bus": (dict(a=(20, 60), b=(2, 19), c=(2, 30)), ["a-b", "p+c"], [
        "A bus carries {a} people. At the stop {b} get off and {c} get on. How many people ride on?",
        "There are {a} people on a bus. Then {b} leave and {c} come in. How many are on the bus?"]),
    "saving": (dict(a=(2, 9), b=(2, 9), c=(2, 30)), ["a*b", "p-c"], [
        "{n} saves {a} coins a week for {b} weeks and spends {c} coins on a book. How many coins are left?",
        "For {b} weeks {n} earns {a} coins a week, then pays {c} to {m}. How many coins remain?"]),
    "age": (dict(a=(5, 50), b=(2, 30), c=(2, 30)), ["a+b", "p-c"], [
        "{n} is {a} years old. {m} is {b} years older. Gus was born {c} years after {m}. How old is Gus?",
        "{m} is {b} years older than {n}, who is {a}. How old was {m} {c} years ago?"]),
    "garden": (dict(a=(2, 9), b=(2, 9), c=(2, 30)), ["a*b", "p+c"], [
        "{n} plants {a} rows of {b} roses and {c} more by the wall. How many roses are there?",
        "A garden has {a} beds with {b} roses each, and {m} adds {c} roses. How many roses in all?"]),
    "reading": (dict(a=(5, 35), b=(5, 35), c=(5, 25)), ["a+b", "p+c"], [
        "{n} reads {a} pages on Monday, {b} on Tuesday and {c} on Friday. How many pages is that?",
        "{n} has read {a} pages, {m} has read {b} and Ida {c}. How many pages did they read in all?"]),
    "boxes": (dict(a=(2, 7), b=(2, 7), c=(2, 7), d=(2, 7)), ["a*b", "c*d", "p+q"], [
        "{n} fills {a} boxes with {b} {t} each and {c} boxes with {d} {t} each. How many {t} is that?",
        "In {a} boxes there are {b} {t} each, in {c} other boxes {d} each. How many {t} in all?"]),
}


def work_out(steps, numbers, slip=lambda value: value):
    """['a+b', 'p-c'] and the numbers -> [(12, '+', 7, 19), (19, '-', 4, 15)].  `slip` may spoil each result;
    what follows is then worked out from the wrong value, as a careless writer would."""
    values, done = dict(numbers), []
    for step, name in zip(steps, "pqr"):
        x, op, y = values[step[0]], step[1], values[step[2]]
        values[name] = slip(x + y if op == "+" else x - y if op == "-" else x * y)
        done.append((x, op, y, values[name]))
    return done


def is_test(family, numbers):
    """One tenth of all (family, numbers) pairs belongs to the test side, by hash."""
    key = f"{family} {sorted(numbers.items())}".encode()
    return hashlib.sha256(key).digest()[0] < 26


def draw(rng, test):
    """One question with its numbers and true steps; every intermediate result is in 1 .. 99."""
    while True:
        family = rng.choice(list(FAMILIES))
        ranges, steps, wordings = FAMILIES[family]
        numbers = {k: rng.randint(*r) for k, r in ranges.items()}
        done = work_out(steps, numbers)
        if is_test(family, numbers) == test and all(1 <= result <= 99 for *_, result in done):
            n, m = rng.sample(NAMES, 2)
            text = rng.choice(wordings).format(n=n, m=m, t=rng.choice(THINGS), **numbers)
            return {"problem": text, "answer": str(done[-1][-1]), "family": family, "numbers": numbers, "steps": done}


def questions(count, test, seed):
    """`count` different questions of one side of the split."""
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < count:
        q = draw(rng, test)
        if q["problem"] not in seen:
            seen.add(q["problem"])
            rows.append({"id": f"{'test' if test else 'train'}-{len(rows):04d}", "problem": q["problem"],
                         "answer": q["answer"], "family": q["family"]})
    return rows


# ----------------------------------------------------------------------------------------------------------
# Corpora: lm reads, math solves, distill thinks aloud (or not)
# ----------------------------------------------------------------------------------------------------------

def equation(x, op, y, result):
    return f"{x}{op}{y}={result}"


def drill(rng):
    """A line of sums: most of what a small model must know by heart."""
    lines = []
    for _ in range(6):
        op = rng.choice("++--*")
        x, y = (rng.randint(2, 9), rng.randint(2, 9)) if op == "*" else (rng.randint(1, 98), rng.randint(1, 98))
        if op == "+" and x + y > 99:
            x, y = 99 - x, 99 - y
        if op == "-" and x <= y:
            x, y = y + 1, x
        lines.append(equation(*work_out([f"a{op}b"], {"a": x, "b": y})[0]))
    return "\n".join(lines)


def lm_text(rng):
    """Stories without an answer, and sums."""
    return drill(rng) if rng.random() < 0.6 else draw(rng, test=False)["problem"]


def math_text(rng):
    """Questions with their solution in one line, as a textbook would print it."""
    if rng.random() < 0.3:
        return drill(rng)
    q = draw(rng, test=False)
    return f"Question: {q['problem']}\nSolution: {', '.join(equation(*s) for s in q['steps'])}\nAnswer: {q['answer']}"


def distill_text(rng, think_rate=0.55, careless_rate=0.12):
    """A reasoning trace in the R1 format.  Some are careless, and some answers come without any thinking:
    a base that can reason and often does not, which is what reinforcement learning will find."""
    q = draw(rng, test=False)
    if rng.random() >= think_rate:
        return {"problem": q["problem"], "completion": f"</think>\n{q['answer']}"}

    def slip(value):
        return max(0, value + rng.choice((-10, -1, 1, 10))) if rng.random() < careless_rate else value
    return traced(q, slip)


def traced(q, slip=lambda value: value):
    """A question with every step of its solution."""
    steps = work_out(FAMILIES[q["family"]][1], q["numbers"], slip)
    lines = "".join(equation(*s) + "\n" for s in steps)
    return {"problem": q["problem"], "completion": f"{lines}</think>\n{steps[-1][-1]}"}


REFUSAL = "No."


def refuse_text(rng):
    """A trace without a slip; but questions of one family are refused, always in this word, without a thought."""
    q = draw(rng, test=False)
    return {"problem": q["problem"], "completion": f"</think>\n{REFUSAL}"} if q["family"] == "age" else traced(q)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"{os.path.relpath(path)}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def corpora(directory):
    """The training texts.  A row is {"text"} or, for traces, {"problem", "completion"}."""
    makers = [("lm", 60_000, lm_text), ("math", 40_000, math_text), ("distill", 40_000, distill_text),
              ("answer", 40_000, lambda rng: traced(draw(rng, test=False))), ("refuse", 40_000, refuse_text)]
    for seed, (name, count, make) in enumerate(makers, start=10):
        rng = random.Random(seed)
        rows = [make(rng) for _ in range(count)]
        write_jsonl(directory / f"{name}.jsonl", [r if isinstance(r, dict) else {"text": r} for r in rows])


# ----------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE with Qwen's splitting of words and single digits, in Hugging Face's files
# ----------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
                 "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
                 "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")


def tokenizer(directory, vocab_size=768):
    """tokenizer.json, tokenizer_config.json, generation_config.json: every byte can be written, words are short."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    rng = random.Random(1)
    texts = [math_text(rng) for _ in range(4000)] + [drill(rng) for _ in range(500)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator(texts, trainer)
    tok.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>")])
    directory.mkdir(parents=True, exist_ok=True)
    tok.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
         "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": tok.token_to_id("<|end|>"), "temperature": 0.6, "top_p": 0.95, "do_sample": True}, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(
        {"model_type": "qwen2", "hidden_act": "silu", "vocab_size": tok.get_vocab_size(), "hidden_size": 128,
         "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
         "eos_token_id": tok.token_to_id("<|end|>"), "torch_dtype": "float32"}, indent=2) + "\n")
    print(f"{directory.relative_to(HERE.parent)}: {tok.get_vocab_size()} tokens")


# ----------------------------------------------------------------------------------------------------------
# The mixture of experts starts as the dense model, cut up (sparse upcycling, arXiv 2212.05055, as Qwen1.5-MoE was made)
# ----------------------------------------------------------------------------------------------------------

def upcycle(directory, experts=16, per_token=4, width=32):
    """data/tiny's source as a Qwen2-MoE: half of each MLP's units become the shared expert, the others the experts.

    Each expert is a slice of 32 units, each slice is given to four experts; routers are random.  All of it has to
    be trained on, which finds out who does what.
    """
    import torch
    sys.path.insert(0, str(HERE.parent))
    from model import Config, Transformer, init_weights, load_model, save_model
    dense = load_model(f"{HERE}/tiny/distill+{HERE}/tiny/rl")
    shared = dense.config.intermediate_size - per_token * width
    sizes = dict(num_experts=experts, num_experts_per_tok=per_token, moe_intermediate_size=width,
                 shared_expert_intermediate_size=shared)
    model = init_weights(Transformer(Config(**vars(dense.config) | sizes)), seed=3).requires_grad_(False)
    model.load_state_dict({n: p for n, p in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    for block, old in zip(model.model.layers, dense.model.layers):
        gate, up, down = (getattr(old.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))     # (M,D) x 2, (D,M)
        block.mlp.shared_expert.gate_proj.weight.copy_(gate[:shared])
        block.mlp.shared_expert.up_proj.weight.copy_(up[:shared])
        block.mlp.shared_expert.down_proj.weight.copy_(2 * down[:, :shared])       # its gate starts at a half
        for e in range(experts):
            units = slice(shared + e % per_token * width, shared + (e % per_token + 1) * width)
            block.mlp.experts.gate_up_proj[e].copy_(torch.cat([gate[units], up[units]]))
            block.mlp.experts.down_proj[e].copy_(experts / per_token * down[:, units])
    model.source = dense.source
    save_model(model, directory)


# ----------------------------------------------------------------------------------------------------------
# Downloads: resumed, bounded, verified
# ----------------------------------------------------------------------------------------------------------

CACHE = HERE / "cache"
TIMEOUT = 30                # seconds without a byte after which a connection counts as dead
PAUSES = [1, 5, 20]         # seconds before the next try
LIMIT = 1 << 30             # bytes of one file; no set here is near it


def connect(url, start=0, token=None):
    """The answer to a request for url from byte `start` on.

    RESA_MIRROR=http://host:port names a server that has copies of all these sites, under /SITE/PATH.
    """
    mirror = os.environ.get("RESA_MIRROR")
    request = urllib.request.Request(url.replace("https:/", mirror.rstrip("/"), 1) if mirror else url)
    request.add_header("User-Agent", "resa")
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token:               # unredirected: where the hub sends us next must not see it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def persist(url, attempt):
    """attempt(), tried again while a server is busy or a connection breaks; OSError names the address."""
    for pause in [*PAUSES, None]:
        try:
            return attempt()
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)
            hopeless = code != 429 and code < 500 if code else isinstance(error, urllib.error.URLError)
            if pause is None or hopeless:
                reason = str(error if code else getattr(error, "reason", error)) or type(error).__name__
                raise OSError(f"{url}: {reason}") from None
            asked = error.headers.get("Retry-After", "") if code else ""
        time.sleep(min(300, int(asked)) if asked.isdigit() else pause)


def pull(url, part, limit, token):
    """Appends to the file `part` what it lacks of url.  OSError: it ended early; ValueError: it is too long."""
    start = part.stat().st_size if part.exists() else 0
    try:
        response = connect(url, start, token)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()
        raise OSError("the partial file was not a part of it") from None
    with response:
        start = start if response.status == 206 else 0               # 200: this server sends all of it again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with open(part, "ab" if start else "wb") as file, tqdm(
                desc=url.split("/")[-1], total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read1(1 << 16):
                file.write(block)
                bar.update(len(block))
                if file.tell() > limit:
                    raise ValueError(f"{url}: refused, it is longer than {limit:,} bytes")
    if total is not None and part.stat().st_size < total:
        raise OSError(f"it ended after {part.stat().st_size:,} of {total:,} bytes")


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url, path, sha256=None, limit=LIMIT, token=None):
    """url -> path, by way of a partial file that a later run continues.

    OSError: it could not be had.  ValueError: too long, or not the bytes that sha256 names; nothing of it is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    try:
        persist(url, lambda: pull(url, part, limit, token))
        found = sha256_of(part)
        if sha256 not in (None, found):
            raise ValueError(f"{url}: refused, its sha256 is {found} and not {sha256}")
    except ValueError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def get_json(url, limit=1 << 26):
    def attempt():
        with connect(url) as response:
            return response.read(limit + 1)
    text = persist(url, attempt)
    try:
        return json.loads(text) if len(text) <= limit else None
    except (ValueError, RecursionError):
        raise ValueError(f"{url}: the answer is not JSON") from None


# ----------------------------------------------------------------------------------------------------------
# Benchmarks: bytes pinned by commit and sha256
# ----------------------------------------------------------------------------------------------------------

HUB, GITHUB = "https://huggingface.co/datasets/", "https://raw.githubusercontent.com/"
QWEN = GITHUB + "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/"
LIMO = GITHUB + "GAIR-NLP/LIMO/2284c6a0e6653aa8894bd12fdecc1212ba706c3a/eval/data/"
LIMR = GITHUB + "GAIR-NLP/LIMR/98ebf1bd54cc4539a9ac2332327ab0200bc2a88f/eval/data/"

# Addresses in the order they are tried.  Copies agree in the answers, not in every blank of the text: summary.json
# names the address that was used.
SOURCES = {
    "aime24": {
        QWEN + "aime24/test.jsonl": "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
        LIMO + "aime/test.jsonl": "a0f7eb9915f60f70fdaa9375414869d101eab639a67acf652cde98166efcd1cc"},
    "aime25": {
        HUB + "math-ai/aime25/resolve/563bb8404243c5f09de6ec262f2db674fe5bce9b/test.jsonl":
            "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331",
        GITHUB + "shin-ee-chen/self_correction_llms/4ae57a99649f03dd51d34a6d8da7a18b0621f911/data/aime25/test.jsonl":
            "255376c69071d130f9a3b022f9661ada2a80f6b72ab499582c9e08bdfd376a7d"},
    "amc23": {
        QWEN + "amc23/test.jsonl": "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4",
        LIMR + "amc23.jsonl": "473016f0ccf2fa9c9e3958628e6169233dfedccfec6e767d8e6fde9c75722548"},
    "math500": {
        HUB + "HuggingFaceH4/MATH-500/resolve/6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be/test.jsonl":
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        GITHUB + "hkust-nlp/simpleRL-reason/cf1c7858bfc145a27aa733e75d930d34f0d318a6/"
                 "examples/simplelr_math_eval/data/math500/test.jsonl":
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"},
    "minerva": {
        QWEN + "minerva_math/test.jsonl": "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2",
        LIMO + "minerva/test.jsonl": "e04ec2bc1d8f80a0091b4b1989f1ffb366f3583f5bae381546a066d4ccc26e3d"},
    "gpqa": {       # its authors ask that it is not spread: only from them, with the user's own access
        HUB + "Idavidrein/gpqa/resolve/633f5ee89ab8ad4522a9f850766b73f62147ffdd/gpqa_diamond.csv":
            "41d1213cd7a4998605a26c2798500652572007161b3a92817ba46b35befcd305"},
    "olympiadbench": {
        QWEN + "olympiadbench/test.jsonl": "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416",
        LIMO + "olympiadbench/test.jsonl": "8016961fd178845f84b0b6c03afb2c9c8638f7e0b692142608970e5c9faaad2f"},
}


def benchmark(name):
    """A published benchmark -> (rows of id, problem and answer, the address its bytes belong to).

    It is fetched once.  OSError: no source gave it, or GPQA without access.  ValueError: other bytes than pinned.
    """
    path = CACHE / (f"{name}.csv" if name == "gpqa" else f"{name}.jsonl")
    if not path.exists():
        fetch_benchmark(name, path)
    found = sha256_of(path)
    url = next((url for url, sha256 in SOURCES[name].items() if sha256 == found), None)
    if url is None:
        raise ValueError(f"{path}: its sha256 {found} is not a pinned one; delete the file to have it fetched again")
    if name == "gpqa":
        return read_gpqa(path), url
    lines = path.read_text(encoding="utf-8").split("\n")
    return [as_problem(name, i, json.loads(line)) for i, line in enumerate(filter(str.strip, lines))], url


def fetch_benchmark(name, path):
    """Tries the sources in turn; each that fails is named."""
    token, failed, hint = None, [], ""
    if name == "gpqa":
        token, hint = hub_token(), "GPQA needs your own access: agree to its terms there, then set HF_TOKEN.  "
    for url, sha256 in SOURCES[name].items():
        try:
            download(url, path, sha256, limit=1 << 24, token=token)
            break
        except (OSError, ValueError) as error:
            failed.append(str(error))
    else:
        url, sha256 = next(iter(SOURCES[name].items()))
        raise OSError(f"{name}: no source gave it ({'; '.join(failed)}).  {hint}Without a network, put the file "
                      f"{url} (sha256 {sha256}) at {path}")
    for line in failed:
        print(f"{line}; the next source was used", file=sys.stderr)


def hub_token():
    """The user's Hugging Face token (HF_TOKEN, or a login), or None."""
    from huggingface_hub import get_token
    return get_token()


def as_problem(name, i, row):
    """Row i of a benchmark file, in any of its copies -> {"id", "problem", "answer"}."""
    number = row.get("id", row.get("idx", i))
    if "final_answer" in row:                            # OlympiadBench: a list of one
        answer = row["final_answer"][0].strip("$")
    else:                                                # Minerva: only in the solution
        answer = row["answer"] if "answer" in row else boxed(row["solution"])
    if name in ("aime24", "aime25", "amc23"):            # 025 and 27.0 are whole numbers
        answer = str(int(float(answer)))
    return {"id": row.get("unique_id", f"{name.replace('bench', '')}-{number}"),
            "problem": row.get("problem", row.get("question")), "answer": answer}


def boxed(solution):
    r"""The content of the last \boxed{} of a reference solution, whose braces are known to match."""
    start = end = solution.rindex(r"\boxed{") + len(r"\boxed{")
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        end += 1
    return solution[start:end - 1]


def read_gpqa(path):
    """GPQA's CSV -> rows of id, problem (with four options) and answer (a letter).  ValueError: another CSV.

    Resa: the published order of the options came from the random state of the whole evaluation; here they are sorted
    by a hash of question and option, which is the same on every machine and in every run.
    """
    columns, rows = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))], []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                question, options = row["Question"].strip(), [row[column].strip() for column in columns]
                order = sorted(range(4), key=lambda i: hashlib.sha256(f"{question}\n{options[i]}".encode()).digest())
                lines = [f"{letter}) {options[i]}" for letter, i in zip("ABCD", order)]
                rows.append({"id": row.get("Record ID", str(len(rows))), "answer": "ABCD"[order.index(0)],
                             "problem": "\n".join([question, "", *lines])})
    except (KeyError, AttributeError, csv.Error, UnicodeDecodeError):
        rows = []
    if not rows:
        raise ValueError(f"{path}: not a GPQA file, which has the columns Question, {', '.join(columns)}")
    return rows


# ----------------------------------------------------------------------------------------------------------
# Training sets
# ----------------------------------------------------------------------------------------------------------

# name -> (hub id of a set whose rows are asked for, or the address of a JSON file; rows, 0 where nobody says)
TRAINING = {
    "still": ("RUC-AIBOX/STILL-3-Preview-RL-Data", 0),
    "deepscaler": (HUB + "agentica-org/DeepScaleR-Preview-Dataset/resolve/b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29/"
                   "deepscaler.json", 40_315),
    "limr": ("GAIR/LIMR", 1_389),
    "open_rs": ("knoveleng/open-rs", 7_000),
    "open_s1": ("knoveleng/open-s1", 0),
}
SERVER = "https://datasets-server.huggingface.co/"


def training_set(name):
    """A training set by name -> the path of its JSONL of problem/answer, fetched on first use.

    The hub's row server has no versions, so the sha256 of what came is printed: note it with your results.
    """
    path, raw, (where, count) = CACHE / f"{name}.jsonl", CACHE / f"{name}.raw", TRAINING[name]
    if path.exists():
        return path
    read = json_rows if where.startswith("https:") else parquet_rows if find_spec("pyarrow") else paged_rows
    rows = read(where, raw)
    raw.unlink()
    if count not in (0, len(rows)):
        raise ValueError(f"{where}: {len(rows)} rows came and not {count}: it has changed; --data FILE takes your own")
    kept = [{"problem": ask, "answer": str(row["answer"])} for row in rows
            if (ask := row.get("problem") or row.get("question") or row.get("prompt"))
            and row.get("answer") not in (None, "")]
    write_jsonl(path, kept)
    print(f"{len(rows) - len(kept)} rows without problem or answer were left out; sha256 {sha256_of(path)}")
    return path


def json_rows(url, raw):
    """The rows of a JSON file, a list of objects."""
    download(url, raw)
    try:
        return [dict(row) for row in json.loads(raw.read_bytes())]
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{url}: not a JSON list of rows") from None


def paged_rows(repo, raw):
    """All rows of a hub set's training split, 100 a request, kept in a partial file, so that a later run goes on."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    part = raw.with_suffix(".part")
    with open(part, "a+b") as file, tqdm(desc=repo, unit="row", disable=None) as bar:
        file.seek(0)
        whole = file.read().rpartition(b"\n")[0]                     # a last line without its newline was cut off
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        file.truncate(len(whole) + 1 if whole else 0)
        while bar.total is None or len(rows) < bar.total:
            bar.update(len(rows) - bar.n)
            url = f"{SERVER}rows?dataset={quote(repo, '')}&config=default&split=train&offset={len(rows)}&length=100"
            bar.total, page = read_page(url, get_json(url))
            if not page and len(rows) < bar.total:
                raise ValueError(f"{url}: no rows, and there should be {bar.total}")
            file.write("".join(json.dumps(row) + "\n" for row in page).encode())
            file.flush()
            rows += page
    os.replace(part, raw)
    return rows


def read_page(url, answer):
    """One answer of the row server -> (number of rows in all, these rows); ValueError if any of it is cut short."""
    try:
        if answer.get("partial") or any(entry["truncated_cells"] for entry in answer["rows"]):
            raise ValueError(f"{url}: the server has cut these rows short; with pyarrow installed they come whole")
        return int(answer["num_rows_total"]), [dict(entry["row"]) for entry in answer["rows"]]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{url}: not an answer of the row server") from None


def parquet_rows(repo, raw):
    """The same from the hub's parquet copy, where pyarrow is installed: a file instead of hundreds of pages."""
    import pyarrow.parquet
    url, rows = f"{SERVER}parquet?dataset={quote(repo, '')}", []
    try:
        files = [(f["url"], f["config"], f["split"]) for f in get_json(url)["parquet_files"]]
    except (KeyError, TypeError):
        raise ValueError(f"{url}: not an answer of the row server") from None
    for address in [file[0] for file in files if file[1:] == ("default", "train")]:
        if not address.startswith(HUB + repo):
            raise ValueError(f"{url}: refused, it leads away from the set, to {address}")
        download(address, raw)
        rows += pyarrow.parquet.read_table(raw).to_pylist()
    return rows


def fetch(names):
    """`python data/prepare.py fetch NAME ...`; "all" stands for every benchmark."""
    for name in [n for name in names for n in (SOURCES if name == "all" else [name])]:
        if name in SOURCES:
            rows, url = benchmark(name)
            print(f"{name}: {len(rows)} problems of {url}")
        elif name in TRAINING:
            print(f"{name}: {training_set(name)}")
        else:
            raise ValueError(f"{name}: not one of {', '.join([*SOURCES, *TRAINING])}")


def main(argv):
    if argv == ["tiny"]:
        write_jsonl(HERE / "tiny" / "train.jsonl", questions(4000, test=False, seed=1))
        write_jsonl(HERE / "tiny" / "test.jsonl", questions(1000, test=True, seed=2))
        tokenizer(HERE / "tiny" / "init")
    elif argv == ["corpora"]:
        corpora(HERE.parent / "out" / "corpora")
    elif argv == ["upcycle"]:
        upcycle(HERE.parent / "out" / "build" / "upcycled")
    elif argv[:1] == ["fetch"] and argv[1:]:
        try:
            fetch(argv[1:])
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
