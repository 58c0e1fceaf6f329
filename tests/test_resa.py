"""
Tests of resa.py, the method: LoRA, splice, the tuning objective, its controls, the experiment.

    python -m pytest tests/test_resa.py

The numbers under "golden" were computed once by transformers 5.23.0 and peft 0.21.2 from weights that are
arithmetic, not random; where both are installed, the last section compares with them directly.
"""
import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resa
from model import (
    Config, Transformer, generate, load_model, low_rank, read_adapter, rope_table, save_model)
from sae import build
from tests.conftest import Watch

D, V, L, R, ALPHA = 16, 37, 4, 4, 6          # width, vocabulary, blocks, rank, alpha (not the rank)
CONFIG = dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=L, num_attention_heads=4,
              num_key_value_heads=2)
LAYER = 1                                    # where most tests splice
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 2, 3, 8]])                  # (2, 9)


def numbers(shape, seed):
    """Numbers in [-0.5, 0.5) by integer arithmetic: the same with any release of torch, on any machine."""
    h = torch.arange(torch.Size(shape).numel()) + seed * 100_003
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (((h ^ (h >> 16)) >> 8).double() / 2**24 - 0.5).float().view(shape)


def toy(seed=0, dtype=torch.float32, **changes):
    """A frozen model of four blocks, none of whose parameters (biases, norms) are at their defaults."""
    model = Transformer(Config(**{**CONFIG, **changes}))
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            n = numbers(p.shape, 1000 * seed + i)
            p.copy_(1 + n / 2 if "norm" in name else n)
    return model.to(dtype).eval().requires_grad_(False)


def toy_sae(seed=0, dtype=torch.float32):
    sae = build("topk", D, 48, k=6)
    with torch.no_grad():
        for i, p in enumerate((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)):
            p.copy_(numbers(p.shape, 5000 + 10 * seed + i))
    sae.constrain_()
    return sae.to(dtype).requires_grad_(False)


def adapted(model=None, above=None, dropout=0.0, **kwargs):
    """The toy with adapters; those of blocks > `above` get a B that is not zero (None: all B stay zero)."""
    torch.manual_seed(0)
    model = resa.add_lora(toy() if model is None else model, R, ALPHA, dropout, **kwargs).eval()
    return model if above is None else scramble(model, above)


@torch.no_grad()
def scramble(model, above=-1, seed=7):
    for i, (name, layer) in enumerate(sorted(resa.lora_layers(model).items())):
        if block_of(name) > above:
            layer.lora_B.copy_(numbers(layer.lora_B.shape, 100 * seed + i) / 2)
    return model


def block_of(name):
    return int(name.split(".")[2])           # model.layers.I.self_attn.q_proj


def grads(model, loss):
    """{name: gradient, zeros where there is none} of every parameter that learns."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters() if p.requires_grad}


def adamw(model, **settings):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def check_close(a, b, tol=1e-5):
    error = float((a.detach().double() - b.detach().double()).abs().max())
    assert error <= tol, f"differs by {error:.3g}"


def plain_tuning_loss(*args, **settings):
    """The plain twin of the shared prefix: two whole passes, whatever the settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resa, "shares_prefix", lambda *args: False)
        return resa.tuning_loss(*args, **settings)


def naive_kl(student, teacher, reduction="batchmean"):
    """Logits (B,T,V) -> the published loss: KL(teacher || student), summed over positions, mean over B."""
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction=reduction)


# ---- LoRA -----------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_base_exactly_even_in_training():
    model = adapted(dropout=0.5)
    assert len(resa.lora_layers(model)) == 7 * L
    assert torch.equal(model(IDS), toy()(IDS)) and torch.equal(model.train()(IDS), toy()(IDS))


def test_initialisation_is_pefts():
    """A uniform within 1/sqrt(in) (kaiming with a = sqrt 5), B zero, both fp32."""
    for layer in resa.lora_layers(adapted(toy(dtype=torch.bfloat16))).values():
        bound = layer.in_features**-0.5
        assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > bound / 3
        assert layer.lora_B.abs().max() == 0 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.lora_A.shape == (R, layer.in_features) and layer.lora_B.shape == (layer.out_features, R)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_weight_plus_alpha_over_r_times_b_a(bias):
    base = nn.Linear(5, 3, bias=bias)
    layer = resa.LoRALinear(base, r=2, alpha=8)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 5)
    check_close(layer(x), x @ (base.weight + 4 * layer.lora_B @ layer.lora_A).T + (base.bias if bias else 0))


def test_dropout_acts_on_the_adapters_input_and_only_in_training():
    layer = resa.LoRALinear(nn.Linear(8, 8), r=2, alpha=4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 8)
    base, delta = F.linear(x, layer.weight, layer.bias), 2 * layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(3)
    got = layer.train()(x)
    torch.manual_seed(3)
    check_close(got, base + F.dropout(x, 0.5) @ delta)
    check_close(layer.eval()(x), base + x @ delta)


def test_only_adapters_learn_and_a_step_changes_nothing_else():
    model, sae = adapted(toy().requires_grad_(True)), toy_sae()
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learn == {f"{n}.lora_{s}" for n in resa.lora_layers(model) for s in "AB"}
    before, sae_before = bits(model), bits(sae)
    optimizer = adamw(model, lr=0.1)
    for _ in range(2):                       # in the first, B is zero and so is the gradient of A
        optimizer.zero_grad()
        resa.tuning_loss(model, sae, LAYER, IDS, grad=True).backward()
        optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == learn and all(torch.equal(t, sae_before[n]) for n, t in sae.state_dict().items())


def test_targets_choose_layers_by_their_last_name():
    model = resa.add_lora(toy(), 2, 4, targets=("q_proj", "down_proj"))
    assert {n.rpartition(".")[2] for n in resa.lora_layers(model)} == {"q_proj", "down_proj"}
    assert len(resa.lora_layers(model)) == 2 * L
    for other in "c_attn", "proj", "mlp":    # whole names, and of linear layers
        with pytest.raises(ValueError, match=other):
            resa.add_lora(toy(), targets=(other,))


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.bfloat16, 2.0 ** -7), (torch.float16, 2.0 ** -10), (torch.float32, 0)])
def test_an_adapter_acts_in_the_dtype_of_the_activations(dtype, tolerance):
    """Within the rounding of that dtype of what fp32 products give; A and B themselves stay fp32."""
    x = numbers((64, D), 1).to(dtype)
    A, B = numbers((R, D), 2), numbers((24, R), 3)
    exact = (x.float() @ A.T @ B.T) * 4
    got = low_rank(x, A, B, 4.0)
    assert got.dtype == dtype
    check_close(got.float(), exact, 2 * tolerance * float(exact.abs().max()))
    small = low_rank(x, A, B * 1e-6, 4.0)        # as after a few steps at a rate of 1e-6
    low = dtype == torch.float16                 # whose own range ends at 6e-8: steps of that size
    check_close(small.float(), exact * 1e-6,
                (2 * tolerance + 1e-6) * float(exact.abs().max()) * 1e-6 + 1e-7 * low)


def test_adapters_off_is_the_base_whatever_they_hold_and_they_come_back():
    model = adapted(above=-1).train()
    y = model(IDS)
    with resa.adapters_off(model):
        assert torch.equal(model(IDS), toy()(IDS))
    assert torch.equal(model(IDS), y) and (y - toy()(IDS)).abs().max() > 0.1
    with pytest.raises(KeyError), resa.adapters_off(model):
        raise KeyError
    assert torch.equal(model(IDS), y)


