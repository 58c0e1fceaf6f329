"""tests/claims/errors.py: the error in parts, and the command."""

import json
import re

import pytest
import torch
from torch.nn.functional import normalize

import model as M
import resa
import sae as S
import train
from tests.claims import errors as E
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"
FVU, FVU_NL, R2, R2_NORM = "FVU of e", "FVU of e_nl", "R2 of e from x", "R2 of |e|^2 from x"
R2_NORM_X = "R2 of |e|^2 from |x| alone"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(line, width):
    """The matrix (width,Q) of an affine function."""
    eye = torch.eye(width, dtype=torch.float64)
    return line(eye) - line(0 * eye)


@pytest.fixture
def toy():
    """An untrained TopK, correlated activations off the origin, and its x_hat, all in fp64."""
    sae = S.build("topk", 12, 48, k=4).double().requires_grad_(False)
    x = randn(2000, 12) @ randn(12, 12, seed=1) + 3
    S.init_b_dec(sae, x)
    return sae, x, sae(x)


# ------------------------------------------------------------------------------------------------
# The decomposition
# ------------------------------------------------------------------------------------------------

def test_the_nonlinear_error_is_what_of_the_reconstruction_is_not_affine_in_x(toy):
    _, x, x_hat = toy
    of_e, of_x_hat = E.fit_affine(x, x - x_hat, ridge=0), E.fit_affine(x, x_hat, ridge=0)
    assert torch.allclose(x - x_hat - of_e(x), -(x_hat - of_x_hat(x)), atol=1e-10)
    both = matrix_of(of_e, 12) + matrix_of(of_x_hat, 12)
    assert torch.allclose(both, torch.eye(12, dtype=x.dtype), atol=1e-10)


