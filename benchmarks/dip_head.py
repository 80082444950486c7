"""DIP's head and loss, forward and backward, through protonb.ops and in the per-class form.

    python benchmarks/dip_head.py                  # full size: 1024 channels, 129x129, 1025x1025 labels, 12 classes
    python benchmarks/dip_head.py --channels 256 --grid 65

Each form runs in its own process, so that the peak of its memory is its own. Memory is what the process gained over the inputs.

How traversals are counted. Every operation that PyTorch runs is watched (`Traversals`). A read or write counts when the tensor lies in a
storage at least as large as one feature map: the features themselves, their gradients, and every temporary of that size; small tensors
and cache-sized tiles do not. A piece of a map that was touched a moment ago is still in cache: an LRU of `--cache` bytes (32 MiB, two tiles) over the
contiguous pieces stands for it, so a tile read twice in a row counts once, and a whole map never fits. One *traversal* reads one map and may write
one while it does so; the number of traversals is the larger of maps read and maps written, for each image and direction.
"""
import argparse, json, platform, subprocess, sys, time
from collections import OrderedDict
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from protonb.ops import (logits_cross_entropy, masked_average_pool, pool_and_pass, prototype_cross_entropy, prototype_logits)
from protonb.pooling import labels_on_grid

SCALE, SUPPORT_SHARE, POOL_EPS = 20., .2, 5e-4


# ------------------------------------------------------------------------------------------------ three forms of one loss

def head_per_class(features, query_labels, support_labels, num_classes):
    "One class after the other, the way the formula is written: pool, compare, stack."
    query, support = features[:1], features[1:]
    prototypes = []
    for k in range(num_classes):
        mask = F.interpolate((support_labels == k).to(features)[:, None], size=features.shape[2:], mode='bilinear', align_corners=True)
        total = (support*mask).sum((2, 3), keepdim=True)
        prototypes.append(total/(mask.sum()+POOL_EPS))                                   # (1,C,1,1)
    def one_side(f, labels):
        z = torch.stack([F.cosine_similarity(f, p.expand_as(f), dim=1, eps=1e-8) for p in prototypes], 1)*SCALE
        z = F.interpolate(z, size=labels.shape[1:], mode='bilinear', align_corners=True)
        return F.cross_entropy(z, labels, ignore_index=255)
    return one_side(query, query_labels)+SUPPORT_SHARE*one_side(support, support_labels)


def head_ops(features, query_labels, support_labels, num_classes):
    "The same through the four operations, the images cut apart."
    query, support = features.split(1)
    prototypes, _ = masked_average_pool(support, labels_on_grid(support_labels, features.shape[2:]), num_classes, eps=POOL_EPS)
    return (prototype_cross_entropy(query, prototypes, query_labels, scale=SCALE)
            + SUPPORT_SHARE*prototype_cross_entropy(support, prototypes, support_labels, scale=SCALE))


def head_passed(features, query_labels, support_labels, num_classes):
    "The same, the images kept together and the features handed on by the pool."
    grid = labels_on_grid(support_labels, features.shape[2:])
    prototypes, _, features = pool_and_pass(features, grid, num_classes, images=slice(1, 2), eps=POOL_EPS)
    z = prototype_logits(features, prototypes, scale=SCALE)
    return logits_cross_entropy(z[:1], query_labels)+SUPPORT_SHARE*logits_cross_entropy(z[1:], support_labels)


FORMS = dict(per_class=head_per_class, ops=head_ops, passed=head_passed)


# ------------------------------------------------------------------------------------------------ counting

