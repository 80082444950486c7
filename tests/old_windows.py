"""How each method drew its windows and made its samples before there was one window: the reference of the tests."""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from protonb.colour import jitter, policy_augment, rand_augment, warp_labels
from protonb.core import InputError, rng_for
from protonb.few_shot import uniform_index
from protonb.labels import IGNORE
from protonb.mixing import shuffled_jitter
from protonb.sampling import batches, shuffled_index
from protonb.transforms import augment, resize_image, resize_label
from protonb.weak_labels import image_tags


def check_window(cfg):
    pass


@dataclass
class WeakView:
    base_width: int = 2200
    low: float = 0.5
    high: float = 1.5
    crop_height: int = 512
    crop_width: int = 896
    flip_p: float = 0.5


@dataclass(frozen=True)
class Geometry:
    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool

    def box(self, H, W):
        sx, sy = (W / self.width, H / self.height)
        return (self.left * sx, self.top * sy, (self.left + self.crop_width) * sx, (self.top + self.crop_height) * sy)


def draw_geometry(size, rng, cfg):
    H, W = size
    width = int(rng.uniform(cfg.low, cfg.high) * cfg.base_width)
    height = int(width * H / W)
    if height < cfg.crop_height:
        raise InputError(f'crop_height is {cfg.crop_height}, but an image of {H}x{W} scaled to width {width} is only {height} high')
    left, top = (int(rng.integers(0, width - cfg.crop_width + 1)), int(rng.integers(0, height - cfg.crop_height + 1)))
    return Geometry(height, width, top, left, cfg.crop_height, cfg.crop_width, bool(rng.random() < cfg.flip_p))


def cut(image, label, g):
    H, W = image.shape[1:]
    image = resize_image(image, (g.crop_height, g.crop_width), box=g.box(H, W))
    if label is not None:
        rows, cols = (((a + torch.arange(n) + 0.5) * N / whole).long().clamp(max=N - 1)
                      for a, n, N, whole in ((g.top, g.crop_height, H, g.height), (g.left, g.crop_width, W, g.width)))
        label = label[rows[:, None], cols]
    return tuple((None if t is None else t.flip(-1) if g.flip else t for t in (image, label)))


def weak_view(image, label, rng, cfg):
    g = draw_geometry(image.shape[1:], rng, cfg)
    return (*cut(image, label, g), g)


def weak_samples(dataset, cfg, seed=0, stream='source', strong=None):

    def make(position):
        rng = rng_for(seed, stream, position)
        image, label = dataset[shuffled_index(position, len(dataset), seed, stream)]
        image, label, _ = weak_view(image, label, rng, cfg)
        return (image if strong is None else strong(image, rng), label)
    return make


def stage_seed(seed, stage):
    return int(rng_for(seed, 'stage', stage).integers(2 ** 31))


@dataclass
class IAPCView:
    base_height: int = 640
    base_width: int = 1280
    low: float = 0.8
    high: float = 1.2
    crop_height: int = 256
    crop_width: int = 512
    tries: int = 10
    more_than: int = 10
    flip_p: float = 0.5
    colour: bool = True
    refresh_height: int = 512
    refresh_width: int = 1024


def iapc_draw_window(label, rng, cfg):
    for _ in range(cfg.tries):
        left, top = (int(rng.integers(0, n - c + 1)) for n, c in zip(label.shape[::-1], (cfg.crop_width, cfg.crop_height)))
        if len(label[top:top + cfg.crop_height, left:left + cfg.crop_width].unique()) > cfg.more_than:
            break
    return (top, left)


