"""train.py --stage sae, on real files: every variant, sinks, what an SAE is worth to the model."""
import json
import re

import pytest
import torch
from torch.nn.functional import cross_entropy

import model as M
import resa
import sae as S
import train
from data import runs
from tests.conftest import ROOT, Watch

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
DISTILL = f"{ROOT}/data/tiny/distill"
SMALL = ["--seq-len", "64", "--batch", "2", "--log-every", "1", "--latents", "64"]


@pytest.fixture(scope="module")
def run(data):
    def go(out, *flags):
        train.main(["--stage", "sae", "--preset", "tiny", "--data", str(data), *SMALL, "--out", str(out),
                    *map(str, flags)])
        return out
    return go


def flags_of(variant):
    return ["--variant", variant, *(["--k", 4] if "k" in S.VARIANTS[variant].defaults else [])]


def args_of(data, *flags):
    argv = ["--preset", "tiny", "--data", str(data), *SMALL, "--source", RANDOM, *map(str, flags)]
    return train.settings("sae", argv)


def chunks_of(args, model):
    return train.hold_out(train.load_chunks(args, M.load_tokenizer(args.source), model))


# ---- every variant ------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", S.VARIANTS)
def test_every_variant_trains_is_measured_saved_and_spliced(variant, run, tmp_path):
    out = run(tmp_path / "sae", "--source", DISTILL, "--steps", 3, *flags_of(variant))
    sae, summary = S.load_sae(out), json.loads((out / "summary.json").read_text())
    assert sae.variant == variant
    assert sae.meta["layer"] == 1 and sae.meta["model"] == "data/tiny/distill"
    for name in ("fvu", "l0", "dead", "cosine", "ce", "ce_sae", "ce_zero", "ce_mean", "kl",
                 "recovered_mean", "left_out", "n_tokens"):
        assert isinstance(summary[name], (int, float)), name
    tiny = M.load_model(DISTILL)
    ids = torch.randint(0, 500, (2, 16))
    with resa.splice(tiny, sae, 1):
        spliced = tiny(ids)
    assert spliced.isfinite().all() and not torch.equal(spliced, tiny(ids))


@pytest.mark.parametrize("variant", ["batchtopk", "feature_choice", "gsae", "vsae", "gba", "itda",
                                     "jumprelu"])
