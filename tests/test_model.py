"""model.py against transformers, plain twins, a real trained model, and bad input.

    python -m pytest tests/test_model.py -q      tests named live need transformers or peft

Golden numbers come from transformers 5.23 on weights that any machine can rebuild (`recipe`).
"""

import copy
import json
import resource
import shutil
import sys
import time
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data.tokenizer
import resa
from data.files import read_json
from data.flags import choose_device
from model import (
    BAD, UNDECIDED, Cache, Config, Decoder, Tokenizer, Transformer, check_adapter, check_sampling,
    collect, draw, fold, generate, likeliest, load_model, load_tokenizer, put_on, read_adapter,
    right_pad, rope_table, sample, save_model, split_spec, stream, think_prefix)

from tests.conftest import Watch

# ------------------------------------------------------------------------------------------------
# Tiny models that any machine can rebuild
# ------------------------------------------------------------------------------------------------

CONFIGS = {
    "tied, one kv head": dict(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "untied, no sharing": dict(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        rms_norm_eps=0.05,
        rope_theta=1e6,
    ),
    "untied, two of four": dict(
        vocab_size=53,
        hidden_size=22,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=100.0,
    ),
    "tied, wide heads": dict(
        vocab_size=29,
        hidden_size=10,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        tie_word_embeddings=True,
    ),
}
TINY = CONFIGS["tied, one kv head"]

IDS = [
    [5, 1, 20, 7, 7, 0, 13],
    [0, 0, 0, 9, 26, 3, 11],
    [0, 0, 0, 0, 0, 0, 17],
    [8, 4, 19, 2, 0, 16, 25],
]
MASK = [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1]]
INPUT = torch.tensor(IDS)

# Logits at [0, V//2, V-1]: row 0 of IDS at positions 0, 3, 6; then the last position of the other
# rows, which transformers ran together, left-padded by MASK.
GOLDEN = {
    "tied, one kv head": [
        [0.75111, 5.23933, -12.02632],
        [-5.89177, -8.01742, 1.50225],
        [-3.90881, -2.51408, -3.71731],
        [6.42364, 4.27939, -8.19705],
        [5.6451, 6.59098, -5.30249],
        [-2.05324, -3.61989, -2.72014],
    ],
    "untied, no sharing": [
        [1.14776, -1.90898, 0.1267],
        [2.59892, -2.56834, 0.52801],
        [2.54143, 0.11309, -1.07154],
        [-1.3854, -2.42755, 0.4158],
        [3.51951, -0.99505, -0.54346],
        [3.42215, 1.54914, 0.54224],
    ],
    "untied, two of four": [
        [-1.3279, -0.22853, -1.23764],
        [0.36307, 0.81152, -0.0259],
        [-1.86504, -0.04398, -2.42695],
        [-1.6621, -0.67879, 0.7679],
        [-1.38059, -2.06901, 2.14079],
        [1.97344, 0.07388, 1.74986],
    ],
    "tied, wide heads": [
        [-4.38812, 1.34073, 5.31107],
        [6.25554, 0.98372, -9.4152],
        [-5.96959, 7.11225, 7.7031],
        [-1.40523, 2.65759, 3.49831],
        [3.9587, -2.62524, -3.72488],
        [-2.44019, 3.66411, 8.52111],
    ],
}


def recipe(name, shape):
    """Weights of one parameter, the same on every machine: numpy's legacy generator is frozen."""
    numbers = np.random.RandomState(zlib.crc32(name.encode()))
    normal = torch.from_numpy(numbers.standard_normal(tuple(shape))).float()
    if "norm" in name:
        return 1 + 0.3 * normal
    if name.endswith("bias"):
        return 0.5 * normal
    return normal if "embed" in name else normal * (1.5 * shape[-1] ** -0.5)


def build(fields, dtype=torch.float32):
    model = Transformer(Config.from_dict(fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(recipe(name, p.shape))
    return model.to(dtype).eval().requires_grad_(False)


def named(name, dtype=torch.float32):
    return build(CONFIGS[name], dtype)


def check_refused(call, *words, kind=ValueError):
    """One line that names the thing."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 3000
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"
    return text


# ------------------------------------------------------------------------------------------------
# Logits
# ------------------------------------------------------------------------------------------------

def unpadded(mask):
    """The rows of INPUT, (1,T) each, without their padding."""
    return [ids[keep][None] for ids, keep in zip(INPUT, mask.bool())]


def few(model):
    """The logits of which GOLDEN holds what transformers gives."""
    first, *others = (model(ids)[0] for ids in unpadded(torch.tensor(MASK)))
    logits = torch.stack([*first[[0, 3, 6]], *(row[-1] for row in others)])
    return logits[:, [0, logits.shape[1] // 2, -1]]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_golden(name):
    assert (few(named(name)) - torch.tensor(GOLDEN[name])).abs().max() < 1e-4


def hf(name, **fields):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**CONFIGS[name] | fields)
    ).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(recipe(n, p.shape))
    return theirs.requires_grad_(False)


def check_rows(theirs, ours):
    """Ours without padding against theirs with none, left and right padding."""
    for mask in (torch.ones_like(INPUT), torch.tensor(MASK), torch.tensor(MASK).flip(-1)):
        logits = theirs(INPUT, attention_mask=mask).logits
        for ids, keep, want in zip(unpadded(mask), mask.bool(), logits):
            assert (ours(ids)[0] - want[keep]).abs().max() < 1e-4
    assert logits.abs().mean() > 0.5         # else the tolerance would mean nothing


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_live(name):
    check_rows(hf(name), named(name))


def test_logits_live_at_far_positions():
    ids = torch.from_numpy(np.random.RandomState(0).randint(29, size=(1, 2500)))
    got, want = named("tied, wide heads")(ids), hf("tied, wide heads")(ids).logits
    assert (got - want).abs().max() < 1e-4


def test_rope_angles_are_the_published_ones_to_the_bit():
    """theta ** -x and 1 / theta ** x differ in the last bit; position 30,000 makes 30,000 of it."""
    config = Config.from_dict(TINY | {"head_dim": 128, "rope_theta": 1e6})
    positions = torch.tensor([[0, 1, 30_000]])
    angle = positions[0, :, None].float() * (1.0 / 1e6 ** (torch.arange(0, 128, 2).float() / 128))
    cos, sin = rope_table(config, positions)
    assert cos.shape == (1, 1, 3, 128) and cos.dtype == torch.float32
    assert torch.equal(cos[0, 0], torch.cat((angle, angle), -1).cos())
    assert torch.equal(sin[0, 0], torch.cat((-angle, angle), -1).sin())


def test_bf16_keeps_its_dtype_and_stays_near_fp32():
    for name in CONFIGS:
        got, want = named(name, torch.bfloat16)(INPUT), named(name)(INPUT)
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.05 * want.norm()


def test_blocks_that_run_again_in_the_backward_pass_give_the_same_gradients():
    def gradients(checkpointing):
        model = named("tied, one kv head").requires_grad_(True)
        model.checkpointing, calls = checkpointing, []
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
        model(INPUT).logsumexp(-1).sum().backward()
        with torch.no_grad():
            model(INPUT)
        return len(calls), [p.grad for p in model.parameters()]
    (once, plain), (twice, again) = gradients(False), gradients(True)
    assert (once, twice) == (2, 3) and all(map(torch.equal, plain, again))


@pytest.fixture
def graphs_only(monkeypatch):
    """torch.compile up to the graphs it finds: what it gets wrong it gets wrong there; C++ is slow."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_compiled_blocks_equal_eager_ones(graphs_only):
    graphs_only.clear()
    eager, model = named("tied, one kv head"), named("tied, one kv head").compile_blocks()
    assert torch.allclose(model(INPUT), eager(INPUT), atol=1e-5)
    prompts = [some_ids(n, n) for n in (3, 60, 64, 9)]
    settings = dict(max_new_tokens=12, temperature=0)
    assert generate(model, prompts, **settings) == generate(eager, prompts, **settings)
    found = graphs_only["frames"]                        # it took effect, once for all blocks
    assert 0 < found["ok"] == found["total"] <= 8 and not graphs_only["recompile_limit"]


def test_every_parameter_gets_a_gradient():
    model = named("untied, no sharing").requires_grad_(True)
    model(INPUT).logsumexp(-1).sum().backward()
    # a key bias shifts all scores of a query alike only without rotation; with rotation it matters
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# run: parts of the stack, padding
# ------------------------------------------------------------------------------------------------

def test_run_in_parts_equals_whole():
    model, ids = named("untied, no sharing"), INPUT
    whole = model.run(ids)
    for k in range(4):
        h = model.run(ids, stop=k)
        assert torch.equal(model.run(h, start=k) if k else model.run(ids), whole)
    assert torch.equal(model.run(ids, stop=0), model.model.embed_tokens(ids))
    assert not torch.allclose(model.run(ids, stop=2), whole, atol=0.1)
    assert torch.equal(model.head(whole), model(ids))


@pytest.mark.parametrize("fill", [0, 31])
def test_padding_on_the_right_changes_nothing(fill):
    model = named("untied, two of four", torch.float64)
    rows = [[5, 1, 20], [7], [9, 26, 3, 11, 40], [2, 2], [1] * 8]
    ids, lengths = right_pad(rows, fill)
    for row, got, n in zip(rows, model(ids), lengths):
        want = model(torch.tensor([row]))[0]
        assert torch.allclose(got[:n], want, atol=1e-6, rtol=0)      # rotary tables are fp32


def test_right_pad():
    ids, lengths = right_pad([[3, 4], [5], []], fill=9)
    assert ids.tolist() == [[3, 4], [5, 9], [9, 9]] and lengths.tolist() == [2, 1, 0]


# ------------------------------------------------------------------------------------------------
# Checkpoints: what is written and read
# ------------------------------------------------------------------------------------------------

def checkpoint(directory, name="tied, one kv head", dtype=torch.float32):
    save_model(named(name, dtype), directory)
    return directory


def edit_config(directory, drop=(), **fields):
    raw = read_json(directory / "config.json") | fields
    (directory / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in drop})
    )


