"""Every method on procedural streets: one network, one budget, several seeds; mIoU on unseen target scenes.

    python benchmarks/streets.py [--seeds 0 1 2] [--out runs/streets] [--only start source_only joint mixteacher oracle iapc pbal views wdass pixda] [--tuning]

Each seed trains a start on source scenes. From there everything gets the same number of steps a stage: more source scenes, whatever labels there are without any method (the controls), labelled target
scenes (the oracle), and each stage of each method, with the settings of its fitted recipe. Finished stages are kept, stopped ones go on. Settings are chosen with `--tuning`, which scores on scenes of
their own and writes nothing. Rows of streets.csv are written as stages end, with the command that made them; the table over seeds is printed.
"""
import argparse
import copy
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from protonb import methods
from protonb.core import atomic_path
from protonb.datasets import take
from protonb.deeplab import pbal_small
from protonb.evaluation import evaluate
from protonb.feeding import segmenter
from protonb.few_shot import draw_shots
from protonb.labels import CITYSCAPES
from protonb.pseudo_labels import PartlyLabelled, Unlabelled
from protonb.recipes import Situation
from protonb.runs import METHODS, space_to_dict
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.teachers import adapt_statistics
from protonb.training import Train, seed_everything
from protonb.weak_labels import WeakLabels

RESULTS = Path(__file__).resolve().parent/'streets.csv'
KEY = ['stage', 'seed', 'network']
COLUMNS = [*KEY, 'steps', 'batch', 'miou', 'torch', 'date', 'command']
STAGES = ['start', 'adabn', 'source_only', 'oracle', 'iapc', 'pbal', 'views', 'wdass', 'fine_tuning', 'pixda', 'joint', 'mixteacher']
KINDS, SHOTS, CITIES = ('image', 'point', 'coarse'), (1, 5), 18
H, W = 97, 193
BATCH, START, STEPS = 4, 1200, 400
LONG = {'start': START, 'adabn': START, 'views of pbal': 5*STEPS}
ABOUT = dict(net='pbal_small', space=space_to_dict(CITYSCAPES))
TITLES = dict(warm_up='pbal warm-up', bpl='pbal BPL', pst='pbal PST', distill_1='pbal distillation 1', distill_2='pbal distillation 2')


def settings(name):
    "The fitted recipe: a network of half a million weights that sees 400 batches of small scenes, going on from a trained start."
    return METHODS[name].fitted(Situation(STEPS, BATCH, H, W, 19, 200, 'trained', tiny=True))


