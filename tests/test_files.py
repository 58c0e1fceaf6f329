"""data/files.py and data/flags.py: what comes in from outside, how results go out, command lines.

Real files and real processes; checkpoints and adapters, which stand on this, are in test_model.py.
"""

import argparse
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import files, flags
from data.files import (
    REQUIRED, check, check_tensors, locate, open_tensors, parse_json, printable, read_fields,
    read_json, read_jsonl, read_text, read_value, refuse_unknown, relative, shorten,
    staged, write_json, write_jsonl)
from data.flags import Parser, open_run, parse, read_preset, real, refuse_idle, to_argv, whole
from data.rows import read_problems
from tests.conftest import ROOT


def check_refused(call, *words, kind=ValueError):
    """One line that names the thing."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 3000
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"
    return text


def listing(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def python(code, cwd=ROOT, **env):
    """Runs code in a new process that can import the project."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env)


# ------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ("{}", {}), ('{"a": [1, 2.5, null, true, "\\u00e9"]}', {"a": [1, 2.5, None, True, "é"]}),
    (b'"text"', "text"), ("1e300", 1e300)])
def test_parse_json(text, value):
    assert parse_json(text, "here") == value


@pytest.mark.parametrize("text", [
    "", "{", "[1,]", "{'a': 1}", "nan", "NaN", '{"a": Infinity}', "[-Infinity]", "[" * 10**5,
    b"\xff\xfe{}", "1 2"])
def test_what_is_not_json(text):
    check_refused(lambda: parse_json(text, "here"), "here: not JSON")


@pytest.mark.parametrize("text, word", [
    (b"{", "not JSON"), (b"", "not JSON"), (b"[1]", "list"), (b"7", "int"), (b"null", "NoneType"),
    (b"[" * 10**5, "not JSON"), (b"\xff\xfe{}", "not UTF-8")])
def test_read_json_refuses(tmp_path, text, word):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    check_refused(lambda: read_json(path), path, word)


def test_read_json_of_a_good_file_of_none_and_of_a_folder(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')     # with the mark some editors put first
    assert read_json(path) == {"a": "é"} == read_json(str(path))
    check_refused(lambda: read_json(tmp_path / "b.json"), "b.json: no such file",
                  kind=FileNotFoundError)
    check_refused(lambda: read_json(tmp_path), tmp_path, kind=FileNotFoundError)


def test_a_file_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)                                   # sparse: takes no space
    start = time.monotonic()
    check_refused(lambda: read_text(path), path, "longer than")
    assert time.monotonic() - start < 1


# ------------------------------------------------------------------------------------------------
# Fields and values
# ------------------------------------------------------------------------------------------------

TABLE = {
    "size": (int, 1, 10, REQUIRED), "rate": (float, 0, 1, 0.5), "name": (str, 1, 5, "abc"),
    "on": (bool, None, None, False), "kind": (("a", "b"), None, None, "a"),
    "layers": ([int], None, 3, None), "either": ((int, str), None, None, None),
    "inner": (dict, None, None, None),
}
DEFAULTS = {"rate": 0.5, "name": "abc", "on": False, "kind": "a", "layers": None, "either": None,
            "inner": None}


def test_read_fields_fills_in_defaults_and_leaves_out_what_the_table_has_not():
    assert read_fields({"size": 3, "other": 1}, TABLE, "here") == {"size": 3} | DEFAULTS
    nulls = dict.fromkeys(DEFAULTS)                              # null means absent
    assert read_fields({"size": 3} | nulls, TABLE, "here") == {"size": 3} | DEFAULTS
    given = {"size": 10, "rate": 1.0, "name": "é", "on": True, "kind": "b", "layers": [],
             "either": "x", "inner": {"a": None}}
    assert read_fields(given, TABLE, "here") == given
    assert list(read_fields(given, TABLE, "here")) == list(TABLE)


@pytest.mark.parametrize("raw", [{}, {"size": None}])
def test_a_required_field(raw):
    check_refused(lambda: read_fields(raw, TABLE, "x.json"), "x.json: no 'size'")


