"""
Tests of data/formats.py: SAEs of SAELens, dictionary_learning and OpenAI.

    python -m pytest tests/test_formats.py

The numbers under "golden" were computed once by sae-lens 6.54, dictionary-learning 0.1 and
OpenAI's model.py; where the first two are installed, the last section compares with them directly.
"""
import dataclasses
import importlib
import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae as S
import train
from data import formats
from data.formats import LAYOUTS, load_any, save_saelens
from sae import load_sae, save_sae
from tests.conftest import ROOT
from tests.test_sae_files import D, F, K, check_interrupted_saves, data, edit, make, same

# ---- golden codes --------------------------------------------------------------------------------
# name -> layout, configuration, tensors with the dimensions they have in the file (D 4, F 6).

LENS = {"d_in": 4, "d_sae": 6, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "model_name": "some/model", "context_size": 128,
                     "hook_name": "blocks.5.hook_resid_post"}}
OLD = {"d_in": 4, "d_sae": 6, "dtype": "torch.float32", "device": "cuda", "hook_point_layer": 8,
       "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small",
       "normalize_activations": False}
BARE = "W_enc:DF b_enc:F W_dec:FD b_dec:D"
LINEAR = "encoder.weight:FD encoder.bias:F decoder.weight:DF"
OPENAI = ("pre_bias:D latent_bias:F encoder.weight:FD decoder.weight:DF stats_last_nonzero:F")


def lens(architecture, **more):
    return LENS | {"architecture": architecture, **more}


def trainer(kind, **more):
    return {"trainer": {"dict_class": kind, "activation_dim": 4, "dict_size": 6, "layer": 7,
                        "lm_name": "some/model", "submodule_name": "mlp_out_layer_7", **more},
            "buffer": {"ctx_len": 128}}


SAELENS = {
    "standard": (lens("standard", apply_b_dec_to_input=False), BARE),
    "standard-ln": (lens("standard", normalize_activations="layer_norm"), BARE),
    "standard-scaled": (lens("standard", normalize_activations="expected_average_only_in"), BARE),
    "topk": (lens("topk", k=2, rescale_acts_by_decoder_norm=True), BARE),
    "jumprelu": (lens("jumprelu", apply_b_dec_to_input=False), BARE + " threshold:F"),
    "gated": (lens("gated", apply_b_dec_to_input=False),
              "W_enc:DF b_gate:F b_mag:F r_mag:F W_dec:FD b_dec:D"),
    "abstopk": (lens("abstopk", k=2, rescale_acts_by_decoder_norm=True), BARE),
    "batchtopk": (lens("batchtopk", k=2.0, rescale_acts_by_decoder_norm=True),
                  BARE + " topk_threshold:"),
    "matryoshka": (lens("matryoshka_batchtopk", k=2.0, matryoshka_widths=[2, 6]),
                   BARE + " topk_threshold:"),
    "jumprelu-log": (lens("jumprelu"), BARE + " log_threshold:F"),
    "old": (OLD, BARE + " scaling_factor:F"),
    "old-topk": (OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
                        "architecture": "standard"}, BARE)}
LEARNING = {
    "AutoEncoder": (trainer("AutoEncoder"), LINEAR + " bias:D"),
    "AutoEncoderNew": (trainer("AutoEncoderNew"), LINEAR + " decoder.bias:D"),
    "GatedAutoEncoder": (trainer("GatedAutoEncoder"), "decoder_bias:D encoder.weight:FD r_mag:F "
                         "gate_bias:F mag_bias:F decoder.weight:DF"),
    "AutoEncoderTopK": (trainer("AutoEncoderTopK", k=2), "k: threshold: b_dec:D " + LINEAR),
    "BatchTopKSAE": (trainer("BatchTopKSAE", k=2), "k: threshold: b_dec:D " + LINEAR),
    "JumpReluAutoEncoder": (trainer("JumpReluAutoEncoder"), BARE + " threshold:F"),
    "MatryoshkaBatchTopKSAE": (trainer("MatryoshkaBatchTopKSAE", k=2, group_sizes=[2, 4]),
                               "k: threshold: group_sizes: " + BARE),
    "openai-relu": ({"shape": [6, 4], "activation": "ReLU", "activation_state_dict": {}}, OPENAI),
    "openai-topk": ({"shape": [6, 4], "activation": "TopK",
                     "activation_state_dict": {"k": 2, "postact_fn": "ReLU"}},
                    OPENAI + " latents_activation_frequency:F latents_mean_square:F")}
FOREIGN = {name: ("saelens", *case) for name, case in SAELENS.items()}
FOREIGN |= {name: ("dictionary_learning", *case) for name, case in LEARNING.items()}


def grid(seed, dims):
    """Small multiples of 1/64, which look random and are the same everywhere."""
    size = [{"D": 4, "F": 6, "N": 2}[d] for d in dims]
    i = torch.arange(math.prod(size), dtype=torch.float64) + 7 * seed
    return (((7 * i * i + 31 * i + 53 * seed) % 193 - 96) / 64).float().reshape(size)


def foreign(name, folder):
    """Writes the case as its own package would, but for the pickle; returns the tensors."""
    layout, cfg, spec = FOREIGN[name]
    parts = [part.split(":") for part in spec.split()]
    tensors = {key: grid(i, dims) for i, (key, dims) in enumerate(parts)}
    fixed = {"k": torch.tensor(2, dtype=torch.int32), "group_sizes": torch.tensor([2, 4]),
             "scaling_factor": torch.ones(6),
             "topk_threshold": torch.tensor(1.1875, dtype=torch.float64),
             "stats_last_nonzero": torch.zeros(6, dtype=torch.int64)}
    fixed |= {} if "threshold:F" in spec else {"threshold": torch.tensor(1.1875)}
    tensors |= {key: value for key, value in fixed.items() if key in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAYOUTS[layout][0]).write_text(json.dumps(cfg))
    if "scaled" in name:
        (folder / "activation_scaler.json").write_text(
            '{"scaling_factor": 0.375, "has_whitening": false}')
    save_file(tensors, folder / LAYOUTS[layout][1])
    return tensors


