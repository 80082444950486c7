"""Files as people have them: each kind with other examples than those of the reports, true values or one clear line."""
import base64
import io
import json
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protonb.annotations import read_classes
from protonb.cli import find_images, main
from protonb.core import InputError
from protonb.data_tools import check_data
from protonb.datasets import folder, images, open_dataset, published, require_labels, splits_of, take
from protonb.evaluation import evaluate
from protonb.files import files_below, image_size, list_files, read_image, read_label, read_list
from protonb.labels import CAMVID, CAMVID_COLOURS, CITYSCAPES, CITYSCAPES16, FAR, IDD, ClassSpace

IDS = np.array([[0, 0, 1, 1], [0, 2, 2, 1], [0, 2, 2, 1]], np.uint8)
COLOURS = dict(ground=(10, 20, 30), car=(200, 0, 0), tree=(0, 120, 40))
PHOTO = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def save(path, a, mode=None, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(a)
    if mode: im = im.convert(mode)
    im.save(path, **kw)
    return path


def describe(root, text, name="d.toml", classes=COLOURS, images="img", labels="lab", encoding="utf-8"):
    """A description of one split, `train`; the paths of images and labels are written in quotes."""
    lines = [text, f'[images]\ntrain = "{images}"'] + ([f'[labels]\ntrain = "{labels}"'] if labels else [])
    lines += ["[classes]"] + [f'"{c}" = {list(rgb) if isinstance(rgb, tuple) else rgb}' for c, rgb in classes.items()]
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines), encoding=encoding)
    return root / name


def labels_of(toml, split="train", **kw):
    return [y.tolist() for _, y in (folder(toml, split, **kw)[i] for i in range(len(folder(toml, split, **kw))))]


def refused(f, *words):
    with pytest.raises(InputError) as e: f()
    text = str(e.value)
    assert "\n" not in text
    for w in words: assert w in text, text


# ---- masks in colours

def painted(ids=IDS, table=COLOURS): return np.array(list(table.values()), np.uint8)[ids]


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_colour_masks(tmp_path, alpha, ending):
    a = painted()
    if alpha and ending != ".bmp": a = np.dstack([a, np.random.default_rng(0).integers(0, 256, IDS.shape, dtype=np.uint8)])
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / f"lab/1{ending}", a)
    assert labels_of(describe(tmp_path, f'label_suffix = "{ending}"')) == [IDS.tolist()]


def test_colours_that_nobody_named(tmp_path):
    a = painted()
    a[0, 0] = (1, 2, 3)
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", a)
    refused(lambda: labels_of(describe(tmp_path, "")), "lab/1.png", "[1, 2, 3] (1 px)", "ignore_colours")
    assert labels_of(describe(tmp_path, "ignore_colours = [[1, 2, 3]]"))[0][0] == [255, 0, 1, 1]
    two = dict(COLOURS, ground="[[10, 20, 30], [1, 2, 3]]")                       # a class of two colours; the first is shown
    toml = describe(tmp_path, "", classes=two)
    assert labels_of(toml) == [IDS.tolist()] and folder(toml).space.palette[0] == (10, 20, 30)
    refused(lambda: labels_of(describe(tmp_path, "ignore_colours = [[1, 2]]")), "ignore_colours")
    few = ClassSpace("few", ("tree",), ((0, 0, 0),))
    assert labels_of(describe(tmp_path, "", classes=two), space=few)[0][1] == [255, 0, 0, 255]


def test_colours_of_a_known_space(tmp_path):
    ids = np.array([[0, 13], [18, 10]])
    save(tmp_path / "img/1.png", PHOTO[:2, :2]), save(tmp_path / "lab/1.png", np.array(CITYSCAPES.palette, np.uint8)[ids])
    (tmp_path / "d.toml").write_text('space = "cityscapes"\nimages = {train = "img"}\nlabels = {train = "lab"}')
    assert labels_of(tmp_path / "d.toml") == [ids.tolist()]


def test_two_classes_of_one_colour_do_not_stop_ids(tmp_path):
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", IDS)
    same = dict(COLOURS, tree=COLOURS["car"])
    assert labels_of(describe(tmp_path, "", classes=same)) == [IDS.tolist()]
    save(tmp_path / "lab/1.png", painted())
    refused(lambda: labels_of(describe(tmp_path, "", classes=same)), "is a mask in colours, and car and tree have the same")


def test_lossy_masks(tmp_path):
    big, far = np.kron(IDS, np.ones((24, 24), np.uint8)), dict(zip(COLOURS, ((0, 0, 0), (255, 0, 0), (0, 0, 255))))
    save(tmp_path / "img/1.png", np.kron(PHOTO, np.ones((24, 24, 1), np.uint8)))
    save(tmp_path / "lab/1.jpg", painted(big, far), quality=92)
    refused(lambda: labels_of(describe(tmp_path, 'label_suffix = ".jpg"', classes=far)), "lab/1.jpg", "JPEG", "nearest = true")
    got = np.array(labels_of(describe(tmp_path, 'label_suffix = ".jpg"\nnearest = true', classes=far))[0])
    assert (got == big).mean() > .93 and set(np.unique(got)) <= {0, 1, 2, 255} and (got[big != got] == 255).mean() > .5
    noise = np.clip(painted().astype(int) + np.random.default_rng(0).integers(-9, 10, (3, 4, 3)), 0, 255).astype(np.uint8)
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", noise)
    refused(lambda: labels_of(describe(tmp_path, "")), "colour")
    assert labels_of(describe(tmp_path, "nearest = true")) == [IDS.tolist()] == labels_of(describe(tmp_path, "nearest = 17"))
    refused(lambda: labels_of(describe(tmp_path, "nearest = 2")), "nor within 2 of one")
    save(tmp_path / "lab/1.png", np.full((3, 4, 3), 255, np.uint8))
    refused(lambda: labels_of(describe(tmp_path, "nearest = true")), f"nor within {FAR:g}")


def test_black_and_white_jpegs(tmp_path):
    ids, classes = np.kron(IDS > 0, np.ones((24, 24), np.uint8)).astype(np.uint8), dict(ground=(0, 0, 0), car=(255, 255, 255))
    save(tmp_path / "img/1.png", np.kron(PHOTO, np.ones((24, 24, 1), np.uint8)))
    save(tmp_path / "lab/1.jpg", ids*255, quality=80)
    toml = describe(tmp_path, 'label_suffix = ".jpg"\nnearest = true', classes=classes)
    got = np.array(labels_of(toml)[0])
    assert (got == ids).mean() > .97 and (got[got != ids] == 255).all()
    refused(lambda: labels_of(describe(tmp_path, 'label_suffix = ".jpg"', classes=classes)), "JPEG")
    refused(lambda: labels_of(describe(tmp_path, 'label_suffix = ".jpg"\nnearest = true', classes=dict(classes, car=(255, 0, 0)))), "JPEG")


def test_palettes_whose_colours_are_in_another_order(tmp_path):
    im = Image.fromarray(painted()).quantize(3, dither=Image.Dither.NONE)                   # numbers the colours as it likes
    order = [tuple(im.getpalette()[3*i:3*i+3]) for i in range(3)]
    save(tmp_path / "img/1.png", PHOTO), (tmp_path / "lab").mkdir()
    im.save(tmp_path / "lab/1.png")
    names = [next(c for c, rgb in COLOURS.items() if rgb == o) for o in order]
    assert sorted(names) == sorted(COLOURS)
    if order != list(COLOURS.values()): refused(lambda: labels_of(describe(tmp_path, "")), "lab/1.png", "index", "[ids]")
    toml = describe(tmp_path, "")
    toml.write_text(toml.read_text() + "\n[ids]\n" + "\n".join(f'{i} = "{c}"' for i, c in enumerate(names)))
    assert labels_of(toml) == [IDS.tolist()]
    toml = describe(tmp_path, "", classes={c: COLOURS[c] for c in names})                # and in the order of the palette it is read as it was
    assert labels_of(toml) == [np.array(im).tolist()]


def test_settings_of_colours_are_checked(tmp_path):
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", IDS)
    for bad in ("-3", "nan", "500.5"): refused(lambda: folder(describe(tmp_path, f"nearest = {bad}")), "nearest is")
    refused(lambda: folder(describe(tmp_path, 'nearest = "yes"')), "nearest is 'yes'")


# ---- 255 that may be a class

@pytest.mark.parametrize("form", ["grey", "palette", "channel", "wide", "white"])
def test_255_is_not_swallowed(tmp_path, form):
    a = np.array([[0, 255, 255, 0]]*3, np.uint8)
    if form == "white": a[:] = 255
    if form == "channel": a = np.dstack([0*a, a, 0*a])
    if form == "wide": a = a.astype(np.uint16)
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", a, mode="P" if form == "palette" else None)
    two, more = dict(list(COLOURS.items())[:2]), "channel = 1" if form == "channel" else ""
    refused(lambda: labels_of(describe(tmp_path, more, classes=two)), "lab/1.png", "255", "[ids]")
    toml = describe(tmp_path, more, classes=two)
    text = toml.read_text()
    toml.write_text(text + '\n[ids]\n0 = "ground"\n255 = "car"')
    want = [[1]*4]*3 if form == "white" else [[0, 1, 1, 0]]*3
    assert labels_of(toml) == [want]
    toml.write_text(text + '\n[ids]\n0 = "ground"\n255 = "ignore"')
    assert labels_of(toml) == [(np.array(want)*255).tolist()]
    one = describe(tmp_path, more, classes={"ground": COLOURS["ground"]})
    refused(lambda: labels_of(one), "all else would be ground", '0 = "ignore" and 255 = "ground"')


def test_255_stays_what_it_is_where_ids_are_seen(tmp_path):
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab/1.png", np.array([[0, 1, 255, 0]]*3, np.uint8))
    assert labels_of(describe(tmp_path, "", classes=dict(list(COLOURS.items())[:2]))) == [[[0, 1, 255, 0]]*3]
    save(tmp_path / "img/2.png", PHOTO), save(tmp_path / "lab/2.png", np.array([[0, 0, 255, 0]]*3, np.uint8))
    refused(lambda: labels_of(describe(tmp_path, "", classes=dict(list(COLOURS.items())[:2]))), "lab/2.png")    # of two classes it may be the other
    assert labels_of(describe(tmp_path, ""))[1] == [[0, 0, 255, 0]]*3                   # of three the first file tells
    os.remove(tmp_path / "img/1.png"), os.remove(tmp_path / "lab/1.png")
    refused(lambda: labels_of(describe(tmp_path, "")), "lab/2.png", "car and tree would never be seen")


