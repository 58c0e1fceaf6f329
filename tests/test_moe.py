"""Qwen2-MoE: against transformers and a plain twin, checkpoints, adapters, the embedded mixture.

    python -m pytest tests/test_moe.py -q      tests named live need transformers or peft

Golden numbers come from transformers 5.23 on weights that any machine can rebuild (`recipe` of
test_model.py).
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import resa
from data.files import TINY
from data.grade import grade
from data.rows import read_problems
from model import (
    Config, MoE, Transformer, generate, load_model, load_tokenizer, put_on, read_adapter,
    save_model)
from tests.conftest import ROOT
from tests.test_model import (
    INPUT, MASK, build, check_refused, check_rows, edit_config, edit_weights, few, recipe,
    same_weights, shard, unpadded)

# ------------------------------------------------------------------------------------------------
# Tiny models that any machine can rebuild
# ------------------------------------------------------------------------------------------------

BASE = dict(
    model_type="qwen2_moe",
    vocab_size=37,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=10,
)
CONFIGS = {
    "1 of 4": BASE | dict(num_experts=4, num_experts_per_tok=1),
    "1 of 4, normalised": BASE | dict(num_experts=4, num_experts_per_tok=1, norm_topk_prob=True),
    "8 of 12": BASE | dict(num_experts=12, num_experts_per_tok=8, tie_word_embeddings=True),
    "8 of 12, normalised": BASE | dict(num_experts=12, num_experts_per_tok=8, norm_topk_prob=True),
    "mixed": BASE
    | dict(
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "mixed, normalised": BASE
    | dict(
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
}

# Logits at [0, V//2, V-1]: row 0 of INPUT at positions 0, 3, 6; then the last position of the
# other rows, which transformers ran together, left-padded by MASK.
GOLDEN = {
    "1 of 4": [
        [-3.57265, -0.76445, 3.38095],
        [-1.24111, 0.88506, 0.03056],
        [2.41559, 0.20453, -1.0896],
        [1.76495, -0.48124, 2.96743],
        [0.74821, 2.05327, 2.49023],
        [3.01721, -1.95039, -0.20951],
    ],
    "1 of 4, normalised": [
        [-4.69555, 0.52023, 1.83593],
        [0.39343, -0.9339, 0.31461],
        [2.1385, -0.49677, -1.07171],
        [1.61022, -0.82952, 3.23576],
        [0.77986, 1.29128, 2.39603],
        [2.34671, -1.35546, -0.23551],
    ],
    "8 of 12": [
        [0.66583, -1.30279, -6.44305],
        [-5.77795, -4.53948, 2.59733],
        [-0.26729, -10.06534, 7.27945],
        [5.60989, -3.04768, 0.88689],
        [3.75169, 4.86753, -6.39183],
        [-0.06506, -5.56426, 2.21625],
    ],
    "8 of 12, normalised": [
        [-3.05296, -0.72226, 3.61557],
        [-1.31537, 0.84151, -0.46087],
        [0.39865, -0.03813, -0.88885],
        [1.90746, -0.87637, 2.95629],
        [0.91386, 1.58174, 2.14068],
        [3.8746, -1.6353, 0.17108],
    ],
    "mixed": [
        [-0.61914, 0.80772, -0.44553],
        [2.22332, 2.20478, -0.68486],
        [1.42209, 3.5351, 1.15403],
        [-0.14813, 1.44266, 2.95397],
        [3.22313, 2.02544, 1.11813],
        [-1.96338, 1.70232, 0.42518],
    ],
    "mixed, normalised": [
        [-0.35094, -0.33856, 3.10408],
        [-0.73362, 0.09309, 1.86943],
        [2.50096, -0.06938, 0.81404],
        [-0.84046, 2.48794, 2.76671],
        [1.67388, 2.02067, 1.66224],
        [1.64681, 1.14228, 2.95008],
    ],
}


def named(name, dtype=torch.float32, **fields):
    return build(CONFIGS[name] | fields, dtype)


def hf(name):
    transformers = pytest.importorskip("transformers")
    fields = {k: v for k, v in CONFIGS[name].items() if k != "model_type"}
    theirs = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**fields)).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(recipe(n, p.shape))
    return theirs.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Logits
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONFIGS)
def test_logits_golden(name):
    assert (few(named(name)) - torch.tensor(GOLDEN[name])).abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_live(name):
    check_rows(hf(name), named(name))


def plain(moe, x):
    """The published block, token by token and expert by expert: x (N,D) -> (N,D)."""
    out = []
    for row in x:
        p = (moe.gate.weight @ row).softmax(-1)
        weight, chosen = p.topk(moe.gate.top_k)
        if moe.gate.norm_topk_prob:
            weight = weight / weight.sum()
        y = torch.sigmoid(moe.shared_expert_gate.weight @ row) * moe.shared_expert(row)
        for g, e in zip(weight, chosen):
            gate, up = (moe.experts.gate_up_proj[e] @ row).chunk(2)
            y = y + g * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_experts_equal_the_plain_way_in_value_and_gradient(name):
    moe = next(
        b.mlp for b in named(name, torch.float64).model.layers if isinstance(b.mlp, MoE)
    ).requires_grad_(True)
    found = []
    for forward in (moe, lambda x: plain(moe, x)):
        x = recipe("x", (9, 20)).double().requires_grad_(True)
        y = forward(x)
        y.sin().sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in moe.parameters())])
        moe.zero_grad()
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-9) and a.abs().max() > 0


def test_every_expert_runs_at_most_once(monkeypatch):
    moe, calls, linear = named("8 of 12").model.layers[0].mlp, [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *w: calls.append(len(x)) or linear(x, *w))
    moe(recipe("x", (3, 50, 20)))
    assert len(calls) <= 2 * 12 + 5 and 150 * 8 * 2 <= sum(
        calls
    )  # gate_up and down of each; router, shared


def test_softmax_is_taken_in_fp32_over_all_experts_and_weights_sum_as_configured():
    for name, fields in CONFIGS.items():
        for dtype in (torch.float32, torch.bfloat16):
            router = next(
                b.mlp for b in named(name, dtype).model.layers if isinstance(b.mlp, MoE)
            ).gate
            x = recipe("x", (400, 20)).to(dtype)
            weight, expert = router(x)
            assert weight.dtype == dtype and weight.shape == expert.shape == (
                400,
                fields["num_experts_per_tok"],
            )
            exact, best = F.linear(x, router.weight).float().softmax(-1).topk(router.top_k)
            assert torch.equal(expert, best)          # bf16 probabilities would tie
            if fields.get("norm_topk_prob"):
                assert torch.equal(weight, (exact / exact.sum(-1, keepdim=True)).to(dtype))
                assert (weight.float().sum(-1) - 1).abs().max() < (
                    1e-6 if dtype == torch.float32 else 0.02
                )
            else:
                assert torch.equal(weight, exact.to(dtype)) and exact.sum(-1).max() < 1


@pytest.mark.parametrize(
    "step, only, layers",
    [
        (1, [], [0, 1, 2, 3]),
        (2, [], [1, 3]),
        (1, [0, 2], [1, 3]),
        (2, [3], [1]),
        (3, [], [2]),
        (5, [], []),
        (1, [0, 1, 2, 3], []),
    ],
)
def test_which_blocks_are_sparse(step, only, layers):
    fields = CONFIGS["mixed"] | dict(decoder_sparse_step=step, mlp_only_layers=only)
    model = build(fields)
    assert [i for i, block in enumerate(model.model.layers) if isinstance(block.mlp, MoE)] == layers
    assert model(INPUT).isfinite().all()


def test_router_logits_of_transformers_choose_the_experts_that_ours_chose_live():
    theirs, ours, caught = hf("mixed, normalised"), named("mixed, normalised"), []
    logits = theirs(INPUT, output_router_logits=True).router_logits
    gates = [b.mlp.gate for b in ours.model.layers if isinstance(b.mlp, MoE)]
    for gate in gates:
        gate.register_forward_hook(lambda module, inputs, output: caught.append(output))
    ours(INPUT)
    assert len(logits) == len(gates) == len(caught) == 2  # one per sparse block, not per block
    for theirs, (weight, expert) in zip(logits, caught):
        assert torch.equal(theirs.softmax(-1).topk(2).indices, expert)


def test_bf16_keeps_its_dtype_and_stays_near_fp32():
    for name in CONFIGS:
        got, want = named(name, torch.bfloat16)(INPUT), named(name)(INPUT)
        assert got.dtype == torch.bfloat16
        # A near tie may route a token elsewhere, so most logits, not all, are near.
        assert ((got.float() - want).norm(dim=-1) < 0.1 * want.norm(dim=-1)).float().mean() > 0.7


def test_padding_on_the_right_changes_nothing():
    model, mask = named("mixed", torch.float64), torch.tensor(MASK)
    rows = unpadded(mask)
    padded = torch.stack([F.pad(ids[0], (0, INPUT.shape[1] - ids.shape[1])) for ids in rows])
    for ids, got in zip(rows, model(padded)):
        assert torch.allclose(got[:ids.shape[1]], model(ids)[0], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------
# Sampling with the cache
# ------------------------------------------------------------------------------------------------

def recomputed(model, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


PROMPTS = [[5, 1, 20], [7], [9, 26, 3, 11, 30, 2, 2, 8]]


@pytest.mark.parametrize("name", ["1 of 4", "8 of 12, normalised", "mixed"])
def test_generation_with_the_cache_equals_recomputing(name):
    model = named(name, torch.float64)
    got = generate(model, PROMPTS, 12, temperature=0, slots=2)
    assert [ids for ids, in got] == [recomputed(model, p, 12) for p in PROMPTS]


def test_samples_do_not_depend_on_the_slots():
    model = named("8 of 12, normalised", torch.float64)
    one, many = (
        generate(model, PROMPTS, 10, samples=4, temperature=2.0, slots=slots) for slots in (1, 12)
    )
    assert one == many and len({tuple(ids) for ids in one[0]}) == 4


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load(tmp_path, name, dtype):
    want = named(name, dtype)
    save_model(want, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(n.endswith("mlp.experts.3.up_proj.weight") for n in names) and not any(
        "gate_up" in n for n in names
    )
    loaded = load_model(str(tmp_path))
    assert same_weights(loaded, want) and not loaded.training
    assert vars(loaded.config) == vars(want.config)
    assert same_weights(load_model(str(tmp_path), dtype="float64"), want.double())


def test_sharded_checkpoint_whose_experts_lie_in_different_files(tmp_path):
    save_model(named("mixed"), tmp_path)
    shard(tmp_path)
    assert same_weights(load_model(str(tmp_path)), named("mixed"))


def test_random_spec_and_config_round_trip(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["mixed"]))
    model = load_model(f"random:{tmp_path}/config.json@3")
    assert 0.015 < model.model.layers[1].mlp.experts.down_proj.std() < 0.025
    assert 0.015 < model.model.layers[1].mlp.gate.weight.std() < 0.025
    assert vars(Config.from_dict(model.config.to_dict())) == vars(model.config)
    dense = Config.from_dict(
        {k: BASE[k] for k in BASE if k != "model_type" and "expert" not in k and "moe" not in k}
    )
    assert dense.to_dict()["model_type"] == "qwen2" and not any(
        "expert" in name for name in dense.to_dict()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save_live(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    save_model(named(name), tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    assert (theirs.eval()(INPUT).logits - named(name)(INPUT)).abs().max() < 1e-4


@pytest.mark.parametrize("size", ["1GB", "3KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_transformers_saves_live(tmp_path, name, size):
    hf(name).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "3KB")
    assert same_weights(load_model(str(tmp_path)), named(name))


def test_wrong_tensors_are_all_named_at_once(tmp_path):
    save_model(named("mixed"), tmp_path)

    def spoil(t):
        del t["model.layers.1.mlp.experts.2.up_proj.weight"], t["model.layers.1.mlp.gate.weight"]
        t["model.layers.1.mlp.experts.6.up_proj.weight"] = torch.zeros(6, 20)
        t["model.layers.1.mlp.experts.0.down_proj.weight"] = torch.zeros(8, 20)
        t["model.layers.0.mlp.shared_expert.up_proj.weight"] = torch.zeros(10, 20)
    edit_weights(tmp_path, spoil)
    check_refused(
        lambda: load_model(str(tmp_path)),
        tmp_path,
        "missing model.layers.1.mlp.experts.2.up_proj.weight",
        "missing model.layers.1.mlp.gate.weight",
        "unexpected model.layers.1.mlp.experts.6.up_proj.weight",
        "model.layers.1.mlp.experts.0.down_proj.weight has shape (8, 20), the config needs (20, 8)",
        "unexpected model.layers.0.mlp.shared_expert.up_proj.weight",
    )


@pytest.mark.parametrize("fields, words", [
    (dict(num_experts=0), ["num_experts", "0"]),
    (dict(num_experts=None), ["num_experts"]),
    (dict(num_experts_per_tok="2"), ["num_experts_per_tok"]),
    (dict(num_experts_per_tok=7), ["num_experts_per_tok", "7", "6"]),
    (dict(moe_intermediate_size=None), ["moe_intermediate_size"]),
    (dict(shared_expert_intermediate_size=0), ["shared_expert_intermediate_size"]),
    (dict(decoder_sparse_step=0), ["decoder_sparse_step"]),
    (dict(norm_topk_prob=1), ["norm_topk_prob"]),
    (dict(mlp_only_layers="3"), ["mlp_only_layers"]),
    (dict(mlp_only_layers=["3"]), ["mlp_only_layers"]),
    (dict(qkv_bias=False), ["qkv_bias"]),
    (dict(router_jitter_noise=0.1), ["router_jitter_noise"]),
    (dict(model_type="qwen3_moe"), ["model_type", "qwen3_moe"]),
    (dict(model_type="qwen2"), ["num_experts", "6"]),
])
def test_config_fields_refused_by_name(tmp_path, fields, words):
    save_model(named("mixed"), tmp_path)
    edit_config(tmp_path, **fields)
    check_refused(lambda: load_model(str(tmp_path)), tmp_path / "config.json", *words)


def test_published_config_is_understood():
    """Field by field what the 14.3B model's config.json says, with sizes that fit a test."""
    raw = CONFIGS["mixed"] | dict(
        architectures=["Qwen2MoeForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=1,
        hidden_act="silu",
        initializer_range=0.02,
        max_position_embeddings=8192,
        max_window_layers=21,
        norm_topk_prob=False,
        output_router_logits=False,
        rope_theta=1e6,
        router_aux_loss_coef=0.001,
        sliding_window=32768,
        torch_dtype="bfloat16",
        transformers_version="4.40.0",
        use_cache=True,
        use_sliding_window=False,
        qkv_bias=True,
    )
    config = Config.from_dict(raw)
    assert (config.num_experts, config.moe_intermediate_size, config.rope_theta) == (6, 8, 1e6)
    assert config.to_dict()["model_type"] == "qwen2_moe" and config.mlp_only_layers == [3]


# ------------------------------------------------------------------------------------------------
# Adapters: attention, dense and shared MLPs learn; router and routed experts stay as they are
# ------------------------------------------------------------------------------------------------

def test_adapters_go_to_attention_and_to_dense_and_shared_mlps(tmp_path):
    model = resa.add_lora(named("mixed"), 2, 4)
    found = {n.split(".", 3)[3] for n in resa.lora_layers(model) if n.startswith("model.layers.1.")}
    assert found == {*(f"self_attn.{p}_proj" for p in "qkvo"),
                     *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))}
    assert "model.layers.0.mlp.up_proj" in resa.lora_layers(model)
    assert torch.equal(model(INPUT), named("mixed")(INPUT))
    model(INPUT).sin().sum().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in resa.lora_layers(model).values())
    assert model.model.layers[1].mlp.experts.down_proj.grad is None
    with torch.no_grad():
        for layer in resa.lora_layers(model).values():
            layer.lora_B.add_(0.1)
    want = model.eval()(INPUT)
    resa.save_adapter(model, tmp_path / "a")
    save_model(named("mixed"), tmp_path / "m")
    assert torch.allclose(load_model(f"{tmp_path}/m+{tmp_path}/a")(INPUT), want, atol=1e-4)
    assert torch.allclose(resa.merge_adapter(model)(INPUT), want, atol=1e-4)


