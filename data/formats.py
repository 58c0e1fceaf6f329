"""SAEs of other projects: SAELens, dictionary_learning and OpenAI.

    sae = load_any("DIR_OR_HUB_ID#layers.12.mlp")      any layout, ours and sparsify's included
    save_saelens(sae, "out/lens")                      what SAELens 6 can compute
    python -m data.formats --sae DIR_OR_HUB_ID --out DIR --layout saelens | sparsify

The files in a directory tell the layout.  Where another project computes something else, as an
encoder that reads x instead of x - b_dec, or atoms whose norms scale the codes, the weights are
changed on reading so that codes and reconstructions stay the same.  No pickle is ever loaded.
D width (d_in), F latents (n_latents).
"""

import re
import shlex

import torch

from data.files import (
    REQUIRED, check, check_new, locate, one_writer, open_tensors, read_fields, read_json)
from data.flags import Parser, front_door, parse
from sae import (VARIANTS, Chosen, complete_meta, find_place, load_sae, read_sae, save_sae,
                 write_sae)

LAYOUTS = {                              # layout -> its configuration, its weights
    "sparsify": ("cfg.json", "sae.safetensors"),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.safetensors")}      # and OpenAI's, once converted
# Kinds of fields, as `read_fields` takes them.
SIZE, MAYBE_K = (int, 1, None, REQUIRED), (int, 1, None, None)
MAYBE_TEXT, MAYBE_DICT = (str, None, None, None), (dict, None, None, None)

# ---- Any layout --------------------------------------------------------------------------------

@torch.no_grad()
def load_any(directory_or_hub_id, hookpoint=None):
    """Reads an SAE of any layout -> SAE on the CPU, in at least fp32.
    hookpoint: the subfolder that holds it; DIRECTORY_OR_HUB_ID#HOOKPOINT means the same.
    meta gets site, layer and model as far as the file, or a folder's name like layers.12.mlp, says.
    ValueError names the file and what is wrong.  FileNotFoundError: no SAE, or no hub."""
    spec = f"{directory_or_hub_id}#{hookpoint}" if hookpoint else str(directory_or_hub_id)
    folder = locate(spec)
    layout = find_layout(folder)
    if layout == "sparsify":
        return load_sae(spec)
    read = read_saelens if layout == "saelens" else read_dictionary_learning
    sae = read(*(folder / name for name in LAYOUTS[layout]))
    if hasattr(sae, "threshold"):        # below 0 theirs does nothing: codes are rectified as well
        sae.threshold.clamp_(min=0)
    said = {name: value for name, value in sae.meta.items() if value is not None}
    sae.meta = complete_meta(said, spec)
    return sae

# OpenAI's pickle also holds the settings: where there is no config.json, they become one.
CONVERT = ("import json, os, sys, torch; from safetensors.torch import save_file; "
           "s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
           "t = {k: v.contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}; "
           "save_file(t, 'ae.safetensors'); os.path.exists('config.json') or "
           "json.dump({'shape': s['encoder.weight'].shape, "
           "**{k: s[k] for k in s.keys() - t.keys()}}, open('config.json', 'x'))")

def find_layout(folder):
    """The name of the one layout whose files are in a directory.  A pickle: how to convert it."""
    there = [layout for layout, names in LAYOUTS.items()
             if all((folder / name).is_file() for name in names)]
    if len(there) == 1:
        return there[0]
    both = " and ".join(f"{layout} ({', '.join(LAYOUTS[layout])})" for layout in there)
    check(not there, f"{folder}: holds the files of {both}: keep those of one")
    pickles, config = sorted(path.name for path in folder.glob("*.pt")), folder / "config.json"
    if config.is_file() and "trainer" in read_json(config):
        pickles.append("ae.pt")          # on a hub, from which pickles are not even fetched
    if pickles:
        raise ValueError(f"{folder}: {pickles[0]} is a pickle, which can run any code when it is "
                         "loaded, so it is not; this makes safetensors of it, in that directory: "
                         f'python -c "{CONVERT}" {shlex.quote(pickles[0])}')
    weights = " or ".join(name for _, name in LAYOUTS.values())
    raise FileNotFoundError(f"{folder}: no SAE there, that is {weights} with its configuration; "
                            "name a hookpoint that has one, like layers.12.mlp")

def hyper_of(variant, n_latents, normalize="none", rows="free", **said):
    """What a file says -> those settings that the variant has.  rows="free": atoms of any norm."""
    said |= {"normalize": normalize, "rows": rows}
    if variant == "jumprelu":            # its k only steers training
        said["k"] = min(32, n_latents)
    return {name: said[name] for name in VARIANTS[variant].defaults if name in said}

def stated_place(name):
    """What a file calls the place of its SAE -> layer and site as far as we know them.
    An unknown name stays the site: train.py then refuses the SAE at any of ours."""
    return (find_place(name) or {"site": name}) if name else {}

def move_bias(sae):
    """For an encoder that reads x: pre = x W_enc' + b_enc = (x - b_dec) W_enc' + new b_enc."""
    shift = sae.W_enc @ sae.b_dec                                               # (F,)
    sae.b_enc += shift
    if sae.variant == "gated":
        sae.b_mag += sae.r_mag.exp() * shift                                    # (F,)

# ---- SAELens -----------------------------------------------------------------------------------

BARE = {"W_enc": "W_enc.T"}              # our name -> name in the file, .T: stored transposed
ARCHITECTURES = {                        # -> our variant, names, tensors that others do not have
    "standard": ("relu", BARE, ()), "topk": ("topk", BARE, ()), "abstopk": ("abstopk", BARE, ()),
    "jumprelu": ("jumprelu", BARE, ("threshold",)),
    "gated": ("gated", BARE | {"b_enc": "b_gate"}, ("r_mag", "b_mag")),
    # Only while they train, in checkpoints; exported, they are jumprelu.
    "batchtopk": ("batchtopk", BARE | {"threshold": "topk_threshold"}, ()),
    "matryoshka_batchtopk": ("matryoshka", BARE | {"threshold": "topk_threshold"}, ())}
EXPORTS = {                              # our variant -> what it is at inference
    "relu": "standard", "gated": "gated", "topk": "topk", "gsae": "topk", "vsae": "topk",
    "abstopk": "abstopk", "jumprelu": "jumprelu", "batchtopk": "jumprelu",
    "matryoshka": "jumprelu", "mutual_choice": "jumprelu", "feature_choice": "jumprelu"}
NORMALIZE = {                            # -> our word; booleans are from before version 6
    "none": "none", False: "none", "layer_norm": "token",
    "expected_average_only_in": "scale", True: "scale"}
HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out"}        # our site -> its hook
NAMES = {"hook_name": (str, None, 200, None), "hook_point": (str, None, 200, None),
         "hook_layer": (int, 0, None, None), "model_name": MAYBE_TEXT}

SAELENS = {                              # the fields of cfg.json
    "architecture": (tuple(ARCHITECTURES), None, None, "standard"),
    "d_in": SIZE, "d_sae": SIZE, "metadata": MAYBE_DICT,
    "k": ((int, float), 1, None, None),                    # 32.0 where it is a mean
    "matryoshka_widths": ([int], 1, None, []),
    "normalize_activations": (tuple(NORMALIZE), None, None, "none"),
    "apply_b_dec_to_input": (bool, None, None, True),
    "rescale_acts_by_decoder_norm": (bool, None, None, False),
    "reshape_activations": (("none",), None, None, "none"),
    "finetuning_scaling_factor": ((False,), None, None, False),
    "activation_fn": (("relu", "topk"), None, None, None),
    # Before version 6, topk was an activation function and "metadata" lay among the fields.
    "activation_fn_str": (("relu", "topk"), None, None, "relu"),
    "activation_fn_kwargs": MAYBE_DICT} | NAMES
SCALER = {"scaling_factor": (float, 1e-30, 1e30, REQUIRED)}        # of activation_scaler.json

def read_saelens(config, weights):
    cfg = read_fields(read_json(config), SAELENS, config)
    kind = cfg["architecture"]
    if (cfg["activation_fn"] or cfg["activation_fn_str"]) == "topk":
        kind = "topk"
        cfg |= read_fields(cfg["activation_fn_kwargs"] or {}, {"k": MAYBE_K}, config)
    normalize = NORMALIZE[cfg["normalize_activations"]]
    variant, names, _ = ARCHITECTURES[kind]
    hyper = saelens_hyper(cfg, variant, "token" if normalize == "token" else "none")
    with open_tensors([weights]) as found:
        logarithm = kind == "jumprelu" and "log_threshold" in found      # older checkpoints
    names = names | {"threshold": "log_threshold"} if logarithm else names
    sae = read_sae(weights, variant, cfg["d_in"], cfg["d_sae"], hyper, names, ["scaling_factor"])
    if logarithm:
        check(sae.threshold.exp_().isfinite().all(), f"{weights}: 'log_threshold' is too large")
    if normalize == "scale":             # by how much, a file beside the weights says
        path, sae.normalize = config.with_name("activation_scaler.json"), normalize
        scale = read_fields(read_json(path), SCALER, path)["scaling_factor"]
        sae.register_buffer("input_scale", torch.tensor(scale))
    if not cfg["apply_b_dec_to_input"]:
        move_bias(sae)
    if isinstance(sae, Chosen) and cfg["rescale_acts_by_decoder_norm"]:
        sae.fold_rows_()                 # their codes are ours times the norms of the atoms
    sae.meta = saelens_meta(cfg, config)
    return sae

def saelens_hyper(cfg, variant, normalize):
    k, edges = cfg["k"], [0, *cfg["matryoshka_widths"]]
    if k is not None and k % 1 == 0:     # BatchTopK's is a mean, 32.0; ours are whole
        k = int(k)
    if edges[-1] != cfg["d_sae"]:        # the last level is all latents, said or not
        edges.append(cfg["d_sae"])
    levels = [high - low for low, high in zip(edges, edges[1:])]
    return hyper_of(variant, cfg["d_sae"], normalize, k=k, levels=levels)

def saelens_meta(cfg, config):
    """Where the SAE belongs, in our words, and whatever else its "metadata" says."""
    meta = {name: value for name, value in (cfg["metadata"] or {}).items()
            if value is not None and not name.startswith("sae_lens_")}
    said = read_fields(cfg | meta, NAMES, f"{config}: metadata")
    name, layer = said["hook_name"] or said["hook_point"] or "", said["hook_layer"]
    place = stated_place(name)
    if layer is not None and "layer" in place:
        check(re.search(rf"\b{layer}\b", name), f"{config}: hook_layer {layer}, but {name!r}")
    elif layer is not None:
        place["layer"] = layer
    meta = {name: value for name, value in meta.items() if name not in NAMES}
    return meta | place | {"model": said["model_name"]}

def save_saelens(sae, directory):
    """Writes cfg.json and sae_weights.safetensors, for SAELens 6.
    An input scale goes into the weights; one threshold for all becomes one for each latent.
    ValueError, and nothing is written, for what SAELens cannot express."""
    kind = EXPORTS.get(sae.variant)
    check(kind and sae.normalize != "unit", f"SAELens cannot express {sae.variant} with normalize="
          f"{sae.normalize!r}; the layout 'sparsify' holds everything")
    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    factors, tensors = {}, {}
    if sae.normalize == "scale":         # (s x - b) W' = (x - b/s) (s W)'
        scale = sae.input_scale.to("cpu", dtype)
        factors = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    _, names, more = ARCHITECTURES[kind]                                        # at inference
    for ours in ("W_enc", "b_enc", "W_dec", "b_dec", *more):
        tensor = getattr(sae, ours).detach().to("cpu", dtype) * factors.get(ours, 1)
        if ours == "threshold":
            tensor = tensor.expand(sae.n_latents)                               # (F,)
        name = names.get(ours, ours)
        tensors[name.removesuffix(".T")] = tensor.T if name.endswith(".T") else tensor
    cfg = {"architecture": kind, "d_in": sae.d_in, "d_sae": sae.n_latents, "device": "cpu",
           "metadata": to_saelens_meta(sae), "dtype": str(dtype).removeprefix("torch."),
           "normalize_activations": "layer_norm" if sae.normalize == "token" else "none",
           "apply_b_dec_to_input": True, "reshape_activations": "none"}
    if kind in ("topk", "abstopk"):
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_sae(directory, "sae_weights.safetensors", cfg, tensors)

def to_saelens_meta(sae):
    meta = {"training_architecture": sae.variant, **sae.meta, "sae_lens_version": "6.0.0"}
    if "model" in meta:
        meta["model_name"] = meta.pop("model")
    if "layer" in meta and "site" in meta:
        layer, site = meta.pop("layer"), meta.pop("site")
        meta["hook_name"] = f"blocks.{layer}.{HOOKS.get(site, site)}"
    return meta

# ---- dictionary_learning and OpenAI ------------------------------------------------------------

LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
DICTIONARIES = {                         # dict_class -> our variant, names, tensors to ignore
    "AutoEncoder": ("relu", LINEAR | {"b_dec": "bias"}, ()),
    "AutoEncoderNew": ("relu", LINEAR | {"b_dec": "decoder.bias"}, ()),
    "GatedAutoEncoder": ("gated", LINEAR | {"b_enc": "gate_bias", "b_mag": "mag_bias",
                                            "b_dec": "decoder_bias"}, ()),
    "AutoEncoderTopK": ("topk", LINEAR, ("k", "threshold")),
    "BatchTopKSAE": ("batchtopk", LINEAR, ("k",)),
    "JumpReluAutoEncoder": ("jumprelu", BARE, ()),
    "MatryoshkaBatchTopKSAE": ("matryoshka", BARE, ("k", "group_sizes"))}
TRAINER = {                              # the fields of "trainer" in config.json
    "dict_class": (tuple(DICTIONARIES), None, None, REQUIRED),
    "activation_dim": SIZE, "dict_size": SIZE, "k": MAYBE_K,
    "group_sizes": ([float], 1, None, None), "layer": (int, 0, None, None),
    "lm_name": MAYBE_TEXT, "submodule_name": (str, None, 200, None)}
PARTS = {"trainer": (dict, None, None, REQUIRED), "buffer": (dict, None, None, {})}
BUFFER = {"io": (str, None, 200, "out")}      # of "buffer": "out", "in" or "in_and_out"
OPENAI = {                               # the fields of config.json, written by `CONVERT`
    "shape": ([int], 2, 2, REQUIRED), "activation": (("ReLU", "TopK"), None, None, "ReLU"),
    "activation_state_dict": MAYBE_DICT}
OPENAI_STATE = {"k": MAYBE_K, "postact_fn": (("ReLU",), None, None, "ReLU")}

def read_dictionary_learning(config, weights):
    raw = read_json(config)
    if "shape" in raw:
        return read_openai(raw, config, weights)
    parts = read_fields(raw, PARTS, config)
    cfg = read_fields(parts["trainer"], TRAINER, f"{config}: trainer")
    kind, n_latents = cfg["dict_class"], cfg["dict_size"]
    variant, names, ignored = DICTIONARIES[kind]
    if "k" in ignored:                   # there twice: an older file lacks one of them
        with open_tensors([weights]) as found:
            stored = [int(found["k"][...])] if "k" in found and not found["k"].get_shape() else []
        check(not stored or cfg["k"] in (None, *stored), f"{config}: k is {cfg['k']}, but {stored} "
              "in the weights")
        cfg["k"] = cfg["k"] or max(stored, default=None)
    hyper = hyper_of(variant, n_latents, k=cfg["k"], levels=cfg["group_sizes"],
                     rows="unit" if kind == "AutoEncoder" else "free")
    sae = read_sae(weights, variant, cfg["activation_dim"], n_latents, hyper, names, ignored)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):          # they read x
        move_bias(sae)
    if kind == "AutoEncoder":            # as its own loader does
        sae.fold_rows_()
    place, layer = stated_place(cfg["submodule_name"]), cfg["layer"]
    check(layer in (None, place.get("layer", layer)),
          f"{config}: 'layer' is {layer}, but 'submodule_name' is {cfg['submodule_name']!r}")
    sae.meta = {"layer": layer, "model": cfg["lm_name"]} | place
    io = read_fields(parts["buffer"], BUFFER, f"{config}: buffer")["io"]
    if io != "out":                      # what enters that module
        sae.meta["site"] = f"{place.get('site', 'module')} ({io})"
    return sae

