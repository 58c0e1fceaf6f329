"""What counts as a right answer: finding it in a completion, reading it, comparing it with the gold one."""

import math
import random
import re
from fractions import Fraction
from functools import lru_cache
from operator import add, mul, sub, truediv
from typing import NamedTuple

import numpy as np


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


def grade(gold, text):
    """Whether a completion ends in the gold answer."""
    return grade_resa(gold, text)[1]
