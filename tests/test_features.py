"""Reasoning features: the rule where it is known, attribution, effects of planted latents."""
import json
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import eval
import model as M
import resa
import sae as S
import train
from data.files import TINY, read_problems
from data.formats import load_any
from tests.claims import features as F
from tests.conftest import ROOT

OPEN, CLOSE = 540, 541
PROMPT = [33, 2, OPEN, 201, 7, CLOSE, 9, OPEN, 5, CLOSE, 11]
TARGET = str(TINY / "distill")
QUESTION = "<|user|>7 and 8 in all?<|assistant|><think>\n"


@pytest.fixture(scope="module")
def tiny():
    return M.load_model(TARGET).eval(), M.load_tokenizer(TARGET)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(variant, width, n_latents, layer=1, site="resid", **hyper):
    """An SAE that says where it belongs."""
    sae = S.build(variant, width, n_latents, **hyper).requires_grad_(False)
    sae.meta = {"layer": layer, "site": site}
    return sae


def settings(**more):
    """What the functions read of the command line."""
    usual = dict(seed=0, bench="tiny", max_new_tokens=96, top=5)
    return Namespace(**usual | more)


def firing(model, sae, wanted):
    """Makes latent i of the SAE fire on PROMPT at the positions wanted[i] and at no other."""
    ids = torch.tensor([PROMPT])
    x = resa.activations(model, ids, sae.meta["layer"], sae.meta["site"])[0].double()    # (T,D)
    on, off = (-1.0, 0.0) if sae.signed else (1.0, -1.0)
    values = torch.full((len(PROMPT), len(wanted)), off, dtype=x.dtype)
    for i, positions in enumerate(wanted):
        values[list(positions), i] = on
    sae.W_enc.copy_((torch.linalg.pinv(x) @ values).T)
    return sae


# ---- the rule ------------------------------------------------------------------------------------

def test_the_rule_on_planted_latents(tiny):
    model, _ = tiny
    wanted = [(2, 5, 7, 9), (2, 5), (5, 7, 9), (2, 7), (2, 5, 7, 9, 10), (2, 9, 4), (),
              (0, 2, 5, 7, 9), range(11)]
    for layer in (1, 3):
        sae = firing(model, build("relu", 128, len(wanted), layer), wanted)
        assert F.reasoning_features(model, sae, PROMPT, OPEN, CLOSE) == [0]
    sae.meta["sink_norm"] = 1e9              # position 0 is a sink: latent 7 does not count there
    assert F.reasoning_features(model, sae, PROMPT, OPEN, CLOSE) == [0, 7]


def test_the_rule_counts_negative_codes_and_reads_the_site_of_the_sae(tiny):
    model, _ = tiny
    for site, other in (("resid", "mlp"), ("mlp", "resid")):
        sae = build("abstopk", 128, 2, 2, site, k=1)     # a token has one of the two
        rest = [i for i in range(len(PROMPT)) if i not in (2, 5, 7, 9)]
        firing(model, sae, [(2, 5, 7, 9), rest])
        assert F.reasoning_features(model, sae, PROMPT, OPEN, CLOSE) == [0]
        sae.meta["site"] = other
        assert F.reasoning_features(model, sae, PROMPT, OPEN, CLOSE) != [0]


# ---- statistics ----------------------------------------------------------------------------------

def test_the_gap_of_two_groups_and_its_p_by_hand():
    gap, p = F.permutation_gap([10, 11], [0, 1])     # 2 of 6 ways are as far apart
    assert gap == pytest.approx(10) and abs(p - 1 / 3) < 0.02
    assert F.permutation_gap([0, 1], [10, 11]) == (pytest.approx(-10), pytest.approx(p, abs=0.02))
    assert F.permutation_gap([1, 2, 3], [1, 2, 3]) == (pytest.approx(0), 1.0)
    assert F.permutation_gap([0.1, 0.1], [0.1] * 3) == (pytest.approx(0), 1.0)
    assert F.permutation_gap([1, 2, 30], [4]) == F.permutation_gap([1, 2, 30], [4])
    gap, p = F.permutation_gap([1, 2, 3], [5, 6, 7])         # of 20 ways, 2
    assert gap == pytest.approx(-4) and abs(p - 0.1) < 0.02


def test_p_is_even_under_the_null_and_small_for_groups_that_differ():
    rng = np.random.default_rng(0)
    p = [F.permutation_gap(*rng.normal(size=(2, 6)), draws=999)[1] for _ in range(200)]
    assert 0.45 < np.mean(p) < 0.55 and 0.01 < np.mean(np.array(p) < 0.05) < 0.1
    assert F.permutation_gap(rng.normal(size=8), rng.normal(size=8) + 5)[1] < 0.001