# ---- numbers of any width

@pytest.mark.parametrize("kind,name", [(np.uint16, "1.png"), (np.uint16, "1.tif"), (np.int32, "1.tif"), (np.float32, "1.tif"), (bool, "1.png")])
def test_wide_labels(tmp_path, kind, name):
    ids = (IDS > 0) if kind is bool else IDS
    save(tmp_path / "img/1.png", PHOTO), save(tmp_path / "lab" / name, ids.astype(kind))
    assert labels_of(describe(tmp_path, "")) == [ids.astype(int).tolist()]
    if kind is bool: return
    save(tmp_path / "lab" / name, (ids.astype(kind) + kind(300)).astype(kind))
    refused(lambda: labels_of(describe(tmp_path, "")), name, "302", "below 256")


def test_wide_labels_of_several_channels(tmp_path):
    import cv2
    rgb = np.dstack([IDS, IDS + 3, 0*IDS]).astype(np.uint16)
    (tmp_path / "lab").mkdir()
    for name in ("1.png", "2.tif"):
        assert cv2.imwrite(str(tmp_path / "lab" / name), rgb[..., ::-1])
        save(tmp_path / "img" / f"{name[0]}.png", PHOTO)
        assert (read_label(tmp_path / "lab" / name, 1) == IDS + 3).all()
    assert labels_of(describe(tmp_path, "channel = 0")) == [IDS.tolist()]*2
    half = save(tmp_path / "half.tif", IDS + np.float32(.25))
    refused(lambda: read_label(half), "32-bit")
    refused(lambda: read_label(save(tmp_path / "minus.tif", IDS.astype(np.int32) - 5)), "holds the value")


# ---- photos

TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
         6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}   # upright -> stored


def noted(path, a, orientation, **kw):
    note = Image.Exif()
    note[0x0112] = orientation
    return save(path, np.ascontiguousarray(TURNS[orientation](a)), exif=note, **kw)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_every_orientation_in_every_format(tmp_path, orientation, name):
    a = np.kron(PHOTO, np.ones((16, 16, 1), np.uint8))
    how = dict(quality=100, subsampling=0) if name == "a.jpg" else dict(lossless=True) if name == "a.webp" else {}
    p = noted(tmp_path / name, a, orientation, **how)
    got = read_image(p)
    assert got.shape == a.shape and np.abs(got.astype(int) - a).mean() < 3
    assert image_size(p) == (48, 64)


def test_the_same_score_turned_or_not(tmp_path):
    """A quarter turn by EXIF and a label drawn upright, against the turned pair."""
    a, y = np.kron(PHOTO, np.ones((16, 16, 1), np.uint8)), np.kron(IDS, np.ones((16, 16), np.uint8))
    noted(tmp_path / "phone/img/1.png", a, 6), save(tmp_path / "phone/lab/1.png", y)
    save(tmp_path / "plain/img/1.png", a), save(tmp_path / "plain/lab/1.png", y)
    darkest = lambda x: torch.stack([x.float().mean(1), x[:, 0].float(), 255 - x[:, 1].float()], 1)
    phone, plain = (evaluate(darkest, folder(describe(tmp_path / k, "")), progress=False) for k in ("phone", "plain"))
    assert phone.cm.equal(plain.cm) and phone.cm.sum() == 48*64 and (phone.cm.sum(1) > 0).all()
    sizes = {k: image_size(next((tmp_path / k / "img").iterdir())) for k in ("phone", "plain")}
    assert sizes["phone"] == sizes["plain"] == (48, 64)


def test_a_turned_label_is_read_as_it_is_looked_at(tmp_path):
    assert (read_label(noted(tmp_path / "1.png", IDS[..., None].repeat(3, 2), 6), channel=0) == IDS).all()
    note = Image.Exif()
    note[0x0112] = 8
    assert (read_label(save(tmp_path / "2.png", np.rot90(IDS, -1).copy(), exif=note)) == IDS).all()


@pytest.mark.parametrize("name,kind", [("grey.png", np.uint16), ("grey.tif", np.uint16), ("deep.tif", np.int32), ("float.tif", np.float32)])
def test_deep_photos_are_refused_with_a_remedy(tmp_path, name, kind):
    p = save(tmp_path / name, (PHOTO[..., 0]*100.).astype(kind))
    refused(lambda: read_image(p), name, "16-bit" if kind is np.uint16 else "32-bit", "convert", "0..255")


def test_deep_colour_photos_are_refused(tmp_path):
    import cv2
    for name in ("a.png", "a.tif"):
        assert cv2.imwrite(str(tmp_path / name), PHOTO.astype(np.uint16)*256)
        refused(lambda: read_image(tmp_path / name), name, "16-bit", "convert")
    assert cv2.imwrite(str(tmp_path / "f.tif"), PHOTO.astype(np.float32))
    refused(lambda: read_image(tmp_path / "f.tif"), "f.tif")


def test_usual_photos_stay_as_they_were(tmp_path):
    flat = np.full((8, 8, 3), 90, np.uint8)
    Image.fromarray(flat).quantize(4).save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == 90).all()
    for name, mode in (("l.png", "L"), ("la.png", "LA"), ("rgba.png", "RGBA"), ("c.jpg", "CMYK"), ("one.bmp", "RGB"), ("t.tif", "RGB")):
        assert np.abs(read_image(save(tmp_path / name, flat, mode)).astype(int) - 90).max() < 6, name
    assert len(images(tmp_path)) == 7


def test_a_flipped_bit_is_found(tmp_path):
    whole = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    for at in (60, 2000, len(whole)//2, len(whole)-20):
        bad = bytearray(whole)
        bad[at] ^= 1
        (tmp_path / "bad.png").write_bytes(bad)
        for read in (read_image, lambda p: read_label(p, 0)): refused(lambda: read(tmp_path / "bad.png"), "bad.png: is damaged")


def test_too_many_pixels(tmp_path, monkeypatch):
    p = save(tmp_path / "a.png", PHOTO)
    monkeypatch.setenv("PROTONB_MAX_PIXELS", "11")
    for read in (read_image, lambda p: read_label(p, 0)): refused(lambda: read(p), "a.png: has 3x4 pixels (height x width), more than 11", "PROTONB_MAX_PIXELS")
    monkeypatch.setenv("PROTONB_MAX_PIXELS", "12")
    assert read_image(p).shape == (3, 4, 3)
    monkeypatch.setenv("PROTONB_MAX_PIXELS", "many")
    refused(lambda: read_image(p), "PROTONB_MAX_PIXELS is 'many'")
    monkeypatch.delenv("PROTONB_MAX_PIXELS")
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)                        # a bomb is refused by its header
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    refused(lambda: read_image(tmp_path / "bomb.png"), "60000x60000", "200,000,000")


def test_eight_bit_photos_of_many_pixels_do_not_warn(tmp_path, recwarn):
    p = tmp_path / "wide.png"
    Image.new("L", (10_000, 9_500)).save(p)
    assert read_image(p).shape == (9_500, 10_000, 3) and not recwarn.list


# ---- names, links, lists

def test_spellings_of_one_name(tmp_path):
    both = ("u\u0308ber\u00e9", "\u00fcbere\u0301")                                          # both names have one letter of either kind
    save(tmp_path / f"img/{both[0]}/{both[1]}.png", PHOTO), save(tmp_path / f"lab/{both[1]}/{both[0]}_l\u00e4bel.png", IDS)
    ds = folder(describe(tmp_path, 'label_suffix = "_la\u0308bel.png"'))
    assert ds.names == ["\u00fcber\u00e9"] and ds[0][1].tolist() == IDS.tolist()
    (tmp_path / "list.txt").write_text(both[1] + "\n", encoding="utf-8")
    assert take(ds, read_list(tmp_path / "list.txt")).names == ds.names
    save(tmp_path / f"img/{both[0]}/{both[0]}.png", PHOTO)
    refused(lambda: folder(describe(tmp_path, "")), "same name")


@pytest.mark.parametrize("disk, said", [("NFD", "NFC"), ("NFC", "NFD")])
def test_folders_in_the_other_spelling(tmp_path, disk, said):
    """A folder that a Mac has made, in a description, a list and a command that somebody has typed elsewhere."""
    there, typed = (lambda t, f=f: unicodedata.normalize(f, t) for f in (disk, said))
    root = tmp_path / there("Köln") / there("Brücke")
    save(root / there("Fotos ü") / "a.png", PHOTO), save(root / there("Masken ü") / "a.png", IDS)
    (root / there("liste_ü.txt")).write_text("a\n")
    describe(root, typed('[lists]\ntrain = "liste_ü.txt"\n'), images=typed("Fotos ü"), labels=typed("Masken ü"))
    typed_root = f"{tmp_path}/{typed('Köln/Brücke')}"
    ds = open_dataset(f"folder:{typed_root}/d.toml")
    assert ds[0][1].tolist() == IDS.tolist() and splits_of(f"folder:{typed_root}/d.toml") == ["train"]
    describe(root, "", images=typed("Fotos ü/*.png"), labels=typed("Masken ü/*.png"))
    assert open_dataset(f"folder:{typed_root}/d.toml")[0][1].tolist() == IDS.tolist()
    assert len(images(f"{typed_root}/{typed('Fotos ü')}") if disk == said else open_dataset(f"images:{typed_root}/{typed('Fotos ü')}")) == 1
    assert [n for n, _ in find_images(f"{typed_root}/{typed('Fotos ü')}")] == ["a"]
    refused(lambda: open_dataset(f"folder:{typed_root}/{typed('Fotos ö')}/d.toml"), "cannot be read")


@pytest.mark.parametrize("text", ["image,label\nimg/a.png,lab/a.png\n", "# chosen by hand\n\na\n", '"img/a.png","lab/a.png"\n', "file_name\r\na.png\r\n", "filename;mask\na.png;a.png",
    "D:\\data\\img\\a.png\n", "../" + "{here}/img/a.png ../{here}/lab/a.png\n"])
