"""The fast forms of the pixel losses: their plain references, and what the methods computed before, bit for bit."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pixel_losses_before as before
from protonb import pixel_losses as P
from protonb.labels import IGNORE


def noise(seed=7): return torch.Generator().manual_seed(seed)


def close(a, b, tol):
    return (a - b).abs().max() <= tol * max(1, b.abs().max())


# The edge loss

SHAPES = (2, 19, 33, 47), (1, 5, 1, 1), (3, 2, 1, 9), (2, 7, 2, 2), (2, 19, 64, 96)


def edge_case(shape, case, dtype=torch.float32):
    B, K, H, W = shape
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(shape, generator=g) * 2).to(dtype)
    y = torch.randint(K, (B, -(-H // 6), -(-W // 6)), generator=g).repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :H, :W].contiguous()
    if case == 'pixels': y = torch.randint(K, (B, H, W), generator=g)
    if case == 'some ignored': y[torch.rand(y.shape, generator=g) < .1] = IGNORE
    if case == 'one ignored image': y[0] = IGNORE
    if case == 'all ignored': y[:] = IGNORE
    if case == 'flat': z, y = torch.zeros_like(z), torch.zeros_like(y)
    return z.requires_grad_(), y


CASES = 'regions', 'pixels', 'some ignored', 'one ignored image', 'all ignored', 'flat'


def value_and_gradient(loss, z):
    return loss.detach(), torch.autograd.grad(3 * loss, z)[0]


@pytest.mark.parametrize('ignore', ['road', 'mask'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_edge_loss_is_its_reference(shape, case, ignore):
    z, y = edge_case(shape, case)
    got, want = (value_and_gradient(f(z, y, noise(), ignore=ignore), z) for f in (P.edge_loss, P.edge_loss_ref))
    assert close(got[0], want[0], 1e-6)
    assert close(got[1], want[1], 1e-6) and torch.isfinite(got[1]).all()


@pytest.mark.parametrize('ignore', ['road', 'mask'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_edge_loss_is_the_one_of_before_bit_for_bit(shape, case, ignore):
    z, y = edge_case(shape, case)
    (a, da), (b, db) = (value_and_gradient(f(z, y, noise(), .7, ignore), z) for f in (P.edge_loss, before.edge_loss))
    assert torch.equal(a, b) and torch.equal(da, db)


def test_both_draw_the_same_numbers_and_leave_the_generator_alike():
    z, y = edge_case(SHAPES[0], 'regions')
    rest = []
    for f in (P.edge_loss, P.edge_loss_ref, before.edge_loss):
        g = noise()
        f(z, y, g).backward()
        rest.append(torch.rand(4, generator=g))
    assert torch.equal(rest[0], rest[1]) and torch.equal(rest[0], rest[2])


def test_edge_loss_options_and_a_second_backward():
    z, y = edge_case(SHAPES[0], 'some ignored')
    other = torch.where(y == IGNORE, 77, y)
    assert P.edge_loss(z, other, noise(), ignore_index=77) == P.edge_loss(z, y, noise())
    loss = P.edge_loss(z, y, noise())
    a, b = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(a, b)
    half, = torch.autograd.grad(P.edge_loss(z.bfloat16(), y, noise()), z)
    assert half.dtype == z.dtype and torch.isfinite(half).all()
    with torch.autocast('cpu', torch.bfloat16): assert P.edge_loss(z, y, noise()) == loss


def test_slopes_and_noise_are_those_of_before():
    z, _ = edge_case(SHAPES[0], 'regions')
    u = torch.rand(z[0].shape, generator=noise())
    assert torch.equal(P.slopes(z), before.slopes(z)) and torch.equal(P.noisy_softmax(z[0], u, .3), before.noisy_softmax(z[0], u, .3))
    seen = torch.rand(9, 11, generator=noise()) < .9
    assert torch.equal(P.whole_stencils(seen), before._whole(seen)) and torch.equal(P.whole_stencils(seen[None])[0], before._whole(seen))


# The four terms

def term_case(case='some ignored', B=2, K=19, size=(65, 129), cells=(9, 17), sure_cells=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    z, zs = torch.randn(B, K, *cells, generator=g).to(dtype), torch.randn(B, K, *(sure_cells or cells), generator=g).to(dtype)
    y, y_p = (torch.randint(K, (B, *size), generator=g) for _ in range(2))
    y = torch.where(torch.rand(y.shape, generator=g) < .5, y_p, y)
    if case == 'some ignored': y[torch.rand(y.shape, generator=g) < .2] = IGNORE
    if case == 'all ignored': y[:] = IGNORE
    if case == 'ties': zs[:, :2] = zs[:, :1]
    return z.requires_grad_(), zs, y, y_p, (torch.rand(K, generator=g)*6+1).to(dtype)


TERM_CASES = dict(plain={}, odd=dict(size=(37, 51), cells=(5, 7)), same_size=dict(size=(9, 17)), two_classes=dict(K=2), one_pixel=dict(size=(1, 1), cells=(1, 1)),
                  finer_source=dict(sure_cells=(17, 33)), none=dict(case='all ignored'), every=dict(case='labels'), ties=dict(case='ties'))


@pytest.mark.parametrize('kind', ['logits', 'probs', 'clamped'])
@pytest.mark.parametrize('name', TERM_CASES)
def test_the_four_terms_are_their_reference(name, kind):
    z, zs, *rest = term_case(**TERM_CASES[name])
    rest = [zs - zs.amin() + .5, *rest]                            # away from 0, where the quotient of logits has no bound
    got, want = (f(z, *rest, (.3, .1, .7, 1.5), kind) for f in (P.importance_terms, P.importance_terms_ref))
    assert close(got[0], want[0], 1e-5) and close(got[1], want[1], 1e-5)
    assert (got[2] == want[2]).float().mean() > .999
    a, b = (torch.autograd.grad(l[0], z)[0] for l in (got, want))
    assert close(a, b, 1e-4)


@pytest.mark.parametrize('kind', ['logits', 'probs', 'clamped'])
@pytest.mark.parametrize('name', TERM_CASES)
def test_the_four_terms_are_those_of_before(name, kind):
    """Labels bit for bit; sums and gradients as before, but that they are collected in float64 since."""
    z, *rest = term_case(**TERM_CASES[name])
    cfg = before.IAPC(importance_on=kind)
    weights = [getattr(cfg, t) for t in before.TERMS]
    assert P.TERMS == before.TERMS
    got, want = P.importance_terms(z, *rest, weights, kind), before.pixel_terms(z, *rest, cfg)
    assert torch.equal(got[2], want[2])
    grads = [torch.autograd.grad(2 * l[0], z)[0] for l in (got, want)]
    for a, b in ((got[0], want[0]), (got[1], want[1]), grads): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.detach().abs().max()))


def test_importance_is_that_of_before():
    z = torch.randn(2, 7, 31, generator=noise())
    z[:, :, :9] = z[:1, :, :9]                                     # ties
    for kind in ('logits', 'probs', 'clamped'):
        assert torch.equal(P.importance(z, kind), before.importance(z, before.IAPC(importance_on=kind)))
    for K in (2, 3, 19):
        z = torch.randint(-3, 4, (K, 500), generator=noise()).float()
        assert torch.equal(torch.stack(P.two_largest(z)), z.topk(2, dim=0).values)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_get_half_precision_gradients(dtype):
    z, *rest = term_case()
    half = z.detach().to(dtype).requires_grad_()
    total, terms, _ = P.importance_terms(half, *rest)
    grad, = torch.autograd.grad(total, half)
    assert grad.dtype == dtype and terms.dtype == torch.float32 and torch.isfinite(grad).all()
    with torch.autocast('cpu', torch.bfloat16): assert P.importance_terms(half, *rest)[0] == total


# One forward pass, two backward passes

def judge_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(5, 8, 4, 2, 1), nn.LeakyReLU(.2), nn.Conv2d(8, 1, 3, padding=1)), torch.randn(2, 5, 12, 16).requires_grad_()


def gradients(pair, net, x):
    fooled, verdict = pair
    (F.softplus(fooled).mean() + x.square().mean()).backward()
    first = [p.grad for p in net.parameters()]
    F.softplus(-verdict).mean().backward(inputs=list(net.parameters()))
    out = [x.grad, *(p.grad for p in net.parameters())]
    net.zero_grad(), setattr(x, 'grad', None)
    return first, out


def test_one_forward_gives_the_gradients_of_two_and_of_before():
    net, x = judge_and_input()
    for want in (P.shared_forward_ref, before.judge):
        (first, a), (_, b) = (gradients(f(net, x), net, x) for f in (P.shared_forward, want))
        assert first == [None] * 4
        assert all(torch.equal(i, j) for i, j in zip(a, b))


def test_one_forward_is_one_forward():
    net, x = judge_and_input()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    P.shared_forward(net, x)
    assert len(calls) == 1
    P.shared_forward_ref(net, x)
    assert len(calls) == 3


# What is kept

def test_what_the_fast_forms_keep_is_little():
    def kept(make):
        held = {}

        def note(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): out = make()
        del out
        return sum(held.values())
    z, y = edge_case(SHAPES[-1], 'regions')
    assert kept(lambda: P.edge_loss(z, y, noise())) <= z.nbytes + y.nbytes + 1000 < .2 * kept(lambda: P.edge_loss_ref(z, y, noise()))
    z, *rest = term_case()
    assert kept(lambda: P.importance_terms(z, *rest)) <= z.nbytes + 1000 < .1 * kept(lambda: P.importance_terms_ref(z, *rest))


@pytest.mark.parametrize('kind', ['logits', 'clamped'])
def test_importance_where_the_best_logit_is_zero(kind):
    z = torch.tensor([[0., 0., 0., 2.], [0., -1., -3., 0.], [-1., -2., -3., -1.]])
    w = P.importance(z, kind)
    assert w.tolist() == [0., 1., 1., 1.]
    maps = torch.zeros(1, 3, 4, 5, requires_grad=True)
    total = P.importance_terms(maps, torch.zeros(1, 3, 4, 5), *(torch.zeros(1, 8, 10, dtype=torch.long),)*2, torch.ones(3), importance_on=kind)[0]
    assert total.isfinite() and torch.autograd.grad(total, maps)[0].isfinite().all()
