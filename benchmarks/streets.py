"""Every method on procedural streets: one network, one budget, several seeds; mIoU on unseen target scenes.

    python benchmarks/streets.py [--seeds 0 1 2] [--out runs/streets] [--only start source_only oracle iapc pbal views wdass pixda]

Each seed trains a start on source scenes. From there everything gets the same number of steps a stage: more source scenes, labelled target scenes (the oracle), and each stage of each
method. Finished stages are kept, stopped ones go on. Rows of streets.csv are written as stages end, with the command that made them; the table over seeds is printed.
"""
import argparse
import copy
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from protonb import iapc, pbal, pixda, source_only, wdass
from protonb.core import atomic_path
from protonb.datasets import take
from protonb.deeplab import pbal_small
from protonb.evaluation import evaluate
from protonb.few_shot import draw_shots
from protonb.labels import CITYSCAPES
from protonb.proda import Distill, distill_round
from protonb.runs import space_to_dict
from protonb.self_training import WeakView, refresh_statistics
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.training import Train, seed_everything
from protonb.transforms import Augment
from protonb.weak_labels import WeakLabels

RESULTS = Path(__file__).resolve().parent/'streets.csv'
KEY = ['stage', 'seed', 'network']
COLUMNS = [*KEY, 'steps', 'batch', 'miou', 'torch', 'date', 'command']
STAGES = ['start', 'adabn', 'source_only', 'oracle', 'iapc', 'pbal', 'views', 'wdass', 'fine_tuning', 'pixda']
KINDS, SHOTS, CITIES = ('image', 'point', 'coarse'), (1, 5), 18
H, W = 97, 193
BATCH, START, STEPS = 4, 1200, 400
LONG = {'start': START, 'adabn': START, 'views of pbal': 5*STEPS}
ABOUT = dict(net='pbal_small', space=space_to_dict(CITYSCAPES))
CROP = Augment(crop_height=H, crop_width=W)

