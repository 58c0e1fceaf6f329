"""train.py: data, run directories, resume to the bit, the losses of each stage, and what it refuses."""
import json
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import model
import resa
import sae
import train
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
SMALL = ["--seq-len", "64", "--batch", "2", "--log-every", "1"]


@pytest.fixture(scope="module")
def run(data):
    """run(stage, directory, flags...): one stage in this process, small; returns the directory."""
    def go(stage, out, *flags):
        train.main(["--stage", stage, "--data", str(data), *SMALL, "--out", str(out), *map(str, flags)])
        return out
    return go


def command(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """An SAE of a random model, made once."""
    return run("sae", tmp_path_factory.mktemp("sae") / "sae", "--source", RANDOM, "--steps", 3, "--latents", 64, "--k", 4)


# ---- data ------------------------------------------------------------------------------------------------

def test_published_layout_of_the_text():
    row = {"problem": "1+1?", "answer": "2"}
    assert train.as_text(row, None, "resa") == ("User:\n 1+1?\n\nAssistant:\n <think> 2 </think>\n"
                                                "<answer> Answer: 2</answer>")
    assert train.as_text(row | {"system": "\nS\n"}, None, "resa").startswith("\nS\nUser:\n ")


def test_chat_text_opens_the_thinking_once():
    tok = model.load_tokenizer(RANDOM)
    text = train.as_text({"problem": "1+1?", "answer": "2"}, tok, "chat")
    assert text == "<|user|>1+1?<|assistant|><think>\n2\n</think>\n2"


def test_packing_joins_with_the_end_token_and_keeps_whole_chunks():
    tok = model.load_tokenizer(RANDOM)
    rows = [{"text": "1+1=2"}, {"text": "apples"}]
    flat = [tok.eos_id, *tok.encode("1+1=2"), tok.eos_id, *tok.encode("apples"), tok.eos_id]
    chunks = train.pack(rows, tok, "chat", 4)
    assert chunks.tolist() == [flat[:4], flat[4:8]][:len(flat) // 4]
    with pytest.raises(ValueError, match="fewer than one chunk"):
        train.pack(rows, tok, "chat", 64)


def test_an_epoch_sees_every_chunk_once_and_order_depends_on_the_seed():
    args = train.Sae(batch=3, device="cpu")
    chunks = torch.arange(12)[:, None]
    seen = torch.cat([train.batch_at(step, chunks, args) for step in range(4)]).flatten().tolist()
    assert sorted(seen) == list(range(12)) and seen != list(range(12))
    args.seed = 1
    other = torch.cat([train.batch_at(step, chunks, args) for step in range(4)]).flatten().tolist()
    assert other != seen
    args.shuffle = False
    assert train.batch_at(5, chunks, args).flatten().tolist() == [3, 4, 5]      # the second epoch, in order


# ---- the losses ------------------------------------------------------------------------------------------

def test_logprobs_in_chunks_equal_the_plain_way_with_gradient():
    lm = model.load_model(RANDOM, "float64").requires_grad_(True)
    ids = torch.randint(0, lm.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))

    def grads(logp):
        lm.zero_grad()
        logp.sum().backward()
        return lm.model.embed_tokens.weight.grad.clone()
    plain = lm(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chunked = train.next_token_logprobs(lm, lm.run(ids), ids, chunk=7)
    assert torch.allclose(plain.float(), chunked, atol=1e-5)
    assert torch.allclose(grads(plain), grads(chunked), atol=1e-4)


def test_policy_gradient_is_the_advantage_weighted_likelihood_of_answer_tokens_only():
    lm = model.load_model(RANDOM).requires_grad_(True)
    samples = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9])]
    advantages = torch.tensor([1.0, -0.5])
    train.policy_loss(lm, samples, advantages, beta=0).backward()
    got = lm.model.embed_tokens.weight.grad.clone()
    lm.zero_grad()
    total = 0
    for (p, a), advantage in zip(samples, advantages):      # one sample at a time, no padding, no mask
        logp = lm(torch.tensor([p + a]))[0].log_softmax(-1)
        total = total - advantage * torch.stack([logp[len(p) + i - 1, t] for i, t in enumerate(a)]).mean() / 2
    total.backward()
    assert torch.allclose(got, lm.model.embed_tokens.weight.grad, atol=1e-6)
    assert got.abs().max() > 1e-4


