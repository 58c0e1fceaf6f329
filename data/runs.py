"""A run directory while it is written: settings, log, checkpoints, what came out.

    with training("tune", args, model, optimizer, flops_per_token) as run:
        for step in range(run.start, args.steps):
            run.end_step(step, {"kl": loss}, tokens)       logs and saves every so often
        ...                                                save what was trained, under args.out
        return run.finish(fvu=0.1)                         the summary

It holds config.json (settings, versions), metrics.jsonl (an object per logged step),
checkpoint.safetensors (until the run is done), summary.json, metrics.svg (the log as curves) and
what was trained.
"""

import hashlib
import json
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.files import check, one_writer, parse_json, staged, write_json, write_text
from data.flags import Stopped, open_run, signals, tell
from data.flops import on_gpu
from data.processes import add_up, reduce_, seed_step, wait_for_all, world
from data.stats import curves

# What may change between a run and its continuation; and without what its artifact does not load
CHANGEABLE = {"resume", "fresh", "out", "log_every", "save_every", "device", "tf32", "config",
              "given", "origin", "compile", "checkpointing", "micro_batch", "processes"}
ARTIFACT = {"sae": "cfg.json", "pretrain": "model/config.json"}
GO_ON = {"sae": "--init finetune --sae-from {}", "pretrain": "--model {}/model"}

def check_out(stage, args):
    """ValueError: --out holds a run that this one would replace, or there is none to resume."""
    out, artifact = Path(args.out), ARTIFACT.get(stage, "adapter_config.json")
    unfinished = (out / "checkpoint.safetensors").exists()
    finished = not unfinished and ((out / "summary.json").exists() or (out / artifact).exists())
    more = f"{GO_ON.get(stage, '--adapter-from {}').format(out)} --out NEW trains on from it"
    check(not (args.resume and args.fresh), "--resume goes on, --fresh starts over: which?")
    if args.resume:
        check(not finished, f"{out} is finished: nothing to resume; {more}")
        check(unfinished, f"{out}: no checkpoint: start again without --resume")
    elif not args.fresh:
        check(not unfinished, f"{out} holds an unfinished run: --resume continues it, --fresh "
              "replaces it; or name another --out")
        check(not finished, f"{out} holds a finished run: --fresh replaces it; or name another "
              f"--out; {more}")

@contextmanager
def training(stage, args, *parts):
    """A Run that alone writes its directory, and that ends with a step if a signal asks it to."""
    lock = one_writer(args.out) if world()[0] == 0 else nullcontext()
    with lock, signals(at_once=False) as asked:
        yield Run(stage, args, *parts, asked)