GOLDEN_CODES = {      # name -> z (2,6), x_hat (2,4), for x = grid(20, "ND")
    "standard": ([0, 0, 0, 1.8716, 1.3809, 0, 0.2441, 0.0161, 1.5447, 0.0708, 0, 3.0054],
        [-4.3829, -0.1897, 1.9181, 0.792, 3.9536, 1.57, -1.8551, -3.9451]),
    "standard-ln": ([0, 0, 0, 3.0833, 0.9581, 1.8966, 0.1471, 0, 1.1026, 1.3185, 0, 4.9516],
        [-2.3727, -0.1891, 0.4327, -0.3756, 5.6519, 1.83, -2.7509, -5.3344]),
    "standard-scaled": ([0, 0, 0, 1.9641, 0.2197, 1.93, 0, 0, 0.5021, 1.2888, 0, 3.1541],
        [-0.4936, 2.0396, -0.4858, -1.7951, 6.6461, 3.9177, -3.3844, -7.2187]),
    "topk": ([0, 0, 0, 3.5022, 0, 3.4207, 0, 0, 0, 1.4771, 0, 9.2831],
        [-0.7764, 0.2395, -0.4436, 0.19, 4.9378, 2.1881, -1.9404, -4.4321]),
    "jumprelu": ([0, 0, 0, 1.8716, 1.3809, 0, 0.2441, 0.0161, 1.5447, 0, 0, 3.0054],
        [-4.3829, -0.1897, 1.9181, 0.792, 4.0078, 1.6065, -1.8518, -3.9904]),
    "gated": ([0, 0, 0, 3.0872, 0.7124, 0, 1.7168, 0, 1.6997, 0.8461, 0, 4.0258],
        [0.067, 1.0215, 3.8932, -2.3624, -2.0055, -6.2535, 6.6863, 3.9505]),
    "abstopk": ([-5.4621, 0, 0, 3.5022, 0, 0, 0, 0, 0, 0, -6.0771, 9.2831],
        [-6.8903, 2.9561, 1.2956, -0.1, 10.7276, 3.9851, -5.1362, -3.7975]),
    "batchtopk": ([0, 0, 0, 3.5022, 2.2569, 3.4207, 0, 0, 1.2895, 1.4771, 0, 9.2831],
        [-2.5532, -0.1764, 0.7661, -0.3582, 5.4292, 1.9515, -2.6502, -5.3603]),
    "matryoshka": ([0, 0, 0, 3.1143, 1.2097, 1.9048, 0, 0, 0, 1.3135, 0, 5.1692],
        [-2.5532, -0.1764, 0.7661, -0.3582, 4.9378, 2.1881, -1.9404, -4.4321]),
    "jumprelu-log": ([0, 0, 0, 0, 1.2097, 0, 0.2793, 0, 0, 0, 0, 5.1692],
        [-2.6986, 0.8342, 1.8347, -0.3294, 6.2882, 2.5468, -1.9574, -5.0509]),
    "old": ([0, 0, 0, 3.1143, 1.2097, 1.9048, 0.2793, 0, 1.1648, 1.3135, 0, 5.1692],
        [-2.5532, -0.1764, 0.7661, -0.3582, 5.774, 1.6329, -2.7287, -5.1377]),
    "old-topk": ([0, 0, 0, 3.1143, 0, 1.9048, 0, 0, 0, 1.3135, 0, 5.1692],
        [-0.7764, 0.2395, -0.4436, 0.19, 4.9378, 2.1881, -1.9404, -4.4321]),
    "AutoEncoder": ([0, 0, 4.8165, 0, 9.672, 1.0354, 0, 2.1023, 3.2021, 0.9259, 2.2507, 7.2546],
        [-6.1539, -0.9741, -7.2454, 1.5155, -0.3926, -1.1134, -2.933, -2.774]),
    "AutoEncoderNew": ([0, 0, 1.9304, 0, 3.0613, 0, 0, 2.5457, 0.7954, 0.5454, 0, 3.2268],
        [-4.2869, 0.1989, -3.9617, 1.2998, -1.6987, 2.1253, -1.4847, -3.1364]),
    "GatedAutoEncoder": ([0, 0, 0.2452, 2.451, 0, 0, 0, 0, 1.6354, 0, 0, 0],
        [1.4529, 0.166, -3.3223, -1.6207, 0.8254, -1.6729, -0.937, 3.0329]),
    "AutoEncoderTopK": ([0, 0, 2.3865, 0, 0, 4.1394, 0, 0, 0, 0, 0, 0.2998],
        [8.767, -2.1299, 2.2396, 6.377, 1.5342, -1.1313, -0.0096, 0.9796]),
    "BatchTopKSAE": ([0, 0, 2.3865, 0, 0, 4.1394, 0, 0, 0, 0, 0, 0],
        [8.767, -2.1299, 2.2396, 6.377, 1.2344, -1.1406, -0.2812, 0.7969]),
    "JumpReluAutoEncoder": ([0, 0, 0, 1.8716, 1.3809, 0, 0.2441, 0.0161, 1.5447, 0, 0, 3.0054],
        [-4.3829, -0.1897, 1.9181, 0.792, 4.0078, 1.6065, -1.8518, -3.9904]),
    "MatryoshkaBatchTopKSAE": ([0, 1.2996, 0, 2.0205, 0, 3.9302, 0, 0, 0, 1.3984, 1.313, 1.9214],
        [3.0804, -2.0312, 0.4208, -2.257, 1.7641, -0.0687, 0.9077, 0.1006]),
    "openai-relu": ([0.4158, 0, 2.8735, 0, 0, 5.1492, 1.5798, 0.4624, 1.9319, 0, 0, 3.2026],
        [0.2345, -2.6705, 0.2825, -6.4347, -0.9708, -1.017, 0.4033, -4.9735]),
    "openai-topk": ([0, 0, 2.6978, 0, 0, 5.0714, 0, 0, 1.8896, 0, 0, 3.1913],
        [0.4152, -3.2019, -0.1383, -6.3392, -0.1477, -2.0779, 0.1592, -3.7507]),
}

