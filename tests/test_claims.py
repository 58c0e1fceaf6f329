"""The programs of tests/claims, end to end, as small as they go."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as fn

import eval
import model
import train
from data import flags, runs
from tests.claims import arms, errors, variants, view
from tests.conftest import ROOT

LONG = pytest.mark.skipif(not os.environ.get("RESA_LONG"), reason="takes two minutes: RESA_LONG=1")

# ------------------------------------------------------------------------------------------------
# variants
# ------------------------------------------------------------------------------------------------

def test_claim_variants(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--quick", "--variants", "topk", "feature_choice", "--preset", "tiny", "--data", str(data)]
    variants.main([*flags, "--out", str(out)])
    text = capsys.readouterr().out
    compared, recovered = (out / "compare.txt").read_text(), (out / "recover.txt").read_text()
    assert compared in text and recovered in text and "1 seeds" in compared
    number = r" +0\.\d{4} 0\.\d{4} \.\. 0\.\d{4} +"
    assert re.search(rf"^topk{number}16\.0 ", compared, re.M)
    assert re.search(r"^feature_choice +\d", compared, re.M)
    assert re.search(rf"^topk +0\.\d{{3}} +\d+\.\d% .*{number}12\.0$", recovered, re.M)
    assert re.search(r"^feature_choice +0\.\d{3} +\d+\.\d%", recovered, re.M)
    commands = (out / "commands.sh").read_text()
    assert commands.count("python train.py --stage sae ") == 2 and f"--data {data}" in commands
    assert (out / "feature-choice-0" / "cfg.json").exists()


def test_recover_gives_the_same_numbers_again():
    first, again = (variants.recover_one("gba", 3, 5, "cpu") for _ in range(2))
    assert first["mmcs"] == again["mmcs"] and first["fvu"] == again["fvu"]


@pytest.mark.parametrize("variant, found", [("abstopk", 1), ("itda", 1), ("topk", 0), ("gba", 0)])
def test_an_atom_that_is_the_opposite_of_a_direction_finds_it_where_codes_are_signed(
        variant, found, monkeypatch):
    rng = torch.Generator().manual_seed(3)
    toy = variants.TOY
    true = fn.normalize(torch.randn(toy["n"], toy["width"], generator=rng), dim=1)

    def opposite(sae, batches, optimizer, rate):
        sae.W_dec.data.copy_(-true.repeat(2, 1))
        return iter([])

    monkeypatch.setattr(variants, "make_optimizer", lambda *args: None)
    monkeypatch.setattr(variants.train, "train_sae", opposite)
    result = variants.recover_one(variant, 3, 1, "cpu")
    assert result["at_9"] == found
    assert result["mmcs"] > 0.999 if found else result["mmcs"] < 0.9


@pytest.mark.parametrize("flags, message", [
    ("--variants topkk", "invalid choice: 'topkk'"), ("--seeds 0", "--seeds: 0 should be at least"),
    ("--quick --steps 3", "--steps has no effect with --quick"),
    ("--only recover --dtype fp32", "--dtype has no effect with --only recover"),
])
def test_variants_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        variants.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run" / "commands.sh").exists()


# ------------------------------------------------------------------------------------------------
# arms
# ------------------------------------------------------------------------------------------------

ARMS = ["--sections", "layers", "rates", "--seeds", "1", "--questions", "8", "--sae-steps", "2", "--tune-steps", "2",
        "--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def at_once(monkeypatch):
    """Commands run in this process, which saves the start of each; after at_once.left of them it is killed."""
    state = SimpleNamespace(left=10**9, ran=[])
    mains = {"train.py": train.main, "eval.py": eval.main}

    def run_lines(lines, running):
        for script, *argv in lines:
            if not state.left:
                raise InterruptedError
            state.left -= 1
            state.ran.append(" ".join(argv))
            monkeypatch.setattr(sys, "argv", [script, *argv])
            mains[script](argv)
    monkeypatch.setattr(flags, "run_lines", run_lines)
    monkeypatch.setattr(runs, "signals", lambda at_once: nullcontext([]))    # those are for a main thread
    monkeypatch.setattr(arms, "RATES", ("1e-6", "3e-4"))
    monkeypatch.setitem(arms.SECTIONS, "rates", (*arms.SECTIONS["rates"][:1], ["rate 1e-6", "rate 3e-4"], [
        ("rate 3e-4", "rate 1e-6", "does the rate matter")]))
    monkeypatch.setattr(arms, "forecast", lambda *_: None)
    return state


def report_of(out):
    return (out / "report.md").read_text()


def test_arms_that_were_killed_go_on_to_the_same_report(at_once, data, tmp_path):
    argv = [*ARMS, "--preset", "tiny", "--data", str(data), "--workers", "1", "--out"]
    arms.main([*argv, str(tmp_path / "whole")])
    whole, count = report_of(tmp_path / "whole"), len(at_once.ran)
    assert "rate 3e-4" in whole and "norm of the adapter" in whole and "Which block the SAE belongs to: 0, 1 or 2." in whole
    for done in (2, count // 2):
        at_once.left = done
        with pytest.raises(InterruptedError):
            arms.main([*argv, str(tmp_path / "part")])
    at_once.left, at_once.ran = 10**9, []
    arms.main([*argv, str(tmp_path / "part")])
    assert report_of(tmp_path / "part") == whole
    assert not [line for line in at_once.ran if line.startswith("--stage sae")]      # they were there
    norms = [float(line.split()[-1]) for line in whole.splitlines() if re.fullmatch(r"rate \S+( +[\d.e-]+){4}", line)]
    assert len(norms) == 2 and norms[1] > 50 * norms[0]      # B starts at 0 and moves by the rate
    lm = model.load_model(f"{ROOT}/data/tiny/distill")
    tuned = model.load_model(f"{ROOT}/data/tiny/distill+{tmp_path}/whole/seed-0/rate-3e-4")
    moved = sum(float((a - b).square().sum()) for a, b in zip(tuned.parameters(), lm.parameters()))
    assert moved**0.5 == pytest.approx(norms[1], rel=1e-3)


@LONG
def test_two_commands_at_a_time_give_the_numbers_of_one(data, tmp_path):
    said = {}
    for workers in "12":
        words = [*ARMS, "--preset", "tiny", "--data", str(data), "--workers", workers, "--out", str(tmp_path / workers)]
        subprocess.run([sys.executable, "-m", "tests.claims.arms", *words], cwd=ROOT, check=True, capture_output=True)
        made = sorted((tmp_path / workers).rglob("*.safetensors"))
        said[workers] = [report_of(tmp_path / workers), *((path.parent.name, path.read_bytes()) for path in made)]
    assert said["1"] == said["2"] and len(said["1"]) > 8


def test_a_model_of_ones_own_goes_the_way_of_the_embedded_ones(at_once, data, tmp_path):
    """The same commands in the same order, but for names: the code does not ask which model it is."""
    shutil.copytree(f"{ROOT}/data/tiny/distill", tmp_path / "mine")
    own = ["--target", f"{tmp_path}/mine", "--source", f"{tmp_path}/mine", "--data", str(data)]
    arms.main([*ARMS, "--workers", "1", "--bench", str(data), *own, "--out", str(tmp_path / "a")])
    ours = [line.replace(f"{tmp_path}/mine", "MODEL") for line in at_once.ran]
    at_once.ran = []
    arms.main([*ARMS, "--workers", "1", "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "b")])
    def plain(line):
        line = re.sub(r"--(data|bench|preset|source|target) \S+", "", line)
        return re.sub(r"\S*/(distill|tiny)\S*?(\+|$| )", r"MODEL\2", line.replace(f"{tmp_path}/a", "O").replace(f"{tmp_path}/b", "O")).split()
    assert [plain(line)[:3] for line in ours] == [plain(line)[:3] for line in at_once.ran] and len(ours) > 8
    assert "| " not in report_of(tmp_path / "a") and "paired by problem" not in report_of(tmp_path / "a")


def test_arms_of_a_file_with_other_columns(at_once, data, tmp_path):
    """Also those whose SAE reads the source's own answers, which an evaluation of --data makes."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"q": row["problem"], "a": row["answer"]}) + "\n" for row in rows))
    few = [word if word != "layers" else "modes" for word in ARMS if word != "rates"]
    arms.main([*few, "--preset", "tiny", "--data", str(own), "--fields", "problem=q,answer=a", "--workers", "1", "--bench", str(own),
               "--out", str(tmp_path / "o")])
    answers = [json.loads(line) for line in (tmp_path / "o/rollouts.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in answers] == [row["problem"] for row in rows]
    assert "SAE of rollouts" in report_of(tmp_path / "o")


@pytest.mark.parametrize("words, said", [
    (["--bench", "aime24,amc23"], "--bench aime24,amc23: one at a time"), (["--bench", "all"], "--bench all: one at a time"),
    (["--bench", "aime23"], "--bench aime23: known names are "),
    (["--seed", "3"], "--seed has no effect with --seeds, which are 0, 1, .."),
    (["--sections", "generality", "--bench", f"{ROOT}/data/tiny/train.jsonl"], "needs the models, data and questions of --preset tiny")])
def test_arms_refuse_before_anything_is_trained(words, said, at_once, tmp_path):
    with pytest.raises(ValueError, match=said):
        arms.main(["--preset", "tiny", *words, "--out", str(tmp_path / "o")])
    assert not at_once.ran and not (tmp_path / "o").exists()       # what an earlier run left there stays


# ------------------------------------------------------------------------------------------------
# the others on a model of one's own
# ------------------------------------------------------------------------------------------------

def test_errors_and_view_go_where_the_sae_belongs(data, tmp_path, monkeypatch):
    """On a model that is not the project's: nothing of the embedded preset is taken for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(f"{ROOT}/data/tiny/distill", tmp_path / "mine")
    own = ["--source", "mine", "--data", str(data), "--device", "cpu"]
    train.main(["--stage", "sae", *own, "--layer", "2", "--latents", "256", "--k", "8", "--steps", "2", "--out", "sae"])
    errors.main([*own, "--held", str(data), "--sae", "sae", "--seq-len", "64", "--out", "errors"])
    used = json.loads((tmp_path / "errors/config.json").read_text())["settings"]
    assert used["preset"] == "own" and "F 256" in (tmp_path / "errors/table.txt").read_text()
    assert json.loads((tmp_path / "errors/numbers.json").read_text())[0]["left_out"] > 0     # sinks: not the embedded rule
    train.main(["--stage", "sae", *own, "--layer", "0", "--site", "mlp", "--latents", "128", "--k", "8", "--steps", "1", "--out", "mlp"])
    errors.main([*own, "--held", str(data), "--sae", "mlp", "--seq-len", "64", "--out", "of-mlp"])
    used = json.loads((tmp_path / "of-mlp/config.json").read_text())["settings"]
    assert (used["layer"], used["site"]) == (0, "mlp")
    with pytest.raises(ValueError, match="--steps has no effect with --sae"):
        errors.main([*own, "--sae", "mlp", "--steps", "9"])
    with pytest.raises(ValueError, match="the prompt fills all 512 positions of the model"):
        view.main([*own, "--sae", "sae", "--prompt", "how many " * 400])
    view.main([*own, "--sae", "sae", "--chunks", "2", "--max-new-tokens", "8", "--out", "page"])
    assert '"layer":2' in (tmp_path / "page/view.html").read_text()
    with pytest.raises(ValueError, match="--data is needed in errors: nothing stands for it"):
        errors.main(["--source", "mine", "--sae", "sae"])