def edit_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory, factor=1.0, keep_single=False):
    """Splits model.safetensors in two files and an index, as large models come."""
    tensors = {n: t * factor for n, t in load_file(directory / "model.safetensors").items()}
    names, files = list(tensors), [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    place = {n: files[i % 2] for i, n in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if place[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": place})
    )
    if not keep_single:
        (directory / "model.safetensors").unlink()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load(tmp_path, name, dtype):
    directory = checkpoint(tmp_path / "a" / "b", name, dtype)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in directory.parent.iterdir()] == ["b"]             # no temporary left
    assert ("lm_head.weight" in load_file(directory / "model.safetensors")) != CONFIGS[name].get(
        "tie_word_embeddings", False)
    loaded = load_model(str(directory))
    assert same_weights(loaded, named(name, dtype)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (
        loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ) == loaded.config.tie_word_embeddings
    assert vars(Config.from_dict(loaded.config.to_dict())) == vars(loaded.config)
    if dtype == torch.float32:
        again = load_model(str(directory), dtype="bfloat16", device="cpu")
        assert again.lm_head.weight.dtype == torch.bfloat16 and again.config.dtype == "bfloat16"
        assert same_weights(load_model(str(directory), dtype=torch.float64), named(name).double())


def test_sharded_checkpoint(tmp_path):
    directory = checkpoint(tmp_path / "m", "untied, no sharing")
    shard(directory)
    assert same_weights(load_model(str(directory)), named("untied, no sharing"))
    shutil.copy(directory / "model-00001-of-00002.safetensors", tmp_path / "spare")
    (directory / "model-00001-of-00002.safetensors").unlink()
    check_refused(
        lambda: load_model(str(directory)),
        "model-00001-of-00002.safetensors",
        kind=FileNotFoundError,
    )


def test_saving_over_a_sharded_checkpoint_replaces_it(tmp_path):
    directory = checkpoint(tmp_path / "m")
    shard(directory, factor=3.0)
    save_model(named("tied, one kv head"), directory)
    assert same_weights(load_model(str(directory)), named("tied, one kv head"))


def test_a_tied_head_and_the_rotary_frequencies_may_be_stored_too(tmp_path):
    directory = checkpoint(tmp_path / "m")
    edit_weights(directory, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    loaded = load_model(str(directory))
    assert same_weights(loaded, named("tied, one kv head"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("other", [
    lambda w: w + torch.eye(*w.shape) * 1e-3,            # a head trained apart
    lambda w: w[:-1].clone(),                            # one of another size
])
def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path, other):
    directory = checkpoint(tmp_path / "m")
    edit_weights(directory, lambda t: t.update(
        {"lm_head.weight": other(t["model.embed_tokens.weight"])}))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        load_model(str(directory))


def test_changing_a_loaded_model_leaves_its_file_alone(tmp_path):
    directory = checkpoint(tmp_path / "m")
    before = (directory / "model.safetensors").read_bytes()
    model, want = load_model(str(directory)), named("tied, one kv head")
    for each in (model, want):
        each.model.embed_tokens.weight.mul_(2)
    assert (directory / "model.safetensors").read_bytes() == before
    assert same_weights(load_model(str(directory)), named("tied, one kv head"))
    save_model(model, directory)                        # over the file that it is mapped from
    reader = load_model(str(directory))  # nor does a new save change a model that is in use
    assert same_weights(reader, want)
    save_model(build(TINY | {"vocab_size": 30}), directory)
    assert same_weights(reader, want) and same_weights(model, want)


def test_random_spec(tmp_path):
    path = tmp_path / "config.json"
    for name, fields in CONFIGS.items():
        path.write_text(json.dumps(fields))
        a, b, c = (load_model(f"random:{path}{seed}") for seed in ("", "@0", "@1"))
        assert same_weights(a, b) and not same_weights(a, c)
        assert not any(p.requires_grad for p in a.parameters()) and not a.training
        q = a.model.layers[0].self_attn.q_proj
        assert (
            0.015 < q.weight.std() < 0.025 and not q.bias.any() and (a.model.norm.weight == 1).all()
        )
        assert (a.lm_head.weight is a.model.embed_tokens.weight) == a.config.tie_word_embeddings
    path.write_text(json.dumps(TINY | {"torch_dtype": "bfloat16"}))
    assert load_model(f"random:{path}").lm_head.weight.dtype == torch.bfloat16
    assert load_model(f"random:{path}", dtype="float64").lm_head.weight.dtype == torch.float64
    check_refused(lambda: load_model(f"random:{path}@one"), "one", "seed")
    check_refused(
        lambda: load_model(f"random:{tmp_path}/none.json"), "none.json", kind=FileNotFoundError
    )


def test_random_tied_model_survives_a_save(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model = load_model(f"random:{tmp_path}/config.json")
    save_model(model, tmp_path / "out")
    assert torch.equal(load_model(str(tmp_path / "out"))(INPUT), model(INPUT))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save_live(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint(tmp_path / "m", name, dtype)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", dtype="auto", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert theirs.dtype == dtype
        assert theirs.config.rope_parameters["rope_theta"] == CONFIGS[name].get("rope_theta", 1e4)
        got = named(name, dtype).float()(INPUT)
        assert (theirs.eval().float()(INPUT).logits - got).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "3KB"])
def test_we_load_what_transformers_saves_live(tmp_path, size, dtype):
    for name in CONFIGS:
        theirs, directory = hf(name).to(dtype), tmp_path / name
        theirs.save_pretrained(directory, max_shard_size=size)
        assert (directory / "model.safetensors.index.json").exists() == (size == "3KB")
        ours = load_model(str(directory))
        assert same_weights(ours, named(name, dtype))
        again = type(theirs).from_pretrained(directory, dtype=torch.float32).eval()
        assert (ours.float()(INPUT) - again(INPUT).logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------
# Checkpoints: what is refused
# ------------------------------------------------------------------------------------------------

def test_wrong_tensors_are_all_named_at_once(tmp_path):
    directory = checkpoint(tmp_path / "m")

    def spoil(t):
        del t["model.norm.weight"], t["model.layers.1.self_attn.k_proj.bias"]
        t["model.layers.0.mlp.up_proj.weight"] = torch.zeros(28, 21)
        t["model.layers.1.input_layernorm.weight"] = torch.zeros(20, 1)
        t["model.layers.7.mlp.up_proj.weight"] = torch.zeros(28, 20)
        t["visual.patch.weight"] = torch.zeros(())
    edit_weights(directory, spoil)
    check_refused(
        lambda: load_model(str(directory)),
        directory,
        "missing model.norm.weight",
        "missing model.layers.1.self_attn.k_proj.bias",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "unexpected visual.patch.weight",
        "(28, 20)",
        "model.layers.0.mlp.up_proj.weight has shape (28, 21)",
        "model.layers.1.input_layernorm.weight has shape (20, 1)",
    )


def test_an_untied_head_that_is_missing_is_named(tmp_path):
    directory = checkpoint(tmp_path / "m")
    edit_config(directory, tie_word_embeddings=False)
    check_refused(lambda: load_model(str(directory)), "missing lm_head.weight")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight",
                                  "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    directory = checkpoint(tmp_path / "m")
    edit_weights(directory, lambda t: t[name].view(-1)[-3:-2].fill_(value))
    check_refused(lambda: load_model(str(directory)), directory, name, "NaN or infinite")
    check_refused(lambda: load_model(str(directory), dtype="bfloat16"), name)


def test_weights_too_large_for_a_dtype_are_refused_by_name(tmp_path):
    directory, name = checkpoint(tmp_path / "m"), "model.layers.1.self_attn.o_proj.weight"
    edit_weights(directory, lambda t: t[name].view(-1)[:1].fill_(70_000))
    assert load_model(str(directory), dtype="bfloat16")
    check_refused(lambda: load_model(str(directory), dtype="float16"), name, "float16")


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int8, torch.int64, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_another_dtype_are_refused_by_name(tmp_path, dtype):
    directory, name = checkpoint(tmp_path / "m"), "model.layers.1.mlp.up_proj.weight"
    edit_weights(directory, lambda t: t.update({name: t[name].to(dtype)}))
    check_refused(lambda: load_model(str(directory)), "model.safetensors", name)


def test_a_model_that_is_not_finite_is_neither_saved_nor_sampled(tmp_path):
    directory = checkpoint(tmp_path / "m")
    for name, value in ("model.norm.weight", "nan"), ("model.embed_tokens.weight", "inf"):
        model = named("tied, one kv head")
        model.get_parameter(name).view(-1)[5] = float(value)
        check_refused(lambda: save_model(model, directory), directory, name)
        assert same_weights(load_model(str(directory)), named("tied, one kv head"))
        for temperature in (0, 0.7):
            check_refused(lambda: generate(model, [[1, 2]], 3, temperature), "sampling: logits")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.",
                                    "base_model.model."])
def test_a_prefix_before_all_names_is_named_and_counted(tmp_path, prefix):
    directory = checkpoint(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    save_file({prefix + n: t for n, t in tensors.items()}, directory / "model.safetensors")
    text = check_refused(lambda: load_model(str(directory)), repr(prefix), f"26 of {len(tensors)}")
    assert len(tensors) == 26 and len(text) < 300


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_file(tmp_path, keep):
    path = checkpoint(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    check_refused(lambda: load_model(str(tmp_path / "m")), path)


def test_shapes_are_checked_before_anything_is_allocated(tmp_path):
    """A sparse file that claims 16 GiB, and a config that claims 80 TB, cost a header each."""
    directory = checkpoint(tmp_path / "m")
    claim = {"dtype": "F32", "shape": [1 << 16, 1 << 16], "data_offsets": [0, 1 << 34]}
    header = json.dumps({"model.embed_tokens.weight": claim}).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 34))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_refused(lambda: load_model(str(directory)), "missing model.layers.0")
    checkpoint(tmp_path / "n")
    edit_config(tmp_path / "n", vocab_size=1 << 20)
    check_refused(
        lambda: load_model(str(tmp_path / "n")),
        "model.embed_tokens.weight",
        "(37, 20)",
        (1 << 20, 20),
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # KiB


HUGE = dict(vocab_size=2**20, hidden_size=2**20, intermediate_size=2**20, num_hidden_layers=512,
            num_attention_heads=2**12, head_dim=2**12)
EXPERTS = dict(model_type="qwen2_moe", num_experts=2**12, num_experts_per_tok=2,
               moe_intermediate_size=2**20, shared_expert_intermediate_size=2**20)


@pytest.mark.parametrize("fields", [HUGE, HUGE | EXPERTS, HUGE | dict(torch_dtype="float64")])
@pytest.mark.parametrize("spec", ["{}", "random:{}/config.json"])
def test_the_memory_a_model_takes_is_compared_with_what_is_free(tmp_path, fields, spec):
    """Every size at its bound: no number overflows, nothing is allocated, no list of names made."""
    directory = checkpoint(tmp_path / "m")
    edit_config(directory, **fields)
    start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_refused(lambda: load_model(spec.format(directory)), directory, "weights take", "GB, free are")
    assert time.thread_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_the_memory_is_that_of_the_dtype(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "m")
    need = sum(p.nbytes for p in load_model(str(directory), "float32").parameters())
    monkeypatch.setattr("model.free_memory", lambda device: need)
    check_refused(lambda: load_model(str(directory), "float32"), f"{need / 1e9:.3g} GB")
    assert load_model(str(directory), "bfloat16").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size",
                                   "num_hidden_layers", "num_attention_heads", "head_dim",
                                   "num_key_value_heads", "num_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [2**31, 2**64, 10**400])
def test_sizes_of_a_config_are_bounded(field, value):
    raw = TINY | EXPERTS | dict(num_experts=4) | {field: value}
    start = time.thread_time()
    check_refused(lambda: Config.from_dict(raw, "here/config.json"), "here/config.json", field)
    assert time.thread_time() - start < 0.1


def test_the_seed_of_a_random_model_fits_a_generator(tmp_path):
    directory = checkpoint(tmp_path / "m")
    assert load_model(f"random:{directory}/config.json@{10**17}")
    for seed in ("1" * 19, "1" * 99, "-1", "x", "1.0"):
        check_refused(lambda: load_model(f"random:{directory}/config.json@{seed}"), "seed")


def test_a_width_smaller_than_the_heads_is_refused():
    check_refused(lambda: Config.from_dict(TINY | dict(hidden_size=4), "here"), "here", "head_dim 0")


def test_missing_files(tmp_path):
    directory = checkpoint(tmp_path / "m")
    (directory / "model.safetensors").rename(tmp_path / "w")
    check_refused(
        lambda: load_model(str(directory)), directory / "model.safetensors", kind=FileNotFoundError
    )
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    check_refused(
        lambda: load_model(str(directory)), "model.safetensors", "a pickle is never loaded",
        kind=FileNotFoundError
    )
    (directory / "config.json").unlink()
    check_refused(
        lambda: load_model(str(directory)), directory / "config.json", kind=FileNotFoundError
    )


@pytest.mark.parametrize("index, word", [
    ({"weight_map": {"model.norm.weight": "../w.safetensors"}}, "../w.safetensors"),
    ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "/etc/passwd"),
    ({"weight_map": {"model.norm.weight": ".."}}, ".."),
    ({"weight_map": {"model.norm.weight": 5}}, "weight_map"),
    ({"weight_map": ["model.safetensors"]}, "weight_map"),
    ({"weight_map": {}}, "weight_map"),
    ({}, "weight_map"),
])
def test_bad_index(tmp_path, index, word):
    directory = checkpoint(tmp_path / "m")
    (directory / "model.safetensors").rename(tmp_path / "w.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(lambda: load_model(str(directory)), directory, word)


@pytest.mark.parametrize("text, word", [(b"{", "not JSON"), (b"", "not JSON"), (b"[1]", "list"),
                                        (b"[" * 10**5, "not JSON"), (b"\xff\xfe{}", "not UTF-8")])
def test_malformed_json(tmp_path, text, word):
    directory = checkpoint(tmp_path / "m")
    (directory / "config.json").write_bytes(text)
    check_refused(lambda: load_model(str(directory)), directory / "config.json", word)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(model_type="llama"), ["model_type", "llama"]),
        (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
        (dict(use_sliding_window=True), ["use_sliding_window"]),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), ["rope_scaling", "yarn"]),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]),
        (
            dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
            ["rope_parameters", "dynamic"],
        ),
        (dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
        (dict(quantization_config={"bits": 4}), ["quantization_config; save it in bf16"]),
        (dict(attention_dropout=0.1), ["attention_dropout"]),
        (dict(num_experts=8), ["num_experts"]),
        (dict(use_mrope=True), ["use_mrope"]),
        (dict(vocab_size=0), ["vocab_size"]),
        (dict(hidden_size="20"), ["hidden_size"]),
        (dict(num_hidden_layers=2.5), ["num_hidden_layers"]),
        (dict(num_key_value_heads=2), ["5", "2"]),
        (dict(head_dim=3), ["head_dim", "3"]),
        (dict(torch_dtype="int8"), ["dtype", "int8"]),
        (dict(dtype="float8_e4m3fn"), ["dtype", "float8_e4m3fn"]),
    ],
)
def test_config_fields_refused_by_name(tmp_path, fields, words):
    directory = checkpoint(tmp_path / "m")
    edit_config(directory, drop=["torch_dtype"] if "dtype" in fields else [], **fields)
    check_refused(lambda: load_model(str(directory)), directory / "config.json", *words)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_theta", None),
        ("rope_theta", "1e4"),
        ("rope_theta", 0),
        ("rope_parameters", "default"),
        ("rope_scaling", "yarn"),
        ("num_key_value_heads", "1"),
        ("num_key_value_heads", -1),
        ("head_dim", -2),
        ("head_dim", 6.0),
        ("rms_norm_eps", "1e-6"),
        ("torch_dtype", ["float32"]),
        ("tie_word_embeddings", "false"),
        ("num_attention_heads", True),
    ],
)
def test_config_fields_of_a_wrong_type(field, value):
    """Python's own TypeError says neither the file nor the field."""
    try:
        model = Transformer(Config.from_dict(TINY | {field: value}, "here/config.json"))
    except ValueError as error:
        assert field in str(error) and "here/config.json" in str(error)
    else:                                      # or it has an obvious meaning and is honoured
        assert (field, value) == ("rope_theta", None) and model.config.rope_theta == 1e4


