"""Experts of a mixture: who was chosen, whom a behaviour uses, edits, the command."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from data.files import ROOT, TINY
from data.flags import read_preset
from model import generate, load_model, rope_table
from tests.claims import experts
from tests.test_model import INPUT, recipe
from tests.test_moe import PROMPTS, named, recomputed

# ------------------------------------------------------------------------------------------------
# fTRI: who was chosen, and whom a behaviour uses
# ------------------------------------------------------------------------------------------------

def test_rates_are_those_of_a_plain_loop_and_sum_to_k():
    model = named("mixed", torch.float64)
    gates = experts.routers(model)
    assert list(gates) == [1]            # one entry a sparse layer, none for the dense ones
    prompts = [[5, 1, 20, 3], [7, 2], [9, 26, 3, 11, 30, 2]]
    rates, last = experts.expert_use(model, prompts), experts.expert_use(model, prompts, -1)
    assert rates.shape == last.shape == (3, 1, 6)
    for ids, start, got in [*zip(prompts, [0] * 3, rates), *zip(prompts, [-1] * 3, last)]:
        x, block = model.run(torch.tensor([ids]), stop=1), model.model.layers[1]  # (1,T,D)
        rope = rope_table(model.config, torch.arange(len(ids))[None])
        x = x + block.self_attn(block.input_layernorm(x), rope)
        _, expert = block.mlp.gate(block.post_attention_layernorm(x)[0])          # (T,K)
        want = torch.zeros(6)
        for row in expert[start:]:
            for e in row:
                want[e] += 1
        assert torch.equal(got[0], want / len(expert[start:]))
        assert abs(got.sum() - gates[1].top_k) < 1e-6


def test_rate_differences_sum_to_0_in_every_layer():
    sequences = [[3] * n + [5, 9] for n in range(1, 9)]
    rates = experts.expert_use(named("8 of 12"), sequences)
    score, _ = experts.distinctive(rates, torch.arange(8) < 4, 10)
    assert score.sum(1).abs().max() < 1e-5 and score.abs().max() > 0.01


def test_a_planted_expert_is_ranked_first_and_shuffled_labels_find_nothing():
    rng = torch.Generator().manual_seed(0)
    P, L, E = 80, 3, 8
    counts = torch.poisson(torch.full((P, L, E), 4.0), generator=rng)
    target = torch.arange(P) % 2 == 0
    planted = counts.clone()
    planted[target, 1, 5] += 4
    scores, p = experts.distinctive(planted / 20, target)
    assert divmod(int(scores.argmax()), E) == (1, 5)
    assert p[1, 5] < 0.01 and p.flatten().sort()[0][1] > 0.05
    found = 0
    for _ in range(100):
        shuffled = target[torch.randperm(P, generator=rng)]
        found += bool(experts.distinctive(counts / 20, shuffled, 100)[1].min() < 0.05)
    assert found <= 11       # 5 expected; 11 is the 99th percentile of Binomial(100, .05)


def test_null_samples_are_of_the_same_layer_near_in_usage_and_never_the_chosen():
    usage = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    middle = [int(row.argsort()[8]) for row in usage]    # neighbours in usage on both sides
    chosen = [(0, middle[0]), (0, int(usage[0].argmax())), (2, middle[2]), (3, middle[3])]
    seen = {layer: set() for layer in range(4)}
    for _ in range(60):
        drawn = experts.null_sample(chosen, dict(enumerate(usage)), rng)
        assert sorted(layer for layer, _ in drawn) == [0, 0, 2, 3]
        assert len(set(drawn)) == 4 and not set(drawn) & set(chosen)
        for layer, e in drawn:
            seen[layer].add(e)
    for layer in (2, 3):
        nearest = (usage[layer] - usage[layer, middle[layer]]).abs().argsort()[1:5].tolist()
        assert seen[layer] == set(nearest)               # all four come up, and no other


def test_a_null_sample_is_smaller_where_a_layer_is_used_up():
    chosen = [(0, e) for e in (0, 1, 2)]
    drawn = experts.null_sample(chosen, {0: torch.rand(4)}, torch.Generator().manual_seed(0))
    assert drawn == [(0, 3)]


# ------------------------------------------------------------------------------------------------
# Experts off and on
# ------------------------------------------------------------------------------------------------

def gate_of(model):
    return next(iter(experts.routers(model).values()))


def choices(model, x, edit=(), mode="off"):
    """The router's choice for x (N,D) under an edit: dense weights (N,E), experts (N,K)."""
    gate = gate_of(model)
    with experts.experts_edited(model, edit, mode):
        weight, expert = gate(x)
    return torch.zeros(len(x), len(gate.weight), dtype=x.dtype).scatter(1, expert, weight), expert


