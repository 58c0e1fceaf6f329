"""data/grade.py: what equals what, real benchmarks, published cases, properties, hostile input.

    python -m pytest tests/test_grade.py
"""

import hashlib
import json
import random
import re
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from data import grade as gr
from data.grade import (extract_answer, grade, grade_answer, last_box, normalise, readings,
                        same_answer)
import train
from model import load_tokenizer
from tests.conftest import ROOT


# ------------------------------------------------------------------------------------------------
# What equals what
# ------------------------------------------------------------------------------------------------

EQUAL = [
    # numbers
    (r"\frac17", "0.142857"), (r"\frac{5}{7}", "0.7142857"), ("1/64", "0.015625"),
    (r"2\pi", "6.283185"),
    ("6e23", r"6 \times 10^{23}"), ("2.5e-7", r"2.5\cdot10^{-7}"), ("3000", r"3 \times 10^3"),
    ("7:4", "7/4"),
    ("1 000", "1000.0"), (r"71,\! 204", "71204"), ("71,204", "71204"), ("3,117,140", "3, 117, 140"),
    ("011", "11"),
    (r"3\frac{2}{5}", "3.4"), ("3 2/5", "17/5"), (r"\frac29\frac{a}{b}", r"\frac{2a}{9b}"),
    (r"-\frac{2}{9}", "-2/9"),
    ("7^{901}", r"7 \cdot 7^{900}"), (r"\frac{40!}{2^{30}}", "40!/2^{30}"),
    (r"x^2\frac{1}{3}", r"\frac{x^2}{3}"),
    # radicals, functions, complex numbers
    (r"\sqrt{48}", r"4\sqrt3"), (r"\frac{1}{\sqrt7}", r"\frac{\sqrt{7}}{7}"),
    (r"\sqrt[3]{27}", "3"),
    ("27^{2/3}", "9"),
    (r"\sqrt{-9}", "3i"), ("7-2i", "-2i+7"), (r"e^{2 i\pi}", "1"), (r"\log_3 81", "4"),
    (r"\lg 1000", "3"),
    (r"\cos 60^\circ", r"\frac12"), (r"\tan^{-1} 1", r"\frac{\pi}{4}"),
    (r"\arcsin(3/5)", "np.arcsin(3/5)"),
    (r"\sin^2 x + \cos^2 x", "1"), (r"\sin^2 x + \cos^2 x - 1", "0"),
    (r"2\sin x\cos x", r"\sin 2x"),
    (r"\sin x (y+1)", r"(y+1)\sin x"), (r"|{-6}|", "6"), (r"\exp{2*t}", "e^{2t}"),
    # variables
    ("(a-b)^2", "a^2 - 2ab + b^2"), (r"\ln(ab)", r"\ln a + \ln b"),
    (r"\sqrt{ab}", r"\sqrt a\sqrt b"),
    (r"\frac{x^2-9}{x-3}", "x+3"), ("2^{n+1}", r"2\cdot 2^n"), ("(-1)^{2n}", "1"),
    (r"\binom{n}{2}", "n(n-1)/2"),
    (r"\lceil n/3 \rceil", r"\left\lfloor \frac{n+2}{3} \right\rfloor"),
    (r"x_{1}+x_2", "x_2+x_{1}"),
    ("2RC+C", "C(1+2R)"),
    (r"V(0) 2^{-t/(LG)}", r"2^{-\frac{t}{LG}} V(0)"), (r"\alpha^2/\alpha", "alpha"),
    (r"\hat{x}+1", r"1+\hat x"),
    # lists, sets, tuples, intervals, matrices
    ("4,9", "9, 4"), ("4, 9", r"9 \text{ and } 4"), ("4; 9", r"\{9,4\}"), (r"\{4\}", "4"),
    ("4,9", "(4,9)"),
    (r"2 \pm \sqrt3", r"2-\sqrt3, 2+\sqrt3"), (r"\{\pm 1, 3\}", "1,-1,3"), ("a \\mp b", "a-b,a+b"),
    (r"(1 \pm 2, 5)", "(3,5),(-1,5)"),
    (r"(\frac12, 3]", "(0.5,3]"), (r"(-\infty,2)\cup(5,\infty)", r"x<2 \text{ or } x>5"),
    ("x > 4", r"(4,\infty)"),
    (r"-3 \le x < 8", "[-3,8)"), (r"y \in [0,1]", "0<=y<=1"), (r"t \geqslant 2", r"2\le t"),
    ("-x > -1", "x < 1"),
    ("2x < 2y", "-x > -y"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"),
    (r"\frac15\begin{pmatrix}2\\-1\end{pmatrix}", r"\begin{bmatrix} 0.4 \\ -1/5 \end{bmatrix}"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    # equations
    ("x=5", "5"), ("5", r"\theta = 5"), ("(x,y)=(5,8)", "(5,8)"), ("f(2)=9", "9"),
    ("|AB| = 2", "2"),
    ("y=3x-2", "3x-2"),
    ("2x+4y=6", "x+2y=3"), ("y=-4x", "4x+y=0"), ("x=1,y=2", "y=2,x=1"), (r"x \ne 5", "x != 5"),
    ("n=3, 7", "7,3"),
    (r"\sqrt{81}=9", "9"), (r"\frac{\sqrt2}{2} \approx 0.707", r"\frac{1}{\sqrt2}"),
    (r"\lim_{x\to0} f(x) = 3", "3"),
    # units
    ("30", r"30 \text{ cm}"), (r"30\text{ cm}", "30 centimeters"),
    (r"30 \mathrm{~cm}", r"0.3 \text{ m}"),
    ("2 hours", "120 minutes"),
    (r"72\text{ inches}^2", "0.5 square feet"), (r"25^\circ", "25"), (r"25^{\circ}", "25 degrees"),
    (r"25\%", "25"), (r"25\%", "0.25"), ("25 percent", r"25\%"), (r"\$7.50", "7.5 dollars"),
    ("132_7", "132_{7}"),
    ("132_7", "132"), ("12 apples", "12"), (r"3 \times 10^8\,\mathrm{m/s}", "3e8"),
    ("1,250 km", "1250"),
    (r"2\pi \text{ rad}", r"2\pi"), (r"90^\circ - \frac{x}{2}", "90-x/2"),
    # words and letters
    (r"\text{west}", "West"), (r"\text{(D)}", "D"), ("D", r"\textbf{(D) } 12"), ("(D)", "D. it is"),
    ("Yes", r"\text{yes}"),
]

UNEQUAL = [
    ("1/7", "0.143"), ("1/7", "0.1429"), (r"\pi", "3.14"), (r"\sqrt{1000001}", "1000"),
    ("13", "13.0000001"),
    ("2.5", "2.51"),
    ("0.0000412", "0.0000413"), ("0.0000412", "0.00004"), ("6e23", "6e22"), ("1e-9", "0"),
    ("1e-19x", "0"),
    ("7^{901}", "7^{901}+1"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{1}{1400!}", r"\frac{1}{1401!}"),
    ("10^{400}", "10^{400}+1"),
    ("888888888888887", "888888888888888"), ("3000000000001/3", "1000000000000"), ("0.75", "75"),
    (r"\frac12", "50"), (r"2\frac12", "1"), ("1 2", "12"),
    ("x", "y"), ("x^2", "2x"), ("5", "5x"), ("|x|", "x"), (r"\sqrt{x^2}", "x"),
    (r"\sin x", r"\cos x"), ("n", "n+1"),
    (r"\lfloor n/2 \rfloor", "n/2"), (r"\frac ab", r"\frac ba"), ("e^x", "e^{-x}"), ("V(0)", "0"),
    ("C_1 e^t", "C_2 e^t"),
    ("1.6e-19x", "1.7e-19x"), (r"1-\frac1e", r"1+\frac1e"), ("x_1", "x_2"), (r"\dot x", "x"),
    ("ab", "a+b"),
    ("(4,9)", "(9,4)"), ("(4,9)", r"\{4,9\}"), ("4,9", "4,9,1"), ("4,4,9", "4,9,9"),
    ("[0,1]", "[0,1)"),
    ("(4,9)", "[4,9]"),
    (r"\pm 3", "3"), ("x>2", r"x \ge 2"), ("x<y", "x>y"), ("x<y", r"x \le y"), ("x<1", "x>-1"),
    (r"x \ne 5", "x=5"), (r"(2,\infty)", r"(-\infty,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("71,204", "204, 71"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("x=5", "y=5"), ("a+3b=0", "0"), ("2x+y=1", "1"), ("y=3x-2", "y=3x+2"), ("k=4,n=2", "k=2,n=4"),
    ("xy=1", "x+y=1"),
    (r"30 \text{ cm}", r"30 \text{ m}"), ("30 cm^2", "30 m^2"), ("5 cents", "5 dollars"),
    ("2 hours", "2 minutes"),
    (r"25\%", "0.0025"), (r"25\%", "2500"), (r"2.5\%", r"25\%"), (r"90^\circ", r"\frac{\pi}{2}"),
    ("132_7", "132_8"),
    (r"\text{west}", r"\text{stew}"), ("D", "B"), ("D", "E*2"), ("(A) 4", "B"), ("4", "four"),
    ("no", "on it"),
    (r"\frac00", r"\frac00+1"), ("9^{9^9}", "9^{9^8}"), (r"\infty", r"-\infty"), ("5 +", "5"),
    ("12", r"12 \text{ remainder } 3"), ("4", "4 choose 2"), ("(4,9", "(4,9)"),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_unequal(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


# One kind of mistake each: pairs that are equal, pairs that are not.
MISTAKES = {
    "a repeating decimal is a value": (
        [(r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", "1/6"), (r"0.\dot{3}", "1/3"),
         (r"0.\overline{142857}", "1/7"), (r"0.\dot{1}4285\dot{7}", "1/7"), ("0.(3)", "1/3"),
         ("0.1(6)", "1/6"), ("0.333...", "1/3"), (r"0.1666\ldots", r"\frac16"),
         (r"-2.\overline 9", "-3"), (r"0.\bar{3}", "0.(3)"), (r"33.\overline{3}\%", "1/3")],
        [(r"0.\overline{3}", "0"), (r"0.\overline{3}", r"0.\overline{6}"), ("0.(3)", "0"),
         (r"0.\overline{3}", "0.3"), (r"0.\dot{3}", r"0.\dot 6"), ("0.333...", "0.333"),
         (r"0.1\overline6", "0.16"), (r"1.\overline{27}", r"1.\overline{72}"), ("0.5(3)", "1.5")]),
    "an unknown command is one symbol with what belongs to it": (
        [(r"3\pmod5", r"3 \pmod{5}"), (r"3\ (\text{mod } 5)", r"3\bmod 5"),
         (r"x \equiv 3 \pmod 5", r"3\pmod{5}"), (r"\sum_{k=1}^n k^2", r"\sum_{k=1}^{n} k^{2}"),
         (r"2\overline{AB}", r"\overline{AB} \cdot 2"), (r"\hbar\omega/2", r"\frac12\omega\hbar"),
         (r"\angle ABC", r"\angle{ABC}"), (r"\gcd(4,6) \cdot 2", r"2\gcd(4,6)"),
         (r"V_\text{out}", "V_{out}")],
        [(r"3\pmod5", r"5\pmod3"), ("3 mod 5", "5 mod 3"), (r"3\pmod5", "3"),
         (r"\gcd(4,6)", r"\gcd(6,9)"), (r"\foo{a}{b}", r"\foo{b}{a}"),
         (r"\foo{1}{23}", r"\foo{12}{3}"),
         (r"A\mid B", r"B \mid A"), (r"\overline{AB}", r"\overline{BA}"),
         (r"\angle ABC", r"\angle BAC"), (r"\sum k^2", r"(\sum k)^2"),
         (r"\lim_{x\to0} x", r"x \lim_{x\to0} 1")]),
    "letters may be a label": (
        [(r"\text{BAC}", "BAC"), ("HT, TH", "TH, HT"), ("ab", "ba"), ("2RC+C", "C+2CR"),
         (r"\frac{t}{L G}", r"\frac{t}{GL}"), (r"\text{no}", "no"), ("AB=5", "5"),
         (r"\text{West}, \text{East}", "East, West"), ("3 alpha beta", r"3\beta\alpha")],
        [(r"\text{BAC}", r"\text{CAB}"), ("HTT", "TTH"), ("AB", "BA"), ("(HT, TH)", "(TH, HT)"),
         (r"\text{no}", r"\text{on}"), (r"\mathrm{act}", r"\mathrm{cat}"), ("Sue", "Use"),
         (r"\text{red car}", r"\text{car red}"), ("blue green", "green blue"), ("iii", "-i"),
         ("2 alpha", "2")]),
    "a function is applied": (
        [("f(g(x))", "f( g(x) )"), ("f(x)g(x)", "g(x) f(x)"), ("f(x)=x+1", "x+1"),
         ("f(x,y)=5", "5"), ("g(m+M)", "gM + gm"), ("x(x+1)", "x^2+x")],
        [("f(g(x))", "g(f(x))"), ("g(h(t))", "h(g(t))"), ("f(2x)", "2f(x)"), ("f(x)", "fx"),
         ("P(A|B)", "P(B|A)"), (r"P(A\mid B)", r"P(B\mid A)"), ("f(x,y)", "f(y,x)")]),
    "a colon makes a ratio": (
        [("1:2", "2:4"), ("1:2:3", "2:4:6"), (r"\sqrt2:1", r"2:\sqrt2"), ("a:b", "a/b"),
         ("1:10", "1/10"), ("x:y=2:3", "4:6"), (r"3\colon 2", "6 : 4"), ("３：２", "3:2")],
        [("1:2:3", "1:3:2"), ("1:2:3", "1:2"), ("1:2", "2:1"), ("0:1:2", "0:2:1"),
         ("1:2:3", "1/6"), ("2:3", "2:3:1")]),
    "or a time": (
        [("3:15", "03:15"), ("3:15", "3:15 p.m."), ("3:15 PM", r"3:15 \text{ p.m.}"),
         ("5 p.m.", "5 PM")],
        [("3:15", "1:5"), ("3:15", "1/5"), ("12:30", "2:5"), ("8:05", "8/5"), ("1:00", "1:0"),
         ("10:30", "10:45"), ("3:15 am", "3:15 pm"), ("5 a.m.", "5 p.m."), ("2:00:30", "4:01:00")]),
    "infinity is no number": (
        [(r"\infty", r"+\infty"), (r"-\infty < x < 5", r"(-\infty,5)"), (r"0<x<\infty", "x>0"),
         (r"\lim f = \infty", r"\infty"), (r"\pm\infty", r"\infty, -\infty"),
         (r"\infty+1", r"\infty + 1")],
        [(r"\infty-\infty", "0"), (r"\infty/\infty", "1"), (r"2\infty", r"\infty"),
         (r"\infty+1", r"\infty"), (r"0\cdot\infty", "0"), (r"\frac{\infty}{2}", r"\frac12\infty"),
         (r"5<\infty", r"\varnothing"), (r"-\infty", r"- -\infty")]),
    "a variable is real, unless it is an integer by name": (
        [(r"\lfloor n \rfloor", "n"), (r"\cos 2\pi k", "1"), ("(-1)^{2m}", "1"),
         ("(x+1)!", "(x+1)x!"), (r"\binom{x}{2}", "x(x-1)/2"),
         (r"\lfloor 2x\rfloor", r"\lfloor x\rfloor + \lfloor x+\frac12\rfloor")],
        [(r"\lfloor x\rfloor", "x"), (r"\lceil x \rceil", "x"), ("(-1)^{2x}", "1"),
         (r"\lfloor x\rfloor", r"\lceil x\rceil"), (r"\cos 2\pi x", "1"), (r"\sin\pi t", "0"),
         (r"\lfloor n/2\rfloor", "n/2")]),
    "!! is not ! of !": (
        [("5!!", "15"), ("6!!", "48"), ("(3!)!", "720"), ("n!!", "n !!"), ("0!!", "1")],
        [("5!!", "120!"), ("5!!", "120"), ("6!!", "720!"), ("n!!", "(n!)!"), ("n!!", "n!"),
         ("4!!!", "24")]),
    "characters and marks": (
        [(r"\underline{6}", "6"), (r"\varnothing", r"\{\}"), (r"\emptyset", "∅"),
         (r"x=\varnothing", r"\{ \}"), ('"3.14"', "3.14"),
         ("“5”", "5"), ("**`5`**", "5"), ("３．１４", "3.14"), ("（１，２）", "(1,2)"), ("x²", "x^2"),
         ("2¹²", "4096"), ("10⁻²", "0.01"), ("log₂8", "3"), ("3½", "3.5"), ("5 cm²", "5 cm^2"),
         ("90º", "90"), (r"\textcolor{red}{5}", "5"), ("1、2", "2,1"), ("𝑥＋１", "x+1"),
         (r"\begin{pmatrix}1\\2\\\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
         (r"\begin{pmatrix}1&2\\3&4\\ \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}")],
        [(r"\varnothing", "0"), (r"\emptyset", r"\{0\}"), ("x²", "2x"), ("x₂", "2x"), ("2²", "22"),
         ("１２", "21"), ("5'", "5"), (r"\underline{6}", "-6")]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_kinds_of_mistakes(kind):
    equal, unequal = MISTAKES[kind]
    assert [pair for pair in equal if not (same_answer(*pair) and same_answer(*pair[::-1]))] == []
    assert [pair for pair in unequal if same_answer(*pair) or same_answer(*pair[::-1])] == []


def test_equality_is_transitive_where_nothing_is_left_out():
    """Left out are the rules that say more: 25% is 25 and 1/4, 30 cm is 30 and 0.3 m, x = 5 is 5,
    4, 9 is (4, 9)."""
    said = re.compile(r"%|percent|[a-z]{2}|=|\^\\circ|132|,")
    texts = sorted({t for pair in EQUAL + UNEQUAL for t in pair if not said.search(t)})
    classes = []
    for text in texts:
        inside = [c for c in classes if any(same_answer(text, other) for other in c)]
        assert len(inside) <= 1, text
        assert all(same_answer(text, other) for other in sum(inside, [])), text
        inside[0].append(text) if inside else classes.append([text])
    assert len(texts) > 80 and max(map(len, classes)) < 6


@pytest.mark.parametrize("text, answer", [
    (r"Both \boxed{3} and \boxed{5}.", "3, 5"), (r"$\boxed{3}$, $\boxed{5}$", "3, 5"),
    (r"\boxed{3}\boxed{5}", "3, 5"),
    (r"\boxed{3} \quad \text{or} \quad \boxed{5}", "3, 5"),
    (r"\boxed{3} hours and \boxed{5} minutes", "3, 5"),
    (r"\boxed{3}. \boxed{5}", "5"), (r"\boxed{3} is wrong, it is \boxed{5}", "5"),
    (r"\boxed{5}, \boxed{5}", "5"),
    ("\\boxed{3}\n\n\\boxed{5}", "5"), (r"\boxed{3} " + "so " * 22 + r"and \boxed{5}", "5"),
    (r"\\boxed{3}", "3"),
    ("The answer is:\n\n\\[\n x = 3 \n\\]\nas shown.", "\\[\n x = 3 \n\\]"),
    ("Answer: $3$ and $4$", "$3$ and $4$"),
    ("Final answer: the largest of all $n$ is 12.", "12"),
    ("The answer is 12 because 3 times 4 is 12, not 13", "12"),
    ("The answer is $12$, as the sum of the first 3 shows", "$12$"),
    ("Answer: Paris, the capital", "Paris, the capital"),
    ("So in the end we have $a = 3$ there", "$a = 3$"),
    ("There are 4 of them and 2/3 remain.", "2/3"),
    ("It costs 1,250 dollars in all, they say", "1,250"), ("No digits in here, none at all", None),
    ("", None),
    (r"It is 3, so \boxed{4", None), ("<think>It must be 3, or 4, or 5", None),
    ("B2B and x^7 only, not more", None),
])
def test_extraction(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, gold", [
    # an empty box is no box
    (r"I will put the final answer in \boxed{}. We add. The answer is $7$.", "7"),
    (r"I use \boxed{ }. So it is 7", "7"), (r"\boxed{\ldots}, that is \boxed{8}", "8"),
    (r"\boxed{8}, as asked in \boxed{}.", "8"), (r"The answer is $\boxed{}$. It is 9", "9"),
    (r"\boxed{\{\}}", r"\varnothing"),
    # a leading value wins over prose
    ("The final answer is 5 because 2+3=5.", "5"), (r"The answer is $\frac12$ since 1+1=2.", "1/2"),
    ("The answer is 5, not 6.", "5"), ("The answer is equal to 5.", "5"),
    ("The answer is 7 (see above).", "7"), ("Answer: 42, as shown in step 3.", "42"),
    ("The answer is 10 and this completes the proof.", "10"),
    ("The answer is Paris, because 2 rivers meet there.", "Paris"),
    ("The answer is the value for n = 3, which is 12.", "12"),
    ("Answer: ax - by = c", "ax - by = c"), ("Answer: 2 by 3", "2 by 3"),
    ("The answer is 2xy+3ab+4cd", "2xy+3ab+4cd"), ("The answer is 12 square feet", "12 ft^2"),
    # other scripts
    ("答案：5", "5"), ("答案是5。", "5"), (r"所以答案为 $\frac{1}{2}$。", "1/2"), ("一共有12个苹果", "12"),
    ("最后得到５", "5"), ("答案：５，因为2+3=5", "5"), ("設x=3，則y為7", "7"), ("选B", "B"), ("答案：B", "B"),
    ("答案：5，因为2+4不是7", "5"), ("答案为 x+2", "2+x"),
    # marks
    ('The answer is "3.14".', "3.14"), ('{"answer": "5"}', "5"), ("**Answer:** **5**", "5"),
    ("The answer is **5** because 2+3.", "5"), ("__Answer__: `5`", "5"),
    ("The answer is <b>5</b>", "5"),
    ("1,000.99m² is the total area of it", "1000.99"), ("It is −5 in the end, they all say", "-5"),
    # one line of few words
    ("x = 3 or x = 5", "3,5"), ("So 5", "5"), ("Thus, $x=3$", "3"), ("x^5 - x^4 + 1", "1-x^4+x^5"),
    # tags and ends of text
    ("<answer> Answer: 2</answer>", "2"), ("<answer>x+1</answer> I checked it.", "x+1"),
    ("2</answer>", "2"), ("The answer is 2<|im_end|>", "2"), ("Answer: x+1<|endoftext|>", "x+1"),
    (r"\boxed{2}</s>", "2"), ("2<｜end▁of▁sentence｜>", "2"), ("West<|im_end|>", "West"),
    ("5</s></s>", "5"), ("Answer: 7<|end|><|eot_id|>", "7"), ("Answer: 7<end_of_turn>", "7"),
    ("<ANSWER>\n$$\\frac12$$\n</ANSWER>", "1/2"), ("Put it in <answer></answer>. Answer: 6", "6"),
    ("<final_answer>x+1</final_answer>", "x+1"),
])
def test_found(text, gold):
    assert grade(gold, text) and not grade("Z" if gold == "B" else f"{gold}+1", text)


SHAPES = ["2", "-7", "1,234", r"\frac{1}{2}", "0.5", "x^2 - 3x + 1", "5x - 7y + 11z + 4 = 0",
          r"3 \pm 2 \sqrt{2}", "1, 3, 5, 15", "(3, 4)", r"[0, 1) \cup (2, \infty)", r"\{1, 2\}",
          "B",
          "West", "3:15", "2:3", "12 cm", r"30^\circ", r"25\%", "x = 3", "n!", r"0.\overline{3}",
          r"\begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}", r"\text{Evelyn}", r"\varnothing", "HTT"]


@pytest.mark.parametrize("name", ["tiny/distill", "tiny/lm", "tiny-moe"])
@pytest.mark.parametrize("template", ["chat", "resa"])
def test_own_templates_are_read_back(name, template):
    """What train.py writes for a row is the right answer to that row, with the end token too."""
    tokenizer = load_tokenizer(str(ROOT / "data" / name))
    end = "<｜end▁of▁sentence｜>"
    for gold in SHAPES:
        text = train.as_text({"problem": "Which 3 are 17?", "answer": gold}, tokenizer, template)
        assert grade(gold, text) and grade(gold, text + end), (gold, extract_answer(text))
        assert not grade("99", text)


def test_bench_golds_are_read_back(golds):
    """As bare lines and in the resa template; left out is one gold, an English sentence."""
    for _, gold in golds:
        if "arbitrary" not in gold:
            row = {"problem": "Which?", "answer": gold, "system": ""}
            assert grade(gold, f"<think>\n{gold}\n</think>\n{gold}"), gold
            assert grade(gold, train.RESA_TEMPLATE.format(**row)), gold


@pytest.mark.parametrize("text, letter", [
    (r"\boxed{B}", "B"), (r"\boxed{\text{(B)}}", "B"), (r"\boxed{B. 12 m}", "B"),
    (r"\boxed{Option B}", "B"),
    ("Answer: B", "B"),
    ("**Answer: $B$**", "B"), ("The answer is surely B, not A or C", "B"), ("B", "B"),
    ("(B) since A is too small", "B"),
    ("A and C fail. I think it is (B).", "B"), ("I cannot decide", None), (r"\boxed{12}", "12"),
    (r"\boxed{", None),
    ("<think>Answer: B", None), ("<think>Answer: A</think>Answer: B", "B"),
    ("Answer: A\nNo: Answer: B", "B"),
])
def test_choice(text, letter):
    answer, right = grade_answer("B", text)
    assert answer == letter and right == (letter == "B")
    assert not grade("A", text) and not grade("C", text)


def test_gold_may_be_a_worked_solution():
    solution = r"It is \boxed{3} or more. Then $x=4$, so the sum is $\boxed{\frac{7}{2}}$."
    assert grade(solution, r"\boxed{3.5}") and not grade(solution, r"\boxed{3}")
    assert grade("the answer is 3.5", r"\boxed{\frac72}")


# ------------------------------------------------------------------------------------------------
# Real benchmarks and published cases
# ------------------------------------------------------------------------------------------------

def boxed(answer):
    return f"<think>\\boxed{{99}}</think>So it is\n$$\\boxed{{{answer}}}$$\nI hope it is correct."


@pytest.fixture(scope="module")
def golds():
    """(benchmark, gold) of the six files."""
    folder = ROOT.parent / "shared" / "data" / "bench"
    if not folder.is_dir():
        pytest.skip("the benchmarks, ../shared/data/bench, are not here")
    pick = {"minerva": lambda row: last_box(row["solution"]),
            "olympiadbench": lambda row: ",".join(row["final_answer"])}
    rows = [(path.stem, json.loads(line)) for path in sorted(folder.glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").split("\n") if line]
    golds = []
    for name, row in rows:
        answer = pick[name](row) if name in pick else row["answer"]
        golds.append((name, str(answer).strip()))
    return golds


def test_every_gold_equals_itself_and_is_understood(golds):
    assert Counter(name for name, _ in golds) == {"aime24": 30, "aime25": 30, "amc23": 40,
                                                  "math500": 500, "minerva": 272,
                                                  "olympiadbench": 675}
    assert [gold for _, gold in golds if not grade(gold, boxed(gold))] == []
    # One gold, with a misprint, is a string only.  The others have a value: other spellings count.
    assert sum(not readings(normalise(gold)) for _, gold in golds) <= 2


def spellings(gold):
    """Other ways to write the same."""
    yield re.sub(r"\\frac", r"\\dfrac", gold)
    yield re.sub(r"\\frac\{([0-9])\}\{([0-9])\}", r"\\frac\1\2", gold)
    yield re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", gold) if " is " not in gold else gold
    if re.fullmatch(r"-?[0-9]+", gold):
        yield from (gold + ".0", f"{int(gold):,}", f"x = {gold}", f"{gold} - 3 + 3")
        yield from (rf"{gold} \text{{ cm}}", rf"{gold}^\circ")
    if simple := re.fullmatch(r"\$?(-?)\\d?frac\{([0-9]+)\}\{([0-9]+)\}\$?", gold):
        sign, p, q = simple[1], int(simple[2]), int(simple[3])
        yield from (f"{sign}{p}/{q}", rf"{sign}\frac{{{2 * p}}}{{{2 * q}}}")
        yield from [f"{sign}{p / q:.9f}"]


def perturbed(gold):
    """Ways to be wrong: a number one higher or lower, another sign, scale or unit, a swapped tuple,
    one item less."""
    for number in re.finditer(r"[0-9]+", gold):
        for step in (1, -1) if int(number[0]) else (1,):
            yield gold[:number.start()] + str(int(number[0]) + step) + gold[number.end():]
    zero = re.fullmatch(r"\$?0(\.0)?\$?|\$?0,.*", gold)
    yield from [] if zero else [re.sub(r"^\$?", "-", gold)]
    if scaled := re.fullmatch(r"\$?(-?[1-9][0-9]*)((?:\\%|%|\^|\\text|\\mbox).*|)", gold):
        yield from (f"{scaled[1]}{zeros}{scaled[2]}" for zeros in ("0", "00", "000"))
    units = ("cm", "m"), ("inches", "feet"), ("cents", "dollars"), ("%", r"\text{ cm}")
    for ours, theirs in units:
        if ours in gold and gold.endswith((ours, "^2", "}")):
            yield gold.replace(ours, theirs)
    if pair := re.fullmatch(r"(\$?\\?(?:left)? ?\()([^(),]+),([^(),]+)(\)\$?)", gold):
        yield from [] if pair[2] == pair[3] else [f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}"]
    yield from [gold.rpartition(",")[0]] if re.fullmatch(r"[-0-9]+(,[-0-9]+){2,}", gold) else []


def test_other_spellings_are_right(golds):
    for _, gold in golds:
        assert [other for other in spellings(gold) if not grade(gold, boxed(other))] == [], gold


def test_perturbed_golds_are_wrong(golds):
    tried = [(gold, other) for _, gold in golds for other in perturbed(gold)]
    assert len(tried) > 5000
    assert [pair for pair in tried if grade(pair[0], boxed(pair[1]))] == []


# Rows of grader_cases.jsonl that we grade otherwise than its label: number, sha256 of gold and
# prediction, why.
DISAGREE = {
    8: ("61ac8733", "a formula must not span lines there; we then take the number, the right one"),
    128: ("61ac8733", "the same row again"),
    43: ("f11d379b", "a product of two matrices: we multiply a matrix by numbers only"),
    155: ("f11d379b", "the same row again"),
    62: ("04f5b470", "row 61 is the same pair, labelled equal: x in an interval is a < x < b"),
    108: ("1e5e079f", "a percentage that is no whole number: as with 10% and 10, both count"),
}
DISPUTED = {
    189: ("994eb4ad", "a list without brackets has no order"),
    205: ("821a956c", "tuples are equal if their elements are, reduced or not"),
    209: ("b9376591", "ten places of 1/3 are enough"),
    211: ("316782c9", "50% is a half"),
    217: ("4b8b76b2", "75 without a percent sign is not 0.75"),
    221: ("b65c7439", "a small letter is a variable, not an option"),
}


def test_published_cases(shared):
    text = (shared / "grader_cases.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    other = {True: {}, False: {}}
    for number, row in enumerate(rows):
        answer = grade if "text" in row["kind"] else same_answer
        if answer(row["gold"], row["pred"]) != row["expected"]:
            digest = hashlib.sha256(f"{row['gold']}\0{row['pred']}".encode()).hexdigest()
            other[row["disputed"]][number] = digest[:8]
    undisputed = sum(not row["disputed"] for row in rows)
    assert 1 - len(other[False]) / undisputed >= 0.97
    assert other[False] == {number: digest for number, (digest, _) in DISAGREE.items()}
    assert other[True] == {number: digest for number, (digest, _) in DISPUTED.items()}


# ------------------------------------------------------------------------------------------------
# Properties
# ------------------------------------------------------------------------------------------------

def random_expression(rng, sympy, depth=3):
    x, y, n, c = sympy.symbols("x y n x_1")
    if depth == 0:
        p = rng.randint(-9, 9)
        number = rng.choice([sympy.Integer(p), sympy.Rational(p, rng.randint(1, 9)),
                             sympy.sqrt(abs(p) + 2)])
        return rng.choice([x, y, n, c, sympy.Symbol("alpha"), sympy.pi, sympy.E, sympy.I, number])
    a = random_expression(rng, sympy, depth - 1)
    b = random_expression(rng, sympy, rng.randrange(depth))
    return rng.choice([lambda: a + b, lambda: a - b, lambda: a * b, lambda: a / b if b != 0 else a,
                       lambda: a ** 2, lambda: 1 / a if a != 0 else a, lambda: sympy.sin(a),
                       lambda: sympy.cos(a), lambda: sympy.exp(b), lambda: sympy.sqrt(b * b + 1),
                       lambda: sympy.log(b * b + 2),
                       lambda: sympy.atan(b)])()


def at_points(expression, points):
    values = {v: gr.symbol(str(v)) for v in expression.free_symbols}
    found = []
    for k in points:
        found.append(complex(expression.subs({v: values[v][k].real for v in values}).evalf()))
    return found


def test_random_expressions_printed_in_several_ways():
    """Printed by sympy: the values are sympy's, other forms are equal, other values are not."""
    sympy = pytest.importorskip("sympy")
    rng, seen, points = random.Random(0), 0, [0, 1, 12]
    unwanted = (sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.re, sympy.im, sympy.atanh,
                sympy.asinh)
    while seen < 60:
        expression = random_expression(rng, sympy)
        if expression.has(*unwanted):
            continue
        text, seen = sympy.latex(expression), seen + 1
        (value,) = readings(normalise(text))
        theirs = at_points(expression, points)
        assert np.allclose(gr.at_points(value)[points], theirs, rtol=1e-9), text
        plain = re.sub(r"\bE\b", "e", re.sub(r"\bI\b", "i", str(expression)))
        short = sympy.latex(expression, fold_short_frac=True, inv_trig_style="full",
                            ln_notation=True, mul_symbol="dot")
        expanded = sympy.latex(sympy.expand(expression))
        together = sympy.latex(sympy.together(expression))
        for other in (expanded, together, short, plain):
            assert same_answer(text, other) and same_answer(other, text), (text, other)
        wrong = sympy.latex(expression + rng.choice([1, sympy.Symbol("x"), sympy.Rational(-1, 7)]))
        assert not same_answer(text, wrong) and not same_answer(wrong, text), (text, wrong)


def random_answer(rng, depth=2):
    """-> (LaTeX, the same in plain text, a wrong one) of a random tuple, set or fraction."""
    if depth == 0 or rng.random() < 0.4:
        p, q = rng.randint(-50, 50), rng.randint(2, 30)
        return rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}", f"{p + rng.choice((1, -1))}/{q}"
    parts = [random_answer(rng, depth - 1 if depth > 1 else 0) for _ in range(rng.randint(2, 4))]
    latex, plain, wrong = zip(*parts)
    i = rng.randrange(len(parts))
    off = [*plain[:i], wrong[i], *plain[i + 1:]]
    mixed = rng.sample(plain, len(plain))
    left, right, inside = rng.choice([(r"\left(", r"\right)", plain), (r"\{", r"\}", mixed)])
    put = lambda items: re.sub(r"\\(left|right)", "", left + ",".join(items) + right)
    return left + ", ".join(latex) + right, put(inside), put(off)


def test_random_structures():
    rng = random.Random(1)
    for _ in range(300):
        latex, plain, wrong = random_answer(rng, rng.randint(1, 3))
        assert same_answer(latex, plain) and same_answer(plain, latex), (latex, plain)
        assert not same_answer(latex, wrong) and not same_answer(wrong, latex), (latex, wrong)


def test_points_do_not_depend_on_the_process():
    assert gr.symbol("x")[:2].real.round(6).tolist() == [2.003127, 1.911681]


# ------------------------------------------------------------------------------------------------
# Hostile input
# ------------------------------------------------------------------------------------------------

PIECES = r"""\frac \frac{ \sqrt{ \sqrt[ { } ( ) [ ] \{ \} ^ ^{ _ _{ ! | , ; + - * / = < > \le \in
\cup \pm \mp \pi \infty e i x n 0 1 99 1e999 .5 1,234 \binom \sin \log \tan^ \left
\right \text{ \text{cm} cm \% ^\circ \begin{pmatrix} \end{pmatrix} & \\ \boxed{ $ $$
\( \] answer is and \lfloor \rceil \lim ' \unit{ \hat \approx \ne \cdot 2\frac{1}{2}
1500! word % 3^{7000} A B.""".split()


def test_garbage_has_a_verdict(golds):
    """Pieces of LaTeX in any order, repeated, and golds with some of them put in or taken out."""
    rng, texts = random.Random(2), [gold for _, gold in golds]
    for n in range(900):
        gold = rng.choice(texts)
        if n % 3 == 0:
            text = " ".join(rng.choices(PIECES, k=rng.choice((3, 10, 60, 300))))
        elif n % 3 == 1:
            text = rng.choice(PIECES) * rng.choice((10, 300))
            text += rng.choice(("", "1", "}" * 99, ")" * 99, "1]"))
        else:
            cut = sorted(rng.sample(range(len(gold) + 1), min(2, len(gold))))
            text = gold[:cut[0]] + rng.choice(PIECES) + gold[cut[-1]:]
        verdict = same_answer(gold, text)
        assert verdict is same_answer(text, gold) and same_answer(text, text + " ") is True, text
        assert type(grade(gold, text)) is bool, text
        assert type(extract_answer(text)) in (str, type(None)), text


LARGE = {
    "power": "9^{9^{9}}", "tower": "2^" * 300 + "2", "root": "2^{1/99999999999}",
    "digits": "7" * 999,
    "factorials": "1500!/1499!+" * 70 + "1", "n!!!": "x" + "!" * 900,
    "binomials": "+".join([r"\binom{1400}{700}"] * 50), "chain": "x<" * 400 + "y",
    "rationals": "+".join(["1400!/7^{3000}"] * 60), "powers": "+".join(["3^{3000}/7^{3000}"] * 50),
    "sum of inverses": "+".join(f"1/{p}" for p in range(101, 370, 2)),
    "exponents": "*".join(["1e999"] * 160),
    "braces": "{" * 490 + "1" + "}" * 490, "parentheses": "(" * 490 + "1" + ")" * 490,
    "sines": r"\sin " * 240 + "x",
    "roots": r"\sqrt" * 190 + "2", "signs": "-" * 900 + "1", "bars": "|" * 900,
    "subscripts": "x_" * 400 + "1",
    "sets": r"\{\pm1," * 120, "signs of lists": r"\pm1," * 190, "list": ",".join(["x"] * 490),
    "matrix": r"\begin{pmatrix}" + "&".join("1" * 400) + r"\end{pmatrix}",
    "units": "5" + r"\text{cm}" * 99,
    "text": r"\text{" * 160, "thousands": "1" + ",000" * 240, "spaces": "1 " * 490,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_answers_cost_little(name):
    """Far below these bounds, so that no slow machine fails this."""
    readings.cache_clear()
    tracemalloc.start()
    start = time.process_time()
    for gold in ("3", "x+1", LARGE[name][:-1] + "2"):
        same_answer(gold, LARGE[name])
        grade(gold, boxed(LARGE[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same_answer(LARGE[name], LARGE[name])
    assert time.process_time() - start < 10 and peak < 50e6


# ------------------------------------------------------------------------------------------------
# The published grader
# ------------------------------------------------------------------------------------------------

def test_math_verify_agrees(golds):
    """On other spellings of real golds; it takes some right ones for wrong, and a missing last item
    for none missing."""
    math_verify = pytest.importorskip("math_verify")
    kinds = [math_verify.LatexExtractionConfig(boxed_match_priority=0),
             math_verify.ExprExtractionConfig()]

    def verify(gold, text):
        gold, answer = math_verify.parse(f"${gold}$", kinds), math_verify.parse(text, kinds)
        return math_verify.verify(gold, answer)

    assert verify(r"\frac13", r"It is \boxed{2/6}.") is True
    some = [gold for _, gold in golds[::50] if "$" not in gold]
    pairs = []
    for gold in some:
        pairs += [(gold, boxed(other)) for other in [*spellings(gold), *perturbed(gold)]]
    agree = [grade(gold, text) == verify(gold, text) for gold, text in pairs]
    assert len(pairs) > 80 and np.mean(agree) > 0.98


# Answers beside reasons, fillers, marks and units, as completions have them
FOUND = [
    ("(1,2)", "The answer is (1,2), which lies on y=3."),
    (r"\sqrt{2}", r"The answer is \sqrt{2}, which is about 1.414."),
    (r"\pi", "The answer is π, which is about 3.14."), ("5", "The answer is x = 5, which is 2+3."),
    ("x=5", "The answer is x=5, so the triangle has side 3."),
    ("-x+1", "The answer is -x+1, so f(0) = 1."),
    ("n(n+1)/2", "The answer is n(n+1)/2, which gives 55 for n=10."),
    (r"\{1,2\}", r"The answer is \{1,2\}, as 3 is not in it."),
    (r"\log_2 3", r"The answer is \log_2 3, which is about 1.585."),
    ("5", "The answer is 5, obtained by adding 2 and 3."), ("5", "The answer is 5, i.e., 2+3."),
    ("5", "The answer is 5, that is, 2+3."), ("5", "The answer is 5 using 2+3."),
    ("5", "The answer is 5 with 2+3=5."), ("5", "The answer is 5 rather than 6."),
    ("12", "The answer is 12, based on 3*4."), ("12", "The answer is 12 — because 3*4=12"),
    (r"\frac34", "The answer is 3/4 (or 0.75)."),
    (r"\sqrt2", r"The answer is $\sqrt{2}$ (about 1.414)."), ("7", "The answer is approximately 7."),
    ("7", "The answer is only 7."), ("7", "The answer is actually 7."), ("7", "The answer is about 7."),
    ("2,3", "The answers are 2 and 3."), ("2,3", "The answers are $2$ and $3$."),
    ("2,3", "The answers: 2, 3"), (r"\frac{1}{2}mv^2", r"\frac{mv^2}{2}"),
    (r"\frac12gt^2", r"\frac{gt^2}{2}"), (r"\sqrt{2gh}", r"\sqrt{2hg}"),
    (r"\frac{3}{2}mg", r"\frac{3mg}{2}"), ("5", r"5 \text{ J}"), ("5", r"5 \mathrm{~kg \cdot m/s^2}"),
    ("10:30", "So she arrives at 10:30."),
    ("3:4", "Therefore the ratio of boys to girls in the class is 3:4."), ("7:3", "比为7:3"),
    (r"\text{No}", "The answer is no, since 3 does not divide 8."), ("no", "No"),
    ("3.14", "The answer is '3.14'."), ("3.14", "The answer is *3.14*."),
    ("3.14", "The answer is _3.14_."), ("7", "The answer is ```7```."), ("7", r'\boxed{\text{"7"}}'),
    ("3.14", r"\textbf{Answer:} 3.14"), ("3.14", r"\text{Answer: } 3.14"),
    (r"\infty", r"\text{infinity}"), (r"(0,\infty)", r"(0,\text{infinity})"),
    (r"\text{Yes, No}", r"\text{No, Yes}"), ("3", r"\lvert -3\rvert"),
    (r"\hat{i}+\hat{j}", r"\hat{j}+\hat{i}"), ("(2n)!!", "2^n n!"), ("5", r"\boxed{5个}"),
    ("7", r"\boxed{7 \\}"), (r"\frac12", r"\textstyle\frac12"), ("6", r"\texttt{6}"),
    ("12", "The answer is 12<|endoftext|>The answer is 13"),
    ("12", r"\boxed{12}<|endoftext|>Human: what is \boxed{13}?"), ("1/3", "0.3333..."), ("0.5", "1/2"),
    ("12", "12."), ("3.0", "3"), ("Bqv", "qvB"), ("500 mg", "500 mg"), ("x", "x"), ("1,000", "1000"),
    ("5 apples", "5"), ("60 mph", "60"), ("100", "$100"), ("B", "(B) 12 m"),
]
OTHER = [
    (r"\textbf{(BAC)}", r"\textbf{(CAB)}"), ("(HTT)", "(TTH)"), ("x = BAC", "x = CAB"), ("2mgR", "2mgL"),
    ("2mgh", "2"), ("5mgL", "5"), (r"0.\overline{AB}", r"0.\overline{BA}"), (r"0.\widehat{3}", "0"),
    (r"\lceil x\rceil", r"\lfloor x\rfloor+1"), (r"\lfloor x\rfloor+\lfloor -x\rfloor", "-1"),
    ("HTT", "TTH"), ("(iv)", "(vi)"),
]


@pytest.mark.parametrize("gold, text, right", [(*pair, True) for pair in FOUND] + [(*pair, False) for pair in OTHER])
def test_answers_as_completions_write_them(gold, text, right):
    assert grade(gold, text) is right
