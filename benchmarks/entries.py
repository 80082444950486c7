"""What bench.py measures: for each operation its inputs, shapes, peers, compulsory bytes and operations, and the goals on a CPU.

The peers are the forms one meets in released code and the ones a good engineer writes without this library; all in our own words.
"""
from dataclasses import dataclass, field
from typing import Callable
import torch
import torch.nn.functional as F
from protonb import ops

IGNORE = 255


@dataclass
class Entry:
    name: str                                   # Of the operation in protonb.ops
    cases: Callable                             # (device, quick) -> list of dicts with at least `shape` and `dtype`
    inputs: Callable                            # (case, device) -> dict; `leaves` lists what gets a gradient, `up` is the gradient from above
    providers: Callable                         # (case, device) -> name -> function of the inputs; 'ours' comes first
    bytes: Callable                             # (case, mode) -> bytes that have to be moved
    flops: Callable                             # (case, mode) -> operations that have to be done
    cpu_tests: list                             # arguments of pytest
    gpu_tests: list
    modes: tuple = ('forward', 'both')
    rounding: dict = field(default_factory=lambda: {torch.float32: 2e-4, torch.bfloat16: .1})

    def tolerance(self, case, provider): return self.rounding[case['dtype']]

    def runner(self, provider, inputs, mode):
        "A function that runs one direction or both and returns the results."
        if mode == 'forward':
            def forward():
                with torch.no_grad(): return provider(inputs)
            return forward
        def both():
            for x in inputs['leaves']: x.grad = None
            out = provider(inputs)
            out.backward(inputs.get('up'))          # not autograd.grad: a gradient has to arrive in the layout of its tensor
            return out.detach(), *(x.grad for x in inputs['leaves'])
        return both


# ------------------------------------------------------------------------------------------------ feature maps

def map_case(B, C, h, w, K, dtype=torch.float32, layout='nchw', **more):
    return dict(shape=f'{B}x{C}x{h}x{w} K={K}', B=B, C=C, h=h, w=w, K=K, dtype=dtype, layout=layout, **more)


def map_cases(device, quick):
    "The shapes that the goals are stated for."
    if quick: return [map_case(2, 16, 9, 11, 5), map_case(1, 16, 9, 11, 5, torch.bfloat16, 'channels_last')]
    if device == 'cpu': return [map_case(2, 256, 65, 129, 19), map_case(2, 256, 65, 129, 19, layout='channels_last'), map_case(2, 256, 65, 129, 19, torch.bfloat16)]
    half = torch.bfloat16
    return [map_case(2, 256, 128, 256, 19, half, compiled=True), map_case(2, 256, 128, 256, 19, compiled=True), map_case(2, 2048, 65, 129, 19, half),
            map_case(2, 2048, 65, 129, 19, half, 'channels_last'), map_case(2, 2048, 65, 129, 19), map_case(2, 2048, 65, 129, 19, layout='channels_last'),
            map_case(8, 256, 128, 256, 19, half), map_case(2, 256, 512, 1024, 19, half, compiled=True)]


def feature_map(case, device):
    "Features, labels with a tenth ignored, prototypes."
    g = torch.Generator().manual_seed(0)
    B, C, h, w, K = (case[k] for k in 'BChwK')
    x = torch.randn(B, C, h, w, generator=g).to(device, case['dtype'])
    if case['layout'] == 'channels_last': x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, K, (B, h, w), generator=g)
    y[torch.rand(B, h, w, generator=g) < .1] = IGNORE
    p = torch.randn(K, C, generator=g).to(device)
    return dict(case=case, x=x.requires_grad_(), y=y.to(device), p=p.requires_grad_(), K=K)


def sizes(case):
    "Bytes of the features, of the labels, pixels, C, K."
    N = case['B']*case['h']*case['w']
    return N*case['C']*case['dtype'].itemsize, N*8, N, case['C'], case['K']


def with_compiled(case, device, **peers):
    "Each peer also under torch.compile, on a GPU in the cases that ask for it."
    if device == 'cuda' and case.get('compiled'): peers |= {f'{n} compiled': compiled(f) for n, f in peers.items() if n != 'class loop'}
    return peers


