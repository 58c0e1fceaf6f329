"""Training under torchrun: two processes learn what one learns, one of them writes, none waits for ever.

    torchrun --nproc-per-node 2 tests/test_torchrun.py ONE TWO DATA      what `both` starts
"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":               # a process of torchrun
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from safetensors.torch import load_file

import train
from data import flags, processes, runs
from sae import VARIANTS
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
DISTILL = f"{ROOT}/data/tiny/distill"
TEXT = "--steps 3 --save-every 2 --log-every 1 --seq-len 64 --batch 4 --micro-batch 1 "
LORA = f"--target {DISTILL} --lora-dropout 0 "
SAE = TEXT + f"--source {DISTILL} --latents 256 "
K = " --k 4"
RUNS = {                                 # name: stage and flags; {one} is the folder of what one process made
    **{name: f"sae {SAE}--variant {name}" + K * ("k" in variant.defaults)
       for name, variant in VARIANTS.items()},
    "signum": f"sae {SAE}{K} --optimizer signum --sink-norm 1.1",
    "dead": f"sae {SAE}{K} --steps 6 --dead-after 300 --micro-batch 2",
    "unit noise": f"sae {SAE}{K} --variant vsae --set sample=unit",
    "tune": f"tune {TEXT}{LORA}--sae {{one}}/topk --sae-grad on",
    "noise": f"tune {TEXT}{LORA}--sae {{one}}/topk --splice noise",
    "sft": f"sft {TEXT}{LORA}",
    "dropout": f"sft {TEXT}{LORA.replace('dropout 0', 'dropout 0.5')}",
    "whole batch": f"sft {TEXT}{LORA}".replace("--micro-batch 1 ", ""),
    "rl": f"rl {LORA}--steps 2 --save-every 1 --log-every 1 --questions 4 --group 4 "
          "--max-new-tokens 32 --micro-batch 2 --beta 0.04",
    "pretrain": f"pretrain {TEXT}--model {RANDOM}",
}
RUNS["topafa"] += " --micro-batch 2"     # as Adam makes much of rounding: a part a process has none
TOKENS_COMPETE = [name for name, variant in VARIANTS.items() if not variant.per_token]
RANDOMLY = ("unit noise", "noise", "dropout")      # these draw other numbers in each process
RESUMED = ("sft", "dropout", "whole batch", "rl")


def run(name, words, one, out, data):
    """One run of a stage.  Its last checkpoint stays, as NAME/kept.safetensors."""
    stage, *argv = words.replace("{one}", str(one)).split()
    folder, finish = Path(out, name), runs.Run.finish

    def keep(self, **measured):
        if self.writes:
            shutil.copy(self.checkpoint, folder / "kept.safetensors")
        return finish(self, **measured)
    runs.Run.finish = keep
    try:
        train.main(["--stage", stage, *argv, "--preset", "tiny", "--data", str(data), "--device", "cpu", "--out", str(folder)])
    finally:
        runs.Run.finish = finish


def resume(name, words, origin, out, data):
    """The same, from the checkpoint that the run left in the folder `origin`."""
    folder = Path(out, f"{name} resumed")
    with processes.first_alone():
        if processes.world()[0] == 0:
            folder.mkdir(parents=True)
            shutil.copy(Path(origin, name, "kept.safetensors"), folder / "checkpoint.safetensors")
    run(folder.name, words + " --resume", origin, out, data)


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """All runs, by one process and by two -> their folders and what the two said.
    The last thing that the two do is to fail: a start takes seconds, and this saves one."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name, words in RUNS.items():
        run(name, words, one, one, data)
    done = torchrun("tests/test_torchrun.py", one, two, data)
    assert "all runs are done" in done.stdout, done.stderr
    return one, two, done


def folder_of(out, name):
    return out / name / "model" if name == "pretrain" else out / name