def planted_row(latent, d, *chosen):
    found = {"latent": latent, "chosen": chosen, "rate": 0.5, "attribution": 0.0}
    for change in F.CHANGES:
        sign = -1 if "thinks" in change else 1
        found[change] = [sign * d, sign * d - 1, sign * d + 1]
    return found


def test_groups_are_set_against_the_null_sample():
    rows = [planted_row(i, 0.01 * i, "null") for i in range(6)]
    rows += [planted_row(10 + i, -0.5 + 0.01 * i, "ranked") for i in range(6)]
    both = [*rows, planted_row(20, 0.02, "ranked", "rule")]
    assert len(F.against_null(both, "ranked")) == len(F.CHANGES)
    assert all(gap > 0.3 and p < 0.02 for gap, p in F.against_null(both, "ranked"))
    assert all(p > 0.5 for _, p in F.against_null(both, "rule"))
    assert F.against_null(rows, "rule") == []                # nobody in it
    assert F.against_null(rows[5:], "ranked") == []          # a single one in the null sample


def test_what_is_said_of_the_groups():
    rows = [planted_row(i, 0.01 * i, "null") for i in range(6)]
    rows += [planted_row(10 + i, -0.5 + 0.01 * i, "ranked") for i in range(6)]
    study = Namespace(base=[{"correct": True, "thinks": False}] * 2, bench=[{}] * 2,
                      forced={"Pass@1": [0.1, 0, 0.2], "thinks": [0.3, 0.2, 0.4]})
    text = F.report({"sae-3": {"prompts": 2, "rule": {4: 2, 5: 1}, "latents": rows}}, study)
    assert "sae-3: by the rule 1.5 latents a prompt, 2 in at least one of 2, 1 in all." in text
    assert "The ranked against the null: larger effects in 4, smaller in 0 of 4 cases" in text
    assert "The rule against the null: larger effects in 0, smaller in 0 of 0 cases" in text
    assert re.search(r"^10 +ranked +50\.0% .* \+0\.50 \[-0\.50, \+1\.50\]$", text, re.M)
    assert re.search(r"^ +ranked - null( +\+0\.450, p 0\.00\d\d){4}$", text, re.M)
    assert "first token: Pass@1 +0.100 [+0.000, +0.200], thinks +0.300 [+0.200, +0.400]" in text


# ---- one latent changed --------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", ["none", "unit", "token"])
def test_steered_is_the_activation_less_one_latent(normalize):
    sae = build("topk", 16, 32, k=8, normalize=normalize).double()
    x = randn(3, 5, 16).double() + 1
    z = sae.encode(x)                                                    # (B,T,F)
    f = int(z.flatten(0, 1).count_nonzero(0).argmax())
    without = z.clone()
    without[..., f] = 0
    share = sae.decode(z, x) - sae.decode(without, x)        # what the SAE says of x through f
    assert share.abs().max() > 0.1
    assert torch.allclose(F.steered(sae, f)(x), x - share, atol=1e-12)
    if normalize == "none":
        assert torch.allclose(F.steered(sae, f)(x), x - z[..., f, None] * sae.W_dec[f], atol=1e-12)
        assert torch.allclose(F.steered(sae, f, 2.5)(x), x + 2.5 * sae.W_dec[f], atol=1e-12)
    assert torch.equal(F.steered(sae, f, 0.0)(x), x)


def test_steered_in_generation_is_steered_in_a_whole_pass(tiny):
    """With a sink norm too: of the tokens read through the cache, only the first is position 0."""
    model, tokenizer = tiny
    sae = build("topk", 128, 256, k=16)
    sae.meta["sink_norm"] = 1e9
    prompt, few = tokenizer.encode(QUESTION), dict(max_new_tokens=12)
    (plain, _), = M.collect(model, [(prompt, (0,))], **few)
    with resa.splice(model, F.steered(sae, 3, 0.0), 1):
        assert M.collect(model, [(prompt, (0,))], **few)[0][0] == plain
    with resa.splice(model, F.steered(sae, 3, 8.0), 1), torch.no_grad():
        (cached, _), = M.collect(model, [(prompt, (0,))], temperature=0, **few)
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert cached == ids[len(prompt):]
    assert cached != M.collect(model, [(prompt, (0,))], temperature=0, **few)[0][0]


