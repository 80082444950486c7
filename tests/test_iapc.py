"""IAPC's acceptance tests (specification, sections 13 and 14): losses against a version that loops, the step, and what a run may and may not open."""
import copy
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protonb import iapc
from protonb.colour import policy_augment
from protonb.core import InputError, rng_for
from protonb.deeplab import iapc_resnet101, iapc_small, released_repeats
from protonb.labels import CITYSCAPES, IGNORE
from protonb.ops import prototype_logits
from protonb.optimization import RepeatedSGD
from protonb.pixel_losses import TERMS
from protonb.streets import REAL, Streets
from protonb.streams import three_viewed
from protonb.training import Train, accelerator_for, latest_checkpoint, load_checkpoint, read_metrics, read_states
from protonb.windows import IAPC_REFRESH_WINDOW, IAPC_WINDOW, three_views

VIEW = replace(IAPC_WINDOW, base_height=72, base_width=144, crop_height=49, crop_width=97, more_than=6)
CFG = iapc.IAPC(lr=1e-3, warm=4, rare_pixels=100, scales=(1.,), window=VIEW, refresh_height=64, refresh_width=128)


@pytest.fixture(scope="module")
def target():
    return Streets(REAL, 6, size=(64, 128), seed=1)


def small(seed=0):
    torch.manual_seed(seed)
    return iapc_small(width=8)


# ------------------------------------------------------------------------------------------ the losses, literally, one image and class after the other

def literal(z, feats, z_source, z_memory, f_memory, y, omega, cfg):
    """Section 4.5 word by word, in float64, with loops."""
    B, K = z.shape[:2]
    size, cells = y.shape[1:], feats.shape[2:]

    def up(t): return F.interpolate(t, size, mode="bilinear", align_corners=True)

    def nearest(t, to): return F.interpolate(t[:, None].double(), to, mode="nearest")[:, 0].long()
    y_m, S = nearest(up(z_memory).argmax(1), cells), []
    for b in range(B):
        f = F.normalize(feats[b], dim=0, eps=1e-12)
        rows = []
        for k in range(K):
            here = f_memory[b][:, y_m[b] == k]
            proto = here.mean(1) if here.numel() else torch.zeros(len(f_memory[b]), dtype=f.dtype)
            rows.append((f * F.normalize(proto, dim=0, eps=1e-12)[:, None, None]).sum(0))
        S.append(torch.stack(rows))
    S = torch.stack(S)
    y_p, zu = nearest(S.argmax(1), size), up(z)
    two = (up(z_source).softmax(1) if cfg.importance_on == "probs" else up(z_source)).sort(1, descending=True).values
    W = 1 - two[:, 1] / two[:, 0]
    weighted = F.cross_entropy(zu, y, weight=omega, ignore_index=IGNORE, reduction="none")
    p = zu.softmax(1)
    out = dict(importance=(W * weighted).mean(), symmetric=F.cross_entropy(zu, y_p), enhanced=(weighted * (y_p == y)).mean(),
               entropy=(-(p * (p + 1e-5).log()).sum(1)).mean())
    S_map = S.flatten(2).transpose(1, 2).contiguous().view(B, K, *cells) if cfg.legacy_scramble else S
    out["other_way"] = F.cross_entropy(up(S_map), zu.argmax(1))
    loss = sum(getattr(cfg, t) * out[t] for t in TERMS) + cfg.symmetric * out["other_way"]
    return loss, out, y_p


