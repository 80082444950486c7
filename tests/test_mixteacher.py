"""MixTeacher and joint training: each against the plain lines of its equation, every kind of label, and a run that is stopped."""
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from protonb import joint, mixteacher, source_only
from protonb.cli import parse
from protonb.core import InputError
from protonb.datasets import take
from protonb.deeplab import iapc_small, pbal_small
from protonb.labels import IGNORE
from protonb.methods import Job, train
from protonb.mixing import match_colours, mix_masks
from protonb.options import open_target
from protonb.plans import with_settings
from protonb.pseudo_labels import PartlyLabelled, Unlabelled
from protonb.recipes import Situation, flat
from protonb.runs import METHODS
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.teachers import adapt_statistics, average_of
from protonb.training import Train
from protonb.transforms import normalize
from protonb.weak_labels import WeakLabels
from protonb.windows import Window

EYES = Window(low=.8, high=1.3, crop_height=49, crop_width=97, flip_p=.5, pad=True)
GAMES, TARGET = Streets(SYNTHETIC, 6, size=(65, 129)), Streets(REAL, 6, size=(65, 129), seed=1)


def plain_cross_entropy(z, y):
    z = F.interpolate(z, y.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(z, y, ignore_index=IGNORE, reduction="none")


def grads(net): return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def close(a, b): assert (a-b).abs().max() <= 1e-5*b.abs().max(), ((a-b).abs().max()/b.abs().max()).item()


def nets(seed=0):
    torch.manual_seed(seed)
    return iapc_small().train()


def test_joint_step_is_its_equation():
    net, plain = (nets() for _ in range(2))
    source, target = ((torch.stack([d[i][0] for i in (0, 1)]), torch.stack([d[i][1] for i in (0, 1)])) for d in (GAMES, TARGET))
    target[1][:, 3:] = IGNORE                                               # three rows of labels, a mean of their own
    opt = torch.optim.SGD(net.parameters(), lr=0.)
    log = joint.step(net, opt, torch.optim.lr_scheduler.ConstantLR(opt), dict(source=source, target=target), weight=.5)
    total = 0
    for (x, y), w in ((source, 1.), (target, .5)): total += w*plain_cross_entropy(plain(normalize(x)), y).sum()/(y != IGNORE).sum()
    total.backward()
    close(grads(net), grads(plain))
    assert abs(log["source"] + .5*log["target"] - total) < 1e-4


def test_a_target_without_a_labelled_pixel_adds_nothing():
    net, x, y = nets(), GAMES[0][0][None], GAMES[0][1][None]
    opt = torch.optim.SGD(net.parameters(), lr=0.)
    log = joint.step(net, opt, torch.optim.lr_scheduler.ConstantLR(opt), dict(source=(x, y), target=(x, y*0+IGNORE)))
    assert log["target"] == 0 and grads(net).isfinite().all()


def test_teacher_labels_pixel_by_pixel():
    torch.manual_seed(0)
    z, y = 5*torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4)).where(torch.rand(2, 3, 4) < .2, torch.tensor(IGNORE))
    tags = torch.tensor([[True, False, True, True, False], [False]*5])      # of the second image nothing is said
    ids, w = mixteacher.teacher_labels(lambda images: z, torch.zeros(2, 3, 3, 4), y, tags, tau=.8)
    for b in range(2):
        p = z[b].softmax(0) if b else z[b][[0, 2, 3]].softmax(0)
        share = (p.amax(0) >= .8).float().mean()
        for i in range(3):
            for j in range(4):
                if y[b, i, j] != IGNORE: assert (ids[b, i, j], w[b, i, j]) == (y[b, i, j], 1)
                else:
                    assert w[b, i, j] == share and ids[b, i, j] == (p[:, i, j].argmax() if b else torch.tensor([0, 2, 3])[p[:, i, j].argmax()])


