"""Every method on procedural streets: one network, one budget, several seeds; mIoU on unseen target scenes.

    python benchmarks/streets.py [--seeds 0 1 2] [--out runs/streets] [--only start source_only joint mixteacher oracle iapc pbal views wdass pixda] [--tuning [--try tau=.6]]

Each seed trains a start on source scenes. From there everything gets the same number of steps a stage: more source scenes, whatever labels there are without any method (the controls), labelled target
scenes (the oracle), and each stage of each method, with the settings of its fitted recipe. Finished stages are kept, stopped ones go on. Settings are chosen with `--tuning`, which scores on scenes of
their own and writes what was tried to tuning.csv. Rows of streets.csv are written as stages end, with the command that made them; the table over seeds is printed.
"""
import argparse
import copy
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from protonb import methods
from protonb.datasets import take
from protonb.evaluation import evaluate
from protonb.feeding import segmenter
from protonb.few_shot import draw_shots
from protonb.labels import CITYSCAPES, ClassSpace
from protonb.plans import with_settings
from protonb.pseudo_labels import PartlyLabelled, Unlabelled
from protonb.recipes import Situation, flat
from protonb.runs import METHODS, build_net, space_to_dict
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.teachers import adapt_statistics
from protonb.training import Train
from protonb.weak_labels import WeakLabels
from rows import replace_row

RESULTS = Path(__file__).resolve().parent/'streets.csv'
KEY = ['stage', 'seed', 'network']
COLUMNS = [*KEY, 'steps', 'batch', 'miou', 'seen', 'accuracy', 'torch', 'date', 'command']
STAGES = ['start', 'adabn', 'source_only', 'oracle', 'iapc', 'pbal', 'views', 'proda', 'wdass', 'fine_tuning', 'pixda', 'joint', 'mixteacher']
KINDS, SHOTS, CITIES = ('image', 'point', 'coarse'), (1, 5), 18
TITLES = dict(warm_up='warm-up', bpl='BPL', pst='PST', distill_1='distillation 1', distill_2='distillation 2')



@dataclass(frozen=True)
class Setup:
    "What all runs of a table have in common."
    net: str = 'pbal_small'       # Key of NETWORKS
    height: int = 97              # Of the images in pixels
    width: int = 193
    space: ClassSpace = CITYSCAPES
    start: int = 4800             # Steps of the start: on the tuning scenes 2400 gave 40.9, 4800 43.7, 9600 42.2
    steps: int = 400              # Steps of everything else
    batch: int = 4                # Images a step and domain
    images: int = 200             # Of the target
    weights: str | None = None    # What the start begins with; None: nothing
    group: object = lambda name: int(name.rsplit('_', 1)[-1]) % CITIES   # Name -> group of which k images are labelled
    tries: tuple = ()             # (setting, value) that are tried instead of the recipe's; those of the start are called start.setting
    unseen: tuple = ()            # Classes that the source does not show

    def settings(self, name, start='trained'):
        "The fitted recipe: all that a method is told of the images, the length of the run and where it starts."
        steps = self.steps if start == 'trained' else self.start
        cfg = METHODS[name].fitted(Situation(steps, self.batch, self.height, self.width, self.space.num_classes, self.images, start, self.net.endswith('_small')))
        tries = {k: v for k, v in self.tries if not k.startswith('start.')} if start == 'trained' else self.start_tries
        known = flat(cfg)
        cfg = with_settings(cfg, {k: type(known[k])(v) for k, v in tries.items() if k in known})
        rates = {k: v for k, v in flat(cfg).items() if k.split('.')[-1] == 'lr'}      # also of a method's stages; discriminators keep theirs
        return with_settings(cfg, {k: float(tries.get('rate', 1))*v for k, v in rates.items()})

    @property
    def start_tries(self): return {k[6:]: v for k, v in self.tries if k.startswith('start.')}

    def length(self, title): return self.start if title in ('start', 'adabn') else 5*self.steps if title == 'views of pbal' else self.steps

    @property
    def about(self): return dict(net=self.net, space=space_to_dict(self.space))


