"""Everything that learns: the SAE, the adapter, and the embedded models themselves.

    python train.py --stage sae          an SAE on the activations of the source      -> out/tiny/sae
    python train.py --stage tune         LoRA through the frozen SAE                  -> out/tiny/adapter
    python train.py --stage sft          the baseline: LoRA on the same text          -> out/tiny/sft
    python train.py --stage rl           LoRA by GRPO, what makes a source model      -> out/tiny/rl
    python train.py --stage pretrain     a whole model on text                        -> out/tiny/pretrain/model
    python train.py ... --dry-run        what it would take, nothing loaded; without --stage, of the whole preset

Every stage is the same sequence: data -> batches -> steps -> checkpoint.  A run directory holds config.json
(settings, versions), metrics.jsonl (one object a logged step), checkpoint.safetensors (until the run is done)
and the artifact.  --resume continues an interrupted run; on a CPU, to the same bits.

Letters in shape comments: B rows, T tokens, D width, V vocabulary, F latents, N = B*T tokens, G samples a question.
"""

import contextlib
import json
import math
import os
import re
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import resa
from model import (DTYPES, Config, Transformer, collect, load_model, load_tokenizer, read_json, right_pad, rope_table,
                   save_model, split_spec, staged)
from sae import (CHUNK, VARIANTS, Chosen, Metrics, afa, build, default_lr, init_b_dec, load_sae, make_optimizer,
                 resolve_hyper, save_sae, train_step)


# ----------------------------------------------------------------------------------------------------------
# Settings: one dataclass per stage, each remark is the --help of its flag
# ----------------------------------------------------------------------------------------------------------

GPU = Literal["l40s", "rtx6000ada", "a100", "h100", "h200", "cpu"]      # the rows of GPUS


@dataclass
class Common:
    preset: str = "tiny"                 # bundle of defaults: tiny, or one of resa-{still,deepscaler}-vN and tina-*
    data: str = ""                       # JSON(L) of problem/answer, text or problem/completion; or still, limr, ...
    template: Literal["chat", "resa"] = "chat"      # chat: the model's own format; resa: the published plain text
    seq_len: int = 256                   # tokens in a packed chunk; published: 2048
    shuffle: bool = True                 # permute the chunks of each epoch, by seed; published: --no-shuffle
    batch: int = 32                      # chunks in an optimizer step
    micro_batch: int = 0                 # chunks in one forward pass, a divisor of --batch; 0: the whole batch
    steps: int = 0                       # optimizer steps; 0: as many as --epochs passes over the data
    epochs: int = 1                      # passes over the data, when --steps is 0
    seed: int = 0                        # of initialisation, data order and sampling
    device: str | None = None            # cpu, cuda, cuda:1, ...; default: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"      # of the language models
    out: str = ""                        # run directory; default out/PRESET/STAGE
    resume: bool = False                 # continue the run in --out from its last checkpoint
    log_every: int = 10                  # steps between two lines of metrics.jsonl
    save_every: int = 100                # steps between two checkpoints; in --stage rl each also keeps its adapter
    dry_run: bool = False                # print what the run would take; nothing is downloaded, loaded or written
    gpu: GPU | None = None               # whose time --dry-run estimates; default: l40s, but cpu with --device cpu
    dollars_per_hour: float | None = None      # its price in --dry-run; default: an assumption, which is printed


@dataclass
class Sae(Common):
    """Stage I: a sparse autoencoder on the activations of the source model."""
    source: str = ""                     # model spec whose activations are learned
    layer: int = 1                       # decoder block, counted from 0
    site: Literal["resid", "mlp"] = "resid"      # output of the block, or of its MLP
    other_site: bool = False             # use a pretrained SAE where it was not trained; published: v2 did
    init: Literal["scratch", "finetune", "pretrained"] = "scratch"      # the three modes of the paper
    sae_from: str = ""                   # SAE to start from, DIR_OR_HUB_ID[#HOOKPOINT], for finetune and pretrained
    variant: str = "topk"                # kind of autoencoder; "help" lists them
    set: list[str] = field(default_factory=list)      # further settings of the variant, name=value
    latents: int = 1024                  # size of the dictionary
    k: int = 16                          # active latents a token
    optimizer: Literal["signum", "adam"] = "adam"      # published: signum (schedule-free sign descent)
    lr: float = 0.0                      # 0: the optimizer's rule, for signum 5e-3/sqrt(F/2^14)
    warmup: int = 0                      # steps of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] = "constant"      # linear: to 0 over the last fifth
    aux_coef: float = 0.03125            # weight of AuxK, which revives dead latents; published: 0
    dead_after: int = 100_000            # tokens without firing after which a latent counts as dead
    centre: Literal["mean", "median"] = "mean"      # b_dec starts at the mean or the geometric median of a batch
    sink_norm: float | None = None       # leave out position 0 and norms above this x median; 0: nothing; default 10


@dataclass
class Lora(Common):
    target: str = ""                     # model spec that the adapter is for
    lora_r: int = 32                     # rank
    lora_alpha: int = 128                # scale is alpha / rank
    lora_dropout: float = 0.05           # on the adapter's input, in training
    lr: float = 3e-4                     # published: 1e-6 (at 1.5B parameters)
    schedule: Literal["constant", "cosine"] = "constant"      # cosine ends at a floor of a tenth of the rate
    clip: float = 1.0                    # gradient norm


@dataclass
class Tune(Lora):
    """Stage II: LoRA adapters learn to predict through the frozen SAE what the model predicts without it."""
    sae: str = ""                        # the SAE, DIR_OR_HUB_ID[#HOOKPOINT]; default out/PRESET/sae
    source: str = ""                     # model spec of the teacher, with --teacher source
    layer: int = 1                       # decoder block, counted from 0; must be the SAE's
    site: Literal["resid", "mlp"] = "resid"      # output of the block, or of its MLP; must be the SAE's
    other_site: bool = False             # use an SAE where it was not trained; published: v2 did
    splice: Literal["sae", "random", "noise", "none"] = "sae"      # what takes the activation's place
    sae_grad: Literal["off", "on"] = "off"      # off: as the code was published; on: as the text says
    teacher: Literal["target", "source"] = "target"      # whose predictions are the aim; published: target
    into: Literal["student", "teacher", "gradient", "nothing"] = "student"      # where the SAE goes; see tuning_loss
    match: float = 0.0                   # weight of the distance of student and teacher as the SAE sees them
    kl_reduction: Literal["token", "sequence"] = "token"      # nats per token; published: sum over the sequence


@dataclass
class Sft(Lora):
    """The baseline: cross-entropy on the same trace-free text, all tokens, at the same rate."""


@dataclass
class Rl(Lora):
    """GRPO with LoRA (arXiv 2402.03300), what turns a base into a source of reasoning.

    --micro-batch counts samples here.  Every --save-every steps the adapter goes into OUT/checkpoint-STEP.
    """
    questions: int = 32                  # questions in a step
    group: int = 8                       # samples of each question
    warmup: int = 0                      # steps of linear warm-up
    temperature: float = 1.0             # of the samples; the Tina recipe has 0.7
    max_new_tokens: int = 96             # length limit of a sample
    beta: float = 0.0                    # weight of KL(policy || base), k3 estimate; the Tina recipe has 0.04
    rewards: list[str] = field(default_factory=lambda: ["accuracy", "format"])      # of accuracy, format, length


@dataclass
class Pretrain(Common):
    """Next-token training of all weights: makes the embedded models."""
    model: str = ""                      # spec to start from, e.g. random:data/tiny/init/config.json
    only: str = ""                       # regular expression: parameters in whose names it is found learn, others stay
    lr: float = 1e-3                     # peak
    warmup: int = 100                    # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = "cosine"      # cosine ends at a floor of a tenth of the rate


STAGES = {"sae": Sae, "tune": Tune, "sft": Sft, "rl": Rl, "pretrain": Pretrain}
ARTIFACT = {"sae": "cfg.json", "pretrain": "model/config.json"}      # without it a directory does not load
FOLDER = {"tune": "adapter"}             # where the artifact of a stage goes, if not its own name


def check(condition, message):
    if not condition:
        raise ValueError(message)


# The least value of each number; what must be above 0 is checked beside it.
LEAST = dict(match=0, seq_len=2, batch=1, steps=0, epochs=1, seed=0, log_every=1, save_every=1, micro_batch=0, lr=0,
             lora_r=1, lora_alpha=1, lora_dropout=0, clip=0, warmup=0,
             questions=1, max_new_tokens=1, temperature=0, beta=0)


