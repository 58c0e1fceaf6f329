"""eval.py: extraction, statistics against closed forms and simulation, resume, command line.

    python -m pytest tests/test_eval.py
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import pytest
import torch

import eval as ev
from data import stats
from data.grade import same_answer
from data.rows import read_problems
from model import (
    Config, Transformer, init_weights, load_model, load_tokenizer, save_model, think_prefix)
from tests.conftest import ROOT



# ------------------------------------------------------------------------------------------------
# Extraction and grading
# ------------------------------------------------------------------------------------------------

EXTRACT = [
    # boxes
    (r"so \boxed{7}", "7"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\text{if } x^{2^{3}} = {8}}", r"\text{if } x^{2^{3}} = {8}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ 3 \right.}", r"\left\{ 3 \right."),
    (r"a stray { and \boxed{4}", "4"),
    (r"a stray } and \boxed{4} }", "4"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed {6}", "6"),
    (r"\fbox{8}", "8"),
    (r"\boxed{9} and then \boxed{}", "9"),
    (r"\boxed{12", None),
    (r"the final answer is \boxed{12", None),
    (r"\boxed{3} wait, \boxed{4", "3"),
    (r"\boxed{}", None),
    (r"\boxed{ 10 }", "10"),
    # thinking
    (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> I do not know what it could be.", None),
    (r"<think>\boxed{1}", None),
    ("<think>6*7=42\n</think>\n42", "42"),
    ("6*7=42\n</think>\n42", "42"),
    ("<think>a</think>1<think>b</think>2", "2"),
    ("<think>a</think>1<think>b", None),
    ("<think></think>\n", None),
    # said, not boxed
    ("Final answer is 17.", "17."),
    ("The answer is: 17", "17"),
    ("Answer: 3/4\nThank you.", "3/4"),
    ("**Answer:** 12", "12"),
    ("Answer: 3\nNo. Answer: 4", "4"),
    ("The final answer is 5. I hope it is correct.", "5"),
    ("the ANSWER is 3.5. Done", "3.5"),
    (r"the answer is 4, that is \boxed{5}", "5"),
    # bare
    ("42", "42"),
    ("  -3/4\n", "-3/4"),
    ("12 apples", "12 apples"),
    ("1\n2", "2"),
    ("first I add them and then I stop", None),
    ("9" * 41, "9" * 41),
    ("", None),
]

GRADE = [
    (True, "7", "7"), (True, "7", "7.0"), (True, "7", "07"), (True, "025", "25"),
    (True, "27.0", "27"),
    (True, "1234", "1,234"), (True, "1,234", "1234"), (True, "1234567.5", "1,234,567.5"),
    (True, "1234", "1{,}234"), (True, "1234", r"1\,234"), (True, "1234", r"1\!234"),
    (True, "1234", "1 234"),
    (True, "1/2", "0.5"), (True, "1/2", r"\frac{1}{2}"), (True, r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (True, r"\frac12", "1/2"), (True, r"\tfrac{3}{4}", "0.75"), (True, r"-\frac{1}{2}", "-0.5"),
    (True, r"\frac{-1}{2}", "-1/2"), (True, "2/4", "1/2"), (True, "5/2", r"2\frac{1}{2}"),
    (True, "2.5", "2 1/2"), (True, "4e33", "4E33"), (True, "-1./3", "-1/3"), (True, "0", "-0"),
    (True, "5", "+5"), (True, "-5", "\u22125"), (True, "5", "$5$"), (True, "5", r"\$5"),
    (True, "5", "5."),
    (True, "C", r"\text{C}"), (True, "x+1", "x + 1"),
    (True, r"(1,\,2)", "(1, 2)"), (True, r"\left(1, 2\right)", "(1,2)"), (True, r"50\%", "50%"),
    (True, r"\sqrt{2}", r"\sqrt{2}"), (True, "1" * 400, "1" * 400),
    (True, r"x^\frac{1}{2}", r"x^\dfrac{1}{2}"),
    (False, "7", "8"), (False, "7", "-7"), (False, "12", "1 2"), (False, "1234", "1, 234"),
    (False, "1/3", "0.333"),
    (False, "21/2", r"2\frac{1}{2}"), (False, "0.5", "1/20"), (False, "1", "1/0"),
    (False, "x+1", "x-1"),
    (False, "(1,2)", "(2,1)"), (False, "7", ""), (False, "123", "1,23"), (False, "1e3", "1e30"),
    (False, r"x^1/2", r"x^\frac{1}{2}"), (False, "1/23", r"\frac{1}{2}3"), (False, "13", "13.0001"),
    (False, "1" * 400, "1" * 399 + "2"), (False, r"\sqrt{2}", r"\sqrt{3}"),
    (False, "\u0663", "3"), (False, "10", "1_0"),
]


@pytest.mark.parametrize("text, answer", EXTRACT)
def test_extract(text, answer):
    assert ev.extract_answer(text) == answer


@pytest.mark.parametrize("right, gold, answer", GRADE)
def test_grade(right, gold, answer):
    assert ev.grade(gold, f"<think>\\boxed{{99}}</think> It is $\\boxed{{{answer}}}$.") is right
    assert same_answer(answer, gold) is right, "grading is symmetric"


def test_prompt_that_opens_thinking():
    row = {"prompt": "Q<think>\n", "completion": r"\boxed{5}", "gold": "5"}
    assert ev.mark(row)["extracted"] is None, "it never stopped thinking"
    assert ev.mark(row | {"completion": "</think>5"})["correct"]
    assert ev.mark(row | {"prompt": "Q"})["correct"]


HOSTILE = {
    "open boxes": r"\boxed{" * 10_000, "nested boxes": r"\boxed{" * 10_000 + "1" + "}" * 10_000,
    "nested braces": r"\boxed{" + "{" * 10_000 + "}" * 10_000 + "}", "open braces": "{" * 1_000_000,
    "digits": r"\boxed{" + "7" * 90_000 + "}", "a megabyte of digits": "7" * 1_000_000,
    "power": r"\boxed{9^{9^{9}}}", "exponent": r"\boxed{1e999999999}",
    "exponents": r"\boxed{1e999/1e-999}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    "commas": r"\boxed{1" + ",000" * 700 + ",}", "blanks": "answer" + " " * 1_000_000,
    "answers": "answer is " * 100_000, "stars": "answer" + "*" * 1_000_000,
    "thoughts": "<think>" * 100_000 + "</think>" * 100_000, "backslashes": "\\" * 1_000_000,
    "zeros": r"\boxed{0." + "0" * 280 + "1}",
    "text": r"\boxed{" + r"\text{" * 300 + "}" * 300 + "}",
    "words": r"\boxed{" + "1 " * 1400 + "}", "nul": "\\boxed{\0}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_cost_little(name):
    start = time.perf_counter()
    assert not ev.grade("3", HOSTILE[name])
    assert not ev.grade("7" * 1_000_000, HOSTILE[name])
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]),
                                                          abs=1e-12)
    exact = 1 - math.comb(9_000, 5_000) / math.comb(10_000, 5_000)
    assert ev.pass_at_k(10_000, 1_000, 5_000) == pytest.approx(exact)
    for bad in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError):
            ev.pass_at_k(*bad)


def test_wilson_known_values():
    for c, n, low, high in ((9, 30, 16.7, 47.9), (28, 40, 54.6, 81.9), (83, 272, 25.3, 36.2),
                            (425, 500, 81.6, 87.9)):
        assert [round(100 * x, 1) for x in ev.wilson(c, n)] == [low, high]
    assert ev.wilson(0, 30)[0] == 0 and ev.wilson(30, 30)[1] == 1 and ev.wilson(0, 30)[1] > 0.1


def simulate(P, k, a, b, trials):
    """-> coverage, mean width and methods of the interval, rates from Beta(a, b)."""
    rng, hits, widths, methods = np.random.default_rng(0), 0, [], set()
    for trial in range(trials):
        c = rng.binomial(k, rng.beta(a, b, P))
        low, high, method = ev.interval(c, np.full(P, k))
        hits += low <= a / (a + b) <= high
        widths.append(high - low)
        methods.add(method)
    return hits / trials, np.mean(widths), methods


@pytest.mark.parametrize("P, k, a, b",
                         [(40, 4, 500, 500), (40, 4, 0.4, 0.6), (100, 2, 2, 2), (30, 16, 1, 1),
                                        (60, 1, 1, 1)])
def test_interval_covers_the_truth_and_is_no_wider_than_needed(P, k, a, b):
    coverage, width, methods = simulate(P, k, a, b, 200)
    assert methods == {"Wilson" if k == 1 else "Wilson, effective trials"}
    m = a / (a + b)
    between = m * (1 - m) / (a + b + 1)                            # of a Beta(a, b)
    true_se = math.sqrt((between + (m * (1 - m) - between) / k) / P)
    assert 0.90 <= coverage <= 0.99
    # Counting sampling noise twice would give 1.3 in the first case.
    quantile = ev.student(P - 1) if k > 1 else 1.96
    assert width / (2 * quantile * true_se) == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("P, k, m, s, low, high", [
    (40, 4, 0.4, 1, 0.93, 0.97),
    (30, 8, 0.3, 0.5, 0.93, 0.97),          # AIME24 at the published base
    (40, 8, 0.05, 500, 0.93, 0.98),         # few right answers, problems alike
    # the rate rests on a few problems: as many trials as problems
    (40, 8, 0.05, 1, 0.93, 0.99),
    (30, 32, 0.05, 1, 0.93, 0.99)])
def test_coverage_over_1000_simulated_evaluations(P, k, m, s, low, high):
    assert low <= simulate(P, k, m * s, (1 - m) * s, 1000)[0] <= high


def test_interval_at_the_edges():
    few = "Wilson, one trial per problem: conservative"
    assert ev.interval([0] * 30, [4] * 30) == (*ev.wilson(0, 30), few)
    assert ev.interval([4] * 30, [4] * 30) == (*ev.wilson(30, 30), few)
    # one problem: sampling noise is all there is
    low, high, _ = ev.interval([2], [4])
    assert low < 0.5 < high
    low, high, _ = ev.interval([2, 2, 1], [4, 4, 1])               # an interrupted file is uneven
    assert 0 <= low < high <= 1
    many = [1, 3, 2] * 20, [4] * 60
    assert ev.interval(*many) == ev.interval(*many)
    assert ev.interval(*many)[2] == "Wilson, effective trials"
    assert ev.interval([4] * 5 + [0] * 25, [4] * 30) == (*ev.wilson(5, 30), few)
    assert ev.interval([4] * 6 + [0] * 24, [4] * 30)[2] == "Wilson, effective trials"


def test_effective_trials_are_all_samples_of_equal_problems_and_one_per_problem_of_extreme_ones():
    """Equal rates: P (k-1) trials, one degree of freedom lost per problem; each 0 or 1: P - 1.

    Student's t for the normal quantile in both.
    """
    t = ev.student(29)
    assert t == pytest.approx(2.0452, abs=1e-4) and ev.student(1e9) == pytest.approx(1.959964)
    for df, exact in ((2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216)):
        assert ev.student(df) == pytest.approx(exact, rel=2e-3)
    low, high, _ = ev.interval([1] * 30, [8] * 30)
    assert (low, high) == pytest.approx(ev.wilson(210 / 8, 210, t))
    low, high, _ = ev.interval([8] * 6 + [0] * 24, [8] * 30)
    assert (low, high) == pytest.approx(ev.wilson(6 * 29 / 30, 29, t))


def test_variance_parts_split_the_variance_of_the_rates():
    rng, P, k, a, b = np.random.default_rng(3), 40_000, 4, 1.0, 2.0
    within, between = stats.variance_parts(rng.binomial(k, rng.beta(a, b, P)), np.full(P, k))
    m = a / (a + b)
    assert between == pytest.approx(m * (1 - m) / (a + b + 1), rel=0.05)
    assert within == pytest.approx((m * (1 - m) - m * (1 - m) / (a + b + 1)) / k, rel=0.05)
    assert stats.variance_parts(np.array([0, 1]), np.array([1, 1])) == (None, None)


def test_majority_by_hand():
    def rows(key, *answers):
        return [sample(key, j, answer == "7", extracted=answer) for j, answer in enumerate(answers)]
    assert stats.majority(rows("a", "7", "7", "8")) == 1
    assert stats.majority(rows("a", "8", "7", "8")) == 0
    # no answer is no vote; of two tied, one is right
    assert stats.majority(rows("a", "8", "7", None, None)) == 0.5
    # one wrong answer, written twice
    assert stats.majority(rows("a", "1, 2", "1,2", "7")) == 0
    assert stats.majority(rows("a", None, None)) == 0
    right = rows("a", "7", "7", "3", "3", "3")
    # two spellings of what was graded right
    right[1] |= {"extracted": "7.0"}
    assert stats.majority(right + rows("b", "7")) == 0.5


def test_statistics_are_fast():
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    ev.interval(rng.binomial(4, 0.5, 1000), np.full(1000, 4))
    ev.paired_difference(rng.normal(size=1000))
    assert time.perf_counter() - start < 4


def test_paired_difference_mirrors_and_agrees_with_the_exact_test():
    rng = np.random.default_rng(1)
    d = rng.integers(-2, 4, size=9) / 4
    mean, low, high, p = ev.paired_difference(d)
    swapped = ev.paired_difference(-d)
    assert swapped == pytest.approx((-mean, -high, -low, p))
    exact = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9
             for signs in itertools.product((-1, 1), repeat=9)]
    assert p == pytest.approx(np.mean(exact), abs=0.02)
    assert low <= mean <= high
    assert ev.paired_difference(np.zeros(20))[3] == 1


def test_permutation_p_counts_the_one_that_was_seen():
    assert ev.permutation_p(3, [1, 2, 3]) == 0.5             # 3 and the one seen, of four
    assert ev.permutation_p(9, [1, 2, 3]) == 0.25
    assert ev.permutation_p(0, [1, 2, 3]) == 1
    assert ev.permutation_p(0.3, [0.1 + 0.2, 0.3 - 1e-17]) == 1, "equal but for rounding"
    assert ev.permutation_p(2e-9, [1e-9], tolerance=1e-12) == 0.5        # small numbers need it
    assert ev.permutation_p(np.array([1, 3]), np.array([1, 2, 4])).tolist() == [1, 0.5]


def test_paired_p_is_uniform_under_the_null_and_small_under_an_effect():
    rng = np.random.default_rng(2)
    p = [ev.paired_difference(rng.normal(size=40), flips=1000)[3] for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert ev.paired_difference(rng.normal(0.8, 1, size=40))[3] < 0.01


def sample(key, j, correct, **more):
    return {"id": key, "sample": j, "correct": correct, "tokens": 10, "finish": "stop",
            "extracted": "1", "seed": [0, 0, j], "settings": {}} | more


def test_summary_weighs_problems_alike():
    rows = [sample("a", 0, True), sample("a", 1, True), sample("a", 2, True), sample("b", 0, False)]
    rows[3] |= {"finish": "length", "extracted": None, "tokens": 30}
    s = ev.summarize(rows)
    # not 3/4
    assert (s["pass@1"], s["problems"], s["samples"], s["tokens"]) == (0.5, 2, 2, 15)
    assert (s["truncated"], s["no_answer"]) == (0.25, 0.25)
    rows = [sample(key, j, j < right) for key, right in (("a", 1), ("b", 0)) for j in range(2)]
    s = ev.summarize(rows)
    assert (s["pass@2"], s["majority@2"]) == (0.5, 0.25)
    # p(1-p)/(n-1) is 1/4 for "a", 0 for "b"; the rates 1/2 and 0 vary by 1/8, all of it sampling.
    assert s["error"] == {"samples": pytest.approx((0.125 / 2) ** 0.5), "problems": 0}
    assert ev.summarize(rows[::2])["error"] == {"samples": None, "problems": None}


def test_pairs_need_the_same_problems():
    assert ev.paired([sample("a", 0, True)], [sample("a", 0, False)])["difference"] == 1
    with pytest.raises(ValueError, match="'b'"):
        ev.paired([sample("a", 0, True), sample("b", 0, True)], [sample("a", 0, True)])


# ------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------

GOOD = '{"problem": "1+1?", "answer": 2}\n'


@pytest.mark.parametrize("text, message", [
    (GOOD + '{"problem": "2+2?"}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": null}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": ""}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": ["4"]}\n', ":2: 'answer' should be text"),
    (GOOD + '{"answer": "4"}\n', ':2: no "problem" field'),
    (GOOD + GOOD + '{"problem": "2+2?", "ans\n', ":3: not JSON: "),
    (GOOD + '{"problem": ' + "[" * 100_000 + "\n", ":2: not JSON"),
    (GOOD + "\n[1, 2]\n", ":3: a JSON object was expected"),
    ('{"id": "a", "problem": "x", "answer": "1"}\n' * 2, ":2: id 'a'"),
    ("", ": no problem"), ("\n \n", ": no problem"),
])
def test_bad_lines_are_named(tmp_path, text, message):
    path = tmp_path / "bench.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}{message}") and "\n" not in str(caught.value)


def test_read_problems(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_bytes(b'{"question": "a?", "answer": 27.0}\n\n'
                     b'{"problem": "c", "answer": "x", "id": 7}')
    first, second = read_problems(path)
    assert (first["id"], first["problem"], first["answer"]) == ("0", "a?", "27.0")
    assert (second["id"], second["answer"]) == ("7", "x")
    path.write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(ValueError, match="bench.jsonl"):
        read_problems(path)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_problems(tmp_path / "nowhere.jsonl")


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_bytes('{"problem": "a\u2028b\x85c", "answer": "1"}\n'.encode())
    assert read_problems(path)[0]["problem"] == "a\u2028b\x85c"


def test_bench_names(tmp_path):
    problems, source = ev.read_bench("tiny")
    assert len(problems) >= 500 and source == "data/tiny/test.jsonl"
    for name in ("tinny", "aime26"):
        with pytest.raises(ValueError, match="known names are tiny, aime24.*path.jsonl"):
            ev.read_bench(name)
    with pytest.raises(FileNotFoundError, match="no.json: no such file"):
        ev.read_bench("no.json")
    path = tmp_path / "list.json"
    path.write_text('[\n {"problem": "1+1?", "answer": 2},\n {"question": "1+2?", "answer": "3"}]')
    assert [row["answer"] for row in ev.read_bench(str(path))[0]] == ["2", "3"]
    path.write_text('[{"problem": "1+1?", "answer": 2}, 7]')
    with pytest.raises(ValueError, match=r"list.json:2: a JSON object was expected"):
        ev.read_bench(str(path))


# ------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------

def prompts_of(tok, prompt="{problem}", system="", problem="{x} is 1. {problem}?"):
    """The only prompt of a plan, and its ids."""
    model = Transformer(Config(vocab_size=8, hidden_size=8, intermediate_size=8,
                               num_hidden_layers=1, num_attention_heads=1,
                               max_position_embeddings=4096))
    plan, ids_of = ev.make_plan(model, tok, [{"id": "a", "problem": problem, "answer": "1"}], 1, 0,
                                {"label": "", "max_new_tokens": 8}, prompt, system)
    (text, ids), = ids_of.items()
    assert plan["a", 0]["prompt"] == text
    return text, ids


def test_published_prompts_are_these_bytes():
    """Their sha256, so that nobody straightens the two blanks after the first sentence."""
    found = {name: hashlib.sha256(prompt.encode()).hexdigest()[:12]
             for name, prompt in ev.BENCHES.items()}
    others = {"tiny": "b3e27e83bd38", "gpqa": "e6e843fe25d7"}
    assert found == dict.fromkeys(found, "d2b10bff03cb") | others
    assert "clearly.  The" in ev.MATHS_PROMPT and r"$\boxed{ANSWER}$" in ev.MATHS_PROMPT


def test_a_prompt_goes_into_the_chat_template_with_its_braces():
    tok = load_tokenizer(str(ROOT / "data" / "tiny" / "distill"))
    assert prompts_of(tok)[0] == "<|user|>{x} is 1. {problem}?<|assistant|><think>\n"
    text, ids = prompts_of(tok, "Solve {this}: {problem}", "Be brief.")
    assert text == "Be brief.<|user|>Solve {this}: {x} is 1. {problem}?<|assistant|><think>\n"
    assert tok.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("name, begin, end", [
    ("deepseek-r1-distill-qwen", [151646, 151644], [151645, 151648, 198]),
    ("qwen2.5-1.5b-instruct", [151644, 8948, 198], [151644, 77091, 198]),
    ("qwen2.5-math-1.5b", [151644, 8948, 198], [151644, 77091, 198])])
def test_real_chat_formats_begin_once(shared, name, begin, end):
    """One begin token where there is one; thinking is opened where the template opens it."""
    tok = load_tokenizer(shared / "tokenizers" / name)
    text, ids = prompts_of(tok, ev.MATHS_PROMPT)
    assert ids[:len(begin)] == begin and ids[-len(end):] == end
    assert ids.count(151646) == (begin[0] == 151646)
    assert ids.count(151644) == 1 + 2 * (begin[0] == 151644)
    assert think_prefix(text) == ("<think>" if 151648 in end else "")
    system = prompts_of(tok, ev.MATHS_PROMPT, "Be brief.")[0]
    assert "Be brief." in system and system.count(text[-300:]) == 1


def test_prompt_file_and_system_reach_the_model(small, bench, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Say: {problem}\n")
    ev.main(["--model", small, "--bench", str(bench), "--limit", "1", "--max-new-tokens", "2",
             "--device", "cpu", "--out", str(tmp_path), "--prompt-file",
             str(tmp_path / "prompt.txt"), "--system", "Now."])
    row, = ev.read_samples(next(tmp_path.glob("eval/*/*.jsonl")))
    assert row["prompt"] == "Now.<|user|>Say: Which of 0?<|assistant|><think>\n"


def test_published_settings_for_published_benchmarks():
    args = ev.settings([])
    limits = {name: ev.sampling_of(args, name)["max_new_tokens"]
              for name in ("tiny", "my.jsonl", "aime24")}
    assert limits == {"tiny": 96, "my.jsonl": 32768, "aime24": 32768}        # 96 is for the embedded
    args = ev.settings(["--max-new-tokens", "50"])
    assert {ev.sampling_of(args, name)["max_new_tokens"] for name in ev.BENCHES} == {50}
    published = {"temperature": 0.6, "top_p": 0.95, "samples": 1}
    assert ev.sampling_of(args, "aime24").items() >= published.items()


# ------------------------------------------------------------------------------------------------
# The run, on a real, very small model: it answers 1, 2 or 3 after a sum or none, or rambles
# ------------------------------------------------------------------------------------------------

SETTINGS = dict(samples=3, max_new_tokens=8, temperature=1.0, top_p=1.0, label="small")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model directory: two blocks of width 32, the embedded tokenizer, trained for a second."""
    torch.set_num_threads(1)
    source = next((ROOT / "data" / "tiny").glob("*/tokenizer.json")).parent
    tok, rng = load_tokenizer(str(source)), np.random.default_rng(0)
    config = Config(vocab_size=tok.fast.get_vocab_size(), hidden_size=32, intermediate_size=64,
                    num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True,
                    max_position_embeddings=256, eos_token_id=tok.eos_id)
    model = init_weights(Transformer(config), seed=0)
    prompt = tok.encode(tok.chat([{"role": "user", "content": "Which?"}]))
    texts = [tok.encode(f"{rng.choice(['', '1+1=2'])}\n</think>\n{rng.integers(1, 4)}")
             + [tok.eos_id]
             for _ in range(7)] + [tok.encode("1+1=2\n1+1=2\n1+1=2\n")]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(185):
        ids = torch.tensor([prompt + texts[step % len(texts)]])
        logits = model(ids)[0, len(prompt) - 1:-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt):])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory = tmp_path_factory.mktemp("models") / "small"
    model.source = source
    save_model(model, directory)
    return str(directory)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "which.jsonl"
    rows = [{"problem": f"Which of {i}?", "answer": str(1 + i % 3)} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(small, bench, tmp_path_factory):
    """An uninterrupted run: (model, tokenizer, problems, path of the file, its rows)."""
    path = tmp_path_factory.mktemp("whole") / "small.jsonl"
    model, tok, problems = load_model(small), load_tokenizer(small), read_problems(bench)
    return model, tok, problems, path, ev.evaluate(model, tok, problems, path, **SETTINGS)


def test_the_run_records_what_happened(whole):
    model, tok, problems, path, rows = whole
    assert [(r["id"], r["sample"]) for r in rows] == [
        (str(i), j) for i in range(8) for j in range(3)]
    assert ev.read_samples(path) == rows
    assert {r["correct"] for r in rows} == {True, False}
    assert {r["finish"] for r in rows} == {"stop", "length"}
    for row in rows:
        assert row["seed"] == [0, int(row["id"]), row["sample"]]
        assert row["gold"] == problems[int(row["id"])]["answer"]
        assert row["tokens"] == 8 if row["finish"] == "length" else 2 <= row["tokens"] <= 8
        assert row["correct"] == ev.grade(row["gold"], "<think>" + row["completion"])
    first = [r["completion"] for r in rows if r["id"] == "0"]
    assert len(set(first)) > 1, "samples of one problem differ"


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.35, 0.6, 0.9, 1.0])
def test_an_interrupted_run_ends_in_the_same_bytes(whole, tmp_path, cut):
    model, tok, problems, path, rows = whole
    lines = path.read_bytes().splitlines(keepends=True)
    # on disk they come in the order they ended
    np.random.default_rng(0).shuffle(lines)
    torn = tmp_path / "small.jsonl"
    torn.write_bytes(b"".join(lines)[:int(cut * path.stat().st_size)])
    again = ev.evaluate(model, tok, problems, torn, slots=5, **SETTINGS)
    assert again == rows and torn.read_bytes() == path.read_bytes()