def compiled(f):
    one = torch.compile(f, dynamic=False)
    return lambda i: one(i)


def reference(f, device):
    "Ours without the kernels; only where there are kernels."
    def plain(i):
        with ops.use_backend('torch'): return f(i)
    return {'our reference': plain} if device == 'cuda' else {}


# ------------------------------------------------------------------------------------------------ pooling

def pool_ours(i): return ops.masked_average_pool(i['x'], i['y'], i['K'])[0]


def pool_class_loop(i):
    "Mask, multiply, sum, ask whether there was a pixel; one class after the other."
    out = []
    for k in range(i['K']):
        mask = (i['y'] == k)[:, None].to(i['x'].dtype)
        pixels = mask.sum(dtype=torch.float32)
        out.append(((i['x']*mask).sum((0, 2, 3))/pixels).float() if pixels.item() > 0 else i['x'].new_zeros(i['x'].shape[1], dtype=torch.float32))
    return torch.stack(out)


def one_hot(i):
    K = i['K']
    return F.one_hot(torch.where(i['y'] == IGNORE, K, i['y']), K+1)[..., :K].permute(0, 3, 1, 2).to(i['x'].dtype)


def pool_einsum(i):
    m = one_hot(i)
    return torch.einsum('bchw,bkhw->kc', i['x'], m).float()/m.sum((0, 2, 3), dtype=torch.float32)[:, None].clamp(min=1)


def pool_index_add(i):
    K, C = i['K'], i['x'].shape[1]
    y = torch.where(i['y'] == IGNORE, K, i['y']).flatten()
    rows = i['x'].permute(0, 2, 3, 1).reshape(-1, C)
    s = torch.zeros(K+1, C, dtype=torch.float32, device=rows.device).index_add_(0, y, rows.float())
    return s[:K]/torch.bincount(y, minlength=K+1)[:K, None].clamp(min=1)


def pool_inputs(case, device):
    i = feature_map(case, device)
    return i | dict(leaves=[i['x']], up=torch.randn(case['K'], case['C'], generator=torch.Generator().manual_seed(1)).to(device))


def pool_bytes(case, mode):
    x, y, _, C, K = sizes(case)
    return (x+y+4*K*C)*(1 if mode == 'forward' else 2)


# ------------------------------------------------------------------------------------------------ distance

def ce_ours(i): return ops.prototype_cross_entropy(i['x'], i['p'], i['y'], metric=i['case'].get('metric', 'cosine'), scale=10.)


def ce_class_loop(i):
    "Cosine similarity with one prototype after the other, stacked."
    x = i['x'].float()
    z = torch.stack([F.cosine_similarity(x, p[None, :, None, None], dim=1) for p in i['p']], 1)
    return F.cross_entropy(10*z, i['y'], ignore_index=IGNORE)


def ce_einsum(i):
    "Features brought to length 1, one product, cross-entropy."
    z = torch.einsum('bchw,kc->bkhw', F.normalize(i['x'], dim=1), F.normalize(i['p'], dim=1).to(i['x'].dtype))
    return F.cross_entropy(10*z.float(), i['y'], ignore_index=IGNORE)


def ce_dot_einsum(i):
    z = torch.einsum('bchw,kc->bkhw', i['x'], i['p'].to(i['x'].dtype))
    return F.cross_entropy(10*z.float(), i['y'], ignore_index=IGNORE)


def pixels_first(i): return i['x'].permute(0, 2, 3, 1).reshape(-1, i['x'].shape[1])


def ce_liger(i):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)((10*i['p']).to(i['x'].dtype), pixels_first(i), i['y'].flatten())


def ce_cce(i):
    from cut_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(pixels_first(i), (10*i['p']).to(i['x'].dtype), i['y'].flatten(), ignore_index=IGNORE)


def slow_loop(case, device, loop):
    "The class loop takes seconds on a CPU: measured there in the case that the goals are stated for."
    plain = case['dtype'] == torch.float32 and case['layout'] == 'nchw'
    return {'class loop': loop} if device == 'cuda' or plain else {}


