"The plain PyTorch contrast against its formula written out, in every corner a training run gets into."
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from protonb import contrast
from protonb.contrast import class_runs, contrast_bwd, contrast_fwd, prototype_contrast_ref

WHOLE = contrast._tile_shape


@pytest.fixture(autouse=True, params=[False, True], ids=['one-tile', 'many-tiles'])
def tiles(request, monkeypatch, poison):
    "Everything runs twice: in one tile, and in tiles of five queries and seven keys; unwritten memory is NaN."
    if request.param: monkeypatch.setattr(contrast, '_tile_shape', lambda bank: (5, 7))
    return request.param


def rand(*shape, seed=0, dtype=torch.float64, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


def ids(n, classes, seed=0, ignored=.2):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    return torch.where(torch.rand(n, generator=g) < ignored, 255, y)


def case(N=23, M=31, C=5, classes=4, grad=True):
    "Unsorted, some ignored on both sides; the last class of the queries is nobody's in the bank."
    return rand(N, C, grad=grad), ids(N, classes+1), rand(M, C, seed=1, grad=grad), ids(M, classes, seed=1)


def loop(q, y, k, t, tau, weights=None, ignore=255):
    "The formula, one query and one positive at a time -> loss (N,), who counts (N,)."
    losses, counts = [], []
    for x, c in zip(q, y.tolist()):
        pos = [j for j, d in enumerate(t.tolist()) if c == d and c >= 0 and c != ignore]
        neg = [j for j, d in enumerate(t.tolist()) if c != d and d >= 0 and d != ignore and (weights is None or weights[j] > 0)]
        s = k @ x/tau
        z = s[neg] if weights is None else s[neg]+weights[neg].to(s.dtype).log()
        each = [torch.cat([s[p:p+1], z]).logsumexp(0)-s[p] for p in pos]
        losses.append(sum(each)/len(each) if each else (s.sum()*0 if len(s) else x.sum()*0))
        counts.append(bool(pos))
    return torch.stack(losses) if losses else q.sum(1), torch.tensor(counts, dtype=torch.bool)


def close(a, b, ratio=1e-12):
    assert a.shape == b.shape
    assert (a-b).abs().max() <= ratio*b.abs().max().clamp(min=1e-30), ((a-b).abs().max().item(), b.abs().max().item())


# ------------------------------------------------------------------------------------------------ the definition

@pytest.mark.parametrize('weighted', [False, True], ids=['plain', 'weighted'])
@pytest.mark.parametrize('N, M, C, classes', [(23, 31, 5, 4), (1, 31, 5, 4), (23, 1, 5, 1), (1, 1, 1, 1), (64, 7, 3, 19), (9, 40, 2, 1)])
def test_is_its_definition(N, M, C, classes, weighted):
    q, y, k, t = case(N, M, C, classes)
    w = torch.rand(M, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    want, counts = loop(q, y, k, t, .3, w)
    got = prototype_contrast_ref(q, y, k, t, temperature=.3, key_weights=w, reduction='none')
    close(got, want)
    up = rand(N, seed=3)
    for a, b in zip(torch.autograd.grad(got, (q, k), up), torch.autograd.grad(want, (q, k), up)): close(a, b)
    total = got.sum()
    close(prototype_contrast_ref(q, y, k, t, temperature=.3, key_weights=w, reduction='sum'), total)
    close(prototype_contrast_ref(q, y, k, t, temperature=.3, key_weights=w), total/max(1, int(counts.sum())))
    assert torch.equal(contrast_fwd(q, y, k, t, w, .3, 255, False)[1], counts)


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_gradcheck(reduction):
    q, y, k, t = case(9, 13, 3)
    w = torch.rand(13, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w[3] = 0
    def f(q, k): return prototype_contrast_ref(q, y, k, t, temperature=.7, key_weights=w, reduction=reduction)
    assert torch.autograd.gradcheck(f, (q, k))


def test_order_does_not_matter():
    q, y, k, t = case()
    a, b = torch.randperm(23), torch.randperm(31)
    w = torch.rand(31, dtype=torch.float64)
    want = prototype_contrast_ref(q, y, k, t, key_weights=w, reduction='none')
    close(prototype_contrast_ref(q[a], y[a], k[b], t[b], key_weights=w[b], reduction='none'), want[a])


def test_class_runs():
    y, t = torch.tensor([4, 1, 255, 9, 1, -3, 0]), torch.tensor([1, 4, 255, 4, -1, 2, 1, 4])
    qi, ki, runs = class_runs(y, t, 255)
    assert qi.tolist() == [1, 4, 0] and ki.tolist() == [0, 6, 5, 1, 3, 7]
    assert runs == [[0, 2, 0, 2], [2, 3, 3, 6]]
    assert class_runs(y[:0], t, 255)[2] == class_runs(y, t[:0], 255)[2] == []


# ------------------------------------------------------------------------------------------------ corners

def nothing(q, y, k, t, **kwargs):
    "Loss and both gradients are exactly zero."
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    for reduction in ('mean', 'sum', 'none'):
        loss = prototype_contrast_ref(q, y, k, t, reduction=reduction, **kwargs)
        assert loss.shape == ((len(q),) if reduction == 'none' else ()) and not loss.any()
        for g in torch.autograd.grad(loss.sum(), (q, k)): assert not g.any() and not g.isnan().any()


def test_nobody_counts():
    q, y, k, t = case(grad=False)
    nothing(q, y+50, k, t)                                # classes the bank lacks
    nothing(q, torch.full_like(y, 255), k, t)
    nothing(q, torch.full_like(y, -1), k, torch.full_like(t, -1))
    nothing(q, y, k, torch.full_like(t, 255))
    nothing(q[:0], y[:0], k, t)
    nothing(q, y, k[:0], t[:0])
    nothing(q[:0], y[:0], k[:0], t[:0])


def test_no_negatives_no_loss():
    q, y, k, t = case(grad=False)
    nothing(q, y*0, k, t*0)
    nothing(q, y, k, t, key_weights=torch.zeros(31))
    loss, counts, _, stats = contrast_fwd(q, y*0, k, t*0, None, .1, 255, True)
    assert counts.all() and torch.isneginf(stats[:, 0]).all() and not stats[:, 1].any()


def test_weight_is_a_count_and_zero_takes_out():
    q, y, k, t = case(grad=False)
    w = torch.arange(31)%4
    t0 = torch.where((w == 0) & (t != 2), 255, t)         # a weight does not matter to a key as a positive
    j = torch.arange(31).repeat_interleave(w)
    mine = y == 2
    copies = [torch.cat([x[t == 2], x[j][t[j] != 2]]) for x in (k, t)]
    want = prototype_contrast_ref(q[mine], y[mine], *copies, reduction='none')
    close(prototype_contrast_ref(q[mine], y[mine], k, t, key_weights=w.double(), reduction='none'), want)
    close(prototype_contrast_ref(q[mine], y[mine], k, t0, key_weights=w.double(), reduction='none'), want)


def test_ignored_are_not_looked_at():
    q, y, k, t = case(grad=False)
    q[y == 255], k[t == 255] = math.nan, math.nan
    q.requires_grad_(), k.requires_grad_()
    loss = prototype_contrast_ref(q, y, k, t)
    dq, dk = torch.autograd.grad(loss, (q, k))
    assert loss.isfinite() and dq.isfinite().all() and dk.isfinite().all() and not dq[y == 255].any() and not dk[t == 255].any()


def test_another_ignore_index():
    q, y, k, t = case(grad=False)
    a = prototype_contrast_ref(q, y, k, t, ignore_index=2, reduction='none')
    close(a, loop(q, y, k, t, .1, ignore=2)[0])           # 255 is then a class like any other
    close(prototype_contrast_ref(q, torch.where(y == 255, -7, y), k, torch.where(t == 255, -1, t)), prototype_contrast_ref(q, y, k, t))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_width(dtype):
    q, y, k, t = case(grad=False)
    y, t = torch.where(y == 255, 100, y), torch.where(t == 255, 100, t)
    want = prototype_contrast_ref(q, y, k, t, ignore_index=100)
    assert torch.equal(prototype_contrast_ref(q, y.to(dtype), k, t.to(dtype), ignore_index=100), want)
    if dtype == torch.int64: assert torch.equal(prototype_contrast_ref(q, y*10**15, k, t*10**15, ignore_index=10**17), want)
    if dtype == torch.uint8: assert torch.equal(prototype_contrast_ref(q, (y+155).to(dtype), k, (t+155).to(dtype)), want)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('size', [1e-6, 1., 1e2, 3e3])
def test_scores_of_any_size(size, dtype):
    "Up to about a hundred million: finite, right, and the same gradient as the formula's."
    q, y, k, t = case(grad=False)
    q, k = (size*q).to(dtype), (size*k).to(dtype)
    truth, wide = (q.double().requires_grad_(), k.double().requires_grad_()), (q.requires_grad_(), k.requires_grad_())
    want, got = loop(truth[0], y, truth[1], t, .1)[0], prototype_contrast_ref(q, y, k, t, temperature=.1, reduction='none')
    ratio = 1e-11 if dtype == torch.float64 else 3e-6
    close(got.double(), want, ratio)
    if size < 1e2 or dtype == torch.float64:              # beyond, who is the closest negative hangs on the last bits of float32
        for a, b in zip(torch.autograd.grad(got.sum(), wide), torch.autograd.grad(want.sum(), truth)): close(a.double(), b, ratio)
    else: assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), wide))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_computes_in_float32(dtype):
    q, y, k, t = case(grad=False)
    q, k = F.normalize(q, dim=1).to(dtype), F.normalize(k, dim=1).to(dtype)
    a, b = (q.clone().requires_grad_(), k.clone().requires_grad_()), (q.float().requires_grad_(), k.float().requires_grad_())
    with torch.autocast('cpu', dtype=torch.bfloat16): got = prototype_contrast_ref(a[0], y, a[1], t)
    want = prototype_contrast_ref(b[0], y, b[1], t)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    for u, v in zip(torch.autograd.grad(got, a), torch.autograd.grad(want, b)):
        assert u.dtype == dtype
        close(u.float(), v, 2*torch.finfo(dtype).eps)


