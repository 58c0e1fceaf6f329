"""Damaged and hostile files for every reader, from a seed: what is not refused in one line?

    python -m pytest tests/test_fuzz.py -q         a thousand of them
    python -m tests.test_fuzz 50000 [SEED]         so many, and a table of what came of them

A reader may refuse a file by ValueError or OSError, in one line, or accept it.  What it accepts may
differ from the original in what it computes only if the file says something else, by a parser that
is not ours: other values in fields that the reader uses, other tensors, another template.  Damaged
JSON, damaged headers and weights that are not finite must be refused.  Any other exception, more
than 2 s of processor time or half a gigabyte is a failure.
"""

import copy
import csv
import hashlib
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resa
import train
from data import flags, prepare, runs
from data.adapters import ADAPTER_FIELDS
from data.formats import SAELENS, TRAINER, load_any
from data.rows import read_problems
from data.tokenizer import Tokenizer
from eval import FIELDS, read_samples
from model import (
    DENSE_FIELDS, MOE_FIELDS, OTHER_FIELDS, Config, Transformer, init_weights, load_model,
    save_model)
from sae import LAYOUT, SETTINGS, build, save_sae
from tests.conftest import ROOT
from tests.test_formats import foreign

SECONDS, MEGABYTES = 2, 512


# ------------------------------------------------------------------------------------------------
# Readers: a directory with good files, which of them is damaged, how it is read
# ------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    make: Callable      # directory -> None: writes good files
    file: str           # which one is damaged
    kind: str           # "json", "jsonl", "samples", "tensors" or "text"
    read: Callable      # directory -> what was understood
    fields: tuple = ()  # those at the top of a JSON object that may change it; (): any


DENSE = dict(vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4, rms_norm_eps=1e-6,
             tie_word_embeddings=True, eos_token_id=[1, 2], max_position_embeddings=64)
SPARSE = DENSE | dict(model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=4, shared_expert_intermediate_size=4)
EXTRAS = {"rope_scaling": {"type": "default"}, "transformers_version": "5.0", "torch_dtype": "float32",
          "hidden_act": "silu", "use_cache": True}
CONFIG = (*DENSE_FIELDS, *MOE_FIELDS, *OTHER_FIELDS)
X = (torch.arange(12.).view(3, 4) - 5) / 4


def model(**fields):
    return init_weights(Transformer(Config.from_dict(DENSE | fields)).requires_grad_(False))


def make_model(directory, fields=DENSE):
    save_model(init_weights(Transformer(Config.from_dict(fields))), directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | EXTRAS))


def make_moe(directory):
    make_model(directory, SPARSE)


def make_shards(directory):
    make_model(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, files = sorted(tensors), ("1.safetensors", "2.safetensors")
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::2]}, directory / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(directory):
    base = model()
    resa.add_lora(base, r=2, alpha=4)
    for name, p in base.named_parameters():
        if name.endswith("lora_B"):
            p.data.fill_(0.5)
    resa.save_adapter(base, directory, "base")
    make_model(directory / "base")


def make_sae(directory, variant="topk", **hyper):
    sae = build(variant, 4, 6, k=2, **hyper)
    sae.meta = {"layer": 1, "site": "resid", "model": "m", "sink_norm": 3.5}
    save_sae(sae, directory)


def make_tokenizer(directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((ROOT / "data" / "tiny" / "distill" / name).read_bytes())


def make_template(directory):
    make_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)


PROBLEMS = [{"problem": "1+1?", "answer": 2, "id": "a"}, {"question": "2+2?", "answer": "4", "level": 3}]
TEXTS = [{"text": "one two"}, {"problem": "p", "completion": "c"}, {"text": "three", "source": "x"}]
SAMPLES = [{"id": "a", "sample": i, "seed": [0, 0, i], "prompt": "p", "gold": "2", "completion": "2",
            "tokens": 3, "finish": "stop", "settings": {"top_p": 0.95}, "extracted": "2",
            "correct": True} for i in range(3)]