def test_attribution_is_the_slope_of_the_log_odds(tiny):
    model, tokenizer = tiny
    sae = build("topk", 128, 256, 2, k=16)
    prompt, answer = tokenizer.encode(QUESTION), tokenizer.encode("7+8=15\n")
    rate, typical, attribution = F.attribute(model, sae, [(prompt, answer)], CLOSE)
    z = sae.encode(resa.activations(model, torch.tensor([prompt + answer]), 2))[0]       # (T,F)
    assert torch.equal(rate, (z != 0).float().mean(0))
    assert torch.allclose(typical * rate, z.mean(0), atol=1e-5)

    def odds(f, strength):
        def weakened(x):                     # by a share of what ablation takes out
            return x + strength * (F.steered(sae, f)(x) - x)
        with resa.splice(model, weakened, 2), torch.no_grad():
            p = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)[CLOSE]
        return float((1 - p).log() - p.log())
    for f in attribution.topk(4).indices.tolist():
        slope = abs(odds(f, 0.02) - odds(f, -0.02)) / 0.04
        assert attribution[f] == pytest.approx(slope, rel=0.05)


def test_the_null_sample_fires_about_as_often():
    rate, attribution = torch.linspace(0, 1, 101), torch.zeros(101)
    attribution[[50, 90]] = torch.tensor([2.0, 1.0])
    chosen = F.choose_latents(rate, attribution, [90, 3], settings(top=3))
    assert list(chosen)[:3] == [50, 90, 3] and chosen[90] == ["ranked", "rule"]
    null = [latent for latent, groups in chosen.items() if groups == ["null"]]
    assert len(null) == 3
    assert chosen == F.choose_latents(rate, attribution, [90, 3], settings(top=3))
    for latent, other in zip((50, 90, 3), null):
        assert 0 < abs(latent - other) < 12 and rate[other] > 0
    few = F.choose_latents(torch.tensor([0.5, 0.0]), torch.ones(2), [], settings(top=1))
    assert few == {0: ["ranked"]}            # no other latent fires


# ---- effects -------------------------------------------------------------------------------------

