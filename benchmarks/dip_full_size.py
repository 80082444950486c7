"""The exact DIP network on a CPU: one real training step at crop 1025 and the prediction of a 1024x2048 frame, time and memory.

    python benchmarks/dip_full_size.py              both, each in a process of its own; about five minutes and 20 GB

Scenes are procedural and weights are random: neither changes time or memory.
"""
import argparse
import json
import resource
import subprocess
import sys
import time


def scenes(height, width, count=2):
    from protonb.streets import REAL, SYNTHETIC, Streets
    return [Streets(domain, count, size=(height, width)) for domain in (SYNTHETIC, REAL)]


def train():
    """One episode: query and support at 1025x1025, forward, backward, update."""
    import torch
    from protonb import dip
    from protonb.dip_net import dip_resnet101, freeze
    from protonb.optimization import make_optimizer, parameter_groups, polynomial, schedule
    from protonb.sampling import batches
    cfg = dip.DIP()
    source, target = scenes(1052, 1914)
    net = freeze(dip_resnet101(), cfg.freeze).train().to(memory_format=torch.channels_last)
    opt = make_optimizer("sgd", parameter_groups(net, cfg.lr, weight_decay=cfg.weight_decay), cfg.lr)
    sched = schedule(opt, polynomial(100, cfg.power, ahead=1))
    before = {k: v.clone() for k, v in net.state_dict().items() if k in ("layer2.0.conv1.weight", "projector.6.weight")}
    batch = next(iter(batches(dip.episodes(source, target, cfg), steps=1)))
    start = time.time()
    logs = dip.step(net, opt, sched, batch, cfg)
    seconds = time.time() - start
    assert all(v.isfinite() for v in logs.values()), logs
    assert all((net.state_dict()[k] != v).any() for k, v in before.items()), "the step changed nothing"
    return dict(what="training step, 2 x 1025x1025", seconds=round(seconds, 1), loss=round(logs["loss"].item(), 3))


def predict():
    """One frame of 1024x2048 through network, prototypes, upsampling and argmax."""
    import torch
    from protonb.dip_net import dip_resnet101
    from protonb.evaluation import label_map
    from protonb.feeding import segmenter
    from protonb.prototypes import Prototypes
    _, target = scenes(1024, 2048, 1)
    torch.manual_seed(0)
    net = dip_resnet101().to(memory_format=torch.channels_last)
    prototypes = Prototypes(torch.randn(19, 1024), torch.ones(19, dtype=torch.int64), target.space.classes, {})
    segment = segmenter(net, prototypes=prototypes)
    image = target[0][0]
    start = time.time()
    labels = label_map(segment, image)
    seconds = time.time() - start
    assert labels.shape == (1024, 2048) and labels.max() < 19
    return dict(what="prediction, 1024x2048", seconds=round(seconds, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["train", "predict"], help="run one part in this process")
    args = parser.parse_args()
    if args.part:
        row = dict(train=train, predict=predict)[args.part]()
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
        print(json.dumps(row))
        return
    for part in ("predict", "train"):
        done = subprocess.run([sys.executable, __file__, part], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{part} failed: {done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{row['what']:32} {row['seconds']:7.1f} s   peak {row['peak_gb']:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
