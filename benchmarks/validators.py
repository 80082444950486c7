"""What scores without labels are worth: every validator on the target's training images beside the true mIoU on scenes that no run has seen.

    python benchmarks/validators.py RUNS... [--images 32] [--pixels 16384] [--again]

RUNS are run folders, or folders in which some lie, as those of streets.toml (97x193, Cityscapes' classes). Each checkpoint that is kept is a row of validators.csv, written as it comes; checkpoints that have a
row already are left out without `--again`. A run is called by its path below the folder that was named. nbs/04_learning/19_validators.ipynb reads the rows.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from protonb.runs import open_run
from protonb.streets import REAL, Streets
from protonb.training import checkpoints
from protonb.validation import rows_of
from protonb.validators import VALIDATORS, rank_correlation, regret
from rows import read_rows, replace_row

RESULTS = Path(__file__).resolve().parent/'validators.csv'
COLUMNS = ['group', 'run', 'stage', 'step', *VALIDATORS, 'miou', 'torch', 'date', 'command']
SIZE = 97, 193


def runs_below(path):
    "Run folders at or below a path, and what to call them."
    path = Path(path)
    found = sorted(p.parent for p in path.rglob('config.json') if (p.parent/'checkpoints').is_dir())
    if not found: sys.exit(f'{path}: no run folder in it; expected the folder of a run, with config.json and checkpoints')
    return [(p, p.relative_to(path).as_posix() if p != path else path.name) for p in found]


def table(rows):
    "Rank correlation and regret of every validator, over all rows that have it."
    print(f'{"validator":14}{"rows":>6}{"correlation":>13}{"regret":>8}')
    for name in VALIDATORS:
        mine = [(float(r[name]), float(r['miou'])) for r in rows if r[name]]
        if len(mine) > 1: print(f'{name:14}{len(mine):6}{rank_correlation(*zip(*mine)):13.2f}{regret(*zip(*mine)):8.1f}')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('runs', nargs='+')
    p.add_argument('--images', type=int, default=32, help='of the target, evenly spread over its 200')
    p.add_argument('--pixels', type=int, default=16384)
    p.add_argument('--out', type=Path, default=RESULTS)
    p.add_argument('--again', action='store_true', help='also what has a row already')
    args = p.parse_args()
    torch.set_num_threads(1)
    target, scenes = Streets(REAL, 200, size=SIZE, seed=1), Streets(REAL, 60, size=SIZE, seed=7)
    about = dict(torch=torch.__version__, date=time.strftime('%Y-%m-%d'), command=f'python benchmarks/validators.py RUNS --images {args.images} --pixels {args.pixels}')
    for path, name in (found for folder in args.runs for found in runs_below(folder)):
        run = open_run(path)
        known = {r['step'] for r in read_rows(args.out) if (r['run'], r['stage']) == (name, run.method)}
        if not args.again and {str(t) for t, _ in checkpoints(path, run.method)} <= known: continue
        for row in rows_of(run, target, scenes, every=True, images=args.images, pixels=args.pixels):
            row = {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} | about | dict(run=name, group=name.split('/')[-1].split(',')[0].split('_')[0])
            replace_row(args.out, {c: row.get(c, '') for c in COLUMNS}, ('run', 'stage', 'step'), COLUMNS, ordered=True)      # one of the same run, stage and step goes
            print(name, row['step'], *(f'{k} {row[k]}' for k in (*VALIDATORS, 'miou') if k in row), flush=True)
    table(read_rows(args.out))


if __name__ == '__main__': main()