def test_the_policy_is_the_model_at_the_temperature_it_was_sampled_at():
    lm, samples, advantage = model.load_model(RANDOM).requires_grad_(True), [([5, 6, 7], [8, 9])], torch.ones(1)
    train.policy_loss(lm, samples, advantage, 0, temperature=0.5).backward()
    got = lm.model.embed_tokens.weight.grad.clone()
    lm.zero_grad()
    logp = (lm(torch.tensor([[5, 6, 7, 8, 9]]))[0] / 0.5).log_softmax(-1)
    (-(logp[2, 8] + logp[3, 9]) / 2).backward()
    assert torch.allclose(got, lm.model.embed_tokens.weight.grad, atol=1e-6)


def test_policy_loss_holds_on_to_the_base_with_beta():
    lm = resa.add_lora(model.load_model(RANDOM), 4, 8, 0.0)
    samples, zero = [([5, 6, 7], [8, 9])], torch.zeros(1)
    assert train.policy_loss(lm, samples, zero, beta=1.0).item() == 0      # the adapter is still the base
    for layer in resa.lora_layers(lm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    assert train.policy_loss(lm, samples, zero, beta=1.0).item() > 0


def test_rewards():
    good, wrong, direct = (30, "1+1=2\n</think>\n2"), (40, "1+1=3\n</think>\n3"), (5, "</think>\n2")
    assert train.score(["accuracy", "format"], [good, wrong, direct], "2") == [3.0, 1.0, 2.0]
    assert train.score(["length"], [good, wrong, direct], "2") == [0.5 - 25 / 35, -0.5, 0.5]
    assert train.score(["length"], [(5, "2"), (5, "3")], "2") == [0.0, 0.0]      # equally long: nothing to prefer


def test_rate_schedules():
    args = train.Tune(lr=1.0, steps=100)
    assert train.rate_at(99, args) == 1.0
    args.schedule = "cosine"
    assert train.rate_at(0, args) == 1.0 and train.rate_at(100, args) == pytest.approx(0.1)
    assert train.rate_at(1, args, warmup=4) == 0.5


# ---- stages ----------------------------------------------------------------------------------------------

def test_sae_directory_says_where_the_sae_belongs(trained):
    cfg = json.loads((trained / "cfg.json").read_text())
    assert cfg["meta"]["site"] == "resid" and cfg["meta"]["layer"] == 1 and str(ROOT) not in json.dumps(cfg)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3] and all(0 < r["fvu"] < 2 and r["l0"] <= 4 for r in rows)
    assert json.loads((trained / "config.json").read_text())["settings"]["latents"] == 64
    assert not (trained / "checkpoint.safetensors").exists()


def test_pretrained_sae_is_taken_as_it_is_and_finetuned_moves(run, trained, tmp_path):
    same = run("sae", tmp_path / "p", "--source", RANDOM, "--init", "pretrained", "--sae-from", trained)
    moved = run("sae", tmp_path / "f", "--source", RANDOM, "--init", "finetune", "--sae-from", trained, "--steps", 2)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    a, b, c = (sae.load_sae(d)(x) for d in (trained, same, moved))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    assert sae.load_sae(moved).n_latents == 64      # the shape is the file's, not the preset's


@pytest.mark.parametrize("flags", [["--splice", "random"], ["--splice", "noise"], ["--sae-grad", "on"],
                                   ["--teacher", "source", "--source", RANDOM + "@7"]])
