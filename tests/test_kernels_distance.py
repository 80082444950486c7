"""The kernels of logits, nearest prototype and cross-entropy against the plain reference in float64."""
import pytest
import torch

from protonb import distance as plain
from protonb.distance import METRICS
from protonb.kernels import common
from protonb.kernels import distance as kernels
from kernel_inputs import BF, DEVICE, FULL, HALF, ids, laid_out, rand

pytestmark = pytest.mark.usefixtures("poison")


def make(B, C, h, w, K, dtype=FULL, layout="plain", own=False, half_q=False, metric="cosine", valid=None, y=torch.int64, **_):
    """Features, prototypes, labels, valid classes; a zero pixel and a zero prototype where there is room for one."""
    x = rand(B, C, h, w)
    if h*w > 1: x[:, :, 0, 0] = 0
    q = rand(*((B,) if own else ()), K, C, seed=1)
    if K > 2: q[..., 1, :] = 0
    x, q = laid_out(x.to(dtype).to(DEVICE), layout), q.to(dtype if half_q else FULL).to(DEVICE)
    v = None if valid is None else (rand(*((B,) if valid == "each" else ()), K, seed=2) > -.5).to(DEVICE)
    if v is not None: v[..., 0] = True
    return x, q, ids(B, h, w, K=K, strays=.05).to(y).to(DEVICE), v


def close(name, mine, theirs, truth):
    """Kernel error at most twice that of PyTorch, plus what storing in a short type costs."""
    assert mine.shape == truth.shape and mine.isfinite().all(), name
    err, own, size = ((v.double()-truth).abs().max().item() for v in (mine, theirs, torch.zeros_like(truth)))
    stored = torch.finfo(mine.dtype).eps if mine.dtype != FULL else 0
    assert err <= 2*own+(1e-6+stored)*size, f"{name}: kernel off by {err:.1e}, PyTorch by {own:.1e}, largest {size:.1e}"


def like(d, t):
    assert d.dtype == t.dtype and d.shape == t.shape and d.stride() == torch.empty_like(t).stride()
    return d


CASES = {
    "one-pixel": dict(B=1, C=1, h=1, w=1, K=1),
    "one-pixel-many": dict(B=3, C=130, h=1, w=1, K=19, dtype=BF, layout="last"),
    "fp32": dict(B=1, C=64, h=17, w=33, K=19),
    "fp32-valid": dict(B=2, C=64, h=5, w=7, K=19, valid="all"),
    "fp32-own": dict(B=2, C=33, h=5, w=7, K=19, own=True, valid="each"),
    "fp32-last": dict(B=2, C=130, h=9, w=11, K=19, layout="last"),
    "bf16": dict(B=2, C=64, h=17, w=33, K=19, dtype=BF),
    "bf16-aligned": dict(B=1, C=256, h=8, w=16, K=19, dtype=BF),
    "bf16-last": dict(B=1, C=256, h=9, w=11, K=19, dtype=BF, layout="last"),
    "bf16-half-prototypes": dict(B=2, C=64, h=5, w=7, K=3, dtype=BF, half_q=True),
    "fp16": dict(B=1, C=130, h=9, w=11, K=2, dtype=HALF),
    "fp16-last": dict(B=2, C=64, h=9, w=11, K=19, dtype=HALF, layout="last", half_q=True),
    "crop": dict(B=2, C=3, h=17, w=33, K=19, layout="crop"),
    "crop-last-bf16": dict(B=2, C=64, h=9, w=11, K=19, dtype=BF, layout="crop-last"),
    "turned": dict(B=2, C=3, h=9, w=11, K=2, layout="turned", y=torch.uint8),
    "expanded": dict(B=3, C=17, h=5, w=7, K=5, layout="expanded", y=torch.int32),
    "many-classes": dict(B=1, C=64, h=9, w=11, K=150, valid="all"),
    "many-classes-bf16": dict(B=1, C=130, h=5, w=7, K=150, dtype=BF),
    "most-classes": dict(B=1, C=32, h=3, w=5, K=256),
    "wide": dict(B=1, C=1280, h=3, w=5, K=19),
    "wide-bf16-last": dict(B=1, C=1280, h=3, w=5, K=19, dtype=BF, layout="last"),
    "wide-many": dict(B=1, C=1030, h=1, w=3, K=70, own=True),          # over a thousand channels other kernels take over
    "wide-few": dict(B=2, C=1030, h=2, w=3, K=5),
    "large": dict(B=1, C=3, h=33, w=67, K=19),
}
SOME = ["fp32-own", "bf16-half-prototypes", "expanded", "wide-few"]       # for what does not depend on the blocks


