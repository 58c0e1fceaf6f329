"""SAE-Tuning: train a sparse autoencoder on a reasoning model, tune another model through it, take it out.

    python resa.py                      the whole experiment on the embedded model, every arm, with intervals
    python resa.py --quick              the same, small (under a minute)
    python resa.py experiments          every experiment of the paper, with seeds and controls: one report
    python resa.py features             reasoning features by the published rule, and what single latents do
    python resa.py compare | recover    every SAE variant beside the others
    python resa.py errors               what SAEs miss: the part of their error that is linear in x, and the rest
    python resa.py experts              which experts of a mixture a behaviour uses, and what it is without them
    python resa.py cost                 what SAE-Tuning took beside RL: seconds, tokens, FLOPs
    python resa.py view                 an answer token by token under the SAE's features: a page to look at
    python resa.py report               results of `experiments` as a page with charts, and as Markdown
    python resa.py merge --model BASE+ADAPTER --out DIR      an adapter folded into its base
    python resa.py convert --sae DIR --out DIR               an SAE from one file layout to another

The method is Resa (arXiv 2506.09967).  Stage I: a TopK SAE learns the activations of block `layer` of a
*source* model (sae.py).  Stage II: the frozen SAE replaces that activation inside a *target* model, and
LoRA adapters learn to bring the spliced model's predictions y~ back to the model's own y:

    argmin over LoRA of  KL( y || y~ ),     y = target alone,  y~ = target + LoRA, SAE(x) for x        (eq. 8)

At test time the SAE is removed and the adapters stay.  This file holds stage II: `add_lora`, `splice`,
`tuning_loss`, and the table of arms that says whether any of it mattered.

To read the method, read three sections: LoRA, Splice, The tuning objective.  What comes after them are the commands
above, a section each, which need no other to be understood.

Letters in shape comments: B batch rows, T tokens, D width, V vocabulary, N = B*T tokens, F latents, S seeds; in the
section on experts P prompts, L layers with experts, E experts, K experts a token.
"""

import argparse
import contextlib
import difflib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import types
import typing
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from model import (
    Config, at_least_fp32, check_adapter, collect, load_model, load_tokenizer, read_adapter, read_json, right_pad,
    save_model, staged)
from sae import (VARIANTS, build, column, dense, init_b_dec, load_sae,
                 make_optimizer, metrics, save_sae, train_step)
from tests.claims.errors import decompose_error, fit_floor, linear_r2, pursue, same_tokens

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------
# Command line: a dataclass is the parser
# ----------------------------------------------------------------------------------------------------------

# Bundles of defaults, by --preset; each command takes the fields it has, and those under its own name.
TINY = HERE / "data" / "tiny"
PRESETS = {
    "tiny": dict(source=f"{TINY}/distill+{TINY}/rl", target=f"{TINY}/distill", data=f"{TINY}/train.jsonl",
                 bench="tiny", template="chat", layer=1, latents=1024, k=16, seq_len=256, dtype="float32",
                 max_new_tokens=96, errors=dict(held=f"{TINY}/test.jsonl"),
                 sae=dict(batch=8, lr=5e-3, schedule="linear"),
                 experts=dict(model=f"{HERE}/data/tiny-moe", data=f"{TINY}/train.jsonl", held=f"{TINY}/test.jsonl",
                              behaviour=r"^\s*</think>\s*[^\s\d]")),      # no thought, and then no number
}

# The models that the presets name, in the words of config.json: --dry-run downloads nothing.
QWEN_1_5B = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2)
R1_DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SHAPES = {R1_DISTILL: QWEN_1_5B,
          "Qwen/Qwen2.5-1.5B": QWEN_1_5B | {"tie_word_embeddings": True},
          "Qwen/Qwen2.5-Math-1.5B": QWEN_1_5B | {"tie_word_embeddings": True}}
TINA = {"still": f"{R1_DISTILL}+Tina-Yi/R1-Distill-Qwen-1.5B-STILL#checkpoint-2000",
        "deepscaler": f"{R1_DISTILL}+Tina-Yi/R1-Distill-Qwen-1.5B-DeepScaleR#checkpoint-1000"}
REAL = dict(target=R1_DISTILL, bench="aime24,aime25,amc23,math500,minerva,gpqa", dtype="bfloat16", device="cuda")


def published(source, init, trigger, elicitation):
    """A row of arXiv 2506.09967, Table 1: the SAE learns on `trigger`, the adapter on `elicitation`.

    Settings are those of Table 7, with the released code's values where the two differ; its two GPUs took a batch
    each, here one process takes both.  Pretrained is the site-mismatched arm, an SAE of MLP outputs on block outputs.
    """
    other = {"other_site": init == "pretrained"}
    start = "" if init == "scratch" else "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k#layers.12.mlp"
    return REAL | dict(
        source=source, data=elicitation, template="resa", layer=12, seq_len=2048, shuffle=False,
        sae=dict(data=trigger, init=init, sae_from=start, latents=65536, k=32, batch=32, micro_batch=1,
                 optimizer="signum", aux_coef=0.0, dead_after=10_000_000) | other,
        tune=dict(batch=2, epochs=2, lr=1e-6, kl_reduction="sequence") | other,
        sft=dict(batch=32, micro_batch=1, epochs=3, lr=1e-5))


def tina(data, steps, rewards):
    """GRPO as in Tina's released code, what made the sources of arXiv 2506.09967.

    Not expressed here: a limit of 512 tokens on the prompt, a system prompt and chat template of their own, and that
    `steps` is the length of the schedule, halfway through which the published runs were stopped.
    """
    return REAL | dict(data=data, rl=dict(
        steps=steps, warmup=steps // 10, schedule="cosine", lr=1e-6, questions=8, group=4, micro_batch=1,
        temperature=0.7, max_new_tokens=3584, beta=0.04, rewards=rewards))


PRESETS |= {
    "resa-still-v1": published(TINA["still"], "finetune", "still", "still"),
    "resa-still-v2": published(R1_DISTILL, "pretrained", "still", "still"),      # the source only measures the SAE
    "resa-still-v3": published(TINA["still"], "scratch", "still", "still"),
    "resa-still-v4": published(R1_DISTILL, "finetune", "still", "still"),
    "resa-still-v5": published(R1_DISTILL, "scratch", "still", "still"),
    "resa-deepscaler-v1": published(TINA["deepscaler"], "finetune", "deepscaler", "deepscaler"),
    "resa-deepscaler-v2": published(TINA["deepscaler"], "scratch", "deepscaler", "deepscaler"),
    "resa-deepscaler-v3": published(R1_DISTILL, "scratch", "deepscaler", "deepscaler"),
    "resa-deepscaler-v4": published(TINA["still"], "finetune", "still", "deepscaler"),
    "tina-still": tina("still", 7500, ["accuracy", "length"]),
    "tina-deepscaler": tina("deepscaler", 11000, ["accuracy", "format"]),
}


