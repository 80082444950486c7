"""`protonb adapt`: two folders of somebody's own end in an answer; stopped in the middle, in the same one; every mistake is one line."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import protonb.adapt as A
from protonb import mixteacher, source_only
from protonb.cli import main
from protonb.datasets import open_dataset
from protonb.methods import train
from protonb.runs import followed, open_run, read_config, read_scores

COLOURS = dict(ground=(110, 80, 40), wall=(200, 60, 60), sky=(70, 130, 220))
N, H, W = 5, 60, 90


def draw(rng, tint, h=H, w=W):
    """A wall between ground and sky; the target has other light."""
    label, at = np.zeros((h, w), int), lambda a, b, n: int(rng.integers(a, b) * n / 90)
    label[: at(22, 45, h)] = 2
    top, left = at(15, 38, h), at(5, 50, w)
    label[top : h * 5 // 6, left : left + at(20, 35, w)] = 1
    colours = np.array(list(COLOURS.values()))
    return np.clip(colours[label] * tint + rng.normal(0, 12, (h, w, 3)), 0, 255).astype(np.uint8), colours[label].astype(np.uint8), label


def write(root, tint, seed, val=0, points=False, n=N, size=(H, W)):
    """Images and masks in colours, and their description; with `points`, three pixels of each class alone have a label."""
    rng = np.random.default_rng(seed)
    for i in range(n + val):
        split, (image, mask, label) = "train" if i < n else "val", draw(rng, tint, *size)
        if points:
            keep = np.zeros((H, W), bool)
            for k in range(3): keep[tuple(rng.permutation(np.argwhere(label == k))[:3].T)] = True
            mask[~keep] = 0
        for kind, a in (("images", image), ("masks", mask)):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(root / kind / split / f"{seed}_{i}.png")
    splits = ["train", *["val"] * bool(val)]
    lines = [f"{kind} = {{{', '.join(f'{s} = {chr(34)}{folder}/{s}{chr(34)}' for s in splits)}}}" for kind, folder in (("images", "images"), ("labels", "masks"))]
    lines += ["ignore_colours = [[0, 0, 0]]"] * points + ["[classes]", *(f"{name} = {list(c)}" for name, c in COLOURS.items())]
    (root / "data.toml").write_text("\n".join(lines) + "\n")
    return f"folder:{root}/data.toml"


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Specs of a source and a target, few labels, points, and the folder that holds them."""
    root = tmp_path_factory.mktemp("town")
    return dict(root=root, source=write(root / "game", 1.0, 1), target=write(root / "street", 0.6, 2, val=2),
                few=write(root / "few", 0.6, 3, n=2), weak=write(root / "weak", 0.6, 4, points=True))


def run(town, out, *more, source=True, steps=6, net="pbal_small"):
    words = ["adapt", "--target", town["target"], "--out", out, "--steps", steps, "--batch-size", 2, "--device", "cpu", "--images", 2, "--size", "30x45"]
    words += ["--source", town["source"], *(["--net", net] if net else [])] if source else []
    return main([str(w) for w in (*words, *more)])


@pytest.fixture(scope="module")
def whole(town):
    out = town["root"] / "whole"
    assert run(town, out) == 0
    return out


def test_a_count_of_the_target_is_of_its_training_images(town):
    o = A.Adapt(target=f"{town['target']},count=1", source=town["source"], out=Path("unused"), size="30x45")
    d = A.open_domains(o)
    assert len(d.target) == 1 and len(d.val) == 2 and not d.bare


def weights(out):
    return {p.relative_to(out).as_posix(): load_file(p) for p in sorted(out.glob("*/checkpoints/*/*.safetensors"))}


def test_two_folders_end_in_an_answer(town, whole):
    start, adapted = open_run(whole / "start"), open_run(whole / "adapted")
    assert (start.method, start.step, adapted.method, adapted.step) == ("source_only", 4, "mixteacher", 2)
    assert adapted.space.classes == tuple(COLOURS) and (adapted.feed.height, adapted.feed.width) == (30, 45)
    of = read_config(whole / "adapted")[1]["config"]
    assert of["hyper"]["labels"] == "none" and of["source"] == town["source"]
    names = sorted(p.name for p in (whole / "predictions").iterdir())
    assert names == [f"2_{i}_{kind}.png" for i in (0, N - 1) for kind in ("color", "overlay", "trainIds")]
    assert Image.open(whole / "predictions" / names[0]).size == (W, H)
    page = (whole / "report.html").read_text()
    assert "mIoU" in page and "adapted" in page and "protonb adapt" in page and "truth" in page
    assert f"Prototypes: the mean features of the classes in {N} labelled images of the source." in page
    assert not [p for p in whole.rglob("*") if p.name.endswith(".tmp") or p.name == ".lock"]


