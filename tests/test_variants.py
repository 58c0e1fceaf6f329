"""
Tests of the variants in sae.py: all of them against a plain dense twin, then the properties of each
method.

    python -m pytest tests/test_variants.py

`plain` is the twin: dense codes, dense decoding, every gradient by autograd, written as one would
on paper.
"""
import copy
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import sae as S
from tests.conftest import Watch

D, F, K, N = 6, 12, 3, 18
DEAD = [1, 4]                          # of the latents of `make`
FLAVOURS = [      # every variant, in every setting that computes something else
    ("relu", {}), ("relu", {"rows": "free"}), ("gated", {}), ("jumprelu", {}),
    ("topk", {}), ("batchtopk", {}), ("matryoshka", {}), ("matryoshka", {"weighting": "mean"}),
    ("mutual_choice", {}), ("feature_choice", {}), ("abstopk", {}), ("gsae", {}), ("topafa", {}),
    ("vsae", {}), ("vsae", {"sample": "unit"}), ("gba", {}), ("itda", {})]
AUX = [{"aux_coef": 0.25, "k_aux": 3}, {"aux_coef": 0.25, "k_aux": 2}]
WITH_AUX = [(variant, {**hyper, **aux}) for variant, hyper in FLAVOURS for aux in AUX
            if "aux_coef" in S.VARIANTS[variant].defaults]
POOLED = ("batchtopk", "mutual_choice", "matryoshka")      # the k N largest of a micro-batch


def each(cases):
    return pytest.mark.parametrize("variant, hyper", cases,
                                   ids=[" ".join([v, *map(str, h.values())]) for v, h in cases])


every, trained, with_aux = each(FLAVOURS), each(FLAVOURS[:-1]), each(WITH_AUX)
pooled = pytest.mark.parametrize("variant", POOLED)
shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(n=N, d=D, seed=0):
    return random(n, d, seed=seed) * 2 + 1


def fit(variant, **hyper):
    """Settings that suit a small SAE, where the variant has them; then `hyper`."""
    small = {"k": K, "groups": 3, "bandwidth": 0.5, "levels": [1, 2, 3]}
    known = S.VARIANTS[variant].defaults
    return {name: value for name, value in small.items() if name in known} | hyper


def make(variant, d=D, f=F, seed=0, **hyper):
    """A small SAE in fp64 no tensor of which is at its default: biases, thresholds, scales,
    counters, atoms."""
    model = S.build(variant, d, f, seed=seed, **fit(variant, **hyper))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for i, name in enumerate(("b_enc", "b_dec", "W_dec", "r_mag", "b_mag", None,
                                  "scale_out")):
            if name in tensors and (variant, name) != ("topafa", "b_enc"):
                tensors[name].add_(0.3 * random(*tensors[name].shape, seed=100 + i))
        if model.unit_rows:
            model.constrain_()
        if variant == "itda":
            model.n_atoms += f
        if "threshold" in tensors:
            model.threshold.copy_(0.2 + 0.1 * random(*model.threshold.shape, seed=98).abs())
        if "input_scale" in tensors:
            model.input_scale.fill_(0.25)
        model.tokens_since_fired[[i for i in DEAD if i < f]] = model.dead_after + 1
    return model.double()


def bare(variant, d=D, **hyper):
    """pre is the input itself: as many latents as dimensions, no biases, nothing rescaled."""
    model = S.build(variant, d, d, **fit(variant, **hyper), normalize="none").double()
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(d))
        model.W_dec.copy_(torch.eye(d))
    return model


def in_training(model, x, **more):
    """The codes as in training, dense (N,F) and as they are."""
    z = model.codes(model.batch(x, train=True, **more))
    return S.dense(z).detach(), z


def chosen(model, x, **more):
    """(N,F) bool: what is chosen in training, whatever its value."""
    z = in_training(model, x, **more)[1]
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask.view(-1)[z.flat_index] = True
    assert int(mask.sum()) == len(z.flat_index)      # nothing twice
    return mask


def gradients(model, x, **more):
    """{name: gradient of the training loss}."""
    model.zero_grad()
    model.loss(x, **more)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(a, b):
    return all(torch.equal(tensors(a)[name], tensors(b)[name])
               for name in tensors(a).keys() | tensors(b).keys())


# ---- the plain twin ------------------------------------------------------------------------------


def largest(score, m):
    """(N,F) -> mask of the m largest of each row."""
    order = score.detach().argsort(1, descending=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :m], True)


def largest_of_all(score, m):
    return largest(score.reshape(1, -1), m).view_as(score)


def as_long_as(size, goal):
    """top-AFA: the mask that brings the length of the kept sizes (N,F) nearest to goal (N,), but
    never keeps all."""
    mask = torch.zeros_like(size, dtype=torch.bool)
    for n, row in enumerate(size):
        order = row.argsort(descending=True)
        best = min(range(1, size.shape[1]), key=lambda j: (row[order[:j]].norm() - goal[n]).abs())
        mask[n, order[:best]] = True
    return mask


def pursuit(atoms, x, k):
    z = torch.zeros(len(x), len(atoms), dtype=x.dtype)
    for row, left in zip(z, x.clone()):
        for _ in range(k):
            i = int((atoms @ left).abs().argmax())
            step = atoms[i] @ left
            row[i] += step
            left -= step * atoms[i]
    return z