@pytest.mark.parametrize("field, value", [
    ("rope_theta", 1e31), ("rope_theta", 10**400), ("rope_theta", True), ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6), ("max_position_embeddings", "512"), ("bos_token_id", "<s>"),
    ("eos_token_id", "<end>"), ("eos_token_id", {"id": 1}), ("pad_token_id", 0.5),
    ("rope_parameters", {"rope_theta": "1e6"}), ("rope_parameters", {"rope_theta": 0}),
    ("layer_types", "full_attention"), ("layer_types", [1]), ("model_type", ["qwen2"]),
    ("qkv_bias", 1), ("hidden_act", 0), ("layer_types", 5), ("layer_types", {}),
    ("max_position_embeddings", "x"), ("max_position_embeddings", 0), ("eos_token_id", {}),
    ("eos_token_id", [{}]), ("eos_token_id", [1, None]), ("eos_token_id", 1.5),
    ("rope_scaling", {"rope_theta": 10**400}), ("rope_parameters", 10**400),
    ("mlp_only_layers", 10**400), ("rms_norm_eps", []), ("dtype", {}),
])
def test_config_fields_that_no_forward_pass_could_use(field, value):
    raw = TINY | {field: value}
    if field == "mlp_only_layers":
        raw |= dict(model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2,
                    moe_intermediate_size=8, shared_expert_intermediate_size=8)
    check_refused(lambda: Config.from_dict(raw, "x.json"), "x.json", field)


@pytest.mark.parametrize("fields", [
    dict(unsloth_version="2025.3.1"), dict(_commit_hash="0ad1f3"), dict(auto_map={"AutoModel": "x"}),
    dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}), dict(attention_bias=True),
    dict(unsloth_fixed=True), dict(torchscript=True), dict(tokenizer_class="Qwen2Tokenizer"),
    dict(problem_type="single_label_classification"), dict(max_length=20, do_sample=True),
    dict(_attn_implementation="sdpa"), {"transformers.js_config": {"dtype": "q4"}},
], ids=str)
def test_bookkeeping_is_ignored_with_a_note(capsys, fields):
    want = Config.from_dict(TINY).to_dict()
    assert capsys.readouterr().err == ""
    assert Config.from_dict(TINY | fields, "here/config.json").to_dict() == want
    assert capsys.readouterr().err == f"here/config.json: ignored: {', '.join(fields)}\n"


@pytest.mark.parametrize("fields", [
    dict(rope_scaling={"type": "yarn", "factor": 4.0}), dict(use_sliding_window=True),
    dict(quantization_config={"bits": 4}), dict(partial_rotary_factor=0.5), dict(qk_norm=True),
    dict(logit_scale=0.5), dict(final_logit_softcapping=30.0), dict(attention_multiplier=2),
    dict(pruned_heads={"0": [1]}), dict(use_tomorrow="x"), dict(layer_norm_type="rms2"),
    dict(tie_word_embedding=True), dict(add_cross_attention=True),
], ids=str)
def test_what_may_change_the_computation_is_refused(fields):
    check_refused(lambda: Config.from_dict(TINY | fields, "x.json"), "x.json", *fields)


def test_a_config_can_be_copied_and_changed():
    config = Config(**TINY)
    assert vars(config) == vars(Config.from_dict(TINY)) == vars(copy.deepcopy(config))
    other = copy.deepcopy(config)
    other.mlp_only_layers.append(1)                      # no default is shared
    assert config.mlp_only_layers == [] == Config(**TINY).mlp_only_layers
    model = copy.deepcopy(named("tied, one kv head"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(INPUT), named("tied, one kv head")(INPUT))
    with pytest.raises(AssertionError):
        Config(**TINY, num_layers=3)


def test_numbers_of_a_config_are_written_as_they_were_read():
    raw = TINY | {"rope_theta": 1000000, "rms_norm_eps": 1e-5}
    text = json.dumps(Config.from_dict(raw).to_dict())
    assert '"rope_theta": 1000000,' in text and '"rms_norm_eps": 1e-05,' in text


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_missing_config_field(tmp_path, field):
    directory = checkpoint(tmp_path / "m")
    edit_config(directory, drop=[field])
    check_refused(lambda: Config.from_pretrained(str(directory)), directory / "config.json", field)


def test_published_configs_are_understood(shared):
    config = Config.from_pretrained(str(shared / "tokenizers" / "deepseek-r1-distill-qwen"))
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (1536, 2, 128)
    assert (
        config.dtype == "bfloat16" and not config.tie_word_embeddings and config.rope_theta == 10000
    )
    assert config.eos_token_id == 151643 and config.to_dict()["torch_dtype"] == "bfloat16"
    both = dict(TINY, rope_theta=1e4, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
                layer_types=["full_attention"] * 2, sliding_window=None, eos_token_id=[3, 4])
    config = Config.from_dict(both)
    assert config.rope_theta == 1e6 and config.eos_token_id == [3, 4] and config.head_dim == 4
    assert Config.from_dict(TINY | {"num_key_value_heads": None}).num_key_value_heads == 5


def test_bookkeeping_fields_of_saved_configs_are_no_reason_to_refuse():
    """Some releases of transformers wrote the first into every config.json they saved."""
    config = Config.from_dict(
        TINY | {"_attn_implementation_autoset": True, "_name_or_path": "x", "use_cache": True}
    )
    assert config.to_dict() == Config.from_dict(TINY).to_dict()


@pytest.mark.parametrize("dtype", ["float33", "bf16", torch.int8])
def test_bad_dtype(tmp_path, dtype):
    directory = checkpoint(tmp_path / "m")
    check_refused(
        lambda: load_model(str(directory), dtype=dtype),
        str(dtype).removeprefix("torch."),
        "bfloat16",
    )


# ------------------------------------------------------------------------------------------------
# Specs
# ------------------------------------------------------------------------------------------------

def test_spec_names_directories(tmp_path, monkeypatch):
    """What the parts of a spec mean is `locate`, in test_files.py."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "runs" / "m")
    checkpoint(tmp_path / "a+b@c#d")                     # a directory of that very name comes first
    for spec in ("runs/m", f"{tmp_path}/runs/m", "runs#m", "a+b@c#d", tmp_path / "runs" / "m"):
        assert same_weights(load_model(spec), named("tied, one kv head")), spec
    check_refused(lambda: load_model("runs/m@main"), "runs/m", "revision")
    check_refused(lambda: load_model("runs#../a+b@c#d"), "leads out")
    for spec in ("nothing", "runs#none", "runs/m+nothing"):
        check_refused(lambda: load_model(spec), spec.split("+")[-1], kind=FileNotFoundError)
    for spec in ("runs/m+", "runs/m++"):
        check_refused(lambda: load_model(spec), "no adapter is named")


def test_split_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_spec("a@b#c") == ("a@b#c", [])
    assert split_spec("a+b*0.5+c+d*-1e1") == ("a", [("b", 0.5), ("c", 1.0), ("d", -10.0)])
    assert split_spec("random:x.json@3+b") == ("random:x.json@3", [("b", 1.0)])
    assert split_spec(Path("a")) == ("a", [])
    (tmp_path / "a+b").mkdir()
    assert split_spec("a+b") == ("a+b", []) and split_spec("x+c*2") == ("x", [("c", 2.0)])
    exact = [("c", 0.1 + 0.2), ("d", 1e-05), ("e", -0.5)]
    assert split_spec("x+c*0.30000000000000004+d*1e-5+e*-.5") == ("x", exact)


def test_paths_with_a_plus_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = checkpoint(tmp_path / "c++" / "m+1")
    of_layers(tmp_path / "c++" / "lora+x", QS, target_modules=["q_proj"])
    (tmp_path / "ad").symlink_to(tmp_path / "c++" / "lora+x")
    one, two = "c++/m+1", "c++/lora+x"
    assert split_spec(one) == (one, [])
    assert split_spec(f"{one}+{two}") == (one, [(two, 1.0)])
    assert split_spec(f"{one}+{two}*0.5+ad*-2") == (one, [(two, 0.5), ("ad", -2.0)])
    assert split_spec(f"c++#m+1+ad+{two}") == ("c++#m+1", [("ad", 1.0), (two, 1.0)])
    assert split_spec("c++#lora+ad") == ("c++#lora", [("ad", 1.0)])
    assert split_spec(f"{two}#sub*0.5") == (f"{two}#sub*0.5", [])
    assert split_spec(f"m+{two}#sub*0.5") == ("m", [(f"{two}#sub", 0.5)])
    assert split_spec(f"random:{one}/config.json@3+{two}") == (
        f"random:{one}/config.json@3", [(two, 1.0)])
    merged, plain = load_model(f"{base}+{tmp_path}/{two}*0.5"), load_model(str(base))
    assert not torch.equal(merged(INPUT), plain(INPUT))
    assert same_weights(merged, load_model(f"{one}+ad*0.5"))
    assert load_model(f"random:{one}/config.json@3+{two}")
    with pytest.raises(ValueError, match="names no adapter"):        # the + is of the base's name
        resa.main(["merge", "--model", one, "--out", "merged"])
    check_refused(lambda: load_model(f"{one}+"), "no adapter is named")
    check_refused(lambda: load_model(f"{one}++{two}"), "no adapter is named")
    (tmp_path / "half*0.5").symlink_to(tmp_path / "ad")
    assert split_spec("x+half*0.5") == ("x", [("half*0.5", 1.0)])


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == choose_device(None) == choose_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        check_refused(lambda: choose_device(name), f"device {name!r} is not one of those here: cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device() == "cuda" and choose_device("cpu") == "cpu"
    assert [choose_device(name) for name in ("cuda", "cuda:0", "cuda:1")] == [
        "cuda", "cuda:0", "cuda:1"]
    for name in ("gpu", "cuda:2", "cuda:-1", "cuda:x", "CPU", "cuda:0\n", "cuda:" + "9" * 99):
        check_refused(lambda: choose_device(name), "not one of those here: cuda, cuda:0, cuda:1")


# ------------------------------------------------------------------------------------------------
# Interrupted writes
# ------------------------------------------------------------------------------------------------

def listing(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def test_save_that_fails_half_way_leaves_the_old_model(tmp_path):
    directory = checkpoint(tmp_path / "m")
    before = listing(tmp_path)
    model = named("untied, no sharing")
    model.source = tmp_path / "source"
    (model.source / "tokenizer.json").mkdir(
        parents=True
    )  # cannot be copied: fails after the weights
    with pytest.raises(OSError):
        save_model(model, directory)
    assert [n for n in listing(tmp_path) if not n.startswith("source")] == before
    assert same_weights(load_model(str(directory)), named("tied, one kv head"))


def test_a_save_that_stops_between_two_files_leaves_nothing_that_loads(tmp_path):
    """Never a new config over old weights, nor an old one over new weights."""
    directory = checkpoint(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()                     # a rename onto a folder fails
    with pytest.raises(OSError):
        save_model(named("untied, no sharing"), directory)
    assert listing(tmp_path) == ["m", "m/model.safetensors"]
    check_refused(lambda: load_model(str(directory)), "config.json", kind=FileNotFoundError)


def test_save_refuses_attached_adapters(tmp_path):
    model = named("tied, one kv head")
    model.model.layers[0].mlp.lora_A = nn.Linear(2, 2)
    check_refused(lambda: save_model(model, tmp_path / "m"), "LoRA")
    assert listing(tmp_path) == []


def test_the_tokenizer_travels_with_a_save(tmp_path):
    word_tokenizer(checkpoint(tmp_path / "a"))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    save_model(load_model(str(tmp_path / "a")), tmp_path / "b")
    assert load_tokenizer(str(tmp_path / "b")).chat([{"role": "user", "content": "one"}]) == "one!"
    assert load_tokenizer(str(tmp_path / "b")).encode("two one") == [2, 1]


# ------------------------------------------------------------------------------------------------
# PEFT adapters
# ------------------------------------------------------------------------------------------------

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def adapter(directory, r=2, tensors=None, **fields):
    """A PEFT directory for the model of TINY, written by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 6,
        "target_modules": [Q, DOWN],
    } | fields
    (directory / "adapter_config.json").write_text(json.dumps(raw))
    shapes = {f"{Q}.lora_A": (2, 20), f"{Q}.lora_B": (20, 2),
              f"{DOWN}.lora_A": (2, 28), f"{DOWN}.lora_B": (20, 2)}
    own = {f"base_model.model.{n}.weight": recipe(n, s) for n, s in shapes.items()} | (
        tensors or {}
    )
    save_file(
        {n: t for n, t in own.items() if t is not None}, directory / "adapter_model.safetensors"
    )
    return str(directory)


def tensor_name(module, side):
    return f"base_model.model.{module}.lora_{side}.weight"


def test_merge_is_base_plus_scaled_product(tmp_path):
    spec = adapter(
        tmp_path / "ad",
        lora_dropout=0.1,
        bias="none",
        inference_mode=True,
        rank_pattern={},
        init_lora_weights=True,
        use_dora=False,
        base_model_name_or_path="x",
        task_type="CAUSAL_LM",
    )
    read = read_adapter(spec)
    assert (read["r"], read["lora_alpha"], read["lora_dropout"], read["scales"][Q]) == (2, 6, 0.1, 3.0)
    assert set(read["pairs"]) == {Q, DOWN} and read["alphas"] == {Q: 6, DOWN: 6}
    base = checkpoint(tmp_path / "m")
    merged, want = load_model(f"{base}+{spec}"), named("tied, one kv head").state_dict()
    for module in (Q, DOWN):
        A = recipe(f"{module}.lora_A", (2, 28 if module == DOWN else 20))
        B = recipe(f"{module}.lora_B", (20, 2))
        want[f"{module}.weight"] = want[f"{module}.weight"] + 3.0 * B @ A
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, want[name], atol=1e-6), name
    assert not torch.allclose(merged(INPUT), named("tied, one kv head")(INPUT), atol=0.1)
    twice, (A, B) = load_model(f"{base}+{spec}+{spec}").get_submodule(Q).weight, read["pairs"][Q]
    assert torch.allclose(twice - want[f"{Q}.weight"], 3.0 * B @ A, atol=1e-5)
    config = base / "config.json"
    assert load_model(f"random:{config}@3+{spec}").get_submodule(Q).weight.std() > 0.1
    assert same_weights(
        load_model(str(base)), named("tied, one kv head")
    )  # the base file is as it was


