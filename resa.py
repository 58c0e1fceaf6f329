"""SAE-Tuning (Resa, arXiv 2506.09967): from one model to another through a sparse autoencoder.

The source is a model that RL taught to reason, the target its base.  All that the target gets of
the source is an SAE: LoRA learns to undo what the SAE does to the target's activations.

Stage I    an SAE learns x, the output of block `layer` of a source model     train.py --stage sae
Stage II   freeze it, put SAE(x) in the place of x in the target, train LoRA   train.py --stage tune
               argmin over LoRA of  KL( target || target with LoRA and SAE )               (eq. 8)
Test       take the SAE out, keep LoRA                                         eval.py --bench NAME

    python resa.py [--quick]                                every arm and its controls: one table
    python resa.py --target MODEL --source MODEL            on other models, both of one width D
    python resa.py merge --model BASE+ADAPTER --out DIR     fold an adapter into its base

Read from the top.  At the foot, the experiment: each arm is a command line (it alone imports eval).

B batch, T time, D width, V vocabulary, N = B T tokens, r rank of an adapter; x is the activation at
the hook, h = model.run(ids) what leaves the last block, before the final norm.
"""

import json
import math
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data.adapters import lora_scale, peft_base, read_adapter
from data.files import check, check_new, one_writer, staged
from data.flags import (Parser, arms_parser, front_door, open_experiment, parse, parse_experiment,
                        run_commands)
from model import (AdaptedLinear, at_least_fp32, check_adapter, fold, load_model, low_rank,
                   replace, save_model, split_spec)
from sae import Chosen, build

# ---- The objective -----------------------------------------------------------------------------

def tuning_loss(model, sae, layer, ids, site="resid", grad=False, reduction="token", teacher=None):
    """ids (B,T), text without padding -> KL(teacher || student), a scalar in nats (eq. 8).

    model      the target with LoRA attached: the student, with SAE(x) for x at block `layer`
    sae        any module (B,T,D) -> (B,T,D); None: no splice, plain distillation
    grad       whether the gradient also passes through the SAE: see `splice`
    reduction  "token" or "sequence": see `kl_loss`
    teacher    None: the target itself, without adapters and SAE.  Else another model
    As in Resa's text and code, every position counts, even the first; there is no cross-entropy."""
    if shares_prefix(model, sae, layer, site, grad, teacher):
        return shared_prefix_loss(model, sae, layer, ids, reduction)       # the same value, faster
    teacher = model if teacher is None else teacher
    with torch.no_grad(), adapters_off(teacher):         # teacher: no adapters, no SAE
        h_teacher = teacher.run(ids)                                              # (B,T,D)
    with splice(model, sae, layer, site, grad):          # student: SAE(x) for x, adapters on
        h_student = model.run(ids)                                                # (B,T,D)
    return kl_loss(model, teacher, h_student, h_teacher, reduction)

def shares_prefix(model, sae, layer, site, grad, teacher):
    """Whether teacher and student agree up to the hook, so that blocks 0 .. layer can run once.

    Then it stays so in training: nothing below the hook learns.  Four conditions: the model teaches
    itself; the gradient stops at the SAE; the SAE replaces the block's whole output; the adapters
    of these blocks are still zero."""
    if sae is None or grad or site != "resid" or teacher is not None:
        return False
    below = [m.lora_B for name, m in lora_layers(model).items()
             if int(name.split(".")[2]) <= layer]        # a name: model.layers.3.mlp.up_proj
    return not any(B.any() for B in below)

def shared_prefix_loss(model, sae, layer, ids, reduction="token"):
    """tuning_loss where `shares_prefix` holds: blocks 0 .. layer run once, without a graph."""
    check_hook(model, layer, "resid", grad=False)
    with torch.no_grad(), adapters_off(model):
        x = model.run(ids, stop=layer + 1)                                        # (B,T,D)
        h_teacher = model.run(x, start=layer + 1)                                 # (B,T,D)
        x_hat = insert(sae, x)                                                    # (B,T,D)
    h_student = model.run(x_hat, start=layer + 1)                                 # (B,T,D)
    return kl_loss(model, model, h_student, h_teacher, reduction)

# ---- The splice: read the activation at a hook site, or put something in its place -------------