def lines(rows):
    return lambda directory: write(directory, "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


def write(directory, name, text):
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def make_csv(directory):
    text = io.StringIO()
    rows = csv.DictWriter(text, ["Record ID", *prepare.GPQA])
    rows.writeheader()
    rows.writerow({"Record ID": "r"} | {name: f"{name}, so" for name in prepare.GPQA})
    write(directory, "gpqa.csv", text.getvalue())


SETTINGS_FILE = {"lr": 0.1, "steps": 5, "variant": "topk", "set": ["seed=1"], "shuffle": False, "k": 4}
PRESETS = {"tiny": {"seed": 1, "sae": {"k": 4}}, "more": {"like": "tiny", "sae": {"latents": 8}}}


def run_of(directory, resume):
    """A training run that has, or is given, a checkpoint."""
    args = SimpleNamespace(out=str(directory), resume=resume, fresh=False, origin={}, schedule="constant",
                           device="cpu", steps=5, seed=0,
                           save_every=1, log_every=1, processes=1, micro_batch=1)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    if not resume:
        module(torch.ones(3)).sum().backward()
        optimizer.step()
    return runs.Run("pretrain", args, module, optimizer, 1, [])


def make_checkpoint(directory):
    directory.mkdir(parents=True)
    run_of(directory, resume=False).save(1)


def read_checkpoint(directory):
    run = run_of(directory, resume=True)
    return run.start, run.module.state_dict(), run.optimizer.state_dict()


def finite(tensors):
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{name} is not finite, and accepted"
    return tensors


def read_model(directory):
    loaded = load_model(str(directory))
    return loaded.config.to_dict(), finite(dict(loaded.named_parameters()))


def read_adapted(directory):
    return read_model(f"{directory}/base+{directory}")


def read_sae(directory):
    sae = load_any(str(directory))
    x = X if sae.d_in == 4 else torch.ones(3, sae.d_in)
    return sae.hyper, sae.meta, finite(sae.state_dict()), sae(x.to(sae.W_dec.dtype))


def read_tokenizer(directory):
    tokenizer = Tokenizer(directory)
    tokenizer.own_eos_id in tokenizer.eos_ids and tokenizer.eos_id
    text = tokenizer.chat([{"role": "user", "content": "What is 2+3?"}])
    assert len(text) <= 10**6
    return tokenizer.special, sorted(tokenizer.eos_ids), text, tokenizer.encode(text[:999])


def read_presets(directory):
    flags.ROOT, root = directory, flags.ROOT
    try:
        return [flags.read_preset(name) for name in ("tiny", "more")]
    finally:
        flags.ROOT = root


def read_config_file(directory):
    args = train.settings("sae", ["--config", f"{directory}/flags.json"])
    return {name: value for name, value in vars(args).items() if name not in ("given", "config")}


def foreign_reader(name, file, kind, fields=()):
    return Reader(lambda directory: foreign(name, directory), file, kind, read_sae, fields)


SAE_FIELDS = (*LAYOUT, *SETTINGS)
LENS_FIELDS = (*SAELENS, "activation_fn_kwargs")
READERS = {
    "config.json": Reader(make_model, "config.json", "json", read_model, CONFIG),
    "config.json of a mixture": Reader(make_moe, "config.json", "json", read_model, CONFIG),
    "model.safetensors": Reader(make_model, "model.safetensors", "tensors", read_model),
    "index of shards": Reader(make_shards, "model.safetensors.index.json", "json", read_model),
    "a shard": Reader(make_shards, "1.safetensors", "tensors", read_model),
    "adapter_config.json": Reader(make_adapter, "adapter_config.json", "json", read_adapted,
                                  (*ADAPTER_FIELDS,)),
    "adapter_model.safetensors": Reader(make_adapter, "adapter_model.safetensors", "tensors",
                                        read_adapted),
    "sparsify cfg.json": Reader(make_sae, "cfg.json", "json", read_sae, SAE_FIELDS),
    "sparsify tensors": Reader(make_sae, "sae.safetensors", "tensors", read_sae),
    "our cfg.json": Reader(lambda d: make_sae(d, "matryoshka", normalize="scale"), "cfg.json", "json",
                           read_sae, SAE_FIELDS),
    "saelens cfg.json": foreign_reader("topk", "cfg.json", "json", LENS_FIELDS),
    "saelens cfg.json, old": foreign_reader("old-topk", "cfg.json", "json", LENS_FIELDS),
    "saelens scaler": foreign_reader("standard-scaled", "activation_scaler.json", "json",
                                     ("scaling_factor",)),
    "saelens tensors": foreign_reader("gated", "sae_weights.safetensors", "tensors"),
    "dictionary_learning": foreign_reader("MatryoshkaBatchTopKSAE", "config.json", "json"),
    "openai": foreign_reader("openai-topk", "config.json", "json",
                             ("shape", "activation", "activation_state_dict", "trainer")),
    "tokenizer_config.json": Reader(make_tokenizer, "tokenizer_config.json", "json", read_tokenizer),
    "generation_config.json": Reader(make_tokenizer, "generation_config.json", "json",
                                     read_tokenizer),
    "tokenizer.json": Reader(make_tokenizer, "tokenizer.json", "json", read_tokenizer),
    "chat template": Reader(make_template, "chat_template.jinja", "text", read_tokenizer),
    "problems": Reader(lines(PROBLEMS), "rows.jsonl", "jsonl",
                       lambda d: read_problems(d / "rows.jsonl")),
    "texts": Reader(lines(TEXTS), "rows.jsonl", "jsonl", lambda d: train.read_rows(d / "rows.jsonl")),
    "gpqa": Reader(make_csv, "gpqa.csv", "text", lambda d: prepare.read_gpqa(d / "gpqa.csv")),
    "evaluation": Reader(lines(SAMPLES), "rows.jsonl", "samples",
                         lambda d: read_samples(d / "rows.jsonl")),
    "checkpoint": Reader(make_checkpoint, "checkpoint.safetensors", "tensors", read_checkpoint),
    "--config": Reader(lambda d: write(d, "flags.json", json.dumps(SETTINGS_FILE)), "flags.json",
                       "json", read_config_file),
    "presets": Reader(lambda d: write(d, "data/presets.json", json.dumps(PRESETS)),
                      "data/presets.json", "json", read_presets),
}


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------

NESTED = {"deep": "[" * 200 + "]" * 200, "deeper": "[" * 990 + "]" * 990, "wide": "[0" + ",0" * 10**5 + "]"}
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-0", "1.0", *NESTED.values(),
       '"' + "x" * 10**5 + '"', '"\\ud800"', '"\\u001b]0;t\\u0007"', "00", "+1", "'a'"]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**18, 0.5, 1e-30,
          1e300, "", "x", "0", "../x", "/etc/passwd", "a\x1b[2J", "(a*)*b", ".*", "é", [], {}, [[]],
          [1], [1, 2, 3], ["x"], [None], {"a": 1}, {"content": 1}, [0] * 999]


