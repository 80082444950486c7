"""What bench.py measures of the methods: the part of a step outside the backbone, at a crop of 256x512 with the feature sizes of the exact networks, against the released way to compute it.

Our own words for the released ways: loops over images and classes, copies with the channels last, whole maps of enlarged logits, one softmax for every term. CPU only.
"""
import torch
import torch.nn.functional as F
from entries import Entry, IGNORE

from protonb import iapc, pbal, proda

H, W, K = 256, 512, 19


def case(name, B, C, h, w): return dict(shape=f'{name} {B}x{C}x{h}x{w} to {H}x{W}', B=B, C=C, h=h, w=w, dtype=torch.float32)


def only_cpu(full, small):
    return lambda device, quick: [] if device != 'cpu' else [small if quick else full]


def tensors(c, **channels):
    "Random maps of the given channels, and labels with a tenth ignored."
    g = torch.Generator().manual_seed(0)
    maps = {n: torch.randn(c['B'], k, c['h'], c['w'], generator=g) for n, k in channels.items()}
    y = torch.randint(0, K, (c['B'], H, W), generator=g)
    return maps, torch.where(torch.rand(y.shape, generator=g) < .1, IGNORE, y), g


def up(z): return F.interpolate(z, (H, W), mode='bilinear', align_corners=True)


# ------------------------------------------------------------------------------------------------ IAPC

IAPC = iapc.IAPC()


def iapc_inputs(c, device):
    m, y, g = tensors(c, z=K, z_source=K, z_memory=K, f=c['C'], f_memory=c['C'])
    m = {n: t.abs() if n[0] == 'f' else t for n, t in m.items()}      # never negative, and never without direction
    return m | dict(y=y, omega=torch.rand(K, generator=g)*6+1, leaves=[m['z'].requires_grad_(), m['f'].requires_grad_()])


def iapc_ours(i): return iapc.losses(i['z'], i['f'], i['z_source'], i['z_memory'], i['f_memory'], i['y'], i['omega'], IAPC)[0]


def iapc_released(i):
    "Class after class in image after image; a full sort for the two best; a softmax for each term."
    cells, sims = i['f'].shape[2:], []
    y_m = F.interpolate(up(i['z_memory']).argmax(1)[:, None].float(), cells)[:, 0].long()
    for b in range(len(y_m)):
        rows, memory = i['f'][b].permute(1, 2, 0).reshape(-1, i['f'].shape[1]), i['f_memory'][b].permute(1, 2, 0).reshape(-1, i['f'].shape[1])
        protos = []
        for k in range(K):
            here = y_m[b].flatten() == k
            protos.append(memory[here].mean(0) if here.any() else memory.new_zeros(memory.shape[1]))
        sims.append(F.normalize(rows, dim=1)@F.normalize(torch.stack(protos), dim=1).T)
    S = torch.stack(sims).transpose(1, 2).reshape(len(sims), K, *cells)
    y, y_p, z = i['y'], F.interpolate(S.argmax(1)[:, None].float(), (H, W))[:, 0].long(), up(i['z'])
    best = up(i['z_source']).sort(1, descending=True).values
    weighted = F.cross_entropy(z, y, weight=i['omega'], ignore_index=IGNORE, reduction='none')
    again = F.cross_entropy(z, torch.where(y_p == y, y, IGNORE), weight=i['omega'], ignore_index=IGNORE, reduction='none')
    entropy = -(z.softmax(1)*(z.softmax(1)+1e-5).log()).sum(1).mean()
    first = ((1-best[:, 1]/best[:, 0])*weighted).mean()
    two = F.cross_entropy(z, y_p)+F.cross_entropy(up(S), z.argmax(1))
    return IAPC.importance*first+IAPC.symmetric*two+IAPC.enhanced*again.mean()+IAPC.entropy*entropy


# ------------------------------------------------------------------------------------------------ PBAL

def pbal_inputs(c, device):
    m, y, g = tensors(c, f=c['C'])
    w, m['f'] = torch.randn(K, c['C'], generator=g)*.05, m['f'].abs()
    z = F.conv2d(m['f'], w[:, :, None, None])                      # the head belongs to the network
    return m | dict(w=w, z=z, y=y, leaves=[m['f'].requires_grad_(), w.requires_grad_(), z.requires_grad_()])


