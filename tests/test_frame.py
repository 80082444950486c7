"""The frame: a method written outside of the package, in thirty lines, is trained, stopped, gone on with, scored, compared and reported by the functions of all others."""
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch

from protonb import methods, runs
from protonb.cli import main, parse
from protonb.core import InputError, rng_for
from protonb.labels import IGNORE
from protonb.recipes import Situation, choice_table, flat, never_heard
from protonb.training import Train
from protonb.windows import Window, check_fits, look

# ------------------------------------------------------------------------------- the method: a file of its own, as a user would write it
TOY = textwrap.dedent('''
    from dataclasses import dataclass
    from torch.nn import functional as F
    from protonb.feeding import Feed
    from protonb.methods import Method, accelerator_of, learn, run_of
    from protonb.optimization import make_optimizer, parameter_groups, polynomial, schedule
    from protonb.recipes import Situation
    from protonb.streams import labelled, paired, unlabelled
    from protonb.transforms import normalize
    from protonb.windows import Window

    @dataclass
    class Toy:
        lr:float = .01                                        # Learning rate
        entropy:float = .1                                    # Weight of the target's entropy
        window:Window = Window(crop_height=32, crop_width=64) # Window of both domains

    def step(net, opt, sched, batch, cfg, backward):
        (x, y),(x_t, _) = batch['source'],batch['target']
        z = F.interpolate(net(normalize(x)), y.shape[1:], mode='bilinear')
        log_p = net(normalize(x_t)).log_softmax(1)
        source,entropy = F.cross_entropy(z, y, ignore_index=255),-(log_p.exp()*log_p).sum(1).mean()
        opt.zero_grad()
        backward(source + cfg.entropy*entropy)
        opt.step(), sched.step()
        return dict(source=source.detach(), entropy=entropy.detach())

    def stage(job):
        acc,opt = accelerator_of(job),make_optimizer('sgd', parameter_groups(job.net.train(), job.cfg.lr), job.cfg.lr)
        (net,opt),sched = acc.prepare(job.net, opt),schedule(opt, polynomial(run_of(job).steps))
        make = paired(source=labelled(job.source, job.cfg.window, job.run.seed), target=unlabelled(job.target, job.cfg.window, job.run.seed))
        return learn(job, lambda b: step(net, opt, sched, b, job.cfg, acc.backward), make, dict(net=net, opt=opt, sched=sched), acc=acc)

    METHOD = Method('toy', 'Source labels, and a target that is to make up its mind.', Toy, (('toy', stage), ('again', stage)), net='iapc_small',
                    often=('lr', 'entropy'), feed=lambda cfg: Feed(height=40), fitted=lambda s: Toy(lr=1/s.steps))
''')
DATA = ["--source", "streets:synthetic,count=6,size=48x96", "--target", "streets:real,count=6,size=48x96", "--device", "cpu", "--batch-size", "2"]
RUNNER = "import sys; import toy; from protonb import runs, cli; runs.METHODS['toy'] = toy.METHOD; sys.exit(cli.main(sys.argv[1:]))"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The module, known to the table of methods while the test runs."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    import toy as module
    monkeypatch.setitem(runs.METHODS, "toy", module.METHOD)
    return module


def command(out, *more, steps="8"):
    return ["train", "toy", *DATA, "--out", str(out), "--steps", steps, "--checkpoint-every", "2", "--log-every", "1", *more]


