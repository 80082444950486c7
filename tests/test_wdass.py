"WDASS against a plain reading of its spec, its routes of gradients, its edge cases, its flags, and runs that are killed."
import copy, os, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from protonb import wdass as W
from protonb.core import InputError, rng_for
from protonb.deeplab import pbal_small
from protonb.cli import main
from protonb.deeplabv2 import wdass_mobilenetv2, wdass_small
from protonb.feeding import Feed, segmenter
from protonb.labels import CITYSCAPES, IGNORE
from protonb.methods import Job, train
from protonb.mixing import mix_masks
from protonb.pixel_losses import edge_loss
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.teachers import update_average
from protonb.training import Diverged, Train, checkpoints, read_metrics, read_states
from protonb.transforms import normalize
from protonb.weak_labels import WeakLabels
from protonb.weighted_prototypes import PrototypeMemory, contrast, merge_labels
from protonb.windows import WDASS_TARGET_WINDOW, Window, draw, cut, to_base

K, D = 19, 6
def through(low, high, height, width, **kw):
    "Settings of a window that counts from the image's own size."
    w = replace(WDASS_TARGET_WINDOW, base_height=0, base_width=0, low=low, high=high, crop_height=height, crop_width=width, **kw)
    return dict(window=w, source_height=0, source_width=0)
QUIET = W.Mix(mask_rows=(0, 0), threshold=.3, colour_p=0., blur_p=0.)
TINY = W.WDASS(warm=-1, rampup=1, length=50, lr=.01, **through(.7, 1.4, 32, 48), mix=QUIET, contrast=W.Contrasts(sure=.1, easy=.1, least=2, most=3))

class Tiny(nn.Module):
    "Features and logits at a quarter of the image, batch norm in between."
    def __init__(self, num_classes=K, channels=D):
        super().__init__()
        self.channels, self.num_classes, self.head_prefixes, self.frozen_prefixes = channels, num_classes, ('classes', 'project'), ()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.classes, self.project = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x, features=False):
        x = self.body(x)
        return (4*self.classes(x), self.project(x)) if features else 4*self.classes(x)

def batch(seed=0, B=2, labels='coarse'):
    g = torch.Generator().manual_seed(seed)
    image = lambda: torch.randint(256, (B, 3, 32, 48), generator=g, dtype=torch.uint8)
    label = lambda: F.interpolate(torch.randint(5, (B, 1, 4, 6), generator=g).float(), (32, 48))[:, 0].long()
    y_s, y_w = label(), label()
    y_s[:, :3], y_w[:, 8:20] = IGNORE, IGNORE
    tags = torch.stack([(y_w == k).flatten(1).any(1) for k in range(K)], 1)
    if labels == 'image': y_w = torch.full_like(y_w, IGNORE)
    if labels == 'point': y_w = torch.where(torch.rand(y_w.shape, generator=g) < .01, y_w, IGNORE)
    return dict(source=(image(), y_s), target=(image(), y_w, tags))

def parts(cfg=TINY, seed=0, net=Tiny):
    torch.manual_seed(seed)
    net = net().train()
    return net, W.slow_copy(net, cfg), PrototypeMemory(net.num_classes, net.channels), *W.sgd_and_schedule(net, cfg)

def gradients(net): return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}

def step(cfg, b, seed=0, ready=None, **kw):
    ready = ready or parts(cfg)
    return W.step(*ready, b, cfg, seed, **kw), ready

# Rates and groups

def test_rates_of_the_spec():
    rates = lambda cfg: W.sgd_and_schedule(Tiny(), cfg)[1].lr_lambdas[0]
    cfg, rate = W.WDASS(), rates(W.WDASS())
    for n, want in ((0, 0.), (1499, 2.4983e-3), (1500, 2.4775e-3), (75_000, 1.3397e-3)):
        assert cfg.lr*rate(n) == pytest.approx(want, abs=5e-8), n
    old = rates(W.WDASS(first_step_full_lr=True))
    assert [old(n) for n in (0, 1, 2, 1501)] == [1., rate(0), rate(1), rate(1500)]

def test_groups_and_what_the_optimizer_uses():
    net = wdass_small(width=8, channels=8)
    opt, sched = W.sgd_and_schedule(net, W.WDASS(first_step_full_lr=True))
    assert [g['lr'] for g in opt.param_groups] == pytest.approx([2.5e-3, 2.5e-3, 2.5e-2, 2.5e-2])
    assert [g['weight_decay'] for g in opt.param_groups] == [1e-4, 0, 1e-4, 0]
    assert [len(g['params']) for g in opt.param_groups][2:] == [5, 5] and opt.param_groups[0]['momentum'] == .9
    used = []
    for _ in range(3):
        used.append(opt.param_groups[2]['lr'])
        opt.step()
        sched.step()
    assert used == pytest.approx([2.5e-2, 0, 2.5e-2/1500])

# The image loss

def test_image_loss_is_bce_of_log_mean_exp():
    g = torch.Generator().manual_seed(0)
    z = (3*torch.randn(2, K, 5, 7, generator=g)).requires_grad_()
    tags = torch.rand(2, K, generator=g) < .4
    v = z.exp().mean((2, 3)).log()
    want = F.binary_cross_entropy_with_logits(v, tags.float())
    for kind in 'stable', 'saturating': assert W.image_loss(z, tags, kind).item() == pytest.approx(want.item(), rel=1e-5), kind
    a, b = (torch.autograd.grad(l, z)[0] for l in (W.image_loss(z, tags), want))
    assert torch.allclose(a, b, atol=1e-7)