def budgets(total, f=F):
    """total among f latents, the first of which take what is left over: [m_i]."""
    return torch.tensor([total // f + (i < total % f) for i in range(f)])


def plain_codes(sae, q, x, pre, g, train):
    act, k = pre.relu(), getattr(sae, "k", 0)
    match sae.variant:
        case "relu":
            return act
        case "gated":
            return (pre > 0) * (q.r_mag.exp() * ((x - q.b_dec) @ q.W_enc.T) + q.b_mag).relu()
        case "jumprelu":
            near = (pre - q.threshold).abs() < sae.bandwidth / 2
            # In theta; the value stays what it is
            slope = (-q.threshold / sae.bandwidth * near).detach()
            return (pre > q.threshold) * pre + slope * (q.threshold - q.threshold.detach())
        case "gba":
            return q.scale_out * ((x - q.b_dec) @ q.W_dec.T) * (pre > 0)
        case "itda":
            return pursuit(q.W_dec, x, k)
        case "topk":
            return act * largest(pre, k)
        case "gsae":
            return act * largest(act * (1 + sae.beta * (g @ q.W_dec.T).abs()) if train else pre, k)
        case "topafa":
            size = (act * q.W_dec.norm(dim=1)).detach()
            return act * as_long_as(size, (x - q.b_dec).norm(dim=1))
        case "vsae":
            if train and sae.sample != "none":
                act = act + torch.randn_like(act)
            return act * largest(act.abs(), k)
        case "abstopk":
            return pre * largest(pre.abs(), k)
        case "feature_choice" if train:
            m = budgets(k * len(x))
            return act * torch.stack([largest(pre[None, :, i], m[i])[0] for i in range(F)], 1)
        case _:
            return act * (largest_of_all(pre, k * len(x)) if train and sae.variant in POOLED
                          else pre > q.threshold)


def plain_recon(sae, q, x, z, error):
    x_hat = z @ q.W_dec + q.b_dec
    if sae.variant != "matryoshka":
        return x_hat, error(x_hat)
    # Of 12 latents in shares 1 : 2 : 3
    levels = [error(z[:, :m] @ q.W_dec[:m] + q.b_dec) for m in (2, 6, 12)]
    weight = {"sum": 1, "mean": 1 / 4}[sae.weighting]
    return x_hat, weight * (sum(levels) + (error(q.b_dec) if sae.weighting == "mean" else 0))


def plain_extra(sae, q, x, pre, z, error, ramp):
    match sae.variant:
        case "relu":
            norm = q.W_dec.norm(dim=1) if sae.rows == "free" else 1
            return sae.l1 * ramp * (z * norm).sum(1).mean()
        case "gated":
            frozen = pre.relu() @ q.W_dec.detach() + q.b_dec.detach()
            return sae.l1 * ramp * pre.relu().sum(1).mean() + error(frozen)
        case "jumprelu":
            near = (pre - q.threshold).detach().abs() < sae.bandwidth / 2
            slope = near / -sae.bandwidth * (q.threshold - q.threshold.detach())
            l0 = ((pre > q.threshold) + slope).sum(1).mean()
            return sae.coef * ramp * (l0 / sae.k - 1) ** 2
        case "topafa":
            return sae.afa * ((z.norm(dim=1) - x.norm(dim=1)) ** 2).mean()
        case "vsae":
            return sae.beta * ramp * (pre.relu() ** 2 / 2).sum(1).mean()
    return 0


def plain_aux(sae, q, pre, e):
    among = torch.zeros_like(pre, dtype=torch.bool)
    among[:, DEAD] = True
    score = (pre.abs() if sae.signed else pre).masked_fill(~among, -math.inf)
    z = (pre if sae.signed else pre.relu()) * (largest(score, min(sae.k_aux, len(DEAD))) & among)
    ratio = ((e - z @ q.W_dec) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    return sae.aux_coef * min(1, len(DEAD) / sae.k_aux) * ratio


def plain(sae, x, g=None, progress=1.0, train=True):
    """-> (training loss, codes, {name: parameter that takes the gradient})."""
    p = {name: t.detach().clone().requires_grad_(t.requires_grad)
         for name, t in sae.named_parameters()}
    q = SimpleNamespace(**dict(sae.named_buffers()), **p)
    if sae.variant in ("gba", "itda"):      # these read with what they write with
        q.W_enc, q.b_enc = q.W_dec, getattr(q, "b_enc", 0)
    match sae.normalize:
        case "scale":
            x = x * q.input_scale
        case "unit":
            x = x / x.norm(dim=1, keepdim=True)
        case "token":
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    pre = (x - q.b_dec) @ q.W_enc.T + q.b_enc
    z = plain_codes(sae, q, x, pre, g, train)
    unit = {"fvu": ((x - x.mean(0)) ** 2).sum(), "token": len(x),
            "entry": x.numel()}[sae.error_unit]

    def error(x_hat):
        return ((x - x_hat) ** 2).sum() / unit

    x_hat, total = plain_recon(sae, q, x, z, error)
    total = total + plain_extra(sae, q, x, pre, z, error,
                                min(1, progress / getattr(sae, "warmup", 1)))
    if getattr(sae, "aux_coef", 0):
        total = total + plain_aux(sae, q, pre, (x - x_hat).detach())
    return total, z.detach(), p


def equals_the_twin(model, x, g, progress):
    torch.manual_seed(3)
    total, parts = model.loss(x, g=g, progress=progress)
    torch.manual_seed(3)
    want, z, p = plain(model, x, g, progress)
    assert abs(float(total.detach() - want.detach())) < 1e-9
    assert torch.equal(parts["fired"], (z != 0).any(0))
    assert torch.allclose(parts["l0"], (z != 0).sum() / N)
    if not total.requires_grad:
        return not want.requires_grad
    total.backward(), want.backward()
    close = []
    for name, param in model.named_parameters():
        grads = [torch.zeros_like(param) if t.grad is None else t.grad for t in (param, p[name])]
        close.append((grads[0] - grads[1]).abs().max() < 1e-9)
    return all(close) and any(p[name].grad is not None and p[name].grad.any() for name in p)


# ---- all variants: losses and gradients ----------------------------------------------------------


@every
def test_loss_and_every_gradient_equal_the_plain_twin(variant, hyper, monkeypatch):
    monkeypatch.setattr(S, "CHUNK", 5 * F)      # four chunks, the last one short
    assert equals_the_twin(make(variant, **hyper, **no_aux(variant)), data(), random(N, D, seed=5),
                           0.05)


def no_aux(variant):
    return {"aux_coef": 0.0} if "aux_coef" in S.VARIANTS[variant].defaults else {}


@with_aux
def test_with_aux_loss_and_every_gradient_equal_the_plain_twin(variant, hyper, monkeypatch):
    monkeypatch.setattr(S, "CHUNK", 5 * F)
    model = make(variant, **hyper)
    assert model.dead.nonzero()[:, 0].tolist() == DEAD
    assert equals_the_twin(model, data(), random(N, D, seed=5), 1.0)


@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk"])
def test_under_every_normalization_the_twin_is_equal(variant, normalize):
    assert equals_the_twin(make(variant, normalize=normalize, aux_coef=0.1), data(), None, 1.0)


@every
def test_codes_at_inference_equal_the_plain_twin(variant, hyper, monkeypatch):
    monkeypatch.setattr(S, "CHUNK", 5 * F)
    model, x = make(variant, **hyper), data()
    want = plain(model, x, train=False)[1]
    if variant == "gsae":
        want = plain(make("topk", **no_aux("topk")), x)[1]
    assert torch.allclose(model.encode(x), want, atol=1e-9)
    assert torch.equal(model.encode(x) != 0, want != 0)
    assert want.any() and not want.all()


@trained
def test_latents_that_are_not_active_get_exactly_zero_gradient(variant, hyper):
    model, silent = make(variant, **hyper, **no_aux(variant)), [2, 7]
    with torch.no_grad():
        # abstopk would take a strongly negative one
        model.W_enc[silent] *= 1 if variant == "gba" else 0
        model.b_enc[silent] = 0 if variant == "abstopk" else -100
    grads = gradients(model, data(), g=random(N, D, seed=5))
    fired = model.loss(data(), g=random(N, D, seed=5))[1]["fired"]
    # Noise alone makes latents fire, which moves their atoms
    if hyper.get("sample") == "unit":
        assert not any(grads[name][silent].any() for name in ("W_enc", "b_enc"))
        return
    assert not fired[silent].any() and fired.any()
    for name in {"W_enc", "b_enc", "W_dec"} & grads.keys():
        assert not grads[name][silent].any() and grads[name].any(), name


@with_aux
def test_the_gradient_of_aux_reaches_the_encoder_of_dead_latents_and_no_other(variant, hyper):
    model, x = make(variant, **hyper), data()
    b = model.batch(x, g=random(N, D, seed=5), train=True)
    model.batch_loss(b)
    model.aux_loss(b)["aux"][1].backward()
    dead = model.dead
    for name in {"W_enc", "b_enc", "W_dec"} - ({"b_enc"} if variant == "topafa" else set()):
        grad = getattr(model, name).grad
        assert grad[dead].any() and not grad[~dead].any(), name


@pytest.mark.parametrize("variant",
                         ["topk", "gsae", "topafa", "abstopk", "batchtopk", "feature_choice"])
def test_pre_is_made_in_chunks_wherever_rows_do_not_meet(variant, monkeypatch):
    monkeypatch.setattr(S, "CHUNK", 5 * F)
    model, sizes = make(variant), []
    monkeypatch.setattr(model, "preacts", lambda x: sizes.append(len(x)) or S.SAE.preacts(model, x))
    model.encode(data())
    assert sizes == [5, 5, 5, 3]
    model.loss(data(), g=random(N, D))
    assert sizes[4:] == ([5, 5, 5, 3] if model.per_token else [N])


# ---- all variants: what goes in and what comes out -----------------------------------------------


@every
def test_at_inference_a_row_does_not_depend_on_the_others(variant, hyper, monkeypatch):
    model, x, other = make(variant, **hyper), data(), data(seed=1) * 5
    other[7] = x[7]
    for chunk in (S.CHUNK, 5 * F):
        monkeypatch.setattr(S, "CHUNK", chunk)
        z, x_hat = model.encode(x), model(x)
        assert torch.equal(model.encode(other)[7], z[7])
        assert not torch.equal(model.encode(other)[8], z[8])
        assert torch.allclose(model.encode(x[7]), z[7])
        assert torch.allclose(model(x[7:8]), x_hat[7:8])
        assert torch.allclose(model.encode(x[shuffled]), z[shuffled])


@every
def test_any_leading_shape(variant, hyper):
    model, x, g = make(variant, **hyper), data(24), random(24, D, seed=5)
    shaped = x.reshape(2, 3, 4, D)
    assert torch.equal(model.encode(shaped), model.encode(x).view(2, 3, 4, F))
    assert torch.equal(model(shaped), model(x).view(2, 3, 4, D))
    # Dense codes times W_dec: another order of summing than the sparse path's, equal to the bit on
    # some processors only.
    assert torch.allclose(model.decode(model.encode(shaped), shaped), model(x).view(2, 3, 4, D),
                          atol=1e-5)
    assert model.encode(x[0]).shape == (F,) and model(x[0]).shape == (D,)
    losses = []
    for shape in ((24,), (2, 3, 4)):
        torch.manual_seed(3)
        losses.append(model.loss(x.view(*shape, D), g=g.view(*shape, D),
                                 position=torch.arange(24).view(shape))[0])
    assert torch.equal(*losses)
    for call in (model, model.encode, model.loss):
        with pytest.raises(ValueError, match="width 6.*have 7"):
            call(torch.zeros(4, 7))


@every
def test_dtypes_are_explicit_and_the_input_is_left_alone(variant, hyper):
    for weights in (torch.float32, torch.float64):
        for given in (torch.float32, torch.bfloat16):
            model, x = make(variant, **hyper).to(weights), data().to(given)
            before = x.clone()
            assert model.encode(x).dtype == weights and model(x).dtype == given
            total, parts = model.loss(x, g=random(N, D).to(given))
            assert total.dtype == parts["fvu"].dtype == weights and total.isfinite()
            assert torch.equal(x, before)


@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
@every
def test_forward_is_decode_of_encode_under_every_normalization(variant, hyper, normalize):
    model, x = make(variant, **hyper, normalize=normalize), data()
    z = model.encode(x)
    assert torch.allclose(model(x), model.decode(z, x), atol=1e-12) and z.any()
    if normalize in ("unit", "token"):
        with pytest.raises(ValueError, match="decode.z, x. needs the activations"):
            model.decode(z)
        # Its length says nothing (token: but for 1e-5)
        assert torch.allclose(model.encode(3 * x), z, atol=1e-3)
        assert torch.allclose(model(3 * x), 3 * model(x), rtol=1e-3, atol=1e-3)
    else:
        assert torch.allclose(model.decode(z), model(x), atol=1e-12)


@every
def test_nan_and_infinite_activations_are_refused_and_nothing_moves(variant, hyper):
    model, x = make(variant, **hyper), data()
    opt, before = S.make_optimizer(model, "adam"), copy.deepcopy(model)
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[3, 2] = value
        for call in (model, model.encode, model.loss, lambda bad: S.train_step(model, opt, [bad]),
                     lambda bad: S.init_b_dec(model, bad), lambda bad: S.metrics(model, bad)):
            with pytest.raises(ValueError, match="NaN or infinite|not finite"):
                call(bad)
    assert same(model, before)


@pytest.mark.parametrize("normalize", ["none", "scale", "unit", "token"])
@every
def test_rows_of_zeros_stay_finite(variant, hyper, normalize):
    """A token of zeros has no direction: it is read as 0, under unit and token it comes back as
    0."""
    model, x = make(variant, **hyper, normalize=normalize), data()
    x[3] = 0
    assert model.encode(x).isfinite().all() and model(x).isfinite().all()
    assert normalize in ("none", "scale") or model(x)[3].abs().max() < 1e-4
    if variant == "itda":
        assert model.loss(x)[0].isfinite()
    else:
        grads = gradients(model, x, g=random(N, D, seed=5))
        assert grads and all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("variant", [v for v, cls in S.VARIANTS.items() if "k" in cls.defaults])
def test_k_above_the_number_of_latents_is_refused(variant):
    with pytest.raises(ValueError, match="k=13 is above n_latents=12"):
        S.build(variant, D, F, **fit(variant, k=13))


@pytest.mark.filterwarnings("ignore:std")
@every
def test_no_tokens_and_one_token(variant, hyper):
    """Inference has nothing to give for no tokens, and no trouble with one.  Training needs two,
    and says so."""
    model, none = make(variant, **hyper), torch.zeros(0, D, dtype=torch.float64)
    assert model.encode(none).shape == (0, F) and model(none.view(2, 0, D)).shape == (2, 0, D)
    with pytest.raises(ValueError, match="no tokens"):
        S.metrics(model, none)
    with pytest.raises(ValueError, match="there are none"):
        S.init_b_dec(model, none)
    assert model.encode(data(1)).shape == (1, F)
    for few in (none, data(1)):
        with pytest.raises(ValueError, match="at least 2 tokens"):
            model.loss(few, g=few)


def test_an_sae_cannot_start_from_zeros():
    model = make("relu")
    with pytest.raises(ValueError, match="all are 0"):
        S.init_b_dec(model, torch.zeros(5, D))
    assert float(model.input_scale) == 0.25


# ---- all variants: training ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["signum", "adam"])
@every
def test_a_step_of_either_optimizer_learns_and_keeps_the_constraints(variant, hyper, name):
    model = S.build(variant, D, F, **fit(variant, **hyper)).double()
    S.init_b_dec(model, data())
    before, opt = copy.deepcopy(model), S.make_optimizer(model, name, lr=0.01)
    if variant != "itda" and model.unit_rows:
        model.constrain_()
    for step in range(3):
        parts = S.train_step(model, opt,
                             [(data(seed=step), random(N, D), None),
                              (data(seed=9), random(N, D), None)])
    assert all(part.isfinite().all() for part in parts.values()) and parts["fired"].any()
    assert not torch.equal(model.W_dec, before.W_dec)
    with opt.averaged() if name == "signum" else torch.no_grad():
        lengths = model.W_dec.norm(dim=1)
        if variant == "itda":
            lengths = lengths[:int(model.n_atoms)]
        assert ((lengths - 1).abs().max() < 1e-6) == (hyper.get("rows") != "free")
        assert variant != "jumprelu" or (model.threshold >= 0).all()
    for fixed in {"topafa": ["b_enc"], "itda": ["b_dec"]}.get(variant, []):
        assert torch.equal(getattr(model, fixed), getattr(before, fixed))


@every
def test_a_step_touches_no_global_random_numbers_but_to_sample(variant, hyper):
    model = make(variant, **hyper)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    S.train_step(model, S.make_optimizer(model, "adam"), [(data(), random(N, D), None)])
    assert torch.equal(torch.get_rng_state(), before) == (hyper.get("sample", "none") == "none")


@pytest.mark.parametrize("name", ["signum", "adam"])
@every
def test_resume_gives_the_same_bits(variant, hyper, name):
    more = {"gba": {"adapt_tokens": 50}, "relu": {"aux_coef": 0.1}}.get(variant, {})

    def run(model, opt, steps):
        for step in steps:
            torch.manual_seed(step)
            xs = [(data(seed=step + more), random(N, D, seed=step), torch.arange(N) + step)
                  for more in (0, 50)]
            S.train_step(model, opt, xs, progress=step / 8)

    def fresh(seed):
        model = S.build(variant, D, F, seed=seed, **fit(variant, **{**more, **hyper})).double()
        return model, S.make_optimizer(model, name, lr=0.02)

    straight, opt = fresh(0)
    run(straight, opt, range(4))
    saved, saved_opt = copy.deepcopy(tensors(straight)), copy.deepcopy(opt.state_dict())
    run(straight, opt, range(4, 8))
    resumed, other = fresh(5)
    with torch.no_grad():
        for key, tensor in tensors(resumed).items():
            tensor.copy_(saved[key])
    other.load_state_dict(saved_opt)
    assert not same(straight, resumed)
    run(resumed, other, range(4, 8))
    assert same(straight, resumed)


@trained
def test_training_on_a_planted_dictionary_lowers_the_fvu(variant, hyper):
    """vSAE's noise has size 1, whatever the activations': it drowns those of length 1, so here they
    are longer."""
    rng = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(16, 12, generator=rng), dim=1)
    size = torch.rand(2048, 16, generator=rng) + 0.5
    x = size * (torch.rand(2048, 16, generator=rng) < 0.12) @ atoms
    x = 10 * x[x.norm(dim=1) > 0]
    settings = {"gba": {"adapt_tokens": 1024}, "vsae": {"normalize": "none"},
                "jumprelu": {"bandwidth": 0.05}}.get(variant, {})
    model = S.build(variant, 12, 32, **fit(variant, **{**settings, **hyper}))
    S.init_b_dec(model, x)
    before = S.metrics(model, x)["fvu"]
    opt, g = S.make_optimizer(model, "adam", lr=1e-2), torch.randn(128, 12, generator=rng)
    for step in range(120):
        S.train_step(model, opt, [(x[torch.randint(len(x), (128,), generator=rng)], g, None)],
                     progress=step / 120)
    assert S.metrics(model, x)["fvu"] < before / 2


@pytest.mark.parametrize("variant, name, full", [("relu", "l1", 0.05), ("gated", "l1", 0.05),
                                                 ("jumprelu", "l0_penalty", 1.0),
                                                 ("vsae", "kl", 0.01)])
def test_penalties_ramp_up_from_zero(variant, name, full):
    model, weights = make(variant, warmup=0.2), []
    for progress in (0.0, 0.1, 0.2, 1.0):
        b = model.batch(data(), progress=progress, train=True)
        model.batch_loss(b)
        weights.append(model.extra(b)[name][0])
    assert weights == pytest.approx([0, full / 2, full, full])
    assert make(variant, warmup=0.0).ramp(model.batch(data(), progress=0.0)) == 1


@pytest.mark.parametrize("variant", [*POOLED, "feature_choice"])
def test_calibrated_thresholds_give_k_active_latents_on_held_out_tokens(variant):
    """A latent of Feature Choice must also choose tokens where it is below 0, and not active: there
    it is less."""
    model = make(variant)
    model.calibrate(data(512, seed=seed) for seed in range(8))
    in_use = float((in_training(model, data(512))[0] != 0).sum() / 512)
    assert (model.threshold > 0).all()
    assert in_use < K if variant == "feature_choice" else in_use == K
    assert S.metrics(model, data(4096, seed=99))["l0"] == pytest.approx(in_use, rel=0.1)


@pytest.mark.parametrize("variant", ["batchtopk", "feature_choice"])
def test_calibration_is_the_mean_of_the_smallest_chosen_values(variant):
    """For Feature Choice over those batches in which the latent is active at all."""
    model, lows = make(variant), []
    with torch.no_grad():
        model.b_enc[:4] -= 1.8      # active in some batches only
    batches = [data(8, seed=seed) for seed in range(6)]
    for x in batches:
        z = in_training(model, x)[0]
        low = torch.where(z > 0, z, math.inf)
        lows.append(low.amin(0) if variant == "feature_choice" else low.amin())
    lows = torch.stack(lows)
    model.calibrate(batches)
    there = lows < math.inf
    want = lows.mean()
    if variant == "feature_choice":
        want = torch.zeros(F, dtype=torch.float64)
        for i in range(F):
            if there[:, i].any():
                want[i] = lows[there[:, i], i].mean()
    assert torch.allclose(model.threshold, want, atol=1e-12)
    assert variant == "batchtopk" or (0 < there.double().mean(0)).any() and not there.all()


@pytest.mark.parametrize("variant", list(S.VARIANTS))
def test_fresh_atoms_are_the_encoder_s_rows_at_unit_norm(variant):
    """Tied at the start but for the length: the encoder starts as an nn.Linear does, as in
    sparsify, the atoms at 1.

    ITDA starts empty.  The published inits differ by variant (He, 0.1, unit); one for all makes
    them comparable."""
    model = S.build(variant, D, F, **fit(variant))
    if variant == "itda":
        assert not model.W_dec.any()
        return
    assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(model.W_enc, dim=1), model.W_dec, atol=1e-6)
    assert not model.b_enc.any() and not model.b_dec.any()


def test_what_is_true_of_which_variant():
    """x is heterogeneous, and every pre above 0 where codes may not be negative: what is chosen is
    active.

    Feature Choice: each column holds its budget.  JumpReLU and Gated hold no number at all."""
    # k per token, k N per batch, m_i per column, rows alone in training, z >= 0, needs g
    table = {
        "topk": [1, 1, 0, 1, 1, 0], "abstopk": [1, 1, 0, 1, 0, 0], "gsae": [1, 1, 0, 1, 1, 1],
        "batchtopk": [0, 1, 0, 0, 1, 0], "mutual_choice": [0, 1, 0, 0, 1, 0],
        "matryoshka": [0, 1, 0, 0, 1, 0],
        "feature_choice": [0, 1, 1, 0, 1, 0], "jumprelu": [0, 0, 0, 1, 1, 0],
        "gated": [0, 0, 0, 1, 1, 0]}
    x, g = data(32, 16) * torch.linspace(0.2, 4, 32)[:, None], random(32, 16, seed=1)
    other = torch.cat([3 * x[:-1], x[-1:]])
    for variant, want in table.items():
        model = make(variant, d=16, f=16)
        if variant != "abstopk":
            with torch.no_grad():
                model.b_enc += 0.01 - model.preacts(model.batch(x).x).min()
        z = in_training(model, x, g=g)[0]
        m = budgets(32 * K, 16)
        try:
            model.loss(x)
            needs = False
        except ValueError:
            needs = True
        got = [((z != 0).sum(1) == K).all(), (z != 0).sum() == 32 * K,
               torch.equal((z != 0).sum(0), m),
               torch.equal(in_training(model, other, g=g)[0][-1], z[-1]), (z >= 0).all(), needs]
        assert [int(value) for value in got] == want, variant


# ---- Mutual Choice, BatchTopK, Matryoshka: the k N largest ---------------------------------------


@pooled
def test_exactly_k_n_pairs_are_chosen_even_on_ties(variant):
    for d, n in ((D, N), (64, 40)):      # few and many entries: two ways to find the largest
        model, x = bare(variant, d), random(n, d)
        for pre in (x, x.round(), torch.zeros_like(x), -x.abs()):
            assert int(chosen(model, pre).sum()) == K * n


@pooled
def test_as_many_are_active_as_are_chosen_and_positive(variant):
    model, x = bare(variant), data()
    for shift in (0, -1.5, -2.5, -20):
        with torch.no_grad():
            model.b_enc.fill_(shift)
        positive = int((x + shift > 0).sum())
        assert int((in_training(model, x)[0] != 0).sum()) == min(K * N, positive)
    assert positive == 0      # and at shift 0 there were more than k N
    assert int((x > 0).sum()) > K * N


@pooled
def test_no_dropped_value_is_above_a_kept_one_and_kept_values_are_pre(variant):
    for d, n in ((D, N), (64, 40)):
        model, x = bare(variant, d), random(n, d)
        mask, z = chosen(model, x), in_training(model, x)[0]
        assert x[mask].min() >= x[~mask].max()
        assert torch.equal(z[mask], x[mask].relu()) and not z[~mask].any()


@pooled
def test_codes_follow_permutations_of_tokens_and_of_latents(variant):
    model, x = make(variant), data()
    z = in_training(model, x)[0]
    assert torch.allclose(in_training(model, x[shuffled])[0], z[shuffled])
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.W_enc.copy_(model.W_enc[order]), model.b_enc.copy_(model.b_enc[order])
    assert torch.allclose(in_training(model, x)[0], z[:, order])


@pooled
def test_a_token_alone_is_topk(variant):
    model, twin, x = make(variant), make("topk"), data()
    for row in x.split(1):
        assert torch.equal(in_training(model, row)[0], twin.encode(row))


@pooled
def test_tokens_share_unequally_k_on_average(variant):
    mask = chosen(make(variant), data() * torch.linspace(0.1, 3, N)[:, None])
    per_token = mask.sum(1).double()
    assert per_token.mean() == K and per_token.var() > 1


@pooled
def test_gradient_exists_only_at_what_was_chosen_and_active(variant):
    """The graph starts at the (M,) chosen values: all that reaches the encoder passes through
    them."""
    model, x = make(variant, **no_aux(variant)), data()
    b = model.batch(x, train=True)
    total, _ = model.batch_loss(b)
    d_value, d_W, d_b = torch.autograd.grad(total, [b.z.value, model.W_enc, model.b_enc])
    active = b.z.value > 0
    d_pre = S.dense(b.z._replace(value=d_value * active))
    assert torch.allclose(d_W, d_pre.T @ (x - model.b_dec), atol=1e-12)
    assert torch.allclose(d_b, d_pre.sum(0), atol=1e-12)
    assert len(d_value) == K * N and torch.equal(d_pre != 0, S.dense(b.z) != 0)


def test_mutual_choice_is_batchtopk_with_auxk_on():
    a, b = make("mutual_choice"), make("batchtopk", aux_coef=1 / 32)
    assert torch.equal(a.loss(data())[0], b.loss(data())[0]) and a.loss(data())[1]["aux"] > 0
    ga, gb = gradients(a, data()), gradients(b, data())
    assert ga.keys() == gb.keys() and all(torch.equal(ga[name], gb[name]) for name in ga)


# ---- thresholds of BatchTopK ---------------------------------------------------------------------


@pooled
def test_just_below_the_smallest_chosen_value_inference_equals_training(variant):
    model, x = make(variant), data()
    z = in_training(model, x)[0]
    model.threshold.fill_(float(z[z != 0].abs().min()) - 1e-9)
    assert torch.equal(model.encode(x), z)


@pytest.mark.parametrize("variant", ["batchtopk", "feature_choice"])
def test_the_threshold_starts_at_the_first_batch_and_follows_at_one_percent(variant):
    model = S.build(variant, D, F, **fit(variant)).double()
    S.init_b_dec(model, data())
    opt, want = S.make_optimizer(model, "adam", lr=0.01), None
    for step in range(6):
        x = data(64, seed=step)
        z = in_training(model, x)[0].abs()
        low = torch.where(z > 0, z, math.inf)
        low = low.amin(0) if variant == "feature_choice" else low.amin()
        want = low if want is None else 0.99 * want + 0.01 * low
        S.train_step(model, opt, [x])
        assert torch.allclose(model.threshold, want, atol=1e-12) and (model.threshold > 0).all()


def test_a_batch_without_an_active_latent_leaves_the_threshold():
    model, x = make("batchtopk"), data()
    before = model.threshold.clone()
    with torch.no_grad():
        model.b_enc.fill_(-100)
    S.train_step(model, S.make_optimizer(model, "adam"), [x])
    assert torch.equal(model.threshold, before)


@pytest.mark.parametrize("variant", ["batchtopk", "feature_choice", "jumprelu"])
def test_thresholds_scale_with_the_activations(variant):
    """There is no call that rescales a trained SAE: the input scale of normalize="scale" travels
    with it instead."""
    model, x = make(variant), data()
    z = model.encode(x)
    with torch.no_grad():
        for tensor in (model.b_enc, model.b_dec, model.threshold):
            tensor.mul_(7)
    assert torch.allclose(model.encode(7 * x), 7 * z)
    scaled = make(variant, normalize="scale")
    z = scaled.encode(x)
    scaled.input_scale.div_(7)
    assert torch.allclose(scaled.encode(7 * x), z)


# ---- Feature Choice ------------------------------------------------------------------------------


def test_budgets_sum_to_k_n_and_differ_by_one_at_most():
    for f, n, k in ((12, 18, 3), (12, 9, 3), (50, 101, 7), (7, 20, 7), (300, 64, 10)):
        model, x = S.build("feature_choice", D, f, k=k).double(), data(n)
        m = chosen(model, x).sum(0)
        assert m.sum() == k * n and 1 <= m.min() and m.max() <= n
        assert torch.equal(m, budgets(k * n, f)) and m.max() - m.min() <= 1


def test_each_latent_chooses_its_budget_of_tokens_and_none_is_idle():
    model, x = make("feature_choice"), data()
    with torch.no_grad():
        model.b_enc[3] = -0.7      # some of what it chooses is below 0
    m, mask, z = budgets(K * N), chosen(model, x), in_training(model, x)[0]
    pre = model.preacts(x)
    assert torch.equal(mask.sum(0), m) and (mask.sum(0) > 0).all()
    assert torch.equal((z != 0).sum(0), torch.minimum(m, (pre > 0).sum(0)))
    assert int(((z != 0).sum(0) < m).sum()) > 0      # at most m, not exactly


def test_within_a_column_no_dropped_value_is_above_a_kept_one():
    model, x = make("feature_choice"), data()
    mask, pre = chosen(model, x), model.preacts(x)
    kept = torch.where(mask, pre, math.inf).amin(0)
    dropped = torch.where(mask, -math.inf, pre).amax(0)
    assert (kept >= dropped).all()


def test_feature_choice_does_not_see_shift_or_scale_of_a_latent_as_mutual_choice_does():
    x, moves = data(), torch.linspace(0, 3, F, dtype=torch.float64)
    for variant, sees in (("feature_choice", False), ("mutual_choice", True)):
        for change in ("shift", "scale"):
            model = make(variant)
            mask = chosen(model, x)
            with torch.no_grad():
                if change == "shift":
                    model.b_enc += moves
                else:
                    model.W_enc *= 0.2 + moves[:, None]
                    model.b_enc *= 0.2 + moves
            assert torch.equal(chosen(model, x), mask) != sees, (variant, change)


def test_with_one_latent_feature_choice_is_mutual_choice():
    x = data(20)
    masks = []
    for variant in ("feature_choice", "mutual_choice"):
        model = make(variant, f=1, k=1)
        model.k = 0.35      # 7 of 20 tokens
        masks.append(chosen(model, x))
    assert torch.equal(*masks) and masks[0].sum() == 7


def test_feature_choice_at_inference_equals_training_where_thresholds_are_its_smallest_values():
    model, x = make("feature_choice"), data()
    z = in_training(model, x)[0]
    model.threshold.copy_(torch.where(z > 0, z, math.inf).amin(0) - 1e-9)
    assert torch.equal(model.encode(x), z)


def test_a_micro_batch_too_small_for_the_budget_is_refused():
    model = make("feature_choice")
    assert model.loss(data(4))[1]["l0"] > 0
    with pytest.raises(ValueError, match="feature_choice: 3 tokens x k=3 leave some of 12 latents "
                                         "without: raise --micro-batch"):
        model.loss(data(3))


# ---- AuxK ----------------------------------------------------------------------------------------


def test_where_nobody_is_dead_aux_is_zero_with_zero_gradient():
    model, plain_one = (make("mutual_choice", aux_coef=weight) for weight in (1.0, 0.0))
    model.tokens_since_fired.zero_()
    assert not model.dead.any() and model.loss(data())[1]["aux"] == 0
    with_aux, without = gradients(model, data()), gradients(plain_one, data())
    assert all(torch.equal(with_aux[name], without[name]) for name in without)


@pytest.mark.parametrize("variant", ["mutual_choice"])
def test_aux_pulls_neither_through_the_error_nor_by_the_decoder_bias(variant):
    """The pre-encoder bias does pass a gradient on, through the encoder of the dead; here that way
    is cut."""
    model, x = make(variant, aux_coef=1.0), data()
    b = model.batch(x, train=True)
    model.batch_loss(b)
    b.cache["aux"] = b.cache["aux"]._replace(value=b.cache["aux"].value.detach())
    assert torch.autograd.grad(model.aux_loss(b)["aux"][1], [model.b_dec],
                               allow_unused=True)[0] is None
    dead = model.dead
    a, without = gradients(model, x), gradients(make(variant, aux_coef=0.0), x)
    for name in ("W_enc", "b_enc", "W_dec"):      # through e, living latents would feel it
        assert torch.allclose(a[name][~dead], without[name][~dead], atol=1e-14)
        assert not torch.allclose(a[name][dead], without[name][dead], atol=1e-6)


@each([(v, h) for v, h in WITH_AUX if v != "topafa" and h.get("sample", "none") == "none"])
def test_aux_does_not_depend_on_the_scale_of_x(variant, hyper):
    """x, all biases and thresholds by the same factor.  Not here: top-AFA, which scales each token
    itself, and the noise of vSAE, which keeps its size."""
    model, x, g = make(variant, **hyper), data(), random(N, D, seed=5)
    before = model.loss(x, g=g)[1]["aux"]
    with torch.no_grad():
        for name in {"b_enc", "b_dec", "b_mag", "threshold"} & tensors(model).keys():
            getattr(model, name).mul_(7)
    if variant == "jumprelu":
        model.bandwidth *= 7
    assert before > 0 and torch.allclose(model.loss(7 * x, g=g)[1]["aux"], before)


# ---- g-SAE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", [{}, AUX[0]], ids=str)
def test_gsae_without_beta_or_without_gradient_is_topk(hyper):
    x, topk = data(), make("topk", **hyper)
    want, grads = topk.loss(x)[0], gradients(topk, x)
    for beta, g in ((0.0, random(N, D)), (50.0, torch.zeros(N, D))):
        model = make("gsae", beta=beta, **hyper)
        assert torch.equal(model.loss(x, g=g)[0], want)
        assert beta or torch.equal(chosen(model, x, g=g), chosen(topk, x))
        found = gradients(model, x, g=g)
        assert found.keys() == grads.keys()
        assert all(torch.equal(found[name], grads[name]) for name in grads)


def test_gsae_chooses_k_of_each_token_and_keeps_pre_as_their_value():
    model, x = make("gsae", beta=5.0), data()
    mask, z = chosen(model, x, g=random(N, D)), in_training(model, x, g=random(N, D))[0]
    assert (mask.sum(1) == K).all() and torch.allclose(z, model.preacts(x).relu() * mask)
    assert not torch.equal(mask, chosen(make("topk"), x))


def test_at_large_beta_gsae_ranks_by_the_true_change_of_the_loss():
    """a is |dL(x + t w_i)/dt| at t = 0: here by finite differences of a toy loss over all
    tokens."""
    x, mix = data(5), random(D, D, seed=8)

    def toy(x):
        # A token matters to those after it
        return torch.tanh(x @ mix / 4).cumsum(0).pow(3).sum()

    leaf = x.clone().requires_grad_()
    g = torch.autograd.grad(toy(leaf), leaf)[0]
    model = make("gsae", beta=1e9)
    with torch.no_grad():
        model.b_enc += 30      # every pre above 0
    a = torch.zeros(5, F, dtype=torch.float64)
    for n in range(5):
        for i in range(F):
            step = torch.zeros_like(x)
            step[n] = 1e-6 * model.W_dec[i].detach()
            a[n, i] = abs(float(toy(x + step) - toy(x - step))) / 2e-6
    assert torch.allclose(a, (g @ model.W_dec.T).abs(), rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen(model, x, g=g), largest(model.preacts(x) * a, K))
    assert not torch.equal(chosen(model, x, g=g), largest(model.preacts(x), K))


def test_gsae_sees_neither_the_sign_of_g_nor_of_an_atom_nor_how_beta_and_g_share_a_factor():
    model, x, g = make("gsae", beta=3.0), data(), random(N, D)
    mask = chosen(model, x, g=g)
    assert torch.equal(chosen(model, x, g=-g), mask)
    with torch.no_grad():
        model.W_dec[::2] *= -1
    assert torch.equal(chosen(model, x, g=g), mask)
    model.beta = 3.0 / 64
    assert torch.equal(chosen(model, x, g=64 * g), mask)
    assert not torch.equal(chosen(model, x, g=g), mask)


def test_no_gradient_passes_through_the_choice_of_gsae():
    model, g = make("gsae", beta=3.0), random(N, D).requires_grad_()
    total = model.loss(data(), g=g)[0]
    assert torch.autograd.grad(total, [g, model.W_dec], allow_unused=True)[0] is None


def test_gsae_needs_g_in_training_only():
    model, x = make("gsae", beta=3.0), data()
    assert torch.equal(model.encode(x), make("topk").encode(x))
    assert torch.equal(model(x), make("topk")(x))
    with pytest.raises(ValueError, match="gsae: training needs the gradient"):
        model.loss(x)


def test_g_and_at_stay_with_their_token(monkeypatch):
    """Through chunks, through shapes, and shuffled together; a g of another size is refused."""
    model, x, g = make("gsae", beta=3.0), data(), random(N, D)
    mask = chosen(model, x, g=g)
    assert torch.equal(chosen(model, x[shuffled], g=g[shuffled]), mask[shuffled])
    assert not torch.equal(chosen(model, x, g=g[shuffled]), mask)
    monkeypatch.setattr(S, "CHUNK", 5 * F)
    assert torch.equal(chosen(model, x.view(3, 6, D), g=g.view(3, 6, D)), mask)
    with pytest.raises(RuntimeError, match="shape"):
        model.loss(x, g=g[:1])
    found = S.build("itda", D, F, k=K).double()
    for half in shuffled.chunk(2):
        S.train_step(found, S.make_optimizer(found, "adam"),
                     [(x[half].view(-1, 3, D), None, half.view(-1, 3))])
    there = int(found.n_atoms)
    assert there > D // 2
    atoms = torch.nn.functional.normalize(x[found.label[:there]], dim=1)
    assert torch.allclose(found.W_dec[:there], atoms)


# ---- AbsTopK -------------------------------------------------------------------------------------


def abs_codes(u):
    return in_training(bare("abstopk", u.shape[1]), u)[0]


def test_abstopk_keeps_the_largest_sizes_with_their_sign():
    u = random(N, 16)
    mask, z = chosen(bare("abstopk", 16), u), abs_codes(u)
    assert ((z != 0).sum(1) == K).all()
    assert torch.equal(z, u * mask) and (z > 0).any() and (z < 0).any()
    assert all(size[kept].min() >= size[~kept].max() for size, kept in zip(u.abs(), mask))
    for c in (-1.0, 4.0, -0.25):      # odd, and homogeneous
        assert torch.equal(abs_codes(c * u), c * z)


def test_abstopk_is_the_nearest_k_sparse_code():
    u = random(30, 7)
    left = (u - abs_codes(u)).pow(2).sum(1)
    assert torch.allclose(left, u.pow(2).sort(1).values[:, :7 - K].sum(1))
    every_set = torch.combinations(torch.arange(7), K)
    best = torch.stack([u.pow(2).sum(1) - u[:, list(some)].pow(2).sum(1)
                        for some in every_set.tolist()]).amin(0)
    assert torch.allclose(left, best)


def test_abstopk_is_topk_over_atoms_and_their_opposites():
    u = random(N, 8)
    z, twin = abs_codes(u), bare("topk", 16)
    assert torch.equal(torch.cat([z.relu(), (-z).relu()], 1), twin.encode(torch.cat([u, -u], 1)))
    # And topk where all are above 0
    assert torch.equal(abs_codes(u.abs()), bare("topk", 8).encode(u.abs()))


def test_auxk_of_abstopk_chooses_strongly_negative_latents_and_counts_how_many_are_dead():
    model, x = make("abstopk", aux_coef=1.0, k_aux=1), data()
    with torch.no_grad():
        model.b_enc[4] = -50
    b = model.batch(x, train=True)
    model.batch_loss(b)
    aux = S.dense(b.cache["aux"]).detach()
    assert (aux[:, 4] < -40).all() and not aux[:, [i for i in range(F) if i != 4]].any()
    one, four = (make("abstopk", aux_coef=1.0, k_aux=k_aux) for k_aux in (2, 8))
    # Two dead: 2 / k_aux
    assert torch.allclose(one.loss(x)[1]["aux"] * 2 / 8, four.loss(x)[1]["aux"])


def test_a_latent_of_abstopk_that_fires_below_zero_is_alive():
    for x in (torch.tensor([[-5.0, 1, 0.1, 0.1]] * 4),
              torch.tensor([[-5.0, 1, 0.1, 0.1], [5, 1, 0.1, 0.1]] * 2)):
        model = S.build("abstopk", 4, 4, k=1)
        model.W_enc.data, model.W_dec.data = torch.eye(4), torch.eye(4)
        model.tokens_since_fired += 1000
        x = x + 0.01 * random(4, 4).float()
        parts = S.train_step(model, S.make_optimizer(model, "adam", lr=1e-6), [x])
        assert parts["fired"].tolist() == [True, False, False, False] and parts["l0"] == 1
        assert model.tokens_since_fired.tolist() == [0, 1004, 1004, 1004]
        assert S.metrics(model, x)["l0"] == 1 and float(S.metrics(model, x)["density"][0]) == 1


def test_turning_a_latent_of_abstopk_round_changes_nothing():
    model, x = make("abstopk"), data()
    x_hat = model(x)
    with torch.no_grad():
        for tensor in (model.W_enc, model.b_enc, model.W_dec):
            tensor[::3] *= -1
    assert torch.allclose(model(x), x_hat, atol=1e-12)


# ---- ReLU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["unit", "free"])
def test_codes_of_relu_are_never_negative_and_without_l1_the_loss_is_the_squared_error(rows):
    model, x = make("relu", rows=rows, l1=0.0), data()
    z = in_training(model, x)[0]
    assert (z >= 0).all() and z.any()
    total, p = model.loss(x)[0], dict(model.named_parameters())
    x = x * model.input_scale
    want = (x - ((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).relu() @ p["W_dec"]
            - p["b_dec"]).pow(2).sum(1).mean()
    assert torch.allclose(total, want)
    got, want = (torch.autograd.grad(t, list(p.values())) for t in (total, want))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want))


