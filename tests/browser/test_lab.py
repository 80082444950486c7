"""JupyterLab as `make lab` starts it, in a real browser: it opens on the tour, hidden cells are folded, looking at a page changes no file, and pages run."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT

TOUR = "nbs/06_guides/01_tour.ipynb"
RUNS = {TOUR: 240, "nbs/02_ops/05_pixel_losses.ipynb": 120, "nbs/05_methods/08_joint.ipynb": 120}   # seconds that each may take, on two cores
COPIED = ("nbs", "kernels", "tools", "benchmarks", "CONTRIBUTING.md", "README.md", "settings.ini")
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
pytestmark = pytest.mark.xdist_group("lab")      # one server for all of them


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server on a copy of the book: (address, token, folder)."""
    folder, own = tmp_path_factory.mktemp("book"), tmp_path_factory.mktemp("jupyter")
    for name in COPIED:
        there = ROOT/name
        if there.is_dir():
            shutil.copytree(there, folder/name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        else:
            shutil.copy(there, folder/name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for plug, values in {"apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
                         "notebook-extension/tracker": dict(windowingMode="none")}.items():       # all cells in the page, seen or not
        f = own/"user-settings"/"@jupyterlab"/f"{plug}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(values))
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(own), JUPYTERLAB_SETTINGS_DIR=str(own/"user-settings"), JUPYTERLAB_WORKSPACES_DIR=str(own/"ws"),
                            JUPYTER_RUNTIME_DIR=str(own/"run"), PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "jupyterlab", "--config", str(folder/"tools"/"lab.py"), "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=t"]
    with (own/"log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.time() + 240
        while time.time() < end:
            try:
                urllib.request.urlopen(f"{address}/api/status?token=t", timeout=10)
                break
            except OSError:
                assert server.poll() is None, (own/"log").read_text()[-3000:]
                time.sleep(.25)
        yield address, folder
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def opened(page, address, path=None):
    """Open a page of the book and wait for its kernel."""
    page.goto(f"{address}/lab/tree/{path}?token=t&reset" if path else f"{address}/?token=t")
    page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=120_000)
    page.evaluate("""async () => { const p = window.jupyterapp.shell.currentWidget; await p.context.ready; await p.sessionContext.ready;
        if (!p.sessionContext.session?.kernel) await p.sessionContext.changeKernel({name: 'python3'});
        await p.sessionContext.session.kernel.info }""")


def test_the_tour_opens_first_and_reading_changes_nothing(lab, watched):
    address, folder = lab
    before = (folder/TOUR).read_bytes()
    page, _ = watched(allowed=(address, "data:", "blob:", "about:", address.replace("http", "ws")))
    opened(page, address)
    assert page.evaluate("window.jupyterapp.shell.currentWidget.context.path") == TOUR
    folded = page.evaluate(f"document.querySelectorAll('{PANEL} .jp-CodeCell .jp-Placeholder, {PANEL} .jp-CodeCell .jp-InputPlaceholder').length")
    assert folded == 2, "the two cells of imports are folded"
    page.wait_for_timeout(1000)
    assert not page.evaluate("window.jupyterapp.shell.currentWidget.context.model.dirty"), "opening marks the page as changed"
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(1000)
    assert (folder/TOUR).read_bytes() == before, "saving an unchanged page changes it"
    for name in ("CONTRIBUTING.md", "kernels/README.md", "nbs/05_methods/02_dip.ipynb"):      # what pages link to lies below the root
        assert page.request.get(f"{address}/api/contents/{name}?token=t&content=0").ok, name


@pytest.mark.parametrize("path", RUNS)
def test_a_page_runs(lab, watched, path):
    address, folder = lab
    page, _ = watched(allowed=(address, "data:", "blob:", "about:", address.replace("http", "ws")))
    page.set_default_timeout(120_000)
    opened(page, address, path)
    start = time.time()
    ran = page.evaluate("async () => await window.jupyterapp.commands.execute('notebook:run-all-cells')")
    took = time.time() - start
    cells = page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.filter(c => c.cell_type === 'code')
        .map(c => [c.getSource().trim() !== '', c.execution_count, c.getOutputs().filter(o => o.output_type === 'error').map(o => o.evalue).join()])""")
    assert ran is not False
    assert not [e for _, _, e in cells if e], [e for _, _, e in cells if e]
    assert len(cells) > 10 and all(n for has, n, _ in cells if has), "cells that did not run"
    assert took < RUNS[path], f"{took:.0f} s"
    print(f"{path}: {took:.0f} s")
    page.evaluate("async () => await window.jupyterapp.commands.execute('docmanager:save')")
    saved = json.loads((folder/path).read_text(encoding="utf-8"))
    assert all(c["execution_count"] is None and not c["metadata"] for c in saved["cells"] if c["cell_type"] == "code"), "saved as nbdev_clean leaves it"
    page.evaluate("async () => await window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
