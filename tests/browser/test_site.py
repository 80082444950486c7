"""Every page of the site in a real browser, wide and narrow: no error, no overflow, no request to the network, no dead link; the search finds what it should."""
import functools
import html
import http.server
import re
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import TimeoutError

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT/"site"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if p.name != "404.html")
WIDTHS = 390, 1300
# Elements that are wider than their box must have a bar to scroll them with; those behind a fold or for readers of the screen alone are not seen.
CLIPPED = """() => [...document.querySelectorAll('.md-content pre, .md-content pre > code, .md-content .table, .md-content .outputs, .md-content .math')]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
                 && ![...e.children].some(c => ['auto', 'scroll'].includes(getComputedStyle(c).overflowX)))
    .map(e => e.className + ': ' + e.textContent.slice(0, 60))"""


def chapters():
    """The pages in heaps of at most twenty, so that a failure names a part, the rest goes on, and two processes share the work."""
    parts = {}
    for page in PAGES:
        parts.setdefault(page.split("/")[0] if "/" in page else "top", []).append(page)
    return {f"{name}-{i+1}" if len(pages) > 20 else name: pages[20*i:20*i+20] for name, pages in parts.items() for i in range(-(-len(pages)//20))}


def test_the_site_has_every_page():
    notebooks = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert len(notebooks) > 60 and not notebooks - set(PAGES), "run `make site` first"


def width_of(page, most):
    """How wide the page is, once its drawer has moved away: what is too wide for a moment only is none of a reader's troubles."""
    try:
        page.wait_for_function(f"document.documentElement.scrollWidth <= {most}", timeout=3000)
    except TimeoutError:
        pass
    return page.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize("part", chapters())
def test_pages_at_both_widths(watched, part):
    page, watch = watched()
    wrong = []
    for name in chapters()[part]:
        page.goto((SITE/name).as_uri())
        for width in WIDTHS:
            page.set_viewport_size(dict(width=width, height=900))
            wide = width_of(page, width)
            clipped = page.evaluate(CLIPPED)
            wrong += [f"{name} at {width}: {wide} pixels wide"]*(wide > width) + [f"{name} at {width}: clipped {c}" for c in clipped[:3]]
        wrong += [f"{name}: picture without a text: {s}" for s in page.evaluate("[...document.images].filter(i => !i.alt).map(i => i.src.slice(-40))")]
        wrong += [f"{name}: {e}" for e in watch.take()]
    assert not wrong, "\n".join(wrong)


def test_no_dead_links():
    texts = {name: (SITE/name).read_text(encoding="utf-8") for name in PAGES}
    ids = {name: {"", "__top", *re.findall(r'\sid="?([^"\s>]+)', text)} for name, text in texts.items()}
    dead, count = set(), 0
    for name, text in texts.items():
        for url in set(re.findall(r'\s(?:href|src)="?([^"\s>]+)', text)):
            if ":" in url.split("/")[0] or url.startswith("&quot;"):     # those of a page within the page
                continue
            count += 1
            path, _, anchor = unquote(html.unescape(url)).partition("#")
            there = (SITE/name).parent.joinpath(path).resolve() if path else SITE/name
            there = there/"index.html" if there.is_dir() else there
            known = there.relative_to(SITE).as_posix() if there.is_relative_to(SITE) else None
            if not there.exists() or known is None or (anchor and known in ids and anchor not in ids[known]):
                dead.add(f"{name}: {url}")
    assert count > 5000 and not dead, "\n".join(sorted(dead)[:40])


def search(page, address):
    page.goto(address)
    page.click(".md-search__input")
    page.keyboard.type("masked_average_pool")
    page.wait_for_selector(".md-search-result__link", timeout=30000)
    return [a.get_attribute("href") for a in page.query_selector_all(".md-search-result__link")]


def test_search_from_the_file_system(watched):
    page, watch = watched()
    found = search(page, (SITE/"index.html").as_uri())
    assert found[0].split("?")[0].endswith("api/ops.html"), found[:5]
    page.click(".md-search-result__link")
    page.wait_for_url("**/api/ops.html*")
    assert page.locator("#masked_average_pool").count() == 1
    assert any("01_pooling.html" in f for f in found), found
    assert not watch.take()


def test_search_from_a_local_server(watched):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    page, watch = watched(allowed=(address, "data:", "blob:"))
    found = search(page, address + "index.html")
    assert found[0].split("?")[0].endswith("api/ops.html") and not watch.take()
    server.shutdown()


def test_light_and_dark(watched):
    page, watch = watched(color_scheme="light")
    page.goto((SITE/"02_ops"/"01_pooling.html").as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("label.md-header__button:visible[for^=__palette]")
    page.wait_for_function(f"{paper} !== '{light}'")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate" and not watch.take()


def test_a_page_says_what_it_costs_and_where_it_stands():
    text = BeautifulSoup((SITE/"02_ops"/"01_pooling.html").read_text(encoding="utf-8"), "html.parser")
    assert "runs in" in text.select_one(".facts").text and "of memory" in text.select_one(".facts").text
    assert "commit" in text.select_one(".md-copyright").text and "protonb 0." in text.select_one(".md-copyright").text
    assert text.select_one(".md-footer__link--prev") and text.select_one(".md-footer__link--next")
    assert "imports" in text.select_one("details.imports summary").text and "from fastcore.test import" not in text.text
