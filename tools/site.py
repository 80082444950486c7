"""The book as a site: `make site` writes the folder site/, which opens from the file system and asks nothing of a network.

Notebooks and exported docstrings become Markdown under _docs/ (headings stay Markdown, for the table of contents and the search; the rest is HTML made
by nbconvert's own parser, so that a cell reads as in JupyterLab), and mkdocs with the material theme makes the pages. KaTeX sets the formulas here, not
in the browser; it, the fonts and the shim of the offline search are npm packages, kept in .venv/npm. Nothing of theirs is committed.
"""
import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
import yaml
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).parent))
import api  # noqa: E402
import times  # noqa: E402
from cells import bare, hidden, only_imports, silent  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NBS, DOCS, SITE = ROOT/"nbs", ROOT/"_docs", ROOT/"site"
NPM = ROOT/".venv"/"npm"
PACKAGES = ("katex@0.19.1", "iframe-worker@1.0.4", "@fontsource-variable/inter@5.3.0", "@fontsource-variable/source-serif-4@5.3.1",
            "@fontsource-variable/jetbrains-mono@5.3.0")
FONTS = {  # family -> (package, file, style)
    "Inter": [("inter", "inter-latin-wght-normal", "normal")],
    "Source Serif": [("source-serif-4", "source-serif-4-latin-wght-normal", "normal"), ("source-serif-4", "source-serif-4-latin-wght-italic", "italic")],
    "JetBrains Mono": [("jetbrains-mono", "jetbrains-mono-latin-wght-normal", "normal")]}
PARTS = {"01_data": "Data", "02_ops": "Operations", "03_models": "Networks", "04_learning": "Learning", "05_methods": "Methods",
         "06_guides": "Guides", "07_shell": "Command line"}
PAGES_OF_FILES = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "kernels/README.md": "kernels", "LICENSE": None}
LEXER, FORMATTER = PythonLexer(stripnl=False), HtmlFormatter(wrapcode=True)
SHOWN = ("image/svg+xml", "image/png", "image/jpeg")


def settings():
    """settings.ini."""
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


@cache
def commit():
    """Short hash of what is built, with a + when files differ from it; '' outside git."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    head = git("rev-parse", "--short=10", "HEAD")
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def slug(text):
    """Anchor of a heading, as GitHub makes it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|<[^>]+>", "", text)).strip().lower())


def python(source):
    """Highlighted Python."""
    return highlight(source, LEXER, FORMATTER)


def escape(text):
    """HTML of plain text."""
    return html.escape(str(text), quote=False)


class Formulas:
    """TeX -> HTML, in one run of KaTeX for the whole book; a formula that it can't set stops the build."""
    SCRIPT = """const k=require('katex'),fs=require('fs');process.stdout.write(JSON.stringify(JSON.parse(fs.readFileSync(0)).map(([t,d])=>{
      try{return k.renderToString(t,{displayMode:d,throwOnError:true,strict:'ignore'})}catch(e){return {error:t+': '+e.message}}})))"""

    def __init__(self):
        self.seen = {}

    def __call__(self, tex, display):
        return f"\u27e6{self.seen.setdefault((html.unescape(tex).strip(), display), len(self.seen))}\u27e7"

    def fill(self, pages):
        """The pages with their formulas in them."""
        env = os.environ | {"NODE_PATH": str(NPM/"node_modules")}
        done = subprocess.run(["node", "-e", self.SCRIPT], input=json.dumps(list(self.seen)), env=env, capture_output=True, text=True, check=True)
        made = json.loads(done.stdout)
        wrong = [m["error"] for m in made if isinstance(m, dict)]
        if wrong:
            sys.exit("KaTeX can't set:\n" + "\n".join(wrong))
        tags = [f"<span class=\"math\" data-search-exclude>{m}</span>" for m in made]
        return {n: re.sub("\u27e6(\\d+)\u27e7", lambda m: tags[int(m[1])], text) for n, text in pages.items()}


