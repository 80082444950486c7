"protonb.ops against the formulas written out, in every corner a training run gets into."
import importlib.util
import math
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from protonb import distance, pooling
from protonb.distance import METRICS
from protonb.ops import (logits_cross_entropy, masked_average_pool, nearest_prototype, pool_and_pass, prototype_contrast,
                         prototype_cross_entropy, prototype_logits, soft_neighbourhood_density, use_backend)
from protonb.pooling import grid_masks, labels_on_grid, soft_masks

spec = importlib.util.spec_from_file_location('dip_head', Path(__file__).parents[1]/'benchmarks'/'dip_head.py')
dip_head = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dip_head)


@pytest.fixture(autouse=True, params=[4<<20, 1], ids=['one-tile', 'many-tiles'])
def tile_bytes(request, monkeypatch):
    "Everything runs twice: with tiles larger than these inputs, and cut into tiles of 64 pixels and bands of one row."
    monkeypatch.setitem(pooling.TILE_BYTES, 'cpu', request.param)
    return request.param


def rand(*shape, seed=0, dtype=torch.float64, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=['nchw', 'channels_last'])
def layout(request):
    "Puts a map in one of the two orders; the result is a leaf where the map was."
    return lambda x: x.detach().contiguous(memory_format=request.param).requires_grad_(x.requires_grad)


def ids(*shape, classes, seed=0, ignored=.2):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < ignored, 255, y)


def close(a, b, ratio, floor=1e-30):
    "Largest difference over largest value."
    assert a.shape == b.shape and (a.detach()-b.detach()).abs().max() <= ratio*b.detach().abs().max().clamp(min=floor), \
        ((a-b).abs().max().item(), b.abs().max().item())


def loop_pool(x, y, K, weights=None, eps=0.):
    "Definition, one class and one pixel set at a time; y holds ids."
    rows, masses = [], []
    w = torch.ones(y.shape, dtype=x.dtype) if weights is None else weights
    for k in range(K):
        here = y == k
        m = w[here].sum()
        s = (x.movedim(1, -1)[here]*w[here][:, None]).sum(0)
        rows.append(s/(m+eps) if m+eps > 0 else torch.zeros_like(s))
        masses.append(m)
    return torch.stack(rows), torch.stack(masses)


def loop_logits(x, p, metric, eps=1e-12):
    "Definition, one class at a time; p (K,C) or (B,K,C)."
    p = p.expand(len(x), *p.shape[-2:])
    out = []
    for k in range(p.shape[1]):
        q = p[:, k, :, None, None]
        if metric == 'dot': z = (x*q).sum(1)
        elif metric == 'cosine': z = (x*q).sum(1)/(x.norm(dim=1).clamp(min=eps)*q.norm(dim=1).clamp(min=eps))
        else:
            z = -(x-q).square().sum(1)
            if metric == 'euclidean': z = -(-z).sqrt()
        out.append(z)
    return torch.stack(out, 1)


# ------------------------------------------------------------------------------------------------ DIP's head

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('form', ['ops', 'passed'])
def test_head_equals_the_per_class_form(form, dtype):
    features, yq, ys, K = dip_head.make_inputs(24, 9, 5)
    features = features.to(dtype)
    yq = torch.where(yq == 3, 255, yq)                                             # an entry the query lacks
    a, b = features.clone().requires_grad_(), features.clone().requires_grad_()
    want, got = dip_head.head_per_class(a, yq, ys, K), dip_head.FORMS[form](b, yq, ys, K)
    want.backward(), got.backward()
    close(got, want, 1e-6)
    close(b.grad, a.grad, 1e-5)
    for i in range(2): close(b.grad[i], a.grad[i], 1e-5)


@pytest.mark.parametrize('form', ['ops', 'passed'])
def test_order_of_entries_does_not_matter(form):
    features, yq, ys, K = dip_head.make_inputs(8, 9, 5)
    order = torch.full((256,), 255)
    order[:K] = torch.tensor([3, 0, 4, 1, 2])
    a = dip_head.FORMS[form](features.double(), yq, ys, K)
    b = dip_head.FORMS[form](features.double(), order[yq], order[ys], K)
    close(a, b, 1e-12)


def test_query_without_a_pixel_adds_nothing():
    features, yq, ys, K = dip_head.make_inputs(8, 9, 5)
    features.requires_grad_()
    loss = dip_head.head_passed(features, torch.full_like(yq, 255), ys, K)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()
    assert (features.grad[0] == 0).all() and (features.grad[1] != 0).any()


@pytest.mark.own_blas
def test_traversals_of_the_head(tile_bytes, monkeypatch):
    "At most two walks per image and direction; maps of 836 kB, tiles of 48 kB, a cache of 128 kB."
    if tile_bytes == 1: pytest.skip('sets its own tiles')
    monkeypatch.setitem(pooling.TILE_BYTES, 'cpu', 64<<10)
    C, n, K = 192, 33, 4
    inputs = dip_head.make_inputs(C, n, K)
    assert inputs[1].nbytes < C*n*n*4                                              # only maps are as large as a map
    fwd, bwd = dip_head.count_traversals(dip_head.head_passed, inputs, cache=128<<10)
    assert fwd.traversals() == pytest.approx([1, 2, 1.5], abs=.01)
    assert max(bwd.traversals()) <= 2.01 and min(bwd.traversals()) > .99
    assert fwd.written == [0, 0, 0] and bwd.read[2] == bwd.written[2] == 0         # no map besides the features and their gradients
    cold, _ = dip_head.count_traversals(dip_head.head_passed, inputs, cache=0)
    assert min(c-f for c, f in zip(cold.traversals(), fwd.traversals())) > .9      # without a cache the norm is a read of its own
    slow = dip_head.count_traversals(dip_head.head_per_class, inputs, cache=128<<10)
    assert min(c.traversals()[2] for c in slow) > 5*K                              # the counter does see a bad form