def test_a_torn_line_is_cut_off_before_more_is_appended(whole, tmp_path):
    model, tok, problems, path, rows = whole
    torn = tmp_path / "small.jsonl"
    for size, left in ((0, 0), (10, 0), (path.stat().st_size - 1, 23)):
        torn.write_bytes(path.read_bytes()[:size])
        plan, _ = ev.make_plan(model, tok, problems, 3, 0, rows[0]["settings"])
        assert len(ev.gather(torn, plan)) == left == torn.read_bytes().count(b"\n")
        assert torn.read_bytes() == b"".join(path.read_bytes().splitlines(keepends=True)[:left])


class Watching:
    """The tokenizer, noting how many samples are on disk whenever the next one is decoded."""

    def __init__(self, tok, path):
        self.tok, self.path, self.seen = tok, path, []

    def __getattr__(self, name):
        return getattr(self.tok, name)

    def decode(self, ids):
        self.seen.append(len(ev.read_samples(self.path)))
        return self.tok.decode(ids)


def test_every_sample_is_on_disk_the_moment_it_ends(whole, tmp_path):
    model, tok, problems, _, rows = whole
    watching = Watching(tok, tmp_path / "small.jsonl")
    ev.evaluate(model, watching, problems, watching.path, **SETTINGS)
    assert watching.seen == list(range(len(rows)))