class Renderer(IPythonRenderer):
    """Cell text as HTML: formulas are set aside, links turned to the site's pages, names of the library linked to their entry."""
    def __init__(self, book, page):
        super().__init__(escape=False, exclude_anchor_links=True)
        self.book, self.page = book, page

    def inline_math(self, body):
        return self.book.formulas(body, False)

    def block_math(self, body):
        return f"<p>{self.book.formulas(body, True)}</p>"

    def latex_environment(self, name, body):
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def codespan(self, text):
        code = f"<code>{escape(text)}</code>"
        found = self.book.symbol(text, self.page)
        return f'<a class="symbol" href="{self.book.relative(self.page, found)}">{code}</a>' if found else code

    def link(self, text, url, title=None):
        inner = re.sub(r"</?a\b[^>]*>", "", text)
        return f'<a href="{html.escape(self.book.target(self.page, url))}">{inner}</a>'

    def image(self, text, url, title=None):
        image = f'<img alt="{html.escape(text)}" src="{html.escape(self.book.target(self.page, url))}" loading="lazy"'
        wide = re.match(rb'<svg [^>]*?\bwidth="(\d+)"', self.book.files.get(f"images/{Path(url).name}", b""))
        # a drawing has letters: on a narrow screen it scrolls, never under 85 % of its width, as protonb.diagrams has it
        return f'<span class="drawing" tabindex="0">{image} style="min-width:{.85*int(wide[1]):.0f}px"></span>' if wide else f"{image}>"

    def table(self, text):
        return f'<div class="table"><table>{text}</table></div>'

    def block_code(self, code, info=None):
        if info and info.split()[0] in ("python", "py"):
            return python(code)
        return f'<div class="highlight"><pre><span></span><code>{escape(code)}</code></pre></div>'