def test_lists_with_a_head_comments_or_quotes(tmp_path, text):
    for n in "ab": save(tmp_path / f"img/{n}.png", PHOTO), save(tmp_path / f"lab/{n}.png", IDS)
    toml = describe(tmp_path, '[lists]\ntrain = "list.csv"\n')
    (tmp_path / "list.csv").write_text(text.replace("{here}", tmp_path.name), newline="")
    assert folder(toml).names == ["a"] and labels_of(toml) == [IDS.tolist()]
    (tmp_path / "list.csv").write_text("image\n")                        # a list of one line is no head
    refused(lambda: folder(toml), "list.csv: 'image' is none of the 2 images")
    (tmp_path / "list.csv").write_text("# nothing\n")
    refused(lambda: folder(toml), "list.csv: names no image")


def test_ids_that_are_all_ignored(tmp_path):
    save(tmp_path / "img/a.png", PHOTO), save(tmp_path / "lab/a.png", IDS)
    toml = describe(tmp_path, "")
    toml.write_text(toml.read_text() + '\n[ids]\n0 = "ignore"\n1 = "ignore"\n2 = "ignore"\n')
    refused(lambda: folder(toml), "d.toml: [ids] names none of ground, car, tree")


@pytest.mark.parametrize("ending, words", [(".webp", "is a WEBP file"), (".gif", None), (".jpg", "is a JPEG file")])
def test_labels_of_an_ending_that_is_not_looked_for(tmp_path, ending, words):
    save(tmp_path / "img/a.png", PHOTO), save(tmp_path / f"lab/a{ending}", IDS, **(dict(lossless=True) if ending == ".webp" else {}))
    refused(lambda: folder(describe(tmp_path, "")), "a.png: has no label", f'1 files there end in {ending}: label_suffix = "{ending}" takes them')
    toml = describe(tmp_path, f'label_suffix = "{ending}"')
    if words: refused(lambda: folder(toml)[0], words)
    else: assert folder(toml)[0][1].tolist() == IDS.tolist()


def test_links_and_hidden_files(tmp_path):
    save(tmp_path / "disk/1.png", PHOTO), save(tmp_path / "disk/deep/2.png", PHOTO)
    for k in ("img", "lab"):
        save(tmp_path / k / "own/3.png", PHOTO if k == "img" else IDS)
        (tmp_path / k / "far").symlink_to("../disk" if k == "img" else "../masks")
        (tmp_path / k / "own/up").symlink_to("..")
        (tmp_path / k / "own/self").symlink_to(".")
    save(tmp_path / "masks/1.png", IDS), save(tmp_path / "masks/deep/2.png", IDS)
    for hidden in (".cache/9.png", "__MACOSX/9.png", "own/._3.png", ".9.png"): save(tmp_path / "img" / hidden, PHOTO)
    (tmp_path / "img/gone.png").symlink_to("nowhere.png")
    ds = folder(describe(tmp_path, ""), labelled=False)
    assert ds.names == ["1", "2", "gone", "3"]
    refused(lambda: folder(describe(tmp_path, "")), "gone.png: has no label")
    (tmp_path / "img/gone.png").unlink()
    assert labels_of(describe(tmp_path, "")) == [IDS.tolist()]*3
    assert len(files_below(tmp_path / "img", "photos")) == 3
    (tmp_path / "img/round").symlink_to("round")
    refused(lambda: list_files(tmp_path / "img", (".png",), "photos"), "round: cannot be listed")


def test_masks_among_the_photos(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"all/{i}.jpg", PHOTO), save(tmp_path / f"all/{i}.png", IDS)
        save(tmp_path / f"mixed/{i}.png", PHOTO), save(tmp_path / f"mixed/sub/{i}_seg.png", IDS), save(tmp_path / f"mixed/sub/{i}.png", PHOTO)
    assert labels_of(describe(tmp_path, "", images="all", labels="all")) == [IDS.tolist()]*2
    toml = describe(tmp_path, 'label_suffix = "_seg.png"\nonly_labelled = true', images="mixed", labels="mixed")
    assert labels_of(toml) == [IDS.tolist()]*2
    assert len(folder(toml, labelled=False)) == 4                                      # masks are no photos, wanted or not
    assert len(folder(describe(tmp_path, 'label_suffix = "_seg.png"', images="mixed", labels=None))) == 4
    prefix = describe(tmp_path, 'image_suffix = "_im.png"', images="p", labels="p")
    save(tmp_path / "p/a_im.png", PHOTO), save(tmp_path / "p/a.png", IDS)
    assert labels_of(prefix) == [IDS.tolist()]


def test_texts_of_every_editor(tmp_path, monkeypatch):
    save(tmp_path / "caf\u00e9/1.png", PHOTO), save(tmp_path / "lab/1.png", IDS)
    for encoding, ends in (("utf-8-sig", "\r\n"), ("utf-8", "\r\n"), ("utf-8", "\n")):
        toml = describe(tmp_path, "", images="caf\u00e9")
        toml.write_bytes(toml.read_text(encoding="utf-8").replace("\n", ends).encode(encoding))
        assert labels_of(toml) == [IDS.tolist()]
    toml.write_bytes(toml.read_text(encoding="utf-8").encode("latin-1"))
    refused(lambda: folder(toml), "d.toml", "UTF-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert labels_of(describe(tmp_path / "else", "", images="~/caf\u00e9", labels="~/lab")) == [IDS.tolist()]


@pytest.fixture
def voc(tmp_path):
    for i in range(4):
        y = IDS.copy()
        y[0, 0] = i % 3
        save(tmp_path / f"JPEGImages/{i:03d}.jpg", PHOTO), save(tmp_path / f"SegmentationClass/{i:03d}.png", y)

    def make(lines, name="ImageSets/Segmentation/train.txt", **kw):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines.encode())
        toml = describe(tmp_path, "", **{**dict(images="JPEGImages", labels="SegmentationClass"), **kw})
        toml.write_text(toml.read_text() + f'\n[lists]\ntrain = "{name}"')
        return toml
    return make


@pytest.mark.parametrize("lines", ["002\n001\n", "\ufeff002.jpg\r\n\r\n001.jpg", "JPEGImages/002.jpg\nJPEGImages/001.jpg",
    "JPEGImages/002.jpg SegmentationClass/002.png\nJPEGImages/001.jpg\tSegmentationClass/001.png", "./002.jpg,002.png\n001.jpg, 001.png",
    "/old/disk/JPEGImages/002.jpg /old/disk/SegmentationClass/002.png\n/old/disk/JPEGImages/001.jpg", "JPEGImages\\002.jpg\nJPEGImages\\001.jpg"])
def test_lists(voc, lines):
    ds = folder(voc(lines))
    assert ds.names == ["002", "001"] and [y[0, 0].item() for _, y in (ds[0], ds[1])] == [2, 1]
    assert folder(voc(lines), labelled=False).names == ds.names


def test_lists_that_pair_otherwise(voc):
    ds = folder(voc("001 002\n"))
    assert ds.names == ["001"] and ds[0][1][0, 0] == 2
    ds = folder(voc("001.jpg SegmentationClass/003.png\n", labels=None))
    assert ds[0][1][0, 0] == 0 and ds.label_paths[0].name == "003.png"


@pytest.mark.parametrize("lines,words", [("007\n", ["'007'", "none of the 4 images"]), ("001\n001\n", ["twice"]), ("", ["train.txt: names no image"]),
    ("001.jpg nothing.png\n", ["'nothing.png'"]), ("/else/Photos/001.jpg\n", ["none of the 4"]), ("Photos/001.jpg", ["none of the 4"])])
def test_faults_of_lists(voc, lines, words): refused(lambda: folder(voc(lines)), *words)


def test_list_names_that_are_there_twice(tmp_path):
    for k in "ab": save(tmp_path / f"img/{k}/1.png", PHOTO), save(tmp_path / f"lab/{k}/1.png", IDS)
    toml = describe(tmp_path, "")
    text = toml.read_text() + '\n[lists]\ntrain = "l.txt"'
    toml.write_text(text)
    (tmp_path / "l.txt").write_text("1\n")
    refused(lambda: folder(toml), "several times")
    (tmp_path / "l.txt").write_text("b/1\n")
    assert folder(toml).image_paths == [tmp_path / "img/b/1.png"]


def test_several_folders_and_patterns(tmp_path):
    for k in (1, 2):
        save(tmp_path / f"seq{k}/rgb/0.png", PHOTO), save(tmp_path / f"seq{k}/seg/0_id.png", np.full((3, 4), k, np.uint8))
        save(tmp_path / f"flat/day_{k}.png", PHOTO), save(tmp_path / f"flat/night_{k}.png", PHOTO), save(tmp_path / f"ids/day_{k}.png", IDS)

    def opened(images, labels, more=""):
        text = f"images = {{train = {images}}}\nlabels = {{train = {labels}}}\n{more}\n[classes]\n"
        (tmp_path / "d.toml").write_text(text + "\n".join(f"{c} = {list(v)}" for c, v in COLOURS.items()))
        return folder(tmp_path / "d.toml")
    star = opened('"seq*/rgb"', '"seq*/seg"', 'label_suffix = "_id.png"')
    both = opened('["seq1/rgb", "seq2/rgb"]', '["seq1/seg", "seq2/seg"]', 'label_suffix = "_id.png"')
    assert [y[0, 0].item() for _, y in (star[0], star[1])] == [1, 2] == [y[0, 0].item() for _, y in (both[0], both[1])]
    assert len(set(star.names)) == 2 and len(set(both.names)) == 2
    assert opened('"flat/day_*"', '"ids"').names == ["day_1", "day_2"]
    assert [p.name for p in opened('"flat/day_?.png"', '"ids/day_*"').image_paths] == ["day_1.png", "day_2.png"]
    refused(lambda: opened('"x*/rgb"', '"seq*/seg"'), "x*/rgb: nothing matches")
    refused(lambda: opened('["seq1/rgb", "seq2/rgb", "flat"]', '["seq1/seg", "seq2/seg"]'), "3 folders of images and 2 of labels")
    refused(lambda: opened("[]", '"ids"'), "a folder or a list of folders")


def test_only_the_labelled(tmp_path):
    for i in range(3): save(tmp_path / f"images/{i}.png", PHOTO)
    save(tmp_path / "labels/1.png", np.full((3, 4), 7, np.uint8))
    refused(lambda: open_dataset(f"gta5:{tmp_path}"), "images/0.png: has no label", "1 more")
    ds = open_dataset(f"gta5:{tmp_path},only_labelled=true")
    assert ds.names == ["1"] and (ds[0][1] == 0).all()
    toml = describe(tmp_path, "", images="images", labels="labels", classes={str(i): (i, 0, 0) for i in range(8)})
    assert open_dataset(f"folder:{toml},only_labelled=true").names == ["1"] == folder(toml, only_labelled=True).names
    os.rename(tmp_path / "labels/1.png", tmp_path / "labels/9.png")
    refused(lambda: folder(toml, only_labelled=True), "none of 3 images has a label")


