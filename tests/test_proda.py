"""ProDA against loops that follow the published description of the released code, term by term and whole steps at a time."""
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from protonb import distillation, proda
from protonb.colour import Warp, rand_augment, warp_labels
from protonb.core import InputError, rng_for
from protonb.deeplab import released_repeats
from protonb.distillation import Distill
from protonb.feeding import Feed, segmenter
from protonb.optimization import make_optimizer, parameter_groups, polynomial, schedule
from protonb.prototypes import save_prototypes
from protonb.pseudo_labels import HardLabels, SoftLabels, write_soft
from protonb.sampling import shuffled_index
from protonb.processes import cross_entropy
from protonb.streams import stacked
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.teachers import PrototypeBank
from protonb.training import Train, accelerator_for
from protonb.windows import Geometry, Window, into_view, look, shrunk

WINDOW = Window(base_width=128, low=.5, high=1.5, crop_height=32, crop_width=56, flip_p=.5)
K = 19


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class Tiny(nn.Module):
    """A network with the protocol of protonb.deeplab, stride 8, small enough for a test of a step."""

    channels, num_classes, head_prefixes, frozen_prefixes = 6, K, ("classifier",), ()

    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, 4, 2)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 6, 3, 2, 1)
        self.classifier = nn.Conv2d(6, K, 1, bias=False)
        nn.init.normal_(self.classifier.weight)

    def forward(self, x, features=False):
        f = self.conv2(self.norm(self.conv1(x)).relu())
        z = self.classifier(f)
        return (z, f) if features else z


def tiny(seed=0, norm=True):
    torch.manual_seed(seed)
    return Tiny(norm)


@pytest.fixture(scope="module")
def source():
    return Streets(SYNTHETIC, 6, size=(64, 128))


@pytest.fixture(scope="module")
def target():
    return Streets(REAL, 6, size=(64, 128), seed=1)


def sgd(net, cfg):
    groups = parameter_groups(net, cfg.lr, cfg.head_factor, weight_decay=cfg.weight_decay, repeats={})
    opt = make_optimizer("sgd", groups, cfg.lr, momentum=cfg.momentum)
    return opt, schedule(opt, polynomial(cfg.length, cfg.power))


def plain_sgd(net, cfg):
    """Two groups as written down in the method, PyTorch's own optimiser."""
    head = list(net.classifier.parameters())
    body = [p for n, p in net.named_parameters() if not n.startswith("classifier")]
    groups = [dict(params=body, lr=cfg.lr), dict(params=head, lr=cfg.lr * cfg.head_factor)]
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=.9, weight_decay=2e-4)


def noisy_labels(*shape, seed=0):
    y = torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))
    y[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < .23] = 255
    return y


def same(a, b, tol):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert (x - y).abs().max() <= tol, f"{name} differs by {(x - y).abs().max():.1e}"


# --------------------------------------------------------------------------------------------------------------- losses

def released_rce(z, y):
    """Both distributions clamped, label and prediction exchanged."""
    p = z.softmax(1).clamp(1e-7, 1)
    keep = (y != 255).float()
    one_hot = torch.zeros_like(p).scatter_(1, y.masked_fill(y == 255, 0)[:, None], 1.).clamp(1e-4, 1)
    return -((p * one_hot.log()).sum(1) * keep).sum() / (keep.sum() + 1e-6)


def gradient(loss, *at):
    return torch.autograd.grad(loss, at)

def test_no_gradient_reaches_a_teacher():
    s, t = torch.randn(1, K, 3, 3, requires_grad=True), torch.randn(1, K, 3, 3, requires_grad=True)
    inside = torch.ones(1, 3, 3, dtype=torch.bool)
    (distillation.kd_loss(s, t) + proda.consistency(t, inside, s)).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_nothing_labelled_is_zero_and_finite():
    z, none = torch.randn(2, K, 5, 6, requires_grad=True), torch.full((2, 5, 6), 255)
    nobody = torch.zeros(2, 5, 6, dtype=torch.bool)
    loss = distillation.symmetric_cross_entropy(z, none) + cross_entropy(z, none) + proda.consistency(z.abs(), nobody, z.abs())
    assert loss == 0 and gradient(loss, z)[0].abs().max() == 0