@pytest.mark.parametrize("name", FOREIGN)
def test_golden_codes_of_what_others_wrote(tmp_path, name):
    foreign(name, tmp_path)
    model, x, (z, x_hat) = load_any(tmp_path), grid(20, "ND"), GOLDEN_CODES[name]
    assert torch.allclose(model.encode(x).flatten(), torch.tensor(z), atol=1e-4)
    assert torch.allclose(model(x).flatten(), torch.tensor(x_hat), atol=1e-4)
    save_sae(model, tmp_path / "ours")      # and as ours it is the same SAE
    for load in (load_sae, load_any):
        ours = load(tmp_path / "ours")
        assert same(ours, model, x) and ours.hyper == model.hyper and ours.meta == model.meta
    save_saelens(model, tmp_path / "lens")
    assert same(load_any(tmp_path / "lens"), model, x, atol=1e-5)


def test_where_the_sae_belongs_is_read(tmp_path):
    for name in FOREIGN:
        foreign(name, tmp_path / name)
    meta = {name: load_any(tmp_path / name).meta for name in FOREIGN}
    here = {"layer": 5, "site": "resid", "model": "some/model"}
    assert meta["gated"] == meta["topk"] == here | {"context_size": 128}
    assert meta["old"] == {"layer": 7, "site": "resid", "model": "gpt2-small"}      # enters 8
    assert meta["BatchTopKSAE"] == here | {"layer": 7, "site": "mlp"} and meta["openai-topk"] == {}
    for hook, want in [
            ("blocks.0.hook_mlp_out", {"layer": 0, "site": "mlp"}), (None, {}),
            ("model.layers.3", {"layer": 3, "site": "resid"}),
            ("blocks.2.attn.hook_z", {"layer": 2, "site": "attn.hook_z"}),
            ("blocks.0.hook_resid_pre", {"layer": 0, "site": "hook_resid_pre"}),
            ("hook_embed", {"site": "hook_embed"}), ("model.norm", {"site": "model.norm"}),
            ("", {})]:
        edit(tmp_path / "gated" / "cfg.json", metadata={"hook_name": hook})
        assert load_any(tmp_path / "gated").meta == want
    edit(tmp_path / "old" / "cfg.json", hook_point="transformer.h.8.mlp")
    assert load_any(tmp_path / "old").meta["site"] == "mlp"
    for name, want in [
            ("resid_post_layer_7", {"layer": 7, "site": "resid"}), (None, {"layer": 7}),
            ("resid_pre_layer_8", {"layer": 7, "site": "resid"}),
            ("model.layers.7.mlp", {"layer": 7, "site": "mlp"}),
            ("attention_out_layer_7", {"layer": 7, "site": "attention_out"}),
            ("router_layer_7", {"layer": 7, "site": "router_layer_7"})]:
        cfg = trainer("BatchTopKSAE", k=2, submodule_name=name)
        edit(tmp_path / "BatchTopKSAE" / "config.json", **cfg)
        meta = load_any(tmp_path / "BatchTopKSAE").meta
        assert meta == want | {"model": "some/model"}, name
    cfg |= {"buffer": {"io": "in"}}      # not what the module computes: what enters it
    edit(tmp_path / "BatchTopKSAE" / "config.json", **cfg)
    assert load_any(tmp_path / "BatchTopKSAE").meta["site"] == "router_layer_7 (in)"
    edit(tmp_path / "BatchTopKSAE" / "config.json", buffer=3)
    with pytest.raises(ValueError, match="config.json: 'buffer' should be an object, it is 3"):
        load_any(tmp_path / "BatchTopKSAE")
    edit(tmp_path / "BatchTopKSAE" / "config.json",
         **trainer("BatchTopKSAE", k=2, submodule_name="mlp_out_layer_1"))
    with pytest.raises(ValueError, match="'layer' is 7, but 'submodule_name' is 'mlp_out_layer_1'"):
        load_any(tmp_path / "BatchTopKSAE")


def named(tmp_path, layout, name):
    """The directory of an SAE whose place its library calls `name`."""
    folder = tmp_path / (name if layout == "sparsify" else "sae")
    if layout == "saelens":
        foreign("topk", folder)
        edit(folder / "cfg.json", metadata={"hook_name": name})
    elif layout == "dictionary_learning":
        foreign("BatchTopKSAE", folder)
        edit(folder / "config.json", **trainer("BatchTopKSAE", k=2, layer=1, submodule_name=name))
    else:
        save_sae(make(), folder)
    return folder


@pytest.mark.parametrize("layout, name", [
    ("saelens", "model.layers.3"), ("saelens", "transformer.h.1.attn"), ("saelens", "ln_final"),
    ("saelens", "blocks.0.hook_resid_post"), ("dictionary_learning", "attention_out_layer_1"),
    ("dictionary_learning", "mlp_out_layer_1"), ("sparsify", "layers.1.self_attn"),
    ("sparsify", "h.3")])
def test_an_sae_of_another_place_is_refused_whatever_its_library_calls_it(tmp_path, layout, name):
    sae = load_any(named(tmp_path, layout, name))
    with pytest.raises(ValueError, match="the SAE was trained at (site|layer) .*, not at ") as err:
        S.check_site(sae, 1, "resid")
    assert "--other-site" in str(err.value) and "pass --site self_attn" not in str(err.value)
    S.check_site(sae, 1, "resid", True)


@pytest.mark.parametrize("layout, name", [
    ("saelens", "model.layers.1"), ("saelens", "blocks.2.hook_resid_pre"),
    ("saelens", "transformer.h.1"), ("saelens", "model.language_model.layers.1"),
    ("dictionary_learning", "resid_post_layer_1"), ("sparsify", "gpt_neox.layers.1"),
    ("sparsify", "layers.1")])
def test_an_sae_of_this_place_is_used_without_a_word(tmp_path, capsys, layout, name):
    sae = load_any(named(tmp_path, layout, name))
    S.check_site(sae, 1, "resid")
    assert capsys.readouterr().err == ""