def test_the_first_so_many(tmp_path):
    for i in range(4):
        save(tmp_path / f"images/{i}.png", PHOTO)
        save(tmp_path / f"labels/{i}.png", np.full((3, 4), 7 + i, np.uint8))
    whole = open_dataset(f"gta5:{tmp_path}")
    ds = open_dataset(f"gta5:{tmp_path},count=2,cache=true,size=6x8")
    assert len(ds) == 2 and ds.names == whole.names[:2] and ds[1][1].shape == (6, 8) and ds[1][1].unique().equal(whole[1][1].unique())
    assert [len(s.looked) for s in check_data(f"gta5:{tmp_path},count=3", quiet=True).splits] == [3]
    toml = describe(tmp_path, "", images="images", labels="labels", classes={str(i): (i, 0, 0) for i in range(16)})
    assert open_dataset(f"folder:{toml},count=1").names == ["0"]
    assert open_dataset(f"images:{tmp_path}/images,count=3").names == ["0", "1", "2"]
    with pytest.raises(IndexError): open_dataset(f"gta5:{tmp_path},count=2")[2]
    assert len(open_dataset(f"gta5:{tmp_path},count=9")) == 4
    refused(lambda: open_dataset(f"gta5:{tmp_path},count=0"), f"gta5:{tmp_path}: count is 0, expected at least 1")
    (tmp_path / "labels/0.png").unlink()
    for labelled in (True, False):                                                              # of those that are left, opened or not
        ds = open_dataset(f"gta5:{tmp_path},only_labelled=true,count=1", labelled=labelled)
        assert ds.names == ["1"] and (ds[0][1] != 255).any() == labelled


# ---- outlines

SQUARE = [[1, 0], [2, 0], [2, 1], [1, 1]]                                                  # with its outline: columns 1 and 2, rows 0 and 1
BLOB = np.array([[1, 0], [1, 1]], bool)
WANT = np.array([[255, 1, 1, 255], [255, 1, 1, 255], [255, 255, 255, 255]])


def packed(mask, twice=False):
    f = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)*255).save(f, "PNG")
    return base64.b64encode(zlib.compress(f.getvalue()) if twice else f.getvalue()).decode()


def outlined(tmp_path, kind, files, labels="ann", more="", **kw):
    save(tmp_path / "img/a.jpg", PHOTO)
    for name, d in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(d if isinstance(d, str) else json.dumps(d), encoding="utf-8-sig")
    return describe(tmp_path, f'format = "{kind}"\n{more}', labels=labels, **kw)


def labelme(*shapes): return dict(version="5.4", imageHeight=3, imageWidth=4, imagePath="a.jpg", shapes=list(shapes))


def test_labelme(tmp_path):
    car, tree = dict(label="car", points=SQUARE), dict(label="tree", shape_type="rectangle", points=[[3, 2], [2, 1]])
    mask = dict(label="ground", shape_type="mask", points=[[0, 1], [1, 2]], mask=packed(BLOB))
    want = WANT.copy()
    want[1:3, 2:4] = 2
    want[[1, 2, 2], [0, 0, 1]] = 0
    assert labels_of(outlined(tmp_path, "labelme", {"ann/a.json": labelme(car, tree, mask)})) == [want.tolist()]
    dot = dict(label="tree", shape_type="circle", points=[[2, 1], [2, 2]])
    got = labels_of(outlined(tmp_path, "labelme", {"ann/a.json": labelme(dot)}, more='unlabelled = "ground"'))[0]
    assert got[1] == [0, 2, 2, 2] and got[0][2] == got[2][2] == 2 and got[0][0] == 0
    toml = outlined(tmp_path, "labelme", {"img/a.json": labelme(car)}, labels="img")       # beside the photo, as LabelMe does it
    assert labels_of(toml) == [WANT.tolist()]
    other = {"ann/a.json": labelme(dict(car, label="van"), dict(label="wire", shape_type="line", points=[[0, 0], [1, 1]]))}
    refused(lambda: labels_of(outlined(tmp_path, "labelme", other)), "a.json", "'wire' is a line")
    toml = outlined(tmp_path, "labelme", other)
    toml.write_text(toml.read_text() + '\n[names]\nvan = "car"\nwire = "skip"')
    assert labels_of(toml) == [WANT.tolist()]
    toml.write_text(toml.read_text().replace('van = "car"', 'van = "lorry"'))
    refused(lambda: labels_of(toml), "van is 'lorry'")
    refused(lambda: labels_of(outlined(tmp_path, "labelme", {"ann/a.json": labelme(dict(car, label="van"))})), "unknown class 'van'", "[names]")
    refused(lambda: labels_of(outlined(tmp_path, "labelme", {"ann/a.json": "{"})), "a.json: is no labelme file")
    refused(lambda: labels_of(outlined(tmp_path, "labelme", {"ann/a.json": dict(labelme(car), imageHeight=5)})), "is 5x4 (height x width), but its image")
    refused(lambda: folder(outlined(tmp_path, "labelmi", {})), "format is 'labelmi', expected one of: files, labelme")


def test_drawings_that_cannot_be(tmp_path):
    car = dict(label="car", points=SQUARE)
    for d, words in ((dict(labelme(car), imageHeight=10**6, imageWidth=10**7), "PROTONB_MAX_PIXELS"),
            (labelme(dict(car, points=[[float("nan"), 1], [2, 2]])), "no pixel"), (labelme(dict(car, points=[[1, 1]])), "fewer than two points"),
            ([], "is no labelme file"), (labelme(dict(car, label=["car"])), "unknown class"),
            (dict(labelme(car), imageWidth=-4), "a photo of 3x-4 pixels"), (labelme(dict(car, shape_type="rectangle", points=[[1, 1]])), "two points"),
            (labelme(dict(car, shape_type="rectangle", points=[[0, float("nan")], [1, 1]])), "no pixel"),
            (labelme(dict(car, shape_type="circle", points=[[0, 0], [float("inf"), 1]])), "no pixel"),
            (labelme(dict(car, shape_type="mask", points=[[0, 0], [1, 1]], mask="AAAA")), "a mask is no picture")):
        refused(lambda: labels_of(outlined(tmp_path, "labelme", {"ann/a.json": d})), "ann/a.json", words)
    four = dict(car, shape_type="rectangle", points=[[1, 0], [2, 0], [2, 1], [1, 1]])           # new versions keep all corners
    assert labels_of(outlined(tmp_path, "labelme", {"ann/a.json": labelme(four)})) == [WANT.tolist()]
    f = io.BytesIO()
    Image.fromarray(PHOTO).save(f, "PNG")
    old = dict(shapes=[car], imageData=base64.b64encode(f.getvalue()).decode())               # LabelMe 3 wrote no sizes
    assert labels_of(outlined(tmp_path, "labelme", {"ann/a.json": old})) == [WANT.tolist()]


def test_cityscapes_polygons_of_own_data(tmp_path):
    d = dict(imgHeight=3, imgWidth=4, objects=[dict(label="tree", polygon=SQUARE), dict(label="cargroup", polygon=SQUARE),
        dict(label="ground", polygon=SQUARE, deleted=1)])
    assert labels_of(outlined(tmp_path, "cityscapes", {"ann/a_gtFine_polygons.json": d})) == [WANT.tolist()]


def test_supervisely(tmp_path):
    whole = [[0, 0], [3, 0], [3, 2], [0, 2]]
    d = dict(size=dict(height=3, width=4), objects=[
        dict(classTitle="ground", geometryType="rectangle", points=dict(exterior=[[3, 2], [0, 0]], interior=[])),
        dict(classTitle="car", geometryType="polygon", points=dict(exterior=SQUARE, interior=[])),
        dict(classTitle="tree", geometryType="bitmap", bitmap=dict(data=packed(BLOB, twice=True), origin=[2, 1]))])
    want = np.where(WANT == 255, 0, WANT)
    want[[1, 2, 2], [2, 2, 3]] = 2
    assert labels_of(outlined(tmp_path, "supervisely", {"ann/a.jpg.json": d})) == [want.tolist()]
    big = np.kron(PHOTO, np.ones((4, 4, 1), np.uint8))
    ring = dict(size=dict(height=12, width=16), objects=[dict(classTitle="car", geometryType="polygon",
        points=dict(exterior=[[0, 0], [15, 0], [15, 11], [0, 11]], interior=[[[4, 4], [10, 4], [10, 8], [4, 8]]]))])
    toml = outlined(tmp_path, "supervisely", {"ann/a.jpg.json": ring})
    save(tmp_path / "img/a.jpg", big)
    got = np.array(labels_of(toml)[0])
    assert (got == 255).sum() == 5*3 and (got[5:8, 5:10] == 255).all() and len(whole) == 4
    del ring["size"]
    refused(lambda: labels_of(outlined(tmp_path, "supervisely", {"ann/a.jpg.json": ring})), "is no supervisely file", "size")


CVAT = """<annotations><image id="0" name="job/a.jpg" width="4" height="3">
<polygon label="car" z_order="1" points="1.00,0.00;2.00,0.00;2.00,1.00;1.00,1.00"><attribute name="x">1</attribute></polygon>
<box label="ground" z_order="0" xtl="0" ytl="0" xbr="3" ybr="2"/><mask label="tree" z_order="2" rle="0, 1, 1, 2" left="2" top="1" width="2" height="2"/>
<tag label="night"/></image><image id="1" name="other.jpg" width="4" height="3"/></annotations>"""


