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
from data.files import TINY
from data.formats import load_any
from data.rows import read_problems
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
    return Namespace(**usual | {"fields": ""} | more)


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


def test_the_rule_counts_negative_codes_and_reads_the_site_of_the_sae(tiny, monkeypatch):
    model, _ = tiny
    read, places = F.resa.activations, []
    monkeypatch.setattr(F.resa, "activations", lambda *args: places.append(args[2:]) or read(*args))
    for site in ("resid", "mlp"):
        sae = build("abstopk", 128, 2, 2, site, k=1)     # a token has one of the two
        rest = [i for i in range(len(PROMPT)) if i not in (2, 5, 7, 9)]
        firing(model, sae, [(2, 5, 7, 9), rest])
        assert F.reasoning_features(model, sae, PROMPT, OPEN, CLOSE) == [0]
        assert places[-1] == (2, site)


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


def planted_row(latent, d, *groups):
    return {"latent": latent, "groups": groups, "rate": 0.5, "attribution": 0.0,
            "effect": [d, d - 1, d + 1]}


def test_groups_are_set_against_the_null_sample():
    null = [planted_row(i, 0.01 * i, "null") for i in range(6)]
    ranked = [planted_row(10 + i, -0.5 + 0.01 * i, "ranked") for i in range(6)]
    study = Namespace(base={"a": {"correct": True}, "b": {"correct": False}}, prompts=[[1], [2]],
                      forced=[0.1, 0.0, 0.2])

    def said(latents):
        return F.report({"sae-3": {"rule": {4: 2, 5: 1}, "latents": latents}}, study)
    text = said([*null, *ranked, planted_row(20, 0.02, "rule")])
    assert "sae-3: by the rule 1.5 latents a prompt, 1 in all of 2." in text
    assert re.search(r"^10 +ranked +50\.0% .* -0\.500 \[-1\.500, \+0\.500\]$", text, re.M)
    assert re.search(r"^ +ranked - null +\+0\.450, p 0\.00\d\d$", text, re.M)
    assert re.search(r"^ +rule - null +-0\.005, p 1\.0000$", text, re.M)
    assert "forbidden as the first token: +0.100 [+0.000, +0.200]" in text
    assert "Pass@1 0.500 on 2 held-out" in text
    assert "rule - null" not in said([*null, *ranked])                   # nobody in it
    assert "ranked - null" not in said([*null[5:], *ranked])     # a single one in the null sample


# ---- one latent changed --------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", ["none", "unit", "token"])
def test_ablated_is_the_activation_less_one_latent(normalize):
    sae = build("topk", 16, 32, k=8, normalize=normalize).double()
    x = randn(3, 5, 16).double() + 1
    z = sae.encode(x)                                                    # (B,T,F)
    f = int(z.flatten(0, 1).count_nonzero(0).argmax())
    without = z.clone()
    without[..., f] = 0
    share = sae.decode(z, x) - sae.decode(without, x)        # what the SAE says of x through f
    assert share.abs().max() > 0.1
    assert torch.allclose(F.ablated(sae, f)(x), x - share, atol=1e-12)
    if normalize == "none":
        assert torch.allclose(F.ablated(sae, f)(x), x - z[..., f, None] * sae.W_dec[f], atol=1e-12)


def test_ablated_in_generation_is_ablated_in_a_whole_pass(tiny):
    """With a sink norm too: of the tokens read through the cache, only the first is position 0."""
    model, tokenizer = tiny
    sae = build("relu", 128, 8)
    sae.meta["sink_norm"] = 1e9
    sae.b_enc.fill_(8.0)                     # all fire at every token
    prompt, few = tokenizer.encode(QUESTION), dict(max_new_tokens=12)
    with resa.splice(model, F.ablated(sae, 3), 1), torch.no_grad():
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
    rate, attribution = F.attribute(model, sae, [(prompt, answer)], CLOSE)
    z = sae.encode(resa.activations(model, torch.tensor([prompt + answer]), 2))[0]       # (T,F)
    assert torch.equal(rate, (z != 0).float().mean(0))

    def odds(f, strength):
        def weakened(x):                     # by a share of what ablation takes out
            return x + strength * (F.ablated(sae, f)(x) - x)
        with resa.splice(model, weakened, 2), torch.no_grad():
            p = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)[CLOSE]
        return float((1 - p).log() - p.log())
    for f in attribution.topk(4).indices.tolist():
        slope = abs(odds(f, 0.02) - odds(f, -0.02)) / 0.04
        assert attribution[f] == pytest.approx(slope, rel=0.05)


