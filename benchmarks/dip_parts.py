"""Why DIP stands below half and half on the demo's streets: one thing at a time, on the scenes for choosing settings (Streets(REAL, 60, seed=7)).

    python benchmarks/dip_parts.py --out runs/dip_parts [--seeds 0 1 2]

Everything is as in `protonb demo`: 800 steps on the source, from there 400 steps of four images with the same 21 labelled target images. A stopped one goes on with the same command; rows go to dip_parts.csv.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from protonb.evaluation import evaluate
from protonb.feeding import segmenter
from protonb.pages import DEMO, Demo, demo_data, demo_job
from protonb.prototypes import class_prototypes
from protonb.runs import build_net, open_run, start_from
from protonb.streets import REAL, Streets
from protonb.transforms import Augment
from rows import read_rows, replace_row

RESULTS = Path(__file__).resolve().parent/'dip_parts.csv'
COLUMNS = ['seed', 'entry', 'steps', 'miou', 'accuracy', 'torch', 'date']
SIZE = dict(crop_height=97, crop_width=193)
# Name -> (times the steps, settings instead of the recipe's); the recipe's rate is .1 for this network.
VARIANTS = {
    'DIP': (1, {}),
    'DIP, four times the steps': (4, {}),
    'DIP, rate x 3': (1, dict(lr=.3)),
    'DIP, rate / 3': (1, dict(lr=.03)),
    'DIP, no loss of the support images (lambda 0)': (1, dict(lambda_support=0.)),
    'DIP, three times that loss (lambda 3)': (1, dict(lambda_support=3.)),
    'DIP, no turning, no blur': (1, dict(augment=Augment(rotate_p=0., blur_p=0., **SIZE))),
    'DIP, factor 10 instead of 20': (1, dict(scale=10.)),
}


def row(seed, entry, steps, segment, scenes):
    "Score a network and write it down."
    s = evaluate(segment, scenes, progress=False)
    values = dict(seed=seed, entry=entry, steps=steps, miou=f'{100*s.miou:.2f}', accuracy=f'{100*s.accuracy:.2f}', torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    replace_row(RESULTS, values, ('seed', 'entry'), COLUMNS)
    print(f'seed {seed}  {entry}: {100*s.miou:.1f}', flush=True)


def with_prototypes(run, images, K):
    "The run's network, beside prototypes of other images."
    return segmenter(run.net, run.feed, class_prototypes(run.net, images, K))


def one_seed(o, seed, data, scenes):
    "All rows of a seed."
    home, K = o.out/f'seed{seed}', data['source'].space.num_classes
    net = lambda k: build_net('dip_small', k, seed=seed)
    done = {r['entry'] for r in read_rows(RESULTS) if r['seed'] == str(seed)}
    def trained(entry, name, folder, source, target=None, steps=o.steps, begin=True, **settings):
        if entry in done: return
        first = net(None if name == 'dip' else K)
        demo_job(o, seed, name, home/folder, start_from(first, home/'start') if begin else first, source, target, steps=steps, **settings)
        row(seed, entry, steps, open_run(home/folder).segment, scenes)
    trained('source only', 'source-only', 'start', data['source'], steps=o.start, begin=False)
    trained('half and half', 'joint', 'half_and_half', data['source'], data['support'])
    trained('half and half, four times the steps', 'joint', 'half_and_half4', data['source'], data['support'], steps=4*o.steps)
    for i, (entry, (times, settings)) in enumerate(VARIANTS.items()):
        trained(entry, 'dip', f'dip{i}', data['source'], data['support'], steps=times*o.steps, **settings)
    if 'the start, prototypes of the 21 images, nothing trained' in done: return
    start = replace(open_run(home/'start'), net=start_from(net(None), home/'start').eval())
    row(seed, 'the start, prototypes of the 21 images, nothing trained', 0, with_prototypes(start, data['support'], DEMO['shots']), scenes)
    row(seed, 'DIP, prototypes of all 200 labelled target images', o.steps, with_prototypes(open_run(home/'dip0'), data['target'], 200), scenes)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    o = Demo(a.out)
    data, scenes = demo_data(o), Streets(REAL, 60, size=(o.height, o.width), seed=7)
    for seed in a.seeds: one_seed(o, seed, data, scenes)


if __name__ == '__main__': main()
