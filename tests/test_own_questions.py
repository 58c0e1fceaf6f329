"""Questions of one's own: columns, gold answers, chats, system prompts; how they are asked, and how long answers are."""
import contextlib
import json
import shutil
import time

import pytest

import eval
import model
import train
from data import prepare
from data.files import read_json
from data.grade import grade
from data.rows import OWN_PROMPT, is_solution, messages_of, read_columns, read_problems
from tests.conftest import ROOT

DISTILL = f"{ROOT}/data/tiny/distill"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "4"}]
SOLUTION = "She has 3 apples and buys 4. So she has 7.\n3 + 4 = <<3+4=7>>7"
ASK = ["--limit", "3", "--device", "cpu", "--max-new-tokens", "6"]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples(out):
    path, = out.glob("eval/*/*.jsonl")
    return eval.read_samples(path)


def evaluate(tmp_path, *words, name="out"):
    eval.main(["--model", DISTILL, *ASK, "--out", str(tmp_path / name), *map(str, words)])
    return samples(tmp_path / name)


@pytest.fixture
def own(tmp_path):
    """Writes rows -> the path of the file."""
    return lambda *rows: write(tmp_path / "own.jsonl", *rows)


def refused(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- columns, answers --------------------------------------------------------------------------------------

def test_columns_have_other_names(tmp_path):
    path = write(tmp_path / "q.jsonl", {"q": "What is 1+1?", "gold": 2, "key": "a", "problem": "not this"})
    row, = evaluate(tmp_path, "--bench", path, "--fields", "problem=q,answer=gold,id=key")
    assert row["id"] == "a" and row["gold"] == "2" and "What is 1+1?" in row["prompt"]
    path = write(tmp_path / "t.jsonl", *({"q": f"What is {i} + 1?", "gold": i + 1} for i in range(80)))
    for stage, more in (("sft", []), ("rl", ["--questions", "1", "--group", "2", "--max-new-tokens", "2"])):
        train.main(["--stage", stage, "--preset", "tiny", "--data", path, "--fields", "problem=q,answer=gold", "--steps",
                    "1", "--device", "cpu", "--out", str(tmp_path / stage), *more])
    assert "+ 1?" in train.read_rows(path, read_columns("problem=q,answer=gold"))[0]["problem"]


@pytest.mark.parametrize("words, said", [
    ([], 'q.jsonl:1: no "answer" field; name it with --fields answer=COLUMN, one of question, gold'),
    (["--fields", "answer=result"], "q.jsonl:1: no column 'result'; name it with --fields answer=COLUMN, one of question"),
    (["--fields", "reply=gold"], "--fields reply=gold: NAME=COLUMN was expected, each of problem, answer"),
    (["--fields", "answer"], "--fields answer: NAME=COLUMN was expected"),
])
def test_a_column_that_is_not_there_is_named_beside_those_that_are(words, said, tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "1+1?", "gold": "2"})
    for main, more in ((eval.main, ["--bench", path]), (train.main, [
            "--stage", "sft", "--preset", "tiny", "--data", path, "--device", "cpu"])):
        with pytest.raises(ValueError) as caught:
            main([*more, *words, "--out", str(tmp_path / "o")])
        assert said in str(caught.value) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["answer", "answer=", "gold=x", "=x", "answer=a,answer=b"])
def test_fields_that_are_none(text):
    assert refused(lambda: read_columns(text), "--fields", "NAME=COLUMN", "problem, answer")


def test_a_named_column_is_never_replaced_by_another(own):
    path = own({"prompt": " ", "question": "q", "messages": CHAT, "gold": "1"})
    assert refused(lambda: read_problems(path, {"problem": "prompt", "answer": "gold"}), 'no "problem"')
    path = own({"talk": CHAT, "problem": "p", "answer": "5"})
    assert read_problems(path, {"messages": "talk"})[0]["problem"] == "And 2+2?"


def test_the_number_after_the_hashes_is_the_gold_of_gsm8k(tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "How many?", "answer": "She has 8 of them.\nThen 9 times 8.\n#### 72"},
                 {"question": "How much?", "answer": "It is so.\n#### 1,234"})
    assert [row["gold"] for row in evaluate(tmp_path, "--bench", path)] == ["72", "1,234"]
    assert grade("1,234", "\\boxed{1234}")