def test_shrinking_codes_and_stretching_atoms_cheats_plain_l1_and_not_the_one_by_length():
    for rows, share in (("unit", 1 / 4), ("free", 1.0)):
        model, x = make("relu", rows=rows), data()
        before, x_hat = model.loss(x)[1]["l1"], model(x)
        with torch.no_grad():
            model.W_enc.div_(4), model.b_enc.div_(4), model.W_dec.mul_(4)
        assert torch.allclose(model(x), x_hat)
        assert torch.allclose(model.loss(x)[1]["l1"], share * before)


@pytest.mark.parametrize("variant, hyper",
                         [("relu", {"rows": "free"}), ("gated", {}), ("jumprelu", {})])
def test_folding_lengths_into_the_encoder_keeps_the_function(variant, hyper):
    """Codes become z ||w||, the same ones are active, x_hat stays; r_mag of Gated is not
    touched."""
    model, x = make(variant, **hyper), data()
    with torch.no_grad():
        model.W_dec *= torch.linspace(0.3, 3, F)[:, None]
        model.W_dec[5] = 0
    before, length = copy.deepcopy(model), model.W_dec.norm(dim=1)
    z, x_hat = model.encode(x), model(x)
    model.fold_rows_()
    length[5] = 1      # a zero atom stays zero
    assert torch.allclose(model(x), x_hat) and torch.allclose(model.encode(x), z * length)
    assert torch.equal(model.encode(x) != 0, z != 0)
    assert torch.allclose(model.W_dec.norm(dim=1), (torch.arange(F) != 5).double())
    if variant == "gated":
        assert torch.equal(model.r_mag, before.r_mag)
    if variant == "jumprelu":
        assert torch.allclose(model.threshold, before.threshold * length)


