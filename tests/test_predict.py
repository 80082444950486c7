"""predict on real folders: every image once, nothing that is no image, nobody else's pictures, and what cannot be read is told at the end."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from protonb.cli import find_images, main
from protonb.core import InputError
from protonb.datasets import open_dataset
from protonb.evaluation import confidence_map, evaluate, label_ids, predict_files, stamp_of
from protonb.feeding import TestTime
from protonb.labels import CAMVID, CITYSCAPES, CITYSCAPES16
from protonb.palettes import safe
from protonb.runs import open_run, read_scores, ready


def shell(*words): return main([str(w) for w in words])


def train(out, data, *more):
    return shell("train", "source-only", "--source", data, "--out", out, "--net", "iapc_small", "--steps", 2, "--batch-size", 2, "--crop-height", 33,
                 "--crop-width", 33, "--device", "cpu", "--checkpoint-every", 1, *more)


STREETS = "streets:real,count=2,size=48x64"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their weights."""
    home = tmp_path_factory.mktemp("runs")
    for i in range(2): assert train(home / f"r{i}", STREETS, "--seed", i) == 0
    return home


def picture(seed, size=(48, 64)): return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(picture(len(name))).save(tmp_path / "in" / name)
    return tmp_path / "in"


def written(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*_trainIds.png"))


@pytest.mark.parametrize("ending", ["tif", "tiff", "TIF", "bmp", "BMP", "webp", "JPEG", "PNG"])
def test_usual_endings_are_found(ending, tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / f"x.{ending}")
    assert [n for n, _ in find_images(tmp_path)] == ["x"]


def test_hidden_files_and_folders_are_no_images(runs, photos, tmp_path):
    (photos / "._a.jpg").write_bytes(b"\0\5\x16\7 Mac OS X")
    (photos / ".DS_Store.png").write_bytes(b"x")
    (photos / ".thumbnails").mkdir()
    shutil.copy(photos / "a.jpg", photos / ".thumbnails" / "c.jpg")
    (photos / "notes.txt").write_text("no image")
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 0
    assert written(tmp_path / "p") == ["a_trainIds.png", "b_trainIds.png"]


@pytest.mark.parametrize("names,want", [(["a.jpg", "a.png"], ["a.jpg", "a.png"]), (["a.jpg", "a.png", "a.bmp", "b.png"], ["a.bmp", "a.jpg", "a.png", "b"]),
                                        (["s/a.jpg", "t/a.jpg"], ["s/a", "t/a"]), (["s/a.jpg", "s/a.JPG"], ["s/a.JPG", "s/a.jpg"]),
                                        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.jpg.png", "a.png"])])
def test_no_file_is_lost_to_an_equal_stem(names, want, tmp_path):
    for i, n in enumerate(names):
        (tmp_path / n).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / n)
    found = find_images(tmp_path)
    assert sorted(n for n, _ in found) == sorted(want) and sorted(p.relative_to(tmp_path).as_posix() for _, p in found) == sorted(names)


@pytest.mark.parametrize("first,second", [("a.jpg", "a.png"), ("häuser 1.png", "häuser 1.tif")])
def test_a_later_call_does_not_take_the_place_of_another_image(first, second, runs, tmp_path, capsys):
    for i, n in enumerate((first, second)): Image.fromarray(picture(i)).save(tmp_path / n)
    say = lambda name, *more: shell("predict", runs / "r0", tmp_path / name, "--out", tmp_path / "p", "--device", "cpu", *more)
    assert say(first) == 0 and say(second) == 2
    said = capsys.readouterr().err
    assert f"is the prediction of {first}" in said and "--overwrite" in said
    assert say(first) == 0 and "0 images written" in capsys.readouterr().out and say(second, "--overwrite") == 0


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "far" / "x.png")
    os.symlink(tmp_path / "far", tmp_path / "in" / "near")
    os.symlink(tmp_path / "in", tmp_path / "in" / "again")
    assert [n for n, _ in find_images(tmp_path / "in")] == ["near/x"]


@pytest.mark.parametrize("out", ["in/seen", "in/deep/seen", "in"])
def test_predictions_are_no_images(out, runs, photos, tmp_path, capsys):
    out = tmp_path / out
    for _ in range(2): assert shell("predict", runs / "r0", photos, "--out", out, "--device", "cpu") == 0
    assert "0 images written, 2 were there" in capsys.readouterr().out
    assert len([p for p in photos.rglob("*.*")]) == 2 + 6
    if out != photos:                            # written before pictures had stamps
        for p in out.rglob("*.png"): Image.open(p).copy().save(p)
        assert sorted(n for n, _ in find_images(photos, out)) == ["a", "b"]


def test_an_image_that_looks_like_a_prediction_is_one_and_is_never_overwritten(runs, photos, tmp_path, capsys):
    Image.fromarray(picture(7)).save(photos / "a_color.png")
    before = (photos / "a_color.png").read_bytes()
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 0
    assert written(tmp_path / "p") == ["a_color_trainIds.png", "a_trainIds.png", "b_trainIds.png"]
    assert shell("predict", runs / "r0", photos, "--out", photos, "--device", "cpu") == 2
    assert "a_color.png: is one of the images" in capsys.readouterr().err and (photos / "a_color.png").read_bytes() == before


def same(a, b): return a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("more", [[], ["--flip"], ["--window", 33, 33], ["--scales", .5, 1], ["--format", "trainIds", "confidence"]])
def test_pictures_of_another_network_or_look_are_written_anew(more, runs, photos, tmp_path, capsys):
    say = lambda run, out, *m: shell("predict", runs / run, photos, "--out", tmp_path / out, "--device", "cpu", *m)
    assert say("r1", "own", *more) == 0 and say("r0", "both") == 0
    capsys.readouterr()
    assert say("r1", "both", *more) == 0 and "2 images written, 0 were there" in capsys.readouterr().out
    assert all(same(p, tmp_path / "both" / p.name) for p in (tmp_path / "own").iterdir())
    assert say("r1", "both", *more) == 0 and "0 images written, 2 were there" in capsys.readouterr().out
    if more and "--format" not in more:
        assert say("r1", "both") == 0 and "2 images written" in capsys.readouterr().out      # the plain look again


def test_pictures_of_another_network_in_other_formats_are_told(runs, photos, tmp_path, capsys):
    say = lambda run, *m: shell("predict", runs / run, photos, "--out", tmp_path / "p", "--device", "cpu", *m)
    assert say("r0", "--format", "trainIds", "confidence") == 0 and "note" not in capsys.readouterr().out
    assert say("r0", "--format", "color") == 0 and "note" not in capsys.readouterr().out                  # of the same network
    assert say("r1", "--format", "color") == 0 and "note: 2 of them have pictures of another network" in capsys.readouterr().out
    assert say("r1", "--format", "trainIds", "confidence") == 0 and "note" not in capsys.readouterr().out


def test_an_image_that_changed_is_predicted_again(runs, photos, tmp_path, capsys):
    say = lambda: shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu")
    assert say() == 0
    Image.fromarray(picture(99)).save(photos / "b.png")
    assert say() == 0 and "1 image written, 1 were there" in capsys.readouterr().out


def test_a_run_that_was_trained_on_has_other_pictures_and_other_scores(runs, photos, tmp_path, capsys):
    shutil.copytree(runs / "r0", tmp_path / "r")
    newest = sorted((tmp_path / "r" / "checkpoints").iterdir())
    shutil.move(newest[-1], tmp_path / "later")
    say = lambda: shell("predict", tmp_path / "r", photos, "--out", tmp_path / "p", "--device", "cpu")
    report = lambda: shell("report", tmp_path / "r", "--data", STREETS, "--images", 1, "--device", "cpu")
    assert say() == 0 and shell("eval", tmp_path / "r", "--data", STREETS, "--device", "cpu") == 0
    kept = lambda: json.loads((tmp_path / "r" / "scores.json").read_text())[f"{STREETS} val"]["of"]
    first = kept()
    shutil.move(tmp_path / "later", newest[-1])
    capsys.readouterr()
    assert say() == 0 and "2 images written" in capsys.readouterr().out
    assert read_scores(tmp_path / "r", open_run(tmp_path / "r")) == {} and report() == 0
    assert (first["step"], kept()["step"]) == (1, 2) and first["weights"] != kept()["weights"] == open_run(tmp_path / "r").id
    capsys.readouterr()
    assert report() == 0 and "labelled pixels" not in capsys.readouterr().out      # these are its own and need not be computed


def test_scores_without_an_origin_are_computed_anew(runs, tmp_path, capsys):
    shutil.copytree(runs / "r0", tmp_path / "r")
    assert shell("eval", tmp_path / "r", "--data", STREETS, "--device", "cpu") == 0
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    for d in scores.values(): d.pop("of")
    (tmp_path / "r" / "scores.json").write_text(json.dumps(scores))
    capsys.readouterr()
    assert shell("report", tmp_path / "r", "--data", STREETS, "--images", 1, "--device", "cpu") == 0 and "labelled pixels" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"c.png": b"no image"}, {"0.jpg": b"\xff\xd8\xff cut"}, {"c.png": b"", "d.tif": b"II*\0"}, {"c_color.png": None}])     # None: a link to itself