def test_cvat(tmp_path):
    want = np.where(WANT == 255, 0, WANT)
    want[[1, 2, 2], [2, 2, 3]] = 2
    toml = outlined(tmp_path, "cvat", {"annotations.xml": CVAT}, labels="annotations.xml", more='only_labelled = true')
    refused(lambda: folder(toml), "none of 1 images has a label", "annotations.xml")     # the photo is no job/a.jpg
    save(tmp_path / "img/job/a.jpg", PHOTO)
    assert labels_of(toml) == [want.tolist()] and folder(toml).names == ["a"]
    turned = outlined(tmp_path, "cvat", {"turned.xml": CVAT.replace('xtl="0"', 'xtl="3"').replace('xbr="3"', 'xbr="0"')}, labels="turned.xml", more='only_labelled = true')
    assert labels_of(turned) == [want.tolist()]
    for bad, words in ((CVAT.replace("box", "polyline"), ["'ground' is a polyline"]), (CVAT.replace('label="car"', 'label="van"'), ["'van'", "a.jpg"]),
            (CVAT[:-30], ["is no cvat file"]), (CVAT.replace('rle="0, 1, 1, 2"', 'rle="0, 1"'), ["a mask of 1 pixels"]),
            (CVAT.replace("other.jpg", "job/a.jpg"), ["image 'job/a.jpg' is there twice"]), (CVAT.replace('xbr="3"', 'xbr="nan"'), ["a.jpg", "no pixel"]),
            ('<annotations><track id="0" label="car"/></annotations>', ["tracks of a video", "CVAT for images"])):
        toml = outlined(tmp_path, "cvat", {"other.xml": bad}, labels="other.xml", more='only_labelled = true')
        refused(lambda: labels_of(toml), *words)
        (tmp_path / "other.xml").unlink()
        from protonb.annotations import read_drawings
        read_drawings.cache_clear()


def test_coco(tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as coco
    save(tmp_path / "img/b.jpg", PHOTO)
    text = coco.encode(np.asfortranarray((IDS == 2).astype(np.uint8)))
    text["counts"] = text["counts"].decode()
    ann = [dict(id=1, image_id=5, category_id=30, segmentation=[[1, 0, 3, 0, 3, 2, 1, 2]], iscrowd=0),
        dict(id=2, image_id=6, category_id=10, segmentation=dict(size=[3, 4], counts=[0, 12]), iscrowd=1),
        dict(id=3, image_id=6, category_id=20, segmentation=text, iscrowd=1)]
    d = dict(images=[dict(id=5, file_name="a.jpg", height=3, width=4), dict(id=6, file_name="img/b.jpg", height=3, width=4)],
        annotations=ann, categories=[dict(id=10, name="ground"), dict(id=20, name="tree"), dict(id=30, name="car")])
    got = labels_of(outlined(tmp_path, "coco", {"ann.json": d}, labels="ann.json"))
    assert got == [WANT.tolist(), np.where(IDS == 2, 2, 0).tolist()]
    ann.append(dict(id=7, image_id=5, category_id=30, bbox=[0, 0, 1, 1], segmentation=[]))
    refused(lambda: folder(outlined(tmp_path, "coco", {"boxes.json": d}, labels="boxes.json")), "annotation 7 has a box")
    refused(lambda: folder(outlined(tmp_path, "coco", {"half.json": dict(images=[])}, labels="half.json")), "is no coco file")


@pytest.mark.parametrize("outline, words", [(dict(size=[4, 3], counts=[0, 12]), "counts for [4, 3]"), (dict(size=[3, 4], counts=[5, 5]), "of other than 12"),
    (dict(size=[3, 4], counts=[5, 500]), "of other than 12"), (dict(size=[3, 4], counts=[-5, 17]), "of other than 12"), (dict(size=[3, 4], counts="zz!!"), "Invalid RLE"),
    ([[1, 0, 3, 0, 3, float("nan")]], "no pixel"), ([[1, 0, 3, 0, 1e12, 2]], "no pixel"), ([[1, 0, 3, 0, 3]], "no pixel"), ([[1, 0, 3, 2]], None),
    (dict(image_id=9), "image_id 9"), (dict(category_id=9), "category_id 9"), (dict(file_name="a.jpg"), "'a.jpg' is there twice"), (dict(id=10), "category 10 is there twice")])
def test_coco_that_pycocotools_would_believe(outline, words, tmp_path):
    pytest.importorskip("pycocotools")
    d = dict(images=[dict(id=5, file_name="a.jpg", height=3, width=4)], categories=[dict(id=10, name="ground"), dict(id=30, name="car")],
        annotations=[dict(id=1, image_id=5, category_id=30, segmentation=[[1, 0, 3, 0, 3, 2, 1, 2]])])
    if isinstance(outline, list) or "size" in outline: d["annotations"].append(dict(id=2, image_id=5, category_id=10, segmentation=outline))
    elif "file_name" in outline: d["images"].append(dict(d["images"][0], id=6))
    elif "id" in outline: d["categories"].append(dict(id=10, name="tree"))
    else: d["annotations"][0].update(outline)
    made = lambda: labels_of(outlined(tmp_path, "coco", {"ann.json": d}, labels="ann.json"))
    refused(made, "ann.json", words) if words else None
    if not words: assert made() == [WANT.tolist()]           # two points have no area, and are no box either


def test_background_is_what_nobody_drew_on(tmp_path):
    classes = dict(background=(0, 0, 0), car=(255, 0, 0))
    toml = outlined(tmp_path, "labelme", {"ann/a.json": labelme(dict(label="car", points=SQUARE))}, classes=classes)
    assert labels_of(toml) == [np.where(WANT == 255, 0, WANT).tolist()]
    toml.write_text('unlabelled = "ignore"\n' + toml.read_text())
    assert labels_of(toml) == [WANT.tolist()]
    toml.write_text(toml.read_text() + '\n[ids]\n0 = "car"')
    refused(lambda: folder(toml), "ids says nothing of format 'labelme'")


# ---- published data sets

def test_camvid_in_its_32_colours(tmp_path):
    colours = list(CAMVID_COLOURS)
    mask = np.array([colours[:16], colours[16:]], np.uint8)
    want = [[255 if (c := CAMVID_COLOURS[tuple(v)]) is None else CAMVID.index(c) for v in row] for row in mask.tolist()]
    assert len(colours) == 32 and {v for row in want for v in row} == {*range(11), 255}
    frames = dict(train=("0001TP_006690", "0006R0_f00930", "0016E5_07980"), val=("0016E5_07959",), test=("Seq05VD_f00000", "0001TP_008550"))
    for names in frames.values():
        for n in names:
            save(tmp_path / f"701_StillsRaw_full/{n}.png", np.zeros((2, 16, 3), np.uint8))
            save(tmp_path / f"LabeledApproved_full/{n}_L.png", mask)
    for split, names in frames.items():
        ds = open_dataset(f"camvid:{tmp_path}", split)
        assert sorted(ds.names) == sorted(names) and ds[0][1].tolist() == want
    for kind, where in (("", "kaggle/val/x"), ("_L", "kaggle/val_labels/x")): save(tmp_path / f"{where}{kind}.png", mask)
    assert published("camvid", tmp_path / "kaggle", "val")[0][1].tolist() == want
    save(tmp_path / "kaggle/val_labels/x_L.png", np.zeros((2, 16), np.uint8))
    refused(lambda: published("camvid", tmp_path / "kaggle", "val")[0], "x_L.png", "colours")


def test_the_real_splits_of_camvid(data):
    from protonb.published import camvid_split
    for split, n in (("train", 367), ("val", 101)):
        names = open_dataset(f"camvid:{data}/camvid", split).names
        assert len(names) == n and {camvid_split(x) for x in names} == {split}


RAW = np.array([[7, 26, 23, 0]]*3, np.uint8)                                              # road, car, sky, nothing
TRAINED = np.array([[0, 13, 10, 255]]*3, np.uint8)


@pytest.mark.parametrize("kind,image,label,raw,opt,split", [
    ("cityscapes", "leftImg8bit/val/ulm/u_0_leftImg8bit.png", "gtFine/val/ulm/u_0_gtFine_labelIds.png", RAW, "", "val"),
    ("cityscapes", "leftImg8bit/val/ulm/u_0_leftImg8bit.png", "gtFine/val/ulm/u_0_gtFine_labelTrainIds.png", TRAINED, "", "val"),
    ("cityscapes", "leftImg8bit/train_extra/ulm/u_0_leftImg8bit.png", "gtCoarse/train_extra/ulm/u_0_gtCoarse_labelIds.png", RAW, "labels=coarse",
     "train_extra"),
    ("bdd100k", "images/10k/val/u_0.jpg", "labels/sem_seg/masks/val/u_0.png", TRAINED, "", "val"),
    ("bdd100k", "images/val/u_0.jpg", "labels/val/u_0_train_id.png", TRAINED, "", "val"),
    ("acdc", "rgb_anon/fog/train/GP/u_0_rgb_anon.png", "gt/fog/train/GP/u_0_gt_labelIds.png", RAW, "", "train"),
    ("acdc", "rgb_anon/fog/train/GP/u_0_rgb_anon.png", "gt/fog/train/GP/u_0_gt_labelTrainIds.png", TRAINED, "condition=fog", "train"),
    ("dark_zurich", "rgb_anon/val/night/GP/u_0_rgb_anon.png", "gt/val/night/GP/u_0_gt_labelIds.png", RAW, "", "val"),
    ("dark_zurich", "rgb_anon/val/day/GP/u_0_rgb_anon.png", "gt/val/day/GP/u_0_gt_labelTrainIds.png", TRAINED, "condition=day", "val"),
    ("vistas", "validation/images/u_0.jpg", "validation/v1.2/labels/u_0.png", np.array([[13, 55, 27, 65]]*3, np.uint8), "", "val"),
    ("vistas", "training/images/u_0.jpg", "training/labels/u_0.png", np.array([[24, 55, 27, 0]]*3, np.uint8), "", "train"),
    ("idd", "leftImg8bit/train/7/u_0_leftImg8bit.png", "gtFine/train/7/u_0_gtFine_labelcsTrainIds.png", TRAINED, "", "train"),
    ("idd", "leftImg8bit/val/7/u_0_leftImg8bit.jpg", "gtFine/val/7/u_0_gtFine_labelids.png", np.array([[0, 12, 33, 35]]*3, np.uint8), "", "val"),
    ("carlascapes", "images/u_0_img.jpg", "labels/u_0_labelIds.png", np.array([[1, 14, 11, 0]]*3, np.uint8), "", "train"),
    ("gta5", "images/u_0.png", "labels/u_0.png", np.array([[7, 26, 23, 34]]*3, np.uint8), "", "train")])
def test_layouts(tmp_path, kind, image, label, raw, opt, split):
    save(tmp_path / "r" / image, PHOTO), save(tmp_path / "r" / label, raw)
    spec = lambda root: f"{kind}:{root}" + (f",{opt}" if opt else "")
    ds = open_dataset(spec(tmp_path / "r"), split)
    assert ds.names == ["u_0"] and ds[0][1].tolist() == TRAINED.tolist() and ds.space is CITYSCAPES
    assert open_dataset(spec(tmp_path / "r"), split, CITYSCAPES16)[0][1][0].tolist() == [0, CITYSCAPES16.index("car"), CITYSCAPES16.index("sky"), 255]
    refused(lambda: open_dataset(spec(tmp_path), split), f"{kind}:{tmp_path / 'r'}", "no such folder")      # one level too high
    if label != "training/labels/u_0.png": refused(lambda: open_dataset(spec(tmp_path / "r" / image.split("/")[0]), split), f"{kind}:{tmp_path / 'r'}")   # too low
    (tmp_path / "r" / label).unlink()
    assert (open_dataset(spec(tmp_path / "r"), split, labelled=False)[0][1] == 255).all()
    refused(lambda: open_dataset(spec(tmp_path / "r"), split), "has no label")


def test_outlines_of_cityscapes_and_idd(tmp_path):
    whole, left = [[0, 0], [3, 0], [3, 2], [0, 2]], [[0, 0], [0, 2]]
    objects = [dict(label="road", polygon=whole), dict(label="parking", polygon=left), dict(label="ridergroup", polygon=[[3, 0], [3, 0]]),
        dict(label="license plate", polygon=whole)]
    for kind, root, want in (("cityscapes", tmp_path / "c", 12), ("idd", tmp_path / "i", 12)):
        save(root / "leftImg8bit/train/x/a_leftImg8bit.png", PHOTO)
        p = root / "gtFine/train/x/a_gtFine_polygons.json"
        p.parent.mkdir(parents=True)
        p.write_text(json.dumps(dict(imgHeight=3, imgWidth=4, objects=objects[:3 if kind == "idd" else 4])))
        assert open_dataset(f"{kind}:{root}")[0][1].tolist() == [[255, 0, 0, want], [255, 0, 0, 0], [255, 0, 0, 0]]
    p.write_text(json.dumps(dict(imgHeight=3, imgWidth=4, objects=[dict(label="moon", polygon=whole)])))
    refused(lambda: open_dataset(f"idd:{root}")[0], "a_gtFine_polygons.json", "unknown class 'moon'")


def test_idd_in_its_own_classes(tmp_path):
    """Level 3 of IDD's tree: 26 classes, in which an animal is a person, a parking lot drivable, a train some vehicle."""
    leaves, level3 = {"parking": 1, "animal": 7, "train": 17, "tunnel": 31, "out of roi": 38}, [1, 4, 12, 23, 255]
    root, files = tmp_path / "leftImg8bit/val/7", tmp_path / "gtFine/val/7"
    photo = np.kron(PHOTO[:1, :1], np.ones((1, 5, 1), np.uint8))
    save(root / "u_0_leftImg8bit.png", photo), save(files / "u_0_gtFine_labellevel3Ids.png", np.array([level3], np.uint8))
    ds = open_dataset(f"idd:{tmp_path}", "val")
    assert ds.space is IDD and ds.space.num_classes == 26 and ds[0][1].tolist() == [level3]
    assert open_dataset(f"idd:{tmp_path}", "val", CITYSCAPES)[0][1].tolist() == [[255, CITYSCAPES.index("person"), 255, 255, 255]]
    (files / "u_0_gtFine_labellevel3Ids.png").unlink()
    save(files / "u_0_gtFine_labelIds.png", np.array([list(leaves.values())], np.uint8))
    assert open_dataset(f"idd:{tmp_path}", "val", IDD)[0][1].tolist() == [level3]
    city = [[255, 255, CITYSCAPES.index("train"), 255, 255]]                               # IDD's own way to Cityscapes' ids
    assert open_dataset(f"idd:{tmp_path}", "val")[0][1].tolist() == city
    (files / "u_0_gtFine_labelIds.png").unlink()
    objects = [dict(label=n, polygon=[[i, 0], [i, 0]]) for i, n in enumerate(leaves)]
    (files / "u_0_gtFine_polygons.json").write_text(json.dumps(dict(imgHeight=1, imgWidth=5, objects=objects)))
    assert open_dataset(f"idd:{tmp_path}", "val", IDD)[0][1].tolist() == [level3] and open_dataset(f"idd:{tmp_path}", "val")[0][1].tolist() == city
    save(files / "u_0_gtFine_labellevel3Ids.png", np.full((1, 5), 26, np.uint8))
    (files / "u_0_gtFine_polygons.json").unlink()
    refused(lambda: open_dataset(f"idd:{tmp_path}", "val")[0], "unknown label id 26")
    assert command("train", "source-only", "--source", f"idd:{tmp_path}", "--out", tmp_path / "r", *SMALL, "--classes", "id")[0] == 2


def test_vistas_by_its_config(tmp_path):
    names = ["void--unlabeled", "nature--sky", "construction--flat--road", "human--rider--motorcyclist", "object--vehicle--car"]
    (tmp_path / "config_v2.0.json").write_text(json.dumps(dict(labels=[dict(name=n) for n in names])))
    save(tmp_path / "training/images/a.jpg", PHOTO), save(tmp_path / "training/v2.0/labels/a.png", np.array([[1, 2, 3, 4]]*3, np.uint8))
    assert open_dataset(f"vistas:{tmp_path}")[0][1][0].tolist() == [10, 0, 12, 13]
    save(tmp_path / "training/v2.0/labels/a.png", np.full((3, 4), 5, np.uint8))
    refused(lambda: open_dataset(f"vistas:{tmp_path}")[0], "unknown label id 5")
    (tmp_path / "config_v2.0.json").write_text('{"labels": 3}')
    refused(lambda: open_dataset(f"vistas:{tmp_path}"), "is no config of Mapillary Vistas")
    (tmp_path / "config_v2.0.json").unlink()
    refused(lambda: open_dataset(f"vistas:{tmp_path}"), "config_v2.0.json: no such file")


def test_conditions(tmp_path):
    for c in ("fog", "night"): save(tmp_path / f"rgb_anon/{c}/val/G/{c}1_rgb_anon.png", PHOTO), save(tmp_path / f"gt/{c}/val/G/{c}1_gt_labelIds.png", RAW)
    assert open_dataset(f"acdc:{tmp_path}", "val").names == ["fog1", "night1"]
    assert open_dataset(f"acdc:{tmp_path},condition=night", "val").names == ["night1"]
    refused(lambda: open_dataset(f"cityscapes:{tmp_path},labels=rough"), "labels is 'rough', expected fine or coarse")


def test_real_files_of_the_data_sets(data):
    v = open_dataset(f"vistas:{data}/vistas")
    x, y = v[0]
    assert x.shape[1:] == y.shape == (2988, 3984) and {0, 10, 13} <= set(y.unique().tolist())
    assert (y[:400] == 10).float().mean() > (y[-400:] == 10).float().mean()                  # the sky is above
    c = open_dataset(f"carlascapes:{data}/carlascapes")
    assert len(c) == 4 and (c[0][1][-200:] == 0).float().mean() > .2
    assert (read_label(data / "bdd100k/masks/masks_0.png") < 20).any()
    refused(lambda: open_dataset(f"cityscapes:{data}"), f"cityscapes:{data}/cityscapes")


# ---- nothing is trained or scored on nothing

@pytest.fixture
def street(tmp_path):
    """Four photos of 40x48 whose colours are their classes, with ids."""
    rng = np.random.default_rng(0)
    for i in range(4):
        ids = np.kron(rng.integers(0, 3, (5, 6)), np.ones((8, 8), int)).astype(np.uint8)
        save(tmp_path / f"img/{i}.png", np.array([(40, 40, 40), (200, 30, 30), (30, 200, 30)], np.uint8)[ids]), save(tmp_path / f"lab/{i}.png", ids)
    return tmp_path


SMALL = "--net iapc_small --steps 2 --batch-size 2 --crop-height 33 --crop-width 33 --device cpu".split()


def command(*words):
    with pytest.MonkeyPatch.context() as m:
        err = io.StringIO()
        m.setattr("sys.stderr", err)
        rc = main([str(w) for w in words])
    said = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.startswith("protonb:")]
    return rc, " ".join(said)