class Book:
    """All pages: Markdown by the name they get in the site."""
    def __init__(self):
        self.cfg, self.formulas, self.pages, self.files, self.nav = settings(), Formulas(), {}, {}, []
        self.notebooks = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p != NBS/"index.ipynb")
        self.modules = {m.notebook: m for m in api.modules()}
        self.names = Counter(e.name for m in self.modules.values() for e in m.entries)
        self.home = {e.name: m for m in self.modules.values() for e in m.entries}
        self.examples = {}      # (module, symbol) -> address of its example
        self.anchors = {}       # page -> ids of its headings
        self.readers = {}       # page -> its parser of Markdown

    # where things are

    def page_of(self, notebook):
        """Name of a notebook's page."""
        return Path(notebook).with_suffix(".html").as_posix()

    def relative(self, page, target):
        """Address of `target` (a page, perhaps with an anchor) seen from `page`."""
        path, _, anchor = target.partition("#")
        if path == page:
            return f"#{anchor}" if anchor else ""
        return os.path.relpath(path, Path(page).parent).replace(os.sep, "/") + (f"#{anchor}" if anchor else "")

    def outside(self, path, tree="blob"):
        """Address of a file of the repository."""
        return f"{self.cfg['git_url']}/{tree}/{commit().rstrip('+') or self.cfg['branch']}/{path}"

    def target(self, page, url):
        """Address in the site of what a cell links to."""
        if re.match(r"\w+:|//", url):
            return url
        path, _, anchor = url.partition("#")
        anchor = f"#{slug(anchor)}" if anchor else ""
        if not path:
            return anchor
        there = (self.source_of(page).parent/path).resolve()
        name = there.relative_to(ROOT).as_posix()
        if there.suffix == ".ipynb":
            return self.relative(page, self.page_of(there.relative_to(NBS)) + anchor)
        if PAGES_OF_FILES.get(name):
            return self.relative(page, f"project/{PAGES_OF_FILES[name]}.html{anchor}")
        if there.suffix in (".svg", ".png", ".jpg", ".gif"):
            self.files[f"images/{there.name}"] = there.read_bytes()
            return self.relative(page, f"images/{there.name}")
        return self.outside(name, "tree" if there.is_dir() else "blob") + anchor

    def source_of(self, page):
        """The file that a page is made from."""
        for name, short in PAGES_OF_FILES.items():
            if page == f"project/{short}.html":
                return ROOT/name
        return NBS/page

    def symbol(self, text, page):
        """Address of an exported symbol that inline code names, or None."""
        found = re.fullmatch(r"(?:protonb\.)?(?:(\w+)\.)?(\w+)(?:\(.*\))?", text.strip())
        if not found or len(found[2]) < 4:
            return None
        where, name = found[1], found[2]
        if where:
            module = next((m for m in self.modules.values() if m.name == where and any(e.name == name for e in m.entries)), None)
        else:
            own = self.modules.get(Path(page).with_suffix(".ipynb").as_posix())
            module = own if own and any(e.name == name for e in own.entries) else self.home.get(name) if self.names[name] == 1 else None
        return f"api/{module.name}.html#{name}" if module else None

    # text

    def markdown(self, text, page):
        """HTML of Markdown without headings."""
        if not text.strip():
            return ""
        if page not in self.readers:
            self.readers[page] = MarkdownWithMath(renderer=Renderer(self, page))
        return self.readers[page].render(text).strip()

    def block(self, inner, kind="text"):
        """A piece of HTML that mkdocs leaves alone."""
        return f'\n<div class="{kind}">\n{inner}\n</div>\n' if inner.strip() else ""

    def text(self, source, page):
        """Markdown with headings: these stay what they are."""
        out, held, fence = [], [], False
        ids = self.anchors.setdefault(page, Counter())

        def flush():
            out.append(self.block(self.markdown("\n".join(held), page)))
            held.clear()
        for line in source.splitlines():
            fence ^= bool(re.match(r"\s*(```|~~~)", line))
            head = None if fence else re.match(r"(#{1,6})\s+(.*?)\s*#*\s*$", line)
            if head:
                flush()
                name = slug(head[2])
                ids[name] += 1
                name += f"-{ids[name]-1}" if ids[name] > 1 else ""
                out.append(f"\n{head[1]} {head[2]} {{: #{name} }}\n")
            else:
                held.append(line)
        flush()
        return "".join(out)

    # cells

    def picture(self, data, kind, alt):
        """A figure; its file is named after its content."""
        raw = data.encode() if kind.startswith("image/svg") else base64.b64decode(data)
        end = dict(zip(SHOWN, ("svg", "png", "jpg")))[kind]
        name = f"figures/{hashlib.sha256(raw).hexdigest()[:16]}.{end}"
        self.files[name] = raw
        size = "" if end == "svg" else ' width="{}" height="{}"'.format(*Image.open(io.BytesIO(raw)).size)
        return name, f'alt="{html.escape(alt)}"{size} loading="lazy"'

    def outputs(self, cell, page, before, place):
        """What a cell shows."""
        out, plain = [], []

        def flush():
            if plain:
                text = re.sub(r"\x1b\[[\d;]*m", "", "".join(plain)).rstrip("\n")
                out.append(f'<pre class="output" tabindex="0">{escape(text)}</pre>')
                plain.clear()
        for o in cell.get("outputs", []):
            data = o.get("data", {})
            kind = next((k for k in ("text/html", "text/markdown", *SHOWN) if k in data), None)
            if kind is None:
                plain.append("".join(o.get("text", "")) or "".join(data.get("text/plain", "")))
                continue
            flush()
            body = "".join(data[kind])
            if kind == "text/markdown":
                out.append(f'<div class="shown">{self.markdown(body, page)}</div>')
            elif kind == "text/html":
                body = re.sub(r'<source media="\(prefers-color-scheme: dark\)"[^>]*>', "", body)
                out.append(f'<div class="shown html">{body}</div>')
            else:
                name, rest = self.picture(body, kind, described(cell, o, before, place))
                out.append(f'<figure><img src="{self.relative(page, name)}" {rest}></figure>')
        flush()
        return f'<div class="outputs" data-search-exclude>{"".join(out)}</div>' if out else ""

    def code(self, cell, page, before, place=""):
        """A code cell: highlighted source, what it exports, what it shows. Imports fold away, hidden cells are left out."""
        source = cell["source"]
        if hidden(source):
            return ""
        shown = self.outputs(cell, page, before, place)
        if silent(source):
            return self.block(shown, "cell") if shown else ""
        exported = re.search(r"^#\|\s*export", source, re.M)
        code = bare(source)
        if not code.strip():
            return self.block(shown, "cell") if shown else ""
        body = python(code)
        if only_imports(code):
            body = f'<details class="imports"><summary>imports</summary>{body}</details>'
        elif exported:
            module = self.modules.get(Path(page).with_suffix(".ipynb").as_posix())
            names = [e.name for e in module.entries if e.cell == cell["id"]] if module else []
            links = ", ".join(f'<a href="{self.relative(page, f"api/{module.name}.html#{n}")}"><code>{n}</code></a>' for n in names)
            if links:
                body = f'<div class="exported" data-search-exclude>exported: {links}</div>{body}'
        return f'\n<div class="cell{" export" if exported else ""}" id="cell-{cell["id"]}">\n{body}{shown}\n</div>\n'

    def lesson(self, path):
        """The page of a notebook."""
        nb = nbformat.read(path, 4)
        rel = path.relative_to(NBS)
        page, out, last, place, title, promise = self.page_of(rel), [], "", "", path.stem, ""
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                source = cell.source
                first = re.match(r"# (.+)\n+>\s*(.+(?:\n>.*)*)\n*", source)
                if first and not promise:
                    title, promise = first[1].strip(), re.sub(r"\n>\s*", " ", first[2])
                    out.append(f"# {title} {{: #top }}\n" + self.block(self.markdown(promise, page), "promise") + self.facts(rel))
                    source = source[first.end():]
                out.append(self.text(source, page))
                last, place = source, ([place] + re.findall(r"^#+\s+(.+?)\s*$", plain(source), re.M))[-1]
            elif cell.cell_type == "code":
                out.append(self.code(cell, page, last, place or title))
                last = "" if "<figure" in out[-1] else last      # it leads to one figure
        self.pages[page] = self.front(title, promise) + folded("".join(out))
        self.find_examples(nb, rel, page)
        return {title: page.replace(".html", ".md")}

    def front(self, title, promise, boost=1):
        """mkdocs' front matter."""
        matter = dict(title=re.sub(r"[`*]", "", title), description=re.sub(r"[`*$\\]", "", promise))
        if boost != 1:
            matter["search"] = dict(boost=boost)
        return "---\n" + yaml.safe_dump(matter, allow_unicode=True) + "---\n\n"

    def facts(self, rel):
        """'runs in N s, needs M', and where the notebook and its entries are."""
        module = self.modules.get(rel.as_posix())
        parts = []
        if rel.as_posix() in times.read():
            s, mb = times.read()[rel.as_posix()]
            took = f"{s/60:.1f} min" if s >= 100 else f"{max(5, 5*round(s/5))} s"
            parts.append(f"runs in {took} on one CPU core, needs {max(.1, mb/1000):.1f} GB of memory")
        if module:
            parts.append(f'exports <a href="{self.relative(self.page_of(rel), f"api/{module.name}.html")}">protonb.{module.name}</a>')
        parts.append(f'<a href="{self.outside("nbs/" + rel.as_posix())}">notebook</a>')
        return self.block(f'<p data-search-exclude>{" · ".join(parts)}</p>', "facts")

    def find_examples(self, nb, rel, page):
        """Where each exported symbol is shown: the first example cell that names it, and the cell that defines it."""
        module = self.modules.get(rel.as_posix())
        cells = [c for c in nb.cells if c.cell_type == "code"]
        for entry in module.entries if module else []:
            at = next((i for i, c in enumerate(cells) if c["id"] == entry.cell), None)
            if at is None:
                continue
            later = [c for c in cells[at+1:] if not re.search(r"^#\|\s*(export|hide|default_exp)", c.source, re.M) and not only_imports(c.source)]
            named = next((c for c in later if re.search(rf"\b{re.escape(entry.name)}\b", c.source)), None)
            seen = [c if c and f'id="cell-{c}"' in self.pages[page] else "" for c in (entry.cell, named and named["id"])]   # a hidden cell has no place
            self.examples[module.name, entry.name] = tuple(f"{page}#cell-{c}" if c else "" for c in seen)

    # reference

    def reference(self, module):
        """The API page of a module."""
        page = f"api/{module.name}.html"
        lesson = self.page_of(module.notebook)
        self.anchors[page] = Counter()
        out = [f"# protonb.{module.name} {{: #top }}\n", self.block(self.markdown(module.doc, page), "promise")]
        rows = "".join(f'<tr><td><a href="#{e.name}"><code>{e.name}</code></a></td><td>{self.markdown(first(e.doc), page)[3:-4] if e.doc else ""}</td></tr>'
                       for e in module.entries)
        source = f"protonb/{module.name.replace('.', '/')}.py"
        out.append(self.block(f'<p data-search-exclude>lesson: <a href="{self.relative(page, lesson)}">{escape(self.titles[module.notebook])}</a> · '
                              f'<a href="{self.outside(source)}">{source}</a></p>', "facts"))
        out.append(self.block(f'<table class="contents"><tbody>{rows}</tbody></table>', "table contents") if rows else "")
        for e in module.entries:
            out.append(self.entry(module, e, page))
        self.pages[page] = self.front(f"protonb.{module.name}", module.doc, 9 if module.name == "ops" else 3) + "".join(out)   # the public door is found first
        return {f"{module.name}": page.replace(".html", ".md")}

    def entry(self, module, e, page, level="##"):
        """One symbol: what it is, its signature, its parameters, where it is shown, its source."""
        name = e.name
        out = [f"\n{level} `{name}` {{: #{name} }}\n"]
        body = [f'<span class="kind">{e.kind}</span>' if e.kind != "function" else ""]
        body.append(python(e.signature if e.kind != "constant" else short(uncommented(e.signature))))
        body.append(self.markdown(e.doc, page))
        if e.params:
            body.append(self.table(e, page))
        elif e.returns and (e.returns.text or e.returns.type):
            body.append(self.table(e, page))
        if level == "##":
            links = []
            made, shown = self.examples.get((module.name, name), ("", ""))
            if shown:
                links.append(f'<a href="{self.relative(page, shown)}">example</a>')
            if made:
                links.append(f'<a href="{self.relative(page, made)}">where the lesson writes it</a>')
            body.append(f'<p class="links" data-search-exclude>{" · ".join(links)}</p>' if links else "")
            body.append(f'<details class="source" data-search-exclude><summary>source</summary>{python(e.source)}</details>')
        out.append(self.block("\n".join(body), "entry"))
        return "".join(out) + "".join(self.entry(module, m, page, "###") for m in e.methods)

    def table(self, e, page):
        """Parameters or fields: name, type, default, what it is."""
        rows, had = [], set()
        typed, given = any(p.type for p in e.params), any(p.default for p in e.params)
        for p in e.params:
            same = [q for q in e.params if q.text == p.text and (q.type, q.default) == (p.type, p.default)] if p.text else [p]
            if p.name in had:
                continue
            had |= {q.name for q in same}
            names = ", ".join(f"<code>{escape(q.name)}</code>" for q in same)
            rows.append(f"<tr><td>{names}</td>" + (f"<td>{code(p.type)}</td>" if typed else "") + (f'<td class="default">{code(p.default)}</td>' if given else "")
                        + f"<td>{self.markdown(p.text, page)[3:-4] if p.text else ''}</td></tr>")
        if e.returns and (e.returns.text or e.returns.type):
            rows.append(f'<tr class="returns"><td>returns</td>' + ("<td>" + code(e.returns.type) + "</td>" if typed else "") + ("<td></td>" if given else "")
                        + f"<td>{'' if typed or not e.returns.type else code(e.returns.type) + ' '}"
                        f"{self.markdown(e.returns.text, page)[3:-4] if e.returns.text else ''}</td></tr>")
        head = "<th>" + ("parameter" if e.made or e.kind != "class" else "field") + "</th>" + ("<th>type</th>" if typed else "") + \
            ("<th>default</th>" if given else "") + "<th>what it is</th>"
        return f'<div class="table"><table class="params"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'

    def index_of_symbols(self):
        """The first page of the reference: modules, then every symbol in alphabetical order."""
        page = "api/index.html"
        out = ["# API {: #top }\n", self.block(f"<p>{len(self.modules)} modules export {sum(self.names.values())} names. "
               "Each has its signature, its parameters with shapes and units, a link to the lesson that writes it and to the cell that shows it at work.</p>", "promise")]
        for folder in ("", *PARTS):
            inside = [m for m in self.modules.values() if (Path(m.notebook).parts[0] if "/" in m.notebook else "") == folder]
            if inside:
                rows = "".join(f'<tr><td><a href="{m.name}.html"><code>{m.name}</code></a></td><td>{self.markdown(m.doc, page)[3:-4]}</td></tr>' for m in inside)
                title = PARTS.get(folder, "Core")
                out.append(f"\n## {title} {{: #{slug(title)} }}\n" + self.block(f'<table class="contents"><tbody>{rows}</tbody></table>', "table contents"))
        every = sorted(((e.name, m.name) for m in self.modules.values() for e in m.entries), key=lambda x: (x[0].lower(), x))
        links = " ".join(f'<a href="{m}.html#{n}"><code>{n}</code></a>' for n, m in every)
        out.append("\n## All names {: #all-names }\n" + self.block(f'<p class="names" data-search-exclude>{links}</p>'))
        self.pages[page] = self.front("API", "Every exported name", .5) + "".join(out)
        return page.replace(".html", ".md")

    # the whole

    def front_page(self):
        """The page that opens: README, which is nbs/index.ipynb."""
        nb = nbformat.read(NBS/"index.ipynb", 4)
        page, out, last = "index.html", [], ""
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                first_one = re.match(r"# (.+)\n+>\s*(.+)\n*", cell.source)
                source = cell.source[first_one.end():] if first_one and not out else cell.source
                if first_one and not out:
                    out.append(f"# {first_one[1]} {{: #top }}\n" + self.block(self.markdown(first_one[2], page), "promise"))
                out.append(self.text(source, page))
                last = source
            else:
                out.append(self.code(cell, page, last))
        self.pages[page] = self.front("protonb", self.cfg["description"]) + "".join(out)

    def project(self):
        """Pages of the repository's own Markdown files."""
        out = []
        for name, short_name in PAGES_OF_FILES.items():
            if short_name and (ROOT/name).exists():
                page, text = f"project/{short_name}.html", (ROOT/name).read_text(encoding="utf-8")
                title = re.search(r"^# (.+)$", text, re.M)[1]
                self.pages[page] = self.front(title, title) + self.text(text, page)
                out.append({title: page.replace(".html", ".md")})
        return out

    def make(self):
        """All pages and files, and the navigation."""
        self.titles = {p.relative_to(NBS).as_posix(): re.search(r"^# (.+)$", next(c["source"] for c in nbformat.read(p, 4).cells
                       if c["cell_type"] == "markdown"), re.M)[1].strip() for p in self.notebooks}
        self.front_page()
        book = [{"Start": "index.md"}, *(self.lesson(p) for p in self.notebooks if p.parent == NBS)]
        book += [{title: [self.lesson(p) for p in self.notebooks if p.parent.name == folder]} for folder, title in PARTS.items()]
        reference = ["api/index.md"]
        for folder in ("", *PARTS):
            inside = [self.reference(m) for n, m in self.modules.items() if (Path(n).parts[0] if "/" in n else "") == folder]
            reference += [{PARTS.get(folder, "Core"): inside}] if inside else []
        self.index_of_symbols()
        self.nav = [{"Book": book}, {"API": reference}, {"Project": self.project()}]
        self.pages = self.formulas.fill(self.pages)

    def config(self):
        """mkdocs.yml."""
        about = f"protonb {self.cfg['version']}" + (f", commit {commit()}" if commit() else "")
        return dict(
            site_name="protonb", site_description=self.cfg["description"], docs_dir="docs", site_dir=str(SITE), nav=self.nav, use_directory_urls=False,
            copyright=f'{about} · Apache licence 2.0',
            theme=dict(name="material", font=False, language="en", icon=dict(logo="material/hexagon-multiple-outline"), palette=[
                dict(media="(prefers-color-scheme: light)", scheme="default", primary="custom", accent="custom",
                     toggle=dict(icon="material/weather-night", name="Dark")),
                dict(media="(prefers-color-scheme: dark)", scheme="slate", primary="custom", accent="custom",
                     toggle=dict(icon="material/weather-sunny", name="Light"))],
                features=["navigation.footer", "navigation.tabs", "navigation.indexes", "navigation.top", "navigation.prune", "search.highlight",
                          "search.suggest", "content.code.copy", "toc.follow"]),
            plugins=[dict(search=dict(separator=r'[\s\-,:!=\[\]()"`/]+|\.(?!\d)')), "offline"],
            markdown_extensions=["attr_list", "toc"], extra_css=["assets/katex/katex.min.css", "assets/book.css"],
            extra=dict(generator=False, polyfills=["assets/iframe-worker.js"]), validation=dict(links=dict(not_found="ignore", unrecognized_links="ignore", anchors="ignore")))