# ------------------------------------------------------------------------------------------------ labels on the grid

def test_stride_8_equals_the_resize_bit_for_bit():
    y = ids(1, 1025, 1025, classes=2)
    for k in range(2):
        theirs = F.interpolate((y == k).float()[:, None], size=(129, 129), mode='bilinear', align_corners=True)
        assert torch.equal(theirs[:, 0], (labels_on_grid(y, (129, 129)) == k).float())
        assert torch.equal(soft_masks(y, 2, (129, 129))[:, k], theirs[:, 0])


@pytest.mark.parametrize('size,grid', [((64, 101), (8, 13)), ((64, 101), (9, 26)), ((16, 32), (2, 4)), ((33, 33), (1, 1)), ((7, 9), (7, 9)),
                                       ((1, 1), (1, 1)), ((5, 6), (1, 3)), ((4, 4), (6, 7)), ((1, 5), (3, 3))])
def test_soft_masks_and_labels_equal_the_resize(size, grid):
    y = torch.where(ids(2, *size, classes=3) == 0, 0, 1) if size[0] < 8 else F.interpolate(
        ids(2, 1, (size[0]+7)//8, (size[1]+7)//8, classes=3).float(), size=size, mode='nearest')[:, 0].long()
    hot = torch.stack([(y == k) for k in (*range(3), 255)], 1).float()
    theirs = F.interpolate(hot, size=grid, mode='bilinear', align_corners=True)
    close(soft_masks(y, 3, grid), theirs[:, :3], 1e-6)
    ours = labels_on_grid(y, grid)
    assert ours.shape == (2, *grid) and ours.dtype == y.dtype
    for i, k in enumerate(range(3)): assert torch.equal(ours == k, theirs[:, i] >= 1-1e-6)


def test_labels_on_grid_keeps_uint8():
    y = ids(1, 20, 20, classes=3).to(torch.uint8)
    assert labels_on_grid(y, (7, 7)).dtype == labels_on_grid(y, (20, 20)).dtype == torch.uint8


# ------------------------------------------------------------------------------------------------ pooling

@pytest.mark.parametrize('B,C,h,w,K', [(2, 5, 3, 7, 4), (1, 1, 1, 1, 1), (1, 3, 1, 1, 4), (3, 1, 5, 2, 2), (1, 7, 13, 17, 1), (2, 4, 11, 13, 30)])
def test_pool_is_its_definition(B, C, h, w, K, layout):
    x, y, wt = layout(rand(B, C, h, w, grad=True)), ids(B, h, w, classes=K), rand(B, h, w, seed=3).abs()
    for weights in (None, wt):
        for eps in (0., 5e-4):
            got, want = masked_average_pool(x, y, K, weights=weights, eps=eps), loop_pool(x, y, K, weights, eps)
            close(got[0], want[0], 1e-12), close(got[1], want[1], 1e-12)
            up = rand(K, C, seed=5)
            close(*(torch.autograd.grad(v[0], x, up)[0] for v in (got, want)), 1e-12)
    p, m = masked_average_pool(x, y, K, per_image=True)
    assert p.shape == (B, K, C) and m.shape == (B, K)
    for b in range(B): close(p[b], loop_pool(x[b:b+1], y[b:b+1], K)[0], 1e-12)
    assert torch.equal(m.sum(0), masked_average_pool(x, y, K)[1])


def long_map(kind, layout, h, C=8):
    "Pixels far from zero, noise or every one the same; in 100,000 of them one chain of additions would be off by 1e-5 and more."
    x = rand(1, C, h, 400, seed=3)+3 if kind == 'noise' else torch.linspace(1, 2, C, dtype=torch.float64).view(1, C, 1, 1).expand(1, C, h, 400)
    return layout(x.float())


@pytest.mark.parametrize('kind', ['noise', 'same'])
def test_long_sums_stay_exact(kind, layout, tile_bytes):
    "Pools of ids, soft masks and weights, and the gradient of prototypes: within 2^-18 of float64, and the same to the last bit in every run."
    h = 250 if tile_bytes > 1 else 50                                              # tiny tiles are slow
    x, y = long_map(kind, layout, h), torch.zeros(1, h, 400, dtype=torch.long)
    y[0, :30] = 255
    soft = torch.stack([(y == 0)*.3, (y == 0)*.7], 1)
    for labels, weights in ((y, None), (y, torch.full((1, h, 400), .3)), (soft, None)):
        p, again = (masked_average_pool(x, labels, 2, weights=weights)[0] for _ in range(2))
        close(p[0].double(), x[:, :, 30:].double().mean((0, 2, 3)), 2**-18)
        assert torch.equal(p, again)
    for metric in ('dot', 'sqeuclidean'):
        q = torch.full((3, 8), .01)
        got, want = (grad_of_prototypes(x.to(t), q.to(t), y, metric) for t in (torch.float32, torch.float64))
        close(got.double(), want, 2**-18)


@pytest.mark.parametrize('grid', [(1, 1), (2, 1), (1, 3), (5, 9)], ids=str)
def test_long_sums_of_enlarged_logits_stay_exact(grid, tile_bytes):
    "The gradient of logits that are enlarged to 700,000 pixels of one class, all pulling one way."
    size = (512, 1400) if tile_bytes > 1 else (64, 350)
    z, y = torch.zeros(1, 2, *grid), torch.zeros(1, *size, dtype=torch.long)
    z[:, 0] = .1
    got, want = (torch.autograd.grad(logits_cross_entropy(u, y), u)[0] for u in (z.clone().requires_grad_(), z.double().requires_grad_()))
    close(got.double(), want, 2**-18)


def test_backward_inside_autocast_is_as_exact_as_outside():
    x, p, y = rand(1, 16, 9, 9, dtype=torch.float32, grad=True), rand(3, 16, seed=1, dtype=torch.float32, grad=True), ids(1, 17, 17, classes=3)
    q, k, t = rand(40, 16, seed=2, dtype=torch.float32, grad=True), rand(30, 16, seed=3, dtype=torch.float32, grad=True), torch.arange(70) % 3
    def grads():
        small = y[:, ::2, ::2]
        pooled, _, same = pool_and_pass(x, small, 3)
        loss = prototype_logits(x, p).square().sum() + prototype_cross_entropy(x, p, y) + prototype_cross_entropy(same, p, small) + pooled.sum()
        return torch.autograd.grad(loss + prototype_contrast(q, t[:40], k, t[40:]), (x, p, q, k))
    plain = grads()
    with torch.autocast('cpu', torch.bfloat16): auto = grads()
    for a, b in zip(auto, plain): close(a, b, 1e-6)


def grad_of_prototypes(x, q, y, metric):
    q.requires_grad_()
    return torch.autograd.grad(prototype_cross_entropy(x, q, y, metric=metric, reduction='sum'), q)[0]


def test_pool_of_soft_masks():
    x, y = rand(2, 5, 6, 7), ids(2, 41, 50, classes=3)
    m = soft_masks(y, 3, (6, 7)).double()
    p, mass = masked_average_pool(x, m, 3, eps=5e-4)
    for k in range(3):
        r = F.interpolate((y == k).double()[:, None], size=(6, 7), mode='bilinear', align_corners=True)
        close(p[k], (x*r).sum((0, 2, 3))/(r.sum()+5e-4), 1e-5)
    close(mass, m.sum((0, 2, 3)), 1e-12)


def test_pool_gradcheck():
    x, m, w = rand(2, 3, 3, 4, grad=True), rand(2, 4, 3, 4, seed=1).abs().requires_grad_(), rand(2, 3, 4, seed=2).abs().requires_grad_()
    y = ids(2, 3, 4, classes=3)
    for per_image in (False, True):
        assert torch.autograd.gradcheck(lambda x, m, w: masked_average_pool(x, m, 4, weights=w, eps=.1, per_image=per_image), (x, m, w))
        assert torch.autograd.gradcheck(lambda x, w: masked_average_pool(x, y, 4, weights=w, per_image=per_image), (x, w))


def test_absent_and_ignored_classes(layout):
    x, y = layout(rand(1, 4, 5, 5, grad=True)), torch.full((1, 5, 5), 255)
    p, mass = masked_average_pool(x, y, 3)
    assert (p == 0).all() and (mass == 0).all()
    p.sum().backward()
    assert (x.grad == 0).all()
    y[0, 0, 0] = 1
    _, mass = masked_average_pool(x, y, 3)
    assert mass.tolist() == [0, 1, 0]
    _, mass = masked_average_pool(x, y.clamp(max=2), 3, ignore_index=1)
    assert mass.tolist() == [0, 0, 24]                                             # an ignored id may be a class id
    weights = torch.zeros(1, 5, 5, dtype=torch.float64)
    p, mass = masked_average_pool(x, y, 3, weights=weights)
    assert (p == 0).all() and (mass == 0).all()


def test_pass_adds_both_gradients(layout):
    x, y = layout(rand(3, 4, 5, 6, grad=True)), ids(2, 5, 6, classes=3)
    m = rand(2, 3, 5, 6, seed=4).abs().requires_grad_()
    for labels in (y, m):
        def passed(): return pool_and_pass(x, labels, 3, images=slice(1, 3))
        def apart(): return *masked_average_pool(x[1:3], labels, 3), x
        grads = []
        for f in (passed, apart):
            p, _, same = f()
            loss = (p**2).sum()+(same**3).sum()
            grads.append(torch.autograd.grad(loss, (x, m) if labels is m else (x,)))
        for a, b in zip(*grads): close(a, b, 1e-12)
    p, _, same = passed()
    close(torch.autograd.grad(p.sum(), x)[0], torch.autograd.grad(apart()[0].sum(), x)[0], 1e-12)    # features not used again
    _, _, same = passed()
    assert torch.equal(torch.autograd.grad(same.sum(), x)[0], torch.ones_like(x))                      # prototypes not used
    assert same.data_ptr() == x.data_ptr()


# ------------------------------------------------------------------------------------------------ logits

@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('B,C,h,w,K', [(2, 5, 3, 7, 4), (1, 1, 1, 1, 1), (1, 7, 13, 17, 3), (2, 3, 11, 13, 20)])
def test_logits_are_their_definition(metric, B, C, h, w, K):
    x, shared, own = rand(B, C, h, w, grad=True), rand(K, C, seed=1, grad=True), rand(B, K, C, seed=2, grad=True)
    for p in (shared, own):
        got, want = prototype_logits(x, p, metric=metric, scale=3), 3*loop_logits(x, p, metric)
        close(got, want, 1e-12)
        up = rand(B, K, h, w, seed=3)
        for a, b in zip(torch.autograd.grad(got, (x, p), up), torch.autograd.grad(want, (x, p), up)): close(a, b, 1e-10, floor=1e-3)


@pytest.mark.parametrize('metric', METRICS)
def test_logits_gradcheck(metric):
    x, p, own = rand(2, 3, 3, 4, grad=True), rand(4, 3, seed=1, grad=True), rand(2, 4, 3, seed=1, grad=True)
    for q in (p, own): assert torch.autograd.gradcheck(lambda x, q: prototype_logits(x, q, metric=metric, scale=2.), (x, q))
    y, valid = ids(2, 5, 7, classes=4), torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda x, p: prototype_cross_entropy(x, p, y, metric=metric, scale=2., valid=valid), (x, p))
    assert torch.autograd.gradcheck(lambda x, p: prototype_cross_entropy(x, p, y[:, :3, :4], metric=metric), (x, p))


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_zeros_make_no_nan(metric, dtype):
    x, p = rand(1, 4, 3, 3, dtype=dtype), rand(3, 4, seed=1, dtype=dtype)
    x[0, :, 0, 0], x[0, :, 1, 1], p[1] = 0, p[0], 0
    x.requires_grad_(), p.requires_grad_()
    z = prototype_logits(x, p, metric=metric)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    z.sum().backward()
    for t in (z, x.grad, p.grad): assert t.isfinite().all()
    if metric == 'cosine':
        assert (z[0, 1] == 0).all() and (z[0, :, 0, 0] == 0).all()
        assert (x.grad[0, :, 0, 0] == 0).all() and (p.grad[1] == 0).all()


def test_cosine_guard():
    x, p = rand(1, 4, 1, 3).mul(1e-3).requires_grad_(), rand(2, 4, seed=1).mul(1e-3).requires_grad_()
    z = prototype_logits(x, p, eps=1.)                                             # every norm below eps: a plain product
    close(z, prototype_logits(x, p, metric='dot'), 1e-12)
    assert torch.autograd.gradcheck(lambda x, p: prototype_logits(x, p, eps=1.), (x, p))
    tiny = prototype_logits(x.detach().float()*1e-8, p.detach().float()*1e-8)      # norms of 1e-11 still have a direction
    close(tiny, prototype_logits(x.detach().float(), p.detach().float()), 1e-5)
    for s in (1e-14, 1e-17, 1e-20, 1e-30, 1e-40):
        u = (x.detach().float()*s).requires_grad_()
        prototype_logits(u, p.detach().float(), eps=0.).sum().backward()
        assert u.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ layouts and types

def layouts(x):
    B, C, h, w = x.shape
    big = torch.zeros(B+1, C+2, h+3, 2*w, dtype=x.dtype)
    big[1:, 1:C+1, 2:h+2, ::2] = x
    return dict(contiguous=x, channels_last=x.contiguous(memory_format=torch.channels_last), slice=big[1:, 1:C+1, 2:h+2, ::2],
                transposed=x.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize('layout', ['channels_last', 'slice', 'transposed'])
def test_layouts(layout):
    base, p, y, up = rand(2, 5, 9, 11), rand(4, 5, seed=1), ids(2, 9, 11, classes=4), rand(2, 4, 9, 11, seed=2)
    def everything(x):
        z = prototype_logits(x, p)
        pooled, mass = masked_average_pool(x, y, 4)
        ce = prototype_cross_entropy(x, p, y)
        return z, pooled, mass, ce, *nearest_prototype(x, p), *torch.autograd.grad((z*up).sum()+pooled.sum()+ce, x)
    for a, b in zip(everything(layouts(base)[layout].requires_grad_()), everything(base.clone().requires_grad_())): close(a, b, 1e-12)


def test_channels_last_stays():
    x = rand(2, 5, 9, 11).contiguous(memory_format=torch.channels_last).requires_grad_()
    prototype_logits(x, rand(4, 5)).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype,ulp', [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_sums_in_float32(dtype, ulp, layout):
    x, y = layout(rand(1, 16, 40, 40, dtype=dtype)+100), ids(1, 40, 40, classes=3)
    exact, mass = masked_average_pool(x.double(), y, 3)
    p, m = masked_average_pool(x, y, 3)
    assert p.dtype == m.dtype == torch.float32 and torch.equal(m.double(), mass)   # counts beyond 256
    close(p.double(), exact, 1e-6)
    q = rand(3, 16, seed=2, dtype=dtype)
    for metric in METRICS: close(prototype_logits(x, q, metric=metric).double(), prototype_logits(x.double(), q.double(), metric=metric), 2e-5)
    prototype_logits(x, q.float())                                                # prototypes kept in float32 are welcome
    u, v = x.clone().requires_grad_(), x.double().requires_grad_()
    prototype_cross_entropy(u, q, y, scale=20).backward(), prototype_cross_entropy(v, q.double(), y, scale=20).backward()
    assert u.grad.dtype == dtype
    if dtype == torch.bfloat16: close(u.grad.double(), v.grad, 2*ulp)
    a, b = pool_and_pass(u, y, 3)[0], masked_average_pool(v, y, 3)[0]
    close(torch.autograd.grad(a.sum(), u)[0].double(), torch.autograd.grad(b.sum(), v)[0], 2*ulp)


def test_autocast_changes_nothing():
    x, p, y = rand(1, 8, 9, 9, dtype=torch.float32, grad=True), rand(3, 8, seed=1, dtype=torch.float32), ids(1, 17, 17, classes=3)
    def everything(): return masked_average_pool(x, y[:, ::2, ::2], 3)[0], prototype_logits(x, p), prototype_cross_entropy(x, p, y), nearest_prototype(x, p)[1]
    plain = everything()
    with torch.autocast('cpu', torch.bfloat16):
        auto = everything()
        sum(t.sum() for t in auto[:3]).backward()
    for a, b in zip(auto, plain): assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ nearest

@pytest.mark.parametrize('metric', METRICS)
def test_nearest_is_the_argmax(metric):
    x, p = rand(2, 5, 11, 13), rand(6, 5, seed=1)
    for q in (p, rand(2, 6, 5, seed=2)):
        z = loop_logits(x, q, metric)
        label, score = nearest_prototype(x, q, metric=metric)
        assert torch.equal(label, z.argmax(1)) and label.dtype == torch.int64
        close(score, z.amax(1), 1e-12)
        valid = torch.tensor([[True, False, True, False, True, True], [False, True, False, False, False, False]])
        for v in (valid[0], valid):
            label, score = nearest_prototype(x, q, metric=metric, valid=v)
            zv = z.masked_fill(~v.expand(2, 6)[:, :, None, None], -torch.inf)
            assert torch.equal(label, zv.argmax(1))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(dtype, layout):
    "Equal prototypes: whatever a product does to its last columns. Also where they begin alike, are one set per image, or many."
    x, p = layout(rand(1, 5, 9, 9, dtype=dtype)), rand(1, 5, seed=1, dtype=dtype).repeat(7, 1)
    for metric in METRICS:
        assert (nearest_prototype(x, p, metric=metric)[0] == 0).all()
        valid = torch.tensor([False, False, True, True, False, True, True])
        assert (nearest_prototype(x, p, metric=metric, valid=valid)[0] == 2).all()
        for K, C in ((11, 3), (19, 24), (300, 6)):
            x2, four = layout(rand(2, C, 7, 11, seed=2, dtype=dtype)), rand(2, 4, C, seed=3, dtype=dtype)
            four[:, 1, :-1], four[:, 2] = four[:, 0, :-1], 0                        # 1 differs from 0 in its last channel only; 2 is nothing
            which = torch.randint(4, (K,), generator=torch.Generator().manual_seed(K))
            first = (which[:, None] == which).int().argmax(1)                       # the first prototype that is the same
            for q in (four[0, which], four[:, which]):
                label = nearest_prototype(x2, q, metric=metric)[0]
                assert torch.equal(first[label], label)


def test_a_negative_zero_is_a_zero():
    p = torch.tensor([[1., 0.], [1., -0.], [0., 0.], [-0., 0.]])
    assert distance.may_win(p, None).tolist() == [[True, False, True, False]]
    assert distance.may_win(p, torch.tensor([False, True, False, True])).tolist() == [False, True, False, True]
    assert distance.may_win(torch.tensor([[math.nan], [math.nan]]), None) is None


def test_unseen_class_does_not_win():
    x, y = rand(1, 4, 5, 5, seed=7), torch.zeros(1, 5, 5, dtype=torch.long)
    p, mass = masked_average_pool(x, y, 3)
    assert (nearest_prototype(-x.abs()*p[0].sign().view(1, -1, 1, 1), p, valid=mass > 0)[0] == 0).all()


# ------------------------------------------------------------------------------------------------ cross-entropy

def plain_ce(z, y, **kw): return F.cross_entropy(F.interpolate(z, size=y.shape[1:], mode='bilinear', align_corners=True), y, ignore_index=255, **kw)


@pytest.mark.parametrize('dtype,ratio', [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize('grid,size', [((9, 9), (65, 65)), ((5, 7), (33, 20)), ((1, 1), (9, 5)), ((1, 4), (8, 9)), ((6, 6), (6, 6)), ((1, 1), (1, 1)),
                                       ((16, 31), (128, 250)), ((9, 9), (9, 17))])
def test_cross_entropy_is_resize_then_cross_entropy(grid, size, dtype, ratio):
    z, y = rand(2, 5, *grid, dtype=dtype, grad=True), ids(2, *size, classes=5, ignored=.2 if size != (1, 1) else 0)
    for reduction in ('mean', 'sum', 'none'):
        got, want = logits_cross_entropy(z, y, reduction=reduction), plain_ce(z, y, reduction=reduction)
        close(got, want, ratio)
        up = torch.ones_like(want)*3
        close(torch.autograd.grad(got, z, up)[0], torch.autograd.grad(want, z, up)[0], 5*ratio)
    with torch.no_grad(): close(logits_cross_entropy(z, y), plain_ce(z, y), ratio)
    assert logits_cross_entropy(z.detach(), y).requires_grad is False


def test_no_pixel_no_loss():
    x, p = rand(1, 4, 3, 3, grad=True), rand(3, 4, seed=1, grad=True)
    for size in ((3, 3), (9, 7)):
        for reduction in ('mean', 'sum', 'none'):
            loss = prototype_cross_entropy(x, p, torch.full((1, *size), 255), reduction=reduction)
            assert (loss == 0).all()
            for grad in torch.autograd.grad(loss.sum(), (x, p)): assert (grad == 0).all()


def test_valid_classes():
    z, y = rand(2, 4, 5, 5, grad=True), ids(2, 17, 17, classes=4)
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    up = F.interpolate(z, size=(17, 17), mode='bilinear', align_corners=True).masked_fill(~valid[:, :, None, None], -torch.inf)
    allowed = torch.stack([torch.where(valid[b][y[b].clamp(max=3)], y[b], 255) for b in range(2)])
    want = F.cross_entropy(up, allowed, ignore_index=255)
    got = logits_cross_entropy(z, y, valid=valid)
    close(got, want, 1e-12)
    close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0], 1e-11)
    nobody = logits_cross_entropy(z, y, valid=torch.zeros(4, dtype=torch.bool))
    assert nobody == 0 and (torch.autograd.grad(nobody, z)[0] == 0).all()


def test_labels_out_of_range_count_as_ignored_where_they_are_not_checked():
    z, y = rand(1, 3, 5, 5), ids(1, 9, 9, classes=3)
    odd = torch.where(y == 255, torch.tensor([-1, 3, 19, 254])[torch.arange(81).view(1, 9, 9)%4], y)
    with use_backend(check=False):
        assert torch.equal(logits_cross_entropy(z, odd), logits_cross_entropy(z, y))
        assert torch.equal(masked_average_pool(z, odd[:, ::2, ::2], 3)[0], masked_average_pool(z, y[:, ::2, ::2], 3)[0])
    with pytest.raises(ValueError, match=r'labels holds -?\d+, want 0..2'): logits_cross_entropy(z, odd)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64], ids=str)