def with_metrics(cases):
    """Each case with cosine, some with every metric."""
    return [pytest.param(n, m, id=f"{n}-{m}") for n in cases for m in (METRICS if n in SOME else ("cosine",))]


@pytest.mark.parametrize("name,metric", with_metrics(CASES))
def test_cross_entropy(name, metric):
    """Loss, log-sum-exp, count and both gradients."""
    x, q, y, v = make(**CASES[name])
    scale = 5. if metric == "cosine" else 2/CASES[name]["C"]**.5
    how = metric, scale, 255, "mean"
    up = torch.tensor(.7, device=DEVICE)
    loss, lse, count = kernels.cross_entropy_fwd(x, q, y, v, *how)
    dx, dq = kernels.cross_entropy_bwd(up, x, q, y, v, lse, count, *how, True, True)
    theirs, truth = [], []
    for out, wide in ((theirs, False), (truth, True)):
        a, b = (t.double() if wide else t for t in (x, q))
        parts = plain.cross_entropy_fwd(a, b, y, v, *how)
        out += [*parts, *plain.cross_entropy_bwd(up.to(parts[1].dtype), a, b, y, v, *parts[1:], *how)]
    assert count == truth[2]
    for part, *three in zip(("loss", "lse", "count", "dx", "dq"), (loss, lse, count, like(dx, x), like(dq, q)), theirs, truth): close(part, *three)
    inside = (y >= 0) & (y < q.shape[-2]) & (y != 255)
    assert (dx.movedim(1, -1)[~inside] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["fp32-valid", "bf16", "wide-few", "crop"])
def test_other_reductions(name, reduction):
    x, q, y, v = make(**CASES[name])
    how = "cosine", 5., 255, reduction
    up = rand(*y.shape, seed=5).float().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2) if reduction == "none" else torch.tensor(.3, device=DEVICE)
    loss, lse, count = kernels.cross_entropy_fwd(x, q, y, v, *how)
    got = loss, *kernels.cross_entropy_bwd(up, x, q, y, v, lse, count, *how, True, True)
    both = []
    for wide in (False, True):
        a, b = (t.double() if wide else t for t in (x, q))
        parts = plain.cross_entropy_fwd(a, b, y, v, *how)
        both.append([parts[0], *plain.cross_entropy_bwd(up.to(parts[1].dtype), a, b, y, v, *parts[1:], *how)])
    assert loss.shape == (y.shape if reduction == "none" else ())
    for part, *three in zip(("loss", "dx", "dq"), got, *both): close(part, *three)


@pytest.mark.parametrize("name,metric", with_metrics(["one-pixel", "fp32", "fp32-own", "bf16-last", "bf16-half-prototypes", "expanded", "crop-last-bf16", "many-classes", "wide-few"]))
def test_logits(name, metric):
    x, q, *_ = make(**CASES[name])
    how = metric, 3., 1e-12
    z = kernels.logits_fwd(x, q, *how)
    up = laid_out(rand(*z.shape, seed=6).float().to(DEVICE), "last")
    got = z, *map(like, kernels.logits_bwd(up, x, q, *how, True, True), (x, q))
    both = []
    for wide in (False, True):
        a, b = (t.double() if wide else t for t in (x, q))
        both.append([plain.logits_fwd(a, b, *how), *plain.logits_bwd(up.to(plain.wide(a.dtype)), a, b, *how)])
    assert z.dtype == FULL and z.is_contiguous()
    for part, *three in zip(("z", "dx", "dq"), got, *both): close(part, *three)


