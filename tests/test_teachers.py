"Copies, slow averages, statistics and prototype banks: against plain loops, and to the bit against what the methods have."
import copy

import pytest
import torch
from torch import nn

from protonb.deeplab import iapc_small, proda_small
from protonb.deeplabv2 import wdass_small
from protonb.teachers import PrototypeBank, adapt_statistics, average_of, frozen, update_average, without_gradient
from protonb.transforms import normalize, resize_image


class Images:
    "Grey-level noise of given sizes."
    def __init__(self, *sizes):
        g = torch.Generator().manual_seed(0)
        self.items = [torch.randint(0, 256, (3, *s), generator=g, dtype=torch.uint8) for s in sizes]
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i], None


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, momentum=.3))


def states_equal(a, b): return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ------------------------------------------------------------------------------------------------ copies and averages

@pytest.mark.parametrize('make', [iapc_small, proda_small, wdass_small])
def test_copies_collect_no_gradient_and_leave_the_network(make):
    torch.manual_seed(0)
    own = make().train()
    asked = [p.requires_grad for p in own.parameters()]
    for copied, mode in ((frozen(own), False), (frozen(own, train=True), True), (average_of(own), True), (average_of(own, False), False)):
        assert states_equal(own, copied) and copied.training is mode and all(m.training is mode for m in copied.modules())
        assert not any(p.requires_grad for p in copied.parameters()) and {p.data_ptr() for p in copied.parameters()}.isdisjoint(
            p.data_ptr() for p in own.parameters())
    assert own.training and [p.requires_grad for p in own.parameters()] == asked


def test_a_wrapped_network_is_unwrapped():
    wrapped = torch.compile(net())
    assert type(frozen(wrapped)) is type(average_of(wrapped)) is nn.Sequential and list(frozen(wrapped).state_dict()) == list(net().state_dict())
    slow = average_of(net(1))
    update_average(slow, wrapped, 0.)
    assert states_equal(slow, net())


@pytest.mark.parametrize('statistics', [False, True])
def test_the_average_is_a_plain_loop(statistics):
    slow, fast = net(0), net(1)
    fast(torch.randn(4, 3, 9, 9))
    want = {}
    for (name, a), b in zip(slow.state_dict().items(), fast.state_dict().values()):
        mean = name in dict(slow.named_parameters()) or statistics and a.is_floating_point()
        want[name] = torch.lerp(a, b, 1-.9) if mean else b.clone()
    update_average(slow, fast, .9, statistics)
    assert all(torch.equal(want[k], v) for k, v in slow.state_dict().items())
    assert slow[1].num_batches_tracked == 1


def test_without_gradient_restores_also_after_an_error():
    a, b = net(0), net(1)
    a[0].weight.requires_grad_(False)
    before = [[p.requires_grad for p in n.parameters()] for n in (a, b)]
    with pytest.raises(RuntimeError, match='stop'):
        with without_gradient(a, b):
            assert not any(p.requires_grad for n in (a, b) for p in n.parameters())
            x = torch.randn(2, 3, 5, 5, requires_grad=True)
            b[:1](x).sum().backward()
            raise RuntimeError('stop')
    assert [[p.requires_grad for p in n.parameters()] for n in (a, b)] == before
    assert x.grad is not None and all(p.grad is None for p in b.parameters())


# ------------------------------------------------------------------------------------------------ statistics

@pytest.mark.parametrize('batch_size', [2, 5])
def test_adapted_statistics_are_means_over_batches(batch_size):
    images, own = Images(*[(9, 11)]*4), net().eval()
    untouched = copy.deepcopy(own)
    assert adapt_statistics(own, images, batch_size=batch_size) is own and not own.training
    x = [own[0](normalize(torch.stack(images.items[i:i+batch_size]))) for i in range(0, 4, batch_size)]
    assert torch.allclose(own[1].running_mean, torch.stack([v.mean((0, 2, 3)) for v in x]).mean(0), atol=1e-5)
    assert torch.allclose(own[1].running_var, torch.stack([v.var((0, 2, 3)) for v in x]).mean(0), rtol=1e-4)
    assert all(map(torch.equal, own.parameters(), untouched.parameters())) and [own[i].momentum for i in (1, 4)] == [.1, .3]
    again = adapt_statistics(copy.deepcopy(untouched).train(), images, batch_size=batch_size)
    assert again.training and states_equal(again, own)                        # whatever was stored before


def test_images_of_other_sizes_spread_and_inputs():
    images, seen = Images((8, 10), (12, 10), (8, 10), (8, 10), (8, 10)), []
    def inputs(x):
        seen.append(x)
        return x.float()/255
    adapt_statistics(net(), images, count=3, batch_size=2, inputs=inputs)          # two, and one that would be alone
    assert [tuple(x.shape) for x in seen] == [(3, 3, 8, 10)] and seen[0].dtype == torch.uint8
    assert all(torch.equal(a, images.items[i]) for a, i in zip(torch.cat(seen), (0, 2, 4)))
    seen.clear()
    adapt_statistics(net(), images, inputs=inputs)
    assert torch.equal(seen[0][1], resize_image(images.items[1], (8, 10)))