@pytest.mark.parametrize("name", ["8 of 12", "8 of 12, normalised", "1 of 4"])
def test_off_takes_the_weight_which_the_others_share(name):
    model, x = named(name, torch.float64), recipe("x", (300, 20)).double()
    gate = gate_of(model)
    plain, chosen = choices(model, x)
    used = (chosen == 2).any(-1)
    assert used.any() and not used.all()
    rescaled, _ = choices(model, x, [(0, 2)], "off")
    assert torch.equal(rescaled[~used], plain[~used]) and (rescaled[:, 2] == 0).all()
    if gate.top_k > 1:
        assert torch.allclose(rescaled.sum(1), plain.sum(1), atol=1e-12)   # the layer's mass stays
        ratio = (rescaled[used] / plain[used]).nan_to_num(0).amax(1)
        want = (plain.sum(1) / (plain.sum(1) - plain[:, 2]))[used]
        assert (ratio - want).abs().max() < 1e-9
    else:
        assert (rescaled[used] == 0).all()               # nobody is there to take it


def test_on_is_chosen_by_every_token_with_the_published_weight():
    model, x = named("8 of 12", torch.float64), recipe("x", (200, 20)).double()
    plain, before = choices(model, x)
    forced, expert = choices(model, x, [(0, 4)], "on")
    assert (expert[:, 0] == 4).all() and not (before == 4).any(-1).all()
    p = F.linear(x, gate_of(model).weight).softmax(-1)
    raised = p.amax(1) * torch.tensor(0.01).double().exp()
    total = 1 - p[:, 4] + raised
    assert torch.allclose(forced[:, 4], raised / total, atol=1e-12)
    others = forced.index_fill(1, torch.tensor(4), 0)
    kept = others > 0
    assert torch.allclose(others[kept], (p / total[:, None])[kept], atol=1e-12)


@pytest.mark.parametrize("mode", ["off", "on"])
def test_no_edit_changes_no_bit_and_an_edit_ends_with_its_block(mode):
    model = named("mixed, normalised")
    before = model(INPUT)
    with experts.experts_edited(model, [], mode):
        assert torch.equal(model(INPUT), before)
    with pytest.raises(ZeroDivisionError), experts.experts_edited(model, [(0, 1), (2, 3)], mode):
        assert not torch.equal(model(INPUT), before)
        raise ZeroDivisionError
    assert torch.equal(model(INPUT), before)


@pytest.mark.parametrize("edit, mode", [
    ([(0, 1), (1, 5)], "off"), ([(1, e) for e in range(6)], "on")])
def test_generation_with_the_cache_equals_recomputing_under_an_edit(edit, mode):
    model = named("8 of 12", torch.float64)
    plain = generate(model, PROMPTS, 12, temperature=0, slots=2)
    with experts.experts_edited(model, edit, mode):
        got = generate(model, PROMPTS, 12, temperature=0, slots=2)
        assert [ids for ids, in got] == [recomputed(model, p, 12) for p in PROMPTS]
    assert got != plain


def test_an_expert_that_is_off_has_no_say():
    """Whatever its weights are: the logits are those of the model with its output zeroed."""
    model = named("8 of 12", torch.float64)
    with experts.experts_edited(model, [(1, 3)], "off"):
        off = model(INPUT)
        model.model.layers[1].mlp.experts.down_proj[3] = 0
        assert torch.allclose(off, model(INPUT), atol=1e-12)


def test_a_layer_all_of_whose_experts_are_off_has_no_say():
    model = named("8 of 12")
    with experts.experts_edited(model, [(1, e) for e in range(12)], "off"):      # none is left
        off = model(INPUT)
    model.model.layers[1].mlp.experts.down_proj[:] = 0
    assert torch.allclose(off, model(INPUT), atol=1e-6)


def test_a_dense_model_has_no_experts():
    with pytest.raises(ValueError, match="no experts"):
        experts.routers(load_model(TINY / "distill"))


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

SMALL = "--questions 60 --max-new-tokens 24 --device cpu".split()