# ------------------------------------------------------------------------------------------------------------- distances

def looped_distances(f, eta):
    """One class at a time, one difference map each."""
    return torch.stack([(f - e[:, None, None]).norm(dim=1) for e in eta], 1)


def test_distances_by_a_matrix_product():
    torch.manual_seed(0)
    f, eta = torch.randn(2, 256, 13, 9).mul(.5).requires_grad_(), torch.randn(K, 256) * .5
    ours, theirs = proda.distances(f, eta), looped_distances(f, eta)
    assert (ours - theirs).abs().max() <= 1e-5
    g = torch.randn_like(ours)
    assert torch.allclose(*(gradient((d * g).sum(), f)[0] for d in (ours, theirs)), atol=1e-5)
    weights = [torch.softmax(-(d - d.amin(1, keepdim=True)), 1) for d in (ours, theirs)]
    assert (weights[0] - weights[1]).abs().max() < 2e-6
    assert (proda.prototype_weights(ours) - weights[1]).abs().max() < 2e-6


def test_a_class_without_prototype_never_wins_and_stays_finite():
    torch.manual_seed(0)
    f, eta = torch.randn(1, 8, 5, 5, requires_grad=True), torch.randn(K, 8)
    eta[3] = 0
    d = proda.distances(f, eta)
    soft = torch.zeros(1, K, 5, 5)
    soft[:, 3], soft[:, 4] = .999, .001
    assert (proda.rectify(soft, d) == 4).all()
    loss = proda.consistency(d.detach() + .1, torch.ones(1, 5, 5, dtype=torch.bool), d)
    assert loss.isfinite() and gradient(loss, f)[0].isfinite().all()
    rest = [k for k in range(K) if k != 3]
    without = proda.consistency(d.detach()[:, rest] + .1, torch.ones(1, 5, 5, dtype=torch.bool), d[:, rest])
    assert torch.allclose(loss * K, without * (K - 1), atol=1e-6)


def test_rectified_labels_by_hand():
    q0 = torch.tensor([[.6, .3, .1], [.6, .3, .1], [.2, .2, .6]]).T.reshape(1, 3, 1, 3)
    d = torch.tensor([[1., 1., 1.], [3., 1., 1.], [0., 5., 5.]]).T.reshape(1, 3, 1, 3)
    # weights 1/3 each; (e^-2,1,1)/(2+e^-2); (1,e^-5,e^-5)/(1+2e^-5): products .6:.3:.1, .081:.3:.1, .2:.0013:.004
    assert proda.rectify(q0, d).tolist() == [[[0, 1, 0]]]
    confidence = [.6, .3 / (.6 * np.exp(-2) + .4), .2 / (.2 + .8 * np.exp(-5))]
    for threshold in (.55, .65, .8, .99):
        want = [y if c >= threshold else 255 for y, c in zip((0, 1, 0), confidence)]
        assert proda.rectify(q0, d, threshold=threshold).tolist() == [[want]]
    assert proda.rectify(q0, d * .2).tolist() == [[[0, 0, 2]]] == proda.rectify(q0, d, temperature=.2).tolist()


def test_consistency_counts_pixels_times_classes():
    """Distances outside are overwritten by 250 in the released code, and entries equal to 250 do not count."""
    torch.manual_seed(0)
    d, s, inside = torch.rand(2, K, 6, 8) * 9, torch.rand(2, K, 6, 8) * 9, torch.rand(2, 6, 8) < .7
    warped = torch.where(inside[:, None], d, 250.)
    mask = (warped != 250).float()
    t, log_s = torch.softmax(-warped, 1), torch.log_softmax(-s, 1)
    want = (F.kl_div(log_s, t, reduction="none") * mask).sum() / mask.sum()
    assert torch.allclose(proda.consistency(d, inside, s), want, atol=1e-7)
    assert mask.sum() == inside.sum() * K


