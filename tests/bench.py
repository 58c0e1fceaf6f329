"""Speed of the fast paths against their plain twins, as ratios measured in one run.

    python tests/bench.py          embedded model: a minute on a CPU
    python tests/bench.py --config CONFIG.json --device cuda --dtype bfloat16      any shape
    python tests/bench.py sae      a TopK training step against dense codes and sparsify, where it
                                   is installed, at Qwen2-0.5B's shape: ten minutes, 8 GB

The tests say that the sides give the same numbers.  B batch, T time, D width, F latents, N tokens.
"""

import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # a script has tests/ there

import model  # noqa: E402
import resa  # noqa: E402
import sae as sae_  # noqa: E402
from data.files import TINY, read_json  # noqa: E402
from data.flags import Parser, front_door, whole  # noqa: E402

def race(title, sides, runs=7):
    """Prints the median of each side, and of its ratio to the first one, with the extremes.

    The sides alternate, so that a busy machine disturbs all of them.
    """
    times = torch.zeros(runs + 2, len(sides))            # milliseconds
    for run in times:
        for i, side in enumerate(sides.values()):
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():                # until the device is done
                torch.cuda.synchronize()
            run[i] = 1e3 * (time.perf_counter() - start)
    times = times[2:]                                    # in the first, memory is laid out
    print(f"\n{title}")
    for name, own in zip(sides, times.T):
        low, middle, high = (own / times[:, 0]).quantile(torch.tensor([0, 0.5, 1])).tolist()
        print(f"    {name:28s} {own.median():9.1f} ms   {middle:5.2f}x ({low:.2f} .. {high:.2f})")

# ---- Paths of the method -----------------------------------------------------------------------

@torch.no_grad()
def recompute(lm, prompt, tokens, samples):
    """Greedy samples of a prompt, one after the other, without a cache."""
    for _ in range(samples):
        ids = list(prompt)
        for _ in range(tokens):
            logits = lm(torch.tensor([ids], device=lm.lm_head.weight.device))     # (1,T,V)
            ids.append(int(logits[0, -1].argmax()))

def paths(args, lm, layer, ids):
    last, prompt = len(lm.model.layers) - 1, ids[0, :16].tolist()
    race("activations", {"stop at the hook": partial(resa.activations, lm, ids, layer),
                         "whole model": partial(resa.activations, lm, ids, last)})
    cached = partial(model.generate, lm, [prompt], 48, temperature=0, samples=4)
    race("sampling", {"cache, one batch": cached,
                      "recompute, one by one": partial(recompute, lm, prompt, 48, 4)})

    resa.add_lora(lm, dropout=0.0)
    sae = sae_.build("topk", lm.config.hidden_size, args.latents, k=args.k)
    sae.to(args.device).requires_grad_(False)

    def step():
        resa.tuning_loss(lm, sae, layer, ids).backward()

    def two_passes():
        with mock.patch("resa.shares_prefix", return_value=False):
            step()
    race("tuning step", {"shared frozen blocks": step, "two passes": two_passes})

    h = lm.run(ids).detach()                                                      # (B,T,D)
    h_s = (h + 0.1 * torch.randn_like(h)).requires_grad_(True)

    def chunks():
        resa.kl_loss(lm, lm, h_s, h).backward()

    def autograd():
        log_s, p_t = lm.head(h_s).float().log_softmax(-1), lm.head(h).float().softmax(-1)
        F.kl_div(log_s, p_t, reduction="batchmean").backward()                    # (B,T,V) each
    race("KL", {"in chunks, closed form": chunks, "autograd": autograd})

# ---- SAE training: ours, the same with dense codes, sparsify -----------------------------------

QWEN2_05B = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=1024,
                 num_attention_heads=14, num_key_value_heads=2)      # words: no side has logits

def dense_step(sae, optimizer, x):
    """TopK as on paper: z is (N,F), and autograd does the rest."""
    fvu, _, _ = sae_.plain_topk(sae, x)
    fvu.backward()
    sae.project_grad_()
    optimizer.step()
    sae.constrain_()
    optimizer.zero_grad()
    return fvu.detach()

