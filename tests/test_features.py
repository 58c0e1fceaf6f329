"""Reasoning features: the rule where the answer is known, statistics by hand, what a planted latent does."""
import json

import numpy as np
import pytest
import torch

import eval as E
import model as M
import resa
import sae as S
import train
from tests.conftest import ROOT

OPEN, CLOSE = 540, 541
PROMPT = [33, 2, OPEN, 201, 7, CLOSE, 9, OPEN, 5, CLOSE, 11]
TARGET = resa.PRESETS["tiny"]["target"]


@pytest.fixture(scope="module")
def tiny():
    return M.load_model(TARGET).eval(), M.load_tokenizer(TARGET)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def firing(model, layer, wanted, site="resid", sae=None):
    """An SAE, ReLU by default, whose latent i fires on PROMPT at the positions wanted[i] and at no other."""
    x = resa.activations(model, torch.tensor([PROMPT]), layer, site)[0].double()                  # (T,D)
    sae = sae or S.build("relu", x.shape[1], len(wanted)).requires_grad_(False)
    on, off = (-1.0, 0.0) if sae.signed else (1.0, -1.0)
    values = torch.full((len(PROMPT), len(wanted)), off, dtype=x.dtype)
    for i, positions in enumerate(wanted):
        values[list(positions), i] = on
    sae.W_enc.copy_((torch.linalg.pinv(x) @ values).T)
    return sae


# ---- the rule --------------------------------------------------------------------------------------------

def test_the_rule_on_planted_latents(tiny):
    model, _ = tiny
    wanted = [(2, 5, 7, 9), (2, 5), (5, 7, 9), (2, 7), (2, 5, 7, 9, 10), (2, 9, 4), (), (0, 2, 5, 7, 9), range(11)]
    saes = {layer: firing(model, layer, wanted) for layer in (1, 3)}
    assert resa.reasoning_features(model, saes, PROMPT, OPEN, CLOSE) == {1: [0], 3: [0]}
    assert resa.reasoning_features(model, saes, PROMPT, OPEN, CLOSE, every=False) == {1: [0, 1, 2], 3: [0, 1, 2]}
    saes[3].meta["sink_norm"] = 1e9                          # position 0 is a sink, so latent 7 no longer counts there
    assert resa.reasoning_features(model, saes, PROMPT, OPEN, CLOSE) == {1: [0], 3: [0, 7]}
    for tag, ids in (("<think>", PROMPT[3:6]), ("</think>", PROMPT[:5])):
        with pytest.raises(ValueError, match=f"no {tag}"):
            resa.reasoning_features(model, saes, ids, OPEN, CLOSE)


def test_the_rule_counts_negative_codes_and_reads_the_site_of_the_sae(tiny):
    model, _ = tiny
    for site, other in (("resid", "mlp"), ("mlp", "resid")):
        sae = S.build("abstopk", 128, 3, k=2, over="batch").requires_grad_(False)
        sae.threshold.fill_(0.5)
        firing(model, 2, [(2, 5, 7, 9), (2, 5, 6, 7, 9), (2, 5, 7, 9)], site, sae).meta["site"] = site
        assert resa.reasoning_features(model, {2: sae}, PROMPT, OPEN, CLOSE) == {2: [0, 2]}
        sae.meta["site"] = other
        assert resa.reasoning_features(model, {2: sae}, PROMPT, OPEN, CLOSE) != {2: [0, 2]}


# ---- statistics ------------------------------------------------------------------------------------------

def test_anova_by_hand():
    f, p = resa.anova([[1, 2, 3], [2, 3, 4], [5, 6, 7]])     # 26 / 2 between, 6 / 6 within
    assert f == pytest.approx(13) and 0.0001 < p < 0.03
    assert resa.anova([[0, 2], [1, 3, 5]])[0] == pytest.approx(1.44)      # 4.8 between, 10 / 3 within
    f, p = resa.anova([[0, 1], [10, 11]])                    # of the 6 ways to part four numbers, 2 are as far apart
    assert f == pytest.approx(200) and abs(p - 1 / 3) < 0.02
    assert resa.anova([[1, 2, 3], [1, 2, 3]]) == (pytest.approx(0), 1.0)
    assert resa.anova([[0.1, 0.1], [0.1] * 3]) == (0.0, 1.0) and resa.anova([[1, 1], [2, 2]])[0] == np.inf
    assert resa.anova([[1, 2, 30], [4]]) == resa.anova([[1, 2, 30], [4]])
    for groups in ([[1, 2]], [[1], [2]], [[1, 2], []]):
        with pytest.raises(ValueError, match="needs two groups"):
            resa.anova(groups)