def test_sources_without_labels(street):
    lonely = describe(street, "", labels=None)
    void = street / "void.toml"
    for i in range(4): save(street / f"void/{i}.png", np.full((40, 48), 255, np.uint8))
    void.write_text(describe(street, "", "v.toml", labels="void").read_text() + '\n[ids]\n0 = "ground"\n1 = "car"\n2 = "tree"\n255 = "ignore"')
    for spec in (f"folder:{lonely}", f"folder:{void}", f"images:{street}/img"):
        rc, said = command("train", "source-only", "--source", spec, "--out", street / "r", *SMALL)
        assert rc == 2 and f"--source {spec}" in said and "label" in said, said
        assert not (street / "r").exists()
        good = describe(street, "", "good.toml")
        rc, said = command("train", "source-only", "--source", f"folder:{good}", "--val", f"{spec},split=train" if "images" not in spec else spec,
                           "--out", street / "r", *SMALL)
        assert rc == 2 and "--val" in said and "label" in said and not (street / "r").exists(), said


def test_evaluations_without_a_labelled_pixel(street):
    good = describe(street, "", "good.toml")
    assert command("train", "source-only", "--source", f"folder:{good}", "--out", street / "r", *SMALL)[0] == 0
    for spec in (f"folder:{describe(street, '', labels=None)}", f"images:{street}/img"):
        rc, said = command("eval", street / "r", "--data", spec, "--split", "train")
        assert rc == 2 and "no labels" in said, said
        rc, said = command("report", street / "r", "--data", spec, "--split", "train")
        assert rc == 2 and "no labels" in said, said
    ds = folder(good)
    few = ClassSpace("sky", ("sky",), ((0, 0, 0),))
    nothing = take(ds, [])
    refused(lambda: require_labels(nothing, "val"), "val: has no labels")
    blank = [(ds[0][0], torch.full_like(ds[0][1], 255))]
    refused(lambda: evaluate(lambda x: torch.zeros(1, 1, 5, 6), blank, few, progress=False), "nothing to score")


