"""`protonb compare`: the trainings and numbers that its plan names, resumed, shared, and every mistake in a plan one line."""
import csv
import json
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from protonb.cli import main
from protonb.compare import gathered, network_of
from protonb.few_shot import draw_shots
from protonb.methods import Job, train
from protonb.plans import entries_of, read_plan
from protonb.pseudo_labels import PartlyLabelled
from protonb.recipes import Situation, flat
from protonb.runs import METHODS, build_net, space_to_dict
from protonb.streets import REAL, Streets
from protonb.teachers import adapt_statistics
from protonb.training import Train, checkpoints
from protonb.trials import _adabn, images_for, kept_back, measured, open_plan, read_results, recipe, rows_for, work
from protonb.weak_labels import WeakLabels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
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


# ---- the plans, and what they train ---------------------------------------------------------------------------------------------------------------


EVERYTHING = ["start", "source_only", "oracle", "fine_tuning 1-shot", "fine_tuning 5-shot", *(f"joint {k}" for k in ("point", "coarse", "1-shot", "5-shot", "full")),
              "iapc", "pbal", "views of pbal", "proda", *(f"wdass {k}" for k in ("image", "point", "coarse")), "pixda 1-shot", "pixda 5-shot",
              *(f"mixteacher {k}" for k in ("none", "image", "point", "coarse", "1-shot", "5-shot", "full"))]


def test_the_plan_of_streets(tmp_path):
    plan = read_plan(BENCHMARKS / "streets.toml", out=str(tmp_path))
    bench = open_plan(plan)
    assert [e.name for e in entries_of(plan, bench.there)] == EVERYTHING
    assert bench.score.names == [f"real_11_{i:05}" for i in range(100)] and open_plan(plan, tuning=True).score.names[0] == "real_7_00000"
    few = images_for(bench, next(e for e in entries_of(plan, bench.there) if e.name == "fine_tuning 5-shot"), 1)[0]
    assert len(few) == 90 and {sorted(bench.target.names).index(n) % 18 for n in few.names} == set(range(18))


def test_the_plan_of_photographs(tmp_path, data):
    if not (data / "carla").is_dir() or not (data / "weights").is_dir(): pytest.skip("needs CARLA, CamVid and ImageNet weights")
    plan = read_plan(BENCHMARKS / "photographs.toml", data, out=str(tmp_path))
    bench, held = open_plan(plan), open_plan(plan, True)
    assert [e.name for e in entries_of(plan, bench.there)] == EVERYTHING
    assert not {*held.target.names} & {*held.score.names} and {*held.target.names, *held.score.names} == {*bench.target.names}
    assert not {*bench.score.names} & {*bench.target.names}
    few = images_for(bench, next(e for e in entries_of(plan, bench.there) if e.name == "fine_tuning 1-shot"), 0)[0]
    assert len({n.split("_")[0] for n in few.names}) == len(few) == len({n.split("_")[0] for n in bench.target.names})


@pytest.mark.parametrize("name", ["parts", "pixda_parts", "proda_parts"])
def test_plans_that_take_a_method_apart(tmp_path, name):
    plan = read_plan(BENCHMARKS / f"{name}.toml", out=str(tmp_path))
    bench = open_plan(plan, tuning=True)
    of = [(e, flat(recipe(bench, e, "pbal_small"))) for e in plan.entry]
    for e, cfg in of:
        whole = next(whole for first, whole in of if (first.method, first.labels) == (e.method, e.labels) and not first.settings)
        changed = {k for k in cfg if cfg[k] != whole[k]}
        assert changed <= set(e.settings) and bool(changed) == bool(e.settings), (e.name, changed)         # a part is none that the recipe has already
    assert len({(e.method, e.labels, str(sorted(cfg.items()))) for e, cfg in of}) == len(of)


def test_longer_runs_go_on_from_the_starts_of_photographs_and_statistics_has_its_own():
    one, two, three = (read_plan(BENCHMARKS / f"{name}.toml") for name in ("photographs", "longer", "statistics"))
    for other in (two, three):
        assert (one.data, one.run, one.folder, one.seeds, one.weights) == (other.data, other.run, other.folder, other.seeds, other.weights)
    assert two.out == one.out != three.out and all(e.settings["freeze_bn"] is False for e in entries_of(three, ["none", "image", "point", "coarse", "1-shot", "5-shot", "full"]))


