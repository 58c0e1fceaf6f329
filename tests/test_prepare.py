"""data/prepare.py.

The embedded data is rebuilt byte for byte; benchmarks and training sets come by the real download
path from a loopback server that misbehaves.
"""

import collections
import hashlib
import http.server
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest
import torch

import eval as ev
import train
from data import prepare
from data.files import TINY, read_jsonl
from data.flags import read_preset
from data.rows import read_problems
from model import load_model, load_tokenizer
from tests.conftest import ROOT


# ------------------------------------------------------------------------------------------------
# The embedded data and models: rebuilt byte for byte, disjoint, and as good as the README says
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, count, test, seed",
                         [("train", 4000, False, 1), ("test", 1000, True, 2)])
def test_questions_are_rebuilt_byte_for_byte(tmp_path, name, count, test, seed):
    prepare.save(tmp_path / "rows.jsonl", prepare.questions(count, test, seed))
    assert (tmp_path / "rows.jsonl").read_bytes() == (TINY / f"{name}.jsonl").read_bytes()


def test_tokenizer_and_configuration_are_rebuilt_byte_for_byte(tmp_path):
    prepare.tokenizer(tmp_path / "init")
    names = sorted(path.name for path in (TINY / "init").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "init").iterdir())
    for name in names:
        assert (tmp_path / "init" / name).read_bytes() == (TINY / "init" / name).read_bytes()
    # the configuration is written down, not derived: it has to fit the tokenizer
    tok, config = load_tokenizer(TINY / "init"), prepare.RECIPE["init"]["config.json"]
    assert config["eos_token_id"] == tok.eos_id
    assert config["vocab_size"] == tok.fast.get_vocab_size()


