"""The explorer of a report in a real browser: pointed at known pixels by mouse, finger and keys, its numbers are PyTorch's; it answers in 50 ms and asks for nothing."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from explorer_cases import K, by_torch, lens, scene  # noqa: E402

from protonb import explorer as X  # noqa: E402
from protonb.labels import CITYSCAPES  # noqa: E402
from protonb.report import write_report  # noqa: E402

SIZE, WIDTHS = (97, 193), (390, 1300)
pytestmark = pytest.mark.xdist_group("explorer")      # pages that are made once


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three scenes and two networks: (file, lenses, images, how far numbers may be off, data)."""
    lenses, images = [lens("start", 0, 8), lens("adapted", 1, 4, "centred")], [scene(*SIZE, s) for s in range(3)]
    d = X.explore(lenses, images, CITYSCAPES, points=120)
    file = write_report(tmp_path_factory.mktemp("small")/"report.html", title="small", explorer=X.explorer_section(d), space=CITYSCAPES)
    return file, lenses, images, X.stated_error(d), d


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Six images of 1024 x 2048 and two networks, as heavy as the page gets."""
    images = [scene(1024, 2048, s) for s in range(6)]
    d = X.explore([lens("start"), lens("adapted", 1)], images, CITYSCAPES)
    return write_report(tmp_path_factory.mktemp("large")/"report.html", title="large", explorer=X.explorer_section(d), space=CITYSCAPES)


def opened(watched, file, width, **options):
    page, watch = watched(width=width, height=1000, has_touch=width < 500, **options)
    page.goto(file.as_uri())
    page.locator("[data-part=image]").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('[data-part=said]').textContent.length > 9")
    return page, watch


def text(page, part): return page.locator(f"[data-part={part}]").text_content().strip()


def pressed(page, key): return page.eval_on_selector_all(f"[data-set^='{key}:'][aria-pressed=true]", "all => all.map(b => b.dataset.set.split(':')[1])")


def shown(page):
    """(2,K): the numbers beside the bars; a class without a prototype is nan."""
    rows = page.eval_on_selector_all(".x-row", "rows => rows.map(r => [...r.querySelectorAll('.x-num')].map(n => n.textContent))")
    return np.array([[float(n.replace("\u2212", "-").replace("\u2013", "nan")) for n in row] for row in rows]).T


def pixel_at(page, x, y, size=SIZE):
    """Where a pixel is on the screen."""
    box = page.locator("[data-part=image]").bounding_box()
    return box["x"] + (x + .5)/size[1]*box["width"], box["y"] + (y + .5)/size[0]*box["height"]


def wrong(page, lenses, image, x, y, within):
    """What is not PyTorch's of the numbers that are shown."""
    there = np.array([by_torch(l, image, x, y) for l in lenses])
    there[:, 4] = np.nan
    here = shown(page)
    assert (np.isnan(here) == np.isnan(there)).all()
    off = np.nanmax(np.abs(here - there))
    return [f"{x}, {y}: off by {off}"]*bool(off > within)


@pytest.mark.parametrize("width", WIDTHS)
def test_twenty_pixels(watched, small, width):
    """By finger on a phone, by mouse on a desk; and nothing is wider than the page."""
    file, lenses, images, within, _ = small
    page, watch = opened(watched, file, width)
    assert f"within {within:.4f}" in page.locator("#explorer").text_content() and within < .005
    rng, bad = np.random.default_rng(width), []
    for n in range(20):
        i, x, y = n % 3, int(rng.integers(SIZE[1])), int(rng.integers(SIZE[0]))
        page.click(f"[data-set='image:{i}']")
        at = pixel_at(page, x, y)
        page.touchscreen.tap(*at) if width < 500 else page.mouse.move(*at)
        assert text(page, "said").startswith(f"image {i}, pixel {x}, {y}: "), text(page, "said")
        truth = images[i][2][y, x].item()
        assert ("truly " + CITYSCAPES.classes[truth] if truth < K else "not labelled") in text(page, "said")
        bad += wrong(page, lenses, images[i][1], x, y, within)
    assert not bad, bad
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not watch.take()