def test_long_sums_stay_exact(tiles):
    "Ten thousand equal keys, then queries, all pulling one way: loss and gradients within 2^-18 of float64."
    if tiles: pytest.skip('ten thousand rows in tiles of five take minutes')
    for N, M in ((3, 10_000), (10_000, 3)):
        q, k = torch.linspace(.1, .2, 8).expand(N, 8), torch.linspace(.2, .1, 8).repeat(M, 1)
        y, t = torch.zeros(N, dtype=torch.long), torch.ones(M, dtype=torch.long)
        k[0], t[0] = -k[0], 0                                            # the one that pulls
        def run(dtype):
            a, b = (v.to(dtype).clone().requires_grad_() for v in (q, k))
            loss = prototype_contrast_ref(a, y, b, t, temperature=1., reduction='sum')
            return loss, *torch.autograd.grad(loss, (a, b))
        for got, want in zip(run(torch.float32), run(torch.float64)): close(got.double(), want, 2**-18)


@pytest.mark.parametrize('layout', ['transposed', 'crop', 'expanded'])
def test_layouts(layout):
    def lay(x):
        if layout == 'transposed': return x.T.contiguous().T
        if layout == 'crop': return torch.zeros(2*len(x), x.shape[1]+3, dtype=x.dtype)[1::2, 2:-1].copy_(x)
        return x[:1].expand(len(x), -1)
    q, y, k, t = case(grad=False)
    a, b = lay(q).requires_grad_(), lay(k).requires_grad_()
    c, d = (x.detach().contiguous().requires_grad_() for x in (a, b))
    y2, t2 = torch.stack([y, y], 1)[:, 0], torch.stack([t, t], 1)[:, 0]
    got, want = prototype_contrast_ref(a, y2, b, t2), prototype_contrast_ref(c, y, d, t)
    assert not a.is_contiguous() and not b.is_contiguous() and not y2.is_contiguous()
    close(got, want)
    for u, v in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (c, d))): close(u, v)