def test_one_atom_shrinks_its_code_by_half_the_penalty():
    model = S.build("relu", 1, 1, l1=1.0, normalize="none", warmup=0.0).double()
    with torch.no_grad():
        model.W_enc.fill_(1), model.W_dec.fill_(1)
    for activation, sign in ((0.4, -1), (0.5, 0), (0.6, 1)):      # x = 1: the best is 1 - 1 / 2
        with torch.no_grad():
            model.b_enc.fill_(activation - 1)
        slope = gradients(model, torch.ones(2, 1, dtype=torch.float64))["b_enc"]
        assert float(slope.round(decimals=9).sign()) == sign


def test_relu_revives_dead_latents_by_auxk_and_never_resamples():
    """The published remedy overwrites dead latents and zeroes Adam's moments.  Here AuxK does it,
    as everywhere.

    A latent whose own bias keeps it below 0 on some tokens is pulled back by them, and Adam's state
    is left alone."""
    model, x = make("relu", aux_coef=1.0), data()
    alone = make("relu", aux_coef=0.0)
    with_aux, without = gradients(model, x), gradients(alone, x)
    living = [i for i in range(F) if i not in DEAD]
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.allclose(with_aux[name][living], without[name][living], atol=1e-14)
        assert not torch.allclose(with_aux[name][DEAD], without[name][DEAD], atol=1e-6)
    opt = S.make_optimizer(model, "adam")
    for step in range(3):
        S.train_step(model, opt, [x])
    assert opt.state[model.W_enc]["exp_avg"][DEAD].any() and opt.state[model.W_enc]["step"] == 3


