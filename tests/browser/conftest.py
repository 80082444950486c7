"""A headless Chromium for the tests that need one: `make test-browser`."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
import chromium  # noqa: E402

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests of a process."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        running = p.chromium.launch(executable_path=chromium.find(), args=QUIET)
        yield running
        running.close()


class Watch:
    """What a page complains about and asks for."""
    def __init__(self, page, allowed):
        self.errors, self.allowed = [], allowed
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", self.asked)

    def asked(self, request):
        if not request.url.startswith(self.allowed):
            self.errors.append(f"request to {request.url}")

    def take(self):
        """The complaints since the last call."""
        found, self.errors = self.errors, []
        return found


@pytest.fixture
def watched(browser):
    """A page and its `Watch`, of files alone unless told otherwise."""
    made = []

    def page(width=1300, height=900, allowed=("file:", "data:", "blob:", "about:"), **options):
        context = browser.new_context(viewport=dict(width=width, height=height), **options)
        made.append(context)
        p = context.new_page()
        return p, Watch(p, allowed)
    yield page
    for context in made:
        context.close()