def flat(v, tag, kind):
    "Loss and total gradient of one class whose log-mean-exp is v."
    z = torch.full((1, 1, 2, 3), float(v), requires_grad=True)
    loss = W.image_loss(z, torch.tensor([[tag]]), kind)
    return loss.item(), torch.autograd.grad(loss, z)[0].sum().item()

def test_where_the_released_image_loss_saturates():
    assert flat(17, False, 'saturating') == (100., 0.) and flat(16.7, False, 'saturating') == (100., 0.)
    assert flat(16.6, False, 'saturating')[1] > 0
    assert abs(flat(16, False, 'saturating')[0] - 16) == pytest.approx(.06, abs=.01)
    assert abs(flat(14, False, 'saturating')[0] - 14) == pytest.approx(4e-3, abs=2e-3)
    assert flat(-120, True, 'saturating')[0] == 100. and abs(flat(-31, True, 'saturating')[1]) < .1
    assert flat(-27, True, 'saturating')[1] == pytest.approx(-1, abs=.01)
    for v, tag, want in ((17, False, 1.), (60, False, 1.), (-31, True, -1.), (-120, True, -1.)):
        loss, slope = flat(v, tag, 'stable')
        assert loss == pytest.approx(abs(v), rel=1e-5) and slope == pytest.approx(want, abs=1e-5)

# The edge loss

def plain_edges(z, y, generator, tau=.5):
    "Section 4.9 word for word, all images at once."
    noise = torch.stack([torch.rand(z.shape[1:], generator=generator) for _ in z])
    seen = (y != IGNORE)[:, None]
    logits, target = torch.where(seen, z, 0.), torch.where(seen[:, 0], y, 0)
    p = torch.softmax((logits - torch.log(1e-10 - torch.log(noise + 1e-10)))/tau, 1)
    t = F.one_hot(target, z.shape[1]).movedim(-1, 1).to(z.dtype)
    def magnitude(e):
        kernel = torch.tensor([-.5, 0, .5]).to(e.dtype)
        flat = e.reshape(-1, 1, *e.shape[2:])
        dx, dy = F.conv2d(flat, kernel.view(1, 1, 1, 3), padding=(0, 1)), F.conv2d(flat, kernel.view(1, 1, 3, 1), padding=(1, 0))
        m = torch.sqrt(dx**2 + dy**2 + 1e-6).reshape(e.shape)
        return m/m.max()
    return (magnitude(p) - magnitude(t)).abs().mean()

def edge_case(seed, B=3, H=10, W=12, loud=1.):
    g = torch.Generator().manual_seed(seed)
    z = (loud*torch.randn(B, 5, H, W, generator=g)).requires_grad_()
    y = torch.randint(5, (B, H, W), generator=g)
    y[torch.rand(y.shape, generator=g) < .2] = IGNORE
    return z, y

@pytest.mark.parametrize('seed', range(4))
def test_edge_loss_is_the_released_one(seed):
    z, y = edge_case(seed, loud=.3)
    noise = lambda: torch.Generator().manual_seed(7)
    got, want = edge_loss(z, y, noise()), plain_edges(z, y, noise())
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    a, b = (torch.autograd.grad(3*l, z)[0] for l in (got, want))
    assert torch.allclose(a, b, atol=1e-7, rtol=1e-4) and b.abs().max() > 1e-4

def test_edges_share_one_maximum():
    "An image of faint outlines next to one of strong ones stays faint."
    z, y = edge_case(0, B=2)
    y[0] = 1
    z = torch.cat([torch.zeros_like(z[:1]), 50*F.one_hot(y[1:].clamp(max=4), 5).movedim(-1, 1).float()]).detach()
    noise = lambda: torch.Generator().manual_seed(1)
    both = edge_loss(z, y, noise())
    assert both.item() == pytest.approx(plain_edges(z, y, noise()).item(), abs=1e-6)
    assert both != edge_loss(z.flip(0), y.flip(0), noise())    # every image has noise of its own

def test_masked_edges_ignore_what_has_no_label():
    z, y = edge_case(1)
    y[:, :, 6:] = IGNORE
    noise = lambda: torch.Generator().manual_seed(1)
    loss = edge_loss(z, y, noise(), ignore='mask')
    grad = torch.autograd.grad(loss, z)[0]
    assert loss != edge_loss(z, y, noise()) and grad[..., 6:].abs().max() == 0 and grad[..., :5].abs().max() > 0
    y[:] = IGNORE
    assert edge_loss(z, y, noise(), ignore='mask') == 0
    road = torch.where(y == IGNORE, 0, y)
    flat = torch.zeros_like(z)
    assert edge_loss(z, y, noise()) == edge_loss(flat, road, noise())   # parity: an ignored image is a road

# Weights, mixing

def test_mixing_weight_is_the_share_of_the_whole_batch():
    p = torch.zeros(2, 10, 8)
    p[0, :, :4], p[1, 2] = .99, .968
    w = W.mixing_weight(p, rows=(3, 2))
    q = torch.tensor(48/160).item()
    assert w.max().item() == pytest.approx(q) and w[0, 3:8, :4].eq(w.max()).all() and w[0, :, 4:].eq(0).all()
    assert w[:, :3].eq(0).all() and w[:, 8:].eq(0).all()
    assert W.mixing_weight(p, rows=(0, 0))[1, 2].gt(0).all() and W.mixing_weight(p, rows=(15, 120)).eq(0).all()