def damage_json(rng, data):
    """Another value somewhere in it, a field more, less or of another name."""
    value = json.loads(data)
    places = list(walk(value))
    parent, key = rng.choice(places)
    what = rng.randrange(6)
    if what == 0 and isinstance(parent, dict):
        parent[rng.choice(["x", "k", "dtype", "id", key + "_", ""])] = parent.pop(key)
    elif what == 1:
        del parent[key]
    elif what == 2:
        other, name = rng.choice(places)
        if name in (other if isinstance(other, dict) else range(len(other))):
            parent[key] = copy.deepcopy(other[name])
    elif what == 3:
        parent[key] = "@@@"
        return json.dumps(value).replace('"@@@"', rng.choice(RAW), 1).encode()
    elif what == 4 and isinstance(parent[key], (int, float)):
        parent[key] = rng.choice([parent[key] * 2, parent[key] + 1, -parent[key], float(parent[key])])
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def walk(value):
    """Each (parent, key) of a parsed JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from walk(value[key])


def damage_lines(rng, data):
    rows = data.split(b"\n")[:-1]
    i = rng.randrange(len(rows))
    rows[i:i + 1] = rng.choice([[damage_json(rng, rows[i])], [], [rows[i]] * 2, [b""], [b"[]", rows[i]]])
    return rng.choice([b"\n", b"\n", b"\r\n", b","]).join(rows) + b"\n"


def damage_tensors(rng, data):
    """The header as JSON, its length, or the bytes behind it."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8:8 + size], data[8 + size:]
    what = rng.randrange(4)
    if what == 0:
        return rng.choice([0, 1, size + 1, 2**24, 2**40, 2**63, size - 1]).to_bytes(8, "little") + data[8:]
    if what == 1:
        number = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00" * 4])     # NaN, inf, 0
        at = rng.randrange(max(1, len(body) // 4)) * 4
        body = body[:at] + number + body[at + 4:]
    else:
        header = damage_json(rng, header)
    return len(header).to_bytes(8, "little") + header + body


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m.content | trim }}"
            "{% if not loop.last %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|assistant|>' ~ '<think>' }}{% endif %}")