def check_numbers(args):
    resa.at_least(args, **{name: low for name, low in LEAST.items() if hasattr(args, name)})
    for name in ("lr", "clip", "temperature"):
        zero_is_a_rule = name == "lr" and isinstance(args, Sae)
        check(getattr(args, name, 1) > 0 or zero_is_a_rule, f"--{name} must be above 0: with 0 nothing is learned")
    for name in ("sink_norm", "dollars_per_hour"):
        given = getattr(args, name, None)
        check(given is None or 0 <= given < math.inf, f"--{name.replace('_', '-')} must be at least 0")
    check(getattr(args, "lora_dropout", 0) < 1, "--lora-dropout must be below 1")
    check(args.seed < 2**62, "--seed must be below 2^62")
    whole, name = (args.questions * args.group, "the samples,") if isinstance(args, Rl) else (args.batch, "--batch")
    check(not args.micro_batch or whole % args.micro_batch == 0, f"--micro-batch {args.micro_batch} does not "
          f"divide {name} {whole}: its pieces weigh the same, so they must be equal")
    check(not args.steps or "epochs" not in args.given, "--epochs has no effect with --steps")


def refuse_idle(args, names, where):
    """ValueError if one of these flags was given where it could not take effect."""
    idle = [name for name in names.split() if name in args.given]
    check(not idle, f"--{idle[0].replace('_', '-')} has no effect with {where}" if idle else "")


# ----------------------------------------------------------------------------------------------------------
# Data: rows -> text -> packed chunks
# ----------------------------------------------------------------------------------------------------------

# The layout of the published text (arXiv 2506.09967, released code): the gold answer stands inside the think
# tags and there is no reasoning.  Resa: a system paragraph, Table 1 of arXiv 2501.12948, precedes it; put it
# into the "system" field of your rows to have it.
RESA_TEMPLATE = ("{system}User:\n {problem}\n\nAssistant:\n <think> {answer} </think>\n"
                 "<answer> Answer: {answer}</answer>")


def as_text(row, tokenizer, template):
    """One row of a data file -> the document a model reads."""
    if "text" in row:
        return row["text"]
    if "completion" not in row and template == "resa":
        return RESA_TEMPLATE.format(system=row.get("system") or "", problem=row["problem"], answer=row["answer"])
    prompt = tokenizer.chat([{"role": "user", "content": row["problem"]}])
    start = "" if resa.think_prefix(prompt) else "<think>\n"
    return prompt + row.get("completion", f"{start}{row.get('answer')}\n</think>\n{row.get('answer')}")


def data_file(name):
    """--data -> the path of a file; a published set is fetched on first use."""
    from data.prepare import TRAINING, training_set
    check(name, "no --data given, and this preset has none")
    if name in TRAINING and not Path(name).exists():
        return training_set(name)
    check(Path(name).is_file(), f"{name}: no such file (--data takes a JSONL or JSON of problem/answer, or one of "
          f"{', '.join(TRAINING)})")
    return name


def read_rows(path):
    """Rows of text or problem/completion if the first row is one of these, else of problem/answer."""
    _, first = next(resa.read_jsonl(path), (0, {}))
    if "text" not in first and "completion" not in first:
        return resa.read_problems(path)
    rows = []
    for number, row in resa.read_jsonl(path):
        fields = ("text",) if "text" in row else ("problem", "completion")
        check(all(isinstance(row.get(name), str) for name in fields),
              f'{path}:{number}: no "text" field, nor "problem" and "completion", that holds text')
        rows.append(row)
    return rows


def pack(rows, tokenizer, template, seq_len):
    """Documents joined by the end token, which also comes first, cut into chunks (n, seq_len) int64.

    Only whole chunks are kept.  Resa: the released code drops a remainder every 2048 documents; here, once.
    """
    ids = [tokenizer.eos_id]
    for row in tqdm(rows, desc="tokenize", unit="row", disable=None, leave=False):
        ids += tokenizer.encode(as_text(row, tokenizer, template)) + [tokenizer.eos_id]
    n = len(ids) // seq_len
    check(n > 0, f"the data has {len(ids)} tokens, fewer than one chunk of {seq_len}: lower --seq-len or add data")
    return torch.tensor(ids[:n * seq_len]).view(n, seq_len)                                      # (n,T)


def picked_at(step, n, args):
    """The numbers of the chunks, of n, in an optimizer step: of the step alone, so that resuming needs no state."""
    epochs = [divmod(i, n) for i in range(step * args.batch, (step + 1) * args.batch)]
    return [order(n, args.seed + epoch)[j] if args.shuffle else j for epoch, j in epochs]


def batch_at(step, chunks, args):
    """The chunks (B,T) of an optimizer step."""
    return chunks[picked_at(step, len(chunks), args)].to(args.device)


def micro(ids, args):
    """ids (B,T) in the pieces of one forward pass."""
    return ids.split(args.micro_batch or args.batch)