def test_killed_ten_times(tmp_path, capfd, monkeypatch):
    """kill -9 at random moments of the whole command: in the end nothing can be told from it.

    The processes are forked, so that they need not import torch first.  Every other one is killed
    soon after it added a sample, however slow the machine is today; the rest may still be loading.
    """
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.chdir(ROOT)
    flags = ["--model", "data/tiny/distill", "--limit", "10", "--samples", "6", "--slots", "4",
             "--device", "cpu",
             "--out"]
    start = time.perf_counter()
    ev.main([*flags, str(tmp_path / "whole")])
    seconds, rng, found = time.perf_counter() - start, np.random.default_rng(0), []
    path = tmp_path / "killed" / "eval" / "tiny" / "data~tiny~distill.jsonl"
    count = lambda: path.read_bytes().count(b"\n") if path.exists() else 0
    for i in range(10):
        before, command = count(), [*flags, str(tmp_path / "killed")]
        process = multiprocessing.get_context("fork").Process(target=ev.main, args=(command,))
        process.start()
        while i % 2 and process.is_alive() and count() == before:
            time.sleep(0.002)
        process.join(rng.uniform(0, seconds / 8))
        process.kill()
        process.join()
        found.append(len(ev.read_samples(path)) if path.exists() else 0)
    assert found == sorted(found)
    assert len(set(found)) > 3, "each run went on where the one before was killed"
    ev.main([*flags, str(tmp_path / "killed")])
    assert f"{found[-1]} of 60 samples are already there" in capfd.readouterr().err
    for name in ("data~tiny~distill.jsonl", "summary.json"):
        undisturbed = tmp_path / "whole" / "eval" / "tiny" / name
        assert path.with_name(name).read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("parts", [1, 3])