class Run:
    """A run directory while it is written: settings, log, checkpoints, summary."""

    def __init__(self, stage, args, module, optimizer, flops, asked):
        self.stage, self.args, self.module, self.optimizer = stage, args, module, optimizer
        self.out, self.flops, self.asked = Path(args.out), flops, asked     # per token; signals
        self.checkpoint = self.out / "checkpoint.safetensors"
        self.metrics = self.out / "metrics.jsonl"
        self.start, self.tokens, self.began = 0, 0, time.perf_counter()
        self.writes = world()[0] == 0        # all processes hold, and resume from, the same
        self.settings = {k: v for k, v in vars(args).items() if k not in CHANGEABLE}
        check_out(stage, args)
        log = self.restore() if args.resume else ""
        self.saved = self.looked = self.start    # looked: until where all is known to be finite
        self.nan = 0.0                           # or NaN
        wait_for_all()                       # until every process has read the checkpoint
        if self.writes:
            # an earlier run's results must not stand beside these settings
            stale = [path.relative_to(self.out) for path in self.out.glob("layers.*/cfg.json")]
            stale += [ARTIFACT.get(stage, "adapter_config.json"), "summary.json"]
            for name in [*stale, *[self.checkpoint.name] * args.fresh]:
                (self.out / name).unlink(missing_ok=True)
            open_run(self.out, args)         # config.json
            self.metrics.write_text(log)
        seed_step(args.seed, self.start)
        tell(args, stage)
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        shared = f", {args.processes} processes" if args.processes > 1 else ""
        print(f"{stage}: {count:,} trainable parameters, {args.steps} steps, {args.device}{shared}")
        self.bar = tqdm(total=args.steps, initial=self.start, desc=stage, unit="step",
                        disable=None, dynamic_ncols=True)

    def end_step(self, step, values, tokens):
        """Counts a step; every so often logs `values`, {name: number or tensor}, and saves."""
        done, last, self.tokens = step + 1, step + 1 == self.args.steps, self.tokens + tokens
        self.bar.update()                    # quiet where there is no terminal
        seed_step(self.args.seed, done)
        asked = int(reduce_(torch.tensor(max(self.asked, default=0)), "MAX"))       # all, or none
        log = step == 0 or last or done % self.args.log_every == 0
        save = asked or last or done % self.args.save_every == 0
        self.nan = self.nan + 0 * sum(values.values())       # NaN from the first infinity or NaN
        if log or save or self.args.device == "cpu":         # a GPU would be waited for
            self.check_finite(done)
        if log:
            self.log(done, values)
        if save:
            self.save(done)
        if asked and not last:
            wait_for_all()                   # until the checkpoint is written
            raise Stopped(asked, f"{self.out} holds {done} of {self.args.steps} steps; the same "
                          "command with --resume goes on")

    def check_finite(self, done):
        """ValueError: since the last look something became infinite or NaN."""
        group, = self.optimizer.param_groups
        good = all(bool(t.isfinite().all()) for t in (torch.as_tensor(self.nan), *group["params"]))
        check(good, f"after step {self.looked}, by step {done}: not a finite number in loss, "
              f"gradient or weights; last good checkpoint: {self.saved or 'none'}; lower --lr")
        self.looked = done

    def log(self, done, values):
        """A line of metrics.jsonl, and of stderr or in the bar."""
        seconds, processes = time.perf_counter() - self.began, self.args.processes
        sums = add_up([float(value) for value in values.values()])
        row = {"step": done} | {name: x / processes for name, x in zip(values, sums)}
        row |= {"tok/s": self.tokens / seconds, "seconds": round(seconds, 3)}
        if self.args.device != "cpu":
            row |= on_gpu(self.args.device, row["tok/s"] * self.flops / processes)
        if self.writes:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        line = "  ".join(f"{k} {v:,.6g}" for k, v in row.items() if k not in ("step", "seconds"))
        self.bar.set_postfix_str(line)
        if self.bar.disable:                 # no terminal: the bar shows nothing
            left = tqdm.format_interval(seconds / done * (self.args.steps - done))
            print(f"step {done}/{self.args.steps}  {line}  left {left}", file=sys.stderr)

    def learned(self):
        """What a checkpoint holds of the module: {name: tensor}."""
        learned = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        return learned | dict(self.module.named_buffers())

    def save(self, done):
        """The checkpoint after `done` steps."""
        tensors, optimizer = self.learned(), self.optimizer.state_dict()
        self.saved = done
        if not self.writes or done == self.args.steps:       # the artifact itself follows
            return
        for i, state in optimizer["state"].items():      # moments of Adam, z of signum
            tensors |= {f"{i}/{name}": t for name, t in state.items()}
        tensors["rng"] = torch.get_rng_state()           # of dropout and noise
        if self.args.device != "cpu":
            tensors["cuda_rng"] = torch.cuda.get_rng_state(self.args.device)
        tensors = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        record = {"step": done, "tokens": self.tokens, "settings": self.settings,
                  "seconds": time.perf_counter() - self.began,
                  "groups": optimizer["param_groups"], "log": self.metrics.read_text()}
        header = {"record": json.dumps(record)}
        header["sha256"] = checksum(tensors, header["record"])
        with staged(self.out) as temporary:  # the whole file or none
            save_file(tensors, temporary / self.checkpoint.name, header)

    def restore(self):
        """Puts the checkpoint in place -> the text of metrics.jsonl at that time."""
        try:
            with safe_open(str(self.checkpoint), framework="pt") as file:
                header, found = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
            record = parse_json(header["record"], "its header")
            check(header["sha256"] == checksum(found, header["record"]), "it is damaged")
            then, self.start, now = record["settings"], record["step"], dict(self.settings)
            if self.may_grow() and now["steps"] > self.start:
                del now["steps"]
            changed = ", ".join(k for k, v in now.items() if v != then.get(k))
            check(not changed, f"it has other settings: {changed}; only under --schedule constant "
                  "may --steps grow" if changed == "steps" else f"other settings: {changed}")
            self.tokens, self.began = record["tokens"], self.began - record["seconds"]
            for name, tensor in self.learned().items():
                check(found[name].shape == tensor.shape, f"{name} is mis-shaped")
                tensor.data.copy_(found[name])           # would broadcast other shapes
            moments = {}
            for name in found.keys() - self.learned().keys() - {"rng", "cuda_rng"}:
                i, key = name.split("/")
                moments.setdefault(int(i), {})[key] = found[name]
            self.optimizer.load_state_dict({"state": moments, "param_groups": record["groups"]})
            torch.set_rng_state(found["rng"])
            if self.args.device != "cpu" and "cuda_rng" in found:
                torch.cuda.set_rng_state(found["cuda_rng"], self.args.device)
            return record["log"]
        except Exception as error:           # a damaged file may lead to any
            raise ValueError(f"{self.checkpoint}: cannot resume: {error!r}") from None

    def may_grow(self):
        """Whether a step does not depend on how many there are."""
        warm = any(getattr(part, "warmup", 0) for part in self.module.modules())     # of an SAE
        return self.args.schedule == "constant" and not warm

    def finish(self, **measured):
        """The artifact is written: notes what it took, drops the checkpoint -> the summary."""
        self.bar.close()
        seconds = round(time.perf_counter() - self.began, 2)
        summary = {"steps": self.args.steps, "tokens": self.tokens,
                   "flops": self.tokens * self.flops, "seconds": seconds} | measured
        if self.writes:
            write_json(self.out / "summary.json", summary)
            # our own lines, and maybe more of them than `read_jsonl` would take
            rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
            write_text(self.out / "metrics.svg", curves(rows, f"train.py --stage {self.stage}"))
            self.checkpoint.unlink(missing_ok=True)     # nothing is left to resume
        return summary

def checksum(tensors, record):
    """Of a checkpoint: a bit that flipped on a disk must not become another model."""
    digest = hashlib.sha256(record.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