def test_an_sae_whose_place_nobody_states_is_used_and_that_is_said(tmp_path, capsys):
    foreign("openai-topk", tmp_path / "nothing")
    foreign("BatchTopKSAE", tmp_path / "layer")
    edit(tmp_path / "layer" / "config.json",
         **trainer("BatchTopKSAE", k=2, layer=1, submodule_name=None))
    model = make()
    model.meta = {"site": None, "layer": None}      # null is absent
    save_sae(model, tmp_path / "null")
    for name, unknown in (("nothing", "site and layer"), ("layer", "site"),
                          ("null", "site and layer")):
        sae = load_any(tmp_path / name)
        S.check_site(sae, 1, "mlp")
        S.introduce(sae, "an/other")
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "it is used in an/other, as asked" in said
        assert all(f"{place} unknown" in said for place in unknown.split(" and "))


def test_the_name_of_the_folder_says_what_the_file_does_not(tmp_path):
    foreign("openai-topk", tmp_path / "layers.4.mlp")
    foreign("gated", tmp_path / "layers.9")
    save_sae(make(), tmp_path / "layers.2")
    for name, want in [("layers.4.mlp", {"layer": 4, "site": "mlp"}),
                       ("layers.2", {"layer": 2, "site": "resid"}),
                       ("layers.9", {"layer": 5, "site": "resid", "model": "some/model",
                                     "context_size": 128})]:      # the file wins
        for sae in (load_any(tmp_path / name), load_any(f"{tmp_path}#{name}")):
            assert sae.meta == want


def test_what_is_folded_is_folded_in_full_precision(tmp_path):
    for name in ("JumpReluAutoEncoder", "topk", "MatryoshkaBatchTopKSAE"):
        tensors = foreign(name, tmp_path / name)
        file = next((tmp_path / name).glob("*.safetensors"))
        half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(half, file)
        model, x, z = load_any(tmp_path / name), grid(20, "ND"), GOLDEN_CODES[name][0]
        assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
        codes = model.encode(x)
        # 0.03 is what rounding the weights of the file costs
        assert torch.allclose(codes.flatten(), torch.tensor(z), atol=0.03)
        rounded = {key: t.float() if t.is_floating_point() else t for key, t in half.items()}
        save_file(rounded, file)      # nothing more is rounded after that
        assert torch.equal(load_any(tmp_path / name).encode(x), codes)


def test_standardised_tokens_go_back_as_they_do_there(tmp_path):
    for name in ("standard-ln", "openai-topk"):
        foreign(name, tmp_path / name)
        model, x = load_any(tmp_path / name), grid(20, "ND") / 10**4      # where their 1e-5 shows
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        want = (model.encode(x) @ model.W_dec + model.b_dec) * std + mean
        assert torch.allclose(model(x), want, atol=1e-9)


def test_checkpoints_of_saelens_training_go_on_as_they_were(tmp_path):
    for name in ("batchtopk", "matryoshka", "jumprelu-log"):
        foreign(name, tmp_path / name)
    batch, nested, log = (load_any(tmp_path / name) for name in
                          ("batchtopk", "matryoshka", "jumprelu-log"))
    assert (batch.variant, batch.k, float(batch.threshold)) == ("batchtopk", 2, 1.1875)
    assert (nested.variant, nested.k, nested.widths()) == ("matryoshka", 2, [2, 6])
    for model in (batch, nested, log):      # one fp64 number makes no fp64 SAE
        assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert torch.equal(log.threshold, grid(4, "F").exp())
    weights = tmp_path / "jumprelu-log" / "sae_weights.safetensors"
    save_file(load_file(weights) | {"log_threshold": torch.full((6,), 100.0)}, weights)
    with pytest.raises(ValueError, match="sae_weights.safetensors: 'log_threshold' is too large"):
        load_any(tmp_path / "jumprelu-log")
    edit(tmp_path / "matryoshka" / "cfg.json", matryoshka_widths=[2, 3])
    assert load_any(tmp_path / "matryoshka").widths() == [2, 3, 6]      # they add the last