@pytest.mark.parametrize("field, value, word", [
    ("size", 0, "below 1"), ("size", 11, "above 10"), ("size", -(10**400), "below"),
    ("size", True, "whole number"), ("size", 2.0, "whole number"), ("size", "2", "whole number"),
    ("size", [2], "whole number"), ("size", {}, "whole number"),
    ("rate", -1e-9, "below 0"), ("rate", 1.5, "above 1"), ("rate", 2, "above 1"),
    ("rate", float("nan"), "finite"), ("rate", float("inf"), "finite"),
    ("rate", float("-inf"), "finite"), ("rate", True, "a number"), ("rate", "0.5", "a number"),
    ("rate", 10**400, "a number"),
    ("name", "", "below 1"), ("name", "abcdef", "above 5"), ("name", 5, "text"),
    ("on", 1, "true or false"), ("on", 0.0, "true or false"), ("on", "true", "true or false"),
    ("kind", "c", "only 'a', 'b'"), ("kind", 1, "only 'a', 'b'"), ("kind", ["a"], "only"),
    ("kind", {}, "only"), ("kind", "A", "only"),
    ("layers", 1, "a list"), ("layers", "12", "a list"), ("layers", [1, "2"], "whole number"),
    ("layers", [True], "whole number"), ("layers", [1, None], "whole number"),
    ("layers", [1, 2, 3, 4], "above 3"), ("layers", {"0": 1}, "a list"),
    ("either", 1.5, "a whole number or text"), ("either", [1], "a whole number or text"),
    ("inner", [], "an object"), ("inner", "{}", "an object"),
])
def test_a_field_of_a_wrong_kind_or_out_of_bounds(field, value, word):
    raw = {"size": 3} | {field: value}
    check_refused(lambda: read_fields(raw, TABLE, "x.json"), "x.json", repr(field), word)


def test_an_int_may_stand_for_a_float_and_not_the_other_way_round():
    value = read_value(3, float)
    assert value == 3.0 and type(value) is float
    assert type(read_value(3, (int, float))) is int and type(read_value(3.0, (int, float))) is float
    check_refused(lambda: read_value(3.0, int), "whole number")
    assert read_value([1, 2.5], [float]) == [1.0, 2.5]


def test_words_are_compared_with_their_type():
    words = (True, False, "gaussian", 1.5)
    assert [read_value(word, words) for word in words] == list(words)
    for value in (1, 0, "True", 1, None):
        check_refused(lambda: read_value(value, words), "is not supported")
    assert read_value(["a", "b", "a"], [("a", "b")]) == ["a", "b", "a"]
    check_refused(lambda: read_value(["a", "c"], [("a", "b")]), "'c'")


def test_one_or_a_list_of_it():
    kind = (str, [str])
    assert read_value("a", kind) == "a" and read_value(["a", "b"], kind) == ["a", "b"]
    assert read_value([], kind) == [] and read_value(3, (int, [int])) == 3
    for value in (5, ["a", 5], {"a": 1}, [["a"]], [None], True):
        check_refused(lambda: read_value(value, kind, where="here"), "here", "text")
    check_refused(lambda: read_value(5, kind), "text or a list")


def test_unknown_fields_that_are_switched_on(capsys):
    harmless = ["_.*", "a|b"]
    refuse_unknown({"k": 1, "x": None, "y": 0, "z": False, "w": {}}, {"k"}, "x.json", harmless)
    assert capsys.readouterr().err == ""
    refuse_unknown({"k": 1, "_p": 1, "b": "2"}, {"k"}, "x.json", harmless)
    assert capsys.readouterr().err == "x.json: ignored: _p, b\n"
    for name in ("x", "ab", "x_p", "A", "_\n"):
        raw = {"_p": 1, name: "v" * 999}
        text = check_refused(lambda: refuse_unknown(raw, {"k"}, "x.json", harmless), "x.json: ", "v")
        assert len(text) < 200 and capsys.readouterr().err == ""


def test_a_list_that_is_no_number_is_never_shown_in_full():
    text = check_refused(lambda: read_value(["x" * 10**6] * 3, int, where="here"), "here")
    assert len(text) < 200
    text = check_refused(lambda: read_value("x" * 10**6, str, None, 5, "here"), "above 5")
    assert len(text) < 200
    assert shorten("a" * 100)[-3:] == "..." and len(shorten("a" * 100)) == 60
    assert shorten([1, 2]) == "[1, 2]"


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------

def rows_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_jsonl(path))


def test_read_jsonl_counts_lines_or_objects(tmp_path):
    path = tmp_path / "a.jsonl"
    assert rows_of(path, '{"a": 1}\n\n  \n{"a": 2}') == [(1, {"a": 1}), (4, {"a": 2})]
    assert rows_of(path, ' [{"a": 1},\n\n{"a": 2}]') == [(1, {"a": 1}), (2, {"a": 2})]
    assert rows_of(path, "") == rows_of(path, "\n\n") == rows_of(path, "[]") == []
    assert rows_of(path, b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n') == [(1, {"a": 1}), (2, {"a": 2})]
    # U+2028 ends a line for str.splitlines, not for JSONL
    assert rows_of(path, '{"a": "x\u2028y"}\n') == [(1, {"a": "x\u2028y"})]


@pytest.mark.parametrize("text, where", [
    ('{"a": 1}\n{"a": \n', "a.jsonl:2"), ('{"a": 1}\n\n[1]\n', "a.jsonl:3"),
    ('{"a": 1}\n"x"\n', "a.jsonl:2"), ("[{}, 3]", "a.jsonl:2"), ("[{}", "a.jsonl"),
    ('{"a": NaN}', "a.jsonl:1"), ('{"a": 1} {"a": 2}', "a.jsonl:1"), (b'{"a": "\xff"}', "a.jsonl")])
def test_read_jsonl_names_file_and_line(tmp_path, text, where):
    check_refused(lambda: rows_of(tmp_path / "a.jsonl", text), tmp_path, where)


def problems(tmp_path, *rows):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(row + "\n" for row in rows))
    return read_problems(path)


