"""What takes minutes and is tried by hand, on the real command line, in a folder of its own:

    python tests/hostile.py race 60        two processes start at once in one folder
    python tests/hostile.py forked 60      the same from one process that has read PyTorch: both begin within milliseconds
    python tests/hostile.py signals 40     SIGTERM or SIGINT at a random moment of any command, then the same command again
    python tests/hostile.py kills 40       the same with SIGKILL: besides, no file under its own name is a half of one
    python tests/hostile.py starts 10      SIGTERM or SIGINT while a command is still reading PyTorch
    python tests/hostile.py predicts 20    two processes predict into one folder at once

All but `race` and `starts` work in copies of one process that has read PyTorch, which saves seconds and no step of any command: the entry
point and all that follows are the real ones. A moment is a share of the processor time that the command takes, so that it lies anywhere
in it on a busy machine too. A number behind that of the tries is the seed. Each prints one line per try and ends with what it counted;
exit code 1 when one of them was not as it should be."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

import tiny

PROTONB = [sys.executable, "-c", "import sys; from protonb.start import main; sys.exit(main())"]     # as the command does it
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def start(words): return subprocess.Popen([*PROTONB, *map(str, words)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(text):
    """What the command said of itself; progress bars are none of it."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith(("protonb:", "stopped at step"))]


def finish(p):
    """Exit code and what was said."""
    out, err = p.communicate(timeout=1200)
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
                from protonb.start import main
                code = main([str(w) for w in words])
            except BaseException: traceback.print_exc()
            finally: sys.stdout.flush(), sys.stderr.flush(), os._exit(code)

    def spent(self):
        """Seconds of the processor so far; None when it has ended."""
        at = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if at[0] == "Z" else (int(at[11]) + int(at[12])) / os.sysconf("SC_CLK_TCK")

    def after(self, seconds):
        """Wait until it has used so many seconds of the processor, or has ended."""
        while (now := self.spent()) is not None and now < seconds: time.sleep(.002)
        return self

    def communicate(self, timeout=None):
        _, status, used = os.wait4(self.pid, 0)
        self.returncode, self.took = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        texts = [f.read_text() for f in self.files]
        for f in self.files: f.unlink()
        return texts


NAMES = iter(range(10**9))


def fork(words): return Forked(words, f"fork{next(NAMES)}")


def forked(n):
    """`race` without the seconds of the start."""
    globals()["start"] = fork
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
    run, out = f"run{i}", f"out{i}"
    every = [(tiny.train(m, run), run) for m in tiny.METHODS] + [(tiny.train("mixteacher", run, "--best", "entropy"), run)]
    every += [(words, out) for name, words in tiny.others("start", out, "photos").items() if name not in ("fewshot", "check")]
    short = "--steps 3 --batch-size 2 --size 32x64 --images 3 --device cpu".split()
    every += [(["adapt", "--target", "images:photos", *data, "--out", out, *short], out)
              for data in (["--start", "start"], ["--source", tiny.SOURCE, "--net", "pbal_small"])]
    return every + [(["validate", "start", "--data", tiny.TARGET, "--out", f"{out}/rows.csv"], out)]


def half(folder):
    """Files that cannot be read, though they have their own names."""
    def bad(p):
        try:
            if p.suffix == ".png": Image.open(p).load()
            if p.suffix == ".json": json.loads(p.read_text())
            if p.suffix == ".html": assert p.read_text().rstrip().endswith("</html>")
            if p.suffix == ".safetensors": load_file(p)
        except Exception as e: return f"{p}: {e}"
    return [b for p in sorted(Path(folder).rglob("*")) if p.is_file() and not any(q.endswith(".tmp") for q in p.parts) and (b := bad(p))]


def measured(folder="w"):
    """For each command: its bits, and the seconds of the processor that it takes."""
    whole = []
    for words, of in commands(folder):
        Path("outw").mkdir(exist_ok=True)
        p = fork(words)
        assert (end := finish(p))[0] == 0, (words, end)
        whole.append((tiny.bits(of), p.took))
        for f in ("runw", "outw"): shutil.rmtree(f, ignore_errors=True)
    return whole


