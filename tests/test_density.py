"The plain PyTorch density against its formula written out, and what it holds in memory."
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from protonb import density
from protonb.density import density_fwd, neighbourhood_density_ref
from protonb.ops import soft_neighbourhood_density


def rows(N, C, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


def loop(x, temperature):
    "The formula, one row and one neighbour at a time -> (N,)."
    out = []
    for i in range(len(x)):
        s = [float(x[i] @ x[j])/temperature for j in range(len(x)) if j != i]
        z = sum(math.exp(v-max(s)) for v in s)
        p = [math.exp(v-max(s))/z for v in s]
        out.append(-sum(v*math.log(v) for v in p if v > 0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize('tiles', [None, (5, 7), (1, 1), (64, 3)], ids=str)
@pytest.mark.parametrize('N, C', [(23, 5), (2, 1), (40, 2)])
def test_is_its_definition(N, C, tiles, monkeypatch, poison):
    if tiles: monkeypatch.setattr(density, '_tile_shape', lambda bank: tiles)
    x = rows(N, C)
    for tau in (.05, 1.): torch.testing.assert_close(density_fwd(x, tau), loop(x, tau), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(density_fwd(1e3*x, 1.), loop(1e3*x, 1.), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_layouts(dtype):
    x = rows(70, 6, dtype=dtype)
    want = loop(x.double(), .05)
    for y in (x, x.T.contiguous().T, torch.zeros(140, 9, dtype=dtype)[1::2, 2:8].copy_(x)):
        got = density_fwd(y, .05)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_reductions_and_nothing():
    x = rows(9, 4)
    each = soft_neighbourhood_density(x, reduction='none')
    torch.testing.assert_close(soft_neighbourhood_density(x), each.mean())
    torch.testing.assert_close(soft_neighbourhood_density(x, reduction='sum'), each.sum())
    for n in (0, 1): assert soft_neighbourhood_density(x[:n]) == 0 and soft_neighbourhood_density(x[:n], reduction='none').tolist() == [0.]*n
    grad = soft_neighbourhood_density(x.clone().requires_grad_())
    assert not grad.requires_grad


@pytest.mark.slow
@pytest.mark.own_blas
@pytest.mark.parametrize('C', [19, 64])
def test_16384_features_in_under_64_megabytes(C):
    "The whole definition of done: extra memory by the profiler, and every row against the stored form in float64."
    x = rows(16384, C, dtype=torch.float32)
    if C == 19: x = F.normalize((8*x).softmax(1), dim=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: got = neighbourhood_density_ref(x, reduction='none')
    now = peak = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    assert 0 < peak < 64*2**20
    truth = x.double()
    for i in range(0, len(x), 4096):                     # a quarter of the rows
        s = truth[i:i+1024] @ truth.T/.05
        s[torch.arange(1024), torch.arange(i, i+1024)] = -math.inf
        want = torch.special.entr(s.softmax(1)).sum(1)
        assert (got[i:i+1024].double()-want).abs().max() < 1e-5