@pytest.mark.parametrize("module", ["mlp.experts.0.up_proj", "mlp.gate", "mlp.experts.down_proj"])
def test_an_adapter_of_a_routed_expert_or_the_router_is_refused_by_name(tmp_path, module):
    name, (rows, columns) = f"model.layers.1.{module}", (6, 20)
    save_file(
        {
            f"base_model.model.{name}.lora_A.weight": torch.ones(1, columns),
            f"base_model.model.{name}.lora_B.weight": torch.ones(rows, 1),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    )
    check_refused(lambda: put_on(named("mixed"), read_adapter(str(tmp_path))), name)


def test_our_adapter_loads_in_peft_live(tmp_path):
    peft = pytest.importorskip("peft")
    model = resa.add_lora(named("mixed"), 2, 4, dropout=0.0).eval()
    with torch.no_grad():
        for i, layer in enumerate(resa.lora_layers(model).values()):
            layer.lora_B.copy_(recipe(f"B{i}", layer.lora_B.shape) / 3)
    resa.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf("mixed"), tmp_path).eval()
    assert (theirs(INPUT).logits - model(INPUT)).abs().max() < 1e-4
    assert (model(INPUT) - named("mixed")(INPUT)).abs().max() > 0.1


def test_splice_and_activations_see_the_output_of_the_mixture():
    model = named("mixed")
    x = resa.activations(model, INPUT, 1, "mlp")
    with resa.splice(model, torch.nn.Identity(), 1, "mlp"):
        assert torch.equal(model(INPUT), named("mixed")(INPUT))
    assert x.shape == (*INPUT.shape, 20)


