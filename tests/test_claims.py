"""The programs of tests/claims, end to end, as small as they go."""

import re

import pytest

from tests.claims import variants


# ------------------------------------------------------------------------------------------------
# variants
# ------------------------------------------------------------------------------------------------

def test_claim_variants(data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--quick", "--variants", "topk", "feature_choice", "--data", str(data)]
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


@pytest.mark.parametrize("flags, message", [
    ("--variants topkk", "invalid choice: 'topkk'"), ("--seeds 0", "--seeds: 0 should be at least"),
    ("--quick --steps 3", "--steps has no effect with --quick"),
    ("--only recover --dtype fp32", "--dtype has no effect with --only recover"),
])
def test_variants_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        variants.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run" / "commands.sh").exists()
