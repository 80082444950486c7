"""The memory and time of a WDASS step: three backward passes, one graph at a time, beside one backward pass through three graphs at once.

    python benchmarks/wdass_step.py            the exact network at 512x512, batch 1, on a CPU: about four minutes and 10 GB
    python benchmarks/wdass_step.py --quick    a small network, to see that it runs; no goals

Every measurement has a process of its own. Memory is the largest amount the step adds to what was there before it; while it is measured, what is freed goes back to the system at once, for otherwise the holes in
the C library's heap would be counted. Time is measured with the heap as it is, in turns. Scenes are procedural and weights random: neither changes time or memory.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

WAYS = 'one at a time', 'three at once'
GOALS = dict(memory=.45, seconds=1.05)
NO_HOLES = dict(MALLOC_MMAP_THRESHOLD_=str(2**20), MALLOC_TRIM_THRESHOLD_='0')      # of glibc


def inputs(quick):
    "Networks, optimiser and a batch of coarse labels, past the warm-up: every loss counts."
    import torch
    from dataclasses import replace
    from protonb import wdass
    from protonb.deeplabv2 import wdass_resnet101, wdass_small
    from protonb.sampling import batches
    from protonb.streets import REAL, SYNTHETIC, Streets
    from protonb.training import seed_everything
    from protonb.weak_labels import WeakLabels
    from protonb.weighted_prototypes import PrototypeMemory
    size = 128 if quick else 512
    cfg = wdass.WDASS(labels='coarse', warm=-1, source_height=0, source_width=0)
    cfg = replace(cfg, window=replace(cfg.window, base_height=0, base_width=0, low=1., high=1., crop_height=size, crop_width=size))
    source, target = (Streets(d, 2, size=(size, 2*size)) for d in (SYNTHETIC, REAL))
    seed_everything(0, 'init')
    net = (wdass_small if quick else wdass_resnet101)().train().to(memory_format=torch.channels_last)
    teacher = wdass.slow_copy(net, cfg).to(memory_format=torch.channels_last)
    opt, sched = wdass.sgd_and_schedule(net, cfg)
    batch = next(iter(batches(wdass.weak_pairs(source, WeakLabels(target, 'coarse'), cfg), steps=1)))
    return (net, teacher, PrototypeMemory(net.num_classes, net.channels), opt, sched, batch, cfg)


def at_once(student, teacher, memory, opt, sched, batch, cfg):
    "The same step with all three graphs kept until one backward pass."
    import torch
    from protonb import wdass
    from protonb.core import rng_for
    source, (x, weak, tags), n = batch['source'], batch['target'], sched.last_epoch
    rng = rng_for(0, 'wdass', n)
    generator = torch.Generator(x.device).manual_seed(int(rng.integers(2**62)))
    if n: wdass.update_average(teacher, student, cfg.alpha, statistics=True)
    predictions = wdass.teacher_predictions(teacher, x, weak, cfg)
    wdass.update_memory(memory, 'target', predictions.features, weak, predictions.cells, cfg)
    opt.zero_grad(set_to_none=True)
    terms = [wdass.target_terms(student, memory, x, weak, tags, cfg, False, generator),
             wdass.source_terms(student, memory, source, weak, predictions, cfg, False, generator),
             wdass.mixed_terms(student, wdass.mixed_batch(source, x, predictions, cfg, rng, generator))]
    parts = []
    for t in terms: wdass.add_gradients(t, cfg, parts.append)
    sum(parts).backward()
    opt.step()
    sched.step()
    return {k: v for t, _ in terms for k, v in t.items()}


def resident():
    "Bytes of this process that are in memory now."
    pages = Path('/proc/self/statm').read_text().split()[1]
    return int(pages)*resource.getpagesize()


def measure(way, quick, steps):
    "Seconds of the steps after the first, and the memory they need."
    from protonb import wdass
    args = inputs(quick)
    before, times = resident(), []
    for _ in range(steps):
        start = time.perf_counter()
        losses = wdass.step(*args) if way == WAYS[0] else at_once(*args)
        times.append(time.perf_counter()-start)
        assert all(v.isfinite() for v in losses.values()), losses
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    return dict(way=way, seconds=min(times), memory=peak-before, peak=peak)


def found(way, args, steps, **env):
    "What a process of its own measures."
    command = [sys.executable, __file__, '--way', way, '--steps', str(steps), *['--quick']*args.quick]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    if done.returncode: sys.exit(f'{way} failed: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='a small network at 128x128, no goals')
    p.add_argument('--steps', type=int, default=2, help='steps of a process that measures time; the fastest counts')
    p.add_argument('--rounds', type=int, default=1, help='processes that measure the time of each way, in turns')
    p.add_argument('--way', choices=WAYS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.quick, args.steps)))
        return 0
    best = {way: found(way, args, 1, **NO_HOLES) for way in WAYS}
    times = [[found(way, args, args.steps)['seconds'] for way in WAYS] for _ in range(args.rounds)]
    for way, seconds in zip(WAYS, zip(*times)): best[way]['seconds'] = min(seconds)
    for way, r in best.items():
        print(f'{way:16}{r["seconds"]:7.2f} s   {r["memory"]/2**30:6.2f} GiB more than before   {r["peak"]/2**30:6.2f} GiB in all')
    missed = []
    for what, most in GOALS.items():
        ratio = best[WAYS[0]][what]/best[WAYS[1]][what]
        print(f'{what}: {ratio:.3f} times the other, wanted at most {most}')
        if ratio > most: missed.append(what)
    return 1 if missed and not args.quick else 0


if __name__ == '__main__': sys.exit(main())
