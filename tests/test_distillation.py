"""The distillation that ProDA and PBAL end with, against loops that follow the published description of the released code."""
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_proda import K, WINDOW, gradient, noisy_labels, plain_sgd, released_rce, same, sgd, source, target, tiny, up  # noqa: F401

from protonb import distillation
from protonb.colour import Warp
from protonb.core import InputError, rng_for
from protonb.deeplab import released_repeats
from protonb.distillation import Distill, check_windows, fitted_window
from protonb.proda import METHOD, ProDA
from protonb.pseudo_labels import HardLabels
from protonb.recipes import Situation
from protonb.sampling import shuffled_index
from protonb.streets import REAL, Streets
from protonb.training import Train, accelerator_for
from protonb.windows import look


def test_reverse_cross_entropy_is_the_clamped_form_in_value_and_gradient():
    z = torch.randn(2, K, 9, 7, dtype=torch.float64).mul(2).requires_grad_()
    y = noisy_labels(2, 9, 7)
    ours, theirs = distillation.reverse_cross_entropy(z, y), released_rce(z, y)
    assert abs(ours - theirs) < 1e-4
    assert (gradient(ours, z)[0] - gradient(theirs, z)[0]).abs().max() < 1e-6
    p = z.softmax(1).gather(1, y.masked_fill(y == 255, 0)[:, None])[:, 0]
    assert abs(ours - 9.21034 * (1 - p)[y != 255].mean()) < 1e-4
    assert distillation.LOG_ZERO == pytest.approx(-np.log(1e-4))


def test_symmetric_cross_entropy_weighs_its_two_halves():
    z, y = torch.randn(2, K, 9, 7), noisy_labels(2, 9, 7)
    want = .1 * F.cross_entropy(z, y, ignore_index=255) + released_rce(z, y)
    assert abs(distillation.symmetric_cross_entropy(z, y) - want) < 1e-4


def test_regulariser_of_uniform_logits():
    z = torch.full((2, 16, 3, 5), .7)
    assert distillation.regulariser(z).item() == pytest.approx(np.log(16), abs=1e-6)
    assert distillation.regulariser(z, entropy=True).item() == pytest.approx(-np.log(16), abs=1e-6)
    z = torch.randn(2, 16, 3, 5)
    assert torch.allclose(distillation.regulariser(z), -z.log_softmax(1).sum() / (2 * 16 * 3 * 5))
    assert torch.allclose(distillation.regulariser(z, True), (z.softmax(1) * z.log_softmax(1)).sum() / (2 * 3 * 5))


def test_distillation_is_zero_at_equality_and_the_mean_over_all_entries():
    s, t = torch.randn(2, K, 5, 6, requires_grad=True), torch.randn(2, K, 5, 6)
    assert distillation.kd_loss(t, t).abs() < 1e-7
    want = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="sum") / (2 * K * 5 * 6)
    assert torch.allclose(distillation.kd_loss(s, t), want, atol=1e-7)
    assert gradient(distillation.kd_loss(t.requires_grad_(), t), t)[0].abs().max() < 1e-7


def test_released_distillation_only_pushes_the_inner_product():
    s, t = torch.randn(2, K, 5, 6, requires_grad=True), torch.randn(2, K, 5, 6)
    legacy = distillation.kd_loss(s, t, legacy=True)
    assert torch.allclose(legacy, F.kl_div(s.softmax(1), t.softmax(1), reduction="none").mean(), atol=1e-7)
    inner = -(t.softmax(1) * s.softmax(1)).mean()
    assert torch.allclose(gradient(legacy, s)[0], gradient(inner, s)[0], atol=1e-8)
    assert legacy.abs() > 1e-3 and distillation.kd_loss(t, t, legacy=True) != 0


def test_quarter_labels_take_every_fourth_pixel(target, monkeypatch):
    cfg = Distill(window=WINDOW)
    strong_samples = lambda: distillation.distill_samples(target, target, cfg, 5)  # noqa: E731
    image, label = strong_samples()(2)["target"]
    assert image.shape == (3, 32, 56) and label.shape == (8, 14) and image.dtype == torch.uint8
    monkeypatch.setattr(distillation, "rand_augment", lambda image, rng, legacy: (image, Warp(tuple(image.shape[1:]))))
    image, label = strong_samples()(2)["target"]
    plain, fine, _ = look(*target[shuffled_index(2, 6, 5, "target")], WINDOW, rng_for(5, "target", 2))
    assert torch.equal(image, plain) and torch.equal(label, fine[::4, ::4])
    full = torch.arange(32 * 56).view(32, 56)
    assert torch.equal(full[::4, ::4], F.interpolate(full[None, None].double(), scale_factor=.25, mode="nearest")[0, 0].long())
    with pytest.raises(InputError, match="crop_width is 50"):
        distillation.distill_samples(target, target, replace(cfg, window=replace(WINDOW, crop_width=50)))


