"""Presets, what a run would take (--dry-run), what it took (resa.py cost), and the adapters RL keeps along the way."""
import json
import re
import subprocess
import sys
import typing

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import resa
import sae
import train
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
SMALL = ["--seq-len", "64", "--batch", "2", "--log-every", "1"]
RL = ["--questions", "2", "--group", "2", "--max-new-tokens", "8", "--log-every", "1"]


NAMED = {"sae": "--source", "pretrain": "--model"}      # the flag of a stage's model, where not --target


@pytest.fixture(scope="module")
def run(data):
    """run(stage, directory, flags...): one small stage in this process; returns its summary."""
    def go(stage, out, *flags):
        train.main(["--stage", stage, "--data", str(data), *(RL if stage == "rl" else SMALL), "--out", str(out),
                    *(["--target", RANDOM] if stage not in ("sae", "pretrain") else []), *map(str, flags)])
        return json.loads((out / "summary.json").read_text())
    return go


@pytest.fixture(scope="module")
def at_mlp(run, tmp_path_factory):
    """An SAE of MLP outputs."""
    out = tmp_path_factory.mktemp("mlp") / "sae"
    run("sae", out, "--source", RANDOM, "--steps", 2, "--latents", 64, "--k", 4, "--site", "mlp")
    return out


def outcome(*argv, cwd=ROOT):
    """A command in a process of its own -> its exit code, what it printed, its error."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flags, blocks", [([], "2 .. 3"), (["--match", 1], "0 .. 3"), (["--sae-grad", "on"], "0 .. 3")])
def test_a_run_says_which_adapters_can_learn_and_these_do(run, tmp_path, capsys, flags, blocks):
    autoencoder = sae.build("topk", 128, 64, k=4)
    autoencoder.meta = {"layer": 1, "site": "resid", "sink_norm": None}
    sae.save_sae(autoencoder, tmp_path / "sae")
    run("tune", tmp_path / "out", "--sae", tmp_path / "sae", "--teacher", "source", "--source", RANDOM + "@1", "--steps", 1,
        *flags)
    assert f"adapters of blocks {blocks} can learn" in capsys.readouterr().out
    pairs = model.read_adapter(str(tmp_path / "out"))["pairs"]
    moved = {int(name.split(".")[2]) for name, (_, B) in pairs.items() if B.any()}
    assert moved == set(range(int(blocks[0]), 4))


# ---- presets ---------------------------------------------------------------------------------------------

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
SPECS |= {f"Tina-{name}": f"{SPECS['R1-Distill']}+Tina-Yi/R1-Distill-Qwen-1.5B-{name}#checkpoint-{step}"
          for name, step in (("STILL", 2000), ("DeepScaleR", 1000))}


@pytest.mark.parametrize("row", TABLE_1.split("\n")[1:-1], ids=lambda row: row.split()[0])
def test_presets_are_the_papers(row):
    name, source, target, trigger, elicitation, mode = row.split()
    s, t, sft = (resa.parse_flags(train.STAGES[stage], ["--preset", name], "test") for stage in ("sae", "tune", "sft"))
    assert (s.source, t.target) == (SPECS[source], SPECS[target])
    assert (s.data, t.data, sft.data, s.init) == (trigger, elicitation, elicitation, mode)
    assert (s.other_site, t.other_site) == (mode == "pretrained",) * 2 and bool(s.sae_from) == (mode != "scratch")
    assert (s.latents, s.k, s.optimizer, s.lr, s.layer, s.site) == (65536, 32, "signum", 0, 12, "resid")
    assert (s.batch, s.seq_len, s.shuffle, s.template, s.dtype) == (32, 2048, False, "resa", "bfloat16")
    assert (t.lr, t.epochs, t.batch, t.lora_r, t.lora_alpha, t.schedule) == (1e-6, 2, 2, 32, 128, "constant")
    assert (t.kl_reduction, t.sae_grad, t.teacher, t.clip) == ("sequence", "off", "target", 1.0)


@pytest.mark.parametrize("name, steps, reward", [("tina-still", 7500, "length"), ("tina-deepscaler", 11000, "format")])
def test_rl_presets_follow_tina(name, steps, reward):
    args = train.prepare("rl", ["--preset", name, "--device", "cpu"])
    assert (args.steps, args.warmup, args.schedule, args.lr) == (steps, steps // 10, "cosine", 1e-6)
    assert (args.group, args.temperature, args.beta, args.max_new_tokens) == (4, 0.7, 0.04, 3584)
    assert args.rewards == ["accuracy", reward] and train.rate_at(0, args, args.warmup) == 1e-6 / (steps // 10)


def test_an_sae_may_be_used_at_another_site_if_that_is_said(run, at_mlp, tmp_path, capsys):
    flags = ["--steps", 1, "--sae", at_mlp]
    with pytest.raises(ValueError, match="site mlp, not at resid: .* or --other-site"):
        run("tune", tmp_path / "a", *flags)
    with pytest.raises(ValueError, match="--other-site has no effect with an SAE that was trained where it is used"):
        run("tune", tmp_path / "a", *flags, "--site", "mlp", "--other-site")
    with pytest.raises(ValueError, match="--other-site has no effect with --init scratch"):
        run("sae", tmp_path / "a", "--source", RANDOM, "--other-site")
    with pytest.raises(ValueError, match="--other-site has no effect with --splice none"):
        run("tune", tmp_path / "a", "--other-site", "--splice", "none", "--teacher", "source", "--source", RANDOM)
    assert not (tmp_path / "a").exists()
    # As the preset of the published arm does it: measured where it does not belong, and spliced there.
    pretrained = ["--source", RANDOM, "--init", "pretrained", "--sae-from", at_mlp]
    with pytest.raises(ValueError, match="site mlp, not at resid"):
        run("sae", tmp_path / "s", *pretrained)
    run("sae", tmp_path / "s", *pretrained, "--other-site")
    assert sae.load_sae(tmp_path / "s").meta["site"] == "mlp"      # still so: it was not trained anywhere else
    run("tune", tmp_path / "t", "--steps", 1, "--sae", tmp_path / "s", "--other-site")
    assert capsys.readouterr().out.count("--other-site: the SAE was trained at site mlp, not at resid") == 2


# ---- what a run takes ------------------------------------------------------------------------------------

def counted(function):
    """FLOPs that torch counts in matrix products; it does not see embedding_bag, nor fused attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def step_of(stage, flags, batch=2):
    """A real step on random ids -> (function, its settings, model, SAE, number of tokens)."""
    argv = ["--batch", str(batch), "--seq-len", "128", "--device", "cpu", *flags]
    args, ids = train.prepare(stage, argv), torch.randint(542, (batch, 128), generator=torch.Generator().manual_seed(0))
    lm = model.load_model(f"{ROOT}/data/tiny/distill")
    autoencoder = sae.build("topk", 128, 1024, k=16) if stage in ("sae", "tune") else None
    if stage == "sae":
        optimizer = sae.make_optimizer(autoencoder, "adam", 1e-3)

        def step():
            return sae.train_step(autoencoder, optimizer, [resa.activations(lm, ids, args.layer).flatten(0, 1)])
    elif stage == "pretrain":
        lm.requires_grad_(True)
        step = lambda: train.cross_entropy(lm, ids).backward()
    else:
        resa.add_lora(lm).train()
        grad = stage == "tune" and args.sae_grad == "on"
        if autoencoder is not None:
            autoencoder.requires_grad_(False)
        step = lambda: (train.cross_entropy(lm, ids) if stage == "sft" else
                        resa.tuning_loss(lm, autoencoder, args.layer, ids, args.site, grad)).backward()
    return step, args, lm, autoencoder, ids.numel()


