"""Speed: ours, its plain twin and the peer in turn, as ratios measured in one run.

    python tests/bench.py generate      decoding: sampled answers to prompts of different lengths
    python tests/bench.py sae           a TopK training step
    python tests/bench.py tune          a step of SAE-Tuning
    python tests/bench.py growth        time and memory as a length, a dictionary, a batch grows
    python tests/bench.py all           on a GPU: --device cuda

Peers are left out where they are not installed: transformers, PEFT, sparsify.  On a CPU the shape
is that of the embedded model, on a GPU that of DeepSeek-R1-Distill-Qwen-1.5B, with random weights.
The tests say that ours and the plain twin give the same.  B batch, T time, D width, F latents.
"""

import re
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # a script has tests/ there

import model as model_  # noqa: E402
import resa  # noqa: E402
import sae as sae_  # noqa: E402
from data.files import ROOT, TINY, read_jsonl  # noqa: E402
from data.flags import Parser, choose_device, front_door, whole  # noqa: E402

SHAPES = {name: f"random:{ROOT}/tests/shapes/{name}.json" for name in ("0.5B", "1.5B")}
SHAPES["tiny"] = f"{TINY}/distill"           # the embedded model

def load(args):
    """The model of --shape."""
    return model_.load_model(SHAPES[args.shape], device=args.device)

def peer(lm):
    """The same model in transformers, which shares our weights; None: not installed."""
    if not find_spec("transformers"):
        print("    transformers is not installed: left out")
        return None
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(**lm.config.to_dict())
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(config)
    theirs.load_state_dict(lm.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)      # is in no checkpoint
    return theirs.to(lm.lm_head.weight.device).eval()

def clock(side, device):
    """Milliseconds of a call, until the device is done."""
    start = time.perf_counter()
    side()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)

def race(title, sides, device, runs=5):
    """Prints the median of each side, and of its ratio to the first one, with the extremes.
    The sides alternate, so that a busy machine disturbs all of them."""
    times = torch.tensor([[clock(side, device) for side in sides.values()]
                          for _ in range(runs + 2)])[2:]     # in the first two, memory is laid out
    print(f"\n{title}")
    for name, own in zip(sides, times.T):
        low, middle, high = (own / times[:, 0]).quantile(torch.tensor([0, 0.5, 1])).tolist()
        print(f"    {name:28s} {own.median():9.1f} ms   {middle:5.2f}x ({low:.2f} .. {high:.2f})")

# ---- generate ----------------------------------------------------------------------------------

def questions(lm, args):
    """--prompts token ids: embedded questions, or random ids of 16 to 128 tokens."""
    if args.shape == "tiny":
        tokenizer = model_.load_tokenizer(f"{TINY}/distill")
        rows = [row for _, row in read_jsonl(TINY / "test.jsonl")][:args.prompts]
        return [tokenizer.encode(tokenizer.chat([{"role": "user", "content": row["problem"]}]))
                for row in rows], tokenizer.eos_ids
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (args.prompts,), generator=rng).tolist()
    V = lm.config.vocab_size
    return [torch.randint(V, (n,), generator=rng).tolist() for n in lengths], []

def bench_generate(args):
    lm, real = load(args), model_.likeliest
    (prompts, stop), new, rows = questions(lm, args), args.new_tokens, args.rows

    def ours(model=lm):
        model_.generate(model, prompts, new, stop_ids=stop, slots=rows)
    all_sorted = mock.patch("model.likeliest", lambda p, _: real(p, True))
    sides = {"ours": ours, "ours, every token sorted": all_sorted(ours)}
    if args.device != "cpu":
        sides["ours, no graphs"] = mock.patch("model.Decoder.replay", model_.Decoder.step)(ours)
    if args.compile:
        sides["ours, compiled"] = partial(ours, load(args).compile_blocks())
    theirs = peer(lm)
    if theirs:
        sides["transformers"] = partial(peer_generate, theirs, prompts, new, stop, rows)
    race(f"generate: {args.shape}, {len(prompts)} prompts, {new} new tokens, {rows} rows at a time",
         sides, args.device)

