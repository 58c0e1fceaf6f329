"""The commands as a user types them: real processes, in an empty directory; every line of the READMEs; the house."""
import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache

import pytest

import eval
import resa
import train
from data import flags, stats
from data.flags import arms_parser, open_experiment, parse_experiment, run_commands
from tests import bench
from tests.conftest import ROOT


def run(cwd, *words):
    """python SCRIPT ..., or python -m MODULE ..., in `cwd`."""
    program = list(words) if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *program], cwd=cwd, env=environment, capture_output=True, text=True)


def command(cwd, *words):
    """The same; returns its standard output."""
    done = run(cwd, *words)
    assert done.returncode == 0, done.stderr
    assert "|" not in done.stderr, "progress bars are quiet where there is no terminal"
    return done.stdout


def test_sae_tune_eval_merge_one_after_the_other(tmp_path):
    few = ["--steps", "2", "--batch", "4", "--preset", "tiny", "--data", first_questions(tmp_path)]
    assert "recovered_mean" in command(tmp_path, "train.py", "--stage", "sae", *few)
    command(tmp_path, "train.py", "--stage", "tune", *few)
    distill, adapter = f"{ROOT}/data/tiny/distill", "out/tiny/adapter"
    command(tmp_path, "resa.py", "merge", "--model", f"{distill}+{adapter}", "--out", "out/merged")
    text = command(tmp_path, "eval.py", "--bench", "tiny", "--limit", "6", "--max-new-tokens", "32")
    assert "data~tiny~distill+out~tiny~adapter" in text and "6 x 1" in text
    command(tmp_path, "eval.py", "--limit", "6", "--greedy", "--model", distill, f"{distill}+{adapter}", "out/merged",
            "--max-new-tokens", "32", "--out", "out/greedy")
    found = tmp_path / "out/greedy/eval/tiny"
    assert {"summary.json", "config.json", "out~merged.jsonl"} <= {p.name for p in found.iterdir()}
    merged, attached = ([row["completion"] for row in eval.read_samples(found / f"{name}.jsonl")]
                        for name in ("out~merged", "data~tiny~distill+out~tiny~adapter"))
    assert merged == attached


def first_questions(folder):
    """A file of a hundred: tokenizing all of them is most of a short run."""
    path = folder / "few.jsonl"
    path.write_text("".join((ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)[:100]))
    return str(path)


# ---- the READMEs -------------------------------------------------------------------------------------------