def folded(text):
    """Cells of imports that follow each other, in one fold; links to the later ones keep their place."""
    return re.sub(r"</details>\s*</div>\s*<div class=\"cell[^\"]*\" (id=\"[^\"]*\")>\s*<details class=\"imports\"><summary>imports</summary>", r"<span \1></span>", text)


def plain(text):
    """Markdown without code, tables, formulas on their own and the marks of the rest."""
    text = re.sub(r"```.*?```|^\|.*$|\$\$.*?\$\$", "", text, flags=re.M | re.S)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*]", "", text)).strip()


def described(cell, output, before, place=""):
    """Alternative text of a figure: what the cell says (`#| fig-alt:`, or `alt` in the output's metadata), else its titles and labels, and the sentence
    that leads to it with a colon; where there is nothing of that, the section it belongs to."""
    given = re.search(r"^#\|\s*(?:fig-)?alt:\s*(.+)$", cell["source"], re.M)
    if given:
        return given[1].strip().strip("\"'")
    meta = output.get("metadata", {})
    for m in (meta, *[v for v in meta.values() if isinstance(v, dict)]):
        if isinstance(m.get("alt"), str):
            return m["alt"]
    words = re.findall(r"(?:title|xlabel|ylabel|suptitle)\w*\s*(?:=|\()\s*f?'([^'{}]{3,})'", cell["source"])
    words = [w for w in dict.fromkeys(w.replace("\\n", " ") for w in words) if not re.search(r"[$\\]", w)]
    text = re.sub(r"\s+", " ", re.sub(r"^#+ .*$", "", plain(before), flags=re.M)).strip()
    lead = re.split(r"(?<=[.!?])\s+", text)[-1]
    lead = lead[:-1] if lead.endswith(":") and len(lead) <= 200 and not re.search(r"[$\\]", lead) else ""
    where = f' in "{place}"' if place and not (words or lead) else ""
    return "Figure" + where + (f" ({'; '.join(words)})" if words else "") + (f": {lead}" if lead else "")