def test_every_arm_trains_and_its_adapter_loads(run, flags, trained, tmp_path):
    out = run("tune", tmp_path / "t", "--target", RANDOM, "--sae", trained, "--steps", 2, "--lr", 1e-2, *flags)
    base, tuned = model.load_model(RANDOM), model.load_model(f"{RANDOM}+{out}")
    ids = torch.arange(10)[None]
    assert (base(ids) - tuned(ids)).abs().max() > 1e-5
    below = model.read_adapter(str(out))["pairs"]["model.layers.0.mlp.up_proj"][1].abs().max() > 0
    assert below == ("on" in flags)      # blocks under the hook learn only if gradient passes the SAE


def test_sft_lowers_its_loss_and_rl_runs(run, data, tmp_path):
    out = run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 8, "--lr", 1e-2)
    ce = [json.loads(line)["ce"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ce[-1] < ce[0] - 0.1
    train.main(["--stage", "rl", "--target", RANDOM, "--data", str(data), "--steps", "1",
                "--questions", "2", "--group", "2", "--max-new-tokens", "8", "--out", str(tmp_path / "r")])
    assert model.read_adapter(str(tmp_path / "r"))["r"] == 32


# ---- resume ----------------------------------------------------------------------------------------------

def test_a_start_is_trained_in_fp32_by_the_flags_given_and_a_pretrained_one_keeps_its_origin(run, trained, tmp_path):
    half = sae.load_sae(trained).bfloat16()
    half.meta["data"] = "elsewhere"
    sae.save_sae(half, tmp_path / "layers.1")
    tuned = run("sae", tmp_path / "f", "--source", RANDOM, "--init", "finetune", "--sae-from", tmp_path / "layers.1",
                "--steps", 1, "--aux-coef", 0.5, "--dead-after", 7)
    back = sae.load_sae(tuned)
    assert (back.W_enc.dtype, back.aux_coef, back.dead_after) == (torch.float32, 0.5, 7)
    assert json.loads((tuned / "config.json").read_text())["settings"]["latents"] == 64
    kept = run("sae", tmp_path / "p", "--source", RANDOM + "@3", "--init", "pretrained",
               "--sae-from", f"{tmp_path}#layers.1")
    assert sae.load_sae(kept).meta["data"] == "elsewhere" and not sae.load_sae(kept).meta["model"].endswith("@3")


def test_a_folder_named_as_sparsify_does_says_where_its_sae_belongs(run, trained, tmp_path):
    bare = sae.load_sae(trained)
    bare.meta = {}
    sae.save_sae(bare, tmp_path / "layers.2")
    for spec in (tmp_path / "layers.2", f"{tmp_path}#layers.2"):
        with pytest.raises(ValueError, match="trained at layer 2, not at 1"):
            run("tune", tmp_path / "o", "--target", RANDOM, "--sae", spec, "--steps", 1)


def test_a_micro_batch_bounds_every_pass_the_first_included(run, tmp_path, monkeypatch):
    rows, activations = [], resa.activations
    monkeypatch.setattr(resa, "activations", lambda model, ids, *where: rows.append(len(ids)) or activations(model, ids, *where))
    run("sae", tmp_path / "s", "--source", RANDOM, "--steps", 1, "--latents", 64, "--k", 4, "--micro-batch", 1)
    assert set(rows) == {1}


def test_a_new_run_that_fails_leaves_no_old_artifact_to_be_taken_for_its_own(run, tmp_path):
    out = run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 1)
    with pytest.raises(ValueError, match="not a finite number"):
        run("sft", out, "--target", RANDOM, "--steps", 4, "--lr", 1e30)
    with pytest.raises(OSError):
        model.read_adapter(str(out))
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize("stage, flags, artifact", [
    ("sae", ["--source", RANDOM, "--latents", "64", "--k", "4", "--optimizer", "signum"], "sae.safetensors"),
    ("tune", ["--target", RANDOM], "adapter_model.safetensors")])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(run, data, stage, flags, artifact, trained, tmp_path):
    """A real process, a real SIGKILL at whatever moment it hits, a real --resume."""
    flags = [*flags, "--steps", 12] + (["--sae", trained] if stage == "tune" else [])
    whole = run(stage, tmp_path / "whole", *flags)
    part = tmp_path / "part"
    argv = [sys.executable, "train.py", "--stage", stage, "--data", str(data), *SMALL, *map(str, flags),
            "--out", str(part)]
    process = subprocess.Popen([*argv, "--save-every", "1"], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (part / "checkpoint.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (part / "checkpoint.safetensors").exists() and not (part / artifact).exists()
    train.main([*argv[2:], "--save-every", "1", "--resume"])
    assert (part / artifact).read_bytes() == (whole / artifact).read_bytes()

    def logged(d):
        return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tok/s")}
                for line in (d / "metrics.jsonl").read_text().splitlines()]
    assert logged(part) == logged(whole) and len(logged(whole)) == 12


def test_resume_refuses_other_settings_and_an_unfinished_run_is_not_overwritten(run, tmp_path, trained):
    state = {"step": 1, "seconds": 0.0, "settings": {}, "tensors": {}, "optimizer": {}, "rng": torch.get_rng_state()}
    (tmp_path / "o").mkdir()
    train.write_state(tmp_path / "o" / "checkpoint.safetensors", state)
    flags = ["--source", RANDOM, "--steps", 2, "--latents", 64, "--k", 4]
    with pytest.raises(ValueError, match="--resume continues it"):
        run("sae", tmp_path / "o", *flags)
    with pytest.raises(ValueError, match="other settings"):
        run("sae", tmp_path / "o", *flags, "--resume")
    with pytest.raises(OSError, match="no checkpoint to resume"):
        run("sae", tmp_path / "none", *flags, "--resume")


def without(name):
    return lambda state: state["tensors"].pop(next(iter(state["tensors"]))) if name == "tensor" else state.pop(name)


DAMAGED = {"no tensor": without("tensor"), "no settings": without("settings"), "no optimizer": without("optimizer"),
           "a scalar": lambda s: s["tensors"].update({next(iter(s["tensors"])): torch.ones(1)}),      # would broadcast
           "a list": lambda s: s.update(settings=[1]), "random state": lambda s: s.update(rng=torch.zeros(3)),
           "negative step": lambda s: s.update(step=-1), "step beyond": lambda s: s.update(step=99)}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written(run, damage, data, tmp_path, monkeypatch):
    flags = ["--target", RANDOM, "--steps", 3, "--save-every", 1]
    with monkeypatch.context() as patch:
        patch.setattr(resa, "save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))      # stopped at the end
        with pytest.raises(KeyboardInterrupt):
            run("sft", tmp_path / "o", *flags)
    path = tmp_path / "o" / "checkpoint.safetensors"
    state = train.read_state(path)
    DAMAGED[damage](state)
    train.write_state(path, state)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(ValueError, match="checkpoint.safetensors: "):
        run("sft", tmp_path / "o", *flags, "--resume")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("skeleton", ['{"a": 1, "b": 2}', '{"tensor": 7}', "5", '{"list": [' * 5000])
def test_a_header_that_is_no_state_is_refused(skeleton, tmp_path):
    save_file({"0": torch.ones(1)}, tmp_path / "c", {"state": skeleton})
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.read_state(tmp_path / "c")


def test_a_full_disk_is_one_line_and_leaves_no_temporary(run, tmp_path, capsys):
    """A limit on the size of files is a disk that is full, as far as a writer can tell."""
    out, limits = tmp_path / "o", resource.getrlimit(resource.RLIMIT_FSIZE)
    for more, message in ((["--save-every", 1], "checkpoint.safetensors: could not be written"), ([], "File too large")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(SystemExit):
                resa.front_door(lambda argv: run("sft", out, "--target", RANDOM, "--steps", 2, *more))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "metrics.jsonl"]


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    with pytest.raises(ValueError, match="lower --lr"):      # only what comes after the last step is bad
        run("sae", tmp_path / "o", "--source", RANDOM, "--latents", 64, "--k", 4, "--steps", 1, "--lr", 1e36)
    assert not (tmp_path / "o" / "cfg.json").exists()
    with pytest.raises(ValueError, match="lower --lr"):      # bad between two logged steps
        run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 9, "--save-every", 4, "--log-every", 9, "--lr", 1e30)
    assert not (tmp_path / "s" / "checkpoint.safetensors").exists()


def test_state_files_keep_values_types_and_keys(tmp_path):
    state = {"a": {0: torch.arange(3), "x": [1, 2.5, None, True]}, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    train.write_state(tmp_path / "s", state)
    back = train.read_state(tmp_path / "s")
    assert back["a"]["x"] == [1, 2.5, None, True] and torch.equal(back["a"][0], state["a"][0])
    assert back["b"].dtype == torch.bfloat16 and list(tmp_path.iterdir()) == [tmp_path / "s"]
    (tmp_path / "s").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.read_state(tmp_path / "s")


# ---- refusals --------------------------------------------------------------------------------------------

REFUSED = [
    (["--stage", "sae", "--source", "nowhere"], "nowhere: no such directory"),
    (["--stage", "sae", "--source", "some-owner/some-model"], "offline, download it and pass its path"),
    (["--stage", "sae", "--source", RANDOM, "--data", "no.jsonl"], "no.jsonl: no such file"),
    (["--stage", "sae", "--source", RANDOM, "--layer", "9"], "layer 9 is out of range: this model has blocks 0 .. 3"),
    (["--stage", "sae", "--source", RANDOM, "--k", "2000"], "k="),
    (["--stage", "sae", "--source", RANDOM, "--sae-from", "x"], "--sae-from goes with --init"),
    (["--stage", "sae", "--source", RANDOM, "--init", "finetune"], "--sae-from goes with --init"),
    (["--stage", "sae", "--init", "pretrained", "--sae-from", "x", "--lr", "1"], "--lr has no effect"),
    (["--stage", "sae", "--init", "finetune", "--sae-from", "x", "--k", "4"], "--k has no effect"),
    (["--stage", "sae", "--latnets", "3"], "did you mean --latents?"),
    (["--stage", "tune", "--latents", "3"], "--latents belongs to --stage sae"),
    (["--stage", "tune", "--splice", "none"], "nothing to learn"),
    (["--stage", "tune", "--splice", "none", "--teacher", "source", "--sae-grad", "on"], "no effect with --splice none"),
    (["--stage", "tune", "--source", "x"], "--source has no effect with --teacher target"),
    (["--stage", "tune", "--match", "0.1"], "--match has no effect with --teacher target"),
    (["--stage", "tune", "--into", "teacher"], "--into has no effect with --teacher target"),
    (["--stage", "tune", "--teacher", "source", "--match", "-1"], "--match must be at least 0"),
    (["--stage", "tune", "--teacher", "source", "--match", "1", "--splice", "noise"], "noise is drawn anew"),
    (["--stage", "tune", "--teacher", "source", "--into", "nothing"], "used by --match alone"),
    (["--stage", "tune", "--teacher", "source", "--into", "teacher", "--sae-grad", "on"], "--sae-grad has no effect"),
    (["--stage", "tune", "--teacher", "source", "--splice", "none", "--into", "teacher"], "--into has no effect with"),
    (["--stage", "tune", "--teacher", "source", "--splice", "none", "--layer", "2"], "--layer has no effect with"),
    (["--stage", "tune", "--preset", "tinny"], "no preset 'tinny'"),
    (["--stage", "tune", "--sae", "nowhere", "--target", RANDOM], "nowhere: no such directory"),
    (["--stage", "pretrain", "--model", RANDOM, "--only", "zebra"], "no parameter has a name like that"),
    (["--stage", "pretrain", "--model", RANDOM, "--only", "("], "not a regular expression"),
    (["--stage", "rl", "--target", RANDOM], "--stage rl needs --steps"),
    (["--stage", "rl", "--target", RANDOM, "--steps", "1", "--rewards", "beauty"], "there are accuracy, format, length"),
    (["--stage", "sae", "--batch", "0"], "--batch must be at least 1"),
    (["--stage", "sae", "--lr", "fast"], "invalid float value"),
    (["--stage=tune", "--latents", "3"], "--latents belongs to --stage sae"),
    (["--stage", "sae", "--micro-batch", "-1"], "--micro-batch must be at least 0"),
    (["--stage", "sae", "--batch", "3", "--micro-batch", "2"], "does not divide"),
    (["--stage", "sae", "--epochs", "-3"], "--epochs must be at least 1"),
    (["--stage", "sae", "--epochs", "2", "--steps", "2"], "--epochs has no effect with --steps"),
    (["--stage", "sae", "--seq-len", "1"], "--seq-len must be at least 2"),
    (["--stage", "sae", "--device", "banana"], "--device banana: it can be"),
    (["--stage", "sae", "--source", RANDOM, "--init", "finetune", "--sae-from", "x#y#z"], "x"),
    (["--stage", "tune", "--clip", "-1"], "--clip must be at least 0"),      # would climb the loss
    (["--stage", "tune", "--clip", "nan"], "--clip must be at least 0, and finite"),
    (["--stage", "tune", "--lr", "0"], "nothing is learned"),
    (["--stage", "tune", "--lora-alpha", "0"], "--lora-alpha must be at least 1"),
    (["--stage", "tune", "--lora-dropout", "1.5"], "--lora-dropout must be below 1"),
    (["--stage", "tune", "--seed", str(2**70)], "--seed must be below"),
    (["--stage", "rl", "--temperature", "0", "--steps", "1"], "--temperature must be above 0"),
    (["--stage", "rl", "--questions", "-1", "--steps", "1"], "--questions must be at least 1"),
    (["--stage", "rl", "--questions", "9999", "--steps", "1", "--target", RANDOM], "has 4000"),
    (["--stage", "rl", "--beta", "nan", "--steps", "1"], "--beta must be at least 0"),
    (["--stage", "pretrain", "--warmup", "-5"], "--warmup must be at least 0"),
    (["--stage", "pretrain"], "--stage pretrain needs --model"),
    (["--stage", "pretrain", "--model", RANDOM, "--dtype", "bfloat16"], "needs --dtype float32"),
    (["--stage", "dance"], "one of sae, tune, sft, rl, pretrain"),
    ([], "train.py needs --stage"),
]


@pytest.mark.parametrize("argv, message", REFUSED, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_refused_in_one_line_before_anything_is_written(argv, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError)) as caught:
        train.main([*argv, *(["--out", str(out)] if argv else [])])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


def test_sae_of_another_site_layer_or_width_is_refused(run, trained, tmp_path):
    for flags, message in ((["--site", "mlp"], "trained at site resid, not at mlp"),
                           (["--layer", "2"], "trained at layer 1, not at 2")):
        with pytest.raises(ValueError, match=message):
            run("tune", tmp_path / "o", "--target", RANDOM, "--sae", trained, "--steps", 1, *flags)
    narrow = sae.build("topk", 32, 64, k=4)
    sae.save_sae(narrow, tmp_path / "narrow")
    with pytest.raises(ValueError, match="32 wide, the model 128"):
        run("tune", tmp_path / "o", "--target", RANDOM, "--sae", tmp_path / "narrow", "--steps", 1)
    assert not (tmp_path / "o").exists()


BAD_DATA = [
    ("sft", b'{"text": 5}\n', ":1: no \"text\""), ("sft", b'{"problem": "a", "completion": null}\n', ":1: no \"text\""),
    ("sft", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8"), ("sft", b'{"problem": "\xe9", "answer": "1"}\n', "not UTF-8"),
    ("sft", b'{"text": "a"}\n{"text": ' + b"[" * 99999, ":2: not JSON"), ("sft", b"", "no problems"),
    ("rl", b'{"problem": "1+1?", "completion": "2"}\n', ':1: no "answer"'), ("rl", b'{"text": "1+1=2"}\n', ':1: no "problem"')]


@pytest.mark.parametrize("stage, content, message", BAD_DATA)
def test_rows_of_the_wrong_kind_are_named(stage, content, message, tmp_path):
    path, out = tmp_path / "d.jsonl", tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        train.main(["--stage", stage, "--target", RANDOM, "--data", str(path), "--steps", "1", "--out", str(out)])
    assert str(caught.value).startswith(str(path)) and message in str(caught.value) and not out.exists()


def test_rows_of_text_may_hold_blank_lines_and_a_field_that_says_text_is_not_one(tmp_path, run):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"problem": "b", "completion": "c"}\n\n')
    assert len(train.read_rows(path)) == 2
    with pytest.raises(ValueError, match="--template has no effect"):
        train.main(["--stage", "sft", "--target", RANDOM, "--data", str(path), "--template", "resa", "--out", str(tmp_path)])
    path.write_text('{"problem": "1+1?", "answer": "2", "source": "text"}\n')
    assert train.read_rows(path)[0]["answer"] == "2"


def test_malformed_line_is_named_and_exit_code_is_2(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "x"}\n')
    done = command("train.py", "--stage", "sae", "--source", RANDOM, "--data", data, "--out", tmp_path / "o")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "o").exists()
    assert done.stderr == f'error: {data}:2: no "answer" field\n'


def test_a_run_that_diverges_stops_and_says_so(run, tmp_path, trained):
    with pytest.raises(ValueError, match="not a finite number"):
        run("sft", tmp_path / "o", "--target", RANDOM, "--steps", 20, "--lr", 1e30)
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()


def test_micro_batches_learn_what_the_whole_batch_learns(run, tmp_path):
    flags = ["--target", RANDOM, "--steps", 3, "--lora-dropout", 0, "--lr", 1e-3]
    whole, parts = run("sft", tmp_path / "a", *flags), run("sft", tmp_path / "b", *flags, "--micro-batch", 1)
    a, b = (model.load_model(f"{RANDOM}+{d}") for d in (whole, parts))
    ids = torch.arange(40)[None]
    assert torch.allclose(a(ids), b(ids), atol=1e-4) and not torch.allclose(a(ids), model.load_model(RANDOM)(ids), atol=1e-3)


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    config = json.loads((ROOT / "data/tiny/init/config.json").read_text()) | {"vocab_size": 100}
    for path in (ROOT / "data/tiny/init").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the model knows 100: they do not belong together"):
        run("sft", tmp_path / "o", "--target", f"random:{tmp_path}/config.json", "--steps", 1)


def test_the_published_recipe_runs_on_a_real_tokenizer_in_bf16(shared, data, tmp_path):
    """Preset resa-still-v3 from SAE to adapter: R1-Distill's tokenizer and vocabulary, a small random body."""
    source = shared / "tokenizers" / "deepseek-r1-distill-qwen"
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | small))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).symlink_to(source / name)
    spec, common = f"random:{tmp_path}/config.json", ["--preset", "resa-still-v3", "--device", "cpu", "--layer", "1",
                                                      "--data", str(data), "--seq-len", "64"]
    train.main(["--stage", "sae", *common, "--source", spec, "--latents", "128", "--batch", "2", "--steps", "3",
                "--out", str(tmp_path / "sae")])
    train.main(["--stage", "tune", *common, "--target", spec, "--sae", str(tmp_path / "sae"), "--steps", "2",
                "--out", str(tmp_path / "adapter")])
    settings = json.loads((tmp_path / "adapter" / "config.json").read_text())["settings"]
    assert settings["lr"] == 1e-6 and settings["kl_reduction"] == "sequence" and settings["dtype"] == "bfloat16"
    adapter = model.read_adapter(str(tmp_path / "adapter"))
    assert adapter["r"] == 32 and adapter["scale"] == 4 and len(adapter["pairs"]) == 3 * 7
    assert adapter["pairs"]["model.layers.2.mlp.up_proj"][1].abs().max() > 0      # fp32: at this rate bf16 stands still
    assert adapter["pairs"]["model.layers.1.mlp.up_proj"][1].abs().max() == 0
