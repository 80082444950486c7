"""One harness for all operations: `make bench` on a CPU, `make bench-gpu` on a GPU. Needs torch, triton, numpy and pytest, no installation.

    python benchmarks/bench.py [--device cuda] [--only pooling ...] [--quick] [--no-write]

An operation is one entry of `ENTRIES` in entries.py: how to make its inputs, in which shapes, who computes it (ours and the peers), the bytes that have to be moved and the
floating-point operations that have to be done. Before an entry is timed its tests run, in the same call; without a pass there is no row. Before a peer is timed its loss and
gradients are compared with ours. The peers take turns, one run each, so that a busy moment of the machine hits all of them.
On a CPU each provider has a process of its own.

A row of results.csv: median and 20/80 % quantiles in ms; GB/s counts compulsory bytes only, per cent of the copy rate measured in the same run (over 100 % is possible
where everything fits into a cache); TFLOP/s counts useful operations, per cent of a matrix product measured in the same run; extra_MB is the most memory held at any moment beyond
the inputs and the results (loss and gradients). On a GPU the L2 cache is flushed before each run, and what takes under 50 us is replayed from a CUDA graph (`how` says so;
`launch_ms` is the time with the launches).
"""
import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'benchmarks')]

import torch  # noqa: E402
from entries import ENTRIES, GOALS  # noqa: E402

RESULTS = ROOT/'benchmarks'/'results.csv'
COLUMNS = ('op provider mode shape dtype layout device threads median_ms p20_ms p80_ms how launch_ms GB_s copy_pct TFLOP_s matmul_pct extra_MB '
           'copy_GB_s matmul_TFLOP_s torch triton python commit date command').split()
SLOW = 1000                                           # ms: what takes longer is run as rarely as possible
KEY = 'op provider mode shape dtype layout device threads torch'.split()      # a row replaces an older one of the same key


# ------------------------------------------------------------------------------------------------ the machine

def device_name(device):
    "What the numbers were measured on."
    if device == 'cuda': return torch.cuda.get_device_name()
    for line in open('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else ():
        if line.startswith('model name'): return ' '.join(line.split(':', 1)[1].split())
    return platform.processor() or platform.machine()


def commit():
    "The commit, with a plus sign when files differ from it."
    def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short', 'HEAD')+('+' if git('status', '--porcelain', '--untracked-files=no') else '')


def version(package):
    from importlib import metadata
    try: return metadata.version(package)
    except metadata.PackageNotFoundError: return ''


# ------------------------------------------------------------------------------------------------ time and memory

class Timer:
    "Times a function: wall clock on a CPU; on a GPU events around it, with the L2 cache flushed before."
    def __init__(self, device):
        self.device = device
        if device == 'cuda': self.flusher = torch.empty(256<<20, dtype=torch.uint8, device=device)

    def once(self, f):
        "Milliseconds of one run."
        if isinstance(f, Remote): return f()
        if self.device == 'cpu':
            start = time.perf_counter()
            f()
            return 1e3*(time.perf_counter()-start)
        self.flusher.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        f()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def graphed(self, f):
        "The same work as one replay of a CUDA graph."
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): f()
        return graph.replay


def brief(error): return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:100]}'


def results_of(run):
    "Milliseconds of a first run, and what it gave or why it gave nothing; as bytes, because shared memory may be small."
    start, out = time.perf_counter(), io.BytesIO()
    try: made = run()
    except Exception as e: made = brief(e)
    took = 1e3*(time.perf_counter()-start)
    torch.save(made, out)
    return took, out.getvalue()


class Worker:
    "A process of its own for one provider: the heap that one leaves behind decides how often the next one faults pages in."
    def __init__(self, entry, case, name, device):
        self.pipe, child = multiprocessing.get_context('fork').Pipe()
        self.process = multiprocessing.get_context('fork').Process(target=self.serve, args=(child, entry, case, name, device), daemon=True)
        self.process.start()
        child.close()                                             # else nobody would notice the end of the process

    @staticmethod
    def serve(pipe, entry, case, name, device):
        inputs, provider, timer = entry.inputs(case, device), entry.providers(case, device)[name], Timer(device)
        runs, last, kept = {mode: entry.runner(provider, inputs, mode) for mode in entry.modes}, {}, {}
        while (order := pipe.recv()) is not None:
            what, mode = order
            if what == 'results':
                last[mode], made = results_of(runs[mode])
                if last[mode] > SLOW: kept[mode] = [last[mode]]   # where runs take seconds these two count
                pipe.send(made)
                del made
            elif what == 'extra':
                start, extra = time.perf_counter(), extra_bytes(runs[mode], device)
                if mode in kept: kept[mode].append(1e3*(time.perf_counter()-start))
                pipe.send(extra)
            elif kept.get(mode): pipe.send(kept[mode].pop(0))
            else:
                end = time.perf_counter()+.03                     # caches, threads and clock are back from what the others did
                while last[mode] < 200 and time.perf_counter() < end: last[mode] = timer.once(runs[mode])
                last[mode] = timer.once(runs[mode])
                pipe.send(last[mode])

    def ask(self, *order):
        try:
            self.pipe.send(order)
            return self.pipe.recv()
        except (EOFError, OSError): raise RuntimeError('the process died') from None

    def stop(self):
        with contextlib.suppress(OSError): self.pipe.send(None)  # it may be dead
        self.process.join()


