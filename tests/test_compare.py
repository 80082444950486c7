"""`protonb compare`: the same trainings and numbers as the scripts whose plans it carries out, resumed, shared, and every mistake in a plan one line."""
import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protonb.cli import main
from protonb.compare import gathered, network_of
from protonb.plans import entries_of, folder_of, read_plan
from protonb.training import checkpoints
from protonb.trials import job_of, kept_back, measured, open_plan, read_results, work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import photographs  # noqa: E402
import streets  # noqa: E402

SMALL = """folder = "seed{{seed}}"
shots = [1]
[data]
source = "streets:synthetic,split=train,count=4,size=49x65,seed=0"
target = "streets:real,split=train,count=4,size=49x65,seed=1"
score = "streets:real,split=train,count=2,size=49x65,seed=2"
tune = 0.5
group = 2
[run]
start = {start}
steps = 4
batch = 2
every = 1
"""
FREE = '[[entry]]\nname = "IAPC"\nmethod = "iapc"\n'


@pytest.fixture
def small(tmp_path):
    """A plan that is through in seconds: function of its entries and the start's length -> file."""
    def write(entries=FREE, start=3):
        path = tmp_path / "small.toml"
        path.write_text(SMALL.format(start=start) + entries)
        return path
    return write


def rows(path):
    with open(path, newline="") as f:
        return {(r["seed"], r["entry"]): r for r in csv.DictReader(f)}


def words(plan, out, *more): return ["compare", str(plan), "--out", str(out), "--device", "cpu", "--images", "1", *map(str, more)]
def command(*words): return [sys.executable, "-c", f"import sys; from protonb.cli import main; sys.exit(main({list(words)!r}))"]


# ---- the scripts and their plans --------------------------------------------------------------------------------------------------------------------


def script_jobs(module, monkeypatch, setup, data, home, seed=0):
    """Folder -> job of everything that the script would train; nothing is trained."""
    jobs = {}

    def note(job, until=""):
        jobs[job.run_dir.relative_to(home).as_posix()] = job
        return dict(finished=True, net=job.net)
    monkeypatch.setattr(module.methods, "train", note)
    monkeypatch.setattr(module, "adapt_statistics", lambda net, data: net)
    for name in streets.STAGES:
        list(module.Bench(home, seed, data, setup).stages(name))
    return jobs


def same(a, b):
    """Whether two jobs train the same: method, settings, length, network, images and their labels."""
    used = (lambda cfg: cfg.warm_up) if a.run_dir.name == "views" else lambda cfg: cfg          # it ends after PBAL's first stage
    assert (a.method.name, used(a.cfg), a.begin, a.about) == (b.method.name, used(b.cfg), b.begin, b.about)
    assert (a.run.steps, a.run.batch_size, a.run.seed, a.run.checkpoint_every) == (b.run.steps, b.run.batch_size, b.run.seed, b.run.checkpoint_every)
    for x, y in ((a.source, b.source), (a.target, b.target)):
        assert (x is None) == (y is None)
        if x is None: continue
        assert list(x.names) == list(y.names) and list(getattr(getattr(x, "few", x), "names")) == list(getattr(getattr(y, "few", y), "names"))
        image, other = x[1], y[1]
        assert image[0].equal(other[0])
        if a.method.target not in ("unlabelled",) and getattr(a.cfg, "labels", "full") != "none": assert image[1].equal(other[1])
    for p, q in zip(a.net.state_dict().values(), b.net.state_dict().values()): assert p.equal(q)


def plan_jobs(bench, name, seed):
    from protonb.runs import build_net
    net = build_net(name, bench.space.num_classes, bench.plan.weights_of(name) or None, seed)
    return {folder_of(e): job_of(bench, e, name, seed, net) for e in entries_of(bench.plan, bench.there)}


