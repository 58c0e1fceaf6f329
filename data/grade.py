r"""What counts as a right answer.  Three steps, a section each:

1. Find it.     The last \boxed{}, else what follows "the answer is", else the last number.
2. Read it.     One spelling for what differs in type-setting only, then a parser of LaTeX and plain
                mathematics that evaluates as it reads.
3. Compare it.  Numbers exactly, expressions by their values at fixed points of their variables,
                lists in any order, tuples in order; intervals, equations, quantities with units.

No algebra: sympy would be 30 times slower, and has to be kept from expanding 9^{9^9}.  Completions
are hostile input: length, nesting and numbers are bounded, and nothing in them is ever run.
"""

import math
import random
import re
import unicodedata
from collections import namedtuple
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import product
from operator import add, mul, sub, truediv

import numpy as np

def grade(gold, text):
    """Whether a completion ends in the gold answer, which may be the end of a worked solution."""
    return grade_answer(gold, text)[1]

def grade_answer(gold, text):
    """-> (the answer of a completion or None, whether it is right)."""
    if r"\boxed" in gold or ANSWER_IS.search(gold):             # a worked solution
        gold = extract_answer(gold) or gold
    answer = extract_answer(text, choice=bool(OPTION.fullmatch(gold)))
    return answer, same_answer(gold, answer)

def extract_answer(text, choice=False):
    r"""The final answer of a completion; None if there is none, or thinking or a box never closed.
    After the last </think>: the last complete \boxed{}; else what follows the last "answer is",
    "answer:" or <answer>; else all of it if that is one line of few words, as the embedded models
    write; else the last formula or number.  choice: a letter A to H is wanted."""
    text = END.split(text.rpartition("</think>")[2], maxsplit=1)[0]
    thinking, text = "<think>" in text, plain(text[-LONGEST_TEXT:]).strip()
    box = last_box(text)
    if thinking or box == "":
        return None
    said = ["", *ANSWER_IS.split(text)[1:]][-1][:NEAR]          # what follows the last one
    if choice and not (box or "").startswith("-"):
        letters = LETTER.findall(box or said.split("\n")[0] or text[-NEAR:])
        if not letters:
            return box
        return letters[0] if box or said or OPENS_WITH_OPTION.match(text) else letters[-1]
    answer = box or stated_answer(said)
    if not BLANK.fullmatch(answer):
        return answer
    values = VALUE.findall(text[-NEAR:])
    prose = re.search(r"\n|\.\s", text) or values and re.match("[A-Z][a-z]+,? ", text)      # So 5
    if 0 < len(text) <= LONGEST_ANSWER and not prose and (few_words(text) or text.count(" ") < 3):
        return None if BLANK.fullmatch(text) else stated_answer(text)
    return values[-1] if values else None

@np.errstate(all="ignore")
def same_answer(gold, answer):
    """Whether an extracted answer (or None) equals the gold one, as text or in value."""
    if answer is None:
        return False
    gold, answer = normalise(gold), normalise(answer)
    bare, other = SPACES.sub("", gold), SPACES.sub("", answer)
    word = bare.isalpha() and (len(bare) > 2 or bare.lower() == "no")     # West and west
    if bare == other or word and bare.lower() == other.lower():
        return True
    options = [OPTION.fullmatch(s) or OPENS_WITH_OPTION.match(s) for s in (gold, answer)]
    if all(options) and (OPTION.fullmatch(gold) or OPTION.fullmatch(answer)):   # B and (B) 12 m
        return options[0][1] == options[1][1]
    if max(len(gold), len(answer)) > LONGEST_ANSWER:
        return False
    try:
        return any(same(a, b) for a, b in product(readings(gold), readings(answer)))
    except NOT_MATHEMATICS:                                     # 10^400 as a float, 5% of a set
        return False

# ---- 1. Find it --------------------------------------------------------------------------------

LONGEST_TEXT = 100_000      # characters of a completion that are looked at, from its end
NEAR = 2_000                # the same, for a value that nothing points to
# What makes no difference in text: a space, though "1 2" is not 12; the \ of \no for \text{no}
SPACES = re.compile(r"(?<![0-9]) | (?![0-9])|(?<!\\)\\(?=[A-Za-z])")
DECIMAL = r"(?:[0-9]+(?:\.[0-9]+|\.(?![\\{]))?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"   # .5e-7
NUMBER = (r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?"                 # 1,234.5
          r"|(?:[0-9]+ )?[0-9]+/[0-9]+|[0-9]+(?::[0-9]+)+"              # 2/3  1 2/3  3:15
          r"|[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)(?:\s?\\?%)?")         # 12  .5  6e23  12 \%
FORMULA = (r"(?s:\$\$[^$]{1,500}\$\$|\\\[.{1,500}?\\\]"                 # $$x$$  \[x\]
           r"|\\\(.{1,500}?\\\))|\$(?:\\.|[^$\\\n]){1,500}\$")          # \(x\)  $x$