def test_anova_is_even_under_the_null_and_small_for_groups_that_differ():
    rng = np.random.default_rng(0)
    p = [resa.anova(rng.normal(size=(6, 4)), draws=999)[1] for _ in range(200)]
    assert 0.45 < np.mean(p) < 0.55 and 0.01 < np.mean(np.array(p) < 0.05) < 0.1
    assert resa.anova([rng.normal(size=4) + 3 * i for i in range(4)])[1] < 0.001


def test_correlation_by_hand():
    r, p = resa.correlation([1, 2, 3, 4], [10, 20, 30, 40])
    assert r == pytest.approx(1) and abs(p - 2 / 24) < 0.01      # of 24 orders, this one and its mirror
    assert resa.correlation([1, 2, 3, 4], [-1, -2, -3, -5])[0] == pytest.approx(-0.98271, abs=1e-4)
    assert resa.correlation([1, 2, 3], [5, 5, 5]) == (0.0, 1.0)


def test_mixture_finds_planted_components_and_makes_three_of_flat_data():
    x = np.linspace(-4, 16, 400)
    density = lambda mean, sd: np.exp(-0.5 * ((x - mean) / sd)**2) / sd
    found = resa.mixture(x, 0.2 * density(0, 1) + 0.5 * density(5, 0.5) + 0.3 * density(11, 1.5))
    assert np.allclose(found["means"], [0, 5, 11], atol=0.05)
    assert np.allclose(found["shares"], [0.2, 0.5, 0.3], atol=0.01)
    assert np.allclose(found["sds"], [1, 0.5, 1.5], atol=0.05)
    assert np.allclose(resa.mixture(range(2, 28), np.ones(26))["means"], [4.7, 14.5, 24.3], atol=0.05)
    one = resa.mixture([0, 1, 2, 10], [1, 1, 1, 1], k=1)
    assert one["means"] == [pytest.approx(3.25)] and one["sds"] == [pytest.approx(np.std([0, 1, 2, 10]))]
    assert np.isfinite(resa.mixture([0, 1, 2], [1, 1, 1])["sds"]).all()      # a point each: the floor holds
    with pytest.raises(ValueError, match="3 components need"):
        resa.mixture(range(5), [0, 1, 0, 2, 0])


def test_the_published_statistics_again(capsys):
    assert resa.correlation(resa.COUNTS, resa.SCORES)[0] == pytest.approx(-0.197, abs=1e-3)
    resa.main(["features", "--published"])
    text = capsys.readouterr().out
    assert "r = -0.20, p = 0.33" in text and "4.7  14.5  24.3" in text and "0.53 layers apart" in text


# ---- one latent changed ----------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", ["none", "unit", "token"])
def test_steered_is_the_activation_less_one_latent(normalize):
    sae = S.build("topk", 16, 32, k=8, normalize=normalize).double().requires_grad_(False)
    x = randn(3, 5, 16).double() + 1
    z = sae.encode(x)                                                                            # (B,T,F)
    f = int(z.flatten(0, 1).count_nonzero(0).argmax())
    without = z.clone()
    without[..., f] = 0
    share = sae.decode(z, x) - sae.decode(without, x)        # what the SAE says of x through f, in the units of x
    assert share.abs().max() > 0.1
    assert torch.allclose(resa.Steered(sae, f, "ablate", 1.0)(x), x - share, atol=1e-12)
    if normalize == "none":
        assert torch.allclose(resa.Steered(sae, f, "ablate", 1.0)(x), x - z[..., f, None] * sae.W_dec[f], atol=1e-12)
        assert torch.allclose(resa.Steered(sae, f, "boost", 2.5)(x), x + 2.5 * sae.W_dec[f], atol=1e-12)
    for how in ("ablate", "boost"):
        assert torch.equal(resa.Steered(sae, f, how, 0.0)(x), x)


def test_steered_in_generation_is_steered_in_a_whole_pass(tiny):
    """With a sink norm too: of the tokens read through the cache, only the prompt's first is position 0."""
    model, tokenizer = tiny
    sae = S.build("topk", 128, 256, k=16).requires_grad_(False)
    sae.meta["sink_norm"] = 1e9
    prompt, settings = tokenizer.encode("<|user|>7 and 8 in all?<|assistant|><think>\n"), dict(max_new_tokens=12)
    (plain, _), = M.collect(model, [(prompt, (0,))], **settings)
    with resa.splice(model, resa.Steered(sae, 3, "boost", 0.0), 1):
        assert M.collect(model, [(prompt, (0,))], **settings)[0][0] == plain
    with resa.splice(model, resa.Steered(sae, 3, "boost", 8.0), 1), torch.no_grad():
        (cached, _), = M.collect(model, [(prompt, (0,))], temperature=0, **settings)
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert cached == ids[len(prompt):] and cached != M.collect(model, [(prompt, (0,))], temperature=0, **settings)[0][0]