class Remote:
    "One run in a worker."
    def __init__(self, worker, mode): self.worker, self.mode = worker, mode
    def __call__(self): return self.worker.ask('time', self.mode)

    def results(self):
        "What the run computes; the libraries are loaded and the memory is mapped from here on."
        out = torch.load(io.BytesIO(self.worker.ask('results', self.mode)))
        if isinstance(out, str): raise RuntimeError(out)
        return out


def in_process(f, *args):
    "The result of a function that ran in a process of its own."
    here, there = multiprocessing.get_context('fork').Pipe()
    def run():
        try: there.send((f(*args), None))
        except Exception as e: there.send((None, f'{type(e).__name__}: {e}'))
    p = multiprocessing.get_context('fork').Process(target=run)
    p.start()
    there.close()
    try: result, error = here.recv()
    except EOFError: result, error = None, 'the process died'
    p.join()
    if error: raise RuntimeError(error)
    return result


def in_turns(timer, runs, seconds, most=200):
    "Times of each run (name -> list of ms), taken in turns until the seconds are used up; slow ones less often, but three times (twice where a run takes seconds)."
    first = {}
    for n, f in runs.items():
        if not isinstance(f, Remote): f()                         # libraries load, memory is mapped, compilers compile
        first[n] = timer.once(f)
    times = {n: [t] if t > SLOW else [] for n, t in first.items()}
    budget, end = 1e3*seconds/max(1, len(runs)), time.time()+seconds
    least = {n: 2 if t > SLOW else 3 for n, t in first.items()}
    rounds = {n: max(least[n], min(most, int(budget/max(t, 1e-3)))) for n, t in first.items()}
    for r in range(max(rounds.values())):
        for n, f in runs.items():
            if r*rounds[n]//max(rounds.values()) >= len(times[n]) and len(times[n]) < rounds[n] and (time.time() < end or len(times[n]) < least[n]):
                times[n].append(timer.once(f))
    return times


@contextlib.contextmanager
def quiet():
    "Keeps what C++ code prints to stderr off the screen: the profiler reports each start and stop."
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try: yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nothing)


def extra_bytes(f, device):
    "The most memory that a run holds at any moment beyond its inputs and results; `f` returns its results."
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()-before-result_bytes(out)
    from torch.profiler import ProfilerActivity, profile
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: out = f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]' and e.device_type() == torch.autograd.DeviceType.CPU)
    held = peak = 0
    for _, n in events:
        held += n
        peak = max(peak, held)
    return peak-result_bytes(out)


def result_bytes(out):
    "Bytes of the distinct storages of the results."
    tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def ceilings(timer):
    "Copy rate in GB/s (read and write counted) and matrix rate in TFLOP/s, of this machine, now."
    gpu = timer.device == 'cuda'
    a = torch.randn((1<<30 if gpu else 128<<20)//4, device=timer.device)
    b = torch.empty_like(a)
    copy = 2*a.nbytes/statistics.median(in_turns(timer, dict(c=lambda: b.copy_(a)), 1.)['c'])/1e6
    a = b = None
    n = 8192 if gpu else 2048
    x = torch.randn(2, n, n, device=timer.device, dtype=torch.bfloat16 if gpu else torch.float32)
    product = 2*n**3/statistics.median(in_turns(timer, dict(m=lambda: x[0]@x[1]), 1.)['m'])/1e9
    return copy, product


# ------------------------------------------------------------------------------------------------ running an entry

def tests_pass(entry, device):
    "Run the tests of an operation; True when they pass."
    files = entry.gpu_tests if device == 'cuda' else entry.cpu_tests
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='2'))
    last = (done.stdout.strip() or done.stderr.strip() or 'nothing printed').splitlines()[-1]
    print(f'{entry.name}: tests {last}', flush=True)
    if done.returncode: print(done.stdout[-3000:])
    return done.returncode == 0