NUMBERS = ["0", "1", "7", "-3", "9999", "99999", "10**9", "2**63", "0.5", "loop.index", "none"]
PLAIN = ["'x'", "''", "messages", "messages[0].content", "[1, 2]", "{'a': 1}", "range(9)", "x", "y", "()"]
FORMS = ["{} + {}", "{} * {}", "{} ~ {}", "{} ** {}", "{} % {}", "{} // {}", "[{}, {}]", "({}, {})",
         "{}.replace('x', {})", "{}.join({})", "{}.center({})", "{}.format({})", "{} | replace('x', {})",
         "{} | join({})", "{} | indent({})", "{} | center({})", "{} | batch({}) | list",
         "{} | slice({}) | list", "{} | default({})", "{} | tojson(indent={})", "{}[{}:]", "{}[{}]",
         "{} | map('upper') | list | join({})", "{} == {}", "{} in {}", "{} | unique | list + {}",
         "range({}, {})", "{}.split({})", "{} | truncate({})", "dict(a={}, b={})", "{} | groupby({})",
         "{} | sort(attribute={})", "{}.zfill({})", "f({}, {})", "{} | xmlattr({})", "{}.encode({})",
         "namespace(x={}, y={})", "cycler({}, {})", "{}.__class__.{}", "lipsum({}, {})", "{} | int({})"]
BLOCKS = ["{{% for x in {} %}}{}{{% endfor %}}", "{{% set y = {} %}}{}", "{{% if {} %}}{}{{% endif %}}",
          "{{% set n.x = {} %}}{}", "{{% set y %}}{{{{ {} }}}}{{% endset %}}{}", "{{{{ {} }}}}{}",
          "{{% macro f(x, y) %}}{{{{ {} }}}}{}{{% endmacro %}}", "{{% filter upper %}}{}{}{{% endfilter %}}"]


def expression(rng, deep=3):
    if not deep or rng.random() < 0.2:
        return rng.choice(rng.choice([NUMBERS, PLAIN, PLAIN]))
    return "(" + rng.choice(FORMS).format(expression(rng, deep - 1), expression(rng, deep - 1)) + ")"


def block(rng, deep=4):
    if not deep:
        return rng.choice(["x", "{{ y }}", "{{ x }}" * 50, ""])
    return rng.choice(BLOCKS).format(expression(rng), block(rng, deep - 1))


def damage_text(rng, data):
    if b"{%" not in data:                                # a table
        return damage_bytes(rng, data)
    return ("{% set n = namespace(x='x') %}" + block(rng) + block(rng)).encode()


JUNK = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b'"', b"\n", b"\x1b[2J", b",", b"1"]


def damage_bytes(rng, data):
    """Bits flipped, pieces lost, repeated or put in."""
    for _ in range(rng.choice([1, 1, 1, 3])):
        i, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 64])
        what = rng.randrange(5)
        if what == 0 and i < len(data):
            data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
        elif what == 1:
            data = data[:i]
        elif what == 2:
            data = data[:i] + data[i + n:]
        elif what == 3:
            data = data[:i] + data[i:i + n] * rng.choice([2, 2, 1000]) + data[i + n:]
        else:
            data = data[:i] + rng.choice(JUNK) + data[i:]
    return data


DAMAGE = {"json": damage_json, "jsonl": damage_lines, "samples": damage_lines, "tensors": damage_tensors, "text": damage_text}


# ------------------------------------------------------------------------------------------------
# The property
# ------------------------------------------------------------------------------------------------