def first(doc):
    """First sentence or paragraph of a docstring."""
    return re.split(r"\n\s*\n", doc.strip())[0]


def short(source, lines=8):
    """The beginning of a long assignment."""
    all_lines = source.splitlines()
    return source if len(all_lines) <= lines else "\n".join([*all_lines[:lines], "..."])


def uncommented(source):
    """An assignment of one line without the comment behind it, which stands below."""
    return re.sub(r"\s+# .*$", "", source) if "\n" not in source and "'" not in source.rpartition("#")[2] else source


def code(text):
    """Inline code, or nothing."""
    return f"<code>{escape(text)}</code>" if text else ""


def npm():
    """Folder of the npm packages, installed when a pinned version is missing."""
    def version(spec):
        name, want = spec.rsplit("@", 1)
        found = NPM/"node_modules"/name/"package.json"
        return found.exists() and json.loads(found.read_text())["version"] == want
    if not all(map(version, PACKAGES)):
        if not shutil.which("npm") or not shutil.which("node"):
            sys.exit("make site needs npm and node for KaTeX and the fonts (Debian and Ubuntu: apt-get install nodejs npm)")
        NPM.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--prefix", NPM, "--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *PACKAGES],
                       check=True, stdout=subprocess.DEVNULL)
    return NPM/"node_modules"