@lru_cache(maxsize=1)
def order(n, seed):
    """The permutation of one epoch; the last one is kept, as every step of the epoch asks for it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def load_chunks(args, tokenizer, model):
    """Data file -> packed chunks (n,T) that this model can read."""
    rows = read_rows(data_file(args.data))
    if all("text" in row or "completion" in row for row in rows):
        refuse_idle(args, "template", f"{args.data}: its rows are whole texts or prompts with a completion")
    chunks = pack(rows, tokenizer, args.template, args.seq_len)
    check(int(chunks.max()) < model.config.vocab_size, f"the tokenizer makes id {int(chunks.max())}, the model knows "
          f"{model.config.vocab_size}: they do not belong together")
    return chunks


def count_steps(args, chunks):
    """Fills in --steps where --epochs was to decide."""
    args.steps = args.steps or max(1, args.epochs * len(chunks) // args.batch)


# ----------------------------------------------------------------------------------------------------------
# Run directory: metrics, checkpoints, progress
# ----------------------------------------------------------------------------------------------------------

def write_state(path, state):
    """A nested dict as one safetensors file: tensors as tensors, all else as JSON in its header."""
    tensors = {}

    def strip(value):
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": [[k, strip(v)] for k, v in value.items()]}
        return {"list": [strip(v) for v in value]} if isinstance(value, (list, tuple)) else {"value": value}
    skeleton = json.dumps(strip(state))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, {"state": skeleton})
        os.replace(temporary, path)
    except SafetensorError as error:      # a full disk, for one, is not an OSError there
        raise OSError(f"{path}: could not be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path):
    """What write_state wrote.  ValueError if the file holds anything else."""
    def fill(node):
        (kind, value), = node.items()
        if kind == "dict":
            return {k: fill(v) for k, v in value}
        return tensors[value] if kind == "tensor" else [fill(v) for v in value] if kind == "list" else value
    try:
        with safe_open(str(path), framework="pt") as f:
            skeleton = json.loads(f.metadata()["state"])
            tensors = {int(name): f.get_tensor(name) for name in f.keys()}
        return fill(skeleton)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no checkpoint to resume from") from None
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of this program ({error})") from None


class Run:
    """The directory of a run while it is being written.

    modules and optimizers are what a checkpoint holds: the trainable tensors and buffers, the optimizer
    state, the random state (dropout), the step.  With --resume they are restored here.
    """

    def __init__(self, stage, args, modules, optimizer):
        self.args, self.modules, self.optimizer, self.start = args, modules, optimizer, 0
        self.out = Path(args.out)
        self.checkpoint, self.metrics = self.out / "checkpoint.safetensors", self.out / "metrics.jsonl"
        self.seconds, self.began, kept = 0.0, time.perf_counter(), []
        self.tokens, self.flops = 0, 0.0
        if args.resume:
            kept = self.restore()
        elif self.checkpoint.exists():
            raise ValueError(f"{self.out} holds an unfinished run: --resume continues it, another --out starts anew")
        else:      # a new run that fails must not leave the last one's artifact beside its own settings
            for name in (ARTIFACT.get(stage, "adapter_config.json"), "summary.json"):
                (self.out / name).unlink(missing_ok=True)
            if stage == "rl":
                remove_adapters(self.out)
        self.resumed = self.tokens
        resa.open_run(self.out, args)
        self.metrics.write_text("".join(kept))
        count = sum(p.numel() for module in modules.values() for p in module.parameters() if p.requires_grad)
        print(f"{stage}: {count:,} trainable parameters, {args.steps} steps, {args.device}, models in {args.dtype}"
              + (f", going on after step {self.start}" if self.start else ""))
        self.bar = tqdm(total=args.steps, initial=self.start, desc=stage, unit="step", disable=None,
                        dynamic_ncols=True)

    def tensors(self):
        found = {}
        for name, module in self.modules.items():
            found |= {f"{name}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
            found |= {f"{name}.{n}": b for n, b in module.named_buffers()}
        return found

    def settings(self):
        """What must not change between a run and its continuation."""
        changeable = {"resume", "out", "log_every", "save_every", "device"}
        return {k: v for k, v in vars(self.args).items() if k not in changeable | {"given"}}

    def restore(self):
        """Puts the checkpoint in place -> the lines of metrics.jsonl up to its step."""
        state = read_state(self.checkpoint)
        try:
            now, then = self.settings(), state["settings"]
            changed = [k for k in now if now[k] != then.get(k)]
            check(not changed, f"{self.out}: cannot resume with other settings ({', '.join(changed)} changed)")
            self.start, self.seconds = state["step"], state["seconds"]
            self.tokens, self.flops = state["tokens"], state["flops"]
            check(0 < self.start < self.args.steps, f"{self.checkpoint}: its step {self.start} is not of this run")
            self.fill(state)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: not a state of this run ({error!r})") from None
        try:
            lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
            return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.start]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.metrics}: not the log of this run ({error!r})") from None

    def fill(self, state):
        found, wanted = state["tensors"], self.tensors()
        wrong = [n for n, t in wanted.items() if n not in found or found[n].shape != t.shape]
        check(not wrong, f"{self.checkpoint}: missing or mis-shaped {', '.join(wrong)}")      # copy_ would broadcast
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.args.device.startswith("cuda") and state.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)

    def steps(self):
        return range(self.start, self.args.steps)

    def elapsed(self):
        return self.seconds + time.perf_counter() - self.began

    def end_step(self, step, values, tokens, flops):
        """Counts the step and what it took; at the chosen intervals logs `values()` and writes a checkpoint."""
        done, self.tokens, self.flops = step + 1, self.tokens + tokens, self.flops + flops
        self.bar.update()
        if done % self.args.log_every == 0 or done == self.args.steps or step == self.start:
            self.log(done, values())
        if done % self.args.save_every == 0 or done == self.args.steps:
            self.save(done)

    def log(self, done, values):
        row = {"step": done} | {k: float(torch.as_tensor(v).detach()) for k, v in values.items()}
        row["tok/s"] = (self.tokens - self.resumed) / (time.perf_counter() - self.began)
        row["seconds"] = round(self.elapsed(), 3)
        check(all(map(math.isfinite, row.values())), f"step {done}: not a finite number: {row}; lower --lr")
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.bar.set_postfix_str("  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "seconds")))

    def save(self, done):
        finite = all(t.isfinite().all() for t in self.tensors().values())       # a NaN must not reach a file
        check(finite, f"step {done}: the weights are no longer finite; lower --lr")
        if isinstance(self.args, Rl) and done % self.args.save_every == 0:      # a source after so many steps
            resa.save_adapter(self.modules["model"], self.out / f"checkpoint-{done}", resa.relative(self.args.target))
        if done < self.args.steps:      # dropout and noise are drawn from these two generators
            cuda = torch.cuda.get_rng_state(self.args.device) if self.args.device.startswith("cuda") else None
            write_state(self.checkpoint, {"step": done, "seconds": self.elapsed(), "settings": self.settings(),
                                          "tokens": self.tokens, "flops": self.flops,
                                          "tensors": self.tensors(), "optimizer": self.optimizer.state_dict(),
                                          "rng": torch.get_rng_state(), "cuda_rng": cuda})

    def finish(self, **summary):
        """The artifact is written: note what it took, drop the checkpoint."""
        self.bar.close()
        device = (f"cpu, threads: {torch.get_num_threads()}" if self.args.device == "cpu"
                  else torch.cuda.get_device_name(self.args.device))
        record = {"steps": self.args.steps, "tokens": self.tokens, "flops": self.flops,
                  "seconds": round(self.elapsed(), 2), "device": device} | summary
        with staged(self.out) as temporary:
            (temporary / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
        self.checkpoint.unlink(missing_ok=True)
        return record


def remove_adapters(out):
    """Removes OUT/checkpoint-STEP of an earlier run; a folder that holds anything but an adapter stays."""
    for path in out.glob("checkpoint-*"):
        if path.is_dir() and not path.is_symlink() and path.name.removeprefix("checkpoint-").isdecimal():
            files = list(path.iterdir())
            if {file.name for file in files} <= {"adapter_config.json", "adapter_model.safetensors"}:
                for file in files:
                    file.unlink()
                path.rmdir()


def rate_at(step, args, warmup=0):
    """Learning rate of a step: linear warm-up, then constant, a cosine to a tenth, or linear to 0 at the end."""
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "constant":
        return args.lr
    if args.schedule == "linear":
        return args.lr * min(1, (args.steps - step) / max(1, args.steps / 5))
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def descend(losses, parameters, optimizer, rate, clip):
    """One optimizer step on the mean of scalar losses, each differentiated as it comes -> that mean, gradient norm.

    losses  a list of functions, one a micro-batch: its graph is freed before the next one is built
    """
    total = 0.0
    for loss_of in losses:
        loss = loss_of() / len(losses)
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


# ----------------------------------------------------------------------------------------------------------
# --stage sae
# ----------------------------------------------------------------------------------------------------------

def run_sae(args):
    """Trains an SAE as stage I of arXiv 2506.09967; writes cfg.json and sae.safetensors.  Returns its metrics."""
    # 1. What cannot be meant is refused before anything is loaded.
    check((args.init == "scratch") != bool(args.sae_from), "--sae-from goes with --init finetune and --init pretrained")
    if args.init == "pretrained":
        refuse_idle(args, "optimizer lr warmup schedule aux_coef dead_after centre steps epochs shuffle resume",
                    "--init pretrained: nothing is trained")
    else:
        refuse_idle(args, "other_site", f"--init {args.init}: the SAE is trained at --site of --layer")
    if args.init != "scratch":
        refuse_idle(args, "latents k variant set centre", f"--init {args.init}: the SAE that is loaded decides")

    if args.dry_run:
        return dry_run("sae", args)

    # 2. Source model, data, autoencoder.
    data_file(args.data)            # fetched now, so that a failure shows before the model is loaded
    model, tokenizer = load_model(args.source, args.dtype, args.device), load_tokenizer(args.source)
    resa.site_module(model, args.layer, args.site)
    torch.manual_seed(args.seed)    # for variants that draw noise
    sae = make_sae(args, model.config.hidden_size).to(args.device)
    chunks, held = hold_out(load_chunks(args, tokenizer, model))                                 # (n,T) each
    count_steps(args, chunks)
    first = torch.cat([resa.activations(model, part, args.layer, args.site).float()
                       for part in micro(batch_at(0, chunks, args), args)])                      # (B,T,D)
    here = {"site": args.site, "layer": args.layer}
    sae.meta = here | sae.meta if args.init == "pretrained" else sae.meta | here      # it may come from --other-site
    sae.meta |= {"init": args.init, "sink_norm": sink_norm(first, sae, args)}
    if args.init == "scratch":      # Resa: the released code overwrites b_dec with a mean even when fine-tuning
        init_b_dec(sae, first[~resa.is_sink(first, sae.meta["sink_norm"])], args.centre)
    else:                           # config.json should say what the file decided
        args.variant, args.latents, args.k = sae.variant, sae.n_latents, getattr(sae, "k", 0)
    if args.init != "pretrained":   # that one never saw this model or these data
        sae.meta |= {"model": resa.relative(args.source), "data": resa.relative(args.data)}

    # 3. Steps.  Activations are made as they are needed, stopping the model at the hook.
    args.lr = args.lr or default_lr(args.optimizer, sae.n_latents)
    args.steps = 0 if args.init == "pretrained" else args.steps
    optimizer = make_optimizer(sae, args.optimizer, args.lr)
    per_token = sum(training_flops("sae", args, model, sae).values())
    run = Run("sae", args, {"sae": sae}, optimizer)
    for step in run.steps():
        picked = torch.tensor(picked_at(step, len(chunks), args))                                # (B,)
        xs = [harvest(model, sae, chunks, part, args) for part in micro(picked, args)]
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args, args.warmup)
        parts = train_step(sae, optimizer, xs, progress=step / args.steps)
        run.end_step(step, lambda: {"fvu": parts["fvu"], "l0": parts["l0"], "dead": sae.dead.float().mean()},
                     args.batch * args.seq_len, args.batch * args.seq_len * per_token)

    # 4. Finish, measure on text that was held out, save, then forget the checkpoint.
    with getattr(optimizer, "averaged", contextlib.nullcontext)():      # signum saves its running mean
        if args.steps:
            finish_sae(model, sae, chunks, args)
        measured = sae_metrics(model, sae, held.to(args.device), args)
        run.flops += held.numel() * sum(measuring_flops(args, model, sae).values())
        check(math.isfinite(measured["fvu"]), f"the SAE ends with FVU {measured['fvu']}; lower --lr")
        save_sae(sae, args.out)
    return run.finish(**measured)


def hold_out(chunks):
    """chunks (n,T) -> those to train on, and the last twentieth, at most 65,536 tokens, to measure on."""
    check(len(chunks) > 1, "the data makes one chunk, and one must be held out to measure on: lower --seq-len")
    count = max(1, min(len(chunks) // 20, 65536 // chunks.shape[1]))
    return chunks[:-count], chunks[-count:]


def sink_norm(x, sae, args):
    """The norm from which a token counts as an attention sink, from activations x (B,T,D); None: keep all tokens.

    Resa: the released code trains on sinks and splices them; --sink-norm 0 restores that.  So do the embedded models,
    which have none.
    """
    if args.init == "pretrained" and "sink_norm" in sae.meta:
        refuse_idle(args, "sink_norm", "--init pretrained: the SAE's file decides")
        return sae.meta["sink_norm"]
    embedded = args.source.startswith(str(resa.TINY))
    times = args.sink_norm if args.sink_norm is not None else 0 if embedded else 10
    if not times:
        return None
    limit = float(times * x[:, 1:].norm(dim=-1).median())
    out = resa.is_sink(x, limit)
    check(not out.all(), f"--sink-norm {times:g} leaves no token")
    print(f"attention sinks, left out of training and splicing: position 0 and norms above {limit:.3g}, {times:g} x "
          f"the median: {int(out.sum())} of {out.numel()} tokens of the first batch")
    return limit


def harvest(model, sae, chunks, picked, args):
    """The activations of chunks `picked` (B,) -> x (N,D) in fp32, gradients g (N,D) or None, places at (N,).

    Sinks are left out, of all three.  A place is the number of a token in the data, whatever the order of training.
    """
    ids = chunks[picked].to(args.device)                                                         # (B,T)
    take = gradients if sae.needs_gradient else lambda *site: (resa.activations(*site), None)
    x, g = take(model, ids, args.layer, args.site)                                               # (B,T,D)
    at = (picked[:, None] * ids.shape[1] + torch.arange(ids.shape[1])).to(args.device)           # (B,T)
    keep = ~resa.is_sink(x, sae.meta["sink_norm"])
    return x[keep].float(), None if g is None else g[keep].float(), at[keep]


def gradients(model, ids, layer, site):
    """ids (B,T) -> the activation x (B,T,D) and the gradient of next-token cross-entropy by it (B,T,D).

    In units of its mean norm: what it is weighed against should not depend on the length of the sequences.
    """
    caught = []

    def leaf(x):
        caught.append(x.detach().requires_grad_())
        return caught[0]
    with torch.enable_grad(), resa.hooked(model, layer, site, leaf):
        g, = torch.autograd.grad(cross_entropy(model, ids), caught)
    return caught[0].detach(), g / g.norm(dim=-1).mean().clamp_min(1e-30)


def finish_sae(model, sae, chunks, args):
    """What is done once, at the final weights: atoms of free length to norm 1, thresholds measured afresh."""
    if not sae.unit_rows:
        sae.fold_rows_()
    if isinstance(sae, Chosen) and not sae.per_token:
        picked = torch.tensor(order(len(chunks), args.seed)[:16 * (args.micro_batch or args.batch)])
        sae.calibrate(harvest(model, sae, chunks, part, args)[0] for part in micro(picked, args))


@torch.no_grad()
def sae_metrics(model, sae, ids, args):
    """What the SAE is worth on held-out chunks ids (n,T): to the activations (sae.Metrics) and to the model.

    ce, ce_sae, ce_zero, ce_mean  nats a token: as it is, with the SAE spliced in, with zeros or the mean instead
    kl                            nats a token, of the first two
    recovered_zero, _mean         share of the damage of zeros, of the mean, that the SAE undoes; absent without damage
    left_out                      share of tokens that were sinks
    """
    total, limit, first = Metrics(), sae.meta["sink_norm"], None
    for part in micro(ids, args):
        x = resa.activations(model, part, args.layer, args.site).float()                         # (B,T,D)
        x = x[~resa.is_sink(x, limit)]                                                           # (N,D)
        first = x[:4096] if first is None else first
        total.update(x, *sae.reconstruct(x))
    found = {k: v for k, v in total.result().items() if not isinstance(v, torch.Tensor)}
    found |= afa(sae, first) | {"left_out": 1 - total.n_tokens / ids.numel()}
    mean = (total.sum_x / total.n_tokens).float()
    inserted = {"sae": sae, "zero": resa.Ablation(torch.zeros_like(mean), sae), "mean": resa.Ablation(mean, sae)}
    found |= spliced_nats(model, inserted, ids, args)
    for name in ("zero", "mean"):
        if (damage := found[f"ce_{name}"] - found["ce"]) > 0:
            found[f"recovered_{name}"] = 1 - (found["ce_sae"] - found["ce"]) / damage
    return found


def spliced_nats(model, inserted, ids, args):
    """ids (n,T) -> {"ce", "ce_NAME" with each module of `inserted` at the site, "kl" of "sae"}, in nats a token."""
    nats = dict.fromkeys(["ce", *(f"ce_{name}" for name in inserted), "kl"], 0.0)
    for part in micro(ids, args):
        h, share = model.run(part), len(part) / len(ids)                                         # (B,T,D)
        nats["ce"] += share * float(-next_token_logprobs(model, h, part).mean())
        for name, module in inserted.items():
            with resa.splice(model, module, args.layer, args.site):
                spliced = model.run(part)
            nats[f"ce_{name}"] += share * float(-next_token_logprobs(model, spliced, part).mean())
            if name == "sae":
                nats["kl"] += share * float(resa.kl_loss(model, model, spliced, h))
    return nats


def describe_sae(m):
    """The metrics of sae_metrics, a line each for activations and model."""
    undone = [f"{m[f'recovered_{n}']:.1%} of {n} ablation" for n in ("zero", "mean") if f"recovered_{n}" in m]
    return (f"  held-out text   {m['n_tokens']:,} tokens; {m['left_out']:.1%} left out as sinks\n"
            f"  activations     FVU {m['fvu']:.4f}  L0 {m['l0']:.1f}  dead {m['dead']:.1%}  cosine {m['cosine']:.4f}\n"
            f"  cross-entropy   {m['ce']:.4f} nats, spliced {m['ce_sae']:.4f} (zeros {m['ce_zero']:.4f}, mean "
            f"{m['ce_mean']:.4f}), KL {m['kl']:.4f}\n"
            f"  loss recovered  {', '.join(undone) or 'no ablation does damage here'}\n"
            f"  code length     {m['length_ratio']:.3f} of the input's (1 if atoms were orthogonal)")


def make_sae(args, width):
    if args.init == "scratch":
        return build(args.variant, width, args.latents, **settings_of(args))
    sae = open_sae(args.sae_from)
    check(sae.d_in == width, f"{args.sae_from}: made for width {sae.d_in}, the model has {width}")
    if args.init == "pretrained":
        refuse_other_site(sae, args)
    else:      # Resa: starts from an SAE of MLP outputs and fine-tunes it on block outputs; a start may be anything
        sae.float().settle_()       # files may lack unit rows, which the projection of gradients counts on
        for name in sorted({"aux_coef", "dead_after"} & sae.hyper.keys()):      # of training, not of the file
            setattr(sae, name, getattr(args, name))
    return sae


def settings_of(args):
    """The settings of the variant, by flags and by --set."""
    check(args.variant in VARIANTS, f"--variant {args.variant}: there are {', '.join(VARIANTS)}; help describes them")
    has = VARIANTS[args.variant].defaults
    refuse_idle(args, " ".join({"k", "aux_coef"} - has.keys()), f"--variant {args.variant}")
    if args.variant == "itda":
        refuse_idle(args, "optimizer lr warmup schedule centre dead_after", "--variant itda: nothing is descended")
    given = {name: getattr(args, name) for name in ("k", "aux_coef", "dead_after", "seed") if name in has}
    for word in args.set:
        name, equals, value = word.partition("=")
        check(equals, f"--set {word}: NAME=VALUE was expected; --variant help lists the settings")
        try:
            given[name] = json.loads(value)
        except ValueError:      # a word
            given[name] = value
    return given


def list_variants():
    """--variant help."""
    for name, cls in VARIANTS.items():
        settings = "  ".join(f"{k}={v}" for k, v in cls.defaults.items() if k not in ("dead_after", "seed"))
        print(f"{name:15s} {cls.__doc__.splitlines()[0]}\n{'':15s} {settings}")


def open_sae(spec):
    """DIR_OR_HUB_ID[#HOOKPOINT] -> the SAE; sparsify puts layer and site into the name, not into cfg.json."""
    directory, _, hookpoint = spec.partition("#")
    sae = load_sae(directory, hookpoint or None)
    if match := re.search(r"layers\.(\d+)(\.mlp)?/?$", spec):
        sae.meta = {"layer": int(match[1]), "site": "mlp" if match[2] else "resid"} | sae.meta
    return sae


def refuse_other_site(sae, args):
    """An SAE used where it was not trained reconstructs nothing; the released `pretrained` arm did just that.

    Resa: --other-site restores it.
    """
    wrong = [name for name in ("site", "layer") if sae.meta.get(name, getattr(args, name)) != getattr(args, name)]
    if not wrong:
        refuse_idle(args, "other_site", "an SAE that was trained where it is used")
    for name in wrong:
        where = f"the SAE was trained at {name} {sae.meta[name]}, not at {getattr(args, name)}"
        hint = ", or --other-site" if hasattr(args, "other_site") else ""
        check(getattr(args, "other_site", False),
              f"{where}: pass --{name} {sae.meta[name]}, or train one there{hint}")
        print(f"--other-site: {where}, where it is used all the same")


# ----------------------------------------------------------------------------------------------------------
# --stage tune, --stage sft: the same loop, two losses
# ----------------------------------------------------------------------------------------------------------

def run_tune(args):
    """SAE-Tuning, stage II of arXiv 2506.09967; writes a PEFT adapter.  Returns the summary."""
    check_objective(args)
    if args.dry_run:
        return dry_run("tune", args)
    data_file(args.data)
    model = load_model(args.target, args.dtype, args.device)
    teacher = load_model(args.source, args.dtype, args.device) if args.teacher == "source" else None
    check(teacher is None or teacher.config.vocab_size == model.config.vocab_size,
          f"{args.source} and {args.target} have different vocabularies: their predictions cannot be compared")
    inserted = None
    if args.splice != "none":
        through = args.sae_grad == "on" or args.into != "student"
        resa.check_hook(model, args.layer, args.site, through)
        inserted = make_splice(args, model)
        cut = not through and args.site == "resid" and not args.match
        print(f"{args.splice} at {args.site} of block {args.layer}, into {args.into}; adapters of blocks "
              f"{args.layer + 1 if cut else 0} .. {len(model.model.layers) - 1} can learn")

    def loss(ids):
        return resa.tuning_loss(model, inserted, args.layer, ids, args.site, args.sae_grad == "on",
                                args.kl_reduction, teacher, args.into, args.match)
    name = "loss" if args.match else "kl"
    return lora_loop("tune", args, model, loss, name, getattr(inserted, "sae", inserted), teacher)


def check_objective(args):
    """ValueError for an objective in which some flag could not take effect, or nothing could be learned."""
    if args.teacher == "target":
        refuse_idle(args, "source into match", "--teacher target")
    if args.splice == "none":
        check(args.teacher == "source", "--splice none makes teacher and student the same model: nothing to learn; "
              "with --teacher source it is plain distillation")
        refuse_idle(args, "sae sae_grad into other_site" + ("" if args.match else " layer site"), "--splice none")
    if args.into != "student":
        refuse_idle(args, "sae_grad", f"--into {args.into}: gradient " + (
            "always passes the SAE" if args.into == "gradient" else "does not meet the SAE"))
    check(args.splice != "noise" or not args.match and args.into != "gradient",
          "--splice noise is drawn anew at each use: it cannot go with --match, nor with --into gradient")
    check(args.into != "nothing" or args.match, "--into nothing: the SAE is used by --match alone, which is 0")


def fitting_sae(args, model):
    """--sae, or what stage sae wrote, frozen, on the model's device.  ValueError: none there, or of another width."""
    path = args.sae or f"out/{args.preset}/sae"
    check(args.sae or Path(path).is_dir(), f"{path}: no SAE there yet; run --stage sae first, or name one with --sae")
    sae = open_sae(path).to(args.device).requires_grad_(False)
    check(sae.d_in == model.config.hidden_size,
          f"{path}: the SAE is {sae.d_in} wide, the model {model.config.hidden_size}")
    return sae


def make_splice(args, model):
    """What stands in for the activation: the SAE, or one of the two controls with its shape."""
    sae = fitting_sae(args, model).to(DTYPES[args.dtype])
    refuse_other_site(sae, args)
    if args.splice == "random":
        check(isinstance(sae, Chosen) and sae.per_token, f"--splice random: random, {sae.variant} has another L0")
        random = build(sae.variant, sae.d_in, sae.n_latents, **sae.hyper | {"seed": args.seed}).requires_grad_(False)
        random.b_dec.copy_(sae.b_dec)      # so that the dictionary alone is random: the centre and the scale stay
        random.meta = sae.meta
        if sae.normalize == "scale":
            random.input_scale.copy_(sae.input_scale)
        return random.to(args.device, DTYPES[args.dtype])
    return resa.MatchedNoise(sae) if args.splice == "noise" else sae


def run_sft(args):
    """The paper's baseline: cross-entropy on the packed text, every token, and nothing else changed."""
    if args.dry_run:
        return dry_run("sft", args)
    data_file(args.data)
    model = load_model(args.target, args.dtype, args.device)
    return lora_loop("sft", args, model, partial(cross_entropy, model), "ce")


def fresh_adapters(args, model):
    """Puts seeded adapters on the model, in training mode -> (their parameters, AdamW over them)."""
    torch.manual_seed(args.seed)
    resa.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    return learned, torch.optim.AdamW(learned, lr=args.lr, weight_decay=0.01)


def lora_loop(stage, args, model, loss_of, name, *inserted):
    """Trains fresh adapters on loss_of(ids (B,T)); the last step is the result, never a chosen one.

    inserted  what training_flops should know of an SAE and a teacher
    """
    chunks = load_chunks(args, load_tokenizer(args.target), model)
    count_steps(args, chunks)
    learned, optimizer = fresh_adapters(args, model)
    per_token = sum(training_flops(stage, args, model, *inserted).values())
    run = Run(stage, args, {"model": model}, optimizer)
    for step in run.steps():
        ids = batch_at(step, chunks, args)                                                       # (B,T)
        losses = [partial(loss_of, part) for part in micro(ids, args)]
        loss, norm = descend(losses, learned, optimizer, rate_at(step, args), args.clip)
        run.end_step(step, lambda: {name: loss, "norm": norm, "lr": rate_at(step, args)}, ids.numel(),
                     ids.numel() * per_token)
    resa.save_adapter(model, args.out, resa.relative(args.target))
    return run.finish()


def next_token_logprobs(model, h, ids, chunk=4096, temperature=1.0):
    """h (B,T,D) after the last block, ids (B,T) -> log p(ids[t+1] | ids[..t]), (B,T-1), fp32, p at `temperature`.

    Past one chunk the head is recomputed in the backward pass: (N,V) logits are the first thing not to fit.
    """
    def part(h, targets):
        return (model.head(h).float() / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    flat, targets = h[:, :-1].flatten(0, 1), ids[:, 1:].flatten()                                # (N,D), (N,)
    if len(flat) <= chunk:
        return part(flat, targets).view(len(ids), -1)
    pieces = [checkpoint(part, a, b, use_reentrant=False) for a, b in zip(flat.split(chunk), targets.split(chunk))]
    return torch.cat(pieces).view(len(ids), -1)


def cross_entropy(model, ids):
    """ids (B,T) -> nats per predicted token, a scalar."""
    return -next_token_logprobs(model, model.run(ids), ids).mean()


# ----------------------------------------------------------------------------------------------------------
# --stage rl
# ----------------------------------------------------------------------------------------------------------

def score(names, samples, gold):
    """Rewards of the G samples (number of tokens, text) of one question -> list of floats.

    accuracy (x2)  the graded answer;   format (x1)  exactly one end of thinking, on a line of its own;
    length (x1)    shorter is better among the right ones, never above 0 for a wrong one, 0 for all where all
                   are equally long (arXiv 2501.12599)
    """
    from eval import grade      # sideways on purpose: one grader decides what "right" means, here and in eval.py
    right = [grade(gold, text) for _, text in samples]
    counts = [n for n, _ in samples]
    span = max(counts) - min(counts)
    short = [0.5 - (n - min(counts)) / span if span else 0.0 for n in counts]
    kinds = {"accuracy": [2.0 * r for r in right],
             "format": [float(len(re.findall(r"\n</think>\n", text)) == 1) for _, text in samples],
             "length": [s if r else min(0.0, s) for s, r in zip(short, right)]}
    return [sum(kinds[name][i] for name in names) for i in range(len(samples))]


def rollout(model, tokenizer, rows, step, args):
    """Samples G answers to each question -> prompt and answer ids per sample, rewards (Q,G)."""
    prompts = [tokenizer.chat([{"role": "user", "content": row["problem"]}]) for row in rows]
    requests = [(tokenizer.encode(p), (args.seed, step, i, j))
                for i, p in enumerate(prompts) for j in range(args.group)]
    with resa.adapters_folded(model):
        done = collect(model, requests, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=1.0,
                       stop_ids=tokenizer.eos_ids, slots=len(requests))
    answers, rewards = [ids for ids, _ in done], []
    for q, row in enumerate(rows):
        group = answers[q * args.group:(q + 1) * args.group]
        texts = [resa.think_prefix(prompts[q]) + tokenizer.decode(ids) for ids in group]
        rewards.append(score(args.rewards, list(zip(map(len, group), texts)), row["answer"]))
    return [(p, a) for (p, _), a in zip(requests, answers)], torch.tensor(rewards, device=args.device)      # (Q,G)


def policy_loss(model, samples, advantages, beta, temperature=1.0):
    """GRPO's objective for one on-policy update (arXiv 2402.03300 eq. 3): mean over samples of mean over tokens.

    samples [(prompt ids, answer ids)], advantages (S,).  The policy is the model at the temperature that was
    sampled at, so that the ratio to the sampling policy is 1 in value: clipping never acts and is left out.
    """
    ids, lengths = right_pad([p + a for p, a in samples], device=advantages.device)              # (S,T)
    starts = torch.tensor([len(p) for p, _ in samples], device=ids.device)
    position = torch.arange(1, ids.shape[1], device=ids.device)                                  # of each target
    answer = (position >= starts[:, None]) & (position < lengths[:, None])                       # (S,T-1)
    logp = next_token_logprobs(model, model.run(ids), ids, temperature=temperature)
    gain = (logp - logp.detach()).exp() * advantages[:, None]
    if beta:
        with torch.no_grad(), resa.adapters_off(model):
            base = next_token_logprobs(model, model.run(ids), ids, temperature=temperature)
        delta = base - logp
        gain = gain - beta * (delta.exp() - delta - 1)           # k3: unbiased, never negative
    return -((gain * answer).sum(-1) / answer.sum(-1)).mean()


def rl_work(args, model, samples):
    """[(prompt ids, answer ids)] of a step -> tokens that were learned from, FLOPs of sampling and learning."""
    answers = sum(len(a) for _, a in samples)
    tokens = sum(len(p) for p, _ in samples) + answers
    seen = sum(len(p) for p, _ in samples[::args.group]) + answers      # a question is read once for its group
    T = tokens / len(samples)
    return tokens, (tokens * sum(training_flops("rl", args, model, T=T).values())
                    + seen * sum(sampling_flops(model, T).values()))


def run_rl(args):
    """GRPO with LoRA; writes a PEFT adapter.  Returns the summary."""
    unknown = set(args.rewards) - {"accuracy", "format", "length"}
    check(not unknown, f"--rewards {' '.join(sorted(unknown))}: there are accuracy, format, length")
    check(args.group > 1, "--group must be at least 2: an advantage is relative to the other samples")
    refuse_idle(args, "seq_len batch epochs template shuffle", "--stage rl")
    check(args.steps > 0, "--stage rl needs --steps")
    if args.dry_run:
        return dry_run("rl", args)
    rows, tokenizer = resa.read_problems(data_file(args.data)), load_tokenizer(args.target)
    check(args.questions <= len(rows), f"--questions {args.questions}: {args.data} has {len(rows)}")
    model = load_model(args.target, args.dtype, args.device)
    learned, optimizer = fresh_adapters(args, model)
    run = Run("rl", args, {"model": model}, optimizer)
    for step in run.steps():
        picked = order(len(rows), args.seed + step)[:args.questions]
        samples, rewards = rollout(model, tokenizer, [rows[i] for i in picked], step, args)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)       # (Q,G)
        part = args.micro_batch or len(samples)
        losses = [partial(policy_loss, model, samples[i:i + part], advantages.flatten()[i:i + part], args.beta,
                          args.temperature) for i in range(0, len(samples), part)]
        _, norm = descend(losses, learned, optimizer, rate_at(step, args, args.warmup), args.clip)
        run.end_step(step, lambda: {"reward": rewards.mean(), "norm": norm, "lr": rate_at(step, args, args.warmup),
                                    "length": sum(len(a) for _, a in samples) / len(samples)},
                     *rl_work(args, model, samples))
    resa.save_adapter(model, args.out, resa.relative(args.target))
    return run.finish()


# ----------------------------------------------------------------------------------------------------------
# --stage pretrain
# ----------------------------------------------------------------------------------------------------------

def unfreeze(model, pattern):
    """Lets the parameters learn in whose names `pattern` is found -> these parameters."""
    try:
        learned = [p.requires_grad_(True) for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"--only {pattern}: not a regular expression ({error})") from None
    check(learned, f"--only {pattern}: no parameter has a name like that")
    return learned


def run_pretrain(args):
    """Next-token cross-entropy on packed text, all weights; writes a model directory.  Returns the summary."""
    check(args.model, "--stage pretrain needs --model, for example random:data/tiny/init/config.json")
    check(args.dtype == "float32", "--stage pretrain needs --dtype float32: in bfloat16 most updates round to nothing")
    if args.dry_run:
        return dry_run("pretrain", args)
    data_file(args.data)
    model = load_model(args.model, args.dtype, args.device).train()
    learned = unfreeze(model, args.only)
    chunks = load_chunks(args, load_tokenizer(args.model), model)
    count_steps(args, chunks)
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    per_token = sum(training_flops("pretrain", args, model).values())
    run = Run("pretrain", args, {"model": model}, optimizer)
    for step in run.steps():
        ids = batch_at(step, chunks, args)                                                       # (B,T)
        losses = [partial(cross_entropy, model, part) for part in micro(ids, args)]
        loss, norm = descend(losses, learned, optimizer, rate_at(step, args, args.warmup), 1.0)
        run.end_step(step, lambda: {"loss": loss, "norm": norm, "lr": rate_at(step, args, args.warmup)}, ids.numel(),
                     ids.numel() * per_token)
    save_model(model, run.out / "model")
    return run.finish()


# ----------------------------------------------------------------------------------------------------------
# What a run takes: FLOPs, and by --dry-run memory, time and money
# ----------------------------------------------------------------------------------------------------------

# Peak TFLOP/s in bf16 (dense) and in fp32, GB, GB/s: the vendors' data sheets.  Dollars an hour are assumptions; the
# paper has $1.  cpu: two cores at 3 GHz with 32 operations a cycle.
GPUS = {"l40s": (362, 91.6, 48, 864, 1.0), "rtx6000ada": (364, 91.1, 48, 960, 1.0), "a100": (312, 19.5, 80, 2039, 1.8),
        "h100": (989, 67, 80, 3350, 3.0), "h200": (989, 67, 141, 4800, 3.5), "cpu": (0.19, 0.19, 8, 40, 0.05)}
UTILISATION = 0.4      # share of the peak that is reached: an assumption
# Chunks of 2,048 tokens that the published text of these sets makes: twice the steps of arXiv 2506.09967's epochs.
CHUNKS = {"still": 2 * 1448, "deepscaler": 2 * 1914, "open_s1": 2 * 1063}


def block_flops(model, T, start=0, stop=None, passes=1, lora=0, back=0):
    """FLOPs a token of blocks start .. stop-1 in so many passes forward, with and without LoRA, and backward.

    A product with n weights takes 2 n.  Backward it takes as much for the gradient of its input, and again for that
    of the weights if they are trained.  Attention takes 2 T D_attn, the causal half of 4 T D_attn, and 2.5 times
    that backward, where the scores are made again.  Norms, activations and softmax are left out.
    """
    config, n = model.config, Counter()
    for block in model.model.layers[start:stop]:
        for name, p in block.named_parameters():
            used = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            if "lora_" in name:
                n["LoRA"] += 2 * p.numel() * (lora + 2 * back)
            elif p.dim() > 1:
                n["blocks"] += 2 * p.numel() * used * (passes + back * (1 + p.requires_grad))
        n["attention"] += 2 * T * config.num_attention_heads * config.head_dim * (passes + 2.5 * back)
    return n


def shared_blocks(stage, args, sae, teacher):
    """How many blocks teacher and student share, as tuning_loss does it: those keep nothing and learn nothing."""
    shares = stage == "tune" and sae and args.sae_grad == "off" and args.site == "resid" and not teacher
    return args.layer + 1 if shares else 0


def training_flops(stage, args, model, sae=None, teacher=None, T=0):
    """FLOPs a token of training, {part: FLOPs}.  T: tokens in a row, if not seq_len.

    sae       blocks to the hook; the encoder, 2 D F; decoder and backward pass read the active latents alone, five
              times 2 D k (all latents, where the variant is dense).  Without what AuxK and the gradient of gsae add
    tune      blocks to the hook once, those above as teacher, student and backward; where they share none, all of them;
              --match has both activations go through the SAE
    pretrain  as if all learned, whatever --only says
    the head, 2 D V: student, teacher and gradient in tune; forward, backward, and past 4,096 tokens again in the others
    """
    D, T = model.config.hidden_size, T or args.seq_len
    head, (F, k) = 2 * D * model.config.vocab_size, size_of(sae) if sae else (0, 0)
    if stage == "sae":
        return block_flops(model, T, 0, args.layer + 1) + Counter({"SAE": 2 * D * F, "SAE sparse": 10 * D * k})
    if stage == "tune":
        shared, passes = shared_blocks(stage, args, sae, teacher), (args.into != "nothing") + 2 * (args.match > 0)
        grad = args.sae_grad == "on" or args.into == "gradient" or args.match > 0
        n = block_flops(model, T, 0, shared) + block_flops(teacher or model, T, shared)
        n += block_flops(model, T, shared, lora=1, back=1)
        return n + Counter({"head": 3 * head, "SAE": passes * 2 * D * F, "SAE sparse": (2 * passes + 4 * grad) * D * k})
    whole = args.micro_batch or (args.questions * args.group if stage == "rl" else args.batch)
    again = whole * T > 4096                                       # next_token_logprobs
    n = block_flops(model, T, lora=1, back=1) + Counter({"head": (2 + (stage == "pretrain") + again) * head})
    if stage == "rl" and args.beta:
        n += block_flops(model, T) + Counter({"head": head})
    return n


def sampling_flops(model, T):
    """FLOPs a token that is sampled, in a row of T."""
    return block_flops(model, T) + Counter({"head": 2 * model.config.hidden_size * model.config.vocab_size})


def measuring_flops(args, model, sae):
    """FLOPs a held-out token of sae_metrics: four whole passes, seven heads, the SAE twice."""
    D, (F, k) = model.config.hidden_size, size_of(sae)
    return (block_flops(model, args.seq_len, 0, args.layer + 1) + block_flops(model, args.seq_len, passes=4)
            + Counter({"head": 14 * D * model.config.vocab_size, "SAE": 4 * D * F, "SAE sparse": 4 * D * k}))


def size_of(sae):
    """(latents, those that decoding reads)."""
    return sae.n_latents, getattr(sae, "k", sae.n_latents) if isinstance(sae, Chosen) else sae.n_latents


def times(n, parts):
    return Counter({part: n * value for part, value in parts.items()})


def outline(spec, args):
    """A spec's model on the meta device: shapes without weights, from a local config.json or resa.SHAPES."""
    base, name = split_spec(spec)[0], re.split("[@#]", split_spec(spec)[0])[0]
    local = base.startswith("random:") or Path(base).is_dir() or Path(name).is_dir()
    check(local or name in resa.SHAPES, f"{name}: no local directory, and its shapes are not noted; --dry-run asks no "
          f"hub, it knows {', '.join(resa.SHAPES)}")
    with torch.device("meta"):
        model = Transformer(Config.from_pretrained(base) if local else Config(**resa.SHAPES[name]))
    return model.to(DTYPES[args.dtype])


def outline_sae(stage, args, width):
    """The SAE of a run on the meta device: by its own cfg.json where that is here, else by the preset's settings."""
    if stage == "tune":
        spec = args.sae = args.sae or f"out/{args.preset}/sae"
        args = resa.parse_flags(Sae, ["--preset", args.preset], "train.py")
    else:
        spec = args.sae_from
    path = Path(*spec.split("#")) / "cfg.json"
    if spec and path.is_file():
        found = read_json(path)
        args.variant, args.latents, args.k = (found.get(key, own) for key, own in (
            ("variant", "topk"), ("num_latents", args.latents), ("k", args.k)))
    hyper = resolve_hyper(args.variant, width, args.latents, settings_of(args))
    if stage == "sae":
        args.lr = args.lr or default_lr(args.optimizer, args.latents)
    with torch.device("meta"):
        sae = VARIANTS[args.variant](width, args.latents, hyper)
    return sae.requires_grad_(stage == "sae" and args.init != "pretrained")


def outline_data(stage, args, spec):
    """-> chunks (n,T) on the meta device or None, tokens of a prompt (rl), what is known in words.

    Counted where data and tokenizer are here and small, else the published number, else not said.
    """
    from data.prepare import CACHE, TRAINING
    named, base = args.data in TRAINING and not Path(args.data).exists(), split_spec(spec)[0]
    path = CACHE / f"{args.data}.jsonl" if named else Path(data_file(args.data))
    if path.exists() and path.stat().st_size < 2**24 and (base.startswith("random:") or Path(base).is_dir()):
        tokenizer = load_tokenizer(base)
        if stage != "rl":
            chunks = pack(read_rows(path), tokenizer, args.template, args.seq_len).to("meta")
            return chunks, 0, f"{chunks.numel():,} tokens in {len(chunks):,} chunks, counted"
        rows = resa.read_problems(path)
        check(args.questions <= len(rows), f"--questions {args.questions}: {args.data} has {len(rows)}")
        asked = [tokenizer.chat([{"role": "user", "content": row["problem"]}]) for row in rows[:200]]
        prompt = round(sum(len(tokenizer.encode(text)) for text in asked) / len(asked))
        return None, prompt, f"{len(rows):,} questions of about {prompt} tokens"
    if stage == "rl":
        return None, 0, "how long its prompts are is not known here, they are left out"
    if args.data not in CHUNKS or args.template != "resa":
        return None, 0, "how many tokens it makes is not known here"
    chunks = torch.empty(CHUNKS[args.data] * 2048 // args.seq_len, args.seq_len, device="meta")
    return chunks, 0, f"{chunks.numel():,} tokens in {len(chunks):,} chunks, as published (arXiv 2506.09967)"


def kept_bytes(model):
    """Bytes a token that one block keeps for its backward pass: counted on the meta device, in training mode.

    In a row of one token, because fused attention keeps no scores.  0 for experts, whose loads are not known.
    """
    if model.config.num_experts:
        return 0
    block, kept = model.model.layers[-1].train(), {}
    x = torch.empty(1, 1, model.config.hidden_size, dtype=model.lm_head.weight.dtype, device="meta", requires_grad=True)

    def note(t):
        kept[t.untyped_storage()._cdata] = t      # holding it keeps its address from being given out again
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x, rope_table(model.config, torch.zeros(1, 1, device="meta")), None, None, 0)
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def trained(*modules):
    return sum(p.numel() for module in modules if module for p in module.parameters() if p.requires_grad)


def memory(stage, args, model, sae, teacher, T):
    """{what: bytes}: weights, what is trained, and what a micro-batch keeps until its backward pass."""
    c, size, learned = model.config, DTYPES[args.dtype].itemsize, trained(model, sae)
    whole = args.questions * args.group if stage == "rl" else args.batch
    tokens, rows = (args.micro_batch or whole) * T, whole * T
    weights = sum(p.numel() for m in (model, teacher) if m for n, p in m.named_parameters() if "lora_" not in n)
    # Beside the trained: the gradient and two of the optimizer's; of signum one, and one at the end for its mean.
    parts = {"model": size * weights, "gradient and optimizer": 12 * learned}
    if stage == "sae":
        return parts | {"SAE": 4 * sum(p.numel() for p in sae.parameters()), "activations": 4 * rows * c.hidden_size,
                        "pre-activations": 4 * min(tokens * sae.n_latents, CHUNK)}
    blocks = c.num_hidden_layers - shared_blocks(stage, args, sae, teacher)
    cached = 2 * rows * c.num_key_value_heads * c.head_dim * c.num_hidden_layers
    return parts | {"adapters": 4 * learned * (stage != "pretrain"),
                    "SAE": size * sum(p.numel() for p in sae.parameters()) if sae else 0,
                    "kept for the backward pass": tokens * blocks * kept_bytes(model),
                    "logits": 16 * min(tokens, 256 if stage == "tune" else 4096) * c.vocab_size,
                    "keys and values": size * cached * (stage == "rl")}


def budget(stage, args, model, sae, teacher, chunks, prompt):
    """Fills in --steps -> tokens of a row, of a step, held out, {part: FLOPs of the run}."""
    if stage == "rl":      # every sample as long as it may be
        T, samples = prompt + args.max_new_tokens, args.questions * args.group
        seen = args.questions * prompt + samples * args.max_new_tokens
        per_step = times(samples * T, training_flops(stage, args, model, T=T)) + times(seen, sampling_flops(model, T))
        return T, samples * T, 0, times(args.steps, per_step)
    tokens, held = args.batch * args.seq_len, 0
    if chunks is not None:
        kept, out = hold_out(chunks) if stage == "sae" else (chunks, chunks[:0])
        held = out.numel()
        count_steps(args, kept)
    args.steps = 0 if getattr(args, "init", "") == "pretrained" else args.steps or 1
    work = times(args.steps * tokens, training_flops(stage, args, model, sae, teacher))
    return args.seq_len, tokens, held, work + (times(held, measuring_flops(args, model, sae)) if held else Counter())


def seconds_of(stage, args, work, weights, gpu):
    """{part: FLOPs} -> seconds.  Adapters, and an SAE in training, compute in fp32 whatever --dtype says."""
    half, single, _, bandwidth, _ = GPUS[gpu]
    exact = {"LoRA"} | ({"SAE", "SAE sparse"} if stage == "sae" else set())
    seconds = sum(n / (single if part in exact or args.dtype == "float32" else half) for part, n in work.items())
    reading = args.steps * args.max_new_tokens * weights / (bandwidth * 1e9) if stage == "rl" else 0
    return seconds / (UTILISATION * 1e12) + reading      # each token of all samples together reads all weights


def outlines(stage, args, spec):
    """-> model, SAE or None, teacher or None: on the meta device, what is trained with requires_grad."""
    model, sae, teacher = outline(spec, args).requires_grad_(False), None, None
    if stage == "pretrain":
        unfreeze(model, args.only)
    if stage == "sae" or stage == "tune" and args.splice != "none":
        sae = outline_sae(stage, args, model.config.hidden_size)
        through = stage == "sae" or args.sae_grad == "on" or args.into != "student"
        resa.check_hook(model, args.layer, args.site, through)
    if stage == "tune" and args.teacher == "source":
        teacher = outline(args.source, args)
    if stage in ("tune", "sft", "rl"):
        resa.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout)
    return model, sae, teacher