@pytest.mark.parametrize('height,top,low', [(512, 15, 120), (136, 15, 120), (135, 3, 31), (64, 1, 15), (32, 0, 7), (1, 0, 0)])
def test_masked_rows_leave_something_of_every_window(height, top, low):
    w = W.mixing_weight(torch.ones(2, height, 3))
    seen = w[0, :, 0] > 0
    assert seen.sum() == height-top-low and seen[top:height-low].all() and w.amax() == 1

@pytest.mark.parametrize('window,rows,says', [
    (dict(crop_height=32, crop_width=48), (15, 120), r'mix.mask_rows is \(15, 120\), which covers a window of 32 rows.*example \(0, 7\)'),
    (dict(crop_height=40, crop_width=48), (20, 20), 'covers a window of 40 rows'),
    (dict(crop_height=0, crop_width=0, flip_p=0., pad=False), (4, 60), 'covers a window of 64 rows'),
    (dict(crop_height=40, crop_width=48), (-1, 5), 'expected 2 values, each a whole number from 0')])
def test_a_run_whose_masked_rows_cover_its_windows_is_refused(tmp_path, window, rows, says):
    ds = Streets(REAL, 2, (64, 96))
    with pytest.raises(InputError, match=says):
        cfg = W.WDASS(window=Window(base_first=True, **window), source_height=0, source_width=0, mix=W.Mix(mask_rows=rows))
        W.adapt_weakly(Job(W.METHOD, cfg, Train(steps=1, batch_size=2, device='cpu'), tmp_path, wdass_small(19), ds, ds))
    assert not list(tmp_path.iterdir())

def test_weak_weight_and_rows():
    b = batch(1)
    net, teacher, *_ = parts()
    x, weak, _ = b['target']
    given = weak != IGNORE
    says = lambda **kw: W.teacher_predictions(teacher, x, weak, replace(TINY, mix=W.Mix(**kw)))
    none, some = says(threshold=1.), says(threshold=1., weak_weight=1.)
    assert none.weight.eq(0).all() and some.weight.equal(given.float())
    assert none.labels[given].equal(weak[given]) and (none.labels != IGNORE).all()

def test_the_mix_pastes_image_label_and_weight_alike():
    b = batch(2)
    _, teacher, *_ = parts()
    predictions = W.teacher_predictions(teacher, *b['target'][:2], TINY)
    x, y, w = W.mixed_batch(b['source'], b['target'][0], predictions, TINY, np.random.default_rng(0), torch.Generator().manual_seed(0))
    mask = mix_masks(b['source'][1], torch.Generator().manual_seed(0))
    assert 0 < mask.float().mean() < 1
    want = torch.where(mask[:, None], b['source'][0], b['target'][0]).float()
    assert torch.allclose(x, want, atol=1e-3)
    assert y.equal(torch.where(mask, b['source'][1], predictions.labels)) and w.equal(torch.where(mask, 1., predictions.weight))

def test_colours_and_blur_have_their_probabilities():
    b = batch(2)
    _, teacher, *_ = parts()
    predictions = W.teacher_predictions(teacher, *b['target'][:2], TINY)
    def mixed(**kw):
        cfg = replace(TINY, mix=replace(QUIET, **kw))
        return W.mixed_batch(b['source'], b['target'][0], predictions, cfg, np.random.default_rng(3), torch.Generator().manual_seed(0))[0]
    plain, colour, blur = mixed(), mixed(colour_p=1.), mixed(blur_p=1.)
    assert not torch.allclose(plain, colour, atol=2) and not torch.allclose(plain, blur, atol=2)
    assert colour.min() >= 0 and colour.max() <= 255.001

# The step

def plain_step(cfg, ready, b, n=0, seed=0):
    "One iteration in the released order, every graph kept until one backward of the sum; returns losses and gradients."
    student, teacher, memory, opt, sched = ready
    (x_s, y_s), (x_t, y_w, tags) = b['source'], b['target']
    rng = rng_for(seed, 'wdass', n)
    gen = torch.Generator().manual_seed(int(rng.integers(2**62)))
    up = lambda z: F.interpolate(z, (32, 48), mode='bilinear', align_corners=False)
    unit = lambda f: f/f.norm(dim=1, keepdim=True)
    def ce(z, y, w=1.):
        each, keep = F.cross_entropy(z, y, ignore_index=IGNORE, reduction='none'), y != IGNORE
        return (w*each)[keep].mean() if keep.any() else 0*z.sum()
    a_t, f_t = student(normalize(x_t), features=True)
    a_s, f_s = student(normalize(x_s), features=True)
    with torch.no_grad(): a_e, f_e = teacher(normalize(x_t), features=True)
    f_t, f_s, f_e = unit(f_t), unit(f_s), unit(f_e)
    z_t, z_s, z_e = up(a_t), up(a_s), up(a_e)
    phat, yhat = z_e.softmax(1).max(1)
    p_e, c_e = a_e.softmax(1).max(1)
    c_e = torch.where(p_e < cfg.contrast.sure, IGNORE, c_e)
    W.update_memory(memory, 'target', f_e, y_w, c_e, cfg)
    W.update_memory(memory, 'source', f_s.detach(), y_s, None, cfg)
    terms = dict(source=ce(z_s, y_s))
    if cfg.labels != 'image':
        terms['target'] = ce(z_t, y_w)
        yhat = torch.where(y_w != IGNORE, y_w, yhat)
    v = lambda s: s.flatten(2).exp().mean(2).log()
    terms['image'] = F.binary_cross_entropy_with_logits(v(z_t), tags.float())
    terms['image_proto'] = F.binary_cross_entropy_with_logits(v(torch.einsum('bdhw,kd->bkhw', f_t, memory.target)), tags.float())
    (p_t, c_t), (p_s, c_s) = (a.detach().softmax(1).max(1) for a in (a_t, a_s))
    terms['real'] = contrast(W.intra_domain(f_t, y_w, c_t, c_t, p_t, cfg.contrast, gen), memory.target)
    terms['edge'] = plain_edges(z_s, y_s, gen)
    predictions = W.Predictions(f_e, c_e, p_e, None, None)
    terms['inter'] = contrast(W.inter_domain(f_s, y_s, c_s, p_s, y_w, predictions, cfg.contrast, gen), memory.target, source_images=len(f_s))
    terms['syn'] = contrast(W.intra_domain(f_s, y_s, c_s, c_s, p_s, cfg.contrast, gen), memory.source)
    mask = mix_masks(y_s, gen)
    q = (phat >= cfg.mix.threshold).float()
    M = torch.where(mask, 1., q*q.mean())
    z_m = up(student(normalize(torch.where(mask[:, None], x_s, x_t))))
    terms['mix'] = ce(z_m, torch.where(mask, y_s, yhat), M)
    w = dict(source=1, target=1, mix=1, edge=10, image=1, image_proto=1, inter=.5, real=.25, syn=.25)
    opt.zero_grad()
    sum(w[k]*t for k, t in terms.items()).backward()
    return {k: t.detach() for k, t in terms.items()}, gradients(student)

