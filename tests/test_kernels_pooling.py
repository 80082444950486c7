"""The pooling kernels against the plain reference in float64: every shape, layout and type a user can bring."""
import pytest
import torch

from protonb.kernels import common
from protonb.kernels.pooling import PARTIAL_BYTES, pool_bwd, pool_fwd
from protonb.pooling import masked_average_pool_ref
from kernel_inputs import BF, DEVICE, FULL, HALF, ids, laid_out, rand

pytestmark = pytest.mark.usefixtures("poison")
NAMES = "prototypes", "mass", "dx", "dmasks", "dweights"


def make(B, C, h, w, K, dtype=FULL, layout="plain", soft=None, weights=None, y=torch.int64, strided=False):
    """Features, labels or soft masks, weights; `soft` and `weights` are their types."""
    x = laid_out((rand(B, C, h, w)+.5).to(dtype).to(DEVICE), layout)
    if soft:
        labels = (rand(B, K, h, w, seed=1).abs()*(ids(B, 1, h, w, K=K, seed=2) != 255)).to(soft)
        if K > 2: labels[:, K-1] = 0
    else: labels = ids(B, h, w, K=K).to(y)
    labels = labels.to(DEVICE)
    v = None if weights is None else rand(B, h, w, seed=3).abs().to(weights).to(DEVICE)
    if strided:                                                        # what labels_on_grid returns: a view with gaps
        labels = labels.repeat_interleave(3, -1).repeat_interleave(2, -2)[..., ::2, ::3]
        v = None if v is None else laid_out(v[None], "turned")[0]
    return x, labels, v


def expected(x, labels, weights, K, g, gm, wide=False, **kw):
    """The reference and its gradients by autograd, in the given types or (`wide`) in float64 on the same numbers."""
    def leaf(t):
        if t is None or not t.is_floating_point(): return t
        return (t.double() if wide else t).detach().clone().requires_grad_()
    leaves = x, labels, weights = leaf(x), leaf(labels), leaf(weights)
    if not labels.is_floating_point(): labels = labels.long()          # PyTorch compares uint8 with 256 as if it were 0
    p, mass = masked_average_pool_ref(x, labels, K, weights=weights, **kw)
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad((p*g).sum()+(mass*gm).sum(), inputs))
    return p, mass, *(None if t is None or not t.requires_grad else next(grads) for t in leaves)


def got(x, labels, weights, K, g, gm, ignore_index=255, per_image=False, eps=0.):
    p, mass = pool_fwd(x, labels, weights, K, ignore_index, per_image, eps)
    need = True, labels.is_floating_point(), weights is not None
    grads = pool_bwd(g, gm, x, labels, weights, p, mass, ignore_index, per_image, eps, *need)
    for n, d, t in zip(need, grads, (x, labels, weights)):
        if not n: assert d.numel() == 0
        else: assert d.dtype == t.dtype and d.shape == t.shape and d.stride() == torch.empty_like(t).stride()
    return p, mass, *(d if n else None for n, d in zip(need, grads))


def check(x, labels, weights, K, **kw):
    """Kernel error at most twice that of PyTorch; returns what the kernels say."""
    rows = (len(x), K) if kw.get("per_image") else (K,)
    g, gm = rand(*rows, x.shape[1], seed=4).float().to(DEVICE), rand(*rows, seed=5).float().to(DEVICE)
    mine = got(x, labels, weights, K, g, gm, **kw)
    truth, theirs = (expected(x, labels, weights, K, g, gm, wide=wide, **kw) for wide in (True, False))
    for name, a, b, t in zip(NAMES, mine, theirs, truth):
        if a is None: continue
        assert a.shape == t.shape and a.isfinite().all(), name
        if name in NAMES[:2]: assert a.dtype == torch.float32 and a.is_contiguous()
        err, own, size = ((v.double()-t).abs().max().item() for v in (a, b, torch.zeros_like(t)))
        stored = torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 0
        said = f"{name}: kernel off by {err:.1e}, PyTorch by {own:.1e}, largest {size:.1e}"
        assert err <= 2*own+(1e-6+stored)*size, said
    return mine


