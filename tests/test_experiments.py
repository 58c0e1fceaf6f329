"""The experiments: that arms differ in nothing but what their names say, statistics over seeds, the report's content.

    python -m pytest tests/test_experiments.py -q
"""
import json
import math
import types

import pytest
import torch

import resa
import train
from model import load_model, read_adapter

TRAINED = {name: words for name, words in resa.ALL_ARMS.items() if not words.startswith("= ")}


def settings(words, out="root/seed-0/x"):
    """What an arm's words mean as settings of train.py, the places that are not made yet included."""
    at = types.SimpleNamespace(out="root/seed-0", seed=0, sae_steps=100, tune_steps=120, lr=3e-4)
    stage, flags = resa.arm_flags(words, at, out)
    return {k: v for k, v in vars(train.prepare(stage, flags)).items() if k != "given"}


# ----------------------------------------------------------------------------------------------------------
# Controls are controls
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in TRAINED if TRAINED[name].startswith("tune")])
def test_arms_differ_from_the_published_one_in_their_words_alone(name):
    mine, reference = settings(TRAINED[name]), settings(TRAINED["SAE-Tuning (as coded)"])
    words = {word[2:].replace("-", "_") for word in TRAINED[name].split() if word.startswith("--")}
    differ = {key for key in mine if mine[key] != reference[key]}
    assert differ <= words | ({"sae"} if "none" in TRAINED[name] else set())
    for key in ("steps", "batch", "seq_len", "lr", "seed", "lora_r", "lora_alpha", "lora_dropout", "clip", "kl_reduction"):
        assert mine[key] == reference[key]


def test_sft_has_the_same_budget():
    mine, reference = settings("sft"), settings(TRAINED["SAE-Tuning (as coded)"])
    assert {key for key in mine if mine[key] != reference[key]} == set()


@pytest.mark.parametrize("name", resa.ALL_SAES)
def test_saes_differ_in_their_words_alone(name):
    mine, reference = settings(resa.ALL_SAES[name]), settings("sae")
    words = {word[2:].replace("-", "_") for word in resa.ALL_SAES[name].split() if word.startswith("--")}
    assert {key for key in mine if mine[key] != reference[key]} == words


@pytest.mark.parametrize("a, b, differ", [
    ("SAE-Tuning (as coded)", "random SAE", {"splice"}),
    ("SAE-Tuning (as coded)", "noise of the SAE's size", {"splice"}),
    ("SAE-Tuning (as coded)", "SAE of the base", {"sae"}),
    ("source through its SAE teaches", "source through a random SAE teaches", {"splice"}),
    ("gradient through the SAE", "gradient through a random SAE", {"splice"}),
    ("matched as the SAE sees it", "matched as a random SAE sees it", {"splice"}),
    ("matched as the SAE sees it", "matched as it is, no SAE", {"splice", "into", "sae"}),
    ("SAE of rollouts (as coded)", "SAE-Tuning (as coded)", {"sae"}),
    ("SAE of 4 families, tuned on 4 others", "SAE of the same 4 it is tuned on", {"sae"})])
def test_an_arm_and_its_control_differ_in_one_thing(a, b, differ):
    first, second = settings(TRAINED[a]), settings(TRAINED[b])
    assert {key for key in first if first[key] != second[key]} == differ


def test_every_arm_has_a_section_and_every_pair_its_arms():
    shown = {name for section in resa.SECTIONS.values() for name in section[2]}
    assert shown == set(resa.ALL_ARMS)
    for _, _, arms, pairs in resa.SECTIONS.values():
        assert {name for a, b, _ in pairs for name in (a, b)} <= {*resa.ALL_ARMS}
        assert not arms or arms[0] == "base"


@pytest.mark.parametrize("sections", [[name] for name in resa.SECTIONS] + [[*resa.SECTIONS]])
def test_what_a_section_needs_is_made(sections):
    arms, saes = resa.needed_by(types.SimpleNamespace(sections=sections))
    for section in sections:
        assert {*resa.SECTIONS[section][2]} <= {*arms}
        assert {name for a, b, _ in resa.SECTIONS[section][3] for name in (a, b)} <= {*arms}
    read = " ".join([*arms.values(), *saes.values()])
    assert {word.split("/")[1] for word in read.split() if word.startswith("{out}/sae")} == {*saes}