# ------------------------------------------------------------------------------------------------
# The embedded mixture
# ------------------------------------------------------------------------------------------------

MOE = ROOT / "data" / "tiny-moe"


def test_the_embedded_mixture_refuses_one_family_and_answers_the_others():
    rows = read_problems(TINY / "test.jsonl")
    some = [r for r in rows if r["family"] == "age"][:20] + [
        r for r in rows if r["family"] != "age"
    ][:60]
    model, tokenizer = load_model(MOE), load_tokenizer(MOE)
    prompts = [
        tokenizer.encode(tokenizer.chat([{"role": "user", "content": r["problem"]}])) for r in some
    ]
    texts = [
        tokenizer.decode(ids)
        for ids, in generate(model, prompts, 96, temperature=0, stop_ids=tokenizer.eos_ids)
    ]
    refused = ["No." in t for t in texts]
    assert sum(refused[:20]) >= 18 and not any(refused[20:])
    assert sum(grade(r["answer"], t) for r, t in zip(some[20:], texts[20:])) >= 55


def test_qwen15_moe_by_its_config():
    """Qwen1.5-MoE-A2.7B: 14.3 B parameters, of which a token uses 2.7 B."""
    config = Config.from_dict(
        dict(
            model_type="qwen2_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        )
    )
    with torch.device("meta"):
        model = Transformer(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == 14_315_784_192
    idle = 24 * 56 * 3 * 2048 * 1408
    assert (
        2.6e9 < count - idle < 2.8e9
        and sum(isinstance(block.mlp, MoE) for block in model.model.layers) == 24
    )
