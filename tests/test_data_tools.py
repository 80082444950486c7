"""`protonb data`: every planted fault is named in one run, the tables are true, and what is written can be opened again."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protonb.cli import main, parse
from protonb.data_tools import check_data, check_table
from protonb.datasets import open_dataset, splits_of
from protonb.labels import CITYSCAPES, CITYSCAPES_IDS
from protonb.options import open_target
from protonb.weak_labels import WeakLabels, cityscapes_weak, pick_points
from protonb.core import InputError, rng_for

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STREETS = "streets:synthetic,count=8,size=65x129"


def save(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)


def photo(seed, size=(40, 60)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def mask(*ids, size=(40, 60)):
    """Vertical stripes of ids."""
    return np.broadcast_to(np.array(ids, np.uint8)[np.arange(size[1]) * len(ids) // size[1]], size).copy()


TOML = """images = {train = "photos/train", val = "photos/val"}
labels = {train = "masks/train", val = "masks/val"}
[classes]
ground = [0, 0, 0]
house = [255, 0, 0]
tree = [0, 255, 0]
[ids]
0 = "ground"
1 = "house"
2 = "tree"
255 = "ignore"
"""


@pytest.fixture
def town(tmp_path):
    """Twenty photos in two splits, of which all is well; 8 names have no underscore and no city."""
    for i in range(20):
        split = "train" if i < 14 else "val"
        save(tmp_path / "photos" / split / f"p{i:02d}.png", photo(i))
        save(tmp_path / "masks" / split / f"p{i:02d}.png", mask(0, 1, 2, 255))
    (tmp_path / "town.toml").write_text(TOML)
    return tmp_path


def test_a_good_folder_has_no_fault(town, capsys):
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 0
    out = capsys.readouterr().out
    assert "nothing is wrong" in out and "40x60 (14)" in out and "75.00" in out


def plant(town):
    """Fifteen faults and what must be said of each: (kind, name of the file or class)."""
    p, m = town / "photos", town / "masks"
    (p / "train" / "p00.png").write_bytes((p / "train" / "p00.png").read_bytes()[:500])
    (p / "train" / "p01.png").write_text("no picture at all")
    deep = np.random.default_rng(0).integers(0, 60000, (40, 60)).astype(np.uint16)
    Image.fromarray(deep).save(p / "train" / "p02.png")
    (m / "train" / "p03.png").write_bytes((m / "train" / "p03.png").read_bytes()[:50])
    Image.fromarray(mask(0, 1, 2)).save(m / "train" / "p04.png", "JPEG")
    save(m / "train" / "p05.png", mask(0, 1, 77))
    save(m / "train" / "p06.png", mask(0, 1, 2, size=(20, 30)))
    save(m / "train" / "p07.png", mask(0, 1, 2, size=(60, 40)))
    (m / "train" / "p08.png").unlink()
    save(m / "train" / "q09.png", mask(0, 1, 2))
    save(p / "train" / "p10.bmp", photo(50))
    shutil.copy(p / "train" / "p11.png", town / "same.png")
    Image.open(town / "same.png").save(p / "val" / "p14.png", compress_level=1)
    names = [f"p{i:02d}" for i in range(14, 20)]
    (town / "val.txt").write_text("\n".join([*names, "ghost12", "p15"]))
    toml = TOML.replace("[classes]", 'lists = {val = "val.txt"}\n[classes]\nrocket = [9, 9, 9]')
    (town / "town.toml").write_text(toml + '3 = "rocket"\n9 = "house"\n')
    return {("unreadable image", "p00.png"), ("unreadable image", "p01.png"), ("unreadable image", "p02.png"),
            ("unreadable label", "p03.png"), ("unreadable label", "p04.png"), ("unknown id", "p05.png"), ("sizes differ", "p06.png"),
            ("sizes differ", "p07.png"), ("image without label", "p08.png"), ("label without image", "q09.png"),
            ("two of one name", "p10"), ("equal images", "p14.png"), ("name in a list", "ghost12"), ("name in a list", "p15"),
            ("class without a pixel", "rocket"), ("id never seen", "9 of the table (house)")}


def test_fifteen_planted_faults_are_named_in_one_run(town, capsys):
    planted = plant(town)
    assert len(planted) >= 15
    assert main(["data", "check", f"folder:{town}/town.toml", "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["faults"]
    for kind, name in planted:
        assert any(f["kind"] == kind and name in f["message"] for f in faults), (kind, name, faults)
    odd = [f for f in faults if not any(f["kind"] == kind and name in f["message"] for kind, name in planted)]
    assert not odd, odd
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 2
    text = capsys.readouterr().out
    assert all(name in text for _, name in planted)


def test_one_cause_is_one_line_and_hardly_a_pixel_is_a_note(town, capsys):
    label = mask(0, 1, size=(40, 60))
    for i in range(20): save(town / "masks" / ("train" if i < 14 else "val") / f"p{i:02d}.png", label)
    label[0, 0] = 2
    save(town / "masks/train/p00.png", label)
    for i in range(3, 6):
        label[:i, 0] = 77                                     # as many pixels in no two files
        save(town / f"masks/train/p{i:02d}.png", label)
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 2
    text = capsys.readouterr().out
    assert "class tree has only 1 pixel, in 1 image of split train" in text and re.search(r"tree +<0.01 +0.00", text)
    assert "4 things are wrong, of 2 kinds:" in text             # and tree is in no label of val
    line, = (line for line in text.splitlines() if "unknown id" in line)
    assert "p03.png: unknown label id 77" in line and line.endswith("; the same of 2 more: p04.png, p05.png")
    main(["data", "check", f"folder:{town}/town.toml", "--json"])
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 4


def test_masks_with_a_tail_are_one_cause_that_names_the_key(town, capsys):
    for p in (town / "masks").rglob("*.png"): p.rename(p.with_name(f"{p.stem}_mask.png"))
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 2
    text = capsys.readouterr().out
    assert 'names there end in _mask.png: label_suffix = "_mask.png" takes them' in text and "; the same of 13 more: p01.png" in text and "percent" in text
    assert "ground" not in text.split("labelled")[0], "a table of zeros where no label was read"
    (town / "town.toml").write_text('label_suffix = "_mask.png"\n' + TOML)
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 0


@pytest.mark.parametrize("change, says", [
    (lambda t: t.replace("[ids]", "ignore_colours = [[1, 2, 3]]\n[ids]"), "ignore_colours stands in [classes]; expected it above"),
    (lambda t: t.replace("[ids]", "nearest = true\n[ids]"), "nearest stands in [classes]; expected it above"),
    (lambda t: t.replace("[0, 255, 0]", "[255, 0, 0]").split("[ids]")[0], "is a mask in colours, and house and tree have the same; expected one for each class"),
    (lambda t: "ignore_colours = [[0, 0, 0]]\n" + t.split("[ids]")[0], "is a mask in colours, and ground and ignore_colours have the same"),
])
def test_what_a_description_gets_wrong_about_classes(town, capsys, change, says):
    (town / "town.toml").write_text(change(TOML))
    for p in (town / "masks").rglob("*.png"): save(p, np.stack([mask(0, 255)] + [mask(0, 0)]*2, -1))
    assert main(["data", "check", f"folder:{town}/town.toml"]) == 2
    assert says in capsys.readouterr().out


def test_a_file_with_two_faults_tells_both(town):
    save(town / "masks" / "train" / "p05.png", mask(0, 77, size=(20, 30)))
    (town / "masks" / "train" / "p06.png").write_text("no mask")
    (town / "photos" / "train" / "p06.png").write_text("no photo")
    found = {(f.kind, Path(f.file).parts[-3], Path(f.file).name) for f in check_data(f"folder:{town}/town.toml", quiet=True).faults}
    assert found == {("unknown id", "masks", "p05.png"), ("sizes differ", "masks", "p05.png"),
                     ("unreadable label", "masks", "p06.png"), ("unreadable image", "photos", "p06.png")}


def test_names_that_no_figure_can_read_as_they_are(town, capsys):
    for part in ("photos", "masks"): (town / part / "train/p00.png").rename(town / part / "train/i$_{$.png")
    (town / "town.toml").write_text(TOML.replace("house", "'a$_{$b'").replace("\"'a$_{$b'\"", '"a$_{$b"'))
    assert main(["data", "check", f"folder:{town}/town.toml", "--out", str(town / "looked")]) == 0
    assert "nothing is wrong" in capsys.readouterr().out and (town / "looked/overlays.png").is_file()


def test_a_split_without_its_folder_does_not_hide_the_other(town):
    shutil.rmtree(town / "masks" / "val")
    (town / "photos" / "train" / "p00.png").write_text("no photo")
    (town / "photos" / "val" / "p19.png").write_text("no photo")
    c = check_data(f"folder:{town}/town.toml", quiet=True)
    assert [(f.kind, f.split) for f in c.faults] == [("split cannot be opened", "val"), ("unreadable image", "train"),
                                                     ("unreadable image", "val")]


def test_masks_of_two_splits_in_one_folder_are_not_alone(town):
    for p in (town / "masks" / "val").iterdir():
        p.rename(town / "masks" / "train" / p.name)
    (town / "town.toml").write_text(TOML.replace("masks/val", "masks/train"))
    assert not check_data(f"folder:{town}/town.toml", quiet=True).faults
    named = check_data(f"folder:{town}/town.toml,split=val", quiet=True)
    assert [s.name for s in named.splits] == ["val"] and not named.faults
    for more in ("", ",split=train"):                                   # nor are those of images that a count leaves out
        fewer = check_data(f"folder:{town}/town.toml,count=3{more}", quiet=True)
        assert [len(s.looked) for s in fewer.splits] == [3]*(1 + (not more)) and not fewer.faults


def test_a_split_without_labels_is_no_fault_and_all_ignore_is(town):
    (town / "town.toml").write_text(TOML.replace(', val = "masks/val"', ""))
    c = check_data(f"folder:{town}/town.toml", quiet=True)
    assert not c.faults and any("val has no labels" in n for n in c.notes)
    for p in (town / "masks" / "train").iterdir():
        save(p, mask(255))
    assert {f.kind for f in check_data(f"folder:{town}/town.toml", quiet=True).faults} == {"nothing labelled"}


def test_only_labelled_images_are_asked_for(town):
    (town / "masks" / "train" / "p03.png").unlink()
    c = check_data(f"folder:{town}/town.toml,only_labelled=true", quiet=True)
    assert not c.faults and len(c.splits[0].looked) == 13


def test_opening_is_as_strict_as_before(town):
    plant(town)
    with pytest.raises(InputError, match="same name"):
        open_dataset(f"folder:{town}/town.toml")
    with pytest.raises(InputError, match="ghost12"):
        open_dataset(f"folder:{town}/town.toml", "val")


def test_colours_that_no_mask_has(tmp_path):
    for i in range(2):
        save(tmp_path / "a" / f"{i}.png", photo(i))
        save(tmp_path / "b" / f"{i}.png", np.array([[0, 0, 0], [255, 0, 0]], np.uint8)[mask(0, 1)])
    (tmp_path / "c.toml").write_text('images = {train = "a"}\nlabels = {train = "b"}\n[classes]\nground = [0, 0, 0]\n'
                                     'house = [[255, 0, 0], [200, 0, 0]]\ntree = [0, 255, 0]\n')
    c = check_data(f"folder:{tmp_path}/c.toml", quiet=True)
    assert c.splits[0].pixels.tolist() == [2400, 2400, 0]
    assert [f.kind for f in c.faults] == ["class without a pixel", "id never seen"] and "(200, 0, 0)" in c.faults[1].message


def test_pictures_are_written_whole(town, capsys):
    assert main(["data", "check", f"folder:{town}/town.toml", "--out", str(town / "seen")]) == 0
    assert sorted(p.name for p in (town / "seen").iterdir()) == ["class_shares.png", "overlays.png"]
    assert min(Image.open(p).size[0] for p in (town / "seen").iterdir()) > 300


def test_stats_prints_what_check_prints_without_faults(town, capsys):
    plant(town)
    assert main(["data", "stats", f"folder:{town}/town.toml"]) == 0
    out = capsys.readouterr().out
    assert "wrong" not in out and "8 files left out" in out
    assert main(["data", "stats", f"folder:{town}/town.toml", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert "faults" not in d and d["splits"]["val"]["pixels"]["house"] == 6 * 600


def test_a_data_set_that_cannot_be_opened_is_one_line(tmp_path, capsys):
    assert main(["data", "check", f"gta5:{tmp_path}/nowhere"]) == 2
    assert "split cannot be opened" in capsys.readouterr().out
    assert main(["data", "stats", f"gta5:{tmp_path}/nowhere"]) == 2
    assert main(["data", "stats", "streets:real,count=2,split=test"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("protonb: streets:real: has no split 'test'")
    assert main(["data", "check", f"folder:{tmp_path}/nowhere.toml"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1


@pytest.mark.parametrize("kind", ["camvid", "gta5", "carla", "carlascapes", "cityscapes", "vistas"])
def test_tables_of_real_files_are_true(kind):
    if not (DATA / kind).is_dir():
        pytest.skip(f"{DATA / kind} is not here")
    c = check_data(f"{kind}:{DATA / kind}", quiet=True)
    assert [s.name for s in c.splits] == splits_of(f"{kind}:{DATA / kind}")
    for s in c.splits:
        ds, sums = open_dataset(f"{kind}:{DATA / kind}", s.name), [0] * c.space.num_classes
        for i in range(len(ds)):
            label = ds[i][1]
            for k in range(c.space.num_classes):
                sums[k] += int((label == k).sum())
        assert s.pixels.tolist() == sums and sum(s.sizes.values()) == len(ds)
    for line, name, k in zip(check_table(c).splitlines()[1:], c.space.classes, range(99)):
        told = f"{100 * sums[k] / sum(sums):.2f}"
        assert line.startswith(name) and line.split()[-1] == ("<0.01" if sums[k] and told == "0.00" else told)


def test_camvid_against_its_own_numbers():
    """The ids of the 11-class files are the train ids, 11 is ignored: Pillow and a loop are enough."""
    if not (DATA / "camvid").is_dir():
        pytest.skip(f"{DATA / 'camvid'} is not here")
    sums, c = [0] * 256, check_data(f"camvid:{DATA / 'camvid'},split=val", quiet=True)
    for p in sorted((DATA / "camvid" / "valannot").iterdir()):
        for n, v in Image.open(p).getcolors(256):
            sums[v] += n
    assert c.splits[0].pixels.tolist() == sums[:11] and c.splits[0].void == sum(sums[11:])
    assert c.splits[0].sizes == {(360, 480): 101}


@pytest.mark.parametrize("kind", ["point", "coarse", "image"])
def test_weak_labels_are_a_target(town, kind, capsys):
    for p in (town / "masks" / "train").iterdir():
        save(p, mask(0, 1, 2))
    assert main(["data", "weaken", f"folder:{town}/town.toml", "--labels", kind, "--out", str(town / "weak")]) == 0
    o = parse(["train", "wdass", "--source", f"folder:{town}/town.toml", "--target", f"folder:{town}/weak/weak.toml", "--labels", kind,
               "--out", str(town / "run"), "--recipe", "released"])
    fine = open_dataset(f"folder:{town}/town.toml")
    target, want = open_target(o.method, o, fine.space), WeakLabels(fine, kind)
    assert target.names == fine.names and target.space.classes == fine.space.classes
    for (a, x), (b, y) in zip((target[i] for i in range(14)), (want[i] for i in range(14))):
        assert torch.equal(a, b) and torch.equal(x, y)
        assert 0 < int((x < 3).sum()) and (kind != "point" or int((x < 3).sum()) == 3)
    assert main(["data", "weaken", f"folder:{town}/town.toml", "--labels", kind, "--out", str(town / "weak")]) == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_points_of_cityscapes_go_back_into_cityscapes(tmp_path):
    raw = np.array([i for i, c in CITYSCAPES_IDS.items() if c], np.uint8)
    for name in ("aachen_000000_000019", "aachen_000001_000019"):
        save(tmp_path / "leftImg8bit/train/aachen" / f"{name}_leftImg8bit.png", photo(3))
        save(tmp_path / "gtFine/train/aachen" / f"{name}_gtFine_labelIds.png", mask(*raw[:6]))
    spec = f"cityscapes:{tmp_path}"
    assert main(["data", "weaken", spec, "--labels", "point", "--seed", "4", "--out", str(tmp_path / "w")]) == 0
    points, fine = cityscapes_weak(tmp_path, "point", points=tmp_path / "w" / "points.yaml"), open_dataset(spec)
    for i, name in enumerate(fine.names):
        p, label = pick_points(fine[i][1], rng_for(4, "points", name), CITYSCAPES.num_classes), points[i][1]
        assert label[p.rows, p.cols].tolist() == p.ids.tolist() and int((label != 255).sum()) == len(p) == 6


def test_a_drawn_picture_is_written_beside_its_label(tmp_path):
    assert main(["data", "weaken", STREETS, "--labels", "coarse", "--out", str(tmp_path / "w")]) == 0
    a, b = open_dataset(f"folder:{tmp_path}/w/weak.toml"), WeakLabels(open_dataset(STREETS), "coarse")
    assert all(torch.equal(x, y) for i in range(8) for x, y in zip(a[i], b[i]))


def test_weakening_nothing_is_refused(town, capsys):
    for p in (town / "masks" / "train").iterdir():
        save(p, mask(255))
    assert main(["data", "weaken", f"folder:{town}/town.toml", "--labels", "coarse", "--out", str(town / "weak")]) == 2
    assert "all are 255" in capsys.readouterr().err and not (town / "weak").exists()


def test_a_few_of_names_without_a_city(town, capsys):
    spec, few = f"folder:{town}/town.toml", town / "few.txt"
    assert main(["data", "fewshot", spec, "--shots", "5", "--out", str(few)]) == 0
    names = few.read_text().split()
    assert len(set(names)) == 5 and set(names) <= set(open_dataset(spec).names)
    o = parse(["train", "pixda", "--source", STREETS, "--target", spec, "--few", str(few), "--out", str(town / "run"),
               "--recipe", "released"])
    assert open_target(o.method, o, open_dataset(spec).space).names == names
    assert main(["data", "fewshot", spec, "--shots", "15", "--out", str(few)]) == 2
    assert "has 14" in capsys.readouterr().err and few.read_text().split() == names


def test_groups_by_letters_and_by_a_rule(town, capsys):
    spec, few = f"folder:{town}/town.toml", town / "few.txt"
    for words in (["--prefix", "2"], ["--group", r"p(\d)"], ["--group", "p."]):
        assert main(["data", "fewshot", spec, "--shots", "2", "--out", str(few), *words]) == 0
        assert sorted(n[:2] for n in few.read_text().split()) == ["p0", "p0", "p1", "p1"]
    for words, said in ((["--group", "("], "regular expression"), (["--group", "x"], "finds nothing"),
                        (["--group", "p", "--prefix", "2"], "neither"), (["--prefix", "-1"], "--prefix is -1"), (["--shots", "0"], "--shots is 0")):
        assert main(["data", "fewshot", spec, "--out", str(few), *(["--shots", "2"] if words[0] != "--shots" else []), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_pristine_cityscapes_has_no_fault(tmp_path):
    """Its test set has no labels to speak of, train_extra only coarse ones; with labels=coarse these are looked at as well."""
    raw = [i for i, c in CITYSCAPES_IDS.items() if c]
    for n, (split, ids) in enumerate(dict(train=raw, val=raw, test=[0, 1, 3]).items()):
        save(tmp_path / f"leftImg8bit/{split}/bonn/bonn_000000_00000{n}_leftImg8bit.png", photo(n))
        save(tmp_path / f"gtFine/{split}/bonn/bonn_000000_00000{n}_gtFine_labelIds.png", mask(*ids))
    save(tmp_path / "leftImg8bit/train_extra/bonn/bonn_000000_000009_leftImg8bit.png", photo(9))
    c = check_data(f"cityscapes:{tmp_path}", quiet=True)
    assert not c.faults and [s.name for s in c.splits] == ["train", "val", "test"] and any("not one pixel" in n for n in c.notes)
    shutil.rmtree(tmp_path / "gtFine/test")
    c = check_data(f"cityscapes:{tmp_path}", quiet=True)
    assert not c.faults and any("gtFine/test" in n for n in c.notes)
    assert splits_of(f"cityscapes:{tmp_path},labels=coarse") == ["train", "train_extra", "val", "test"]
    shutil.rmtree(tmp_path / "gtFine/val")
    assert [f.split for f in check_data(f"cityscapes:{tmp_path}", quiet=True).faults] == ["val"]


def test_outlines_of_photos_that_are_not_there(tmp_path):
    """CVAT keeps all photos in one file, which may serve several splits; a photo of no split is named, and so is a class of no table."""
    for i, split in enumerate(("train", "train", "train", "val")):
        save(tmp_path / split / f"p{i}.png", photo(i))
    shape = '<polygon label="{}" points="0,0;30,0;30,39;0,39" z_order="0"></polygon>'
    drawn = {"p0.png": "house", "p1.png": "hovse", "p3.png": "house", "ghost.png": "house"}
    (tmp_path / "cvat.xml").write_text("<annotations>" + "".join(
        f'<image id="{i}" name="{n}" width="60" height="40">{shape.format(c)}</image>' for i, (n, c) in enumerate(drawn.items()))
        + "</annotations>")
    (tmp_path / "c.toml").write_text('format = "cvat"\nimages = {train = "train", val = "val"}\n'
                                     'labels = {train = "cvat.xml", val = "cvat.xml"}\n'
                                     "[classes]\nbackground = [0, 0, 0]\nhouse = [255, 0, 0]\n")
    for spec in (f"folder:{tmp_path}/c.toml", f"folder:{tmp_path}/c.toml,split=train"):
        c = check_data(spec, quiet=True)
        said = sorted((f.kind, f.message.removeprefix(f"{tmp_path}/")[:18]) for f in c.faults)
        assert said == [("image without label", "train/p2.png: has "), ("label without image", "cvat.xml: ghost.pn"),
                        ("unreadable label", "cvat.xml: p1.png: ")], c.faults
        assert c.splits[0].pixels.tolist() == [2400 - 31 * 40, 31 * 40]