# -------------------------------------------------------------------------------------------------------------- geometry

def random_view(rng, full, crop):
    width = int(rng.uniform(.5, 1.5) * full[1] * 1.07)
    height = int(width * full[0] / full[1])
    g = Geometry(height, width, int(rng.integers(0, height - crop[0] + 1)), int(rng.integers(0, width - crop[1] + 1)), *crop,
                 bool(rng.integers(2)))
    return g


def cropped(x, g, by=1):
    top, left, rows, cols = g.top // by, g.left // by, g.crop_height // by, g.crop_width // by
    x = x[..., top:top + rows, left:left + cols]
    return x.flip(-1) if g.flip else x


@pytest.mark.parametrize("full,crop,native", [((1024, 2048), (512, 896), (129, 257)), ((97, 193), (32, 48), (13, 25))])
def test_windows_follow_the_chain_of_resizes(full, crop, native):
    rng = rng_for(0, "views", full[0])
    torch.manual_seed(0)
    p0, f = torch.rand(2, 2, *native), torch.randn(2, 2, *native)
    views = [random_view(rng, full, crop) for _ in range(2)]
    views[0], quarter = replace(views[0], flip=True), tuple(n // 4 for n in crop)
    small = full[0] // 4, full[1] // 4
    v = torch.stack([g.numbers for g in views])
    soft, feat = into_view(p0, full, v, crop, quarter), into_view(f, small, shrunk(v), quarter)
    for n, g in enumerate(views):
        chain = up(cropped(up(up(p0[n:n + 1], full), (g.height, g.width)), g), quarter)
        assert (soft[n] - chain[0]).abs().max() < 2e-4
        chain = cropped(up(up(f[n:n + 1], small), (g.height // 4, g.width // 4)), g, 4)
        assert (feat[n] - chain[0]).abs().max() < 2e-3
        assert (soft[n] - chain[0]).abs().max() > .1


def test_a_strong_label_follows_its_picture():
    """Paint each pixel's label into the picture: wherever the picture was not filled or mixed, the label agrees."""
    ramp = torch.arange(56).expand(32, 56) * 4
    for i in range(30):
        rng = rng_for(i, "warp")
        picture, warp = rand_augment(ramp.to(torch.uint8).expand(3, 32, 56).contiguous(), rng)
        if any(six is None for _, _, six in warp.ops):
            continue                                                  # colours changed
        label = warp_labels(ramp, warp)
        there = label != 255
        assert ((picture[0].long() - label).abs()[there] <= 8).float().mean() > .97


# ------------------------------------------------------------------------------------------------------------ prototypes

def released_means(vectors, counts, passes, cap):
    """Image after image, class after class, a counter that stops at the cap."""
    eta, m = torch.zeros_like(vectors[0]), [0] * vectors.shape[1]
    for _ in range(passes):
        for v, c in zip(vectors, counts):
            for k in range(len(m)):
                if c[k] < 10 or v[k].sum() == 0:
                    continue
                n = min(m[k], cap)
                eta[k] = (n * eta[k] + v[k]) / (n + 1)
                m[k] = min(m[k] + 1, cap)
    return eta


def test_initial_prototypes_follow_the_recurrence():
    torch.manual_seed(0)
    v, c = torch.randn(23, 5, 7, dtype=torch.float64), torch.randint(0, 40, (23, 5))
    c[:, 4] = 3                                                          # never enough pixels
    v[5, 2], c[5, 2] = 0, 30                                             # a sum of exactly zero is passed over
    for cap in (3000, 8):
        got, seen = proda.running_means(v, c, cap=cap)
        assert torch.allclose(got, released_means(v, c, 4, cap), atol=1e-12)
    assert not got[4].any() and seen[4] == 0
    plain = proda.running_means(v, c, passes=1)[0]
    ok = (c >= 10) & (v.sum(2) != 0)
    for k in range(4):
        assert torch.allclose(plain[k], v[ok[:, k], k].mean(0), atol=1e-12)
    a = 1 / 9                                                            # closed form after the cap: mean of 8, then an average
    x = v[:12, 0]
    tail = x[:8].mean(0) * (1 - a) ** 4 + sum(a * (1 - a) ** (11 - j) * x[j] for j in range(8, 12))
    got = proda.running_means(v[:12, :1], torch.full((12, 1), 99), passes=1, cap=8)[0][0]
    assert torch.allclose(got, tail, atol=1e-12)


def test_moving_prototypes_have_a_closed_form():
    torch.manual_seed(0)
    eta, v, c = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64), torch.randint(0, 20, (5, 4))
    v[1, 1], c[1, 1] = 0, 99
    bank = PrototypeBank(4, 6).double()
    bank.matrix.copy_(eta)
    bank.update(v, proda.enough(v, c), proda.Denoise().proto_momentum)
    got = bank.matrix
    for k in range(4):
        who = [j for j in range(5) if c[j, k] >= 10 and v[j, k].sum() != 0]
        m = len(who)
        want = eta[k] * .9999 ** m + sum(1e-4 * .9999 ** (m - 1 - i) * v[j, k] for i, j in enumerate(who))
        assert torch.allclose(got[k], want, atol=1e-12)


def test_a_new_class_gets_its_first_mean_outright():
    bank, v, c = PrototypeBank(2, 3), torch.full((1, 2, 3), 4.), torch.tensor([[50., 2.]])
    bank.update(v, proda.enough(v, c), proda.Denoise().proto_momentum)
    assert bank.matrix.tolist() == [[4.] * 3, [0.] * 3]


def test_class_means_without_enlarging_the_features():
    torch.manual_seed(0)
    z, f = torch.randn(3, K, 13, 25), torch.randn(3, 6, 13, 25)
    for size in ((50, 99), None):
        got, counts = proda.predicted_means(z, f, size)
        big_z, big_f = (up(t, size) if size else t for t in (z, f))
        for n in range(3):
            for k in range(K):
                mask = big_z[n].argmax(0) == k
                assert counts[n, k] == mask.sum()
                if mask.any():
                    assert torch.allclose(got[n, k], big_f[n][:, mask].mean(1), atol=2e-4)
                else:
                    assert not got[n, k].any()


def test_initial_prototypes_of_a_network(target, tmp_path):
    net = tiny().train()
    made = proda.init_prototypes(net, target, path=tmp_path / "p.safetensors", progress=False)
    assert not net.training
    with torch.no_grad():
        pairs = [proda.predicted_means(*net(target[i][0][None].float() / 255, features=True)) for i in range(4)]
    want = released_means(torch.cat([v for v, _ in pairs]), torch.cat([c for _, c in pairs]), 4, 3000)
    assert torch.allclose(made.matrix, want, atol=1e-5)
    again = proda.init_prototypes(None, target, path=tmp_path / "p.safetensors")
    assert torch.equal(again.matrix, made.matrix) and torch.equal(again.counts, made.counts)
    plain = proda.init_prototypes(net, target, plain_mean=True, progress=False)
    assert plain.meta["images"] == 6 and not torch.allclose(plain.matrix, made.matrix, atol=1e-4)


@pytest.mark.parametrize("other,said", [(dict(passes=2), "passes=4, not passes=2"), (dict(kind="imagenet"), "kind=unit, not kind=imagenet"),
                                        (dict(plain_mean=True), "images=4, not images=6, passes=4, not passes=1"), (dict(drop=3), "images=4, not images=6")])
def test_prototypes_of_other_settings_are_not_taken(target, tmp_path, other, said):
    path = tmp_path / "p.safetensors"
    made = proda.init_prototypes(tiny(), target, path=path, progress=False)
    with pytest.raises(InputError, match=f"p.safetensors: these prototypes were made with {said}"):
        proda.init_prototypes(None, target, path=path, **other)
    save_prototypes(path, replace(made, meta={}))                       # a file that does not say
    assert torch.equal(proda.init_prototypes(None, target, path=path, **other).matrix, made.matrix)


# ---------------------------------------------------------------------------------------------------------------- stages

def soft_set(net, target, folder):
    write_soft(segmenter(net, Feed(input="unit")), target, folder, dtype="float32", progress=False)
    return SoftLabels(target, folder)


def released_denoise_step(net, average, eta, opt, batch, cfg):
    """One step of stage 1, everything enlarged, every class in a loop, the averaged network asked once per use."""
    see = lambda m, x: m(x.float() / 255, features=True)
    N, (h, w), full = len(batch["full"]), [n // 4 for n in batch["weak"].shape[2:]], batch["full"].shape[2:]
    small = full[0] // 4, full[1] // 4
    views = [Geometry(*v[:4], *batch["weak"].shape[2:], bool(v[4])) for v in batch["view"].tolist()]
    opt.zero_grad()
    images, labels = batch["source"]
    F.cross_entropy(up(net(images.float() / 255), labels.shape[1:]), labels, ignore_index=255).backward()
    with torch.no_grad():
        q0 = torch.cat([up(cropped(up(up(batch["soft"][n:n + 1], full), (g.height, g.width)), g), (h, w)) for n, g in enumerate(views)])
        z_e, f_e = (up(t, small) for t in see(average, batch["full"]))
        g_e = torch.cat([cropped(up(f_e[n:n + 1], (g.height // 4, g.width // 4)), g, 4) for n, g in enumerate(views)])
        d = looped_distances(g_e, eta)
        omega = torch.softmax(-(d - d.amin(1, keepdim=True)) * cfg.temperature, 1)
        y = (omega * q0).argmax(1)
        warped = torch.stack([torch.stack([warp_labels((d[n, k] * 1e6).long(), warp, 250_000_000) for k in range(K)])
                              for n, warp in enumerate(batch["warp"])]).double() / 1e6
        t, mask = torch.softmax(-warped * cfg.temperature, 1).float(), (warped != 250).float()
    z_t = up(see(net, batch["weak"])[0], (h, w))
    loss = .1 * F.cross_entropy(z_t, y) + released_rce(z_t, y) - .1 * z_t.log_softmax(1).mean()
    s = torch.log_softmax(-looped_distances(up(see(net, batch["strong"])[1], (h, w)), eta) * cfg.temperature, 1)
    (loss + 10 * (mask * t * (t.clamp(min=1e-30).log() - s)).sum() / mask.sum()).backward()
    opt.step()
    for n in range(N):
        ids = z_e[n].argmax(0)
        for k in range(K):
            if (ids == k).sum() >= 10:
                eta[k] = eta[k] * cfg.proto_momentum + f_e[n][:, ids == k].mean(1) * (1 - cfg.proto_momentum)
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), net.parameters()):
            slow.copy_(cfg.ema * slow + (1 - cfg.ema) * fast)
        for slow, fast in zip(average.buffers(), net.buffers()):
            slow.copy_(fast)


def test_a_step_of_stage_1_is_the_released_step(source, target, tmp_path):
    cfg = proda.Denoise(window=WINDOW, lr=1e-3, ema=.9, proto_momentum=.9)
    first = tiny().eval()
    soft = soft_set(first, target, tmp_path)
    ours, theirs = first.train(), deepcopy(first)
    slow = [deepcopy(ours), deepcopy(ours)]
    torch.manual_seed(4)
    eta = [torch.randn(K, 6)] * 2
    eta = [e.clone() for e in eta]
    bank = PrototypeBank(K, 6)
    bank.matrix.copy_(eta[0])
    opts = sgd(ours, cfg), plain_sgd(theirs, cfg)
    make = proda.denoise_samples(source, soft, cfg, seed=3)
    for i in range(2):
        batch = stacked([make(2 * i), make(2 * i + 1)])
        log = proda.denoise_step(ours, slow[0], bank, *opts[0], batch, cfg)
        for group, lr in zip(opts[1].param_groups, (1e-3, 1e-3)):
            group["lr"] = lr * (1 - i / 90_000) ** .9
        released_denoise_step(theirs, slow[1], eta[1], opts[1], batch, cfg)
        assert set(log) == {"source", "hard", "regular", "consistency"} and all(v.dim() == 0 and v.isfinite() for v in log.values())
    same(ours, theirs, 2e-5)
    same(*slow, 2e-5)
    assert (bank.matrix - eta[1]).abs().max() < 2e-5


def test_the_averaged_network_is_in_train_mode_unless_asked(source, target, tmp_path, monkeypatch):
    soft, seen = soft_set(tiny(), target, tmp_path / "soft"), []
    real = proda.average_view
    monkeypatch.setattr(proda, "average_view", lambda average, *a: (seen.append(average.training), real(average, *a))[1])
    run = Train(steps=1, batch_size=1, device="cpu")
    for ema_eval in (False, True):
        first = proda.init_prototypes(tiny(), target, progress=False)
        proda.denoise(source, soft, tiny(), first, proda.Denoise(window=WINDOW, ema_eval=ema_eval), run, run_dir=tmp_path / str(ema_eval),
                      progress=False)
    assert seen == [True, False]


def test_the_warm_up_step_is_the_described_step(source, target):
    cfg = proda.AdversarialWarmUp(window=WINDOW, lr=1e-3, freeze_bn=False)
    D = nn.Sequential(nn.Conv2d(K, 4, 3, 2, 1), nn.LeakyReLU(.2), nn.Conv2d(4, 1, 1))
    ours, theirs, D2 = tiny().train(), tiny().train(), deepcopy(D)
    opt, sched = sgd(ours, cfg)
    adam = [torch.optim.Adam(d.parameters(), lr=1e-4, betas=(.9, .99)) for d in (D, D2)]
    make = proda.warm_up_samples(source, target, cfg, seed=3)
    batch = torch.utils.data.default_collate([make(i) for i in range(2)])
    log = proda.warm_up_step(ours, D, opt, adam[0], [sched], batch, cfg)
    (x_s, y_s), (x_t, _) = batch["source"], batch["target"]
    opt2, size = plain_sgd(theirs, cfg), x_t.shape[2:]
    z_s = up(theirs(x_s.float() / 255), size)
    z_t = up(theirs(x_t.float() / 255), size)
    loss, fool = F.cross_entropy(z_s, y_s, ignore_index=255), (D2(z_t.softmax(1)) ** 2).mean()
    (loss + .01 * fool).backward()
    opt2.step()
    adam[1].zero_grad()
    tell = (D2(z_s.detach().softmax(1)) ** 2).mean() + ((D2(z_t.detach().softmax(1)) - 1) ** 2).mean()
    tell.backward()
    adam[1].step()
    same(ours, theirs, 1e-6)
    same(D, D2, 1e-6)
    for name, want in dict(source=loss, fool=fool, tell=tell).items():
        assert torch.allclose(log[name], want, atol=1e-5)


def test_warm_up_can_hold_the_batch_norms_still(source, target, tmp_path):
    net = tiny()
    before = deepcopy(net.state_dict())
    D = nn.Conv2d(K, 1, 3, 2)
    proda.adversarial_warm_up(source, target, net, D, proda.AdversarialWarmUp(window=WINDOW, lr=.01), Train(steps=2, batch_size=2, device="cpu"), run_dir=tmp_path,
                  progress=False)
    moved = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "classifier.weight"}


def test_the_learning_rates_of_the_released_run():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    sched = schedule(opt, polynomial(Distill().length, Distill().power))
    assert opt.param_groups[0]["lr"] == 1
    assert sched.lr_lambdas[0](62_411) == pytest.approx(.34502, abs=5e-6)
    assert [c().lr for c in (proda.AdversarialWarmUp, proda.Denoise, Distill)] == [2.5e-4, 1e-4, 6e-4]
    assert [c().head_factor for c in (proda.AdversarialWarmUp, proda.Denoise, Distill)] == [10, 1, 10]


def test_a_batch_without_labels_and_a_network_with_missing_classes(source, target, tmp_path):
    class Nothing:
        names, space = target.names, target.space
        def __len__(self): return len(target)
        def __getitem__(self, i): return target[i][0], torch.full((64, 128), 255)

    cfg, run = Distill(window=WINDOW, rce=True), Train(steps=2, batch_size=2, device="cpu", log_every=1)
    student = tiny()
    out = distillation.distill(Nothing(), Nothing(), student, tiny(1), cfg, run, run_dir=tmp_path / "a", progress=False)
    assert out["finished"] and all(p.isfinite().all() for p in student.parameters())
    net = tiny()
    with torch.no_grad():
        net.classifier.weight[5:] = 0                                    # classes that hardly ever win
    first = proda.init_prototypes(net, target, progress=False)
    assert not first.valid.all()
    soft = soft_set(net, target, tmp_path / "soft")
    out = proda.denoise(Nothing(), soft, net, first, proda.Denoise(window=WINDOW), run, run_dir=tmp_path / "b", progress=False)
    assert out["finished"] and all(p.isfinite().all() for p in net.parameters())


class Broken:
    """A data set whose disk fails once a number of items has been read."""

    def __init__(self, dataset, good):
        self.dataset, self.good, self.names, self.space = dataset, good, dataset.names, dataset.space

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.good -= 1
        if self.good < 0:
            raise InputError("the disk is gone")
        return self.dataset[i]


@pytest.mark.parametrize("stage", ["denoise", "distill", "warm_up"])
def test_a_stage_that_broke_goes_on_as_if_nothing_had_happened(stage, source, target, tmp_path):
    soft = soft_set(tiny(1), target, tmp_path / "soft")
    run = Train(steps=4, batch_size=2, device="cpu", checkpoint_every=1, log_every=1)

    def go(source, folder):
        net, where = tiny(), dict(run_dir=tmp_path / folder, progress=False)
        if stage == "distill":
            out = distillation.distill(source, target, net, tiny(1), Distill(window=WINDOW, lr=.01), run, **where)
        elif stage == "warm_up":
            torch.manual_seed(1)
            out = proda.adversarial_warm_up(source, target, net, nn.Conv2d(K, 1, 3, 2), proda.AdversarialWarmUp(window=WINDOW, lr=.01), run, **where)
        else:
            first = proda.init_prototypes(tiny(1), target, progress=False)
            out = proda.denoise(source, soft, net, first, proda.Denoise(window=WINDOW, lr=.01), run, **where)
        return net, out

    whole, out = go(source, "whole")
    with pytest.raises(InputError, match="disk"):
        go(Broken(source, 5), "broken")
    again, out2 = go(source, "broken")
    assert out == out2 == dict(step=4, finished=True)
    same(whole, again, 0)
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "broken" / "metrics.csv").read_text()
    once_more, _ = go(Broken(source, 0), "broken")                       # finished: nothing is read any more
    same(whole, once_more, 0)


def test_images_of_two_sizes_are_named(target):
    a, b = (dict(full=torch.zeros(3, n, 8), warp=Warp((4, 4))) for n in (8, 9))
    with pytest.raises(InputError, match="cannot share a batch"):
        stacked([a, b])


# ------------------------------------------------------------------------------------------------------------- processes

def whole_run(where, world):
    """The four stages on very few streets; the network as the main process leaves it goes to a file."""
    torch.set_num_threads(1)
    run = Train(steps=2, batch_size=2 // world, device="cpu")
    acc = accelerator_for(run)
    assert acc.num_processes == world
    made = Streets(SYNTHETIC, 6, size=(64, 128)), Streets(REAL, 6, size=(64, 128), seed=1)
    net, D, student = tiny(norm=False), nn.Conv2d(K, 1, 3, 2), tiny(5, norm=False)
    torch.manual_seed(2)
    nn.init.normal_(D.weight, std=.1)
    nn.init.zeros_(D.bias)
    cfg = proda.ProDA(proda.AdversarialWarmUp(window=WINDOW, lr=1e-3), proda.Denoise(window=WINDOW, lr=1e-3, proto_momentum=.9),
                      Distill(window=WINDOW, lr=1e-3, threshold=.06))
    quiet = dict(run_dir=where, progress=False)
    proda.adversarial_warm_up(*made, net, D, cfg.warm_up, run, **quiet)
    soft, first = proda.soft_labels(net, made[1], cfg.denoise, run, **quiet)
    proda.denoise(made[0], soft, net, first, cfg.denoise, run, **quiet)
    distillation.distill_round(*made, student, net, cfg.distill, run, stage="stage2", **quiet)
    out = distillation.distill_round(*made, student, deepcopy(student), cfg.distill, run, stage="stage3", **quiet)
    if acc.is_main_process:
        torch.save(dict(out=out, net=net.state_dict(), student=student.state_dict()), f"{where}.pt")
    return f"{where}.pt"


def two_processes(where):
    """Start the same run twice, as a launcher does, and wait."""
    port, started = 20_000 + os.getpid() % 20_000, []
    command = [sys.executable, "-c", f"import test_proda; test_proda.whole_run({str(where)!r}, 2)"]
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "RANK": str(rank),
               "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(subprocess.Popen(command, env=env, cwd=os.path.dirname(__file__), stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))
    for p in started:
        said = p.communicate(timeout=240)[0]
        assert p.returncode == 0, said[-3000:]
    return f"{where}.pt"


def test_two_processes_end_where_one_does(tmp_path):
    """The whole pipeline, all four stages: windows differ in what they ignore, so a mean of means would show."""
    files = whole_run(tmp_path / "one", 1), two_processes(tmp_path / "two")
    one, two = (torch.load(f, weights_only=True) for f in files)
    assert one["out"] == two["out"] == dict(step=2, finished=True)
    for part in ("net", "student"):
        for name, v in one[part].items():
            assert (v - two[part][name]).abs().max() < 5e-6, f"{part} {name}: {(v - two[part][name]).abs().max():.1e}"
    memories = [load_file(tmp_path / n / "checkpoints" / "denoise-0000002" / "memory.safetensors")["prototypes"] for n in ("one", "two")]
    assert (memories[0] - memories[1]).abs().max() < 5e-6
    start = tiny(5, norm=False).state_dict()
    assert any((v - start[n]).abs().max() > 1e-4 for n, v in one["student"].items())


# ---------------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("flag", ["legacy_dup", "bce", "strong_source", "mean_std"])
def test_each_flag_of_the_warm_up_makes_another_run(flag, source, target, tmp_path):
    run, ends = Train(steps=2, batch_size=2, device="cpu"), []
    for on in (False, True):
        torch.manual_seed(3)
        cfg, net, D = replace(proda.AdversarialWarmUp(window=WINDOW, lr=.01), **{flag: on}), tiny(), nn.Conv2d(K, 1, 3, 2)
        proda.adversarial_warm_up(source, target, net, D, cfg, run, run_dir=tmp_path / str(on), progress=False)
        ends.append(net)
    assert all(p.isfinite().all() for p in ends[1].parameters())
    assert not torch.equal(ends[0].conv1.weight, ends[1].conv1.weight)


def test_a_released_warp_moves_too_far():
    """TranslateX of the released label warp is W/H too long; ours follows the picture."""
    six = (1, 0, 8, 0, 1, 0)
    ramp = torch.arange(56).expand(32, 56).contiguous()
    ours, theirs = (warp_labels(ramp, Warp((32, 56), (("TranslateX", 8, six),), legacy=on)) for on in (False, True))
    assert torch.equal(ours[0, :48], torch.arange(8, 56)) and theirs[0, 0] == 14
