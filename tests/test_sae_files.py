"""
Tests of sae.py: our own files, which are sparsify's with more fields.

    python -m pytest tests/test_sae_files.py

The numbers under "golden" were computed once by sparsify 1.3.3; where it is installed, the last
section compares with it directly.  Files of other projects: tests/test_formats.py.
"""
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae as S
from data import files
from sae import load_sae, save_sae

D, F, K = 6, 12, 3
FEW = {"k": K, "groups": 3}      # where a variant has such a setting


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
    """Do two of our SAEs give equal codes and reconstructions, to the bit unless told otherwise?"""
    return (torch.allclose(a.encode(x), b.encode(x), atol=atol, rtol=atol)
            and torch.allclose(a(x), b(x), atol=atol, rtol=atol))


def edit(path, **changes):
    """Sets keys of a JSON file; None removes one."""
    cfg = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))


# ---- every variant -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", S.VARIANTS)
@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
def test_every_variant_comes_back_to_the_bit(tmp_path, variant, normalize):
    model, x = make(variant=variant, normalize=normalize), data()
    model.meta = {"site": "mlp", "layer": 3, "model": "owner/name", "sink_norm": 12.5}
    save_sae(model, tmp_path)
    loaded = load_sae(tmp_path)
    assert same(loaded, model, x) and (model.encode(x) != 0).any()
    assert type(loaded) is type(model)
    assert loaded.hyper == model.hyper and loaded.meta == model.meta
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(mine[n].dtype == theirs[n].dtype for n in mine)
    assert ([n for n, p in model.named_parameters() if p.requires_grad]
            == [n for n, p in loaded.named_parameters() if p.requires_grad])
    plain = variant in ("topk", "gsae") and normalize == "none"      # all that sparsify computes
    assert ("encoder.weight" in load_file(tmp_path / "sae.safetensors")) == plain
    assert (json.loads((tmp_path / "cfg.json").read_text())["activation"] == "topk") == plain


def test_settings_come_back(tmp_path):
    models = [make(variant="vsae", sample="unit"), make(variant="relu", rows="free"),
              make(variant="matryoshka", levels=[1.0, 3.0])]
    for i, model in enumerate(models):
        save_sae(model, tmp_path / str(i))
        loaded = load_sae(tmp_path / str(i))
        assert same(loaded, model, data()) and loaded.hyper == model.hyper
        assert loaded.state_dict().keys() == model.state_dict().keys()
    assert load_sae(tmp_path / "2").widths() == [3, 12]


@pytest.mark.parametrize("variant, former", [
    ("topk", dict(aux="dead", tau=0.5, k_start=None, warmup=0.1, multi_topk=False)),
    ("mutual_choice", dict(aux="zipf", tau=0.5)), ("abstopk", dict(over="token")),
    ("feature_choice", dict(budget="uniform", alpha=1.0, q=0.0, m_min=1, rerank=1000)),
    ("jumprelu", dict(penalty="target")), ("topafa", dict(k_max=None)), ("vsae", dict(k_start=3))])
def test_files_with_settings_that_are_gone_are_read(tmp_path, variant, former):
    model = make(variant=variant)
    save_sae(model, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | former))
    loaded = load_sae(tmp_path)
    assert same(loaded, model, data()) and loaded.hyper == model.hyper


def test_a_threshold_that_nothing_reads_is_left_in_older_files_of_abstopk(tmp_path):
    model = make(variant="abstopk")
    assert "threshold" not in model.state_dict()
    save_sae(model, tmp_path)
    weights = tmp_path / "sae.safetensors"
    save_file(load_file(weights) | {"threshold": torch.tensor(0.5)}, weights)
    assert same(load_sae(tmp_path), model, data())
    save_sae(make(), tmp_path / "topk")      # elsewhere it is as unexpected as before
    weights = tmp_path / "topk" / "sae.safetensors"
    save_file(load_file(weights) | {"threshold": torch.tensor(0.5)}, weights)
    with pytest.raises(ValueError, match="unexpected threshold"):
        load_sae(tmp_path / "topk")