def test_a_click_holds_a_pixel_and_lets_it_go(watched, small):
    page, watch = opened(watched, small[0], 1300)
    page.mouse.click(*pixel_at(page, 50, 40))
    assert text(page, "said").endswith("Held.") and "pixel 50, 40:" in text(page, "said")
    page.mouse.move(*pixel_at(page, 150, 60))
    assert "pixel 50, 40:" in text(page, "said")
    page.mouse.click(*pixel_at(page, 150, 60))
    assert "pixel 150, 60:" in text(page, "said") and text(page, "said").endswith("Held.")
    page.mouse.click(*pixel_at(page, 150, 60))
    page.mouse.move(*pixel_at(page, 20, 20))
    assert "pixel 20, 20:" in text(page, "said") and not watch.take()


@pytest.mark.parametrize("width", WIDTHS)
def test_keys(watched, small, width):
    file, lenses, images, within, d = small
    page, watch = opened(watched, file, width)
    page.focus("[data-part=image]")
    assert "pixel 96, 48:" in text(page, "said")
    press = page.keyboard.press
    for key, want in (("ArrowRight", "pixel 100, 48:"), ("ArrowDown", "pixel 100, 52:"), ("Shift+ArrowLeft", "pixel 99, 52:"), ("Shift+ArrowUp", "pixel 99, 51:")):
        press(key)                                      # cells of stride 4
        assert want in text(page, "said"), (key, text(page, "said"))
    assert not wrong(page, lenses, images[0][1], 99, 51, within)
    for key, what, want in (("t", "view", "truth"), ("t", "view", "none"), ("p", "view", "called"), ("i", "view", "none"), ("m", "view", "map"), ("b", "net", "0"), ("a", "net", "1"),
                            ("n", "image", "1"), ("Shift+N", "image", "0"), ("Shift+N", "image", "2")):
        press(key)
        assert pressed(page, what) == [want], key
    for key, want in (("3", 2), ("0", 9), ("Shift+Digit1", 10), (".", 11), (",", 10), ("5", 10)):              # the fifth has no prototype
        press(key)
        assert text(page, "class") == f"similarity to {CITYSCAPES.classes[want]}", key
        assert page.eval_on_selector_all(".x-row", "rows => rows.findIndex(r => r.getAttribute('aria-pressed') === 'true')") == want
    page.focus("[data-part=cloud]")
    known = d["nets"][1]["known"]
    press("ArrowRight")
    first = text(page, "of")
    for _ in range(len(known) + 1): press("ArrowRight")
    i, r, c, k = d["pixels"][1]
    assert first and text(page, "of") == f"{CITYSCAPES.classes[k]}: image {i}, pixel {c}, {r}" and pressed(page, "image") == [str(i)]
    assert text(page, "said").startswith(f"image {i}, pixel {c}, {r}: truly {CITYSCAPES.classes[k]}")
    press("Control+t")                                  # the browser's own
    assert pressed(page, "view") == ["map"] and not watch.take()


def colour_at(page, x, y):
    """Red, green, blue of the canvas at a pixel of the image."""
    return page.evaluate("""([u, v]) => { const c = document.querySelector('[data-part=image]');
        return [...c.getContext('2d').getImageData(Math.floor(u*c.width), Math.floor(v*c.height), 1, 1).data].slice(0, 3) }""", [(x + .5)/SIZE[1], (y + .5)/SIZE[0]])


def test_maps_and_labels_are_painted_where_they_belong(watched, small):
    """What is seen: a colour of the map, or of the label, laid over the image."""
    file, lenses, images, _, d = small
    page, watch = opened(watched, file, 1300)
    page.wait_for_function("performance.now() > 500")
    stops, seen = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]), []
    for net, key in ((0, "b"), (1, "a")):
        page.focus("[data-part=image]")
        page.keyboard.press(key)
        page.locator(".x-row").nth(2).click()
        low, high = (float(text(page, w).replace("\u2212", "-")) for w in ("low", "high"))
        for x, y in ((33, 22), (98, 70), (170, 41)):
            page.mouse.move(*pixel_at(page, 5, 5))        # the ring out of the way
            t = 4*(by_torch(lenses[net], images[0][1], x, y)[2] - low)/(high - low)
            want = [np.interp(t, range(5), stops[:, c])*215/255 for c in range(3)] + images[0][1][:, y, x].double().numpy()*40/255
            seen.append(np.abs(colour_at(page, x, y) - want).max())
    page.keyboard.press("t")
    for x, y in ((33, 22), (98, 70), (170, 41)):
        want = np.array(CITYSCAPES.palette[images[0][2][y, x]])*190/255 + images[0][1][:, y, x].double().numpy()*65/255
        seen.append(np.abs(colour_at(page, x, y) - want).max())
    assert max(seen) < 12, seen
    assert not watch.take()


