"""Long runs: generate, grade, kill, go on, for as long as one likes; prints the slope of memory.

    python -m tests.soak 30          minutes; on the embedded model, not part of the tests

Each round draws and grades 64 answers in this process, then kills an evaluation at a random moment
(kill -9) until it has ended: its samples must be those of the first round, to the byte.
"""

import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import eval as eval_
from data.files import ROOT, TINY, check
from data.flags import front_door
from data.rows import read_problems
from model import load_model, load_tokenizer

ASK = [sys.executable, str(ROOT / "eval.py"), "--model", f"{TINY}/distill", "--limit", "64",
       "--device", "cpu", "--out"]

def killed_until_done(out, rng):
    """Evaluates into `out`, killed at random moments -> how often, the bytes of its samples."""
    kills, most = 0, 12.0
    while True:
        run = subprocess.Popen([*ASK, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            said = run.communicate(timeout=rng.uniform(2, most))[1]
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills, most = kills + 1, most + 2                # so that it ends on any machine
            continue
        check(run.returncode == 0, said.decode())
        path, = Path(out).glob("eval/tiny/*.jsonl")
        return kills, path.read_bytes()

def main(argv):
    minutes, rng = float(argv[0]) if argv else 30.0, random.Random(0)
    model, tokenizer = load_model(f"{TINY}/distill"), load_tokenizer(f"{TINY}/distill")
    problems, first, hours, megabytes, kills = read_problems(TINY / "test.jsonl"), None, [], [], 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end or len(hours) < 3:
        with tempfile.TemporaryDirectory() as folder:
            some = rng.sample(problems, 64)
            eval_.evaluate(model, tokenizer, some, Path(folder, "rows.jsonl"), max_new_tokens=96)
            more, found = killed_until_done(f"{folder}/out", rng)
        check(first in (None, found), "an evaluation that was killed has other samples")
        first, kills = found, kills + more
        rss = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        hours.append((time.monotonic() - end) / 3600)
        megabytes.append(int(rss[1]) / 1e3)
        print(f"round {len(hours)}: {kills} kills so far, {megabytes[-1]:.0f} MB", flush=True)
    half = len(hours) // 2                                   # the first half warms up
    (slope, _), spread = np.polyfit(hours[half:], megabytes[half:], 1), np.std(megabytes[half:])
    print(f"{len(hours)} rounds, {kills} kills, nothing lost; memory in the second half "
          f"{slope:+.1f} MB an hour, spread {spread:.1f} MB; torch {torch.__version__}")

if __name__ == "__main__":
    front_door(main)