@pytest.mark.parametrize("gold", [
    SOLUTION, SOLUTION.replace("\n", " "), f"{SOLUTION}\n#### ", "3\n4", "a\r\nb",
    "She has 5. So it is 7.", "5 + 3 = 8. The answer is 8.", "2+3=5. Then 5*2=10.", "It is $5$. Hence 3.",
    "First add them. Then divide.", "What is it? It is 5.", "小明有5个。所以答案是7。",
    "#### He eats two apples. She eats three."])
def test_a_solution_is_no_final_answer(gold, tmp_path):
    path = write(tmp_path / "q.jsonl", {"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": gold})
    with pytest.raises(ValueError, match='q.jsonl:2: "answer" is a solution, not a final answer; name the column'):
        evaluate(tmp_path, "--bench", path)
    with pytest.raises(ValueError, match="is a solution"):
        train.main(["--stage", "tune", "--preset", "tiny", "--data", path, "--splice", "none", "--teacher", "source"])


@pytest.mark.parametrize("answer", [
    "Dr. Smith", "St. Louis", "x = 1. 5", "U.S. dollars", "U.S. Dollars", r"$\frac{1}{2}$",
    "a.m. or p.m.", "10 p.m. Monday", "3.14", "1,234.5", "Mr. and Mrs. Smith", "J. K. Rowling",
    "1. Paris", "Answer: 1. Paris", "(A) 5. (B) 7", "5 ft. 3 in.", "Washington, D.C.", "1. e4 e5 2. Nf3",
    "5 ft. Tall", "approx. Fifty", "tea etc. Ltd.", "The answer is 5.", "5!", "42\n", "$$\nx^2\n$$", "Who's Afraid of Virginia Woolf? Part Two",
    "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", "是的。"])
def test_a_final_answer_is_none(own, answer):
    assert not is_solution(answer)
    assert read_problems(own({"problem": "q", "answer": answer}))[0]["answer"] == answer


@pytest.mark.parametrize("answer", [
    "\\begin{array}" * 70_000, "####" * 250_000, "。" * 10**6, "a. " * 340_000, "= 5. A " * 140_000,
    "\\begin{" + "x" * 10**6, "####\t" * 200_000 + "\n"])
def test_a_long_answer_takes_no_long_time(own, answer):
    path, start = own({"problem": "q", "answer": answer}), time.thread_time()
    with contextlib.suppress(ValueError):
        read_problems(path)
    assert time.thread_time() - start < 3


def test_gsm8k_is_a_benchmark_by_name(monkeypatch, tmp_path):
    assert "gsm8k" in eval.BENCHES and "gsm8k" in eval.PUBLISHED
    row = {"question": "How many?", "answer": "8 times 9 is <<8*9=72>>72\n#### 72"}
    assert prepare.as_problem("gsm8k", row, 7) == {"id": "gsm8k-7", "problem": "How many?", "answer": "72"}
    url = prepare.SOURCES["gsm8k"]["url"]
    assert url.startswith("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5") and url.endswith("/test.jsonl")


# ---- chats and system prompts ------------------------------------------------------------------------------