def test_the_command_finds_edits_prints_one_table_and_resumes(tmp_path, capsys):
    argv = ["--out", str(tmp_path / "x"), *SMALL, "--counts", "1", "2"]
    experts.main(argv)
    text = capsys.readouterr().out
    for words in ("unedited", "top 2 off", "null 2 off", "top 2 on", "target", "rest", "show it",
                  "p of the first"):
        assert words in text
    assert (tmp_path / "x" / "table.txt").read_text().strip() in text
    files = sorted((tmp_path / "x" / "eval").glob("*test/*.jsonl"))
    edits = [path.stem.split("+") for path in files]
    assert all(path.read_text().count("\n") == 60 for path in files)
    # Every edit has a file of its own, so the controls of two counts never share one.
    assert {name for name, *_ in edits} == {
        "unedited", "classes", *(f"{name}-{n}-{how}" for n in (1, 2)
                                 for name, how in (("top", "off"), ("null", "off"), ("top", "on")))}
    layers = {}
    for name, *rest in edits:
        layers.setdefault(name, []).append(sorted(word.split(".")[0] for word in rest))
    assert all(drawn == layers["top-2-off"][0] for drawn in layers["null-2-off"])
    before = {path: path.stat().st_size for path in files}
    experts.main(argv)                                   # all samples are there
    again = capsys.readouterr()
    assert again.out == text and again.err.count("60 of 60 samples are already there") >= len(files)
    assert before == {path: path.stat().st_size for path in files}


def test_of_a_layer_no_more_experts_are_forced_on_than_a_token_uses():
    best = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 4)]
    usage = {layer: torch.rand(6) for layer in (0, 1)}
    plan = experts.plan_edits([2, 4], best, usage, 2)
    edits = {name: (mode, draws) for name, mode, draws in plan}
    assert edits["unedited"] == ("", [()])
    assert edits["top 4 off"] == ("off", [best[:4]])
    assert edits["top 4 on"] == ("on", [[(0, 1), (0, 2), (1, 0), (1, 4)]])
    assert len(edits["null 4 off"][1]) == 5


@pytest.mark.parametrize("counts", [(2, 4), (4, 5)])
def test_controls_are_named_by_what_they_control_however_few_are_drawn(counts):
    """A layer of 6 has 2 others for its top 4, as many as for its top 2; 1 for its top 5."""
    best = [(0, e) for e in range(5)]
    plan = list(experts.plan_edits(counts, best, {0: torch.rand(6)}, 6))
    nulls = {name: draws for name, _, draws in plan if name.startswith("null")}
    names = {2: "null 2 off", 4: "null 4 off, 2 drawn", 5: "null 5 off, 1 drawn"}
    assert list(nulls) == [names[n] for n in counts] and len(plan) == 1 + 3 * len(counts)
    for n, draws in zip(counts, nulls.values()):
        assert {len(draw) for draw in draws} == {min(n, 6 - n)}
        assert not set(best[:n]) & {expert for draw in draws for expert in draw}


@pytest.mark.parametrize("text, refused", [
    ("</think>\nNo.", True), (" </think> ?", True), ("</think>\n12", False),
    ("</think>\n\n 7", False), ("5+7=12\n</think>\n12", False),
    ("5+7=12\n</think>\nNo.", False), ("", False)])
def test_what_counts_as_a_refusal_of_the_embedded_mixture(text, refused):
    assert bool(re.search(read_preset("tiny")["experts"]["behaviour"], text)) == refused


@pytest.mark.parametrize("flags, words", [
    (["--model", str(TINY / "distill")], "no experts"),
    (["--held", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--behaviour", "zebra"], "0 of 30 answers to .*train.jsonl show the behaviour"),
    (["--counts", "0"], "0 should be at least 1"),
    (["--tokens", "answer"], "invalid choice"),
    (["--quick", "--questions", "30"], "--questions has no effect with --quick")])
def test_the_command_refuses_in_one_line(tmp_path, flags, words):
    small = [] if "--quick" in flags else ["--questions", "30", "--max-new-tokens", "8"]
    with pytest.raises((ValueError, OSError), match=words):
        experts.main(["--out", str(tmp_path / "x"), "--device", "cpu", *small, *flags])
    left = {path.name for path in tmp_path.rglob("*.*")}
    assert "zebra" in flags or left <= {"config.json"}   # only the answers can tell that


def test_questions_of_ones_own_are_asked_in_their_columns_and_for_a_box(tmp_path):
    """Beside them the embedded ones, which have other columns, as the preset's --held."""
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:4]]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"q": row["problem"], "a": row["answer"]}) + "\n" for row in rows))
    argv = ["--data", str(own), "--fields", "problem=q,answer=a", "--questions", "4", "--max-new-tokens", "4", "--device", "cpu",
            "--behaviour", "zebra", "--out", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="0 of 4 answers to .*own.jsonl show the behaviour"):
        experts.main(["--preset", "tiny", *argv])
    prompts = {path.parent.name: json.loads(path.read_text().splitlines()[0])["prompt"] for path in tmp_path.rglob("eval/*/*.jsonl")}
    assert len(prompts) == 2
    assert all(("boxed" in prompt) == ("own" in name) for name, prompt in prompts.items()), prompts
    with pytest.raises(ValueError, match="--held is needed in experts"):
        experts.main(["--model", str(ROOT / "data/tiny-moe"), *argv])