@lru_cache                                                         # Python parses the whole file for each of them
def remarks(cls):
    """{field: the comment behind it}: the remark a reader sees in the source is what --help prints."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): [^#]*#\s*(.+)", line):
                found[match[1]] = match[2]
    return found


def make_parser(cls, prog):
    """An argparse parser with one --flag per field of a dataclass, typed by its annotation."""
    parser = argparse.ArgumentParser(prog=prog, description=inspect.cleandoc(cls.__doc__ or ""), allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="JSON file of flags; flags given here override it")
    hints, notes = typing.get_type_hints(cls), remarks(cls)
    for f in fields(cls):
        flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        default = f.default if f.default is not MISSING else " ".join(map(str, f.default_factory()))
        shown = f" (default: {default})" if default not in (None, "", (), False) else ""
        options = {"help": f"{notes.get(f.name, '')}{shown}".replace("%", "%%")}
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:      # X | None
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "X"}
        elif typing.get_origin(kind) is Literal:
            options |= {"choices": typing.get_args(kind), "type": type(typing.get_args(kind)[0])}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(flag, **options)
    return parser


def parse_flags(cls, argv, prog, others=()):
    """argv -> an instance of dataclass `cls`: defaults < preset < --config FILE.json < flags.

    .given holds the names set by file or flag, so that a command can refuse what cannot take effect.
    ValueError: an unknown flag (with the nearest one, or the stage among `others` it belongs to), a bad value.
    """
    parser = make_parser(cls, prog)
    given, unknown = parse_known(parser, argv, prog)
    given = vars(given)
    names = [f.name for f in fields(cls)]
    for flag in unknown:
        refuse_flag(flag, names, prog, others)
    config = read_json(given.pop("config")) if "config" in given else {}
    config = {name.replace("-", "_"): value for name, value in config.items()}
    for name in config:
        if name not in names:
            refuse_flag("--" + name.replace("_", "-"), names, prog, others)
    from_file = {}
    for name, value in config.items():                             # through argparse, so it is checked alike
        found, odd = parse_known(parser, to_argv({name: value}), prog)
        if odd:
            raise ValueError(f"{prog}: --{name.replace('_', '-')} in --config cannot be {json.dumps(value)}")
        from_file |= vars(found)
    given = from_file | given
    preset = given.get("preset", next((f.default for f in fields(cls) if f.name == "preset"), None))
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"{prog}: no preset {preset!r}; there are {', '.join(PRESETS)}")
    bundle = PRESETS.get(preset, {})
    common = {k: v for k, v in bundle.items() if not isinstance(v, dict)}      # the section "sae" is not tune's --sae
    bundle = {k: v for k, v in (common | bundle.get(cls.__name__.lower(), {})).items() if k in names}
    args = cls(**(bundle | given))
    args.given = set(given)
    return args


def parse_known(parser, argv, prog):
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{prog}: {error}") from None


def to_argv(config):
    """{"lr": 0.1, "shuffle": false, "model": ["a", "b"]} -> ["--lr", "0.1", "--no-shuffle", "--model", "a", "b"]."""
    argv = []
    for name, value in config.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            argv += [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
    return argv


def refuse_flag(flag, names, prog, others):
    known = ["--" + n.replace("_", "-") for n in names]
    name = flag.split("=")[0]
    if not flag.startswith("--"):
        raise ValueError(f"{prog}: {flag!r} is not a flag; flags begin with --")
    for stage, cls in dict(others).items() if name.replace("_", "-") not in known else ():
        if name[2:].replace("-", "_") in {f.name for f in fields(cls)}:
            raise ValueError(f"{prog}: {name} belongs to --stage {stage}; it would have no effect here")
    near = difflib.get_close_matches(name, known, 1)
    raise ValueError(f"{prog}: no flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))


def at_least(args, **lowest):
    """ValueError if a setting is below its lowest value, infinite or not a number."""
    for name, low in lowest.items():
        value = getattr(args, name)
        if not low <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, and finite; it is {value}")


def front_door(main):
    """Runs main(argv).  A user's mistake becomes one line and exit code 2; RESA_TRACEBACK=1 shows where it arose."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()                                         # a closed pipe shows here, not at exit
    except (ValueError, OSError, SafetensorError) as error:        # the last: a full disk
        if os.environ.get("RESA_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):                     # `| head` closed the pipe: nothing to report
            os._exit(0)
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; train.py continues with --resume, eval.py by itself", file=sys.stderr)
        sys.exit(130)


def open_run(directory, args):
    """Creates a run directory and writes what would be needed to run it again."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    record = {"settings": {f.name: getattr(args, f.name) for f in fields(args)},
              "argv": sys.argv, "git": commit or None,
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "machine": {"cpu": platform.machine(), "cores": os.cpu_count(),
                          "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}}
    with staged(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def relative(spec):
    """A spec or path without this checkout's own directory: what goes into artifacts should make sense elsewhere."""
    return str(spec).replace(f"{HERE}/", "")


def think_prefix(prompt):
    """"<think>" where a chat template ends a prompt in it: the completion alone would not show it was opened."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def read_jsonl(path):
    """Yields (line number, object) of a JSONL file, blank lines left out; ValueError names file and line.

    A file that begins with [ is read as one JSON list, whose objects are counted instead of lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    whole = text.lstrip().startswith("[")
    for number, line in enumerate([text] if whole else text.split("\n"), start=1):      # splitlines() cuts at U+2028
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        for number, row in enumerate(found if whole else [found], start=number):
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a JSON object was expected")
            yield number, row


def read_problems(path):
    """JSONL or JSON with "problem" (or "question"), "answer" and maybe "id" -> list of dicts, those keys all set.

    ValueError names the file and line of the first bad row: path:17: no "answer" field.
    """
    rows, ids = [], set()
    for number, row in read_jsonl(path):
        row.setdefault("problem", row.get("question"))
        for name in ("problem", "answer"):
            if isinstance(row.get(name), bool) or not isinstance(row.get(name), (str, int, float)) or row[name] == "":
                raise ValueError(f'{path}:{number}: no "{name}" field')
        row |= {"problem": str(row["problem"]), "answer": str(row["answer"]), "id": str(row.get("id", len(rows)))}
        if row["id"] in ids:
            raise ValueError(f"{path}:{number}: id {row['id']!r} occurs twice")
        ids.add(row["id"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    return rows


# ----------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685), in PEFT's names and files
# ----------------------------------------------------------------------------------------------------------

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A frozen Linear plus scale * B A, where A is (r,in) and B (out,r).  It takes over the Linear's tensors.

    A and B stay in fp32 whatever the base is: at a rate of 1e-6 a bf16 parameter would never move.
    """

    def __init__(self, base, r, alpha, dropout=0.0):
        nn.Module.__init__(self)
        if r < 1:
            raise ValueError(f"a LoRA rank must be at least 1, it is {r}")
        self.training = base.training
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))      # PEFT's; B = 0, so the first step is the base
        self.r, self.alpha, self.scale, self.dropout, self.on = r, alpha, alpha / r, dropout, True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        low = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype) @ self.lora_A.T       # (...,r)
        return (y + low @ self.lora_B.T * self.scale).to(y.dtype)            # rounded once, as PEFT does


def lora_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r=32, alpha=128, dropout=0.05, targets=TARGETS):
    """Freezes the model and puts a LoRALinear in place of every Linear whose last name is in `targets`.

    Defaults are the paper's (Table 7) on the released code's seven projections.  Returns the model.
    """
    refuse_second(model)
    found = [n for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)
             and n.rpartition(".")[2] in targets]                  # not lm_head: the loss reads its bare weight
    missing = set(targets) - {n.rpartition(".")[2] for n in found}
    if missing:
        raise ValueError(f"the model's blocks have no layer named {' or '.join(sorted(missing))} to adapt")
    model.requires_grad_(False)
    for name in found:
        replace(model, name, LoRALinear(model.get_submodule(name), r, alpha, dropout))
    return model


def refuse_second(model):
    if lora_layers(model):
        raise ValueError("the model has an adapter already: merge_adapter(model) first")


def replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is its own base: this is the teacher of SAE-Tuning."""
    kept = [(layer, layer.on) for layer in lora_layers(model).values()]
    for layer, _ in kept:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in kept:
            layer.on = on


@contextlib.contextmanager
def adapters_folded(model):
    """Inside, B A is part of the weights, so that sampling costs what the base costs; bits are restored after."""
    kept = [(layer, layer.weight) for layer in lora_layers(model).values() if layer.on]
    try:
        for layer, _ in kept:
            layer.weight, layer.on = nn.Parameter(folded(layer), requires_grad=False), False
        yield
    finally:
        for layer, weight in kept:
            layer.weight, layer.on = weight, True


@torch.no_grad()
def folded(layer):
    """The merged weight (out,in); summed in fp32, since bf16 would drop small updates."""
    exact = torch.promote_types(layer.weight.dtype, torch.float32)
    return (layer.weight.to(exact) + layer.scale * (layer.lora_B @ layer.lora_A).to(exact)).to(layer.weight.dtype)


def merge_adapter(model):
    """Folds the attached adapters into plain Linear layers for good.  Returns the model."""
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(folded(layer), requires_grad=False), layer.bias
        replace(model, name, linear)
    return model


def save_adapter(model, directory, base=None):
    """Writes adapter_model.safetensors and the smallest adapter_config.json that PEFT reads.

    Newer PEFT fields make older releases fail, so only what is needed is written.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    tensors = {f"base_model.model.{n}.lora_{s}.weight": getattr(m, f"lora_{s}").detach().contiguous().cpu()
               for n, m in layers.items() for s in "AB"}
    first = next(iter(layers.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": first.r, "lora_alpha": first.alpha,
              "lora_dropout": first.dropout, "bias": "none", "inference_mode": True,
              "target_modules": sorted({n.rpartition(".")[2] for n in layers}), "base_model_name_or_path": base}
    with staged(directory) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model, spec):
    """Attaches a PEFT adapter, trainable, without merging it (model.load_model merges).  Returns the model.

    spec names one adapter and takes no factor: its scale is the layers' own, alpha / r.
    """
    refuse_second(model)
    adapter = read_adapter(spec)
    check_adapter(model, adapter, spec)
    model.requires_grad_(False)
    for name, (A, B) in adapter["pairs"].items():
        layer = LoRALinear(model.get_submodule(name), adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"])
        with torch.no_grad():
            layer.lora_A.copy_(A), layer.lora_B.copy_(B)
        replace(model, name, layer)
    return model


# ----------------------------------------------------------------------------------------------------------
# Splice: read the activation at a hook site, or put something in its place
# ----------------------------------------------------------------------------------------------------------

def site_module(model, layer, site):
    """The module whose output is the site: block `layer` counted from 0 ("resid"), or its MLP ("mlp").

    Resa: the text attaches the SAE to the MLP output, the released code to the block output: --site.
    """
    count = len(model.model.layers)
    if not 0 <= layer < count:
        raise ValueError(f"layer {layer} is out of range: this model has blocks 0 .. {count - 1}")
    if site not in ("resid", "mlp"):
        raise ValueError(f"site {site!r} is not one of resid, mlp")
    return model.model.layers[layer] if site == "resid" else model.model.layers[layer].mlp


def check_hook(model, layer, site, grad):
    """ValueError if there is no such site, or if no adapter could learn with the SAE spliced in there."""
    site_module(model, layer, site)
    if site == "resid" and not grad and torch.is_grad_enabled() and layer == len(model.model.layers) - 1:
        raise ValueError(f"layer {layer} is the last block: nothing above it can learn; --sae-grad on lets those "
                         "below it learn")


@contextlib.contextmanager
def hooked(model, layer, site, function):
    """Inside, function(x), unless it is None, takes the place of the activation x (B,T,D) at the site."""
    handle = site_module(model, layer, site).register_forward_hook(lambda module, inputs, x: function(x))
    try:
        yield
    finally:
        handle.remove()


def is_sink(x, limit):
    """x (B,T,D) -> (B,T) bool: attention sinks, which are position 0 and every token whose norm exceeds `limit`.

    Their norms reach hundreds of times the median: an SAE would be about them.  limit None: no token is one.
    """
    if limit is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    sink = x.float().norm(dim=-1) > limit
    if x.shape[1] > 1:                   # a lone token is one that is generated: it follows those in the cache
        sink[:, 0] = True
    return sink


def insert(sae, x):
    """x (B,T,D) -> what the SAE, or a control, puts in its place.  Tokens its training left out stay as they are."""
    limit = getattr(sae, "meta", {}).get("sink_norm")
    return sae(x) if limit is None else torch.where(is_sink(x, limit)[..., None], x, sae(x))


@contextlib.contextmanager
def splice(model, sae, layer, site="resid", grad=False):
    """Inside, x_hat = sae(x) stands in for the activation x at the site.

    grad=False is the published code: the SAE runs under no_grad, so the blocks below see no gradient through
    it.  grad=True is the published text.  `sae` is any module (B,T,D) -> (B,T,D).
    """
    def swap(x):
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return insert(sae, x)
    with hooked(model, layer, site, swap):
        yield


@torch.no_grad()
def activations(model, ids, layer, site="resid"):
    """ids (B,T) -> the activation (B,T,D) at the site; nothing above block `layer` is computed."""
    caught = []
    with hooked(model, layer, site, caught.append):
        model.run(ids, stop=layer + 1)
    return caught[0]


class MatchedNoise(nn.Module):
    """The control for `sae`: x plus Gaussian noise whose norm at each token is that of the SAE's own error.

    Drawn from torch's generator, whose state checkpoints hold, so that a resumed run draws on.
    """

    def __init__(self, sae):
        super().__init__()
        self.sae, self.meta = sae, getattr(sae, "meta", {})

    def forward(self, x):
        e = (x - self.sae(x)).float()                                                            # (B,T,D)
        noise = torch.randn_like(e)
        return x + (noise * (e.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))).to(x.dtype)


class ErrorKept(nn.Module):
    """x itself, to the rounding of a sum, whose gradient passes the SAE: SAE(x) + stop(x - SAE(x))."""

    def __init__(self, sae):
        super().__init__()
        self.sae, self.meta = sae, getattr(sae, "meta", {})

    def forward(self, x):
        x_hat = self.sae(x)
        return x_hat + (x - x_hat).detach()


class Ablation(nn.Module):
    """The far end of the scale for `sae`: one vector (D,), zero or the mean, in place of every activation."""

    def __init__(self, value, sae):
        super().__init__()
        self.value, self.meta = value, sae.meta

    def forward(self, x):
        return self.value.to(x.dtype).expand_as(x)


class Restored(nn.Module):
    """x_hat with one part of the SAE's error put back: the linear one, line(x), or what is left without it."""

    def __init__(self, sae, line, linear):
        super().__init__()
        self.sae, self.line, self.linear, self.meta = sae, line, linear, sae.meta

    def forward(self, x):
        return self.sae(x) + self.line(x) if self.linear else x - self.line(x)


# ----------------------------------------------------------------------------------------------------------
# The tuning objective
# ----------------------------------------------------------------------------------------------------------

class ChunkedKL(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student) in nats, without ever holding an (N,V) tensor.

    h_s, h_t (N,D) are final-normed hidden states, W_s, W_t (V,D) the frozen heads.  With p = softmax(h W^T):
        loss = sum_n sum_v p_t (log p_t - log p_s),        d loss / d h_s = (p_s - p_t) W_s
    so the backward pass needs no logits.  At N=2048, V=151,936 one fp32 (N,V) tensor is 1.2 GB; the plain way
    holds several.
    """

    @staticmethod
    def forward(ctx, h_s, h_t, W_s, W_t, chunk):
        total, grad = torch.zeros((), device=h_s.device, dtype=torch.float64), torch.empty_like(h_s)
        for i in range(0, len(h_s), chunk):
            log_s = at_least_fp32(h_s[i:i + chunk] @ W_s.T).log_softmax(-1)                      # (chunk,V)
            log_t = at_least_fp32(h_t[i:i + chunk] @ W_t.T).log_softmax(-1)
            p_t = log_t.exp()
            total += (p_t * (log_t - log_s)).sum().double()
            grad[i:i + chunk] = (log_s.exp() - p_t).to(W_s.dtype) @ W_s
        ctx.save_for_backward(grad)
        return total.to(torch.promote_types(h_s.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        grad, = ctx.saved_tensors
        return (grad * upstream).to(grad.dtype), None, None, None, None


def kl_loss(student, teacher, h_s, h_t, reduction="token", chunk=256):
    """h_s, h_t (B,T,D), outputs of the last blocks of two models -> KL(teacher || student), a scalar in nats.

    reduction  "token": mean over B*T tokens.   Resa: --kl-reduction sequence sums over the T positions and
               averages over B, which makes it T times larger before the clip at norm 1.
    """
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction {reduction!r} is not one of token, sequence")
    B, T, _ = h_s.shape
    h_s, h_t = student.model.norm(h_s).flatten(0, 1), teacher.model.norm(h_t).flatten(0, 1)      # (N,D)
    total = ChunkedKL.apply(h_s, h_t.detach(), student.lm_head.weight, teacher.lm_head.weight, chunk)
    return total / (B * T if reduction == "token" else B)


def tuning_loss(model, sae, layer, ids, site="resid", grad=False, reduction="token", teacher=None, into="student",
                match=0.0):
    """The loss of SAE-Tuning (arXiv 2506.09967 eq. 8), KL(teacher || student), a scalar in nats.

    model    the target with LoRA attached: the student, with `sae` spliced in at block `layer`
    sae      module (B,T,D) -> (B,T,D); None: no splice, plain distillation from `teacher`
    ids      (B,T).  All positions count, the first included, and there is no cross-entropy term, as published
    teacher  None: the target itself, adapters off and SAE out;  another model: that one (--teacher source)

    Not in the paper, and only with another model as the teacher:
    into     "student", as published;  "teacher": what is taught is what the teacher says through the SAE;
             "gradient": the student keeps its x, only its gradient passes the SAE, SAE(x) + stop(x - SAE(x));
             "nothing": the SAE is there for `match`
    match    weight of `feature_distance` between teacher and student at the site

    Where no gradient can pass below the site (grad off, whole block output replaced), teacher and student
    share blocks 0 .. layer, which are then run once and without a graph; `plain_tuning_loss` is the twin.
    """
    if teacher is None and (into != "student" or match):
        raise ValueError("into and match are for another model as the teacher")
    below = [m.lora_B.abs().amax() for n, m in lora_layers(model).items() if int(n.split(".")[2]) <= layer]
    if sae is None or grad or site != "resid" or teacher is not None or (below and torch.stack(below).any()):
        return plain_tuning_loss(model, sae, layer, ids, site, grad, reduction, teacher, into, match)
    check_hook(model, layer, site, grad)
    with torch.no_grad(), adapters_off(model):                 # adapters below the hook never leave zero
        h = model.run(ids, stop=layer + 1)                                                       # (B,T,D)
        h_t, x_hat = model.run(h, start=layer + 1), insert(sae, h)
    return kl_loss(model, model, model.run(x_hat, start=layer + 1), h_t, reduction)


def plain_tuning_loss(model, sae, layer, ids, site="resid", grad=False, reduction="token", teacher=None,
                      into="student", match=0.0):
    """The same, in two whole passes."""
    nothing, caught, source = contextlib.nullcontext, [], teacher or model
    catch = lambda lm: hooked(lm, layer, site, lambda x: caught.append(x)) if match else nothing()
    swap = lambda lm, module, grad=False: splice(lm, module, layer, site, grad) if module is not None else nothing()
    for_student = ErrorKept(sae) if into == "gradient" else sae if into == "student" else None
    # What is caught is x before any splice: hooks run in the order in which they are put on.
    with torch.no_grad(), nothing() if teacher is not None else adapters_off(model), catch(source), (
            swap(source, sae if into == "teacher" else None)):
        h_t = source.run(ids)                                                                    # (B,T,D)
    with catch(model), swap(model, for_student, grad or into == "gradient"):
        h_s = model.run(ids)
    loss = kl_loss(model, source, h_s, h_t, reduction)
    return loss + match * feature_distance(sae, caught[1], caught[0]) if match else loss


def feature_distance(sae, x_s, x_t):
    """How far student's and teacher's activations (B,T,D) are apart as the SAE sees them, a scalar.

    |SAE(x_s) - SAE(x_t)|^2 over the variance of SAE(x_t): codes are compared in the directions that they stand for.
    sae None: of the activations themselves.
    """
    a, b = (x if sae is None else insert(sae, x) for x in (x_s, x_t))
    a, b = at_least_fp32(a), at_least_fp32(b).detach()
    return (a - b).pow(2).sum() / (b - b.mean((0, 1))).pow(2).sum()


# ----------------------------------------------------------------------------------------------------------
# The experiment: every arm, one table
# ----------------------------------------------------------------------------------------------------------

# Each arm is a training command, so that any row of the table can be made again alone:
#     python train.py --stage <the words below and those of BUDGET> --out DIR
# or, after "=", a model that is only asked.  {out} is the folder of the seed, {root} that of all of them.
SAES = {"sae": "sae", "sae-mlp": "sae --site mlp", "sae-base": "sae --source {base}"}
ARMS = {
    "base": "= {base}",
    "RL source": "= {source}",
    "SAE-Tuning (as coded)": "tune --sae {out}/sae",
    "SAE-Tuning (as written)": "tune --sae {out}/sae-mlp --site mlp --sae-grad on --schedule cosine",
    "SAE of the base": "tune --sae {out}/sae-base",
    "random SAE": "tune --sae {out}/sae --splice random",
    "noise of the SAE's size": "tune --sae {out}/sae --splice noise",
    "trace-free SFT": "sft",
    "source teaches, with SAE": "tune --sae {out}/sae --teacher source",
    "source teaches, all learn": "tune --sae {out}/sae --teacher source --sae-grad on",
    "source teaches, no SAE": "tune --splice none --teacher source",
}
# The same for every arm.  Looked for with plain distillation on training questions, and by the FVU of the SAE.
BUDGET = {"sae": "--steps {sae_steps}",      # and the preset's batch and rate
          "tune": "--steps {tune_steps} --batch 4 --lr {lr}", "sft": "--steps {tune_steps} --batch 4 --lr {lr}"}
# What the controls are for: pairs (arm, its control), compared question by question under the table.
QUESTIONS = [("SAE-Tuning (as coded)", "random SAE", "does it matter that the SAE is trained"),
             ("SAE-Tuning (as coded)", "noise of the SAE's size", "is it more than noise at that layer"),
             ("SAE-Tuning (as coded)", "SAE of the base", "does the source matter to the SAE"),
             ("source teaches, all learn", "source teaches, no SAE", "does the SAE help a stronger teacher")]

FOOTNOTE = """\
{questions} held-out questions x {samples}, temperature 0.6, top-p 0.95.  One training seed ({seed}): the intervals
cover questions and samples, not another training.  Adapters are those after the last of {tune_steps} steps; none
was chosen.  Seconds are of one core, the SAE's included; RL, which made the source, took {rl_seconds:.0f} s when run.
As coded: SAE under no_grad, block output.  As written: gradient through the SAE, MLP output, cosine rate.
Rate, data and optimizer are this preset's.  The comparisons below are not corrected for their number.
"""


@dataclass
class Experiment:
    """SAE-Tuning and its controls on the embedded model: trains every arm, prints one table of Pass@1."""
    out: str = "out/tiny/experiment"     # run directory; every arm has a folder in it
    seed: int = 0                        # of every training and of the samples
    questions: int = 1000                # held-out questions, the first of data/tiny/test.jsonl
    samples: int = 1                     # of each question, at temperature 0.6, top-p 0.95
    sae_steps: int = 100                 # optimizer steps of an SAE, of 8 chunks of 256 tokens
    tune_steps: int = 120                # optimizer steps of an adapter, of 4 chunks; the last is used
    lr: float = 3e-4                     # of every adapter; a usual rate for LoRA
    workers: int = 2                     # arms trained at a time, one core each
    quick: bool = False                  # 100 questions, 4 steps: shows that it runs, not what it is worth


def arm_flags(words, args, out, budget=None):
    """The words of an arm -> its stage, and the flags of train.py that they and the budget mean."""
    stage, *flags = f"{words} {BUDGET[words.split()[0]] if budget is None else budget}".split()
    places = dict(base=PRESETS["tiny"]["target"], tiny=TINY, root=Path(args.out).parent)
    return stage, [flag.format(**vars(args) | places) for flag in flags] + [
        "--out", out, "--seed", str(args.seed), "--device", "cpu"]


def train_arm(words, args, out, budget=None):
    """One training command in this process -> its summary (a dict with "seconds")."""
    import train
    torch.set_num_threads(1)
    stage, flags = arm_flags(words, args, out, budget)
    Path(out, "checkpoint.safetensors").unlink(missing_ok=True)        # of an interrupted experiment
    return train.RUN[stage](train.prepare(stage, flags))


def run_arm(name, words, args):
    """Trains and evaluates one arm -> (samples, training seconds or None).  Runs in a worker process."""
    torch.set_num_threads(1)
    out, base, source = f"{args.out}/{slug(name)}", PRESETS["tiny"]["target"], PRESETS["tiny"]["source"]
    if words.startswith("= "):
        spec = words[2:].format(base=base, source=source, tiny=TINY, out=args.out, root=Path(args.out).parent)
        return ask_arm(name, spec, args), None
    seconds = train_arm(words, args, out)["seconds"]
    return ask_arm(name, f"{base}+{out}", args), seconds


def ask_arm(name, spec, args):
    """A model's answers to the held-out questions, as rows of eval.py."""
    import eval
    return eval.evaluate(load_model(spec), load_tokenizer(spec), read_problems(TINY / "test.jsonl")[:args.questions],
                         f"{args.out}/eval/{slug(name)}.jsonl", samples=args.samples, seed=args.seed, slots=128,
                         max_new_tokens=PRESETS["tiny"]["max_new_tokens"], label=name, fresh=True)


def slug(name):
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def experiment(argv):
    """`python resa.py`: three SAEs, then every arm, then the table and what it says."""
    args = parse_flags(Experiment, argv, "resa.py")
    if args.quick:
        idle = sorted(args.given & {"questions", "sae_steps", "tune_steps"})
        if idle:
            raise ValueError(f"resa.py: --{idle[0].replace('_', '-')} has no effect with --quick, which sets it")
        args.questions, args.sae_steps, args.tune_steps = 100, 4, 4
    at_least(args, questions=1, samples=1, sae_steps=1, tune_steps=1, workers=1, seed=0)
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be above 0 and finite; it is {args.lr}")
    count = len(read_problems(TINY / "test.jsonl"))
    if args.questions > count:                                 # the table prints this number
        raise ValueError(f"--questions {args.questions}: there are {count}")
    began = time.perf_counter()
    open_run(args.out, args)
    print("Stage I: an SAE on the source, one on its MLP, one on the base")
    jobs = {name: (train_arm, words, args, f"{args.out}/{name}") for name, words in SAES.items()}
    saes = dict(in_workers(jobs, args.workers, "autoencoders"))
    for name, s in saes.items():
        print(f"  {name:10s} FVU {s['fvu']:.3f}  L0 {s['l0']:.1f}  dead {s['dead']:.1%}  loss recovered "
              f"{s['recovered_mean']:.1%}  on held-out text  {s['tokens']:,} tokens  {s['seconds']:.0f} s")
    print(f"Stage II: {len(ARMS)} arms, each tuned and then asked {args.questions} questions")
    jobs = {name: (run_arm, name, words, args) for name, words in ARMS.items()}
    arms = dict(in_workers(jobs, args.workers, "arms"))
    text = describe({name: arms[name] for name in ARMS}, saes, args)
    if args.quick:
        text += "\n\nThis was --quick: after 4 steps an SAE is hardly one. It shows that everything runs, nothing else."
    with staged(args.out) as temporary:
        (temporary / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{args.out}: samples, adapters and this table; {time.perf_counter() - began:.0f} s in all")


def in_workers(jobs, workers, title):
    """Runs {name: (function, *arguments)} in processes of their own, yields (name, result) as each one ends."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context
    from tqdm import tqdm
    # Tiny tensors gain nothing from a second thread, whole arms do.  A worker's own bars would overwrite each other.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=quiet_worker) as pool:
        futures = {pool.submit(*job): name for name, job in jobs.items()}
        bar = tqdm(as_completed(futures), total=len(futures), desc=title, unit=title[:-1], disable=None)
        try:
            for future in bar:
                bar.set_postfix_str(f"done: {futures[future]}")
                yield futures[future], future.result()
        finally:                    # after an error nobody waits for the jobs that have not begun
            pool.shutdown(wait=False, cancel_futures=True)


def quiet_worker():
    sys.stdout = sys.stderr = open(os.devnull, "w")      # not a terminal: no bars; errors come back as exceptions


def describe(arms, saes, args):
    """{arm: (samples, seconds)} -> the table and, in words, what each comparison of QUESTIONS shows."""
    import eval
    base, source = arms["base"][0], arms["RL source"][0]
    rl_seconds = read_json(TINY / "rl" / "summary.json")["seconds"]
    gap, lines = eval.paired(source, base)["difference"], []
    for name, (rows, spent) in arms.items():
        s, pair = eval.summarize(rows), eval.paired(rows, base)
        closed = f"{pair['difference'] / gap:+.0%}" if gap > 0 else "-"
        against = ["", "", ""] if name == "base" else [f"{pair['difference']:+.3f}", bracket(pair), closed]
        spent = None if spent is None else spent + sae_seconds(name, saes)
        cost = ["", ""] if spent is None else [f"{spent:.0f}", f"{spent / rl_seconds:.2f}"]
        lines.append([name, f"{s['pass@1']:.3f}", "[{:.3f}, {:.3f}]".format(*s["interval"]), *against, *cost])
    header = ["arm", "Pass@1", "95% CI", "- base", "95% CI", "gap closed", "train s", "x RL"]
    asked = [(name, "base", "is it better than doing nothing") for name in ARMS if name.startswith("SAE-Tuning")]
    words = [say(arms[a][0], arms[b][0], a, b, why) for a, b, why in asked + QUESTIONS]
    return "\n".join([eval.table(lines, header), "", FOOTNOTE.format(**vars(args), rl_seconds=rl_seconds), *words])


def sae_seconds(name, saes):
    """What the SAE of an arm cost to train; a random one cost nothing."""
    match = re.search(r"{out}/(\S+)", ARMS[name])
    return saes[match[1]]["seconds"] if match and "random" not in ARMS[name] else 0.0


def say(rows, control, name, against, why):
    """One comparison in plain words; a null result is called one."""
    import eval
    pair = eval.paired(rows, control)
    return sentence(name, against, why, pair["difference"], *pair["interval"])


def sentence(name, against, why, mean, low, high):
    found = "better" if low > 0 else "worse" if high < 0 else "no difference is seen"
    return f"{why[0].upper() + why[1:]}? {name} against {against}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {found}."


def bracket(pair):
    return "[{:+.3f}, {:+.3f}]".format(*pair["interval"])


# ----------------------------------------------------------------------------------------------------------
# Every SAE variant beside the others: on a model's activations, and where the true dictionary is known
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Compare:
    """Trains every SAE variant on the same activations of the embedded source with the same budget: one table."""
    out: str = "out/tiny/compare"        # run directory; every training has a folder in it
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))      # which
    seeds: int = 3                       # trainings of each, seeds 0, 1, ..
    steps: int = 100                     # optimizer steps
    batch: int = 16                      # chunks of 256 tokens in a step
    latents: int = 1024                  # size of the dictionary
    k: int = 16                          # active latents a token, for those that take a number
    workers: int = 2                     # trainings at a time, one core each


def compare(argv):
    args = parse_flags(Compare, argv, "resa.py compare")
    at_least(args, seeds=1, steps=1, batch=1, latents=1, k=1, workers=1)
    check_variants(args)
    open_run(args.out, args)
    jobs = {}
    for name in args.variants:
        words = f"sae --variant {name} --latents {args.latents}"
        words += f" --k {args.k}" if "k" in VARIANTS[name].defaults else PENALTY.get(name, "")
        for seed in range(args.seeds):
            at = types.SimpleNamespace(out=args.out, seed=seed)
            budget = f"--steps {args.steps} --batch {args.batch}"
            budget += " --lr 0 --schedule constant" * (name != "itda")      # 0: the optimizer's rule; itda has no rate
            jobs[name, seed] = (train_arm, words, at, f"{args.out}/{name}-{seed}", budget)
    found = collect_seeds(dict(in_workers(jobs, args.workers, "trainings")), args)
    show = {"FVU": ("fvu", ".4f"), "L0": ("l0", ".1f"), "dead": ("dead", ".1%"), "cosine": ("cosine", ".3f"),
            "CE": ("ce_sae", ".3f"), "KL": ("kl", ".3f"), "recovered": ("recovered_mean", ".1%"),
            "s": ("seconds", ".0f")}
    first = found[args.variants[0]][0]
    print_variants(args, found, show, COMPARED.format(
        **vars(args), tokens=args.batch * 256, held=first["n_tokens"], ce=first["ce"]))


# Where a penalty stands for k: looked for so that L0 comes near 16 at the defaults, never by any other number.
PENALTY = {"relu": " --set l1=0.35", "gated": " --set l1=0.6"}

COMPARED = """\
{steps} steps x {tokens:,} tokens, F {latents}, k {k} where it can be set; {seeds} seeds: means, and least .. most.
On {held:,} held-out tokens.  CE, KL: nats a token with the SAE spliced in; the model alone has a CE of {ce:.3f}.
recovered: share of the damage of mean ablation that is undone.  s: of one core.  Where k cannot be set, L0 is what
the variant's defaults give, so that its row compares with another only at a similar L0."""


@dataclass
class Recover:
    """Activations made of a known dictionary: does each SAE variant find it?"""
    out: str = "out/tiny/recover"        # run directory
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))      # which
    seeds: int = 3                       # dictionaries, and trainings, seeds 0, 1, ..
    steps: int = 2000                    # optimizer steps
    batch: int = 512                     # tokens in a step, all new
    features: int = 128                  # true directions
    width: int = 42                      # dimensions they live in
    latents: int = 256                   # size of the dictionary
    k: int = 12                          # active latents a token, for those that take a number; true mean 11.5
    lr: float = 2e-3                     # of Adam, linear to 0 over the last fifth
    workers: int = 2                     # trainings at a time, one core each


def recover(argv):
    args = parse_flags(Recover, argv, "resa.py recover")
    at_least(args, seeds=1, steps=1, batch=2, features=20, width=2, latents=1, k=1, workers=1)
    check_variants(args)
    open_run(args.out, args)
    jobs = {(name, seed): (recover_one, name, seed, args) for name in args.variants for seed in range(args.seeds)}
    found = collect_seeds(dict(in_workers(jobs, args.workers, "trainings")), args)
    show = {"mean max cosine": ("mmcs", ".3f"), "found at .8": ("at_8", ".1%"), "found at .9": ("at_9", ".1%"),
            "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f"), "s": ("seconds", ".0f")}
    print_variants(args, found, show, RECOVERED.format(**vars(args)))


RECOVERED = """\
{features} directions in {width} dimensions, 3 or 20 of them active, unit norm (arXiv 2506.14002); {steps} steps x
{batch} tokens, F {latents}, k {k} where it can be set, Adam at {lr}; {seeds} seeds: means, and least .. most.
found at .9: share of the true directions to which some atom has a cosine above 0.9."""


def synthetic(dictionary, count, rng):
    """True directions (n,D) -> unit activations (count,D): sums of 3 or of 20 of them, even odds (arXiv 2506.14002)."""
    n = len(dictionary)
    active = torch.where(torch.rand(count, 1, generator=rng) < 0.5, 3, 20)                       # (N,1)
    rank = torch.rand(count, n, generator=rng).argsort(1).argsort(1)                             # a random order
    return F.normalize((rank < active).float() @ dictionary, dim=1)                              # (N,D)


def recover_one(variant, seed, args):
    """Trains one SAE on synthetic activations -> what it found.  Runs in a worker process."""
    torch.set_num_threads(1)
    began, rng = time.perf_counter(), torch.Generator().manual_seed(seed)
    true = F.normalize(torch.randn(args.features, args.width, generator=rng), dim=1)
    has = VARIANTS[variant].defaults
    sae = build(variant, args.width, args.latents, seed=seed, **({"k": args.k} if "k" in has else {}))
    init_b_dec(sae, synthetic(true, 4096, rng))
    optimizer = make_optimizer(sae, "adam", args.lr)
    for step in range(args.steps):
        x = synthetic(true, args.batch, rng)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, 5 * (1 - step / args.steps))
        g = None if not sae.needs_gradient else torch.zeros_like(x)      # no model, no loss: TopK
        train_step(sae, optimizer, [(x, g)], step / args.steps)
    if not getattr(sae, "per_token", True):
        sae.calibrate(synthetic(true, args.batch, rng) for _ in range(16))
    best = (true @ F.normalize(sae.W_dec.detach(), dim=1).T).amax(1)                             # (n,), signed
    m = metrics(sae, synthetic(true, 8192, rng))
    return {"mmcs": float(best.mean()), "at_8": float((best > 0.8).float().mean()), "fvu": m["fvu"], "l0": m["l0"],
            "at_9": float((best > 0.9).float().mean()), "seconds": time.perf_counter() - began}


def check_variants(args):
    for name in args.variants:
        if name not in VARIANTS:
            raise ValueError(f"--variants {name}: there are {', '.join(VARIANTS)}")


def collect_seeds(results, args):
    """{(variant, seed): result} -> {variant: [results by seed]}, in the order asked for."""
    return {name: [results[name, seed] for seed in range(args.seeds)] for name in args.variants}


def print_variants(args, found, show, note):
    """A row for each variant, means over seeds; written to the run directory too."""
    import eval
    def cell(runs, key, form):
        values = [run[key] for run in runs]
        spread = f" {min(values):{form}} .. {max(values):{form}}" if key in ("fvu", "recovered_mean", "at_9") else ""
        return f"{sum(values) / len(values):{form}}{spread}"
    rows = [[name, *(cell(runs, *how) for how in show.values())] for name, runs in found.items()]
    text = f"{eval.table(rows, ['variant', *show])}\n\n{note}"
    with staged(args.out) as temporary:
        (temporary / "table.txt").write_text(text + "\n")
    print(f"{text}\n\n{args.out}")


# ----------------------------------------------------------------------------------------------------------
# What an SAE misses: its error in parts (arXiv 2410.14670)
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Errors:
    """The error of SAEs in two parts, linear in the activation and not, over widths: one table and one chart."""
    preset: str = "tiny"                 # bundle of defaults
    source: str = ""                     # model spec
    layer: int = 1                       # decoder block, counted from 0
    site: Literal["resid", "mlp"] = "resid"      # output of the block, or of its MLP
    sae: list[str] = field(default_factory=list)      # study these, DIR_OR_HUB_ID[#HOOKPOINT]; of other sites: predict
    data: str = ""                       # JSONL to train on
    held: str = ""                       # JSONL to measure on; default: the last twentieth of --data, not trained on
    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])      # without --sae: what to train
    k: int = 16                          # active latents a token, of the SAEs trained here
    seeds: int = 3                       # trainings of each, seeds 0, 1, ..
    steps: int = 500                     # optimizer steps
    lr: float = 5e-3                     # of Adam, linear to 0 over the last fifth
    batch: int = 4                       # chunks in a step
    seq_len: int = 256                   # tokens in a chunk
    dtype: Literal["float32", "bfloat16"] = "float32"      # of the language model
    device: str | None = None            # cpu, cuda, cuda:1, ...; default: cuda where there is one
    out: str = ""                        # run directory, with a folder for every training; default out/PRESET/errors
    workers: int = 2                     # trainings at a time, one core each
    quick: bool = False                  # one seed, 4 steps: shows that it runs, not what it is worth