def test_integer_labels_of_any_width(dtype):
    x, p, y = rand(1, 4, 5, 5), rand(3, 4, seed=1), ids(1, 9, 9, classes=3)
    assert torch.equal(prototype_cross_entropy(x, p, y.to(dtype)), prototype_cross_entropy(x, p, y))
    assert torch.equal(masked_average_pool(x, y[:, ::2, ::2].to(dtype), 3)[0], masked_average_pool(x, y[:, ::2, ::2], 3)[0])


# ------------------------------------------------------------------------------------------------ nothing waits, nothing is kept

def test_nothing_waits_for_the_device():
    "On the meta device there are no values: .item(), nonzero and boolean indexing would raise."
    x, p = torch.empty(2, 8, 9, 9, device='meta', requires_grad=True), torch.empty(3, 8, device='meta', requires_grad=True)
    y, Y = torch.empty(2, 9, 9, dtype=torch.long, device='meta'), torch.empty(2, 33, 40, dtype=torch.long, device='meta')
    valid = torch.empty(2, 3, dtype=torch.bool, device='meta')
    pooled, mass, same = pool_and_pass(x, y, 3)
    losses = [prototype_cross_entropy(same, pooled, Y, valid=mass > 0), prototype_cross_entropy(x, p, y, valid=valid, reduction='sum')]
    losses += [prototype_logits(x, p, metric=m).sum() for m in METRICS]
    sum(losses).backward()
    assert x.grad.shape == x.shape and nearest_prototype(x, p, valid=valid)[0].shape == (2, 9, 9)
    assert labels_on_grid(Y, (9, 9)).shape == soft_masks(Y, 3, (9, 9))[:, 0].shape == (2, 9, 9)


