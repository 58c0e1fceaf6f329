"""
Tests of sae.py: files, ours and those of sparsify, SAELens, dictionary_learning and OpenAI.

    python -m pytest tests/test_sae_files.py

The numbers under "golden" were computed once by sparsify 1.3.3, sae-lens 6.54, dictionary-learning 0.1 and OpenAI's
model.py; where the first three are installed, the last section compares with them directly.
"""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae as S

D, F, K = 6, 12, 3
FEW = {"k": K, "groups": 3, "k_max": 5}      # where a variant has such a setting


def make(seed=0, dtype=torch.float32, variant="topk", **hyper):
    """A small SAE of any variant, none of whose tensors is trivial."""
    few = {name: value for name, value in FEW.items() if name in S.VARIANTS[variant].defaults}
    model = S.build(variant, D, F, **{**few, "seed": seed, **hyper})
    rng = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name == "n_atoms":
                t.fill_(F - 2)
            elif not t.is_floating_point():
                t.copy_(torch.randint(100, t.shape, generator=rng))
            else:
                t.copy_(torch.randn(t.shape, generator=rng) * 0.5)
                if name in ("threshold", "input_scale", "scale_out"):
                    t.abs_().add_(0.2)
    return model.to(dtype)


def data(n=40, d=D, seed=0, dtype=torch.float32):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def same(a, b, x, atol=0.0):
    """The codes and reconstructions of two of our SAEs, to the bit unless told otherwise."""
    return (torch.allclose(a.encode(x), b.encode(x), atol=atol, rtol=atol)
            and torch.allclose(a(x), b(x), atol=atol, rtol=atol))


def edit(path, **changes):
    """Sets keys of a JSON file; None removes one."""
    cfg = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))


# ---- ours: every variant --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", S.VARIANTS)
@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
def test_every_variant_comes_back_to_the_bit(tmp_path, variant, normalize):
    model, x = make(variant=variant, normalize=normalize), data()
    model.meta = {"site": "mlp", "layer": 3, "model": "owner/name", "sink_norm": 12.5}
    S.save_sae(model, tmp_path)
    loaded = S.load_sae(tmp_path)
    assert same(loaded, model, x) and (model.encode(x) != 0).any()
    assert type(loaded) is type(model) and loaded.hyper == model.hyper and loaded.meta == model.meta
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(mine[n].dtype == theirs[n].dtype for n in mine)
    assert ([n for n, p in model.named_parameters() if p.requires_grad]
            == [n for n, p in loaded.named_parameters() if p.requires_grad])
    plain = variant in ("topk", "gsae") and normalize == "none"      # what sparsify computes, and nothing else
    assert ("encoder.weight" in load_file(tmp_path / "sae.safetensors")) == plain
    assert (json.loads((tmp_path / "cfg.json").read_text())["activation"] == "topk") == plain


@pytest.mark.parametrize("sample", ["none", "unit", "learned"])
def test_settings_that_change_the_tensors_come_back(tmp_path, sample):
    for i, model in enumerate([make(variant="vsae", sample=sample), make(variant="abstopk", over="batch"),
                               make(variant="matryoshka", levels=[1.0, 3.0]), make(variant="relu", rows="free")]):
        S.save_sae(model, tmp_path / str(i))
        loaded = S.load_sae(tmp_path / str(i))
        assert same(loaded, model, data()) and loaded.hyper == model.hyper
        assert loaded.state_dict().keys() == model.state_dict().keys()
    assert S.load_sae(tmp_path / "2").widths() == [3, 12]
    assert ("W_var" in load_file(tmp_path / "0" / "sae.safetensors")) == (sample == "learned")


def test_thresholds_may_be_wider_than_the_weights(tmp_path):
    model = make(variant="batchtopk", dtype=torch.bfloat16)
    model.threshold = torch.tensor(0.3)      # between two numbers of bfloat16
    S.save_sae(model, tmp_path)
    loaded = S.load_sae(tmp_path)
    assert loaded.threshold.dtype == torch.float32 and loaded.W_enc.dtype == torch.bfloat16
    assert same(loaded, model, data(dtype=torch.bfloat16))


# ---- ours: sparsify's directory ---------------------------------------------------------------------