def told(kind, data, fields=()):
    """What a file says, by another parser than ours; None: nothing."""
    try:
        text = data.decode("utf-8-sig")
        if kind == "json":
            value = json.loads(text)
            json.dumps(value, allow_nan=False)           # ValueError
            used = {name: x for name, x in value.items() if not fields or name in fields}
            return json.dumps({name: x for name, x in used.items() if x is not None})
        if kind == "samples":                # what a killed run left behind the last line is dropped
            kind, text = "jsonl", text[:text.rfind("\n") + 1]
        if kind == "jsonl" and not text.lstrip().startswith("["):
            rows = text.replace("\n\ufeff", "\n").split("\n")
            rows = [json.loads(row) for row in rows if row.strip()]
            return json.dumps(rows, allow_nan=False)     # in which 2 is not 2.0
        return data
    except (ValueError, AttributeError):
        return data if kind in ("tensors", "text") else None


def digest(result):
    """A text that is equal for equal results, tensors included."""
    return json.dumps(flat(result), sort_keys=True)


def flat(x):
    if isinstance(x, torch.Tensor):
        values = x.detach().double().numpy().tobytes()
        return [str(x.dtype), list(x.shape), hashlib.md5(values).hexdigest()]
    if isinstance(x, dict):
        return {str(key): flat(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [flat(value) for value in x]
    return repr(x)


class Bench:
    """The good files of every reader, made once; one damaged file after the other."""

    def __init__(self, directory):
        self.directory, self.good = Path(directory), {}
        for number, (name, reader) in enumerate(READERS.items()):
            folder = self.directory / str(number)
            with quiet():
                reader.make(folder)
                before = digest(reader.read(folder))
                data = (folder / reader.file).read_bytes()
                said = told(reader.kind, data, reader.fields)
            self.good[name] = folder, data, before, said

    def one(self, name, number, seed=0):
        """-> ("accepted" or "refused", seconds, megabytes).  AssertionError names what is wrong."""
        reader, (folder, data, before, said) = READERS[name], self.good[name]
        rng = random.Random(f"{seed} {name} {number}")
        damage = DAMAGE[reader.kind] if rng.random() < 0.75 else damage_bytes
        bad = damage(rng, data)
        (folder / reader.file).write_bytes(bad)
        start, size = time.thread_time(), peak()
        outcome, after = "accepted", None
        try:
            with quiet():
                after = digest(reader.read(folder))
        except (ValueError, OSError) as error:
            outcome = "refused"
            assert type(error) in (ValueError, OSError, FileNotFoundError), f"{type(error)}: {error}"
            assert "\n" not in str(error), f"not one line: {error}"
        seconds, megabytes = time.thread_time() - start, (peak() - size) / 1024
        assert seconds < SECONDS, f"{seconds:.1f} s"
        assert megabytes < MEGABYTES, f"{megabytes:.0f} MB"
        if outcome == "accepted":
            now = told(reader.kind, bad, reader.fields)
            assert now is not None, "damaged, and accepted"
            assert now != said or after == before, "says the same, and is read as something else"
        return outcome, seconds, megabytes


@contextmanager
def quiet():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_in_one_line_or_says_something_else(bench, name):
    outcomes = [bench.one(name, number)[0] for number in range(1000 // len(READERS))]
    # neither too tame nor too wild to tell; a checkpoint has a checksum, so that nothing passes
    assert set(outcomes) == ({"refused"} if name == "checkpoint" else {"accepted", "refused"})


def main(total=1000, seed=0):
    each = -(-int(total) // len(READERS))
    print(f"{'reader':28s}  inputs  accepted  refused  failed  longest     most")
    with tempfile.TemporaryDirectory() as directory:
        bench, everything = Bench(directory), []
        for name in READERS:
            rows, failed = [], {}
            for number in range(each):
                try:
                    rows.append(bench.one(name, number, seed))
                except Exception as error:
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    kind = f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}"
                    failed.setdefault(kind, []).append((number, str(error)[:150]))
            everything += rows + [("failed", 0, 0)] * sum(map(len, failed.values()))
            say(name, everything[-each:])
            for kind, cases in failed.items():
                print(f"    {kind}: {len(cases)} times, as in number {cases[0][0]}: {cases[0][1]}")
    say("all", everything)


def say(name, rows):
    outcomes = [row[0] for row in rows]
    counts = [outcomes.count(word) for word in ("accepted", "refused", "failed")]
    print(f"{name:28s} {len(rows):7,d} {counts[0]:9,d} {counts[1]:8,d} {counts[2]:7,d} "
          f"{max(row[1] for row in rows):6.2f} s {max(row[2] for row in rows):5.0f} MB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
