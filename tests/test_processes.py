"""A process of several is killed or stands still: the others end soon, with a line that says which, in a step, while the first one labels, and without a launcher."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny

PATIENCE = 4
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])}

# Each line on stdin starts two processes of one command; importing torch once saves seconds. Both write a file when they are where they are to be hit.
SCRIPT = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from protonb import iapc, training
from protonb.cli import main

def run(rank, port, where, words, here):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    def arrived(): Path(f'{here}.{rank}').touch()
    note, label, wait, save = training._note, iapc.write_labels, iapc.wait_long, training.save_checkpoint
    if where == 'step': training._note = lambda run, values: (note(run, values), run.done == 3 and arrived())[0]
    if where == 'label':
        iapc.write_labels = lambda *a, **k: (arrived(), time.sleep(60))
        iapc.wait_long = lambda acc: (arrived(), wait(acc))
    if where == 'disk' and rank == 0:
        def full(*a): raise OSError(28, 'No space left on device', 'here')
        training.save_checkpoint = full

    return main(words)

print('ready', flush=True)
for line in sys.stdin:
    port, where, words, here = json.loads(line)
    pids = []
    for rank in range(2):
        if pid := os.fork(): pids.append(pid)
        else:
            out = os.open(f'{here}.err{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            code = 99
            try: code = run(rank, port, where, words, here)
            finally: sys.stderr.flush(), os._exit(code)
    print(json.dumps(pids), flush=True)
    print(json.dumps({pid: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in pids)}), flush=True)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


class Pairs:
    """Starts two processes of a command, hits one, and tells how the other ended."""
    def __init__(self, tmp):
        self.tmp, self.number = tmp, 0
        self.server = subprocess.Popen([sys.executable, "-c", SCRIPT], env=ENV, cwd=tmp, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def __call__(self, where, victim=None, number=None, method="iapc", patience=PATIENCE):
        self.number += 1
        here = self.tmp / f"pair{self.number}"
        words = tiny.train(method, here, "--patience", patience, "--steps", "20000", "--checkpoint-every", "1" if where == "disk" else "10000", "--log-every", "1")
        self.server.stdin.write(json.dumps([free_port(), where, words, str(here)]) + "\n")
        self.server.stdin.flush()
        pids = json.loads(self.server.stdout.readline())
        if victim is not None:
            end = time.time() + 60
            while not all(Path(f"{here}.{r}").exists() for r in range(2)) and time.time() < end: time.sleep(.05)
            time.sleep(1.5)                                    # a breath or two
            os.kill(pids[victim], number)
            since = time.time()
            other = pids[1-victim]
            while Path(f"/proc/{other}/stat").exists() and Path(f"/proc/{other}/stat").read_text().split()[2] != "Z" and time.time() < since + 40: time.sleep(.05)
            took = time.time() - since
            for pid in pids:
                try: os.kill(pid, signal.SIGKILL)
                except ProcessLookupError: pass
        else: took = 0
        codes = json.loads(self.server.stdout.readline())
        return [codes[str(p)] for p in pids], [Path(f"{here}.err{r}").read_text() for r in range(2)], took


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("pairs")
    pairs = Pairs(tmp)
    start = tiny.train("source-only", "start", "--net", "iapc_small")
    command = "import sys; from protonb.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", command, *start], cwd=tmp, env=ENV, check=True, capture_output=True, timeout=100)
    yield pairs
    pairs.server.stdin.close()
    pairs.server.wait(30)


@pytest.mark.parametrize("where, victim, how", [("step", 1, "SIGKILL"), ("step", 0, "SIGSTOP"), ("label", 0, "SIGKILL"), ("label", 1, "SIGSTOP")])
def test_the_other_ends_and_says_who_is_missing(pairs, where, victim, how):
    codes, said, took = pairs(where, victim, getattr(signal, how))
    lines = [line for line in said[1-victim].replace("\r", "\n").splitlines() if line.startswith("protonb:")]
    assert codes[1-victim] == 2 and len(lines) == 1 and "Traceback" not in said[1-victim], (codes, said)
    assert f"process {victim} of 2" in lines[0] and "process id" in lines[0] and "the same command goes on" in lines[0], lines
    assert took < 3*PATIENCE, took


def test_what_ends_one_is_said_by_the_other(pairs):
    codes, said, _ = pairs("disk", patience=30)
    assert codes == [2, 2] and "here: No space left on device" in said[0], (codes, said)
    assert "process 0 of 2" in said[1] and "ended: OSError" in said[1] and "No space left" in said[1] and "Traceback" not in said[1], said
