"""What the site is made from: every exported name is described. The pages themselves are looked at by `make test-browser`."""
import ast
import re
import sys
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import api  # noqa: E402
import cells  # noqa: E402


def test_every_exported_name_is_described():
    assert sum(len(m.entries) for m in api.modules()) > 900
    assert not api.missing(), "\n".join(api.missing())


def test_every_name_of_all_has_an_entry():
    for m in api.modules():
        tree = ast.parse((ROOT/"protonb"/f"{m.name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        names = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        assert {e.name for e in m.entries} == set(names), m.name


SOURCE = '''
__all__ = ['area', 'Box', 'SIDES', 'bare']

# %% ../nbs/x.ipynb #cell0001
SIDES = 4  # Of a rectangle

def area(
    width, height,  # Metres; metres too
    *,
    scale:float=1.,
)->float:           # Square metres
    "What it covers."
    return width*height*scale

class Box:
    "A box."
    size:int = 3   # Edge
    loose:int = 1
    def grow(self, by): return self.size + by  # Metres -> new edge

def bare(x): return x
'''


def test_what_is_read_and_what_is_missing():
    entries = {e.name: e for e in api.Reader(SOURCE).entries()}
    assert list(entries) == ["SIDES", "area", "Box", "bare"] and entries["area"].cell == "cell0001"
    assert entries["SIDES"].doc == "Of a rectangle" and entries["area"].doc == "What it covers."
    assert [(p.name, p.type, p.default, p.text) for p in entries["area"].params] == [
        ("width", "", "", "Metres"), ("height", "", "", "metres too"), ("scale", "float", "1.", "")]
    assert entries["area"].returns.text == "Square metres" and entries["area"].signature == "area(width, height, *, scale: float = 1.) -> float"
    assert entries["Box"].methods[0].params[0].text == "Metres" and entries["Box"].methods[0].doc
    assert [line for e in entries.values() for line in e.missing()] == [
        "area(scale): no comment", "Box(loose): no comment", "bare: no docstring", "bare(x): no comment"]


def test_cells_that_are_not_for_reading():
    assert cells.hidden("#| hide\nx = 1") and cells.hidden("#| default_exp ops") and not cells.hidden("#| export\nx = 1")
    assert cells.only_imports("#| export\nimport os\nfrom torch import nn") and not cells.only_imports("import os\nos.getcwd()")
    assert cells.only_imports("import os\nif True: os.environ.setdefault('A', '1')") and not cells.only_imports("imports = 1")


def test_alternative_texts():
    described = run_path(str(ROOT/"tools"/"site.py"))["described"]
    cell = lambda source: {"source": source}
    assert described(cell("#| fig-alt: Three discs\nplt.plot(x)"), {}, "Before:") == "Three discs"
    assert described(cell("ax.set(xlabel='steps\\nof stage 1', title='$q$')"), {}, "No lead. So it goes, `step` by step:") == \
        "Figure (steps of stage 1): So it goes, step by step"
    assert described(cell("plt.plot(x)"), {}, "A sentence about something else.", "The sky") == 'Figure in "The sky"'


def test_a_drawing_is_never_too_small_to_read():
    """Letters of the drawings in nbs/images stay as large as those of `protonb.diagrams.Drawing`."""
    from protonb.diagrams import Drawing
    site = run_path(str(ROOT/"tools"/"site.py"))
    book = site["Book"].__new__(site["Book"])      # not read: one image asks for the place of its page and a list of files
    book.files = {}
    made = site["Renderer"](book, "03_models/01_resnet.html").image("text", "../images/resnet_stages.svg")
    wide = int(re.search(r'width="(\d+)"', (ROOT/"nbs"/"images"/"resnet_stages.svg").read_text())[1])
    assert made.startswith('<span class="drawing" ') and f'min-width:{Drawing.least*wide:.0f}px' in made
    assert "drawing" not in site["Renderer"](book, "index.html").image("text", "images/demo.png")