@pytest.mark.parametrize("weights,told,kept", [("", "", False), ("imagenet", "", True), ("imagenet", '[[entry]]\nname = "start"\nmethod = "source-only"\nsettings = {freeze_bn = false}\n', False)])
def test_entries_keep_the_statistics_that_the_start_has_kept(small, weights, told, kept):
    path = small(told + "".join(f'[[entry]]\nname = "{n}"\nmethod = "mixteacher"\nlabels = "{n}"\nsteps = 200\n' for n in ("none", "1-shot")))
    plan = read_plan(path, networks=("pbal_efficientnet_lite0",), weights=weights)
    bench = open_plan(plan)
    cfgs = {e.name: recipe(bench, e, "pbal_efficientnet_lite0") for e in entries_of(plan, bench.there)}
    assert {n: c.freeze_bn for n, c in cfgs.items() if n != "start"} == {n: kept for n in cfgs if n != "start"} and cfgs["start"].freeze_bn == kept
    assert [(cfgs[n].labels, round(1/(1-cfgs[n].alpha))) for n in ("none", "1-shot")] == [("none", 60 if kept else 20), ("few", 20)]


def test_images_kept_back_are_whole_ends_of_sequences():
    names = [f"{s}_{i:06}" for s in ("0001TP", "0016E5") for i in range(10)][::-1]
    last, rest = kept_back(names, .2, lambda n: n.split("_")[0])
    assert sorted(names[i] for i in last) == ["0001TP_000008", "0001TP_000009", "0016E5_000008", "0016E5_000009"]
    assert sorted(last + rest) == list(range(20))


def test_the_numbers_are_those_of_trainings_by_hand(tmp_path, small):
    "A start and what goes on from it, trained by hand: every mIoU agrees to the last digit, and the page shows the networks that were scored."
    kinds = "".join(f'[[entry]]\nname = "{m}"\nmethod = "{m}"\nlabels = "{k}"\n' for m, k in (("wdass", "point"), ("mixteacher", "1-shot")))
    plan = read_plan(small(kinds), out=str(tmp_path / "plan"))
    bench = open_plan(plan, progress=False, device="cpu")
    entries = [e for e in entries_of(plan, bench.there) if e.name in ("start", "wdass", "mixteacher")]
    work(bench, entries)
    ours = {r["entry"]: r["miou"] for e in entries for r in read_results(bench, entries[0], e, "pbal_small", 0)}

    def trained(name, net, steps, target=None, start="trained", **labels):
        cfg = replace(METHODS[name].fitted(Situation(steps, 2, 49, 65, 19, 4, start, True)), **labels)
        run, about = Train(steps, 2, 0, device="cpu", checkpoint_every=1), dict(net="pbal_small", space=space_to_dict(bench.space))
        return train(Job(METHODS[name], cfg, run, tmp_path / "hand" / name, net, bench.source, target, None, about, progress=False))["net"]
    start = trained("source-only", build_net("pbal_small", 19, None, 0), 3, start="nothing").requires_grad_(True)
    few = PartlyLabelled(bench.target, draw_shots(bench.target.names, 1, 0, group=bench.group))
    nets = {"start": start, "start, AdaBN": adapt_statistics(deepcopy(start), bench.target),
            "wdass": trained("wdass", deepcopy(start), 4, WeakLabels(bench.target, "point", seed=0, least=20), labels="point"),
            "mixteacher": trained("mixteacher", deepcopy(start), 4, few, labels="few")}
    assert ours == {k: measured(bench, net)["miou"] for k, net in nets.items()} and len(set(ours.values())) > 2
    for row in gathered(bench, entries): assert measured(bench, network_of(bench, row))["miou"] == row["miou"]        # what the page shows
    again = rows_for(bench, entries[0], entries[0], "pbal_small", 0)
    assert again[0]["miou"] == ours["start"] and again[0]["megabytes"] is None and again[0]["seconds"] > 0        # scored again, not trained