def test_what_several_killed_processes_left_is_taken_over_by_one(whole, tmp_path, parts):
    model, tok, problems, path, rows = whole
    lines = path.read_bytes().splitlines(keepends=True)
    left = tmp_path / "small.jsonl"
    left.write_bytes(b"".join(lines[:3]))
    for i in range(parts):
        # torn
        left.with_name(f"small.jsonl.{i}").write_bytes(b"".join(lines[3 + i:-4:parts])
                                                       + lines[-1][:50])
    (tmp_path / "small.jsonl.old").write_text("another file\n")
    assert ev.evaluate(model, tok, problems, left, **SETTINGS) == rows
    assert left.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.jsonl", "small.jsonl.old"]


def test_two_processes_give_the_samples_of_one(whole, small, bench, tmp_path):
    """torchrun, going on from what another pair of processes left behind."""
    rows, label = whole[4], ev.label_of(small)
    path = tmp_path / "eval" / ev.label_of(str(bench)[:-6]) / f"{label}.jsonl"
    path.parent.mkdir(parents=True)
    mine = [row | {"settings": row["settings"] | {"label": label}} for row in rows]
    lines = [json.dumps(row) + "\n" for row in mine[4:9]]
    path.with_name(path.name + ".1").write_text("".join(lines) + '{"id": ')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "eval.py", "--model", small, "--bench", str(bench), "--samples", "3",
               "--max-new-tokens", "8", "--device", "cpu", "--temperature", "1", "--top-p", "1",
               "--out", str(tmp_path), "--prompt-file", str(tmp_path / "prompt.txt")]
    (tmp_path / "prompt.txt").write_text("{problem}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("5 of 24 samples are already there") == 1
    assert ev.read_samples(path) == mine and done.stdout.count("Pass@1") == 1
    found = {p.name for p in path.parent.iterdir()}
    assert found == {f"{label}.jsonl", "config.json", "summary.json"}
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary[label].items() >= ev.summarize(mine).items()


def test_processes_share_the_problems(monkeypatch):
    """Every missing sample is sampled once, and those of a problem by one process."""
    plan = {(str(i), j): {"id": str(i), "sample": j} for i in range(7) for j in range(2)}
    done = {("0", 0), ("0", 1), ("3", 1)}
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ev, "world", lambda: (rank, 3))
        shares.append([(row["id"], row["sample"]) for row in ev.my_share(plan, done)])
    assert sorted(sum(shares, [])) == sorted(plan.keys() - done)
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    assert not {key for key, _ in shares[0]} & {key for key, _ in shares[1]}