def errors(argv):
    """`python resa.py errors`: trains SAEs of every width and seed, then studies them seed by seed."""
    import train
    args = parse_flags(Errors, argv, "resa.py errors")
    if args.quick:
        train.refuse_idle(args, "seeds steps", "--quick, which sets it")
        args.steps = 4
    if args.sae:
        train.refuse_idle(args, "widths seeds workers", "--sae, which says what to study")
    if "data" in args.given and "held" not in args.given:      # what a preset measures on goes with its data
        args.held = ""
    args.seeds = 1 if args.sae or args.quick else args.seeds
    args.widths, args.out = sorted(set(args.widths)), args.out or f"out/{args.preset}/errors"
    at_least(args, seeds=1, steps=1, k=1, workers=1)
    train.check(args.sae or args.k <= args.widths[0], f"--k {args.k} is more than --widths {args.widths[0]} can give")
    train.check(0 < args.lr < math.inf, f"--lr must be above 0 and finite; it is {args.lr}")
    train.prepare("sae", stage_flags(args, 0))                 # bad settings end here, before anything is written
    open_run(args.out, args)
    jobs = {out: (train_alone, flags) for seed in range(args.seeds) for out, flags in trainings(args, seed).items()}
    dict(in_workers({} if args.sae else jobs, args.workers, "trainings"))
    studies = {seed: (study_errors, args, seed) for seed in range(args.seeds)}
    found = {0: study_errors(args, 0)} if args.sae else dict(in_workers(studies, args.workers, "studies"))
    found = [found[seed] for seed in range(args.seeds)]
    text = f"{error_table(found)}\n\n{error_chart(found)}\n\n{ERRORS.format(**vars(args) | found[0])}"
    with staged(args.out) as temporary:
        (temporary / "table.txt").write_text(text + "\n")
        (temporary / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{text}\n\n{args.out}")


def stage_flags(args, seed, **more):
    """The flags of train.py --stage sae that these settings mean."""
    names = "preset source layer site data k steps lr batch seq_len dtype device out".split()
    own = {name: getattr(args, name) for name in names if hasattr(args, name)} | {"seed": seed, "schedule": "linear"}
    return to_argv(own | {"save_every": args.steps} | more)


def trainings(args, seed):
    """{directory: flags} of one seed: every width at the site, the middle one at the sites just before it."""
    before = [(args.layer - 1, "resid")] * (args.layer > 0) + [(args.layer, "mlp")] * (args.site == "resid")
    at = [(args.layer, args.site, width) for width in args.widths]
    at += [(*site, args.widths[len(args.widths) // 2]) for site in before]
    named = {f"{args.out}/{site}-{layer}-{width}-{seed}": (layer, site, width) for layer, site, width in at}
    return {out: stage_flags(args, seed, layer=layer, site=site, latents=width, out=out)
            for out, (layer, site, width) in named.items()}


def train_alone(flags):
    """One SAE on one core.  Runs in a worker process."""
    import train
    torch.set_num_threads(1)
    return train.run_sae(train.prepare("sae", flags))


def study_errors(args, seed):
    """The SAEs of one seed -> {"widths": {width: {label: number}}, ..}.  In a worker; with --sae, in this process."""
    import train
    if not args.sae:
        torch.set_num_threads(1)
    t = train.prepare("sae", stage_flags(args, seed))
    model, chunks, ids = load_text(args, t, seed)

    def read(layer, site):
        return torch.cat([activations(model, part, layer, site).float() for part in train.micro(ids, t)])
    x, half = read(args.layer, args.site), len(ids) // 2                                         # (n,T,D)
    limit = train.sink_norm(x[:args.batch], None, t)      # one for all SAEs, whatever each was trained with
    keep = ~is_sink(x, limit)
    x, n_fit = x[keep], int(keep[:half].sum())                                                   # (N,D)
    saes, others = open_saes(args, seed, limit, x.device, lambda *site: read(*site)[keep])
    found, norms = {}, {}
    for width, sae in saes.items():
        line, found[width], norms[width] = study_one(sae, x, n_fit, others)
        found[width] |= spliced_parts(model, sae, line, ids[half:], t)
        if width == list(saes)[len(saes) // 2]:
            found[width] |= train_on_parts(model, sae, line, chunks, x[n_fit:], args, seed)
    across_widths(found, norms, x.norm(dim=1), n_fit)
    return {"n_fit": n_fit, "n_test": len(x) - n_fit, "left_out": 1 - len(x) / ids.numel(), "widths": found}


def load_text(args, t, seed):
    """-> model, chunks (n,T) to train on, chunks to measure on: those held out or of --held, up to 65,536 tokens."""
    import train
    model, tokenizer = load_model(t.source, t.dtype, t.device), load_tokenizer(t.source)
    chunks, ids = train.hold_out(train.load_chunks(t, tokenizer, model))
    if args.held:
        ids = train.load_chunks(train.prepare("sae", stage_flags(args, seed, data=args.held)), tokenizer, model)
    return model, chunks, ids[:max(2, 65536 // args.seq_len)].to(t.device)


def open_saes(args, seed, limit, device, read):
    """-> {width: SAE} of the site, ascending; {name: (N,D)} of all others, what they see and what they make of it.

    read(layer, site) gives the activations (N,D).  ValueError: none of the site, or two of one width."""
    import train
    saes, others = {}, {}
    for spec in args.sae or trainings(args, seed):
        sae = train.open_sae(spec).to(device, torch.float32).requires_grad_(False)
        layer, site = sae.meta.get("layer", args.layer), sae.meta.get("site", args.site)
        sae.meta["sink_norm"] = limit
        if (layer, site) == (args.layer, args.site):
            train.check(sae.n_latents not in saes, f"--sae: two of {sae.n_latents} latents; study one at a time")
            saes[sae.n_latents] = sae
        else:
            u, name = read(layer, site), f"{site} of block {layer}"
            others |= {f"the SAE of {name}": in_parts(sae, u), f"{name} itself": u}
    train.check(saes, f"--sae: none of them belongs to {args.site} of block {args.layer}; see --site and --layer")
    return dict(sorted(saes.items())), others


@torch.no_grad()
def in_parts(function, x):
    """function(x) for x (N,D), a bounded number of tokens at a time."""
    return torch.cat([function(part) for part in x.split(1024)])


def study_one(sae, x, n_fit, others):
    """What activations x (N,D) alone say of an SAE -> line of its error, {label: number}, norms (N,) of e, e_nl."""
    x_hat, shown = in_parts(sae, x), metrics(sae, x[n_fit:], 1024)
    line, m = decompose_error(x, x_hat, n_fit)
    again = decompose_error(x, in_parts(lambda part: pursue(sae, part), x), n_fit)[1]
    e_nl = x - x_hat - line(x)
    found = {"L0": shown["l0"], "latents that never fire": shown["dead"],
             "FVU of e": m["fvu"], "FVU of e_nl": m["fvu_nl"],
             "R2 of e from x": m["r2"], "R2 of e from x, mean over dimensions": m["r2_dims"],
             "R2 of e from x, in-sample": m["r2_fit"],
             "R2 of |e|^2 from x": m["r2_norm"], "R2 of |e|^2 from |x| alone": m["r2_norm_x"],
             "gradient pursuit: FVU of e": again["fvu"], "gradient pursuit: FVU of e_nl": again["fvu_nl"]}
    found |= {f"R2 of e_nl from {name}": linear_r2(u, e_nl, n_fit) for name, u in ({"x_hat": x_hat} | others).items()}
    return line, found, ((x - x_hat).norm(dim=1), e_nl.norm(dim=1))


def spliced_parts(model, sae, line, ids, args):
    """What the model makes of ids (n,T) with x_hat, and with each part of the error put back, in nats a token."""
    import train
    inserted = {"x_hat": sae, "x_hat + e_lin": Restored(sae, line, True), "x_hat + e_nl": Restored(sae, line, False)}
    with torch.no_grad():
        m = {name: train.spliced_nats(model, {"sae": module}, ids, args) for name, module in inserted.items()}
    return ({"CE of the model": m["x_hat"]["ce"]} | {f"CE with {name}": m[name]["ce_sae"] for name in m}
            | {f"KL with {name}": m[name]["kl"] for name in m})


def train_on_parts(model, sae, line, chunks, held, args, seed):
    """SAEs of the same size trained on e_lin and on e_nl -> their FVU on activations held (N,D)."""
    import train
    t, found = train.prepare("sae", stage_flags(args, seed, latents=sae.n_latents)), {}
    for name, part in {"e_lin": line, "e_nl": lambda x: x - sae(x) - line(x)}.items():
        learner = train.make_sae(t, sae.d_in).to(held)
        optimizer = make_optimizer(learner, t.optimizer, t.lr)
        for step in range(t.steps):
            picked = torch.tensor(train.picked_at(step, len(chunks), t))                         # (B,)
            xs = [train.harvest(model, sae, chunks, some, t)[0] for some in train.micro(picked, t)]
            es = [in_parts(part, x) for x in xs]                                                 # (N,D) each
            if step == 0:
                init_b_dec(learner, torch.cat(es))
            optimizer.param_groups[0]["lr"] = train.rate_at(step, t)
            train_step(learner, optimizer, es, step / t.steps)
        found[f"FVU of an SAE trained on {name}"] = metrics(learner, in_parts(part, held), 1024)["fvu"]
    return found


def across_widths(found, norms, length, n_fit):
    """Adds what takes several widths: are the tokens the same, and, from three on, where the curve ends."""
    (small, small_nl), baseline = next(iter(norms.values())), torch.stack([length, length**2], 1)      # (N,2)
    for width, (large, _) in list(norms.items())[1:]:
        same, more = same_tokens(small, small_nl, large, n_fit)
        found[width] |= {"R2 of |e| from the smallest SAE's": same, "of the rest, from its |e_nl| too": more,
                         "R2 of |e| from |x| alone": linear_r2(baseline, large, n_fit)}
    if len(found) > 2:
        c, a, m = fit_floor(list(found), [f["FVU of e"] for f in found.values()])
        nonlinear = sum(f["FVU of e_nl"] for f in found.values()) / len(found)
        for width, f in found.items():
            f |= {"curve: absent": a * width**-m, "curve: linear": c - nonlinear, "curve: nonlinear": nonlinear}


def error_table(found):
    """Rows are the labels, columns the widths: means over seeds, and half the distance from least to most."""
    import eval
    runs = [list(seed["widths"].values()) for seed in found]

    def cell(i, label):
        values = [run[i][label] for run in runs if label in run[i]]
        spread = f" ±{(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.4f}{spread}" if values else ""
    labels = dict.fromkeys(label for f in runs[0] for label in f)
    rows = [[label, *(cell(i, label) for i in range(len(runs[0])))] for label in labels]
    return eval.table(rows, ["", *(f"F {width:,}" for width in found[0]["widths"])])


def error_chart(found):
    """A bar for each width: as long as its FVU, # as far as that is nonlinear, with | at the floor of the curve."""
    def mean(width, *labels):
        return sum(seed["widths"][width].get(label, 0) for label in labels for seed in found) / len(found)
    lines = ["FVU by width: # is e_nl, = the rest of e, which is linear in x, | where the fitted curve ends"]
    widths = list(found[0]["widths"])
    floor = mean(widths[0], "curve: linear", "curve: nonlinear")
    unit = max(floor, *(mean(width, "FVU of e") for width in widths)) / 80
    for width in widths:
        whole, rest = mean(width, "FVU of e"), mean(width, "FVU of e_nl")
        bar = ["#" if i * unit < rest else "=" if i * unit < whole else " " for i in range(82)]
        if len(widths) > 2:
            bar[int(floor / unit)] = "|"
        lines.append(f"F {width:<7,} {''.join(bar).rstrip()} {whole:.4f}")
    return "\n".join(lines)


ERRORS = """\
e = x - x_hat, e_lin = its least-squares line in x, with a bias, ridge 1e-6; e_nl = e - e_lin.  Held-out text: lines
are fitted on {n_fit:,} tokens and measured, like all else, on {n_test:,} others; {left_out:.1%} were left out as sinks.
R2: pooled over dimensions unless said.  |x| alone: |x| and its square.  Gradient pursuit chooses codes anew, at each
token's L0.  CE, KL: nats a token; KL from the model's own predictions.  Curve: FVU = c + a F^-m; absent is a F^-m,
nonlinear the mean FVU of e_nl, linear c less that.  Seeds: {seeds}; ± is half the distance from least to most."""


# ----------------------------------------------------------------------------------------------------------
# Transparency: reasoning features, and what they are worth (arXiv 2506.09967 section 5)
# ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def reasoning_features(model, saes, prompt_ids, open_id, close_id, every=True):
    """The published rule on one prompt: latents active at <think> and at </think> and at no other token.

    saes        {layer: SAE}, each at the site that its meta names, else at resid
    prompt_ids  list of T ids; open_id, close_id: those of the two tags
    every       at every occurrence of both tags, or (False) at one of each at least; the text does not say which
    -> {layer: [latents]}.  Active is z != 0; at an attention sink no latent counts as active.  ValueError: no such tag
    """
    ids = torch.tensor([prompt_ids], device=model.lm_head.weight.device)                         # (1,T)
    opens, closes = ids[0] == open_id, ids[0] == close_id                                        # (T,)
    if not opens.any() or not closes.any():
        raise ValueError(f"the prompt has no {'</think>' if opens.any() else '<think>'}, where a feature should fire")
    found, at_tag = {}, torch.all if every else torch.any
    for layer, sae in saes.items():
        x = activations(model, ids, layer, sae.meta.get("site", "resid"))                        # (1,T,D)
        on = (sae.encode(x)[0] != 0) & ~is_sink(x, sae.meta.get("sink_norm")).T                  # (T,F)
        rule = at_tag(on[opens], 0) & at_tag(on[closes], 0) & ~on[~(opens | closes)].any(0)      # (F,)
        found[layer] = rule.nonzero()[:, 0].tolist()
    return found


def anova(groups, draws=10_000, seed=0):
    """Does the group matter?  Lists of numbers -> F of a one-way analysis of variance, its p by permutation.

    p is the share of `draws` random regroupings, the one seen among them, whose F is at least as large.
    """
    groups = [np.asarray(group, dtype=float) for group in groups]
    sizes, values = np.array([len(group) for group in groups]), np.concatenate(groups)           # (G,), (n,)
    if len(groups) < 2 or sizes.min() < 1 or len(values) <= len(groups):
        raise ValueError("an analysis of variance needs two groups, and two numbers in one of them")
    if not np.ptp(values):
        return 0.0, 1.0
    values = values - values.mean()
    shuffled = np.random.default_rng(seed).permuted(np.tile(values, (draws, 1)), axis=1)         # (draws,n)
    sums = np.add.reduceat(np.vstack([values, shuffled]), np.cumsum(sizes) - sizes, axis=1)      # (1+draws,G)
    between, whole = (sums**2 / sizes).sum(1), values @ values      # F grows with the part between groups
    within = max(0.0, whole - between[0])
    f = between[0] / (len(groups) - 1) / (within / (len(values) - len(groups))) if within > 1e-12 * whole else math.inf
    return float(f), float(np.mean(between >= between[0] - 1e-9 * whole))


def correlation(x, y, draws=10_000, seed=0):
    """Pearson's r of two lists, and its two-sided p by permutation.  A constant list has r = 0."""
    x, y = (np.asarray(side, dtype=float) - np.mean(side) for side in (x, y))                    # (n,)
    shuffled = np.random.default_rng(seed).permuted(np.tile(y, (draws, 1)), axis=1)              # (draws,n)
    products, scale = np.vstack([y, shuffled]) @ x, math.sqrt(x @ x * (y @ y))                  # (1+draws,)
    r, sizes = products[0] / scale if scale else 0.0, np.abs(products)
    return float(r), float(np.mean(sizes >= sizes[0] - 1e-9 * scale))


def mixture(x, weights, k=3, gain=1e-8):
    """k Gaussians fitted by EM to places x (n,), ascending, of these weights -> {"means", "shares", "sds"}.

    It starts at quantiles and ends when a step raises the mean log-likelihood by less than `gain` nats.  A variance
    is at least a thousandth of the whole.
    """
    x, w = np.asarray(x, dtype=float), np.asarray(weights, dtype=float)                          # (n,)
    if (w < 0).any() or (w > 0).sum() < k:
        raise ValueError(f"{k} components need as many places with a weight above 0")
    w = w / w.sum()
    mean = np.interp((np.arange(k) + 0.5) / k, np.cumsum(w) - w / 2, x)                          # (k,)
    whole = w @ (x - w @ x)**2
    share, variance, last = np.full(k, 1 / k), np.full(k, whole / k**2), -math.inf
    while True:
        log = np.log(share) - 0.5 * np.log(2 * np.pi * variance) - 0.5 * (x[:, None] - mean)**2 / variance      # (n,k)
        likelihood = np.logaddexp.reduce(log, 1)                                                 # (n,)
        if not w @ likelihood - last >= gain:                # nan ends it too
            return {"means": mean.tolist(), "shares": share.tolist(), "sds": np.sqrt(variance).tolist()}
        last, r = w @ likelihood, np.exp(log - likelihood[:, None]) * w[:, None]                 # whose is each x
        share = r.sum(0)
        mean = r.T @ x / share
        variance = np.maximum((r * (x[:, None] - mean)**2).sum(0) / share, whole / 1000)


# arXiv 2506.09967, Table 6: average Pass@1 of the best checkpoint, and reasoning features, of layers 2 .. 27 from 1.
SCORES = [47.84, 46.48, 47.11, 48.05, 46.59, 46.04, 45.69, 47.13, 46.58, 48.12, 47.60, 47.28, 45.48, 48.97, 46.67,
          48.09, 49.42, 47.66, 45.83, 47.90, 46.70, 46.07, 46.38, 48.46, 45.84, 47.59]
COUNTS = [1, 4, 3, 2, 2, 3, 0, 3, 3, 1, 1, 3, 3, 3, 0, 3, 0, 5, 3, 0, 1, 2, 2, 1, 2, 2]
# Its two fits: to the features of the base, whose counts are not given, and to the 26 scores.
FITS = [[4.9, 14.5, 22.7], [5.6, 15.1, 23.0]]


def published_again(draws=200):
    """The published check again: counts against scores, and the two mixtures against data without any structure.

    -> the table of the mixtures' means, what it says as sentences."""
    import eval
    layers, near, words = np.arange(2, 28), np.abs(np.subtract(*FITS)).mean(), []
    random = np.random.default_rng(0).poisson(2, (draws, len(layers)))
    lines = [["published: features of the base", *FITS[0]], ["published: scores", *FITS[1]]]
    for name, gain in (("to the end", 1e-8), ("until a step gains < 0.001", 1e-3)):
        fit = lambda weights: np.array(mixture(layers, weights, gain=gain)["means"])             # (3,)
        flat, null = fit(np.ones(len(layers))), np.array([fit(counts) for counts in random])     # (3,), (draws,3)
        means = {"every layer the same": flat, "Table 6 scores": fit(SCORES), "Table 6 counts": fit(COUNTS),
                 f"Poisson(2) counts, mean of {draws}": null.mean(0), "their standard deviation": null.std(0)}
        lines += [[f"EM {name}: {what}", *(f"{m:.1f}" for m in values)] for what, values in means.items()]
        words.append(f"{np.mean(np.abs(null - flat).mean(1) <= near):.0%} with EM {name}")
    r, p = correlation(COUNTS, SCORES)
    return eval.table(lines, ["means of 3 components, as layers", "1", "2", "3"]), [
        f"Features and scores of the paper's 26 layers (Table 6): r = {r:+.2f}, p = {p:.2f} by permutation.",
        f"The two published fits are {near:.2f} layers apart, on the mean of three.  Counts drawn from Poisson(2) come "
        f"as near to layers that are all the same in this share of draws: {', '.join(words)}.",
        "How the published fits were made is not said; a fit that stops early stays near its start, whatever the data."]


class Steered(nn.Module):
    """x with one latent changed at every token; the others and the SAE's error stay as they are.

    how  "ablate": x - strength z_f W_dec[f]        "boost": x + strength W_dec[f], strength in units of z
    """

    def __init__(self, sae, latent, how, strength):
        super().__init__()
        self.sae, self.latent, self.how, self.strength, self.meta = sae, latent, how, strength, sae.meta

    def forward(self, x):
        b = self.sae.batch(x)
        z = -column(self.sae.codes(b), self.latent) if self.how == "ablate" else b.x.new_ones(len(b.x))      # (N,)
        return x + (self.strength * z[:, None] * self.sae.W_dec[self.latent] * b.undo[1]).to(x.dtype).view_as(x)


@torch.no_grad()
def ask(model, tokenizer, problems, seed=0, max_new_tokens=96, prompt="{problem}"):
    """One graded answer to each problem, as rows of eval.py, with "thinks": is there any text before </think>?"""
    import eval
    from tqdm import tqdm
    sampling = dict(max_new_tokens=max_new_tokens, temperature=0.6, top_p=0.95)
    plan, ids_of = eval.make_plan(model, tokenizer, problems, 1, seed, sampling | {"label": "features"}, prompt)
    rows = eval.generate_rows(model, tokenizer, list(plan.values()), ids_of, tqdm(disable=True), right=0, done=0,
                              grader="resa", slots=128, **sampling)

    def thought(row):
        return (think_prefix(row["prompt"]) + row["completion"]).partition("<think>")[2].partition("</think>")[0]
    return [row | {"thinks": bool(thought(row).strip())} for row in rows]


@contextlib.contextmanager
def never_first(model, token):
    """Inside, no answer begins with this token.  The logits of a prefill are (P,V), those of a later step (S,1,V)."""
    def forbid(module, inputs, logits):
        if logits.dim() == 2:
            return logits.index_fill(-1, torch.tensor(token, device=logits.device), -math.inf)
    handle = model.lm_head.register_forward_hook(forbid)
    try:
        yield
    finally:
        handle.remove()


def attribute(model, sae, layer, documents, close_id):
    """documents [(prompt ids, answer ids)] -> rate, typical, attribution of each latent, (F,) each.

    rate, typical  share of the tokens where it fires, and its mean value there
    attribution    mean over documents of | sum over the prompt of z_f W_dec[f] . g |: to first order, what ablation
                   would do to the log odds of thinking, log (1 - p) / p with p = p(</think>) after the prompt
    """
    site, tokens, totals, caught = sae.meta.get("site", "resid"), 0, torch.zeros(3, sae.n_latents), []

    def leaf(x):
        caught.append(x.detach().requires_grad_())
        return caught[-1]
    for prompt, answer in documents:
        with hooked(model, layer, site, leaf):
            h = model.run(torch.tensor([prompt + answer], device=model.lm_head.weight.device))   # (1,T,D)
        logits = model.head(h[0, len(prompt) - 1]).float()                                       # (V,)
        odds = logits.index_fill(0, torch.tensor(close_id, device=h.device), -math.inf).logsumexp(0) - logits[close_id]
        g, x = torch.autograd.grad(odds, caught[-1])[0][0].float(), caught.pop().detach()        # (T,D), (1,T,D)
        b = sae.batch(x)
        z = dense(sae.codes(b)).float() * ~is_sink(x, sae.meta.get("sink_norm")).T               # (T,F)
        effect = (z * ((g * b.undo[1]) @ sae.W_dec.float().T)).sum(0).abs()                      # (F,)
        totals, tokens = totals + torch.stack([(z != 0).sum(0), z.sum(0), effect]).cpu(), tokens + len(z)
    fired, value, effect = totals
    return fired / tokens, value / fired.clamp(min=1), effect / len(documents)


def choose(rate, attribution, rule, top, seed):
    """-> {latent: names}: the `top` by attribution ("ranked"), the first `top` of `rule` ("rule"), and for each of them
    one at random ("random") of the 10 others that fire and whose rates are nearest to its own."""
    chosen, rng = {}, np.random.default_rng(seed)
    ranked = [f for f in attribution.argsort(descending=True, stable=True)[:top].tolist() if attribution[f] > 0]
    for name, latents in (("ranked", ranked), ("rule", rule[:top])):
        for latent in latents:
            chosen.setdefault(latent, []).append(name)
    for latent in list(chosen):
        near = (rate - rate[latent]).abs().argsort(stable=True).tolist()
        near = [f for f in near if f not in chosen and rate[f] > 0][:10]
        chosen |= {f: ["random"] for f in rng.permutation(near)[:1].tolist()}
    return chosen


def effects(model, tokenizer, sae, layer, train_rows, test_rows, rule=(), top=5, boost=1.0, seed=0, **asking):
    """What single latents do to the answers: each is ablated, then boosted, while the model answers.

    train_rows  questions on whose answers rates, typical values and attributions are measured
    test_rows   others, for the effects: differences from the model's own answers, paired by question, in [difference,
                low, high] of Pass@1 ("correct") and of the share of answers that think ("thinks")
    rule        latents to study beside the ranked ones, the first `top` of them
    boost       times a latent's typical value, added at every token
    asking      max_new_tokens, prompt: see `ask`
    -> {"base": {what: share}, "null": {how: {what: against_random}},
        "latents": [{"latent", "chosen", "rate", "typical", "attribution", how: {what: effect}}],
        "forced": {what: effect} of no latent, but of forbidding </think> as the first token: what is cheaply had}
    """
    close_id, = tokenizer.encode("</think>")
    documents = []
    for row in ask(model, tokenizer, train_rows, seed, **asking):
        start = "" if think_prefix(row["prompt"]) else "<think>\n"
        texts = row["prompt"] + start, row["completion"].removeprefix(start)
        documents.append([tokenizer.encode(text) for text in texts])
    rate, typical, attribution = attribute(model, sae, layer, documents, close_id)
    base, latents = ask(model, tokenizer, test_rows, seed, **asking), []
    with never_first(model, close_id):
        forced = difference(ask(model, tokenizer, test_rows, seed, **asking), base)
    for f, names in choose(rate, attribution, rule, top, seed).items():
        row = {"latent": f, "chosen": names, "rate": float(rate[f]), "typical": float(typical[f]),
               "attribution": float(attribution[f])}
        for how, strength in (("ablate", 1.0), ("boost", boost * row["typical"])):
            with splice(model, Steered(sae, f, how, strength), layer, sae.meta.get("site", "resid")):
                row[how] = difference(ask(model, tokenizer, test_rows, seed, **asking), base)
        latents.append(row)
    null = {how: {what: against_random(latents, how, what) for what in MEASURES} for how in ("ablate", "boost")}
    return {"base": {what: sum(row[what] for row in base) / len(base) for what in MEASURES}, "forced": forced,
            "latents": latents, "null": null}


MEASURES = {"correct": "Pass@1", "thinks": "thinks"}
FRESH = {"init": "scratch", "sae_from": "", "optimizer": "adam"}      # SAEs trained here, whatever the preset says
CHANGES = [(how, what) for how in ("ablate", "boost") for what in MEASURES]


def difference(rows, base):
    """Rows of `ask` -> {measure: [rows - base, low, high]}, paired by question."""
    import eval
    pairs = {what: eval.paired(*([row | {"correct": row[what]} for row in side] for side in (rows, base)))
             for what in MEASURES}
    return {what: [pair["difference"], *pair["interval"]] for what, pair in pairs.items()}


def against_random(latents, how, what):
    """-> {"ranked", "rule", "random": [latent, effect] of the strongest, or None; "ranked_p", "ranked_more", ..}

    p of whether the sizes of the effects differ between this group and the random one, and whether they are larger on
    the mean; None without two random ones."""
    found, sizes = {}, {}
    for name in ("ranked", "rule", "random"):
        group = [[row["latent"], row[how][what][0]] for row in latents if name in row["chosen"]]
        found[name], sizes[name] = max(group, key=lambda one: abs(one[1]), default=None), [abs(d) for _, d in group]
    for name in ("ranked", "rule"):
        enough = sizes[name] and len(sizes["random"]) > 1
        found[f"{name}_p"] = anova([sizes[name], sizes["random"]])[1] if enough else None
        found[f"{name}_more"] = bool(np.mean(sizes[name]) > np.mean(sizes["random"])) if enough else None
    return found


@dataclass
class Features:
    """Reasoning features of every layer by the published rule, and what single latents do to the answers."""
    preset: str = "tiny"                 # bundle of defaults
    model: str = ""                      # model spec that is studied; default: the preset's target
    source: str = ""                     # model spec whose activations the SAEs learn, without --sae
    sae: list[str] = field(default_factory=list)      # DIR_OR_HUB_ID[#HOOKPOINT], one a layer; default: trained here
    layers: list[int] = field(default_factory=list)   # decoder blocks to train SAEs of, from 0; default: all
    site: Literal["resid", "mlp"] = "resid"      # output of a block, or of its MLP
    steps: int = 100                     # optimizer steps of an SAE
    batch: int = 8                       # chunks in a step
    lr: float = 5e-3                     # of Adam, linear to 0 over the last fifth
    data: str = ""                       # JSONL of problem/answer: to train SAEs, and to rank latents by attribution
    bench: str = ""                      # what effects are measured on: a name of eval.py --bench, or a file
    questions: int = 300                 # of each of the two
    prompt: str = ""                     # text with both tags, for the rule; default: 20 of --bench, answer in tags
    every: bool = True                   # the rule asks for every occurrence of a tag; --no-every: for one of each
    top: int = 5                         # latents a layer by attribution, as many by the rule, a random one for each
    boost: float = 1.0                   # what is added at every token, in typical values of the latent
    max_new_tokens: int = 2048           # of an answer
    seed: int = 0                        # of SAEs, samples and random latents
    dtype: Literal["float32", "bfloat16"] = "float32"      # of the language model
    device: str | None = None            # cpu, cuda, cuda:1, ...; default: cuda where there is one
    out: str = ""                        # run directory, with a folder for every SAE; default out/PRESET/features
    workers: int = 2                     # layers at a time, one core each
    published: bool = False              # only redo the published statistics, from its Table 6


def features(argv):
    """`python resa.py features`: the rule, then ablation and boosting, layer by layer."""
    import train
    args = parse_flags(Features, argv, "resa.py features")
    if args.published:
        train.refuse_idle(args, " ".join(sorted(args.given - {"published"})), "--published, which runs no model")
        table, words = published_again()
        return print("\n".join([table, "", *words]))
    print(f"{features_table(study_layers(args), args)}\n\n{args.out}")


def study_layers(args):
    """Settings of `features` -> {layer: study_features}, and the same in its run directory."""
    import train
    if args.sae:
        train.refuse_idle(args, "source layers site steps batch lr", "--sae, which says what to study")
    if not args.prompt:
        train.refuse_idle(args, "every", "questions as prompts, where a tag occurs once")
    at_least(args, steps=1, batch=1, questions=2, top=1, boost=0, max_new_tokens=1, workers=1, seed=0)
    train.check("," not in args.bench, f"--bench {args.bench}: features takes one")
    args.model, args.out = args.model or PRESETS[args.preset]["target"], args.out or f"out/{args.preset}/features"
    args.device = train.prepare("sae", stage_flags(args, args.seed, layer=0, **FRESH)).device
    config, specs = Config.from_pretrained(args.model), {}
    for spec in args.sae:
        sae = train.open_sae(spec)
        layer = sae.meta.get("layer")
        train.check(layer is not None, f"{spec}: its file does not say which layer it belongs to")
        train.check(layer not in specs, f"--sae: two of layer {layer}; study one at a time")
        train.check(sae.d_in == config.hidden_size, f"{spec}: {sae.d_in} wide, {args.model} is {config.hidden_size}")
        specs[layer] = spec
    count = config.num_hidden_layers
    layers = sorted(set(specs or args.layers or range(count)))
    train.check(set(layers) <= set(range(count)), f"{args.model} has layers 0 .. {count - 1}, asked for are {layers}")
    material(args)                                             # bad settings end here, before anything is written
    open_run(args.out, args)
    jobs = {layer: (study_features, args, layer, specs.get(layer)) for layer in layers}
    found = dict(sorted(in_workers(jobs, args.workers, "layers")))
    with staged(args.out) as temporary:
        (temporary / "table.txt").write_text(features_table(found, args) + "\n")
        (temporary / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def material(args):
    """-> tokenizer, rows to rank on, rows to measure on, prompts for the rule (ids), the two tags (ids).

    The published system prompt is not here.  By default: text as SAEs learn it, questions with gold answers.
    """
    import eval
    import train
    tokenizer = load_tokenizer(args.model)
    data, (bench, _) = read_problems(train.data_file(args.data)), eval.read_bench(args.bench)
    for rows, name in ((data, args.data), (bench, args.bench)):
        train.check(args.questions <= len(rows), f"--questions {args.questions}: {name} has {len(rows)}")
    texts = [args.prompt] if args.prompt else [train.as_text(row, tokenizer, "chat") for row in bench[:20]]
    prompts, tags = (list(map(tokenizer.encode, some)) for some in (texts, ("<think>", "</think>")))
    train.check(all(len(tag) == 1 for tag in tags), f"{args.model}: <think> and </think> are not single tokens of it")
    train.check(all(tag[0] in ids for tag in tags for ids in prompts), "--prompt needs <think> and </think> in it")
    return tokenizer, data[:args.questions], bench[:args.questions], prompts, sum(tags, [])


def study_features(args, layer, spec):
    """One layer -> what the rule finds, and `effects` of what it finds most often.  In a worker.

    "prompts", "count" latents a prompt, mean;  "rule" {latent: number of prompts}, most often first"""
    import eval
    import train
    torch.set_num_threads(1)
    if spec is None:
        spec = f"{args.out}/sae-{layer}"
        train.run_sae(train.prepare("sae", stage_flags(args, args.seed, layer=layer, out=spec, **FRESH)))
    sae = train.open_sae(spec).to(args.device).float().requires_grad_(False)
    model = load_model(args.model, args.dtype, args.device)
    tokenizer, data, bench, prompts, tags = material(args)
    found = [reasoning_features(model, {layer: sae}, ids, *tags, args.every)[layer] for ids in prompts]
    rule = dict(Counter(f for one in found for f in one).most_common())
    return {"prompts": len(prompts), "count": sum(rule.values()) / len(prompts), "rule": rule} | effects(
        model, tokenizer, sae, layer, data, bench, list(rule), args.top, args.boost, args.seed,
        max_new_tokens=args.max_new_tokens, prompt=eval.BENCHES.get(args.bench, "{problem}"))


def features_table(found, args):
    """{layer: study_features} -> a table per layer, one that sets them against random latents, and what they say."""
    import eval
    parts, base = [], next(iter(found.values()))["base"]
    for layer, study in found.items():
        rows = [[row["latent"], " ".join(row["chosen"]), f"{row['rate']:.1%}", f"{row['attribution']:.3f}",
                 *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[how][what]) for how, what in CHANGES)]
                for row in study["latents"] if "random" not in row["chosen"]]
        every = sum(n == study["prompts"] for n in study["rule"].values())
        parts += [f"Layer {layer}: by the rule {study['count']:.1f} latents a prompt, {len(study['rule'])} in at least "
                  f"one of {study['prompts']}, {every} in all.", eval.table(rows, FEATURES_HEADER), ""]
    lines, words = strongest_effects(found)
    return "\n".join([*parts, STRONGEST, eval.table(lines, STRONGEST_HEADER), "", *words, "",
                      FEATURES_NOTE.format(**vars(args) | base)])


def strongest_effects(found):
    """{layer: study_features} -> lines of the table that sets each group against random latents, the same in words."""
    lines, words, most = [], [], {}
    for layer, study in found.items():
        for how, what in CHANGES:
            null = study["null"][how][what]
            cell = {name: f"{x[1]:+.3f} ({x[0]})" if isinstance(x, list) else f"{x:.4f}"
                    for name, x in null.items() if x is not None and not name.endswith("_more")}
            lines.append([f"{layer} {how}", MEASURES[what]]
                         + [cell.get(name, "") for name in ("ranked", "ranked_p", "rule", "rule_p", "random")])
            for name in ("ranked", "rule", "random"):
                if null[name]:
                    one = abs(null[name][1]), f"{null[name][1]:+.3f} ({how} {null[name][0]} of layer {layer})"
                    most[what, name] = max(one, most.get((what, name), one))
    for what, measure in MEASURES.items():
        null = most.get((what, "random"), (0.0, "none"))
        told = [f"{name} {most[what, name][1]}, {'' if most[what, name][0] > null[0] else 'not '}stronger"
                for name in ("ranked", "rule") if (what, name) in most]
        words.append(f"Strongest on {measure}: " + "; ".join([f"random {null[1]}", *told]) + ".")
    cases = [study["null"][how][what] for study in found.values() for how, what in CHANGES]
    for name in ("ranked", "rule"):
        known = [(null[f"{name}_p"], null[f"{name}_more"]) for null in cases if null[f"{name}_p"] is not None]
        more, less = (sum(p < 0.05 and larger == way for p, larger in known) for way in (True, False))
        words.append(f"The {name} against the random ones: larger effects in {more}, smaller in {less} of {len(known)} "
                     "cases (p < 0.05 each, not corrected for their number).")
    forced = next(iter(found.values()))["forced"]
    words.append("No latent touched, </think> forbidden as the first token: " + ", ".join(
        "{} {:+.3f} [{:+.3f}, {:+.3f}]".format(measure, *forced[what]) for what, measure in MEASURES.items()) + ".")
    return lines, words


STRONGEST = "The strongest effect of each group (its latent), and p of the group against random ones"
STRONGEST_HEADER = ["layer", "on", "ranked", "p", "rule", "p", "random"]
FEATURES_HEADER = ["latent", "chosen", "fires", "attribution", "ablated: Pass@1", "thinks", "boosted: Pass@1", "thinks"]
FEATURES_NOTE = """\
The model alone: Pass@1 {correct:.3f}, thinks {thinks:.3f}, the share of answers with text before </think>; {questions}
held-out questions x 1.  Effects are differences from that, paired by question, same random numbers, 95 % intervals.
ablated: z W_dec is taken out where the latent fires.  boosted: {boost:g} x its mean value is added at every token.
ranked: by first-order attribution to the odds of thinking, on {questions} training questions.  rule: active at <think>
and </think> and at no other token of a prompt.  random: one for each of these, of about the same firing rate.
p: whether the sizes of the effects differ, by permutation; not corrected for the number of comparisons.  That the
strongest was looked for is allowed for: the random ones, at least as many, were searched in the same way."""


# ----------------------------------------------------------------------------------------------------------
# Tunable experts: which of them a behaviour uses, and what it is without them (MoTE, arXiv 2502.11096)
# ----------------------------------------------------------------------------------------------------------

def routers(model):
    """{layer: the router of the experts of block `layer`}.  ValueError: the model has none."""
    found = {i: block.mlp.gate for i, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")}
    if not found:
        raise ValueError("this model has no experts: a Qwen2-MoE is needed")
    return found


@torch.no_grad()
def expert_use(model, sequences, spans, batch=32):
    """fTRI, the read-out of MoTE: how often each routed expert was chosen -> counts (P,L,E), L layers with experts.

    sequences  lists of ids;  spans [(start, stop)] the positions to count in each.  A row of a layer sums to K times
    the length of the span, as every token chooses K experts.  The paper counts all tokens of the prompt.
    """
    seen, gates, counts = {}, routers(model), []
    handles = [gate.register_forward_hook(lambda module, inputs, out, layer=layer: seen.update({layer: out[1]}))
               for layer, gate in gates.items()]
    try:
        for i in range(0, len(sequences), batch):
            ids, _ = right_pad(sequences[i:i + batch], device=model.lm_head.weight.device)      # (B,T)
            start, stop = torch.tensor(spans[i:i + batch], device=ids.device).T[..., None]       # (B,1) each
            at = torch.arange(ids.shape[1], device=ids.device)
            inside = ((at >= start) & (at < stop)).float()                                       # (B,T)
            model.run(ids)
            chosen = [F.one_hot(seen[layer].view(*ids.shape, -1), len(gate.weight)).sum(2).float()
                      for layer, gate in gates.items()]                                          # (B,T,E) each
            counts.append(torch.stack([(inside[..., None] * c).sum(1) for c in chosen], 1).cpu())      # (B,L,E)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(counts)


def distinctive(counts, lengths, target, score="rate", permutations=1000, seed=0):
    """How distinctive of the target prompts each expert is -> scores (L,E), p (L,E).

    counts (P,L,E), lengths (P,) in tokens, target (P,) bool.  Score: the mean over target prompts less that over the
    others.  Resa: MoTE takes means of the counts, which grow with the length of a prompt: "sum"; "rate" divides by it.
    p is the share of shuffled labels under which some expert, of all of them, scores as high.
    """
    y = (counts / lengths[:, None, None] if score == "rate" else counts).flatten(1).double()     # (P,L*E)
    rng = torch.Generator().manual_seed(seed)
    labels = [target] + [target[torch.randperm(len(target), generator=rng)] for _ in range(permutations)]
    weight = torch.stack(labels).double()                                                        # (R,P)
    weight = weight / target.sum() - (1 - weight) / (~target).sum()
    scores = weight @ y                                                                          # (R,L*E)
    highest = scores.amax(1)
    p = (highest[:, None] >= scores[0] - 1e-12).double().mean(0)          # the one seen is one of them
    return scores[0].view(counts.shape[1:]).float(), p.view(counts.shape[1:]).float()


def edited(router, x, choice, off, on, mode):
    """A router's choice for x (N,D), weight and expert (N,K) each, with experts `off` and `on`, numbers (M,) each."""
    weight, expert = choice
    if len(on) or (len(off) and mode == "mask"):
        logits = at_least_fp32(F.linear(x, router.weight)).log_softmax(-1)                       # (N,E)
        logits[:, on] = logits.amax(-1, keepdim=True) + 0.01
        if mode == "mask":
            logits[:, off] = -math.inf
        weight, expert = router.choose(logits)
    if len(off) and mode != "mask":
        gone = torch.isin(expert, off)                                                           # (N,K)
        kept = weight.masked_fill(gone, 0)
        if mode == "rescale":      # a token that uses none of them keeps its bits; one that loses all has nothing left
            scaled = kept * (weight.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-9))
            kept = torch.where(gone.any(-1, keepdim=True), scaled, kept)
        weight = kept
    return weight.to(choice[0].dtype), expert


@contextlib.contextmanager
def experts_edited(model, off=(), on=(), mode="rescale"):
    """Inside, experts [(layer, expert), ..] are switched off, or forced on, for every token, cached or not.

    off, mode="rescale"  weight 0, the token's other chosen experts share what it had; the nearest to MoTE's description
         mode="zero"     weight 0, and no one takes its share
         mode="mask"     logit -inf before the choice: another expert moves up.  Without norm_topk_prob, as published
                         Qwen2-MoE models are, this also rescales the weights of tokens that never chose the expert
    on                   its log-probability becomes the highest one + 0.01 (SteerMoE, arXiv 2509.09660): always chosen
    ValueError: no such expert, one both off and on, more forced on in a layer than a token uses, none left in one.
    """
    gates, handles = routers(model), []
    wanted = {layer: ([e for at, e in off if at == layer], [e for at, e in on if at == layer])
              for layer in dict.fromkeys(layer for layer, _ in [*off, *on])}
    for layer, (gone, forced) in wanted.items():
        count = len(gates[layer].weight) if layer in gates else 0
        for e in gone + forced:
            if not 0 <= e < count:
                raise ValueError(f"expert {e} of layer {layer}: " + (f"that layer has 0 .. {count - 1}" if count else
                                 f"layers with experts are {', '.join(map(str, gates))}"))
        if set(gone) & set(forced):
            raise ValueError(f"layer {layer}: expert {min(set(gone) & set(forced))} cannot be both off and on")
        if len(set(forced)) > gates[layer].top_k or len(set(gone)) == count:
            raise ValueError(f"layer {layer}: of {count} experts, at most {gates[layer].top_k} can be forced on (a "
                             f"token uses no more), and at most {count - 1} be off")
    if mode not in ("rescale", "zero", "mask"):
        raise ValueError(f"off {mode!r} is not one of rescale, zero, mask")
    try:
        for layer, numbers in wanted.items():
            edit = [torch.tensor(some, dtype=torch.long, device=gates[layer].weight.device) for some in numbers]
            handles.append(gates[layer].register_forward_hook(
                lambda router, inputs, choice, edit=edit: edited(router, inputs[0], choice, *edit, mode)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Experts:
    """Finds the experts that a behaviour uses, switches them off, or on, and random ones beside them."""
    preset: str = "tiny"                 # bundle of defaults
    model: str = ""                      # spec of a Qwen2-MoE
    data: str = ""                       # JSONL of problem/answer to find the experts on
    held: str = ""                       # JSONL of problem/answer to measure on
    behaviour: str = ""                  # regular expression: an answer in which it is found shows the behaviour
    find: int = 1000                     # questions of --data to use, the first ones
    questions: int = 1000                # questions of --held to use, the first ones
    tokens: Literal["prompt", "last", "answer"] = "prompt"      # where choices are counted; published: the prompt
    score: Literal["rate", "sum"] = "rate"      # difference per token, or of the published sums over tokens
    off: Literal["rescale", "zero", "mask"] = "rescale"      # what off means
    counts: list[int] = field(default_factory=lambda: [1, 2, 5, 10])      # how many experts
    draws: int = 5                       # sets of random experts for each count, matched on layer and usage
    permutations: int = 1000             # of the labels, for p
    temperature: float = 0.6             # of all answers
    max_new_tokens: int = 96             # length limit of an answer
    seed: int = 0                        # of answers, permutations and random experts
    dtype: Literal["float32", "bfloat16"] = "float32"      # of the model
    device: str = "cpu"                  # cpu, cuda, cuda:1, ...
    out: str = ""                        # run directory; default out/PRESET/experts
    workers: int = 2                     # settings measured at a time, one core each; on a GPU: 1
    quick: bool = False                  # 100 questions, one count: shows that it runs, not what it is worth


def experts(argv):
    """`python resa.py experts`: classes by the answers, experts by the classes, every edit on held-out questions."""
    import train
    args = parse_flags(Experts, argv, "resa.py experts")
    if args.quick:
        train.refuse_idle(args, "find questions counts draws", "--quick, which sets them")
        args.find, args.questions, args.counts, args.draws = 100, 100, [1], 1
    train.check(args.model and args.data and args.held and args.behaviour,
                "resa.py experts needs --model, --data, --held and --behaviour; preset tiny has all four")
    at_least(args, find=2, questions=2, draws=1, permutations=1, workers=1, max_new_tokens=1, temperature=0, seed=0)
    train.check(min(args.counts) > 0, "--counts must be above 0")
    try:
        re.compile(args.behaviour)
    except re.error as error:
        raise ValueError(f"--behaviour {args.behaviour}: not a regular expression ({error})") from None
    config = Config.from_pretrained(args.model)
    total = config.num_experts * sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    train.check(total, f"{args.model}: this model has no experts, a Qwen2-MoE is needed")
    train.check(max(args.counts) < total, f"--counts {max(args.counts)}: the model has {total} experts")
    read_problems(args.data), read_problems(args.held)         # bad files end here, before anything is written
    args.out = args.out or f"out/{args.preset}/experts"
    open_run(args.out, args)
    began, found = time.perf_counter(), find_experts(args)
    edits = plan_edits(args, found)
    jobs = {name: (answers, args, name, edit) for name, edit in edits.items()}
    rows = dict(in_workers(jobs, args.workers, "settings"))
    text = describe_experts(args, found, edits, rows)
    with staged(args.out) as temporary:
        (temporary / "table.txt").write_text(text + "\n")
        (temporary / "edits.json").write_text(json.dumps(edits, indent=1) + "\n")
    print(f"\n{text}\n\n{args.out}: answers, edits and this table; {time.perf_counter() - began:.0f} s in all")


def answers(args, name, edit, seed=None, questions=None):
    """The model's answers to held-out questions under an edit {"off", "on"} -> eval's rows.  Runs in a worker."""
    import eval
    if args.device == "cpu":
        torch.set_num_threads(1)
    model = load_model(args.model, args.dtype, args.device)
    questions = read_problems(args.held)[:args.questions] if questions is None else questions
    with experts_edited(model, mode=args.off, **edit):
        return eval.evaluate(model, load_tokenizer(args.model), questions, f"{args.out}/answers/{slug(name)}.jsonl",
                             temperature=args.temperature, max_new_tokens=args.max_new_tokens, label=name, fresh=True,
                             seed=args.seed if seed is None else seed, slots=128)


def shows(args, rows):
    """{problem id: whether the answer shows the behaviour}."""
    return {row["id"]: bool(re.search(args.behaviour, row["completion"])) for row in rows}


def find_experts(args):
    """What the unedited model does on --data -> scores, p, rates of each expert; and the classes of --held, by id.

    The held-out classes come from one sample and the row "unedited" from another: a class defined by the very answers
    that are measured would be all of one kind by construction.
    """
    import train
    questions, tokenizer = read_problems(args.data)[:args.find], load_tokenizer(args.model)
    rows = answers(args, "find", {}, questions=questions)
    target = torch.tensor([*shows(args, rows).values()])
    train.check(0 < target.sum() < len(target), f"of {len(target)} answers to {args.data}, {int(target.sum())} show "
                f"the behaviour: there must be some that do and some that do not")
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    whole = [p + tokenizer.encode(row["completion"]) for p, row in zip(prompts, rows)]
    spans = {"prompt": lambda p, w: (0, len(p)), "last": lambda p, w: (len(p) - 1, len(p)),
             "answer": lambda p, w: (len(p), max(len(w), len(p) + 1))}[args.tokens]
    model, spans = load_model(args.model, args.dtype, args.device), [spans(p, w) for p, w in zip(prompts, whole)]
    counts, lengths = expert_use(model, whole, spans), torch.tensor([stop - start for start, stop in spans]).float()
    score, p = distinctive(counts, lengths, target, args.score, args.permutations, args.seed)
    rate = counts / lengths[:, None, None]
    held = shows(args, answers(args, "classes", {}, seed=args.seed + 1))
    train.check(0 < sum(held.values()) < len(held), f"{sum(held.values())} of {len(held)} answers to {args.held} show "
                "the behaviour: there must be some that do and some that do not")
    return {"score": score, "p": p, "rate": rate[target].mean(0), "rest": rate[~target].mean(0), "usage": rate.mean(0),
            "n": [int(target.sum()), int((~target).sum())], "layers": list(routers(model)), "held": held,
            "top_k": next(iter(routers(model).values())).top_k}


def plan_edits(args, found):
    """{name: {"off" or "on": [(layer, expert), ..]}}: none; for each count top ones off, random ones off, top on."""
    n_experts = found["score"].shape[1]
    best = [(i // n_experts, i % n_experts) for i in found["score"].flatten().argsort(descending=True).tolist()]
    named = lambda edit: [(found["layers"][i], e) for i, e in edit]
    fits = [at for rank, at in enumerate(best) if sum(i == at[0] for i, _ in best[:rank]) < found["top_k"]]
    edits, rng = {"unedited": {}}, torch.Generator().manual_seed(args.seed)
    for n in args.counts:
        edits[f"top {n} off"] = {"off": named(best[:n])}
        for draw in range(args.draws):
            others = named(matched(best[:n], found["usage"], rng))      # fewer, where the top ones fill a layer
            edits[f"random {len(others)} off, {draw}"] = {"off": others}
        if n <= len(fits):      # of a layer, no more can be on than a token uses
            edits[f"top {n} on"] = {"on": named(fits[:n])}
    return edits


def matched(chosen, usage, rng, nearest=4):
    """For each chosen (layer, expert) another one of its layer, drawn from the `nearest` in usage (L,E)."""
    taken = set(chosen)
    for layer, e in chosen:
        others = [o for o in (usage[layer] - usage[layer, e]).abs().argsort().tolist() if (layer, o) not in taken]
        if others:              # else the layer is used up: one control less
            taken.add((layer, others[int(torch.randint(min(nearest, len(others)), (), generator=rng))]))
    return [at for at in taken if at not in chosen]


def describe_experts(args, found, edits, rows):
    """The top experts, a row for every kind of edit (the draws of random ones pooled), and in words what they show."""
    import eval
    n_experts, target = found["score"].shape[1], {key for key, shown in found["held"].items() if shown}
    order = found["score"].flatten().argsort(descending=True)[:max(args.counts)].tolist()
    top = [[f"{found['layers'][i // n_experts]}.{i % n_experts}",
            *(format(found[key].flatten()[i].item(), form) for key, form in COLUMNS.values())] for i in order]
    groups = {}      # kind of edit -> samples: behaviour and right answers, on target questions and on the rest
    for name in edits:
        sides = groups.setdefault(name.split(",")[0], {head: [] for head in GROUPS})
        for row, shown in zip(rows[name], shows(args, rows[name]).values()):
            on = "target" if row["id"] in target else "rest"
            sides[f"{on} shows it"].append(row | {"correct": shown})
            sides[f"{on} right"].append(row)
    lines = [[name, *(cell for head, change in GROUPS.items()
                      for cell in cells(sides[head], groups["unedited"][head])[:4 if change else 2])]
             for name, sides in groups.items()]
    header = ["experts", *(cell for head, change in GROUPS.items()
                           for cell in (head, "95% CI", "change", "95% CI")[:4 if change else 2])]
    sizes = {"n_target": len(target), "n_rest": len(found["held"]) - len(target)}
    return "\n".join([eval.table(top, ["layer.expert", *COLUMNS]), "",
                      eval.table(lines, header), "",
                      FOUND.format(**vars(args) | sizes, n_find=sum(found["n"]), n_shown=found["n"][0])])


def cells(rows, first):
    """A rate with its interval, and the paired difference from the unedited model's."""
    import eval
    s, pair = eval.summarize(rows), eval.paired(rows, first)
    return [f"{s['pass@1']:.3f}", "[{:.3f}, {:.3f}]".format(*s["interval"]), f"{pair['difference']:+.3f}",
            bracket(pair)]


# What is measured of each edit, and whether its change from the unedited model is printed too.
GROUPS = {"target shows it": True, "target right": False, "rest shows it": False, "rest right": True}
COLUMNS = {"in target": ("rate", ".3f"), "in the rest": ("rest", ".3f"), "score": ("score", "+.3f"), "p": ("p", ".3f")}

FOUND = """\
Experts were found on {n_find} questions, of which the model showed the behaviour on {n_shown}: uses a token,
over tokens "{tokens}", score "{score}"; p: the chance that any expert scores as high under shuffled labels
({permutations} of them).  Measured on {n_target} other questions on which it shows the behaviour (target), and on
{n_rest} on which it does not (rest).  off = {off}.  Random: {draws} draws, matched on layer and usage, pooled;
intervals cover questions, not other draws.  One sample a question, temperature {temperature}; behaviour:
{behaviour} occurs in the answer."""


# ----------------------------------------------------------------------------------------------------------
# What it took, beside RL
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Cost:
    """What SAE-Tuning took beside RL, from the summary.json of three runs; FLOPs as train.training_flops has them."""
    sae: str = "out/tiny/sae"            # run directory of --stage sae
    tune: str = "out/tiny/adapter"       # of --stage tune
    rl: str = "out/tiny/rl"              # of --stage rl; the default falls back on what data/tiny/rl notes of its run


def cost(argv):
    import eval
    args = parse_flags(Cost, argv, "resa.py cost")
    if "rl" not in args.given and not Path(args.rl, "summary.json").exists():
        args.rl = f"{TINY}/rl"
    runs = {name: read_summary(getattr(args, stage), stage) for stage, name in
            (("sae", "SAE"), ("tune", "adapter"), ("rl", "RL"))}
    print(eval.table(cost_table(runs), COST_HEADER) + "\n")
    print("An RL run that made the SAE's source, as that of preset tiny, is not in SAE-Tuning's row.")
    machines = {name: run.get("device", "not noted") for name, run in runs.items()}
    if len(set(machines.values())) > 1:
        where = "; ".join(f"{name}: {machine}" for name, machine in machines.items())
        print(f"Not all made on one machine, as far as is noted ({where}):\nthe seconds do not compare.")
    print(f"RL is that of {relative(args.rl)}.")


def read_summary(directory, stage):
    path = Path(directory, "summary.json")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; python train.py --stage {stage} --out {directory} makes it")
    found = read_json(path)
    check_shape(found, {"seconds": NUMBER, "tokens?": NUMBER, "flops?": NUMBER, "device?": str}, path)
    return found


def cost_table(runs):
    """{run: its summary} -> lines of a table; what a summary does not say is a "?", and so is what rests on it."""
    units = {"seconds": ",.1f", "tokens": ",.0f", "flops": ".3g"}
    sae, adapter, rl = ({unit: run.get(unit, math.nan) for unit in units} for run in runs.values())
    both = {unit: sae[unit] + adapter[unit] for unit in units}
    rows = {"SAE": sae, "adapter": adapter, "SAE-Tuning, both": both, "RL": rl}
    cells = [[name, *(format(row[unit], form) for unit, form in units.items())] for name, row in rows.items()]
    cells.append(["SAE-Tuning / RL", *(f"{both[unit] / (rl[unit] or math.nan):.3f}" for unit in units)])
    return [[cell.replace("nan", "?") for cell in row] for row in cells]


COST_HEADER = ["", "seconds", "tokens", "FLOPs"]


# ----------------------------------------------------------------------------------------------------------
# Something to look at: features over an answer, and results, each as one page that needs nothing else
# ----------------------------------------------------------------------------------------------------------

@dataclass
class View:
    """Writes one HTML page: an answer token by token, and the features of an SAE that are active in it."""
    preset: str = "tiny"                 # bundle of defaults
    model: str = ""                      # model spec that answers; default: the preset's source
    sae: str = ""                        # DIR_OR_HUB_ID[#HOOKPOINT]; default out/PRESET/sae
    layer: int = 1                       # decoder block, counted from 0, where the SAE's file does not say it
    site: Literal["resid", "mlp"] = "resid"      # output of the block, or of its MLP, where the file does not say it
    prompt: str = ""                     # what the user asks; default: the first of data/tiny/test.jsonl
    max_new_tokens: int = 2048           # length limit of the answer
    temperature: float = 0.6             # 0 is greedy
    seed: int = 0                        # of the sample
    data: str = ""                       # text in which examples of each feature are looked for
    template: Literal["chat", "resa"] = "chat"      # of that text, as in train.py
    seq_len: int = 256                   # tokens in a chunk of it
    chunks: int = 64                     # how many chunks are looked through, the first ones
    dtype: Literal["float32", "bfloat16"] = "float32"      # of the language model
    device: str | None = None            # cpu, cuda, ...; default: cuda where there is one
    out: str = ""                        # the page; default out/PRESET/view.html


def view(argv):
    """`python resa.py view`: asks the model, reads its answer through the SAE, writes the page."""
    import train
    args = parse_flags(View, argv, "resa.py view")
    args.model, args.out = args.model or PRESETS[args.preset]["source"], args.out or f"out/{args.preset}/view.html"
    train.choose_device(args)
    at_least(args, max_new_tokens=1, temperature=0, seed=0, seq_len=2, chunks=1)
    check_page(args.out)
    train.check("prompt" not in args.given or args.prompt.strip(), "--prompt is empty: there is nothing to answer")
    train.check(args.temperature or "seed" not in args.given, "--seed has no effect with --temperature 0")
    model, tokenizer = load_model(args.model, args.dtype, args.device), load_tokenizer(args.model)
    sae = placed_sae(args, model)
    chunks = train.load_chunks(args, tokenizer, model)[:args.chunks].to(args.device)             # (C,T)
    asked = args.prompt or read_problems(TINY / "test.jsonl")[0]["problem"]
    prompt, answer, finish = answer_once(model, tokenizer, asked, args)
    reasoning = reasoning_in_prompt(model, tokenizer, sae, asked, answer)
    data = view_data(model, tokenizer, sae, prompt + answer, len(prompt), chunks, reasoning)
    named = {"model": args.model, "sae": args.sae or f"out/{args.preset}/sae", "examples_from": args.data}
    write_page(args.out, "view.html", data | {k: relative(v) for k, v in named.items()} | {"finish": finish})
    print(f"{args.out}: {len(answer)} tokens of answer, {data['n_features']:,} of {sae.n_latents:,} features "
          f"active, {len(reasoning)} reasoning features, {Path(args.out).stat().st_size / 1e6:.1f} MB")


def placed_sae(args, model):
    """--sae in fp32, with layer and site in its meta: from its file, which --layer and --site may not contradict."""
    import train
    sae = train.fitting_sae(args, model).float()
    for name in ("layer", "site"):
        if name not in args.given:
            setattr(args, name, sae.meta.get(name, getattr(args, name)))
    train.refuse_other_site(sae, args)
    site_module(model, args.layer, args.site)                  # a layer that is not there ends here
    sae.meta |= {"layer": args.layer, "site": args.site}
    return sae


def answer_once(model, tokenizer, asked, args):
    """One sample, that of eval.py for its first problem with this seed -> ids of the prompt and the answer, its end."""
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": asked}]))
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(f"--prompt makes {len(prompt)} tokens, and the model has {room + len(prompt)} positions")
    done, = collect(model, [(prompt, (args.seed, 0, 0))], max_new_tokens=min(args.max_new_tokens, room),
                    temperature=args.temperature, stop_ids=tokenizer.eos_ids)
    return prompt, *done


def reasoning_in_prompt(model, tokenizer, sae, asked, answer):
    """The reasoning features of one SAE, from the question with the model's own answer (ids) between the think tags."""
    import eval
    import train
    think = [tokenizer.fast.token_to_id(word) for word in ("<think>", "</think>")]
    if None in think:
        return []
    row = {"problem": asked, "answer": eval.extract_answer(tokenizer.decode(answer)) or ""}
    ids, layer = tokenizer.encode(train.as_text(row, tokenizer, "chat")), sae.meta["layer"]
    return reasoning_features(model, {layer: sae}, ids, *think)[layer]


@torch.no_grad()
def active_codes(sae, x):
    """x (B,T,D) -> token (M,) of B*T, latent (M,) and code (M,) wherever a code is not 0, by token; sinks have none."""
    keep, found = (~is_sink(x, sae.meta.get("sink_norm"))).flatten().nonzero()[:, 0], []
    for some in keep.split(256):                     # dense codes of 65,536 latents: 64 MB at a time
        z = sae.encode(x.flatten(0, 1)[some].float())                                            # (256,F)
        token, latent = z.nonzero(as_tuple=True)
        found.append((some[token], latent, z[token, latent]))
    return [torch.cat(parts) for parts in zip(*found)]


def strongest(group, value, n):
    """group, value (M,) -> where the n largest values, by size, of each group are, and each one's rank in it."""
    order = value.abs().argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    rank = torch.arange(len(order), device=group.device) - torch.searchsorted(group[order], group[order])
    return order[rank < n], rank[rank < n]


@torch.no_grad()
def promoted(model, directions, n=10):
    """directions (M,D) in the residual stream -> (M,n): the tokens whose logits each of them raises most.

    The logit lens of a direction: final norm's weight, then lm_head.  It leaves out what later blocks make of the
    direction, and the norm's division by the size of the whole stream, which scales all tokens alike."""
    directions = directions.to(model.lm_head.weight.dtype) * model.model.norm.weight
    return torch.cat([model.lm_head(some).topk(n).indices for some in directions.split(256)])


@torch.no_grad()
def examples(model, sae, chunks, shown, n):
    """Where in chunks (C,T) the latents shown (F',), ascending, are strongest -> place and code (F',n), times (F',).

    A place counts tokens of all chunks; C T, one after the last, stands for none.  times: on how many tokens."""
    found = []
    for i, row in enumerate(chunks.split(1)):
        token, latent, value = active_codes(sae, activations(model, row, sae.meta["layer"], sae.meta["site"]))
        which = torch.searchsorted(shown, latent).clamp(max=len(shown) - 1)
        known = shown[which] == latent
        found.append((token[known] + i * chunks.shape[1], which[known], value[known]))
    token, which, value = map(torch.cat, zip(*found))
    best, rank = strongest(which, value, n)
    place, code = token.new_full((len(shown), n), chunks.numel()), value.new_zeros(len(shown), n)
    place[which[best], rank], code[which[best], rank] = token[best], value[best]
    return place, code, which.bincount(minlength=len(shown))


@torch.no_grad()
def view_data(model, tokenizer, sae, ids, n_prompt, chunks, reasoning=(), top=32, n_examples=4):
    """What data/view.html shows of the answer ids[n_prompt:], as JSON; sae.meta says where the SAE reads.

    chunks (C,T) is the text that examples come from.  Only features that are active in ids are described, and of
    each token the `top` strongest are kept.  `digits` writes lists of integers; codes are in 2,047ths of `scale`, 2047
    added.  ValueError: no feature is active."""
    text, meta = torch.tensor(ids, device=chunks.device), sae.meta                               # (T,)
    x = activations(model, text[None], meta["layer"], meta["site"])                              # (1,T,D)
    token, latent, value = active_codes(sae, x)
    if not len(token):
        raise ValueError("no feature is active in this text: there is nothing to show")
    kept, _ = strongest(token, value, top)
    shown, feature = latent[kept].unique(return_inverse=True)                                    # (F',), (M,)
    place, code, times = examples(model, sae, chunks, shown, n_examples)
    promotes = promoted(model, sae.W_dec[shown])                                                 # (F',10)
    used, word = torch.cat([text, chunks.flatten(), promotes.flatten()]).unique(return_inverse=True)
    lists = dict(zip(("text", "corpus", "promotes"), word.split([len(text), chunks.numel(), promotes.numel()])))
    scale = max(value.abs().max(), code.abs().max())
    whole = lambda v: (v.sign() * (v.abs() / scale * 2047).round().clamp(min=1)).long() + 2047      # 0 means none
    measured = metrics(sae, x[~is_sink(x, meta.get("sink_norm"))].float())
    lists |= {"active": token.bincount(minlength=len(text)), "kept": token[kept].bincount(minlength=len(text)),
              "feature": feature, "value": whole(value[kept]), "latents": shown, "times": times,
              "example": place, "code": whole(code)}
    return {"layer": meta["layer"], "site": meta["site"], "variant": sae.variant, "n_latents": sae.n_latents,
            "n_features": len(shown), "n_prompt": n_prompt, "n_examples": n_examples, "seq_len": chunks.shape[1],
            "scale": float(scale), "fvu": measured["fvu"], "l0": measured["l0"], "reasoning": list(reasoning),
            "words": [tokenizer.decode([i], skip_special=False) or f"[{i}]" for i in used.tolist()],
            "numbers": {name: digits(t) for name, t in lists.items()}}


DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def digits(numbers):
    """Integers >= 0 -> text: how many base-64 digits each takes, then those.  Half the size of decimal lists."""
    numbers = numbers.flatten().cpu()
    width = max(1, -(-int(numbers.max()).bit_length() // 6)) if len(numbers) else 1
    place = numbers[:, None] >> torch.arange(6 * width - 6, -1, -6) & 63                         # (n,width)
    return str(width) + torch.tensor(list(DIGITS), dtype=torch.uint8)[place].numpy().tobytes().decode()


def fill_page(template, data):
    """The template with `data` as JSON, and the look that all pages share, at their marks.

    Tokens are a stranger's: without any < they cannot end the script element; json escapes all that is not ASCII,
    U+2028 included.  ValueError: a number that is not finite."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    look = (HERE / "data" / "page.css").read_text(encoding="utf-8")
    return template.replace("/* page.css */", look).replace("%DATA%", text)


def check_page(path):
    """ValueError where what --out names could not be a page with something beside it."""
    if Path(path).suffix != ".html" or Path(path).is_dir():
        raise ValueError(f"--out {path}: the name of a page ends in .html, and no directory has it")


def write_page(path, template, data, **others):
    """Writes data/`template` filled with data to path, and others, {suffix: text}, beside it."""
    path, page = Path(path), fill_page((HERE / "data" / template).read_text(encoding="utf-8"), data)
    with staged(path.parent) as temporary:
        for suffix, text in {"html": page, **others}.items():
            (temporary / f"{path.stem}.{suffix}").write_text(text, encoding="utf-8")


@dataclass
class Report:
    """Writes the results of experiments as one HTML page with charts, and beside it as Markdown."""
    results: str = "out/tiny/experiments/results.json"      # what `resa.py experiments` wrote
    out: str = "out/tiny/report.html"    # the page; the Markdown has its name and .md


def report(argv):
    args = parse_flags(Report, argv, "resa.py report")
    check_page(args.out)
    if not Path(args.results).exists():
        raise FileNotFoundError(f"{args.results}: no such file; python resa.py experiments makes it")
    results = read_json(args.results)
    check_shape(results, RESULTS, args.results)
    write_report(results, args.out)
    print(f"{args.out}, and the same as {Path(args.out).with_suffix('.md')}")


# The shape of results.json: {key: shape}, [shape] for a list of them, key? if it may be absent, else a type.
NUMBER = (int, float)
INTERVAL, LINE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}, {"value": NUMBER, "name": str}
CHARTS = {"intervals": {"kind": str, "title": str, "x": str, "line?": LINE,
                        "points": [{"name": str, "mark?": str} | INTERVAL]},
          "line": {"kind": str, "title": str, "x": str, "y": str, "line?": LINE,
                   "series": [{"name": str, "points": [{"x": NUMBER} | INTERVAL]}]}}
RESULTS = {"title": str, "date": str, "machine": str, "seconds": NUMBER, "settings": dict, "summary": [str],
           "sections": [{"id": str, "title": str, "about": str, "words": [str],
                         "tables": [{"title": str, "header": [str], "rows": [[(str, int, float)]]}],
                         "charts": [CHARTS]}]}


def check_shape(value, shape, where):
    """ValueError names the place of the first part of `value` that does not have this shape."""
    if shape is CHARTS:
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind not in CHARTS:
            raise ValueError(f"{where}: a chart of kind {' or '.join(CHARTS)} was expected")
        shape = CHARTS[kind]
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    odd = isinstance(value, bool) or isinstance(value, (int, float)) and not abs(value) < 1e300       # or NaN
    if odd or not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "text", NUMBER: "a finite number"}
        raise ValueError(f"{where}: {names.get(kind, 'text or a finite number')} was expected")
    for i, part in enumerate(value if isinstance(shape, list) else ()):
        check_shape(part, shape[0], f"{where}[{i}]")
    for key, part in shape.items() if isinstance(shape, dict) else ():
        name = key.rstrip("?")
        if name in value:
            check_shape(value[name], part, f"{where}: {name}")
        elif name == key:
            raise ValueError(f'{where}: no "{key}"')


def write_report(results, path):
    """results, of the shape RESULTS, -> an HTML page at path, and FILE.md beside it."""
    write_page(path, "report.html", results, md=as_markdown(results))


def as_markdown(results):
    """results, of the shape RESULTS, -> the same in Markdown, a table for each chart."""
    lines = ["# {title}".format(**results), "{date}, {machine}, {seconds:,.0f} s".format(**results)]
    lines.append(bullets(results["summary"]))
    for section in results["sections"]:
        lines += [f"## {section['title']}", section["about"]]
        listed = {str(row[0]) for table in section["tables"] for row in table["rows"] if row}
        drawn = [chart for chart in section["charts"] if chart["kind"] == "line"
                 or not {point["name"] for point in chart["points"]} <= listed]      # else a table has it already
        for table in section["tables"] + [chart_table(chart) for chart in drawn]:
            lines += [f"**{table['title']}**", pipes(table["rows"], table["header"])]
        lines.append(bullets(section["words"]))
    settings = [[name, json.dumps(value)] for name, value in results["settings"].items()]
    lines += ["## Settings", pipes(settings, ["setting", "value"])]
    return "\n\n".join(filter(None, lines)) + "\n"


def chart_table(chart):
    """A chart as a table: what its picture shows, in numbers."""
    number = lambda v: f"{v:.4g}"
    inside = lambda p: [number(p["value"]), f"[{number(p['low'])}, {number(p['high'])}]"]
    if chart["kind"] == "intervals":
        header = ["", chart["x"], "interval", ""]
        rows = [[p["name"], *inside(p), p.get("mark", "")] for p in chart["points"]]
    else:
        header = ["", chart["x"], chart["y"], "interval"]
        rows = [[s["name"], number(p["x"]), *inside(p)] for s in chart["series"] for p in s["points"]]
    given = [[chart["line"]["name"], number(chart["line"]["value"]), "", ""]] if "line" in chart else []
    return {"title": chart["title"], "header": header, "rows": rows + given}


def bullets(words):
    return "\n".join(f"- {word}" for word in words)


def pipes(rows, header):
    """Rows of cells -> a Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cell = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


# ----------------------------------------------------------------------------------------------------------
# All of the paper's experiments on the embedded family: several training seeds, controls beside every claim
# ----------------------------------------------------------------------------------------------------------

# The run that made data/tiny/rl, with its checkpoints: those after so many of its 200 steps are sources.
GRPO = ("rl --target {base} --save-every 10 --steps 200 --questions 16 --lora-r 16 --lora-alpha 32 --lora-dropout 0 "
        "--schedule cosine --lr 1e-3")
STEPS = [10, 50, 100]
HALVES = {"trigger": "market gift bus saving", "elicit": "age garden reading boxes"}      # in data/prepare.py's order
ALL_SAES = SAES | {
    "sae-0": "sae --layer 0", "sae-2": "sae --layer 2", "sae-3": "sae --layer 3",
    "sae-tuned": "sae --init finetune --sae-from {out}/sae-base",
    "sae-rollouts": "sae --data {root}/rollouts.jsonl",
    "sae-trigger": "sae --data {root}/trigger.jsonl", "sae-elicit": "sae --data {root}/elicit.jsonl",
} | {f"sae-rl-{n}": f"sae --source {{base}}+{{root}}/rl/checkpoint-{n}" for n in STEPS}
TAUGHT = "--teacher source"
OBJECTIVES = {
    "source through its SAE teaches": f"tune --sae {{out}}/sae {TAUGHT} --into teacher",
    "source through a random SAE teaches": f"tune --sae {{out}}/sae --splice random {TAUGHT} --into teacher",
    "gradient through the SAE": f"tune --sae {{out}}/sae {TAUGHT} --into gradient",
    "gradient through a random SAE": f"tune --sae {{out}}/sae --splice random {TAUGHT} --into gradient",
    "matched as the SAE sees it": f"tune --sae {{out}}/sae-3 --layer 3 {TAUGHT} --into nothing --match 100",
    "matched as a random SAE sees it":
        f"tune --sae {{out}}/sae-3 --layer 3 --splice random {TAUGHT} --into nothing --match 100",
    "matched as it is, no SAE": f"tune --splice none --layer 3 {TAUGHT} --match 100",
    "SAE of rollouts (as coded)": "tune --sae {out}/sae-rollouts",
    "source through an SAE of rollouts teaches": f"tune --sae {{out}}/sae-rollouts {TAUGHT} --into teacher",
}
ALL_ARMS = ARMS | OBJECTIVES | {
    "fine-tuned SAE": "tune --sae {out}/sae-tuned",
    "SAE of another site": "tune --sae {out}/sae-mlp --other-site",
    **{f"source after {n} steps": f"tune --sae {{out}}/sae-rl-{n}" for n in STEPS},
    **{f"itself after {n} steps": f"= {{base}}+{{root}}/rl/checkpoint-{n}" for n in STEPS},
    "SAE of 4 families, tuned on 4 others": "tune --sae {out}/sae-trigger --data {root}/elicit.jsonl",
    "SAE of the same 4 it is tuned on": "tune --sae {out}/sae-elicit --data {root}/elicit.jsonl",
    "source through an SAE of 4 teaches on 4 others":
        f"tune --sae {{out}}/sae-trigger --data {{root}}/elicit.jsonl {TAUGHT} --into teacher",
    "source teaches on those 4, no SAE": f"tune --splice none --data {{root}}/elicit.jsonl {TAUGHT}",
    **{f"adapter of {name}": f"tune --target {{tiny}}/{name} --sae {{out}}/sae" for name in ("math", "lm")},
    **{f"half the adapter of {name}": f"= {{base}}+{{out}}/adapter-of-{name}*0.5" for name in ("math", "lm")},
    **{f"a random one of the size of {name}'s": f"= {{base}}+{{out}}/random-{name}" for name in ("math", "lm")},
    **{f"{name} alone": f"= {{tiny}}/{name}" for name in ("math", "lm")},
    **{f"{name} with its adapter": f"= {{tiny}}/{name}+{{out}}/adapter-of-{name}" for name in ("math", "lm")},
    "layer 0": "tune --sae {out}/sae-0 --layer 0", "layer 2": "tune --sae {out}/sae-2 --layer 2",
}
# id -> title, what it asks, its arms, pairs that are compared (arm, control, why).  Every arm is set against the base.
SECTIONS = {
    "arms": ("SAE-Tuning and its controls", "The method in both readings, and what could explain it away.", [*ARMS], [
        *QUESTIONS[:3],
        ("source teaches, with SAE", "source teaches, no SAE", "does the SAE help a stronger teacher")]),
    "objectives": ("Objectives beyond the paper", "On text without reasoning: is there one in which the SAE earns its "
                   "place?  Plain distillation, the source as the teacher without any SAE, is the arm to beat.", [
        "base", "RL source", "source teaches, no SAE", *OBJECTIVES], [
        (*pair, why) for why, pairs in {
            "does it matter that the SAE is trained": [
                ("source through its SAE teaches", "source through a random SAE teaches"),
                ("gradient through the SAE", "gradient through a random SAE"),
                ("matched as the SAE sees it", "matched as a random SAE sees it")],
            "is it more than the same without an SAE": [
                ("source through its SAE teaches", "source teaches, no SAE"),
                ("gradient through the SAE", "source teaches, no SAE"),
                ("matched as the SAE sees it", "matched as it is, no SAE")],
            "does it matter what the SAE has read": [
                ("SAE of rollouts (as coded)", "SAE-Tuning (as coded)"),
                ("source through an SAE of rollouts teaches", "source through its SAE teaches")],
            "is matching more than predictions alone": [("matched as it is, no SAE", "source teaches, no SAE")],
        }.items() for pair in pairs]),
    "modes": ("How the SAE is made", "The three modes of the paper: an SAE of the base as it is, fine-tuned on the "
              "source, from scratch; and its pre-trained arm as released, an SAE of MLP outputs on block outputs.", [
        "base", "SAE of the base", "fine-tuned SAE", "SAE-Tuning (as coded)", "SAE of another site"], [
        ("fine-tuned SAE", "SAE-Tuning (as coded)", "does the start matter"),
        ("SAE of another site", "SAE-Tuning (as coded)", "does the site matter")]),
    "sources": ("How far the source was trained", "SAEs of the base after N steps of one RL run; 0 is the base itself, "
                "200 the adapter in data/tiny/rl, from another run of the same command.", [
        "base", "SAE of the base", *(f"source after {n} steps" for n in STEPS), "SAE-Tuning (as coded)",
        *(f"itself after {n} steps" for n in STEPS), "RL source"], [
        (f"source after {n} steps", "SAE of the base", f"do {n} steps of RL in the source matter") for n in STEPS]),
    "generality": ("Other questions than the SAE has read", "Pass@1 on the four families that the SAE has never read: "
                   + HALVES["elicit"] + ".", [
        "base", "RL source", "SAE of 4 families, tuned on 4 others", "SAE of the same 4 it is tuned on",
        "source through an SAE of 4 teaches on 4 others", "source teaches on those 4, no SAE"], [
        ("SAE of 4 families, tuned on 4 others", "SAE of the same 4 it is tuned on",
         "does it matter what the SAE has read"),
        ("source through an SAE of 4 teaches on 4 others", "source teaches on those 4, no SAE",
         "is it more than the same without an SAE")]),
    "modularity": ("Reasoning as an adapter", "Adapters tuned on another model of the lineage, put on the base at test "
                   "time; beside them half of each, random ones of the same size, and each on its own model.", [
        "base", *(f"{a}{name}{b}" for name in ("math", "lm") for a, b in (
            ("adapter of ", ""), ("half the adapter of ", ""), ("a random one of the size of ", "'s"), ("", " alone"),
            ("", " with its adapter")))], [
        (f"adapter of {name}", f"a random one of the size of {name}'s", "is it more than a random change of that size")
        for name in ("math", "lm")]),
    "layers": ("Which block", "The published objective at blocks 0, 1 and 2; at the last, 3, nothing could learn.", [
        "base", "layer 0", "SAE-Tuning (as coded)", "layer 2"], []),
    "features": ("Reasoning features", "One SAE a layer, seed 0.  Rule: latents active at <think> and </think> of a "
                 "prompt and nowhere else in it.  Each latent is ablated, then boosted at every token, while the base "
                 "answers: ranked by first-order attribution to the odds of thinking, found by the rule, or random "
                 "ones of the same firing rates.", [], []),
    "cost": ("What it took", "SAE and adapter of seed 0 beside the RL run that makes a source, same machine.", [], []),
}


@dataclass
class Experiments:
    """Every experiment of the paper on the embedded family, with its controls: report.html, report.md."""
    out: str = "out/tiny/experiments"    # run directory, with a folder for every seed; the report goes beside it
    sections: list[str] = field(default_factory=lambda: [*SECTIONS])      # which experiments
    seeds: int = 5                       # trainings of every SAE and adapter, seeds 0, 1, ..
    questions: int = 500                 # held-out questions, the first of data/tiny/test.jsonl
    sae_steps: int = 100                 # optimizer steps of an SAE, of 8 chunks of 256 tokens
    tune_steps: int = 120                # optimizer steps of an adapter, of 4 chunks; the last is used
    lr: float = 3e-4                     # of every adapter
    workers: int = 2                     # trainings at a time, one core each
    quick: bool = False                  # one seed, few steps: shows that it runs, not what it is worth


def experiments(argv):
    """`python resa.py experiments`: RL and SAEs, arms, models put together from them, then one report."""
    import train
    args = parse_flags(Experiments, argv, "resa.py experiments")
    if args.quick:
        train.refuse_idle(args, "seeds questions sae_steps tune_steps", "--quick, which sets them")
        args.seeds, args.questions, args.sae_steps, args.tune_steps = 1, 40, 4, 4
    at_least(args, seeds=1, questions=2, sae_steps=1, tune_steps=1, workers=1)
    odd = set(args.sections) - SECTIONS.keys()
    train.check(not odd, f"--sections {' '.join(sorted(odd))}: there are {', '.join(SECTIONS)}")
    train.check(0 < args.lr < math.inf, f"--lr must be above 0 and finite; it is {args.lr}")
    train.check(args.questions <= (count := len(read_problems(TINY / "test.jsonl"))),
                f"--questions {args.questions}: there are {count}")
    began = time.perf_counter()
    open_run(args.out, args)
    rows = run_all(args, *needed_by(args))
    sections = [make_section(args, name, rows) for name in args.sections]
    covers = "training seeds (SAE, adapter, samples), by Student's t" if args.seeds > 1 else "questions and samples"
    summary = summarize_all(rows) + [f"Intervals cover {covers}; the base, its RL source and the questions are the "
                                     "same throughout.  No comparison is corrected for their number."]
    summary += ["This was --quick: it shows that everything runs, nothing else."] * args.quick
    results = {"title": "SAE-Tuning on the embedded family", "date": time.strftime("%Y-%m-%d"),
               "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}",
               "seconds": round(time.perf_counter() - began, 1), "summary": summary, "sections": sections,
               "settings": {f.name: getattr(args, f.name) for f in fields(args)}}
    with staged(args.out) as temporary:
        (temporary / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = Path(args.out).parent / "report.html"
    write_report(results, page)
    print("\n".join([*summary, "", f"{page}, {page.with_suffix('.md')}: {results['seconds']:.0f} s in all"]))


def run_all(args, arms, saes):
    """Everything that is trained and asked -> {arm: [its samples, by seed]}.

    In four rounds, as each needs the one before: RL, rollouts and SAEs; SAEs of what these left; arms, trained and
    asked; models that are put together from arms."""
    by_seed = [types.SimpleNamespace(**vars(args) | {"out": f"{args.out}/seed-{s}", "seed": s, "samples": 1})
               for s in range(args.seeds)]
    write_halves(args)
    jobs = {"rollouts": (write_rollouts, args)} if "sae-rollouts" in saes else {}
    if any("{root}/rl" in words for words in [*arms.values(), *saes.values()]) or "cost" in args.sections:
        quick = " --group 2 --max-new-tokens 8" * args.quick
        jobs["rl"] = (train_arm, GRPO + quick, by_seed[0], f"{args.out}/rl", "")
    later = lambda words: "{out}" in words or "{root}" in words
    for title, which in (("autoencoders", False), ("more autoencoders", True)):
        jobs |= {(at.seed, name): (train_arm, words, at, f"{at.out}/{name}")
                 for at in by_seed for name, words in saes.items() if later(words) == which}
        dict(in_workers(jobs, args.workers, title))
        jobs = {}
    found, joined = {}, lambda words: words.startswith("= ") and "{out}" in words
    for title, which in (("arms", False), ("joined arms", True)):
        for at in by_seed if which and "modularity" in args.sections else ():
            for name in ("math", "lm"):
                random_adapter(f"{at.out}/adapter-of-{name}", f"{at.out}/random-{name}", at.seed)
        jobs = {(at.seed, name): (run_arm, name, words, at)
                for at in by_seed for name, words in arms.items() if joined(words) == which}
        found |= dict(in_workers(jobs, args.workers, title))
    return {name: [found[at.seed, name][0] for at in by_seed] for name in arms}


def needed_by(args):
    """What the chosen sections need -> {arm: words}, {SAE: words}; the base and its source always."""
    names = ["base", "RL source"]
    for section in args.sections:
        names += [*SECTIONS[section][2], *(name for pair in SECTIONS[section][3] for name in pair[:2])]
    names += ["SAE-Tuning (as coded)"] if "cost" in args.sections else []
    names += ["adapter of " + re.search(r"/(?:adapter-of|random)-(\w+)", ALL_ARMS[name])[1] for name in names
              if re.search("/(adapter-of|random)-", ALL_ARMS[name])]
    arms = {name: ALL_ARMS[name] for name in ALL_ARMS if name in names}
    saes = {name for words in arms.values() for name in re.findall(r"{out}/(sae\S*)", words)}
    saes |= {name for sae in saes for name in re.findall(r"{out}/(sae\S*)", ALL_SAES[sae])}
    return arms, {name: words for name, words in ALL_SAES.items() if name in saes}


def write_halves(args):
    """The training questions in two files, by family: those an SAE reads, and those an adapter is tuned on."""
    import train
    rows = train.read_rows(TINY / "train.jsonl")
    with staged(args.out) as temporary:
        for name, families in HALVES.items():
            some = [row for row in rows if row["family"] in families.split()]
            (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def write_rollouts(args):
    """The source's own answers to training questions, as rows that train.py reads.  Runs in a worker process."""
    torch.set_num_threads(1)
    source = PRESETS["tiny"]["source"]
    problems = read_problems(TINY / "train.jsonl")[:160 if args.quick else 2000]
    model, tokenizer = load_model(source), load_tokenizer(source)
    rows = [{"problem": problem["problem"], "completion": row["completion"]}
            for problem, row in zip(problems, ask(model, tokenizer, problems))]
    with staged(args.out) as temporary:
        (temporary / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def random_adapter(like, directory, seed):
    """An adapter of Gaussian A and B, each product B A scaled to the norm of that of the adapter `like`."""
    adapter, rng = read_adapter(like), torch.Generator().manual_seed(seed)
    model = load_adapter(load_model(PRESETS["tiny"]["target"]), like)
    for name, layer in lora_layers(model).items():
        A, B = (torch.randn(side.shape, generator=rng) for side in adapter["pairs"][name])
        size = (adapter["pairs"][name][1] @ adapter["pairs"][name][0]).norm()
        with torch.no_grad():
            layer.lora_A.copy_(A), layer.lora_B.copy_(B * (size / (B @ A).norm()))
    save_adapter(model, directory)


# ---- what the numbers say: over training seeds --------------------------------------------------------------

def over_seeds(runs, controls=None):
    """[rows of a seed] -> mean Pass@1, or mean paired difference from the controls, low, high.

    The interval is Student's t over seeds: it covers another training and other samples; the questions are the same.
    With a single seed, or none that differs, it is eval.py's of all samples, which covers questions and samples."""
    import eval
    value = lambda rows: sum(row["correct"] for row in rows) / len(rows)
    values = np.array([value(a) - (value(b) if controls else 0) for a, b in zip(runs, controls or runs)])       # (S,)
    if not np.ptp(values):
        a, b = sum(runs, []), sum(controls or [], [])
        low, high = (eval.paired(a, b) if controls else eval.summarize(a))["interval"]
    else:
        half = eval.student(len(values) - 1) * values.std(ddof=1) / len(values)**0.5
        low, high = np.clip([values.mean() - half, values.mean() + half], -1 if controls else 0, 1)
    return float(values.mean()), float(low), float(high)


def make_section(args, name, rows):
    """One section of results.json: its table, its chart, its comparisons in words."""
    title, about, arms, pairs = SECTIONS[name]
    section = {"id": name, "title": title, "about": about, "words": [], "tables": [], "charts": []}
    if name == "generality":
        family = {row["id"]: row["family"] for row in read_problems(TINY / "test.jsonl")}
        rows = {arm: [[row for row in run if family[row["id"]] in HALVES["elicit"].split()] for run in runs]
                for arm, runs in rows.items()}
    if arms:
        base, source = over_seeds(rows["base"])[0], over_seeds(rows["RL source"])[0]
        lines, points = [], []
        for arm in arms:
            mean, low, high = over_seeds(rows[arm])
            gain = ["", ""] if arm == "base" else ["{:+.3f}", "[{:+.3f}, {:+.3f}]"]
            moved = over_seeds(rows[arm], rows["base"])
            lines.append([arm, f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]", gain[0].format(moved[0]),
                          gain[1].format(*moved[1:]), f"{mean / source:.1%}" if source else ""])
            points.append({"name": arm, "value": mean, "low": low, "high": high})
        seeds = f"{args.seeds} training seeds x {len(rows['base'][0])} questions"
        section["tables"].append({"title": seeds, "rows": lines,
                                  "header": ["arm", "Pass@1", "95% CI", "- base", "95% CI", "of the source"]})
        section["charts"].append({"kind": "intervals", "title": seeds, "x": "Pass@1", "points": points,
                                  "line": {"value": base, "name": "base"}})
        section["words"] += [sentence(a, b, why, *over_seeds(rows[a], rows[b])) for a, b, why in pairs]
    more = {"sources": sources_section, "layers": layers_section, "features": features_section, "cost": cost_section}
    if name in more:
        more[name](args, section, rows)
    return section


def sources_section(args, section, rows):
    """A line over the steps of RL: Pass@1 of the source itself, and of what its SAE made of the base."""
    place = lambda arm, n: dict(zip(("x", "value", "low", "high"), (n, *over_seeds(rows[arm]))))
    tuned = [("SAE of the base", 0), *((f"source after {n} steps", n) for n in STEPS), ("SAE-Tuning (as coded)", 200)]
    itself = [("base", 0), *((f"itself after {n} steps", n) for n in STEPS), ("RL source", 200)]
    series = [{"name": name, "points": [place(*at) for at in arms]}
              for name, arms in (("the source itself", itself), ("SAE-Tuned", tuned))]
    section["charts"].append({"kind": "line", "title": "Over the training of the source", "x": "RL steps",
                              "y": "Pass@1", "series": series})
    x, y = ([over_seeds(rows[arm])[0] for arm, _ in arms] for arms in (itself, tuned))
    r, p = correlation(x, y)
    section["words"].append(f"Pass@1 of the five sources and of what was tuned through their SAEs: r = {r:+.2f}, "
                            f"p = {p:.2f} by permutation.")


def layers_section(args, section, rows):
    """Does the block matter?  An analysis of variance, as for the paper's 26 layers x 4 checkpoints."""
    groups = [[over_seeds([run])[0] for run in rows[arm]] for arm in SECTIONS["layers"][2][1:]]
    if args.seeds > 1:
        f, p = anova(groups)
        degrees = f"{len(groups) - 1},{len(groups) * (args.seeds - 1)}"
        section["words"].append(f"Does the block matter?  F({degrees}) = {f:.2f}, p = {p:.3f} by permutation: "
                                + ("it does." if p < 0.05 else "no effect of the block is seen."))
    section["words"].append("The same test on the 26 layers x 4 checkpoints in the appendix of arXiv 2506.09967, which "
                            "has none itself: F(25,78) = 1.15, p = .31.")


def features_section(args, section, rows):
    """`resa.py features`, in brief: how many latents the rule finds, and the strongest effects beside random ones."""
    flags = to_argv({"questions": min(300, args.questions), "workers": args.workers, "steps": args.sae_steps,
                     "device": "cpu", "out": f"{args.out}/features"})
    found = study_layers(parse_flags(Features, flags, "resa.py features"))
    counts = [[layer, f"{study['count']:.1f}", len(study["rule"])] for layer, study in found.items()]
    (lines, words), (_, said) = strongest_effects(found), published_again()
    section["tables"] += [
        {"title": "By the rule", "header": ["layer", "latents a prompt", "in any prompt"], "rows": counts},
        {"title": STRONGEST, "header": STRONGEST_HEADER, "rows": lines}]
    section["words"] += words + said


def cost_section(args, section, rows):
    """`resa.py cost` of seed 0."""
    places = {"SAE": "seed-0/sae", "adapter": "seed-0/sae-tuning-as-coded", "RL": "rl"}
    runs = {name: read_summary(f"{args.out}/{place}", "tune") for name, place in places.items()}
    section["tables"].append({"title": section["title"], "header": COST_HEADER, "rows": cost_table(runs)})
    section["words"].append("SAE-Tuning needs a source: the RL run that made it is not in its row.")


def summarize_all(rows):
    """The sentences at the top: what the method did, and whether in any arm the SAE earned its place."""
    source = over_seeds(rows["RL source"])[0]
    tell = lambda a, b, why: sentence(a, b, why, *over_seeds(rows[a], rows[b]))
    said = [tell(arm, "base", "does SAE-Tuning help") for arm in rows if arm.startswith("SAE-Tuning")]
    trained = [(a, b) for a, b, why in SECTIONS["objectives"][3] if "trained" in why and a in rows]
    plain = "source teaches, no SAE"
    earned = [a for a, b in trained if over_seeds(rows[a])[0] >= 0.97 * source and over_seeds(rows[a], rows[b])[1] > 0]
    if trained:
        said.append("At least 97 % of the source's Pass@1, and better than with a random SAE: "
                    + (", ".join(earned) if earned else "no arm of these.  The SAE does not earn its place here") + ".")
        said += [tell(a, plain, "is it more than plain distillation") for a, _ in trained]
    return said


# ----------------------------------------------------------------------------------------------------------
# Front door
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Merge:
    """Folds the adapters of a model spec into its weights and writes a plain model directory."""
    model: str = ""                      # BASE+ADAPTER, or BASE+ADAPTER*FACTOR
    out: str = ""                        # directory to write
    dtype: str | None = None             # default: the checkpoint's


def merge(argv):
    args = parse_flags(Merge, argv, "resa.py merge")
    if "+" not in args.model or not args.out:
        raise ValueError("resa.py merge needs --model BASE+ADAPTER and --out DIR")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists already; --out must be a new directory")
    save_model(load_model(args.model, args.dtype), args.out)
    print(f"{args.out}: {args.model}, merged")


@dataclass
class Convert:
    """Reads an SAE in any layout (sparsify, SAELens, dictionary_learning, OpenAI) and writes it in one of two."""
    sae: str = ""                        # DIR_OR_HUB_ID[#HOOKPOINT]
    out: str = ""                        # directory to write
    layout: Literal["sparsify", "saelens"] = "sparsify"      # what another tool cannot express is refused


def convert(argv):
    args = parse_flags(Convert, argv, "resa.py convert")
    if not args.sae or not args.out:
        raise ValueError("resa.py convert needs --sae DIR and --out DIR")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists already; --out must be a new directory")
    sae = load_sae(*args.sae.split("#", 1))
    save_sae(sae, args.out, args.layout)
    print(f"{args.out}: {sae.variant}, {sae.n_latents:,} latents of width {sae.d_in}, as {args.layout}")


COMMANDS = {"merge": merge, "convert": convert, "compare": compare, "recover": recover,
            "errors": errors, "features": features, "experts": experts, "cost": cost, "view": view, "report": report,
            "experiments": experiments}


def main(argv):
    """`python resa.py [command] ...`: without a command, the experiment.  It alone imports train and eval."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            raise ValueError(f"resa.py: no command {argv[0]!r}; there is {', '.join(COMMANDS)}; without one, the "
                             "experiment runs")
        return COMMANDS[argv[0]](argv[1:])
    experiment(argv)


if __name__ == "__main__":
    # Imported under its own name: train and eval import `resa`, and its classes should exist once.
    import resa
    resa.front_door(resa.main)