def test_adabn_feeds_a_network_what_it_asks_for(small):
    """Not every network wants ImageNet's mean and deviation: EfficientNet-Lite's -1..1, for one."""
    bench = open_plan(read_plan(small()), progress=False, device="cpu")
    net = build_net("pbal_small", 19, None, 0)
    net.input_range = "unit"
    ours = _adabn(bench, deepcopy(net)).state_dict()
    want = adapt_statistics(deepcopy(net), bench.target, inputs=lambda x: x.float() / 255).state_dict()
    other = adapt_statistics(deepcopy(net), bench.target).state_dict()
    assert all(ours[k].equal(want[k]) for k in ours) and any(not ours[k].equal(other[k]) for k in ours)


# ---- the command --------------------------------------------------------------------------------------------------------------------------------------


def test_the_smoke_plan(tmp_path, capsys):
    assert main(words(BENCHMARKS / "smoke.toml", tmp_path, "--seeds", 1)) == 0
    said = capsys.readouterr().out
    got = rows(tmp_path / "results.csv")
    names = ["start", "start, AdaBN", "source_only", "source_only, AdaBN", "oracle", "fine_tuning 1-shot", "joint point", "joint point, AdaBN", "joint 1-shot", "joint 1-shot, AdaBN", "pbal warm-up", "pbal BPL",
             "wdass point", "mixteacher 1-shot"]
    assert [n for _, n in got] == names and all(s == "1" for s, _ in got)
    for name, r in got.items():
        assert 0 <= float(r["miou"]) <= 100 and float(r["seconds"]) > 0
        if "AdaBN" not in name[1]: assert float(r["best"]) >= max(float(r["chosen"]), float(r["miou"]))
    table = said[said.index("entry  "):].splitlines()
    assert [w for w in table[0].split() if w != "gap"] == ["entry", "labels", "mIoU", "chosen", "best", "s/step", "MB"] and len(table) == 3 + len(names)
    page = (tmp_path / "report.html").read_text()
    assert all(w in page for w in (*names, "Pictures", "Training", "Set-up", "window.flip_p")) and "nan" not in re.sub(r"base64,[^\"')]+", "", page.split("<body>")[1])
    assert '(max-width: 720px)' in page and f"protonb compare {BENCHMARKS / 'smoke.toml'} --only" not in page and "--seeds 1" in page     # bars of their own for a phone
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
    assert "semaphore" not in shared.stderr, shared.stderr                                # of processes that were ended
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


@pytest.fixture
def own(tmp_path):
    """A plan on files: (function that draws so many scenes into a folder, plan)."""
    def draw(name, n, seed=0):
        streets = Streets(REAL, n, (49, 65), seed)
        for i in range(n):
            for part, a in zip(("x", "y"), (streets[i][0].permute(1, 2, 0).numpy(), streets[i][1].byte().numpy())):
                path = tmp_path / "data" / name / part / f"n{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(a).save(path)
        (tmp_path / "data" / f"{name}.toml").write_text(f'space = "cityscapes"\nimages = {{train = "{name}/x"}}\nlabels = {{train = "{name}/y"}}\n')
    for seed, name in enumerate(("game", "town", "score")): draw(name, 4, seed)
    plan = tmp_path / "own.toml"
    data = "\n".join(f'{k} = "folder:{{root}}/{v}.toml,split=train"' for k, v in dict(source="game", target="town", score="score").items())
    plan.write_text('folder = "seed{seed}"\nshots = []\nweights = "w.safetensors"\n[data]\n' + data + "\n[run]\nstart = 2\nsteps = 2\nbatch = 2\n" + FREE)
    save_file(build_net("pbal_small", 19, seed=5).state_dict(), tmp_path / "w.safetensors")
    return draw, plan


