"PBAL against a plain reading of what the released code computes, its edge cases, its stages, and two processes against one."
import json, os, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from PIL import Image
from torch.nn import functional as F

from protonb import distillation, pbal
from protonb.core import InputError
from protonb.datasets import images
from protonb.deeplab import pbal_small
from protonb.discriminators import class_map, pbal_discriminator
from protonb.distillation import Distill
from protonb.labels import IGNORE
from protonb.methods import Job, train
from protonb.pbal import (BPL, PST, WarmUp, alignment, bpl_step, prototype_contrast_term,
                          pst_step)
from protonb.processes import cross_entropy
from protonb.pseudo_labels import Unlabelled
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.training import Train, checkpoints, poly_lr, read_metrics, read_states
from protonb.transforms import normalize, resize_label
from protonb.windows import Window

K, C = 5, 7
WINDOW = Window(base_width=96, low=.7, high=1.3, crop_height=32, crop_width=48, flip_p=.5)

class Tiny(nn.Module):
    "Features at a quarter of the image and a classifier on them; no batch norm, no dropout."
    def __init__(self, num_classes=K, channels=C):
        super().__init__()
        self.channels, self.num_classes, self.head_prefixes, self.frozen_prefixes = channels, num_classes, ('classifier',), ()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, channels, 3, 1, 1))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x, features=False):
        f = self.body(x)
        return (self.classifier(f), f) if features else self.classifier(f)

def toy(seed=0, B=2, h=5, w=6, dtype=torch.float64):
    "Features, classifier weight and bias, labels four times as fine with 23 % ignored."
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(B, C, h, w, generator=g, dtype=dtype).requires_grad_()
    W, b = (torch.randn(*s, generator=g, dtype=dtype).requires_grad_() for s in ((K, C), (K,)))
    y = torch.randint(K, (B, 4*h, 4*w), generator=g)
    y[torch.rand(y.shape, generator=g) < .23] = IGNORE
    return f, W, b, y

def logits_of(f, W, b): return F.conv2d(f, W[:, :, None, None], b)

def gradients(loss, *tensors):
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True))]

# What the released code computes, written down pixel by pixel and class by class.

def plain_cosines(f, W):
    "(pixels, K), pixels in the order n, i, j"
    pixels = f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
    unit = lambda v: v/v.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit(pixels) @ unit(W).T

def plain_alignment(f, z, W):
    D = 1 - plain_cosines(f, W.detach())
    z = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    forth = sum((torch.softmax(z[p], 0)*D[p]).sum() for p in range(len(z)))/len(z)
    back = sum((torch.softmax(z[:, k], 0)*D[:, k]).sum() for k in range(z.shape[1]))/z.shape[1]
    return forth, back

def plain_contrast(f, W, y, tau=.07):
    sims, flat = (plain_cosines(f, W)/tau), y[:, ::4, ::4].flatten()
    total = sims.new_zeros(())
    for p, k in enumerate(flat.tolist()):
        if k == IGNORE: continue
        e = sims[p].exp()
        total = total - torch.log(e[k]/(e.sum() + 1e-10))
    return total/len(flat)

# The losses

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_alignment_is_the_released_one(seed):
    f, W, b, _ = toy(seed)
    z = logits_of(f, W, b)
    for got, want in zip(alignment(f, z, W), plain_alignment(f, z, W)):
        assert got.item() == pytest.approx(want.item(), abs=1e-6)
        for a, e in zip(gradients(got, f, W, b), gradients(want, f, W, b)): assert torch.allclose(a, e, atol=1e-9, rtol=1e-5)

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_contrast_is_the_released_one(seed):
    f, W, _, y = toy(seed)
    got, want = prototype_contrast_term(f, W, y), plain_contrast(f, W, y)
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    for a, e in zip(gradients(got, f, W), gradients(want, f, W)): assert torch.allclose(a, e, atol=1e-8, rtol=1e-5)
    assert gradients(got, W)[0].abs().sum() > 0