def test_samples_can_be_added_but_not_mixed(whole, tmp_path):
    model, tok, problems, path, rows = whole
    other = tmp_path / "small.jsonl"
    ev.evaluate(model, tok, problems, other, **SETTINGS | {"samples": 1})
    ev.evaluate(model, tok, problems, other, **SETTINGS)
    assert other.read_bytes() == path.read_bytes()
    for change, name in (({"temperature": 0.5}, "temperature 1.0"), ({"seed": 1}, "seed"),
                         ({"samples": 2}, "sample 2"), ({"max_new_tokens": 9}, "max_new_tokens 8")):
        with pytest.raises(ValueError, match=f"{name}.*--fresh"):
            ev.evaluate(model, tok, problems, other, **SETTINGS | change)
    with pytest.raises(ValueError, match="prompt.*--fresh"):
        ev.evaluate(model, tok, [p | {"problem": "Else?"} for p in problems], other, **SETTINGS)
    assert other.read_bytes() == path.read_bytes(), "a refused run leaves the file alone"
    fresh = ev.evaluate(model, tok, problems[:2], other, fresh=True,
                        **SETTINGS | {"temperature": 0.5})
    assert len(fresh) == 6 and ev.read_samples(other) == fresh


def test_samples_of_other_weights_are_not_taken_for_new(whole, small, tmp_path):
    model, tok, problems, path, _ = whole
    copy = tmp_path / "small.jsonl"
    copy.write_bytes(path.read_bytes())
    trained = load_model(small)
    trained.model.layers[0].mlp.up_proj.weight.data += 1e-4
    with pytest.raises(ValueError, match="weights.*--fresh"):
        ev.evaluate(trained, tok, problems, copy, **SETTINGS)