# ---- Matryoshka ----------------------------------------------------------------------------------


def test_one_level_is_batchtopk():
    a, b = make("matryoshka", aux_coef=0.1, levels=[1.0]), make("batchtopk", aux_coef=0.1)
    assert torch.allclose(a.loss(data())[0], b.loss(data())[0], rtol=1e-12)
    ga, gb = gradients(a, data()), gradients(b, data())
    assert all(torch.allclose(ga[name], gb[name], atol=1e-12) for name in gb)


def test_widths_of_levels_rise_to_the_number_of_latents():
    assert S.build("matryoshka", 8, 65_536, k=4).widths() == [2048, 6144, 14336, 30720, 65536]
    for f in (1, 2, 3, 12, 100, 999):
        for levels in ([1.0], [1, 2, 3], [1e-6, 1.0], [5, 1, 1, 1], [0.1] * 10):
            widths = S.build("matryoshka", D, f, k=1, levels=levels).widths()
            assert widths[-1] == f and min(widths) >= 1 and sorted(set(widths)) == widths


def test_weightings_of_levels_are_one_and_one_more():
    """The level errors by slicing, one at a time; the empty level counts under "mean" alone."""
    model, x = make("matryoshka"), data()
    totals = {how: make("matryoshka", weighting=how).loss(x)[0] for how in ("sum", "mean")}
    z, variance = in_training(model, x)[0], (x - x.mean(0)).pow(2).sum()
    errors = [(x - z[:, :m] @ model.W_dec[:m] - model.b_dec).pow(2).sum() / variance
              for m in (0, 2, 6, 12)]
    assert model.widths() == [2, 6, 12]
    assert torch.allclose(totals["sum"], sum(errors[1:]), rtol=1e-12)
    assert torch.allclose(totals["mean"], sum(errors) / 4, rtol=1e-12)
    # The whole dictionary's
    assert torch.allclose(make("matryoshka").loss(x)[1]["fvu"], errors[-1])