def ce_inputs(case, device):
    i = feature_map(case, device)
    return i | dict(leaves=[i['x'], i['p']])


def ce_cases(device, quick):
    return map_cases(device, quick)+([] if quick or device == 'cpu' else [map_case(2, 256, 128, 256, 19, torch.bfloat16, metric='dot', compiled=True)])


def ce_providers(case, device):
    if case.get('metric') == 'dot':
        return dict(ours=ce_ours)|with_compiled(case, device, **{'einsum + cross_entropy': ce_dot_einsum})|{'Liger FLCE': ce_liger, 'cut-cross-entropy': ce_cce}
    peers = slow_loop(case, device, ce_class_loop)|{'einsum + cross_entropy': ce_einsum}
    return dict(ours=ce_ours)|reference(ce_ours, device)|with_compiled(case, device, **peers)


def ce_bytes(case, mode):
    x, y, N, C, K = sizes(case)
    return x+y+4*N+4*K*C if mode == 'forward' else 3*x+2*y+8*N+12*K*C


def nearest_ours(i): return ops.nearest_prototype(i['x'], i['p'], metric='euclidean')[0]


def nearest_cdist(i): return torch.cdist(pixels_first(i).float(), i['p']).argmin(1).view(i['y'].shape)


def nearest_einsum(i):
    z = torch.einsum('bchw,kc->bkhw', i['x'].float(), i['p'])-i['p'].square().sum(1)[None, :, None, None]/2
    return z.argmax(1)


def logits_ours(i): return ops.prototype_logits(i['x'], i['p'])


def logits_einsum(i): return torch.einsum('bchw,kc->bkhw', F.normalize(i['x'], dim=1), F.normalize(i['p'], dim=1).to(i['x'].dtype)).float()


def logits_class_loop(i): return torch.stack([F.cosine_similarity(i['x'].float(), p[None, :, None, None], dim=1) for p in i['p']], 1)


def logits_inputs(case, device):
    i = feature_map(case, device)
    up = torch.randn(case['B'], case['K'], case['h'], case['w'], generator=torch.Generator().manual_seed(1)).to(device)
    return i | dict(leaves=[i['x'], i['p']], up=up)


# ------------------------------------------------------------------------------------------------ upsampled cross-entropy

def up_case(B, K, h, w, H, W, **more): return dict(shape=f'{B}x{K}x{h}x{w} to {H}x{W}', B=B, K=K, h=h, w=w, H=H, W=W, dtype=torch.float32, **more)


def up_cases(device, quick):
    if quick: return [up_case(1, 5, 5, 7, 17, 25)]
    if device == 'cpu': return [up_case(1, 19, 65, 129, 513, 1025)]
    return [up_case(2, 19, 128, 256, 1024, 2048, compiled=True), up_case(2, 150, 65, 129, 513, 1025)]


def up_inputs(case, device):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(*(case[k] for k in 'BKhw'), generator=g).to(device).requires_grad_()
    y = torch.randint(0, case['K'], tuple(case[k] for k in 'BHW'), generator=g)
    return dict(z=z, y=torch.where(torch.rand(y.shape, generator=g) < .1, IGNORE, y).to(device), leaves=[z])


def up_ours(i): return ops.logits_cross_entropy(i['z'], i['y'])


def up_plain(i): return F.cross_entropy(F.interpolate(i['z'], size=i['y'].shape[1:], mode='bilinear', align_corners=True), i['y'], ignore_index=IGNORE)


def up_bytes(case, mode):
    z, pixels = 4*case['B']*case['K']*case['h']*case['w'], case['B']*case['H']*case['W']
    return z+12*pixels if mode == 'forward' else 3*z+24*pixels


# ------------------------------------------------------------------------------------------------ contrast

def contrast_case(N, M, K, C=256, dtype=torch.float32, **more): return dict(shape=f'{N}x{M}x{C} K={K}', N=N, M=M, K=K, C=C, dtype=dtype, **more)


