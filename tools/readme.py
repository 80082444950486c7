"""README.md from nbs/index.ipynb. `--check` writes nothing and fails when README.md is stale."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`; change the notebook, not this file. -->\n\n"


def visible(cell):
    """The cell without nbdev's directives, or None when it is hidden or empty."""
    if re.search(r"^#\|\s*(hide|default_exp)\b", cell.source, re.M):
        return None
    if re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):  # only what it shows: Markdown
        shown = "\n\n".join("".join(o["data"].get("text/markdown", "")) for o in cell.outputs if "data" in o)
        return nbformat.v4.new_markdown_cell(shown) if shown else None
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    return cell if cell.source or cell.get("outputs") else None


def make():
    """The text of README.md and its pictures, as {relative path: bytes}."""
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in map(visible, nb.cells) if c]
    nb.metadata["language_info"] = dict(name="python", file_extension=".py")
    resources = dict(unique_key="README", output_files_dir="README_files")
    text, res = MarkdownExporter().from_notebook_node(nb, resources=resources)
    # Links and pictures in the notebook are relative to nbs/, in the README to the top.
    text = re.sub(r"(\]\()(?!https?:|#|README_files|/)([^)]+\))", lambda m: m[1] + tidy(m[2]), text)
    text = re.sub(r'(src=")(?!https?:|README_files|/|data:)([^"]+)', lambda m: m[1] + tidy(m[2]), text)
    files = {name: data for name, data in res.get("outputs", {}).items()}
    return NOTE + text.strip() + "\n", files


def tidy(target):
    return target[3:] if target.startswith("../") else "nbs/" + target


def main():
    text, files = make()
    wanted = {"README.md": text.encode(), **files}
    stale = [n for n, data in wanted.items() if not (ROOT / n).exists() or (ROOT / n).read_bytes() != data]
    if "--check" in sys.argv:
        sys.exit(f"stale, run `make readme`: {', '.join(stale)}" if stale else 0)
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(wanted[name])
    print("README.md:", f"wrote {', '.join(stale)}" if stale else "already in sync")


if __name__ == "__main__":
    main()