def test_a_damaged_image_does_not_stop_the_others(bad, runs, photos, tmp_path, capsys):
    for name, data in bad.items(): (photos / name).write_bytes(data) if data else os.symlink(name, photos / name)
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 2
    said = capsys.readouterr()
    assert written(tmp_path / "p") == ["a_trainIds.png", "b_trainIds.png"] and "2 images written" in said.out
    assert all(name in said.err for name in bad) and said.err.count("protonb:") == 1 and "Traceback" not in said.err
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 2 and "2 were there" in capsys.readouterr().out


def test_sixteen_bit_images_are_refused_as_in_training(runs, photos, tmp_path, capsys):
    Image.fromarray((np.arange(48*64).reshape(48, 64)*20).astype(np.uint16)).save(photos / "deep.png")
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 2
    assert "deep.png" in capsys.readouterr().err and len(written(tmp_path / "p")) == 2


def test_formats(runs, photos, tmp_path, capsys):
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu", "--format", "trainIds", "labelIds", "confidence") == 0
    assert len(list((tmp_path / "p").iterdir())) == 6
    raw, ids, sure = (np.asarray(Image.open(tmp_path / "p" / f"b_{k}.png")) for k in ("trainIds", "labelIds", "confidence"))
    assert np.array_equal(label_ids(CITYSCAPES)[raw], ids) and ids.max() <= 33
    run = open_run(runs / "r0")
    z = ready(run)(torch.from_numpy(picture(5)).permute(2, 0, 1)[None])[0]
    assert np.array_equal(sure, (255*confidence_map(z, (48, 64))).round().byte().numpy()) and sure.min() >= 255//19
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "q", "--device", "cpu", "--format", "labels") == 2
    assert not (tmp_path / "q").exists()


