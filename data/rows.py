"""Questions: the rows of a file -> what is asked, and what the answer is.

    rows = read_problems("test.jsonl", columns("problem=question,answer=gold"))
    text = tokenizer.chat(messages_of(rows[0], OWN_PROMPT))

A row has "problem" (or "question") and "answer", maybe "id" and "system"; or it is a chat, whose
"messages" end in a user's turn that asks and, unless there is "answer", one that answers.
"""

import re

from data.files import REQUIRED, check, read_fields, read_jsonl, read_value

# What a question of one's own is asked with, so that the grader can find the answer.
OWN_PROMPT = "{problem}\n\nGive the final answer in \\boxed{}."

TEXT = (str, int, float)
PROBLEM = {name: (TEXT, None, None, None) for name in ("problem", "question", "answer", "id")}
PROBLEM["system"] = (str, None, None, None)
NAMES = (*PROBLEM, "text", "completion", "messages")
TURN = {"role": (("system", "user", "assistant"), None, None, REQUIRED),
        "content": (str, None, 2**20, REQUIRED)}

def blank(value):
    """Whether a field of a row says nothing: absent, null, or white space alone."""
    return value is None or not str(value).strip("\u200b\ufeff \t\r\n\f\v\u00a0\u3000")

def columns(text):
    """--fields "problem=question,answer=gold" -> {our name: the file's}."""
    found = dict(pair.partition("=")[::2] for pair in text.split(",") if pair)
    for name, column in found.items():
        check(name in NAMES and column, f"--fields {text}: NAME=COLUMN was expected, with a NAME "
              f"of {', '.join(NAMES)}")
    return found

def renamed(row, fields, where):
    """A row without its null fields, {our name: the file's} of them renamed."""
    row = {name: value for name, value in row.items() if value is not None}
    for name, column in fields.items():
        check(column in row, f"{where}: no field {column!r}, its fields are {', '.join(row)}")
    return row | {name: row[column] for name, column in fields.items()}

def turns_of(row, where):
    """The checked turns of a chat."""
    turns = read_value(row["messages"], [dict], 1, 1000, f"{where}: messages")
    return [read_fields(turn, TURN, f"{where}: messages") for turn in turns]

def question_of(row, where):
    """A chat -> a row whose "problem" is the last user's turn, which ends its "messages"."""
    turns = turns_of(row, where)
    asks = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    check(asks, f"{where}: messages in which no user asks")
    answers = [turn["content"] for turn in turns[asks[-1] + 1:]]
    answer = {"answer": answers[0]} if answers and blank(row.get("answer")) else {}
    turns = turns[:asks[-1] + 1]
    return row | answer | {"problem": turns[-1]["content"], "messages": turns}

# The end of a sentence, not of Dr. or St., and another one
SENTENCES = re.compile(r"(\w{4}|[\d)}\]$%])[.!?][\"')]*\s+[A-Z]\w*\s")

def final_answer(text, where):
    """A gold answer as text; of GSM8K's ".. #### 72" the 72.  ValueError: it is a solution."""
    text = text.rpartition("#### ")[2].strip()
    if "\\begin{" in text:              # a matrix, of many lines
        text = " ".join(text.split())
    check("\n" not in text and not SENTENCES.search(text), f'{where}: "answer" is a solution, not '
          "a final answer; name the column that has one: --fields answer=COLUMN")
    return text

def read_problems(path, fields=(), strict=True):
    """Rows of questions -> list of dicts with "problem", "answer" and "id" as text.
    fields  as of `columns`;  strict=False: answers stay as they are, be they whole solutions
    ValueError names the file and line of the first bad row: path:17: no "answer" field."""
    rows, ids = [], set()
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        row = renamed(row, dict(fields), where)
        if "messages" in row:
            row = question_of(row, where)
        found = read_fields(row, PROBLEM, where)
        problem = found["question"] if blank(found["problem"]) else found["problem"]
        for name, value in (("problem", problem), ("answer", found["answer"])):
            check(not blank(value), f'{where}: no "{name}" field, its fields are {", ".join(row)}; '
                  f"--fields {name}=COLUMN names one")
        answer = str(found["answer"])
        answer = final_answer(answer, where) if strict else answer
        key = str(len(rows) if blank(found["id"]) else found["id"])
        check(key not in ids, f"{where}: id {key!r} occurs twice")
        ids.add(key)
        rows.append(row | {"problem": str(problem), "answer": answer, "id": key})
    check(rows, f"{path}: no problems in it")
    return rows

def messages_of(row, prompt="{problem}", system=""):
    """A row -> the turns that ask it, as `prompt` says.  Its own "system" goes before `system`."""
    asked = prompt.replace("{problem}", row["problem"])      # format() would trip on braces
    turns = [*row.get("messages", ())[:-1], {"role": "user", "content": asked}]
    system = row.get("system") or system
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns
