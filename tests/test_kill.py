"""Faults of a machine, injected: a run that is stopped goes on to the same bits and leaves nothing behind.

    python -m tests.test_kill 20               every kind of run, 20 of each signal: the table of RELIABILITY.md
    python -m tests.test_kill 20 sft eval      only these
    python -m tests.test_kill files sft        kill -9 at every file operation, one after the other

A process is forked from this one, which has imported torch already: a start then takes no seconds.
"""
import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import eval as ev
import resa
import train
from data import flags, formats, runs
from data.files import one_writer, staged
from tests.conftest import ROOT

DISTILL, RL = f"{ROOT}/data/tiny/distill", f"{ROOT}/data/tiny/rl"
DATA = f"--data {ROOT}/data/tiny/test.jsonl --device cpu --save-every 1 --log-every 1 --out"
TEXT = f"--steps 6 --seq-len 32 --batch 2 {DATA}"
KINDS = {                                # {out} follows
    "sae": f"train --stage sae --source {DISTILL} --latents 64 --k 4 {TEXT}",
    "tune": f"train --stage tune --target {DISTILL} --splice none --teacher source --source {DISTILL} {TEXT}",
    "sft": f"train --stage sft --target {DISTILL} {TEXT}",
    "rl": f"train --stage rl --target {DISTILL} --steps 4 --questions 2 --group 2 --max-new-tokens 8 {DATA}",
    "pretrain": f"train --stage pretrain --model random:{ROOT}/data/tiny/init/config.json {TEXT}",
    "eval": f"eval --model {DISTILL} --bench tiny --limit 6 --samples 2 --slots 4 --max-new-tokens 24 "
            "--device cpu --out"}
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
LONG = pytest.mark.skipif(not os.environ.get("RESA_LONG"), reason="takes a minute: RESA_LONG=1")
PROGRAMS = {"train": train.main, "eval": ev.main, "merge": resa.merge, "convert": formats.main}
LOST = {"kill -9": "the step under way", "SIGTERM": "nothing", "SIGINT": "nothing"}


def warm_up(folder):
    """What torch imports at the first step of training, two seconds long, is there for all children."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*command("sft", folder / "warm")[1:], "--steps", "1"])
    shutil.rmtree(folder / "warm")


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    warm_up(tmp_path_factory.mktemp("warm"))


def child(words, said, before):
    """A process: the program, as its command runs it; what it prints goes to the file `said`."""
    for number in (signal.SIGINT, signal.SIGTERM):       # as a shell starts it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout = sys.stderr = open(said, "w", buffering=1, encoding="utf-8")
    program, *sys.argv[1:] = words
    before()
    flags.front_door(PROGRAMS[program])


def start(words, said, before=lambda: None):
    process = multiprocessing.get_context("fork").Process(target=child, args=(words, said, before))
    process.start()
    return process


def finish(process, seconds=60):
    """Waits for a process -> its exit code, as a shell has it."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def command(kind, out):
    """The words that start this kind of run, or go on with it."""
    goes_on = Path(out, "checkpoint.safetensors").exists()
    return [*KINDS[kind].split(), str(out), *["--resume"] * goes_on]


def contents(out):
    """{path: what must be equal} of all files there: bytes, the log and the summary without what a clock says."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file():
            found[name] = path.read_bytes()
        if path.name == "metrics.jsonl":
            found[name] = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tok/s")}
                           for line in path.read_text().splitlines()]
        elif path.name == "summary.json" and path.parent == Path(out):
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.name == "config.json" and b'"argv"' in found[name]:
            found[name] = None
    return found


def whole(kind, folder):
    """An undisturbed run -> its contents, and how long it took."""
    begun = time.perf_counter()
    assert finish(start(command(kind, folder / "whole"), folder / "said")) == 0, (folder / "said").read_text()
    return contents(folder / "whole"), time.perf_counter() - begun


def was_done(code, said):
    """Whether a command refused to make again what is finished: the one before was killed as it ended."""
    return code == 2 and " holds a finished run: --fresh replaces it" in said.read_text()


def inject(kind, number, times, folder, seed=0):
    """Signals at random moments until `times` of them hit; each run is then continued to its end -> hits."""
    expected, seconds = whole(kind, folder)
    draw, hits, out, said = random.Random(f"{kind} {number} {seed}"), 0, folder / "out", folder / "said"
    while hits < times or out.exists():
        process = start(command(kind, out), said)
        if hits < times:
            time.sleep(draw.uniform(0.05, seconds))
            os.kill(process.pid, number)
        code = finish(process)
        if code and not was_done(code, said):
            assert code == 128 + number, said.read_text()
            hits += 1
            if number != signal.SIGKILL:
                last = said.read_text().splitlines()[-1]
                assert f"stopped by {signal.Signals(number).name}; " in last and "the same command" in last
        else:
            (out / ".resa-lock").unlink(missing_ok=True)     # of a process killed as it ended
            assert contents(out) == expected
            shutil.rmtree(out)
    assert sorted(path.name for path in folder.iterdir()) == ["said", "whole"]
    return hits


class KillAt:
    """In a process: kill -9 as its operation number `at` on a file in `folder` begins."""
    EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}

    def __init__(self, folder, at):
        self.folder, self.at, self.count = str(folder), at, 0

    def __call__(self):
        sys.addaudithook(self.audit)

    def audit(self, event, args):
        if event in self.EVENTS and str(args[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def kill_at_every_file_operation(kind, folder, step=1):
    """-> how many there are."""
    (expected, _), at, out, said = whole(kind, folder), 1, folder / "out", folder / "said"
    while finish(start(command(kind, out), said, KillAt(out, at))) == 128 + signal.SIGKILL:
        code = finish(start(command(kind, out), said))
        assert code == 0 or was_done(code, said), f"operation {at}: {said.read_text()}"
        (out / ".resa-lock").unlink(missing_ok=True)
        assert contents(out) == expected, f"operation {at}"
        shutil.rmtree(out)
        at += step
    assert contents(out) == expected
    return at - 1


# ------------------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("kind", ["sft", "eval"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(kind, name, tmp_path):
    assert inject(kind, SIGNALS[name], 1, tmp_path) == 1      # continued to the same bits, and nothing left


@pytest.mark.parametrize("kind, step", [pytest.param("sft", 13, marks=LONG), ("eval", 19)])
def test_killed_at_a_file_operation_it_goes_on_to_the_same_bits(kind, step, tmp_path):
    assert kill_at_every_file_operation(kind, tmp_path, step) > step


def slow_steps():
    """In a process: each step takes 30 s, whose start is said."""
    def sleep(step, args):
        if step == 1:
            print("in step 2", flush=True)
            time.sleep(30)
        return args.lr
    train.learning_rate = sleep


def wait_for(text, said, seconds=30):
    end = time.perf_counter() + seconds
    while text not in said.read_text() if said.exists() else True:
        assert time.perf_counter() < end, said.read_text()
        time.sleep(0.01)


def test_a_second_signal_stops_at_once_but_not_one_of_the_same_moment(tmp_path):
    """`timeout` and torchrun send one to the process and one to its group."""
    out, said = tmp_path / "out", tmp_path / "said"
    process = start(command("sft", out), said, slow_steps)
    wait_for("in step 2", said)
    for _ in range(5):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    process.join(1.2)
    assert process.exitcode is None, "the step is not finished yet"
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, 10) == 143
    assert "stopped by SIGTERM" in said.read_text() and "Traceback" not in said.read_text()
    assert (out / "checkpoint.safetensors").exists() and not list(out.glob(".resa*"))


def test_a_signal_is_answered_with_the_step_that_is_saved(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    words = [*command("sft", out), "--steps", "100000", "--save-every", "100000"]
    process = start(words, said)
    wait_for("step 3/", said)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    step = train.json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert said.read_text().splitlines()[-1] == (
        f"stopped by SIGINT; {out} holds {step} of 100000 steps; the same command with --resume goes on")
    process = start([*words, "--resume"], said)
    wait_for(f"step {step + 1}/", said)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)


def test_a_signal_that_is_ignored_stays_so_and_handlers_are_put_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)        # as a shell does it for `command &`
    try:
        with flags.signals(at_once=True):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@LONG
def test_the_processes_of_torchrun_stop_at_one_step_and_go_on(tmp_path):
    out = tmp_path / "out"
    words = KINDS["sft"].split()[1:] + [str(out), "--steps", "100000", "--save-every", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                "2", "train.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[1]
    assert rest.count("stopped by SIGTERM; ") == 1 and "another process" not in rest, rest
    step = train.json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"{out} holds {step} of 100000 steps" in rest
    assert not list(out.glob(".resa*"))


@LONG
def test_an_experiment_that_is_stopped_stops_its_commands(tmp_path, monkeypatch):
    """resa.py: each arm saves a checkpoint, none goes on alone."""
    def experiment(argv):
        args = flags.parse_experiment(flags.arms_parser("resa.py", ""), ["--out", str(tmp_path / "arms")], {})
        flags.open_experiment(args)
        line = " ".join(KINDS["sft"].split()[1:-1]).replace("--steps 6", "--steps 100000")
        flags.run_commands({"one": "train.py " + line}, args)
    monkeypatch.setitem(PROGRAMS, "experiment", experiment)
    process = start(["experiment"], tmp_path / "said")
    metrics = tmp_path / "arms" / "one" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    assert (tmp_path / "arms" / "one" / "checkpoint.safetensors").exists()
    with one_writer(tmp_path / "arms" / "one"):
        pass


# ------------------------------------------------------------------------------------------------
# One writer
# ------------------------------------------------------------------------------------------------

def together(kind, count, folder):
    """This many starts at one moment, in one place -> exit codes and what they said."""
    barrier = multiprocessing.get_context("fork").Barrier(count)
    processes = [start(command(kind, folder / "out"), folder / f"said{i}", barrier.wait) for i in range(count)]
    codes = [finish(process) for process in processes]
    return codes, [(folder / f"said{i}").read_text() for i in range(count)]


@pytest.mark.parametrize("kind, count", [("sft", 3), pytest.param("sft", 20, marks=LONG),
                                         pytest.param("eval", 20, marks=LONG)])
def test_of_those_that_start_at_one_moment_one_goes_on(kind, count, tmp_path, monkeypatch):
    kinds = {"sft": KINDS["sft"].replace("--steps 6", f"--steps {12 * count}"),
             "eval": KINDS["eval"].replace("--limit 6", "--limit 100")}
    monkeypatch.setattr(sys.modules[__name__], "KINDS", kinds)
    codes, said = together(kind, count, tmp_path)
    assert sorted(codes) == [0] + [2] * (count - 1), said
    for code, text in zip(codes, said):
        last = text.splitlines()[-1]
        assert code == 0 or last.startswith("error: ") and " writes this; wait for it" in last, text
    assert any(f"process {os.getpid()}" not in text and "process " in text for text in said)
    assert not list((tmp_path / "out").rglob(".resa*"))


def test_the_second_names_the_first_and_a_dead_one_is_no_obstacle(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    first = start(command("sft", out), said, slow_steps)
    wait_for("in step 2", said)
    assert finish(start(command("sft", out), tmp_path / "other")) == 2
    last = (tmp_path / "other").read_text().splitlines()[-1]
    assert last.startswith(f"error: {out}: process {first.pid}, since ") and last.endswith("name another --out")
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    assert (out / ".resa-lock").exists()
    assert finish(start(command("sft", out), said)) == 0 and not list(out.glob(".resa*"))


def test_a_lock_that_was_removed_is_no_lock(tmp_path):
    """rm -r, then another run in the same place: the first one takes away nothing of the second."""
    with one_writer(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")
        second = one_writer(tmp_path / "out")
        second.__enter__()
        inode = (tmp_path / "out" / ".resa-lock").stat().st_ino
    assert (tmp_path / "out" / ".resa-lock").stat().st_ino == inode
    with pytest.raises(ValueError, match=f"process {os.getpid()}, since"), one_writer(tmp_path / "out"):
        pass
    second.__exit__(None, None, None)
    assert not (tmp_path / "out").exists()


def count_up(path, times):
    for _ in range(times):
        with one_writer(path.parent, path.name, wait=True):
            number = int(path.read_text())
            time.sleep(0.0005)
            path.write_text(str(number + 1))


def test_those_that_wait_go_one_after_the_other(tmp_path):
    (tmp_path / "n").write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=count_up, args=(tmp_path / "n", 50))
                 for _ in range(6)]
    for process in processes:
        process.start()
    assert [finish(process) for process in processes] == [0] * 6
    assert (tmp_path / "n").read_text() == "300" and os.listdir(tmp_path) == ["n"]


# ------------------------------------------------------------------------------------------------
# Leftovers
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("program", [pytest.param("merge", marks=LONG), "convert"])
def test_merge_and_convert_are_run_again_after_a_kill(program, tmp_path):
    """At every file operation; nothing of another's directory is ever taken for a leftover."""
    made = tmp_path / "sae"
    if program == "convert":
        assert finish(start(command("sae", made), tmp_path / "said")) == 0
    words = {"merge": ["merge", "--model", f"{DISTILL}+{RL}", "--out"],
             "convert": ["convert", "--sae", str(made), "--layout", "saelens", "--out"]}[program]
    assert finish(start([*words, str(tmp_path / "whole")], tmp_path / "said")) == 0
    expected, out, at = contents(tmp_path / "whole"), tmp_path / "out", 1
    step = 1 if os.environ.get("RESA_LONG") else 3
    while finish(start([*words, str(out)], tmp_path / "said", KillAt(out, at))) != 0:
        complete = {"config.json", "cfg.json"} & set(os.listdir(out) if out.exists() else [])
        code = finish(start([*words, str(out)], tmp_path / "said"))
        assert code == (2 if complete else 0), (at, (tmp_path / "said").read_text())
        assert contents(out) == expected or complete
        shutil.rmtree(out)
        at += step
    assert contents(out) == expected and at > 8
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    assert finish(start([*words, str(tmp_path / "theirs")], tmp_path / "said")) == 2
    assert os.listdir(tmp_path / "theirs") == ["notes.txt"]


