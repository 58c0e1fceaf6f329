"""Command lines: flags with presets, errors in one line, records of runs, experiments of many runs.

    parser = Parser("train.py --stage tune", "what it does")      argparse + --preset and --config
    parser.add_argument("--batch", type=whole(1), default=32, help="chunks in an optimizer step")
    args = parse(parser, argv, "tune")                            defaults < preset < config < flags
    run_commands({"random SAE": "train.py ..."}, args)            an arm is a command line
"""

import argparse
import difflib
import hashlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from data.files import (
    MARKS, ROOT, check, embedded, one_line, parse_json, printable, read_json, read_text, read_value,
    relative, shorten, write_json)

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; the default behind each flag that has one."""
    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:
            return action.help
        return super()._get_help_string(action)

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line.  presets: whether it takes --preset and --config too."""
    def __init__(self, prog, description, presets=True):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=Help)
        self.set_defaults(preset=None, config=None)
        if presets:
            self.add_argument("--preset", help="of defaults: data/presets.json; by default tiny, "
                              "but own where flags name a model or data that is not in data/tiny")
            self.add_argument("--config", metavar="FILE",
                              help="JSON file of flags, or config.json of a run; below flags")

    def error(self, message):
        raise ValueError(f"{self.prog}: {message}; --help lists the flags")

def real(low, high=1e308, above=False, kind=float):
    """A type for add_argument: finite numbers from low to high; above=True: not low itself."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):       # NaN is in no range
            bounds = f"{'finite, ' * (kind is float)}{'above' if above else 'at least'} {low}"
            bounds += f" and at most {high}" if high < 1e308 else ""
            raise argparse.ArgumentTypeError(f"{text} should be {bounds}")
        return value
    return number

def whole(low, high=2**62):
    return real(low, high, kind=int)

SEED = whole(0, 2**32 - 1)      # numpy would take a larger one for two numbers

def choose_device(name=None):
    """"cpu", "cuda" or "cuda:N"; None picks a GPU where there is one.  ValueError: not there."""
    import torch                         # slow to import, and --help has no need of it
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cuda", *(f"cuda:{i}" for i in range(count)), "cpu"] if count else ["cpu"]
    name = name or known[0]
    if name == "cuda" and "LOCAL_RANK" in os.environ:      # torchrun: one for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check(name in known, f"device {shorten(name)} is not one of those here: {', '.join(known)}; "
          f"--device {known[0]}")
    return name

def read_preset(name):
    """A bundle of data/presets.json -> {flag: value, or the name of a section: {flag: value}}.
    "like" names another bundle, of which this one says only what is different."""
    text = read_text(ROOT / "data" / "presets.json").replace("{root}", str(ROOT))
    where = f"data/presets.json: {name}"
    presets = read_value(parse_json(text, where), dict, where=where)
    check(name in presets, f"no preset {name!r}; there are {', '.join(presets)}")
    bundle, merged = read_value(presets[name], dict, where=where), {}
    if "like" in bundle:
        earlier = list(presets)[:list(presets).index(name)]          # so that it ends
        check(bundle["like"] in earlier, f"{where}: 'like' is none of {', '.join(earlier)}")
        merged = read_preset(bundle.pop("like"))
    for key, value in bundle.items():
        if isinstance(value, dict):
            value = read_value(merged.get(key, {}), dict, where=f"{where}: {key}") | value
        merged[key] = value
    return merged

# What people write who come from other tools -> what is meant
MEANT = {"--learning-rate": "--lr", "--d-sae": "--latents", "--num-latents": "--latents",
         "--expansion-factor": "--latents, that is the factor x the width", "--layers": "--layer",
         "--batch-size": "--batch", "--max-tokens": "--max-new-tokens", "--n": "--samples",
         "--output-dir": "--out", "--model-name": "--model", "--lora-rank": "--lora-r"}
NAMED = ("source", "target", "model", "data")            # flags that name a model or data

def parse(parser, argv, section=""):
    """argv -> settings: the parser's defaults < --preset NAME < --config FILE.json < flags.
    section  the part of a preset that belongs to this program or stage, beside what is common
    .given holds the names set by file or flag, so that what cannot take effect can be refused;
    .origin {name: where its value is from}."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    names = {action.dest for action in parser._actions}
    preset, bundle, again = None, {}, {}
    if "--preset" in flags:              # and --config
        argv, again = read_config(argv, flags)
        preset = find_preset(argv, again)
        bundle = read_preset(preset)
    bundle = {k: v for k, v in bundle.items() if not isinstance(v, dict)} | bundle.get(section, {})
    bundle = {name: bundle[name] for name in bundle.keys() & names}
    parser.set_defaults(**bundle, preset=preset)
    again = {name: again[name] for name in again.keys() & names - NOT_AGAIN}
    before = to_argv(again, flags, "the settings of --config")
    if {"-h", "--help"} & set(argv):
        show_used(parser, before + argv)
    args, unknown = parser.parse_known_args(before + argv)
    for word in unknown:
        flag = word.split("=")[0]
        near = [MEANT[flag]] if flag in MEANT else difflib.get_close_matches(flag, flags, 1)
        parser.error(f"no flag {shorten(word)}" + (f", did you mean {near[0]}?" if near else ""))
    words = {word.split("=")[0] for word in argv}
    args.given = {action.dest for action in parser._actions if words & set(action.option_strings)}
    args.origin = (dict.fromkeys(bundle, f"preset {preset}") | dict.fromkeys(again, args.config)
                   | dict.fromkeys(args.given, "flags"))
    return args