def iapc_three_views(image, label, rng, cfg):
    s, (ch, cw), (bh, bw) = (rng.uniform(cfg.low, cfg.high), (cfg.crop_height, cfg.crop_width), (cfg.base_height, cfg.base_width))
    h, w = (round(bh * s), round(bw * s))
    plain, label = (resize_image(image, (h, w), Image.Resampling.BICUBIC), resize_label(label, (h, w)))
    top, left = iapc_draw_window(label, rng, cfg)
    colour = policy_augment(plain, rng) if cfg.colour else plain
    t, l = (top * (bh - ch) // max(h - ch, 1), left * (bw - cw) // max(w - cw, 1))
    base = resize_image(image, (bh, bw), Image.Resampling.BICUBIC)[:, t:t + ch, l:l + cw]
    here = (slice(top, top + ch), slice(left, left + cw))
    views = dict(base=base, plain=plain[:, *here], colour=colour[:, *here], label=label[here])
    mirror = rng.random() < cfg.flip_p
    return {k: v.flip(-1) if mirror else v for k, v in views.items()}


def iapc_samples(dataset, cfg, seed=0, refresh=True):
    size = (cfg.refresh_height, cfg.refresh_width)

    def make(position):
        rng = rng_for(seed, 'iapc', position)
        views = iapc_three_views(*dataset[shuffled_index(position, len(dataset), seed, 'target')], rng, cfg)
        if not refresh:
            return views
        other, _ = dataset[shuffled_index(position, len(dataset), seed, 'refresh')]
        other = resize_image(other, size, Image.Resampling.BICUBIC)
        top, left = (int(rng.integers(0, n - c + 1)) for n, c in zip(size, (cfg.crop_height, cfg.crop_width)))
        return views | dict(refresh=other[:, top:top + cfg.crop_height, left:left + cfg.crop_width])
    return make


@dataclass
class WDASSView:
    source_height: int = 720
    source_width: int = 1280
    target_height: int = 512
    target_width: int = 1024
    low: float = 0.5
    high: float = 2.0
    crop_height: int = 512
    crop_width: int = 512
    flip_p: float = 0.5
    jitter: float = 0.25


def wdass_to_base(image, label, size, points=False):
    size = size or tuple(image.shape[1:])
    if size != tuple(image.shape[1:]):
        image = resize_image(image, size)
    if size == tuple(label.shape):
        return (image, label)
    if not points:
        return (image, resize_label(label, size, centred=True))
    (i, j), (H, W) = (torch.where(label != IGNORE), label.shape)
    moved = torch.full(size, IGNORE)
    moved[i * size[0] // H, j * size[1] // W] = label[i, j]
    return (image, moved)


def wdass_window(image, label, rng, cfg):
    H, W = label.shape
    s = rng.uniform(cfg.low, cfg.high)
    sizes, crop = ((max(1, int(H * s)), max(1, int(W * s))), (cfg.crop_height, cfg.crop_width))
    pads = [(m - n) // 2 + 1 if n < m else 0 for n, m in zip(sizes, crop)]
    first = [int(rng.integers(0, n + 2 * p - m + 1)) - p for n, m, p in zip(sizes, crop, pads)]
    (a, b), (c, d) = ((max(t, 0), min(t + m, n)) for t, m, n in zip(first, crop, sizes))
    y, x = (H / sizes[0], W / sizes[1])
    image = resize_image(image, (b - a, d - c), Image.Resampling.BICUBIC, box=(c * x, a * y, d * x, b * y))
    rows, cols = ((2 * torch.arange(*span) + 1) * N // (2 * n) for span, N, n in zip(((a, b), (c, d)), (H, W), sizes))
    frame = (c - first[1], first[1] + crop[1] - d, a - first[0], first[0] + crop[0] - b)
    image, label = (F.pad(image, frame), F.pad(label[rows[:, None], cols], frame, value=IGNORE))
    return (image.flip(-1), label.flip(-1)) if rng.random() < cfg.flip_p else (image, label)


def wdass_source_samples(dataset, cfg, seed=0):
    v = cfg.view

    def make(position):
        rng, i = (rng_for(seed, 'source', position), shuffled_index(position, len(dataset), seed, 'source'))
        image, label = wdass_to_base(*dataset[i], (v.source_height, v.source_width) if v.source_height else None)
        image, label = wdass_window(image, label, rng, v)
        return (shuffled_jitter(image, rng, v.jitter) if v.jitter else image, label)
    return make


def wdass_target_samples(dataset, cfg, seed=0):
    v, K = (cfg.view, dataset.space.num_classes)

    def make(position):
        rng, i = (rng_for(seed, 'target', position), shuffled_index(position, len(dataset), seed, 'target'))
        image, weak = wdass_to_base(*dataset[i], (v.target_height, v.target_width) if v.target_height else None, cfg.labels == 'point')
        whole = weak
        image, weak = wdass_window(image, weak, rng, v)
        tags = image_tags(weak if cfg.image_label_scope == 'crop' else whole, K)
        if cfg.labels == 'image':
            weak = torch.full_like(weak, IGNORE)
        return (shuffled_jitter(image, rng, v.jitter) if v.jitter else image, weak, tags)
    return make


def wdass_domain_pairs(source, target, cfg, seed=0):
    s, t = (wdass_source_samples(source, cfg, seed), wdass_target_samples(target, cfg, seed))
    return lambda position: dict(source=s(position), target=t(position))


@dataclass
class PixDAView:
    height: int = 512
    width: int = 1024


def pixda_look_at(image, label, view):
    size = (view.height, view.width)
    if tuple(label.shape) == size:
        return (image, label)
    small = Image.fromarray(label.byte().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    return (resize_image(image, size, Image.Resampling.BICUBIC), torch.from_numpy(np.array(small)).long())


def pixda_samples(source, target, view, seed=0, stage='pass_01'):

    def make(position):
        s = source[shuffled_index(position, len(source), seed, f'{stage} source')]
        t = target[uniform_index(position, len(target), seed, f'{stage} target')]
        return dict(source=pixda_look_at(*s, view), target=pixda_look_at(*t, view))
    return make


def proda_view_tensor(g):
    return torch.tensor([g.height, g.width, g.top, g.left, g.flip])


def proda_warm_up_samples(source, target, cfg, seed=0):
    a, b = (weak_samples(d, cfg.weak, seed, name) for d, name in ((source, 'source'), (target, 'target')))

    def make(position):
        image, label = a(position)
        if cfg.strong_source:
            image, warp = rand_augment(image, rng_for(seed, 'strong source', position), legacy=cfg.legacy_warp)
            label = warp_labels(label, warp)
        return dict(source=(image, label), target=(b(position)[0],) * 2)
    return make


def proda_denoise_samples(source, target, cfg, seed=0):
    check_window(cfg)
    a = weak_samples(source, cfg.weak, seed, 'source')

    def make(position):
        rng = rng_for(seed, 'target', position)
        full, soft = target[shuffled_index(position, len(target), seed, 'target')]
        weak, _, g = weak_view(full, None, rng, cfg.weak)
        strong, warp = rand_augment(weak, rng, legacy=cfg.legacy_warp)
        return dict(source=a(position), weak=weak, strong=strong, full=full, soft=soft, view=proda_view_tensor(g), warp=warp)
    return make


def proda_collate(samples):
    sizes = {tuple(s['full'].shape[1:]) for s in samples}
    if len(sizes) > 1:
        raise InputError(f'target images of sizes {sorted(sizes)} cannot share a batch; expected one size, or batch_size 1')
    made = torch.utils.data.default_collate([{k: v for k, v in s.items() if k != 'warp'} for s in samples])
    return dict(made, warp=[s['warp'] for s in samples])


def proda_strong_samples(dataset, cfg, seed=0):
    check_window(cfg)

    def make(position):
        rng = rng_for(seed, 'target', position)
        image, label = dataset[shuffled_index(position, len(dataset), seed, 'target')]
        image, label, _ = weak_view(image, label, rng, cfg.weak)
        image, warp = rand_augment(image, rng, legacy=cfg.legacy_warp)
        return (image, warp_labels(label[::cfg.shrink, ::cfg.shrink].contiguous(), warp))
    return make


def proda_distill_samples(source, target, cfg, seed=0):
    a, b = (weak_samples(source, cfg.weak, seed, 'source'), proda_strong_samples(target, cfg, seed))
    return lambda position: dict(source=a(position), target=b(position))


def pbal_domain_pairs(source, target, view, seed=0, strong=None):
    s = weak_samples(source, view, seed, 'source', jitter)
    t = weak_samples(target, view, seed, 'target', strong)
    return lambda position: dict(source=s(position), target=t(position))


def source_only_labelled_samples(dataset, cfg, seed=0, stream='source'):

    def make(position):
        i = shuffled_index(position, len(dataset), seed, stream)
        return augment(*dataset[i], rng_for(seed, stream, position), cfg)
    return make


def source_only_feed_for(make, run, acc):
    return lambda first: batches(make, steps=run.steps, batch_size=run.batch_size, first_step=first, workers=run.workers,
                                 rank=acc.process_index, world=acc.num_processes)