def test_what_is_kept_for_backward():
    "Besides the inputs: nothing of the size of the features, nothing of the size of the labels times K."
    x, p, Y = rand(1, 64, 33, 33, grad=True), rand(5, 64, seed=1, grad=True), ids(1, 257, 257, classes=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        pooled = masked_average_pool(x, labels_on_grid(Y, (33, 33)), 5)[0]
        prototype_cross_entropy(x, pooled, Y, scale=20)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() != x.data_ptr()}
    assert 0 < sum(own.values()) < x.nbytes/2


def test_second_derivative_is_refused():
    x = rand(1, 3, 3, 3, grad=True)
    g, = torch.autograd.grad(prototype_logits(x, rand(2, 3)).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


# ------------------------------------------------------------------------------------------------ the door

X, P, Y = rand(2, 3, 4, 5), rand(6, 3), ids(2, 4, 5, classes=6)
NO = torch.zeros(6, dtype=torch.bool)
QK, YK = torch.ones(4, 6), torch.tensor([0, 1, 0, 1])
def contrast(q=QK, y=YK, k=QK, t=YK, **kw): return prototype_contrast(q, y, k, t, **kw)

MISTAKES = [
    (ValueError, r'features is float64 \(3, 4, 5\), want \(B,C,h,w\)', lambda: masked_average_pool(X[0], Y, 6)),
    (TypeError, r'features is int64 .*want a float tensor', lambda: masked_average_pool(X.long(), Y, 6)),
    (TypeError, r'features is list', lambda: prototype_logits([1], P)),
    (ValueError, r'features .*no empty axis', lambda: prototype_logits(X[:, :, :0], P)),
    (ValueError, r'labels is int64 \(2, 4, 4\), want shape \(2, 4, 5\)', lambda: masked_average_pool(X, Y[:, :, 1:], 6)),
    (ValueError, r'labels holds 5, want 0..4 \(5 classes\) or ignore_index=255', lambda: masked_average_pool(X, torch.where(Y == 255, 5, Y.clamp(max=4)), 5)),
    (ValueError, r'labels holds 255, want 0..5 \(6 classes\) or ignore_index=0', lambda: masked_average_pool(X, Y, 6, ignore_index=0)),
    (TypeError, r'labels is float64 \(2, 4, 5\), want integer class ids', lambda: masked_average_pool(X, Y.double(), 6)),
    (TypeError, r'labels is bool', lambda: masked_average_pool(X, Y > 3, 6)),
    (ValueError, r'labels is float64 \(2, 5, 4, 5\), want shape \(2, 6, 4, 5\)', lambda: masked_average_pool(X, rand(2, 5, 4, 5).abs(), 6)),
    (ValueError, r'labels holds negative', lambda: masked_average_pool(X, -rand(2, 6, 4, 5).abs(), 6)),
    (ValueError, r'weights is float64 \(2, 4\), want shape \(2, 4, 5\)', lambda: masked_average_pool(X, Y, 6, weights=X[:, 0, :, 0])),
    (ValueError, r'weights holds negative or non-finite', lambda: masked_average_pool(X, Y, 6, weights=torch.full((2, 4, 5), float('nan')))),
    (ValueError, r'num_classes is 0, want at least 1', lambda: masked_average_pool(X, Y, 0)),
    (TypeError, r'num_classes is float 6.0, want an int', lambda: masked_average_pool(X, Y, 6.)),
    (ValueError, r'eps is nan', lambda: masked_average_pool(X, Y, 6, eps=float('nan'))),
    (ValueError, r'eps is -1', lambda: prototype_logits(X, P, eps=-1)),
    (ValueError, r'scale is inf', lambda: prototype_logits(X, P, scale=float('inf'))),
    (TypeError, r'scale is str', lambda: prototype_logits(X, P, scale='20')),
    (ValueError, r"metric is 'l1', want one of 'cosine'", lambda: prototype_logits(X, P, metric='l1')),
    (ValueError, r'prototypes is float64 \(6, 2\), want \(K,3\)', lambda: prototype_logits(X, P[:, :2])),
    (ValueError, r'prototypes is float64 \(0, 3\)', lambda: prototype_logits(X, P[:0])),
    (ValueError, r'prototypes is float64 \(3, 6, 3\)', lambda: nearest_prototype(X, P.expand(3, 6, 3))),
    (TypeError, r'prototypes is float32 \(6, 3\), want torch.float64', lambda: prototype_logits(X, P.float())),
    (ValueError, r'prototypes is on meta, want it where the features are, on cpu', lambda: prototype_logits(X, P.to('meta'))),
    (ValueError, r'labels is on meta', lambda: prototype_cross_entropy(X, P, Y.to('meta'))),
    (TypeError, r'valid is int64', lambda: nearest_prototype(X, P, valid=NO.long())),
    (ValueError, r'valid is bool \(5,\), want shape \(6,\) or \(2,6\)', lambda: nearest_prototype(X, P, valid=NO[1:])),
    (ValueError, r'valid lets no class win', lambda: nearest_prototype(X, P, valid=NO)),
    (ValueError, r'valid lets no class win', lambda: nearest_prototype(X, P, valid=torch.stack([~NO, NO]))),
    (ValueError, r'coarser than the features', lambda: prototype_cross_entropy(X, P, Y[:, ::2])),
    (ValueError, r'labels is int64 \(1, 4, 5\)', lambda: prototype_cross_entropy(X, P, Y[:1])),
    (ValueError, r"reduction is 'avg', want one of 'mean', 'sum', 'none'", lambda: prototype_cross_entropy(X, P, Y, reduction='avg')),
    (ValueError, r'images is slice\(2, 3, None\), want at least one of the 2', lambda: pool_and_pass(X, Y, 6, images=slice(2, 3))),
    (TypeError, r'images is 1, want a slice', lambda: pool_and_pass(X, Y[1:], 6, images=1)),
    (TypeError, r'queries is int64 \(4, 6\), want a float tensor \(N,C\)', lambda: contrast(q=QK.long())),
    (ValueError, r'queries is float32 \(24,\), want \(N,C\)', lambda: contrast(q=QK.flatten())),
    (ValueError, r'keys is float32 \(4, 5\), want 6 columns as the queries have', lambda: contrast(k=QK[:, :5])),
    (TypeError, r'keys is float64 \(4, 6\), want the type of the queries, torch.float32', lambda: contrast(k=QK.double())),
    (ValueError, r'keys is on meta, want it where the queries are, on cpu', lambda: contrast(k=QK.to('meta'))),
    (ValueError, r'query_labels is int64 \(3,\), want shape \(4,\)', lambda: contrast(y=YK[:3])),
    (TypeError, r'key_labels is float32 \(4,\), want integer class ids \(4,\)', lambda: contrast(t=YK.float())),
    (ValueError, r'temperature is nan, want a finite number', lambda: contrast(temperature=float('nan'))),
    (ValueError, r'temperature is 0, want a number above 0', lambda: contrast(temperature=0)),
    (TypeError, r"temperature is str 'cold', want a number", lambda: contrast(temperature='cold')),
    (ValueError, r'key_weights is float32 \(3,\), want shape \(4,\) to fit the keys', lambda: contrast(key_weights=torch.ones(3))),
    (ValueError, r'key_weights holds negative or non-finite numbers', lambda: contrast(key_weights=torch.full((4,), -1.))),
    (TypeError, r'ignore_index is float 1.5, want an int', lambda: contrast(ignore_index=1.5)),
    (ValueError, r"reduction is 'max', want one of 'mean', 'sum', 'none'", lambda: contrast(reduction='max')),
    (TypeError, r'features is int64 \(4, 6\), want a float tensor \(N,C\)', lambda: soft_neighbourhood_density(QK.long())),
    (ValueError, r'features is float32 \(24,\), want \(N,C\)', lambda: soft_neighbourhood_density(QK.flatten())),
    (ValueError, r'temperature is 0, want a number above 0', lambda: soft_neighbourhood_density(QK, temperature=0)),
    (ValueError, r"reduction is 'max', want one of 'mean', 'sum', 'none'", lambda: soft_neighbourhood_density(QK, reduction='max')),
    (ValueError, r"backend is 'cuda', want 'auto', 'torch' or 'triton'", lambda: use_backend('cuda')),
]


@pytest.mark.parametrize('error,text,call', MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_mistakes_are_named(error, text, call):
    with pytest.raises(error, match=text): call()


def test_use_backend_sets_and_restores():
    assert repr(use_backend()) == "backend='auto', check=None"
    with pytest.raises(KeyError):
        with use_backend('torch', check=False) as now:
            assert repr(now) == "backend='torch', check=False"
            with use_backend(check=True) as inner: assert repr(inner) == "backend='auto', check=True"
            assert repr(now) == "backend='torch', check=False"
            raise KeyError
    setter = use_backend('torch')
    assert repr(setter) == "backend='torch', check=None"
    use_backend('auto')


def test_failed_triton_request_changes_nothing(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with use_backend('torch', check=True) as now:
        with pytest.raises(RuntimeError, match='backend triton: PyTorch sees no GPU'): use_backend('triton')
        assert repr(now) == "backend='torch', check=True"


@pytest.mark.parametrize('dtype,K,ignored', [(torch.uint8, 256, -1), (torch.uint8, 300, -100), (torch.int8, 200, 255)], ids=str)
def test_narrow_labels_are_not_wrapped(dtype, K, ignored):
    y = torch.tensor([[[0, 100, 127]]]).to(dtype)
    if dtype == torch.uint8: y = torch.tensor([[[0, 156, 255]]]).to(dtype)
    x = rand(1, 3, 1, 3)
    p, mass = masked_average_pool(x, y, K, ignore_index=ignored)
    assert mass.sum() == 3 and (p[y[0, 0].long()] == x[0, :, 0].T).all()
    assert nearest_prototype(x, p, valid=mass > 0, metric='euclidean')[0].flatten().tolist() == y.flatten().tolist()
    assert prototype_cross_entropy(x, p, y, ignore_index=ignored, reduction='none').count_nonzero() == 3


def head(x, y, Y):
    p, mass = masked_average_pool(x, y, 3, eps=5e-4)
    return prototype_cross_entropy(x, p, Y, scale=20., valid=mass > 0)


@pytest.mark.own_blas
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend, tile_bytes):
    if tile_bytes == 1: pytest.skip('there are no tiles in compiled code')
    x, y, Y = rand(2, 8, 9, 9, dtype=torch.float32, grad=True), ids(2, 9, 9, classes=3), ids(2, 33, 33, classes=3)
    want, got = head(x, y, Y), torch.compile(head, fullgraph=True, backend=backend)(x, y, Y)
    close(got, want, 1e-5)
    close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0], 1e-4)


