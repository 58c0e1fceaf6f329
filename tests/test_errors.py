"""The error of an SAE in parts: what holds for any data, pursuit and its plain twin, `resa.py errors` on real files."""
import json
import re

import pytest
import torch

import model as M
import resa
import sae as S
import train
from tests.conftest import ROOT

RANDOM = f"random:{ROOT}/data/tiny/init/config.json"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def toy():
    """Correlated activations off the origin, and the reconstructions of a random TopK: SAE, x, x_hat, in fp64."""
    sae = S.build("topk", 12, 48, k=4).double().requires_grad_(False)
    x = randn(2000, 12) @ randn(12, 12, seed=1) + 3
    S.init_b_dec(sae, x)
    return sae, x, sae(x)


# ---- the decomposition: T1 .. T7 and T10 -----------------------------------------------------------------

def test_the_parts_add_up_and_each_can_be_put_back(toy):
    sae, x, x_hat = toy
    line, _ = S.decompose_error(x, x_hat)
    e_lin, e_nl = line(x), x - x_hat - line(x)
    assert e_lin.norm() > 1 and e_nl.norm() > 1
    assert torch.allclose(resa.Restored(sae, line, True)(x) + e_nl, x, atol=1e-12)
    assert torch.allclose(resa.Restored(sae, line, False)(x) + e_lin, x, atol=1e-12)
    assert torch.allclose(resa.Restored(sae, line, False)(x), x_hat + e_nl, atol=1e-12)


def test_the_nonlinear_error_is_what_of_the_reconstruction_is_not_affine_in_x(toy):
    _, x, x_hat = toy
    of_e, of_x_hat = S.fit_affine(x, x - x_hat, ridge=0), S.fit_affine(x, x_hat, ridge=0)
    assert torch.allclose(x - x_hat - of_e(x), -(x_hat - of_x_hat(x)), atol=1e-10)
    assert torch.allclose(of_e.matrix + of_x_hat.matrix, torch.eye(12, dtype=x.dtype), atol=1e-10)


def test_in_sample_identities(toy):
    """FVU_nl = FVU (1 - R2 uncentred), squares add up, X'e_nl = 0, and the nonlinear part is never the larger one."""
    sae, x, x_hat = toy
    line, m = S.decompose_error(x, x_hat, n_fit=1500, ridge=0)
    assert m["fvu"] == pytest.approx(S.metrics(sae, x[1500:])["fvu"])
    X, E = x[:1500], (x - x_hat)[:1500]
    E_nl = E - line(X)
    assert abs(m["fvu_nl_fit"] - m["fvu_fit"] * (E_nl.pow(2).sum() / E.pow(2).sum())) < 1e-12
    assert abs(E.pow(2).sum() - line(X).pow(2).sum() - E_nl.pow(2).sum()) < 1e-8 * E.pow(2).sum()
    assert (X.T @ E_nl).abs().max() < 1e-8 * X.norm() * E_nl.norm() and E_nl.mean(0).abs().max() < 1e-10
    assert 0 < m["fvu_nl_fit"] < m["fvu_fit"] and m["n_fit"] == 1500 and m["n_test"] == 500
    _, other = S.decompose_error(x.flip(0), x_hat.flip(0), n_fit=500, ridge=0)
    assert other["fvu"] == pytest.approx(m["fvu_fit"]) and other["r2"] < m["r2_fit"]      # measured on other rows


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_dead_or_shrunk_sae_has_an_r2_of_1_which_fvu_gives_away(toy, keep):
    _, x, _ = toy
    _, m = S.decompose_error(x, keep * x)
    assert m["r2"] > 0.9999 and m["r2_dims"] > 0.9999 and m["fvu_nl"] < 1e-4
    assert m["fvu"] > 0.9 * (1 - keep) ** 2


def test_noise_on_the_reconstruction_is_nonlinear(toy):
    _, x, _ = toy
    _, m = S.decompose_error(x, x + randn(*x.shape, seed=2))
    assert m["fvu_nl"] > 0.95 * m["fvu"] and m["r2"] < 0.05


def test_of_dense_noise_on_the_activation_the_line_finds_what_theory_says():
    """x + noise, reconstructed as x: tr(S_n (S_x + S_n)^-1 S_n) / tr(S_n) of it is linear; e_lin is a lower bound."""
    mix = randn(8, 8, seed=1)
    x, noise = randn(40000, 8) @ mix, 2 * randn(40000, 8, seed=3)
    _, m = S.decompose_error(x + noise, x)
    expected = 4 * torch.linalg.inv(mix.T @ mix + 4 * torch.eye(8, dtype=x.dtype)).trace() / 8
    assert 0.2 < expected < 0.9 and abs(m["r2"] - expected) < 0.02