def test_require_labels_finds_the_one_labelled_image(street):
    for i in range(3): save(street / f"lab/{i}.png", np.full((40, 48), 255, np.uint8))
    toml = describe(street, "")
    assert require_labels(folder(toml)).names == ["0", "1", "2", "3"]
    assert open_dataset(f"folder:{toml},size=20x24,cache=true")[3][1].shape == (20, 24)


def test_lists_of_labelled_images_that_are_empty(street):
    good = f"folder:{describe(street, '', 'good.toml')}"
    (street / "none.txt").write_text("\n")
    (street / "bad.txt").write_bytes(b"\xff\xfe\x00")
    dip = ["train", "dip", "--source", good, "--target", good, "--out", street / "r", "--net", "dip_small", "--steps", "2", "--batch-size", "2",
           "--crop-height", "33", "--crop-width", "33", "--device", "cpu", "--shots", "1", "--allow-missing"]
    for more, words in ((["--support", street / "none.txt"], "no labelled image"), (["--support", street / "bad.txt"], "UTF-8"), (["--shots", "0"], "--shots is 0")):
        rc, said = command(*dip, *more)
        assert rc == 2 and words in said and not (street / "r").exists(), said
    pixda = ["train", "pixda", "--source", good, "--target", good, "--out", street / "r", "--net", "pixda_small", "--steps", "2", "--batch-size", "2",
             "--device", "cpu"]
    rc, said = command(*pixda, "--few", street / "none.txt")
    assert rc == 2 and "names no image" in said, said


def test_a_split_that_is_spelt_otherwise(street):
    toml = describe(street, "", labels=None)
    toml.write_text(toml.read_text() + '\n[labels]\ntrian = "lab"')
    rc, said = command("train", "source-only", "--source", f"folder:{toml}", "--out", street / "r", *SMALL)
    assert rc == 2 and "'trian'" in said and "[labels]" in said
    toml.write_text(toml.read_text().replace("[labels]", "[lists]").replace('"lab"', '"l.txt"'))
    refused(lambda: folder(toml), "'trian'", "[lists]")


# ---- from files to a score in two commands

def score_of(run):
    return json.loads((Path(run) / "scores.json").read_text())


def test_camvid_as_published_from_files_to_a_score(tmp_path):
    rng, groups = np.random.default_rng(0), list(CAMVID_COLOURS)
    for n in ("0001TP_006690", "0001TP_006720", "0016E5_07959", "0016E5_07961"):
        mask = np.array(groups, np.uint8)[np.kron(rng.permutation(32).reshape(4, 8), np.ones((12, 8), int))]
        save(tmp_path / f"701_StillsRaw_full/{n}.png", mask), save(tmp_path / f"LabeledApproved_full/{n}_L.png", mask)
    assert command("train", "source-only", "--source", f"camvid:{tmp_path}", "--out", tmp_path / "r", *SMALL)[0] == 0
    assert command("eval", tmp_path / "r", "--data", f"camvid:{tmp_path}", "--device", "cpu")[0] == 0
    (found,) = score_of(tmp_path / "r").values()
    cm = np.array(found["cm"])
    assert cm.sum() == 2*31*12*8 and cm[CAMVID.index("car")].sum() == 2*5*12*8                   # one colour of 32 is void


def test_a_cvat_export_from_files_to_a_score(tmp_path):
    """CVAT's `Segmentation mask 1.1`: photos, masks in colours and lists; the description is the one in the notebook on data sets."""
    rng, table = np.random.default_rng(0), {"background": (0, 0, 0), "car": (250, 50, 83), "road": (128, 64, 128)}
    for i in range(4):
        ids = np.kron(rng.integers(0, 3, (5, 6)), np.ones((8, 8), int))
        save(tmp_path / f"JPEGImages/f{i}.jpg", np.array(list(table.values()), np.uint8)[ids])
        save(tmp_path / f"SegmentationClass/f{i}.png", np.array(list(table.values()), np.uint8)[ids])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("f0\nf1\nf2\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("f3\n")
    (tmp_path / "cvat.toml").write_text("""[images]
train = "JPEGImages"
val = "JPEGImages"
[labels]
train = "SegmentationClass"
val = "SegmentationClass"
[lists]
train = "ImageSets/Segmentation/train.txt"
val = "ImageSets/Segmentation/val.txt"
[classes]
background = [0, 0, 0]
car = [250, 50, 83]
road = [128, 64, 128]
""")
    assert command("train", "source-only", "--source", f"folder:{tmp_path}/cvat.toml", "--out", tmp_path / "r", *SMALL)[0] == 0
    assert command("eval", tmp_path / "r", "--data", f"folder:{tmp_path}/cvat.toml", "--device", "cpu")[0] == 0
    (found,) = score_of(tmp_path / "r").values()
    assert np.array(found["cm"]).sum() == 40*48 and np.array(found["cm"]).sum(1).tolist() == np.bincount(ids.ravel(), minlength=3).tolist()


def cvat_export(root, splits, table={"background": (0, 0, 0), "car": (250, 50, 83), "road": (128, 64, 128)}, folder=""):
    """CVAT's `Segmentation mask 1.1`: photos, masks in colours, a list for each split, and the classes in labelmap.txt."""
    rng, frames = np.random.default_rng(0), {}
    for split, n in splits.items():
        for i in range(n):
            name, ids = f"{folder}{split}{i}", np.kron(rng.integers(0, len(table), (5, 6)), np.ones((8, 8), int))
            save(root / f"JPEGImages/{name}.jpg", painted(ids, table), quality=95), save(root / f"SegmentationClass/{name}.png", painted(ids, table))
            save(root / f"SegmentationObject/{name}.png", painted(ids, table))
            frames.setdefault(split, {})[name] = ids
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{f}\n" for f in frames.get(split, ())))
    lines = ["# label:color_rgb:parts:actions", *(f"{c}:{','.join(map(str, rgb))}::" for c, rgb in table.items())]
    (root / "labelmap.txt").write_text("\n".join(lines))
    return frames


@pytest.mark.parametrize("splits, names", [(dict(train=3, val=1), ["train", "val"]), (dict(Train=3, Validation=1, Test=0), ["train", "val"]),
                                           (dict(default=3, val=1), ["train", "val"]), (dict(train=3, val=1, trainval=0), ["train", "val"])])
def test_a_cvat_export_is_opened_as_it_is(tmp_path, splits, names):
    frames = cvat_export(tmp_path, splits, folder="job_1/")
    if "trainval" in splits: (tmp_path / "ImageSets/Segmentation/trainval.txt").write_text("job_1/train0\njob_1/val0\n")
    data = f"folder:{tmp_path}"
    assert splits_of(data) == names and open_dataset(data).space.classes == ("background", "car", "road")
    assert command("train", "source-only", "--source", data, "--out", tmp_path / "r", *SMALL)[0] == 0
    assert command("eval", tmp_path / "r", "--data", data, "--device", "cpu")[0] == 0
    (found,) = score_of(tmp_path / "r").values()
    (ids,) = frames[list(splits)[1]].values()
    assert np.array(found["cm"]).sum(1).tolist() == np.bincount(ids.ravel(), minlength=3).tolist()
    assert command("data", "check", data)[0] == 0


def test_a_cvat_export_of_one_list(tmp_path):
    (ids, *_) = cvat_export(tmp_path / "x", dict(default=2))["default"].values()
    assert splits_of(f"folder:{tmp_path}/x") == ["train"]
    for given in ("x", "x/labelmap.txt"): assert np.array_equal(folder(tmp_path / given)[0][1], ids)
    refused(lambda: open_dataset(f"folder:{tmp_path}/x", "val"), "no split 'val', only: train")
    refused(lambda: folder(tmp_path), "expected a TOML file or an export of CVAT", f"give folder:{tmp_path}/x")
    refused(lambda: folder(tmp_path / "x/JPEGImages"), "is a folder, expected a TOML file")
    toml = tmp_path / "own.toml"                                                  # photos elsewhere, background left out, classes from the file
    toml.write_text('ignore_colours = [[0, 0, 0]]\nimages = {train = "x/JPEGImages"}\nlabels = {train = "x/SegmentationClass"}\n')
    assert folder(toml).space.classes == ("car", "road") and np.array_equal(folder(toml)[0][1], np.array([255, 0, 1])[ids])
    toml.write_text('classes = "x/labelmap.txt"\n' + toml.read_text())
    assert np.array_equal(folder(toml)[0][1], np.array([255, 0, 1])[ids])
    palette = Image.fromarray(np.uint8(ids))                                      # masks of one channel: the index is the place in the list
    palette.putpalette([v for rgb in ((0, 0, 0), (250, 50, 83), (128, 64, 128)) for v in rgb])
    palette.save(tmp_path / "x/SegmentationClass/default0.png")
    assert np.array_equal(folder(tmp_path / "x")[0][1], ids)


def test_supervisely_projects_are_opened_as_they_are(tmp_path):
    meta = dict(classes=[dict(title="ground", shape="any", color="#0A141E"), dict(title="car", shape="polygon", color="#C80000"),
        dict(title="wire", shape="line", color="#00FF00")], tags=[])
    d = dict(size=dict(height=3, width=4), objects=[dict(classTitle="car", geometryType="polygon", points=dict(exterior=SQUARE, interior=[])),
        dict(classTitle="wire", geometryType="line", points=dict(exterior=[[0, 0], [3, 2]], interior=[]))])
    root = tmp_path / "project"
    for ds in ("train", "val"):
        save(root / ds / "img/a.jpg", PHOTO if ds == "train" else 255 - PHOTO), (root / ds / "ann").mkdir()
        (root / ds / "ann/a.jpg.json").write_text(json.dumps(d))
    (root / "meta.json").write_text(json.dumps(meta))
    assert splits_of(f"folder:{root}") == ["train", "val"]
    ds = folder(root, "val")
    assert (ds.space.classes, ds.space.palette, ds[0][1].tolist()) == (("ground", "car"), ((10, 20, 30), (200, 0, 0)), WANT.tolist())
    (root / "own.toml").write_text('format = "supervisely"\nimages = {train = "train/img"}\nlabels = {train = "train/ann"}')
    assert folder(root / "own.toml")[0][1].tolist() == WANT.tolist()              # the classes of meta.json, as none are given
    (root / "own.toml").write_text((root / "own.toml").read_text() + '\nnames = {car = "ground"}')
    assert folder(root / "own.toml").space.classes == ("ground",) and folder(root / "own.toml")[0][1].max() == 255
    for bad, words in (({}, "it lacks"), (dict(classes=[]), "no class with a colour"), (dict(classes=[meta["classes"][2]]), "no class with a colour"),
            (dict(classes=[dict(title="car", color="red")]), "ValueError"), (dict(classes=[meta["classes"][1]]*2), "is there twice")):
        (root / "meta.json").write_text(json.dumps(bad))
        refused(lambda: folder(root), "meta.json: is no supervisely file", words)


def test_outlines_of_cvat_bring_their_classes(tmp_path):
    labels = "".join(f"<label><name>{c}</name><color>{rgb}</color><type>{kind}</type></label>" for c, rgb, kind in
                     (("ground", "#0a141e", "any"), ("car", "#c80000", "polygon"), ("tree", "#007828", "mask"), ("night", "#ffffff", "tag")))
    text = CVAT.replace("<annotations>", f"<annotations><meta><job><labels>{labels}</labels></job></meta>")
    save(tmp_path / "x/images/job/a.jpg", PHOTO), save(tmp_path / "x/images/other.jpg", PHOTO)
    (tmp_path / "x/annotations.xml").write_text(text)
    want = np.where(WANT == 255, 0, WANT)
    want[[1, 2, 2], [2, 2, 3]] = 2
    ds = folder(tmp_path / "x")
    assert (ds.space.classes, ds.space.palette, len(ds), ds[0][1].tolist()) == (tuple(COLOURS), tuple(COLOURS.values()), 2, want.tolist())


@pytest.mark.parametrize("text", ["# rows\n\nground:10,20,30::\n car:200,0,0:door:\ntree: 0, 120, 40\n", "10 20 30 ground\n200\t0\t0 car\n0, 120, 40, tree",
                                  "name,r,g,b\r\nground,10,20,30\r\ncar, 200, 0, 0\r\ntree,0,120,40\r\n"])
def test_tables_of_classes(tmp_path, text):
    (tmp_path / "c.txt").write_text(text, encoding="utf-8-sig", newline="")
    assert read_classes(tmp_path / "c.txt") == COLOURS
    for bad, words in ((text + "\nsky", "no colour in 'sky'"), (text.replace("200", "300"), "no r,g,b"), (text.replace("tree", "car"), "twice"), ("", "no class")):
        (tmp_path / "c.txt").write_text(bad)
        refused(lambda: read_classes(tmp_path / "c.txt"), "c.txt: is no colour table file", words)
    (tmp_path / "c.txt").write_text("a:0,0,0::\nb:1,0,0::\nc:0,0,0::\n")
    refused(lambda: read_classes(tmp_path / "c.txt"), "'c' has the colour of another class")


def test_the_means_of_cityscapes16():
    assert [t for t, _ in CITYSCAPES16.subsets] == ["16", "13"]
    thirteen = [CITYSCAPES16.classes[i] for i in CITYSCAPES16.subsets[1][1]]
    assert thirteen == [CITYSCAPES.classes[i] for i in CITYSCAPES.subsets[2][1]] and len(thirteen) == 13


def test_paths_that_the_system_refuses(tmp_path):
    long = "x"*300
    for words in (["train", "source-only", "--source", f"gta5:/{long}", "--out", tmp_path / "r", *SMALL], ["info", f"/{long}"],
            ["train", "source-only", "--source", f"folder:/{long}.toml", "--out", tmp_path / "r", *SMALL]):
        rc, said = command(*words)
        assert rc == 2 and long in said and said.count("protonb:") == 1, said


def test_coarse_outlines_as_weak_labels(tmp_path):
    from protonb.weak_labels import cityscapes_weak
    for i in range(2):
        save(tmp_path / f"leftImg8bit/train/x/a_{i}_leftImg8bit.png", PHOTO)
        p = tmp_path / f"gtCoarse/train/x/a_{i}_gtCoarse_polygons.json"
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(json.dumps(dict(imgHeight=3, imgWidth=4, objects=[dict(label="car", polygon=SQUARE)])))
    weak, plain = cityscapes_weak(tmp_path, "coarse"), open_dataset(f"cityscapes:{tmp_path},labels=coarse")
    assert weak[1][1].tolist() == plain[1][1].tolist() == np.where(WANT == 1, 13, 255).tolist()
    p.unlink()
    refused(lambda: cityscapes_weak(tmp_path, "coarse"), "a_1_leftImg8bit.png: has no label")


def test_lanes_of_synthia_as_each_paper_has_them(tmp_path):
    import cv2
    raw = np.zeros((40, 48, 3), np.uint16)
    raw[..., 2] = 3
    raw[:20, :, 2] = 22
    for i in range(2):
        save(tmp_path / f"RGB/{i}.png", np.zeros((40, 48, 3), np.uint8))
        (tmp_path / "GT/LABELS").mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / f"GT/LABELS/{i}.png"), raw)
    from protonb.cli import open_job, parse
    share = {}
    for name, net in (("source-only", "iapc_small"), ("pixda", "pixda_small"), ("pbal", "pbal_small"), ("proda", "proda_small")):
        for more in ("", ",lane_is_road=true", ",lane_is_road=false"):
            words = ["train", name, "--source", f"synthia:{tmp_path}{more}", "--out", str(tmp_path / "r"), "--net", net, "--device", "cpu"]
            if name != "source-only": words += ["--target", f"synthia:{tmp_path}"]
            if name == "pixda":
                (tmp_path / "few.txt").write_text("0\n")
                words += ["--few", str(tmp_path / "few.txt")]
            job, _ = open_job(parse(words))
            share[name, more] = (job.source[0][1][:20] == 0).float().mean().item()
    for name in ("source-only", "pixda", "pbal", "proda"):
        assert share[name, ",lane_is_road=true"] == 1 and share[name, ",lane_is_road=false"] == 0
    assert [share[n, ""] for n in ("source-only", "pixda", "pbal", "proda")] == [1, 1, 0, 0]