def test_the_toy_is_short():
    code = [line for line in TOY.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(code) <= 30, len(code)


def test_trained_scored_compared_and_reported(toy, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(out, "--val", "streets:real,count=2,size=48x96")) == 0
    said = capsys.readouterr().out
    assert "lr" in said and "0.125" in said                                    # the recipe is fitted, and says what it chose
    config = json.loads((out / "config.json").read_text())
    assert list(config) == ["toy", "again"] and config["toy"]["config"]["hyper"]["lr"] == .125
    assert config["toy"]["config"]["method"] == "toy" and config["toy"]["config"]["feed"]["height"] == 40
    data = "streets:real,count=2,size=48x96"
    assert main(["eval", str(out), "--data", data, "--flip", "--scales", "0.5", "1.0"]) == 0
    assert list(runs.read_scores(out)) == [f"{data} val", f"{data} val (scales 0.5 1, flip)"]
    assert main(["report", str(out), "--data", data, "--images", "1"]) == 0 and "data:image/png" in (out / "report.html").read_text()
    run = runs.open_run(out, stage="toy")
    assert run.feed.height == 40 and run.segment(torch.zeros(1, 3, 80, 100, dtype=torch.uint8)).shape[2] < 40
    capsys.readouterr()
    assert main(["info", str(out)]) == 0 and "again with iapc_small, step 8 of 8" in capsys.readouterr().out


def test_until_stage_lengths_and_the_same_command_again(toy, tmp_path):
    out = tmp_path / "run"
    assert main(command(out, "--until", "toy")) == 0
    assert {p.name.split("-")[0] for p in (out / "checkpoints").iterdir()} == {"toy"}
    assert main(command(out, "--stage-steps", "again", "3")) == 0
    assert (out / "checkpoints" / "again-0000003").exists() and (out / "checkpoints" / "toy-0000008").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert main(command(out, "--stage-steps", "again", "3")) == 0 and before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def test_killed_and_started_again_it_ends_with_the_same_weights(toy, tmp_path):
    def start(out):
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(runs.__file__).parents[1])]), OMP_NUM_THREADS="1")
        return subprocess.Popen([sys.executable, "-c", RUNNER, *command(out, steps="30")], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert main(command(tmp_path / "whole", steps="30")) == 0
    killed, points = start(tmp_path / "killed"), tmp_path / "killed" / "checkpoints"
    until = time.time() + 120
    while not (points.exists() and any(p.name.startswith("toy-") for p in points.iterdir())):
        assert killed.poll() is None and time.time() < until, f"ended before it could be killed: {killed.stderr.read().decode()[-500:]}"
        time.sleep(.01)
    killed.kill()
    killed.wait()
    assert main(command(tmp_path / "killed", steps="30")) == 0
    for name in ("checkpoints/again-0000030/net.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_help_is_short_first(toy, capsys):
    for words, has, lacks in ((["--help"], ["--entropy", "--help-all", "protonb train toy --source"], ["--window", "--crop-height"]),
                              (["--help-all"], ["--entropy", "--crop-height", "--stage-steps"], [])):
        with pytest.raises(SystemExit) as end: main(["train", "toy", *words])
        said = capsys.readouterr().out
        assert end.value.code == 0 and all(w in said for w in has) and not any(w in said for w in lacks)
    with pytest.raises(SystemExit): main(["train", "--help"])
    assert "toy" in capsys.readouterr().out


@pytest.mark.parametrize("words, told", [([], "no method is named"), (["toyy"], "'toyy' is no method"), (["toy", *DATA, "--out", "x", "--entropy", "much"], "--entropy"),
                                         (["toy", *DATA, "--out", "x", "--until", "tomorrow"], "--until")])
def test_mistakes_are_one_line(toy, words, told, capsys):
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_what_was_said_wins_over_the_recipe(toy):
    o = parse(["train", "toy", *DATA, "--out", "x", "--steps", "4", "--entropy", "0.5"])
    assert (o.hyper.lr, o.hyper.entropy, o.begin) == (.25, .5, "before")
    o = parse(["train", "toy", *DATA, "--out", "x", "--steps", "4", "--lr", "0.5", "--begin", "fresh"])
    assert (o.hyper.lr, o.begin) == (.5, "fresh")
    assert parse(["train", "toy", *DATA, "--out", "x", "--recipe", "released"]).hyper.lr == .01


@pytest.mark.parametrize("name", list(runs.METHODS))
@pytest.mark.parametrize("s", [Situation(400, 4, 97, 193, 19, 200, "trained", True), Situation(200, 2, 360, 480, 11, 367, "imagenet"),
                               Situation(20_000, 4, 1024, 2048, 19, 2975, "imagenet"), Situation(3, 1, 65, 129, 2, 3, "nothing", True)],
                         ids=["streets", "photographs", "city", "least"])
def test_a_fitted_recipe_comes_into_effect(name, s):
    """Every gate opens within the run, every average moves, every window fits."""
    m = runs.METHODS[name]
    cfg = m.fitted(s)
    assert never_heard(cfg, s.steps) == [] or s.steps < 10, never_heard(cfg, s.steps)
    got = flat(cfg)
    for key in ("crop_height", "crop_width"):
        for where, v in got.items():
            if where.endswith(key): assert 0 < v <= 1.1*(s.height if key == "crop_height" else s.width) or (name, v) == ("pixda", 0)   # 0: all of it
    for where, v in got.items():
        if where.split(".")[-1] in ("ema", "alpha") and s.steps > 10 and name in ("iapc", "proda", "wdass") and where != "focal.alpha":
            assert v**s.steps < .1, (where, v)
    assert choice_table(m.settings(), cfg) or cfg == m.settings()


def of_kind(settings, kind):
    "All values of a kind within settings, however deep."
    if isinstance(settings, kind): yield settings
    elif is_dataclass(settings):
        for part in vars(settings).values(): yield from of_kind(part, kind)


@pytest.mark.parametrize("name", list(runs.METHODS))
@pytest.mark.parametrize("size", [(273, 361), (280, 361), (200, 400), (400, 200)], ids=lambda size: "x".join(map(str, size)))
def test_a_fitted_recipe_takes_images_of_another_shape(name, size):
    """A recipe for 185x241 (a plan's `view`, or the other domain) refuses neither 273x361, which is one row short of it, nor a street twice as wide as high."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    class One:
        names = ["a"]
        def __len__(self): return 1
        def __getitem__(self, i): return image, None
    for window in of_kind(runs.METHODS[name].fitted(Situation(200, 4, 185, 241, 11, 367, "trained")), Window):
        check_fits(window, One())
        for i in range(8):
            got, label, _ = look(image, torch.zeros(size).long(), window, rng_for(0, i))
            assert got.shape[1:] == label.shape == (window.crop_height or got.shape[1], window.crop_width or got.shape[2])
            assert (label != IGNORE).any()


def test_an_unknown_stage_is_named(toy, tmp_path):
    job = methods.Job(toy.METHOD, toy.METHOD.settings(), Train(steps=1), tmp_path, None)
    with pytest.raises(InputError, match="has no stage 'x'; expected one of toy, again"): methods.train(job, until="x")
    with pytest.raises(InputError, match="expected 'before' or 'fresh'"): methods.begin(replace(job, begin="later"), "fresh")