def dry_run(stage, args):
    """Prints what a run would take, from shapes alone -> (seconds, dollars), None if the steps are not known."""
    spec = getattr(args, {"sae": "source", "pretrain": "model"}.get(stage, "target"))
    gpu, (model, sae, teacher) = args.gpu or ("cpu" if args.device == "cpu" else "l40s"), outlines(stage, args, spec)
    chunks, prompt, data = outline_data(stage, args, spec)
    known = args.steps or chunks is not None
    T, tokens, held, work = budget(stage, args, model, sae, teacher, chunks, prompt)
    parts = memory(stage, args, model, sae, teacher, T)
    seconds, (half, single, room, _, price) = seconds_of(stage, args, work, parts["model"], gpu), GPUS[gpu]
    price, assumed = (price, ", an assumption") if args.dollars_per_hour is None else (args.dollars_per_hour, "")
    settings = {f.name: getattr(args, f.name) for f in fields(args)
                if f.name not in ("preset", "resume", "dry_run", "gpu", "dollars_per_hour")}
    fits = "fits" if sum(parts.values()) < 0.9e9 * room else "does not fit"
    print(f"--stage {stage} --preset {args.preset}: nothing is downloaded, loaded or written")
    for name, text in {
            "settings": "  ".join(f"{name}={resa.relative(value)}" for name, value in settings.items()),
            "model": f"{sum(p.numel() for n, p in model.named_parameters() if 'lora_' not in n):,} parameters",
            "trained": f"{trained(model, sae):,} parameters",
            "data": f"{resa.relative(args.data)}: {data}",
            "steps": f"{args.steps:,} of {tokens:,} tokens: {args.steps * tokens:,}" + " at most" * (stage == "rl")
                     + f", and {held:,} held out to measure on" * bool(held)
                     + ".  What follows is of one step; --steps would say how many" * (not known),
            "memory": ", ".join(f"{part} {n / 1e9:.3g}" for part, n in parts.items() if n)
                      + f": {sum(parts.values()) / 1e9:.3g} GB of {room}, {fits}, with a tenth left to the system"
                      + "; without what experts keep" * bool(model.config.num_experts),
            "FLOPs": ", ".join(f"{part} {n:.3g}" for part, n in work.items() if n) + f": {sum(work.values()):.3g}",
            "time": f"{duration(seconds)} on one {gpu} at {UTILISATION:.0%}, an assumption, of its {half} TFLOP/s in "
                    f"bf16 and {single} in fp32",
            "cost": f"${seconds / 3600 * price:.2f} at ${price:.2f} an hour{assumed}"}.items():
        print(textwrap.fill(f"  {name:9s} {text}", 120, subsequent_indent=" " * 12, break_on_hyphens=False))
    return (seconds, seconds / 3600 * price) if known else None


