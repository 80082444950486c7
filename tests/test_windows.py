"""One window for all methods: what every paper's own code once made comes out of it, bit for bit."""
from dataclasses import replace

import old_windows as old
import pytest
import torch
from PIL import Image

from protonb.colour import policy_augment
from protonb.core import InputError, rng_for
from protonb.datasets import Cached, Mapped, PairFolder, images, resized, take
from protonb.labels import CITYSCAPES, IGNORE
from protonb.pseudo_labels import PartlyLabelled, Unlabelled
from protonb.transforms import DIP_AUGMENT, Augment, augment, resize_image
from protonb.windows import (
    IAPC_REFRESH_WINDOW, IAPC_WINDOW, PBAL_WINDOW, PIXDA_WINDOW, PRODA_WINDOW, WDASS_SOURCE_WINDOW, WDASS_TARGET_WINDOW, Geometry, Window,
    check_fits, cut, draw, image_sizes, look, place, resized_whole, scaled, three_views, to_base)

SIZES = [(96, 192), (97, 191), (63, 130), (120, 121), (75, 201)]
WEAK = Window(base_width=161, low=.7, high=1.5, crop_height=37, crop_width=91, flip_p=.5)
WDASS = Window(0, 0, .4, 1.6, 53, 71, .5, pad=True, resample="bicubic", base_first=True, rows_first=True)
IAPC = Window(72, 144, .8, 1.2, 49, 97, .5, tries=10, more_than=6, resample="bicubic")


