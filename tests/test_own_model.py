"""A model and data that are not the project's: what is derived, what is said, what goes on from what is there."""
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model
import resa
import train
from data import flags, runs
from data.files import embedded, read_json, write_json
from tests.conftest import ROOT

INIT = ROOT / "data/tiny/init"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A Qwen2 of 7 blocks, 48 wide, and 200 questions, none of them the project's."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(INIT, folder / "init")
    config = read_json(INIT / "config.json") | {"hidden_size": 48, "num_hidden_layers": 7, "head_dim": 12}
    write_json(folder / "init/config.json", config)
    model.save_model(model.load_model(f"random:{folder}/init/config.json@5"), folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (INIT / name).exists():
            shutil.copy(INIT / name, folder / "model")
    rows = [{"problem": f"What is {a} and {a + 3} together?", "answer": str(2 * a + 3)} for a in range(200)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(stage, own, out, *words):
    """One stage on that model, by its command line."""
    models = {"sae": ["--source"], "pretrain": ["--model"]}.get(stage, ["--target"])
    train.main(["--stage", stage, *models, f"{own}/model", "--data", f"{own}/data.jsonl", "--device", "cpu",
                "--out", str(out), *map(str, words)])
    return out


@pytest.fixture(scope="module")
def sae(own, tmp_path_factory):
    return run("sae", own, tmp_path_factory.mktemp("sae") / "s", "--steps", 3)


def settings_of(out):
    return SimpleNamespace(**read_json(out / "config.json")["settings"])


# ---- what is derived, and said -----------------------------------------------------------------------------

def test_an_sae_of_ones_own_model_gets_layer_and_size_from_it(own, tmp_path, capsys):
    out = run("sae", own, tmp_path / "s", "--epochs", 1)
    used, said = settings_of(out), capsys.readouterr().out
    assert (used.preset, used.layer, used.site, used.latents, used.k) == ("own", 3, "resid", 2048, 32)
    assert (used.seq_len, used.batch, used.micro_batch, used.lr) == (32, 1, 1, pytest.approx(2e-4 * 8**0.5))
    cfg = read_json(out / "cfg.json")
    assert (cfg["num_latents"], cfg["k"], cfg["meta"]["layer"]) == (2048, 32, 3)
    assert 80 < used.steps == read_json(out / "summary.json")["steps"]
    text = " ".join(said.split("trainable")[0].split())              # without line breaks
    for words in ("layer 3 (3/7 of 7 blocks: 12 of the published 28)", "latents 2048 (32 x width 48", "k 32 (published)",
                  "seq-len 32 (100 chunks of the data", "batch 1 (100 steps an epoch", "flags data",
                  "defaults", "site resid (as the released code)"):
        assert words in text, words
    assert max(map(len, said.split("\n"))) <= 100 + len(str(own))    # a path is not broken


@pytest.mark.parametrize("blocks, width, layer, latents", [(28, 1536, 12, 65536), (24, 896, 10, 32768), (4, 128, 1, 4096)])
def test_the_rules_give_the_papers_layer_and_size_at_its_model(blocks, width, layer, latents, tmp_path):
    write_json(tmp_path / "config.json", read_json(INIT / "config.json") | {"num_hidden_layers": blocks})
    args = train.settings("sae", ["--source", "S", "--data", "D", "--device", "cpu"])
    config = SimpleNamespace(hidden_size=width, num_hidden_layers=blocks)
    with torch.device("meta"):
        made = train.make_sae(args, SimpleNamespace(config=config))
    assert (args.layer, made.n_latents, args.k) == (layer, latents, 32)


@pytest.mark.parametrize("n, seq_len, batch, steps", [(100, 64, 1, 1000), (450, 64, 4, 1125), (9000, 2048, 32, 281)])
def test_small_data_is_read_again_large_data_once(n, seq_len, batch, steps):
    args = train.settings("sae", ["--source", "S", "--data", "D", "--device", "cpu", "--seq-len", str(seq_len)])
    train.plan_steps("sae", args, n)
    assert (args.batch, args.steps) == (batch, steps) and args.batch % args.micro_batch == 0
    assert args.micro_batch * seq_len <= 16384
    tune = train.settings("tune", ["--target", "S", "--data", "D", "--device", "cpu", "--seq-len", str(seq_len)])
    train.plan_steps("tune", tune, n)
    assert (tune.batch, tune.epochs, tune.lr) == (min(2, batch), 2, 1e-4)


def test_an_adapter_goes_where_its_sae_was_trained(own, sae, tmp_path, capsys):
    out = run("tune", own, tmp_path / "a", "--sae", sae, "--steps", 2)
    used, said = settings_of(out), " ".join(capsys.readouterr().out.split())
    assert (used.layer, used.site, used.lr) == (3, "resid", 1e-4) and "layer 3 (the SAE's)" in said
    shutil.copytree(sae, tmp_path / "quiet")
    cfg = read_json(sae / "cfg.json")
    cfg["meta"].pop("layer")
    write_json(tmp_path / "quiet/cfg.json", cfg)
    with pytest.raises(ValueError, match="does not say its layer; name it: --layer"):
        run("tune", own, tmp_path / "b", "--sae", tmp_path / "quiet", "--steps", 2)
    assert not (tmp_path / "b").exists()


def test_the_embedded_models_keep_their_preset(tmp_path):
    for words in ([], ["--source", f"{ROOT}/data/tiny/math+x"], ["--source", f"random:{INIT}/config.json@3"],
                  ["--data", "data/tiny/test.jsonl"]):
        args = train.settings("sae", [*words, "--device", "cpu"])
        assert (args.preset, args.layer, args.latents, args.k, args.batch) == ("tiny", 1, 1024, 16, 8), words
    for words in (["--source", "Qwen/Qwen2.5-0.5B"], ["--data", "data/tiny.jsonl"], [f"--source={tmp_path}"]):
        args = train.settings("sae", [*words, "--device", "cpu"])
        assert (args.preset, args.layer, args.latents, args.k, args.batch) == ("own", None, None, None, None), words
    assert train.settings("sae", ["--preset", "tiny", "--source", "x", "--device", "cpu"]).layer == 1



def test_help_shows_what_would_be_used(tmp_path, capsys):
    write_json(tmp_path / "c.json", {"lr": 0.125, "batch": 6})
    for words, shown in ((["--preset", "resa-still-v3"], "(default: 65536)"), (["--config", f"{tmp_path}/c.json"], "(default: 0.125)"),
                         (["--latents", "77"], "(default: 77)"), (["--source", "mine"], "3/7 of the depth;")):
        with pytest.raises(SystemExit):
            train.main(["--stage", "sae", *words, "--help"])
        assert shown in capsys.readouterr().out.replace("\n                        ", " "), words
    with pytest.raises(SystemExit):
        train.main(["--stage", "sae", "--source", "mine", "--help"])
    assert "1024" not in capsys.readouterr().out                     # the embedded models' size


# ---- errors that end in a step -----------------------------------------------------------------------------

@pytest.mark.parametrize("words, step", [
    ("sae --learning-rate 1", "did you mean --lr?"), ("sae --d-sae 4", "did you mean --latents?"),
    ("sae --expansion-factor 8", "did you mean --latents, that is the factor x the width?"),
    ("sae --layers 3", "did you mean --layer?"), ("sae --batch-size=4", "did you mean --batch?"),
    ("sae --device cuda:77", "; --device c"), ("sae --source x", "--data is needed"),
])
def test_a_wrong_word_ends_in_the_right_one(words, step, tmp_path):
    with pytest.raises(ValueError) as caught:
        train.main(["--stage", *words.split(), "--out", str(tmp_path / "o")])
    assert step in str(caught.value) and not (tmp_path / "o").exists()


# ---- nothing finished is lost ------------------------------------------------------------------------------

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_run_is_not_replaced(own, sae, tmp_path):
    before = contents(sae)
    with pytest.raises(ValueError, match=f"{sae} holds a finished run: --fresh replaces it.*--init finetune"):
        run("sae", own, sae, "--steps", 3)
    with pytest.raises(ValueError, match=f"is finished: nothing to resume; --init finetune --sae-from {sae}"):
        run("sae", own, sae, "--steps", 3, "--resume")
    assert contents(sae) == before
    shutil.copytree(sae, tmp_path / "s")
    run("sae", own, tmp_path / "s", "--steps", 4, "--fresh")
    assert read_json(tmp_path / "s/summary.json")["steps"] == 4
    (tmp_path / "theirs").mkdir()                # an adapter of PEFT, say, without a summary of ours
    (tmp_path / "theirs/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="theirs holds a finished run: .*--adapter-from"):
        run("sft", own, tmp_path / "theirs", "--steps", 1)
    assert contents(tmp_path / "theirs") == {"adapter_config.json": b"{}"}


def test_the_readmes_own_examples_do_not_replace_each_other():
    """Two commands of one code block that train write two directories."""
    for path in (ROOT / "README.md", ROOT / "data/README.md"):
        for block in re.findall(r"```\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            outs = []
            for line in re.findall(r"^(?:torchrun \S+ \S+|python) train\.py (.*?)(?:  #.*)?$", block, re.M):
                words = re.sub(r"--stage (\S+)", "", line).split()
                if "help" not in words:
                    outs.append(train.settings(re.search(r"--stage (\S+)", line)[1], [*words, "--device", "cpu"]).out)
            assert len(set(outs)) == len(outs), outs


def test_a_run_is_made_again_from_its_own_config(own, sae, tmp_path):
    config = ["--stage", "sae", "--config", f"{sae}/config.json", "--device", "cpu"]
    train.main([*config, "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/sae.safetensors").read_bytes() == (sae / "sae.safetensors").read_bytes()
    assert settings_of(tmp_path / "again").preset == "own"
    train.main([*config, "--out", str(tmp_path / "more"), "--steps", "2"])
    assert read_json(tmp_path / "more/summary.json")["steps"] == 2   # flags override it
    record = read_json(sae / "config.json")
    for name, value, message in (("lr", "fast", "--lr"), ("steps", -3, "--steps"), ("variant", "x", "--variant"),
                                 ("lr", {"a": 1}, "'lr'")):
        write_json(tmp_path / "bad.json", record | {"settings": record["settings"] | {name: value}})
        with pytest.raises(ValueError, match=message):
            train.main(["--stage", "sae", "--config", f"{tmp_path}/bad.json", "--out", str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()


# ---- going on ----------------------------------------------------------------------------------------------

def stopped(stage, own, out, at, *words):
    """The run, killed after `at` of its steps."""
    end_step = runs.Run.end_step

    def stop(self, step, *rest):
        end_step(self, step, *rest)
        if step + 1 == at:
            raise InterruptedError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "end_step", stop)
        with pytest.raises(InterruptedError):
            run(stage, own, out, *words)


def test_steps_grow_and_micro_batches_change_between_a_run_and_its_continuation(own, sae, tmp_path):
    words = ["--sae", sae, "--batch", 4, "--save-every", 1, "--log-every", 1, "--lora-dropout", 0]
    whole = run("tune", own, tmp_path / "whole", *words, "--steps", 6)
    stopped("tune", own, tmp_path / "part", 2, *words, "--steps", 4)
    out = run("tune", own, tmp_path / "part", *words, "--steps", 6, "--micro-batch", 2, "--log-every", 2, "--resume")
    a, b = (load_file(path / "adapter_model.safetensors") for path in (whole, out))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    stopped("tune", own, tmp_path / "cosine", 2, *words, "--steps", 4, "--schedule", "cosine")
    with pytest.raises(ValueError, match="other settings: steps; only under --schedule constant may --steps grow"):
        run("tune", own, tmp_path / "cosine", *words, "--steps", 6, "--schedule", "cosine", "--resume")
    with pytest.raises(ValueError, match="other settings: lr"):
        run("tune", own, tmp_path / "cosine", *words, "--steps", 4, "--schedule", "cosine", "--lr", 1, "--resume")
    assert (tmp_path / "cosine/checkpoint.safetensors").exists()


@pytest.mark.parametrize("stage, words", [("tune", ["--steps", 2]), ("sft", ["--steps", 2]), ("rl", [
    "--steps", 1, "--lr", 1e-4, "--questions", 2, "--group", 2, "--max-new-tokens", 4])])
def test_training_goes_on_from_an_adapter(own, sae, tmp_path, stage, words):
    words = [*words, *(["--sae", sae] if stage == "tune" else []), "--lora-dropout", 0]
    first = run("sft", own, tmp_path / "first", "--steps", 2, "--lora-r", 3, "--lora-alpha", 5, "--lora-dropout", 0)
    with pytest.raises(ValueError, match="--lora-r has no effect with --adapter-from"):
        run(stage, own, tmp_path / "o", *words, "--adapter-from", first, "--lora-r", 4)
    out = run(stage, own, tmp_path / "o", *words, "--adapter-from", first)
    before, after = (model.read_adapter(str(path)) for path in (first, out))
    assert (after["r"], after["lora_alpha"]) == (3, 5) and before["pairs"].keys() == after["pairs"].keys()
    moved = [(a - b).abs().max() for name in before["pairs"] for a, b in zip(before["pairs"][name], after["pairs"][name])]
    assert max(moved) > 0 or stage == "rl"       # where all rewards are equal nothing is learned
    assert max(moved) < 0.01                     # it did not start anew
    if stage == "sft":                           # where the first ended, the second began
        a, b = (read_json(path / "summary.json") for path in (first, out))
        assert b["ce_before"] == a["ce_after"] < a["ce_before"]


def test_a_saved_adapter_names_a_base_that_peft_opens(own, tmp_path):
    out = run("sft", own, tmp_path / "a", "--steps", 1)
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == str((own / "model").resolve())
    peft = pytest.importorskip("peft")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(out))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs, ours = found(ids).logits, model.load_model(f"{own}/model+{out}")(ids)
    assert torch.allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize("spec, fields", [
    ("Qwen/Qwen2.5-0.5B", {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}),
    ("Qwen/Qwen2.5-0.5B@main", {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "revision": "main"}),
    (f"{ROOT}/data/tiny/distill", {"base_model_name_or_path": "data/tiny/distill"}),
    (f"{ROOT}/data/tiny#distill", {"base_model_name_or_path": "data/tiny/distill"}),
    ("owner/name#folder", {}), ("owner/name+adapter", {}), (f"random:{INIT}/config.json", {}), (None, {}),
])
def test_the_name_of_a_base_is_one_that_peft_understands(spec, fields):
    assert resa.peft_base(spec) == fields


def test_an_adapter_on_another_base_is_noted_once(own, tmp_path, capsys):
    out = run("sft", own, tmp_path / "a", "--steps", 1)
    shutil.copytree(own / "model", tmp_path / "other")
    capsys.readouterr()
    for _ in range(2):
        model.load_model(f"{tmp_path}/other+{out}")
    said = capsys.readouterr().err
    assert said.count("an adapter trained on") == 1 and "other'" in said and said.count("\n") == 1
    run("sft", own, tmp_path / "b", "--steps", 1, "--adapter-from", out)
    assert "an adapter trained" not in capsys.readouterr().err
    shutil.copytree(own / "model", tmp_path / "copies/model")        # the same name elsewhere
    model.load_model(f"{tmp_path}/copies/model+{out}")
    assert "an adapter trained" not in capsys.readouterr().err


def test_tune_says_whether_it_worked(own, sae, tmp_path, capsys):
    out = run("tune", own, tmp_path / "a", "--sae", sae, "--steps", 8, "--lr", 1e-3)
    found = read_json(out / "summary.json")
    assert found["kl_unspliced_before"] == 0 < found["kl_unspliced_after"]
    assert 0 < found["kl_after"] < found["kl_before"]
    assert "kl_unspliced_after" in capsys.readouterr().out
    lm = model.load_model(f"{own}/model")
    args = SimpleNamespace(**vars(settings_of(out)) | {"origin": {}})
    chunks = train.load_chunks(args, model.load_tokenizer(f"{own}/model"), lm)
    _, held = train.hold_out(chunks, 16384)
    kl = resa.tuning_loss(lm, train.load_any(str(sae)), 3, held)     # without an adapter: before
    assert float(kl) == pytest.approx(found["kl_before"], rel=1e-4)
    tuned = model.load_model(f"{own}/model+{out}")
    kl = resa.tuning_loss(tuned, None, 3, held, teacher=lm)
    assert float(kl) == pytest.approx(found["kl_unspliced_after"], rel=1e-3)


# ---- experiments -------------------------------------------------------------------------------------------

def test_an_experiment_that_was_there_is_not_made_again(tmp_path, monkeypatch):
    ran, made = [], {}

    def note(lines, running):
        for line in lines:
            ran.append(" ".join(line))
            if line[0] == "train.py":            # a finished run of that command line
                where = tmp_path / line[line.index("--out") + 1]
                where.mkdir(parents=True, exist_ok=True)
                write_json(where / "config.json", {"argv": ["train.py", *line[1:]], "git": flags.commit()})
                write_json(where / "summary.json", {})
                made[line[line.index("--out") + 1]] = where
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "run_lines", note)
    arms = {"base": "eval.py --model {target}", "sft": "train.py --stage sft --target {target} --steps 2"}

    def go(*words):
        ran.clear()
        args = flags.parse_experiment(flags.arms_parser("x.py", ""), ["--out", "o", *words], {})
        flags.open_experiment(args)
        flags.run_commands(arms, args)
        return [line.split()[0] for line in ran], " ".join(ran)
    assert go()[0] == ["eval.py", "train.py", "eval.py"] and "sft --fresh" in go("--seed", "1")[1]
    assert go("--seed", "1")[0] == ["eval.py", "eval.py"] and "--fresh" not in ran[0]
    assert go("--seed", "1", "--fresh")[0] == ["eval.py", "train.py", "eval.py"]
    (made["o/sft"] / "summary.json").unlink()
    (made["o/sft"] / "checkpoint.safetensors").touch()
    assert "--resume" in go("--seed", "1")[1] and "--fresh" in ran[-1]          # its answers are new
    (made["o/sft"] / "checkpoint.safetensors").touch()
    assert "--resume" not in go("--seed", "2")[1]                    # that checkpoint has another seed
    arms["tuned"] = "train.py --stage tune --target {target} --sae {out}/sae --steps 2"
    (tmp_path / "o/sae").mkdir()
    (tmp_path / "o/sae/cfg.json").touch()
    go("--seed", "2"), os.utime(tmp_path / "o/sae/cfg.json", (1, 1))
    assert "tune" not in go("--seed", "2")[1].replace("tuned", "")
    os.utime(tmp_path / "o/sae/cfg.json", (2**31, 2**31))            # the SAE was made again
    assert "--sae o/sae --steps 2" in go("--seed", "2")[1]
    arms.pop("tuned")
    monkeypatch.setattr(flags, "commit", lambda: "another")
    assert go("--seed", "2")[1].count("--fresh") == 3                # other code may give other numbers
    for line in (tmp_path / "o/commands.sh").read_text().splitlines():
        assert line.startswith("#") or line.endswith("--fresh")      # can be pasted again


def test_a_folder_beside_ours_is_not_ours():
    for spec in ("data/tiny/distill", "data/tiny-moe", "data/tiny/distill+data/tiny/rl", "random:data/tiny/init/config.json@3",
                 "data/tiny-moe+adapter"):
        assert embedded(f"random:{ROOT}/{spec[7:]}" if spec.startswith("random:") else f"{ROOT}/{spec}"), spec
    for spec in ("data/tiny-moe-mine", "data/tiny-mine/distill", "data/cache/x.jsonl", "tiny/distill"):
        assert not embedded(f"{ROOT}/{spec}"), spec


def test_a_setting_of_nought_that_was_chosen_is_shown(capsys):
    args = train.settings("sae", ["--preset", "tiny", "--aux-coef", "0", "--sink-norm", "0", "--no-shuffle", "--device", "cpu"])
    flags.tell(args, "sae")
    said = " ".join(capsys.readouterr().out.split())
    assert "aux-coef 0" in said and "sink-norm 0" in said and "shuffle False" in said
    assert "warmup" not in said                          # a default that does nothing


def test_results_of_other_code_are_not_taken_for_those_of_this(tmp_path, monkeypatch):
    """Also where it is not committed: what differs from the commit counts."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "a.py").write_text("1\n")
    for words in ("init -q", "add a.py", "commit -qm a"):
        subprocess.run([*git, *words.split()], check=True)
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    found = [flags.commit.__wrapped__()]
    (tmp_path / "new.md").write_text("1\n")             # no code
    for text in ("2\n", "3\n", "1\n"):
        (tmp_path / "a.py").write_text(text)
        found.append(flags.commit.__wrapped__())
    assert len(set(found)) == 3 and found[0] == found[3] and len(found[0]) == 40 and found[1].startswith(f"{found[0]}+")
    monkeypatch.setattr(flags, "ROOT", tmp_path / "none")
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert flags.commit.__wrapped__() is None