def test_whole_numbers_stand_for_real_ones_and_the_other_way(tmp_path):
    foreign("standard-scaled", tmp_path / "scaled")
    (tmp_path / "scaled" / "activation_scaler.json").write_text('{"scaling_factor": 2}')
    model = load_any(tmp_path / "scaled")
    assert model.input_scale == 2 and model.input_scale.dtype == torch.float32
    (tmp_path / "scaled" / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    assert same(load_any(tmp_path / "scaled"), model, grid(20, "ND"))
    foreign("topk", tmp_path / "topk")
    edit(tmp_path / "topk" / "cfg.json", k=2.0, metadata={"sink_norm": 12})
    model = load_any(tmp_path / "topk")
    assert type(model.k) is int and model.k == 2 and model.meta == {"sink_norm": 12}


def test_older_files_of_dictionary_learning(tmp_path):
    tensors = foreign("AutoEncoderTopK", tmp_path)
    want = load_any(tmp_path)
    older = {key: tensors[key] for key in tensors if key not in ("k", "threshold")}
    save_file(older, tmp_path / "ae.safetensors")
    assert same(load_any(tmp_path), want, grid(20, "ND"))


def test_a_threshold_below_zero_is_none(tmp_path):
    tensors = foreign("BatchTopKSAE", tmp_path)
    untrained = tensors | {"threshold": torch.tensor(-1.0)}
    save_file(untrained, tmp_path / "ae.safetensors")
    z = load_any(tmp_path).encode(grid(20, "ND"))
    assert (z >= 0).all() and z.sum() > sum(GOLDEN_CODES["BatchTopKSAE"][0]) + 1


@pytest.mark.parametrize("stage", ["sae", "tune"])
def test_the_commands_ask_where_an_sae_of_another_library_belongs(stage, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "one two three four five six"}\n' * 60)
    width, source = 128, f"{ROOT}/data/tiny/distill"
    save_saelens(S.build("topk", width, 32, k=4), tmp_path / "lens")
    flags = {"sae": ["--source", source, "--init", "pretrained", "--sae-from"],
             "tune": ["--target", source, "--sae"]}
    argv = ["--stage", stage, "--preset", "tiny", "--data", str(tmp_path / "text.jsonl"), "--seq-len", "32",
            "--batch", "1", *flags[stage], str(tmp_path / "lens")]
    argv += ["--steps", "1"] if stage == "tune" else []
    for i, (hook, refused) in enumerate([
            ("model.layers.3", "layer 3, not at 1: pass --layer 3"),
            ("model.layers.1.mlp", "site mlp, not at resid: pass --site mlp"),
            ("model.layers.1.self_attn", "site self_attn, not at resid: --other-site allows"),
            ("model.layers.1", None), (None, None)]):
        edit(tmp_path / "lens" / "cfg.json", metadata={"hook_name": hook})
        run = [*argv, "--out", str(tmp_path / str(i))]
        if refused:
            with pytest.raises(ValueError, match=f"the SAE was trained at {refused}"):
                train.main(run)
        else:
            train.main(run)
        said = "layer unknown, site unknown" in capsys.readouterr().err
        assert said == (hook is None)


# ---- what we write for SAELens -------------------------------------------------------------------

EXPORTED = {"relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk",
            "gsae": "topk", "vsae": "topk", "abstopk": "abstopk", "batchtopk": "jumprelu",
            "matryoshka": "jumprelu", "mutual_choice": "jumprelu", "feature_choice": "jumprelu"}


@pytest.mark.parametrize("normalize", ["none", "scale", "token"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_saelens_files_hold_the_same_sae(tmp_path, variant, normalize):
    model, x = make(variant=variant, normalize=normalize), data()
    model.meta = {"site": "mlp", "layer": 3, "model": "owner/name", "sink_norm": 12.5}
    save_saelens(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["cfg.json", "sae_weights.safetensors"]
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert cfg["architecture"] == EXPORTED[variant] and (cfg["d_in"], cfg["d_sae"]) == (D, F)
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_mlp_out"
    assert cfg["metadata"]["model_name"] == "owner/name"
    assert cfg["normalize_activations"] == ("layer_norm" if normalize == "token" else "none")
    want = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    own = {"gated": ["b_gate", "b_mag", "r_mag"], "jumprelu": ["b_enc", "threshold"]}
    want |= dict.fromkeys(own.get(cfg["architecture"], ["b_enc"]), (F,))
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    loaded = load_any(tmp_path)
    assert same(loaded, model, x, atol=1e-5)
    assert loaded.meta == model.meta | {"training_architecture": variant}
    save_saelens(loaded, tmp_path)
    assert load_any(tmp_path).meta == loaded.meta      # it remembers what it was trained as
    for half in ({"layer": 3}, {"site": "mlp"}):      # half a place
        loaded.meta = half | {"sae_lens_version": "4.0"}      # and what would make it an old file
        save_saelens(loaded, tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        assert cfg["metadata"]["sae_lens_version"] == "6.0.0"
        assert load_any(tmp_path).meta == half | {"training_architecture": loaded.variant}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["none", "scale"])
def test_saelens_files_hold_at_least_fp32(tmp_path, normalize, dtype):
    model, x = make(variant="jumprelu", normalize=normalize, dtype=dtype), data().double()
    save_saelens(model, tmp_path)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "sae_weights.safetensors").values()} == {wide}
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["dtype"] == str(wide).removeprefix("torch.")
    loaded = load_any(tmp_path)
    assert loaded.W_enc.dtype == wide
    assert same(loaded.double(), model.double(), x, atol=1e-5)


def test_what_saelens_cannot_express_is_refused_and_not_written(tmp_path):
    refused = [dict(variant=variant) for variant in S.VARIANTS if variant not in EXPORTED]
    assert len(refused) == 3
    for hyper in [*refused, dict(normalize="unit"), dict(variant="relu", normalize="unit")]:
        model = make(**hyper)
        with pytest.raises(ValueError, match=f"SAELens cannot express {model.variant} with norm"):
            save_saelens(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_never_loads_mixed(tmp_path, monkeypatch):
    check_interrupted_saves(tmp_path / "sae", monkeypatch, save_saelens, load_any)


# ---- which layout, and pickles -------------------------------------------------------------------


def test_two_layouts_in_one_directory(tmp_path):
    save_sae(make(), tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(ValueError, match="its cfg.json belongs to other weights"):
        save_saelens(make(seed=1), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == kept
    save_file({"a": torch.ones(1)}, tmp_path / "sae_weights.safetensors")
    ours = r"sparsify \(cfg.json, sae.safetensors\)"
    theirs = r"saelens \(cfg.json, sae_weights.safetensors\)"
    with pytest.raises(ValueError, match=f"{ours} and {theirs}: keep those of one"):
        load_any(tmp_path)
    foreign("AutoEncoder", tmp_path)
    with pytest.raises(ValueError, match="sparsify .* saelens .* dictionary_learning .*: keep"):
        load_any(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "openai-topk"])
def test_a_pickle_is_never_loaded_and_the_message_says_how_to_convert_it(tmp_path, name):
    folder = tmp_path / "it's here"
    tensors = foreign(name, folder)
    want, x = load_any(folder), grid(20, "ND")
    (folder / "ae.safetensors").unlink()
    state, file = dict(tensors), "ae.pt"
    if "openai" in name:      # its pickle says the rest, and has any name
        state |= {key: value for key, value in FOREIGN[name][1].items() if key != "shape"}
        (folder / "config.json").unlink()
        file = "5 $(x).pt"
    torch.save({"bomb": Bomb(tmp_path / "crater")}, folder / file)
    with pytest.raises(ValueError, match="is a pickle, which can run any code") as err:
        load_any(folder)
    assert not (tmp_path / "crater").exists()
    text = str(err.value)
    assert str(folder) in text and "\n" not in text
    command = text[text.index("python -c"):].replace("python", sys.executable, 1)
    if "openai" not in name:      # the command itself takes nothing but plain data
        assert subprocess.run(command, shell=True, cwd=folder, capture_output=True).returncode != 0
        assert not (tmp_path / "crater").exists()
    torch.save(state, folder / file)
    assert subprocess.run(command, shell=True, cwd=folder, capture_output=True).returncode == 0
    assert same(load_any(folder), want, x)


def test_other_directories_are_told_from_pickles(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')      # a model, not an SAE
    with pytest.raises(FileNotFoundError, match="no SAE there, .* a hookpoint .* layers.12.mlp"):
        load_any(tmp_path)
    # As from a hub, of which ae.pt is not fetched:
    (tmp_path / "config.json").write_text(json.dumps(trainer("AutoEncoder")))
    with pytest.raises(ValueError, match="ae.pt is a pickle"):
        load_any(tmp_path)
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="state.pt is a pickle"):
        load_any(tmp_path)


# ---- hostile files -------------------------------------------------------------------------------


REFUSED = {      # name of the case that is changed -> (message, change)
    "topk": [
        ("'architecture' = 'temporal' is not supported, only 'standard', 'topk'",
         dict(architecture="temporal")),
        ("'architecture' = 'matching_pursuit' is not", dict(architecture="matching_pursuit")),
        ("missing topk_threshold", dict(architecture="batchtopk")),
        ("'k' should be a whole number, it is 2.5", dict(k=2.5)),
        ("'hook_name' should be text, it is 3", dict(metadata={"hook_name": 3})),
        ("'hook_name' is above 200: 'blocks.111",
         dict(metadata={"hook_name": f"blocks.{'1' * 5000}.hook_mlp_out"})),
        ("'architecture' = .. is not supported", dict(architecture=[])),
        ("'normalize_activations' = 'covariance_whitening' is not",
         dict(normalize_activations="covariance_whitening")),
        ("'normalize_activations' = 'constant_norm_rescale' is not",
         dict(normalize_activations="constant_norm_rescale")),
        ("'normalize_activations' = 1 is not", dict(normalize_activations=1)),
        ("'reshape_activations' = 'hook_z' is not", dict(reshape_activations="hook_z")),
        ("'finetuning_scaling_factor' = True is not", dict(finetuning_scaling_factor=True)),
        ("'activation_fn_str' = 'tanh-relu' is not", dict(activation_fn_str="tanh-relu")),
        ("'activation_fn' = 'tanh-relu' is not", dict(activation_fn="tanh-relu")),
        ("'apply_b_dec_to_input' should be true or false, it is 1", dict(apply_b_dec_to_input=1)),
        ("no 'd_in'", dict(d_in=None)),
        ("no 'd_sae'", dict(d_sae=None)),
        ("'d_sae' should be a whole number, it is 6.0", dict(d_sae=6.0)),
        ("topk: k=None is no number", dict(k=None)),
        ("k=7 ", dict(k=7)),
        ("'k' is below 1: -1", dict(k=-1)),
        ("'metadata' should be an object", dict(metadata=[1])),
        ("metadata: 'model_name' should be text, it is .1.", dict(metadata={"model_name": [1]})),
        ("meta: 'sink_norm' should be a number, it is 'x'", dict(metadata={"sink_norm": "x"})),
        ("too small for n_latents=1000000000000, d_in=4", dict(d_sae=10**12)),
        ("W_enc has shape .4, 6., the config needs .4, 7.", dict(d_sae=7)),
        ("unexpected b_enc", dict(architecture="gated")),
        ("missing threshold", dict(architecture="jumprelu"))],
    "matryoshka": [
        (": levels are not above 0", dict(matryoshka_widths=[4, 2, 6])),
        (": levels are not above 0", dict(matryoshka_widths=[2, 7])),
        ("'matryoshka_widths' should be a whole number", dict(matryoshka_widths=[2.5])),
        ("'matryoshka_widths' should be a list", dict(matryoshka_widths=2)),
        ("unexpected topk_threshold", dict(architecture="topk")),
        ("k=None is no number", dict(k=None))],
    "jumprelu-log": [("unexpected log_threshold", dict(architecture="standard"))],
    "MatryoshkaBatchTopKSAE": [
        ("'dict_class' = 'IdentityDict' is not supported, only 'AutoEncoder', ",
         dict(dict_class="IdentityDict")),
        ("k is 3, but .2. in the weights", dict(k=3)),
        ("matryoshka: levels=None is no number", dict(group_sizes=None)),
        (": .*levels.* above 0", dict(group_sizes=[2, -2])),
        ("'group_sizes' should be a number, it is 1000", dict(group_sizes=[10**400])),
        ("'layer' should be a whole number, it is 'x'", dict(layer="x")),
        ("too small for n_latents=1000000000000, d_in=4", dict(dict_size=10**12)),
        ("unexpected .*W_dec", dict(dict_class="BatchTopKSAE"))],
    "openai-topk": [
        ("'activation' = 'Identity' is not supported", dict(activation="Identity")),
        ("'postact_fn' = 'Identity' is not supported",
         dict(activation_state_dict={"k": 2, "postact_fn": "Identity"})),
        ("'shape' is above 2: .6, 4, 1.", dict(shape=[6, 4, 1])),
        ("'shape' should be a whole number, it is 4.0", dict(shape=[6, 4.0])),
        ("topk: k=None is no number", dict(activation_state_dict={})),
        (": d_in.*0", dict(shape=[6, 0])),
        ("no 'trainer'", dict(shape=None))]}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_of_foreign_files_are_one_line_that_names_the_thing(tmp_path, name):
    layout, cfg, _ = FOREIGN[name]
    for i, (text, change) in enumerate(REFUSED[name]):
        folder = tmp_path / str(i)
        foreign(name, folder)
        if "trainer" in cfg:
            settings = {**cfg["trainer"], **change}
            change = {"trainer": {key: v for key, v in settings.items() if v is not None}}
        edit(folder / LAYOUTS[layout][0], **change)
        with pytest.raises(ValueError, match=text) as err:
            load_any(folder)
        assert str(folder) in str(err.value) and "\n" not in str(err.value), text


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "MatryoshkaBatchTopKSAE"])
def test_a_k_that_only_the_weights_have_is_taken_from_there(tmp_path, name):
    foreign(name, tmp_path)
    want = load_any(tmp_path).k
    settings = {key: value for key, value in FOREIGN[name][1]["trainer"].items() if key != "k"}
    edit(tmp_path / "config.json", trainer=settings)
    assert load_any(tmp_path).k == want


def test_the_layer_that_saelens_says_apart_is_read_or_must_agree(tmp_path):
    for i, (said, layer) in enumerate((({"hook_name": "blocks.1.hook_resid_post", "hook_layer": 1}, 1),
                                       ({"hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3}, 2),
                                       ({"hook_layer": 3}, 3))):
        foreign("topk", tmp_path / str(i))
        edit(tmp_path / str(i) / "cfg.json", metadata=said)
        assert load_any(tmp_path / str(i)).meta["layer"] == layer
    edit(tmp_path / "0" / "cfg.json", metadata={"hook_name": "blocks.1.hook_resid_post", "hook_layer": 3})
    with pytest.raises(ValueError, match="hook_layer 3, but 'blocks.1"):
        load_any(tmp_path / "0")


def test_scales_that_are_no_scales(tmp_path):
    foreign("standard-scaled", tmp_path)
    scaler = tmp_path / "activation_scaler.json"
    for value in ("null", "0.0", "NaN", "1e999", "1e300", "-1.0", '"1"', "[0.5]"):
        scaler.write_text(f'{{"scaling_factor": {value}}}')
        with pytest.raises(ValueError, match="scaler.json: .*(scaling_factor|not JSON)") as err:
            load_any(tmp_path)
        assert str(tmp_path) in str(err.value) and "\n" not in str(err.value)
    for text in ("[]", "[" * 10**5):
        scaler.write_text(text)
        with pytest.raises(ValueError, match="activation_scaler.json: .*JSON"):
            load_any(tmp_path)
    scaler.unlink()
    with pytest.raises(FileNotFoundError, match="activation_scaler.json: no such file"):
        load_any(tmp_path)


# ---- the command ---------------------------------------------------------------------------------


def command(folder, *argv):
    """python -m data.formats, with the checkout on the path -> (exit code, what it says)."""
    done = subprocess.run([sys.executable, "-m", "data.formats", *argv], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout + done.stderr


def test_the_command_keeps_what_an_sae_computes(tmp_path):
    built = make(variant="batchtopk")
    built.meta |= {"layer": 2, "site": "mlp", "sink_norm": 7.0}
    save_sae(built, tmp_path / "a")
    code, text = command(tmp_path, "--sae", "a", "--out", "b", "--layout", "saelens")
    assert code == 0 and text == f"b: batchtopk, {F} latents of width {D}, as saelens\n"
    read, x = load_any(tmp_path / "b"), data()
    assert read.variant == "jumprelu" and same(read, built, x, atol=1e-6)
    assert read.meta == {**built.meta, "training_architecture": "batchtopk"}
    code, text = command(tmp_path, "--sae", ".#b", "--out", "c")      # sparsify is the default
    assert code == 0 and text == f"c: jumprelu, {F} latents of width {D}, as sparsify\n"
    assert same(load_sae(tmp_path / "c"), built, x, atol=1e-6)


def test_the_command_refuses_in_one_line(tmp_path):
    save_sae(make(variant="itda"), tmp_path / "a")
    for argv, text in [
            ("--sae a --out b --layout saelens", "error: SAELens cannot express itda"),
            ("--sae a --out a", "error: a exists already; --out must be a new directory"),
            ("--sae a --out b --layout openai", "invalid choice: 'openai'"),
            ("--out b", "required: --sae"),
            ("--sae x --out b", "error: x: no such directory, nor a hub id"),
            ("--sae a --out b --lay saelens", "no flag '--lay', did you mean --layout")]:
        code, said = command(tmp_path, *argv.split())
        assert code == 2 and text in said and said.count("\n") == 1
    assert not (tmp_path / "b").exists()


# ---- live: SAELens, dictionary_learning, where installed -----------------------------------------


@pytest.mark.parametrize("normalize", ["none", "scale", "token"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_our_files_give_the_same_codes_in_saelens(tmp_path, variant, normalize):
    sae_lens = pytest.importorskip("sae_lens")
    for size in (1.0, 1e-3):      # at the second, layer norm without its small number would show
        model, x = make(variant=variant, normalize=normalize), data() * size
        model.meta = {"site": "resid", "layer": 3, "model": "owner/name"}
        save_saelens(model, tmp_path)
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        assert torch.allclose(theirs.encode(x), model.encode(x), atol=1e-5, rtol=1e-5)
        assert torch.allclose(theirs(x), model(x), atol=1e-5, rtol=1e-5)
        found = theirs.cfg.metadata
        assert (found.hook_name, found.model_name) == ("blocks.3.hook_resid_post", "owner/name")


def registry(name):
    """{architecture: its classes}, of SAELens where it is installed; else one that is skipped."""
    try:
        from sae_lens import registry
    except ImportError:
        return {"standard": None}
    return getattr(registry, name)


COMPUTED = ("standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
SCALED = {"normalize_activations": "expected_average_only_in"}
NEEDED = {      # settings without which SAELens makes none of this size; each sets those it knows
    "k": K, "d_out": D, "n_heads": 1, "bottleneck_factor": 1, "matryoshka_widths": [4, F]}


def saelens_sae(table, architecture, **more):
    """One of theirs with random tensors, none of them trivial."""
    cls, cfg_cls = registry(table)[architecture]
    known = {field.name for field in dataclasses.fields(cfg_cls)}
    settings = {"apply_b_dec_to_input": "transcoder" not in architecture} | NEEDED | more
    theirs = cls(cfg_cls(d_in=D, d_sae=F, **{n: v for n, v in settings.items() if n in known}))
    rng = torch.Generator().manual_seed(0)
    for name, t in theirs.state_dict().items():
        t.copy_(torch.randn(t.shape, generator=rng) * 0.5)
        if "threshold" in name:
            t.abs_().add_(0.2)
    return theirs


def close(a, b):
    return torch.allclose(a.to_dense(), b, atol=1e-5, rtol=1e-5)


VARIATIONS = [{}, {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"},
              {"rescale_acts_by_decoder_norm": True}, {"rescale_acts_by_decoder_norm": False},
              {"dtype": "bfloat16"}]


@pytest.mark.parametrize("architecture", registry("SAE_CLASS_REGISTRY"))
@pytest.mark.parametrize("more", VARIATIONS, ids=str)
def test_files_of_saelens_give_the_same_codes_here_or_are_refused(tmp_path, architecture, more):
    pytest.importorskip("sae_lens")
    if "transcoder" in architecture and more.get("apply_b_dec_to_input") is None:
        more = more | {"apply_b_dec_to_input": False}      # all that they have
    theirs = saelens_sae("SAE_CLASS_REGISTRY", architecture, **more)
    theirs.save_model(tmp_path)
    if architecture not in COMPUTED:
        with pytest.raises(ValueError, match="cfg.json: 'architecture' = .* is not supp") as err:
            load_any(tmp_path)
        assert "\n" not in str(err.value)
        return
    theirs.to(dtype=torch.float32)
    for size in (1.0, 1e-3):
        model, x = load_any(tmp_path), data() * size
        assert close(theirs.encode(x), model.encode(x)) and close(theirs(x), model(x))
        assert model.encode(x).any() or size < 1


@pytest.mark.parametrize("architecture", registry("SAE_TRAINING_CLASS_REGISTRY"))
@pytest.mark.parametrize("more", [*VARIATIONS, SCALED], ids=str)
def test_checkpoints_of_saelens_give_the_same_codes_here_or_are_refused(
        tmp_path, architecture, more):
    """As in training, where BatchTopK ranks a whole batch, and as once exported.
    Where x is scaled, their export changes the unit of codes ranked by the norms of atoms."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.training.activation_scaler import ActivationScaler
    theirs, s = saelens_sae("SAE_TRAINING_CLASS_REGISTRY", architecture, **more), 1.0
    theirs.save_model(tmp_path)
    for name in ("trainer_state.pt", "runner_cfg.json", "sparsity.safetensors"):
        (tmp_path / name).touch()        # also in the directory of a checkpoint
    if more == SCALED:                   # their trainer multiplies x by it
        s = 0.375
        ActivationScaler(scaling_factor=s).save(str(tmp_path / "activation_scaler.json"))
    if architecture not in COMPUTED:
        with pytest.raises(ValueError, match="cfg.json: 'architecture' = .* is not supp"):
            load_any(tmp_path)
        return
    model, x = load_any(tmp_path), data()
    theirs.to(dtype=torch.float32)
    assert close(theirs.encode(x * s), S.dense(model.codes(model.batch(x, train=True))))
    if s != 1:
        theirs.fold_activation_norm_scaling_factor(s)
    theirs.save_inference_model(tmp_path / "export")
    exported = sae_lens.SAE.load_from_disk(tmp_path / "export")
    unit = s if getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
    assert close(exported.encode(x) * unit, model.encode(x)) and model.encode(x).any()
    assert close(exported(x), model(x))
    again = load_any(tmp_path / "export")
    assert close(exported.encode(x), again.encode(x)) and close(exported(x), again(x))


@pytest.mark.parametrize("change", [
    {"normalize_activations": "covariance_whitening"},
    {"normalize_activations": "constant_norm_rescale"}, {"reshape_activations": "hook_z"}], ids=str)
def test_what_saelens_does_to_activations_and_we_do_not_is_refused(tmp_path, change):
    pytest.importorskip("sae_lens")
    saelens_sae("SAE_CLASS_REGISTRY", "standard", **change).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"cfg.json: '{list(change)[0]}' = .* is not supported"):
        load_any(tmp_path)


TRAINERS = {      # their trainers, each of which writes files of its own
    "standard.StandardTrainer": {}, "standard.StandardTrainerAprilUpdate": {},
    "p_anneal.PAnnealTrainer": {}, "gated_anneal.GatedAnnealTrainer": {}, "gdm.GatedSAETrainer": {},
    "jumprelu.JumpReluTrainer": {}, "top_k.TopKTrainer": {"k": K},
    "batch_top_k.BatchTopKTrainer": {"k": K},
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer": {"k": K, "group_fractions": [0.25, 0.75]}}


@pytest.mark.parametrize("name", TRAINERS)
def test_files_of_dictionary_learning_give_the_same_codes_here(tmp_path, name):
    utils = pytest.importorskip("dictionary_learning.utils")
    module, cls = name.split(".")
    trainers = importlib.import_module(f"dictionary_learning.trainers.{module}")
    make_trainer = getattr(trainers, cls)
    known = inspect.signature(make_trainer).parameters
    settings = dict(steps=10, activation_dim=D, dict_size=F, layer=3, lm_name="some/model",
                    warmup_steps=1, sparsity_warmup_steps=2, anneal_start=3, anneal_end=9,
                    device="cpu", submodule_name="resid_post_layer_3") | TRAINERS[name]
    trainer = make_trainer(**{key: v for key, v in settings.items() if key in known})
    rng = torch.Generator().manual_seed(0)
    for key, t in trainer.ae.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=rng) * 0.5)
            if key == "threshold":
                t.abs_()
    config = {"trainer": trainer.config, "buffer": {"io": "out", "d_submodule": D}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="ae.pt is a pickle"):
        load_any(tmp_path)
    tensors = {key: t.contiguous() for key, t in trainer.ae.state_dict().items()}
    save_file(tensors, tmp_path / "ae.safetensors")
    model, (theirs, _), x = load_any(tmp_path), utils.load_dictionary(str(tmp_path), "cpu"), data()
    assert (model.encode(x) > 0).any()
    assert close(theirs.encode(x), model.encode(x)) and close(theirs(x), model(x))
    site = {"site": "resid"} if "submodule_name" in trainer.config else {}      # one leaves it out
    assert model.meta == {"layer": 3, "model": "some/model"} | site


def test_every_dictionary_of_dictionary_learning_is_tried_or_refused(tmp_path):
    dictionary = pytest.importorskip("dictionary_learning.dictionary")
    kinds = {name for name, cls in vars(dictionary).items()
             if inspect.isclass(cls) and issubclass(cls, dictionary.Dictionary)} - {"Dictionary"}
    for kind in kinds - formats.DICTIONARIES.keys():
        foreign("AutoEncoder", tmp_path)
        edit(tmp_path / "config.json", **trainer(kind))
        with pytest.raises(ValueError, match=f"'dict_class' = '{kind}' is not supported"):
            load_any(tmp_path)
    assert kinds - formats.DICTIONARIES.keys() == {"IdentityDict"}