@pytest.mark.own_blas
def test_everything_compiles(tile_bytes):
    if tile_bytes == 1: pytest.skip('there are no tiles in compiled code')
    x, p, y = rand(2, 8, 9, 9, dtype=torch.float32, grad=True), rand(3, 8, dtype=torch.float32, seed=1), ids(2, 9, 9, classes=3)
    def everything(x, p, y):
        pooled, _, same = pool_and_pass(x, y[1:], 3, images=slice(1, 2))
        return prototype_logits(same, pooled, metric='sqeuclidean'), logits_cross_entropy(prototype_logits(x, p), y), *nearest_prototype(x, p)
    for a, b in zip(torch.compile(everything, fullgraph=True, backend='aot_eager')(x, p, y), everything(x, p, y)): close(a, b, 1e-5)


@pytest.mark.parametrize('size,grid,whole', [((65, 129), (9, 17), True), ((17, 17), (5, 5), True), ((17, 17), (6, 6), False), ((64, 96), (8, 12), False),
                                             ((7, 9), (7, 9), True), ((33, 33), (1, 1), False)])
def test_masks_on_a_grid_are_the_resized_ones(size, grid, whole):
    y = torch.where(ids(2, *size, classes=4) == 3, 255, ids(2, *size, classes=4))
    hot = torch.stack([y == k for k in range(3)], 1).float()
    theirs = F.interpolate(hot, size=grid, mode='bilinear', align_corners=True)
    ours = grid_masks(y, 3, grid)
    assert (ours.ndim == 3) == whole
    close(torch.stack([ours == k for k in range(3)], 1).float() if whole else ours, theirs, 1e-6)