def site_module(model, layer, site):
    """The module whose output is the site: block `layer`, from 0 ("resid"), or its MLP ("mlp").

    Resa: the text puts the SAE on the MLP's output, the released code on the block's: --site."""
    count = len(model.model.layers)
    check(0 <= layer < count, f"layer {layer}: this model has blocks 0 .. {count - 1}")
    check(site in ("resid", "mlp"), f"site {site!r} is not one of resid, mlp")
    return model.model.layers[layer] if site == "resid" else model.model.layers[layer].mlp

def check_hook(model, layer, site, grad):
    """ValueError: no such site, or no adapter could learn with the SAE spliced in there."""
    site_module(model, layer, site)
    last = layer == len(model.model.layers) - 1
    check(not (site == "resid" and last and not grad and torch.is_grad_enabled()),
          f"layer {layer} is the last block: nothing above it can learn; with --sae-grad on, the "
          "blocks below it can")

@contextmanager
def hooked(model, layer, site, function):
    """Inside, what function(x) returns replaces the activation x (B,T,D); None leaves x alone."""
    hook = lambda module, inputs, x: function(x)
    handle = site_module(model, layer, site).register_forward_hook(hook)
    block = vars(model.model.layers[layer])
    compiled = block.pop("forward", None)    # it would not run a hook that came later
    try:
        yield
    finally:
        handle.remove()
        block |= {"forward": compiled} if compiled else {}

@contextmanager
def splice(model, sae, layer, site="resid", grad=False):
    """Inside, x_hat = sae(x) stands in for the activation x at the site.  sae None: nothing does.

    grad=False is the published code: the SAE runs under no_grad.  At "resid" only the blocks above
    then learn; at "mlp" the residual stream still carries the gradient to the blocks below.  Tokens
    that the SAE leaves out, see `insert`, send no gradient down either: one rule for all tokens, so
    that what is below the hook can run once, without a graph, for teacher and student.
    grad=True is the published text: the gradient passes through the SAE too, and all blocks learn.
    """
    def swap(x):
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return insert(sae, x)
    with (nullcontext() if sae is None else hooked(model, layer, site, swap)):
        yield

@torch.no_grad()
def activations(model, ids, layer, site="resid"):
    """ids (B,T) -> the activation (B,T,D) at the site, computed up to there.  [4, 8]: a list."""
    layers, caught = [layer] if isinstance(layer, int) else layer, {}
    with ExitStack() as stack:
        for n in layers:
            stack.enter_context(hooked(model, n, site, partial(caught.__setitem__, n)))
        model.run(ids, stop=max(layers) + 1)
    return [caught[n] for n in layers] if layers is layer else caught[layer]

def insert(sae, x):
    """x (B,T,D) -> what takes its place: sae(x), but x itself at attention sinks, see `is_sink`."""
    limit = getattr(sae, "meta", {}).get("sink_norm")
    return sae(x) if limit is None else torch.where(is_sink(x, limit)[..., None], x, sae(x))

def is_sink(x, limit):
    """x (B,T,D) -> (B,T) bool: position 0, and every token whose norm exceeds `limit`.

    Attention sinks, tokens that soak up attention, have norms hundreds of times the median: an SAE
    trained on them would fit little else.  limit None: no token is one."""
    if limit is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    sink = x.float().norm(dim=-1) > limit                                         # (B,T)
    if x.shape[1] > 1:               # T = 1 is a step of cached generation, not position 0
        sink[:, 0] = True
    return sink

# ---- controls: what can stand in for the SAE ----------------------------------------------------

def random_sae(sae, seed):
    """`sae` untrained: encoder and decoder are random, b_dec and the input scale stay."""
    check(isinstance(sae, Chosen) and sae.per_token,
          f"--splice random: {sae.variant} sets no number of active latents that could be matched")
    control = build(sae.variant, sae.d_in, sae.n_latents, **sae.hyper | {"seed": seed})
    control.requires_grad_(False)
    control.b_dec.copy_(sae.b_dec)
    if sae.normalize == "scale":
        control.input_scale.copy_(sae.input_scale)
    control.meta = sae.meta
    return control.to(sae.b_dec)         # its device and precision

