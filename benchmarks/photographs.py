"""Every method on photographs: CARLA (a game engine) -> CamVid; mIoU of the 11 classes on CamVid's validation images.

    python benchmarks/photographs.py DATA [--net pbal_mobilenetv2] [--seeds 0 1 2] [--out runs/photographs] [--only start joint mixteacher ...] [--tuning]

DATA holds carla/, camvid/ and weights/. The protocol is that of benchmarks/streets.py: one start a seed, the same number of steps for everything, the fitted recipes, finished stages are kept and stopped
ones go on. Labelled photographs are drawn from each of CamVid's three training sequences. With `--tuning` the last fifth of each training sequence is kept back and scored on instead of the validation
images, and what was tried goes to tuning.csv.
"""
from pathlib import Path

from protonb.datasets import open_dataset, take
from protonb.few_shot import city_of
from protonb.labels import CAMVID
from streets import Bench, Setup, fill, options, table, with_tries

RESULTS = Path(__file__).resolve().parent/'photographs.csv'
H, W = 273, 361                                  # 8n+1: cells of the feature grid and pixels meet in every corner
VIEW = 185, 241                                    # Windows are cut as if from images of this size: a step costs half as much
UNSEEN = (CAMVID.classes.index('bicyclist'),)     # CARLA has none
WEIGHTS = dict(mobilenetv2='weights/mobilenetv2_imagenet_fp16.safetensors')     # of other backbones: what their package carries


def kept_back(names):
    "Positions of the last fifth of each sequence, and of the rest."
    of = {}
    for i in sorted(range(len(names)), key=lambda i: names[i]): of.setdefault(city_of(names[i]), []).append(i)
    last = {i for members in of.values() for i in members[-(len(members)//5):]}
    return sorted(last), [i for i in range(len(names)) if i not in last]


def images(root, tuning):
    "Source, target and what is scored on."
    form = f'size={H}x{W},cache=true'
    source, target = open_dataset(f'carla:{root}/carla,{form}', 'train', CAMVID), open_dataset(f'camvid:{root}/camvid,{form}', 'train')
    if not tuning: return dict(source=source, target=target, val=open_dataset(f'camvid:{root}/camvid,{form}', 'val'))
    last, rest = kept_back(list(target.names))
    return dict(source=source, target=take(target, rest), val=take(target, last))


def main():
    p = options(__doc__, 'photographs')
    p.add_argument('data', type=Path, help='folder of carla/, camvid/ and weights/')
    p.add_argument('--net', default='pbal_mobilenetv2')
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--start', type=int, default=400, help='steps of the start')
    args = p.parse_args()
    data, file = images(args.data, args.tuning), WEIGHTS.get(args.net.split('_', 1)[1])
    setup = Setup(args.net, *VIEW, CAMVID, args.start, args.steps, 4, len(data['target']), str(args.data/file) if file else 'imagenet', city_of, unseen=UNSEEN)
    setup = with_tries(setup, args)
    path, command = None if args.no_write or args.tuning else RESULTS, f'python benchmarks/photographs.py DATA --net {args.net}' + ' --tuning'*args.tuning
    table([row for seed in args.seeds for row in fill(Bench(args.out/args.net, seed, data, setup, args.kinds), args.only, command, path)])


if __name__ == '__main__': main()