def test_float32_is_as_good():
    f, W, b, y = toy(3, dtype=torch.float32)
    z = logits_of(f, W, b)
    for got, want in zip((*alignment(f, z, W), prototype_contrast_term(f, W, y)), (*plain_alignment(f, z, W), plain_contrast(f, W, y))):
        assert got.item() == pytest.approx(want.item(), abs=2e-6)
        assert torch.allclose(gradients(got, f)[0], gradients(want, f)[0], atol=1e-5, rtol=1e-4)

def test_costs_are_least_where_pixels_are_their_rows():
    "Every pixel carries the row of a class, every class has pixels, and the choices are sharp: nothing is left to pay."
    W = torch.randn(K, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(K).repeat(4)[:18].view(1, 3, 6)
    f = W[y].permute(0, 3, 1, 2)*torch.rand(1, 1, 3, 6, dtype=torch.float64).add(.5)
    sharp = F.one_hot(y, K).permute(0, 3, 1, 2)*400.
    for loss in alignment(f, sharp.double(), W): assert abs(loss.item()) < 1e-12
    same = W[2].view(1, C, 1, 1).expand(1, C, 3, 6)
    cost = 1 - pbal.prototype_logits(same, W)
    assert cost[:, 2].abs().max() < 1e-12 and cost.min() > -1e-12
    far = alignment(f.roll(1, 3), sharp.double(), W)
    assert min(far) > .05

def test_gradients_go_where_they_should():
    f, W, b, _ = toy(4)
    z = logits_of(f, W, b)
    s2t, t2s = alignment(f, z, W)
    assert gradients(t2s, b)[0].abs().max() < 1e-15      # a bias shifts all pixels of a class alike
    assert gradients(alignment(f, logits_of(f, W, b), W)[0], b)[0].abs().max() > 1e-6
    s2t, t2s = alignment(f, z.detach(), W)               # plans held fixed: only the costs are left, and they know no W
    assert torch.autograd.grad(s2t+t2s, W, allow_unused=True, retain_graph=True) == (None,)
    assert gradients(alignment(f, z.detach(), W)[0], f)[0].abs().max() > 0

def test_t2s_softmax_runs_over_the_batch():
    f, W, b, _ = toy(5, B=3)
    z = logits_of(f, W, b)
    whole = alignment(f, z, W)
    each = [alignment(f[i:i+1], z[i:i+1], W) for i in range(3)]
    assert whole[0].item() == pytest.approx(sum(e[0] for e in each).item()/3)
    assert abs(whole[1] - sum(e[1] for e in each)/3) > 1e-3
    merged = alignment(torch.cat(list(f), 2)[None], torch.cat(list(z), 2)[None], W)
    assert whole[1].item() == pytest.approx(merged[1].item())

def test_contrast_divides_by_all_or_by_the_valid():
    f, W, _, y = toy(6)
    kept = (resize_label(y, (5, 6)) != IGNORE).double().mean().item()
    assert .5 < kept < 1
    every, valid = prototype_contrast_term(f, W, y), prototype_contrast_term(f, W, y, reduction='valid')
    assert every.item() == pytest.approx(kept*valid.item())
    assert gradients(prototype_contrast_term(f, W, y, detach=True)+0*W.sum(), W)[0].abs().max() == 0

def test_projection_reaches_features_and_prototypes():
    f, W, _, y = toy(7)
    turn = torch.linalg.qr(torch.randn(C, C, dtype=torch.float64))[0]
    project = lambda m: F.conv2d(m, turn[:, :, None, None])
    assert prototype_contrast_term(f, W, y, project=project).item() == pytest.approx(prototype_contrast_term(f, W, y).item())
    halves = lambda m: m[:, :3]
    want = prototype_contrast_term(f[:, :3], W[:, :3], y)
    assert prototype_contrast_term(f, W, y, project=halves).item() == pytest.approx(want.item())

@pytest.mark.parametrize('case', ['all ignored', 'one class', 'absent class', 'zero features', 'huge logits'])
def test_hard_batches_stay_finite(case):
    f, W, b, y = toy(8, dtype=torch.float32)
    if case == 'all ignored': y[:] = IGNORE
    if case == 'one class': y[:] = 3
    if case == 'absent class': y[y == 2] = IGNORE
    if case == 'zero features': f = torch.zeros_like(f).requires_grad_()
    z = logits_of(f, W, b)*(1e4 if case == 'huge logits' else 1)
    losses = [*alignment(f, z, W), prototype_contrast_term(f, W, y), prototype_contrast_term(f, W, y, reduction='valid'), cross_entropy(z, y)]
    assert all(torch.isfinite(v) for v in losses)
    assert all(torch.isfinite(g).all() for g in gradients(sum(losses), f, W, b))
    if case == 'all ignored':
        assert losses[2:] == [0, 0, 0]
        assert all(g.abs().max() == 0 for g in gradients(sum(losses[2:]), f, W, b))

def test_a_small_label_takes_the_corner_pixel():
    y = torch.arange(2*8*12).view(2, 8, 12)
    assert resize_label(y, (2, 3)).equal(y[:, ::4, ::4])
    odd = torch.arange(97*193).view(1, 97, 193)
    want = F.interpolate(odd[None].double(), (25, 49), mode='nearest')[0].long()
    assert resize_label(odd, (25, 49)).equal(want)

def test_released_rates():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    factor = poly_lr(opt, BPL().max_iter, BPL().power).lr_lambdas[0]
    assert factor(0) == pytest.approx((1-1/90_000)**.9, abs=1e-12) and factor(59_998) == pytest.approx(.37205, abs=5e-6)
    net = Tiny()
    opt, _ = pbal.pbal_optimizer(net, PST())
    assert [g['initial_lr'] for g in opt.param_groups] == [2.5e-4, 2.5e-3] and opt.param_groups[0]['weight_decay'] == 2e-4

# The steps

def batch(seed=0, B=2, labels=True):
    g = torch.Generator().manual_seed(seed)
    image = lambda: torch.randint(256, (B, 3, 32, 48), generator=g, dtype=torch.uint8)
    label = lambda: torch.randint(K, (B, 32, 48), generator=g)
    return dict(source=(image(), label()), target=(image(), label() if labels else torch.full((B, 32, 48), IGNORE)))

def parts(cfg, seed=0):
    torch.manual_seed(seed)
    net, disc = Tiny(), pbal_discriminator(K, 4)
    opt, sched = pbal.pbal_optimizer(net, cfg)
    return net, disc, opt, torch.optim.Adam(disc.parameters(), lr=cfg.lr_disc if hasattr(cfg, 'lr_disc') else 1e-4, betas=(.9, .99)), sched

def test_bpl_step_is_the_released_order():
    "One step against the same step written out: plain losses, the network first, the discriminator from what was said before."
    cfg = BPL(lr=.02, lr_disc=.01)
    net, disc, opt, opt_d, sched = parts(cfg)
    ref, ref_d, ropt, ropt_d, rsched = parts(cfg)
    b = batch()
    log = bpl_step(net, disc, opt, opt_d, sched, b, cfg)
    up = lambda z: F.interpolate(z, (32, 48), mode='bilinear', align_corners=True)
    (xs, ys), (xt, _) = b['source'], b['target']
    zs, (zt, ft) = ref(normalize(xs)), ref(normalize(xt), features=True)
    fool = ref_d(up(zt).softmax(1))
    s2t, t2s = plain_alignment(ft, zt, ref.classifier.weight.flatten(1))
    ce = F.cross_entropy(up(zs), ys)
    adv = F.softplus(fool).mean()                        # binary cross-entropy with "source" = 0
    loss = ce + .01*adv + .1*(s2t + t2s)
    before = [up(zs).softmax(1).detach(), up(zt).softmax(1).detach()]
    loss.backward()
    ropt.step()
    ropt_d.zero_grad()                                   # what fooling left in the discriminator does not count
    d = (F.softplus(ref_d(before[0])).mean() + F.softplus(-ref_d(before[1])).mean())/2
    d.backward()
    ropt_d.step()
    for k, v in dict(loss=loss, source=ce, adversarial=adv, s2t=s2t, t2s=t2s, disc=d).items(): assert log[k].item() == pytest.approx(v.item(), abs=1e-6), k
    for a, e in zip(net.parameters(), ref.parameters()): assert torch.allclose(a, e, atol=1e-6)
    for a, e in zip(disc.parameters(), ref_d.parameters()): assert torch.allclose(a.grad, e.grad, atol=1e-6)   # Adam's first step is all sign
    assert all(p.requires_grad for p in disc.parameters()) and not any(v.requires_grad for v in log.values())

def test_a_term_of_weight_zero_is_left_out():
    cfg = WarmUp(lr=.02)
    net, disc, opt, opt_d, sched = parts(cfg)
    assert set(bpl_step(net, disc, opt, opt_d, sched, batch(), cfg)) == {'loss', 'source', 'adversarial', 'disc'}
    assert set(bpl_step(net, None, opt, None, sched, batch(), replace(cfg, adversarial=0., align=.1))) == {'loss', 'source', 's2t', 't2s'}

def test_warm_up_learns_the_source():
    cfg = WarmUp(lr=.02)
    net, disc, opt, opt_d, sched = parts(cfg)
    one = batch()
    log = [bpl_step(net, disc, opt, opt_d, sched, one, cfg)['source'].item() for _ in range(15)]
    assert log[-1] < log[0]

def test_pst_step_is_the_released_sum():
    cfg = PST(lr=.02)
    net, _, opt, _, sched = parts(cfg)
    ref, _, ropt, _, _ = parts(cfg)
    b = batch(1)
    b['target'][1][torch.rand(2, 32, 48, generator=torch.Generator().manual_seed(0)) < .4] = IGNORE
    log = pst_step(net, opt, sched, b, cfg)
    total = 0
    for x, y in b.values():
        z, f = ref(normalize(x), features=True)
        up = F.interpolate(z, (32, 48), mode='bilinear', align_corners=True)
        total = total + F.cross_entropy(up, y, ignore_index=IGNORE) + plain_contrast(f, ref.classifier.weight.flatten(1), y)
    total.backward()
    ropt.step()
    assert log['loss'].item() == pytest.approx(total.item(), abs=1e-5)
    for a, e in zip(net.parameters(), ref.parameters()): assert torch.allclose(a, e, atol=1e-6)

def test_pst_without_a_single_pseudo_label():
    cfg = PST(lr=.02)
    net, _, opt, _, sched = parts(cfg)
    log = pst_step(net, opt, sched, batch(2, labels=False), cfg)
    assert log['target'] == log['contrast_target'] == 0 and torch.isfinite(log['loss'])
    assert all(torch.isfinite(p).all() for p in net.parameters())

def test_legacy_target_and_figure_options():
    b = batch(3)
    def loss(**kw):
        net, _, opt, _, sched = parts(PST())
        return pst_step(net, opt, sched, b, PST(lr=.02, **kw))
    new, old = loss(), loss(legacy_unnormalised_target=True)
    assert new['source'] == old['source'] and new['target'] != old['target']
    assert loss(contrast=0.)['loss'] == pytest.approx((new['source']+new['target']).item())
    net, _, opt, _, sched = parts(PST())
    head = pbal.projection_head(C, 4)
    pst_step(net, opt, sched, b, PST(detach_proto_pst=True), project=head)
    assert all(p.grad.abs().sum() > 0 for p in head.parameters() if p.dim() > 1)

# The stages

SMALL = dict(window=WINDOW, lr=.02)

def small_run(steps=4, **kw): return Train(steps=steps, batch_size=2, device='cpu', log_every=1, checkpoint_every=2, **kw)

@pytest.fixture(scope='module')
def streets(): return Streets(SYNTHETIC, 6, size=(48, 96)), Streets(REAL, 5, size=(48, 96), seed=1)

def pipeline(home, source, target, stop_after=None):
    "All four stages; returns the two networks and the pseudo labels."
    torch.manual_seed(0)
    net, fresh = Tiny(19), Tiny(19)
    quiet = dict(run_dir=home, progress=False)
    pbal.warm_up(source, target, net, WarmUp(disc_width=4, **SMALL), small_run(), **quiet)
    if stop_after == 'warm_up': return net
    pbal.bpl(source, target, net, BPL(disc_width=4, **SMALL), small_run(), **quiet)
    labels = pbal.make_pseudo(target, net, PST(**SMALL), small_run(), **quiet)
    if stop_after == 'pseudo': return labels
    pbal.pst(source, labels, fresh, PST(proj_head=4, **SMALL), small_run(), **quiet)
    return net, fresh, labels

def test_stages_go_on_where_they_were(tmp_path, streets):
    net, fresh, labels = pipeline(tmp_path/'whole', *streets)
    assert [len(checkpoints(tmp_path/'whole', s)) for s in ('warm_up', 'bpl', 'pst')] == [2, 2, 2]
    image, label = labels[0]
    assert label.shape == image.shape[1:] and set(label.unique().tolist()) <= {*range(19), IGNORE}
    kept = torch.stack([(label != IGNORE).float().mean() for _, label in labels]).mean()
    assert .5 <= kept < .9                               # half of each class is at least as sure as its median
    pipeline(tmp_path/'parts', *streets, stop_after='warm_up')
    pipeline(tmp_path/'parts', *streets, stop_after='pseudo')
    net2, fresh2, labels2 = pipeline(tmp_path/'parts', *streets)
    for a, b in zip([*net.parameters(), *fresh.parameters()], [*net2.parameters(), *fresh2.parameters()]): assert a.equal(b)
    assert labels2[3][1].equal(labels[3][1])

def test_bpl_never_opens_a_target_label(tmp_path, streets):
    source, target = streets
    class NoLabels:
        names, space = target.names, target.space
        def __len__(self): return len(target)
        def __getitem__(self, i): return target[i][0], None
    net = Tiny(19)
    done = pbal.bpl(source, NoLabels(), net, BPL(disc_width=4, **SMALL), small_run(2), run_dir=tmp_path, progress=False)
    assert done == dict(step=2, finished=True)
    fixed = pbal.make_pseudo(NoLabels(), net, PST(fixed=.999, flip=True), small_run(), run_dir=tmp_path, progress=False)
    assert (fixed[0][1] == IGNORE).all()

# Two processes

TWO = textwrap.dedent('''
    import json, sys, torch
    sys.path.insert(0, sys.argv[1])
    from test_pbal import processes
    processes(sys.argv[2])
''')

def processes(home):
    "Both stages on however many processes there are, the same global batch; target labels of very different density."
    world = int(os.environ.get('WORLD_SIZE', 1))
    run = Train(steps=4, batch_size=4//world, device='cpu', log_every=1, checkpoint_every=4)
    source, target = Streets(SYNTHETIC, 6, size=(48, 96)), Streets(REAL, 8, size=(48, 96), seed=1)
    class Sparse:
        "Some images have all labels, some a few, some none."
        names, space = target.names, target.space
        def __len__(self): return len(target)
        def __getitem__(self, i):
            image, label = target[i]
            label = label.clone()
            label[:(48, 40, 0, 13)[i % 4]] = IGNORE
            return image, label
    for reduction in 'all', 'valid':
        torch.manual_seed(0)
        net = Tiny(19)
        quiet = dict(run_dir=f'{home}/{reduction}', progress=False)
        pbal.bpl(source, target, net, BPL(disc_width=4, align=3., adversarial=.1, **SMALL), run, **quiet)
        pbal.pst(source, Sparse(), net, PST(proj_head=4*(reduction == 'valid'), reduction=reduction, **SMALL), run, **quiet)

def test_two_processes_do_what_one_does(tmp_path):
    (tmp_path/'main.py').write_text(TWO)
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    r = subprocess.run([*launch, tmp_path/'main.py', Path(__file__).parent, tmp_path/'two'], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    processes(tmp_path/'one')
    for reduction in 'all', 'valid':
        a, b = (read_metrics(tmp_path/n/reduction) for n in ('one', 'two'))
        assert list(a) == list(b) and {'s2t', 't2s', 'contrast_target'} <= set(a)
        for k in a: assert a[k][0] == b[k][0] and a[k][1] == pytest.approx(b[k][1], rel=1e-5, abs=1e-6), k
        for stage in 'bpl', 'pst':
            want, got = (read_states(tmp_path/n/reduction/'checkpoints'/f'{stage}-0000004')['net'] for n in ('one', 'two'))
            for k in want: assert torch.allclose(got[k], want[k], atol=1e-5, rtol=1e-5), (stage, k)

# Killed anywhere

def whole_method(home, streets, until='distill_2'):
    torch.manual_seed(0)
    cfg = pbal.PBAL(WarmUp(disc_width=4, **SMALL), BPL(disc_width=4, **SMALL), PST(**SMALL), Distill(mean_std=True, lr=.02, window=WINDOW))
    seeds = iter(range(9))
    def fresh():
        torch.manual_seed(next(seeds))
        return pbal_small(width=8, channels=16)
    return train(Job(pbal.METHOD, cfg, small_run(3), home, fresh(), *streets, fresh=fresh, progress=False), until)

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, streets):
    "Weights at the end of a run that nothing stopped, and how many steps and labelled images it took."
    return whole_method(tmp_path_factory.mktemp('unbroken'), streets)['net'].state_dict()

@pytest.mark.parametrize('after', [1, 5, 8, 10, 14])      # in the warm-up, in BPL, in PST, in either distillation
def test_killed_in_any_stage_the_same_call_ends_with_the_same_weights(tmp_path, streets, unbroken, monkeypatch, after):
    done = []
    def mortal(module, name):
        real = getattr(module, name)
        def step(*a, **k):
            if len(done) == after: raise KeyboardInterrupt
            done.append(name)
            return real(*a, **k)
        monkeypatch.setattr(module, name, step)
    for module, name in ((pbal, 'bpl_step'), (pbal, 'pst_step'), (distillation, 'distill_step')): mortal(module, name)
    with pytest.raises(KeyboardInterrupt): whole_method(tmp_path, streets)
    monkeypatch.undo()
    again = whole_method(tmp_path, streets)
    assert again['finished'] and again['stage'] == 'distill_2'
    state = again['net'].state_dict()
    assert all(v.equal(state[k]) for k, v in unbroken.items())

def test_killed_while_labelling(tmp_path, streets, unbroken, monkeypatch):
    count, real = [], pbal.HardLabels
    def full(*a, **k):
        if not count:
            count.append(1)
            raise OSError('no space left on device')
        return real(*a, **k)
    monkeypatch.setattr(pbal, 'HardLabels', full)
    with pytest.raises(OSError): whole_method(tmp_path, streets)
    state = whole_method(tmp_path, streets)['net'].state_dict()
    assert all(v.equal(state[k]) for k, v in unbroken.items())


# ------------------------------------------------------------------------------------------------- odd shapes

@pytest.mark.parametrize("odd", [(40, 140), (30, 64), (64, 31)])
def test_an_image_too_small_for_a_window_of_any_stage_is_named_before_the_first_step(tmp_path, odd):
    for i in range(12):
        Image.new("RGB", (odd if i == 5 else (64, 96))[::-1]).save(tmp_path / f"{i:02}.png")
    own = Window(base_width=0, low=.6, crop_height=32, crop_width=20)
    wide = Window(base_width=96, low=.8, crop_height=32, crop_width=32)
    window = own if odd != (40, 140) else wide
    stages = {k: replace(v, window=window if k == "distill" else Window(crop_height=8, crop_width=8)) for k, v in vars(pbal.PBAL()).items()}
    job = Job(pbal.METHOD, pbal.PBAL(**stages), Train(steps=1, batch_size=2, device="cpu"), tmp_path / "run", pbal_small(), Streets(SYNTHETIC, 2, (64, 96)),
              Unlabelled(images(tmp_path)))
    with pytest.raises(InputError, match=rf"05.png: is {odd[0]}x{odd[1]}, too small for the window"): train(job)
    assert not (tmp_path / "run").exists()
    padded = replace(window, pad=True)
    distillation.check_windows(pbal.PBAL(**{k: replace(v, window=padded) for k, v in stages.items()}), job.target)