@pytest.mark.parametrize("width", WIDTHS)
def test_going_over_the_cloud_says_where_a_feature_comes_from(watched, small, width):
    file, *_, d = small
    page, watch = opened(watched, file, width)
    for plot in ("pca", "tsne"):
        page.click(f"[data-set='plot:{plot}']")
        page.locator("[data-part=cloud]").scroll_into_view_if_needed()
        box = page.locator("[data-part=cloud]").bounding_box()
        known, xy = d["nets"][1]["known"], np.reshape(d["nets"][1]["cloud"][plot], (-1, 2))
        far = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 1e9*np.eye(len(xy))
        n = len(known) + int(far.min(1)[len(known):].argmax())                  # the loneliest pixel
        s = (min(box["width"], box["height"])/2 - 1 - 16)/1000
        at = box["x"] + box["width"]/2 + s*xy[n, 0], box["y"] + box["height"]/2 - s*xy[n, 1]
        page.touchscreen.tap(*at) if width < 500 else page.mouse.move(*at)
        i, r, c, k = d["pixels"][n - len(known)]
        assert text(page, "of") == f"{CITYSCAPES.classes[k]}: image {i}, pixel {c}, {r}"
        assert text(page, "said").startswith(f"image {i}, pixel {c}, {r}: ") and pressed(page, "image") == [str(i)]
    assert not watch.take()


TIMES = """async n => {
    const c = document.querySelector('[data-part=image]'), b = c.getBoundingClientRect(), times = []
    for (let i = 0; i < n; i++) {
        await new Promise(requestAnimationFrame)
        const from = performance.now()
        c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + b.width*((i*.37)%1), clientY: b.top + b.height*((i*.61)%1), pointerType: 'mouse', bubbles: true}))
        document.querySelector('[data-part=said]').getBoundingClientRect()
        times.push(performance.now() - from)
    }
    return times
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pointer_move_is_answered_in_50_ms(watched, large, width):
    """From the event until everything is drawn and laid out; the page as large as it gets. The processor may be somebody else's for a moment: nine in ten count."""
    assert large.stat().st_size < 8e6
    page, watch = opened(watched, large, width)
    times = np.array(page.evaluate(TIMES, 60))
    print(f"{width}: median {np.median(times):.1f} ms, 90 % {np.quantile(times, .9):.1f} ms, longest {times.max():.1f} ms")
    assert np.quantile(times, .9) < 50, times.round(1).tolist()
    before = text(page, "said")
    page.click("[data-set='image:3']")
    assert text(page, "said").startswith("image 3") and text(page, "said") != before and not watch.take()


def test_dark_pages_are_drawn_dark(watched, small):
    page, watch = opened(watched, small[0], 1300, color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.querySelector('#explorer-page')).getPropertyValue('--ink').trim()")
    assert ink == "#e6e8eb" and not watch.take()


def test_the_page_reads_without_a_picture(watched, small):
    """Names, numbers and what is seen stand in the text that a screen reader gets."""
    page, watch = opened(watched, small[0], 1300)
    label = page.get_attribute("[data-part=image]", "aria-label")
    assert re.match(r"image 0 through adapted: similarity to road\.", label) and page.get_attribute("[data-part=cloud]", "aria-label")
    row = page.locator(".x-row").first.text_content()
    assert row.startswith("road") and re.search(r"\d\.\d{3}", row)
    assert page.get_attribute("[data-part=said]", "aria-live") == "polite"
    data = json.loads(page.evaluate("document.getElementById('explorer-data').textContent"))
    assert len(data["images"]) == 3 and not watch.take()