def test_a_setting_that_is_gone_is_refused_where_codes_depended_on_it(tmp_path):
    save_sae(make(variant="abstopk"), tmp_path)
    edit(tmp_path / "cfg.json", over="batch")
    with pytest.raises(ValueError, match="cfg.json: 'over' = 'batch' is not supported"):
        load_sae(tmp_path)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_without_rounding_the_threshold(tmp_path, half):
    model, x = make(variant="batchtopk", dtype=half), data()
    model.threshold = torch.tensor(0.3)      # between two numbers of half precision
    save_sae(model, tmp_path)
    kinds = {t.dtype for t in load_file(tmp_path / "sae.safetensors").values()}
    assert kinds == {half, torch.float32}
    loaded = load_sae(tmp_path)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    assert loaded.threshold == torch.tensor(0.3)
    assert same(loaded, model.float(), x)


# ---- sparsify's directory ------------------------------------------------------------------------


def write(directory, cfg=None, tensors=None, **changes):
    """A file as sparsify writes it; changes: key=value for cfg.json, key=None leaves it out."""
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
    model.meta = {"site": "resid", "layer": 12, "model": "owner/name", "dtype": "bfloat16",
                  "data": ["a"]}
    save_sae(model, tmp_path / "new" / "sae")
    loaded, x = load_sae(tmp_path / "new" / "sae"), data()
    wide = torch.promote_types(dtype, torch.float32)
    model.to(wide)
    assert torch.equal(loaded.encode(x), model.encode(x)) and torch.equal(loaded(x), model(x))
    assert loaded.W_enc.dtype == loaded.b_dec.dtype == wide
    assert loaded.hyper == model.hyper and loaded.meta == model.meta
    assert (loaded.variant, loaded.d_in, loaded.n_latents) == ("topk", D, F)
    assert sorted(os.listdir(tmp_path / "new" / "sae")) == ["cfg.json", "sae.safetensors"]
    S.train_step(loaded, S.make_optimizer(loaded, "signum"), [x])      # it can be trained further
    assert loaded.tokens_since_fired.max() <= 40