def test_label_ids_are_those_of_the_server():
    assert label_ids(CITYSCAPES16)[:16].tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 23, 24, 25, 26, 28, 32, 33]
    with pytest.raises(InputError, match="none of Cityscapes"): label_ids(CAMVID)


def test_label_ids_of_other_classes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="trainIds"):
        predict_files(lambda x: torch.zeros(1, 11, 4, 4), [("a", picture(0))], tmp_path / "p", CAMVID, formats=("labelIds",), progress=False)
    assert not (tmp_path / "p").exists()


def test_several_at_a_time_are_the_same_pictures(runs, tmp_path):
    run, sizes = open_run(runs / "r0"), []
    items = [(f"{i}", picture(i, (48, 64) if i % 5 else (40, 64))) for i in range(8)]
    def counting(x):
        sizes.append(len(x))
        return ready(run, TestTime())(x)
    for many, out in ((1, "one"), (3, "three")):
        predict_files(counting, items, tmp_path / out, CITYSCAPES, progress=False, at_once=many, formats=("trainIds",))
    assert sizes == [1]*8 + [1, 3, 1, 1, 2]
    for i in range(8):
        a, b = (np.asarray(Image.open(tmp_path / out / f"{i}_trainIds.png")) for out in ("one", "three"))
        assert (a == b).mean() > .999         # a batch may add in another order


def test_short_of_memory_fewer_go_together(tmp_path):
    tried = []
    def narrow(x):
        tried.append(len(x))
        if len(x) > 1: raise torch.OutOfMemoryError("full")
        return x.float()
    items = [(f"{i}", picture(i)) for i in range(4)]
    assert predict_files(narrow, items, tmp_path, CAMVID, progress=False, at_once=4)["written"] == 4 and tried == [4, 2, 1, 1, 2, 1, 1]
    def full(x): raise torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError): predict_files(full, items, tmp_path / "x", CAMVID, progress=False, at_once=4)