BELOW = 128 * 256 + 3 * 128 * 32      # the inputs of the first q, k and v need no gradient; the estimate has one
STEPS = [("sae", []), ("tune", []), ("tune", ["--sae-grad", "on"]), ("tune", ["--site", "mlp", "--sae-grad", "on"]),
         ("sft", []), ("pretrain", [])]


@pytest.mark.parametrize("flags", ["--into teacher", "--into gradient", "--into nothing --match 1", "--match 1",
                                   "--splice none", "--splice none --match 1"])
def test_flops_with_another_teacher_are_those_that_torch_counts(flags):
    args = train.prepare("tune", ["--teacher", "source", "--batch", "2", "--seq-len", "128", *flags.split()])
    ids, lm = torch.arange(256).view(2, 128), resa.add_lora(model.load_model(f"{ROOT}/data/tiny/distill")).train()
    autoencoder = sae.build("topk", 128, 1024, k=16).requires_grad_(False) if args.splice != "none" else None
    teacher = model.load_model(f"{ROOT}/data/tiny/lm")
    step = lambda: resa.tuning_loss(lm, autoencoder, args.layer, ids, teacher=teacher, into=args.into,
                                    match=args.match).backward()
    parts = train.times(256, train.training_flops("tune", args, lm, autoencoder, teacher))
    seen = sum(n for part, n in parts.items() if part not in ("attention", "SAE sparse"))
    assert counted(step) == pytest.approx(seen - 2 * 256 * BELOW, rel=0.02)