class Bench:
    "The runs of one seed."
    def __init__(self, home, seed, data, setup=Setup(), kinds=None):
        self.home = Path(home)/(f'seed{seed}' + ''.join(f',{k}={v}' for k, v in setup.start_tries.items()))
        self.seed, self.data, self.setup, self.kinds = seed, data, setup, kinds

    def run(self, steps): return Train(steps=steps, batch_size=self.setup.batch, seed=self.seed, checkpoint_every=100)

    def fresh(self): return build_net(self.setup.net, self.setup.space.num_classes, self.setup.weights, self.seed)

    def settings(self, name): return self.setup.settings(name)

    def train(self, method, folder, net, cfg, source=None, target=None, steps=None, until=''):
        "A method from `net` on; stages go on from each other."
        run = self.run(steps or self.setup.steps)
        if folder != 'start': folder += ''.join(f',{k}={v}' for k, v in self.setup.tries if not k.startswith('start.'))
        job = methods.Job(METHODS[method], cfg, run, self.home/folder, net, source, target, lambda: copy.deepcopy(net), self.setup.about, begin='before')
        done = methods.train(job, until)
        if not done['finished']: raise SystemExit(f'{job.run_dir}: stopped at step {done["step"]}; the same command goes on there')
        return done['net']

    def labelled(self, folder, images, net): return self.train('source-only', folder, net, self.settings('source-only'), images)

    def start(self):
        "The common start; trained once."
        cfg = self.setup.settings('source-only', 'imagenet' if self.setup.weights else 'nothing')
        return self.train('source-only', 'start', self.fresh(), cfg, self.data['source'], steps=self.setup.start).requires_grad_(True)

    def stages(self, name):
        "Title -> network, one after the other."
        net, data = self.start(), self.data
        if name == 'start': yield 'start', net
        elif name == 'source_only':
            net = self.train('source-only', name, net, self.settings('source-only'), data['source'])
            yield name, net
            yield f'{name}, AdaBN', adapt_statistics(net, data['target'])
        elif name == 'oracle': yield name, self.labelled(name, data['target'], net)
        elif name == 'adabn': yield name, adapt_statistics(net, data['target'])
        elif name == 'iapc':
            net = self.train('iapc', 'iapc', net, self.settings('iapc'), target=data['target'])
            yield name, net
            yield f'{name}, AdaBN', adapt_statistics(copy.deepcopy(net), data['target'])
        elif name in ('pbal', 'proda'): yield from self.staged(name)
        elif name == 'views': yield 'views of pbal', self.views(net)
        elif name == 'wdass': yield from self.wdass(net)
        elif name in ('fine_tuning', 'pixda'): yield from self.few(name, net)
        elif name in ('joint', 'mixteacher'): yield from self.any(name, net)

    def staged(self, name):
        "Stage by stage; what is finished is not trained again."
        for stage, _ in METHODS[name].stages:
            net = self.train(name, name, self.start(), self.settings(name), self.data['source'], self.data['target'], until=stage)
            if isinstance(net, torch.nn.Module): yield f'{name} {TITLES.get(stage, stage)}', net
        yield f'{name} {TITLES.get(stage, stage)}, AdaBN', adapt_statistics(copy.deepcopy(net), self.data['target'])

    def views(self, net):
        "What PBAL's windows and colours are worth alone: as many steps as all its stages, no adversary, no prototypes, no pseudo labels; the target passes through the batch norms only."
        cfg = self.settings('pbal')
        cfg = replace(cfg, warm_up=replace(cfg.warm_up, adversarial=0., max_iter=5*cfg.warm_up.max_iter))
        return self.train('pbal', 'views', net, cfg, self.data['source'], self.data['target'], self.setup.length('views of pbal'), 'warm_up')

    def wdass(self, first):
        for kind in (k for k in KINDS if not self.kinds or k in self.kinds):
            target = WeakLabels(self.data['target'], kind, seed=self.seed, least=20)
            net = self.train('wdass', f'wdass_{kind}', copy.deepcopy(first), replace(self.settings('wdass'), labels=kind), self.data['source'], target)
            yield f'wdass {kind}', net
            yield f'wdass {kind}, AdaBN', adapt_statistics(copy.deepcopy(net), self.data['target'])

    def few(self, name, first):
        "The labelled target images are drawn as if the scenes came from so many cities; the distillation is a part of the same budget."
        cfg = self.settings('pixda')
        for k in SHOTS:
            net, title = copy.deepcopy(first), f'{name} {k}-shot'
            images = take(self.data['target'], self.drawn(k))
            if name == 'fine_tuning': net = self.labelled(f'fine_tuning_{k}', images, net)
            else: net = self.train('pixda', f'pixda_{k}', net, cfg, self.data['source'], images, self.setup.steps-cfg.kd_steps)
            yield title, net


    def any(self, name, first):
        "Joint training and MixTeacher with every kind of label that they take; of all images they know the labels of the few alone."
        data, cfg = self.data['target'], self.settings(name)
        kinds = {} if name == 'joint' else dict(none=('none', Unlabelled(data)))
        kinds |= {kind: (kind, WeakLabels(data, kind, seed=self.seed, least=20)) for kind in KINDS if (name, kind) != ('joint', 'image')}
        kinds |= {f'{k}-shot': ('few', PartlyLabelled(data, self.drawn(k))) for k in SHOTS} | dict(full=('full', data))
        for title, (kind, target) in kinds.items():
            if self.kinds and title not in self.kinds: continue
            yield f'{name} {title}', self.train(name, f'{name}_{title}', copy.deepcopy(first), replace(cfg, labels=kind), self.data['source'], target)

    def drawn(self, k):
        "Positions of k labelled images of each group of scenes."
        return draw_shots(list(self.data['target'].names), k, self.seed, group=self.setup.group)