def write(directory, cfg=None, tensors=None, **changes):
    """A file as sparsify writes it; changes: key=value to set in cfg.json, key=None to leave it out."""
    base = dict(activation="topk", expansion_factor=32, normalize_decoder=True, num_latents=F, k=K,
                multi_topk=False, skip_connection=False, transcode=False, d_in=D)
    base = {key: value for key, value in {**base, **changes}.items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cfg.json").write_text(cfg if cfg is not None else json.dumps(base))
    model = make()
    good = {"encoder.weight": model.W_enc.data, "encoder.bias": model.b_enc.data,
            "W_dec": model.W_dec.data, "b_dec": model.b_dec.data}
    tensors = {**good, **(tensors or {})}
    save_file({key: value.clone() for key, value in tensors.items() if value is not None},
              directory / "sae.safetensors")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_compares_activations(tmp_path, dtype):
    model = make(dtype=dtype, aux_coef=0.5, k_aux=4, dead_after=77)
    model.meta = {"site": "resid", "layer": 12, "model": "owner/name", "dtype": "bfloat16", "data": ["a"]}
    S.save_sae(model, tmp_path / "new" / "sae")
    loaded, x = S.load_sae(tmp_path / "new" / "sae"), data()
    assert torch.equal(loaded.encode(x), model.encode(x)) and torch.equal(loaded(x), model(x))
    assert loaded.W_enc.dtype == dtype and loaded.hyper == model.hyper and loaded.meta == model.meta
    assert (loaded.variant, loaded.d_in, loaded.n_latents) == ("topk", D, F)
    assert sorted(os.listdir(tmp_path / "new" / "sae")) == ["cfg.json", "sae.safetensors"]
    S.train_step(loaded, S.make_optimizer(loaded, "signum"), [x])  # a loaded SAE can be trained further
    assert loaded.tokens_since_fired.max() <= 40


def test_the_file_has_sparsify_keys_and_names(tmp_path):
    S.save_sae(make(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert {key: cfg[key] for key in S.SPARSIFY_KEYS if key != "signed"} == dict(
        activation="topk", expansion_factor=2, normalize_decoder=True, num_latents=F, k=K, multi_topk=False,
        skip_connection=False, transcode=False, d_in=D)
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "sae.safetensors").items()}
    assert shapes == {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}


def test_files_as_sparsify_wrote_them_over_the_years(tmp_path):
    x = data()
    for i, changes in enumerate([{}, dict(activation=None, transcode=None), dict(signed=False),
                                 dict(num_latents=0, expansion_factor=2), dict(normalize_decoder=False)]):
        model = write(tmp_path / str(i), **changes)
        loaded = S.load_sae(tmp_path / str(i))
        assert torch.equal(loaded.encode(x), model.encode(x)) and torch.equal(loaded(x), model(x))
        assert loaded.meta == {} and loaded.aux_coef == 0
    write(tmp_path / "odd", colour="green")
    with pytest.warns(UserWarning, match="odd.cfg.json: ignored unknown keys colour"):
        S.load_sae(tmp_path / "odd")


def test_every_refusal_names_the_file_and_the_thing(tmp_path):
    nan, big = torch.full((F,), math.nan), torch.full((D,), math.inf)
    cases = [
        ("cfg.json: not JSON", dict(cfg="{")),
        ("cfg.json: the file", dict(cfg="[1]")),
        ("cfg.json: the file, and its .meta.", dict(meta=3)),
        ("cfg.json: unknown variant 'groupmax'", dict(activation="groupmax")),
        ("cfg.json: unknown variant 'topp'; the nearest is 'topk'", dict(variant="topp", activation="topp")),
        ("cfg.json: activation 'topk' and variant 'gated'", dict(variant="gated")),
        ("cfg.json: skip_connection is true", dict(skip_connection=True)),
        ("cfg.json: transcode is true", dict(transcode=True)),
        ("cfg.json: signed is true", dict(signed=True)),
        ("cfg.json: k=13 ", dict(k=13)),
        ("cfg.json: k='3'", dict(k="3")),
        ("cfg.json: no 'k'", dict(k=None)),
        ("cfg.json: no 'd_in'", dict(d_in=None)),
        ("cfg.json: d_in='6'", dict(d_in="6")),
        ("cfg.json: n_latents=-1", dict(num_latents=-1)),
        ("cfg.json: n_latents=0", dict(num_latents=0, expansion_factor=None)),
        ("'W_dec' is missing", dict(tensors={"W_dec": None})),
        ("'W_skip' is not expected", dict(tensors={"W_skip": torch.zeros(D, D)})),
        ("'encoder.weight' has shape .6, 12., cfg.json says .12, 6.",
         dict(tensors={"encoder.weight": torch.zeros(D, F)})),
        ("'encoder.weight' has shape", dict(num_latents=2**90)),  # refused before it is allocated
        ("'encoder.bias' holds NaN", dict(tensors={"encoder.bias": nan})),
        ("'b_dec' holds NaN or inf", dict(tensors={"b_dec": big})),
        ("dtypes .'F16', 'F32'., expected one", dict(tensors={"b_dec": torch.zeros(D, dtype=torch.float16)})),
        ("'b_dec' has dtype I64", dict(tensors={"b_dec": torch.zeros(D, dtype=torch.int64)})),
    ]
    for i, (text, changes) in enumerate(cases):
        folder = tmp_path / f"case{i}"
        write(folder, **changes)
        with pytest.raises(ValueError, match=text) as err:
            S.load_sae(folder)
        assert f"case{i}" in str(err.value) and "\n" not in str(err.value)
    write(tmp_path / "cut")
    whole = (tmp_path / "cut" / "sae.safetensors").read_bytes()
    for damaged in (whole[:-8], whole[:20], b"", b"not tensors at all"):
        (tmp_path / "cut" / "sae.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="sae.safetensors: not a whole safetensors file"):
            S.load_sae(tmp_path / "cut")
    (tmp_path / "cut" / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="sae.safetensors: no such file"):
        S.load_sae(tmp_path / "cut")


def test_hookpoints_stay_inside_the_directory(tmp_path):
    model, x = write(tmp_path / "run" / "layers.3.mlp"), data()
    write(tmp_path / "outside")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    assert torch.equal(S.load_sae(tmp_path / "run", "layers.3.mlp")(x), model(x))
    for bad in ("../outside", "layers.3.mlp/../../outside", str(tmp_path / "outside"), "*", "link"):
        with pytest.raises(ValueError, match="hookpoint"):
            S.load_sae(tmp_path / "run", bad)
    for none in (None, "layers.4.mlp"):
        with pytest.raises(FileNotFoundError, match="name a hookpoint .* like layers.3.mlp"):
            S.load_sae(tmp_path / "run", none)
    with pytest.raises(FileNotFoundError, match="nor a hub id"):
        S.load_sae(tmp_path / "nothing here")


def test_hub_id_is_read_from_the_cache_and_refused_in_one_line_when_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--sae"
    model, x = write(repo / "snapshots" / ("a" * 40) / "layers.0.mlp"), data()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    assert torch.equal(S.load_sae("owner/sae", hookpoint="layers.0.mlp")(x), model(x))
    with pytest.raises(FileNotFoundError, match="owner/absent: no such directory, and the hub") as err:
        S.load_sae("owner/absent", hookpoint="layers.0.mlp")
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("layout", ["sparsify", "saelens"])
def test_an_interrupted_save_never_loads_mixed(tmp_path, monkeypatch, layout):
    old, new, x = make(seed=1, k=2), make(seed=2, k=3), data()
    seen = set()
    for crash_at in range(5):
        folder = tmp_path / str(crash_at)
        S.save_sae(old, folder, layout)
        calls = iter(range(100))

        def guard(action):
            def run(*args, **kw):
                if next(calls) == crash_at:
                    raise KeyboardInterrupt
                return action(*args, **kw)
            return run

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", guard(os.replace))
            patch.setattr(S, "save_file", guard(S.save_file))
            patch.setattr(S.Path, "unlink", guard(S.Path.unlink))
            patch.setattr(S.Path, "write_text", guard(S.Path.write_text))
            with pytest.raises(KeyboardInterrupt):
                S.save_sae(new, folder, layout)
        try:
            loaded = S.load_sae(folder)
            which = old if loaded.k == 2 else new
            assert torch.equal(loaded(x), which(x))
            seen.add(loaded.k)
        except FileNotFoundError:
            seen.add("refused")
        S.save_sae(new, folder, layout)  # the next save repairs it
        assert torch.equal(S.load_sae(folder)(x), new(x))
        assert sorted(os.listdir(folder)) == list(S.FILES[layout])
    assert seen == {2, "refused"}
    old.meta = {"data": object()}
    with pytest.raises(TypeError):
        S.save_sae(old, tmp_path / "0", layout)
    assert torch.equal(S.load_sae(tmp_path / "0")(x), new(x))  # a bad meta is found before files are touched


# ---- golden: sparsify 1.3.3 -----------------------------------------------------------------------

GOLDEN = dict(
    weights={"encoder.weight": [[1, 0, 0, .5], [0, 1, 0, -.5], [-1, .5, 0, 0],
                                [0, 0, 1, .25], [.5, .5, .5, .5], [0, -1, .25, 0]],
             "encoder.bias": [.125, -.25, 0, .5, 0, -.125],
             "W_dec": [[.6, 0, 0, .8], [0, 1, 0, 0], [-.8, .6, 0, 0],
                       [0, 0, 1, 0], [.5, .5, .5, .5], [0, -.96, .28, 0]],
             "b_dec": [.25, -.5, 0, 1]},
    x=[[1, 2, 3, 4], [-1, .5, 0, 1], [0, 0, 0, 0], [.25, -.5, -4, 1], [3, -2, .5, -1]],
    z=[[0, 0, 0, 4.25, 4.625, 0], [0, .75, 1.75, 0, 0, 0], [0, .75, .5, 0, 0, 0], [.125, 0, 0, 0, 0, 0],
       [1.875, 0, 0, 0, 0, 1.5]],
    x_hat=[[2.5625, 1.8125, 6.5625, 3.3125], [-1.15, 1.3, 0, 1], [-.15, .55, 0, 1], [.325, -.5, 0, 1.1],
           [1.375, -1.94, .42, 2.5]],
    fvu=0.8569175601005554)


def test_golden_codes_of_a_sparsify_file(tmp_path):
    (tmp_path / "cfg.json").write_text('{"expansion_factor": 32, "normalize_decoder": true, "num_latents": 6,'
                                       ' "k": 2, "multi_topk": false, "skip_connection": false, "d_in": 4}')
    save_file({name: torch.tensor(value).float() for name, value in GOLDEN["weights"].items()},
              tmp_path / "sae.safetensors")
    model, x = S.load_sae(tmp_path), torch.tensor(GOLDEN["x"])
    assert model.encode(x).tolist() == GOLDEN["z"]
    assert torch.allclose(model(x), torch.tensor(GOLDEN["x_hat"]), atol=1e-6)
    assert float(model.loss(x)[1]["fvu"]) == pytest.approx(GOLDEN["fvu"], rel=1e-6)
    S.save_sae(model, tmp_path / "again")
    assert S.load_sae(tmp_path / "again").encode(x).tolist() == GOLDEN["z"]


# ---- theirs: golden codes -------------------------------------------------------------------------
# name -> layout, configuration, tensors with the dimensions they have in the file (D 4, F 6).

LENS = {"d_in": 4, "d_sae": 6, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.18.0", "model_name": "some/model", "context_size": 128,
                     "hook_name": "blocks.5.hook_resid_post"}}
OLD = {"d_in": 4, "d_sae": 6, "dtype": "torch.float32", "device": "cuda", "hook_point": "blocks.8.hook_resid_pre",
       "hook_point_layer": 8, "model_name": "gpt2-small", "normalize_activations": False}
BARE = "W_enc:DF b_enc:F W_dec:FD b_dec:D"
LINEAR = "encoder.weight:FD encoder.bias:F decoder.weight:DF"


def trainer(kind, **more):
    return {"trainer": {"dict_class": kind, "activation_dim": 4, "dict_size": 6, "layer": 7, "lm_name": "some/model",
                        "submodule_name": "mlp_out_layer_7", **more}, "buffer": {"ctx_len": 128}}


FOREIGN = {
    "standard": ("saelens", LENS | {"architecture": "standard", "apply_b_dec_to_input": False}, BARE),
    "standard-ln": ("saelens", LENS | {"architecture": "standard", "normalize_activations": "layer_norm"}, BARE),
    "standard-scaled": ("saelens", LENS | {"architecture": "standard",
                                           "normalize_activations": "expected_average_only_in"}, BARE),
    "topk": ("saelens", LENS | {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}, BARE),
    "jumprelu": ("saelens", LENS | {"architecture": "jumprelu", "apply_b_dec_to_input": False},
                 BARE + " threshold:F"),
    "gated": ("saelens", LENS | {"architecture": "gated", "apply_b_dec_to_input": False},
              "W_enc:DF b_gate:F b_mag:F r_mag:F W_dec:FD b_dec:D"),
    "old": ("saelens", OLD, BARE + " scaling_factor:F"),
    "old-topk": ("saelens", OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
                                   "architecture": "standard"}, BARE),
    "AutoEncoder": ("dictionary_learning", trainer("AutoEncoder"), LINEAR + " bias:D"),
    "AutoEncoderNew": ("dictionary_learning", trainer("AutoEncoderNew"), LINEAR + " decoder.bias:D"),
    "GatedAutoEncoder": ("dictionary_learning", trainer("GatedAutoEncoder"),
                         "decoder_bias:D encoder.weight:FD r_mag:F gate_bias:F mag_bias:F decoder.weight:DF"),
    "AutoEncoderTopK": ("dictionary_learning", trainer("AutoEncoderTopK", k=2), "k: threshold: b_dec:D " + LINEAR),
    "BatchTopKSAE": ("dictionary_learning", trainer("BatchTopKSAE", k=2), "k: threshold: b_dec:D " + LINEAR),
    "JumpReluAutoEncoder": ("dictionary_learning", trainer("JumpReluAutoEncoder"), BARE + " threshold:F"),
    "MatryoshkaBatchTopKSAE": ("dictionary_learning", trainer("MatryoshkaBatchTopKSAE", k=2, group_sizes=[2, 4]),
                               "k: threshold: group_sizes: " + BARE),
    "openai-relu": ("dictionary_learning", {"shape": [6, 4], "activation": "ReLU", "activation_state_dict": {}},
                    "pre_bias:D latent_bias:F encoder.weight:FD decoder.weight:DF stats_last_nonzero:F"),
    "openai-topk": ("dictionary_learning", {"shape": [6, 4], "activation": "TopK",
                                            "activation_state_dict": {"k": 2, "postact_fn": "ReLU"}},
                    "pre_bias:D latent_bias:F encoder.weight:FD decoder.weight:DF stats_last_nonzero:F "
                    "latents_activation_frequency:F latents_mean_square:F")}