@pytest.fixture
def chatty(tmp_path):
    """The base with a template that shows every role."""
    shutil.copytree(DISTILL, tmp_path / "chatty")
    (tmp_path / "chatty/chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return str(tmp_path / "chatty")


def test_a_chat_asks_its_last_question_and_holds_its_answer(tmp_path, chatty):
    path = write(tmp_path / "q.jsonl", {"messages": CHAT}, {"messages": CHAT[:-1], "answer": "four"},
                 {"messages": CHAT, "answer": 5})
    eval.main(["--model", chatty, *ASK, "--out", str(tmp_path / "o"), "--bench", path])
    rows = samples(tmp_path / "o")
    assert [row["gold"] for row in rows] == ["4", "four", "5"]
    asked = OWN_PROMPT.replace("{problem}", "And 2+2?")
    assert {row["prompt"] for row in rows} == {f"<|system|>Be brief.<|user|>1+1?<|assistant|>2<|user|>{asked}<|assistant|>"}


def test_training_reads_whole_chats(tmp_path, chatty):
    path = write(tmp_path / "q.jsonl", *[{"messages": CHAT}] * 30)
    row, tokenizer = train.read_rows(path)[0], model.load_tokenizer(chatty)
    text = "<|system|>Be brief.<|user|>1+1?<|assistant|>2<|user|>And 2+2?<|assistant|>4"
    assert train.as_text(row, tokenizer, "chat") == text
    train.main(["--stage", "sft", "--target", chatty, "--data", path, "--steps", "1", "--device", "cpu", "--out",
                str(tmp_path / "o")])
    assert read_json(tmp_path / "o/summary.json")["steps"] == 1


def test_a_chat_beside_a_problem_is_not_read(own):
    """As NuminaMath has it: the conversation is the solution."""
    row, = read_problems(own({"problem": "p", "answer": "1", "messages": CHAT}))
    assert messages_of(row) == [{"role": "user", "content": "p"}]
    row, = train.read_rows(own({"problem": "p", "answer": "1", "messages": "not even a list"}))
    assert "messages" not in row


@pytest.mark.parametrize("row, word", [
    ({"messages": []}, "'messages'"), ({"messages": "x"}, "'messages'"), ({"messages": ["x"]}, "messages"),
    ({"messages": [{"role": "human", "content": "x"}]}, "turn 1 of \"messages\": 'role'"),
    ({"messages": [*CHAT, {"role": "user"}]}, "turn 6 of \"messages\": no 'content'"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "'content' should be text"),
    ({"messages": CHAT, "system": "Twice."}, '"system" and a system turn'),
    ({"messages": CHAT, "system": 7}, "'system' should be text")])
def test_a_bad_chat_is_named_by_its_line_and_turn(own, row, word):
    path = own({"messages": CHAT}, row)
    assert refused(lambda: read_problems(path), f"{path}:2: ", word)
    assert refused(lambda: train.read_rows(path), f"{path}:2: ", word)


@pytest.mark.parametrize("row, word", [
    ({"messages": CHAT[:1]}, "no turn of the user"), ({"messages": CHAT[:2]}, 'no "answer"'),
    ({"messages": [*CHAT[:2], {"role": "assistant", "content": SOLUTION}]}, "is a solution"),
    ({"messages": CHAT, "answer": SOLUTION}, "is a solution"),
    ({"messages": [{"role": "user", "content": " "}], "answer": 1}, 'no "problem"')])
def test_a_chat_that_asks_nothing_or_has_no_final_answer(own, row, word):
    path = own({"messages": CHAT}, row)
    assert refused(lambda: read_problems(path), f"{path}:2: ", word)
    assert len(train.read_rows(path)) == 2, "a text all the same"


def test_a_chat_after_questions_is_refused_in_training(own):
    path = own({"problem": "p", "answer": "1"}, {"messages": CHAT})
    assert refused(lambda: train.read_rows(path), "row 2 has a text or completion or messages")


def test_the_system_of_a_row_reaches_the_template(tmp_path, chatty):
    path = write(tmp_path / "q.jsonl", {"problem": "1+1?", "answer": "2", "system": "Own."}, {"problem": "2+2?", "answer": "4"})
    eval.main(["--model", chatty, *ASK, "--out", str(tmp_path / "o"), "--bench", path, "--system", "All."])
    assert [row["prompt"].split("<|user|>")[0] for row in samples(tmp_path / "o")] == ["<|system|>Own.", "<|system|>All."]
    first, second = train.read_rows(path)
    tokenizer = model.load_tokenizer(chatty)
    assert train.as_text(first, tokenizer, "chat").startswith("<|system|>Own.<|user|>1+1?<|assistant|>")
    assert train.as_text(second, tokenizer, "chat").startswith("<|user|>2+2?")
    row = {"problem": "p", "completion": "c", "system": "Own."}
    path = write(tmp_path / "c.jsonl", row)
    assert train.as_text(train.read_rows(path)[0], tokenizer, "chat") == "<|system|>Own.<|user|>p<|assistant|>c"


def test_rl_asks_as_eval_will(tmp_path, chatty, monkeypatch):
    asked = []
    collect = train.collect

    def noted(lm, requests, **settings):
        asked.extend(lm_tokenizer.decode(ids, skip_special=False) for ids, _ in requests)
        return collect(lm, requests, **settings)
    lm_tokenizer = model.load_tokenizer(chatty)
    monkeypatch.setattr(train, "collect", noted)
    path = write(tmp_path / "q.jsonl", {"problem": "1+1?", "answer": "2", "system": "Own."})
    train.main(["--stage", "rl", "--target", chatty, "--data", path, "--steps", "1", "--lr", "1e-4", "--questions", "1",
                "--group", "2", "--max-new-tokens", "2", "--device", "cpu", "--out", str(tmp_path / "rl")])
    eval.main(["--model", chatty, *ASK, "--out", str(tmp_path / "o"), "--bench", path])
    assert set(asked) == {samples(tmp_path / "o")[0]["prompt"]}


# ---- how they are asked, and how long answers are ----------------------------------------------------------

def test_own_questions_are_asked_for_what_the_grader_reads(tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", {"problem": "1+1? {so}", "answer": "2"})
    row, = evaluate(tmp_path, "--bench", path)
    assert "1+1? {so}\n\nGive the final answer within \\boxed{}." in row["prompt"]
    assert grade("2", "It is \\boxed{2}.") and messages_of({"problem": "p"}, OWN_PROMPT)[0]["content"].endswith("\\boxed{}.")
    said = capsys.readouterr().out
    assert "Asked (chat): PROBLEM Give the final answer within \\boxed{}.\nAt most 6 new tokens, temperature 0.6, top-p 0.95" in said
    (tmp_path / "p.txt").write_text("Q: {problem}")
    row, = evaluate(tmp_path, "--bench", path, "--prompt-file", tmp_path / "p.txt", name="other")
    assert "Q: 1+1? {so}<" in row["prompt"] and "Asked (chat): Q: PROBLEM\n" in capsys.readouterr().out
    tiny = evaluate(tmp_path, "--bench", ROOT / "data/tiny/test.jsonl", name="tiny")
    assert tiny[0]["prompt"].startswith("<|user|>") and "boxed" not in tiny[0]["prompt"]


def test_own_questions_have_the_models_own_limit(tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", *({"problem": f"{i}+1?", "answer": i + 1} for i in range(4)))
    eval.main(["--model", f"random:{ROOT}/data/tiny/init/config.json", "--bench", path, "--device", "cpu", "--out",
               str(tmp_path / "o")])
    said = capsys.readouterr().out                   # a model of random weights rarely ends
    assert max(row["tokens"] for row in samples(tmp_path / "o")) > 400
    assert "of the answers were cut off: the model has no more positions." in said
    evaluate(tmp_path, "--bench", path, name="short")
    assert "% of the answers were cut off: --max-new-tokens raises the limit." in capsys.readouterr().out
    evaluate(tmp_path, "--bench", "tiny", "--max-new-tokens", 96, name="tiny")
    assert "cut off" not in capsys.readouterr().out


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path):
    shutil.copytree(DISTILL, tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink(missing_ok=True)
    config = read_json(tmp_path / "bare/tokenizer_config.json")
    (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    path = write(tmp_path / "q.jsonl", *[{"problem": "1+1?", "answer": "2", "system": "Be brief."}] * 3)
    asks = ["--model", str(tmp_path / "bare"), "--bench", path, *ASK, "--out", str(tmp_path / "o")]
    learns = ["--target", str(tmp_path / "bare"), "--data", path, "--steps", "1", "--device", "cpu", "--seq-len", "16"]
    rl = [*learns[:-2], "--lr", "1e-4", "--questions", "1", "--group", "2", "--max-new-tokens", "2"]
    for main, words in ((eval.main, asks), (train.main, ["--stage", "sft", *learns]), (train.main, ["--stage", "rl", *rl])):
        with pytest.raises(ValueError, match="no chat_template: --template plain asks in plain text"):
            main(words)
    eval.main([*asks, "--template", "plain"])
    asked = OWN_PROMPT.replace("{problem}", "1+1?")
    assert samples(tmp_path / "o")[0]["prompt"] == f"Be brief.\n\n{asked}\n\n"
    for stage, words in (("sft", learns), ("rl", rl)):
        train.main(["--stage", stage, *words, "--template", "plain", "--out", str(tmp_path / stage)])
    tokenizer = model.load_tokenizer(str(tmp_path / "bare"), "plain")
    assert train.as_text(train.read_rows(path)[0], tokenizer, "plain") == "Be brief.\n\n1+1?\n\n<think>\n2\n</think>\n2"