class Bench:
    "The runs of one seed."
    def __init__(self, home, seed, data):
        self.home, self.seed, self.data = Path(home)/f'seed{seed}', seed, data

    def run(self, steps=STEPS): return Train(steps=steps, batch_size=BATCH, seed=self.seed, checkpoint_every=100)

    def fresh(self):
        seed_everything(self.seed, 'init')
        return pbal_small()

    def train(self, method, folder, net, cfg, source=None, target=None, steps=STEPS, until=''):
        "A method from `net` on; stages go on from each other."
        run = self.run(steps)
        job = methods.Job(METHODS[method], cfg, run, self.home/folder, net, source, target, lambda: copy.deepcopy(net), ABOUT, begin='before')
        return methods.train(job, until)['net']

    def labelled(self, folder, images, net, steps=STEPS):
        "Training on labelled images of either domain."
        cfg = settings('source-only')
        return self.train('source-only', folder, net, replace(cfg, lr=.1) if folder == 'start' else cfg, images, steps=steps)

    def start(self):
        "The common start; trained once."
        return self.labelled('start', self.data['source'], self.fresh(), START).requires_grad_(True)

    def stages(self, name):
        "Title -> network, one after the other."
        net, data = self.start(), self.data
        if name == 'start': yield 'start', net
        elif name == 'source_only': yield name, self.labelled(name, data['source'], net)
        elif name == 'oracle': yield name, self.labelled(name, data['target'], net)
        elif name == 'adabn': yield name, adapt_statistics(net, data['target'])
        elif name == 'iapc': yield name, self.train('iapc', 'iapc', net, settings('iapc'), target=data['target'])
        elif name == 'pbal': yield from self.pbal()
        elif name == 'views': yield 'views of pbal', self.views(net)
        elif name == 'wdass': yield from self.wdass(net)
        elif name in ('fine_tuning', 'pixda'): yield from self.few(name, net)
        elif name in ('joint', 'mixteacher'): yield from self.any(name, net)

    def pbal(self):
        "Stage by stage; what is finished is not trained again."
        for stage, _ in METHODS['pbal'].stages:
            net = self.train('pbal', 'pbal', self.start(), settings('pbal'), self.data['source'], self.data['target'], until=stage)
            yield TITLES[stage], net
        yield 'pbal distillation 2, AdaBN', adapt_statistics(copy.deepcopy(net), self.data['target'])

    def views(self, net):
        "What PBAL's windows and colours are worth alone: as many steps as all its stages, no adversary, no prototypes, no pseudo labels; the target passes through the batch norms only."
        cfg = settings('pbal')
        cfg = replace(cfg, warm_up=replace(cfg.warm_up, adversarial=0., max_iter=5*cfg.warm_up.max_iter))
        return self.train('pbal', 'views', net, cfg, self.data['source'], self.data['target'], LONG['views of pbal'], 'warm_up')

    def wdass(self, first):
        for kind in KINDS:
            target = WeakLabels(self.data['target'], kind, seed=self.seed, least=20)
            net = self.train('wdass', f'wdass_{kind}', copy.deepcopy(first), replace(settings('wdass'), labels=kind), self.data['source'], target)
            yield f'wdass {kind}', net
            yield f'wdass {kind}, AdaBN', adapt_statistics(copy.deepcopy(net), self.data['target'])

    def few(self, name, first):
        "The labelled target images are drawn as if the scenes came from so many cities; the distillation is a part of the same budget."
        cfg = settings('pixda')
        for k in SHOTS:
            net, title = copy.deepcopy(first), f'{name} {k}-shot'
            images = take(self.data['target'], self.drawn(k))
            if name == 'fine_tuning': net = self.labelled(f'fine_tuning_{k}', images, net)
            else: net = self.train('pixda', f'pixda_{k}', net, cfg, self.data['source'], images, STEPS-cfg.kd_steps)
            yield title, net


    def any(self, name, first):
        "Joint training and MixTeacher with every kind of label that they take; of all images they know the labels of the few alone."
        data, cfg = self.data['target'], settings(name)
        kinds = {} if name == 'joint' else dict(none=('none', Unlabelled(data)))
        kinds |= {kind: (kind, WeakLabels(data, kind, seed=self.seed, least=20)) for kind in KINDS if (name, kind) != ('joint', 'image')}
        kinds |= {f'{k}-shot': ('few', PartlyLabelled(data, self.drawn(k))) for k in SHOTS} | dict(full=('full', data))
        for title, (kind, target) in kinds.items():
            yield f'{name} {title}', self.train(name, f'{name}_{title}', copy.deepcopy(first), replace(cfg, labels=kind), self.data['source'], target)

    def drawn(self, k):
        "Positions of k labelled images of each of 18 groups of scenes."
        names = list(self.data['target'].names)
        return draw_shots(names, k, self.seed, group=lambda n: names.index(n) % CITIES)


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
    p.add_argument('--tuning', action='store_true', help='score on the scenes for choosing settings, and leave streets.csv as it is')
    args = p.parse_args()
    data = dict(source=Streets(SYNTHETIC, 300, size=(H, W), seed=0), target=Streets(REAL, 200, size=(H, W), seed=1), val=Streets(REAL, 60, size=(H, W), seed=7 if args.tuning else 2))
    rows = []
    for seed in args.seeds:
        for name in args.only:
            for title, net in Bench(args.out, seed, data).stages(name):
                score = 100*evaluate(segmenter(net), data['val'], progress=False).miou
                net.train()
                print(f'seed {seed}, {title}: {score:.1f}', flush=True)
                rows.append(dict(stage=title, seed=seed, network=ABOUT['net'], steps=LONG.get(title, STEPS), batch=BATCH, miou=f'{score:.2f}', torch=torch.__version__,
                                 date=time.strftime('%Y-%m-%d'), command='python benchmarks/streets.py'))
                if not (args.no_write or args.tuning): write_row(rows[-1])
    table(rows)


if __name__ == '__main__': main()
