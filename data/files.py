"""What comes in from outside and how results go out: JSON, rows, tensors, the hub, whole files.

    config = read_fields(read_json(path), TABLE, path)       every field checked, by one table
    with open_tensors(paths) as found: ...                   safetensors only, never a pickle
    with staged("out/tiny/sae") as temporary: ...            whole files or none

Files from strangers are hostile: each JSON object goes through `read_fields`, paths stay inside
their directory, and shapes are compared before memory is taken.
"""

import fcntl
import json
import math
import os
import re
import reprlib
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
LONGEST = 2**26      # bytes of one file of text; of a field of a row 2**20

def check(condition, message):
    """ValueError with this message unless the condition holds: a user's mistake, in one line."""
    if not condition:
        raise ValueError(message)

# ---- JSON: one reader for everything that comes from outside -----------------------------------

def parse_json(text, where):
    """Text or bytes -> the value.  NaN and infinities, which JSON does not have, are refused."""
    def finite(word):                    # NaN, Infinity and 1e400
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{word} is not a finite number")
        return value
    try:
        text = text.decode() if isinstance(text, bytes) else text
        check(text.count(",") < 3 * 10**6, "millions of values")     # of 20 bytes to 200 each
        value = json.loads(text, parse_constant=finite, parse_float=finite)
        if "\\ud" in text or "\\uD" in text:      # maybe half a character: no tokenizer reads that
            json.dumps(value, ensure_ascii=False).encode()
        check(depth(value) < 100, "lists or objects nested 100 deep")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None

def depth(value):
    """How deep lists and objects are nested."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

def read_text(path):
    """The UTF-8 text of a file.  FileNotFoundError or ValueError in one line that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check(path.stat().st_size <= LONGEST, f"{path}: longer than {LONGEST:,} bytes")
    try:
        return path.read_text(encoding="utf-8-sig")      # without the mark some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None

def read_json(path):
    """A parsed JSON object."""
    value = parse_json(read_text(path), path)
    check(isinstance(value, dict),
          f"{path}: a JSON object was expected, this is a {type(value).__name__}")
    return value

REQUIRED = object()      # as the default of a field: it must be there

def read_fields(raw, table, where):
    """A parsed JSON object -> {field: value} for the fields of `table`.
    table      {field: (kind, low, high, default)}
    kind       a type; [type] for a list of it; a tuple of these; a tuple of words, one of them
    low, high  bounds of a number, or of how long a text or list is; None: no bound
    default    what an absent field, or null, means; REQUIRED: there is none
    Other fields are left out: the caller decides whether they may be ignored.
    ValueError names file and field."""
    found = {}
    for name, (kind, low, high, default) in table.items():
        found[name] = default
        if raw.get(name) is not None:
            found[name] = read_value(raw[name], kind, low, high, f"{where}: {name!r}")
        check(found[name] is not REQUIRED, f"{where}: no {name!r}")
    return found

KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
              dict: "an object", list: "a list"}