def read_openai(raw, config, weights):
    """TopK standardises each token, ReLU does not."""
    cfg = read_fields(raw, OPENAI, config)
    state = read_fields(cfg["activation_state_dict"] or {}, OPENAI_STATE, config)
    names = LINEAR | {"b_enc": "latent_bias", "b_dec": "pre_bias"}
    ignored = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    n_latents, d_in = cfg["shape"]
    variant = cfg["activation"].lower()
    token = "token" if variant == "topk" else "none"
    hyper = hyper_of(variant, n_latents, k=state["k"], normalize=token)
    return read_sae(weights, variant, d_in, n_latents, hyper, names, ignored)

def main(argv):
    parser = Parser("data.formats", "Reads an SAE of any layout and writes it in one of two.",
                    presets=False)
    parser.add_argument("--sae", required=True, help="DIR_OR_HUB_ID[#HOOKPOINT]")
    parser.add_argument("--out", required=True, help="directory to write, a new one")
    parser.add_argument("--layout", choices=("sparsify", "saelens"), default="sparsify",
                        help="sparsify, which is ours, holds all; saelens what it can compute")
    args = parse(parser, argv)
    check_new(args.out, "cfg.json")
    save = save_saelens if args.layout == "saelens" else save_sae
    with one_writer(args.out):
        sae = load_any(args.sae)
        save(sae, args.out)
    kind = f"{sae.variant}, {sae.n_latents:,} latents of width {sae.d_in}"
    print(f"{args.out}: {kind}, as {args.layout}")

if __name__ == "__main__":
    front_door(main)