@pytest.mark.parametrize("name,metric", with_metrics(CASES))
def test_nearest(name, metric):
    """The winner is the largest logit, up to what rounding can't tell apart."""
    x, q, _, v = make(**CASES[name])
    label, score = kernels.nearest(x, q, v, metric)
    z = plain.logits_fwd(x.double(), q.double(), metric, 1., 1e-12)
    if v is not None: z = z.masked_fill(~v.expand(len(x), -1)[:, :, None, None], -torch.inf)
    assert label.dtype == torch.int64 and label.shape == x.shape[:1]+x.shape[2:] and (label >= 0).all() and (label < q.shape[-2]).all()
    best, won = z.amax(1), z.gather(1, label[:, None])[:, 0]
    size = best.abs().max()+(x.double().square().sum(1).max() if "euclid" in metric else 0)
    assert (best-won <= 1e-5*size).all()
    close("score", score, plain.nearest(x, q, v, metric)[1], best)


def test_need_only_one():
    """What is not wanted is empty and changes nothing."""
    x, q, y, v = make(**CASES["fp32-valid"])
    how = "cosine", 5., 255, "mean"
    _, lse, count = kernels.cross_entropy_fwd(x, q, y, v, *how)
    one = torch.ones((), device=DEVICE)
    dx, dq = kernels.cross_entropy_bwd(one, x, q, y, v, lse, count, *how, True, True)
    a, none = kernels.cross_entropy_bwd(one, x, q, y, v, lse, count, *how, True, False)
    nothing, b = kernels.cross_entropy_bwd(one, x, q, y, v, lse, count, *how, False, True)
    assert none.numel() == nothing.numel() == 0 and torch.equal(a, dx)
    torch.testing.assert_close(b, dq)


@pytest.mark.parametrize("name", ["fp32", "bf16-last", "wide-few", "many-classes"])
def test_two_runs_agree_bit_for_bit(name):
    x, q, y, v = make(**CASES[name])
    def run():
        parts = kernels.cross_entropy_fwd(x, q, y, v, "cosine", 5., 255, "mean")
        return *parts, *kernels.cross_entropy_bwd(torch.ones((), device=DEVICE), x, q, y, v, *parts[1:], "cosine", 5., 255, "mean", True, True)
    for a, b in zip(run(), run()): assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(reduction):
    """All ignored, then no class of those asked for exists: loss 0, gradients exactly 0."""
    x, q, y, _ = make(**CASES["fp32-own"])
    nobody = torch.zeros(19, dtype=torch.bool, device=DEVICE)
    nobody[18] = True
    for labels, v in ((torch.full_like(y, 255), None), (y.clamp(max=17), nobody)):
        parts = kernels.cross_entropy_fwd(x, q, labels, v, "cosine", 5., 255, reduction)
        up = torch.ones(parts[0].shape, device=DEVICE)
        dx, dq = kernels.cross_entropy_bwd(up, x, q, labels, v, *parts[1:], "cosine", 5., 255, reduction, True, True)
        assert (parts[0] == 0).all() and parts[2] == 0 and (dx == 0).all() and (dq == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_corners_of_the_metrics(metric):
    """Zero pixel, pixel on a prototype, zero prototype, tiny norms: what the reference says, and nothing infinite."""
    x = torch.zeros(1, 3, 1, 4, device=DEVICE)
    x[0, :, 0, 1] = torch.tensor([1., -2., 3.])
    x[0, :, 0, 2] = 1e-20
    x[0, :, 0, 3] = 1e-14
    q = torch.stack([torch.tensor([1., -2., 3.]), torch.zeros(3), torch.full((3,), 1e-20), torch.full((3,), 1e-14)]).to(DEVICE)
    z, want = (m.logits_fwd(x, q, metric, 2., 1e-12) for m in (kernels, plain))
    torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-3 if metric == "euclidean" else 1e-6)
    g = torch.ones_like(z)
    for mine, theirs in zip(kernels.logits_bwd(g, x, q, metric, 2., 1e-12, True, True), plain.logits_bwd(g, x, q, metric, 2., 1e-12)):
        assert mine.isfinite().all()
        if metric != "euclidean": torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    if metric == "cosine": assert (z[..., 0] == 0).all() and (z[:, 1] == 0).all()


