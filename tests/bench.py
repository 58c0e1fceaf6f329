"""Speed of the fast paths against the plain way, as ratios measured in one run.

    python tests/bench.py            on the embedded model, CPU: about a minute
    python tests/bench.py --config CONFIG.json --device cuda --dtype bfloat16      random weights of any shape
    python tests/bench.py sae        TopK training at Qwen2-0.5B's shape against sparsify (where it is installed) and
                                     against dense codes: ten minutes on one CPU core, 8 GB

Each pair does the same work; the tests say that they give the same numbers.  Best of several runs each,
alternating, so that a busy machine disturbs both.  `sae` takes medians, each side in a process of its own.
"""
import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import resa  # noqa: E402
import sae as sae_  # noqa: E402


def race(fast, plain, runs=5):
    """Seconds of each, best of `runs`, alternating."""
    best = [float("inf"), float("inf")]
    for _ in range(runs):
        for i, f in enumerate((fast, plain)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def step_of(loss):
    def go():
        loss().backward()
    return go


@torch.no_grad()
def uncached(lm, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(lm(torch.tensor([ids], device=lm.lm_head.weight.device))[0, -1].argmax()))
    return ids[len(prompt):]


def paths(args):
    lm = model.load_model(f"random:{args.config}", args.dtype, args.device)
    layer, (D, V) = len(lm.model.layers) * 3 // 7, (lm.config.hidden_size, lm.config.vocab_size)
    rng = torch.Generator(args.device).manual_seed(0)
    ids = torch.randint(0, V, (4, args.tokens), device=args.device, generator=rng)
    sae = sae_.build("topk", D, args.latents, k=args.k).to(args.device, lm.lm_head.weight.dtype).requires_grad_(False)

    @torch.no_grad()
    def whole():
        with resa.splice(lm, torch.nn.Identity(), layer):
            lm.run(ids)
    rows = [("activations: stop at the hook / whole model", *race(lambda: resa.activations(lm, ids, layer), whole))]

    prompt = ids[0, :16].tolist()
    plain = lambda: [uncached(lm, prompt, 48) for _ in range(4)]  # noqa: E731
    fast = lambda: model.generate(lm, [prompt], 48, temperature=0, samples=4)  # noqa: E731
    assert fast()[0][0] == plain()[0] or args.dtype != "float32"
    rows.append(("sampling: cache, one batch / recompute, one by one", *race(fast, plain, 3)))

    resa.add_lora(lm, dropout=0.0)
    rows.append(("tuning step: shared frozen blocks / two passes",
                 *race(step_of(lambda: resa.tuning_loss(lm, sae, layer, ids)),
                       step_of(lambda: resa.plain_tuning_loss(lm, sae, layer, ids)))))
    h = lm.run(ids).detach()
    h_s = (h + 0.1 * torch.randn_like(h)).requires_grad_(True)

    def naive():
        log_s, p_t = lm.head(h_s).float().log_softmax(-1), lm.head(h).float().softmax(-1)
        return torch.nn.functional.kl_div(log_s, p_t, reduction="batchmean")
    rows.append(("KL: in chunks, closed-form gradient / autograd",
                 *race(step_of(lambda: resa.kl_loss(lm, lm, h_s, h)), step_of(naive))))

    print(f"{args.config.removeprefix(str(ROOT) + '/')}, {args.device}, {args.dtype}, {torch.get_num_threads()} "
          f"threads, chunks 4 x {args.tokens}\n")
    print(f"{'fast / plain':52s} {'fast ms':>9s} {'plain ms':>9s} {'speed-up':>9s}")
    for name, fast, plain in rows:
        print(f"{name:52s} {fast * 1e3:9.1f} {plain * 1e3:9.1f} {plain / fast:8.2f}x")


# ----------------------------------------------------------------------------------------------------------
# SAE training: ours, the same with dense codes, sparsify's
# ----------------------------------------------------------------------------------------------------------

QWEN2_05B = dict(model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6,
                 rope_theta=1e6, tie_word_embeddings=True, torch_dtype="float32",
                 vocab_size=1024)      # of 151,936: neither side computes logits


def our_step(args, width, optimizer):
    sae = sae_.build("topk", width, args.latents, k=args.k).to(args.device)
    optimizer = sae_.make_optimizer(sae, optimizer)
    return lambda x: sae_.train_step(sae, optimizer, [x])["fvu"]


def dense_step(args, width, optimizer):
    """TopK as one would write it first: z is (N,F), and autograd does the rest."""
    sae = sae_.build("topk", width, args.latents, k=args.k).to(args.device)
    optimizer = sae_.make_optimizer(sae, optimizer)

    def step(x):
        optimizer.zero_grad()
        value, index = sae.preacts(x).relu().topk(args.k, dim=1, sorted=False)
        e = x - sae.rebuild(torch.zeros(len(x), args.latents, device=x.device).scatter(1, index, value))
        fvu = e.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        fvu.backward()
        sae.project_grad_()
        optimizer.step()
        sae.settle_()
        return fvu.detach()
    return step


def sparsify_step(args, width, optimizer):
    """What sparsify's trainer does at a hook and after it, its logging and counting of dead latents left out."""
    with contextlib.redirect_stdout(io.StringIO()):      # it prints when imported
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
    torch.set_float32_matmul_precision("high")      # as its trainer does
    torch.manual_seed(0)
    sae = SparseCoder(width, SparseCoderConfig(num_latents=args.latents, k=args.k), args.device)
    lr = sae_.default_lr(optimizer, args.latents)
    if optimizer == "adam":
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
        optimizer.train()

    def step(x):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return out.fvu.detach()
    return step


def our_model(args, step):
    lm = model.load_model(args.model, args.dtype, args.device)
    return lambda ids: step(resa.activations(lm, ids, args.layer).flatten(0, 1).float())


def whole_model(args, step):
    lm, result = model.load_model(args.model, args.dtype, args.device), []
    lm.model.layers[args.layer].register_forward_hook(
        lambda module, inputs, x: result.append(step(x.flatten(0, 1).float())))

    def go(ids):
        lm.run(ids)
        return result.pop()
    return go


def sparsify_model(args, step):
    """sparsify loads the model without its head and runs all of it, training inside a hook."""
    from transformers import AutoModel
    lm, result = AutoModel.from_pretrained(args.model, dtype=args.dtype).to(args.device).requires_grad_(False), []

    def hook(module, inputs, x):
        result.append(step((x[0] if isinstance(x, tuple) else x).flatten(0, 1).float()))
    lm.layers[args.layer].register_forward_hook(hook)

    def go(ids):
        lm(ids)
        return result.pop()
    return go


SIDES = {"ours": (our_step, our_model), "dense": (dense_step, whole_model),
         "sparsify": (sparsify_step, sparsify_model)}


def memory(field):
    """VmHWM, the most this process ever held, or VmRSS, what it holds now: in MB (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) // 1024


def side(pipe, name, optimizer, with_model, args):
    """One side in its own process: at each request one step, back come seconds and the FVU; at the end its peak."""
    make_step, make_model = SIDES[name]
    rng, width = torch.Generator().manual_seed(0), args.width
    try:      # a tiny step first: what the process holds after it is the libraries
        tiny = argparse.Namespace(latents=64, k=2, device=args.device)
        make_step(tiny, 8, optimizer)(torch.randn(8, 8, device=args.device))
        libraries, step = memory("VmRSS"), make_step(args, width, optimizer)
        if with_model:
            step, x = make_model(args, step), torch.randint(0, args.vocab, (4, args.tokens), generator=rng)
        else:      # correlated, as activations are, so that the choice of latents is uneven
            x = torch.randn(4 * args.tokens, width, generator=rng) * torch.linspace(0.2, 3, width)
    except ImportError as err:
        return pipe.send(f"{type(err).__name__}: {str(err).splitlines()[0]}")
    x, cuda = x.to(args.device), args.device.startswith("cuda")
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        fvu = float(step(x))      # which waits for the device
        if cuda:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, fvu))
    pipe.send((torch.cuda.max_memory_allocated() // 2**20, 0) if cuda else (memory("VmHWM"), libraries))


def duel(names, optimizer, with_model, runs, args):
    """-> {name: (seconds of each run, peak MB, MB of libraries)} of the sides that can run, alternating.

    The first two steps, in which memory is laid out, are not measured."""
    context, pipes, times, fvus = multiprocessing.get_context("spawn"), {}, {}, {}
    for name in names:
        pipes[name], end = context.Pipe()
        context.Process(target=side, args=(end, name, optimizer, with_model, args), daemon=True).start()
        if fault := pipes[name].recv():
            print(f"{name}: not measured, {fault}")
            del pipes[name]
    for run in range(runs + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, fvu = pipe.recv()
            if run >= 2:
                times.setdefault(name, []).append(seconds)
            fvus.setdefault(name, []).append(fvu)
    assert all(math.isclose(fvu, own, rel_tol=0.01) for values in fvus.values()
               for fvu, own in zip(values[:2], fvus["ours"])), f"not the same work: {fvus}"
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (times[name], *pipe.recv()) for name, pipe in pipes.items()}


def sae_training(args):
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(Path(args.config).read_text()) if args.config else QWEN2_05B
        args.width, args.vocab = config["hidden_size"], config["vocab_size"]
        args.layer, args.model = config["num_hidden_layers"] * 3 // 7, f"{folder}/model"      # published: 12 of 28
        Path(folder, "config.json").write_text(json.dumps(config))
        model.save_model(model.load_model(f"random:{folder}/config.json", args.dtype), args.model)
        print(f"width {args.width}, {args.latents} latents, k {args.k}, 4 x {args.tokens} tokens, hook at block "
              f"{args.layer} of {config['num_hidden_layers']}; {args.device}, {args.dtype}, "
              f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
        for optimizer, with_model in (("adam", False), ("signum", False), ("adam", True)):
            print(f"\n{'model + ' if with_model else ''}SAE step, {optimizer:18s} median ms     min - max   peak MB "
                  "(libraries)   ours is faster")
            results = duel(SIDES, optimizer, with_model, args.runs, args)
            for name, (seconds, peak, libraries) in results.items():
                ratio = [theirs / ours for theirs, ours in zip(seconds, results["ours"][0])]
                print(f"    {name:28s} {statistics.median(seconds) * 1e3:9.0f} {min(seconds) * 1e3:7.0f} - "
                      f"{max(seconds) * 1e3:<6.0f} {peak:7d} ({libraries:5d})   "
                      f"{statistics.median(ratio):5.2f}x ({min(ratio):.2f} - {max(ratio):.2f})", flush=True)
        print(f"\nload {os.getloadavg()[0]:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("paths", "sae"), default="paths")
    parser.add_argument("--config", help="of the shape; default the embedded model's, for sae Qwen2-0.5B's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--tokens", type=int, help="in each of 4 chunks; default 256, for sae 512")
    parser.add_argument("--latents", type=int, help="default 1024, for sae 16384")
    parser.add_argument("--k", type=int, help="default 16, for sae 32")
    parser.add_argument("--runs", type=int, default=7, help="of each side, for sae")
    args = parser.parse_args()
    usual = dict(tokens=512, latents=16384, k=32) if args.what == "sae" else dict(
        config=f"{ROOT}/data/tiny/init/config.json", tokens=256, latents=1024, k=16)
    for name, value in usual.items():
        setattr(args, name, getattr(args, name) or value)
    (sae_training if args.what == "sae" else paths)(args)


if __name__ == "__main__":
    main()