CASES = {
    "one-pixel": dict(B=1, C=1, h=1, w=1, K=1),
    "one-pixel-many": dict(B=3, C=130, h=1, w=1, K=19, dtype=BF, layout="last"),
    "one-row": dict(B=2, C=3, h=1, w=33, K=2, weights=FULL),
    "one-column": dict(B=2, C=3, h=33, w=1, K=2, soft=FULL, layout="last"),
    "plain-fp32": dict(B=1, C=64, h=17, w=33, K=19),
    "plain-bf16": dict(B=2, C=64, h=17, w=33, K=19, dtype=BF),
    "plain-fp16": dict(B=1, C=130, h=17, w=33, K=2, dtype=HALF),
    "aligned-bf16": dict(B=2, C=64, h=16, w=32, K=19, dtype=BF),       # whole vectors: the largest tiles
    "aligned-fp32": dict(B=2, C=64, h=16, w=32, K=19),
    "last-fp32": dict(B=2, C=130, h=9, w=11, K=19, layout="last"),
    "last-bf16": dict(B=2, C=64, h=17, w=33, K=19, dtype=BF, layout="last"),
    "last-fp16": dict(B=1, C=256, h=17, w=33, K=19, dtype=HALF, layout="last"),
    "wide-last": dict(B=1, C=2048, h=5, w=7, K=19, dtype=BF, layout="last"),
    "wide-fp32": dict(B=1, C=2048, h=5, w=7, K=3),
    "crop-fp32": dict(B=2, C=3, h=17, w=33, K=19, layout="crop"),
    "crop-last-bf16": dict(B=2, C=64, h=17, w=33, K=19, dtype=BF, layout="crop-last"),
    "turned": dict(B=2, C=3, h=9, w=11, K=2, layout="turned", weights=FULL, strided=True),
    "expanded": dict(B=3, C=64, h=9, w=11, K=19, dtype=BF, layout="expanded"),
    "strided-labels": dict(B=2, C=64, h=17, w=33, K=19, dtype=BF, strided=True),
    "150-classes": dict(B=1, C=64, h=17, w=33, K=150),
    "150-soft": dict(B=2, C=64, h=9, w=11, K=150, dtype=BF, soft=FULL, weights=BF),
    "256-classes": dict(B=1, C=3, h=17, w=33, K=256, dtype=HALF, y=torch.uint8),
    "weights-fp32": dict(B=1, C=64, h=17, w=33, K=19, weights=FULL),
    "weights-bf16": dict(B=2, C=130, h=9, w=11, K=19, dtype=BF, weights=BF),
    "weights-fp16": dict(B=2, C=64, h=17, w=33, K=2, dtype=HALF, weights=HALF, layout="last"),
    "soft-fp32": dict(B=2, C=64, h=9, w=11, K=19, soft=FULL),
    "soft-bf16": dict(B=2, C=64, h=17, w=33, K=2, dtype=BF, soft=BF, layout="last"),
    "soft-fp16": dict(B=1, C=64, h=9, w=11, K=19, dtype=HALF, soft=FULL),
    "soft-strided": dict(B=2, C=64, h=9, w=11, K=5, soft=HALF, weights=FULL, layout="crop", strided=True),
    "long-runs": dict(B=1, C=64, h=65, w=129, K=19, dtype=BF),
    "long-runs-soft": dict(B=2, C=64, h=17, w=33, K=19, dtype=HALF, soft=FULL, weights=FULL),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_reference(name, monkeypatch):
    # one processor: a program walks from image to image; many: a tile or two each
    n = 1 if "long" in name or "150" in name else 132 if "plain" in name else 8
    monkeypatch.setattr(common, "processors", lambda device: n)
    check(*make(**CASES[name]), CASES[name]["K"])


@pytest.mark.parametrize("per_image", [False, True], ids=["together", "per-image"])
@pytest.mark.parametrize("kind", ["hard", "weights", "soft", "soft-weights"])
@pytest.mark.parametrize("eps", [0., .5], ids=["no-eps", "eps"])
def test_every_flag(kind, per_image, eps, monkeypatch):
    monkeypatch.setattr(common, "processors", lambda device: 4)
    soft, weights = FULL if "soft" in kind else None, FULL if "weights" in kind else None
    check(*make(3, 20, 9, 13, 5, BF, soft=soft, weights=weights), 5, per_image=per_image, eps=eps)


@pytest.mark.parametrize("y", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_any_type(y):
    x, labels, _ = make(1, 3, 9, 11, 19, y=torch.int64)
    labels[0, 0, :4] = torch.tensor([-1, 19, 100, -128])
    labels = labels.where(labels != 255, 19).to(y)
    want = check(x, labels.long(), None, 19, ignore_index=7)                       # a class that is ignored
    assert want[1][7] == 0 and want[1].sum() < 99
    for a, b in zip(check(x, labels, None, 19, ignore_index=7), want): assert a is b or torch.equal(a, b)


def test_numbers_that_would_fit_if_cut_off():
    x, labels, _ = make(1, 3, 9, 11, 19)
    far = torch.where(labels == 255, 2**32+3, labels)
    for ignore_index in (255, -100, 2**32+3, 1, 0):
        a, b = (check(x, t, None, 19, ignore_index=ignore_index) for t in (labels, far))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", ["hard", "weights", "soft", "soft-weights"])
def test_nothing_counts(kind):
    """All ignored, masks or weights of zero: no mass, zero prototypes, finite gradients, none for the features."""
    soft, weights = FULL if "soft" in kind else None, FULL if "weights" in kind else None
    x, labels, weights = make(2, 20, 9, 13, 5, BF, soft=soft, weights=weights)
    if kind == "soft-weights": weights.zero_()
    else: labels.fill_(0 if "soft" in kind else 255)
    p, mass, dx, *_ = check(x, labels, weights, 5)
    assert not p.any() and not mass.any() and not dx.any()


@pytest.mark.parametrize("dtype", [BF, HALF, FULL], ids=str)
def test_what_is_ignored_gets_and_gives_nothing(dtype):
    x, labels, weights = make(2, 20, 9, 13, 5, dtype, weights=FULL)
    out = labels == 255
    p, mass, dx, _, dweights = check(x, labels, weights, 5)
    assert not dx.movedim(1, -1)[out].any() and not dweights[out].any() and dweights[~out].all()
    weights[out] = float("nan")                                        # a weight there is not even looked at
    q, again, dx, _, dweights = got(x, labels, weights, 5, torch.ones_like(p), torch.ones_like(mass))
    assert torch.equal(p, q) and torch.equal(mass, again)
    assert not dx.movedim(1, -1)[out].any() and not dweights[out].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [FULL, BF], ids=str)
def test_masses_near_zero(dtype, scale):
    x, labels, weights = make(2, 20, 9, 13, 5, dtype, weights=FULL)
    check(x, labels, weights*scale, 5)
    x, labels, weights = make(2, 20, 9, 13, 5, dtype, soft=FULL, weights=FULL)
    check(x, labels, weights*scale, 5)
    check(x, labels, weights*scale, 5, eps=scale)


def test_only_what_is_asked():
    x, labels, weights = make(2, 20, 9, 13, 5, soft=FULL, weights=FULL)
    p, mass = pool_fwd(x, labels, weights, 5, 255, True, .1)
    g, gm = torch.ones((), device=DEVICE).expand_as(p), rand(2, 5).float().to(DEVICE)  # as .sum().backward() gives it
    tail = x, labels, weights, p, mass, 255, True, .1
    everything = pool_bwd(g, gm, *tail, True, True, True)
    for need in ([True, False, False], [False, True, False], [False, False, True], [False, True, True]):
        for n, a, b in zip(need, pool_bwd(g, gm, *tail, *need), everything):
            assert torch.equal(a, b) if n else a.numel() == 0 and a.dtype == x.dtype
    nothing, zero = (pool_bwd(g, t, *tail, True, True, True) for t in (None, torch.zeros_like(gm)))
    for a, b in zip(nothing, zero): assert torch.equal(a, b)
    turned = g.clone().mT.contiguous().mT
    assert torch.equal(pool_bwd(turned, gm, *tail, True, False, False)[0], everything[0])


@pytest.mark.parametrize("kind", ["hard", "soft-weights"])
def test_two_runs_are_equal(kind):
    more = FULL if "soft" in kind else None
    x, labels, weights = make(2, 64, 9, 11, 19, BF, soft=more, weights=more)
    g, gm = rand(19, 64).float().to(DEVICE), rand(19).float().to(DEVICE)
    first, second = (got(x, labels, weights, 19, g, gm) for _ in range(2))
    for a, b in zip(first, second): assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("B,C,h,w,K,per_image", [
    (2, 256, 128, 256, 19, False), (2, 2048, 65, 129, 19, False), (2, 256, 512, 1024, 19, False),
    (8, 256, 128, 256, 19, True), (2, 256, 128, 256, 150, False), (1, 1, 1, 1, 1, False), (300, 3, 5, 7, 256, True),
    (300, 3, 5, 7, 256, False), (1, 2048, 9, 9, 256, False), (5, 64, 33, 65, 4, True)])
def test_the_plan(B, C, h, w, K, per_image, monkeypatch):
    """Every tile belongs to one program, none is idle, what lies between the kernels stays small."""
    for dtype in (BF, FULL):
        for layout in ("plain", "last"):
            seen = []
            monkeypatch.setattr(common, "launch", lambda kernel, grid, **kw: seen.append((grid, kw)))
            x = laid_out(torch.empty(B, C, h, w, dtype=dtype, device="meta"), layout)
            labels = torch.empty(B, h, w, dtype=torch.int64, device="meta")
            p, mass = pool_fwd(x, labels, None, K, 255, per_image, 0.)
            pool_bwd(p, mass, x, labels, None, p, mass, 255, per_image, 0., True, False, False)
            (fwd, a), (_, b), (bwd, c) = seen
            for grid, kw in ((fwd, a), (bwd, c)):
                groups = B if per_image else 1
                assert kw["T"] == -(-h*w//kw["BLOCK_N"]) and kw["G"]*groups == B*kw["T"] and grid[1] == groups*kw["R"]
                assert (kw["R"]-1)*kw["STEPS"] < kw["G"] <= kw["R"]*kw["STEPS"]
                assert grid[0]*grid[1] <= max(3*132, grid[0]*groups)               # all at once where that is possible
            assert b["BLOCK_R"] >= min(128, b["R"]) and a["p_sums"].shape == (fwd[1], K, C)
            assert a["p_sums"].nbytes <= max(PARTIAL_BYTES, p.nbytes, 4*K*C*(132//fwd[0]))
            if K == 19 and not per_image: assert a["p_sums"].nbytes+a["p_masses"].nbytes < 2.1e6
