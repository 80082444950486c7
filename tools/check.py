"""Everything CI checks, in order; stops at the first red part. `make test` runs it."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# Each of the two workers gets one thread; more only makes them fight over two cores.
ENV = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false")
if not shutil.which("nvidia-smi"):
    ENV["TRITON_INTERPRET"] = "1"  # a worker runs several notebooks, and Triton decides when the first of them imports it


def tree(*folders, ending):
    """Bytes of the files below the folders, by name."""
    files = (p for f in folders for p in (ROOT / f).rglob(f"*{ending}") if ".ipynb_checkpoints" not in p.parts)
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in files}


def unchanged(title, command, advice, *folders, ending):
    """Run a command that rewrites files; fail when it had anything to rewrite."""
    before = tree(*folders, ending=ending)
    run(title, command)
    after = tree(*folders, ending=ending)
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if changed:
        sys.exit(f"FAILED {title}: {advice}: {', '.join(changed)}")


def run(title, command, **env):
    print(f"--- {title}", flush=True)
    start = time.time()
    code = subprocess.run([str(c) for c in command], cwd=ROOT, env=ENV | env).returncode
    if code:
        sys.exit(f"FAILED {title} (exit code {code})")
    print(f"    {time.time() - start:.0f} s", flush=True)


# How a processor's BLAS adds must not decide what is right: the operations again under other settings of it, and with one that keeps no order at all.
# (MKL_CBWR is Intel's "conditional bitwise reproducibility"; a torch with another BLAS does not look at it.)
OPERATIONS = [f"tests/test_{n}.py" for n in ("ops", "contrast", "density", "weighted_prototypes")]
METHODS = [f"tests/test_{n}.py" for n in ("dip", "iapc", "pbal", "proda", "distillation", "pixda", "wdass")]
SETTINGS = [("MKL_CBWR=COMPATIBLE", dict(MKL_CBWR="COMPATIBLE")), ("4 threads", dict(OMP_NUM_THREADS="4", PROTONB_TEST_THREADS="4"))]
WHOLE_RUNS = "killed or processes or stop or workers or band_version"  # compare with another process, or measure time


def main():
    unchanged("export in sync", [BIN / "nbdev_export"], "protonb/ was not what nbs/ exports; it is now, commit it",
              "protonb", ending=".py")
    unchanged("notebooks clean", [BIN / "nbdev_clean"], "not cleaned; they are now, commit them", "nbs", ending=".ipynb")
    run("README in sync", [sys.executable, "tools/readme.py", "--check"])
    run("the book's rules", [sys.executable, "-m", "pytest", "-q", "tests/test_book.py"])
    run("kernels compile for sm_80, sm_90 and sm_100", [sys.executable, "tests/compile_kernels.py"])
    run("all notebooks", [BIN / "nbdev_test", "--n_workers", "2"])
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    run("pytest", [*pytest, "--durations", "8", "--ignore", "tests/test_book.py", "tests"])
    for name, env in SETTINGS:
        run(f"operations, {name}", [*pytest, "-m", "not slow", *OPERATIONS], **env)
    run("operations and losses, a rough BLAS", [*pytest, "--rough-blas", "-m", "not slow", "-k", f"not ({WHOLE_RUNS})", *OPERATIONS, *METHODS])


if __name__ == "__main__":
    main()
