"""Streams: the samples that every method once made by itself, bit for bit; pairs by name; batches of one process."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace as Cfg

import old_windows as old
import pytest
import torch
from torch.utils.data import default_collate

from protonb.colour import Warp, jitter, policy_augment, rand_augment
from protonb.core import InputError
from protonb.few_shot import uniform_index
from protonb.labels import CITYSCAPES, IGNORE
from protonb.mixing import shuffled_jitter
from protonb.pseudo_labels import Unlabelled
from protonb.streams import (
    feed, few_labelled, labelled, paired, pseudo_labelled, softly_labelled, stacked, stage_seed, strongly, three_viewed, unlabelled,
    weakly_labelled)
from protonb.training import Train, accelerator_for
from protonb.transforms import Augment
from protonb.windows import Window
from test_windows import IAPC, SIZES, WDASS, WEAK, picture, same, wdass_of, weak_of

VIEW = weak_of(WEAK)
PLACES = (0, 3, 7, 12)


class Items:
    """Pictures of odd sizes."""
    space = CITYSCAPES

    def __init__(self, n=5, sizes=SIZES, seed=0, points=False):
        self.items = [picture(sizes[i % len(sizes)], seed + i) for i in range(n)]
        if points:
            self.items = [(x, torch.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(i)) < .003, y, IGNORE))
                          for i, (x, y) in enumerate(self.items)]
        self.names = [f"photo_{seed}_{i}" for i in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


SOURCE, TARGET = Items(5), Items(4, seed=40)


def alike(a, b):
    """Samples: the same tensors in the same places."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = tuple(a.values()), tuple(b.values())
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            alike(x, y)
    else:
        same((a,), (b,))


def test_source_only():
    cfg = Augment(crop_height=65, crop_width=81)
    a, b = old.source_only_labelled_samples(SOURCE, cfg, 3), labelled(SOURCE, cfg, 3)
    for p in PLACES:
        alike(a(p), b(p))


@pytest.mark.parametrize("strong", [None, jitter])
def test_pbal(strong):
    target = TARGET if strong else Unlabelled(TARGET)
    a = old.pbal_domain_pairs(SOURCE, target, VIEW, 5, strong)
    t = labelled(target, WEAK, 5, "target", jitter) if strong else unlabelled(target, WEAK, 5)
    b = paired(source=labelled(SOURCE, WEAK, 5, colour=jitter), target=t)
    for p in PLACES:
        alike(a(p)["source"], b(p)["source"])
        alike(a(p)["target"][0], b(p)["target"][0])
        if strong:
            alike(a(p), b(p))


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_proda_warm_up(strong, legacy):
    a = old.proda_warm_up_samples(SOURCE, TARGET, Cfg(weak=VIEW, strong_source=strong, legacy_warp=legacy), 6)
    s = labelled(SOURCE, WEAK, 6)
    b = paired(source=strongly(s, 6, strong=partial(rand_augment, legacy=legacy)) if strong else s, target=unlabelled(TARGET, WEAK, 6))
    for p in PLACES:
        alike(a(p)["source"], b(p)["source"])
        alike(a(p)["target"][0], b(p)["target"][0])


class Soft(Items):
    def __getitem__(self, i):
        return self.items[i][0], torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("legacy", [False, True])
def test_proda_stage_1(legacy):
    window = Window(base_width=161, low=.7, high=1.5, crop_height=36, crop_width=92, flip_p=.5)
    soft, size = Soft(4, [(97, 191)]), partial(rand_augment, legacy=legacy)
    cfg = Cfg(shrink=4, weak=weak_of(window), legacy_warp=legacy)
    a = old.proda_denoise_samples(SOURCE, soft, cfg, 7)
    s, t = labelled(SOURCE, window, 7), softly_labelled(soft, window, 7, strong=size)
    b = lambda p: dict(source=s(p)) | t(p)  # noqa: E731
    for p in PLACES:
        alike(a(p), b(p))
    alike(old.proda_collate([a(p) for p in PLACES]), stacked([b(p) for p in PLACES]))


@pytest.mark.parametrize("legacy", [False, True])
def test_proda_distillation(legacy):
    window = Window(base_width=161, low=.7, high=1.5, crop_height=36, crop_width=92, flip_p=.5)
    a = old.proda_distill_samples(SOURCE, TARGET, Cfg(shrink=4, weak=weak_of(window), legacy_warp=legacy), 8)
    b = paired(source=labelled(SOURCE, window, 8), target=pseudo_labelled(TARGET, window, 8, strong=partial(rand_augment, legacy=legacy)))
    for p in PLACES:
        alike(a(p), b(p))


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_iapc(refresh, colour):
    view = old.IAPCView(72, 144, .8, 1.2, 49, 97, 10, 6, .5, colour, 66, 129)
    plain = Window(66, 129, crop_height=49, crop_width=97, resample="bicubic", rows_first=True)
    a = old.iapc_samples(TARGET, view, 9, refresh)
    b = three_viewed(TARGET, IAPC, plain if refresh else None, 9, policy_augment if colour else None)
    for p in PLACES:
        alike(a(p), b(p))


