"""
Tests of sae.py: codes, gradients, training step, optimiser, metrics.  Files: test_sae_files.py.

    python -m pytest tests/test_sae.py

Where sparsify and schedulefree are installed, the last test compares training with them.
"""
import copy
import json
import math
import warnings
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

import sae as S
from tests.conftest import Watch

D, F, K = 6, 12, 3


def make(seed=0, dtype=torch.float32, n_latents=F, d_in=D, **hyper):
    """A small SAE whose biases are not zero and whose latents are not all alike."""
    model = S.build("topk", d_in, n_latents, **{"k": K, "seed": seed, **hyper}).to(dtype)
    rng = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        model.b_enc.copy_(0.3 * torch.randn(n_latents, generator=rng))
        model.b_dec.copy_(torch.randn(d_in, generator=rng))
    return model


def data(n=40, d=D, seed=0, dtype=torch.float32):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def tensors(model):
    """Every tensor by name; what only training reads is not in state_dict()."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- codes ---------------------------------------------------------------------------------------


def test_topk_keeps_the_k_largest_positive_values():
    model, x = make(), data()
    acts, z = model.preacts(x).relu(), model.encode(x)
    assert torch.equal((z != 0).sum(1), (acts > 0).sum(1).clamp(max=K))
    assert (z >= 0).all() and torch.equal(z[z != 0], acts[z != 0])
    assert (torch.where(z > 0, z, math.inf).amin(1) >= torch.where(z > 0, 0.0, acts).amax(1)).all()


def test_ties_and_few_positives():
    pre = torch.tensor([[1.0, 1, 1, 1], [2, -1, -2, -3], [-1, -1, -1, -1]])
    model = S.build("topk", 4, 4, k=2)
    model.W_enc.data = torch.eye(4)  # so that the input is pre
    assert (model.encode(pre) != 0).sum(1).tolist() == [2, 1, 0]
    # Ties add nothing, and zeros are chosen too
    assert len(model.codes(model.batch(pre)).value) == 2 * 3


def test_k_equal_to_f_is_a_relu_sae():
    model, x = make(k=F), data()
    z = ((x - model.b_dec) @ model.W_enc.T + model.b_enc).relu()
    assert torch.allclose(model.encode(x), z, atol=1e-6)
    assert torch.allclose(model(x), z @ model.W_dec + model.b_dec, atol=1e-6)


def test_codes_depend_on_their_own_row_and_not_on_the_mode():
    model, x = make(), data()
    z = model.encode(x)
    assert torch.allclose(model.encode(x[7:8]), z[7:8], atol=1e-6)
    assert torch.equal(model.eval().encode(x), z)
    assert torch.equal(model.loss(x)[1]["fired"], (z != 0).any(0))


def test_codes_are_the_dense_matrix_they_stand_for():
    rng = torch.Generator().manual_seed(0)
    # Rows without an entry, no entries, no rows
    for n, f, m in ((5, 7, 11), (5, 7, 0), (0, 7, 0), (3, 1, 2)):
        place = torch.randperm(n * f, generator=rng)[:m].sort().values
        z = S.Codes(torch.randn(m, generator=rng, dtype=torch.float64), place, (n, f))
        z.value[::3] = 0      # chosen, and not active
        full, matrix = S.dense(z), torch.randn(f, 4, generator=rng, dtype=torch.float64)
        assert full.shape == (n, f) and torch.equal(full.flatten()[place], z.value)
        assert full.count_nonzero() <= m
        assert torch.allclose(z.times(matrix), full @ matrix)
        assert torch.equal(S.dense(z.transpose()), full.T)
        assert torch.equal(S.counts(z), (full != 0).sum(0).double())


@pytest.mark.parametrize("shape, n",
                         [((2048,), 8), ((2051,), 8), ((2051,), 300), ((40,), 40), ((0,), 0)])
def test_largest_equals_topk(shape, n):
    for score in (torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu(),
                  torch.zeros(shape),
                  # Many ties, nothing but ties, all at the end
                  torch.arange(math.prod(shape)).float()):
        place = S.largest(score, n)
        assert len(place.unique()) == n
        assert torch.equal(score[place].sort().values, score.topk(n).values.sort().values)
    if 0 < n < 40:
        score[5] = math.nan      # of weights that diverged; must not be hidden by what is chosen
        assert score[S.largest(score, n)].isnan().sum() == 1


@pytest.mark.parametrize("n_latents, k", [(4096, 4), (4096, 13), (6144, 3), (8192, 1), (65536, 32)])
def test_grouped_topk_equals_topk(n_latents, k, monkeypatch):
    """Where latents are grouped: values as topk's, exactly k latents even on ties, NaN seen."""
    grouped = Mock(wraps=S.grouped_topk)
    monkeypatch.setattr(S, "grouped_topk", grouped)
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(7, n_latents, generator=rng)
    one_group = normal.clone()
    one_group[:, 5::n_latents // 64][:, :k] += 100      # the largest are of few groups
    for score in (normal, one_group, normal.relu().round(), torch.zeros(7, n_latents),
                  torch.arange(n_latents).float().repeat(7, 1),
                  normal.masked_fill(normal < 0, -math.inf)):
        index = S.largest_per_token(score, k).view(7, k)
        latent = index - torch.arange(7)[:, None] * n_latents
        assert (latent.diff() > 0).all() and 0 <= latent.min() and latent.max() < n_latents
        assert torch.equal(score.gather(1, latent).sort().values, score.topk(k).values.flip(1))
    normal[3, 77] = math.nan      # of weights that diverged; must not be hidden by what is chosen
    assert normal.flatten()[S.largest_per_token(normal, k)].isnan().sum() == 1
    assert S.largest_per_token(normal[:0], k).shape == (0,)
    assert grouped.call_count == 8


def test_codes_do_not_depend_on_whether_latents_are_grouped(monkeypatch):
    model, x = make(n_latents=4096, k=4), data()
    z, total = model.encode(x), model.loss(x)[0]
    monkeypatch.setattr(S, "grouped_topk", lambda score, k, size: score.topk(k).indices)
    assert torch.equal(model.encode(x), z) and torch.equal(model.loss(x)[0], total)


def test_any_leading_shape():
    model, x = make(), data(24)
    assert torch.allclose(model(x.reshape(2, 3, 4, D)).reshape(24, D), model(x), atol=1e-6)
    assert model(x[0]).shape == (D,) and model.encode(x[0]).shape == (F,)
    assert torch.allclose(model.loss(x.reshape(2, 12, D))[0], model.loss(x)[0], rtol=1e-5)
    for call in (model, model.encode, model.loss, lambda x: S.metrics(model, x)):
        with pytest.raises(ValueError, match="width 6.*have 12"):
            call(torch.zeros(4, 12))


def test_dtypes_are_explicit_and_the_input_is_left_alone():
    for weights in (torch.float32, torch.float64):
        for given in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            model, x = make(dtype=weights), data(dtype=given)
            before = x.clone()
            assert model.encode(x).dtype == weights and model(x).dtype == given
            total, parts = model.loss(x)
            assert total.dtype == parts["fvu"].dtype == weights
            assert torch.equal(x, before)


def test_inputs_in_half_precision_are_read_in_the_precision_of_the_weights():
    model, x = make(), data(dtype=torch.bfloat16)
    assert torch.equal(model.loss(x)[0], model.loss(x.float())[0])
    assert torch.equal(model(x), model(x.float()).bfloat16())
    start, twin = make(), make()
    S.init_b_dec(start, x)
    S.init_b_dec(twin, x.float())
    assert same(start, twin)


def test_weights_below_fp32_are_refused():
    for dtype in (torch.bfloat16, torch.float16):
        model = make().to(dtype)
        for call in (model, model.encode, model.loss, lambda x: S.init_b_dec(model, x)):
            with pytest.raises(ValueError,
                               match=f"computes in fp32 or fp64, its weights are {dtype}"):
                call(data())


def test_init():
    a, b, c = (S.build("topk", D, F, k=K, seed=s) for s in (3, 3, 4))
    assert same(a, b) and not same(a, c)
    assert torch.allclose(a.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert torch.allclose(a.W_enc / a.W_enc.norm(dim=1, keepdim=True), a.W_dec, atol=1e-6)
    assert a.W_enc.abs().max() <= D**-0.5 and not a.b_enc.any() and not a.b_dec.any()
    x = data().reshape(4, 10, D)
    S.init_b_dec(a, x)
    assert torch.allclose(a.b_dec, x.mean((0, 1)), atol=1e-6)


def test_build_defaults_and_refusals():
    model = S.build("topk", 64, 128)
    assert model.hyper == dict(k=32, aux_coef=0.0, k_aux=32, normalize="none", dead_after=10**7,
                               seed=0)
    assert S.VARIANTS["topk"].defaults == {**model.hyper, "k_aux": None}
    for text, args, hyper in [
        ("no variant 'top_k', only relu, gated, .*itda", ("top_k", D, F), {}),
        ("topk: no setting 'aux_coeff', only normalize, .*aux_coef", ("topk", D, F),
         {"aux_coeff": 1.0}),
        ("topk: k=13 is above n_latents=12", ("topk", D, F), {"k": 13}),
        ("topk: 'k' is below 1: 0", ("topk", D, F), {"k": 0}),
        ("topk: k=None is no number", ("topk", D, F), {"k": None}),
        ("topk: 'k' should be a whole number, it is 3.0", ("topk", D, F), {"k": 3.0}),
        ("topk: k_aux=13 is above n_latents=12", ("topk", D, F), {"k": 3, "k_aux": 13}),
        ("'aux_coef' should be finite", ("topk", D, F), {"k": 3, "aux_coef": math.nan}),
        ("'aux_coef' should be finite", ("topk", D, F), {"k": 3, "aux_coef": math.inf}),
        ("'aux_coef' is below 0: -1", ("topk", D, F), {"k": 3, "aux_coef": -1}),
        ("'k' should be a whole number, it is True", ("topk", D, F), {"k": True}),
        ("'rows' = 'long' is not supported, only 'unit', 'free'", ("relu", D, F), {"rows": "long"}),
        ("'seed' is of more than 64 bits", ("topk", D, F), {"seed": 2**63}),
        ("groups=13 is above n_latents=12", ("gba", D, F), {"k": 3, "groups": 13}),
        ("levels are not above 0", ("matryoshka", D, F), {"k": 3, "levels": [1, 0]}),
        ("'levels' is below 1", ("matryoshka", D, F), {"k": 3, "levels": []}),
        ("d_in is below 1: 0", ("topk", 0, F), {}),
        ("n_latents should be a whole number, it is 2.5", ("topk", D, 2.5), {}),
    ]:
        with pytest.raises(ValueError, match=text):
            S.build(*args, **hyper)


def test_every_setting_has_a_row_in_the_table_and_every_default_passes_it():
    named = {name for cls in S.VARIANTS.values() for name in cls.defaults}
    assert named == set(S.SETTINGS)
    for variant, cls in S.VARIANTS.items():
        hyper = S.resolve_hyper(variant, 64, 128, {})
        assert list(hyper) == list(cls.defaults)
        assert hyper | {"k_aux": None} == cls.defaults | {"k_aux": None}


# ---- loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_equals_its_plain_form_in_loss_codes_and_every_gradient(dtype):
    model, x = make(dtype=dtype), data(dtype=dtype)
    twin, tolerance = copy.deepcopy(model), {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    total, parts = model.loss(x)
    fvu, x_hat, z = S.plain_topk(twin, x)
    assert torch.allclose(total, fvu, rtol=tolerance) and torch.equal(total.detach(), parts["fvu"])
    assert torch.allclose(model.encode(x), z, atol=tolerance)
    assert torch.allclose(model(x), x_hat, atol=tolerance)
    total.backward()
    fvu.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=tolerance) and p.grad.any(), name


def naive_loss(p, x, k, k_aux, aux_coef, dead):
    """The whole loss in loops over tokens and latents, as one would write it on paper."""
    everyone = range(len(p["W_enc"]))

    def code(row, limit, allowed):
        acts = [torch.relu(p["W_enc"][i] @ (row - p["b_dec"]) + p["b_enc"][i]) for i in everyone]
        order = sorted(allowed, key=lambda i: -acts[i].item())[:limit]
        return sum((acts[i] * p["W_dec"][i] for i in order), torch.zeros_like(row))

    def share(target, guess):
        mean = sum(target) / len(target)
        return (sum(((t - g) ** 2).sum() for t, g in zip(target, guess))
                / sum(((t - mean) ** 2).sum() for t in target))

    x_hat = [code(row, k, everyone) + p["b_dec"] for row in x]
    total = fvu = share(x, x_hat)
    if dead and aux_coef:
        e = [(row - guess).detach() for row, guess in zip(x, x_hat)]
        aux = share(e, [code(row, k_aux, dead) for row in x])
        total = total + aux_coef * min(len(dead) / k_aux, 1) * aux
    return total, fvu


@pytest.mark.parametrize("dead, k_aux",
                         [([], 3), ([1], 3), ([0, 2, 5, 7, 9], 3), (list(range(8)), F)])
def test_loss_and_gradients_equal_the_naive_ones(dead, k_aux):
    model = make(dtype=torch.float64, aux_coef=1 / 4, k_aux=k_aux, dead_after=50)
    model.tokens_since_fired[dead] = 51
    x = data(10, dtype=torch.float64)
    total, parts = model.loss(x)
    total.backward()
    p = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    want, fvu = naive_loss(p, x, K, k_aux, 1 / 4, dead)
    want.backward()
    assert torch.allclose(total, want, rtol=1e-12) and torch.allclose(parts["fvu"], fvu, rtol=1e-12)
    for name, param in model.named_parameters():
        assert torch.allclose(param.grad, p[name].grad, atol=1e-12), name


def test_parts_are_detached_and_counted():
    model, x = make(aux_coef=0.1), data()
    total, parts = model.loss(x)
    assert sorted(parts) == ["aux", "fired", "fvu", "l0"] and total.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    z = model.encode(x)
    assert torch.allclose(parts["l0"], (z != 0).sum() / len(x)) and parts["fired"].shape == (F,)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        model.loss(x[:1])


def test_latents_that_do_not_fire_get_no_gradient():
    model = make()
    with torch.no_grad():
        model.b_enc[[2, 8]] = -100.0
        # Few positives: top-k must pick zeros on some rows, and leave them be
        model.b_enc[3:] -= 2.0
    x = data(4)
    total, parts = model.loss(x)
    total.backward()
    silent = ~parts["fired"]
    assert silent[2] and silent[8] and (model.encode(x) != 0).sum(1).min() < K
    for grad in (model.W_enc.grad, model.b_enc.grad, model.W_dec.grad):
        assert not grad[silent].any() and grad[~silent].any()


def aux_setup(**kw):
    model = make(dtype=torch.float64, aux_coef=1.0, dead_after=50, **kw)
    model.tokens_since_fired[[1, 4]] = 51
    return model, data(20, dtype=torch.float64)


def aux_of(model, x, e=None):
    """The term itself, before its weight; e: an error to explain in place of the true one."""
    b = model.batch(x, train=True)
    model.batch_loss(b)
    b.e = b.e if e is None else e
    return model.aux_loss(b)["aux"][1]


def test_aux_reaches_the_encoder_of_dead_latents_only():
    model, x = aux_setup()
    aux_of(model, x).backward()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[1, 4]] = True
    for grad in (model.W_enc.grad, model.b_enc.grad, model.W_dec.grad):
        assert grad[dead].any() and not grad[~dead].any()


def test_aux_has_no_gradient_through_the_residual_or_the_decoder_bias():
    model, x = aux_setup()
    b = model.batch(x, train=True)
    total, _ = model.batch_loss(b)
    # Cuts the way through the encoder
    b.cache["aux"] = b.cache["aux"]._replace(value=b.cache["aux"].value.detach())
    aux = model.aux_loss(b)["aux"][1]
    assert torch.autograd.grad(aux, [model.b_dec], allow_unused=True)[0] is None
    fvu_only = make(dtype=torch.float64)
    with_aux = torch.autograd.grad(total, [model.W_dec])[0]
    without = torch.autograd.grad(fvu_only.loss(x)[0], [fvu_only.W_dec])[0]
    alive = [i for i in range(F) if i not in (1, 4)]
    # Living rows feel the FVU alone
    assert torch.allclose(with_aux[alive], without[alive], atol=1e-14)


def test_aux_values():
    model, x = aux_setup(k_aux=4)
    e = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = model.preacts(x).detach().relu() * model.dead
    assert z.any() and not z[:, ~model.dead].any()
    assert aux_of(model, x, z @ model.W_dec.detach()) < 1e-25      # the dead explain e perfectly
    # Nothing left to explain, and no NaN
    assert aux_of(model, x, torch.zeros_like(e)) == 0
    with torch.no_grad():
        model.b_enc[model.dead] = -100.0                           # two dead of k_aux 4, silent
    want = 2 / 4 * e.pow(2).sum() / (e - e.mean(0)).pow(2).sum()
    assert torch.allclose(aux_of(model, x, e), want)
    model.tokens_since_fired.zero_()
    assert aux_of(model, x, e) == 0                                # nobody dead
    assert "aux" not in make(aux_coef=0.0).loss(data())[1]


def test_loss_does_not_depend_on_the_scale_of_x():
    model, x = aux_setup()
    before = model.loss(x)
    with torch.no_grad():
        model.b_enc.mul_(7)
        model.b_dec.mul_(7)
    after = model.loss(7 * x)
    assert torch.allclose(before[0], after[0]) and torch.allclose(before[1]["aux"], after[1]["aux"])


# ---- training step -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["signum", "adam"])
def test_step_projects_the_gradient_and_keeps_unit_rows(name):
    model, x = make(), data()
    opt = S.make_optimizer(model, name, lr=0.05)
    for _ in range(4):
        raw = copy.deepcopy(model)
        raw.zero_grad()
        raw.loss(x)[0].backward()
        before = model.W_dec.detach().clone()
        S.train_step(model, opt, [x])
        along = (raw.W_dec.grad * before).sum(1, keepdim=True)
        assert along.abs().max() > 1e-4  # there was something to remove
        assert torch.allclose(model.W_dec.grad, raw.W_dec.grad - along * before, atol=1e-6)
        assert (model.W_dec.grad * before).sum(1).abs().max() < 1e-6
        assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
        assert not torch.equal(model.W_dec, before)


def test_micro_batches_weigh_the_same():
    model, a, b = make(), data(10), data(30, seed=1)
    whole = make()
    ((whole.loss(a)[0] + whole.loss(b)[0]) / 2).backward()
    parts = S.train_step(model, S.make_optimizer(model, "adam"), [a, b])
    assert torch.allclose(model.W_enc.grad, whole.W_enc.grad, atol=1e-6)
    pa, pb = whole.loss(a)[1], whole.loss(b)[1]
    assert torch.allclose(parts["fvu"], (pa["fvu"] + pb["fvu"]) / 2)
    assert parts["loss"] == parts["fvu"]
    assert torch.equal(parts["fired"], pa["fired"] | pb["fired"])
    assert torch.allclose(parts["l0"], (pa["l0"] + pb["l0"]) / 2)


def test_dead_counter_counts_tokens():
    """Dead is who has not fired for more than `dead_after` tokens, as sparsify counts, not who has
    reached them."""
    model = make(dead_after=60)
    with torch.no_grad():
        model.b_enc[5] = -100.0
    opt = S.make_optimizer(model, "adam", lr=1e-5)
    for step in (1, 2, 3):
        one, two = data(27).reshape(9, 3, D), data(3, seed=1)
        last = (model.encode(two) != 0).any(0)  # the counters move after each micro-batch
        first_only = (model.encode(one) != 0).flatten(0, 1).any(0) & ~last
        fired = S.train_step(model, opt, [one, two])["fired"]
        assert not fired[5] and torch.equal(fired, first_only | last) and last.any()
        assert first_only.any()
        assert model.tokens_since_fired[5] == 30 * step and not model.tokens_since_fired[last].any()
        assert (model.tokens_since_fired[first_only] == 3).all()
        assert model.dead[5] == (30 * step > 60) and not model.dead[fired].any()
    with torch.no_grad():
        model.b_enc[5] = 100.0
    assert S.train_step(model, opt, [data(10)])["fired"][5] and model.tokens_since_fired[5] == 0


def test_jumprelu_clips_the_gradient_of_its_penalty():
    model, x = S.build("jumprelu", D, F, k=1, bandwidth=1.0, warmup=0.0), data()
    model.loss(x)[0].backward()

    def norm():
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm() > 2
    S.train_step(model, S.make_optimizer(model, "adam"), [x])
    assert torch.allclose(norm(), torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize("name", ["signum", "adam"])
def test_a_step_reads_nothing_back_from_the_device(name):
    model = make().to("meta")      # there, any read of a value is an error
    # torch has no fused Adam for it; the unfused one stands in
    opt = torch.optim.Adam(model.parameters())
    if name == "signum":
        opt = S.make_optimizer(model, name)
    for _ in range(2):
        parts = S.train_step(model, opt, [torch.empty(5, D, device="meta")])
    assert parts["fired"].shape == (F,) and parts["loss"].is_meta


@pytest.mark.parametrize("aux_coef, waits", [(0.0, []), (1 / 32, ["nonzero"])])
def test_a_step_of_topk_waits_for_nothing_but_who_is_dead(aux_coef, waits, monkeypatch):
    """On a CPU also whether x is finite is looked at, of each micro-batch.  AuxK: once a step, however
    many micro-batches there are and however pre is cut up."""
    monkeypatch.setattr(S, "CHUNK", 10 * F)
    model, x = make(aux_coef=aux_coef, dead_after=30), data()
    opt = S.make_optimizer(model, "signum")
    for _ in range(3):
        with Watch() as watch:
            S.train_step(model, opt, [x[::2], x[1::2]])
        assert watch.syncs == [*waits, "_local_scalar_dense", "_local_scalar_dense"]
    assert aux_coef == 0 or model.dead.any()


def published_step(**hyper):
    """A step at the published size, on "meta" -> what it ran on (N,F), on (F,D), parts of pre."""
    n, d, f = 16384, 1536, 65536
    with torch.device("meta"):
        model = S.TopK(d, f, S.resolve_hyper("topk", d, f, {"k": 32, **hyper}))
        x = torch.empty(n, d)
    opt = S.make_optimizer(model, "signum")
    S.train_step(model, opt, [x])
    with Watch() as watch:
        S.train_step(model, opt, [x])
    assert not watch.syncs
    parts = n * f // S.CHUNK      # pre is made in parts
    large = [name for name, size in watch.ops if size >= min(S.CHUNK, f * d)]
    return large[:2 * parts], large[2 * parts:], parts


def test_a_published_step_passes_over_pre_twice_and_over_the_weights_no_oftener_than_it_must():
    on_pre, on_weights, parts = published_step()
    assert on_pre == ["addmm", "amax"] * parts      # the product, the largest of each group
    assert sorted(on_weights) == sorted([
        # the gradients of both matrices are sums of rows of x and e
        "bmm", "addcmul_",                        # project_grad_
        # Signum, both matrices at once
        "_foreach_sign", "_foreach_lerp_", "_foreach_add_", "_foreach_add_",
        "linalg_vector_norm", "div_"])            # constrain_


@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_on_inside_a_step_and_afterwards_what_it_was(before, monkeypatch):
    seen, model, x = [], make(), data()
    preacts, backward = model.preacts, S.Selected.backward

    def look(function):
        def looked(*args):
            seen.append(torch.get_float32_matmul_precision())
            return function(*args)
        return looked
    monkeypatch.setattr(model, "preacts", look(preacts))
    monkeypatch.setattr(S.Selected, "backward", staticmethod(look(backward)))
    monkeypatch.setattr(model, "project_grad_", look(model.project_grad_))
    torch.set_float32_matmul_precision(before)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            S.train_step(model, S.make_optimizer(model, "adam"), [x], tf32=True)
            S.train_step(model, S.make_optimizer(model, "adam"), [x])
        assert seen == ["high", "high", before, before, before, before]
        with pytest.raises(ValueError, match="width 6"):
            S.train_step(model, S.make_optimizer(model, "adam"), [data(d=5)], tf32=True)
        monkeypatch.setattr(model, "extra", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            S.train_step(model, S.make_optimizer(model, "adam"), [x], tf32=True)
        assert torch.get_float32_matmul_precision() == before
        model.encode(x)
        assert seen[-1] == before
    finally:
        torch.set_float32_matmul_precision("highest")


def as_tf32(t):
    """fp32 -> its nearest number with 10 bits of mantissa, as a GPU reads it under TF32."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)


def test_a_step_under_tf32_is_the_step_in_fp32_within_1e_3():
    """TF32 as a GPU has it, put into the one product of a step: inputs rounded, sums in fp32.
    Where the k-th and the next latent are nearly equal either may be taken; all else is close."""
    plain, rounded = (make(n_latents=512, d_in=64, k=8) for _ in range(2))
    W = as_tf32(rounded.W_enc.detach())
    rounded.preacts = lambda x: as_tf32(x - rounded.b_dec) @ W.T + rounded.b_enc
    x = data(256, 64)
    index = [model.codes(model.batch(x)).flat_index.view(256, 8) for model in (plain, rounded)]
    alike = (index[0] == index[1]).all(1)      # (N,): tokens with the same latents
    assert 0.9 < alike.float().mean() < 1
    losses = [model.loss(x)[0] for model in (plain, rounded)]
    assert 0 < abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    for model in (plain, rounded):
        S.train_step(model, torch.optim.SGD(model.parameters(), 0.0), [x[alike]])
    for p, q in zip(plain.parameters(), rounded.parameters()):
        assert 0 < (p.grad - q.grad).norm() < 1e-3 * p.grad.norm()


def test_training_finds_a_planted_dictionary():
    rng = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(16, 12, generator=rng), dim=1)
    z = torch.rand(2048, 16, generator=rng).add(0.5) * (torch.rand(2048, 16, generator=rng) < 0.12)
    x = z @ atoms
    results = {}
    for name, lr in (("signum", 3e-3), ("adam", 1e-2)):
        model = S.build("topk", 12, 32, k=3, aux_coef=1 / 32, dead_after=4096)
        S.init_b_dec(model, x)
        before = S.metrics(model, x)["fvu"]
        opt = S.make_optimizer(model, name, lr=lr)
        for step in range(300):
            S.train_step(model, opt, list(x[torch.randint(2048, (256,), generator=rng)].chunk(2)))
        with opt.averaged() if name == "signum" else nullcontext():
            results[name] = S.metrics(model, x)["fvu"], before
    assert all(after < 0.2 and after < before / 3 for after, before in results.values()), results


# ---- optimisers ----------------------------------------------------------------------------------


def test_the_fused_adam_is_adam():
    ours, plain, x = make(dtype=torch.float64), make(dtype=torch.float64), data(dtype=torch.float64)
    fused = S.make_optimizer(ours, "adam", 0.01)
    unfused = torch.optim.Adam(plain.parameters(), 0.01, plain.betas)
    assert fused.defaults["fused"]
    for _ in range(5):
        S.train_step(ours, fused, [x])
        S.train_step(plain, unfused, [x])
    assert not same(ours, make(dtype=torch.float64))
    assert all(torch.allclose(p, q, atol=1e-12)
               for p, q in zip(ours.parameters(), plain.parameters()))


def test_signum_equals_a_reference_that_keeps_x_y_z():
    model = make(dtype=torch.float64)
    param, goal = model.W_enc, torch.arange(F * D, dtype=torch.float64).reshape(F, D) / 100
    opt = S.Signum(model, lr=0.02, momentum=0.9)
    y = param.detach().numpy().copy()
    zs = [y]
    for _ in range(25):
        opt.zero_grad()
        sum(((p - goal[:1, :1]) ** 4).sum() for p in model.parameters()
            if p is not param).backward()
        ((param - goal) ** 4).sum().backward()
        opt.step()
        zs.append(zs[-1] - 0.02 * ((y > goal.numpy()) * 2.0 - 1.0))
        x = sum(zs[1:]) / len(zs[1:])
        y = 0.1 * zs[-1] + 0.9 * x
        assert abs(param.detach().numpy() - y).max() < 1e-12
        with opt.averaged():
            assert abs(param.detach().numpy() - x).max() < 1e-12


def test_default_lr():
    assert S.default_lr("signum", 2**14) == 5e-3 and S.default_lr("adam", 2**14) == 2e-4
    assert S.default_lr("signum", 65_536) == 2.5e-3  # the value the published run used
    model = make()
    assert S.make_optimizer(model, "signum").param_groups[0]["lr"] == S.default_lr("signum", F)
    assert isinstance(S.make_optimizer(model, "adam", lr=0.5), torch.optim.Adam)
    with pytest.raises(ValueError, match="no optimizer 'signsgd', only signum, adam"):
        S.make_optimizer(model, "signsgd")
    with pytest.raises(ValueError, match="lr=0"):
        S.make_optimizer(model, "adam", lr=0)


def test_averaged_weights_have_unit_rows_and_training_weights_come_back_to_the_bit():
    model = make()
    opt = S.make_optimizer(model, "signum", lr=0.03)
    with opt.averaged():  # before the first step there is nothing to average
        assert same(model, make())
    for step in range(7):
        S.train_step(model, opt, [data(seed=step)])
    before, mean = copy.deepcopy(model), {}
    with pytest.raises(KeyError), opt.averaged():
        mean = {n: p.detach().clone() for n, p in model.named_parameters()}
        raise KeyError("work inside may fail")
    assert same(model, before)
    assert torch.allclose(mean["W_dec"].norm(dim=1), torch.ones(F), atol=1e-6)
    for name in ("W_enc", "b_enc", "b_dec"):
        z, y = opt.state[getattr(model, name)]["z"], getattr(model, name)
        assert torch.allclose(0.05 * z + 0.95 * mean[name], y, atol=1e-6)
        assert not torch.equal(mean[name], y)
    model.unit_rows = False      # as the released code: the mean itself, with atoms of any norm
    with opt.averaged():
        z, y = opt.state[model.W_dec]["z"], before.W_dec
        assert torch.allclose(0.05 * z + 0.95 * model.W_dec, y, atol=1e-6)
        assert (model.W_dec.norm(dim=1) - 1).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["signum", "adam"])
def test_resume_gives_the_same_bits(name):
    def run(model, opt, steps):
        for step in steps:
            S.train_step(model, opt, [data(seed=step), data(seed=step + 50)])

    straight = make(aux_coef=0.1, dead_after=100)
    opt = S.make_optimizer(straight, name, lr=0.02)
    run(straight, opt, range(4))
    saved = {n: v.detach().clone() for n, v in tensors(straight).items()}
    saved_opt = opt.state_dict()
    saved_opt = json.loads(json.dumps(saved_opt["param_groups"])), {
        i: {n: v.clone() for n, v in s.items()} for i, s in saved_opt["state"].items()}
    with opt.averaged() if name == "signum" else nullcontext():  # looking must not disturb the run
        assert math.isfinite(S.metrics(straight, data())["fvu"])
    run(straight, opt, range(4, 9))
    resumed = make(seed=5, aux_coef=0.1, dead_after=100)
    with torch.no_grad():
        for n, v in tensors(resumed).items():
            v.copy_(saved[n])
    opt2 = S.make_optimizer(resumed, name, lr=0.7)
    opt2.load_state_dict({"param_groups": saved_opt[0], "state": saved_opt[1]})
    run(resumed, opt2, range(4, 9))
    assert same(straight, resumed)
    assert opt2.param_groups[0]["lr"] == 0.02


# ---- metrics -------------------------------------------------------------------------------------


def measure(x, x_hat, z=None):
    total = S.Metrics()
    total.update(x, x_hat, torch.ones(*x.shape[:-1], 1) if z is None else z)
    return total.result()


def test_perfect_and_mean_and_zero_predictors():
    x = data(200, dtype=torch.float64)
    perfect = measure(x, x)
    assert perfect["fvu"] == 0 and perfect["cosine"] == pytest.approx(1, abs=1e-12)
    for offset in (0, 300):  # far from the origin the mean is still no achievement
        shifted = x + offset
        mean = measure(shifted, shifted.mean(0).expand_as(x))
        assert mean["fvu"] == pytest.approx(1, abs=1e-9)
    nothing = measure(x, torch.zeros_like(x))
    assert nothing["cosine"] == 0
    assert measure(x, x / 2)["cosine"] == pytest.approx(1)


def test_metrics_equal_their_definitions():
    x, model = data(50, dtype=torch.float64), make(dtype=torch.float64)
    m, x_hat, z = S.metrics(model, x), model(x).detach(), model.encode(x)
    e = x - x_hat
    assert m["fvu"] == pytest.approx(float((e**2).sum() / ((x - x.mean(0)) ** 2).sum()), rel=1e-10)
    assert m["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-10)
    assert m["n_tokens"] == 50 and torch.equal(m["density"], (z > 0).double().mean(0))
    with pytest.raises(ValueError, match="no tokens"):
        S.Metrics().result()


def test_fvu_does_not_change_with_scale_and_shift():
    x, x_hat = data(100, dtype=torch.float64), data(100, seed=1, dtype=torch.float64)
    shift = 5 * torch.arange(D, dtype=torch.float64)
    for scale in (0.1, -3, 40):
        moved = measure(scale * x + shift, scale * x_hat + shift)["fvu"]
        assert moved == pytest.approx(measure(x, x_hat)["fvu"], rel=1e-9)


def test_streaming_equals_one_shot():
    model, x = make(dtype=torch.float64), data(101, dtype=torch.float64)
    whole = S.metrics(model, x, batch=1000)
    for batch in (1, 7, 50, 101):
        parts = S.metrics(model, x.reshape(1, 101, D), batch=batch)
        assert torch.equal(parts.pop("density"), whole["density"])
        for name, value in parts.items():
            assert value == pytest.approx(whole[name], rel=1e-10), (name, batch)


def test_densities_sum_to_l0_and_dead_latents_are_counted():
    model, x = make(), data(300)
    with torch.no_grad():
        model.b_enc[:4] = -100.0
    m = S.metrics(model, x)
    assert float(m["density"].sum()) == pytest.approx(m["l0"]) and m["l0"] <= K
    assert m["dead"] == (m["density"] == 0).double().mean() >= 4 / F
    assert measure(x, x, torch.randn(300, 5))["l0"] == 5  # a negative code is active too


def test_metrics_do_not_see_the_order_or_scale_of_latents():
    model, x = make(dtype=torch.float64), data(60, dtype=torch.float64)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    other = make(dtype=torch.float64)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(other, name).copy_(getattr(model, name)[order])
    a, b = S.metrics(model, x), S.metrics(other, x)
    assert torch.equal(a.pop("density")[order], b.pop("density"))
    assert b == pytest.approx(a, rel=1e-10)
    z, scale = model.encode(x), torch.linspace(0.5, 3, F, dtype=torch.float64)
    x_hat = (z * scale) @ (model.W_dec / scale[:, None]) + model.b_dec
    for name in ("fvu", "cosine", "l0"):
        assert measure(x, x_hat, z * scale)[name] == pytest.approx(a[name], rel=1e-10)


# ---- live: sparsify and schedulefree, where installed --------------------------------------------


def test_ten_training_steps_equal_sparsify():
    sparsify, schedulefree = pytest.importorskip("sparsify"), pytest.importorskip("schedulefree")
    from sparsify.sign_sgd import SignSGD
    torch.manual_seed(0)
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K),
                                  dtype=torch.float32)
    ours = S.build("topk", D, F, k=K, seed=0)
    assert torch.allclose(ours.W_enc, theirs.encoder.weight)
    assert torch.allclose(ours.W_dec, theirs.W_dec)
    ours, theirs = ours.double(), theirs.double()
    pairs = [(ours.W_enc, theirs.encoder.weight), (ours.b_enc, theirs.encoder.bias),
             (ours.W_dec, theirs.W_dec), (ours.b_dec, theirs.b_dec)]
    S.init_b_dec(ours, data(dtype=torch.float64))
    ours.constrain_()
    for mine, other in pairs:
        other.data.copy_(mine.data)
    opt = S.make_optimizer(ours, "signum", lr=0.01)
    other_opt = schedulefree.ScheduleFreeWrapper(SignSGD(theirs.parameters(), lr=0.01),
                                                 momentum=0.95)
    other_opt.train()
    for step in range(10):
        xs = [data(seed=2 * step, dtype=torch.float64),
              data(seed=2 * step + 1, dtype=torch.float64)]
        S.train_step(ours, opt, xs)
        theirs.set_decoder_norm_to_unit_norm()
        for x in xs:
            (theirs(x).fvu / 2).backward()
        theirs.remove_gradient_parallel_to_decoder_directions()
        other_opt.step()
        other_opt.zero_grad()
    ours.unit_rows = False               # the mean itself: atoms of any norm
    with opt.averaged():
        theirs.set_decoder_norm_to_unit_norm()
        other_opt.eval()
        for mine, other in pairs:
            assert torch.allclose(mine, other, atol=1e-9)