# sha256 of the first hundred rows of each corpus, as the embedded models were trained on them
CORPORA = {
    "lm": "f943b0b4460fbd79fa4dbffeb57af0a5f3ffc0edfbd43d1558a7cb915a01f949",
    "math": "6209a0d0ae50502710a846199ca5d1ab658b92a784226c48b39c3c8d11d48dec",
    "distill": "55749f35e2f5669e9027a94fb90a670992643ebb49a677b534c76b9e5b8f2264",
    "answer": "7b14b3f0dfbd4c9544dd3838fd9b2aa6a2eb863b332b68d1828aaac58d944c47",
    "refuse": "4eea0b93254fa6ec65f878212a5552a8c2776b4b6facb8ddde1fc4e6cb90f6b2",
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_keep_their_bytes(tmp_path, monkeypatch, name):
    corpus = prepare.RECIPE["corpora"][name]
    monkeypatch.setitem(prepare.RECIPE, "corpora", {name: corpus | {"rows": 100}})
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    prepare.main(["corpora"])
    written = (tmp_path / "out" / "corpora" / f"{name}.jsonl").read_bytes()
    assert hashlib.sha256(written).hexdigest() == CORPORA[name]


def numbers_in(row):
    words = [word.strip(".,?") for word in row["problem"].split()]
    return [int(word) for word in words if word.isdigit()]


def test_train_and_test_share_no_question_under_any_wording():
    learned, test = (read_problems(TINY / f"{name}.jsonl") for name in ("train", "test"))
    assert not {row["problem"] for row in learned} & {row["problem"] for row in test}
    rng = random.Random(0)      # the corpora are drawn from the train side, never from the other
    for side in (False, True):
        for _ in range(2000):
            q = prepare.draw(rng, test=side)
            assert prepare.is_test(q["family"], q["numbers"]) == side
    # The hash is over named numbers: as unordered ones only mirror images (a and b swapped) meet.
    learned, test = ({(row["family"], tuple(sorted(numbers_in(row)))) for row in rows}
                     for rows in (learned, test))
    assert len(learned & test) < 0.2 * 1000


def test_persons_of_a_question_are_different():
    """Once "Gus is 22 years older.  Gus was born 20 years after Gus." could be asked."""
    names, things = ("|".join(prepare.RECIPE[key]) for key in ("names", "things"))
    for row in read_problems(TINY / "train.jsonl") + read_problems(TINY / "test.jsonl"):
        persons, shape = set(re.findall(names, row["problem"])), row["problem"]
        for pattern, mark in ((names, "N"), (things, "T"), (r"\d+", "0")):
            shape = re.sub(pattern, mark, shape)
        asked = set()       # how many persons the wordings of this shape have
        for wording in prepare.FAMILIES[row["family"]]["wordings"]:
            filled = wording.format(n="N", m="N", o="N", t="T", a=0, b=0, c=0, d=0)
            if re.sub(things, "T", filled) == shape:
                assert not re.search(names, wording)        # every person is drawn
                asked.add(len(set(re.findall("{([nmo])}", wording))))
        assert asked == {len(persons)}, row


def test_every_answer_is_right():
    for row in read_problems(TINY / "test.jsonl")[:300]:
        family, possible = prepare.FAMILIES[row["family"]], set()
        for order in itertools.permutations(numbers_in(row)):
            steps = prepare.work_out(family["steps"], dict(zip(family["numbers"], order)))
            possible.add(str(steps[-1][1]))
        assert row["answer"] in possible and 1 <= int(row["answer"]) <= 99


def test_a_careless_trace_goes_on_from_its_wrong_value():
    numbers = {"a": 50, "b": 30, "c": 20}
    steps = prepare.work_out(["a+b", "p-c"], numbers, random.Random(0), slips=1.0)
    (first, p), (second, result) = steps
    assert first == f"50+30={p}" and abs(p - 80) in (1, 10)
    assert second == f"{p}-20={result}" and abs(result - (p - 20)) in (1, 10)
    assert prepare.work_out(["a+b", "p-c"], numbers) == [("50+30=80", 80), ("80-20=60", 60)]


@pytest.mark.parametrize("name", ["lm", "math", "distill"])
def test_the_lineage_loads_and_is_small(name):
    lm = load_model(TINY / name)
    assert sum(p.numel() for p in lm.parameters()) < 1e6
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 12e6


@pytest.mark.parametrize("name", ["lm", "math"])
def test_what_was_saved_is_what_was_trained(name):
    """Nats per token on fresh text; uniform is ln 542 = 6.3.  A head lost on saving shows here."""
    lm, tok = load_model(TINY / name), load_tokenizer(TINY / name)
    rng, losses = random.Random(99), []
    for _ in range(30):
        text = prepare.corpus_row(rng, **prepare.RECIPE["corpora"][name]["row"])["text"]
        ids = torch.tensor([[tok.eos_id] + tok.encode(text)])
        losses.append(-train.next_token_logprobs(lm, lm.run(ids), ids).mean().item())
    assert sum(losses) / len(losses) < 1.3


def test_distill_is_a_base_that_can_and_often_does_not_and_rl_does(tmp_path):
    """150 held-out questions; the README has all 1,000.  The bounds allow for the noise of 150."""
    problems, rates = read_problems(TINY / "test.jsonl")[:150], {}
    for name, spec in (("distill", f"{TINY}/distill"), ("rl", f"{TINY}/distill+{TINY}/rl")):
        rows = ev.evaluate(load_model(spec), load_tokenizer(spec), problems,
                           tmp_path / f"{name}.jsonl", max_new_tokens=96, slots=150)
        rates[name] = sum(row["correct"] for row in rows) / len(rows)
    assert 0.32 < rates["distill"] < 0.68 and rates["rl"] > 0.85


# ------------------------------------------------------------------------------------------------
# A server on the loopback device: files by path, faults by path, a record of the requests
# ------------------------------------------------------------------------------------------------

AIME = "https://first.example/aime.jsonl"
ROWS = [{"id": 60 + i, "problem": f"What is {i} + 20?", "answer": f"{20 + i:03d}", "url": "x" * 900}
        for i in range(30)]
FILE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SHA = hashlib.sha256(FILE).hexdigest()
HUB = "https://huggingface.co/datasets/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, path = self.server, self.path
        site.seen.append((path, self.headers.get("Authorization")))
        fault = site.faults[path].pop(0) if site.faults[path] else ""
        if isinstance(fault, int):
            self.send_response(fault)
            self.end_headers()
        elif fault.startswith("http"):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
        elif path in site.files:
            self.give(site.files[path], fault)
        elif site.rows is not None and path.startswith("/datasets-server"):
            self.give(site.page(path), fault)
        else:
            self.send_error(404)

    def give(self, body, fault):
        body = b"#" * len(body) if fault == "other bytes" else body
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault in ("cut", "stall") else body)
        self.wfile.flush()
        if fault == "stall":
            self.server.wake.wait(10)

    def log_message(self, *args):
        pass