def test_a_level_gives_no_gradient_to_the_latents_beyond_it():
    """Atoms of the last group feel the last level alone, those of the group before it two, the
    first all three."""
    x, model, aux = data(), make("matryoshka", aux_coef=0.0), make("batchtopk", aux_coef=0.0)
    full = gradients(aux, x)["W_dec"]
    grads, z = gradients(model, x)["W_dec"], in_training(model, x)[0]
    assert torch.allclose(grads[6:], full[6:], atol=1e-12)
    variance, W = (x - x.mean(0)).pow(2).sum(), model.W_dec.detach().clone().requires_grad_()
    level = (x - z[:, :6] @ W[:6] - model.b_dec.detach()).pow(2).sum() / variance
    middle = torch.autograd.grad(level, W)[0]
    assert not middle[6:].any() and torch.allclose(grads[2:6], full[2:6] + middle[2:6], atol=1e-12)
    assert not torch.allclose(grads[:2], full[:2] + middle[:2], atol=1e-6)


def test_the_first_latents_decode_alone():
    model, x = make("matryoshka"), data()
    z = model.encode(x)
    assert torch.equal(model.decode(z[:, :F]), model.decode(z))
    for m in (2, 6):
        cut = z.clone()
        cut[:, m:] = 0
        short = model.decode(z[:, :m])
        assert torch.allclose(short, model.decode(cut), atol=1e-12)
        assert not torch.allclose(short, model.decode(z))
        other = copy.deepcopy(model)
        other.W_dec.data[m:] += 1
        assert torch.equal(other.decode(z[:, :m]), short)


