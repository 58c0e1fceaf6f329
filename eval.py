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
import random
import re
import shutil
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

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


# ----------------------------------------------------------------------------------------------------------
# Grader, 1: find the answer.  Completions are hostile input: what is looked at is bounded, nothing in it is ever run
# ----------------------------------------------------------------------------------------------------------

TAIL, NEAR = 100_000, 2_000      # characters looked at, from the end; and for a value that nothing points to
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
NUMBER = (r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|(?:[0-9]+ )?[0-9]+/[0-9]+|[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)"
          r"(?:\s?\\?%)?")
FORMULA = r"(?s:\$\$[^$]{1,500}\$\$|\\\[.{1,500}?\\\]|\\\(.{1,500}?\\\))|\$(?:\\.|[^$\\\n]){1,500}\$"
VALUE = re.compile(rf"{FORMULA}|(?<![\w.\\^]){NUMBER}")
SAID = re.compile(r"(?i)answer[ *]{0,4}(?:is\b|:)[\s*:]{0,6}(?=\S)")
LETTER = re.compile(r"(?:\\text ?\{)?\(?([A-H])\)?\}?")                # a gold answer to a multiple-choice question
CHOICE = re.compile(r"\(?([A-H])(?:[).:,]|\s+[A-Z][a-z]|$)")           # "B", "(B) 12 m", "B. Because", "B Blue"


def joined(gap):
    r"""Whether boxes with this text in between are one answer: \boxed{1}, \boxed{2} or \boxed{1} and \boxed{2}."""
    words = re.sub(r"[^A-Za-z.\n]+", " ", re.sub(r"\\[A-Za-z]+", "", gap[:100])).strip(" ")
    return len(gap) <= 60 and (not words or words.split()[-1:] in (["and"], ["or"]))