def duration(seconds):
    minutes = seconds / 60
    return f"{seconds:.3g} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------

def choose_device(args):
    """Fills in --device, and checks that it is there unless this is a --dry-run."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(re.fullmatch(r"cpu|cuda(:\d+)?", args.device), f"--device {args.device}: it can be cpu, cuda or cuda:N")
    if getattr(args, "dry_run", False):
        return
    check(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU is visible here")
    check(args.device in ("cpu", "cuda") or int(args.device[5:]) < torch.cuda.device_count(),
          f"--device {args.device}: there are {torch.cuda.device_count()} GPUs here")


def prepare(stage, argv):
    """argv without --stage -> the stage's settings, with the defaults that depend on other settings filled in."""
    args = resa.parse_flags(STAGES[stage], argv, f"train.py --stage {stage}", others=STAGES)
    args.out = args.out or f"out/{args.preset}/{FOLDER.get(stage, stage)}"
    choose_device(args)
    check_numbers(args)
    if args.dry_run:
        refuse_idle(args, "resume", "--dry-run")
    else:
        refuse_idle(args, "gpu dollars_per_hour", "a real run, only with --dry-run")
    return args


def dry_run_preset(argv):
    """--dry-run without --stage: every stage of the preset, and their sum."""
    preset = resa.parse_flags(Common, argv, "train.py", others=STAGES).preset
    stages = ["rl"] if "rl" in resa.PRESETS[preset] else ["sae", "tune"]
    found = [RUN[stage](prepare(stage, argv)) for stage in stages]
    if None not in found:
        seconds, dollars = map(sum, zip(*found))
        print(f"in all: {duration(seconds)}, ${dollars:.2f}")


RUN = {"sae": run_sae, "tune": run_tune, "sft": run_sft, "rl": run_rl, "pretrain": run_pretrain}


def main(argv):
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--stage=") else [word])]
    stage = argv[argv.index("--stage") + 1] if "--stage" in argv[:-1] else None
    if stage not in STAGES:
        if "-h" in argv or "--help" in argv:
            return print(__doc__)
        if stage is None and "--dry-run" in argv:
            return dry_run_preset(argv)
        found = f"; {stage!r} is none of them" if stage else ""
        raise ValueError(f"train.py needs --stage, one of {', '.join(STAGES)}{found}")
    at = argv.index("--stage")
    args = prepare(stage, argv[:at] + argv[at + 2:])
    if stage == "sae" and args.variant == "help":
        return list_variants()
    summary = RUN[stage](args)
    if args.dry_run:
        return
    print("{}: {steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs, {seconds:.1f} s on {device}".format(
        args.out, **summary))
    if stage == "sae":
        print(describe_sae(summary))


if __name__ == "__main__":
    resa.front_door(main)