def test_a_stamp_belongs_to_predictions_only(runs, photos, tmp_path):
    assert shell("predict", runs / "r0", photos, "--out", tmp_path / "p", "--device", "cpu") == 0
    stamps = {stamp_of(p) for p in (tmp_path / "p").iterdir()}
    assert len(stamps) == 2 and "" not in stamps and stamp_of(photos / "b.png") == stamp_of(photos) == ""


def test_adabn_for_scores_and_pictures(runs, photos, tmp_path, capsys):
    """The norms take the statistics of unlabelled images; scores and pictures know of it, and the weights stay whose they are."""
    from protonb.teachers import adapt_statistics
    data, folder = "streets:real,count=4,size=48x64", f"images:{photos}"
    run = shutil.copytree(runs / "r0", tmp_path / "r")
    assert shell("eval", run, "--data", data, "--device", "cpu") == 0
    assert shell("eval", run, "--data", data, "--adabn", folder, "--device", "cpu") == 0
    plain, adapted = (read_scores(run, open_run(run))[f"{data} val{how}"] for how in ("", f" (AdaBN {folder})"))
    assert plain.cm.sum() == adapted.cm.sum() > 0
    by_hand, opened, x = open_run(run), open_run(run), open_dataset(data)[0][0][None]
    before = ready(opened)(x)
    adapt_statistics(by_hand.net, open_dataset(folder))
    assert torch.equal(ready(opened, TestTime(adabn=folder))(x), ready(by_hand)(x)) and not torch.equal(before, ready(by_hand)(x))
    assert torch.equal(evaluate(ready(by_hand), open_dataset(data, "val"), progress=False).cm, adapted.cm)
    for more in ([], ["--adabn", folder]):
        assert shell("predict", run, photos, "--out", tmp_path / "p", "--device", "cpu", *more) == 0
        assert "2 images written" in capsys.readouterr().out
    assert shell("eval", run, "--data", data, "--adabn", "images:nowhere", "--device", "cpu") == 2


def test_safe_colours_change_colours_alone(runs, photos, tmp_path, capsys):
    """The ids stay, the palette is another one, overlays differ, and pictures in other colours are not taken for done."""
    for name in ("standard", "safe"):
        assert shell("predict", runs / "r0", photos, "--out", tmp_path / name, "--device", "cpu", "--palette", name) == 0
    read = lambda name, kind: Image.open(tmp_path / name / f"a_{kind}.png")
    a, b = read("standard", "color"), read("safe", "color")
    assert (np.array(a) == np.array(b)).all() and a.getpalette()[:57] == [v for c in CITYSCAPES.palette for v in c]
    assert b.getpalette()[:57] == [v for c in safe(CITYSCAPES).palette for v in c]
    assert (np.array(read("standard", "trainIds")) == np.array(read("safe", "trainIds"))).all()
    assert (np.array(read("standard", "overlay")) != np.array(read("safe", "overlay"))).any()
    again = lambda *more: shell("predict", runs / "r0", photos, "--out", tmp_path / "safe", "--device", "cpu", *more)
    capsys.readouterr()
    assert again("--palette", "safe") == 0 and "2 were there" in capsys.readouterr().out
    assert again() == 0 and "2 images written, 0 were there" in capsys.readouterr().out
    assert again("--palette", "pretty") == 2 and "--palette" in capsys.readouterr().err


def test_a_report_in_safe_colours(runs, tmp_path):
    page = {}
    for name in ("standard", "safe"):
        words = "report", runs / "r0", runs / "r1", "--data", STREETS, "--images", 1, "--explore", 1, "--device", "cpu", "--out", tmp_path / f"{name}.html"
        assert shell(*words, "--palette", name) == 0
        page[name] = (tmp_path / f"{name}.html").read_text()
    ours = [f"background:rgb{c}" for c in safe(CITYSCAPES).palette]
    theirs = [f"background:rgb{c}" for c in CITYSCAPES.palette]
    for name, mine, others in (("standard", theirs, ours), ("safe", ours, theirs)):
        assert all(c in page[name] for c in mine) and not any(c in page[name] for c in others)