class Traversals(TorchDispatchMode):
    "Counts the maps read and written, cold, by everything that runs inside; per image where an operation shows which."
    def __init__(self, map_shape, cache=32<<20, itemsize=4):
        super().__init__()
        self.C, self.N = map_shape[0], map_shape[1]*map_shape[2]
        self.size, self.cache, self.itemsize = self.C*self.N, cache, itemsize
        self.recent, self.held = OrderedDict(), 0
        self.read, self.written = [0., 0., 0.], [0., 0., 0.]                          # image 0, image 1, can't be told

    def touch(self, t, count):
        "Looks at every contiguous run of a tensor; the runs that are not in cache count."
        storage = t.untyped_storage()
        if storage.nbytes() < self.size*self.itemsize or not t.numel(): return
        axes, run = sorted((s, n) for n, s in zip(t.shape, t.stride()) if s and n > 1), 1
        while axes and axes[0][0] == run: run *= axes.pop(0)[1]
        starts = [t.storage_offset()]
        for s, n in axes: starts = [a+i*s for a in starts for i in range(n)]
        alone = storage.nbytes() < 2*self.size*self.itemsize                              # a map on its own: of which image can't be told
        for a in starts:
            key = storage.data_ptr(), a, run
            if key in self.recent:
                self.recent.move_to_end(key)
                continue
            if run*self.itemsize <= self.cache:
                self.recent[key] = run*self.itemsize
                self.held += run*self.itemsize
            while self.held > self.cache: self.held -= self.recent.popitem(last=False)[1]
            if alone: count[2] += run/self.size
            elif a//self.size == (a+run-1)//self.size: count[a//self.size] += run/self.size
            else:
                for i in (0, 1): count[i] += run/self.size/2

    def forget(self, t):
        "New memory is cold, also where an address is used again."
        for key in [k for k in self.recent if k[0] == t.untyped_storage().data_ptr()]: self.held -= self.recent.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not any(a.alias_info is not None for a in schema.arguments):
            for t in fresh: self.forget(t)
        moves = not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not moves or 'empty' in func.__name__: return out                              # a view, or memory nobody has written yet
        given = {a.name: v for a, v in zip(schema.arguments, args)} | (kwargs or {})
        for a in schema.arguments:
            written = a.alias_info is not None and a.alias_info.is_write
            only_written = written and (a.name == 'out' or func.__name__.split('.')[0] in ('copy_', 'zero_', 'fill_'))
            for t in tree_leaves(given.get(a.name)):
                if not isinstance(t, torch.Tensor): continue
                if not only_written: self.touch(t, self.read)
                if written: self.touch(t, self.written)
        if not any(a.alias_info is not None for a in schema.arguments):
            for t in fresh: self.touch(t, self.written)
        return out

    def traversals(self):
        "Traversals of image 0, of image 1, and of both together divided by two."
        both = max(sum(self.read), sum(self.written))/2
        return [max(r, w) for r, w in zip(self.read[:2], self.written[:2])]+[both]


def count_traversals(form, inputs, cache=32<<20):
    "The traversals of one form, forward and backward: two lists (query, support, mean), and the maps read and written."
    features = inputs[0].detach().requires_grad_()
    fwd, bwd = (Traversals(features.shape[1:], cache, features.itemsize) for _ in range(2))
    with fwd: loss = form(features, *inputs[1:])
    with bwd: loss.backward()
    return fwd, bwd


# ------------------------------------------------------------------------------------------------ running