@pytest.mark.parametrize('labels', ['coarse', 'point', 'image'])
def test_three_backwards_are_one(labels, monkeypatch):
    "Losses, gradients, prototypes and running statistics of the step, against the released order with one backward."
    cfg, b = replace(TINY, labels=labels), batch(3, labels=labels)
    ready, want = parts(cfg), parts(cfg)
    losses, grads = plain_step(cfg, want, b)
    kept = {}
    monkeypatch.setattr(ready[3], 'step', lambda: kept.update(gradients(ready[0])))
    log, _ = step(cfg, b, ready=ready)
    log.pop('sure')
    assert set(log) == set(losses) and all(losses[k] > 0 for k in losses), losses
    for k in losses: assert log[k].item() == pytest.approx(losses[k].item(), abs=1e-6, rel=1e-6), k
    assert all(torch.allclose(kept[n], g, atol=1e-6, rtol=1e-5) for n, g in grads.items())
    for d in 'target', 'source': assert torch.allclose(getattr(ready[2], d), getattr(want[2], d), atol=1e-6)
    assert torch.allclose(ready[0].body[1].running_mean, want[0].body[1].running_mean)

def test_no_two_graphs_are_alive():
    events = []
    class Noted(Tiny):
        def forward(self, x, features=False):
            if torch.is_grad_enabled(): events.append('forward')
            return super().forward(x, features)
    def backward(loss):
        events.append('backward')
        loss.backward()
    step(TINY, batch(), ready=parts(net=Noted), backward=backward)
    assert events == ['forward', 'backward']*3

def test_order_of_the_running_statistics():
    "Batch norm meets target, source, mix, in this order: the last weighs most."
    b, seen = batch(4), []
    class Noted(Tiny):
        def forward(self, x, features=False):
            if torch.is_grad_enabled(): seen.append(x)
            return super().forward(x, features)
    step(TINY, b, ready=parts(net=Noted))
    assert seen[0].equal(normalize(b['target'][0])) and seen[1].equal(normalize(b['source'][0])) and len(seen) == 3

# Where gradients go

def test_gradient_routes():
    b, cfg = batch(5), TINY
    net, teacher, memory, opt, sched = parts()
    x, weak, tags = b['target']
    predictions = W.teacher_predictions(teacher, x, weak, cfg)
    assert not any(t.requires_grad for t in vars(predictions).values()) and not any(p.requires_grad for p in teacher.parameters())
    W.update_memory(memory, 'target', predictions.features, weak, predictions.cells, cfg)
    gen = torch.Generator().manual_seed(0)
    terms, f_s = W.source_terms(net, memory, b['source'], weak, predictions, cfg, False, gen)
    for k in 'inter', 'syn':
        g = torch.autograd.grad(terms[k], f_s, retain_graph=True)[0]
        assert g.abs().sum() > 0, k
        by_class = torch.autograd.grad(terms[k], net.classes.weight, retain_graph=True, allow_unused=True)[0]
        assert by_class is None, k                  # contrast shapes the projection, never the classifier
    assert not memory.source.requires_grad and not memory.target.requires_grad
    terms, f_t = W.target_terms(net, memory, x, weak, tags, cfg, False, gen)
    for k in 'real', 'image_proto': assert torch.autograd.grad(terms[k], f_t, retain_graph=True)[0].abs().sum() > 0, k
    assert torch.autograd.grad(terms['image'], f_t, retain_graph=True, allow_unused=True)[0] is None