@pytest.mark.parametrize("stage, flags", STEPS, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_flops_are_those_that_torch_counts(stage, flags):
    step, args, lm, autoencoder, tokens = step_of(stage, flags)
    parts = train.times(tokens, train.training_flops(stage, args, lm, autoencoder))
    seen = sum(n for part, n in parts.items() if part not in ("attention", "SAE sparse"))
    fused = counted(step)
    assert fused == pytest.approx(seen, rel=0.05)
    nothing_below = (stage in ("tune", "sft")) * 2 * tokens * BELOW
    assert fused == pytest.approx(seen - nothing_below, rel=0.01)
    # Attention, by torch's unfused way: it computes the masked half too, and backward makes no scores again.
    with sdpa_kernel(SDPBackend.MATH):
        attention = counted(step) - fused
    T, width, shared = args.seq_len, 128, 2 if (stage, flags) == ("tune", []) else 0
    forward, backward = {"sae": (2, 0), "tune": (8 - shared, 4 - shared)}.get(stage, (4, 4))
    assert attention == 4 * T * width * tokens * (forward + 2 * backward)
    assert parts["attention"] == 2 * T * width * tokens * (forward + 2.5 * backward)


def test_what_the_estimate_counts_too_much_is_known_and_the_head_is_made_again_past_one_chunk():
    step, args, lm, _, tokens = step_of("sft", [], batch=33)
    parts, head = train.times(tokens, train.training_flops("sft", args, lm)), 2 * 128 * 542
    last_positions = 33 * 3 * head                                 # predict nothing
    assert counted(step) == parts["blocks"] + parts["LoRA"] + parts["head"] - 2 * tokens * BELOW - last_positions


def test_sparse_products_cost_what_they_read():
    """By hand, as torch counts none of them: a training step decodes, then scatters into four gradients."""
    args, lm = train.prepare("sae", ["--device", "cpu"]), model.load_model(RANDOM)
    assert train.training_flops("sae", args, lm, sae.build("topk", 128, 1024, k=16))["SAE sparse"] == 5 * 2 * 128 * 16
    assert train.training_flops("sae", args, lm, sae.build("relu", 128, 1024))["SAE sparse"] == 5 * 2 * 128 * 1024


def test_experts_count_as_far_as_a_token_uses_them():
    config = model.Config(vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6,
                          shared_expert_intermediate_size=5)
    with torch.device("meta"):
        parts = train.block_flops(model.Transformer(config), 3)
    assert parts["blocks"] == 2 * (4 * 64 + 2 * 3 * 8 * 6 + 3 * 8 * 5 + 4 * 8 + 8)


def test_what_a_block_keeps_is_what_autograd_saves():
    def saved(function):
        held = {}

        def note(t):
            held[t.untyped_storage()._cdata] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = function()
        own = {p.untyped_storage()._cdata for p in lm.parameters()}
        return loss is not None and sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in own)
    lm, ids = resa.add_lora(model.load_model(f"{ROOT}/data/tiny/distill")).train(), torch.arange(256)[None]
    x_hat = lm.run(ids, stop=2).detach()
    one, two = (saved(lambda: lm.run(x_hat, start=start)) for start in (3, 2))
    meta = resa.add_lora(train.outline(f"{ROOT}/data/tiny/distill", train.Sae()))
    assert 256 * train.kept_bytes(meta) == pytest.approx(two - one, rel=0.05)


