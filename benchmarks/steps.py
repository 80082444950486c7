"""What a step of each method costs beside the bare forward and backward passes of its networks.

    python benchmarks/steps.py [--only wdass pixda] [--net mobilenetv2] [--rounds 9] [--threads 2] [--write]

A stage is run up to its first step. Each call of a network in it is noted (which network, which images, with or without a gradient), and then replayed alone: forward, and backward from
a gradient of ones where the step went backward. Step and replay take turns in one process; the ratio is of medians. What is above 1 is losses, averages, the optimizer and the mixing of images.
"""
import argparse
import copy
import csv
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from protonb import methods
from protonb.core import atomic_path
from protonb.deeplab import pbal_mobilenetv2, pbal_small
from protonb.dip_net import dip_mobilenetv2, dip_small
from protonb.labels import CITYSCAPES
from protonb.recipes import Situation
from protonb.runs import METHODS, space_to_dict
from protonb.streets import REAL, SYNTHETIC, Streets
from protonb.training import Train, seed_everything
from protonb.weak_labels import WeakLabels

RESULTS = Path(__file__).resolve().parent/'steps.csv'
COLUMNS = ['method', 'stage', 'net', 'shape', 'device', 'threads', 'step_ms', 'bare_ms', 'ratio', 'torch', 'date', 'command']
H, W, BATCH = 193, 385, 4
NETS = dict(small=(dip_small, pbal_small), mobilenetv2=(dip_mobilenetv2, pbal_mobilenetv2))   # without and with a classifier


class Calls:
    "Notes every call of a whole network: those that no other network's call contains."
    def __enter__(self):
        self.depth, self.seen, hooks = 0, [], nn.modules.module
        self.handles = [hooks.register_module_forward_pre_hook(self.before), hooks.register_module_forward_hook(self.after, with_kwargs=True)]
        return self.seen

    def __exit__(self, *_):
        for h in self.handles: h.remove()

    def before(self, module, args): self.depth += 1

    def after(self, module, args, kwargs, out):
        self.depth -= 1
        if self.depth: return
        first = out[0] if isinstance(out, tuple) else out
        mine = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        self.seen.append((module, mine, kwargs, first.requires_grad))


def replay(calls):
    "The bare passes."
    for module, args, kwargs, learns in calls:
        with torch.set_grad_enabled(learns): out = module(*args, **kwargs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor) and o.requires_grad]
        if outs: torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


def measured(step, batch, rounds):
    "Medians of step and bare passes in milliseconds, taken in turns."
    with Calls() as calls: step(batch)
    times = {step: [], replay: []}
    for i in range(rounds+1):
        for f, x in ((step, batch), (replay, calls)):
            start = time.perf_counter()
            f(x)
            if i: times[f].append(1e3*(time.perf_counter()-start))
    return [statistics.median(t) for t in times.values()]


def stages(m, net, rounds):
    "Each stage of a method: name, milliseconds of a step and of the bare passes."
    size, rows = (H, W), []
    source, target = (Streets(d, 8, size=size) for d in (SYNTHETIC, REAL))
    if m.target == 'weak': target = WeakLabels(target, 'coarse', seed=0, least=20)
    seed_everything(0, 'init')
    net = NETS[net][m.networks != 'features'](num_classes=None if m.networks == 'features' else 19)
    cfg = m.fitted(Situation(400, BATCH, H, W, 19, 8, 'trained', tiny=True))
    if m.name == 'wdass': cfg = replace(cfg, warm=0)

    def fit(step, make_batches, parts, run, *, stage, **_):
        step(batch := next(iter(make_batches(0))))
        step(next(iter(make_batches(0))))                       # past what only a first step does
        rows.append((stage, *measured(step, batch, rounds)))
        return dict(step=run.steps, finished=True)
    return fit, rows, methods.Job(m, cfg, Train(steps=2, batch_size=BATCH if m.name != 'dip' else BATCH//2, device='cpu'), tempfile.mkdtemp(), net,
                                  source, target, lambda: copy.deepcopy(net), dict(net='small', space=space_to_dict(CITYSCAPES)), begin='before', progress=False)


def measure(name, net, rounds):
    "All stages of a method."
    import sys
    fit, rows, job = stages(METHODS[name], net, rounds)
    users = [mod for n, mod in sys.modules.items() if n.startswith('protonb.') and getattr(mod, 'fit', None) is methods.fit]
    real = methods.fit
    for mod in users: mod.fit = fit
    try: methods.train(job)
    finally:
        for mod in users: mod.fit = real
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='+', choices=list(METHODS), default=list(METHODS))
    p.add_argument('--net', choices=list(NETS), default='mobilenetv2')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--write', action='store_true', help='keep the rows in steps.csv')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    made = []
    for name in args.only:
        for stage, step, bare in measure(name, args.net, args.rounds):
            print(f'{name:12} {stage:12} step {step:7.1f} ms   bare passes {bare:7.1f} ms   {step/bare:5.2f}', flush=True)
            made.append(dict(method=name, stage=stage, net=args.net, shape=f'{BATCH}x3x{H}x{W}', device='cpu', threads=args.threads, step_ms=f'{step:.1f}', bare_ms=f'{bare:.1f}',
                             ratio=f'{step/bare:.2f}', torch=torch.__version__, date=time.strftime('%Y-%m-%d'), command=f'python benchmarks/steps.py --net {args.net} --write'))
    if not args.write: return
    rows = list(csv.DictReader(open(RESULTS, newline=''))) if RESULTS.exists() else []
    rows = [r for r in rows if r['method'] not in args.only or r['net'] != args.net or r['threads'] != str(args.threads)] + made
    with atomic_path(RESULTS) as path, open(path, 'w', newline='') as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        out.writeheader()
        out.writerows(rows)


if __name__ == '__main__': main()
