"""train.py: data, losses, run directories, resume to the bit, presets, FLOPs, what it refuses."""
import json
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as ev
import model
import resa
import sae
import train
from data import flops, runs
from data.flags import front_door
from data.rows import OWN_PROMPT, messages_of, read_problems
from model import Block
from tests.conftest import ROOT

DISTILL = f"{ROOT}/data/tiny/distill"
RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
SMALL = ["--seq-len", "64", "--batch", "2", "--log-every", "1"]
RL = ["--preset", "tiny", "--questions", "2", "--group", "2", "--max-new-tokens", "8", "--log-every", "1"]


@pytest.fixture(scope="module")
def run(data):
    """run(stage, directory, flags...): one stage in this process, small; returns the directory."""
    def go(stage, out, *flags):
        small = RL if stage == "rl" else SMALL
        train.main(["--stage", stage, "--preset", "tiny", "--data", str(data), *small, "--out", str(out),
                    *map(str, flags)])
        return out
    return go


def command(*argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, **options)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def logged(out):
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tok/s")} for row in rows]


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """An SAE of a random model, made once."""
    out = tmp_path_factory.mktemp("sae") / "sae"
    return run("sae", out, "--source", RANDOM, "--steps", 3, "--latents", 64, "--k", 4)


@pytest.fixture(scope="module")
def at_mlp(run, tmp_path_factory):
    """An SAE of MLP outputs."""
    out = tmp_path_factory.mktemp("mlp") / "sae"
    return run("sae", out, "--source", RANDOM, "--steps", 2, "--latents", 64, "--k", 4,
               "--site", "mlp")


# ---- data ---------------------------------------------------------------------------------------

def test_published_layout_of_the_text():
    row = {"problem": "1+1?", "answer": "2"}
    assert train.as_text(row, None, "resa") == ("User:\n 1+1?\n\nAssistant:\n <think> 2 </think>\n"
                                                "<answer> Answer: 2</answer>")
    assert train.as_text(row | {"system": "\nS\n"}, None, "resa").startswith("\nS\nUser:\n ")


def test_chat_text_opens_the_thinking_once():
    tok = model.load_tokenizer(RANDOM)
    text = train.as_text({"problem": "1+1?", "answer": "2"}, tok, "chat")
    assert text == "<|user|>1+1?<|assistant|><think>\n2\n</think>\n2"