def check_close(one, two):
    """Every tensor of every file: floats within 1e-5, counts equal.
    Where tokens compete a checkpoint has the running mean of the first process's thresholds: training
    does not read it, and in the end they are measured afresh."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in two.glob("*.safetensors"))
    for name in files:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        running = name == "kept.safetensors" and one.name in TOKENS_COMPETE
        for key in a.keys() - {"rng", "0.threshold" if running else "rng"}:
            assert a[key].dtype == b[key].dtype
            within = 1e-5 if a[key].is_floating_point() else 0
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=within,
                                       msg=lambda text: f"{name}: {key}: {text}")


def logged(out):
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tok/s")} for row in rows]


@pytest.mark.parametrize("name", [name for name in RUNS if name not in (*RANDOMLY, "itda")])
def test_two_processes_learn_what_one_learns(both, name):
    """The artifact, the log, and the checkpoint: moments, what the SAE counted."""
    one, two, _ = both
    check_close(one / name, two / name)
    check_close(folder_of(one, name), folder_of(two, name))
    a, b = logged(one / name), logged(two / name)
    assert len(a) == len(b) >= 2 and [row.keys() for row in a] == [row.keys() for row in b]
    for mine, other in zip(a, b):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-6)
    mine, other = (json.loads((out / name / "summary.json").read_text()) for out in (one, two))
    assert mine.keys() == other.keys() and mine["tokens"] == other["tokens"]
    settings = [json.loads((out / name / "config.json").read_text())["settings"] for out in (one, two)]
    assert [s["processes"] for s in settings] == [1, 2]
    assert [s["micro_batch"] for s in settings] == ([4, 2] if name == "whole batch" else
                                                    [settings[0]["micro_batch"]] * 2)


def test_what_is_compared_has_learned(both):
    """Weights moved by far more than the tolerance, latents died and fired, rewards differed."""
    one = both[0]
    start = {name: load_file(one / name / "sae.safetensors") for name in ("topk", "batchtopk")}
    assert (start["topk"]["encoder.weight"] - start["batchtopk"]["W_enc"]).abs().max() > 1e-3
    moved = load_file(one / "sft" / "adapter_model.safetensors")
    assert max(float(t.abs().max()) for name, t in moved.items() if "lora_B" in name) > 5e-4
    idle = load_file(one / "topk" / "kept.safetensors")["0.tokens_since_fired"]
    assert len(idle.unique()) > 3 and {0, 2 * 4 * 64} <= set(idle.tolist())
    assert load_file(one / "gba" / "kept.safetensors")["0.fired"].any()
    assert len({row["reward"] for row in logged(one / "rl")}) == 2


def test_a_collected_dictionary_is_refused(both):
    one, two, done = both
    assert "itda: --variant itda collects its dictionary in one pass" in done.stdout
    assert (one / "itda" / "sae.safetensors").exists() and not (two / "itda").exists()


@pytest.mark.parametrize("name", RANDOMLY)
def test_each_process_draws_its_own_dropout_and_noise(both, name):
    """Not those of a lone process; see the next test for the other one's."""
    one, two, _ = both
    a, b = (load_file(next((out / name).glob("[as]*.safetensors"))) for out in (one, two))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_the_masks_of_two_processes_differ(monkeypatch):
    drawn = []
    for rank, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(processes, "world", lambda: (rank, 2))
        processes.seed_step(7, step)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[3])
    assert len({tuple(x.tolist()) for x in drawn}) == 3
    monkeypatch.setattr(processes, "world", lambda: (0, 1))
    state = torch.get_rng_state()
    processes.seed_step(7, 0)
    assert torch.equal(state, torch.get_rng_state()), "a lone process goes on with its stream"


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_more_or_fewer_processes(both, data, name, tmp_path):
    """More: what one process began; fewer: what two began.  And two go on to the same bits."""
    one, two, _ = both
    own = two / "own" / f"{name} resumed"
    for file in folder_of(two, name).glob("adapter_model.safetensors"):
        assert (own / file.name).read_bytes() == file.read_bytes()
    assert logged(own) == logged(two / name)
    resume(name, RUNS[name], two, tmp_path, data)
    if name != "dropout":
        check_close(one / name, tmp_path / f"{name} resumed")
        check_close(one / name, two / f"{name} resumed")
    for out in (tmp_path, two):
        steps = [row["step"] for row in logged(out / f"{name} resumed")]
        assert steps == [row["step"] for row in logged(one / name)]


def test_other_settings_are_refused_all_the_same(both, data, tmp_path):
    with pytest.raises(ValueError, match="other settings: batch"):
        resume("sft", RUNS["sft"].replace("--batch 4", "--batch 8"), both[1], tmp_path, data)
    (tmp_path / "same").mkdir()
    with pytest.raises(ValueError, match="other settings: lora_dropout"):
        resume("sft", RUNS["sft"] + " --lora-dropout 0.5", both[0], tmp_path / "same", data)


