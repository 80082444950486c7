"""A run cannot be spoiled: by a second process, another method, a damaged file, a full disk, or numbers that are no numbers any more."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from protonb import core, training as T
from protonb.cli import main
from protonb.core import InputError, atomic_path
from protonb.prototypes import load_prototypes
from protonb.runs import open_run, read_scores, save_scores
from protonb.training import Train, fit

SOURCE, TARGET = "streets:synthetic,count=4,size=64x128", "streets:real,count=4,size=64x128"
CFG = Train(steps=8, log_every=2, checkpoint_every=2, keep=2, device="cpu")


def words(out, *more, net="pbal_small"):
    return ["train", "source-only", "--source", SOURCE, "--out", str(out), "--net", net, "--steps", "3", "--batch-size", "2", "--crop-height", "65",
            "--crop-width", "97", "--device", "cpu", *map(str, more)]


def dip(out, *more):
    return ["train", "dip", "--source", SOURCE, "--target", TARGET, "--out", str(out), "--net", "dip_small", "--steps", "2", "--batch-size", "2",
            "--crop-height", "65", "--crop-width", "129", "--device", "cpu", "--shots", "1", "--allow-missing", *map(str, more)]


def fails(args, capsys, *told):
    """Exit code 2 and one line with these words."""
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("protonb:")]
    assert len(lines) == 1, lines
    for word in told:
        assert str(word) in lines[0], lines[0]


def toy(value=lambda t: 0.):
    """A net of one weight matrix whose loss is small, plus what a test wants."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    def step(batch):
        t, x = batch
        opt.zero_grad()
        loss = net(x).square().mean() + value(t)*net.weight.sum()
        loss.backward()
        opt.step()
        return dict(loss=loss.detach())
    def batches(first): return ((t, torch.randn(4, 3, generator=torch.Generator().manual_seed(t))) for t in range(first, 99))
    return step, batches, dict(net=net, opt=opt)


def go(run_dir, cfg=CFG, value=lambda t: 0., config=None):
    step, batches, parts = toy(value)
    return fit(step, batches, parts, cfg, run_dir=run_dir, config=config, progress=False), parts


def there(run_dir): return sorted(p.name for p in Path(run_dir, "checkpoints").iterdir())


# ---- one writer

HOLD = """
import sys, time
from protonb.folders import claimed
with claimed(sys.argv[1]):
    print('mine', flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder):
    """Another process that writes into a folder."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        yield other
    finally:
        other.kill()
        other.wait()


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path, capsys):
    with holder(tmp_path / "r") as other:
        fails(words(tmp_path / "r"), capsys, tmp_path / "r", "another process is writing there")
        with pytest.raises(InputError, match="another process"): go(tmp_path / "r")
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert go(tmp_path / "r")[0]["finished"]
    assert not (tmp_path / "r" / ".lock").exists()


RACE = """
import sys
from pathlib import Path
from protonb.core import InputError
from protonb.folders import claimed
go = Path(sys.argv[2])
print('ready', flush=True)
sys.stdin.readline()
try:
    with claimed(sys.argv[1]):
        go.open('a').write('x')
        sys.stdin.readline()
except InputError: sys.exit(2)
"""


def test_of_two_that_start_at_once_one_runs(tmp_path):
    for i in range(10):
        two = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path / f"r{i}"), str(tmp_path / f"log{i}")], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for p in two: assert p.stdout.readline() == "ready\n"
        for p in two:
            p.stdin.write("\n")
            p.stdin.flush()
        end = time.time() + 30
        while all(p.poll() is None for p in two) and time.time() < end: time.sleep(.01)
        for p in two:
            if p.poll() is None: p.communicate("\n", timeout=30)
        assert sorted(p.returncode for p in two) == [0, 2] and (tmp_path / f"log{i}").read_text() == "x"