class MatchedNoise(nn.Module):
    """x plus Gaussian noise whose norm at each token is that of the SAE's own error.
    From torch's global generator, whose state checkpoints keep: a resumed run goes on with it."""

    def __init__(self, sae):
        super().__init__()
        self.sae, self.meta = sae, getattr(sae, "meta", {})

    def forward(self, x):
        e = at_least_fp32(x) - self.sae(x)      # bf16 would round the difference  (B,T,D)
        noise = torch.randn_like(e)
        size = e.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)    # (B,T,1)
        return (x + noise * size).to(x.dtype)

# ---- LoRA (arXiv 2106.09685), with the names and files of PEFT ---------------------------------

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

class LoRALinear(nn.Linear):
    """A frozen Linear plus scale * B A, with A (r,in), B (out,r).  Takes over the Linear's tensors.
    A and B stay in fp32, whatever the base is: at a rate of 1e-6 bf16 would never move."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        nn.Module.__init__(self)         # not nn.Linear's, which would allocate another weight
        check(r >= 1, f"a LoRA rank must be at least 1, it is {r}")
        self.training = base.training
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        # Adapters that the model itself has, and keeps beside half-precision weights
        self.own = base if isinstance(base, AdaptedLinear) else None
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))     # as PEFT; B = 0: no change yet
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scale = lora_scale(alpha, r, rslora)
        self.dropout, self.on = dropout, True                     # on: see adapters_off

    def forward(self, x):
        y = self.own(x) if self.own else F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + low_rank(x, self.lora_A, self.lora_B, self.scale)              # (...,out)

    def folded(self):
        """The weight (out,in) with all adapters in it, rounded to its dtype."""
        if self.own is None:
            return fold(self.weight, self.lora_A, self.lora_B, self.scale)
        return AdaptedLinear(self.own, self.lora_A, self.lora_B * self.scale).folded()

def lora_layers(model):
    """{name: LoRALinear}, kept beside the model: no step of training walks over its modules."""
    return vars(model).setdefault("adapters", {})

def attach(model, name, r, alpha, dropout=0.0, rslora=False):
    layer = LoRALinear(model.get_submodule(name), r, alpha, dropout, rslora)
    replace(model, name, layer)
    lora_layers(model)[name] = layer
    return layer

def add_lora(model, r=32, alpha=128, dropout=0.05, targets=TARGETS):
    """Freezes the model and adds an adapter to every Linear whose name ends in one of `targets`.

    Defaults are the paper's (Table 7), on the seven projections of the released code."""
    check(not lora_layers(model), "the model has an adapter already: merge_adapter(model) first")
    found = []
    for name, module in model.model.named_modules(prefix="model"):   # without lm_head: see kl_loss
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            found.append(name)
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    check(not missing, f"the model's blocks have no layer named {' or '.join(sorted(missing))}")
    model.requires_grad_(False)
    for name in found:
        attach(model, name, r, alpha, dropout)
    return model

@contextmanager
def adapters_off(model):
    """Inside, the model is its own base."""
    active = [layer for layer in lora_layers(model).values() if layer.on]
    for layer in active:
        layer.on = False
    try:
        yield
    finally:
        for layer in active:
            layer.on = True

@torch.no_grad()
def merge_adapter(model):
    """Folds all adapters into plain Linear layers for good."""
    adapted = {name: m for name, m in model.named_modules()
               if isinstance(m, (LoRALinear, AdaptedLinear)) and not name.endswith(".own")}
    for name, layer in adapted.items():
        has_bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.folded(), False), layer.bias
        replace(model, name, linear)
    lora_layers(model).clear()
    return model

def save_adapter(model, directory, base=None):
    """Writes adapter_model.safetensors and the smallest adapter_config.json that PEFT reads: fields
    of newer releases make older ones fail.  base: the model spec it is for"""
    layers = lora_layers(model)
    check(layers, "the model has no adapters to save")
    tensors = {}
    for name, layer in layers.items():
        for side in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{side}.weight"
            tensors[key] = getattr(layer, side).detach().contiguous().cpu()
    ends = {name.rpartition(".")[2] for name in layers}
    alike = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ends]
    # Ends of names where these say it all, else names in full
    targets = ends if len(alike) == len(layers) else layers
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=layer.r, lora_alpha=layer.alpha,
                  lora_dropout=layer.dropout, bias="none", inference_mode=True,
                  target_modules=sorted(targets), **peft_base(base))
    ranks = {name: other.r for name, other in layers.items() if other.r != layer.r}
    alphas = {name: other.alpha for name, other in layers.items() if other.alpha != layer.alpha}
    more = dict(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=layer.rslora)
    config |= {field: value for field, value in more.items() if value}
    with staged(directory) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