@pytest.mark.parametrize("seed", [2])
def test_the_plan_of_streets_trains_what_the_script_trains(tmp_path, monkeypatch, seed):
    plan = read_plan(BENCHMARKS / "streets.toml", out=str(tmp_path))
    bench = open_plan(plan)
    size = (streets.Setup.height, streets.Setup.width)
    data = dict(source=streets.Streets(streets.SYNTHETIC, 300, size=size, seed=0), target=streets.Streets(streets.REAL, 200, size=size, seed=1))
    theirs = script_jobs(streets, monkeypatch, streets.Setup(), data, tmp_path, seed)
    ours = plan_jobs(bench, "pbal_small", seed)
    assert {f"seed{seed}/{k}" for k in ours} == set(theirs)
    for folder, job in ours.items():
        same(job, theirs[f"seed{seed}/{folder}"])
        assert job.run_dir == theirs[f"seed{seed}/{folder}"].run_dir
    assert bench.score.names == [f"real_11_{i:05}" for i in range(100)] and open_plan(plan, tuning=True).score.names[0] == "real_7_00000"


def test_the_plan_of_photographs_trains_what_the_script_trains(tmp_path, monkeypatch, data):
    root = data
    if not (root / "carla").is_dir() or not (root / "weights").is_dir(): pytest.skip("needs CARLA, CamVid and ImageNet weights")
    net = "pbal_mobilenetv2"
    plan, images = read_plan(BENCHMARKS / "photographs.toml", root, out=str(tmp_path)), photographs.images(root, False)
    bench, held, theirs = open_plan(plan), open_plan(plan, True), photographs.images(root, True)
    assert list(images["val"].names) == list(bench.score.names)
    assert [list(theirs[k].names) for k in ("val", "target")] == [list(d.names) for d in (held.score, held.target)]
    setup = photographs.Setup(net, *photographs.VIEW, photographs.CAMVID, 400, 200, 4, len(images["target"]), str(root / photographs.WEIGHTS["mobilenetv2"]),
                              photographs.city_of, unseen=photographs.UNSEEN)
    theirs = script_jobs(streets, monkeypatch, setup, images, bench.out / net)
    ours = plan_jobs(bench, net, 0)
    assert {f"seed0/{k}" for k in ours} == set(theirs)
    for folder, job in ours.items(): same(job, theirs[f"seed0/{folder}"])


def test_images_kept_back_are_those_of_the_script():
    names = [f"{s}_{i:06}" for s, n in (("0001TP", 124), ("0006R0", 101), ("0016E5", 305)) for i in range(n)][::-1]
    assert kept_back(names, .2, photographs.city_of) == photographs.kept_back(names)


def test_the_numbers_are_those_of_the_script(tmp_path, monkeypatch, small):
    "Both train and score; every mIoU agrees to the last digit. Then the plan finds what the script has trained, and trains nothing."
    kinds = '[[entry]]\nname = "wdass point"\nmethod = "wdass"\nlabels = "point"\nadabn = true\n' \
            '[[entry]]\nname = "pixda 1-shot"\nmethod = "pixda"\nlabels = "1-shot"\nfolder = "pixda_1"\n' \
            '[[entry]]\nname = "mixteacher 1-shot"\nmethod = "mixteacher"\nlabels = "1-shot"\n'
    plan = read_plan(small(kinds), out=str(tmp_path / "plan"))
    monkeypatch.setattr(streets, "KINDS", ("point",))
    monkeypatch.setattr(streets, "SHOTS", (1,))
    bench = open_plan(plan, progress=False, device="cpu")
    found, evaluate = [], streets.evaluate
    monkeypatch.setattr(streets, "evaluate", lambda *a, **k: found.append(evaluate(*a, **k)) or found[-1])
    setup = streets.Setup(height=49, width=65, start=3, steps=4, batch=2, images=4, group=lambda name: int(name[-1]) % 2)
    monkeypatch.setattr(streets.Bench, "run", lambda self, steps: streets.Train(steps, 2, self.seed, device="cpu", checkpoint_every=1))
    data = dict(source=bench.source, target=bench.target, val=bench.score)
    def rows(kind, names): return streets.fill(streets.Bench(tmp_path / "script", 0, data, setup, (kind,)), names, "command")
    theirs = rows("1-shot", ("start", "adabn", "source_only", "oracle", "fine_tuning", "pixda", "joint", "mixteacher")) + rows("point", ("wdass",))
    script = {r["stage"].replace("adabn", "start, AdaBN"): 100*s.miou for r, s in zip(theirs, found)}
    entries = [e for e in entries_of(plan, bench.there) if e.name != "joint point"]
    work(bench, entries)
    ours = {r["entry"]: r["miou"] for e in entries for r in read_results(bench, entries[0], e, "pbal_small", 0)}
    assert ours == script and len(set(ours.values())) > 6
    for row in gathered(bench, entries): assert measured(bench, network_of(bench, row))["miou"] == row["miou"]        # what the page shows

    def made(): return {p: p.stat().st_mtime_ns for p in (tmp_path / "script").rglob("checkpoints/*/*.safetensors")}
    before = made()
    again = open_plan(read_plan(plan.path, out=str(tmp_path / "script")), progress=False, device="cpu")
    work(again, entries)
    assert made() == before
    assert {r["entry"]: r["miou"] for e in entries for r in read_results(again, entries[0], e, "pbal_small", 0)} == script