def test_what_marks_a_directory_as_complete_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with staged(tmp_path) as temporary:
        for name in ("tokenizer.json", "config.json", "model.safetensors", "generation_config.json"):
            (temporary / name).write_text("{}")
    assert moved == ["model.safetensors", "generation_config.json", "tokenizer.json", "config.json"]


# ------------------------------------------------------------------------------------------------
# Divergence
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def sft(tmp_path):
    """sft(*more): the small run in this process, into tmp_path/out."""
    return lambda *more: train.main([*command("sft", tmp_path / "out")[1:], *more])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_is_not_finite_ends_the_run_at_its_step(device, sft, tmp_path, monkeypatch):
    """The loss of step 4.  A GPU is looked at where it is waited for anyway: here at step 6."""
    step_of, end_step = train.optimizer_step, runs.Run.end_step

    def broken(loss_of, parts, optimizer, rate):
        loss, norm = step_of(loss_of, parts, optimizer, rate)
        broken.calls += 1
        return (loss * float("nan") if broken.calls == 4 else loss), norm

    def on_gpu(self, *rest):             # an accelerator in name alone
        self.args.device = "gpu"
        try:
            end_step(self, *rest)
        finally:
            self.args.device = "cpu"
    broken.calls = 0
    monkeypatch.setattr(train, "optimizer_step", broken)
    monkeypatch.setattr(runs, "on_gpu", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    if device == "gpu":
        monkeypatch.setattr(runs.Run, "end_step", on_gpu)
    where = {"cpu": "after step 3, by step 4: .*checkpoint: 3", "gpu": "after step 3, by step 6: .*checkpoint: 3"}
    with pytest.raises(ValueError, match=where[device]):
        sft("--save-every", "3", "--log-every", "3")


@pytest.mark.parametrize("what", ["gradient", "weights"])
def test_a_gradient_or_weight_that_is_not_finite_ends_the_run_too(what, sft, monkeypatch):
    step_of = train.optimizer_step

    def broken(loss_of, parts, optimizer, rate):
        loss, norm = step_of(loss_of, parts, optimizer, rate)
        if what == "weights":
            optimizer.param_groups[0]["params"][3].data[0, 0] = float("inf")
        return loss, norm if what == "weights" else norm + float("inf")
    monkeypatch.setattr(train, "optimizer_step", broken)
    with pytest.raises(ValueError, match="after step 0, by step 1: .*last good checkpoint: none; lower --lr"):
        sft()


@pytest.mark.parametrize("variant", ["topk", pytest.param("gated", marks=LONG)])  # gated: NaN
def test_an_sae_that_explodes_is_refused(variant, tmp_path, capsys):
    argv = [*command("sae", tmp_path / "out")[1:], "--variant", variant, "--save-every", "99"]
    if "k" not in train.VARIANTS[variant].defaults:
        argv = [word for word in argv if word not in ("--k", "4")]
    with pytest.raises(ValueError, match="lower --lr"):
        train.main([*argv, "--lr", "1e6"])
    assert not list((tmp_path / "out").glob("*sae*"))
    train.main(argv)                     # so is none of a default rate
    assert "collapsed" not in capsys.readouterr().err


def test_a_dictionary_that_has_died_is_said_with_numbers(tmp_path, capsys):
    train.main([*command("sae", tmp_path / "out")[1:], "--lr", "1", "--steps", "20", "--save-every", "99"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "% of the latents never fired on the held-out text: the dictionary has collapsed" in said
    assert float(said.split("%")[0]) > 90 and (tmp_path / "out" / "cfg.json").exists()


# ------------------------------------------------------------------------------------------------
# Checksums, disks, directories
# ------------------------------------------------------------------------------------------------

def unfinished(out):
    """A run that was killed after its fourth checkpoint -> its checkpoint."""
    process = start([*command("sft", out), "--steps", "9"], out.with_name("said"))
    wait_for("step 5/", out.with_name("said"))
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    return out / "checkpoint.safetensors"


def test_a_bit_that_flipped_is_damage_and_not_another_model(sft, tmp_path):
    path = unfinished(tmp_path / "out")
    data, draw = bytearray(path.read_bytes()), random.Random(0)
    header = int.from_bytes(data[:8], "little")
    places = [draw.randrange(8, 8 + header) for _ in range(4)]
    places += [draw.randrange(8 + header, len(data)) for _ in range(4)]
    for place in places:
        bit = 1 << draw.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(ValueError, match="checkpoint.safetensors: cannot resume"):
            sft("--steps", "9")
        data[place] ^= bit
    path.write_bytes(data)
    sft("--steps", "9")


def test_a_run_whose_directory_disappears_ends_in_one_line(tmp_path):
    for kind in ("sft", "eval"):
        out, said = tmp_path / kind, tmp_path / "said"
        more = ["--steps", "100000", "--log-every", "10000"] if kind == "sft" else ["--limit", "1000"]
        process = start([*command(kind, out), *more], said)
        while not any(path.read_text() for path in out.rglob("[!.]*.jsonl")):
            time.sleep(0.01)
        os.rename(out, tmp_path / "away")            # at once, unlike rm -r
        shutil.rmtree(tmp_path / "away")
        assert finish(process) == 2
        last = said.read_text().splitlines()[-1]
        assert last.startswith("error: ") and str(out) in last and "Traceback" not in said.read_text()


@pytest.mark.parametrize("kind", ["sft", "eval"])
def test_a_file_in_the_place_of_the_directory_is_one_line(kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):        # nobody writes there
        assert finish(start(command(kind, out), tmp_path / "said")) == 2
        last = (tmp_path / "said").read_text().splitlines()[-1]
        assert last.startswith("error: ") and str(out) in last
    assert (tmp_path / "file").read_text() == "mine"


def without_privileges():
    """In a process: even root is now the ordinary owner of its files, who obeys their modes."""
    version_3, self = 0x20080522, 0
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, self), (ctypes.c_uint32 * 6)()) == 0


def permit(out, writing):
    for path in [out, *out.rglob("*")]:
        path.chmod((0o600 if writing else 0o400) + 0o100 * path.is_dir())


def kept(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".resa-lock"}


@pytest.mark.parametrize("kind", ["sft", "eval", *(pytest.param(kind, marks=LONG) for kind in ("sae", "tune", "rl", "pretrain"))])
def test_a_read_only_directory_is_one_line_and_the_run_goes_on_later(kind, tmp_path):
    expected, _ = whole(kind, tmp_path)
    out, said = tmp_path / "parent/out", tmp_path / "said"
    out.parent.mkdir(mode=0o500)                         # nothing can be made there
    assert finish(start(command(kind, out), said, without_privileges)) == 2
    assert said.read_text().splitlines()[-1].startswith("error: ") and not out.exists()
    out.parent.chmod(0o700)

    def closed_after_a_step():
        without_privileges()
        save = runs.Run.save

        def save_and_close(run, *rest):
            save(run, *rest)
            permit(run.out, False)
        runs.Run.save = save_and_close
    part = [*command(kind, out), *(["--limit", "2"] if kind == "eval" else [])]
    code = finish(start(part, said, closed_after_a_step))
    assert code == (0 if kind == "eval" else 2), said.read_text()
    permit(out, False)
    before = kept(out)
    for _ in range(2):
        assert finish(start(command(kind, out), said, without_privileges)) == 2
        last = said.read_text().splitlines()[-1]
        assert last.startswith("error: ") and str(out) in last and "Traceback" not in said.read_text()
        assert kept(out) == before and before            # the last good state
    permit(out, True)
    assert finish(start(command(kind, out), said)) == 0 and contents(out) == expected


def small_disk(size):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return limit


@pytest.mark.parametrize("kind, size", [("sft", 20_000), ("pretrain", 100_000), ("eval", 4_000)])
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_with_room(kind, size, tmp_path):
    expected, _ = whole(kind, tmp_path)
    out, said = tmp_path / "out", tmp_path / "said"
    assert finish(start(command(kind, out), said, small_disk(size))) == 2
    assert said.read_text().splitlines()[-1].startswith("error: ") and "Traceback" not in said.read_text()
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left and left <= expected.keys()
    assert finish(start(command(kind, out), said)) == 0 and contents(out) == expected


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------

def main(argv):
    times, kinds = argv[0], argv[1:] or list(KINDS)
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / f"resa-kill-{os.getpid()}"
    scratch.mkdir()
    warm_up(scratch)
    for kind in kinds:
        rows = ["every file operation"] if times == "files" else list(SIGNALS)
        for name in rows:
            folder = scratch / kind / name.replace(" ", "")
            folder.mkdir(parents=True)
            if times == "files":
                count, lost = kill_at_every_file_operation(kind, folder), LOST["kill -9"]
            else:
                inject(kind, SIGNALS[name], int(times), folder)
                count, lost = times, LOST[name]
            lost = "samples under way" if kind == "eval" else lost
            print(f"| {kind} | {name} | {count} | {lost} |", flush=True)
            shutil.rmtree(folder)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