def grid(seed, dims):
    """Small multiples of 1/64, which look random and are the same everywhere."""
    size = [{"D": 4, "F": 6, "N": 2}[d] for d in dims]
    i = torch.arange(math.prod(size), dtype=torch.float64) + 7 * seed
    return (((7 * i * i + 31 * i + 53 * seed) % 193 - 96) / 64).float().reshape(size)


def foreign(name, folder):
    """Writes the case as its own package would, but for the pickle; returns the tensors."""
    layout, cfg, spec = FOREIGN[name]
    tensors = {key: grid(i, dims) for i, (key, dims) in enumerate(part.split(":") for part in spec.split())}
    fixed = {"k": torch.tensor(2, dtype=torch.int32), "group_sizes": torch.tensor([2, 4]),
             "scaling_factor": torch.ones(6), "stats_last_nonzero": torch.zeros(6, dtype=torch.int64)}
    fixed |= {} if "threshold:F" in spec else {"threshold": torch.tensor(1.1875)}
    tensors |= {key: value for key, value in fixed.items() if key in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / S.FILES[layout][0]).write_text(json.dumps(cfg))
    if "scaled" in name:
        (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.375, "has_whitening": false}')
    save_file(tensors, folder / S.FILES[layout][1])
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
    model, x, (z, x_hat) = S.load_sae(tmp_path), grid(20, "ND"), GOLDEN_CODES[name]
    assert torch.allclose(model.encode(x).flatten(), torch.tensor(z), atol=1e-4)
    assert torch.allclose(model(x).flatten(), torch.tensor(x_hat), atol=1e-4)
    S.save_sae(model, tmp_path / "ours")      # and as ours it is the same SAE
    ours = S.load_sae(tmp_path / "ours")
    assert same(ours, model, x) and ours.hyper == model.hyper and ours.meta == model.meta
    S.save_sae(model, tmp_path / "lens", "saelens")
    assert same(S.load_sae(tmp_path / "lens"), model, x, atol=1e-5)