# ---- the command --------------------------------------------------------------------------------------------------------------------------------------


def test_the_smoke_plan(tmp_path, capsys):
    assert main(words(BENCHMARKS / "smoke.toml", tmp_path, "--seeds", 1)) == 0
    said = capsys.readouterr().out
    got = rows(tmp_path / "results.csv")
    names = ["start", "start, AdaBN", "source_only", "source_only, AdaBN", "oracle", "fine_tuning 1-shot", "joint point", "joint 1-shot", "pbal warm-up", "pbal BPL",
             "wdass point", "mixteacher 1-shot"]
    assert [n for _, n in got] == names and all(s == "1" for s, _ in got)
    for name, r in got.items():
        assert 0 <= float(r["miou"]) <= 100 and float(r["seconds"]) > 0
        if "AdaBN" not in name[1]: assert float(r["best"]) >= max(float(r["chosen"]), float(r["miou"]))
    table = said[said.index("entry  "):].splitlines()
    assert [w for w in table[0].split() if w != "gap"] == ["entry", "labels", "mIoU", "chosen", "best", "s/step", "MB"] and len(table) == 3 + len(names)
    page = (tmp_path / "report.html").read_text()
    assert all(w in page for w in (*names, "Pictures", "Training", "Set-up", "window.flip_p")) and "nan" not in re.sub(r"base64,[^\"')]+", "", page.split("<body>")[1])
    assert len(checkpoints(tmp_path / "pbal_small/seed1/oracle")) == 2
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("compare.json")}
    assert main(words(BENCHMARKS / "smoke.toml", tmp_path, "--seeds", 1, "--only", "oracle")) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("compare.json")} == before and "seed 1, oracle:" not in capsys.readouterr().out


def test_tuning_has_rows_and_runs_of_its_own(small, tmp_path, capsys):
    plan, out = small(), tmp_path / "out"
    assert main(words(plan, out, "--tuning", "--only", "start")) == 0
    assert set(rows(out / "tuning.csv")) == {("0", "start"), ("0", "start, AdaBN")} and not (out / "results.csv").exists() and (out / "tuning/seed0/start").is_dir()


def test_processes_share_the_work_and_agree(small, tmp_path, capsys):
    plan = small()
    shared = subprocess.run(command(*words(plan, tmp_path / "two", "--jobs", 2, "--seeds", 0, 1)), capture_output=True, text=True, timeout=500)
    assert shared.returncode == 0, shared.stderr
    assert main(words(plan, tmp_path / "one", "--seeds", 0, 1)) == 0
    one, two = rows(tmp_path / "one/results.csv"), rows(tmp_path / "two/results.csv")
    assert list(one) == list(two) and len(one) == 12
    assert [r["miou"] for r in one.values()] == [r["miou"] for r in two.values()]
    assert sum(line.startswith("pbal_small, seed") for line in shared.stdout.splitlines()) == 12            # nothing was done twice