def picture(size, seed=0):
    """Image, and a label of patches with ignored pixels."""
    g = torch.Generator().manual_seed(seed + size[0])
    label = torch.randint(0, 19, (-(-size[0] // 9), -(-size[1] // 9)), generator=g)
    label[torch.rand(label.shape, generator=g) < .2] = IGNORE
    label = label.repeat_interleave(9, 0).repeat_interleave(9, 1)[:size[0], :size[1]].contiguous()
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 13, 17, generator=g) * 255, size, mode="bicubic")[0]
    return image.clamp(0, 255).byte(), label


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.equal(y) if torch.is_tensor(x) else x == y


def weak_of(w):
    return old.WeakView(w.base_width, w.low, w.high, w.crop_height, w.crop_width, w.flip_p)


def wdass_of(w, w2=None):
    w2 = w2 or w
    return old.WDASSView(w.base_height, w.base_width, w2.base_height, w2.base_width, w.low, w.high, w.crop_height, w.crop_width, w.flip_p)


def iapc_of(w, r=IAPC_REFRESH_WINDOW):
    return old.IAPCView(w.base_height, w.base_width, w.low, w.high, w.crop_height, w.crop_width, w.tries, w.more_than, w.flip_p, True,
                         r.base_height, r.base_width)


@pytest.mark.parametrize("size", SIZES)
def test_pbal_and_proda(size):
    image, label = picture(size)
    for i in range(12):
        x, y, g = old.weak_view(image, label, rng_for(0, i), weak_of(WEAK))
        x2, y2, g2 = look(image, label, WEAK, rng_for(0, i))
        same((x, y, *vars(g).values()), (x2, y2, *vars(g2).values()))
        assert old.proda_view_tensor(g).equal(g2.numbers) and g.box(*size) == g2.box(*size)
        same(old.cut(image, None, g)[:1], cut(image, None, g2)[:1])


def test_pbal_labels_by_whole_numbers_are_todays_for_every_released_size():
    for n in (1024, 2048, 1052, 1914, 760, 1280, 720, 960, 1080, 1920):
        for whole in [*range(512, 3301, 13), 3300]:
            i = torch.arange(whole)
            assert ((i + .5) * n / whole).long().clamp(max=n - 1).equal((2 * i + 1) * n // (2 * whole))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", [(0, 0), (61, 143), (80, 160)])
def test_wdass(size, base):
    window = replace(WDASS, base_height=base[0], base_width=base[1])
    image, label = picture(size)
    frames = 0
    for i in range(16):
        x, y = old.wdass_to_base(image, label, base if base[0] else None)
        x, y = old.wdass_window(x, y, rng_for(1, i), wdass_of(window))
        x2, y2, g = look(image, label, window, rng_for(1, i))
        same((x, y), (x2, y2))
        frames += g.top < 0 or g.left < 0
    assert 0 < frames < 16


def test_points_on_their_way_to_the_base():
    image, label = picture((97, 191))
    dots = torch.where(torch.rand(label.shape, generator=torch.Generator().manual_seed(3)) < .002, label, IGNORE)
    for size in ((40, 80), (97, 191), None, (150, 303)):
        for points in (False, True):
            same(old.wdass_to_base(image, dots, size, points), to_base(image, dots, size, points))
    same(old.wdass_to_base(image, dots[::2, ::2], None), to_base(image, dots[::2, ::2]))
    assert to_base(image, None, (40, 80))[1] is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", [None, policy_augment])
def test_iapc(size, colour):
    image, label = picture(size)
    view = replace_view(iapc_of(IAPC), colour=bool(colour))
    for i in range(8):
        a, b = old.iapc_three_views(image, label, rng_for(2, i), view), three_views(image, label, IAPC, rng_for(2, i), colour)
        assert list(a) == list(b)
        same(tuple(a.values()), tuple(b.values()))


def replace_view(view, **kw):
    return replace(view, refresh_height=512, refresh_width=1024, **kw)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("to", [(64, 128), (81, 161), (96, 192), (72, 100)])
def test_pixda(size, to):
    image, label = picture(size)
    window = Window(*to, resample="bicubic")
    x, y, g = look(image, label, window, rng := rng_for(0))
    same(old.pixda_look_at(image, label, old.PixDAView(*to)), (x, y))
    same((x, y), resized_whole(image, label, to))
    assert rng.random() == rng_for(0).random()                      # nothing was drawn
    assert g == Geometry(*to, 0, 0, *to, False) and look(image, None, window, rng)[1] is None


def test_dip_looks_through_its_own_augmentation():
    image, label = picture((97, 191))
    cfg = Augment(crop_height=65, crop_width=81)
    same(augment(image, label, rng_for(4), cfg), look(image, label, cfg, rng_for(4))[:2])
    x, y, g = look(image, None, cfg, rng_for(4))
    assert x.equal(look(image, label, cfg, rng_for(4))[0]) and (y == IGNORE).all() and g is None


def test_released_values():
    assert weak_of(PBAL_WINDOW) == old.WeakView() and PRODA_WINDOW == PBAL_WINDOW
    assert wdass_of(WDASS_SOURCE_WINDOW, WDASS_TARGET_WINDOW) == old.WDASSView()
    assert replace(WDASS_SOURCE_WINDOW, base_height=512, base_width=1024) == WDASS_TARGET_WINDOW
    assert iapc_of(IAPC_WINDOW) == old.IAPCView()
    assert (IAPC_REFRESH_WINDOW.crop_height, IAPC_REFRESH_WINDOW.crop_width) == (IAPC_WINDOW.crop_height, IAPC_WINDOW.crop_width)
    assert old.PixDAView(PIXDA_WINDOW.base_height, PIXDA_WINDOW.base_width) == old.PixDAView() and PIXDA_WINDOW.whole


def test_released_windows_on_a_released_size():
    image, label = picture((1052, 1914))
    for i in range(2):
        same(old.weak_view(image, label, rng_for(0, i), old.WeakView())[:2], look(image, label, PBAL_WINDOW, rng_for(0, i))[:2])
        x, y = old.wdass_to_base(image, label, (720, 1280))
        same(old.wdass_window(x, y, rng_for(0, i), old.WDASSView()), look(image, label, WDASS_SOURCE_WINDOW, rng_for(0, i))[:2])
    same(old.pixda_look_at(image, label, old.PixDAView()), look(image, label, PIXDA_WINDOW, rng_for(0))[:2])
    a, b = (f(image, label, *rest) for f, rest in ((old.iapc_three_views, (rng_for(0), old.IAPCView())),
                                                   (three_views, (IAPC_WINDOW, rng_for(0), policy_augment))))
    same(tuple(a.values()), tuple(b.values()))


def test_a_window_may_be_drawn_again_and_padded():
    image, label = picture((97, 191))
    label[:, :150] = 0                                              # few classes on the left
    how = Window(crop_height=40, crop_width=40, tries=30, more_than=3)
    lefts = [draw(how, label.shape, rng_for(0, i), label).left for i in range(40)]
    anywhere = [draw(how, label.shape, rng_for(0, i)).left for i in range(40)]
    assert min(lefts) > 100 > min(anywhere)
    assert all(len(look(image, label, how, rng_for(0, i))[1].unique()) > 3 for i in range(10))
    x, y, g = look(image, label, Window(crop_height=120, crop_width=250, pad=True), rng_for(0))
    inside = torch.zeros(120, 250, dtype=torch.bool)
    inside[-g.top:-g.top + 97, -g.left:-g.left + 191] = True
    assert y[inside].view(97, 191).equal(label) and (y[~inside] == IGNORE).all() and not x[:, ~inside].any()
    assert x[:, inside].view(3, 97, 191).equal(image)


def test_the_plain_window_is_scale_cut_and_mirror():
    image, label = picture((96, 192))
    g = draw(Window(low=.8, high=1.3, crop_height=60, crop_width=70, flip_p=1.), label.shape, rng_for(5))
    x = resize_image(image, (g.height, g.width))[:, g.top:g.top + 60, g.left:g.left + 70].flip(-1)
    assert (cut(image, label, g)[0].int() - x.int()).abs().float().mean() < 1
    assert look(image, label, Window(), rng_for(0))[0] is image
    assert scaled(Window(base_width=100), (50, 33), 1.) == (151, 100)


def test_bad_settings_say_so():
    for bad, words in ((dict(low=0.), "low is 0.0"), (dict(low=2.), "low is 2.0, high is 1.0; expected low <= high"), (dict(flip_p=2), "flip_p is 2"),
                       (dict(resample="sharp"), "resample is 'sharp'; expected one of 'bilinear', 'bicubic'"), (dict(tries=0), "tries is 0"),
                       (dict(crop_width=-1), "crop_width is -1"), (dict(base_height=9), "the width alone"),
                       (dict(base_width=1000, low=.5, crop_width=501), "crop_width is 501, base_width is 1000, .* the smallest scaled image has a width of 500"),
                       (dict(base_height=10, base_width=10, crop_height=11), "crop_height is 11")):
        with pytest.raises(InputError, match=words):
            Window(**bad)
    Window(base_width=1000, low=.5, crop_width=501, pad=True)
    with pytest.raises(InputError, match="three views need a window"):
        three_views(*picture((50, 60)), Window(), rng_for(0))
    with pytest.raises(InputError, match="crop_width is 61, but the image is scaled to 50x60"):
        place(Window(crop_width=61), (50, 60), rng_for(0))


class Opened:
    """Counts which images are opened."""
    space = CITYSCAPES

    def __init__(self, sizes):
        self.sizes, self.names, self.opened = sizes, [f"photo_{i}" for i in range(len(sizes))], []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        self.opened.append(i)
        return torch.zeros(3, *self.sizes[i], dtype=torch.uint8), torch.zeros(self.sizes[i], dtype=torch.long)


def folder_of(path, sizes):
    for i, (h, w) in enumerate(sizes):
        Image.new("RGB", (w, h)).save(path / f"{i:02}.png")
    return images(path)


def test_check_fits_names_the_file(tmp_path):
    photos = folder_of(tmp_path, [(100, 200)] * 12 + [(60, 200)] + [(100, 200)] * 12)
    window = Window(base_width=200, low=.5, high=2., crop_height=40, crop_width=90)
    assert isinstance(photos, PairFolder) and [s for _, s in image_sizes(photos)].count((60, 200)) == 1
    for data in (photos, Unlabelled(photos), Cached(photos), Mapped(photos, CITYSCAPES), take(photos, [3, 12]), PartlyLabelled(photos, [0, 1])):
        with pytest.raises(InputError, match=r"12\.png: is 60x200.*crop_height is 40, but the image is scaled to 30x100"):
            check_fits(window, data)
    assert check_fits(window, take(photos, [0, 24])) is window
    assert check_fits(replace(window, pad=True), photos).pad
    assert check_fits(window, resized(photos, (100, 200))) is window      # other sizes than the files'
    (tmp_path / "12.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"12\.png: is damaged"):
        check_fits(window, photos)


def test_check_fits_opens_few_images_and_none_for_a_fixed_base():
    data = Opened([(100, 200)] * 19 + [(60, 200)])
    with pytest.raises(InputError, match="photo_19: is 60x200"):
        check_fits(Window(base_width=200, crop_height=61, crop_width=90), data)
    assert data.opened == [0, 10, 17, 18, 19]
    data.opened.clear()
    for window in (IAPC_WINDOW, WDASS_SOURCE_WINDOW, PIXDA_WINDOW):
        assert check_fits(window, data) is window
    assert not data.opened
    with pytest.raises(InputError, match=r"larger than every image \(100x200 at most, times 1.1\)"): check_fits(DIP_AUGMENT, data)
    assert list(image_sizes(Opened([]))) == [] and len(list(image_sizes(Opened([(5, 6)])))) == 1


def test_check_fits_knows_the_grid():
    data = Opened([(600, 900)])
    with pytest.raises(InputError, match="crop_width is 890; expected a multiple of 4, for example 888"):
        check_fits(replace(PBAL_WINDOW, crop_width=890), data, stride=4)
    with pytest.raises(InputError, match="crop_height is 1024; expected a multiple of 8 plus 1, for example 1017"):
        check_fits(Augment(crop_height=1024), data, stride=8, plus=1)
    assert check_fits(DIP_AUGMENT, data, stride=8, plus=1) is DIP_AUGMENT and check_fits(PBAL_WINDOW, data, stride=4) is PBAL_WINDOW


def test_a_padded_window_larger_than_every_image_is_one_line(tmp_path, capsys):
    """In every method that pads, before anything is written; one image that fills it is enough."""
    import tiny
    from protonb.cli import main
    big = ("--crop-height", "8201", "--crop-width", "8201")
    for words in (tiny.train("dip", tmp_path / "a", *big), tiny.train("joint", tmp_path / "b", *big), tiny.train("mixteacher", tmp_path / "c", *big),
                  tiny.train("wdass", tmp_path / "d", "--crop-height", "8192", "--crop-width", "8192")):
        assert main(words) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("protonb:")]
        assert len(said) == 1 and "larger than every image" in said[0] and "crop_height is 8" in said[0].replace("crop-height", "crop_height"), said
        assert not list(tmp_path.rglob("*.safetensors"))