def test_inter_moves_source_to_target_and_never_the_reverse():
    "Target features that would like a gradient get none even when they could carry one."
    b, cfg = batch(6), TINY
    net, teacher, memory, *_ = parts()
    x, weak, _ = b['target']
    predictions = W.teacher_predictions(teacher, x, weak, cfg)
    W.update_memory(memory, 'target', predictions.features, weak, predictions.cells, cfg)
    f = F.normalize(torch.randn(2, D, 8, 12, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    cells, p = torch.zeros(2, 8, 12, dtype=torch.long), torch.ones(2, 8, 12)
    drawn = W.inter_domain(f, b['source'][1], cells, p, weak, predictions, cfg.contrast, torch.Generator().manual_seed(0))
    assert (drawn.images[drawn.images >= 0] >= 2).any() and (drawn.images == 0).any()
    g = torch.autograd.grad(contrast(drawn, memory.target, source_images=2), f)[0]
    moved = F.normalize(f - .5*g/g.abs().max(), dim=1)
    own = merge_labels(b['source'][1], None, (8, 12))
    at = own[g.abs().sum(1) > 0]
    near = lambda f: (f.permute(0, 2, 3, 1)[g.abs().sum(1) > 0]*memory.target[at]).sum(1)
    assert (at != IGNORE).all() and near(moved).mean() > near(f).mean()

def test_a_warm_step_gives_the_projection_zeros_and_decays_it():
    cfg = replace(TINY, warm=5, weight_decay=.1, first_step_full_lr=True)
    ready = parts(cfg)
    before = ready[0].project.weight.detach().clone()
    log, _ = step(cfg, batch(), ready=ready)
    assert not {'inter', 'real', 'syn', 'image', 'image_proto'} & set(log) and {'target', 'source', 'edge', 'mix'} <= set(log)
    assert ready[0].project.weight.grad.eq(0).all()
    assert torch.allclose(ready[0].project.weight, before*(1 - .1*.1), atol=1e-7)       # ten times .01, decay .1
    assert ready[2].target.abs().sum() > 0 and ready[2].source.abs().sum() > 0

def test_the_gate_opens_after_the_warm_steps():
    cfg, ready = replace(TINY, warm=1), parts()
    keys = [set(step(cfg, batch(i), ready=ready)[0]) for i in range(3)]
    assert keys[0] == keys[1] and keys[2] - keys[1] == {'inter', 'real', 'syn', 'image', 'image_proto'}

# The teacher

def test_teacher_follows_parameters_and_statistics():
    net, teacher, *_ = parts()
    for t in net.state_dict().values(): t.add_(1) if t.is_floating_point() else t.fill_(9)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    update_average(teacher, net, .9, statistics=True)
    for k, v in teacher.state_dict().items():
        if v.is_floating_point(): assert torch.allclose(v, before[k]+.1, atol=1e-6), k
        else: assert v == 9

def test_the_first_step_leaves_the_teacher_alone():
    cfg = replace(TINY, first_step_full_lr=True, alpha=.5, teacher='independent')
    ready = parts(cfg)
    first = ready[1].classes.weight.clone()
    step(cfg, batch(), ready=ready)
    assert ready[1].classes.weight.equal(first) and not ready[0].classes.weight.equal(first)
    now = ready[0].classes.weight.detach().clone()
    step(cfg, batch(), ready=ready)
    assert torch.allclose(ready[1].classes.weight, (first+now)/2, atol=1e-6)

def test_an_independent_teacher_has_its_own_heads():
    torch.manual_seed(0)
    net = wdass_small(width=8, channels=8)
    before = torch.get_rng_state()
    same, own, again = (W.slow_copy(net, replace(TINY, teacher=t), seed=3) for t in ('student', 'independent', 'independent'))
    assert torch.get_rng_state().equal(before)
    for k, v in net.state_dict().items():
        assert same.state_dict()[k].equal(v) and own.state_dict()[k].equal(again.state_dict()[k])
        assert own.state_dict()[k].equal(v) != k.startswith(('aspp', 'representation')), k

def test_an_independent_teacher_begins_as_another_network_of_the_same_start(tmp_path):
    net = wdass_mobilenetv2(5, channels=8)
    def fresh(seed):
        torch.manual_seed(seed)
        made = wdass_mobilenetv2(5, channels=8)
        made.backbone.load_state_dict(net.backbone.state_dict())                                          # what a file has, all have
        return made
    cfg, before = replace(TINY, teacher='independent'), torch.get_rng_state()
    same, own = (W.slow_copy(net, cfg, 3, f) for f in (fresh, lambda seed: wdass_mobilenetv2(5, channels=8)))
    assert torch.get_rng_state().equal(before)
    conv = next(k for k, v in net.state_dict().items() if k.startswith('backbone') and v.ndim == 4)
    assert same.state_dict()[conv].equal(net.state_dict()[conv]) and not own.state_dict()[conv].equal(net.state_dict()[conv])
    heads = same.aspp.features                                                                             # as released: He's rule by fan-in, biases 0
    assert all(not c.bias.any() and c.weight.std().item() == pytest.approx((2/(9*c.in_channels))**.5, rel=.05) for c in heads)
    assert not torch.equal(heads[0].weight, net.aspp.features[0].weight) and same.representation[0].bias.any()
    assert not any(p.requires_grad for p in same.parameters()) and same.training
    common = ['train', 'wdass', '--source', 'streets:synthetic,count=4,size=48x96', '--target', 'streets:real,count=4,size=48x96', '--net', 'wdass_small',
              '--weak', 'fine', '--device', 'cpu', '--steps', '1', '--batch-size', '2', '--seed', '1']
    assert main([*common, '--out', str(tmp_path/'r'), '--teacher', 'independent']) == 0
    now = read_states(checkpoints(tmp_path/'r')[-1][1])
    assert not any(now['net'][k].equal(v) for k, v in now['teacher'].items() if v.ndim == 4)              # nothing was loaded: nothing is shared

def test_more_points_than_there_is_room_for_are_refused(tmp_path, streets):
    cfg = replace(SHORT, labels='point')
    with pytest.raises(InputError, match='labelled pixels, but room=4.*contrast.clicks'): adapt(*streets, Tiny(), cfg, run(), tmp_path)   # full labels

# Hard batches

@pytest.mark.parametrize('labels', ['coarse', 'point', 'image'])
@pytest.mark.parametrize('case', ['no label at all', 'no weak label', 'no candidate', 'one class', 'never sure', 'always sure'])
def test_hard_batches_stay_finite(case, labels):
    cfg, b = replace(TINY, labels=labels), batch(7, labels=labels)
    (x_s, y_s), (x_t, y_w, tags) = b['source'], b['target']
    if case in ('no label at all', 'no weak label'):
        y_w[:], tags[:] = IGNORE, False
        if case == 'no label at all': y_s[:] = IGNORE
    if case == 'no candidate': cfg = replace(cfg, contrast=replace(cfg.contrast, least=10_000))
    if case == 'one class':
        y_s[:], y_w[:] = 3, 3 if labels == 'coarse' else IGNORE
        y_w[:, 5, 5] = 3 if labels != 'image' else IGNORE
    if case == 'never sure': cfg = replace(cfg, contrast=replace(cfg.contrast, sure=1., easy=1.), mix=replace(cfg.mix, threshold=1.))
    if case == 'always sure': cfg = replace(cfg, contrast=replace(cfg.contrast, sure=0., easy=0.), mix=replace(cfg.mix, threshold=0.))
    ready = parts(cfg)
    for n in range(2):
        log, _ = step(cfg, b, ready=ready)
        assert all(torch.isfinite(v) for v in log.values()), log
    assert all(torch.isfinite(t).all() for part in ready[:3] for t in part.state_dict().values())
    if case == 'no candidate': assert log['inter'] == log['real'] == log['syn'] == 0
    if case == 'no label at all': assert log['source'] == 0 and log.get('target', 0) == 0
    if case == 'never sure': assert log['sure'] == 0

def test_empty_classes_keep_or_lose_their_prototype():
    "Class 2 has a point, but no cell that is sure: the row stays, or is zeroed as released."
    f = F.normalize(torch.randn(1, D, 8, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    weak, cells = torch.full((1, 32, 48), IGNORE), torch.full((1, 8, 12), IGNORE)
    weak[0, 5, 5] = 2
    for empty, left in (('keep', 1.), ('zero', 0.)):
        memory = PrototypeMemory(K, D)
        memory.target.fill_(1.)
        W.update_memory(memory, 'target', f, weak, cells, replace(TINY, labels='point', contrast=W.Contrasts(empty=empty)))
        assert memory.target[2].eq(left).all() and memory.target[[0, 1, 3]].eq(1).all()

def test_source_predictions_name_the_unlabelled_cells():
    f = F.normalize(torch.randn(1, D, 8, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    y, cells = torch.full((1, 32, 48), IGNORE), torch.full((1, 8, 12), 4)
    y[:, :16] = 1
    draw = lambda fill: W.intra_domain(f, y, fill, cells, torch.ones(1, 8, 12), TINY.contrast, torch.Generator().manual_seed(0))
    assert set(draw(cells).labels.tolist()) - {IGNORE} == {1, 4} and set(draw(None).labels.tolist()) - {IGNORE} == {1}
    logs = [step(replace(TINY, contrast=replace(TINY.contrast, source_predictions=s)), batch(3))[0] for s in (True, False)]
    assert logs[0]['syn'] != logs[1]['syn'] and logs[0]['source'] == logs[1]['source']

@pytest.mark.parametrize('change', [dict(contrast=replace(TINY.contrast, image_loss='saturating')), dict(edge_ignore='mask'), dict(edge=0.), dict(teacher='independent')])
def test_flags_reach_the_step(change):
    "Loud logits, so that the forms of the image loss part."
    torch.manual_seed(0)
    def loud():
        net = Tiny()
        with torch.no_grad(): net.classes.weight.mul_(40)
        return net
    b = batch(8)
    old, new = (step(c, b, ready=parts(c, net=loud))[0] for c in (TINY, replace(TINY, **change)))
    if 'edge' in change: assert 'edge' in old and 'edge' not in new
    else:
        k = dict(contrast='image', edge_ignore='edge', teacher='mix')[next(iter(change))]
        assert old[k] != new[k] and old['source'] == new['source'] and old['target'] == new['target']

def test_wrong_choices_are_named():
    with pytest.raises(InputError, match="labels is 'points'; expected one of 'coarse', 'point', 'image'"): W.WDASS(labels='points')
    with pytest.raises(InputError, match='empty is'): W.Contrasts(empty='drop')
    with pytest.raises(InputError, match='expected a size, or 0 and 0'): W.WDASS(source_height=0)
    with pytest.raises(InputError, match='low is'): W.WDASS(window=Window(low=0.))
    with pytest.raises(InputError, match='jitter is'): W.WDASS(jitter=.6)

# The samples

def ramp(H, W):
    "An image whose colours tell where a pixel is, and a label that does."
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    image = torch.stack([y*255//H, x*255//W, (x+y) % 256]).to(torch.uint8)
    return image, (y*4//H + 4*(x*4//W)).long()

@pytest.mark.parametrize('seed', range(6))
def test_a_window_is_the_window_of_the_whole_scaled_image(seed):
    image, label = ramp(60, 90)
    window = through(.4, 1.6, 40, 44)['window']
    got, ids = cut(image, label, draw(window, image.shape[1:], np.random.default_rng(seed), label), window.resample)
    rng = np.random.default_rng(seed)
    s = rng.uniform(.4, 1.6)
    h, w = int(60*s), int(90*s)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w, h), Image.BICUBIC)
    names = Image.fromarray(label.numpy().astype('uint8')).resize((w, h), Image.NEAREST)
    ph, pw = ((n-m)//2 + 1 if m < n else 0 for n, m in ((40, h), (44, w)))
    whole, names = np.pad(whole, ((ph, ph), (pw, pw), (0, 0))), np.pad(names, ((ph, ph), (pw, pw)), constant_values=IGNORE)
    i, j = int(rng.integers(0, h+2*ph-39)), int(rng.integers(0, w+2*pw-43))
    whole, names = whole[i:i+40, j:j+44], names[i:i+40, j:j+44]
    if rng.random() < .5: whole, names = whole[:, ::-1], names[:, ::-1]
    assert got.shape == (3, 40, 44) and (ids.numpy() != names).mean() < .03       # Pillow rounds a border that falls on a pixel's centre
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - whole.astype(int)).max() <= 1

class Items:
    "A weakly labelled data set of given pairs."
    def __init__(self, pairs): self.pairs, self.names, self.space = pairs, [str(i) for i in range(len(pairs))], CITYSCAPES
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i): return self.pairs[i]

def test_points_survive_the_first_resize():
    image, _ = ramp(64, 128)
    label = torch.full((64, 128), IGNORE)
    for k in range(10): label[6*k+1, 12*k] = k
    small, moved = to_base(image, label, (32, 64), points=True)
    assert small.shape == (3, 32, 64) and sorted(moved[moved != IGNORE].tolist()) == list(range(10))
    assert all(moved[(6*k+1)//2, 6*k] == k for k in range(10))
    _, lost = to_base(image, label, (32, 64))
    assert (lost != IGNORE).sum() < 10
    assert to_base(image, label, None)[1] is label
    half = label[::2, ::2]
    assert to_base(image, half, None)[1].shape == (64, 128)          # a label of another size comes to the image's

def test_tags_of_window_or_image():
    image, label = ramp(64, 128)
    ds = Items([(image, label)])
    for scope in 'crop', 'image':
        make = W.weak_pairs(ds, ds, W.WDASS(**through(1., 1., 16, 16), jitter=0., image_label_scope=scope), 0)
        for i in range(5):
            _, weak, tags = make(i)['target']
            seen = set((weak if scope == 'crop' else label).unique().tolist()) - {IGNORE}
            assert set(tags.nonzero().flatten().tolist()) == seen and tags.shape == (K,) and tags.dtype == torch.bool

def test_image_labels_leave_no_map():
    image, label = ramp(64, 128)
    ds = Items([(image, label)])
    make = lambda labels: W.weak_pairs(ds, ds, W.WDASS(**through(.8, 1.5, 32, 32), labels=labels), 0)
    for i in range(4):
        x, weak, tags = make('image')(i)['target']
        x2, weak2, tags2 = make('coarse')(i)['target']
        assert weak.eq(IGNORE).all() and not weak2.eq(IGNORE).all() and tags.equal(tags2) and tags.any() and x.equal(x2)

def test_jitter_and_streams():
    image, label = ramp(64, 96)
    ds = Items([(image, label)]*3)
    source = lambda jitter: lambda i: W.weak_pairs(ds, ds, W.WDASS(**through(1., 1., 64, 96, flip_p=0.), jitter=jitter))(i)['source']
    assert source(0.)(0)[0].equal(image)
    loud = source(.25)
    assert not loud(0)[0].equal(image) and loud(0)[1].equal(label) and loud(4)[0].equal(loud(4)[0]) and not loud(4)[0].equal(loud(5)[0])

def test_a_window_that_fits_no_image_is_refused_by_name():
    ds = Items([ramp(64, 96)]*3)
    assert W.weak_pairs(ds, ds, W.WDASS(**through(.5, 1., 65, 64)))(0)['source'][0].shape == (3, 65, 64)       # stands in a black frame
    with pytest.raises(InputError, match='0: is 64x96, too small for the window'): W.weak_pairs(ds, ds, W.WDASS(**through(.5, 1., 65, 64, pad=False)))

# Runs

@pytest.fixture(scope='module')
def streets(): return Streets(SYNTHETIC, 6, size=(48, 96)), Streets(REAL, 5, size=(48, 96), seed=1)

def run(steps=5, **kw): return Train(steps=steps, batch_size=2, device='cpu', log_every=1, checkpoint_every=2, **kw)

SHORT = replace(TINY, warm=1, mix=replace(QUIET, colour_p=.8, blur_p=.5))

def adapt(source, target, net, cfg, run, run_dir):
    done = train(Job(W.METHOD, cfg, run, run_dir, net, source, target, progress=False))
    return {k: done[k] for k in ('step', 'finished')}

def whole(home, streets, cfg=SHORT, target=None, **kw):
    torch.manual_seed(0)
    net = Tiny()
    done = adapt(streets[0], target or WeakLabels(streets[1], cfg.labels), net, cfg, run(**kw), home)
    return done, net

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, streets):
    home = tmp_path_factory.mktemp('unbroken')
    assert whole(home, streets)[0] == dict(step=5, finished=True)
    return read_states(checkpoints(home, 'wdass')[-1][1])

@pytest.mark.parametrize('after', [0, 1, 2, 4])
def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path, streets, unbroken, monkeypatch, after):
    done, real = [], W.step
    def mortal(*a, **k):
        if len(done) == after: raise KeyboardInterrupt
        done.append(1)
        return real(*a, **k)
    monkeypatch.setattr(W, 'step', mortal)
    with pytest.raises(KeyboardInterrupt): whole(tmp_path, streets)
    monkeypatch.undo()
    done, net = whole(tmp_path, streets)
    states = read_states(checkpoints(tmp_path, 'wdass')[-1][1])
    assert done['finished'] and all(v.equal(net.state_dict()[k]) for k, v in unbroken['net'].items())
    for part in 'net', 'teacher', 'memory':
        assert all(v.equal(states[part][k]) for k, v in unbroken[part].items()), part
    assert unbroken['memory']['target'].abs().sum() > 0

def test_workers_change_nothing(tmp_path, streets, unbroken):
    net = whole(tmp_path, streets, workers=1)[1]
    assert all(v.equal(net.state_dict()[k]) for k, v in unbroken['net'].items())

def test_a_map_behind_image_labels_is_never_seen(tmp_path, streets):
    "Maps that differ in everything but their set of classes end in the same weights, with whole-image tags."
    cfg = replace(SHORT, labels='image', image_label_scope='image')
    pairs = [streets[1][i] for i in range(5)]
    shuffled = [(x, y.flatten()[torch.randperm(y.numel(), generator=torch.Generator().manual_seed(0))].view(y.shape)) for x, y in pairs]
    nets = [whole(tmp_path/n, streets, cfg, Items(p))[1] for n, p in (('a', pairs), ('b', shuffled))]
    assert all(a.equal(b) for a, b in zip(*(n.state_dict().values() for n in nets)))

@pytest.mark.parametrize('net', [lambda: wdass_small(width=8, channels=8), lambda: pbal_small(width=8, channels=16)])
def test_any_network_with_features(tmp_path, streets, net):
    torch.manual_seed(0)
    net = net()
    cfg = replace(SHORT, labels='point', warm=0)
    done = adapt(streets[0], WeakLabels(streets[1], 'point'), net, cfg, run(2), tmp_path)
    assert done['finished'] and all(torch.isfinite(v).all() for v in net.state_dict().values())
    z = segmenter(net, Feed(enlarge='centred'))(torch.stack([streets[1][0][0]]))
    assert z.shape == (1, 19, 48, 96)

def test_a_run_that_diverges_says_so(tmp_path, streets):
    with pytest.raises(Diverged, match='diverged at step'): whole(tmp_path, streets, replace(SHORT, lr=1e9, first_step_full_lr=True))

def test_it_learns(tmp_path, streets):
    "The same two images over and over: all supervised losses fall."
    cfg = replace(SHORT, lr=.05, length=200, head_factor=1.)
    whole(tmp_path, streets, cfg, steps=40)
    curves = read_metrics(tmp_path)
    for k in 'target', 'source', 'mix':
        v = curves[k][1]
        assert sum(v[-8:])/8 < sum(v[:8])/8, k

# Two processes

TWO = textwrap.dedent('''
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    from test_wdass import processes
    processes(sys.argv[2])
''')

def processes(home):
    "Local and common prototypes, and local ones once more with a stop; every process leaves what it has."
    rank, real = int(os.environ.get('RANK', 0)), W.step
    source, target = Streets(SYNTHETIC, 6, size=(48, 96)), Streets(REAL, 8, size=(48, 96), seed=1)
    def call(name, cfg, dies=None):
        torch.manual_seed(0)
        net, kept = Tiny(), []
        def step(net, teacher, memory, *a, **k):
            if len(kept) == dies: raise KeyboardInterrupt
            kept.append(memory)
            return real(net, teacher, memory, *a, **k)
        W.step = step
        try: adapt(source, WeakLabels(target, 'coarse'), net, cfg, run(3), f'{home}/{name}')
        except KeyboardInterrupt: return
        finally: W.step = real
        torch.save(dict(net={k: v.detach() for k, v in net.named_parameters()}, memory=kept[-1].state_dict()), f'{home}/{name}_{rank}.pt')
    own, common = (replace(SHORT, warm=0, contrast=replace(SHORT.contrast, reduce=reduce)) for reduce in (False, True))
    call('own', own)
    call('common', common)
    call('stopped', own, dies=2)
    call('stopped', own)

def test_two_processes_share_weights_and_if_asked_prototypes(tmp_path):
    (tmp_path/'main.py').write_text(TWO)
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    r = subprocess.run([*launch, tmp_path/'main.py', Path(__file__).parent, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    parts = {name: [torch.load(tmp_path/f'{name}_{rank}.pt') for rank in (0, 1)] for name in ('own', 'common', 'stopped')}
    for name, (a, b) in parts.items():
        assert all(torch.allclose(v, b['net'][k], atol=1e-7) for k, v in a['net'].items())
        same = all(torch.allclose(v, b['memory'][k], atol=1e-6) for k, v in a['memory'].items())
        assert same == (name == 'common')
    for a, b in zip(parts['own'], parts['stopped']):          # each process finds its own prototypes again
        assert all(v.equal(b[p][k]) for p in ('net', 'memory') for k, v in a[p].items())

def test_several_points_of_a_class_need_room_and_a_larger_scale_makes_its_own():
    labels = torch.full((1, 24, 24), IGNORE)
    labels[0, :10, :10] = torch.arange(100).view(10, 10) % 3                # some 33 pixels of each of three classes
    features,cells = F.normalize(torch.randn(1, D, 6, 6), dim=1),torch.zeros(1, 6, 6, dtype=torch.long)
    def moved(clicks=1, high=2.):
        memory = PrototypeMemory(3, D)
        cfg = W.WDASS(labels='point', contrast=W.Contrasts(clicks=clicks), window=replace(WDASS_TARGET_WINDOW, high=high))
        W.update_memory(memory, 'target', features, labels, cells, cfg)
        return memory.target
    with pytest.raises(ValueError, match='room'): moved()
    assert moved(clicks=9).any() and moved(high=6.).any()                   # a point enlarged six times is 36 pixels
