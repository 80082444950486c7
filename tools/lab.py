"""JupyterLab as `make lab` opens it: `jupyter lab --config tools/lab.py`.

The files of the book hold neither execution counts nor what a kernel says of itself, and nbdev's directives mark the cells that only the machinery needs.
This contents manager gives JupyterLab what it would add itself as soon as a page is opened (so that nothing counts as changed), folds hidden cells and
imports, and writes a notebook the way `nbdev_clean` leaves it (so that saving an unchanged page changes no byte).
"""
import sys
from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
from cells import hidden, only_imports, silent  # noqa: E402

FOLDED = dict(jupyter=dict(source_hidden=True))


def opened(nb):
    """A notebook with the kernel's description, its hidden cells and imports folded."""
    spec = KernelSpecManager().get_kernel_spec("python3")
    nb["metadata"]["kernelspec"] = dict(display_name=spec.display_name, language=spec.language, name="python3")
    nb["metadata"]["language_info"] = dict(IPythonKernel.language_info)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and any(f(cell["source"]) for f in (hidden, silent, only_imports)):
            cell["metadata"].update(FOLDED)
    return nb


class BookManager(AsyncLargeFileManager):
    """Files as they are, notebooks opened and cleaned."""
    async def get(self, path, content=True, type=None, format=None, **kwargs):
        model = await super().get(path, content=content, type=type, format=format, **kwargs)
        if content and model["type"] == "notebook" and self.in_book(path):
            opened(model["content"])
        return model

    async def save(self, model, path=""):
        if model.get("type") == "notebook" and model.get("content") and self.in_book(path):
            clean_nb(model["content"], clean_ids=False)
        return await super().save(model, path)

    def in_book(self, path):
        """Other notebooks are none of our business."""
        return path.strip("/").startswith("nbs/")


c = get_config()  # noqa: F821  (JupyterLab gives it)
c.ServerApp.root_dir = str(ROOT)
c.ServerApp.contents_manager_class = BookManager
c.LabApp.default_url = "/lab/tree/nbs/06_guides/01_tour.ipynb"