def fixed(monkeypatch):
    """No steps are measured."""
    monkeypatch.setattr(A, "step_seconds", lambda job: (0.1, 0.0))


def test_three_classes_at_another_size_get_better(tmp_path, capsys):
    """30 and 30 images of 200x300 pixels, masks in colours, light that the source has never seen."""
    source = write(tmp_path / "game", 1.0, 1, n=30, size=(200, 300))
    target = write(tmp_path / "street", np.array([0.5, 0.7, 1.1]), 2, val=8, n=30, size=(200, 300))
    words = ["adapt", "--source", source, "--target", target, "--out", tmp_path / "answer", "--net", "pbal_small", "--size", "100x150", "--steps", 60, "--device", "cpu"]
    assert main([str(w) for w in words]) == 0
    start, adapted = (next(iter(read_scores(tmp_path / "answer" / n, open_run(tmp_path / "answer" / n)).values())).miou for n in ("start", "adapted"))
    assert adapted > start + 0.05
    assert "Without labels, by information maximisation" in (tmp_path / "answer" / "report.html").read_text()


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("module, at", [(source_only, 3), (mixteacher, 1)], ids=["start", "adaptation"])
def test_killed_in_the_middle_it_ends_with_the_same_bits(town, whole, monkeypatch, module, at):
    out, real, seen = town["root"] / f"killed-{at}", module.step, []
    monkeypatch.setattr(A, "CHECKPOINT", 1)
    fixed(monkeypatch)

    def step(*args, **kw):
        seen.append(1)
        if len(seen) > at: raise Killed
        return real(*args, **kw)

    with monkeypatch.context() as m:
        m.setattr(module, "step", step)
        with pytest.raises(Killed): run(town, out)
    assert len(seen) == at + 1 and (out / "adapt.json").exists() and not (out / "report.html").exists()
    assert run(town, out) == 0
    want, got = weights(whole), weights(out)
    for name in want:
        for k, t in want[name].items(): assert t.equal(got[name][k]), (name, k)
    assert {"start", "adapted"} == {name.split("/")[0] for name in want} and (out / "report.html").exists()