def test_resumed_equals_uninterrupted_to_the_bit(variant, data, tmp_path, monkeypatch):
    """State outside autograd too: thresholds, ranks, biases, atoms, counters, noise."""
    extra = {"vsae": ["--set", "sample=unit"], "gba": ["--set", "adapt_tokens=200"]}
    flags = ["--preset", "tiny", "--data", str(data), *SMALL, "--source", RANDOM, "--steps", "6", "--save-every", "3",
             *map(str, flags_of(variant)), *extra.get(variant, []), "--dead-after", "100"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(["--stage", "sae", "--out", str(whole), *flags])

    class Stop(Exception):
        pass
    save = runs.Run.save

    def save_and_stop(self, done):
        save(self, done)
        raise Stop
    monkeypatch.setattr(runs.Run, "save", save_and_stop)
    with pytest.raises(Stop):
        train.main(["--stage", "sae", "--out", str(cut), *flags])
    monkeypatch.setattr(runs.Run, "save", save)
    torch.manual_seed(99)      # what the process drew in between must not matter
    train.main(["--stage", "sae", "--out", str(cut), "--resume", *flags])
    assert (cut / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_help_lists_every_variant_with_its_settings(capsys):
    train.main(["--stage", "sae", "--variant", "help"])
    text = capsys.readouterr().out
    for name, cls in S.VARIANTS.items():
        assert re.search(rf"^{name} +{re.escape(cls.__doc__.splitlines()[0])}$", text, re.M)
        for setting in cls.defaults.keys() - {"seed", "dead_after"}:
            assert f"{setting}=" in text


@pytest.mark.parametrize("flags, message", [
    ("--variant topkk", "--variant: invalid choice: 'topkk' .*relu.*help"),
    ("--variant relu --k 4", "--k has no effect with --variant relu"),
    ("--variant gba --aux-coef 0.1", "--aux-coef has no effect with --variant gba"),
    ("--device cpu --tf32",
     "--tf32 has no effect with --device cpu: leave it out, or pass --no-tf32"),
    ("--set l1", "--set l1: NAME=VALUE"),
    ("--set l1=3", "topk: no setting 'l1', only .*aux_coef"),
    ("--variant relu --set rows=long", "rows.* *= *'long' is not .*unit.*free"),
    ("--variant feature_choice --k 1 --latents 256",
     "feature_choice: 126 tokens x k=1 leave some of 256 latents without"),
    ("--variant jumprelu --set bandwidth=-1", "bandwidth.*-1.0"),
    ("--k 65", "k=65 .*64"),
    ("--seq-len 4096", "one chunk of data|fewer than one chunk"),
    ("--sink-norm 0.0001", "leaves no token"),
    ("--sink-norm -1", "--sink-norm: -1 should be finite, at least 0"),
])
def test_refused_in_one_line(flags, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "sae", "--source", RANDOM, "--steps", 2, *flags.split())
    assert not (tmp_path / "sae" / "cfg.json").exists()


def test_settings_reach_the_sae_and_its_file(run, tmp_path):
    out = run(tmp_path / "sae", "--source", RANDOM, "--steps", 2, "--variant", "matryoshka",
              "--k", 4, "--set", "levels=[1, 1, 2]", "weighting=mean", "dead_after=8",
              "--schedule", "linear", "--warmup", 1)
    sae = S.load_sae(out)
    assert sae.levels == [1.0, 1.0, 2.0] and sae.widths() == [16, 32, 64]
    assert sae.weighting == "mean" and sae.dead_after == 8


def test_free_rows_end_at_unit_norm_with_the_function_kept(run, tmp_path):
    out = run(tmp_path / "sae", "--source", RANDOM, "--steps", 3, "--variant", "relu",
              "--set", "rows=free")
    assert torch.allclose(S.load_sae(out).W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


def test_the_threshold_is_measured_at_the_weights_that_are_saved(run, data, tmp_path):
    """With signum the saved weights are a mean that no training step ever used."""
    out = run(tmp_path / "sae", "--source", RANDOM, "--steps", 6, "--variant", "batchtopk",
              "--k", 4, "--optimizer", "signum")
    sae, args = S.load_sae(out), args_of(data, "--variant", "batchtopk", "--k", 4)
    tiny = M.load_model(RANDOM)
    chunks, held = chunks_of(args, tiny)
    lows, sae.layer = [], args.layer
    for part in torch.tensor(train.order(len(chunks), 0, 0)[:32]).split(2):
        x = train.harvest(tiny, [sae], chunks, part, args)[0][0]
        value = sae.codes(sae.batch(x, train=True)).value.detach()
        lows.append(float(value[value > 0].min()))
    assert abs(float(sae.threshold) - sum(lows) / len(lows)) < 1e-5
    assert abs(json.loads((out / "summary.json").read_text())["l0"] - 4) < 1.5


# ---- data ---------------------------------------------------------------------------------------

def test_held_out_chunks_are_never_trained_on():
    chunks = torch.arange(100)[:, None].expand(100, 8)
    rest, held = train.hold_out(chunks)
    assert len(held) == 5 and len(rest) + len(held) == 100
    assert not set(rest[:, 0].tolist()) & set(held[:, 0].tolist())
    assert len(train.hold_out(chunks[:2])[1]) == 1
    assert train.hold_out(torch.zeros(40_000, 64, dtype=torch.int64))[1].numel() == 65536


def test_places_and_gradients_stay_with_their_activation(data):
    """Through shuffling, micro-batches and sinks left out: row i of x, g and at are one token."""
    tiny, args = M.load_model(DISTILL), args_of(data, "--variant", "gsae", "--k", 4)
    chunks, _ = chunks_of(args, tiny)
    sae = S.build("gsae", tiny.config.hidden_size, 64, k=4)
    every = resa.activations(tiny, chunks[:6], 1)                                 # (6,T,D)
    # so that some are left out
    sae.meta["sink_norm"] = float(every.norm(dim=-1).median() * 1.2)
    picked, sae.layer = torch.tensor([4, 1]), 1
    (x, g, at), = train.harvest(tiny, [sae], chunks, picked, args)
    assert 0 < len(x) == len(g) == len(at) < 2 * 64 and not (at % 64 == 0).any()
    assert torch.allclose(x, every.flatten(0, 1)[at], atol=1e-5)
    whole = train.gradient(tiny, chunks[picked], every[picked], 1, "resid")       # (2,T,D)
    for i, j in ((0, 3), (len(at) // 2, 7), (len(at) - 1, 0)):
        b, t = (picked.tolist().index(int(at[i]) // 64), int(at[i]) % 64)
        assert torch.allclose(g[i], whole[b, t]), (i, j)


@pytest.mark.parametrize("site", ["resid", "mlp"])
def test_the_gradient_at_the_hook_is_that_of_the_models_loss(site):
    """Finite differences of cross-entropy along random directions, up to the unit of g."""
    tiny = M.load_model(DISTILL).double()
    ids = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    x = resa.activations(tiny, ids, 1, site)
    g = train.gradient(tiny, ids, x, 1, site)
    assert abs(float(g.norm(dim=-1).mean()) - 1) < 1e-9 and x.shape == g.shape
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def loss(step):
        with torch.no_grad(), resa.hooked(tiny, 1, site, lambda x: x + step * way):
            logits = tiny(ids)[:, :-1].flatten(0, 1).double()
            return float(cross_entropy(logits, ids[:, 1:].flatten()))
    slopes = [(loss(1e-4) - loss(-1e-4)) / 2e-4]
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    slopes.append((loss(1e-4) - loss(-1e-4)) / 2e-4)
    ways = [torch.randn(x.shape, generator=torch.Generator().manual_seed(s), dtype=x.dtype)
            for s in (1, 2)]
    predicted = [float((g * w).sum()) for w in ways]
    one, two = slopes[0] / predicted[0], slopes[1] / predicted[1]
    assert abs(one - two) < 1e-3 * abs(one)


# ---- speed flags --------------------------------------------------------------------------------

@pytest.fixture
def on_gpu(monkeypatch):
    """args -> args of a run on a GPU; from the moment that the model is loaded a CPU stands in."""
    def go(args):
        def load_on_cpu(spec, dtype, device):
            args.device = "cpu"
            return M.load_model(spec, dtype, "cpu")
        monkeypatch.setattr(train, "load_model", load_on_cpu)
        args.device = "cuda"
        return args
    return go


@pytest.mark.parametrize("device, flags, expected", [
    ("cpu", [], False), ("cpu", ["--no-tf32"], False),
    ("cuda", [], True), ("cuda", ["--tf32"], True), ("cuda", ["--no-tf32"], False)])
def test_tf32_reaches_the_step_and_is_the_default_on_a_gpu(
        device, flags, expected, data, monkeypatch, on_gpu, tmp_path):
    args, seen = args_of(data, "--steps", 2, "--out", tmp_path, "--device", "cpu"), []
    args.tf32 = args_of(data, *flags).tf32
    preacts = S.TopK.preacts

    def look(self, x):
        seen.append(torch.get_float32_matmul_precision())
        return preacts(self, x)
    monkeypatch.setattr(S.TopK, "preacts", look)
    train.run_sae(on_gpu(args) if device == "cuda" else args)
    # two steps; then the held-out text
    assert seen[:2] == ["high" if expected else "highest"] * 2
    assert len(seen) > 2 and set(seen[2:]) == {"highest"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["tf32"] is expected


def test_a_run_of_a_gpu_continues_on_a_cpu(data, monkeypatch, on_gpu, tmp_path):
    flags = ["--steps", 3, "--save-every", 1, "--out", tmp_path]
    end_step = runs.Run.end_step

    def stop(self, step, *rest):
        end_step(self, step, *rest)
        if step == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "end_step", stop)
        train.run_sae(on_gpu(args_of(data, *flags)))
    train.run_sae(args_of(data, *flags, "--resume", "--device", "cpu"))
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["tf32"] is False
    assert (tmp_path / "sae.safetensors").exists()


def test_tf32_is_refused_where_nothing_is_trained():
    for flag in ("--tf32", "--no-tf32"):
        args = train.settings("sae", ["--init", "pretrained", "--sae-from", "any", flag])
        with pytest.raises(ValueError, match="--tf32 has no effect with --init pretrained"):
            train.run_sae(args)


@pytest.mark.parametrize("variant, sink_norm, waits", [
    ("topk", None, []), ("gsae", None, []), ("topk", 1.2, ["nonzero"]), ("gsae", 1.2, ["nonzero"])])
def test_harvest_gathers_nothing_without_a_sink_norm_and_waits_once_with_one(
        variant, sink_norm, waits, data):
    tiny, args = M.load_model(DISTILL), args_of(data)
    chunks, _ = chunks_of(args, tiny)
    sae = S.build(variant, tiny.config.hidden_size, 64, k=4)
    sae.meta["sink_norm"], sae.layer = sink_norm and 8.0, 1
    with Watch() as watch:
        (x, g, at), = train.harvest(tiny, [sae], chunks, torch.tensor([4, 1]), args)
    assert watch.syncs == waits and (g is None) == (variant == "topk")
    assert (len(x) == 2 * 64) == (sink_norm is None) and len(x) == len(at)


def test_harvest_copies_to_the_device_without_waiting(data):
    """On "meta" as the device: copies to it look as those to a GPU."""
    tiny, args = M.load_model(DISTILL), args_of(data)
    chunks, _ = chunks_of(args, tiny)
    sae, args.device = S.build("topk", tiny.config.hidden_size, 64, k=4), "meta"
    sae.meta["sink_norm"], sae.layer = None, 1
    tiny.to("meta")
    with Watch() as watch:
        (x, _, at), = train.harvest(tiny, [sae], chunks, torch.tensor([4, 1]), args)
    assert x.is_meta and at.is_meta and not watch.syncs


# ---- sinks --------------------------------------------------------------------------------------

def test_sinks_are_position_0_and_large_norms():
    x = torch.ones(2, 5, 3)
    x[1, 3] *= 30
    assert resa.is_sink(x, 5.0).nonzero().tolist() == [[0, 0], [1, 0], [1, 3]]
    assert not resa.is_sink(x, None).any()


def test_tokens_left_out_of_training_are_left_alone_by_every_splice():
    x = torch.randn(2, 5, 8)
    x[1, 3] *= 100
    sae = S.build("topk", 8, 16, k=2)
    sae.meta["sink_norm"] = 50.0
    sink = resa.is_sink(x, 50.0)
    for module in (sae, resa.MatchedNoise(sae), train.ablation(torch.zeros(8), sae)):
        out = resa.insert(module, x)
        assert torch.equal(out[sink], x[sink])
        assert not torch.isclose(out[~sink], x[~sink]).all(-1).any()
    sae.meta["sink_norm"] = None
    assert torch.equal(resa.insert(sae, x), sae(x))


def test_sinks_are_left_out_by_default_on_a_model_of_ones_own(run, tmp_path):
    out = run(tmp_path / "sae", "--source", RANDOM, "--steps", 2, "--k", 4)
    sae, summary = S.load_sae(out), json.loads((out / "summary.json").read_text())
    assert sae.meta["sink_norm"] > 0 and abs(summary["left_out"] - 1 / 64) < 1e-9
    run(tmp_path / "all", "--source", RANDOM, "--steps", 2, "--k", 4, "--sink-norm", 0)
    assert S.load_sae(tmp_path / "all").meta["sink_norm"] is None
    run(tmp_path / "tiny", "--source", DISTILL, "--steps", 1, "--k", 4)
    assert S.load_sae(tmp_path / "tiny").meta["sink_norm"] is None


# ---- what it is worth to the model --------------------------------------------------------------

@pytest.mark.parametrize("site", ["resid", "mlp"])
def test_model_metrics_equal_the_plain_computation(site, data):
    tiny, args = M.load_model(DISTILL), args_of(data, "--k", 4, "--micro-batch", 1, "--site", site)
    ids = chunks_of(args, tiny)[1][:3]
    sae = S.build("topk", tiny.config.hidden_size, 64, k=4)
    S.init_b_dec(sae, resa.activations(tiny, ids, 1, site))
    sae.meta["sink_norm"], sae.layer = None, 1
    found = train.sae_metrics(tiny, [sae], ids, args)[0]

    def logits(change):
        with torch.no_grad(), resa.hooked(tiny, 1, site, change):
            return tiny(ids).double()
    x = resa.activations(tiny, ids, 1, site)
    clean, spliced = logits(lambda x: x), logits(sae)
    mean = x.flatten(0, 1).double().mean(0).float()
    ce = {"ce": clean, "ce_sae": spliced, "ce_zero": logits(torch.zeros_like),
          "ce_mean": logits(lambda x: mean.expand_as(x))}
    for name, out in ce.items():
        ce[name] = float(cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    for name, value in ce.items():
        assert abs(found[name] - value) < 1e-4, name
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - spliced.log_softmax(-1))).sum(-1).mean()
    assert abs(found["kl"] - float(kl)) < 1e-4
    for name in ("zero", "mean"):
        damage = ce[f"ce_{name}"] - ce["ce"]
        recovered = (ce[f"ce_{name}"] - ce["ce_sae"]) / damage if damage > 0 else None      # of none there is no part
        assert found.get(f"recovered_{name}") == (recovered and pytest.approx(recovered, abs=1e-3))
    assert "recovered_zero" in found
    assert found["n_tokens"] == ids.numel() and abs(found["fvu"] - S.metrics(sae, x)["fvu"]) < 1e-6


def test_the_ends_of_the_scale(data):
    """A perfect reconstruction recovers everything, the mean of the activations nothing."""
    tiny, args = M.load_model(DISTILL), args_of(data, "--k", 4)
    ids = chunks_of(args, tiny)[1]
    x = resa.activations(tiny, ids, 1).flatten(0, 1)
    d = x.shape[1]
    perfect = S.build("relu", d, 2 * d, normalize="none")
    nothing = S.build("topk", d, 8, k=1)
    with torch.no_grad():      # x = relu(x) - relu(-x)
        perfect.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        perfect.W_dec.copy_(perfect.W_enc)
        nothing.b_enc.fill_(-1e9)
    S.init_b_dec(nothing, x)
    for sae, fvu, recovered in ((perfect, 0.0, 1.0), (nothing, 1.0, 0.0)):
        sae.meta["sink_norm"], sae.layer = None, 1
        found = train.sae_metrics(tiny, [sae], ids, args)[0]
        assert abs(found["fvu"] - fvu) < 1e-4 and abs(found["recovered_mean"] - recovered) < 1e-3