def inputs(B=2, K=19, C=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, zs, zm = (torch.randn(B, K, 9, 17, generator=g, dtype=dtype) for _ in range(3))
    f, fm = (torch.rand(B, C, 9, 17, generator=g, dtype=dtype) for _ in range(2))
    y = torch.randint(0, K, (B, 65, 129), generator=g)
    y[torch.rand(y.shape, generator=g) < .2] = IGNORE
    return z, f, zs, zm, fm, y, torch.rand(K, generator=g, dtype=dtype) * 6 + 1


@pytest.mark.parametrize("options", [{}, dict(importance_on="probs"), dict(legacy_scramble=True)], ids=str)
def test_the_banded_loss_equals_the_literal_one_in_value_and_gradient(options):
    cfg = replace(CFG, **options)
    z, f, zs, zm, fm, y, omega = inputs()
    z, f = z.requires_grad_(), f.requires_grad_()
    want, terms, _ = literal(z, f, zs, zm, fm, y, omega, cfg)
    low = [t.detach().float() for t in (z, f, zs, zm, fm)]
    lz, lf = low[0].requires_grad_(), low[1].requires_grad_()
    got, log = iapc.losses(lz, lf, *low[2:], y, omega.float(), cfg)
    assert abs(got.item() - want.item()) < 1e-4
    for k, v in terms.items():
        assert abs(log[k].item() - v.item()) < 2e-4, k
    for ours, theirs in zip(torch.autograd.grad(got, (lz, lf)), torch.autograd.grad(want, (z, f))):
        assert (ours - theirs).abs().max() < 2e-5 * max(1, theirs.abs().max())


def test_fixed_and_legacy_layout_differ_and_prototype_labels_do_not():
    z, f, zs, zm, fm, y, omega = inputs()
    a, la, ya = literal(z, f, zs, zm, fm, y, omega, CFG)
    b, lb, yb = literal(z, f, zs, zm, fm, y, omega, replace(CFG, legacy_scramble=True))
    assert a != b and torch.equal(ya, yb)
    ours = [iapc.losses(*(t.float() for t in (z, f, zs, zm, fm)), y, omega.float(), replace(CFG, legacy_scramble=s))[1] for s in (False, True)]
    assert ours[0]["other_way"] != ours[1]["other_way"] and ours[0]["agreement"] == ours[1]["agreement"]


def test_an_absent_class_never_wins_unless_nothing_is_similar():
    _, f, _, zm, fm, *_ = inputs(dtype=torch.float32)
    zm[:, 3:] = -9
    S = prototype_logits(f, iapc.per_image_prototypes(fm, zm, (65, 129)))
    assert S.argmax(1).max() < 3 and (S[:, 3:] == 0).all()
    assert (prototype_logits(torch.zeros_like(f), iapc.per_image_prototypes(fm, zm, (65, 129))) == 0).all()


def test_importance_is_nothing_at_a_tie_and_all_where_the_second_is_zero():
    z, f, zs, zm, fm, y, omega = inputs(dtype=torch.float32)
    tie, sure = torch.zeros_like(zs), torch.zeros_like(zs)
    tie[:, :2], sure[:, 0] = 3., 3.
    assert iapc.losses(z, f, tie, zm, fm, y, omega, CFG)[1]["importance"].abs() < 1e-6
    zu = F.interpolate(z, y.shape[1:], mode="bilinear", align_corners=True)
    whole = F.cross_entropy(zu, y, weight=omega, ignore_index=IGNORE, reduction="none").mean()
    assert torch.allclose(iapc.losses(z, f, sure, zm, fm, y, omega, CFG)[1]["importance"], whole, rtol=1e-5)


@pytest.mark.parametrize("case", ["all ignored", "one class", "absent in the memory"])
def test_odd_batches_give_finite_losses_and_gradients(case):
    z, f, zs, zm, fm, y, omega = inputs(dtype=torch.float32)
    if case == "all ignored":
        y.fill_(IGNORE)
    elif case == "one class":
        y.fill_(4)
        zm[:, 4] = 99
    else:
        zm[:, 4] = -99
    z, f = z.requires_grad_(), f.requires_grad_()
    loss, log = iapc.losses(z, f, zs, zm, fm, y, iapc.class_factors(y, torch.ones(19), CFG), CFG)
    loss.backward()
    assert all(torch.isfinite(v).all() for v in (loss, z.grad, f.grad, *log.values()))
    if case == "all ignored":
        assert log["importance"] == 0 and log["enhanced"] == 0 and log["entropy"] > 0


def test_class_factors_follow_the_definition():
    running, y = torch.ones(4), torch.full((2, 50, 50), IGNORE)
    y[0, :40], y[1, 0, :30] = 0, 1
    cfg = iapc.IAPC(rare_pixels=100)
    assert torch.allclose(iapc.class_factors(y, running, cfg), torch.tensor([1., 7., 7 * 1.6, 7 * 1.6]))
    assert torch.allclose(iapc.class_factors(y, running, cfg), torch.tensor([1., 7., 7 * (.9 * 1.6 + .7), 7 * (.9 * 1.6 + .7)]))
    for _ in range(200):
        omega = iapc.class_factors(y, running, cfg)
    assert torch.allclose(omega[2:], torch.tensor(49.), atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------ optimiser and step

def test_learning_rates_of_the_released_schedule():
    net, cfg = small(), iapc.IAPC()
    opt, sched = iapc.student_optimizer(net, cfg)
    lrs = {i: 1e-4 * sched.lr_lambdas[0](i) for i in (0, 4999, 5000, 8999)}
    assert np.allclose(list(lrs.values()), [1e-5, 9.9982e-5, 9.5488e-5, 9.1863e-5], rtol=1e-5)
    assert np.isclose(opt.param_groups[0]["lr"], 1e-5) and np.isclose(opt.param_groups[-1]["lr"], 1e-4)


def test_released_multiplicities_of_the_exact_network():
    with torch.device("meta"):
        net = iapc_resnet101()
    groups = iapc.student_optimizer(net, iapc.IAPC())[0].param_groups
    backbone = {g["repeats"]: len(g["params"]) for g in groups if g["lr"] < 5e-5}
    assert backbone == {1: 1, 3: 99, 4: 4} and sum(r * n for r, n in backbone.items()) == 314
    assert [(g["repeats"], len(g["params"])) for g in groups if g["lr"] > 5e-5] == [(1, 8)]
    once = iapc.student_optimizer(net, iapc.IAPC(repeats="one"))[0].param_groups
    assert {g["repeats"] for g in once} == {1}


@pytest.mark.parametrize("nesterov", [False, True])
def test_repeats_are_sequential_updates_with_one_gradient(nesterov):
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    opt = RepeatedSGD([dict(params=[a], repeats=3)], lr=.1, weight_decay=.01, nesterov=nesterov)
    p, buf = a.detach().clone(), None
    for t in range(4):
        g = torch.randn(5, dtype=torch.float64)
        a.grad = g.clone()
        opt.step()
        for _ in range(3):
            d = g + .01 * p
            buf = d.clone() if buf is None else .9 * buf + d
            p = p - .1 * (d + .9 * buf if nesterov else buf)
        assert torch.allclose(a, p, atol=1e-12), t


def batch_of(target, n=2):
    make = three_viewed(target, VIEW, replace(IAPC_REFRESH_WINDOW, base_height=64, base_width=128, crop_height=49, crop_width=97), 0, policy_augment)
    return torch.utils.data.default_collate([make(i) for i in range(n)])


def test_the_first_step_leaves_the_memory_and_counts_the_looks(target):
    nets = iapc.trio(small(), CFG)
    before = copy.deepcopy(nets.memory.state_dict())
    opt, sched = iapc.student_optimizer(nets.student, CFG)
    log = iapc.step(nets, opt, sched, torch.ones(19), batch_of(target), CFG)
    for name, p in nets.memory.named_parameters():
        assert torch.equal(p, before[name])
    looks = [{int(b) for n, b in net.named_buffers() if n.endswith("tracked")} for net in (nets.student, nets.source, nets.memory)]
    assert looks == [{2}, {0}, {1}]
    assert all(v.ndim == 0 and not v.requires_grad and torch.isfinite(v) for v in log.values())
    assert all(p.grad is None for p in (*nets.source.parameters(), *nets.memory.parameters()))


def test_switches_do_what_they_say(target):
    cfg = replace(CFG, bn_refresh=False, memory_bn="running")
    nets = iapc.trio(small(), cfg)
    opt, sched = iapc.student_optimizer(nets.student, cfg)
    iapc.step(nets, opt, sched, torch.ones(19), batch_of(target), cfg)
    looks = [{int(b) for n, b in net.named_buffers() if n.endswith("tracked")} for net in (nets.student, nets.memory)]
    assert looks == [{1}, {0}]


def test_the_base_window_lies_at_the_proportional_place():
    """The middle of what both views show differs by no more than half of what a factor of 0.8 adds at an edge."""
    H, W = 72, 144
    ramp, cfg = torch.arange(W).expand(3, H, W).to(torch.uint8), replace(VIEW, flip_p=0., tries=1)
    middle, seen = W * 97 / 2 * (1 / (.8 * W) - 1 / W) + 2, []
    for i in range(30):
        v = three_views(ramp, torch.zeros(H, W).long(), cfg, rng_for(0, i))
        base, plain = (v[k][0, 0, [0, -1]].float().mean().item() for k in ("base", "plain"))
        assert abs(base - plain) < middle
        seen.append(base)
    assert max(seen) - min(seen) > 20            # and the windows do move


# ------------------------------------------------------------------------------------------------------------------ runs

class Sealed:
    """Images whose labels nobody may open."""

    def __init__(self, images):
        self.images, self.names, self.space = images, images.names, CITYSCAPES

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i][0], Never()


class Never:
    def __getattr__(self, name):
        raise AssertionError(f"a target label was opened ({name})")


def run_once(target, folder, stop_at=None, steps=6):
    source = small()
    labelled = iapc.pseudo_labels(Sealed(target), source, CFG, run_dir=folder, progress=False)
    run = Train(steps=steps, batch_size=2, checkpoint_every=2, device="cpu")
    if stop_at is None:
        return iapc.train(labelled, source, CFG, run, run_dir=folder, progress=False)
    real, count = iapc.step, []

    def dying(*a, **k):
        count.append(1)
        if len(count) > stop_at:
            raise KeyboardInterrupt
        return real(*a, **k)
    iapc.step = dying
    try:
        iapc.train(labelled, source, CFG, run, run_dir=folder, progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        iapc.step = real


def test_a_run_needs_neither_source_images_nor_target_labels(target, tmp_path):
    done = run_once(target, tmp_path, steps=2)
    assert done["finished"]
    assert len(list((tmp_path / "pseudo").glob("*.png"))) == 2 * len(target)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_killed_and_started_again_it_ends_with_the_same_weights(target, tmp_path, stop_at):
    whole = run_once(target, tmp_path / "whole")["net"].state_dict()
    run_once(target, tmp_path / "parts", stop_at=stop_at)
    again = run_once(target, tmp_path / "parts")["net"].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    net = small()
    assert load_checkpoint(tmp_path / "parts", dict(net=net))["step"] == 6


@pytest.mark.parametrize("other", [dict(seed=1), dict(adapt_bn=2)])
def test_labels_of_another_source_model_are_refused(target, tmp_path, other):
    label = lambda seed=0, **kw: iapc.pseudo_labels(target, small(seed), replace(CFG, **kw), run_dir=tmp_path, progress=False)
    label()
    with pytest.raises(InputError, match="these labels were made with network="): label(**other)
    label()


def test_a_crop_larger_than_the_image_is_refused_by_name():
    for pad in (False, True):     # the window itself says so, or the settings
        with pytest.raises(InputError, match="crop_width is 600.*smallest scaled image"):
            iapc.IAPC(window=replace(IAPC_WINDOW, crop_width=2000 - 1400, base_width=640, pad=pad))
    with pytest.raises(InputError, match="crop_height is 256, refresh_height is 255"):
        iapc.IAPC(refresh_height=255)
    with pytest.raises(InputError, match="crop_width is 0"):
        iapc.IAPC(window=replace(IAPC_WINDOW, crop_width=0))
    with pytest.raises(InputError, match="pad is True, window.base_height is 0"):
        iapc.IAPC(window=replace(IAPC_WINDOW, base_height=0, base_width=0, pad=True))


def test_an_image_smaller_than_the_window_is_named_before_the_first_step(target, tmp_path):
    """With a window that follows the size of the images."""
    own = dict(base_height=0, base_width=0, crop_height=60)
    labels = iapc.pseudo_labels(target, small(), CFG, run_dir=tmp_path, progress=False)
    for cfg in (replace(CFG, window=replace(VIEW, **own), refresh_height=0, refresh_width=0),
                replace(CFG, window=replace(VIEW, base_height=99, base_width=199, crop_height=65), refresh_height=0, refresh_width=0)):
        with pytest.raises(InputError, match=f"{target.names[0]}.*crop_height is 6"):
            iapc.train(labels, small(), cfg, Train(steps=1, device="cpu"), run_dir=tmp_path, progress=False)


def test_the_band_version_takes_less_time_and_memory_than_the_loops():
    """Outside the backbone: our losses against loops over images and classes, at a quarter of the released size."""
    z, f, zs, zm, fm, y, omega = inputs(B=2, C=256, dtype=torch.float32)
    y = torch.randint(0, 19, (2, 128, 256))

    def clock(loss_of):
        best = 9.
        for _ in range(3):
            a, b = z.clone().requires_grad_(), f.clone().requires_grad_()
            start = time.perf_counter()
            loss_of(a, b, zs, zm, fm, y, omega, CFG)[0].backward()
            best = min(best, time.perf_counter() - start)
        return best
    assert clock(literal) > 1.2 * clock(iapc.losses)


def test_multiplicities_name_only_trained_parameters():
    net = small()
    times = released_repeats(net)
    assert set(times) == {n for n, p in net.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------------ two processes

def test_prototypes_of_another_stage_and_the_range_of_the_importance(tmp_path):
    torch.manual_seed(0)
    target, source = Streets(REAL, 4, size=(64, 128), seed=1), iapc_small(width=8)
    run = Train(steps=2, batch_size=2, device="cpu", log_every=1)
    cfgs = {k: replace(CFG, feature_layer=k) for k in (3, 2, 4)}
    labels = iapc.pseudo_labels(target, source, cfgs[3], run_dir=tmp_path, progress=False)
    for k, cfg in cfgs.items(): iapc.train(labels, copy.deepcopy(source), cfg, run, run_dir=tmp_path / str(k), progress=False)
    logs = {k: read_metrics(tmp_path / str(k)) for k in cfgs}
    assert len({logs[k]["agreement"][1][0] for k in cfgs}) == 3 and len({logs[k]["entropy"][1][0] for k in cfgs}) == 1
    assert all(lo < hi for lo, hi in zip(logs[3]["importance_low"][1], logs[3]["importance_high"][1]))
    one = iapc.losses(*(torch.zeros(1, 19, 5, 9), torch.rand(1, 4, 5, 9)), torch.eye(19)[None, :, 0, None, None].expand(1, 19, 5, 9)*4 - 1,
        torch.zeros(1, 19, 5, 9), torch.rand(1, 4, 5, 9), torch.zeros(1, 32, 64, dtype=torch.long), torch.ones(19), CFG)[1]
    assert one["importance_low"] == one["importance_high"] == pytest.approx(1+1/3)          # 1 - (-1)/3: the two best are 3 and -1
    for bad in (0, 5):
        with pytest.raises(InputError, match=f"feature_layer is {bad}"): replace(CFG, feature_layer=bad)
    with pytest.raises(InputError, match="one kind of features only"): iapc.trio(Tiny(), cfgs[2])


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
from test_iapc import processes
processes(sys.argv[2])
"""


class Tiny(torch.nn.Module):
    """Features at a quarter of the image and a classifier on them; no batch norm, so that the split of a batch does not show."""

    def __init__(self):
        super().__init__()
        self.channels, self.num_classes, self.head_prefixes = 8, 19, ("head",)
        self.body, self.head = torch.nn.Conv2d(3, 8, 5, 4, 2), torch.nn.Conv2d(8, 19, 1)

    def forward(self, x, features=False):
        f = self.body(x).relu()
        return (self.head(f), f) if features else self.head(f)


def processes(home):
    """The same global batches on however many processes there are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    source, target = Tiny(), Streets(REAL, 8, size=(64, 128), seed=1)
    run = Train(steps=4, batch_size=4 // world, device="cpu", log_every=1, checkpoint_every=4)
    cfg = replace(CFG, lr=.05, head_factor=1., repeats="one", rare_pixels=300)
    labels = iapc.pseudo_labels(target, source, cfg, run_dir=home, acc=accelerator_for(run), progress=False)
    fit = iapc.fit

    def looked(one, stream, parts, *args, **kw):                                  # the statistics of a process are its own, as with the other methods
        assert world == 1 or not parts["net"].broadcast_buffers
        return fit(one, stream, parts, *args, **kw)
    iapc.fit = looked
    iapc.train(labels, source, cfg, run, run_dir=home, progress=False)


def test_two_processes_do_what_one_does(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="",
               PYTHONPATH=str(Path(__file__).parents[1]))
    here = str(Path(__file__).parent)
    script = tmp_path / "two.py"
    script.write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for n in (1, 2):
        done = subprocess.run([*torchrun, str(n), str(script), here, str(tmp_path / f"p{n}")], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_states(latest_checkpoint(tmp_path / f"p{n}")) for n in (1, 2))
    for part in ("net", "memory", "running"):
        for k, v in one[part].items():
            assert torch.allclose(v, two[part][k], atol=1e-5), (part, k)
    first = Tiny().state_dict()
    assert not all(torch.allclose(v, first[k], atol=1e-3) for k, v in one["net"].items())
    a, b = (read_metrics(tmp_path / f"p{n}") for n in (1, 2))
    assert np.allclose(a["loss"][1], b["loss"][1], rtol=1e-5) and np.allclose(a["rare_weight"][1], b["rare_weight"][1])