def test_problems_are_text_with_an_id_each(tmp_path):
    found = problems(
        tmp_path, '{"problem": "1+1?", "answer": 2, "level": 5}', '{"question": 7, "answer": "x"}',
        '{"problem": null, "question": "q", "answer": 0, "id": null}',
        '{"problem": "p", "question": "q", "answer": 0.5, "id": 17}')
    assert found == [
        {"problem": "1+1?", "answer": "2", "level": 5, "id": "0"},
        {"question": 7, "answer": "x", "problem": "7", "id": "1"},
        {"problem": "q", "question": "q", "answer": "0", "id": "2"},
        {"problem": "p", "question": "q", "answer": "0.5", "id": "17"}]


def test_problems_of_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "p", "answer": "a"}\n')
    assert read_problems(path) == [{"problem": "p", "answer": "a", "id": "0"}]


def test_byte_order_marks_where_files_were_joined(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": "\xef\xbb\xbf"}\n\xef\xbb\xbf\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": "\ufeff"})]
    path.write_bytes(b'\xef\xbb\xbf [{"a": 1}]')
    assert list(read_jsonl(path)) == [(1, {"a": 1})]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1} and read_text(path) == '{"a": 1}'


@pytest.mark.parametrize("row, words", [
    ('{"problem": "p"}', ['no "answer"']), ('{"answer": "a"}', ['no "problem"']),
    ('{"problem": "p", "answer": null}', ['no "answer"']),
    ('{"problem": null, "answer": "a"}', ['no "problem"']),
    ('{"problem": "p", "answer": ""}', ['no "answer"']),
    ('{"problem": "p", "answer": " \\n\\t"}', ['no "answer"']),
    ('{"problem": " ", "answer": "a"}', ['no "problem"']),
    ('{"problem": "p", "answer": NaN}', ["NaN"]),
    ('{"problem": "p", "answer": 1e999}', ["1e999", "finite"]),
    ('{"problem": "p", "answer": ["a"]}', ["answer"]),
    ('{"problem": {"text": "p"}, "answer": "a"}', ["problem"]),
    ('{"problem": "p", "answer": true}', ["answer"]),
    ('{"problem": "p", "answer": "a", "id": "0"}', ["'0'", "twice"]),
    ('{"problem": "p", "answer": "a", "id": [1]}', ["id"]),
])
def test_the_first_bad_problem_is_named_by_file_and_line(tmp_path, row, words):
    good = '{"problem": "p", "answer": "a"}'
    check_refused(lambda: problems(tmp_path, good, "", row, "{"), "p.jsonl:3", *words)


def test_a_file_without_problems(tmp_path):
    check_refused(lambda: problems(tmp_path), "p.jsonl", "no problems")
    check_refused(lambda: read_problems(tmp_path / "none.jsonl"), "none.jsonl",
                  kind=FileNotFoundError)


def measured(call):
    """What a call costs: (processor seconds, KiB that it made the process larger)."""
    start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return time.thread_time() - start, grown


@pytest.mark.parametrize("text, word", [
    ("[" * 100 + "]" * 100, "nested"), ('{"a":' * 150 + "1" + "}" * 150, "nested"),
    ("[" + "{}," * 4_000_000 + "1]", "millions of values"), ("[" * 900 + "]" * 900, "not JSON"),
    ("9" * 5000, "not JSON")])
def test_json_that_would_take_the_memory_or_the_stack(text, word):
    seconds, kibibytes = measured(lambda: check_refused(lambda: parse_json(text, "here"), word))
    assert seconds < 1 and kibibytes < 2**18


def test_json_may_be_nested_and_long_within_reason():
    assert parse_json("[" * 98 + "]" * 98, "here") and len(parse_json("[1" + ",1" * 10**6 + "]", "")) > 10**6


def test_whole_numbers_have_64_bits():
    for value in (2**63 - 1, 1 - 2**63):
        assert read_value(value, int) == value == read_fields({"a": value}, {"a": TABLE["either"]}, "")["a"]
    for value in (2**63, -(2**63), 10**400):
        check_refused(lambda: read_value(value, int, where="here"), "here", "64 bits")
        check_refused(lambda: read_value([1, value], [int], where="here"), "here", "64 bits")


