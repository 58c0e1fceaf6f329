"""eval.py: grader table, statistics against closed forms and simulation, resume, re-grading, command line.

    python -m pytest tests/test_eval.py
"""

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as ev
from model import Config, Transformer, init_weights, load_model, load_tokenizer, save_model

HERE = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------------
# Extraction and grading
# ----------------------------------------------------------------------------------------------------------

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
    ("1\n2", None),
    ("first I add them and then I stop", None),
    ("9" * 41, None),
    ("", None),
]

GRADE = [
    (True, "7", "7"), (True, "7", "7.0"), (True, "7", "07"), (True, "025", "25"), (True, "27.0", "27"),
    (True, "1234", "1,234"), (True, "1,234", "1234"), (True, "1234567.5", "1,234,567.5"),
    (True, "1234", "1{,}234"), (True, "1234", r"1\,234"), (True, "1234", r"1\!234"), (True, "1234", "1 234"),
    (True, "1/2", "0.5"), (True, "1/2", r"\frac{1}{2}"), (True, r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (True, r"\frac12", "1/2"), (True, r"\tfrac{3}{4}", "0.75"), (True, r"-\frac{1}{2}", "-0.5"),
    (True, r"\frac{-1}{2}", "-1/2"), (True, "2/4", "1/2"), (True, "5/2", r"2\frac{1}{2}"),
    (True, "2.5", "2 1/2"), (True, "4e33", "4E33"), (True, "-1./3", "-1/3"), (True, "0", "-0"),
    (True, "5", "+5"), (True, "-5", "\u22125"), (True, "5", "$5$"), (True, "5", r"\$5"), (True, "5", "5."),
    (True, "C", r"\text{C}"), (True, "x+1", "x + 1"),
    (True, r"(1,\,2)", "(1, 2)"), (True, r"\left(1, 2\right)", "(1,2)"), (True, r"50\%", "50%"),
    (True, r"\sqrt{2}", r"\sqrt{2}"), (True, "1" * 400, "1" * 400),
    (True, r"x^\frac{1}{2}", r"x^\dfrac{1}{2}"),
    (False, "7", "8"), (False, "7", "-7"), (False, "12", "1 2"), (False, "1234", "1, 234"),
    (False, "1/3", "0.333"),
    (False, "21/2", r"2\frac{1}{2}"), (False, "0.5", "1/20"), (False, "1", "1/0"), (False, "x+1", "x-1"),
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
    assert ev.same_answer(answer, gold) is right, "grading is symmetric"


def test_prompt_that_opens_thinking():
    row = {"prompt": "Q<think>\n", "completion": r"\boxed{5}", "gold": "5"}
    assert ev.mark(row)["extracted"] is None, "it never stopped thinking"
    assert ev.mark(row | {"completion": "</think>5"})["correct"]
    assert ev.mark(row | {"prompt": "Q"})["correct"]


HOSTILE = {
    "open boxes": r"\boxed{" * 10_000, "nested boxes": r"\boxed{" * 10_000 + "1" + "}" * 10_000,
    "nested braces": r"\boxed{" + "{" * 10_000 + "}" * 10_000 + "}", "open braces": "{" * 1_000_000,
    "digits": r"\boxed{" + "7" * 90_000 + "}", "a megabyte of digits": "7" * 1_000_000,
    "power": r"\boxed{9^{9^{9}}}", "exponent": r"\boxed{1e999999999}", "exponents": r"\boxed{1e999/1e-999}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    "commas": r"\boxed{1" + ",000" * 700 + ",}", "blanks": "answer" + " " * 1_000_000,
    "answers": "answer is " * 100_000, "stars": "answer" + "*" * 1_000_000,
    "thoughts": "<think>" * 100_000 + "</think>" * 100_000, "backslashes": "\\" * 1_000_000,
    "zeros": r"\boxed{0." + "0" * 280 + "1}", "text": r"\boxed{" + r"\text{" * 300 + "}" * 300 + "}",
    "words": r"\boxed{" + "1 " * 1400 + "}", "nul": "\\boxed{\0}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_cost_little(name):
    start = time.perf_counter()
    assert not ev.grade("3", HOSTILE[name])
    assert not ev.grade("7" * 1_000_000, HOSTILE[name])
    assert time.perf_counter() - start < 2


# ----------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)
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


@pytest.mark.parametrize("P, k, a, b", [(40, 4, 500, 500), (40, 4, 0.4, 0.6), (100, 2, 2, 2), (30, 16, 1, 1),
                                        (60, 1, 1, 1)])
def test_interval_covers_the_truth_and_is_no_wider_than_needed(P, k, a, b):
    rng, hits, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        c = rng.binomial(k, rng.beta(a, b, P))
        low, high, method = ev.interval(c, np.full(P, k), resamples=600, seed=trial)
        assert method == ("Wilson" if k == 1 else "two-level bootstrap")
        hits += low <= a / (a + b) <= high
        widths.append(high - low)
    m = a / (a + b)
    between = m * (1 - m) / (a + b + 1)                            # of a Beta(a, b)
    true_se = math.sqrt((between + (m * (1 - m) - between) / k) / P)
    assert 0.90 <= hits / 200 <= 0.99
    # Counting sampling noise twice would give 1.3 in the first case.
    assert np.mean(widths) / (2 * 1.96 * true_se) == pytest.approx(1, abs=0.07)


def test_interval_at_the_edges():
    assert ev.interval([0] * 30, [4] * 30) == (*ev.wilson(0, 30), "Wilson")
    assert ev.interval([4] * 30, [4] * 30) == (*ev.wilson(30, 30), "Wilson")
    low, high, _ = ev.interval([2], [4])                      # one problem: sampling noise is all there is
    assert low < 0.5 < high
    low, high, _ = ev.interval([2, 2, 1], [4, 4, 1])               # an interrupted file is uneven
    assert 0 <= low < high <= 1
    assert ev.interval([1, 3, 2], [4, 4, 4]) == ev.interval([1, 3, 2], [4, 4, 4])


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
    exact = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9 for signs in itertools.product((-1, 1), repeat=9)]
    assert p == pytest.approx(np.mean(exact), abs=0.02)
    assert low <= mean <= high
    assert ev.paired_difference(np.zeros(20))[3] == 1


def test_paired_p_is_uniform_under_the_null_and_small_under_an_effect():
    rng = np.random.default_rng(2)
    p = [ev.paired_difference(rng.normal(size=40), resamples=10)[3] for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert ev.paired_difference(rng.normal(0.8, 1, size=40))[3] < 0.01


def sample(key, j, correct, **more):
    return {"id": key, "sample": j, "correct": correct, "tokens": 10, "finish": "stop", "extracted": "1",
            "seed": [0, 0, j], "settings": {}} | more


def test_summary_weighs_problems_alike():
    rows = [sample("a", 0, True), sample("a", 1, True), sample("a", 2, True), sample("b", 0, False)]
    rows[3] |= {"finish": "length", "extracted": None, "tokens": 30}
    s = ev.summarize(rows)
    assert (s["pass@1"], s["problems"], s["samples"], s["tokens"]) == (0.5, 2, 2, 15)       # not 3/4
    assert (s["truncated"], s["no_answer"]) == (0.25, 0.25)
    rows = [sample(key, j, j < right) for key, right in (("a", 1), ("b", 0)) for j in range(2)]
    assert ev.summarize(rows)["pass@2"] == 0.5


def test_pairs_need_the_same_problems():
    assert ev.paired([sample("a", 0, True)], [sample("a", 0, False)])["difference"] == 1
    with pytest.raises(ValueError, match="'b'"):
        ev.paired([sample("a", 0, True), sample("b", 0, True)], [sample("a", 0, True)])


# ----------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------

GOOD = '{"problem": "1+1?", "answer": 2}\n'


@pytest.mark.parametrize("text, message", [
    (GOOD + '{"problem": "2+2?"}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": null}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": ""}\n', ':2: no "answer" field'),
    (GOOD + '{"problem": "2+2?", "answer": ["4"]}\n', ':2: no "answer" field'),
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
        ev.read_problems(path)
    assert str(caught.value).startswith(f"{path}{message}") and "\n" not in str(caught.value)


def test_read_problems(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_bytes(b'{"question": "a?", "answer": 27.0}\n\n{"problem": "c", "answer": "x", "id": 7}')
    first, second = ev.read_problems(path)
    assert (first["id"], first["problem"], first["answer"]) == ("0", "a?", "27.0")
    assert (second["id"], second["answer"]) == ("7", "x")
    path.write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(ValueError, match="bench.jsonl"):
        ev.read_problems(path)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        ev.read_problems(tmp_path / "nowhere.jsonl")


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_bytes('{"problem": "a\u2028b\x85c", "answer": "1"}\n'.encode())
    assert ev.read_problems(path)[0]["problem"] == "a\u2028b\x85c"


def test_bench_names(tmp_path):
    assert len(ev.read_problems(ev.bench_path("tiny"))) >= 500
    with pytest.raises(ValueError, match="aime24.*not in this version.*path.jsonl"):
        ev.bench_path("aime24")
    with pytest.raises(ValueError, match="known names: tiny"):
        ev.bench_path("tinny")


# ----------------------------------------------------------------------------------------------------------
# The run, on a real (very small) model: it answers 1, 2 or 3 after a sum or none, and now and then rambles
# ----------------------------------------------------------------------------------------------------------

SETTINGS = dict(samples=3, max_new_tokens=8, temperature=1.0, top_p=1.0, label="small")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model directory: two blocks of width 32 with the embedded tokenizer, trained for a second."""
    torch.set_num_threads(1)
    source = next((HERE / "data" / "tiny").glob("*/tokenizer.json")).parent
    tok, rng = load_tokenizer(str(source)), np.random.default_rng(0)
    config = Config(vocab_size=tok.fast.get_vocab_size(), hidden_size=32, intermediate_size=64,
                    num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True,
                    max_position_embeddings=256, eos_token_id=tok.eos_id)
    model = init_weights(Transformer(config), seed=0)
    prompt = tok.encode(tok.chat([{"role": "user", "content": "Which?"}]))
    texts = [tok.encode(f"{rng.choice(['', '1+1=2'])}\n</think>\n{rng.integers(1, 4)}") + [tok.eos_id]
             for _ in range(7)] + [tok.encode("1+1=2\n1+1=2\n1+1=2\n")]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(160):
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
    model, tok, problems = load_model(small), load_tokenizer(small), ev.read_problems(bench)
    return model, tok, problems, path, ev.evaluate(model, tok, problems, path, **SETTINGS)


def test_the_run_records_what_happened(whole):
    model, tok, problems, path, rows = whole
    assert [(r["id"], r["sample"]) for r in rows] == [(str(i), j) for i in range(8) for j in range(3)]
    assert ev.read_samples(path) == rows
    assert {r["correct"] for r in rows} == {True, False} and {r["finish"] for r in rows} == {"stop", "length"}
    for row in rows:
        assert row["seed"] == [0, int(row["id"]), row["sample"]]
        assert row["gold"] == problems[int(row["id"])]["answer"]
        assert row["tokens"] == 8 if row["finish"] == "length" else 2 <= row["tokens"] <= 8
        assert row["correct"] == ev.grade(row["gold"], "<think>" + row["completion"])
    assert len({r["completion"] for r in rows if r["id"] == "0"}) > 1, "samples of one problem differ"


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.35, 0.6, 0.9, 1.0])
def test_an_interrupted_run_ends_in_the_same_bytes(whole, tmp_path, cut):
    model, tok, problems, path, rows = whole
    lines = path.read_bytes().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)                # on disk they come in the order they ended
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
        assert len(ev.resume(torn, plan)) == left == torn.read_bytes().count(b"\n")
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


def test_killed_for_real(whole, small, bench, tmp_path, capfd):
    """kill -9 as soon as the first samples are on disk, then the same command again."""
    flags = ["--model", small, "--bench", str(bench), "--samples", "24", "--slots", "4",
             "--max-new-tokens", "8", "--temperature", "1", "--top-p", "1", "--device", "cpu",
             "--out", str(tmp_path)]
    path = tmp_path / "eval" / ev.label_of(str(bench)[:-6]) / f"{ev.label_of(small)}.jsonl"
    process = subprocess.Popen([sys.executable, "eval.py", *flags], cwd=HERE)
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.002)
    process.kill()
    process.wait()
    found = len(ev.read_samples(path))
    ev.main(flags)
    out, err = capfd.readouterr()
    assert f"{found} of 192 samples are already there" in err
    model, tok, problems, _, rows = whole
    settings = SETTINGS | {"samples": 24, "label": path.stem}
    fresh = ev.evaluate(model, tok, problems, tmp_path / "fresh.jsonl", **settings)
    assert (tmp_path / "fresh.jsonl").read_bytes() == path.read_bytes()
    assert [r["completion"] for r in fresh if r["sample"] < 3] == [r["completion"] for r in rows]
    assert f"{ev.summarize(fresh)['pass@1']:.3f}" in out and "8 x 24" in out


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
    fresh = ev.evaluate(model, tok, problems[:2], other, fresh=True, **SETTINGS | {"temperature": 0.5})
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
    said = next(r["extracted"] for r in rows if r["id"] == "0" and r["extracted"] and not r["correct"])
    again = ev.evaluate(model, tok, [problems[0] | {"answer": said}] + problems[1:], copy, **SETTINGS)
    assert [r["completion"] for r in again] == [r["completion"] for r in rows]
    assert all(r["correct"] == (r["extracted"] == said) for r in again if r["id"] == "0")


def test_too_long_for_the_model(whole, tmp_path):
    model, tok, problems, _, _ = whole
    with pytest.raises(ValueError, match="--max-new-tokens.*256 positions"):
        ev.evaluate(model, tok, problems, tmp_path / "x.jsonl", **SETTINGS | {"max_new_tokens": 250})
    assert not list(tmp_path.iterdir()), "refused before anything is written"


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------

def test_command_line_table_and_summary(whole, small, bench, tmp_path, capsys):
    other = f"random:{small}/config.json"
    flags = ["--bench", str(bench), "--samples", "2", "--max-new-tokens", "8", "--device", "cpu",
             "--out", str(tmp_path)]
    ev.main(["--model", small, other, *flags])
    out = capsys.readouterr().out.splitlines()
    directory = tmp_path / "eval" / ev.label_of(str(bench)[:-6])
    a, b = ev.label_of(small), ev.label_of(other)
    summary = json.loads((directory / "summary.json").read_text())
    assert list(summary) == [a, b] and "paired" not in summary[a] and summary[b]["paired"]["against"] == a
    assert summary[b]["paired"]["difference"] == pytest.approx(summary[b]["pass@1"] - summary[a]["pass@1"])
    assert summary[a]["settings"]["temperature"] == 0.6 and summary[a]["settings"]["seed"] == 0
    assert (directory / "config.json").exists() and (directory / f"{a}.jsonl").exists()
    header, rule, first, second = out[-4:]
    assert header.split()[:2] == ["model", "Pass@1"] and first.startswith(a) and second.startswith(b)
    assert f"{summary[a]['pass@1']:.3f}" in first and "8 x 2" in second

    # Re-grading needs only the files, and gives the grades of the run.
    ev.main(["--regrade", str(directory / f"{a}.jsonl"), str(directory / f"{b}.jsonl")])
    again = capsys.readouterr().out.splitlines()
    assert again[-4:] == [header, rule, first, second] and "0 of them graded differently" in again[0]

    # A second command adds its label to the summary and keeps the others.
    ev.main(["--model", f"{other}@7", *flags])
    assert list(json.loads((directory / "summary.json").read_text())) == [a, b, ev.label_of(f"{other}@7")]


def test_regrade_says_what_changed(whole, tmp_path):
    rows = whole[4]
    path = tmp_path / "old.jsonl"
    lines = [json.dumps(r | {"correct": not r["correct"]}) + "\n" for r in rows]
    path.write_text("".join(lines) + '{"id": "torn')
    assert ev.regrade([path]) == {"old": rows}
    path.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "prompt"}) + "\n")
    with pytest.raises(ValueError, match=':1: .*no "prompt" field'):
        ev.regrade([path])
    path.write_text((json.dumps(rows[0]) + "\n") * 2)
    with pytest.raises(ValueError, match=":2: .*twice"):
        ev.regrade([path])
    for line in ("[1]", "{", json.dumps(rows[0] | {"settings": 1}), json.dumps(rows[0] | {"id": []})):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="old.jsonl:1: "):
            ev.regrade([path])


@pytest.mark.parametrize("flags, message", [
    (["--greedy", "--temperature", "0.5"], "--temperature has no effect in greedy"),
    (["--greedy", "--samples", "4"], "--samples has no effect in greedy"),
    (["--temperature", "0", "--top-p", "0.9"], "--top-p has no effect in greedy"),
    (["--regrade", "x.jsonl", "--model", "m"], "--model has no effect with --regrade"),
    (["--samples", "0"], "--samples is 0"), (["--limit", "-1"], "--limit is -1"),
    (["--top-p", "0"], "top_p 0"),
    (["--temperature", "nan"], "temperature nan"), (["--model", "m", "m"], "same model twice"),
    (["--bench", "math500"], "math500.*not in this version"),
    (["--bench", "no.jsonl"], "no.jsonl: no such file"),
    (["--regrade", "no.jsonl"], "no.jsonl: no such file"), (["--modle", "m"], "--model"),
])
def test_flags_that_cannot_take_effect(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ev.main(flags)


def test_greedy_is_one_sample_at_temperature_zero(small, bench, tmp_path, capsys):
    ev.main(["--model", small, "--bench", str(bench), "--greedy", "--limit", "3", "--max-new-tokens", "8",
             "--device", "cpu", "--out", str(tmp_path)])
    assert "3 x 1" in capsys.readouterr().out
    summary, = json.loads(next(tmp_path.glob("eval/*/summary.json")).read_text()).values()
    assert summary["settings"]["temperature"] == 0 and summary["method"] == "Wilson"


def test_mistakes_end_in_one_line():
    command = [sys.executable, "eval.py", "--bench", "aime24"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --bench aime24") and done.stderr.count("\n") == 1


def test_labels_are_file_names_one_to_one():
    specs = ["a/b", "a~b", "a%7Eb", "a b", "/a/b", "a/b/", "A+B", "o/n@main#sub+x/y", "..", "\u00fc",
             "x" * 300, "x" * 301]
    labels = [ev.label_of(spec) for spec in specs]
    assert len(set(labels)) == len(specs) and all("/" not in x and len(x) < 160 for x in labels)
    assert ev.label_of(f"{HERE}/a+{HERE}/b/c") == "a+b~c", "no machine paths in file names"


def test_table_is_aligned():
    lines = ev.table([["a", 1], ["long name", 1234]], ["model", "n"]).splitlines()
    assert lines == ["model         n", "---------------", "a             1", "long name  1234"]