def shell_lines():
    """Every `python ...` line in the code blocks of the READMEs."""
    for path in (ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "tests" / "claims" / "README.md"):
        for block in re.findall(r"```\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("#")[0].rstrip() if " # " in line or "  #" in line else line.rstrip()
                if match := re.search(r"python ((?:-m )?\S+.*)", line):
                    yield match[1]


LINES = sorted(set(shell_lines()) - {"-m pytest"})
OF_CLAIMS = [line for line in LINES if re.match("-m (tests|data.formats)", line)]


def test_the_readmes_show_every_program():
    shown = " ".join(LINES)
    for program in ("resa.py", "train.py --stage sae", "train.py --stage tune", "eval.py", "-m data.prepare",
                    "-m data.formats", *(f"-m tests.claims.{path.stem}" for path in (ROOT / "tests/claims").glob("[a-z]*.py"))):
        assert program in shown, program


@lru_cache
def help_of(module):
    return command(ROOT, "-m", module, "--help")


@pytest.mark.parametrize("line", OF_CLAIMS)
def test_every_command_of_a_claim_in_the_readmes_is_understood(line, tmp_path):
    script, *argv = shlex.split(line)[1:]
    text = help_of(script)
    for flag in filter(re.compile("--").match, argv):
        assert flag.split("=")[0] in text, f"{script} has no {flag}"


@pytest.mark.parametrize("line", [line for line in LINES if line not in OF_CLAIMS])
def test_every_command_in_the_readmes_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    script, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if script == "train.py":
        stage = argv.index("--stage")
        rest = argv[:stage] + argv[stage + 2:]
        assert train.settings(argv[stage + 1], [*rest, "--device", "cpu"])
    elif script == "eval.py":
        if argv[0] != "show":
            assert eval.settings(argv)
    elif script == "resa.py":
        assert argv in ([], ["--quick"]) or argv[0] == "merge" and set(argv[1::2]) == {"--model", "--out"}
    elif script == "data.prepare":
        assert argv[0] in ("tiny", "corpora", "fetch")
    elif script == "tests/bench.py":
        assert argv[0] in ("all", *bench.PARTS) and set(argv[1:]) <= {"--device", "cuda"}
    else:
        pytest.fail(f"which program is {script}?")


@pytest.mark.parametrize("words", [
    ["resa.py"], ["resa.py", "merge"], *(["train.py", "--stage", stage] for stage in train.RUN), ["train.py"],
    ["eval.py"], ["eval.py", "show"], ["-m", "data.formats"]], ids=" ".join)
def test_help_is_there_for_every_program(tmp_path, words):
    assert len(command(tmp_path, *words, "--help")) > 200
    assert not list(tmp_path.iterdir())


# ---- the experiment: every arm is a command line -----------------------------------------------------------

def rows(rights):
    return [{"id": str(i), "correct": bool(r)} for i, r in enumerate(rights)]


@pytest.mark.parametrize("mine, control, verdict", [
    ([1] * 60 + [0] * 40, [0] * 60 + [0] * 40, "better"),
    ([0] * 60 + [0] * 40, [1] * 60 + [0] * 40, "worse"),
    ([1, 0] * 50, [0, 1] * 50, "no difference is seen"),
    ([1] * 5 + [0] * 95, [0] * 100, "no verdict: only 5 of 100 problems differ, and 6 are needed for p < 0.05"),
])
def test_a_comparison_says_what_its_interval_says(mine, control, verdict):
    pair = stats.paired(rows(mine), rows(control))
    said = eval.verdict("a", "b", "is it so", pair["difference"], *pair["interval"], pair["withheld"])
    assert said.startswith("Is it so? a against b: ") and said.endswith(f"], {verdict}.")


def test_every_arm_is_a_training_command_and_gets_the_same_treatment():
    alike = dict(target="t", source="s", out="o", sae_steps=1, tune_steps=2, lr=0.1)
    budgets = set()
    for words in (*resa.SAES.values(), *resa.ARMS.values()):
        script, *argv = words.format(**alike).split()
        if script == "train.py":
            args = train.settings(argv[1], argv[2:])
            assert argv[0] == "--stage" and not args.given & {"seed", "data", "epochs"}
            if argv[1] != "sae":
                budgets.add((args.steps, args.batch, args.lr, args.target))
    assert len(budgets) == 1, "all adapters are trained on the same budget"


def test_what_is_asked_for_reaches_every_command(tmp_path):
    parser = arms_parser("resa.py", "")
    args = parse_experiment(parser, ["--target", "T", "--source", "S", "--data", "D", "--bench", "B", "--device", "cuda:1",
                                     "--dtype", "bfloat16", "--seed", "7", "--out", str(tmp_path)], {})
    with pytest.raises(ValueError, match="device cuda:1"):      # no such GPU here: the first command says so
        run_commands(resa.ARMS | resa.SAES, args)
    lines = [line for line in (tmp_path / "commands.sh").read_text().splitlines() if not line.startswith("#")]
    trained = [line for line in lines if "train.py" in line]
    asked = [line for line in lines if "eval.py" in line]
    assert len(trained) == len(resa.SAES) + len(resa.ARMS) - 2 and len(asked) == len(resa.ARMS)
    assert all("--device cuda:1 --dtype bfloat16" in line and "--seed 7" in line for line in lines)
    assert all("--data D" in line for line in trained) and all("--bench B" in line for line in asked)
    assert all(("--source S" in line) != ("--stage sae --source T" in line) for line in trained if "stage sae" in line)
    assert all("--model T" in line or "--model S" in line for line in asked)


def test_an_arm_is_made_again_by_pasting_its_lines(tmp_path):
    """In a process of its own: it calls functions that other tests replace."""
    code = f"import pathlib, tests.test_commands as t; t.make_an_arm_again(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_an_arm_again(tmp_path):
    """resa.py on two arms, then one of them by its own lines: the same adapter and answers, to the byte."""
    parser = arms_parser("resa.py", "")
    first = tmp_path / "first"
    args = parse_experiment(parser, ["--out", str(first), "--sae-steps", "2", "--tune-steps", "2", "--questions", "8",
                                     "--workers", "1", "--device", "cpu", "--preset", "tiny", "--data", first_questions(tmp_path)], {})
    open_experiment(args)
    run_commands({"sae": resa.SAES["sae"]}, args)
    spec, = run_commands({"SAE-Tuning (as coded)": resa.ARMS["SAE-Tuning (as coded)"]}, args).values()
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.suffix in (".safetensors", ".jsonl")
            and path.name != "metrics.jsonl"}
    assert len(kept) == 3 and eval.samples_path(first, "tiny", spec) in kept
    for line in (first / "commands.sh").read_text().splitlines():
        if line.startswith("python "):
            command(ROOT, *shlex.split(line)[1:])
    assert {path: path.read_bytes() for path in kept} == kept


