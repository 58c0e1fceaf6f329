"""The commands as a user types them: real processes, in an empty directory, and every line of the READMEs."""
import re
import shlex
import subprocess
import sys

import pytest
import torch

import eval
import resa
import sae
import train
from tests.conftest import ROOT


def command(cwd, *words):
    """python SCRIPT ... in `cwd`; returns its standard output."""
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|" not in done.stderr, "progress bars are quiet where there is no terminal"
    return done.stdout


def test_sae_tune_eval_merge_one_after_the_other(tmp_path):
    few = ["--steps", "2", "--batch", "4"]
    assert "loss recovered" in command(tmp_path, "train.py", "--stage", "sae", *few)
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
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"python (\S+\.py.*)", line.split("#")[0].rstrip()):
                    yield match[1]


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_every_command_in_the_readmes_is_understood(line):
    script, *argv = shlex.split(line)
    assert (ROOT / script).exists()
    if script == "train.py":
        at = argv.index("--stage") if "--stage" in argv else len(argv)      # without: the --dry-run of a preset
        settings = train.STAGES[argv[at + 1]] if argv[at:] else train.Common
        assert resa.parse_flags(settings, argv[:at] + argv[at + 2:], script)
    elif script == "eval.py":
        showing = argv[0] == "show"
        assert resa.parse_flags(eval.Show if showing else eval.Eval, argv[2 * showing:], script)
    elif script == "resa.py":
        named = argv[:1] and argv[0] in resa.COMMANDS
        settings = getattr(resa, argv[0].capitalize()) if named else resa.Experiment
        assert resa.parse_flags(settings, argv[bool(named):], script)
    else:
        assert script == "data/prepare.py" and argv in (["tiny"], ["corpora"], ["upcycle"])


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
    for words in (*resa.SAES.values(), *(words for words in resa.ARMS.values() if not words.startswith("= "))):
        stage, *flags = words.format(out="o", base="b").split()
        args = resa.parse_flags(train.STAGES[stage], flags, "test")
        assert not args.given & {"lr", "steps", "batch", "seed", "data", "epochs"}      # the experiment sets these for all


def test_unknown_command_and_refused_merge_end_in_one_line(tmp_path):
    for argv, message in ((["dance"], "no command 'dance'"), (["merge", "--model", "x"], "needs --model BASE+ADAPTER"),
                          (["--quick", "--questions", "5"], "no effect with --quick")):
        done = subprocess.run([sys.executable, str(ROOT / "resa.py"), *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_compare_and_recover_print_a_row_for_each_variant_and_keep_the_table(tmp_path):
    few = ["--seeds", "2", "--steps", "2", "--batch", "4", "--variants", "topk"]
    text = command(tmp_path, "resa.py", "compare", *few, "itda", "--latents", "64", "--k", "4")
    assert re.search(r"^itda +\d", text, re.M)
    assert re.search(r"^topk +0\.\d{4} 0\.\d{4} \.\. 0\.\d{4} +4\.0 ", text, re.M)
    assert "2 seeds" in text and (tmp_path / "out/tiny/compare/table.txt").read_text().strip() in text
    assert (tmp_path / "out/tiny/compare/topk-1/cfg.json").exists()
    text = command(tmp_path, "resa.py", "recover", *few)
    assert re.search(r"^topk +0\.\d{3} +\d+\.\d%", text, re.M) and (tmp_path / "out/tiny/recover/table.txt").exists()
    with pytest.raises(AssertionError, match="--variants topkk: there are relu"):
        command(tmp_path, "resa.py", "compare", "--variants", "topkk")


def test_convert_keeps_what_an_sae_computes(tmp_path):
    built = sae.build("batchtopk", 8, 16, k=3)
    built.threshold.fill_(0.1)
    built.meta |= {"layer": 2, "site": "mlp", "sink_norm": 7.0}
    sae.save_sae(built, tmp_path / "a")
    assert "batchtopk, 16 latents of width 8, as saelens" in command(
        tmp_path, "resa.py", "convert", "--sae", "a", "--out", "b", "--layout", "saelens")
    read, x = sae.load_sae(tmp_path / "b"), torch.randn(20, 8)
    assert read.variant == "jumprelu" and torch.allclose(read.encode(x), built.encode(x), atol=1e-6)
    assert read.meta["layer"] == 2 and read.meta["site"] == "mlp"
    sae.save_sae(sae.build("itda", 8, 16, k=3), tmp_path / "c")
    with pytest.raises(AssertionError, match="itda"):
        command(tmp_path, "resa.py", "convert", "--sae", "c", "--out", "d", "--layout", "saelens")
    assert not (tmp_path / "d").exists()