def test_packing_joins_with_the_end_token_and_keeps_whole_chunks(tmp_path):
    tok, lm, path = model.load_tokenizer(RANDOM), model.load_model(RANDOM), tmp_path / "d.jsonl"
    path.write_text('{"text": "1+1=2"}\n{"text": "apples"}\n')
    argv = ["--device", "cpu", "--preset", "tiny", "--data", str(path), "--seq-len"]
    flat = [tok.eos_id, *tok.encode("1+1=2"), tok.eos_id, *tok.encode("apples"), tok.eos_id]
    chunks = train.load_chunks(train.settings("sft", [*argv, "4"]), tok, lm)
    assert chunks.tolist() == [flat[:4], flat[4:8]][:len(flat) // 4]
    with pytest.raises(ValueError, match="fewer than one chunk"):
        train.load_chunks(train.settings("sft", [*argv, "64"]), tok, lm)


def test_an_epoch_sees_every_chunk_once_and_order_depends_on_the_seed():
    args = train.settings("sae", ["--batch", "3", "--device", "cpu"])

    def seen():
        return sum((train.chunk_indices(step, 12, args) for step in range(4)), [])
    first = seen()
    assert sorted(first) == list(range(12)) and first != list(range(12))
    args.seed = 1
    assert seen() != first
    args.shuffle = False
    assert train.chunk_indices(5, 12, args) == [3, 4, 5]      # epoch 1


def test_two_seeds_never_share_an_order():
    """Keyed by seed + epoch, seed 1 in epoch 0 had the order of seed 0 in epoch 1; RL's steps too."""
    orders = {tuple(train.order(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    orders = {tuple(train.order(50, seed, 2**32 - seed)) for seed in range(20)}      # equal sums
    assert len(orders) == 20 and train.order(50, 3, 4) == train.order(50, 3, 4)


def test_rl_draws_other_questions_for_another_seed(run, monkeypatch, tmp_path):
    drawn = {}
    for seed in (0, 1):
        steps = drawn[seed] = []

        def noted(model, tokenizer, rows, step, args):
            steps.append([row["id"] for row in rows])
            return rollout(model, tokenizer, rows, step, args)
        rollout = train.rollout
        with monkeypatch.context() as patch:
            patch.setattr(train, "rollout", noted)
            run("rl", tmp_path / str(seed), "--target", RANDOM, "--steps", 4, "--seed", seed)
    assert not any(ids in drawn[0] for ids in drawn[1])


def test_rl_samples_from_the_policy_itself_without_dropout(run, monkeypatch, tmp_path):
    modes = []

    def noted(model, requests, **settings):
        modes.append((model.training, all(m.on for m in resa.lora_layers(model).values())))
        return collect(model, requests, **settings)
    collect = train.collect
    monkeypatch.setattr(train, "collect", noted)
    run("rl", tmp_path / "r", "--target", RANDOM, "--steps", 2, "--lora-dropout", 0.5)
    assert modes == [(False, True)] * 2


@pytest.mark.parametrize("more", [{"text": "LEAK"}, {"completion": 7}, {"completion": ""}])
def test_rows_of_another_kind_than_the_first_are_refused(tmp_path, more):
    path, row = tmp_path / "rows.jsonl", {"problem": "1+1?", "answer": "2"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | more) + "\n")
    with pytest.raises(ValueError, match="row 2 has a text or completion"):
        train.read_rows(path)


@pytest.mark.parametrize("row", [
    {"problem": "1+1?", "answer": "2", "completion": None}, {"problem": "1+1?", "answer": 2, "text": None},
    {"problem": None, "question": "1+1?", "answer": "2"}, {"problem": " ", "question": "1+1?", "answer": "2"}])
def test_null_fields_of_a_row_are_absent(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    text = train.as_text(train.read_rows(path)[0], None, "resa")
    assert text == train.RESA_TEMPLATE.format(system="", problem="1+1?", answer="2")


# ---- the losses ---------------------------------------------------------------------------------

def test_logprobs_in_chunks_equal_the_plain_way_with_gradient():
    lm = model.load_model(RANDOM, "float64").requires_grad_(True)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.config.vocab_size, (3, 20), generator=rng)

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
    for (p, a), advantage in zip(samples, advantages):      # one at a time: no padding, no mask
        logp = lm(torch.tensor([p + a]))[0].log_softmax(-1)
        picked = torch.stack([logp[len(p) + i - 1, t] for i, t in enumerate(a)])
        total = total - advantage * picked.mean() / 2
    total.backward()
    assert torch.allclose(got, lm.model.embed_tokens.weight.grad, atol=1e-6)
    assert got.abs().max() > 1e-4


def test_the_policy_is_the_model_at_the_temperature_it_was_sampled_at():
    lm = model.load_model(RANDOM).requires_grad_(True)
    train.policy_loss(lm, [([5, 6, 7], [8, 9])], torch.ones(1), 0, temperature=0.5).backward()
    got = lm.model.embed_tokens.weight.grad.clone()
    lm.zero_grad()
    logp = (lm(torch.tensor([[5, 6, 7, 8, 9]]))[0] / 0.5).log_softmax(-1)
    (-(logp[2, 8] + logp[3, 9]) / 2).backward()
    assert torch.allclose(got, lm.model.embed_tokens.weight.grad, atol=1e-6)


def test_policy_loss_holds_on_to_the_base_with_beta():
    lm = resa.add_lora(model.load_model(RANDOM), 4, 8, 0.0)
    samples, zero = [([5, 6, 7], [8, 9])], torch.zeros(1)
    assert train.policy_loss(lm, samples, zero, beta=1.0).item() == 0      # still the base
    for layer in resa.lora_layers(lm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    assert train.policy_loss(lm, samples, zero, beta=1.0).item() > 0


def test_rewards():
    good, wrong, direct = (30, "1+1=2\n</think>\n2"), (40, "1+1=3\n</think>\n3"), (5, "</think>\n2")
    assert train.score(["accuracy", "format"], [good, wrong, direct], "2") == [3.0, 1.0, 2.0]
    assert train.score(["length"], [good, wrong, direct], "2") == [0.5 - 25 / 35, -0.5, 0.5]
    assert train.score(["length"], [(5, "2"), (5, "3")], "2") == [0.0, 0.0]      # equally long


def test_rate_schedules():
    args = train.settings("sae", ["--lr", "1", "--steps", "100", "--schedule", "constant"])
    assert train.learning_rate(99, args) == 1.0
    args.schedule = "cosine"
    assert train.learning_rate(0, args) == 1.0
    assert train.learning_rate(100, args) == pytest.approx(0.1)
    args.warmup = 4
    assert train.learning_rate(1, args) == 0.5
    args.warmup, args.schedule = 0, "linear"
    assert train.learning_rate(79, args) == 1.0
    assert train.learning_rate(90, args) == pytest.approx(0.5)


def test_an_sae_is_trained_on_whatever_the_batches_hold():
    """The loop of stage I, on other targets; it resumes at `start` with the rates of that step."""
    args = train.settings("sae", ["--lr", "1e-2", "--steps", "40", "--schedule", "linear"])
    x = torch.randn(40, 256, 8, generator=torch.Generator().manual_seed(0)).relu()
    whole, parts = (sae.build("topk", 8, 32, k=4) for _ in range(2))
    steps = [(step, float(p["fvu"])) for step, p in train.train_sae(
        whole, ([batch] for batch in x), sae.make_optimizer(whole, "adam", 1e-2), args)]
    assert [step for step, _ in steps] == list(range(40)) and steps[-1][1] < steps[0][1] / 2
    optimizer = sae.make_optimizer(parts, "adam", 1e-2)
    for start, stop in ((0, 15), (15, 40)):
        batches = ([batch] for batch in x[start:stop])
        assert len(list(train.train_sae(parts, batches, optimizer, args, start))) == stop - start
    assert torch.equal(whole.W_dec, parts.W_dec)


# ---- stages -------------------------------------------------------------------------------------

def test_sae_directory_says_where_the_sae_belongs(trained):
    cfg = json.loads((trained / "cfg.json").read_text())
    assert cfg["meta"]["site"] == "resid" and cfg["meta"]["layer"] == 1
    assert str(ROOT) not in json.dumps(cfg)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(0 < r["fvu"] < 2 and r["l0"] <= 4 for r in rows)
    assert json.loads((trained / "config.json").read_text())["settings"]["latents"] == 64
    assert not (trained / "checkpoint.safetensors").exists()


def test_pretrained_sae_is_taken_as_it_is_and_finetuned_moves(run, trained, tmp_path):
    start = ["--source", RANDOM, "--sae-from", trained]
    same = run("sae", tmp_path / "p", *start, "--init", "pretrained")
    moved = run("sae", tmp_path / "f", *start, "--init", "finetune", "--steps", 2)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    a, b, c = (sae.load_sae(d)(x) for d in (trained, same, moved))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    assert sae.load_sae(moved).n_latents == 64      # the shape is the file's, not the preset's


@pytest.mark.parametrize("flags", [
    ["--splice", "random"], ["--splice", "noise"], ["--sae-grad", "on"],
    ["--teacher", "source", "--source", RANDOM + "@7"]])
def test_every_arm_trains_and_its_adapter_loads(run, flags, trained, tmp_path):
    out = run("tune", tmp_path / "t", "--target", RANDOM, "--sae", trained, "--steps", 2,
              "--lr", 1e-2, *flags)
    base, tuned = model.load_model(RANDOM), model.load_model(f"{RANDOM}+{out}")
    ids = torch.arange(10)[None]
    assert (base(ids) - tuned(ids)).abs().max() > 1e-5
    below = model.read_adapter(str(out))["pairs"]["model.layers.0.mlp.up_proj"][1].abs().max() > 0
    assert below == ("on" in flags)      # below the hook only if gradient passes the SAE


@pytest.mark.parametrize("splice", ["sae", "random", "noise"])
def test_what_is_spliced_computes_in_fp32_also_in_a_bf16_model(splice, trained):
    args = train.settings("tune", ["--dtype", "bfloat16", "--sae", str(trained), "--splice", splice,
                                   "--device", "cpu"])
    lm = model.load_model(RANDOM, "bfloat16")
    found = train.make_splice(args, lm)
    assert {t.dtype for t in found.parameters()} == {torch.float32}
    x = resa.activations(lm, torch.arange(8)[None], 1)
    assert x.dtype == found(x).dtype == torch.bfloat16


def test_sft_lowers_its_loss_and_rl_runs(run, tmp_path):
    out = run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 8, "--lr", 1e-2)
    ce = [json.loads(line)["ce"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ce[-1] < ce[0] - 0.1
    run("rl", tmp_path / "r", "--target", RANDOM, "--steps", 1)
    assert model.read_adapter(str(tmp_path / "r"))["r"] == 32


# ---- resume -------------------------------------------------------------------------------------

def test_a_start_is_trained_in_fp32_by_the_flags_and_a_pretrained_one_keeps_its_origin(
        run, trained, tmp_path):
    half = sae.load_sae(trained).bfloat16()
    half.meta["data"] = "elsewhere"
    sae.save_sae(half, tmp_path / "layers.1")
    tuned = run("sae", tmp_path / "f", "--source", RANDOM, "--init", "finetune", "--sae-from",
                tmp_path / "layers.1", "--steps", 1, "--aux-coef", 0.5, "--dead-after", 7)
    back = sae.load_sae(tuned)
    assert (back.W_enc.dtype, back.aux_coef, back.dead_after) == (torch.float32, 0.5, 7)
    assert json.loads((tuned / "config.json").read_text())["settings"]["latents"] == 64
    kept = run("sae", tmp_path / "p", "--source", RANDOM + "@3", "--init", "pretrained",
               "--sae-from", f"{tmp_path}#layers.1")
    origin = sae.load_sae(kept).meta
    assert origin["data"] == "elsewhere" and not origin["model"].endswith("@3")


def test_a_folder_named_as_sparsify_does_says_where_its_sae_belongs(run, trained, tmp_path):
    bare = sae.load_sae(trained)
    bare.meta = {}
    sae.save_sae(bare, tmp_path / "layers.2")
    for spec in (tmp_path / "layers.2", f"{tmp_path}#layers.2"):
        with pytest.raises(ValueError, match="trained at layer 2, not at 1"):
            run("tune", tmp_path / "o", "--target", RANDOM, "--sae", spec, "--steps", 1)


def test_a_micro_batch_bounds_every_pass_the_first_included(run, tmp_path, monkeypatch):
    rows, activations = [], resa.activations

    def noted(model, ids, *where):
        rows.append(len(ids))
        return activations(model, ids, *where)
    monkeypatch.setattr(resa, "activations", noted)
    run("sae", tmp_path / "s", "--source", RANDOM, "--steps", 1, "--latents", 64, "--k", 4,
        "--micro-batch", 1)
    assert set(rows) == {1}


def test_a_new_run_that_fails_leaves_no_old_artifact_to_be_taken_for_its_own(run, tmp_path):
    out = run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 1)
    with pytest.raises(ValueError, match="not a finite number"):
        run("sft", out, "--target", RANDOM, "--steps", 4, "--lr", 1e30, "--fresh")
    with pytest.raises(OSError):
        model.read_adapter(str(out))
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize("stage, flags, artifact", [
    ("sae", ["--source", RANDOM, "--latents", "64", "--k", "4", "--optimizer", "signum"],
     "sae.safetensors"),
    ("tune", ["--target", RANDOM], "adapter_model.safetensors")])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(run, data, stage, flags, artifact, trained,
                                                        tmp_path):
    """A real process, a real SIGKILL at whatever moment it hits, a real --resume."""
    flags = [*flags, "--steps", 12] + (["--sae", trained] if stage == "tune" else [])
    whole = run(stage, tmp_path / "whole", *flags)
    part = tmp_path / "part"
    argv = [sys.executable, "train.py", "--stage", stage, "--preset", "tiny", "--data", str(data), *SMALL,
            *map(str, flags), "--out", str(part)]
    process = subprocess.Popen([*argv, "--save-every", "1"], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (part / "checkpoint.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (part / "checkpoint.safetensors").exists() and not (part / artifact).exists()
    train.main([*argv[2:], "--save-every", "1", "--resume"])
    assert (part / artifact).read_bytes() == (whole / artifact).read_bytes()
    assert logged(part) == logged(whole) and len(logged(whole)) == 12


def write_state(path, record, tensors):
    text = json.dumps(record)
    save_file(tensors, path, {"record": text, "sha256": runs.checksum(tensors, text)})


def read_state(path):
    with safe_open(str(path), framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        return record, {name: file.get_tensor(name) for name in file.keys()}


def test_resume_refuses_other_settings_and_an_unfinished_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "o").mkdir()
    write_state(tmp_path / "o" / "checkpoint.safetensors", {"step": 1, "settings": {}},
                {"rng": torch.get_rng_state()})
    flags = ["--source", RANDOM, "--steps", 2, "--latents", 64, "--k", 4]
    with pytest.raises(ValueError, match="--resume continues it"):
        run("sae", tmp_path / "o", *flags)
    with pytest.raises(ValueError, match="other settings"):
        run("sae", tmp_path / "o", *flags, "--resume")
    with pytest.raises(ValueError, match="no checkpoint: start again without --resume"):
        run("sae", tmp_path / "none", *flags, "--resume")


def scalar(record, tensors):
    tensors[next(iter(tensors))] = torch.ones(1)      # would broadcast


DAMAGED = {
    "no tensor": lambda record, tensors: tensors.pop(next(iter(tensors))),
    "no settings": lambda record, tensors: record.pop("settings"),
    "no optimizer": lambda record, tensors: record.pop("groups"),
    "no random state": lambda record, tensors: tensors.pop("rng"),
    "a scalar": scalar,
    "a list": lambda record, tensors: record.update(settings=[1]),
    "random state": lambda record, tensors: tensors.update(rng=torch.zeros(3))}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written(run, damage, tmp_path,
                                                                        monkeypatch):
    flags = ["--target", RANDOM, "--steps", 3, "--save-every", 1]

    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(resa, "save_adapter", stop)      # stopped at the end
        with pytest.raises(KeyboardInterrupt):
            run("sft", tmp_path / "o", *flags)
    path = tmp_path / "o" / "checkpoint.safetensors"
    record, tensors = read_state(path)
    tensors = dict(sorted(tensors.items(), key=lambda item: not item[0].startswith("model.")))
    DAMAGED[damage](record, tensors)
    write_state(path, record, tensors)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(ValueError, match="checkpoint.safetensors: "):
        run("sft", tmp_path / "o", *flags, "--resume")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("header", [{"record": "{"}, {"state": "{}"}, {"record": "NaN"}, None])
def test_a_header_that_is_no_state_is_refused(run, header, tmp_path):
    save_file({"0": torch.ones(1)}, tmp_path / "checkpoint.safetensors", header)
    with pytest.raises(ValueError, match="checkpoint.safetensors: cannot resume"):
        run("sft", tmp_path, "--target", RANDOM, "--steps", 2, "--resume")


def test_a_full_disk_is_one_line_and_leaves_no_temporary(run, tmp_path, capsys):
    """A limit on the size of files is a disk that is full, as far as a writer can tell."""
    out, limits = tmp_path / "o", resource.getrlimit(resource.RLIMIT_FSIZE)
    for more, message in ((["--save-every", 1], f"{out}: could not be written"),
                          ([], "File too large")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(SystemExit):
                front_door(lambda argv: run("sft", out, "--target", RANDOM, "--steps", 2, *more))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "metrics.jsonl"]
        assert list(tmp_path.iterdir()) == [out]


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    with pytest.raises(ValueError, match="lower --lr"):      # bad only after the last step
        run("sae", tmp_path / "o", "--source", RANDOM, "--latents", 64, "--k", 4, "--steps", 1,
            "--lr", 1e36)
    assert not (tmp_path / "o" / "cfg.json").exists()
    with pytest.raises(ValueError, match="lower --lr"):      # bad between two logged steps
        run("sft", tmp_path / "s", "--target", RANDOM, "--steps", 9, "--save-every", 4,
            "--log-every", 9, "--lr", 1e30)
    assert not (tmp_path / "s" / "checkpoint.safetensors").exists()


# ---- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("sae --preset tiny --source nowhere", "nowhere: no such directory"),
    ("sae --preset tiny --source some-owner/some-model", "offline, download it and pass its path"),
    (f"sae --source {RANDOM} --data no.jsonl", "no.jsonl: no such file"),
    (f"sae --source {RANDOM} --layer 9", "layer 9: this model has blocks 0 .. 3"),
    (f"sae --source {RANDOM} --k 2000", "k="),
    (f"sae --source {RANDOM} --sae-from x", "--sae-from goes with --init"),
    (f"sae --source {RANDOM} --init finetune", "--sae-from goes with --init"),
    ("sae --init pretrained --sae-from x --lr 1", "--lr has no effect"),
    ("sae --init finetune --sae-from x --k 4", "--k has no effect"),
    ("sae --latnets 3", "did you mean --latents?"),
    ("tune --latents 3", "no flag '--latents'"),
    ("rl --batch 3", "no flag '--batch'"),
    ("tune --splice none", "nothing to learn"),
    (f"tune --splice none --teacher source --source {RANDOM} --target {RANDOM} --sae-grad on",
     "no effect with --splice none"),
    (f"tune --splice none --teacher source --source {RANDOM} --target {RANDOM} --layer 2",
     "--layer has no effect with"),
    ("tune --preset tiny --source x", "--source has no effect with --teacher target"),
    ("tune --preset tinny", "no preset 'tinny'"),
    (f"tune --sae nowhere --target {RANDOM}", "nowhere: no such directory"),
    (f"pretrain --model {RANDOM} --only zebra", "no parameter has a name like that"),
    (f"pretrain --model {RANDOM} --only (", "not a regular expression"),
    (f"rl --target {RANDOM}", "--steps is needed in --stage rl: preset tiny has none"),
    ("rl --target x --data y --steps 3", "--lr is needed in --stage rl"),
    ("sae --data y", "--source is needed in --stage sae: nothing stands for it"),
    ("tune --target x", "--data is needed in --stage tune: nothing stands for it"),
    (f"rl --target {RANDOM} --steps 1 --rewards beauty", "invalid choice: 'beauty'"),
    ("rl --steps 1 --group 1", "--group: 1 should be at least 2"),
    ("sae --batch 0", "--batch: 0 should be at least 1"),
    ("sae --lr fast", "argument --lr: invalid"),
    ("sae --micro-batch -1", "--micro-batch: -1 should be at least 0"),
    ("sae --batch 3 --micro-batch 2", "does not divide the batch, 3"),
    ("rl --questions 3 --group 3 --micro-batch 2", "does not divide the batch, 9"),
    ("sae --epochs -3", "--epochs: -3 should be at least 1"),
    ("sae --epochs 2 --steps 2", "--epochs has no effect with --steps"),
    ("sae --seq-len 1", "--seq-len: 1 should be at least 2"),
    ("sae --device banana", "banana"),
    (f"sae --source {RANDOM} --init finetune --sae-from x#y#z", "x"),
    ("tune --lr -1", "--lr: -1 should be finite, at least 0"),          # would climb the loss
    ("tune --lr nan", "--lr: nan should be finite, at least 0"),
    ("tune --lr 0", "--lr must be above 0"),
    ("tune --lora-alpha 0", "--lora-alpha: 0 should be at least 1"),
    ("tune --lora-dropout 1.5", "--lora-dropout: 1.5 should be finite, at least 0 and at most"),
    (f"tune --seed {2**70}", "--seed: "),
    ("rl --temperature 0 --steps 1", "--temperature: 0 should be finite, above 0"),
    ("rl --questions -1 --steps 1", "--questions: -1 should be at least 1"),
    (f"rl --questions 9999 --steps 1 --target {RANDOM}", "has 4000"),
    ("rl --beta nan --steps 1", "--beta: nan should be finite, at least 0"),
    ("pretrain --warmup -5", "--warmup: -5 should be at least 0"),
    ("pretrain", "--model is needed in --stage pretrain"),
    ("tune --resume --fresh", "--resume goes on, --fresh starts over: which?"),
    (f"pretrain --model {RANDOM} --dtype bfloat16", "needs --dtype float32"),
    ("dance", "--stage sae | tune | sft | rl | pretrain"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=lambda text: text[:60])
def test_refused_in_one_line_before_anything_is_written(words, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError)) as caught:
        train.main(["--stage", *words.split(), "--out", str(out)])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


def test_without_a_stage_there_is_a_short_usage_and_with_help_a_longer_one(capsys):
    for argv in ([], ["--latents", "3"], ["--stage"]):
        with pytest.raises(ValueError, match=r"usage: train.py --stage sae \| tune \| .* --help"):
            train.main(argv)
    train.main(["--help"])
    assert "--stage pretrain" in capsys.readouterr().out
    for stage in train.RUN:
        with pytest.raises(SystemExit):
            train.main([f"--stage={stage}", "--help"])
        assert "--micro-batch" in capsys.readouterr().out


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
    ("sft", b'{"text": 5}\n', ":1: 'text' should be text"),
    ("sft", b'{"problem": "a", "completion": null}\n', ':1: no "answer"'),
    ("sft", b'{"text": "a"}\n{"completion": "b"}\n', ":2: no 'problem'"),
    ("sft", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8"),
    ("sft", b'{"problem": "\xe9", "answer": "1"}\n', "not UTF-8"),
    ("sft", b'{"text": "a"}\n{"text": ' + b"[" * 99999, ":2: not JSON"),
    ("sft", b"", "no problems"),
    ("rl", b'{"problem": "1+1?", "completion": "2"}\n', ':1: no "answer"'),
    ("rl", b'{"text": "1+1=2"}\n', ':1: no "problem"')]


@pytest.mark.parametrize("stage, content, message", BAD_DATA)
def test_rows_of_the_wrong_kind_are_named(stage, content, message, tmp_path):
    path, out = tmp_path / "d.jsonl", tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        train.main(["--stage", stage, "--target", RANDOM, "--preset", "tiny", "--data", str(path), "--steps", "1",
                    "--out", str(out)])
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert not out.exists()


def test_rows_of_text_may_hold_blank_lines_and_a_field_that_says_text_is_not_one(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"problem": "b", "completion": "c"}\n\n')
    assert len(train.read_rows(path)) == 2
    path.write_text('{"problem": "1+1?", "answer": "2", "source": "text"}\n')
    assert train.read_rows(path)[0]["answer"] == "2"


def test_malformed_line_is_named_and_exit_code_is_2(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "x"}\n')
    done = command("train.py", "--stage", "sae", "--source", RANDOM, "--preset", "tiny", "--data", data,
                   "--out", tmp_path / "o")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "o").exists()
    assert done.stderr == (f'error: {data}:2: no "answer" field; name it with --fields answer=COLUMN, one of '
                           'problem\n')


def test_a_run_that_diverges_stops_and_says_so(run, tmp_path, trained):
    with pytest.raises(ValueError, match="not a finite number"):
        run("sft", tmp_path / "o", "--target", RANDOM, "--steps", 20, "--lr", 1e30)
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()


def test_micro_batches_learn_what_the_whole_batch_learns(run, tmp_path):
    flags = ["--target", RANDOM, "--steps", 3, "--lora-dropout", 0, "--lr", 1e-3]
    whole = run("sft", tmp_path / "a", *flags)
    parts = run("sft", tmp_path / "b", *flags, "--micro-batch", 1)
    a, b = (model.load_model(f"{RANDOM}+{d}") for d in (whole, parts))
    ids = torch.arange(40)[None]
    assert torch.allclose(a(ids), b(ids), atol=1e-4)
    assert not torch.allclose(a(ids), model.load_model(RANDOM)(ids), atol=1e-3)


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    config = json.loads((ROOT / "data/tiny/init/config.json").read_text()) | {"vocab_size": 100}
    for path in (ROOT / "data/tiny/init").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the model knows 100: of two models"):
        run("sft", tmp_path / "o", "--target", f"random:{tmp_path}/config.json", "--steps", 1)


def test_the_published_recipe_runs_on_a_real_tokenizer_in_bf16(shared, data, tmp_path):
    """resa-still-v3 from SAE to adapter: R1-Distill's tokenizer and vocabulary, a small body."""
    source = shared / "tokenizers" / "deepseek-r1-distill-qwen"
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2)
    config = json.loads((source / "config.json").read_text()) | small
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).symlink_to(source / name)
    spec = f"random:{tmp_path}/config.json"
    common = ["--preset", "resa-still-v3", "--device", "cpu", "--layer", "1", "--data", str(data),
              "--seq-len", "64"]
    train.main(["--stage", "sae", *common, "--source", spec, "--latents", "128", "--batch", "2",
                "--steps", "3", "--out", str(tmp_path / "sae")])
    train.main(["--stage", "tune", *common, "--target", spec, "--sae", str(tmp_path / "sae"),
                "--steps", "2", "--out", str(tmp_path / "adapter")])
    settings = json.loads((tmp_path / "adapter" / "config.json").read_text())["settings"]
    assert settings["lr"] == 1e-6 and settings["kl_reduction"] == "sequence"
    assert settings["dtype"] == "bfloat16"
    adapter = model.read_adapter(str(tmp_path / "adapter"))
    assert adapter["r"] == 32 and set(adapter["scales"].values()) == {4} and len(adapter["pairs"]) == 3 * 7
    above, below = (adapter["pairs"][f"model.layers.{i}.mlp.up_proj"][1] for i in (2, 1))
    assert above.abs().max() > 0      # in fp32: at this rate bf16 stands still
    assert below.abs().max() == 0


# ---- presets ------------------------------------------------------------------------------------

# arXiv 2506.09967, Table 1: source, target, trigger, elicitation, mode.
TABLE_1 = """
resa-still-v1       Tina-STILL       R1-Distill  still       still       finetune
resa-still-v2       R1-Distill       R1-Distill  still       still       pretrained
resa-still-v3       Tina-STILL       R1-Distill  still       still       scratch
resa-still-v4       R1-Distill       R1-Distill  still       still       finetune
resa-still-v5       R1-Distill       R1-Distill  still       still       scratch
resa-deepscaler-v1  Tina-DeepScaleR  R1-Distill  deepscaler  deepscaler  finetune
resa-deepscaler-v2  Tina-DeepScaleR  R1-Distill  deepscaler  deepscaler  scratch
resa-deepscaler-v3  R1-Distill       R1-Distill  deepscaler  deepscaler  scratch
resa-deepscaler-v4  Tina-STILL       R1-Distill  still       deepscaler  finetune
"""
SPECS = {"R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}
for NAME, STEP in (("STILL", 2000), ("DeepScaleR", 1000)):
    ADAPTER = f"Tina-Yi/R1-Distill-Qwen-1.5B-{NAME}#checkpoint-{STEP}"
    SPECS[f"Tina-{NAME}"] = f"{SPECS['R1-Distill']}+{ADAPTER}"


@pytest.mark.parametrize("row", TABLE_1.split("\n")[1:-1], ids=lambda row: row.split()[0])
def test_presets_are_the_papers(row):
    name, source, target, trigger, elicitation, mode = row.split()
    s, t, sft = (train.settings(stage, ["--preset", name, "--device", "cpu"])
                 for stage in ("sae", "tune", "sft"))
    assert (s.source, t.target) == (SPECS[source], SPECS[target])
    assert (s.data, t.data, sft.data, s.init) == (trigger, elicitation, elicitation, mode)
    assert (s.other_site, t.other_site) == (mode == "pretrained",) * 2
    assert bool(s.sae_from) == (mode != "scratch")
    assert (s.latents, s.k, s.optimizer, s.lr) == (65536, 32, "signum", None)
    assert (s.layer, s.site, s.batch, s.seq_len) == (12, "resid", 32, 2048)
    assert (s.shuffle, s.template, s.dtype) == (False, "resa", "bfloat16")
    assert (t.lr, t.epochs, t.batch, t.schedule) == (1e-6, 2, 2, "constant")
    assert (t.lora_r, t.lora_alpha) == (32, 128)
    assert (t.kl_reduction, t.sae_grad, t.teacher) == ("sequence", "off", "target")


@pytest.mark.parametrize("name, steps, reward", [
    ("tina-still", 7500, "length"), ("tina-deepscaler", 11000, "format")])
def test_rl_presets_follow_tina(name, steps, reward):
    args = train.settings("rl", ["--preset", name, "--device", "cpu"])
    assert (args.steps, args.warmup, args.schedule, args.lr) == (steps, steps // 10, "cosine", 1e-6)
    assert (args.group, args.temperature, args.beta) == (4, 0.7, 0.04)
    assert args.max_new_tokens == 3584
    assert args.rewards == ["accuracy", reward]
    assert train.learning_rate(0, args) == 1e-6 / (steps // 10)


def test_an_sae_may_be_used_at_another_site_if_that_is_said(run, at_mlp, tmp_path):
    flags = ["--target", RANDOM, "--steps", 1]
    with pytest.raises(ValueError, match="site mlp, not at resid: .* or --other-site"):
        run("tune", tmp_path / "a", *flags, "--sae", at_mlp)
    assert not (tmp_path / "a").exists()
    # As the preset of the published arm does it: measured where it does not belong, spliced there.
    pretrained = ["--source", RANDOM, "--init", "pretrained", "--sae-from", at_mlp]
    with pytest.raises(ValueError, match="site mlp, not at resid"):
        run("sae", tmp_path / "s", *pretrained)
    run("sae", tmp_path / "s", *pretrained, "--other-site")
    assert sae.load_sae(tmp_path / "s").meta["site"] == "mlp"      # it was trained nowhere else
    run("tune", tmp_path / "t", *flags, "--sae", tmp_path / "s", "--other-site")


@pytest.mark.parametrize("flags, first", [([], 2), (["--sae-grad", "on"], 0)])
def test_adapters_learn_where_a_gradient_arrives(run, trained, tmp_path, flags, first):
    run("tune", tmp_path / "out", "--target", RANDOM, "--sae", trained, "--teacher", "source",
        "--source", RANDOM + "@1", "--steps", 1, *flags)
    pairs = model.read_adapter(str(tmp_path / "out"))["pairs"]
    moved = {int(name.split(".")[2]) for name, (_, B) in pairs.items() if B.any()}
    assert moved == set(range(first, 4))


# ---- FLOPs --------------------------------------------------------------------------------------

def counted(function):
    """FLOPs torch counts in matrix products, attention among them, of all pairs of tokens."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def step_of(stage, flags):
    """A real step on random ids -> (function, its settings, model, SAE, number of tokens).

    Rows are short: torch also counts the pairs that causal attention masks.  The SAE is dense:
    torch does not count sparse products.
    """
    argv = ["--batch", "16", "--seq-len", "16", "--device", "cpu", *flags]
    args, rng = train.settings(stage, argv), torch.Generator().manual_seed(0)
    ids = torch.randint(542, (16, 16), generator=rng)
    lm, found, teacher = model.load_model(DISTILL), None, None
    if stage in ("sae", "tune"):
        found = sae.build("relu", 128, 1024)
        found.layer = args.layer
    if stage == "sae":
        optimizer = sae.make_optimizer(found, "adam", 1e-3)
    elif stage == "pretrain":
        lm.requires_grad_(True)
    else:
        resa.add_lora(lm).train()
    if stage == "tune":
        found.requires_grad_(False)
        teacher = model.load_model(f"{ROOT}/data/tiny/lm") if args.teacher == "source" else None

    def step():
        if stage == "sae":
            x = resa.activations(lm, ids, args.layer).flatten(0, 1)
            sae.train_step(found, optimizer, [x])
        elif stage == "tune":
            grad = args.sae_grad == "on"
            resa.tuning_loss(lm, found, args.layer, ids, args.site, grad,
                             teacher=teacher).backward()
        else:
            train.cross_entropy(lm, ids).backward()
    return step, args, lm, found, ids.numel()


@pytest.mark.parametrize("stage, flags", [
    ("sae", []), ("tune", []), ("tune", ["--sae-grad", "on"]), ("tune", ["--teacher", "source"]),
    ("tune", ["--site", "mlp", "--sae-grad", "on"]), ("sft", []), ("pretrain", [])])
def test_flops_are_those_that_torch_counts(stage, flags):
    step, args, lm, found, tokens = step_of(stage, flags)
    count = tokens * train.training_flops(stage, args, lm, found)
    print(stage, flags, counted(step) / count)
    assert counted(step) == pytest.approx(count, rel=0.05)


def test_sparse_products_cost_what_they_read():
    """By hand, as torch counts none: a step decodes, then scatters into four gradients."""
    args, lm = train.settings("sae", ["--device", "cpu"]), model.load_model(RANDOM)
    sparse, dense = sae.build("topk", 128, 1024, k=16), sae.build("relu", 128, 1024)
    sparse.layer = dense.layer = args.layer
    a, b = (train.training_flops("sae", args, lm, found) for found in (sparse, dense))
    assert b - a == 5 * 2 * 128 * (1024 - 16)


def test_experts_and_attention_count_as_far_as_a_token_uses_them():
    config = model.Config(vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=6, shared_expert_intermediate_size=5)
    with torch.device("meta"):
        count = flops.block_flops(model.Transformer(config), 3)
    assert count == 2 * (4 * 64 + 2 * 3 * 8 * 6 + 3 * 8 * 5 + 4 * 8 + 8) + 2 * 3 * 8


# ---- --stage rl ---------------------------------------------------------------------------------

FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapters(out):
    folders = [out, *(path for path in sorted(out.glob("checkpoint-*")) if path.is_dir())]
    return {path.name: [(path / name).read_bytes() for name in FILES] for path in folders}


def test_rl_counts_the_tokens_of_prompts_and_samples(run, data, tmp_path):
    out = run("rl", tmp_path / "r", "--target", RANDOM, "--steps", 2)
    tok, rows = model.load_tokenizer(RANDOM), read_problems(data)
    sampled = sum(4 * row["length"] for row in logged(out))
    prompts = 0
    for step in range(2):
        for i in train.order(len(rows), 0, step)[:2]:
            prompts += len(tok.encode(tok.chat(messages_of(rows[i], OWN_PROMPT))))
    assert summary(out)["tokens"] == 2 * prompts + round(sampled)      # groups of 2
    lm = resa.add_lora(model.load_model(RANDOM))
    per_token = train.training_flops("rl", train.settings("rl", ["--device", "cpu", *RL]), lm)
    assert summary(out)["flops"] == summary(out)["tokens"] * per_token


def test_an_adapter_along_the_way_is_that_of_a_run_of_so_many_steps(run, tmp_path):
    long, rl = tmp_path / "long", ["--target", RANDOM]
    run("rl", long, *rl, "--steps", 4, "--save-every", 2)
    run("rl", tmp_path / "short", *rl, "--steps", 2)
    run("rl", tmp_path / "plain", *rl, "--steps", 4)
    found = adapters(long)
    assert list(found) == ["long", "checkpoint-2", "checkpoint-4"]
    assert found["checkpoint-2"] == adapters(tmp_path / "short")["short"] != found["long"]
    assert found["checkpoint-4"] == found["long"] == adapters(tmp_path / "plain")["plain"]
    assert model.load_model(f"{RANDOM}+{long}/checkpoint-2")


def test_rl_interrupted_and_resumed_keeps_its_adapters_and_its_counts(run, tmp_path):
    flags, part = ["--target", RANDOM, "--steps", 6, "--save-every", 2], tmp_path / "part"
    whole = run("rl", tmp_path / "whole", *flags)
    part.mkdir()
    (part / "checkpoint-4").write_text("in the way")
    with pytest.raises(OSError):
        run("rl", part, *flags)
    assert (part / "checkpoint-2").is_dir() and not (part / FILES[0]).exists()
    (part / "checkpoint-4").unlink()
    run("rl", part, *flags, "--resume")
    for name in ("tokens", "flops"):
        assert summary(part)[name] == summary(whole)[name]
    ours, theirs = adapters(part), adapters(whole)
    assert ours.pop("part") == theirs.pop("whole") and ours == theirs and len(ours) == 3


def test_rl_learns_the_same_in_micro_batches(run, tmp_path):
    flags = ["--target", DISTILL, "--steps", 1, "--lora-dropout", 0, "--group", 4,
             "--max-new-tokens", 64]
    a, = logged(run("rl", tmp_path / "a", *flags))
    b, = logged(run("rl", tmp_path / "b", *flags, "--micro-batch", 1))
    assert a["norm"] == pytest.approx(b["norm"], rel=1e-4) and a["reward"] == b["reward"]
    assert a["norm"] > 0.01


def test_data_that_cannot_be_had_shows_before_the_model_is_loaded(tmp_path):
    named = {"sae": "--source", "pretrain": "--model"}      # the flag of the model, else --target
    for stage in train.RUN:
        with pytest.raises(ValueError, match="no-such.jsonl: no such file"):
            train.main(["--stage", stage, named.get(stage, "--target"), "no-such-model", "--preset", "tiny", "--data",
                        "no-such.jsonl", "--out", str(tmp_path / "o"), "--steps", "1"])


def test_speed_flags_take_effect_and_change_no_result(tmp_path, monkeypatch, data):
    """--compile (up to the graphs it finds: C++ is slow) and --checkpointing, of training and eval."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    frames, calls = torch._dynamo.utils.counters["frames"], []
    forward = Block.forward

    def counted(self, *args):
        calls.extend([1] * self.training)                    # not what is measured before and after
        return forward(self, *args)

    def adapter_of(*flags):
        frames.clear(), calls.clear()
        out = tmp_path / f"sft{''.join(flags)}"
        train.main(["--stage", "sft", "--target", DISTILL, "--preset", "tiny", "--data", str(data), "--seq-len", "32",
                    "--batch", "2", "--steps", "3", "--out", str(out), "--lora-dropout", "0", *flags])
        return load_file(out / "adapter_model.safetensors")
    compiled = adapter_of("--compile")
    assert frames["ok"] == frames["total"] > 0
    monkeypatch.setattr(Block, "forward", counted)
    plain, once = adapter_of(), len(calls)
    again = adapter_of("--checkpointing")
    assert len(calls) == 2 * once > 0 == frames["total"]
    for name, tensor in plain.items():
        assert torch.equal(again[name], tensor)
        assert torch.allclose(compiled[name], tensor, atol=1e-5), name
    monkeypatch.setattr(Block, "forward", forward)
    evaluate = ["--model", DISTILL, "--limit", "3", "--max-new-tokens", "6", "--out"]
    ev.main([*evaluate, str(tmp_path / "a")])
    assert not frames["total"]
    ev.main([*evaluate, str(tmp_path / "b"), "--compile"])
    assert frames["ok"] > 0
    a, b = (next((tmp_path / name / "eval/tiny").glob("*.jsonl")).read_text() for name in "ab")
    assert a == b
    torch._dynamo.reset()