def test_the_command_says_once_who_shares_the_run_and_how_fast_it_is(tmp_path):
    words, data = RUNS["sft"].split(), ROOT / "data" / "tiny" / "test.jsonl"
    done = torchrun("train.py", "--stage", *words, "--preset", "tiny", "--data", data, "--out", tmp_path / "sft",
                    "--device", "cpu")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "sft: settings" and done.stdout.count("settings") == 1
    told, = (i for i, line in enumerate(said) if "trainable" in line)
    assert re.fullmatch(r"sft: [\d,]+ trainable parameters, 3 steps, cpu, 2 processes", said[told])
    assert said[told + 1] == str(tmp_path / "sft") and done.stdout.count("  tokens") == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("step")]
    number = r"[\d.,e-]+"
    for step, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"step {step}/3  ce {number}  norm {number}  lr 0.0003  "
                            rf"tok/s {number}  left \d\d:\d\d", line), line
    assert len(lines) == 3
    found = sorted(path.name for path in (tmp_path / "sft").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors", "config.json",
                     "metrics.jsonl", "metrics.svg", "summary.json"]


def test_a_process_that_fails_ends_the_others(both):
    """Process 1 fails at its second step, while the first waits for its gradients."""
    _, two, done = both
    assert done.returncode != 0
    assert done.stderr.count("error: only here") == 1
    ours = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in ours, ours
    assert len(logged(two / "failed")) == 1 and not (two / "failed" / "adapter_config.json").exists()


@pytest.mark.parametrize("line, message", [
    ("sft --batch 3", "2 processes cannot share --batch 3"),
    ("sae --batch 1", "2 processes cannot share --batch 1"),
    ("rl --questions 3 --group 4", "2 processes cannot share --questions 3"),
    ("sft --batch 8 --micro-batch 8", "--micro-batch 8 does not divide the batch, 4 rows a process"),
    ("rl --questions 2 --group 3 --micro-batch 2", "does not divide the batch, 3 rows a process")])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch, line, message):
    monkeypatch.setattr(train, "world", lambda: (1, 2))
    stage, *argv = line.split()
    with pytest.raises(ValueError, match=message):
        train.settings(stage, [*argv, "--device", "cpu"])


def test_shares_are_next_to_each_other_and_make_up_the_whole(monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "world", lambda: (rank, 3))
        shares.append(processes.share(list(range(6))))
    assert shares == [[0, 1], [2, 3], [4, 5]]


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [flags.choose_device(name) for name in (None, "cuda", "cuda:0", "cpu")] == [
        "cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device 'cuda:2' is not one of those here"):
        flags.choose_device()


@pytest.mark.parametrize("card, mfu", [("NVIDIA H100 80GB HBM3", 0.2), ("NVIDIA H200", 0.2),
                                       ("NVIDIA A100-SXM4-80GB", 0.2 * 989 / 312), ("Tesla T4", None)])
def test_on_a_gpu_the_log_has_memory_and_of_a_known_card_mfu(monkeypatch, tmp_path, capsys, card, mfu):
    """Of two processes; 1e12 FLOPs a token, 10 s for 3,956 tokens: 98.9e12 a card and second."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**9)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: 110.0)
    args = SimpleNamespace(processes=2, device="cuda:0", steps=8)
    fake = SimpleNamespace(args=args, began=100.0, tokens=3956, flops=1e12, writes=True,
                           metrics=tmp_path / "metrics.jsonl",
                           bar=train.tqdm(disable=True))
    runs.Run.log(fake, 2, {"kl": 2.0})
    row = json.loads(fake.metrics.read_text())
    assert row["gb"] == 3.0 and row["kl"] == 1.0 and row["tok/s"] == 395.6
    assert (row.get("mfu") is None) if mfu is None else math.isclose(row["mfu"], mfu)
    said = capsys.readouterr().err
    share = f"mfu {mfu:.6g}  " if mfu else ""
    assert said == f"step 2/8  kl 1  tok/s 395.6  {share}gb 3  left 00:30\n"


def main(argv):
    """A process of torchrun: all runs, the resumed ones, and one that fails in process 1."""
    (one, two, data), rate = argv, train.learning_rate

    def broken(step, args):
        if step == 1 and processes.world()[0] == 1:
            raise ValueError("only here")
        return rate(step, args)
    with processes.shared_run():
        for name, words in RUNS.items():
            try:
                run(name, words, one, two, data)
            except ValueError as error:
                print(f"{name}: {error}")
        for name in RESUMED:
            resume(name, RUNS[name], one, two, data)
            resume(name, RUNS[name], two, f"{two}/own", data)
        print("all runs are done", flush=True)
        train.learning_rate = broken
        run("failed", RUNS["sft"], one, two, data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    flags.front_door(main)
