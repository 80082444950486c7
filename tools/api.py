"""What the package exports, read from its sources without importing them: signatures, argument comments (docments), docstrings, lesson cells.

`python tools/api.py` counts what is not described: functions, methods and classes without a docstring, parameters, fields and constants without a
comment. The site's API pages are made from it, tests/test_site.py asserts that nothing is missing.
"""
import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN_DUNDERS = ("__init__", "__call__")
WIDE = 100          # a signature longer than this is broken, one parameter a line


@dataclass
class Param:
    """A parameter of a function or a field of a class."""
    name: str
    type: str = ""
    default: str = ""
    text: str = ""      # its comment: shape, unit, meaning


@dataclass
class Entry:
    """One exported symbol, or a method of one."""
    name: str
    kind: str                                    # function, class, property or constant
    signature: str = ""
    doc: str = ""
    params: list = field(default_factory=list)
    returns: Param | None = None
    methods: list = field(default_factory=list)  # Entry of each
    source: str = ""
    made: bool = False                           # a class with an __init__ of its own: its params are arguments, not fields
    cell: str = ""                               # id of the notebook cell that exports it

    def missing(self):
        """What is not described, one line each."""
        lost = [] if self.doc else [f"{self.name}: no {'comment' if self.kind == 'constant' else 'docstring'}"]
        lost += [f"{self.name}({p.name}): no comment" for p in self.params if not p.text]
        return lost + [line for m in self.methods for line in m.missing()]


@dataclass
class Module:
    """An exported module and the lesson that writes it."""
    name: str
    doc: str
    notebook: str       # below nbs/
    entries: list


def comments(source):
    """{line: text of the comment on it}, and the lines that hold nothing but a comment."""
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("#:").strip()
            if not token.line[:token.start[1]].strip():
                alone.add(token.start[0])
    return found, alone


