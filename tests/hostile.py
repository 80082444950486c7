"""What takes minutes and is tried by hand, on the real command line, in a folder of its own:

    python tests/hostile.py race 60        two processes start at once in one folder
    python tests/hostile.py forked 60      the same from one process that has read PyTorch: both begin within milliseconds
    python tests/hostile.py signals 40     SIGTERM or SIGINT at a random moment of any command, then the same command again

Each prints one line per try and ends with what it counted; exit code 1 when one of them was not as it should be."""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import tiny

PROTONB = [sys.executable, "-c", "import sys; from protonb.start import main; sys.exit(main())"]     # as the command does it
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def start(words): return subprocess.Popen([*PROTONB, *map(str, words)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(text):
    """What the command said of itself; progress bars are none of it."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith(("protonb:", "stopped at step"))]


def finish(p):
    """Exit code and what was said."""
    out, err = p.communicate(timeout=300)
    return p.returncode, lines(out) + lines(err), out + err


class Forked:
    """A command in a process of its own that need not read PyTorch again; what `finish` asks of a Popen."""
    def __init__(self, words, name):
        self.files = [Path(f"{name}.{end}") for end in ("out", "err")]
        if pid := os.fork(): self.pid = pid
        else:
            code = 99
            try:
                for fd, file in zip((1, 2), self.files): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
                from protonb.cli import main
                code = main([str(w) for w in words])
            finally: sys.stdout.flush(), sys.stderr.flush(), os._exit(code)

    def communicate(self, timeout=None):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = [f.read_text() for f in self.files]
        for f in self.files: f.unlink()
        return texts


def forked(n):
    """`race` without the seconds of the start."""
    import torch
    import protonb.cli
    torch.set_num_threads(1)
    names = iter(range(10**9))
    globals()["start"] = lambda words: Forked(words, f"fork{next(names)}")
    return race(n)


def race(n):
    """Two at once: one of them runs, the other says so and exits with 2."""
    count = Counter()
    for i in range(n):
        method, out = tiny.METHODS[i % len(tiny.METHODS)], Path(f"race{i}")
        two = [start(tiny.train(method, out)) for _ in range(2)]
        ends = sorted((finish(p) for p in two), key=lambda end: end[0])
        again = finish(start(tiny.train(method, out)))
        # both may run where one was done before the other asked: started at once, they are not
        right = [e[0] for e in ends] == [0, 2] and len(ends[1][1]) == 1 and "another process is writing there" in ends[1][1][0]
        good = right and again[0] == 0 and "Traceback" not in "".join(e[2] for e in ends)
        count["one ran, one refused" if good else "WRONG"] += 1
        if not good: print(i, method, [e[:2] for e in ends], again[:2], flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return count


def commands(i):
    """All that can be stopped: words, folder of the result."""
    run = f"run{i}"
    every = [(tiny.train(m, run), run) for m in tiny.METHODS] + [(words, f"out{i}") for words in tiny.others("start", f"out{i}", "photos").values()]
    return [(w, f) for w, f in every if w[:2] not in (["data", "fewshot"], ["data", "check"])]


def signals(n, seed=0):
    """A signal after a random part of the time that the command takes: 130, one line, and the same bits after the rerun."""
    count, rng, whole, took = Counter(), random.Random(seed), {}, {}
    for k, (words, folder) in enumerate(commands("w")):
        Path("outw").mkdir(exist_ok=True)
        since = time.time()
        assert finish(start(words))[0] == 0, words
        whole[k], took[k] = tiny.bits(folder), time.time()-since
        for f in ("runw", "outw"): shutil.rmtree(f, ignore_errors=True)
    for i in range(n):
        k = i % len(whole)
        words, folder = commands(i)[k]
        Path(f"out{i}").mkdir()
        p, number, wait = start(words), rng.choice([signal.SIGTERM, signal.SIGINT]), rng.uniform(0, took[k])
        time.sleep(wait)
        p.send_signal(number)
        code, said, text = finish(p)
        again = finish(start(words))
        ran = code == 0                                           # it was done before the signal came
        there = words[0] == "data" and ran and again[0] == 2       # a new folder is asked for
        same = tiny.bits(folder) == whole[k] and (again[0] == 0 or there)
        # before Python has read its own modules, a signal ends it as it ends any program
        early = code in (-number, 130) and not said and "Traceback" not in text and wait < 1
        good = same and (ran or (code == 130 and len(said) == 1 and "Traceback" not in text))
        count["ended before the signal" if ran and good else "130, one line, the same bits" if good else "before it began" if early and same else "WRONG"] += 1
        print(i, " ".join(words[:2]), number.name, f"after {wait:.1f} of {took[k]:.1f} s:", code, said, "same bits" if same else "OTHER BITS", flush=True)
        if not (good or early and same): print(text[-1500:], again[:2])
        for f in (f"run{i}", f"out{i}"): shutil.rmtree(f, ignore_errors=True)
    return count


if __name__ == "__main__":
    what, n = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        assert finish(start(tiny.train("source-only", "start", "--net", "iapc_small")))[0] == 0
        Path("photos").mkdir()
        for i in range(20): Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(f"photos/{i}.png")
        count = dict(race=race, forked=forked, signals=signals)[what](n)
        os.chdir("/")
    print(what, dict(count))
    sys.exit("WRONG" in count)