def test_stopped_while_measuring_it_says_that_nothing_is_kept(town, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(A.methods, "train", lambda job, *until: dict(step=2, finished=False, stopped=True))
    assert run(town, tmp_path / "out") == 130
    said = capsys.readouterr().out
    assert "stopped while measuring; nothing is kept" in said and "checkpoint" not in said and not (tmp_path / "out" / "adapt.json").exists()


@pytest.mark.parametrize("text", ["[]", '{"asked": {}}', "["*100_000, '{"asked": {}, "steps": [4], "seconds": [[0, 0], [0, 0]], "feed": {}}',
                                  '{"asked": {}, "steps": [4, 2], "seconds": [[0, 0], [0, 0]], "feed": {"height": "high"}}'])
def test_a_damaged_plan_is_named(town, tmp_path, capsys, text):
    (tmp_path / "adapt.json").write_text(text)
    assert run(town, tmp_path) == 2
    err = capsys.readouterr().err
    assert "adapt.json: damaged" in err and len([line for line in err.splitlines() if line.startswith("protonb:")]) == 1


def test_its_folder_is_no_run_and_says_which_are(whole, tmp_path, capsys):
    assert main(["eval", str(whole), "--data", "images:."]) == 2
    assert f"expected one of its runs, {whole / 'adapted'} or {whole / 'start'}" in capsys.readouterr().err


def test_finished_stages_are_kept_and_another_command_is_refused(town, whole, monkeypatch, capsys):
    def never(*args, **kw): raise AssertionError("a finished run is not trained again")
    monkeypatch.setattr(source_only, "step", never)
    monkeypatch.setattr(mixteacher, "step", never)
    assert run(town, whole) == 0
    capsys.readouterr()
    assert run(town, whole, steps=9) == 2
    said, err = capsys.readouterr()
    assert "was begun with --steps 6" in err and not said


def test_no_scores_is_said_after_what_is_wrong(town, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapt.json").write_text("[]")
    bare = ["adapt", "--source", town["source"], "--target", f"images:{town['root']}/street/images/train", "--out", tmp_path / "out", "--device", "cpu", "--net", "pbal_small"]
    assert main([str(w) for w in bare]) == 2
    said, err = capsys.readouterr()
    assert "adapt.json: damaged" in err and not said


def test_its_folder_stands_for_its_runs(town, whole, capsys):
    """The start first; and a split that is named is not named again."""
    spec = f"{town['target']},split=train"
    assert main(["report", str(whole), "--data", spec, "--images", "1", "--explore", "0", "--device", "cpu"]) == 0
    page = (whole / "adapted" / "report.html").read_text()
    assert "<h1>start, adapted</h1>" in page and f"{spec}, {N} images" in page and f"protonb report {whole} --data" in page
    assert f"{spec} val" not in page and spec in read_scores(whole / "start")
    assert main(["validate", str(whole), "--data", spec, "--pixels", "200"]) == 0
    said = capsys.readouterr().out
    assert f"{whole}/start" in said and f"{whole}/adapted" in said


def test_few_labelled_images_of_another_folder(town, whole, monkeypatch):
    fixed(monkeypatch)
    out = town["root"] / "with-few"
    assert run(town, out, "--few", town["few"], "--start", whole / "start", net="", steps=3) == 0
    of = read_config(out / "adapted")[1]["config"]
    assert of["hyper"]["labels"] == "few" and of["images"] == ["3_0", "3_1"] and not (out / "start").exists()


def test_points(town, whole, monkeypatch):
    fixed(monkeypatch)
    out = town["root"] / "with-points"
    assert run(town, out, "--weak", town["weak"], "--labels", "point", "--start", whole / "start", net="", steps=3) == 0
    of = read_config(out / "adapted")[1]["config"]
    assert of["hyper"]["labels"] == "point" and of["weak"] == town["weak"]


def test_no_point_is_lost_when_the_map_gets_smaller(town):
    full = open_dataset(town["weak"])
    small, nearest = (A.at_size(full, 20, points=p) for p in (True, False))
    kept = [[int((ds[i][1] != 255).sum()) for i in range(N)] for ds in (full, small, nearest)]
    assert all(8 <= a <= 9 for a in kept[1]) and kept[0] == [9] * N and sum(kept[2]) < sum(kept[1]) / 2


def test_an_image_in_two_places_counts_once(town):
    target = open_dataset(town["target"])
    few = A.few_shot(target, ["2_1", "2_3"])
    both = A.together(target, few, True)
    assert both.names == ["2_0", "2_2", "2_4", "2_1", "2_3"] and both.few is few
    assert [bool((both[i][1] != 255).any()) for i in range(N)] == [False] * 3 + [True] * 2
    other = A.together(target, open_dataset(town["few"]))
    assert len(other) == N + 2 and not hasattr(other, "few")


def test_source_free_without_any_label(town, whole, monkeypatch, capsys):
    fixed(monkeypatch)
    out = town["root"] / "free"
    words = ["adapt", "--start", whole / "start", "--target", f"images:{town['root']}/street/images/train", "--out", out, "--steps", 3, "--batch-size", 2, "--size", "30x45"]
    assert main([str(w) for w in (*words, "--device", "cpu", "--images", 1)]) == 0
    assert open_run(out / "adapted").method == "iapc" and len(list((out / "predictions").iterdir())) == 3
    page = (out / "report.html").read_text()
    assert "truth" not in page.split("<body>")[1].split("Set-up")[0].replace("what it truly shows where somebody has labelled it", "") and "no scores" in capsys.readouterr().out


@pytest.mark.parametrize("more, says", [
    (["--few", "folder:gone.toml"], "--few folder:gone.toml"), (["--few", "gone.txt"], "--few gone.txt: no such file"),
    (["--target", "."], "perhaps images:."), (["--target", "gone.toml"], "perhaps folder:gone.toml"), (["--weak", "images:gone"], "--labels"), (["--val", "folder:gone.toml"], "--val folder:gone.toml"),
    (["--start", "gone"], "--start gone"), (["--size", "60"], "HEIGHTxWIDTH"), (["--steps", "2"], "--steps"), (["--steps", "6", "--hours", "1"], "one of them"),
    (["--source", "images:."], "--source images:."), (["--target", "folder:gone.toml"], "--target folder:gone.toml"), (["--source", ""], "--source"),
    (["--few", "../train"], "--few ../train: is a folder; expected kind:path, or a text file"), (["--out", __file__], f"--out {__file__}: is a file; expected a folder"),
    *(([f"--{k}", ""], f"--{k} is empty; expected KIND:PATH, or no --{k}") for k in ("few", "weak", "val")), (["--start="], "--start is empty; expected RUN, or no --start"),
    (["--weak", "images:gone", "--labels", "point"], "--weak images:gone"),
    (["--weak", "cityscapes:a,b,count=3", "--labels", "coarse"], "--weak cityscapes:a,b,count=3: count=3: cannot be had with files of weak labels"), (["--few", __file__], f"--few {__file__}: the data set of 5 images"), (["--classes", "none"], "--classes")])
def test_a_mistake_is_one_line_before_anything_is_written(town, tmp_path, monkeypatch, capsys, more, says):
    monkeypatch.chdir(town["root"] / "game" / "images" / "train")
    assert run(town, tmp_path / "out", *more) == 2
    said, err = map(str.strip, capsys.readouterr())
    assert len(err.splitlines()) == 1 and err.startswith("protonb: ") and says in err and not said, (said, err)
    assert more[0] != "--few" or not more[1] or err.count(more[1]) == 1, err          # what was given is said once
    assert not (tmp_path / "out").exists()


def test_hours_become_steps(town, monkeypatch, capsys, tmp_path):
    assert A.steps_for([(1.0, 0.0), (2.5, 0.0)], 0.5, None) == 1200 and A.steps_for([(0.0, 0.0), (2.0, 600.0)], 0.5, Path("x")) == 600
    assert A.split_steps(1200, None) == (800, 400) and A.split_steps(3, None) == (2, 1)
    monkeypatch.setattr(A, "step_seconds", lambda job: (4.0, 0.0))
    assert main(["adapt", "--source", town["source"], "--target", town["target"], "--out", str(tmp_path / "out"), "--hours", "0.001", "--net", "pbal_small",
                 "--device", "cpu", "--batch-size", "2"]) == 2
    assert "--hours 0.001: a step takes 4 s here; expected 0.0034 at least" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("net,weights,kept", [("pbal_mobilenetv2", None, False), ("pbal_efficientnet_lite0", "imagenet", True)])
def test_what_follows_a_start_keeps_statistics_only_if_the_start_has_kept_a_backbones(tmp_path, net, weights, kept):
    words = dict(source="streets:synthetic,count=2,size=65x129", target="streets:real,count=2,size=65x129", net=net, device="cpu")
    o = A.Adapt(out=tmp_path / "out", weights=weights, **words)
    d = A.open_domains(o)
    feed = A.feed_for(o, d)
    first = A.start_job(o, d, feed, 2)
    assert (first.cfg.freeze_bn, A.adapt_job(o, d, feed, 2, first.net, net).cfg.freeze_bn) == (kept, kept)
    if kept:                                                  # a teacher to whom nobody tells a pixel is slower
        known = dict(few={"few": words["target"]}, point={"weak": words["target"], "labels": "point"}, none={})
        told = {k: A.Adapt(out=tmp_path / "out", weights=weights, **words, **more) for k, more in known.items()}
        cfgs = {k: A.adapt_job(t, A.open_domains(t), feed, 200, first.net, net).cfg for k, t in told.items()}
        assert {k: (c.labels, round(1/(1-c.alpha))) for k, c in cfgs.items()} == dict(few=("few", 20), point=("point", 20), none=("none", 60))
    if not kept:                                              # the same from the folder of a run
        train(replace(first, run=replace(first.run, steps=1)))
        later = A.Adapt(out=tmp_path / "later", start=first.run_dir, **(words | dict(net="")))
        d = A.open_domains(later)
        assert followed(first.run_dir) and not A.adapt_job(later, d, feed, 2, d.first.net, net).cfg.freeze_bn