@torch.no_grad()
def peer_generate(theirs, prompts, new, stop, rows):
    """transformers' generate, `rows` prompts at a time, in the order they come."""
    device = theirs.device
    for part in (prompts[i:i + rows] for i in range(0, len(prompts), rows)):
        T = max(map(len, part))
        ids = torch.tensor([[0] * (T - len(ids)) + ids for ids in part], device=device)
        mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in part], device=device)
        theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0,
                        temperature=0.6, top_p=0.95, pad_token_id=0,
                        eos_token_id=list(stop) or None)

# ---- sae: ours, the same with dense codes, sparsify --------------------------------------------

def autograd_step(fvu_of, project, optimizer, normalize, x):
    """A step as sparsify's trainer takes it: x (N,D) -> FVU."""
    fvu = fvu_of(x)
    fvu.backward()
    project()
    optimizer.step()
    normalize()
    optimizer.zero_grad()
    return fvu.detach()

def sae_steps(width, latents, k, device):
    """{side: its step x (N,D) -> FVU}, each with a fresh TopK SAE and Adam."""
    ours, dense = (sae_.build("topk", width, latents, k=k).to(device) for _ in range(2))
    adam = sae_.make_optimizer(ours, "adam")
    steps = {"ours": lambda x: sae_.train_step(ours, adam, [x])["fvu"]}
    steps["dense codes"] = partial(
        autograd_step, lambda x: sae_.plain_topk(dense, x)[0], dense.project_grad_,
        sae_.make_optimizer(dense, "adam"), dense.constrain_)
    if find_spec("sparsify"):
        from sparsify import SparseCoder, SparseCoderConfig
        torch.manual_seed(0)                             # the weights of ours
        theirs = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=k), device)
        steps["sparsify"] = partial(
            autograd_step, lambda x: theirs(x).fvu,
            theirs.remove_gradient_parallel_to_decoder_directions,
            torch.optim.Adam(theirs.parameters(), lr=sae_.default_lr("adam", latents)),
            theirs.set_decoder_norm_to_unit_norm)
    else:
        print("    sparsify is not installed: left out")
    return steps

def bench_sae(args):
    width, latents, tokens = (896, 16384, 2048) if args.device == "cpu" else (1536, 65536, 16384)
    torch.set_float32_matmul_precision("high")           # TF32, as sparsify's trainer has it
    # Correlated, as activations are, so that latents are chosen unevenly.
    x = (torch.randn(tokens, width) * torch.linspace(0.2, 3, width)).to(args.device)      # (N,D)
    steps = sae_steps(width, latents, 32, args.device)
    race(f"sae: a step, D {width}, F {latents:,}, k 32, {tokens:,} tokens, Adam",
         {name: partial(step, x) for name, step in steps.items()}, args.device)
    torch.set_float32_matmul_precision("highest")

# ---- tune: ours, two passes, transformers + PEFT as published ----------------------------------

def bench_tune(args):
    lm, T = load(args), args.tokens
    layer = lm.config.num_hidden_layers * 3 // 7         # published: 12 of 28
    ids = torch.randint(lm.config.vocab_size, (1, T), device=args.device)                 # (B,T)
    sae = sae_.build("topk", lm.config.hidden_size, 16384, k=32).to(args.device)
    sae.requires_grad_(False)
    theirs = peer(lm) if find_spec("peft") else None     # before ours has adapters: one base
    resa.add_lora(lm, dropout=0.0).train()

    def ours(model=lm):
        resa.tuning_loss(model, sae, layer, ids).backward()
    two = mock.patch("resa.shares_prefix", mock.Mock(return_value=False))
    sides = {"ours": ours, "ours, two passes": two(ours)}
    if args.compile:
        fast = resa.add_lora(load(args), dropout=0.0).train().compile_blocks()
        sides["ours, compiled"] = partial(ours, fast)
    if theirs:
        sides["transformers + PEFT"] = peer_tune(theirs, sae, layer, ids)
    race(f"tune: a step, {args.shape}, 1 x {T:,} tokens, layer {layer}", sides, args.device)