VALUE = re.compile(rf"{FORMULA}|(?<![A-Za-z0-9_.\\^])(?<![_^]\{{){NUMBER}")     # not the 7 of B7
ANSWER_IS = re.compile(             # **Answer**: ..  answer is equal to ..  <answer>..  答案: ..
    r"""(?i)(?:answers?[ *_"]{0,4}(?:is\b|are\b|:)|<(?:final_?)?answer>"""
    r"|答[案え]?[ *]{0,4}[是为為は:])(?:\*\*|__|\s?\})?(?:\s(?:equal to|indeed|just|therefore|thus"
    r"|then|hence|about|only|now|still|always|[a-z]+ly(?= [-$\\0-9])))?[\s,:]{0,6}(?=\S)")
END = re.compile(r"(?<=\S)\s*(?:<\|(?:endoftext|im_end|eot_id|end)\|>|<｜end▁of▁sentence｜>|</s>)")
TAG = re.compile(r"(?i)<(answer>)\s*</\1|<\|\S{1,40}?\|>|</\w{1,20}>"               # <|im_end|>
                 r"|<(?!answer|final)\w{3,20}>|<[sb]>")
WORD = re.compile(r"""(?<![^\s("'])[A-Za-z]{2,}(?![^\s.,;:!?)"'])|[\u3040-\u9fff]""")    # of prose
LONE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
LINE = re.compile(rf"(?:{FORMULA})?(?:(?!\.\s).)*")          # "5. I hope it is correct": 5
NO_WORD = re.compile(rf"{FORMULA}|\b(?:and|or)\b")
REASON = re.compile(r"[\s,;(—-]+(?:because|since)\b.*")
ASIDE = re.compile(r"(?<![+*/=<>^\s-])[\s,;(]+(?:as|so|which|therefore|due|given|not|but|using|with"
                   r"|obtained|found|based|meaning|rather|that is|i\.e|by(?! \d)|from|after|where"
                   r"|when|for)\b.*|\s\([a-z]{2,} .*")
OPTION = re.compile(r"(?:\\text ?\{)?\(?([A-H])\)?\}?")                 # B  (B)  \text{(B)}
OPENS_WITH_OPTION = re.compile(r"\(?([A-H])(?:[).:,]|\s+\\?[A-Z][a-z]|$)")      # (B) 12 m  B Blue
LETTER = re.compile(r"(?a)(?<![\w'\\])[A-H](?![\w'^/+=]|\*\w)")         # not in Blue, A's, \A, A+1
BRACE = re.compile(r"\\{1,2}(?:boxed|fbox) ?\{|\\.|[{}]")               # \boxed{  \{  {  }
BLANK = re.compile(r"(?:\\(?:[lc]?dots|text|boxed|q?quad|[ ,;:!])|[\s{}.?$~_])*")     # \boxed{..}

def plain(text):
    """Compatibility characters as their plain ones (NFKC), x² as x^{2}, no tags."""
    text = text if text.isascii() else re.sub(r"[^\x00-\x7f]+", plain_characters, text)
    return TAG.sub("\n", text) if "<" in text else text

def plain_characters(match):
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", match[0].translate(CHARACTERS))
    text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))   # 3½ is 3 1/2
    return unicodedata.normalize("NFKC", text).translate(CHARACTERS)

def last_box(text):
    r"""The last complete \boxed{}, the inner one if nested, with those that form a list with it; ""
    if a box is open; None without a box, empty ones aside.  One pass: nested ones cost no more."""
    opened, complete = [], []
    for token in BRACE.finditer(text):
        if "box" in token[0]:
            opened.append(token.span())
        elif token[0] == "{":
            opened.append(None)                                 # a group that is not a box
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box and not BLANK.fullmatch(text, box[1], min(token.start(), box[1] + 60)):
                complete.append((*box, token.start()))
    answers, following = [], None
    for start, inside, end in sorted(complete, reverse=True):   # from the last one to open
        if answers and not (end < following and joins(text[end + 1:following])):
            break
        answers.insert(0, text[inside:end].strip())
        following = start
    if answers:
        return ", ".join(dict.fromkeys(answers))
    return "" if any(opened) else None

def joins(gap):
    r"""Whether boxes with this between them are a list: \boxed{1}, \boxed{2} and \boxed{3}."""
    words = re.sub(r"\\[A-Za-z]+", "", gap[:100])               # \quad, \text
    words = re.sub(r"[^A-Za-z.\n]+", " ", words).strip(" ")     # a full stop or line end divides
    return len(gap) <= 60 and (words == "" or words.split()[-1:] in (["and"], ["or"]))

def few_words(text):    # of prose, beside formulas
    return len(WORD.findall(NO_WORD.sub(" ", text))) <= 2

def stated_answer(said):
    """The answer in what follows "answer is": what is in quotes; a few words as they are; of a
    sentence its formula or number, the first if the sentence opens with it, else the last."""
    line = LINE.match(said)[0].strip()
    if quoted := re.match(r"""(["'`_]+|\*+)(.+?)\1""", line):
        return quoted[2]
    line = REASON.sub("", line).strip(" *") or line
    line = line if WORD.match(line) else ASIDE.sub("", line)    # 5 by symmetry
    values = VALUE.findall(line)
    if not values or few_words(line) and not re.search("[\u3040-\u9fff]", line):
        return line
    return values[0] if VALUE.match(line) else values[-1]