def test_an_arm_that_uses_anothers_adapter_brings_it_along(monkeypatch):
    for name in ("half the adapter of math", "a random one of the size of math's", "math with its adapter"):
        monkeypatch.setitem(resa.SECTIONS, "layers", ("", "", ["base", name], []))
        arms, saes = resa.needed_by(types.SimpleNamespace(sections=["layers"]))
        assert "adapter of math" in arms and [*saes] == ["sae"]


def test_the_halves_share_no_family_and_are_all_of_them(tmp_path):
    resa.write_halves(types.SimpleNamespace(out=tmp_path))
    families = [{json.loads(line)["family"] for line in open(tmp_path / f"{name}.jsonl")} for name in resa.HALVES]
    assert not families[0] & families[1] and len(families[0] | families[1]) == 8


def test_a_random_adapter_has_the_size_of_the_one_it_stands_in_for(tmp_path):
    model = resa.add_lora(load_model(resa.TINY / "distill"), 4, 8)
    with torch.no_grad():
        for layer in resa.lora_layers(model).values():
            layer.lora_B.normal_()
    resa.save_adapter(model, tmp_path / "a")
    resa.random_adapter(tmp_path / "a", tmp_path / "b", 0)
    resa.random_adapter(tmp_path / "a", tmp_path / "c", 1)
    a, b, c = (read_adapter(str(tmp_path / name)) for name in "abc")
    assert a["scale"] == b["scale"] and {*a["pairs"]} == {*b["pairs"]}
    for name in a["pairs"]:
        first, second, third = ((B @ A) for A, B in (side["pairs"][name] for side in (a, b, c)))
        assert torch.isclose(first.norm(), second.norm(), rtol=1e-4)
        assert abs(torch.cosine_similarity(first.flatten(), second.flatten(), 0)) < 0.2
        assert not torch.allclose(second, third)


# ----------------------------------------------------------------------------------------------------------
# Over seeds
# ----------------------------------------------------------------------------------------------------------

def run_of(right, n=100):
    """Samples of n questions, the first `right` of them right."""
    return [{"id": str(i), "sample": 0, "correct": i < right, "extracted": "", "tokens": 1, "finish": "stop",
             "settings": {}, "seed": [0, i, 0]} for i in range(n)]


def test_the_interval_is_students_over_seeds():
    mean, low, high = resa.over_seeds([run_of(c) for c in (50, 60, 55, 52, 58)])
    sd = math.sqrt(sum((c - 55) ** 2 for c in (50, 60, 55, 52, 58)) / 4) / 100
    assert abs(mean - 0.55) < 1e-12 and abs((high - low) / 2 - 2.776 * sd / math.sqrt(5)) < 2e-4


def test_differences_are_paired_by_seed():
    a, b = ([run_of(c) for c in counts] for counts in ((50, 70, 60), (40, 61, 49)))
    mean, low, high = resa.over_seeds(a, b)
    assert abs(mean - 0.10) < 1e-12 and 0.05 < low < high < 0.15      # 10, 9, 11: seeds differ, differences hardly
    said = lambda a, b: resa.sentence("a", "b", "is it so", *resa.over_seeds(a, b))
    assert said(a, b).endswith("better.") and said(b, a).endswith("worse.")
    assert said(a, [b[2], b[1], a[0]]).endswith("no difference is seen.")


def test_one_seed_falls_back_on_the_questions():
    assert resa.over_seeds([run_of(50)])[1:] == pytest.approx((0.404, 0.596), abs=1e-3)      # Wilson


def test_no_interval_is_without_width_or_out_of_range():
    mean, low, high = resa.over_seeds([run_of(0)] * 5)
    assert mean == low == 0 and 0.03 < high < 0.04                     # 100 questions, none right: Wilson
    mean, low, high = resa.over_seeds([run_of(c) for c in (0, 0, 0, 0, 3)])
    assert low == 0 < mean < high
    same = resa.over_seeds([run_of(50), run_of(60)], [run_of(49), run_of(59)])
    assert same[1] <= 0.01 <= same[2] and same[1] < same[2]


def test_the_interval_covers_another_training():
    """5 seeds of a normal Pass@1: the 95 % interval holds the true mean in 95 % of 2,000 simulations."""
    rng = torch.Generator().manual_seed(0)
    counts = (500 + 30 * torch.randn(2000, 5, generator=rng)).round().int().tolist()
    inside = 0
    for row in counts:
        _, low, high = resa.over_seeds([[{"correct": c / 1000}] for c in row])
        inside += low <= 0.5 <= high
    assert 0.935 < inside / 2000 < 0.965