def test_other_images_are_scored_anew_or_refused_wherever_they_lie(own, tmp_path, capsys, monkeypatch):
    draw, plan = own
    monkeypatch.chdir(tmp_path)
    def run(*more, root="data"):
        code = main(words(plan, tmp_path / "out", "--only", "start", "--root", root, *more))
        told = capsys.readouterr()
        return code, re.findall("seed 0, start: [0-9.]+", told.out), told.err
    first = run()
    assert first[0] == 0 and len(first[1]) == 1 and run()[:2] == (0, [])
    draw("score", 7, 2)
    code, scored, _ = run()
    assert code == 0 and len(scored) == 1                                                 # the same name, other images: the row is another
    (tmp_path / "data").rename(tmp_path / "moved,here")
    assert run(root="moved,here")[0] == 0
    save_file(build_net("pbal_small", 19, seed=6).state_dict(), tmp_path / "w.safetensors")
    code, _, err = run(root="moved,here")
    assert code == 2 and re.search(r"config.weights 'w.safetensors \w{12}' -> 'w.safetensors \w{12}'", err)
    save_file(build_net("pbal_small", 19, seed=5).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "moved,here").rename(tmp_path / "data")
    draw("game", 5)
    code, _, err = run()
    assert code == 2 and re.search(r"config.source 'folder,split=train: 4 images, .* -> .* 5 images", err)
    fewer = "folder:{root}/game.toml,split=train,count=4"                       # count is said, so it is another configuration
    code, _, err = run("--source", fewer)
    assert code == 2 and re.search(r"config.source 'folder,split=train: 4 images, names and sizes \w+, labels \w+' -> 'folder,split=train,count=4: 4 images, names and sizes ", err)
    assert run("--source", fewer, "--out", tmp_path / "fewer")[0] == 0
    config = json.loads((tmp_path / "fewer/seed0/start/config.json").read_text())
    assert "count=4: 4 images" in str(config)
    code, _, err = run("--source", fewer.replace("=4", "=0"), "--out", tmp_path / "none")
    assert code == 2 and "count is 0, expected at least 1" in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "none").exists()
    draw("game", 5, 9)
    code, _, err = run("--source", fewer, "--out", tmp_path / "fewer")                     # the same names, other pictures
    assert code == 2 and "config.source 'folder,split=train,count=4: 4 images, names and sizes" in err
    assert main(["compare", str(plan), "--source", fewer]) == 2 and "expected --out DIR as well" in capsys.readouterr().err


@pytest.mark.parametrize("more, says", [('method = "joint"\nlabels = "full"\nsettings = {lr = 1e9, optimizer = "sgd", warm = 0}', "diverged at step"),
    ('method = "joint"\nsteps = 1\nlabels = "full"\nsettings = {lr = 1e10, optimizer = "sgd", warm = 0}', "gives NaN")], ids=["on the way", "in the last step"])
def test_a_training_that_diverges_is_a_row(small, tmp_path, capsys, more, says):
    plan = small(f'[[entry]]\nname = "wild"\n{more}\n')
    assert main(words(plan, tmp_path / "out", "--only", "wild")) == 2
    assert rows(tmp_path / "out/results.csv")["0", "wild"]["note"] == "diverged" and says in capsys.readouterr().out


@pytest.mark.parametrize("share", [.1, 1.])
def test_images_for_choosing_are_some_not_all(small, tmp_path, capsys, share):
    path = small()
    path.write_text(path.read_text().replace("tune = 0.5", f"tune = {share}"))
    assert main(words(path, tmp_path / "out", "--tuning")) == 2
    assert f"[data] tune: {share:g} of each group are {4*int(share)} of 4 images; expected some, not all" in capsys.readouterr().err


def test_shots_that_cannot_be_drawn_are_told(small, capsys):
    path = small("")
    path.write_text(path.read_text().replace("shots = [1]", "shots = [1, 9]"))
    assert open_plan(read_plan(path)).there == ["none", "image", "point", "coarse", "1-shot", "full"]
    assert re.match("note: 9-shot: k is 9 images per group.*; so no entries with it", capsys.readouterr().out)