def test_a_step_of_stage_2_is_the_described_step(source, target, tmp_path):
    cfg = Distill(window=WINDOW, lr=1e-3)
    teacher, ours = tiny(7).eval(), tiny().train()
    theirs = deepcopy(ours)
    opts = sgd(ours, cfg), plain_sgd(theirs, cfg)
    make = distillation.distill_samples(source, target, cfg, seed=3)
    batch = torch.utils.data.default_collate([make(i) for i in range(2)])
    batch["target"][1][0, :4] = 255
    log = distillation.distill_step(ours, teacher, *opts[0], batch, cfg)
    opts[1].zero_grad()
    (x_s, y_s), (x_t, y_t) = batch["source"], batch["target"]
    source_loss = F.cross_entropy(up(theirs(x_s.float() / 255), y_s.shape[1:]), y_s, ignore_index=255)
    source_loss.backward()
    z = up(theirs(x_t.float() / 255), y_t.shape[1:])
    t = up(teacher(x_t.float() / 255), y_t.shape[1:]).softmax(1).detach()
    hard, kd = F.cross_entropy(z, y_t, ignore_index=255), F.kl_div(z.log_softmax(1), t, reduction="none").mean()
    (hard + kd).backward()
    opts[1].step()
    same(ours, theirs, 1e-6)
    for name, want in dict(source=source_loss, hard=hard, kd=kd).items():
        assert torch.allclose(log[name], want, atol=1e-5)


def test_a_teacher_is_not_changed_and_may_be_the_student_before(source, target, tmp_path):
    cfg, run = Distill(window=WINDOW, lr=.01), Train(steps=2, batch_size=2, device="cpu")
    teacher = tiny().train()
    before, student = deepcopy(teacher.state_dict()), deepcopy(teacher)
    distillation.distill_round(source, target, student, teacher, cfg, run, run_dir=tmp_path, stage="stage2", progress=False)
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    assert not torch.equal(student.conv1.weight, teacher.conv1.weight)
    hard = HardLabels(target, tmp_path / "pseudo" / "stage2", thresholds=.95, below="<=")
    assert len(hard) == 6 and (tmp_path / "pseudo" / "stage2" / "histogram.json").exists()


@pytest.mark.parametrize("flag", ["legacy_kd", "legacy_warp", "legacy_dup", "rce", "mean_std"])
def test_each_flag_of_the_distillation_makes_another_run(flag, source, target, tmp_path):
    run, ends = Train(steps=2, batch_size=2, device="cpu"), []
    for on in (False, True):
        cfg, student = replace(Distill(window=WINDOW, lr=.01), **{flag: on}), tiny()
        distillation.distill(source, target, student, tiny(1), cfg, run, run_dir=tmp_path / str(on), progress=False)
        ends.append(student)
    assert all(p.isfinite().all() for p in ends[1].parameters())
    same_warp = flag == "legacy_warp" and all(                     # the labels can only differ where something moved
        torch.equal(*(distillation.distill_samples(target, target, Distill(window=WINDOW, legacy_warp=on), 0)(i)["target"][1]
                      for on in (False, True))) for i in range(4))
    assert same_warp or not torch.equal(ends[0].conv1.weight, ends[1].conv1.weight)


def test_repeated_updates_are_three_in_a_row(source, target):
    """legacy_dup: the backbone's tensors get three updates with one gradient, the classifier one."""
    cfg, net = Distill(window=WINDOW, lr=.01), tiny()
    twin = deepcopy(net)
    acc = accelerator_for(Train(steps=1, device="cpu"))
    _, opt, _ = distillation.equip(net, cfg, acc, released_repeats(net))
    for p, q in zip(net.parameters(), twin.parameters()):
        p.grad = torch.ones_like(p)
    opt.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        lr, times = (.1, 1) if name.startswith("classifier") else (.01, 3)
        q, buf = q.detach().clone(), 0
        for _ in range(times):
            buf = .9 * buf + 1 + 2e-4 * q
            q -= lr * buf
        assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("size", [(97, 193), (65, 129), (300, 200)])
def test_the_fitted_window_fits(size):
    here = Situation(100, 2, *size, 19)
    settings = METHOD.fitted(here)                          # denoising has a window of its own
    windows = {part.window for part in vars(settings).values()}
    assert windows == {fitted_window(here), fitted_window(here, 0)}
    check_windows(settings, Streets(REAL, 3, size=size))
    for window in windows:
        for i in range(5):
            image, label, _ = look(torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size).long(), window, rng_for(0, i))
            assert image.shape[1:] == label.shape == (window.crop_height, window.crop_width)


def test_a_window_that_does_not_fit_is_refused_before_the_first_step():
    class Narrow(Streets):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return (image[:, :9], label[:9]) if i == 2 else (image, label)
    few = Narrow(REAL, 3, size=(64, 128))
    settings = ProDA(*(replace(part, window=WINDOW) for part in vars(ProDA()).values()))
    with pytest.raises(InputError, match=f"{few.names[2]}: is 9x128, too small for the window"):
        check_windows(settings, few)
    settings.distill.window = replace(WINDOW, crop_width=50)
    with pytest.raises(InputError, match="crop_width is 50; expected a multiple of 4"):
        check_windows(settings, Streets(REAL, 3, size=(64, 128)))
    settings.distill.window = replace(WINDOW, crop_width=49)                       # distillation takes one pixel more ...
    check_windows(settings, Streets(REAL, 3, size=(64, 128)))
    settings.denoise.window = replace(WINDOW, crop_width=49)                       # ... denoising does not
    with pytest.raises(InputError, match="crop_width is 49; expected a multiple of 4, for example 48"):
        check_windows(settings, Streets(REAL, 3, size=(64, 128)))
