"""LoRA adapters in PEFT's files (arXiv 2106.09685): what they change, by how much.

    adapter = read_adapter("out/tiny/adapter")        adapter["pairs"]["model.layers.0.mlp.up_proj"]

What PEFT computes otherwise (DoRA, biases, changed base weights) is refused by name.
r rank; A (r,in), B (out,r).
"""

import math
import re
from pathlib import Path

import numpy as np

from data.files import (
    FLOATS, REQUIRED, base_name, check, check_finite, locate, open_tensors, read_fields,
    read_json, refuse_unknown, relative, say_once, shorten)

ALPHA, RANK = ((int, float), -1e30, 1e30), (int, 1, None)
WORDS, PATTERNS = ((str, [str]), None, None, []), (dict, None, None, {})
ADAPTER_FIELDS = {
    "peft_type": (("LORA",), None, None, REQUIRED), "r": (*RANK, REQUIRED),
    "lora_alpha": (*ALPHA, REQUIRED), "use_rslora": (bool, None, None, False),
    "rank_pattern": PATTERNS, "alpha_pattern": PATTERNS,         # r and lora_alpha of some modules
    "target_modules": WORDS, "exclude_modules": WORDS, "layers_pattern": WORDS,
    "layers_to_transform": ((int, [int]), None, None, []),
    "base_model_name_or_path": (str, None, None, None),
    "lora_dropout": ((int, float), 0, 1, 0.0), "bias": (("none",), None, None, "none"),
    # Those left out (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base weights too.
    "init_lora_weights": ((True, False, "gaussian", "eva", "orthogonal", "mica"), None, None, True),
}

# Not used, or only with another field, which is refused
HARMLESS = """auto_mapping revision inference_mode peft_version task_type megatron_core
    loftq_config eva_config corda_config lora_ga_config qalora_group_size
    ensure_weight_tying""".split()

def peft_base(spec):
    """A model spec -> the fields by which PEFT finds the base of an adapter, {} if it could not."""
    spec = str(spec)
    if Path(spec.partition("#")[0]).is_dir():
        return {"base_model_name_or_path": relative(locate(spec).resolve())}
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec)      # no folder, no adapter
    found = zip(("base_model_name_or_path", "revision"), hub.groups() if hub else ())
    return {field: value for field, value in found if value}

def note_base(adapter, path, base):
    """Says so if an adapter was trained on another base than the one it is put on."""
    theirs, ours = base_name(adapter["base_model_name_or_path"] or ""), base_name(base)
    if theirs and theirs != ours:
        say_once(f"{path}: an adapter trained on {shorten(theirs)}, put on {shorten(ours)}")

def lora_scale(alpha, r, rslora):
    """The factor of B A: alpha / r, or alpha / sqrt(r), rank-stabilised (arXiv 2312.03732)."""
    return alpha / (math.sqrt(r) if rslora else r)

def name_pattern(words):
    """PEFT's rule for names as a regular expression: a text is one, a list holds ends of names."""
    return words if isinstance(words, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, words))})"

def selection(adapter):
    """A regular expression for the linear layers that an adapter_config.json selects."""
    pattern, layers = name_pattern(adapter["target_modules"]), adapter["layers_to_transform"]
    if pattern.lower() == "all-linear":
        pattern = r"model\.layers\..+"       # all but the head
    if layers != []:
        numbers = "|".join(map(str, np.atleast_1d(layers)))
        lists = "|".join(np.atleast_1d(adapter["layers_pattern"] or "layers"))
        pattern = rf"(?=(?:.*\.)?(?:{lists})\.(?:{numbers})\.)(?:{pattern})"
        if isinstance(adapter["target_modules"], list):      # a full name counts in any layer
            pattern = "|".join([*map(re.escape, adapter["target_modules"]), pattern])
    return rf"(?!(?:{name_pattern(adapter['exclude_modules'])})$)(?:{pattern})"

def value_for(module, patterns, default):
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""
    found = (v for text, v in patterns.items() if re.fullmatch(rf"(.*\.)?({text})", module))
    return next(found, default)

def read_adapter(spec):
    """A PEFT LoRA adapter (arXiv 2106.09685) -> dict of ADAPTER_FIELDS, `selects` (see above),
    pairs {layer: [A (r,in), B (out,r)]}, alphas {layer: lora_alpha}, scales {layer: factor of B A}.
    ValueError names what is not supported."""
    path = locate(spec) / "adapter_config.json"
    raw = read_json(path)
    adapter = read_fields(raw, ADAPTER_FIELDS, path)
    refuse_unknown(raw, {*ADAPTER_FIELDS, *HARMLESS}, path)
    ranks, alphas = adapter["rank_pattern"], adapter["alpha_pattern"]
    read_fields(ranks, dict.fromkeys(ranks, (*RANK, REQUIRED)), f"{path}: rank_pattern")
    read_fields(alphas, dict.fromkeys(alphas, (*ALPHA, REQUIRED)), f"{path}: alpha_pattern")
    adapter |= {"selects": selection(adapter), "pairs": {}, "alphas": {}, "scales": {}}
    texts = adapter["target_modules"], adapter["exclude_modules"], *ranks, *alphas
    for text in (*texts, *np.atleast_1d(adapter["layers_pattern"])):
        if isinstance(text, str):            # a search that goes back and forth may never end
            often = len(re.findall(r"[*+{]|[^(*+}]\?", text)) > 5 or text.count("|") > 20
            check(not often and not re.search(r"\)[*+{]", text),
                  f"{path}: a pattern with too many repeats: {shorten(text)}")
    try:
        for text in adapter["selects"], *ranks, *alphas:
            re.compile(f"({text})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: a name is not a regular expression ({error})") from None
    path = path.with_name("adapter_model.safetensors")
    with open_tensors([path], FLOATS) as found:
        for name in sorted(found):           # A of a layer, then its B
            match = re.fullmatch(r"base_model\.model\.(model\..+)\.lora_([AB])\.weight", name)
            check(match, f"{path}: {name} is not named base_model.model.model. .. .lora_A.weight: "
                  "only LoRA of the blocks' linear layers is read, without prefixes of wrappers, "
                  "not biases, weights of embeddings (save_embedding_layers) or lm_head")
            r, shape = value_for(match[1], ranks, adapter["r"]), found[name].get_shape()
            check(len(shape) == 2 and shape["AB".index(match[2])] == r and 0 not in shape,
                  f"{path}: {name} of shape {shape} is not a LoRA matrix of rank {r}")
            adapter["pairs"].setdefault(match[1], []).append(found[name][:].float())
            check_finite(adapter["pairs"][match[1]][-1], f"{path}: {name}")
    for name, pair in adapter["pairs"].items():
        check(len(pair) == 2, f"{path}: {name} has only one of lora_A and lora_B")
        alpha = adapter["alphas"][name] = value_for(name, alphas, adapter["lora_alpha"])
        adapter["scales"][name] = lora_scale(alpha, len(pair[0]), adapter["use_rslora"])
    return adapter