def test_changed_labels_are_scored_anew_or_refused(own, tmp_path, capsys, monkeypatch):
    _, plan = own
    monkeypatch.chdir(tmp_path)
    def run():
        code = main(words(plan, tmp_path / "out", "--only", "start", "--root", "data"))
        told = capsys.readouterr()
        return code, len(re.findall("seed 0, start: ", told.out)), told.err
    assert run()[:2] == (0, 1) and run()[:2] == (0, 0)
    def paint(path):
        with Image.open(path) as im: Image.new("L", im.size, 0).save(path)
    for path in (tmp_path / "data/score/y").iterdir(): paint(path)
    assert run()[:2] == (0, 1)                                                            # mended masks: another row, the same network
    for path in (tmp_path / "data/town/y").iterdir(): paint(path)
    assert run()[0] == 0                                                                  # the start saw none of these
    for path in (tmp_path / "data/game/y").iterdir(): paint(path)
    code, _, err = run()
    assert code == 2 and re.search(r"config.source 'folder,split=train: 4 images, names and sizes (\w+), labels \w+' -> 'folder,split=train: 4 images, names and sizes \1, labels ", err)


def test_one_network_of_two(small, tmp_path, capsys):
    plan = small()
    plan.write_text('networks = ["pbal_small", "iapc_small"]\n' + plan.read_text().replace("seed{seed}", "{net}/seed{seed}"))
    one = words(plan, tmp_path / "out", "--only", "start", "--seeds", 0, "--networks")
    assert main([*one, "iapc_small"]) == 0 and [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["iapc_small"]
    assert main([*one, "small"]) == 2 and "--networks small: not in" in capsys.readouterr().err
    assert main([*one, "pbal_small"]) == 0                                          # the table is of both
    with open(tmp_path / "out/results.csv", newline="") as f: assert {r["network"] for r in csv.DictReader(f)} == {"pbal_small", "iapc_small"}


def test_without_labels_only_what_needs_none(tmp_path, small, capsys):
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
    ('[[entry]]', '[[entry]]\nname = "IAPC"\nmethod = "iapc"\n[[entry]]', "two entries are called 'IAPC'"),
    ('name = "IAPC"', 'name = "start, AdaBN"', "start, AdaBN is what the table calls another row"),
    ('name = "IAPC"', 'name = "oracle"', "oracle: is iapc with labels none; expected source-only with full"),
    ('"iapc"', '"pbal"\n[[entry]]\nname = "IAPC PST"\nmethod = "iapc"', "IAPC PST is what the table calls another row"),
    ("shots = [1]", 'weights = "imagenet"', "no package carries any for pbal_small"),
    ('name = "IAPC"', f'name = "{"語"*80}"', "words that a folder can be called by"),                              # 240 bytes
    ('name = "IAPC"', 'name = ".."', "words that a folder can be called by"),
    ('"iapc"', '"iapc"\nfolder = "."', "words that a folder can be called by"),
    ('"iapc"', '"iapc"\nsettings = [1]', "settings is (1,); expected a table"),
    ('"iapc"', '"iapc"\nsettings = {labels = "full"}', "expected a table {name = value} without labels"),
    ("shots = [1]", 'networks = ["pbal_small", "pbal_small"]', "expected each once"),
    ("shots = [1]", "weights = 3", "weights is 3; expected a file"),
    ("shots = [1]", "weights = {moon = 'x'}", "or a table of them by network"),
    *(('folder = "seed{seed}"', f"folder = '{f}'", "expected words, {net} and {seed}") for f in ("{net}/{foo}/{seed}", "{net}/{seed}{", "{0}{net}{seed}", "{seed:s}{net}")),
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


def test_more_seeds_than_the_plan_has_folders_for(small, tmp_path, capsys):
    path = small()
    path.write_text(path.read_text().replace('folder = "seed{seed}"', 'folder = "one"'))
    assert main(words(path, tmp_path / "out", "--seeds", 1)) == 2
    assert f"--seeds: {path} has one folder for all, 'one'; expected one with {{seed}}" in capsys.readouterr().err


def test_a_plan_that_is_not_there(tmp_path, capsys):
    assert main(words(tmp_path / "gone.toml", tmp_path / "out")) == 2
    assert f"{tmp_path / 'gone.toml'}: cannot be read" in capsys.readouterr().err


def test_a_file_where_the_runs_are_to_be(small, tmp_path, capsys):
    assert main(words(small(), __file__)) == 2
    said, err = capsys.readouterr()
    assert f"--out {__file__}: is a file; expected a folder" in err and not said
