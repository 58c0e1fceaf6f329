"""--layer 4,8,12: an SAE for each, from one pass of the model, each as if it were alone."""
import json

import pytest
import torch
from safetensors.torch import load_file

import model
import resa
import sae
import train
from data import runs
from data.formats import load_any
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json@4"
FEW = ["--preset", "tiny", "--source", RANDOM, "--seq-len", "64", "--batch", "4", "--latents", "64", "--lr", "0.01",
       "--log-every", "1", "--steps", "4", "--device", "cpu"]


def run(out, data, *words):
    train.main(["--stage", "sae", "--data", str(data), *FEW, "--out", str(out), *map(str, words)])
    return out


def tensors(folder):
    return load_file(folder / "sae.safetensors")


@pytest.mark.parametrize("flags", ["--k 4", "--variant batchtopk --k 4", "--variant gsae --k 4 --micro-batch 2", "--variant relu",
                                   "--optimizer signum --k 4", "--k 4 --aux-coef 1 --dead-after 1", "--site mlp --k 4 --sink-norm 1.5",
                                   "--variant itda", "--variant vsae --k 4"])
def test_several_layers_are_the_saes_of_one_run_each(flags, data, tmp_path):
    flags = flags.split()
    out = run(tmp_path / "all", data, *flags, "--layer", "0,2,3")
    summary, log = json.loads((out / "summary.json").read_text()), (out / "metrics.jsonl").read_text().splitlines()
    for layer in (0, 2, 3):
        alone = run(tmp_path / str(layer), data, *flags, "--layer", layer)
        folder = out / (f"layers.{layer}.mlp" if "mlp" in flags else f"layers.{layer}")
        a, b = tensors(alone), tensors(folder)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.allclose(a[name].float(), b[name].float(), atol=1e-6), name
        assert (alone / "cfg.json").read_text() == (folder / "cfg.json").read_text()
        own = json.loads((alone / "summary.json").read_text())
        for name in ("fvu", "l0", "ce_sae", "kl", "left_out"):
            assert summary[f"{name}.{layer}"] == pytest.approx(own[name], rel=1e-4), name
        for row, other in zip(map(json.loads, log), map(json.loads, (alone / "metrics.jsonl").read_text().splitlines())):
            assert row[f"fvu.{layer}"] == pytest.approx(other["fvu"], rel=1e-4)
    assert not (out / "cfg.json").exists() and "fvu" not in summary
    assert load_any(f"{out}#{folder.name}").meta["layer"] == 3


def test_one_pass_reads_all_layers(monkeypatch):
    lm, ids = model.load_model(RANDOM), torch.arange(12)[None]
    calls, forward = [], model.Block.forward

    def counted(self, *args):
        calls.append(1)
        return forward(self, *args)
    monkeypatch.setattr(model.Block, "forward", counted)
    found = resa.activations(lm, ids, [2, 0])
    assert len(calls) == 3                       # blocks 0, 1, 2, once
    assert all(torch.equal(x, resa.activations(lm, ids, n)) for n, x in zip([2, 0], found))


def test_it_goes_on_where_it_was_killed(data, tmp_path):
    whole = run(tmp_path / "whole", data, "--layer", "0,2", "--k", 4)
    end_step = runs.Run.end_step

    def stop(self, step, *rest):
        end_step(self, step, *rest)
        if step == 1:
            raise InterruptedError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "end_step", stop)
        with pytest.raises(InterruptedError):
            run(tmp_path / "part", data, "--layer", "0,2", "--k", 4, "--save-every", 1)
    out = run(tmp_path / "part", data, "--layer", "0,2", "--k", 4, "--resume")
    for folder in ("layers.0", "layers.2"):
        assert (out / folder / "sae.safetensors").read_bytes() == (whole / folder / "sae.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a finished run"):
        run(out, data, "--layer", "0,2", "--k", 4)


def test_fine_tuning_starts_from_the_sae_of_each_layer(data, tmp_path):
    first = run(tmp_path / "first", data, "--layer", "0,2", "--k", 4)
    words = [word for word in " ".join(FEW).replace("--latents 64 ", "").split()]
    train.main(["--stage", "sae", "--data", str(data), *words, "--layer", "0,2", "--init", "finetune", "--sae-from", str(first),
                "--out", str(tmp_path / "more")])
    for layer in (0, 2):
        a, b = tensors(first / f"layers.{layer}"), tensors(tmp_path / f"more/layers.{layer}")
        assert 0 < (a["W_dec"] - b["W_dec"]).abs().max() < 0.2
    with pytest.raises(FileNotFoundError, match="layers.3"):
        train.main(["--stage", "sae", "--data", str(data), *words, "--layer", "0,3", "--init", "finetune", "--sae-from",
                    str(first), "--out", str(tmp_path / "none")])


def test_noise_of_saes_from_files_is_refused_too(data, tmp_path):
    for layer in (0, 2):
        noisy = sae.build("vsae", 128, 64, k=4, sample="unit")
        noisy.meta = {"layer": layer, "site": "resid"}
        sae.save_sae(noisy, tmp_path / f"saes/layers.{layer}")
    words = " ".join(FEW).replace("--latents 64 ", "").split()
    with pytest.raises(ValueError, match="vsae with sample=unit draws noise in every step"):
        train.main(["--stage", "sae", "--data", str(data), *words, "--layer", "0,2", "--init", "finetune", "--sae-from",
                    str(tmp_path / "saes"), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_folder_of_saes_needs_to_know_the_site(data, tmp_path):
    first = run(tmp_path / "first", data, "--layer", "0,2", "--k", 4, "--site", "mlp")
    words = [word for word in " ".join(FEW).replace("--latents 64 ", "").replace("--preset tiny", "--preset own").split()]
    go = ["--stage", "sae", "--data", str(data), *words, "--layer", "0,2", "--init", "finetune", "--sae-from", str(first), "--out"]
    with pytest.raises(ValueError, match="--sae-from with several --layer needs --site"):
        train.main([*go, str(tmp_path / "o")])
    train.main([*go, str(tmp_path / "o"), "--site", "mlp"])
    assert (tmp_path / "o/layers.2.mlp/cfg.json").exists()


@pytest.mark.parametrize("words, said", [
    (["--layer", "0,9"], "layer 9: this model has blocks 0 .. 3"), (["--layer", "1,1"], "1,1 names a block twice"),
    (["--layer", "1,"], "--layer"), (["--layer", "x"], "--layer"), (["--layer", "-1"], "--layer"),
    (["--layer", "0,1", "--variant", "vsae", "--set", "sample=unit"], "give it one --layer at a time"),
])
def test_what_cannot_work_is_one_line(words, said, data, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "o", data, "--k", 4, *words)
    assert not (tmp_path / "o").exists()


def test_tune_takes_one_layer_and_finds_it_by_the_folder(data, tmp_path):
    out = run(tmp_path / "all", data, "--layer", "0,2", "--k", 4)
    words = ["--stage", "tune", "--target", RANDOM, "--data", str(data), "--seq-len", "64", "--steps", "1", "--device", "cpu"]
    train.main([*words, "--preset", "own", "--sae", f"{out}#layers.2", "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a/config.json").read_text())["settings"]["layer"] == 2
    with pytest.raises(ValueError, match="--layer 0,2: --stage tune takes one"):
        train.main([*words, "--preset", "own", "--layer", "0,2", "--sae", f"{out}#layers.2", "--out", str(tmp_path / "b")])