def test_a_corrected_answer_counts_without_sampling_again(whole, tmp_path):
    model, tok, problems, path, rows = whole
    copy = tmp_path / "small.jsonl"
    copy.write_bytes(path.read_bytes())
    said = next(r["extracted"] for r in rows
                if r["id"] == "0" and r["extracted"] and not r["correct"])
    again = ev.evaluate(model, tok, [problems[0] | {"answer": said}] + problems[1:], copy,
                        **SETTINGS)
    assert [r["completion"] for r in again] == [r["completion"] for r in rows]
    assert all(r["correct"] == (r["extracted"] == said) for r in again if r["id"] == "0")


def test_completions_end_with_the_positions_of_the_model(whole, tmp_path, capsys):
    """A small window only cuts samples short; a prompt that fills it is not asked."""
    model, tok, problems, path, rows = whole
    asked = problems[:3] + [{"id": "more", "problem": "Which of 1111?", "answer": "1"},
                            {"id": "long", "problem": "Which? " * 30, "answer": "1"}]
    free = ev.evaluate(model, tok, asked, tmp_path / "free.jsonl", **SETTINGS)
    free = {(r["id"], r["sample"]): r for r in free}
    length = len(tok.encode(free["0", 0]["prompt"]))
    assert "positions" not in capsys.readouterr().err
    model.config.max_position_embeddings = length + 7
    try:
        cut = ev.evaluate(model, tok, asked, tmp_path / "cut.jsonl", **SETTINGS)
        with pytest.raises(ValueError, match="the shortest prompt fills all"):
            ev.evaluate(model, tok, asked[4:], tmp_path / "none.jsonl", **SETTINGS)
    finally:
        model.config.max_position_embeddings = 256
    said = f"{length + 7} positions leave room for 0 to 7 new tokens; 1 of 5 prompts fill"
    assert said in capsys.readouterr().err
    assert {r["finish"] for r in cut} == {"stop", "length"}
    for row in cut:
        before = free[row["id"], row["sample"]]
        room = {"more": 4, "long": 0}.get(row["id"], 7)
        if before["tokens"] <= room:
            assert row == before
        else:
            assert (row["tokens"], row["finish"]) == (room, "length")
            assert before["completion"].startswith(row["completion"])
    assert not (tmp_path / "none.jsonl").exists(), "refused before anything is written"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def test_command_line_table_and_summary(whole, small, bench, tmp_path, capsys):
    other = f"random:{small}/config.json"
    flags = ["--bench", str(bench), "--samples", "2", "--max-new-tokens", "8", "--device", "cpu",
             "--out", str(tmp_path)]
    ev.main(["--model", small, other, *flags])
    out = capsys.readouterr().out.splitlines()
    directory = tmp_path / "eval" / ev.label_of(str(bench)[:-6])
    a, b = ev.label_of(small), ev.label_of(other)
    summary = json.loads((directory / "summary.json").read_text())
    assert list(summary) == [a, b] and "paired" not in summary[a]
    assert summary[b]["paired"]["against"] == a
    difference = summary[b]["pass@1"] - summary[a]["pass@1"]
    assert summary[b]["paired"]["difference"] == pytest.approx(difference)
    assert summary[a]["settings"]["temperature"] == 0.6 and summary[a]["settings"]["seed"] == 0
    assert (directory / "config.json").exists() and (directory / f"{a}.jsonl").exists()
    start = next(i for i, line in enumerate(out) if line.startswith("model"))
    header, rule, first, second = out[start:][:4]
    assert header.split()[:2] == ["model", "Pass@1"] and first.startswith(a)
    assert second.startswith(b)
    assert f"{summary[a]['pass@1']:.3f}" in first and "8 x 2" in second

    # Re-grading needs only the files, and gives the grades of the run.
    ev.main(["--regrade", str(directory / f"{a}.jsonl"), str(directory / f"{b}.jsonl")])
    again = capsys.readouterr().out.splitlines()
    assert again[2:] == out[out.index(header):len(again) - 2 + out.index(header)]
    assert out[-4].startswith("Asked (chat): PROBLEM Give the final answer within \\boxed{}.")
    assert all("0 of them graded differently" in line for line in again[:2])

    # A second command adds its label to the summary and keeps the others.
    ev.main(["--model", f"{other}@7", *flags])
    labels = list(json.loads((directory / "summary.json").read_text()))
    assert labels == [a, b, ev.label_of(f"{other}@7")]


def test_regrading_is_grading_at_run_time(whole):
    path, rows = whole[3:]
    assert ev.regrade([path]) == {"small": rows}
    assert {row["correct"] for row in rows} == {True, False}


def test_regrade_says_what_changed(whole, tmp_path):
    rows = whole[4]
    path = tmp_path / "old.jsonl"
    lines = [json.dumps(r | {"correct": not r["correct"]}) + "\n" for r in rows]
    path.write_text("".join(lines) + '{"id": "torn')
    assert ev.regrade([path]) == {"old": rows}
    path.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "prompt"}) + "\n")
    with pytest.raises(ValueError, match=":1: .*no 'prompt'"):
        ev.regrade([path])
    path.write_text((json.dumps(rows[0]) + "\n") * 2)       # as two writers leave it: no harm
    assert ev.regrade([path]) == {"old": rows[:1]}
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0] | {"completion": "?"}) + "\n")
    with pytest.raises(ValueError, match=":2: .*twice, and differs"):
        ev.regrade([path])
    for line in ("[1]", "{", json.dumps(rows[0] | {"settings": 1}),
                 json.dumps(rows[0] | {"id": []})):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="old.jsonl:1: "):
            ev.regrade([path])