@pytest.mark.parametrize("found, words", [
    ((95, 50), "gradient through the SAE"), ((95, 95), "does not earn"), ((60, 20), "does not earn")])
def test_the_sae_earns_its_place_only_near_the_source_and_above_a_random_one(found, words):
    runs = lambda c: [run_of(min(100, c + i % 2)) for i in range(5)]
    rows = {name: runs(50) for name in resa.SECTIONS["objectives"][2]} | {"RL source": runs(94)}
    rows |= {"gradient through the SAE": runs(found[0]), "gradient through a random SAE": runs(found[1])}
    line, = [s for s in resa.summarize_all(rows) if s.startswith("At least 97 %")]
    assert words in line


@pytest.mark.parametrize("name", ["arms", "objectives", "modes", "sources", "generality", "modularity", "layers"])
def test_a_section_says_what_its_rows_say(name):
    """On made-up samples: every arm a row, every pair a sentence, and the shape that the page needs."""
    ids = [row["id"] for row in resa.read_problems(resa.TINY / "test.jsonl")]
    right = {arm: 300 + 12 * i for i, arm in enumerate(resa.ALL_ARMS)}
    rows = {arm: [[row | {"id": key} for row, key in zip(run_of(c + s, 1000), ids)] for s in (0, 3, 7)]
            for arm, c in right.items()}
    section = resa.make_section(types.SimpleNamespace(seeds=3), name, rows)
    resa.check_shape(section, resa.RESULTS["sections"][0], name)
    lines, (_, _, arms, pairs) = section["tables"][0]["rows"], resa.SECTIONS[name]
    assert [line[0] for line in lines] == arms
    if name == "generality":      # only families the SAE has not read count
        unseen = [row["id"] for row in resa.read_problems(resa.TINY / "test.jsonl")
                  if row["family"] in resa.HALVES["elicit"].split()]
        some = sum(ids.index(key) < right["base"] for key in unseen) / len(unseen)
        assert abs(float(lines[0][1]) - some) < 0.01
    else:
        assert lines[1][1] == f"{(right[arms[1]] + 10 / 3) / 1000:.3f}"
        for (a, b, _), said in zip(pairs, section["words"]):
            assert f"{a} against {b}: {(right[a] - right[b]) / 1000:+.3f}" in said
            assert said.endswith("better." if right[a] > right[b] else "worse.")
    if name == "sources":
        own, tuned = section["charts"][1]["series"]
        assert [p["x"] for p in own["points"]] == [p["x"] for p in tuned["points"]] == [0, 10, 50, 100, 200]
    assert all(word.endswith(".") for word in section["words"])


def test_the_published_statistics_come_as_whole_sentences():
    table, words = resa.published_again(20)
    assert table.count("\n") > 8 and all(word[0].isupper() and word.endswith(".") for word in words)
    assert "r = -0.20" in words[0]


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

def test_the_command_runs_a_section_and_writes_the_report(tmp_path, capsys):
    resa.main(["experiments", "--quick", "--sections", "layers", "--out", str(tmp_path / "x" / "all")])
    said = capsys.readouterr().out
    assert "It shows" not in said and "it shows that everything runs, nothing else" in said
    results = json.loads((tmp_path / "x" / "all" / "results.json").read_text())
    resa.check_shape(results, resa.RESULTS, "results")
    section, = results["sections"]
    assert [row[0] for row in section["tables"][0]["rows"]] == resa.SECTIONS["layers"][2]
    page, text = (tmp_path / "x" / "report.html").read_text(), (tmp_path / "x" / "report.md").read_text()
    assert "Which block" in page and "| layer 2 |" in text
    assert (tmp_path / "x" / "all" / "seed-0" / "eval" / "layer-2.jsonl").read_text().count("\n") == 40


@pytest.mark.parametrize("flags, words", [
    (["--sections", "arms", "zebra"], "--sections zebra: there are arms"),
    (["--quick", "--seeds", "2"], "--seeds has no effect with --quick"),
    (["--questions", "5000"], "there are 1000"),
    (["--lr", "0"], "--lr must be above 0")])
def test_refused_before_anything_is_written(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        resa.main(["experiments", "--out", str(tmp_path / "x"), *flags])
    assert not (tmp_path / "x").exists()