def write_row(path, row):
    "Add a row; one of the same stage, seed and network is replaced."
    replace_row(path, row, KEY, COLUMNS)


def table(rows):
    "Mean and standard error of every stage, and its share of the way from the start to the oracle."
    value = {(r['stage'], r['seed']): float(r['miou']) for r in rows}
    for stage in dict.fromkeys(r['stage'] for r in rows):
        seeds = [s for t, s in value if t == stage]
        v = [value[stage, s] for s in seeds]
        way = [(value[stage, s]-value['start', s])/(value['oracle', s]-value['start', s]) for s in seeds if ('start', s) in value and ('oracle', s) in value]
        error = statistics.stdev(v)/len(v)**.5 if len(v) > 1 else 0
        print(f'{stage:28}{statistics.mean(v):6.1f} ± {error:.1f}   {f"{statistics.mean(way):6.0%}" if way else "":8}' + ' '.join(f'{x:.1f}' for x in v))


def fill(bench, names, command, path=None):
    "Train and score; rows, written to `path` as they come."
    rows, setup = [], bench.setup
    for name in names:
        for title, net in bench.stages(name):
            scores = evaluate(segmenter(net), bench.data['val'], progress=False)
            net.train()
            print(f'seed {bench.seed}, {title}: {100*scores.miou:.1f}', flush=True)
            seen = scores.iou[[k for k in range(setup.space.num_classes) if k not in setup.unseen]].nanmean().item()
            rows.append(dict(stage=title, seed=bench.seed, network=setup.net, steps=setup.length(title), batch=setup.batch, miou=f'{100*scores.miou:.2f}',
                             seen=f'{100*seen:.2f}', accuracy=f'{100*scores.accuracy:.2f}', torch=torch.__version__, date=time.strftime('%Y-%m-%d'), command=command))
            if path: write_row(path, rows[-1])
            if command.endswith('--tuning'): note_try(bench, rows[-1])
    return rows


def note_try(bench, row):
    "Everything that was tried on the images for choosing settings is written down."
    tried = ' '.join(f'{k}={v}' for k, v in bench.setup.tries)
    columns = ['stage', 'seed', 'network', 'settings', 'start', 'steps', 'miou', 'seen', 'accuracy', 'date', 'command']
    told = row | dict(settings=tried, start=bench.setup.start)
    replace_row(RESULTS.with_name('tuning.csv'), {c: told[c] for c in columns}, columns[:6], columns)


def options(about, home):
    p = argparse.ArgumentParser(description=about.split('\n')[0])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=Path('runs')/home)
    p.add_argument('--only', nargs='+', choices=STAGES, default=STAGES)
    p.add_argument('--no-write', action='store_true', help='leave the table as it is')
    p.add_argument('--tuning', action='store_true', help='score on the images for choosing settings; rows go to tuning.csv instead of the table')
    p.add_argument('--try', dest='tries', nargs='+', default=[], metavar='SETTING=VALUE', help='with --tuning: values instead of those of the recipe, rate=F for all learning rates times F, start.SETTING for the start, start.steps for its length')
    p.add_argument('--kinds', nargs='+', help='of joint, mixteacher and wdass: only these kinds of label, e.g. none coarse 1-shot')
    return p


def with_tries(setup, args):
    "The setup with what `--try` says; `start.steps` is the length of the start."
    if args.tries and not args.tuning: raise SystemExit('--try is for choosing settings; expected --tuning beside it')
    setup = replace(setup, tries=tuple(tuple(t.split('=', 1)) for t in args.tries))
    return replace(setup, start=int(setup.start_tries.get('steps', setup.start)))


def main():
    args, size = options(__doc__, 'streets').parse_args(), (Setup.height, Setup.width)
    data = dict(source=Streets(SYNTHETIC, 300, size=size, seed=0), target=Streets(REAL, 200, size=size, seed=1),
                val=Streets(REAL, 60, size=size, seed=7) if args.tuning else Streets(REAL, 100, size=size, seed=11))
    path, command = None if args.no_write or args.tuning else RESULTS, 'python benchmarks/streets.py' + ' --tuning'*args.tuning
    setup = with_tries(Setup(), args)
    table([row for seed in args.seeds for row in fill(Bench(args.out, seed, data, setup, args.kinds), args.only, command, path)])


if __name__ == '__main__': main()