def test_labels_drawn_on_the_unturned_photo_are_named(tmp_path):
    noted(tmp_path / "img/1.jpg", np.kron(PHOTO, np.ones((16, 16, 1), np.uint8)), 8), save(tmp_path / "lab/1.png", np.zeros((64, 48), np.uint8))
    refused(lambda: labels_of(describe(tmp_path, "")), "is 48x64", "is 64x48", "EXIF")


def test_lists_of_one_class_as_voc_has_them(voc):
    assert folder(voc("000  1\n001 -1\n003  0\n")).names == ["000", "003"]


def test_weak_labels_that_are_all_255(street):
    for i in range(4): save(street / f"void/{i}.png", np.full((40, 48), 255, np.uint8))
    good, void = describe(street, "", "good.toml"), describe(street, "", "void.toml", labels="void")
    void.write_text(void.read_text() + '\n[ids]\n0 = "ground"\n1 = "car"\n2 = "tree"\n255 = "ignore"')
    small = ["--net", "wdass_small", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--crop-height", "32", "--crop-width", "32"]
    rc, said = command("train", "wdass", "--source", f"folder:{good}", "--target", f"folder:{void}", "--out", street / "r", *small)
    assert rc == 2 and f"--target folder:{void}" in said and "255" in said and not (street / "r").exists(), said


def test_a_method_called_from_python_asks_for_labels_too(street):
    from protonb.deeplabv2 import wdass_small
    from protonb.methods import Job, train
    from protonb.runs import METHODS
    from protonb.training import Train
    bare, m = folder(describe(street, "", labels=None)), METHODS["source-only"]
    job = Job(m, m.settings(), Train(steps=1, batch_size=1, device="cpu"), street / "r", wdass_small(num_classes=3), bare)
    refused(lambda: train(job), "source: has no labels")
    assert not (street / "r").exists()


def test_folders_that_overlap(tmp_path):
    save(tmp_path / "img/a/1.png", PHOTO), save(tmp_path / "img/b/2.png", PHOTO)

    def opened(images):
        (tmp_path / "d.toml").write_text(f"space = 'camvid'\nimages = {{train = {images}}}")
        return folder(tmp_path / "d.toml")
    assert opened(f'["img/a", "{tmp_path}/img/b"]').names == ["1", "2"]
    refused(lambda: opened('["img", "img/b"]'), "twice")
    refused(lambda: opened('"img/**"'), "same name")
    assert len(opened('"im?/**/*.png"')) == 2


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "phone").mkdir()
    for i in range(3): (tmp_path / f"phone/{i}.HEIC").write_bytes(b"x")
    refused(lambda: images(tmp_path / "phone"), "phone: holds no image; 3 of its files end in .heic, expected .png")


def test_rare_labels(tmp_path):
    """Grey with alpha in 16 bits, a transparent grey value, one bit in a TIFF, a BMP with a palette, an ending in capitals."""
    grey = np.stack([IDS, np.full_like(IDS, 255)], -1).astype(">u2")
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    (tmp_path / "la.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 4, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r.tobytes() for r in grey))) + chunk(b"IEND", b""))
    assert (read_label(tmp_path / "la.png") == IDS).all()
    assert (read_label(save(tmp_path / "t.png", IDS, transparency=0)) == IDS).all()
    assert (read_label(save(tmp_path / "b.tif", IDS > 0, compression="group4")) == (IDS > 0)).all()
    im = Image.fromarray(IDS)
    im.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    im.save(tmp_path / "p.bmp")
    assert (read_label(tmp_path / "p.bmp") == IDS).all()
    save(tmp_path / "img/1.JPG", PHOTO), save(tmp_path / "lab/1.PNG", IDS)
    assert labels_of(describe(tmp_path, "")) == [IDS.tolist()]


def test_notes_that_mean_nothing(tmp_path):
    note = Image.Exif()
    note[0x0112] = 77
    for name, exif in (("a.jpg", note), ("b.jpg", b"Exif\0\0no notes at all")):
        p = save(tmp_path / name, PHOTO, exif=exif)
        assert read_image(p).shape == (3, 4, 3) and image_size(p) == (3, 4)


def test_a_name_that_the_terminal_cannot_write(tmp_path, monkeypatch):
    save(tmp_path / "img/\U0001f697.png", PHOTO), save(tmp_path / "lab/\U0001f697.png", IDS[:2])
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["data", "check", f"folder:{describe(tmp_path, '')}"]) == 2
    terminal.flush()
    assert b"lab/\\U0001f697.png: is 2x4 (height x width)" in terminal.buffer.getvalue()
