"""How the method pages read: python tools/pages.py prints, for each, the length of its code cells, its pictures, and where drawing, equation, step and table stand.
tests/test_book.py holds the pages to it."""
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT/"nbs"/"05_methods").glob("*.ipynb")), ROOT/"nbs"/"04_learning"/"16_distillation.ipynb"]


def measures(path):
    """Numbers of one notebook."""
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    lines = [[x for x in "".join(c["source"]).splitlines() if x.strip() and not x.startswith("#|")] for c in code]
    shown = [n for n, c in zip(lines, code) if not re.search(r"^#\|\s*(export|exporti|hide)", "".join(c["source"]), re.M)]
    pictures = sum(any(k.startswith("image/") for k in o.get("data", {})) for c in code for o in c["outputs"])

    def first(kind, pattern):
        return next((i for i, c in enumerate(cells) if c["cell_type"] == kind and re.search(pattern, "".join(c["source"]), re.M)), None)
    where = dict(drawing=first("code", r"diagram\("), equation=first("markdown", r"\$\$"), step=first("code", r"^def (\w+_)?step\("),
                 table=first("markdown", r"^\|.*\bfunction\b.*\|\s*$\n^\|[-| ]+\|"), settings=first("code", r"^METHOD = "))
    return dict(cells=len(code), all=statistics.median(map(len, lines)), examples=statistics.median(map(len, shown)), pictures=pictures,
                each=len(code)/max(pictures, 1), **where)


def main():
    """One row per page."""
    print(f"{'page':22}{'code cells':>11}{'median lines':>14}{'examples':>10}{'pictures':>10}{'one in':>8}   first drawing, equation, step, table, record (cell)")
    for path in PAGES:
        m = measures(path)
        print(f"{path.stem:22}{m['cells']:11}{m['all']:14g}{m['examples']:10g}{m['pictures']:10}{m['each']:8.1f}   "
              f"{m['drawing']}, {m['equation']}, {m['step']}, {m['table']}, {m['settings']}")


if __name__ == "__main__":
    main()