def small_adapter(tmp_path):
    """A bf16 base on disk, and an adapter on it of the size that 100 steps at a rate of 1e-6 give."""
    base, model = tmp_path / "base", toy(dtype=torch.bfloat16)
    save_model(model, base)
    resa.add_lora(model, 4, 8, 0.0)
    rng = torch.Generator().manual_seed(5)
    for layer in resa.lora_layers(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=rng) * 1e-4
    resa.save_adapter(model, tmp_path / "small")
    return model.eval(), f"{base}+{tmp_path}/small"


def test_half_precision_keeps_a_small_adapter_beside_the_weight(tmp_path):
    model, spec = small_adapter(tmp_path)
    loaded, before = load_model(spec), toy(dtype=torch.bfloat16)
    for name, layer in resa.lora_layers(model).items():
        own, weight = loaded.get_submodule(name), before.get_submodule(name).weight
        assert torch.equal(own.weight, weight) and own.lora_B.dtype == torch.float32
        wanted = layer.scale * layer.lora_B @ layer.lora_A
        check_close(own.lora_B @ own.lora_A, wanted, 1e-6)
        lost = (own.folded().float() - weight.float()).flatten()         # what folding would leave
        assert torch.cosine_similarity(lost, wanted.detach().flatten(), dim=0) < 0.8
    assert torch.equal(loaded(IDS), model(IDS)) and not torch.equal(loaded(IDS), before(IDS))
    twice = load_model(f"{spec}*0.5+{spec.partition('+')[2]}*0.5")       # adapters add up
    check_close(twice(IDS).float(), loaded(IDS).float(), 1e-2)
    assert generate(loaded, IDS.tolist(), 4, seed=1) == generate(model, IDS.tolist(), 4, seed=1)
    wide = load_model(spec, "float32")                                   # has room: folded
    assert not any("lora" in name for name in wide.state_dict())


def test_an_adapter_learns_on_top_of_those_of_a_half_precision_model(tmp_path):
    _, spec = small_adapter(tmp_path)
    model, alone = resa.add_lora(load_model(spec), 2, 4, 0.0), load_model(spec)(IDS)
    assert torch.equal(model(IDS), alone)
    for layer in resa.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    y, change = model(IDS).float(), (model(IDS) - alone).float().norm()
    with resa.adapters_off(model):                                       # the new one, not the model's
        assert torch.equal(model(IDS), alone)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}
    resa.save_adapter(model, tmp_path / "new")
    assert (load_model(f"{spec}+{tmp_path}/new")(IDS) - y).norm() < 0.1 * change     # bf16's rounding
    merged = resa.merge_adapter(model)
    assert not any("lora" in name for name in merged.state_dict())
    assert (merged(IDS) - y).norm() < 0.1 * change


def test_merge_prints_what_rounding_cost(tmp_path, capsys):
    _, spec = small_adapter(tmp_path)
    resa.main(["merge", "--model", spec, "--out", f"{tmp_path}/merged"])
    cost = float(capsys.readouterr().out.split(" by ")[1].split()[0])
    base, merged, errors, sizes = toy(dtype=torch.bfloat16), load_model(f"{tmp_path}/merged"), 0, 0
    for name, (A, B) in read_adapter(f"{tmp_path}/small")["pairs"].items():
        delta, weights = 2 * B @ A, [m.get_submodule(name).weight.float() for m in (merged, base)]
        errors += (weights[0] - weights[1] - delta).square().sum()
        sizes += delta.square().sum()
    assert cost == pytest.approx(float(errors / sizes)**0.5, rel=0.05) and cost > 0.3
    save_model(toy(), tmp_path / "wide")
    resa.main(["merge", "--model", f"{tmp_path}/wide+{tmp_path}/small", "--out", f"{tmp_path}/exact"])
    assert float(capsys.readouterr().out.split(" by ")[1].split()[0]) < 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_merging_equals_the_attached_adapters_and_leaves_a_plain_model(tmp_path, tied):
    model = adapted(toy(tie_word_embeddings=tied), above=-1)
    y = model(IDS)
    with pytest.raises(ValueError, match="LoRA"):
        save_model(model, tmp_path / "no")
    merged = resa.merge_adapter(model)
    check_close(merged(IDS), y)
    assert not resa.lora_layers(merged) and not any("lora" in n for n in merged.state_dict())
    assert not any(p.requires_grad for p in merged.parameters())
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    save_model(merged, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged")).state_dict()
    assert all(torch.equal(t, again[n]) for n, t in bits(merged).items())


def test_merging_sums_in_fp32_before_it_rounds_to_bf16():
    layer = resa.LoRALinear(nn.Linear(16, 16).bfloat16(), r=2, alpha=1)
    nn.init.normal_(layer.lora_B, std=0.02)
    exact = layer.weight.double() + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.folded(), exact.bfloat16())


def test_save_and_load_round_trip_by_logits(tmp_path):
    save_model(toy(), tmp_path / "base")
    model = adapted(above=-1, dropout=0.25)
    y, learned = model(IDS), {n for n, p in model.named_parameters() if p.requires_grad}
    resa.save_adapter(model, tmp_path / "adapter", base="some/base")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json",
                                                                       "adapter_model.safetensors"]
    again = resa.load_adapter(toy().requires_grad_(True), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(IDS), y) and all(m.dropout == 0.25 for m in resa.lora_layers(again).values())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == learned
    merged = load_model(f"{tmp_path}/base+{tmp_path}/adapter")
    check_close(merged(IDS), y, 3e-5)
    again = resa.merge_adapter(again).state_dict()                     # the two ways of merging, to the bit
    assert all(torch.equal(t, again[n]) for n, t in merged.state_dict().items())


SCALES = [          # alpha of a layer, rank of a layer, rank-stabilised; written only where needed
    (lambda i: 6, lambda i: 4, True, {"use_rslora"}),
    (lambda i: 6 + i % 3, lambda i: 4, False, {"alpha_pattern"}),
    (lambda i: 6, lambda i: 2 + i % 2, False, {"rank_pattern"}),
    (lambda i: 0.1 * i, lambda i: 1 + i % 5, True, {"alpha_pattern", "rank_pattern", "use_rslora"}),
]


def uneven(alpha, rank, rslora, targets=resa.TARGETS, layers=range(L)):
    """The toy with an adapter whose layers differ in rank and scale."""
    model = resa.add_lora(toy(), targets=targets)
    for i, (name, layer) in enumerate([*resa.lora_layers(model).items()]):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        resa.replace(model, name, plain)
        del resa.lora_layers(model)[name]
        if block_of(name) in layers:
            resa.attach(model, name, rank(i), alpha(i), rslora=rslora)
    return scramble(model.eval())


@pytest.mark.parametrize("alpha, rank, rslora, written", SCALES)
def test_layers_of_different_scales_round_trip_to_the_bit(tmp_path, alpha, rank, rslora, written):
    save_model(toy(), tmp_path / "base")
    model = uneven(alpha, rank, rslora)
    for i, layer in enumerate(resa.lora_layers(model).values()):
        assert layer.scale == alpha(i) / (rank(i) ** 0.5 if rslora else rank(i))
    resa.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config.keys() & {"alpha_pattern", "rank_pattern", "use_rslora"} == written
    again = resa.load_adapter(toy(), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(IDS), model(IDS))
    check_close(load_model(f"{tmp_path}/base+{tmp_path}/adapter")(IDS), model(IDS), 1e-4)


