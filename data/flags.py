"""Command lines: flags with presets, errors in one line, and the record of a run.

    parser = Parser("train.py --stage tune", "what it does")      argparse + --preset and --config
    parser.add_argument("--batch", type=whole(1), default=32, help="chunks in an optimizer step")
    args = parse(parser, argv, "tune")                            defaults < preset < config < flags
"""

import argparse
import difflib
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

from data.files import (
    ROOT, check, parse_json, printable, read_json, read_text, shorten, write_json)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; the default behind each flag that has one."""

    def _get_help_string(self, action):
        if action.default in (None, "", False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line.  Every program takes --preset and --config."""

    def __init__(self, prog, description, preset="tiny"):
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=Help)
        self.add_argument("--preset", default=preset, help="defaults by name, data/presets.json")
        self.add_argument("--config", metavar="FILE", help="JSON file of flags; flags override it")

    def error(self, message):
        raise ValueError(f"{self.prog}: {message}; --help lists the flags")


def whole(low, high=2**62):
    """A type for add_argument: whole numbers from low to high."""
    def number(text):
        value = int(text)
        if not low <= value <= high:
            bounds = f"from {low} to {high}" if high < 2**62 else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} should be {bounds}")
        return value
    return number


def real(low, high=math.inf, above=False):
    """A type for add_argument: finite numbers from low to high; above=True: not low itself."""
    def number(text):
        value = float(text)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}"
            bounds += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} should be finite, {bounds}")
        return value
    return number


def read_preset(name):
    """A bundle of data/presets.json -> {flag: value, or the name of a section: {flag: value}}.

    "like" names another bundle, of which this one says only what is different.
    """
    text = read_text(ROOT / "data" / "presets.json").replace("{root}", str(ROOT))
    presets = parse_json(text, "data/presets.json")
    check(name in presets, f"no preset {name!r}; there are {', '.join(presets)}")
    bundle = presets[name]
    merged = read_preset(bundle.pop("like")) if "like" in bundle else {}
    for key, value in bundle.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def parse(parser, argv, section=""):
    """argv -> settings, by the parser's own defaults < --preset NAME < --config FILE.json < flags.

    section  the part of a preset that belongs to this program or stage, beside what is common
    .given holds the names set by file or flag, so that what cannot take effect can be refused.
    """
    early = Parser(parser.prog, None, parser.get_default("preset"))
    known, _ = early.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    bundle = read_preset(known.preset)
    bundle = {k: v for k, v in bundle.items() if not isinstance(v, dict)} | bundle.get(section, {})
    names = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in bundle.items() if name in names})
    if known.config:
        argv = to_argv(read_json(known.config), known.config) + argv
    args, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], flags, 1)
        parser.error(f"no flag {shorten(word)}" + (f", did you mean {near[0]}?" if near else ""))
    words = {word.split("=")[0] for word in argv}
    args.given = {action.dest for action in parser._actions if words & set(action.option_strings)}
    return args


def to_argv(config, where="--config"):
    """{"lr": 0.1, "shuffle": false, "model": ["a"]} -> [--lr=0.1, --no-shuffle, --model, a]."""
    argv = []
    for name, value in config.items():
        flag = name.replace("_", "-")
        check(not isinstance(value, dict), f"{where}: {name!r} should be a value or a list")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{flag}={value}")
    return argv


def refuse_idle(args, names, where):
    """ValueError if one of these space-separated flags was given where it could not take effect."""
    for name in names.split():
        check(name not in args.given, f"--{name.replace('_', '-')} has no effect with {where}")


def front_door(main):
    """Runs main(argv).  A user's mistake becomes one line and exit code 2.

    RESA_TRACEBACK=1 in the environment shows where it arose.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()               # a closed pipe shows here, not at exit
    except (ValueError, OSError) as error:
        if os.environ.get("RESA_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):       # `| head` closed the pipe: nothing to report
            os._exit(0)
        text = " ".join(printable(str(error)).split())
        print(f"error: {text if len(text) <= 1000 else text[:997] + '...'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; train.py continues with --resume, eval.py by itself", file=sys.stderr)
        sys.exit(130)


def open_run(directory, args):
    """Makes a run directory and writes config.json, what would be needed to run it again."""
    import torch
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_json(Path(directory) / "config.json", {
        "settings": {name: value for name, value in vars(args).items() if name != "given"},
        "argv": sys.argv, "git": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}})