def test_guard_of_the_norm():
    """Norms below eps count as eps, and no gradient goes through the guard."""
    x, q, *_ = make(**CASES["fp32"])
    got, want = ([m.logits_fwd(x, q, "cosine", 1., 50.), *m.logits_bwd(torch.ones(1, 19, 17, 33, device=DEVICE), x, q, "cosine", 1., 50., True, True)]
                 for m in (kernels, plain))
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ties_go_to_the_lowest_index():
    x = rand(1, 5, 3, 4).float().to(DEVICE)
    q = rand(1, 5, seed=1).float().to(DEVICE).expand(40, -1)
    for metric in METRICS:
        v = torch.ones(40, dtype=torch.bool, device=DEVICE)
        assert (kernels.nearest(x, q, None, metric)[0] == 0).all()
        v[:33] = False
        assert (kernels.nearest(x, q, v, metric)[0] == 33).all()
    label, score = kernels.nearest(x, q, torch.zeros(40, dtype=torch.bool, device=DEVICE), "cosine")
    assert (label == 0).all() and (score == -torch.inf).all()


@pytest.mark.parametrize("metric", METRICS)
def test_repeated_prototypes_share_one_candidate(metric):
    """Who takes part is what the reference says, for any K, shared prototypes and own ones; the winner never repeats an earlier row."""
    for K, C, own, each in ((7, 5, False, None), (19, 70, True, None), (19, 17, False, True), (40, 33, True, True), (150, 6, False, False)):
        rows = rand(*((2,) if own else ()), 4, C, seed=3).float().to(DEVICE)
        q = rows[..., torch.randint(4, (K,), generator=torch.Generator().manual_seed(K)).to(DEVICE), :]
        v = None if each is None else (rand(*((2,) if each else ()), K, seed=4) > -.3).to(DEVICE)
        taken = kernels.may_win(q, v)
        assert torch.equal(taken.expand(2, K), plain.may_win(q, v).expand(2, K)) and (taken.sum(-1) <= 4).all()
        label, _ = kernels.nearest(rand(2, C, 3, 7, seed=5).float().to(DEVICE), q, v, metric)
        assert taken.expand(2, K).gather(1, label.flatten(1)).all()


def test_ignoring_a_class_and_wild_labels():
    """ignore_index inside 0..K-1, negative ids, ids beyond 32 bits."""
    x, q, y, _ = make(**CASES["fp32-valid"])
    y = y.clone()
    y.view(-1)[:4] = torch.tensor([-1, -2**40, 2**32+1, 255], device=DEVICE)
    for ignored in (255, 3, -1):
        mine, theirs = (m.cross_entropy_fwd(x, q, y, None, "dot", .1, ignored, "sum") for m in (kernels, plain))
        assert mine[2] == theirs[2]
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-4)


def test_huge_logits_stay_finite():
    x, q, y, v = make(**CASES["fp32-valid"])
    how = "dot", 1e4, 255, "mean"
    parts = kernels.cross_entropy_fwd(x, q, y, v, *how)
    dx, dq = kernels.cross_entropy_bwd(torch.ones((), device=DEVICE), x, q, y, v, *parts[1:], *how, True, True)
    assert parts[0].isfinite() and dx.isfinite().all() and dq.isfinite().all()
    torch.testing.assert_close(parts[0], plain.cross_entropy_fwd(x, q, y, v, *how)[0], rtol=1e-5, atol=1e-2)


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch):
    """The cross-entropy allocates its gradients, some numbers a pixel, and partial sums of bounded size."""
    made = []
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "zeros"), (torch.Tensor, "new_empty")):
        make_one = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=make_one, **k: (made.append(_f(*a, **k)), made[-1])[1])
    x, q = torch.empty(2, 256, 128, 256, device="meta", dtype=BF), torch.empty(19, 256, device="meta")
    y = torch.empty(2, 128, 256, device="meta", dtype=torch.int64)
    made.clear()
    monkeypatch.setattr(common, "launch", lambda *a, **k: None)
    parts = kernels.cross_entropy_fwd(x, q, y, None, "cosine", 5., 255, "mean")
    forward = sum(t.nbytes for t in made)
    kernels.cross_entropy_bwd(torch.empty((), device="meta"), x, q, y, None, *parts[1:], "cosine", 5., 255, "mean", True, True)
    extra = sum(t.nbytes for t in made)-x.nbytes
    assert forward <= 4*y.numel()+200e3 and extra < .15*x.nbytes, (forward, extra)