def load_adapter(model, spec):
    """Attaches a PEFT adapter for more training (that of a spec BASE+ADAPTER is frozen)."""
    check(not lora_layers(model), "the model has an adapter already: merge_adapter(model) first")
    adapter = read_adapter(spec)
    check_adapter(model, adapter, spec)
    model.requires_grad_(False)
    for name, (A, B) in adapter["pairs"].items():
        layer = attach(model, name, len(A), adapter["alphas"][name], adapter["lora_dropout"],
                       adapter["use_rslora"])
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    return model

# ---- The KL divergence, in chunks --------------------------------------------------------------

def kl_loss(student, teacher, h_s, h_t, reduction="token", chunk=256):
    """h_s, h_t (B,T,D), outputs of the last blocks -> KL(teacher || student), a scalar in nats.

    reduction  "token": the mean over B*T tokens.
               Resa: "sequence" (--kl-reduction) sums over T and averages over B, as the released
               code does.  Its gradient is T times larger before train.py clips it at norm 1."""
    check(reduction in ("token", "sequence"), f"reduction {reduction!r} is not token or sequence")
    B, T, _ = h_s.shape
    h_s = student.model.norm(h_s).flatten(0, 1)                                   # (N,D)
    h_t = teacher.model.norm(h_t).flatten(0, 1).detach()                          # (N,D)
    total = ChunkedKL.apply(h_s, h_t, student.lm_head.weight, teacher.lm_head.weight, chunk)
    return total / (B * T if reduction == "token" else B)

def logits(h, W):
    """h (N,D), W (V,D) -> (N,V) in at least fp32.  A GPU then never rounds them to bf16."""
    if h.is_cuda and h.dtype.itemsize == 2:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    return at_least_fp32(h @ W.T)

class ChunkedKL(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student) in nats, without ever holding an (N,V) tensor.

    h_s, h_t (N,D) are final-normed, W_s, W_t (V,D) frozen heads, p = softmax(h W.T):

        loss = sum_n sum_v p_t (log p_t - log p_s)          d loss / d h_s = (p_s - p_t) W_s

    The gradient is known in closed form, so it is made along with the loss, a chunk of tokens at a
    time.  At N 2,048 and V 151,936 one fp32 (N,V) tensor has 1.2 GB; the plain way holds several.
    """

    @staticmethod
    def forward(ctx, h_s, h_t, W_s, W_t, chunk):
        total = torch.zeros((), device=h_s.device, dtype=torch.float64)
        grad = torch.empty_like(h_s)                                              # (N,D)
        for i in range(0, len(h_s), chunk):
            log_s = logits(h_s[i:i + chunk], W_s).log_softmax(-1)                 # (chunk,V)
            log_t = logits(h_t[i:i + chunk], W_t).log_softmax(-1)                 # (chunk,V)
            p_t = log_t.exp()
            total += (p_t * (log_t - log_s)).sum().double()
            grad[i:i + chunk] = (log_s.exp() - p_t).to(W_s.dtype) @ W_s
        ctx.save_for_backward(grad)
        return total.to(torch.promote_types(h_s.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        grad, = ctx.saved_tensors
        return (grad * upstream).to(grad.dtype), None, None, None, None

# ---- The experiment: every arm is a command line -----------------------------------------------

# {target} and {source} are models, {out} is the folder of the experiment; these, steps and rate
# are flags of resa.py (data/flags.py).  Layer, width of the SAE and data are those of --preset.
SAES = {
    "sae": "train.py --stage sae --source {source} --steps {sae_steps}",
    "sae-mlp": "train.py --stage sae --source {source} --steps {sae_steps} --site mlp",
    "sae-base": "train.py --stage sae --source {target} --steps {sae_steps}",
}
# One budget for all, chosen on training questions and by the SAE's error, never on the test.
BUDGET = "--target {target} --steps {tune_steps} --batch 4 --lr {lr}"
TUNE = "train.py --stage tune " + BUDGET
TAUGHT = TUNE + " --teacher source --source {source}"
ARMS = {
    "base": "eval.py --model {target}",
    "RL source": "eval.py --model {source}",
    "SAE-Tuning (as coded)": TUNE + " --sae {out}/sae",
    "SAE-Tuning (as written)":
        TUNE + " --sae {out}/sae-mlp --site mlp --sae-grad on --schedule cosine",
    "SAE of the base": TUNE + " --sae {out}/sae-base",
    "random SAE": TUNE + " --sae {out}/sae --splice random",
    "noise of the SAE's size": TUNE + " --sae {out}/sae --splice noise",
    "trace-free SFT": "train.py --stage sft " + BUDGET,      # answers without reasoning
    "source teaches, with SAE": TAUGHT + " --sae {out}/sae",
    "source teaches, all learn": TAUGHT + " --sae {out}/sae --sae-grad on",
    "source teaches, no SAE": TAUGHT + " --splice none",
}
# (arm, its control, question), answered in words under the table; the other arms are for scale.
# There is no arm without SAE and other teacher: student and teacher would be equal, the KL 0.
QUESTIONS = [
    ("SAE-Tuning (as coded)", "base", "is it better than doing nothing"),
    ("SAE-Tuning (as written)", "base", "is it better than doing nothing"),
    ("SAE-Tuning (as coded)", "random SAE", "does it matter that the SAE is trained"),
    ("SAE-Tuning (as coded)", "noise of the SAE's size", "is it more than noise at that layer"),
    ("SAE-Tuning (as coded)", "SAE of the base", "does the source matter to the SAE"),
    ("source teaches, all learn", "source teaches, no SAE", "does the SAE help a stronger teacher"),
]
NOTE = """\
Temperature 0.6, top-p 0.95.  One training seed ({seed}): intervals cover questions and samples, not
another training.  Adapters are those after the last of {tune_steps} steps, not the best seen.
As coded: SAE under no_grad, block output.  As written: gradient through the SAE, MLP output, cosine
rate.  No correction for multiple comparisons.  A random SAE also does more damage than a trained
one: noise of the trained one's size is the control for that."""
QUICK = "\nThis was --quick: after 4 steps an SAE is hardly one.  It shows that everything runs."

