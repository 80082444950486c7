"""Options: every number has its range, and whatever lies outside is one line that names the option, exit code 2, and nothing left behind."""
import math
import random
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Literal, get_args, get_origin

import pytest

from protonb import cli, data_tools, pages
from protonb.core import InputError
from protonb.dip import DIP
from protonb.feeding import TestTime
from protonb.methods import Job, train
from protonb.options import options_of
from protonb.runs import METHODS
from protonb.settings import Range, Whole, check, checked_dataclass, fits
from protonb.training import Train
from protonb.words import option_kinds


S, T = "streets:synthetic,count=2,size=64x128", "streets:real,count=2,size=64x128"
WRONG = ["nan", "inf", "-inf", "0", "-1", "-0.5", "1e30", "1e9999", "2.5", str(10**30), "many", ""]


def needed(m):
    """The words that a method must be given."""
    start = ["--source", S] if m.source == "labelled" else ["--start", "none"]
    return ["train", m.name, *start, *(["--target", T] if m.target != "none" else []), "--out", "run"]


COMMANDS = {m.name: (needed(m), options_of(m)) for m in METHODS.values()}
COMMANDS |= {"demo": (["demo", "--out", "run"], cli.Demo), "eval": (["eval", "run", "--data", T], cli.Eval),
             "predict": (["predict", "run", "photos", "--out", "out"], cli.Predict), "report": (["report", "run", "--data", T], cli.Report),
             "prototypes": (["prototypes", "run", "--target", T], cli.MakePrototypes)}
COMMANDS |= {"weaken": (["data", "weaken", T, "--labels", "point", "--out", "new"], data_tools.Weaken),
             "fewshot": (["data", "fewshot", T, "--out", "few.txt", "--shots", "1"], data_tools.FewShot)}


def numbers(kind):
    """The types of the numbers in a type, with their range where they have one."""
    args = get_args(kind)
    if kind in (int, float): return [kind]
    if get_origin(kind) is Annotated:
        return [kind] if args[0] in (int, float) and any(isinstance(a, Range) for a in args) else numbers(args[0])
    return [] if get_origin(kind) is Literal else [n for a in args for n in numbers(a)]


def typed(word, kind):
    """A word as the type of a number has it; itself where it is none."""
    try: return int(word) if get_args(kind)[0] is int else float(word)
    except ValueError: return word


def test_every_number_has_its_range():
    bare = [(name, option) for name, (_, cls) in COMMANDS.items() for _, option, kind in option_kinds(cls)
            if any(n in (int, float) for n in numbers(kind))]
    assert not bare, bare


def wrong_words(rng):
    """A command, an option of it, and a value that it cannot have."""
    while True:
        name = rng.choice(sorted(COMMANDS))
        words, cls = COMMANDS[name]
        option, kind = rng.choice([(o, k) for _, o, k in option_kinds(cls) if numbers(k) and o.startswith("--") and o != "--stage-steps"])
        word = rng.choice(WRONG)
        inner = [a for a in (kind, *get_args(kind)) if get_origin(a) is tuple]
        fixed = inner and ... not in get_args(inner[0])
        given = [word]*len(get_args(inner[0])) if fixed else [word]
        if not fits(kind, word) and not any(fits(n, typed(word, n)) for n in numbers(kind)): return [*words, option, *given], option


def refused(words, option, capsys):
    """Exit code 2, one line that names the option and what was expected."""
    assert cli.main(words) == 2, words
    err = capsys.readouterr().err
    assert err.startswith("protonb: ") and err.count("\n") == 1 and "Traceback" not in err and "tyro" not in err, (words, err)
    assert option in err and "expected" in err, (words, err)


def test_a_hundred_wrong_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(16)
    for _ in range(100):
        refused(*wrong_words(rng), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, option", [
    ("demo --height 66", "--height is 66"), ("demo --seeds 0", "--seeds is 0"),
    ("eval run --data x --window 8 8 --stride 9 9", "--stride is (9, 9), --window is (8, 8)"), ("eval run --data x --scales", "--scales is ()"),
    ("train pbal --source S --target T --out r --recipe released --hyper.pst.window.low 3", "--hyper.pst.window.low is 3.0, --hyper.pst.window.high is 1.5"),
    ("train pbal --source S --target T --out r --stage-steps bpl 0", "--stage-steps"), ("train dip --source S --target T --out r --device gpu", "--device is gpu"),
    ("train wdass --source S --target T --out r --source-height 0 --recipe released", "--source-height is 0, --source-width is 1280"),
    ("train iapc --start s --target T --out r --recipe released --crop-height 600", "--crop-height is 600, --base-height is 640"),
    ("train dip --source S --target T --out r --scale-low 3", "--scale-low is 3.0, --scale-high is 1.1"),
    ("train pixda --source S --target T --out r --base-height 0 --base-width 0 --building 255", "--building is 255"),
    ("train proda --source S --target T --out r --hyper.warm-up.betas .9", "--hyper.warm-up.betas"), ("report --data x", "report: no run is named; expected 1 to 64 run folders"),
    ("validate --data x", "validate: no run is named")])
def test_contradictions_and_missing_values(words, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(words.replace(" S ", f" {S} ").replace(" T ", f" {T} ").split(), option, capsys)
    assert not list(tmp_path.iterdir())


def parts(settings):
    yield settings
    for f in fields(settings):
        if is_dataclass(value := getattr(settings, f.name)): yield from parts(value)


def test_the_same_in_python():
    """Each number of each settings class, with each wrong value."""
    every = [m.settings() for m in METHODS.values()] + [Train(), pages.Demo(), TestTime()]
    tried = 0
    for settings in (p for s in every for p in parts(s)):
        for f in fields(settings):
            if not numbers(f.type): continue
            for wrong in (math.nan, math.inf, -math.inf, -10**6, 1e30, "many", [], True, object()):
                if isinstance(wrong, str) and str in get_args(f.type): continue     # PixDA's class by its name
                assert not fits(f.type, wrong), (type(settings), f.name, wrong)
                with pytest.raises(InputError, match=f"^{f.name} is .*expected"): replace(settings, **{f.name: wrong})
                tried += 1
    assert tried > 1000


def test_settings_that_were_changed_afterwards_are_refused_too(tmp_path):
    for change, words in ((lambda cfg, run: setattr(cfg, "lr", math.nan), "lr is nan"), (lambda cfg, run: setattr(run, "steps", 0), "steps is 0")):
        cfg, run = DIP(), Train(device="cpu")
        change(cfg, run)
        with pytest.raises(InputError, match=words):
            train(Job(METHODS["dip"], cfg, run, tmp_path / "run", None))
    assert not list(tmp_path.iterdir())


def test_parts_in_parts_are_named_by_their_path():
    @checked_dataclass
    class Inner:
        n: Whole(1, 3) = 1

    @checked_dataclass
    class Outer:
        inner: Inner = None
        several: tuple[Whole(1, 3), ...] = ()

        def agree(self): yield self.inner.n >= len(self.several), "inner.n several", "no more than n"

    with pytest.raises(InputError, match=r"^inner.n is 1, several is \(1, 1\); expected no more than n"): Outer(Inner(), (1, 1))
    with pytest.raises(InputError, match="inner is 3; expected a Inner"): Outer(3)
    ok = Outer(Inner(3), (1, 2))
    ok.inner.n = 7
    with pytest.raises(InputError, match="--inner.n is 7; expected a whole number from 1 to 3"): check(ok, lambda path: "--" + ".".join(path))
