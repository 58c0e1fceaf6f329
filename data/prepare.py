"""Makes the embedded data set: questions, tokenizer and the training corpora of the tiny lineage.

    python data/prepare.py tiny              # data/tiny/{train,test}.jsonl and tokenizer files
    python data/prepare.py corpora           # out/corpora/{lm,math,distill}.jsonl (not kept in the repository)

A question is a short story with three numbers or four, from one of eight families, that takes two or three
steps of arithmetic.  Which side of the train/test split it falls on is decided by a hash of its family and its
numbers, so that a test question never occurs in training under any wording.  Everything is seeded.
"""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

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
    steps = work_out(FAMILIES[q["family"]][1], q["numbers"], slip)
    lines = "".join(equation(*s) + "\n" for s in steps)
    return {"problem": q["problem"], "completion": f"{lines}</think>\n{steps[-1][-1]}"}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"{path.relative_to(HERE.parent)}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def corpora(directory):
    """The three training texts.  A row is {"text"} or, for traces, {"problem", "completion"}."""
    for seed, (name, count, make) in enumerate((("lm", 60_000, lm_text), ("math", 40_000, math_text),
                                                ("distill", 40_000, distill_text)), start=10):
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


def main(argv):
    if argv == ["tiny"]:
        write_jsonl(HERE / "tiny" / "train.jsonl", questions(4000, test=False, seed=1))
        write_jsonl(HERE / "tiny" / "test.jsonl", questions(1000, test=True, seed=2))
        tokenizer(HERE / "tiny" / "init")
    elif argv == ["corpora"]:
        corpora(HERE.parent / "out" / "corpora")
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