def signals(n, seed=0, numbers=(signal.SIGTERM, signal.SIGINT)):
    """A signal after a random part of what the command takes: 130, one line, and the same bits after the rerun."""
    count, rng, whole = Counter(), random.Random(seed), measured()
    for i in range(n):
        k = (i + seed) % len(whole)
        (words, folder), (want, took) = commands(i)[k], whole[k]
        Path(f"out{i}").mkdir()
        number, wait = rng.choice(numbers), rng.uniform(0, took)
        p = fork(words).after(wait)
        os.kill(p.pid, number)
        code, said, text = finish(p)
        broken = half(folder) + half("start")
        again = finish(fork(words))
        ran = code == 0                                            # it was done before the signal came
        there = words[0] == "data" and ran and again[0] == 2       # a new folder is asked for
        same = tiny.bits(folder) == want and (again[0] == 0 or there)
        told = not said if number == signal.SIGKILL else len(said) == 1 and "Traceback" not in text
        good = same and not broken and (ran or code == (-9 if number == signal.SIGKILL else 130) and told)
        count["ended before the signal" if ran and good else "stopped as it should be, the same bits" if good else "WRONG"] += 1
        bits = "same bits" if same else "OTHER BITS"
        print(i, " ".join(words[:2]), number.name, f"after {wait:.2f} of {took:.2f} s:", code, said, bits, flush=True)
        if not good: print(text[-3000:], broken, again[:2], flush=True)
        for f in (f"run{i}", f"out{i}"): shutil.rmtree(f, ignore_errors=True)
    return count


def kills(n, seed=0): return signals(n, seed, (signal.SIGKILL,))


def starts(n, seed=0):
    """A signal while the modules are read: before Python has read its own it ends as any program, then with the line of a stop."""
    count, rng = Counter(), random.Random(seed)
    since = time.time()
    assert finish(start(["info"]))[0] == 0
    took = time.time() - since
    for i in range(n):
        p, number, wait = start(["info"]), rng.choice([signal.SIGTERM, signal.SIGINT]), rng.uniform(0, took)
        time.sleep(wait)
        p.send_signal(number)
        code, said, text = finish(p)
        early = code in (-number, 130) and not said and "protonb" not in text
        good = code == 130 and len(said) == 1 and "Traceback" not in text
        count["ended before the signal" if code == 0 else "130, one line" if good else "before it began" if early else "WRONG"] += 1
        print(i, number.name, f"after {wait:.1f} of {took:.1f} s:", code, said, flush=True)
        if not (good or early or code == 0): print(text[-1500:], flush=True)
    return count


def predicts(n, seed=0):
    """Two at once into one folder, one a little later: both end well, or one says why not; what is there then is whole and the same."""
    count, rng = Counter(), random.Random(seed)
    words = ["predict", "start", "photos", "--out", "twice", "--format", "trainIds", "color", "confidence"]
    p = fork(words)
    assert finish(p)[0] == 0
    want, took = tiny.bits("twice"), p.took
    for i in range(n):
        shutil.rmtree("twice")
        first = fork(words).after(rng.choice([0, rng.uniform(0, took)]))
        second = fork(words)
        ends = [finish(second), finish(first)]
        good = tiny.bits("twice") == want and all(e[0] == 0 or e[0] == 2 and len(e[1]) == 1 for e in ends) and 0 in [e[0] for e in ends]
        good = good and not list(Path("twice").rglob("*.tmp")) and "Traceback" not in ends[0][2] + ends[1][2]
        count[f"exit codes {sorted(e[0] for e in ends)}, all whole" if good else "WRONG"] += 1
        print(i, [e[:2] for e in ends], flush=True)
        if not good: print(ends, sorted(set(tiny.bits("twice")) ^ set(want)), flush=True)
    return count


if __name__ == "__main__":
    what, numbers = sys.argv[1], [int(a) for a in sys.argv[2:]]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if what not in ("race", "starts"):
        import torch
        import protonb.cli
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        begin = start if what in ("race", "starts") else fork
        if what != "starts": assert finish(begin(tiny.train("source-only", "start", "--net", "iapc_small")))[0] == 0
        Path("photos").mkdir()
        for i in range(20): Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(f"photos/{i}.png")
        count = dict(race=race, forked=forked, signals=signals, kills=kills, starts=starts, predicts=predicts)[what](*numbers)
        os.chdir("/")
    print(what, dict(count))
    sys.exit("WRONG" in count)