# ---- 2. Read it: spelling and units ------------------------------------------------------------

LONGEST_ANSWER = 1000       # characters; a longer answer is only a string
CHARACTERS = str.maketrans("−–×·⋅∙÷⁄∶′“”‘’、⩽≦⩾≧º", """--****//:'""'',≤≤≥≥°""", "€£\u200b\ufeff") | {
    ord("√"): r"\sqrt ", ord("∅"): r"\emptyset ", ord("。"): ". "}     # €, £ are dropped
COMMANDS = {                # LaTeX command: what the parser knows it by
    "quad": " ", "qquad": " ", "cdot": "*", "times": "*", "div": "/", "equiv": "=", "lt": "<",
    "gt": ">", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈",
    "simeq": "≈", "in": "∈", "cup": "∪", "pm": "±", "mp": "∓", "infty": "∞", "infinity": "∞",
    "pi": "π", "circ": "°", "degree": "°", "lvert": "|", "rvert": "|", "vert": "|", "colon": ":",
    "varnothing": r"\{\}", "emptyset": r"\{\}", "lfloor": r"\floor(", "rfloor": ")",
    "lceil": r"(-\floor(-(", "rceil": ")))",                    # the negative of the floor of -x
    "pmod": r"\mod ", "bmod": r"\mod ", "cdots": r"\dots", "ldots": r"\dots"}
UNITS = {                   # kind: its units and their sizes
    "share": {"%": ".01", "percent": ".01", "percentage": ".01", "pct": ".01"}, "am": {"a.m": "1"},
    "angle": {"°": "1", "degree": "1"}, "money": {"cent": ".01", "dollar": "1"}, "pm": {"p.m": "1"},
    "length": {"mm": ".001", "millimeter": ".001", "cm": ".01", "centimeter": ".01", "m": "1",
               "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000", "inch": ".0254",
               "foot": ".3048", "feet": ".3048", "ft": ".3048", "mile": "1609.344"},
    "speed": {"mph": "1"}, "mass": {"g": "1", "gram": "1", "kg": "1000", "kilogram": "1000"},
    "time": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "hr": "3600",
             "hour": "3600", "day": "86400", "week": "604800"}}

def known_unit(text):
    """((kind, power), size) of cm^2, square feet, %, or the base in 132_7; None if not known."""
    if text[0] == "_":
        return ("base", text.strip("_{}")), Fraction(1)
    text = re.sub(r"[{} ]|\\unit", "", text.lower())
    prefix, name, exponent = re.match(r"(square|sq|cubic)?(.*?)(?:\^?([1-3]))?$", text).groups()
    power = {"square": 2, "sq": 2, "cubic": 3}.get(prefix) or int(exponent or 1)
    for singular in (name, name.removesuffix("s"), name.removesuffix("es")):    # meters, inches
        for kind, sizes in UNITS.items():
            if singular in sizes:
                return (kind, power), Fraction(sizes[singular]) ** power
    return None

def unit_or_words(match):
    r"""5 \text{cm} -> 5 \unit{cm}; else the words, marked as one label: \text{BAC} -> \BAC."""
    before, text = match[1], match[2].strip(" ~\"'`")
    unit = re.fullmatch(r"[A-Za-z][A-Za-z /.^0-9\\*]+|[mgsACJKLNTVW]", text)   # square feet, cm^2
    if before and unit and text not in WORDS:
        return rf"{before} \unit{{{text}}}"
    label = lambda word: word[0] if word[0] in {*WORDS, *COMMANDS} else "\\" + word[0]
    return f"{before} {LONE.sub(label, text)} "

def repeating(match):
    r"""0.1\overline{6}, 0.1\dot{6}, 0.1(6) and 0.1666... become (15/90)."""
    whole, once, period = match[1], match[2], re.sub(r"\\dot|[{} ]", "", match[match.lastindex])
    digits = int(whole + once + period) - int(whole + once or 0)
    return f"({digits}/{10 ** len(once) * (10 ** len(period) - 1)})"

