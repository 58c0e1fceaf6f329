"""
Every stage x dtype x splice x variant on a GPU, on the embedded models: a few steps each.

    python -m pytest tests/test_cuda.py      skipped without a GPU, but for a few cells that a CPU
                                             runs, too, to show that the tests themselves work

On a CPU almost every operation exists in bf16; on a GPU some do not (embedding_bag with weights).
"""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import model as M
import resa
import sae as S
import train
from data.files import read_jsonl
from data.formats import load_any
from tests.conftest import ROOT

MODELS = {name: f"{ROOT}/data/{name}" for name in ("tiny/distill", "tiny/math", "tiny-moe")}
TEXT = ["--seq-len", "32", "--batch", "2"]
DTYPES = ["float32", "bfloat16"]
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def cells(*some_on_cpu, of):
    """(device, *cell): all cells on a GPU, a few on the CPU as well."""
    on_gpu = [pytest.param("cuda", *cell, marks=GPU.marks) for cell in of]
    return on_gpu + [("cpu", *cell) for cell in some_on_cpu]


def run(stage, out, device, dtype, data, *flags):
    """Two steps of a stage -> what it logged at each, then its summary: all numbers are finite."""
    train.main(["--stage", stage, "--out", str(out), "--device", device, "--dtype", dtype,
                "--preset", "tiny", "--data", str(data), "--log-every", "1", "--steps", "2", *map(str, flags)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((out / "summary.json").read_text()))
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float))), row
    return rows


def check_adapter(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert any(t.any() for name, t in tensors.items() if "lora_B" in name)      # it has learned


def splices_of(variant):
    sae = S.VARIANTS[variant]
    fixed = issubclass(sae, S.Chosen) and sae.per_token      # a number of latents to be matched
    return ["sae", "noise", "random"] if fixed else ["sae", "noise"]


# ---- stages I and II: every variant, splice, gradient and dtype ---------------------------------

VARIANTS = [(variant, dtype) for variant in S.VARIANTS for dtype in DTYPES]


@pytest.mark.parametrize("device, variant, dtype", cells(
    ("abstopk", "bfloat16"), ("gated", "float32"), of=VARIANTS))
def test_every_variant_trains_and_tunes(device, variant, dtype, data, tmp_path):
    model, k = MODELS["tiny/distill"], ["--k", "4"] if "k" in S.VARIANTS[variant].defaults else []
    run("sae", tmp_path / "sae", device, dtype, data, *TEXT, "--source", model,
        "--variant", variant, "--latents", "64", *k)
    sae = load_any(tmp_path / "sae")
    assert {t.dtype for t in sae.state_dict().values()} <= {torch.float32, torch.int64}
    flags = [*TEXT, "--target", model, "--sae", tmp_path / "sae"]
    for splice in splices_of(variant):
        rows = run("tune", tmp_path / f"adapter-{splice}", device, dtype, data, *flags,
                   "--splice", splice, "--sae-grad", "on")
        check_adapter(tmp_path / f"adapter-{splice}")
        assert rows[0]["kl"] > 0
    rows = run("tune", tmp_path / "off", device, dtype, data, *flags)
    check_adapter(tmp_path / "off")
    if dtype == "float32":               # before the first step the KL is the SAE's alone
        on_cpu = run("tune", tmp_path / "cpu", "cpu", dtype, data, *flags)
        assert rows[0]["kl"] == pytest.approx(on_cpu[0]["kl"], rel=0.02)


# ---- what does not depend on the variant ---------------------------------------------------------


@pytest.mark.parametrize("device, name, dtype", cells(
    ("tiny-moe", "bfloat16"), of=[(name, dtype) for name in ("tiny/distill", "tiny-moe")
                             for dtype in DTYPES]))
def test_other_sites_teachers_and_models(device, name, dtype, data, tmp_path):
    model = MODELS[name]
    taught = [*TEXT, "--target", model, "--teacher", "source", "--source", MODELS["tiny/math"]]
    run("sae", tmp_path / "sae", device, dtype, data, *TEXT, "--source", model, "--site", "mlp",
        "--optimizer", "signum", "--sink-norm", "10", "--latents", "64", "--k", "4")
    for i, flags in enumerate([
            [*TEXT, "--target", model, "--sae", tmp_path / "sae", "--site", "mlp"],
            [*TEXT, "--target", model, "--sae", tmp_path / "sae", "--site", "mlp",
             "--sae-grad", "on", "--kl-reduction", "sequence", "--micro-batch", "1"],
            [*taught, "--sae", tmp_path / "sae", "--site", "mlp", "--sae-grad", "on"],
            [*taught, "--splice", "none"]]):
        run("tune", tmp_path / str(i), device, dtype, data, *flags)
        check_adapter(tmp_path / str(i))


@pytest.mark.parametrize("device, dtype", cells(("bfloat16",), of=[(dtype,) for dtype in DTYPES]))
def test_sft_and_rl(device, dtype, data, tmp_path):
    target = ["--target", MODELS["tiny/distill"]]
    run("sft", tmp_path / "sft", device, dtype, data, *TEXT, *target)
    check_adapter(tmp_path / "sft")
    run("rl", tmp_path / "rl", device, dtype, data, *target, "--questions", "2", "--group", "4",
        "--max-new-tokens", "8", "--beta", "0.04", "--rewards", "length", "accuracy")


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_pretraining(device, data, tmp_path):
    first, *_ = run("pretrain", tmp_path, device, "float32", data, *TEXT, "--model", MODELS["tiny/distill"])
    before, after = M.load_model(MODELS["tiny/distill"]), M.load_model(tmp_path / "model")
    assert first["loss"] > 0
    assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("temperature", [0, 0.6])
def test_graphs_take_effect_and_change_no_token(device, temperature, monkeypatch):
    tiny, replays, replay = M.load_model(MODELS["tiny/distill"], device=device), [], M.Decoder.replay
    tokenizer = M.load_tokenizer(MODELS["tiny/distill"])
    rows = [row for _, row in read_jsonl(f"{ROOT}/data/tiny/test.jsonl")][:100]
    prompts = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": row["problem"]}]))
               for row in rows]
    settings = dict(temperature=temperature, stop_ids=tokenizer.eos_ids, slots=16)

    def counted(self, last):
        replays.append(any(self.graph.values()))
        return replay(self, last)
    monkeypatch.setattr(M.Decoder, "replay", counted)
    recorded = M.generate(tiny, prompts, 96, **settings)
    assert sum(replays) > 0.5 * len(replays)
    monkeypatch.setattr(M.Decoder, "replay", M.Decoder.step)
    assert recorded == M.generate(tiny, prompts, 96, **settings)
    on_cpu = M.generate(M.load_model(MODELS["tiny/distill"]), prompts, 96, **settings)
    assert sum(a == b for a, b in zip(recorded, on_cpu)) >= 98      # of 100: fp32 sums differ
    fast = M.load_model(MODELS["tiny/distill"], device=device).compile_blocks()
    compiled = M.generate(fast, prompts, 96, **settings)
    assert sum(a == b for a, b in zip(recorded, compiled)) >= 98


