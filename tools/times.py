"""How long each notebook runs and how much memory it needs: `python tools/times.py [NOTEBOOK ...]` measures them (all, without names) and writes tools/times.csv.

Each runs alone in a process of its own, on one thread, as `make test` runs it. Seconds are those of the processor (with its children's), so that another
program on the machine changes little. The site prints the numbers under the title of a page.
"""
import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT/"tools"/"times.csv"
ONE_THREAD = dict(OMP_NUM_THREADS="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false", TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")


def read():
    """{notebook below nbs/: (seconds, MB)}."""
    if not FILE.exists():
        return {}
    with FILE.open(newline="") as f:
        return {row["notebook"]: (float(row["seconds"]), float(row["megabytes"])) for row in csv.DictReader(f)}


def measure(path):
    """Seconds and peak memory in MB of one notebook; stops when it fails."""
    code = f"import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path({str(path)!r}))[0])"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)   # it has been waited for
    if child.returncode:
        sys.exit(f"{path} fails: run `nbdev_test --path {path}`")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss/1024


def main():
    """Measure, and write what has been measured so far after each notebook."""
    book = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    there = {p.relative_to(ROOT/"nbs").as_posix() for p in book}
    times = {name: row for name, row in read().items() if name in there}
    for path in [Path(a).resolve() for a in sys.argv[1:]] or book:
        name = path.relative_to(ROOT/"nbs").as_posix()
        times[name] = measure(path)
        print(f"{name:44}{times[name][0]:7.1f} s{times[name][1]:8.0f} MB", flush=True)
        with FILE.open("w", newline="") as f:
            rows = csv.writer(f, lineterminator="\n")
            rows.writerow(["notebook", "seconds", "megabytes"])
            rows.writerows([n, f"{s:.1f}", f"{m:.0f}"] for n, (s, m) in sorted(times.items()))


if __name__ == "__main__":
    main()