def contrast_cases(device, quick):
    if quick: return [contrast_case(70, 40, 5, 16)]
    if device == 'cpu': return [contrast_case(65536, 3800, 19)]
    half = torch.bfloat16
    return [contrast_case(8192, 19, 19, dtype=half), contrast_case(8192, 3800, 19, dtype=half, compiled=True), contrast_case(65536, 3800, 19, dtype=half),
            contrast_case(65536, 95000, 19, dtype=half), contrast_case(65536, 3800, 19), contrast_case(65536, 3800, 3800, dtype=half)]


def contrast_inputs(case, device):
    "Rows of length 1; only the queries get a gradient, as in the methods."
    g = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(n, case['C'], generator=g), dim=1).to(device, case['dtype']) for n in (case['N'], case['M']))
    y = torch.randint(0, case['K'], (case['N'],), generator=g).to(device)
    t = (torch.arange(case['M']) % case['K']).to(device)
    return dict(q=q.requires_grad_(), k=k, y=y, t=t, leaves=[q])


def contrast_ours(i): return ops.prototype_contrast(i['q'], i['y'], i['k'], i['t'], temperature=.1)


def contrast_stored(i):
    "The whole (N,M) matrix, its exponential, and a mask."
    s = (i['q']@i['k'].T).float()/.1
    s = s-s.detach().amax(1, keepdim=True)
    positive = i['y'][:, None] == i['t']
    e = s.exp()
    others = (e*~positive).sum(1, keepdim=True)
    return (((e+others).log()-s)*positive).sum(1).div(positive.sum(1).clamp(min=1)).mean()


def contrast_one_positive(i): return F.cross_entropy((i['q']@i['k'].T).float()/.1, i['y'])


def contrast_liger(i):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    return LigerFusedLinearCrossEntropyLoss()(i['k']*10, i['q'], i['y'])


def contrast_cce(i):
    from cut_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(i['q'], i['k']*10, i['y'])


def contrast_providers(case, device):
    if case['K'] == case['M']: peers = {'stored, one positive': contrast_one_positive}
    else: peers = {'stored': contrast_stored}
    more = {'Liger FLCE': contrast_liger, 'cut-cross-entropy': contrast_cce} if device == 'cuda' and case['K'] == case['M'] else {}
    return dict(ours=contrast_ours)|reference(contrast_ours, device)|with_compiled(case, device, **peers)|more


def contrast_bytes(case, mode):
    rows = case['dtype'].itemsize*case['C']
    return (case['N']+case['M'])*rows+8*(case['N']+case['M'])+4*case['N']+(case['N']*rows if mode == 'both' else 0)


# ------------------------------------------------------------------------------------------------ density of neighbours

def density_case(N, C, dtype=torch.float32, **more): return dict(shape=f'{N}x{C}', N=N, C=C, dtype=dtype, **more)


def density_cases(device, quick):
    if quick: return [density_case(70, 19)]
    if device == 'cpu': return [density_case(16384, 19), density_case(16384, 64)]
    return [density_case(16384, 19, compiled=True), density_case(16384, 64, torch.bfloat16, compiled=True), density_case(65536, 64, torch.bfloat16)]


def density_inputs(case, device):
    "Rows of length 1."
    x = torch.randn(case['N'], case['C'], generator=torch.Generator().manual_seed(0))
    return dict(x=F.normalize(x, dim=1).to(device, case['dtype']), leaves=[])


def density_ours(i): return ops.soft_neighbourhood_density(i['x'])


def density_stored(i):
    "The whole (N,N) matrix, its softmax, and the logarithm of that."
    s = ((i['x']@i['x'].T).float()/.05).fill_diagonal_(-torch.inf)
    return torch.special.entr(s.softmax(1)).sum(1).mean()


# ------------------------------------------------------------------------------------------------ all of them, and the goals on a CPU

def map_flops(forward, both):
    "Multiplications and additions, given how many products with the prototypes each direction takes."
    return lambda case, mode: 2*sizes(case)[2]*case['C']*case['K']*(forward if mode == 'forward' else both)


