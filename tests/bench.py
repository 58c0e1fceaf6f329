"""Speed of the fast paths against the plain way, as ratios measured in one run.

    python tests/bench.py            on the embedded model, CPU: about a minute
    python tests/bench.py --config CONFIG.json --device cuda --dtype bfloat16      random weights of any shape

Each pair does the same work; the tests say that they give the same numbers.  Best of several runs each,
alternating, so that a busy machine disturbs both.
"""
import argparse
import sys
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=f"{ROOT}/data/tiny/init/config.json", help="config.json of the shape to measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a chunk")
    parser.add_argument("--latents", type=int, default=1024)
    args = parser.parse_args()
    lm = model.load_model(f"random:{args.config}", args.dtype, args.device)
    layer, (D, V) = len(lm.model.layers) * 3 // 7, (lm.config.hidden_size, lm.config.vocab_size)
    ids = torch.randint(0, V, (4, args.tokens), device=args.device, generator=torch.Generator(args.device).manual_seed(0))
    sae = sae_.build("topk", D, args.latents, k=16).to(args.device, lm.lm_head.weight.dtype).requires_grad_(False)

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

    print(f"{args.config.removeprefix(str(ROOT) + '/')}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads, "
          f"chunks 4 x {args.tokens}\n")
    print(f"{'fast / plain':52s} {'fast ms':>9s} {'plain ms':>9s} {'speed-up':>9s}")
    for name, fast, plain in rows:
        print(f"{name:52s} {fast * 1e3:9.1f} {plain * 1e3:9.1f} {plain / fast:8.2f}x")


if __name__ == "__main__":
    main()