# The released numbers belong to an ImageNet start, crops of half a million pixels and tens of thousands of steps. What is changed for a network of half a million weights that sees
# 400 batches of small scenes, once and for all seeds: learning rates, their schedule's length, the time constants of averages, and window sizes.
VIEW = iapc.IAPCView(base_height=102, base_width=202, crop_height=81, crop_width=161, more_than=8, refresh_height=H, refresh_width=W)
IAPC = iapc.IAPC(lr=.0005, head_factor=1., warm=20, length=STEPS+STEPS//10, ema=.99, entropy=.1, adapt_bn=64, rare_pixels=81*161//32, scales=(1., 1.25, .75), test_height=None, view=VIEW)
WEAK = WeakView(base_width=200, low=.8, high=1.3, crop_height=80, crop_width=160)
PBAL = dict(lr=.1, head_factor=1., max_iter=STEPS+STEPS//10, view=WEAK)
ADVERSARY = dict(disc_width=16)
# A mean over pixels times classes is a nineteenth of a mean over pixels.
DISTILL = Distill(lr=.1, head_factor=1., length=STEPS+STEPS//10, kd=19., mean_std=True, weak=WEAK)

# Weak labels: windows that fit a small scene, a teacher that forgets within the run, and confidences that it reaches.
WINDOW = wdass.WDASSView(0, 0, 0, 0, low=.8, high=1.3, crop_height=80, crop_width=160, jitter=.1)
WDASS = wdass.WDASS(warm=50, alpha=.99, edge=1., lr=.03, head_factor=1., rampup=20, length=STEPS+STEPS//10, view=WINDOW,
                    contrast=wdass.Contrasts(sure=.8, easy=.8), mix=wdass.Mix(threshold=.8, mask_rows=(0, 0)))
# The distillation is a part of the same budget. The discriminator of images soon knows small scenes: the selection is gentler.
PIXDA = pixda.PixDA(lr=.02, threshold=.3, threshold_step=.05, head_factor=1., repeats='one', length=2*STEPS, disc_width=16, bn_group=None, kd_steps=STEPS//4, view=pixda.PixDAView(H, W))


class Bench:
    "The runs of one seed."
    def __init__(self, home, seed, data):
        self.home, self.seed, self.data = Path(home)/f'seed{seed}', seed, data

    def run(self, steps=STEPS): return Train(steps=steps, batch_size=BATCH, seed=self.seed, checkpoint_every=100)

    def fresh(self):
        seed_everything(self.seed, 'init')
        return pbal_small()

    def labelled(self, name, images, net, steps=STEPS):
        "Training on labelled images of either domain."
        cfg = source_only.SourceOnly(lr=.1 if name == 'start' else .03, augment=CROP)
        source_only.train(images, net, cfg, self.run(steps), run_dir=self.home/name, config=ABOUT)
        return net

    def start(self):
        "The common start; trained once."
        net = self.labelled('start', self.data['source'], self.fresh(), START)
        return net.requires_grad_(True)

    def stages(self, name):
        "Title -> network, one after the other."
        net = self.start()
        if name == 'start': yield 'start', net
        elif name == 'source_only': yield name, self.labelled(name, self.data['source'], net)
        elif name == 'oracle': yield name, self.labelled(name, self.data['target'], net)
        elif name == 'adabn': yield name, refresh_statistics(net, self.data['target'])
        elif name == 'iapc': yield name, self.iapc(net)
        elif name == 'pbal': yield from self.pbal(net)
        elif name == 'views': yield 'views of pbal', self.views(net)
        elif name == 'wdass': yield from self.wdass(net)
        elif name in ('fine_tuning', 'pixda'): yield from self.few(name, net)

    def iapc(self, net):
        run_dir = self.home/'iapc'
        labels = iapc.pseudo_labels(self.data['target'], net, IAPC, run_dir=run_dir)
        return iapc.train(labels, net, IAPC, self.run(), run_dir=run_dir, config=ABOUT)['net']

    def pbal(self, net):
        "Each student goes on from its teacher's weights: the released ones start from ImageNet and see 60,000 batches, here 400 would have to teach again what the stages before have."
        s, t, how = self.data['source'], self.data['target'], dict(run_dir=self.home/'pbal', config=ABOUT)
        pbal.warm_up(s, t, net, pbal.WarmUp(**PBAL, **ADVERSARY), self.run(), **how)
        yield 'pbal warm-up', net
        pbal.bpl(s, t, net, pbal.BPL(**PBAL, **ADVERSARY), self.run(), **how)
        yield 'pbal BPL', net
        cfg = pbal.PST(**PBAL, flip=True)
        pbal.pst(s, pbal.make_pseudo(t, net, cfg, self.run(), run_dir=how['run_dir']), net, cfg, self.run(), **how)
        yield 'pbal PST', net
        for i in (1, 2):
            distill_round(s, t, net, copy.deepcopy(net), DISTILL, self.run(), stage=f'distill_{i}', **how)
            yield f'pbal distillation {i}', net
        yield 'pbal distillation 2, AdaBN', refresh_statistics(copy.deepcopy(net), t)

    def views(self, net):
        "What PBAL's windows and colours are worth alone: as many steps as all its stages, no adversary, no prototypes, no pseudo labels; the target passes through the batch norms only."
        cfg = pbal.WarmUp(**PBAL | dict(max_iter=5*PBAL['max_iter']), **ADVERSARY | dict(adversarial=0.))
        pbal.warm_up(self.data['source'], self.data['target'], net, cfg, self.run(LONG['views of pbal']), run_dir=self.home/'views', config=ABOUT)
        return net

    def wdass(self, first):
        for kind in KINDS:
            net = copy.deepcopy(first)
            target = WeakLabels(self.data['target'], kind, seed=self.seed, least=20)
            wdass.train(self.data['source'], target, net, replace(WDASS, labels=kind), self.run(), run_dir=self.home/f'wdass_{kind}', config=ABOUT)
            yield f'wdass {kind}', net
            yield f'wdass {kind}, AdaBN', refresh_statistics(copy.deepcopy(net), self.data['target'])

    def few(self, name, first):
        "The labelled target images are drawn as if the scenes came from so many cities."
        names = list(self.data['target'].names)
        for k in SHOTS:
            net, title = copy.deepcopy(first), f'{name} {k}-shot'
            images = take(self.data['target'], draw_shots(names, k, self.seed, group=lambda n: names.index(n) % CITIES))
            if name == 'fine_tuning': self.labelled(f'fine_tuning_{k}', images, net)
            else: pixda.train(self.data['source'], images, net, PIXDA, self.run(STEPS-PIXDA.kd_steps), run_dir=self.home/f'pixda_{k}', config=ABOUT)
            yield title, net


def read_rows():
    if not RESULTS.exists(): return []
    with open(RESULTS, newline='') as f: return list(csv.DictReader(f))


def write_row(row):
    "Add a row; one of the same stage, seed and network is replaced."
    rows = [r for r in read_rows() if any(str(r[k]) != str(row[k]) for k in KEY)]+[row]
    with atomic_path(RESULTS) as p, open(p, 'w', newline='') as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        out.writeheader()
        out.writerows(rows)


def table(rows):
    "Mean and spread of every stage."
    for stage in dict.fromkeys(r['stage'] for r in rows):
        v = [float(r['miou']) for r in rows if r['stage'] == stage]
        print(f'{stage:24}{statistics.mean(v):6.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}   ' + ' '.join(f'{x:.1f}' for x in v))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=Path('runs')/'streets')
    p.add_argument('--only', nargs='+', choices=STAGES, default=STAGES)
    p.add_argument('--no-write', action='store_true', help='leave streets.csv as it is')
    args = p.parse_args()
    data = dict(source=Streets(SYNTHETIC, 300, size=(H, W), seed=0), target=Streets(REAL, 200, size=(H, W), seed=1), val=Streets(REAL, 60, size=(H, W), seed=2))
    rows = []
    for seed in args.seeds:
        for name in args.only:
            for title, net in Bench(args.out, seed, data).stages(name):
                score = 100*evaluate(source_only.segmenter(net), data['val'], progress=False).miou
                net.train()
                print(f'seed {seed}, {title}: {score:.1f}', flush=True)
                rows.append(dict(stage=title, seed=seed, network=ABOUT['net'], steps=LONG.get(title, STEPS), batch=BATCH, miou=f'{score:.2f}', torch=torch.__version__,
                                 date=time.strftime('%Y-%m-%d'), command='python benchmarks/streets.py'))
                if not args.no_write: write_row(rows[-1])
    table(rows)


if __name__ == '__main__': main()