def peer_tune(theirs, sae, layer, ids):
    """A step as published: LoRA of PEFT, a hook for the SAE, logits of all tokens at once."""
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(r=32, lora_alpha=128, lora_dropout=0.0, target_modules=list(resa.TARGETS))
    theirs = get_peft_model(theirs, lora).train()
    block = theirs.base_model.model.model.layers[layer]

    def through_sae(module, inputs, x):
        with torch.no_grad():
            return sae(x)

    def step():
        with torch.no_grad(), theirs.disable_adapter():
            teacher = theirs(input_ids=ids).logits.float().log_softmax(-1)               # (B,T,V)
        handle = block.register_forward_hook(through_sae)
        student = theirs(input_ids=ids).logits.float().log_softmax(-1)                   # (B,T,V)
        handle.remove()
        nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").backward()
    return step

# ---- growth ------------------------------------------------------------------------------------

def peak(side, device):
    """Megabytes that a call takes at the most, beyond what was there before."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")    # Linux: forgets the peak so far
        before = memory("VmRSS")
        side()
        return memory("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e6
    side()
    return torch.cuda.max_memory_allocated() / 1e6 - before

def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1e3

def grow(title, sizes, side_of, device):
    """A line for each size: time, per unit of size, peak memory."""
    print(f"\n{title:>24s} {'ms':>10s} {'us each':>9s} {'MB peak':>9s}")
    for size in sizes:
        side = side_of(size)
        side()
        ms = min(clock(side, device) for _ in range(3))
        print(f"{size:24,d} {ms:10.1f} {1e3 * ms / size:9.2f} {peak(side, device):9.0f}")

def bench_growth(args):
    lm = load(args)
    V, D, layer = lm.config.vocab_size, lm.config.hidden_size, lm.config.num_hidden_layers * 3 // 7

    def decoding(rows):
        prompts = [[1 + i % (V - 1)] * 16 for i in range(rows)]
        return partial(model_.generate, lm, prompts, 32, temperature=0, slots=rows)
    grow("generate: rows", (1, 4, 16, 64, 256), decoding, args.device)

    def learning(latents):
        sae = sae_.build("topk", D, latents, k=32).to(args.device)
        x, adam = torch.randn(1024, D, device=args.device), sae_.make_optimizer(sae, "adam")
        return partial(sae_.train_step, sae, adam, [x])
    grow("sae: latents F", (4096, 16384, 65536), learning, args.device)
    resa.add_lora(lm, dropout=0.0).train()
    sae = sae_.build("topk", D, 4096, k=32).to(args.device).requires_grad_(False)

    def tuning(T):
        ids = torch.randint(V, (1, T), device=args.device)                                # (B,T)
        return lambda: resa.tuning_loss(lm, sae, layer, ids).backward()
    grow("tune: tokens T", (512, 1024, 2048, 4096, 8192), tuning, args.device)

PARTS = {"generate": bench_generate, "sae": bench_sae, "tune": bench_tune, "growth": bench_growth}

def main(argv):
    parser = Parser("tests/bench.py", __doc__, presets=False)
    add = parser.add_argument
    add("part", choices=(*PARTS, "all"), help="what is raced")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--shape", choices=SHAPES, help="of the model; by default tiny, on a GPU 1.5B")
    add("--prompts", type=whole(1), default=256, help="to generate from")
    add("--new-tokens", type=whole(1), default=96, help="of each answer, at most")
    add("--rows", type=whole(1), default=64, help="answers decoded at a time")
    add("--tokens", type=whole(2), default=512, help="of the tuning step")
    add("--compile", action="store_true", help="also race blocks by torch.compile")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    args.shape = args.shape or ("tiny" if args.device == "cpu" else "1.5B")
    card = "" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.device} {card}  torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in PARTS if args.part == "all" else [args.part]:
        PARTS[name](args)

if __name__ == "__main__":
    front_door(main)
