"""The README's section "Your own model", as written: from a foreign model, adapter, SAE and file to what others load."""
import json
import re
import shlex
import shutil

import pytest
import torch

import model
import resa
import sae
from data import formats
from data.files import read_json, write_json
from tests.conftest import ROOT
from tests.test_commands import run

INIT = ROOT / "data/tiny/init"


def section():
    """The command lines of the section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own model\n")[1].split("\n## ")[0]
    return [shlex.split(line)[1:] for line in re.search(r"```\n(.*?)```", text, re.S)[1].splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with MODEL, ADAPTER, SAE, train.jsonl and test.jsonl, made by the libraries they are named after
    where these are installed."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(INIT, home / "init")
    write_json(home / "init/config.json", read_json(INIT / "config.json") | {
        "hidden_size": 48, "head_dim": 12, "num_hidden_layers": 5, "max_position_embeddings": 128})
    model.save_model(model.load_model(f"random:{home}/init/config.json@9"), home / "MODEL")
    for path in INIT.glob("*token*"):
        shutil.copy(path, home / "MODEL")
    make_adapter(home)
    make_sae(home)
    for name, count in (("train", 60), ("test", 8)):
        rows = [{"question": f"What is {i} and {i + 4} together?", "gold": str(2 * i + 4)} for i in range(count)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def make_adapter(home):
    try:
        import peft
        import transformers
    except ImportError:
        lm = resa.add_lora(model.load_model(str(home / "MODEL")), 4, 8, targets=["q_proj", "down_proj"])
        for layer in resa.lora_layers(lm).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        return resa.save_adapter(lm, home / "ADAPTER", home / "MODEL")
    lm = transformers.AutoModelForCausalLM.from_pretrained(home / "MODEL")
    lm = peft.get_peft_model(lm, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return lm.save_pretrained(home / "ADAPTER")


def make_sae(home):
    try:
        import sae_lens
    except ImportError:
        made = sae.build("topk", 48, 96, k=8)
        made.meta = {"layer": 2, "site": "resid"}
        return formats.save_saelens(made, home / "SAE")
    config = sae_lens.TopKSAEConfig(d_in=48, d_sae=96, k=8, metadata=sae_lens.saes.sae.SAEMetadata(
        hook_name="blocks.2.hook_resid_post", model_name="MODEL"))
    theirs = sae_lens.TopKSAE(config)
    torch.nn.init.normal_(theirs.W_enc, std=0.1)
    with torch.no_grad():
        theirs.W_dec.copy_(torch.nn.functional.normalize(theirs.W_enc.T, dim=1))
    return theirs.save_model(home / "SAE")


@pytest.fixture(scope="module")
def said(home):
    """{script: what it printed}: the section, run as written."""
    printed = {}
    for words in section():
        done = run(home, *words)
        assert done.returncode == 0, done.stderr
        key = words[words.index("--out") + 1]
        printed[key] = done.stdout + done.stderr
    return printed


def test_the_section_ends_in_a_table(said):
    table = said["out/my"]
    lines = [line for line in table.splitlines() if line.startswith("MODEL")]
    assert [line.split()[0] for line in lines if "8 x 1" in line] == [
        "MODEL", "MODEL+out~my~adapter", "MODEL+out~my~other"]
    assert "Asked (chat): PROBLEM Give the final answer within \\boxed{}." in table
    assert "by rule" in said["out/my/sae"] and "layer 2 (3/7 of 5 blocks" in " ".join(said["out/my/sae"].split())
    assert "layer 2 (the SAE's)" in " ".join(said["out/my/other"].split())
    assert "kl_unspliced_after" in said["out/my/adapter"]


def test_the_merged_model_is_the_adapted_one_for_transformers_too(home, said):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = model.load_model(f"{home}/MODEL+{home}/out/my/adapter")(ids)
        base = model.load_model(f"{home}/MODEL")(ids)
        merged = model.load_model(f"{home}/out/my/merged")(ids)
        assert torch.allclose(ours, merged, atol=1e-5) and not torch.allclose(ours, base, atol=1e-3)
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(home / "out/my/merged", dtype="float32")(ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_the_sae_loads_in_sparsify(home, said):
    sparsify = pytest.importorskip("sparsify")
    x, ours = torch.randn(5, 48), sae.load_sae(home / "out/my/sae")
    theirs = sparsify.SparseCoder.load_from_disk(home / "out/my/sae", device="cpu")
    assert torch.allclose(theirs(x).sae_out, ours(x), atol=1e-5)


def test_the_sae_loads_in_saelens(home, said):
    sae_lens = pytest.importorskip("sae_lens")
    x, ours = torch.randn(5, 48), sae.load_sae(home / "out/my/sae")
    theirs = sae_lens.SAE.load_from_disk(str(home / "out/my/lens"), device="cpu")
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