def read_value(value, kind, low=None, high=None, where="value"):
    """One value of a kind, within bounds, as in `read_fields`.  An int may stand for a float."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    inner = [k[0] for k in kinds if isinstance(k, list)]
    kinds = [k for k in kinds if not isinstance(k, list)] + [list] * len(inner)
    if not isinstance(kinds[0], type):
        check(any(value == word and type(value) is type(word) for word in kinds),
              f"{where} = {shorten(value)} is not supported, only {', '.join(map(repr, kinds))}")
        return value
    if float in kinds and int not in kinds and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    wanted, shown = " or ".join(KIND_NAMES[k] for k in kinds), shorten(value)
    check(type(value) in kinds, f"{where} should be {wanted}, it is {shown}")
    check(not isinstance(value, float) or math.isfinite(value), f"{where} should be finite")
    size = value if isinstance(value, (int, float)) else len(value)
    check(low is None or size >= low, f"{where} is below {low}: {shown}")
    check(high is None or size <= high, f"{where} is above {high}: {shown}")
    check(not isinstance(value, int) or abs(value) < 2**63, f"{where} is of more than 64 bits")
    if not inner or not isinstance(value, list):
        return value
    check(size <= 2**17, f"{where} has {size:,} values: {shown}")
    return [read_value(x, inner[0], where=where) for x in value]

# Fields of tools, labels and sampling, as expressions.  (q, k, v have biases in any case.)
BOOKKEEPING = r"""
    _\w*(hash|path|implementation\w*|enabled|version) unsloth_\w+ \w+_token_id auto_map
    (peft|trl|torch|transformers|mergekit)(_version|\.\w+) \w+_class torchscript custom_pipelines
    attention_bias attn_implementation id2label label2id num_labels problem_type finetuning_task
    task_specific_params name_or_path model_max_length pretraining_tp is_decoder
    output_(attentions|hidden_states|scores|logits) (max|min)(_new)?_(length|tokens) do_sample
    temperature top_[kp] \w+_penalty num_(beams|return_sequences) (begin_)?suppress_tokens prefix
    gradient_checkpointing use_flash_attn use_bfloat16 return_dict_in_generate license language
    remove_invalid_values bad_words_ids tf_legacy_loss tie_encoder_decoder neftune_noise_alpha
    chunk_size_feed_forward""".split()

def refuse_unknown(raw, known, where, harmless=BOOKKEEPING):
    """ValueError: a field that is switched on and not known; it may change what is computed.
    Names that match an expression in `harmless` are ignored with a note."""
    on = [name for name, value in raw.items() if value and name not in known]
    for name in on:
        check(re.fullmatch("|".join(harmless), name), f"{where}: {name!r} = {shorten(raw[name])} "
              "is not supported; delete it there if the model does not depend on it")
    if on:
        print(one_line(f"{where}: ignored: {', '.join(on)}"), file=sys.stderr)

SHORT = reprlib.Repr()
SHORT.maxstring = 100

def shorten(value):
    """A value as an error message shows it."""
    text = SHORT.repr(value)             # of a value of megabytes, not a text of megabytes
    return text if len(text) <= 60 else text[:57] + "..."

# ---- Rows: JSONL, or one JSON list -------------------------------------------------------------

def read_jsonl(path):
    """Yields (line number, object) of a JSONL file without its blank lines.
    A file that begins with [ is one JSON list, whose objects are counted instead of lines."""
    text = read_text(path).replace("\n\ufeff", "\n")        # marks where files were joined
    if text.lstrip().startswith("["):
        rows = enumerate(parse_json(text, path), start=1)
    else:                                # not splitlines(), which also cuts at U+2028
        lines = enumerate(text.split("\n"), start=1)
        rows = ((n, parse_json(line, f"{path}:{n}")) for n, line in lines if line.strip())
    for number, row in rows:
        check(isinstance(row, dict), f"{path}:{number}: a JSON object was expected")
        long = [name for name, x in row.items() if isinstance(x, str) and len(x) > 2**20]
        check(not long, f"{path}:{number}: longer than {2**20:,} characters: {shorten(long)}")
        yield number, row

# ---- Tensors -----------------------------------------------------------------------------------

FLOATS = ("F32", "BF16", "F16", "F64")   # dtypes of weights, in safetensors' words

def check_finite(x, what):
    """ValueError: x holds NaN or an infinity.  One pass without another tensor: half of a copy."""
    low, high = x.aminmax()                  # NaN is both
    check(bool(low.isfinite() & high.isfinite()), f"{what} holds NaN or infinite numbers")

@contextmanager
def open_tensors(paths, dtypes=None):
    """Memory-mapped safetensors files -> {name: lazy slice}.  dtypes: ("F32", ..), None is any.
    ValueError names a damaged file, or a tensor of another dtype."""
    with ExitStack() as stack:
        slices = {}
        for path in paths:
            try:
                with open(path, "rb") as file:
                    header = int.from_bytes(file.read(8), "little")
                check(header < 2**24, f"a header of {header:,} bytes")       # parsed in memory
                handle = stack.enter_context(safe_open(str(path), framework="pt"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: no such file") from None
            except Exception as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
            for name in handle.keys():
                check(name not in slices, f"{path}: {name} is in another file, too")
                slices[name] = handle.get_slice(name)
                dtype = slices[name].get_dtype()
                check(not dtypes or dtype in dtypes, f"{path}: {name} is {dtype}, not {dtypes}")
        yield slices

def check_tensors(found, wanted, where):
    """ValueError names what is missing, unexpected or of another shape.  Reads only headers.
    found {name: slice}, wanted {name: tensor, or anything with a .shape}"""
    missing = [name for name in wanted if name not in found]
    first = missing[0] if missing else "/"
    for prefix in [name.removesuffix(first) for name in found if name.endswith(f".{first}")]:
        count = sum(name.startswith(prefix) for name in found)
        check(count < 2, f"{where}: {count} of {len(found)} tensors have {prefix!r} before their "
              "names, as in the state dict of a wrapped model; save the model inside")
    wrong = [f"missing {name}" for name in missing]
    wrong += [f"unexpected {name}" for name in found if name not in wanted]
    for name in wanted:
        shape = tuple(found[name].get_shape()) if name in found else tuple(wanted[name].shape)
        if shape != tuple(wanted[name].shape):
            wrong.append(f"{name} has shape {shape}, the config needs {tuple(wanted[name].shape)}")
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    check(not wrong, f"{where}: {'; '.join(wrong[:8])}{more}")

# ---- Where things are: directories, the hub ----------------------------------------------------

def locate(spec):
    """The local directory of PATH_OR_HUB_ID[@REVISION][#SUBFOLDER]; hub ids are fetched and cached.
    FileNotFoundError: nothing there.  ValueError: another form, or a subfolder that leads out."""
    spec = str(spec)
    if Path(spec).is_dir():
        return Path(spec)
    name, mark, subfolder = spec.partition("#")
    check(name and (subfolder or not mark),
          f"{spec}: not of the form PATH_OR_HUB_ID[@REVISION][#SUBFOLDER]")
    root = Path(name)
    if not root.is_dir():                # a directory may have an @ in its name
        match = re.fullmatch(r"(?!\.)([\w.-]+/[\w.-]+)(?:@([^@]+))?", name)
        if not match:
            raise FileNotFoundError(f"{spec}: no such directory, nor a hub id, owner/name")
        check(not Path(match[1]).is_dir(), f"{spec}: only a hub id has a revision, this is local")
        root = fetch(*match.groups(), subfolder)
    path = (root / subfolder).resolve()
    check(path.is_relative_to(root.resolve()), f"{spec}: the subfolder leads out of {root}")
    if not path.is_dir():
        raise FileNotFoundError(f"{spec}: no folder {subfolder!r} there")
    return path

def fetch(repo, revision=None, subfolder=None):
    """Downloads a hub repository: weights, JSON, templates; never a pickle."""
    from huggingface_hub import snapshot_download
    folder = f"{subfolder}/" if subfolder else ""
    wanted = [f"{folder}*.{suffix}" for suffix in ("json", "safetensors", "jinja")]
    try:                                 # '*' crosses '/': keep the folders below out
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted,
                                      ignore_patterns=f"{folder}*/*"))
    except Exception as error:           # the hub client raises a dozen kinds of errors
        kind = type(error).__name__
        raise FileNotFoundError(f"{repo}: no such directory, and the hub did not give it ({kind}); "
                                "offline, download it and pass its path") from None

# ---- Writing -----------------------------------------------------------------------------------

@contextmanager
def one_writer(directory, name="", wait=False):
    """Inside, no other process writes this directory, or `name` in it: ValueError names the one
    that does; wait=True waits for it.  The kernel takes the lock from a process that dies."""
    directory, held = Path(directory), False
    lock = directory / f".resa-lock{name and '-'}{name}"
    while not held:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{directory / name}: {file.read() or 'another process'} writes this; "
                             "wait for it, or name another --out") from None
        held = os.fstat(file.fileno()).st_nlink > 0      # else its last holder has removed it
    try:
        file.truncate(0)
        print(f"process {os.getpid()}, since {time.ctime()},", end="", file=file, flush=True)
        yield
    finally:
        if os.fstat(file.fileno()).st_nlink:             # not so after rm -r
            lock.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):          # not empty, as a rule
            directory.rmdir()

def check_new(directory, mark):
    """ValueError unless --out is new, empty, or what a killed process left, without its mark."""
    names = os.listdir(directory) if Path(directory).exists() else []
    killed = mark not in names and any(name.startswith(".resa-") for name in names)
    check(not names or killed, f"{directory} exists already; --out must be a new directory")

# Each marks a directory as complete
MARKS = ("config.json", "cfg.json", "adapter_config.json")

@contextmanager
def staged(directory):
    """A temporary folder in `directory`; its files move out of it only if the block ends well.
    Files are renamed, never written in place.  Where weights are replaced, their .json files go
    first and come last: a reader finds the old files, the new ones, or what does not load."""
    directory = Path(directory)
    temporary = directory / ".resa-new"
    with one_writer(directory, "new", wait=True):
        shutil.rmtree(temporary, ignore_errors=True)     # of a process that was killed
        try:
            temporary.mkdir()
            yield temporary
            files = sorted(temporary.iterdir(),
                           key=lambda path: (path.suffix == ".json", path.name in MARKS, path.name))
            if any(path.suffix == ".safetensors" for path in files):
                for path in temporary.glob("*.json"):
                    (directory / path.name).unlink(missing_ok=True)
            for path in files:
                path.chmod(0o644)        # save_file leaves 0600, unreadable to a colleague
                os.replace(path, directory / path.name)
        except (SafetensorError, OSError) as error:      # a full disk: neither says where
            raise OSError(f"{directory}: could not be written ({error})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

def write_text(path, text):
    """A UTF-8 file, whole or not at all."""
    path = Path(path)
    with staged(path.parent) as temporary:
        (temporary / path.name).write_text(text, encoding="utf-8")

def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")

def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def relative(spec):
    """A spec or path without this checkout's own directory, so that it makes sense elsewhere."""
    return str(spec).replace(f"{ROOT}/", "")

def embedded(spec):
    """Whether a model spec, or a file of data, is of data/tiny or data/tiny-moe: our own."""
    path = str(Path(str(spec).removeprefix("random:")).resolve())
    return bool(re.match(rf"{re.escape(str(ROOT))}/data/tiny(-moe)?($|[/+#@*])", path))

def base_name(spec):
    """The last part of a spec's base: equal for a hub id and its local copy, wherever that is."""
    return Path(str(spec).split("+")[0].replace("#", "/")).name.partition("@")[0].lower()

def printable(text):
    """Text without control characters: a stranger's text must not be able to steer the terminal."""
    text = text.replace("\t", " ")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)

say_once = lru_cache(lambda text: print(one_line(text), file=sys.stderr))

def one_line(text):
    text = " ".join(printable(str(text)[:2000]).split())
    return text if len(text) <= 1000 else text[:997] + "..."