def test_where_the_sae_belongs_is_read(tmp_path):
    for name in FOREIGN:
        foreign(name, tmp_path / name)
    meta = {name: S.load_sae(tmp_path / name).meta for name in FOREIGN}
    here = {"layer": 5, "site": "resid", "model": "some/model"}
    assert meta["gated"] == meta["topk"] == here | {"context_size": 128}
    assert meta["old"] == {"layer": 7, "site": "resid", "model": "gpt2-small"}      # what enters 8 leaves 7
    assert meta["BatchTopKSAE"] == here | {"layer": 7, "site": "mlp"} and meta["openai-topk"] == {}
    for hook, want in [("blocks.0.hook_mlp_out", {"layer": 0, "site": "mlp"}), ("hook_embed", {}), (None, {}),
                       (3, {}), ("blocks.2.attn.hook_z", {"layer": 2, "site": "attn.hook_z"}),
                       ("blocks.0.hook_resid_pre", {"layer": 0, "site": "hook_resid_pre"})]:
        edit(tmp_path / "gated" / "cfg.json", metadata={"hook_name": hook})
        assert S.load_sae(tmp_path / "gated").meta == want
    for name, want in [("resid_post_layer_7", "resid"), (None, None), ("attention_out_layer_7", None)]:
        edit(tmp_path / "BatchTopKSAE" / "config.json", **trainer("BatchTopKSAE", k=2, submodule_name=name))
        assert S.load_sae(tmp_path / "BatchTopKSAE").meta.get("site") == want


