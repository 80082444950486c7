"Groups, optimisers and schedules: each method's own, written out plainly, against the shared functions; updates to the bit."
import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from protonb.core import InputError
from protonb.deeplab import iapc_small, pbal_small, proda_small, released_repeats
from protonb.deeplabv2 import pixda_small, wdass_small
from protonb.dip_net import dip_small, freeze, under
from protonb.optimization import (
    RepeatedSGD, constant, first_by_itself, first_step_full_lr, linear_warm_up, make_optimizer, parameter_groups, polynomial, schedule)


def head_and_body(net, lr, factor, repeats=None):
    "The plain form: one group per (head or not, updates a step)."
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad: groups.setdefault((under(name, net.head_prefixes), (repeats or {}).get(name, 1)), []).append(p)
    return [dict(params=groups[k], lr=lr*factor if k[0] else lr, repeats=k[1]) for k in sorted(groups)]


def four_groups(net, lr, wd, factor):
    groups = [dict(params=[], lr=lr*k, weight_decay=d) for k in (1, factor) for d in (wd, 0.)]
    for name, p in net.named_parameters():
        if p.requires_grad: groups[2*under(name, net.head_prefixes) + (p.ndim < 2)]['params'].append(p)
    return groups


def first_alone(opt, momentum):
    def after(opt, *_):
        for g in opt.param_groups: g['momentum'] = momentum
    opt.register_step_post_hook(after)
    return opt


def iapc_factor(i, warm=4, length=30): return .1 + .9*i/warm if i < warm else max(0., 1-i/length)**.9
def wdass_factor(n, rampup=3, length=30, power=.9): return n/rampup if n < rampup else max(0., 1-n/length)**power


def projection(): return nn.Linear(8, 4)


def plain(kind, net, more):
    "(optimizer, factor) as each method wrote it."
    SGD, times = torch.optim.SGD, released_repeats(net) if 'released' in kind else None
    grown = head_and_body(net, .01, 10., times)
    if kind == 'source_only':
        return SGD([p for p in net.parameters() if p.requires_grad], lr=.01, momentum=.9, weight_decay=5e-4), lambda n: max(0., 1-(n+1)/30)**.9
    if kind == 'pbal':
        grown[-1]['params'] += list(more.parameters())
        return SGD(grown, lr=.01, momentum=.9, weight_decay=5e-4), lambda n: max(0., 1-(n+1)/30)**.9
    if kind.startswith('proda'):
        return RepeatedSGD(grown, lr=.01, momentum=.9, weight_decay=2e-4), lambda n: max(0., 1-n/30)**.9
    if kind.startswith('iapc'): return RepeatedSGD(grown, .01, .9, weight_decay=5e-4, nesterov=True), iapc_factor
    if kind.startswith('pixda'):
        return first_alone(RepeatedSGD(grown, .01, momentum=0., weight_decay=5e-4), .9), lambda n: max(0., 1-n/25)**.9
    assert kind.startswith('wdass')
    late = lambda n: (1. if n == 0 else wdass_factor(n-1)) if kind == 'wdass late' else wdass_factor(n)
    return SGD(four_groups(net, .01, 1e-4, 10.), lr=.01, momentum=.9), late


def shared(kind, net, more):
    "The same from the shared functions."
    times = released_repeats(net) if 'released' in kind else {}
    groups = lambda wd, **kw: parameter_groups(net, .01, 10., weight_decay=wd, **kw)
    if kind == 'source_only': return make_optimizer('sgd', parameter_groups(net, .01, weight_decay=5e-4), .01), polynomial(30, ahead=1)
    if kind == 'pbal': return make_optimizer('sgd', groups(5e-4, more=more.parameters()), .01), polynomial(30, ahead=1)
    if kind.startswith('proda'): return make_optimizer('sgd', groups(2e-4, repeats=times), .01), polynomial(30)
    if kind.startswith('iapc'):
        return make_optimizer('sgd', groups(5e-4, repeats=times), .01, nesterov=True), linear_warm_up(4, .1, polynomial(30))
    if kind.startswith('pixda'):
        return first_by_itself(make_optimizer('sgd', groups(5e-4, repeats=times), .01, momentum=0.), .9), polynomial(25)
    factor = linear_warm_up(3, 0., polynomial(30))
    return make_optimizer('sgd', groups(1e-4, decay='weights'), .01), first_step_full_lr(factor) if kind == 'wdass late' else factor