# ---- Gated ---------------------------------------------------------------------------------------


def gated_term(name):
    """The model, and the gradients of one term of its loss that are not 0."""
    model = make("gated")
    b = model.batch(data(), train=True)
    model.batch_loss(b)
    (model.recon_loss(b) if name == "recon" else model.extra(b)[name][1]).backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return model, {key: grad for key, grad in grads.items() if grad.abs().max() > 1e-12}


def test_gated_fires_only_where_its_gate_is_open_and_equals_a_jumprelu():
    model, x = make("gated"), data()
    z, x = model.encode(x), x * model.input_scale
    gate = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    size = (x - model.b_dec) @ (model.W_enc * model.r_mag.exp()[:, None]).T + model.b_mag
    threshold = model.b_mag - model.r_mag.exp() * model.b_enc
    assert torch.equal(z > 0, (gate > 0) & (size > 0)) and (gate > 0).sum() > (z > 0).sum() > 0
    assert (threshold < 0).any() and (threshold > 0).any()      # below 0 it is just ReLU
    assert torch.allclose(z, size.relu() * (size > threshold))


def test_gated_without_rescaling_is_relu():
    model, relu, x = make("gated"), make("relu"), data()
    with torch.no_grad():
        model.r_mag.zero_(), model.b_mag.copy_(model.b_enc)
    assert torch.allclose(model.encode(x), relu.encode(x), atol=1e-12)


def test_the_gate_s_own_reconstruction_trains_the_gate_alone():
    """Its decoder is frozen.  b_dec does get a gradient, as the pre-encoder bias: what the open
    gates pass back."""
    model, grads = gated_term("gate")
    assert grads.keys() == {"W_enc", "b_enc", "b_dec"}
    assert torch.allclose(grads["b_dec"], -grads["b_enc"] @ model.W_enc, atol=1e-12)


def test_the_gate_gets_no_gradient_from_the_reconstruction():
    _, grads = gated_term("recon")
    assert grads.keys() == {"W_enc", "r_mag", "b_mag", "W_dec", "b_dec"}


def test_the_penalty_of_gated_does_not_touch_magnitudes():
    _, grads = gated_term("l1")
    assert grads.keys() == {"W_enc", "b_enc", "b_dec"}


# ---- JumpReLU ------------------------------------------------------------------------------------