def test_arms_that_are_one_command_run_once_and_no_two_share_a_folder(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(flags, "run_lines", lambda lines, running: ran.append(lines))
    argv = ["--out", str(tmp_path), "--preset", "tiny", "--target", "M", "--source", "M"]       # source = target: presets v4, v5
    args = parse_experiment(arms_parser("resa.py", ""), argv, {})
    two = {"base": "eval.py --model {target}", "RL source": "eval.py --model {source}"}
    assert run_commands(two, args) == {"base": "M", "RL source": "M"} and len(ran) == 1
    assert len(run_commands(resa.ARMS, args)) == len(resa.ARMS) and len(ran) == len(resa.ARMS)
    with pytest.raises(ValueError, match="one folder"):
        run_commands({"random SAE": resa.ARMS["random SAE"], "random-sae": resa.ARMS["random SAE"]}, args)


def test_a_failed_command_is_named_with_what_it_said(tmp_path):
    args = parse_experiment(arms_parser("resa.py", ""), ["--out", str(tmp_path), "--preset", "tiny", "--target", "nowhere"], {})
    with pytest.raises(ValueError, match="python eval.py --model nowhere .*: error: nowhere: no such directory"):
        run_commands({"base": "eval.py --model {target}"}, args)


def test_a_mistake_ends_in_one_line(tmp_path):
    for argv, message in ((["dance"], "no flag 'dance'"), (["merge", "--model", "x"], "--out"),
                          (["merge", "--model", "x", "--out", "y"], "names no adapter"),
                          (["--quick", "--questions", "5"], "no effect with --quick")):
        done = run(tmp_path, "resa.py", *argv)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_quick_prints_a_table_a_figure_and_an_answer_to_every_question(tmp_path):
    """The foot of resa.py on two arms, with the commands replaced by files that are there."""
    text = command(tmp_path, "eval.py", "--limit", "20", "--out", "o", "--model", f"{ROOT}/data/tiny/distill",
                   f"{ROOT}/data/tiny/distill+{ROOT}/data/tiny/rl")
    assert "20 x 1" in text
    asked = {"base": f"{ROOT}/data/tiny/distill", "RL": f"{ROOT}/data/tiny/distill+{ROOT}/data/tiny/rl"}
    eval.conclude(str(tmp_path / "o"), "tiny", asked, [("RL", "base", "does RL help")], "a note")
    told = (tmp_path / "o/tiny.txt").read_text()
    assert "Does RL help? RL against base: +0." in told and "a note" in told and told.startswith("model")
    assert (tmp_path / "o/tiny.svg").read_text().count("<circle") == 2


# ---- the house: who may import whom, and how large things are ----------------------------------------------

MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for pattern in ("*.py", "data/*.py", "tests/claims/*.py", "tests/bench.py") for path in ROOT.glob(pattern)}


def imported(path):
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def test_the_floors():
    allowed = {
        "data.files": set(), "data.grade": set(), "data.flags": {"data.files"},
        "data.stats": {"data.files"}, "data.adapters": {"data.files"}, "data.tokenizer": {"data.files"},
        "model": {"data.files", "data.adapters", "data.tokenizer"},
        "sae": {"data.files"}, "data.formats": {"sae"},
        "resa": {"model", "sae", "eval"}, "eval": {"model"}, "train": {"model", "sae", "resa"}, "data.prepare": set()}
    for name, floors in allowed.items():
        ours = {module for module in imported(MODULES[name]) if not module.startswith("data")}
        assert ours <= floors, f"{name} imports {ours - floors}"
    for name in ("data.files", "data.grade", "data.flags", "data.stats", "data.adapters", "data.tokenizer", "model", "sae"):
        assert imported(MODULES[name]) <= allowed[name] | {"data.files"}, name
    assert not imported(MODULES["data.files"]) and not imported(MODULES["data.grade"])
    for name, path in MODULES.items():
        if not name.startswith("tests."):
            assert not {module for module in imported(path) if module.startswith("tests")}, name


def test_claims_are_imported_by_nothing():
    for path in [*MODULES.values()]:
        assert not {m for m in imported(path) if m.startswith("tests.claims") and MODULES[m] != path}, path


def test_lines_are_at_most_100_wide_and_functions_at_most_100_long():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.split("\n"))) <= 100, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{name}.{node.name}"


@pytest.mark.parametrize("module, name, parameters", [
    ("model", "load_model", "spec dtype device"), ("model", "save_model", "model directory"),
    ("model", "load_tokenizer", "spec"), ("model", "generate", "model prompts max_new_tokens temperature top_p top_k "
     "samples stop_ids seed slots"), ("model", "Transformer.run", "self x start stop"), ("model", "Config.from_dict", "raw"),
    ("sae", "build", "variant d_in n_latents hyper"), ("sae", "save_sae", "sae directory"),
    ("sae", "load_sae", "directory_or_hub_id hookpoint"), ("sae", "metrics", "sae x"), ("sae", "SAE.loss", "self x g"),
    ("resa", "splice", "model sae layer site grad"), ("resa", "activations", "model ids layer site"),
    ("resa", "tuning_loss", "model sae layer ids site grad reduction teacher"), ("resa", "merge_adapter", "model"),
    ("resa", "save_adapter", "model directory"), ("resa", "load_adapter", "model spec"), ("resa", "add_lora", "model r alpha"),
    ("eval", "extract_answer", "text"), ("eval", "grade", "gold text"), ("eval", "pass_at_k", "n c k"),
    ("data.formats", "load_any", "directory_or_hub_id hookpoint"), ("data.formats", "save_saelens", "sae directory")])
def test_the_surface_that_other_programs_import(module, name, parameters):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    have = [p for p in inspect.signature(found).parameters if p != "cls"]
    assert have[:len(parameters.split())] == parameters.split()


def test_presets_name_flags_that_exist():
    presets = json.loads((ROOT / "data/presets.json").read_text())
    for name in presets:
        for stage in train.RUN:
            assert train.settings(stage, ["--preset", name, "--device", "cpu"]).preset == name
        assert eval.settings(["--preset", name]).preset == name