def test_a_list_of_millions_is_refused_before_its_values_are_read():
    seconds, _ = measured(lambda: check_refused(
        lambda: read_value([0] * 3 * 10**6, [int], where="here"), "here", "3,000,000 values"))
    assert seconds < 0.1
    assert len(read_value(["x"] * 2**17, (str, [str]))) == 2**17


def test_a_field_of_megabytes_is_refused_in_both_kinds_of_files(tmp_path):
    """Fifty of them took a tokenizer more than a minute."""
    path, row = tmp_path / "p.jsonl", json.dumps({"problem": "x" * (2**20 + 1), "answer": "1"})
    for text in (row, f"[{row}]"):
        path.write_text(text)
        seconds, _ = measured(lambda: check_refused(lambda: read_problems(path), "p.jsonl:1", "problem"))
        assert seconds < 1
    path.write_text(row.replace("xx", "x", 1))
    assert len(read_problems(path)[0]["problem"]) == 2**20


def test_an_error_does_not_write_out_what_it_shortens():
    value = ["x" * 10**6] * 10**5                                # as text, 100 GB
    seconds, kibibytes = measured(lambda: shorten({"a": value}))
    assert seconds < 0.1 and kibibytes < 2**16 and len(shorten(value)) <= 60


# ------------------------------------------------------------------------------------------------
# Tensors
# ------------------------------------------------------------------------------------------------

def test_open_tensors_of_several_files(tmp_path):
    save_file({"a": torch.arange(6).view(2, 3)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(4)}, tmp_path / "2.safetensors")
    with open_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"]) as found:
        assert set(found) == {"a", "b"} and found["a"].get_shape() == [2, 3]
        assert torch.equal(found["a"][:], torch.arange(6).view(2, 3))
        check_tensors(found, {"a": torch.empty(2, 3), "b": torch.empty(4)}, "here")
        text = check_refused(lambda: check_tensors(found, {
            "a": torch.empty(3, 2), "c": torch.empty(1)}, "here"), "here", "missing c",
            "unexpected b", "a has shape (2, 3), the config needs (3, 2)")
        assert "more" not in text
        many = {f"t{i}": torch.empty(1) for i in range(20)}
        check_refused(lambda: check_tensors(found, many, "here"), "missing t0", "and 14 more")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """The last one would win, in an order that nobody chose."""
    for name in ("1", "2"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="2.safetensors: a is in another file, too"):
        with open_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"]):
            pass


def test_the_header_is_measured_before_it_is_parsed(tmp_path):
    path, size = tmp_path / "a.safetensors", 90 * 10**6          # the library stops at 100
    path.write_bytes(size.to_bytes(8, "little") + b"{" + b" " * size)

    def use():
        with open_tensors([path]):
            pass
    assert measured(lambda: check_refused(use, path, "header of 90,000,000 bytes"))[1] < 2**14


def test_dtypes_of_tensors(tmp_path):
    path = tmp_path / "1.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)}, path)
    with open_tensors([path]) as found:
        assert set(found) == {"a", "b"}
    with open_tensors([path], ("F32", "I32")) as found:
        assert set(found) == {"a", "b"}
    with pytest.raises(ValueError, match=f"{path}: b is I32, not"), open_tensors([path], ("F32",)):
        pass


def test_a_prefix_before_the_names_is_counted_and_named(tmp_path):
    path, wanted = tmp_path / "1.safetensors", {"a.w": torch.ones(2), "b.w": torch.ones(3)}
    save_file({f"net.module.{n}": t for n, t in wanted.items()} | {"more": torch.ones(1)}, path)
    with open_tensors([path]) as found:
        check_refused(lambda: check_tensors(found, wanted, "here"), "here", "2 of 3", "'net.module.'")
    save_file({"a.w": torch.ones(2), "deep.b.w": torch.ones(3)}, path)       # one name is no prefix
    with open_tensors([path]) as found:
        check_refused(lambda: check_tensors(found, wanted, "here"), "missing b.w",
                      "unexpected deep.b.w")
    save_file(wanted | {f"ema.{n}": t.clone() for n, t in wanted.items()}, path)     # nothing is missing
    with open_tensors([path]) as found:
        check_refused(lambda: check_tensors(found, wanted, "here"), "unexpected ema.a.w")


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_damaged_file_is_named(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])

    def use():
        with open_tensors([path]):
            pass
    check_refused(use, path)
    path.unlink()
    check_refused(use, path, kind=FileNotFoundError)
    path.write_bytes(b"\x80\x04\x95\x10.")                       # a pickle under another name
    check_refused(use, path)


def test_an_error_inside_the_block_is_passed_on(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ZeroDivisionError), open_tensors([tmp_path / "a.safetensors"]):
        raise ZeroDivisionError


# ------------------------------------------------------------------------------------------------
# Where things are
# ------------------------------------------------------------------------------------------------

