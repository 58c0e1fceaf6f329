"""data/prepare.py: benchmarks and training sets, by the real download path from a loopback server that misbehaves.

    python -m pytest tests/test_bench_data.py
"""

import collections
import hashlib
import http.server
import json
import random
import re
import shutil
import socket
import threading
import urllib.parse

import pytest

import eval as ev
import resa
import train
from tests.conftest import ROOT
from data import prepare

FIRST, SECOND = "https://first.example/aime.jsonl", "https://second.example/aime.jsonl"
ROWS = [{"id": 60 + i, "problem": f"What is {i} + 20?", "answer": f"{20 + i:03d}", "url": "x" * 900}
        for i in range(30)]
FILE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SHA = hashlib.sha256(FILE).hexdigest()


# ----------------------------------------------------------------------------------------------------------
# A server on the loopback device: files by path, faults by path, a record of the requests
# ----------------------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, path = self.server, self.path
        site.seen.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = site.faults[path].pop(0) if site.faults[path] else ""
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "0")
            self.end_headers()
        elif fault.startswith("http"):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
        elif path in site.files or site.rows is not None and path.startswith("/datasets-server"):
            self.give(site.files[path] if path in site.files else site.page(path), fault)
        else:
            self.send_error(404)

    def give(self, body, fault):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if fault != "no ranges" else 0
        if start and start >= len(body):
            return self.send_error(416)
        body = b"#" * len(body) if fault == "other bytes" else body
        self.send_response(206 if start else 200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        half = fault in ("cut", "stall")
        self.wfile.write(body[start:start + (len(body) - start) // 2] if half else body[start:])
        self.wfile.flush()
        if fault == "stall":
            self.server.wake.wait(10)

    def log_message(self, *args):
        pass


class Site(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.seen, self.rows = {}, collections.defaultdict(list), [], None
        self.wake, self.address = threading.Event(), f"http://127.0.0.1:{self.server_address[1]}"

    def page(self, path):
        """The row server's answer to /datasets-server.huggingface.co/rows?...&offset=...&length=..."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        offset, length = int(query["offset"][0]), int(query["length"][0])
        rows = [{"row_idx": i, "row": row, "truncated_cells": ["question"] if row.get("cut") else []}
                for i, row in enumerate(self.rows)][offset:offset + length]
        return json.dumps({"features": [], "rows": rows, "num_rows_total": len(self.rows), "partial": False}).encode()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The server stands in for all sites; two of them serve a small "aime24" of 30 made-up problems."""
    server = Site()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("RESA_MIRROR", server.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepare, "PAUSES", [0, 0])
    monkeypatch.setitem(prepare.SOURCES, "aime24", {FIRST: SHA, SECOND: SHA})
    server.files = {path(FIRST): FILE, path(SECOND): FILE}
    yield server
    server.wake.set()
    server.shutdown()
    server.server_close()


def path(url):
    return url.removeprefix("https:/")


def asked(site):
    return [(address, start) for address, start, _ in site.seen]


def cached():
    return sorted(file.name for file in prepare.CACHE.iterdir())


# ----------------------------------------------------------------------------------------------------------
# Downloads
# ----------------------------------------------------------------------------------------------------------

def test_a_benchmark_is_fetched_once(site):
    problems, source = prepare.benchmark("aime24")
    assert source == FIRST and len(problems) == 30
    assert problems[3] == {"id": "aime24-63", "problem": "What is 3 + 20?", "answer": "23"}      # not 023
    assert prepare.benchmark("aime24") == (problems, source) and asked(site) == [(path(FIRST), None)]
    assert cached() == ["aime24.jsonl"] and (prepare.CACHE / "aime24.jsonl").read_bytes() == FILE


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_broken_transfer_goes_on_where_it_stopped(site, fault, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.3)
    site.faults[path(FIRST)] = [fault]
    assert prepare.benchmark("aime24")[1] == FIRST
    assert asked(site) == [(path(FIRST), None), (path(FIRST), f"bytes={len(FILE) // 2}-")]
    assert cached() == ["aime24.jsonl"]


def test_a_killed_run_goes_on_where_it_stopped(site):
    site.faults[path(FIRST)] = ["cut"] * 3
    site.faults[path(SECOND)] = [404]
    with pytest.raises(OSError):
        prepare.benchmark("aime24")
    partial, = prepare.CACHE.iterdir()
    size = partial.stat().st_size
    assert partial.suffix == ".part" and size == len(FILE) - len(FILE) // 8 - (len(FILE) % 8 > 0)
    assert prepare.benchmark("aime24")[1] == FIRST and asked(site)[-1] == (path(FIRST), f"bytes={size}-")


@pytest.mark.parametrize("left, fault", [(FILE[:900], "no ranges"), (FILE[:900], "no length"), (FILE, ""),
                                         (FILE + b"more", "")])
def test_whatever_an_earlier_run_left_the_file_is_whole(site, left, fault):
    prepare.CACHE.mkdir()
    name = f"aime24.jsonl.{hashlib.sha256(FIRST.encode()).hexdigest()[:8]}.part"
    (prepare.CACHE / name).write_bytes(left)
    site.faults[path(FIRST)] = [fault]
    assert prepare.benchmark("aime24")[1] == FIRST and cached() == ["aime24.jsonl"]
    assert {address for address, _ in asked(site)} == {path(FIRST)}


@pytest.mark.parametrize("faults, reason", [
    (["other bytes"], f"refused, its sha256 is .* and not {SHA}"), ([404], "404"), ([503, 503, 503], "503"),
    (["stall"] * 3, "timed out"), (["cut", "cut", "cut"], "ended after")])
def test_a_source_that_fails_is_named_and_the_next_one_used(site, faults, reason, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    site.faults[path(FIRST)] = list(faults)
    assert prepare.benchmark("aime24")[1] == FIRST, "the bytes are the same, so they count as the first one's"
    said = capsys.readouterr().err
    assert said.startswith(f"{FIRST}: ") and "the next source was used" in said
    assert re.search(reason, said) and asked(site)[-1] == (path(SECOND), None)
    assert len(asked(site)) == len(faults) + 1, "what may pass is tried again, what will not is not"


def test_a_busy_server_is_asked_again(site):
    site.faults[path(FIRST)] = [429, 500]
    assert prepare.benchmark("aime24")[1] == FIRST and len(site.seen) == 3


def test_other_bytes_everywhere_are_refused(site):
    site.files = {path(FIRST): FILE[:-1], path(SECOND): FILE.replace(b"3 +", b"4 +")}
    with pytest.raises(OSError) as caught:
        prepare.benchmark("aime24")
    for part in (FIRST, SECOND, SHA, hashlib.sha256(FILE[:-1]).hexdigest(), str(prepare.CACHE / "aime24.jsonl")):
        assert part in str(caught.value)
    assert cached() == [], "nothing of it is kept"


def test_a_file_that_is_too_long_is_refused_before_it_fills_the_disk(site, tmp_path):
    with pytest.raises(ValueError, match="longer than 1,000 bytes"):
        prepare.download(FIRST, tmp_path / "file", SHA, limit=1000)
    assert not list(tmp_path.glob("file*"))


def test_a_cached_file_that_was_changed_is_refused(site):
    prepare.benchmark("aime24")
    file = prepare.CACHE / "aime24.jsonl"
    file.write_bytes(FILE.replace(b"020", b"021"))
    with pytest.raises(ValueError, match=r"aime24.jsonl: its sha256 .* is not a pinned one; delete"):
        prepare.benchmark("aime24")


def test_offline_the_message_says_which_file_to_put_where(site, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RESA_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(SystemExit) as caught:
            prepare.main(["fetch", "aime24"])
    said = capsys.readouterr().err
    file = prepare.CACHE / "aime24.jsonl"
    assert caught.value.code == 2 and said.count("\n") == 1
    assert said.endswith(f"put the file {FIRST} (sha256 {SHA}) at {file}\n")
    file.write_bytes(FILE)                                           # which then works, offline
    prepare.main(["fetch", "aime24"])
    assert capsys.readouterr().out == f"aime24: 30 problems of {FIRST}\n"


# ----------------------------------------------------------------------------------------------------------
# The published files
# ----------------------------------------------------------------------------------------------------------

PINNED = dict(prepare.SOURCES)
# Fields that a golden hash covers beside id, problem and answer, by their names in the file.
EXTRAS = {"math500": {"subject": "subject", "level": "level"}, "minerva": {"type": "type"},
          "olympiadbench": {"answer_type": "answer_type", "is_multiple_answer": "multiple", "unit": "unit",
                            "error": "error"}}
GOLDEN = {"aime24": (30, "672801744034116077915da2816e5a404815ae27109ef3776a8e522769bf9809"),
          "aime25": (30, "1939c3aa37ecf2dd75e05b3ee3a087c3e7b701db5634ea460f0cc3ca29ec39bf"),
          "amc23": (40, "ee82c7428ec8185468bb115577fa405dad3d428e85f20ce8da9f7e8e328c310e"),
          "math500": (500, "cd8dcd9e49d089ef1b7a654823c6976338fcfb44d4a2d9c9afb53b8437e29876"),
          "minerva": (272, "ee0e4b6a68f0374527221e2b00aeb822bc4e00a23ae021ec03f58211b53d9525"),
          "olympiadbench": (675, "44bacab70a289d1f114a77dd5a3b76f58318cea41b9eaeb4344eca4dc9c93f32")}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_files_become_the_rows_that_were_checked(site, shared, monkeypatch, name):
    monkeypatch.setitem(prepare.SOURCES, "aime24", PINNED["aime24"])
    url = next(iter(prepare.SOURCES[name]))
    site.files[path(url)] = (shared / "bench" / f"{name}.jsonl").read_bytes()
    problems, source = prepare.benchmark(name)
    count, golden = GOLDEN[name]
    raw = [json.loads(line) for line in site.files[path(url)].decode().split("\n") if line]
    rows = [row | {new: old[key] for key, new in EXTRAS.get(name, {}).items()} for row, old in zip(problems, raw)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert source == url and len({row["id"] for row in problems}) == count == len(raw)
    assert hashlib.sha256(text.encode()).hexdigest() == golden


def test_other_copies_are_read_alike():
    """Field names and spellings differ between the copies that may be used."""
    assert prepare.as_problem("aime24", 4, {"question": "q", "answer": "025"}) == \
        {"id": "aime24-4", "problem": "q", "answer": "25"}
    assert prepare.as_problem("amc23", 0, {"id": 7, "problem": "q", "answer": 27.0})["answer"] == "27"
    solved = {"problem": "q", "solution": r"\boxed{1} so \boxed{\frac{1}{2}}.", "idx": 3}
    assert prepare.as_problem("minerva", 0, solved) == {"id": "minerva-3", "problem": "q", "answer": r"\frac{1}{2}"}
    assert prepare.as_problem("olympiadbench", 0, {"id": 9, "question": "q", "final_answer": ["$x$"]}) == \
        {"id": "olympiad-9", "problem": "q", "answer": "x"}
    assert prepare.as_problem("math500", 0, {"unique_id": "a/1", "problem": "q", "answer": "1"})["id"] == "a/1"


def test_sources_are_pinned():
    for name, sources in PINNED.items():
        for url, sha256 in sources.items():
            assert url.startswith("https://") and len(sha256) == 64 and "/main/" not in url
    assert list(PINNED) == list(ev.PUBLISHED) and len(PINNED["gpqa"]) == 1, "GPQA comes from its authors only"


# ----------------------------------------------------------------------------------------------------------
# GPQA: made-up questions in its format
# ----------------------------------------------------------------------------------------------------------

def gpqa_csv(count, seed=None):
    rows = [f'"Question {i}, with a\nsecond line?","right {i} ","wrong {i}","bad, {i}","false {i}",rec{i}'
            for i in range(count)]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    head = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID"
    return "\n".join([head, *rows])


def test_the_order_of_gpqa_options_hangs_on_the_question_alone(tmp_path):
    file = tmp_path / "gpqa_diamond.csv"
    file.write_text(gpqa_csv(300))
    problems, source = ev.read_bench(str(file))
    file.write_text(gpqa_csv(300, seed=1))
    assert {row["id"]: row for row in ev.read_bench(str(file))[0]} == {row["id"]: row for row in problems}
    for i, row in enumerate(problems):
        question, options = row["problem"].split("\n\n")
        letters = dict(line.split(") ") for line in options.split("\n"))
        assert question == f"Question {i}, with a\nsecond line?" and list(letters) == list("ABCD")
        assert letters[row["answer"]] == f"right {i}" and len(set(letters.values())) == 4
    counts = collections.Counter(row["answer"] for row in problems)
    assert min(counts[letter] for letter in "ABCD") > 50, counts


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "Question,Correct Answer\nq,a\n", '{"problem": "q"}', b"\xff\xfe,"])
def test_another_csv_is_named(tmp_path, text):
    file = tmp_path / "other.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="other.csv: not a GPQA file, which has the columns Question, Correct"):
        ev.read_bench(str(file))


def test_gpqa_takes_the_users_token_and_shows_it_to_the_hub_alone(site, monkeypatch):
    text = gpqa_csv(5).encode()
    url = next(iter(prepare.SOURCES["gpqa"]))
    monkeypatch.setitem(prepare.SOURCES, "gpqa", {url: hashlib.sha256(text).hexdigest()})
    site.files["/store"] = text
    site.faults[path(url)] = [401]
    with pytest.raises(OSError, match="401.*GPQA needs your own access.*HF_TOKEN.*gpqa.csv"):
        prepare.benchmark("gpqa")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site.faults[path(url)] = [site.address.replace("127.0.0.1", "localhost") + "/store"]
    problems, source = prepare.benchmark("gpqa")
    assert len(problems) == 5 and source == url
    assert [token for _, _, token in site.seen] == [None, "Bearer hf_secret", None]
    site.seen.clear()
    prepare.benchmark("aime24")
    assert site.seen[0][2] is None, "no other source sees it"


# ----------------------------------------------------------------------------------------------------------
# Training sets
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def without_pyarrow(monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)


def test_pages_of_rows_go_on_where_they_stopped(site, without_pyarrow, capsys):
    site.rows = [{"question": f"{i}\u2028?", "answer": i, "more": [i]} for i in range(250)] + \
        [{"question": "no answer", "answer": ""}, {"question": None, "answer": "1"}]
    page = "/datasets-server.huggingface.co/rows?dataset=RUC-AIBOX%2FSTILL-3-Preview-RL-Data&config=default" \
        "&split=train&offset={}&length=100"
    for stop in (100, 200):
        site.faults[page.format(stop)] = [404]
        with pytest.raises(OSError, match=f"offset={stop}.*404"):
            train.data_file("still")
        part, = prepare.CACHE.iterdir()
        with open(part, "ab") as file:
            file.write(b'{"question": "torn')
    name = train.data_file("still")
    assert [address for address, _ in asked(site)] == [page.format(i) for i in (0, 100, 100, 200, 200)]
    assert cached() == ["still.jsonl"]
    assert "2 rows without problem or answer were left out; sha256" in capsys.readouterr().out
    rows = train.read_rows(name)
    assert [(row["problem"], row["answer"]) for row in rows] == [(f"{i}\u2028?", str(i)) for i in range(250)]
    assert train.data_file("still") == name and len(site.seen) == 5, "fetched once"


@pytest.mark.parametrize("rows, message", [
    ([{"question": "q", "answer": "1"}] * 2, "2 rows came and not 3"),
    ([{"question": "q", "answer": "1", "cut": 1}], "cut these rows short")])
def test_a_set_that_is_not_whole_is_refused(site, without_pyarrow, rows, message, monkeypatch):
    monkeypatch.setitem(prepare.TRAINING, "open_rs", ("knoveleng/open-rs", 3))
    site.rows = rows
    with pytest.raises(ValueError, match=message):
        prepare.training_set("open_rs")
    assert not list(prepare.CACHE.glob("*.jsonl"))


@pytest.mark.parametrize("body", [b"[]", b"{}", b"<html>", b'{"rows": [], "num_rows_total": 5}', b"[" * 100_000,
                                  b'{"rows": [{"row": 1, "truncated_cells": []}], "num_rows_total": 1}'])
def test_a_strange_answer_of_the_row_server_is_named(site, without_pyarrow, body):
    page = "rows?dataset=GAIR%2FLIMR&config=default&split=train&offset=0&length=100"
    site.files[f"/datasets-server.huggingface.co/{page}"] = body
    with pytest.raises(ValueError, match="offset=0&length=100: "):
        prepare.training_set("limr")


def test_a_json_file_is_fetched_whole(site, monkeypatch):
    url = "https://huggingface.co/datasets/a/b/resolve/1/deepscaler.json"
    monkeypatch.setitem(prepare.TRAINING, "deepscaler", (url, 3))
    rows = [{"problem": f"q{i}", "answer": i, "solution": "s"} for i in range(3)]
    site.files[path(url)] = json.dumps(rows).encode()
    site.faults[path(url)] = ["cut"]
    file = prepare.training_set("deepscaler")
    assert [row["answer"] for row in resa.read_problems(file)] == ["0", "1", "2"] and cached() == ["deepscaler.jsonl"]
    for body in (b'{"a": 1}', b"[1]", b"[{"):
        file.unlink(missing_ok=True)
        site.files[path(url)] = body
        with pytest.raises(ValueError, match="deepscaler.json: not a JSON list of rows"):
            prepare.training_set("deepscaler")


def test_parquet_where_pyarrow_is_installed(site, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; sets then come in pages")
    import pyarrow.parquet
    hub, base = "https://huggingface.co/datasets/", "GAIR/LIMR/resolve/refs%2Fconvert%2Fparquet/default/train/"
    listing = []
    for i in range(2):
        count = 700 - 11 * i
        table = pyarrow.table({"prompt": [f"q{i}-{j}" for j in range(count)], "answer": ["1"] * count})
        pyarrow.parquet.write_table(table, tmp_path / "file")
        site.files[path(hub + base) + f"{i}.parquet"] = (tmp_path / "file").read_bytes()
        listing.append({"config": "default", "split": "train", "url": f"{hub}{base}{i}.parquet"})
    listing.append({"config": "default", "split": "test", "url": "https://elsewhere.example/x"})
    address = "/datasets-server.huggingface.co/parquet?dataset=GAIR%2FLIMR"
    site.files[address] = json.dumps({"parquet_files": listing}).encode()
    rows = resa.read_problems(prepare.training_set("limr"))
    assert len(rows) == 1389 and rows[700]["problem"] == "q1-0" and cached() == ["limr.jsonl"]
    (prepare.CACHE / "limr.jsonl").unlink()
    site.files[address] = json.dumps({"parquet_files": [listing[2] | {"split": "train"}]}).encode()
    with pytest.raises(ValueError, match="leads away from the set"):
        prepare.training_set("limr")


def test_the_presets_name_a_set_that_can_be_fetched():
    for name, preset in resa.PRESETS.items():
        if name != "tiny":
            assert preset["data"] in prepare.TRAINING and set(preset["bench"].split(",")) <= set(ev.PUBLISHED)
    with pytest.raises(ValueError, match="no --data given"):
        train.data_file("")
    with pytest.raises(ValueError, match="stil: no such file .*still, deepscaler, limr, open_rs"):
        train.data_file("stil")
    assert "data/cache/" in (ROOT / ".gitignore").read_text().split("\n")


# ----------------------------------------------------------------------------------------------------------
# From the download to the score
# ----------------------------------------------------------------------------------------------------------

def test_a_benchmark_by_name_from_download_to_summary(site, tmp_path, monkeypatch, capsys):
    """Length limit and prompt are the published ones, not those of the embedded preset; gold is what was fetched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ev.Eval, "max_new_tokens", 7)                # 32,768 takes the embedded model too long
    ev.main(["--bench", "aime24", "--model", "data/tiny/distill", "--limit", "4", "--device", "cpu", "--samples", "2",
             "--out", str(tmp_path)])
    assert "aime24, samples in" in capsys.readouterr().out
    folder = tmp_path / "eval" / "aime24"
    rows = ev.read_samples(folder / "data~tiny~distill.jsonl")
    assert [row["gold"] for row in rows[::2]] == ["20", "21", "22", "23"] and rows[2]["id"] == "aime24-61"
    words = ev.MATHS_PROMPT.replace("{problem}", "What is 0 + 20?")
    assert rows[0]["prompt"] == f"<|user|>{words}<|assistant|><think>\n"
    summary = json.loads((folder / "summary.json").read_text())["data~tiny~distill"]
    assert summary["data"] == FIRST and summary["settings"]["max_new_tokens"] == 7 and summary["grader"] == "resa"
    assert (summary["settings"]["temperature"], summary["settings"]["top_p"]) == (0.6, 0.95)


@pytest.mark.parametrize("spec", ["data/tiny/distill", "stories260k"])
def test_all_of_aime24_end_to_end(site, shared, monkeypatch, tmp_path, capsys, spec):
    """The pipeline is what is shown: toys know no competition mathematics."""
    url = next(iter(PINNED["aime24"]))
    monkeypatch.setitem(prepare.SOURCES, "aime24", PINNED["aime24"])
    site.files = {path(url): (shared / "bench" / "aime24.jsonl").read_bytes()}
    monkeypatch.chdir(ROOT)
    if spec == "stories260k":                                        # it comes without a chat template
        spec = str(tmp_path / spec)
        shutil.copytree(shared / "stories260k", spec)
        (tmp_path / "stories260k" / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    ev.main(["--bench", "aime24", "--model", spec, "--max-new-tokens", "12", "--device", "cpu",
             "--out", str(tmp_path)])
    out = capsys.readouterr()
    rows = ev.read_samples(tmp_path / "eval" / "aime24" / f"{ev.label_of(spec)}.jsonl")
    assert len(rows) == 30 and "30 x 1" in out.out and sum(row["correct"] for row in rows) < 3
    full = [row for row in rows if row["tokens"] == 0]
    assert f"{len(full)} of 30 prompts fill them all" in out.err and 0 < len(full) < 8
    ev.main(["--regrade", str(tmp_path / "eval" / "aime24" / f"{ev.label_of(spec)}.jsonl")])
    assert "30 samples, 0 of them graded differently" in capsys.readouterr().out


def test_all_names_every_published_benchmark(site, monkeypatch):
    args = resa.parse_flags(ev.Eval, ["--bench", "all", "--limit", "2"], "eval.py")
    text = gpqa_csv(3).encode()
    for name in PINNED:
        body = text if name == "gpqa" else FILE
        monkeypatch.setitem(prepare.SOURCES, name, {FIRST + name: hashlib.sha256(body).hexdigest()})
        site.files[path(FIRST + name)] = body
    benches = ev.read_benches(args)
    assert list(benches) == list(PINNED) and all(len(problems) == 2 for problems, _, _ in benches.values())
    assert benches["gpqa"][2] == ev.CHOICE_PROMPT and benches["minerva"][2] == ev.MATHS_PROMPT