class Reader:
    """The entries of one source file."""
    def __init__(self, source):
        self.source, self.lines = source, source.splitlines()
        self.tree = ast.parse(source)
        self.comments, self.alone = comments(source)
        self.cells = {i: m[1] for i, line in enumerate(self.lines, 1) if (m := re.match(r"# %% \S+ #(\S+)", line))}

    def said(self, first, last, after=True):
        """The comment behind a statement or argument that ends on `last`, with the lines of comment that follow it."""
        words = [self.comments[last]] if last in self.comments and last not in self.alone else []
        while after and last + 1 in self.alone:
            last += 1
            words.append(self.comments[last])
        if not words and first != last and first in self.comments:
            words = [self.comments[first]]
        return " ".join(words)

    def text(self, node):
        """Source of a node on one line; `ast.get_source_segment` would part the whole file into lines for each."""
        if node is None:
            return ""
        lines = [line.encode() for line in self.lines[node.lineno-1:node.end_lineno]]      # the parser counts bytes
        lines[-1] = lines[-1][:node.end_col_offset]
        lines[0] = lines[0][node.col_offset:]
        return re.sub(r"\s+", " ", b"\n".join(lines).decode())

    def params(self, node):
        """Parameters of a function; several on one line share its comment, or have one part of it each where it has as many, parted by semicolons."""
        a = node.args
        plain = a.posonlyargs + a.args
        defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
        rows = list(zip(plain, defaults)) + ([(a.vararg, None)] if a.vararg else []) + list(zip(a.kwonlyargs, a.kw_defaults))
        rows += [(a.kwarg, None)] if a.kwarg else []
        ends = [(d or p).end_lineno for p, d in rows]
        head = self.head(node)
        stars = {a.vararg: "*", a.kwarg: "**"}
        out = []
        for (p, d), end in zip(rows, ends):
            if p.arg in ("self", "cls"):
                continue
            beside = [q.arg for (q, _), e in zip(rows, ends) if e == end and q.arg not in ("self", "cls")]
            text = self.said(p.lineno, end).partition(" -> ")[0]
            parts = re.split(r";\s+", text)
            if len(beside) == len(parts) > 1:       # one part of the comment for each
                text = parts[beside.index(p.arg)]
            elif end == head and len(beside) > 1:   # there it tells what comes back
                text = ""
            out.append(Param(stars.get(p, "") + p.arg, self.text(p.annotation), self.text(d), text))
        return out

    def head(self, node):
        """The line that closes the parameters of a function."""
        return next((i for i in range(node.lineno, node.body[0].lineno + 1) if re.search(r"\)\s*(->.*)?:(\s|$)", self.lines[i-1])), 0)

    def returns(self, node):
        """What a function gives back: its annotation and the comment behind the colon of its head, on a line without parameters."""
        line = self.head(node)
        inside = [p for p in ast.walk(node.args) if isinstance(p, ast.arg) and p.arg not in ("self", "cls") and p.end_lineno == line]
        text = self.comments.get(line, "")
        shared = len(inside) == 1 or len(inside) == text.partition(" -> ")[0].count("; ") + 1 > 1
        text = text.partition(" -> ")[2] if " -> " in text and inside else "" if shared else text
        return Param("", self.text(node.returns), "", text) if node.returns or text else None

    def signature(self, node, name, skip_self=False):
        """`name(...)`, broken where it is long."""
        a = node.args
        ps = self.params(node)
        kinds = [p.arg for p in a.kwonlyargs]
        words = []
        for p in ps:
            if not a.vararg and kinds and p.name == kinds[0]:
                words.append("*")
            words.append(p.name + (f": {p.type}" if p.type else "") + ((" = " if p.type else "=") + p.default if p.default else ""))
        back = f" -> {self.text(node.returns)}" if node.returns else ""
        line = f"{name}({', '.join(words)}){back}"
        return line if len(line) <= WIDE else f"{name}(\n" + "".join(f"    {w},\n" for w in words) + f"){back}"

    def described(self, node, method):
        """A docstring; for a method, or a body of one line, the comment behind its head will do."""
        doc = ast.get_docstring(node)
        return doc or (self.comments.get(self.head(node), "") if method or node.end_lineno == node.lineno else "")

    def function(self, node, name):
        """Entry of a function or method."""
        what = [self.text(d) for d in node.decorator_list]
        prop = any(d in ("property", "cached_property", "functools.cached_property") for d in what)
        short = name.split(".")[-1]
        sign = short if prop else self.signature(node, name)
        back = self.returns(node)
        if back and ast.get_docstring(node) is None and node.end_lineno == node.lineno:
            back.text = ""      # the comment of a one-line body is its description
        return Entry(name, "property" if prop else "function", sign, self.described(node, "." in name), [] if prop else self.params(node), back,
                     source=self.segment(node))

    def segment(self, node):
        """Source with decorators."""
        first = min([d.lineno for d in getattr(node, "decorator_list", [])] + [node.lineno])
        last = node.end_lineno
        while last in self.alone:
            last += 1
        return "\n".join(self.lines[first-1:last])

    def klass(self, node):
        """Entry of a class: fields, or the parameters of its __init__, and its public methods."""
        out = Entry(node.name, "class", doc=ast.get_docstring(node) or "", source=self.segment(node))
        bases = ", ".join(map(self.text, node.bases))
        out.signature = f"class {node.name}" + (f"({bases})" if bases else "")
        for part in node.body:
            if isinstance(part, ast.AnnAssign):
                out.params.append(Param(self.text(part.target), self.text(part.annotation), self.text(part.value),
                                        self.said(part.lineno, part.end_lineno)))
            elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                out.params += self.params(part)
                out.made = True
                out.signature = self.signature(part, f"class {node.name}")
            elif isinstance(part, ast.FunctionDef) and (not part.name.startswith("_") or part.name in SHOWN_DUNDERS):
                out.methods.append(self.function(part, f"{node.name}.{part.name}"))
        return out

    def constant(self, node, name):
        """Entry of an assignment; its comment stands behind it, or in the lines above."""
        text = self.said(node.lineno, node.end_lineno, after=False)
        line, above = node.lineno - 1, []
        while not text and line in self.alone and not self.lines[line-1].startswith("# %%"):
            above.insert(0, self.comments[line])
            line -= 1
        if isinstance(node.value, ast.Call) and not text:     # the first line of a long call may carry it
            text = self.comments.get(node.value.lineno, "")
        return Entry(name, "constant", self.segment(node), text or " ".join(above), source=self.segment(node))

    def entries(self):
        """All that `__all__` names, in the order of the file."""
        names, out, cell = [], {}, ""
        for node in self.tree.body:
            cell = next((c for line, c in reversed(self.cells.items()) if line <= node.lineno), "")
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            targets = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            for t in (t.id for t in targets if isinstance(t, ast.Name)):
                if t == "__all__":
                    names = ast.literal_eval(node.value)
                else:
                    out[t] = self.constant(node, t)
                    out[t].cell = cell
            if isinstance(node, ast.FunctionDef):
                out[node.name] = self.function(node, node.name)
            elif isinstance(node, ast.ClassDef):
                out[node.name] = self.klass(node)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                out[node.name].cell = cell
        return [e for n, e in out.items() if n in names]


@cache
def modules():
    """Every exported module, in the order of the book."""
    out = []
    for path in (ROOT/"protonb").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        made = re.search(r"AUTOGENERATED.*File to edit: (?:\.\./)+nbs/(\S+)\.$", source, re.M)
        if made and path.name != "_modidx.py":
            name = ".".join(path.relative_to(ROOT/"protonb").with_suffix("").parts)
            reader = Reader(source)
            out.append(Module(name, ast.get_docstring(reader.tree) or "", made[1], reader.entries()))
    return sorted(out, key=lambda m: m.notebook)


def missing():
    """What no page could describe, one line each."""
    return [f"{m.name}.{line}" for m in modules() for e in m.entries for line in e.missing()]


def main():
    """Print the count, and what is missing."""
    every = [e for m in modules() for e in m.entries]
    parts = every + [x for e in every for x in e.methods]
    lost = missing()
    print(*lost, sep="\n")
    print(f"{len(modules())} modules, {len(every)} exported symbols, {sum(len(e.params) for e in parts)} parameters and fields, {len(lost)} not described")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