def test_the_file_has_sparsify_keys_and_names(tmp_path):
    save_sae(make(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    want = dict(activation="topk", expansion_factor=2, normalize_decoder=True, num_latents=F, k=K,
                multi_topk=False, skip_connection=False, transcode=False, d_in=D)
    assert {key: cfg[key] for key in want} == want
    found = load_file(tmp_path / "sae.safetensors")
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}


def test_files_as_sparsify_wrote_them_over_the_years(tmp_path):
    x = data()
    years = [{}, dict(activation=None, transcode=None), dict(signed=False),
             dict(num_latents=0, expansion_factor=2), dict(normalize_decoder=False)]
    for i, changes in enumerate(years):
        model = write(tmp_path / str(i), **changes)
        loaded = load_sae(tmp_path / str(i))
        assert torch.equal(loaded.encode(x), model.encode(x)) and torch.equal(loaded(x), model(x))
        assert loaded.meta == {} and loaded.aux_coef == 0
    write(tmp_path / "odd", colour="green")
    assert load_sae(tmp_path / "odd").k == K      # as sparsify's own loader does


def test_a_folder_named_as_sparsify_does_says_where_the_sae_belongs(tmp_path):
    for name, want in [("layers.12.mlp", {"layer": 12, "site": "mlp"}), ("layers.3x", {}),
                       ("layers.12", {"layer": 12, "site": "resid"}), ("layers.mlp", {}),
                       ("h.3.mlp", {"layer": 3, "site": "mlp"}), ("sae_layer_12", {}),
                       ("layers.12.self_attn", {"layer": 12, "site": "self_attn"})]:
        write(tmp_path / name)
        assert load_sae(tmp_path / name).meta == want
        assert load_sae(f"{tmp_path / name}/").meta == want
        assert load_sae(tmp_path, name).meta == load_sae(f"{tmp_path}#{name}").meta == want
    write(tmp_path / "layers.5.mlp", meta={"site": "resid", "model": "a/b"})      # the file wins
    assert load_sae(tmp_path, "layers.5.mlp").meta == {"layer": 5, "site": "resid", "model": "a/b"}


@pytest.mark.parametrize("name, want", [
    ("blocks.3.hook_resid_post", (3, "resid")), ("blocks.3.hook_mlp_out", (3, "mlp")),
    ("blocks.3.hook_resid_pre", (2, "resid")), ("blocks.0.hook_resid_pre", (0, "hook_resid_pre")),
    ("blocks.3.hook_out", (3, "resid")), ("blocks.3.mlp.hook_out", (3, "mlp")),
    ("model.layers.3", (3, "resid")), ("model.layers.3.mlp", (3, "mlp")),
    ("model.language_model.layers.3", (3, "resid")), ("transformer.h.10", (10, "resid")),
    ("gpt_neox.layers.3.mlp", (3, "mlp")), ("h.3", (3, "resid")), ("layers.3", (3, "resid")),
    ("resid_post_layer_3", (3, "resid")), ("mlp_out_layer3", (3, "mlp")),
    ("resid_out_layer3", (3, "resid")),
    ("attention_out_layer_1", (1, "attention_out")), ("resid_pre_layer_3", (2, "resid")),
    ("blocks.3.hook_resid_mid", (3, "hook_resid_mid")), ("h.3.attn", (3, "attn")),
    ("model.layers.3.self_attn.o_proj", (3, "self_attn.o_proj")),
    ("model.layers.3.mlp.gate_proj", (3, "mlp.gate_proj")),
    ("layers.3.mlp.experts.5.h.2", (3, "mlp.experts.5.h.2"))])
def test_names_of_places_in_other_libraries(name, want):
    assert S.find_place(name) == dict(zip(("layer", "site"), want))


def test_names_that_are_no_place_in_a_decoder():
    for name in ("hook_embed", "model.norm", "vision_tower.layers.3", "encoder.layers.3", "layers",
                 "router_layer_1", "sae_layer_3", "layers.-1", "", f"layers.{'1' * 10}"):
        assert S.find_place(name) == {}


def test_every_refusal_names_the_file_and_the_thing(tmp_path):
    nan, inf = torch.full((F,), math.nan), torch.full((D,), math.inf)
    cases = [
        ("cfg.json: not JSON", dict(cfg="{")),
        ("cfg.json: a JSON object was expected, this is a list", dict(cfg="[1]")),
        ("cfg.json: 'meta' should be an object", dict(meta=3)),
        ("meta: 'layer' should be a whole number, it is '3'", dict(meta={"layer": "3"})),
        ("meta: 'site' should be text", dict(meta={"site": 3})),
        ("cfg.json: not JSON: 1e999 is not a finite",
         dict(cfg='{"d_in": 6, "num_latents": 12, "k": 3, "meta": {"sink_norm": 1e999}}')),
        ("cfg.json: activation 'groupmax'", dict(activation="groupmax")),
        ("cfg.json: 'variant' = 'topp' is not supported, only 'relu', ",
         dict(variant="topp", activation="topp")),
        ("cfg.json: activation 'topk' should be 'gated/scale'",
         dict(variant="gated", k=None)),
        ("cfg.json: 'skip_connection' = True is not supported", dict(skip_connection=True)),
        ("cfg.json: 'transcode' = True is not supported", dict(transcode=True)),
        ("cfg.json: 'signed' = True is not supported", dict(signed=True)),
        (": k=13 ", dict(k=13)),
        ("cfg.json: 'k' should be a whole number, it is '3'", dict(k="3")),
        ("cfg.json: no 'k'", dict(k=None)),
        ("cfg.json: no 'd_in'", dict(d_in=None)),
        ("cfg.json: 'd_in' should be a whole number, it is '6'", dict(d_in="6")),
        ("cfg.json: 'd_in' is below 1: 0", dict(d_in=0)),
        ("cfg.json: 'num_latents' is below 0: -1", dict(num_latents=-1)),
        (": n_latents.*0", dict(num_latents=0, expansion_factor=None)),
        (": .*dead_after.*1.5", dict(dead_after=1.5)),
        ("not JSON: Infinity", dict(aux_coef=math.inf)),
        ("sae.safetensors: missing W_dec", dict(tensors={"W_dec": None})),
        ("unexpected W_skip", dict(tensors={"W_skip": torch.zeros(D, D)})),
        ("encoder.weight has shape .6, 12., the config needs .12, 6.",
         dict(tensors={"encoder.weight": torch.zeros(D, F)})),
        ("sae.safetensors: too small for", dict(num_latents=2**62)),      # before it is allocated
        ("'encoder.bias' holds NaN", dict(tensors={"encoder.bias": nan})),
        ("'b_dec' holds NaN or inf", dict(tensors={"b_dec": inf})),
        ("'b_dec' has dtype I64", dict(tensors={"b_dec": torch.zeros(D, dtype=torch.int64)})),
        ("'b_dec' has dtype F8", dict(tensors={"b_dec": torch.zeros(D).to(torch.float8_e5m2)})),
    ]
    for i, (text, changes) in enumerate(cases):
        folder = tmp_path / f"case{i}"
        write(folder, **changes)
        with pytest.raises(ValueError, match=text) as err:
            load_sae(folder)
        assert f"case{i}" in str(err.value) and "\n" not in str(err.value)
    write(tmp_path / "cut")
    weights = tmp_path / "cut" / "sae.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-8], whole[:20], b"", b"not tensors at all"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="sae.safetensors: not a readable safetensors file"):
            load_sae(tmp_path / "cut")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="sae.safetensors: no such file"):
        load_sae(tmp_path / "cut")