def look(argv, *names):
    """The values, lists, that argv gives to a few flags, before it is parsed as a whole."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        early.add_argument(f"--{name}", nargs="*", default=[])
    return early.parse_known_args(argv)[0]

def read_config(argv, flags):
    """argv with --config FILE -> argv with the file's flags before it, {}; or, where the file is a
    run's config.json, argv as it is and the settings of that run."""
    for path in look(argv, "config").config[-1:]:
        config = read_json(path)
        if "settings" not in config:
            check(not config.keys() & {"preset", "config"}, f"{path}: give --preset beside it")
            return to_argv(config, flags, path) + argv, {}
        again = read_value(config["settings"], dict, where=f"{path}: settings")
        return argv, {name: value for name, value in again.items() if value not in ("", [])}
    return argv, {}

def find_preset(argv, again):
    """--preset, else that of the earlier run, else own or tiny by whose the models and data are."""
    found = look(argv, "preset", *NAMED)
    named = [spec for name in NAMED for spec in getattr(found, name)]
    usual = "tiny" if all(map(embedded, named)) else "own"
    return (found.preset or [again.get("preset") or usual])[-1]

def show_used(parser, argv):
    """--help: makes defaults of what argv says, so that it shows what would be used."""
    for action in parser._actions:
        action.required = False
    rest = [word for word in argv if word not in ("-h", "--help")]
    parser.set_defaults(**vars(parser.parse_known_args(rest)[0]))

# Of a run, not of what it computes
NOT_AGAIN = {"out", "resume", "fresh", "config", "help"}
QUIET = NOT_AGAIN | {"preset", "log_every", "save_every", "given", "origin", "processes"}

def derive(args, name, value, rule):
    """Fills in a setting that nothing has decided, and notes by which rule."""
    if getattr(args, name) is None:
        setattr(args, name, value)
        args.origin[name] = f"by rule: {rule}"

def needs(args, names, where):
    """ValueError if one of these space-separated settings has no value."""
    for name in names.split():
        why = "nothing stands for it beside models or data of your own; --preset tiny has ours"
        check(getattr(args, name) not in (None, "", 0), f"--{name.replace('_', '-')} is needed "
              f"{where}: {why if args.preset == 'own' else f'preset {args.preset} has none'}")

def tell(args, title):
    """Prints the settings of a run, by where each is from."""
    by_origin = {}
    for name, value in vars(args).items():
        used = value or name in args.origin      # a 0 that was chosen; not one that is a default
        if name not in QUIET and used and value not in (None, "", []):
            words = " ".join(map(str, value)) if isinstance(value, list) else relative(value)
            text = f"{name.replace('_', '-')} {words}"
            origin = args.origin.get(name, "defaults")
            kind, _, rule = origin.partition("by rule: ")
            by_origin.setdefault(kind or "by rule", []).append(f"{text} ({rule})" if rule else text)
    print(f"{title}: settings")
    for origin, words in by_origin.items():
        print(textwrap.fill(", ".join(words), 100, initial_indent=f"  {origin:12s} ",
                            subsequent_indent=" " * 15, break_long_words=False,
                            break_on_hyphens=False))

def to_argv(config, flags=(), where="--config"):
    """{"lr": 0.1, "shuffle": false, "model": ["a"]} -> [--lr=0.1, --no-shuffle, --model, a].
    flags  those there are: what has no --no-NAME is off already"""
    argv = []
    for name, value in config.items():
        flag = name.replace("_", "-")
        check(not isinstance(value, dict), f"{where}: {name!r} should be a value or a list")
        if value is False:
            argv += [] if f"--{flag}" in flags and f"--no-{flag}" not in flags else [f"--no-{flag}"]
        elif value is True:
            argv.append(f"--{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{flag}={value}")
    return argv