@pytest.mark.parametrize("layers", [[0], [1, 3]])
def test_an_adapter_of_some_blocks_is_saved_by_their_names(tmp_path, layers):
    """Ends of names would select the other blocks too, and miss their tensors."""
    model = uneven(*SCALES[0][:3], targets=("q_proj", "up_proj"), layers=layers)
    resa.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(resa.lora_layers(model))
    assert torch.equal(resa.load_adapter(toy(), str(tmp_path)).eval()(IDS), model(IDS))


@pytest.mark.parametrize("layer", [0, L - 1])
def test_an_adapter_that_lacks_a_layer_or_holds_nan_is_not_attached(tmp_path, layer):
    resa.save_adapter(adapted(above=-1), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    some = {n: t for n, t in whole.items() if f"layers.{layer}." not in n}
    first = next(n for n in whole if f"layers.{layer}." in n)
    for tensors, word in (some, "target_modules"), ({}, "target_modules"), (
            whole | {first: whole[first] * float("nan")}, "NaN"):
        save_file(tensors, path)
        model = toy()
        with pytest.raises(ValueError, match=word):
            resa.load_adapter(model, str(tmp_path))
        assert not resa.lora_layers(model)


def test_the_adapter_files_are_pefts(tmp_path):
    resa.save_adapter(resa.add_lora(toy(), 3, 7.5, 0.1, ("v_proj", "k_proj")), tmp_path, base="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7.5,
                      "lora_dropout": 0.1, "bias": "none", "inference_mode": True,
                      "target_modules": ["k_proj", "v_proj"], "base_model_name_or_path": "some/base"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * L
    assert tensors["base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight"].shape == (3, D)
    assert tensors["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"].shape == (D // 2, 3)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="no adapters"):
        resa.save_adapter(toy(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_adapter_of_another_model_is_refused_and_the_model_is_left_as_it_was(tmp_path):
    resa.save_adapter(adapted(), tmp_path / "a")
    for changes, message in (dict(num_hidden_layers=2), "does not have"), (dict(intermediate_size=20), "20"):
        model = toy(**changes)
        with pytest.raises(ValueError, match=message):
            resa.load_adapter(model, str(tmp_path / "a"))
        assert not resa.lora_layers(model)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resa.load_adapter(toy(), str(tmp_path / "nowhere"))


def test_a_bf16_base_has_fp32_adapters_that_a_rate_of_1e_6_moves(tmp_path):
    model = adapted(toy(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16 and torch.equal(model(IDS), toy(dtype=torch.bfloat16)(IDS))
    scramble(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learned]
    loss = resa.tuning_loss(model, toy_sae(), LAYER, IDS, grad=True)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in learned)
    torch.optim.AdamW(learned, lr=1e-6, weight_decay=0).step()
    assert all(not torch.equal(p, q) for p, q in zip(learned, before))      # in bf16 most would have stayed
    resa.save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert torch.equal(resa.load_adapter(toy(dtype=torch.bfloat16), str(tmp_path))(IDS), model(IDS))


def test_contexts_nest():
    model = adapted(above=-1)
    with resa.adapters_off(model):
        y = model(IDS)
        with resa.adapters_off(model):
            pass
        assert torch.equal(model(IDS), y)


def test_a_second_adapter_is_refused(tmp_path):
    model = adapted(above=-1)
    resa.save_adapter(model, tmp_path)
    y = model(IDS)
    for add in (lambda: resa.add_lora(model), lambda: resa.load_adapter(model, str(tmp_path))):
        with pytest.raises(ValueError, match="adapter"):
            add()
    assert torch.equal(model(IDS), y)


def test_an_adapter_takes_over_the_mode_of_the_model(tmp_path):
    resa.save_adapter(adapted(above=-1, dropout=0.5), tmp_path)
    model = resa.load_adapter(toy(), str(tmp_path))
    assert not any(m.training for m in model.modules()) and torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("settings", [dict(targets=("q_proj", "kproj")), dict(r=0), dict(r=-1),
                                      dict(targets=("lm_head",))], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError):
        resa.add_lora(toy(), **settings)


# ---- splice ---------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Returns a fixed tensor, or its input, and keeps what it was given."""

    def __init__(self, value=None):
        super().__init__()
        self.value, self.seen = value, []

    def forward(self, x):
        self.seen.append(x)
        return x if self.value is None else self.value.expand_as(x)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def mlp_output(model, layer):
    """The MLP output of block `layer` and the residual stream it is added to, written out by hand."""
    block, h = model.model.layers[layer], model.run(IDS, stop=layer)
    positions = torch.arange(IDS.shape[1]).expand(len(IDS), -1)
    rope = rope_table(model.config, positions)
    h = h + block.self_attn(block.input_layernorm(h), rope)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * block.post_attention_layernorm.weight
    gate, up, down = (getattr(block.mlp, f"{p}_proj").weight for p in ("gate", "up", "down"))
    return (F.silu(n @ gate.T) * (n @ up.T)) @ down.T, h


@pytest.mark.parametrize("site, grad", [("resid", False), ("mlp", False), ("mlp", True)])
def test_a_tuning_step_waits_for_nothing_and_walks_over_no_modules(monkeypatch, site, grad):
    model, sae, loss_of = adapted(), toy_sae(), resa.tuning_loss
    if resa.shares_prefix(model, sae, 1, site, grad, None):          # train.py looks at that once
        def loss_of(model, sae, layer, ids, site, grad):
            return resa.shared_prefix_loss(model, sae, layer, ids)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    with Watch() as watch:
        loss_of(model, sae, 1, IDS, site, grad).backward()
    # the SAE looks whether its input is finite, on a CPU alone
    assert watch.ops and watch.syncs == ["_local_scalar_dense"]


@pytest.mark.parametrize("site, grad", [("mlp", True)])
def test_a_compiled_model_sees_the_splice_and_the_switch(monkeypatch, site, grad):
    """torch.compile does not see hooks that come later; the block that has one runs as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    models = adapted(above=-1), adapted(above=-1)
    models[1].compile_blocks()
    for teacher in (None, toy()):                        # the first compiles, the second finds it
        losses = [resa.tuning_loss(m, toy_sae(), 1, IDS, site, grad, teacher=teacher) for m in models]
        check_close(losses[1], losses[0], 1e-5)
        for m, loss in zip(models, losses):
            loss.backward()
    for a, b in zip(*(resa.lora_layers(m).values() for m in models)):
        assert (a.lora_B.grad is None) == (b.lora_B.grad is None)
        if a.lora_B.grad is not None:
            check_close(b.lora_B.grad, a.lora_B.grad, 1e-4)
    assert all("forward" in vars(block) for block in models[1].model.layers)
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("layer", range(L))
def test_an_identity_sae_leaves_the_logits_unchanged(layer, site, grad):
    model = adapted(above=-1)
    with resa.splice(model, nn.Identity(), layer, site, grad):
        assert torch.equal(model(IDS), scramble(adapted())(IDS))


@pytest.mark.parametrize("layer", range(L))
def test_the_layer_index_means_the_output_of_that_block(layer):
    model, put, spy = toy(), numbers((D,), 1), Recorder()
    with resa.splice(model, spy, layer):
        model(IDS)
    assert len(spy.seen) == 1 and torch.equal(spy.seen[0], model.run(IDS, stop=layer + 1))
    with resa.splice(model, Recorder(put), layer):
        assert torch.equal(model(IDS), model.head(model.run(put.expand(2, 9, D), start=layer + 1)))
    if layer:                                # and the blocks before it run as ever
        with resa.splice(model, Recorder(put), layer):
            assert torch.equal(model.run(IDS, stop=layer), toy().run(IDS, stop=layer))


@pytest.mark.parametrize("layer", range(L))
def test_site_mlp_replaces_the_mlp_output_only(layer):
    model, put, spy = toy(), numbers((D,), 1), Recorder()
    out, before = mlp_output(model, layer)
    with resa.splice(model, spy, layer, "mlp"):
        model(IDS)
    check_close(spy.seen[0], out)
    with resa.splice(model, Recorder(put), layer, "mlp"):
        check_close(model.run(IDS, stop=layer + 1), before + put)                # the residual path is kept
        check_close(model(IDS), model.head(model.run(before + put, start=layer + 1)))


@pytest.mark.parametrize("layer", range(L))
def test_activations_equal_the_hand_computation(layer):
    model, (out, before) = toy(), mlp_output(toy(), layer)
    check_close(resa.activations(model, IDS, layer, "mlp"), out)
    check_close(resa.activations(model, IDS, layer), before + out)
    assert torch.equal(resa.activations(model, IDS, layer), model.run(IDS, stop=layer + 1))


@pytest.mark.parametrize("site", ["resid", "mlp"])
def test_activations_compute_nothing_above_and_have_no_graph(site):
    model = toy()
    want = resa.activations(model, IDS, LAYER, site)
    for i in range(LAYER + 1, L):
        model.model.layers[i] = None         # would raise if it were called
    model.model.norm = model.lm_head = None
    model.model.embed_tokens.weight.requires_grad_(True)
    got = resa.activations(model, IDS, LAYER, site)
    assert torch.equal(got, want) and not got.requires_grad and hooks(model) == 0


def test_hooks_are_gone_afterwards_exception_or_not():
    model, y = toy(), toy()(IDS)

    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    for site in ("resid", "mlp"):
        with pytest.raises(KeyError), resa.splice(model, Broken(), LAYER, site):
            model(IDS)
        assert hooks(model) == 0 and torch.equal(model(IDS), y)
        with pytest.raises(IndexError):
            resa.activations(model, IDS + V, LAYER, site)
        assert hooks(model) == 0
        with pytest.raises(KeyError):
            resa.tuning_loss(adapted(model := toy()), Broken(), LAYER, IDS, site)
        assert hooks(model) == 0 and torch.equal(model(IDS), y) and torch.is_grad_enabled()
        assert all(layer.on for layer in resa.lora_layers(model).values())


def test_without_gradients_the_splice_makes_none():
    model, sae = toy(), toy_sae().requires_grad_(True)
    with torch.no_grad(), resa.splice(model, sae, LAYER, grad=True):
        assert not model.run(IDS, stop=LAYER + 1).requires_grad


@pytest.mark.parametrize("layer", [-1, L, 99])
def test_a_layer_that_is_not_there_is_refused(layer):
    for call in (lambda m: resa.activations(m, IDS, layer),
                 lambda m: resa.tuning_loss(m, toy_sae(), layer, IDS),
                 lambda m: resa.tuning_loss(m, toy_sae(), layer, IDS, "mlp"),
                 lambda m: resa.splice(m, toy_sae(), layer).__enter__()):
        model = adapted()
        with pytest.raises(ValueError, match=f"layer {layer}: this model has blocks 0 .. {L - 1}"):
            call(model)
        assert hooks(model) == 0


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(ValueError, match="12.*16"):
        resa.tuning_loss(adapted(), build("topk", 12, 48, k=6), LAYER, IDS)


@pytest.mark.parametrize("settings", [dict(site="res"), dict(site="attn"), dict(reduction="tokens"),
                                      dict(reduction="mean")])
def test_an_unknown_site_or_reduction_is_refused(settings):
    with pytest.raises(ValueError):
        resa.tuning_loss(adapted(), toy_sae(), LAYER, IDS, **settings)


# ---- which adapters learn -------------------------------------------------------------------------


def learning(loss_of, **settings):
    """{adapter name} with a gradient that is not zero, and {adapter name} with none or zero."""
    model = adapted(above=-1)
    g = grads(model, loss_of(model, toy_sae(), LAYER, IDS, **settings))
    alive = {n.rpartition(".")[0] for n, t in g.items() if t.any()}
    for n, t in g.items():                   # A and B agree: B was scrambled, so A is not held at zero by it
        assert bool(t.any()) == (n.rpartition(".")[0] in alive), n
    return alive, set(resa.lora_layers(model)) - alive


@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_resid_grad_off_only_blocks_above_the_hook_learn(loss_of):
    alive, still = learning(loss_of, site="resid", grad=False)
    assert {block_of(n) for n in alive} == set(range(LAYER + 1, L)) and len(alive) == 7 * (L - LAYER - 1)
    assert {block_of(n) for n in still} == set(range(LAYER + 1))


@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_grad_on_every_block_learns(loss_of, site):
    assert learning(loss_of, site=site, grad=True)[1] == set()


@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_mlp_grad_off_the_residual_path_still_teaches_all_but_the_mlp_that_is_replaced(loss_of):
    """At this site "off" cuts one branch only: blocks below and the block's own attention learn through the
    residual stream; the adapters of the MLP whose output is thrown away cannot."""
    _, still = learning(loss_of, site="mlp", grad=False)
    assert still == {f"model.layers.{LAYER}.mlp.{p}_proj" for p in ("gate", "up", "down")}


def test_mlp_grad_off_and_on_differ_below():
    model, name = adapted(above=-1), "model.layers.0.mlp.down_proj.lora_B"
    off, on = (grads(model, resa.tuning_loss(model, toy_sae(), LAYER, IDS, "mlp", g)) for g in (False, True))
    assert (off[name] - on[name]).abs().max() > 1e-3 * on[name].abs().max()


def test_adapters_below_the_hook_keep_their_bits_under_weight_decay():
    """No gradient is None, not zero: AdamW would shrink A where the gradient is a tensor of zeros."""
    model = adapted()
    before = bits(model)
    optimizer = adamw(model, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        resa.tuning_loss(model, toy_sae(), LAYER, IDS).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        if "lora" in name:
            assert torch.equal(tensor, before[name]) == (block_of(name) <= LAYER), name


def test_a_gradient_through_the_sae_does_not_change_the_loss():
    losses = [plain_tuning_loss(adapted(above=-1), toy_sae(), LAYER, IDS, grad=g) for g in (False, True)]
    assert torch.equal(*losses)


def test_the_last_block_without_gradient_is_refused():
    with pytest.raises(ValueError, match="layer 3"):
        resa.tuning_loss(adapted(), toy_sae(), L - 1, IDS).backward()


# ---- chunked KL -----------------------------------------------------------------------------------


def hidden(n=10, dtype=torch.float64, spread=3.0, vocab=23):
    """h_s (N,6), h_t (N,4), W_s (V,6), W_t (V,4): a teacher may be wider or narrower than its student."""
    shapes = (n, 6), (n, 4), (vocab, 6), (vocab, 4)
    h_s, h_t, W_s, W_t = (spread * numbers(shape, i).to(dtype) for i, shape in enumerate(shapes))
    return h_s.requires_grad_(), h_t, W_s, W_t


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 9, 10, 11, 1000])
def test_chunked_kl_equals_the_naive_one_in_value_and_gradient(chunk, dtype, tol):
    h_s, h_t, W_s, W_t = hidden(dtype=dtype)
    want = naive_kl(h_s @ W_s.T, h_t @ W_t.T, "sum")
    want_grad, = torch.autograd.grad(3 * want, h_s)
    want = want.detach()
    got = resa.ChunkedKL.apply(h_s, h_t, W_s, W_t, chunk)
    got_grad, = torch.autograd.grad(3 * got, h_s)
    assert got.dtype == got_grad.dtype == dtype and got > 1
    check_close(got, want, tol * float(want))
    check_close(got_grad, want_grad, tol * float(want_grad.abs().max()))


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradcheck(chunk):
    h_s, h_t, W_s, W_t = hidden(5)
    assert torch.autograd.gradcheck(lambda h: resa.ChunkedKL.apply(h, h_t, W_s, W_t, chunk), (h_s,))


@pytest.mark.parametrize("B, T", [(1, 7), (3, 5)])
def test_sequence_is_the_published_loss_and_token_is_that_over_t(B, T):
    student, teacher = toy(dtype=torch.float64), toy(seed=1, dtype=torch.float64)
    h_s = 3 * numbers((B, T, D), 1).double().requires_grad_()
    h_t = 3 * numbers((B, T, D), 2).double()
    published = naive_kl(student.head(h_s), teacher.head(h_t))
    want, = torch.autograd.grad(published, h_s)
    for reduction, scale in ("sequence", 1), ("token", T):
        loss = resa.kl_loss(student, teacher, h_s, h_t, reduction, chunk=4)
        check_close(loss, published / scale, 1e-12)
        check_close(torch.autograd.grad(loss, h_s)[0], want / scale, 1e-12)
    per_token = naive_kl(student.head(h_s), teacher.head(h_t), "none").sum(-1)                   # (B,T)
    check_close(resa.kl_loss(student, teacher, h_s, h_t), per_token.mean(), 1e-12)    # the default: nats per token


def test_no_gradient_reaches_the_teacher_or_a_head():
    student, teacher = toy().requires_grad_(True), toy(seed=1).requires_grad_(True)
    h_s, h_t = (numbers((2, 3, D), i).requires_grad_() for i in (1, 2))
    resa.kl_loss(student, teacher, h_s, h_t).backward()
    assert h_t.grad is None and all(p.grad is None for p in teacher.parameters()) and h_s.grad.abs().max() > 0


def test_extreme_logits_stay_finite():
    """Certain and contradictory: the teacher gives probability 1 to what the student gives e^-10000."""
    W = torch.eye(4) * 1e4
    h_t, h_s = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[0, 2, 3]].requires_grad_()
    loss = resa.ChunkedKL.apply(h_s, h_t, W, W, 2)
    loss.backward()
    check_close(loss, torch.tensor(2e4), 1e-2)     # token 0 agrees, tokens 1 and 2 cost 10,000 nats each
    assert h_s.grad.isfinite().all() and h_s.grad[0].abs().max() == 0
    for scale in (1e10, 1e20, 1e30):
        loss = resa.ChunkedKL.apply(h_s, h_t, W * scale, W * scale, 2)
        assert loss.isfinite() and loss > 0


def test_kl_is_not_negative_and_is_zero_for_equals():
    W = numbers((1000, D), 0)
    for seed in range(5):
        h = 4 * numbers((20, D), seed + 1)
        for step in (1.0, 1e-1, 1e-2):
            assert resa.ChunkedKL.apply(h + step * numbers((20, D), 99), h, W, W, 7) > 0
        # Where the truth is 1e-10, fp32 logarithms leave noise of either sign, below 1e-6 nats a token.
        assert resa.ChunkedKL.apply(h + 1e-5 * numbers((20, D), 99), h, W, W, 7) > -1e-6 * 20
        assert resa.ChunkedKL.apply(h, h, W, W, 7) == 0


def test_bf16_hidden_states_give_an_fp32_loss_and_a_bf16_gradient():
    h_s, h_t, W_s, W_t = hidden(dtype=torch.bfloat16)
    want = naive_kl((h_s @ W_s.T).float(), (h_t @ W_t.T).float(), "sum")
    loss = resa.ChunkedKL.apply(h_s, h_t, W_s, W_t, 4)
    assert loss.dtype == torch.float32
    check_close(loss, want, 1e-4)
    check_close(torch.autograd.grad(loss, h_s)[0], torch.autograd.grad(want, h_s)[0], 0.05)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_no_tensor_of_tokens_by_vocabulary_is_ever_held(loss_of):
    vocab, ids = 4000, torch.arange(600).view(4, 150)
    model = adapted(toy(vocab_size=vocab))
    with Largest() as spy:
        loss_of(model, toy_sae(), LAYER, ids).backward()
    assert 256 * vocab <= spy.elements < ids.numel() * vocab / 2       # one chunk of 256 tokens, not 600
    with Largest() as plain:
        naive_kl(model(ids), model(ids)).backward()
    assert plain.elements >= ids.numel() * vocab                       # the spy does see such a tensor


# ---- the tuning objective -------------------------------------------------------------------------


def published(model, sae, layer, site="resid", grad=False, teacher=None):
    """The loss with whole logits and nothing shared: a clean teacher, and a student put together by hand."""
    y = (teacher or toy(dtype=model.lm_head.weight.dtype))(IDS)
    with resa.splice(model, sae, layer, site, grad) if sae is not None else nullcontext():
        return naive_kl(model(IDS), y)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_tuning_loss_is_kl_of_the_clean_target_to_the_spliced_student(site, grad, reduction):
    """The adapters above the hook hold something, and the teacher must not see it."""
    model = adapted(toy(dtype=torch.float64), above=LAYER).double()
    sae, scale = toy_sae(dtype=torch.float64), 1 if reduction == "sequence" else IDS.shape[1]
    want = published(model, sae, LAYER, site, grad)
    want_grads = grads(model, want / scale)
    got = resa.tuning_loss(model, sae, LAYER, IDS, site, grad, reduction)
    check_close(got, want / scale, 1e-12)
    assert got > 0.01
    for name, g in grads(model, got).items():
        check_close(g, want_grads[name], 1e-12)


@pytest.mark.parametrize("layer", range(L - 1))
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_shared_prefix_equals_two_whole_passes(layer, dtype, tol):
    """From a fresh adapter through some steps of training: all that the prefix is ever used for."""
    model, sae = adapted(toy(dtype=dtype)).to(dtype).train(), toy_sae(dtype=dtype)
    optimizer = adamw(model, lr=0.01)
    for _ in range(3):
        plain = plain_tuning_loss(model, sae, layer, IDS)
        want = grads(model, plain)
        shared = resa.tuning_loss(model, sae, layer, IDS)
        check_close(shared, plain, tol)
        for name, g in grads(model, shared).items():
            check_close(g, want[name], tol)
        optimizer.step()
    assert (model(IDS) - toy(dtype=dtype)(IDS)).abs().max() > 0.01


def test_the_shared_prefix_runs_once_and_without_a_graph():
    model, calls = adapted(), [0] * L
    for i, block in enumerate(model.model.layers):
        def count(module, inputs, i=i):
            calls[i] += 1
            assert i > LAYER or not torch.is_grad_enabled()
        block.register_forward_pre_hook(count)
    resa.tuning_loss(model, toy_sae(), LAYER, IDS)
    assert calls == [1 if i <= LAYER else 2 for i in range(L)]
    calls[:] = [0] * L
    with torch.no_grad():
        plain_tuning_loss(model, toy_sae(), LAYER, IDS)
    assert calls == [2] * L


def test_every_teacher_runs_without_a_graph():
    for teacher in None, toy(seed=1):
        model, recording = adapted(), []
        for m in filter(None, (teacher, model)):
            m.model.layers[-1].register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
        plain_tuning_loss(model, toy_sae(), LAYER, IDS, teacher=teacher)
        assert recording == [False, True]


def test_the_shared_prefix_equals_two_passes_whatever_the_adapters_hold():
    model = adapted(above=-1)
    shared = resa.tuning_loss(model, toy_sae(), LAYER, IDS)
    check_close(shared, plain_tuning_loss(model, toy_sae(), LAYER, IDS))


@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_neither_adapters_nor_their_dropout_reach_the_teacher(loss_of):
    """In training mode: with B = 0 dropout has nothing to act on, and the pair is undisturbed."""
    quiet, noisy = adapted(), adapted(dropout=0.5).train()
    assert torch.equal(loss_of(quiet, toy_sae(), LAYER, IDS), loss_of(noisy, toy_sae(), LAYER, IDS))
    scramble(noisy, LAYER)
    seen = []
    noisy.model.layers[-1].register_forward_hook(lambda module, inputs, h: seen.append(h))
    for _ in range(2):
        loss_of(noisy, toy_sae(), LAYER, IDS)
    teacher, student, again, other = seen
    assert torch.equal(teacher, toy().run(IDS)) and torch.equal(again, teacher) and not teacher.requires_grad
    assert not torch.equal(student, other)   # the student's dropout is alive


@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("loss_of", [resa.tuning_loss, plain_tuning_loss])
def test_an_identity_sae_gives_exactly_zero_and_no_gradient(loss_of, grad, site):
    model = adapted()
    loss = loss_of(model, nn.Identity(), LAYER, IDS, site, grad)
    assert loss.item() == 0.0
    assert all(not g.any() for g in grads(model, loss).values())


@pytest.mark.parametrize("width", [D, 24])
@pytest.mark.parametrize("sae, grad", [("sae", False), ("sae", True), (None, False)])
def test_another_model_as_the_teacher(sae, grad, width):
    """--teacher source, with and without an SAE; its weights, depth and head are its own."""
    model = adapted(toy(dtype=torch.float64), above=-1).double()
    teacher = toy(seed=3, dtype=torch.float64, hidden_size=width, num_hidden_layers=2)
    sae = toy_sae(dtype=torch.float64) if sae else None
    want = published(model, sae, LAYER, grad=grad, teacher=teacher)
    want_grads = grads(model, want)
    got = resa.tuning_loss(model, sae, LAYER, IDS, grad=grad, reduction="sequence", teacher=teacher)
    check_close(got, want, 1e-11)
    for name, g in grads(model, got).items():
        check_close(g, want_grads[name], 1e-11)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_source_that_differs_from_the_target_by_its_adapter_has_something_to_teach():
    """teacher=source, no SAE: the loss is zero for a student that holds the source's adapter."""
    source = resa.merge_adapter(adapted(above=-1))
    fresh, same = adapted(), adapted(above=-1)
    assert resa.tuning_loss(fresh, None, LAYER, IDS, teacher=source) > 0.1
    check_close(resa.tuning_loss(same, None, LAYER, IDS, teacher=source), torch.tensor(0.0), 1e-6)
    assert resa.tuning_loss(adapted(), None, LAYER, IDS) == 0          # no SAE, no other teacher: no lesson


@pytest.mark.parametrize("site, grad", [("resid", False), ("mlp", True)])
def test_kl_falls_on_a_fixed_batch(site, grad):
    model, sae, losses = adapted(), toy_sae(), []
    optimizer = adamw(model, lr=0.01)
    for _ in range(50):
        loss = resa.tuning_loss(model, sae, LAYER, IDS, site, grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2 and min(losses) > 0, losses[::10]


# ---- matched noise --------------------------------------------------------------------------------


def test_noise_has_the_norm_of_the_saes_error_at_every_token_but_another_direction():
    sae, x = toy_sae(), 2 * numbers((3, 50, D), 0)
    e = x - sae(x)                                                                               # (3,50,D)
    d = noise(0)(x) - x
    check_close(d.norm(dim=-1) / e.norm(dim=-1), torch.ones(3, 50), 1e-4)
    cosine = F.cosine_similarity(d, e, dim=-1)                                                   # (3,50)
    assert cosine.mean().abs() < 4 / (150 * D)**0.5 and 0.5 < cosine.std() * D**0.5 < 2
    between = F.cosine_similarity(d[0, :-1], d[0, 1:], dim=-1)              # and each token has its own
    assert between.abs().max() < 0.95 and between.mean().abs() < 4 / (49 * D)**0.5


def noise(seed):
    torch.manual_seed(seed)
    return resa.MatchedNoise(toy_sae())


def test_noise_is_reproducible_by_seed_and_new_at_every_call():
    x, one = numbers((2, 5, D), 0), noise(5)
    first, second = one(x), one(x)
    other = noise(5)
    assert torch.equal(other(x), first) and torch.equal(other(x), second) and not torch.equal(first, second)
    assert not torch.equal(noise(6)(x), first)


def test_what_a_checkpoint_holds_restores_the_noise():
    """A checkpoint holds buffers and the state of torch's generator."""
    x, one = numbers((2, 5, D), 0), noise(5)
    one(x)
    buffers, state = one.state_dict(), torch.get_rng_state()
    want, again = one(x), noise(5)
    again.load_state_dict(buffers)
    torch.set_rng_state(state)
    assert torch.equal(again(x), want)


def test_noise_keeps_the_dtype_and_leaves_a_perfect_reconstruction_alone():
    x, sae = numbers((2, 5, D), 0), toy_sae()
    assert torch.equal(resa.MatchedNoise(nn.Identity())(x), x)
    x = x.bfloat16()
    noisy = resa.MatchedNoise(sae)(x)
    assert noisy.dtype == torch.bfloat16
    check_close((noisy - x).float().norm(dim=-1) / (sae(x) - x).float().norm(dim=-1), torch.ones(2, 5), 0.02)


def test_noise_goes_where_the_sae_goes():
    model = adapted()
    loss = resa.tuning_loss(model, noise(0), LAYER, IDS)
    again = resa.tuning_loss(model, noise(0), LAYER, IDS)
    plain = plain_tuning_loss(model, noise(0), LAYER, IDS)
    assert torch.equal(loss, again) and loss > 0
    check_close(loss, plain)
    assert {block_of(n) for n, g in grads(model, loss).items() if g.any()} == set(range(LAYER + 1, L))


# ---- golden: transformers and PEFT, without either ------------------------------------------------

# adapter_config.json as peft 0.21.2 wrote it (save_pretrained) for r 4, alpha 6, all seven projections.
PEFT_CONFIG = """
{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
"base_model_name_or_path": "base", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
"eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
"init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
"layers_to_transform": null, "loftq_config": {}, "lora_alpha": 6, "lora_bias": false, "lora_dropout":
0.0, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
"modules_to_save": null, "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2",
"qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": null, "target_modules": ["v_proj",
"k_proj", "down_proj", "gate_proj", "q_proj", "up_proj", "o_proj"], "target_parameters": null,
"task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
"use_qalora": false, "use_rslora": false, "velora_config": null}"""

SHOWN = ("model.layers.0.self_attn.q_proj.lora_A", "model.layers.1.self_attn.v_proj.lora_B",
         "model.layers.2.mlp.gate_proj.lora_A", "model.layers.3.mlp.down_proj.lora_B")
GOLDEN = {  # logits; then, for each reading of the method, the published loss and gradient norms of SHOWN
    "logits": [0.31952, 2.71096, -1.17278, 2.35142, -0.09397, 0.26541,
               -1.2707, -1.0867, 0.60265, -2.43811, 1.71519, 0.39072],
    "code": [12.80326, 0.0, 0.0, 1.98854, 1.74528],
    "text": [12.11276, 10.20149, 3.1971, 1.88634, 1.43758]}


def golden_adapter(directory, **changes):
    """The files PEFT writes for an adapter of arithmetic numbers -> the directory."""
    pairs, linears = {}, {n: m for n, m in toy().named_modules() if isinstance(m, nn.Linear)}
    for i, name in enumerate(sorted(linears.keys() - {"lm_head"}), start=1):
        key = f"base_model.model.{name}.lora_"
        pairs |= {f"{key}A.weight": numbers((R, linears[name].in_features), 3000 + i),
                  f"{key}B.weight": numbers((linears[name].out_features, R), 4000 + i)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(pairs, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps({**json.loads(PEFT_CONFIG), **changes}))
    return directory


def measured(logits_of, loss_of, gradients_of):
    """The numbers of GOLDEN, from functions that either side provides."""
    logits = logits_of()
    found = {"logits": logits[[0, 0, 1, 1], [0, 8, 4, 8]][:, [0, 17, 36]].flatten().tolist()}
    for label, site, grad in ("code", "resid", False), ("text", "mlp", True):
        loss = loss_of(site, grad)
        g = gradients_of(loss)
        found[label] = [float(loss.detach()), *(float(g[n].double().norm()) for n in SHOWN)]
    return found


def check_agreement(found, want, tol=2e-4):
    for name in "logits", "code", "text":
        for a, b in zip(found[name], want[name], strict=True):
            assert abs(a - b) <= tol * max(1, abs(b)), (name, a, b)


def test_logits_losses_and_gradients_equal_those_of_transformers_and_peft(tmp_path):
    model, sae = resa.load_adapter(toy(), str(golden_adapter(tmp_path / "adapter"))), toy_sae()

    def loss_of(site, grad):
        return plain_tuning_loss(model, sae, LAYER, IDS, site, grad, "sequence")
    check_agreement(measured(lambda: model(IDS), loss_of, lambda loss: grads(model, loss)), GOLDEN)


def test_an_adapter_in_pefts_files_merges_to_the_same_logits(tmp_path):
    save_model(toy(), tmp_path / "base")
    model = load_model(f"{tmp_path}/base+{golden_adapter(tmp_path / 'adapter')}")
    found = model(IDS)[[0, 0, 1, 1], [0, 8, 4, 8]][:, [0, 17, 36]].flatten()
    check_close(found, torch.tensor(GOLDEN["logits"]), 2e-4)


REFUSED = [dict(use_dora=True), dict(fan_in_fan_out=True), dict(bias="all"),
           dict(lora_bias=True), dict(modules_to_save=["lm_head"]), dict(layer_replication=[[0, 2]]),
           dict(target_modules=["q_proj"]), dict(target_modules=None), dict(use_tomorrow=1),
           dict(trainable_token_indices=[1]), dict(target_parameters=["x"]), dict(peft_type="LOHA")]
# Each of these changes the base weights or the forward pass: PEFT restores it, here logits would be wrong.
SILENT = [dict(init_lora_weights="pissa"), dict(init_lora_weights="pissa_niter_4"),
          dict(init_lora_weights="olora"), dict(init_lora_weights="loftq"), dict(init_lora_weights="corda"),
          dict(alora_invocation_tokens=[1, 2]), dict(use_qalora=True), dict(use_bdlora={"a": 1})]


@pytest.mark.parametrize("change", REFUSED + SILENT, ids=str)
def test_what_pefts_file_asks_for_and_we_do_not_compute_is_refused_by_name(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        resa.load_adapter(toy(), str(golden_adapter(tmp_path / "adapter", **change)))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_accepted(tmp_path, start):
    assert resa.load_adapter(toy(), str(golden_adapter(tmp_path / "adapter", init_lora_weights=start)))


# ---- transformers and PEFT, live ------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The toy as a directory that both sides load."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("live") / "base"
    save_model(toy(), directory)
    return directory


def hugging(base, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").eval()


def attach(base, adapter, dtype=torch.float32, **kwargs):
    from peft import PeftModel
    return PeftModel.from_pretrained(hugging(base, dtype), adapter, **kwargs).eval()


def new_peft(base, **settings):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)                     # of A; B is arithmetic, see below
    defaults = dict(r=R, lora_alpha=ALPHA, target_modules=list(resa.TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(hugging(base), LoraConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.add_(numbers(p.shape, 9000 + i))
    return model.eval()


def test_our_adapter_loads_in_peft(base, tmp_path):
    model = adapted(above=-1, dropout=0.1)
    resa.save_adapter(model, tmp_path, base=str(base))
    check_close(attach(base, tmp_path)(IDS).logits, model(IDS), 1e-4)
    check_close(attach(base, tmp_path).merge_and_unload()(IDS).logits, resa.merge_adapter(model)(IDS), 1e-4)


def test_our_adapter_of_some_layers_loads_in_peft(base, tmp_path):
    model = scramble(resa.add_lora(toy(), 3, 1, 0.0, ("q_proj", "down_proj")))
    resa.save_adapter(model, tmp_path)
    check_close(attach(base, tmp_path)(IDS).logits, model(IDS), 1e-4)


LOADS = [                    # each option of LoraConfig that leaves plain pairs of matrices
    dict(), dict(r=3, lora_alpha=16), dict(lora_dropout=0.1), dict(use_rslora=True),
    dict(rank_pattern={"q_proj": 2, r"layers\.3\.mlp\.\w+": 7}),
    dict(rank_pattern={r"^model.layers.[12].self_attn.(q|k)_proj": 9}),
    dict(alpha_pattern={"layers.1.self_attn.q_proj": 11, "v_proj": 2}),
    dict(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    dict(target_modules=["q_proj", "o_proj"]), dict(target_modules=["model.layers.1.mlp.up_proj"]),
    dict(target_modules=r".*\.layers\.[02]\..*(q|up)_proj"), dict(target_modules="all-linear"),
    dict(target_modules="all-linear", exclude_modules=["v_proj"]),
    dict(exclude_modules=["q_proj", "model.layers.0.mlp.up_proj"]),
    dict(exclude_modules=r".*layers\.3.*"), dict(layers_to_transform=[1, 3]),
    dict(layers_to_transform=2), dict(layers_to_transform=[0], layers_pattern=["h", "layers"]),
    dict(layers_to_transform=[0], target_modules=["model.layers.2.mlp.up_proj", "q_proj"]),
    *[dict(init_lora_weights=start) for start in (True, False, "gaussian", "orthogonal", "mica", "eva")],
    dict(fan_in_fan_out=False), dict(ensure_weight_tying=True), dict(task_type=None),
    dict(revision="main"), dict(inference_mode=True), dict(megatron_core="x"),
    dict(auto_mapping={"base_model_class": "Qwen2ForCausalLM"}), dict(qalora_group_size=8),
    dict(corda_config={}), dict(eva_config={}), dict(lora_ga_config={}),
    dict(loftq_config={"loftq_bits": 4}), dict(bias="none")]
NOT_COMPUTED = [             # a word of the one line that refuses it
    (dict(use_dora=True), "use_dora"), (dict(bias="lora_only"), "bias"), (dict(bias="all"), "bias"),
    (dict(lora_bias=True), "lora_bias"), (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(modules_to_save=["norm"]), "modules_to_save"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    (dict(target_modules=["embed_tokens"]), "embed_tokens.base_layer.weight"),
    (dict(target_modules=["q_proj", "lm_head"]), "lm_head.base_layer.weight"),
    *[(dict(init_lora_weights=start), start) for start in ("pissa", "pissa_niter_2", "olora", "lora_ga")],
    (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    (dict(use_qalora=True), "use_qalora"), (dict(kasa_config={}), "kasa_config"),
    (dict(velora_config={}), "velora_config"), (dict(monteclora_config={}), "monteclora_config")]
# PEFT itself needs more than this to make one: they are refused by name or by their tensors.
NEVER_MADE = {"layer_replication", "target_parameters", "megatron_config", "arrow_config", "use_bdlora"}
# Set by PEFT, or not written into the file
NO_OPTION = {"peft_type", "peft_version", "base_model_name_or_path", "runtime_config"}


def test_every_option_of_peft_was_tried(base):
    from dataclasses import fields

    from peft import LoraConfig
    tried = {name for settings in [*LOADS, *(row[0] for row in NOT_COMPUTED)] for name in settings}
    known = {field.name for field in fields(LoraConfig)}
    assert known - tried - NO_OPTION - NEVER_MADE == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", LOADS, ids=str)
def test_an_adapter_that_peft_saved_loads_here_attached_and_merged(base, tmp_path, settings):
    peft = new_peft(base, **settings)
    peft.save_pretrained(tmp_path / "adapter")
    y = peft(IDS).logits
    assert (y - toy()(IDS)).abs().max() > 0.1
    attached = resa.load_adapter(load_model(str(base)), str(tmp_path / "adapter")).eval()
    check_close(attached(IDS), y, 1e-4)
    check_close(load_model(f"{base}+{tmp_path}/adapter")(IDS), y, 1e-4)
    resa.save_adapter(attached, tmp_path / "again")                    # and back
    check_close(attach(base, tmp_path / "again")(IDS).logits, y, 1e-5)
    again = resa.load_adapter(load_model(str(base)), str(tmp_path / "again")).eval()
    assert torch.equal(again(IDS), attached(IDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings, word", NOT_COMPUTED, ids=str)
def test_an_adapter_that_peft_saved_and_we_cannot_compute_is_refused(base, tmp_path, settings, word):
    new_peft(base, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=word):
        resa.load_adapter(load_model(str(base)), str(tmp_path))
    with pytest.raises(ValueError, match=word):
        load_model(f"{base}+{tmp_path}")


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_peft_saves_along_are_refused_in_words(base, tmp_path):
    new_peft(base).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="weights of embeddings .save_embedding_layers"):
        load_model(f"{base}+{tmp_path}")


@pytest.mark.parametrize("alpha, rank, rslora, written", SCALES)
def test_our_layers_of_different_scales_load_in_peft(base, tmp_path, alpha, rank, rslora, written):
    model = uneven(alpha, rank, rslora, layers=[0, 2, 3])
    resa.save_adapter(model, tmp_path, base=str(base))
    check_close(attach(base, tmp_path)(IDS).logits, model(IDS), 1e-4)


def peft_grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {n.removeprefix("base_model.model.").removesuffix(".default.weight"):
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters() if p.requires_grad}


def published_with_peft(model, sae, site, grad):
    """The published step on PEFT's model: disable_adapter, a forward hook, kl_div with batchmean."""
    block = model.base_model.model.model.layers[LAYER]

    def swap(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        with torch.set_grad_enabled(grad):
            x_hat = sae(x)
        return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat
    with torch.no_grad(), model.disable_adapter():
        y = model(IDS).logits
    handle = (block if site == "resid" else block.mlp).register_forward_hook(swap)
    try:
        return naive_kl(model(IDS).logits, y)
    finally:
        handle.remove()


def test_gradients_equal_pefts_on_the_same_loss(base, tmp_path):
    peft = attach(base, golden_adapter(tmp_path), is_trainable=True)
    model = resa.load_adapter(toy(), str(tmp_path))

    def cross_entropy(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    want, got = peft_grads(peft, cross_entropy(peft(IDS).logits)), grads(model, cross_entropy(model(IDS)))
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].abs().max() > 0
        check_close(got[name], want[name], 1e-4 * float(want[name].abs().max()))


@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_published_loss_and_its_gradients_on_pefts_model(base, tmp_path, site, grad):
    peft = attach(base, golden_adapter(tmp_path), is_trainable=True)
    model, sae = resa.load_adapter(toy(), str(tmp_path)), toy_sae()
    with torch.no_grad():                    # zero below the hook, as in a real run: the prefix may be shared
        for n, p in [*peft.named_parameters(), *model.named_parameters()]:
            if "lora_B" in n and int(n.split("layers.")[1][0]) <= LAYER:
                p.zero_()
    want = published_with_peft(peft, sae, site, grad)
    got = resa.tuning_loss(model, sae, LAYER, IDS, site, grad, "sequence")
    check_close(got, want, 1e-4 * float(want.detach()))
    want, got = peft_grads(peft, want), grads(model, got)
    for name in want:
        check_close(got[name], want[name], 1e-4 * max(1, float(want[name].abs().max())))


def test_the_golden_numbers_are_still_those_of_transformers_and_peft(base, tmp_path):
    peft, sae = attach(base, golden_adapter(tmp_path), is_trainable=True), toy_sae()

    def loss_of(site, grad):
        return published_with_peft(peft, sae, site, grad)
    check_agreement(measured(lambda: peft(IDS).logits, loss_of, lambda loss: peft_grads(peft, loss)), GOLDEN)
    peft.save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "saved"))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_in_bf16_a_layer_is_within_two_roundings_of_pefts(base, tmp_path):
    peft = attach(base, golden_adapter(tmp_path), torch.bfloat16).base_model.model
    peft = peft.model.layers[0].self_attn.q_proj
    layer = resa.load_adapter(toy(dtype=torch.bfloat16), str(tmp_path)).model.layers[0].self_attn.q_proj
    x = numbers((500, D), 0).bfloat16()
    assert ((layer(x).float() - peft(x).float()).abs() <= 2**-7 * peft(x).float().abs() + 2**-7).all()
    # PEFT widens x to fp32 for A and B; ours are rounded to bf16, beside the output of the layer
