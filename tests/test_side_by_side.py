"""
After equal training on the same activations our SAEs are no worse than those of dictionary_learning
and sparsify.

    python -m pytest -s tests/test_side_by_side.py      prints the table; skipped where the
                                                        packages are not installed

Equal: the data and their order, encoder and decoder at the start, optimiser, rate, steps, and what
the loss weighs.  Each starts b_dec its own way.  FVU is that of tokens nobody was trained on, at
the same L0; ours may be 2 % above.
"""
import importlib

import pytest
import torch
from torch.nn.functional import normalize

import sae as S
from tests import bench

D, F, K, STEPS, BATCH, LR = 32, 256, 8, 300, 256, 2e-3
DEAD = 20 * BATCH      # tokens: the packages' 10 million would never come, nor would AuxK
AUX = dict(aux_coef=1 / 32, k_aux=D // 2, dead_after=DEAD)
LEVELS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
WARM = dict(sparsity_warmup_steps=STEPS // 10)


def planted(seed):
    """-> draw(n) (n,D): 128 atoms, about 6 a token, some far more often than others; a mean, noise;
    ||x||^2 ~ 1."""
    rng = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(128, D, generator=rng), dim=1)
    mean = 0.3 * torch.randn(D, generator=rng)
    often = torch.arange(1, 129) ** -0.5
    often = (6 * often / often.sum()).clamp(max=0.5)

    def draw(n):
        fires = torch.rand(n, 128, generator=rng) < often
        size = fires * (0.5 + torch.rand(n, 128, generator=rng))
        return (size @ atoms + mean + 0.05 * torch.randn(n, D, generator=rng)) / 3.4
    return draw


def train_ours(variant, W_enc, W_dec, data, optimizer="adam", **hyper):
    sae = S.build(variant, D, F, **hyper)
    sae.W_enc.data.copy_(W_enc)
    sae.W_dec.data.copy_(W_dec)
    S.init_b_dec(sae, data[0])
    optimizer = S.make_optimizer(sae, optimizer, LR)
    for step, x in enumerate(data):
        S.train_step(sae, optimizer, [x], progress=step / STEPS)
    return sae, optimizer


def fvu(x, x_hat):
    return float((x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def at_k(value, margin):
    """value (N,F) where pre is furthest above the threshold (margin), K a token: all thresholds are
    moved alike."""
    return value * (margin >= margin.flatten().topk(K * len(margin)).values.amin())


def check_not_worse(variant, seed, ours, theirs, l0):
    print(f"\n{variant:11s} seed {seed}: FVU {ours:.4f}, theirs {theirs:.4f}, "
          f"{100 * (ours / theirs - 1):+.1f} %; "
          f"L0 as trained {l0[0]:.1f}, theirs {l0[1]:.1f}", end="")
    assert ours <= 1.02 * theirs


# ---- dictionary_learning -------------------------------------------------------------------------


def jumprelu(ae, x):
    pre = x @ ae.W_enc + ae.b_enc
    return ae.encode(x), at_k(pre.relu(), pre - ae.threshold)


def gated(ae, x):
    pre = ae.encoder(x - ae.decoder_bias)
    return ae.encode(x), at_k((ae.r_mag.exp() * pre + ae.mag_bias).relu(), pre + ae.gate_bias)


def our_codes(sae, x):
    """-> codes as trained, codes at L0 = K."""
    b = sae.batch(x, train=True)
    z = S.dense(sae.codes(b))
    if sae.variant == "jumprelu":
        return z, at_k(b.pre.relu(), b.pre - sae.threshold)
    if sae.variant == "gated":
        return z, at_k((sae.r_mag.exp() * (b.pre - sae.b_enc) + sae.b_mag).relu(), b.pre)
    return z, z


# variant -> their trainer, its settings, ours, their codes as trained and at L0 = K
CASES = {
    "topk": ("top_k.TopKTrainer", dict(k=K), dict(k=K, **AUX), lambda ae, x: [ae.encode(x)] * 2),
    "batchtopk": ("batch_top_k.BatchTopKTrainer", dict(k=K), dict(k=K, **AUX),
                  lambda ae, x: [ae.encode(x, use_threshold=False)] * 2),
    "matryoshka": ("matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
                   dict(k=K, group_fractions=LEVELS),
                   # Theirs divides the levels by G^2, not AuxK
                   dict(k=K, levels=LEVELS, **AUX | {"aux_coef": len(LEVELS)**2 / 32}),
                   lambda ae, x: [ae.encode(x, use_threshold=False)] * 2),
    "jumprelu": ("jumprelu.JumpReluTrainer", dict(target_l0=K, bandwidth=0.01, **WARM),
                 dict(k=K, bandwidth=0.01), jumprelu),
    "gated": ("gdm.GatedSAETrainer", dict(l1_penalty=0.4, **WARM), dict(l1=0.4), gated),
}


@pytest.mark.parametrize("variant", CASES)
@torch.no_grad()
def test_not_worse_than_dictionary_learning(variant):
    pytest.importorskip("dictionary_learning")
    name, settings, hyper, codes = CASES[variant]
    module, cls = name.split(".")
    make = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), cls)
    for seed in range(3):
        draw = planted(seed)
        data, test = [draw(BATCH) for _ in range(STEPS)], draw(8192)
        torch.manual_seed(seed)
        trainer = make(steps=STEPS, activation_dim=D, dict_size=F, layer=0, lm_name="", lr=LR,
                       warmup_steps=0,
                       device="cpu", **settings)
        trainer.dead_feature_threshold, ae = DEAD, trainer.ae
        if hasattr(ae, "W_enc"):
            W_enc, W_dec = ae.W_enc.T, ae.W_dec
        else:
            W_enc, W_dec = ae.encoder.weight, ae.decoder.weight.T
        with torch.enable_grad():
            sae, _ = train_ours(variant, W_enc, W_dec, data, **hyper)
            for step, x in enumerate(data):
                trainer.update(step, x)
        (ours, ours_at_k), (theirs, theirs_at_k) = our_codes(sae, test), codes(ae, test)
        # Never by being less sparse
        assert ours_at_k.count_nonzero() <= theirs_at_k.count_nonzero() * 1.001
        check_not_worse(variant, seed, fvu(test, sae.decode_normalized(ours_at_k)),
                        fvu(test, ae.decode(theirs_at_k)),
               [float((z != 0).sum() / len(test)) for z in (ours, theirs)])


# ---- sparsify ------------------------------------------------------------------------------------


@torch.no_grad()
def test_topk_not_worse_than_sparsify():
    """With signum and its average, the optimiser that both have and that published runs used."""
    sparsify, schedulefree = pytest.importorskip("sparsify"), pytest.importorskip("schedulefree")
    from sparsify.sign_sgd import SignSGD
    for seed in range(3):
        draw = planted(seed)
        data, test = [draw(BATCH) for _ in range(STEPS)], draw(8192)
        torch.manual_seed(seed)
        theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K),
                                      dtype=torch.float32)
        with torch.enable_grad():
            sae, ours = train_ours("topk", theirs.encoder.weight, theirs.W_dec, data, "signum", k=K)
            theirs.b_dec.data = data[0].mean(0)
            optimizer = schedulefree.ScheduleFreeWrapper(SignSGD(theirs.parameters(), lr=LR),
                                                         momentum=0.95)
            optimizer.train()
            for x in data:
                theirs.set_decoder_norm_to_unit_norm()
                theirs(x).fvu.backward()
                theirs.remove_gradient_parallel_to_decoder_directions()
                optimizer.step()
                optimizer.zero_grad()
        optimizer.eval()
        with ours.averaged():
            check_not_worse("topk", seed, fvu(test, sae(test)), fvu(test, theirs(test).sae_out),
                            [K, K])


# ---- the benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["dense codes", "sparsify"])
def test_what_the_benchmark_races_is_the_same_work(other):
    if other == "sparsify":
        pytest.importorskip("sparsify")
    steps, draw = bench.sae_steps(D, F, K, "cpu"), planted(0)
    for _ in range(10):
        x = draw(BATCH)
        assert torch.allclose(steps["ours"](x), steps[other](x), rtol=1e-4)
