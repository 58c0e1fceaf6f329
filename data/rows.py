"""Questions: the rows of a file -> what is asked, and what the answer is.

    rows = read_problems("test.jsonl", read_columns("problem=question,answer=gold"))
    text = tokenizer.chat(messages_of(rows[0], prompt_of("test.jsonl")))

A row has "problem" (or "question") and "answer", maybe "id" and "system"; or it is a chat, whose
"messages" end in a user's turn that asks and, unless there is "answer", one that answers.
"""

import os
import re
from pathlib import Path

from data.files import REQUIRED, ROOT, check, embedded, read_fields, read_jsonl

def blank(value):
    """Whether a field of a row says nothing: absent, null, or white space alone."""
    return value is None or not str(value).strip("\u200b\ufeff \t\r\n\f\v\u00a0\u3000")

TEXT = (str, int, float)
PROBLEM = {name: (TEXT, None, None, None) for name in ("problem", "answer", "id")}
PROBLEM |= {"system": (str, None, None, None)}
CHAT = {"messages": ([dict], 1, None, REQUIRED), "system": (str, None, None, None)}
TURN = {"role": (("system", "user", "assistant"), None, None, REQUIRED),
        "content": (str, None, 2**20, REQUIRED)}
COLUMNS = ("problem", "answer", "id", "system", "messages", "completion", "text")

# Own questions end with our sentence, so that the answer stands where the grader looks.
OWN_PROMPT = "{problem}\n\nGive the final answer within \\boxed{}."

def is_own(path):
    """Whether a file is the user's: neither of the embedded family nor a fetched set."""
    names = os.path.abspath(path), os.path.realpath(path)        # the cache may be a link
    return not any(embedded(name) or Path(name).is_relative_to(ROOT / "data" / "cache")
                   for name in names)

def prompt_of(path):
    """What the questions of a file are asked with, in eval.py and in RL alike."""
    return OWN_PROMPT if is_own(path) else "{problem}"

def read_columns(text):
    """--fields "problem=prompt,answer=gold" -> {our name: the file's column}."""
    columns = {}
    for word in filter(None, text.split(",")):
        name, _, column = word.partition("=")
        check(name in COLUMNS and column and name not in columns,
              f"--fields {word}: NAME=COLUMN was expected, each of {', '.join(COLUMNS)} once")
        columns[name] = column
    return columns

def named_rows(path, columns):
    """Yields (path:line, row), with the columns of --fields under our names and without nulls."""
    asks = {"problem", "question", "messages"}           # one of them is what a row asks
    for number, row in read_jsonl(path):
        where, hidden = f"{path}:{number}", set()
        for name, column in columns.items():
            check(column in row, f"{where}: no column {column!r}; {one_of(row, name)}")
        if columns.keys() & asks:        # what is named counts, and nothing in its place
            hidden |= asks
        if "answer" in columns:          # then rows are questions
            hidden |= {"text", "completion"}
        named = {name: row[column] for name, column in columns.items()}
        row = {name: x for name, x in row.items() if name not in hidden} | named
        if blank(row.get("problem")) and "question" in row:
            row["problem"] = row["question"]
        yield where, {name: value for name, value in row.items() if value is not None}

def one_of(row, name):
    return f"name it with --fields {name}=COLUMN, one of {', '.join(row)}"

def is_chat(row):
    return "messages" in row and blank(row.get("problem"))

def read_chat(row, where):
    """A row of "messages", maybe with a "system" -> these, each turn with role and content."""
    found = read_fields(row, CHAT, where)
    found["messages"] = [read_fields(turn, TURN, f"{where}: turn {i} of \"messages\"")
                         for i, turn in enumerate(found["messages"], start=1)]
    check(found["system"] is None or found["messages"][0]["role"] != "system",
          f'{where}: a "system" and a system turn in "messages"')
    return {name: value for name, value in found.items() if value is not None}