def test_locate_names_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "m").mkdir(parents=True)
    (tmp_path / "a+b@c#d").mkdir()                               # this very name comes first
    for spec in ("runs/m", "./runs/m", f"{tmp_path}/runs/m", "runs#m", "runs/#m", "runs#./m"):
        assert locate(spec).resolve() == tmp_path / "runs" / "m", spec
        assert locate(files.Path(spec)).resolve() == tmp_path / "runs" / "m", spec
    assert locate("a+b@c#d").resolve() == tmp_path / "a+b@c#d"
    check_refused(lambda: locate("runs/m@main"), "runs/m", "revision")
    for spec in ("runs#../a+b@c#d", "runs/m#../../a+b@c#d", "runs#/etc", "runs#.."):
        check_refused(lambda: locate(spec), spec, "leads out")
    check_refused(lambda: locate("runs#none"), "none", kind=FileNotFoundError)
    for spec in ("nothing", "./nothing", "/nothing/here", "a/b/c", "../x", "a b/c", ".hidden/x"):
        check_refused(lambda: locate(spec), spec, kind=FileNotFoundError)


def test_a_link_that_leads_out_is_no_subfolder(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "link").symlink_to("/etc")
    check_refused(lambda: locate(f"{tmp_path}/repo#link"), "leads out")


@pytest.mark.parametrize("spec", ["runs/m@", "runs/m#", "owner/name@", "owner/name@#sub", "@main",
                                  "#sub", "a@b@c#"])
def test_unfinished_specs(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "m").mkdir(parents=True)
    check_refused(lambda: locate(spec), spec, kind=(ValueError, FileNotFoundError))


def test_hub_id_offline_is_one_clear_line_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                  # where no folder has such a name
    start = time.monotonic()
    for spec in ("someone/something", "someone/something@v1#sub", "out/tiny"):
        check_refused(lambda: locate(spec), spec.split("@")[0], "offline", kind=FileNotFoundError)
    assert time.monotonic() - start < 5