class Site(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.seen = {}, collections.defaultdict(list), []
        self.rows = None
        self.wake, self.address = threading.Event(), f"http://127.0.0.1:{self.server_address[1]}"

    def page(self, path):
        """The row server's answer to a path that ends in &offset=...&length=..."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        offset, length = int(query["offset"][0]), int(query["length"][0])
        rows = []
        for i, row in list(enumerate(self.rows))[offset:offset + length]:
            cut = ["question"] if row.get("cut") else []
            rows.append({"row_idx": i, "row": row, "truncated_cells": cut})
        answer = {"features": [], "rows": rows, "num_rows_total": len(self.rows), "partial": False}
        return json.dumps(answer).encode()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The server stands in for all sites, and has a small "aime24" of 30 made-up problems."""
    server = Site()
    serve = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=serve, daemon=True).start()
    monkeypatch.setenv("RESA_MIRROR", server.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepare, "PAUSES", [0, 0])
    monkeypatch.setitem(prepare.SOURCES, "aime24", {"url": AIME, "sha256": SHA})
    server.files = {path(AIME): FILE}
    yield server
    server.wake.set()
    server.shutdown()
    server.server_close()


def path(url):
    return url.removeprefix("https:/")


def asked(site):
    return [address for address, _ in site.seen]


def cached():
    return sorted(file.name for file in prepare.CACHE.iterdir())


# ------------------------------------------------------------------------------------------------
# Downloads
# ------------------------------------------------------------------------------------------------

def test_a_benchmark_is_fetched_once(site):
    problems, source = prepare.benchmark("aime24")
    assert source == AIME and len(problems) == 30
    wanted = {"id": "aime24-63", "problem": "What is 3 + 20?", "answer": "23"}       # not 023
    assert problems[3] == wanted
    assert prepare.benchmark("aime24") == (problems, source)
    assert asked(site) == [path(AIME)]
    assert cached() == ["aime24.jsonl"]
    assert (prepare.CACHE / "aime24.jsonl").read_bytes() == FILE


def test_a_server_that_sends_without_end_is_cut_off(site, monkeypatch):
    monkeypatch.setattr(prepare, "LARGEST", len(FILE))
    with pytest.raises(OSError, match=f"refused, longer than {len(FILE):,} bytes"):
        prepare.benchmark("aime24")
    assert asked(site) == [path(AIME)] and not [*prepare.CACHE.glob("*")]


@pytest.mark.parametrize("fault", ["cut", "stall", "no length"])
def test_a_broken_transfer_is_repeated(site, fault, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.3)
    site.faults[path(AIME)] = [fault]
    assert prepare.benchmark("aime24")[1] == AIME
    assert asked(site) == [path(AIME)] * (1 if fault == "no length" else 2)
    assert cached() == ["aime24.jsonl"]


@pytest.mark.parametrize("faults, reason", [
    (["other bytes"], f"refused, its sha256 is .* pinned one.* {SHA}"), ([404], "404"),
    ([503, 503, 503], "503"), (["stall"] * 3, "timed out"), (["cut"] * 3, "more expected")])