REWRITES = [(mark, re.compile(pattern), new) for mark, pattern, new in [    # where `mark` occurs
    ("\\", r"(?<!\\)\\\\(?=[A-Za-z{}%|](?![\s\S]*\\end))", r"\\"),      # \\frac of JSON
    (",", r"\{, ?\}|,\s*\\!\s*", ","), ("~", "~", " "), ("\\ ", r"(?<!\\)\\ ", " "),      # 1{,}000
    ("$", r"\\?\$", ""), ("\\", r"(?<!\\)\\[,;:!()\[\]]", ""),  # $x$  \$5  \(x\)  5\,cm
    ("%", r"\\%", "%"), ("*", r"\*\*", "^"), ("=", "<=", "≤"), ("=", ">=", "≥"), ("=", "!=", "≠"),
    ("array", r"(\\begin\{array\}) ?\{[clr| ]*\}", r"\1"),      # \begin{array}{cc}
    (".", r"(?<![0-9])([0-9]*)\.([0-9]*?)(?:\\(?:overline|bar|dot) ?(\{?[0-9]+\}?(?:[0-9]*\\dot ?"
          r"\{?[0-9]\}?)?)|\(([0-9]+)\)|([0-9]{1,6}?)\5{2,}(?:\.\.\.|\\[lc]?dots))", repeating),
    ("\\", r"\\(?:vec|hat|bar|d?dot|tilde|overline|mathbb|mathcal)"
           r"(?: ?\{([A-Za-z])\}| ([A-Za-z]))", r"\1\2'"),         # \hat x is the variable x'
    ("np.", r"\bnp\.", ""), ("pi", r"(?<![\\A-Za-z])pi\b", "π"),
    ("\\", r"([0-9A-Za-z)}!\]π]?)\s*\\(?:(?:text|math)(?:rm|bf|it|sf|tt|sc|normal)?"
           r"|mbox|operatorname|rm)\*? ?\{([^{}]*)\}", unit_or_words),
    ("and", r"(, ?)?\band\b", ","), ("or", r"(, ?)?\bor\b", ","),      # 1, 2, and 3
    ("\\", r"\\(?:left|right|[bB]igg?[lr]?|(?:display|text|script)style|limits|boxed|fbox"
           r"|underline|emph|boldsymbol|bm|[lL]arge)(?![A-Za-z])|\\(?:text)?color ?\{[^{}]*\}", ""),
    ("\\", r"\\[cdt](frac|binom)(?![A-Za-z])", r"\\\1"), ("eqslant", "eqslant", "eq"),
    ("\\", r"\\([A-Za-z]+)", lambda match: COMMANDS.get(match[1], match[0])),
    ("mod", r"(?<![\\A-Za-z])mod\b", r"\\mod"),
    ("", r"(?i)(:[0-9]{2} ?|^[0-9]{1,2} )(?:\\unit\{)?([ap])\.?m\.?\}?[. ]*$", r"\1\\unit{\2.m}"),
    ("inf", r"(?<![\\A-Za-z])inf(?:ty|inity)?\b", "∞"), ("∞", "- ∞", "-∞"),
    ("≈", "(.)≈[^,;]*", r"\1"), ("°", r"\^ ?\{? ?° ?\}?", "°"),   # 90^{°}
    ("|", r"(?<!\\)\|([^|]*)\|", r"\\abs(\1)"),
    ("\\", r"(\\frac|\\binom) ?([0-9])", r"\1{\2}"),            # \frac12 takes a digit at a time
    ("\\", r"((?:\\frac|\\binom) ?\{[^{}]*\}) ?([0-9])", r"\1{\2}"),
    (" ", r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]| ?/))", ""),         # 71 204
    ("\\frac", r"(?<![0-9.^_])(?<!sqrt)(?<!sqrt )([0-9]+) ?"
               r"\\frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"(\1+\2/\3)"),
    ("/", r"(?<![0-9.^_])([0-9]+) ([0-9]+) ?/ ?([0-9]+)", r"(\1+\2/\3)")]]

def normalise(answer):
    r"""One spelling for what differs in type-setting only: $, \left, \text{}, \dfrac, ** .."""
    s = plain(answer).strip()
    if len(s) > LONGEST_ANSWER:
        return s
    while quoted := re.fullmatch(r"""(["'`*_]+)((?:(?!\1).)+)\1""", s):
        s = quoted[2].strip()
    for mark, pattern, new in REWRITES:
        if mark in s:
            s = pattern.sub(new, s)
    return " ".join(s.split()).strip("*#:, ").rstrip(".,;: \\")

# ---- 2. Read it: values, Fractions while rational, else complex (P,); and the parser -----------

P = 16                      # points: 4 positive, 4 of any sign, 8 larger ones, the last whole
REAL = np.arange(P) < 8     # there a value is nan if it would depend on the choice of a branch
LARGEST = 20_000            # bits of a rational number; a larger one is not computed

# What was read, if it is not one value.  The parts of each kind, and its note:
#   "," list, "{}" set, "()" "[)" .. tuple or interval, "matrix N" of N columns: the items
#   ":" ratio: its shares of the whole; "time" 3:15: hours, minutes ..; "∞" "-∞": none
#   "unit": [value]; its name.  "<" "≤" "≠": [left - right, scaled]
#   "=": [left - right, scaled; right]; the left side, if that is a name
Node = namedtuple("Node", "kind parts note", defaults=[""])

def kind(value):
    return value.kind if isinstance(value, Node) else ""

def rational(*values):
    return {*map(type, values)} == {Fraction}

@lru_cache(maxsize=1000)
def symbol(name):
    """A variable's values at the points, the same in every answer and process -> (P,)."""
    rng = random.Random(name)
    values = [rng.uniform(0.3, 3) for _ in range(8)] + [rng.uniform(2, 12) for _ in range(7)]
    signs = [*[1] * 4, *rng.choices((-1, 1), k=4), *[1] * 8]
    values = np.array([*values, rng.randint(2, 12)]) * signs
    whole = re.match("[jklmnN](?![A-Za-z])", name)              # n, k_1: integers by name
    return (np.copysign(np.ceil(abs(values)), values) if whole else values).astype(complex)