def refuse_idle(args, names, where):
    """ValueError if one of these space-separated flags was given where it could not take effect."""
    for name in names.split():
        check(name not in args.given, f"--{name.replace('_', '-')} has no effect with {where}")

class Stopped(KeyboardInterrupt):
    """A signal asks this program to end: its number, and how to go on."""
    HOW = "the same command goes on: train.py with --resume, eval.py without --fresh"

@contextmanager
def signals(at_once):
    """Inside, SIGTERM and SIGINT raise Stopped.  at_once=False: only from the second one on; the
    first is in the list that this yields.  What is ignored, as under nohup, stays so."""
    came, before, start = [], {}, 0.0
    def handle(number, frame):
        nonlocal start
        start = start or time.monotonic()        # `timeout` and torchrun send one twice
        if time.monotonic() > start + 1 or (at_once and not came):
            came.append(number)
            raise Stopped(number, Stopped.HOW)
        came.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

@signals(at_once=True)
def front_door(main):
    """Runs main(argv).  A user's mistake becomes one line, but for RESA_TRACEBACK=1, and code 2."""
    write = sys.stdout.write             # labels and tokens in tables are strangers' texts, too
    sys.stdout.write = lambda text: write(printable(text))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()               # a closed pipe shows here, not at exit
    except (ValueError, OSError) as error:
        if os.environ.get("RESA_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):       # `| head` closed the pipe: nothing to report
            os._exit(0)
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        number, how = stop.args
        if os.environ.get("RANK", "0") == "0":       # one of those that torchrun started
            print(f"\nstopped by {signal.Signals(number).name}; {how}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        sys.stdout.write = write

@lru_cache
def commit():
    """The commit of this checkout, with a + and a checksum of how tracked code and JSON differ from
    it; or None."""
    def git(words):                      # by a shell: git may not be there
        return subprocess.run(f"git {words}", shell=True, cwd=ROOT, capture_output=True).stdout
    head = git("rev-parse --verify -q HEAD").decode().strip()
    more = git("diff --no-ext-diff HEAD -- '*.py' '*.json' ':!tests/test_*'")
    mark = f"+{hashlib.sha256(more).hexdigest()[:12]}" if more else ""
    return head + mark if head else None

def open_run(directory, args):
    """Makes a run directory and writes config.json, what would be needed to run it again."""
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_json(Path(directory) / "config.json", {
        "settings": {k: v for k, v in vars(args).items() if k not in ("given", "origin")},
        "argv": sys.argv, "git": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}})

# ---- Experiments: many command lines, each of which can be pasted ------------------------------

def experiment_parser(prog, description, *passed):
    """A Parser for an experiment; the flags `passed` are those of the commands that it runs."""
    parser = Parser(prog, description)
    add = parser.add_argument
    for name in (*passed, "fields"):
        add(f"--{name}", default="", help="as in train.py and eval.py; by default the preset's")
    add("--device", default="", help="cpu, cuda or cuda:N; by default a GPU where there is one")
    add("--out", default="", help="run directory; by default out/PRESET/NAME")
    add("--workers", type=whole(0), default=0, help="commands at a time; 0: 2 on a CPU, else 1")
    add("--fresh", action="store_true", help="make again what is there from an earlier run")
    add("--quick", action="store_true", help="as little as possible: shows only that it runs")
    return parser

def arms_parser(prog, description):
    """The same for adapters that are trained and asked."""
    parser = experiment_parser(prog, description, "source", "target", "data", "bench", "dtype")
    add = parser.add_argument
    add("--seed", type=SEED, default=0, help="of every training and of the samples")
    add("--questions", type=whole(0), default=1000, help="of --bench, the first ones; 0: all")
    add("--samples", type=whole(1), default=1, help="of each question")
    add("--max-new-tokens", type=whole(1), help="of an answer; by default as in eval.py")
    add("--sae-steps", type=whole(1), default=100, help="optimizer steps of an SAE")
    add("--tune-steps", type=whole(1), default=120, help="optimizer steps of an adapter")
    add("--lr", type=real(0, above=True), default=3e-4, help="learning rate of every adapter")
    return parser

def parse_experiment(parser, argv, quick, name="arms"):
    """argv -> settings; `quick` {flag: value} is what --quick means.
    name  of the experiment: its section in presets, its folder in out/PRESET"""
    import torch
    args = parse(parser, argv, name)
    if args.quick:
        refuse_idle(args, " ".join(quick), "--quick, which sets it")
        vars(args).update(quick)
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    args.workers = args.workers or 1 + on_cpu
    args.out = args.out or f"out/{args.preset}/{name}"
    before = Path(args.out, "config.json")
    if before.exists() and read_json(before).get("git") != commit():     # other code, other numbers
        args.fresh = True
    needs(args, " ".join(x for x in (*NAMED, "bench") if hasattr(args, x)), f"in {name}")
    return args

def open_experiment(args):
    """Makes the run directory, once all settings are known to be good."""
    open_run(args.out, args)
    Path(args.out, "commands.sh").unlink(missing_ok=True)        # of an earlier run

def command_lines(name, words, args):
    """An arm -> its command lines, each a list of words: train it, unless it is there; then ask it.
    words  "train.py ..." or "eval.py --model SPEC", with the settings `args` to fill in by {name}.
           What is trained goes into OUT/NAME; an adapter is asked on --target, an SAE never."""
    line = [word.format(**vars(args)) for word in words.split()]
    common, lines = given_flags(args, "preset", "seed", "device", "dtype"), []
    if line[0] == "train.py":
        where = f"{args.out}/{slug(name)}"
        own = "data" in args.given and "--data" not in line
        data = given_flags(args, "data", "fields") if own else []
        lines.append(line + common + data + ["--out", where])
        if line[1:3] == ["--stage", "sae"]:
            return lines
        line = ["eval.py", "--model", f"{args.target}+{where}"]
    asking = given_flags(args, "bench", "samples", "fields", "out")
    asking += ["--limit", str(args.questions)]
    if "max_new_tokens" in args.given:       # else the preset's, of its own questions
        asking += given_flags(args, "max_new_tokens")
    return [*lines, line + common + asking + ["--slots", "128"]]

def newer(spec, record):
    """Whether an SAE or adapter that a command line names was made after the run began."""
    made = [Path(part, name) for part in spec.split("+") for name in MARKS]
    return any(path.exists() and path.stat().st_mtime > record.stat().st_mtime for path in made)

def left_to_do(lines, fresh):
    """Command lines of an arm -> those that are left, after an earlier run of the same ones."""
    left = []
    for line in lines:
        if line[0] == "train.py":
            where = Path(line[line.index("--out") + 1])
            record = where / "config.json"
            made = read_json(record) if record.exists() else {"argv": []}
            argv = [x for x in made["argv"][1:] if x not in ("--resume", "--fresh")]
            same = not fresh and line[1:] == argv and made.get("git") == commit()
            same = same and not any(newer(word, record) for word in line if word != str(where))
            if same and (where / "summary.json").exists():
                continue
            same = same and (where / "checkpoint.safetensors").exists()
            line, fresh = line + ["--resume" if same else "--fresh"], True
        elif fresh:
            line = line + ["--fresh"]
        left.append(line)
    return left

def given_flags(args, *names):
    """["--name", "value", ..] of the settings that are set."""
    there = {name: getattr(args, name, None) for name in names}
    there = {name: value for name, value in there.items() if value not in (None, "")}
    return [word for name, value in there.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]

def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

def run_commands(arms, args, title="arms"):
    """Runs {name: words} as `command_lines`, args.workers arms at a time, an arm's lines in order.
    The lines are noted in OUT/commands.sh, to be pasted.  -> {name: the model spec that was asked}.
    ValueError has the last line of what a command that failed said."""
    commands = {name: command_lines(name, words, args) for name, words in arms.items()}
    check(len({slug(name) for name in arms}) == len(arms), f"{title}: two names, one folder")
    with open(Path(args.out) / "commands.sh", "a", encoding="utf-8") as file:
        for name, lines in commands.items():
            pasted = [relative("python " + shlex.join(line + ["--fresh"])) for line in lines]
            file.write("\n".join([f"# {name}", *pasted, ""]))
    # Base and source may be one model: asked once, as two processes must not write one file.
    once = {str(lines): lines for lines in commands.values()}
    pool, running = ThreadPoolExecutor(args.workers), []
    todo = [left_to_do(lines, args.fresh) for lines in once.values()]
    futures = as_completed([pool.submit(run_lines, lines, running) for lines in todo])
    try:
        for future in tqdm(futures, title, total=len(once), unit="arm", disable=None):
            future.result()
    except Stopped:
        for process in running:          # each saves what it has
            process.terminate()
        raise
    finally:                             # after an error, what has not begun is dropped
        pool.shutdown(cancel_futures=True)
    return {name: lines[-1][2] for name, lines in commands.items() if lines[-1][0] == "eval.py"}

def run_lines(lines, running):
    """Runs command lines one after the other, on one thread: fastest for small tensors."""
    for line in lines:
        process = subprocess.Popen([sys.executable, str(ROOT / line[0]), *line[1:]], text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        running.append(process)          # so that it can be stopped
        said = (process.communicate()[1].strip() or "it said nothing").split("\n")[-1]
        check(process.returncode == 0, f"python {shlex.join(line)}: {said}")