@contextlib.contextmanager
def one_thread():
    "No pool of threads comes into being: a process that is forked later would wait for threads it does not have."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)


def agree(name, results, truth, tolerance):
    "A peer that computes something else is no peer."
    for i, (a, b) in enumerate(zip(results, truth)):
        if a is None or b is None: continue
        if not a.is_floating_point(): error, of = (a != b).double().mean(), 'of the pixels'
        else: error, of = (a.double()-b.double()).abs().max()/b.double().abs().max().clamp(min=1e-12), 'of the largest value'
        if not error <= tolerance: raise AssertionError(f'{name}: result {i} is off by {error:.1e} {of}, allowed {tolerance:.0e}')


def compared(entry, case, runs):
    "The runs of `runs` (mode and provider -> function that returns the results) that work here; each has been compared with ours."
    able, truth = [], {}
    for (mode, name), run in runs.items():
        try: out = run()
        except Exception as e:                                      # a peer may lack memory, a shape or a package; ours may not
            if name == 'ours': raise
            print(f'  {name}: left out, {brief(e)}', flush=True)
            continue
        out = list(out) if isinstance(out, (tuple, list)) else [out]
        if name == 'ours': truth[mode] = out
        else: agree(f'{entry.name} {name} {mode}', out, truth[mode], entry.tolerance(case, name))
        able.append((mode, name))
    return able


def measure(entry, case, timer, args, rates, isolate=False):
    "Rows of one case: every provider, forward and both directions; each in a process of its own where asked."
    rows, device = [], timer.device
    providers = entry.providers(case, device)
    if isolate:
        workers = {n: Worker(entry, case, n, device) for n in providers}
        runs = {(m, n): Remote(workers[n], m) for m in entry.modes for n in providers}
        with one_thread(): runs = {k: runs[k] for k in compared(entry, case, {k: f.results for k, f in runs.items()})}
        kept = {(m, n): workers[n].ask('extra', m) for m, n in runs}
    else:
        workers, inputs = {}, entry.inputs(case, device)
        runs = {(m, n): entry.runner(f, inputs, m) for m in entry.modes for n, f in providers.items()}
        runs = {k: runs[k] for k in compared(entry, case, runs)}
        kept = {k: extra_bytes(f, device) for k, f in runs.items()}
    times = in_turns(timer, runs, args.seconds)
    for (mode, n), ms in times.items():
        how, launch = 'eager', ''
        q = statistics.quantiles(ms, n=5, method='inclusive')
        med = statistics.median(ms)
        if timer.device == 'cuda' and med < .2:                     # launches dominate: replay, and see what the GPU itself takes
            try:
                replay = timer.graphed(runs[mode, n])
                again = in_turns(timer, dict(g=replay), args.seconds/len(times))['g']
                if statistics.median(again) < .05:
                    launch, how, med, q = f'{med:.4f}', 'graph', statistics.median(again), statistics.quantiles(again, n=5, method='inclusive')
            except Exception as e: print(f'  {n}: no graph, {type(e).__name__}')
        move, work = entry.bytes(case, mode), entry.flops(case, mode)
        gbs, tflops = move/med/1e6, work/med/1e9
        rows.append(dict(op=entry.name, provider=n, mode=mode, shape=case['shape'], dtype=str(case['dtype'])[6:], layout=case.get('layout', 'nchw'),
            median_ms=f'{med:.4f}', p20_ms=f'{q[0]:.4f}', p80_ms=f'{q[3]:.4f}', how=how, launch_ms=launch, GB_s=f'{gbs:.1f}', copy_pct=f'{100*gbs/rates[0]:.0f}',
            TFLOP_s=f'{tflops:.3f}', matmul_pct=f'{100*tflops/rates[1]:.0f}', extra_MB=f'{kept[mode, n]/1e6:.2f}'))
    for w in workers.values(): w.stop()
    return rows


def show(rows):
    "One line a provider: time, rates, memory, and how many times slower than ours."
    for mode in dict.fromkeys(r['mode'] for r in rows):
        ours = next(float(r['median_ms']) for r in rows if r['mode'] == mode and r['provider'] == 'ours')
        for r in (r for r in rows if r['mode'] == mode):
            print(f'  {mode:9}{r["provider"]:28}{float(r["median_ms"]):10.3f} ms ({float(r["p20_ms"]):.3f}..{float(r["p80_ms"]):.3f}) {float(r["GB_s"]):8.1f} GB/s {r["copy_pct"]:>4}%'
                  f'{float(r["TFLOP_s"]):8.3f} TFLOP/s {r["matmul_pct"]:>4}% {float(r["extra_MB"]):9.2f} MB extra {float(r["median_ms"])/ours:8.2f}x  {r["how"]}')