def test_shapes_of_the_presets_give_the_published_counts():
    args = train.prepare("tune", ["--preset", "resa-still-v1", "--dry-run"])
    lm = train.outline(args.target, args)
    assert train.trained(lm) == 1_777_088_000
    assert train.trained(train.outline("Qwen/Qwen2.5-Math-1.5B@main", args)) == 1_777_088_000 - 151936 * 1536
    resa.add_lora(lm)
    assert sum(p.numel() for p in lm.parameters() if p.requires_grad) == 36_929_536


def test_dry_run_prints_what_a_preset_takes_and_touches_nothing(tmp_path):
    code, out, err = outcome(ROOT / "train.py", "--preset", "resa-still-v3", "--dry-run", "--gpu", "h100",
                             "--dollars-per-hour", "2", cwd=tmp_path)
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    for fact in ("--stage sae --preset resa-still-v3", "--stage tune", "1,777,088,000", "201,393,664", "36,929,536",
                 "lr=0.0025", "5,931,008 tokens in 2,896 chunks, as published", "89 of 65,536 tokens",
                 "2,896 of 4,096 tokens",
                 "GB of 80, fits", "at $2.00 an hour\n", "\nin all: ", "sae=out/resa-still-v3/sae"):
        assert fact in out, fact
    cost = [float(dollars) for dollars in re.findall(r"cost +\$(\d+\.\d+)", out)]
    assert float(re.search(r"in all: .*\$(\d+\.\d+)", out)[1]) == pytest.approx(sum(cost), abs=0.011)


@pytest.mark.parametrize("preset", resa.PRESETS)
def test_every_preset_can_be_estimated(preset, data, capsys):
    train.main(["--preset", preset, "--dry-run", *(["--data", str(data)] if preset == "tiny" else [])])
    out = capsys.readouterr().out
    assert ("--stage rl" in out) == preset.startswith("tina") and "in all: " in out and "does not fit" not in out
    if "deepscaler" in preset and "v4" not in preset and "resa" in preset:
        assert out.count("7,839,744 tokens") == 2


