"""A disk that is full, broken or closed, at any write of any command: one line with file and cause, exit code 2, what was whole stays whole, and the
same command ends with the same bits once the cause is gone. `python tests/test_faults.py` tries each single write from a fresh folder (an hour)."""
import builtins
import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

import tiny
from protonb.cli import main
from protonb.training import checkpoints, read_states

ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO]


class Faults:
    """Counts the writes below a folder, and lets the n-th fail: files that are made, bytes that go into them, folders, renames, fsync, links."""
    def __init__(self, home, n=0, number=errno.ENOSPC): self.home, self.n, self.number, self.count, self.where = os.path.realpath(home), n, number, 0, ""

    def here(self, path):
        return isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(self.home)

    def tick(self, where):
        self.count += 1
        if self.count == self.n:
            self.where = str(where)
            raise OSError(self.number, os.strerror(self.number), *([where] if isinstance(where, (str, os.PathLike)) else []))

    def file(self, path, mode, buffering, encoding, errors, newline):
        faults = self

        class Raw(io.FileIO):
            def write(self, data):
                faults.tick(0)                                   # the operating system names no file here
                return super().write(data)

        self.tick(path)
        raw = Raw(path, mode.replace("b", "").replace("t", ""))
        raw.mode_of = mode
        both = "+" in mode
        binary = (io.BufferedRandom if both else io.BufferedWriter)(raw, 1024)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    @contextlib.contextmanager
    def installed(self):
        real = {n: getattr(os, n) for n in ("open", "mkdir", "replace", "fsync", "symlink")}
        opened, saved = builtins.open, safetensors.torch.save_file

        def open_(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if self.here(file) and set(mode) & set("wax+"): return self.file(file, mode, buffering, encoding, errors, newline)
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)

        def save_file(tensors, path, metadata=None):
            if self.here(path):
                try: self.tick(path)
                except OSError as e:                             # what the library makes of it
                    raise SafetensorError(f"Error while serializing: I/O error: {e.strerror} (os error {e.errno})") from None
            return saved(tensors, path, metadata=metadata)

        def counted(name):
            def call(first, *more, **how):
                if name == "mkdir" and os.path.isdir(first): return real[name](first, *more, **how)      # nothing is made
                if name == "fsync" or self.here(more[0] if name in ("replace", "symlink") else first):
                    if name != "open" or (more and more[0] & (os.O_WRONLY | os.O_RDWR)): self.tick(first)
                return real[name](first, *more, **how)
            return call

        try:
            builtins.open = io.open = open_
            safetensors.torch.save_file = save_file
            for name in real: setattr(os, name, counted(name))
            yield self
        finally:
            builtins.open = io.open = opened
            safetensors.torch.save_file = saved
            for name, f in real.items(): setattr(os, name, f)


def call(words):
    """Exit code, and what was said; an exception that nobody catches goes on."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([str(w) for w in words]) or 0
    return code, [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.startswith("protonb:")]


def faulty(words, home, n, number):
    """One command whose n-th write fails; False when it has fewer."""
    faults = Faults(home, n, number)
    with faults.installed(): code, said = call(words)
    if faults.count < n:
        assert code == 0 or words[1] == "check", f"{words} without a fault: {code} {said}"
        return False
    told = f"{words} write {n} ({faults.where}): {code} {said}"
    assert code == 2 and len(said) == 1, told
    named = said[0].split(": ")[1]
    assert os.strerror(number) in said[0] and os.path.realpath(named).startswith(os.path.realpath(home)), told
    left = [p for p in Path(home).rglob("*.tmp")]
    assert not left, f"{told} left {left}"
    return True


def whole(run):
    """The checkpoints of a run, all of which can be read."""
    found = checkpoints(run)
    for _, path in found: read_states(path)
    return [path.name for _, path in found]


def newest(names):
    """The newest step of each stage."""
    return {n.split("-")[0]: int(n.split("-")[1]) for n in sorted(names)}


def goes_on(words, out, home, want, stride):
    """A command that is started again and again, each time with a fault `stride` writes later: it gets on, and ends with the bits of one without faults."""
    n, tries, before = 1, 0, {}
    while faulty(words, home, n, ERRORS[tries % 3]):
        if Path(out, "checkpoints").exists():
            now = newest(whole(out))
            assert all(now.get(stage, -1) >= step for stage, step in before.items()), (before, now)
            before = now
        n, tries = n + stride, tries + 1
    assert tiny.bits(out) == want
    return tries


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a start for all methods, and photographs."""
    with contextlib.chdir(tmp_path_factory.mktemp("prepared")):
        prepare()
        return Path.cwd()


@pytest.fixture
def home(prepared, tmp_path, monkeypatch):
    """A copy of it, in which the test works."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path, dirs_exist_ok=True))


def prepare():
    assert call(tiny.train("source-only", "start", "--net", "iapc_small"))[0] == 0
    Path("photos").mkdir()
    for i in range(2): Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(f"photos/{i}.png")


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_disk_that_fails_again_and_again(method, home):
    assert call(tiny.train(method, "whole"))[0] == 0
    want = tiny.bits("whole")
    Path("faulty").mkdir()
    assert goes_on(tiny.train(method, "faulty/run"), "faulty/run", "faulty", want, tiny.STRIDE.get(method, 17)) >= 4


@pytest.mark.parametrize("command", list(tiny.others("", "", "")))
def test_a_disk_that_fails_other_commands(command, home):
    for folder in ("whole", "faulty"): Path(folder).mkdir()
    words = {f: tiny.others("run", f, "photos")[command] for f in ("whole", "faulty")}
    shutil.copytree("start", "run")
    assert call(words["whole"])[0] == (2 if command == "check" else 0)                  # scenes of 64 rows lack some classes, which it tells
    want, scored = tiny.bits("whole"), tiny.bits("run")
    shutil.rmtree("run")
    shutil.copytree("start", "run")
    n, stride = 0, 12 if command == "check" else 1
    while True:
        n += stride
        if not faulty(words["faulty"], ".", n, ERRORS[n % 3]): break
        whole("run")
        if command in ("weaken", "fewshot"): assert not list(Path("faulty").iterdir())     # whole or absent
    assert tiny.bits("faulty") == want and tiny.bits("run") == scored and n > 2


def every_write(methods):
    """Each write of each method, from a fresh folder each; returns the number of faults."""
    count = {}
    for method in methods:
        assert call(tiny.train(method, "whole"))[0] == 0
        want, n = tiny.bits("whole"), 0
        while True:
            Path("faulty").mkdir()
            if not faulty(tiny.train(method, "faulty/run"), "faulty", n+1, ERRORS[n % 3]): break
            n += 1
            whole("faulty/run")
            assert call(tiny.train(method, "faulty/run"))[0] == 0 and tiny.bits("faulty/run") == want, (method, n)
            shutil.rmtree("faulty")
        for folder in ("whole", "faulty"): shutil.rmtree(folder)
        count[method] = n
        print(method, n, "writes failed once each: one line, whole checkpoints, the same bits", flush=True)
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        prepare()
        print(sum(every_write(sys.argv[1:] or tiny.METHODS).values()), "faults in all")
        os.chdir("/")
