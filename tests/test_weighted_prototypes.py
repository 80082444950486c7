"Weighted prototypes, drawn anchors and the asymmetric contrast, each against a plain loop or matrix written from the rule."
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

from protonb.core import InputError
from protonb.weighted_prototypes import (
    stacked_points,
    PrototypeMemory, anchor_means, contrast, domain_prototypes, merge_labels, point_anchors, sample_anchors, sure,
    weighted_prototypes)

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def gen(seed=0): return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=gen(seed), dtype=torch.float64), dim=1).to(dtype)


def lumped(*shape, seed=0, dtype=torch.float64):
    "Unit features with a common direction, as a network's are: no sum of weights comes near 0."
    return F.normalize(unit(*shape, seed=seed)+.5, dim=1).to(dtype)


def blobs(*shape, classes=4, seed=0, ignored=.2):
    "Labels in patches, so that classes have very different sizes."
    B, h, w = shape
    coarse = torch.randint(0, classes, (B, 1, -(-h//4), -(-w//4)), generator=gen(seed)).float()
    y = F.interpolate(coarse, size=(h, w), mode='nearest')[:, 0].long()
    return torch.where(torch.rand(shape, generator=gen(seed+1)) < ignored, 255, y)


def points(B, H, W, classes, seed=0):
    "At most one labelled pixel per class and image."
    y = torch.full((B, H, W), 255)
    for b, c in product(range(B), range(classes)):
        i = torch.randint(0, H*W, (1,), generator=gen(100*seed+10*b+c)).item()
        y[b, i//W, i % W] = c
    return y


def close(a, b, eps=1e-10):
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    assert (a-b).abs().max() <= eps, (a-b).abs().max().item()


# ------------------------------------------------------------------------------------------------ labels

def test_the_sure_step_compares_in_float32():
    p = torch.tensor([.95, .9499999, .2, 1.])
    assert sure(torch.arange(4), p, .95).tolist() == [0, 255, 255, 3]                # float32(0.95) < 0.95, and yet it counts
    assert sure(torch.arange(4), p.double(), .95).tolist() == [0, 255, 255, 3]


def resized(y, size): return F.interpolate(y[:, None].double(), size=size, mode='nearest')[:, 0].long()


@pytest.mark.parametrize('H, W, h, w', [(64, 64, 8, 8), (65, 97, 9, 13), (17, 50, 8, 8), (8, 8, 8, 8), (31, 7, 1, 1)])
def test_merging_is_resizing_and_writing_over(H, W, h, w):
    weak, pred = blobs(2, H, W, ignored=.7), blobs(2, h, w, seed=5, ignored=.1)
    g = resized(weak, (h, w))
    assert torch.equal(merge_labels(weak, pred, (h, w)), torch.where(g != 255, g, pred))
    assert torch.equal(merge_labels(weak, None, (h, w)), g)
    up = resized(pred, (H, W))
    assert torch.equal(merge_labels(weak, pred, (h, w), at='image'), resized(torch.where(weak != 255, weak, up), (h, w)))


def test_top_left_pixel_of_each_block():
    weak = torch.full((1, 16, 16), 255)
    weak[0, 0, 0], weak[0, 1, 9], weak[0, 8, 8] = 1, 2, 3
    assert merge_labels(weak, torch.zeros(1, 2, 2, dtype=torch.long), (2, 2)).tolist() == [[[1, 0], [0, 3]]]
    with pytest.raises(ValueError, match="want 'grid' or 'image'"): merge_labels(weak, None, (2, 2), at='both')


# ------------------------------------------------------------------------------------------------ prototypes

def loop_means(f, y, K):
    cells = f.permute(0, 2, 3, 1)
    there = torch.tensor([(y == c).any().item() for c in range(K)])
    return torch.stack([cells[y == c].mean(0) if n else cells.new_zeros(f.shape[1]) for c, n in enumerate(there)]), there


def loop_weighted(f, anchors, m):
    cells, rows, found = f.permute(0, 2, 3, 1), [], []
    for c, a in enumerate(anchors):
        mine = cells[m == c]
        w = mine @ a
        found.append(len(mine) > 0 and abs(w.sum().item()) >= 1e-12)
        rows.append((w/w.sum()) @ mine if found[-1] else torch.zeros_like(a))
    return torch.stack(rows), torch.tensor(found)


def loop_domain(f, weak, pred, kind, K):
    "The recipe step by step, with maps enlarged where it says so."
    (h, w), (H, W) = f.shape[-2:], weak.shape[-2:]
    pred = torch.full((len(f), h, w), 255) if pred is None else pred
    if kind == 'point':
        up = resized(pred, (H, W))
        m = resized(torch.where(weak != 255, weak, up), (h, w))
        A, present = loop_means(F.interpolate(f, size=(H, W), mode='bilinear', align_corners=False), weak, K)
    else:
        g = resized(weak, (h, w))
        m = torch.where(g != 255, g, pred)
        A, present = loop_means(f, m if kind == 'image' else g, K)
    rows, found = loop_weighted(f, A, m)
    return rows, present, found & present


@pytest.mark.parametrize('dtype, eps', [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize('H, W, h, w', [(64, 64, 8, 8), (33, 50, 9, 13), (3, 2, 7, 5)])
def test_points_are_read_as_if_enlarged(H, W, h, w, dtype, eps):
    f, y = unit(3, 6, h, w, dtype=dtype), points(3, H, W, 5)
    got, there = point_anchors(f, y, 7)
    want, n = loop_means(F.interpolate(f, size=(H, W), mode='bilinear', align_corners=False), y, 7)
    close(got, want, eps)
    assert torch.equal(there, n) and not there[5:].any()


def test_points_enlarged_twice_have_room_and_more_are_refused():
    f, y = unit(2, 6, 8, 8), torch.arange(19).repeat_interleave(4).view(1, 4, 19).repeat(2, 1, 1)     # 4 of each of 19
    got, there = point_anchors(f, y, 19)
    close(got, loop_means(F.interpolate(f, size=(4, 19), mode='bilinear', align_corners=False), y, 19)[0])
    assert there.all()
    with pytest.raises(ValueError, match='expected point labels, or more room'): point_anchors(f, y, 19, room=3)


def test_too_many_points_are_refused_before_a_gpu_could_drop_them():
    label = torch.full((8, 8), 255)
    label[:2] = torch.arange(16).view(2, 8)%3                             # 16 points: room 4 of 3 classes holds 12 an image
    sample = dict(target=(torch.zeros(3, 8, 8, dtype=torch.uint8), label, torch.ones(3, dtype=torch.bool)))
    with pytest.raises(InputError, match='has 32 labelled pixels, but room=4 holds 24.*contrast.clicks'): stacked_points([sample]*2, 3, 4)
    few = dict(target=(sample['target'][0], torch.full_like(label, 255), sample['target'][2]))
    assert stacked_points([sample, few], 3, 4)['target'][1].shape == (2, 8, 8)                  # the batch has room, whoever needs it


def test_weights_are_the_products_with_the_anchor():
    f, m = unit(3, 6, 9, 7), blobs(3, 9, 7, classes=5)
    A = unit(7, 6, seed=3)                                                # some weights are negative, two classes have no cell
    rows, found = weighted_prototypes(f, A, m)
    want, there = loop_weighted(f, A, m)
    close(rows, want, 1e-9)
    assert torch.equal(found, there) and not found[5:].any() and (rows[5:] == 0).all()


@pytest.mark.parametrize('same', [False, True], ids=['noise', 'same'])
def test_long_sums_stay_exact(same):
    "A hundred thousand cells of one class, and as many clicks: within 2^-18 of float64, where one chain of additions is not."
    f = torch.randn(1, 8, 250, 400, generator=gen(3))+3
    if same: f = torch.linspace(1, 2, 8).view(1, 8, 1, 1).expand_as(f)
    y = torch.zeros(1, 250, 400, dtype=torch.long)
    for make in (lambda f: anchor_means(f, y, 2)[0], lambda f: weighted_prototypes(f, torch.full((2, 8), .1).to(f.dtype), y)[0],
                 lambda f: point_anchors(f, y, 2, room=100_000)[0]):
        got, want = make(f), make(f.double())
        assert got.dtype == torch.float32 and (got-want).abs().max() <= 2**-18*want.abs().max()


def test_a_sum_of_weights_of_zero_gives_no_row():
    f = torch.tensor([[1., 0.], [-1., 0.]]).T.view(1, 2, 1, 2)            # two cells that cancel
    rows, found = weighted_prototypes(f, torch.tensor([[1., 0.]]), torch.zeros(1, 1, 2, dtype=torch.long))
    assert not found.any() and (rows == 0).all()


@pytest.mark.parametrize('kind', ['coarse', 'point', 'image'])
@pytest.mark.parametrize('H, W, h, w', [(64, 64, 8, 8), (65, 49, 9, 7)])
def test_one_domain_is_its_recipe(kind, H, W, h, w):
    f, K = unit(3, 6, h, w), 6
    weak = dict(coarse=blobs(3, H, W, ignored=.6, classes=4), point=points(3, H, W, 5), image=torch.full((3, H, W), 255))[kind]
    p = torch.rand(3, h, w, generator=gen(4))
    pred = sure(blobs(3, h, w, seed=8, classes=6, ignored=0), p, .5)
    got, want = domain_prototypes(f, weak, pred, kind, K), loop_domain(f, weak, pred, kind, K)
    close(got[0], want[0], 1e-9)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    source = domain_prototypes(f, weak, None, 'coarse', K)
    want = loop_domain(f, weak, None, 'coarse', K)
    close(source[0], want[0], 1e-9)
    assert torch.equal(source[1], want[1])


def test_a_point_without_a_cell_is_present_but_not_found():
    weak = torch.full((1, 64, 64), 255)
    weak[0, 3, 5] = 2                                                     # no top-left pixel of a block: lost on the grid
    rows, present, found = domain_prototypes(unit(1, 6, 8, 8), weak, torch.full((1, 8, 8), 0), 'point', 4)
    assert present.tolist() == [False, False, True, False] and not found.any() and (rows == 0).all()


def test_prototypes_take_no_gradient_and_low_precision():
    f = lumped(2, 6, 8, 8, dtype=torch.float32)
    y = blobs(2, 32, 32)
    for kind in ('coarse', 'point', 'image'):
        weak = points(2, 32, 32, 4) if kind == 'point' else y
        full = domain_prototypes(f.requires_grad_(), weak, blobs(2, 8, 8), kind, 4)[0]
        assert not full.requires_grad
        half = domain_prototypes(f.bfloat16(), weak, blobs(2, 8, 8), kind, 4)[0]
        assert half.dtype == torch.float32
        close(half, full, .02)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            close(domain_prototypes(f.detach(), weak, blobs(2, 8, 8), kind, 4)[0], full, 1e-6)
    with pytest.raises(ValueError, match='kind'): domain_prototypes(f, y, None, 'lines', 4)


@pytest.mark.parametrize('kind', ['coarse', 'point', 'image'])
def test_two_processes_make_one_batch(kind):
    "Each holds half of a batch; with `reduce` both get the rows of the whole."
    f, pred = lumped(4, 6, 8, 8), blobs(4, 8, 8, seed=9)
    weak = points(4, 32, 32, 4) if kind == 'point' else blobs(4, 32, 32, classes=3)
    meet, sent = Barrier(2, timeout=20), [None, None]

    def process(i):
        def reduce(t):
            sent[i] = t
            meet.wait()
            total = sent[0]+sent[1]
            meet.wait()
            return total
        half = slice(2*i, 2*i+2)
        return domain_prototypes(f[half], weak[half], pred[half], kind, 5, reduce=reduce)

    with ThreadPoolExecutor(2) as pool: one, two = pool.map(process, (0, 1))
    whole = domain_prototypes(f, weak, pred, kind, 5)
    for got in (one, two):
        close(got[0], whole[0])
        assert torch.equal(got[1], whole[1]) and torch.equal(got[2], whole[2]) and not got[1][4]


def test_memory_overwrites_present_rows_only():
    memory = PrototypeMemory(4, 2)
    assert set(memory.state_dict()) == {'target', 'source'} and (memory.target == 0).all()
    ones = torch.ones(4, 2)
    memory.update('target', ones, torch.tensor([True, True, True, False]), torch.ones(4, dtype=torch.bool))
    assert memory.target[:, 0].tolist() == [1, 1, 1, 0] and (memory.source == 0).all()
    present, found = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    memory.update('target', 2*ones, present, found)
    assert memory.target[:, 0].tolist() == [2, 1, 1, 0]
    memory.update('target', 3*ones, present, found, empty='zero')
    assert memory.target[:, 0].tolist() == [3, 0, 1, 0]
    with pytest.raises(ValueError, match='domain'): memory.update('real', ones, present, found)
    with pytest.raises(ValueError, match='empty'): memory.update('source', ones, present, found, empty='nan')


# ------------------------------------------------------------------------------------------------ sampling

def groups_of(y, pred, p, tau, max_samples, least=20, most=20):
    "V and {(image, class): (hard cells, easy cells)} of the groups that give, from the rule."
    asked, T = {}, 0
    for b in range(len(y)):
        for c in y[b].unique().tolist():
            mine = y[b].flatten() == c
            if c == 255 or mine.sum() <= least: continue
            T += 1
            wrong = pred[b].flatten() != c
            hard, easy = mine & wrong, mine & ~wrong & (p[b].flatten().float() > torch.tensor(tau, dtype=torch.float32))
            asked[b, c] = hard.nonzero()[:, 0].tolist(), easy.nonzero()[:, 0].tolist()
    V = min(max_samples//max(T, 1), most)
    return V, {g: (h, e) for g, (h, e) in asked.items() if len(h)+len(e) >= V and V}


def scene(seed=0, N=4, h=16, w=20, classes=7, right=.7):
    y = blobs(N, h, w, classes=classes, seed=seed)
    g = gen(seed+50)
    wrong = torch.randint(0, classes, y.shape, generator=g)
    pred = torch.where(torch.rand(y.shape, generator=g) < right, y, wrong)
    return y, torch.where(pred == 255, 0, pred), torch.rand(y.shape, generator=g)


@pytest.mark.parametrize('seed, max_samples, tau', [(0, 512, .5), (1, 256, .9), (2, 64, .96), (3, 10, .5), (4, 2048, .99), (5, 90, .2)])
def test_who_is_drawn(seed, max_samples, tau):
    y, pred, p = scene(seed)
    f = unit(4, 6, 16, 20)
    a = sample_anchors(f, y, pred, p, max_samples=max_samples, tau=tau, generator=gen(seed))
    V, want = groups_of(y, pred, p, tau, max_samples)
    n = a.count.item()
    assert n == V*len(want) and a.features.shape == (max_samples, 6) and (a.each.item() == V or not V)
    assert (a.labels[n:] == 255).all() and (a.images[n:] == -1).all() and (a.features[n:] == 0).all()
    got = {}
    for i in range(n):
        b, c, cell = a.images[i].item(), a.labels[i].item(), a.cells[i].item()
        got.setdefault((b, c), []).append(cell)
        assert torch.equal(a.features[i], f[b, :, cell//20, cell % 20]) and y[b].flatten()[cell] == c
    assert set(got) == set(want)
    for g, (hard, easy) in want.items():
        mine = got[g]
        assert len(mine) == len(set(mine)) == V and set(mine) <= set(hard) | set(easy)
        assert len(set(mine) & set(hard)) == min(V, len(hard))            # hard ones first


def test_small_classes_never_and_a_skipped_group_still_counts():
    y, p = torch.full((1, 8, 16), 255), torch.zeros(1, 8, 16)
    y[0, :, :5], y[0, :4, 5:10], y[0, :, 10:] = 0, 1, 2                   # 40, 20 (too few) and 48 cells
    pred = torch.where(y == 0, 9, y)                                      # 0 is all wrong; 2 all right but unsure: nothing to take
    a = sample_anchors(unit(1, 3, 8, 16), y, pred, p, max_samples=30, tau=.9, generator=gen())
    assert a.each == 15 and a.count == 15 and set(a.labels[:15].tolist()) == {0}
    y[0, 4, 5] = 1                                                        # 21 cells: now it counts
    assert sample_anchors(unit(1, 3, 8, 16), y, pred, p, max_samples=30, tau=.9, generator=gen()).each == 10


def test_sure_means_above_tau_in_float32():
    y = torch.zeros(1, 5, 5, dtype=torch.long)
    draw = lambda v, tau: sample_anchors(unit(1, 3, 5, 5), y, y, torch.full((1, 5, 5), v), max_samples=64, tau=tau, generator=gen()).count
    assert draw(.96, .96) == 0 and draw(.9601, .96) == 20 and draw(.95, .95) == 0


def test_the_same_generator_draws_the_same():
    y, pred, p = scene()
    f = unit(4, 6, 16, 20)
    draw = lambda seed: sample_anchors(f, y, pred, p, max_samples=128, tau=.5, generator=gen(seed)).cells
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_every_cell_of_a_tier_is_as_likely_as_in_the_loop():
    "Inclusion frequencies over many draws: uniform within hard and within easy cells, and those of pairs too."
    times = 5000                                                          # images, all alike: each is a draw of its own
    y, p = torch.zeros(times, 5, 6, dtype=torch.long), torch.ones(times, 5, 6)
    pred = y.clone()
    pred[:, 0] = 1                                                        # six hard, 24 easy cells
    f = torch.zeros(times, 1, 5, 6)
    for most in (4, 10):                                                  # 4 of 6 hard; all 6 hard and 4 of 24 easy
        a = sample_anchors(f, y, pred, p, max_samples=most*times, tau=.5, generator=gen(11), most=most)
        drawn = torch.zeros(times, 30).index_put_((a.images, a.cells), torch.ones(()))
        assert a.count == most*times == drawn.sum()
        hits = drawn.T @ drawn
        for cells, k in ((slice(0, 6), min(most, 6)), (slice(6, 30), most-min(most, 6))):
            n = cells.stop-cells.start
            single, pair = k/n, k*(k-1)/(n*(n-1))
            tile = hits[cells, cells]/times
            assert ((tile.diagonal()-single).abs() <= 5*math.sqrt(single*(1-single)/times)+1e-9).all()
            off = tile[~torch.eye(n, dtype=torch.bool)]
            assert ((off-pair).abs() <= 5*math.sqrt(pair*(1-pair)/times)+1e-9).all()


def test_two_maps_are_one_batch_and_only_the_first_learns():
    y, pred, p = scene()
    f = unit(4, 6, 16, 20)
    s, t = f[:1].clone().requires_grad_(), f[1:].clone()
    how = dict(max_samples=200, tau=.5)
    one, two = sample_anchors(f, y, pred, p, generator=gen(), **how), sample_anchors((s, t), y, pred, p, generator=gen(), **how)
    assert torch.equal(one.features, two.features) and torch.equal(one.cells, two.cells) and len(set(one.images.tolist())) > 3
    two.features.sum().backward()
    want = torch.zeros(1, 320)
    want[0, two.cells[two.images == 0]] = 1
    assert torch.equal(s.grad[:, 0].flatten(1), want.double())
    with pytest.raises(ValueError, match='features has 3 images, want 4'): sample_anchors(t, y, pred, p, generator=gen(), **how)


# ------------------------------------------------------------------------------------------------ contrast

def matrix(f, y, images, P, source_images=None):
    "Every drawn cell against the prototype of every drawn cell, (N,N), as the method states it."
    s = f @ P[y].T/.1
    s = s-s.max(1, keepdim=True).values.detach()
    same = y[:, None] == y
    positive = same
    if source_images is not None:
        target = images >= source_images
        positive = same & (target[:, None] != target)
    e = s.exp()
    far = (e*~same).sum(1, keepdim=True)
    each = ((s-(e+far).log())*positive).sum(1)/(positive.to(s.dtype).sum(1)+1e-8)
    return -.1/.07*each.mean()


def some(seed=0, dtype=torch.float64, tau=.5, max_samples=160, **how):
    y, pred, p = scene(seed, **how)
    f = unit(len(y), 8, *y.shape[1:], seed=seed, dtype=dtype).requires_grad_()
    return f, sample_anchors(f, y, pred, p, max_samples=max_samples, tau=tau, generator=gen(seed))


def compare(f, a, P, source_images, eps_value, eps_grad):
    n = a.count.item()
    assert n
    got = contrast(a, P, source_images=source_images)
    want = matrix(a.features[:n], a.labels[:n], a.images[:n], P, source_images)
    g, = torch.autograd.grad(got, f, retain_graph=True)
    h, = torch.autograd.grad(want, f, retain_graph=True)
    assert g.abs().max() > 1e-3 or not want
    close(got.detach(), want.detach(), eps_value)
    close(g, h, eps_grad)
    return got


@pytest.mark.parametrize('source_images', [None, 2, 1])
@pytest.mark.parametrize('seed', range(4))
def test_closed_form_is_the_matrix(seed, source_images):
    P = unit(7, 8, seed=20)*torch.rand(7, 1, generator=gen(seed), dtype=torch.float64)     # rows of any length, one of zeros
    P[seed] = 0
    compare(*some(seed), P, source_images, 1e-10, 1e-10)
    f, a = some(seed, torch.float32)
    compare(f, a, P.float(), source_images, 2e-6, 1e-6)


@pytest.mark.parametrize('source_images', [None, 2])
def test_ids_that_are_no_class_take_no_part(source_images):
    f, a = some(3)
    n, K = a.count.item(), 5                                              # of the classes 0..6 two are beyond the prototypes
    on, P = a.labels[:n] < K, unit(K, 8, seed=20)
    assert on.any() and not on.all()
    got = contrast(a, P, source_images=source_images)
    close(got.detach(), matrix(a.features[:n][on], a.labels[:n][on], a.images[:n][on], P, source_images).detach(), 1e-10)


def test_a_class_missing_in_one_domain_counts_but_does_not_pull():
    y = torch.zeros(2, 8, 8, dtype=torch.long)
    y[0, :, 4:], y[1, :, 4:] = 1, 2                                       # 0 in both, 1 in the source only, 2 in the target only
    f = unit(2, 8, 8, 8).requires_grad_()
    a = sample_anchors(f, y, y+1, torch.ones(2, 8, 8), max_samples=512, tau=.5, generator=gen())
    P = unit(3, 8, seed=4)
    loss = compare(f, a, P, 1, 1e-10, 1e-10)
    assert a.count == 80
    g, = torch.autograd.grad(loss, f, retain_graph=True)
    cells = g.abs().sum(1)
    assert (cells[0][y[0] == 1] == 0).all() and (cells[1][y[1] == 2] == 0).all() and cells[0][y[0] == 0].any()
    intra = contrast(a, P)
    g, = torch.autograd.grad(intra, f)
    assert g.abs().sum(1)[0][y[0] == 1].any()


def test_source_moves_and_target_does_not():
    y, pred, p = scene()
    f = unit(4, 8, 16, 20)
    s, t, P = f[:2].clone().requires_grad_(), f[2:].clone(), unit(7, 8, seed=2).requires_grad_()
    a = sample_anchors((s, t), y, pred, p, max_samples=512, tau=.5, generator=gen())
    loss = contrast(a, P, source_images=2)
    loss.backward()
    assert s.grad.abs().sum() > 0 and P.grad is None and not t.requires_grad


@pytest.mark.parametrize('source_images', [None, 1])
@pytest.mark.parametrize('what', ['nobody', 'few', 'too many', 'unsure', 'one class'])
def test_edges_are_finite_and_hang_on_the_graph(what, source_images):
    f = unit(2, 6, 8, 8, dtype=torch.float32).requires_grad_()
    y = torch.zeros(2, 8, 8, dtype=torch.long)
    p, max_samples = torch.ones(2, 8, 8), 64
    if what == 'nobody': y = y+255
    if what == 'few': y = torch.arange(64).view(1, 8, 8).repeat(2, 1, 1) % 4
    if what == 'too many': max_samples = 1                                # two groups: V is 0
    if what == 'unsure': p = p*.5
    a = sample_anchors(f, y, y, p, max_samples=max_samples, tau=.9, generator=gen())
    assert (a.count > 0) == (what == 'one class')
    loss = contrast(a, torch.zeros(4, 6), source_images=source_images)
    loss.backward()
    assert loss.dim() == 0 and loss == 0 and f.grad is not None and (f.grad == 0).all()
    rows, present, found = domain_prototypes(f, y, None, 'coarse', 4)
    assert rows.isfinite().all() and present.tolist() == found.tolist() == [what != 'nobody', *[what == 'few']*3]
    if what == 'nobody':
        for kind in ('point', 'image'):
            rows, present, found = domain_prototypes(f, y, y, kind, 4)
            assert (rows == 0).all() and not present.any() and not found.any()


# ------------------------------------------------------------------------------------------------ devices

def test_nothing_asks_for_a_value():
    "Fake tensors have no values: whoever needs one on the host fails."
    from torch._subclasses.fake_tensor import FakeTensorMode
    from protonb.ops import use_backend
    with FakeTensorMode(), use_backend('torch', check=False):
        f, y = torch.randn(2, 8, 16, 16), torch.zeros(2, 64, 64, dtype=torch.long)
        pred, p = torch.zeros(2, 16, 16, dtype=torch.long), torch.rand(2, 16, 16)
        rows, present, found = domain_prototypes(f, y, sure(pred, p, .95), 'coarse', 7)
        PrototypeMemory(7, 8).update('target', rows, present, found)
        a = sample_anchors(f, pred, pred, p, max_samples=64, tau=.9, generator=None)
        assert a.features.shape == (64, 8) and rows.shape == (7, 8)


@GPU
def test_on_a_gpu_nothing_waits_and_all_is_the_same():
    y, pred, p = scene()
    f, weak, P = unit(4, 8, 16, 20, dtype=torch.float32), points(4, 128, 160, 7), unit(7, 8, seed=3, dtype=torch.float32)
    def work(device):
        x, g = f.to(device).requires_grad_(), torch.Generator(device).manual_seed(0)
        data = [t.to(device) for t in (y, pred, p, weak, P)]
        memory = PrototypeMemory(7, 8).to(device)
        def step(y, pred, p, weak, P):
            made = []
            for kind in ('coarse', 'point', 'image'):
                full = weak if kind == 'point' else y.repeat_interleave(8, 1).repeat_interleave(8, 2)
                made.append(domain_prototypes(x, full, sure(pred, p, .5), kind, 7))
                memory.update('target', *made[-1])
            a = sample_anchors((x[:2], x[2:].detach()), y, pred, p, max_samples=256, tau=.5, generator=g)
            inter, intra = contrast(a, P, source_images=2), contrast(a, P)
            (inter+intra).backward()
            return made, inter.detach(), intra.detach(), memory.target, a
        if device == 'cpu': return step(*data)
        step(*data)                                                       # kernels are compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try: return step(*data)
        finally: torch.cuda.set_sync_debug_mode('default')
    (here, *_, memory, a), (there, *_, target, b) = work('cpu'), work('cuda')
    for u, v in zip(here, there):
        close(v[0].cpu(), u[0], 1e-5)
        assert all(torch.equal(v[i].cpu(), u[i]) for i in (1, 2))
    close(target.cpu(), memory, 1e-5)
    assert b.count.cpu() == a.count and torch.equal(b.labels.cpu(), a.labels)
    n = b.count.item()
    x, cells = b.features[:n].cpu(), [v[:n].cpu() for v in (b.labels, b.images)]
    for source_images in (None, 2):
        want = matrix(x.double(), *cells, P.double(), source_images)
        close(contrast(b, P.cuda(), source_images=source_images).detach().cpu().double(), want, 1e-5)