def test_hub_cache_is_used_offline(tmp_path):
    """Hub id, revision and subfolder.  HF_HOME is read once, therefore by a new process."""
    repo = tmp_path / "hub" / "models--someone--something"
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "v2")):
        for folder in ("", "sub"):
            write_json(repo / "snapshots" / commit / folder / "config.json", [branch, folder])
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    run = python("""
        from data.files import locate
        for spec in ("", "@v2", "#sub", "@v2#sub"):
            print(*(locate("someone/something" + spec) / "config.json").read_text().split())
        """, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert run.stdout.splitlines() == [
        '[ "main", "" ]', '[ "v2", "" ]', '[ "main", "sub" ]', '[ "v2", "sub" ]'], run.stderr


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_interrupted_block_leaves_the_old_files(tmp_path, stop):
    directory = tmp_path / "m"
    directory.mkdir()
    save_file({"a": torch.ones(3)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    before = listing(tmp_path)
    with pytest.raises(stop), staged(directory) as temporary:
        (temporary / "model.safetensors").write_bytes(b"half")
        (temporary / "config.json").write_text("{")
        raise stop
    assert listing(tmp_path) == before
    assert load_file(directory / "model.safetensors")["a"].tolist() == [1, 1, 1]
    assert read_json(directory / "config.json") == {}


def test_staged_moves_all_and_keeps_other_files(tmp_path):
    (tmp_path / "keep.txt").write_text("kept")
    (tmp_path / "b.json").write_text("old")
    with staged(tmp_path) as temporary:
        assert temporary.parent == tmp_path      # a rename stays in a file system, as of a mount point
        for name in ("a.safetensors", "b.json"):
            (temporary / name).write_text(name)
        assert (tmp_path / "b.json").read_text() == "old"
    assert listing(tmp_path) == ["a.safetensors", "b.json", "keep.txt"]
    assert (tmp_path / "b.json").read_text() == "b.json" and not temporary.exists()
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_staged_makes_the_directory(tmp_path):
    with staged(tmp_path / "a" / "b") as temporary:
        (temporary / "x.json").write_text("{}")
    assert listing(tmp_path) == ["a", "a/b", "a/b/x.json"]


@pytest.mark.parametrize("fails", ["1.safetensors", "2.safetensors", "config.json"])
def test_a_move_that_fails_leaves_nothing_that_loads(tmp_path, fails):
    """Whatever file cannot be moved: never a config.json beside weights of another time."""
    directory = tmp_path / "m"
    directory.mkdir()
    names = ["1.safetensors", "2.safetensors", "config.json"]
    for name in names:
        (directory / name).write_text("old")
    if fails != "config.json":
        (directory / fails).unlink()
        (directory / fails).mkdir()                              # a rename onto a folder fails
    real_replace = os.replace

    def replace(source, target):
        if files.Path(target).name == fails == "config.json":
            raise OSError("no space")
        real_replace(source, target)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", replace)
        with staged(directory) as temporary:
            for name in names:
                (temporary / name).write_text("new")
    assert not (directory / "config.json").exists()
    assert listing(tmp_path) == sorted(["m", *(f"m/{n}" for n in names if n != "config.json")])


def test_a_process_that_is_killed_while_writing_leaves_the_old_files(tmp_path):
    write_json(tmp_path / "m" / "config.json", {"old": True})
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import time
        from data.files import staged
        with staged({str(tmp_path / "m")!r}) as temporary:
            (temporary / "config.json").write_text("{{")
            print("written", flush=True)
            time.sleep(60)
        """)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_json(tmp_path / "m" / "config.json") == {"old": True}


def test_write_json_and_jsonl(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": [1, None], "a": "é"})
    assert path.read_text() == '{\n  "b": [\n    1,\n    null\n  ],\n  "a": "\\u00e9"\n}\n'
    assert read_json(path) == {"b": [1, None], "a": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path)["a"] == "é" and listing(tmp_path) == ["new", "new/a.json"]
    rows = [{"a": "x\u2028y\n"}, {"a": "é"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == rows
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2


def test_relative_and_printable():
    assert relative(ROOT / "data" / "tiny") == "data/tiny"
    assert relative(f"{ROOT}/a+{ROOT}/b") == "a+b" and relative("owner/name") == "owner/name"
    assert printable("a\tb\x1b[31m\r\u202e\nc é 数") == "a b\ufffd[31m\ufffd\ufffd\nc é 数"


def test_check():
    check(True, "fine")
    check_refused(lambda: check([], "empty"), "empty")


# ------------------------------------------------------------------------------------------------
# Command lines: preset < config < flags
# ------------------------------------------------------------------------------------------------

PRESETS = {
    "own": {},
    "tiny": {"batch": 4, "lr": 0.5, "data": "{root}/data/x", "tune": {"batch": 8, "steps": 7},
              "sae": {"batch": 2, "latents": 64}, "unknown_here": 1},
    "large": {"like": "tiny", "batch": 16, "tune": {"steps": 9}},
}


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """A data/presets.json of our own: that of the project changes."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "presets.json").write_text(json.dumps(PRESETS))
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    return tmp_path


def parser():
    p = Parser("train.py --stage tune", "Tunes.")
    p.add_argument("--batch", type=whole(1), default=32, help="chunks in an optimizer step")
    p.add_argument("--lr", type=real(0, above=True), default=1e-3, help="rate")
    p.add_argument("--steps", type=whole(0, 100), default=0, help="steps")
    p.add_argument("--share", type=real(0, 1), default=0.0, help="a fraction")
    p.add_argument("--data", default="none", help="file")
    p.add_argument("--model", nargs="+", default=[], help="specs")
    p.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True, help="order")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype")
    return p


def test_defaults_preset_config_flags(presets):
    args = parse(parser(), [])
    assert (args.batch, args.lr, args.steps, args.given) == (4, 0.5, 0, set())
    args = parse(parser(), [], "tune")
    assert (args.batch, args.lr, args.steps) == (8, 0.5, 7)
    assert args.data == f"{presets}/data/x" and args.preset == "tiny"
    assert not hasattr(args, "latents") and not hasattr(args, "unknown_here")
    write_json(presets / "c.json", {"batch": 5, "steps": 3, "shuffle": False, "model": ["a", "b"]})
    args = parse(parser(), ["--config", f"{presets}/c.json", "--preset", "tiny", "--steps", "2"], "tune")
    assert (args.batch, args.steps, args.lr) == (5, 2, 0.5)
    assert args.shuffle is False and args.model == ["a", "b"]
    assert {"batch", "steps", "shuffle", "model", "config"} <= args.given
    assert not args.given & {"lr", "data"}
    assert parse(parser(), [f"--config={presets}/c.json"], "tune").batch == 5


def test_a_preset_that_is_like_another(presets):
    args = parse(parser(), ["--preset", "large"], "tune")
    assert (args.batch, args.lr, args.steps) == (8, 0.5, 9)      # a section comes last
    assert parse(parser(), ["--preset=large"]).batch == 16
    assert "like" not in read_preset("large") and args.given == {"preset"}
    check_refused(lambda: parse(parser(), ["--preset", "huge"]), "'huge'", "tiny, large")
    args = parse(parser(), ["--preset", "large", "--batch=3", "--no-shuffle"], "tune")
    assert args.batch == 3 and args.given == {"preset", "batch", "shuffle"} and not args.shuffle


@pytest.mark.parametrize("argv, words", [
    (["--bacth", "3"], ["--bacth", "did you mean --batch?"]),
    (["--bat", "3"], ["--bat"]),                                 # no abbreviations
    (["--bacth=3"], ["--bacth=3", "--batch"]),
    (["--latents", "64"], ["--latents"]),                        # a flag of another stage
    (["stray"], ["stray"]),
    (["--" + "x" * 10**5], ["..."]),
    (["--batch"], ["--batch"]),
    (["--batch", "0"], ["--batch", "0 should be at least 1"]),
    (["--batch", "2.5"], ["--batch", "2.5"]), (["--batch", "nan"], ["--batch", "nan"]),
    (["--batch", "9" * 30], ["--batch"]),
    (["--steps", "101"], ["--steps", "at least 0 and at most 100"]), (["--steps", "-1"], ["--steps"]),
    (["--lr", "0"], ["--lr", "above 0"]), (["--lr", "nan"], ["--lr", "finite"]),
    (["--lr", "inf"], ["--lr", "finite"]), (["--lr", "x"], ["--lr", "x"]),
    (["--share", "1.01"], ["--share", "at most 1"]), (["--share", "-0.1"], ["--share"]),
    (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    (["--config", "none.json"], ["none.json"]),
])
def test_flags_refused_in_one_line(presets, argv, words):
    text = check_refused(lambda: parse(parser(), argv, "tune"), *words,
                         kind=(ValueError, FileNotFoundError))
    assert len(text) < 300


@pytest.mark.parametrize("config, words", [
    ({"bacth": 3}, ["--bacth", "--batch"]), ({"batch": 0}, ["--batch"]),
    ({"batch": "many"}, ["--batch", "many"]), ({"tune": {"batch": 3}}, ["c.json", "'tune'"]),
    ({"shuffle": 1}, ["--shuffle"]), ({"batch": True}, ["--batch"]), ({"batch": [1, 2]}, ["2"]),
])
def test_a_config_file_is_checked_as_flags_are(presets, config, words):
    write_json(presets / "c.json", config)
    check_refused(lambda: parse(parser(), ["--config", f"{presets}/c.json"], "tune"), *words)


def test_a_config_file_as_flags():
    config = {"lr": 0.1, "shuffle": False, "quick": True, "model": ["a", "b"], "data": None,
              "max_new_tokens": -3}
    assert to_argv(config) == ["--lr=0.1", "--no-shuffle", "--quick", "--model", "a", "b",
                               "--max-new-tokens=-3"]


def test_presets_are_bounded_by_the_types_of_the_flags(presets):
    assert whole(1)("7") == 7 and real(0, 1)("0.5") == 0.5 and real(0)("1e9") == 1e9
    for wrong in ("0", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            whole(1)(wrong)
    for wrong in ("nan", "inf", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            real(0)(wrong)


def test_refuse_idle(presets):
    args = parse(parser(), ["--batch", "3"], "tune")
    refuse_idle(args, "lr steps", "--quick")
    check_refused(lambda: refuse_idle(args, "lr batch", "--quick"), "--batch", "--quick")


@pytest.mark.parametrize("bad, word", [
    ([], "an object"), ({"x": 3}, "an object"), ({"x": {"like": "x"}}, "'like' is none of"),
    ({"x": {"like": "y"}, "y": {"like": "x"}}, "'like'"), ({"x": {"like": ["y"]}}, "'like'"),
    ({"y": {"sae": 3}, "x": {"like": "y", "sae": {"k": 1}}}, "x: sae should be an object"),
    ({"y": {}}, "no preset 'x'")])
def test_presets_that_are_none(tmp_path, monkeypatch, bad, word):
    write_json(tmp_path / "data" / "presets.json", bad)
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    check_refused(lambda: read_preset("x"), word)


def test_the_presets_of_the_project_can_be_read():
    for name in read_json(ROOT / "data" / "presets.json"):
        bundle = read_preset(name)
        assert "like" not in bundle and "{root}" not in json.dumps(bundle)


# ------------------------------------------------------------------------------------------------
# The front door: one line, exit codes
# ------------------------------------------------------------------------------------------------

def door(body, *argv, **env):
    """Runs a program whose main has this body."""
    code = f"""
import sys, os, signal
from data.flags import Parser, front_door, parse, whole
signal.signal(signal.SIGINT, signal.default_int_handler)     # ignored where tests run in the background
def main(argv):
{textwrap.indent(textwrap.dedent(body), "    ")}
front_door(main)
"""
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | env)


def test_a_run_that_ends_well():
    run = door("print(*argv)", "a", "--b")
    assert (run.returncode, run.stdout, run.stderr) == (0, "a --b\n", "")


@pytest.mark.parametrize("error, line", [
    ("ValueError('a bad\\nvalue')", "error: a bad value"),
    ("FileNotFoundError('x.json: no such file')", "error: x.json: no such file"),
    ("OSError(28, 'No space left on device')", "error: [Errno 28] No space left on device"),
])
def test_a_mistake_is_one_line_and_exit_code_2(error, line):
    run = door(f"raise {error}")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", line + "\n")
    run = door(f"raise {error}", RESA_TRACEBACK="1")
    assert run.returncode == 1 and "Traceback" in run.stderr


def test_a_bug_keeps_its_traceback():
    run = door("{}['x']")
    assert run.returncode == 1 and "KeyError" in run.stderr


def test_an_error_cannot_steer_the_terminal_and_is_bounded():
    run = door(r"raise ValueError('\x1b]0;title\x07 \x1b[2J \r\x08\u202e\x9b31m')")
    assert run.returncode == 2 and run.stderr.endswith("\n")
    assert all(c.isprintable() for c in run.stderr[:-1]) and "]0;title" in run.stderr
    run = door("raise ValueError('x' * 10**6)")
    assert run.returncode == 2 and len(run.stderr) < 1100 and run.stderr.endswith("...\n")
    assert run.stderr.count("\n") == 1


def test_nothing_printed_can_steer_the_terminal():
    """Neither a table, where labels are names of strangers' directories, nor a note of ours."""
    run = door(r"""
        from data.files import refuse_unknown
        print('\x1b[2J\x07 a\u202eb', 1, end='|\n')
        refuse_unknown({'_x\x1b]0;t\x07_hash': 1, '_' + 'y' * 10**6 + '_hash': 1}, (), 'a\x1b/b.json', ['(?s).*'])
        """)
    assert run.returncode == 0 and run.stdout == "\ufffd[2J\ufffd a\ufffdb 1|\n"
    assert "b.json: ignored: _x" in run.stderr and len(run.stderr) < 1100
    assert all(c.isprintable() for c in run.stderr[:-1])


def test_an_interrupt_says_how_to_go_on():
    run = door("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)")
    assert run.returncode == 130 and "--resume" in run.stderr and "Traceback" not in run.stderr


def test_a_closed_pipe_is_no_error():
    code = ("from data.flags import front_door\n"
            "front_door(lambda argv: print('x' * 100 + '\\n' * 10**6))")
    run = subprocess.run(f"{sys.executable} -c \"$CODE\" | head -1", shell=True, text=True,
                         capture_output=True, cwd=ROOT, env=os.environ | {"CODE": code})
    assert run.stdout == "x" * 100 + "\n" and run.stderr == ""


PROGRAM = """
p = Parser("prog.py", "What it does.\\n\\n    prog.py --size 3")
p.add_argument("--size", type=whole(1), default=7, help="how many")
p.add_argument("--name", help="a word")
print(parse(p, argv).size)
"""


def test_help_lists_flags_and_defaults_and_exits():
    run = door(PROGRAM, "--help")
    assert run.returncode == 0 and run.stderr == ""
    assert "\n    prog.py --size 3\n" in run.stdout                # the description as written
    assert "how many (default: 7)" in run.stdout and "--preset" in run.stdout
    assert "a word\n" in run.stdout                              # no "(default: None)"
    assert door(PROGRAM, "-h", "--preset", "tiny").returncode == 0
    assert door(PROGRAM, "--size", "3").stdout == "3\n"


@pytest.mark.parametrize("argv", [["--siez", "3"], ["--size", "0"], ["--size"], ["--preset", "x"],
                                  ["--preset"], ["--config", "none.json"], ["--config"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv):
    run = door(PROGRAM, *argv)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ")


def test_a_run_directory_says_what_was_run(tmp_path, presets):
    args = parse(parser(), ["--batch", "3"], "tune")
    open_run(tmp_path / "out", args)
    record = read_json(tmp_path / "out" / "config.json")
    assert record["settings"]["batch"] == 3 and record["settings"]["steps"] == 7
    assert "given" not in record["settings"] and record["argv"] == sys.argv
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["cores"] > 0


def test_half_a_character_is_refused_where_it_is_read(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "p", "answer": 1}\n{"problem": "\\ud800", "answer": 1}\n')
    check_refused(lambda: read_problems(tmp_path / "p.jsonl"), "p.jsonl:2", "surrogates")
    assert parse_json(r'"\ud83d\ude00"', "x") == "\U0001f600"


def test_invisible_characters_are_blank_and_blank_ids_are_none(tmp_path):
    rows = [{"problem": "p", "answer": "\u200b"}, {"problem": "p", "answer": "\ufeff "}]
    for row in rows:
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        check_refused(lambda: read_problems(tmp_path / "p.jsonl"), 'no "answer"')
    (tmp_path / "p.jsonl").write_text("".join('{"problem": "p", "answer": 1, "id": " "}\n' for _ in "ab"))
    assert [row["id"] for row in read_problems(tmp_path / "p.jsonl")] == ["0", "1"]