def assets(out):
    """Style sheet, fonts, KaTeX and the search's shim."""
    modules = npm()
    (out/"katex"/"fonts").mkdir(parents=True)
    shutil.copy(modules/"katex"/"dist"/"katex.min.css", out/"katex")
    for f in (modules/"katex"/"dist"/"fonts").glob("*.woff2"):
        shutil.copy(f, out/"katex"/"fonts")
    shutil.copy(modules/"iframe-worker"/"shim"/"index.js", out/"iframe-worker.js")
    faces = []
    for family, files in FONTS.items():
        for package, name, style in files:
            shutil.copy(modules/"@fontsource-variable"/package/"files"/f"{name}.woff2", out)
            faces.append(f"@font-face{{font-family:'{family}';font-style:{style};font-weight:200 900;font-display:swap;src:url({name}.woff2) format('woff2')}}")
    (out/"book.css").write_text("\n".join(faces) + "\n" + (Path(__file__).parent/"site.css").read_text())


def main():
    """Make the site."""
    start = time.time()
    shutil.rmtree(DOCS, ignore_errors=True)
    assets(DOCS/"docs"/"assets")
    book = Book()
    book.make()
    for name, text in book.pages.items():
        path = DOCS/"docs"/Path(name).with_suffix(".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, raw in book.files.items():
        path = DOCS/"docs"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    (DOCS/"mkdocs.yml").write_text(yaml.safe_dump(book.config(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    made = time.time()
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "--clean", "-f", str(DOCS/"mkdocs.yml")], check=True,
                   env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"})
    size = sum(p.stat().st_size for p in SITE.rglob("*") if p.is_file())
    print(f"site/index.html: {len(book.pages)} pages, {len(book.files)} figures, {size/1e6:.0f} MB; text {made-start:.0f} s, pages {time.time()-made:.0f} s")


if __name__ == "__main__":
    main()