def test_what_may_pass_is_tried_again_and_what_will_not_is_not(site, faults, reason, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    site.faults[path(AIME)] = list(faults)
    with pytest.raises(OSError) as caught:
        prepare.benchmark("aime24")
    said = str(caught.value)
    assert said.startswith(f"aime24: {AIME}: ") and re.search(reason, said)
    assert len(asked(site)) == len(faults) and not prepare.CACHE.exists()


def test_a_busy_server_is_asked_again(site):
    site.faults[path(AIME)] = [429, 500]
    assert prepare.benchmark("aime24")[1] == AIME and len(site.seen) == 3


def test_other_bytes_are_refused_and_nothing_of_them_is_kept(site):
    site.files = {path(AIME): FILE.replace(b"3 +", b"4 +")}
    with pytest.raises(OSError) as caught:
        prepare.benchmark("aime24")
    came = hashlib.sha256(site.files[path(AIME)]).hexdigest()
    for part in (AIME, SHA, came, str(prepare.CACHE / "aime24.jsonl")):
        assert part in str(caught.value)
    assert not prepare.CACHE.exists()


def test_a_cached_file_that_was_changed_is_refused(site):
    prepare.benchmark("aime24")
    file = prepare.CACHE / "aime24.jsonl"
    file.write_bytes(FILE.replace(b"020", b"021"))
    wanted = f"aime24.jsonl: refused, its sha256 is .* put the file .*{SHA}. at .* it is fetched"
    with pytest.raises(OSError, match=wanted):
        prepare.benchmark("aime24")


def test_offline_the_message_says_which_file_to_put_where(site, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RESA_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(sys, "argv", ["prepare.py", "fetch", "aime24"])
        with pytest.raises(SystemExit) as caught:
            prepare.front_door(prepare.main)
        said = capsys.readouterr().err
        file = prepare.CACHE / "aime24.jsonl"
        file.parent.mkdir()
        assert caught.value.code == 2 and said.count("\n") == 1
        assert f"put the file {AIME} (sha256 {SHA}) at {file}; if" in said
        file.write_bytes(FILE)                                       # which then works, offline
        prepare.main(["fetch", "aime24"])
        assert capsys.readouterr().out == f"aime24: 30 problems of {AIME}\n"


def command(*argv):
    return subprocess.run([sys.executable, "-m", "data.prepare", *argv], cwd=ROOT,
                          capture_output=True, text=True)


def test_help_is_the_docstring():
    run = command("--help")
    assert run.returncode == 0 and run.stdout == prepare.__doc__ + "\n" and not run.stderr


@pytest.mark.parametrize("argv", ["fetch", "tiny corpora", "--bogus", "fetch aime23"])
def test_a_command_that_is_none_ends_in_one_line(argv):
    run = command(*argv.split())
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and "olympiadbench" in run.stderr


# ------------------------------------------------------------------------------------------------
# The published files
# ------------------------------------------------------------------------------------------------

PINNED = dict(prepare.SOURCES)
# Fields that a golden hash covers beside id, problem and answer, by their names in the file.
EXTRAS = {"math500": {"subject": "subject", "level": "level"}, "minerva": {"type": "type"},
          "olympiadbench": {"answer_type": "answer_type", "is_multiple_answer": "multiple",
                            "unit": "unit", "error": "error"}}
GOLDEN = {
    "aime24": (30, "672801744034116077915da2816e5a404815ae27109ef3776a8e522769bf9809"),
    "aime25": (30, "1939c3aa37ecf2dd75e05b3ee3a087c3e7b701db5634ea460f0cc3ca29ec39bf"),
    "amc23": (40, "ee82c7428ec8185468bb115577fa405dad3d428e85f20ce8da9f7e8e328c310e"),
    "math500": (500, "cd8dcd9e49d089ef1b7a654823c6976338fcfb44d4a2d9c9afb53b8437e29876"),
    "minerva": (272, "3132f1e55696b4ec1d6572c99fe6cd0be5d058dca84b2c98c4453f0871f53080"),
    "olympiadbench": (675, "44bacab70a289d1f114a77dd5a3b76f58318cea41b9eaeb4344eca4dc9c93f32")}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_files_become_the_rows_that_were_checked(site, shared, monkeypatch, name):
    monkeypatch.setitem(prepare.SOURCES, "aime24", PINNED["aime24"])
    url = prepare.SOURCES[name]["url"]
    site.files[path(url)] = (shared / "bench" / f"{name}.jsonl").read_bytes()
    problems, source = prepare.benchmark(name)
    count, golden = GOLDEN[name]
    raw = [json.loads(line) for line in site.files[path(url)].decode().split("\n") if line]
    text = ""
    for row, old in zip(problems, raw):
        row = row | {new: old[key] for key, new in EXTRAS.get(name, {}).items()}
        text += json.dumps(row, ensure_ascii=False) + "\n"
    assert source == url and len({row["id"] for row in problems}) == count == len(raw)
    assert hashlib.sha256(text.encode()).hexdigest() == golden


def test_each_benchmark_is_read_by_its_own_names():
    row = prepare.as_problem("aime24", {"id": 4, "question": "q", "answer": "025"})
    assert row == {"id": "aime24-4", "problem": "q", "answer": "25"}
    row = prepare.as_problem("amc23", {"id": 7, "problem": "q", "answer": 27.0})
    assert row == {"id": "amc23-7", "problem": "q", "answer": "27"}
    solved = {"problem": "q", "solution": r"\boxed{1} so \boxed{\frac{1}{2}}.", "idx": 3}
    row = prepare.as_problem("minerva", solved)
    assert row == {"id": "minerva-3", "problem": "q", "answer": r"\frac{1}{2}"}
    listed = {"id": 9, "question": "q", "final_answer": ["$x$"]}
    row = prepare.as_problem("olympiadbench", listed)
    assert row == {"id": "olympiad-9", "problem": "q", "answer": "x"}
    row = prepare.as_problem("math500", {"unique_id": "a/1", "problem": "q", "answer": "1"})
    assert row == {"id": "a/1", "problem": "q", "answer": "1"}


def test_sources_are_pinned():
    for source in PINNED.values():
        assert source["url"].startswith("https://") and "/main/" not in source["url"]
        assert re.search("/[0-9a-f]{40}/", source["url"]) and len(source["sha256"]) == 64
    assert PINNED["gpqa"]["url"].startswith(HUB + "Idavidrein/"), "from its authors only"
    assert list(PINNED) == [name for name in ev.BENCHES if name != "tiny"]
    for source in prepare.TRAINING.values():
        assert re.search(r"^[\w-]+/[\w-]+$|/[0-9a-f]{40}/", source)


# ------------------------------------------------------------------------------------------------
# GPQA: made-up questions in its format
# ------------------------------------------------------------------------------------------------

def gpqa_csv(count, seed=None):
    rows = []
    for i in range(count):
        rows.append(f'"Question {i}, with a\nsecond line?","right {i} ","wrong {i}",'
                    f'"bad, {i}","false {i}",rec{i}')
    if seed is not None:
        random.Random(seed).shuffle(rows)
    wrong = [f"Incorrect Answer {i}" for i in (1, 2, 3)]
    return "\n".join([",".join(["Question", "Correct Answer", *wrong, "Record ID"]), *rows])


def test_the_order_of_gpqa_options_depends_on_the_question_alone(tmp_path):
    file = tmp_path / "gpqa_diamond.csv"
    file.write_text(gpqa_csv(300))
    problems, source = ev.read_bench(str(file))
    file.write_text(gpqa_csv(300, seed=1))
    shuffled = {row["id"]: row for row in ev.read_bench(str(file))[0]}
    assert shuffled == {row["id"]: row for row in problems}
    for i, row in enumerate(problems):
        question, options = row["problem"].split("\n\n")
        letters = dict(line.split(") ") for line in options.split("\n"))
        assert question == f"Question {i}, with a\nsecond line?" and list(letters) == list("ABCD")
        assert letters[row["answer"]] == f"right {i}" and len(set(letters.values())) == 4
    counts = collections.Counter(row["answer"] for row in problems)
    assert min(counts[letter] for letter in "ABCD") > 50, counts


@pytest.mark.parametrize("text", [b"a,b\n1,2\n", b"Question,Correct Answer\nq,a\n",
                                  b'{"problem": "q"}', b"\xff\xfe,"])
def test_another_csv_is_named(tmp_path, text):
    file = tmp_path / "other.csv"
    file.write_bytes(text)
    wanted = "other.csv: not a GPQA file, which has the columns Question, Correct"
    with pytest.raises(ValueError, match=wanted):
        ev.read_bench(str(file))


def test_gpqa_takes_the_users_token_and_shows_it_to_the_hub_alone(site, monkeypatch):
    text = gpqa_csv(5).encode()
    url = prepare.SOURCES["gpqa"]["url"]
    pinned = {"url": url, "sha256": hashlib.sha256(text).hexdigest()}
    monkeypatch.setitem(prepare.SOURCES, "gpqa", pinned)
    site.files["/store"] = text
    site.faults[path(url)] = [401]
    with pytest.raises(OSError, match="401.*GPQA needs your own access.*HF_TOKEN.*gpqa.csv"):
        prepare.benchmark("gpqa")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    site.faults[path(url)] = [site.address.replace("127.0.0.1", "localhost") + "/store"]
    problems, source = prepare.benchmark("gpqa")
    assert len(problems) == 5 and source == url
    assert [token for _, token in site.seen] == [None, "Bearer hf_secret", None]
    site.seen.clear()
    prepare.benchmark("aime24")
    assert site.seen[0][1] is None, "no other source sees it"


# ------------------------------------------------------------------------------------------------
# Training sets
# ------------------------------------------------------------------------------------------------

PAGE = ("/datasets-server.huggingface.co/rows?dataset={}&config=default&split=train"
        "&offset={}&length=100")


def test_pages_of_rows_become_one_set(site, capsys):
    site.rows = [{"question": f"{i}\u2028?", "answer": i, "more": [i]} for i in range(250)]
    site.rows += [{"question": "no answer", "answer": ""}, {"question": None, "answer": "1"}]
    still = "RUC-AIBOX%2FSTILL-3-Preview-RL-Data"
    site.faults[PAGE.format(still, 100)] = [404]
    with pytest.raises(OSError, match="offset=100.*404"):
        train.data_file("still")
    assert not prepare.CACHE.exists()
    site.seen.clear()
    name = train.data_file("still")
    assert asked(site) == [PAGE.format(still, i) for i in (0, 100, 200)]
    assert cached() == ["still.jsonl"]
    assert "2 rows without problem or answer were left out; sha256" in capsys.readouterr().out
    rows = [(row["problem"], row["answer"]) for row in train.read_rows(name)]
    assert rows == [(f"{i}\u2028?", str(i)) for i in range(250)]
    assert train.data_file("still") == name and len(site.seen) == 3, "fetched once"


def test_a_page_that_was_cut_short_is_asked_for_again(site):
    site.rows = [{"question": f"q{i}", "answer": i} for i in range(3)]
    site.faults[PAGE.format("knoveleng%2Fopen-s1", 0)] = ["cut", 503]
    rows = [row for _, row in read_jsonl(prepare.training_set("open_s1"))]
    assert [row["problem"] for row in rows] == ["q0", "q1", "q2"] and cached() == ["open_s1.jsonl"]


@pytest.mark.parametrize("rows, message", [
    ([{"question": ["q"], "answer": "1"}] * 3, "open-rs: row 0: 'question' should be"),
    ([{"question": "q", "answer": "1", "cut": 1}], "'truncated_cells' is above 0")])
def test_a_set_that_is_not_whole_is_refused(site, rows, message):
    site.rows = rows
    with pytest.raises(ValueError, match=message):
        prepare.training_set("open_rs")
    assert not list(prepare.CACHE.glob("*.jsonl"))


def test_rows_of_a_training_set_with_blank_fields_are_left_out(site, capsys):
    site.rows = [{"problem": "p", "answer": " "}, {"problem": " ", "question": "q", "answer": 7},
                 {"problem": "\t", "answer": "a"}, {"problem": "p", "answer": None}]
    kept = read_problems(prepare.training_set("open_rs"))
    assert [(row["problem"], row["answer"]) for row in kept] == [("q", "7")]
    assert "3 rows without problem or answer" in capsys.readouterr().out


@pytest.mark.parametrize("body", [
    b"[]", b"{}", b"<html>", b'{"rows": [], "num_rows_total": 5}', b"[" * 100_000,
    b'{"rows": [], "num_rows_total": 1e9}', b'{"rows": [], "num_rows_total": 99999999}',
    b'{"rows": [{"row": 1, "truncated_cells": []}], "num_rows_total": 1}'])
def test_a_strange_answer_of_the_row_server_is_named(site, body):
    site.files[PAGE.format("GAIR%2FLIMR", 0)] = body
    with pytest.raises(ValueError, match="offset=0&length=100(: | should be)"):
        prepare.training_set("limr")


def test_a_json_file_is_fetched_whole(site, monkeypatch):
    url = f"{HUB}a/b/resolve/1/deepscaler.json"
    monkeypatch.setitem(prepare.TRAINING, "deepscaler", url)
    rows = [{"problem": f"q{i}", "answer": i, "solution": "s"} for i in range(3)]
    site.files[path(url)] = json.dumps(rows).encode()
    site.faults[path(url)] = ["cut"]
    file = prepare.training_set("deepscaler")
    assert [row["answer"] for row in read_problems(file)] == ["0", "1", "2"]
    assert cached() == ["deepscaler.jsonl"]
    for body, message in ((b'{"a": 1}', " should be a list"), (b"[1]", " should be an object"),
                          (b"[{", ": not JSON")):
        file.unlink(missing_ok=True)
        site.files[path(url)] = body
        with pytest.raises(ValueError, match=f"deepscaler.json{message}"):
            prepare.training_set("deepscaler")


def test_the_presets_name_a_set_that_can_be_fetched():
    for name in json.loads((ROOT / "data" / "presets.json").read_text()):
        preset = read_preset(name)
        if name not in ("own", "tiny"):
            assert preset["data"] in prepare.TRAINING
            assert set(preset["bench"].split(",")) <= set(prepare.SOURCES)
    with pytest.raises(ValueError, match="stil: no such file,.*still, deepscaler, limr, open_rs"):
        train.data_file("stil")
    assert "data/cache/" in (ROOT / ".gitignore").read_text().split("\n")


# ------------------------------------------------------------------------------------------------
# From the download to the score
# ------------------------------------------------------------------------------------------------

def test_a_benchmark_by_name_from_download_to_summary(site, tmp_path, monkeypatch, capsys):
    """Length limit and prompt are the published ones, not the preset's; gold is as fetched."""
    monkeypatch.chdir(ROOT)
    ev.main(["--bench", "aime24", "--model", "data/tiny/distill", "--limit", "4", "--samples", "2",
             "--device", "cpu", "--out", str(tmp_path)])
    assert "aime24, samples in" in capsys.readouterr().out
    folder = tmp_path / "eval" / "aime24"
    rows = ev.read_samples(folder / "data~tiny~distill.jsonl")
    assert [row["gold"] for row in rows[::2]] == ["20", "21", "22", "23"]
    assert rows[2]["id"] == "aime24-61"
    words = ev.BENCHES["aime24"].replace("{problem}", "What is 0 + 20?")
    assert rows[0]["prompt"] == f"<|user|>{words}<|assistant|><think>\n"
    summary = json.loads((folder / "summary.json").read_text())["data~tiny~distill"]
    settings = summary["settings"]
    assert summary["data"] == AIME and settings["max_new_tokens"] == 32768
    assert (settings["temperature"], settings["top_p"]) == (0.6, 0.95)


@pytest.mark.parametrize("spec", ["data/tiny/distill", "stories260k"])
def test_all_of_aime24_end_to_end(site, shared, monkeypatch, tmp_path, capsys, spec):
    """The pipeline is what is shown: toys know no competition mathematics."""
    monkeypatch.setitem(prepare.SOURCES, "aime24", PINNED["aime24"])
    body = (shared / "bench" / "aime24.jsonl").read_bytes()
    site.files = {path(PINNED["aime24"]["url"]): body}
    monkeypatch.chdir(ROOT)
    if spec == "stories260k":                                        # it has no chat template
        spec = str(tmp_path / spec)
        shutil.copytree(shared / "stories260k", spec)
        template = tmp_path / "stories260k" / "chat_template.jinja"
        template.write_text("{{ messages[0].content }}\n")
    ev.main(["--bench", "aime24", "--model", spec, "--max-new-tokens", "12", "--device", "cpu",
             "--out", str(tmp_path)])
    out = capsys.readouterr()
    file = tmp_path / "eval" / "aime24" / f"{ev.label_of(spec)}.jsonl"
    rows = ev.read_samples(file)
    assert len(rows) == 30 and "30 x 1" in out.out and sum(row["correct"] for row in rows) < 3
    full = [row for row in rows if row["tokens"] == 0]
    assert f"{len(full)} of 30 prompts fill them all" in out.err and 0 < len(full) < 8
    ev.main(["--regrade", str(file)])
    assert "30 samples, 0 of them graded differently" in capsys.readouterr().out


def test_all_names_every_published_benchmark(site, monkeypatch, tmp_path):
    for name in PINNED:
        body, url = FILE, AIME + name
        if name == "gpqa":
            body, url = gpqa_csv(3).encode(), AIME + name + ".csv"
        if name == "gsm8k":              # not one of all
            continue
        if name in ("minerva", "olympiadbench"):
            solved = ROWS[0] | {"solution": r"\boxed{2}", "final_answer": ["2"]}
            body = "".join(json.dumps(solved | {"id": i}) + "\n" for i in range(2)).encode()
        pinned = {"url": url, "sha256": hashlib.sha256(body).hexdigest()}
        monkeypatch.setitem(prepare.SOURCES, name, pinned)
        site.files[path(url)] = body
    monkeypatch.chdir(ROOT)
    ev.main(["--bench", "all", "--limit", "2", "--model", "data/tiny/distill", "--device", "cpu",
             "--max-new-tokens", "2", "--out", str(tmp_path)])
    assert not (tmp_path / "eval" / "gsm8k").exists()
    for name in ev.ALL:
        rows = ev.read_samples(tmp_path / "eval" / name / "data~tiny~distill.jsonl")
        start = ev.BENCHES[name].split("{problem}")[0]
        assert len(rows) == 2 and rows[0]["prompt"].startswith(f"<|user|>{start}")
    assert ev.BENCHES["gpqa"] != ev.BENCHES["minerva"]