def test_fold_rounds_once():
    W, A, B = recipe("W", (30, 20)), recipe("A", (3, 20)), recipe("B", (30, 3))
    assert torch.equal(fold(W, A, B, 0.5), W + 0.5 * (B @ A))
    half = fold(W.bfloat16(), A, B, 1e-3)
    assert torch.equal(half, (W.bfloat16().float() + 1e-3 * (B @ A)).bfloat16())
    exact = fold(W.double(), A, B, 0.5)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, W.double() + 0.5 * (B.double() @ A.double()))
    assert torch.equal(fold(W, A, B, 0.0), W)


def test_merge_sums_in_fp32_for_a_bf16_model(tmp_path):
    read = read_adapter(adapter(tmp_path / "ad"))
    model = named("tied, one kv head", torch.bfloat16)
    base = model.get_submodule(Q).weight.clone()
    put_on(model, read)
    A, B = read["pairs"][Q]
    own = model.get_submodule(Q)
    assert torch.equal(own.weight, base)                    # the change is kept beside it
    assert torch.equal(own.folded(), (base.float() + 3.0 * B @ A).bfloat16())


def test_a_factor_scales_an_adapter(tmp_path):
    base, spec = checkpoint(tmp_path / "m"), adapter(tmp_path / "ad")
    weight = lambda spec: load_model(spec).get_submodule(Q).weight
    plain, delta = weight(f"{base}+{spec}"), weight(f"{base}+{spec}") - weight(str(base))
    assert torch.equal(weight(f"{base}+{spec}*0"), weight(str(base))) and delta.abs().max() > 0.1
    assert torch.equal(weight(f"{base}+{spec}*1"), plain) and torch.equal(
        weight(f"{base}+{spec}*1e0"), plain
    )
    assert torch.allclose(weight(f"{base}+{spec}*2") - weight(str(base)), 2 * delta, atol=1e-6)
    assert torch.allclose(
        weight(f"{base}+{spec}*-.5+{spec}"), weight(str(base)) + delta / 2, atol=1e-6
    )
    (tmp_path / "m+ad*2").symlink_to(base)
    assert torch.equal(weight(f"{tmp_path}/m+ad*2"), weight(str(base)))
    for bad in ("", "half", "nan", "inf", "1e999", "2*", "1.2.3"):
        words = f"{spec}*{bad}: no such directory"
        check_refused(lambda: load_model(f"{base}+{spec}*{bad}"), words, kind=FileNotFoundError)


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(peft_type="IA3"), "IA3"),
        (dict(r=0), "'r'"),
        (dict(r="2"), "'r'"),
        (dict(r=3), "rank 3"),
        (dict(lora_alpha=None), "lora_alpha"),
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias"),
        (dict(use_rslora=1), "use_rslora"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(rank_pattern={"q_proj": 4}), "rank 4"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern"),
        (dict(rank_pattern={"q_proj": None}), "rank_pattern"),
        (dict(rank_pattern={"(": 2}), "regular expression"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": "4"}), "alpha_pattern"),
        (dict(alpha_pattern={"q_proj": 10**400}), "alpha_pattern"),
        (dict(alpha_pattern={"*": 2}), "regular expression"),
        (dict(target_modules=5), "target_modules"),
        (dict(target_modules=["q_proj", 5]), "target_modules"),
        (dict(target_modules="q_proj("), "regular expression"),
        (dict(exclude_modules="[z-a]"), "regular expression"),
        (dict(exclude_modules={"q_proj": 1}), "exclude_modules"),
        (dict(layers_to_transform="1"), "layers_to_transform"),
        (dict(layers_to_transform=[0.5]), "layers_to_transform"),
        (dict(layers_to_transform=1, layers_pattern="a{99999999999999999999}"), "expression"),
        (dict(target_modules="((m|o)*)*x"), "repeats"), (dict(target_modules=".*" * 9), "repeats"),
        (dict(exclude_modules="(.|.)" * 30 + "x"), "repeats"), (dict(rank_pattern={"(a+)+": 2}), "repeats"),
        (dict(target_modules=".?" * 30 + "x"), "repeats"),
        (dict(layers_to_transform=1, layers_pattern=["(l+)+"]), "repeats"),
        # whatever a field of tomorrow is, it may change what is computed
        (dict(use_tomorrow=True), "use_tomorrow"),
        (dict(scale_vector=[1.0]), "scale_vector"),
        (dict(peft_version="x", variant="dora"), "variant"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(target_parameters=["w"]), "target_param"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(use_qalora=True), "use_qalora"),
        # these leave plain matrices that belong to a changed base, or that act on some tokens only
        (dict(peft_type=None), "peft_type"),
        (dict(r=True), "'r'"),
        (dict(lora_alpha="6"), "lora_alpha"),
        (dict(lora_dropout=1.5), "lora_dropout"),
        (dict(init_lora_weights=1), "init_lora_weights"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(init_lora_weights="olora"), "init_lora"),
        (dict(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
        (dict(use_bdlora={"nblocks": 2}), "use_bdlora"),
    ],
)
def test_adapter_settings_refused_by_name(tmp_path, fields, word):
    spec = adapter(tmp_path / "ad", **fields)
    check_refused(lambda: read_adapter(spec), spec, word)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (tensor_name(Q, "A"), None, [Q, "only one of lora_A and lora_B"]),
        (tensor_name(Q, "B"), None, [Q, "only one of lora_A and lora_B"]),
        (tensor_name(Q, "A"), torch.zeros(3, 20), [Q, "rank 2"]),
        (tensor_name(Q, "B"), torch.zeros(20, 4), [Q, "rank 2"]),
        (tensor_name(Q, "A"), torch.zeros(2), [Q]),
        (tensor_name(Q, "A"), torch.zeros(()), [Q]),
        (tensor_name(Q, "A"), torch.zeros(2, 20, 1), [Q]),
        (
            f"base_model.model.{Q}.lora_magnitude_vector.weight",
            torch.zeros(2),
            ["lora_magnitude_vector"],
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            torch.zeros(2, 37),
            ["lora_embedding_A"],
        ),
        # what bias, lora_bias, modules_to_save and trainable_token_indices of PEFT leave there
        (f"base_model.model.{Q}.bias", torch.zeros(20), [f"{Q}.bias"]),
        (f"base_model.model.{Q}.lora_B.bias", torch.zeros(20), [f"{Q}.lora_B.bias"]),
        ("base_model.model.lm_head.weight", torch.zeros(37, 20), ["lm_head.weight"]),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
         torch.zeros(1, 20), ["trainable_tokens_delta"]),
        ("something.else", torch.zeros(2, 2), ["something.else"]),
    ],
)
def test_adapter_tensors_refused_by_name(tmp_path, name, tensor, words):
    spec = adapter(tmp_path / "ad", tensors={name: tensor})
    check_refused(lambda: read_adapter(spec), "adapter_model.safetensors", *words)


@pytest.mark.parametrize("module, a, b, word", [
    ("model.layers.9.self_attn.q_proj", 20, 20, "does not have"),
    ("model.layers.0.input_layernorm", 20, 20, "does not have"),
    (Q, 24, 20, "(20, 24)"), (Q, 20, 22, "(22, 20)"),
])
def test_adapter_that_does_not_fit_the_model(tmp_path, module, a, b, word):
    spec = adapter(tmp_path / "ad", tensors={tensor_name(module, "A"): torch.ones(2, a),
                                             tensor_name(module, "B"): torch.ones(b, 2)})
    base, model = checkpoint(tmp_path / "m"), named("tied, one kv head")
    check_refused(lambda: load_model(f"{base}+{spec}"), spec, module, word)
    check_refused(lambda: check_adapter(model, read_adapter(spec), "here"), "here", module)
    with pytest.raises(ValueError):
        put_on(model, read_adapter(spec))
    assert same_weights(model, named("tied, one kv head"))  # refused before the first change


def of_layers(directory, modules, change=lambda pairs: None, **fields):
    """An adapter of rank 2 for these modules of the model of TINY."""
    model, pairs = named("tied, one kv head"), {}
    for module in modules:
        out, width = model.get_submodule(module).weight.shape
        pairs[tensor_name(module, "A")] = recipe(f"{module}.A", (2, width))
        pairs[tensor_name(module, "B")] = recipe(f"{module}.B", (out, 2))
    change(pairs)
    directory.mkdir(exist_ok=True)
    save_file(pairs, directory / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | fields
    (directory / "adapter_config.json").write_text(json.dumps(raw))
    return str(directory)


LINEARS = [n for n, m in Transformer(Config(**TINY)).named_modules()
           if isinstance(m, nn.Linear) and n != "lm_head"]
QS, UPS = ([n for n in LINEARS if n.endswith(end)] for end in ("q_proj", "up_proj"))
SELECTIONS = [          # fields of adapter_config.json, the modules that they select
    (dict(target_modules=["q_proj"]), QS),
    (dict(target_modules=["up_proj", "self_attn.q_proj"]), QS + UPS),
    (dict(target_modules=QS[:1] + ["mlp.up_proj"]), QS[:1] + UPS),
    (dict(target_modules=r"model\.layers\.\d+\.self_attn\.q_proj"), QS),
    (dict(target_modules=r".*(q|up)_proj|nothing"), QS + UPS),
    (dict(target_modules="all-linear"), LINEARS),
    (dict(target_modules="All-Linear", exclude_modules=r".*mlp.*"),
     [n for n in LINEARS if "self_attn" in n]),
    (dict(target_modules=["q_proj", "up_proj"], exclude_modules=["q_proj"]), UPS),
    (dict(target_modules=["q_proj", "up_proj"], exclude_modules=QS[:1] + ["0.mlp.up_proj"]),
     QS[1:] + UPS[1:]),
    (dict(target_modules=["q_proj"], exclude_modules="q_proj"), QS),     # the whole name, as PEFT
    (dict(target_modules=["q_proj"], layers_to_transform=0), QS[:1]),
    (dict(target_modules=["q_proj"], layers_to_transform=[1, 7], layers_pattern="layers"), QS[1:]),
    (dict(target_modules=["q_proj"], layers_to_transform=[], layers_pattern=None), QS),
    (dict(target_modules=QS, layers_to_transform=[1]), QS),             # full names count in any layer
    (dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["h", "layers"]),
     QS[:1]),
]


@pytest.mark.parametrize("fields, modules", SELECTIONS, ids=str)
def test_an_adapter_has_the_layers_that_its_config_selects_no_more_and_no_fewer(
        tmp_path, fields, modules):
    """What is missing would load as the base; what is not selected PEFT would not load."""
    base = checkpoint(tmp_path / "m")
    spec = of_layers(tmp_path / "ad", modules, **fields)
    merged, plain = load_model(f"{base}+{spec}"), load_model(str(base))
    for name in LINEARS:
        changed = not torch.equal(merged.get_submodule(name).weight,
                                  plain.get_submodule(name).weight)
        assert changed == (name in modules), name
    for i in {0, len(modules) - 1}:
        fewer = modules[:i] + modules[i + 1:]
        spec = of_layers(tmp_path / "ad", fewer, **fields)
        check_refused(lambda: load_model(f"{base}+{spec}"), spec, modules[i], "target_modules")
    if others := [n for n in LINEARS if n not in modules]:
        spec = of_layers(tmp_path / "ad", modules + others[:1], **fields)
        check_refused(lambda: load_model(f"{base}+{spec}"), spec, others[0], "target_modules")


@pytest.mark.parametrize("fields", [dict(target_modules=["q_proj"]), dict(target_modules=[]), {},
                                    dict(target_modules="none"), dict(target_modules=None),
                                    dict(target_modules="all-linear")], ids=str)
def test_an_adapter_without_tensors_is_no_adapter(tmp_path, fields):
    spec = of_layers(tmp_path / "ad", [], **fields)
    check_refused(lambda: load_model(f"{checkpoint(tmp_path / 'm')}+{spec}"), spec)


def test_an_embedding_that_is_selected_is_missed(tmp_path):
    spec = of_layers(tmp_path / "ad", QS, target_modules=["q_proj", "embed_tokens"])
    check_refused(lambda: load_model(f"{checkpoint(tmp_path / 'm')}+{spec}"), "embed_tokens")


@pytest.mark.parametrize("side, place", [("A", (0, 0)), ("B", (-1, -1)), ("A", (1, 7))])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_adapter_numbers_that_are_not_finite_are_refused_by_name(tmp_path, side, place, value):
    name = tensor_name(QS[1], side)

    def spoil(pairs):
        pairs[name][place] = value
    spec = of_layers(tmp_path / "ad", QS, spoil, target_modules=["q_proj"])
    check_refused(lambda: read_adapter(spec), "adapter_model.safetensors", name, "NaN")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2])