@pytest.mark.parametrize("style", [0., 1.], ids=["own colours", "the target's colours"])
@pytest.mark.parametrize("kind", ["none", "point", "coarse", "few"])
def test_mixteacher_step_is_its_equation(kind, style):
    student, teacher = nets(), nets(1)
    with torch.no_grad():                                                   # a teacher that tells classes apart
        z = teacher(normalize(TARGET[0][0][None])).mean((0, 2, 3))
        last = [m for m in teacher.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        last.bias = torch.nn.Parameter((last.bias if last.bias is not None else 0) - z)
    teacher = average_of(teacher)
    plain, slow = deepcopy(student), deepcopy(teacher)
    cfg = mixteacher.MixTeacher(kind, colour=0., tau=.06, mix=.7, weight=.5, style=style)
    (x, y), (x_t, y_t) = ((torch.stack([d[i][0] for i in (0, 1)]), torch.stack([d[i][1] for i in (0, 1)])) for d in (GAMES, TARGET))
    y_t = y_t.clone()
    y_t[:, 0 if kind == "none" else 10:] = IGNORE
    few = GAMES[2][0][None].repeat(2, 1, 1, 1), GAMES[2][1][None].repeat(2, 1, 1)
    opt = torch.optim.SGD(student.parameters(), lr=0.)
    log = mixteacher.step(student, teacher, opt, torch.optim.lr_scheduler.ConstantLR(opt, 1.), dict(source=(x, y), target=(x_t, y_t)) | (dict(few=few) if kind == "few" else {}), cfg)
    rng = mixteacher.rng_for(0, "mixteacher", 0)
    if style:
        (m, d), (m_t, d_t) = ((v.float().mean((2, 3), keepdim=True), v.float().var((2, 3), keepdim=True, correction=0).sqrt()) for v in (x, x_t))
        styled = ((x-m)/d*d_t+m_t).clamp(0, 255)
        assert (styled-x).abs().mean() > 2
        same = match_colours(x, x_t)                                        # the step's own bits: a last one that differs can turn a ReLU over
        assert (same-styled).abs().max() < 1e-2
        x = same
    mask = mix_masks(y, torch.Generator().manual_seed(int(rng.integers(2**62))))
    with torch.no_grad(): p, ids = F.interpolate(slow(normalize(x_t)), y.shape[1:], mode="bilinear", align_corners=True).softmax(1).max(1)
    w = (p >= .06).float().mean((1, 2), keepdim=True).expand_as(p)
    share = torch.stack([(ids == k).float().mean() for k in range(19)])
    assert (share > .01).sum() > 2 and 0 < w.min() < 1
    rare = share.clamp(min=1e-3)**-.5
    w = w*(rare/(rare*share).sum())[ids]
    ids, w = ids.where(y_t == IGNORE, y_t), w.where(y_t == IGNORE, torch.tensor(1.))
    m_x, m_y, m_w = torch.where(mask[:, None], x, x_t), torch.where(mask, y, ids), torch.where(mask, torch.tensor(1.), w)
    total = 0
    for k_x, k_y in [(x, y), *dict(none=[], few=[few]).get(kind, [(x_t, y_t)])]:
        total = total + .5*plain_cross_entropy(plain(normalize(k_x)), k_y).sum()/(k_y != IGNORE).sum()
    unknown = (y_t == IGNORE).float().mean()
    assert unknown == 1 if kind == "none" else 0 < unknown < 1
    total = total + .7*unknown*(m_w*plain_cross_entropy(plain(normalize(m_x)), m_y)).sum()/(m_y != IGNORE).sum()
    total.backward()
    close(grads(student), grads(plain))
    assert abs(.5*log["labelled"] + .7*unknown*log["mix"] - total) < 1e-4


def test_the_teacher_keeps_statistics_of_its_own():
    """Its batch norms hear of target images alone; its weights follow."""
    student, teacher = nets(), average_of(nets(1))
    batch = {k: (torch.stack([d[0][0]]), torch.stack([d[0][1]])) for k, d in (("source", GAMES), ("target", Unlabelled(TARGET)))}
    slow = deepcopy(teacher)
    opt = torch.optim.SGD(student.parameters(), lr=.1)
    mixteacher.step(student, teacher, opt, torch.optim.lr_scheduler.ConstantLR(opt), batch, mixteacher.MixTeacher())
    slow(normalize(batch["target"][0]))
    for a, b in zip(teacher.buffers(), slow.buffers()): assert torch.equal(a, b)


@pytest.mark.parametrize("count", [0, 4])
def test_the_result_has_the_statistics_of_whole_target_images(count, tmp_path):
    cfg = mixteacher.MixTeacher(adapt_bn=count, warm=0, length=2, window=EYES)
    job = Job(mixteacher.METHOD, cfg, Train(steps=2, batch_size=2, checkpoint_every=2, device="cpu"), tmp_path, nets(), GAMES, Unlabelled(TARGET), progress=False)
    net = train(job)["net"]
    saved = load_file(tmp_path/"checkpoints"/"mixteacher-0000002"/"net.safetensors")
    fresh = adapt_statistics(deepcopy(net), TARGET, 4)
    same = [torch.equal(a, b) for a, b in zip(net.buffers(), fresh.buffers())]
    assert all(same) if count else not all(same)
    assert all(torch.equal(saved[k], v) for k, v in net.state_dict().items())


DATA = ["--source", "streets:synthetic,count=6,size=65x129", "--target", "streets:real,count=6,size=65x129", "--net", "iapc_small", "--out", "x"]
KINDS = dict(none=[], image=["--weak", "fine"], point=["--weak", "fine"], coarse=["--weak", "fine"], few=["--few", "drawn", "--shots", "2"], full=[])


@pytest.mark.parametrize("m", [m for m in METHODS.values() if m.name not in ("dip", "proda")], ids=lambda m: m.name)
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "stored"])
def test_a_backbone_keeps_its_statistics_where_the_settings_say_so(m, frozen, tmp_path):
    """Those of the backbone stay to the last bit and are what it normalises with; those of the head follow; weights are trained either way."""
    torch.manual_seed(0)
    begun = pbal_small()
    with torch.no_grad():
        for b in begun.buffers():
            if b.is_floating_point(): b.add_(.1)                            # statistics of no batch
    cfg = m.fitted(Situation(3, 2, 65, 129, 19, 6, "trained", tiny=not frozen))
    mine = [k for k in flat(cfg) if k.split(".")[-1] == "freeze_bn"]
    if m.name in ("wdass", "pixda", "pbal"): cfg = with_settings(cfg, dict.fromkeys(mine, frozen))    # their recipes let norms follow
    assert {flat(cfg)[k] for k in mine} == {frozen}
    target = dict(none=None, any=PartlyLabelled(TARGET, [0, 2]) if m is joint.METHOD else Unlabelled(TARGET), unlabelled=Unlabelled(TARGET),
                  weak=WeakLabels(TARGET, "coarse"), few=take(TARGET, [0, 2]))[m.target]
    run = Train(3, 2, 0, device="cpu", checkpoint_every=2)
    done = train(Job(m, cfg, run, tmp_path/"run", deepcopy(begun), GAMES if m.source == "labelled" else None, target, begin="before", progress=False))["net"]
    was, now = begun.state_dict(), done.state_dict()
    for k in was:
        head = k.startswith(begun.head_prefixes)
        if "running" in k: assert torch.equal(was[k], now[k]) == (frozen and not head), k
        if k.endswith("conv1.weight"): assert not torch.equal(was[k], now[k]), k
    assert {k.startswith(begun.head_prefixes) for k in was if "running" in k} == {True, False}
    if m is mixteacher.METHOD:                                              # what is not kept is taken from whole target images in the end
        fresh = adapt_statistics(deepcopy(done), TARGET, 64, only=done.head_prefixes if frozen else ("",)).state_dict()
        assert all(torch.equal(now[k], fresh[k]) for k in now)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_teacher_is_slow_where_nobody_has_labelled_a_pixel(kind):
    """With a backbone that keeps its statistics it remembers three tenths of the run, a tenth where pixels are labelled; a tiny network's a tenth."""
    fitted = ["train", "mixteacher", *DATA, "--recipe", "fitted", "--steps", "200", "--labels", kind, *KINDS[kind]]
    cfg = parse([*fitted, "--net", "pbal_efficientnet_lite0", "--weights", "imagenet"]).hyper
    assert cfg.freeze_bn and cfg.labels == kind
    assert round(1/(1-cfg.alpha)) == (60 if kind in ("none", "image") else 20)
    assert round(1/(1-parse([*fitted, "--net", "pbal_small"]).hyper.alpha)) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_label_is_opened(kind):
    o = parse(["train", "mixteacher", *DATA, "--labels", kind, *KINDS[kind]])
    target = open_target(mixteacher.METHOD, o, GAMES.space)
    seen = [(y != IGNORE).float().mean().item() for _, y in (target[i] for i in range(6))]
    if kind == "none": assert max(seen) == 0
    elif kind == "few": assert sum(s > .5 for s in seen) == len(target.few) == 2 and sum(s == 0 for s in seen) == 4
    elif kind == "full": assert min(seen) > .5
    elif kind == "point": assert 0 < max(seen) < .01
    else: assert .1 < max(seen) <= 1


