"""The programs of tests/claims, end to end, as small as they go."""

import re

import pytest
import torch
from torch.nn import functional as fn

from tests.claims import variants


# ------------------------------------------------------------------------------------------------
# variants
# ------------------------------------------------------------------------------------------------

def test_claim_variants(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--quick", "--variants", "topk", "feature_choice", "--preset", "tiny", "--data", str(data)]
    variants.main([*flags, "--out", str(out)])
    text = capsys.readouterr().out
    compared, recovered = (out / "compare.txt").read_text(), (out / "recover.txt").read_text()
    assert compared in text and recovered in text and "1 seeds" in compared
    number = r" +0\.\d{4} 0\.\d{4} \.\. 0\.\d{4} +"
    assert re.search(rf"^topk{number}16\.0 ", compared, re.M)
    assert re.search(r"^feature_choice +\d", compared, re.M)
    assert re.search(rf"^topk +0\.\d{{3}} +\d+\.\d% .*{number}12\.0$", recovered, re.M)
    assert re.search(r"^feature_choice +0\.\d{3} +\d+\.\d%", recovered, re.M)
    commands = (out / "commands.sh").read_text()
    assert commands.count("python train.py --stage sae ") == 2 and f"--data {data}" in commands
    assert (out / "feature-choice-0" / "cfg.json").exists()


def test_recover_gives_the_same_numbers_again():
    first, again = (variants.recover_one("gba", 3, 5, "cpu") for _ in range(2))
    assert first["mmcs"] == again["mmcs"] and first["fvu"] == again["fvu"]


@pytest.mark.parametrize("variant, found", [("abstopk", 1), ("itda", 1), ("topk", 0), ("gba", 0)])
def test_an_atom_that_is_the_opposite_of_a_direction_finds_it_where_codes_are_signed(
        variant, found, monkeypatch):
    rng = torch.Generator().manual_seed(3)
    toy = variants.TOY
    true = fn.normalize(torch.randn(toy["n"], toy["width"], generator=rng), dim=1)

    def opposite(sae, batches, optimizer, rate):
        sae.W_dec.data.copy_(-true.repeat(2, 1))
        return iter([])

    monkeypatch.setattr(variants, "make_optimizer", lambda *args: None)
    monkeypatch.setattr(variants.train, "train_sae", opposite)
    result = variants.recover_one(variant, 3, 1, "cpu")
    assert result["at_9"] == found
    assert result["mmcs"] > 0.999 if found else result["mmcs"] < 0.9


@pytest.mark.parametrize("flags, message", [
    ("--variants topkk", "invalid choice: 'topkk'"), ("--seeds 0", "--seeds: 0 should be at least"),
    ("--quick --steps 3", "--steps has no effect with --quick"),
    ("--only recover --dtype fp32", "--dtype has no effect with --only recover"),
])
def test_variants_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        variants.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run" / "commands.sh").exists()