def test_the_squared_norm_is_linear_in_sparse_sums_and_not_in_gaussians():
    n, d = 8000, 32
    gaussian = randn(n, d)
    on = (torch.rand(n, d, generator=torch.Generator().manual_seed(1)) < 0.1) * (5 + 0.1 * randn(n, d, seed=2))
    atoms = torch.linalg.qr(randn(d, d, seed=3)).Q
    sparse = on @ atoms
    assert S.linear_r2(sparse, sparse.pow(2).sum(1), n // 2) > 0.95
    assert abs(S.linear_r2(gaussian, gaussian.pow(2).sum(1), n // 2)) < 0.05


def test_the_norm_of_x_alone_is_a_baseline_for_the_norm_of_e():
    x = randn(4000, 16)
    way = torch.nn.functional.normalize(randn(4000, 16, seed=1), dim=1)
    _, m = S.decompose_error(x, x - way * x.norm(dim=1, keepdim=True))      # |e| = |x|, in random directions
    assert m["r2_norm_x"] > 0.999 and abs(m["r2_norm"]) < 0.05
    _, m = S.decompose_error(x, x - way * (3 + x[:, :1]).abs().sqrt())      # |e|^2 = 3 + x_0
    assert m["r2_norm"] > 0.95 and abs(m["r2_norm_x"]) < 0.05


def test_errors_of_other_tokens_cannot_be_predicted(toy):
    _, x, x_hat = toy
    e = x - x_hat
    shuffled = e[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    _, m = S.decompose_error(x, x - shuffled)
    assert m["r2"] <= 0 < m["r2_fit"] and m["r2_norm"] < 0.01
    assert S.decompose_error(x, x_hat)[1]["r2"] > 0.1
    assert S.linear_r2(randn(200, 50), randn(200, seed=1), 100) < -0.2      # half of them fits 100 rows of noise


def test_pooled_r2_weighs_dimensions_by_their_variance():
    y = randn(1000, 2) * torch.tensor([10.0, 0.1])
    pooled, mean = S.r2(y, y * torch.tensor([1.0, 0.0]))      # the large one exactly, the small one not at all
    assert pooled > 0.999 and abs(mean - 0.5) < 0.01


def test_fit_is_least_squares_also_where_directions_are_missing():
    u, y = randn(300, 6) + 5, randn(300, 3, seed=1)
    ones = torch.ones(300, 1, dtype=u.dtype)
    plain = torch.linalg.lstsq(torch.cat([u, ones], 1), y).solution
    assert torch.allclose(S.fit_affine(u, y, ridge=0)(u), torch.cat([u, ones], 1) @ plain, atol=1e-9)
    twice = torch.cat([u, u[:, :2]], 1)      # singular
    for ridge in (0, 1e-6):
        assert torch.allclose(S.fit_affine(twice, y, ridge)(twice), torch.cat([u, ones], 1) @ plain, atol=1e-4)
    assert S.fit_affine(u, y, 1e6).matrix.abs().max() < 1e-4


@pytest.mark.parametrize("x, x_hat, n_fit, message", [
    ((50, 8), (50, 7), None, "must both be"), ((5, 10, 8), (5, 10, 8), None, "must both be"),
    ((50, 8), (50, 8), 8, "8 of 50 tokens to fit a line on, in 8 dimensions"),
    ((50, 8), (50, 8), 49, "give more text"),
])
def test_what_cannot_be_decomposed_is_refused(x, x_hat, n_fit, message):
    with pytest.raises(ValueError, match=message):
        S.decompose_error(torch.zeros(x), torch.zeros(x_hat), n_fit)


# ---- across widths ---------------------------------------------------------------------------------------

def test_same_tokens_or_others():
    small, nl, noise = randn(2000).abs(), randn(2000, seed=1).abs(), randn(2000, seed=2).abs()
    same, more = S.same_tokens(small, nl, 2 * small + 1, 1000)
    assert same > 0.999
    same, more = S.same_tokens(small, nl, noise, 1000)
    assert abs(same) < 0.02 and abs(more) < 0.02
    same, more = S.same_tokens(small, nl, small + nl, 1000)
    assert 0.3 < same < 0.7 and more > 0.999


@pytest.mark.parametrize("c, a, m", [(0.05, 2.0, 0.5), (0.2, 30.0, 1.0), (0.0, 1.0, 0.25)])
def test_the_floor_of_the_curve_is_found(c, a, m):
    widths = [256, 512, 1024, 2048]
    found = S.fit_floor(widths, [c + a * F**-m for F in widths])
    assert found == pytest.approx((c, a, m), rel=0.05, abs=2e-3)
    assert all(value >= 0 for value in S.fit_floor(widths, [0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize("y", [[0.2, 0.12, 0.05, 0.0], [0.3, 0.31, 0.28, 0.3], [0.1, 0.07, 0.06, 0.058]])
def test_the_curve_is_the_best_with_no_constant_below_0(y):
    F, y = torch.tensor([256.0, 512, 1024, 2048]).double(), torch.tensor(y).double()
    c, a, m = S.fit_floor(F.tolist(), y.tolist())
    sse = float((y - c - a * F**-m).pow(2).sum())
    for m in torch.logspace(-2, 1, 31).tolist():
        for c in torch.linspace(0, 0.4, 41).tolist():
            f = F**-m
            a = float((f * (y - c)).sum() / (f * f).sum())
            assert sse <= float((y - c - max(0, a) * f).pow(2).sum()) + 1e-9


# ---- gradient pursuit: T8 and T9 -------------------------------------------------------------------------

def plain_pursuit(s, W, k):
    """One token, a dense code: the published loop, but a step ends where a code reaches 0."""
    z, sizes = torch.zeros(len(W), dtype=s.dtype), [float(s.norm())]
    for _ in range(k):
        r = s - z @ W
        g = W @ r
        best = int(g.argmax())
        grad = torch.where((z > 0) | ((torch.arange(len(W)) == best) & (g > 0)), g, 0)
        q = grad @ W
        step = float(q @ r / (q @ q).clamp_min(1e-30))
        for j in range(len(W)):
            if grad[j] < 0:
                step = min(step, float(z[j] / -grad[j]))
        z = (z + step * grad).clamp_min(0)
        sizes.append(float((s - z @ W).norm()))
    return z, sizes


@pytest.mark.parametrize("atoms, width, shift", [(40, 10, 0), (4, 10, 0), (12, 3, 0), (12, 6, 1)])
def test_pursuit_equals_its_plain_twin_and_keeps_to_each_tokens_l0(atoms, width, shift):
    """Few atoms, so that at times none is left that helps; close ones, so that codes come back to 0."""
    s, W = randn(60, width) + shift, torch.nn.functional.normalize(randn(atoms, width, seed=1) + shift, dim=1)
    l0 = torch.arange(60) % 9
    z = S.gradient_pursuit(s, W, l0).dense()
    assert ((z != 0).sum(1) <= l0).all() and (z >= 0).all() and (z[l0 == 0] == 0).all()
    for n in range(60):
        plain, sizes = plain_pursuit(s[n], W, int(l0[n]))
        assert torch.allclose(z[n], plain, atol=1e-9)
        assert all(b <= a + 1e-12 for a, b in zip(sizes, sizes[1:]))
    codes = S.gradient_pursuit(s, W, l0)
    assert (codes.place.diff() > 0).all() and codes.shape == (60, atoms)


def test_the_residual_never_grows_with_a_larger_l0():
    s, W = randn(300, 10), torch.nn.functional.normalize(randn(40, 10, seed=1), dim=1)
    codes = [S.gradient_pursuit(s, W, torch.full((300,), k)) for k in range(12)]
    sizes = torch.stack([(s - z.times(W)).norm(dim=1) for z in codes])
    assert (sizes.diff(dim=0) <= 1e-12).all() and sizes[-1].mean() < 0.5 * sizes[0].mean()


def test_pursuit_is_exact_in_k_steps_where_atoms_are_orthonormal():
    W = torch.linalg.qr(randn(16, 16)).Q
    true = randn(50, 16, seed=1).abs() * (torch.rand(50, 16, generator=torch.Generator().manual_seed(2)) < 0.3)
    found = S.gradient_pursuit(true @ W, W, (true != 0).sum(1)).dense()
    assert torch.allclose(found, true, atol=1e-12)


def test_pursuit_ignores_atoms_that_point_the_other_way():
    W = torch.eye(3, dtype=torch.float64)
    s = torch.tensor([[-5.0, 1.0, 0.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    z = S.gradient_pursuit(s, W, torch.tensor([2, 2])).dense()
    assert z.tolist() == [[0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("normalize", ["none", "scale", "token"])
def test_pursue_speaks_the_units_of_the_sae_and_no_more_atoms_than_it(normalize):
    sae = S.build("topk", 12, 48, k=4, normalize=normalize).requires_grad_(False)
    x = (3 * randn(200, 12) + 5).float()
    S.init_b_dec(sae, x)
    x_hat = S.pursue(sae, x)
    scaled = sae.batch(x)
    explained = (x_hat - scaled.undo[0]) / scaled.undo[1] - sae.b_dec      # = z W_dec, z of at most 4
    again = S.gradient_pursuit(scaled.x - sae.b_dec, sae.W_dec, torch.full((200,), 4)).times(sae.W_dec)
    assert torch.allclose(explained, again, atol=1e-4)
    assert (x - x_hat).pow(2).sum() < (x - sae(x)).pow(2).sum()      # of a random encoder


# ---- python resa.py errors -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join((ROOT / "data/tiny/train.jsonl").read_text().splitlines(keepends=True)[:200]))
    return str(path)


def test_the_command_trains_studies_and_prints_one_table_and_one_chart(data, tmp_path, capsys):
    resa.main(["errors", "--quick", "--widths", "64", "32", "128", "--k", "4", "--seq-len", "64", "--workers", "1",
               "--data", data, "--held", data, "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert re.search(r"^ +F 32 +F 64 +F 128$", text, re.M) and (tmp_path / "run/table.txt").read_text() in text
    for label in ("FVU of e_nl", "R2 of e from x, mean over dimensions", "R2 of |e|^2 from |x| alone",
                  "curve: linear",
                  "R2 of e_nl from the SAE of resid of block 0", "R2 of e_nl from the SAE of mlp of block 1",
                  "gradient pursuit: FVU of e_nl", "CE with x_hat + e_nl", "KL with x_hat + e_lin",
                  "FVU of an SAE trained on e_nl", "R2 of |e| from the smallest SAE's"):
        assert text.count(f"\n{label}  ") == 1, label
    assert len(re.findall(r"^F (32|64|128) +#*[=|#]*", text, re.M)) == 3 and "ridge 1e-6" in text
    study, = json.loads((tmp_path / "run/numbers.json").read_text())
    found = study["widths"]["64"]
    settings = train.prepare("sae", ["--data", data, "--seq-len", "64"])
    tiny = M.load_model(settings.source)
    ids = train.load_chunks(settings, M.load_tokenizer(settings.source), tiny)
    x = resa.activations(tiny, ids, 1).flatten(0, 1)
    assert study["n_fit"] == len(ids) // 2 * 64 and study["n_fit"] + study["n_test"] == len(x)
    sae = S.load_sae(tmp_path / "run/resid-1-64-0").requires_grad_(False)
    line, m = S.decompose_error(x, sae(x), study["n_fit"])
    assert found["FVU of e"] == pytest.approx(m["fvu"], rel=1e-4) and found["L0"] == 4
    assert found["FVU of e_nl"] == pytest.approx(m["fvu_nl"], rel=1e-4)
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
    assert sum(found[f"curve: {part}"] for part in ("absent", "linear", "nonlinear")) > 0


def test_the_command_on_ones_own_model_and_sae_leaves_sinks_out(data, tmp_path, capsys):
    """One SAE of the site, one of another that predicts; random weights, so position 0 and large norms are sinks."""
    for site in ("resid", "mlp"):
        sae = S.build("relu", 128, 32)
        sae.meta = {"layer": 1, "site": site}
        S.save_sae(sae, tmp_path / site)
    flags = ["errors", "--source", RANDOM, "--data", data, "--seq-len", "32", "--steps", "2", "--k", "4"]
    resa.main([*flags, "--sae", str(tmp_path / "mlp"), str(tmp_path / "resid"), "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    study, = json.loads((tmp_path / "run/numbers.json").read_text())
    assert abs(study["left_out"] - 1 / 32) < 1e-9 and "3.1% were left out as sinks" in text
    assert list(study["widths"]) == ["32"] and "R2 of e_nl from the SAE of mlp of block 1" in text
    assert "curve: absent" not in text and "the smallest SAE's" not in text
    with pytest.raises(ValueError, match="none of them belongs to resid of block 1"):
        resa.main([*flags, "--sae", str(tmp_path / "mlp"), "--out", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="two of 32 latents"):
        resa.main([*flags, "--sae", *[str(tmp_path / "resid")] * 2, "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("flags, message", [
    ("--quick --steps 3", "--steps has no effect with --quick"),
    ("--sae x --seeds 2", "--seeds has no effect with --sae"),
    ("--steps 0", "--steps must be at least 1"), ("--batch 0", "--batch must be"), ("--lr 0", "--lr must be above 0"),
    ("--widthss 3", "did you mean --widths"), ("--widths 64 8", "--k 16 is more than --widths 8"),
])
def test_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resa.main(["errors", "--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run").exists()