def test_a_mixture_of_precisions_is_widened_too(tmp_path):
    for i, dtype in enumerate([torch.float16, torch.float64]):
        b_dec = data(1)[0].to(dtype)
        write(tmp_path / str(i), tensors={"b_dec": b_dec})
        loaded = load_sae(tmp_path / str(i))
        kinds = {t.dtype for t in loaded.state_dict().values()}
        assert kinds == {torch.promote_types(dtype, torch.float32)}
        assert torch.equal(loaded.b_dec, b_dec.to(loaded.b_dec.dtype))


def test_what_the_configuration_claims_takes_no_memory(tmp_path, monkeypatch):
    write(tmp_path, num_latents=10**13)
    monkeypatch.setattr(S.TopK, "__init__", lambda *args: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="too small for n_latents=10000000000000, d_in=6"):
        load_sae(tmp_path)


def test_hookpoints_stay_inside_the_directory(tmp_path):
    model, x = write(tmp_path / "run" / "layers.3.mlp"), data()
    write(tmp_path / "outside")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    assert torch.equal(load_sae(tmp_path / "run", "layers.3.mlp")(x), model(x))
    outside = ("../outside", "layers.3.mlp/../../outside", str(tmp_path / "outside"), "link")
    for bad in outside:
        with pytest.raises(ValueError, match="the subfolder leads out of"):
            load_sae(tmp_path / "run", bad)
    for none in ("layers.4.mlp", "*"):
        with pytest.raises(FileNotFoundError, match="no folder '.*' there"):
            load_sae(tmp_path / "run", none)
    with pytest.raises(FileNotFoundError, match="cfg.json: no such file"):
        load_sae(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nor a hub id"):
        load_sae(tmp_path / "nothing here")


def test_a_hub_id_is_read_from_the_cache_and_refused_in_one_line_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--sae"
    model, x = write(repo / "snapshots" / ("a" * 40) / "layers.0.mlp"), data()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    loaded = load_sae("owner/sae", hookpoint="layers.0.mlp")
    assert torch.equal(loaded(x), model(x)) and loaded.meta == {"layer": 0, "site": "mlp"}
    with pytest.raises(FileNotFoundError, match="owner/absent: no such directory, and the") as err:
        load_sae("owner/absent", hookpoint="layers.0.mlp")
    assert "\n" not in str(err.value)


# ---- saving --------------------------------------------------------------------------------------


def interrupt(monkeypatch, save, crash_at):
    """Runs `save` until its write number `crash_at`, where it is interrupted."""
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
        patch.setattr(files.Path, "unlink", guard(files.Path.unlink))
        patch.setattr(files.Path, "write_text", guard(files.Path.write_text))
        with pytest.raises(KeyboardInterrupt):
            save()


def check_interrupted_saves(folder, monkeypatch, save, load):
    old, new, x = make(seed=1, k=2), make(seed=2, k=3), data()
    seen = set()
    for crash_at in range(5):      # the fifth write puts the configuration in its place
        save(old, folder)
        names = sorted(os.listdir(folder))
        interrupt(monkeypatch, lambda: save(new, folder), crash_at)
        try:
            loaded = load(folder)
            assert same(loaded, old if loaded.k == 2 else new, x)
            seen.add(loaded.k)
        except FileNotFoundError:
            seen.add("refused")
        save(new, folder)  # the next save repairs it
        assert same(load(folder), new, x)
        assert sorted(os.listdir(folder)) == names and len(names) == 2
        assert os.listdir(folder.parent) == [folder.name]      # nothing is left behind
    assert seen == {2, "refused"}
    old.meta = {"data": object()}
    with pytest.raises(TypeError):
        save(old, folder)
    assert same(load(folder), new, x)      # a bad meta is found before files are touched
    shutil.rmtree(folder)


def test_an_interrupted_save_never_loads_mixed(tmp_path, monkeypatch):
    check_interrupted_saves(tmp_path / "sae", monkeypatch, save_sae, load_sae)


def test_a_save_leaves_the_configuration_of_another_layout_alone(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="its cfg.json belongs to other weights"):
        save_sae(make(), tmp_path)
    assert (tmp_path / "cfg.json").read_text() == "{}" and len(os.listdir(tmp_path)) == 2


# ---- golden: sparsify 1.3.3 ----------------------------------------------------------------------

GOLDEN = dict(
    weights={"encoder.weight": [[1, 0, 0, .5], [0, 1, 0, -.5], [-1, .5, 0, 0],
                                [0, 0, 1, .25], [.5, .5, .5, .5], [0, -1, .25, 0]],
             "encoder.bias": [.125, -.25, 0, .5, 0, -.125],
             "W_dec": [[.6, 0, 0, .8], [0, 1, 0, 0], [-.8, .6, 0, 0],
                       [0, 0, 1, 0], [.5, .5, .5, .5], [0, -.96, .28, 0]],
             "b_dec": [.25, -.5, 0, 1]},
    x=[[1, 2, 3, 4], [-1, .5, 0, 1], [0, 0, 0, 0], [.25, -.5, -4, 1], [3, -2, .5, -1]],
    z=[[0, 0, 0, 4.25, 4.625, 0], [0, .75, 1.75, 0, 0, 0], [0, .75, .5, 0, 0, 0],
       [.125, 0, 0, 0, 0, 0], [1.875, 0, 0, 0, 0, 1.5]],
    x_hat=[[2.5625, 1.8125, 6.5625, 3.3125], [-1.15, 1.3, 0, 1], [-.15, .55, 0, 1],
           [.325, -.5, 0, 1.1], [1.375, -1.94, .42, 2.5]],
    fvu=0.8569175601005554)


def test_golden_codes_of_a_sparsify_file(tmp_path):
    (tmp_path / "cfg.json").write_text(
        '{"expansion_factor": 32, "normalize_decoder": true, "num_latents": 6, "k": 2,'
        ' "multi_topk": false, "skip_connection": false, "d_in": 4}')
    save_file({name: torch.tensor(value).float() for name, value in GOLDEN["weights"].items()},
              tmp_path / "sae.safetensors")
    model, x = load_sae(tmp_path), torch.tensor(GOLDEN["x"])
    assert model.encode(x).tolist() == GOLDEN["z"]
    assert torch.allclose(model(x), torch.tensor(GOLDEN["x_hat"]), atol=1e-6)
    assert float(model.loss(x)[1]["fvu"]) == pytest.approx(GOLDEN["fvu"], rel=1e-6)
    save_sae(model, tmp_path / "again")
    assert load_sae(tmp_path / "again").encode(x).tolist() == GOLDEN["z"]


# ---- hostile files -------------------------------------------------------------------------------


def test_hostile_files(tmp_path):
    batch, itda, scaled = dict(variant="batchtopk"), dict(variant="itda"), dict(normalize="scale")
    cases = [
        (batch, dict(num_latents=10**12), {}, "too small for n_latents=1000000000000"),
        (batch, dict(num_latents=None, d_in=[0], expansion_factor=10**12), {}, "'d_in' should be"),
        (batch, dict(num_latents=0, d_in=10**99, expansion_factor=10**99), {}, "more than 64 bits"),
        (batch, dict(variant=["batchtopk"]), {}, "cfg.json: 'variant' = .'batchtopk'. is not"),
        (batch, dict(activation=["batchtopk"]), {}, "cfg.json: 'activation' should be text"),
        (batch, dict(activation="topk"), {}, "activation 'topk' should be 'batchtopk/none'"),
        (scaled, dict(activation="topk"), {}, "activation 'topk' should be 'topk/scale'"),
        (scaled, dict(normalize="none"), {}, "activation 'topk/scale' should be 'topk'"),
        (dict(), dict(normalize="scale"), {}, "activation 'topk' should be 'topk/scale'"),
        (dict(), dict(normalize="huge", activation="topk/huge"), {}, "normalize.*'huge' is not"),
        (dict(), dict(normalize=[1], activation="topk/[1]"), {}, "normalize.*.1. is not"),
        (dict(variant="relu"), dict(l1=10**400), {}, ": int too large|'l1' should be"),
        (dict(variant="matryoshka"), dict(levels=[10**400]), {}, ": int too large|'levels' should"),
        (dict(variant="jumprelu"), {}, {"threshold": torch.ones(())}, "shape .., the config needs"),
        (batch, {}, {"threshold": torch.zeros(F)}, "threshold has shape .12,., the config needs"),
        (batch, {}, {"threshold": torch.tensor(math.nan)}, "'threshold' holds NaN"),
        (batch, {}, {"threshold": torch.tensor(1)}, "'threshold' has dtype I64"),
        (scaled, {}, {"input_scale": torch.zeros(())}, "input_scale is not above 0"),
        (scaled, {}, {"input_scale": torch.tensor(-1.0)}, "input_scale is not above 0"),
        (itda, {}, {"n_atoms": torch.tensor(F + 1)}, "n_atoms is out of range"),
        (itda, {}, {"n_atoms": torch.tensor(-1)}, "n_atoms is out of range"),
        (itda, {}, {"label": torch.zeros(F)}, "'label' has dtype F32"),
        (dict(), {}, {"k": torch.tensor(K)}, "unexpected k")]
    for i, (hyper, cfg, tensors, text) in enumerate(cases):
        folder = tmp_path / str(i)
        save_sae(make(**hyper), folder)
        edit(folder / "cfg.json", **cfg)
        weights = folder / "sae.safetensors"
        save_file(load_file(weights) | tensors, weights)
        with pytest.raises(ValueError, match=text) as err:
            load_sae(folder)
        assert str(folder) in str(err.value) and "\n" not in str(err.value), text
    (folder / "cfg.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="cfg.json: not JSON"):
        load_sae(folder)


# ---- live: sparsify, where installed -------------------------------------------------------------


def test_our_file_loads_in_sparsify_and_theirs_here(tmp_path):
    sparsify = pytest.importorskip("sparsify")
    model, x = make(aux_coef=0.1), data()
    model.meta = {"site": "resid", "layer": 12}
    save_sae(model, tmp_path / "ours")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    for back in (theirs, None):
        if back is None:  # and the other way: what they write, we read
            theirs.save_to_disk(tmp_path / "theirs")
            model = load_sae(tmp_path / "theirs")
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
    save_sae(model, tmp_path)
    if variant in ("topk", "gsae") and normalize == "none":
        values, index, _ = sparsify.SparseCoder.load_from_disk(tmp_path).encode(x)
        codes = torch.zeros(len(x), F).scatter(1, index, values)
        assert torch.allclose(model.encode(x), codes, atol=1e-6)
    else:
        for decoder in (True, False):      # False: it checks no tensors, the activation must tell
            with pytest.raises(TypeError, match="Expected one of .*groupmax.*topk"):
                sparsify.SparseCoder.load_from_disk(tmp_path, decoder=decoder)
        edit(tmp_path / "cfg.json", activation=None)      # older versions do not look at it
        with pytest.raises((RuntimeError, TypeError)):
            sparsify.SparseCoder.load_from_disk(tmp_path)


@pytest.mark.parametrize("changes, refused", [
    (dict(num_latents=0, expansion_factor=2), None), (dict(multi_topk=True), None),
    (dict(normalize_decoder=False), None),
    (dict(activation="groupmax"), "activation 'groupmax' should be 'topk'"),
    (dict(skip_connection=True), "'skip_connection' = True is not supported"),
    (dict(transcode=True), "'transcode' = True is not supported")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_every_setting_of_sparsify_load_or_are_refused(tmp_path, changes, refused, dtype):
    sparsify = pytest.importorskip("sparsify")
    cfg = sparsify.SparseCoderConfig(**dict(num_latents=F, k=K) | changes)
    theirs, rng = sparsify.SparseCoder(D, cfg, dtype=dtype), torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=rng).mul(0.5).to(dtype)
    theirs.save_to_disk(tmp_path)
    if refused:
        with pytest.raises(ValueError, match=refused):
            load_sae(tmp_path)
        return
    model, x, theirs = load_sae(tmp_path), data(), theirs.float()
    values, index, _ = theirs.encode(x)
    codes = torch.zeros(len(x), F).scatter(1, index, values)
    assert torch.allclose(model.encode(x), codes, atol=1e-5)
    assert torch.allclose(model(x), theirs.decode(values, index), atol=1e-5)