def test_what_is_folded_is_folded_in_full_precision(tmp_path):
    for name in ("JumpReluAutoEncoder", "topk", "MatryoshkaBatchTopKSAE"):
        tensors = foreign(name, tmp_path / name)
        file = next((tmp_path / name).glob("*.safetensors"))
        save_file({key: t.bfloat16() if t.dim() else t for key, t in tensors.items() if "group" not in key}, file)
        model, z = S.load_sae(tmp_path / name), torch.tensor(GOLDEN_CODES[name][0])
        assert model.W_enc.dtype == (torch.bfloat16 if "Mat" in name else torch.float32)
        tolerance = 0.1 if "Mat" in name else 0.03      # what rounding the weights of the file costs
        assert torch.allclose(model.encode(grid(20, "ND")).flatten().float(), z, atol=tolerance)


def test_standardised_tokens_go_back_as_they_do_there(tmp_path):
    for name in ("standard-ln", "openai-topk"):
        foreign(name, tmp_path / name)
        model, x = S.load_sae(tmp_path / name), grid(20, "ND") / 10**4      # where their small number, 1e-5, shows
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        want = (model.encode(x) @ model.W_dec + model.b_dec) * std + mean
        assert torch.allclose(model(x), want, atol=1e-9)


def test_older_files_of_dictionary_learning(tmp_path):
    tensors = foreign("AutoEncoderTopK", tmp_path)
    want = S.load_sae(tmp_path)
    save_file({key: tensors[key] for key in tensors if key not in ("k", "threshold")}, tmp_path / "ae.safetensors")
    assert same(S.load_sae(tmp_path), want, grid(20, "ND"))