def at_points(value):
    """A value at the points -> (P,).  ValueError for a Node: there is no arithmetic on those."""
    if isinstance(value, Node):
        raise ValueError("not a number")
    return np.full(P, complex(value)) if rational(value) else value

def combine(operation, a, b):
    """operation(a, b), exact where both are rational; a matrix times a value by elements."""
    if operation is mul and isinstance(b, Node):
        a, b = b, a
    if kind(a).startswith("matrix") and operation in (mul, truediv):
        return a._replace(parts=[combine(operation, x, b) for x in a.parts])
    if not rational(a, b):
        return operation(at_points(a), at_points(b))
    value = operation(a, b)
    if value.numerator.bit_length() + value.denominator.bit_length() > LARGEST:
        raise ValueError("too large")
    return value

def power(a, b):
    """a^b, exact for a rational a and a whole b; else the principal branch."""
    if rational(a, b) and b.denominator == 1:
        if max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b) > LARGEST:
            raise ValueError("too large")
        return a ** int(b)
    a, b = at_points(a), at_points(b)
    negative = (a.real < 0) & (abs(a.imag) <= 1e-12 * abs(a))
    return np.where(REAL & negative & (b != np.round(b.real)), np.nan, a ** b)

def logarithm(x):       # at real points of a positive x only: there ln(ab) = ln a + ln b
    return np.where(REAL & (x.real < 0) & (x.imag == 0), np.nan, np.log(x))

def floor(x):
    return np.where(x.imag == 0, np.floor(x.real + 1e-9), np.nan)       # log_2 8 is 2.9999999999

def factorial(x, step=1):
    """x!, with steps of 2 x!!: exact to 1500; x! of an array to 170, by the gamma function."""
    if rational(x) and x.denominator == 1 and 0 <= x <= 1500:
        return Fraction(math.prod(range(int(x), 0, -step)))
    values = np.full(P, np.nan + 0j)
    for k, v in enumerate(at_points(x)):
        if v.imag == 0 and 0 <= v.real <= 170 and (step < 2 or v.real % 1 == 0):
            values[k] = math.gamma(v.real + 1) if step < 2 else math.prod(range(int(v.real), 0, -2))
    return values

FUNCTIONS = {               # of arrays (P,)
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh,
    "arcsin": np.arcsin, "arccos": np.arccos, "arctan": np.arctan, "asin": np.arcsin,
    "acos": np.arccos, "atan": np.arctan, "csc": lambda x: 1 / np.sin(x),
    "sec": lambda x: 1 / np.cos(x), "cot": lambda x: 1 / np.tan(x), "exp": np.exp,
    "ln": logarithm, "log": logarithm, "lg": np.log10, "abs": np.abs, "floor": floor}