def test_adapter_tensors_of_another_dtype_are_refused_by_name(tmp_path, dtype):
    name = tensor_name(QS[0], "B")

    def cast(pairs):
        pairs[name] = pairs[name].to(dtype)
    spec = of_layers(tmp_path / "ad", QS, cast, target_modules=["q_proj"])
    check_refused(lambda: read_adapter(spec), "adapter_model.safetensors", name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapter_tensors_of_each_float_are_read(tmp_path, dtype):
    def cast(pairs):
        pairs.update({name: t.to(dtype) for name, t in pairs.items()})
    plain = read_adapter(of_layers(tmp_path / "a", QS, target_modules=["q_proj"]))
    other = read_adapter(of_layers(tmp_path / "b", QS, cast, target_modules=["q_proj"]))
    for a, b in zip(plain["pairs"][QS[0]], other["pairs"][QS[0]]):
        assert (a - b).abs().max() < 0.02 and a.dtype == b.dtype == torch.float32


def test_an_adapter_that_is_too_much_for_the_weights_is_refused(tmp_path):
    spec = of_layers(tmp_path / "ad", QS, target_modules=["q_proj"], lora_alpha=1e30)
    base = checkpoint(tmp_path / "m")
    check_refused(lambda: load_model(f"{base}+{spec}*1e9"), f"{spec}", QS[0], "infinite")
    assert load_model(f"{base}+{spec}*1e-9").get_submodule(QS[0]).weight.isfinite().all()
    half = checkpoint(tmp_path / "half", dtype=torch.float16)      # keeps it aside: what it says overflows
    check_refused(lambda: generate(load_model(f"{half}+{spec}"), [[1, 2]], 2), "logits", "NaN or infinite")


@pytest.mark.parametrize("fields, scales", [   # by hand: alpha / r, or alpha / sqrt(r), of QS, UPS
    (dict(), (3, 3, 3, 3)),
    (dict(use_rslora=True), (6 / 2**0.5,) * 4),
    (dict(alpha_pattern={"q_proj": 4}), (2, 2, 3, 3)),
    (dict(alpha_pattern={"0.self_attn.q_proj": 4, "q_proj": 10}), (2, 5, 3, 3)),
    (dict(alpha_pattern={"proj": 4, "layers": 8}), (3, 3, 3, 3)),    # whole words, at the end
    (dict(alpha_pattern={r"layers\.1\..*": 8, "up_proj": 2}), (3, 4, 1, 4)),
    (dict(alpha_pattern={r"^model.layers.0.mlp.up_proj": -1}), (3, 3, -0.5, 3)),
    (dict(alpha_pattern={"q_proj|up_proj": 1.5}, use_rslora=True), (1.5 / 2**0.5,) * 4),
], ids=str)
def test_the_scale_of_each_layer(tmp_path, fields, scales):
    base = checkpoint(tmp_path / "m")
    spec = of_layers(tmp_path / "ad", QS + UPS, target_modules=["q_proj", "up_proj"], **fields)
    merged, plain = load_model(f"{base}+{spec}"), load_model(str(base))
    for name, scale in zip(QS + UPS, scales):
        A, B = read_adapter(spec)["pairs"][name]
        change = merged.get_submodule(name).weight - plain.get_submodule(name).weight
        assert torch.allclose(change, scale * B @ A, atol=1e-5), name


def test_layers_of_different_ranks(tmp_path):
    """Rank 2 but where a pattern says 3: the scale goes with the rank."""
    def widen(pairs):
        for side, shape in (("A", (3, 20)), ("B", (28, 3))):
            pairs[tensor_name(UPS[1], side)] = recipe(side, shape)
    pattern = {"1.mlp.up_proj": 3}
    base, where = checkpoint(tmp_path / "m"), tmp_path / "ad"
    targets = dict(target_modules=["up_proj"], lora_alpha=12)
    for rslora, root in (False, 1), (True, 0.5):
        spec = of_layers(where, UPS, widen, rank_pattern=pattern, use_rslora=rslora, **targets)
        merged, plain = load_model(f"{base}+{spec}"), load_model(str(base))
        for name, r in zip(UPS, (2, 3)):
            A, B = read_adapter(spec)["pairs"][name]
            change = merged.get_submodule(name).weight - plain.get_submodule(name).weight
            assert torch.allclose(change, 12 / r**root * B @ A, atol=1e-4)
    check_refused(lambda: read_adapter(of_layers(where, UPS, widen, **targets)), UPS[1], "rank 2")
    check_refused(lambda: read_adapter(of_layers(where, UPS, rank_pattern=pattern, **targets)),
                  UPS[1], "rank 3")


@pytest.mark.parametrize("name, word", [
    ("model.embed_tokens.weight", "save_embedding_layers"),
    ("lm_head.weight", "save_embedding_layers"), ("lm_head.base_layer.weight", "lm_head"),
    ("model.embed_tokens.lora_embedding_A", "linear layer"),
])
def test_weights_that_peft_saves_beside_the_adapter_are_refused_in_clear_words(
        tmp_path, name, word):
    def add(pairs):
        pairs[f"base_model.model.{name}"] = torch.ones(37, 20)
    spec = of_layers(tmp_path / "ad", QS, add, target_modules=["q_proj"])
    check_refused(lambda: read_adapter(spec), f"base_model.model.{name}", word)


def test_adapter_of_a_tied_head_does_not_touch_the_embedding(tmp_path):
    """Merged into the shared matrix, it would change the input too."""
    spec = adapter(tmp_path / "ad", tensors={tensor_name("lm_head", "A"): torch.ones(2, 20),
                                             tensor_name("lm_head", "B"): torch.ones(37, 2)})
    check_refused(lambda: load_model(f"{checkpoint(tmp_path / 'm')}+{spec}"), "lm_head", "embeddings")


def test_adapter_files_missing_or_damaged(tmp_path):
    base, spec = checkpoint(tmp_path / "m"), adapter(tmp_path / "ad")
    check_refused(lambda: load_model(f"{base}+{tmp_path}/none"), "none", kind=FileNotFoundError)
    check_refused(
        lambda: load_model(f"{base}+{base}"), "adapter_config.json", kind=FileNotFoundError
    )
    (tmp_path / "ad" / "adapter_model.safetensors").rename(tmp_path / "ad" / "adapter_model.bin")
    check_refused(
        lambda: load_model(f"{base}+{spec}"), "adapter_model.safetensors", kind=FileNotFoundError
    )
    (tmp_path / "ad" / "adapter_model.safetensors").write_bytes(b"nonsense")
    check_refused(lambda: load_model(f"{base}+{spec}"), "adapter_model.safetensors")
    (tmp_path / "ad" / "adapter_config.json").write_text("{")
    check_refused(lambda: load_model(f"{base}+{spec}"), "adapter_config.json")


def test_we_load_what_peft_saves_live(tmp_path):
    peft = pytest.importorskip("peft")
    for name in ("tied, one kv head", "untied, two of four"):
        theirs = peft.get_peft_model(
            hf(name),
            peft.LoraConfig(
                r=3,
                lora_alpha=7,
                target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
            ),
        )
        with torch.no_grad():
            for n, p in theirs.named_parameters():
                if "lora_" in n:
                    p.copy_(recipe(n, p.shape))
        theirs.save_pretrained(tmp_path / "ad")
        ours = load_model(f"{checkpoint(tmp_path / 'm', name)}+{tmp_path / 'ad'}")
        want = theirs.eval()(INPUT).logits
        assert (ours(INPUT) - want).abs().max() < 1e-4
        assert (named(name)(INPUT) - want).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------
# Tokenizers and chat
# ------------------------------------------------------------------------------------------------

NAMES = ["deepseek-r1-distill-qwen", "qwen2.5-1.5b-instruct", "qwen2.5-math-1.5b"]
TEXTS = [
    "Hello  world\n\n x = 1.50",
    "<think>\nso 12+3=15\n</think>\n\n\\boxed{15}",
    " naïve ½ 🦙\t\r\n  if x:\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<｜User｜>ho<｜Assistant｜>",
    "",
    "e\u0301 \u00a0 \u200b中文字 12345678",
]


@lru_cache
def real_tokenizer(directory):
    return load_tokenizer(str(directory))


@pytest.mark.parametrize("name, vectors", list(zip(NAMES, ["deepseek-r1-qwen", "qwen2", "qwen2"])))
def test_encodings_equal_published_vectors(shared, name, vectors):
    path = shared / "tokenizers" / "test_vectors" / f"ggml-vocab-{vectors}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = [
        [int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().splitlines()
    ]
    tokenizer = real_tokenizer(shared / "tokenizers" / name)
    assert texts.pop() == "" and len(texts) == len(wanted) > 40
    for text, ids in zip(texts, wanted):
        assert tokenizer.encode(text) == ids, repr(text)
    for text in TEXTS:      # Qwen normalises to NFC, so a letter and its accent come back as one
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text.replace(
            "e\u0301", "é"
        )


@pytest.mark.parametrize("name, eos, eos_id", [
    (NAMES[0], {151643}, 151643), (NAMES[1], {151645, 151643}, 151645),
    (NAMES[2], {151643}, 151643)])
def test_end_tokens_are_the_union(shared, name, eos, eos_id):
    tokenizer = real_tokenizer(shared / "tokenizers" / name)
    assert (tokenizer.eos_ids, tokenizer.eos_id) == (eos, eos_id)


USER = {"role": "user", "content": "What is 2 + 3?"}
TALK = [{"role": "system", "content": "Be brief."}, USER,
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n5"},
        {"role": "user", "content": " Twice that?\n"}]
QWEN_TALK = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
             "<|im_start|>assistant\n<think>\neasy\n</think>\n\n5<|im_end|>\n"
             "<|im_start|>user\n Twice that?\n<|im_end|>\n")