@pytest.mark.parametrize("flags, message", [
    (["--greedy", "--temperature", "0.5"], "--temperature has no effect with greedy"),
    (["--greedy", "--samples", "4"], "--samples has no effect with greedy"),
    (["--temperature", "0", "--top-p", "0.9"], "--top-p has no effect with greedy"),
    (["--regrade", "x.jsonl", "--model", "m"], "--model has no effect with --regrade"),
    (["--samples", "0"], "--samples: 0 should be at least 1"),
    (["--limit", "-1"], "--limit: -1 should be at least 0"),
    (["--top-p", "0"], "--top-p: 0 should be finite, above 0"),
    (["--temperature", "nan"], "--temperature: nan should be finite"),
    (["--model", "m", "m"], "same model twice"),
    (["--bench", "math600"], "--bench math600: known names are"),
    (["--bench", "tiny,tiny"], "two of one name"), (["--bench", "x.json,x.jsonl"], "two of one name"),
    (["--bench", "no.jsonl"], "no.jsonl: no such file"),
    (["--regrade", "no.jsonl"], "no.jsonl: no such file"), (["--modle", "m"], "--model"),
    (["--grader", "resa"], "no flag '--grader'"), (["--slots", "many"], "--slots: invalid"),
    (["--dtype", "float8"], "--dtype: invalid choice"), (["--device", "gpu"], "gpu"),
    (["--prompt-file", "no.txt"], "no.txt"),
    (["--prompt-file", "requirements.txt"], "no {problem} in it"),
])
def test_flags_that_cannot_take_effect(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ev.main(flags)


def test_help_shows_every_flag_with_its_default(capsys):
    for argv, flags in ((["--help"], ["--bench", "--samples", "--regrade", "--dtype"]),
                        (["show", "--help"], ["FILE", "--wrong", "--id"])):
        with pytest.raises(SystemExit) as caught:
            ev.main(argv)
        said = capsys.readouterr().out
        assert caught.value.code == 0 and all(flag in said for flag in flags)
    ev.settings([])
    with pytest.raises(SystemExit):
        ev.main(["-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert "samples per problem (default: 1)" in said and "(default: 96)" in said


def test_a_config_file_and_flags_over_it(tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"samples": 4, "temperature": 0.3, "model": ["a", "b"], "greedy": true}')
    with pytest.raises(ValueError, match="--temperature has no effect with greedy"):
        ev.settings(["--config", str(path)])
    path.write_text('{"samples": 4, "temperature": 0.3, "model": ["a", "b"]}')
    args = ev.settings(["--config", str(path), "--samples", "2"])
    assert (args.samples, args.temperature, args.model) == (2, 0.3, ["a", "b"])


def test_greedy_is_one_sample_at_temperature_zero(small, bench, tmp_path, capsys):
    ev.main(["--model", small, "--bench", str(bench), "--greedy", "--limit", "3",
             "--max-new-tokens", "8",
             "--device", "cpu", "--out", str(tmp_path)])
    assert "3 x 1" in capsys.readouterr().out
    summary, = json.loads(next(tmp_path.glob("eval/*/summary.json")).read_text()).values()
    assert summary["settings"]["temperature"] == 0 and summary["method"] == "Wilson"


def test_mistakes_end_in_one_line():
    command = [sys.executable, "eval.py", "--bench", "aime26"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --bench aime26") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Published benchmarks, with made-up questions
# ------------------------------------------------------------------------------------------------

ASKED = [{"id": f"aime24-{60 + i}", "problem": f"What is {i} + 20?", "answer": str(20 + i)}
         for i in range(30)]


@pytest.fixture
def fetched(monkeypatch):
    """In place of the download, which tests/test_bench_data.py tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ev.prepare, "benchmark", lambda name: (ASKED, f"https://of.{name}/file"))


def test_a_benchmark_by_name_up_to_the_summary(fetched, tmp_path, monkeypatch, capsys):
    """Length limit and prompt are the published ones, not those of the embedded preset."""
    monkeypatch.setattr(ev, "MAX_NEW_TOKENS", 7)         # 32,768 takes the embedded model too long
    ev.main(["--bench", "aime24", "--model", "data/tiny/distill", "--limit", "4", "--device", "cpu",
             "--samples", "2", "--out", str(tmp_path)])
    assert "aime24, samples in" in capsys.readouterr().out
    folder = tmp_path / "eval" / "aime24"
    rows = ev.read_samples(folder / "data~tiny~distill.jsonl")
    assert [row["gold"] for row in rows[::2]] == ["20", "21", "22", "23"]
    assert rows[2]["id"] == "aime24-61"
    words = ev.MATHS_PROMPT.replace("{problem}", "What is 0 + 20?")
    assert rows[0]["prompt"] == f"<|user|>{words}<|assistant|><think>\n"
    summary = json.loads((folder / "summary.json").read_text())["data~tiny~distill"]
    assert summary["data"] == "https://of.aime24/file" and "grader" not in summary
    published = {"max_new_tokens": 7, "temperature": 0.6, "top_p": 0.95}
    assert summary["settings"].items() >= published.items()


def test_several_benchmarks_print_a_table_each(fetched, tmp_path, capsys):
    ev.main(["--bench", "aime24,tiny,amc23", "--model", "data/tiny/distill", "--limit", "2",
             "--device", "cpu", "--max-new-tokens", "4", "--out", str(tmp_path)])
    tables = capsys.readouterr().out
    assert tables.count("2 x 1") == 3 and tables.index("aime24, ") < tables.index("tiny, samples")
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"aime24", "tiny", "amc23"}


def test_all_names_every_published_benchmark(fetched):
    benches = ev.read_benches(ev.settings(["--bench", "all", "--limit", "2"]))
    assert list(benches) == ev.ALL == [name for name in ev.PUBLISHED if name != "gsm8k"]
    assert all(len(problems) == 2 for problems, _, _ in benches.values())
    assert benches["gpqa"][2] == ev.CHOICE_PROMPT and benches["minerva"][2] == ev.MATHS_PROMPT


@pytest.mark.parametrize("spec", ["data/tiny/distill", "stories260k"])
def test_all_of_aime24_end_to_end(fetched, shared, monkeypatch, tmp_path, capsys, spec):
    """The pipeline is what is shown: toys know no competition mathematics."""
    problems = read_problems(shared / "bench" / "aime24.jsonl")
    monkeypatch.setattr(ev.prepare, "benchmark", lambda name: (problems, "file"))
    if spec == "stories260k":                            # it comes without a chat template
        spec = str(tmp_path / spec)
        shutil.copytree(shared / "stories260k", spec)
        template = tmp_path / "stories260k" / "chat_template.jinja"
        template.write_text("{{ messages[0].content }}\n")
    ev.main(["--bench", "aime24", "--model", spec, "--max-new-tokens", "12", "--device", "cpu",
             "--out", str(tmp_path)])
    out, path = capsys.readouterr(), tmp_path / "eval" / "aime24" / f"{ev.label_of(spec)}.jsonl"
    rows = ev.read_samples(path)
    assert len(rows) == 30 and "30 x 1" in out.out and sum(row["correct"] for row in rows) < 3
    full = [row for row in rows if row["tokens"] == 0]
    assert f"{len(full)} of 30 prompts fill them all" in out.err and 0 < len(full) < 8
    ev.main(["--regrade", str(path)])
    assert "30 samples, 0 of them graded differently" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Looking at answers
# ------------------------------------------------------------------------------------------------

def test_show_prints_what_a_reader_needs(whole, tmp_path, capsys):
    rows = whole[4]
    ev.main(["show", str(whole[3])])
    out = capsys.readouterr().out
    assert out.count("==== problem ") == len(rows)
    assert out.endswith(f"24 of 24 samples, {sum(row['correct'] for row in rows)} of them right\n")
    ev.main(["show", str(whole[3]), "--wrong"])
    out, wrong = capsys.readouterr().out, [row for row in rows if not row["correct"]]
    assert out.count("WRONG") == len(wrong) and " right, " not in out and "Which of" in out
    ev.main(["show", str(whole[3]), "--id", "2"])
    out = capsys.readouterr().out
    assert out.count("==== problem 2, sample") == out.count("====  problem") + 3
    assert out.count("gold:      3") == 3
    for flags, message in ((["--id", "99"], "no such sample among its 24"),
                           (["--wring"], "--wrong")):
        with pytest.raises(ValueError, match=message):
            ev.main(["show", str(whole[3]), *flags])
    with pytest.raises(ValueError, match="eval.py show: .*required: FILE"):
        ev.main(["show", "--wrong"])


def test_show_keeps_long_and_hostile_text_readable(whole, tmp_path, capsys):
    """A long completion is shortened, except by --id; none can clear the screen, forge a grade."""
    thought = "\n".join(f"step {i}" for i in range(100))
    thought += "\x1b[2J\x1b]0;title\x07\r" + "word " * 60
    row = whole[4][0] | {"id": "a\x1b[1m", "completion": f"{thought}</think>\nso \x9b31m\t\u202e5",
                         "correct": False,
                         "extracted": "5\x08", "gold": "\x1b7"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for flags in ([], ["--id", "a\x1b[1m"]):
        ev.main(["show", str(path), *flags])
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out)
        told = [line for line in out.split("\n") if "word" in line or "step" in line]
        assert all(line.startswith("  | ") for line in told)      # nothing of it begins a line
        assert ("| step 50\n" in out) == bool(flags) and ("more lines: --id" in out) != bool(flags)
        assert "  | step 0\n" in out and "so \ufffd31m \ufffd5" in out
        assert "extracted: 5\ufffd" in out


def test_labels_are_file_names_one_to_one():
    specs = ["a/b", "a+b", "a+b*.5", "a+b*-.5", "a+b%2A.5", "a~b", "a%7Eb", "a b", "/a/b", "a/b/",
             "A+B", "o/n@main#sub+x/y", "..", "\u00fc", "x" * 300, "x" * 301, os.fsdecode(b"\xff"), os.fsdecode(b"x" * 300 + b"\xfe")]
    labels = [ev.label_of(spec) for spec in specs]
    assert len(set(labels)) == len(specs) and all("/" not in x and len(x) < 160 for x in labels)
    assert ev.label_of(f"{ROOT}/a+{ROOT}/b/c") == "a+b~c", "no machine paths in file names"


def test_the_report_says_what_a_comparison_cannot_tell():
    def rows(k, *right):
        return [sample(str(i), j, j < c) for i, c in enumerate(right) for j in range(k)]
    text, summaries = ev.report({"a": rows(4, *[2] * 20), "b": rows(4, *[3] * 5, *[2] * 15),
                                 "c": rows(4, *[3] * 6, *[2] * 14)})
    head, *words = text.split("\n\n")
    assert len(head.split("\n")) == 5 and "majority" in head
    assert words == ["b against a, no verdict: only 5 of 20 problems differ, and 6 are needed for "
                     "p < 0.05."]
    assert summaries["c"]["paired"]["withheld"] is None and summaries["c"]["paired"]["p"] < 0.05
    text, _ = ev.report({"a": rows(1, *[1, 0] * 10), "b": rows(1, *[0, 1] * 9, 1, 1)})
    assert "SE samples" not in text and "majority" not in text, "one sample cannot tell"
    # One model with one sample, the other with eight: nothing is said that nothing supports.
    for mine, control in ((rows(8, *[1] * 30), rows(1, *[1, 0, 0] * 10)),
                          (rows(1, *[0] * 20, *[1] * 10), rows(8, *[1, 0] * 15))):
        text, summaries = ev.report({"a": control, "b": mine})
        assert "\n\n" not in text and "needed" not in summaries["b"]["paired"]


def test_a_verdict_is_one_sentence():
    words = ["SAE-Tuning", "base", "is it better than doing nothing"]
    start = "Is it better than doing nothing? SAE-Tuning against base: "
    assert ev.verdict(*words, 0.1, 0.02, 0.2) == start + "+0.100 [+0.020, +0.200], better."
    assert ev.verdict(*words, -0.1, -0.2, -0.02) == start + "-0.100 [-0.200, -0.020], worse."
    unseen = start + "+0.100 [+0.000, +0.200], no difference is seen."
    assert ev.verdict(*words, 0.1, 0, 0.2) == unseen
    held = start + "+0.100 [-0.100, +0.200], no verdict: only 3 of 9 problems differ."
    assert ev.verdict(*words, 0.1, -0.1, 0.2, "only 3 of 9 problems differ") == held
    none = start + "+0.100, no interval, no verdict: 2 seeds."
    assert ev.verdict(*words, 0.1, None, None, "2 seeds") == none


def test_a_figure_is_xml_that_nothing_in_it_can_break():
    """Every arm is there with its value, at its place; the line at its own."""
    points = [("base", 0.5, 0.4, 0.6), ("<script>&\"' \x1b\x00]]>", 0.9, 0.85, 0.95),
              ("x" * 300, 0, 0, 0.1)]
    text = ev.figure(points, "a < b & c")
    root = xml.etree.ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    words = [node.text for node in root.iter(f"{name}text")]
    assert words[0] == "a < b & c" and "0.500 [0.400, 0.600]" in words
    assert "<script>&\"' \ufffd\ufffd]]>" in words and max(map(len, words)) < 31
    assert [float(node.get("cx")) for node in root.iter(f"{name}circle")] == [435, 583, 250]
    base, = (node for node in root.iter(f"{name}path") if node.get("class") == "base")
    assert base.get("d").startswith("M435.0 ") and "prefers-color-scheme: dark" in text
    assert "href" not in text and "url(" not in text, "nothing is fetched"
    assert "nan" not in ev.figure([("all wrong", 0, 0, 0)], "an axis without a width")
    assert 'class="base" d="M250.0 ' in ev.figure(points[::-1], "at 0")
    assert 'd="M259.2 64H610.' in ev.figure([("wide", 0.55, 0.31, 0.69)], "the axis holds intervals")


def test_table_is_aligned():
    lines = ev.table([["a", 1], ["long name", 1234]], ["model", "n"]).splitlines()
    assert lines == ["model         n", "---------------", "a             1", "long name  1234"]