def test_the_labels_of_others_stay_shut():
    class Sealed:
        names, space = TARGET.names, TARGET.space
        label_paths = None
        def __len__(self): return 6
        def __getitem__(self, i): return TARGET[i][0], TARGET[i][1] if i == 4 else None      # a label that is used would be None
    part = PartlyLabelled(Sealed(), [4])
    assert [(part[i][1] != IGNORE).any().item() for i in range(6)] == [i == 4 for i in range(6)]


@pytest.mark.parametrize("more, says", [(["full", "--few", "drawn"], "--few drawn: says nothing with --labels full; expected --labels few"),
    (["point", "--shots", "3"], "--shots 3: says nothing with --labels point"), (["few", "--weak", "fine"], "expected --labels image or point or coarse"),
    (["none", "--points", "p.yaml"], "--points p.yaml: says nothing with --labels none; expected --labels point")])
def test_an_option_of_other_labels_is_refused(more, says):
    o = parse(["train", "mixteacher", *DATA, "--labels", *more])
    with pytest.raises(InputError, match=re.escape(says)): open_target(mixteacher.METHOD, o, GAMES.space)


@pytest.mark.parametrize("m, target", [(mixteacher.METHOD, Unlabelled(TARGET)), (mixteacher.METHOD, PartlyLabelled(TARGET, [0, 2])),
                                       (mixteacher.METHOD, WeakLabels(TARGET, "image", seed=0)), (joint.METHOD, TARGET)],
                         ids=["none", "few", "tags", "joint"])