def messages_of(row, prompt="{problem}", system=""):
    """A row -> the turns that go into a chat template, the last one put into `prompt`.
    system  for rows without their own: what stands in a row is part of its question"""
    turns = row.get("messages") or [{"role": "user", "content": row["problem"]}]
    *before, last = turns
    asked = prompt.replace("{problem}", last["content"])         # format() would trip on braces
    system = row.get("system") or system
    if system and turns[0]["role"] != "system":
        before = [{"role": "system", "content": system}, *before]
    return [*before, last | {"content": asked}]

def read_problems(path, columns={}):
    """Rows of "problem" (or "question", or "messages"), "answer", maybe "id" and "system" -> list
    of dicts with these as text.  Of a chat, "messages" ends with the turn of the user that asks,
    and a last turn of the assistant is the answer if there is no "answer".
    ValueError names the file and line of the first bad row: path:17: no "answer" field."""
    rows, ids, own = [], set(), is_own(path)
    for where, row in named_rows(path, columns):
        if is_chat(row):
            row |= question_of(row, where)
        else:
            row.pop("messages", None)    # a row that has a "problem", too
        found = read_fields(row, PROBLEM, where)
        for name in ("problem", "answer"):
            check(not blank(found[name]), f'{where}: no "{name}" field; {one_of(row, name)}')
        answer = final_answer(str(found["answer"]))
        check(not own or not is_solution(answer), f'{where}: "answer" is a solution, not a final '
              "answer; name the column that has it: --fields answer=COLUMN")
        key = str(len(rows) if blank(found["id"]) else found["id"])
        check(key not in ids, f"{where}: id {key!r} occurs twice")
        ids.add(key)
        rows.append(row | {"problem": str(found["problem"]), "answer": answer, "id": key})
    check(rows, f"{path}: no problems in it")
    return rows

def question_of(row, where):
    """Of a chat, what is asked: the turns up to the last of the user; and what is the answer."""
    turns = read_chat(row, where)["messages"]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    check(last >= 0, f'{where}: no turn of the user in "messages"')
    found = {"messages": turns[:last + 1], "problem": turns[last]["content"]}
    if turns[-1]["role"] == "assistant" and blank(row.get("answer")):
        found["answer"] = turns[-1]["content"]
    return found

# ---- Gold answers: a final answer, not how one comes to it -------------------------------------

# One thing, of many lines.  Its length is bounded, as each \\begin may lack its \\end.
MATRIX = re.compile(r"(?s)\\begin\{(\w{0,9}matrix|array|cases)\}.{0,999}?\\end\{\1\}")
ABBREVIATIONS = set("""am approx avg cm cu dept est etc ft hr hrs in kg km lb lbs max mi min mm no
    oz pm sec sq vs yd""".split())

def final_answer(text):
    """The X of GSM8K's last line, "#### X"; any other text as it is."""
    _, mark, last = text.rpartition("####")
    last = last.strip()
    return last if mark and last and "\n" not in last else text

def is_solution(text):
    """Whether a text has several lines, or a sentence with another one after it."""
    lines = [line for line in MATRIX.sub("x", text).split("\n") if line.strip(" \t\r$[]\\`")]
    words = text.split()
    triples = zip(["", *words], words, words[1:])
    return (len(lines) > 1 or bool(re.search(r"[。！？]\s*\w", text))
            or any(ends_sentence(*triple) for triple in triples))

def ends_sentence(before, word, after):
    """Whether a sentence ends with `word`.  No name, abbreviation or numbering ends one: Dr. Smith,
    U.S. dollars, p.m. Monday, 1. Paris."""
    word, core = word.rstrip("\"')"), word.rstrip("\"').!?")
    if not word.endswith((".", "!", "?")) or not after.lstrip("\"'($")[:1].isupper():
        return False
    if core[-1:].isdigit():
        counted = before.isalpha() and before.islower()         # has 5. The
        return counted or "=" in core or before in ("=", "+", "-", "*", "/")
    if core.isalpha():
        return core.islower() and len(core) > 1 and core not in ABBREVIATIONS
    return core.endswith(("}", "]", "$", "%"))