# ---- why stage II runs on a GPU, shown without one -----------------------------------------------


@pytest.mark.parametrize("variant", S.VARIANTS)
def test_the_sae_computes_in_fp32_inside_a_bf16_model(variant, data, tmp_path, monkeypatch):
    """Forward and backward: everything that an embedding_bag reads, every pre that is ranked, each
    selected value and its gradient."""
    seen, bag, times, linear = [], S.fn.embedding_bag, S.Codes.times, S.SAE.preacts

    def watched_bag(latents, matrix, offsets, mode, per_sample_weights):
        out = bag(latents, matrix, offsets, mode=mode, per_sample_weights=per_sample_weights)
        seen.extend([matrix.dtype, per_sample_weights.dtype, out.dtype])
        if out.requires_grad:            # what its backward pass will be given
            out.register_hook(lambda grad: seen.append(grad.dtype))
        return out

    def watched_times(z, matrix):
        seen.extend([z.value.dtype, matrix.dtype])
        return times(z, matrix)

    def watched_preacts(sae, x):
        pre = linear(sae, x)
        seen.extend([x.dtype, pre.dtype])
        return pre

    model, k = MODELS["tiny/distill"], ["--k", "4"] if "k" in S.VARIANTS[variant].defaults else []
    run("sae", tmp_path / "sae", "cpu", "bfloat16", data, *TEXT, "--source", model,
        "--variant", variant, "--latents", "64", *k)
    monkeypatch.setattr(S.fn, "embedding_bag", watched_bag)
    monkeypatch.setattr(S.Codes, "times", watched_times)
    monkeypatch.setattr(S.SAE, "preacts", watched_preacts)
    for splice in splices_of(variant):
        seen.clear()
        run("tune", tmp_path / f"adapter-{splice}", "cpu", "bfloat16", data, *TEXT, "--target", model,
            "--sae", tmp_path / "sae", "--sae-grad", "on", "--splice", splice)
        check_adapter(tmp_path / f"adapter-{splice}")
        assert set(seen) == {torch.float32} and len(seen) >= 4, splice


def test_the_controls_of_an_sae_keep_its_precision():
    sae = S.build("topk", 64, 256, k=4).requires_grad_(False)
    assert resa.random_sae(sae, 1).W_enc.dtype == torch.float32
    assert resa.random_sae(sae.double(), 1).W_enc.dtype == torch.float64
    x = torch.randn(4, 50, 64).bfloat16()
    torch.manual_seed(3)
    noisy = resa.MatchedNoise(sae.float())(x)
    torch.manual_seed(3)
    e, noise = x.double() - sae(x).double(), torch.randn(x.shape).double()
    size = e.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    want = (x + noise * size).bfloat16()      # rounded once
    assert noisy.dtype == torch.bfloat16 and (noisy == want).double().mean() > 0.999


def test_the_gradient_that_gsae_reads_is_scaled_in_fp32():
    tiny, ids = M.load_model(MODELS["tiny/distill"], "bfloat16"), torch.randint(0, 500, (2, 32))
    g = train.gradient(tiny, ids, resa.activations(tiny, ids, 1), 1, "resid")
    assert g.dtype == torch.float32 and abs(float(g.norm(dim=-1).mean()) - 1) < 1e-5