def test_attribution_is_the_slope_of_the_log_odds(tiny):
    model, tokenizer = tiny
    sae = S.build("topk", 128, 256, k=16).requires_grad_(False)
    prompt, answer = tokenizer.encode("<|user|>7 and 8 in all?<|assistant|><think>\n"), tokenizer.encode("7+8=15\n")
    rate, typical, attribution = resa.attribute(model, sae, 2, [(prompt, answer)], CLOSE)
    z = sae.encode(resa.activations(model, torch.tensor([prompt + answer]), 2))[0]               # (T,F)
    assert torch.equal(rate, (z != 0).float().mean(0))
    assert torch.allclose(typical * rate, z.mean(0), atol=1e-5)

    def odds(f, strength):
        with resa.splice(model, resa.Steered(sae, f, "ablate", strength), 2), torch.no_grad():
            p = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)[CLOSE]
        return float((1 - p).log() - p.log())
    for f in attribution.topk(4).indices.tolist():
        assert attribution[f] == pytest.approx(abs(odds(f, 0.02) - odds(f, -0.02)) / 0.04, rel=0.05)


def planted(model, shuffled):
    """24 latents that fire alike at every token; latent 7 writes </think> against all else, or that shuffled."""
    sae = S.build("relu", 128, 24).requires_grad_(False)
    sae.W_enc.zero_(), sae.b_enc.fill_(6.0)
    sae.W_dec.copy_(torch.nn.functional.normalize(randn(24, 128, seed=1), dim=1))
    way = model.lm_head.weight[CLOSE] - model.lm_head.weight.mean(0)
    way = way[torch.randperm(128, generator=torch.Generator().manual_seed(0))] if shuffled else way
    sae.W_dec[7] = torch.nn.functional.normalize(way, dim=0)
    return sae


def test_effects_find_a_planted_latent_and_not_a_shuffled_one(tiny):
    model, tokenizer = tiny
    train_rows = resa.read_problems(resa.TINY / "train.jsonl")[:10]
    test_rows = resa.read_problems(resa.TINY / "test.jsonl")[:40]
    found = {}
    for shuffled in (False, True):
        sae = planted(model, shuffled)
        found[shuffled] = resa.effects(model, tokenizer, sae, 3, train_rows, test_rows, [7], top=2, max_new_tokens=40)
        assert json.loads(json.dumps(found[shuffled])) == found[shuffled]
        latents = found[shuffled]["latents"]
        assert {row["rate"] for row in latents} == {1.0}
        assert 2 * sum(row["chosen"] == ["random"] for row in latents) == len(latents)
    latents = {row["latent"]: row for row in found[False]["latents"]}
    assert latents[7]["chosen"] == ["ranked", "rule"] and next(iter(latents)) == 7
    assert latents[7]["ablate"]["thinks"][1] > 0.2 and latents[7]["boost"]["thinks"][2] < -0.2
    for how in ("ablate", "boost"):
        null, other = (found[shuffled]["null"][how]["thinks"] for shuffled in (False, True))
        assert null["ranked"][0] == 7 and abs(null["ranked"][1]) > 1.5 * abs(null["random"][1]) > 0
        assert other["rule"][0] == 7 and abs(other["rule"][1]) < abs(other["random"][1]) / 2


def test_groups_are_set_against_the_random_one():
    def row(latent, d, *chosen):
        return {"latent": latent, "chosen": chosen, "boost": {"thinks": [d, d - 1, d + 1]}}
    rows = [row(i, 0.01 * i, "random") for i in range(6)]
    rows += [row(10 + i, -0.5 + 0.01 * i, "ranked") for i in range(6)]
    found = resa.against_random([*rows, row(20, 0.02, "ranked", "rule")], "boost", "thinks")
    assert found["ranked"] == [10, -0.5] and found["random"] == [5, 0.05] and found["rule"] == [20, 0.02]
    assert found["ranked_p"] < 0.02 and found["rule_p"] > 0.5
    found = resa.against_random(rows[5:], "boost", "thinks")      # a single random one
    assert found["rule"] is None and found["rule_p"] is None and found["ranked_p"] is None