def test_what_was_killed_goes_on_to_the_same_end(small, tmp_path):
    plan = small(start=12)
    with subprocess.Popen(command(*words(plan, tmp_path / "killed", "--only", "start")), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        run = tmp_path / "killed/seed0/start"
        for _ in range(3000):
            if checkpoints(run) or p.poll() is not None: break
            time.sleep(.1)
        p.send_signal(signal.SIGKILL)
    assert checkpoints(run)[-1][0] < 12 and not (run / "compare.json").exists()
    for out in ("killed", "whole"): assert main(words(plan, tmp_path / out, "--only", "start")) == 0
    assert [r["miou"] for r in rows(tmp_path / "killed/results.csv").values()] == [r["miou"] for r in rows(tmp_path / "whole/results.csv").values()]


def test_a_training_that_diverges_is_a_row(small, tmp_path, capsys):
    plan = small('[[entry]]\nname = "wild"\nmethod = "joint"\nlabels = "full"\nsettings = {lr = 1e9, optimizer = "sgd", warm = 0}\n')
    assert main(words(plan, tmp_path / "out", "--only", "wild")) == 2
    assert rows(tmp_path / "out/results.csv")["0", "wild"]["note"] == "diverged" and "diverged at step" in capsys.readouterr().out


def test_without_labels_only_what_needs_none(tmp_path, small, capsys):
    from PIL import Image
    from protonb.streets import REAL, Streets
    (tmp_path / "bare").mkdir()
    for name, (x, _) in zip("abcd", (Streets(REAL, 4, (49, 65), 1)[i] for i in range(4))):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f"bare/{name}.png")
    path = small("")
    path.write_text(path.read_text().replace("streets:real,split=train,count=4,size=49x65,seed=1", f"images:{tmp_path / 'bare'}"))
    bench = open_plan(read_plan(path))
    assert bench.there == ["none"] and "no entries with labels" in capsys.readouterr().out
    assert [e.name for e in entries_of(bench.plan, bench.there)] == ["start", "source_only", "iapc", "pbal", "views of pbal", "proda", "mixteacher none"]
    path.write_text(path.read_text() + '[[entry]]\nname = "x"\nmethod = "wdass"\nlabels = "coarse"\n')
    assert main(words(path, tmp_path / "out")) == 2 and "x: the target has no labels for coarse" in capsys.readouterr().err


@pytest.mark.parametrize("old, new, says", [
    ("start = 3", "begin = 3", "[run]: unknown key 'begin'; expected one of start"),
    ("start = 3", 'start = "three"', "run.start is 'three'; expected a whole number"),
    ("start = 3", "start = 3\nview = [9]", "run.view is (9,); expected"),
    ("[data]", "[images]", "unknown key 'images'"),
    ("score = ", "scores = ", "[data]: unknown key 'scores'"),
    ('score = "streets:real', 'score = "streets:moon', "[data] score streets:moon"),
    ('source = "streets:synthetic', 'source = "folder:gone.toml', "[data] source folder:gone.toml"),
    ("group = 2", "group = 0", "data.group is 0"),
    ("group = 2", 'group = 2\nunseen = ["moon"]', "unseen: moon is none of the classes"),
    ("group = 2", 'group = 2\nclasses = "moon"', "data.classes is 'moon'; expected one of"),
    ("shots = [1]", "shots = [1", "is not valid TOML"),
    ("shots = [1]", 'networks = ["moon"]', "networks is ('moon',); expected"),
    ("shots = [1]", 'weights = "gone.pth"', "gone.pth"),
    ('"iapc"', '"moon"', "entry 1: method is 'moon'; expected one of"),
    ('"iapc"', '"dip"', "entry 1: method is 'dip'; expected one that trains a classifier"),
    ('"iapc"', '"pixda"', "entry 1: labels is 'none'; expected 1-shot"),
    ('"iapc"', '"pixda"\nlabels = "3-shot"', "k is 3 images per group"),
    ('"iapc"', '"iapc"\nsettings = {moon = 1}', "IAPC: settings: 'moon' is unknown"),
    ('"iapc"', '"iapc"\nsettings = {lr = "fast"}', "IAPC: lr is 'fast'; expected"),
    ('name = "IAPC"', 'name = "start"', "start: is iapc with labels none; expected source-only"),
])
def test_a_mistake_in_a_plan_is_one_line_and_nothing_is_written(small, tmp_path, capsys, old, new, says):
    path = small()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert main(words(path, tmp_path / "out")) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith(f"protonb: {path}: ") and says in err, err
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_not_there(tmp_path, capsys):
    assert main(words(tmp_path / "gone.toml", tmp_path / "out")) == 2
    assert f"{tmp_path / 'gone.toml'}: cannot be read" in capsys.readouterr().err