def test_in_sample_identities(toy):
    """Squares add up; X' e_nl = 0; what is reported is of the other rows."""
    sae, x, x_hat = toy
    _, m = E.decompose_error(x, x_hat, 1500)
    assert m[FVU] == pytest.approx(S.metrics(sae, x[1500:])["fvu"])
    line = E.fit_affine(x[:1500], (x - x_hat)[:1500], ridge=0)
    x_fit, e = x[:1500], (x - x_hat)[:1500]
    e_lin, e_nl = line(x_fit), e - line(x_fit)
    assert abs(e.pow(2).sum() - e_lin.pow(2).sum() - e_nl.pow(2).sum()) < 1e-8 * e.pow(2).sum()
    assert (x_fit.T @ e_nl).abs().max() < 1e-8 * x_fit.norm() * e_nl.norm()
    assert e_nl.mean(0).abs().max() < 1e-10
    _, other = E.decompose_error(x.flip(0), x_hat.flip(0), 500)
    assert other[FVU] == pytest.approx(S.metrics(sae, x[:1500])["fvu"])


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_dead_or_shrunk_sae_has_an_r2_of_1_which_fvu_gives_away(toy, keep):
    _, x, _ = toy
    _, m = E.decompose_error(x, keep * x, len(x) // 2)
    assert m[R2] > 0.9999 and m[FVU_NL] < 1e-4
    assert m[FVU] > 0.9 * (1 - keep) ** 2


def test_noise_on_the_reconstruction_is_nonlinear(toy):
    _, x, _ = toy
    _, m = E.decompose_error(x, x + randn(*x.shape, seed=2), len(x) // 2)
    assert m[FVU_NL] > 0.95 * m[FVU] and m[R2] < 0.05


def test_of_dense_noise_on_the_activation_the_line_finds_what_theory_says():
    """x + noise, reconstructed as x: tr(S_n (S_x + S_n)^-1 S_n) / tr(S_n) of it is linear."""
    mix = randn(8, 8, seed=1)
    x, noise = randn(40000, 8) @ mix, 2 * randn(40000, 8, seed=3)
    _, m = E.decompose_error(x + noise, x, 20000)
    expected = 4 * torch.linalg.inv(mix.T @ mix + 4 * torch.eye(8, dtype=x.dtype)).trace() / 8
    assert 0.2 < expected < 0.9 and abs(m[R2] - expected) < 0.02


def test_the_squared_norm_is_linear_in_sparse_sums_and_not_in_gaussians():
    n, d = 8000, 32
    gaussian = randn(n, d)
    active = torch.rand(n, d, generator=torch.Generator().manual_seed(1)) < 0.1
    on = active * (5 + 0.1 * randn(n, d, seed=2))
    atoms = torch.linalg.qr(randn(d, d, seed=3)).Q
    sparse = on @ atoms
    assert E.linear_r2(sparse, sparse.pow(2).sum(1, keepdim=True), n // 2) > 0.95
    assert abs(E.linear_r2(gaussian, gaussian.pow(2).sum(1, keepdim=True), n // 2)) < 0.05


def test_the_norm_of_x_alone_is_a_baseline_for_the_norm_of_e():
    x = randn(4000, 16)
    way = normalize(randn(4000, 16, seed=1), dim=1)
    _, m = E.decompose_error(x, x - way * x.norm(dim=1, keepdim=True), 2000)    # |e| = |x|
    assert m[R2_NORM_X] > 0.999 and abs(m[R2_NORM]) < 0.05
    _, m = E.decompose_error(x, x - way * (3 + x[:, :1]).abs().sqrt(), 2000)     # |e|^2 = 3 + x_0
    assert m[R2_NORM] > 0.95 and abs(m[R2_NORM_X]) < 0.05


def test_errors_of_other_tokens_cannot_be_predicted(toy):
    _, x, x_hat = toy
    e = x - x_hat
    shuffled = e[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    _, m = E.decompose_error(x, x - shuffled, len(x) // 2)
    assert m[R2] <= 0 and m[R2_NORM] < 0.01
    assert E.decompose_error(x, x_hat, len(x) // 2)[1][R2] > 0.1
    assert E.linear_r2(randn(200, 50), randn(200, 1, seed=1), 100) < -0.2      # 100 rows of noise


def test_r2_weighs_dimensions_by_their_variance():
    u, noise = randn(1000, 1), randn(1000, 1, seed=1)
    assert E.linear_r2(u, torch.cat([10 * u, 0.1 * noise], 1), 500) > 0.999
    assert E.linear_r2(u, torch.cat([0.1 * u, 10 * noise], 1), 500) < 0.01


def test_fit_is_least_squares_also_where_directions_are_missing():
    u, y = randn(300, 6) + 5, randn(300, 3, seed=1)
    with_ones = torch.cat([u, torch.ones(300, 1, dtype=u.dtype)], 1)
    plain = with_ones @ torch.linalg.lstsq(with_ones, y).solution
    assert torch.allclose(E.fit_affine(u, y, ridge=0)(u), plain, atol=1e-9)
    twice = torch.cat([u, u[:, :2]], 1)      # singular
    for ridge in (0, 1e-6):
        assert torch.allclose(E.fit_affine(twice, y, ridge)(twice), plain, atol=1e-4)
    assert matrix_of(E.fit_affine(u, y, 1e6), 6).abs().max() < 1e-4


@pytest.mark.parametrize("n_fit", [8, 49])
def test_too_little_text_is_refused(n_fit):
    with pytest.raises(ValueError, match=f"{n_fit} tokens to fit .* give more text"):
        E.decompose_error(torch.zeros(50, 8), torch.zeros(50, 8), n_fit)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = (ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(lines[:200]))
    return str(path)


def table_and_numbers(argv, out, capsys):
    E.main([*argv, "--out", str(out)])
    text, (numbers,) = capsys.readouterr().out, json.loads((out / "numbers.json").read_text())
    assert (out / "table.txt").read_text() in text
    return text, numbers


def test_the_command_trains_studies_and_prints_one_table(data, tmp_path, capsys):
    run = tmp_path / "run"
    text, study = table_and_numbers(
        ["--quick", "--widths", "32", "64", "128", "--seq-len", "64", "--preset", "tiny", "--data", data,
         "--held", data], run, capsys)
    assert re.search(r"^ +F 32 +F 64 +F 128$", text, re.M)
    for label in ("FVU of e_nl", "R2 of |e|^2 from |x| alone", "CE with x_hat + e_nl",
                  "KL with x_hat + e_lin"):
        assert text.count(f"\n{label}  ") == 1, label
    assert "ridge 1e-6" in text
    commands = (run / "commands.sh").read_text()
    assert commands.count("python train.py --stage sae ") == 3      # widths
    check_against_plain_code(study, run, data)


def check_against_plain_code(study, run, data):
    found = study["widths"]["64"]
    settings = train.settings("sae", ["--preset", "tiny", "--data", data, "--seq-len", "64"])
    tiny = M.load_model(settings.source)
    ids = train.load_chunks(settings, M.load_tokenizer(settings.source), tiny)
    x = resa.activations(tiny, ids, 1).flatten(0, 1)
    assert study["n_fit"] == len(ids) // 2 * 64 and study["n_fit"] + study["n_test"] == len(x)
    sae = S.load_sae(run / "sae-64-0").requires_grad_(False)
    line, m = E.decompose_error(x, sae(x), study["n_fit"])
    assert found[FVU] == pytest.approx(m[FVU], rel=1e-4) and found["L0"] == 16
    assert found[FVU_NL] == pytest.approx(m[FVU_NL], rel=1e-4)
    test = ids[len(ids) // 2:]
    with torch.no_grad():
        plain, clean = float(train.cross_entropy(tiny, test)), tiny.run(test)
        with resa.hooked(tiny, 1, "resid", lambda x: sae(x) + line(x)):
            linear = float(train.cross_entropy(tiny, test))
        with resa.hooked(tiny, 1, "resid", lambda x: x - line(x)):
            nonlinear = float(resa.kl_loss(tiny, tiny, tiny.run(test), clean))
    assert found["CE of the model"] == pytest.approx(plain, rel=1e-4)
    assert found["CE with x_hat + e_lin"] == pytest.approx(linear, rel=1e-4)
    assert found["KL with x_hat + e_nl"] == pytest.approx(nonlinear, rel=1e-3) and nonlinear > 1e-3


def test_the_command_on_ones_own_model_and_sae_leaves_sinks_out(data, tmp_path, capsys):
    """Random weights: position 0 is a sink."""
    for site in ("resid", "mlp"):
        sae = S.build("relu", 128, 32)
        sae.meta = {"layer": 1, "site": site}
        S.save_sae(sae, tmp_path / site)
    mlp, resid, out = str(tmp_path / "mlp"), str(tmp_path / "resid"), tmp_path / "run"
    flags = f"--source {RANDOM} --data {data} --seq-len 32".split()
    text, study = table_and_numbers([*flags, "--sae", resid], out, capsys)
    assert abs(study["left_out"] - 1 / 32) < 1e-9 and "3.1% are sinks, left out" in text
    assert list(study["widths"]) == ["32"]
    assert not (out / "commands.sh").exists()      # nothing was trained
    for some, message in (([resid, mlp], "trained at site mlp, not at resid"),
                          ([mlp, "--site", "resid"], "trained at site mlp, not at resid"),
                          ([resid, resid], "two of 32 latents")):
        with pytest.raises(ValueError, match=message):
            E.main([*flags, "--sae", *some, "--out", str(out)])


@pytest.mark.parametrize("flags, message", [
    ("--quick --steps 3", "--steps has no effect with --quick"),
    ("--steps 0", "--steps: 0 should be at least 1"), ("--widthss 3", "did you mean --widths"),
])
def test_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        E.main(["--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run").exists()


def test_refused_before_anything_is_trained(data, tmp_path):
    flags = "--widths 64 8 --steps 1 --workers 1".split()
    with pytest.raises(ValueError, match="k=16 is above n_latents=8"):
        E.main(["--out", str(tmp_path / "run"), "--preset", "tiny", "--data", data, *flags])
    assert not (tmp_path / "run/numbers.json").exists()
