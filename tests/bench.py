"""Speed of the fast paths against their plain twins, as ratios measured in one run.

    python tests/bench.py       embedded model; or --model random:CONFIG.json --device cuda
    python tests/bench.py sae   a TopK training step at the width of Qwen2-0.5B

The tests say that the sides give the same numbers.  B batch, T time, D width, N tokens.
"""

import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # a script has tests/ there

import model  # noqa: E402
import resa  # noqa: E402
import sae as sae_  # noqa: E402
from data.files import TINY  # noqa: E402
from data.flags import Parser, choose_device, front_door  # noqa: E402

def race(title, sides):
    """Prints the median of each side, and of its ratio to the first one, with the extremes.
    The sides alternate, so that a busy machine disturbs all of them."""
    times = torch.zeros(9, len(sides))                   # milliseconds
    for run in times:
        for i, side in enumerate(sides.values()):
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():                # until the device is done
                torch.cuda.synchronize()
            run[i] = 1e3 * (time.perf_counter() - start)
    times = times[2:]                                    # in the first two, memory is laid out
    print(f"\n{title}")
    for name, own in zip(sides, times.T):
        low, middle, high = (own / times[:, 0]).quantile(torch.tensor([0, 0.5, 1])).tolist()
        print(f"    {name:28s} {own.median():9.1f} ms   {middle:5.2f}x ({low:.2f} .. {high:.2f})")

# ---- Paths of the method -----------------------------------------------------------------------

def paths(lm):
    layer = lm.config.num_hidden_layers * 3 // 7         # published: 12 of 28
    ids = torch.randint(0, lm.config.vocab_size, (4, 256)).to(lm.lm_head.weight.device)   # (B,T)
    race("activations", {"stop at the hook": partial(resa.activations, lm, ids, layer),
                         "whole model": partial(lm.run, ids)})

    def recompute():
        for _ in range(4):
            sample = ids[:1, :16]                                                 # (1,T)
            for _ in range(48):
                sample = torch.cat([sample, lm(sample)[:, -1:].argmax(-1)], dim=1)
    cached = partial(model.generate, lm, ids[:1, :16].tolist(), 48, temperature=0, samples=4)
    race("sampling", {"cache, one batch": cached, "recompute, one by one": recompute})

    resa.add_lora(lm, dropout=0.0)
    sae = sae_.build("topk", lm.config.hidden_size, 1024, k=16).to(ids.device)
    sae.requires_grad_(False)

    def step():
        resa.tuning_loss(lm, sae, layer, ids).backward()
    two_passes = mock.patch("resa.shares_prefix", mock.Mock(return_value=False))(step)
    race("tuning step", {"shared frozen blocks": step, "two passes": two_passes})

# ---- SAE training: ours, the same with dense codes, sparsify -----------------------------------

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
    return steps

def main(argv):
    parser = Parser("tests/bench.py", __doc__, preset=None)
    parser.add_argument("what", nargs="?", choices=("paths", "sae"), default="paths")
    parser.add_argument("--model", default=f"{TINY}/distill", help="whose paths are raced")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    print(f"{device}, {torch.get_num_threads()} threads")
    if args.what == "paths":
        return paths(model.load_model(args.model, device=device))
    torch.set_float32_matmul_precision("high")           # as sparsify's trainer does
    # Correlated, as activations are, so that latents are chosen unevenly.
    x = (torch.randn(2048, 896) * torch.linspace(0.2, 3, 896)).to(device)         # (N,D)
    steps = sae_steps(896, 16384, 32, device)
    race("SAE step", {side: partial(step, x) for side, step in steps.items()})

if __name__ == "__main__":
    front_door(main)