def bpl_ours(i):
    z = i['z']
    return pbal.cross_entropy(z, i['y'])+.1*sum(pbal.alignment(i['f'], z, i['w']))


def cosines(f, w):
    "Normalised copies with the channels last, then one product."
    rows = F.normalize(f, dim=1).permute(0, 2, 3, 1).contiguous()
    return (rows@F.normalize(w, dim=1).T).permute(0, 3, 1, 2).contiguous()


def bpl_released(i):
    z = i['z']
    cost = 1-cosines(i['f'], i['w'].detach())
    s2t = (z.softmax(1)*cost).sum(1).mean()
    flat, costs = z.transpose(0, 1).reshape(K, -1).contiguous(), cost.transpose(0, 1).reshape(K, -1).contiguous()
    return F.cross_entropy(up(z), i['y'], ignore_index=IGNORE)+.1*(s2t+(flat.softmax(1)*costs).sum(1).mean())


def pst_ours(i): return pbal.cross_entropy(i['z'], i['y'])+pbal.prototype_contrast_term(i['f'], i['w'], i['y'])


def pst_released(i):
    y = i['y'][:, ::H//i['f'].shape[2], ::W//i['f'].shape[3]]
    e = (cosines(i['f'], i['w'])/.07).permute(0, 2, 3, 1).reshape(-1, K)
    hot = F.one_hot(torch.where(y == IGNORE, K, y).flatten(), K+1).float()[:, :K]
    own, others = (e.exp()*hot).sum(1), (e.exp()*(1-hot)).sum(1)
    keep = hot.sum(1)
    contrast = -(keep*(torch.where(keep > 0, own, 1.)/(own+others+1e-10)).log()).mean()
    return F.cross_entropy(up(i['z']), i['y'], ignore_index=IGNORE)+contrast


# ------------------------------------------------------------------------------------------------ ProDA

def proda_inputs(c, device):
    m, y, g = tensors(c, f=c['C'], teacher=c['C'])
    return m | dict(p=torch.randn(K, c['C'], generator=g), leaves=[m['f'].requires_grad_()])


def proda_ours(i):
    inside = torch.ones_like(i['f'][:, 0], dtype=torch.bool)
    with torch.no_grad(): d = proda.distances(i['teacher'], i['p'])
    return proda.consistency(d, inside, proda.distances(i['f'], i['p']))


def proda_released(i):
    "One difference map of all channels for every class, teacher twice (labels, consistency)."
    far = lambda f: torch.stack([(f-p[None, :, None, None]).norm(dim=1) for p in i['p']], 1)
    with torch.no_grad(): t, _ = (-far(i['teacher'])).softmax(1), far(i['teacher'])
    s = (-far(i['f'])).log_softmax(1)
    return (t*(t.log()-s)).mean()


# ------------------------------------------------------------------------------------------------ all of them

def entry(name, cases, inputs, ours, released, tests):
    return Entry(name, cases, inputs, lambda case, device: {'ours': ours, 'released way': released},
                 lambda c, mode: 4*c['B']*c['C']*c['h']*c['w']*3, lambda c, mode: 2*c['B']*c['h']*c['w']*c['C']*K*3, cpu_tests=tests, gpu_tests=[], modes=('both',),
                 rounding={torch.float32: 2e-3})


METHODS = [
    entry('iapc_losses', only_cpu(case('IAPC', 2, 1024, 33, 65), case('IAPC', 1, 8, 33, 65)), iapc_inputs, iapc_ours, iapc_released, ['tests/test_iapc.py', '-k', 'loss']),
    entry('pbal_bpl', only_cpu(case('BPL', 2, 256, 64, 128), case('BPL', 1, 8, 64, 128)), pbal_inputs, bpl_ours, bpl_released, ['tests/test_pbal.py', '-k', 'alignment or released']),
    entry('pbal_pst', only_cpu(case('PST', 2, 256, 64, 128), case('PST', 1, 8, 64, 128)), pbal_inputs, pst_ours, pst_released, ['tests/test_pbal.py', '-k', 'contrast']),
    entry('proda_distances', only_cpu(case('ProDA', 2, 256, 64, 128), case('ProDA', 1, 8, 64, 128)), proda_inputs, proda_ours, proda_released, ['tests/test_proda.py', '-k', 'distances or consistency']),
]
GOALS = [dict(op=m.name, mode='both', shape=m.cases('cpu', False)[0]['shape'], faster={'released way': 2}) for m in METHODS]