def sparsify_step(sae, optimizer, x):
    """What sparsify's trainer does, without logging and counting."""
    sae.set_decoder_norm_to_unit_norm()
    fvu = sae(x).fvu
    fvu.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    return fvu.detach()

def make(name, width, optimizer, args):
    """A side's step, with a fresh SAE and optimizer: x (N,D) -> FVU."""
    if name != "sparsify":
        sae = sae_.build("topk", width, args.latents, k=args.k).to(args.device)
        optimizer = sae_.make_optimizer(sae, optimizer)
        if name == "dense codes":
            return partial(dense_step, sae, optimizer)
        return lambda x: sae_.train_step(sae, optimizer, [x])["fvu"]
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    torch.manual_seed(0)
    sae = SparseCoder(width, SparseCoderConfig(num_latents=args.latents, k=args.k), args.device)
    lr = sae_.default_lr(optimizer, args.latents)
    if optimizer == "adam":
        return partial(sparsify_step, sae, torch.optim.Adam(sae.parameters(), lr=lr))
    wrapped = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
    wrapped.train()
    return partial(sparsify_step, sae, wrapped)

def sae_training(args, lm, layer, ids):
    """A step alone, then with the model run on its text, where only ours stops at the hook."""
    torch.set_float32_matmul_precision("high")           # as sparsify's trainer does
    D, names = lm.config.hidden_size, ["ours", "dense codes", "sparsify"]
    if not find_spec("sparsify"):
        print(f"{names.pop()} is not installed")
    # Correlated, as activations are, so that latents are chosen unevenly.
    x = (torch.randn(ids.numel(), D) * torch.linspace(0.2, 3, D)).to(args.device)     # (N,D)

    def work(step, with_model, stop):
        if with_model:
            lm.run(ids, stop=stop)       # only its time counts: all sides train on the same x
        return step(x)
    for optimizer, with_model in (("adam", False), ("signum", False), ("adam", True)):
        stops, sides = {"ours": layer + 1}, {}           # the others run all blocks: None
        for name in names:
            step = make(name, D, optimizer, args)
            sides[name] = partial(work, step, with_model, stops.get(name))
        fvus = [float(side()) for side in sides.values()]
        assert max(fvus) < 1.01 * min(fvus), f"not the same work: {fvus}"
        race(f"{'model + ' * with_model}SAE step, {optimizer}", sides)

def main(argv):
    parser = Parser("tests/bench.py", __doc__, preset=None)
    add = parser.add_argument
    add("what", nargs="?", choices=("paths", "sae"), default="paths")
    add("--config", help="config.json of a model, whose weights will be random")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", default="float32", choices=model.DTYPES, help="of the model")
    add("--tokens", type=whole(1), help="in each of 4 chunks; by default 256, for sae 512")
    add("--latents", type=whole(1), help="by default 1024, for sae 16384")
    add("--k", type=whole(1), help="by default 16, for sae 32")
    args = parser.parse_args(argv)
    args.device = model.choose_device(args.device)
    run, shape, sizes = paths, {}, dict(tokens=256, latents=1024, k=16)
    if args.what == "sae":
        run, shape, sizes = sae_training, QWEN2_05B, dict(tokens=512, latents=16384, k=32)
    for name, size in sizes.items():
        setattr(args, name, getattr(args, name) or size)
    config = read_json(args.config or TINY / "init" / "config.json")
    config = model.Config.from_dict(config if args.config else config | shape)
    lm = model.Transformer(config).requires_grad_(False).eval()
    model.init_weights(lm).to(args.device, model.DTYPES[args.dtype])
    layer = config.num_hidden_layers * 3 // 7            # published: 12 of 28
    ids = torch.randint(0, config.vocab_size, (4, args.tokens)).to(args.device)      # (B,T)
    print(f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads, 4 x {args.tokens} "
          f"tokens, hook at block {layer} of {config.num_hidden_layers}")
    run(args, lm, layer, ids)

if __name__ == "__main__":
    front_door(main)
