"""The commands as a user types them: real processes, in an empty directory, and every line of the READMEs."""
import re
import shlex
import subprocess
import sys

import pytest

import eval
import resa
import train
from conftest import ROOT


def command(cwd, *words):
    """python SCRIPT ... in `cwd`; returns its standard output."""
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|" not in done.stderr, "progress bars are quiet where there is no terminal"
    return done.stdout


def test_sae_tune_eval_merge_one_after_the_other(tmp_path):
    few = ["--steps", "2", "--batch", "4"]
    assert "train_fvu" in command(tmp_path, "train.py", "--stage", "sae", *few)
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



def shell_lines():
    """Every `python ...` line in the code blocks of the READMEs."""
    for path in (ROOT / "README.md", ROOT / "data" / "README.md"):
        for block in re.findall(r"```\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                if match := re.search(r"python (\S+\.py.*)", line.split("#")[0].rstrip()):
                    yield match[1]


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_every_command_in_the_readmes_is_understood(line):
    script, *argv = shlex.split(line)
    assert (ROOT / script).exists()
    if script == "train.py":
        at = argv.index("--stage")
        assert resa.parse_flags(train.STAGES[argv[at + 1]], argv[:at] + argv[at + 2:], script)
    elif script == "eval.py":
        assert resa.parse_flags(eval.Eval, argv, script)
    elif script == "resa.py":
        merging = argv[:1] == ["merge"]
        assert resa.parse_flags(resa.Merge if merging else resa.Experiment, argv[merging:], script)
    else:
        assert script == "data/prepare.py" and argv in (["tiny"], ["corpora"])


def rows(rights):
    return [{"id": str(i), "correct": bool(r)} for i, r in enumerate(rights)]


@pytest.mark.parametrize("mine, control, verdict", [
    ([1] * 60 + [0] * 40, [0] * 60 + [0] * 40, "better"),
    ([0] * 60 + [0] * 40, [1] * 60 + [0] * 40, "worse"),
    ([1, 0] * 50, [0, 1] * 50, "no difference is seen"),
])
def test_a_comparison_says_what_its_interval_says(mine, control, verdict):
    assert resa.say(rows(mine), rows(control), "a", "b", "is it so").endswith(f"], {verdict}.")


def test_every_arm_is_a_training_command_and_gets_the_same_treatment():
    for words in (*resa.SAES.values(), *filter(None, resa.ARMS.values())):
        stage, *flags = words.format(out="o", base="b").split()
        args = resa.parse_flags(train.STAGES[stage], flags, "test")
        assert not args.given & {"lr", "steps", "batch", "seed", "data", "epochs"}      # the experiment sets these for all


def test_unknown_command_and_refused_merge_end_in_one_line(tmp_path):
    for argv, message in ((["dance"], "no command 'dance'"), (["merge", "--model", "x"], "needs --model BASE+ADAPTER"),
                          (["--quick", "--questions", "5"], "no effect with --quick")):
        done = subprocess.run([sys.executable, str(ROOT / "resa.py"), *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