def test_the_null_sample_fires_about_as_often():
    rate, attribution = torch.linspace(0, 1, 101), torch.zeros(101)
    attribution[[50, 90]] = torch.tensor([2.0, 1.0])
    chosen = F.choose_latents(rate, attribution, [90, 3, 4], settings(top=2))
    assert list(chosen)[:3] == [50, 90, 3] and chosen[90] == ["ranked", "rule"]
    null = [latent for latent, groups in chosen.items() if groups == ["null"]]
    assert len(null) == 3
    assert chosen == F.choose_latents(rate, attribution, [90, 3, 4], settings(top=2))
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


@pytest.fixture(scope="module")
def study():
    """The base, 10 questions for documents and as many prompts, 40 held-out questions."""
    studied = F.open_study(settings(data=str(TINY / "train.jsonl"), target=TARGET, dtype="",
                                    device="cpu", questions=40))
    studied.documents = studied.documents[:10]
    return studied


def test_effects_find_a_planted_latent_and_not_a_shuffled_one(study):
    found = {}
    for shuffled in (False, True):
        sae = planted(study.model, shuffled)
        found[shuffled] = F.measure(study, sae, settings(top=2))["latents"]
        assert json.loads(json.dumps(found[shuffled])) == found[shuffled]
        assert {row["rate"] for row in found[shuffled]} == {1.0}
        assert 2 * sum(row["groups"] == ["null"] for row in found[shuffled]) == len(found[shuffled])
    first = found[False][0]
    assert first["latent"] == 7 and first["groups"] == ["ranked"] and first["effect"][1] > 0.05
    sizes = {row["latent"]: abs(row["effect"][0]) for row in found[False]}
    assert sizes[7] == max(sizes.values())
    assert all(abs(row["effect"][0]) < sizes[7] / 2 for row in found[True] if row["latent"] == 7)


def test_an_effect_is_the_paired_difference_to_the_plain_answers(study, tmp_path):
    change, low, high = F.effect(study, settings())      # none in 40 does not mean none in more
    assert change == 0 and -0.15 < low < -0.05 and high == pytest.approx(-low)
    never = Namespace(**vars(study) | {"base": {i: {"correct": False} for i in study.base}})
    share = sum(row["correct"] for row in study.base.values()) / 40
    assert F.effect(never, settings())[0] == pytest.approx(share) and 0 < share < 1
    path = tmp_path / "rows.jsonl"
    answers = eval.evaluate(study.model, study.tokenizer, study.bench, path, max_new_tokens=96)
    said = {row["id"]: row["completion"] for row in answers}
    assert {i: row["completion"] for i, row in study.base.items()} == said


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


def test_the_command(data, tmp_path, capsys):
    F.main(["--preset", "tiny", "--data", str(data), "--questions", "6", "--top", "1", "--device", "cpu",
            "--layers", "3", "--steps", "2", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "numbers.json").read_text())["saes"]["sae-3"]
    assert (tmp_path / "table.txt").read_text().strip() in text
    for words in ("sae-3: by the rule", "forbidden as the first token", "6 held-out questions"):
        assert words in text
    assert "--stage sae" in (tmp_path / "commands.sh").read_text()
    sae = load_any(str(tmp_path / "sae-3"))
    model, tokenizer = M.load_model(TARGET), M.load_tokenizer(TARGET)
    text = train.as_text(read_problems(TINY / "test.jsonl")[0], tokenizer, "chat")
    once = F.reasoning_features(model, sae, tokenizer.encode(text), OPEN, CLOSE)
    assert set(map(str, once)) <= set(found["rule"])


def test_quick_runs_and_a_mistake_is_one_line(tmp_path):
    done = run("--quick", "--layers", "0", "--out", str(tmp_path / "run"))
    assert done.returncode == 0 and "sae-0: by the rule" in done.stdout, done.stderr
    done = run("--quick", "--steps", "3", "--out", str(tmp_path / "other"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--steps has no effect with --quick" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags, message", [
    ("--lr 0.1", "no flag '--lr'"),
    ("--layers 4", "layer 4: this model has blocks 0 .. 3"),
    ("--questions 0", "--questions: 0 should be at least 1"),
    ("--top 0", "--top: 0 should be at least 1"),
    ("--laiers 1", "did you mean --layers"),
])
def test_refused_before_anything_is_done(flags, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        F.main(["--out", str(tmp_path / "run"), *flags.split()])
    left = {path.name for path in tmp_path.rglob("*.*")}
    assert left <= {"config.json", "commands.sh"}        # what is noted first