def tests(kernel, words): return dict(cpu_tests=['tests/test_ops.py', '-k', words], gpu_tests=[f'tests/test_kernels_{kernel}.py'])


ENTRIES = [
    Entry('masked_average_pool', map_cases, pool_inputs,
          lambda case, device: dict(ours=pool_ours)|reference(pool_ours, device)|with_compiled(
              case, device, **slow_loop(case, device, pool_class_loop), **{'one-hot einsum': pool_einsum, 'index_add_': pool_index_add}),
          pool_bytes, map_flops(1, 2), **tests('pooling', 'pool')),
    Entry('prototype_cross_entropy', ce_cases, ce_inputs, ce_providers, ce_bytes, map_flops(1, 4), **tests('distance', 'cross_entropy')),
    Entry('prototype_logits', map_cases, logits_inputs,
          lambda case, device: dict(ours=logits_ours)|reference(logits_ours, device)|with_compiled(
              case, device, **slow_loop(case, device, logits_class_loop), **{'normalise + einsum': logits_einsum}),
          lambda case, mode: sizes(case)[0]*(1 if mode == 'forward' else 3)+4*sizes(case)[2]*case['K']*(1 if mode == 'forward' else 2),
          map_flops(1, 3), **tests('distance', 'logits')),
    Entry('nearest_prototype', map_cases, feature_map,
          lambda case, device: dict(ours=nearest_ours)|reference(nearest_ours, device)|with_compiled(
              case, device, **{'cdist + argmin': nearest_cdist, 'einsum + argmax': nearest_einsum}),
          lambda case, mode: sizes(case)[0]+12*sizes(case)[2], map_flops(1, 1), modes=('forward',), rounding={torch.float32: 1e-3, torch.bfloat16: 1e-3},
          **tests('distance', 'nearest')),
    Entry('logits_cross_entropy', up_cases, up_inputs,
          lambda case, device: dict(ours=up_ours)|reference(up_ours, device)|with_compiled(case, device, **{'resize + cross_entropy': up_plain}),
          up_bytes, lambda case, mode: 8*case['B']*case['K']*case['H']*case['W']*(1 if mode == 'forward' else 3), **tests('upsampling', 'resize_then or no_pixel or valid_classes or out_of_range')),
    Entry('prototype_contrast', contrast_cases, contrast_inputs, contrast_providers, contrast_bytes,
          lambda case, mode: 2*case['N']*case['M']*case['C']*(1 if mode == 'forward' else 2),
          modes=('both',), cpu_tests=['tests/test_contrast.py'], gpu_tests=['tests/test_kernels_contrast.py'], rounding={torch.float32: 1e-3, torch.bfloat16: .1}),
    Entry('soft_neighbourhood_density', density_cases, density_inputs,
          lambda case, device: dict(ours=density_ours)|reference(density_ours, device)|with_compiled(case, device, stored=density_stored),
          lambda case, mode: case['N']*case['C']*case['dtype'].itemsize, lambda case, mode: 2*case['N']**2*case['C'], modes=('forward',),
          cpu_tests=['tests/test_density.py'], gpu_tests=['tests/test_kernels_density.py']),
]

MAIN, FEATURES_MB = '2x256x65x129 K=19', 2*256*65*129*4/1e6
GOALS = [
    dict(op='masked_average_pool', mode='both', shape=MAIN, faster={'class loop': 30, 'one-hot einsum': 5}, extra_MB=.1*FEATURES_MB),
    dict(op='prototype_cross_entropy', mode='both', shape=MAIN, faster={'class loop': 45, 'einsum + cross_entropy': 4}, extra_MB=.1*FEATURES_MB),
    dict(op='nearest_prototype', mode='forward', shape=MAIN, faster={'cdist + argmin': 5}, extra_MB=.1*FEATURES_MB),
    dict(op='prototype_contrast', mode='both', shape='65536x3800x256 K=19', faster={'stored': 1/1.2}, extra_MB=64*1.048576),
    dict(op='soft_neighbourhood_density', mode='forward', shape='16384x64', faster={'stored': 1/1.2}, extra_MB=64*1.048576),
]