CHATS = {  # one question, a conversation, both without the generation prompt; the generation prompt
    NAMES[0]: (
        "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 3?",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 2 + 3?<｜Assistant｜>\n\n5<｜end▁of▁sentence｜>"
        "<｜User｜> Twice that?\n",
        "<｜Assistant｜><think>\n",
    ),
    NAMES[1]: (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n",
        QWEN_TALK,
        "<|im_start|>assistant\n",
    ),
    NAMES[2]: (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}."
        "<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n",
        QWEN_TALK,
        "<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_chat_strings_golden(shared, name):
    tokenizer, (question, talk, prompt) = real_tokenizer(shared / "tokenizers" / name), CHATS[name]
    for messages, text in (([USER], question), (TALK, talk)):
        assert tokenizer.chat(messages, add_generation_prompt=False) == text
        assert tokenizer.chat(messages) == text + prompt
    # one BOS, and the markers of the template are single tokens
    ids = tokenizer.encode(tokenizer.chat([USER]))
    assert ids.count(151646 if name == NAMES[0] else 151644) == (1 if name == NAMES[0] else 3)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_live(shared, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    ours = real_tokenizer(shared / "tokenizers" / name)
    lines = (shared / "bench" / "math500.jsonl").read_text(encoding="utf-8").splitlines()[:25]
    for text in TEXTS + [json.loads(line)["solution"] for line in lines]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for messages in ([USER], TALK, TALK[:2], TALK[1:3]):
        for add in (True, False):
            want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            assert ours.chat(messages, add_generation_prompt=add) == want


def word_tokenizer(directory, files=(), **settings):
    """A tokenizer of four words, with a template and end tokens as given."""
    from tokenizers import Tokenizer as Fast, models, pre_tokenizers, processors
    fast = Fast(models.WordLevel({"<end>": 0, "one": 1, "two": 2, "<s>": 3, "?": 4}, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<end>", "<s>"])  # and one that the file would put in front by itself
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in dict(files).items():
        (directory / name).write_text(content)
    return str(directory)


def test_end_tokens_from_three_files(tmp_path):
    spec = word_tokenizer(tmp_path / "t", eos_token={"content": "<end>"}, bos_token="<s>", files={
        "config.json": '{"eos_token_id": 7}', "generation_config.json": '{"eos_token_id": [8, 9]}'})
    tokenizer = load_tokenizer(spec)
    assert tokenizer.eos_ids == {0, 7, 8, 9} and tokenizer.eos_id == 0
    assert tokenizer.encode("one two") == [1, 2]
    assert tokenizer.decode([3, 1, 2, 0]) == "one two"
    assert tokenizer.decode([3, 1], skip_special=False) == "<s> one"
    none = word_tokenizer(tmp_path / "u", files={"config.json": '{"eos_token_id": null}'})
    tokenizer = load_tokenizer(none)
    assert tokenizer.eos_ids == set()
    check_refused(lambda: tokenizer.eos_id, "end-of-text")


def test_saved_truncation_and_padding_do_not_touch_the_text(tmp_path):
    """Trainers leave both in tokenizer.json; transformers clears them on use."""
    from tokenizers import Tokenizer as Fast
    spec = word_tokenizer(tmp_path / "t")
    fast = Fast.from_file(spec + "/tokenizer.json")
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    fast.save(spec + "/tokenizer.json")
    assert load_tokenizer(spec).encode("one two one two one two") == [1, 2, 1, 2, 1, 2]


def test_where_the_template_comes_from(tmp_path):
    plain, other = "{{ messages[0].content }}{{ eos_token }}", "{{ bos_token }}other"
    one = dict(eos_token="<end>", bos_token={"content": "<s>", "lstrip": False})
    word_tokenizer(tmp_path, chat_template=plain, **one)
    assert load_tokenizer(str(tmp_path)).chat([USER]) == "What is 2 + 3?<end>"
    (tmp_path / "chat_template.jinja").write_text(other)
    assert load_tokenizer(str(tmp_path)).chat([USER]) == "<s>other"
    (tmp_path / "chat_template.jinja").unlink()
    word_tokenizer(tmp_path)
    check_refused(lambda: load_tokenizer(str(tmp_path)).chat([USER]), "chat_template")


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config", {"chat_template": 5}, ["chat_template"]),
    ("tokenizer_config", {"chat_template": [{"name": "default", "template": "x"}]},
     ["chat_template", "text"]),
    ("tokenizer_config", {"chat_template": [{"name": "default"}]}, ["chat_template", "text"]),
    ("tokenizer_config", {"chat_template": {"default": "x"}}, ["chat_template", "text"]),
    ("config", {"eos_token_id": {}}, ["eos_token_id"]),
    ("config", {"eos_token_id": [[1]]}, ["eos_token_id"]),
    ("tokenizer_config", {"eos_token": 5}, ["eos_token"]),
    ("tokenizer_config", {"eos_token": {"text": "x"}}, ["eos_token", "content"]),
    ("tokenizer_config", {"bos_token": {"content": 5}}, ["bos_token", "content"]),
    ("config", {"eos_token_id": "<end>"}, ["eos_token_id"]),
    ("generation_config", {"eos_token_id": [1, "2"]}, ["eos_token_id"]),
    ("generation_config", {"eos_token_id": True}, ["eos_token_id"]),
])
def test_tokenizer_settings_refused_by_file_and_field(tmp_path, name, content, words):
    word_tokenizer(tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    check_refused(lambda: Tokenizer(tmp_path), tmp_path / f"{name}.json", *words)


def test_think_prefix():
    assert think_prefix("<user>1+1<assistant><think>\n") == "<think>" == think_prefix("<think>")
    for prompt in ("", "<think>x", "<think></think>", "think>"):
        assert think_prefix(prompt) == ""


def test_tokenizer_refusals(tmp_path):
    check_refused(lambda: Tokenizer(tmp_path), tmp_path / "tokenizer.json", "No such file")
    word_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    check_refused(lambda: Tokenizer(tmp_path), tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    check_refused(lambda: Tokenizer(tmp_path), tmp_path / "tokenizer.json")


def test_templates_use_the_conventions_of_the_hub(tmp_path):
    """trim_blocks, lstrip_blocks, loop controls, plain tojson, raise_exception, tools = none."""
    text = (
        "{%- for m in messages %}\n    {% if m.role == 'system' %}\n{% continue %}\n"
        "    {% endif %}\n"
        "{{ m | tojson }}\n{% endfor %}\n{% if tools is not none %}tools{% endif %}"
    )
    word_tokenizer(tmp_path, chat_template=text)
    chat = load_tokenizer(str(tmp_path)).chat([TALK[0], {"role": "user", "content": "é<"}])
    assert chat == '{"role": "user", "content": "é<"}\n'
    word_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    check_refused(lambda: load_tokenizer(str(tmp_path)).chat([USER]), "roles must alternate")


TEMPLATES = {          # template -> what transformers 5.24 makes of it for TALK[:2]
    "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}": "system:Be brief.user:What is 2 + 3?",
    "a {%- generation -%} b {%- endgeneration -%} c": "abc",
    "{% for m in messages %}\n  {% generation %}\n{{ m.role }}\n  {% endgeneration %}\n"
    "{% endfor %}": "system\nuser\n",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}": "21",
    "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}": "12",
    "{{ {'b': 1, 'a': 'é<'} | tojson }}": '{"b": 1, "a": "é<"}',
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}": '{"a": 2, "b": 1}',
    "{{ {'b': [1], 'a': 2} | tojson(indent=2, sort_keys=True) }}":
        '{\n  "a": 2,\n  "b": [\n    1\n  ]\n}',
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}": '{"b":1,"a":2}',
    "{{ 'é' | tojson(ensure_ascii=true) }}": '"\\u00e9"',
    "{{ messages[0] | tojson(separators=(', ', '= '), sort_keys=true) }}":
        '{"content"= "Be brief.", "role"= "system"}',
    "{{ strftime_now('%%') }}{{ strftime_now is defined }}": "%True",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_have_what_transformers_offers(tmp_path, template):
    word_tokenizer(tmp_path, chat_template=template)
    assert load_tokenizer(str(tmp_path)).chat(TALK[:2]) == TEMPLATES[template]


@pytest.mark.parametrize("template", [*TEMPLATES, "{{ strftime_now('%Y-%m') }}",
                                      "{% generation %}{% macro f() %}x{% endmacro %}{{ f() }}"
                                      "{% endgeneration %}"])
def test_templates_live(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    directory = word_tokenizer(tmp_path, chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{directory}/tokenizer.json",
                                                  chat_template=template)
    want = theirs.apply_chat_template(TALK[:2], tokenize=False)
    assert load_tokenizer(directory).chat(TALK[:2], add_generation_prompt=False) == want


def test_the_date_of_a_template_is_todays(tmp_path):
    word_tokenizer(tmp_path, chat_template="{{ strftime_now('%Y') }}")
    assert load_tokenizer(str(tmp_path)).chat([USER]).startswith("2")


@pytest.mark.parametrize("template", [
    "{% generation %}", "{% endgeneration %}", "{{ strftime_now() }}", "{{ strftime_now(5) }}",
    "{{ messages | tojson(unknown=1) }}", "{{ strftime_now.__globals__ }}{{ 1 + none }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "{{ self.__init__.__globals__['__builtins__'].open('hacked', 'w') }}",
    "{{ raise_exception.__globals__['os'].system('touch hacked') }}",
    "{{ ('%s' | attr('format'))|attr('__globals__') + 1 }}",
    "{{ messages.append(messages[0]) }}", "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ range(10 ** 9) | list }}",
    "{% for i in 5 %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% if %}",
    "{{ unknown.field }}", "{{ 'a' | nofilter }}",
])
def test_hostile_and_broken_templates(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    word_tokenizer(tmp_path / "t", chat_template=template)
    messages = [dict(USER)]
    check_refused(lambda: load_tokenizer("t").chat(messages), "template")
    assert messages == [USER] and listing(tmp_path) == [
        "t",
        "t/tokenizer.json",
        "t/tokenizer_config.json",
    ]


DOUBLING = "{%% set n = namespace(x=%s) %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ n.x }}"
TWINS = ("{%% set n = namespace(x=1, y=1) %%}{%% for i in range(40) %%}{%% set n.x = %s %%}"
         "{%% set n.y = %s %%}{%% endfor %%}{{ n.x == n.y }}")
ENDLESS = [        # what a word too many makes, in time or in memory
    "{{ 'x' * 10**9 }}", "{{ 2 ** (2 ** 31) }}", "{{ 2400000 ** 2400000 > 1 }}", "{{ [1] * 10**9 }}",
    "{{ strftime_now('%1000000d' * 10000) }}", "{{ range(9999) | batch(1) | sum(start=[]) | length }}",
    "{{ 'x' | indent(10**9) }}", "{{ 'x' | indent('x' * 10**6) | indent('x' * 10**6) }}",
    "{{ 'x' | center(10**9) }}", "{{ 'x'.ljust(10**9) }}", "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' | format(1) }}", "{{ '%1000000000d' % 1 }}", "{{ '{:999999999}'.format(1) }}",
    "{{ ('x' * 9999) | replace('x', 'x' * 99999) }}", "{{ ('x' * 9999).replace('x', 'x' * 99999) }}",
    "{{ range(9999) | join('x' * 99999) }}", "{{ ('x' * 99999).join('x' * 9999) }}",
    "{{ range(9999) | map(attribute='no', default='x' * 99999) | join }}",
    "{{ ''.join(range(9999) | map(attribute='no', default='x' * 99999)) }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ 'x' | batch(10**9, 'x') | list }}",
    "{{ (5).to_bytes(10**9, 'big') }}", "{{ ('x' * 9999).translate({120: 'x' * 9999}) }}",
    "{{ lipsum() }}", "{{ range(0, 10**30, 2**61 - 1) | unique | list }}",
    DOUBLING % ("'x'", "{% set n.x = n.x ~ n.x %}"), DOUBLING % ("'x'", "{% set n.x = n.x + n.x %}"),
    DOUBLING % ("'x'", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    DOUBLING % ("'x'", "{% set n.x = [n.x, n.x] %}"), DOUBLING % ("1", "{% set n.x = (n.x, n.x) %}"),
    DOUBLING % ("'x'", "{% set n.x = {1: n.x, 2: n.x} %}"), DOUBLING % ("9", "{% set n.x = n.x * n.x %}"),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "{% set x = 'x' * 2400000 %}{{ [" + "x[1:], " * 300 + "] | length }}",
    TWINS % ("[n.x, n.x]", "[n.y, n.y]"), TWINS % ("(n.x, n.x)", "(n.y, n.y)"),
    TWINS % ("{1: n.x, 2: n.x}", "{1: n.y, 2: n.y}"), "{{ 1" + " + 1" * 15000 + "}}",
    "{{ " + "(" * 9999, "x" * 70000,
]


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_end(tmp_path, monkeypatch, template):
    """Without gigabytes, in one line, and the next template is not the poorer for it."""
    monkeypatch.setattr("data.tokenizer.SECONDS", 0.3)
    word_tokenizer(tmp_path, chat_template=template)
    start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_refused(lambda: load_tokenizer(str(tmp_path)).chat([USER]), "chat template: ")
    assert time.thread_time() - start < 1 and sys.gettrace() is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18      # KiB


def test_namespaces_in_namespaces_are_not_printed(tmp_path):
    """In jinja2 the text of forty, each twice in the next one, has 2^40 parts."""
    names = [f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(40)]
    word_tokenizer(tmp_path, chat_template="{% set n0 = 1 %}" + "".join(names) + "{{ n40 }}")
    assert len(load_tokenizer(str(tmp_path)).chat([USER])) < 100


def test_each_text_of_a_template_has_the_whole_allowance(tmp_path):
    word_tokenizer(tmp_path, chat_template="{{ messages[0].content * 100 }}")
    tokenizer = load_tokenizer(str(tmp_path))
    for _ in range(20):
        assert len(tokenizer.chat([{"role": "user", "content": "x" * 5000}])) == 500_000
    check_refused(lambda: tokenizer.chat([{"role": "user", "content": "x" * 20_000}]), "10,000,000")
    assert len(tokenizer.chat([{"role": "user", "content": "x" * 5000}])) == 500_000


@pytest.mark.parametrize("name", NAMES)
def test_real_templates_need_little_of_what_is_allowed(shared, name):
    tokenizer = real_tokenizer(shared / "tokenizers" / name)
    text = tokenizer.chat(TALK * 50 + [{"role": "user", "content": "x" * 100_000}])
    assert "x" * 100_000 in text             # in time, else it is a ValueError
    assert data.tokenizer.compiled(tokenizer.template).environment.left > data.tokenizer.WORK / 2


# ------------------------------------------------------------------------------------------------
# sample: from logits to a token
# ------------------------------------------------------------------------------------------------

HALVES = torch.tensor(
    [0.125, 0.5, 0.125, 0.25]
).log()  # exact in binary: thresholds can be hit exactly


def drawn(logits, n=4096, **settings):
    """Frequencies over an even grid of u: exact up to one count a token."""
    u = (torch.arange(n) + 0.5) / n
    tokens = sample(logits.expand(n, -1), u, **settings)
    return torch.bincount(tokens, minlength=logits.numel()) / n


@pytest.mark.parametrize("top_p, kept", [
    (0.01, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.76, [0, 1, 3]), (0.875, [0, 1, 3]),
    (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_token_that_crosses(top_p, kept):
    p = HALVES.exp() * torch.tensor([float(i in kept) for i in range(4)])
    assert torch.allclose(drawn(HALVES, top_p=top_p), p / p.sum(), atol=2e-3)


@pytest.mark.parametrize("top_k, kept", [
    (1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_k_and_the_earlier_of_equals(top_k, kept):
    p = HALVES.exp() * torch.tensor([float(i in kept) for i in range(4)])
    assert torch.allclose(drawn(HALVES, top_k=top_k), p / p.sum(), atol=2e-3)


def test_token_i_owns_the_interval_from_the_sum_before_it_up_to_its_own():
    u = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 0.8749, 0.875, 0.9999])
    assert sample(HALVES.expand(8, -1), u).tolist() == [1, 1, 3, 3, 0, 0, 2, 2]


def test_top_p_and_top_k_together_keep_the_smaller_set():
    assert drawn(HALVES, top_p=0.6, top_k=1).tolist() == [0, 1, 0, 0]
    assert drawn(HALVES, top_p=0.4, top_k=3).tolist() == [0, 1, 0, 0]


def test_frequencies_match_the_distribution():
    logits = torch.from_numpy(np.random.RandomState(1).standard_normal(50)).float() * 2
    for temperature in (0.3, 1.0, 2.5):
        got = drawn(logits, n=40_000, temperature=temperature)
        assert torch.allclose(got, torch.softmax(logits / temperature, -1), atol=2e-4)
    n = 40_000  # and with the sampler's own noise: chi-square of 49 degrees, 99.99 % below 96
    u = torch.from_numpy(np.random.default_rng([3, 1, 4]).random(n, dtype=np.float32))
    p = torch.softmax(logits, -1)
    counts = torch.bincount(sample(logits.expand(n, -1), u), minlength=50)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 96


def test_extremes_of_u_stay_in_the_kept_set():
    logits = torch.tensor([[1.0, 5.0, -float("inf"), 4.0, -200.0]])
    for u in (0.0, 1 - 2 ** -24):
        for settings in (dict(), dict(top_p=0.9), dict(top_k=2), dict(top_p=1.0, temperature=0.01)):
            assert int(sample(logits, torch.tensor([u]), **settings)) in (0, 1, 3)
    assert sample(logits, torch.tensor([1 - 2 ** -24]), top_k=2).item() == 3
    big = torch.from_numpy(np.random.RandomState(2).standard_normal((64, 5000))).float()
    tokens = sample(big, torch.full((64,), 1 - 2 ** -24), top_p=0.5)
    order = big.argsort(-1, descending=True)
    rank = (order == tokens[:, None]).int().argmax(-1)
    p = torch.softmax(big.double(), -1).gather(-1, order).cumsum(-1)
    last = (p < 0.5).sum(-1)  # the rank of the token that crosses one half
    assert ((rank - last).abs() <= 1).all() and (rank == last).float().mean() > 0.9


def test_temperature_zero_is_argmax_and_small_temperatures_go_there():
    logits = torch.from_numpy(np.random.RandomState(3).standard_normal((20, 30))).float() * 5
    u = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, u, temperature=0), logits.argmax(-1))
    for temperature in (1e-3, 1e-6, 1e-30, 1e-40):
        assert torch.equal(
            sample(logits, u, temperature=temperature), logits.argmax(-1)
        ), temperature
    assert torch.equal(sample(logits, u, temperature=5.0, top_k=1), logits.argmax(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1e-3, 1.0])
def test_logits_that_are_not_finite_are_no_distribution(bad, temperature):
    logits, u = torch.zeros(3, 5), torch.full((3,), 0.5)
    sample(logits, u, temperature)
    logits[1, 3] = bad
    text = check_refused(lambda: sample(logits, u, temperature), "sampling", "NaN or infinite")
    assert len(text) < 100
    masked = torch.tensor([[0.0, -float("inf"), 1.0]])          # a token ruled out is no fault
    assert sample(masked, u[:1], temperature).item() == 2
    check_refused(lambda: sample(torch.full((1, 4), -float("inf")), u[:1], temperature), "sampling")


def test_a_decode_step_marks_them_and_the_stream_looks(monkeypatch):
    """A step does not wait for a GPU; what it marks is seen where tokens come to the host."""
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    for temperature in (0, 1.0):
        assert draw(logits, torch.zeros(2), temperature, 0.9, 0).tolist() == [BAD, 1]
    monkeypatch.setattr("model.draw", lambda logits, *_, **__: torch.full((len(logits),), -1))
    monkeypatch.setattr("model.sample", lambda logits, *_, **__: torch.ones(len(logits), dtype=int))
    check_refused(lambda: generate(named("tied, one kv head"), [[1, 2]], 3), "sampling: logits")


def awkward_rows(n, vocab):
    """Logits of n rows of each kind: random at many scales, flat, with ties (as bf16 makes them),
    all mass in one token, two plateaus, equal but for the last bit."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, vocab, generator=rng)
    one = torch.full((n, vocab), -200.0).scatter(1, x.argmax(1, keepdim=True), 50.0)
    return {
        "random": x * torch.linspace(0.01, 12, n)[:, None], "flat": torch.zeros(n, vocab),
        "ties": (x * 3).round(), "bf16": (x * 4).bfloat16().float(), "one": one,
        "plateaus": 5.0 * (x > torch.linspace(-1, 2.5, n)[:, None]), "close": 1 + x * 1e-7}


@pytest.mark.parametrize("top_p, top_k", [
    (0.01, 0), (0.5, 0), (0.95, 0), (1.0, 0), (0.9, 3), (1.0, 31), (1.0, 32), (0.999, 150)])
def test_sorting_only_the_likeliest_is_sorting_all(top_p, top_k):
    """10,500 rows at a vocabulary of which 32 are sorted; which token is drawn is equal too."""
    vocab, undecided = 512, {}
    assert likeliest(torch.rand(1, vocab), sort_all=False)[0].shape == (1, 32)
    for kind, logits in awkward_rows(1500, vocab).items():
        u = torch.rand(1500, generator=torch.Generator().manual_seed(1))
        u[:4] = torch.tensor([0.0, 1 - 2 ** -24, 0.5, 0.25])
        settings = 0.6, top_p, top_k
        want, some = draw(logits, u, *settings, sort_all=True), draw(logits, u, *settings)
        decided = some != UNDECIDED
        assert torch.equal(some[decided], want[decided]), kind
        assert torch.equal(sample(logits, u, *settings), want), kind
        undecided[kind] = 1 - decided.float().mean().item()
    assert undecided["one"] == 0 and (want >= 0).all()
    assert (undecided["flat"] > 0) == (0 < top_k or top_p < 1)   # all equal: which ones are first?
    if (top_p, top_k) == (0.95, 0):                              # the fast path does decide some
        assert 0.05 < undecided["random"] < 0.95


def test_a_row_depends_on_itself_alone():
    logits = torch.from_numpy(np.random.RandomState(4).standard_normal((6, 40))).float()
    u = torch.linspace(0.05, 0.95, 6)
    whole = sample(logits, u, temperature=0.8, top_p=0.9, top_k=20)
    assert [
        int(sample(logits[i : i + 1], u[i : i + 1], 0.8, 0.9, 20)) for i in range(6)
    ] == whole.tolist()


def test_top_p_and_top_k_live():
    generation = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.from_numpy(np.random.RandomState(5).standard_normal((8, 60))).float() * 3
    for top_p, top_k in ((0.3, 0), (0.8, 0), (0.95, 7), (1.0, 5), (0.999, 60)):
        want = generation.TopKLogitsWarper(top_k)(None, logits) if top_k else logits
        # theirs applies top-p to what top-k left, ours to the whole: equal where top-p is tighter
        want = generation.TopPLogitsWarper(top_p)(None, logits).isfinite() & want.isfinite()
        for row, kept in zip(logits, want):
            seen = drawn(row, n=200_000, top_p=top_p, top_k=top_k) > 0
            assert torch.equal(
                seen, kept & (row > row.max() - 11)
            )  # rarer than that is never drawn


# ------------------------------------------------------------------------------------------------
# generate: against a plain twin
# ------------------------------------------------------------------------------------------------

def plain_sample(logits, u, temperature, top_p, top_k):
    """One row, in numpy, as the papers say it."""
    if temperature == 0:
        return int(np.argmax(logits))
    p = np.exp((logits - logits.max()) / temperature)
    p, kept = p / p.sum(), []
    for token in np.argsort(-p, kind="stable"):
        kept.append(token)
        if p[kept].sum() >= top_p or len(kept) == top_k:
            break
    return int(kept[min(int((np.cumsum(p[kept]) <= u * p[kept].sum()).sum()), len(kept) - 1)])


@torch.no_grad()
def plain_generate(
    model, prompt, key, max_new_tokens, temperature=0.6, top_p=0.95, top_k=0, stop_ids=()
):
    """No cache, no batch: the whole text through the whole model for every token."""
    ids, noise = list(prompt), np.random.default_rng(list(key)).random(
        max_new_tokens, dtype=np.float32
    )
    for t in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[0, -1].double().numpy()
        ids.append(plain_sample(logits, float(noise[t]), temperature, top_p, top_k))
        if ids[-1] in stop_ids:
            return ids[len(prompt):], "stop"
    return ids[len(prompt):], "length"


def some_ids(length, seed, vocab=37):
    return np.random.RandomState(seed).randint(vocab, size=length).tolist()


@lru_cache
def exact():
    """In float64 two orders of summation flip no token; logits are cooled so that tokens vary."""
    model = named("tied, one kv head", torch.float64)
    model.model.norm.weight.mul_(0.25)
    return model


LENGTHS = (1, 130, 2, 63, 64, 65, 3, 17, 128, 1, 90, 5)
REQUESTS = [(some_ids(n, i), (7, i, 2)) for i, n in enumerate(LENGTHS)]
REQUESTS += [([4, 4], (7, 50 + j)) for j in range(6)]
STOP = (0, 1, 2, 3)
SETTINGS = [
    dict(temperature=0),
    dict(temperature=1.0, top_p=1.0),
    dict(temperature=0.8, top_p=0.7, top_k=9),
]


@lru_cache
def plain_answers(setting, max_new_tokens, stop_ids):
    return [
        plain_generate(exact(), *request, max_new_tokens, stop_ids=stop_ids, **SETTINGS[setting])
        for request in REQUESTS
    ]


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_cached_and_batched_equals_plain_at_any_number_of_slots(setting):
    want, settings = plain_answers(setting, 14, STOP), dict(max_new_tokens=14, **SETTINGS[setting])
    if setting:
        assert {why for _, why in want} == {"stop", "length"} and len(
            {len(ids) for ids, _ in want}
        ) > 4
    for slots in (1, 2, 3, 16, 64):
        got = collect(exact(), REQUESTS, stop_ids=set(STOP), slots=slots, **settings)
        assert got == want, slots
    backwards = collect(exact(), REQUESTS[::-1], stop_ids=STOP, slots=5, **settings)
    assert backwards[::-1] == want


@pytest.mark.parametrize("ahead", [8])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_a_look_every_few_steps_finds_the_same(monkeypatch, ahead, setting):
    """As on a GPU: rows go on after their stop, and undecided ones stay until the next look."""
    want, settings = plain_answers(setting, 14, STOP), dict(max_new_tokens=14, **SETTINGS[setting])
    decided, real = [], Decoder.decide

    def decider(self):
        decided.append(real(self))
        return decided[-1]

    class Ahead(Decoder):
        ahead = property(lambda self: ahead, lambda self, value: None)
        decide = decider
    monkeypatch.setattr("model.Decoder", Ahead)
    for slots in (1, 3, 64):
        assert collect(exact(), REQUESTS, stop_ids=set(STOP), slots=slots, **settings) == want
    assert (len(decided) > 5) == (SETTINGS[setting].get("top_p", 1) < 1)
    prompt = some_ids(61, 2)                             # across the ends of buckets
    long = plain_generate(exact(), prompt, (3, 1), 80, temperature=1.0, top_p=1.0)
    company = [(prompt, (3, 1)), (some_ids(9, 5), (3, 2))]
    assert collect(exact(), company, max_new_tokens=80, temperature=1.0, top_p=1.0)[0] == long


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_a_decode_step_waits_for_nothing(setting):
    """Nothing in it needs a value on the host, and its shapes are those of the step before."""
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 0} | SETTINGS[setting]
    decoder = Decoder(exact(), 3, 20, settings)
    decoder.start([0, 1, 2], [[1, 2, 3], [4], [5, 6]], [(0,), (1,), (2,)])
    seen = []
    for last in (3, 4):
        with torch.no_grad(), Watch() as watch:
            decoder.step(last)
        assert not watch.syncs
        seen.append(watch.ops)
    assert seen[0] != [] and seen[1] == seen[0][-len(seen[1]):]      # the first one grows the cache


class Recording:
    """What torch.cuda.CUDAGraph does, on a CPU: recording a step leaves no trace, replaying it reads
    and writes the tensors that it was recorded with."""
    now, replays = None, 0

    def record(self, decoder, last, step):
        state, kv = decoder.state.clone(), [t.clone() for t in decoder.cache.kv]
        self.tokens = step(decoder, last)
        self.decoder, self.last, self.logits = decoder, last, decoder.logits
        self.memory = [t.data_ptr() for t in decoder.cache.kv]
        for now, before in zip([decoder.state, *decoder.cache.kv], [state, *kv]):
            now.copy_(before)
        return self.tokens

    def replay(self):
        assert self.memory == [t.data_ptr() for t in self.decoder.cache.kv]      # it has not moved
        length = self.decoder.cache.length
        assert length(int(self.decoder.positions.max())) <= length(self.last)    # busy or idle
        self.tokens.copy_(STEP(self.decoder, self.last))
        self.logits.copy_(self.decoder.logits)
        self.decoder.tokens, self.decoder.logits = self.tokens, self.logits
        Recording.replays += 1


STEP = Decoder.step


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_replayed_steps_equal_plain_ones(monkeypatch, setting):
    """The first step of a length runs, the second is recorded, the others are replayed; a cache that
    has moved, other rows and other lengths are recorded anew.  tests/test_cuda.py has real graphs."""
    @contextmanager
    def recording(graph):
        Recording.now = graph
        yield
        Recording.now = None

    def step(self, last):
        taken.append(last)
        return Recording.now.record(self, last, STEP) if Recording.now else STEP(self, last)

    class OnCuda(Decoder):
        ahead = property(lambda self: 4, lambda self, value: None)
        records = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr("model.Decoder", OnCuda)
    monkeypatch.setattr(Decoder, "step", step)
    want, settings = plain_answers(setting, 14, STOP), dict(max_new_tokens=14, **SETTINGS[setting])
    for slots in (1, 3, 64):
        taken, Recording.replays = [], 0
        assert collect(exact(), REQUESTS, stop_ids=set(STOP), slots=slots, **settings) == want
        assert Recording.replays > 0.3 * len(taken)
    long = plain_generate(exact(), [5], (3, 1), 140, temperature=1.0)
    taken, Recording.replays = [], 0
    assert collect(exact(), [([5], (3, 1))], max_new_tokens=140, temperature=1.0) == [long]
    assert len(taken) == 2 * 3 and Recording.replays >= 139 - 3 - 4      # three lengths: run, recorded


def test_a_row_that_has_ended_stays_within_the_cache():
    """The longest row ends first: the others read fewer positions than it has, it writes there."""
    requests = [(some_ids(130, 1), (7, 0, 2))] + [(some_ids(3, i), (7, i, 2)) for i in (2, 3, 4)]
    free = [plain_generate(exact(), *request, 14, temperature=1.0)[0] for request in requests]
    stop = next(token for token in free[0][:6] if token not in sum(free[1:], []))
    got = collect(exact(), requests, max_new_tokens=14, temperature=1.0, stop_ids={stop})
    assert [ids for ids, _ in got] == [free[0][:free[0].index(stop) + 1], *free[1:]]


def test_rows_that_do_not_fit_wait(monkeypatch, capsys):
    """Memory for three rows of their longest: three run at a time, and it is said once."""
    want, settings = plain_answers(1, 14, STOP), dict(max_new_tokens=14, stop_ids=STOP)
    settings |= SETTINGS[1]
    row = 2 * exact().config.num_hidden_layers * exact().config.head_dim * (130 + 14) * 8
    monkeypatch.setattr("model.free_memory", lambda device: 3.9 * row / 0.8)
    for _ in range(2):
        shapes = batches(lambda: collect(exact(), REQUESTS, **settings) == want or pytest.fail())
        assert max(rows for rows, _ in shapes) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "3 of 64 rows fit" in said and "144 tokens" in said
    monkeypatch.setattr("model.free_memory", lambda device: 1)           # one goes on in any case
    assert collect(exact(), REQUESTS[:2], **settings) == want[:2]


def test_out_of_memory_halves_the_rows_and_loses_no_text(monkeypatch, capsys):
    want, grow, seen = plain_answers(1, 14, STOP), Cache.grow, []

    def small(self, length):
        if len(self.rows) * length > 4 * 192:            # rows x positions of this machine
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(self, length)
    monkeypatch.setattr(Cache, "grow", small)
    with torch.no_grad():
        for i, ids, why in stream(exact(), REQUESTS, max_new_tokens=14, slots=16, stop_ids=STOP,
                                  **SETTINGS[1]):
            assert (ids, why) == want[i]
            seen.append(i)
    assert sorted(seen) == list(range(len(REQUESTS)))    # each of them once
    said = capsys.readouterr().err
    assert "going on with 8 rows" in said and "with 4 rows" in said and "2 rows" not in said
    monkeypatch.setattr(Cache, "grow", lambda self, length: small(self, 10 ** 6))
    with pytest.raises(torch.OutOfMemoryError):          # not even one
        collect(exact(), REQUESTS, max_new_tokens=14)


def test_each_alone_equals_each_in_company():
    want = plain_answers(1, 14, STOP)
    for request, answer in zip(REQUESTS, want):
        assert collect(exact(), [request], max_new_tokens=14, stop_ids=STOP, **SETTINGS[1]) == [
            answer
        ]


def test_long_run_through_several_buckets():
    for prompt in (some_ids(1, 1), some_ids(61, 2)):
        want = plain_generate(exact(), prompt, (3, 1), 140, temperature=1.0)
        company = [(prompt, (3, 1)), (some_ids(9, 5), (3, 2))]
        assert collect(exact(), company, max_new_tokens=140, temperature=1.0)[0] == want
        assert len(want[0]) == 140 and len(set(want[0])) > 10


@pytest.mark.parametrize(
    "length", [Cache.BUCKET - 1, Cache.BUCKET, Cache.BUCKET + 1, 2 * Cache.BUCKET - 1]
)
def test_prompt_at_a_bucket_boundary(length):
    prompt = some_ids(length, length)
    assert collect(exact(), [(prompt, (1,))], max_new_tokens=4, temperature=1.0) == [
        plain_generate(exact(), prompt, (1,), 4, temperature=1.0)]


def test_cache_gives_the_logits_of_a_full_pass():
    """Rows of different lengths, in steps of different sizes, past a bucket's end."""
    model, rows = exact(), [some_ids(150, 1), some_ids(150, 2)]
    whole, cache = model(torch.tensor(rows)), Cache(model, 2)
    at = [0, 0]
    for steps in ((3, 3), (1, 1), (60, 60), (1, 1), (64, 64), (2, 2)):
        positions = torch.tensor([list(range(a, a + n)) for a, n in zip(at, steps)])
        cache.seek(positions, int(positions.max()))
        ids = torch.tensor([row[a:a + n] for row, a, n in zip(rows, at, steps)])
        got = model.head(model.run(ids, cache=cache))
        assert torch.allclose(
            got, torch.stack([whole[i, p] for i, p in enumerate(positions)]), atol=1e-6
        )
        assert (
            cache.used % Cache.BUCKET == 0
            and cache.used - Cache.BUCKET <= positions.max() < cache.used
        )
        at = [a + n for a, n in zip(at, steps)]


def test_generate_is_by_prompt_and_sample():
    prompts, settings = [[5, 6, 7], [9], some_ids(70, 3)], dict(
        temperature=1.0, top_p=0.9, stop_ids=[2]
    )
    got = generate(exact(), prompts, 6, samples=4, seed=11, **settings)
    assert [len(samples) for samples in got] == [4, 4, 4]
    for i, prompt in enumerate(prompts):
        for j in range(4):
            assert got[i][j] == plain_generate(exact(), prompt, (11, i, j), 6, **settings)[0]
    assert got == generate(exact(), prompts, 6, samples=4, seed=11, slots=1, **settings)
    assert got != generate(exact(), prompts, 6, samples=4, seed=12, **settings)
    assert generate(exact(), [], 6) == [] and generate(exact(), [[1]], 6, samples=0) == [[]]
    fewer = generate(exact(), prompts, 6, samples=2, seed=11, **settings)
    assert fewer == [samples[:2] for samples in got]
    shorter = generate(exact(), prompts, 3, samples=4, seed=11, **settings)
    assert shorter == [[ids[:3] for ids in samples] for samples in got]


def test_samples_differ_from_their_first_token_on():
    same = [[4, 4]] * 3  # equal prompts are still different problems
    got = generate(exact(), same, 3, samples=16, temperature=1.0, top_p=1.0)
    first = [[ids[0] for ids in samples] for samples in got]
    assert all(len(set(row)) >= 6 for row in first) and first[0] != first[1] != first[2]
    p = torch.softmax(exact()(torch.tensor([[4, 4]]))[0, -1], -1)
    many = generate(exact(), [[4, 4]], 1, samples=3000, temperature=1.0, top_p=1.0, slots=3000)
    counts = torch.bincount(torch.tensor([ids[0] for ids in many[0]]), minlength=37)
    large = 3000 * p > 5
    z = (counts - 3000 * p) / (3000 * p * (1 - p)).sqrt()
    assert z[large].abs().max() < 4.5
    greedy = generate(exact(), [[4, 4]], 5, samples=4, temperature=0)[0]
    assert greedy == [greedy[0]] * 4


def test_stop_token_is_returned_and_ends_the_text():
    request, exactly = ([5, 6], (0, 0, 0)), dict(temperature=1.0)
    free, _ = plain_generate(exact(), *request, 12, **exactly)
    for token in set(free):
        n = free.index(token) + 1
        got = collect(exact(), [request], max_new_tokens=12, stop_ids={token, 999}, **exactly)
        assert got == [(free[:n], "stop")]
        # the last token that is allowed may be the one that stops
        assert got == collect(exact(), [request], max_new_tokens=n, stop_ids={token}, **exactly)
        if n > 1:
            short = collect(exact(), [request], max_new_tokens=n - 1, stop_ids={token}, **exactly)
            assert short == [(free[:n - 1], "length")]


def test_stream_yields_each_as_it_ends():
    with torch.no_grad():
        seen = list(
            stream(exact(), REQUESTS, max_new_tokens=14, slots=4, stop_ids=STOP, **SETTINGS[1])
        )
    want = plain_answers(1, 14, STOP)
    assert sorted(i for i, _, _ in seen) == list(range(len(REQUESTS))) != [i for i, _, _ in seen]
    assert all((ids, why) == want[i] for i, ids, why in seen)


def batches(call):
    """What passes through the embedding while `call` runs: the shape of each batch."""
    shapes = []
    hook = exact().model.embed_tokens.register_forward_hook(
        lambda m, x, y: shapes.append(tuple(x[0].shape))
    )
    try:
        call()
    finally:
        hook.remove()
    return shapes


def test_prompt_is_prefilled_once_for_its_samples():
    shapes = batches(lambda: generate(exact(), [[5, 6, 7], [9]], 4, samples=8, temperature=1.0))
    assert shapes == [(2, 3)] + [(16, 1)] * 3


def test_slots_are_bounded_refilled_and_compacted():
    settings = dict(max_new_tokens=60, stop_ids=STOP, temperature=1.0)
    lengths = [len(ids) for ids, _ in collect(exact(), REQUESTS, **settings)]
    shapes = batches(lambda: collect(exact(), REQUESTS, slots=4, **settings))
    assert max(rows for rows, _ in shapes) == 4
    # slots refilled at once: at most the even share plus the longest; groups of four make it 86
    busy = sum(shape == (4, 1) for shape in shapes)
    assert busy <= sum(n - 1 for n in lengths) / 4 + max(lengths)
    shapes = batches(lambda: collect(exact(), REQUESTS, slots=64, **settings))
    steps = [rows for rows, T in shapes[1:]]
    alive = [sum(n > t + 1 for n in lengths) for t in range(max(lengths) - 1)]
    assert len(steps) == len(alive) and steps == sorted(steps, reverse=True)
    assert (
        all(a <= rows <= max(2 * a, 1) for rows, a in zip(steps, alive))
        and steps[-1] < steps[0] // 2
    )


@pytest.mark.parametrize("settings", [
    dict(max_new_tokens=0), dict(temperature=-0.1), dict(temperature=float("nan")),
    dict(temperature=float("inf")), dict(top_p=0), dict(top_p=1.01), dict(top_p=float("nan")),
    dict(top_k=-1)])
def test_sampling_settings_out_of_range(settings):
    good = dict(max_new_tokens=3, temperature=1.0, top_p=0.9, top_k=0)
    check_sampling(exact(), [([1], (0,))], slots=1, **good)
    check_refused(lambda: collect(exact(), [([1], (0,))], **(good | settings)),
                  *(f"{name}={value}" for name, value in settings.items()), "out of range")


def test_requests_that_cannot_be_run():
    check_refused(lambda: generate(exact(), [[1], []], 3), "prompt 1", "empty")
    check_refused(lambda: generate(exact(), [[1, 37]], 3), "prompt 0", "0 .. 36")
    check_refused(lambda: generate(exact(), [[1], [2, -1]], 3), "prompt 1", "0 .. 36")
    check_refused(lambda: generate(exact(), [[1]], 3, slots=0), "slots")
    check_refused(lambda: generate(exact(), [[1]], 3, seed=-1), "negative")


# ------------------------------------------------------------------------------------------------
# A real trained model
# ------------------------------------------------------------------------------------------------

def test_stories_greedy_text(shared):
    golden = json.loads((shared / "stories260k" / "golden_greedy.json").read_text())
    ids, prompt = golden["greedy_ids"], golden["prompt_ids"]
    assert prompt == [1] and len(ids) == 201
    model = load_model(str(shared / "stories260k"))
    assert prompt + generate(model, [prompt], 200, temperature=0)[0][0] == ids
    # in company: other lengths, and continuations of the same story, more than there are slots
    prompts = [
        some_ids(30, 1, 512),
        ids[:64],
        prompt,
        some_ids(3, 2, 512),
        ids[:150],
        prompt,
        ids[:7],
    ]
    mixed = generate(model, prompts, 200, temperature=0, slots=4)
    assert prompt + mixed[2][0] == ids == prompt + mixed[5][0]
    for i, n in ((1, 64), (4, 150), (6, 7)):
        assert ids[:n] + mixed[i][0][:201 - n] == ids
    tokenizer = load_tokenizer(str(shared / "stories260k"))
    assert (
        tokenizer.decode(ids)
        .strip()
        .startswith("Once upon a time, there was a little girl named Lily")
    )
    assert tokenizer.eos_ids == {2}


def test_stories_sampled_text_does_not_depend_on_slots(shared):
    model = load_model(str(shared / "stories260k"))
    want = generate(model, [[1], [1, 403]], 20, samples=4, temperature=1.0, seed=5, slots=8)
    assert len({tuple(ids) for samples in want for ids in samples}) == 8
    for slots in (1, 3):
        assert (
            generate(model, [[1], [1, 403]], 20, samples=4, temperature=1.0, seed=5, slots=slots)
            == want
        )