def test_a_threshold_below_zero_is_none(tmp_path):
    tensors = foreign("BatchTopKSAE", tmp_path)
    save_file(tensors | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.safetensors")      # as before training
    z = S.load_sae(tmp_path).encode(grid(20, "ND"))
    assert (z >= 0).all() and z.sum() > sum(GOLDEN_CODES["BatchTopKSAE"][0]) + 1


# ---- theirs: what we write for SAELens ------------------------------------------------------------

EXPORTED = {"relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk", "gsae": "topk",
            "vsae": "topk", "batchtopk": "jumprelu", "matryoshka": "jumprelu", "mutual_choice": "jumprelu",
            "feature_choice": "jumprelu"}


@pytest.mark.parametrize("normalize", ["none", "scale", "token"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_saelens_files_hold_the_same_sae(tmp_path, variant, normalize):
    model, x = make(variant=variant, normalize=normalize), data()
    model.meta = {"site": "mlp", "layer": 3, "model": "owner/name", "sink_norm": 12.5}
    S.save_sae(model, tmp_path, "saelens")
    assert sorted(os.listdir(tmp_path)) == ["cfg.json", "sae_weights.safetensors"]
    cfg, tensors = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert cfg["architecture"] == EXPORTED[variant] and (cfg["d_in"], cfg["d_sae"]) == (D, F)
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_mlp_out" and cfg["metadata"]["model_name"] == "owner/name"
    assert cfg["normalize_activations"] == ("layer_norm" if normalize == "token" else "none")
    want = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    want |= dict.fromkeys({"gated": ["b_gate", "b_mag", "r_mag"], "jumprelu": ["b_enc", "threshold"]}.get(
        cfg["architecture"], ["b_enc"]), (F,))
    assert {key: tuple(t.shape) for key, t in tensors.items()} == want
    loaded = S.load_sae(tmp_path)
    assert same(loaded, model, x, atol=1e-5)
    assert loaded.meta == model.meta | {"training_architecture": variant}
    S.save_sae(loaded, tmp_path, "saelens")
    assert S.load_sae(tmp_path).meta == loaded.meta      # still: as jumprelu it would forget where it came from
    for half in ({"layer": 3}, {"site": "mlp"}):      # half a place
        loaded.meta = half | {"sae_lens_version": "4.0"}      # and what would make it an old file
        S.save_sae(loaded, tmp_path, "saelens")
        assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["sae_lens_version"] == "6.0.0"
        assert S.load_sae(tmp_path).meta == half | {"training_architecture": loaded.variant}


def test_saelens_files_of_half_precision(tmp_path):
    for normalize, want in (("none", torch.bfloat16), ("scale", torch.float32)):
        model, x = make(variant="jumprelu", normalize=normalize, dtype=torch.bfloat16), data(dtype=torch.float64)
        S.save_sae(model, tmp_path, "saelens")
        assert {t.dtype for t in load_file(tmp_path / "sae_weights.safetensors").values()} == {want}
        assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == str(want).removeprefix("torch.")
        assert same(S.load_sae(tmp_path).double(), model.double(), x, atol=1e-5)


def test_what_saelens_cannot_express_is_refused_and_not_written(tmp_path):
    refused = [dict(variant=variant) for variant in S.VARIANTS if variant not in EXPORTED]
    assert len(refused) == 4
    for hyper in [*refused, dict(normalize="unit"), dict(variant="relu", normalize="unit")]:
        model = make(**hyper)
        with pytest.raises(ValueError, match=f"SAELens cannot express {model.variant} with normalize="):
            S.save_sae(model, tmp_path / "new", "saelens")
    with pytest.raises(ValueError, match="unknown layout 'saelense'; the nearest is 'saelens'"):
        S.save_sae(make(), tmp_path / "new", "saelense")
    assert not (tmp_path / "new").exists()


# ---- which layout, and pickles --------------------------------------------------------------------


def test_two_layouts_in_one_directory(tmp_path):
    S.save_sae(make(), tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(ValueError, match="holds sae.safetensors, of the layout 'sparsify'"):
        S.save_sae(make(seed=1), tmp_path, "saelens")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == kept
    save_file({"a": torch.ones(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"sparsify \(cfg.json, sae.safetensors\) and saelens \(cfg.json, sae_w"):
        S.load_sae(tmp_path)
    foreign("AutoEncoder", tmp_path)
    with pytest.raises(ValueError, match="sparsify .* saelens .* dictionary_learning .*: keep those of one"):
        S.load_sae(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "openai-topk"])
def test_a_pickle_is_never_loaded_and_the_message_says_how_to_convert_it(tmp_path, name):
    folder = tmp_path / "it's here"
    tensors = foreign(name, folder)
    want, x = S.load_sae(folder), grid(20, "ND")
    (folder / "ae.safetensors").unlink()
    state, file = dict(tensors), "ae.pt"
    if "openai" in name:      # its pickle says the rest, and has any name
        state |= {key: value for key, value in FOREIGN[name][1].items() if key != "shape"}
        (folder / "config.json").unlink()
        file = "5 $(x).pt"
    torch.save({"bomb": Bomb(tmp_path / "crater")}, folder / file)
    with pytest.raises(ValueError, match="is a pickle, which can run any code") as err:
        S.load_sae(folder)
    assert not (tmp_path / "crater").exists() and str(folder) in str(err.value) and "\n" not in str(err.value)
    command = str(err.value)[str(err.value).index("python -c"):].replace("python", sys.executable, 1)
    if "openai" not in name:      # the command itself takes nothing but plain data
        assert subprocess.run(command, shell=True, cwd=folder, capture_output=True).returncode != 0
        assert not (tmp_path / "crater").exists()
    torch.save(state, folder / file)
    assert subprocess.run(command, shell=True, cwd=folder, capture_output=True).returncode == 0
    assert same(S.load_sae(folder), want, x)


def test_other_directories_are_told_from_pickles(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')      # a model, not an SAE
    with pytest.raises(FileNotFoundError, match="no cfg.json there; name a hookpoint"):
        S.load_sae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(trainer("AutoEncoder")))      # from a hub: ae.pt is not fetched
    with pytest.raises(ValueError, match="ae.pt is a pickle"):
        S.load_sae(tmp_path)
    (tmp_path / "state.pt").touch()
    foreign("AutoEncoder", tmp_path / "trainer_0")
    with pytest.raises(FileNotFoundError, match="name a hookpoint of .* that has one, like trainer_0"):
        S.load_sae(tmp_path)
    assert S.load_sae(tmp_path, "trainer_0").variant == "relu"


# ---- hostile files --------------------------------------------------------------------------------


def test_refusals_of_foreign_files_are_one_line_that_names_the_thing(tmp_path):
    lens = [
        ("architecture 'temporal' is not read here, only standard, topk", dict(architecture="temporal")),
        ("architecture 'batchtopk' is not read", dict(architecture="batchtopk")),
        (r"cfg.json: unhashable|cannot use 'list'", dict(architecture=[])),
        ("normalize_activations 'covariance_whitening' is not", dict(normalize_activations="covariance_whitening")),
        ("normalize_activations 'constant_norm_rescale' is not", dict(normalize_activations="constant_norm_rescale")),
        ("'expected_average_only_in' needs a scaling_factor", dict(normalize_activations=S.NORMS["scale"])),
        ("'expected_average_only_in' needs a scaling_factor", dict(normalize_activations=True)),
        ("reshape_activations 'hook_z' is not", dict(reshape_activations="hook_z")),
        ("finetuning_scaling_factor True is not", dict(finetuning_scaling_factor=True)),
        ("activation_fn 'tanh-relu' is not", dict(activation_fn_str="tanh-relu")),
        ("no 'd_in'", dict(d_in=None)),
        ("no 'd_sae'", dict(d_sae=None)),
        ("k=None", dict(k=None)),
        ("k=7 ", dict(k=7)),
        ("must each be a JSON object", dict(metadata=[1])),
        ("tensor 'W_enc' has shape .4, 6., cfg.json says .4, 1000000000000.", dict(d_sae=10**12)),
        ("tensor 'W_enc' has shape .4, 6., cfg.json says .4, 7.", dict(d_sae=7)),
        ("tensor 'b_enc' is not expected", dict(architecture="gated")),
        ("tensor 'threshold' is missing", dict(architecture="jumprelu"))]
    cases = [(f"{i}", "topk", "cfg.json", *case) for i, case in enumerate(lens)]
    learning = [
        ("dict_class 'IdentityDict' is not read here, only AutoEncoder, ", dict(dict_class="IdentityDict")),
        ("no 'k'", dict(k=None)),
        ("no 'group_sizes'", dict(group_sizes=None)),
        ("levels=.2, -2. must be", dict(group_sizes=[2, -2])),
        ("ae.safetensors: its k is not 3", dict(k=3)),
        ("'W_enc' has shape .4, 6., config.json says .4, 1000000000000.", dict(dict_size=10**12)),
        ("tensor 'W_dec' is not expected", dict(dict_class="BatchTopKSAE")),
        ("config.json: int too large", dict(group_sizes=[10**400]))]
    settings = FOREIGN["MatryoshkaBatchTopKSAE"][1]["trainer"]
    cases += [(f"d{i}", "MatryoshkaBatchTopKSAE", "config.json", text, dict(trainer={
        key: value for key, value in {**settings, **change}.items() if value is not None}))
        for i, (text, change) in enumerate(learning)]
    openai = [
        ("activation 'Identity' with .* is not read", dict(activation="Identity")),
        ("'TopK' with .*Identity.* is not read", dict(activation_state_dict={"k": 2, "postact_fn": "Identity"})),
        ("config.json: .*unpack", dict(shape=[6, 4, 1])),
        ("no 'trainer'", dict(shape=None))]
    cases += [(f"o{i}", "openai-topk", "config.json", *case) for i, case in enumerate(openai)]
    for folder, name, config, text, change in cases:
        foreign(name, tmp_path / folder)
        edit(tmp_path / folder / config, **change)
        with pytest.raises(ValueError, match=text) as err:
            S.load_sae(tmp_path / folder)
        assert str(tmp_path / folder) in str(err.value) and "\n" not in str(err.value), text


def test_scales_that_are_no_scales(tmp_path):
    foreign("standard-scaled", tmp_path)
    for text in ('{"scaling_factor": null}', '{"scaling_factor": 0.0}', '{"scaling_factor": NaN}', "[]",
                 '{"scaling_factor": 1e999}', '{"scaling_factor": -1.0}', "[" * 10**5):
        (tmp_path / "activation_scaler.json").write_text(text)
        with pytest.raises(ValueError, match="scaling_factor|input scale|JSON") as err:
            S.load_sae(tmp_path)
        assert str(tmp_path) in str(err.value) and "\n" not in str(err.value)


def test_hostile_files_in_our_own_layout(tmp_path):
    for i, (hyper, cfg, tensors, text) in enumerate([
            (dict(variant="batchtopk"), dict(num_latents=10**12), {}, "has shape .*, cfg.json says .1000000000000"),
            (dict(variant="batchtopk"), dict(num_latents=None, d_in=[0], expansion_factor=10**12), {}, "d_in=.0."),
            (dict(variant="batchtopk"), dict(variant=["batchtopk"]), {}, "cfg.json: "),
            (dict(variant="batchtopk"), dict(activation="topk"), {}, "'topk' and variant 'batchtopk' contradict"),
            (dict(normalize="scale"), dict(activation="topk"), {}, "contradict each other"),
            (dict(normalize="scale"), dict(normalize="none"), {}, "contradict each other"),
            (dict(), dict(normalize="scale"), {}, "contradict each other"),
            (dict(), dict(normalize="huge"), {}, "normalize='huge' is not one of"),
            (dict(variant="jumprelu"), {}, {"threshold": torch.ones(())}, "shape .., cfg.json says .12,."),
            (dict(variant="batchtopk"), {}, {"threshold": torch.zeros(F)}, "'threshold' has shape .12,., cfg.json"),
            (dict(variant="batchtopk"), {}, {"threshold": torch.tensor(math.nan)}, "'threshold' holds NaN"),
            (dict(variant="batchtopk"), {}, {"threshold": torch.tensor(1)}, "tensor 'threshold' has dtype I64"),
            (dict(normalize="scale"), {}, {"input_scale": torch.zeros(())}, "input scale 0.0 is not above 0"),
            (dict(variant="itda"), {}, {"n_atoms": torch.tensor(F + 1)}, "n_atoms is 13, there is room for 12"),
            (dict(variant="itda"), {}, {"n_atoms": torch.tensor(-1)}, "n_atoms is -1"),
            (dict(variant="itda"), {}, {"label": torch.zeros(F)}, "tensor 'label' has dtype F32"),
            (dict(), {}, {"k": torch.tensor(K)}, "tensor 'k' is not expected")]):
        folder = tmp_path / str(i)
        S.save_sae(make(**hyper), folder)
        edit(folder / "cfg.json", **cfg)
        save_file(load_file(folder / "sae.safetensors") | tensors, folder / "sae.safetensors")
        with pytest.raises(ValueError, match=text) as err:
            S.load_sae(folder)
        assert str(folder) in str(err.value) and "\n" not in str(err.value), text
    (folder / "cfg.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="cfg.json: not JSON"):
        S.load_sae(folder)


# ---- live: sparsify, SAELens, dictionary_learning, where installed --------------------------------


def test_our_file_loads_in_sparsify_and_theirs_here(tmp_path):
    sparsify = pytest.importorskip("sparsify")
    model, x = make(aux_coef=0.1), data()
    model.meta = {"site": "resid", "layer": 12}
    S.save_sae(model, tmp_path / "ours")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    for back in (theirs, None):
        if back is None:  # and the other way: what they write, we read
            theirs.save_to_disk(tmp_path / "theirs")
            model = S.load_sae(tmp_path / "theirs")
        values, index, _ = theirs.encode(x)
        codes = torch.zeros(len(x), F).scatter(1, index, values)
        assert torch.allclose(model.encode(x), codes, atol=1e-6)
        assert torch.allclose(model(x), theirs.decode(values, index), atol=1e-6)
        assert torch.allclose(model.loss(x)[0], theirs(x).fvu, rtol=1e-5)

@pytest.mark.parametrize("variant", S.VARIANTS)
@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
def test_sparsify_loads_what_it_can_compute_and_nothing_else(tmp_path, variant, normalize):
    sparsify = pytest.importorskip("sparsify")
    model, x = make(variant=variant, normalize=normalize), data()
    S.save_sae(model, tmp_path)
    if variant in ("topk", "gsae") and normalize == "none":
        values, index, _ = sparsify.SparseCoder.load_from_disk(tmp_path).encode(x)
        assert torch.allclose(model.encode(x), torch.zeros(len(x), F).scatter(1, index, values), atol=1e-6)
    else:
        for decoder in (True, False):      # without it tensors are not checked: the configuration must tell
            with pytest.raises(TypeError, match="Expected one of .*groupmax.*topk"):
                sparsify.SparseCoder.load_from_disk(tmp_path, decoder=decoder)
        edit(tmp_path / "cfg.json", activation=None)      # older versions do not look at it
        with pytest.raises((RuntimeError, TypeError)):
            sparsify.SparseCoder.load_from_disk(tmp_path)


@pytest.mark.parametrize("normalize", ["none", "scale", "token"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_our_files_give_the_same_codes_in_saelens(tmp_path, variant, normalize):
    sae_lens = pytest.importorskip("sae_lens")
    for size in (1.0, 1e-3):      # at the second, layer norm without its small number would show
        model, x = make(variant=variant, normalize=normalize), data() * size
        model.meta = {"site": "resid", "layer": 3, "model": "owner/name"}
        S.save_sae(model, tmp_path, "saelens")
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        assert torch.allclose(theirs.encode(x), model.encode(x), atol=1e-5, rtol=1e-5)
        assert torch.allclose(theirs(x), model(x), atol=1e-5, rtol=1e-5)
        found = theirs.cfg.metadata
        assert (found.hook_name, found.model_name) == ("blocks.3.hook_resid_post", "owner/name")


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu", "topk", "topk rescaled"])
def test_files_of_saelens_give_the_same_codes_here(tmp_path, kind, centred, normalize):
    sae_lens = pytest.importorskip("sae_lens")
    cfg = LENS | {"architecture": kind.split()[0], "d_in": D, "d_sae": F, "apply_b_dec_to_input": centred, "k": K,
                  "normalize_activations": normalize, "rescale_acts_by_decoder_norm": kind.endswith("rescaled")}
    theirs = sae_lens.SAE.from_dict(cfg)
    rng = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.5
    theirs.save_model(tmp_path)
    for size in (1.0, 1e-3):
        model, x = S.load_sae(tmp_path), data() * size
        assert torch.allclose(model.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        assert torch.allclose(model(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_what_saelens_exports_of_batchtopk_and_matryoshka(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    for i, (kind, more) in enumerate([("BatchTopK", {}), ("MatryoshkaBatchTopK", {"matryoshka_widths": [4, F]})]):
        cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=F, k=K, **more)
        theirs = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
        rng, x = torch.Generator().manual_seed(i), data()
        for p in theirs.parameters():
            p.data = torch.randn(p.shape, generator=rng) * 0.5
        theirs.topk_threshold.fill_(0.8)
        theirs.save_inference_model(tmp_path / kind)
        model, exported = S.load_sae(tmp_path / kind), sae_lens.SAE.load_from_disk(tmp_path / kind)
        assert model.variant == "jumprelu" and (model.encode(x) > 0).any()
        assert torch.allclose(model.encode(x), exported.encode(x), atol=1e-5)
        assert torch.allclose(model(x), exported(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK",
                                  "BatchTopKSAE", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_files_of_dictionary_learning_give_the_same_codes_here(tmp_path, kind):
    utils = pytest.importorskip("dictionary_learning.utils")
    more = {"MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [5, 7]}, "AutoEncoderTopK": {"k": K},
            "BatchTopKSAE": {"k": K}}
    theirs = getattr(utils, kind)(D, F, **more.get(kind, {}))
    rng = torch.Generator().manual_seed(0)
    for name, t in theirs.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=rng) * 0.5)
            if name == "threshold":
                t.abs_()
    (tmp_path / "config.json").write_text(json.dumps(
        {"trainer": {"dict_class": kind, "activation_dim": D, "dict_size": F, **more.get(kind, {})}}))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    save_file({key: t.contiguous() for key, t in theirs.state_dict().items()}, tmp_path / "ae.safetensors")
    model, (theirs, _), x = S.load_sae(tmp_path), utils.load_dictionary(str(tmp_path), "cpu"), data()
    assert torch.allclose(model.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5) and (model.encode(x) > 0).any()
    assert torch.allclose(model(x), theirs(x), atol=1e-5, rtol=1e-5)