@pytest.mark.parametrize("labels", ["coarse", "point", "image"])
@pytest.mark.parametrize("scope", ["crop", "image"])
@pytest.mark.parametrize("strength", [0., .25])
def test_wdass(labels, scope, strength):
    at = dict(source=replace(WDASS, base_height=80, base_width=161), target=replace(WDASS, base_height=61, base_width=120))
    target = Items(4, seed=20, points=labels == "point")
    cfg = Cfg(labels=labels, image_label_scope=scope, view=replace(wdass_of(at["source"], at["target"]), jitter=strength))
    a = old.wdass_domain_pairs(SOURCE, target, cfg, 10)
    colour = partial(shuffled_jitter, strength=strength) if strength else None
    b = paired(source=labelled(SOURCE, at["source"], 10, colour=colour),
               target=weakly_labelled(target, at["target"], 10, kind=labels, tags_of=scope, colour=colour))
    for p in PLACES:
        alike(a(p), b(p))


def test_wdass_labels_of_another_size_and_no_base():
    class Half(Items):
        def __getitem__(self, i):
            return self.items[i][0], self.items[i][1][::2, ::2]
    a = old.wdass_target_samples(Half(), Cfg(labels="coarse", image_label_scope="crop", view=replace(wdass_of(WDASS), jitter=0.)), 2)
    b = weakly_labelled(Half(), WDASS, 2)
    for p in PLACES:
        alike(a(p), b(p))


@pytest.mark.parametrize("size", [(64, 128), (81, 161)])
def test_pixda(size):
    view, window = old.PixDAView(*size), Window(*size, resample="bicubic")
    a = old.pixda_samples(SOURCE, TARGET, view, 11, "pass_02")
    b = paired(source=labelled(SOURCE, window, 11, "pass_02 source"), target=few_labelled(TARGET, window, 11, "pass_02 target"))
    c = few_labelled(TARGET, window, 11, "distill target")
    for p in PLACES:
        alike(a(p), b(p))
        alike(old.pixda_look_at(*TARGET[uniform_index(p, len(TARGET), 11, "distill target")], view), c(p))


def test_seeds_and_batches_are_todays():
    assert [stage_seed(4, s) for s in ("warm_up", "pst")] == [old.stage_seed(4, s) for s in ("warm_up", "pst")]
    run = Train(steps=5, batch_size=2, device="cpu")
    acc, make = accelerator_for(run), labelled(SOURCE, WEAK, 1)
    for first in (0, 3):
        for a, b in zip(old.source_only_feed_for(make, run, acc)(first), feed(make, run, acc)(first), strict=True):
            alike(a, b)


def test_feed_with_workers_and_ranks():
    class Second:
        process_index, num_processes = 1, 2
    both = paired(source=labelled(SOURCE, WEAK, 1, colour=jitter), target=unlabelled(TARGET, WEAK, 1))
    a = list(feed(both, Train(steps=3, batch_size=2), Second())(1))
    b = list(feed(both, Train(steps=3, batch_size=2, workers=1), Second())(1))
    alike(a, b)
    alike(a[0]["source"][0][0], both(6)["source"][0])


def test_stacked_is_pytorchs_stacking():
    samples = [dict(a=(torch.rand(3, 4), i), b=float(i), c="x") for i in range(3)]
    alike(default_collate(samples), stacked(samples))
    warps = [Warp((4, 6)), Warp((5, 7))]
    assert stacked([dict(warp=w) for w in warps]) == dict(warp=warps)
    with pytest.raises(InputError, match="sizes .*(97, 191).* cannot share a batch; expected one size, or batch_size 1"):
        stacked([dict(full=SOURCE[i][0]) for i in range(3)])


def test_a_stream_names_the_image_that_is_too_small():
    big = Window(crop_height=70, crop_width=10)
    for make in (labelled(SOURCE, big), unlabelled(SOURCE, big), few_labelled(SOURCE, big), weakly_labelled(SOURCE, big)):
        with pytest.raises(InputError, match="photo_0_2: crop_height is 70, but the image is scaled to 63x130"):
            for p in range(20):
                make(p)


def test_unlabelled_never_looks_at_a_label():
    class Blind(Items):
        def __getitem__(self, i):
            return self.items[i][0], None
    make = unlabelled(Blind(), WEAK, 3)
    alike(make(2)[0], labelled(Items(), WEAK, 3, "target")(2)[0])
    assert sorted(make(i)[1] for i in range(5)) == list(range(5))
    assert unlabelled(Blind(), Augment(crop_height=33, crop_width=33), 3)(0)[0].shape == (3, 33, 33)


def test_colours_after_windows_that_make_floats():
    "DIP's `Augment` hands on floats; changes of colour want bytes."
    from protonb.mixing import jitter_of
    from protonb.transforms import Augment
    image, label = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.int64)
    cfg = Augment(crop_height=24, crop_width=32)
    changed, plain = (labelled([(image, label)], cfg, 1, colour=jitter_of(s))(0) for s in (.25, 0.))
    assert changed[0].dtype == torch.uint8 and changed[0].shape == plain[0].shape == (3, 24, 32)
    assert torch.equal(changed[1], plain[1]) and (changed[0].float()-plain[0]).abs().mean() > 1