def last_box(text, joined=joined):
    r"""The last complete \boxed{}, with those joined to it; "" if boxes are open or empty; None without a box.

    One pass with a stack: searching forward from every \boxed{ is quadratic on ten thousand nested ones.
    """
    opened, found, seen = [], [], False                  # groups still open: where their box is, None for a plain {
    for token in re.finditer(r"\\{1,2}(?:boxed|fbox) ?\{|\\.|[{}]", text):
        if token[0] == "}":
            box = opened.pop() if opened else None
            if box and text[box[1]:token.start()].strip():
                found.append((*box, token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.span() if len(token[0]) > 1 else None)
            seen = seen or len(token[0]) > 1
    parts, start = [], None
    for box, inside, end in sorted(found, reverse=True):  # the last to open: of a box within a box, the inner
        if start is not None and not (end < start and joined(text[end + 1:start])):
            break
        start, parts = box, [text[inside:end].strip(), *parts]
    return ", ".join(dict.fromkeys(parts)) if parts else "" if seen else None


def phrase(said):
    """The answer in what was said to be it: a few words as they are, of a longer sentence the formula or number."""
    formula = re.match(FORMULA, said)
    line = re.split(r"\n|\.\s", said[formula.end():] if formula else said)[0]   # "... is 5. I hope it is correct"
    line = ((formula[0] if formula else "") + line).strip(" *")
    plain = re.sub(rf"{FORMULA}|\\[A-Za-z]+|\b(?:and|or)\b", " ", line)
    values = VALUE.findall(line) if len(re.findall("[A-Za-z]{2,}", plain)) > 2 else []
    return (values[0] if VALUE.match(line) else values[-1]) if values else line


def extract_answer(text, choice=False):
    r"""The final answer of a completion, or None.

    After the last </think>: the last complete \boxed{} (several as a list, if nothing but "and" or a comma is
    between them); else what follows the last "answer is" or "answer:"; else all of it if that is one short line, as
    the embedded models write; else the last formula or number.  Thinking or a box that never closed: no answer.
    choice: a letter is wanted, the first one in the box, or said, or that opens the text; else the last.
    """
    text = text.rpartition("</think>")[2]
    text = "" if "<think>" in text else text[-TAIL:].strip()
    box, said = last_box(text), [match.end() for match in SAID.finditer(text)]
    said = text[said[-1]:][:NEAR] if said else ""
    if choice and (box is None or re.match("[^-]", box)):
        letters = re.findall(r"(?<![\w'\\])[A-H](?![\w'^/+=]|\*\w)", box or said.split("\n")[0] or text[-NEAR:])
        return letters[-1 if not (box or said or CHOICE.match(text)) else 0] if letters else box
    if box is not None:
        return box or None
    if said or 0 < len(text) <= 40 and len(text.split()) <= 3 and "\n" not in text:
        return phrase(said) or None if said else text
    return (VALUE.findall(text[-NEAR:]) or [None])[-1]


# ----------------------------------------------------------------------------------------------------------
# Grader, 2: values.  An expression becomes a Fraction while it is rational, else complex numbers at K points, where
# it is compared without algebra.  sympy would be 30 times slower, and has to be kept from expanding 9^{9^9}
# ----------------------------------------------------------------------------------------------------------

K, REAL = 16, 8                  # 4 positive, 4 real, 8 integer points: n! and \lfloor n/2 \rfloor are about integers
BITS = 20_000                    # of a rational number; larger ones are not computed


class Node(NamedTuple):
    """What is not one value, by kind: "," list, "{}" set, "()" "[)" .. tuple or interval, "matrix N" of N columns,
    "unit" of a value, noted; "=" with difference, right side and, noted, a left side that is a name; "<" "≤" "≠"
    with difference."""
    kind: str
    parts: list
    note: str = ""


@lru_cache(maxsize=1000)
def symbol(name):
    """A variable's values at the points, the same for gold and answer -> (K,)."""
    rng = random.Random(name)
    real = [rng.uniform(0.3, 3) * (1 if k < REAL // 2 else rng.choice((-1, 1))) for k in range(REAL)]
    return np.array(real + [rng.randint(2, 12) for _ in range(K - REAL)], dtype=complex)


def exact(*values):
    """Whether all are rational.  ValueError if one is too large to go on with."""
    rational = all(isinstance(value, Fraction) for value in values)
    if rational and max(x.numerator.bit_length() + x.denominator.bit_length() for x in values) > BITS:
        raise ValueError("too large")
    return rational


def array(value):
    """A value at the points -> (K,).  ValueError for a tuple, a set, ...: there is no arithmetic on those."""
    if isinstance(value, Node):
        raise ValueError("not a number")
    return np.full(K, complex(value)) if exact(value) else value


def combine(operation, a, b):
    """operation(a, b), exact where both are rational; a matrix is multiplied by elements."""
    a, b = (b, a) if operation is mul and isinstance(b, Node) else (a, b)
    if isinstance(a, Node) and a.kind.startswith("matrix") and operation in (mul, truediv):
        return a._replace(parts=[combine(operation, x, b) for x in a.parts])
    return operation(a, b) if exact(a, b) else operation(array(a), array(b))


def minus(a):
    return combine(mul, a, Fraction(-1))


def defined(values, wrong):
    """values (K,), nan at real points that are wrong: sqrt(x) is compared where it is real, not by its branch cut."""
    return np.where(wrong & (np.arange(K) < REAL), np.nan, values)


def power(a, b):
    """a^b, exact for a rational a and a whole b; else the principal branch."""
    if exact(a, b) and b.denominator == 1:
        if max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b) > BITS:
            raise ValueError("too large")
        return a ** int(b)
    a, b = array(a), array(b)
    negative = (a.real < 0) & (abs(a.imag) <= 1e-12 * abs(a))
    return defined(a ** b, negative & (b != np.round(b.real)))


def logarithm(x):
    """ln x, for real points of positive x only: there ln(ab) = ln a + ln b."""
    return defined(np.log(x), (x.real < 0) & (x.imag == 0))


def floor(x):
    """The whole part, at integer points only; 1e-9 as log_2 8 may be 2.9999999999999996."""
    return Fraction(math.floor(x)) if exact(x) else defined(np.floor(array(x).real + 1e-9) + 0j, True)


def factorial(x):
    """x!, nan where that is not a whole number from 0 to 170 (an exact one: to 1500)."""
    if exact(x) and x.denominator == 1 and 0 <= x <= 1500:
        return Fraction(math.factorial(int(x)))
    one = lambda v: math.factorial(int(v)) if 0 <= v <= 170 and v == int(v) else math.nan
    return np.array([complex(one(v)) for v in array(x).real])


def binomial(n, k):
    below = combine(mul, factorial(k), factorial(combine(sub, n, k)))
    return combine(truediv, factorial(n), below)


FUNCTIONS = {"sin": np.sin, "cos": np.cos, "tan": np.tan, "cot": lambda x: 1 / np.tan(x),
             "sec": lambda x: 1 / np.cos(x), "csc": lambda x: 1 / np.sin(x), "arcsin": np.arcsin, "arccos": np.arccos,
             "arctan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "exp": np.exp, "ln": logarithm,
             "log": logarithm, "lg": lambda x: logarithm(x) / math.log(10)}
FUNCTIONS |= {"a" + name: FUNCTIONS["arc" + name] for name in ("sin", "cos", "tan")}
CONSTANTS = {"π": np.full(K, np.pi + 0j), "e": np.full(K, np.e + 0j), "i": np.full(K, 1j)}


# ----------------------------------------------------------------------------------------------------------
# Grader, 3: a reader of LaTeX and plain mathematics, by recursive descent, that computes as it reads
# ----------------------------------------------------------------------------------------------------------

LONG, TOKENS, DEPTH, STEPS = 1000, 500, 30, 5000        # beyond any of them an answer is only a string
PLAIN = str.maketrans("−–×·⋅÷′\u00a0", "--***/' ", "€£") | {ord("²"): "^2", ord("³"): "^3", ord("√"): r"\sqrt "}
COMMANDS = {name: spelling for spelling, names in {
    "": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle limits boxed fbox", " ": "quad qquad",
    "*": "cdot times", "/": "div", "=": "equiv", "<": "lt", ">": "gt", "≤": "le leq leqslant", "≥": "ge geq geqslant",
    "≠": "ne neq", "≈": "approx simeq", "∈": "in", "∪": "cup", "±": "pm", "∓": "mp", "∞": "infty", "π": "pi",
    "°": "circ degree", r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom"}.items() for name in names.split()}
REWRITE = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\\(?=[A-Za-z{}%|](?![\s\S]*\\end))", r"\\"),             # escaped twice, as in JSON; not a row of a matrix
    (r"\{, ?\}|,\s*\\!\s*", ","), (r"(?<!\\)\\ |~", " "), (r"(?<!\\)\\[,;:!()\[\]]|\\?\$", ""), (r"\\%", "%"),
    (r"\*\*", "^"), ("<=", "≤"), (">=", "≥"), ("!=", "≠"), (r"(\\begin\{array\}) ?\{[clr| ]*\}", r"\1"),
    (r"\\(?:vec|hat|bar|d?dot|tilde|overline|mathbb|mathcal)(?: ?\{([A-Za-z])\}| ([A-Za-z]))", r"\1\2'"),
    (r"\bnp\.", ""), (r"(?<![\\A-Za-z])pi\b", "π"), (r"(?<![\\A-Za-z])inf(?:ty|inity)?\b", "∞")]]
WORDS = re.compile(r"([0-9A-Za-z)}!\]π]?)\s*"
                   r"\\(?:(?:text|math)(?:rm|bf|it|sf)?|mbox|operatorname|rm)\*? ?\{([^{}]*)\}")
TOKEN = re.compile(rf"\\unit\{{[^{{}}]*\}}|\\(?:begin|end)\{{[a-z]+\*?\}}|{DECIMAL}|\\[A-Za-z]+|\\\S|[A-Za-z]+|\S")
FACTOR = re.compile(r"[A-Za-z([{|π∞]|\\(?!unit|end|rfloor|rceil|cap|setminus|to|[^A-Za-z])")
UNITS = {name: (kind, Fraction(size)) for kind, names in {
    "share": "% .01 percent .01 percentage .01 pct .01", "angle": "° 1 degree 1", "money": "cent .01 dollar 1",
    "length": "mm .001 millimeter .001 cm .01 centimeter .01 m 1 meter 1 metre 1 km 1000 kilometer 1000 inch .0254 "
              "foot .3048 feet .3048 ft .3048 mile 1609.344", "mass": "mg .001 g 1 gram 1 kg 1000 kilogram 1000",
    "time": "s 1 sec 1 second 1 min 60 minute 60 hr 3600 hour 3600 day 86400 week 604800",
}.items() for name, size in zip(names.split()[::2], names.split()[1::2])}


def unit(text):
    """(kind, size) of a unit such as "cm^2", "square feet" or "%", and of the base in 132_7; None if unknown."""
    if text[0] == "_":
        return text.strip("_{}"), Fraction(1)
    match = re.match(r"(square|sq)?(cubic)?(.*?)(?:\^?([1-3]))?$", re.sub(r"[{} ]|\\unit", "", text.lower()))
    name = next((name for name in (match[3], match[3][:-1], match[3][:-2]) if name in UNITS), None)       # inch(es)
    n = 2 if match[1] else 3 if match[2] else int(match[4] or 1)
    return (f"{UNITS[name][0]}{n}", UNITS[name][1] ** n) if name else None


def words(match):
    r"""\text{cm} after a value becomes \unit{cm}, other text its words."""
    before, word = match[1], match[2].strip(" ~")
    if before and re.fullmatch(r"[A-Za-z][A-Za-z /.^0-9]+|[mgs]", word) and word not in {"and", "or", *FUNCTIONS}:
        return rf"{before} \unit{{{word}}}"
    return f"{before} {word} "


def normalise(answer):
    r"""One spelling for what differs in type-setting only: $, \left, \text{}, \dfrac, \leq, ** and the like."""
    s = answer.strip()
    if len(s) > LONG:
        return s
    for pattern, new in REWRITE:
        s = pattern.sub(new, s)
    s = re.sub(r"\b(?:and|or)\b", ",", WORDS.sub(words, s.translate(PLAIN)))
    s = re.sub(r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1], m[0]), s)
    return " ".join(re.sub(r"\^ ?\{? ?° ?\}?", "°", s).split()).strip("*: ").rstrip(".,;: ")