def test_workers_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    command = [str(Path(sys.executable).with_name("protonb"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    p = subprocess.Popen([*command, *words(tmp_path / "r", "--steps", "4000", "--checkpoint-every", "2", "--workers", "2")], env=env,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 90
    while not list(tmp_path.glob("r/checkpoints/[!.]*")) and p.poll() is None and time.time() < end: time.sleep(.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    from protonb.folders import claimed
    for _ in range(100):                             # the workers notice within seconds that nobody wants their batches
        try:
            with claimed(tmp_path / "r"): return
        except InputError: time.sleep(.2)
    pytest.fail("the lock is still held")


# ---- one method, one set of settings

def test_a_folder_belongs_to_its_method(tmp_path, capsys):
    assert main(dip(tmp_path / "d")) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()}
    fails(words(tmp_path / "d", net="dip_small"), capsys, tmp_path / "d", "holds a run of dip")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    del config["dip"]["config"]["method"]                                     # as older runs have it: the stage tells
    (tmp_path / "d" / "config.json").write_text(json.dumps(config))
    fails(words(tmp_path / "d", net="dip_small"), capsys, "holds a run of dip")
    (tmp_path / "d" / "config.json").write_bytes(before[tmp_path / "d" / "config.json"])
    assert before == {p: p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()}


@pytest.mark.parametrize("text", ['{"model_type": "bert", "vocab_size": 30522}', '{"source_only": 3}', '"config"', "", "\xff", '{"source_only": {"train": {}}}',
                                  "["*100_000])
def test_a_foreign_config_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for args in (words(tmp_path), ["eval", tmp_path, "--data", TARGET], ["info", tmp_path]):
        fails(args, capsys, tmp_path / "config.json", "not the config.json of a run")
    assert (tmp_path / "config.json").read_bytes() == text.encode("latin-1") and len(list(tmp_path.iterdir())) == 1


def test_a_lost_config_is_named(tmp_path, capsys):
    go(tmp_path / "r")
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: is lost"): go(tmp_path / "r")
    fails(["eval", tmp_path / "r", "--data", TARGET], capsys, "config.json: is lost")


def test_settings_that_reached_no_checkpoint_may_be_put_right(tmp_path):
    def stop(t): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): go(tmp_path, config=dict(lr=1), value=stop)
    assert go(tmp_path, config=dict(lr=2))[0]["finished"]
    with pytest.raises(InputError, match="config.lr 2 -> 3"): go(tmp_path, config=dict(lr=3))


def test_an_empty_path_is_no_folder(tmp_path, capsys, monkeypatch):
    """`--out "$OUT"` of a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    assert main(words("")) == 2 and capsys.readouterr().err.strip().endswith("--out is empty; expected RUN")      # it is needed
    fails([*words("r"), "--weights="], capsys, "--weights is empty; expected FILE, or no --weights")
    fails(["predict", "", "photos", "--out", "p"], capsys, "run is empty")
    assert not list(tmp_path.iterdir())


def test_a_device_is_no_weight_file(tmp_path, capsys):
    fails(words(tmp_path / "r", "--weights", "/dev/zero"), capsys, "/dev/zero: is a device")
    fails(["eval", "/dev/zero", "--data", TARGET], capsys, "/dev/zero: is a device")


@pytest.mark.parametrize("more", ["count=2,count=3", "size=64x128,size=128x64"])
def test_what_is_said_twice_of_a_data_set(more, tmp_path, capsys):
    fails([*words(tmp_path / "r"), "--source", f"streets:synthetic,{more}"], capsys, "is said twice")


# ---- damage

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three checkpoints, and its score."""
    home = tmp_path_factory.mktemp("run")
    assert main(words(home / "r", "--steps", "6", "--checkpoint-every", "2", "--keep", "3")) == 0
    assert main(["eval", str(home / "r"), "--data", TARGET]) == 0
    return home / "r"


def test_options_that_would_do_nothing_are_refused(run, tmp_path, capsys):
    fails(words(tmp_path / "r", "--entry", "teacher"), capsys, "--entry teacher", "expected --weights")
    fails(["eval", run, "--data", TARGET, "--prototypes", "p.pth"], capsys, "--prototypes p.pth", "needs none")


@pytest.mark.parametrize("file", ["net.safetensors", "opt.safetensors", "loop.safetensors", "state.json", "checkpoint.json"])
@pytest.mark.parametrize("where", [.2, .9])
def test_one_bit_of_any_file_is_noticed(run, file, where, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    want = (tmp_path / "r" / "checkpoints" / "source_only-0000006" / "net.safetensors").read_bytes()
    path = tmp_path / "r" / "checkpoints" / "source_only-0000006" / file
    b = bytearray(path.read_bytes())
    b[int(where*len(b))] ^= 4
    path.write_bytes(bytes(b))
    with pytest.warns(UserWarning, match="source_only-0000006.*going back to the one before"):
        assert main(words(tmp_path / "r", "--steps", "6", "--checkpoint-every", "2", "--keep", "3")) == 0
    assert (tmp_path / "r" / "checkpoints" / "source_only-0000006" / "net.safetensors").read_bytes() == want


def test_a_damaged_network_is_not_scored_the_one_before_is(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "source_only-0000006" / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\x80\x3f")
    with pytest.warns(UserWarning, match="going back"): assert open_run(tmp_path / "r").step == 4


def test_checkpoints_of_before_have_no_checksums_and_load(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").glob("*/checkpoint.json"):
        info = json.loads(path.read_text())
        del info["sha256"], info["own_sha256"]
        path.write_text(json.dumps(info))
    assert open_run(tmp_path / "r").step == 6
    assert main(words(tmp_path / "r", "--steps", "6", "--checkpoint-every", "2", "--keep", "3")) == 0


@pytest.mark.parametrize("name, text, args", [
    ("scores.json", "[]", ["info", "R"]), ("scores.json", '{"a": {"of": 3}}', ["info", "R"]), ("scores.json", "["*100_000, ["eval", "R", "--data", TARGET]),
    ("metrics.csv", f"stage,step,loss\nsource_only,1,{'9'*200_000}\n", ["train"]), ("metrics.csv", f"stage,step,loss\nsource_only,{'9'*5000},1\n", ["train"]),
    ("scores.json", '{"a": {"cm": 3, "absent": "zero"}}', ["info", "R"]), ("scores.json", "\x00", ["eval", "R", "--data", TARGET]),
    ("metrics.csv", "stage,step,loss\nsource_only,1.5,3\n", ["report", "R", "--data", TARGET, "--out", "x.html"]),
    ("metrics.csv", "stage,step,loss\nsource_only,1,three\n", ["train"]), ("timing.csv", "\xff\xfe", ["train"])])
def test_damaged_files_are_named(run, name, text, args, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / name).write_bytes(text.encode("latin-1"))
    if args == ["train"]: args = words(tmp_path / "r", "--steps", "6", "--checkpoint-every", "2", "--keep", "3")
    fails([tmp_path / "r" if a == "R" else a for a in args], capsys, tmp_path / "r" / name, "damaged", "delete it")


@pytest.mark.parametrize("change, told", [
    (lambda c: c["hyper"].pop("lr"), "config.hyper.lr"), (lambda c: c.update(net="iapc_small"), "'iapc_small'"),
    (lambda c: c["space"]["classes"].pop(), "config.space.classes"), (lambda c: c["feed"].update(height=9), "config.feed.height")])
def test_a_config_that_is_not_the_checkpoints(run, change, told, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "config.json"
    stages = json.loads(path.read_text())
    change(stages["source_only"]["config"])
    path.write_text(json.dumps(stages))
    fails(["eval", tmp_path / "r", "--data", TARGET], capsys, path, told)


@pytest.mark.parametrize("change, told", [
    (lambda e: e.update(versions=None), "not the config.json of a run"), (lambda e: e.update(batch=[1]), "not the config.json of a run"),
    (lambda e: e["config"].update(method=["source-only"]), "not the config.json of a run"),
    (lambda e: e["config"].update(net=["pbal_small"]), "its network is ['pbal_small']"),
    (lambda e: e["config"].update(options=dict(deep=True)), "the options of its network are {'deep': True}")])
def test_a_config_with_odd_entries_is_named(run, change, told, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "config.json"
    stages = json.loads(path.read_text())
    change(stages["source_only"])
    path.write_text(json.dumps(stages))
    fails(words(tmp_path / "new", "--weights", tmp_path / "r"), capsys, path, told)
    fails(["info", tmp_path / "r"], capsys, path)
    assert not (tmp_path / "new").exists()


def test_a_run_made_by_hand_says_what_it_lacks(tmp_path, capsys):
    go(tmp_path, config=dict(net="pbal_small"))
    fails(["info", tmp_path], capsys, tmp_path / "config.json", "its class space is damaged")


def test_a_stage_that_has_begun_hides_none_that_has_ended(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "config.json"
    path.write_text(json.dumps((stages := json.loads(path.read_text())) | dict(later=stages["source_only"])))
    assert (open_run(tmp_path / "r").method, open_run(tmp_path / "r").step) == ("source_only", 6)


@pytest.mark.parametrize("change, told", [(lambda info: info.update(parts=["net", "opt", "sched"]), "holds the parts"),
                                          (lambda info: info["train"].update(seed=5), "train.seed 5 -> 0")])
def test_checkpoints_of_another_run_are_not_gone_on_with(run, change, told, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").glob("*/checkpoint.json"):
        info = json.loads(path.read_text())
        del info["own_sha256"]
        change(info)
        path.write_text(json.dumps(info))
    fails(words(tmp_path / "r", "--steps", "6", "--checkpoint-every", "2", "--keep", "3"), capsys, "source_only-0000006", told)


def test_a_checkpoint_under_another_name_is_passed_over(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "source_only-0000006").rename(tmp_path / "r" / "checkpoints" / "source_only-0000009")
    with pytest.warns(UserWarning, match="holds step 6 of stage source_only, whatever its name"): assert open_run(tmp_path / "r").step == 4


def test_a_checkpoint_nested_without_end_is_passed_over(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "source_only-0000006" / "checkpoint.json").write_text("["*100_000)
    with pytest.warns(UserWarning, match="going back"): assert open_run(tmp_path / "r").step == 4


def test_scores_of_several_at_once_are_all_kept(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    (scores,) = read_scores(tmp_path / "r").values()
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: save_scores(tmp_path / "r", f"data {i}", scores), range(16)))
    assert len(read_scores(tmp_path / "r")) == 17 and not (tmp_path / "r" / ".scores.lock").exists()


def test_leftovers_and_surplus_checkpoints_go_at_the_next_start(tmp_path):
    go(tmp_path, replace(CFG, keep=4))
    assert there(tmp_path) == [f"train-000000{t}" for t in (2, 4, 6, 8)]
    living = core._scratch(tmp_path / "scores.json")                          # somebody else is writing this one
    for left in (".metrics.csv.1.tmp", "checkpoints/.train-0000008.2.tmp", "pseudo/.a.png.3.tmp"): (tmp_path / left / "x").mkdir(parents=True)
    go(tmp_path, replace(CFG, keep=1))
    assert there(tmp_path) == ["train-0000008"] and list(tmp_path.rglob("*.tmp")) == [living[0]]
    os.close(living[1])


def test_a_folder_that_was_being_replaced_is_still_there(tmp_path):
    """Killed or stopped between the two renames: the old one comes back, whatever it is called."""
    for name in ("best", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("whole")
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / name) as p:
            os.replace(tmp_path / name, p.with_name(f"{name}.before"))
            raise KeyboardInterrupt
        assert (tmp_path / name / "a").read_text() == "whole"
        (tmp_path / f".{name}.12345678.tmp").mkdir()
        os.replace(tmp_path / name, tmp_path / f".{name}.12345678.tmp" / f"{name}.before")
        with atomic_path(tmp_path / name) as p: (p.mkdir(), (p / "b").touch())
        assert [q.name for q in (tmp_path / name).iterdir()] == ["b"]
    assert sorted(q.name for q in tmp_path.iterdir()) == ["best", "old"]


# ---- numbers

def test_weights_that_are_nan_reach_no_checkpoint(tmp_path):
    """The loss of the last step is finite, the update is not."""
    step, batches, parts = toy()
    def one(b):
        log = step(b)
        if b[0] == 7: parts["net"].weight.data[1, 2] = float("nan")
        return log
    with pytest.raises(T.Diverged, match=r"stage train diverged at step 8 \(net.weight holds NaN\); the last checkpoint is of step 6; .*lr 0.1"):
        fit(one, batches, parts, CFG, run_dir=tmp_path, progress=False)
    assert there(tmp_path) == ["train-0000004", "train-0000006"]
    for f in tmp_path.rglob("*.safetensors"):
        assert all(v.isfinite().all() for v in load_file(f).values() if v.is_floating_point())


def test_averages_and_momenta_are_looked_at_too(tmp_path):
    step, batches, parts = toy()
    teacher = nn.Linear(3, 2)
    def one(b):
        if b[0] == 2: teacher.bias.data[1] = float("inf")
        return step(b)
    with pytest.raises(T.Diverged, match=r"step 4 \(teacher.bias holds infinite values\)"):
        fit(one, batches, {**parts, "teacher": teacher}, CFG, run_dir=tmp_path, progress=False)


def test_an_update_that_is_not_finite_can_be_left_out_and_counted(tmp_path):
    bad = lambda t: float("nan") if t in (2, 5) else 0.
    with pytest.raises(T.Diverged, match="step 3"): go(tmp_path / "a", value=bad)
    end, parts = go(tmp_path / "b", replace(CFG, skip_nonfinite=True), value=bad)
    assert end["finished"] and all(v.isfinite().all() for v in parts["net"].state_dict().values())
    assert T.read_metrics(tmp_path / "b")["skipped"][1] == [0, 1, 2, 2]
    step, batches, parts_of = toy(bad)
    half = replace(CFG, skip_nonfinite=True)
    def stop(b):
        if b[0] == 4: raise KeyboardInterrupt
        return step(b)
    with pytest.raises(KeyboardInterrupt): fit(stop, batches, parts_of, half, run_dir=tmp_path / "c", progress=False)
    again = go(tmp_path / "c", half, value=bad)[1]
    assert again["net"].weight.equal(parts["net"].weight) and (tmp_path / "b/metrics.csv").read_bytes() == (tmp_path / "c/metrics.csv").read_bytes()


def test_a_run_that_diverges_is_one_line(tmp_path, capsys):
    fails(words(tmp_path / "r", "--steps", "60", "--lr", "1e9", "--log-every", "1"), capsys, "stage source_only diverged at step", "the last checkpoint",
          "learning rate")


def test_a_network_that_is_nan_is_not_scored(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "source_only-0000006"
    states = T.read_states(path)
    states["net"]["layer0.0.weight" if "layer0.0.weight" in states["net"] else next(iter(states["net"]))].view(-1)[0] = float("nan")
    info = T.checkpoint_info(path)
    T.save_checkpoint(path, states, {k: v for k, v in info.items() if k not in ("sha256", "bytes", "parts")})
    fails(["eval", tmp_path / "r", "--data", TARGET], capsys, "source_only-0000006", "holds NaN")
    fails(words(tmp_path / "s", "--weights", tmp_path / "r"), capsys, "holds NaN")
    assert not (tmp_path / "s").exists()


def test_a_network_whose_numbers_grow_beyond_all_bounds_is_not_scored(run, tmp_path, capsys):
    """Each weight is finite, what comes out is not."""
    state = {k: v*1e20 if v.is_floating_point() else v for k, v in open_run(run).net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), (90, 30, 60)).save(tmp_path / "photos" / "a.png")
    file = [tmp_path / "w.safetensors", "--net", "pbal_small"]
    for args in (["eval", *file, "--data", TARGET], ["validate", *file, "--data", TARGET], ["report", *file, "--data", TARGET, "--out", tmp_path / "p.html"],
                 ["predict", file[0], tmp_path / "photos", *file[1:], "--out", tmp_path / "p"]): fails(args, capsys, "the network gives NaN")
    assert not (tmp_path / "p.html").exists() and not list((tmp_path / "p").glob("*"))


# ---- disks

ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO]


def test_a_fault_at_every_write(tmp_path, monkeypatch):
    """Whatever write fails: an error that names a file of the run, the newest whole checkpoint as it was, and the same bits afterwards."""
    cfg = replace(CFG, steps=4)
    _, whole = go(tmp_path / "whole", cfg)
    count = [0]

    def faulty(n, number):
        def fault(real):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == n: raise OSError(number, os.strerror(number))
                return real(*args, **kwargs)
            return call
        return fault

    n, faults = 0, 0
    while True:
        n += 1
        run_dir, number = tmp_path / f"r{n}", ERRORS[n % 3]
        count[0] = 0
        with monkeypatch.context() as m:
            for owner, name in ((T, "write_tensors"), (T, "_write_json"), (core.os, "fsync"), (core.os, "replace"), (T.csv.DictWriter, "writerow"),
                                (T.csv.DictWriter, "writerows")):
                m.setattr(owner, name, faulty(n, number)(getattr(owner, name)))
            try: go(run_dir, cfg)
            except OSError as e:
                faults += 1
                assert e.filename and str(run_dir) in str(e.filename) and e.errno == number, e
            else: break                                               # fewer writes than n: all have had their fault
        before = {p: p.read_bytes() for p in run_dir.rglob("*.safetensors")}
        found = T.checkpoints(run_dir)
        for _, path in found: T.read_states(path)                     # each that is there is whole
        assert not list(run_dir.rglob("*.tmp")) and all(p.exists() for p in before)
        end, parts = go(run_dir, cfg)
        assert end["finished"] and parts["net"].weight.equal(whole["net"].weight)
        assert (run_dir / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
        shutil.rmtree(run_dir)
    assert faults > 30, faults


def test_the_old_checkpoint_goes_after_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    told = []
    real, gone = os.fsync, shutil.rmtree
    monkeypatch.setattr(core.os, "fsync", lambda fd: (told.append(("sync", os.readlink(f"/proc/self/fd/{fd}").rsplit("/", 1)[-1])), real(fd))[1])
    monkeypatch.setattr(T.shutil, "rmtree", lambda p, *a, **k: (told.append(("gone", Path(p).name)), gone(p, *a, **k))[1])
    go(tmp_path, replace(CFG, steps=4, keep=1))
    at = [i for i, (what, name) in enumerate(told) if (what, name) == ("gone", "train-0000002")][0]
    assert {("sync", n) for n in ("net.safetensors", "state.json", "checkpoint.json", "train-0000004", "checkpoints")} <= set(told[:at])


def test_a_folder_that_vanishes_is_named(tmp_path):
    def vanish(t):
        if t == 4: shutil.rmtree(tmp_path / "r")
        return 0.
    with pytest.raises(OSError, match="config.json"): go(tmp_path / "r", value=vanish)


def test_an_error_without_a_file_gets_one(tmp_path):
    for make in (lambda p: OSError(errno.EIO, "bad"), lambda p: OSError(errno.ENOSPC, "bad", str(p))):
        with pytest.raises(OSError) as e, atomic_path(tmp_path / "a.txt") as p: raise make(p)
        assert e.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(OSError) as e, atomic_path(tmp_path / "a.txt"): raise OSError(errno.EIO, "bad", "/elsewhere")
    assert e.value.filename == "/elsewhere" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda t: t.update(matrix=t["matrix"][:, :1].squeeze(1)), lambda t: t.update(counts=t["counts"][:3]),
                                    lambda t: t["matrix"].view(-1)[:1].fill_(float("nan")), lambda t: t.update(matrix=t["matrix"].long())])
def test_prototypes_are_looked_at(change, tmp_path):
    from protonb.weights import save_weights
    state = dict(matrix=torch.ones(4, 2), counts=torch.ones(4))
    save_weights(tmp_path / "p.safetensors", state, dict(classes=list("abcd")))
    load_prototypes(tmp_path / "p.safetensors")
    change(state)
    save_weights(tmp_path / "p.safetensors", state, dict(classes=list("abcd")))
    with pytest.raises(InputError, match="p.safetensors: damaged"): load_prototypes(tmp_path / "p.safetensors")


@pytest.mark.parametrize("classes", [4, None, [1, 2, 3, 4], "abcd"])
def test_the_note_of_prototypes_is_looked_at(classes, tmp_path):
    from protonb.weights import save_weights
    save_weights(tmp_path / "p.safetensors", dict(matrix=torch.ones(4, 2), counts=torch.ones(4)), dict(classes=classes))
    with pytest.raises(InputError, match="p.safetensors: its note is damaged"): load_prototypes(tmp_path / "p.safetensors")


# ---- files beside the checkpoints

def test_a_damaged_selection_is_named(tmp_path):
    from protonb.pixda import PixDA, select
    for text in ("{", "[]", '{"kept": 3}', '{"kept": ["elsewhere"]}', "\x00"):
        (tmp_path / "pass_01.json").write_text(text)
        with pytest.raises(InputError, match="pass_01.json: damaged.*delete it"):
            select(None, None, None, None, ["a", "b"], .4, PixDA(), Train(), path=tmp_path / "pass_01.json")


def test_damaged_counts_of_classes_are_named(tmp_path):
    from protonb.streams import rare_first
    from protonb.streets import REAL, Streets
    data, path = Streets(REAL, 2, (64, 128)), tmp_path / "class_pixels.npz"
    for content in (b"", b"PK\x03\x04", b"not an archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="class_pixels.npz: damaged.*delete it"): rare_first(data, .1, path)
    path.unlink()
    rare_first(data, .1, path)
    rare_first(data, .1, path)


@pytest.mark.parametrize("key, value", [("bins", "many"), ("bins", -1), ("names", 3), ("names", [1]), ("counts", {}), ("classes", None)])
def test_a_damaged_histogram_is_named_and_made_anew(key, value, tmp_path):
    from protonb.pseudo_labels import read_histogram, write_labels
    from protonb.streets import REAL, Streets
    data = Streets(REAL, 2, (64, 128))
    segment = lambda x: torch.nn.functional.one_hot((x[:, 0] // 32).long(), 19).permute(0, 3, 1, 2).float()
    write_labels(segment, data, tmp_path, data.space, progress=False, network="a")
    path = tmp_path / "histogram.json"
    want = path.read_bytes()
    path.write_text(json.dumps(json.loads(want) | {key: value}))
    with pytest.raises(InputError, match="histogram.json: is damaged.*delete it"): read_histogram(tmp_path)
    with pytest.raises(InputError, match="histogram.json"): write_labels(segment, data, tmp_path, data.space, progress=False, network="a")
    path.unlink()
    (tmp_path / ".counts").mkdir(exist_ok=True)
    (tmp_path / ".counts" / f"{data.names[0]}.npy").write_bytes(b"half a not")          # what a kill left
    (tmp_path / ".counts" / f"{data.names[1]}.npy").write_bytes(b"PK\x03\x04 is no archive")
    write_labels(segment, data, tmp_path, data.space, progress=False, network="a")
    assert path.read_bytes() == want


# ---- a stop

def test_a_stop_in_the_last_step_of_a_stage_ends_the_run_there(tmp_path, capsys, monkeypatch):
    real = T._save
    monkeypatch.setattr(T, "_save", lambda run: (real(run), run.done == 3 and os.kill(os.getpid(), signal.SIGTERM))[0])
    assert main(words(tmp_path / "r")) == 130 and "stopped at step 3" in capsys.readouterr().out
    monkeypatch.setattr(T, "_save", real)
    assert main(words(tmp_path / "r")) == 0


def test_a_stop_while_the_best_is_measured_ends_the_run_with_that_checkpoint(tmp_path, capsys, monkeypatch):
    from protonb import methods
    real, train = methods.judge_of, tiny.train("mixteacher", tmp_path / "r", "--best", "entropy")
    monkeypatch.setattr(methods, "judge_of", lambda job: lambda parts: (os.kill(os.getpid(), signal.SIGINT), real(job)(parts))[1])
    assert main(train) == 130 and "stopped at step 1 with a checkpoint" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(train) == 0 and there(tmp_path / "r")[-1] == "mixteacher-0000002" and (tmp_path / "r" / "best" / "entropy").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_the_steps_is_one_line_and_130(run, number, tmp_path, capsys, monkeypatch):
    from protonb import cli
    monkeypatch.setattr(cli, "open_dataset", lambda *a, **k: os.kill(os.getpid(), number))
    assert main(["eval", str(run), "--data", TARGET]) == 130
    err = capsys.readouterr().err.strip()
    assert err.startswith("protonb: stopped") and "\n" not in err and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_bug_keeps_its_traceback_and_says_so(run, monkeypatch):
    from protonb import cli
    monkeypatch.setattr(cli, "open_dataset", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError) as e: main(["eval", str(run), "--data", TARGET])
    assert "report it" in e.value.__notes__[0]


def test_two_runs_of_one_folder_name_are_both_in_the_report(run, tmp_path, capsys):
    for where in "ab": shutil.copytree(run, tmp_path / where / "r")
    out = tmp_path / "x.html"
    assert main(["report", str(tmp_path / "a" / "r"), str(tmp_path / "b" / "r"), "--data", "streets:real,count=1,size=64x128", "--images", "1", "--out", str(out)]) == 0
    page = out.read_text()
    assert str(tmp_path / "a" / "r") in page and str(tmp_path / "b" / "r") in page


def test_a_run_of_before_a_setting_existed_goes_on(tmp_path, capsys):
    """What config.json lacks counts as the default of today's class, in the settings, a window in them, and the feed; nothing else does."""
    long = ("--steps", "4", "--checkpoint-every", "2")
    assert main(words(tmp_path / "whole", *long)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    for path in [tmp_path / "old" / "config.json", *(tmp_path / "old" / "checkpoints").glob("*/checkpoint.json")]:
        told = json.loads(path.read_text())
        entry = told.get("source_only", told)
        del entry["train"]["skip_nonfinite"], entry["train"]["patience"], entry["config"]["feed"]["width"], entry["config"]["method"]
        del entry["config"]["hyper"]["power"], entry["config"]["hyper"]["augment"]["blur_p"]
        told.pop("own_sha256", None)
        path.write_text(json.dumps(told))
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "source_only-0000004")
    assert main(["eval", str(tmp_path / "old"), "--data", TARGET]) == 0
    fails(words(tmp_path / "old", *long, "--power", "2"), capsys, "config.hyper.power")
    assert main(words(tmp_path / "old", *long)) == 0
    for run in "old", "whole": assert main(["eval", str(tmp_path / run), "--data", TARGET]) == 0
    name = "checkpoints/source_only-0000004/net.safetensors"
    assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_gradient_that_is_nan_reaches_no_checkpoint(tmp_path):
    """The optimizer leaves the update out by itself, the weights are still fine."""
    step, batches, parts = toy()
    def one(b):
        log = step(b)
        if b[0] == 5: parts["net"].bias.grad[0] = float("nan")
        return log
    with pytest.raises(T.Diverged, match=r"step 6 \(the gradient of net.bias holds NaN\); the last checkpoint is of step 4"):
        fit(one, batches, parts, CFG, run_dir=tmp_path, progress=False)