def test_a_local_model_is_read_for_its_config_and_tokenizer_alone(data, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((ROOT / "data/tiny/distill" / name).read_bytes())
    for stage in train.STAGES:
        train.main(["--stage", stage, NAMED.get(stage, "--target"), str(tmp_path), "--data", str(data), "--dry-run",
                    "--gpu", "cpu", "--steps", "3", "--out", str(tmp_path / "o")])
        out = capsys.readouterr().out
        assert "661,376 parameters" in out and "on one cpu" in out and ("counted" in out or "100 questions" in out)
    assert not (tmp_path / "o").exists()


def test_an_estimate_is_what_the_run_then_counts(run, data, tmp_path, capsys):
    flags = ["--source", RANDOM, "--steps", "2", "--latents", "64", "--k", "4", *SMALL, "--data", str(data)]
    train.main(["--stage", "sae", *flags, "--dry-run"])
    said = float(re.search(r"FLOPs .*: (\S+)\n", capsys.readouterr().out)[1])
    summary = run("sae", tmp_path / "o", *flags)
    assert summary["tokens"] == 2 * 2 * 64 and summary["flops"] == pytest.approx(said, rel=0.01)
    assert summary["device"] == f"cpu, threads: {torch.get_num_threads()}"


def test_what_is_not_known_is_said(capsys):
    train.main(["--preset", "resa-still-v3", "--data", "limr", "--dry-run"])
    out = capsys.readouterr().out
    assert out.count("how many tokens it makes is not known here") == 2 and "of one step" in out and "in all" not in out


@pytest.mark.parametrize("argv, message", [
    (["--stage", "sae", "--gpu", "h100"], "--gpu has no effect with a real run, only with --dry-run"),
    (["--stage", "rl", "--steps", "1", "--dollars-per-hour", "1"], "--dollars-per-hour has no effect"),
    (["--stage", "sae", "--dry-run", "--gpu", "h900"], "invalid choice: 'h900'"),
    (["--stage", "sae", "--dry-run", "--resume"], "--resume has no effect with --dry-run"),
    (["--stage", "sae", "--dry-run", "--dollars-per-hour", "-1"], "--dollars-per-hour must be at least 0"),
    (["--stage", "sae", "--dry-run", "--source", "owner/name"], "owner/name: no local directory, and its shapes are"),
    (["--stage", "sae", "--dry-run", "--variant", "topkk"], "--variant topkk: there are relu"),
    (["--stage", "sae", "--dry-run", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--stage", "tune", "--dry-run", "--layer", "4"], "layer 4 is out of range"),
    (["--stage", "rl", "--dry-run"], "--stage rl needs --steps"),
    (["--stage", "rl", "--questions", "3", "--group", "3", "--micro-batch", "2"], "divide the samples, 9"),
    (["--dry-run", "--latents", "3"], "--latents belongs to --stage sae"),
])
def test_refused_in_one_line(argv, message):
    with pytest.raises((ValueError, OSError)) as caught:
        train.main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_choices_of_gpu_are_the_table():
    assert typing.get_args(train.GPU) == tuple(train.GPUS)


# ---- what it took: resa.py cost --------------------------------------------------------------------------

def summary(directory, **record):
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps(record))


def test_cost_compares_what_the_runs_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def cost(*flags):
        resa.main(["cost", *flags])
        return capsys.readouterr().out
    assert outcome(ROOT / "resa.py", "cost", cwd=tmp_path) == (
        2, "", "error: out/tiny/sae/summary.json: no such file; python train.py --stage sae --out out/tiny/sae makes "
        "it\n")
    summary(tmp_path / "out/tiny/sae", seconds=10.0, tokens=1000, flops=1e9, device="cpu, threads: 2")
    summary(tmp_path / "out/tiny/adapter", seconds=30.0, tokens=3000, flops=3e9, device="cpu, threads: 2")
    out = cost()                                                   # data/tiny/rl notes steps and seconds alone
    assert re.search(r"^SAE-Tuning, both +40\.0 +4,000 +4e\+09$", out, re.M)
    assert re.search(r"^SAE-Tuning / RL +0\.\d+ +\? +\?$", out, re.M) and "RL is that of data/tiny/rl." in out
    assert "seconds do not compare" in out and "RL: not noted" in out
    summary(tmp_path / "out/tiny/rl", seconds=80.0, tokens=40000, flops=8e10, device="cpu, threads: 2")
    out = cost()
    assert re.search(r"^SAE-Tuning / RL +0\.500 +0\.100 +0\.050$", out, re.M) and "do not compare" not in out
    summary(tmp_path / "gpu", seconds=0, tokens=0, flops=1, device="NVIDIA L40S")
    out = cost("--rl", "gpu")
    assert "(SAE: cpu, threads: 2; adapter: cpu, threads: 2; RL: NVIDIA L40S)" in out
    assert re.search(r"RL +\? +\? +4", out)
    summary(tmp_path / "other", seconds=80.0, flops="many")
    for name, message in (("other", "flops: a finite number was expected"), ("gone", "--stage rl --out gone makes")):
        with pytest.raises((ValueError, OSError), match=message):
            cost("--rl", name)


# ---- --stage rl ------------------------------------------------------------------------------------------

FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapters(out):
    folders = [out, *(path for path in sorted(out.glob("checkpoint-*")) if path.is_dir())]
    return {path.name: [(path / name).read_bytes() for name in FILES] for path in folders}


def test_rl_counts_the_tokens_of_prompts_and_samples(run, data, tmp_path):
    found = run("rl", tmp_path / "r", "--steps", 2)
    tok, rows = model.load_tokenizer(RANDOM), resa.read_problems(data)
    logged = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    sampled = sum(4 * json.loads(line)["length"] for line in logged)
    prompts = sum(len(tok.encode(tok.chat([{"role": "user", "content": rows[i]["problem"]}])))
                  for step in range(2) for i in train.order(len(rows), step)[:2])
    assert found["tokens"] == 2 * prompts + round(sampled)      # groups of 2
    lm = resa.add_lora(model.load_model(RANDOM))
    least = train.training_flops("rl", train.prepare("rl", ["--device", "cpu"]), lm, T=1)
    assert found["flops"] > found["tokens"] * sum(least.values())


def test_an_adapter_along_the_way_is_that_of_a_run_of_so_many_steps(run, tmp_path):
    run("rl", tmp_path / "long", "--steps", 4, "--save-every", 2)
    run("rl", tmp_path / "short", "--steps", 2)
    run("rl", tmp_path / "plain", "--steps", 4)
    long = adapters(tmp_path / "long")
    assert list(long) == ["long", "checkpoint-2", "checkpoint-4"] and long["checkpoint-2"] != long["long"]
    assert long["checkpoint-2"] == adapters(tmp_path / "short")["short"]
    assert long["checkpoint-4"] == long["long"] == adapters(tmp_path / "plain")["plain"]
    assert model.load_model(f"{RANDOM}+{tmp_path}/long/checkpoint-2")
    # A new run clears what an earlier one kept, and nothing that is not its own.
    (tmp_path / "long" / "checkpoint-2" / "notes.txt").write_text("mine")
    (tmp_path / "long" / "checkpoint-9").symlink_to(tmp_path / "long" / "checkpoint-4")
    run("rl", tmp_path / "long", "--steps", 1)
    left = {path.name for path in (tmp_path / "long").glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-9"} and (tmp_path / "long" / "checkpoint-2" / FILES[0]).exists()


def test_rl_interrupted_and_resumed_keeps_its_adapters_and_its_counts(run, tmp_path):
    flags, part = ["--steps", 6, "--save-every", 2], tmp_path / "part"
    whole = run("rl", tmp_path / "whole", *flags)
    part.mkdir()
    (part / "checkpoint-4").write_text("in the way")
    with pytest.raises(OSError):
        run("rl", part, *flags)
    assert (part / "checkpoint-2").is_dir() and not (part / FILES[0]).exists()
    (part / "checkpoint-4").unlink()
    found = run("rl", part, *flags, "--resume")
    assert (found["tokens"], found["flops"]) == (whole["tokens"], whole["flops"])
    ours, theirs = adapters(part), adapters(tmp_path / "whole")
    assert ours.pop("part") == theirs.pop("whole") and ours == theirs and len(ours) == 3


def test_rl_learns_the_same_in_micro_batches(run, tmp_path):
    flags = ["--target", f"{ROOT}/data/tiny/distill", "--steps", 1, "--lora-dropout", 0, "--group", 4,
             "--max-new-tokens", 64]
    run("rl", tmp_path / "a", *flags), run("rl", tmp_path / "b", *flags, "--micro-batch", 1)
    a, b = (json.loads((tmp_path / d / "metrics.jsonl").read_text()) for d in "ab")
    assert a["norm"] == pytest.approx(b["norm"], rel=1e-4) and a["reward"] == b["reward"] and a["norm"] > 0.01


def test_data_that_cannot_be_had_shows_before_the_model_is_loaded(tmp_path):
    for stage in train.STAGES:
        with pytest.raises(ValueError, match="no-such.jsonl: no such file"):
            train.main(["--stage", stage, NAMED.get(stage, "--target"), "no-such-model", "--data", "no-such.jsonl",
                        "--out", str(tmp_path / "o"), "--steps", "1"])