# ------------------------------------------------------------------------------------------------ prototypes

def moved(prototypes, vectors, counts, momentum, min_pixels=10):
    "ProDA's rule, plainly: each image, each class."
    prototypes = prototypes.clone()
    for v, n in zip(vectors, counts):
        for k in range(len(prototypes)):
            if n[k] < min_pixels or v[k].sum() == 0: continue
            prototypes[k] = torch.lerp(v[k], prototypes[k], momentum) if prototypes[k].any() else v[k]
    return prototypes


def draws(seed, N=3, K=6, C=5):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 25, (N, K), generator=g)
    vectors = torch.randn(N, K, C, generator=g)*(counts > 0)[..., None]
    return vectors, counts


@pytest.mark.parametrize('n, batches', [(1, [1]), (2, [2]), (8, [8]), (9, [9]), (10, [8, 2]), (17, [8, 9]), (64, [8]*8)])
def test_no_image_is_a_batch_by_itself(n, batches):
    seen = []
    adapt_statistics(net(), Images(*[(9, 9)]*n), inputs=lambda x: (seen.append(len(x)), normalize(x))[1])
    assert seen[n == 1:] == batches


@pytest.mark.parametrize('n', [1, 9])
def test_a_norm_behind_a_pooling_to_one_pixel(n):
    "One image has no statistics for it: what is stored stays; nine have."
    own = nn.Sequential(*net(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(5))
    own[-1].running_mean.fill_(.5)
    adapt_statistics(own, Images(*[(9, 9)]*n))
    assert (own[-1].running_mean == .5).all() == (n == 1) and own[1].running_mean.any()


@pytest.mark.parametrize('momentum', [.9999, .9, .3])
def test_a_bank_moves_image_by_image(momentum):
    bank, want = PrototypeBank(6, 5), torch.zeros(6, 5)
    for seed in range(4):
        vectors, counts = draws(seed)
        bank.update(vectors, (counts >= 10) & (vectors.sum(2) != 0), momentum)
        want = moved(want, vectors, counts, momentum)
        assert torch.equal(bank.matrix, want) and torch.equal(bank.seen, want.any(1))
    one, loop = PrototypeBank(6, 5), PrototypeBank(6, 5)
    one.update(vectors, counts > 9, momentum)
    for v, ok in zip(vectors, counts > 9): loop.update(v, ok, momentum)
    assert torch.equal(one.matrix, loop.matrix)


def test_a_bank_without_memory_overwrites_and_never_reads_the_rest():
    bank = PrototypeBank(3, 2)
    bank.update(torch.tensor([[1., 2.], [torch.nan, 1.], [torch.inf, 0.]]), torch.tensor([True, False, False]))
    assert bank.matrix.tolist() == [[1, 2], [0, 0], [0, 0]] and bank.seen.tolist() == [True, False, False]
    rows = torch.tensor([[5., torch.nan], [3., 4.], [0., 0.]])
    for momentum in (0., .5): bank.update(rows, torch.tensor([False, True, False]), momentum)
    assert bank.matrix.tolist() == [[1, 2], [3, 4], [0, 0]]
    bank.update(torch.full((3, 2), 2.).double(), torch.ones(3, dtype=torch.bool))
    assert bank.matrix.dtype == torch.float32 and (bank.matrix == 2).all()
    rows = torch.ones(3, 2, requires_grad=True)
    bank.update(rows*3, torch.ones(3, dtype=torch.bool), .9)
    assert not bank.matrix.requires_grad and list(bank.state_dict()) == ['matrix']
    other = PrototypeBank(3, 2)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.matrix, bank.matrix)


@pytest.mark.parametrize('empty', ['keep', 'zero'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_wdass_memory_to_the_bit(empty, dtype):
    from protonb.weighted_prototypes import PrototypeMemory
    memory, banks = PrototypeMemory(6, 5), {d: PrototypeBank(6, 5) for d in ('target', 'source')}
    g = torch.Generator().manual_seed(0)
    for turn in range(8):
        domain = ('target', 'source')[turn % 2]
        rows, present, found = torch.randn(6, 5, generator=g, dtype=dtype), *(torch.rand(2, 6, generator=g) < .6)
        rows[~found] = torch.nan
        memory.update(domain, rows, present, found, empty)
        if empty == 'keep': banks[domain].update(rows, present & found)
        else: banks[domain].update(torch.where(found[:, None], rows, 0), present)
        assert torch.equal(getattr(memory, domain), banks[domain].matrix)


@pytest.mark.parametrize("other,said", [
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), r"where the average has 2.weight \(2, 4, 1, 1\), the other has no more"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)), r"2.weight \(2, 4, 1, 1\), the other has 2.weight \(3, 4, 1, 1\)"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Linear(2, 2)), r"average has no more, the other has 3.weight \(2, 2\)"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1)), r"has 1.running_mean \(4,\)")])
def test_unequal_networks_are_not_averaged(other, said):
    average = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    with pytest.raises(ValueError, match=said): update_average(average, other(), .9)
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())


def test_no_image_is_looked_at_where_no_norm_follows():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert adapt_statistics(net, None, only=("2",)) is net and net[1].num_batches_tracked == 0