def test_a_stopped_run_goes_on_bit_for_bit(m, target, tmp_path):
    kind = {PartlyLabelled: "few", WeakLabels: "image", Unlabelled: "none"}.get(type(target), "full")
    cfg = replace(m.settings(labels=kind), lr=1e-3, warm=1, length=6, rare=.1, window=EYES)

    def run(folder, stop=None):
        job = Job(m, cfg, Train(steps=4, batch_size=2, checkpoint_every=2, device="cpu"), tmp_path/folder, nets(), GAMES, target, progress=False)
        if stop is None: return train(job)["net"]
        real, count = m.stages[0][1].__globals__["step"], [0]

        def step(*args, **kw):
            count[0] += 1
            if count[0] > stop: raise KeyboardInterrupt
            return real(*args, **kw)
        m.stages[0][1].__globals__["step"] = step
        try:
            with pytest.raises(KeyboardInterrupt): train(job)
        finally: m.stages[0][1].__globals__["step"] = real
    run("stopped", 3)
    whole, again = run("whole"), run("stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), nets().parameters()))


@pytest.mark.parametrize("kind, told", [("coarse", True), ("point", True), ("image", False)])
def test_full_labels_that_are_taken_for_weak_ones_are_mentioned(kind, told, capsys):
    o = parse(["train", "wdass", *[w.replace("iapc_small", "wdass_small") for w in DATA], "--labels", kind])
    open_target(o.method, o, GAMES.space)
    assert ("note: 100% of the pixels have a label" in capsys.readouterr().out) == told
    o = parse(["train", "wdass", *[w.replace("iapc_small", "wdass_small") for w in DATA], "--labels", kind, "--weak", "fine"])
    open_target(o.method, o, GAMES.space)
    assert "note" not in capsys.readouterr().out