NETS = {'source_only': lambda: freeze(dip_small(), ('layer0',)), 'pbal': pbal_small, 'proda': proda_small, 'proda released': proda_small,
        'iapc': iapc_small, 'iapc released': iapc_small, 'pixda': pixda_small, 'pixda released': pixda_small,
        'wdass': wdass_small, 'wdass late': wdass_small}


def started(kind):
    torch.manual_seed(0)
    return NETS[kind](), projection()


def per_tensor(opt, *nets):
    of = {id(p): g for g in opt.param_groups for p in g['params']}
    keys = 'lr', 'weight_decay', 'momentum', 'nesterov'
    return [id(p) in of and [of[id(p)][k] for k in keys] + [of[id(p)].get('repeats', 1)] for net in nets for p in net.parameters()]


def ten_updates(opt, factor, *nets):
    "Ten steps with drawn gradients, some of them missing."
    sched, generator, rates = LambdaLR(opt, factor), torch.Generator().manual_seed(1), []
    for t in range(10):
        for net in nets:
            for i, p in enumerate(net.parameters()):
                grad = torch.randn(p.shape, generator=generator)
                p.grad = None if not p.requires_grad or i == t else grad
        rates.append(sched.get_last_lr())
        opt.step()
        sched.step()
    return rates, [p.detach().clone() for net in nets for p in net.parameters()]


def same(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize('kind', NETS)
def test_each_method_to_the_bit(kind):
    (net, more), (net2, more2) = started(kind), started(kind)
    (a, fa), (b, fb) = plain(kind, net, more), shared(kind, net2, more2)
    assert per_tensor(a, net, more) == per_tensor(b, net2, more2)
    order = lambda opt, *nets: [[id(p) for n in nets for p in n.parameters()].index(id(p)) for g in opt.param_groups for p in g['params']]
    assert order(a, net, more) == order(b, net2, more2)                       # a saved state belongs to the same tensors
    assert a.param_groups[0]['lr'] == b.param_groups[0]['lr'] == .01
    ra, wa = ten_updates(a, fa, net, more)
    rb, wb = ten_updates(b, fb, net2, more2)
    assert ra == rb and same(wa, wb)
    start, _ = started(kind)
    assert not same(wa[:len(list(start.parameters()))], list(start.parameters()))


def test_the_schedule_of_the_loop_is_one_of_these():
    from protonb.training import poly_lr
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.)
    for power in (.5, .9, 1.):
        old, new = poly_lr(opt, 37, power).lr_lambdas[0], polynomial(37, power, 1)
        assert [old(n) for n in range(45)] == [new(n) for n in range(45)]


# ------------------------------------------------------------------------------------------------ groups

def test_a_released_repeating_group_and_its_decay():
    net = iapc_small()
    times = released_repeats(net)
    groups = parameter_groups(net, .1, 10., weight_decay=1e-4, decay='weights', repeats=times)
    assert all(set(g) == {'params', 'lr', 'weight_decay', 'repeats'} for g in groups)
    of = {id(p): g for g in groups for p in g['params']}
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    assert len(of) == len(named) == sum(len(g['params']) for g in groups)
    for name, p in named:
        g, head = of[id(p)], under(name, net.head_prefixes)
        assert g['lr'] == (1. if head else .1) and g['weight_decay'] == (1e-4 if p.ndim >= 2 else 0.) and g['repeats'] == times[name]


def test_a_network_without_a_head_and_a_factor_of_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert [len(g['params']) for g in parameter_groups(net, .1, 10.)] == [4]
    one = parameter_groups(proda_small(), .1, 1.)
    assert len(one) == 1 and one[0]['lr'] == .1 and 'repeats' not in one[0]
    more = projection()
    assert [len(g['params']) for g in parameter_groups(net, .1, 10., more=more.parameters())] == [4, 2]
    assert [len(g['params']) for g in parameter_groups(net, .1, more=more.parameters())] == [6]
    assert [(len(g['params']), g['weight_decay']) for g in parameter_groups(net, .1, weight_decay=.01, decay='weights')] == [(1, .01), (3, 0.)]
    more.weight.requires_grad_(False)
    assert [len(g['params']) for g in parameter_groups(net, .1, 10., more=more.parameters())] == [4, 1]


# ------------------------------------------------------------------------------------------------ optimisers

@pytest.mark.parametrize('kind,cls,keys', [('adam', torch.optim.Adam, {}), ('adamw', torch.optim.AdamW, dict(weight_decay=0.)),
                                           ('sgd', torch.optim.SGD, dict(momentum=.9))])