def test_codes_of_jumprelu_are_zero_or_above_their_threshold():
    model, x = make("jumprelu"), data()
    z = model.encode(x)
    assert ((z == 0) | (z > model.threshold)).all() and (z > 0).any()
    pre = model.preacts(x * model.input_scale)
    assert ((pre > 0) & (z == 0)).any()
    with torch.no_grad():
        model.threshold.zero_()
    assert torch.equal(model.encode(x), pre.relu())


def l0_of(model, x, penalty=False):
    """pre, and the gradients of the L0 alone, or of the penalty, which is a function of it."""
    b = model.batch(x, train=True)
    model.batch_loss(b)
    value = model.extra(b)["l0_penalty"][1] if penalty else b.cache["step"].sum(1).mean()
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return b.pre.detach(), grads


def test_l0_moves_thresholds_by_the_count_of_what_is_near_and_nothing_else():
    model = make("jumprelu", bandwidth=0.3)
    pre, grads = l0_of(model, data())
    near = ((pre - model.threshold).abs() < 0.15).sum(0)
    assert near.any() and torch.allclose(grads["threshold"], -near.double() / 0.3 / N)
    assert not any(grad.any() for name, grad in grads.items() if name != "threshold")
    far = make("jumprelu", bandwidth=1e-9)
    b = far.batch(data(), train=True)
    far.batch_loss(b)[0].backward()
    assert not far.threshold.grad.any()      # nobody within half a bandwidth: neither term moves it


def test_what_is_just_below_a_threshold_counts_as_much_as_what_is_just_above():
    x = torch.full((4, D), 5.0, dtype=torch.float64)
    x[0], x[1] = 0.45, 0.55
    slopes = []
    for rows in ([0, 2], [1, 2], [0, 1]):
        model = bare("jumprelu", bandwidth=0.2, threshold_init=0.5)
        slopes.append(l0_of(model, x[rows])[1]["threshold"])
    assert torch.equal(slopes[0], slopes[1]) and torch.allclose(slopes[2], 2 * slopes[0])
    assert slopes[0].all()
    for value in (0.45, 0.55):
        model = bare("jumprelu", bandwidth=0.2, threshold_init=0.5)
        z = model.codes(model.batch(torch.full((1, D), value)))
        slope = torch.autograd.grad(z.sum(), model.threshold)[0]
        assert torch.allclose(slope, torch.full_like(slope, -0.5 / 0.2))


def test_the_gradient_of_a_jump_by_pre_is_its_mask():
    model, pre = bare("jumprelu", bandwidth=0.5), random(N, D).requires_grad_()
    model.threshold.data = random(D, seed=1).abs()
    b = model.batch(pre)
    z, jump = model.codes(b), (pre > model.threshold).double()
    step = b.cache["step"]
    assert torch.equal(step, jump) and torch.equal(z, pre * step)
    assert torch.equal(torch.autograd.grad(z.sum(), pre, retain_graph=True)[0], jump)
    assert torch.autograd.grad(step.sum(), pre, allow_unused=True)[0] is None      # it has none


def test_the_penalty_raises_thresholds_and_the_reconstruction_pushes_back():
    """pre uniform over the bandwidth; with W_dec = 1 and z below x, a latent that stays silent is
    missed."""
    x = torch.rand(400, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = bare("jumprelu", bandwidth=0.8, threshold_init=0.5)
    assert (l0_of(model, x)[1]["threshold"] < 0).all()      # down the slope is up
    model.zero_grad()
    b = model.batch(x, train=True)
    model.batch_loss(b)
    model.recon_loss(b).backward()
    assert (model.threshold.grad > 0).all()


def test_jumprelu_learns_the_threshold_itself_and_keeps_it_at_zero_or_above():
    """Not its logarithm, whose gradient would be theta times this one: small ones move as far as
    large ones."""
    model = bare("jumprelu", bandwidth=0.5)
    with torch.no_grad():
        model.threshold.copy_(torch.linspace(0.01, 0.2, D))
    before, opt = model.threshold.detach().clone(), S.make_optimizer(model, "adam", lr=0.003)
    S.train_step(model, opt, [random(50, D)])
    assert torch.allclose((model.threshold - before).abs(),
                          torch.full((D,), 0.003, dtype=torch.float64), rtol=1e-3)
    with torch.no_grad():
        model.threshold.fill_(-1)
    model.constrain_()
    assert not model.threshold.any()


def test_the_target_penalty_is_zero_at_k_and_pulls_towards_it_from_both_sides():
    for bias, sign in ((-3.0, 1), (3.0, -1)):      # too few are active: down with the threshold
        model = bare("jumprelu", k=3, bandwidth=8.0, threshold_init=0.5)
        with torch.no_grad():
            model.b_enc.fill_(bias)
        assert (l0_of(model, random(50, D), True)[1]["threshold"].sign() == sign).all()
    model = bare("jumprelu", k=3)
    assert model.loss(torch.tensor([[1.0, 1, 1, 0, 0, 0],
                                    [0, 0, 0, 1, 1, 1]]).double())[1]["l0_penalty"] == 0


# ---- speed --------------------------------------------------------------------------------------

# What a micro-batch reads back, so that a GPU would be waited for: how many latents are chosen.
WAITS = {"batchtopk": ["nonzero"], "matryoshka": ["nonzero"], "mutual_choice": ["nonzero"],
         "topafa": ["index"]}
learned = pytest.mark.parametrize("variant", [v for v in S.VARIANTS if v != "itda"])


@learned
def test_what_a_step_waits_for(variant):
    model, xs = make(variant, f=48), [(data(), random(N, D), None)] * 2
    with Watch() as watch:
        S.train_step(model, S.make_optimizer(model, "signum"), xs)
    finite = "_local_scalar_dense"      # whether x is finite, which is looked at on a CPU alone
    adapt = ["_local_scalar_dense"] if variant == "gba" else []      # whether it is time to
    dead = ["nonzero"] if variant == "mutual_choice" else []         # it has AuxK: once a step
    assert watch.syncs == dead + [finite, *WAITS.get(variant, [])] * 2 + adapt


@learned
def test_who_fires_is_counted_once_a_micro_batch(variant, monkeypatch):
    counts = Mock(wraps=S.counts)
    monkeypatch.setattr(S, "counts", counts)
    model, xs = make(variant), [(data(), random(N, D), None)] * 2
    S.train_step(model, S.make_optimizer(model, "adam"), xs)
    assert counts.call_count == 2


@pytest.mark.parametrize("tokens, k", [(40, 3), (41, 3), (7, 5), (12, 1)])
def test_feature_choice_keeps_the_largest_of_each_column(tokens, k):
    model = make("feature_choice", k=k, f=12)
    pre = random(tokens, 12)
    index = model.choose(S.Batch(None, train=True, pre=pre))
    kept = torch.zeros(pre.numel()).index_fill_(0, index, 1).view(pre.shape)      # (N,F)
    size = kept.sum(0).long()
    assert size.sum() == k * tokens == len(index) and (index.diff() > 0).all()
    assert size.max() - size.min() <= 1 and (size.diff() <= 0).all()
    for i in range(12):
        best = pre[:, i].topk(size[i]).values.flip(0)
        assert torch.equal(pre[:, i][kept[:, i] > 0].sort().values, best)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("variant", [v for v, c in S.VARIANTS.items() if issubclass(c, S.Chosen)])
def test_codes_and_auxk_codes_are_sorted(variant, train):
    model = make(variant, f=48, aux_coef=0.25, k_aux=2)
    model.tokens_since_fired[:20] = model.dead_after + 1
    b = model.batch(data(), random(N, D), train=train)
    b.z = model.codes(b)
    if train and variant == "vsae":      # makes those of AuxK from its dense pre, later
        b.e = b.x - model.decode_normalized(b.z)
        model.aux_loss(b)
    assert ("aux" in b.cache) == train
    for z in (b.z, b.cache.get("aux", b.z)):
        assert len(z.flat_index) > N and (z.flat_index.diff() > 0).all()


def test_atoms_that_fire_as_soon_as_they_are_collected_are_counted():
    model, x = S.build("itda", D, F, k=K), data().float()
    S.train_step(model, S.make_optimizer(model, "adam"), [x])
    fired = (model.encode(x) != 0).any(0)
    assert fired.sum() >= D
    assert (model.tokens_since_fired[:D] == torch.where(fired, 0, N)[:D]).all()