CONSTANTS = {"π": np.full(P, np.pi + 0j), "e": np.full(P, np.e + 0j), "i": np.full(P, 1j),
             "∞": Node("∞", []), "-∞": Node("-∞", [])}          # a Node has no arithmetic
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}
SYMBOLS = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda
    mu nu xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi
    Sigma Upsilon Phi Psi Omega hbar ell""".split())            # the commands that are variables
WORDS, KNOWN = {"and", "or", *FUNCTIONS}, {"frac", "binom", "sqrt", *SYMBOLS, *FUNCTIONS}
NOT_MATHEMATICS = (ValueError, ArithmeticError, KeyError, RecursionError)   # too large, too deep
TOKEN = re.compile(rf"!+|-?∞|\\unit\{{[^{{}}]*\}}|\\(?:begin|end)\{{[a-z]+\*?\}}|{DECIMAL}"
                   r"|\\[A-Za-z]+|\\\S|[A-Za-z]+|\S")
DIGITS = tuple("0123456789.")
# What a factor without a * before it may begin with: x  (  \sqrt, but not \cap
FACTOR = re.compile(r"[A-Za-z([{π∞]|\\(?!(?:unit|end|cap|setminus|to)(?![A-Za-z])|[^A-Za-z])")
RELATIONS, SEPARATORS, CLOSERS = tuple("=<>≤≥≠∈"), (",", ";", "∪"), (")", "]", "}", r"\}")
KINDS = {"()": "()", "[]": "[]", "(]": "(]", "[)": "[)", "{}": ",", r"\{\}": "{}"}      # of Nodes

LABEL = re.compile("[A-Z]{2,}|[A-Z]([aeiou][a-z]|[a-z][aeiou])|i{2,3}|iv|vi{1,3}")
EDGES = ("", "=", "(", "[", r"\{", ")", "]", r"\}", *SEPARATORS)
APPLIED = re.compile(r"\\?\w+ \( [0-9]+ \)|[f-hF-HPQpq]['\w]* \( (\\?\w+ [),|]|[f-hF-HPQpq] \()")

def unknown(token):     # Is it a command without a meaning here: a symbol, with what belongs to it?
    return token[:1] == "\\" and token[1:].isalpha() and token[1:] not in KNOWN

def tokenize(text):
    """A normalised answer -> list of tokens."""
    tokens, found = [], TOKEN.findall(text)
    for token, following in zip(found, [*found[1:], ""]):
        if len(token) == 1 or not token.isalpha():
            tokens.append(token)
            continue
        last = tokens[-1] if tokens else ""
        value, word = last.endswith(tuple("0123456789)}]!.")), len(token) > 3
        name = token in KNOWN and (word or token not in SYMBOLS) and token != "sec"
        alone = last in EDGES and following in EDGES or unknown(last)
        alone &= last + following != "()" or len(token) > 2 or token in ("iv", "vi")
        if not name and (value and word or (value or last[-1:].isalpha()) and known_unit(token)):
            tokens.append(rf"\unit{{{token}}}")                 # 12 apples, 12 cm, x cm, 5 sec
        elif name or word or alone and LABEL.fullmatch(token):
            tokens.append("\\" + token)                         # HTT; AB, BC; \angle AB; not 2RC
        else:
            tokens.extend(token)                                # ab is a times b
    return tokens

class Reader:
    """Parser of one normalised answer, by recursive descent.  Raises one of NOT_MATHEMATICS."""
    # items  = item { ("," | ";" | "∪") item }          item   = quantity { relation quantity }
    # sum    = [ "+" ] term { ("+" | "-") term }        quantity = sum { ":" sum } [ unit ]
    # term   = factor { [ "*" | "/" ] factor }          group  = opening items closing
    # factor = "-" factor | base { "^" base | "!" | "!!" | "°" }
    # base   = "-" base | number | group | matrix | function | variable
    #        | ("\frac" | "\binom") base base | "\sqrt" [ "[" sum "]" ] base
    # variable = letter { "_" token | "'" } [ group ]   f(x)

    def __init__(self, text):
        self.tokens, self.i, self.names = tokenize(text), 0, []             # variables met so far
        self.angles = 0         # functions whose argument is being read: there 30° is an angle

    @property
    def next(self):
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *wanted):            # the next token, then read, if it is one of these; else ""
        token = self.next if self.next in wanted else ""
        self.i += token != ""
        return token

    def raw(self):
        """The next token or {group} as text, without braces."""
        start, depth = self.i, 0
        while self.i == start or depth > 0 and self.next:
            depth += (self.next in ("{", "(")) - (self.next in ("}", ")"))
            self.i += 1
        return re.sub(r"[{}\\]", "", "".join(self.tokens[start:self.i]))

    def items(self):
        items = [self.item()]
        while self.take(*SEPARATORS):
            items.append(self.item())
        return items

    def item(self):
        start, known = self.i, len(self.names)
        sides, signs = [self.quantity()], []
        left = "".join(self.tokens[start:self.i])
        constant = len(self.names) == known                     # \sqrt{81} = 9
        while sign := self.take(*RELATIONS):
            signs.append(sign)
            sides.append(self.quantity())
        if not signs:
            return sides[0]
        # Does the left side name the right?  x_1, f(2), (x,y), \abs(AB), \lim .. do
        rest = re.sub(r"_(\{[^{}]*\}|.)|\([^()+*/^=-]*\)", "", left)
        computed = re.search(r"[0-9+*^<>-]|\\(sin|cos|tan|log|ln|sqrt)(?![a-z])", rest)
        named = not computed or re.match(r"\\(lim|sum|int|prod)", left)
        if set(signs) <= {"=", "∈"} and (constant or named and "∈" in signs):
            return sides[-1]                                    # x ∈ [0, 1] is [0, 1]
        if set(signs) != {"="}:
            return inequality(sides, signs, set(self.names[known:]))
        gap = np.full(P, np.nan)                                # (x,y) = (1,2) has none
        if kind(sides[0]) == kind(sides[-1]) == "":
            gap = scaled(at_points(combine(sub, sides[0], sides[-1])))
        return Node("=", [gap, sides[-1]], left if named else "")

    def quantity(self):
        start, parts = self.i, [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        text, start = "".join(self.tokens[start:self.i]), self.i
        value = ratio(parts, text) if len(parts) > 1 else parts[0]
        if self.next.startswith(("%", "°", "_", r"\unit{")) or self.next > "\u3040":     # 132_7  5个
            while self.next not in ("", "+", "-", ":", *RELATIONS, *SEPARATORS, *CLOSERS):
                self.raw()
        unit = "".join(self.tokens[start:self.i])
        if re.search("[0-9]", re.sub(r"[A-Za-z^_]\{?-?[0-9]+", "", unit)):      # but cm^2, _{7}
            raise ValueError("no unit")                         # 12 remainder 3
        return Node("unit", [value], unit) if unit else value

    def sum(self):
        self.take("+")
        value = self.term()
        while sign := self.take("+", "-"):
            value = combine(OPERATIONS[sign], value, self.term())
        return value

    def term(self):
        value = self.factor()
        while (sign := self.take("*", "/")) or self.continues():
            value = combine(OPERATIONS[sign or "*"], value, self.factor())
        return value

    def continues(self):                # Does a factor follow without a sign?  In 1 2 it does not
        if self.next.startswith(DIGITS):
            return not self.tokens[self.i - 1].startswith(DIGITS)
        return FACTOR.match(self.next) is not None

    def factor(self):
        if self.take("-"):
            return combine(mul, self.factor(), Fraction(-1))
        value = self.base()
        while mark := self.take("^", "!", "!!", "°"):
            if mark == "^":
                value = power(value, self.base())
            elif mark[0] == "!":
                value = factorial(value, step=len(mark))
            elif self.angles:                                   # sin 30°
                value = combine(mul, value, CONSTANTS["π"] / 180)
            elif self.next not in ("+", "-"):                   # not of 90° - x: the unit of a sum
                self.i -= 1
                break
        return value

    def base(self):
        token, self.i = self.next, self.i + 1
        if token == "-":
            return combine(mul, self.base(), Fraction(-1))
        if token.startswith(DIGITS):
            return Fraction(token)
        if token in ("(", "[", "{", r"\{"):
            return self.group(token)
        if token == r"\frac":
            return combine(truediv, self.base(), self.base())
        if token == r"\binom":
            n, k = self.base(), self.base()
            below = combine(mul, factorial(k), factorial(combine(sub, n, k)))
            return combine(truediv, factorial(n), below)
        if token == r"\sqrt":
            index = self.group("[") if self.take("[") else Fraction(2)
            return power(self.base(), combine(truediv, Fraction(1), index))
        if re.fullmatch(r"\\begin\{(array|([pb]|small)?matrix)\}", token):
            return self.matrix()
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        constant = token in CONSTANTS and self.next != "'"      # \hat{i} is a vector
        return CONSTANTS[token] if constant else self.variable(token)

    def group(self, opening):
        items = [] if opening + self.next == r"\{\}" else self.items()
        brackets = opening + self.take(*CLOSERS)
        if len(items) == 1 and brackets in ("()", "[]", "{}"):
            return items[0]
        return Node(KINDS[brackets], items)                     # KeyError if they do not match

    def matrix(self):
        rows = [[]]
        while not self.next.startswith(r"\end{"):
            if self.take(r"\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.sum())
        self.i += 1
        (columns,) = {len(row) for row in rows if row}          # \\ may follow the last row
        return Node(f"matrix {columns}", sum(rows, []))

    def function(self, name):
        r"""\sin x, \sin(x), \sin 2x, \sin^2 x, \sin^{-1} x, \log_2 x."""
        marks = {}
        while mark := self.take("_", "^"):
            marks[mark] = self.base()
        self.angles += 1
        group = self.next in ("(", "{", "[")
        x = self.base() if group else self.factor()
        while not (group or self.next == "(" or self.next[1:] in FUNCTIONS) and self.continues():
            x = combine(mul, x, self.factor())
        self.angles -= 1
        if rational(marks.get("^")) and marks["^"] == -1 and "arc" + name in FUNCTIONS:
            name = "arc" + name
            del marks["^"]
        value = FUNCTIONS[name](at_points(x)) + 0j
        if "_" in marks:
            value = value / logarithm(at_points(marks["_"]))
        return power(value, marks["^"]) if "^" in marks else value

    def variable(self, name):
        if not re.fullmatch(r"\\?[A-Za-z]+", name):
            raise ValueError(f"unexpected {name!r}")
        if unknown(name):
            name, group = name.casefold(), self.next == "{"     # \overline{AB}, else \pmod 5
            while self.next == "{" if group else self.continues() or self.next in ("_", "^", "'"):
                name += " " + self.raw()
        while self.next in ("_", "'"):
            name += self.take("_") + self.raw()
        if APPLIED.match(" ".join([name, *self.tokens[self.i:self.i + 3]])):
            name += self.raw()
        self.names.append(name.removeprefix("\\"))
        return symbol(self.names[-1])

def ratio(parts, text):
    """a:b:c -> shares of the whole.  A 0 in front, or what could be reduced, tells a time: 3:15."""
    clock = re.fullmatch("(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9])+", text)
    if clock and (":0" in text or math.gcd(*map(int, parts)) > 1):
        return Node("time", parts)
    whole = reduce(lambda a, b: combine(add, a, b), parts)
    return Node(":", [combine(truediv, part, whole) for part in parts])

def scaled(g, positive=False):
    """g over its first finite value, or the size of that: 2x = 4 says the same as x = 2 -> (P,)."""
    first = g[np.isfinite(g)][:1]
    return g / (abs(first) if positive else first)

def inequality(sides, signs, names):
    """a < b ≤ c -> an interval, if linear in one variable; else a Node for each sign, in a set."""
    x, linear = symbol(min(names, default="")), len(names) == 1
    links, ends, brackets = [], [CONSTANTS["-∞"], CONSTANTS["∞"]], ["(", ")"]
    for a, sign, b in zip(sides, signs, sides[1:]):
        if sign in (">", "≥"):
            a, sign, b = b, {">": "<", "≥": "≤"}[sign], a
        if linear and sign != "≠" and (kind(a) == "-∞" or kind(b) == "∞"):
            continue                                            # -∞ < x
        g = at_points(combine(sub, a, b))                       # g < 0
        slope = (g[1] - g[0]) / (x[1] - x[0])
        straight = abs(slope) > 1e-9 and np.allclose(g, g[0] + slope * (x - x[0]))
        linear = linear and straight and sign in ("<", "≤")
        side = int(slope.real > 0)                              # 0 the lower end, 1 the upper
        ends[side] = np.full(P, x[0] - g[0] / slope)
        brackets[side] = ("()" if sign == "<" else "[]")[side]
        links.append(Node(sign, [scaled(g, positive=sign != "≠")]))     # -x < 0 is not x < 0
    if linear:
        return Node("".join(brackets), ends)
    return Node("{}", links) if len(links) > 1 else links[0]

def read(text):
    """A normalised answer -> its items.  One with a ± is two: 1±2, 5 is 3, 5, -1."""
    if "±" in text or "∓" in text:
        text = re.sub(r"^\\\{(.*)\\\}$", r"\1", text)
        upper = read(text.translate(str.maketrans("±∓", "+-")))
        lower = read(text.translate(str.maketrans("±∓", "-+")))
        return upper + [b for a, b in zip(upper, lower) if not same(a, b)]
    reader = Reader(text)
    items = reader.items()
    if reader.next:
        raise ValueError(f"unexpected {reader.next!r}")
    return items

@lru_cache(maxsize=1000)
@np.errstate(all="ignore")
def readings(s):
    """The meanings of a normalised answer -> list: one, none, or two of 1,234 (number, tuple)."""
    found, texts, brackets = [], [s], ","
    thousands = re.match(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|\s*[,;])", s)     # 71,204, no list
    if thousands:
        texts, brackets = [thousands[0].replace(",", "") + s[thousands.end():], s], "()"
    for text in texts:
        try:
            items = read(text)
        except NOT_MATHEMATICS:
            continue
        found.append(items[0] if len(items) == 1 else Node(brackets, items))
    return found

# ---- 3. Compare it -----------------------------------------------------------------------------

RANK = {"=": 4, ",": 3, "{}": 3, "unit": 2, "": 0}              # of the kinds; 1 for all others

def same(a, b):
    """Whether two values or Nodes say the same.  Symmetric: the kind of higher rank decides."""
    if RANK.get(kind(a), 1) < RANK.get(kind(b), 1):
        a, b = b, a
    if kind(a) == "":
        return equal(a, b)
    if a.kind == ":" and kind(b) == "":                         # 3:4 and 3/4
        return len(a.parts) == 2 and same(combine(truediv, *a.parts), b)
    if a.kind == "unit":
        return same_quantity(a, b)
    if a.kind in (",", "{}"):
        return same_list(a, b)
    if a.kind == "=" and kind(b) != "=":                        # x = 5 and 5
        return a.note != "" and same(a.parts[1], b)
    if a.kind == "=":
        named = a.note == b.note != "" and same(a.parts[1], b.parts[1])
        return named or equal(a.parts[0], b.parts[0])
    # tuples, intervals, matrices, inequalities
    return a.kind == kind(b) and len(a.parts) == len(b.parts) and all(map(same, a.parts, b.parts))

def decimals(x):
    """Digits after the point; inf for 1/3 or a value that is not rational."""
    places = range(40) if rational(x) else ()
    return next((n for n in places if 10**n % x.denominator == 0), math.inf)

def equal(a, b):
    """Whether values are equal: exactly if rational, else at all points where both are defined."""
    p, q = decimals(a), decimals(b)
    if rational(a, b) and (a == b or p == q or min(p, q) == 0):
        return a == b
    x, y = at_points(a), at_points(b)
    gap, size = abs(x - y), np.maximum(abs(x), abs(y))
    near = gap <= 1e-9 * size + 1e-14 * np.max(size, where=np.isfinite(size), initial=0)
    if min(p, q) > 0 and p != q:                                # 1/3 and 0.333333; 13 is exact
        near |= (gap <= 1e-6) & (gap <= 1e-4 * size)
    zero = rational(a) and a == 0 or rational(b) and b == 0
    if zero and 0 in size:                                      # sin^2 x + cos^2 x - 1, not 1e-19 x
        near |= size <= 1e-12
    known = np.isfinite(gap)
    return bool(known.sum() > 2 and near[known].all())

def same_list(a, b):
    """A list or set and another, its only item ({5} and 5), or a tuple ("1, 2" and (1, 2))."""
    if kind(b) not in (",", "{}"):
        only = len(a.parts) == 1 and same(a.parts[0], b)
        return only or a.kind == "," and same(a._replace(kind="()"), b)
    if len(a.parts) != len(b.parts) or len(a.parts) > 64:
        return False
    rest = list(b.parts)
    for x in a.parts:                                           # multiset match
        i = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if i is None:
            return False
        del rest[i]
    return True

def same_quantity(a, b):
    """Known units are converted; one that only one side has is ignored, but 25% may be 1/4."""
    x, y, unit, other = a.parts[0], b, known_unit(a.note), None
    if kind(b) == "unit":
        y, other = b.parts[0], known_unit(b.note)
    if unit and other and unit != other:
        return unit[0] == other[0] and same(combine(mul, x, unit[1]), combine(mul, y, other[1]))
    percent = unit and unit[0] == ("share", 1) and not other
    return same(x, y) or bool(percent) and same(combine(mul, x, unit[1]), y)