def test_an_effect_is_the_paired_difference_to_the_plain_answers(tiny, tmp_path):
    model, tokenizer = tiny
    rows = resa.read_problems(resa.TINY / "test.jsonl")[:30]
    base = resa.ask(model, tokenizer, rows)
    for row in base:
        assert row["thinks"] == bool(row["completion"].partition("</think>")[0].strip())
    assert 0 < sum(row["thinks"] for row in base) < 30
    assert resa.difference(base, base) == {"correct": [0.0, 0.0, 0.0], "thinks": [0.0, 0.0, 0.0]}
    never = [row | {"thinks": False} for row in base]
    assert resa.difference(never, base)["thinks"][0] == pytest.approx(-sum(row["thinks"] for row in base) / 30)
    answers = E.evaluate(model, tokenizer, rows, tmp_path / "rows.jsonl", max_new_tokens=96)
    assert {row["id"]: row["completion"] for row in base} == {row["id"]: row["completion"] for row in answers}


# ---- the command -----------------------------------------------------------------------------------------

def test_the_command_then_again_on_what_it_trained(data, tmp_path, capsys):
    flags = ["features", "--data", str(data), "--questions", "6", "--top", "1", "--workers", "1"]
    resa.main([*flags, "--layers", "3", "--steps", "2", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "run/numbers.json").read_text())
    assert (tmp_path / "run/table.txt").read_text().strip() in text and list(found) == ["3"]
    assert "Layer 3: by the rule" in text and "larger effects in" in text and "forbidden as the first token" in text and "on 6 training questions" in text
    sae = train.open_sae(str(tmp_path / "run/sae-3"))
    model, tokenizer = M.load_model(TARGET), M.load_tokenizer(TARGET)
    row = resa.read_problems(resa.TINY / "test.jsonl")[0]
    text = train.as_text(row, tokenizer, "chat")
    once = resa.reasoning_features(model, {3: sae}, tokenizer.encode(text), OPEN, CLOSE)
    assert set(map(str, once[3])) <= set(found["3"]["rule"]) and found["3"]["prompts"] == 20
    assert sum(found["3"]["rule"].values()) == pytest.approx(20 * found["3"]["count"])
    args = resa.parse_flags(resa.Features, [*flags[1:], "--prompt", text, "--model", TARGET, "--device", "cpu"], "")
    again = resa.study_features(args, 3, str(tmp_path / "run/sae-3"))
    assert sorted(again["rule"]) == once[3] and again["prompts"] == 1
    assert again["latents"][0] == found["3"]["latents"][0]
    assert "in at least one of 1" in resa.features_table({3: again}, args)


@pytest.mark.parametrize("flags, message", [
    ("--published --steps 3", "--steps has no effect with --published"),
    ("--sae x --layers 1", "--layers has no effect with --sae"), ("--no-every", "--every has no effect with questions"),
    ("--layers 0 4", r"has layers 0 .. 3, asked for are \[0, 4\]"), ("--questions 2000", "has 1000"),
    ("--prompt hello", "--prompt needs <think> and </think>"), ("--top 0", "--top must be at least 1"),
    ("--boost nan", "--boost must be at least 0"), ("--sae nowhere", "nowhere"), ("--bench nothing", "known names are"),
    ("--pubished", "did you mean --published"),
])
def test_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        resa.main(["features", *(["--out", str(tmp_path / "run")] if "published" not in flags else []), *flags.split()])
    assert not (tmp_path / "run").exists()


def test_an_sae_of_another_width_or_layer_is_refused(tmp_path):
    for name, width, layer in (("narrow", 64, 1), ("nowhere", 128, None), ("high", 128, 9)):
        sae = S.build("topk", width, 64, k=4)
        sae.meta = {"layer": layer, "site": "resid"} if layer is not None else {}
        S.save_sae(sae, tmp_path / name)
    for names, message in ((["nowhere"], "does not say which layer"), (["high"], "has layers 0 .. 3"),
                           (["high", "high"], "two of layer 9"), (["narrow"], "narrow: 64 wide")):
        with pytest.raises(ValueError, match=message):
            resa.main(["features", "--sae", *[str(tmp_path / name) for name in names], "--questions", "2",
                       "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


def test_no_answer_begins_with_a_forbidden_token_and_other_places_keep_it():
    from model import generate, load_model, load_tokenizer
    model, tokenizer = load_model(resa.TINY / "distill"), load_tokenizer(resa.TINY / "distill")
    close, = tokenizer.encode("</think>")
    problems = resa.read_problems(resa.TINY / "test.jsonl")[:24]
    prompts = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": row["problem"]}])) for row in problems]
    sample = lambda: [ids for ids, in generate(model, prompts, 48, seed=1, stop_ids=tokenizer.eos_ids, slots=5)]
    free = sample()
    with resa.never_first(model, close):
        forced = sample()
    assert 3 < sum(ids[0] == close for ids in free) < 21 and sample() == free      # gone with its block
    assert all(ids[0] != close and close in ids for ids in forced)
    assert all(a == b for a, b in zip(free, forced) if a[0] != close)               # who thought, thinks the same