# ------------------------------------------------------------------------------------------------ autograd

def test_backward_twice():
    q, y, k, t = case()
    loss = prototype_contrast_ref(q, y, k, t, reduction='none')
    up = rand(23, seed=3)
    first = torch.autograd.grad(loss, (q, k), up, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (q, k), 2*up)
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b) and a.data_ptr() != c.data_ptr()
        close(c, 2*b)


@pytest.mark.parametrize('who', ['queries', 'keys', 'nobody', 'no_grad'])
def test_only_what_is_wanted(who, monkeypatch):
    q, y, k, t = case(grad=False)
    q.requires_grad_(who in ('queries', 'no_grad')), k.requires_grad_(who == 'keys')
    asked, real = [], contrast.contrast_fwd
    monkeypatch.setattr(contrast, 'contrast_fwd', lambda *a: (asked.append(a[-1]), real(*a))[1])
    monkeypatch.setattr(contrast, 'contrast_bwd', lambda *a: (asked.append('keys'), contrast_bwd(*a))[1])
    with torch.set_grad_enabled(who != 'no_grad'): loss = prototype_contrast_ref(q, y, k, t)
    if loss.requires_grad: loss.backward()
    assert asked == dict(queries=[True], keys=[False, 'keys'], nobody=[False], no_grad=[False])[who]
    assert (q.grad is not None) == (who == 'queries') and (k.grad is not None) == (who == 'keys')


def test_weights_get_no_gradient_and_second_derivatives_are_refused():
    q, y, k, t = case()
    w = torch.ones(31, dtype=torch.float64, requires_grad=True)
    loss = prototype_contrast_ref(q, y, k, t, key_weights=w)
    assert torch.autograd.grad(loss, w, retain_graph=True, allow_unused=True) == (None,)
    g, = torch.autograd.grad(loss.square(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


# ------------------------------------------------------------------------------------------------ memory

@pytest.mark.own_blas
def test_the_table_is_never_stored(tiles, monkeypatch):
    "Peak beyond the gradients stays far below one (N,M) table, which this batch needs 49 MB for."
    if tiles: pytest.skip('tiles of the real size')
    monkeypatch.setattr(contrast, '_tile_shape', WHOLE)
    q, k = (rand(n, 16, dtype=torch.float32, seed=n, grad=True) for n in (2048, 6000))
    y, t = ids(2048, 19), ids(6000, 19)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: prototype_contrast_ref(q, y, k, t).backward()
    now = peak = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    assert q.nbytes+k.nbytes < peak < 12e6