def both_signs(s):
    """A list or set with every item that has ± in it twice: 1±2, 5 is 1+2, 1-2, 5."""
    s, depth, items = s[2:-2] if s.startswith(r"\{") and s.endswith(r"\}") else s, 0, [""]
    for c in s:
        depth += (c in "([{") - (c in ")]}")
        items += [""] if c in ",;" and depth == 0 else []
        items[-1] += c
    signs = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
    return ",".join(",".join(dict.fromkeys(item.translate(sign) for sign in signs)) for item in items)


class Reader:
    """Reads one normalised answer.  ValueError or ArithmeticError: it is not mathematics, or too large."""

    def __init__(self, text):
        self.tokens, self.i, self.depth, self.steps, self.angle, self.bars = [], 0, 0, 0, 0, 0
        self.names = []                                  # of the variables met so far
        for token in TOKEN.findall(text):
            last = self.tokens[-1][-1] if self.tokens else ""
            if not token.isalpha() or len(token) == 1:
                self.tokens.append(token)
            elif token == "sqrt" or token in FUNCTIONS and token not in UNITS:
                self.tokens.append("\\" + token)
            elif last and (last in "0123456789)}]!." and len(token) > 3 or last.isalnum() and unit(token)):
                self.tokens.append(rf"\unit{{{token}}}")
            else:
                self.tokens += [token.casefold()] if len(token) > 3 else token      # a word, or a product of letters
        if len(self.tokens) > TOKENS:
            raise ValueError("too long")

    @property
    def next(self):
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *wanted):
        """The next token if it is one of these, which is then read; else ""."""
        token = self.next if self.next in wanted else ""
        self.i += bool(token)
        return token

    def closed(self, token, value):
        """value, once the token that closes it is read."""
        if not self.take(token):
            raise ValueError(f"no {token}")
        return value

    def raw(self):
        """The next token or {group} as text, without braces."""
        start, depth = self.i, 0
        while True:
            depth += (self.next == "{") - (self.next == "}")
            self.i += 1
            if depth <= 0 or self.i >= len(self.tokens):
                return re.sub("[{}]", "", "".join(self.tokens[start:self.i]))

    def enter(self, reading, *args):
        """reading(*args), one level down: all recursion goes through here."""
        self.depth, self.steps = self.depth + 1, self.steps + 1
        if self.depth > DEPTH or self.steps > STEPS:
            raise ValueError("too deep")
        value, self.depth = reading(*args), self.depth - 1
        return value

    def items(self, *closing):
        """What commas, semicolons or ∪ separate, up to a closing token -> list."""
        items = []
        while self.next not in closing:
            while self.take(",", ";", "∪"):
                pass                                     # "1, 2, and 3" has two in a row
            items.append(self.item())
            if self.next not in (",", ";", "∪", *closing):
                raise ValueError(f"unexpected {self.next!r}")
        return items

    def item(self):
        """An expression, or a chain of them: a = b, a < b ≤ c, x ∈ S."""
        mark, start = len(self.names), self.i
        sides, signs = [self.quantity()], []
        left, free = "".join(self.tokens[start:self.i]), len(self.names) > mark
        while self.next and self.next in "=<>≤≥≠≈∈":
            signs.append(self.raw())
            sides.append(self.quantity())
        return relation(sides, signs, left, free, set(self.names[mark:]))

    def quantity(self):
        """A sum with its unit; the base in 132_7 counts as one."""
        value, start = self.sum(), self.i
        if self.next in ("%", "°", "_") or self.next.startswith(r"\unit"):
            while self.next not in ("", r"\}", *",;∪)]}+-=<>≤≥≠≈∈"):
                self.raw()
        note = "".join(self.tokens[start:self.i])
        if re.search("[0-9]", re.sub(r"[A-Za-z^_]\{?-?[0-9]+", "", note)):
            raise ValueError("no unit")                  # 12 remainder 3
        return Node("unit", [value], note) if note else value

    def sum(self):
        total = None
        while total is None or self.next in ("+", "-"):
            sign = self.take("+", "-")
            value = minus(self.term()) if sign == "-" else self.term()
            total = value if total is None else combine(add, total, value)
        return total

    def term(self):
        value = self.factor()
        while True:
            if self.take("/", ":"):
                value = combine(truediv, value, self.factor())
            elif self.take("*") or self.continues():
                value = combine(mul, value, self.factor())
            else:
                return value

    def continues(self):
        """Whether another factor follows with no sign in between; a number after a number does not."""
        if re.match(DECIMAL, self.next):
            return not re.match(DECIMAL, self.tokens[self.i - 1])
        return FACTOR.match(self.next) and not (self.next == "|" and self.bars)

    def factor(self):
        """A base with what comes after it: powers, factorials, degrees (in sin 30°, and 90° - x)."""
        value = minus(self.enter(self.factor)) if self.take("-") else self.enter(self.base)
        inside = lambda: self.angle or self.tokens[self.i + 1:self.i + 2] in (["+"], ["-"])
        while self.next in ("^", "!") or self.next == "°" and inside():
            mark = self.take("^", "!", "°")
            value = (power(value, self.argument()) if mark == "^" else factorial(value) if mark == "!" else
                     combine(mul, value, CONSTANTS["π"] / 180) if self.angle else value)
        return value

    def argument(self, digits=None):
        r"""What a command or ^ applies to: a {group}, a number, a base; of \frac12 one digit."""
        if digits and re.fullmatch("[0-9]{2,}", self.next):
            self.tokens[self.i:self.i + 1] = [self.next[:digits], self.next[digits:]]
        if re.match(DECIMAL, self.next):
            return Fraction(self.raw())                  # not the whole of a mixed number: x^2\frac{1}{3}
        return minus(self.enter(self.argument)) if self.take("-") else self.enter(self.base)

    def base(self):
        token, self.i = self.next, self.i + 1
        if re.match(DECIMAL, token):
            return self.number(token)
        if token in ("(", "[", "{", r"\{"):
            return self.group(token)
        if token == "|":
            self.bars += 1
            value, self.bars = self.sum(), self.bars - 1
            return self.closed("|", abs(value) if exact(value) else abs(array(value)) + 0j)
        if token == r"\lfloor":
            return self.closed(r"\rfloor", floor(self.sum()))
        if token == r"\lceil":
            return self.closed(r"\rceil", minus(floor(minus(self.sum()))))
        if token == r"\frac":
            return combine(truediv, self.argument(1), self.argument(1))
        if token == r"\binom":
            return binomial(self.argument(1), self.argument(1))
        if token == r"\sqrt":
            index = self.closed("]", self.sum()) if self.take("[") else Fraction(2)
            return power(self.argument(), combine(truediv, Fraction(1), index))
        if token.startswith(r"\begin"):
            return self.matrix(token)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        return CONSTANTS[token] if token in CONSTANTS else self.variable(token)

    def number(self, token):
        r"""A literal, or a mixed number: 2 1/2, 2\frac{1}{2}."""
        value, mixed = Fraction(token), self.tokens[self.i:self.i + 3]
        if token.isdecimal() and re.fullmatch("[0-9]+ / [0-9]+", " ".join(mixed)):
            self.i += 3
            return value + Fraction(int(mixed[0]), int(mixed[2]))
        if not token.isdecimal() or not self.take(r"\frac"):
            return value
        a, b = self.argument(1), self.argument(1)
        whole = exact(a, b) and a.denominator == b.denominator == 1 and a >= 0
        return combine(add if whole else mul, value, combine(truediv, a, b))

    def group(self, opening):
        """A tuple, an interval, a set, or one value in parentheses."""
        items = self.items(")", "]", "}", r"\}")
        closing = self.take(")", "]", "}", r"\}")
        if not items or (opening + closing) not in ("()", "[]", "(]", "[)", "{}", r"\{\}"):
            raise ValueError("brackets do not match")
        if len(items) == 1 and opening + closing in ("()", "[]", "{}"):
            return items[0]
        return Node("," if opening == "{" else opening[-1] + closing[-1], items)

    def matrix(self, begin):
        rows = [[]]
        while not self.next.startswith(r"\end"):
            if self.take(r"\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.enter(self.sum))
        self.i += 1
        rows, kind = [row for row in rows if row], re.fullmatch(r"\\begin\{(array|([pbB]|small)?matrix)\}", begin)
        if not kind or len({len(row) for row in rows}) != 1:
            raise ValueError("not a matrix")
        return Node(f"matrix {len(rows[0])}", sum(rows, []))

    def function(self, name):
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x."""
        marks = {}
        while self.next in ("_", "^"):
            mark = self.take("_", "^")
            marks[mark] = self.argument()
        self.angle += 1
        bracket = self.next in ("(", "{", "[")
        x = self.enter(self.base if bracket else self.factor)
        while not bracket and self.continues() and self.next != "(" and self.next[1:] not in FUNCTIONS:
            x = combine(mul, x, self.factor())
        self.angle -= 1
        inverse = marks.get("^") == -1 and "arc" + name in FUNCTIONS
        value = FUNCTIONS["arc" + name if inverse else name](array(x))
        value = value / logarithm(array(marks["_"])) if "_" in marks else value
        return power(value, marks["^"]) if "^" in marks and not inverse else value

    def variable(self, name):
        """A letter or command with its subscripts and primes; f(2), a letter at a number, is a variable as well."""
        if not re.fullmatch(r"\\?[A-Za-z]+|∞", name):
            raise ValueError(f"unexpected {name!r}")
        while self.next in ("_", "'"):
            name += self.take("_") + self.raw()
        if re.fullmatch(r"\( [0-9]+ \)", " ".join(self.tokens[self.i:self.i + 3])):
            name, self.i = name + self.tokens[self.i + 1], self.i + 3
        self.names.append(name.removeprefix("\\"))
        return symbol(self.names[-1])


def relation(sides, signs, left, free, names):
    """Value or Node of a chain of expressions.  left: the first, as text; free: has it variables; names: of all."""
    if "≈" in signs:                                     # 1/3 ≈ 0.33
        sides, signs = sides[:signs.index("≈") + 1], signs[:signs.index("≈")]
    if not signs:
        return sides[0]
    rest = re.sub(r"_(\{[^{}]*\}|.)|\([^()+*/^=-]*\)", "", left)          # x_1, f(2), (x,y), |AB|, \lim .. are names
    named = re.match(r"\\(lim|sum|int|prod)", left) or not re.search(r"[0-9+*^<>-]|\\(sin|cos|tan|log|ln|sqrt)", rest)
    if set(signs) <= {"=", "∈"} and (named and "∈" in signs or not free):
        return sides[-1]
    if set(signs) == {"="}:
        tuples = isinstance(sides[0], Node) or isinstance(sides[-1], Node)
        difference = None if tuples else combine(sub, sides[0], sides[-1])
        return Node("=", [difference, sides[-1]], left if named else "")
    links = []
    for a, sign, b in zip(sides, signs, sides[1:]):
        a, b, kind = (b, a, "<≤"[">≥".index(sign)]) if sign in ">≥" else (a, b, sign)
        links.append(Node(kind, [combine(sub, a, b)]))
    return as_interval(links, names) or (Node("{}", links) if len(links) > 1 else links[0])


def as_interval(links, names):
    """The interval that linear inequalities in one variable describe, or None."""
    ends, brackets = [minus(symbol("∞")), symbol("∞")], ["(", ")"]
    for kind, (g,), _ in links:
        x, g = symbol(min(names, default="")), array(g)
        slope = (g[1] - g[0]) / (x[1] - x[0])
        linear = abs(slope) > 1e-9 and np.allclose(g, g[0] + slope * (x - x[0]))
        if kind not in ("<", "≤") or len(names) != 1 or not linear:
            return None
        side = int(slope.real > 0)
        ends[side], brackets[side] = np.full(K, x[0] - g[0] / slope), ("()" if kind == "<" else "[]")[side]
    return Node("".join(brackets), ends)


# ----------------------------------------------------------------------------------------------------------
# Grader, 4: compare what was read, and grade
# ----------------------------------------------------------------------------------------------------------

INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3}| [0-9]{3})+(?![0-9]|\s*[,;])")
RANK = {"=": 4, ",": 3, "{}": 3, "unit": 2, "": 0}


def places(x):
    """The decimals of a rational number, inf for 1/3 or one that is not rational."""
    return next((k for k in range(40) if 10**k % x.denominator == 0), math.inf) if exact(x) else math.inf


def equal(a, b):
    """Two values: exactly, if rational; at all points where both are defined; a decimal fraction to 6 places."""
    p, q = places(a), places(b)
    if exact(a, b) and (a == b or p == q or min(p, q) == 0):
        return a == b
    x, y = array(a), array(b)
    gap, size = abs(x - y), np.maximum(abs(x), abs(y))
    near = gap <= 1e-9 * size
    if min(p, q) > 0 and p != q:                         # 1/3 and 0.333333; never 13 and 13.0000001
        near |= (gap <= 1e-6) & (gap <= 1e-4 * size)
    if 0 in [v for v in (a, b) if exact(v)] and 0 in size:   # sin^2 x + cos^2 x - 1, but not 1e-19 x
        near |= size <= 1e-12
    known = np.isfinite(gap)
    return bool(known.sum() > 2 and near[known].all())


def proportional(a, b, positive):
    """Whether a = 0 and b = 0 (a < 0 and b < 0, if positive) say the same: their ratio is constant."""
    if a is None or b is None:                           # (x,y) = (1,2) has no difference
        return False
    ratio = array(a) / array(b)
    ratio = ratio[np.isfinite(ratio)]
    return len(ratio) > 2 and np.allclose(ratio, ratio[0], rtol=1e-9, atol=0) and (ratio[0].real > 0 or not positive)


def same(a, b):
    """Whether two answers that were read say the same.  Symmetric."""
    kind = lambda v: v.kind if isinstance(v, Node) else ""
    a, b = sorted((a, b), key=lambda v: RANK.get(kind(v), 1), reverse=True)
    if kind(a) == "":
        return equal(a, b)
    if a.kind == "=" and kind(b) != "=":                 # x = 5 and 5
        return a.note != "" and same(a.parts[1], b)
    if a.kind == "=" and a.note == b.note != "" and same(a.parts[1], b.parts[1]):
        return True
    if a.kind in ("=", "<", "≤", "≠"):
        return kind(b) == a.kind and proportional(a.parts[0], b.parts[0], a.kind in "<≤")
    if RANK.get(a.kind) == RANK.get(kind(b)) == 3:
        return matched(a.parts, b.parts)
    if RANK.get(a.kind) == 3:                            # {5} and 5; "1, 2" and (1, 2)
        return len(a.parts) == 1 and same(a.parts[0], b) or a.kind + kind(b) == ",()" and in_order(a.parts, b.parts)
    if a.kind == "unit":
        return same_quantity(a, b)
    return a.kind == kind(b) and in_order(a.parts, b.parts)


def in_order(first, second):
    return len(first) == len(second) and all(map(same, first, second))


def matched(first, second):
    """Equality of lists in any order; an item of one is used up by the first equal one of the other."""
    second = list(second)
    for a in first if len(first) == len(second) <= 64 else ():
        i = next((i for i, b in enumerate(second) if same(a, b)), None)
        if i is None:
            return False
        del second[i]
    return not second


def same_quantity(a, b):
    """Units: of one answer only, ignored (percent: or a hundredth); of both, converted if known."""
    ours, theirs = unit(a.note), unit(b.note) if isinstance(b, Node) and b.kind == "unit" else None
    scaled = ours and combine(mul, a.parts[0], ours[1])
    if ours and theirs:
        return ours[0] == theirs[0] and same(scaled, combine(mul, b.parts[0], theirs[1]))
    b = b.parts[0] if isinstance(b, Node) and b.kind == "unit" else b
    return same(a.parts[0], b) or bool(ours) and ours[0] == "share1" and same(scaled, b)


@lru_cache(maxsize=1000)
@np.errstate(all="ignore")
def readings(s):
    """What a normalised answer can mean -> list: nothing, one thing, or for 1,234 a number and a list."""
    found, number = [], THOUSANDS.match(s)
    for text in [re.sub("[, ]", "", number[0]) + s[number.end():], s] if number else [s]:
        try:
            items = Reader(both_signs(text) if re.search("[±∓]", text) else text).items("")
            found.append(items[0] if len(items) == 1 else Node("()" if number else ",", items))
        except (ValueError, ArithmeticError):
            pass                                         # not mathematics, or too large to compute: it stays a string
    return found


@np.errstate(all="ignore")
def same_answer(gold, answer):
    """Whether an extracted answer (or None) equals the gold one: as a string, a letter, or in value.  Symmetric."""
    if answer is None or INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return answer is not None and int(gold) == int(answer)
    gold, answer = normalise(gold), normalise(answer)
    squeezed = [re.sub(r"(?<![0-9]) | (?![0-9])", "", s) for s in (gold, answer)]          # "1 2" is not 12
    if squeezed[0] == squeezed[1] or gold.isalpha() and len(gold) > 2 and gold.casefold() == answer.casefold():
        return True
    for one, other in ((gold, answer), (answer, gold)):
        if LETTER.fullmatch(one) and CHOICE.match(other):
            return LETTER.fullmatch(one)[1] == CHOICE.match(other)[1]
    if not gold or not answer or max(len(gold), len(answer)) > LONG:
        return False
    try:
        return any(same(a, b) for a in readings(gold) for b in readings(answer))
    except (ValueError, ArithmeticError):                # 10^400 as a float; a unit of a set, and the like
        return False


def grade_resa(gold, text):
    """-> (the answer of a completion or None, whether it is right).  A gold that is a worked solution is cut down."""
    if r"\boxed" in gold or SAID.search(gold):
        gold = extract_answer(gold) or gold
    answer = extract_answer(text, choice=bool(LETTER.fullmatch(gold)))
    return answer, same_answer(gold, answer)


def grade_lighteval(gold, text):
    r"""The same as the published evaluation has it (lighteval @ ed084813), as far as it changes scores.

    Thinking is searched as well, ended or not; boxes near each other are one list; without a box the last value after
    "final answer is", "answer:", "answer", then anywhere, so that there nearly always is one; in multiple choice no
    boxes.  4e33 reads as 4*e*33; percent is a hundredth only; decimals are equal if they round to the same 5 places.
    """
    text, letter = text[-TAIL:], LETTER.fullmatch(gold)
    near = lambda gap: len(gap) < 10 or len(gap) < 70 and bool(re.search(r"and|or|,|;", gap))
    value = r"(?:^|(?<=[\s*]))[A-D](?=[*.,:\s]|$)" if letter else VALUE.pattern
    answer = None if letter else last_box(text, near)
    for before in (r"final answer is:?\s*", r"final answer.{0,100}?\sis:?\s*", "answer:.{0,50}?", "answer.{0,50}?",
                   ""):
        answer = answer or (re.findall(rf"(?i:{before})({value})", text) or [None])[-1]
    if letter:
        answer = answer or (re.findall("[A-D]", text) or [None])[-1]
        return answer, answer == letter[1]
    if not answer or len(answer) > LONG:
        return answer or None, False
    e_or_percent = re.compile(r"(?<=[0-9.])[eE](?=[+-]?[0-9])|\s*\\?%")
    old, new = [e_or_percent.sub(lambda m: "/100" if "%" in m[0] else " e ", s) for s in (gold, answer)]
    small = lambda v: not isinstance(v, Node) and (not exact(v) or abs(v) < 10**15)
    rounded = [{complex(np.round(array(v)[-1], 5)) for v in readings(normalise(s)) if small(v)} for s in (old, new)]
    return answer, same_answer(old, new) or "." in old + new and bool(rounded[0] & rounded[1])


def grade_math_verify(gold, text):
    """The same by the math-verify package.  ValueError where it is not installed."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        raise ValueError("--grader math-verify: the package is not installed; pip install math-verify") from None
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    answer = parse(text[-TAIL:], kinds)
    return str(answer[-1]) if answer else None, verify(parse(f"${gold}$", kinds), answer)


GRADERS = {"resa": grade_resa, "lighteval": grade_lighteval, "math-verify": grade_math_verify}


def grade(gold, text):
    """Whether a completion ends in the gold answer."""
    return grade_resa(gold, text)[1]


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