def planted(model, shuffled):
    """24 latents that fire alike at every token; latent 7 writes </think>, or that shuffled."""
    sae = build("relu", 128, 24, 3)
    sae.W_enc.zero_(), sae.b_enc.fill_(6.0)
    sae.W_dec.copy_(torch.nn.functional.normalize(randn(24, 128, seed=1), dim=1))
    way = model.lm_head.weight[CLOSE] - model.lm_head.weight.mean(0)
    if shuffled:
        way = way[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    sae.W_dec[7] = torch.nn.functional.normalize(way, dim=0)
    return sae


def open_study(tiny, n_train, n_test):
    model, tokenizer = tiny
    return Namespace(model=model, tokenizer=tokenizer, tags=[OPEN, CLOSE],
                     data=read_problems(TINY / "train.jsonl")[:n_train],
                     bench=read_problems(TINY / "test.jsonl")[:n_test])


def test_effects_find_a_planted_latent_and_not_a_shuffled_one(tiny):
    study, args, found = open_study(tiny, 10, 40), settings(top=2, max_new_tokens=40), {}
    F.answer_alone(study, args)
    for shuffled in (False, True):
        latents = found[shuffled] = F.effects(study, planted(study.model, shuffled), [7], args)
        assert json.loads(json.dumps(latents)) == latents
        assert {row["rate"] for row in latents} == {1.0}
        assert 2 * sum(row["chosen"] == ["null"] for row in latents) == len(latents)
    latents = {row["latent"]: row for row in found[False]}
    assert latents[7]["chosen"] == ["ranked", "rule"] and next(iter(latents)) == 7
    assert latents[7]["ablate: thinks"][1] > 0.2 and latents[7]["boost: thinks"][2] < -0.2
    for change in ("ablate: thinks", "boost: thinks"):
        real, other = ({row["latent"]: abs(row[change][0]) for row in found[shuffled]}
                       for shuffled in (False, True))
        null = [[abs(row[change][0]) for row in found[shuffled] if row["chosen"] == ["null"]]
                for shuffled in (False, True)]
        assert real[7] == max(real.values()) > 1.5 * max(null[0]) > 0
        assert other[7] < max(null[1]) / 2


def test_an_effect_is_the_paired_difference_to_the_plain_answers(tiny, tmp_path):
    model, tokenizer = tiny
    study = open_study(tiny, 0, 30)
    base = F.ask(study, study.bench, settings())
    for row in base:
        assert row["thinks"] == bool(row["completion"].partition("</think>")[0].strip())
    assert 0 < sum(row["thinks"] for row in base) < 30
    assert F.difference(base, base) == {"Pass@1": [0.0, 0.0, 0.0], "thinks": [0.0, 0.0, 0.0]}
    never = [row | {"thinks": False} for row in base]
    share = sum(row["thinks"] for row in base) / 30
    assert F.difference(never, base)["thinks"][0] == pytest.approx(-share)
    path = tmp_path / "rows.jsonl"
    answers = eval.evaluate(model, tokenizer, study.bench, path, max_new_tokens=96)
    said = {row["id"]: row["completion"] for row in answers}
    assert {row["id"]: row["completion"] for row in base} == said


def test_no_answer_begins_with_a_forbidden_token_and_other_places_keep_it(tiny):
    model, tokenizer = tiny
    prompts = []
    for row in read_problems(TINY / "test.jsonl")[:24]:
        text = tokenizer.chat([{"role": "user", "content": row["problem"]}])
        prompts.append(tokenizer.encode(text))

    def sample():
        found = M.generate(model, prompts, 48, seed=1, stop_ids=tokenizer.eos_ids, slots=5)
        return [ids for ids, in found]
    free = sample()
    with F.never_first(model, CLOSE):
        forced = sample()
    assert 3 < sum(ids[0] == CLOSE for ids in free) < 21
    assert sample() == free                                          # gone with its block
    assert all(ids[0] != CLOSE and CLOSE in ids for ids in forced)
    # Who thought, thinks the same.
    assert all(a == b for a, b in zip(free, forced) if a[0] != CLOSE)


# ---- the command ---------------------------------------------------------------------------------

def run(*words, cwd=ROOT):
    """python -m tests.claims.features, as a user types it."""
    return subprocess.run([sys.executable, "-m", "tests.claims.features", *words], cwd=cwd,
                          capture_output=True, text=True)


def test_the_command_then_again_on_what_it_trained(data, tmp_path, capsys):
    few = ["--data", str(data), "--questions", "6", "--top", "1", "--device", "cpu"]
    F.main([*few, "--layers", "3", "--steps", "2", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    saes = json.loads((tmp_path / "run/numbers.json").read_text())["saes"]
    assert (tmp_path / "run/table.txt").read_text().strip() in text
    (spec, found), = saes.items()
    assert spec == str(tmp_path / "run/sae-3")
    for words in ("sae-3: by the rule", "larger effects in", "forbidden as the first token",
                  "6 held-out questions"):
        assert words in text
    assert "--stage sae" in (tmp_path / "run/commands.sh").read_text()
    sae = load_any(str(tmp_path / "run/sae-3"))
    model, tokenizer = M.load_model(TARGET), M.load_tokenizer(TARGET)
    text = train.as_text(read_problems(TINY / "test.jsonl")[0], tokenizer, "chat")
    once = F.reasoning_features(model, sae, tokenizer.encode(text), OPEN, CLOSE)
    assert set(map(str, once)) <= set(found["rule"]) and found["prompts"] == 20
    F.main([*few, "--sae", str(tmp_path / "run/sae-3"), "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b/numbers.json").read_text())["saes"] == saes
    assert not (tmp_path / "b/commands.sh").exists()


def test_quick_runs_and_a_mistake_is_one_line(tmp_path):
    done = run("--quick", "--layers", "0", "--out", str(tmp_path / "run"))
    assert done.returncode == 0 and "sae-0: by the rule" in done.stdout, done.stderr
    done = run("--quick", "--steps", "3", "--out", str(tmp_path / "other"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--steps has no effect with --quick" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags, message", [
    ("--sae x --steps 3", "--steps has no effect with --sae"),
    ("--lr 0.1", "no flag '--lr'"),
    ("--sae x --layers 1 2", "--layers has no effect with --sae"),
    ("--layers 4", "layer 4: this model has blocks 0 .. 3"),
    ("--questions 0", "--questions: 0 should be at least 1"),
    ("--top 0", "--top: 0 should be at least 1"),
    ("--sae nowhere", "nowhere"),
    ("--bench nothing", "known names are"),
    ("--bench aime24,aime25", "known names are"),
    ("--laiers 1", "did you mean --layers"),
])
def test_refused_before_anything_is_done(flags, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        F.main(["--out", str(tmp_path / "run"), *flags.split()])
    left = {path.name for path in tmp_path.rglob("*.*")}
    assert left <= {"config.json", "commands.sh"}        # what is noted first


def test_an_sae_of_another_width_or_layer_is_refused(tmp_path):
    for name, width, layer in (("narrow", 64, 1), ("nowhere", 128, None), ("high", 128, 9),
                               ("good", 128, 1)):
        sae = S.build("topk", width, 64, k=4)
        sae.meta = {} if layer is None else {"layer": layer, "site": "resid"}
        S.save_sae(sae, tmp_path / name)
    for flags, message in (
            ("nowhere", "does not say its layer"), ("good high", "has blocks 0 .. 3"),
            ("narrow", "narrow: the SAE is 64 wide")):
        words = [str(tmp_path / word) for word in flags.split()]
        with pytest.raises(ValueError, match=message):
            F.main(["--out", str(tmp_path / "run"), "--questions", "2", "--sae", *words])
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