def test_the_parameters_of_a_small_network(kind, cls, keys):
    torch.manual_seed(0)
    a = projection()
    b = copy.deepcopy(a)
    betas = {} if kind == 'sgd' else dict(betas=(.9, .99))
    left, right = cls(a.parameters(), lr=1e-2, **keys, **betas), make_optimizer(kind, b.parameters(), 1e-2, **betas)
    assert type(right) is cls and per_keys(left) == per_keys(right)
    assert same(ten_updates(left, constant(), a)[1], ten_updates(right, constant(), b)[1])


def per_keys(opt): return [{k: v for k, v in g.items() if k != 'params'} for g in opt.param_groups]


def test_decay_of_adamw_is_that_of_the_groups():
    net = nn.Linear(3, 2)
    opt = make_optimizer('adamw', parameter_groups(net, 1., weight_decay=.1, decay='weights'), 1., betas=[.9, .95])
    before = copy.deepcopy(net)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.allclose(net.weight, .9*before.weight) and torch.equal(net.bias, before.bias)
    assert opt.param_groups[0]['betas'] == (.9, .95)


def test_repeats_ask_for_the_repeating_sgd():
    groups = lambda repeats: parameter_groups(projection(), .1, repeats=repeats)
    assert type(make_optimizer('sgd', groups(None), .1)) is torch.optim.SGD
    assert type(make_optimizer('sgd', groups({}), .1)) is RepeatedSGD
    assert type(make_optimizer('adam', groups({}), .1)) is torch.optim.Adam
    with pytest.raises(InputError, match='asks for 3'): make_optimizer('adamw', groups({'weight': 3}), .1)
    with pytest.raises(ValueError, match='repeats is 0'): make_optimizer('sgd', groups({'weight': 0}), .1)


@pytest.mark.parametrize('call,words', [
    (lambda: parameter_groups(projection(), .1, decay='none'), "decay is 'none'"),
    (lambda: make_optimizer('lion', projection().parameters(), .1), "optimizer is 'lion'"),
    (lambda: make_optimizer('sgd', parameter_groups(projection().requires_grad_(False), .1), .1), 'nothing to train'),
    (lambda: polynomial(0), 'length is 0'), (lambda: polynomial(-3), 'length is -3')])
def test_mistakes_are_named(call, words):
    with pytest.raises(InputError, match=words): call()


def test_a_stopped_run_goes_on():
    torch.manual_seed(0)
    whole, half = (copy.deepcopy(n) for n in [projection()]*2)
    make = lambda net: make_optimizer('sgd', parameter_groups(net, .1, repeats={'weight': 2}), .1)
    factor = first_step_full_lr(linear_warm_up(3, .2, polynomial(12)))

    def go(net, opt, sched, turns):
        for t in turns:
            for p in net.parameters(): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            opt.step()
            sched.step()
    opt = make(whole)
    go(whole, opt, schedule(opt, factor), range(8))
    opt = make(half)
    sched = schedule(opt, factor)
    go(half, opt, sched, range(4))
    states = copy.deepcopy((opt.state_dict(), sched.state_dict()))
    opt = make(half)
    sched = schedule(opt, factor)
    for part, state in zip((opt, sched), states): part.load_state_dict(state)
    go(half, opt, sched, range(4, 8))
    assert same(list(whole.parameters()), list(half.parameters()))


# ------------------------------------------------------------------------------------------------ schedules

@pytest.mark.parametrize('length', [1, 7, 90_000])
def test_ends_of_the_polynomial(length):
    f, g = polynomial(length), polynomial(length, ahead=1)
    assert f(0) == 1 and f(length) == f(length+1) == 0 and g(length-1) == g(length) == 0
    assert [g(n) for n in range(30)] == [f(n+1) for n in range(30)] and all(f(n) >= f(n+1) for n in range(30))


@pytest.mark.parametrize('warm,length', [(5000, 100_000), (1, 20), (30, 30), (7, 3)])
def test_warm_ups_of_the_papers(warm, length):
    turns = [*range(31), warm-1, warm, warm+1, length-1, length, length+1]
    iapc, wdass = linear_warm_up(warm, .1, polynomial(length)), linear_warm_up(warm, then=polynomial(length, 1.))
    assert [iapc(n) for n in turns] == [iapc_factor(n, warm, length) for n in turns]
    assert [wdass(n) for n in turns] == [wdass_factor(n, warm, length, 1.) for n in turns]


def test_no_warm_up_and_nothing_after_it():
    assert [linear_warm_up(0, then=polynomial(9))(n) for n in range(12)] == [polynomial(9)(n) for n in range(12)]
    assert [linear_warm_up(2, .5)(n) for n in range(4)] == [.5, .75, 1, 1]
    assert constant()(0) == constant()(10**6) == 1