def experiment(argv):
    """`python resa.py`: SAEs, then every arm; a table, a figure, and what they say."""
    import eval
    parser = arms_parser("resa.py", "SAE-Tuning and its controls: every arm, one table.")
    args = parse_experiment(parser, argv, quick=dict(questions=100, sae_steps=4, tune_steps=4))
    open_experiment(args)
    run_commands(SAES, args)
    asked = run_commands(ARMS, args)                     # {arm: the model spec that was asked}
    note = NOTE.format(**vars(args)) + QUICK * args.quick
    for bench in args.bench.split(","):
        eval.conclude(args.out, bench, asked, QUESTIONS, note)

def merge(argv):
    parser = Parser("resa.py merge", "Folds a spec's adapters into its weights.", presets=False)
    parser.add_argument("--model", required=True, help="BASE+ADAPTER, or BASE+ADAPTER*FACTOR")
    parser.add_argument("--out", required=True, help="directory to write; it must be new")
    args = parse(parser, argv)
    check(split_spec(args.model)[1], "resa.py merge: --model names no adapter, BASE+ADAPTER")
    check_new(args.out, "config.json")
    with one_writer(args.out):
        model = merge_adapter(load_model(args.model))
        save_model(model, args.out)
    print(f"{args.out}: {args.model}, merged; rounding to {model.config.dtype} changed what the "
          f"adapters add by {rounding(model, args.model):.2g} of its size")

def rounding(merged, spec):
    """How far what merging added is from what the adapters add: |W' - W - dW| / |dW|, of all W."""
    base, adapters = split_spec(spec)
    before, wanted, errors, sizes = load_model(base), {}, 0.0, 0.0
    for path, factor in adapters:
        adapter = read_adapter(path)
        for name, (A, B) in adapter["pairs"].items():
            delta = factor * adapter["scales"][name] * (B.double() @ A.double())         # (out,in)
            wanted[name] = wanted.get(name, 0) + delta
    for name, delta in wanted.items():
        weights = (model.get_submodule(name).weight.double() for model in (merged, before))
        errors += float((next(weights) - next(weights) - delta).square().sum())
        sizes += float(delta.square().sum())
    return math.sqrt(errors / sizes) if sizes else 0.0

def main(argv):
    merge(argv[1:]) if argv[:1] == ["merge"] else experiment(argv)

if __name__ == "__main__":
    front_door(main)