def make_inputs(channels, grid, classes, seed=0):
    "Features (2,C,n,n) and blocky labels (1,8n-7,8n-7) of both images, about a tenth of them ignored."
    g = torch.Generator().manual_seed(seed)
    size = 8*(grid-1)+1
    def label():
        small = torch.randint(0, classes, (1, 1, size//16+1, size//16+1), generator=g)
        small[torch.rand(small.shape, generator=g) < .1] = 255
        return F.interpolate(small.float(), size=(size, size), mode='nearest')[0].long()
    return torch.randn(2, channels, grid, grid, generator=g), label(), label(), classes


def memory(field):
    "VmRSS (now) or VmHWM (highest so far) of this process in bytes; ru_maxrss would include the parent's."
    line = next(l for l in open('/proc/self/status') if l.startswith(field))
    return int(line.split()[1])*1024


def measure(name, args):
    "Run one form in this process and print a line of JSON."
    torch.set_num_threads(args.threads)
    inputs, form, repeats = make_inputs(args.channels, args.grid, args.classes), FORMS[name], 1 if name == 'per_class' else args.repeats
    if name != 'per_class': form(*(make_inputs(8, 9, 3)))                                  # load the libraries first
    features = inputs[0].requires_grad_()
    before, times = memory('VmRSS'), []
    for _ in range(repeats):
        features.grad = None
        t0 = time.perf_counter()
        loss = form(features, *inputs[1:])
        t1 = time.perf_counter()
        loss.backward()
        times.append((t1-t0, time.perf_counter()-t1))
    peak = memory('VmHWM')
    one_map = features.detach()[0]
    reads = []
    for _ in range(5):
        t0 = time.perf_counter()
        one_map.sum()
        reads.append(time.perf_counter()-t0)
    fwd, bwd = (min(t[i] for t in times) for i in (0, 1))
    print(json.dumps(dict(form=name, loss=loss.item(), grad=features.grad.double().norm().item(), forward=fwd, backward=bwd,
                          gained=peak-before, read=min(reads))))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--channels', type=int, default=1024)
    p.add_argument('--grid', type=int, default=129, help='side of the feature map; labels have 8*(grid-1)+1')
    p.add_argument('--classes', type=int, default=12)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--cache', type=int, default=32<<20, help='bytes a piece of a map may stay warm in')
    p.add_argument('--form', choices=list(FORMS), help='run one form in this process')
    args = p.parse_args()
    if args.form: return measure(args.form, args)
    flags = [f'--{k}={getattr(args, k)}' for k in ('channels', 'grid', 'classes', 'repeats', 'threads')]
    print(f'C={args.channels} {args.grid}x{args.grid}, labels {8*args.grid-7}x{8*args.grid-7}, K={args.classes}; '
          f'torch {torch.__version__}, {args.threads} threads, {platform.machine()}')
    print(f'{"form":10}{"forward":>9}{"backward":>10}{"memory":>11}{"time/read":>11}   traversals per image: forward, backward')
    rows = {}
    for name, form in FORMS.items():
        line = subprocess.run([sys.executable, __file__, *flags, f'--form={name}'], check=True, stdout=subprocess.PIPE, text=True)
        r = rows[name] = json.loads(line.stdout.splitlines()[-1])
        # without tiles the size makes no difference, only memory
        small = name == 'per_class'
        fwd, bwd = count_traversals(form, make_inputs(*(64, 33) if small else (args.channels, args.grid), args.classes), 0 if small else args.cache)
        (fq, fs, fm), (bq, bs, bm) = fwd.traversals(), bwd.traversals()
        each = f'   (query {fq:.2f} and {bq:.2f}, support {fs:.2f} and {bs:.2f})' if name == 'passed' else ''
        print(f'{name:10}{r["forward"]:7.2f} s{r["backward"]:8.2f} s{r["gained"]/1e9:8.2f} GB{(r["forward"]+r["backward"])/r["read"]:11.0f}'
              f'   {fm:.2f}, {bm:.2f}{each}', flush=True)
        if name == 'passed':
            for c, way in ((fwd, 'forward'), (bwd, 'backward')):
                assert max(c.traversals()) <= 2.01, f'{way}: {c.traversals()} traversals, want at most 2 for each image'
    for name in ('ops', 'passed'):
        for what in ('loss', 'grad'):
            a, b = rows[name][what], rows['per_class'][what]
            assert abs(a-b) <= 1e-6*abs(b) if what == 'loss' else abs(a-b) <= 1e-5*abs(b), f'{name}: {what} {a}, per class {b}'
    print(f'loss {rows["passed"]["loss"]:.8f} and per class {rows["per_class"]["loss"]:.8f}; one read of one map {rows["passed"]["read"]*1e3:.1f} ms')


if __name__ == '__main__': main()