# ------------------------------------------------------------------------------------------------ writing and judging

def read_rows(path=RESULTS):
    if not path.exists(): return []
    with open(path, newline='') as f: return list(csv.DictReader(f))


def write_rows(new, path=RESULTS):
    "Add rows; a row of the same key is replaced. Written beside and renamed."
    def key(r): return tuple(str(r[k]) for k in KEY)
    fresh = {key(r) for r in new}
    rows = [r for r in read_rows(path) if key(r) not in fresh]+[{c: r.get(c, '') for c in COLUMNS} for r in new]
    beside = path.with_name(path.name+'.tmp')
    with open(beside, 'w', newline='') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    beside.replace(path)


def missed(rows, goals=GOALS):
    "The goals these rows miss, in words; goals without rows are not judged."
    out = []
    for g in goals:
        mine = {r['provider']: r for r in rows if r['op'] == g['op']
                and r['mode'] == g['mode'] and r['shape'] == g['shape'] and r['dtype'] == 'float32' and r['layout'] == 'nchw'}
        if 'ours' not in mine: continue
        ours = float(mine['ours']['median_ms'])
        for peer, times in g.get('faster', {}).items():
            ratio = float(mine[peer]['median_ms'])/ours if peer in mine else float('nan')
            print(f'goal {g["op"]} {g["shape"]}: {ratio:.2f} times faster than {peer}, wanted {times}')
            if not ratio >= times: out.append(f'{g["op"]} is {ratio:.2f} times faster than {peer}, wanted {times}')
        if 'extra_MB' in g:
            extra = float(mine['ours']['extra_MB'])
            print(f'goal {g["op"]} {g["shape"]}: {extra:.2f} MB extra, wanted below {g["extra_MB"]}')
            if not extra < g['extra_MB']: out.append(f'{g["op"]} holds {extra:.2f} MB extra, wanted below {g["extra_MB"]}')
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    p.add_argument('--only', nargs='*', help='these entries, by name')
    p.add_argument('--quick', action='store_true', help='tiny shapes and no goals, to see that everything runs')
    p.add_argument('--seconds', type=float, help='time for each case')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--no-write', action='store_true', help='leave results.csv as it is')
    p.add_argument('--no-tests', action='store_true', help='skip the tests; no row is written then')
    args = p.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available(): sys.exit('--device cuda: PyTorch sees no GPU')
    args.seconds = args.seconds or (.2 if args.quick else 1.2)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision('highest')
    timer = Timer(args.device)
    isolate = args.device == 'cpu'                     # on a GPU PyTorch's own allocator keeps what is freed
    rates = in_process(ceilings, timer) if isolate else ceilings(timer)
    about = dict(device=device_name(args.device), threads=args.threads if args.device == 'cpu' else '', torch=torch.__version__, triton=version('triton'),
        python=platform.python_version(), commit=commit(), date=time.strftime('%Y-%m-%d'), copy_GB_s=f'{rates[0]:.1f}', matmul_TFLOP_s=f'{rates[1]:.3f}',
        command=' '.join(['python', 'benchmarks/bench.py', *sys.argv[1:]]))
    print(f'{about["device"]}, {args.threads} threads, torch {about["torch"]}, triton {about["triton"]}: copy {rates[0]:.1f} GB/s, matrix product {rates[1]:.3f} TFLOP/s')
    failed, judged, goals, entries = [], [], GOALS, ENTRIES
    if args.device == 'cpu':                           # needs the library's own requirements, so not where a bare checkout has to do
        from methods import GOALS as METHOD_GOALS, METHODS
        entries, goals = ENTRIES+METHODS, GOALS+METHOD_GOALS
    if odd := set(args.only or ())-{e.name for e in entries}: sys.exit(f'--only: {", ".join(sorted(odd))} unknown; there are {", ".join(e.name for e in entries)}')
    for entry in entries:
        if args.only and entry.name not in args.only: continue
        if not args.no_tests and not tests_pass(entry, args.device):
            failed.append(f'{entry.name}: its tests fail, not measured')
            continue
        for case in entry.cases(args.device, args.quick):
            print(f'{entry.name} {case["shape"]} {str(case["dtype"])[6:]} {case.get("layout", "")}', flush=True)
            rows = [about | r for r in measure(entry, case, timer, args, rates, isolate)]
            show(rows)
            judged += rows
            if not args.no_write and not args.no_tests and not args.quick: write_rows(rows)
    failed += missed(judged, goals) if args.device == 'cpu' and not args.quick else []
    sys.exit('\n'.join(failed) if failed else 0)


if __name__ == '__main__': main()
